"""The evaluation end to end, by its real code path, on tiny models."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

import eval as evaluation
import grpo_flux
import grpo_video
from evaluation import models, report
from evaluation import prompts as prompt_sets
from rewards import RewardError, load_reward
from runtime import data, loading, processes
from runtime.options import RunError, parse_config
from sampling import flow_sigmas, sample_ode

REWARDS = {"hps": "tiny/hps", "clip": "tiny/clip"}
PROMPTS = ["a red circle", "two blue squares", "a cross above a circle", "a green cross and a red square", "a triangle"]
SMALL = {"height": 64, "width": 64, "steps": 2, "guidance": 3.5, "shift": 3.0, "max_sequence_length": 32}


def words(options):
    """{"batch_size": 4, "checkpoint": [a, b]} → ["--batch-size", "4", "--checkpoint", a, b]"""
    listed = {key: value if isinstance(value, (list, tuple)) else [value] for key, value in options.items()}
    return [word for key, values in listed.items() for word in (f"--{key.replace('_', '-')}", *map(str, values))]


def evaluate(output_dir, **options):
    """Run it in this process, as its command line would. Returns results.json."""
    options = {"preset": "tiny", "output_dir": output_dir} | options
    evaluation.main(parse_config(evaluation.Config, evaluation.PRESETS, words(options)))
    return json.loads((Path(output_dir) / "results.json").read_text())


def pictures(folder):
    """(B, 3, H, W) in [0, 1], as the PNG files of a folder have them."""
    read = [np.array(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))]
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module", autouse=True)
def rewards_are_loaded_once():
    """The same reward models for all evaluations of this file."""
    loaded = {}

    def load(spec, paths, *rest):
        key = spec, tuple(paths.items())
        loaded[key] = loaded.get(key) or load_reward(spec, paths, *rest)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_reward", load)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run's folder with checkpoints of every kind: other weights, the same weights as EMA, and LoRA."""
    folder = tmp_path_factory.mktemp("run")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained("tiny/flux", subfolder="transformer")
    checkpoint = folder / "checkpoint-000002"
    transformer.save_pretrained(checkpoint / "transformer_ema")
    with torch.no_grad():
        transformer.proj_out.weight += 0.02
    transformer.save_pretrained(checkpoint / "transformer")
    write_config(folder, "grpo_flux.py", grpo_flux.Config(**grpo_flux.PRESETS["tiny"] | SMALL))
    network = diffusers.FluxTransformer2DModel.from_pretrained("tiny/flux", subfolder="transformer")
    save_lora(network, diffusers.FluxPipeline, grpo_flux.LORA_TARGETS, folder / "checkpoint-000003")
    return folder


def write_config(folder, script, config):
    """config.json of a training run."""
    content = {"script": script, "directory": os.getcwd()} | dataclasses.asdict(config)
    (folder / "config.json").write_text(json.dumps(content))


def save_lora(network, pipeline_class, targets, folder):
    """LoRA weights of the network that change its output plainly."""
    from peft import get_peft_model_state_dict

    network = loading.prepare_network(network, lora_rank=2, lora_targets=targets)
    with torch.no_grad():
        for parameter in processes.trainable(network):
            parameter += 0.1
    pipeline_class.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(network),
        transformer_lora_adapter_metadata=network.peft_config["default"].to_dict(),
    )


@pytest.fixture(scope="module")
def finished(run, prompts, tmp_path_factory):
    """One evaluation that most tests look at: base, trained weights, EMA (here the base's weights) and LoRA."""
    out = tmp_path_factory.mktemp("eval") / "out"
    checkpoints = [run / "checkpoint-000002", run / "checkpoint-000002/transformer_ema", run / "checkpoint-000003"]
    return out, evaluate(out, checkpoint=checkpoints, prompts=prompts, images_per_prompt=2, batch_size=4)


def folder_of(out, results, name):
    return out / next(model["pictures"] for key, model in results["models"].items() if name in key)


# ------------------------------------------------------------------------------------------------------- what it finds


def test_scores_are_those_of_the_trainers_reward(finished):
    out, results = finished
    captions = [prompt for prompt in PROMPTS for _ in range(2)]
    reward = load_reward("hps,clip", REWARDS)
    for name in results["models"]:
        expected = reward(pictures(folder_of(out, results, name)), captions)
        for metric, values in expected.items():
            own = torch.tensor([picture["scores"][name][metric] for picture in results["pictures"]])
            assert (own - values).abs().max() <= 1e-6
            mean = results["summary"][metric][name]["overall"]["mean"]
            assert mean == pytest.approx(values.mean().item(), abs=1e-6)


def test_every_model_gets_the_same_noise(finished):
    """The EMA folder holds the base's own weights: same pictures, and a difference of exactly 0."""
    out, results = finished
    base, same = folder_of(out, results, "base"), folder_of(out, results, "transformer_ema")
    assert torch.equal(pictures(base), pictures(same))
    name = next(name for name in results["models"] if "ema" in name)
    for metric in ("hps", "clip", "geneval"):
        assert results["summary"][metric][name]["overall"]["difference"] == 0
    drawn = pictures(base)
    assert all((drawn[i] - drawn[j]).abs().mean() > 0.01 for i in range(10) for j in range(i))


def test_full_and_lora_weights_change_the_pictures(finished):
    out, results = finished
    base = pictures(folder_of(out, results, "base"))
    trained, lora = (pictures(folder_of(out, results, name)) for name in ("/checkpoint-000002", "000003"))
    assert (trained - base).abs().mean() > 1e-3 and (lora - base).abs().mean() > 1e-3


@torch.no_grad()
def test_pictures_are_those_of_the_trainers_ode_sampler(finished):
    out, results = finished
    pipe = diffusers.FluxPipeline.from_pretrained("tiny/flux")
    rows = 64 // (2 * pipe.vae_scale_factor)  # of tokens
    text = grpo_flux.encode_prompts(pipe, PROMPTS, SMALL["max_sequence_length"], "cpu")
    sigmas = flow_sigmas(2, 3.0)
    keys = [(42, i, 1) for i in range(len(PROMPTS))]
    z = data.keyed_noise((rows**2, pipe.transformer.config.in_channels), keys, "evaluation", "cpu")
    z0 = sample_ode(lambda z, i: grpo_flux.velocity(pipe.transformer, z, sigmas[i], text, 3.5, rows), z, sigmas)
    expected = grpo_flux.decode(pipe.vae, z0, rows)
    assert (pictures(folder_of(out, results, "base"))[1::2] - expected).abs().max() < 1.5 / 255


def test_compare_is_paired_by_prompt_and_stratified():
    rng = np.random.default_rng(0)
    base, own = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    groups = ["a", "a", "b", "b", "b", "b"]
    result = evaluation.compare(base, own, groups)
    gain = own.mean(1) - base.mean(1)
    a, b = gain[:2], gain[2:]
    assert result["a"]["difference"] == pytest.approx(a.mean())
    assert result["b"]["error"] == pytest.approx(b.std(ddof=1) / 2)
    assert result["overall"]["mean"] == pytest.approx((own[:2].mean() + own[2:].mean()) / 2)  # of groups, not prompts
    error = np.hypot(a.std(ddof=1) / 2**0.5, b.std(ddof=1) / 4**0.5) / 2
    assert result["overall"]["error"] == pytest.approx(error)
    single = evaluation.compare(base, own, ["overall"] * 6)
    assert list(single) == ["overall"]
    assert single["overall"]["error"] == pytest.approx(gain.std(ddof=1) / 6**0.5)
    assert evaluation.compare(base[:1], own[:1], ["a"])["overall"]["error"] is None


def test_geneval_overall_is_the_mean_of_its_tags(finished):
    _, results = finished
    by_tag = results["summary"]["geneval"]["base"]
    tags = {picture["tag"] for picture in results["pictures"]}
    assert by_tag.keys() == tags | {"overall"} and len(tags) >= 4
    shares = []
    for tag in tags:
        right = [p["scores"]["base"]["geneval"] for p in results["pictures"] if p["tag"] == tag]
        shares.append(np.mean(right))
        assert by_tag[tag]["mean"] == pytest.approx(np.mean(right))
    assert by_tag["overall"]["mean"] == pytest.approx(np.mean(shares))


def test_hps_benchmark_is_reported_by_style_times_100(run, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_sets, "fetch_hps_prompts", lambda style: [f"a red circle, {style}", "a blue cross"])
    results = evaluate(tmp_path, model="tiny/flux", prompts="hpsv2", metrics="hps", images_per_prompt=1, **SMALL)
    styles = ["anime", "concept-art", "paintings", "photo", "overall"]
    assert list(results["summary"]["hps"]["base"]) == styles
    lines = (tmp_path / "results.md").read_text().splitlines()
    for style in styles:
        mean = results["summary"]["hps"]["base"][style]["mean"]
        assert f"| hps {style} x 100 | {100 * mean:.4f} |" in lines


# ------------------------------------------------------------------------------------------------------- what it leaves


def test_the_report_is_whole_and_needs_no_other_file(finished):
    out, results = finished
    page = (out / "index.html").read_text()
    assert page.count("data:image/webp;base64,") == len(PROMPTS) * 4
    assert not re.search(r"(src|href)=.?(?!data:)[\w/.]+|https?://|url\(", page.replace('src="data:', ""))
    assert all(prompt in page for prompt in PROMPTS)
    table = (out / "results.md").read_text()
    assert "| metric | base |" in table and "± " in table and "| geneval overall |" in table
    assert "seen by its own checker" in table
    assert Image.open(out / "compare.png").size == (200 + 4 * 264, 32 + 5 * 264)
    assert (out / "vote.html").read_text().count("data:image/webp;base64,") == len(PROMPTS) * 3 * 2
    assert results["settings"]["steps"] == 2 and results["versions"]["torch"] in torch.__version__
    assert len(results["pictures"]) == 10
    assert not list(out.rglob("*.part*"))


def test_settings_come_from_the_run_and_can_be_overridden(finished, run, prompts, tmp_path):
    _, results = finished
    assert {name: results["settings"][name] for name in SMALL} == SMALL
    options = dict(checkpoint=run / "checkpoint-000002", prompts=prompts, output_dir=tmp_path, steps=7)
    cfg = parse_config(evaluation.Config, evaluation.PRESETS, words({"preset": "tiny"} | options))
    cfg, family, contestants, rows = evaluation.plan(cfg)
    assert (cfg.steps, cfg.guidance, cfg.model, family) == (7, 3.5, "tiny/flux", "FluxPipeline")
    assert [c.kind for c in contestants] == ["base", "network"] and len(rows) == 5
    cfg = parse_config(evaluation.Config, evaluation.PRESETS, words({"preset": "tiny", "model": "tiny/flux"}))
    assert evaluation.plan(cfg)[0].steps == 28


def planned(**options):
    return evaluation.plan(parse_config(evaluation.Config, evaluation.PRESETS, words(options)))[0]


def test_prompts_and_metrics_come_from_the_run(run, prompts, tmp_path, monkeypatch):
    """`eval.py --checkpoint X` needs no other option."""
    cfg = planned(checkpoint=run / "checkpoint-000002")
    assert (cfg.prompts, cfg.metrics) == ("prompts/tiny.txt", "hps,clip")
    cfg = planned(checkpoint=run / "checkpoint-000002", prompts=prompts, metrics="clip")
    assert (cfg.prompts, cfg.metrics) == (str(prompts), "clip")
    monkeypatch.setattr(prompt_sets, "fetch_hps_prompts", lambda style: [f"a red circle, {style}"])
    assert planned(model="tiny/flux").prompts == "hpsv2" and planned(model="tiny/flux").metrics == "hps,clip,pickscore"
    video = {"model": "tiny/hunyuan", "frames": 9, "height": 32, "width": 32}
    with pytest.raises(RunError, match="no prompt file ''"):
        planned(**video)
    assert planned(**video, prompts=prompts).metrics == "vq,mq,ta"
    options = grpo_flux.PRESETS["tiny"] | SMALL
    (tmp_path / "own.py").write_text(OWN)
    for number, (changed, expected) in enumerate((
        ({"prompts": "hpdv2"}, ("hpsv2", "hps,clip")),
        ({"reward_paths": ""}, ("prompts/tiny.txt", "hps,clip,pickscore")),
        ({"reward_paths": "geneval=tiny/pictures.py:Detector,hps=tiny/hps"}, ("prompts/tiny.txt", "hps")),
        ({"reward": f"{tmp_path}/own.py:red:2"}, ("prompts/tiny.txt", f"hps,clip,{tmp_path}/own.py:red")),
    )):  # fmt: skip
        moved = shutil.copytree(run, tmp_path / str(number))
        write_config(moved, "grpo_flux.py", grpo_flux.Config(**options | changed))
        cfg = planned(checkpoint=moved / "checkpoint-000002")
        assert (cfg.prompts, cfg.metrics) == expected
    write_config(moved, "grpo_flux.py", grpo_flux.Config(**options | {"prompts": str(prompts)}))
    both = [run / "checkpoint-000002", moved / "checkpoint-000002"]
    with pytest.raises(RunError, match=r"runs differ in prompts: .*prompts/tiny.txt; give --prompts"):
        planned(checkpoint=both)
    assert planned(checkpoint=both, prompts=prompts).prompts == str(prompts)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_runs_config_that_is_no_json_is_one_line(content, run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    (moved / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"moved/config.json is damaged, it is not JSON; restore it") as caught:
        planned(checkpoint=moved / "checkpoint-000002")
    assert "\n" not in str(caught.value)


def test_clean_latents_are_not_clipped_where_a_scheduler_config_says_nothing():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("tiny/sd")
    old = {k: v for k, v in pipe.scheduler.config.items() if k != "clip_sample"}
    pipe.scheduler = diffusers.PNDMScheduler.from_config(old)
    assert not evaluation.set_sampler(pipe, evaluation.Config()).scheduler.config.clip_sample


@pytest.mark.parametrize("height, tiled", [(480, False), (1280, True)])
def test_clips_are_decoded_as_in_training_unless_they_are_too_large(height, tiled):
    pipe = diffusers.HunyuanVideoPipeline.from_pretrained("tiny/hunyuan")
    evaluation.set_sampler(pipe, evaluation.Config(frames=9, height=height, width=480))
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (not tiled, tiled)


def test_one_pipeline_at_a_time_is_in_memory(run, prompts, tmp_path, monkeypatch):
    load, before = evaluation.load_pipeline, []

    def loading_the_next(*args):
        assert all(pipe() is None for pipe in before)
        pipe = load(*args)
        before.append(weakref.ref(pipe.transformer))
        return pipe

    monkeypatch.setattr(evaluation, "load_pipeline", loading_the_next)
    checkpoints = [run / "checkpoint-000002", run / "checkpoint-000003"]
    evaluate(tmp_path / "out", checkpoint=checkpoints, prompts=prompts, metrics="hps", images_per_prompt=1)
    assert len(before) == 3


OWN = """
import torch
def red(images, prompts):
    return images[:, 0].mean((1, 2))
"""


def test_reward_paths_come_from_the_run_and_ones_own_reward_is_a_metric(run, prompts, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    metrics = f"hps,{tmp_path}/own.py:red"
    options = dict(preset="paper", checkpoint=run / "checkpoint-000002", prompts=prompts, metrics=metrics)
    results = evaluate(tmp_path / "out", **options)
    assert results["settings"]["reward_paths"] == "hps=tiny/hps,clip=tiny/clip"  # clip may be added later
    for model, name in (("base", "base"), ("checkpoint", f"{run.name}/checkpoint-000002")):
        shown = pictures(folder_of(tmp_path / "out", results, name))
        summary = results["summary"]["red"][name]["overall"]
        assert summary["mean"] == pytest.approx(shown[:, 0].mean().item(), abs=1e-6), model
    assert results["summary"]["red"][f"{run.name}/checkpoint-000002"]["overall"]["difference"] != 0


def test_reward_paths_of_a_run_are_found_from_its_directory_or_named(run, prompts, tmp_path, monkeypatch):
    moved = shutil.copytree(run, tmp_path / "moved")
    options = dict(preset="paper", checkpoint=moved / "checkpoint-000002", prompts=prompts.resolve(), metrics="hps")
    repository = os.getcwd()
    monkeypatch.chdir(tmp_path)
    cfg = parse_config(evaluation.Config, evaluation.PRESETS, words(options))
    assert evaluation.plan(cfg)[0].reward_paths == f"hps={repository}/tiny/hps,clip={repository}/tiny/clip"
    monkeypatch.chdir(repository)
    other = grpo_flux.PRESETS["tiny"] | SMALL | {"reward_paths": "hps=a/b"}
    write_config(moved, "grpo_flux.py", grpo_flux.Config(**other))
    options["checkpoint"] = [moved / "checkpoint-000002", run / "checkpoint-000002"]
    cfg = parse_config(evaluation.Config, evaluation.PRESETS, words(options))
    with pytest.raises(RunError, match=r"runs differ in reward_paths: a/b, tiny/hps; give --reward-paths"):
        evaluation.plan(cfg)


def test_a_runs_own_reward_is_found_from_its_directory(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "hps").mkdir()  # has the name of a reward, but is none
    checkpoint = tmp_path / "run" / "checkpoint-000002"
    checkpoint.mkdir(parents=True)
    stored = {"model": "a/b", "prompts": "hpdv2", "reward_paths": "", "directory": str(tmp_path)}
    stored["reward"] = "hps:0.5,own.py:red@0.5:2,gone.py:red"
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    reward = models.run_options(str(checkpoint))["reward"]
    assert reward == f"hps:0.5,{tmp_path}/own.py:red@0.5:2,gone.py:red"


def test_the_report_needs_results_only(tmp_path):
    """Made-up results of two models, without any evaluation."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 3 * 20, 30, 3), dtype=np.uint8)  # 3 frames of 20 x 30
    files = {name: [[tmp_path / f"{name}.png"]] for name in ("base", "better")}
    for pixels, [[file]] in zip(noise, files.values(), strict=True):
        Image.fromarray(pixels).save(file)
    scores = {"base": [[{"mq": 1.0}]], "better": [[{"mq": 2.0, "geneval": 0.0, "wrong": "1 <dog>, not 2"}]]}
    entry = {"mean": 2.0, "difference": 1.0, "error": 0.1}
    summary = {"mq": {"base": {"overall": entry | {"difference": 0.0}}, "better": {"overall": entry}}}
    results = report.Results(
        [{"prompt": "a & b"}], {"base": {}, "better": {}}, files, scores, summary, ["a remark"], {}, {}, 3, 8.0
    )
    report.write_report(results, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "a &amp; b" in page and "✗ 1 &lt;dog&gt;, not 2" in page and "<td class=up>+1.0000 ± 0.1000</td>" in page
    assert "| mq | 2.0000 | 2.0000 | +1.0000 ± 0.1000 |" in (tmp_path / "results.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["pictures"][0]["scores"]["better"]["mq"] == 2.0
    sheet = np.array(Image.open(tmp_path / "compare.png"))
    assert sheet.shape == (32 + 171 + 8, 200 + 2 * (3 * 256 + 8), 3)
    assert (sheet[32:203, 200 : 200 + 256] == np.array(Image.fromarray(noise[0, :20]).resize((256, 171), 0))).all()


# ------------------------------------------------------------------------------------- guarantees: resume, processes


def test_stopped_and_started_again_it_redoes_nothing_and_ends_the_same(finished, run, prompts, tmp_path, monkeypatch):
    out, results = finished
    options = dict(
        checkpoint=results["settings"]["checkpoint"], prompts=prompts, images_per_prompt=2, batch_size=4
    )  # fmt: skip
    draw, drawn = evaluation.draw, []

    def stop_after(count):
        def patched(pipe, cfg, rows, keys, device):
            if len(drawn) == count:
                raise KeyboardInterrupt
            drawn.append(keys)
            return draw(pipe, cfg, rows, keys, device)

        return patched

    monkeypatch.setattr(evaluation, "draw", stop_after(5))
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "out", **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-*.png")}
    assert len(before) == 10 + 8 and len(drawn) == 5
    monkeypatch.setattr(evaluation, "draw", stop_after(99))
    write, written = evaluation.write_atomically, []

    def stop_scoring(path, text):
        written.append(path)
        if len(written) == 17:  # config.json, then 16 scores
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(evaluation, "write_atomically", stop_scoring)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "out", **options)
    assert len(drawn) == 4 * 3
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    monkeypatch.setattr(evaluation, "write_atomically", write)
    again = evaluate(tmp_path / "out", **options)
    assert again == results
    assert (tmp_path / "out/results.json").read_bytes() == (out / "results.json").read_bytes()

    def forbidden(*args, **kwargs):
        raise AssertionError("there is nothing left to do")

    for name in ("load_pipeline", "load_reward", "draw"):
        monkeypatch.setattr(evaluation, name, forbidden)
    assert evaluate(tmp_path / "out", **options) == results


def test_a_checkpoint_and_a_metric_can_be_added_later(run, prompts, tmp_path, monkeypatch):
    options = dict(model="tiny/flux", prompts=prompts, images_per_prompt=1, **SMALL)
    first = evaluate(tmp_path, metrics="hps", reward_paths="hps=tiny/hps", **options)
    paths, both = "hps=tiny/hps,clip=tiny/clip", "hps, clip,geneval"
    checkpoint = run / "checkpoint-000002"
    second = evaluate(tmp_path, metrics=both, reward_paths=paths, checkpoint=checkpoint, **options)
    assert first["summary"]["hps"]["base"] == second["summary"]["hps"]["base"]
    assert set(second["summary"]) == {"hps", "clip", "geneval"} and len(second["models"]) == 2


@pytest.mark.slow
def test_two_processes_give_the_same_results_as_one(run, prompts, tmp_path):
    options = {"preset": "tiny", "prompts": prompts, "checkpoint": run / "checkpoint-000002", "batch_size": 2}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has it: another number adds up in another order
    one = evaluate(tmp_path / "one", **options)
    torch.set_num_threads(threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "eval.py"]
    two = subprocess.run(
        [*command, *words(options | {"output_dir": tmp_path / "two"})],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert two.returncode == 0, two.stderr
    assert "| hps | " in two.stdout
    assert json.loads((tmp_path / "two/results.json").read_text()) == one
    assert (tmp_path / "two/results.json").read_bytes() == (tmp_path / "one/results.json").read_bytes()


# ------------------------------------------------------------------------------------------------------- other families


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A random Stable Diffusion pipeline, and one with other weights: a whole diffusers folder as a checkpoint."""
    folder = tmp_path_factory.mktemp("sd")
    shutil.copytree("tiny/sd", folder / "base")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder / "base", safety_checker=None)
    with torch.no_grad():
        pipe.unet.conv_out.weight += 0.1
    pipe.save_pretrained(folder / "tuned")
    return folder


def test_stable_diffusion_and_a_whole_pipeline_as_checkpoint(stable_diffusion, prompts, tmp_path):
    options = dict(model=stable_diffusion / "base", checkpoint=stable_diffusion / "tuned", prompts=prompts)
    options |= dict(height=64, width=64, steps=3, metrics="hps", images_per_prompt=1)
    results = evaluate(tmp_path, **options)
    assert results["settings"]["guidance"] == 7.5
    base, tuned = (pictures(folder_of(tmp_path, results, name)) for name in ("base", "tuned"))
    assert base.shape == (5, 3, 64, 64) and (base - tuned).abs().mean() > 1e-4


VIDEO = {"width": 48, "frames": 5, "steps": 2}  # wider than high, to tell the axes apart


def video_checkpoint(task, lora, folder):
    """A video run's folder with a checkpoint, full or LoRA, of changed weights."""
    cfg = grpo_video.Config(**grpo_video.PRESETS[f"tiny-{task}"] | VIDEO)
    pipeline, network_class = diffusers.HunyuanVideoPipeline, diffusers.HunyuanVideoTransformer3DModel
    if task == "wan":
        pipeline, network_class = diffusers.WanPipeline, diffusers.WanTransformer3DModel
    place = {"path": cfg.transformer} if task == "i2v" else {"path": cfg.model, "subfolder": "transformer"}
    network = network_class.from_pretrained(place.pop("path"), **place)
    folder.mkdir()
    write_config(folder, "grpo_video.py", cfg)
    if lora:
        save_lora(network, pipeline, grpo_video.LORA_TARGETS, folder / "checkpoint-000001")
    else:
        with torch.no_grad():
            network.proj_out.weight += 0.02
        network.save_pretrained(folder / "checkpoint-000001" / "transformer")
    return folder / "checkpoint-000001"


@pytest.mark.parametrize(
    "task, lora",
    [
        ("i2v", True),
        ("wan", False),
        pytest.param("wan", True, marks=pytest.mark.slow),
        pytest.param("t2v", False, marks=pytest.mark.slow),
        pytest.param("t2v", True, marks=pytest.mark.slow),
        pytest.param("i2v", False, marks=pytest.mark.slow),
    ],
)
def test_video(task, lora, tmp_path):
    """A run's model, its transformer where that is another one, and its settings are found in the run's folder."""
    rows = [json.loads(line) for line in Path("prompts/moving_heldout.jsonl").read_text().splitlines()[:2]]
    rows = [row | {"image": str(Path("prompts", row["image"]).resolve())} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text(
        "def width(videos, prompts): return 0 * videos.mean((1, 2, 3, 4)) + videos.shape[-1]"
    )
    options = dict(preset="tiny-video", checkpoint=video_checkpoint(task, lora, tmp_path / "run"))
    options |= dict(metrics=f"hps,vq,mq,{tmp_path}/own.py:width", prompts=tmp_path / "prompts.jsonl", batch_size=2)
    options |= dict(reward_paths="hps=tiny/hps,videoalign=tiny/videoalign")
    out = tmp_path / "out"
    results = evaluate(out, **options)
    settings = results["settings"]
    assert settings["model"] == ("tiny/wan" if task == "wan" else "tiny/hunyuan") and settings["steps"] == 2
    assert settings["transformer"] == ("tiny/skyreels" if task == "i2v" else "")
    assert settings["guidance"] == (6.0 if task == "t2v" else 2.0)
    assert set(results["summary"]) == {"hps", "vq", "vq_raw", "mq", "mq_raw", "width"}
    folders = [out / model["pictures"] for model in results["models"].values()]
    base, tuned = (pictures(folder) for folder in folders)
    assert base.shape == (4, 3, 5 * 32, 48) and (base - tuned).abs().mean() > 1e-4
    videos = base.unflatten(2, (5, 32)).transpose(1, 2)
    if task == "i2v":
        given = torch.stack([first_frame(row["image"]) for row in rows])
        assert (videos[::2, 0] - given).abs().mean() < 0.05
    judge = load_reward("hps,vq,mq", {"hps": "tiny/hps", "videoalign": "tiny/videoalign"})
    expected = judge(videos[2:], [rows[1]["prompt"]] * 2, settings["fps"])
    for name, values in (expected | {"width": torch.tensor([48.0, 48.0])}).items():
        own = [picture["scores"]["base"][name] for picture in results["pictures"][2:]]
        assert own == pytest.approx(values.tolist(), abs=1e-6)
    raw = judge.scorers["videoalign"](videos[2:], [rows[1]["prompt"]] * 2, settings["fps"], normalize=False)
    own = [picture["scores"]["base"]["vq_raw"] for picture in results["pictures"][2:]]
    assert own == pytest.approx(raw["vq"].tolist(), abs=1e-5)
    assert "image/webp" in (out / "index.html").read_text()
    assert Image.open(out / "compare.png").width == 200 + 2 * (4 * 256 + 8)
    shutil.rmtree(folders[0])
    assert evaluate(out, **options) == results  # drawn again, the first frame's noise included


@pytest.mark.slow
def test_a_transformer_may_be_a_hub_id(tmp_path, monkeypatch):
    """As SkyReels' is: then there is no config.json to open."""
    repository = tmp_path / "hub/models--some--skyreels"
    shutil.copytree("tiny/skyreels", repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"prompt": "a red circle growing", "image": str(Path("prompts/moving/00.png").resolve())}) + "\n"
    )
    options = dict(preset="tiny-video", model="tiny/hunyuan", prompts=tmp_path / "prompts.jsonl", metrics="mq", steps=2)
    options |= dict(frames=5, height=32, width=32, guidance=2.0, max_sequence_length=24, images_per_prompt=1)
    named, local = (
        evaluate(tmp_path / name, transformer=f"{name}/skyreels", **options)["summary"] for name in ("some", "tiny")
    )
    assert named == local


def first_frame(path):
    return torch.from_numpy(np.array(Image.open(path).resize((48, 32)))).permute(2, 0, 1) / 255


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"checkpoint": "runs/nothing/checkpoint-000300"}, "there is no runs/nothing/checkpoint-000300"),
        ({"checkpoint": "tiny/clip"}, "tiny/clip has neither a transformer folder"),
        ({"checkpoint": ["RUN", "RUN"]}, "names the same weights twice"),
        ({"checkpoint": "SD/base"}, "SD/base is a StableDiffusionPipeline, but the base tiny/flux is a FluxPipeline"),
        ({"checkpoint": "SD/base/unet"}, "is a UNet2DConditionModel, but tiny/flux has a FluxTransformer2DModel"),
        ({"checkpoint": "RUN", "model": "SD/base"}, "has neither a unet folder"),
        ({"checkpoint": "OTHER"}, "OTHER was not trained from tiny/flux: its config differs in num_layers"),
        ({"checkpoint": "LORA", "model": "SD/base"}, "is no LoRA of"),
        ({"checkpoint": "BROKEN.safetensors"}, "--checkpoint: cannot read BROKEN.safetensors"),
        (
            {"transformer": "tiny/skyreels"},
            "is a HunyuanVideoTransformer3DModel, but tiny/flux has a FluxTransformer2DModel",
        ),
        ({"model": ""}, "--model is needed"),
        ({"model": "tiny/nothing"}, "no folder 'tiny/nothing'"),
        ({"model": "tiny/clip"}, "cannot load tiny/clip"),
        ({"model": "tiny/hunyuan", "metrics": "geneval", "frames": 9}, "--metrics geneval judges pictures"),
        (
            {"model": "tiny/hunyuan", "frames": 8, "height": 32, "width": 32},
            "--frames must be 1 more than a multiple of 4",
        ),
        ({"frames": 9}, "--frames 9: tiny/flux draws pictures"),
        ({"metrics": "beauty"}, "unknown reward 'beauty'"),
        ({"metrics": "hps,hps"}, "reward 'hps' is given twice"),
        ({"metrics": "hps,nowhere.py:f"}, "there is no file 'nowhere.py'"),
        ({"metrics": "hps,sampling.py:beauty"}, "sampling.py has no function or class 'beauty'"),
        ({"metrics": "hps,http://host/judge:2"}, "--metrics takes names only"),
        ({"reward_paths": "geneval=sampling.py:f"}, "geneval has an option here, --detector"),
        ({"metrics": "hps@0.28"}, "--metrics takes names only"),
        ({"metrics": "vq"}, "reward vq judges video"),
        ({"reward_paths": "hps=tiny/nothing"}, "no folder 'tiny/nothing'"),
        ({"detector": "tiny/nothing"}, "--detector: no folder 'tiny/nothing'"),
        ({"detector": "sampling.py:Eye"}, "sampling.py has no function or class 'Eye'"),
        ({"prompts": "nothing.txt"}, "no prompt file 'nothing.txt'"),
        ({"prompts": "EMPTY"}, "EMPTY is empty"),
        ({"prompts": "OTHERS"}, "not a caption of the tiny world: 'a dog'"),
        ({"prompts": "METADATA.jsonl"}, "cannot judge the prompt 'a dog': it lacks GenEval's tag"),
        ({"prompts": "UNKNOWN.jsonl"}, "cannot judge the prompt 'a dog': the detector does not know dog"),
        ({"height": 63}, "--height must be a multiple of"),
        ({"steps": -1}, "--steps must be 0 or more, got -1"),
        ({"shift": -1.0}, "--shift must be 0 or more"),
        ({"guidance": "nan"}, "--guidance must be 0 or more, got nan"),
        ({"images_per_prompt": 0}, "--images-per-prompt must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"seed": -1}, "--seed must be from 0 to"),
        ({"seed": 10**26}, "--seed must be from 0 to 2"),
        ({"images_per_prompt": 10**10}, "--images-per-prompt must be at most 10"),
        ({"guidance": "inf"}, "--guidance must be 0 or more, got inf"),
        ({"shift": "nan"}, "--shift must be 0 or more, got nan"),
        ({"fps": "inf"}, "--fps must be 0 or more, got inf"),
        ({"max_sequence_length": -1}, "--max-sequence-length must be 0 or more"),
        ({"metrics": ","}, "unknown reward ''"),
        ({"metrics": "hps:nan"}, "unknown reward 'hps:nan'"),
        ({"metrics": "hps:2"}, "--metrics takes names only"),
        ({"checkpoint": "tiny/flux/vae"}, "--checkpoint tiny/flux/vae is a AutoencoderKL"),
        ({"checkpoint": "tiny/sd"}, "--checkpoint tiny/sd is a StableDiffusionPipeline"),
        ({"checkpoint": "README.md"}, "--checkpoint README.md has neither a transformer folder"),
        ({"checkpoint": "nothing", "model": ""}, "--checkpoint: there is no nothing"),
        ({"transformer": "tiny/flux/vae"}, "--transformer tiny/flux/vae is a AutoencoderKL"),
        ({"model": "tiny/flux/transformer"}, "cannot load tiny/flux/transformer"),
        ({"prompts": "prompts"}, "no prompt file 'prompts'"),
        ({"prompts": "MIXED.jsonl", "metrics": "hps"}, "line 2: the style must be a string"),
        ({"output_dir": "tiny/hps"}, "tiny/hps holds HPS_tiny.pt, ViT-tiny-hps.json, not of a run"),
        ({"output_dir": "tiny/flux"}, "tiny/flux holds model_index.json, not of a run"),
        ({"output_dir": "tiny/flux/vae"}, "tiny/flux/vae holds config.json, "),
        ({"output_dir": "RUN/.."}, "is a training run's, not an evaluation's"),
        ({"output_dir": ""}, "--output-dir is empty"),
    ],
)
def test_bad_input_is_one_line_before_any_model_is_loaded(
    options, expected, run, stable_diffusion, tmp_path, monkeypatch
):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "OTHERS").write_text("a dog\n")
    (tmp_path / "METADATA.jsonl").write_text('{"prompt": "a dog", "tag": "colors", "include": []}\n')
    row = {"prompt": "a dog", "tag": "colors", "include": [{"class": "dog", "count": 1}]}
    (tmp_path / "UNKNOWN.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "MIXED.jsonl").write_text('{"prompt": "a", "style": "b"}\n{"prompt": "c", "style": 3}\n')
    (tmp_path / "BROKEN.safetensors").write_text("not a tensor")
    config = json.loads((run / "checkpoint-000002/transformer/config.json").read_text())
    (tmp_path / "OTHER").mkdir()
    (tmp_path / "OTHER/config.json").write_text(json.dumps(config | {"num_layers": 7}))
    places = {"RUN": run / "checkpoint-000002", "LORA": run / "checkpoint-000003", "SD": stable_diffusion}
    places |= {name: tmp_path / name for name in ("EMPTY", "OTHERS", "METADATA", "UNKNOWN", "MIXED", "BROKEN", "OTHER")}

    def filled(text):
        for name, path in places.items():
            text = re.sub(rf"\b{name}\b", str(path), text)
        return text

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded before the options were checked")

    for name in ("load_pipeline", "load_reward"):
        monkeypatch.setattr(evaluation, name, forbidden)
    options = {"model": "tiny/flux"} | SMALL | options
    if "SD" in str(options["model"]):
        options |= {"shift": 1.0}
    options = {
        key: [filled(v) for v in value]
        if isinstance(value, list)
        else filled(value)
        if isinstance(value, str)
        else value
        for key, value in options.items()
    }
    with pytest.raises((RunError, RewardError)) as caught:
        evaluate(**{"output_dir": tmp_path / "out"} | options)
    assert filled(expected) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_other_settings_is_refused(prompts, tmp_path):
    options = dict(model="tiny/flux", prompts=prompts, metrics="hps", images_per_prompt=1, **SMALL)
    evaluate(tmp_path, **options)
    other_hps = shutil.copytree("tiny/hps", tmp_path / "hps")
    config = next(other_hps.glob("*.json"))
    config.write_text(config.read_text() + "\n")
    for other, expected in (
        ({"steps": 3}, "has results of steps = 2, not 3"),
        ({"seed": 1}, "seed = 42"),
        ({"prompts": "prompts/tiny.txt"}, "prompts_sha256"),
        ({"reward_paths": f"hps={other_hps}"}, f"{other_hps} changed after the results"),
    ):
        with pytest.raises(RunError, match=expected):
            evaluate(tmp_path, **options | other)


def test_weights_that_changed_since_are_refused(run, prompts, tmp_path):
    checkpoint = tmp_path / "checkpoint-000002"
    shutil.copytree(run / "checkpoint-000002", checkpoint)
    options = dict(
        model="tiny/flux", checkpoint=checkpoint, prompts=prompts, metrics="hps", images_per_prompt=1, **SMALL
    )
    evaluate(tmp_path / "out", **options)
    weights = checkpoint / "transformer/diffusion_pytorch_model.safetensors"
    os.utime(weights, ns=(1, 1))  # a copy of the same weights is no change
    evaluate(tmp_path / "out", **options)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x42")
    with pytest.raises(RunError, match=r"transformer changed after the results in .*out were made"):
        evaluate(tmp_path / "out", **options)


def test_another_base_on_the_hub_is_refused_as_long_as_the_lora_is_the_same(run, prompts, tmp_path):
    cfg = parse_config(evaluation.Config, evaluation.PRESETS, words({"output_dir": tmp_path / "out", "metrics": "hps"}))
    lora = run / "checkpoint-000003/pytorch_lora_weights.safetensors"
    models, world = [evaluation.Model("lora", "lora", str(lora), cfg.output_dir)], processes.start_world()
    for model in ("owner/one", "owner/one"):
        evaluation.open_output(dataclasses.replace(cfg, model=model), models, [{"prompt": "a"}], world)
    with pytest.raises(RunError, match=r"owner/two changed after the results in .*out were made"):
        evaluation.open_output(dataclasses.replace(cfg, model="owner/two"), models, [{"prompt": "a"}], world)


@pytest.mark.parametrize("name, values", [("model", ("tiny/flux", "COPY")), ("transformer", ("", "COPY/transformer"))])
def test_runs_from_different_bases_are_not_compared(name, values, run, prompts, tmp_path):
    shutil.copytree("tiny/flux", tmp_path / "copy")
    checkpoints = []
    for number, value in enumerate(values):
        folder, value = tmp_path / f"run-{number}", value.replace("COPY", str(tmp_path / "copy"))
        shutil.copytree(run / "checkpoint-000003", folder / "checkpoint-000003")
        stored = json.loads((run / "config.json").read_text()) | {name: value}
        (folder / "config.json").write_text(json.dumps(stored))
        checkpoints.append(folder / "checkpoint-000003")
    with pytest.raises(RunError, match=f"the checkpoints' runs differ in {name}: .*; give --{name}"):
        evaluate(tmp_path / "out", checkpoint=checkpoints, prompts=prompts)


@pytest.mark.parametrize(
    "task, changed, given",
    [("t2v", {"true_guidance": 3.0}, "true_guidance 3.0"), ("i2v", {"guidance": 6.0}, "guidance 6.0")],
)
def test_guidance_that_an_evaluation_cannot_give_is_refused(task, changed, given, tmp_path):
    checkpoint = tmp_path / "checkpoint-000001"
    model = "tiny/skyreels" if task == "i2v" else "tiny/hunyuan/transformer"
    shutil.copytree(model, checkpoint / "transformer")
    config = grpo_video.Config(**grpo_video.PRESETS[f"tiny-{task}"] | changed)
    write_config(tmp_path, "grpo_video.py", config)
    with pytest.raises(RunError, match=f"was trained with {given}, which eval.py cannot give"):
        evaluate(tmp_path / "out", preset="tiny-video", checkpoint=checkpoint)


def test_other_metadata_of_the_same_prompts_are_refused(tmp_path):
    row = {"prompt": "two squares", "tag": "counting", "include": [{"class": "square", "count": 2}]}
    file = tmp_path / "prompts.jsonl"
    options = dict(model="tiny/flux", prompts=file, images_per_prompt=1, **SMALL)
    file.write_text(json.dumps(row) + "\n")
    evaluate(tmp_path / "out", metrics="hps", **options)
    evaluate(tmp_path / "out", metrics="hps,geneval", **options)  # the same file, judged by one more
    row["include"][0]["count"] = 3
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(RunError, match=r"prompts\.jsonl changed after the results"):
        evaluate(tmp_path / "out", metrics="hps,geneval", **options)


def test_a_function_that_changed_since_is_refused(prompts, tmp_path):
    (tmp_path / "own.py").write_text(
        "def size(images, prompts): return images.flatten(1).shape[1] + images[:, 0, 0, 0] * 0"
    )
    options = dict(model="tiny/flux", prompts=prompts, images_per_prompt=1, **SMALL)
    results = evaluate(tmp_path / "out", metrics=f"{tmp_path}/own.py:size", **options)
    assert results["summary"]["size"]["base"]["overall"]["mean"] == 3 * 64 * 64
    (tmp_path / "own.py").write_text((tmp_path / "own.py").read_text() + " + 1")
    with pytest.raises(RunError, match=r"own\.py changed after the results"):
        evaluate(tmp_path / "out", metrics=f"{tmp_path}/own.py:size", **options)
    assert evaluate(tmp_path / "out", metrics="hps", **options)["summary"].keys() == {"hps"}


def test_damaged_pictures_are_drawn_again_and_damaged_scores_computed_again(prompts, tmp_path):
    options = dict(model="tiny/flux", prompts=prompts, metrics="hps", images_per_prompt=1, batch_size=3, **SMALL)
    results = evaluate(tmp_path, **options)
    path = folder_of(tmp_path, results, "base") / "00003-0.png"
    whole, scores = path.read_bytes(), path.with_suffix(".json").read_text()
    rotten = bytearray(whole)
    rotten[len(whole) // 2] ^= 1
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    for broken in (b"", whole[: len(whole) // 2], b"no picture", rotten, (tmp_path / "small.png").read_bytes()):
        path.write_bytes(broken)
        before = {p: p.stat().st_mtime_ns for p in path.parent.glob("*.png") if p != path}
        assert evaluate(tmp_path, **options) == results
        assert path.read_bytes() == whole
        assert all(p.stat().st_mtime_ns == time for p, time in before.items())
    for broken in ("", scores[:-9], "[]", "{}"):
        path.with_suffix(".json").write_text(broken)
        assert evaluate(tmp_path, **options) == results
        assert path.with_suffix(".json").read_text() == scores


def test_a_first_frame_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    options = dict(model="tiny/hunyuan", transformer="tiny/skyreels", prompts=file, metrics="hps", frames=9)
    options |= dict(height=32, width=32)
    for row, expected in (
        ({"prompt": "a"}, 'line 1 has no "image"'),
        ({"prompt": "a", "image": "x.png"}, "cannot read"),
    ):
        (tmp_path / "x.png").write_text("no picture")
        file.write_text(json.dumps(row) + "\n")
        with pytest.raises(RunError, match=expected):
            evaluate(tmp_path / "out", **options)
