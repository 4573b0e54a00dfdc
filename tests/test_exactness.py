"""Problems whose answers are known in closed form: what the SDEs draw, and which gradient GRPO follows.

Each test is a page: what is known, the formula, the library beside it. The formulas are written here in plain numbers
and use nothing of `sampling.py`. Data are one-dimensional, so d = 1.

Legend: sigma and sigma_ the levels of a step, the noisier first (alpha, alpha_ for diffusion); eta the noise; T steps,
of which K are stochastic and trained; G samples of a group; r rewards, A advantages, eps standard normal draws.
"""

import functools
import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Categorical, MixtureSameFamily, Normal

import grpo_flux
import grpo_sd
import grpo_video
import small
from grpo_flux import choose_steps, deal, group_advantages, grpo_loss
from runtime import data
from runtime.options import parse_config
from sampling import (
    SDE,
    ddim_sde_step,
    flow_grpo_sde_step,
    flow_sde_step,
    flow_sigmas,
    gaussian_kl,
    gaussian_log_prob,
    rollout,
    sample_ode,
    sde_window,
)
from test_readme import read, table

STEPS = {name: step for name, (step, _) in SDE.items()} | {"ddim": ddim_sde_step}


@functools.cache
def ddim_alphas(T):
    """alpha_bar of Stable Diffusion's T timesteps and after the last, (T+1,), by diffusers' scheduler."""
    scheduler = DDIMScheduler.from_pretrained("tiny/sd", subfolder="scheduler")
    scheduler.set_timesteps(T)
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])


# ------------------------------------------------------------------------------- (a) with small steps, the marginals
# Data x0 are a mixture of Gaussians. z = a x0 + b noise is one too, at every level: a mode N(m, s²) becomes
# N(a m, a² s² + b²). Flow: a = 1 - sigma, b = sigma. Diffusion: a = sqrt(alpha), b = sqrt(1 - alpha).

GAUSSIAN = [(1.0, 1.5, 0.5)]  # weight, m, s of each mode
TWO_MODES = [(0.3, -1.0, 0.3), (0.7, 1.0, 0.5)]


def of_level(step, level):
    """(a, b) of z = a x0 + b noise."""
    return (level.sqrt(), (1 - level).sqrt()) if step is ddim_sde_step else (1 - level, level)


def marginal(modes, a, b):
    weights, m, s = torch.tensor(modes, dtype=torch.float64).T
    return MixtureSameFamily(Categorical(weights), Normal(a * m, torch.sqrt((a * s) ** 2 + b**2)))


def exact_output(step, modes, z, level):
    """The best network's output at z: E[noise | z] for diffusion, E[noise - x0 | z] for flow, by Tweedie's formula."""
    a, b = of_level(step, level.clamp(max=1 - 1e-6))  # x0 is 0 / 0 where z has nothing of it
    z = z.double().requires_grad_()
    with torch.enable_grad():
        score = torch.autograd.grad(marginal(modes, a, b).log_prob(z).sum(), z)[0]
    noise = -b * score
    return noise.detach() if step is ddim_sde_step else (noise - (z - b * noise) / a).detach()


@pytest.mark.parametrize("modes", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two-modes"])
@pytest.mark.parametrize(
    "step, eta",
    [(ddim_sde_step, 1.0), (ddim_sde_step, 0.5), (flow_sde_step, 1.0), (flow_grpo_sde_step, 0.7)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_with_small_steps_every_latent_has_its_marginal_distribution(step, eta, modes):
    """The density p of z on a grid. A step makes it p'(z') = ∫ N(z'; mean(z), std²) p(z) dz: no sampling error.

    What is left is the error of the steps. Twice as many halve it.
    """
    grid, errors = torch.linspace(-5, 5, 401), []  # 0.025 apart
    for T in (20, 40):
        levels = torch.linspace(0.95, 0.3, T + 1).double()  # sigma, the share of noise
        levels = 1 - levels**2 if step is ddim_sde_step else levels
        p = marginal(modes, *of_level(step, levels[0])).log_prob(grid).exp()
        for t in range(T):
            out = exact_output(step, modes, grid, levels[t])
            mean, std, _ = step(out[:, None], grid[:, None], levels[t], levels[t + 1], eta)
            p = p @ Normal(mean, std).log_prob(grid).exp().double() * 0.025
        exact = marginal(modes, *of_level(step, levels[T])).log_prob(grid).exp()
        errors.append((p - exact).abs().sum().item() * 0.025 / 2)  # total variation: the mass in the wrong place
    assert errors[1] < 0.015 and errors[1] < 0.6 * errors[0], errors


@pytest.mark.parametrize("modes", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two-modes"])
@pytest.mark.parametrize("step", [ddim_sde_step, flow_sde_step], ids=lambda step: step.__name__)
def test_the_ode_carries_each_quantile_of_the_noise_to_that_of_the_data(step, modes):
    """Without noise no two paths cross, so as much mass lies left of a path at its end as at its start."""
    levels = torch.linspace(0, 1, 251) ** 2 * 0.9999 + 5e-5 if step is ddim_sde_step else flow_sigmas(250, 1.0)
    z = torch.linspace(-2, 2, 9)[:, None]  # standard deviations of the noise
    z0 = sample_ode(lambda z, t: exact_output(step, modes, z, levels[t].double()), z, levels, step)
    of_noise, of_data = (marginal(kind, 1, 0).cdf(x.double()) for kind, x in (([(1.0, 0.0, 1.0)], z), (modes, z0)))
    torch.testing.assert_close(of_data, of_noise, rtol=0, atol=0.01)


# ---------------------------------------------------------------------------- (b) with large steps, the exact variance
# Data x0 ~ N(m, s²). The best prediction is linear in z, so a step takes z to slope z + offset + std eps, and mean and
# variance of the latents follow a recursion. s = 0: content that the prompt determines; z should be m and noise only.


def posterior(sde, z, level, m, s):
    """E[x0 | z] and E[noise | z] for z = a x0 + b noise, by the covariances of (x0, noise, z)."""
    a, b = (math.sqrt(level), math.sqrt(1 - level)) if sde == "ddim" else (1 - level, level)
    D = a**2 * s**2 + b**2  # the variance of z, whose mean is a m
    return m + a * s**2 / D * (z - a * m), b / D * (z - a * m)


def gaussian_of_step(sde, z, level, level_, eta, m, s):
    """Mean and std of the next latent after z, a number, with the best prediction."""
    x0, noise = posterior(sde, z, level, m, s)
    if sde == "ddim":
        std = eta * math.sqrt((1 - level_) / (1 - level) * (1 - level / level_))
        return math.sqrt(level_) * x0 + math.sqrt(1 - level_ - std**2) * noise, std
    if sde == "cps":
        std = level_ * math.sin(eta * math.pi / 2)
        return (1 - level_) * x0 + math.sqrt(level_**2 - std**2) * noise, std
    g = eta if sde == "dance" else eta * math.sqrt(level / (1 - (level_ if level == 1 else level)))
    v, score = noise - x0, -noise / level
    dt = level_ - level
    return z + (v - g**2 / 2 * score) * dt, g * math.sqrt(-dt)  # dz = (v - g²/2 score) dt + g dw


def moments(sde, levels, eta, stochastic, m, s):
    """Mean and variance of each latent, from z ~ N(0, 1). stochastic: those steps; the others have eta = 0."""
    mean, variance, found = 0.0, 1.0, [(0.0, 1.0)]
    for t in range(len(levels) - 1):
        step = *levels[t : t + 2], eta if t in stochastic else 0.0, m, s
        offset, std = gaussian_of_step(sde, 0.0, *step)
        slope = gaussian_of_step(sde, 1.0, *step)[0] - offset
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
        found.append((mean, variance))
    return found


@pytest.mark.parametrize("sde, eta", [("dance", 0.3), ("dance", 2.0), ("flow", 0.7), ("cps", 0.8), ("ddim", 1.0)])
@pytest.mark.parametrize("T, window", [(6, 5), (16, 15), (6, 2)])
@pytest.mark.parametrize("m, s", [(0.0, 1.0), (1.5, 0.5), (1.5, 0.0)])
def test_the_rollout_has_exactly_the_moments_of_the_recursion(sde, eta, T, window, m, s):
    """All steps are linear. A path without noise is the mean; the variance adds up what a unit of each draw changes."""
    levels = ddim_alphas(T) if sde == "ddim" else flow_sigmas(T, 3.0)
    draws = torch.eye(T + 2)[:, 1:, None]  # (path, draw, 1); draw 0 is the initial noise

    def network(z, t):
        x0, noise = posterior(sde, z, levels[t].item(), m, s)
        return noise if sde == "ddim" else noise - x0

    trajectory, _, _ = rollout(
        network, draws[:, 0], levels, eta, STEPS[sde], noise=lambda t: draws[:, t + 1], window=range(window)
    )
    mean, others = trajectory[0, :, 0].double(), trajectory[1:, :, 0].double()
    expected = torch.tensor(moments(sde, levels.tolist(), eta, range(window), m, s), dtype=torch.float64)
    torch.testing.assert_close(mean, expected[:, 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(((others - mean) ** 2).sum(0).sqrt(), expected[:, 1].sqrt(), rtol=1e-4, atol=1e-5)


def too_noisy(cfg, s):
    """By how many per cent the latent before the last step has too large a standard deviation."""
    sde = getattr(cfg, "sde", "ddim")
    levels = (ddim_alphas(cfg.steps) if sde == "ddim" else flow_sigmas(cfg.steps, cfg.shift)).double().tolist()
    stochastic = sde_window(0, cfg.steps, cfg.sde_window, cfg.sde_window_every)
    _, variance = moments(sde, levels, cfg.eta, stochastic, 1.0, s)[-2]
    a, b = of_level(STEPS[sde], torch.tensor(levels[-2], dtype=torch.float64))
    return 100 * (math.sqrt(variance / (a**2 * s**2 + b**2)) - 1)


def options_of(words, preset):
    """("grpo_flux.py --eta 2", "tiny") → the options of this command; None if its script has no such preset."""
    script, *more = words.split()
    trainer = {"grpo_flux.py": grpo_flux, "grpo_sd.py": grpo_sd, "grpo_video.py": grpo_video}[script]
    if preset in trainer.PRESETS:
        return parse_config(trainer.Config, trainer.PRESETS, ["--preset", preset, *more])


def per_cent(x):
    return "over 1000 %" if x > 1000 else f"{x:.1f} %".replace("-0.0", "0.0")


def test_the_table_of_eta_is_that_of_the_recursion():
    """docs/questions.md, beside --eta: how much too noisy fixed content is, by SDE, eta, and the steps of a preset."""
    presets = ["tiny", "tiny-fast", "fast", "lora", "release", "paper"]
    found = table("docs/questions.md", " | ".join(["options", *(f"`{preset}`" for preset in presets)]))
    assert {words.split()[0] for words in found} == {"grpo_flux.py", "grpo_sd.py", "grpo_video.py"}
    for words, cells in found.items():
        options = [options_of(words, preset) for preset in presets]
        assert cells == [per_cent(too_noisy(cfg, 0.0)) if cfg else "-" for cfg in options], words


def test_what_has_no_excess_noise_may_vary_too_little():
    """The same for content of variance 1: the sentence on CPS and DDIM, and what small steps change in it."""
    commands = ["grpo_flux.py --sde cps --eta 0.8", "grpo_sd.py"]
    cps, ddim = (per_cent(too_noisy(options_of(words, "release"), 1.0)) for words in commands)
    text = " ".join(read("docs/questions.md").split())
    assert f"{cps} with `--sde cps --eta 0.8` at FLUX's `release`, {ddim} at Stable Diffusion's" in text
    errors = {words: too_noisy(options_of(f"{words} --steps 400", "release"), 1.0) for words in commands}
    assert errors[commands[0]] < -19 and -1 < errors[commands[1]] < 0


# ----------------------------------------------------------------------------------- (c) the gradient that GRPO follows
# The policy: velocities v = a_t z + b_t, from which `flow_sde_step` draws; the reward: r = -(z0 - c)². All latents are
# Gaussian, so J = E[r] = -(E[z0] - c)² - Var[z0] is a formula in a and b, and autograd gives its exact gradient.

M, S, C = 1.5, 0.5, 0.0  # data x0 ~ N(M, S²); a and b are its exact velocity; the best z0 is C


def linear_velocity(levels):
    """theta (T, 2): a_t and b_t of E[noise - x0 | z] for the data."""
    values = [[noise - x0 for x0, noise in (posterior("flow", z, s, M, S) for z in (0.0, 1.0))] for s in levels[:-1]]
    return torch.tensor([[one - zero, zero] for zero, one in values], dtype=torch.float64)


def expected_reward(theta, levels, eta, window):
    """J by the recursion for mean and variance of z. The score is -(z + (1 - sigma) v) / sigma."""
    mean, variance = 0.0, 1.0
    for t, (sigma, sigma_) in enumerate(pairwise(levels[:-1])):
        g2, dt, (a, b) = eta**2 if t in window else 0.0, sigma_ - sigma, theta[t]
        of_v = dt * (1 + g2 * (1 - sigma) / (2 * sigma))  # d mean / d v
        slope = 1 + dt * g2 / (2 * sigma) + of_v * a
        mean, variance = slope * mean + of_v * b, slope**2 * variance - g2 * dt
    (a, b), sigma = theta[-1], levels[-2]  # the last step gives z0 = z - sigma v
    return -(((1 - sigma * a) * mean - sigma * b - C) ** 2) - (1 - sigma * a) ** 2 * variance


def exact_gradient(levels, eta, window):
    """dJ / d theta, (T, 2), through every step."""
    levels = levels.double().tolist()
    theta = linear_velocity(levels).requires_grad_()
    return torch.autograd.grad(expected_reward(theta, levels, eta, window), theta)[0]


def grpo_gradient(levels, eta, window, advantages, G):
    """The expectation of minus the gradient of `grpo_loss`, times the K steps over which it is a mean; (T, 2).

    advantages: rewards (n, G) → A (n, G), of n groups. Expectations over the initial noise, which a group shares, and
    over G K draws are sums over the nodes of Gauss and Hermite: with three for each draw they are exact for polynomials
    of degree 5.
    """
    K = len(window)
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)]), torch.tensor([1 / 6, 2 / 3, 1 / 6])
    draws, weights = (torch.cartesian_prod(*[x] * (1 + G * K)) for x in nodes)
    n, weight = len(draws), weights.prod(1, keepdim=True).double()  # (n, 1), of a group
    eps = draws[:, 1:].reshape(n * G, K, 1)
    theta = linear_velocity(levels.tolist()).float().requires_grad_()

    def velocity(z, t):
        return theta[t, 0] * z + theta[t, 1]

    start = draws[:, :1].repeat_interleave(G, 0)
    with torch.no_grad():
        z, old_log_prob, z0 = rollout(
            velocity, start, levels, eta, noise=lambda t: eps[:, t - window[0]], window=window
        )
    A = n * weight * advantages(-((z0.double() - C) ** 2).view(n, G))  # a mean of these is the expectation
    log_prob = []
    for t in window:
        mean, std, _ = flow_sde_step(velocity(z[:, t], t), z[:, t], levels[t], levels[t + 1], eta)
        log_prob.append(gaussian_log_prob(z[:, t + 1], mean, std))
    loss, _ = grpo_loss(torch.cat(log_prob), old_log_prob.T[list(window)].flatten(), A.flatten().repeat(K), 1e-4)
    return -K * torch.autograd.grad(loss, theta)[0].double()


def not_divided(r):
    """r - mean(r) of each group: the advantages of eq. 10, times the standard deviation again."""
    A = group_advantages({"r": r.flatten()}, {"r": 1.0}, r.shape[1], 1e9).view(r.shape)
    return A * r.std(1, keepdim=True)


@pytest.mark.parametrize("G, T", [(2, 3), (2, 5), (3, 3), (4, 3)])
def test_the_mean_of_the_group_takes_1_of_G_from_the_gradient(G, T):
    """E[(r_i - mean(r)) d log pi_i] = (1 - 1/G) dJ, since the mean contains r_i: the other r_j do not depend on draw i.

    It holds for each parameter of each stochastic step.
    """
    levels, window = flow_sigmas(T, 3.0), range(T - 1)
    found, exact = grpo_gradient(levels, 1.0, window, not_divided, G), exact_gradient(levels, 1.0, window)
    assert exact[:-1].abs().min() > 1e-3  # at T = 5 from 0.002 to 0.11
    torch.testing.assert_close(found[:-1], (G - 1) / G * exact[:-1], rtol=1e-4, atol=1e-7)


def untrained_share(cfg):
    """A shift of the velocity at all steps changes J by Σ ∂J/∂b_t. Returns the share of the steps without training."""
    levels, window = flow_sigmas(cfg.steps, cfg.shift), sde_window(0, cfg.steps, cfg.sde_window, cfg.sde_window_every)
    of_shift = exact_gradient(levels, cfg.eta, window)[:, 1]
    assert (of_shift > 0).all()
    return 1 - (of_shift[list(window)].sum() / of_shift.sum()).item()


@pytest.mark.parametrize("preset, share", [("tiny", 0.562), ("tiny-fast", 0.931), ("release", 0.216), ("paper", 0.138)])
def test_the_deterministic_steps_leave_out_a_part_of_the_gradient(preset, share):
    """The last step and those outside the window change z0 too. GRPO has no gradient for them: pinned is their part.

    docs/questions.md has these figures.
    """
    cfg = options_of("grpo_flux.py", preset)
    assert untrained_share(cfg) == pytest.approx(share, abs=5e-4)
    assert f"{100 * share:.0f} % with `{preset}`" in " ".join(read("docs/questions.md").split())
    if preset == "tiny-fast":
        levels, window = flow_sigmas(cfg.steps, cfg.shift), range(cfg.sde_window)
        found, exact = grpo_gradient(levels, cfg.eta, window, not_divided, 2), exact_gradient(levels, cfg.eta, window)
        torch.testing.assert_close(found[:2], exact[:2] / 2, rtol=1e-4, atol=1e-7)
        assert (found[2:] == 0).all() and exact[2:, 1].min() > exact[:2, 1].max()


# One step, whose mean is the parameter: x = u + s eps, d log pi / du = eps / s.


def gradient_of_mean(u, s, reward, G, n=100_000):
    """Minus the gradient of `grpo_loss` in u, with the advantages of eq. 10: mean over n groups, its standard error."""
    eps = torch.randn(n * G, 1, generator=torch.Generator().manual_seed(0))
    x, mean = u + s * eps, torch.full((n, 1), u, requires_grad=True)  # a mean for each group
    log_prob = gaussian_log_prob(x, mean.repeat_interleave(G, 0), s)
    A = group_advantages({"r": reward(x[:, 0].double())}, {"r": 1.0}, G, 1e9)
    loss, _ = grpo_loss(log_prob, log_prob.detach(), A, 1e-4)
    of_group = -n * torch.autograd.grad(loss, mean)[0]
    return of_group.mean().item(), of_group.std().item() / math.sqrt(n)


def spread_of_normal(G):
    """c(G), the expectation of the standard deviation of G normal draws."""
    return math.sqrt(2 / (G - 1)) * math.exp(math.lgamma(G / 2) - math.lgamma((G - 1) / 2))


@pytest.mark.parametrize("G", [2, 4, 12])
def test_a_linear_reward_has_its_gradient_divided_by_its_spread_but_for_a_factor(G):
    """r = k x, k > 0: A = (eps - mean(eps)) / std(eps) whatever k is, and Σ A_i eps_i = (G - 1) std(eps). So

    E[A d log pi] = (G - 1)/G c(G) / s, where c(G) is the expected standard deviation of G normal draws. The spread of
    r is k s, so this is dJ = k over the spread, times (G - 1)/G c(G).
    """
    c = spread_of_normal(G)
    found, error = gradient_of_mean(0.3, 0.5, lambda x: 7 * x, G)
    assert error < 0.01
    assert found == pytest.approx((G - 1) / G * c / 0.5, abs=4 * error)
    assert (G - 1) / G * c == pytest.approx({2: 0.399, 4: 0.691, 12: 0.896}[G], abs=5e-4)


@pytest.mark.parametrize("distance", [-2.0, 0.25, 1.0])
def test_the_division_by_the_spread_makes_far_prompts_count_as_near_ones(distance):
    """r = -(x - c)², u - c = distance: dJ/du = -2 distance, without a limit. Two samples, G = 2, have A = ±1/sqrt(2):

    E[A d log pi] = -erf(distance / s) / (s sqrt(2 pi)), because eps_1 - eps_2 and eps_1 + eps_2 are independent.
    """
    s = 0.5
    found, error = gradient_of_mean(1.0 + distance, s, lambda x: -((x - 1) ** 2), 2)
    assert error < 0.005
    assert found == pytest.approx(-math.erf(distance / s) / (s * math.sqrt(2 * math.pi)), abs=4 * error)


def test_the_division_by_the_spread_moves_the_optimum_of_several_prompts():
    """Three prompts want x = 0, 0 and 3. E[r] is largest at their mean, u = 1.

    With A of eq. 10 and G = 2 training stops where Σ erf(u - c) = 0: at 0.477, near the median.
    """
    wanted, optimum = (0.0, 0.0, 3.0), 0.477
    assert abs(sum(math.erf(optimum - c) for c in wanted)) < 2e-3

    def gradient(u):
        of_prompts = [gradient_of_mean(u, 1.0, lambda x, c=c: -((x - c) ** 2), 2) for c in wanted]
        return sum(mean for mean, _ in of_prompts), sum(error for _, error in of_prompts)

    (stopped, error), (at_mean, _) = gradient(optimum), gradient(1.0)
    assert error < 0.01 and abs(stopped) < 4 * error
    assert at_mean == pytest.approx(-sum(math.erf(1 - c) for c in wanted) / math.sqrt(2 * math.pi), abs=4 * error)
    assert f"training stops at {optimum:.2f}" in read("docs/questions.md")
    assert at_mean < -0.2  # the paper's gradient is not 0 where that of E[r] is


# ----------------------------------------------------------------------------------- (d) an optimum under the path's KL
# With the velocity v_ref, the reference policy gives the paths z_T … z_1 the measure P. Among all measures Q with the
# same initial noise, E_Q[r] - beta KL(Q || P) is largest at Q = P exp(r / beta) / Z. If r = k z0 is linear, with
# z0 = Σ_t c_t eps_t + what depends on z_T, this Q only shifts the draws: eps_t ~ N(h_t, 1) with h_t = k c_t / beta.
# That is a policy of ours, v = v_ref + std_t h_t / D_t, where D_t = d mean / d v. Its KL is Σ_t h_t² / 2.


def of_steps(levels, eta):
    """std_t, D_t, and c_t = d z0 / d eps_t of the T - 1 stochastic steps, each (T-1,), for the exact velocity."""
    steps = list(pairwise(levels[:-1]))
    std = [eta * math.sqrt(sigma - sigma_) for sigma, sigma_ in steps]
    D = [(sigma_ - sigma) * (1 + eta**2 * (1 - sigma) / (2 * sigma)) for sigma, sigma_ in steps]
    a = linear_velocity([*levels])[:, 0].tolist()
    slope = [1 + (sigma_ - sigma) * eta**2 / (2 * sigma) + D[t] * a[t] for t, (sigma, sigma_) in enumerate(steps)]
    slope.append(1 - levels[-2] * a[-1])  # of the last step, z0
    c = [std[t] * math.prod(slope[t + 1 :]) for t in range(len(steps))]
    return (torch.tensor(x, dtype=torch.float64) for x in (std, D, c))


def trained_shift(levels, eta, k, penalty, G, n=256, iterations=180):
    """h (T-1,) after GRPO from h = 0: each iteration is a rollout of n groups and one update; mean of the last 100.

    penalty: (v - v_ref, mean, mean of v_ref, std) of all pairs (sample, step) → what is added to the loss.
    """
    T, generator = len(levels) - 1, torch.Generator().manual_seed(0)
    v_ref, (std_of, D, _) = linear_velocity(levels.tolist()).float(), of_steps(levels.double().tolist(), eta)
    h, per_h, kept = torch.zeros(T - 1, requires_grad=True), (std_of / D).float(), []
    for _ in range(iterations):
        u = per_h * h
        eps = torch.randn(T, n * G, 1, generator=generator)
        start = torch.randn(n, 1, generator=generator).repeat_interleave(G, 0)
        shift = [*u.tolist(), 0.0]  # the last step is not trained
        z, old_log_probs, z0 = rollout(
            lambda z, t, shift=shift: v_ref[t, 0] * z + v_ref[t, 1] + shift[t],
            start, levels, eta, noise=lambda t, eps=eps: eps[t], window=range(T - 1),
        )  # fmt: skip
        A = group_advantages({"r": k * z0[:, 0]}, {"r": 1.0}, G, 1e9)
        t, z, z_next = torch.arange(T - 1).repeat(n * G), z[:, :-2].reshape(-1, 1), z[:, 1:-1].reshape(-1, 1)
        v = v_ref[t, :1] * z + v_ref[t, 1:]
        mean_ref, std, _ = flow_sde_step(v, z, levels[t], levels[t + 1], eta)
        mean, _, _ = flow_sde_step(v + u[t, None], z, levels[t], levels[t + 1], eta)
        log_prob, old_log_prob = gaussian_log_prob(z_next, mean, std), old_log_probs[:, :-1].flatten()
        loss, _ = grpo_loss(log_prob, old_log_prob, A.repeat_interleave(T - 1), 1e-4)
        loss = loss + penalty(u[t, None], mean, mean_ref, std)
        with torch.no_grad():
            h -= 0.1 * (T - 1) * torch.autograd.grad(loss, h)[0]
        kept.append(h.detach().clone())
    return torch.stack(kept[-100:]).mean(0).double()


@pytest.mark.parametrize("term", ["path", "velocity"])
def test_training_reaches_the_optimum_under_a_kl_term(term):
    """At the steps of the preset tiny. A is r over the spread of its group, |k c|, times (G - 1)/G c(G), see (c).

    path: the loss gets beta times the KL of each step's Gaussians. The optimum is that of r / |k c| (G - 1)/G c(G), so
        h_t = (G - 1)/G c(G) / beta · c_t / |c|.
    velocity: the trainers' --kl-weight, beta |v - v_ref|². The KL of a step is w_t |v - v_ref|² with
        w_t = D_t² / (2 std_t²), so this is the KL of the path over w_t, and h_t has the factor w_t.
    The error of h_t by chance is about 1 / sqrt(100 n G) = 0.002 times a few, as the 100 iterations are correlated.
    """
    cfg, G = options_of("grpo_flux.py", "tiny"), 8
    levels = flow_sigmas(cfg.steps, cfg.shift)
    std, D, c = of_steps(levels.double().tolist(), cfg.eta)
    beta = {"path": 0.5, "velocity": 0.2}[term]
    optimum = (G - 1) / G * spread_of_normal(G) / beta * c / c.norm()
    if term == "velocity":
        optimum *= D**2 / (2 * std**2)

    def penalty(difference, mean, mean_ref, std):
        return beta * (gaussian_kl(mean, mean_ref, std) if term == "path" else difference**2).mean()

    h = trained_shift(levels, cfg.eta, 3.0, penalty, G)
    assert optimum.norm() > 0.5
    torch.testing.assert_close(h, optimum, rtol=0, atol=0.015)


# ----------------------------------------------------------------- (e) the trainers' gradient is that of equation 9


def prediction(case, network, arguments, i, t, z):
    """v, or the noise, of each pair of sample i and step t. arguments: those of `sample_groups`."""
    cfg, _, _, _, text, _, _, schedule, _, *rows = arguments
    if case == "sd":
        return grpo_sd.predict(network, z, schedule[0][t], text[i // cfg.group_size], cfg.guidance)
    condition = [x[i // cfg.group_size] for x in text]
    if case == "flux":
        return grpo_flux.velocity(network, z, schedule[t], condition, cfg.guidance, *rows)
    return grpo_video.velocity(network, z, schedule[t], condition, cfg)


def equation_9(case, drawn, arguments, rewards, pairs, epsilon):
    """1/|pairs| Σ min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A) of an update's pairs, and which rho are outside.

    drawn: the rollout's latents (B, T+1, ...) and log-probabilities (B, T); arguments: those of `sample_groups`.
    GRPO-Guard's and Flow-DPPO's objective where `--ratio` says so; outside: its rho, or its KL. With `--kl-weight`
    minus beta |prediction - that of the untrained network|².
    """
    cfg, _, network, _, _, keys, _, schedule, shape, *_ = arguments
    groups = [r.double().view(-1, cfg.group_size) for r in rewards.values()]
    A = sum(((r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True)).flatten() for r in groups)  # eq. 10
    i, t = torch.tensor(pairs).T
    z, z_next, log_pi_old, A = drawn[0][i, t], drawn[0][i, t + 1], drawn[1][i, t], A[i]
    levels = schedule[1] if case == "sd" else schedule
    level, level_ = (x.view(-1, *[1] * len(shape)) for x in (levels[t], levels[t + 1]))
    v = noise = prediction(case, network, arguments, i, t, z)
    if case != "sd":  # eq. 8
        score = -(z - (1 - level) * (z - level * v)) / level**2
        mu, s = z + (v - cfg.eta**2 / 2 * score) * (level_ - level), cfg.eta * (level - level_).sqrt()
    else:  # eq. 7 as DDIM
        s = cfg.eta * ((1 - level_) / (1 - level) * (1 - level / level_)).sqrt()
        z0 = (z - (1 - level).sqrt() * noise) / level.sqrt()
        mu = level_.sqrt() * z0 + (1 - level_ - s**2).sqrt() * noise
    log_pi = Normal(mu, s).log_prob(z_next).flatten(1).mean(1)  # over the d elements, as the release has it
    mu_old = z_next - s * data.keyed_noise(shape, [(*keys[b], step) for b, step in pairs], "step noise", "cpu")
    kl, ratio = ((mu - mu_old) ** 2 / (2 * s**2)).flatten(1).mean(1), getattr(cfg, "ratio", "plain")
    rho, penalty = torch.exp(log_pi - log_pi_old), 0.0
    if cfg.kl_weight:
        kind, part = type(network), "unet" if case == "sd" else "transformer"
        with torch.no_grad():
            untrained = prediction(case, kind.from_pretrained(cfg.model, subfolder=part), arguments, i, t, z)
        penalty = cfg.kl_weight * ((v - untrained) ** 2).mean()
    if ratio == "dppo":
        return (rho * A * ((kl <= epsilon) | ((rho - 1) * A <= 0))).mean(), kl > epsilon
    if ratio == "guard":
        rho, A = torch.exp(s.flatten() * (log_pi - log_pi_old + kl)), A / (level - level_).flatten()
    J = torch.minimum(rho * A, rho.clamp(1 - epsilon, 1 + epsilon) * A).mean()
    return J - penalty, (rho - 1).abs() > epsilon


@pytest.mark.parametrize("case, options, tolerance", [
    ("flux", dict(clip_range=2e-4), 1e-5),
    ("flux", dict(clip_range=2.8e-5, ratio="guard"), 1e-5),
    ("flux", dict(clip_range=8e-6, ratio="dppo"), 1e-5),
    ("flux", dict(clip_range=2e-3, kl_weight=1.0, learning_rate=1e-4), 1e-5),
    ("flux", dict(clip_range=2e-4, kl_weight=10.0, learning_rate=1e-3, lora_rank=4), 1e-5),
    ("t2v", dict(clip_range=2.5e-4, kl_weight=10.0, learning_rate=1e-4), 1e-5),
    pytest.param("sd", dict(clip_range=2e-3, kl_weight=1.0, learning_rate=1e-4), 5e-5, marks=pytest.mark.slow),
])  # fmt: skip
def test_main_s_gradient_is_that_of_equation_9_in_every_update(case, options, tolerance, tmp_path, monkeypatch):
    """`main` adds up the gradients of micro-batches; here all pairs (sample, step) of an update make one autograd pass.

    2 prompts, groups of 4, shared noise, 2 updates of 4 samples, 2 of 3 steps of each: 8 pairs, by 3, 3 and 2. In the
    second update rho is not 1, and clipping acts; the network is no longer the KL term's reference. The tolerance is
    float32's rounding: for SD the gradient is a small sum of large parts, and the same pass in float64 is as far from
    both.
    """
    trainer, P, G, kept, errors = small.TRAINERS[case], 2, 4, {}, []
    small_run = dict(output_dir=tmp_path, prompts_per_iteration=P, group_size=G, updates_per_rollout=2, num_samples=1)
    algorithm = dict(steps=4, timestep_fraction=0.8, micro_batch=3, learning_rate=1e-5, max_grad_norm=1e9)
    cfg = small.config(case, **small_run, **algorithm | options)

    def keep(name, function, *arguments):
        kept[name] = arguments, function(*arguments)
        return kept[name][1]

    for name in ("sample_groups", "group_advantages"):
        monkeypatch.setattr(trainer, name, functools.partial(keep, name, getattr(trainer, name)))

    def compare(optimizer):
        """Instead of the optimizer's step: the gradient that it would follow, against equation 9 at these weights."""
        u, weights = len(errors), optimizer.param_groups[0]["params"]
        (arguments, drawn), ((rewards, *_), _) = kept["sample_groups"], kept["group_advantages"]
        pairs = []
        for p in range(P):
            for i in deal(range(G * p, G * p + G), 2, data.keyed_rng("updates", cfg.seed, 0, p))[u]:
                rng = data.keyed_rng("timesteps", cfg.seed, 0, p, i % G)
                pairs += [(i, t) for t in choose_steps(range(cfg.steps - 1), 0.8, "random", rng)]
        assert len(pairs) == 8
        J, outside = equation_9(case, drawn, arguments, rewards, pairs, cfg.clip_range)
        outside = outside.double().mean()
        assert outside == 0 if u == 0 else 0.1 < outside < 0.9
        exact = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(J, weights)])
        ours = torch.cat([-weight.grad.flatten() for weight in weights])
        errors.append(((ours - exact).norm() / exact.norm()).item())
        if u == 1:
            raise small.Stopped
        step(optimizer)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", compare)
    with pytest.raises(small.Stopped):
        trainer.main(cfg)
    assert len(errors) == 2 and max(errors) < tolerance, errors
