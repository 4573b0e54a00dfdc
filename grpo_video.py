"""DanceGRPO (arXiv 2505.07818) on video: HunyuanVideo and Wan 2.1, text to video or to image; SkyReels, image to video.

Algorithm 1 of the paper, which `main` follows line by line:
    for every iteration:
        sample a batch of prompts; the current weights are the old policy
        for every prompt draw G videos by the reverse SDE from one initial noise, and score them
        advantage of a video = its score, normalised within its prompt's group (several rewards: summed after that)
        choose a random subset of the timesteps and replay it: rho = exp(new log-prob - old log-prob),
            where a log-prob is the mean over the latent's elements
        maximise the clipped objective  min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A)

    python grpo_video.py --preset tiny-t2v            on a laptop, no model download; or tiny-t2i, tiny-i2v, tiny-wan
    torchrun --nproc_per_node=8 --nnodes=4 … grpo_video.py    the release's run; --preset release-i2v: SkyReels

Departures from the release: docs/departures.md.
Legend: P prompts of this process, G samples of each, B = P G of them, T sampling steps, (C, f, h, w) a latent, F
frames, L text tokens, D width of their embedding, M pairs (sample, step) in a micro-batch, n texts of a sample: with
classifier-free guidance 2, the empty one and the prompt, else 1.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

import evaluation.geneval  # noqa: F401  adds the reward geneval
import runtime
from rewards import RewardError, check_reward
from runtime import data, families, initial, loading, lora, options, processes
from runtime.metrics import statistics
from runtime.options import AtLeast1, Count, Decay, Natural, NonNegative, Open01, Positive, Rank, Seed, Several, Share
from sampling import SDE, distinct, flow_sigmas, gaussian_kl, guarded_loss, sample_ode, sde_window

diffusers, dryrun, drymodels = map(options.Lazy, ("diffusers", "runtime.dryrun", "runtime.drymodels"))

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention's linear layers (release)
load_models = partial(families.load_models, lora_targets=LORA_TARGETS)  # → pipeline, network, the KL term's reference


@dataclass(frozen=True)
class Config:
    # paper
    preset: str = "release"  # release (t2v, 32 GPUs), release-i2v, paper, paper-i2v, fast, t2i, wan, wan-48gb, tiny-…
    model: str = "hunyuanvideo-community/HunyuanVideo"  # hub id or folder of a HunyuanVideoPipeline or WanPipeline
    transformer: str = ""  # hub id or folder, if it is not the one in --model; SkyReels' makes image to video
    reward: str = "vq,mq:0"  # NAME[@THRESHOLD][:WEIGHT], … (release); also ta, hps, clip, FILE.py:FUNCTION, http://…
    prompts: str = "vidprom"  # text file (one a line), JSONL file, or vidprom (release), consisid, hpdv2 (fetched once)
    first_frames: str = ""  # i2v: JSONL file of {"prompt", "image"} (if not --prompts), or folder of first_frames.jsonl
    iterations: Count = 202  # rollouts (release)
    prompts_per_iteration: Count = 32  # over all processes (release: 1 for each of 32 GPUs)
    group_size: Several = 24  # G, videos of one prompt that are compared (release)
    steps: Several = 16  # T, sampling steps in the rollout (release)
    eta: Positive = 0.25  # noise of the SDE, eq. 8 (release; paper: 0.3); flow: a = 0.7, cps: 0.8 are usual
    shift: Positive = 5.0  # of the sigmas towards noise (release)
    timestep_fraction: Share = 0.6  # tau, share of the first T - 1 steps to train (paper, release); of a window all
    shared_noise: bool = True  # one initial noise for a prompt's whole group (paper)
    updates_per_rollout: Count = 2  # optimizer steps, each on its own part of the samples (release)
    clip_range: Open01 = 1e-4  # of the ratio (paper, release), small since log-probs are means
    advantage_clip: Positive = 5.0  # advantages are clamped to plus or minus this (release)
    learning_rate: Positive = 1e-5  # AdamW, constant (paper, release; its author advises 5e-6 to 2e-5)
    max_grad_norm: Positive = 1.0  # gradient clipping (paper, release)
    guidance: Positive = 6.0  # embedded guidance scale (release); 1 if unsupported
    true_guidance: AtLeast1 = 1.0  # classifier-free guidance, in rollout and update alike; 1: off, half the cost
    height: Count = 480  # pixels (release); train at the size you use
    width: Count = 480  # pixels (release)
    frames: Count = 53  # F (release), one more than a multiple of the VAE's stride in time, 4; 1 draws images
    fps: Positive = 8.0  # frames per second that VideoAlign is told (release), and of the sample videos
    max_sequence_length: Count = 256  # text tokens of Llama or UMT5 (HunyuanVideoPipeline's default; Wan's: 512)
    # variants
    sde: Literal["dance", "flow", "cps"] = "dance"  # dance (paper), flow (Flow-GRPO) or cps (coefficients-preserving)
    ratio: Literal["plain", "guard", "dppo"] = "plain"  # guard: GRPO-Guard; dppo: Flow-DPPO, --clip-range 1e-5
    sde_window: Natural = 0  # k > 0: only a window of k steps is stochastic, and all of it is trained (MixGRPO: 4)
    sde_window_every: Count = 25  # iterations after which the window slides on by one step (MixGRPO)
    timesteps: Literal["random", "first", "last"] = "random"  # steps to train; first: the noisiest; not with a window
    keep_best_worst: Natural = 4  # k > 0: train only on the k best and k worst of each group (release; best-of-N)
    kl_weight: NonNegative = 0.0  # beta of |prediction - that of --model|² (paper: none)
    lora_rank: Rank = 0  # 0: all weights are trained; else rank of LoRA, with alpha = 2 rank
    ema_decay: Decay = 0.0  # moving average of the weights, once an iteration, saved beside them; 0: off
    # memory and speed
    micro_batch: Count = 1  # samples per pass of the rollout, pairs (sample, step) per pass of the update (ours)
    reward_batch: Count = 32  # samples in a forward pass of a reward (ours)
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of networks; auto: bfloat16 on CUDA
    shard_size: Natural = 0  # processes that share a copy of the network; 0: one with LoRA, else a node's
    offload: bool = False  # frozen models wait in host memory until they are needed
    quantize: Literal["", "int8", "nf4"] = ""  # the frozen base of a LoRA in 8 or 4 bit (ours); needs --lora-rank
    compile: bool = False  # torch.compile the network's repeated blocks
    dry_run: bool = False  # only print what the run needs, and write dryrun.json; without weights, without a GPU
    processes: Count = 1  # of the run that --dry-run describes
    gpu_memory: Positive = 78.0  # GiB of each GPU, for --dry-run; a card of 80 GB has 78
    # bookkeeping
    output_dir: str = "runs/video"  # everything the run leaves
    reward_paths: str = ""  # NAME=FOLDER or NAME=OWNER/NAME, comma separated: reward weights in other places
    first_frame_model: str = ""  # i2v: text-to-image model that paints missing ones (release: FLUX.1-dev)
    first_frame_steps: Count = 30  # its sampling steps (release)
    init: str = ""  # start from these weights: RUN/checkpoint-000300, a diffusers folder or a LoRA file
    resume: bool = False  # continue from the newest checkpoint in --output-dir
    seed: Seed = 42  # of every random number (release)
    save_every: Count = 5  # iterations between checkpoints; one more at the end (ours: an hour, at 400 TFLOP/s a GPU)
    keep_states: Count = 2  # newest checkpoints that keep what --resume needs
    sample_every: Count = 10  # iterations between sample videos; also before the first, after 2, 5, and the last
    num_samples: Count = 4  # sample videos: the file's first prompts, always from the same noise; at most 8 saved
    track: Literal["", "tensorboard", "wandb"] = ""  # metrics and samples go there too, beside metrics.jsonl


I2V = dict(
    transformer="Skywork/SkyReels-V1-Hunyuan-I2V", reward="mq", prompts="consisid", first_frames="runs/first-frames",
    first_frame_model="black-forest-labs/FLUX.1-dev", height=400, width=640, eta=0.3, shift=7.0, updates_per_rollout=1,
    keep_best_worst=0, guidance=1.0, true_guidance=5.0, shard_size=16,  # 65 GiB a GPU with 8
)  # fmt: skip
# The release's finetune_wan_2_1_grpo.sh, but with averaged gradients and WanPipeline's max_sequence_length.
WAN = dict(
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", updates_per_rollout=1, keep_best_worst=0, guidance=1.0, true_guidance=5.0,
    max_sequence_length=512, shift=3.0, eta=0.3, steps=20, group_size=12,
)  # fmt: skip
TINY = dict(
    model="tiny/hunyuan", reward_paths="hps=tiny/hps,videoalign=tiny/videoalign", prompts="prompts/moving.jsonl",
    height=32, width=32, frames=9, fps=2.0, max_sequence_length=24, prompts_per_iteration=4, group_size=8, steps=6,
    eta=1.0, shift=3.0, updates_per_rollout=4, clip_range=2e-4, micro_batch=32, keep_best_worst=0, learning_rate=5e-5,
    gradient_checkpointing=False, num_samples=32, save_every=50,
)  # fmt: skip
GUIDED = TINY | dict(guidance=1.0, true_guidance=2.0)
PRESETS = {
    "release": {},
    "release-i2v": I2V | dict(iterations=121, group_size=8),
    "paper": dict(group_size=12, steps=25, eta=0.3, updates_per_rollout=4, keep_best_worst=0),  # Table 6
    "paper-i2v": I2V | dict(group_size=12, save_every=3),  # Table 6, but the release's steps; guided, so one update
    "fast": dict(steps=10, sde_window=2, sde_window_every=1000),  # ours: as much as 13 forward passes a video, not 28
    "t2i": dict(reward="hps", prompts="hpdv2", frames=1, save_every=50),  # ours: in the paper, not in the release
    "wan": WAN | dict(  # text to image, 8 GPUs (release; prompts, micro-batch: ours)
        reward="hps", prompts="hpdv2", frames=1, height=512, width=512, prompts_per_iteration=16, iterations=1000,
        micro_batch=4, save_every=50,
    ),
    "wan-48gb": WAN | dict(  # ours, one GPU: LoRA, text to video
        lora_rank=64, learning_rate=1e-4, offload=True, reward="vq,mq", frames=33, height=320, width=512, fps=16.0,
        steps=16, prompts_per_iteration=4, group_size=8, micro_batch=2, gpu_memory=46.0,
    ),
    "tiny-t2v": TINY | dict(reward="vq,mq", iterations=12, output_dir="runs/tiny-t2v"),
    "tiny-wan": GUIDED | dict(model="tiny/wan", reward="vq,mq", iterations=20, output_dir="runs/tiny-wan"),
    "tiny-i2v": GUIDED | dict(transformer="tiny/skyreels", reward="mq", iterations=20, output_dir="runs/tiny-i2v"),
    "tiny-t2i": TINY | dict(
        reward="hps", frames=1, prompts="prompts/tiny_single.txt", prompts_per_iteration=8, micro_batch=64,
        iterations=35, output_dir="runs/tiny-t2i",
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------- GRPO, as in the paper


def group_advantages(rewards: dict, weights: dict, group_size: int, clip: float) -> torch.Tensor:
    """Eq. 10 and Algorithm 1, line 8: A = (r - mean) / std within the group of one prompt; several rewards: summed.

    rewards {name: (B,)} with the G samples of a prompt side by side; weights {name: float}, on the normalised rewards.
    Returns (B,), within plus or minus `clip`. Raw rewards are never added: their scales differ.
    A group whose rewards are all equal gets 0 and gives no gradient.
    """
    advantages = 0.0
    for name, r in rewards.items():
        r = r.cpu().double().view(-1, group_size)  # (P, G); float64 (MPS lacks it): equal rewards get an exact mean
        A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)
        advantages = advantages + weights[name] * A
    return advantages.flatten().clamp(-clip, clip).float().to(rewards[name].device)


def grpo_loss(log_prob, old_log_prob, A, clip_range: float):
    """Eq. 9: minus the mean of min(rho A, clip(rho, 1 ± clip_range) A). All (M,). Returns the loss and rho (M,)."""
    rho = torch.exp(log_prob - old_log_prob)
    objective = torch.minimum(rho * A, rho.clamp(1 - clip_range, 1 + clip_range) * A)
    return -objective.mean(), rho.detach()


def best_and_worst(A, group_size: int, keep: int) -> torch.Tensor:
    """The samples of each group that are trained: all, or with keep > 0 the `keep` best and worst (paper: best-of-N).

    A (B,). Returns their indices (P, G), or (P, 2 keep).
    """
    samples = torch.arange(len(A), device=A.device).view(-1, group_size)
    if keep == 0:
        return samples
    order = A.view(-1, group_size).argsort(dim=1, stable=True)
    return samples.gather(1, torch.cat([order[:, :keep], order[:, -keep:]], 1))


def deal(samples, updates: int, rng) -> list[list[int]]:
    """Deal a group's samples to the updates, in random order. samples: indices; rng: numpy's."""
    order = [int(b) for b in rng.permutation(samples)]
    return [order[u::updates] for u in range(updates)]


def choose_steps(window, fraction: float, timesteps: str, rng) -> list[int]:
    """Algorithm 1, line 10: a share tau of the stochastic steps, in their order.

    window: the stochastic steps; fraction: tau; timesteps: "random", "first" (the noisiest) or "last"; rng: numpy's.
    """
    steps = {"random": rng.permutation(window), "first": window, "last": window[::-1]}[timesteps]
    return sorted(int(t) for t in steps[: int(len(window) * fraction)])


# ------------------------------------------------------------------------------------------ the models, as policies


@torch.no_grad()
def encode(pipe, prompts: list[str], pictures: dict[str, Path], shape: tuple, cfg: Config, device) -> list[Tensor]:
    """→ what the family makes of the texts, tokens (P, n, L, D) first; latents of first frames (P, C or 0, f, h, w)."""
    texts = prompts if cfg.true_guidance == 1 else [text for prompt in prompts for text in ("", prompt)]
    text = families.family_of(pipe.transformer).encode(pipe, texts, cfg.max_sequence_length, device)
    text = [rearrange(x, "(p n) ... -> p n ...", p=len(prompts)) for x in text]
    return [*text, families.first_frame_latents(pipe, prompts, pictures, shape, (cfg.height, cfg.width), device)]


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
            **families.family_of(transformer).arguments(transformer.config, sigma, text, cfg),
        )[0].float()
    v = rearrange(out, "(b n) c f h w -> n b c f h w", n=n)  # of ("", prompt), or of the prompt
    return v[0] + cfg.true_guidance * (v[1] - v[0]) if n == 2 else v[0]


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

    conditions (P, …) as from `encode`; keys (seed, iteration, prompt, sample) of each sample; shape (C, f, h, w).
    Returns trajectories (B, T+1, C, f, h, w), log_probs (B, T), and videos (B, F, 3, H, W), from the last z0_hat.
    """
    (step, log_prob_of), T = SDE[cfg.sde], cfg.steps
    trajectories = torch.empty(len(keys), T + 1, *shape, device=world.device)
    log_probs = torch.zeros(len(keys), T, device=world.device)
    videos = torch.empty(len(keys), cfg.frames, 3, cfg.height, cfg.width, device=world.device)
    for chunk in world.chunks(torch.arange(len(keys)), cfg.micro_batch, "rollout"):
        # Shared noise: all samples of a prompt start from one z, so that they differ in their actions only (paper).
        starts = [(*keys[i][:3], 0) if cfg.shared_noise else keys[i] for i in chunk]
        trajectories[chunk, 0] = z = data.keyed_noise(shape, starts, "initial noise", world.device)
        of_sample = [x[chunk // cfg.group_size] for x in conditions]
        for t in range(T):  # `sampling.rollout` is this loop for any model
            world.poll()  # SIGTERM ends the run here
            # The policy: given z, the next latent is Gaussian. Outside the window it is the next point of the ODE.
            seen, place = distinct([(i, t) for i in chunk.tolist()], cfg.group_size, cfg.shared_noise)
            v = velocity(transformer, z[seen], sigmas[t], [x[seen] for x in of_sample], cfg)[place]
            mean, std, z0_hat = step(v, z, sigmas[t], sigmas[t + 1], cfg.eta if t in window else 0.0)
            z = mean
            if t in window:
                noise = data.keyed_noise(shape, [(*keys[i], t) for i in chunk], "step noise", world.device)
                z = mean + std * noise  # the action: a draw from the policy
                log_probs[chunk, t] = log_prob_of(z, mean, std)  # how probable this draw was
            trajectories[chunk, t + 1] = z
        with world.on_device(vae):
            videos[chunk] = decode(vae, z0_hat)
    return trajectories, log_probs, videos


# ---------------------------------------------------------------------------------------------------------- Algorithm 1


def check(cfg: Config) -> list[str]:
    """Everything that can be wrong with the options is found here, before any model is loaded. Returns the prompts."""
    options.check_options(cfg)
    check_reward(cfg.reward, cfg.reward_paths, cfg.frames > 1)
    network = families.transformer_config(cfg)
    families.check_sizes(cfg, network, loading.load_config(cfg.model, "vae"))
    kind = getattr(diffusers, network["_class_name"])
    initial.check_init(cfg, kind, "transformer", LORA_TARGETS, families.transformer_source(cfg))
    prompts = data.load_prompts(cfg.prompts)
    check_reward(cfg.reward, cfg.reward_paths, cfg.frames > 1, prompts, data.load_metadata(cfg.prompts))
    return prompts


def dry_run(cfg: Config) -> dict:
    """Print what a run with these options takes, write OUTPUT_DIR/dryrun.json, and return its content."""
    return dryrun.run(
        cfg, **drymodels.video(cfg), decode=decode, lora_targets=LORA_TARGETS,
        predict=lambda network, z, condition: velocity(network, z, torch.ones(()), condition, cfg),
    )  # fmt: skip


def main(cfg: Config) -> None:
    prompts = check(cfg)
    pictures = data.first_frames(cfg, prompts) if families.takes_first_frame(families.transformer_config(cfg)) else {}
    paint = partial(data.paint_first_frames, cfg, pictures)
    run = runtime.start(cfg, prompts, load_models, "transformer", cfg.lora_rank > 0, LORA_TARGETS, before_loading=paint)
    world, reward, pipe, network, reference = run.world, run.reward, run.pipe, run.network, run.reference

    step, log_prob_of = SDE[cfg.sde]
    sigmas = flow_sigmas(cfg.steps, cfg.shift).to(world.device)  # (T+1,)
    shape = families.latent_shape(cfg, network.config, pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    P, G = cfg.prompts_per_iteration // world.size, cfg.group_size
    first = world.rank * P  # this process has the prompts first … first + P - 1 of each iteration

    embed = partial(encode, pipe, pictures=pictures, shape=shape, cfg=cfg, device=world.device)
    embed = data.PromptCache(embed, world, network, *map(pipe.components.get, families.family_of(network).frozen))

    def draw(captions: list[str], z: Tensor) -> Tensor:  # a sample video of each, by the ODE
        condition = embed(captions)
        z0 = sample_ode(lambda z, t: velocity(network, z, sigmas[t], condition, cfg), z, sigmas)
        with world.on_device(pipe.vae):
            return decode(pipe.vae, z0)

    for iteration in run.iterations(draw, shape, cfg.fps):
        # Algorithm 1, lines 2 and 3: a batch of prompts. The current weights are the old policy.
        batch = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, iteration, cfg.seed)[first : first + P]
        captions = [prompts[i] for i in batch]
        conditions = embed(captions)  # (P, …) each

        # Lines 4 and 5: G samples for each prompt, from the same initial noise.
        keys = [(cfg.seed, iteration, first + p, g) for p in range(P) for g in range(G)]  # each sample's RNG key
        window = sde_window(iteration, cfg.steps, cfg.sde_window, cfg.sde_window_every)
        drawn = sample_groups(cfg, world, network, pipe.vae, conditions, keys, window, sigmas, shape)
        trajectories, old_log_probs, videos = drawn  # (B, T+1, C, f, h, w), (B, T), (B, F, 3, H, W)
        run.lap("rollout")

        # Line 6: the rewards of each sample.
        with world.on_device(*reward.models):
            rewards = reward(videos.squeeze(1), [text for text in captions for _ in range(G)], cfg.fps)  # {name: (B,)}
        run.lap("reward")

        # Lines 7 to 9: the advantage of each sample over its prompt's group.
        A = group_advantages(rewards, reward.weights, G, cfg.advantage_clip)  # (B,)

        # Line 10: a random subset of the timesteps of each sample. A costly rollout serves several updates, to which
        # each group's samples are dealt.
        tau = 1.0 if cfg.sde_window else cfg.timestep_fraction
        updates = [[] for _ in range(cfg.updates_per_rollout)]
        for p, group in enumerate(best_and_worst(A, G, cfg.keep_best_worst).tolist()):
            dealt = deal(group, len(updates), data.keyed_rng("updates", cfg.seed, iteration, first + p))
            for pairs, samples in zip(updates, dealt, strict=True):
                for i in samples:
                    steps = choose_steps(window, tau, cfg.timesteps, data.keyed_rng("timesteps", *keys[i]))
                    pairs += [(i, t) for t in steps]

        # Lines 11 and 12: gradient ascent on the clipped objective.
        losses, grad_norms, ratios, kls = [], [], [[] for _ in updates], [[] for _ in updates]
        for u, pairs in enumerate(updates):
            pairs.sort(key=lambda pair: pair[1])  # by step: see `distinct`
            for part in world.chunks(pairs, cfg.micro_batch, f"update {u + 1}"):
                processes.sync_gradients(network, now=part[-1] == pairs[-1])  # all-reduced in the last pass only
                b, t = torch.tensor(part, device=world.device).T  # sample and step of each pair (M,)
                z, z_next = trajectories[b, t], trajectories[b, t + 1]
                seen, place = distinct(part, G, cfg.shared_noise)
                state = z[seen], sigmas[t[seen]], [x[b[seen] // G] for x in conditions]
                # The current policy at z, and the log-probability that it gives the rollout's draw.
                v = velocity(network, *state, cfg)[place]
                mean, std, _ = step(v, z, sigmas[t], sigmas[t + 1], cfg.eta)
                log_prob, old_log_prob = log_prob_of(z_next, mean, std), old_log_probs[b, t]
                loss, rho = grpo_loss(log_prob, old_log_prob, A[b], cfg.clip_range)
                # The old policy's mean is z_next - std noise; the noise is drawn again from its key.
                noise = data.keyed_noise(shape, [(*keys[i], j) for i, j in part], "step noise", world.device)
                kl = gaussian_kl(mean, z_next - std * noise, std)
                if cfg.ratio != "plain":
                    log_ratio, dsigma = log_prob - old_log_prob, sigmas[t] - sigmas[t + 1]
                    loss, rho = guarded_loss(cfg.ratio, log_ratio, kl, A[b], std, dsigma, cfg.clip_range)
                if cfg.kl_weight:
                    with torch.no_grad(), lora.without_adapter(reference):
                        v_ref = velocity(reference, *state, cfg)[place]
                    loss = loss + cfg.kl_weight * ((v - v_ref) ** 2).mean()
                share = len(part) / len(pairs)
                (loss * share).backward()
                losses.append(loss.detach() * share / len(updates))
                ratios[u].append(rho)
                kls[u].append(kl.detach())
            processes.average_gradients(network)
            norm = torch.nn.utils.clip_grad_norm_(processes.trainable(network), cfg.max_grad_norm)
            grad_norms.append(processes.finite_norm(norm, iteration))
            run.optimizer.step()
            run.optimizer.zero_grad()

        row = {"loss": world.mean(sum(losses)), "grad_norm": sum(grad_norms) / len(updates)}
        row |= statistics(rewards, reward.weights, A, G, ratios, kls, cfg.clip_range, world.gather)
        del drawn, trajectories, videos  # sample pictures and the next rollout need their memory
        run.finish(iteration, row, P * G)


if __name__ == "__main__":
    with options.one_line_errors(RewardError):
        config = options.parse_config(Config, PRESETS)
        dry_run(config) if config.dry_run else main(config)
