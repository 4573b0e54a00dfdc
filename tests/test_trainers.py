"""Every trainer end to end, by its real code path, on the tiny checkpoints.

By default FLUX runs everything, and Stable Diffusion and text to video run once; `pytest -m slow` runs the rest.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    StableDiffusionPipeline,
    WanPipeline,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import eval as evaluation
import grpo_flux
import grpo_sd
import grpo_video
import launch
import small
from rewards import RewardError
from runtime import checkpoints, data, families, initial, loading, lora, output, processes
from runtime.options import RunError, parse_config
from sampling import flow_sde_step, flow_sigmas, rollout
from small import COMPONENTS, TRAINERS, Stopped, train
from tiny import training


def cases(*fast):
    """The trainers, and of video its tasks; those that are not named here run with `-m slow`."""
    return [pytest.param(case, marks=() if case in fast else pytest.mark.slow) for case in TRAINERS]


EACH = pytest.mark.parametrize("case", cases("flux"))
METRICS = """iteration reward_mean reward_std reward_hps advantage_abs loss ratio_mean ratio_max_deviation_first_update
clip_fraction kl learning_rate grad_norm zero_variance_groups seconds seconds_rollout seconds_reward seconds_update
samples_per_second"""


def metrics(output_dir, times=False):
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if times or "second" not in k} for row in rows]


def weights(case, output_dir, iteration, suffix=""):
    folder = output_dir / f"checkpoint-{iteration:06d}" / f"{COMPONENTS[TRAINERS[case]]}{suffix}"
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def stock_pipeline(case):
    """The model that a small run starts from, as diffusers loads it."""
    cfg, parts = small.config(case), {}
    kinds = {"flux": FluxPipeline, "sd": StableDiffusionPipeline, "i2v": HunyuanSkyreelsImageToVideoPipeline}
    kinds |= {"wan": WanPipeline}
    if case == "i2v":
        parts["transformer"] = HunyuanVideoTransformer3DModel.from_pretrained(cfg.transformer)
    pipe = training.stock_pipeline(kinds.get(case, HunyuanVideoPipeline), cfg.model, **parts)
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


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Runs inside a test do not draw reward.png, which takes as long as the run. Those of `small_run` do."""
    monkeypatch.setattr(output.Metrics, "draw", lambda self: None)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Case → the folder of its small run, which is made once and not to be changed: see `copy_of`."""
    draw = output.Metrics.draw  # module fixtures are set up before `no_curves`

    @functools.cache
    def run(case):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output.Metrics, "draw", draw)
            return train(case, tmp_path_factory.mktemp(case) / "out", **small.FINISHED)

    return run


@pytest.fixture(params=cases("flux", "sd", "t2v"))
def finished(request, small_run):
    """A small run of each trainer, for the tests that look at what it left."""
    return request.param, small_run(request.param)


def arguments_of(place, name, monkeypatch, case, output_dir, **changes):
    """Train until the function `name` of `place` would be called for the first time. Returns its arguments."""
    given = []

    def stop(*arguments):
        given.extend(arguments)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(place, name, stop)
        train(case, output_dir, num_samples=1, **changes)
    return given


def copy_of(output_dir, tmp_path):
    return Path(shutil.copytree(output_dir, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_a_run_leaves_exactly_the_files_of_the_contract(finished):
    case, out = finished
    component, trainer = COMPONENTS[TRAINERS[case]], TRAINERS[case]
    assert {path.name for path in out.iterdir()} - {".lock"} == {
        "config.json", "metrics.jsonl", "reward.png", "samples", "checkpoint-000002", "checkpoint-000003",
    }  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    suffixes = [".mp4", ".png"] if config.get("frames", 1) > 1 else [".png"]
    samples = [iteration + suffix for iteration in ("000000", "000002", "000003") for suffix in suffixes]
    assert sorted(path.name for path in (out / "samples").iterdir()) == samples
    saved = {component, f"{component}_ema", "state", "SHA256SUMS", "README.md", "reward.png", "samples.png"}
    assert {path.name for path in (out / "checkpoint-000003").iterdir()} == saved
    assert config["group_size"] == 4 and config["versions"]["torch"] in torch.__version__
    assert config["script"] == f"{trainer.__name__}.py"
    assert {field.name for field in dataclasses.fields(trainer.Config)} <= config.keys()
    assert Image.open(out / "reward.png").size == (1210, 770)


def test_metrics_have_a_line_for_each_iteration_with_every_field(finished):
    _, out = finished
    rows = metrics(out, times=True)
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    sampled = [{"sample_reward_hps_before"}, {"sample_reward_hps"}, {"sample_reward_hps"}]  # drawn after 0, 2, 3
    for row, more in zip(rows, sampled, strict=True):
        assert set(METRICS.split()) | more == row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert row["grad_norm"] > 0 and row["advantage_abs"] > 0.3
        parts = row["seconds_rollout"] + row["seconds_reward"] + row["seconds_update"]
        assert row["seconds"] == pytest.approx(parts)
        assert row["samples_per_second"] == pytest.approx(8 / parts)
    scores = rows[0]["sample_reward_hps_before"], rows[1]["sample_reward_hps"], rows[2]["sample_reward_hps"]
    assert len(set(scores)) == 3  # the same pictures of other weights


def test_the_ratio_is_1_before_the_first_update_and_not_after_it(finished):
    case, out = finished
    for row in metrics(out):
        assert row["ratio_max_deviation_first_update"] <= 1e-6
        assert 0 < abs(row["ratio_mean"] - 1) < 0.05  # the second update of a rollout is off-policy
        assert 0 < row["clip_fraction"] < 1 or case == "t2i"  # its clip range is wide
        assert row["kl"] > 0


def test_the_checkpoint_loads_in_stock_diffusers(finished):
    case, out = finished
    component = COMPONENTS[TRAINERS[case]]
    pipe = stock_pipeline(case)
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
    assert abs(stock_drawing(pipe_of_the_card(out / "checkpoint-000003")) - stock_drawing(pipe)).max() == 0


def pipe_of_the_card(checkpoint):
    """The pipeline that the three lines of a checkpoint's README.md make, run in its folder as they stand there."""
    (code,) = re.findall(r"```python\n(.*?)```", (checkpoint / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 3 + ("Hunyuan" in code)
    names = {}
    with contextlib.chdir(checkpoint):
        exec(code, names)
    names["pipe"].set_progress_bar_config(disable=True)
    return names["pipe"]


def test_a_checkpoint_has_a_model_card_which_may_be_edited(small_run, tmp_path):
    out = copy_of(small_run("flux"), tmp_path)
    checkpoint, last = out / "checkpoint-000003", metrics(out)[-1]
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.base_model == "tiny/flux" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image" and "dancegrpo" in card.data.tags
    assert f"| sample_reward_hps | {last['sample_reward_hps']:.4f} |" in card.text
    assert "| prompts | prompts/tiny.txt |" in card.text
    command = re.search(r"```bash\npython grpo_flux.py (.*)\n", card.text).group(1)
    again = dataclasses.asdict(parse_config(grpo_flux.Config, grpo_flux.PRESETS, shlex.split(command)))
    assert again | {"preset": "", "output_dir": ""} == dataclasses.asdict(small.config("flux", **small.FINISHED)) | {
        "preset": "", "output_dir": "",
    }  # fmt: skip
    for name in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (checkpoint / name).is_file()
    assert (checkpoint / "samples.png").read_bytes() == (out / "samples" / "000003.png").read_bytes()
    world = processes.start_world()
    (checkpoint / "README.md").write_text("my own words")
    (checkpoint / "reward.png").unlink()
    content = json.loads((out / "config.json").read_text())
    assert checkpoints.newest_whole_checkpoint(out, world, content) == checkpoint  # --resume is content
    options = ["--preset", "tiny", "--checkpoint", str(checkpoint)]  # and so is eval.py, with the folder as it is
    _, _, models, _ = evaluation.plan(parse_config(evaluation.Config, evaluation.PRESETS, options))
    assert [model.kind for model in models] == ["base", "network"]
    checkpoints.require_whole(Path(models[1].weights), "--checkpoint", world)


# -------------------------------------------------------------------------------------- guarantees: resume, processes


class Interrupted(Exception):
    pass


@EACH
def test_interrupted_while_saving_a_run_resumes_bit_for_bit(case, small_run, tmp_path, monkeypatch):
    straight, broken = small_run(case), tmp_path / "broken"
    save = checkpoints.Checkpoints._save_public

    def interrupted(self, folder, suffix):
        save(self, folder, suffix)
        if folder.name == "checkpoint-000003.part":
            raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(checkpoints.Checkpoints, "_save_public", interrupted)
        train(case, broken, **small.FINISHED)
    assert (broken / "checkpoint-000003.part" / COMPONENTS[TRAINERS[case]]).is_dir()
    assert (broken / "checkpoint-000002").is_dir() and not (broken / "checkpoint-000003").exists()
    assert len(metrics(broken)) == 3
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "rew')  # as if killed while writing a line

    trainer = TRAINERS[case]
    trainer.main(parse_config(trainer.Config, trainer.PRESETS, ["--output-dir", str(broken), "--resume"]))
    assert metrics(broken) == metrics(straight)
    assert {path.name for path in broken.iterdir()} == {path.name for path in straight.iterdir()} - {"reward.png"}
    for suffix in ("", "_ema"):
        a, b = (weights(case, out, 3, suffix) for out in (broken, straight))
        assert a and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_the_learning_rate_may_be_changed_on_resume_and_that_is_written_down(small_run, tmp_path):
    out = copy_of(small_run("flux"), tmp_path)
    shutil.rmtree(out / "checkpoint-000003")
    words = ["--output-dir", str(out), "--resume"]
    grpo_flux.main(parse_config(grpo_flux.Config, grpo_flux.PRESETS, [*words, "--learning-rate", "1e-9"]))
    assert distance(weights("flux", out, 2), weights("flux", out, 3)) < 1e-6
    shutil.rmtree(out / "checkpoint-000003")
    (out / "samples" / "000004.png").write_text("later than the next checkpoint")
    grpo_flux.main(parse_config(grpo_flux.Config, grpo_flux.PRESETS, words))  # keeps it
    assert distance(weights("flux", out, 2), weights("flux", out, 3)) < 1e-6
    config = json.loads((out / "config.json").read_text())
    assert config["learning_rate"] == 1e-9
    assert [row["learning_rate"] for row in metrics(out)] == [1e-4, 1e-4, 1e-9]
    sheet = (out / "checkpoint-000003" / "samples.png").read_bytes()
    assert sheet == (out / "samples" / "000003.png").read_bytes()
    a, b = metrics(small_run("flux")), metrics(out)
    assert a[:2] == b[:2] and a[2]["reward_mean"] == b[2]["reward_mean"]  # the rollout came before its update
    assert distance(weights("flux", small_run("flux"), 3), weights("flux", out, 3)) > 1e-5


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What tests/two_processes.py left: a folder for each trainer."""
    folder = tmp_path_factory.mktemp("two")
    launch.run("two_processes", "main", (folder,), 2, folder / "logs")
    return folder


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(finished, two_processes, tmp_path):
    case, one = finished
    two = two_processes / case
    assert json.loads((two / "config.json").read_text())["processes"] == 2
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() & {"reward_mean", "reward_std", "reward_hps", "sample_reward_hps_before"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6)
        if "sample_reward_hps" in a:
            assert a["sample_reward_hps"] == pytest.approx(b["sample_reward_hps"], rel=1e-4, abs=1e-6)
        assert b["ratio_max_deviation_first_update"] <= 1e-6
    for suffix in ("", "_ema"):
        assert distance(weights(case, one, 3, suffix), weights(case, two, 3, suffix)) < 1e-4

    # The sample pictures: three, shared out over two processes, and put together in their order.
    assert json.loads((two / "sampled.json").read_text()) == [[0, 2], [1, 0]]
    pictures = [torch.tensor(list(Image.open(out / "samples" / "000003.png").tobytes())) for out in (one, two)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1

    # Saved by two processes, taken up by one.
    both = [copy_of(out, tmp_path / name) for name, out in (("one", one), ("two", two))]
    for out in both:
        train(case, out, **small.FINISHED, iterations=4, resume=True)
    assert distance(*(weights(case, out, 4) for out in both)) < 1e-4


@pytest.mark.slow
def test_four_processes_train_as_one_does_however_they_share_the_network(tmp_path):
    options = small.FINISHED | {"prompts_per_iteration": 4, "num_samples": 1}
    one = train("flux", tmp_path / "one", **options)
    for size in (1, 2, 4):
        four = tmp_path / f"shard-{size}"
        changes = options | {"shard_size": size, "output_dir": str(four)}
        launch.run("launch_cases", "train", ("flux", changes), 4, tmp_path / f"logs-{size}")
        for a, b in zip(metrics(one), metrics(four), strict=True):
            assert a["reward_mean"] == pytest.approx(b["reward_mean"], abs=1e-5)
            assert b["ratio_max_deviation_first_update"] <= 1e-6
        for suffix in ("", "_ema"):
            assert distance(weights("flux", one, 3, suffix), weights("flux", four, 3, suffix)) < 1e-4


@pytest.mark.slow
def test_a_wrong_number_of_processes_is_refused(two_processes):
    line = (two_processes / "refused.txt").read_text()
    assert line == "error: --prompts-per-iteration 3 must be a multiple of the 2 processes"


# ------------------------------------------------------------------------------------------------- options that count


def test_a_loras_initial_values_follow_from_the_seed_and_from_nothing_else():
    def layers(seed):
        network = FluxTransformer2DModel.from_pretrained("tiny/flux", subfolder="transformer")
        network = loading.prepare_network(network, lora_rank=2, lora_targets=grpo_flux.LORA_TARGETS, seed=seed)
        assert network.peft_config["default"].lora_alpha == 4
        return torch.cat([weight.detach().flatten() for weight in processes.trainable(network)])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = layers(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(layers(1), first) and not torch.equal(layers(2), first)


@EACH
def test_lora_trains_only_the_adapter_and_loads_in_stock_diffusers(case, tmp_path):
    options = dict(lora_rank=4, learning_rate=0.01, kl_weight=0.1, num_samples=1)
    out = train(case, tmp_path / "lora", **options, iterations=2)
    folder, component = out / "checkpoint-000002", COMPONENTS[TRAINERS[case]]
    saved = {"README.md", "samples.png", "SHA256SUMS", "pytorch_lora_weights.safetensors", "state"}
    assert {path.name for path in folder.iterdir()} == saved
    pipe = stock_pipeline(case)
    base = stock_drawing(pipe)
    pipe.load_lora_weights(folder)
    drawn = stock_drawing(pipe)
    assert abs(drawn - base).max() > 1e-3
    assert abs(stock_drawing(pipe_of_the_card(folder)) - drawn).max() == 0
    network = getattr(pipe, component)
    assert next(iter(network.peft_config.values())).lora_alpha == 4  # the factor, 2, is in B
    resumed = train(case, out, **options, iterations=3, resume=True)
    assert len(metrics(resumed)) == 3
    options |= dict(init=out / "checkpoint-000003", learning_rate=1e-9, iterations=1)
    second = train(case, tmp_path / "second", **options)
    a, b = (load_file(run / f"checkpoint-00000{i}" / lora.LORA_FILE) for run, i in ((out, 3), (second, 1)))
    assert distance(a, b) < 1e-6
    assert metrics(second)[0]["sample_reward_hps_before"] == metrics(out)[-1]["sample_reward_hps"]
    own = "transformer" if case == "i2v" else "model"  # where the network lies
    with pytest.raises(RunError, match=rf"\(a LoRA of rank 4\) does not fit --{own} .* with --lora-rank 0: "):
        train(case, tmp_path / "third", **options | dict(lora_rank=0))


@EACH
def test_a_run_starts_from_the_weights_of_another(case, small_run, tmp_path):
    first, options = small_run(case), dict(iterations=1, num_samples=3, learning_rate=1e-9)
    second = train(case, tmp_path / "second", init=first / "checkpoint-000003", **options)
    (row,) = metrics(second)
    assert row["iteration"] == 1
    assert row["sample_reward_hps_before"] == pytest.approx(metrics(first)[-1]["sample_reward_hps"], abs=1e-6)
    assert distance(weights(case, first, 3), weights(case, second, 1)) < 1e-6
    average = initial.find_init(first / f"checkpoint-000003/{COMPONENTS[TRAINERS[case]]}_ema")
    cfg = small.config(case, kl_weight=0.1)
    _, network, reference = TRAINERS[case].load_models(cfg, processes.start_world(), average)
    assert distance(weights(case, first, 3, "_ema"), network.state_dict()) == 0
    base = getattr(stock_pipeline(case), COMPONENTS[TRAINERS[case]])
    assert distance(base.state_dict(), reference.state_dict()) == 0  # of the KL term


@EACH
def test_kl_weight_holds_the_policy_at_its_reference(case, small_run, tmp_path):
    runs = small_run(case), train(case, tmp_path / "held", num_samples=1, kl_weight=1e4)
    free, held = (metrics(run) for run in runs)
    assert distance(*(weights(case, run, 3) for run in runs)) > 1e-5
    # The first update starts at the reference, where the penalty and its gradient are 0.
    assert free[0]["ratio_max_deviation_first_update"] == held[0]["ratio_max_deviation_first_update"] == 0
    assert held[-1]["loss"] > free[-1]["loss"]


@pytest.mark.parametrize("options", [
    dict(sde="flow", eta=0.7), dict(sde="cps", eta=0.8), dict(sde_window=2), dict(gradient_checkpointing=True),
    dict(reward="hps:0.7,clip:1.4"), dict(ratio="guard"), dict(ratio="dppo"),
], ids=lambda o: "-".join(map(str, next(iter(o.items())))))  # fmt: skip
def test_flux_options_train_with_ratio_1(options, tmp_path):
    rows = metrics(train("flux", tmp_path / "out", iterations=1, num_samples=1, **options))
    assert rows[0]["ratio_max_deviation_first_update"] <= 1e-6
    assert rows[0]["grad_norm"] > 0
    if "reward" in options:
        expected = 0.7 * rows[0]["reward_hps"] + 1.4 * rows[0]["reward_clip"]
        assert rows[0]["reward_mean"] == pytest.approx(expected, rel=1e-5)
        assert {"sample_reward_hps", "sample_reward_clip"} <= rows[0].keys()


@pytest.mark.parametrize("case", ["flux", "sd", "t2v"])
def test_every_step_of_a_window_is_trained(case, tmp_path, monkeypatch):
    chosen, trainer = [], TRAINERS[case]
    choose = trainer.choose_steps
    monkeypatch.setattr(trainer, "choose_steps", lambda *given: chosen.append(choose(*given)) or chosen[-1])
    train(case, tmp_path / "out", iterations=1, num_samples=1, sde_window=2, timestep_fraction=0.6)
    assert chosen == [[0, 1]] * 8  # 2 prompts, groups of 4


@pytest.mark.parametrize("case", cases("flux", "sd", "t2v"))
def test_each_iteration_has_prompts_a_window_and_a_deal_of_its_own(case, tmp_path, monkeypatch):
    trainer, rollouts, dealt = TRAINERS[case], [], []
    sample, deal = trainer.sample_groups, trainer.deal
    monkeypatch.setattr(trainer, "sample_groups", lambda *given: rollouts.append(given) or sample(*given))
    monkeypatch.setattr(trainer, "deal", lambda *given: dealt.append(deal(*given)) or dealt[-1])
    train(case, tmp_path / "out", iterations=2, num_samples=1, sde_window=2, sde_window_every=1)
    assert [given[6] for given in rollouts] == [range(2), range(1, 3)]
    text, other = (given[4] if case == "sd" else given[4][0] for given in rollouts)
    assert not torch.equal(text, other)
    keys = [("updates", 7, iteration, p) for iteration in range(2) for p in range(2)]  # the seed is 7
    assert dealt == [deal(range(4 * key[3], 4 * key[3] + 4), 2, data.keyed_rng(*key)) for key in keys]


@pytest.mark.parametrize("case", cases("flux", "sd", "t2v"))
def test_on_policy_the_kl_is_0_and_the_gradient_is_no_longer_than_allowed(case, tmp_path, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def measure(optimizer):
        weights = optimizer.param_groups[0]["params"]
        norms.append(torch.cat([weight.grad.flatten() for weight in weights]).norm().item())
        step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", measure)
    options = dict(iterations=1, num_samples=1, updates_per_rollout=1, max_grad_norm=1e-3)
    (row,) = metrics(train(case, tmp_path / "out", **options))
    assert 0 <= row["kl"] < 1e-8 and row["ratio_max_deviation_first_update"] <= 1e-6
    assert norms == [pytest.approx(1e-3, rel=1e-3)] and row["grad_norm"] > 1e-2  # before


@pytest.mark.parametrize("case", cases("flux", "sd", "t2v"))
def test_latents_and_log_probs_are_kept_in_float32(case, tmp_path, monkeypatch):
    """In bfloat16 the rounding of a latent would move the ratio: see `python -m claims ratio`."""
    trainer = TRAINERS[case]
    given = arguments_of(trainer, "sample_groups", monkeypatch, case, tmp_path / "out", steps=3, dtype="bfloat16")
    trajectories, log_probs, _ = trainer.sample_groups(*given)
    assert trajectories.dtype == log_probs.dtype == torch.float32
    assert (trajectories[:, 1] != trajectories[:, 1].bfloat16()).float().mean() > 0.9


def test_rewards_without_any_spread_are_reported_after_ten_iterations(tmp_path, capsys):
    (tmp_path / "own.py").write_text("def flat(images, prompts):\n    return 0 * images.mean((1, 2, 3))\n")
    options = dict(reward=f"{tmp_path}/own.py:flat", steps=3, group_size=2, prompts_per_iteration=1, num_samples=1)
    for iterations, reported in ((9, False), (10, True)):
        train("flux", tmp_path / str(iterations), iterations=iterations, **options)
        assert ("all rewards of every group were equal" in "".join(capsys.readouterr())) == reported


def test_the_average_moves_once_an_iteration_whatever_the_number_of_updates(tmp_path):
    out = train("flux", tmp_path / "out", iterations=1, num_samples=1, ema_decay=0.9, updates_per_rollout=4)
    base = FluxTransformer2DModel.from_pretrained(small.config("flux").model, subfolder="transformer").state_dict()
    trained, average = (weights("flux", out, 1, suffix) for suffix in ("", "_ema"))
    assert distance(base, trained) > 1e-5
    assert distance(average, {k: base[k] + 0.1 * (trained[k] - base[k]) for k in base}) < 1e-6


@pytest.mark.slow
def test_a_micro_batch_of_another_size_gives_the_same_run(small_run, tmp_path):
    other = train("flux", tmp_path / "other", micro_batch=3, num_samples=1)
    assert distance(weights("flux", small_run("flux"), 3), weights("flux", other, 3)) < 1e-4


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

    class HunyuanVideoTransformer3DModel:
        config = SimpleNamespace(guidance_embeds=False)

        def __call__(self, hidden_states, timestep, guidance, encoder_hidden_states, return_dict, **rest):
            seen.append(len(hidden_states))
            assert hidden_states.shape[1] == 8 and guidance is None
            assert timestep.tolist() == sorted([200, 500, 1000] * (len(timestep) // 3))
            assert all(len(value) == len(timestep) for value in (encoder_hidden_states, *rest.values()))
            return (hidden_states[:, :4] * encoder_hidden_states.mean((1, 2)).view(-1, 1, 1, 1, 1),)

    network = HunyuanVideoTransformer3DModel()
    z, sigma, picture = torch.randn(3, 4, 2, 4, 4), torch.tensor([0.2, 0.5, 1.0]), torch.randn(3, 4, 2, 4, 4)
    tokens = torch.stack([torch.zeros(3, 5, 6), torch.ones(3, 5, 6)], 1)  # the empty prompt, and the prompt
    condition = [tokens, torch.ones(3, 2, 5), torch.zeros(3, 2, 7), picture]
    guided = grpo_video.velocity(network, z, sigma, condition, grpo_video.Config(true_guidance=5.0))
    torch.testing.assert_close(guided, 0 * z + 5.0 * (z - 0 * z))
    once = [*(x[:, 1:] for x in condition[:3]), picture]
    torch.testing.assert_close(grpo_video.velocity(network, z, sigma, once, grpo_video.Config()), z)
    assert seen == [6, 3]


@EACH
def test_a_groups_first_step_costs_one_evaluation_and_changes_nothing(case, tmp_path, monkeypatch):
    """In a run with shared noise, beside the same run that evaluates the first step for every sample."""
    trainer, rows, seen, gradients = TRAINERS[case], {}, {"once": 0, "each": 0}, {"once": {}, "each": {}}
    load = trainer.load_models

    def counted(*args):
        def count(_, args, kwargs):
            seen[name] += len(args[0] if args else kwargs["hidden_states"])

        models = load(*args)
        models[1].register_forward_pre_hook(count, with_kwargs=True)
        for i, parameter in enumerate(processes.trainable(models[1])):
            keep = gradients[name].__setitem__  # the last time the whole gradient, before it is clipped
            parameter.register_post_accumulate_grad_hook(lambda p, i=i, keep=keep: keep(i, p.grad.flatten().clone()))
        return models

    monkeypatch.setattr(trainer, "load_models", counted)
    options = dict(iterations=1, num_samples=1, updates_per_rollout=1, timestep_fraction=1.0, micro_batch=16)
    for name in seen:
        if name == "each":
            monkeypatch.setattr(trainer, "distinct", lambda pairs, *_: ([*range(len(pairs))],) * 2)
        rows[name] = metrics(train(case, tmp_path / name, **options))[0]
    for key in ("loss", "grad_norm", "reward_mean", "advantage_abs", "kl"):
        assert rows["once"][key] == pytest.approx(rows["each"][key], rel=1e-5, abs=1e-6), key
    once, each = (torch.cat([of[i] for i in sorted(of)]) for of in gradients.values())
    assert (once - each).norm() < 5e-5 * each.norm()  # rounding; the largest found was 1.2e-5
    passes = 2 if case in ("sd", "i2v", "wan") else 1  # with guidance each sample is seen twice
    saved = 2 * (2 * (4 - 1)) * passes  # rollout and update, 2 prompts, groups of 4
    assert seen["each"] - seen["once"] == saved


@EACH
def test_best_of_n_trains_on_the_best_and_worst_of_each_prompts_own_group(case, tmp_path, monkeypatch):
    """The official video code sorts across prompts."""
    trained, advantages, trainer = [], [], TRAINERS[case]
    dealing, score = trainer.deal, trainer.group_advantages

    def spy_deal(*arguments):
        trained.append(dealing(*arguments))
        return trained[-1]

    def spy_score(*arguments):
        advantages.append(score(*arguments))
        return advantages[-1]

    monkeypatch.setattr(trainer, "deal", spy_deal)
    monkeypatch.setattr(trainer, "group_advantages", spy_score)
    out = train(case, tmp_path / "out", iterations=1, num_samples=1, keep_best_worst=1)
    A = advantages[0].view(2, 4)
    expected = [4 * prompt + index(A[prompt]).item() for prompt in range(2) for index in (torch.argmin, torch.argmax)]
    assert sorted(b for group in trained for samples in group for b in samples) == sorted(expected)
    (row,) = metrics(out)
    assert row["ratio_max_deviation_first_update"] <= 1e-6 and row["grad_norm"] > 0


# --------------------------------------------------------------------------------------------- noise and the samplers


@EACH
def test_initial_noise_is_shared_within_a_group_and_differs_between_prompts(case, tmp_path, monkeypatch):
    """The official code shares one noise among all prompts, and on video gives every process the same."""
    starts, trainer = [], TRAINERS[case]
    sample = trainer.sample_groups

    def spy(*arguments):
        drawn = sample(*arguments)
        starts.append(drawn[0][:, 0])
        return drawn

    monkeypatch.setattr(trainer, "sample_groups", spy)
    train(case, tmp_path / "shared", iterations=2, steps=3, num_samples=1)
    first, second = (z.view(2, 4, -1) for z in starts)
    assert torch.equal(first[:, 0], first[:, 3])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    starts.clear()
    train(case, tmp_path / "own", iterations=1, steps=3, num_samples=1, shared_noise=False)
    own = starts[0].view(8, -1)
    assert len(own.unique(dim=0)) == 8


@pytest.mark.parametrize("case", ["sd", "flux", "t2i"])
def test_a_rollout_is_freed_before_the_next_one(case, tmp_path, monkeypatch):
    trainer, of_last, alive = small.TRAINERS[case], [], []
    sample_groups = trainer.sample_groups

    def watched(*arguments):
        alive.append(sum(tensor() is not None for tensor in of_last))
        drawn = sample_groups(*arguments)
        of_last[:] = [weakref.ref(drawn[0]), weakref.ref(drawn[2])]  # trajectories, and images or videos
        return drawn

    def save(samples, iteration):
        alive.append(sum(tensor() is not None for tensor in of_last))
        return draw(samples, iteration)

    draw = output.Samples.save
    monkeypatch.setattr(output.Samples, "save", save)
    monkeypatch.setattr(trainer, "sample_groups", watched)
    train(case, tmp_path, iterations=3, steps=3, num_samples=1)
    assert alive == [0] * 6  # before three rollouts, and when pictures are drawn after 0, 2 and 3 iterations


def test_a_video_of_one_frame_is_a_picture_to_a_reward(tmp_path):
    code = "def red(images, prompts):\n    assert images.shape[1:] == (3, 32, 48)\n    return images.mean((1, 2, 3))\n"
    (tmp_path / "own.py").write_text(code)
    train("t2i", tmp_path / "run", reward=f"{tmp_path}/own.py:red", iterations=1, steps=3, num_samples=1)
    (row,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 0 < row["reward_red"] < 1 and 0 < row["sample_reward_red"] < 1


@pytest.mark.parametrize("window", [range(5), range(1, 3)], ids=str)
@pytest.mark.parametrize("case", cases("flux", "sd", "t2v"))
def test_the_loop_of_a_trainer_is_the_rollout_of_sampling(case, window, tmp_path, monkeypatch):
    """The trainers write the rollout out, to be read; the result is exactly that of `sampling.rollout`."""
    trainer, options = TRAINERS[case], dict(steps=6, shared_noise=False)
    given = arguments_of(trainer, "sample_groups", monkeypatch, case, tmp_path / "out", **options)
    cfg, _, network, vae, text, keys, _, schedule, shape, *rows = given
    ours = trainer.sample_groups(*given[:6], window, *given[7:])
    levels, step = schedule[1:] if case == "sd" else (schedule, flow_sde_step)
    rolled = []
    for p in range(2):  # prompts, each of 4 samples, a micro-batch
        own, condition = keys[4 * p : 4 * p + 4], text[[p] * 4] if case == "sd" else [x[[p] * 4] for x in text]

        def model(z, t, condition=condition):
            if case == "sd":
                return grpo_sd.predict(network, z, schedule[0][t], condition, cfg.guidance)
            return trainer.velocity(network, z, levels[t], condition, *((cfg.guidance, *rows) if rows else (cfg,)))

        def noise(t, own=own):
            return data.keyed_noise(shape, [(*key, t) for key in own], "step noise", "cpu")

        with torch.no_grad():
            start = data.keyed_noise(shape, own, "initial noise", "cpu")
            trajectory, log_probs, z0 = rollout(model, start, levels, cfg.eta, step, noise, window)
        rolled.append((trajectory, log_probs, trainer.decode(vae, z0, *rows)))
    for a, b in zip(ours, map(torch.cat, zip(*rolled, strict=True)), strict=True):
        assert torch.equal(a, b)
    assert ((ours[1] != 0).sum(0) == torch.tensor([8 if i in window else 0 for i in range(6)])).all()


def sample_pictures(case, prompts, tmp_path, monkeypatch, **changes):
    """What the trainer's own `draw` makes of the prompts, in its 6 steps, and from which latents."""
    _, draw, shape, *_ = arguments_of(output.Run, "iterations", monkeypatch, case, tmp_path, steps=6, **changes)
    z = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return draw(prompts, z), z


def test_sample_pictures_are_those_of_the_stock_flux_pipeline(tmp_path, monkeypatch):
    cfg, pipe, prompts = small.config("flux"), stock_pipeline("flux"), ["a red circle", "two blue squares"]
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # so that it takes our sigmas as they are
    ours, z = sample_pictures("flux", prompts, tmp_path, monkeypatch)
    theirs = pipe(
        prompts, height=64, width=64, latents=z, sigmas=flow_sigmas(6, cfg.shift)[:-1].tolist(), num_inference_steps=6,
        guidance_scale=cfg.guidance, max_sequence_length=cfg.max_sequence_length, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_sample_pictures_are_those_of_the_stock_sd_pipeline(tmp_path, monkeypatch):
    pipe, prompts = stock_pipeline("sd"), ["a red circle", "two blue squares"]
    # So its last latent is the clean prediction, as ours is; else it would keep a little noise.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    ours, z = sample_pictures("sd", prompts, tmp_path, monkeypatch, guidance=2.0)
    options = dict(height=64, width=64, latents=z, num_inference_steps=6, guidance_scale=2.0, output_type="pt")
    torch.testing.assert_close(ours, pipe(prompts, **options).images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case, guidance", [
    ("t2v", 1.0), pytest.param("t2i", 1.0, marks=pytest.mark.slow), pytest.param("i2v", 1.0, marks=pytest.mark.slow),
    ("i2v", 3.0), pytest.param("wan", 1.0, marks=pytest.mark.slow), ("wan", 3.0),
])  # fmt: skip
def test_sample_videos_are_those_of_the_stock_pipelines(case, guidance, tmp_path, monkeypatch):
    cfg, pipe = small.config(case, true_guidance=guidance), stock_pipeline(case)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # so that it takes our sigmas as they are
    prompt, sigmas, more = data.load_prompts(cfg.prompts)[0], flow_sigmas(6, cfg.shift)[:-1].tolist(), {}
    ours, z = sample_pictures(case, [prompt], tmp_path, monkeypatch, true_guidance=guidance)
    if case == "i2v":
        image = Image.open(data.first_frames(cfg, [prompt])[prompt])
        more |= {"image": image, "true_cfg_scale": guidance, "negative_prompt": ""}
        pipe.vae.encode = lambda x, encode=pipe.vae.encode: mode_only(encode(x))
    if case == "wan":
        more |= {"guidance_scale": guidance}
        set_timesteps = pipe.scheduler.set_timesteps  # this pipeline has no argument for sigmas
        pipe.scheduler.set_timesteps = functools.partial(set_timesteps, sigmas=sigmas)
    else:
        more |= {"guidance_scale": cfg.guidance, "sigmas": sigmas}
    theirs = pipe(
        prompt=prompt, height=cfg.height, width=cfg.width, num_frames=cfg.frames, latents=z, num_inference_steps=6,
        max_sequence_length=cfg.max_sequence_length, output_type="pt", **more,
    ).frames  # fmt: skip
    tolerance = 1e-5 if case == "wan" else 1e-3
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_trimmed_text_without_a_mask_gives_the_same_velocity():
    """Padding of the text changes nothing but the cost, and a mask that masks nothing shuts out flash attention."""
    load = HunyuanVideoTransformer3DModel.from_pretrained
    plain, lean = (load("tiny/hunyuan", subfolder="transformer").eval() for _ in range(2))
    blocks, masks = [*lean.transformer_blocks, *lean.single_transformer_blocks], []
    families.drop_full_masks(lean)
    for block in blocks:
        block.register_forward_pre_hook(lambda block, args: masks.append(args[3]))
    generator = torch.Generator().manual_seed(0)
    z, tokens = (torch.randn(size, generator=generator) for size in ((2, 16, 2, 8, 8), (2, 1, 24, 64)))
    pooled, lengths = torch.randn(2, 1, 64, generator=generator), torch.tensor([7, 7])
    tokens = tokens[..., : lean.config.text_embed_dim]
    mask = (torch.arange(24) < lengths[:, None]).float()[:, None]
    first_frame, cfg, sigma = torch.zeros(2, 0, 2, 8, 8), grpo_video.Config(), torch.tensor(0.7)
    with torch.no_grad():
        padded = grpo_video.velocity(plain, z, sigma, [tokens, mask, pooled, first_frame], cfg)
        trimmed = grpo_video.velocity(lean, z, sigma, [tokens, mask, pooled, first_frame], cfg)
        torch.testing.assert_close(trimmed, padded, rtol=1e-4, atol=1e-5)
        assert masks == [None] * len(blocks)
        mask[1, :, 5:] = 0
        mixed = grpo_video.velocity(lean, z, sigma, [tokens, mask, pooled, first_frame], cfg)
        alone = grpo_video.velocity(lean, z[1:], sigma, [x[1:] for x in (tokens, mask, pooled, first_frame)], cfg)
        torch.testing.assert_close(alone, mixed[1:], rtol=1e-4, atol=1e-5)
    assert all(not mask.all() and mask.shape[-1] < 24 + 32 for mask in masks[len(blocks) : 2 * len(blocks)])
    assert masks[2 * len(blocks) :] == [None] * len(blocks)


def test_prompts_that_are_too_long_are_not_reported_again_and_again(monkeypatch):
    from diffusers.utils import logging

    pipe, _, _ = grpo_sd.load_models(small.config("sd"), processes.start_world(), None)
    logger = logging.get_logger(type(pipe).__module__)
    with monkeypatch.context() as patch:
        written = []
        patch.setattr(logger, "handlers", [SimpleNamespace(level=0, handle=lambda r: written.append(r.getMessage()))])
        for number in range(3):
            grpo_sd.encode_prompts(pipe, [f"{number} red circles and " * 40], 1.0, "cpu")
        logger.warning("something else")
        logger.warning("something else")
    assert written == ["something else"] * 2


def test_prompts_of_different_lengths_are_padded_together():
    cache = data.PromptCache(
        lambda prompts: [torch.ones(1, 2, len(prompts[0]), 3), torch.ones(1, 2, len(prompts[0]))],
        processes.start_world(),
        torch.nn.Linear(1, 1),
    )
    tokens, mask = cache(["four", "two", "four"])
    assert tokens.shape == (3, 2, 4, 3) and mask[:, 0].sum(1).tolist() == [4, 3, 4]
    assert torch.equal(tokens[..., 0], mask)


def mode_only(encoded):
    """An encoding whose draws are its mode."""
    encoded.latent_dist.sample = lambda generator=None: encoded.latent_dist.mode()
    return encoded


# ----------------------------------------------------------------------------------------------------- when it breaks


def test_sigterm_ends_a_run_at_once_while_the_iteration_has_changed_no_weight(small_run, tmp_path, monkeypatch):
    """tests/test_killed.py has the other phases of an iteration, and several processes."""
    calls, out = [], tmp_path / "run"

    def loss(*arguments):
        calls.append(1)
        if len(calls) == 5:  # the second iteration's first; each has two updates of two micro-batches
            os.kill(os.getpid(), signal.SIGTERM)
        return grpo_loss(*arguments)

    grpo_loss = grpo_flux.grpo_loss
    monkeypatch.setattr(grpo_flux, "grpo_loss", loss)
    with pytest.raises(SystemExit) as caught:
        train("flux", out, **small.FINISHED)
    gc.unfreeze()  # the process goes on
    assert caught.value.code == 0 and len(calls) == 5
    assert len(metrics(out)) == 1 and not checkpoints.find_fault(out / "checkpoint-000001", processes.start_world())
    train("flux", out, **small.FINISHED, resume=True)
    assert metrics(out) == metrics(small_run("flux"))
    for suffix in ("", "_ema"):
        assert distance(weights("flux", out, 3, suffix), weights("flux", small_run("flux"), 3, suffix)) == 0


@EACH
def test_sigterm_ends_a_rollout_before_its_next_step(case, tmp_path, monkeypatch):
    draws, keyed_noise = [], data.keyed_noise

    def draw(shape, keys, purpose, device):
        if purpose == "step noise":
            draws.append(len(keys))
            os.kill(os.getpid(), signal.SIGTERM)
        return keyed_noise(shape, keys, purpose, device)

    monkeypatch.setattr(data, "keyed_noise", draw)
    with pytest.raises(SystemExit):
        train(case, tmp_path / "run", iterations=1, steps=4, num_samples=1)
    gc.unfreeze()
    assert len(draws) == 1  # of three steps with noise


def test_a_disk_without_room_for_a_checkpoint_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(RunError, match=r"a checkpoint takes 0.\d+ GiB, too much: .*run has 0.000931 GiB of room; make"):
        train("flux", tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_disk_that_is_full_while_saving_leaves_the_older_checkpoints(small_run, tmp_path):
    """A limit on file sizes stands in for the full disk: writes fail in the same places."""
    out = copy_of(small_run("flux"), tmp_path)
    before, limits = weights("flux", out, 3), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(RunError) as caught:
            train("flux", out, resume=True, iterations=4, **small.FINISHED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.fullmatch(r"could not write .*checkpoint-000004: .*; make room .*", str(caught.value))
    assert {path.name for path in out.glob("checkpoint-*") if "part" not in path.name} == {
        "checkpoint-000002",
        "checkpoint-000003",
    }
    assert distance(before, weights("flux", out, 3)) == 0
    train("flux", out, resume=True, iterations=4, **small.FINISHED)
    assert len(metrics(out)) == 4


@EACH
def test_the_reward_sees_the_decoded_tensor_of_its_own_prompt(case, tmp_path, monkeypatch):
    """No JPEG in between, and image i belongs to prompt i: what is scored is what `decode` returned, in its order."""
    decoded, scored, trainer = [], [], TRAINERS[case]
    decode, load_reward = trainer.decode, output.load_reward

    def spy(*args):
        decoded.append(decode(*args))
        return decoded[-1]

    def load(*args):
        reward = load_reward(*args)
        score = reward.scorers["hps"]
        reward.scorers["hps"] = lambda images, prompts: scored.append((images, prompts)) or score(images, prompts)
        return reward

    monkeypatch.setattr(trainer, "decode", spy)
    monkeypatch.setattr(output, "load_reward", load)
    train(case, tmp_path / "out", iterations=1)
    cfg = small.config(case)
    prompts = data.load_prompts(cfg.prompts)
    images = torch.cat([images for images, _ in scored])
    assert torch.equal(images, torch.cat(decoded).view_as(images))
    order = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, 0, cfg.seed)
    sampled = prompts[: cfg.num_samples]  # before and after the iteration
    expected = sampled + [prompts[i] for i in order for _ in range(cfg.group_size)] + sampled
    frames = getattr(cfg, "frames", 1)  # an image reward scores a video frame by frame
    assert [prompt for _, p in scored for prompt in p] == [prompt for prompt in expected for _ in range(frames)]


def test_a_reward_that_is_not_a_number_stops_the_run_and_leaves_what_was_saved(small_run, tmp_path, monkeypatch):
    out = copy_of(small_run("flux"), tmp_path)
    before = weights("flux", out, 3)
    load_reward = output.load_reward

    def load(*args):
        reward = load_reward(*args)
        reward.scorers["hps"] = lambda images, prompts: torch.full((len(images),), math.nan)
        return reward

    with monkeypatch.context() as patched, pytest.raises(RewardError, match="reward hps gave nan for the prompt"):
        patched.setattr(output, "load_reward", load)
        train("flux", out, resume=True, iterations=4, **small.FINISHED)
    assert len(metrics(out)) == 3
    assert distance(before, weights("flux", out, 3)) == 0
    train("flux", out, resume=True, iterations=4, **small.FINISHED)
    assert len(metrics(out)) == 4


FAILING = """
import os, torch
def judge(images, prompts):
    scores = images.mean((1, 2, 3))
    if os.environ["JUDGE"] == "fails":
        return scores / {"a": 1}["b"]
    return {"fine": scores, "column": scores[:, None], "nan": scores * float("nan")}[os.environ["JUDGE"]]
"""


@pytest.mark.slow
def test_a_reward_of_ones_own_that_fails_later_names_its_line_and_nothing_is_lost(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(FAILING)
    options = dict(reward=f"{tmp_path}/own.py:judge", num_samples=1, save_every=1)
    monkeypatch.setenv("JUDGE", "fine")
    train("flux", tmp_path / "out", iterations=1, **options)
    before = {path: path.read_bytes() for path in (tmp_path / "out/checkpoint-000001").rglob("*") if path.is_file()}
    for kind, expected in {
        "fails": r"^reward judge: .*own\.py, line 6: KeyError: 'b'; its prompts: \['.*'\]$",
        "column": r"^reward judge: it must give a tensor of shape \(8,\), and it gave \(8, 1\); its prompts: ",
        "nan": r"^reward judge gave nan for the prompt '.*'; the run stops here$",
    }.items():
        monkeypatch.setenv("JUDGE", kind)
        with pytest.raises(RewardError, match=expected):
            train("flux", tmp_path / "out", iterations=2, resume=True, **options)
        assert before == {path: path.read_bytes() for path in before} and len(metrics(tmp_path / "out")) == 1
    monkeypatch.setenv("JUDGE", "fine")
    train("flux", tmp_path / "out", iterations=2, resume=True, **options)
    assert [row["iteration"] for row in metrics(tmp_path / "out")] == [1, 2]


def test_a_loss_that_is_not_a_number_stops_before_it_touches_the_weights(tmp_path):
    with pytest.raises(RunError, match="lower --learning-rate"):
        train("flux", tmp_path / "out", num_samples=1, learning_rate=1e30)


@pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd, grpo_video], ids=lambda trainer: trainer.__name__)
def test_errors_are_one_line_and_exit_code_1(trainer, tmp_path, monkeypatch):
    """Run as a script. Python prints the text that SystemExit carries on stderr, and exits with 1."""
    script = Path(trainer.__file__).name
    monkeypatch.setattr(sys, "argv", [script, "--group-size", "1", "--output-dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(script, run_name="__main__")
    assert caught.value.code.startswith("error: --group-size must be at least 2")
    assert "\n" not in caught.value.code
    assert not (tmp_path / "out").exists()


WRONG_OPTION = """
import runpy, sys
for script in ("grpo_sd.py", "grpo_flux.py", "grpo_video.py", "eval.py"):
    sys.argv = [script, "--seed", "x"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        print(e.code)
print(*sorted({"diffusers", "transformers", "peft", "torchvision", "torch._dynamo", "open_clip"} & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_wrong_option_answers_before_heavy_packages_are_imported():
    done = subprocess.run([sys.executable, "-c", WRONG_OPTION], capture_output=True, text=True, timeout=300)
    *errors, heavy = done.stdout.splitlines()
    assert len(errors) == 4
    assert all("--seed" in error for error in errors)
    assert heavy == ""


@pytest.mark.slow
def test_a_script_that_fails_prints_one_line(tmp_path):
    command = [sys.executable, "grpo_flux.py", "--preset", "tiny", "--group-size", "1", "--output-dir"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0
    assert done.stderr.startswith("error: --group-size must be at least 2")
    assert not (tmp_path / "out").exists()
