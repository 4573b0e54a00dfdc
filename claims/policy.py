"""A trainer's policy, and what surrounds its loop: what the baselines share with grpo_sd.py and grpo_flux.py.

A baseline is then a loop: `main(cfg)` with the Config of one of the two trainers, so that it is run, saved, resumed and
evaluated like them. One process; B samples, T steps, M pairs (sample, step) in a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torchvision.transforms import functional as TF

import grpo_flux
import grpo_sd
import runtime
from rewards import resize
from runtime import data, processes
from sampling import SDE, Step, flow_sigmas, gaussian_log_prob, sample_ode


class Policy:
    """Models, reward, optimizer and output of a run with these options; raises RunError on what is wrong with them.

    network is trained; levels (T+1,) are alpha_bars or sigmas; run is a `runtime.output.Run`. A text is what `encode`
    returns, with a row for each sample.
    """

    def __init__(self, cfg):
        self.cfg, self.is_flow = cfg, isinstance(cfg, grpo_flux.Config)
        trainer, component = (grpo_flux, "transformer") if self.is_flow else (grpo_sd, "unet")
        self.prompts = trainer.check(cfg)
        self.run = run = runtime.start(cfg, self.prompts, trainer.load_models, component, True, trainer.LORA_TARGETS)
        self.world, self.reward, self.network, self.vae = run.world, run.reward, run.network, run.pipe.vae
        world, pipe, side = run.world, run.pipe, run.pipe.vae_scale_factor
        if self.is_flow:
            self.levels = flow_sigmas(cfg.steps, cfg.shift).to(world.device)
            self.step, self.log_prob_of = SDE[cfg.sde]
            self.rows, columns = cfg.height // (2 * side), cfg.width // (2 * side)
            shape = (self.rows * columns, self.network.config.in_channels)
            encode = partial(grpo_flux.encode_prompts, pipe, max_length=cfg.max_sequence_length, device=world.device)
            encoders = (pipe.text_encoder, pipe.text_encoder_2)
        else:
            self.timesteps, self.levels, self.step = grpo_sd.ddim_schedule(
                pipe.scheduler.config, cfg.steps, world.device
            )
            self.log_prob_of = gaussian_log_prob
            shape = (self.network.config.in_channels, cfg.height // side, cfg.width // side)
            encode = partial(grpo_sd.encode_prompts, pipe, guidance=cfg.guidance, device=world.device)
            encoders = (pipe.text_encoder,)
        self.shape, self.encode = shape, data.PromptCache(encode, world, self.network, *encoders)

    def iterations(self):
        """Those of the run, with the same sample pictures as the trainer's."""

        def draw(captions: list[str], z: Tensor) -> Tensor:
            text = self.encode(captions)
            return self.decode(sample_ode(lambda z, t: self.predict(z, t, text), z, self.levels, self.step))

        return self.run.iterations(draw, self.shape)

    def captions(self, iteration: int, count: int) -> list[str]:
        """The prompts of an iteration."""
        return [self.prompts[i] for i in data.prompt_batch(len(self.prompts), count, iteration, self.cfg.seed)]

    def predict(self, z: Tensor, t, text) -> Tensor:
        """The network's output at step t, a number or (M,)."""
        if self.is_flow:
            return grpo_flux.velocity(self.network, z, self.levels[t], text, self.cfg.guidance, self.rows)
        return grpo_sd.predict(self.network, z, self.timesteps[t], text, self.cfg.guidance)

    def gaussian(self, z: Tensor, t: Tensor, text) -> Step:
        """The policy at z and steps t (M,)."""
        return self.step(self.predict(z, t, text), z, self.levels[t], self.levels[t + 1], self.cfg.eta)

    def decode(self, z0: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1]."""
        return grpo_flux.decode(self.vae, z0, self.rows) if self.is_flow else grpo_sd.decode(self.vae, z0)

    def sample(self, text, keys: list, window: range) -> tuple[Tensor, Tensor, Tensor]:
        """Trajectories (B, T+1, …), log-probs (B, T) and images of B samples, each with a text and a key of its own."""
        cfg = replace(self.cfg, group_size=1)  # the trainers take text[b // group_size]
        if self.is_flow:
            models, rest = (self.network, self.vae), (self.levels, self.shape, self.rows)
            return grpo_flux.sample_groups(cfg, self.world, *models, text, keys, window, *rest)
        schedule = (self.timesteps, self.levels, self.step)
        return grpo_sd.sample_groups(cfg, self.world, self.network, self.vae, text, keys, window, schedule, self.shape)

    def update(self, iteration: int) -> float:
        """An optimizer step. Returns the norm of the gradient."""
        norm = torch.nn.utils.clip_grad_norm_(processes.trainable(self.network), self.cfg.max_grad_norm)
        norm = processes.finite_norm(norm, iteration)
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()
        return norm

    def finish(self, iteration: int, rewards: dict, evaluations: int, **row: float) -> None:
        """Write the iteration's line; evaluations of the guided network, of one sample; backward counts as two.

        row: the loss, grad_norm, and what else the loop knows; it replaces what is reckoned here.
        """
        total = sum(self.reward.weights[name] * r for name, r in rewards.items())
        spread = total.view(-1, self.cfg.group_size).std(1).mean().item()
        known = {"reward_mean": total.mean().item(), "reward_std": spread}
        known |= {f"reward_{name}": r.mean().item() for name, r in rewards.items()}
        known |= {"clip_fraction": 0.0, "zero_variance_groups": 0, "evaluations": evaluations}
        self.run.finish(iteration, known | row, len(total))


def flux_with(**changes):
    """grpo_flux.py's `main` with these functions in place of its own."""

    def main(cfg) -> None:
        with patch.multiple(grpo_flux, **changes):
            grpo_flux.main(cfg)

    return main


def take(text, rows: Tensor):
    """The rows of a text."""
    return tuple(x[rows] for x in text) if isinstance(text, tuple) else text[rows]


def pixels_of(scorer, images: Tensor) -> Tensor:
    """What a CLIP-like scorer of rewards.py sees of images (B, 3, H, W); differentiable."""
    return TF.normalize(resize(images, scorer.size, scorer.mode), scorer.mean, scorer.std)


def differentiable_score(scorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score of a CLIP-like scorer (B,), with a gradient with respect to the images."""
    image, text = scorer.features(pixels_of(scorer, images), list(prompts))
    return (image * text).sum(-1)
