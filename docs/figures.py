"""The figures of docs/annotated.html, computed by the functions that the page shows and drawn as SVG.

The toy: a sample is one number, clean data are a mixture of two Gaussians, and the exact velocity is known.
"""

# ruff: noqa: RUF001  axes have Greek letters

import base64
import io
import math
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import grpo_flux
from runtime import data, options, processes
from sampling import (
    Step,
    flow_grpo_sde_step,
    flow_sde_step,
    flow_sigmas,
    gaussian_kl,
    gaussian_log_prob,
    rollout,
    sde_window,
)

PROMPT = "an image of a yellow triangle with a cyan square"  # of the trajectory
WEIGHTS, MEANS, SPREAD = torch.tensor([0.6, 0.4]), torch.tensor([-1.5, 1.5]), 0.4  # as in laboratory.js
MEAN = (WEIGHTS * MEANS).sum().item()
VARIANCE = SPREAD**2 + (WEIGHTS * (MEANS - MEAN) ** 2).sum().item()


# ------------------------------------------------------------------------------------------------------------- the toy


def posterior_mean(z: Tensor, a, b) -> Tensor:
    """E[x0 | z] where z = a x0 + b noise and x0 is drawn from the mixture. z (B, 1) → (B, 1)."""
    total = (a * SPREAD) ** 2 + b**2
    shares = torch.softmax(WEIGHTS.log() - (z - a * MEANS) ** 2 / (2 * total), -1)  # P(mode | z) (B, 2)
    return (shares * (MEANS + a * SPREAD**2 / total * (z - a * MEANS))).sum(-1, keepdim=True)


class Policy(torch.nn.Module):
    """The exact velocity plus a correction, linear in sigma and, between 17 knots, in z.

    z (B, 1), sigma (B, 1) or () → (B, 1).
    """

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(2, 17))

    def forward(self, z: Tensor, sigma) -> Tensor:
        hats = (1 - (2 * z.clamp(-4, 4) - torch.arange(-8, 9)).abs()).clamp(min=0)  # (B, 17)
        correction = (hats * ((1 - sigma) * self.theta[0] + sigma * self.theta[1])).sum(-1, keepdim=True)
        return (z - posterior_mean(z, 1 - sigma, sigma)) / sigma + correction


def normal(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(data.keyed_rng(name, 0).standard_normal(shape, dtype=np.float32))


@torch.no_grad()
def draw(policy, z: Tensor, sigmas: Tensor, eta: float, name: str):
    """What `sampling.rollout` returns for the toy; the last step is deterministic, as in the trainers."""
    steps = len(sigmas) - 1
    noise = normal(name, steps, *z.shape)
    return rollout(lambda z, t: policy(z, sigmas[t]), z, sigmas, eta, noise=lambda t: noise[t], window=range(steps - 1))


# ------------------------------------------------------------------------------------------------------------ plotting


def plot(title: str, x: tuple, y: tuple, *marks: tuple) -> str:
    """A small SVG. x, y: (label, lowest, highest, ticks), ticks a list or {place: label}. A mark: (classes, points).

    The first class says what points are: a "line", an "area", "dots", or "rules" and "arrows" between pairs of points.
    """
    width, height, left, right, top, bottom = 330, 220, 40, 8, 38, 36
    across = lambda v: left + (width - left - right) * (v - x[1]) / (x[2] - x[1])  # noqa: E731
    up = lambda v: height - bottom - (height - top - bottom) * (v - y[1]) / (y[2] - y[1])  # noqa: E731
    parts = [f'<text x="0" y="12" class="title">{title}</text><text x="0" y="28">{y[0]}</text>']
    parts.append(f'<text x="{(left + width - right) / 2:.0f}" y="{height - 3}" class="middle">{x[0]}</text>')
    for label, v in _ticks(x[3]):
        parts.append(f'<text x="{across(v):.1f}" y="{height - bottom + 15}" class="middle">{label}</text>')
    for label, v in _ticks(y[3]):
        parts.append(f'<text x="{left - 5}" y="{up(v) + 4:.1f}" class="end">{label}</text>')
        parts.append(f'<path class="grid" d="M{left},{up(v):.1f}H{width - right}"/>')
    for classes, points in marks:
        kind = classes.split()[0]
        at = [(across(min(max(a, x[1]), x[2])), up(min(max(b, y[1]), y[2]))) for a, b in points]
        if kind in ("line", "area"):
            d = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in at) + "Z" * (kind == "area")
        elif kind == "dots":
            d = "".join(f"M{a:.1f},{b:.1f}h0" for a, b in at)
        else:
            pairs = list(zip(at[::2], at[1::2], strict=True))
            d = "".join(f"M{a:.1f},{b:.1f}L{c:.1f},{e:.1f}" for (a, b), (c, e) in pairs)
            heads = [(c, e, math.copysign(5, a - c)) for (a, _), (c, e) in pairs] if kind == "arrows" else []
            d += "".join(f"M{c + s:.1f},{e - 4:.1f}L{c:.1f},{e:.1f}L{c + s:.1f},{e + 4:.1f}" for c, e, s in heads)
        parts.append(f'<path class="{classes}" d="{d}"/>')
    return f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


def _ticks(ticks) -> list[tuple[str, float]]:
    named = ticks if isinstance(ticks, dict) else {v: f"{v:g}" for v in ticks}
    return [(label.replace("-", "−"), v) for v, label in named.items()]


def histogram(values: Tensor, low: float, high: float, bins: int) -> list[tuple[float, float]]:
    """The outline of a histogram as a density."""
    density, edges = np.histogram(values.flatten().numpy(), bins, (low, high))
    density = density / values.numel() / (edges[1] - edges[0])
    sides = [(float(x), float(h)) for (a, b), h in zip(pairwise(edges), density, strict=True) for x in (a, b)]
    return [(low, 0.0), *sides, (high, 0.0)]


# ------------------------------------------------------------------------------------------------------------- figures


def marginals() -> list[str]:
    """The last z0_hat of the ODE and of SDEs, with the exact velocity, against the data."""
    panels, start = [], normal("start", 20_000, 1)
    for eta in (0.0, 0.3, 1.0):
        for steps in (6, 16, 100):
            z0 = draw(Policy(), start, flow_sigmas(steps, 3), eta, f"marginals {steps}")[2]
            panels.append(
                against_exact(f"{f'SDE, η = {eta:g}' if eta else 'ODE'}, T = {steps}", "clean latent", z0, 0.0)
            )
    for eta in (0.0, 0.3, 1.0):  # the latent before the last step, which is what the last prediction gets
        sigmas = flow_sigmas(16, 3)
        z = draw(Policy(), start, sigmas, eta, "marginals 16")[0][:, -2]
        title, level = f"{f'SDE, η = {eta:g}' if eta else 'ODE'}, σ = {sigmas[-2]:.2f}", sigmas[-2].item()
        panels.append(against_exact(title, "latent before the last step", z, level))
    return panels


def against_exact(title: str, name: str, z: Tensor, sigma: float) -> str:
    """A histogram of latents at a noise level, with the exact density there."""
    grid, spread = torch.linspace(-3, 3, 121), math.hypot((1 - sigma) * SPREAD, sigma)
    density = (WEIGHTS * torch.distributions.Normal((1 - sigma) * MEANS, spread).log_prob(grid[:, None]).exp()).sum(1)
    exact = (1 - sigma) ** 2 * VARIANCE + sigma**2
    title = f"{title}: variance {round(100 * (z.var().item() / exact - 1)):+d} %".replace("-", "−")
    axes = (f"{name} (no unit)", -3, 3, [-2, 0, 2]), ("density", 0, 0.8, [0, 0.4, 0.8])
    curve = list(zip(grid.tolist(), density.tolist(), strict=True))
    return plot(title, *axes, ("area a", histogram(z, -3, 3, 60)), ("line exact", curve))


def group() -> list[str]:
    """A group of the toy: rewards, advantages, and the gradient of the objective with respect to the shared mean."""
    size, sigmas, policy = 8, flow_sigmas(6, 3), Policy()
    z = normal("group", 1, 1).expand(size, 1)  # shared noise
    trajectory, log_probs, z0 = draw(policy, z, sigmas, 1.0, "group draws")
    r = torch.exp(-((z0.flatten() - 1.5) ** 2) / 2)
    A = grpo_flux.group_advantages({"bump": r}, {"bump": 1.0}, size, 5.0)
    mean, std, _ = flow_sde_step(policy(z, sigmas[0]).detach(), z, sigmas[0], sigmas[1], 1.0)
    mean.requires_grad_()
    loss, _ = grpo_flux.grpo_loss(gaussian_log_prob(trajectory[:, 1], mean, std), log_probs[:, 0], A, 0.2)
    loss.backward()
    push = -mean.grad.flatten() * size  # of each sample's term
    numbers = range(1, size + 1)
    sample = ("sample of the group", 0.5, size + 0.5, list(numbers))
    zero = ("line faint", [(0.5, 0), (size + 0.5, 0)])
    level = ("line faint", [(0.5, r.mean().item()), (size + 0.5, r.mean().item())])
    pushes = [push.mean().item(), *push.tolist()]
    arrows = [(x, i) for i, p in enumerate(pushes) for x in (mean[0].item(), mean[0].item() + p)]
    draws = list(zip(trajectory[:, 1, 0].tolist(), numbers, strict=True))

    def dots(values: Tensor) -> tuple:
        return "dots a", list(enumerate(values.tolist(), 1))

    return [
        plot("Rewards, and their mean", sample, ("reward (no unit)", 0, 1, [0, 0.5, 1]), level, dots(r)),
        plot("Advantages", sample, ("advantage (standard deviations)", -2, 2, [-2, 0, 2]), zero, dots(A)),
        plot(
            "First step: draws and gradients of the mean",
            ("next latent z′ (dots); gradient (arrows)", -3, 8, [-2, 0, 2, 4, 6, 8]),
            ("sample of the group", -0.5, size + 0.5, {0: "mean", **{i: str(i) for i in numbers}}),
            ("rules faint", [(mean[0].item(), -0.5), (mean[0].item(), size + 0.5)]),
            ("arrows b", arrows), ("dots a", draws),
        ),
    ]  # fmt: skip


def ratios() -> list[str]:
    """GRPO on the toy, with the trainers' functions; the ratios of the four updates of its sixth iteration."""
    policy, sigmas, P, G, updates, clip, recorded = Policy(), flow_sigmas(6, 3), 32, 16, 4, 0.2, []
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    window = sde_window(0, 6, 0, 25)
    for iteration in range(6):
        z = normal(f"starts {iteration}", P, 1).repeat_interleave(G, 0)
        trajectory, log_probs, z0 = draw(policy, z, sigmas, 1.0, f"draws {iteration}")
        r = torch.exp(-((z0.flatten() - 1.5) ** 2) / 2)
        A = grpo_flux.group_advantages({"bump": r}, {"bump": 1.0}, G, 5.0)
        parts = [[] for _ in range(updates)]
        for p in range(P):
            samples = range(p * G, p * G + G)
            for pairs, dealt in zip(
                parts, grpo_flux.deal(samples, updates, data.keyed_rng("deal", iteration, p)), strict=True
            ):
                for i in dealt:
                    steps = grpo_flux.choose_steps(window, 0.6, "random", data.keyed_rng("steps", iteration, i))
                    pairs += [(i, t) for t in steps]
        recorded = []
        for pairs in parts:
            b, t = torch.tensor(pairs).T
            z, z_next, sigma = trajectory[b, t], trajectory[b, t + 1], sigmas[t, None]
            mean, std, _ = flow_sde_step(policy(z, sigma), z, sigmas[t], sigmas[t + 1], 1.0)
            loss, rho = grpo_flux.grpo_loss(gaussian_log_prob(z_next, mean, std), log_probs[b, t], A[b], clip)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorded.append(rho)
    panels = []
    for u, rho in enumerate(recorded, 1):
        outside = f"{100 * ((rho - 1).abs() > clip).double().mean().item():.0f} %"
        axes = ("ratio ρ", 0.4, 1.6, [0.4, 0.8, 1, 1.2, 1.6]), ("density, cut off at 12", 0, 12, [0, 4, 8, 12])
        band = ("area band", [(1 - clip, 0), (1 - clip, 12), (1 + clip, 12), (1 + clip, 0)])
        panels.append(
            plot(f"Update {u}: {outside} outside the clip range", *axes, band, ("area a", histogram(rho, 0.4, 1.6, 61)))
        )
    return panels


def kl() -> list[str]:
    """The KL of a step for a velocity that is off by 1, and the log ratio's distribution when the KL is 0.01."""
    lines = []
    kinds = (("a", flow_sde_step, 0.3, 16), ("b", flow_sde_step, 1.0, 6), ("c", flow_grpo_sde_step, 0.7, 16))
    for name, step, eta, steps in kinds:
        sigmas, points = flow_sigmas(steps, 3), []
        for sigma, sigma_next in list(pairwise(sigmas))[:-1]:
            v = torch.zeros(1, 1)
            old, new = step(v, v, sigma, sigma_next, eta), step(v + 1, v, sigma, sigma_next, eta)
            points.append((sigma.item(), math.log10(gaussian_kl(new.mean, old.mean, new.std).item())))
        lines += [(f"line {name}", points), (f"dots {name}", points)]
    axis = ("KL of the step, per element", -4, 1, {-4: "10⁻⁴", -3: "10⁻³", -2: "0.01", -1: "0.1", 0: "1", 1: "10"})
    panels = [plot("KL if v changes by 1", ("noise level σ (no unit)", 0, 1, [0, 0.5, 1]), axis, *lines)]
    for d in (16, 1024):
        mean = math.sqrt(2 * 0.01) * torch.ones(4000, d)  # std is 1, so that the KL per element is 0.01
        log_rho = gaussian_log_prob(x := normal(f"kl {d}", 4000, d), mean, 1.0) - gaussian_log_prob(x, 0 * mean, 1.0)
        panels.append(plot(
            f"k = 0.01, d = {d:,}",
            ("log ρ, the mean over elements", -0.15, 0.15, [-0.1, -0.01, 0.1]),
            ("density, cut off at 40", 0, 40, [0, 20, 40]),
            ("rules faint", [(-0.01, 0), (-0.01, 40)]), ("area a", histogram(log_rho, -0.15, 0.15, 61)),
        ))  # fmt: skip
    return panels


@torch.no_grad()
def trajectory() -> list[str]:
    """Four samples of tiny/flux from one initial noise: each step's z0_hat, decoded. The first follows the ODE."""
    cfg = options.parse_config(grpo_flux.Config, grpo_flux.PRESETS, ["--preset", "tiny", "--dtype", "float32"])
    world = processes.start_world(cfg.dtype)
    pipe, network, _ = grpo_flux.load_models(cfg, world, None)
    sigmas, rows = flow_sigmas(cfg.steps, cfg.shift), cfg.height // (2 * pipe.vae_scale_factor)
    shape = (rows * cfg.width // (2 * pipe.vae_scale_factor), network.config.in_channels)
    text = grpo_flux.encode_prompts(pipe, [PROMPT] * 4, cfg.max_sequence_length, world.device)
    z = data.keyed_noise(shape, [(cfg.seed, 0, 0, 0)] * 4, "initial noise", world.device)
    seen = []

    def step(*arguments) -> Step:
        """The SDE's step for all samples but the first, which follows the ODE."""
        ode, sde = flow_sde_step(*arguments[:-1], 0.0), flow_sde_step(*arguments)
        first = torch.arange(4)[:, None, None] == 0
        seen.append(sde.z0_hat)
        return Step(torch.where(first, ode.mean, sde.mean), torch.where(first, ode.std, sde.std), sde.z0_hat)

    rollout(
        lambda z, t: grpo_flux.velocity(network, z, sigmas[t], text, cfg.guidance, rows), z, sigmas, cfg.eta, step,
        lambda t: data.keyed_noise(shape, [(cfg.seed, 0, 0, g, t) for g in range(4)], "step noise", world.device),
        range(cfg.steps - 1), lambda x, mean, std: 0.0,
    )  # fmt: skip
    pictures = grpo_flux.decode(pipe.vae, torch.stack(seen, 1).flatten(0, 1), rows)  # four rows of T
    names = [
        f"{name}, step {t + 1} of {cfg.steps}"
        for name in ("ODE", *(f"SDE, sample {g}" for g in (1, 2, 3)))
        for t in range(cfg.steps)
    ]
    return [picture(x, name) for x, name in zip(pictures, names, strict=True)]


def picture(image: Tensor, name: str) -> str:
    """An <img> that holds image (3, H, W) in [0, 1] as a PNG."""
    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG", optimize=True)
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{name}">'
