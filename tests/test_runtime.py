"""Randomness by key, the order of prompts, and the parts of a run that are not the paper's."""

import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.prompts import load_rows
from rewards import RewardError, load_reward
from runtime import data, files, loading, metrics, output, pictures, processes
from runtime.data import keyed_noise, prompt_batch
from runtime.options import RunError, one_line_errors, parse_config
from runtime.processes import EMA


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
    assert parse_config(Options, presets, []).size == 3
    assert parse_config(Options, presets, ["--preset", "b"]) == Options("b", 5, False)
    assert parse_config(Options, presets, ["--preset", "b", "--size", "7", "--on"]) == Options("b", 7, True)


def test_help_shows_each_option_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse_config(Options, {"a": {}, "b": {"size": 5, "on": False}}, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith("presets, and the options that they set: a: the defaults b: --size 5 --no-on")
    assert "--size SIZE of something, in pixels (default: 3)" in text
    assert "--on, --no-on a switch (default: True)" in text


# -------------------------------------------------------------------------------------------------- processes, metrics


@pytest.mark.parametrize(
    "size, count, shares", [(1, 3, [[0, 1, 2]]), (2, 4, [[0, 2], [1, 3]]), (2, 3, [[0, 2], [1, 0]])]
)
def test_work_is_shared_out_in_equal_parts_and_collected_in_its_order(size, count, shares):
    worlds = [processes.World(rank, size, torch.device("cpu"), torch.float32) for rank in range(size)]
    assert [world.share(count) for world in worlds] == shares

    class Gathered(processes.World):
        def gather(self, x):
            return torch.tensor(shares).flatten()

    world = Gathered(0, size, torch.device("cpu"), torch.float32)
    assert world.collect(torch.tensor(shares[0]), count).tolist() == list(range(count))


def test_chunks_hold_every_item_once():
    world = processes.start_world()
    assert list(world.chunks([1, 2, 3, 4, 5], 2, "test")) == [[1, 2], [3, 4], [5]]


@pytest.fixture
def sampler(tmp_path):
    """`Samples` of twelve prompts whose pictures are grey, as bright as their prompt says, and score that."""
    (tmp_path / "samples").mkdir()
    config = SimpleNamespace(output_dir=str(tmp_path), seed=0, micro_batch=5, num_samples=12)
    drawn = []

    def draw(captions, z):
        drawn.append((captions, z))
        return torch.tensor([float(c) for c in captions]).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)

    def reward(images, prompts, fps):
        assert fps is None and [float(prompt) for prompt in prompts] == pytest.approx(images[:, 0, 0, 0].tolist())
        return {"light": images.mean((1, 2, 3)), "dark": 1 - images.mean((1, 2, 3))}

    reward.models = ()
    prompts = [str(i / 20) for i in range(20)]
    return output.Samples(config, processes.start_world(), prompts, draw, (2, 3), reward), drawn


def test_of_several_processes_each_sends_only_what_is_shown(sampler, monkeypatch):
    samples, _ = sampler
    sent = []
    own = SimpleNamespace(share=lambda n: list(range(n))[::8], size=8, is_main=False, device="cpu")
    own.chunks, own.on_device = samples.world.chunks, samples.world.on_device
    own.collect = lambda x, count: sent.append((len(x), x.dtype)) or x
    samples.world = own
    samples.save(0)
    scores = (2, torch.float32)  # of both rewards
    assert sent == [(1, torch.uint8), scores, scores]


def test_all_sample_pictures_are_scored_and_eight_are_shown(sampler, monkeypatch):
    samples, drawn = sampler
    shown = []
    monkeypatch.setattr(output, "save_pictures", lambda path, images, captions: shown.append((path, images, captions)))
    scores = samples.save(20)
    assert scores == pytest.approx({"sample_reward_light": 0.275, "sample_reward_dark": 0.725})
    assert [len(captions) for captions, _ in drawn] == [5, 5, 2]  # in micro-batches
    ((path, images, captions),) = shown
    assert path.name == "000020.png" and captions == [str(i / 20) for i in range(8)]
    assert images[:, 0, 0, 0].tolist() == pytest.approx([round(i / 20 * 255) / 255 for i in range(8)])  # as in the file


def test_sample_pictures_always_start_from_the_same_noise(sampler):
    samples, drawn = sampler
    samples.save(0)
    samples.save(10)
    first, second = (torch.cat([z for _, z in drawn[half : half + 3]]) for half in (0, 3))
    assert torch.equal(first, second) and first.shape == (12, 2, 3)
    assert len(first.flatten(1).unique(dim=0)) == 12


ROW = {"reward_mean": 0.1, "reward_std": 0.2, "reward_a": 0.1, "clip_fraction": 0.5, "grad_norm": 1.0}


def test_metrics_are_written_as_they_come_and_the_first_line_has_the_scores_before(tmp_path):
    writer = metrics.Metrics(tmp_path, processes.start_world(), None)
    writer.start({"sample_reward_a": 0.05})
    for iteration, more in [(1, {}), (2, {"sample_reward_a": 0.3})]:
        writer.write({"iteration": iteration} | ROW | more)
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == iteration
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {"iteration": 1, "sample_reward_a_before": 0.05} | ROW
    assert second == {"iteration": 2, "sample_reward_a": 0.3} | ROW
    steps, values = metrics.curve(writer.rows, "sample_reward_a")
    assert steps.tolist() == [0, 2] and values.tolist() == [0.05, 0.3]


def test_a_resumed_run_has_the_lines_of_its_checkpoint(tmp_path):
    state = tmp_path / "checkpoint-000002" / "state"
    state.mkdir(parents=True)
    lines = [json.dumps({"iteration": i} | ROW) for i in (1, 2, 3)]
    (state / "metrics.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[1:]) + '\n{"iteration": 4, "rew')
    writer = metrics.Metrics(tmp_path, processes.start_world(), state.parent)
    assert writer.gain().startswith("see ")  # no sample pictures, no scores
    writer.write({"iteration": 3, "again": 1} | ROW)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3] and "again" in rows[-1]


def test_the_picture_of_the_curves_holds_the_sample_scores(tmp_path, monkeypatch):
    import matplotlib.axes

    plotted = {}
    plot = matplotlib.axes.Axes.plot

    def spy(self, x, y, *rest, label="", **options):
        plotted[label] = (list(x), list(y))
        return plot(self, x, y, *rest, label=label, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", spy)
    writer = metrics.Metrics(tmp_path, processes.start_world(), None)
    writer.start({"sample_reward_a": 0.0})
    for i in range(1, 13):
        row = ROW | {"reward_a": float(i), "iteration": i}
        writer.write(row | ({"sample_reward_a": 10.0 * i} if i % 6 == 0 else {}))
    writer.draw()
    assert plotted["sample_reward_a"] == ([0, 6, 12], [0.0, 60.0, 120.0])
    assert plotted["reward_a, mean of 10"][1] == [(i + 1) / 2 for i in range(1, 11)] + [6.5, 7.5]
    assert (tmp_path / "reward.png").is_file() and not (tmp_path / "reward.part.png").exists()


# ---------------------------------------------------------------------------------------- pictures, films, first frames


def test_captioned_pictures_keep_their_pixels(tmp_path):
    images = torch.zeros(3, 3, 256, 256)
    images[1, 0] = 1.0
    pictures.save_pictures(tmp_path / "a.png", images, ["first", "second", "a long caption " * 20], columns=2)
    sheet = Image.open(tmp_path / "a.png")
    colors = {color: count for count, color in sheet.getcolors(1_000_000)}
    assert colors[(255, 0, 0)] == 256 * 256
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_videos_become_a_film_and_a_sheet_of_frames(tmp_path):
    from imageio_ffmpeg import read_frames

    videos = torch.zeros(2, 13, 3, 32, 48)
    videos[1] = 1.0
    pictures.save_videos(tmp_path / "000010", videos, ["dark", "bright"], fps=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000010.mp4", "000010.png"]
    film = read_frames(str(tmp_path / "000010.mp4"))
    about = next(film)
    assert about["fps"] == 8 and about["size"] == (2 * 6 * 48, 6 * 32)  # side by side, six times as large
    frames = [torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(192, 576, 3) for frame in film]
    assert len(frames) == 13
    assert frames[5][:, :280].float().mean() < 5 and frames[5][:, 296:].float().mean() > 250
    assert Image.open(tmp_path / "000010.png").width > 6 * 6 * 48


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_data_says(orientation, tmp_path):
    """What lies on its side in the file is upright: red above, blue below, green on the left."""
    upright = np.zeros((48, 32, 3), np.uint8)
    upright[:24, :, 0], upright[24:, :, 2], upright[:, :8] = 255, 255, (0, 255, 0)
    stored = {  # row 0 and column 0 of the file are these sides of the photo (EXIF 2.3, orientation)
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: upright[:, ::-1].transpose(1, 0, 2),
        7: upright[::-1, ::-1].transpose(1, 0, 2), 8: upright[::-1].transpose(1, 0, 2),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(tmp_path / "a.png", exif=exif)
    assert (np.array(data.read_picture(tmp_path / "a.png")) == upright).all()


def test_pictures_of_other_kinds_look_as_a_viewer_shows_them(tmp_path):
    def read(picture, name="a.png", **options):
        picture.save(tmp_path / name, **options)
        found = data.read_picture(tmp_path / name)
        assert found.mode == "RGB" and found.size == picture.size
        return np.array(found).astype(int)

    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    assert abs(read(Image.fromarray(ramp))[..., 0] - ramp / 257).max() <= 0.5  # 16 bits
    hidden = np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)  # red, but transparent
    hidden[0, 0], hidden[1, 1] = (0, 0, 255, 255), (0, 0, 0, 128)
    seen = read(Image.fromarray(hidden))
    assert (seen[2, 2] == 255).all() and (seen[0, 0] == (0, 0, 255)).all() and abs(seen[1, 1] - 127).max() <= 1
    palette = Image.fromarray(hidden[..., :3]).convert("P")
    assert (read(palette, transparency=palette.getpixel((2, 2)))[2, 2] == 255).all()
    grey = Image.fromarray(np.full((8, 8), 90, np.uint8))
    assert (read(Image.merge("LA", (grey, Image.new("L", (8, 8), 0)))) == 255).all()
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert abs(read(cmyk, "a.jpg") - (254, 0, 0)).max() <= 3
    frames = [Image.new("RGB", (8, 8), color) for color in ("lime", "blue")]
    for name in ("a.gif", "a.webp", "b.png"):
        assert (read(frames[0], name, save_all=True, append_images=frames[1:], lossless=True) == (0, 255, 0)).all()


def test_a_picture_that_cannot_be_read_says_what_to_convert_it_to(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(100))
    with pytest.raises(RunError, match=r"cannot read the picture .*a\.heic .* convert it to PNG or JPEG"):
        data.read_picture(tmp_path / "a.heic")


def test_first_frames_are_painted_once_and_kept(tmp_path, monkeypatch):
    networks, load = [], loading.load_weights
    monkeypatch.setattr(loading, "load_weights", lambda *a, **o: networks.append(weakref.ref(x := load(*a, **o))) or x)
    folder = tmp_path / "frames"
    config = SimpleNamespace(
        first_frames=str(folder), first_frame_model="tiny/flux", first_frame_steps=2, height=64, width=64,
        num_samples=2, iterations=2, prompts_per_iteration=1, seed=0, prompts="",
    )  # fmt: skip
    larger = SimpleNamespace(**vars(config) | {"width": 96})
    prompts = ["a red circle", "a cross", "two squares"]
    world = processes.start_world()
    first = data.first_frames(config, prompts)
    assert not folder.exists()  # nothing is painted before the run has its folder
    data.paint_first_frames(config, first, world)
    assert len(networks) == 4 and not any(network() for network in networks)  # the run has the room
    assert set(prompts[:2]) <= first.keys()
    assert all(path.parent == folder and Image.open(path).size == (64, 64) for path in first.values())
    assert not any(path.exists() for path in data.first_frames(larger, prompts).values())  # of another size
    rows = load_rows(str(folder / "painted-64x64.jsonl"), None, True)  # as eval.py reads it
    assert {row["prompt"]: Path(row["image"]) for row in rows} == first
    made = {path: path.stat().st_mtime_ns for path in first.values()}
    config.first_frame_model, config.iterations = "", 1  # nothing is missing, so nobody has to paint
    again = data.first_frames(config, prompts)
    data.paint_first_frames(config, again, world)
    assert again == {prompt: first[prompt] for prompt in again}
    assert made == {path: path.stat().st_mtime_ns for path in first.values()}
    elsewhere = {prompt: tmp_path / "elsewhere" / path.name for prompt, path in again.items()}
    with pytest.raises(RunError, match="must be on a file system that all machines share"):
        data.require_there(again | elsewhere)  # what a machine sees that has another folder


def test_first_frames_may_stand_beside_their_prompts(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a red circle", "image": "one.png"}\n')
    config = SimpleNamespace(
        prompts=str(file), first_frames="", first_frame_model="", num_samples=1, iterations=1, prompts_per_iteration=1,
        seed=0, height=8, width=8,
    )  # fmt: skip
    pictures = data.first_frames(config, data.load_prompts(str(file)))
    assert pictures == {"a red circle": tmp_path / "one.png"}
    monkeypatch.setenv("HOME", str(tmp_path))
    config.prompts = "~/prompts.jsonl"
    assert data.first_frames(config, data.load_prompts(config.prompts)) == pictures
    config.first_frames, config.first_frame_model = str(tmp_path / "frames"), "tiny/flux"  # as a preset has them
    assert data.first_frames(config, data.load_prompts(str(file))) == pictures
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames/first_frames.jsonl").write_text('{"prompt": "a red circle", "image": "../one.png"}\n')
    (chosen,) = data.first_frames(config, data.load_prompts(str(file))).values()
    assert chosen == tmp_path / "frames/../one.png"  # --first-frames comes first
    config.first_frames = "~/frames"
    assert list(data.first_frames(config, data.load_prompts(str(file))).values()) == [chosen]
    (tmp_path / "frames/first_frames.jsonl").rename(tmp_path / "frames/LIST.JSONL")
    config.first_frames = "~/frames/LIST.JSONL"
    assert list(data.first_frames(config, data.load_prompts(str(file))).values()) == [chosen]


def test_a_prompt_with_two_first_frames_and_one_with_none_are_refused(tmp_path):
    for name in ("one.png", "two.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    config = SimpleNamespace(
        prompts=str(tmp_path / "prompts.jsonl"), first_frames="", first_frame_model="", num_samples=1, iterations=1,
        prompts_per_iteration=1, seed=0, height=8, width=8,
    )  # fmt: skip
    two = "".join(f'{{"prompt": "she smiles", "image": "{name}.png"}}\n' for name in ("one", "two"))
    (tmp_path / "frames.jsonl").write_text(two)
    (tmp_path / "prompts.jsonl").write_text(two)
    for given in ("", str(tmp_path / "frames.jsonl")):
        config.first_frames = given
        with pytest.raises(RunError, match="line 2: its prompt appears above with another image"):
            data.first_frames(config, ["she smiles", "she smiles"])
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "she smiles", "image": null}\n')
    config.first_frames = ""
    with pytest.raises(RunError, match="the image must be a string"):
        data.first_frames(config, ["she smiles"])
    config.first_frames = str(tmp_path / "frames")
    with pytest.raises(RunError, match="no first frame for 'she smiles'"):
        data.first_frames(config, ["she smiles"])


def test_the_list_of_painted_frames_has_those_from_elsewhere_too(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    folder = tmp_path / "frames"
    folder.mkdir()
    (folder / "first_frames.jsonl").write_text('{"prompt": "a red circle", "image": "../one.png"}\n')
    config = SimpleNamespace(
        first_frames=str(folder), first_frame_model="tiny/flux", first_frame_steps=1, height=64, width=64,
        num_samples=2, iterations=1, prompts_per_iteration=1, seed=0, prompts="",
    )  # fmt: skip
    pictures = data.first_frames(config, ["a red circle", "a cross"])
    data.paint_first_frames(config, pictures, processes.start_world())
    rows = load_rows(str(folder / "painted-64x64.jsonl"), None, True)
    assert {row["prompt"]: Path(row["image"]) for row in rows} == pictures


def test_signals_are_noted_during_a_run_only():
    import os
    import signal

    before = signal.getsignal(signal.SIGTERM)
    preempted = processes.Preemption(processes.start_world())
    assert not preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preempted() and preempted.received == signal.SIGTERM
    preempted.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_optimizer_is_the_releases():
    (group,) = processes.adamw(torch.nn.Linear(2, 2), 1e-5).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-5, (0.9, 0.999), 1e-4)


def test_a_reward_that_runs_out_of_memory_says_what_to_lower(tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\ndef f(images, prompts): raise torch.OutOfMemoryError('out of memory')"
    )
    reward, advice = load_reward(f"{tmp_path}/own.py:f"), r"^error: reward f: .*out of memory.*; lower --reward-batch"
    with pytest.raises(SystemExit, match=advice), one_line_errors(RewardError):
        reward(torch.rand(1, 3, 8, 8), ["a cat"])


def test_only_a_failed_write_is_reported_as_one(tmp_path):
    with (
        pytest.raises(RunError, match=r"could not write .*out: OSError; make room"),
        files.writing(tmp_path / "out"),
    ):
        raise OSError
    with pytest.raises(torch.OutOfMemoryError), files.writing(tmp_path / "out"):  # while weights are gathered
        raise torch.OutOfMemoryError("CUDA out of memory")
    lost = "[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:53437"
    with pytest.raises(RuntimeError, match="closed by peer"), files.writing(tmp_path / "out"):
        raise RuntimeError(lost)
