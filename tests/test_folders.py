"""Output folders belong to one run, prompts are read as they are written, and damage is told in one line."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from runtime import data, loading, processes
from runtime.checkpoints import Checkpoints, open_folder, write_sums
from runtime.files import lock_folder
from runtime.options import (
    Count,
    Decay,
    Open01,
    Positive,
    Rank,
    RunError,
    Seed,
    Share,
    check_ranges,
    parse_config,
)


@dataclass(frozen=True)
class Config:
    preset: str = "a"  # a named set
    iterations: Count = 5  # rollouts
    eta: Positive = 0.3  # noise
    seed: Seed = 1  # of all
    prompts: str = "x.txt"  # file
    output_dir: str = "somewhere"  # where
    init: str = ""  # weights
    resume: bool = False  # continue
    track: str = ""  # where else


@dataclass(frozen=True)
class Ranges:
    clip: Open01 = 0.5
    share: Share = 1.0
    decay: Decay = 0.0
    rank: Rank = 0


PRESETS = {"a": {}}


def parse(*words):
    return parse_config(Config, PRESETS, words)


def tree(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.fixture
def world():
    return processes.World(0, 1, torch.device("cpu"), torch.float32)


def a_run(folder: Path, world, **changes):
    """A run that has one checkpoint."""
    cfg = Config(output_dir=str(folder), **changes)
    start(cfg, world, ["one", "two"])
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n{"iteration": 2}\n')
    network = torch.nn.Linear(1, 1)
    network.save_config = lambda folder: None
    optimizer, ema = torch.optim.AdamW(network.parameters()), processes.EMA(network, 0.0)
    checkpoints = Checkpoints(SimpleNamespace(network=network), "network", optimizer, ema, world)
    checkpoints.save(folder, 2)
    return cfg


def start(cfg, world, prompts):
    """What a run writes before its first iteration."""
    content = open_folder(cfg, world, prompts).config
    Path(cfg.output_dir, "config.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------------------------------------------- ranges


@pytest.mark.parametrize("words, expected", [
    ("--eta inf", "--eta must be above 0, got inf"),
    ("--eta nan", "--eta must be above 0, got nan"),
    ("--iterations 0", "--iterations must be at least 1, got 0"),
    ("--seed 12345678901234567890123456", "--seed must be from 0 to 2**63 - 1"),
    ("--seed -1", "--seed must be from 0"),
])  # fmt: skip
def test_a_number_out_of_range(words, expected):
    with pytest.raises(RunError) as caught:
        check_ranges(parse(*words.split()))
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("name, values", {
    "clip": (0.0, 1.0, float("nan")), "share": (0.0, 1.1), "decay": (-0.1, 1.0), "rank": (-1, 100_000),
}.items())  # fmt: skip
def test_the_ends_of_a_range(name, values):
    check_ranges(Ranges())
    for value in values:
        with pytest.raises(RunError, match=f"--{name} must be"):
            check_ranges(replace(Ranges(), **{name: value}))


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_are_split_at_line_feeds_only(tmp_path):
    prompts = ["a red\u2028circle", "two\x0bsquares", "a cross\x85es"]
    (tmp_path / "a.txt").write_text("\ufeff" + "\n".join(prompts) + "\r\n\n", encoding="utf-8")
    assert data.load_prompts(str(tmp_path / "a.txt")) == prompts
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    (tmp_path / "b.JSONL").write_text("\n".join(lines), encoding="utf-8")
    assert data.load_prompts(str(tmp_path / "b.JSONL")) == prompts


def test_a_carriage_return_ends_no_line_but_windows_ends_do(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a red\rcircle\na cross\n")
    assert data.load_prompts(str(tmp_path / "a.txt")) == ["a red\rcircle", "a cross"]
    for name, lines in {
        "b.txt": ["a red circle", "a cross"],
        "c.jsonl": ['{"prompt": "a red circle"}', '{"prompt": "a cross"}'],
    }.items():
        (tmp_path / name).write_bytes("\ufeff".encode() + "\r\n".join([*lines, ""]).encode())
        assert data.load_prompts(str(tmp_path / name)) == ["a red circle", "a cross"]


def test_half_an_emoji_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cross"}\n{"prompt": "a cat \\ud83d"}\n')
    with pytest.raises(RunError, match=r"a\.jsonl line 2 holds half a character"):
        data.load_prompts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "other", [{"image": "two.png"}, {"include": [{"class": "square", "count": 3}]}, {"tag": "counting"}], ids=str
)
def test_a_prompt_that_stands_twice_must_mean_the_same(other, tmp_path):
    row = {"prompt": "she smiles", "image": "one.png", "include": [{"class": "square", "count": 2}], "tag": "colors"}
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, (row, row | {"number": 2}))))
    assert data.load_metadata(str(file)) == {"she smiles": row}
    file.write_text("\n".join(map(json.dumps, (row, row | other))))
    with pytest.raises(RunError, match=rf"a\.jsonl line 2: its prompt appears above with another {next(iter(other))}"):
        data.load_metadata(str(file))


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.CSV"])
def test_files_that_are_neither_text_nor_jsonl_are_refused(name, tmp_path):
    (tmp_path / name).write_text('["a red circle"]')
    with pytest.raises(RunError, match="no prompt file"):
        data.load_prompts(str(tmp_path / name))


# ------------------------------------------------------------------------------------------------------ output folders


def test_home_is_expanded_and_an_empty_folder_name_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse("--output-dir", "~/runs").output_dir == str(tmp_path / "runs")
    with pytest.raises(RunError, match="--output-dir is empty"):
        parse("--output-dir", "")


@pytest.mark.parametrize("content, expected", [
    ({"model_index.json": "{}"}, "holds model_index.json, not of a run or damaged"),
    ({"config.json": '{"metrics": "hps"}'}, "holds config.json, not of a run or damaged"),
    ({"config.json": '{"metrics": '}, "holds config.json, not of a run or damaged"),
    ({"metrics.jsonl": "{}\n"}, "already holds a run"),
    ({"checkpoint-000005/unet/config.json": "{}"}, "already holds a run"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_somebody_elses_folder_is_left_as_it_is(content, expected, tmp_path, world):
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(RunError, match=expected):
        open_folder(Config(output_dir=str(tmp_path)), world, ["one"])
    assert tree(tmp_path) == before


def test_a_run_that_failed_before_its_first_iteration_does_not_hinder_the_next(tmp_path, world):
    start(Config(output_dir=str(tmp_path), seed=1), world, ["one"])
    start(Config(output_dir=str(tmp_path), seed=2), world, ["one"])
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 2


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from runtime.files import lock_folder\n"
        f"lock_folder(Path({str(tmp_path)!r})); print('locked', flush=True); time.sleep(60)"
    )
    root = Path(__file__).resolve().parent.parent
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root)
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(RunError, match="another process is working in"):
        lock_folder(tmp_path)
    other.kill()
    other.wait()
    lock_folder(tmp_path)  # the lock went with the process


# -------------------------------------------------------------------------------------------------------------- resume


def test_resume_takes_up_the_run_and_may_prolong_it(tmp_path, world):
    a_run(tmp_path, world, eta=0.7)
    cfg = parse("--output-dir", str(tmp_path), "--resume", "--iterations", "9")
    assert (cfg.eta, cfg.iterations, cfg.resume) == (0.7, 9, True)
    start(cfg, world, ["one", "two"])
    assert parse("--output-dir", str(tmp_path), "--resume").iterations == 9  # the next plain --resume knows it too


def test_a_resumed_run_needs_what_it_was_started_from_until_it_has_a_checkpoint(tmp_path, world):
    init, run = tmp_path / "gone" / "checkpoint-000001", tmp_path / "run"
    (init / "transformer").mkdir(parents=True)
    (init / "transformer" / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    sha256 = hashlib.sha256((init / "transformer/config.json").read_bytes()).hexdigest()
    (init / "SHA256SUMS").write_text(f"{sha256}  transformer/config.json\n")
    cfg = replace(a_run(run, world, init=str(init)), resume=True)
    shutil.rmtree(init)
    folder = open_folder(cfg, world, ["one", "two"])
    assert folder.init is None and folder.checkpoint == run / "checkpoint-000002"
    folder.checkpoint.rename(tmp_path / "taken-away")
    with pytest.raises(RunError, match=r"--init: there is no .*gone/checkpoint-000001; give RUN/checkpoint-NNNNNN"):
        open_folder(cfg, world, ["one", "two"])


def test_resume_after_the_run_that_it_started_from_went_on(tmp_path, world):
    """That run deletes the states of its older checkpoints; the weights stay."""
    init, run = tmp_path / "other" / "checkpoint-000001", tmp_path / "run"
    contents = {"transformer/config.json": '{"_class_name": "FluxTransformer2DModel"}', "state/config.json": "{}"}
    for name, content in contents.items():
        (init / name).parent.mkdir(parents=True)
        (init / name).write_text(content)
    write_sums(init, {name: hashlib.sha256(content.encode()).hexdigest() for name, content in contents.items()})
    cfg = replace(a_run(run, world, init=str(init)), resume=True)
    (init.parent / "checkpoint-000002").mkdir()
    Checkpoints._delete_old_states(SimpleNamespace(keep_states=1), init.parent / "checkpoint-000002")
    assert not (init / "state").exists()
    assert open_folder(cfg, world, ["one", "two"]).checkpoint == run / "checkpoint-000002"
    (init / "transformer/config.json").write_text("{}")
    with pytest.raises(RunError, match="checkpoint-000001/transformer changed after the run"):
        open_folder(cfg, world, ["one", "two"])


def test_a_tracker_keeps_its_id(tmp_path, world):
    cfg = replace(a_run(tmp_path, world), resume=True)
    before = json.loads((tmp_path / "config.json").read_text())["tracker_id"]
    assert len(before) == 8
    for track in ("tensorboard", ""):
        assert open_folder(replace(cfg, track=track), world, ["one", "two"]).config["tracker_id"] == before


def test_resume_from_a_folder_that_was_moved(tmp_path, world):
    a_run(tmp_path / "old", world)
    (tmp_path / "old").rename(tmp_path / "new")
    assert parse("--output-dir", str(tmp_path / "new"), "--resume").output_dir == str(tmp_path / "new")


def test_resume_with_other_metadata_of_the_same_prompts_is_refused(tmp_path, world):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "two squares", "tag": "counting"}\n')
    cfg = replace(a_run(tmp_path / "run", world, prompts=str(file)), resume=True)
    open_folder(cfg, world, ["one", "two"])
    file.write_text('{"prompt": "two squares", "tag": "position"}\n')
    with pytest.raises(RunError, match=r"prompts\.jsonl changed after the run in"):
        open_folder(cfg, world, ["one", "two"])


def test_resume_with_other_prompts_is_refused(tmp_path, world):
    a_run(tmp_path, world)
    before = tree(tmp_path)
    cfg = parse("--output-dir", str(tmp_path), "--resume")
    with pytest.raises(RunError, match=r"^x\.txt changed after the run in"):
        open_folder(cfg, world, ["one", "three"])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content, expected", [
    (None, "config.json is damaged, or of another version: its preset is None, which is no str"),
    ("[]", "config.json is damaged, or of another version: its preset is None, which is no str"),
    ({"eta": "much"}, "its eta is 'much', which is no float"),
    ({"script": "grpo_other.py"}, "is a run of grpo_other.py, not of test_folders.py"),
])  # fmt: skip
def test_resume_with_a_damaged_config(content, expected, tmp_path, world):
    a_run(tmp_path, world)
    file = tmp_path / "config.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    before = tree(tmp_path)
    with pytest.raises(RunError) as caught:
        parse("--output-dir", str(tmp_path), "--resume")
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_model_of_another_family_is_refused():
    with pytest.raises(RunError, match="--model tiny/sd is a StableDiffusionPipeline; this script trains a FluxPip"):
        loading.check_family("tiny/sd", "FluxPipeline")
    with pytest.raises(RunError, match="cannot load tiny/flux/vae"):
        loading.check_family("tiny/flux/vae", "FluxPipeline")
