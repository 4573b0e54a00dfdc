"""Trainers, eval.py and rewards on the accelerator that tests/pretend.py pretends: no device mixing, equal numbers."""

import json
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import accelerator_cases
from conftest import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What tests/accelerator_cases.py left."""
    folder = tmp_path_factory.mktemp("accelerator")
    subprocess.run([sys.executable, f"{ROOT}/tests/accelerator_cases.py", folder], check=True)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", accelerator_cases.CASES)
def test_the_accelerator_gives_the_numbers_of_the_cpu(case, results):
    cpu, accelerator = results["cpu"][case], results["pretend"][case]
    assert isinstance(accelerator, dict), accelerator  # else a traceback
    exact = case in ("images", "videos")  # where pictures lie between as PNG files, or as bytes, they may be rounded
    assert accelerator == pytest.approx(cpu, rel=1e-6 if exact else 1e-3, abs=1e-5 if exact else 1e-4)


@pytest.mark.parametrize("case", accelerator_cases.TRAININGS)
def test_the_accelerator_trains_the_weights_of_the_cpu(case, folder):
    files = sorted(folder.glob(f"cpu/{case}/checkpoint-*/**/*.safetensors"))
    assert len(files) == {"flux": 2, "flux-lora": 4}.get(case, 1)  # with an average; and once more after --resume
    for file in files:
        cpu, accelerator = load_file(file), load_file(folder / "pretend" / file.relative_to(folder / "cpu"))
        assert cpu.keys() == accelerator.keys()
        assert max((cpu[k] - accelerator[k]).abs().max() for k in cpu) < 2e-5  # of a step of 1e-4


@pytest.mark.parametrize("expression", accelerator_cases.REFUSED)
def test_it_refuses_what_a_gpu_refuses(expression, results):
    raised = results["operations"][expression]
    assert any(part in raised for part in ("device", "generator")), raised


@pytest.mark.parametrize("expression", accelerator_cases.ALLOWED)
def test_it_does_what_a_gpu_does(expression, results):
    assert results["operations"][expression] == ""
