"""--track: TensorBoard and Weights & Biases show what metrics.jsonl and samples/ hold."""

import io
import json
import shutil

import numpy as np
import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from runtime import output, tracking
from runtime.options import RunError
from small import train


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(output.Metrics, "draw", lambda self: None)  # takes as long as the run


def tracked(case, out, track):
    """A run of two iterations, of which the second is run twice. Returns the lines of metrics.jsonl, and the score of
    the sample picture before training.
    """
    options = dict(track=track, save_every=1, sample_every=1, num_samples=1, iterations=2)
    train(case, out, **options)
    shutil.rmtree(out / "checkpoint-000002")
    train(case, out, **options, resume=True)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, rows[0].pop("sample_reward_hps_before")


def records(file):
    """The records of a .wandb file, which has the format of LevelDB's log: 7 bytes, then blocks of 32 KiB."""
    content, place, found, data = file.read_bytes(), 7, [], b""
    while place < len(content):
        if 32768 - place % 32768 < 7:  # no room for a header: the block ends here
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        data += content[place + 7 : place + 7 + length]
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(data))
            data = b""
        place += 7 + length
    return found


@pytest.mark.slow
def test_tensorboard(tmp_path):
    rows, before = tracked("t2v", tmp_path / "out", "tensorboard")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == {key for row in rows for key in row} - {"iteration"}
    for key in events.Tags()["scalars"]:
        values = [(event.step, event.value) for event in events.Scalars(key)]
        expected = [(0, before)] if key == "sample_reward_hps" else []
        expected += [(row["iteration"], row[key]) for row in rows]  # what was run twice stands there once
        assert values == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert [image.step for image in events.Images("samples")] == [0, 1, 2]
    shown = Image.open(io.BytesIO(events.Images("samples")[-1].encoded_image_string))
    saved = Image.open(tmp_path / "out" / "samples" / "000002.png")
    assert np.array_equal(np.array(shown), np.array(saved.convert("RGB")))


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    rows, before = tracked("flux", tmp_path / "out", "wandb")
    files = sorted((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    first, second = (records(file) for file in files)
    runs = [record.run for part in (first, second) for record in part if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {json.loads((tmp_path / "out/config.json").read_text())["tracker_id"]}
    assert runs[0].display_name == "out" and runs[0].project == "dancegrpo"
    assert '"hps"' in [item.value_json for item in runs[0].config.update if item.key == "reward"]
    logged = []
    for record in (*first, *second):
        if record.WhichOneof("record_type") == "history":
            logged.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    assert [row["iteration"] for row in logged] == [0, 1, 2, 2]
    assert logged[0]["sample_reward_hps"] == before
    for mine, row in zip((logged[1], logged[3]), rows, strict=True):
        assert {key: mine[key] for key in row} == row
    sheet = files[1].parent / "files" / logged[-1]["samples.path"]
    assert sheet.read_bytes() == (tmp_path / "out/samples/000002.png").read_bytes()


def test_a_tracker_that_fails_later_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def log(*args):
        raise OSError("no space left\non this device")

    monkeypatch.setattr(tracking.TensorBoard, "log", log)
    train("flux", tmp_path / "out", track="tensorboard", iterations=1, num_samples=1)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 1
    assert (tmp_path / "out" / "checkpoint-000001").is_dir()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning: --track" in line]
    assert "--track tensorboard failed (OSError: no space left) and is left out from now on; metrics.jsonl" in line


@pytest.mark.parametrize("kind, expected", [
    ("wandb", r"^--track wandb cannot start \(UsageError: No API key\); log in with `wandb login`, set WANDB_MODE="),
    ("tensorboard", r"^--track tensorboard cannot start \(.*tensorboard.*\); leave the option out$"),
])  # fmt: skip
def test_a_tracker_that_cannot_start_is_told_before_models_are_loaded(kind, expected, tmp_path, monkeypatch):
    def init(**options):
        raise wandb.errors.UsageError("No API key\nSee the page of your account")

    monkeypatch.setattr(wandb, "init", init)
    (tmp_path / "tensorboard").write_text("where its folder would be")
    with pytest.raises(RunError, match=expected):
        output.Tracker(kind, {"output_dir": str(tmp_path), "tracker_id": "x"}, None)
