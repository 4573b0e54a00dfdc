"""The quick start of the README, for pictures: what is learned in some forty iterations, and in 150."""

from collections.abc import Callable

from .experiment import Compare, Experiment, Run, gain, heldout

RIGHT = "gain in checker accuracy, held-out"
SHARE = "checker accuracy, held-out (share)"
HPS, CLIP = (f"gain in {name}, held-out (paired standard errors)" for name in ("HPS", "CLIP"))


def errors(metric: str) -> Callable[[Run], float]:
    """The gain over its standard error, paired by prompt."""
    return lambda run: run.heldout[metric]["difference"] / run.heldout[metric]["error"]


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
            HPS: errors("hps"),
            CLIP: errors("clip"),
        },
        compares=(Compare(RIGHT, "DanceGRPO", by=0.25), Compare(HPS, "DanceGRPO", by=8), Compare(CLIP, "DanceGRPO")),
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    )


def long(says: str, arm: dict, compares: tuple, curve: tuple) -> Experiment:
    """150 iterations of FLUX."""
    return Experiment(
        says=says,
        trainer="grpo_flux",
        preset="tiny",
        arms={"DanceGRPO": {"iterations": 150} | arm},
        measures={RIGHT: gain("geneval"), SHARE: heldout("geneval"), HPS: errors("hps"), CLIP: errors("clip")},
        compares=compares,
        curves=(curve,),
    )


CLAIMS = {
    "quick-start-sd": quick_start("grpo_sd", "HPS 0.239 to 0.365"),
    "quick-start-flux": quick_start("grpo_flux", "HPS 0.304 to 0.372"),
    "long": long(
        "150 iterations with HPS do not collapse: accuracy and CLIP stay well above the base's",
        {},
        (Compare(RIGHT, "DanceGRPO", by=0.25), Compare(HPS, "DanceGRPO", by=8), Compare(CLIP, "DanceGRPO", by=2)),
        ("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),
    ),
    "geneval": long(
        "GenEval's rules as the reward draw 85 % right, and the independent judges HPS and CLIP do not fall",
        {
            "reward": "geneval",
            "reward_paths": "geneval=tiny/pictures.py:Detector",
            "learning_rate": 5e-5,
        },
        (Compare(SHARE, "DanceGRPO", by=0.85), Compare(HPS, "DanceGRPO", by=-2), Compare(CLIP, "DanceGRPO", by=-2)),
        ("iteration", "sample_reward_geneval", "checker accuracy of sample pictures (share)"),
    ),
}
