"""The tiny presets learn: on prompts they never saw, reward and independent checker say the pictures got better."""

import json

import pytest

import grpo_flux
import grpo_sd
import runtime
from heldout import compare


@pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd], ids=lambda trainer: trainer.__name__)
def test_the_tiny_preset_improves_heldout_pictures(trainer, tmp_path):
    out = tmp_path / "out"
    words = ["--preset", "tiny", "--seed", "0", "--output-dir", str(out)]
    trainer.main(runtime.parse_config(trainer.Config, trainer.PRESETS, words))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["ratio_max_deviation_first_update"] for row in rows) <= 1e-6
    scores = compare(out)
    assert scores["hps"]["difference"] > 5 * scores["hps"]["error"]
    assert scores["correct"]["difference"] >= 0.10
    assert scores["clip"]["difference"] > 0  # a reward that was not trained on
    seen = sum(row["reward_hps"] for row in rows[-10:]) / 10
    assert scores["hps"]["trained"] == pytest.approx(seen, abs=0.1)  # the metric speaks of these pictures
