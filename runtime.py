"""Everything a run needs that is not in the paper, so that the trainers can stay about the algorithm.

Command line from a dataclass, keyed randomness, prompt files, processes and sharding, LoRA and EMA, checkpoints and
resume, metrics, pictures. Knows nothing of GRPO, of noise schedules or of rewards.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import time
import typing
import urllib.request
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

# name: (data set on the hub, its file, JSON or CSV with a "prompt" in each row), or (address, text file)
PROMPT_SETS = {
    "hpdv2": ("ymhao/HPDv2", "train.json"),
    "vidprom": ("WenhaoWang/VidProM", "VidProM_unique.csv"),
    "consisid": ("https://raw.githubusercontent.com/XueZeyue/DanceGRPO/main/assets", "consist-id.txt"),
}


class RunError(Exception):
    """Something the user can mend. Its message is one line: what is wrong, and what to change."""


@contextlib.contextmanager
def one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn RunError, and the given kinds, into one line on stderr and exit code 1; leave bugs their traceback."""
    try:
        yield
    except (RunError, *errors) as e:
        sys.exit(f"error: {e}")
    if dist.is_initialized():
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ command line

# Options that may differ between a run and its continuation: they do not change what an iteration computes.
FREE_ON_RESUME = {"resume", "iterations", "save_every", "sample_every", "output_dir", "micro_batch", "compile"}


def parse_config(config_class: type, presets: dict[str, dict], argv: Sequence[str] | None = None):
    """Fill the frozen dataclass from defaults, then the preset, then the command line (each overrides the one before).

    Every field becomes an option; its help is the comment that trails it in the source; one of type tuple[str, ...]
    takes several words. A --task that is also the name of a preset chooses it, where no --preset is given. With
    --resume, where there is such an option, the values come from the run's config.json, and options given on the
    command line must agree with it.
    Raises RunError on anything that is not as it should be.
    """
    parser = _Parser(description=inspect.getmodule(config_class).__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    comments = dict(re.findall(r"^    (\w+):[^#\n]*?# (.*)$", inspect.getsource(config_class), re.MULTILINE))
    types = typing.get_type_hints(config_class)
    how_to_read = {
        bool: {"action": argparse.BooleanOptionalAction},
        tuple[str, ...]: {"action": "extend", "nargs": "+"},
    }
    for field in dataclasses.fields(config_class):
        how = how_to_read.get(types[field.name], {"type": types[field.name]})
        text = f"{comments[field.name]} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    defaults = dataclasses.asdict(config_class())

    def values(options: dict) -> dict:
        of_task = options["task"] if options.get("task") in presets else defaults["preset"]
        preset = options.get("preset", of_task)
        if preset not in presets:
            raise RunError(f"unknown preset {preset!r}; known: {', '.join(presets)}")
        return {"preset": preset} | presets[preset] | options

    new = config_class(**defaults | values(given))
    if not getattr(new, "resume", False):
        return new
    output_dir = Path(new.output_dir)
    if latest_checkpoint(output_dir) is None:
        raise RunError(
            f"nothing to resume: no complete checkpoint in {output_dir}; "
            "start without --resume, or name another --output-dir"
        )
    stored = json.loads((output_dir / "config.json").read_text())
    stored = {name: stored[name] for name in defaults}
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != stored[name]:
            raise RunError(
                f"--{name.replace('_', '-')} is {value!r}, but the run in {output_dir} has {stored[name]!r}; "
                "resume with the run's own options (or none), or start a new run in another --output-dir"
            )
    return config_class(**stored | given)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise RunError(f"{message} (--help lists the options)")


def require(condition: bool, message: str) -> None:
    """Raise RunError(message) unless the condition holds."""
    if not condition:
        raise RunError(message)


def check_options(config) -> None:
    """Ranges and divisibility of the options that all trainers share. Runs before any model is loaded."""
    c, processes = config, int(os.environ.get("WORLD_SIZE", 1))
    trained = 2 * c.keep_best_worst or c.group_size  # samples of each group that are trained on
    if c.steps < 2:
        raise RunError(f"--steps must be at least 2, got {c.steps}: the last step is never trained")
    for ok, message in (
        (c.iterations >= 1, f"--iterations must be at least 1, got {c.iterations}"),
        (
            c.group_size >= 2,
            f"--group-size must be at least 2, got {c.group_size}: samples are compared in their group",
        ),
        (c.prompts_per_iteration >= 1, f"--prompts-per-iteration must be at least 1, got {c.prompts_per_iteration}"),
        (
            c.prompts_per_iteration % processes == 0,
            f"--prompts-per-iteration {c.prompts_per_iteration} must be a multiple of the {processes} processes",
        ),
        (c.eta > 0, f"--eta must be above 0, got {c.eta}: without noise there is no policy to train"),
        (0 < c.timestep_fraction <= 1, f"--timestep-fraction must be in (0, 1], got {c.timestep_fraction}"),
        (
            int((c.steps - 1) * c.timestep_fraction) >= 1,
            f"--timestep-fraction {c.timestep_fraction} of {c.steps - 1} steps trains none; raise it or --steps",
        ),
        (
            0 <= c.keep_best_worst <= c.group_size // 2,
            f"--keep-best-worst {c.keep_best_worst} keeps twice as many samples, more than --group-size {c.group_size}",
        ),
        (
            c.updates_per_rollout >= 1 and trained % c.updates_per_rollout == 0,
            f"--updates-per-rollout {c.updates_per_rollout} must divide the {trained} samples trained in each group",
        ),
        (
            0 <= c.sde_window < c.steps,
            f"--sde-window must be from 0 (every step) to --steps - 1 = {c.steps - 1}, got {c.sde_window}",
        ),
        (c.micro_batch >= 1, f"--micro-batch must be at least 1, got {c.micro_batch}"),
        (0 < c.clip_range < 1, f"--clip-range must be in (0, 1), got {c.clip_range}"),
        (c.advantage_clip > 0, f"--advantage-clip must be above 0, got {c.advantage_clip}"),
        (c.kl_weight >= 0, f"--kl-weight must not be negative, got {c.kl_weight}"),
        (c.learning_rate > 0, f"--learning-rate must be above 0, got {c.learning_rate}"),
        (c.max_grad_norm > 0, f"--max-grad-norm must be above 0, got {c.max_grad_norm}"),
        (c.lora_rank >= 0, f"--lora-rank must be 0 (full fine-tuning) or more, got {c.lora_rank}"),
        (0 <= c.ema_decay < 1, f"--ema-decay must be in [0, 1), got {c.ema_decay}"),
        (c.save_every >= 1, f"--save-every must be at least 1, got {c.save_every}"),
        (c.sample_every >= 1, f"--sample-every must be at least 1, got {c.sample_every}"),
        (c.num_samples >= 1, f"--num-samples must be at least 1, got {c.num_samples}"),
        (c.seed >= 0, f"--seed must not be negative, got {c.seed}"),
    ):
        require(ok, message)


def check_size(config, multiple: int) -> None:
    """The model takes heights and widths that are multiples of this many pixels."""
    for name in ("height", "width"):
        size = getattr(config, name)
        require(size > 0 and size % multiple == 0, f"--{name} must be a multiple of {multiple} here, got {size}")


# --------------------------------------------------------------------------------------------------------- randomness


def keyed_rng(purpose: str, *key: int) -> np.random.Generator:
    """A generator that is a function of its key alone: same on any process, before and after a resume."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *key])


def keyed_noise(shape: Sequence[int], keys: Iterable[Sequence[int]], purpose: str, device) -> Tensor:
    """Standard normal (len(keys), *shape) float32; each sample drawn from its own key."""
    rows = [keyed_rng(purpose, *key).standard_normal(shape, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(device)


# ------------------------------------------------------------------------------------------------------------ prompts


def load_prompts(source: str) -> list[str]:
    """Prompts from a text file (one a line), a JSONL file ({"prompt": …}), or a public set named in PROMPT_SETS.

    A public set is fetched from the hub once and kept as a text file in the hub's cache folder.
    """
    path = _fetch_prompt_set(source) if source in PROMPT_SETS else Path(source)
    require(
        path.is_file(), f"no prompt file {source!r}; give a text or JSONL file, or one of: {', '.join(PROMPT_SETS)}"
    )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RunError(f"cannot read the prompt file {source}: {e}; it must be UTF-8 text") from e
    require(bool(lines), f"the prompt file {source} is empty; write one prompt a line")
    prompts = []
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and line.strip():
            line = _json_field(line, "prompt", f"{source} line {number}")
        require(bool(line.strip()), f"{source} line {number} is blank; remove it, every line is a prompt")
        prompts.append(line.strip())
    return prompts


def _json_field(line: str, name: str, where: str) -> str:
    try:
        value = json.loads(line)[name]
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise RunError(f'{where} is not {{"{name}": "…"}} ({type(e).__name__}: {e})') from e
    require(isinstance(value, str), f"{where}: the {name} must be a string")
    return value


def _fetch_prompt_set(name: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    source, file = PROMPT_SETS[name]
    path = Path(constants.HF_HOME) / "dancegrpo" / f"{name}.txt"
    if not path.is_file():
        try:
            if source.startswith("https://"):
                lines = fetch_text(f"{source}/{file}").splitlines()
            else:
                with open(hf_hub_download(source, file, repo_type="dataset"), encoding="utf-8", newline="") as text:
                    rows = json.load(text) if file.endswith(".json") else csv.DictReader(text)
                    lines = [row["prompt"] for row in rows]
        except OSError as e:
            raise RunError(
                f"cannot fetch the prompt set {name} ({file} of {source}); "
                "give --prompts a text file with one prompt a line"
            ) from e
        prompts = dict.fromkeys(" ".join(line.split()) for line in lines)  # unique, in the file's order
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "\n".join(prompt for prompt in prompts if prompt) + "\n")
    return path


def fetch_text(address: str) -> str:
    """What stands at an address. Raises OSError."""
    with urllib.request.urlopen(address, timeout=60) as response:
        return response.read().decode()


def prompt_batch(num_prompts: int, batch_size: int, iteration: int, seed: int) -> list[int]:
    """Indices of an iteration's prompts: epochs of a shuffled list, one after the other, without a gap."""
    positions = range(iteration * batch_size, (iteration + 1) * batch_size)
    order = {
        epoch: keyed_rng("prompts", seed, epoch).permutation(num_prompts)
        for epoch in {p // num_prompts for p in positions}
    }
    return [int(order[p // num_prompts][p % num_prompts]) for p in positions]


def chunks(items: Sequence, size: int, world: "World", text: str) -> Iterator[Sequence]:
    """items[0:size], items[size:2 size], … under a progress bar of its own that disappears when it is done."""
    starts = world.progress(range(0, len(items), size), desc=text, leave=False, mininterval=1.0, delay=2.0)
    return (items[start : start + size] for start in starts)


# ------------------------------------------------------------------------------------------------------- first frames


def first_frames(config, prompts: list[str], world: "World") -> dict[str, Path]:
    """{prompt: picture} for all prompts that an image-to-video run will visit; checked before any model is loaded.

    --first-frames is a JSONL file of {"prompt": …, "image": …}, images relative to it, or a folder with such a
    first_frames.jsonl; without it the images are those in --prompts, if that is such a JSONL file. A picture that is
    not in a folder's list gets a name there, for `paint_first_frames`, if there is a --first-frame-model.
    Raises RunError if one is missing or broken.
    """
    source, index = Path(config.first_frames or config.prompts), _first_frame_index(config)
    painter = "" if index == source else config.first_frame_model  # somebody else's file is not added to
    require(
        index == source or bool(config.first_frames),
        "image to video needs first frames: name a folder or a JSONL file with --first-frames, or give --prompts a "
        'JSONL file of {"prompt", "image"}',
    )
    listed = _listed_first_frames(index)
    batch_size = config.prompts_per_iteration
    batches = (prompt_batch(len(prompts), batch_size, i, config.seed) for i in range(config.iterations))
    visited = dict.fromkeys(prompts[: config.num_samples] + [prompts[i] for batch in batches for i in batch])
    for prompt in world.progress(list(visited), desc="first frames", delay=2.0):
        visited[prompt] = listed.get(prompt, source / f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}.png")
        if prompt in listed:
            read_picture(listed[prompt])
        require(
            prompt in listed or bool(painter),
            f"no first frame for {prompt!r} in {index}; add it there, or give --first-frames a folder and "
            "--first-frame-model a text-to-image model that paints it",
        )
    return visited


def _first_frame_index(config) -> Path:
    source = Path(config.first_frames or config.prompts)
    return source if source.suffix == ".jsonl" else source / "first_frames.jsonl"


def _listed_first_frames(index: Path) -> dict[str, Path]:
    listed = {}
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines() if index.is_file() else [], 1):
        prompt, image = (_json_field(line, name, f"{index} line {number}") for name in ("prompt", "image"))
        listed[prompt.strip()] = index.parent / image
    return listed


def paint_first_frames(config, pictures: dict[str, Path], world: "World") -> None:
    """Make each of the pictures that is not there yet, once, from noise that is its prompt's own, and list it."""
    from diffusers import AutoPipelineForText2Image

    index = _first_frame_index(config)
    listed = _listed_first_frames(index) if pictures else {}
    missing = {prompt: path for prompt, path in pictures.items() if prompt not in listed}
    if not missing:
        return
    pipe = load_pretrained(
        AutoPipelineForText2Image.from_pretrained, config.first_frame_model, "--first-frame-model", dtype=world.dtype
    )
    pipe.to(world.device).set_progress_bar_config(disable=True)
    options = {"height": config.height, "width": config.width, "num_inference_steps": config.first_frame_steps}
    for prompt, path in world.progress(list(missing.items())[world.rank :: world.size], desc="painting first frames"):
        if not path.exists():
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            save_image(path, pipe(prompt, generator=generator, **options).images[0])
    world.barrier()
    if world.is_main:
        with writing(index), index.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"prompt": p, "image": path.name}) + "\n" for p, path in missing.items())


# ------------------------------------------------------------------------------------------------ processes and models


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # that networks compute in: bf16 on CUDA, float32 on CPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate (n, ...) of every process, in rank order, on every process."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def progress(self, iterable: Iterable, **options) -> tqdm:
        """A progress bar, on rank 0 only."""
        return tqdm(iterable, disable=not self.is_main, dynamic_ncols=True, **options)


def start_world() -> World:
    """Join the processes that torchrun started, if it did: nccl on CUDA, gloo on CPU."""
    rank, size, local_rank = (
        int(os.environ.get(name, default)) for name, default in [("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)]
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    if size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(rank, size, device, torch.bfloat16 if cuda else torch.float32)


def check_local_or_hub(what: str, path: str) -> None:
    """Raise RunError if `path` is neither a folder here nor looks like a hub id (OWNER/NAME)."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.is_dir()
    require(
        Path(path).is_dir() or bool(is_hub_id),
        f"{what}: no folder {path!r}; give a local folder or a hub id (OWNER/NAME)",
    )


def load_pretrained(loader, path: str, option: str = "--model", **options):
    """Call a `from_pretrained` or `load_config` of diffusers; missing or gated weights become one line of advice."""
    check_local_or_hub(option, path)
    try:
        return loader(path, **options)
    except (OSError, ValueError) as e:  # diffusers' and the hub's errors for files that are missing or not allowed
        reason = (str(e).strip() or repr(e)).splitlines()[0]
        advice = (
            f"accept its licence at https://huggingface.co/{path} and log in with `hf auth login`"
            if "gated" in f"{type(e.__cause__).__name__} {type(e).__name__} {e}".lower() or "401" in str(e)
            else f"give {option} a complete folder in diffusers' layout, or a hub id that this machine can reach"
        )
        raise RunError(f"cannot load {path}: {reason}; {advice}") from e


def prepare_network(
    network: nn.Module, world: World, lora_rank: int, lora_targets: Sequence[str], checkpointing: bool, compiled: bool
) -> nn.Module:
    """Make a diffusers network ready to train, in place: LoRA, gradient checkpointing, compilation, sharding.

    Master weights of what is trained are float32. With LoRA (alpha = 2 rank, as in the official recipe) the frozen
    rest is kept in the compute dtype. On several processes every block is a shard of its own (FSDP2).
    """
    network.requires_grad_(not lora_rank)
    if world.size == 1:
        network.to(world.device)  # else sharding moves it there, block by block, so that it never has to fit whole
    if lora_rank:
        from peft import LoraConfig

        torch.manual_seed(0)  # LoRA's own initialisation is the one draw that a library makes from the global state
        network.to(world.dtype).add_adapter(
            LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, init_lora_weights="gaussian", target_modules=list(lora_targets)
            )
        )
        for parameter in trainable(network):
            parameter.data = parameter.data.float()
    if checkpointing:
        network.enable_gradient_checkpointing()
    if compiled:
        network.compile_repeated_blocks()
    if world.size > 1:
        shard(network, world)
    return network.eval()  # never train(): a dropout layer would make replay differ from rollout


def shard(network: nn.Module, world: World) -> nn.Module:
    """FSDP2: shard every block that diffusers declares unsplittable, innermost first, then the rest."""
    # Blocks of FLUX return views of one tensor; the warning is for code that changes them in place, which none does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(
        param_dtype=None if world.dtype == torch.float32 else world.dtype, reduce_dtype=torch.float32
    )
    for module in reversed(list(network.modules())):
        if type(module).__name__ in (network._no_split_modules or []):
            fully_shard(module, mp_policy=policy)
    return fully_shard(network, mp_policy=policy)


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def without_adapter(network: nn.Module) -> Iterator[None]:
    """The network as it was before LoRA, inside the block. A network without LoRA stays as it is."""
    adapted = bool(getattr(network, "peft_config", None))
    if adapted:
        network.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            network.enable_adapters()


def reduce_gradients(network: nn.Module, now: bool) -> None:
    """Say whether the next backward pass reduces gradients over processes: only the last of an update needs to."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)


def clip_gradients(network: nn.Module, max_norm: float, iteration: int) -> float:
    """Clip in place, and return the norm before. A loss that is not a number ends the run here, before any weight."""
    norm = nn.utils.clip_grad_norm_(trainable(network), max_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    require(
        np.isfinite(norm),
        f"the loss or its gradient became {norm} in iteration {iteration + 1}; lower --learning-rate or "
        "--max-grad-norm, and --resume from the last checkpoint, which is intact",
    )
    return norm


class EMA:
    """Exponential moving average of the trained weights, kept as shards where they are shards. decay 0: off."""

    def __init__(self, network: nn.Module, decay: float):
        self.parameters, self.decay = trainable(network), decay
        self.average = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if self.average:
            torch._foreach_lerp_(*([_local(p) for p in ps] for ps in (self.average, self.parameters)), 1 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The network carries the average inside the block, and its own weights again after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average, parameter = _local(average), _local(parameter)
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# --------------------------------------------------------------------------------------- what a run leaves, and resume


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into one line of advice."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError, dcp.CheckpointException) as e:
        # torch and safetensors report a full disk as errors of their own
        reason = str(e).strip().splitlines()[-1]
        raise RunError(
            f"could not write {path}: {reason}; make room or take another --output-dir; "
            "checkpoints already there are complete, --resume goes on from the newest"
        ) from e


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with writing(path):
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def open_output(config, world: World) -> None:
    """Create --output-dir and write config.json; refuse a folder that holds a run, unless it is to be resumed."""
    output_dir = Path(config.output_dir)
    if world.is_main and not config.resume:
        if (output_dir / "metrics.jsonl").exists() or latest_checkpoint(output_dir):
            raise RunError(
                f"{output_dir} already holds a run; add --resume to continue it, or take another --output-dir"
            )
        with writing(output_dir):
            (output_dir / "samples").mkdir(parents=True, exist_ok=True)
        packages = ("torch", "diffusers", "transformers", "open_clip_torch", "peft", "numpy")
        versions = {package: importlib.metadata.version(package) for package in packages}
        content = (
            {"script": Path(inspect.getfile(type(config))).name}
            | dataclasses.asdict(config)
            | {"versions": versions, "processes": world.size}
        )
        write_atomically(output_dir / "config.json", json.dumps(content, indent=2) + "\n")
    world.barrier()


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint: one being written has another name until it is whole."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


class Checkpoints:
    """Saves and restores network, optimizer and EMA, whatever the number of processes.

    A checkpoint folder holds the weights in diffusers' public layout (`transformer/`, or
    `pytorch_lora_weights.safetensors`; the same with `_ema` beside it) and `state/`, sharded, for --resume.
    """

    def __init__(self, pipeline, component: str, optimizer: torch.optim.Optimizer, ema: EMA, world: World):
        self.pipeline, self.component, self.network = pipeline, component, getattr(pipeline, component)
        self.optimizer, self.ema, self.world = optimizer, ema, world
        self.is_lora = bool(getattr(self.network, "peft_config", None))

    def _state(self) -> dict:
        options = StateDictOptions(ignore_frozen_params=True)
        return {
            "network": get_model_state_dict(self.network, options=options),
            "optimizer": get_optimizer_state_dict(self.network, self.optimizer, options=options),
            "ema": {str(i): average for i, average in enumerate(self.ema.average)},
        }

    def save(self, output_dir: str, iteration: int) -> None:
        """Write output_dir/checkpoint-ITERATION; it appears under that name only when it is complete."""
        final = Path(output_dir) / f"checkpoint-{iteration:06d}"
        part = final.with_name(final.name + ".part")
        if self.world.is_main:
            shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while saving
        self.world.barrier()
        with writing(final), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: as intended
            dcp.save(self._state(), checkpoint_id=part / "state", no_dist=self.world.size == 1)
            self._save_public(part, "")
            if self.ema.average:
                with self.ema.swapped_in():
                    self._save_public(part, "_ema")
            self.world.barrier()
            if self.world.is_main:
                shutil.rmtree(final, ignore_errors=True)
                part.rename(final)
            self.world.barrier()

    def _save_public(self, folder: Path, suffix: str) -> None:
        from huggingface_hub import save_torch_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=self.is_lora)
        weights = get_model_state_dict(self.network, options=options)  # gathered on rank 0 only
        if not self.world.is_main:
            return
        if not self.is_lora:
            target = folder / f"{self.component}{suffix}"
            target.mkdir(parents=True)
            weights = {name: weight.to(self.world.dtype) for name, weight in weights.items()}
            save_torch_state_dict(weights, target, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
            self.network.save_config(target)
            return
        from peft import get_peft_model_state_dict

        self.pipeline.save_lora_weights(
            folder,
            weight_name=f"pytorch_lora_weights{suffix}.safetensors",
            **{
                f"{self.component}_lora_layers": get_peft_model_state_dict(self.network, weights),
                f"{self.component}_lora_adapter_metadata": self.network.peft_config["default"].to_dict(),  # has alpha
            },
        )

    def restore(self, output_dir: str) -> int:
        """Load the newest checkpoint into network, optimizer and EMA, in place. Returns the iterations done."""
        path, state = latest_checkpoint(Path(output_dir)), self._state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=path / "state", no_dist=self.world.size == 1)
        set_model_state_dict(self.network, state["network"], options=StateDictOptions(strict=False))
        set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])
        return int(path.name.split("-")[1])


class Metrics:
    """metrics.jsonl, a line per iteration, and reward.png, its curves. On rank 0; elsewhere it does nothing."""

    REDRAW_SECONDS = 10.0

    def __init__(self, output_dir: str, world: World, done: int):
        self.path, self.world, self.drawn = Path(output_dir) / "metrics.jsonl", world, 0.0
        self.rows = []
        if done and world.is_main:  # resumed: lines after the checkpoint belong to iterations that are run again
            lines = self.path.read_text(encoding="utf-8").splitlines()[:done]
            self.rows = [json.loads(line) for line in lines]
            write_atomically(self.path, "".join(line + "\n" for line in lines))

    def write(
        self,
        iteration: int,
        rewards: dict[str, Tensor],
        weights: dict[str, float],
        advantages: Tensor,
        group_size: int,
        losses: list[Tensor],
        ratios: list[list[Tensor]],
        clip_range: float,
        grad_norms: list[float],
        clock: "Stopwatch",
    ) -> dict:
        """Add an iteration's line, over the samples of all processes. `ratios`: of each update, of each micro-batch.

        Calls a collective: every process must get here. Returns the line.
        """
        rewards = {name: self.world.gather(r) for name, r in rewards.items()}
        total = sum(weights[name] * r for name, r in rewards.items())
        advantages = self.world.gather(advantages)
        deviation = [self.world.gather(torch.cat(update)).double() - 1 for update in ratios]  # rho - 1, of each update
        every = torch.cat(deviation)
        row = {
            "iteration": iteration,
            "reward_mean": total.mean().item(),
            "reward_std": total.std().item(),
            **{f"reward_{name}": r.mean().item() for name, r in rewards.items()},
            "advantage_abs": advantages.abs().mean().item(),
            "loss": self.world.gather(torch.stack(losses).sum().view(1) / len(ratios)).mean().item(),
            "ratio_mean": 1 + every.mean().item(),
            "ratio_max_deviation_first_update": deviation[0].abs().max().item(),
            "clip_fraction": (every.abs() > clip_range).double().mean().item(),
            "approx_kl": (every - torch.log1p(every)).mean().item(),  # the k3 estimator, of the mean-log-prob ratio
            "grad_norm": sum(grad_norms) / len(grad_norms),
            "zero_variance_groups": int((advantages.view(-1, group_size).abs().amax(1) == 0).sum()),
            "seconds": sum(clock.seconds.values()),
            **{f"seconds_{part}": seconds for part, seconds in clock.seconds.items()},
            "samples_per_second": len(advantages) / sum(clock.seconds.values()),
        }
        if self.world.is_main:
            self.rows.append(row)
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            if time.monotonic() - self.drawn > self.REDRAW_SECONDS:
                self.draw()
                self.drawn = time.monotonic()
        return row

    def draw(self) -> None:
        """Redraw reward.png."""
        if not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        names = [key for key in self.rows[-1] if key.startswith("reward_") and key not in ("reward_mean", "reward_std")]
        panels = {
            "reward": names if len(names) == 1 else ["reward_mean", *names],
            "spread of rewards": ["reward_std"],
            "share of ratios clipped": ["clip_fraction"],
            "gradient norm": ["grad_norm"],
        }
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
        steps = np.array([row["iteration"] for row in self.rows])
        for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
            for key in keys:
                values = np.array([row[key] for row in self.rows])
                (line,) = axis.plot(steps, values, alpha=0.3)
                last_ten = [values[max(0, i - 9) : i + 1].mean() for i in range(len(values))]
                axis.plot(steps, last_ten, color=line.get_color(), label=f"{key}, mean of 10")
            axis.set(title=title, xlabel="iteration")
            axis.legend()
            axis.grid(alpha=0.3)
        part = self.path.with_name("reward.part.png")
        with writing(part):
            figure.savefig(part, dpi=110)
            part.replace(self.path.with_name("reward.png"))
        plt.close(figure)


class Stopwatch:
    """Seconds spent in each part of an iteration; waits for the device so that they are true on CUDA."""

    def __init__(self, world: World):
        self.world, self.seconds, self.last = world, {}, time.perf_counter()

    def lap(self, part: str) -> None:
        """Book the time since the last lap under `part`."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now


def save_pictures(path: Path, images: Tensor, captions: Sequence[str], columns: int = 4) -> None:
    """images (N, 3, H, W) in [0, 1] as one PNG, each with its caption below."""
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, 192 // images.shape[-2])  # small pictures are shown larger, pixel for pixel
    pixels = (images.float().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = images.shape[-2] * zoom, images.shape[-1] * zoom
    size = max(12, height // 24)
    font, strip, gap = ImageFont.load_default(size), int(size * 3.2), size // 2
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + strip) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + strip)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        line_length = max(8, int(width / (0.55 * size)))
        lines = textwrap.wrap(caption, line_length)[:2]
        draw.multiline_text((left, top + height + 2), "\n".join(lines), fill="black", font=font)
    save_image(path, sheet)


def save_image(path: Path, image) -> None:
    """A PIL image as a PNG file, which is whole or not there."""
    part = path.with_suffix(".part.png")
    with writing(path):
        image.save(part)
        part.replace(path)


def read_picture(path: str | Path):
    """A picture file as PIL's RGB image. Raises RunError if it is no readable picture."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:  # Pillow's errors for broken files
        raise RunError(f"cannot read the picture {path} ({e}); delete it, or put a whole one in its place") from e


def save_videos(path: Path, videos: Tensor, captions: Sequence[str], fps: float) -> None:
    """videos (N, F, 3, H, W) in [0, 1] as path.png, six frames of each in a row, and path.mp4, side by side.

    One frame is a picture, and becomes path.png only.
    """
    frames = videos.shape[1]
    shown = torch.linspace(0, frames - 1, min(frames, 6)).round().long()
    rows = torch.cat(videos[:, shown].unbind(1), -1)  # (N, 3, H, 6 W)
    save_pictures(path.with_suffix(".png"), rows, captions, columns=1 if frames > 1 else 4)
    if frames == 1:
        return
    from imageio_ffmpeg import write_frames

    zoom = max(1, 192 // videos.shape[-2])
    film = torch.cat(videos.unbind(0), -1).repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)  # (F, 3, H', W')
    pixels = (film.float().cpu() * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    part = path.with_suffix(".part.mp4")
    with writing(path.with_suffix(".mp4")):
        writer = write_frames(str(part), pixels.shape[2:0:-1], fps=fps, quality=8, macro_block_size=2)
        writer.send(None)  # starts it
        for frame in pixels:
            writer.send(frame)
        writer.close()
        part.replace(path.with_suffix(".mp4"))
