"""DanceGRPO (arXiv 2505.07818) on video: HunyuanVideo and Wan 2.1, text to video or to image; SkyReels, image to video.

Algorithm 1 of the paper, which `main` follows line by line:
    for every iteration:
        sample a batch of prompts; the current weights are the old policy
        for every prompt draw G videos by the reverse SDE from one initial noise, and score them
        advantage of a video = its score, normalised within its prompt's group (several rewards: summed after that)
        choose a random subset of the timesteps and replay it: rho = exp(new log-prob - old log-prob),
            where a log-prob is the mean over the latent's elements
        maximise the clipped objective  min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A)

    python grpo_video.py --preset tiny-t2v            on a laptop, no download; or tiny-t2i, tiny-i2v, tiny-wan
    torchrun --nproc_per_node=8 --nnodes=4 … grpo_video.py              the release's HunyuanVideo run, 32 GPUs of 80 GB
    torchrun --nproc_per_node=8 --nnodes=4 … grpo_video.py --preset release-i2v        its SkyReels-I2V run, 32 GPUs
    torchrun --nproc_per_node=8 grpo_video.py --preset wan              its Wan 2.1 run, text to image, 8 GPUs

Departures from the release: initial noise is shared within a prompt's group, and processes draw their own; best-of-N
keeps the best and worst of each prompt's own group; the first frame is encoded once, by the mode of the posterior;
the embedded guidance is 6, not 6.018; a VideoAlign failure stops the run; rewards see decoded frames, not an MP4.

Legend: P prompts of this process, G samples of each, B = P G of them, T sampling steps, (C, f, h, w) a latent,
F frames, L text tokens, D width of the text embedding, M pairs (sample, step) in a micro-batch, n texts of a sample:
with classifier-free guidance 2, the empty one and the prompt, else 1.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from rewards import RewardError, check_reward, load_reward, parse_paths
from runtime import data, loading, output, processes
from runtime.options import (
    AtLeast1,
    Count,
    Decay,
    Lazy,
    Natural,
    NonNegative,
    Open01,
    Positive,
    Rank,
    Seed,
    Several,
    Share,
    check_options,
    check_size,
    one_line_errors,
    parse_config,
    require,
)
from sampling import SDE, flow_sigmas, gaussian_kl, rollout, sample_ode

diffusers, dryrun = Lazy("diffusers"), Lazy("runtime.dryrun")

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention's linear layers
RATIOS = ("plain", "guard", "dppo")  # of --ratio


@dataclass(frozen=True)
class Config:
    preset: str = "release"  # release (t2v, 32 GPUs), release-i2v, paper, paper-i2v, fast, t2i, wan, wan-48gb, tiny-…
    model: str = "hunyuanvideo-community/HunyuanVideo"  # hub id or folder of a HunyuanVideoPipeline or WanPipeline
    transformer: str = ""  # hub id or folder, if it is not the one in --model; SkyReels' makes image to video
    reward: str = "vq,mq:0"  # NAME[@THRESHOLD][:WEIGHT], … (release); also ta, hps, clip, FILE.py:FUNCTION, http://…
    reward_paths: str = ""  # NAME=FOLDER, comma separated, for reward weights that are not on the hub
    prompts: str = "vidprom"  # text file (one a line), JSONL file, or vidprom (release), consisid, hpdv2 (fetched once)
    first_frames: str = ""  # i2v: JSONL file of {"prompt", "image"} (if not --prompts), or folder of first_frames.jsonl
    first_frame_model: str = ""  # i2v: text-to-image model that paints missing ones (release: FLUX.1-dev)
    first_frame_steps: Count = 30  # its sampling steps (release)
    output_dir: str = "runs/video"  # everything the run leaves
    init: str = ""  # RUN/checkpoint-000300 of an earlier run, from whose weights this one starts
    resume: bool = False  # continue from the newest checkpoint in --output-dir
    seed: Seed = 42  # of every random number (release)
    iterations: Count = 202  # rollouts (release)
    prompts_per_iteration: Count = 32  # over all processes (release: 1 for each of 32 GPUs)
    group_size: Several = 24  # G, videos of one prompt that are compared (release)
    steps: Several = 16  # T, sampling steps in the rollout (release)
    eta: Positive = 0.25  # noise of the SDE, eq. 8 (release; paper: 0.3); flow: a = 0.7, cps: 0.8 are usual
    shift: Positive = 5.0  # of the sigmas towards noise (release)
    sde: str = "dance"  # stochastic step: dance (paper), flow (Flow-GRPO) or cps (coefficients-preserving)
    ratio: str = "plain"  # plain (paper); guard (GRPO-Guard) or dppo (Flow-DPPO), against over-optimisation
    sde_window: Natural = 0  # k > 0: only a window of k steps is stochastic, and all of it is trained (MixGRPO: 4)
    sde_window_every: Count = 25  # iterations after which the window slides on by one step (MixGRPO)
    timestep_fraction: Share = 0.6  # tau, share of the first T - 1 steps to train (paper, release), not of a window
    timesteps: str = "random"  # which of them: random (paper), first (the noisiest) or last; not with a window
    shared_noise: bool = True  # one initial noise for a prompt's whole group (paper)
    updates_per_rollout: Count = 2  # optimizer steps, each on its own part of the samples (release)
    micro_batch: Count = 1  # samples in a forward pass of the rollout, pairs (sample, step) in one of the update (ours)
    clip_range: Open01 = 1e-4  # of the ratio (paper, release); small: log-probs are means; dppo: of the KL (1e-5)
    advantage_clip: Positive = 5.0  # advantages are clamped to plus or minus this (release)
    kl_weight: NonNegative = 0.0  # beta of |v - v_ref|², to stay near --model (paper: none)
    keep_best_worst: Natural = 4  # k > 0: train only on the k best and k worst of each group (release; best-of-N)
    learning_rate: Positive = 1e-5  # AdamW, constant (paper, release; its author advises 5e-6 to 2e-5)
    max_grad_norm: Positive = 1.0  # gradient clipping (paper, release)
    lora_rank: Rank = 0  # 0: all weights are trained; else rank of LoRA, with alpha = 2 rank
    ema_decay: Decay = 0.0  # moving average of the weights, once an iteration, saved beside them; 0: off
    guidance: Positive = 6.0  # embedded guidance scale (release); 1 for models without
    true_guidance: AtLeast1 = 1.0  # classifier-free guidance, in rollout and update alike; 1: off, half the cost
    height: Count = 480  # pixels (release); train at the size you use
    width: Count = 480  # pixels (release)
    frames: Count = 53  # F (release), one more than a multiple of the VAE's stride in time, 4; 1 draws images
    fps: Positive = 8.0  # frames per second that VideoAlign is told (release), and of the sample videos
    max_sequence_length: Count = 256  # text tokens of Llama or UMT5 (HunyuanVideoPipeline's default; Wan's: 512)
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    dtype: str = "auto"  # what networks compute in: auto (bfloat16 on CUDA, else float32), bfloat16, float32
    shard_size: Natural = 0  # processes that share one copy of the network; 0: those of a node, with LoRA 1
    offload: bool = False  # frozen models wait in host memory until they are needed
    compile: bool = False  # torch.compile the transformer's repeated blocks
    dry_run: bool = False  # only print what the run needs, and write dryrun.json; without weights, without a GPU
    processes: Count = 1  # of the run that --dry-run describes
    gpu_memory: Positive = 78.0  # GiB of each GPU, for --dry-run; a card of 80 GB has 78
    track: str = ""  # tensorboard or wandb: metrics and samples go there too, beside metrics.jsonl
    save_every: Count = 50  # iterations between checkpoints; one more at the end
    keep_states: Count = 2  # newest checkpoints that keep what --resume needs
    sample_every: Count = 10  # iterations between sample videos; also before the first and at the end
    num_samples: Count = 4  # sample videos: the first prompts of the file, always from the same noise; 8 are saved


I2V = dict(
    transformer="Skywork/SkyReels-V1-Hunyuan-I2V", reward="mq", prompts="consisid", first_frames="runs/first-frames",
    first_frame_model="black-forest-labs/FLUX.1-dev", height=400, width=640, eta=0.3, shift=7.0, updates_per_rollout=1,
    keep_best_worst=0, guidance=1.0, true_guidance=5.0, shard_size=16,  # 65 GiB a GPU with 8
)  # fmt: skip
# The release's finetune_wan_2_1_grpo.sh, but for max_sequence_length, which is WanPipeline's default.
WAN = dict(
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", updates_per_rollout=1, keep_best_worst=0, guidance=1.0, true_guidance=5.0,
    max_sequence_length=512, shift=3.0, eta=0.3, steps=20, group_size=12,
)  # fmt: skip
# In so short a run the first two steps, which decide most of the clip, learn fastest: the window stays there.
TINY = dict(
    model="tiny/hunyuan", reward_paths="hps=tiny/hps,videoalign=tiny/videoalign", prompts="prompts/moving.jsonl",
    height=32, width=32, frames=9, fps=2.0, max_sequence_length=24, prompts_per_iteration=4, group_size=8, steps=6,
    eta=2.0, shift=3.0, sde_window=2, sde_window_every=1000, updates_per_rollout=1, micro_batch=32, keep_best_worst=0,
    learning_rate=2e-5, gradient_checkpointing=False, num_samples=32,
)  # fmt: skip
PRESETS = {
    "release": {},
    "release-i2v": I2V | dict(iterations=121, group_size=8),
    "paper": dict(group_size=12, steps=25, eta=0.3, updates_per_rollout=4, keep_best_worst=0),  # Table 6
    "paper-i2v": I2V | dict(group_size=12),  # Table 6; guided, so one update
    "fast": dict(steps=10, sde_window=2, sde_window_every=1000),  # ours: cost of 12 forward passes a video, not 25
    "t2i": dict(reward="hps", prompts="hpdv2", frames=1),  # ours: the paper trains it, the release has no script for it
    "wan": WAN | dict(  # text to image, 8 GPUs (release; micro-batch: ours)
        reward="hps", prompts="hpdv2", frames=1, height=512, width=512, prompts_per_iteration=16, iterations=1000,
        micro_batch=4,
    ),
    "wan-48gb": WAN | dict(  # ours, one GPU: LoRA, text to video
        lora_rank=64, learning_rate=1e-4, offload=True, reward="vq,mq", frames=33, height=320, width=512, fps=16.0,
        steps=16, prompts_per_iteration=4, group_size=8, micro_batch=2, gpu_memory=46.0,
    ),
    "tiny-t2v": TINY | dict(reward="vq,mq", iterations=20, output_dir="runs/tiny-t2v"),
    "tiny-wan": TINY | dict(
        model="tiny/wan", reward="vq,mq", guidance=1.0, true_guidance=2.0, iterations=20,
        learning_rate=5e-5, output_dir="runs/tiny-wan",
    ),
    "tiny-i2v": TINY | dict(
        transformer="tiny/skyreels", reward="mq", guidance=1.0, true_guidance=2.0, iterations=24,
        learning_rate=5e-5, output_dir="runs/tiny-i2v",
    ),
    "tiny-t2i": TINY | dict(
        reward="hps", frames=1, prompts="prompts/tiny_single.txt", prompts_per_iteration=8, micro_batch=64,
        iterations=40, output_dir="runs/tiny-t2i",
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- GRPO, as in the paper


def group_advantages(rewards: dict, weights: dict, group_size: int, clip: float) -> torch.Tensor:
    """Eq. 10 and Algorithm 1, line 8: A = (r - mean) / std within the group of one prompt; several rewards: summed.

    rewards {name: (B,)} with the G samples of a prompt side by side; weights {name: float}, on the normalised rewards.
    Returns (B,), within plus or minus `clip`. Raw rewards are never added: their scales differ.
    A group whose rewards are all equal gets 0 and teaches nothing.
    """
    advantages = 0.0
    for name, r in rewards.items():
        r = r.double().view(-1, group_size)  # (P, G); in float32 the mean of G equal rewards may differ from them
        A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)
        advantages = advantages + weights[name] * A
    return advantages.flatten().clamp(-clip, clip).float()


def grpo_loss(log_prob, old_log_prob, A, clip_range: float):
    """Eq. 9: minus the mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A). All (M,). Returns the loss and rho (M,)."""
    rho = torch.exp(log_prob - old_log_prob)
    objective = torch.minimum(rho * A, rho.clamp(1 - clip_range, 1 + clip_range) * A)
    return -objective.mean(), rho.detach()


def guarded_loss(ratio: str, log_ratio, kl, A, std, dsigma, epsilon: float):
    """The objective with another trust region than eq. 9's. Returns the loss and rho (M,).

    log_ratio (M,): log p - log p_old; kl (M,): of the step, KL(N(mean_old, std²) || N(mean, std²)), the
    mean over its elements; std (M, …); dsigma (M,): sigma - sigma_next, above 0; epsilon: --clip-range.
    guard, GRPO-Guard (2510.22319): rho = exp(std (log p - log p_old + KL)) = exp(mean(noise (mean - mean_old))), whose
    log has mean 0 at every step, where that of eq. 9 has -KL, so that clipping acts on both sides; and the weight
    1 / dsigma, since the gradient of a step's mean with respect to v is about dsigma.
    dppo, Flow-DPPO (2606.11025): rho A, not clipped. A pair is left out if its KL exceeds epsilon and it moves further
    away: A > 0 with rho > 1, or A < 0 with rho < 1.
    """
    if ratio == "guard":
        log_rho = std.flatten() * (log_ratio + kl)
        return grpo_loss(log_rho, torch.zeros_like(log_rho), A / dsigma, epsilon)
    rho = torch.exp(log_ratio)
    kept = (kl <= epsilon) | (log_ratio * A <= 0)
    return -(rho * A * kept).mean(), rho.detach()


def sde_window(iteration: int, num_steps: int, size: int, every: int) -> range:
    """The stochastic steps: with size 0 all but the last, else a window of `size` steps (MixGRPO, 2507.21802).

    The window starts at the noisy end and slides towards the data by one step in `every` iterations. The last step is
    never in it: its noise does not reach the image, which is decoded from the last prediction of x0.
    """
    if size == 0:
        return range(num_steps - 1)
    start = iteration // every % (num_steps - size)
    return range(start, start + size)


def training_pairs(A, keys, group_size: int, window: range, fraction: float, timesteps: str, keep: int, updates: int):
    """Algorithm 1, line 10: the pairs (sample, step) that are trained, for each of the rollout's updates.

    Of each sample a `fraction` tau of the stochastic steps: timesteps "random", "first" or "last". Of each group all
    samples, or with keep > 0 the `keep` best and the `keep` worst (paper: best-of-N); they are dealt to the updates, so
    that a costly rollout serves several optimizer steps. A (B,); keys (seed, iteration, prompt, sample).
    """
    pairs = [[] for _ in range(updates)]
    for start in range(0, len(A), group_size):
        samples = A[start : start + group_size].argsort(stable=True).tolist() if keep else list(range(group_size))
        samples = samples[:keep] + samples[-keep:] if keep else samples
        samples = data.keyed_rng("updates", *keys[start][:3]).permutation(samples)
        for u in range(updates):
            for b in (start + samples[u::updates]).tolist():
                steps = window[::-1] if timesteps == "last" else window
                if timesteps == "random":
                    steps = data.keyed_rng("timesteps", *keys[b]).permutation(window).tolist()
                pairs[u] += [(b, t) for t in sorted(steps[: int(len(window) * fraction)])]
    return pairs


def statistics(rewards: dict, weights: dict, A: Tensor, group_size: int, ratios: list, clip_range: float, gather):
    """The metrics of an iteration, over all processes, whose values `gather` puts side by side.

    rewards {name: (B,)}, advantages A (B,); ratios: for each update the rho (M,) of its micro-batches.
    """
    rewards, A = {name: gather(r) for name, r in rewards.items()}, gather(A)
    total = sum(weights[name] * r for name, r in rewards.items())
    excess = [gather(torch.cat(rho)).double() - 1 for rho in ratios]
    every = torch.cat(excess)
    return {
        "reward_mean": total.mean().item(),
        "reward_std": total.std().item(),
        **{f"reward_{name}": r.mean().item() for name, r in rewards.items()},
        "advantage_abs": A.abs().mean().item(),
        "zero_variance_groups": int((A.view(-1, group_size) == 0).all(1).sum()),  # these teach nothing
        "ratio_mean": 1 + every.mean().item(),
        "ratio_max_deviation_first_update": excess[0].abs().max().item(),  # 0, unless the update replays another policy
        "clip_fraction": (every.abs() > clip_range).double().mean().item(),
        "approx_kl": (every - torch.log1p(every)).mean().item(),  # Schulman's k3; log rho is a mean over d elements
    }


# ------------------------------------------------------------------------------------------ the models, as policies
# Each family is a namespace, without instances.


class HunyuanVideo:
    """HunyuanVideo, and SkyReels-I2V."""

    pipeline, transformer, vae = "HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo"
    strides = "temporal_compression_ratio", "spatial_compression_ratio"  # frames and pixels of an element of a latent
    frozen: ClassVar = {"vae": 246_493_891, "text_encoder": 7_504_924_672, "text_encoder_2": 123_060_480}  # parameters

    def full_size(cfg: Config) -> dict:
        """Where its transformer differs from diffusers' defaults."""
        return dict(guidance_embeds=True) | ({"in_channels": 32} if cfg.transformer else {})

    def encode(pipe, texts: list[str], length: int, device) -> list[Tensor]:
        """Llama embedding of each token (N, L, D), attention mask (N, L), pooled CLIP embedding (N, D').

        L is the length of the longest of these texts, not max_sequence_length: attention over padding costs as much.
        """
        tokens, pooled, mask = pipe.encode_prompt(texts, device=device, max_sequence_length=length)
        length = int(mask.sum(1).max())
        return [tokens[:, :length], mask[:, :length].to(tokens), pooled]

    def sizes(config: dict, length: int) -> list[tuple]:  # of a text in `encode`
        return [(length, config["text_embed_dim"]), (length,), (config["pooled_projection_dim"],)]

    def arguments(config, sigma: Tensor, text: list[Tensor], cfg: Config) -> dict:
        """What the transformer takes beside latents, time and tokens. Guidance is multiplied by 1000, as time is."""
        guidance = torch.full_like(sigma, 1000 * cfg.guidance) if config.guidance_embeds else None
        return dict(encoder_attention_mask=text[1], pooled_projections=text[2], guidance=guidance)


class Wan:
    """Wan 2.1, text to video: cross-attention to UMT5's tokens, classifier-free guidance only."""

    pipeline, transformer, vae = "WanPipeline", "WanTransformer3DModel", "AutoencoderKLWan"
    strides = "scale_factor_temporal", "scale_factor_spatial"
    frozen: ClassVar = {"vae": 126_892_531, "text_encoder": 5_680_910_336}

    def full_size(cfg: Config) -> dict:
        return dict(num_attention_heads=12, num_layers=30, ffn_dim=8960) if "1.3B" in cfg.model else {}  # else 14B

    def encode(pipe, texts: list[str], length: int, device) -> list[Tensor]:
        """Embedding of each token (N, L, D), L is `length`. Padding is zeros and is attended to: there is no mask."""
        tokens, _ = pipe.encode_prompt(texts, None, False, device=device, max_sequence_length=length)
        return [tokens]

    def sizes(config: dict, length: int) -> list[tuple]:
        return [(length, config["text_dim"])]

    def arguments(config, sigma: Tensor, text: list[Tensor], cfg: Config) -> dict:
        return {}


FAMILIES = {family.transformer: family for family in (HunyuanVideo, Wan)}
PIPELINES = {family.pipeline: family for family in FAMILIES.values()}


def family_of(transformer) -> type:
    names = (kind.__name__ for kind in type(transformer).__mro__)  # FSDP makes a subclass
    return next(FAMILIES[name] for name in names if name in FAMILIES)


def transformer_source(cfg: Config) -> dict:
    """Where the transformer lies: in --transformer, or else in --model."""
    if cfg.transformer:
        return {"path": cfg.transformer, "option": "--transformer"}
    return {"path": cfg.model, "subfolder": "transformer"}


def transformer_config(cfg: Config) -> dict:
    """The transformer's config. Its class must be the one that --model's pipeline needs."""
    expected = PIPELINES[loading.check_family(cfg.model, *PIPELINES)].transformer
    config = loading.load_config(**transformer_source(cfg))
    found = config["_class_name"]
    require(found == expected, f"--transformer {cfg.transformer} is a {found}, not a {expected}")
    return config


def takes_first_frame(config: dict) -> bool:
    """Is it image to video? SkyReels takes twice the channels of a latent: the second half is the first frame."""
    return config["in_channels"] == 2 * config["out_channels"]


def latent_shape(cfg: Config, config: dict, stride: int, side: int) -> tuple[int, int, int, int]:
    """(C, f, h, w) of a video's latent; stride, side: frames, and pixels in height and width, of an element."""
    return (config["out_channels"], (cfg.frames - 1) // stride + 1, cfg.height // side, cfg.width // side)


def load_models(cfg: Config, world: processes.World, init: Path | None):
    """→ the pipeline, its transformer ready to train, and the KL term's reference policy: the weights of --model."""
    family = FAMILIES[transformer_config(cfg)["_class_name"]]
    kind = getattr(diffusers, family.transformer)
    load = partial(loading.load_network, kind, world=world, **transformer_source(cfg))
    transformer = reference = load(
        lora_rank=cfg.lora_rank,
        lora_targets=LORA_TARGETS,
        checkpointing=cfg.gradient_checkpointing,
        compiled=cfg.compile,
        init=init,
    )
    if cfg.kl_weight and not cfg.lora_rank:  # with LoRA the reference is the transformer without the adapter
        reference = load(frozen=True)
    for network in dict.fromkeys((transformer, reference)) if family is HunyuanVideo else ():
        loading.drop_full_masks([*network.transformer_blocks, *network.single_transformer_blocks], position=3)
    kind = getattr(diffusers, family.pipeline)
    if takes_first_frame(transformer.config):
        kind = diffusers.HunyuanSkyreelsImageToVideoPipeline
    return loading.load_pipeline(kind, cfg.model, world, transformer=transformer), transformer, reference


@torch.no_grad()
def encode(pipe, prompts: list[str], pictures: dict[str, Path], shape: tuple, cfg: Config, device) -> list[Tensor]:
    """→ what the family's `encode` makes of the texts, tokens (P, n, L, D) first, and latents of the first frame,
    followed by zeros, (P, C, f, h, w); with 0 channels if there are no pictures.
    """
    texts = prompts if cfg.true_guidance == 1 else [text for prompt in prompts for text in ("", prompt)]
    text = family_of(pipe.transformer).encode(pipe, texts, cfg.max_sequence_length, device)
    text = [rearrange(x, "(p n) ... -> p n ...", p=len(prompts)) for x in text]
    frames = torch.zeros(len(prompts), shape[0] if pictures else 0, *shape[1:], device=device)
    for frame, prompt in zip(frames, prompts if pictures else [], strict=False):
        pixels = pipe.video_processor.preprocess(data.read_picture(pictures[prompt]), cfg.height, cfg.width)
        # The posterior's mode; the stock pipeline samples. A condition must not add randomness to the policy.
        latent = pipe.vae.encode(pixels[:, :, None].to(device, pipe.vae.dtype)).latent_dist.mode()[0]  # (C, 1, h, w)
        frame[:, :1] = latent * pipe.vae.config.scaling_factor
    return [*text, frames]


def velocity(transformer, z: Tensor, sigma: Tensor, condition: list[Tensor], cfg: Config) -> Tensor:
    """The guided v(z, sigma | condition of each sample). z (B, C, f, h, w), sigma () or (B,) → (B, C, f, h, w) float32.

    Classifier-free guidance (2207.12598): v = v_empty + guidance (v_prompt - v_empty), in one forward pass.
    """
    *text, first_frame = condition
    n, dtype = text[0].shape[1], text[0].dtype
    text = [x.flatten(0, 1) for x in text]  # (B n, …)
    sigma = sigma.expand(len(z)).repeat_interleave(n)
    with torch.autocast(z.device.type, dtype, enabled=dtype != torch.float32):
        out = transformer(
            hidden_states=torch.cat([z, first_frame], 1).to(dtype).repeat_interleave(n, 0),
            timestep=1000 * sigma,  # unlike FLUX, these transformers' time runs from 1000 to 0
            encoder_hidden_states=text[0],
            return_dict=False,
            **family_of(transformer).arguments(transformer.config, sigma, text, cfg),
        )[0].float()
    if n == 1:
        return out
    v_empty, v_prompt = rearrange(out, "(b two) c f h w -> two b c f h w", two=2)
    return v_empty + cfg.true_guidance * (v_prompt - v_empty)


@torch.no_grad()
def decode(vae, z0: Tensor) -> Tensor:
    """Latents (B, C, f, h, w) → videos (B, F, 3, H, W) in [0, 1]; one by one, since decoding takes the most memory."""
    mean, std = 0.0, 1 / vae.config.get("scaling_factor", 1.0)
    if "latents_std" in vae.config:  # Wan's latents have a mean and a standard deviation in each channel
        mean, std = (z0.new_tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    videos = [vae.decode((z * std + mean).to(vae.dtype)).sample.float() for z in z0.split(1)]
    return rearrange(torch.cat(videos) / 2 + 0.5, "b c f h w -> b f c h w").clamp(0, 1)


@torch.no_grad()
def sample_groups(cfg: Config, world, transformer, vae, conditions, keys: list, window: range, sigmas, shape: tuple):
    """Algorithm 1, lines 4 and 5: draw G videos for each prompt, keep every latent and the log-prob of every draw.

    conditions (P, …) as from `encode`; keys (seed, iteration, prompt, sample) of each of the B samples; shape
    (C, f, h, w). Returns trajectories (B, T+1, C, f, h, w), log_probs (B, T), and videos (B, F, 3, H, W) decoded from
    the last z0_hat.
    """
    step, log_prob_of = SDE[cfg.sde]

    def sample(b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        condition = [x[b // cfg.group_size] for x in conditions]
        z, noise = data.rollout_noise(shape, [keys[i] for i in b], cfg.shared_noise, world.device)
        trajectory, log_prob, z0 = rollout(
            lambda z, i: velocity(transformer, z, sigmas[i], condition, cfg),
            z, sigmas, cfg.eta, step, noise, window, log_prob_of,
        )  # fmt: skip
        with world.on_device(vae):
            return trajectory, log_prob, decode(vae, z0)

    drawn = [sample(b) for b in world.chunks(torch.arange(len(keys)), cfg.micro_batch, "rollout")]
    return tuple(map(torch.cat, zip(*drawn, strict=True)))


# ---------------------------------------------------------------------------------------------------------- Algorithm 1


def check(cfg: Config) -> list[str]:
    """Everything that can be wrong with the options is found here, before any model is loaded. Returns the prompts."""
    check_options(cfg)
    require(cfg.sde in SDE, f"--sde must be one of {', '.join(SDE)}, got {cfg.sde!r}")
    require(cfg.sde != "cps" or cfg.eta <= 1, f"--eta must be at most 1 with --sde cps, got {cfg.eta}")
    require(cfg.ratio in RATIOS, f"--ratio must be one of {', '.join(RATIOS)}, got {cfg.ratio!r}")
    plain = cfg.ratio == "plain" or cfg.sde != "cps"
    require(plain, f"--ratio {cfg.ratio} needs Gaussian log-probabilities, which --sde cps does not use")
    check_reward(cfg.reward, cfg.reward_paths, cfg.frames > 1)
    network = transformer_config(cfg)
    family = FAMILIES[network["_class_name"]]
    vae = loading.load_config(cfg.model, "vae")
    (stride, side), patch = (vae[name] for name in family.strides), network["patch_size"]
    check_size(cfg, side * (patch if isinstance(patch, int) else patch[-1]))
    least = 2 if takes_first_frame(network) else 1
    message = f"--frames must be one more than a multiple of {stride}, and at least {least} here, got {cfg.frames}"
    require(cfg.frames >= least and cfg.frames % stride == 1 % stride, message)
    message = f"--guidance is embedded guidance, which {cfg.model} lacks; give --guidance 1, and --true-guidance"
    require(family is not Wan or cfg.guidance == 1, message)
    kind = getattr(diffusers, family.transformer)
    loading.check_init(cfg, kind, "transformer", LORA_TARGETS, transformer_source(cfg))
    prompts = data.load_prompts(cfg.prompts)
    check_reward(cfg.reward, cfg.reward_paths, cfg.frames > 1, prompts, data.load_metadata(cfg.prompts))
    return prompts


def dry_run(cfg: Config) -> dict:
    """Print what a run with these options takes, write OUTPUT_DIR/dryrun.json, and return its content."""
    check_options(cfg)
    default = Wan if cfg.model.startswith("Wan-AI/") else HunyuanVideo  # if its files are not here
    family = PIPELINES.get(dryrun.pipeline_of(cfg.model), default)
    kind, vae_kind = getattr(diffusers, family.transformer), getattr(diffusers, family.vae)
    config = dryrun.config_of(kind, **transformer_source(cfg), **family.full_size(cfg))
    vae = dryrun.config_of(vae_kind, cfg.model, "vae")
    shape = latent_shape(cfg, config, *(vae[name] for name in family.strides))
    dtype, n = processes.compute_dtype(cfg.dtype, cuda=True), 1 if cfg.true_guidance == 1 else 2
    return dryrun.run(
        cfg, kind, config,
        predict=lambda network, z, condition: velocity(network, z, torch.ones(()), condition, cfg), shape=shape,
        condition=lambda b: [
            *(torch.empty(b, n, *size, dtype=dtype) for size in family.sizes(config, cfg.max_sequence_length)),
            torch.empty(b, config["in_channels"] - config["out_channels"], *shape[1:]),
        ],
        frozen=dryrun.frozen_parameters(cfg.model, family.frozen), vae=(vae_kind, vae), decode=decode,
        lora_targets=LORA_TARGETS, fits_whole=cfg.lora_rank > 0,
    )  # fmt: skip


def main(cfg: Config) -> None:
    prompts = check(cfg)
    loading.fetch_all(cfg)
    world = processes.start_world(cfg.dtype, cfg.shard_size, cfg.offload, fits_whole=cfg.lora_rank > 0)
    pictures = data.first_frames(cfg, prompts, world) if takes_first_frame(transformer_config(cfg)) else {}
    folder = output.open_folder(cfg, world, prompts)
    data.paint_first_frames(cfg, pictures, world)
    reward = load_reward(cfg.reward, parse_paths(cfg.reward_paths), world.device, data.load_metadata(cfg.prompts))
    world.freeze(*reward.models)
    pipe, transformer, reference = load_models(cfg, world, folder.init)
    optimizer = processes.adamw(transformer, cfg.learning_rate)
    ema = processes.EMA(transformer, cfg.ema_decay)
    checkpoints = output.Checkpoints(pipe, "transformer", optimizer, ema, world, cfg.keep_states)

    step, log_prob_of = SDE[cfg.sde]
    sigmas = flow_sigmas(cfg.steps, cfg.shift).to(world.device)  # (T+1,)
    shape = latent_shape(cfg, transformer.config, pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    P, G = cfg.prompts_per_iteration // world.size, cfg.group_size
    first = world.rank * P  # this process has the prompts first … first + P - 1 of each iteration

    embed = partial(encode, pipe, pictures=pictures, shape=shape, cfg=cfg, device=world.device)
    embed = processes.PromptCache(embed, world, transformer, *map(pipe.components.get, family_of(transformer).frozen))

    def draw(captions: list[str], z: Tensor) -> Tensor:  # a sample video of each, by the ODE
        condition = embed(captions)
        z0 = sample_ode(lambda z, i: velocity(transformer, z, sigmas[i], condition, cfg), z, sigmas)
        with world.on_device(pipe.vae):
            return decode(pipe.vae, z0)

    run = output.Run(cfg, world, checkpoints, output.Samples(cfg, world, prompts, draw, shape, reward, cfg.fps), folder)
    for iteration in run.iterations():
        clock = output.Stopwatch(world)

        # Algorithm 1, lines 2 and 3: a batch of prompts. The current weights are the old policy.
        batch = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, iteration, cfg.seed)[first : first + P]
        captions = [prompts[i] for i in batch]
        conditions = embed(captions)  # (P, …) each

        # Lines 4 and 5: G samples for each prompt, from the same initial noise.
        keys = [(cfg.seed, iteration, first + p, g) for p in range(P) for g in range(G)]  # each sample's RNG key
        window = sde_window(iteration, cfg.steps, cfg.sde_window, cfg.sde_window_every)
        drawn = sample_groups(cfg, world, transformer, pipe.vae, conditions, keys, window, sigmas, shape)
        trajectories, old_log_probs, videos = drawn  # (B, T+1, C, f, h, w), (B, T), (B, F, 3, H, W)
        clock.lap("rollout")

        # Line 6: the rewards of each sample.
        with world.on_device(*reward.models):
            rewards = reward(videos, [caption for caption in captions for _ in range(G)], cfg.fps)  # {name: (B,)}
        clock.lap("reward")

        # Lines 7 to 9: the advantage of each sample over its prompt's group.
        A = group_advantages(rewards, reward.weights, G, cfg.advantage_clip)  # (B,)

        # Line 10: a random subset of the timesteps of each sample.
        tau = 1.0 if cfg.sde_window else cfg.timestep_fraction
        updates = training_pairs(A, keys, G, window, tau, cfg.timesteps, cfg.keep_best_worst, cfg.updates_per_rollout)

        # Lines 11 and 12: gradient ascent on the clipped objective.
        losses, ratios, grad_norms = [], [], []
        for pairs in updates:
            ratios.append([])
            for part in world.chunks(pairs, cfg.micro_batch, f"update {len(ratios)}"):
                processes.reduce_gradients(transformer, now=part[-1] == pairs[-1])  # now: in the last micro-batch
                s, t = torch.tensor(part, device=world.device).T  # sample and step of each pair (M,)
                z, z_next, condition = trajectories[s, t], trajectories[s, t + 1], [x[s // G] for x in conditions]
                # The current policy at z, and the log-probability that it gives the rollout's draw.
                v = velocity(transformer, z, sigmas[t], condition, cfg)
                mean, std, _ = step(v, z, sigmas[t], sigmas[t + 1], cfg.eta)
                log_prob, old_log_prob = log_prob_of(z_next, mean, std), old_log_probs[s, t]
                loss, rho = grpo_loss(log_prob, old_log_prob, A[s], cfg.clip_range)
                if cfg.ratio != "plain":  # mean_old = z_next - std noise; the noise is drawn again from its key
                    noise = data.step_noise(shape, [(*keys[b], i) for b, i in part], world.device)
                    kl, dsigma = gaussian_kl(mean, z_next - std * noise, std), sigmas[t] - sigmas[t + 1]
                    loss, rho = guarded_loss(cfg.ratio, log_prob - old_log_prob, kl, A[s], std, dsigma, cfg.clip_range)
                if cfg.kl_weight:
                    with torch.no_grad(), loading.without_adapter(reference):
                        v_ref = velocity(reference, z, sigmas[t], condition, cfg)
                    loss = loss + cfg.kl_weight * ((v - v_ref) ** 2).mean()
                weight = len(part) / len(pairs)
                (loss * weight).backward()
                losses.append(loss.detach() * weight / len(updates))
                ratios[-1].append(rho)
            grad_norms.append(processes.clip_gradients(transformer, cfg.max_grad_norm, iteration))
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        clock.lap("update")

        row = {"loss": world.mean(sum(losses)), "grad_norm": sum(grad_norms) / len(updates)}
        row |= statistics(rewards, reward.weights, A, G, ratios, cfg.clip_range, world.gather)
        run.finish(iteration, row | clock.metrics(P * G))


if __name__ == "__main__":
    with one_line_errors(RewardError):
        config = parse_config(Config, PRESETS)
        dry_run(config) if config.dry_run else main(config)
