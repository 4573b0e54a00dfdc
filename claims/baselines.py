"""GRPO against DDPO, ReFL and online DPO, at equal cost in evaluations of the network; and a batch baseline in flow."""

from .experiment import EARLY, FREE, SPEED, Compare, Experiment, heldout, speed

HPS, CLIP = "HPS on held-out prompts (cosine)", "CLIP on held-out prompts (cosine)"
CHECKER = "checker accuracy, held-out"
DEVELOPMENT = "HPS on development prompts (cosine)"


# As many iterations as make the others cost no less than GRPO, and at most 3 % more. ReFL's passes through VAE and
# reward come on top. Half of the preset's cost, for the time it takes.
# None is clipped: DPO and ReFL have no ratio.
LOOPS = {
    "GRPO": {"clip_range": 0.1, "iterations": 12},
    "DDPO": {"clip_range": 0.1, "loop": "claims.ddpo", "iterations": 11},
    "ReFL": {"loop": "claims.refl", "iterations": 22},
    "online DPO": {"loop": "claims.dpo", "iterations": 15},
}
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
BEST = {"GRPO": 2e-4, "DDPO": 4e-4, "online DPO": 2e-4, "ReFL": 1e-4}  # the outcome of learning-rates
FORWARD = {
    "GRPO": FREE,
    "NFT": FREE | {"loop": "claims.forward:nft", "iterations": 12},
    "AWM": FREE | {"loop": "claims.forward:awm", "iterations": 12},
}
SLOWER = (2.5e-5, 5e-5, 1e-4, 2e-4)
BEST_FORWARD = dict.fromkeys(FORWARD, 5e-5)  # the outcome of learning-rates-forward


def against(reward: str, name: str, measure: str, paper: str) -> Experiment:
    return Experiment(
        paper=paper,
        says=f"With as many passes through the UNet GRPO beats ReFL, the paper's next best, {name} as reward (Table 4)",
        trainer="grpo_sd",
        preset="tiny",
        arms={method: loop | {"reward": reward, "learning_rate": BEST[method]} for method, loop in LOOPS.items()},
        measures={HPS: heldout("hps"), CLIP: heldout("clip"), CHECKER: heldout("geneval")},
        compares=tuple(Compare(measure, "GRPO", x, margin=0.02, paired=False) for x in ("ReFL", "DDPO", "online DPO")),
        curves=(("evaluations", f"sample_reward_{reward}", f"{name} of sample pictures (cosine)"),),
    )


def tuning(claim: str, trainer: str, loops: dict, rates: tuple, measure: str) -> Experiment:
    """Every method with every learning rate; the measure is the claim's, by which the best is chosen."""
    return Experiment(
        says=f"Not a claim: finds each method's learning rate for {claim}; --first-seed 1 --seeds 2",
        trainer=trainer,
        preset="tiny",
        arms={
            f"{method}, {rate:g}": loop | {"learning_rate": rate} for method, loop in loops.items() for rate in rates
        },
        measures={DEVELOPMENT: heldout("hps"), SPEED: speed("sample_reward_hps")},
        compares=(Compare(measure, f"GRPO, {rates[1]:g}", f"GRPO, {rates[0]:g}"),),
        curves=(("evaluations", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
        heldout={"preset": "tiny", "prompts": "prompts/tiny_dev.txt"},
    )


CLAIMS = {
    "baselines-hps": against("hps", "HPS", HPS, "HPS: GRPO 0.365, ReFL 0.357, DDPO 0.297, online DPO 0.241"),
    "baselines-clip": against("clip", "CLIP", CLIP, "CLIP of GRPO: 0.421"),
    "learning-rates": tuning("baselines-*", "grpo_sd", LOOPS, RATES, DEVELOPMENT),
    "learning-rates-forward": tuning("forward", "grpo_flux", FORWARD, SLOWER, SPEED),
    "forward": Experiment(
        says="Without likelihoods, on the forward process, DiffusionNFT and AWM learn as fast as GRPO at equal cost",
        trainer="grpo_flux",
        preset="tiny",
        arms={method: loop | {"learning_rate": BEST_FORWARD[method]} for method, loop in FORWARD.items()},
        measures={SPEED: speed("sample_reward_hps"), HPS: heldout("hps")},
        compares=(
            Compare(SPEED, "NFT", "GRPO", margin=0.02, paired=False),
            Compare(SPEED, "AWM", "GRPO", margin=0.02, paired=False),
        ),
        curves=(("evaluations", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    ),
    "batch-baseline": Experiment(
        says="In flow, groups that share their noise teach more than a batch of other prompts, each with its own noise",
        trainer="grpo_flux",
        preset="tiny",
        arms={"group": EARLY, "batch": EARLY | {"loop": "claims.ddpo"}},
        measures={SPEED: speed("sample_reward_hps"), HPS: heldout("hps")},
        compares=(Compare(SPEED, "group", "batch", margin=0.01, paired=False),),
        curves=(("evaluations", "sample_reward_hps", "HPS of sample pictures (cosine)"),),
    ),
}
