"""What differs between the video models: text encoders, arguments, sizes, and where their parts lie.

Each family is a namespace, without instances. N texts, L tokens, D width of the text embedding.
"""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import data, loading
from .options import Lazy, check_size, require
from .processes import World

diffusers = Lazy("diffusers")


class HunyuanVideo:
    """HunyuanVideo, and SkyReels-I2V."""

    pipeline, transformer, vae = "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo"
    strides = "temporal_compression_ratio", "spatial_compression_ratio"  # frames and pixels of an element of a latent
    frozen: ClassVar = {"vae": 246_493_891, "text_encoder": 7_504_924_672, "text_encoder_2": 123_060_480}  # parameters

    @staticmethod
    def full_size(cfg) -> dict:
        """Where its transformer differs from diffusers' defaults."""
        return dict(guidance_embeds=True) | ({"in_channels": 32} if cfg.transformer else {})

    @staticmethod
    def encode(pipe, texts: list[str], length: int, device) -> list[Tensor]:
        """Llama embedding of each token (N, L, D), attention mask (N, L), pooled CLIP embedding (N, D').

        L is the length of the longest of these texts, not max_sequence_length: attention over padding costs as much.
        """
        tokens, pooled, mask = pipe.encode_prompt(texts, device=device, max_sequence_length=length)
        length = int(mask.sum(1).max())
        return [tokens[:, :length], mask[:, :length].to(tokens), pooled]

    @staticmethod
    def sizes(config: dict, length: int) -> list[tuple]:  # of a text in `encode`
        return [(length, config["text_embed_dim"]), (length,), (config["pooled_projection_dim"],)]

    @staticmethod
    def arguments(config, sigma: Tensor, text: list[Tensor], cfg) -> dict:
        """What the transformer takes beside latents, time and tokens. Guidance is multiplied by 1000, as time is."""
        guidance = torch.full_like(sigma, 1000 * cfg.guidance) if config.guidance_embeds else None
        return dict(encoder_attention_mask=text[1], pooled_projections=text[2], guidance=guidance)


class Wan:
    """Wan 2.1, text to video: cross-attention to UMT5's tokens, classifier-free guidance only."""

    pipeline, transformer, vae = "WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan"
    strides = "scale_factor_temporal", "scale_factor_spatial"
    frozen: ClassVar = {"vae": 126_892_531, "text_encoder": 5_680_910_336}

    @staticmethod
    def full_size(cfg) -> dict:
        return dict(num_attention_heads=12, num_layers=30, ffn_dim=8960) if "1.3B" in cfg.model else {}  # else 14B

    @staticmethod
    def encode(pipe, texts: list[str], length: int, device) -> list[Tensor]:
        """Embedding of each token (N, L, D), L is `length`. Padding is zeros and is attended to: there is no mask."""
        tokens, _ = pipe.encode_prompt(texts, None, False, device=device, max_sequence_length=length)
        return [tokens]

    @staticmethod
    def sizes(config: dict, length: int) -> list[tuple]:
        return [(length, config["text_dim"])]

    @staticmethod
    def arguments(config, sigma: Tensor, text: list[Tensor], cfg) -> dict:
        return {}


FAMILIES = {family.transformer: family for family in (HunyuanVideo, Wan)}
PIPELINES = {family.pipeline: family for family in FAMILIES.values()}


def family_of(transformer) -> type:
    names = (kind.__name__ for kind in type(transformer).__mro__)  # FSDP makes a subclass
    return next(FAMILIES[name] for name in names if name in FAMILIES)


def transformer_source(cfg) -> dict:
    """Where the transformer lies: in --transformer, or else in --model."""
    if cfg.transformer:
        return {"path": cfg.transformer, "option": "--transformer"}
    return {"path": cfg.model, "subfolder": "transformer"}


def transformer_config(cfg) -> dict:
    """The transformer's config. Its class must be the one that --model's pipeline needs."""
    expected = PIPELINES[loading.check_family(cfg.model, *PIPELINES)].transformer
    config = loading.load_config(**transformer_source(cfg))
    found = config["_class_name"]
    require(found == expected, f"--transformer {cfg.transformer} is a {found}, not a {expected}")
    return config


def takes_first_frame(config: dict) -> bool:
    """Is it image to video? SkyReels takes twice the channels of a latent: the second half is the first frame."""
    return config["in_channels"] == 2 * config["out_channels"]


def latent_shape(cfg, config: dict, stride: int, side: int) -> tuple[int, int, int, int]:
    """(C, f, h, w) of a video's latent; stride, side: frames, and pixels in height and width, of an element."""
    return (config["out_channels"], (cfg.frames - 1) // stride + 1, cfg.height // side, cfg.width // side)


def load_models(cfg, world: World, init: Path | None, lora_targets: tuple[str, ...]) -> tuple:
    """→ the pipeline, its transformer ready to train, and the KL term's reference policy: the weights of --model."""
    config = transformer_config(cfg)
    family = FAMILIES[config["_class_name"]]
    pipeline = "HunyuanSkyreelsImageToVideoPipeline" if takes_first_frame(config) else family.pipeline
    kinds = getattr(diffusers, pipeline), getattr(diffusers, family.transformer)
    models = loading.load_models(*kinds, cfg, world, init, lora_targets, **transformer_source(cfg))
    for network in dict.fromkeys(models[1:]) if family is HunyuanVideo else ():
        drop_full_masks(network)
    return models


def check_sizes(cfg, network: dict, vae: dict) -> None:
    """Raise RunError unless a model with these configs takes the height, width, frames and guidance of the run."""
    family, patch = FAMILIES[network["_class_name"]], network["patch_size"]
    stride, side = (vae[name] for name in family.strides)
    check_size(cfg, side * (patch if isinstance(patch, int) else patch[-1]))
    least = 2 if takes_first_frame(network) else 1
    message = f"--frames must be one more than a multiple of {stride}, and at least {least} here, got {cfg.frames}"
    require(cfg.frames >= least and cfg.frames % stride == 1 % stride, message)
    message = f"--guidance is embedded guidance, which {cfg.model} lacks; give --guidance 1, and --true-guidance"
    require(family is not Wan or cfg.guidance == 1, message)


def first_frame_latents(
    pipe, prompts: list[str], pictures: dict[str, Path], shape: tuple, size: tuple[int, int], device
) -> Tensor:
    """Latents of the first frame, followed by zeros, (P, C, f, h, w); with 0 channels if there are no pictures.

    pictures: {prompt: file}; shape (C, f, h, w); size: height and width in pixels.
    """
    latents = torch.zeros(len(prompts), shape[0] if pictures else 0, *shape[1:], device=device)
    for latent, prompt in zip(latents, prompts if pictures else [], strict=False):
        pixels = pipe.video_processor.preprocess(data.read_picture(pictures[prompt]), *size)
        # The posterior's mode; the stock pipeline samples. A condition must not add randomness to the policy.
        frame = pipe.vae.encode(pixels[:, :, None].to(device, pipe.vae.dtype)).latent_dist.mode()[0]  # (C, 1, h, w)
        latent[:, :1] = frame * pipe.vae.config.scaling_factor
    return latents


def drop_full_masks(network) -> None:
    """HunyuanVideo's blocks get None instead of an attention mask that masks nothing: with any mask, flash attention
    cannot be used. Texts are padded to the longest prompt of the process; here they are cut to that of the batch.

    The network decides once for all its blocks, outside what --compile compiles: inside, asking the device for a value
    would break the graph of every block.
    """
    decided = {"full": False}

    def decide(network: nn.Module, args: tuple, kwargs: dict) -> tuple:
        names = "encoder_hidden_states", "encoder_attention_mask"
        length = max(int(kwargs[names[1]].any(0).sum()), 1)  # texts are padded at the end
        kwargs |= {name: kwargs[name][:, :length] for name in names}
        decided["full"] = bool(kwargs[names[1]].all())
        return args, kwargs

    def drop(block: nn.Module, args: tuple) -> tuple:  # the mask is the fourth argument of a block
        return (*args[:3], None, *args[4:]) if decided["full"] else args

    network.register_forward_pre_hook(decide, with_kwargs=True)
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        block.register_forward_pre_hook(drop)
