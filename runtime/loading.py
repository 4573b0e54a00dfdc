"""Models from folders or the hub: configs, tokenizers, networks, LoRA.

A hub id becomes a folder of the hub's cache, by `find_folder`; everything after that sees folders only.
"""

import importlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import rewards

from .files import read_json
from .lora import load_adapter
from .options import Lazy, RunError, find_place, require
from .processes import World, shard, trainable
from .quantize import quantize

diffusers, state_dict = Lazy("diffusers"), Lazy("torch.distributed.checkpoint.state_dict")

SAFETY = "safety_checker"  # Stable Diffusion's blackens pictures; trainers and evaluations do without


# ------------------------------------------------------------------------------------------------ folders and configs


def check_path(option: str, path: str) -> None:
    """Raise RunError unless `path` is a folder here, or looks like a hub id."""
    advice = "give a local folder or a hub id (OWNER/NAME or OWNER/NAME@REVISION); of a single file diffusers makes a "
    advice += "folder: PIPELINE.from_single_file(FILE).save_pretrained(FOLDER)"
    require(rewards.is_folder_or_hub_id(path), f"{option}: no folder {path!r}; {advice}")


def find_folder(
    path: str, option: str = "--model", pipeline: bool = True, weights: bool = True, but: Sequence[str] = ()
) -> Path:
    """The folder of a pipeline, or of a network by itself; what the hub's cache lacks of it is fetched.

    Without weights only configs and tokenizers are fetched, which is what checking needs. but: components that are not
    needed. Raises RunError.
    """
    check_path(option, path)
    try:
        parts, index = [""], ""
        if pipeline and not Path(path).is_dir():
            index = "model_index.json"
            here = rewards.fetched_folder(path, partial(choose_files, parts=[], index=index))
            names = component_names(Path(here, index), option)
            parts = [name for name in names if name not in (SAFETY, *but)]
        return Path(rewards.fetched_folder(path, partial(choose_files, parts=parts, weights=weights, index=index)))
    except rewards.RewardError as e:
        raise RunError(f"{option}: {e}") from e


# Names of weights, the best first: safetensors before pickles, a copy in half precision only where nothing else is.
WEIGHTS = [
    re.compile(rf"(diffusion_)?(pytorch_)?model{half}(-\d+-of-\d+)?{half}\.{suffix}")
    for half in ("", r"(\.fp16|\.bf16)?")
    for suffix in ("safetensors", "bin")
]


def choose_files(files: Iterable[str], parts: Sequence[str], weights=True, index="") -> tuple[list[str], str]:
    """Those of a repository's files that a model needs, one copy of the weights, and what is lacking, "" if nothing.

    parts: folders that hold a network or a tokenizer each, "" for the root; index: a file that is needed beside them.
    """
    wanted, lacking = [index] * bool(index), "" if index in ("", *files) else index
    for part in parts:
        here = [name for folder, _, name in (file.rpartition("/") for file in files) if folder == part]
        small = [name for name in here if name.endswith((".json", ".jinja", ".txt", ".model"))]
        copies = ([name for name in here if kind.fullmatch(name)] for kind in WEIGHTS if weights)
        shards = next(filter(None, copies), [])
        wanted += [f"{part}/{name}".lstrip("/") for name in small + shards]
        count = int(re.search(r"-of-(\d+)|$", shards[0])[1] or 1) if shards else 1
        is_network = not part or any(name.endswith(".index.json") for name in small)
        is_tokenizer = part.startswith("tokenizer") or "tokenizer_config.json" in small
        if not small or (is_network and "config.json" not in small):
            lacking = lacking or f"{part}/config.json".lstrip("/")
        elif is_tokenizer and "tokenizer_config.json" not in small:
            lacking = lacking or f"{part}/tokenizer_config.json"
        elif is_tokenizer and not any(names <= set(small) for names in rewards.VOCABULARIES):
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


def fetch_model(model: str, transformer: str = "") -> None:
    """Fetch the weights of a pipeline; with `transformer`, which lies elsewhere, without the pipeline's own."""
    find_folder(model, but=["transformer"] if transformer else [])
    if transformer:
        find_folder(transformer, "--transformer", pipeline=False)


def load_pretrained(loader: Callable, folder: Path | str, option: str = "--model", **options):
    """Call a `from_pretrained` or `load_config` of a folder; files that are missing or damaged become one line."""
    try:
        return loader(folder, **options)
    except rewards.FILE_ERRORS as e:
        place = f"{folder}/{options.get('subfolder') or ''}".rstrip("/")
        reason = rewards.first_line(e)
        raise RunError(f"cannot load {place}: {reason}; give {option} a complete folder in diffusers' layout") from e


def load_config(path: str, subfolder: str | None = None, option: str = "--model") -> dict:
    """The configuration of a network of diffusers, completed by its class's defaults: files may be older than a key.

    subfolder: the component of a pipeline, None for a network by itself. Raises RunError.
    """
    folder = find_folder(path, option, pipeline=subfolder is not None, weights=False)
    config = load_pretrained(diffusers.AutoencoderKL.load_config, folder, option, subfolder=subfolder)
    kind = getattr(diffusers, str(config.get("_class_name")), object)
    what = f"{option} {path}: the config of its {subfolder or 'network'}"
    require(issubclass(kind, diffusers.ModelMixin), f"{what} is damaged, or not of diffusers")
    refuse_quantized(path, option, [config])
    return default_config(kind) | config


def refuse_quantized(what: Path | str, option: str, configs: Sequence[dict]) -> None:
    advice = f"give {option} the model in full precision, and --quantize if it is too large"
    require(not any("quantization_config" in config for config in configs), f"{what} is quantized already; {advice}")


def default_config(network_class: type) -> dict:
    """A class's defaults, as JSON stores them: lists for tuples. Arguments without a default are left out."""
    parameters = inspect.signature(network_class.__init__).parameters.values()
    return json.loads(json.dumps({p.name: p.default for p in parameters if p.default is not p.empty}))


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
    for name, (_, kind) in component_names(folder / "model_index.json", option).items():
        # Where there is no config transformers takes its defaults: a Llama of 7 billion parameters.
        here, configs = folder / name, [read_json(file) for file in folder.glob(f"{name}/*config.json")]
        whole = not here.is_dir() or (bool(configs) and all(configs))
        require(whole, f"{here} has no config, or a damaged one; give {option} a whole folder")
        refuse_quantized(here, option, configs)
        if name.startswith("tokenizer"):
            try:
                rewards.load_tokenizer(here, kind)
            except rewards.FILE_ERRORS as e:
                raise RunError(f"{option} {path}: its {name} cannot be used: {rewards.first_line(e)}") from e
    return index


# ------------------------------------------------------------------------------------------------------------- loading


def load_weights(network_class: type, folder: Path | str, option: str = "--model", **options) -> nn.Module:
    """`from_pretrained` of a network of diffusers or transformers. Raises RunError if its files lack a weight.

    Both libraries would go on without: with an empty or a random one. Where a folder has only a copy in half precision,
    it is loaded, into the type that is asked for.
    """
    place = Path(folder, options.get("subfolder") or "")
    half = re.search(r"\.(fp16|bf16)\b", " ".join(file.name for file in weight_files(place)))
    variant = {"variant": half[1]} if half else {}
    if half and find_place().rank == 0:
        print(f"{place}: the only weights here are {half[1]}; the run takes these rounded ones; `hf download` gets all")
    load = network_class.from_pretrained
    network, info = load_pretrained(load, folder, option, output_loading_info=True, **variant, **options)
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    first = f"{len(lacking)} weights missing, or of another shape, first: {(lacking or [''])[0]}"
    require(not lacking, f"{place} does not fit its config: {first}; give {option} a complete folder")
    return network


def weight_files(folder: Path) -> list[Path]:
    """The files of weights in a network's folder that `from_pretrained` is to read; [] if there are none."""
    wanted, _ = choose_files(sorted(file.name for file in folder.glob("*")), [""])
    return [folder / name for name in wanted if name.endswith((".safetensors", ".bin"))]


def load_components(folder: Path, dtype: torch.dtype, but: Iterable[str] = (), option: str = "--model") -> dict:
    """The parts that a pipeline's model_index.json names, by name, without those in `but`, and no safety checker."""
    parts, names = {}, component_names(folder / "model_index.json", option)
    for name, (library, class_name) in names.items():
        if name in (SAFETY, *but) or library not in ("diffusers", "transformers"):
            continue
        kind = getattr(importlib.import_module(library), class_name, object)
        if name.startswith("tokenizer"):
            parts[name] = rewards.load_tokenizer(folder / name, class_name)
        elif issubclass(kind, nn.Module):
            parts[name] = load_weights(kind, folder, option, subfolder=name, dtype=dtype)
    return parts | ({SAFETY: None, "requires_safety_checker": False} if SAFETY in names else {})


def load_models(
    pipeline_class: type, network_class: type, config, world: World, init: Path | None, lora_targets: Sequence[str],
    **source,
) -> tuple:  # fmt: skip
    """→ a run's pipeline, its network that is trained, and the KL term's reference policy: the weights of --model.

    source: where the network lies, see `load_network`. With LoRA the reference is the network without the adapter.
    """
    prepare = {"lora_rank": config.lora_rank, "lora_targets": lora_targets, "quantized": config.quantize}
    prepare |= {"checkpointing": config.gradient_checkpointing, "compiled": config.compile, "seed": config.seed}
    network = reference = load_network(network_class, world=world, init=init, **source, **prepare)
    if config.kl_weight and not config.lora_rank:
        reference = load_network(network_class, world=world, frozen=True, **source)
    with world.in_turn():
        component = source.get("subfolder", "transformer")
        pipe = load_pipeline(pipeline_class, config.model, world, "--model", **{component: network})
    return pipe, network, reference


def load_network(
    network_class: type,
    path: str,
    world: World,
    *,
    lora_rank: int = 0,
    frozen: bool = False,
    subfolder: str | None = None,
    option: str = "--model",
    init: Path | None = None,
    **prepare,
) -> nn.Module:
    """Load a diffusers network, ready to train, or frozen.

    init: weights to start from instead, see `find_init`; prepare: arguments of `prepare_network`.
    Only rank 0 reads the weights, and broadcasts them: host memory holds one copy, whatever the number of processes.
    Raises RunError if weights are missing.
    """
    folder, options = find_folder(path, option, subfolder is not None), {"subfolder": subfolder} if subfolder else {}
    dtype = world.dtype if frozen or lora_rank else torch.float32  # master weights
    prepare |= {"dtype": dtype, "lora_rank": lora_rank, "frozen": frozen}
    if world.is_main:
        place, options_of = ((init, "--init"), {}) if init and not lora_rank else ((folder, option), options)
        source = prepare_network(load_weights(network_class, *place, dtype=dtype, **options_of), **prepare)
        if init and lora_rank:
            load_adapter(source, init)
    if world.size == 1:
        return source.to(world.device)
    config = load_pretrained(network_class.load_config, folder, option, **options)
    network = shard(empty_network(network_class, config, **prepare), world).to_empty(device=world.device)
    world.barrier()  # rank 0 may read for long
    weights = source.state_dict() if world.is_main else {}
    here = weights | dict(source.named_buffers()) if world.is_main else {}  # not all buffers are in the state dict
    whole = network.state_dict() if world.mesh is None else {}
    for name, tensor in (whole | dict(network.named_buffers())).items():
        if world.is_main:
            tensor.copy_(here[name])  # in place: set_model_state_dict would hold a second copy of the network
        dist.broadcast(tensor, 0)
    if world.mesh is not None:
        options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state_dict.set_model_state_dict(network, weights, options=options)
    return network


def load_pipeline(pipeline_class: type, path: str, world: World, option: str = "--model", **networks):
    """Load a diffusers pipeline around the given networks. All others are frozen, in the compute dtype.

    Raises RunError if weights are missing.
    """
    folder = find_folder(path, option, but=list(networks))
    parts = load_components(folder, world.dtype, networks, option) | dict.fromkeys(networks)
    pipe = load_pretrained(pipeline_class.from_pretrained, folder, option, dtype=world.dtype, **parts)
    world.freeze(*(part for part in pipe.components.values() if isinstance(part, nn.Module)))
    pipe.register_modules(**networks)
    pipe.set_progress_bar_config(disable=True)
    logging.getLogger(type(pipe).__module__).addFilter(is_worth_saying)
    return pipe


def is_worth_saying(record: logging.LogRecord) -> bool:
    """False for the truncation warning, which every iteration would repeat."""
    return "input was truncated" not in str(record.msg)


def empty_network(network_class: type, config: dict, **prepare) -> nn.Module:
    """A network on the meta device, without weights. prepare: arguments of `prepare_network`."""
    with torch.device("meta"):
        return prepare_network(network_class.from_config(config), **prepare)


def prepare_network(
    network: nn.Module,
    dtype: torch.dtype = torch.float32,
    lora_rank: int = 0,
    lora_targets: Sequence[str] = (),
    checkpointing: bool = False,
    compiled: bool = False,
    frozen: bool = False,
    quantized: str = "",
    seed: int = 0,
) -> nn.Module:
    """Make a diffusers network ready to train, in place: LoRA, --quantize, gradient checkpointing, compilation.

    dtype: of the network itself, float32 if all of it is trained. LoRA's weights are float32, alpha = 2 rank (release);
    seed: of their initial values.
    """
    for parameter in network.parameters():  # Wan's norms would stay in float32, and FSDP wants one type
        parameter.data = parameter.data.to(dtype)
    network.requires_grad_(not frozen and not lora_rank)
    if lora_rank:
        from peft import LoraConfig

        options = {"init_lora_weights": "gaussian", "target_modules": list(lora_targets)}
        with torch.random.fork_rng(devices=[]):  # the one draw that a library makes from the global state
            torch.manual_seed(seed)
            network.add_adapter(LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, **options))
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
