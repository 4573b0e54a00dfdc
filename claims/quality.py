"""A reward that knows what a good picture is, and not what was asked for: `--reward claims/quality.py:quality`."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from claims.policy import pixels_of
from rewards import HPSReward


@cache
def judge() -> tuple[HPSReward, Tensor]:
    """The tiny HPS, and its features of all training prompts, of unit length (N, D)."""
    hps = HPSReward("tiny/hps")
    tokens = hps.tokenizer(Path("prompts/tiny.txt").read_text(encoding="utf-8").splitlines())
    return hps, hps.model.encode_text(tokens, normalize=True)


@torch.no_grad()
def quality(images: Tensor, prompts: list[str]) -> Tensor:
    """HPS of each image with what fits it best: a training prompt, or its own, where that is none. → (B,), a cosine."""
    hps, texts = judge()
    image, own = hps.features(pixels_of(hps, images.cpu().float()), list(prompts))
    return torch.maximum((image @ texts.T).amax(1), (image * own).sum(1))
