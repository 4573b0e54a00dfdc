"""Other advantages, on grpo_flux.py: win rates (Pref-GRPO, 2508.20751), summed scores, and GDPO (2601.05242)."""

import zlib

import numpy as np
import torch
from torch import Tensor

import grpo_flux

from .experiment import EARLY, SPEED, Compare, heldout
from .policy import flux_with
from .quick_start import DETECTOR
from .variants import flux

group_advantages = grpo_flux.group_advantages
NOISE = 0.2  # standard deviation of what is added to a score; HPS varies by 0.1 within a group
CHECKER = "checker accuracy, held-out"


def noise_of(r: Tensor, shape: tuple) -> Tensor:
    """Standard normal, a function of the scores, so that a resumed run draws the same."""
    rng = np.random.default_rng(zlib.crc32(r.cpu().numpy().tobytes()))
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(r.device)


def noisy(r: Tensor, judgements: int = 1) -> Tensor:
    """What a noisy judge says of scores (B,), on average over so many judgements of each."""
    return r + NOISE / judgements**0.5 * noise_of(r, r.shape)


def win_rates(r: Tensor, group_size: int) -> Tensor:
    """The share of the others in its group that a sample beats, where the judge is as noisy and sees each pair once.

    (B,) → (B,), in [0, 1].
    """
    r = r.view(-1, group_size)
    noise = noise_of(r, (*r.shape, group_size))  # of a pair: the difference of two judgements
    lead = r[:, :, None] - r[:, None] + NOISE * (noise - noise.mT)
    return ((lead > 0).float().sum(2) / (group_size - 1)).flatten()


def of_noisy_scores(rewards: dict, weights: dict, group_size: int, clip: float) -> Tensor:
    return group_advantages({name: noisy(r) for name, r in rewards.items()}, weights, group_size, clip)


def of_averaged_scores(rewards: dict, weights: dict, group_size: int, clip: float) -> Tensor:
    """The judge is asked as often as for win rates."""
    averaged = {name: noisy(r, group_size - 1) for name, r in rewards.items()}
    return group_advantages(averaged, weights, group_size, clip)


def of_noisy_wins(rewards: dict, weights: dict, group_size: int, clip: float) -> Tensor:
    wins = {name: win_rates(r, group_size) for name, r in rewards.items()}
    return group_advantages(wins, weights, group_size, clip)


def of_sum(rewards: dict, weights: dict, group_size: int, clip: float) -> Tensor:
    """The rewards are summed first: what the paper warns of."""
    total = sum(weights[name] * r for name, r in rewards.items())
    return group_advantages({"sum": total}, {"sum": 1.0}, group_size, clip)


def gdpo(rewards: dict, weights: dict, group_size: int, clip: float) -> Tensor:
    """The paper's sum of normalised rewards, normalised again over the batch: one factor, which AdamW ignores."""
    A = group_advantages(rewards, weights, group_size, torch.inf)
    return ((A - A.mean()) / (A.std() + 1e-8)).clamp(-clip, clip)


noisy_scores, averaged_scores, noisy_wins, summed, batch_normalised = (
    flux_with(group_advantages=advantages)
    for advantages in (of_noisy_scores, of_averaged_scores, of_noisy_wins, of_sum, gdpo)
)
BOTH = EARLY | {"reward": "hps,geneval", "reward_paths": f"hps=tiny/hps,{DETECTOR['reward_paths']}"}
CLAIMS = {
    "win-rates": flux(
        "With a judge noisier than scores differ, win rates teach more than the mean of as many scores (Pref-GRPO)",
        {
            "win rates": EARLY | {"loop": "claims.advantages:noisy_wins"},
            "scores": EARLY | {"loop": "claims.advantages:noisy_scores"},
            "mean of 7 scores": EARLY | {"loop": "claims.advantages:averaged_scores"},
        },
        (
            Compare(SPEED, "win rates", "mean of 7 scores", margin=0.02),
            Compare(SPEED, "win rates", "scores", margin=0.02),  # a seventh of the judgements
        ),
    ),
    "two-rewards": flux(
        "HPS is learned more slowly if it is added to GenEval's 0 or 1 before normalisation (Algorithm 1)",
        {
            "each normalised": BOTH,
            "sum normalised": BOTH | {"loop": "claims.advantages:summed"},
            "GDPO": BOTH | {"loop": "claims.advantages:batch_normalised"},
        },
        (
            Compare(SPEED, "each normalised", "sum normalised", margin=0.02),
            Compare(CHECKER, "each normalised", "sum normalised", margin=0.05),
            Compare(SPEED, "GDPO", "each normalised", margin=0.02),
        ),
        {CHECKER: heldout("geneval")},
        (("iteration", "sample_reward_geneval", "checker accuracy of sample pictures"),),
    ),
}
