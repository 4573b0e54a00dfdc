"""A run of two processes that is killed again and again ends like one that was not; a folder has one run at a time.

Three kills by default; KILLS=20 pytest -m slow tests/test_killed.py kills twenty times.
"""

import contextlib
import functools
import json
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import launch
from runtime.options import latest_checkpoint

ITERATIONS = 12
OPTIONS = {"iterations": ITERATIONS, "save_every": 1, "ema_decay": 0.5, "num_samples": 2, "sample_every": 4}


def rows(output_dir):
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def begin(output_dir, logs):
    """The run's two processes: started anew, or going on from its newest checkpoint."""
    resume = (output_dir / "metrics.jsonl").exists()
    changes = OPTIONS | {"output_dir": str(output_dir), "resume": resume}
    return launch.start("launch_cases", "train", ("flux", changes), 2, logs)


def kill(processes):
    """One of the two dies first, and the other some time later, waiting for it or not, or of its own for lack of it."""
    first, second = random.sample(processes, 2)
    os.kill(first.pid, signal.SIGKILL)
    time.sleep(random.choice([0, 0.1]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(second.pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
    assert first.exitcode == -signal.SIGKILL and second.exitcode not in (0, None)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_like_one_that_is_not(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    launch.run("launch_cases", "train", ("flux", OPTIONS | {"output_dir": str(straight)}), 2, tmp_path / "logs")

    random.seed(0)
    wanted, resumed_at, in_a_save = int(os.environ.get("KILLS", 3)), [], 0
    while len(resumed_at) < wanted:
        logs = tmp_path / f"logs-{len(resumed_at)}"
        before = newest(killed)
        if before >= ITERATIONS - 3:  # it might end before it is killed
            finish(straight, killed, logs)
            killed = killed.with_name(killed.name + "-again")
            continue
        started = time.time()
        processes = begin(killed, logs)
        kind = len(resumed_at) % 3
        while not is_time(kind, killed, before, started) and all(process.is_alive() for process in processes):
            time.sleep(0.001)
        time.sleep(random.uniform(0, (0.02, 1, 1)[kind]))
        assert all(process.is_alive() for process in processes), (logs / "rank-0.log").read_text()[-3000:]
        kill(processes)
        in_a_save += being_saved(killed, started)
        resumed_at.append(newest(killed))
        if len(resumed_at) % 2 and (killed / "metrics.jsonl").exists():
            with (killed / "metrics.jsonl").open("a") as file:
                file.write('{"iteration": 4, "rew')  # as if it had died while it wrote a line
    assert in_a_save >= 1 and max(resumed_at) >= 1
    finish(straight, killed, tmp_path / "logs-last")
    print(f"{wanted} kills, {in_a_save} of them in a save; resumed after iterations {resumed_at}")


def is_time(kind, output_dir, before, started):
    """0: a checkpoint is being written; 1: one has been written; 2: the run has started. Then the kill comes soon."""
    if kind == 0:
        return being_saved(output_dir, started)
    return newest(output_dir) > before if kind == 1 else time.time() > started + 1


def newest(output_dir):
    """Iterations done at the newest checkpoint."""
    found = latest_checkpoint(output_dir)
    return int(found.name.removeprefix("checkpoint-")) if found else 0


def being_saved(output_dir, since):
    """Is there a checkpoint that was begun since then and is not complete?"""
    try:
        return any(part.stat().st_mtime > since for part in output_dir.glob("checkpoint-*.part"))
    except FileNotFoundError:  # it was renamed meanwhile: now it is complete
        return False


def finish(straight, killed, logs):
    for process in (processes := begin(killed, logs)):
        process.join(600)
    assert [p.exitcode for p in processes] == [0, 0], (logs / "rank-0.log").read_text()[-3000:]
    assert_equal(straight, killed, ITERATIONS)


def assert_equal(straight, killed, iterations):
    """The two runs wrote the same, bit for bit."""
    assert rows(killed) == rows(straight)
    assert [row["iteration"] for row in rows(killed)] == list(range(1, iterations + 1))
    for part in ("transformer", "transformer_ema"):
        name = f"checkpoint-{iterations:06d}/{part}/diffusion_pytorch_model.safetensors"
        a, b = load_file(killed / name), load_file(straight / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for picture in straight.glob("samples/*.png"):
        assert (killed / "samples" / picture.name).read_bytes() == picture.read_bytes()
    assert not list(killed.glob("*.part"))


STOPPED = {"iterations": 3, "save_every": 1000, "ema_decay": 0.5, "num_samples": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run on so many processes that gets no signal."""

    @functools.cache
    def run(processes):
        folder = tmp_path_factory.mktemp("undisturbed")
        changes = STOPPED | {"output_dir": str(folder / "run")}
        launch.run("launch_cases", "train", ("flux", changes), processes, folder / "logs")
        return folder / "run"

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "time_of_phase", "processes", "done", "changes"),
    [
        ("rollout", 2, 1, 1, {}),
        ("rollout", 2, 1, 1, {"save_every": 1}),  # which is saved already
        ("rollout", 2, 2, 1, {}),
        ("reward", 3, 1, 1, {}),  # first: that of the sample pictures
        ("update 1", 2, 1, 1, {}),
        ("update 1", 2, 2, 1, {}),
        ("update 2", 2, 1, 2, {}),  # a weight has changed: the iteration is finished
        ("rollout", 1, 1, 0, {}),
        ("sample pictures", 1, 1, 0, {}),
    ],
)
def test_sigterm_ends_a_run_at_once_and_loses_no_finished_iteration(
    phase, time_of_phase, processes, done, changes, undisturbed, tmp_path
):
    out = tmp_path / "run"
    out.mkdir()
    changes = STOPPED | changes | {"output_dir": str(out)}
    case = ("flux", changes, phase, time_of_phase)
    started = launch.start("launch_cases", "train_until_sigterm", case, processes, tmp_path / "logs")
    for process in started:
        process.join(600)
    ended, sent = time.time(), (out / "sent").stat().st_mtime
    text = (tmp_path / "logs" / "rank-0.log").read_text()
    assert [process.exitcode for process in started] == [0] * processes, text
    assert f"stopped after iteration {done}; continue with --output-dir {out} --resume\n" in text
    assert ended - sent < 15  # three seconds on a machine that has nothing else to do
    assert newest(out) == done and len(rows(out)) == done
    state = out / f"checkpoint-{done:06d}" / "state"
    assert not done or (state.stat().st_mtime < sent) == (changes["save_every"] == 1)
    launch.run("launch_cases", "train", ("flux", changes | {"resume": True}), processes, tmp_path / "logs-resumed")
    assert_equal(undisturbed(processes), out, 3)


PATIENT = """
import time
from pathlib import Path

def patient(images, prompts):
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    return images.mean((1, 2, 3))
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_of_simultaneous_starts_in_one_folder_exactly_one_runs(count, tmp_path):
    (tmp_path / "own.py").write_text(PATIENT)  # the run lasts until the others have ended
    options = {"output_dir": str(tmp_path / "out"), "reward": f"{tmp_path / 'own.py'}:patient", "reward_paths": ""}
    options |= {"iterations": 2, "prompts_per_iteration": 1, "num_samples": 1, "steps": 3, "updates_per_rollout": 1}
    logs = [tmp_path / f"logs-{seed}" for seed in range(count)]
    started = [
        launch.start("launch_cases", "train", ("flux", options | {"seed": seed}), 1, log)[0]
        for seed, log in enumerate(logs)
    ]
    given_up = time.time() + 300  # two that run would wait for each other
    while sum(process.is_alive() for process in started) > 1 and time.time() < given_up:
        time.sleep(0.05)
    (tmp_path / "go").touch()
    for process in started:
        process.join(300)
    texts = [(log / "rank-0.log").read_text() for log in logs]
    assert sorted(process.exitcode for process in started) == [0] + [1] * (count - 1), texts
    (winner,) = (seed for seed, process in enumerate(started) if process.exitcode == 0)
    refusal = f"another process is working in {tmp_path / 'out'}, "
    assert all(text.startswith(f"error: {refusal}") for seed, text in enumerate(texts) if seed != winner)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seed"] == winner
    assert [row["iteration"] for row in rows(tmp_path / "out")] == [1, 2]
    assert {path.name for path in (tmp_path / "out").iterdir()} - {".lock"} == {
        *("config.json", "metrics.jsonl", "reward.png", "samples", "checkpoint-000002")
    }
