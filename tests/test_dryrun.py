"""The dry run predicts what a real run allocates, part by part, and says whether it fits."""

import dataclasses
import json

import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file

import grpo_flux
import grpo_video
from rewards import RewardError
from runtime import dryrun, families, loading, processes
from runtime.options import RunError
from sampling import flow_sigmas

ROWS, LENGTH = 8, 32  # of 64 x 64 pixels; text tokens
OPTIONS = {
    "dry_run": True,
    "processes": 1,
    "gpu_memory": 80.0,
    "dtype": "float32",
    "shard_size": 1,
    "offload": False,
    "lora_rank": 0,
}
OPTIONS |= {
    "prompts_per_iteration": 4,
    "group_size": 4,
    "steps": 5,
    "micro_batch": 4,
    "ema_decay": 0.5,
    "sde_window": 0,
}


def options(output_dir, **changes):
    return grpo_flux.Config(**grpo_flux.PRESETS["tiny"] | OPTIONS | changes | {"output_dir": str(output_dir)})


def real_run(cfg):
    """Bytes that one process allocates, by the code of a run."""
    world = processes.start_world()
    pipe = FluxPipeline.from_pretrained(cfg.model, transformer=None)
    prepare = {"lora_rank": cfg.lora_rank, "lora_targets": grpo_flux.LORA_TARGETS}
    transformer = loading.load_network(FluxTransformer2DModel, cfg.model, world, subfolder="transformer", **prepare)
    optimizer = torch.optim.AdamW(processes.trainable(transformer), lr=1e-5)
    ema = processes.EMA(transformer, cfg.ema_decay)
    captions = ["a red circle"] * cfg.prompts_per_iteration
    text = grpo_flux.encode_prompts(pipe, captions, LENGTH, world.device)
    keys = [(0, 0, p, g) for p in range(cfg.prompts_per_iteration) for g in range(cfg.group_size)]
    sigmas = flow_sigmas(cfg.steps, cfg.shift)
    shape, window = (ROWS * ROWS, transformer.config.in_channels), range(cfg.steps - 1)
    kept = grpo_flux.sample_groups(cfg, world, transformer, pipe.vae, text, keys, window, sigmas, shape, ROWS)
    first = [x[:2] for x in text]
    grpo_flux.velocity(transformer, kept[0][:2, 0], sigmas[0], first, cfg.guidance, ROWS).sum().backward()
    optimizer.step()
    frozen = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    return {
        "parameters": sum(p.nbytes for p in transformer.parameters()),
        "gradients": sum(p.grad.nbytes for p in transformer.parameters() if p.grad is not None),
        "optimizer": sum(x.nbytes for state in optimizer.state.values() for x in state.values()),
        "ema": sum(x.nbytes for x in ema.average),
        "trajectories": sum(x.nbytes for x in (*kept, *text)),
        "frozen": sum(p.nbytes for module in frozen for p in module.parameters()),
    }


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_dry_run_predicts_to_the_byte_what_a_run_allocates(tmp_path, lora_rank):
    cfg = options(tmp_path, lora_rank=lora_rank)
    predicted, real = grpo_flux.dry_run(cfg)["gpu_gib"], real_run(cfg)
    assert {name: predicted[name] * dryrun.GIB for name in real} == real


@pytest.mark.slow
def test_wan_is_counted_to_the_byte(tmp_path):
    cfg = grpo_video.Config(**grpo_video.PRESETS["tiny-wan"] | OPTIONS | {"output_dir": str(tmp_path)})
    predicted, pipe = grpo_video.dry_run(cfg)["gpu_gib"], WanPipeline.from_pretrained("tiny/wan")
    real = {"parameters": [pipe.transformer], "frozen": [pipe.vae, pipe.text_encoder]}
    for name, parts in real.items():
        assert predicted[name] * dryrun.GIB == sum(p.nbytes for part in parts for p in part.parameters())
    twice = grpo_video.dry_run(dataclasses.replace(cfg, true_guidance=1.0))["gpu_gib"]
    assert twice["activations"] == pytest.approx(predicted["activations"] / 2, rel=0.1)  # one pass, not two


@pytest.mark.slow
def test_sharding_divides_what_is_trained_and_costs_traffic(tmp_path):
    one, four = grpo_flux.dry_run(options(tmp_path)), grpo_flux.dry_run(options(tmp_path, processes=4, shard_size=4))
    for part in ("parameters", "gradients", "optimizer", "ema"):
        assert four["gpu_gib"][part] == pytest.approx(one["gpu_gib"][part] / 4, rel=0.01)
    assert one["gathered_gib"] == 0
    # 4 samples a process: 1 micro-batch of 5 steps, and 2 of training 4 samples at 2 of 4 steps, forward and backward
    elements = 1_751_952
    assert four["gathered_gib"] * dryrun.GIB == pytest.approx((5 + 2 * 2) * elements * 4 * 3 / 4)
    assert four["pflop"]["rollout"] == pytest.approx(one["pflop"]["rollout"] / 4)
    replicated = grpo_flux.dry_run(options(tmp_path, processes=4, shard_size=2))
    assert replicated["gpu_gib"]["gradients"] == pytest.approx(one["gpu_gib"]["gradients"] / 2, rel=0.01)


@pytest.mark.slow
def test_checkpointing_and_smaller_micro_batches_take_less_memory(tmp_path):
    plain = grpo_flux.dry_run(options(tmp_path))["gpu_gib"]["activations"]
    assert grpo_flux.dry_run(options(tmp_path, gradient_checkpointing=True))["gpu_gib"]["activations"] < 0.7 * plain
    assert grpo_flux.dry_run(options(tmp_path, micro_batch=2))["gpu_gib"]["activations"] < 0.6 * plain


@pytest.mark.slow
def test_the_result_is_written_and_says_whether_it_fits(tmp_path, capsys):
    result = grpo_flux.dry_run(options(tmp_path, gpu_memory=1.05, iterations=40, save_every=5))
    assert json.loads((tmp_path / "dryrun.json").read_text()) == result
    assert set(result) == {
        "processes", "shard_size", "fits", "gpu_gib", "host_gib", "checkpoint_gib", "pflop", "gathered_gib"
    }  # fmt: skip
    parts = "peak parameters gradients optimizer ema frozen reward activations buffers trajectories"
    assert set(result["gpu_gib"]) == set(parts.split())
    assert result["gpu_gib"]["peak"] == pytest.approx(sum(result["gpu_gib"].values()) - result["gpu_gib"]["peak"])
    text = capsys.readouterr().out
    assert not result["fits"] and "DOES NOT FIT in 1.05 GiB" in text
    gib = 8 * result["checkpoint_gib"]["public"] + 3 * result["checkpoint_gib"]["state"]
    assert f"checkpoints of the run: 8, with state at most 3 of them, {gib:.0f} GiB; {tmp_path} has " in text
    assert grpo_flux.dry_run(options(tmp_path, gpu_memory=2.0))["fits"]
    offloaded = grpo_flux.dry_run(options(tmp_path, offload=True))
    assert offloaded["gpu_gib"]["peak"] < result["gpu_gib"]["peak"]


def test_processes_that_do_not_divide_the_prompts_are_refused(tmp_path):
    with pytest.raises(RunError, match="--prompts-per-iteration 4 must be a multiple of the 3 processes"):
        grpo_flux.dry_run(options(tmp_path, processes=3))
    with pytest.raises(RunError, match="--shard-size must divide the 4 processes, got 3"):
        grpo_flux.dry_run(options(tmp_path, processes=4, shard_size=3))


@pytest.mark.parametrize(
    "network_class, elements, known",
    [
        (FluxTransformer2DModel, 11.9e9, {"guidance_embeds": True}),
        (HunyuanVideoTransformer3DModel, 12.8e9, {}),
        (WanTransformer3DModel, 1.42e9, families.Wan.full_size(grpo_video.Config(**grpo_video.PRESETS["wan"]))),
    ],
)
def test_without_the_hub_the_full_size_configurations_are_known(network_class, elements, known):
    config = dryrun.config_of(network_class, "somebody/not-on-this-machine", "transformer", **known)
    with torch.device("meta"):
        network = network_class.from_config(config)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(elements, rel=0.01)
    with pytest.raises(RunError, match="no folder 'nowhere/at/all'"):
        dryrun.config_of(network_class, "nowhere/at/all")


@pytest.mark.parametrize("file", ["weights.pt", "model.safetensors"])
def test_a_reward_is_counted_in_the_dtype_that_it_runs_in(tmp_path, file):
    weights = {"a": torch.zeros(300, 7, dtype=torch.float16), "b": torch.zeros(11, dtype=torch.float16)}
    (tmp_path / "config.json").write_text("{}")
    if file.endswith(".pt"):
        torch.save({"state_dict": weights}, tmp_path / file)
    else:
        save_file(weights, tmp_path / file)
    paths = {"hps": str(tmp_path), "videoalign": str(tmp_path)}
    assert dryrun.reward_bytes(["hps"], paths) == 4 * (300 * 7 + 11)
    assert dryrun.reward_bytes(["videoalign", "hps", "hps"], paths) == 6 * (300 * 7 + 11)
    assert dryrun.reward_bytes(["hps", "my_rewards.py:red"], {}) == 4 * 986_109_441
    (tmp_path / file).write_bytes(b"not weights" * 9)
    with pytest.raises(RewardError, match=r"^hps: could not load .*--reward-paths hps=FOLDER"):
        dryrun.reward_bytes(["hps"], paths)
