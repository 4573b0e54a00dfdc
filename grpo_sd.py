"""DanceGRPO (arXiv 2505.07818) on diffusion: Stable Diffusion v1.4, text to image. The file to read first.

Algorithm 1 of the paper, which `main` follows block by block:
    for every iteration:
        sample a batch of prompts, and let the current weights be the old policy
        for every prompt draw G images by the DDIM SDE, from one shared initial noise, and score them
        advantage of an image = its score, normalised within its prompt's group (several rewards: summed after that)
        choose a random part of the timesteps, and replay them: ratio rho = new probability / old probability
        climb the clipped objective  min(rho A, clip(rho, 1 - eps, 1 + eps) A)

    torchrun --nproc_per_node=8 grpo_sd.py --reward hps   the paper's run, 8 GPUs of 80 GB
    torchrun --nproc_per_node=8 grpo_sd.py --preset hps-clip        both rewards, weighted as its author advises

The network is queried with classifier-free guidance in the rollout and in the update alike, since what is trained is
the policy that samples. Departures from the official code: noise is shared within a prompt's group, not by all prompts;
the image is decoded from the last prediction of x0, so the last step's noise never reaches a reward; rewards see the
decoded image, not a JPEG.

Legend: P prompts of this process, G samples of each, B = P G of them, T sampling steps, (C, h, w) a latent,
L text tokens, D width of the text embedding, M pairs (sample, step) in a micro-batch.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from einops import rearrange
from torch import Tensor

from rewards import RewardError, check_reward, load_reward, parse_paths
from runtime import cli, data, distributed, output
from sampling import ddim_sde_step, rollout, sample_ode

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention's linear layers


@dataclass(frozen=True)
class Config:
    preset: str = "paper"  # a named set of option values: paper (8 GPUs), hps-clip, tiny
    model: str = "CompVis/stable-diffusion-v1-4"  # hub id or folder in diffusers' StableDiffusionPipeline layout
    reward: str = "hps"  # NAME[@THRESHOLD][:WEIGHT], comma separated; names: hps, clip, pickscore
    reward_paths: str = ""  # NAME=FOLDER, comma separated, for reward weights that are not on the hub
    prompts: str = "hpdv2"  # text file (one a line), JSONL file, or hpdv2 (the paper's set, fetched once)
    output_dir: str = "runs/sd"  # everything the run leaves
    resume: bool = False  # go on from the newest checkpoint in --output-dir, bit for bit
    seed: int = 42  # of every random number (official)
    iterations: int = 300  # rollouts (official)
    prompts_per_iteration: int = 32  # over all processes (official: 4 for each of 8 GPUs)
    group_size: int = 16  # G, images of one prompt that are compared (official)
    steps: int = 50  # T, sampling steps in the rollout (official)
    eta: float = 1.0  # noise of the DDIM SDE, in (0, 1]; 1 is the variance of DDPM (official)
    shift: float = 1.0  # of rectified flow's noise levels; diffusion has the scheduler's own, so only 1 is accepted
    sde: str = "dance"  # stochastic step: the paper's DDIM SDE; flow and cps are for rectified flow only
    sde_window: int = 0  # k > 0: only a window of k steps is stochastic, and all of it is trained (MixGRPO: 4)
    sde_window_every: int = 25  # iterations after which the window slides on by one step (MixGRPO)
    timestep_fraction: float = 1.0  # tau, share of the first T - 1 steps that is trained, without a window (official)
    shared_noise: bool = True  # one initial noise for a prompt's whole group (paper)
    updates_per_rollout: int = 2  # optimizer steps, each on its own part of the samples (official)
    micro_batch: int = 8  # samples in one forward pass, in the rollout and in the update alike
    clip_range: float = 1e-4  # epsilon of the ratio (official); so small because log-probs are means
    advantage_clip: float = 5.0  # advantages are clamped to plus or minus this (official)
    kl_weight: float = 0.0  # beta of |eps - eps_ref|², to stay near the model started from (paper: none)
    keep_best_worst: int = 0  # k > 0: train only on the k best and k worst of each group (paper: best-of-N)
    learning_rate: float = 1e-5  # AdamW, constant (official; its author advises 5e-6 to 2e-5)
    max_grad_norm: float = 1.0  # gradient clipping (official)
    lora_rank: int = 0  # 0: all weights are trained; else rank of LoRA, with alpha = 2 rank
    ema_decay: float = 0.0  # moving average of the weights, saved beside them; 0: off
    guidance: float = 5.0  # classifier-free guidance, in rollout and update alike (official); 1: off, half the cost
    height: int = 512  # pixels (official)
    width: int = 512  # pixels (official)
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    compile: bool = False  # torch.compile the UNet's repeated blocks
    save_every: int = 50  # iterations between checkpoints; one more at the end
    sample_every: int = 10  # iterations between sample pictures; also before the first and at the end
    num_samples: int = 8  # prompts of the sample pictures, always the first of the file, always the same noise


PRESETS = {
    "paper": {},
    "hps-clip": {"reward": "hps:0.7,clip:1.4"},
    "tiny": {
        "model": "tiny/sd",
        "reward_paths": "hps=tiny/hps,clip=tiny/clip",
        "prompts": "prompts/tiny.txt",
        "output_dir": "runs/tiny-sd",
        "height": 64,
        "width": 64,
        "iterations": 40,
        "prompts_per_iteration": 6,
        "group_size": 8,
        "steps": 6,
        "sde_window": 2,  # in so short a run the first two steps, which decide most of the picture, learn fastest
        "sde_window_every": 1000,  # it stays there
        "updates_per_rollout": 1,
        "micro_batch": 48,
        "learning_rate": 5e-5,
        "guidance": 2.0,
        "gradient_checkpointing": False,
    },
}


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


# ----------------------------------------------------------------------------------- Stable Diffusion, as a policy


@torch.no_grad()
def encode_prompts(pipe: StableDiffusionPipeline, prompts: list[str], cfg: Config, device) -> Tensor:
    """→ CLIP embedding of each token, (P, 1, L, D), or with guidance of the empty prompt and of it, (P, 2, L, D)."""
    guided = cfg.guidance != 1
    text, empty = pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=guided)
    return torch.stack([empty, text], 1) if guided else text[:, None]


def predict(unet: UNet2DConditionModel, z: Tensor, timestep: Tensor, text: Tensor, guidance: float) -> Tensor:
    """The guided prediction eps(z, t | prompt). z (B, C, h, w), timestep (B,), text (B, 1 or 2, L, D) → (B, C, h, w).

    Classifier-free guidance (2207.12598): eps = eps_empty + guidance (eps_prompt - eps_empty), in one forward pass.
    """
    n = text.shape[1]
    out = unet(
        z.to(text.dtype).repeat_interleave(n, 0), timestep.repeat_interleave(n), text.flatten(0, 1), return_dict=False
    )[0].float()
    if n == 1:
        return out
    eps_empty, eps_prompt = rearrange(out, "(b two) c h w -> two b c h w", two=2)
    return eps_empty + guidance * (eps_prompt - eps_empty)


@torch.no_grad()
def decode(vae: AutoencoderKL, z0: Tensor) -> Tensor:
    """Latents (B, C, h, w) → images (B, 3, H, W) float32 in [0, 1]."""
    images = vae.decode((z0 / vae.config.scaling_factor).to(vae.dtype)).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


def ddim_levels(scheduler: DDIMScheduler, num_steps: int, device) -> tuple[Tensor, Tensor]:
    """The scheduler's own timesteps (T,), and alpha_bar at each of them and after the last, (T+1,)."""
    scheduler.set_timesteps(num_steps)
    alpha_bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])
    return scheduler.timesteps.to(device), alpha_bars.to(device)


# ---------------------------------------------------------------------------------------------------------- Algorithm 1


def check(cfg: Config) -> None:
    """Everything that can be wrong with the options is found here, before any model is loaded."""
    cli.check_options(cfg)
    cli.require(cfg.sde == "dance", f"--sde {cfg.sde} is for rectified flow; diffusion has the paper's only: dance")
    cli.require(cfg.shift == 1, f"--shift is for rectified flow; diffusion has its own levels, got {cfg.shift}")
    cli.require(cfg.eta <= 1, f"--eta must be at most 1 for the DDIM SDE, got {cfg.eta}")
    cli.require(cfg.guidance >= 1, f"--guidance must be at least 1 (off), got {cfg.guidance}")
    check_reward(cfg.reward, cfg.reward_paths)
    vae = distributed.load_pretrained(AutoencoderKL.load_config, cfg.model, subfolder="vae")
    cli.check_size(cfg, 2 ** (len(vae["block_out_channels"]) - 1))


def main(cfg: Config) -> None:
    check(cfg)
    prompts = data.load_prompts(cfg.prompts)
    world = distributed.start_world()
    output.open_output(cfg, world)

    reward = load_reward(cfg.reward, parse_paths(cfg.reward_paths), world.device)
    master = world.dtype if cfg.lora_rank else torch.float32
    pipe = distributed.load_pretrained(
        StableDiffusionPipeline.from_pretrained,
        cfg.model,
        dtype={"unet": master, "default": world.dtype},
        safety_checker=None,  # it blackens pictures, which no reward should see
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for frozen in (pipe.vae, pipe.text_encoder):
        frozen.to(world.device).requires_grad_(False)
    unet = distributed.prepare_network(
        pipe.unet, world, cfg.lora_rank, LORA_TARGETS, cfg.gradient_checkpointing, cfg.compile
    )
    reference = unet  # the policy started from: with LoRA the UNet without it, else a frozen copy
    if cfg.kl_weight and not cfg.lora_rank:
        reference = UNet2DConditionModel.from_pretrained(cfg.model, subfolder="unet", dtype=world.dtype)
        reference = distributed.prepare_network(reference, world, 0, (), False, False).requires_grad_(False)
    optimizer = torch.optim.AdamW(distributed.trainable(unet), lr=cfg.learning_rate, weight_decay=1e-4)  # official
    ema = distributed.EMA(unet, cfg.ema_decay)
    checkpoints = output.Checkpoints(pipe, "unet", optimizer, ema, world)
    done = checkpoints.restore(cfg.output_dir) if cfg.resume else 0
    metrics = output.Metrics(cfg.output_dir, world, done)

    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    timesteps, alpha_bars = ddim_levels(scheduler, cfg.steps, world.device)  # (T,), (T+1,)
    step = partial(ddim_sde_step, prediction=scheduler.config.prediction_type)
    latent_shape = (unet.config.in_channels, cfg.height // pipe.vae_scale_factor, cfg.width // pipe.vae_scale_factor)
    P, G = cfg.prompts_per_iteration // world.size, cfg.group_size
    first = world.rank * P  # this process's prompts are first … first + P - 1 of the iteration's

    def policy(network, z, timestep, text):
        with world.autocast():
            return predict(network, z, timestep, text, cfg.guidance)

    def draw_samples(iteration: int) -> None:
        captions = prompts[: cfg.num_samples]
        text = encode_prompts(pipe, captions, cfg, world.device)
        keys = [(cfg.seed, i) for i in range(len(captions))]
        z = data.keyed_noise(latent_shape, keys, "sample pictures", world.device)
        with torch.no_grad():
            z0 = sample_ode(lambda z, i: policy(unet, z, timesteps[i].expand(len(z)), text), z, alpha_bars, step)
        if world.is_main:
            path = Path(cfg.output_dir, "samples", f"{iteration:06d}.png")
            output.save_pictures(path, decode(pipe.vae, z0), captions)

    if not done:
        draw_samples(0)
    bar = world.progress(range(done, cfg.iterations), initial=done, total=cfg.iterations, desc="GRPO")
    for iteration in bar:
        clock = output.Stopwatch(world)

        # Algorithm 1: sample a batch of prompts.
        batch = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, iteration, cfg.seed)[first : first + P]
        captions = [prompts[i] for i in batch]
        embeddings = encode_prompts(pipe, captions, cfg, world.device)  # (P, 1 or 2, L, D)

        # Algorithm 1: the old policy is the current one. Generate G samples of each prompt from the same noise.
        window = sde_window(cfg, iteration)
        who = torch.cartesian_prod(torch.arange(P), torch.arange(G)).tolist()  # (prompt, sample) of each of the B
        trajectories, log_probs, images = [], [], []
        for part in world.chunks(who, cfg.micro_batch, "rollout"):
            p = [prompt for prompt, _ in part]
            keys = [(cfg.seed, iteration, first + prompt, sample) for prompt, sample in part]
            shared = [(*key[:3], 0) if cfg.shared_noise else key for key in keys]
            text = embeddings[p]
            with torch.no_grad():
                trajectory, log_prob, z0 = rollout(
                    lambda z, i: policy(unet, z, timesteps[i].expand(len(z)), text),
                    data.keyed_noise(latent_shape, shared, "initial noise", world.device),
                    alpha_bars,
                    cfg.eta,
                    step,
                    lambda i: data.keyed_noise(latent_shape, [(*key, i) for key in keys], "step noise", world.device),
                    window,
                )
            trajectories.append(trajectory)
            log_probs.append(log_prob)
            images.append(decode(pipe.vae, z0))
        trajectories, old_log_probs = torch.cat(trajectories), torch.cat(log_probs)  # (B, T+1, C, h, w), (B, T)
        clock.lap("rollout")

        # Algorithm 1: compute the rewards.
        rewards = reward(torch.cat(images), [captions[prompt] for prompt, _ in who])  # {name: (B,)}
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
                distributed.reduce_gradients(unet, now=part[-1] == pairs[-1])
                s, t = torch.tensor(part, device=world.device).T  # sample and step of each pair (M,)
                z, z_next, text = trajectories[s, t], trajectories[s, t + 1], embeddings[s // G]
                eps = policy(unet, z, timesteps[t], text)
                _, log_prob, _ = step(eps, z, alpha_bars[t], alpha_bars[t + 1], cfg.eta, z_next=z_next)
                loss, rho = grpo_loss(log_prob, old_log_probs[s, t], advantages[s], cfg.clip_range)
                if cfg.kl_weight:
                    with torch.no_grad(), distributed.without_adapter(reference):
                        eps_ref = policy(reference, z, timesteps[t], text)
                    loss = loss + cfg.kl_weight * ((eps - eps_ref) ** 2).mean()
                (loss * len(part) / len(pairs)).backward()
                ratios[-1].append(rho)
                losses.append(loss.detach() * len(part) / len(pairs))
            grad_norms.append(distributed.clip_gradients(unet, cfg.max_grad_norm, iteration))
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
