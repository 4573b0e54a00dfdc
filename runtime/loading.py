"""Models from folders or the hub: configs, tokenizers, networks, LoRA, --init.

A hub id becomes a folder of the hub's cache, by `find_folder`; everything after that sees folders only.
"""

import contextlib
import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rewards import (
    FILE_ERRORS,
    VOCABULARY,
    RewardError,
    fetch_rewards,
    fetched_folder,
    first_line,
    hub_folder,
    is_folder_or_hub_id,
    load_tokenizer,
    parse_paths,
)

from .files import read_json
from .lora import LORA_FILE, load_adapter, shapes_in
from .options import Lazy, RunError, complete_checkpoints, require
from .processes import World, shard, trainable
from .quantize import quantize

diffusers, state_dict = Lazy("diffusers"), Lazy("torch.distributed.checkpoint.state_dict")

SAFETY = "safety_checker"  # Stable Diffusion's blackens pictures; trainers and evaluations do without


# ------------------------------------------------------------------------------------------------ folders and configs


def check_path(option: str, path: str) -> None:
    """Raise RunError unless `path` is a folder here, or looks like a hub id."""
    single = Path(path).suffix in (".safetensors", ".ckpt") and Path(path).is_file()
    convert = f'StableDiffusionPipeline.from_single_file("{path}").save_pretrained("FOLDER")'
    require(
        not single, f"{option} {path} is a single file; make a folder of it: diffusers.{convert}, or with its class"
    )
    advice = "give a local folder or a hub id (OWNER/NAME or OWNER/NAME@REVISION)"
    require(is_folder_or_hub_id(path), f"{option}: no folder {path!r}; {advice}")


def find_folder(
    path: str, option: str = "--model", pipeline: bool = True, weights: bool = True, but: Sequence[str] = ()
) -> Path:
    """The folder of a pipeline, or of a network by itself; what the hub's cache lacks of it is fetched.

    Without weights only configs and tokenizers are fetched, which is what checking needs. but: components that are not
    needed. Raises RunError.
    """
    check_path(option, path)
    try:
        parts, index = [""], "model_index.json"
        if pipeline and not Path(path).is_dir():
            names = component_names(Path(hub_folder(path, [index], weights=False), index), option)
            parts = [name for name in names if name not in (SAFETY, *but)]
        return Path(fetched_folder(path, partial(choose_files, parts=parts, weights=weights)))
    except RewardError as e:
        raise RunError(f"{option}: {e}") from e


# Names of weights, the best first: safetensors before pickles, a copy in half precision only where nothing else is.
WEIGHTS = [
    re.compile(rf"(diffusion_)?(pytorch_)?model{half}(-\d+-of-\d+)?{half}\.{suffix}")
    for half in ("", r"(\.fp16|\.bf16)?")
    for suffix in ("safetensors", "bin")
]


def choose_files(files: Iterable[str], parts: Sequence[str], weights: bool = True) -> tuple[list[str], str]:
    """Those of a repository's files that a model needs, one copy of the weights, and what is lacking, "" if nothing.

    parts: folders that hold a network or a tokenizer each, "" for the root.
    """
    wanted, lacking = [], ""
    for part in parts:
        here = [name for folder, _, name in (file.rpartition("/") for file in files) if folder == part]
        small = [name for name in here if name.endswith((".json", ".txt", ".model"))]
        copies = ([name for name in here if kind.fullmatch(name)] for kind in WEIGHTS if weights)
        shards = next(filter(None, copies), [])
        wanted += [f"{part}/{name}".lstrip("/") for name in small + shards]
        count = int(re.search(r"-of-(\d+)|$", shards[0])[1] or 1) if shards else 1
        if not small:
            lacking = lacking or part or "config.json"
        elif "tokenizer_config.json" in small and not set(VOCABULARY.split("|")) & set(small):
            lacking = lacking or f"{part}/tokenizer.json".lstrip("/")
        elif weights and "config.json" in small and len(shards) < count:
            lacking = lacking or f"weights in {part or 'its root'}"
    return wanted, lacking


def component_names(index: Path, option: str) -> dict[str, tuple[str, str]]:
    """{name: (library, class)} of the components that a model_index.json names."""
    content = read_json(index)
    require("_class_name" in content, f"{option}: {index} is damaged or missing; give a complete folder of diffusers")
    entries = {name: entry for name, entry in content.items() if isinstance(entry, list) and len(entry) == 2}
    return {name: (library, kind) for name, (library, kind) in entries.items() if library}


def fetch_all(cfg) -> None:
    """Fetch the weights that a run's options name from the hub, where the cache lacks them.

    Before the process group exists: the processes of a machine wait for the first one for as long as it takes.
    """
    fetch_model(cfg.model, getattr(cfg, "transformer", ""))
    if painter := getattr(cfg, "first_frame_model", ""):
        find_folder(painter, "--first-frame-model")
    fetch_rewards(cfg.reward, parse_paths(cfg.reward_paths))


def fetch_model(model: str, transformer: str = "") -> None:
    """Fetch the weights of a pipeline; with `transformer`, which lies elsewhere, without the pipeline's own."""
    find_folder(model, but=["transformer"] if transformer else [])
    if transformer:
        find_folder(transformer, "--transformer", pipeline=False)


def load_pretrained(loader: Callable, folder: Path | str, option: str = "--model", **options):
    """Call a `from_pretrained` or `load_config` of a folder; files that are missing or damaged become one line."""
    try:
        return loader(folder, **options)
    except FILE_ERRORS as e:
        part = f"/{options['subfolder']}" if options.get("subfolder") else ""
        raise RunError(
            f"cannot load {folder}{part}: {first_line(e)}; give {option} a complete folder in diffusers' layout"
        ) from e


def load_config(path: str, subfolder: str | None = None, option: str = "--model") -> dict:
    """The configuration of a network of diffusers, completed by its class's defaults: files may be older than a key.

    subfolder: the component of a pipeline, None for a network by itself. Raises RunError.
    """
    folder = find_folder(path, option, pipeline=subfolder is not None, weights=False)
    config = load_pretrained(diffusers.AutoencoderKL.load_config, folder, option, subfolder=subfolder)
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    is_network = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    require(is_network, f"{option} {path}: the config of its {subfolder or 'network'} is damaged, or not of diffusers")
    return default_config(kind) | config


def default_config(network_class: type) -> dict:
    """A class's defaults, without those of arguments that have none."""
    parameters = inspect.signature(network_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def check_family(path: str, *expected: str) -> str:
    """The class of the pipeline at `path`. Raises RunError if it is not an expected one, or lacks a tokenizer."""
    index = pipeline_index(path)
    found = index["_class_name"]
    require(found in expected, f"--model {path} is a {found}; this script trains a {' or a '.join(expected)}")
    other = index.get("boundary_ratio") is not None or index.get("expand_timesteps")
    require(not other, f"--model {path} is a Wan 2.2; this script trains Wan 2.1")
    return found


def pipeline_index(path: str, option: str = "--model") -> dict:
    """model_index.json of a pipeline. Raises RunError if it is damaged, or lacks a component's config or tokenizer."""
    folder = find_folder(path, option, weights=False)
    index = load_pretrained(diffusers.DiffusionPipeline.load_config, folder, option)
    require("_class_name" in index, f"{folder} has no whole model_index.json; give {option} a complete folder")
    for name, (_, kind) in component_names(folder / "model_index.json", option).items():
        here = folder / name
        require(has_config(here), f"{here} has no config, or a damaged one; give {option} a whole folder")
        if name.startswith("tokenizer"):
            require(here.is_dir(), f"{option} {path} has no folder {name}; complete it")
            try:
                load_tokenizer(here, kind)
            except FILE_ERRORS as e:
                raise RunError(f"{option} {path}: its {name} cannot be used: {first_line(e)}") from e
    return index


def has_config(folder: Path) -> bool:
    """Whether a component's folder, if it is here, says what it holds. transformers takes its defaults where one does
    not: a Llama of 7 billion parameters."""
    contents = [read_json(file) for file in folder.glob("*config.json")]
    return not folder.is_dir() or (bool(contents) and all(contents))


# ------------------------------------------------------------------------------------------------------------- loading


def load_weights(network_class: type, folder: Path | str, option: str = "--model", **options) -> nn.Module:
    """`from_pretrained` of a network of diffusers or transformers. Raises RunError if its files lack a weight.

    Both libraries would go on without: with an empty or a random one. Where a folder has only a copy in half precision,
    it is loaded, into the type that is asked for.
    """
    place = Path(folder, options.get("subfolder") or "")
    half = re.search(r"\.(fp16|bf16)\b", " ".join(file.name for file in weight_files(place)))
    variant = {"variant": half[1]} if half else {}
    load = network_class.from_pretrained
    network, info = load_pretrained(load, folder, option, output_loading_info=True, **variant, **options)
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    require(
        not lacking,
        f"{place} does not fit its config: {len(lacking)} weights missing, or of another shape, first: "
        f"{(lacking or [''])[0]}; give {option} a complete folder",
    )
    return network


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a network's folder that `from_pretrained` is to read; [] if there are none."""
    wanted, _ = choose_files(sorted(file.name for file in folder.glob("*")), [""])
    return [folder / name for name in wanted if name.endswith((".safetensors", ".bin"))]


def load_components(folder: Path, dtype: torch.dtype, but: Iterable[str] = (), option: str = "--model") -> dict:
    """The networks and tokenizers that a pipeline's model_index.json names, by name, without those in `but`."""
    parts = {}
    for name, (library, class_name) in component_names(folder / "model_index.json", option).items():
        if name in but or library not in ("diffusers", "transformers"):
            continue
        kind = getattr(importlib.import_module(library), class_name, object)
        if name.startswith("tokenizer"):
            parts[name] = load_tokenizer(folder / name, class_name)
        elif issubclass(kind, nn.Module):
            parts[name] = load_weights(kind, folder, option, subfolder=name, dtype=dtype)
    return parts


def load_network(
    network_class: type,
    path: str,
    world: World,
    lora_rank: int = 0,
    lora_targets: Sequence[str] = (),
    checkpointing: bool = False,
    compiled: bool = False,
    frozen: bool = False,
    quantized: str = "",
    *,
    subfolder: str | None = None,
    option: str = "--model",
    init: Path | None = None,
) -> nn.Module:
    """Load a diffusers network, ready to train, or frozen. init: weights to start from instead, see `find_init`.

    Only rank 0 reads the weights, and broadcasts them: host memory holds one copy, whatever the number of processes.
    Raises RunError if weights are missing.
    """
    folder, options = find_folder(path, option, subfolder is not None), {"subfolder": subfolder} if subfolder else {}
    prepare = (lora_rank, lora_targets, checkpointing, compiled, frozen, quantized)
    dtype = world.dtype if frozen or lora_rank else torch.float32  # master weights
    if world.is_main:
        whole = init and not lora_rank
        place = (network_class, init, "--init") if whole else (network_class, folder, option)
        source = load_weights(*place, dtype=dtype, **({} if whole else options))
        for parameter in source.parameters():  # Wan's norms would stay in float32, and FSDP wants one type
            parameter.data = parameter.data.to(dtype)
        prepare_network(source, *prepare)
        if init and lora_rank:
            load_adapter(source, init)
    if world.size == 1:
        return source.to(world.device)
    config = load_pretrained(network_class.load_config, folder, option, **options)
    network = shard(empty_network(network_class, config, dtype, *prepare), world).to_empty(device=world.device)
    world.barrier()  # rank 0 may read for long
    buffers = dict(source.named_buffers()) if world.is_main else {}
    for name, buffer in network.named_buffers():  # not all of them are in the state dict
        if world.is_main:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    weights = source.state_dict() if world.is_main else {}
    options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state_dict.set_model_state_dict(network, weights, options=options)
    return network


def load_pipeline(pipeline_class: type, path: str, world: World, **components):
    """Load a diffusers pipeline around the given components. All others are frozen, in the compute dtype.

    Raises RunError if weights are missing.
    """
    folder = find_folder(path, but=components)
    absent = {name: None if isinstance(value, nn.Module) else value for name, value in components.items()}
    with world.in_turn():
        parts = load_components(folder, world.dtype, components) | absent
        pipe = load_pretrained(pipeline_class.from_pretrained, folder, dtype=world.dtype, **parts)
        world.freeze(*(part for part in pipe.components.values() if isinstance(part, nn.Module)))
    pipe.register_modules(**{name: value for name, value in components.items() if isinstance(value, nn.Module)})
    pipe.set_progress_bar_config(disable=True)
    say_once_what_is_cut_off(pipe)
    return pipe


def say_once_what_is_cut_off(pipe) -> None:
    """A diffusers pipeline warns of every prompt that is too long for an encoder. From now on the first one stands for
    all, by encoder; there may be thousands, and nothing is wrong with them.
    """
    logging.getLogger(type(pipe).__module__).addFilter(is_new_warning)


def is_new_warning(record: logging.LogRecord) -> bool:
    kind, _, prompt = str(record.msg).partition(":")
    if not kind.startswith("The following part of your input was truncated"):
        return True
    record.msg = f"{kind}:{prompt[:60]}… Further prompts that are cut off are not reported."
    is_new = kind not in CUT_OFF
    CUT_OFF.add(kind)
    return is_new


CUT_OFF: set[str] = set()  # the kinds of these warnings that this process has given


def empty_network(network_class: type, config: dict, dtype: torch.dtype, *prepare) -> nn.Module:
    """A network on the meta device, without weights. `dtype` of the master weights, arguments of `prepare_network`."""
    with torch.device("meta"):
        network = network_class.from_config(config)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        return prepare_network(network, *prepare)


def prepare_network(
    network: nn.Module,
    lora_rank: int = 0,
    lora_targets: Sequence[str] = (),
    checkpointing: bool = False,
    compiled: bool = False,
    frozen: bool = False,
    quantized: str = "",
) -> nn.Module:
    """Make a diffusers network ready to train, in place: LoRA, --quantize, gradient checkpointing, compilation.

    Master weights of what is trained are float32. The rest is kept in the compute dtype: with LoRA (alpha = 2 rank, as
    in the release) the network itself, or all of it if it is frozen.
    """
    network.requires_grad_(not frozen and not lora_rank)
    if lora_rank:
        from peft import LoraConfig

        torch.manual_seed(0)  # LoRA's own initialisation is the one draw that a library makes from the global state
        network.add_adapter(
            LoraConfig(
                r=lora_rank, lora_alpha=2 * lora_rank, init_lora_weights="gaussian", target_modules=list(lora_targets)
            )
        )
        for parameter in trainable(network):
            parameter.data = parameter.data.float()
    if quantized:
        quantize(network, quantized)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if compiled:
        # A graph each for batch sizes, gradients or none, mask or none, strides: after 8 torch would give up and say so
        # at most in its log.
        torch._dynamo.config.recompile_limit = 64
        network.compile_repeated_blocks()
    return network.eval()  # never train(): a dropout layer would make replay differ from rollout


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


# ------------------------------------------------------------------------------------------------------------- --init


def find_init(init: str) -> Path:
    """The weights that --init names: a network's folder or a LoRA file, itself or in a checkpoint or a pipeline.

    Raises RunError if there are none.
    """
    path = Path(init)
    require(path.exists(), f"--init: there is no {init}; give RUN/checkpoint-NNNNNN, a diffusers folder or a LoRA file")
    for place in (path / "transformer", path / "unet", path / LORA_FILE, path):
        if place.is_file() if place.suffix == ".safetensors" else "_class_name" in read_json(place / "config.json"):
            return place
    raise RunError(f"--init: {init} is no checkpoint, diffusers folder or LoRA file; give RUN/checkpoint-NNNNNN")


def check_init(config, network_class: type, component: str, lora_targets: Sequence[str], source: dict | None = None):
    """Raise RunError unless the weights that --init names are those of the trained network, or a LoRA of it that
    --lora-rank describes. Loads no weights. A run that continues from a checkpoint of its own needs them no more.

    component: the network's name in the pipeline; source: where it lies, if not there in --model.
    """
    init, lora_rank = config.init, config.lora_rank
    if not init or (config.resume and complete_checkpoints(config.output_dir)):
        return
    place = find_init(init)
    found = {name: shape for name, shape in stored_shapes(place).items() if not name.endswith(".alpha")}
    if place.is_file():
        if not any("lora" in name for name in found):
            check_path("--init", str(place))
        rank = max((shape[0] for name, shape in found.items() if ".lora_A." in name), default=0)
        message = f"--init {init} is a LoRA of rank {rank}, and --lora-rank is {lora_rank}; give --lora-rank {rank}"
        require(rank == lora_rank or not rank, message)
    elif lora_rank:
        advice = "give --lora-rank 0, or a checkpoint that holds a LoRA"
        raise RunError(f"--init {init} holds all weights, and --lora-rank {lora_rank} trains a LoRA; {advice}")
    source = source or {"path": config.model, "subfolder": component}
    network = empty_network(network_class, load_config(**source), torch.float32, lora_rank, lora_targets)
    expected = {name: list(weight.shape) for name, weight in public_weights(network, component).items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    place = f"{source.get('option', '--model')} {source['path']}"
    require(
        not wrong,
        f"--init {init} does not fit {place}: {len(wrong)} weights have other names or shapes than in that "
        f"{network_class.__name__}, first: {(wrong or [''])[0]}; give a checkpoint of this model, a LoRA by diffusers' "
        "names (pipe.load_lora_weights, then pipe.save_lora_weights, translates others)",
    )


def public_weights(network: nn.Module, component: str) -> dict[str, Tensor]:
    """The weights of a network by their names in a checkpoint: all of them, or those of its LoRA."""
    from peft import get_peft_model_state_dict

    if not getattr(network, "peft_config", None):
        return network.state_dict()
    return {f"{component}.{name}": weight for name, weight in get_peft_model_state_dict(network).items()}


def stored_shapes(place: Path) -> dict[str, list[int]]:
    """{name: shape} of the weights in a file, or of a network in a folder; their content is not read.

    Raises RunError if one cannot be read.
    """
    shapes = {}
    for file in [place] if place.is_file() else weight_files(place):
        try:
            shapes |= shapes_in(file)
        except FILE_ERRORS as e:
            raise RunError(f"--init: cannot read {file} ({first_line(e)}); take another checkpoint") from e
    return shapes
