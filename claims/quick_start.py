"""The quick start of the README, for pictures, and the same with GenEval's rules as the reward."""

from collections.abc import Callable

from .experiment import Compare, Experiment, Run, gain

JUDGED = "gain in accuracy by the second judge, held-out (share)"
RIGHT = "gain in accuracy by the checker, held-out (share)"
HPS, CLIP = (f"gain in {name}, held-out (paired standard errors)" for name in ("HPS", "CLIP"))


def errors(metric: str) -> Callable[[Run], float]:
    """The gain over its standard error, paired by prompt."""
    return lambda run: run.heldout[metric]["difference"] / run.heldout[metric]["error"]


def quick_start(says: str, trainer: str, paper: str, arm: dict, curve: str) -> Experiment:
    return Experiment(
        says=f"{says}, {trainer}",
        paper=paper,
        trainer=trainer,
        preset="tiny",
        arms={"DanceGRPO": arm},
        measures={JUDGED: gain("judged"), RIGHT: gain("geneval"), HPS: errors("hps"), CLIP: errors("clip")},
        compares=(
            Compare(JUDGED, "DanceGRPO", by=0.1),
            Compare(RIGHT, "DanceGRPO", by=0.1),
            Compare(HPS, "DanceGRPO", by=2),
            Compare(CLIP, "DanceGRPO", by=2),
        ),
        curves=(("iteration", f"sample_reward_{curve}", f"{curve} of sample pictures"),),
    )


TAUGHT = "With HPS as reward, a judge that never saw it finds at least 10 points more pictures right"
RULES = "With GenEval's rules as reward, a judge that never saw them finds at least 10 points more pictures right"
DETECTOR = {"reward": "geneval", "reward_paths": "geneval=tiny/pictures.py:Detector"}
CLAIMS = {
    "quick-start-sd": quick_start(TAUGHT, "grpo_sd", "HPS 0.239 to 0.365", {}, "hps"),
    "quick-start-flux": quick_start(TAUGHT, "grpo_flux", "HPS 0.304 to 0.372", {}, "hps"),
    "geneval": quick_start(RULES, "grpo_flux", "-", DETECTOR, "geneval"),
}
