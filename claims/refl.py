"""ReFL (2304.05977) on diffusion: the gradient of the reward itself, through one late denoising step.

Sample without gradient up to a random step of the last third, predict the clean latent there with gradient, decode, and
climb the reward. Without the pre-training loss of the paper, for which there are no data. The reward must be one of
rewards.py's cosines (hps, clip, pickscore).
"""

import torch

import grpo_sd
from runtime import data
from runtime.options import require

from .policy import Policy, differentiable_score, take


def main(cfg) -> None:
    require(isinstance(cfg, grpo_sd.Config), "ReFL is here for diffusion only; take grpo_sd")
    require(cfg.reward in ("hps", "clip", "pickscore"), f"ReFL needs one differentiable reward, not {cfg.reward}")
    policy, B = Policy(cfg), cfg.prompts_per_iteration * cfg.group_size
    (scorer,) = policy.reward.scorers.values()
    for iteration in policy.iterations():
        captions = policy.captions(iteration, B)
        text, keys = policy.encode(captions), [(cfg.seed, iteration, b, 0) for b in range(B)]
        stop = int(data.keyed_rng("refl", cfg.seed, iteration).integers(2 * cfg.steps // 3, cfg.steps))
        scores, norms = [], []
        for chunk in torch.arange(B).chunk(cfg.updates_per_rollout):
            own, here = take(text, chunk), [keys[b] for b in chunk]
            z = data.keyed_noise(policy.shape, here, "initial noise", policy.world.device)
            with torch.no_grad():
                for t in range(stop):
                    mean, std, _ = policy.gaussian(z, torch.full((len(chunk),), t), own)
                    z = mean + std * data.keyed_noise(policy.shape, [(*k, t) for k in here], "step noise", z.device)
            z0_hat = policy.gaussian(z, torch.full((len(chunk),), stop), own).z0_hat
            images = policy.vae.decode(z0_hat / policy.vae.config.scaling_factor).sample / 2 + 0.5
            score = differentiable_score(scorer, images.clamp(0, 1), [captions[b] for b in chunk])
            (-score.mean()).backward()
            scores.append(score.detach())
            norms.append(policy.update(iteration))
        score = torch.cat(scores)
        row = {"loss": -score.mean().item(), "grad_norm": sum(norms) / len(norms)}
        policy.finish(iteration, {cfg.reward: score}, B * (stop + 3), **row)
