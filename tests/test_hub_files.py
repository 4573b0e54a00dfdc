"""Models in the layouts of the hub's repositories, written by the libraries of 2024 and 2025, see golden/README.md.

Expected values are those of the stock pipelines of diffusers 0.33 and transformers 4.48.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import grpo_flux
import grpo_sd
import grpo_video
from rewards import PickScoreReward
from runtime import processes
from runtime.options import parse_config

HUB = Path(__file__).resolve().parent / "golden/hub"
CASES = json.loads((HUB / "cases.json").read_text(encoding="utf-8"))
PROMPTS = CASES["prompts"]
EXPECTED = load_file(HUB / "expected.safetensors")
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def world():
    return processes.start_world("float32")


def load(trainer, world, *words):
    """The pipeline and its trained network, loaded by the trainer."""
    cfg = parse_config(trainer.Config, trainer.PRESETS, list(words))
    pipe, network, _ = trainer.load_models(cfg, world, None)
    return cfg, pipe, network


def same(found, expected):
    torch.testing.assert_close(found.float(), expected, **CLOSE)


def ids(tokenizer, prompts=PROMPTS):
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


@torch.no_grad()
def test_stable_diffusion(world):
    _, pipe, unet = load(grpo_sd, world, "--model", str(HUB / "stable-diffusion-v1-4"))
    assert ids(pipe.tokenizer) == CASES["ids"]["clip"]
    text = grpo_sd.encode_prompts(pipe, PROMPTS, 5.0, "cpu")  # (P, 2, L, D)
    same(text[:, 0], EXPECTED["sd.empty"])
    same(text[:, 1], EXPECTED["sd.text"])
    z = EXPECTED["sd.z"]
    same(grpo_sd.predict(unet, z, torch.tensor(501), EXPECTED["sd.text"][:, None], 1.0), EXPECTED["sd.eps"])
    same(grpo_sd.decode(pipe.vae, z), EXPECTED["sd.image"])
    timesteps, alpha_bars, _ = grpo_sd.ddim_schedule(pipe.scheduler.config, 10, "cpu")
    assert timesteps.tolist() == EXPECTED["sd.timesteps"].tolist()
    same(alpha_bars, EXPECTED["sd.alpha_bars"])


@torch.no_grad()
def test_flux(world):
    _, pipe, transformer = load(grpo_flux, world, "--model", str(HUB / "FLUX.1-dev"))
    assert ids(pipe.tokenizer) == CASES["ids"]["clip"]
    assert ids(pipe.tokenizer_2) == CASES["ids"]["t5"]
    tokens, pooled = text = grpo_flux.encode_prompts(pipe, PROMPTS, 48, "cpu")
    same(tokens, EXPECTED["flux.tokens"])
    same(pooled, EXPECTED["flux.pooled"])
    v = grpo_flux.velocity(transformer, EXPECTED["flux.z"], EXPECTED["flux.sigma"], text, 3.5, 4)
    same(v, EXPECTED["flux.v"])
    same(grpo_flux.decode(pipe.vae, EXPECTED["flux.z"], 4), EXPECTED["flux.image"])


def video(world, model, frames=5, *words):
    cfg, pipe, transformer = load(grpo_video, world, "--model", str(HUB / model), *words)
    return cfg, pipe, transformer


def text_of(pipe, cfg):
    """Of the four prompts: tokens (P, n, L, D) and what else the family's encoder gives, without first frames."""
    return grpo_video.encode(pipe, PROMPTS, {}, (4, 2, 4, 4), cfg, "cpu")


@torch.no_grad()
def test_hunyuan_video(world):
    words = ["--guidance", "6", "--max-sequence-length", "400"]
    cfg, pipe, transformer = load(grpo_video, world, "--model", str(HUB / "HunyuanVideo"), *words)
    assert ids(pipe.tokenizer) == CASES["ids"]["llama"]
    assert ids(pipe.tokenizer_2) == CASES["ids"]["clip"]
    tokens, mask, pooled, _ = condition = text_of(pipe, cfg)
    length = tokens.shape[2]
    same(mask[:, 0], EXPECTED["hunyuan.mask"][:, :length].float())
    assert EXPECTED["hunyuan.mask"][:, length:].sum() == 0
    same(tokens[:, 0] * mask[:, 0, :, None], EXPECTED["hunyuan.tokens"][:, :length] * mask[:, 0, :, None])
    same(pooled[:, 0], EXPECTED["hunyuan.pooled"])
    sigma = EXPECTED["hunyuan.time"] / 1000
    same(grpo_video.velocity(transformer, EXPECTED["hunyuan.z"], sigma, condition, cfg), EXPECTED["hunyuan.v"])
    same(grpo_video.decode(pipe.vae, EXPECTED["hunyuan.z"][:1]).transpose(1, 2), EXPECTED["hunyuan.video"])


@torch.no_grad()
def test_skyreels(world):
    words = ["--transformer", str(HUB / "SkyReels-V1-Hunyuan-I2V"), "--guidance", "1", "--max-sequence-length", "400"]
    cfg, pipe, transformer = load(grpo_video, world, "--model", str(HUB / "HunyuanVideo"), *words)
    *text, _ = text_of(pipe, cfg)
    condition, sigma = [*text, EXPECTED["skyreels.frame"]], EXPECTED["hunyuan.time"] / 1000
    same(grpo_video.velocity(transformer, EXPECTED["hunyuan.z"], sigma, condition, cfg), EXPECTED["skyreels.v"])


@torch.no_grad()
def test_wan(world):
    words = ["--preset", "wan", "--true-guidance", "1", "--max-sequence-length", "64"]
    cfg, pipe, transformer = load(grpo_video, world, *words, "--model", str(HUB / "Wan2.1-T2V-1.3B-Diffusers"))
    assert ids(pipe.tokenizer) == CASES["ids"]["t5"]
    tokens, _ = condition = text_of(pipe, cfg)
    same(tokens[:, 0], EXPECTED["wan.tokens"])
    sigma = EXPECTED["hunyuan.time"] / 1000
    same(grpo_video.velocity(transformer, EXPECTED["wan.z"], sigma, condition, cfg), EXPECTED["wan.v"])
    same(grpo_video.decode(pipe.vae, EXPECTED["wan.z"][:1]).transpose(1, 2), EXPECTED["wan.video"])


def test_pickscore():
    reward = PickScoreReward(str(HUB / "PickScore_v1"))
    same(reward(EXPECTED["pickscore.images"], PROMPTS), EXPECTED["pickscore.score"])
