"""A finished run whose files are damaged, lost or exchanged is continued rightly, or refused in one line."""

import contextlib
import dataclasses
import io
import json
import pickle
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import eval as evaluation
import grpo_flux
import grpo_sd
import grpo_video
import small
from rewards import RewardError, load_reward
from runtime import checkpoints, data, loading, output, processes
from runtime.options import RunError, one_line_errors, parse_config

OPTIONS = {"lora_rank": 2, "ema_decay": 0.5, "iterations": 2, "save_every": 1, "sample_every": 1, "num_samples": 1}
OPTIONS |= {"prompts_per_iteration": 1, "steps": 3, "updates_per_rollout": 1}
NEWEST, OLDER = "checkpoint-000002", "checkpoint-000001"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two iterations and two checkpoints, and what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(output.Metrics, "draw", lambda self: None)
        folder = small.train("flux", tmp_path_factory.mktemp("run") / "out", **OPTIONS)
    return folder, printed.getvalue()


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def tree(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


def outcome(action, *arguments):
    """What the action returns, or the one line that it ends in as a script does."""
    try:
        with one_line_errors(RewardError):
            return action(*arguments)
    except SystemExit as e:
        assert e.code.startswith("error: ") and "\n" not in e.code
        return e.code


def resume(folder, trainer=grpo_flux):
    """The checkpoint from which `--resume` would continue, by all checks of a run; no model is loaded."""
    cfg = parse_config(trainer.Config, trainer.PRESETS, ["--output-dir", str(folder), "--resume"])
    checkpoint = checkpoints.open_folder(cfg, processes.start_world(), trainer.check(cfg)).checkpoint
    return checkpoint.name if checkpoint else "the start"


def evaluate(checkpoint, *options):
    """The weights that `eval.py --checkpoint` would draw with, by all its checks; no model is loaded."""
    words = ["--preset", "tiny", "--metrics", "hps", "--checkpoint", str(checkpoint), *options]
    models = evaluation.plan(parse_config(evaluation.Config, evaluation.PRESETS, words))[2]
    checkpoints.require_whole(Path(models[1].weights), "--checkpoint", processes.start_world())
    return models[1].weights


def replace(path, content):
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_bytes(content)


def with_a_wrong_bit(content, position):
    damaged = bytearray(content)
    damaged[position // 8] ^= 1 << position % 8
    return bytes(damaged)


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: replace(path, b""),
    "truncated": lambda path: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: replace(path, path.read_bytes() + b"{"),
    "one wrong bit": lambda path: replace(path, with_a_wrong_bit(path.read_bytes(), 4 * path.stat().st_size)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
IN_CHECKPOINT = ["SHA256SUMS", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_ema.safetensors"]
IN_CHECKPOINT += [f"state/{name}" for name in (".metadata", "__0_0.distcp", "config.json", "metrics.jsonl")]
EACH = pytest.mark.parametrize("damage", DAMAGE)


# ------------------------------------------------------------------------------------------------------------- --resume


@EACH
@pytest.mark.parametrize("name", IN_CHECKPOINT)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(name, damage, run, capsys):
    DAMAGE[damage](run / NEWEST / name)
    before = tree(run)
    assert outcome(resume, run) == OLDER
    (line,) = capsys.readouterr().err.splitlines()
    found = "" if name == "SHA256SUMS" else f"{name} "  # of which one line may be wrong
    assert line.startswith(f"{run / NEWEST} is skipped: its {found}") and "is missing or damaged" in line
    assert tree(run) == before


@pytest.mark.parametrize("name", [name for name in IN_CHECKPOINT if name != "state/config.json"])  # both have the same
def test_a_file_of_another_checkpoint_is_noticed(name, run, capsys):
    shutil.copy(run / OLDER / name, run / NEWEST / name)
    assert outcome(resume, run) == OLDER
    expected = "is missing or damaged" if name == "SHA256SUMS" else f"is skipped: its {name} is missing or damaged"
    assert expected in capsys.readouterr().err


@EACH
def test_a_damaged_config_is_refused_with_the_copy_to_restore(damage, run):
    copy = run / NEWEST / "state" / "config.json"
    DAMAGE[damage](run / "config.json")
    before = tree(run)
    assert re.search(f"config.json is damaged, .*; copy {copy} over it", outcome(resume, run))
    assert tree(run) == before
    shutil.rmtree(run / "config.json") if damage == "a folder" else None
    shutil.copy(copy, run / "config.json")  # the advice helps
    assert outcome(resume, run) == NEWEST


@EACH
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples/000001.png"])
def test_what_a_checkpoint_does_not_need_may_be_damaged(name, damage, run, capsys):
    DAMAGE[damage](run / name)
    assert outcome(resume, run) == NEWEST
    assert capsys.readouterr().err == ""


@EACH
def test_the_metrics_of_a_resumed_run_are_those_of_its_checkpoint(damage, finished, run):
    DAMAGE[damage](run / "metrics.jsonl")
    world = processes.start_world()
    if damage == "a folder":
        with pytest.raises(RunError, match=r"could not write .*metrics\.jsonl: .*Is a directory"):
            output.Metrics(run, world, run / NEWEST)
        return
    output.Metrics(run, world, run / NEWEST)
    assert (run / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()


def remove(*names):
    return lambda run: [shutil.rmtree(run / name) for name in names]


def empty(run):
    shutil.rmtree(run / NEWEST)
    (run / NEWEST).mkdir()


def of_another_run(run):
    """A whole checkpoint of a run with another seed."""
    shutil.rmtree(run / NEWEST)
    config = json.loads((run / OLDER / "state" / "config.json").read_text()) | {"seed": 8}
    shutil.copytree(run / OLDER, run / NEWEST)
    (run / NEWEST / "state" / "config.json").write_text(json.dumps(config))
    names = [str(path.relative_to(run / NEWEST)) for path in (run / NEWEST).rglob("*") if path.is_file()]
    names.remove("SHA256SUMS")
    sums = checkpoints.sha256_of(run / NEWEST, names, processes.start_world())
    (run / NEWEST / "SHA256SUMS").write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()))


def change(**values):
    def by_hand(run):
        content = json.loads((run / "config.json").read_text()) | values
        (run / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))

    return by_hand


@pytest.mark.parametrize("name, damage, expected, said", [
    ("empty", empty, OLDER, "its SHA256SUMS is missing"),
    ("a file", lambda run: (shutil.rmtree(run / NEWEST), (run / NEWEST).touch()), OLDER, ""),
    ("half saved", lambda run: (run / NEWEST).rename(run / f"{NEWEST}.part"), OLDER, ""),
    ("deleted", remove(NEWEST), OLDER, ""),
    ("state deleted", remove(f"{NEWEST}/state"), OLDER, "is missing or damaged"),
    ("states deleted", remove(f"{NEWEST}/state", f"{OLDER}/state"), "error: nothing to resume: ", "is missing"),
    ("all deleted", remove(NEWEST, OLDER), "the start", ""),
    ("run deleted", lambda run: shutil.rmtree(run), "error: nothing to resume: no run in", ""),
    ("of another run", of_another_run, OLDER, "it is of another run, whose seed is 8"),
    ("LoRA by hand", change(lora_rank=4), "error: nothing to resume: ", "whose lora_rank is 2"),
    ("EMA by hand", change(ema_decay=0.0), "error: nothing to resume: ", "whose ema_decay is 0.5"),
    ("older version", change(eta="absent"), "error: cannot resume: ", ""),
])  # fmt: skip
def test_checkpoints_that_are_lost_or_exchanged(name, damage, expected, said, run, capsys):
    damage(run)
    before = tree(run)
    assert outcome(resume, run).startswith(expected)
    err = capsys.readouterr().err
    assert said in err and bool(said) == bool(err)
    assert tree(run) == before


@pytest.mark.parametrize("trainer", [grpo_sd, grpo_video], ids=lambda trainer: trainer.__name__)
def test_a_run_of_another_script_is_refused(trainer, run):
    before = tree(run)
    assert f"is a run of grpo_flux.py, not of {trainer.__name__}.py" in outcome(resume, run, trainer)
    assert tree(run) == before


# -------------------------------------------------------------------------------------------------------------- eval.py


@EACH
@pytest.mark.parametrize("name, part", [(IN_CHECKPOINT[1], ""), (IN_CHECKPOINT[2], f"/{IN_CHECKPOINT[2]}")])
def test_damaged_weights_are_not_evaluated(name, part, damage, run):
    assert outcome(evaluate, f"{run / NEWEST}{part}") == str(run / NEWEST / name)
    DAMAGE[damage](run / NEWEST / name)
    before = tree(run)
    assert outcome(evaluate, f"{run / NEWEST}{part}").startswith("error: --checkpoint")
    assert tree(run) == before


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "one wrong bit"])  # which may be JSON still
def test_without_the_runs_config_nothing_is_evaluated(damage, run):
    DAMAGE[damage](run / "config.json")
    expected = "--model is needed" if damage in ("deleted", "a folder") else "config.json"
    assert expected in outcome(evaluate, run / NEWEST)


@pytest.mark.parametrize("place", ["", NEWEST])
def test_an_evaluation_does_not_write_into_a_run(place, run):
    words = [
        "--preset",
        "tiny",
        "--metrics",
        "hps",
        "--checkpoint",
        str(run / NEWEST),
        "--output-dir",
        str(run / place),
    ]
    before = tree(run)
    line = outcome(lambda: evaluation.main(parse_config(evaluation.Config, evaluation.PRESETS, words)))
    assert line.endswith("; take another --output-dir")
    assert tree(run) == before


# ------------------------------------------------------------------------------------------------ models and rewards


@pytest.mark.parametrize("content", [None, b"", b"{", b"{}", b"[]", b"null"], ids=str)
@pytest.mark.parametrize("name", ["flux", "sd", "hunyuan", "wan"])
def test_a_model_that_lacks_a_config_is_refused_before_anything_is_loaded(name, content, tmp_path):
    model = Path(shutil.copytree(Path("tiny") / name, tmp_path / "model"))
    loading.pipeline_index(str(model))
    for file in sorted(model.rglob("*config.json")):
        whole = file.read_bytes()
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(RunError, match=r"has no config, or a damaged one|lacks a tokenizer's files") as caught:
            loading.pipeline_index(str(model))
        assert str(file.parent) in str(caught.value) and "\n" not in str(caught.value)
        file.write_bytes(whole)


def without_a_weight(content):
    weights = safetensors.torch.load(content)
    return safetensors.torch.save({name: weight for name, weight in list(weights.items())[1:]}, {"format": "pt"})


DAMAGED_WEIGHTS = {
    "absent": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "short": lambda content: content[:-3],
    "text": lambda content: b"no weights",
}


@pytest.mark.parametrize("damage", [*DAMAGED_WEIGHTS.values(), without_a_weight], ids=[*DAMAGED_WEIGHTS, "lacking"])
def test_damaged_weights_of_a_model_are_one_line(damage, tmp_path):
    model = Path(shutil.copytree("tiny/flux", tmp_path / "model"))
    for file in sorted(model.rglob("*.safetensors")):
        whole = file.read_bytes()
        content = damage(whole)
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(RunError, match=f"{file.parent}|{file.parent.name}") as caught:
            loading.load_components(model, torch.float32)
        assert "give --model a complete folder" in str(caught.value) and "\n" not in str(caught.value)
        file.write_bytes(whole)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


DAMAGED_PICKLES = DAMAGED_WEIGHTS | {
    "a program": lambda content: pickle.dumps(Path.cwd),
    "other weights": lambda content: saved({"x": torch.zeros(2)}),
    "a list": lambda content: saved([torch.zeros(2)]),
}


@pytest.mark.parametrize("damage", DAMAGED_PICKLES.values(), ids=DAMAGED_PICKLES)
@pytest.mark.parametrize(
    "name, file",
    [("hps", "hps/HPS_tiny.pt"), ("clip", "clip/open_clip_pytorch_model.bin"), ("vq", "videoalign/model.pth")],
)
def test_damaged_weights_of_a_reward_are_one_line(name, file, damage, tmp_path):
    file = Path(file)
    folder = Path(shutil.copytree(Path("tiny") / file.parent, tmp_path / "reward"))
    content = damage((folder / file.name).read_bytes())
    (folder / file.name).unlink() if content is None else (folder / file.name).write_bytes(content)
    with pytest.raises(RewardError) as caught:
        load_reward(name, {file.parent.name: str(folder)})
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ what a run says of itself


def test_a_run_says_what_it_trains_and_how_to_go_on(finished):
    folder, printed = finished
    start, gain, end = printed.splitlines()
    first, last = rows(folder)[0], rows(folder)[-1]
    before, after = first["sample_reward_hps_before"], last["sample_reward_hps"]
    assert gain.startswith(f"sample_reward_hps {before:.3f} → {after:.3f}; see {folder / 'samples'}")
    assert start.startswith("tiny/flux, transformer: LoRA of rank 2, ")
    assert f"; reward hps; iterations 1 to 2; in {folder}: reward.png and samples/ show" in start
    command = re.fullmatch(r"(.*) is saved; its README.md says how to load it; evaluate .* python eval\.py (.*)", end)
    cfg = parse_config(evaluation.Config, evaluation.PRESETS, shlex.split(command[2]))
    cfg, family, models, asked = evaluation.plan(cfg)  # the command is one that works
    assert (family, models[1].weights, len(asked)) == ("FluxPipeline", str(folder / NEWEST / IN_CHECKPOINT[1]), 216)
    assert (cfg.metrics, cfg.reward_paths) == ("hps,clip", "hps=tiny/hps,clip=tiny/clip")
    assert Path(command[1]) == folder / NEWEST


def rows(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "SHA256SUMS", "state/__0_0.distcp", "state/.metadata"])
def test_a_run_that_lost_a_checkpoint_ends_bit_for_bit_like_one_that_did_not(name, finished, run, monkeypatch, capsys):
    monkeypatch.setattr(output.Metrics, "draw", lambda self: None)
    if name:
        DAMAGE["one wrong bit"](run / NEWEST / name)
    words = ["--output-dir", str(run), "--resume"]
    assert outcome(lambda: grpo_flux.main(parse_config(grpo_flux.Config, grpo_flux.PRESETS, words))) is None
    todo = f"iterations 2 to 2, after {OLDER}" if name else "all 2 iterations are done; raise --iterations to go on"
    assert todo in capsys.readouterr().out
    for name in IN_CHECKPOINT[1:3]:
        a, b = (safetensors.torch.load_file(folder / NEWEST / name) for folder in (run, finished[0]))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert rows(run) == rows(finished[0])
    assert tree(run).keys() == {run / path.relative_to(finished[0]) for path in tree(finished[0])}


# ------------------------------------------------------------------------------------------------------------ at random


@pytest.mark.slow
def test_300_random_faults_give_the_right_result_or_one_line(finished, run):
    rng, whole, refused = random.Random(0), tree(run), 0
    files = [path for path, content in whole.items() if content and path.name not in checkpoints.CARD]
    for _ in range(300):
        path = rng.choice(files)
        if rng.random() < 0.5:
            path.write_bytes(with_a_wrong_bit(whole[path], rng.randrange(8 * len(whole[path]))))
        else:
            path.write_bytes(whole[path][: rng.randrange(len(whole[path]))])
        chosen = outcome(resume, run)
        if chosen in (NEWEST, OLDER):
            assert tree(run / chosen).items() <= whole.items(), path
        else:
            assert chosen.startswith("error: ") and path == run / "config.json"
        weights = outcome(evaluate, run / NEWEST)
        assert weights.startswith("error: ") or Path(weights).read_bytes() == whole[Path(weights)], path
        refused += weights.startswith("error: ")
        path.write_bytes(whole[path])
    assert 0 < refused < 200
    assert tree(run) == whole


class Started(Exception):
    """All options are right, and the models would be loaded."""


# Values of random options, which | divides.
NUMBERS = "-1|0|1|2|3|4|5|8|32|64|0.5|1.5|nan|inf|-inf|1e-9|1e400|1e3|+4|1_0|x|--seed||" + 20 * "9"
VALUES = "x|hps|clip:2|hps@0.3|hps,clip|hps:|@|:|=|,|hps=tiny/hps|clip=x,hps=x|vq,mq|mean|dance|cps|guard|auto|float64|"
VALUES += "tiny/flux|tiny/sd|tiny/hunyuan|tiny/skyreels|tiny/flux/vae|tiny/hps|tiny|.|/|~|a/b|README.md|{}|None|--seed|"
VALUES += "prompts/tiny.txt|prompts/moving.jsonl|sampling.py:x|| |\n|\u00e9"
BASES = {"tiny": "tiny/flux", "tiny-video": "tiny/hunyuan"}  # of eval.py's presets


def random_words(rng, script, output_dir):
    """A command line of one to three options with values that are often wrong."""
    preset = rng.choice([name for name in script.PRESETS if "tiny" in name])
    words = ["--preset", preset, "--output-dir", str(output_dir)]
    words += ["--model", BASES[preset]] if script is evaluation else []
    fields = [f for f in dataclasses.fields(script.Config) if f.name not in ("preset", "output_dir", "dry_run")]
    for field in rng.sample(fields, rng.choice([1, 1, 2, 3])):
        words.append(f"--{field.name.replace('_', '-')}")
        if not isinstance(field.default, bool):
            words.append(rng.choice((NUMBERS if isinstance(field.default, int | float) else VALUES).split("|")))
    return words


@pytest.mark.slow
def test_300_random_command_lines_start_or_end_in_one_line(tmp_path, monkeypatch):
    def start(*args, **kwargs):
        raise Started

    scripts = [grpo_flux, grpo_sd, grpo_video, evaluation]
    for module in (output, evaluation):
        monkeypatch.setattr(module, "load_reward", start)
    monkeypatch.setattr(data, "paint_first_frames", start)
    monkeypatch.setattr(evaluation, "generate", start)
    rng, started = random.Random(0), 0
    for number in range(300):
        script = scripts[number % 4]
        out = tmp_path / str(number)
        words = random_words(rng, script, out)
        try:
            line = outcome(lambda: script.main(parse_config(script.Config, script.PRESETS, words)))  # noqa: B023
        except Started:
            started += 1
        except Exception as e:
            raise AssertionError(f"{script.__name__} {words}") from e
        else:
            assert line.startswith("error: "), words
            assert not tree(out), words
    assert 30 < started < 270
