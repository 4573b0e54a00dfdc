"""The policy: noise schedules, one stochastic denoising step with its log-probability, and the rollout.

DanceGRPO (arXiv 2505.07818) reads the sampling of a diffusion model as a Markov decision process: the state is
(prompt, level, z), the action is the next latent z_next, and the policy is the Gaussian from which z_next is drawn,

    pi(z_next | z) = N(mean(z, model(z)), std²).

A policy gradient needs the log-probability of the actions taken, so each step function here does two things: it
draws z_next (rollout), or it scores a z_next that is given (training). One function for both is what makes the
probability ratio exactly 1 before the first update.

Needs torch only. Knows no model (a model is a callable) and no process group.

Legend: B samples, T sampling steps, d elements of one sample, `...` the latent's own dimensions.
Diffusion: z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise; alpha_bar rises to 1; the network predicts the noise.
Rectified flow: z = (1 - sigma) x0 + sigma x1 with x1 ~ N(0, 1); sigma runs 1 → 0; the network predicts v = x1 - x0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Level = float | Tensor  # a float, a 0-d tensor, or (B,): training visits a different step for each sample


def flow_sigmas(num_steps: int, shift: float) -> Tensor:
    """Noise levels of rectified flow, 1 → 0, pushed towards noise by `shift` (Stable Diffusion 3, 2403.03206, eq. 23).

    Returns (T+1,) float32. shift = 1 is uniform; FLUX in the paper uses 3, HunyuanVideo 5, SkyReels 7.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"flow_sigmas needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    sigma = torch.linspace(1, 0, num_steps + 1)
    return shift * sigma / (1 + (shift - 1) * sigma)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Level) -> Tensor:
    """log N(x; mean, std²), the MEAN over the d elements of each sample. x, mean (B, ...) → (B,).

    The mean and not the sum: with d in the hundreds of thousands the true ratio leaves any clipping range at once.
    The mean gives its d-th root, which is why a clip range as small as 1e-4 fits.
    """
    std = _per_sample(std, x)
    log_prob = -((x - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def flow_sde_step(v, z, sigma: Level, sigma_next: Level, eta: float, z_next=None, noise=None):
    """One step of the reverse SDE of rectified flow (DanceGRPO eq. 6): dz = (v - ½ eta² score) dsigma + eta dw.

    v, z          (B, ...) velocity predicted at z, and z itself
    sigma, sigma_next   the level of z and the lower one to reach, in [0, 1]
    eta           noise injected, >= 0; 0 is the plain Euler step of the ODE
    z_next        (B, ...) to score a step that was taken; None to draw one
    noise         (B, ...) standard normal used for the draw; None takes torch's global generator
    Returns z_next (B, ...), log_prob (B,) or None if eta = 0, z0_hat (B, ...) the clean sample predicted here.
    """
    v, z, sigma, sigma_next = v.float(), z.float(), _per_sample(sigma, z), _per_sample(sigma_next, z)
    z0_hat = z - sigma * v
    if eta == 0:
        return (z + v * (sigma_next - sigma) if z_next is None else z_next.float()), None, z0_hat
    score = -(z - (1 - sigma) * z0_hat) / sigma**2  # ∇log p(z), since z ~ N((1 - sigma) x0, sigma²)
    mean = z + (v - 0.5 * eta**2 * score) * (sigma_next - sigma)
    std = eta * torch.sqrt(sigma - sigma_next)
    if z_next is None:
        z_next = mean + std * _standard_normal(noise, z)
    return z_next, gaussian_log_prob(z_next.float(), mean, std), z0_hat


def flow_grpo_sde_step(v, z, sigma: Level, sigma_next: Level, eta: float, z_next=None, noise=None):
    """The SDE step of Flow-GRPO (2505.05470, eq. 9): noise s = eta sqrt(sigma / (1 - sigma)) instead of a constant.

    Arguments and returns are those of `flow_sde_step`; eta is the paper's `a`, about 0.7. At sigma = 1, where s
    would be infinite, the next level stands in for sigma under the fraction, as in the authors' code.
    """
    v, z, sigma, sigma_next = v.float(), z.float(), _per_sample(sigma, z), _per_sample(sigma_next, z)
    z0_hat = z - sigma * v
    dsigma = sigma_next - sigma
    if eta == 0:
        return (z + v * dsigma if z_next is None else z_next.float()), None, z0_hat
    s = eta * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma)))
    mean = z * (1 + s**2 / (2 * sigma) * dsigma) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dsigma
    std = s * torch.sqrt(-dsigma)
    if z_next is None:
        z_next = mean + std * _standard_normal(noise, z)
    return z_next, gaussian_log_prob(z_next.float(), mean, std), z0_hat


def cps_step(v, z, sigma: Level, sigma_next: Level, eta: float, z_next=None, noise=None):
    """Coefficients-preserving sampling (2509.05952): swaps a part of the noise in z for fresh noise.

    The total noise stays exactly sigma_next, so the samples carry no excess noise. Arguments and returns are those
    of `flow_sde_step`; eta in [0, 1], about 0.8. As its authors do, the log-probability leaves out the constants
    and the division by the variance: log_prob = -mean((z_next - mean)²), so the ratio is a scaled one.
    """
    v, z, sigma, sigma_next = v.float(), z.float(), _per_sample(sigma, z), _per_sample(sigma_next, z)
    z0_hat = z - sigma * v
    z1_hat = z + (1 - sigma) * v
    std = sigma_next * math.sin(eta * math.pi / 2)
    mean = (1 - sigma_next) * z0_hat + sigma_next * math.cos(eta * math.pi / 2) * z1_hat  # sqrt(sigma'² - std²) z1
    if eta == 0:
        return (mean if z_next is None else z_next.float()), None, z0_hat
    if z_next is None:
        z_next = mean + std * _standard_normal(noise, z)
    return z_next, -((z_next.float() - mean) ** 2).flatten(1).mean(1), z0_hat


def ddim_sde_step(
    eps, z, alpha_bar: Level, alpha_bar_next: Level, eta: float, z_next=None, noise=None, prediction="epsilon"
):
    """One step of the reverse SDE of diffusion (DanceGRPO eq. 5), in its DDIM form (2010.02502, eq. 12 and 16).

    eps, z        (B, ...) network output at z, and z itself = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise
    alpha_bar, alpha_bar_next   the scheduler's cumulative product at z's timestep and at the less noisy next one
    eta           in [0, 1]; 1 gives the variance of DDPM, 0 is deterministic DDIM
    z_next, noise as in `flow_sde_step`
    prediction    what the network predicts: "epsilon", or "v_prediction" (2202.00512) as in Stable Diffusion 2
    Returns z_next (B, ...), log_prob (B,) or None if the step has no noise, z0_hat (B, ...).
    """
    eps, z = eps.float(), z.float()
    alpha_bar, alpha_bar_next = _per_sample(alpha_bar, z), _per_sample(alpha_bar_next, z)
    if prediction == "v_prediction":
        eps = alpha_bar.sqrt() * eps + (1 - alpha_bar).sqrt() * z
    elif prediction != "epsilon":
        raise ValueError(f'prediction must be "epsilon" or "v_prediction", got {prediction!r}')
    z0_hat = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    std = eta * torch.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    mean = alpha_bar_next.sqrt() * z0_hat + (1 - alpha_bar_next - std**2).sqrt() * eps
    if eta == 0 or (std == 0).all():  # the last step of a schedule that ends at alpha_bar = 1
        return (mean if z_next is None else z_next.float()), None, z0_hat
    if z_next is None:
        z_next = mean + std * _standard_normal(noise, z)
    return z_next, gaussian_log_prob(z_next.float(), mean, std), z0_hat


def rollout(
    model: Callable[[Tensor, int], Tensor],
    z: Tensor,
    levels: Tensor,
    eta: float,
    step: Callable = flow_sde_step,
    noise: Callable[[int], Tensor] | None = None,
    window: range | None = None,
):
    """Sample from noise to data and remember the way.

    model   (z (B, ...), step index) → the network's prediction at levels[index], (B, ...)
    z       (B, ...) the initial noise
    levels  (T+1,) sigmas, or alpha_bars with `ddim_sde_step`
    noise   step index → (B, ...) standard normal; None takes torch's global generator
    window  the steps that are stochastic (MixGRPO 2507.21802); None for all of them, the others follow the ODE
    Returns trajectory (B, T+1, ...), log_probs (B, T) with 0 at deterministic steps, and the last z0_hat (B, ...),
    which is what should be decoded and scored: the noise of the last step never reaches it.
    """
    trajectory, log_probs, z0_hat = [z.float()], [], None
    for i in range(len(levels) - 1):
        stochastic = eta > 0 and (window is None or i in window)
        z, log_prob, z0_hat = step(
            model(z, i),
            z,
            levels[i],
            levels[i + 1],
            eta if stochastic else 0.0,
            noise=noise(i) if stochastic and noise is not None else None,
        )
        trajectory.append(z)
        log_probs.append(torch.zeros(len(z), device=z.device) if log_prob is None else log_prob)
    return torch.stack(trajectory, 1), torch.stack(log_probs, 1), z0_hat


def sample_ode(model: Callable[[Tensor, int], Tensor], z: Tensor, levels: Tensor, step: Callable = flow_sde_step):
    """Sample deterministically, as for evaluation and sample pictures: every step with eta = 0. Returns z0 (B, ...)."""
    for i in range(len(levels) - 1):
        z, _, z0_hat = step(model(z, i), z, levels[i], levels[i + 1], 0.0)
    return z0_hat


def _per_sample(level: Level, z: Tensor) -> Tensor:
    """A float, 0-d or (B,) level as float32 that broadcasts against z (B, ...)."""
    level = torch.as_tensor(level, dtype=torch.float32, device=z.device)
    return level.reshape(-1, *[1] * (z.dim() - 1)) if level.dim() else level


def _standard_normal(noise: Tensor | None, z: Tensor) -> Tensor:
    return torch.randn_like(z) if noise is None else noise.to(z)
