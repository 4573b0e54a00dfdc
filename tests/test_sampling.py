"""The policy against reference numbers, diffusers' own scheduler, and Gaussians whose answers are known exactly."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

import sampling
from sampling import (
    SDE,
    Step,
    cps_log_prob,
    cps_step,
    ddim_sde_step,
    flow_grpo_sde_step,
    flow_sde_step,
    flow_sigmas,
    gaussian_log_prob,
    rollout,
    sample_ode,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "steps.json").read_text())
FLOW_STEPS = [flow_sde_step, flow_grpo_sde_step, cps_step]
STEPS = [(step, log_prob) for step, log_prob in SDE.values()] + [(ddim_sde_step, gaussian_log_prob)]
EACH_STEP = pytest.mark.parametrize("step, log_prob_of", STEPS, ids=lambda f: f.__name__)


def tensors(section, *names):
    return (torch.tensor(GOLDEN[section][name]) for name in names)


def close(ours, theirs, rtol=1e-5):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=rtol, atol=1e-6)


# ------------------------------------------------------------------------------------------------- reference numbers


@pytest.mark.parametrize("key", GOLDEN["sd3_time_shift"])
def test_flow_sigmas_match_the_official_schedule(key):
    steps, shift = json.loads(key.replace("(", "[").replace(")", "]"))
    close(flow_sigmas(steps, shift), GOLDEN["sd3_time_shift"][key])


def test_flow_sigmas_begin_at_1_and_end_at_0_whatever_the_shift():
    """At 0.99999994 Flow-GRPO's noise would be infinite, or nearly."""
    for shift in range(1, 3000):
        assert flow_sigmas(16, shift / 100)[[0, -1]].tolist() == [1.0, 0.0], shift


def test_the_log_probability_takes_a_std_for_each_element():
    x, mean = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    std = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1)) + 0.1
    for given in (std, std[:, :1], std[:, 0, 0], 0.3):
        whole = given[:, None, None] if torch.is_tensor(given) and given.dim() == 1 else given
        expected = torch.distributions.Normal(mean, whole).log_prob(x).flatten(1).mean(1)
        close(gaussian_log_prob(x, mean, given), expected)


@pytest.mark.parametrize("case", GOLDEN["flux_step"]["cases"], ids=lambda c: f"shift{c['shift']}-{c['index']}")
def test_flow_sde_step_matches_the_official_step(case):
    z, v, z_next = tensors("flux_step", "z", "v", "z_next")
    sigmas, i = flow_sigmas(case["steps"], case["shift"]), case["index"]
    mean, std, z0_hat = flow_sde_step(v, z, sigmas[i], sigmas[i + 1], case["eta"])
    close(mean, case["mean"])
    close(z0_hat, case["x0"])
    close(gaussian_log_prob(z_next, mean, std), case["log_prob"])


@pytest.mark.parametrize("case", GOLDEN["flow_grpo_sde_step"]["cases"], ids=lambda c: str(c["index"]))
def test_flow_grpo_step_matches_its_authors_step_also_at_sigma_1(case):
    z, v, z_next = tensors("flow_grpo_sde_step", "z", "v", "z_next")
    sigmas, i = GOLDEN["flow_grpo_sde_step"]["sigmas"], case["index"]
    levels = sigmas[i], sigmas[i + 1], GOLDEN["flow_grpo_sde_step"]["noise_level"]
    mean, std, _ = flow_grpo_sde_step(v, z, *levels)
    close(mean, case["mean"])
    close(gaussian_log_prob(z_next, mean, std), case["log_prob"])


def ddim_levels(scheduler, steps):
    scheduler.set_timesteps(steps)
    return torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod.view(1)])


@pytest.mark.parametrize("case", GOLDEN["ddim_step"]["cases"], ids=lambda c: f"{c['steps']}-{c['index']}")
def test_ddim_sde_step_matches_the_official_step(case):
    z, eps, z_next = tensors("ddim_step", "z", "eps", "z_next")
    scheduler, i = DDIMScheduler(**GOLDEN["ddim_step"]["scheduler"]), case["index"]
    alpha_bars = ddim_levels(scheduler, case["steps"])
    assert scheduler.timesteps[i] == case["timestep"]
    mean, std, _ = ddim_sde_step(eps, z, alpha_bars[i], alpha_bars[i + 1], case["eta"])
    close(mean, case["mean"])
    close(gaussian_log_prob(z_next, mean, std), case["log_prob"])


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_sde_step_matches_diffusers_at_every_step(steps, eta, prediction):
    scheduler = DDIMScheduler(**GOLDEN["ddim_step"]["scheduler"], prediction_type=prediction)
    alpha_bars = ddim_levels(scheduler, steps)
    generator = torch.Generator().manual_seed(0)
    z, out, noise = (torch.randn(2, 4, 5, 5, generator=generator) for _ in range(3))
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(out, t, z, eta=eta, variance_noise=noise if eta else None)
        mean, std, z0_hat = ddim_sde_step(out, z, alpha_bars[i], alpha_bars[i + 1], eta, prediction)
        torch.testing.assert_close(mean + std * noise, theirs.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z0_hat, theirs.pred_original_sample, rtol=1e-5, atol=1e-4)


def test_ddim_sde_step_refuses_a_prediction_that_it_does_not_know():
    with pytest.raises(ValueError, match="prediction must be"):
        ddim_sde_step(torch.zeros(1, 2), torch.zeros(1, 2), 0.5, 0.6, 1.0, "sample")


# --------------------------------------------------------------------------------------- Gaussians, known exactly
# Data x0 ~ N(m, s²): z at level sigma ~ N((1 - sigma) m, (1 - sigma)² s² + sigma²), and the best velocity is linear.

M, S = 1.5, 0.5


def marginal(sigma):
    return (1 - sigma) * M, (1 - sigma) ** 2 * S**2 + sigma**2


def exact_velocity(z, sigma):
    """E[x1 - x0 | z], by the covariances of (x0, x1, z)."""
    mean, variance = marginal(sigma)
    return -M + (sigma - (1 - sigma) * S**2) / variance * (z - mean)


@pytest.mark.parametrize("sigma, sigma_next", [(1.0, 0.9), (0.6, 0.5), (0.2, 0.15)])
def test_score_term_is_the_analytic_score(sigma, sigma_next):
    z, eta = torch.linspace(-3, 3, 50)[:, None], 0.7
    mean, variance = marginal(sigma)
    score = -(z - mean) / variance
    v = exact_velocity(z, sigma)
    expected = z + (v - 0.5 * eta**2 * score) * (sigma_next - sigma)
    ours, std, _ = flow_sde_step(v, z, sigma, sigma_next, eta)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert std.item() == pytest.approx(eta * math.sqrt(sigma - sigma_next), rel=1e-5)


@pytest.mark.parametrize("step, eta", [(flow_sde_step, 1.0), (flow_grpo_sde_step, 0.7)])
def test_sde_has_the_marginals_of_the_ode(step, eta):
    """With the factor ½ before the score wrong (0 or 1), the spread at the end is off by a tenth and more."""
    n, steps = 40_000, 400
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, generator=generator)
    sigmas = flow_sigmas(steps, 1.0)
    noise = [torch.randn(n, 1, generator=generator) for _ in range(steps)]

    def model(z, i):
        return exact_velocity(z, float(sigmas[i]))

    trajectory, _, _ = rollout(model, z, sigmas, eta, step, noise=lambda i: noise[i])
    ode, _, _ = rollout(model, z, sigmas, 0.0)
    assert abs(ode[:, -1].std() - S) < 0.01
    for i in (steps // 4, steps // 2, 3 * steps // 4, steps - 4):
        mean, variance = marginal(float(sigmas[i]))
        assert abs(trajectory[:, i].mean() - mean) < 0.02
        assert abs(trajectory[:, i].std() / math.sqrt(variance) - 1) < 0.02


def test_cps_keeps_the_coefficients():
    """With x0 and x1 known, mean and std make up exactly (1 - sigma') x0 and the variance sigma'²."""
    x0, x1 = torch.full((3, 4), 2.0), torch.full((3, 4), 1.0)
    sigma, sigma_next, eta = 0.7, 0.5, 0.8
    z = (1 - sigma) * x0 + sigma * x1
    mean, std, z0_hat = cps_step(x1 - x0, z, sigma, sigma_next, eta)
    kept = (mean - (1 - sigma_next) * x0) / x1
    torch.testing.assert_close(kept**2 + std**2, torch.full_like(z, sigma_next**2))
    torch.testing.assert_close(z0_hat, x0)
    assert std.item() == pytest.approx(sigma_next * math.sin(0.4 * math.pi))


# --------------------------------------------------------------------------------------------------------- properties


def test_log_prob_is_the_mean_over_elements():
    x, mean = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    theirs = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2))
    torch.testing.assert_close(gaussian_log_prob(x, mean, 0.3), theirs)
    torch.testing.assert_close(gaussian_log_prob(x, mean, torch.full((3, 1, 1), 0.3)), theirs)
    torch.testing.assert_close(gaussian_log_prob(x, mean, torch.full((3,), 0.3)), theirs)


def test_a_std_for_each_sample_scores_that_sample():
    x, mean, std = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor([0.1, 1.0, 3.0])
    theirs = torch.distributions.Normal(mean, std.view(3, 1, 1)).log_prob(x).mean((1, 2))
    torch.testing.assert_close(gaussian_log_prob(x, mean, std), theirs)


def test_the_log_prob_of_cps_leaves_out_variance_and_constants():
    x, mean = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    theirs = -torch.stack([(a - b).square().mean() for a, b in zip(x, mean, strict=True)])
    torch.testing.assert_close(cps_log_prob(x, mean, 0.3), theirs)
    assert torch.equal(cps_log_prob(x, mean, 0.3), cps_log_prob(x, mean, 2.0))


@EACH_STEP
def test_a_level_for_each_sample_equals_one_at_a_time(step, log_prob_of):
    torch.manual_seed(0)
    out, z, z_next = torch.randn(3, 2, 8, 8).unbind()
    high, low = torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.3])
    if step is ddim_sde_step:
        high, low = low, high  # alpha_bar rises
    together = step(out, z, high, low, 0.6)
    log_prob = log_prob_of(z_next, together.mean, together.std)
    for b in range(2):
        alone = step(out[b, None], z[b, None], float(high[b]), low[b], 0.6)
        torch.testing.assert_close(together.mean[b, None], alone.mean)
        torch.testing.assert_close(together.std[b, None], alone.std)
        torch.testing.assert_close(together.z0_hat[b, None], alone.z0_hat)
        torch.testing.assert_close(log_prob[b, None], log_prob_of(z_next[b, None], alone.mean, alone.std))


@pytest.mark.parametrize("step", FLOW_STEPS)
def test_eta_0_is_the_euler_step(step):
    v, z = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for sigma, sigma_next in [(1.0, 0.8), (0.4, 0.0), (torch.tensor([1.0, 0.5]), torch.tensor([0.8, 0.0]))]:
        mean, std, z0_hat = step(v, z, sigma, sigma_next, 0.0)
        sigma, sigma_next = (torch.as_tensor(s).view(-1, 1, 1) for s in (sigma, sigma_next))
        torch.testing.assert_close(mean, z + v * (sigma_next - sigma), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z0_hat, z - sigma * v)
        assert (std == 0).all()


def test_eta_0_is_the_deterministic_ddim_step():
    eps, z, a, a_next = torch.randn(2, 3), torch.randn(2, 3), 0.4, 0.7
    mean, std, z0_hat = ddim_sde_step(eps, z, a, a_next, 0.0)
    x0 = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
    torch.testing.assert_close(z0_hat, x0)
    torch.testing.assert_close(mean, math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps)
    assert (std == 0).all()


def test_the_last_ddim_step_has_no_noise_left():
    eps, z = torch.randn(2, 3), torch.randn(2, 3)
    mean, std, z0_hat = ddim_sde_step(eps, z, 0.9, 1.0, 1.0)
    assert (std == 0).all()
    torch.testing.assert_close(mean, z0_hat)


@EACH_STEP
def test_replay_scores_exactly_what_was_drawn(step, log_prob_of):
    levels = torch.linspace(0.1, 0.99, 7) if step is ddim_sde_step else flow_sigmas(6, 3.0)
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)) * 0.3

    def model(z, i):
        return torch.tanh(z @ weight) + 0.1 * i

    trajectory, log_probs, _ = rollout(model, torch.randn(4, 5), levels, 0.5, step, log_prob=log_prob_of)
    for i in range(5):
        z, z_next = trajectory[:, i], trajectory[:, i + 1]
        mean, std, _ = step(model(z, i), z, levels[i], levels[i + 1], 0.5)
        log_prob = log_prob_of(z_next, mean, std)
        assert torch.equal(torch.exp(log_prob - log_probs[:, i]), torch.ones(4))
        assert log_prob.unique().numel() == 4


def test_rollout_is_stochastic_in_its_window_only():
    sigmas = flow_sigmas(6, 3.0)
    z = torch.randn(4, 5)
    drawn = []

    def noise(i):
        drawn.append(i)
        return torch.ones(4, 5)

    trajectory, log_probs, z0_hat = rollout(lambda z, i: -z, z, sigmas, 0.5, noise=noise, window=range(2, 4))
    assert drawn == [2, 3]
    assert trajectory.shape == (4, 7, 5)
    assert (log_probs[:, [0, 1, 4, 5]] == 0).all()
    assert (log_probs[:, 2:4] != 0).all()
    ode, _, _ = rollout(lambda z, i: -z, z, sigmas, 0.0)
    assert torch.equal(ode[:, :3], trajectory[:, :3])
    torch.testing.assert_close(z0_hat, trajectory[:, -1], rtol=1e-4, atol=1e-5)  # the last step was deterministic


def test_sample_ode_reaches_the_data():
    sigmas = flow_sigmas(200, 1.0)
    z = torch.linspace(-2, 2, 9)[:, None]
    z0 = sample_ode(lambda z, i: exact_velocity(z, float(sigmas[i])), z, sigmas)
    torch.testing.assert_close(z0, M + S * z, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("steps, shift", [(0, 3.0), (10, 0.0), (10, -1.0)])
def test_flow_sigmas_refuse_what_makes_no_schedule(steps, shift):
    with pytest.raises(ValueError, match="num_steps >= 1 and shift > 0"):
        flow_sigmas(steps, shift)


# ---------------------------------------------------------------------------------------------------- copied out alone

PUBLIC = [name for name, f in inspect.getmembers(sampling, inspect.isfunction) if f.__module__ == "sampling"]


def pasted(name):
    """The function from its source alone, in a file that has torch, math and the helpers that its docstring names."""
    function = getattr(sampling, name)
    helpers = {word for word in re.findall(r"`(\w+)`", function.__doc__) if hasattr(sampling, word)}
    namespace = {"torch": torch, "math": math} | {word: getattr(sampling, word) for word in helpers - {name}}
    exec(inspect.getsource(function), namespace)
    return namespace[name]


def results(function):
    """What the function makes of some arguments, as a list of tensors."""
    generator = torch.Generator().manual_seed(0)
    x, y, noise = torch.randn(3, 4, 2, 5, generator=generator).unbind()
    levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    match function.__name__:
        case "flow_sigmas":
            return [function(4, 3.0)]
        case "gaussian_log_prob" | "cps_log_prob" | "gaussian_kl":
            return [function(x, y, 0.3)]
        case "guarded_loss":
            pair = x[:, 0, 0], y[:, 0, 0].abs(), x[:, 1, 0], torch.full((len(x), 1, 1), 0.3), torch.tensor(0.1), 0.2
            return [*function("guard", *pair), *function("dppo", *pair)]
        case "ddim_sde_step":
            return [*function(x, y, 0.4, 0.6, 0.5), *function(x, y, 0.4, 0.6, 0.5, "v_prediction")]
        case "distinct":
            return [torch.tensor(part) for part in function([(4, 0), (5, 0), (5, 1), (6, 1)], 4, True)]
        case "rollout":
            return [*function(lambda z, i: z.sin() + i, x, levels, 0.7, noise=lambda i: noise + i, window=range(1, 3))]
        case "sample_ode":
            return [function(lambda z, i: z.sin() + i, x, levels)]
        case "column":
            return [function(0.3, x), function(torch.arange(4), x)]
        case "sde_window":
            return [torch.tensor(function(5, 8, 3, 2)), torch.tensor(function(5, 8, 0, 2))]
    return [*function(x, y, 0.8, 0.6, 0.5)]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_function_works_when_its_source_alone_is_copied(name):
    copied, original = results(pasted(name)), results(getattr(sampling, name))
    assert len(copied) == len(original)
    assert all(torch.equal(a, b) for a, b in zip(copied, original, strict=True))


def test_every_function_of_the_contract_is_public():
    contract = "flow_sigmas gaussian_log_prob flow_sde_step flow_grpo_sde_step cps_step ddim_sde_step rollout"
    more = "column cps_log_prob distinct gaussian_kl guarded_loss sample_ode sde_window"
    assert {*contract.split(), *more.split()} == set(PUBLIC)
    assert Step._fields == ("mean", "std", "z0_hat")
    assert SDE.keys() == {"dance", "flow", "cps"} and SDE["cps"] == (cps_step, cps_log_prob)
