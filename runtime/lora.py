"""LoRA files, and what files of weights hold."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import read_json
from .options import require

LORA_FILE = "pytorch_lora_weights.safetensors"  # in a checkpoint, diffusers' usual name


def lora_config(network) -> Any:
    """peft's LoraConfig of a network that has a LoRA."""
    return network.peft_config["default"]


def public_lora(network: nn.Module, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """A network's LoRA as it is saved: W + B·A, with alpha = rank, so that it needs no metadata; and its metadata.

    weights: the trained ones, by the network's own names. alpha / rank, here 2, goes into B.
    """
    from peft import get_peft_model_state_dict

    config = lora_config(network)
    scale = config.lora_alpha / config.r
    layers = with_b_times(scale, get_peft_model_state_dict(network, weights))
    plain = {"r": config.r, "lora_alpha": config.r, "target_modules": config.to_dict()["target_modules"]}
    return layers, plain | {"rank_pattern": {}, "alpha_pattern": {}}  # what any version of peft knows


def read_lora(file: Path | str) -> dict[str, Tensor]:
    """The weights of a LoRA file, B scaled so that W + B·A is what it means.

    alpha comes from `.alpha` weights, from diffusers' metadata, or from the lora_config.json that the release's
    trainer writes beside the file; else it is the rank.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as content:
        weights = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        metadata = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "{}"))
    stored = {name.rpartition(".")[2]: value for name, value in metadata.items()}  # transformer.r, …
    beside = read_json(Path(file).with_name("lora_config.json")).get("lora_params", {})
    if beside and not stored:
        stored = {"lora_alpha": beside["lora_alpha"]}
    require(not stored.get("alpha_pattern"), f"{file}: every layer has an alpha of its own; take a file without")
    alphas = {
        name.removesuffix(".alpha"): weights.pop(name).item() for name in list(weights) if name.endswith(".alpha")
    }
    for name in [name for name in weights if ".lora_B." in name]:
        layer, rank = name.partition(".lora_B.")[0], weights[f"{name.rpartition('.')[0]}.weight"].shape[1]  # its own
        alpha = alphas.get(layer, stored.get("lora_alpha", rank))
        weights[name] = weights[name] * alpha / (rank**0.5 if stored.get("use_rslora") else rank)
    return weights


def load_adapter(network: nn.Module, file: Path) -> None:
    """Copy a LoRA file's weights into a network's. Names in the file begin with the component's."""
    from peft import set_peft_model_state_dict

    config = lora_config(network)
    scale = config.lora_alpha / config.r
    weights = {name.partition(".")[2]: weight for name, weight in read_lora(file).items()}
    set_peft_model_state_dict(network, with_b_times(1 / scale, weights))


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


def with_b_times(factor: float, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a LoRA with every B multiplied by the factor."""
    return {name: factor * weight if ".lora_B." in name else weight for name, weight in weights.items()}


def shapes_in(file: Path) -> dict[str, list[int]]:
    """{name: shape} of the tensors in a file of weights, which are not read."""
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    stored = torch.load(file, map_location="meta", weights_only=True)
    return {name: list(weight.shape) for name, weight in stored.get("state_dict", stored).items()}
