"""Online DPO on diffusion: Diffusion-DPO (2311.12908) on pairs that the policy draws and the reward orders.

Of each prompt's samples the best and the worst are a pair. Both are noised alike, and the policy is to predict the
noise of the better one more precisely than the reference does, and that of the worse one less precisely. The reference
is the network that drew the pair: with the untrained one, BETA would soon leave no gradient.
"""

import copy

import torch
import torch.nn.functional as F

import grpo_sd
from runtime import data
from runtime.options import require

from .policy import Policy

BETA = 5000.0  # of Diffusion-DPO, on errors that are means over the latent's elements
DRAWS = 12  # noises for each pair


def dpo_loss(error, reference_error, beta: float):
    """-log sigmoid(-beta/2 ((e_w - e_w_ref) - (e_l - e_l_ref))), errors (2, M): of the better and the worse sample."""
    gap = error - reference_error
    return -F.logsigmoid(-0.5 * beta * (gap[0] - gap[1])).mean()


def main(cfg) -> None:
    require(isinstance(cfg, grpo_sd.Config), "online DPO is here for diffusion only; take grpo_sd")
    policy, P, G = Policy(cfg), cfg.prompts_per_iteration, cfg.group_size
    alpha_bars = policy.levels
    for iteration in policy.iterations():
        captions = [caption for caption in policy.captions(iteration, P) for _ in range(G)]
        text, keys = policy.encode(captions), [(cfg.seed, iteration, p, g) for p in range(P) for g in range(G)]
        window = grpo_sd.sde_window(iteration, cfg.steps, cfg.sde_window, cfg.sde_window_every)
        trajectories, _, images = policy.sample(text, keys, window)
        policy.run.lap("rollout")
        rewards = policy.reward(images, captions)
        policy.run.lap("reward")
        r = sum(policy.reward.weights[name] * r for name, r in rewards.items()).view(P, G)
        pairs = torch.stack([r.argmax(1), r.argmin(1)]) + G * torch.arange(P)  # (2, P): better and worse sample
        pairs = pairs.repeat(1, DRAWS)  # (2, M), M = DRAWS P
        M = pairs.shape[1]
        rng = data.keyed_rng("dpo", cfg.seed, iteration)
        t = torch.from_numpy(rng.integers(0, cfg.steps, M)).repeat(2)
        eps = data.keyed_noise(policy.shape, [(cfg.seed, iteration, m) for m in range(M)], "dpo", policy.world.device)
        eps = eps.repeat(2, *[1] * len(policy.shape))  # the same for both of a pair
        clean = trajectories[pairs.flatten(), -1]
        signal = alpha_bars[t].view(-1, *[1] * len(policy.shape))
        z = signal.sqrt() * clean + (1 - signal).sqrt() * eps
        prompt = text[pairs.flatten()][:, -1:]  # without the empty text of guidance
        reference, losses, norms = copy.deepcopy(policy.network), [], []
        for part in torch.arange(M).chunk(cfg.updates_per_rollout):
            i, errors = torch.cat([part, part + M]), []
            for network in (reference, policy.network):
                with torch.set_grad_enabled(network is policy.network):
                    found = grpo_sd.predict(network, z[i], policy.timesteps[t[i]], prompt[i], 1.0)
                errors.append(((found - eps[i]) ** 2).flatten(1).mean(1).view(2, -1))
            loss = dpo_loss(errors[1], errors[0], BETA)
            loss.backward()
            losses.append(loss.item())
            norms.append(policy.update(iteration))
        rollout = P * (G * cfg.steps - cfg.shared_noise * (G - 1))  # a group's first step counts once, as in GRPO
        cost = rollout + 2 * M * 4 // text.shape[1]
        policy.finish(iteration, rewards, cost, loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms))
