"""Every trainer's small run on two processes; `main` is started on each.

Leaves FOLDER/CASE as the trainer leaves it, with sampled.json: the prompts of whose sample pictures each process drew;
and FOLDER/refused.txt: how a run ends whose prompts cannot be shared out.
"""

import json
from pathlib import Path

import torch.distributed as dist

import conftest  # noqa: F401  finds the repository
import small
from runtime.options import one_line_errors
from runtime.processes import World


def run(case: str, folder: Path) -> None:
    drawn, chunks = [], World.chunks

    def spy(self, items, size, text):
        drawn.extend(items if text == "sample pictures" else ())
        return chunks(self, items, size, text)

    World.chunks = spy
    small.train(case, folder / case, **small.FINISHED)
    World.chunks = chunks
    everyone = [None, None]
    dist.all_gather_object(everyone, drawn[:2])
    if dist.get_rank() == 0:
        (folder / case / "sampled.json").write_text(json.dumps(everyone))


def refused() -> str:
    try:
        with one_line_errors():
            small.train("flux", "nowhere", prompts_per_iteration=3)
    except SystemExit as e:
        return e.code
    return "not refused"


def main(folder: Path) -> None:
    dist.init_process_group("gloo")  # the processes meet once, not in every run
    for case in small.TRAINERS:
        run(case, folder)
    text = refused()
    if dist.get_rank() == 0:
        (folder / "refused.txt").write_text(text)
    dist.destroy_process_group()
