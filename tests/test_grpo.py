"""The GRPO mathematics, and that it is the same, letter for letter, in every trainer."""

import dataclasses
import inspect
from itertools import chain, pairwise

import pytest
import torch

import grpo_flux
import grpo_sd
import grpo_video
from grpo_flux import Config, group_advantages, grpo_loss, sde_window, trained_steps, update_parts
from runtime import cli, data, distributed, output

TRAINERS = [grpo_flux, grpo_sd, grpo_video]
SHARED = ["group_advantages", "grpo_loss", "sde_window", "trained_steps", "update_parts"]
CONTRACT = """preset model reward prompts output_dir resume seed iterations prompts_per_iteration group_size steps eta
shift sde sde_window timestep_fraction shared_noise updates_per_rollout micro_batch clip_range advantage_clip kl_weight
keep_best_worst learning_rate max_grad_norm lora_rank ema_decay guidance height width save_every sample_every compile"""


@pytest.mark.parametrize("name", SHARED)
def test_the_grpo_functions_are_identical_in_every_trainer(name):
    sources = {inspect.getsource(getattr(trainer, name)) for trainer in TRAINERS}
    assert len(sources) == 1


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_option_of_the_contract_is_there_and_read(trainer):
    names = [field.name for field in dataclasses.fields(trainer.Config)]
    assert set(CONTRACT.split()) <= set(names)
    source = inspect.getsource(trainer) + "".join(map(inspect.getsource, (cli, data, distributed, output)))
    unread = [name for name in names if f"cfg.{name}" not in source and f"config.{name}" not in source]
    assert set(unread) <= {"preset"}  # which parse_config reads, before there is a config
    for preset in trainer.PRESETS.values():
        trainer.Config(**preset)


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], ("t2v", "t2v", 480, 480, 53, 0.25, 5.0, 24, 8, 2, 202, 6.0, 1.0, "vq,mq:0")),
        (["--task", "t2i"], ("t2i", "t2i", 480, 480, 1, 0.25, 5.0, 24, 8, 2, 202, 6.0, 1.0, "hps")),
        (["--task", "i2v"], ("i2v", "i2v", 400, 640, 53, 0.3, 7.0, 8, 0, 1, 121, 1.0, 5.0, "mq")),
        (["--preset", "i2v", "--eta", "0.5"], ("i2v", "i2v", 400, 640, 53, 0.5, 7.0, 8, 0, 1, 121, 1.0, 5.0, "mq")),
    ],
)
def test_a_task_of_video_names_its_official_recipe(words, expected):
    cfg = cli.parse_config(grpo_video.Config, grpo_video.PRESETS, words)
    names = """preset task height width frames eta shift group_size keep_best_worst updates_per_rollout iterations
    guidance true_guidance reward"""
    assert tuple(getattr(cfg, name) for name in names.split()) == expected
    assert (cfg.prompts_per_iteration, cfg.steps, len(trained_steps(cfg, 0, 0, 0))) == (32, 16, 9)


# --------------------------------------------------------------------------------------------------------- advantages


def test_advantages_are_normalised_within_each_prompts_group():
    r = torch.tensor([1.0, 2.0, 3.0, 10.0, 30.0, 20.0])
    A = group_advantages({"r": r}, {"r": 1.0}, 3, 5.0)
    torch.testing.assert_close(A, torch.tensor([-1.0, 0.0, 1.0, -1.0, 1.0, 0.0]))


def test_several_rewards_are_normalised_before_they_are_added():
    """Raw sums would let the reward with the larger scale decide alone."""
    small, large = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1000.0, 2000.0, 3000.0])
    A = group_advantages({"a": small, "b": large}, {"a": 2.0, "b": 1.0}, 3, 5.0)
    torch.testing.assert_close(A, torch.tensor([1.0, 0.0, -1.0]))


def test_a_group_without_spread_teaches_nothing_and_outliers_are_clipped():
    r = torch.cat([torch.full((40,), 1.0), torch.zeros(39), torch.ones(1)])
    A = group_advantages({"r": r}, {"r": 1.0}, 40, 5.0)
    assert (A[:40] == 0).all()
    assert A.max() == 5.0  # 6.2 before clipping
    assert torch.isfinite(A).all()


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


# ------------------------------------------------------------------------------------------------ steps and samples


@pytest.mark.parametrize("steps, fraction, count", [(16, 0.6, 9), (12, 0.6, 6), (50, 1.0, 49)])
def test_the_official_number_of_steps_is_trained_and_never_the_last(steps, fraction, count):
    cfg = Config(steps=steps, timestep_fraction=fraction)
    seen = set()
    for sample in range(300):
        chosen = trained_steps(cfg, 0, 0, sample)
        assert len(chosen) == len(set(chosen)) == count
        seen |= set(chosen)
    assert seen == set(range(steps - 1))


def test_the_window_slides_over_all_steps_but_the_last():
    cfg = Config(steps=8, sde_window=3, sde_window_every=2)
    windows = [sde_window(cfg, iteration) for iteration in range(20)]
    assert windows[0] == windows[1] == range(0, 3)
    assert {t for window in windows for t in window} == set(range(7))
    assert all(b.start in (a.start, a.start + 1, 0) for a, b in pairwise(windows))
    assert trained_steps(cfg, 2, 5, 1) == [1, 2, 3]
    assert sde_window(Config(), 0) is None


def test_updates_share_out_every_sample_once():
    cfg = Config(group_size=12, updates_per_rollout=3)
    parts = update_parts(cfg, torch.randn(12), 4, 2)
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(chain(*parts)) == list(range(12))
    assert parts != update_parts(cfg, torch.randn(12), 5, 2)


def test_best_and_worst_are_taken_within_the_group():
    cfg = Config(group_size=6, keep_best_worst=1, updates_per_rollout=2)
    advantages = torch.tensor([0.0, 3.0, -1.0, 0.1, -2.0, 0.5])
    assert sorted(chain(*update_parts(cfg, advantages, 0, 0))) == [1, 4]
