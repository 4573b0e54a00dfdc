"""DanceGRPO (arXiv 2505.07818) on diffusion: Stable Diffusion v1.4, text to image. The file to read first.

Algorithm 1 of the paper, which `main` follows line by line:
    for every iteration:
        sample a batch of prompts; the current weights are the old policy
        for every prompt draw G images by the reverse SDE from one initial noise, and score them
        advantage of an image = its score, normalised within its prompt's group (several rewards: summed after that)
        choose a random subset of the timesteps and replay it: rho = exp(new log-prob - old log-prob),
            where a log-prob is the mean over the latent's elements
        maximise the clipped objective  min(rho A, clip(rho, 1 - clip_range, 1 + clip_range) A)

    python grpo_sd.py --preset tiny                                 on a laptop, no model download, a few minutes
    torchrun --nproc_per_node=8 grpo_sd.py --reward hps             the release's run, 8 GPUs of 80 GB
    torchrun --nproc_per_node=8 grpo_sd.py --preset hps-clip        HPS and CLIP, weighted as the author advises

The policy is sampled with classifier-free guidance, so the update trains the guided prediction too.
Departures from the release: a prompt's group shares its initial noise, not all prompts of a GPU; the image is decoded
from the last prediction of x0, which the last step's noise never reaches; rewards see the decoded tensor, not a JPEG;
latents stay in float32; every update takes samples of every group.

Legend: P prompts of this process, G samples of each, B = P G of them, T sampling steps, (C, h, w) a latent,
L text tokens, D width of the text embedding, M pairs (sample, step) in a micro-batch, n texts of a sample: with
classifier-free guidance 2, the empty one and the prompt, else 1.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import evaluation.geneval  # noqa: F401  adds the reward geneval
import runtime
from rewards import RewardError, check_reward
from runtime import data, initial, loading, lora, options, processes
from runtime.metrics import statistics
from runtime.options import AtLeast1, Count, Decay, Natural, NonNegative, Open01, Positive, Rank, Seed, Several, Share
from sampling import ddim_sde_step, distinct, gaussian_kl, gaussian_log_prob, sample_ode, sde_window

diffusers, dryrun, drymodels = map(options.Lazy, ("diffusers", "runtime.dryrun", "runtime.drymodels"))

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the attention's linear layers (release)


@dataclass(frozen=True)
class Config:
    # paper
    preset: str = "release"  # named option values: release (8 GPUs), paper, hps-clip, fast, 24gb, tiny, tiny-fast
    model: str = "CompVis/stable-diffusion-v1-4"  # folder, OWNER/NAME or OWNER/NAME@REVISION; a StableDiffusionPipeline
    reward: str = "hps"  # NAME[@THRESHOLD][:WEIGHT], …; hps, clip, pickscore, geneval, FILE.py:FUNCTION, http://…
    prompts: str = "hpdv2"  # text file (one a line), JSONL file, or hpdv2 (release; fetched once)
    iterations: Count = 301  # rollouts (release)
    prompts_per_iteration: Count = 32  # over all processes (release: 4 for each of 8 GPUs)
    group_size: Several = 16  # G, images of one prompt that are compared (release)
    steps: Several = 50  # T, sampling steps in the rollout (paper, release)
    eta: Share = 1.0  # noise of the DDIM SDE, in (0, 1]; 1 is the variance of DDPM (release)
    timestep_fraction: Share = 1.0  # tau, share of the first T - 1 steps to train (release; paper 0.6); of a window all
    shared_noise: bool = True  # one initial noise for a prompt's whole group (paper)
    updates_per_rollout: Count = 2  # optimizer steps, each on its own part of the samples (release)
    clip_range: Open01 = 1e-4  # of the ratio (paper, release), small since log-probs are means
    advantage_clip: Positive = 5.0  # advantages are clamped to plus or minus this (release)
    learning_rate: Positive = 1e-5  # AdamW, constant (paper, release; its author advises 5e-6 to 2e-5)
    max_grad_norm: Positive = 1.0  # gradient clipping (paper, release)
    guidance: AtLeast1 = 5.0  # classifier-free guidance, in rollout and update alike (release); 1: off, half the cost
    height: Count = 512  # pixels (release)
    width: Count = 512  # pixels (release)
    # variants
    sde_window: Natural = 0  # k > 0: only a window of k steps is stochastic, and all of it is trained (MixGRPO: 4)
    sde_window_every: Count = 25  # iterations after which the window slides on by one step (MixGRPO)
    timesteps: Literal["random", "first", "last"] = "random"  # steps to train; first: the noisiest; not with a window
    keep_best_worst: Natural = 0  # k > 0: train only on the k best and k worst of each group (paper: best-of-N)
    kl_weight: NonNegative = 0.0  # beta of |prediction - that of --model|² (paper: none)
    lora_rank: Rank = 0  # 0: all weights are trained; else rank of LoRA, with alpha = 2 rank
    ema_decay: Decay = 0.0  # moving average of the weights, once an iteration, saved beside them; 0: off
    # memory and speed
    micro_batch: Count = 8  # samples per pass of the rollout, pairs (sample, step) per pass of the update (ours)
    reward_batch: Count = 32  # samples in a forward pass of a reward (ours)
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: slower, far less memory
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of networks; auto: bfloat16 on CUDA
    shard_size: Natural = 0  # processes that share a copy of the network; 0: one
    offload: bool = False  # frozen models wait in host memory until they are needed
    quantize: Literal["", "int8", "nf4"] = ""  # the frozen base of a LoRA in 8 or 4 bit (ours); needs --lora-rank
    compile: bool = False  # torch.compile the network's repeated blocks
    dry_run: bool = False  # only print what the run needs, and write dryrun.json; without weights, without a GPU
    processes: Count = 1  # of the run that --dry-run describes
    gpu_memory: Positive = 78.0  # GiB of each GPU, for --dry-run; a card of 80 GB has 78
    # bookkeeping
    output_dir: str = "runs/sd"  # everything the run leaves
    reward_paths: str = ""  # NAME=FOLDER or NAME=OWNER/NAME, comma separated: reward weights in other places
    init: str = ""  # start from these weights: RUN/checkpoint-000300, a diffusers folder or a LoRA file
    resume: bool = False  # continue from the newest checkpoint in --output-dir
    seed: Seed = 42  # of every random number (release)
    save_every: Count = 50  # iterations between checkpoints; one more at the end
    keep_states: Count = 2  # newest checkpoints that keep what --resume needs
    sample_every: Count = 10  # iterations between sample pictures; also before the first, after 2, 5, and the last
    num_samples: Count = 8  # sample pictures: the file's first prompts, always from the same noise; at most 8 saved
    track: Literal["", "tensorboard", "wandb"] = ""  # metrics and samples go there too, beside metrics.jsonl


# The paper's algorithm, at its tau. So short a run needs a higher learning rate, and with it a larger clip range.
TINY = dict(
    model="tiny/sd", reward_paths="hps=tiny/hps,clip=tiny/clip", prompts="prompts/tiny.txt", output_dir="runs/tiny-sd",
    height=64, width=64, iterations=23, prompts_per_iteration=8, group_size=8, steps=6, timestep_fraction=0.6,
    updates_per_rollout=4, clip_range=3e-3, micro_batch=64, learning_rate=2e-4, guidance=2.0, num_samples=64,
)  # fmt: skip
PRESETS = {
    "release": {},
    "paper": dict(group_size=12, timestep_fraction=0.6, updates_per_rollout=1),  # Table 6 but eta 1; guided: one update
    "hps-clip": dict(reward="hps:0.7,clip:1.4"),  # weights that the release's author advises
    "fast": dict(steps=20, sde_window=4, sde_window_every=1000),  # ours: as much as 32 forward passes a sample, not 197
    "24gb": dict(prompts_per_iteration=8, micro_batch=4, gradient_checkpointing=True, offload=True, gpu_memory=23.0),
    "tiny": TINY,
    "tiny-fast": TINY | dict(  # only the first two of six steps are stochastic
        iterations=36, sde_window=2, sde_window_every=1000, updates_per_rollout=1, learning_rate=2e-5, clip_range=1e-4,
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


# ----------------------------------------------------------------------------------- Stable Diffusion, as a policy


def load_models(cfg: Config, world: processes.World, init: Path | None) -> tuple:
    """→ the pipeline, its UNet ready to train, and the KL term's reference policy: the weights of --model."""
    kinds = diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel
    return loading.load_models(*kinds, cfg, world, init, LORA_TARGETS, path=cfg.model, subfolder="unet")


@torch.no_grad()
def encode_prompts(pipe, prompts: list[str], guidance: float, device) -> Tensor:
    """→ CLIP embedding of each token of each of the sample's texts (P, n, L, D)."""
    guided = guidance != 1
    text, empty = pipe.encode_prompt(prompts, device, 1, do_classifier_free_guidance=guided)
    return torch.stack([empty, text], 1) if guided else text[:, None]


def predict(unet, z: Tensor, timestep: Tensor, text: Tensor, guidance: float) -> Tensor:
    """The guided prediction eps(z, t | prompt). z (B, C, h, w), timestep () or (B,), text (B, n, L, D) → (B, C, h, w).

    Classifier-free guidance (2207.12598): eps = eps_empty + guidance (eps_prompt - eps_empty), in one forward pass.
    """
    n = text.shape[1]
    inputs = z.to(text.dtype).repeat_interleave(n, 0)
    with torch.autocast(z.device.type, text.dtype, enabled=text.dtype != torch.float32):
        out = unet(inputs, timestep.expand(len(z)).repeat_interleave(n), text.flatten(0, 1), return_dict=False)[0]
    if n == 1:
        return out.float()
    eps_empty, eps_prompt = out.float().unflatten(0, (-1, 2)).unbind(1)
    return eps_empty + guidance * (eps_prompt - eps_empty)


@torch.no_grad()
def decode(vae, z0: Tensor) -> Tensor:
    """Latents (B, C, h, w) → images (B, 3, H, W) float32 in [0, 1]."""
    images = vae.decode((z0 / vae.config.scaling_factor).to(vae.dtype)).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


def ddim_schedule(config: dict, num_steps: int, device) -> tuple:
    """The scheduler's timesteps (T,), alpha_bar at each of them and after the last (T+1,), and its `ddim_sde_step`."""
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(num_steps)
    alpha_bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])
    step = partial(ddim_sde_step, prediction=scheduler.config.prediction_type)
    return scheduler.timesteps.to(device), alpha_bars.to(device), step


@torch.no_grad()
def sample_groups(cfg: Config, world, unet, vae, text: Tensor, keys: list, window: range, schedule, shape: tuple):
    """Algorithm 1, lines 4 and 5: draw G images for each prompt, keep every latent and the log-prob of every draw.

    text (P, n, L, D); keys (seed, iteration, prompt, sample) of each of the B samples; shape (C, h, w).
    Returns trajectories (B, T+1, C, h, w), log_probs (B, T), and images (B, 3, H, W) decoded from the last z0_hat.
    """
    (timesteps, alpha_bars, step), T = schedule, cfg.steps
    trajectories = torch.empty(len(keys), T + 1, *shape, device=world.device)
    log_probs = torch.zeros(len(keys), T, device=world.device)
    images = torch.empty(len(keys), 3, cfg.height, cfg.width, device=world.device)
    for chunk in world.chunks(torch.arange(len(keys)), cfg.micro_batch, "rollout"):
        # Shared noise: all samples of a prompt start from one z, so that they differ in their actions only (paper).
        starts = [(*keys[i][:3], 0) if cfg.shared_noise else keys[i] for i in chunk]
        trajectories[chunk, 0] = z = data.keyed_noise(shape, starts, "initial noise", world.device)
        of_sample = text[chunk // cfg.group_size]
        for t in range(T):  # `sampling.rollout` is this loop for any model
            world.poll()  # SIGTERM ends the run here
            # The policy: given z, the next latent is Gaussian. Outside the window it is the next point of the ODE.
            seen, place = distinct([(i, t) for i in chunk.tolist()], cfg.group_size, cfg.shared_noise)
            eps = predict(unet, z[seen], timesteps[t], of_sample[seen], cfg.guidance)[place]
            mean, std, z0_hat = step(eps, z, alpha_bars[t], alpha_bars[t + 1], cfg.eta if t in window else 0.0)
            z = mean
            if t in window:
                noise = data.keyed_noise(shape, [(*keys[i], t) for i in chunk], "step noise", world.device)
                z = mean + std * noise  # the action: a draw from the policy
                log_probs[chunk, t] = gaussian_log_prob(z, mean, std)  # how probable this draw was
            trajectories[chunk, t + 1] = z
        with world.on_device(vae):
            images[chunk] = decode(vae, z0_hat)
    return trajectories, log_probs, images


# ---------------------------------------------------------------------------------------------------------- Algorithm 1


def check(cfg: Config) -> list[str]:
    """Everything that can be wrong with the options is found here, before any model is loaded. Returns the prompts."""
    options.check_options(cfg)
    check_reward(cfg.reward, cfg.reward_paths)
    loading.check_family(cfg.model, "StableDiffusionPipeline")
    vae = loading.load_config(cfg.model, "vae")
    options.check_size(cfg, 2 ** (len(vae["block_out_channels"]) - 1))
    initial.check_init(cfg, diffusers.UNet2DConditionModel, "unet", LORA_TARGETS)
    prompts = data.load_prompts(cfg.prompts)
    check_reward(cfg.reward, cfg.reward_paths, False, prompts, data.load_metadata(cfg.prompts))
    return prompts


def dry_run(cfg: Config) -> dict:
    """Print what a run with these options takes, write OUTPUT_DIR/dryrun.json, and return its content."""
    return dryrun.run(
        cfg, **drymodels.stable_diffusion(cfg), decode=decode, lora_targets=LORA_TARGETS,
        predict=lambda unet, z, text: predict(unet, z, torch.zeros((), dtype=torch.long), text, cfg.guidance),
    )  # fmt: skip


def main(cfg: Config) -> None:
    prompts = check(cfg)
    run = runtime.start(cfg, prompts, load_models, "unet", True, LORA_TARGETS)
    world, reward, pipe, network, reference = run.world, run.reward, run.pipe, run.network, run.reference

    timesteps, alpha_bars, step = schedule = ddim_schedule(pipe.scheduler.config, cfg.steps, world.device)
    side = pipe.vae_scale_factor  # pixels along the side of one element of a latent
    shape = (network.config.in_channels, cfg.height // side, cfg.width // side)  # (C, h, w)
    P, G = cfg.prompts_per_iteration // world.size, cfg.group_size
    first = world.rank * P  # this process has the prompts first … first + P - 1 of each iteration

    encode = partial(encode_prompts, pipe, guidance=cfg.guidance, device=world.device)
    encode = data.PromptCache(encode, world, network, pipe.text_encoder)

    def draw(captions: list[str], z: Tensor) -> Tensor:  # a sample picture of each, by the ODE
        text = encode(captions)
        z0 = sample_ode(lambda z, t: predict(network, z, timesteps[t], text, cfg.guidance), z, alpha_bars, step)
        with world.on_device(pipe.vae):
            return decode(pipe.vae, z0)

    for iteration in run.iterations(draw, shape):
        # Algorithm 1, lines 2 and 3: a batch of prompts. The current weights are the old policy.
        batch = data.prompt_batch(len(prompts), cfg.prompts_per_iteration, iteration, cfg.seed)[first : first + P]
        captions = [prompts[i] for i in batch]
        text = encode(captions)  # (P, n, L, D)

        # Lines 4 and 5: G samples for each prompt, from the same initial noise.
        keys = [(cfg.seed, iteration, first + p, g) for p in range(P) for g in range(G)]  # each sample's RNG key
        window = sde_window(iteration, cfg.steps, cfg.sde_window, cfg.sde_window_every)
        drawn = sample_groups(cfg, world, network, pipe.vae, text, keys, window, schedule, shape)
        trajectories, old_log_probs, images = drawn  # (B, T+1, C, h, w), (B, T), (B, 3, H, W)
        run.lap("rollout")

        # Line 6: the rewards of each sample.
        with world.on_device(*reward.models):
            rewards = reward(images, [caption for caption in captions for _ in range(G)])  # {name: (B,)}
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
                state = z[seen], timesteps[t[seen]], text[b[seen] // G]
                # The current policy at z, and the log-probability that it gives the rollout's draw.
                eps = predict(network, *state, cfg.guidance)[place]
                mean, std, _ = step(eps, z, alpha_bars[t], alpha_bars[t + 1], cfg.eta)
                log_prob, old_log_prob = gaussian_log_prob(z_next, mean, std), old_log_probs[b, t]
                loss, rho = grpo_loss(log_prob, old_log_prob, A[b], cfg.clip_range)
                # The old policy's mean is z_next - std noise; the noise is drawn again from its key.
                noise = data.keyed_noise(shape, [(*keys[i], j) for i, j in part], "step noise", world.device)
                kl = gaussian_kl(mean, z_next - std * noise, std)
                if cfg.kl_weight:
                    with torch.no_grad(), lora.without_adapter(reference):
                        eps_ref = predict(reference, *state, cfg.guidance)[place]
                    loss = loss + cfg.kl_weight * ((eps - eps_ref) ** 2).mean()
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
        del drawn, trajectories, images  # sample pictures and the next rollout need their memory
        run.finish(iteration, row, P * G)


if __name__ == "__main__":
    with options.one_line_errors(RewardError):
        config = options.parse_config(Config, PRESETS)
        dry_run(config) if config.dry_run else main(config)
