"""What launch.py runs on several processes."""

import os
import signal
from pathlib import Path

import small
from rewards import Reward
from runtime.options import one_line_errors
from runtime.processes import World


def train(case: str, changes: dict) -> None:
    """A small run of a trainer, as its script would do it."""
    with one_line_errors():
        small.train(case, changes.pop("output_dir"), **changes)


def train_until_sigterm(case: str, changes: dict, phase: str, time: int) -> None:
    """`train`; the last process gets SIGTERM in the middle of a phase, when it comes for the time-th time."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    chunks, judge, times, sent = World.chunks, Reward.__call__, [], Path(changes["output_dir"], "sent")

    def reached(text: str) -> None:
        times.extend([text] if text == phase else [])
        if last and len(times) == time and not sent.exists():
            sent.touch()
            os.kill(os.getpid(), signal.SIGTERM)

    def spy_on_chunks(self, items, size, text):
        for number, chunk in enumerate(chunks(self, items, size, text)):
            yield chunk
            if number == 0:
                reached(text)

    def spy_on_reward(self, *arguments):
        reached("reward")
        return judge(self, *arguments)

    World.chunks, Reward.__call__ = spy_on_chunks, spy_on_reward
    train(case, changes)
