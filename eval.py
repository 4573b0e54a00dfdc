"""Compares checkpoints with the base model: same prompts, same noise, also by rewards that were not trained on.

    python eval.py --preset tiny --checkpoint runs/tiny-flux/checkpoint-000035      on a laptop, no model download
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/flux/checkpoint-000300    HPS-v2.1's four-style benchmark
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/flux/checkpoint-000300 --output-dir runs/flux-geneval \\
        --prompts geneval --images-per-prompt 4 --metrics geneval                   GenEval as it is published

1. Every model draws every prompt with its stock diffusers pipeline and a deterministic sampler. The initial noise is a
   function of (seed, prompt, picture), so it is the same for all models, and on any number of processes.
2. Every picture is scored as it was saved, by the code from which the trainers take their rewards, and by GenEval.
3. The report: results.json with every score of every picture, results.md with the table, compare.png, and index.html,
   a page with table and pictures that needs no other file; vote.html, blind pairs of pictures for human votes.

Interrupted evaluations resume. Checkpoints, metrics and pictures per prompt can be added later.

Legend: B pictures in a batch, F frames of a video, P prompts, N pictures of each, H and W their size in pixels.
"""

import gc
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation import geneval, report, vote
from evaluation.models import FAMILIES, Model, agreed, find_settings, find_weights, load_pipeline, run_options
from evaluation.prompts import load_rows
from rewards import RewardError, VideoAlignReward, check_reward, fetch_rewards, load_reward, parse_paths, parse_spec
from runtime import checkpoints, data, loading, options, processes
from runtime.files import fingerprint, lock_folder, read_json, write_atomically, writing
from runtime.options import Count, Natural, NonNegative, Seed, require
from runtime.pictures import is_whole, read_picture, save_frames
from sampling import flow_sigmas

diffusers = options.Lazy("diffusers")


@dataclass(frozen=True)
class Config:
    preset: str = "paper"  # a named set of option values: paper, tiny, tiny-video
    model: str = ""  # the base: hub id or diffusers folder; empty: the --model of the checkpoints' run
    transformer: str = ""  # hub id or folder of the base's transformer, if it is not the one in --model (SkyReels)
    checkpoint: tuple[str, ...] = ()  # RUN/checkpoint-000300, a transformer_ema or LoRA file in it, a diffusers folder
    metrics: str = ""  # names as in --reward; empty: the models in reward_paths of the run, else the usual ones
    reward_paths: str = ""  # NAME=FOLDER, comma separated, of reward weights; empty: as in the checkpoints' run
    detector: str = geneval.MASK2FORMER  # of geneval: hub id or folder of a Mask2Former, or FILE.py:CLASS
    detector_clip: str = geneval.CLIP  # names colours for Mask2Former: hub id or folder of a CLIPModel
    prompts: str = ""  # text or JSONL file, hpsv2 (3,200) or geneval (553); empty: the run's file, else hpsv2
    images_per_prompt: Count = 1  # N (GenEval: 4)
    output_dir: str = "runs/eval"  # pictures, scores and report
    seed: Seed = 42  # of the initial noise
    batch_size: Count = 8  # pictures drawn and scored at a time, by each process
    offload: bool = False  # layers wait in host memory until they are needed: FLUX on a GPU of 24 GB, slowly
    steps: Natural = 0  # sampling steps; 0 here and below: as in the checkpoints' run, else the model's default
    guidance: NonNegative = 0.0  # classifier-free (Stable Diffusion, SkyReels, Wan) or embedded (FLUX, HunyuanVideo)
    shift: NonNegative = 0.0  # of rectified flow's sigmas towards noise
    height: Natural = 0  # pixels
    width: Natural = 0  # pixels
    frames: Natural = 0  # of a video; 1 draws pictures
    fps: NonNegative = 0.0  # frames per second of a video, for vq, mq and ta
    max_sequence_length: Natural = 0  # text tokens


PRESETS = {
    "paper": {},
    "tiny": dict(
        metrics="hps,clip,geneval,tiny/make_judge.py:judged", reward_paths="hps=tiny/hps,clip=tiny/clip",
        detector="tiny/pictures.py:Detector", prompts="prompts/tiny_heldout.txt", images_per_prompt=2, batch_size=51,
        output_dir="runs/tiny-eval",
    ),
    "tiny-video": dict(
        metrics="vq,mq,ta,tiny/clips.py:right,tiny/clips.py:roughness,tiny/clips.py:uncleanness",
        reward_paths="videoalign=tiny/videoalign", prompts="prompts/moving_heldout.jsonl", images_per_prompt=2,
        batch_size=16, output_dir="runs/tiny-video-eval",
    ),
}  # fmt: skip
# Options that may change when an evaluation resumes: existing pictures and scores do not depend on them.
FREE = "preset", "model", "checkpoint", "metrics", "reward_paths", "prompts", "images_per_prompt", "output_dir"
FREE += "batch_size", "offload"


# ---------------------------------------------------------------------------------------------- what is to be compared


def plan(cfg: Config) -> tuple[Config, str, list[Model], list[dict]]:
    """Check all options before any model is loaded.

    Returns the options with every 0 replaced, the pipeline's class, the models, and a row for each prompt.
    """
    options.check_ranges(cfg)
    runs = [run for run in map(run_options, cfg.checkpoint) if run]
    base = cfg.model or agreed("model", [run["model"] for run in runs], "")
    network = cfg.transformer or agreed("transformer", [r.get("transformer", "") for r in runs if not cfg.model], "")
    require(bool(base), "--model is needed: no --checkpoint is in a run's folder, whose config.json would name it")
    index = loading.pipeline_index(base)
    family = index["_class_name"]
    require(family in FAMILIES, f"--model {base} is a {family}; known: {', '.join(FAMILIES)}")
    component = "unet" if "unet" in index else "transformer"
    source = (network, None, "--transformer") if network else (base, component, "--model")
    original = loading.load_config(*source)
    found, expected = original["_class_name"], index[component][1]
    require(found == expected, f"--transformer {network} is a {found}, but {base} has a {expected}")
    if family == "HunyuanVideoPipeline" and original["in_channels"] == 2 * original["out_channels"]:
        family = "HunyuanSkyreelsImageToVideoPipeline"  # its transformer gets the first frame as well
    cfg = find_rewards(find_settings(replace(cfg, model=base, transformer=network), family, runs), runs)
    plain = all(spec.endswith(name) for name, spec in metric_specs(cfg.metrics).items())
    require(plain, f"--metrics takes names only, without threshold or weight: {cfg.metrics}")
    require("geneval" not in parse_paths(cfg.reward_paths), "--reward-paths: geneval has an option here, --detector")
    check_sizes(cfg, component)

    judged = "geneval" in metric_specs(cfg.metrics)
    require(not judged or cfg.frames == 1, "--metrics geneval judges pictures, not video")
    detector = geneval.find_detector(cfg.detector, cfg.detector_clip) if judged else None
    if rewards := reward_spec(cfg, metric_specs(cfg.metrics)):
        check_reward(rewards, cfg.reward_paths, cfg.frames > 1)
    names = ["/".join(Path(checkpoint).parts[-2:]) for checkpoint in cfg.checkpoint]
    models = [Model("base", *(("network", network) if network else ("base", base)), cfg.output_dir)]
    for checkpoint, name in zip(cfg.checkpoint, names, strict=True):
        name = name if names.count(name) == 1 else checkpoint
        models.append(Model(name, *find_weights(checkpoint, family, component, base, original), cfg.output_dir))
    require(len({m.folder for m in models}) == len(models), "--checkpoint names the same weights twice")
    return cfg, family, models, load_rows(cfg.prompts, detector, "ImageToVideo" in family)


def metric_specs(metrics: str) -> dict[str, str]:
    """{name of a metric: how --metrics has it}; they differ for FILE.py:FUNCTION."""
    return dict(zip((term.name for term in parse_spec(metrics)), map(str.strip, metrics.split(",")), strict=True))


def reward_spec(cfg: Config, names: Iterable[str]) -> str:
    """What `load_reward` needs for these metrics: all but geneval."""
    return ",".join(spec for name, spec in metric_specs(cfg.metrics).items() if name in names and name != "geneval")


def find_rewards(cfg: Config, runs: list[dict]) -> Config:
    """Metrics and reward paths: as on the command line, else the reward models, and own rewards, of the runs."""
    paths = {}
    for model, path in [item for run in runs for item in run["reward_paths"].items()]:
        paths[model] = path if cfg.reward_paths else agreed("reward_paths", [path, paths.get(model, path)])
    names = VideoAlignReward.NAMES if cfg.frames > 1 else ()
    metrics = [name for model in paths for name in (names if model == "videoalign" else [model])]
    metrics = metrics or [*names] or ["hps", "clip", "pickscore"]
    metrics += [term.model for run in runs for term in parse_spec(run["reward"]) if ":" in term.model]
    metrics = cfg.metrics or ",".join(dict.fromkeys(metrics))
    return replace(cfg, metrics=metrics, reward_paths=cfg.reward_paths or ",".join(map("=".join, paths.items())))


def check_sizes(cfg: Config, component: str) -> None:
    """Height, width and frames must fit the base's autoencoder and the network that is called `component`."""
    vae = loading.load_config(cfg.model, "vae")
    side, stride = (vae.get(f"{x}_compression_ratio", vae.get(f"scale_factor_{x}")) for x in ("spatial", "temporal"))
    scale = side or 2 ** (len(vae["block_out_channels"]) - 1)  # a VAE for pictures has neither; Wan's has other names
    scale *= 1 if component == "unet" else 2  # a token of a transformer is a patch of 2 x 2 latents
    options.check_size(cfg, math.lcm(16, scale) if stride else scale)  # 16: the video pipelines' own rule
    require(bool(stride) or cfg.frames == 1, f"--frames {cfg.frames}: {cfg.model} draws pictures, leave it out")
    require(cfg.frames == 1 or (cfg.frames - 1) % stride == 0, f"--frames must be 1 more than a multiple of {stride}")
    require(cfg.shift in (0, 1) or component != "unet", "--shift is for rectified flow, and this is a diffusion model")


def open_output(cfg: Config, models: list[Model], rows: list[dict], world: processes.World) -> None:
    """Lock the folder and write config.json; refuse one with pictures or scores of other settings, prompts, weights or
    functions, and one that is no evaluation's. Refuse weights that are not as a training run saved them.
    """
    folder, advice = Path(cfg.output_dir), "take another --output-dir"
    for model in models:
        checkpoints.require_whole(Path(model.weights), "--checkpoint", world)
    if world.is_main:
        asked = json.dumps([[row["prompt"], row.get("image")] for row in rows])
        new = {"script": "eval.py"} | asdict(cfg) | {"prompts_sha256": hashlib.sha256(asked.encode()).hexdigest()}
        stored = checkpoints.refuse_foreign(folder) or new
        is_run = stored["script"] != "eval.py" or (folder / "metrics.jsonl").exists()
        require(not is_run, f"{folder} is a training run's, not an evaluation's; {advice}")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock_folder(folder)
        for name in new.keys() - FREE:
            different = f"{folder} has results of {name} = {stored.get(name)!r}, not {new[name]!r}; {advice}"
            require(stored.get(name) == new[name], different)
        sources = {m.folder.name: m.weights for m in models} | {"model": cfg.model, "prompts": cfg.prompts}
        sources |= {t.model: t.model.rpartition(":")[0] or "its default" for t in parse_spec(cfg.metrics)}
        sources |= parse_paths(cfg.reward_paths) | {row["image"]: row["image"] for row in rows if "image" in row}
        known, weights = stored.get("weights", {}), {name: fingerprint(of) or of for name, of in sources.items()}
        changed = [sources[name] for name in weights if (known.get(name) or weights[name]) != weights[name]]
        require(not changed, f"{', '.join(changed)} changed after the results in {folder} were made; {advice}")
        new["weights"] = known | weights
        new["versions"] = {name: importlib.metadata.version(name) for name in checkpoints.PACKAGES}
        write_atomically(folder / "config.json", json.dumps(new, indent=2) + "\n")
    world.require_shared(folder)


# --------------------------------------------------------------------------------------------------- drawing pictures


def generate(cfg: Config, family: str, models: list[Model], rows: list[dict], world: processes.World) -> None:
    """Draw the pictures that are missing or damaged. A batch is drawn as a whole, so that it comes out the same."""
    size = cfg.width, cfg.frames * cfg.height  # of a file
    for model in models:
        todo = [b for b in batches(cfg, rows, world) if not all(is_whole(p, size) for p in pictures_of(model, b))]
        with world.in_turn():  # all processes come here, also those that have nothing to draw
            pipe = set_sampler(load_pipeline(model, family, cfg.model, cfg.transformer, world), cfg) if todo else None
        model.folder.mkdir(parents=True, exist_ok=True)
        for batch in world.progress(todo, desc=f"drawing, {model.name}") if todo else ():
            pictures = draw(pipe, cfg, [rows[p] for p, _ in batch], [(cfg.seed, p, n) for p, n in batch], world.device)
            for path, picture in zip(pictures_of(model, batch), pictures, strict=True):
                if not is_whole(path, size):
                    path.with_suffix(".json").unlink(missing_ok=True)  # scores of another picture
                    save_frames(path, picture)
        del pipe
        gc.collect()  # its parts refer to each other, and the next one needs the room


def batches(cfg: Config, rows: list[dict], world: processes.World) -> list[list[tuple[int, int]]]:
    """This process's batches of (prompt, number of its picture). They are the same on any number of processes."""
    items = [(prompt, number) for prompt in range(len(rows)) for number in range(cfg.images_per_prompt)]
    return [items[i : i + cfg.batch_size] for i in range(0, len(items), cfg.batch_size)][world.rank :: world.size]


def pictures_of(model: Model, batch: list[tuple[int, int]]) -> list[Path]:
    return [model.folder / f"{prompt:05d}-{number}.png" for prompt, number in batch]


def set_sampler(pipe, cfg: Config):
    """Give the pipeline a sampler that adds no noise."""
    if hasattr(pipe, "unet"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    elif cfg.shift:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # takes the sigmas as they are
        if isinstance(pipe, diffusers.WanPipeline):  # has no argument for them
            sigmas = flow_sigmas(cfg.steps, cfg.shift)[:-1].tolist()
            pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
    if cfg.frames > 1:  # clip by clip, as in training; in tiles, which leave a grid, only where it would not fit
        (pipe.vae.enable_slicing if cfg.height * cfg.width < 490_000 else pipe.vae.enable_tiling)()
    return pipe


def draw(pipe, cfg: Config, rows: list[dict], keys: list[tuple], device) -> Tensor:
    """A picture (B, 3, H, W), or a video (B, F, 3, H, W), in [0, 1], for each row and key of its noise."""
    arguments = {"num_inference_steps": cfg.steps, "guidance_scale": cfg.guidance, "output_type": "pt"}
    arguments |= {"prompt": [row["prompt"] for row in rows], "height": cfg.height, "width": cfg.width}
    is_diffusion, is_flux = hasattr(pipe, "unet"), isinstance(pipe, diffusers.FluxPipeline)
    scale = pipe.vae_scale_factor if is_diffusion or is_flux else pipe.vae_scale_factor_spatial
    h, w = cfg.height // scale, cfg.width // scale
    if is_diffusion:
        shape = pipe.unet.config.in_channels, h, w
    elif is_flux:
        shape = h // 2 * (w // 2), pipe.transformer.config.in_channels  # tokens
    else:
        shape = pipe.transformer.config.out_channels, (cfg.frames - 1) // pipe.vae_scale_factor_temporal + 1, h, w
        arguments["num_frames"] = cfg.frames
    z = data.keyed_noise(shape, keys, "evaluation", device)
    arguments["latents"] = z.to(pipe.unet.dtype) if is_diffusion else z
    if cfg.shift and not is_diffusion and not isinstance(pipe, diffusers.WanPipeline):
        arguments["sigmas"] = flow_sigmas(cfg.steps, cfg.shift)[:-1].tolist()
    if cfg.max_sequence_length and not is_diffusion:
        arguments["max_sequence_length"] = cfg.max_sequence_length
    if isinstance(pipe, diffusers.HunyuanSkyreelsImageToVideoPipeline):
        arguments |= {"guidance_scale": 1.0, "true_cfg_scale": cfg.guidance, "negative_prompt": [""] * len(rows)}
        arguments["image"] = [read_picture(row["image"]) for row in rows]
        seeds = [int(data.keyed_rng("first frame", *key).integers(2**31)) for key in keys]  # its VAE draws a sample
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    pictures = pipe(**arguments, return_dict=False)[0].float().clamp(0, 1)
    return pictures[:, 0] if pictures.dim() == 5 and cfg.frames == 1 else pictures


# -------------------------------------------------------------------------------------------------- scores and results


def score(cfg: Config, models: list[Model], rows: list[dict], world: processes.World) -> None:
    """Compute the missing scores. Those of 00012-0.png are stored in 00012-0.json."""
    work, metrics = [], metric_specs(cfg.metrics).keys()
    for batch, model in [(b, m) for m in models for b in batches(cfg, rows, world)]:
        paths = pictures_of(model, batch)
        stored = [read_json(path.with_suffix(".json")) for path in paths]
        if lacking := {metric for metric in metrics if not all(metric in scores for scores in stored)}:
            work.append((batch, paths, stored, lacking))
    needed = set().union(*(lacking for *_, lacking in work))
    spec, folders = reward_spec(cfg, needed), parse_paths(cfg.reward_paths)
    with world.in_turn():
        reward = load_reward(spec, folders, str(world.device), None, cfg.batch_size) if spec else None
        detector = geneval.find_detector(cfg.detector, cfg.detector_clip, world.device) if "geneval" in needed else None
    for batch, paths, stored, lacking in world.progress(work, desc="scoring"):
        pixels = np.stack([np.asarray(read_picture(path)) for path in paths])  # (B, F · H, W, 3)
        pictures = torch.from_numpy(pixels).unflatten(1, (cfg.frames, cfg.height)).movedim(-1, -3).squeeze(1) / 255
        new = [{} for _ in batch]
        if lacking - {"geneval"}:
            for name, values in reward(pictures, [rows[p]["prompt"] for p, _ in batch], cfg.fps).items():
                for own, value in zip(new, values.tolist(), strict=True):
                    own[name] = value
                    if name in VideoAlignReward.NAMES:  # normalised, as in training; and as the model gives it
                        k = VideoAlignReward.NAMES.index(name)
                        own[f"{name}_raw"] = value * VideoAlignReward.STD[k] + VideoAlignReward.MEAN[k]
        if "geneval" in lacking:
            for own, picture, (p, _) in zip(new, pictures, batch, strict=True):
                correct, own["wrong"] = geneval.judge(detector(picture), rows[p], partial(detector.colors, picture))
                own["geneval"] = float(correct)
        for path, old, own in zip(paths, stored, new, strict=True):
            write_atomically(path.with_suffix(".json"), json.dumps(old | own) + "\n")


def collect(cfg: Config, models: list[Model], rows: list[dict]) -> report.Results:
    """All pictures and scores in --output-dir that this evaluation is about, and the comparison with the base."""
    numbers = range(cfg.images_per_prompt)
    pictures = {m.name: [pictures_of(m, [(p, n) for n in numbers]) for p in range(len(rows))] for m in models}
    scores = {
        m: [[read_json(path.with_suffix(".json")) for path in paths] for paths in own] for m, own in pictures.items()
    }
    summary = {}
    for metric in metric_specs(cfg.metrics):
        groups = [row["tag"] if metric == "geneval" else row.get("style", "overall") for row in rows]
        for name in (metric, f"{metric}_raw") if metric in VideoAlignReward.NAMES else (metric,):
            values = {m: np.array([[s[name] for s in drawn] for drawn in own]) for m, own in scores.items()}
            summary[name] = {model: compare(values["base"], own, groups) for model, own in values.items()}
    stored = read_json(Path(cfg.output_dir, "config.json"))
    settings = {k: v for k, v in stored.items() if k not in ("output_dir", "batch_size", "weights", "versions")}
    entries = {m.name: {"weights": m.weights, "pictures": m.folder.name} for m in models}
    return report.Results(
        rows, entries, pictures, scores, summary, remarks(cfg, rows), settings, stored["versions"], cfg.frames, cfg.fps
    )


def compare(base: np.ndarray, own: np.ndarray, groups: Sequence[str]) -> dict[str, dict]:
    """One metric of one model against the base: by group of prompts, and "overall", which is the mean of the groups.

    base, own (P, N), on the same prompts and noise; groups: the style or tag of each prompt. The standard error is that
    of the mean of the prompts' differences, each over its N pictures; None if a group has a single prompt.
    """
    gain, result = (own - base).mean(1), {}
    for group in sorted(set(groups)):
        here = np.array([g == group for g in groups])
        error = float(gain[here].std(ddof=1) / here.sum() ** 0.5) if here.sum() > 1 else None
        result[group] = {"mean": float(own[here].mean()), "difference": float(gain[here].mean()), "error": error}
    errors = [row["error"] for row in result.values()]
    overall: dict = {key: float(np.mean([row[key] for row in result.values()])) for key in ("mean", "difference")}
    overall["error"] = None if None in errors else float(np.linalg.norm(errors) / len(errors))
    return (result if len(result) > 1 else {}) | {"overall": overall}


def remarks(cfg: Config, rows: list[dict]) -> list[str]:
    """What a reader of the table must know."""
    kind = f"videos of {cfg.frames} frames" if cfg.frames > 1 else "pictures"
    lines = [
        f"{len(rows)} prompts ({cfg.prompts}), {kind} per prompt: {cfg.images_per_prompt}, {cfg.width} x {cfg.height} "
        f"pixels, {cfg.steps} steps, guidance {cfg.guidance:g}, seed {cfg.seed}; the same noise for every model.",
        "Difference: from the base, ± standard error, paired by prompt; in colour if more than two standard errors.",
    ]
    if "geneval" in metric_specs(cfg.metrics):
        lines.append(geneval.find_detector(cfg.detector, cfg.detector_clip).NOTE)
    if any(name in metric_specs(cfg.metrics) for name in VideoAlignReward.NAMES):
        lines.append("vq, mq, ta: normalised, as in training; raw: as VideoAlign's model gives them.")
    return lines


def main(cfg: Config) -> None:
    cfg, family, models, rows = plan(cfg)
    loading.fetch_model(cfg.model, cfg.transformer)  # before the process group exists, which has a limit of time
    if rewards := reward_spec(cfg, metric_specs(cfg.metrics)):
        fetch_rewards(rewards, parse_paths(cfg.reward_paths))
    if "geneval" in metric_specs(cfg.metrics):
        geneval.GenEvalReward.fetch(cfg.detector, cfg.detector_clip)
    world = processes.start_world(offload=cfg.offload)
    open_output(cfg, models, rows, world)
    generate(cfg, family, models, rows, world)
    score(cfg, models, rows, world)
    world.barrier()
    if world.is_main:
        results = collect(cfg, models, rows)
        report.write_report(results, Path(cfg.output_dir))
        vote.write_page(results, Path(cfg.output_dir))
        print(Path(cfg.output_dir, "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with options.one_line_errors(RewardError):
        main(options.parse_config(Config, PRESETS))
