"""The models that an evaluation compares: what is at --model, --transformer and --checkpoint, and its pipeline."""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rewards import FILE_ERRORS, first_line, split_paths
from runtime import files, loading, processes
from runtime.lora import LORA_FILE, read_lora, shapes_in
from runtime.options import Lazy, RunError, require

diffusers = Lazy("diffusers")

# Class in model_index.json → usual settings; shift 0: the scheduler's own; max_sequence_length 0: the pipeline's.
USUAL = {"shift": 0.0, "max_sequence_length": 0, "frames": 1, "fps": 24.0}
FAMILIES = {
    "StableDiffusionPipeline": USUAL | dict(steps=50, guidance=7.5, height=512, width=512),
    "FluxPipeline": USUAL | dict(steps=28, guidance=3.5, height=1024, width=1024),
    "HunyuanVideoPipeline": USUAL | dict(steps=50, guidance=6.0, height=720, width=1280, frames=129),
    "HunyuanSkyreelsImageToVideoPipeline": USUAL | dict(steps=50, guidance=6.0, height=544, width=960, frames=97),
    "WanPipeline": USUAL | dict(steps=50, guidance=5.0, height=480, width=832, frames=81, fps=16.0),
}


@dataclass(frozen=True)
class Model:
    """One column of the report: the base model, or the base model with other weights."""

    name: str
    kind: str  # base, pipeline, network or lora
    weights: str  # path or hub id
    output_dir: str

    @property
    def folder(self) -> Path:
        """Where its pictures and their scores are: a folder for these weights alone, whatever else is compared."""
        where = str(Path(self.weights).resolve()) if Path(self.weights).exists() else self.weights
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.name)
        return Path(self.output_dir, f"{name}-{zlib.crc32(where.encode()):08x}")


def run_options(checkpoint: str) -> dict:
    """config.json of the training run in whose folder a checkpoint is, or {}; reward_paths as {name: path}.

    Models, rewards and prompts are found from the directory where the run was started, too. Raises RunError.
    """
    require(Path(checkpoint).exists(), f"--checkpoint: there is no {checkpoint}; give RUN/checkpoint-NNNNNN")
    for file in [folder / "config.json" for folder in list(Path(checkpoint).parents)[:3]]:
        stored = files.read_json(file)
        require(bool(stored) or not file.is_file(), f"{file} is damaged, it is not JSON; restore it")
        if {"model", "reward", "prompts", "reward_paths", "directory"} <= stored.keys():
            find, paths = partial(from_directory, stored["directory"]), split_paths(stored["reward_paths"])
            paths.pop("geneval", None)  # an evaluation has --detector
            stored |= {name: find(stored[name]) for name in {"model", "transformer", "prompts"} & stored.keys()}
            stored["reward"] = re.sub(r"[^,]+\.py(?=:)", lambda file, find=find: find(file[0]), stored["reward"])
            return stored | {"reward_paths": {name: find(path) for name, path in paths.items()}}
    return {}


def from_directory(directory: str, path: str) -> str:
    """The path, or, if it exists only relative to the directory, its place there."""
    place = Path(directory, path)
    return str(place) if path and place.exists() and not Path(path).exists() else path


def find_settings(cfg, family: str, runs: list[dict]):
    """Steps, sizes, prompts, …: as on the command line, else as in the checkpoints' runs, else the usual ones."""
    settings, names = {}, ["guidance", "true_guidance"]  # embedded, classifier-free
    guided, other = names[::-1] if "Wan" in family or "ImageToVideo" in family else names
    for name, value in FAMILIES[family].items():
        key = guided if name == "guidance" else name
        settings[name] = getattr(cfg, name) or agreed(name, [run[key] for run in runs if key in run], value)
    for value in (run.get(other, 1.0) for run in runs):
        require(value == 1, f"a --checkpoint was trained with {other} {value}, which eval.py cannot give a {family}")
    files = [run["prompts"] for run in runs if Path(run["prompts"]).expanduser().is_file()]
    usual = "hpsv2" if settings["frames"] == 1 else ""  # HPS-v2's prompts are for pictures
    return replace(cfg, **settings, prompts=cfg.prompts or agreed("prompts", files, usual))


def agreed(name: str, values: Sequence, default=None):
    """The value that all of the checkpoints' runs have, or the default. Raises RunError if they differ."""
    given, option = sorted(set(values)), f"--{name.replace('_', '-')}"
    require(len(given) < 2, f"the checkpoints' runs differ in {name}: {', '.join(map(str, given))}; give {option}")
    return given[0] if given else default


def find_weights(checkpoint: str, family: str, component: str, base: str, original: dict) -> tuple[str, str]:
    """The kind of a --checkpoint, "pipeline", "network" or "lora", and the path of its weights.

    family: the base's pipeline class; component: the network in it that is trained; original: that network's config.
    Raises RunError if there are no weights, or if they do not fit the base.
    """
    path, network_class = Path(checkpoint), original["_class_name"]
    if (path / "model_index.json").is_file():
        found = loading.pipeline_index(checkpoint, "--checkpoint")["_class_name"]
        require(found == family, f"--checkpoint {checkpoint} is a {found}, but the base {base} is a {family}")
        return "pipeline", checkpoint
    for folder in (path / component, path):
        own = files.read_json(folder / "config.json")
        if found := own.get("_class_name"):
            require(found == network_class, f"--checkpoint {folder} is a {found}, but {base} has a {network_class}")
            other = [key for key, value in original.items() if key[0] != "_" and own.get(key, value) != value]
            differs = f"--checkpoint {folder} was not trained from {base}: its config differs in {', '.join(other)}"
            require(not other, f"{differs}; name the right --model")
            return "network", str(folder)
    lora = path if path.suffix == ".safetensors" else path / LORA_FILE
    if lora.is_file():
        try:
            names = list(shapes_in(lora)) or ["no weights"]
        except FILE_ERRORS as e:
            raise RunError(f"--checkpoint: cannot read {lora}: {first_line(e)}; take another") from e
        fits = all(name.startswith(f"{component}.") for name in names)
        require(fits, f"--checkpoint {lora} is no LoRA of {base}'s {component}: it holds {names[0]}")
        return "lora", str(lora)
    known = f"a {component} folder with a whole config.json, nor {LORA_FILE}, nor model_index.json"
    raise RunError(f"--checkpoint {checkpoint} has neither {known}; {base}, a {family}, needs one of these")


def load_pipeline(model: Model, family: str, base: str, network: str, world: processes.World):
    """The stock pipeline of class `family` with the model's weights, on the world's device, or offloaded by layers.

    base: the pipeline without them, hub id or folder; network: where the base's transformer is, if it is not in there.
    """
    component, networks = "unet" if family == "StableDiffusionPipeline" else "transformer", {}
    source = model.weights if model.kind == "pipeline" else base
    network = {"pipeline": "", "network": model.weights}.get(model.kind, network)
    if network:
        network_class = getattr(diffusers, loading.load_config(network)["_class_name"])
        place = loading.find_folder(network, "--transformer", pipeline=False)
        networks[component] = loading.load_weights(network_class, place, dtype=world.dtype)
    pipe = loading.load_pipeline(getattr(diffusers, family), source, world, **networks)
    if model.kind == "lora":
        loading.load_pretrained(lambda file: pipe.load_lora_weights(read_lora(file)), model.weights, "--checkpoint")
    if not world.offload or world.device.type == "cpu":
        return pipe.to(world.device)
    pipe.enable_sequential_cpu_offload(device=world.device)
    return pipe
