"""Diversity: how far apart the pictures of one prompt are, before and after."""

from functools import cache
from itertools import groupby
from pathlib import Path

import torch
from torchvision.transforms import functional as TF

from rewards import CLIPReward
from runtime import data

from .experiment import Compare, Experiment, Run, heldout
from .policy import pixels_of

LOST = "mean CLIP distance of a prompt's pictures, base less trained (1 - cosine)"
clip = cache(lambda: CLIPReward("tiny/clip"))


@torch.no_grad()
def features_of(pictures: list[Path]) -> list[torch.Tensor]:
    """For each prompt the CLIP features of its N pictures, of unit length (N, D)."""
    found = []
    for _, group in groupby(pictures, key=lambda path: path.name.split("-")[0]):
        images = torch.stack([TF.to_tensor(data.read_picture(path)) for path in group])  # (N, 3, H, W)
        found.append(clip().model.encode_image(pixels_of(clip(), images), normalize=True))
    return found


def distance(pictures: list[Path]) -> float:
    """Mean of 1 - cosine of the CLIP features, over the pairs of pictures of one prompt, then over prompts."""
    spreads = [mean_distance(features) for features in features_of(pictures)]
    return sum(spreads) / len(spreads)


def mean_distance(features: torch.Tensor) -> float:
    """Mean of 1 - cosine over the pairs of N features of unit length (N, D)."""
    n = len(features)
    return ((n * n - (features @ features.T).sum()) / (n * (n - 1))).item()


def lost(run: Run) -> float:
    """By how much the distance fell."""
    return distance(run.base_pictures) - distance(run.pictures)


CLAIMS = {
    "diversity": Experiment(
        says="Training makes the pictures of a prompt more alike (Fig. 7)",
        trainer="grpo_flux",
        preset="tiny",
        arms={"HPS": {}},
        measures={LOST: lost, "HPS on held-out prompts (cosine)": heldout("hps")},
        compares=(Compare(LOST, "HPS"),),
        curves=(("iteration", "reward_std", "spread of rewards in the rollout (cosine)"),),
        heldout={"preset": "tiny", "images_per_prompt": 4},
    )
}
