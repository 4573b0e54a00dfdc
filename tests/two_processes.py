"""Every trainer's small run on two processes, in one launch, since importing takes longer than the runs.

    torchrun --nproc_per_node=2 --standalone tests/two_processes.py FOLDER

Leaves FOLDER/CASE as the trainer leaves it, with sampled.json: the prompts of whose sample pictures each process drew;
and FOLDER/refused.txt: how a run ends whose prompts cannot be shared out.
"""

import functools
import json
import sys
from pathlib import Path

import torch.distributed as dist

import conftest  # noqa: F401  finds the repository
import small
from runtime import cli, distributed, output

distributed.start_world = functools.cache(distributed.start_world)  # the processes meet once


def run(case: str, folder: Path) -> None:
    world, drawn = distributed.start_world(), []
    chunks = output.World.chunks

    def spy(self, items, size, text):
        drawn.extend(items if text == "sample pictures" else ())
        return chunks(self, items, size, text)

    output.World.chunks = spy
    small.train(case, folder / case, **small.FINISHED)
    output.World.chunks = chunks
    everyone = [None] * world.size
    dist.all_gather_object(everyone, drawn[:2])
    if world.is_main:
        (folder / case / "sampled.json").write_text(json.dumps(everyone))


def refused() -> str:
    try:
        with cli.one_line_errors():
            small.train("flux", "nowhere", prompts_per_iteration=3)
    except SystemExit as e:
        return e.code
    return "not refused"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in small.TRAINERS:
        run(case, folder)
    text = refused()
    if distributed.start_world().is_main:
        (folder / "refused.txt").write_text(text)
    dist.destroy_process_group()
