"""The reward: yes or no, and one alone against two together."""

from .experiment import Compare, Experiment, Run, gain, heldout

GAIN = "gain in HPS on held-out prompts (cosine)"
FORGOTTEN = "loss of accuracy by the second judge, held-out (share)"
QUALITY, CLIP = (f"gain in {name} on held-out prompts (cosine)" for name in ("quality", "CLIP"))
JUDGED = "gain in accuracy by the second judge, held-out (share)"
CHECKER = "checker accuracy, held-out"
THRESHOLD = 0.4  # above the mean of both base models, below that of the trained ones


def binary(trainer: str) -> Experiment:
    return Experiment(
        says=f"A reward that is only 0 or 1 is learnable: HPS above {THRESHOLD} (Fig. 3a), {trainer}",
        trainer=trainer,
        preset="tiny",
        arms={"0 or 1": {"reward": f"hps@{THRESHOLD}"}},
        measures={GAIN: gain("hps"), CHECKER: heldout("geneval")},
        compares=(Compare(GAIN, "0 or 1"),),
        curves=(("iteration", "zero_variance_groups", "groups without spread, of one iteration"),),
    )


def forgotten(run: Run) -> float:
    return -gain("judged")(run)


def both(trainer: str, paper: str) -> Experiment:
    """The tiny HPS and CLIP are near copies, so here HPS judges quality alone: see `claims.quality`."""
    place = "claims/quality.py:quality"
    metrics = f"hps,clip,geneval,tiny/make_judge.py:judged,{place}"
    return Experiment(
        paper=paper,
        says=f"A reward for quality alone forgets the prompt; with CLIP beside it, more is kept (Fig. 1, 9), {trainer}",
        trainer=trainer,
        preset="tiny",
        arms={"quality": {"reward": place}, "quality and CLIP": {"reward": f"{place}:0.7,clip:1.4"}},
        measures={
            JUDGED: gain("judged"),
            FORGOTTEN: forgotten,
            CLIP: gain("clip"),
            QUALITY: gain("quality"),
        },
        compares=(
            Compare(JUDGED, "quality and CLIP", "quality"),
            Compare(FORGOTTEN, "quality"),
            Compare(CLIP, "quality"),
            Compare(JUDGED, "quality and CLIP"),
            Compare(CLIP, "quality and CLIP", "quality"),
            Compare(QUALITY, "quality", "quality and CLIP", margin=0.02),
        ),
        curves=(("iteration", "sample_reward_quality", "quality of sample pictures (cosine)"),),
        heldout={"preset": "tiny", "metrics": metrics},
    )


CLAIMS = {
    "binary-sd": binary("grpo_sd"),
    "binary-flux": binary("grpo_flux"),
    "clip-sd": both("grpo_sd", "base: CLIP 0.363; HPS and CLIP: 0.395"),
    "clip-flux": both("grpo_flux", "HPS 0.372 and 0.343; GenEval 0.561 and 0.687"),
}
