"""The noise: shared at the start or not, and how much of it in the steps."""

from .experiment import EARLY, SPEED, Compare, Experiment, heldout, mean, speed

THRESHOLD = 0.4  # above the mean of the base's pictures, below that of the trained policy's
HPS = "HPS on held-out prompts (cosine)"
CURVE = ("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)")
SHARE = f"gain in the share of sample pictures with HPS above {THRESHOLD}, mean over training"
NO_SPREAD = "groups of 8 without spread, in an iteration"

CLAIMS = {
    "shared-noise": Experiment(
        says="One initial noise for a prompt's group teaches better than a noise for each sample (Fig. 8, of video)",
        trainer="grpo_flux",
        preset="tiny",
        arms={"shared": EARLY, "own": EARLY | {"shared_noise": False}},
        measures={SPEED: speed("sample_reward_hps"), HPS: heldout("hps")},
        compares=(Compare(SPEED, "shared", "own", margin=0.01), Compare(HPS, "shared", "own", margin=0.01)),
        curves=(CURVE,),
    ),
    "noise-level": Experiment(
        says="With little noise in the SDE a binary reward finds no difference within most groups (ours; see Fig. 4c)",
        trainer="grpo_flux",
        preset="tiny",
        arms={f"eta {eta:g}": EARLY | {"eta": eta, "reward": f"hps@{THRESHOLD}"} for eta in (0.1, 1.0)},
        measures={NO_SPREAD: mean("zero_variance_groups"), SHARE: speed("sample_reward_hps")},
        compares=(Compare(NO_SPREAD, "eta 0.1", "eta 1", by=1), Compare(SHARE, "eta 1", "eta 0.1")),
        curves=(
            ("iteration", "sample_reward_hps", f"share of sample pictures with HPS above {THRESHOLD}"),
            ("iteration", "zero_variance_groups", NO_SPREAD),
        ),
    ),
}
