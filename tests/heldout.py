"""How good is a tiny model on prompts it was not trained on? Base beside trained, drawn by the stock pipelines.

    python tests/heldout.py RUN_FOLDER [ITERATION]      RUN_FOLDER as a trainer left it, by default its last checkpoint

Both models draw every prompt of prompts/tiny_heldout.txt from the same noise, by the ODE sampler. Printed: each
reward and the share of pictures that the tiny world's checker finds right; the difference, and the standard error of
its mean over the prompts.
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tiny  # noqa: E402
from rewards import load_reward  # noqa: E402
from sampling import flow_sigmas  # noqa: E402

REWARDS = {"hps": str(ROOT / "tiny/hps"), "clip": str(ROOT / "tiny/clip")}


@torch.no_grad()
def draw(config: dict, weights: Path | None, prompts: list[str], noises: int) -> torch.Tensor:
    """Pictures (noises · prompts, 3, 64, 64) of the run's base model, or with `weights` in place of its network's."""
    is_flux = config["script"] == "grpo_flux.py"
    kind, component = (FluxPipeline, "transformer") if is_flux else (StableDiffusionPipeline, "unet")
    pipe = kind.from_pretrained(ROOT / config["model"])
    pipe.set_progress_bar_config(disable=True)
    if weights is not None and config["lora_rank"]:
        pipe.load_lora_weights(weights)
    elif weights is not None:
        setattr(pipe, component, type(getattr(pipe, component)).from_pretrained(weights / component))
    options = dict(guidance_scale=config["guidance"], height=64, width=64, output_type="pt")
    side = 64 // pipe.vae_scale_factor
    if is_flux:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # takes the sigmas as they are
        options |= dict(sigmas=flow_sigmas(config["steps"], config["shift"])[:-1].tolist())
        options |= dict(max_sequence_length=config["max_sequence_length"])
        shape = (side // 2) ** 2, pipe.transformer.config.in_channels
    else:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        shape = pipe.unet.config.in_channels, side, side
    pictures = []
    for seed in range(noises):
        z = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(1000 + seed))
        pictures.append(pipe(prompts, latents=z, num_inference_steps=config["steps"], **options).images)
    return torch.cat(pictures).clamp(0, 1)


def judge(pictures: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Every reward, and the checker's verdict (0 or 1), on each picture."""
    return load_reward("hps,clip", REWARDS)(pictures, prompts) | {"correct": tiny.check(pictures, prompts).float()}


def compare(run: Path, iteration: int | None = None, noises: int = 4) -> dict[str, dict[str, float]]:
    """{score: {base, trained, difference, error}} of a run's checkpoint against its base model."""
    config = json.loads((run / "config.json").read_text())
    folders = sorted(run.glob("checkpoint-??????"))
    weights = folders[-1] if iteration is None else run / f"checkpoint-{iteration:06d}"
    prompts = (ROOT / "prompts/tiny_heldout.txt").read_text().splitlines()
    base = judge(draw(config, None, prompts, noises), prompts * noises)
    trained = judge(draw(config, weights, prompts, noises), prompts * noises)
    return paired(base, trained, len(prompts))


def paired(base: dict, trained: dict, prompts: int) -> dict[str, dict[str, float]]:
    """{score: {base, trained, difference, error}} of scores {name: (noises · prompts,)}; error is that of the mean."""
    result = {}
    for name in base:
        gain = (trained[name] - base[name]).view(-1, prompts).mean(0)  # of each prompt
        error = (gain.std() / prompts**0.5).item()
        means = base[name].mean().item(), trained[name].mean().item(), gain.mean().item()
        result[name] = dict(zip(("base", "trained", "difference"), means, strict=True)) | {"error": error}
    return result


if __name__ == "__main__":
    for name, row in compare(Path(sys.argv[1]), *map(int, sys.argv[2:3])).items():
        print(f"{name:8}", "  ".join(f"{key} {value:.4f}" for key, value in row.items()))
