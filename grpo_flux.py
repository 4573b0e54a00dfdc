"""DanceGRPO (arXiv 2505.07818) on rectified flow: FLUX.1-dev, text to image.

Algorithm 1 of the paper, which `main` follows block by block:
    for every iteration:
        sample a batch of prompts, and let the current weights be the old policy
        for every prompt draw G images by the reverse SDE, from one shared initial noise, and score them
        advantage of an image = its score, normalised within its prompt's group (several rewards: summed after that)
        choose a random part of the timesteps, and replay them: ratio rho = new probability / old probability
        climb the clipped objective  min(rho A, clip(rho, 1 - eps, 1 + eps) A)

    python grpo_flux.py --preset tiny                                   on a laptop, no download, about a minute
    torchrun --nproc_per_node=8 --nnodes=2 … grpo_flux.py --reward hps  the paper's run, 16 GPUs of 80 GB
    torchrun --nproc_per_node=8 grpo_flux.py --preset lora              the official LoRA recipe, 8 GPUs

Departures from the official code: noise is shared within a prompt's group, not by all prompts; the transformer gets
sigma as its time, as the diffusers pipeline does, not int(1000 sigma); rewards see the decoded image, not a JPEG.

Legend: P prompts of this process, G samples of each, B = P G of them, T sampling steps, N image tokens, C channels of
a token, L text tokens, D width of the text embedding, M pairs (sample, step) in a micro-batch.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from einops import rearrange
from torch import Tensor

from rewards import RewardError, check_reward, load_reward, parse_paths
from runtime import cli, data, distributed, output
from sampling import cps_step, flow_grpo_sde_step, flow_sde_step, flow_sigmas, rollout, sample_ode

SDE_STEPS = {"dance": flow_sde_step, "flow": flow_grpo_sde_step, "cps": cps_step}
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention's linear layers, as in the official recipe


@dataclass(frozen=True)
class Config:
    preset: str = "paper"  # a named set of option values: paper (16 GPUs), 8gpu, lora, tiny
    model: str = "black-forest-labs/FLUX.1-dev"  # hub id or folder in diffusers' FluxPipeline layout
    reward: str = "hps"  # NAME[@THRESHOLD][:WEIGHT], comma separated; names: hps, clip, pickscore
    reward_paths: str = ""  # NAME=FOLDER, comma separated, for reward weights that are not on the hub
    prompts: str = "hpdv2"  # text file (one a line), JSONL file, or hpdv2 (the paper's set, fetched once)
    output_dir: str = "runs/flux"  # everything the run leaves
    resume: bool = False  # go on from the newest checkpoint in --output-dir, bit for bit
    seed: int = 42  # of every random number (official)
    iterations: int = 300  # rollouts (official)
    prompts_per_iteration: int = 16  # over all processes (official: 1 for each of 16 GPUs)
    group_size: int = 12  # G, images of one prompt that are compared (official)
    steps: int = 16  # T, sampling steps in the rollout (official)
    eta: float = 0.3  # noise of the SDE, eq. 6 (official); flow: a = 0.7, cps: 0.8 are usual
    shift: float = 3.0  # of the sigmas towards noise (official)
    sde: str = "dance"  # stochastic step: dance (paper), flow (Flow-GRPO) or cps (coefficients-preserving)
    sde_window: int = 0  # k > 0: only a window of k steps is stochastic, and all of it is trained (MixGRPO: 4)
    sde_window_every: int = 25  # iterations after which the window slides on by one step (MixGRPO)
    timestep_fraction: float = 0.6  # tau, share of the first T - 1 steps that is trained, without a window (paper)
    shared_noise: bool = True  # one initial noise for a prompt's whole group (paper)
    updates_per_rollout: int = 3  # optimizer steps, each on its own part of the samples (official, 16 GPUs)
    micro_batch: int = 4  # samples in one forward pass, in the rollout and in the update alike
    clip_range: float = 1e-4  # epsilon of the ratio (official); so small because log-probs are means
    advantage_clip: float = 5.0  # advantages are clamped to plus or minus this (official)
    kl_weight: float = 0.0  # beta of |v - v_ref|², to stay near the model started from (paper: none)
    keep_best_worst: int = 0  # k > 0: train only on the k best and k worst of each group (paper: best-of-N)
    learning_rate: float = 1e-5  # AdamW, constant (official; its author advises 5e-6 to 2e-5)
    max_grad_norm: float = 1.0  # gradient clipping (official; 0.01 in the 8-GPU recipe)
    lora_rank: int = 0  # 0: all weights are trained; else rank of LoRA, with alpha = 2 rank
    ema_decay: float = 0.0  # moving average of the weights, saved beside them; 0: off
    guidance: float = 3.5  # embedded guidance scale (official)
    height: int = 720  # pixels (official); train at the size you use
    width: int = 720  # pixels (official)
    max_sequence_length: int = 512  # text tokens of the T5 encoder (FluxPipeline's default)
    gradient_checkpointing: bool = True  # recompute activations in the backward pass: slower, far less memory
    compile: bool = False  # torch.compile the transformer's repeated blocks
    save_every: int = 50  # iterations between checkpoints; one more at the end
    sample_every: int = 10  # iterations between sample pictures; also before the first and at the end
    num_samples: int = 8  # prompts of the sample pictures, always the first of the file, always the same noise


PRESETS = {
    "paper": {},
    "8gpu": {"updates_per_rollout": 2, "max_grad_norm": 0.01, "ema_decay": 0.995},
    "lora": {"updates_per_rollout": 2, "steps": 12, "lora_rank": 128, "learning_rate": 3e-4, "iterations": 301},
    "tiny": {
        "model": "tiny/flux",
        "reward_paths": "hps=tiny/hps,clip=tiny/clip",
        "prompts": "prompts/tiny.txt",
        "output_dir": "runs/tiny-flux",
        "height": 64,
        "width": 64,
        "max_sequence_length": 32,
        "iterations": 50,
        "prompts_per_iteration": 8,
        "group_size": 8,
        "steps": 6,
        "eta": 2.0,
        "sde_window": 2,  # in so short a run the first two steps, which decide most of the picture, learn fastest
        "sde_window_every": 1000,  # it stays there
        "updates_per_rollout": 1,
        "micro_batch": 64,
        "learning_rate": 5e-5,
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


# ---------------------------------------------------------------------------------------------------- FLUX, as a policy


@torch.no_grad()
def encode_prompts(pipe: FluxPipeline, prompts: list[str], cfg: Config, device) -> tuple[Tensor, Tensor]:
    """→ T5 embedding of each token (P, L, D), CLIP embedding of the whole (P, D')."""
    tokens, pooled, _ = pipe.encode_prompt(prompts, None, device, max_sequence_length=cfg.max_sequence_length)
    return tokens, pooled


def velocity(transformer, z: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], cfg: Config, scale: int) -> Tensor:
    """v(z, sigma | prompt). z (B, N, C), sigma (B,), text of each sample (B, L, D), (B, D') → (B, N, C) float32."""
    tokens, pooled = text
    grid = torch.zeros(cfg.height // scale, cfg.width // scale, 3, device=z.device)  # token positions: (0, row, column)
    grid[..., 1] += torch.arange(grid.shape[0], device=z.device)[:, None]
    grid[..., 2] += torch.arange(grid.shape[1], device=z.device)[None, :]
    return transformer(
        hidden_states=z.to(tokens.dtype),
        timestep=sigma.to(z),  # the transformer multiplies by 1000 itself
        guidance=torch.full_like(sigma, cfg.guidance) if transformer.config.guidance_embeds else None,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        txt_ids=torch.zeros(tokens.shape[1], 3, device=z.device),
        img_ids=grid.flatten(0, 1),
        return_dict=False,
    )[0].float()


@torch.no_grad()
def decode(vae: AutoencoderKL, z0: Tensor, cfg: Config, scale: int) -> Tensor:
    """Latent tokens (B, N, C) → images (B, 3, H, W) in [0, 1]. A token is a 2 x 2 patch of the VAE's latents."""
    latents = rearrange(z0, "b (h w) (c p q) -> b c (h p) (w q)", h=cfg.height // scale, p=2, q=2)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------- Algorithm 1


def check(cfg: Config) -> None:
    """Everything that can be wrong with the options is found here, before any model is loaded."""
    cli.check_options(cfg)
    cli.require(cfg.sde in SDE_STEPS, f"--sde must be one of {', '.join(SDE_STEPS)}, got {cfg.sde!r}")
    cli.require(cfg.sde != "cps" or cfg.eta <= 1, f"--eta must be at most 1 with --sde cps, got {cfg.eta}")
    cli.require(cfg.shift > 0, f"--shift must be above 0, got {cfg.shift}")
    check_reward(cfg.reward, cfg.reward_paths)
    vae = distributed.load_pretrained(AutoencoderKL.load_config, cfg.model, subfolder="vae")
    cli.check_size(cfg, 2 * 2 ** (len(vae["block_out_channels"]) - 1))  # a token is a 2 x 2 patch of latents


def main(cfg: Config) -> None:
    check(cfg)
    prompts = data.load_prompts(cfg.prompts)
    world = distributed.start_world()
    output.open_output(cfg, world)

    reward = load_reward(cfg.reward, parse_paths(cfg.reward_paths), world.device)
    master = world.dtype if cfg.lora_rank else torch.float32
    pipe = distributed.load_pretrained(
        FluxPipeline.from_pretrained, cfg.model, dtype={"transformer": master, "default": world.dtype}
    )
    pipe.set_progress_bar_config(disable=True)
    for frozen in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        frozen.to(world.device).requires_grad_(False)
    transformer = distributed.prepare_network(
        pipe.transformer, world, cfg.lora_rank, LORA_TARGETS, cfg.gradient_checkpointing, cfg.compile
    )
    reference = transformer  # the policy started from: with LoRA the transformer without it, else a frozen copy
    if cfg.kl_weight and not cfg.lora_rank:
        reference = FluxTransformer2DModel.from_pretrained(cfg.model, subfolder="transformer", dtype=world.dtype)
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
    scale = 2 * pipe.vae_scale_factor
    latent_shape = (cfg.height // scale * (cfg.width // scale), transformer.config.in_channels)  # (N, C)
    P, G = cfg.prompts_per_iteration // world.size, cfg.group_size
    first = world.rank * P  # this process's prompts are first … first + P - 1 of the iteration's

    def policy(network, z, sigma, text):
        with world.autocast():
            return velocity(network, z, sigma, text, cfg, scale)

    def draw_samples(iteration: int) -> None:
        captions = prompts[: cfg.num_samples]
        text = encode_prompts(pipe, captions, cfg, world.device)
        keys = [(cfg.seed, i) for i in range(len(captions))]
        z = data.keyed_noise(latent_shape, keys, "sample pictures", world.device)
        with torch.no_grad():
            z0 = sample_ode(lambda z, i: policy(transformer, z, sigmas[i].expand(len(z)), text), z, sigmas)
        if world.is_main:
            path = Path(cfg.output_dir, "samples", f"{iteration:06d}.png")
            output.save_pictures(path, decode(pipe.vae, z0, cfg, scale), captions)

    if not done:
        draw_samples(0)
    bar = world.progress(range(done, cfg.iterations), initial=done, total=cfg.iterations, desc="GRPO")
    for iteration in bar:
        clock = output.Stopwatch(world)

        # Algorithm 1: sample a batch of prompts.
        batch = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, iteration, cfg.seed)[first : first + P]
        captions = [prompts[i] for i in batch]
        tokens, pooled = encode_prompts(pipe, captions, cfg, world.device)  # (P, L, D), (P, D')

        # Algorithm 1: the old policy is the current one. Generate G samples of each prompt from the same noise.
        window = sde_window(cfg, iteration)
        who = torch.cartesian_prod(torch.arange(P), torch.arange(G)).tolist()  # (prompt, sample) of each of the B
        trajectories, log_probs, images = [], [], []
        for part in world.chunks(who, cfg.micro_batch, "rollout"):
            p = [prompt for prompt, _ in part]
            keys = [(cfg.seed, iteration, first + prompt, sample) for prompt, sample in part]
            shared = [(*key[:3], 0) if cfg.shared_noise else key for key in keys]
            text = tokens[p], pooled[p]
            with torch.no_grad():
                trajectory, log_prob, z0 = rollout(
                    lambda z, i: policy(transformer, z, sigmas[i].expand(len(z)), text),
                    data.keyed_noise(latent_shape, shared, "initial noise", world.device),
                    sigmas,
                    cfg.eta,
                    step,
                    lambda i: data.keyed_noise(latent_shape, [(*key, i) for key in keys], "step noise", world.device),
                    window,
                )
            trajectories.append(trajectory)
            log_probs.append(log_prob)
            images.append(decode(pipe.vae, z0, cfg, scale))
        trajectories, old_log_probs = torch.cat(trajectories), torch.cat(log_probs)  # (B, T+1, N, C), (B, T)
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
                distributed.reduce_gradients(transformer, now=part[-1] == pairs[-1])
                s, t = torch.tensor(part, device=world.device).T  # sample and step of each pair (M,)
                z, sigma, text = trajectories[s, t], sigmas[t], (tokens[s // G], pooled[s // G])
                v = policy(transformer, z, sigma, text)
                _, log_prob, _ = step(v, z, sigma, sigmas[t + 1], cfg.eta, z_next=trajectories[s, t + 1])
                loss, rho = grpo_loss(log_prob, old_log_probs[s, t], advantages[s], cfg.clip_range)
                if cfg.kl_weight:
                    with torch.no_grad(), distributed.without_adapter(reference):
                        v_ref = policy(reference, z, sigma, text)
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
