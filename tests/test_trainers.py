"""Every trainer end to end, by its real code path, on the tiny checkpoints."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideoTransformer3DModel,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file

import grpo_flux
import grpo_sd
import grpo_video
import small
from rewards import RewardError
from runtime import cli, data, distributed
from sampling import flow_sigmas, sample_ode

COMPONENTS = {grpo_flux: "transformer", grpo_sd: "unet", grpo_video: "transformer"}
CASES = {"flux": (grpo_flux, {}), "sd": (grpo_sd, {})}  # trainer, and the task if there are several
CASES |= {task: (grpo_video, {"task": task}) for task in grpo_video.PIPELINES}
EVERY = pytest.mark.parametrize("trainer, task", CASES.values(), ids=CASES)
LARGE = {name: case for name, case in CASES.items() if name != "t2i"}  # which is t2v's code, with one frame
COSTLY = pytest.mark.parametrize("trainer, task", LARGE.values(), ids=LARGE)
METRICS = """iteration reward_mean reward_std reward_hps advantage_abs loss ratio_mean ratio_max_deviation_first_update
clip_fraction approx_kl grad_norm zero_variance_groups seconds seconds_rollout seconds_reward seconds_update
samples_per_second"""


def arguments(options):
    """{"group_size": 4, "resume": True} → ["--group-size", "4", "--resume"]"""
    pairs = [(f"--{key.replace('_', '-')}", value) for key, value in options.items()]
    return [word for flag, value in pairs for word in ([flag] if value is True else [flag, str(value)])]


def train(trainer, output_dir, **options):
    """Run the trainer in this process, as its command line would. Returns its output folder."""
    options = small.options(trainer, options.get("task")) | {"output_dir": output_dir} | options
    trainer.main(cli.parse_config(trainer.Config, trainer.PRESETS, arguments(options)))
    return output_dir


def metrics(output_dir, times=False):
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if times or "second" not in k} for row in rows]


def weights(trainer, output_dir, iteration, suffix=""):
    folder = output_dir / f"checkpoint-{iteration:06d}" / f"{COMPONENTS[trainer]}{suffix}"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def stock_pipeline(output_dir):
    """The model that the run started from, as diffusers loads it."""
    config = json.loads((output_dir / "config.json").read_text())
    kinds = {"grpo_flux.py": FluxPipeline, "grpo_sd.py": StableDiffusionPipeline}
    kind = kinds.get(config["script"]) or grpo_video.PIPELINES[config["task"]]
    parts = {}
    if config.get("transformer"):
        parts["transformer"] = HunyuanVideoTransformer3DModel.from_pretrained(config["transformer"])
    pipe = kind.from_pretrained(config["model"], **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_drawing(pipe):
    """What the stock pipeline makes of a prompt: (1, 64, 64, 3), or a video (1, 5, 32, 48, 3)."""
    options = dict(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0))
    if not hasattr(pipe, "vae_scale_factor_temporal"):
        return pipe("a red circle", height=64, width=64, **options).images
    if pipe.transformer.config.in_channels > pipe.transformer.config.out_channels:
        options["image"] = Image.new("RGB", (48, 32), "red")
    return pipe(prompt="a red circle", height=32, width=48, num_frames=5, **options).frames


def distance(a, b):
    """Largest relative distance of any tensor."""
    assert a.keys() == b.keys()
    return max(((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-12)).item() for k in a)


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def finished(request, tmp_path_factory):
    """One small run of each trainer, shared by the tests that look at what it left."""
    trainer, task = request.param
    return trainer, train(trainer, tmp_path_factory.mktemp("run") / "out", **task, ema_decay=0.5, save_every=2)


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_exactly_the_files_of_the_contract(finished):
    trainer, out = finished
    component = COMPONENTS[trainer]
    assert {path.name for path in out.iterdir()} == {
        "config.json", "metrics.jsonl", "reward.png", "samples", "checkpoint-000002", "checkpoint-000003",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    suffixes = [".mp4", ".png"] if config.get("frames", 1) > 1 else [".png"]
    samples = [iteration + suffix for iteration in ("000000", "000003") for suffix in suffixes]
    assert sorted(path.name for path in (out / "samples").iterdir()) == samples
    assert {path.name for path in (out / "checkpoint-000003").iterdir()} == {component, f"{component}_ema", "state"}
    assert config["group_size"] == 4 and config["versions"]["torch"] in torch.__version__
    assert config["script"] == f"{trainer.__name__}.py"
    assert {field.name for field in dataclasses.fields(trainer.Config)} <= config.keys()


def test_metrics_have_a_line_for_each_iteration_with_every_field(finished):
    _, out = finished
    rows = metrics(out, times=True)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(METRICS.split()) == row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and row["advantage_abs"] > 0.3


def test_the_ratio_is_1_before_the_first_update_and_not_after_it(finished):
    _, out = finished
    for row in metrics(out):
        assert row["ratio_max_deviation_first_update"] <= 1e-6
        assert 0 < abs(row["ratio_mean"] - 1) < 0.05  # the second update of a rollout is off-policy
        assert row["approx_kl"] > 0


def test_the_checkpoint_loads_in_stock_diffusers(finished):
    trainer, out = finished
    component = COMPONENTS[trainer]
    pipe = stock_pipeline(out)
    base = getattr(pipe, component)
    trained = type(base).from_pretrained(out / "checkpoint-000003" / component)
    average = type(base).from_pretrained(out / "checkpoint-000003" / f"{component}_ema")
    before = distance(base.state_dict(), trained.state_dict())
    assert before > 1e-5
    assert 0 < distance(trained.state_dict(), average.state_dict()) < before
    drawn = stock_drawing(pipe)
    setattr(pipe, component, trained)
    assert drawn.shape in ((1, 64, 64, 3), (1, 5, 32, 48, 3))
    assert abs(stock_drawing(pipe) - drawn).max() > 0


# -------------------------------------------------------------------------------------- guarantees: resume, processes


@COSTLY
def test_resumed_after_sigkill_a_run_ends_bit_for_bit_like_one_that_was_not_killed(trainer, task, tmp_path):
    options = task | dict(iterations=5, save_every=2, ema_decay=0.5)
    straight = train(trainer, tmp_path / "straight", **options)
    killed = tmp_path / "killed"
    command = [sys.executable, f"{trainer.__name__}.py"]
    process = subprocess.Popen(
        command + arguments(small.options(trainer, **task) | options | {"output_dir": killed}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if (killed / "metrics.jsonl").exists() and len((killed / "metrics.jsonl").read_text().splitlines()) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, process.stdout.read().decode()[-2000:]
    assert (killed / "checkpoint-000002").is_dir() and not (killed / "checkpoint-000005").exists()

    (killed / "checkpoint-000004.part").mkdir(exist_ok=True)  # as if killed while saving
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rew')  # and while writing a line
    trainer.main(cli.parse_config(trainer.Config, trainer.PRESETS, ["--output-dir", str(killed), "--resume"]))
    assert metrics(killed) == metrics(straight)
    for suffix in ("", "_ema"):
        a, b = (weights(trainer, out, 5, suffix) for out in (killed, straight))
        assert all(torch.equal(a[k], b[k]) for k in a)


def torchrun(trainer, output_dir, *more, processes=2, **options):
    options = small.options(trainer, options.get("task")) | {"output_dir": output_dir} | options
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += [f"{trainer.__name__}.py", *arguments(options), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@COSTLY
def test_two_processes_do_the_work_of_one(trainer, task, tmp_path):
    options = task | dict(save_every=2, ema_decay=0.5, prompts_per_iteration=2)
    one = train(trainer, tmp_path / "one", **options)
    done = torchrun(trainer, tmp_path / "two", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in ("reward_mean", "reward_std", "reward_hps"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
        assert b["ratio_max_deviation_first_update"] <= 1e-6
    for suffix in ("", "_ema"):
        assert distance(weights(trainer, one, 3, suffix), weights(trainer, two, 3, suffix)) < 1e-4

    # Saved by two processes, taken up by one.
    train(trainer, two, iterations=4, resume=True, **options)
    train(trainer, one, iterations=4, resume=True, **options)
    assert distance(weights(trainer, one, 4), weights(trainer, two, 4)) < 1e-4


# ------------------------------------------------------------------------------------------------- options that count


@EVERY
def test_lora_trains_only_the_adapter_and_loads_in_stock_diffusers(trainer, task, tmp_path):
    options = task | dict(lora_rank=4, learning_rate=0.01, kl_weight=0.1)
    out = train(trainer, tmp_path / "lora", **options)
    folder, component = out / "checkpoint-000003", COMPONENTS[trainer]
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", "state"}
    pipe = stock_pipeline(out)
    base = stock_drawing(pipe)
    pipe.load_lora_weights(folder)
    assert abs(stock_drawing(pipe) - base).max() > 1e-3
    network = getattr(pipe, component)
    assert next(iter(network.peft_config.values())).lora_alpha == 8  # twice the rank survived the file
    resumed = train(trainer, out, **options, iterations=4, resume=True)
    assert len(metrics(resumed)) == 4


@EVERY
def test_kl_weight_holds_the_policy_at_its_reference(trainer, task, tmp_path):
    options = task | dict(iterations=4)
    runs = [train(trainer, tmp_path / name, **options, kl_weight=beta) for name, beta in [("0", 0.0), ("4", 1e4)]]
    free, held = (metrics(run) for run in runs)
    assert distance(*(weights(trainer, run, 4) for run in runs)) > 1e-5
    # The first update starts at the reference, where the penalty and its gradient are 0.
    assert free[0]["ratio_max_deviation_first_update"] == held[0]["ratio_max_deviation_first_update"] == 0
    assert held[-1]["loss"] > free[-1]["loss"]


@pytest.mark.parametrize("options", [
    dict(sde="flow", eta=0.7), dict(sde="cps", eta=0.8), dict(sde_window=2), dict(keep_best_worst=1),
    dict(gradient_checkpointing=True), dict(reward="hps:0.7,clip:1.4"), dict(ema_decay=0.9, updates_per_rollout=4),
], ids=lambda o: next(iter(o)))  # fmt: skip
def test_flux_options_train_with_ratio_1(options, tmp_path):
    rows = metrics(train(grpo_flux, tmp_path / "out", iterations=1, **options))
    assert rows[0]["ratio_max_deviation_first_update"] <= 1e-6
    assert rows[0]["grad_norm"] > 0
    if "reward" in options:
        expected = 0.7 * rows[0]["reward_hps"] + 1.4 * rows[0]["reward_clip"]
        assert rows[0]["reward_mean"] == pytest.approx(expected, rel=1e-5)


def test_a_micro_batch_of_another_size_gives_the_same_run(tmp_path):
    small = train(grpo_flux, tmp_path / "small", micro_batch=3)
    large = train(grpo_flux, tmp_path / "large", micro_batch=64)
    assert distance(weights(grpo_flux, small, 3), weights(grpo_flux, large, 3)) < 1e-4


def test_guidance_off_costs_half():
    """Without guidance the UNet sees each sample once, with it twice."""
    seen = []

    class UNet:
        def __call__(self, z, t, text, return_dict):
            seen.append(len(z))
            assert len(z) == len(t) == len(text)
            return (z * text.mean((1, 2)).view(-1, 1, 1, 1),)

    z, t = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    text = torch.stack([torch.zeros(3, 5, 6), torch.ones(3, 5, 6)], 1)  # the empty prompt, and the prompt
    guided = grpo_sd.predict(UNet(), z, t, text, 5.0)
    torch.testing.assert_close(guided, 0 * z + 5.0 * (z - 0 * z))
    torch.testing.assert_close(grpo_sd.predict(UNet(), z, t, text[:, 1:], 1.0), z)
    assert seen == [6, 3]


def test_video_guidance_off_costs_half():
    """With classifier-free guidance the transformer sees each sample twice, and its picture both times."""
    seen = []

    class Transformer:
        config = SimpleNamespace(guidance_embeds=False)

        def __call__(self, hidden_states, timestep, guidance, encoder_hidden_states, return_dict, **rest):
            seen.append(len(hidden_states))
            assert hidden_states.shape[1] == 8 and guidance is None
            assert timestep.tolist() == sorted([200, 500, 1000] * (len(timestep) // 3))
            assert all(len(value) == len(timestep) for value in (encoder_hidden_states, *rest.values()))
            return (hidden_states[:, :4] * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1, 1),)

    z, sigma, picture = torch.randn(3, 4, 2, 4, 4), torch.tensor([0.2, 0.5, 1.0]), torch.randn(3, 4, 2, 4, 4)
    tokens = torch.stack([torch.zeros(3, 5, 6), torch.ones(3, 5, 6)], 1)  # the empty prompt, and the prompt
    condition = [tokens, torch.ones(3, 2, 5), torch.zeros(3, 2, 7), picture]
    guided = grpo_video.velocity(Transformer(), z, sigma, condition, grpo_video.Config(true_guidance=5.0))
    torch.testing.assert_close(guided, 0 * z + 5.0 * (z - 0 * z))
    once = [*(x[:, 1:] for x in condition[:3]), picture]
    torch.testing.assert_close(grpo_video.velocity(Transformer(), z, sigma, once, grpo_video.Config()), z)
    assert seen == [6, 3]


@EVERY
def test_best_of_n_trains_on_the_best_and_worst_of_each_prompts_own_group(trainer, task, tmp_path, monkeypatch):
    """The official video code sorts across prompts."""
    trained, advantages, deal, score = [], [], trainer.update_parts, trainer.group_advantages

    def spy_deal(cfg, A, iteration, prompt):
        trained.append((prompt, sorted(sample for part in deal(cfg, A, iteration, prompt) for sample in part)))
        return deal(cfg, A, iteration, prompt)

    def spy_score(*arguments):
        advantages.append(score(*arguments))
        return advantages[-1]

    monkeypatch.setattr(trainer, "update_parts", spy_deal)
    monkeypatch.setattr(trainer, "group_advantages", spy_score)
    train(trainer, tmp_path / "out", **task, iterations=1, keep_best_worst=1)
    for (prompt, samples), A in zip(trained, advantages[0].view(2, 4), strict=True):
        assert samples == sorted([A.argmin().item(), A.argmax().item()]), prompt


# --------------------------------------------------------------------------------------------- noise and the samplers


@EVERY
def test_initial_noise_is_shared_within_a_group_and_differs_between_prompts(trainer, task, tmp_path, monkeypatch):
    """The official code shares one noise among all prompts, and on video gives every process the same."""
    starts, original = [], trainer.rollout

    def spy(model, z, *rest):
        starts.append(z)
        return original(model, z, *rest)

    monkeypatch.setattr(trainer, "rollout", spy)
    train(trainer, tmp_path / "shared", **task, iterations=2, micro_batch=8)
    first, second = (z.view(2, 4, -1) for z in starts)
    assert torch.equal(first[:, 0], first[:, 3])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    starts.clear()
    options = small.options(trainer, **task) | {"output_dir": tmp_path / "own", "iterations": 1, "micro_batch": 8}
    trainer.main(cli.parse_config(trainer.Config, trainer.PRESETS, [*arguments(options), "--no-shared-noise"]))
    own = starts[0].view(8, -1)
    assert len(own.unique(dim=0)) == 8


def test_our_ode_sampler_draws_what_the_stock_flux_pipeline_draws():
    cfg = grpo_flux.Config(**grpo_flux.PRESETS["tiny"])
    pipe = FluxPipeline.from_pretrained(cfg.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # so that it takes our sigmas as they are
    prompts = ["a red circle", "two blue squares"]
    z = torch.randn(2, 64, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(0))
    sigmas, scale = flow_sigmas(6, cfg.shift), 2 * pipe.vae_scale_factor
    text = grpo_flux.encode_prompts(pipe, prompts, cfg, "cpu")
    with torch.no_grad():
        z0 = sample_ode(
            lambda z, i: grpo_flux.velocity(pipe.transformer, z, sigmas[i].expand(2), text, cfg, scale), z, sigmas
        )
    theirs = pipe(
        prompts, height=64, width=64, latents=z, sigmas=sigmas[:-1].tolist(), num_inference_steps=6,
        guidance_scale=cfg.guidance, max_sequence_length=cfg.max_sequence_length, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(grpo_flux.decode(pipe.vae, z0, cfg, scale), theirs, rtol=1e-3, atol=1e-3)


def test_our_ddim_sampler_draws_what_the_stock_sd_pipeline_draws():
    cfg = grpo_sd.Config(guidance=2.0)
    pipe = StableDiffusionPipeline.from_pretrained("tiny/sd", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a red circle", "two blue squares"]
    side = 64 // pipe.vae_scale_factor
    z = torch.randn(2, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    timesteps, alpha_bars = grpo_sd.ddim_levels(pipe.scheduler, 6, "cpu")
    text = grpo_sd.encode_prompts(pipe, prompts, cfg, "cpu")
    last = []

    def model(z, i):
        last[:] = [z, grpo_sd.predict(pipe.unet, z, timesteps[i].expand(2), text, cfg.guidance)]
        return last[1]

    with torch.no_grad():
        z0 = sample_ode(model, z, alpha_bars, grpo_sd.ddim_sde_step)
        theirs = pipe(
            prompts, height=64, width=64, latents=z, num_inference_steps=6, guidance_scale=cfg.guidance,
            output_type="latent",
        ).images  # fmt: skip
    # The stock pipeline returns the last step's latent, which keeps a little noise; ours is the clean prediction.
    stock_last, _, _ = grpo_sd.ddim_sde_step(last[1], last[0], alpha_bars[-2], alpha_bars[-1], 0.0)
    torch.testing.assert_close(stock_last, theirs, rtol=1e-3, atol=1e-3)
    assert (z0 - theirs).abs().max() < 0.2


@pytest.mark.parametrize("task, guidance", [("t2v", 1.0), ("t2i", 1.0), ("i2v", 1.0), ("i2v", 3.0)])
def test_our_ode_sampler_draws_what_the_stock_video_pipelines_draw(task, guidance):
    options = small.options(grpo_video, task) | {"true_guidance": guidance}
    cfg = cli.parse_config(grpo_video.Config, grpo_video.PRESETS, arguments(options))
    parts = {"transformer": grpo_video.load_transformer(HunyuanVideoTransformer3DModel.from_pretrained, cfg)}
    pipe = grpo_video.PIPELINES[task].from_pretrained(cfg.model, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # so that it takes our sigmas as they are
    prompt, shape = data.load_prompts(cfg.prompts)[0], (16, 1 if task == "t2i" else 2, 8, 12)
    pictures = data.first_frames(cfg, [prompt], distributed.start_world()) if task == "i2v" else {}
    z = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    sigmas = flow_sigmas(6, cfg.shift)
    condition = grpo_video.encode(pipe, [prompt], pictures, shape, cfg, "cpu")
    with torch.no_grad():
        z0 = sample_ode(
            lambda z, i: grpo_video.velocity(pipe.transformer, z, sigmas[i].expand(1), condition, cfg), z, sigmas
        )
    ours = grpo_video.decode(pipe.vae, z0)
    more = {}
    if task == "i2v":
        more |= {"image": Image.open(pictures[prompt]), "true_cfg_scale": guidance, "negative_prompt": ""}
        pipe.vae.encode = lambda x, encode=pipe.vae.encode: mode_only(encode(x))
    theirs = pipe(
        prompt=prompt, height=cfg.height, width=cfg.width, num_frames=cfg.frames, latents=z, num_inference_steps=6,
        sigmas=sigmas[:-1].tolist(), guidance_scale=cfg.guidance, max_sequence_length=cfg.max_sequence_length,
        output_type="pt", **more,
    ).frames  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def mode_only(encoded):
    """An encoding whose draws are its mode."""
    encoded.latent_dist.sample = lambda generator=None: encoded.latent_dist.mode()
    return encoded


# ----------------------------------------------------------------------------------------------------- when it breaks


def run_script(trainer, *words, env=None):
    command = [sys.executable, f"{trainer.__name__}.py", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | (env or {}))


def test_a_disk_that_is_full_while_saving_leaves_the_older_checkpoints(tmp_path):
    """A limit on file sizes stands in for the full disk: writes fail in the same places."""
    out = train(grpo_flux, tmp_path / "out")
    before = weights(grpo_flux, out, 3)
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "grpo_flux.py", "--output-dir", str(out), "--resume", "--iterations", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: could not write") and "make room" in last
    assert {path.name for path in out.glob("checkpoint-*") if "part" not in path.name} == {"checkpoint-000003"}
    assert distance(before, weights(grpo_flux, out, 3)) == 0
    train(grpo_flux, out, resume=True, iterations=4)
    assert len(metrics(out)) == 4


@EVERY
def test_the_reward_sees_the_decoded_tensor_of_its_own_prompt(trainer, task, tmp_path, monkeypatch):
    """No JPEG in between, and image i belongs to prompt i: what is scored is what `decode` returned, in its order."""
    decoded, scored = [], []
    decode, load_reward = trainer.decode, trainer.load_reward

    def spy(*args):
        decoded.append(decode(*args))
        return decoded[-1]

    def load(*args):
        reward = load_reward(*args)
        score = reward.scorers["hps"]
        reward.scorers["hps"] = lambda images, prompts: scored.append((images, prompts)) or score(images, prompts)
        return reward

    monkeypatch.setattr(trainer, "decode", spy)
    monkeypatch.setattr(trainer, "load_reward", load)
    options = small.options(trainer, **task) | {"iterations": 1}
    train(trainer, tmp_path / "out", **options)
    prompts = data.load_prompts(trainer.PRESETS[options["preset"]]["prompts"])
    order = data.prompt_batch(len(prompts), options["prompts_per_iteration"], 0, options["seed"])
    images = torch.cat([images for images, _ in scored])
    assert torch.equal(images, torch.cat(decoded[1:-1]).view_as(images))  # the first and the last are sample pictures
    copies = options["group_size"] * options.get("frames", 1)  # an image reward scores a video frame by frame
    assert [prompt for _, p in scored for prompt in p] == [prompts[i] for i in order for _ in range(copies)]


def test_a_reward_that_is_not_a_number_stops_the_run_and_leaves_what_was_saved(tmp_path, monkeypatch):
    out = train(grpo_flux, tmp_path / "out")
    before = weights(grpo_flux, out, 3)
    load_reward = grpo_flux.load_reward

    def load(*args):
        reward = load_reward(*args)
        reward.scorers["hps"] = lambda images, prompts: torch.full((len(images),), math.nan)
        return reward

    with monkeypatch.context() as patched, pytest.raises(RewardError, match="reward hps gave nan for the prompt"):
        patched.setattr(grpo_flux, "load_reward", load)
        train(grpo_flux, out, resume=True, iterations=4)
    assert len(metrics(out)) == 3
    assert distance(before, weights(grpo_flux, out, 3)) == 0
    train(grpo_flux, out, resume=True, iterations=4)
    assert len(metrics(out)) == 4


def test_a_loss_that_is_not_a_number_stops_before_it_touches_the_weights(tmp_path):
    with pytest.raises(cli.RunError, match="lower --learning-rate"):
        train(grpo_flux, tmp_path / "out", learning_rate=1e30)


def test_errors_are_one_line_and_exit_code_1(tmp_path):
    done = run_script(grpo_flux, "--preset", "tiny", "--group-size", "1", "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("error: --group-size must be at least 2")
    assert not (tmp_path / "out").exists()


def test_a_wrong_number_of_processes_is_refused(tmp_path):
    done = torchrun(grpo_flux, tmp_path / "out", prompts_per_iteration=3)
    assert done.returncode != 0
    assert "error: --prompts-per-iteration 3 must be a multiple of the 2 processes" in done.stderr
