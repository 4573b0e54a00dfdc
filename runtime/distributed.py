"""Processes, loading and sharding of networks, LoRA, EMA."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm import tqdm

from rewards import is_folder_or_hub_id

from .cli import RunError, require


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

    def mean(self, x: Tensor) -> float:
        """The mean of a 0-d tensor over all processes."""
        return self.gather(x.view(1)).mean().item()

    def share(self, count: int) -> list[int]:
        """This process's part of 0 … count - 1. All parts are equally long, so the last indices may be repeated."""
        return [(self.rank + k * self.size) % count for k in range(-(-count // self.size))]

    def collect(self, x: Tensor, count: int) -> Tensor:
        """What all processes have for their `share`, (n, ...) each, in order: (count, ...)."""
        return self.gather(x).unflatten(0, (self.size, -1)).transpose(0, 1).flatten(0, 1)[:count]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def progress(self, iterable: Iterable, **options) -> tqdm:
        """A progress bar, on rank 0 only."""
        return tqdm(iterable, disable=not self.is_main, dynamic_ncols=True, **options)

    def chunks(self, items: Sequence, size: int, text: str) -> Iterator[Sequence]:
        """items[0:size], items[size:2 size], … under a progress bar of its own that disappears when it is done."""
        starts = self.progress(range(0, len(items), size), desc=text, leave=False, mininterval=1.0, delay=2.0)
        return (items[start : start + size] for start in starts)


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


def load_pretrained(loader, path: str, option: str = "--model", **options):
    """Call a `from_pretrained` or `load_config` of diffusers; missing or gated weights become one line of advice."""
    require(is_folder_or_hub_id(path), f"{option}: no folder {path!r}; give a local folder or a hub id (OWNER/NAME)")
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
