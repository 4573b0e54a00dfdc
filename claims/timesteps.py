"""Which steps are trained, how few evaluations of the network a window of them needs, and how many steps are taken."""

from .experiment import EARLY, FREE, SPEED, Compare, Experiment, evaluations, heldout, speed
from .policy import flux_with
from .variants import flux

HPS = "HPS on held-out prompts (cosine)"
LABEL = "HPS of sample pictures (cosine)"
COST = "evaluations of the network in an iteration, thousands"
ALL = {"sde_window": 0, "steps": 11}  # ten of eleven steps can be trained
SPENT = "evaluations of the network in all, thousands"
FLOW = FREE | {"sde": "flow", "eta": 0.7}  # whose samples are as noisy with 6 steps as with 11: see docs/questions.md
UNCLIPPED = EARLY | {"clip_range": 0.1}  # of Stable Diffusion


def fast(trainer: str, release: dict) -> Experiment:
    """One arm is the preset `tiny-fast`; the other is `tiny`, with steps like the preset `release`."""
    return Experiment(
        says=f"A window on two of six steps ends as high as the release's recipe, for half the cost, {trainer}",
        trainer=trainer,
        preset="tiny-fast",
        arms={
            "as fast": {},
            "as release": {"preset": "tiny", "steps": ALL["steps"]} | release,
        },
        measures={HPS: heldout("hps"), SPENT: lambda run: len(run.rows) * evaluations(run.config) / 1000},
        compares=(Compare(HPS, "as fast", "as release", by=-0.02), Compare(SPENT, "as release", "as fast", times=2.0)),
        curves=(("evaluations", "sample_reward_hps", LABEL),),
        heldout={"preset": "tiny", "steps": ALL["steps"]},  # one sampler for both, that of the dearer arm
    )


def branch(k: int):
    """grpo_flux.py in which step k alone is stochastic; samples of a prompt are one until there."""
    return flux_with(sde_window=lambda *_: range(k, k + 1))


branch_0, branch_2, branch_4 = branch(0), branch(2), branch(4)
CURVE = ("iteration", "sample_reward_hps", LABEL)
CLAIMS = {
    "timesteps": Experiment(
        says="The noisiest 30 % of the steps carry most, yet after 16 iterations those alone are below all (Fig. 4b)",
        trainer="grpo_video",
        preset="tiny-t2i",
        arms={
            "first 30 %": FLOW | ALL | {"timesteps": "first", "timestep_fraction": 0.3},
            "last 40 %": FLOW | ALL | {"timesteps": "last", "timestep_fraction": 0.4},
            "all": FLOW | ALL | {"timestep_fraction": 1.0},
        },
        measures={SPEED: speed("sample_reward_hps"), HPS: heldout("hps")},
        compares=(Compare(SPEED, "first 30 %", "last 40 %"), Compare(HPS, "all", "first 30 %")),
        curves=(("iteration", "sample_reward_hps", LABEL),),
        heldout={"preset": "tiny", "prompts": "prompts/tiny_single_heldout.txt"},
    ),
    "window": Experiment(
        says="An SDE window of two steps costs at most 0.6 of all steps, for the same gain less 0.02 (MixGRPO)",
        trainer="grpo_flux",
        preset="tiny",
        arms={
            "window of 2": EARLY | {"sde_window": 2, "sde_window_every": 1000},
            "all 5": EARLY | {"timestep_fraction": 1.0},
        },
        measures={SPEED: speed("sample_reward_hps"), COST: lambda run: evaluations(run.config) / 1000},
        compares=(
            Compare(SPEED, "window of 2", "all 5", by=-0.02),
            Compare(COST, "all 5", "window of 2", times=1 / 0.6),
        ),
        curves=(("evaluations", "sample_reward_hps", LABEL),),
    ),
    "sliding": flux(
        "A window of two steps that slides on teaches as much as one that stays on the first two (MixGRPO)",
        {
            "fixed": EARLY | {"sde_window": 2, "sde_window_every": 1000},
            "sliding": EARLY | {"sde_window": 2, "sde_window_every": 2},
        },
        (Compare(SPEED, "fixed", "sliding", margin=0.02),),
    ),
    "branch": flux(
        "With noise in one step only, shared until there, an early step teaches more than a late one (TempFlow)",
        {f"step {k}": FREE | {"sde_window": 1, "loop": f"claims.timesteps:branch_{k}"} for k in (0, 2, 4)},
        (Compare(SPEED, "step 0", "step 4", margin=0.02), Compare(SPEED, "step 0", "step 2", margin=0.02)),
        curves=(("iteration", "reward_std", "spread of rewards in the rollout (cosine)"),),
    ),
    "fewer-steps": Experiment(
        says="Judged with 20 steps, training with 6 teaches no less than training with 11 (Flow-GRPO)",
        trainer="grpo_flux",
        preset="tiny",
        arms={"6": FLOW, "11": FLOW | {"steps": 11}},
        measures={HPS: heldout("hps"), COST: lambda run: evaluations(run.config) / 1000},
        compares=(Compare(HPS, "6", "11", by=-0.02), Compare(COST, "11", "6", times=1.5)),
        curves=(("evaluations", "sample_reward_hps", LABEL),),
        heldout={"preset": "tiny", "steps": 20},
    ),
    "guided-updates": Experiment(
        says="Guided, four updates of a rollout teach as much, less 0.02, as one at four times the learning rate",
        trainer="grpo_sd",
        preset="tiny",
        arms={
            "1": UNCLIPPED | {"updates_per_rollout": 1, "learning_rate": 1e-4},
            "4": UNCLIPPED | {"updates_per_rollout": 4, "learning_rate": 2.5e-5},
        },
        measures={SPEED: speed("sample_reward_hps"), HPS: heldout("hps")},
        compares=(Compare(SPEED, "4", "1", by=-0.02),),
        curves=(CURVE,),
    ),
    "fast-flux": fast(  # the release's eta: with 1.0 samples of 11 steps would be 79 % too noisy
        "grpo_flux", {"timestep_fraction": 0.6, "iterations": 30, "eta": 0.3, "clip_range": FREE["clip_range"]}
    ),
    "fast-sd": fast("grpo_sd", {"timestep_fraction": 1.0, "iterations": 22}),
}
