"""What launch.py runs on several processes."""

import hashlib
import os
import signal
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import huggingface_hub
from diffusers import FluxTransformer2DModel
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

import eval as evaluation
import grpo_video
import rewards
import runtime
import small
from evaluation import geneval
from rewards import Reward
from runtime import data, loading, processes
from runtime.options import RunError, one_line_errors, parse_config
from runtime.processes import World


def train(case: str, changes: dict) -> None:
    """A small run of a trainer, as its script would do it."""
    with one_line_errors():
        small.train(case, changes.pop("output_dir"), **changes)


def train_with_own_rates(case: str, changes: dict) -> None:
    """`train`, in which every process has another learning rate."""
    train(case, changes | {"learning_rate": 1e-5 * (1 + int(os.environ["RANK"]))})


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


def train_in_places_slowly(case: str, changes: dict, where: str = "") -> None:
    """`train`, in which a collective may last 5 seconds; now and then one of two processes takes 7 for something else.

    where: a place at which, besides, the second process hangs ("__call__", the reward) or ends ("write_data").
    """
    processes.LIMIT, rank = timedelta(seconds=5), int(os.environ["RANK"])

    def slowly(owner, name: str, slow_rank: int, when=lambda *_: True) -> None:
        function, calls = getattr(owner, name), []

        def call(*arguments, **options):
            if rank == slow_rank and when(*arguments) and not calls:
                calls.append(print(f"{name} is slow"))
                time.sleep(60 if name == where == "__call__" else 7)
                if name == where:
                    os._exit(9)
            return function(*arguments, **options)

        mock.patch.object(owner, name, call).start()

    slowly(data, "load_prompts", 1)  # before the processes have met
    slowly(loading, "load_weights", 0, lambda kind, *_: kind is FluxTransformer2DModel)
    slowly(loading, "load_components", 1)
    if where == "__call__":
        slowly(Reward, where, 1)
    slowly(FileSystemWriter, "write_data", 1)
    slowly(FileSystemReader, "read_data", 1)
    slowly(huggingface_hub, "save_torch_state_dict", 0)
    slowly(hashlib, "file_digest", 1)
    train(case, changes)


def meet(sizes: list[int]) -> None:
    """`start_world` on nodes of so many processes each."""
    node = [node for node, size in enumerate(sizes) for _ in range(size)][int(os.environ["RANK"])]
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) - sum(sizes[:node]))
    os.environ["LOCAL_WORLD_SIZE"] = str(sizes[node])
    with one_line_errors():
        processes.start_world()


def write_apart(folder: Path) -> None:
    """A folder that all processes share, and one of each process's own disk, as it were."""
    world = processes.start_world()
    world.require_shared(folder / "shared")
    apart = folder / str(world.rank) / "run"
    cfg = evaluation.Config(output_dir=str(apart), metrics="hps", model="owner/name", prompts="hpsv2")
    for refuse in (lambda: world.require_shared(apart), lambda: evaluation.open_output(cfg, [], [], world)):
        message = ""
        try:
            refuse()
        except RunError as e:
            message = str(e)
        assert "all machines must share it" in message


def load_frozen_models(folder: Path) -> None:
    """What training and evaluation load of frozen models. FOLDER/NAME.txt notes when a process begins and ends one."""

    def noted(what: str, load):
        def call(*args, **options):
            with (folder / f"{name}.txt").open("a") as file:
                print("begin", what, file=file, flush=True)
                time.sleep(0.1)  # another process, if it may, begins meanwhile
                loaded = load(*args, **options)
                print("end", what, file=file, flush=True)
            return loaded

        return call

    name, loading.load_components = "training", noted("pipeline", loading.load_components)
    for reward in (rewards.VideoAlignReward, rewards.HPSReward):
        reward.load = noted(reward.name, reward.load)
    changes = {"reward": "mq,hps", "first_frames": folder / "frames", "first_frame_model": "tiny/flux"}
    changes |= {"prompts": "prompts/tiny.txt"}  # without pictures
    cfg = small.config("i2v", output_dir=folder / "run", prompts_per_iteration=4, first_frame_steps=1, **changes)
    prompts = grpo_video.check(cfg)
    paint = partial(data.paint_first_frames, cfg, data.first_frames(cfg, prompts))
    runtime.start(cfg, prompts, grpo_video.load_models, "transformer", True, (), paint)

    name, find = "evaluation", geneval.find_detector
    geneval.find_detector = lambda *args: (noted("detector", find) if len(args) > 2 else find)(*args)
    (folder / "prompts.txt").write_text("a red circle\ntwo blue squares\na cross\n")  # one process has nothing to do
    words = f"--preset tiny --model tiny/flux --output-dir {folder}/eval --prompts {folder}/prompts.txt --batch-size 1"
    words += " --images-per-prompt 1 --steps 1 --height 64 --width 64 --metrics hps,geneval"
    evaluation.main(parse_config(evaluation.Config, evaluation.PRESETS, words.split()))
