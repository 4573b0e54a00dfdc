"""--dry-run: what a run of any size takes in memory, arithmetic and disk, found on fake tensors in one process.

The network is built, sharded and run by the code of a real run; only its tensors have no content. What CUDA does
differently is imitated: autocast computes norms in float32, and attention keeps no matrix of its weights.
"""

import contextlib
import json
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rewards import parse_paths

from . import drymodels, dryreward, loading, processes
from .checkpoints import GIB, checkpoint_bytes, disk_needed, refuse_foreign
from .data import PromptCache
from .files import write_atomically
from .memory import training_bytes

NODE = 8  # processes of a node
CUDA_CONTEXT = 1.0  # GiB of GPU memory of a process beside its tensors: CUDA, NCCL, workspaces (an estimate)
HOST_PROCESS = 2.5  # GiB of host memory of a process beside its models: Python, torch, CUDA (an estimate)
PAINTER = {"FLUX.1-dev": 16_870_599_139}  # parameters of the pipeline that paints first frames
FLOPS = flop_counter.flop_registry | {  # attention on the CPU has names of its own, which older torch does not count
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
}


# ------------------------------------------------------------------------------------------------------------ counting


class Counter(TorchDispatchMode):
    """Counts allocated bytes and floating-point operations. FSDP's buffers are counted separately: those that it
    uses to gather parameters and reduce gradients.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.of_fsdp, self.in_fsdp = weakref.WeakSet(), weakref.WeakSet(), False
        self.flops = self.tensors = self.buffers = self.peak = self.peak_buffers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in FLOPS:
            self.flops += FLOPS[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(processes.local(tensor).untyped_storage())
        if self.tensors + self.buffers > self.peak:
            self.peak, self.peak_buffers = self.tensors + self.buffers, self.buffers
        return out

    def _add(self, storage) -> None:
        if storage in self.seen:
            return
        self.seen.add(storage)
        if self.in_fsdp:
            self.of_fsdp.add(storage)
            self.buffers += storage.nbytes()
        else:
            self.tensors += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.tensors -= count

    def reset_peak(self) -> None:
        self.peak, self.peak_buffers = self.tensors + self.buffers, self.buffers

    def watching_fsdp(self):
        """A context in which FSDP's buffers are told apart."""

        def watched(method):
            def call(group, *args, **kwargs):
                outer, self.in_fsdp = self.in_fsdp, True
                try:
                    return method(group, *args, **kwargs)
                finally:
                    self.in_fsdp = outer
                    self.buffers = sum(storage.nbytes() for storage in self.of_fsdp)  # freed by resizing to nothing

            return call

        names = ("unshard", "wait_for_unshard", "reshard", "post_backward")
        methods: dict[str, Any] = {name: watched(getattr(FSDPParamGroup, name)) for name in names}
        return mock.patch.multiple(FSDPParamGroup, **methods)


def autocast_as_on_cuda():
    """A context in which autocast computes norms in float32, as on CUDA; on the CPU it does not."""

    def in_float32(function):
        def call(x, *args, **kwargs):
            return function(x.float() if torch.is_autocast_enabled("cpu") else x, *args, **kwargs)

        return call

    names = ["layer_norm", "group_norm"]
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA"):  # since torch 2.12
        names.append("rms_norm")
    norms: dict[str, Any] = {name: in_float32(getattr(nn.functional, name)) for name in names}
    return mock.patch.multiple(nn.functional, **norms)


# ------------------------------------------------------------------------------------------------------------- the run


def run(
    cfg,
    network_class: type,
    config: dict,
    predict: Callable[[nn.Module, Tensor, Sequence[Tensor]], Tensor],
    shape: Sequence[int],
    condition: Callable[[int], Sequence[Tensor]],
    frozen: dict[str, int],
    vae: tuple[type, dict],
    decode: Callable[[nn.Module, Tensor], Tensor],
    lora_targets: Sequence[str],
    fits_whole: bool,
) -> dict:
    """Print what --processes would need, write OUTPUT_DIR/dryrun.json, and return its content.

    predict       (network, z (M, *shape), conditions of M samples) → prediction, the trainer's own
    condition     M → text embeddings and the like of M samples, in the compute dtype
    frozen        parameters of each frozen component
    vae, decode   the VAE's class and configuration, and (VAE, z (M, *shape)) → images or videos, the trainer's own
    fits_whole    what --shard-size 0 means, as for `processes.start_world`
    """
    refuse_foreign(Path(cfg.output_dir))
    node = min(cfg.processes, NODE)
    shard_size = processes.choose_shard_size(cfg.shard_size, cfg.processes, node, fits_whole)
    dtype = processes.compute_dtype(cfg.dtype)
    with contextlib.ExitStack() as stack:
        if cfg.processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=cfg.processes)
            stack.callback(dist.destroy_process_group)
        mesh = processes.shard_mesh("cpu", cfg.processes, shard_size)
        world = processes.World(0, cfg.processes, torch.device("cpu"), dtype, shard_size, cfg.offload, mesh)
        counter = Counter()
        for context in (FakeTensorMode(), counter, counter.watching_fsdp(), autocast_as_on_cuda()):
            stack.enter_context(context)
        measured = _measure(cfg, world, counter, network_class, config, predict, shape, condition, lora_targets)
        decoding = _measure_decode(counter, *vae, dtype, decode, torch.empty(cfg.micro_batch, *shape))
        frames = getattr(cfg, "frames", 1)
        visual = torch.empty(1, *([frames] if frames > 1 else []), 3, cfg.height, cfg.width)
        fps, folders = getattr(cfg, "fps", None), parse_paths(cfg.reward_paths)
        painter = getattr(cfg, "first_frame_model", "")
        painting = sum(drymodels.frozen_parameters(painter, PAINTER, ()).values()) * dtype.itemsize if painter else 0
        reward_bytes, scoring = dryreward.measure(cfg.reward, folders, visual, fps, counter)

    # What this process does in an iteration: B samples drawn, and their pairs (sample, step) trained.
    P, G, M = cfg.prompts_per_iteration // cfg.processes, cfg.group_size, cfg.micro_batch
    stochastic = cfg.sde_window or cfg.steps - 1
    trained = stochastic if cfg.sde_window else int(stochastic * cfg.timestep_fraction)
    samples, U = P * (2 * cfg.keep_best_worst or G), cfg.updates_per_rollout
    pairs = samples * trained // U
    forwards = -(-P * G // M) * cfg.steps
    micro_batches = -(-pairs // M) * U
    drawn, learned = P * G * cfg.steps, U * pairs  # evaluations for a sample and a step
    if cfg.shared_noise:  # a group's first step is evaluated once in each micro-batch that has samples of the group
        drawn -= P * G - (P + -(-P * G // M) - -(-P * G // math.lcm(M, G)))
        first = {"random": trained / stochastic, "first": 1, "last": trained // stochastic}[cfg.timesteps]
        groups, firsts = P * (1 - (1 - first) ** (samples / P / U)), samples / U * first  # on average
        learned -= U * max(0, firsts - (groups + (firsts - 1) // M))
    scoring *= min(cfg.reward_batch, P * G)
    whole, parts = measured["elements"], measured["bytes"]
    master = dtype.itemsize if cfg.lora_rank else 4
    if cfg.kl_weight and not cfg.lora_rank:  # of the reference policy
        measured["forward_flops_update"] += measured["forward_flops"]
    gathered = whole * dtype.itemsize * (shard_size - 1) / shard_size  # of one pass over the network
    parts["trajectories"] = 4 * P * G * ((cfg.steps + 1) * torch.Size(shape).numel() + cfg.steps + visual.numel())
    parts["trajectories"] += P * measured["condition_bytes"]
    parts["frozen"] = sum(frozen.values()) * dtype.itemsize
    parts["reward"] = sum(reward_bytes)
    # Decoding and scoring come while there are no gradients and nothing is kept for a backward pass.
    at_rest = sum(count for name, count in parts.items() if name not in ("gradients", "activations", "buffers"))
    waiting = parts["frozen"] + parts["reward"]  # with --offload in host memory while the network is trained
    peak = max(sum(parts.values()), at_rest + decoding, at_rest + scoring)
    if cfg.offload:  # one of these is on the GPU at a time; the encoders replace an unsharded network
        vae_bytes = frozen.get("vae", 0) * dtype.itemsize
        encoders = parts["frozen"] - vae_bytes - (parts["parameters"] if shard_size == 1 else 0)
        waits = max(encoders, vae_bytes + decoding, parts["reward"] + scoring)
        peak = max(sum(parts.values()) - waiting, at_rest - waiting + waits)
    public, state = checkpoint_bytes(cfg, whole, measured["trainable"], dtype)
    # What a process of a node reads into host memory at a time: of a reward its file and its model.
    read = whole * master, parts["frozen"], 2 * max(reward_bytes, default=0), painting
    # A save holds what the processes of the node write of the state, then the first one's public weights.
    host = max(*read, public // (2 if cfg.ema_decay else 1), state * node // cfg.processes)
    if cfg.offload:  # each process of the node: the frozen models, and its own network while prompts are encoded
        away = parts["parameters"] if shard_size == 1 else 0
        host = max(host + node * waiting, node * (waiting + away))
    gpu = {name: count / GIB for name, count in parts.items()}
    # Beside what was measured: the context, and the text embeddings that the run keeps.
    beside = CUDA_CONTEXT + PromptCache.SIZE * measured["condition_bytes"] / GIB
    gpu["buffers"] += beside
    peak = peak / GIB + beside
    result = {
        "processes": cfg.processes,
        "shard_size": shard_size,
        "fits": peak <= cfg.gpu_memory,
        "gpu_gib": {"peak": peak} | gpu,
        "host_gib": host / GIB + node * HOST_PROCESS,
        "checkpoint_gib": {"public": public / GIB, "state": state / GIB},
        "pflop": {
            "rollout": drawn / M * measured["forward_flops"] / 1e15,
            "update": learned / M * measured["forward_flops_update"] / 1e15,
        },
        "gathered_gib": (forwards + 2 * micro_batches) * gathered / GIB,
    }
    write_atomically(Path(cfg.output_dir, "dryrun.json"), json.dumps(result, indent=2) + "\n")
    print(text_of(result, cfg.gpu_memory), disk_needed(cfg, public, state)[1], sep="\n")
    return result


def _measure(cfg, world, counter: Counter, network_class, config, predict, shape, condition, lora_targets) -> dict:
    """Two micro-batches of an update, the second of which adds to the gradients of the first and reduces them."""
    master = world.dtype if cfg.lora_rank else torch.float32
    build = partial(loading.empty_network, network_class, config, dtype=master, lora_rank=cfg.lora_rank)
    build = partial(build, lora_targets=lora_targets, checkpointing=cfg.gradient_checkpointing)
    elements, network = sum(p.numel() for p in build().parameters()), build(quantized=cfg.quantize)
    parts = training_bytes(cfg, network, world.shard_size, world.dtype)
    for module in network.modules():  # from the meta device, where nothing is allocated, to the CPU
        for name, x in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            empty = torch.empty(x.shape, dtype=x.dtype)
            setattr(module, name, nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty)
    network = processes.shard(network, world)
    trained = processes.trainable(network)
    z, of_sample = torch.randn(cfg.micro_batch, *shape), condition(cfg.micro_batch)
    held, start = counter.tensors, counter.flops
    with torch.no_grad():
        predict(network, z, of_sample)
    forward = counter.flops - start
    counter.reset_peak()
    for last in (False, True):
        processes.sync_gradients(network, now=last)
        start = counter.flops
        torch.autograd.backward((predict(network, z, of_sample) ** 2).mean())
    sharded = isinstance(network, FSDPModule)
    parts["buffers"] = max(0, counter.peak_buffers - (parts["gradients"] if sharded else 0))
    parts["activations"] = counter.peak - held - parts["gradients"] - parts["buffers"]
    return {
        "bytes": parts,
        "elements": elements,
        "trainable": sum(p.numel() for p in trained),
        "forward_flops": forward,
        "forward_flops_update": counter.flops - start,
        "condition_bytes": sum(x.nbytes for x in of_sample) // cfg.micro_batch,
    }


def _measure_decode(counter: Counter, vae_class, config: dict, dtype, decode: Callable, z: Tensor) -> int:
    """Bytes that decoding latents z (M, ...) needs at its peak, beside the VAE's weights."""
    torch.set_default_dtype(dtype)
    vae = vae_class.from_config(config)
    torch.set_default_dtype(torch.float32)
    held = counter.tensors + counter.buffers
    counter.reset_peak()
    with torch.no_grad():
        decode(vae, z)
    return counter.peak - held


def text_of(result: dict, gpu_memory: float) -> str:
    gpu = result["gpu_gib"]
    lines = [f"{result['processes']} processes, {result['shard_size']} share a copy of the network"]
    lines += [f"  {name:<14}{gib:8.2f} GiB" for name, gib in gpu.items() if name != "peak"]
    verdict = "fits" if result["fits"] else "DOES NOT FIT"
    lines.append(f"  {'peak':<14}{gpu['peak']:8.2f} GiB on each GPU: {verdict} in {gpu_memory:g} GiB")
    checkpoint, pflop = result["checkpoint_gib"], result["pflop"]
    lines.append(f"host memory {result['host_gib']:.0f} GiB on each node")
    lines.append(f"a checkpoint {checkpoint['public']:.2f} GiB, and {checkpoint['state']:.2f} GiB to resume from")
    lines.append(
        f"an iteration on each GPU: {pflop['rollout']:.3g} PFLOP of rollout, {pflop['update']:.3g} of update, "
        f"{result['gathered_gib']:.0f} GiB of parameters received"
    )
    return "\n".join(lines)
