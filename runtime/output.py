"""What a run leaves: its folder, checkpoints, metrics, pictures."""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import secrets
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rewards import MODEL_OF, first_line, parse_paths, parse_spec

from .data import FINGERPRINTED, fingerprint, keyed_noise, save_image, write_atomically, writing
from .loading import LORA_FILE, find_init, public_lora
from .options import (
    FREE_ON_RESUME,
    Lazy,
    RunError,
    command_words,
    complete_checkpoints,
    latest_checkpoint,
    read_sealed,
    require,
    seal,
)
from .processes import EMA, Preemption, World, local, trainable

dcp, state_dict = Lazy("torch.distributed.checkpoint"), Lazy("torch.distributed.checkpoint.state_dict")


class Folder(NamedTuple):
    """A run's folder, checked and locked: the future content of config.json, and what to start from, if not --model."""

    config: dict
    checkpoint: Path | None  # of this run, to continue
    init: Path | None  # weights in a checkpoint of another
    tracker: "Tracker"


def open_folder(config, world: World, prompts: list[str]) -> Folder:
    """Create --output-dir and take its lock; refuse a folder that is not this run's. Only --track writes into it yet.

    The lock is the process's own and ends with it. config.json will hold all options, the directory where the run was
    started, hashes of the prompts and of the models and rewards that are files here, and versions.
    """
    output_dir = Path(config.output_dir)
    content = {"script": Path(inspect.getfile(type(config))).name} | dataclasses.asdict(config) | {"resume": False}
    content["directory"], content["processes"] = os.getcwd(), world.size
    content["prompts_sha256"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    init = None
    if config.init and not world.from_main(complete_checkpoints(output_dir)):
        init = find_init(config.init)
        own = (init.parent / "checksums.json").is_file()  # of a run's checkpoint
        fault = find_fault(init.parent, world, init.name + "/" * init.is_dir()) if own else ""
        require(not fault, f"--init {config.init} is damaged: {fault}; take another checkpoint")
    if world.is_main:
        content["files"] = {path: fingerprint(path) for path in files_of(**vars(config))}
        packages = ("torch", "diffusers", "transformers", "open_clip_torch", "peft", "numpy")
        content["versions"] = {package: importlib.metadata.version(package) for package in packages}
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        lock_folder(output_dir)
        advice = "take another --output-dir"
        stored = refuse_foreign(output_dir) or content
        require(stored["script"] == content["script"], f"{output_dir} belongs to {stored['script']}; {advice}")
        content["tracker_id"] = stored.get("tracker_id") or secrets.token_hex(4)
        found = (output_dir / "metrics.jsonl").exists() or latest_checkpoint(output_dir)
        require(
            config.resume or not found, f"{output_dir} already holds a run; add --resume to continue it, or {advice}"
        )
        if config.resume:
            changed = [path for path, found in content["files"].items() if stored["files"].get(path) != found]
            changed += [config.prompts] if stored["prompts_sha256"] != content["prompts_sha256"] else []
            require(
                not changed,
                f"{', '.join(changed)} changed after the run in {output_dir} was started; restore the old content, or "
                f"start a new run in another --output-dir, which may --init from a checkpoint of this one",
            )
    world.barrier()
    checkpoint = None
    if config.resume:
        checkpoint = newest_whole_checkpoint(output_dir, world, content)
        done = int(checkpoint.name[11:]) if checkpoint else 0
        require(
            config.iterations >= done,
            f"--iterations {config.iterations} is below the {done} that the run in {output_dir} has done; raise it",
        )
        if world.is_main:
            content["changes"] = changes_on_resume(config, stored, done)
    return Folder(content, checkpoint, init, Tracker(config.track if world.is_main else "", content, checkpoint))


def changes_on_resume(config, stored: dict, done: int) -> list[dict]:
    """For config.json: [{"iteration": done before, option: [value before, value after], …}, …] of all resumptions."""
    new = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("resume", "output_dir")}
    new = {name: [stored[name], value] for name, value in new.items() if stored[name] != value}
    for name, (before, after) in new.items():
        print(f"from iteration {done + 1} on --{name.replace('_', '-')} is {after}; it was {before}", file=sys.stderr)
    return stored.get("changes", []) + ([{"iteration": done} | new] if new else [])


def files_of(model: str = "", transformer: str = "", reward: str = "", reward_paths: str = "", init: str = "", **_):
    """The files and folders here from which these options make a run: models, reward models, the reader's rewards."""
    own = [term.model.rpartition(":")[0] for term in parse_spec(reward)] if reward else []
    paths = [model, transformer, *own, *parse_paths(reward_paths).values()]
    sums = [folder / "checksums.json" for folder in (Path(init), Path(init).parent) if init]
    paths += [str(file) for file in sums if file.exists()] or [init]
    return [path for path in paths if path and Path(path).exists()]


OWN = {"dryrun.json", "results.json"}  # of runs and evaluations


def refuse_foreign(folder: Path) -> dict:
    """Raise RunError if this --output-dir holds files of a model, a checkpoint or a program. Others may be logs.

    Returns the content of its config.json, {} if there is none.
    """
    file, suffixes, advice = folder / "config.json", FINGERPRINTED - {".txt"}, "take another --output-dir"
    if file.is_file():
        stored = read_options(file)
        require("script" in stored, f"{folder} holds a config.json that is no run's, or is damaged; {advice}")
        return stored
    foreign = [path.name for path in sorted(folder.glob("*")) if path.suffix in suffixes and path.name not in OWN]
    require(not foreign, f"{folder} holds {', '.join(foreign[:3])}, which no run wrote; {advice}")
    return {}


def read_options(file: Path) -> dict:
    """The content of a config.json, {} if it is damaged."""
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def lock_folder(folder: Path) -> None:
    """One process at a time works in a folder. The lock goes when the process ends, in whatever way."""
    if LOCKS:  # of an earlier run of this process
        os.close(LOCKS.pop())
    LOCKS.append(os.open(folder, os.O_RDONLY))
    try:
        fcntl.flock(LOCKS[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise RunError(f"another process is working in {folder}; wait for it, or take another --output-dir") from e


LOCKS: list[int] = []  # the file descriptor that holds the lock of this process's run


UNREADABLE = 64 * "0"  # instead of a file's sha256


def newest_whole_checkpoint(output_dir: Path, world: World, run: dict) -> Path | None:
    """The newest checkpoint whose files are as this run wrote them; says which newer ones are not. A collective.

    run: the content of config.json.

    None where a run ended before its first checkpoint: it starts again.
    """
    checkpoints = world.from_main(complete_checkpoints(output_dir))
    if not checkpoints:
        return None
    for checkpoint in reversed(checkpoints):
        fault = find_fault(checkpoint, world, run=run)
        if not fault:
            return checkpoint
        if world.is_main:
            print(f"{checkpoint} is skipped: {fault}", file=sys.stderr)
    raise RunError(f"nothing to resume: {output_dir} has no whole checkpoint; start a new run in another --output-dir")


def find_fault(checkpoint: Path, world: World, part: str = "", run: dict | None = None) -> str:
    """What is wrong with the files of a checkpoint, or of the part whose names start so; "" if all are whole.

    run: the content of config.json of the run that is to continue from it. A collective: the files are shared out over
    the processes.
    """
    sums, fault = {}, ""
    if world.is_main:
        try:
            sealed = read_sealed(checkpoint / "checksums.json")
            sums = sealed["files"]
            if run is not None and not (checkpoint / "state").is_dir():
                fault = "it keeps no state to resume from; --keep-states says how many checkpoints do"
            elif run is not None and checkpoint.name != name_of(sealed["iteration"]):
                fault = f"it was renamed: the run saved it as {name_of(sealed['iteration'])}"
        except (OSError, ValueError, KeyError) as e:
            fault = f"its checksums.json is missing or damaged ({e})"
    sums, fault = world.from_main((sums, fault))
    names = [name for name in sums if name.startswith(part)]
    found = {} if fault else sha256_of(checkpoint, names, world)
    wrong = [name for name in found if found[name] != sums[name]]
    if fault or wrong or run is None:
        return f"its {wrong[0]} is missing or damaged" if wrong else fault
    return world.from_main(find_difference(checkpoint, run) if world.is_main else "")


def find_difference(checkpoint: Path, run: dict) -> str:
    """What tells a whole checkpoint's run from `run`, "" if it is the same."""
    stored = read_options(checkpoint / "state" / "config.json")
    own = run.keys() - FREE_ON_RESUME - {"directory", "processes", "files", "versions"}
    other = sorted(name for name in own if stored.get(name) != run[name])
    return f"it is of another run, whose {other[0]} is {stored.get(other[0])!r}" if other else ""


def name_of(iteration: int) -> str:
    """The folder of the checkpoint after so many iterations."""
    return f"checkpoint-{iteration:06d}"


def sha256_of(folder: Path, names: list[str], world: World) -> dict[str, str]:
    """{name: sha256 of the file in hexadecimal, or UNREADABLE}. A collective."""
    digests = []
    for i in world.share(len(names)):
        try:
            with (folder / names[i]).open("rb") as file:
                digests.append(list(hashlib.file_digest(file, "sha256").digest()))
        except OSError:
            digests.append(list(bytes.fromhex(UNREADABLE)))
    digests = world.collect(torch.tensor(digests, dtype=torch.uint8).view(-1, 32), len(names))
    return {name: bytes(digest).hex() for name, digest in zip(names, digests.tolist(), strict=True)}


class Checkpoints:
    """Saves and restores network, optimizer and EMA, whatever the number of processes.

    A checkpoint folder holds the weights in diffusers' public layout (`transformer/`, or
    `pytorch_lora_weights.safetensors`; the same with `_ema` beside it) and `state/`, sharded, for --resume, up to
    six times as large: only the newest `keep_states` checkpoints keep it. `state/` also holds the run's config.json and
    metrics.jsonl of that time; `checksums.json` has the sha256 of every file, but for the model card's, which may be
    edited: README.md, reward.png and samples.png.
    """

    CARD = ("README.md", "reward.png", "samples.png")

    def __init__(
        self,
        pipeline,
        component: str,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        world: World,
        keep_states: int = 2,
    ):
        self.pipeline, self.component, self.network = pipeline, component, getattr(pipeline, component)
        self.optimizer, self.ema, self.world, self.keep_states = optimizer, ema, world, keep_states
        self.is_lora = bool(getattr(self.network, "peft_config", None))

    def _state(self) -> dict:
        options = state_dict.StateDictOptions(ignore_frozen_params=True)
        return {
            "network": state_dict.get_model_state_dict(self.network, options=options),
            "optimizer": state_dict.get_optimizer_state_dict(self.network, self.optimizer, options=options),
            "ema": {str(i): average for i, average in enumerate(self.ema.average)},
        }

    def save(self, output_dir: str, iteration: int, card: str = "") -> None:
        """Write output_dir/checkpoint-ITERATION; it appears under that name only when it is complete.

        card: the text of its README.md, if it shall have one; the run's curves and newest samples come with it.
        Raises RunError, and writes nothing, if a weight is not finite.
        """
        self.require_finite(iteration)
        final = Path(output_dir) / name_of(iteration)
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
            if self.world.is_main:
                for name in ("config.json", "metrics.jsonl"):
                    if (final.parent / name).is_file():
                        shutil.copy(final.parent / name, part / "state")
            self.world.barrier()
            names = [file.relative_to(part).as_posix() for file in sorted(part.rglob("*")) if file.is_file()]
            sums = sha256_of(part, self.world.from_main(names), self.world)
            if self.world.is_main and card:
                self._write_card(part, iteration, card)
            require(UNREADABLE not in sums.values(), f"could not read {part} again; the checkpoint is not saved")
            if self.world.is_main:
                write_atomically(
                    part / "checksums.json", json.dumps(seal({"iteration": iteration, "files": sums}), indent=2) + "\n"
                )
                shutil.rmtree(final, ignore_errors=True)
                part.rename(final)
                self._delete_old_states(final)
            self.world.barrier()

    def _write_card(self, folder: Path, iteration: int, card: str) -> None:
        (folder / "README.md").write_text(card, encoding="utf-8")
        sheets = [path for path in sorted(folder.parent.glob("samples/*.png")) if path.stem.isdigit()]
        sheets = [path for path in sheets if int(path.stem) <= iteration]  # later ones: of a run that continued earlier
        for file, name in zip([folder.parent / "reward.png", *sheets[-1:]], self.CARD[1:], strict=False):
            if file.is_file():
                shutil.copy(file, folder / name)

    def require_finite(self, iteration: int) -> None:
        """Raise RunError if a trained weight, or its average, is infinite or NaN. A collective."""
        finite = torch.stack([local(w).isfinite().all() for w in (*trainable(self.network), *self.ema.average)])
        require(
            bool(self.world.gather(finite.all().view(1)).all()),
            f"the weights became infinite or NaN in iteration {iteration} and are not saved; start again with a lower "
            "--learning-rate in another --output-dir; the checkpoints saved so far are intact",
        )

    def _delete_old_states(self, newest: Path) -> None:
        """Delete old states, up to `newest`. A later checkpoint is damaged: the run resumed from an earlier one."""
        upto = [path for path in complete_checkpoints(newest.parent) if int(path.name[11:]) <= int(newest.name[11:])]
        for checkpoint in upto[: -self.keep_states]:
            if (checkpoint / "state").is_dir():
                (checkpoint / "state").rename(checkpoint / "state.part")  # never half of one under its own name
            shutil.rmtree(checkpoint / "state.part", ignore_errors=True)

    def _save_public(self, folder: Path, suffix: str) -> None:
        from huggingface_hub import save_torch_state_dict

        options = state_dict.StateDictOptions(ignore_frozen_params=self.is_lora)
        weights = {}
        for name, weight in state_dict.get_model_state_dict(self.network, options=options).items():
            weight = weight if self.is_lora else weight.to(self.world.dtype)  # before it is gathered
            weight = weight.full_tensor() if isinstance(weight, torch.distributed.tensor.DTensor) else weight
            # Gathered, it may be a view of a larger, padded buffer, which safetensors refuses.
            weights |= {name: weight.cpu().clone()} if self.world.is_main else {}
        if not self.world.is_main:
            return
        if not self.is_lora:
            target = folder / f"{self.component}{suffix}"
            target.mkdir(parents=True)
            save_torch_state_dict(weights, target, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
            self.network.save_config(target)
            return
        layers, metadata = public_lora(self.network, weights)
        named = {f"{self.component}_lora_layers": layers, f"{self.component}_lora_adapter_metadata": metadata}
        self.pipeline.save_lora_weights(folder, weight_name=f"pytorch_lora_weights{suffix}.safetensors", **named)

    def restore(self, checkpoint: Path) -> int:
        """Load a whole checkpoint into network, optimizer and EMA, in place. Returns the iterations done."""
        state = self._state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=self.world.size == 1)
        options = state_dict.StateDictOptions(strict=False)
        state_dict.set_model_state_dict(self.network, state["network"], options=options)
        state_dict.set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])
        return int(checkpoint.name.split("-")[1])


def model_card(config, checkpoints: Checkpoints, iteration: int, row: dict) -> str:
    """README.md of a checkpoint, as the hub shows it: what was trained on what, how, and the lines that load it."""
    from huggingface_hub import ModelCardData

    script, kind = Path(inspect.getfile(type(config))).name, type(checkpoints.pipeline).__name__
    name = "/".join(Path(getattr(config, "transformer", "") or config.model).parts[-2:])  # OWNER/NAME, also of a folder
    video = "image-to-video" if "ImageToVideo" in kind else "text-to-video"
    header = ModelCardData(
        base_model=name,
        base_model_relation="adapter" if checkpoints.is_lora else "finetune",
        library_name="diffusers",
        pipeline_tag=video if getattr(config, "frames", 1) > 1 else "text-to-image",
        tags=["dancegrpo", "grpo", "reinforcement-learning", *["lora"] * checkpoints.is_lora],
    ).to_yaml()
    fields = [field for field in dataclasses.fields(config) if field.name not in ("preset", "output_dir", "resume")]
    options = {field.name: getattr(config, field.name) for field in fields}
    words = [script, *command_words({f.name: options[f.name] for f in fields if options[f.name] != f.default})]
    scores = {key: value for key, value in row.items() if key.startswith(("reward_", "sample_reward_"))}
    return "\n".join([
        f"---\n{header}\n---\n",
        f"# {Path(name).name}, trained with DanceGRPO\n",
        f"{name} after {iteration} iterations of GRPO ([arXiv 2505.07818](https://arxiv.org/abs/2505.07818))"
        f"{', started from ' + config.init if config.init else ''}.",
        "It loads from this folder like this; from elsewhere, replace the dot with its path or its hub id:\n",
        "```python", *loading_lines(config, checkpoints, iteration), "```\n",
        *loading_notes(checkpoints),
        "| | |\n|---|---|", f"| reward | {config.reward} |", f"| prompts | {config.prompts} |",
        *(f"| {key} | {value:.4f} |" for key, value in scores.items()),
        f"\n```bash\npython {shlex.join(words)}\n```\n",
        "![curves of the rewards](reward.png)\n\n![sample pictures](samples.png)\n",
    ])  # fmt: skip


def loading_notes(checkpoints: Checkpoints) -> list[str]:
    """What a reader of the lines must know, and which other programs read the file."""
    notes, kind = [], type(checkpoints.pipeline).__name__
    other = {
        "FluxPipeline": "ComfyUI maps these names",
        "StableDiffusionPipeline": "ComfyUI and A1111 map kohya's names, which "
        "`diffusers.utils.convert_state_dict_to_kohya(safetensors.torch.load_file(FILE))` makes",
    }
    if "Hunyuan" in kind:
        notes.append(
            "`tokenizer` is given because transformers 5 drops all spaces under the class that the model's "
            "model_index.json names (transformers issue 45488).\n"
        )
    if checkpoints.is_lora:
        read = other.get(kind, "those that map only the original repository's names, as ComfyUI does, cannot read it")
        notes.append(f"The LoRA means W + B·A, also without its metadata: alpha is the rank. Other programs: {read}.\n")
    return notes


def loading_lines(config, checkpoints: Checkpoints, iteration: int) -> list[str]:
    """Three lines of Python that make `pipe`, the pipeline with a checkpoint's weights, in that checkpoint's folder."""
    folder = Path(config.output_dir, name_of(iteration))
    model, transformer = (
        os.path.relpath(path, folder) if path and Path(path).is_dir() else path
        for path in (config.model, getattr(config, "transformer", ""))
    )
    component, dtype = checkpoints.component, f"dtype={checkpoints.world.dtype}"
    tokenizer = "tokenizer=tokenizer, " if "Hunyuan" in type(checkpoints.pipeline).__name__ else ""
    kind, first = f"diffusers.{type(checkpoints.pipeline).__name__}", ["import diffusers, torch"]
    if tokenizer:
        first = [
            "import diffusers, torch, transformers",
            f'tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained("{model}", subfolder="tokenizer")',
        ]
    network = f"diffusers.{type(checkpoints.network).__name__}"
    if not checkpoints.is_lora:
        return [
            *first,
            f'{component} = {network}.from_pretrained(".", subfolder="{component}", {dtype})',
            f'pipe = {kind}.from_pretrained("{model}", {tokenizer}{component}={component}, {dtype})',
        ]
    part = f'{component}={network}.from_pretrained("{transformer}", {dtype}), ' if transformer else ""
    return [
        *first,
        f'pipe = {kind}.from_pretrained("{model}", {tokenizer}{part}{dtype})',
        f'pipe.load_lora_weights(".", weight_name="{LORA_FILE}")',
    ]


class Metrics:
    """metrics.jsonl, a line per iteration, and reward.png, its curves. On rank 0; elsewhere it does nothing.

    A resumed run takes the lines of its checkpoint: later ones belong to iterations that are run again.
    """

    REDRAW_SECONDS = 20.0

    def __init__(self, output_dir: str, world: World, checkpoint: Path | None):
        self.path, self.world, self.drawn = Path(output_dir) / "metrics.jsonl", world, time.monotonic()
        self.rows, self.before = [], {}
        if world.is_main and (checkpoint or self.path.exists()):  # resumed: what came after the checkpoint is run again
            lines = (checkpoint / "state" / "metrics.jsonl").read_text(encoding="utf-8") if checkpoint else ""
            self.rows = [json.loads(line) for line in lines.splitlines()]
            write_atomically(self.path, lines)

    def start(self, scores: dict[str, float]) -> None:
        """The scores of the sample pictures before training; the first line holds them as NAME_before."""
        self.before = {f"{name}_before": score for name, score in scores.items()}

    def write(self, row: dict) -> None:
        """Add an iteration's line."""
        if not self.world.is_main:
            return
        row, self.before = row | self.before, {}
        self.rows.append(row)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if time.monotonic() - self.drawn > self.REDRAW_SECONDS:
            self.draw()
            self.drawn = time.monotonic()

    def draw(self) -> None:
        """Redraw reward.png."""
        if not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        sampled = {key for row in self.rows for key in row if key.startswith("sample_reward_")}
        names = [key for key in self.rows[-1] if key.startswith("reward_") and key not in ("reward_mean", "reward_std")]
        panels = {
            "reward": names,
            "spread of rewards": ["reward_std"],
            "share of ratios clipped": ["clip_fraction"],
            "gradient norm": ["grad_norm"],
        }
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
        for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
            for key in keys:
                steps, values = curve(self.rows, key)
                (line,) = axis.plot(steps, values, alpha=0.3)
                last_ten = [values[max(0, i - 9) : i + 1].mean() for i in range(len(values))]
                axis.plot(steps, last_ten, color=line.get_color(), label=f"{key}, mean of 10")
                if f"sample_{key}" in sampled:
                    steps, values = curve(self.rows, f"sample_{key}")
                    axis.plot(steps, values, "o-", color=line.get_color(), linewidth=3, label=f"sample_{key}")
            axis.set(title=title, xlabel="iteration")
            axis.legend()
            axis.grid(alpha=0.3)
        part = self.path.with_name("reward.part.png")
        with writing(part):
            figure.savefig(part, dpi=110)
            part.replace(self.path.with_name("reward.png"))
        plt.close(figure)


def curve(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a key in lines of metrics; scores of sample pictures begin before training, at 0."""
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    if f"{key}_before" in rows[0]:
        points.insert(0, (0, rows[0][f"{key}_before"]))
    x, y = zip(*points, strict=True)
    return np.array(x), np.array(y)


class Tracker:
    """--track: metrics and samples in TensorBoard or Weights & Biases, beside metrics.jsonl. kind "": nowhere.

    config: the content of config.json; checkpoint: where the run is continued from. Raises RunError if it cannot start.
    If it fails later it says so, and is left out from then on: metrics.jsonl and samples/ hold everything.
    """

    def __init__(self, kind: str, config: dict, checkpoint: Path | None):
        self.kind, self.backend = kind, None
        try:
            self.backend = {"tensorboard": TensorBoard, "wandb": WandB}[kind](config, checkpoint) if kind else None
        except Exception as e:  # a tracker is not ours: it may raise anything
            advice = (
                "log in with `wandb login`, or set WANDB_MODE=offline" if kind == "wandb" else "leave the option out"
            )
            raise RunError(f"--track {kind} cannot start ({type(e).__name__}: {first_line(e)}); {advice}") from e

    def log(self, iteration: int, values: dict[str, float], samples: Path | None = None) -> None:
        """The values after an iteration, and the sample pictures drawn then: the .png, and the .mp4 if there is one."""
        film = samples and samples.with_suffix(".mp4")
        self._call("log", iteration, values, samples, film if film and film.exists() else None)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *args) -> None:
        if self.backend is None:
            return
        try:
            getattr(self.backend, method)(*args)
        except Exception as e:
            self.backend = None
            message = (
                f"warning: --track {self.kind} failed ({type(e).__name__}: {first_line(e)}) and is left out from now"
            )
            print(
                f"{message} on; metrics.jsonl and samples/ hold everything; --resume starts it again", file=sys.stderr
            )


class TensorBoard:
    """What goes to OUTPUT_DIR/tensorboard; see `Tracker`."""

    def __init__(self, config: dict, checkpoint: Path | None):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is dropped, for these iterations are run again.
        purge = int(checkpoint.name[11:]) + 1 if checkpoint else None
        self.writer = SummaryWriter(str(Path(config["output_dir"], "tensorboard")), purge_step=purge)

    def log(self, iteration: int, values: dict[str, float], samples: Path | None, film: Path | None) -> None:
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        if samples:
            self.writer.add_image("samples", np.array(Image.open(samples)), iteration, dataformats="HWC")
        if film:  # TensorBoard plays GIFs, but no MP4
            content, (width, height) = as_gif(film)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            summary = Summary(value=[Summary.Value(tag="film", image=image)])
            self.writer.file_writer.add_summary(summary, iteration)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """What goes to Weights & Biases, or with WANDB_MODE=offline to OUTPUT_DIR/wandb; see `Tracker`.

    A resumed run goes on under its id. Iterations that are run again are logged again, with the same values.
    """

    def __init__(self, config: dict, checkpoint: Path | None):
        import wandb

        self.wandb, out = wandb, Path(config["output_dir"]).resolve()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dancegrpo"),
            name=out.name,
            id=config["tracker_id"],
            resume="allow",
            dir=str(out),
            config=config,
            allow_val_change=True,
            settings=wandb.Settings(console="off"),  # the progress bar would fill its log
        )
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: dict[str, float], samples: Path | None, film: Path | None) -> None:
        row = values | {"iteration": iteration}
        row |= {"samples": self.wandb.Image(str(samples))} if samples else {}
        row |= {"film": self.wandb.Video(str(film), format="mp4")} if film else {}
        self.run.log(row)

    def close(self) -> None:
        self.run.finish()


class Samples:
    """Sample pictures or videos: same prompts, same initial noise, the ODE. Their scores are the curve to watch.

    draw   (prompts, initial noise (b, *shape)) → images (b, 3, H, W) or videos (b, F, 3, H, W) in [0, 1]
    reward is that of the training. fps: frames per second, of videos.
    """

    SHOWN = 8  # are saved; all are scored

    def __init__(self, config, world: World, prompts: list[str], draw: Callable, shape: tuple, reward, fps=None):
        self.folder, self.seed, self.micro_batch = Path(config.output_dir, "samples"), config.seed, config.micro_batch
        self.prompts, self.draw, self.shape, self.reward = prompts[: config.num_samples], draw, shape, reward
        self.world, self.fps = world, fps

    def sheet(self, iteration: int) -> Path:
        """The file of the pictures that are drawn after so many iterations; a film lies beside it, as .mp4."""
        return self.folder / f"{iteration:06d}.png"

    @torch.no_grad()
    def save(self, iteration: int) -> dict[str, float]:
        """Draw all, shared out over the processes, and save the first. Returns {"sample_reward_NAME": mean score}."""
        mine, count, images = self.world.share(len(self.prompts)), len(self.prompts), []
        for part in self.world.chunks(mine, self.micro_batch, "sample pictures"):
            z = keyed_noise(self.shape, [(self.seed, i) for i in part], "sample pictures", self.world.device)
            images.append(self.draw([self.prompts[i] for i in part], z))
        images = torch.cat(images)
        with self.world.on_device(*self.reward.models):
            scores = self.reward(images, [self.prompts[i] for i in mine], self.fps)
        shown = self.world.collect(images[: self.SHOWN], min(count, self.SHOWN))
        if self.world.is_main:
            captions, path = self.prompts[: len(shown)], self.sheet(iteration)
            if self.fps is None:
                save_pictures(path, shown, captions)
            else:
                save_videos(path, shown, captions, self.fps)
        return {f"sample_reward_{name}": self.world.collect(r, count).mean().item() for name, r in scores.items()}


class Run:
    """What surrounds the algorithm: resuming, and drawing, writing and saving when it is time."""

    def __init__(self, config, world: World, checkpoints: Checkpoints, samples: Samples, folder: Folder):
        self.config, self.world, self.checkpoints, self.samples = config, world, checkpoints, samples
        self.done = checkpoints.restore(folder.checkpoint) if folder.checkpoint else 0
        for group in checkpoints.optimizer.param_groups:
            group["lr"] = config.learning_rate  # it may have been changed on --resume
        if world.is_main:
            with writing(samples.folder):
                samples.folder.mkdir(exist_ok=True)
            file = Path(config.output_dir, "config.json")
            write_atomically(file, json.dumps(seal(folder.config), indent=2) + "\n")
        self.metrics = Metrics(config.output_dir, world, folder.checkpoint)
        self.preempted, self.flat, self.tracker = Preemption(world), 0, folder.tracker

    def iterations(self) -> Iterator[int]:
        """The iterations that are still to do, under a progress bar. `finish` must be called at the end of each."""
        options = {"initial": self.done, "total": self.config.iterations, "desc": "GRPO"}
        if self.world.is_main:
            print(start_line(self.config, self.checkpoints, self.done), flush=True)
        try:
            if not self.done:
                scores = self.samples.save(0)
                self.metrics.start(scores)
                self.tracker.log(0, scores, self.samples.sheet(0))
            self.bar = self.world.progress(range(self.done, self.config.iterations), **options)
            yield from self.bar
            if self.world.is_main:
                print(end_line(self.config, self.checkpoints, max(self.done, self.config.iterations)), flush=True)
        finally:
            self.tracker.close()
            self.preempted.restore()

    def finish(self, iteration: int, row: dict) -> None:
        """Write the line of metrics; draw sample pictures and save a checkpoint if it is time."""
        done, c = iteration + 1, self.config
        self.checkpoints.require_finite(done)  # before pictures are drawn with such weights
        drawn = done == c.iterations or done % c.sample_every == 0
        row = row | (self.samples.save(done) if drawn else {})
        self.metrics.write({"iteration": done} | row)
        self.tracker.log(done, row, self.samples.sheet(done) if drawn else None)
        self.bar.set_postfix_str(f"reward {row['reward_mean']:.4f}")
        self.check_spread(row["zero_variance_groups"] == c.prompts_per_iteration)
        stop = self.preempted() and done < c.iterations
        if stop or done == c.iterations or done % c.save_every == 0:
            if not stop:  # else there may be little time
                self.metrics.draw()
            self.checkpoints.save(c.output_dir, done, model_card(c, self.checkpoints, done, row))
        if stop:
            self.metrics.draw()
            message = f"stopped after iteration {done}; continue with --output-dir {c.output_dir} --resume"
            if self.world.is_main:
                self.bar.write(message)
            raise SystemExit(self.preempted.exit_code)

    def check_spread(self, flat: bool) -> None:
        """Say so when no group has had any spread of rewards for ten iterations: then nothing is learned."""
        self.flat = self.flat + 1 if flat else 0
        if self.flat == 10 and self.world.is_main:
            self.bar.write(
                "warning: in ten iterations all rewards of every group were equal, so nothing is learned; look at the "
                "sample pictures, raise --eta or --group-size, or change the reward's threshold"
            )


def start_line(config, checkpoints: Checkpoints, done: int) -> str:
    """What is trained, where the run is, and how to watch it."""
    count = sum(weight.numel() for weight in trainable(checkpoints.network)) / 1e6
    what = f"LoRA of rank {config.lora_rank}" if checkpoints.is_lora else "all weights"
    todo = f"iterations {done + 1} to {config.iterations}" + f", after {name_of(done)}" * bool(done)
    if done >= config.iterations:
        todo = f"all {done} iterations are done; raise --iterations to go on"
    model = getattr(config, "transformer", "") or config.model
    return (
        f"{model}, {checkpoints.component}: {what}, {count:.3g} million; reward {config.reward}; {todo}; "
        f"in {config.output_dir}: reward.png and samples/ show how it goes, metrics.jsonl has the numbers"
    )


def end_line(config, checkpoints: Checkpoints, done: int) -> str:
    """How to evaluate the last checkpoint, and how to load it."""
    checkpoint, paths = Path(config.output_dir, name_of(done)), parse_paths(config.reward_paths)
    options = ["--prompts", config.prompts] if Path(config.prompts).is_file() else []
    other = {"geneval"} | ({"videoalign"} if getattr(config, "frames", 1) == 1 else set())  # judge in another way
    if metrics := [name for name, model in MODEL_OF.items() if model in paths.keys() - other]:
        own = ",".join(f"{name}={path}" for name, path in paths.items() if name not in other)
        terms = [term for term in parse_spec(config.reward) if term.model not in MODEL_OF.values()]
        metrics += [term.model for term in terms if term.name not in metrics]
        options += ["--metrics", ",".join(metrics), "--reward-paths", own]
    command = shlex.join(["python", "eval.py", "--checkpoint", str(checkpoint), *options])
    kind, part = type(checkpoints.network).__name__.removeprefix("FSDP"), checkpoints.component
    load = f"diffusers.{kind}.from_pretrained({str(checkpoint)!r}, subfolder={part!r})"
    load = f"pipeline.load_lora_weights({str(checkpoint)!r})" if checkpoints.is_lora else load
    return f"{checkpoint} is saved; to evaluate it: {command}; to load it: {load}"


class Stopwatch:
    """Seconds spent in each part of an iteration; waits for the device so that they are true on CUDA."""

    def __init__(self, world: World):
        self.world, self.seconds, self.last = world, {}, time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def metrics(self, samples: int) -> dict[str, float]:
        """Seconds in all and of each part, and samples per second; `samples` is the number of this process."""
        total = sum(self.seconds.values())
        parts = {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}
        return {"seconds": total} | parts | {"samples_per_second": samples * self.world.size / total}


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


def as_gif(film: Path) -> tuple[bytes, tuple[int, int]]:
    """An MP4 file as a GIF, and its width and height."""
    from imageio_ffmpeg import read_frames
    from PIL import Image

    reader, file = read_frames(str(film)), io.BytesIO()
    properties = next(reader)
    frames = [Image.frombytes("RGB", properties["size"], frame) for frame in reader]
    options = {"append_images": frames[1:], "duration": 1000 / properties["fps"], "loop": 0}
    frames[0].save(file, "GIF", save_all=True, **options)
    return file.getvalue(), properties["size"]
