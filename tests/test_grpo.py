"""The GRPO mathematics, that it is the same, letter for letter, in every trainer, and the recipes of the presets."""

import dataclasses
import inspect
import math
import re
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import einops
import pytest
import torch

import grpo_flux
import grpo_sd
import grpo_video
from grpo_flux import best_and_worst, choose_steps, deal, group_advantages, grpo_loss
from runtime import checkpoints, data, dryrun, families, loading, output, processes
from runtime.metrics import statistics
from runtime.options import check_options, parse_config
from sampling import distinct, gaussian_kl, gaussian_log_prob, guarded_loss, sde_window

TRAINERS = [grpo_flux, grpo_sd, grpo_video]
ROOMS = (checkpoints, data, dryrun, families, loading, output, processes)
EVERY = pytest.mark.parametrize("trainer", TRAINERS, ids=lambda trainer: trainer.__name__)
SHARED = ["group_advantages", "grpo_loss", "best_and_worst", "deal", "choose_steps"]
CONTRACT = """preset model reward reward_paths prompts output_dir resume seed iterations prompts_per_iteration
group_size steps eta sde_window sde_window_every timestep_fraction timesteps shared_noise updates_per_rollout
micro_batch clip_range advantage_clip kl_weight keep_best_worst learning_rate max_grad_norm lora_rank ema_decay
guidance height width gradient_checkpointing dtype shard_size offload quantize compile dry_run processes gpu_memory
save_every keep_states sample_every num_samples reward_batch"""
# Read by `runtime.start`: models, prompts, rewards, the optimizer, the EMA and the number of iterations.
ELSEWHERE = {"preset", "model", "transformer", "reward", "prompts", "first_frames", "iterations", "learning_rate"}
ELSEWHERE |= {"lora_rank", "ema_decay", "guidance"}  # of the video models: `families`
FUNCTIONS = partial(inspect.getmembers, predicate=inspect.isfunction)


# ------------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("name", SHARED)
def test_the_grpo_functions_are_identical_in_every_trainer(name):
    sources = {inspect.getsource(getattr(trainer, name)) for trainer in TRAINERS}
    assert len(sources) == 1


@pytest.mark.parametrize("name", SHARED)
def test_a_grpo_function_works_when_its_source_alone_is_copied(name):
    namespace = {"torch": torch, "einops": einops}
    exec(inspect.getsource(getattr(grpo_flux, name)), namespace)
    x, y, z = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    arguments = {
        "group_advantages": [{"a": x, "b": y}, {"a": 1.0, "b": 0.5}, 4, 1.0],
        "grpo_loss": [x, y, z, 0.1],
        "best_and_worst": [x, 4, 1],
        "deal": [[3, 4, 5, 6], 2],
        "choose_steps": [range(9), 0.5, "random"],
    }[name]
    copied, original = (
        function(*arguments, *[data.keyed_rng("a test", 0)] * (name in ("deal", "choose_steps")))
        for function in (namespace[name], getattr(grpo_flux, name))
    )
    assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(copied, original, strict=True))


def test_the_root_holds_the_six_scripts():
    root = Path(grpo_flux.__file__).parent
    scripts = {"sampling.py", "rewards.py", "grpo_sd.py", "grpo_flux.py", "grpo_video.py", "eval.py"}
    assert {path.name for path in root.glob("*.py")} == scripts


@EVERY
def test_every_option_of_the_contract_is_there_and_read(trainer):
    """`options` only checks ranges; an option counts as read where something else is done with it.

    What the algorithm does is read in the trainer itself, and not only by its checks and its dry run.
    """
    names = [field.name for field in dataclasses.fields(trainer.Config)]
    expected = set(CONTRACT.split()) | ({"sde", "shift", "ratio"} if trainer is not grpo_sd else set())
    assert expected <= set(names)
    assert trainer is not grpo_sd or not {"sde", "shift", "ratio"} & set(names)
    source = inspect.getsource(trainer) + "".join(map(inspect.getsource, ROOMS))
    unread = {name for name in names if not re.search(rf"\b(cfg|config|c)\.{name}\b", source)}
    assert unread <= {"preset"}  # which parse_config reads, before there is a config
    code = "".join(inspect.getsource(f) for name, f in FUNCTIONS(trainer) if name not in ("check", "dry_run"))
    algorithm = inspect.getsource(trainer.Config).split("# memory and speed")[0]
    ignored = {name for name in re.findall(r"^    (\w+):", algorithm, re.M) if not re.search(rf"\bcfg\.{name}\b", code)}
    assert ignored <= ELSEWHERE
    for preset in trainer.PRESETS.values():
        trainer.Config(**preset)


# ------------------------------------------------------------------------------------------------------- the recipes

ALL = dict(seed=42, timestep_fraction=0.6, clip_range=1e-4, advantage_clip=5.0, learning_rate=1e-5, max_grad_norm=1.0)
ALL |= dict(keep_best_worst=0, lora_rank=0, ema_decay=0.0, kl_weight=0.0, sde_window=0, shared_noise=True)
ALL |= dict(timesteps="random")
SD = ALL | dict(
    model="CompVis/stable-diffusion-v1-4", prompts="hpdv2", reward="hps", height=512, width=512, steps=50, eta=1.0,
    timestep_fraction=1.0, group_size=16, prompts_per_iteration=32, updates_per_rollout=2, guidance=5.0, iterations=301,
)  # fmt: skip
FLUX = ALL | dict(
    model="black-forest-labs/FLUX.1-dev", prompts="hpdv2", reward="hps", height=720, width=720, steps=16, eta=0.3,
    shift=3.0, sde="dance", group_size=12, prompts_per_iteration=16, updates_per_rollout=3, guidance=3.5,
    iterations=300,
)  # fmt: skip
T2V = ALL | dict(
    model="hunyuanvideo-community/HunyuanVideo", transformer="", prompts="vidprom", reward="vq,mq:0", height=480,
    width=480, frames=53, fps=8.0, steps=16, eta=0.25, shift=5.0, sde="dance", group_size=24, keep_best_worst=4,
    prompts_per_iteration=32, updates_per_rollout=2, guidance=6.0, true_guidance=1.0, iterations=202,
)  # fmt: skip
I2V = T2V | dict(
    transformer="Skywork/SkyReels-V1-Hunyuan-I2V", prompts="consisid", reward="mq", height=400, width=640, eta=0.3,
    shift=7.0, group_size=8, keep_best_worst=0, updates_per_rollout=1, guidance=1.0, true_guidance=5.0, iterations=121,
    first_frame_model="black-forest-labs/FLUX.1-dev", first_frame_steps=30,
)  # fmt: skip
WAN = T2V | dict(
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", prompts="hpdv2", reward="hps", height=512, width=512, frames=1, steps=20,
    eta=0.3, shift=3.0, group_size=12, prompts_per_iteration=16, updates_per_rollout=1, keep_best_worst=0, guidance=1.0,
    true_guidance=5.0, iterations=1000, max_sequence_length=512,
)  # fmt: skip
# Table 6 of the paper, without classifier-free guidance; with it one update an iteration.
TABLE_6 = dict(
    learning_rate=1e-5, max_grad_norm=1.0, prompts_per_iteration=32, group_size=12, clip_range=1e-4,
    timestep_fraction=0.6, keep_best_worst=0,
)  # fmt: skip
ONE_GPU = dict(
    updates_per_rollout=2, steps=12, learning_rate=3e-4, lora_rank=128, micro_batch=2, prompts_per_iteration=4,
    offload=True,
)  # fmt: skip
RECIPES = [
    (grpo_sd, "release", 49, SD),
    (grpo_sd, "hps-clip", 49, SD | dict(reward="hps:0.7,clip:1.4")),
    (grpo_sd, "24gb", 49, SD | dict(
        prompts_per_iteration=8, micro_batch=4, gradient_checkpointing=True, offload=True, gpu_memory=23.0
    )),
    (grpo_sd, "fast", 4, SD | dict(steps=20, sde_window=4, sde_window_every=1000)),
    (grpo_sd, "paper", 29, TABLE_6 | dict(steps=50, updates_per_rollout=1, guidance=5.0)),
    (grpo_flux, "release", 9, FLUX),
    (grpo_flux, "8gpu", 9, FLUX | dict(updates_per_rollout=2, max_grad_norm=0.01, ema_decay=0.995)),
    (grpo_flux, "lora", 6, FLUX | dict(
        updates_per_rollout=2, steps=12, learning_rate=3e-4, lora_rank=128, iterations=301
    )),
    (grpo_flux, "lora-48gb", 6, FLUX | ONE_GPU | dict(height=512, width=512, gpu_memory=46.0, quantize="")),
    (grpo_flux, "lora-24gb", 6, FLUX | ONE_GPU | dict(gpu_memory=23.0, quantize="int8")),
    (grpo_flux, "fast", 2, FLUX | dict(steps=10, sde_window=2, sde_window_every=1000)),
    (grpo_flux, "paper", 14, TABLE_6 | dict(steps=25, updates_per_rollout=4, eta=0.3)),
    (grpo_video, "release", 9, T2V),
    (grpo_video, "release-i2v", 9, I2V),
    (grpo_video, "fast", 2, T2V | dict(steps=10, sde_window=2, sde_window_every=1000)),
    (grpo_video, "paper", 14, TABLE_6 | dict(steps=25, updates_per_rollout=4, eta=0.3, true_guidance=1.0)),
    (grpo_video, "paper-i2v", 9, TABLE_6 | dict(updates_per_rollout=1, eta=0.3, true_guidance=5.0)),
    (grpo_video, "t2i", 9, T2V | dict(frames=1, reward="hps", prompts="hpdv2")),
    (grpo_video, "wan", 11, WAN),
    (grpo_video, "wan-48gb", 9, WAN | dict(
        reward="vq,mq", prompts="vidprom", frames=33, height=320, width=512, fps=16.0, steps=16, lora_rank=64,
        learning_rate=1e-4, offload=True, prompts_per_iteration=4, group_size=8, iterations=202,
    )),
]  # fmt: skip


@pytest.mark.parametrize(
    "trainer, preset, trained, recipe", RECIPES, ids=[f"{trainer.__name__}-{name}" for trainer, name, *_ in RECIPES]
)
def test_a_preset_is_its_published_recipe(trainer, preset, trained, recipe):
    cfg = parse_config(trainer.Config, trainer.PRESETS, ["--preset", preset])
    assert {name: getattr(cfg, name) for name in recipe} == recipe
    check_options(cfg)
    window = sde_window(0, cfg.steps, cfg.sde_window, cfg.sde_window_every)
    fraction, A = 1.0 if cfg.sde_window else cfg.timestep_fraction, torch.randn(cfg.group_size)
    more = fraction, cfg.timesteps, cfg.keep_best_worst, cfg.updates_per_rollout
    updates = pairs_of(A, 0, cfg.group_size, window, *more)
    samples = 2 * cfg.keep_best_worst or cfg.group_size
    assert [len(pairs) for pairs in updates] == [samples // cfg.updates_per_rollout * trained] * cfg.updates_per_rollout


@EVERY
def test_the_release_is_the_default_and_every_recipe_is_tested(trainer):
    assert parse_config(trainer.Config, trainer.PRESETS, []) == trainer.Config()
    assert trainer.Config().preset == "release" and trainer.PRESETS["release"] == {}
    tested = {preset for tested, preset, *_ in RECIPES if tested is trainer}
    assert tested == {preset for preset in trainer.PRESETS if not preset.startswith("tiny")}


# --------------------------------------------------------------------------------------------------------- advantages


def test_advantages_are_normalised_within_each_prompts_group():
    r = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0])
    A = group_advantages({"r": r}, {"r": 1.0}, 3, 5.0)
    torch.testing.assert_close(A, torch.tensor([-1.0, 0.0, 1.0, -1.0, 1.0, 0.0]))


def test_a_group_of_equal_rewards_gives_no_gradient_whatever_the_value():
    """In float32 the mean of 12 equal numbers often differs from them in the last digit."""
    r = torch.rand(2000, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 12)
    assert (r != r.mean(1, keepdim=True)).any()
    A = group_advantages({"r": r.flatten()}, {"r": 1.0}, 12, 5.0)
    assert A.dtype == torch.float32 and (A == 0).all()


def test_several_rewards_are_normalised_before_they_are_added():
    """Raw sums would let the reward with the larger scale decide alone."""
    small, large = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1000.0, 2000.0, 3000.0])
    A = group_advantages({"a": small, "b": large}, {"a": 2.0, "b": 1.0}, 3, 5.0)
    torch.testing.assert_close(A, torch.tensor([1.0, 0.0, -1.0]))


def test_a_group_without_spread_gives_no_gradient_and_outliers_are_clipped():
    r = torch.cat([torch.full((40,), 1.0), torch.zeros(39), torch.ones(1)])
    A = group_advantages({"r": r}, {"r": 1.0}, 40, 5.0)
    assert (A[:40] == 0).all()
    assert A.max() == 5.0  # 6.2 before clipping
    assert torch.isfinite(A).all()
    both = group_advantages({"a": r[40:], "b": -r[40:]}, {"a": 1.0, "b": 0.9}, 40, 5.0)
    assert both.max().item() == pytest.approx(0.1 * 39 / 40**0.5, abs=1e-4)  # clipped after the sum, not each before


# --------------------------------------------------------------------------------------------------------------- loss


def test_gradient_at_ratio_1_is_the_policy_gradient():
    log_prob = torch.randn(6, requires_grad=True)
    A = torch.randn(6)
    loss, rho = grpo_loss(log_prob, log_prob.detach(), A, 1e-4)
    loss.backward()
    assert torch.equal(rho, torch.ones(6))
    torch.testing.assert_close(log_prob.grad, -A / 6)


@pytest.mark.parametrize(
    "rho, A, value, has_gradient",
    [
        (1.5, 1.0, -1.1, False),  # already more likely by more than eps: no more push
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),  # a bad sample made likelier: pushed back, however far
        (0.5, -1.0, 0.9, False),
        (1.05, 1.0, -1.05, True),
    ],
)
def test_clipping_takes_the_pessimistic_side(rho, A, value, has_gradient):
    log_prob = torch.tensor([rho]).log().requires_grad_()
    loss, _ = grpo_loss(log_prob, torch.zeros(1), torch.tensor([A]), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert (log_prob.grad != 0).item() == has_gradient


def one_step(A, change, epsilon, ratio, noise=(1.0, -3.0), std=0.5, dsigma=0.25):
    """`guarded_loss` of one pair (sample, step), whose mean has moved by `change` (d,) since the rollout."""
    old_mean, noise, std = torch.zeros(1, 2), torch.tensor([noise]), torch.tensor([[std]])
    mean, z_next = torch.tensor([change], requires_grad=True), old_mean + std * noise
    log_ratio = gaussian_log_prob(z_next, mean, std) - gaussian_log_prob(z_next, old_mean, std)
    kl, dsigma = gaussian_kl(mean, old_mean, std), torch.tensor([dsigma])
    loss, rho = guarded_loss(ratio, log_ratio, kl, torch.tensor([A]), std, dsigma, epsilon)
    loss.backward()
    return loss.item(), rho.item(), mean.grad[0].tolist()


def test_the_ratio_of_grpo_guard():
    """By hand: log rho = mean(noise · change) = (1 · 0.1 - 3 · 0.3) / 2 = -0.4; weight 1 / dsigma = 4."""
    rho = math.exp(-0.4)
    loss, found, gradient = one_step(2.0, (0.1, 0.3), 0.9, "guard")
    assert found == pytest.approx(rho, rel=1e-6)
    assert loss == pytest.approx(-8 * rho, rel=1e-6)
    assert gradient == pytest.approx([-8 * rho * 0.5, 8 * rho * 1.5], rel=1e-5)  # of log rho: noise / d
    loss, _, gradient = one_step(-2.0, (0.1, 0.3), 0.1, "guard")  # a bad draw, already less likely: clipped
    assert loss == pytest.approx(8 * 0.9, rel=1e-6) and gradient == [0, 0]


def test_the_log_ratio_of_grpo_guard_has_mean_0_where_the_plain_ones_is_minus_the_kl():
    noise = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    std, change = torch.full((20_000, 1), 0.5), 0.2 * torch.ones(20_000, 8)
    log_ratio = gaussian_log_prob(std * noise, change, std) - gaussian_log_prob(std * noise, torch.zeros(1), std)
    kl = gaussian_kl(change, torch.zeros_like(change), std)
    torch.testing.assert_close(kl, torch.full_like(kl, 0.08))  # 0.2² / (2 · 0.5²)
    _, rho = guarded_loss("guard", log_ratio, kl, kl, std, kl, 0.1)
    assert log_ratio.mean().item() == pytest.approx(-0.08, abs=0.003)
    assert rho.log().mean().item() == pytest.approx(0, abs=0.002)


@pytest.mark.parametrize(
    "A, change, epsilon, has_gradient",
    [
        (1.0, (0.1, -0.1), 0.01, False),  # KL 0.02; the good draw became likelier: no more push
        (1.0, (0.1, -0.1), 0.03, True),  # within the limit, however large the ratio
        (-1.0, (0.1, -0.1), 0.01, True),  # pushed back
        (-1.0, (-0.1, 0.1), 0.01, False),
        (1.0, (-0.1, 0.1), 0.01, True),
    ],
)
def test_flow_dppo_leaves_out_what_moves_further_away(A, change, epsilon, has_gradient):
    loss, rho, gradient = one_step(A, change, epsilon, "dppo")
    # log rho = mean(noise · change) / std - KL, with the mean(noise · change) = ± 0.2, the KL 0.02
    assert rho == pytest.approx(math.exp(math.copysign(0.4, change[0]) - 0.02), rel=1e-5)
    assert loss == pytest.approx(-rho * A if has_gradient else 0.0, rel=1e-6)
    assert (gradient != [0, 0]) == has_gradient


# ------------------------------------------------------------------------------------------------ steps and samples


def pairs_of(A, iteration=0, group_size=4, window=range(5), fraction=1.0, timesteps="random", keep=0, updates=1):
    """The pairs (sample, step) of each update, as the trainers choose them, for advantages A (B,) of prompts 0, 1, …"""
    pairs = [[] for _ in range(updates)]
    for p, group in enumerate(best_and_worst(A, group_size, keep).tolist()):
        for u, samples in enumerate(deal(group, updates, data.keyed_rng("updates", 42, iteration, p))):
            for b in samples:
                rng = data.keyed_rng("timesteps", 42, iteration, p, b % group_size)
                pairs[u] += [(b, t) for t in choose_steps(window, fraction, timesteps, rng)]
    return pairs


def samples_of(pairs):
    return sorted({b for b, _ in pairs})


@pytest.mark.parametrize("steps, fraction, count", [(16, 0.6, 9), (12, 0.6, 6), (50, 1.0, 49)])
def test_the_official_number_of_steps_is_trained_and_never_the_last(steps, fraction, count):
    (pairs,) = pairs_of(torch.randn(300), group_size=10, window=sde_window(0, steps, 0, 25), fraction=fraction)
    for sample in range(300):
        chosen = [t for b, t in pairs if b == sample]
        assert len(chosen) == len(set(chosen)) == count
    assert {t for _, t in pairs} == set(range(steps - 1))


def test_each_sample_trains_steps_of_its_own():
    (pairs,) = pairs_of(torch.randn(8), window=range(30), fraction=0.5)
    (later,) = pairs_of(torch.randn(8), iteration=1, window=range(30), fraction=0.5)
    chosen = [tuple(t for b, t in drawn if b == sample) for drawn in (pairs, later) for sample in range(8)]
    assert len(set(chosen)) == 16
    assert pairs_of(torch.randn(8), window=range(30), fraction=0.5) == [pairs]  # a function of the keys


@pytest.mark.parametrize("timesteps, expected", [("first", [0, 1, 2]), ("last", [12, 13, 14])])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_first_or_the_last_steps_are_trained_in_every_sample(timesteps, expected, updates):
    """Of 16 steps the last is never trained: 0.25 of the others are three, the noisiest or the cleanest."""
    drawn = pairs_of(torch.randn(8), window=range(15), fraction=0.25, timesteps=timesteps, updates=updates)
    assert sorted(chain(*drawn)) == [(sample, t) for sample in range(8) for t in expected]


def test_of_all_steps_it_does_not_matter_which_come_first():
    random, first, last = (pairs_of(torch.randn(4), timesteps=which) for which in ("random", "first", "last"))
    assert random == first == last


def test_a_groups_first_step_is_evaluated_once_with_shared_noise():
    pairs = [(1, 0), (3, 0), (4, 0), (1, 1), (3, 1)]  # groups of 4: samples 1 and 3 start from one latent, 4 does not
    assert distinct(pairs, 4, True) == ([0, 2, 3, 4], [0, 0, 1, 2, 3])
    assert distinct(pairs, 4, False) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])


def test_the_window_slides_over_all_steps_but_the_last():
    windows = [sde_window(iteration, 8, 3, 2) for iteration in range(20)]
    assert windows[0] == windows[1] == range(0, 3)
    assert {t for window in windows for t in window} == set(range(7))
    assert all(b.start in (a.start, a.start + 1, 0) for a, b in pairwise(windows))
    (pairs,) = pairs_of(torch.randn(4), window=windows[2])
    assert [t for b, t in pairs if b == 1] == [1, 2, 3]
    assert sde_window(5, 16, 0, 25) == range(15)


def test_updates_share_out_every_sample_once():
    updates = pairs_of(torch.randn(24), iteration=4, group_size=12, updates=3)
    for prompt in (range(12), range(12, 24)):
        parts = [[b for b in samples_of(pairs) if b in prompt] for pairs in updates]
        assert [len(part) for part in parts] == [4, 4, 4]  # every update takes samples of every group
        assert sorted(chain(*parts)) == list(prompt)
    assert updates != pairs_of(torch.randn(24), iteration=5, group_size=12, updates=3)


def test_best_and_worst_are_taken_within_the_group():
    A = torch.tensor([0.0, 3.0, -1.0, 0.1, -2.0, 0.5, 9.0, 7.0, 8.0, 6.0, 7.5, 7.6])
    updates = pairs_of(A, group_size=6, keep=1, updates=2)
    assert samples_of(chain(*updates)) == [1, 4, 6, 9]
    assert [len(samples_of(pairs)) for pairs in updates] == [2, 2]


# ------------------------------------------------------------------------------------------------------- diagnostics


def test_statistics_are_those_of_rewards_advantages_and_ratios():
    rewards = {"a": torch.tensor([1.0, 3.0, 5.0, 5.0]), "b": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    A = torch.tensor([-1.0, 2.0, 0.0, 0.0])
    ratios = [[torch.tensor([1.0, 1.0]), torch.tensor([1.0])], [torch.tensor([1.2, 0.95, 1.0])]]
    kls = [[torch.tensor([0.0, 0.0]), torch.tensor([0.0])], [torch.tensor([0.3, 0.2, 0.1])]]
    row = statistics(rewards, {"a": 1.0, "b": 2.0}, A, 2, ratios, kls, 0.1, gather=lambda x: x)
    rho = torch.tensor([1.0, 1.0, 1.0, 1.2, 0.95, 1.0], dtype=torch.float64)
    assert row == pytest.approx({
        "reward_mean": 4.5, "reward_std": (8**0.5 + 2**0.5) / 2,
         "reward_a": 3.5, "reward_b": 0.5, "advantage_abs": 0.75,
        "zero_variance_groups": 1, "ratio_mean": rho.mean().item(), "ratio_max_deviation_first_update": 0.0,
        "clip_fraction": 1 / 6, "kl": 0.1,
    }, rel=1e-5)  # fmt: skip


def test_statistics_are_of_all_processes():
    def gather(x):  # two processes with equal samples
        return torch.cat([x, x + 1])

    rewards, of_update = {"a": torch.tensor([1.0, 3.0])}, ([[torch.ones(3)]], [[torch.zeros(3)]])
    row = statistics(rewards, {"a": 1.0}, torch.zeros(2), 2, *of_update, 0.1, gather)
    assert row["reward_a"] == row["reward_mean"] == 2.5
    assert row["zero_variance_groups"] == 1
    assert row["ratio_max_deviation_first_update"] == 1.0 and row["ratio_mean"] == 1.5
