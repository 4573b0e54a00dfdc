"""The reward: yes or no, and one alone against two together."""

from .experiment import Compare, Experiment, gain, heldout

GAIN = "gain in HPS on held-out prompts (cosine)"
HPS, CLIP = "HPS on held-out prompts (cosine)", "CLIP on held-out prompts (cosine)"
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


def both(trainer: str, paper: str) -> Experiment:
    arms = {"HPS": {"reward": "hps"}, "HPS and CLIP": {"reward": "hps:0.7,clip:1.4"}}
    return Experiment(
        paper=paper,
        says=f"CLIP beside HPS costs a little HPS and keeps pictures true to the prompt (Fig. 1, 9), {trainer}",
        trainer=trainer,
        preset="tiny",
        arms=arms,
        measures={HPS: heldout("hps"), CLIP: heldout("clip"), CHECKER: heldout("geneval")},
        compares=(
            Compare(CLIP, "HPS and CLIP", "HPS"),
            Compare(CHECKER, "HPS and CLIP", "HPS"),
            Compare(HPS, "HPS and CLIP", "HPS", by=-0.03),
        ),
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    )


CLAIMS = {
    "binary-sd": binary("grpo_sd"),
    "binary-flux": binary("grpo_flux"),
    "clip-sd": both("grpo_sd", "base: CLIP 0.363; HPS and CLIP: 0.395"),
    "clip-flux": both("grpo_flux", "HPS 0.372 and 0.343; GenEval 0.561 and 0.687"),
}
