"""Processes, sharding, gradients, EMA."""

import contextlib
import math
import os
import secrets
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from rewards import first_line

from .files import write_atomically
from .options import Lazy, RunError, find_place, require

fsdp = Lazy("torch.distributed.fsdp")

LIMIT = timedelta(minutes=30)  # of a collective in training: a slower process has hung
FOREVER = timedelta(days=30)  # loading, painting first frames, saving: as long as they take


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
    patient: Any = None  # a process group: all processes, with no limit of time
    poll: Callable[[], None] = lambda: None  # called between chunks of work, on every process equally often

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

    def mean(self, x: Tensor | float) -> float:
        """The mean of a 0-d tensor over all processes."""
        return self.gather(torch.as_tensor(x).view(1)).mean().item()

    def share(self, count: int) -> list[int]:
        """This process's part of 0 … count - 1. All parts are equally long, so the first ones may be repeated."""
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
        """Wait for all processes, however long one of them loads or writes."""
        if self.size > 1:
            dist.barrier(group=self.patient)

    def require_shared(self, folder: Path) -> None:
        """Make the folder. Raises RunError if a process does not see what rank 0 writes there."""
        mark = folder / self.from_main(f".{secrets.token_hex(8)}")
        if self.is_main:
            write_atomically(mark, "")
        self.barrier()
        seen = self.gather(torch.tensor([mark.exists()], dtype=torch.float32, device=self.device)).all()
        if self.is_main:
            mark.unlink()
        require(bool(seen), f"a process does not see what another wrote into {folder}; all machines must share it")

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
        for start in self.progress(range(0, len(items), size), desc=text, leave=False, mininterval=1.0, delay=2.0):
            self.poll()
            yield items[start : start + size]


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """All parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def start_world(dtype: str = "auto", shard_size: int = 0, offload: bool = False, fits_whole: bool = True) -> World:
    """Join the processes that torchrun started, if it did, each with an accelerator of its own, or all on the CPU.

    dtype, shard_size and offload are the options of these names; `fits_whole` says what shard_size 0 means, see
    `choose_shard_size`. Raises RunError before anything is loaded.
    """
    kind = find_accelerator()
    rank, size, local_rank, local_size = find_place()
    launched = size == 1 or "LOCAL_WORLD_SIZE" in os.environ
    require(launched, "LOCAL_WORLD_SIZE, the number of processes on this node, is not set; start with torchrun")
    unequal = "the nodes have unequal numbers of processes; give torchrun the same --nproc_per_node on each"
    require(size % local_size == 0, unequal)
    shard_size = choose_shard_size(shard_size, size, local_size, fits_whole)
    if kind != "cpu":
        cards = torch.accelerator.device_count()
        require(local_rank < cards, f"this node has {cards} GPUs; start at most one process for each of them")
        torch.accelerator.set_device_index(local_rank)
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32: rewards are scored in it
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, local_rank)
    if size > 1 and not dist.is_initialized():
        backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=FOREVER))
            here = [f"{number} is here, of so many on its node" for number in range(size)]
            store.set(here[rank], str(local_size))
            store.wait(here, FOREVER)  # some may still fetch or check files
            require(len(set(store.multi_get(here))) == 1, unequal)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=LIMIT)
            dist.all_reduce(torch.zeros(1, device=device))  # what cannot connect fails here
        except (OSError, ValueError, RuntimeError) as e:
            raise RunError(
                f"the processes cannot connect: {first_line(e)}; check torchrun's address and port; on several nodes, "
                "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface that connects them"
            ) from e
    patient = dist.new_group(timeout=FOREVER, backend="gloo") if size > 1 else None
    mesh = shard_mesh(kind, size, shard_size)
    return World(rank, size, device, compute_dtype(dtype, kind), shard_size, offload, mesh, patient)


def find_accelerator() -> str:
    """The type of the accelerator that torch can use (cuda, also for ROCm; xpu, mps, …), else "cpu".

    Raises RunError if a GPU is here and torch cannot use it: a run on the CPU would take months and say nothing.
    """
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    drivers = [path for path in DRIVERS if Path(path).exists()]
    require(
        not drivers or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"),
        f"a GPU is here ({', '.join(drivers)}), but torch {torch.__version__} cannot use it; install a torch built for "
        "its driver, or set CUDA_VISIBLE_DEVICES= to run on the CPU",
    )
    return "cpu"


DRIVERS = ("/dev/nvidiactl", "/dev/kfd")  # of CUDA and of ROCm


def compute_dtype(option: str, kind: str = "cuda") -> torch.dtype:
    """What --dtype means on this type of device: auto is bfloat16, but float32 on the CPU, MPS and GPUs without it."""
    emulated = kind == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)
    auto = "float32" if kind in ("cpu", "mps") or emulated else "bfloat16"
    return getattr(torch, auto if option == "auto" else option)


def choose_shard_size(shard_size: int, size: int, local_size: int, fits_whole: bool) -> int:
    """Processes that share one copy of the network. 0: one if `fits_whole`, else those of a node.

    Sharding gathers every block's parameters in every forward and backward pass, which is fast inside a node only.
    Raises RunError unless `shard_size` divides `size`, the number of processes.
    """
    chosen = shard_size or (1 if fits_whole else local_size)
    require(chosen > 0 and size % chosen == 0, f"--shard-size must divide the {size} processes, got {chosen}")
    return chosen


def shard_mesh(device_type: str, size: int, shard_size: int) -> DeviceMesh | None:
    """Copies of the network by parts of a copy, (size / shard_size, shard_size); None if every process has it whole."""
    if shard_size == 1:
        return None
    return init_device_mesh(device_type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


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


def sync_gradients(network: nn.Module, now: bool) -> None:
    """Say whether the next backward pass is the last of an update: only then do the copies all-reduce their gradients.

    Inside a sharded copy every pass reduces and scatters gradients, so that they never have to fit whole. For a network
    that is not sharded, see `average_gradients`.
    """
    if isinstance(network, fsdp.FSDPModule):
        network.set_requires_all_reduce(now)


def average_gradients(network: nn.Module) -> None:
    """Average the gradients of processes that each hold the whole network. FSDP has averaged those of a sharded one."""
    if dist.is_initialized() and not isinstance(network, fsdp.FSDPModule):
        gradients = [parameter.grad for parameter in trainable(network) if parameter.grad is not None]
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()
        torch._foreach_div_(gradients, dist.get_world_size())


def finite_norm(norm: Tensor, iteration: int) -> float:
    """The norm that `clip_grad_norm_` returned. One that is not finite ends the run, before any weight changes."""
    value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    require(
        math.isfinite(value),
        f"the loss or its gradient became {value} in iteration {iteration + 1}; start again with a lower "
        "--learning-rate or --max-grad-norm in another --output-dir; the checkpoints saved so far are intact",
    )
    return value


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
