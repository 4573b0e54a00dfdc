"""What the tests run the trainers on: the tiny models, and options that make a run last seconds."""

import grpo_flux
import grpo_sd
import grpo_video
from runtime.options import command_words, parse_config

TRAINERS = {"flux": grpo_flux, "sd": grpo_sd, "t2v": grpo_video, "i2v": grpo_video, "t2i": grpo_video}
TRAINERS |= {"wan": grpo_video}
COMPONENTS = {grpo_flux: "transformer", grpo_sd: "unet", grpo_video: "transformer"}
FAST = {"iterations": 3, "prompts_per_iteration": 2, "group_size": 4, "updates_per_rollout": 2, "steps": 5}
FAST |= {"micro_batch": 4, "num_samples": 3, "seed": 7, "learning_rate": 1e-4, "sample_every": 2}
# Of the runs that the tests of files, of resuming and of several processes compare.
FINISHED = {"save_every": 2, "ema_decay": 0.5}


class Stopped(Exception):
    """A test has seen enough of a run."""


def options(case: str) -> dict:
    """Options of a run of seconds, in which every step but the last is stochastic and may be trained.

    Videos are wider than high and have five frames, to tell the axes apart; HPS judges them, which is quick.
    """
    common = {"sde_window": 0, "eta": 0.7} | FAST
    if TRAINERS[case] is not grpo_video:
        return {"preset": "tiny"} | common
    video = {"preset": f"tiny-{case}", "reward": "hps", "width": 48} | common
    if case == "t2i":  # at 2e-4 one ratio lies so near the range's end that rounding decides whether it is clipped
        return video | {"clip_range": 1e-3}
    return video | {"frames": 5}


def config(case: str, **changes):
    """The options of a small run, as the trainer's command line reads them."""
    trainer = TRAINERS[case]
    return parse_config(trainer.Config, trainer.PRESETS, command_words(options(case) | changes))


def train(case: str, output_dir, **changes):
    """Run a trainer in this process. Returns its output folder."""
    TRAINERS[case].main(config(case, output_dir=output_dir, **changes))
    return output_dir
