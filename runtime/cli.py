"""Options from a dataclass, presets, ranges, and errors that are one line."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist


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


# Options that may differ between a run and its continuation: they do not change what an iteration computes.
FREE_ON_RESUME = {"resume", "iterations", "save_every", "sample_every", "output_dir", "micro_batch", "compile"}
FREE_ON_RESUME |= {"shard_size", "offload", "keep_states"}


def parse_config(config_class: type, presets: dict[str, dict], argv: Sequence[str] | None = None):
    """Fill the frozen dataclass from defaults, then the preset, then the command line (each overrides the one before).

    Every field becomes an option; its help is the comment that trails it in the source; one of type tuple[str, ...]
    takes several words. With --resume, where there is such an option, the values come from the run's config.json, and
    options given on the command line must agree with it.
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
        preset = options.get("preset", defaults["preset"])
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


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints, oldest first: one being written has another name until it is whole."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint."""
    return (complete_checkpoints(output_dir) or [None])[-1]
