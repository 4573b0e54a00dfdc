"""Base model beside trained checkpoints: same prompts, same noise, judged also by rewards that were not trained on.

    python eval.py --preset tiny --checkpoint runs/tiny-flux/checkpoint-000050      on a laptop, no download
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/flux/checkpoint-000300    HPS-v2.1's four-style benchmark
    torchrun --nproc_per_node=8 eval.py --checkpoint runs/flux/checkpoint-000300 --output-dir runs/flux-geneval \\
        --prompts geneval --images-per-prompt 4 --metrics geneval                   GenEval as it is published

1. Every model draws every prompt with its stock diffusers pipeline and a deterministic sampler. The initial noise is a
   function of (seed, prompt, picture), so it is the same for all models, and on any number of processes.
2. Every picture is scored as it was saved, by the very code from which the trainers take their rewards, and by GenEval.
3. What is left: results.json with every score of every picture, results.md with the table, compare.png, and index.html,
   one page with table and pictures that needs no other file.

What lies in --output-dir already is not done again, so a stopped evaluation goes on where it was, and a checkpoint or a
metric can be added later.

Legend: B pictures in a batch, F frames of a video, P prompts, N pictures of each, H and W their size in pixels.
"""

import base64
import hashlib
import html
import importlib.metadata
import io
import json
import math
import re
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import geneval
from rewards import RewardError, VideoAlignReward, check_reward, first_line, load_reward, parse_paths
from runtime import cli, data, distributed, output
from sampling import flow_sigmas

# Class in model_index.json → the network that training changes, and the model's usual settings. Shift 0 leaves the
# noise levels to the model's own scheduler, max_sequence_length 0 the length of the text to the pipeline.
USUAL = {"shift": 0.0, "max_sequence_length": 0, "frames": 1, "fps": 24.0}
FAMILIES = {
    "StableDiffusionPipeline": ("unet", USUAL | dict(steps=50, guidance=7.5, height=512, width=512)),
    "FluxPipeline": ("transformer", USUAL | dict(steps=28, guidance=3.5, height=1024, width=1024)),
    "HunyuanVideoPipeline": ("transformer", USUAL | dict(steps=50, guidance=6.0, height=720, width=1280, frames=129)),
    "HunyuanSkyreelsImageToVideoPipeline": (
        "transformer",
        USUAL | dict(steps=50, guidance=6.0, height=544, width=960, frames=97),
    ),
}
HPS_REPO, HPS_STYLES = "zhwang/HPDv2", ("anime", "concept-art", "paintings", "photo")
PAGE_PROMPTS, SHEET_PROMPTS = 24, 8  # shown in index.html and in compare.png


@dataclass(frozen=True)
class Config:
    preset: str = "paper"  # a named set of option values: paper, tiny, tiny-video
    model: str = ""  # the base: hub id or diffusers folder; empty: the one that the checkpoints' run started from
    transformer: str = ""  # hub id or folder of the base's transformer, if it is not the one in --model: SkyReels'
    checkpoint: tuple[str, ...] = ()  # RUN/checkpoint-000300, a transformer_ema or LoRA file in it, a diffusers folder
    metrics: str = "hps,clip,pickscore"  # of hps, clip, pickscore, geneval, and for video vq, mq, ta; comma separated
    reward_paths: str = ""  # NAME=FOLDER, comma separated, for reward weights that are not on the hub
    detector: str = "facebook/mask2former-swin-small-coco-instance"  # GenEval's eyes: hub id, folder, or tiny
    detector_clip: str = "openai/clip-vit-large-patch14"  # GenEval's colours: hub id or folder of a CLIPModel
    prompts: str = "hpsv2"  # text or JSONL file, hpsv2 (four styles of 800) or geneval (553 with metadata)
    images_per_prompt: int = 1  # N (GenEval: 4)
    output_dir: str = "runs/eval"  # pictures, scores and report
    seed: int = 42  # of the initial noise
    batch_size: int = 8  # pictures drawn and scored at a time, by each process
    steps: int = 0  # sampling steps; this and what follows, if 0: as in the checkpoints' run, or usual for the model
    guidance: float = 0.0  # classifier-free (Stable Diffusion, SkyReels) or embedded (FLUX, HunyuanVideo)
    shift: float = 0.0  # of rectified flow's sigmas towards noise
    height: int = 0  # pixels
    width: int = 0  # pixels
    frames: int = 0  # of a video; 1 draws pictures
    fps: float = 0.0  # frames per second of a video, for vq, mq and ta
    max_sequence_length: int = 0  # text tokens


PRESETS = {
    "paper": {},
    "tiny": {
        "metrics": "hps,clip,geneval",
        "reward_paths": "hps=tiny/hps,clip=tiny/clip",
        "detector": "tiny",
        "prompts": "prompts/tiny_heldout.txt",
        "images_per_prompt": 2,
        "output_dir": "runs/tiny-eval",
        "batch_size": 51,
    },
    "tiny-video": {
        "metrics": "vq,mq,ta",
        "reward_paths": "videoalign=tiny/videoalign",
        "prompts": "prompts/moving_heldout.jsonl",
        "images_per_prompt": 2,
        "output_dir": "runs/tiny-video-eval",
        "batch_size": 16,
    },
}
# What may change when an evaluation goes on: the pictures and scores that are there do not depend on it.
FREE = {"preset", "model", "checkpoint", "metrics", "prompts", "images_per_prompt", "output_dir", "batch_size"}


# --------------------------------------------------------------------------------------------- what is to be compared


@dataclass(frozen=True)
class Contestant:
    """One column of the report: the base model, or the base model with other weights."""

    name: str
    kind: str  # base, pipeline, network or lora
    weights: str  # path or hub id
    folder: Path  # its pictures and their scores


def plan(cfg: Config) -> tuple[Config, str, list[Contestant], list[dict]]:
    """Everything that can be wrong is found here, before any model is loaded.

    Returns the options with every 0 replaced, the pipeline's class, the contestants, and a row for each prompt.
    """
    metrics = cfg.metrics.split(",")
    for ok, message in (
        (cfg.images_per_prompt >= 1, f"--images-per-prompt must be at least 1, got {cfg.images_per_prompt}"),
        (cfg.batch_size >= 1, f"--batch-size must be at least 1, got {cfg.batch_size}"),
        (cfg.seed >= 0, f"--seed must not be negative, got {cfg.seed}"),
        (all(getattr(cfg, name) >= 0 for name in USUAL), f"--{', --'.join(USUAL)} must not be negative"),
        (cfg.steps >= 0 and cfg.guidance >= 0, "--steps and --guidance must not be negative"),
        (len(set(metrics)) == len(metrics), f"--metrics names one twice: {cfg.metrics}"),
        (not re.search("[@:]", cfg.metrics), f"--metrics takes names only, without threshold or weight: {cfg.metrics}"),
    ):
        cli.require(ok, message)
    runs = [run_options(checkpoint) for checkpoint in cfg.checkpoint]
    base = cfg.model or next((run["model"] for run in runs if run), "")
    network = cfg.transformer or next((run.get("transformer", "") for run in runs if run and not cfg.model), "")
    cli.require(
        bool(base), "--model is needed: no --checkpoint lies in the folder of a run, from which it would be known"
    )
    index = distributed.load_pretrained(diffusers.DiffusionPipeline.load_config, base)
    family = index["_class_name"]
    cli.require(family in FAMILIES, f"--model {base} is a {family}; known: {', '.join(FAMILIES)}")
    component, usual = FAMILIES[family]
    original = component_config(network, None, "--transformer") if network else component_config(base, component)
    found, expected = original["_class_name"], index[component][1]
    cli.require(found == expected, f"--transformer {network} is a {found}, but {base} has a {expected}")
    if family == "HunyuanVideoPipeline" and original["in_channels"] == 2 * original["out_channels"]:
        family = "HunyuanSkyreelsImageToVideoPipeline"  # its transformer is told the first frame too
        usual = FAMILIES[family][1]
    animates, settings = "ImageToVideo" in family, {}
    for name, value in usual.items():
        key = "true_guidance" if name == "guidance" and animates else name
        given = {run[key] for run in runs if key in run}
        cli.require(
            bool(getattr(cfg, name)) or len(given) <= 1,
            f"the checkpoints' runs differ in {name}: {', '.join(map(str, sorted(given)))}; "
            f"say with --{name.replace('_', '-')} what all are to be drawn with",
        )
        settings[name] = getattr(cfg, name) or (given.pop() if given else value)
    cfg = replace(cfg, model=base, transformer=network, **settings)

    vae = component_config(base, "vae")
    scale = vae.get("spatial_compression_ratio", 2 ** (len(vae["block_out_channels"]) - 1))
    scale *= 1 if component == "unet" else 2  # a token of a transformer is a patch of 2 x 2 latents
    makes_video = "temporal_compression_ratio" in vae
    cli.check_size(cfg, math.lcm(16, scale) if makes_video else scale)  # 16: those pipelines' own rule
    between = vae.get("temporal_compression_ratio", 1)
    cli.require(makes_video or cfg.frames == 1, f"--frames {cfg.frames}: {base} draws pictures, leave it out")
    cli.require(
        (cfg.frames - 1) % between == 0, f"--frames must be 1 more than a multiple of {between}, got {cfg.frames}"
    )
    cli.require(
        cfg.shift in (0, 1) or component != "unet", "--shift is for rectified flow, and this is a diffusion model"
    )
    if rewards := [name for name in metrics if name != "geneval"]:
        check_reward(",".join(rewards), cfg.reward_paths, cfg.frames > 1)
    if "geneval" in metrics:
        cli.require(cfg.frames == 1, "--metrics geneval judges pictures, not video")
        if cfg.detector != "tiny":
            distributed.check_local_or_hub("--detector", cfg.detector)
            distributed.check_local_or_hub("--detector-clip", cfg.detector_clip)

    names = ["/".join(Path(checkpoint).parts[-2:]) for checkpoint in cfg.checkpoint]
    kind, weights = ("network", network) if network else ("base", base)
    contestants = [Contestant("base", kind, weights, picture_folder(cfg, "base", weights))]
    for checkpoint, name in zip(cfg.checkpoint, names, strict=True):
        kind, weights = find_weights(checkpoint, family, component, base, original)
        name = name if names.count(name) == 1 else checkpoint
        contestants.append(Contestant(name, kind, weights, picture_folder(cfg, name, weights)))
    cli.require(len({c.folder for c in contestants}) == len(contestants), "--checkpoint names the same weights twice")
    return cfg, family, contestants, load_rows(cfg, "geneval" in metrics, animates)


def run_options(checkpoint: str) -> dict:
    """config.json of the training run in whose folder a checkpoint lies, or {}."""
    for folder in list(Path(checkpoint).parents)[:3]:
        if (folder / "config.json").is_file():
            stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if "script" in stored:
                return stored
    return {}


def component_config(model: str, component: str | None, option: str = "--model") -> dict:
    loader = diffusers.AutoencoderKL.load_config  # any class's
    return distributed.load_pretrained(loader, model, option, subfolder=component)


def find_weights(checkpoint: str, family: str, component: str, base: str, original: dict) -> tuple[str, str]:
    """What lies at a --checkpoint: "pipeline", "network" or "lora", and the path of its weights.

    family: the base's pipeline class; component: the network in it that is trained; original: that one's config.
    Raises cli.RunError if there is nothing, or what is there does not fit the base.
    """
    path, network_class = Path(checkpoint), original["_class_name"]
    cli.require(
        path.exists(), f"--checkpoint: there is no {checkpoint}; give RUN/checkpoint-NNNNNN or a diffusers folder"
    )
    if (path / "model_index.json").is_file():
        found = json.loads((path / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        cli.require(found == family, f"--checkpoint {checkpoint} is a {found}, but the base {base} is a {family}")
        return "pipeline", checkpoint
    for folder in (path / component, path):
        own = json.loads((folder / "config.json").read_text("utf-8")) if (folder / "config.json").is_file() else {}
        if found := own.get("_class_name"):
            cli.require(found == network_class, f"--checkpoint {folder} is a {found}, but {base} has a {network_class}")
            for key in [key for key in original if key[0] != "_" and own.get(key, original[key]) != original[key]]:
                raise cli.RunError(
                    f"--checkpoint {folder} was not trained from {base}: its {key} is {own[key]}, the base's is "
                    f"{original[key]}; name the right --model"
                )
            return "network", str(folder)
    lora = path if path.suffix == ".safetensors" else path / "pytorch_lora_weights.safetensors"
    if lora.is_file():
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(lora, "pt") as file:
                keys = list(file.keys())
        except (OSError, SafetensorError) as e:
            raise cli.RunError(f"--checkpoint: cannot read {lora}: {e}") from e
        fits = all(key.startswith(f"{component}.") for key in keys)
        cli.require(fits, f"--checkpoint {lora} is no LoRA of {base}'s {component}: it has {keys[0]}")
        return "lora", str(lora)
    raise cli.RunError(
        f"--checkpoint {checkpoint} has neither a {component} folder, nor pytorch_lora_weights.safetensors, nor "
        f"model_index.json; {base}, a {family}, needs one of these"
    )


def picture_folder(cfg: Config, name: str, weights: str) -> Path:
    """A folder of its own for each weights, whatever else is compared."""
    where = str(Path(weights).resolve()) if Path(weights).exists() else weights
    return Path(cfg.output_dir, f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}-{zlib.crc32(where.encode()):08x}")


def load_rows(cfg: Config, needs_metadata: bool, needs_image: bool) -> list[dict]:
    """A row for each prompt: {"prompt"}, and where there is one its "style", its "image", GenEval's metadata."""
    file = geneval.fetch_prompts() if cfg.prompts == "geneval" else Path(cfg.prompts)
    if cfg.prompts == "hpsv2":
        rows = [{"prompt": prompt, "style": style} for style in HPS_STYLES for prompt in fetch_hps_prompts(style)]
    else:
        cli.require(
            file.is_file(), f"no prompt file {cfg.prompts!r}; give a text or JSONL file, or one of: hpsv2, geneval"
        )
        rows = [{"prompt": prompt} for prompt in data.load_prompts(str(file))]
    if file.suffix == ".jsonl":
        lines = file.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) | row for line, row in zip(lines, rows, strict=True)]
    if needs_metadata:
        classes = geneval.detector_classes(cfg.detector)
        for number, row in enumerate(rows, 1):
            if cfg.detector == "tiny" and "include" not in row:
                row |= geneval.TinyDetector().metadata(row["prompt"])
            geneval.check_metadata(row, classes, f"{cfg.prompts} line {number}")
    if needs_image:
        for number, row in enumerate(rows, 1):
            cli.require("image" in row, f'{cfg.prompts} line {number} has no "image", which the video is to start from')
            row["image"] = str(file.parent / str(row["image"]))
            output.read_picture(row["image"])
    return rows


def fetch_hps_prompts(style: str) -> list[str]:
    """The 800 prompts of one style of HPS-v2's benchmark, from the hub, cached there."""
    from huggingface_hub import hf_hub_download

    file = f"benchmark/{style}.json"
    try:
        return json.loads(Path(hf_hub_download(HPS_REPO, file, repo_type="dataset")).read_text(encoding="utf-8"))
    except OSError as e:  # every error of the hub's own is one
        raise cli.RunError(f"cannot fetch {file} of {HPS_REPO} from the hub; give --prompts a file of your own") from e


def open_output(cfg: Config, contestants: list[Contestant], rows: list[dict], world: distributed.World) -> None:
    """Write config.json; refuse a folder whose pictures and scores come from other settings, prompts or weights."""
    path = Path(cfg.output_dir, "config.json")
    if world.is_main:
        asked = json.dumps([[row["prompt"], row.get("image")] for row in rows])
        new = {"script": "eval.py"} | asdict(cfg) | {"prompts_sha256": hashlib.sha256(asked.encode()).hexdigest()}
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else new
        for name in new.keys() - FREE:
            cli.require(
                stored.get(name) == new[name],
                f"{cfg.output_dir} holds something with {name} = {stored.get(name)!r}, this evaluation has "
                f"{new[name]!r}; take another --output-dir",
            )
        weights = dict(stored.get("weights", {}))
        for c in contestants:
            found = fingerprint(c.weights)
            cli.require(
                weights.setdefault(c.folder.name, found) == found,
                f"{c.weights} has changed since its pictures in {c.folder} were drawn; take another --output-dir",
            )
        packages = ("torch", "diffusers", "transformers", "open_clip_torch", "peft", "numpy")
        new |= {"versions": {name: importlib.metadata.version(name) for name in packages}, "weights": weights}
        with output.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        output.write_atomically(path, json.dumps(new, indent=2) + "\n")
    world.barrier()


def fingerprint(weights: str) -> list:
    """Of files here: name, size and time of each, so that a change is noticed. Of a hub id: nothing."""
    files = sorted(Path(weights).rglob("*.safetensors")) if Path(weights).is_dir() else [Path(weights)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


# --------------------------------------------------------------------------------------------------- drawing pictures


def generate(
    cfg: Config, family: str, contestants: list[Contestant], rows: list[dict], world: distributed.World
) -> None:
    """Draw what is not there yet. A batch of which a part is missing is drawn as a whole, so it comes out the same."""
    for contestant in contestants:
        todo = [b for b in batches(cfg, rows, world) if not all(p.is_file() for p in pictures_of(contestant, b))]
        if not todo:
            continue
        contestant.folder.mkdir(parents=True, exist_ok=True)
        pipe = load_pipeline(cfg, family, contestant, world)
        for batch in world.progress(todo, desc=f"drawing, {contestant.name}"):
            pictures = draw(pipe, cfg, [rows[p] for p, _ in batch], [(cfg.seed, p, n) for p, n in batch], world.device)
            for path, picture in zip(pictures_of(contestant, batch), pictures, strict=True):
                save_picture(path, picture)


def batches(cfg: Config, rows: list[dict], world: distributed.World) -> list[list[tuple[int, int]]]:
    """This process's share of all (prompt, number of its picture). A batch is the same on any number of processes."""
    items = [(prompt, number) for prompt in range(len(rows)) for number in range(cfg.images_per_prompt)]
    return [items[i : i + cfg.batch_size] for i in range(0, len(items), cfg.batch_size)][world.rank :: world.size]


def pictures_of(contestant: Contestant, batch: list[tuple[int, int]]) -> list[Path]:
    return [contestant.folder / f"{prompt:05d}-{number}.png" for prompt, number in batch]


def load_pipeline(cfg: Config, family: str, contestant: Contestant, world: distributed.World):
    """The stock pipeline with the contestant's weights, and a sampler that adds no noise."""
    component, source, options = FAMILIES[family][0], cfg.model, {"dtype": world.dtype}
    if component == "unet":
        options |= {"safety_checker": None, "requires_safety_checker": False}  # it blackens pictures
    if contestant.kind == "pipeline":
        source = contestant.weights
    elif network := contestant.weights if contestant.kind == "network" else cfg.transformer:  # what a LoRA is for
        loader = getattr(diffusers, component_config(network, None)["_class_name"]).from_pretrained
        options[component] = distributed.load_pretrained(loader, network, dtype=world.dtype)
    pipe = distributed.load_pretrained(getattr(diffusers, family).from_pretrained, source, **options)
    if contestant.kind == "lora":
        file = Path(contestant.weights)
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name)
        except (OSError, RuntimeError, ValueError) as e:  # sizes or names that the network does not have
            raise cli.RunError(f"the LoRA {file} does not fit {cfg.model}: {first_line(e)}") from e
    if component == "unet":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    elif cfg.shift:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)  # takes the sigmas as they are
    if cfg.frames > 1:
        pipe.vae.enable_tiling()  # a whole clip at full size does not fit
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(world.device)


def draw(pipe, cfg: Config, rows: list[dict], keys: list[tuple], device) -> Tensor:
    """A picture (B, 3, H, W), or a video (B, F, 3, H, W), in [0, 1], for each row and key of its noise."""
    options = {"num_inference_steps": cfg.steps, "guidance_scale": cfg.guidance, "output_type": "pt"}
    options |= {"prompt": [row["prompt"] for row in rows], "height": cfg.height, "width": cfg.width}
    is_diffusion, is_flux = hasattr(pipe, "unet"), isinstance(pipe, diffusers.FluxPipeline)
    scale = pipe.vae_scale_factor if is_diffusion or is_flux else pipe.vae_scale_factor_spatial
    h, w = cfg.height // scale, cfg.width // scale
    if is_diffusion:
        shape = pipe.unet.config.in_channels, h, w
    elif is_flux:
        shape = h // 2 * (w // 2), pipe.transformer.config.in_channels  # tokens
    else:
        shape = pipe.vae.config.latent_channels, (cfg.frames - 1) // pipe.vae_scale_factor_temporal + 1, h, w
        options["num_frames"] = cfg.frames
    z = data.keyed_noise(shape, keys, "evaluation", device)
    options["latents"] = z.to(pipe.unet.dtype) if is_diffusion else z
    if cfg.shift and not is_diffusion:
        options["sigmas"] = flow_sigmas(cfg.steps, cfg.shift)[:-1].tolist()
    if cfg.max_sequence_length and not is_diffusion:
        options["max_sequence_length"] = cfg.max_sequence_length
    if isinstance(pipe, diffusers.HunyuanSkyreelsImageToVideoPipeline):
        options |= {"guidance_scale": 1.0, "true_cfg_scale": cfg.guidance, "negative_prompt": [""] * len(rows)}
        options["image"] = [output.read_picture(row["image"]) for row in rows]
        seeds = [int(data.keyed_rng("first frame", *key).integers(2**31)) for key in keys]  # its VAE draws a sample
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    out = pipe(**options)
    pictures = (out.images if is_diffusion or is_flux else out.frames).float().clamp(0, 1)
    return pictures[:, 0] if pictures.dim() == 5 and cfg.frames == 1 else pictures


def save_picture(path: Path, picture: Tensor) -> None:
    """(3, H, W), or (F, 3, H, W) with the frames one below the other, as a PNG: 8 bits, and nothing else is lost."""
    pixels = (picture.movedim(-3, -1) * 255).round().byte().cpu().numpy()
    output.save_image(path, Image.fromarray(pixels.reshape(-1, *pixels.shape[-2:])))


def read_frames(path: Path, cfg: Config) -> np.ndarray:
    """What `save_picture` wrote: (F, H, W, 3) uint8, F = 1 for a picture."""
    pixels, expected = np.array(output.read_picture(path)), (cfg.frames * cfg.height, cfg.width, 3)
    cli.require(pixels.shape == expected, f"the picture {path} has shape {pixels.shape}, not {expected}; delete it")
    return pixels.reshape(cfg.frames, cfg.height, cfg.width, 3)


# -------------------------------------------------------------------------------------------------------------- scores


def score(cfg: Config, contestants: list[Contestant], rows: list[dict], world: distributed.World) -> None:
    """Give every picture the scores that it lacks; those of 00012-0.png stand in 00012-0.json."""
    work = []
    for batch, contestant in [(b, c) for c in contestants for b in batches(cfg, rows, world)]:
        paths = pictures_of(contestant, batch)
        stored = [read_scores(path) for path in paths]
        if lacking := {m for m in cfg.metrics.split(",") if not all(m in scores for scores in stored)}:
            work.append((batch, paths, stored, lacking))
    needed = [m for m in cfg.metrics.split(",") if any(m in lacking for *_, lacking in work)]
    reward, detector = None, None
    if spec := ",".join(m for m in needed if m != "geneval"):
        reward = load_reward(spec, parse_paths(cfg.reward_paths), world.device)
    if "geneval" in needed:
        tiny = cfg.detector == "tiny"
        detector = (
            geneval.TinyDetector()
            if tiny
            else geneval.Mask2FormerDetector(cfg.detector, cfg.detector_clip, world.device)
        )
    for batch, paths, stored, lacking in world.progress(work, desc="scoring"):
        pictures = torch.stack([torch.from_numpy(read_frames(path, cfg)) for path in paths])
        pictures = pictures.movedim(-1, -3).float() / 255  # (B, F, 3, H, W)
        pictures = pictures[:, 0] if cfg.frames == 1 else pictures
        new = [{} for _ in batch]
        if lacking - {"geneval"}:
            for name, values in reward(pictures, [rows[p]["prompt"] for p, _ in batch], cfg.fps).items():
                for own, value in zip(new, values.tolist(), strict=True):
                    own[name] = value
                    if name in VideoAlignReward.NAMES:  # normalised, as the trainers see it; and as the model says it
                        k = VideoAlignReward.NAMES.index(name)
                        own[f"{name}_raw"] = value * VideoAlignReward.STD[k] + VideoAlignReward.MEAN[k]
        if "geneval" in lacking:
            for own, picture, (p, _) in zip(new, pictures, batch, strict=True):
                correct, own["wrong"] = geneval.judge(detector(picture), rows[p], partial(detector.colors, picture))
                own["geneval"] = float(correct)
        for path, old, own in zip(paths, stored, new, strict=True):
            output.write_atomically(path.with_suffix(".json"), json.dumps(old | own) + "\n")


def read_scores(path: Path) -> dict:
    file = path.with_suffix(".json")
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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
    rows = list(result.values())
    errors = [row["error"] for row in rows]
    overall = {key: float(np.mean([row[key] for row in rows])) for key in ("mean", "difference")}
    overall["error"] = None if None in errors else float(np.linalg.norm(errors) / len(errors))
    return (result if len(rows) > 1 else {}) | {"overall": overall}


# -------------------------------------------------------------------------------------------------------------- report


def report(cfg: Config, contestants: list[Contestant], rows: list[dict]) -> None:
    """Write results.json, results.md, compare.png and index.html from what lies in the output folder."""
    out, numbers = Path(cfg.output_dir), range(cfg.images_per_prompt)
    scores = {
        c.name: [[read_scores(path) for path in pictures_of(c, [(p, n) for n in numbers])] for p in range(len(rows))]
        for c in contestants
    }
    summary = {}
    for metric in cfg.metrics.split(","):
        groups = [row["tag"] if metric == "geneval" else row.get("style", "overall") for row in rows]
        for name in (metric, f"{metric}_raw") if metric in VideoAlignReward.NAMES else (metric,):
            values = {
                model: np.array([[s[name] for s in of_prompt] for of_prompt in own]) for model, own in scores.items()
            }
            summary[name] = {model: compare(values["base"], own, groups) for model, own in values.items()}
    table, remarks = make_table(summary), make_remarks(cfg, rows)
    stored = json.loads((out / "config.json").read_text(encoding="utf-8"))
    results = {
        "settings": {k: v for k, v in stored.items() if k not in ("output_dir", "batch_size", "weights", "versions")},
        "versions": stored["versions"],
        "models": {c.name: {"weights": c.weights, "pictures": c.folder.name} for c in contestants},
        "remarks": remarks,
        "summary": summary,
        "pictures": [
            row | {"picture": f"{p:05d}-{n}.png", "scores": {model: own[p][n] for model, own in scores.items()}}
            for p, row in enumerate(rows)
            for n in numbers
        ],
    }
    lines = ["| " + " | ".join(line) + " |" for line in [table[0], ["---"] * len(table[0]), *table[1:]]]
    text = "\n".join(["# Evaluation", "", *lines, "", *(f"- {remark}" for remark in remarks), ""])
    output.write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    output.write_atomically(out / "results.md", text)
    output.save_image(out / "compare.png", make_sheet(cfg, contestants, rows))
    output.write_atomically(out / "index.html", make_page(cfg, contestants, rows, table, remarks))


def make_remarks(cfg: Config, rows: list[dict]) -> list[str]:
    """What a reader of the table must know."""
    kind = f"videos of {cfg.frames} frames" if cfg.frames > 1 else "pictures"
    remarks = [
        f"{len(rows)} prompts ({cfg.prompts}), {kind} per prompt: {cfg.images_per_prompt}, {cfg.width} x {cfg.height} "
        f"pixels, {cfg.steps} steps, guidance {cfg.guidance:g}, seed {cfg.seed}; the same noise for every model.",
        "Difference: from the base, ± standard error, paired by prompt; in colour if more than two standard errors.",
    ]
    if "geneval" in cfg.metrics:
        remarks.append((geneval.TinyDetector if cfg.detector == "tiny" else geneval.Mask2FormerDetector).NOTE)
    if any(name in cfg.metrics.split(",") for name in VideoAlignReward.NAMES):
        remarks.append("vq, mq, ta: normalised, as in training; raw: as VideoAlign's model gives them.")
    return remarks


def make_table(summary: dict) -> list[list[str]]:
    """Head and lines: metric, base, then for each checkpoint its mean and its difference from the base."""
    tuned = list(next(iter(summary.values())))[1:]
    table = [["metric", "base", *(head for model in tuned for head in (model, "difference"))]]
    for metric, models in summary.items():
        several = len(models["base"]) > 1
        scale = 100 if metric == "hps" and several else 1  # the benchmark is published so
        for group, base in models["base"].items():
            line = [metric + several * f" {group}" + (scale == 100) * " x 100", f"{scale * base['mean']:.4f}"]
            for own in (models[model][group] for model in tuned):
                error = "" if own["error"] is None else f" ± {scale * own['error']:.4f}"
                line += [f"{scale * own['mean']:.4f}", f"{scale * own['difference']:+.4f}{error}"]
            table.append(line)
    return table


def spread(count: int, most: int) -> list[int]:
    """At most so many of 0 … count - 1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def previews(path: Path, cfg: Config, most: int, side: int = 256) -> list[Image.Image]:
    """A picture, or at most so many frames of a video, with the longest side `side`; enlarged pixel by pixel."""
    zoom = side / max(cfg.height, cfg.width)
    how = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.LANCZOS
    size, frames = (round(cfg.width * zoom), round(cfg.height * zoom)), read_frames(path, cfg)
    return [Image.fromarray(frames[i]).resize(size, how) for i in spread(cfg.frames, most)]


def make_sheet(cfg: Config, contestants: list[Contestant], rows: list[dict]) -> Image.Image:
    """compare.png: a row for each of some prompts, a column for each model; of a video four frames side by side."""
    prompts, text, head, gap = spread(len(rows), SHEET_PROMPTS), 200, 32, 8
    cells = [[previews(pictures_of(c, [(p, 0)])[0], cfg, 4) for c in contestants] for p in prompts]
    (w, h), across = cells[0][0][0].size, len(cells[0][0])
    sheet = Image.new("RGB", (text + len(contestants) * (w * across + gap), head + len(prompts) * (h + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, contestant in enumerate(contestants):
        pen.text((text + k * (w * across + gap), gap), contestant.name[-w * across // 8 :], fill="black", font=font)
    for i, (p, row) in enumerate(zip(prompts, cells, strict=True)):
        top = head + i * (h + gap)
        lines = textwrap.wrap(rows[p]["prompt"], 25)[: h // 20]
        pen.multiline_text((gap, top), "\n".join(lines), fill="black", font=font)
        for k, frames in enumerate(row):
            for j, frame in enumerate(frames):
                sheet.paste(frame, (text + k * (w * across + gap) + j * w, top))
    return sheet


STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }
body { margin: auto; max-width: 1200px; padding: 1rem }
.table { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8886; font-variant-numeric: tabular-nums }
th:first-child, td:first-child { text-align: left } .up { color: #1a9048 } .down { color: #d04040 }
.row { display: flex; flex-wrap: wrap; gap: .8rem; margin: .4rem 0 1.6rem } h2 { margin: 0; font-size: 1rem }
figure { margin: 0; width: 256px } figcaption { font-size: .8rem; overflow-wrap: anywhere } img { width: 100% }
"""


def make_page(
    cfg: Config, contestants: list[Contestant], rows: list[dict], table: list[list[str]], remarks: list[str]
) -> str:
    """index.html: the table, and for some prompts the first picture of each model with its scores, embedded."""
    say = html.escape
    body = ["<h1>Evaluation</h1><div class=table><table>"]
    body.append("<tr>" + "".join(f"<th>{say(cell)}</th>" for cell in table[0]))
    body += ["<tr>" + "".join(f"<td{tint(cell)}>{say(cell)}</td>" for cell in line) for line in table[1:]]
    body.append("</table></div><ul>" + "".join(f"<li>{say(remark)}</li>" for remark in remarks) + "</ul>")
    for p in spread(len(rows), PAGE_PROMPTS):
        body.append(f"<h2>{say(rows[p]['prompt'])}</h2><div class=row>")
        for contestant in contestants:
            path = pictures_of(contestant, [(p, 0)])[0]
            scores = read_scores(path)
            words = [f"{name} {value:.4f}" for name, value in scores.items() if name not in ("geneval", "wrong")]
            if "geneval" in scores:
                words.append("✓ right" if scores["geneval"] else f"✗ {scores['wrong']}")
            words = "<br>".join(map(say, [contestant.name, " · ".join(words)]))
            body.append(f'<figure><img src="{data_uri(path, cfg)}" alt=""><figcaption>{words}</figcaption></figure>')
        body.append("</div>")
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}\n<title>Evaluation</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"


def tint(cell: str) -> str:
    """The colour of a difference that is more than two standard errors from zero."""
    match = re.fullmatch(r"([+-])([\d.]+) ± ([\d.]+)", cell)
    clear = match and float(match[2]) > 2 * float(match[3])
    return f" class={'up' if match[1] == '+' else 'down'}" if clear else ""


def data_uri(path: Path, cfg: Config) -> str:
    """The picture, or the video as an animation, as text that an <img> takes."""
    frames, buffer, movie = previews(path, cfg, cfg.frames), io.BytesIO(), {}
    if cfg.frames > 1:
        movie = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / cfg.fps), "loop": 0}
    frames[0].save(buffer, "WEBP", lossless=cfg.width <= 128, quality=85, **movie)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def main(cfg: Config) -> None:
    cfg, family, contestants, rows = plan(cfg)
    world = distributed.start_world()
    open_output(cfg, contestants, rows, world)
    generate(cfg, family, contestants, rows, world)
    score(cfg, contestants, rows, world)
    world.barrier()
    if world.is_main:
        report(cfg, contestants, rows)
        print(Path(cfg.output_dir, "results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    with cli.one_line_errors(RewardError):
        main(cli.parse_config(Config, PRESETS))
