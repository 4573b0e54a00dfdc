"""What a user can get wrong ends in one clear line: what is wrong, and what to change."""

import re
from pathlib import Path

import pytest

import grpo_flux
import grpo_sd
import runtime
from rewards import RewardError

BOTH = pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd], ids=lambda trainer: trainer.__name__)


def complaint(trainer, *words):
    """The one line that the command line with these words ends in; no model may be loaded on the way."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded before the options were checked")

    with pytest.MonkeyPatch.context() as patch, pytest.raises((runtime.RunError, RewardError)) as caught:
        patch.setattr(trainer, "load_reward", forbidden)
        for name in ("FluxPipeline", "StableDiffusionPipeline"):
            if hasattr(trainer, name):
                patch.setattr(getattr(trainer, name), "from_pretrained", forbidden)
        start = ["--preset", "tiny"]
        trainer.main(runtime.parse_config(trainer.Config, trainer.PRESETS, [*start, *words]))
    message = str(caught.value)
    assert "\n" not in message
    return message


@BOTH
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--preset huge", "unknown preset 'huge'; known: "),
        ("--reward beauty", "unknown reward 'beauty'"),
        ("--reward hps,vq", "reward vq judges video"),
        ("--reward hps@x", "threshold and weight must be numbers"),
        ("--reward-paths hps=", "reward path hps="),
        ("--reward-paths beauty=tiny/hps", "reward path beauty=tiny/hps"),
        ("--reward-paths hps=tiny/nothing", "no folder 'tiny/nothing' here"),
        ("--model tiny/nothing", "no folder 'tiny/nothing'"),
        ("--model tiny/clip", "cannot load tiny/clip"),
        ("--height 63", "--height must be a multiple of "),
        ("--width 0", "--width must be a multiple of "),
        ("--group-size 1", "--group-size must be at least 2"),
        ("--group-size twelve", "argument --group-size: invalid int value"),
        ("--groupsize 4", "unrecognized arguments: --groupsize"),
        ("--steps 1", "--steps must be at least 2"),
        ("--timestep-fraction 0", r"--timestep-fraction must be in (0, 1]"),
        ("--timestep-fraction 1.5", r"--timestep-fraction must be in (0, 1]"),
        ("--timestep-fraction 0.01", "trains none"),
        ("--eta 0", "--eta must be above 0"),
        ("--sde fast", "--sde "),
        ("--shift 0", "--shift "),
        ("--sde-window 99", "--sde-window must be from 0"),
        ("--keep-best-worst 50", "--keep-best-worst 50"),
        ("--updates-per-rollout 5", "--updates-per-rollout 5 must divide"),
        ("--micro-batch 0", "--micro-batch must be at least 1"),
        ("--clip-range 0", "--clip-range must be in (0, 1)"),
        ("--advantage-clip 0", "--advantage-clip must be above 0"),
        ("--kl-weight -1", "--kl-weight must not be negative"),
        ("--learning-rate 0", "--learning-rate must be above 0"),
        ("--max-grad-norm 0", "--max-grad-norm must be above 0"),
        ("--lora-rank -4", "--lora-rank must be 0"),
        ("--ema-decay 1", r"--ema-decay must be in [0, 1)"),
        ("--iterations 0", "--iterations must be at least 1"),
        ("--save-every 0", "--save-every must be at least 1"),
        ("--sample-every 0", "--sample-every must be at least 1"),
        ("--num-samples 0", "--num-samples must be at least 1"),
        ("--prompts-per-iteration 0", "--prompts-per-iteration must be at least 1"),
        ("--seed -1", "--seed must not be negative"),
    ],
)
def test_options(trainer, words, expected, tmp_path):
    assert expected in complaint(trainer, *words.split(), "--output-dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--sde flow", "for rectified flow"),
        ("--shift 3", "for rectified flow"),
        ("--eta 1.5", "--eta must be at most 1"),
        ("--guidance 0.5", "--guidance must be at least 1"),
    ],
)
def test_options_that_mean_nothing_to_diffusion(words, expected):
    assert expected in complaint(grpo_sd, *words.split())


def test_cps_noise_range():
    assert "--eta must be at most 1 with --sde cps" in complaint(grpo_flux, "--sde", "cps", "--eta", "1.2")


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("none.txt", None, "no prompt file"),
        ("empty.txt", b"", "is empty; write one prompt a line"),
        ("blank.txt", b"a red circle\n\na cross\n", "line 2 is blank"),
        ("spaces.txt", b"a red circle\n   \n", "line 2 is blank"),
        ("latin.txt", "ein gr\u00fcner Kreis".encode("latin-1"), "must be UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 is not"),
        ("broken.jsonl", b'{"prompt": "a"\n', "line 1 is not"),
        ("number.jsonl", b'{"prompt": 3}\n', "line 1: the prompt must be a string"),
    ],
)
def test_prompt_files(name, content, expected, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = complaint(grpo_flux, "--prompts", str(tmp_path / name), "--output-dir", str(tmp_path / "out"))
    assert expected in line and name in line


def test_prompt_files_that_are_fine(tmp_path):
    (tmp_path / "a.txt").write_text("a red circle\ntwo crosses")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a red circle", "image": "x.png"}\n{"prompt": "two crosses"}\n')
    for name in ("a.txt", "b.jsonl"):
        assert runtime.load_prompts(str(tmp_path / name)) == ["a red circle", "two crosses"]


def test_a_prompt_set_is_fetched_once_and_kept_as_text(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "train.json").write_text('[{"prompt": "a  cat"}, {"prompt": "a dog"}, {"prompt": "a cat"}]')
    calls = []

    def download(repo, file, repo_type):
        calls.append((repo, file, repo_type))
        return str(tmp_path / "train.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    assert runtime.load_prompts("hpdv2") == ["a cat", "a dog"]
    assert runtime.load_prompts("hpdv2") == ["a cat", "a dog"]
    assert calls == [("ymhao/HPDv2", "train.json", "dataset")]


def test_gated_weights_say_where_to_ask():
    from huggingface_hub.errors import GatedRepoError

    def loader(path):
        raise GatedRepoError.__new__(GatedRepoError, "401 Client Error: gated repo")

    with pytest.raises(runtime.RunError, match=r"accept its licence at https://huggingface.co/a/b and log in"):
        runtime.load_pretrained(loader, "a/b")


# ------------------------------------------------------------------------------------------------------ output folder


def a_run(folder, **changes):
    """The traces of a run that has one checkpoint."""
    import dataclasses
    import json

    config = dataclasses.asdict(grpo_flux.Config(preset="tiny", **grpo_flux.PRESETS["tiny"])) | changes
    (folder / "checkpoint-000010").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoint-000010.part").mkdir()
    line = complaint(grpo_flux, "--output-dir", str(tmp_path), "--resume")
    assert line.startswith("nothing to resume: no complete checkpoint in")


def test_resume_with_other_options(tmp_path):
    out = str(a_run(tmp_path / "run"))
    line = complaint(grpo_flux, "--output-dir", out, "--resume", "--group-size", "10")
    assert "--group-size is 10, but the run in" in line and "has 8" in line


def test_resume_takes_the_runs_own_options(tmp_path):
    out = a_run(tmp_path / "run", group_size=6, learning_rate=5e-5)
    words = ["--output-dir", str(out), "--resume", "--iterations", "99"]
    for more in ([], ["--preset", "tiny"], ["--group-size", "6"]):
        cfg = runtime.parse_config(grpo_flux.Config, grpo_flux.PRESETS, words + more)
        assert (cfg.preset, cfg.group_size, cfg.learning_rate, cfg.iterations) == ("tiny", 6, 5e-5, 99)


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    out = a_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "already holds a run; add --resume" in complaint(grpo_flux, "--output-dir", str(out))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert re.match("could not write .*file/out", complaint(grpo_flux, "--output-dir", str(tmp_path / "file" / "out")))
    assert Path(tmp_path / "file").read_text() == ""
