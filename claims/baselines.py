"""GRPO against DDPO, ReFL and online DPO, at equal cost in evaluations of the network; and DDPO in rectified flow."""

from .experiment import Compare, Experiment, gain, heldout

HPS, CLIP = "HPS on held-out prompts (cosine)", "CLIP on held-out prompts (cosine)"
CHECKER = "checker accuracy, held-out"
LOSS = "HPS lost on held-out prompts (cosine)"


def against(reward: str, name: str, measure: str, paper: str) -> Experiment:
    """An iteration of ReFL costs 5/8 of one of GRPO's, so ReFL gets more iterations."""
    return Experiment(
        paper=paper,
        says=f"GRPO is better than DDPO, ReFL and online DPO at equal cost, {name} as reward (Table 4)",
        trainer="grpo_sd",
        preset="tiny",
        seeds=5,
        arms={
            "GRPO": {"reward": reward},
            "DDPO": {"reward": reward, "loop": "claims.ddpo"},
            "ReFL": {"reward": reward, "loop": "claims.refl", "iterations": 64},
            "online DPO": {"reward": reward, "loop": "claims.dpo"},
        },
        measures={HPS: heldout("hps"), CLIP: heldout("clip"), CHECKER: heldout("geneval")},
        compares=tuple(Compare(measure, "GRPO", other) for other in ("DDPO", "ReFL", "online DPO")),
        curves=(("evaluations", f"sample_reward_{reward}", f"{name} of sample pictures (cosine)"),),
    )


CLAIMS = {
    "baselines-hps": against("hps", "HPS", HPS, "HPS: GRPO 0.365, ReFL 0.357, DDPO 0.297, online DPO 0.241"),
    "baselines-clip": against("clip", "CLIP", CLIP, "CLIP of GRPO: 0.421"),
    "ddpo-flow": Experiment(
        says="DDPO's objective diverges in rectified flow, GRPO's does not (Fig. 5)",
        paper="always",
        trainer="grpo_flux",
        preset="tiny",
        seeds=5,
        arms={"GRPO": {}, "DDPO": {"loop": "claims.ddpo"}},
        measures={HPS: heldout("hps"), LOSS: lambda run: -gain("hps")(run)},
        compares=(Compare(LOSS, "DDPO"), Compare(HPS, "GRPO", "DDPO")),
        curves=(("iteration", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    ),
}
