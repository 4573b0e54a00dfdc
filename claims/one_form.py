"""Diffusion and rectified flow are one form (eq. 5): the same network in both takes the same path."""

from pathlib import Path

import torch

from sampling import ddim_sde_step, flow_sde_step, sample_ode

from .experiment import FAILS, HOLDS, new_figure, save_figure

SAYS = "Diffusion and rectified flow are one form: one network, one path of z / signal (eq. 5, §2.1)"
TOLERANCE = 1e-5


def noise_of(z, level):
    """The best guess of the noise in z = data + level x noise (B, d), where each element of the data is 1 or -1."""
    return (z - torch.tanh(z / level**2)) / level


def paths(z, levels) -> tuple[torch.Tensor, torch.Tensor]:
    """Both samplers' paths in the common coordinate z / signal, (T+1, B, d), from z (B, d) at levels[0] (T+1,)."""
    alpha_bars, sigmas = 1 / (1 + levels**2), levels / (1 + levels)
    found = []
    for kind in ("diffusion", "flow"):
        signals = alpha_bars.sqrt() if kind == "diffusion" else 1 - sigmas
        path = []

        def network(x, i, signals=signals, path=path, kind=kind):
            path.append(x / signals[i])
            eps = noise_of(path[-1], levels[i])
            return eps if kind == "diffusion" else (eps - x) / (1 - sigmas[i])  # v = noise - data

        step, schedule = (ddim_sde_step, alpha_bars) if kind == "diffusion" else (flow_sde_step, sigmas)
        path.append(sample_ode(network, z * signals[0], schedule, step))  # the last prediction is the data itself
        found.append(torch.stack(path))
    return tuple(found)


def run(seeds) -> dict:
    """The content of results/one-form.json: the largest difference, in standard deviations of the level."""
    levels = torch.cat([torch.logspace(1, -1, 40), torch.zeros(1)])  # noise over signal, down to none
    deviations = (1 + levels**2).sqrt()[:, None, None]  # of z / signal at each level
    worst, shown = [], None
    for seed in seeds:
        z = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) * deviations[0]
        diffusion, flow = paths(z, levels)
        worst.append(((diffusion - flow).abs() / deviations).max().item())
        shown = shown or [path[:, 0, 0].tolist() for path in (diffusion, flow)]
    verdict = HOLDS if max(worst) <= TOLERANCE else FAILS
    return {
        "says": SAYS,
        "paper": "eq. 5",
        "verdict": verdict,
        "differences": worst,
        "tolerance": TOLERANCE,
        "seeds": list(seeds),
        "levels": levels.tolist(),
        "paths": dict(zip(("DDIM, eta = 0", "rectified flow, ODE"), shown, strict=True)),
    }


def draw(result: dict, path: Path) -> None:
    """The path of one element in both samplers."""
    figure, (axis,) = new_figure(1)
    for (name, values), style in zip(result["paths"].items(), ("-", "--"), strict=True):
        axis.plot(range(len(values)), values, style, label=name, linewidth=2)
    axis.set(xlabel="step", ylabel="one element of z / signal", title=result["verdict"])
    axis.legend()
    save_figure(figure, path)


def figures(result: dict) -> list[str]:
    """What was measured."""
    return [f"the paths differ by at most {max(result['differences']):.1e} standard deviations"]


def report(result: dict) -> str:
    """The verdict in words."""
    return f"{result['says']}: {result['verdict']}; {figures(result)[0]}"
