"""What others changed, on rectified flow: the KL term, other SDEs, other trust regions, group size, clip range."""

from .diversity import LOST, features_of, lost
from .experiment import Compare, Experiment, Run, heldout, mean

HPS = "HPS on held-out prompts (cosine)"
MOVED = "CLIP distance from the base's picture, held-out (1 - cosine)"
CLIPPED = "share of ratios clipped"
BIAS = "mean ratio, distance from 1"
RIGHT = "checker accuracy, held-out (share)"
SEVERAL = {"updates_per_rollout": 4}  # with a single update the ratio is 1, and nothing is clipped
LONG = SEVERAL | {  # the checker looks on: with weight 0 it teaches nothing
    "iterations": 300,
    "reward": "hps,geneval:0",
    "reward_paths": "hps=tiny/hps,geneval=tiny/pictures.py:Detector",
}


def moved(run: Run) -> float:
    """How far each picture is from the one that the base draws of the same noise."""
    pairs = zip(features_of(run.pictures), features_of(run.base_pictures), strict=True)
    distances = [(1 - (own * base).sum(-1)).mean().item() for own, base in pairs]
    return sum(distances) / len(distances)


def bias(run: Run) -> float:
    return abs(sum(row["ratio_mean"] - 1 for row in run.rows) / len(run.rows))


def trust_regions(options: dict) -> dict:
    """An arm for each --ratio."""
    return {
        "plain": options,
        "guard": options | {"ratio": "guard"},
        "dppo": options | {"ratio": "dppo", "clip_range": 1e-5},
    }


def flux(says: str, arms: dict, compares: tuple, measures: dict | None = None, curves: tuple = ()) -> Experiment:
    return Experiment(
        says=says,
        trainer="grpo_flux",
        preset="tiny",
        arms=arms,
        measures={HPS: heldout("hps")} | (measures or {}),
        compares=compares,
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"), *curves),
    )


CLAIMS = {
    "kl": flux(
        "A KL term keeps pictures near the base's, and costs reward",
        {f"beta {beta:g}": {"kl_weight": beta} for beta in (0, 0.01, 0.1, 1)},
        (Compare(MOVED, "beta 0", "beta 1"), Compare(HPS, "beta 0", "beta 1")),
        {MOVED: moved},
    ),
    "sde": flux(
        "Flow-GRPO's noise and coefficients-preserving sampling teach no less than the paper's SDE, less 0.02",
        {"dance, 2": {}, "flow, 0.7": {"sde": "flow", "eta": 0.7}, "cps, 0.8": {"sde": "cps", "eta": 0.8}},
        (Compare(HPS, "flow, 0.7", "dance, 2", by=-0.02), Compare(HPS, "cps, 0.8", "dance, 2", by=-0.02)),
    ),
    "trust-region": flux(
        "GRPO-Guard takes the bias of the ratio away, and it and Flow-DPPO teach no less than clipping, less 0.02",
        trust_regions(SEVERAL),
        (
            Compare(BIAS, "plain", "guard"),
            Compare(HPS, "guard", "plain", by=-0.02),
            Compare(HPS, "dppo", "plain", by=-0.02),
        ),
        {BIAS: bias},
    ),
    "over-optimisation": flux(
        "In 300 iterations GRPO-Guard and Flow-DPPO get more pictures right than clipping, and lose at most 0.02 HPS",
        trust_regions(LONG),
        (
            Compare(RIGHT, "guard", "plain"),
            Compare(RIGHT, "dppo", "plain"),
            Compare(HPS, "guard", "plain", by=-0.02),
            Compare(HPS, "dppo", "plain", by=-0.02),
        ),
        {RIGHT: heldout("geneval"), LOST: lost},
        (("iteration", "sample_reward_geneval", "checker accuracy of sample pictures (share)"),),
    ),
    "group-size": flux(
        "Of the same number of samples, groups of 16 teach more than groups of 4",
        {f"{64 // g} x {g}": {"group_size": g, "prompts_per_iteration": 64 // g} for g in (4, 8, 16)},
        (Compare(HPS, "4 x 16", "16 x 4"),),
    ),
    "clip-range": flux(
        "The paper's clip range of 1e-4 teaches no less than a tenth or a hundredfold of it, less 0.02",
        {f"{epsilon:g}": SEVERAL | {"clip_range": epsilon} for epsilon in (1e-5, 1e-4, 1e-3, 1e-2)},
        (Compare(HPS, "0.0001", "1e-05", by=-0.02), Compare(HPS, "0.0001", "0.01", by=-0.02)),
        {CLIPPED: mean("clip_fraction")},
    ),
}
