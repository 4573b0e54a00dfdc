"""The memory of a GPU: what training must hold there, and whether that fits, asked before anything is loaded."""

import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from . import loading
from .checkpoints import GIB
from .options import Lazy, RunError
from .processes import World, trainable
from .quantize import QuantizedLinear

diffusers = Lazy("diffusers")


def training_bytes(config, network: nn.Module, shard_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of weights, gradients, AdamW's state and EMA on a GPU: exactly those of the first process of a copy.

    It holds the most: FSDP cuts each parameter along its first dimension. network: as `loading.empty_network` makes it;
    dtype: that the KL term's reference policy is kept in. Activations and frozen models are not in these sums.
    """

    def held(parameters: Iterable[nn.Parameter], itemsize: int = 0) -> int:
        rows = ((p, -(-len(p) // shard_size)) for p in parameters)
        return sum(p.numel() // len(p) * n * (itemsize or p.itemsize) for p, n in rows)

    trained, reference = trainable(network), config.kl_weight and not config.lora_rank
    return {
        "parameters": held(network.parameters())
        + sum(x.nbytes for m in network.modules() if isinstance(m, QuantizedLinear) for x in m.buffers())  # not cut
        + (held(network.parameters(), dtype.itemsize) if reference else 0),
        "gradients": held(trained),
        "optimizer": 2 * held(trained) + 4 * len(trained),  # two moments, and a count of the steps
        "ema": held(trained) if config.ema_decay else 0,
    }


def gpu_memory(device: torch.device) -> int | None:
    """Bytes of an accelerator's memory; None where torch cannot tell."""
    ask = getattr(torch.get_device_module(device), "get_device_properties", None)
    return getattr(ask(device), "total_memory", None) if ask else None


def require_fit(config, world: World, component: str, lora_targets: Sequence[str]) -> None:
    """Raise RunError if `training_bytes` alone exceed the GPU's memory. What passes may still be too large.

    component: the trained network's name in the pipeline.
    """
    memory, transformer = gpu_memory(world.device), getattr(config, "transformer", "")
    if memory is None:
        return
    place = (transformer, None, "--transformer") if transformer else (config.model, component, "--model")
    original = loading.load_config(*place)
    dtype, kind = world.dtype if config.lora_rank else torch.float32, getattr(diffusers, original["_class_name"])
    prepare = {"lora_rank": config.lora_rank, "lora_targets": lora_targets, "quantized": config.quantize}
    network = loading.empty_network(kind, original, dtype=dtype, **prepare)

    def needed(shard_size: int) -> int:
        return sum(training_bytes(config, network, shard_size, world.dtype).values())

    if needed(world.shard_size) <= memory:
        return
    prompts, advice = config.prompts_per_iteration, []
    sizes = [n for n in range(world.shard_size + 1, prompts + 1) if prompts % n == 0 and not config.quantize]
    if fit := [n for n in sizes if needed(n) <= memory]:
        advice.append(f"start {fit[0]} processes or a multiple of {fit[0]}, with --shard-size {fit[0]}")
    if not config.lora_rank:
        presets, default = inspect.getmodule(type(config)).PRESETS, type(config).model
        loras = [n for n, p in presets.items() if p.get("lora_rank") and p.get("model", default) == config.model]
        advice.append("train a LoRA: " + (f"--preset {loras[0]}" if loras else "--lora-rank 64"))
    elif not config.quantize:
        advice.append("give --quantize nf4")
    what, taken = f"{place[0]}: weights, gradients, AdamW's moments and EMA", needed(world.shard_size) / GIB
    advice = ", or ".join(advice) or "take a smaller model"
    raise RunError(f"{what} take {taken:.1f} GiB of each GPU, which has {memory / GIB:.1f} GiB; {advice}")
