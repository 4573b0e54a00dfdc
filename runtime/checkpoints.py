"""A run's folder: its lock, config.json, and checkpoints that are saved, verified and restored."""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import os
import secrets
import shutil
import sys
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rewards import parse_paths, parse_spec

from .files import FINGERPRINTED, fingerprint, lock_folder, read_json, write_atomically, writing
from .initial import find_init
from .lora import LORA_FILE, public_lora
from .options import FREE_ON_RESUME, Lazy, complete_checkpoints, latest_checkpoint, require
from .processes import EMA, World, local, trainable

dcp, state_dict = Lazy("torch.distributed.checkpoint"), Lazy("torch.distributed.checkpoint.state_dict")

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves: as intended

CARD = ("README.md", "reward.png", "samples.png")  # what runtime/card.py adds to a checkpoint
SUMS = "SHA256SUMS"  # of a checkpoint: `sha256sum -c` reads it
GIB = 2**30
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "peft", "numpy")


# A run's folder, checked and locked: the future content of config.json, the checkpoint of this run from which it
# continues, and the weights of another run from which it starts, if not from --model.
Folder = namedtuple("Folder", "config checkpoint init")


def open_folder(config, world: World, prompts: list[str]) -> Folder:
    """Create --output-dir and take its lock; refuse a folder that is not this run's. Nothing is written yet.

    config.json will hold all options, the directory where the run was started, hashes of the prompts and of the models
    and rewards that are files here, and versions.
    """
    output_dir, init = Path(config.output_dir), None
    content = {"script": script_of(config)} | dataclasses.asdict(config) | {"resume": False}
    content |= {"directory": os.getcwd(), "processes": world.size}
    content["prompts_sha256"] = hashlib.sha256("\n".join(prompts).encode()).hexdigest()
    mine = {name: value for name, value in content.items() if name != "directory"}
    advice = "start the same command with the same files on every machine"
    require(world.from_main(mine) == mine, f"the processes have different options or prompts; {advice}")
    if config.init and not world.from_main(complete_checkpoints(output_dir)):
        init = find_init(config.init)
        require_whole(init, "--init", world)
    if world.is_main:
        content["files"] = {path: fingerprint(path) for path in files_of(**vars(config))}
        content["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
        with writing(output_dir):
            output_dir.mkdir(parents=True, exist_ok=True)
        refuse_foreign(output_dir)  # before a lock lies in it
        lock_folder(output_dir)
        stored = check_folder(config) or content
        content["tracker_id"] = stored.get("tracker_id") or secrets.token_hex(4)
        if config.resume:
            known = stored.get("files", {})
            changed = [path for path, sha256 in content["files"].items() if known.get(path, sha256) != sha256]
            changed += [config.prompts] if stored.get("prompts_sha256") != content["prompts_sha256"] else []
            message = f"{', '.join(dict.fromkeys(changed))} changed after the run in {output_dir} was started"
            require(not changed, f"{message}; restore it, or start a new run in another --output-dir, with --init")
    world.require_shared(output_dir)
    checkpoint = newest_whole_checkpoint(output_dir, world, content) if config.resume else None
    return Folder(content, checkpoint, init)


def check_folder(config) -> dict:
    """Raise RunError unless --output-dir is new, or this run's and to be resumed. Returns its config.json, or {}."""
    output_dir, script, advice = Path(config.output_dir), script_of(config), "take another --output-dir"
    stored = refuse_foreign(output_dir)
    require(stored.get("script", script) == script, f"{output_dir} belongs to {stored.get('script')}; {advice}")
    found = (output_dir / "metrics.jsonl").exists() or latest_checkpoint(output_dir)
    require(config.resume or not found, f"{output_dir} already holds a run; add --resume to continue it, or {advice}")
    return stored


def script_of(config) -> str:
    """The file name of the trainer whose options these are."""
    return Path(inspect.getfile(type(config))).name


def files_of(model="", transformer="", reward="", reward_paths="", init="", prompts="", first_frames="", **_):
    """The local files that a run with these options uses: models, rewards, JSONL files of prompts and first frames."""
    own = [term.model.rpartition(":")[0] for term in parse_spec(reward)] if reward else []
    given = parse_paths(reward_paths).values()
    paths = [model, transformer, *own, *given, *(place.rpartition(":")[0] for place in given)]  # FILE.py:CLASS
    saved = init and (Path(init) / SUMS).exists()  # a checkpoint, whose state/ is deleted when its run goes on
    paths += [f"{init}/{part}" for part in ("transformer", "unet", LORA_FILE)] if saved else [init]
    paths += [path for path in (prompts, first_frames) if path.lower().endswith(".jsonl")]
    return [path for path in paths if path and Path(path).exists()]


OWN = {"dryrun.json", "results.json"}  # of runs and evaluations


def refuse_foreign(folder: Path) -> dict:
    """The content of config.json in this --output-dir, {} if there is none.

    Raises RunError if the folder holds files of a model, a checkpoint or a program, but no run. Others may be logs.
    """
    stored, suffixes = read_json(folder / "config.json"), FINGERPRINTED - {".txt"}
    names = [path.name for path in sorted(folder.glob("*")) if path.name not in OWN and "script" not in stored]
    foreign = [name for name in names if name == SUMS or Path(name).suffix in suffixes]
    require(not foreign, f"{folder} holds {', '.join(foreign[:3])}, not of a run or damaged; take another --output-dir")
    return stored


# ---------------------------------------------------------------------------------------------------------- verifying


def newest_whole_checkpoint(output_dir: Path, world: World, run: dict) -> Path | None:
    """The newest checkpoint whose files are as this run wrote them; says which newer ones are not. A collective.

    run: the content of config.json. None where a run ended before its first checkpoint: it starts again.
    """
    checkpoints = world.from_main(complete_checkpoints(output_dir))
    for checkpoint in reversed(checkpoints):
        fault = find_fault(checkpoint, world) or world.from_main(find_difference(checkpoint, run))
        if not fault:
            return checkpoint
        if world.is_main:
            print(f"{checkpoint} is skipped: {fault}", file=sys.stderr)
    require(not checkpoints, f"nothing to resume: {output_dir} has no whole checkpoint; take another --output-dir")
    return None


def find_fault(checkpoint: Path, world: World, part: str = "") -> str:
    """What is wrong with the files of a checkpoint, or with the file or folder in it that is called `part`; "" if they
    are as its SHA256SUMS says. A collective: the files are shared out over the processes.
    """
    sums = world.from_main(read_sums(checkpoint))
    names = [name for name in sums if not part or name == part or name.startswith(f"{part}/")]
    if not names:
        return f"its {SUMS} is missing or damaged"
    wrong = [name for name, sha256 in sha256_of(checkpoint, names, world).items() if sha256 != sums[name]]
    return f"its {wrong[0]} is missing or damaged" if wrong else ""


def require_whole(weights: Path, option: str, world: World) -> None:
    """Raise RunError if weights (a file or a folder) in a run's checkpoint are not as they were saved. A collective."""
    is_checked = world.from_main((weights.parent / SUMS).is_file())
    fault = find_fault(weights.parent, world, weights.name) if is_checked else ""
    require(not fault, f"{option} {weights.parent} is damaged: {fault}; take another checkpoint")


def read_sums(checkpoint: Path) -> dict[str, str]:
    """{name: sha256} of the files that a checkpoint's SHA256SUMS lists; {} if it is missing or damaged."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        return {name: sha256 for sha256, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return {}


def write_sums(checkpoint: Path, sums: dict[str, str]) -> None:
    """The SHA256SUMS of a checkpoint, {name: sha256}."""
    write_atomically(checkpoint / SUMS, "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()))


def find_difference(checkpoint: Path, run: dict) -> str:
    """Why a whole checkpoint is not one of `run` from which to go on; "" if it is."""
    if not any(name.startswith("state/") for name in read_sums(checkpoint)):
        return "it keeps no state to resume from; --keep-states says how many checkpoints do"
    stored = read_json(checkpoint / "state/config.json")
    own = run.keys() - FREE_ON_RESUME - {"directory", "processes", "files", "versions"}
    other = sorted(name for name in own if stored.get(name) != run[name])
    return f"it is of another run, whose {other[0]} is {stored.get(other[0])!r}" if other else ""


def sha256_of(folder: Path, names: list[str], world: World) -> dict[str, str]:
    """{name: sha256 of the file in hexadecimal, zeros if it cannot be read}. A collective."""
    digests = []
    for i in world.share(len(names)):
        try:
            with (folder / names[i]).open("rb") as file:
                digests.append(list(hashlib.file_digest(file, "sha256").digest()))
        except OSError:
            digests.append([0] * 32)
    world.barrier()  # some read much more than others
    digests = world.collect(torch.tensor(digests, dtype=torch.uint8).view(-1, 32), len(names))
    return {name: bytes(digest).hex() for name, digest in zip(names, digests.tolist(), strict=True)}


# ------------------------------------------------------------------------------------------------- saving, restoring


def name_of(iteration: int) -> str:
    """The folder of the checkpoint after so many iterations."""
    return f"checkpoint-{iteration:06d}"


def checkpoint_bytes(config, whole: int, trained: int, dtype: torch.dtype) -> tuple[int, int]:
    """Of a checkpoint's public weights, and of its state. whole, trained: elements of the network."""
    copies = 2 if config.ema_decay else 1
    public = trained * 4 if config.lora_rank else whole * dtype.itemsize
    return copies * public, (2 + copies) * trained * 4  # master weights, Adam's two moments, the average


def disk_needed(config, public: int, state: int, done: int = 0, states: int = 0) -> tuple[int, str]:
    """Bytes that a run will still save after `done` iterations, and a line with that and the free disk space.

    public, state: bytes of one checkpoint's; states: how many are there. An old one is deleted when a new one is whole.
    """
    count = -(-config.iterations // config.save_every) - done // config.save_every if done < config.iterations else 0
    states = max(0, min(config.keep_states + 1 - states, count))
    needed, free = count * public + states * state, shutil.disk_usage(config.output_dir).free
    what = f"checkpoints of the run: {count}, with state at most {states} of them, {needed / GIB:.3g} GiB"
    return needed, f"{what}; {config.output_dir} has {free / GIB:.3g} GiB of room"


class Checkpoints:
    """Saves and restores network, optimizer and EMA, whatever the number of processes.

    A checkpoint folder holds the weights in diffusers' public layout (`transformer/`, or
    `pytorch_lora_weights.safetensors`; the same with `_ema` beside it) and `state/`, sharded, for --resume, up to
    six times as large: only the newest `keep_states` checkpoints keep it. `state/` also holds the run's config.json and
    metrics.jsonl of that time; SHA256SUMS lists every file, but for the model card's, which may be edited: README.md,
    reward.png and samples.png.
    """

    def __init__(self, pipeline, component: str, optimizer, ema: EMA, world: World, keep_states: int = 2):
        self.pipeline, self.component, self.network = pipeline, component, getattr(pipeline, component)
        self.optimizer, self.ema, self.world, self.keep_states = optimizer, ema, world, keep_states
        self.is_lora = bool(getattr(self.network, "peft_config", None))
        self.group = {"process_group": world.patient, "no_dist": world.size == 1}

    def _state(self) -> dict:
        options = state_dict.StateDictOptions(ignore_frozen_params=True)
        return {
            "network": state_dict.get_model_state_dict(self.network, options=options),
            "optimizer": state_dict.get_optimizer_state_dict(self.network, self.optimizer, options=options),
            "ema": {str(i): average for i, average in enumerate(self.ema.average)},
        }

    def save(self, output_dir: str, iteration: int, add_card: Callable[[Path], None] = lambda folder: None) -> None:
        """Write output_dir/checkpoint-ITERATION; it appears under that name only when it is complete.

        add_card: writes the model card into the folder.
        Raises RunError, and writes nothing, if a weight is not finite.
        """
        final = Path(output_dir) / name_of(iteration)
        part, old = (final.with_name(final.name + suffix) for suffix in (".part", ".old"))
        if self.world.is_main:
            for path in (part, old):  # of a run that was killed while saving
                shutil.rmtree(path, ignore_errors=True)
        self.world.barrier()  # rank 0 may have drawn curves until now
        self.require_finite(iteration)
        with writing(final):
            writer = dcp.FileSystemWriter(part / "state", per_thread_copy_ahead=0)  # ahead it would fill pinned memory
            dcp.save(self._state(), storage_writer=writer, **self.group)
            self._save_public(part, "")
            if self.ema.average:
                self.world.barrier()  # rank 0 may write for long
                with self.ema.swapped_in():
                    self._save_public(part, "_ema")
            if self.world.is_main:
                for name in ("config.json", "metrics.jsonl"):
                    if (final.parent / name).is_file():
                        shutil.copy(final.parent / name, part / "state")
            self.world.barrier()
            names = [file.relative_to(part).as_posix() for file in sorted(part.rglob("*")) if file.is_file()]
            sums = sha256_of(part, self.world.from_main(names), self.world)
            lost = f"{part}: a process cannot read what another wrote; all machines must share the file system"
            require(bytes(32).hex() not in sums.values(), lost)
            if self.world.is_main:
                add_card(part)
                write_sums(part, sums)
                if final.exists():  # the run continued from an earlier one
                    final.rename(old)
                part.rename(final)
                shutil.rmtree(old, ignore_errors=True)
                self._delete_old_states(final)
            self.world.barrier()

    def check_room(self, config, done: int) -> None:
        """Warn if the disk has no room for what a run will still save. Raises RunError if not for one checkpoint."""
        whole, trained = (sum(p.numel() for p in ps) for ps in (self.network.parameters(), trainable(self.network)))
        public, state = checkpoint_bytes(config, whole, trained, self.world.dtype)
        states = len([*Path(config.output_dir).glob("checkpoint-*/state")])
        needed, line = disk_needed(config, public, state, done, states)
        free = shutil.disk_usage(config.output_dir).free
        fine = not needed or public + state <= free
        require(fine, f"a checkpoint takes {(public + state) / GIB:.3g} GiB, too much: {line}; make room")
        if needed > free:
            print(f"warning: {line}; make room, raise --save-every or lower --keep-states", file=sys.stderr)

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
            kept = {name: sha256 for name, sha256 in read_sums(checkpoint).items() if not name.startswith("state/")}
            if kept:  # first: a state that is not listed counts as none, however much of it is left
                write_sums(checkpoint, kept)
            shutil.rmtree(checkpoint / "state", ignore_errors=True)

    def _public_weights(self) -> dict[str, Tensor]:
        """The trained weights by the network's own names, whole and in host memory on rank 0; {} elsewhere."""
        options = state_dict.StateDictOptions(ignore_frozen_params=self.is_lora)
        weights = {}
        for name, weight in state_dict.get_model_state_dict(self.network, options=options).items():
            weight = weight if self.is_lora else weight.to(self.world.dtype)  # before it is gathered
            weight = weight.full_tensor() if isinstance(weight, torch.distributed.tensor.DTensor) else weight
            # Gathered, it may be a view of a larger, padded buffer, which safetensors refuses.
            weights |= {name: weight.cpu().clone()} if self.world.is_main else {}
        return weights

    def _save_public(self, folder: Path, suffix: str) -> None:
        from huggingface_hub import save_torch_state_dict

        weights = self._public_weights()
        if not self.world.is_main:
            return
        if self.is_lora:
            layers, metadata = public_lora(self.network, weights)
            named = {f"{self.component}_lora_layers": layers, f"{self.component}_lora_adapter_metadata": metadata}
            self.pipeline.save_lora_weights(folder, weight_name=f"pytorch_lora_weights{suffix}.safetensors", **named)
            return
        target = folder / f"{self.component}{suffix}"
        target.mkdir(parents=True)
        save_torch_state_dict(weights, target, filename_pattern="diffusion_pytorch_model{suffix}.safetensors")
        self.network.save_config(target)

    def restore(self, checkpoint: Path) -> int:
        """Load a whole checkpoint into network, optimizer and EMA, in place. Returns the iterations done."""
        state = self._state()
        dcp.load(state, checkpoint_id=checkpoint / "state", **self.group)
        options = state_dict.StateDictOptions(strict=False)
        state_dict.set_model_state_dict(self.network, state["network"], options=options)
        state_dict.set_optimizer_state_dict(self.network, self.optimizer, state["optimizer"])
        return int(checkpoint.name.split("-")[1])
