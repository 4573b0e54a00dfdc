"""The dry run predicts what a real run allocates, part by part, and says whether it fits."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch._subclasses import FakeTensorMode

import grpo_flux
import grpo_sd
import grpo_video
from rewards import CLIPReward, HPSReward, PickScoreReward, RewardError, VideoAlignReward
from runtime import drymodels, dryreward, dryrun, families, loading, processes
from runtime.options import RunError
from sampling import distinct, flow_sigmas

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
    sharded = options(tmp_path, processes=4, shard_size=4, updates_per_rollout=1)
    one, four = grpo_flux.dry_run(options(tmp_path)), grpo_flux.dry_run(sharded)
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
@pytest.mark.parametrize("micro_batch", [2, 4, 64])
def test_a_groups_first_step_is_counted_once(micro_batch, tmp_path):
    changes = {"micro_batch": micro_batch, "updates_per_rollout": 2, "timestep_fraction": 0.5}
    shared, own = (grpo_flux.dry_run(options(tmp_path, shared_noise=x, **changes))["pflop"] for x in (True, False))
    P, G, T = 4, 4, 5

    def evaluated(pairs):
        chunks = [pairs[i : i + micro_batch] for i in range(0, len(pairs), micro_batch)]
        return sum(len(distinct(chunk, G, True)[0]) for chunk in chunks)

    drawn = sum(evaluated([(b, t) for b in range(P * G)]) for t in range(T))
    assert shared["rollout"] / own["rollout"] == pytest.approx(drawn / (P * G * T))
    learned, rng = [], np.random.default_rng(0)
    for _ in range(300):  # half of each group's samples in an update, two of four steps of each
        samples = [p * G + g for p in range(P) for g in grpo_flux.deal(range(G), 2, rng)[0]]
        pairs = [(b, t) for b in samples for t in grpo_flux.choose_steps(range(T - 1), 0.5, "random", rng)]
        learned.append(evaluated(sorted(pairs, key=lambda pair: pair[1])) / len(pairs))
    assert shared["update"] / own["update"] == pytest.approx(sum(learned) / 300, rel=0.06)


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
    assert f"checkpoints of the run: 8, with state at most 3 of them, {gib:.3g} GiB; {tmp_path} has " in text
    assert grpo_flux.dry_run(options(tmp_path, gpu_memory=2.0))["fits"]
    offloaded = grpo_flux.dry_run(options(tmp_path, offload=True))
    assert offloaded["gpu_gib"]["peak"] < result["gpu_gib"]["peak"]


def test_processes_that_do_not_divide_the_prompts_are_refused(tmp_path):
    with pytest.raises(RunError, match="--prompts-per-iteration 4 must be a multiple of the 3 processes"):
        grpo_flux.dry_run(options(tmp_path, processes=3))
    with pytest.raises(RunError, match="--shard-size must divide the 4 processes, got 3"):
        grpo_flux.dry_run(options(tmp_path, processes=4, shard_size=3))


@pytest.mark.parametrize(
    "trainer, wrong, message",
    [
        (grpo_sd, {"width": 508}, "--width must be a multiple of 8"),
        (grpo_flux, {"height": 712}, "--height must be a multiple of 16"),
        (grpo_video, {"frames": 50}, "--frames must be one more than a multiple of 4"),
        (grpo_video, {"height": 488}, "--height must be a multiple of 16"),
    ],
)
def test_sizes_that_training_would_refuse_are_refused(trainer, wrong, message, tmp_path):
    with pytest.raises(RunError, match=message):
        trainer.dry_run(trainer.Config(output_dir=str(tmp_path), **wrong))


@pytest.mark.parametrize(
    "network_class, elements, known",
    [
        (FluxTransformer2DModel, 11.9e9, {"guidance_embeds": True}),
        (HunyuanVideoTransformer3DModel, 12.8e9, {}),
        (WanTransformer3DModel, 1.42e9, families.Wan.full_size(grpo_video.Config(**grpo_video.PRESETS["wan"]))),
    ],
)
def test_without_the_hub_the_full_size_configurations_are_known(network_class, elements, known):
    config = drymodels.config_of(network_class, "somebody/not-on-this-machine", "transformer", **known)
    with torch.device("meta"):
        network = network_class.from_config(config)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(elements, rel=0.01)
    with pytest.raises(RunError, match="no folder 'nowhere/at/all'"):
        drymodels.config_of(network_class, "nowhere/at/all")


# ------------------------------------------------------------------------------------------------------- the rewards

SCORERS = {"hps": HPSReward, "clip": CLIPReward, "pickscore": PickScoreReward, "videoalign": VideoAlignReward}
PROMPT = "two red circles and a blue square " * 20
FOLDERS = {name: f"tiny/{name}" for name in SCORERS} | {"pickscore": "tests/golden/hub/PickScore_v1"}


def measured(spec, shape, fps=None, paths=FOLDERS, buffers=0):
    """Bytes of the models, and of what scoring one sample of this shape takes beside them.

    buffers: bytes that FSDP holds meanwhile.
    """
    counter = dryrun.Counter()
    counter.buffers = buffers
    with FakeTensorMode(), counter:
        return dryreward.measure(spec, paths, torch.empty(1, *shape), fps, counter)


def taken(scorer, count, shape, *fps):
    """Bytes that scoring so many samples takes at its peak, by the tensors of a real call."""
    visuals, counter = torch.rand(count, *shape), dryrun.Counter()
    for tensor in (visuals, *scorer.model.state_dict().values()):
        counter.seen.add(tensor.untyped_storage())  # was there before
    with counter:
        scorer(visuals, [PROMPT] * count, *fps)
    return counter.peak


@pytest.mark.parametrize("name", SCORERS)
def test_a_reward_is_counted_as_a_real_one_scores(name, monkeypatch):
    scorer, is_video = SCORERS[name](FOLDERS[name]), name == "videoalign"
    shape, fps = ((9, 3, 32, 48), (2.0,)) if is_video else ((3, 64, 96), ())
    if is_video:  # as on a GPU
        scorer.model.bfloat16()
        tokens = len(scorer.tokenizer(scorer.text(PROMPT, (2, 4, 6))).input_ids) - 2 * 4 * 6 // 4
        monkeypatch.setattr(dryreward, "QUESTION", tokens)
    (size,), most = measured("vq,ta" if is_video else name, shape, *fps)
    assert size == sum(p.nbytes for p in scorer.model.parameters())
    # The others' masks, and the frames of videos, which are resized one by one, count in models that are so small.
    assert (0.97 if name in ("hps", "clip") else 0.85) < taken(scorer, 16, shape, *fps) / (16 * most) < 1.01


def test_what_fsdp_holds_is_not_counted_as_the_reward_s():
    assert measured("hps", (3, 64, 64), buffers=dryrun.GIB) == measured("hps", (3, 64, 64))


def test_an_image_reward_of_a_video_scores_eight_frames():
    copied = 4 * 8 * 3 * 64 * 64  # of nine frames
    assert measured("hps", (9, 3, 64, 64))[1] == pytest.approx(8 * measured("hps", (3, 64, 64))[1] + copied, rel=0.01)


def test_of_several_rewards_the_largest_counts_and_ones_own_function_is_not_known():
    sizes, most = measured("hps,clip:0.5,my_rewards.py:red", (3, 64, 64))
    assert sizes == measured("hps", (3, 64, 64))[0] + measured("clip", (3, 64, 64))[0]
    assert most == max(measured(name, (3, 64, 64))[1] for name in ("hps", "clip"))
    assert measured("geneval,my_rewards.py:red", (3, 64, 64)) == ([], 0)
    with pytest.raises(RewardError, match="videoalign judges video"):
        measured("vq", (3, 64, 64))


def test_a_reward_whose_config_is_damaged_ends_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    for name in ("hps", "videoalign"):
        with pytest.raises(RewardError, match=rf"^{name}: could not load .*--reward-paths {name}=FOLDER"):
            measured(name.replace("videoalign", "vq"), (4, 3, 64, 64), 8.0, {name: str(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, elements, names, gib",  # VideoAlign: those of the released file, folded; DFN5B: 730 tokens, not 257
    [("hps", 986_109_441, 0, 0.015), ("clip", 986_109_441 + 473 * 1280, 0, 0.057), ("pickscore", 986_109_441, 0, 0.015),
     ("videoalign", 2_208_561_664, 729, 0.38)],
)  # fmt: skip
def test_the_default_rewards_are_known_without_the_hub(name, elements, names, gib):
    with FakeTensorMode():
        weights = dryreward.scorer_of(name, "somebody/not-here").model.state_dict()
    assert sum(weight.numel() for weight in weights.values()) == elements
    assert len(weights) == names or not names
    shape, fps = ((53, 3, 480, 480), 8.0) if name == "videoalign" else ((3, 720, 720), None)
    assert measured("mq" if fps else name, shape, fps, {})[1] / dryrun.GIB == pytest.approx(gib, rel=0.05)


@pytest.mark.slow
def test_scoring_may_set_the_peak_and_reward_batch_bounds_it(tmp_path, monkeypatch):
    def peak(**changes):
        return grpo_flux.dry_run(options(tmp_path, **changes))["gpu_gib"]

    plain = peak()
    monkeypatch.setattr(dryreward, "measure", lambda *_: ([dryrun.GIB], dryrun.GIB))
    at_rest = sum(plain[name] for name in ("parameters", "optimizer", "ema", "trajectories", "frozen"))
    context = plain["buffers"]  # of CUDA, and prompts: nothing is sharded
    for batch, samples in ((2, 2), (100, 16)):  # the process has 16 samples
        assert peak(reward_batch=batch)["peak"] == pytest.approx(at_rest + context + 1 + samples, abs=0.01)
        offloaded = peak(reward_batch=batch, offload=True)["peak"]
        assert offloaded == pytest.approx(at_rest - plain["frozen"] + context + 1 + samples, abs=0.01)


@pytest.mark.slow
def test_host_memory_holds_what_one_process_reads_at_a_time(tmp_path, monkeypatch):
    def run(**changes):
        preset = grpo_video.PRESETS["tiny-i2v"] | OPTIONS | changes | {"output_dir": str(tmp_path)}
        return grpo_video.dry_run(grpo_video.Config(**preset))

    def host(**changes):
        return run(**changes)["host_gib"] * dryrun.GIB

    of_process = dryrun.HOST_PROCESS * dryrun.GIB
    monkeypatch.setattr(dryreward, "measure", lambda *_: ([5 * dryrun.GIB, 3 * dryrun.GIB], 0))
    assert host() == 2 * 5 * dryrun.GIB + of_process  # the file of the larger reward, and its model
    assert host(processes=4) == 2 * 5 * dryrun.GIB + 4 * of_process  # one after the other
    painter = {"first_frames": str(tmp_path / "frames"), "first_frame_model": "somebody/not-here"}
    assert host(**painter) == 4 * 16_870_599_139 + of_process  # of FLUX.1-dev, here in float32
    monkeypatch.setattr(dryreward, "measure", lambda *_: ([], 0))
    with monkeypatch.context() as patch:
        patch.setattr(dryrun, "checkpoint_bytes", lambda *_: (dryrun.GIB, 600 * dryrun.GIB))
        assert (
            host(processes=16, prompts_per_iteration=16) == 300 * dryrun.GIB + 8 * of_process
        )  # what a node of eight saves of the state
    away = dict(processes=4, offload=True, lora_rank=4)  # four frozen models, and networks while prompts are encoded
    gpu = run(**away)["gpu_gib"]
    assert host(**away) == pytest.approx(4 * of_process + 4 * (gpu["frozen"] + gpu["parameters"]) * dryrun.GIB)
    pipe = FluxPipeline.from_pretrained("tiny/flux")
    networks = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    exact = sum(p.nbytes for network in networks for p in network.parameters())
    monkeypatch.setattr(dryrun, "checkpoint_bytes", lambda *_: (0, 0))
    assert host(**painter | {"first_frame_model": "tiny/flux"}) == exact + of_process
