"""How good is a tiny video model on prompts it was not trained on? Base beside trained, from the same noise.

    python tests/heldout_video.py RUN_FOLDER [ITERATION]      RUN_FOLDER as grpo_video.py left it, its last checkpoint

Both models draw every prompt of the run's heldout file by the ODE sampler. Printed: each reward, and what the moving
world's checker reads from the pixels: the share of right clips, how rough their motion is and how unclean their
frames (less is better), and for image to video the PSNR of the first frame. Difference and standard error are paired.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import HunyuanVideoTransformer3DModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpo_video  # noqa: E402
import moving  # noqa: E402
import tiny  # noqa: E402
from heldout import paired  # noqa: E402
from rewards import load_reward, parse_paths  # noqa: E402
from runtime import data, output  # noqa: E402
from sampling import flow_sigmas, sample_ode  # noqa: E402


@torch.no_grad()
def draw(cfg, weights: Path | None, prompts: list[str], pictures: dict, noises: int) -> torch.Tensor:
    """Videos (noises · prompts, F, 3, H, W) of the run's base model, or with `weights` in place of its transformer."""
    parts = {"transformer": grpo_video.load_transformer(HunyuanVideoTransformer3DModel.from_pretrained, cfg)}
    if weights is not None:
        parts["transformer"] = HunyuanVideoTransformer3DModel.from_pretrained(weights / "transformer")
    pipe = grpo_video.PIPELINES[cfg.task].from_pretrained(cfg.model, **parts)
    shape = pipe.transformer.config.out_channels, (cfg.frames - 1) // pipe.vae_scale_factor_temporal + 1
    shape += cfg.height // pipe.vae_scale_factor_spatial, cfg.width // pipe.vae_scale_factor_spatial
    sigmas, condition = flow_sigmas(cfg.steps, cfg.shift), grpo_video.encode(pipe, prompts, pictures, shape, cfg, "cpu")
    videos = []
    for seed in range(noises):
        z = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(1000 + seed))
        z0 = sample_ode(
            lambda z, i: grpo_video.velocity(pipe.transformer, z, sigmas[i].expand(len(z)), condition, cfg), z, sigmas
        )
        videos.append(grpo_video.decode(pipe.vae, z0))
    return torch.cat(videos)


def judge(cfg, videos: torch.Tensor, prompts: list[str], pictures: dict) -> dict[str, torch.Tensor]:
    """Every reward, and what the checker reads, of each video."""
    names = "hps,clip" if cfg.task == "t2i" else "vq,mq,ta"
    scores = load_reward(names, parse_paths(cfg.reward_paths) | {"clip": "tiny/clip"})(videos, prompts, cfg.fps)
    large = [F.interpolate(video, 64, mode="bilinear") for video in videos]  # the checker's size
    if cfg.task == "t2i":
        return scores | {"correct": tiny.check(torch.cat(large), prompts).float()}
    seen = [moving.watch(video) for video in large]
    scores["correct"] = torch.tensor([float(moving.check_clip(*pair)) for pair in zip(large, prompts, strict=True)])
    scores["rough"] = torch.tensor([moving.roughness(what) for what in seen])
    scores["unclean"] = torch.tensor([moving.uncleanness(*pair) for pair in zip(large, seen, strict=True)])
    if pictures:
        from torchvision.transforms.functional import pil_to_tensor

        firsts = torch.stack([pil_to_tensor(output.read_picture(pictures[prompt])) for prompt in prompts]) / 255
        scores["psnr"] = -10 * (videos[:, 0] - firsts).square().mean((1, 2, 3)).log10()
    return scores


def compare(run: Path, iteration: int | None = None, noises: int = 3) -> dict[str, dict[str, float]]:
    """{score: {base, trained, difference, error}} of a run's checkpoint against its base model."""
    stored = json.loads((run / "config.json").read_text())
    cfg = grpo_video.Config(**{name: stored[name] for name in grpo_video.Config.__dataclass_fields__})
    weights = sorted(run.glob("checkpoint-??????"))[-1] if iteration is None else run / f"checkpoint-{iteration:06d}"
    file = Path(cfg.prompts)
    file = file.with_name(f"{file.stem}_heldout{file.suffix}")
    prompts, pictures = data.load_prompts(str(file)), {}
    if cfg.task == "i2v":
        pictures = {row["prompt"]: file.parent / row["image"] for row in map(json.loads, file.read_text().splitlines())}
    base, trained = (
        judge(cfg, draw(cfg, which, prompts, pictures, noises), prompts * noises, pictures) for which in (None, weights)
    )
    return paired(base, trained, len(prompts))


if __name__ == "__main__":
    for name, row in compare(Path(sys.argv[1]), *map(int, sys.argv[2:3])).items():
        print(f"{name:8}", "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
