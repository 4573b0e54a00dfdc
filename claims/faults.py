"""What moves the ratio away from 1: grpo_flux.py with one thing done differently in the rollout and the update."""

from dataclasses import replace

import numpy as np
import torch

import grpo_flux

from .experiment import EARLY, SPEED, Compare, Experiment, Run, mean, speed
from .policy import flux_with

OFF = "ratio before the first update, largest distance from 1, median of the iterations"
CLIP_RANGE = grpo_flux.PRESETS["tiny"]["clip_range"]


sample_groups, velocity = grpo_flux.sample_groups, grpo_flux.velocity


def stored_in_bf16(*arguments):
    """The trajectory is rounded to bfloat16 after the log-probabilities were computed.

    In the release Stable Diffusion's next step starts from the rounded latent, so only z' differs from what was scored.
    """
    trajectories, log_probs, images = sample_groups(*arguments)
    return trajectories.bfloat16().float(), log_probs, images


def one_by_one(cfg, *rest):
    """The rollout has batches of 1, as in the release; it matters only where networks compute in bfloat16."""
    return sample_groups(replace(cfg, micro_batch=1), *rest)


def at_integer_time(transformer, z, sigma, *rest):
    """The update tells the network int(1000 sigma) / 1000, the rollout sigma."""
    return velocity(transformer, z, (1000 * sigma).floor() / 1000 if torch.is_grad_enabled() else sigma, *rest)


bf16_latents, other_batch = flux_with(sample_groups=stored_in_bf16), flux_with(sample_groups=one_by_one)
integer_time = flux_with(velocity=at_integer_time)


def off(run: Run) -> float:
    """In the median iteration: the largest of so few elements grows with the number of samples and steps."""
    return float(np.median([row["ratio_max_deviation_first_update"] for row in run.rows]))


ARMS = {
    "exact": EARLY,
    "latents in bf16": EARLY | {"loop": "claims.faults:bf16_latents"},
    "int(1000 sigma)": EARLY | {"loop": "claims.faults:integer_time"},
    "bf16, other batch": EARLY | {"dtype": "bfloat16", "loop": "claims.faults:other_batch"},
}


def fault(says: str, arms: tuple[str, ...], *compares: Compare) -> Experiment:
    return Experiment(
        says=says,
        trainer="grpo_flux",
        preset="tiny",
        arms={arm: ARMS[arm] for arm in arms},
        measures={OFF: off, SPEED: speed("sample_reward_hps"), "share of ratios clipped": mean("clip_fraction")},
        compares=compares,
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    )


CLAIMS = {
    "ratio": fault(
        "A trajectory stored in bfloat16 moves ratios by more than the clip range, before anything is learned",
        tuple(ARMS),
        *(Compare(OFF, arm, by=CLIP_RANGE) for arm in ARMS if arm != "exact"),
    ),
    "bf16-trajectory": fault(
        "A trajectory stored in bfloat16 teaches less",
        ("exact", "latents in bf16"),
        Compare(SPEED, "exact", "latents in bf16", margin=0.02),
    ),
}
