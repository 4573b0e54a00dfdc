"""The benchmarks run the trainers as they are, and leave them as they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import grpo_sd
from benchmarks import commands, full_size, throughput
from runtime import output

SMALL = ["--preset", "tiny", "--group-size", "2", "--prompts-per-iteration", "1", "--steps", "3", "--micro-batch", "2"]
SMALL += ["--updates-per-rollout", "2"]


def test_the_recorder_repeats_the_passes_with_their_gradients_and_forgets_them():
    recorder, network = throughput.Recorder(torch.device("cpu")), nn.Linear(3, 2)
    calls = []
    network.register_forward_pre_hook(recorder.note, with_kwargs=True)
    network.register_forward_hook(lambda module, args, out: calls.append(torch.is_grad_enabled()))
    decode = recorder.wrap(lambda x: calls.append("decode"))
    with torch.no_grad():
        network(torch.ones(1, 3))
    network(torch.ones(1, 3))
    decode(1)
    assert calls == [False, True, "decode"] and recorder.seconds() > 0
    assert calls == [False, True, "decode"] * 2
    assert network.weight.grad is None and not recorder.passes


@pytest.mark.slow
def test_the_throughput_of_a_preset_is_measured_and_the_trainer_is_as_before():
    before = grpo_sd.load_models, output.load_reward
    row = throughput.run(grpo_sd, SMALL, rounds=1)
    parts = [row[name] for name in ("seconds_rollout", "seconds_reward", "seconds_update")]
    assert min(parts) > 0 and sum(parts) <= row["seconds"] * 1.01
    assert row["efficiency"] == row["necessary"] / row["seconds"]
    assert (grpo_sd.load_models, output.load_reward) == before


def test_the_costs_of_more_samples_steps_and_pixels_are_the_fastest_of_several_rounds(monkeypatch):
    asked = []
    monkeypatch.setattr(throughput, "fastest", lambda trainer, words: asked.append(words[2:]) or 100 - len(asked))
    curves = throughput.scaling(grpo_sd, ["--preset", "tiny"])
    assert curves["steps"] == [(1, 85), (2, 82), (4, 81)]  # of the third round, the fastest
    assert asked[4] == ["--steps", "24", "--sde-window", "0"] and asked[6] == ["--height", "256"] and len(asked) == 21


@pytest.mark.slow
def test_the_fastest_iteration_is_not_the_first(monkeypatch):
    finish = output.Run.finish

    def slower(run, iteration, row, samples):
        monkeypatch.setattr(run, "times", lambda samples: {"seconds": float(iteration)})
        finish(run, iteration, row, samples)

    monkeypatch.setattr(output.Run, "finish", slower)
    assert throughput.fastest(grpo_sd, SMALL) == 1.0


def test_full_size_predicts_what_the_dry_run_of_a_command_predicts(capsys):
    row = full_size.predict("grpo_sd", " ".join(SMALL), 1)
    assert row["command"] == f"grpo_sd.py {' '.join(SMALL)}" and row["fits"]
    assert f"{row['gpu_gib']['peak']:.2f} GiB on each GPU: fits" in capsys.readouterr().out
    known = json.loads(full_size.FILE.read_text(encoding="utf-8"))
    assert [(f"{script}.py {options}".strip(), n) for script, options, n in full_size.COMMANDS] == [
        (run["command"], run["processes"]) for run in known
    ]


def test_a_command_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match=r"^-c exit\(3\) failed$"):
        commands.wait(commands.start(["-c", "exit(3)"]))
    commands.wait(commands.start(["-c", "pass"]))


@pytest.mark.slow
def test_the_seconds_of_commands_are_taken_from_their_start_and_from_their_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "SHORT", [*SMALL, "--iterations", "3", "--num-samples", "1"])
    monkeypatch.setattr(commands, "start", lambda words, **environment: run(["grpo_sd.py", *words[1:]], environment))

    def run(words, environment):
        return subprocess.Popen([sys.executable, *words], cwd=commands.ROOT, env=os.environ | environment)

    alone, beside = commands.beside_each_other({"OMP_NUM_THREADS": "1"}, tmp_path)
    folders = sorted(Path(tmp_path).iterdir())
    assert [folder.name for folder in folders] == ["1-0", "2-0", "2-1"]
    third = [commands.metrics(folder)[2]["seconds"] for folder in folders]
    assert alone == third[0] and beside == (third[1] + third[2]) / 2
