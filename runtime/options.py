"""Options from a dataclass, presets, ranges, and errors that are one line."""

import argparse
import contextlib
import dataclasses
import importlib.util
import inspect
import math
import os
import re
import sys
import time
import types
import typing
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist


class RunError(Exception):
    """Something the user can fix. Its message is one line: what is wrong, and what to change."""


class Lazy(types.ModuleType):
    """A module that is imported when one of its names is first used, so that --help and a wrong option answer at once:
    diffusers and what it needs take several times as long to import as torch."""

    def __getattr__(self, name: str):
        return getattr(importlib.import_module(self.__name__), name)


files = Lazy("runtime.files")


@contextlib.contextmanager
def one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn RunError, and the given kinds, into one line on stderr and exit code 1; leave bugs their traceback."""
    try:
        yield
    except (RunError, *errors) as e:
        of_memory = re.search("out of memory|allocate memory", str(e.__cause__))  # in a reward
        sys.exit(f"error: {e}{'; lower --reward-batch (in eval.py --batch-size)' if of_memory else ''}")
    except (MemoryError, RuntimeError) as e:  # torch's errors of this kind are RuntimeErrors
        if GLOO in str(e):
            sys.exit(
                f"error: {lost_process(str(e))}; its own output says why; run the command again to continue "
                "(a training run: with --resume)"
            )
        if not isinstance(e, MemoryError) and not re.search("out of memory|allocate memory", str(e)):
            raise
        reason, advice = (str(e) or "out of memory").splitlines()[0], "--micro-batch (in eval.py --batch-size)"
        sys.exit(f"error: {reason}; lower {advice}, height and width, or take --offload")
    except KeyboardInterrupt:
        print("interrupted; run the command again to continue (a training run: with --resume)", file=sys.stderr)
        sys.exit(130)
    if dist.is_initialized():
        dist.destroy_process_group()


GLOO = "gloo/transport"  # in every error of a collective that another process did not take part in


def lost_process(error: str) -> str:
    """Which process made a collective fail with this gloo error: the one that reports no error itself."""
    limit, silent = re.search(r"Timed out waiting (\d+)ms", error), []
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{dist.get_rank()} has an error", "")
        time.sleep(5)  # until the others have theirs
        silent = [str(r) for r in range(dist.get_world_size()) if not store.check([f"{r} has an error"])]
    except dist.DistError:  # the process with the store has ended
        pass
    who = f"process {', '.join(silent)}" if silent else "another process"
    return f"{who} did not answer within {int(limit[1]) / 1000:g} seconds" if limit else f"{who} has ended"


# Options that may differ between a run and its continuation: they do not change what an iteration computes, but for the
# learning rate, which is lowered where a run becomes unstable. metrics.jsonl has the learning rate of each iteration.
FREE_ON_RESUME = {"resume", "iterations", "learning_rate", "save_every", "sample_every", "keep_states", "output_dir"}
FREE_ON_RESUME |= {"micro_batch", "reward_batch", "shard_size", "offload", "compile", "track"}
FREE_ON_RESUME |= {"dry_run", "processes", "gpu_memory"}


def parse_config(config_class: type, presets: dict[str, dict], argv: Sequence[str] | None = None):
    """Fill the frozen dataclass from defaults, then the preset, then the command line (each overrides the one before).

    Every field becomes an option; its help is the comment that trails it in the source; one of type tuple[str, ...]
    takes several words. With --resume, where there is such an option, the values come from the run's config.json, and
    options given on the command line must agree with it. Raises RunError on anything that is not as it should be.
    """
    parser = _Parser(description=inspect.getmodule(config_class).__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [f"  {name}: {' '.join(command_words(values)) or 'the defaults'}" for name, values in presets.items()]
    parser.epilog = "\n".join(["presets, and the options that they set:", *lines])
    comments = dict(re.findall(r"^    (\w+):[^#\n]*?# (.*)$", inspect.getsource(config_class), re.MULTILINE))
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        how = how_to_read(types[field.name])
        text = f"{comments[field.name]} (default: {field.default!r})".replace("%", "%%")
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", config_class.preset)
    require(preset in presets, f"unknown preset {preset!r}; known: {', '.join(presets)}")
    new = config_class(**{"preset": preset} | presets[preset] | given)
    require(bool(new.output_dir), "--output-dir is empty; name a folder")
    new = dataclasses.replace(new, output_dir=os.path.expanduser(new.output_dir))
    if not getattr(new, "resume", False):
        return new
    output_dir = Path(new.output_dir)
    found = latest_checkpoint(output_dir) or (output_dir / "metrics.jsonl").exists()
    advice = "start without --resume, or name another --output-dir"
    require(bool(found), f"nothing to resume: no run in {output_dir}; {advice}")
    stored = stored_options(output_dir / "config.json", config_class)
    for name, value in given.items():
        require(
            name in FREE_ON_RESUME or value == stored[name],
            f"--{name.replace('_', '-')} is {value!r}, but the run in {output_dir} has {stored[name]!r}; "
            "resume with the run's own options (or none), or start a new run in another --output-dir",
        )
    return config_class(**stored | given | {"output_dir": new.output_dir})


def how_to_read(kind) -> dict:
    """argparse's options for an option of this type; a Literal lists its values."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind == tuple[str, ...]:
        return {"action": "extend", "nargs": "+"}
    return {"choices": typing.get_args(kind)} if typing.get_origin(kind) is typing.Literal else {"type": kind}


def command_words(options: dict) -> list[str]:
    """{"group_size": 4, "offload": True, "compile": False} → ["--group-size", "4", "--offload", "--no-compile"]"""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def stored_options(file: Path, config_class: type) -> dict:
    """The options in a run's config.json. Raises RunError if it is another script's, or not as the run wrote it."""
    stored, script, options = files.read_json(file), Path(inspect.getfile(config_class)).name, {}
    found = stored.get("script", script)
    require(found == script, f"{file.parent} is a run of {found}, not of {script}")
    copies = sorted(file.parent.glob("checkpoint-*/state/config.json"))
    advice = f"copy {copies[-1]} over it, or start" if copies else "start"
    for field in dataclasses.fields(config_class):
        kind, value = type(field.default), stored.get(field.name)
        value = float(value) if kind is float and type(value) is int else value
        fault = f"{file} is damaged, or of another version: its {field.name} is {value!r}, which is no {kind.__name__}"
        require(type(value) is kind, f"cannot resume: {fault}; {advice} a new run in another --output-dir")
        options[field.name] = value
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise RunError(f"{message} (--help lists the options)")


def require(condition: bool, message: str) -> None:
    """Raise RunError(message) unless the condition holds."""
    if not condition:
        raise RunError(message)


# The types of options, each with its ranges: in words, for the error, and as a test. No range contains NaN.
MOST = ("at most 10**9", lambda x: x <= 10**9)
Count = typing.Annotated[int, ("at least 1", lambda x: x >= 1), MOST]
Natural = typing.Annotated[int, ("0 or more", lambda x: x >= 0), MOST]
Several = typing.Annotated[int, ("at least 2", lambda x: x >= 2), MOST]
Seed = typing.Annotated[int, ("from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)]
Rank = typing.Annotated[int, ("0 (all weights are trained) or a rank of at most 1024", lambda x: 0 <= x <= 1024)]
Positive = typing.Annotated[float, ("above 0", lambda x: 0 < x < math.inf)]
NonNegative = typing.Annotated[float, ("0 or more", lambda x: 0 <= x < math.inf)]
AtLeast1 = typing.Annotated[float, ("at least 1 (off)", lambda x: 1 <= x < math.inf)]
Share = typing.Annotated[float, ("in (0, 1]", lambda x: 0 < x <= 1)]
Open01 = typing.Annotated[float, ("in (0, 1)", lambda x: 0 < x < 1)]
Decay = typing.Annotated[float, ("in [0, 1)", lambda x: 0 <= x < 1)]


# This process among all of them, and among those of its node.
Place = namedtuple("Place", "rank size local_rank local_size")


def find_place() -> Place:
    """What torchrun's variables say; one process where there are none."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Place(*(int(os.environ.get(name, default)) for name, default in names.items()))


def check_ranges(config) -> None:
    """Every option is in the range that its declaration names."""
    for name, kind in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for words, holds in getattr(kind, "__metadata__", ()):
            require(holds(value), f"--{name.replace('_', '-')} must be {words}, got {value}")


def check_options(config) -> None:
    """Ranges, and how options go together, for all trainers. Runs before any model is loaded."""
    check_ranges(config)
    c, processes = config, config.processes if config.dry_run else find_place().size
    package = importlib.util.find_spec(c.track) if c.track else None
    found = not c.track or bool(package and package.origin)  # a folder wandb of its runs is not the package
    require(found, f"--track {c.track} needs the package {c.track}; install it: pip install {c.track}")
    P, G, T, k, window = c.prompts_per_iteration, c.group_size, c.steps, c.keep_best_worst, c.sde_window
    tau, updates = c.timestep_fraction, c.updates_per_rollout
    sde, ratio = getattr(c, "sde", ""), getattr(c, "ratio", "")
    trained = 2 * k or G  # samples of each group that are trained on
    for ok, message in (
        (P % processes == 0, f"--prompts-per-iteration {P} must be a multiple of the {processes} processes"),
        (window or int((T - 1) * tau), f"--timestep-fraction {tau} of {T - 1} steps trains none; raise it or --steps"),
        (not c.quantize or c.lora_rank, f"--quantize {c.quantize} is for the frozen base of a LoRA; give --lora-rank"),
        (not c.quantize or c.shard_size <= 1, "--quantize keeps a whole base on every GPU; give --shard-size 1"),
        (not window or c.timesteps == "random", f"--timesteps {c.timesteps} does not go with --sde-window {window}"),
        (k <= G // 2, f"--keep-best-worst {k} keeps twice as many samples, more than --group-size {G}"),
        (trained % updates == 0, f"--updates-per-rollout {updates} must divide the {trained} trained samples"),
        (window < T, f"--sde-window must be from 0 (every step) to --steps - 1 = {T - 1}, got {window}"),
        (sde != "cps" or c.eta <= 1, f"--eta must be at most 1 with --sde cps, got {c.eta}"),
        (sde != "cps" or ratio == "plain", f"--ratio {ratio} needs log-probabilities that --sde cps does not use"),
    ):
        require(bool(ok), message)


def check_size(config, multiple: int) -> None:
    """The model takes heights and widths that are multiples of this many pixels."""
    for name in ("height", "width"):
        size = getattr(config, name)
        require(size > 0 and size % multiple == 0, f"--{name} must be a multiple of {multiple} here, got {size}")


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, oldest first: one being written has another name until it is whole."""
    found = [path for path in Path(output_dir).glob("checkpoint-*/") if re.fullmatch(r"checkpoint-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint."""
    return (complete_checkpoints(output_dir) or [None])[-1]
