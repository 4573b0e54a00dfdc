"""What the tests run the trainers on: the tiny models, and options that make a run last seconds."""

import functools
import tempfile

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import grpo_flux
import grpo_sd

TINY = {"reward_paths": "hps=tiny/hps,clip=tiny/clip", "prompts": "prompts/tiny.txt", "height": 64, "width": 64}
FAST = {"iterations": 3, "prompts_per_iteration": 2, "group_size": 4, "updates_per_rollout": 2, "steps": 5}
FAST |= {"micro_batch": 4, "num_samples": 2, "seed": 7, "learning_rate": 1e-4, "sample_every": 10}


@functools.cache
def random_sd() -> str:
    """A StableDiffusionPipeline folder with random weights, in the layout of the real one."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    folder = tempfile.mkdtemp(prefix="random-sd-")
    tokenizer = CLIPTokenizer.from_pretrained("tiny/flux/tokenizer")
    encoder = CLIPTextModel.from_pretrained("tiny/flux/text_encoder")
    StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, None, None, None, False).save_pretrained(folder)
    return folder


def options(trainer) -> dict:
    """Options of a run of seconds: FLUX by its tiny preset, Stable Diffusion on random weights."""
    if trainer is grpo_flux:
        return {"preset": "tiny", "sde_window": 0} | FAST
    assert trainer is grpo_sd
    return {"model": random_sd(), "guidance": 2.0} | TINY | FAST
