"""DanceGRPO (arXiv 2505.07818) on video: HunyuanVideo, text to video or to image, and SkyReels-I2V, image to video.

Algorithm 1 of the paper, which `main` follows block by block:
    for every iteration:
        sample a batch of prompts, and let the current weights be the old policy
        for every prompt draw G videos by the reverse SDE, from one shared initial noise, and score them
        advantage of a video = its score, normalised within its prompt's group (several rewards: summed after that)
        choose a random part of the timesteps, and replay them: ratio rho = new probability / old probability
        climb the clipped objective  min(rho A, clip(rho, 1 - eps, 1 + eps) A)

    python grpo_video.py --preset tiny-t2v                              on a laptop, no download; or tiny-t2i, tiny-i2v
    torchrun --nproc_per_node=8 --nnodes=4 … grpo_video.py --task t2v   the paper's run, 32 GPUs of 80 GB; or t2i, i2v

Departures from the official code: noise is shared within a prompt's group, and processes draw their own; best-of-N
keeps the best and worst of each prompt's own group; rewards see the decoded frames, not an MP4.

Legend: P prompts of this process, G samples of each, B = P G of them, T sampling steps, (C, f, h, w) a latent,
F frames, L text tokens, D width of the text embedding, M pairs (sample, step) in a micro-batch, n texts of a sample:
with classifier-free guidance 2, the empty one and the prompt, else 1.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from einops import rearrange
from torch import Tensor

from rewards import RewardError, check_reward, load_reward, parse_paths
from runtime import cli, data, distributed, output
from sampling import cps_step, flow_grpo_sde_step, flow_sde_step, flow_sigmas, rollout, sample_ode

SDE_STEPS = {"dance": flow_sde_step, "flow": flow_grpo_sde_step, "cps": cps_step}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention's linear layers
PIPELINES = {"t2v": HunyuanVideoPipeline, "t2i": HunyuanVideoPipeline, "i2v": HunyuanSkyreelsImageToVideoPipeline}


@dataclass(frozen=True)
class Config:
    preset: str = "t2v"  # a named set of option values: t2v, t2i, i2v (32 GPUs; --task names one too), tiny-t2v, …
    task: str = "t2v"  # t2v: text to video, t2i: text to image, which is one frame, i2v: image to video
    model: str = "hunyuanvideo-community/HunyuanVideo"  # hub id or folder in diffusers' HunyuanVideoPipeline layout
    transformer: str = ""  # hub id or folder of the transformer alone, if it is not the one in --model
    reward: str = "vq,mq:0"  # NAME[@THRESHOLD][:WEIGHT], comma separated (official); also: ta, hps, clip, pickscore
    reward_paths: str = ""  # NAME=FOLDER, comma separated, for reward weights that are not on the hub
    prompts: str = "vidprom"  # text file (one a line), JSONL file, or vidprom, consisid, hpdv2 (fetched once)
    first_frames: str = ""  # i2v: JSONL file of {"prompt", "image"} (if not --prompts), or folder of first_frames.jsonl
    first_frame_model: str = ""  # i2v: text-to-image model (paper: FLUX.1-dev) that paints missing ones into the folder
    first_frame_steps: int = 30  # its sampling steps (official)
    output_dir: str = "runs/video"  # everything the run leaves
    resume: bool = False  # go on from the newest checkpoint in --output-dir, bit for bit
    seed: int = 42  # of every random number (official)
    iterations: int = 202  # rollouts (official)
    prompts_per_iteration: int = 32  # over all processes (official: 1 for each of 32 GPUs)
    group_size: int = 24  # G, videos of one prompt that are compared (official)
    steps: int = 16  # T, sampling steps in the rollout (official)
    eta: float = 0.25  # noise of the SDE, eq. 6 (official); flow: a = 0.7, cps: 0.8 are usual
    shift: float = 5.0  # of the sigmas towards noise (official)
    sde: str = "dance"  # stochastic step: dance (paper), flow (Flow-GRPO) or cps (coefficients-preserving)
    sde_window: int = 0  # k > 0: only a window of k steps is stochastic, and all of it is trained (MixGRPO: 4)
    sde_window_every: int = 25  # iterations after which the window slides on by one step (MixGRPO)
    timestep_fraction: float = 0.6  # tau, share of the first T - 1 steps that is trained, without a window (paper)
    shared_noise: bool = True  # one initial noise for a prompt's whole group (paper)
    updates_per_rollout: int = 2  # optimizer steps, each on its own part of the samples (official)
    micro_batch: int = 1  # samples in one forward pass, in the rollout and in the update alike
    clip_range: float = 1e-4  # epsilon of the ratio (official); so small because log-probs are means
    advantage_clip: float = 5.0  # advantages are clamped to plus or minus this (official)
    kl_weight: float = 0.0  # beta of |v - v_ref|², to stay near the model started from (paper: none)
    keep_best_worst: int = 8  # k > 0: train only on the k best and k worst of each group (official; best-of-N)
    learning_rate: float = 1e-5  # AdamW, constant (official; its author advises 5e-6 to 2e-5)
    max_grad_norm: float = 1.0  # gradient clipping (official)
    lora_rank: int = 0  # 0: all weights are trained; else rank of LoRA, with alpha = 2 rank
    ema_decay: float = 0.0  # moving average of the weights, saved beside them; 0: off
    guidance: float = 6.0  # embedded guidance scale (official)
    true_guidance: float = 1.0  # classifier-free guidance, in rollout and update alike; 1: off, half the cost
    height: int = 480  # pixels (official); train at the size you use
    width: int = 480  # pixels (official)
    frames: int = 53  # F (official), one more than a multiple of the VAE's stride in time, 4
    fps: float = 8.0  # frames per second that VideoAlign is told (official), and of the sample videos
    max_sequence_length: int = 256  # text tokens of the Llama encoder (HunyuanVideoPipeline's default)
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    compile: bool = False  # torch.compile the transformer's repeated blocks
    save_every: int = 50  # iterations between checkpoints; one more at the end
    sample_every: int = 10  # iterations between sample videos; also before the first and at the end
    num_samples: int = 4  # prompts of the sample videos, always the first of the file, always the same noise


T2I = {"task": "t2i", "reward": "hps", "prompts": "hpdv2", "frames": 1}
I2V = {"task": "i2v", "transformer": "Skywork/SkyReels-V1-Hunyuan-I2V", "reward": "mq", "prompts": "consisid"}
I2V |= {"first_frames": "runs/first-frames", "first_frame_model": "black-forest-labs/FLUX.1-dev"}
I2V |= {"iterations": 121, "group_size": 8, "eta": 0.3, "shift": 7.0, "updates_per_rollout": 1, "keep_best_worst": 0}
I2V |= {"guidance": 1.0, "true_guidance": 5.0, "height": 400, "width": 640}
TINY = {"model": "tiny/hunyuan", "reward_paths": "hps=tiny/hps,videoalign=tiny/videoalign", "max_sequence_length": 24}
TINY |= {"prompts": "prompts/moving.jsonl", "first_frames": "", "first_frame_model": "", "fps": 2.0}
TINY |= {"height": 32, "width": 32, "frames": 9, "steps": 6, "eta": 2.0, "shift": 3.0, "gradient_checkpointing": False}
TINY |= {"prompts_per_iteration": 4, "group_size": 8, "keep_best_worst": 0, "updates_per_rollout": 1, "micro_batch": 32}
# In so short a run the first two steps, which decide most of the clip, learn fastest: the window stays there.
TINY |= {"sde_window": 2, "sde_window_every": 1000, "learning_rate": 5e-5, "iterations": 40}
TINY_I2V = {"transformer": "tiny/skyreels", "true_guidance": 2.0, "iterations": 24, "output_dir": "runs/tiny-i2v"}
TINY_T2I = {"frames": 1, "prompts": "prompts/tiny_single.txt", "output_dir": "runs/tiny-t2i"}
TINY_T2I |= {"iterations": 80, "prompts_per_iteration": 8, "micro_batch": 64}
TINY_T2V = {"reward": "vq,mq", "output_dir": "runs/tiny-t2v"}
PRESETS = {"t2v": {}, "t2i": T2I, "i2v": I2V}
PRESETS |= {"tiny-t2v": TINY | TINY_T2V, "tiny-t2i": T2I | TINY | TINY_T2I, "tiny-i2v": I2V | TINY | TINY_I2V}


# ----------------------------------------------------------------------------------------------- GRPO, as in the paper


def group_advantages(rewards: dict[str, Tensor], weights: dict[str, float], group_size: int, clip: float) -> Tensor:
    """Eq. 4 and Algorithm 1: A = (r - mean) / std within the group of one prompt; several rewards: weighted sum of A.

    rewards {name: (B,)} with the G samples of a prompt side by side. Returns (B,), within plus or minus `clip`.
    Raw rewards are never added: their scales differ. A group whose rewards are all alike gets 0, and teaches nothing.
    """
    advantages = 0.0
    for name, r in rewards.items():
        r = rearrange(r.float(), "(p g) -> p g", g=group_size)
        A = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)
        advantages = advantages + weights[name] * A
    return advantages.flatten().clamp(-clip, clip)


def grpo_loss(log_prob: Tensor, old_log_prob: Tensor, A: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """Eq. 3: minus the mean of min(rho A, clip(rho, 1 - eps, 1 + eps) A). All (M,). Returns the loss and rho (M,)."""
    rho = torch.exp(log_prob - old_log_prob)
    objective = torch.minimum(rho * A, rho.clamp(1 - clip_range, 1 + clip_range) * A)
    return -objective.mean(), rho.detach()


def sde_window(cfg, iteration: int) -> range | None:
    """The steps that are stochastic in this iteration (MixGRPO 2507.21802), or None for all of them.

    The window starts at the noisy end and slides towards the data; it never covers the last step.
    """
    if not cfg.sde_window:
        return None
    start = iteration // cfg.sde_window_every % (cfg.steps - cfg.sde_window)
    return range(start, start + cfg.sde_window)


def trained_steps(cfg, iteration: int, prompt: int, sample: int) -> list[int]:
    """Algorithm 1, the subsampled timesteps of one sample: a random share tau of them, or all of the SDE window.

    Never the last step: its noise does not reach the image, which is decoded from the last prediction of x0.
    """
    if cfg.sde_window:
        return list(sde_window(cfg, iteration))
    count = int((cfg.steps - 1) * cfg.timestep_fraction)
    rng = data.keyed_rng("timesteps", cfg.seed, iteration, prompt, sample)
    return rng.permutation(cfg.steps - 1)[:count].tolist()


def update_parts(cfg, advantages: Tensor, iteration: int, prompt: int) -> list[list[int]]:
    """Samples 0 … G-1 of one prompt's group, shuffled and dealt to the rollout's updates; advantages (G,).

    One rollout gives several updates, since sampling is the expensive half. With --keep-best-worst k only the k
    best and k worst of this prompt's group are dealt.
    """
    samples = list(range(len(advantages)))
    if cfg.keep_best_worst:
        order = advantages.argsort(stable=True).tolist()
        samples = order[: cfg.keep_best_worst] + order[-cfg.keep_best_worst :]
    samples = data.keyed_rng("updates", cfg.seed, iteration, prompt).permutation(samples).tolist()
    return [samples[u :: cfg.updates_per_rollout] for u in range(cfg.updates_per_rollout)]


# ------------------------------------------------------------------------------------------- HunyuanVideo, as a policy


def load_transformer(loader, cfg: Config, **options):
    """Call a loader of HunyuanVideoTransformer3DModel on --transformer, or else on the one in --model."""
    if cfg.transformer:
        return distributed.load_pretrained(loader, cfg.transformer, "--transformer", **options)
    return distributed.load_pretrained(loader, cfg.model, subfolder="transformer", **options)


@torch.no_grad()
def encode(pipe, prompts: list[str], pictures: dict[str, Path], latent_shape, cfg: Config, device) -> list[Tensor]:
    """→ Llama embedding of each token (P, n, L, D), which tokens count (P, n, L), CLIP embedding (P, n, D'),
    and latents of the first frame, followed by zeros, (P, C, f, h, w); of no channels if there are no pictures.
    """
    texts = prompts if cfg.true_guidance == 1 else [text for prompt in prompts for text in ("", prompt)]
    tokens, pooled, mask = pipe.encode_prompt(texts, device=device, max_sequence_length=cfg.max_sequence_length)
    text = [rearrange(x, "(p n) ... -> p n ...", p=len(prompts)) for x in (tokens, mask.to(tokens), pooled)]
    frames = torch.zeros(len(prompts), latent_shape[0] if pictures else 0, *latent_shape[1:], device=device)
    for frame, prompt in zip(frames, prompts if pictures else [], strict=False):
        pixels = pipe.video_processor.preprocess(output.read_picture(pictures[prompt]), cfg.height, cfg.width)
        # The mode, where the stock pipeline draws: this is a condition, and no part of the policy's randomness.
        latent = pipe.vae.encode(pixels[:, :, None].to(device, pipe.vae.dtype)).latent_dist.mode()[0]  # (C, 1, h, w)
        frame[:, :1] = latent * pipe.vae.config.scaling_factor
    return [*text, frames]


def velocity(transformer, z: Tensor, sigma: Tensor, condition: list[Tensor], cfg: Config) -> Tensor:
    """The guided v(z, sigma | condition of each sample). z (B, C, f, h, w), sigma (B,) → (B, C, f, h, w) float32.
    Classifier-free guidance (2207.12598): v = v_empty + guidance (v_prompt - v_empty), in one forward pass.
    """
    tokens, mask, pooled, first_frame = condition
    n = tokens.shape[1]
    sigma = sigma.to(z).repeat_interleave(n)
    out = transformer(
        hidden_states=torch.cat([z, first_frame], 1).to(tokens.dtype).repeat_interleave(n, 0),
        timestep=1000 * sigma,  # unlike FLUX, this transformer's time runs from 1000 to 0, and so does its guidance
        guidance=torch.full_like(sigma, 1000 * cfg.guidance) if transformer.config.guidance_embeds else None,
        encoder_hidden_states=tokens.flatten(0, 1),
        encoder_attention_mask=mask.flatten(0, 1),
        pooled_projections=pooled.flatten(0, 1),
        return_dict=False,
    )[0].float()
    if n == 1:
        return out
    v_empty, v_prompt = rearrange(out, "(b two) c f h w -> two b c f h w", two=2)
    return v_empty + cfg.true_guidance * (v_prompt - v_empty)


@torch.no_grad()
def decode(vae: AutoencoderKLHunyuanVideo, z0: Tensor) -> Tensor:
    """Latents (B, C, f, h, w) → videos (B, F, 3, H, W) in [0, 1]; one by one, since decoding takes the most memory."""
    videos = [vae.decode((z / vae.config.scaling_factor).to(vae.dtype)).sample.float() for z in z0.split(1)]
    return rearrange(torch.cat(videos) / 2 + 0.5, "b c f h w -> b f c h w").clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------- Algorithm 1


def check(cfg: Config) -> None:
    """Everything that can be wrong with the options is found here, before any model is loaded."""
    cli.check_options(cfg)
    cli.require(cfg.task in PIPELINES, f"--task must be one of {', '.join(PIPELINES)}, got {cfg.task!r}")
    cli.require(cfg.sde in SDE_STEPS, f"--sde must be one of {', '.join(SDE_STEPS)}, got {cfg.sde!r}")
    cli.require(cfg.sde != "cps" or cfg.eta <= 1, f"--eta must be at most 1 with --sde cps, got {cfg.eta}")
    cli.require(cfg.shift > 0, f"--shift must be above 0, got {cfg.shift}")
    cli.require(cfg.true_guidance >= 1, f"--true-guidance must be at least 1 (off), got {cfg.true_guidance}")
    cli.require(cfg.fps > 0, f"--fps must be above 0, got {cfg.fps}")
    check_reward(cfg.reward, cfg.reward_paths, video=cfg.task != "t2i")
    vae = distributed.load_pretrained(AutoencoderKLHunyuanVideo.load_config, cfg.model, subfolder="vae")
    network = load_transformer(HunyuanVideoTransformer3DModel.load_config, cfg)
    cli.check_size(cfg, vae["spatial_compression_ratio"] * network["patch_size"])
    stride = vae["temporal_compression_ratio"]
    cli.require(
        cfg.frames == 1 if cfg.task == "t2i" else cfg.frames > 1 and cfg.frames % stride == 1,
        f"--frames must be 1 for t2i, else a multiple of {stride} and one more, got {cfg.frames} for {cfg.task}",
    )
    cli.require(
        network["in_channels"] == (2 if cfg.task == "i2v" else 1) * network["out_channels"],  # z and the first frame
        f"--task {cfg.task} needs another --transformer: this one takes {network['in_channels']} channels",
    )


def main(cfg: Config) -> None:
    check(cfg)
    prompts = data.load_prompts(cfg.prompts)
    world = distributed.start_world()
    pictures = data.first_frames(cfg, prompts, world) if cfg.task == "i2v" else {}
    output.open_output(cfg, world)
    data.paint_first_frames(cfg, pictures, world)

    reward = load_reward(cfg.reward, parse_paths(cfg.reward_paths), world.device)
    master = world.dtype if cfg.lora_rank else torch.float32
    pipe = distributed.load_pretrained(
        PIPELINES[cfg.task].from_pretrained,
        cfg.model,
        transformer=load_transformer(HunyuanVideoTransformer3DModel.from_pretrained, cfg, dtype=master),
        dtype=world.dtype,
    )
    pipe.set_progress_bar_config(disable=True)
    for frozen in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        frozen.to(world.device).requires_grad_(False)
    transformer = distributed.prepare_network(
        pipe.transformer, world, cfg.lora_rank, LORA_TARGETS, cfg.gradient_checkpointing, cfg.compile
    )
    reference = transformer  # the policy started from: with LoRA the transformer without it, else a frozen copy
    if cfg.kl_weight and not cfg.lora_rank:
        reference = load_transformer(HunyuanVideoTransformer3DModel.from_pretrained, cfg, dtype=world.dtype)
        reference = distributed.prepare_network(reference, world, 0, (), False, False).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        distributed.trainable(transformer), lr=cfg.learning_rate, weight_decay=1e-4
    )  # official
    ema = distributed.EMA(transformer, cfg.ema_decay)
    checkpoints = output.Checkpoints(pipe, "transformer", optimizer, ema, world)
    done = checkpoints.restore(cfg.output_dir) if cfg.resume else 0
    metrics = output.Metrics(cfg.output_dir, world, done)

    step = SDE_STEPS[cfg.sde]
    sigmas = flow_sigmas(cfg.steps, cfg.shift).to(world.device)  # (T+1,)
    scale = pipe.vae_scale_factor_spatial
    latent_frames = (cfg.frames - 1) // pipe.vae_scale_factor_temporal + 1
    latent_shape = (transformer.config.out_channels, latent_frames, cfg.height // scale, cfg.width // scale)
    P, G = cfg.prompts_per_iteration // world.size, cfg.group_size
    first = world.rank * P  # this process's prompts are first … first + P - 1 of the iteration's

    def policy(network, z, sigma, condition):
        with world.autocast():
            return velocity(network, z, sigma, condition, cfg)

    def draw_samples(iteration: int) -> None:
        captions = prompts[: cfg.num_samples]
        condition = encode(pipe, captions, pictures, latent_shape, cfg, world.device)
        keys = [(cfg.seed, i) for i in range(len(captions))]
        z = data.keyed_noise(latent_shape, keys, "sample pictures", world.device)
        with torch.no_grad():
            z0 = sample_ode(lambda z, i: policy(transformer, z, sigmas[i].expand(len(z)), condition), z, sigmas)
        if world.is_main:
            path = Path(cfg.output_dir, "samples", f"{iteration:06d}")
            output.save_videos(path, decode(pipe.vae, z0), captions, cfg.fps)

    if not done:
        draw_samples(0)
    bar = world.progress(range(done, cfg.iterations), initial=done, total=cfg.iterations, desc="GRPO")
    for iteration in bar:
        clock = output.Stopwatch(world)

        # Algorithm 1: sample a batch of prompts.
        batch = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, iteration, cfg.seed)[first : first + P]
        captions = [prompts[i] for i in batch]
        conditions = encode(pipe, captions, pictures, latent_shape, cfg, world.device)  # (P, …) each

        # Algorithm 1: the old policy is the current one. Generate G samples of each prompt from the same noise.
        window = sde_window(cfg, iteration)
        who = torch.cartesian_prod(torch.arange(P), torch.arange(G)).tolist()  # (prompt, sample) of each of the B
        trajectories, log_probs, videos = [], [], []
        for part in world.chunks(who, cfg.micro_batch, "rollout"):
            p = [prompt for prompt, _ in part]
            keys = [(cfg.seed, iteration, first + prompt, sample) for prompt, sample in part]
            shared = [(*key[:3], 0) if cfg.shared_noise else key for key in keys]
            condition = [x[p] for x in conditions]
            with torch.no_grad():
                trajectory, log_prob, z0 = rollout(
                    lambda z, i: policy(transformer, z, sigmas[i].expand(len(z)), condition),
                    data.keyed_noise(latent_shape, shared, "initial noise", world.device),
                    sigmas,
                    cfg.eta,
                    step,
                    lambda i: data.keyed_noise(latent_shape, [(*key, i) for key in keys], "step noise", world.device),
                    window,
                )
            trajectories.append(trajectory)
            log_probs.append(log_prob)
            videos.append(decode(pipe.vae, z0))
        trajectories, old_log_probs = torch.cat(trajectories), torch.cat(log_probs)  # (B, T+1, C, f, h, w), (B, T)
        clock.lap("rollout")

        # Algorithm 1: compute the rewards.
        rewards = reward(torch.cat(videos), [captions[prompt] for prompt, _ in who], cfg.fps)  # {name: (B,)}
        clock.lap("reward")

        # Algorithm 1: advantages, each reward normalised within its prompt's group.
        advantages = group_advantages(rewards, reward.weights, G, cfg.advantage_clip)  # (B,)

        # Algorithm 1: subsample the timesteps. (And deal the samples to this rollout's updates.)
        steps = [trained_steps(cfg, iteration, first + prompt, sample) for prompt, sample in who]
        parts = [update_parts(cfg, A, iteration, first + p) for p, A in enumerate(advantages.view(P, G))]

        # Algorithm 1: update the policy by gradient ascent on the clipped objective.
        losses, ratios, grad_norms = [], [], []
        for update in range(cfg.updates_per_rollout):
            pairs = [(p * G + g, t) for p in range(P) for g in parts[p][update] for t in steps[p * G + g]]
            optimizer.zero_grad()
            ratios.append([])
            for part in world.chunks(pairs, cfg.micro_batch, f"update {update + 1}"):
                distributed.reduce_gradients(transformer, now=part[-1] == pairs[-1])
                s, t = torch.tensor(part, device=world.device).T  # sample and step of each pair (M,)
                z, sigma, condition = trajectories[s, t], sigmas[t], [x[s // G] for x in conditions]
                v = policy(transformer, z, sigma, condition)
                _, log_prob, _ = step(v, z, sigma, sigmas[t + 1], cfg.eta, z_next=trajectories[s, t + 1])
                loss, rho = grpo_loss(log_prob, old_log_probs[s, t], advantages[s], cfg.clip_range)
                if cfg.kl_weight:
                    with torch.no_grad(), distributed.without_adapter(reference):
                        v_ref = policy(reference, z, sigma, condition)
                    loss = loss + cfg.kl_weight * ((v - v_ref) ** 2).mean()
                (loss * len(part) / len(pairs)).backward()
                ratios[-1].append(rho)
                losses.append(loss.detach() * len(part) / len(pairs))
            grad_norms.append(distributed.clip_gradients(transformer, cfg.max_grad_norm, iteration))
            optimizer.step()
            ema.update()
        clock.lap("update")

        row = metrics.write(
            iteration + 1, rewards, reward.weights, advantages, G, losses, ratios, cfg.clip_range, grad_norms, clock
        )
        bar.set_postfix_str(f"reward {row['reward_mean']:.4f}")
        last = iteration + 1 == cfg.iterations
        if last or (iteration + 1) % cfg.sample_every == 0:
            draw_samples(iteration + 1)
        if last or (iteration + 1) % cfg.save_every == 0:
            checkpoints.save(cfg.output_dir, iteration + 1)
    metrics.draw()


if __name__ == "__main__":
    with cli.one_line_errors(RewardError):
        main(cli.parse_config(Config, PRESETS))
