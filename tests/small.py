"""What the tests run the trainers on: the tiny models, and options that make a run last seconds."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

import grpo_video

TINY = {"reward_paths": "hps=tiny/hps,clip=tiny/clip", "prompts": "prompts/tiny.txt", "height": 64, "width": 64}
FAST = {"iterations": 3, "prompts_per_iteration": 2, "group_size": 4, "updates_per_rollout": 2, "steps": 5}
FAST |= {"micro_batch": 4, "num_samples": 2, "seed": 7, "learning_rate": 1e-4, "sample_every": 10}


@functools.cache
def random_hunyuan() -> str:
    """A HunyuanVideoPipeline folder with random weights, and SkyReels' transformer in `skyreels/` of it."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # cuts the pipeline's template into more than its 95 tokens
    captions = Path("prompts/tiny.txt").read_text().splitlines()
    special = trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"])
    words.train_from_iterator([*captions, DEFAULT_PROMPT_TEMPLATE["template"]], special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.padding_side = "right"
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
    )
    for i, parameter in enumerate(vae.decoder.parameters()):
        parameter.data *= 1.5 if i % 2 == 0 else 1.0  # so that videos differ
    transformers = [
        HunyuanVideoTransformer3DModel(
            in_channels=channels,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
            pooled_projection_dim=64,
            rope_axes_dim=(4, 6, 6),
            guidance_embeds=channels == 4,
        )
        for channels in (4, 8)
    ]
    folder = tempfile.mkdtemp(prefix="random-hunyuan-")
    HunyuanVideoPipeline(
        text_encoder=LlamaModel(llama),
        tokenizer=tokenizer,
        transformer=transformers[0],
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel.from_pretrained("tiny/flux/text_encoder"),
        tokenizer_2=CLIPTokenizer.from_pretrained("tiny/flux/tokenizer"),
    ).save_pretrained(folder)
    transformers[1].save_pretrained(Path(folder, "skyreels"))
    return folder


@functools.cache
def first_frames() -> str:
    """A folder with a first frame for every prompt of prompts/tiny.txt: eight pictures, used again and again."""
    folder = Path(tempfile.mkdtemp(prefix="first-frames-"))
    torch.manual_seed(0)
    for i in range(8):
        pixels = (torch.rand(4, 4, 3) * 255).byte().numpy()
        Image.fromarray(pixels).resize((80, 48)).save(folder / f"{i}.png")
    prompts = Path("prompts/tiny.txt").read_text().splitlines()
    rows = [json.dumps({"prompt": prompt, "image": f"{i % 8}.png"}) for i, prompt in enumerate(prompts)]
    (folder / "first_frames.jsonl").write_text("\n".join(rows) + "\n")
    return str(folder)


def options(trainer, task=None) -> dict:
    """Options of a run of seconds, in which every step but the last is stochastic and may be trained.

    Pictures by their tiny presets, video on random weights.
    """
    if trainer is not grpo_video:
        return {"preset": "tiny", "sde_window": 0, "eta": 0.7} | FAST
    video = {"task": task, "model": random_hunyuan(), "reward": "hps"} | TINY | FAST
    video |= {"keep_best_worst": 0, "height": 32, "width": 48, "frames": 1 if task == "t2i" else 5}
    video |= {"max_sequence_length": 32}
    if task == "i2v":
        video |= {"transformer": f"{random_hunyuan()}/skyreels", "first_frames": first_frames()}
    return video
