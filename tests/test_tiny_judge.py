"""The judge of clips on pairs that it has not seen."""

import random
import statistics
import time
from pathlib import Path

import pytest
import torch

import moving
from moving import MOTIONS, QUALITY_FAULTS
from rewards import VideoAlignReward

JUDGE = Path("tiny/videoalign")


def scenes(count, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        action = moving.random_action(rng)
        yield rng, action, moving.random_clip(rng, action)


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


def test_the_judge_prefers_clean_smooth_and_true_in_unseen_pairs(judge):
    """In at least 90 %; and VQ is indifferent to faults of motion at least twice as often as MQ is.

    Indifferent: the score moves by less than half of what the faults it is meant for move it by (median).
    """
    gaps = {"vq": [], "mq": [], "ta": [], "vq by motion": []}
    for rng, action, scene in scenes(48, seed=99):
        other = rng.choice([motion for motion in MOTIONS if motion not in (action["motion"], "rotate")])
        clips = [
            moving.make_clip(rng, scene),
            moving.make_clip(rng, scene, None, rng.choice(QUALITY_FAULTS)),
            moving.make_clip(rng, scene, rng.choice(moving.faults_of_motion(action))),
        ]
        right, wrong = (moving.phrase_action(rng, a) for a in (action, action | {"motion": other}))
        scores = judge([*clips, clips[0]], [right, right, right, wrong], moving.CLIP_FPS)
        gaps["vq"].append((scores["vq"][0] - scores["vq"][1]).item())
        gaps["mq"].append((scores["mq"][0] - scores["mq"][2]).item())
        gaps["ta"].append((scores["ta"][0] - scores["ta"][3]).item())
        gaps["vq by motion"].append((scores["vq"][0] - scores["vq"][2]).item())
    for name in ("vq", "mq", "ta"):
        assert sum(gap > 0 for gap in gaps[name]) >= 0.9 * len(gaps[name]), name
    half = {name: statistics.median(gaps[name]) / 2 for name in ("vq", "mq")}
    indifferent = [
        sum(abs(gap) < half[name] for gap in gaps[which]) for name, which in (("vq", "vq by motion"), ("mq", "mq"))
    ]
    assert indifferent[0] >= 2 * indifferent[1]


def test_one_call_on_eight_clips_is_fast(judge):
    clips = torch.stack([moving.make_clip(rng, scene) for rng, _, scene in scenes(8, seed=3)])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        judge(clips, ["a red circle growing"] * 8, moving.CLIP_FPS)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 2
