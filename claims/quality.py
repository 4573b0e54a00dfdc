"""A reward that knows what a good picture is, and not what was asked for: `--reward claims/quality.py:quality`."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rewards import HPSReward, resize


@cache
def judge() -> tuple[HPSReward, Tensor]:
    """The tiny HPS, and its features of all training prompts, of unit length (N, D)."""
    hps = HPSReward("tiny/hps")
    tokens = hps.tokenizer(Path("prompts/tiny.txt").read_text(encoding="utf-8").splitlines())
    return hps, hps.model.encode_text(tokens, normalize=True)


@torch.no_grad()
def quality(images: Tensor, prompts: list[str]) -> Tensor:
    """HPS of each image with what fits it best: a training prompt, or its own, where that is none. → (B,), a cosine."""
    from torchvision.transforms.functional import normalize

    hps, texts = judge()
    pixels = normalize(resize(images.cpu().float(), hps.size, hps.mode), hps.mean, hps.std)
    image, own = hps.features(pixels, list(prompts))
    return torch.maximum((image @ texts.T).amax(1), (image * own).sum(1))
