"""DDPO (2305.13301, with importance sampling) on the trainers' rollout; also in rectified flow, as the paper tried it.

What differs from GRPO: every sample has a prompt and an initial noise of its own, and advantages are normalised over
the whole batch, since no two samples share a prompt. The objective and the cost are the same.
"""

import torch

from grpo_sd import group_advantages, grpo_loss, sde_window, statistics, training_pairs
from runtime import output

from .policy import Policy, take


def main(cfg) -> None:
    policy, B = Policy(cfg), cfg.prompts_per_iteration * cfg.group_size
    for iteration in policy.run.iterations():
        clock = output.Stopwatch(policy.world)
        captions = policy.captions(iteration, B)
        text, keys = policy.encode(captions), [(cfg.seed, iteration, b, 0) for b in range(B)]
        window = sde_window(iteration, cfg.steps, cfg.sde_window, cfg.sde_window_every)
        trajectories, old_log_probs, images = policy.sample(text, keys, window)
        clock.lap("rollout")
        rewards = policy.reward(images, captions)
        clock.lap("reward")
        A = group_advantages(rewards, policy.reward.weights, B, cfg.advantage_clip)  # the batch is one group
        tau = 1.0 if cfg.sde_window else cfg.timestep_fraction
        updates = training_pairs(A, keys, B, window, tau, cfg.timesteps, 0, cfg.updates_per_rollout)
        losses, norms, ratios = [], [], []
        for pairs in updates:
            ratios.append([])
            for part in policy.world.chunks(pairs, cfg.micro_batch, "update"):
                s, t = torch.tensor(part).T
                mean, std, _ = policy.gaussian(trajectories[s, t], t, take(text, s))
                log_prob = policy.log_prob_of(trajectories[s, t + 1], mean, std)
                loss, rho = grpo_loss(log_prob, old_log_probs[s, t], A[s], cfg.clip_range)
                (loss * len(part) / len(pairs)).backward()
                losses.append(loss.item() * len(part) / len(pairs) / len(updates))
                ratios[-1].append(rho)
            norms.append(policy.update(iteration))
        clock.lap("update")
        cost = B * cfg.steps + 3 * sum(map(len, updates))
        row = {"loss": sum(losses), "grad_norm": sum(norms) / len(norms)}
        row |= statistics(rewards, policy.reward.weights, A, B, ratios, cfg.clip_range, policy.world.gather)
        policy.finish(iteration, rewards, cost, clock, **row)
