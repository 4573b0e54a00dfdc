"""What the tests run the trainers on: the tiny models, and options that make a run last seconds."""

import grpo_video

FAST = {"iterations": 3, "prompts_per_iteration": 2, "group_size": 4, "updates_per_rollout": 2, "steps": 5}
FAST |= {"micro_batch": 4, "num_samples": 2, "seed": 7, "learning_rate": 1e-4, "sample_every": 10}


def options(trainer, task=None) -> dict:
    """Options of a run of seconds, in which every step but the last is stochastic and may be trained.

    Videos are wider than high and have five frames, to tell the axes apart; HPS judges them, which is quick.
    """
    common = {"sde_window": 0, "eta": 0.7} | FAST
    if trainer is not grpo_video:
        return {"preset": "tiny"} | common
    video = {"preset": f"tiny-{task}", "task": task, "reward": "hps", "width": 48} | common
    return video if task == "t2i" else video | {"frames": 5}
