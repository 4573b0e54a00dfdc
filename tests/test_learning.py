"""The quick start learns: on prompts it never saw, reward and independent checker say the pictures got better."""

import json

import pytest

import grpo_flux
import runtime
from heldout import compare


def test_the_tiny_preset_improves_heldout_pictures(tmp_path):
    out = tmp_path / "out"
    words = ["--preset", "tiny", "--seed", "0", "--output-dir", str(out)]
    grpo_flux.main(runtime.parse_config(grpo_flux.Config, grpo_flux.PRESETS, words))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["ratio_max_deviation_first_update"] for row in rows) <= 1e-6
    scores = compare(out)
    assert scores["hps"]["difference"] > 5 * scores["hps"]["error"]
    assert scores["correct"]["difference"] >= 0.10
    assert scores["clip"]["difference"] > 0  # a reward that was not trained on
    assert scores["hps"]["trained"] == pytest.approx(rows[-1]["reward_hps"], abs=0.15)  # the metric speaks of pictures
