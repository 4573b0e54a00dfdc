"""Randomness by key, the order of prompts, and the parts of a run that are not the paper's."""

from dataclasses import dataclass

import pytest
import torch

import runtime
from runtime import EMA, keyed_noise, prompt_batch


def test_noise_is_a_function_of_its_key_alone():
    torch.manual_seed(0)
    keys = [(42, 0, 1, 2), (42, 0, 1, 3), (42, 1, 1, 2)]
    a = keyed_noise((4, 5), keys, "step noise", "cpu")
    torch.manual_seed(1)
    torch.randn(100)
    assert torch.equal(a, keyed_noise((4, 5), keys, "step noise", "cpu"))
    assert torch.equal(a[1:2], keyed_noise((4, 5), keys[1:2], "step noise", "cpu"))
    assert len(a.flatten(1).unique(dim=0)) == 3
    assert not torch.equal(a, keyed_noise((4, 5), keys, "initial noise", "cpu"))


def test_noise_is_standard_normal_and_keys_are_independent():
    x = keyed_noise((1000,), [(0, i) for i in range(200)], "step noise", "cpu")
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x[:-1] * x[1:]).mean()) < 0.01


def test_prompts_come_in_shuffled_epochs():
    drawn = [i for iteration in range(7) for i in prompt_batch(10, 4, iteration, seed=1)]
    assert len(drawn) == 28
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20] and drawn[:10] != list(range(10))
    assert drawn[:4] != prompt_batch(10, 4, 0, seed=2)
    assert len(prompt_batch(3, 8, 0, seed=1)) == 8  # fewer prompts than one iteration asks for


def test_ema_follows_the_weights_and_swaps_in_and_out():
    network = torch.nn.Linear(2, 2)
    start = network.weight.detach().clone()
    ema = EMA(network, 0.9)
    with torch.no_grad():
        network.weight += 1.0
    ema.update()
    with ema.swapped_in():
        torch.testing.assert_close(network.weight, start + 0.1)
    torch.testing.assert_close(network.weight, start + 1.0)


@dataclass(frozen=True)
class Options:
    preset: str = "a"  # a named set
    size: int = 3  # of something, in pixels
    on: bool = True  # a switch
    resume: bool = False  # go on
    output_dir: str = "nowhere/at/all"  # where


def test_the_command_line_overrides_the_preset_and_the_preset_the_default():
    presets = {"a": {}, "b": {"size": 5, "on": False}}
    assert runtime.parse_config(Options, presets, []).size == 3
    assert runtime.parse_config(Options, presets, ["--preset", "b"]) == Options("b", 5, False)
    assert runtime.parse_config(Options, presets, ["--preset", "b", "--size", "7", "--on"]) == Options("b", 7, True)


def test_help_shows_each_option_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        runtime.parse_config(Options, {"a": {}}, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--size SIZE of something, in pixels (default: 3)" in text
    assert "--on, --no-on a switch (default: True)" in text


def test_captioned_pictures_keep_their_pixels(tmp_path):
    from PIL import Image

    images = torch.zeros(3, 3, 256, 256)
    images[1, 0] = 1.0
    runtime.save_pictures(tmp_path / "a.png", images, ["first", "second", "a long caption " * 20], columns=2)
    sheet = Image.open(tmp_path / "a.png")
    colors = {color: count for count, color in sheet.getcolors(1_000_000)}
    assert colors[(255, 0, 0)] == 256 * 256
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
