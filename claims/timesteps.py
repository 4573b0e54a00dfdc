"""Which steps are trained, and how few evaluations of the network a window of them needs."""

from .experiment import Compare, Experiment, evaluations, heldout

HPS = "HPS on held-out prompts (cosine)"
LABEL = "HPS of sample pictures (cosine)"
COST = "evaluations of the network in an iteration, thousands"
ALL = {"sde_window": 0, "steps": 11}  # ten of eleven steps can be trained
SPENT = "evaluations of the network in all, thousands"


def fast(trainer: str, fraction: float, seeds: int) -> Experiment:
    """The tiny preset has the window of the preset `fast`; the other arm trains steps as the preset `release` does."""
    return Experiment(
        says=f"A window on the two noisiest of six steps ends as high as the release's recipe, for half, {trainer}",
        trainer=trainer,
        preset="tiny",
        arms={
            "as fast": {"iterations": 36},
            "as release": ALL | {"timestep_fraction": fraction, "iterations": 30 if fraction < 1 else 22},
        },
        measures={HPS: heldout("hps"), SPENT: lambda run: len(run.rows) * evaluations(run.config) / 1000},
        compares=(Compare(HPS, "as fast", "as release"), Compare(SPENT, "as release", "as fast", times=2.0)),
        curves=(("evaluations", "sample_reward_hps", LABEL), ("seconds", "sample_reward_hps", LABEL)),
        heldout={"preset": "tiny", "steps": ALL["steps"]},  # one sampler for both, that of the dearer arm
        seeds=seeds,
    )


CLAIMS = {
    "timesteps": Experiment(
        says="The noisiest 30 % of the steps carry most, and yet training them alone ends below training all (Fig. 4b)",
        trainer="grpo_video",
        preset="tiny-t2i",
        arms={
            "first 30 %": ALL | {"timesteps": "first", "timestep_fraction": 0.3},
            "random 30 %": ALL | {"timesteps": "random", "timestep_fraction": 0.3},
            "last 40 %": ALL | {"timesteps": "last", "timestep_fraction": 0.4},
            "random 60 %": ALL | {"timesteps": "random", "timestep_fraction": 0.6},
            "all": ALL | {"timestep_fraction": 1.0},
        },
        measures={HPS: heldout("hps")},
        compares=(Compare(HPS, "first 30 %", "last 40 %"), Compare(HPS, "all", "first 30 %")),
        curves=(("iteration", "sample_reward_hps", LABEL),),
        heldout={"preset": "tiny", "prompts": "prompts/tiny_single_heldout.txt"},
    ),
    "window": Experiment(
        says="An SDE window of two steps costs at most 0.6 of all steps, for the same reward less 0.01 (MixGRPO)",
        trainer="grpo_flux",
        preset="tiny",
        arms={"window of 2": {"sde_window": 2}, "all 5": {"sde_window": 0, "timestep_fraction": 1.0}},
        measures={HPS: heldout("hps"), COST: lambda run: evaluations(run.config) / 1000},
        compares=(
            Compare(HPS, "window of 2", "all 5", by=-0.01),
            Compare(COST, "all 5", "window of 2", times=1 / 0.6),
        ),
        curves=(("evaluations", "sample_reward_hps", LABEL), ("seconds", "sample_reward_hps", LABEL)),
    ),
    "fast-flux": fast("grpo_flux", 0.6, seeds=5),
    "fast-sd": fast("grpo_sd", 1.0, seeds=3),
}
