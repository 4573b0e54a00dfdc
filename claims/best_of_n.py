"""Best-of-N: eight samples are trained on, the best and worst four of pools of different sizes."""

from .experiment import EARLY, SPEED, Compare, Experiment, heldout, speed

SD_EARLY = EARLY | {"learning_rate": 1e-4}
CLAIMS = {
    "best-of-n": Experiment(
        says="A larger pool, of which the best and worst are trained on, converges faster in iterations (Fig. 4a)",
        trainer="grpo_sd",
        preset="tiny",
        arms={f"8 of {n}": SD_EARLY | {"group_size": n, "keep_best_worst": 4} for n in (8, 32)},
        measures={SPEED: speed("sample_reward_hps"), "HPS on held-out prompts (cosine)": heldout("hps")},
        compares=(Compare(SPEED, "8 of 32", "8 of 8"),),
        curves=(
            ("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),
            ("evaluations", "sample_reward_hps", "HPS of sample pictures (cosine)"),
        ),
    )
}
