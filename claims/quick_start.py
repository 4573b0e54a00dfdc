"""The quick start of the README, for pictures: what forty or fifty iterations teach, in under two minutes."""

from .experiment import Compare, Experiment, Run, gain

RIGHT = "gain in checker accuracy, held-out"
HPS, CLIP = "gain in HPS, held-out (paired standard errors)", "gain in CLIP, held-out (cosine)"


def errors(run: Run) -> float:
    """The gain in HPS over its standard error, paired by prompt."""
    return run.heldout["hps"]["difference"] / run.heldout["hps"]["error"]


def quick_start(trainer: str, paper: str) -> Experiment:
    return Experiment(
        paper=paper,
        says=f"The tiny preset gains 25 points of accuracy and 8 standard errors of HPS, and CLIP gains too, {trainer}",
        trainer=trainer,
        preset="tiny",
        seeds=5,
        arms={"DanceGRPO": {}},
        measures={
            RIGHT: gain("geneval"),
            HPS: errors,
            CLIP: gain("clip"),
        },
        compares=(Compare(RIGHT, "DanceGRPO", by=0.25), Compare(HPS, "DanceGRPO", by=8), Compare(CLIP, "DanceGRPO")),
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    )


CLAIMS = {
    "quick-start-sd": quick_start("grpo_sd", "HPS 0.239 to 0.365"),
    "quick-start-flux": quick_start("grpo_flux", "HPS 0.304 to 0.372"),
}
