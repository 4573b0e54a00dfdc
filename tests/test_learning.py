"""The tiny presets learn: on prompts they never saw, reward and independent checker say the results got better."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval as evaluation
import grpo_flux
import grpo_sd
import grpo_video
from runtime import cli

pytestmark = pytest.mark.slow


def run(trainer, preset, out):
    """A run of the preset with seed 0. Returns the rows of its metrics."""
    words = ["--preset", preset, "--seed", "0", "--output-dir", str(out)]
    trainer.main(cli.parse_config(trainer.Config, trainer.PRESETS, words))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["ratio_max_deviation_first_update"] for row in rows) <= 1e-6
    return rows


def compare(preset, run, out):
    """The run's last checkpoint beside its base: results.json, and {metric: {"mean", "difference", "error"}} of it."""
    words = ["--preset", preset, "--output-dir", str(out)]
    words += ["--checkpoint", str(cli.latest_checkpoint(run))]
    evaluation.main(cli.parse_config(evaluation.Config, evaluation.PRESETS, words))
    results = json.loads((out / "results.json").read_text())
    _, trained = results["models"]
    return results, {metric: models[trained]["overall"] for metric, models in results["summary"].items()}


@pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd], ids=lambda trainer: trainer.__name__)
def test_the_tiny_preset_improves_heldout_pictures(trainer, tmp_path):
    rows = run(trainer, "tiny", tmp_path / "run")
    _, scores = compare("tiny", tmp_path / "run", tmp_path / "eval")
    assert scores["hps"]["difference"] > 5 * scores["hps"]["error"]
    assert scores["geneval"]["difference"] >= 0.10
    assert scores["clip"]["difference"] > 0  # a reward that was not trained on
    seen = sum(row["reward_hps"] for row in rows[-10:]) / 10
    assert scores["hps"]["mean"] == pytest.approx(seen, abs=0.1)  # the metric speaks of these pictures


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_tiny_preset_improves_heldout_videos(task, tmp_path):
    run(grpo_video, f"tiny-{task}", tmp_path / "run")
    results, scores = compare("tiny-video", tmp_path / "run", tmp_path / "eval")
    for reward, measured in {"t2v": {"vq": "uncleanness", "mq": "roughness"}, "i2v": {"mq": "roughness"}}[task].items():
        assert scores[reward]["difference"] > 5 * scores[reward]["error"]
        assert scores[measured]["difference"] < -3 * scores[measured]["error"]  # the checker's, of the same quality
    assert scores["right"]["difference"] > -0.04  # and the clips still show what they should
    if task == "i2v":
        base, trained = (first_frame_psnr(results, name, tmp_path / "eval") for name in results["models"])
        assert trained > base - 1  # the first frame stays the given one


def first_frame_psnr(results, name, folder):
    """Mean PSNR in dB of the videos' first frames against the given pictures."""
    values = []
    for picture in results["pictures"]:
        given = np.asarray(Image.open(picture["image"]).convert("RGB"), float)
        video = Image.open(Path(folder, results["models"][name]["pictures"], picture["picture"]))
        first = np.asarray(video, float)[: len(given)]
        values.append(-10 * np.log10(((first - given) ** 2).mean() / 255**2))
    return np.mean(values)
