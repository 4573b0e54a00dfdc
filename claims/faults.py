"""What moves the ratio away from 1: grpo_flux.py with one thing done differently in the rollout and the update."""

from dataclasses import replace
from unittest.mock import patch

import torch

import grpo_flux

from .experiment import EARLY, SPEED, Compare, Experiment, Run, mean, speed

OFF = "ratio before the first update, largest distance from 1"
CLIP_RANGE = grpo_flux.PRESETS["tiny"]["clip_range"]


def bf16_latents(cfg) -> None:
    """The trajectory is stored in bfloat16 after the log-probabilities were computed, as the release does with SD."""
    sample_groups = grpo_flux.sample_groups

    def rounded(*arguments):
        trajectories, log_probs, images = sample_groups(*arguments)
        return trajectories.bfloat16().float(), log_probs, images

    with patch.object(grpo_flux, "sample_groups", rounded):
        grpo_flux.main(cfg)


def other_batch(cfg) -> None:
    """The rollout has batches of 1, as in the release; it matters only where networks compute in bfloat16."""
    sample_groups = grpo_flux.sample_groups
    with patch.object(grpo_flux, "sample_groups", lambda cfg, *rest: sample_groups(replace(cfg, micro_batch=1), *rest)):
        grpo_flux.main(cfg)


def integer_time(cfg) -> None:
    """The update tells the network int(1000 sigma) / 1000, the rollout sigma."""
    velocity = grpo_flux.velocity

    def rounded(transformer, z, sigma, *rest):
        return velocity(transformer, z, (1000 * sigma).floor() / 1000 if torch.is_grad_enabled() else sigma, *rest)

    with patch.object(grpo_flux, "velocity", rounded):
        grpo_flux.main(cfg)


def off(run: Run) -> float:
    return max(row["ratio_max_deviation_first_update"] for row in run.rows)


CLAIMS = {
    "ratio": Experiment(
        says="A trajectory stored in bfloat16 moves the ratio by more than the clip range, and teaches less",
        trainer="grpo_flux",
        preset="tiny",
        arms={
            "exact": EARLY,
            "latents in bf16": EARLY | {"loop": "claims.faults:bf16_latents"},
            "int(1000 sigma)": EARLY | {"loop": "claims.faults:integer_time"},
            "bf16, other batch": EARLY | {"dtype": "bfloat16", "loop": "claims.faults:other_batch"},
        },
        measures={OFF: off, SPEED: speed("sample_reward_hps"), "share of ratios clipped": mean("clip_fraction")},
        compares=(
            Compare(OFF, "latents in bf16", by=CLIP_RANGE),
            Compare(SPEED, "exact", "latents in bf16", margin=0.02),
            Compare(OFF, "int(1000 sigma)", by=CLIP_RANGE),
            Compare(OFF, "bf16, other batch", by=CLIP_RANGE),
        ),
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    )
}
