"""The tiny presets learn: on prompts they never saw, reward and independent checker say the results got better.

Base and trained draw the same held-out prompts from the same noise; eval.py draws, scores and compares them.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

import eval as evaluation
import grpo_flux
import grpo_sd
import grpo_video
from runtime.options import parse_config

pytestmark = pytest.mark.slow
# The moving world's checker: the share of right clips, how rough their motion is and how unclean their frames.
CHECKER = ",".join(f"tiny/clips.py:{name}" for name in ("right", "roughness", "uncleanness"))


def learn(trainer, preset, out):
    """A run of the preset with seed 0. Returns the rows of its metrics."""
    words = ["--preset", preset, "--seed", "0", "--output-dir", str(out), "--num-samples", "8"]
    trainer.main(parse_config(trainer.Config, trainer.PRESETS, words))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["ratio_max_deviation_first_update"] for row in rows) <= 1e-6
    updates = json.loads((out / "config.json").read_text())["updates_per_rollout"]
    clipped = sum(row["clip_fraction"] for row in rows) / len(rows) * updates / (updates - 1)  # not in the first one
    assert 0.05 < clipped < 0.42  # measured: 0.39 (FLUX), 0.21 (Stable Diffusion), 0.13 (t2v), 0.11 (i2v)
    return rows


def compare(run, folder, *words):
    """eval.py's results.json of the run's last checkpoint beside its base, and {metric: its difference overall}."""
    checkpoint = max(run.glob("checkpoint-??????"))
    words = ["--checkpoint", str(checkpoint), "--output-dir", str(folder), *words]
    evaluation.main(parse_config(evaluation.Config, evaluation.PRESETS, words))
    results = json.loads((folder / "results.json").read_text())
    _, trained = results["models"]  # the base is first
    return results, {metric: models[trained]["overall"] for metric, models in results["summary"].items()}


@pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd], ids=lambda trainer: trainer.__name__)
def test_the_tiny_preset_improves_heldout_pictures(trainer, tmp_path):
    rows = learn(trainer, "tiny", tmp_path / "out")
    words = ["--preset", "tiny", "--metrics", "hps,clip,geneval", "--images-per-prompt", "2"]
    _, scores = compare(tmp_path / "out", tmp_path / "eval", *words)
    assert scores["hps"]["difference"] > 5 * scores["hps"]["error"]
    assert scores["geneval"]["difference"] >= 0.10  # the checker's accuracy
    assert scores["clip"]["difference"] > 0  # a reward that was not trained on
    seen = sum(row["reward_hps"] for row in rows[-10:]) / 10
    assert scores["hps"]["mean"] == pytest.approx(seen, abs=0.1)  # the metric speaks of these pictures


def psnr(results, folder, model):
    """(P N,) of each clip's first frame against the given picture. A clip is a PNG, its frames one below the other."""
    folder, height, psnrs = folder / results["models"][model]["pictures"], results["settings"]["height"], []
    for row in results["pictures"]:
        drawn, given = (
            pil_to_tensor(Image.open(path).convert("RGB"))[:, :height] / 255
            for path in (folder / row["picture"], Path(row["image"]))
        )
        psnrs.append(-10 * (drawn - given).square().mean().log10())
    return torch.stack(psnrs)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_the_tiny_preset_improves_heldout_videos(task, tmp_path):
    learn(grpo_video, f"tiny-{task}", tmp_path / "out")
    words = ["--preset", "tiny-video", "--metrics", f"vq,mq,ta,{CHECKER}", "--images-per-prompt", "2"]
    results, scores = compare(tmp_path / "out", tmp_path / "eval", *words)
    measures = {"t2v": {"vq": ("uncleanness", 10), "mq": ("roughness", 1)}, "i2v": {"mq": ("roughness", 1.5)}}[task]
    for reward, (measure, errors) in measures.items():
        assert scores[reward]["difference"] > 4 * scores[reward]["error"]
        assert scores[measure]["difference"] < -errors * scores[measure]["error"]  # the checker's, of the same quality
    assert scores["right"]["difference"] > {"t2v": 0.08, "i2v": -0.04}[task]  # and the clips show what they should
    if task == "i2v":
        base, trained = (psnr(results, tmp_path / "eval", model).mean() for model in results["models"])
        assert trained - base > -1  # the first frame stays the given one
