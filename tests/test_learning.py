"""The tiny presets learn: on prompts they never saw, reward and independent checker say the results got better."""

import json

import pytest

import grpo_flux
import grpo_sd
import grpo_video
import heldout
import heldout_video
from runtime import cli


def run(trainer, preset, out):
    """A run of the preset with seed 0. Returns the rows of its metrics."""
    words = ["--preset", preset, "--seed", "0", "--output-dir", str(out)]
    trainer.main(cli.parse_config(trainer.Config, trainer.PRESETS, words))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["ratio_max_deviation_first_update"] for row in rows) <= 1e-6
    return rows


@pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd], ids=lambda trainer: trainer.__name__)
def test_the_tiny_preset_improves_heldout_pictures(trainer, tmp_path):
    rows = run(trainer, "tiny", tmp_path / "out")
    scores = heldout.compare(tmp_path / "out")
    assert scores["hps"]["difference"] > 5 * scores["hps"]["error"]
    assert scores["correct"]["difference"] >= 0.10
    assert scores["clip"]["difference"] > 0  # a reward that was not trained on
    seen = sum(row["reward_hps"] for row in rows[-10:]) / 10
    assert scores["hps"]["trained"] == pytest.approx(seen, abs=0.1)  # the metric speaks of these pictures


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_tiny_preset_improves_heldout_videos(task, tmp_path):
    run(grpo_video, f"tiny-{task}", tmp_path / "out")
    scores = heldout_video.compare(tmp_path / "out", noises=2)
    for reward, measured in {"t2v": {"vq": "unclean", "mq": "rough"}, "i2v": {"mq": "rough"}}[task].items():
        assert scores[reward]["difference"] > 5 * scores[reward]["error"]
        assert scores[measured]["difference"] < -3 * scores[measured]["error"]  # the checker's, of the same quality
    assert scores["correct"]["difference"] > -0.04  # and the clips still show what they should
    if task == "i2v":
        assert scores["psnr"]["difference"] > -1  # the first frame stays the given one
