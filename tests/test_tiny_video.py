"""The moving world: clips and their checker against each other."""

import random

import pytest
import torch

import moving
import tiny
from moving import MOTION_FAULTS, QUALITY_FAULTS


def scenes(count, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(count):
        action = moving.random_action(rng)
        yield rng, action, moving.random_clip(rng, action)


def test_clip_captions_can_be_read_back():
    rng = random.Random(0)
    for _ in range(500):
        action = moving.random_action(rng)
        prompt = moving.phrase_action(rng, action)
        assert moving.parse_action(prompt) == action | {"prompt": prompt}
        other = moving.another_action(rng, action)
        assert sum(action[key] != other[key] for key in action) == 1
    for prompt in ("a red circle", "a pink circle growing", "a red circle growing and rotating", ""):
        with pytest.raises(ValueError, match="not a caption of the moving world"):
            moving.parse_action(prompt)


def test_the_checker_reads_what_moves_where():
    """All nine motions, from the pixels alone; the right caption is accepted, another is not."""
    right = []
    for rng, action, scene in scenes(120, seed=1):
        clip = moving.make_clip(rng, scene)
        assert clip.shape == (moving.FRAMES, 3, 64, 64)
        assert clip.min() >= 0
        assert clip.max() <= 1
        right.append(moving.check_clip(clip, moving.phrase_action(rng, action)))
        assert not moving.check_clip(clip, moving.phrase_action(rng, moving.another_action(rng, action)))
    assert sum(right) >= 0.97 * len(right)


def test_the_checker_says_how_smoothly_and_how_cleanly():
    rough, unclean = ({name: [] for name in names} for names in (MOTION_FAULTS, QUALITY_FAULTS))
    steady = []
    for rng, action, scene in scenes(40, seed=2):
        clip = moving.make_clip(rng, scene)
        seen = moving.watch(clip)
        steady.append(moving.roughness(seen))
        for fault in MOTION_FAULTS:
            if fault in moving.faults_of_motion(action):
                rough[fault].append(moving.roughness(moving.watch(moving.make_clip(rng, scene, fault))))
        for fault in QUALITY_FAULTS:
            ugly = moving.make_clip(rng, scene, None, fault)
            unclean[fault].append(moving.uncleanness(ugly, moving.watch(ugly)) > moving.uncleanness(clip, seen))
    assert max(steady) < 0.4
    for fault, values in rough.items():
        assert sum(value > 0.4 for value in values) >= 0.95 * len(values), fault
    for fault, verdicts in unclean.items():
        assert sum(verdicts) >= 0.95 * len(verdicts), fault


def test_the_checker_shares_no_code_with_the_drawing():
    functions = {n: f for n, f in (vars(tiny) | vars(moving)).items() if hasattr(f, "__code__")}

    def names(code):
        inner = (c for c in code.co_consts if hasattr(c, "co_names"))
        return set(code.co_names).union(*map(names, inner))

    def reached(*start):
        seen, new = set(), set(start)
        while new:
            seen |= new
            new = functions.keys() & set().union(*(names(functions[n].__code__) for n in new)) - seen
        return seen

    checking = reached("watch", "read_motion", "roughness", "uncleanness", "check_clip")
    drawing = reached("make_clip", "random_clip", "render")
    assert "detect" in checking
    assert {"draw_clip", "degrade_clip", "spoil_path", "distances"} <= drawing
    assert not checking & drawing
