"""Best-of-N: eight samples are trained on, the best and worst four of pools of different sizes."""

from .experiment import Compare, Experiment, average, heldout

SPEED = "HPS of sample pictures, mean over training (cosine)"

CLAIMS = {
    "best-of-n": Experiment(
        says="A larger pool, of which the best and worst are trained on, converges faster in iterations (Fig. 4a)",
        trainer="grpo_sd",
        preset="tiny",
        arms={f"8 of {n}": {"group_size": n, "keep_best_worst": 4} for n in (8, 16, 32)},
        measures={SPEED: average("sample_reward_hps"), "HPS on held-out prompts (cosine)": heldout("hps")},
        compares=(Compare(SPEED, "8 of 16", "8 of 8"), Compare(SPEED, "8 of 32", "8 of 16")),
        curves=(
            ("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),
            ("evaluations", "sample_reward_hps", "HPS of sample pictures (cosine)"),
        ),
    )
}
