"""What others changed, on rectified flow: the KL term, other SDEs, other trust regions, group size, clip range."""

from .diversity import LOST, features_of, lost
from .experiment import EARLY, FREE, SPEED, Compare, Experiment, Run, gain, heldout, mean, speed

HPS = "HPS on held-out prompts (cosine)"
MOVED = "CLIP distance from the base's picture, held-out (1 - cosine)"
CLIPPED = "share of ratios clipped"
PRICE = "diversity lost for each unit of HPS gained, held-out"
BIAS = "mean of ratio - 1, over minus the KL"
JUDGED = "accuracy by the second judge, held-out (share)"
CLIPS = EARLY | {"updates_per_rollout": 8, "learning_rate": 1e-4}  # where most ratios leave the range
LONG = CLIPS | {"iterations": 40, "sample_every": 10}


def moved(run: Run) -> float:
    """How far each picture is from the one that the base draws of the same noise."""
    pairs = zip(features_of(run.pictures), features_of(run.base_pictures), strict=True)
    distances = [(1 - (own * base).sum(-1)).mean().item() for own, base in pairs]
    return sum(distances) / len(distances)


def bias(run: Run) -> float:
    """The ratio is close to 1, so that ratio - 1 is its logarithm, whose mean over samples of the policy is -KL."""
    return mean("ratio_mean")(run) / -mean("kl")(run) - 1 / -mean("kl")(run)


def price(run: Run) -> float:
    return lost(run) / gain("hps")(run)


def trust_regions(options: dict) -> dict:
    """An arm for each --ratio. GRPO-Guard clips the log ratio times the step's standard deviation, 0.34 on average."""
    return {
        "plain": options,
        "guard": options | {"ratio": "guard", "clip_range": 5e-5},
        "dppo": options | {"ratio": "dppo", "clip_range": 1e-5},
    }


def flux(says: str, arms: dict, compares: tuple, measures: dict | None = None, curves: tuple = ()) -> Experiment:
    return Experiment(
        says=says,
        trainer="grpo_flux",
        preset="tiny",
        arms=arms,
        measures={SPEED: speed("sample_reward_hps"), HPS: heldout("hps")} | (measures or {}),
        compares=compares,
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"), *curves),
    )


CLAIMS = {
    "a-a": flux(
        "The tiny preset is as good as itself with other seeds",
        {"seeds 11 to 20": EARLY, "seeds 21 to 30": EARLY | {"seed": 10}},
        (Compare(SPEED, "seeds 11 to 20", "seeds 21 to 30", margin=0.01, paired=False),),
    ),
    "kl": flux(
        "A KL term keeps pictures near the base's, and costs reward",
        {f"beta {beta:g}": EARLY | {"kl_weight": beta} for beta in (0, 0.01)},
        (Compare(MOVED, "beta 0", "beta 0.01"), Compare(SPEED, "beta 0", "beta 0.01", margin=0.01)),
        {MOVED: moved},
    ),
    "sde": flux(
        "Flow-GRPO's noise and coefficients-preserving sampling teach as much as the paper's SDE",
        {
            "dance, 1": FREE,
            "flow, 0.7": FREE | {"sde": "flow", "eta": 0.7},
            "cps, 0.8": FREE | {"sde": "cps", "eta": 0.8},
        },
        (
            Compare(SPEED, "flow, 0.7", "dance, 1", by=-0.02),
            Compare(SPEED, "cps, 0.8", "dance, 1", by=-0.02),
        ),
    ),
    "trust-region": flux(
        "The plain ratio is biased by the KL, GRPO-Guard's is not",
        trust_regions(CLIPS),
        (
            Compare(BIAS, "plain", "guard", by=0.83),  # 1 - 0 if this is true, 1 - 0.34 if Guard's were only scaled
            Compare(BIAS, "guard", margin=0.085),  # a quarter of 0.34
            Compare(SPEED, "guard", "plain", margin=0.02),
            Compare(SPEED, "dppo", "plain", margin=0.02),
        ),
        {BIAS: bias},
    ),
    "over-optimisation": flux(
        "Trained on where clipping acts, GRPO-Guard loses less diversity than plain clipping, for the same HPS",
        {arm: options for arm, options in trust_regions(LONG).items() if arm != "dppo"},
        (
            Compare(LOST, "plain", "guard", margin=0.02),
            Compare(HPS, "guard", "plain", margin=0.02),  # unless this is equivalent, the first says nothing
            Compare(JUDGED, "guard", "plain", margin=0.05),
            Compare(PRICE, "plain", "guard", margin=0.1),
        ),
        {PRICE: price, LOST: lost, JUDGED: heldout("judged"), CLIPPED: mean("clip_fraction")},
    ),
    "group-size": flux(
        "Of the same number of samples, groups of 16 teach more than groups of 4",
        {f"{64 // g} x {g}": EARLY | {"group_size": g, "prompts_per_iteration": 64 // g} for g in (4, 16)},
        (Compare(SPEED, "4 x 16", "16 x 4", margin=0.02, paired=False),),
    ),
    "clip-range": flux(
        "A clip range of a tenth of the preset's slows learning, and one that clips nothing teaches as much",
        {f"{epsilon:g}": EARLY | {"clip_range": epsilon} for epsilon in (1.5e-5, 1.5e-4, 1e-2)},
        (
            Compare(SPEED, "0.00015", "1.5e-05", margin=0.02),
            Compare(SPEED, "0.00015", "0.01", margin=0.02),
        ),
        {CLIPPED: mean("clip_fraction")},
    ),
}
