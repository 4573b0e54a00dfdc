"""The judge of clips on pairs that it has not seen."""

from pathlib import Path

import pytest
import torch

from rewards import VideoAlignReward
from tiny.make_videoalign import judge_figures

JUDGE = Path("tiny/videoalign")


@pytest.fixture(scope="module")
def judge():
    return VideoAlignReward(str(JUDGE))


def test_the_judge_has_the_released_layout_and_is_small():
    assert sum(file.stat().st_size for file in JUDGE.iterdir()) <= 1.6 * 2**20
    names = torch.load(JUDGE / "model.pth", weights_only=True).keys()
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    for name in ("base_layer.weight", "base_layer.bias", "lora_A.default.weight", "lora_B.default.weight"):
        assert f"{q_proj}.{name}" in names
    for name in ("model.norm.weight", "visual.patch_embed.proj.weight", "lm_head.weight", "rm_head.weight"):
        assert f"base_model.model.{name}" in names


@pytest.mark.slow
def test_the_judge_prefers_clean_smooth_and_true_in_unseen_pairs(judge):
    """And VQ is indifferent to faults of motion at least twice as often as MQ is, and nobody likes an empty clip."""
    figures = judge_figures(judge, scenes=100, seed=99)
    assert min(figures["vq"], figures["mq"], figures["ta"], figures["empty"]) >= 0.9, figures
    assert figures["vq indifferent"] >= 2 * figures["mq indifferent"], figures
