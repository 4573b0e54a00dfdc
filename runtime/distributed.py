"""Processes, loading and sharding of networks, LoRA, EMA."""

import contextlib
import importlib
import json
import logging
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from rewards import FILE_ERRORS, RewardError, check_tokenizer, first_line, is_folder_or_hub_id

from .cli import Lazy, RunError, complete_checkpoints, find_place, require

fsdp = Lazy("torch.distributed.fsdp")
state_dict = Lazy("torch.distributed.checkpoint.state_dict")

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype  # that networks compute in
    shard_size: int = 1  # processes that share one copy of the trained network
    offload: bool = False  # frozen models wait in host memory
    mesh: DeviceMesh | None = None  # (replicate, shard) if the network is sharded

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

    def mean(self, x: Tensor) -> float:
        """The mean of a 0-d tensor over all processes."""
        return self.gather(x.view(1)).mean().item()

    def share(self, count: int) -> list[int]:
        """This process's part of 0 … count - 1. All parts are equally long, so the last indices may be repeated."""
        return [(self.rank + k * self.size) % count for k in range(-(-count // self.size))]

    def collect(self, x: Tensor, count: int) -> Tensor:
        """What all processes have for their `share`, (n, ...) each, in order: (count, ...)."""
        return self.gather(x).unflatten(0, (self.size, -1)).transpose(0, 1).flatten(0, 1)[:count]

    def from_main(self, value):
        """What rank 0 has, on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The processes of a node run the block one after the other, so that only one at a time fills host memory."""
        place = find_place()
        for _ in range(place.local_rank):
            self.barrier()
        yield
        for _ in range(place.local_size - place.local_rank):
            self.barrier()

    def freeze(self, *modules: nn.Module) -> None:
        """Make modules frozen parts of this run: on the device, or with --offload in host memory."""
        for module in modules:
            module.to("cpu" if self.offload else self.device).eval().requires_grad_(False)

    @contextlib.contextmanager
    def on_device(self, *modules: nn.Module, instead_of: nn.Module | None = None) -> Iterator[None]:
        """Frozen modules are on the device inside the block. With --offload they wait in host memory outside it.

        instead_of: a network that waits in host memory meanwhile, if --offload is on and it is not sharded.
        """
        host = [(tensor, tensor.data) for tensor in tensors_of(modules)] if self.offload else []
        away = [] if instead_of is None or isinstance(instead_of, fsdp.FSDPModule) else tensors_of([instead_of])
        away = away if self.offload else []
        try:
            for tensor in away:
                tensor.data = tensor.data.to("cpu")
            for tensor, data in host:
                tensor.data = data.to(self.device)
            yield
        finally:
            for tensor, data in host:  # nothing changed them, so nothing is copied back
                tensor.data = data
            for tensor in away:
                tensor.data = tensor.data.to(self.device)

    def progress(self, iterable: Iterable, **options) -> tqdm:
        """A progress bar, on rank 0 only."""
        return tqdm(iterable, disable=not self.is_main, dynamic_ncols=True, **options)

    def chunks(self, items: Sequence, size: int, text: str) -> Iterator[Sequence]:
        """items[0:size], items[size:2 size], … under a progress bar of its own that disappears when it is done."""
        starts = self.progress(range(0, len(items), size), desc=text, leave=False, mininterval=1.0, delay=2.0)
        return (items[start : start + size] for start in starts)


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def start_world(dtype: str = "auto", shard_size: int = 0, offload: bool = False, fits_whole: bool = True) -> World:
    """Join the processes that torchrun started, if it did: nccl on CUDA, gloo on CPU.

    dtype, shard_size and offload are the options of these names; `fits_whole` says what shard_size 0 means, see
    `choose_shard_size`. Raises RunError before anything is loaded.
    """
    cuda = torch.cuda.is_available()
    compute = compute_dtype(dtype, cuda)
    rank, size, local_rank, local_size = find_place()
    shard_size = choose_shard_size(shard_size, size, local_size, fits_whole)
    if cuda:
        cards = torch.cuda.device_count()
        require(local_rank < cards, f"this node has {cards} GPUs; start at most one process for each of them")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32: rewards are scored in it
    if size > 1:
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        except (OSError, dist.DistError) as e:
            raise RunError(f"the processes cannot connect: {first_line(e)}; check torchrun's address and port") from e
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(rank, size, device, compute, shard_size, offload, shard_mesh(device.type, size, shard_size))


def compute_dtype(option: str, cuda: bool) -> torch.dtype:
    """What --dtype means, with or without CUDA. Raises RunError if it is none of the known."""
    require(option in ("auto", *DTYPES), f"--dtype must be one of auto, {', '.join(DTYPES)}, got {option!r}")
    return DTYPES["bfloat16" if cuda else "float32"] if option == "auto" else DTYPES[option]


def choose_shard_size(shard_size: int, size: int, local_size: int, fits_whole: bool) -> int:
    """Processes that share one copy of the network. 0: one if the network fits a GPU whole, else those of a node.

    Sharding gathers every block's parameters in every forward and backward pass, which is fast inside a node only.
    Raises RunError unless `shard_size` divides `size`, the number of processes.
    """
    chosen = shard_size or (1 if fits_whole else local_size)
    require(
        chosen > 0 and size % chosen == 0,
        f"--shard-size must divide the {size} processes, got {chosen}; that many hold one copy of the network",
    )
    return chosen


def shard_mesh(device_type: str, size: int, shard_size: int) -> DeviceMesh | None:
    """Copies of the network by parts of a copy, (size / shard_size, shard_size); None if every process has it whole."""
    if shard_size == 1:
        return None
    return init_device_mesh(device_type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def check_path(option: str, path: str) -> None:
    """Raise RunError unless `path` is a folder here, or looks like a hub id."""
    require(is_folder_or_hub_id(path), f"{option}: no folder {path!r}; give a local folder or a hub id (OWNER/NAME)")


def load_pretrained(loader, path: str, option: str = "--model", **options):
    """Call a `from_pretrained` or `load_config`; files that are missing, damaged or gated become one line of advice."""
    check_path(option, path)
    try:
        loaded = loader(path, **options)
        return ModelConfig(loaded | {}, f"{option} {path}") if loader.__name__ == "load_config" else loaded
    except FILE_ERRORS as e:
        reason = first_line(e)
        advice = (
            f"accept its licence at https://huggingface.co/{path} and log in with `hf auth login`"
            if "gated" in f"{type(e.__cause__).__name__} {type(e).__name__} {e}".lower() or "401" in str(e)
            else f"give {option} a complete folder in diffusers' layout, or a hub id that this machine can reach"
        )
        part = f"/{options['subfolder']}" if options.get("subfolder") else ""
        raise RunError(f"cannot load {path}{part}: {reason}; {advice}") from e


class ModelConfig(dict):
    """The content of a model's config file. A value that is not there becomes one line."""

    def __init__(self, content: dict, source: str):
        super().__init__(content)
        self.source = source

    def __missing__(self, name: str):
        raise RunError(f"{self.source}: a config file there lacks {name!r}; it is damaged, or of another model")


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
    from diffusers import DiffusionPipeline

    index = load_pretrained(DiffusionPipeline.load_config, path, option)
    for name in index:
        require(
            has_config(Path(path, name)),
            f"{Path(path, name)} has no config, or a damaged one; give {option} a whole folder",
        )
        if name.startswith("tokenizer") and Path(path).is_dir():
            folder = Path(path, name)
            require(folder.is_dir(), f"{option} {path} has no folder {name}; complete it")
            try:
                check_tokenizer(folder)
            except RewardError as e:
                raise RunError(f"{option} {path} is not complete: {e}; add them") from e
    return index


def has_config(folder: Path) -> bool:
    """Whether a component's folder, if it is here, says what it holds. transformers takes its defaults where one does
    not: a Llama of 7 billion parameters."""
    files = [file for file in folder.glob("*config.json") if file.is_file()]
    try:
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    except (OSError, ValueError):
        return False
    return not folder.is_dir() or (bool(contents) and all(isinstance(c, dict) and c for c in contents))


def load_weights(network_class: type, path: str, option: str = "--model", **options) -> nn.Module:
    """`from_pretrained` of a network of diffusers or transformers. Raises RunError if its files lack a weight.

    Both libraries would go on without: with an empty or a random one.
    """
    network, info = load_pretrained(network_class.from_pretrained, path, option, output_loading_info=True, **options)
    lacking = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))
    place = f"{path}/{options['subfolder']}" if "subfolder" in options else path
    require(
        not lacking,
        f"{place} does not fit its config: {len(lacking)} weights missing, or of another shape, first: "
        f"{(lacking or [''])[0]}; give {option} a complete folder",
    )
    return network


def load_parts(path: str, dtype: torch.dtype, but: Iterable[str] = ()) -> dict[str, nn.Module]:
    """The networks that a pipeline's model_index.json names, by name, without those in `but`."""
    parts = {}
    for name, entry in pipeline_index(path).items():
        library, class_name = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (None, None)
        if library in ("diffusers", "transformers") and class_name and name not in but:
            part = getattr(importlib.import_module(library), class_name, object)
            if issubclass(part, nn.Module):
                parts[name] = load_weights(part, path, subfolder=name, dtype=dtype)
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
    *,
    subfolder: str | None = None,
    option: str = "--model",
    init: Path | None = None,
) -> nn.Module:
    """Load a diffusers network, ready to train, or frozen. init: weights to start from instead, see `find_init`.

    Only rank 0 reads the weights, and broadcasts them: host memory holds one copy, whatever the number of processes.
    Raises RunError if the weights are missing or gated.
    """
    options = {"subfolder": subfolder} if subfolder else {}
    prepare = (lora_rank, lora_targets, checkpointing, compiled, frozen)
    dtype = world.dtype if frozen or lora_rank else torch.float32  # master weights
    if world.is_main:
        whole = init and not lora_rank
        place = (network_class, str(init), "--init") if whole else (network_class, path, option)
        source = load_weights(*place, dtype=dtype, **({} if whole else options))
        for parameter in source.parameters():  # Wan's norms would stay in float32, and FSDP wants one type
            parameter.data = parameter.data.to(dtype)
        prepare_network(source, *prepare)
        if init and lora_rank:
            load_adapter(source, init)
    if world.size == 1:
        return source.to(world.device)
    config = load_pretrained(network_class.load_config, path, option, **options)
    network = shard(empty_network(network_class, config, dtype, *prepare), world).to_empty(device=world.device)
    buffers = dict(source.named_buffers()) if world.is_main else {}
    for name, buffer in network.named_buffers():  # not all of them are in the state dict
        if world.is_main:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    weights = source.state_dict() if world.is_main else {}
    options = state_dict.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state_dict.set_model_state_dict(network, weights, options=options)
    return network


LORA_FILE = "pytorch_lora_weights.safetensors"  # in a checkpoint, diffusers' usual name


def find_init(init: str) -> Path:
    """The weights that --init names: those of RUN/checkpoint-NNNNNN, or the folder or LoRA file of the average in it.

    Raises RunError if there are none.
    """
    path = Path(init)
    require(path.exists(), f"--init: there is no {init}; give RUN/checkpoint-NNNNNN of an earlier run")
    for place in (path / "transformer", path / "unet", path / LORA_FILE, path):
        is_weights = place.is_file() if place.suffix == ".safetensors" else (place / "config.json").is_file()
        if is_weights and (place.parent / "checksums.json").is_file():
            return place
    raise RunError(f"--init: {init} is no checkpoint of a run, which has a checksums.json; give RUN/checkpoint-NNNNNN")


def check_init(config, network_class: type, component: str, lora_targets: Sequence[str], source: dict | None = None):
    """Raise RunError unless the weights that --init names are those of the trained network, or a LoRA of it that
    --lora-rank describes. Loads no weights. A run that continues from a checkpoint of its own needs them no more.

    component: the network's name in the pipeline; source: where it lies, if not there in --model.
    """
    init, lora_rank = config.init, config.lora_rank
    if not init or (config.resume and complete_checkpoints(config.output_dir)):
        return
    place = find_init(init)
    found = weight_shapes([place] if place.is_file() else sorted(place.glob("*.safetensors")))
    if place.is_file():
        rank = max((shape[0] for name, shape in found.items() if ".lora_A." in name), default=0)
        message = f"--init {init} is a LoRA of rank {rank}, and --lora-rank is {lora_rank}; give --lora-rank {rank}"
        require(rank == lora_rank, message)
    elif lora_rank:
        advice = "give --lora-rank 0, or a checkpoint that holds a LoRA"
        raise RunError(f"--init {init} holds all weights, and --lora-rank {lora_rank} trains a LoRA; {advice}")
    source = source or {"path": config.model, "subfolder": component}
    network_config = load_pretrained(network_class.load_config, **source)
    network = empty_network(network_class, network_config, torch.float32, lora_rank, lora_targets)
    expected = {name: list(weight.shape) for name, weight in public_weights(network, component).items()}
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    require(
        not wrong,
        f"--init {init} does not fit {network_config.source}: {len(wrong)} weights have other names or shapes than in "
        f"that {network_class.__name__}, first: {(wrong or [''])[0]}; give a checkpoint of a run from this model",
    )


def public_weights(network: nn.Module, component: str) -> dict[str, Tensor]:
    """The weights of a network by their names in a checkpoint: all of them, or those of its LoRA."""
    from peft import get_peft_model_state_dict

    if not getattr(network, "peft_config", None):
        return network.state_dict()
    return {f"{component}.{name}": weight for name, weight in get_peft_model_state_dict(network).items()}


def shapes_in(file: Path) -> dict[str, list[int]]:
    """{name: shape} of the weights in a safetensors file, whose content is not read."""
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def weight_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    """{name: shape} of the weights in safetensors files. Raises RunError if one cannot be read."""
    from safetensors import SafetensorError

    shapes = {}
    for file in files:
        try:
            shapes |= shapes_in(file)
        except (OSError, SafetensorError) as e:
            raise RunError(f"--init: cannot read {file} ({first_line(e)}); take another checkpoint") from e
    return shapes


def load_adapter(network: nn.Module, file: Path) -> None:
    """Copy a checkpoint's LoRA into a network's. Names in the file begin with the component's."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(network, {name.partition(".")[2]: weight for name, weight in load_file(file).items()})


def load_pipeline(pipeline_class: type, path: str, world: World, **components):
    """Load a diffusers pipeline around the given components. All others are frozen, in the compute dtype.

    Raises RunError if weights are missing or gated.
    """
    absent = {name: None if isinstance(value, nn.Module) else value for name, value in components.items()}
    with world.in_turn():
        parts = load_parts(path, world.dtype, components) | absent
        pipe = load_pretrained(pipeline_class.from_pretrained, path, dtype=world.dtype, **parts)
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
) -> nn.Module:
    """Make a diffusers network ready to train, in place: LoRA, gradient checkpointing, compilation.

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
    if checkpointing:
        network.enable_gradient_checkpointing()
    if compiled:
        network.compile_repeated_blocks()
    return network.eval()  # never train(): a dropout layer would make replay differ from rollout


def shard(network: nn.Module, world: World) -> nn.Module:
    """FSDP2, if the processes share copies: shard every block that diffusers declares unsplittable, then the rest.

    The processes of a copy hold a part of every parameter each, and of its gradient and optimizer state.
    """
    if world.mesh is None:
        return network
    # Blocks of FLUX return views of one tensor; the warning is for code that changes them in place, which none does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=None if world.dtype == torch.float32 else world.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast casts what is safe; bf16 would round rotary tables and timesteps
    )
    mesh = world.mesh if world.mesh["replicate"].size() > 1 else world.mesh["shard"]
    for module in reversed(list(network.modules())):  # innermost first
        if type(module).__name__ in (network._no_split_modules or []):
            fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    kind = type(network).__name__
    fsdp.fully_shard(network, mesh=mesh, mp_policy=policy)
    type(network).__name__ = kind  # fully_shard changed the class; checkpoints would store its new name
    return network


def adamw(network: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """The release's optimizer for what is trained: constant learning rate, betas 0.9 and 0.999, weight decay 1e-4."""
    parameters = trainable(network)
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=1e-4, fused=parameters[0].is_cuda)


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
    """Say whether the next backward pass is the last of an update: only then do the copies all-reduce their gradients.

    Inside a sharded copy every pass reduces and scatters gradients, so that they never have to fit whole.
    """
    if isinstance(network, fsdp.FSDPModule):
        network.set_requires_all_reduce(now)


def clip_gradients(network: nn.Module, max_norm: float, iteration: int) -> float:
    """Average gradients over processes that each hold the whole network, clip them in place, and return their norm
    before clipping. A loss that is not finite ends the run here, before any weight changes.
    """
    if dist.is_initialized() and not isinstance(network, fsdp.FSDPModule):
        gradients = [parameter.grad for parameter in trainable(network) if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, dist.get_world_size())
    norm = nn.utils.clip_grad_norm_(trainable(network), max_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    require(
        np.isfinite(norm),
        f"the loss or its gradient became {norm} in iteration {iteration + 1}; start again with a lower "
        "--learning-rate or --max-grad-norm in another --output-dir; the checkpoints saved so far are intact",
    )
    return norm


class PromptCache:
    """What frozen encoders make of prompts, so that each prompt is encoded once.

    encode   list of prompts → a tensor (P, …), or a tuple or list of them
    network  the trained one, which with --offload makes room for the encoders
    Prompts are encoded one by one: the result must not depend on which were encoded before, or in another process.
    """

    SIZE = 256  # prompts that are kept

    def __init__(self, encode: Callable, world: World, network: nn.Module, *encoders: nn.Module):
        self.encode, self.world, self.network, self.encoders, self.kept = encode, world, network, encoders, {}

    def __call__(self, prompts: Sequence[str]):
        """What `encode` gives for these prompts."""
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]:
            with self.world.on_device(*self.encoders, instead_of=self.network):
                self.kept |= {prompt: self.encode([prompt]) for prompt in missing}
        rows = [self.kept[prompt] for prompt in prompts]
        for prompt in list(self.kept)[: -self.SIZE]:
            del self.kept[prompt]
        return join(rows) if isinstance(rows[0], Tensor) else type(rows[0])(map(join, zip(*rows, strict=True)))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors (n, …); shorter ones are padded with zeros to the size of the largest."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    pads = [
        [x for size, own in zip(sizes[::-1], t.shape[:0:-1], strict=True) for x in (0, size - own)] for t in tensors
    ]
    return torch.cat([nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, pads, strict=True)])


def drop_full_masks(blocks: Iterable[nn.Module], position: int) -> None:
    """Blocks get None instead of an attention mask that masks nothing: with any mask, flash attention cannot be used.

    position: the mask's among the arguments of a block.
    """
    last = {"mask": None, "full": False}  # the blocks of one forward pass get the same mask, which is read once

    def hook(block: nn.Module, args: tuple) -> tuple:
        mask = args[position]
        if last["mask"] is not mask:
            last.update(mask=mask, full=bool(mask.all()))
        return (*args[:position], None if last["full"] else mask, *args[position + 1 :])

    for block in blocks:
        block.register_forward_pre_hook(hook)


class Preemption:
    """Notes SIGTERM, which a cluster sends before it takes a machine away, and Ctrl-C, so that the run saves and ends.

    A Ctrl-C after either ends the process at once.
    """

    def __init__(self, world: World):
        self.world, self.received = world, 0
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore(self) -> None:
        """From now on the signals do again what they did before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __call__(self) -> bool:
        """Whether any process has received one. A collective: every process must ask."""
        return bool(self.world.gather(torch.tensor([self.received])).any())

    @property
    def exit_code(self) -> int:
        """0 for SIGTERM, the shells' 130 for Ctrl-C."""
        return 130 if self.received == signal.SIGINT else 0


class EMA:
    """Exponential moving average of the trained weights, kept as shards where they are shards. decay 0: off."""

    def __init__(self, network: nn.Module, decay: float):
        self.parameters, self.decay = trainable(network), decay
        self.average = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if self.average:
            torch._foreach_lerp_(*([local(p) for p in ps] for ps in (self.average, self.parameters)), 1 - self.decay)

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
            average, parameter = local(average), local(parameter)
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
