"""DDPO (2305.13301, with importance sampling) on the trainers' rollout; also in rectified flow (the paper's Fig. 5).

What differs from GRPO: every sample has a prompt and an initial noise of its own, and advantages are normalised over
the whole batch, since no two samples share a prompt. The objective and the cost are the same.
"""

import torch

from grpo_sd import choose_steps, deal, group_advantages, grpo_loss
from runtime import data
from runtime.metrics import statistics
from sampling import gaussian_kl, sde_window

from .policy import Policy, take


def main(cfg) -> None:
    policy, B = Policy(cfg), cfg.prompts_per_iteration * cfg.group_size
    for iteration in policy.iterations():
        captions = policy.captions(iteration, B)
        text, keys = policy.encode(captions), [(cfg.seed, iteration, b, 0) for b in range(B)]
        window = sde_window(iteration, cfg.steps, cfg.sde_window, cfg.sde_window_every)
        trajectories, old_log_probs, images = policy.sample(text, keys, window)
        policy.run.lap("rollout")
        rewards = policy.reward(images, captions)
        policy.run.lap("reward")
        A = group_advantages(rewards, policy.reward.weights, B, cfg.advantage_clip)  # the batch is one group
        tau = 1.0 if cfg.sde_window else cfg.timestep_fraction
        dealt = deal(range(B), cfg.updates_per_rollout, data.keyed_rng("updates", cfg.seed, iteration, 0))
        chosen = [choose_steps(window, tau, cfg.timesteps, data.keyed_rng("timesteps", *key)) for key in keys]
        updates = [[(b, t) for b in samples for t in chosen[b]] for samples in dealt]
        losses, norms, ratios, kls = [], [], [[] for _ in updates], [[] for _ in updates]
        for u, pairs in enumerate(updates):
            for part in policy.world.chunks(pairs, cfg.micro_batch, "update"):
                b, t = torch.tensor(part).T
                mean, std, _ = policy.gaussian(trajectories[b, t], t, take(text, b))
                log_prob = policy.log_prob_of(trajectories[b, t + 1], mean, std)
                loss, rho = grpo_loss(log_prob, old_log_probs[b, t], A[b], cfg.clip_range)
                noise = data.keyed_noise(policy.shape, [(*keys[i], j) for i, j in part], "step noise", "cpu")
                (loss * len(part) / len(pairs)).backward()
                losses.append(loss.item() * len(part) / len(pairs) / len(updates))
                ratios[u].append(rho)
                kls[u].append(gaussian_kl(mean, trajectories[b, t + 1] - std * noise, std).detach())
            norms.append(policy.update(iteration))
        cost = B * cfg.steps + 3 * sum(map(len, updates))
        row = {"loss": sum(losses), "grad_norm": sum(norms) / len(norms)}
        row |= statistics(rewards, policy.reward.weights, A, B, ratios, kls, cfg.clip_range, policy.world.gather)
        policy.finish(iteration, rewards, cost, **row)
