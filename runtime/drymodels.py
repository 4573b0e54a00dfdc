"""What --dry-run needs to know about the models: their configurations, sizes and conditions; without weights."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import torch
from torch import Tensor, nn

from . import families, loading
from .options import Lazy, check_options, check_size, require
from .processes import compute_dtype

diffusers = Lazy("diffusers")

# AutoencoderKL of Stable Diffusion v1.4; FLUX's has 16 latent channels and a shift.
VAE: dict = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
VAE |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


# Each function gives arguments of `dryrun.run`. Numbers are those of the full-size models, for files that are not here.


def stable_diffusion(cfg) -> dict:
    check_options(cfg)
    kind, dtype = diffusers.UNet2DConditionModel, compute_dtype(cfg.dtype)
    config = config_of(kind, cfg.model, "unet", sample_size=64, cross_attention_dim=768)
    vae = config_of(diffusers.AutoencoderKL, cfg.model, "vae", **VAE)
    side, n = 2 ** (len(vae["block_out_channels"]) - 1), 1 if cfg.guidance == 1 else 2
    check_size(cfg, side)
    return dict(
        network_class=kind, config=config, vae=(diffusers.AutoencoderKL, vae), fits_whole=True,
        shape=(config["in_channels"], cfg.height // side, cfg.width // side),
        condition=lambda b: torch.empty(b, n, 77, config["cross_attention_dim"], dtype=dtype),
        frozen=frozen_parameters(cfg.model, {"vae": 83_653_863, "text_encoder": 123_060_480}),
    )  # fmt: skip


def flux(cfg) -> tuple[int, dict]:
    """→ rows of image tokens, and the arguments."""
    check_options(cfg)
    kind, dtype, length = diffusers.FluxTransformer2DModel, compute_dtype(cfg.dtype), cfg.max_sequence_length
    config = config_of(kind, cfg.model, "transformer", guidance_embeds=True)
    vae = config_of(diffusers.AutoencoderKL, cfg.model, "vae", **VAE, latent_channels=16, shift_factor=0.1159)
    patch = 2 ** len(vae["block_out_channels"])  # pixels along the side of a token
    check_size(cfg, patch)
    rows, columns = cfg.height // patch, cfg.width // patch
    known = {"vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}
    return rows, dict(
        network_class=kind, config=config, vae=(diffusers.AutoencoderKL, vae), fits_whole=cfg.lora_rank > 0,
        shape=(rows * columns, config["in_channels"]), frozen=frozen_parameters(cfg.model, known),
        condition=lambda b: (
            torch.empty(b, length, config["joint_attention_dim"], dtype=dtype),
            torch.empty(b, config["pooled_projection_dim"], dtype=dtype),
        ),
    )  # fmt: skip


def video(cfg) -> dict:
    check_options(cfg)
    loading.check_path("--model", cfg.model)
    default = families.Wan if cfg.model.startswith("Wan-AI/") else families.HunyuanVideo
    folder = here(cfg.model, "model_index.json")
    family = families.PIPELINES.get(loading.pipeline_index(folder)["_class_name"], default) if folder else default
    kind, vae_kind = getattr(diffusers, family.transformer), getattr(diffusers, family.vae)
    config = config_of(kind, **families.transformer_source(cfg), **family.full_size(cfg))
    vae, dtype = config_of(vae_kind, cfg.model, "vae"), compute_dtype(cfg.dtype)
    families.check_sizes(cfg, dict(config) | {"_class_name": family.transformer}, vae)
    shape, n = families.latent_shape(cfg, config, *(vae[name] for name in family.strides)), 1 + (cfg.true_guidance != 1)

    def condition(b: int) -> list[Tensor]:  # as `encode` in grpo_video.py gives it
        text = [torch.empty(b, n, *size, dtype=dtype) for size in family.sizes(config, cfg.max_sequence_length)]
        return [*text, torch.empty(b, config["in_channels"] - config["out_channels"], *shape[1:])]

    return dict(
        network_class=kind, config=config, vae=(vae_kind, vae), fits_whole=cfg.lora_rank > 0, shape=shape,
        condition=condition, frozen=frozen_parameters(cfg.model, family.frozen),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- configurations


def config_of(network_class: type, path: str, subfolder: str | None = None, option: str = "--model", **known) -> dict:
    """The configuration of a diffusers model, from its folder or the hub's cache; nothing is downloaded.

    Where there is neither, the class's defaults and `known`: the model that this script's --model names by default.
    Raises RunError if a folder is not complete, or is that of another model.
    """
    loading.check_path(option, path)
    expected = network_class.__name__
    if folder := here(path, f"{subfolder}/config.json" if subfolder else "config.json"):
        config = loading.load_config(folder, subfolder, option)
        found = config["_class_name"]
        require(found == expected, f"{option} {path}: its {subfolder or 'network'} is a {found}, not a {expected}")
        return config
    print(f"{path} is not on this machine; its {subfolder or 'network'} is assumed to be the full-size {expected}")
    return loading.default_config(network_class) | known


def here(path: str, file: str) -> str:
    """The path if it is a folder, else its folder in the hub's cache if that has the file; else ""."""
    if Path(path).is_dir():
        return path
    repo, _, revision = path.partition("@")
    found = huggingface_hub.try_to_load_from_cache(repo, file, revision=revision or None)
    return found.removesuffix(f"/{file}") if isinstance(found, str) else ""


def frozen_parameters(path: str, known: dict[str, int], trained: Sequence[str] = ("transformer", "unet")) -> dict:
    """Parameters of each network of a pipeline but the trained one; where its files are not here, those `known`."""
    folder = here(path, "model_index.json")
    if not folder:
        return known
    counts = {}
    for name, (library, class_name) in loading.component_names(Path(folder, "model_index.json"), "--model").items():
        if name in trained or name.startswith("tokenizer") or library not in ("diffusers", "transformers"):
            continue
        model_class = getattr(importlib.import_module(library), class_name, object)
        if issubclass(model_class, nn.Module):
            with torch.device("meta"):
                if library == "diffusers":
                    model = model_class.from_config(loading.load_config(folder, name))
                else:
                    load = model_class.config_class.from_pretrained
                    model = model_class(loading.load_pretrained(load, f"{folder}/{name}"))
            counts[name] = sum(parameter.numel() for parameter in model.parameters())
    return counts
