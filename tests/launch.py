"""Starts functions on several processes, as torchrun would, without importing everything once more in each.

The processes are forked from a server that has imported the trainers: importing takes longer than the small runs.
"""

import importlib
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import conftest  # noqa: F401  finds the repository

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["launch_preload"])


def _rank(module: str, function: str, arguments: tuple, log: Path, variables: dict) -> None:
    os.environ.update(variables)
    stream = log.open("a")
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    import torch

    torch.set_num_threads(1)  # as torchrun sets it
    getattr(importlib.import_module(module), function)(*arguments)


def start(module: str, function: str, arguments: tuple, processes: int, logs: Path) -> list:
    """Start module.function(*arguments) on so many processes. Their output goes to LOGS/rank-N.log."""
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)  # where the server finds modules
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        variables = {name: str(value) for name, value in variables.items()}
        log = logs / f"rank-{rank}.log"
        started.append(SERVER.Process(target=_rank, args=(module, function, arguments, log, variables)))
        started[-1].start()
    return started


def run(module: str, function: str, arguments: tuple, processes: int, logs: Path) -> None:
    """`start`, and wait for all to end well."""
    started = start(module, function, arguments, processes, logs)
    for rank, process in enumerate(started):
        process.join(600)
        assert process.exitcode == 0, (logs / f"rank-{rank}.log").read_text()[-3000:]
