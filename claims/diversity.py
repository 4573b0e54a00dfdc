"""Diversity: how far apart the pictures of one prompt are, before and after."""

from functools import cache
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

from rewards import CLIPReward
from runtime import data
from tiny.make_judge import load_judge

from .experiment import Compare, Experiment, Run, heldout
from .policy import pixels_of

LOST = "mean CLIP distance of a prompt's pictures, base less trained (1 - cosine)"
LOST_TO_JUDGE = "the same by the second judge's features"
clip = cache(lambda: CLIPReward("tiny/clip"))


def by_clip(images: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, H, W) in [0, 1] → features of unit length (N, D)."""
    return clip().model.encode_image(pixels_of(clip(), images), normalize=True)


def by_judge(images: torch.Tensor) -> torch.Tensor:
    """The same of images (N, 3, 64, 64), from the layer before the judge's last, which knows nothing of CLIP."""
    return F.normalize(load_judge()[:-1](images), dim=-1)


@torch.no_grad()
def features_of(pictures: list[Path], encode=by_clip) -> list[torch.Tensor]:
    """For each prompt the features of its N pictures, of unit length (N, D)."""
    found = []
    for _, group in groupby(pictures, key=lambda path: path.name.split("-")[0]):
        images = torch.stack([TF.to_tensor(data.read_picture(path)) for path in group])  # (N, 3, H, W)
        found.append(encode(images))
    return found


def distance(pictures: list[Path], encode=by_clip) -> float:
    """Mean of 1 - cosine of the features, over the pairs of pictures of one prompt, then over prompts."""
    spreads = [mean_distance(features) for features in features_of(pictures, encode)]
    return sum(spreads) / len(spreads)


def mean_distance(features: torch.Tensor) -> float:
    """Mean of 1 - cosine over the pairs of N features of unit length (N, D)."""
    n = len(features)
    return ((n * n - (features @ features.T).sum()) / (n * (n - 1))).item()


def lost(run: Run, encode=by_clip) -> float:
    """By how much the distance fell."""
    return distance(run.base_pictures, encode) - distance(run.pictures, encode)


def lost_to_judge(run: Run) -> float:
    return lost(run, by_judge)


CLAIMS = {
    "diversity": Experiment(
        says="Training makes the pictures of a prompt more alike (Fig. 7)",
        trainer="grpo_flux",
        preset="tiny",
        arms={"HPS": {}},
        measures={LOST: lost, LOST_TO_JUDGE: lost_to_judge, "HPS on held-out prompts (cosine)": heldout("hps")},
        compares=(Compare(LOST, "HPS"), Compare(LOST_TO_JUDGE, "HPS")),
        curves=(("iteration", "reward_std", "spread of rewards in the rollout (cosine)"),),
        heldout={"preset": "tiny", "images_per_prompt": 4},
    )
}
