"""The noise: shared at the start or not, and how much of it in the steps."""

from .experiment import Compare, Experiment, gain, heldout

HPS = "HPS on held-out prompts (cosine)"
CURVE = ("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)")

CLAIMS = {
    "shared-noise": Experiment(
        says="One initial noise for a prompt's group teaches better than a noise for each sample (Fig. 8)",
        trainer="grpo_flux",
        preset="tiny",
        arms={"shared": {"shared_noise": True}, "own": {"shared_noise": False}},
        measures={HPS: heldout("hps"), "checker accuracy, held-out": heldout("geneval")},
        compares=(Compare(HPS, "shared", "own"),),
        curves=(CURVE,),
    ),
    "noise-level": Experiment(
        says="Too little noise in the SDE teaches much less (Fig. 4c)",
        trainer="grpo_flux",
        preset="tiny",
        arms={f"eta {eta:g}": {"eta": eta} for eta in (0.25, 0.5, 1.0, 2.0, 4.0)},
        measures={"gain in HPS on held-out prompts (cosine)": gain("hps")},
        compares=(Compare("gain in HPS on held-out prompts (cosine)", "eta 2", "eta 0.25", times=2.0),),
        curves=(CURVE, ("iteration", "reward_std", "spread of rewards in the rollout (cosine)")),
    ),
}
