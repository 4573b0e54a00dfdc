"""Learning on the forward process, in rectified flow: DiffusionNFT (2509.16117) and AWM (2509.25050).

The samples are the ODE's, each from a noise of its own, and nobody asks for the likelihood of a trajectory. A sample z0
is noised again, z = (1 - sigma) z0 + sigma eps, where flow matching would regress the velocity on eps - z0. Here the
advantage decides whether the network moves towards it or away from it. As many pairs (sample, level) are trained as
GRPO trains in its preset; each takes a prediction of the old network too, which drew the samples.

M pairs in an update; velocities are (M, …), errors are means over the elements (M,).
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor

import grpo_flux
from grpo_sd import deal, group_advantages
from runtime import data
from runtime.options import require

from .policy import Policy, take

BETA, LARGEST = 1.0, 2.0  # NFT: strength of the guidance; the advantage that counts as certain


def error(v: Tensor, target: Tensor) -> Tensor:
    return (v - target).square().flatten(1).mean(1)


def nft_loss(v: Tensor, v_old: Tensor, target: Tensor, A: Tensor, sigma: Tensor) -> Tensor:
    """r |z0+ - z0|² / w+ + (1 - r) |z0- - z0|² / w-; v+ and v- lie on both sides of v_old, towards v and opposite.

    z0+ = z - sigma v+ is predicted with v+, so z0+ - z0 = -sigma (v+ - target); w+ is its mean absolute value.
    r in [0, 1] is the probability that the sample is a good one.
    """
    r, sigma = 0.5 + 0.5 * (A / LARGEST).clamp(-1, 1), sigma.view(-1, *[1] * (v.dim() - 1))

    def weighted(v: Tensor) -> Tensor:
        distance = sigma * (v - target)
        w = distance.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return distance.square().flatten(1).mean(1) / w

    positive, negative = (1 - BETA) * v_old + BETA * v, (1 + BETA) * v_old - BETA * v
    return (r * weighted(positive) + (1 - r) * weighted(negative)).mean() / BETA


def awm_loss(v: Tensor, v_old: Tensor, target: Tensor, A: Tensor, sigma: Tensor) -> Tensor:
    """The policy gradient with minus the flow-matching error as the log-probability, and |v - v_old|² to stay near.

    All sigma count alike; AWM's own settings weigh them.
    """
    rho = (error(v_old, target) - error(v, target)).exp()
    return (error(v, v_old) - A * rho).mean()


def train(cfg, loss_of) -> None:
    require(isinstance(cfg, grpo_flux.Config), "DiffusionNFT and AWM are here for rectified flow only; take grpo_flux")
    policy, P, G, T = Policy(replace(cfg, shared_noise=False)), cfg.prompts_per_iteration, cfg.group_size, cfg.steps
    draws = int((T - 1) * cfg.timestep_fraction)  # levels for each sample
    for iteration in policy.iterations():
        captions = [caption for caption in policy.captions(iteration, P) for _ in range(G)]
        text, keys = policy.encode(captions), [(cfg.seed, iteration, p, g) for p in range(P) for g in range(G)]
        trajectories, _, images = policy.sample(text, keys, range(0))
        policy.run.lap("rollout")
        rewards = policy.reward(images, captions)
        policy.run.lap("reward")
        A = group_advantages(rewards, policy.reward.weights, G, cfg.advantage_clip)
        old, losses, norms = copy.deepcopy(policy.network), [], []
        rng = data.keyed_rng("forward", cfg.seed, iteration)
        for samples in deal(range(P * G), cfg.updates_per_rollout, rng):
            pairs = [(b, d) for b in samples for d in range(draws)]
            b, t = torch.tensor(pairs)[:, 0], torch.from_numpy(rng.integers(0, T, len(pairs)))
            eps = data.keyed_noise(policy.shape, [(*keys[i], d) for i, d in pairs], "forward", policy.world.device)
            sigma, z0 = policy.levels[t], trajectories[b, -1]
            z = z0 + sigma.view(-1, *[1] * len(policy.shape)) * (eps - z0)
            rest = (z, sigma, take(text, b), cfg.guidance, policy.rows)
            with torch.no_grad():
                v_old = grpo_flux.velocity(old, *rest)
            loss = loss_of(grpo_flux.velocity(policy.network, *rest), v_old, eps - z0, A[b], sigma)
            loss.backward()
            losses.append(loss.item())
            norms.append(policy.update(iteration))
        cost = P * G * (T + 4 * draws)
        policy.finish(iteration, rewards, cost, loss=sum(losses) / len(losses), grad_norm=sum(norms) / len(norms))


def nft(cfg) -> None:
    train(cfg, nft_loss)


def awm(cfg) -> None:
    train(cfg, awm_loss)
