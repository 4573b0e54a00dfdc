"""The policy: noise schedules, the Gaussian of one denoising step, its log-probability, and the rollout.

DanceGRPO (arXiv 2505.07818) reads the sampling of a diffusion model as a Markov decision process: the state is
(prompt, step, z), the action is the next latent z_next, and the policy is a Gaussian,

    pi(z_next | z) = N(mean(z, network(z)), std²).

A step function returns that Gaussian and the predicted clean sample. Drawing and scoring are one line each:

    mean, std, z0_hat = flow_sde_step(v, z, sigma, sigma_next, eta)
    z_next = mean + std * noise                        # in the rollout only
    log_prob = gaussian_log_prob(z_next, mean, std)    # in the rollout and in the update, so their ratio starts at 1

This file needs torch only. It knows no model (a model is a callable) and no process group. Every function can be copied
out with the helper that its docstring names.

Legend: B samples, T sampling steps, d elements of one sample, `...` the latent's own dimensions.
Diffusion: z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise; alpha_bar rises to ≈ 1; the network predicts the noise.
Rectified flow: z = (1 - sigma) x0 + sigma x1 with x1 ~ N(0, 1); sigma falls 1 → 0; the network predicts v = x1 - x0.
"""

import math
from typing import NamedTuple

import torch


class Step(NamedTuple):
    """The Gaussian of one step, N(mean, std²), and the clean sample that is predicted there."""

    mean: torch.Tensor  # (B, ...)
    std: torch.Tensor  # broadcasts against mean; 0 where the step is deterministic
    z0_hat: torch.Tensor  # (B, ...)


def flow_sigmas(num_steps: int, shift: float) -> torch.Tensor:
    """Noise levels of rectified flow, 1 → 0, pushed towards noise by `shift` (Stable Diffusion 3, 2403.03206, eq. 23).

    Returns (T+1,) float32. shift = 1 is uniform; the release uses 3 for FLUX, 5 for HunyuanVideo, 7 for SkyReels.
    Raises ValueError unless num_steps >= 1 and shift > 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"flow_sigmas needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    sigma = torch.linspace(1, 0, num_steps + 1)
    return shift * sigma / (1 - sigma + shift * sigma)  # exactly 1 at sigma = 1, whatever the shift


def gaussian_log_prob(x, mean, std) -> torch.Tensor:
    """log N(x; mean, std²), the MEAN over the d elements of each sample.

    x, mean (B, ...); std > 0, a number, (B,), or of as many dimensions as mean. Returns (B,) float32.
    The mean and not the sum: with d in the hundreds of thousands the true ratio would leave any clip range at once.
    With the mean, rho is the d-th root of the true ratio, so a clip range as small as 1e-4 fits.
    """
    std = torch.as_tensor(std, dtype=torch.float32, device=x.device)
    std = std.reshape(*std.shape, *[1] * (x.dim() - std.dim()))
    log_prob = -((x.float() - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_prob.flatten(1).mean(1)


def cps_log_prob(x, mean, std) -> torch.Tensor:
    """-mean((x - mean)²), the log-probability that the authors of `cps_step` use (2509.05952). Returns (B,) float32.

    It leaves out the constants and the division by the variance, so all steps have the same weight. std is not used;
    the arguments are those of `gaussian_log_prob`.
    """
    return -((x.float() - mean) ** 2).flatten(1).mean(1)


def gaussian_kl(mean, old_mean, std) -> torch.Tensor:
    """KL(N(old_mean, std²) || N(mean, std²)) = (mean - old_mean)² / (2 std²), the MEAN over the d elements.

    mean, old_mean (B, ...); std a number, (B,), or what a step function returns. Returns (B,) float32.
    """
    std = torch.as_tensor(std, dtype=torch.float32, device=mean.device).reshape(-1, *[1] * (mean.dim() - 1))
    return ((mean - old_mean) ** 2 / (2 * std**2)).flatten(1).mean(1)


def guarded_loss(ratio, log_ratio, kl, A, std, dsigma, epsilon):
    """GRPO's objective with another trust region than the clipped ratio, against over-optimisation.

    ratio      "guard" or "dppo"
    log_ratio  (M,) log p - log p_old, means over elements; kl (M,) of the step, as from `gaussian_kl`
    A          (M,) advantages; std (M, …) of the step; dsigma (M,) sigma - sigma_next, above 0
    epsilon    the clip range of the ratio (guard), or the largest KL (dppo)
    Returns the loss and rho (M,).
    guard, GRPO-Guard (2510.22319): rho = exp(std (log p - log p_old + KL)) = exp(mean(noise (mean - mean_old))). Its
    log has mean 0 at every step, where the plain ratio's has -KL, so clipping acts on both sides. A is divided by
    dsigma, since the gradient of a step's mean with respect to v is about dsigma.
    dppo, Flow-DPPO (2606.11025): rho A, not clipped. A pair is left out if its KL exceeds epsilon and it moves further
    away: A > 0 with rho > 1, or A < 0 with rho < 1.
    """
    if ratio == "guard":
        rho, A = torch.exp(std.flatten() * (log_ratio + kl)), A / dsigma
        objective = torch.minimum(rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A)
    else:
        rho = torch.exp(log_ratio)
        objective = rho * A * ((kl <= epsilon) | (log_ratio * A <= 0))
    return -objective.mean(), rho.detach()


def column(level, z) -> torch.Tensor:
    """A level, number or (B,), as float32 that broadcasts against z (B, ...)."""
    return torch.as_tensor(level, dtype=torch.float32, device=z.device).reshape(-1, *[1] * (z.dim() - 1))


def flow_sde_step(v, z, sigma, sigma_next, eta):
    """The reverse SDE of rectified flow, dz = (v - ½ eta² score) dsigma + eta dw (DanceGRPO, eq. 8), one Euler step.

    v, z (B, ...): the velocity predicted at z, and z. sigma in (0, 1]: the level of z; sigma_next in [0, 1]: the
    lower one to reach; floats or (B,). eta >= 0: the noise; 0 gives the Euler step of the ODE.
    Returns the named tuple `Step`: mean (B, ...), std, z0_hat (B, ...), float32. Needs `column`.
    """
    sigma, sigma_next = column(sigma, z), column(sigma_next, z)
    v, z = v.float(), z.float()
    z0_hat = z - sigma * v
    score = -(z - (1 - sigma) * z0_hat) / sigma**2  # ∇log p(z) by Tweedie's formula, z0_hat standing for E[x0 | z]
    mean = z + (v - 0.5 * eta**2 * score) * (sigma_next - sigma)
    return Step(mean, eta * torch.sqrt(sigma - sigma_next), z0_hat)


def flow_grpo_sde_step(v, z, sigma, sigma_next, eta):
    """The SDE step of Flow-GRPO (2505.05470, eq. 9): noise s = eta sqrt(sigma / (1 - sigma)), where DanceGRPO's is eta.

    Arguments and result are those of `flow_sde_step`, a `Step`; needs `column`. eta is the paper's `a`, about 0.7.
    At sigma = 1, where s would be infinite, sigma_next replaces sigma in the denominator, as in the authors' code.
    """
    sigma, sigma_next = column(sigma, z), column(sigma_next, z)
    v, z = v.float(), z.float()
    z0_hat = z - sigma * v
    dsigma = sigma_next - sigma
    s = eta * torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_next, sigma)))
    mean = z * (1 + s**2 / (2 * sigma) * dsigma) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dsigma
    return Step(mean, s * torch.sqrt(-dsigma), z0_hat)


def cps_step(v, z, sigma, sigma_next, eta):
    """Coefficients-preserving sampling (2509.05952): a part of the noise in z is replaced by fresh noise.

    For data that are a single point the noise of z_next is exactly sigma_next, at any size of step. Otherwise z_next
    varies too little, since the predicted x0 and x1 are means. Arguments and result are those of `flow_sde_step`, a
    `Step`; needs `column`. eta in [0, 1], about 0.8. Its log-probability is `cps_log_prob`.
    """
    sigma, sigma_next = column(sigma, z), column(sigma_next, z)
    v, z = v.float(), z.float()
    z0_hat = z - sigma * v
    z1_hat = z + (1 - sigma) * v
    mean = (1 - sigma_next) * z0_hat + sigma_next * math.cos(eta * math.pi / 2) * z1_hat  # sqrt(sigma'² - std²) z1
    return Step(mean, sigma_next * math.sin(eta * math.pi / 2), z0_hat)


def ddim_sde_step(eps, z, alpha_bar, alpha_bar_next, eta, prediction="epsilon"):
    """The reverse SDE of diffusion (DanceGRPO, eq. 7, if steps are small) in DDIM's form (2010.02502, eq. 12 and 16).

    eps, z (B, ...): the network's output at z, and z itself. alpha_bar, alpha_bar_next: the scheduler's cumulative
    product at the timestep of z and at the less noisy next one, floats or (B,). eta in [0, 1], eps_t in eq. 7, whose
    score is -eps / sqrt(1 - alpha_bar): 1 gives the variance of DDPM, 0 deterministic DDIM. prediction: the network's,
    "epsilon" or "v_prediction" (2202.00512; Stable Diffusion 2); ValueError for any other. Returns the named tuple
    `Step`: mean (B, ...), std, z0_hat (B, ...), float32. Needs `column`.
    """
    alpha_bar, alpha_bar_next = column(alpha_bar, z), column(alpha_bar_next, z)
    eps, z = eps.float(), z.float()
    if prediction == "v_prediction":
        eps = alpha_bar.sqrt() * eps + (1 - alpha_bar).sqrt() * z
    elif prediction != "epsilon":
        raise ValueError(f'prediction must be "epsilon" or "v_prediction", got {prediction!r}')
    z0_hat = (z - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
    std = eta * torch.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next))
    mean = alpha_bar_next.sqrt() * z0_hat + (1 - alpha_bar_next - std**2).sqrt() * eps
    return Step(mean, std, z0_hat)


def sde_window(iteration: int, num_steps: int, size: int, every: int) -> range:
    """The stochastic steps: with size 0 all but the last, else a window of `size` steps (MixGRPO, 2507.21802).

    The window starts at the noisy end and slides towards the data by one step in `every` iterations. The last step is
    never in it: its noise does not reach the image, which is decoded from the last prediction of x0.
    """
    if size == 0:
        return range(num_steps - 1)
    start = iteration // every % (num_steps - size)
    return range(start, start + size)


def distinct(pairs, group_size: int, shared_noise: bool) -> tuple[list[int], list[int]]:
    """Which of the pairs (sample, step) the network evaluates; for each pair, where its prediction is among theirs.

    With shared noise all samples of a group have the same z at step 0: one evaluation serves all that are in `pairs`.
    """
    states = [(i - i % group_size if shared_noise and t == 0 else i, t) for i, t in pairs]
    once = list(dict.fromkeys(states))
    return [states.index(state) for state in once], [once.index(state) for state in states]


def rollout(model, z, levels, eta, step=flow_sde_step, noise=None, window=None, log_prob=gaussian_log_prob):
    """Sample from noise to data; keep every latent and the log-probability of every draw.

    model     (z (B, ...), step index) → the network's prediction at levels[index], (B, ...)
    z         (B, ...) the initial noise
    levels    (T+1,) sigmas, or alpha_bars with `ddim_sde_step`
    noise     step index → (B, ...) standard normal; None takes torch's global generator
    window    the stochastic steps (MixGRPO, 2507.21802), else ODE; None: all, even the last, which trainers omit
    step, log_prob   `flow_sde_step` with `gaussian_log_prob`, or another step function with its log-probability
    Returns trajectory (B, T+1, ...), log_probs (B, T) with 0 at deterministic steps, and the last z0_hat (B, ...).
    That z0_hat is what to decode and score: the noise of the last step never reaches it.
    """
    num_steps = len(levels) - 1
    trajectory, log_probs, z0_hat = [z.float()], torch.zeros(len(z), num_steps, device=z.device), z
    for t in range(num_steps):
        stochastic = eta > 0 and (window is None or t in window)
        mean, std, z0_hat = step(model(z, t), z, levels[t], levels[t + 1], eta if stochastic else 0.0)
        z = mean
        if stochastic:
            z = mean + std * (torch.randn_like(mean) if noise is None else noise(t))
            log_probs[:, t] = log_prob(z, mean, std)
        trajectory.append(z)
    return torch.stack(trajectory, 1), log_probs, z0_hat


def sample_ode(model, z, levels, step=flow_sde_step) -> torch.Tensor:
    """Sample deterministically, as for evaluation: every step of `flow_sde_step`, or of another, with eta = 0.

    Arguments are those of `rollout`. Returns the last z0_hat (B, ...).
    """
    z0_hat = z
    for t in range(len(levels) - 1):
        z, _, z0_hat = step(model(z, t), z, levels[t], levels[t + 1], 0.0)
    return z0_hat


# The option --sde: the step function of rectified flow, and the log-probability of a draw from its Gaussian.
SDE = {
    "dance": (flow_sde_step, gaussian_log_prob),
    "flow": (flow_grpo_sde_step, gaussian_log_prob),
    "cps": (cps_step, cps_log_prob),
}
