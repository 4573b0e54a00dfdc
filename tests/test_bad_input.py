"""What a user can get wrong ends in one clear line: what is wrong, and what to change."""

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from peft import get_peft_model_state_dict
from PIL import Image

import grpo_flux
import grpo_sd
import grpo_video
import small
from rewards import RewardError
from runtime import data, loading, output
from runtime.options import RunError, check_options, command_words, one_line_errors, parse_config

EVERY = pytest.mark.parametrize("trainer", [grpo_flux, grpo_sd, grpo_video], ids=lambda trainer: trainer.__name__)


def tree(folder):
    """All files and folders in a folder but a lock's, with their contents."""
    found = [path for path in sorted(Path(folder).rglob("*")) if path.name != ".lock"]
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def complaint(trainer, *words):
    """The one line that the script with these words ends in, without "error: "; Python prints it and exits with 1.

    No model may be loaded on the way, and no file or folder may change.
    """

    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded before the options were checked")

    with tempfile.TemporaryDirectory() as empty, pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "load_reward", forbidden)
        patch.setattr(DiffusionPipeline, "from_pretrained", forbidden)
        start = [] if "--preset" in words else ["--preset", "tiny-t2i" if trainer is grpo_video else "tiny"]
        words = [*words] if "--output-dir" in words else [*words, "--output-dir", f"{empty}/out"]
        out = words[words.index("--output-dir") + 1] if words[-1] != "--output-dir" else empty
        root = next(filter(os.path.isdir, (out, os.path.dirname(out), empty)))
        before = tree(root)
        with pytest.raises(SystemExit) as caught, one_line_errors(RewardError):
            config = parse_config(trainer.Config, trainer.PRESETS, [*start, *words])
            trainer.dry_run(config) if config.dry_run else trainer.main(config)
        assert tree(root) == before
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message
    return message.removeprefix("error: ")


@EVERY
def test_tau_is_of_no_account_with_a_window(trainer):
    for steps, tau in ((2, 0.6), (6, 0.1)):
        words = f"--preset tiny-t2v --steps {steps}" if trainer is grpo_video else f"--preset tiny --steps {steps}"
        words += f" --sde-window 1 --timestep-fraction {tau}"
        check_options(parse_config(trainer.Config, trainer.PRESETS, words.split()))


@EVERY
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
        ("--width 65", "--width must be a multiple of "),
        ("--width 0", "--width must be at least 1, got 0"),
        ("--group-size 1", "--group-size must be at least 2"),
        ("--group-size twelve", "argument --group-size: invalid int value"),
        ("--groupsize 4", "unrecognized arguments: --groupsize"),
        ("--steps 1", "--steps must be at least 2"),
        ("--timestep-fraction 0", r"--timestep-fraction must be in (0, 1]"),
        ("--timestep-fraction 1.5", r"--timestep-fraction must be in (0, 1]"),
        ("--timestep-fraction 0.01", "trains none"),
        (
            "--timesteps middle",
            "argument --timesteps: invalid choice: 'middle'",
        ),
        (
            "--timesteps first --sde-window 2",
            "--timesteps first does not go with --sde-window 2",
        ),
        ("--sde-window 99", "--sde-window must be from 0"),
        ("--keep-best-worst 50", "--keep-best-worst 50"),
        ("--updates-per-rollout 5", "--updates-per-rollout 5 must divide"),
        ("--micro-batch 0", "--micro-batch must be at least 1"),
        ("--clip-range 0", "--clip-range must be in (0, 1)"),
        ("--advantage-clip 0", "--advantage-clip must be above 0"),
        ("--kl-weight -1", "--kl-weight must be 0 or more"),
        ("--learning-rate 0", "--learning-rate must be above 0"),
        ("--max-grad-norm 0", "--max-grad-norm must be above 0"),
        ("--lora-rank -4", "--lora-rank must be 0"),
        ("--ema-decay 1", r"--ema-decay must be in [0, 1)"),
        ("--iterations 0", "--iterations must be at least 1"),
        ("--save-every 0", "--save-every must be at least 1"),
        ("--sample-every 0", "--sample-every must be at least 1"),
        ("--num-samples 0", "--num-samples must be at least 1"),
        ("--prompts-per-iteration 0", "--prompts-per-iteration must be at least 1"),
        ("--seed -1", "--seed must be from 0 to"),
        ("--learning-rate inf", "--learning-rate must be above 0, got inf"),
        ("--learning-rate nan", "--learning-rate must be above 0, got nan"),
        ("--learning-rate 1e", "argument --learning-rate: invalid float value"),
        ("--kl-weight inf", "--kl-weight must be 0 or more, got inf"),
        ("--max-grad-norm inf", "--max-grad-norm must be above 0, got inf"),
        ("--advantage-clip nan", "--advantage-clip must be above 0, got nan"),
        ("--ema-decay nan", "--ema-decay must be in [0, 1), got nan"),
        ("--ema-decay -0.1", "--ema-decay must be in [0, 1)"),
        ("--clip-range 1", "--clip-range must be in (0, 1)"),
        ("--timestep-fraction nan", "--timestep-fraction must be in (0, 1], got nan"),
        ("--eta nan", "--eta must be "),
        ("--guidance inf", "--guidance must be "),
        ("--lora-rank 100000", "--lora-rank must be 0 (all weights are trained) or a rank of at most 1024"),
        ("--lora-rank 1.5", "argument --lora-rank: invalid int value"),
        ("--seed 11111111111111111111111111", "--seed must be from 0 to 2**63 - 1"),
        ("--seed x", "argument --seed: invalid int value"),
        ("--iterations ''", "argument --iterations: invalid int value"),
        ("--iterations 1.5", "argument --iterations: invalid int value"),
        ("--group-size 99999999999", "--group-size must be at most 10**9"),
        ("--steps 99999999999", "--steps must be at most 10**9"),
        ("--height 99999999999", "--height must be at most 10**9"),
        ("--height -64", "--height must be at least 1"),
        ("--sde-window -1", "--sde-window must be 0 or more"),
        ("--save-every -1", "--save-every must be at least 1"),
        ("--keep-states 0", "--keep-states must be at least 1"),
        ("--processes 0", "--processes must be at least 1"),
        ("--gpu-memory inf", "--gpu-memory must be above 0, got inf"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16' (choose from 'auto', 'bfloat16', 'float32')"),
        ("--shard-size 7", "--shard-size must divide the 1 processes, got 7"),
        ("--shard-size -1", "--shard-size must be 0 or more"),
        ("--shared-noise no", "unrecognized arguments: no"),
        ("--resume yes", "unrecognized arguments: yes"),
        ("runs/flux", "unrecognized arguments: runs/flux"),
        ("--output-dir", "argument --output-dir: expected one argument"),
        ("--preset ''", "unknown preset ''; known: "),
        ("--reward ''", "unknown reward ''"),
        ("--reward hps,,clip", "unknown reward ''"),
        ("--reward hps,hps", "reward 'hps' is given twice"),
        ("--reward hps@nan", "unknown reward 'hps@nan'"),
        ("--reward hps:nan", "unknown reward 'hps:nan'"),
        ("--reward hps:inf", "unknown reward 'hps:inf'"),
        ("--reward hps@1e400", "unknown reward 'hps@1e400'"),
        ("--reward hps:0", "every weight in 'hps:0' is 0, so nothing is rewarded"),
        ("--reward nothing.py:f", "there is no file 'nothing.py'"),
        ("--reward sampling.py:taste", "sampling.py has no function or class 'taste'"),
        ("--prompts ''", "no prompt file ''"),
        ("--prompts prompts", "no prompt file 'prompts'"),
        ("--prompts nothing.txt", "no prompt file 'nothing.txt'"),
        ("--prompts pyproject.csv", "no prompt file 'pyproject.csv'"),
        ("--model ''", "--model: no folder ''"),
        ("--model a/b/c", "--model: no folder 'a/b/c'"),
        ("--model README.md", "--model: no folder 'README.md'"),
        ("--model tiny/hps", "cannot load tiny/hps"),
        ("--model tiny/flux/vae", "cannot load tiny/flux/vae"),
        ("--model tiny/sd/unet", "cannot load tiny/sd/unet"),
        ("--output-dir ''", "--output-dir is empty"),
        ("--output-dir tiny/hps", "tiny/hps holds HPS_tiny.pt, ViT-tiny-hps.json, not of a run"),
        ("--output-dir tiny/flux", "tiny/flux holds model_index.json, not of a run"),
        ("--output-dir tiny/flux/vae", "tiny/flux/vae holds config.json, "),
        ("--dry-run --processes 7", "must be a multiple of the 7 processes"),
        ("--dry-run --output-dir tiny/flux", "tiny/flux holds model_index.json"),
        ("--dry-run --model tiny/clip", "cannot load tiny/clip"),
        ("--dry-run --steps 0", "--steps must be at least 2"),
    ],
)
def test_options(trainer, words, expected):
    assert expected in complaint(trainer, *shlex.split(words))


@EVERY
@pytest.mark.parametrize("reward, expected", [
    ("nowhere.py:f", "nowhere.py:f: there is no file 'nowhere.py'; write FILE.py:NAME"),
    ("sampling.py", "unknown reward 'sampling.py'; write NAME[@THRESHOLD][:WEIGHT], "),
    ("sampling.py:beauty", "sampling.py has no function or class 'beauty'"),
    ("sampling.py:SDE", "sampling.py has no function or class 'SDE'"),
    ("BROKEN:f", "broken.py, line 2: ZeroDivisionError: division by zero"),
    ("BROKEN:f@high", "threshold and weight must be numbers"),
    ("http://127.0.0.1:9", "unknown reward 'http://127.0.0.1:9'; write NAME[@THRESHOLD][:WEIGHT], "),
    ("hps,http://127.0.0.1:9/judge", "reward judge: nothing answers at http://127.0.0.1:9/judge: "),
    ("http://127.0.0.1:9/mean", "the function must not be called mean; rename it"),
])  # fmt: skip
def test_rewards_of_ones_own(trainer, reward, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "broken.py").write_text("x = 1\nx / 0\n")
    words = ["--reward", reward.replace("BROKEN", str(tmp_path / "broken.py")), "--output-dir", str(tmp_path / "out")]
    assert expected in complaint(trainer, *words)
    assert not (tmp_path / "out").exists()


@EVERY
def test_trackers(trainer, monkeypatch):
    assert complaint(trainer, "--track", "mlflow").startswith(
        "argument --track: invalid choice: 'mlflow' (choose from "
    )
    advice = "--track wandb needs the package wandb; install it: pip install wandb"
    for found in (None, importlib.machinery.ModuleSpec("wandb", None)):  # the second: only a folder of that name
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert complaint(trainer, "--track", "wandb") == advice


@EVERY
def test_prompts_that_cannot_be_shared_out(trainer, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    expected = "--prompts-per-iteration 3 must be a multiple of the 2 processes"
    assert complaint(trainer, "--prompts-per-iteration", "3") == expected


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--sde flow", "unrecognized arguments: --sde flow"),
        ("--shift 3", "unrecognized arguments: --shift 3"),
        ("--eta 0", "--eta must be in (0, 1]"),
        ("--eta 1.5", "--eta must be in (0, 1]"),
        ("--guidance 0.5", "--guidance must be at least 1"),
        ("--model tiny/flux", "--model tiny/flux is a FluxPipeline; this script trains a StableDiffusionPipeline"),
        ("--model tiny/hunyuan", "--model tiny/hunyuan is a HunyuanVideoPipeline"),
        ("--max-sequence-length 5", "unrecognized arguments: --max-sequence-length 5"),
        ("--dry-run --model tiny/flux", "cannot load tiny/flux/unet: "),
    ],
)
def test_options_of_diffusion(words, expected):
    assert expected in complaint(grpo_sd, *words.split())


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--model tiny/sd", "--model tiny/sd is a StableDiffusionPipeline; this script trains a FluxPipeline"),
        ("--model tiny/hunyuan", "--model tiny/hunyuan is a HunyuanVideoPipeline"),
        ("--frames 5", "unrecognized arguments: --frames 5"),
        ("--dry-run --model tiny/sd", "cannot load tiny/sd/transformer: "),
        ("--dry-run --model tiny/hunyuan", "its transformer is a HunyuanVideoTransformer3DModel"),
    ],
)
def test_options_of_flux(words, expected):
    assert expected in complaint(grpo_flux, *words.split())


@pytest.mark.parametrize("trainer", [grpo_flux, grpo_video], ids=lambda trainer: trainer.__name__)
@pytest.mark.parametrize(
    "words, expected",
    [
        ("--eta 0", "--eta must be above 0"),
        ("--sde fast", "argument --sde: invalid choice: 'fast' (choose from 'dance', 'flow', 'cps')"),
        ("--sde cps --eta 1.2", "--eta must be at most 1 with --sde cps"),
        ("--eta inf", "--eta must be above 0, got inf"),
        ("--shift 0", "--shift must be above 0"),
        ("--shift inf", "--shift must be above 0, got inf"),
        ("--guidance -5", "--guidance must be above 0, got -5.0"),
        ("--guidance nan", "--guidance must be above 0, got nan"),
        ("--max-sequence-length 0", "--max-sequence-length must be at least 1, got 0"),
        ("--max-sequence-length -3", "--max-sequence-length must be at least 1, got -3"),
        ("--sde-window-every 0", "--sde-window-every must be at least 1, got 0"),
        ("--ratio none", "argument --ratio: invalid choice: 'none' (choose from 'plain', 'guard', 'dppo')"),
        ("--ratio guard --sde cps --eta 0.8", "--ratio guard needs log-probabilities that --sde cps does not use"),
    ],
)
def test_options_of_rectified_flow(trainer, words, expected):
    assert expected in complaint(trainer, *words.split())


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--task i2v", "unrecognized arguments: --task i2v"),
        ("--preset tiny-t2v --frames 6", "--frames must be one more than a multiple of 4, and at least 1 here, got 6"),
        ("--preset tiny-i2v --reward hps --frames 1", "--frames must be one more than a multiple of 4, and at least 2"),
        ("--preset tiny-t2v --frames 0", "--frames must be at least 1, got 0"),
        ("--preset tiny-t2v --frames 1", "reward vq judges video"),
        ("--preset tiny-t2v --fps 0", "--fps must be above 0"),
        ("--preset tiny-t2v --true-guidance 0.5", "--true-guidance must be at least 1"),
        ("--preset tiny-t2v --fps inf", "--fps must be above 0, got inf"),
        ("--preset tiny-t2v --true-guidance inf", "--true-guidance must be at least 1 (off), got inf"),
        ("--preset tiny-t2v --frames 99999999999", "--frames must be at most 10**9"),
        ("--preset tiny-i2v --first-frame-steps 0", "--first-frame-steps must be at least 1"),
        ("--preset tiny-t2v --model tiny/sd", "--model tiny/sd is a StableDiffusionPipeline"),
        ("--preset tiny-t2v --transformer tiny/flux", "cannot load tiny/flux"),
        ("--preset tiny-t2v --transformer tiny/flux/transformer", "is a FluxTransformer2DModel, not a HunyuanVideo"),
        ("--preset tiny-t2v --transformer tiny/hunyuan/vae", "is a AutoencoderKLHunyuanVideo, not a HunyuanVideo"),
        ("--preset tiny-t2v --dry-run --model tiny/flux", "its transformer is a FluxTransformer2DModel, not a Hunyuan"),
        ("--preset tiny-t2v --height 20", "--height must be a multiple of 8"),
        ("--preset tiny-i2v --transformer tiny/nothing", "--transformer: no folder 'tiny/nothing'"),
        ("--preset tiny-t2i --reward mq", "reward mq judges video"),
        (
            "--preset tiny-wan --guidance 6",
            "--guidance is embedded guidance, which tiny/wan lacks; give --guidance 1",
        ),
        ("--preset tiny-t2v --model tiny/wan", "--guidance is embedded guidance, which tiny/wan lacks"),
        ("--preset tiny-wan --height 24", "--height must be a multiple of 16"),
        ("--preset tiny-wan --frames 6", "--frames must be one more than a multiple of 4, and at least 1 here, got 6"),
        (
            "--preset tiny-wan --transformer tiny/skyreels",
            "HunyuanVideoTransformer3DModel, not a WanTransformer3DModel",
        ),
        ("--preset tiny-t2v --transformer tiny/wan/transformer", "is a WanTransformer3DModel, not a HunyuanVideo"),
        ("--preset tiny-wan --dry-run --transformer tiny/skyreels", "is a HunyuanVideoTransformer3DModel, not a Wan"),
        (
            "--preset tiny-t2v --transformer tiny/skyreels --prompts prompts/tiny.txt",
            "image to video needs first frames",
        ),
    ],
)
def test_options_of_video(words, expected):
    assert expected in complaint(grpo_video, *words.split(" "))


@pytest.mark.parametrize("key, value", [("boundary_ratio", 0.875), ("expand_timesteps", True)])
def test_wan_2_2_is_refused(key, value, tmp_path):
    """Its pipeline has the name of Wan 2.1's, but two transformers, or a time for each token."""
    model = shutil.copytree("tiny/wan", tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {key: value}))
    assert f"--model {model} is a Wan 2.2" in complaint(grpo_video, "--preset", "tiny-wan", "--model", str(model))


@EVERY
@pytest.mark.parametrize("variables", [
    "WORLD_SIZE=2", "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=x",
    "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=99999",
])  # fmt: skip
def test_torchruns_variables(trainer, variables, monkeypatch):
    for variable in ["LOCAL_WORLD_SIZE=1", *variables.split()]:
        monkeypatch.setenv(*variable.split("="))
    assert "check torchrun's address and port" in complaint(trainer)


@pytest.mark.parametrize(
    "rows, expected",
    [
        (None, "image to video needs first frames: name a folder or a JSONL file with --first-frames"),
        ('{"prompt": "two crosses", "image": "good.png"}', "no first frame for 'a red circle' in "),
        ('{"prompt": "a red circle", "image": "none.png"}', "none.png'); correct its path, convert it to PNG or JPEG"),
        ('{"prompt": "a red circle", "image": "text.png"}', "cannot read the picture "),
        ('{"prompt": "a red circle", "image": "half.png"}', "cannot read the picture "),
        ('{"prompt": "a red circle"}', 'first_frames.jsonl line 1 is not {"image": "…"}'),
        ('{"prompt": "a red circle", "image": 7}', "line 1: the image must be a string"),
        ("a red circle\tgood.png", "line 1 is not"),
    ],
)
def test_first_frames(rows, expected, tmp_path):
    Image.effect_noise((48, 32), 90).save(tmp_path / "good.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    words = ["--preset", "tiny-i2v", "--prompts", str(tmp_path / "prompts.txt"), "--output-dir", str(tmp_path / "out")]
    words += ["--first-frames", "" if rows is None else str(tmp_path)]
    if rows is not None:
        (tmp_path / "first_frames.jsonl").write_text(rows + "\n")
    assert expected in complaint(grpo_video, *words)
    assert not (tmp_path / "out").exists()


def test_a_painter_needs_a_folder_for_its_pictures(tmp_path):
    words = [
        "--preset",
        "tiny-i2v",
        "--prompts",
        "prompts/tiny.txt",
        "--first-frame-model",
        "tiny/flux",
        "--first-frames",
    ]
    assert "image to video needs first frames: name a folder" in complaint(grpo_video, *words, "")
    (tmp_path / "frames.jsonl").write_text("")  # a file of the user's own is not added to
    assert "no first frame for " in complaint(grpo_video, *words, str(tmp_path / "frames.jsonl"))
    assert (tmp_path / "frames.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("none.txt", None, "no prompt file"),
        ("empty.txt", b"", "is empty; write one prompt a line"),
        ("blank.txt", b"a red circle\n\na cross\n", "line 2 is blank"),
        ("spaces.txt", b"a red circle\n   \na cross\n", "line 2 is blank"),
        ("latin.txt", "ein gr\u00fcner Kreis".encode("latin-1"), "must be UTF-8"),
        ("bad.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 is not"),
        ("broken.jsonl", b'{"prompt": "a"\n', "line 1 is not"),
        ("number.jsonl", b'{"prompt": 3}\n', "line 1: the prompt must be a string"),
        ("nan.jsonl", b'{"prompt": NaN}\n', "line 1: the prompt must be a string"),
        ("list.jsonl", b'["a"]\n', "line 1 is not"),
        ("text.JSONL", b"a red circle\n", "line 1 is not"),
        ("blank.jsonl", b'{"prompt": " "}\n', "line 1 is blank"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not"),
        ("digits.jsonl", b'{"prompt": ' + b"9" * 5000 + b"}", "line 1 is not"),
        ("mark.txt", b"\xef\xbb\xbf\n", "is empty"),
        ("wide.txt", "a red circle".encode("utf-16"), "must be UTF-8"),
        ("list.json", b'["a"]', "no prompt file"),
        ("table.csv", b"a", "no prompt file"),
        ("table.parquet", b"PAR1", "no prompt file"),
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
        assert data.load_prompts(str(tmp_path / name)) == ["a red circle", "two crosses"]


def test_a_prompt_set_is_fetched_once_and_kept_as_text(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "train.json").write_text('[{"prompt": "a  cat"}, {"prompt": "a dog"}, {"prompt": "a cat"}]')
    calls = []

    def download(repo, file, repo_type):
        calls.append((repo, file, repo_type))
        return str(tmp_path / "train.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    assert data.load_prompts("hpdv2") == ["a cat", "a dog"]
    assert data.load_prompts("hpdv2") == ["a cat", "a dog"]
    assert calls == [("ymhao/HPDv2", "train.json", "dataset")]


@pytest.mark.parametrize("name, file", [("vidprom", "video_prompts.txt"), ("consisid", "consist-id.txt")])
def test_a_prompt_set_at_an_address(name, file, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def fetch(address):
        calls.append(address)
        return "a man  walks\na woman sings\n\na man walks\n"

    monkeypatch.setattr(data, "text_at", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    assert data.load_prompts(name) == ["a man walks", "a woman sings"]
    assert data.load_prompts(name) == ["a man walks", "a woman sings"]
    (address,) = calls  # once, then from the cache
    assert address.startswith("https://") and address.endswith(f"/{file}")


def test_a_prompt_set_that_cannot_be_fetched(tmp_path, monkeypatch):
    import huggingface_hub

    def fetch(address):
        raise OSError("no route to host")

    monkeypatch.setattr(data, "text_at", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    with pytest.raises(RunError, match=r"cannot fetch video_prompts.txt of .* give --prompts a file of your own"):
        data.load_prompts("vidprom")


# ------------------------------------------------------------------------------------------------- weights of --init


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A folder of checkpoints of earlier runs: full weights of FLUX and Stable Diffusion, and a LoRA of FLUX."""
    folder = tmp_path_factory.mktemp("earlier")
    (folder / "model").mkdir()
    a_run(folder / "run")
    for name, part in {"flux": "transformer", "sd": "unet", "hunyuan": "transformer"}.items():
        shutil.copytree(Path("tiny", name, part), folder / name / part)
        write_sums(folder / name)
    network = FluxTransformer2DModel.from_pretrained("tiny/flux", subfolder="transformer")
    network = loading.prepare_network(network, lora_rank=2, lora_targets=grpo_flux.LORA_TARGETS)
    FluxPipeline.save_lora_weights(folder / "lora", transformer_lora_layers=get_peft_model_state_dict(network))
    write_sums(folder / "lora")
    return folder


def write_sums(checkpoint):
    """SHA256SUMS, as a run writes it."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    sums = {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    (checkpoint / "SHA256SUMS").write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()))


@pytest.mark.parametrize("trainer, name, words, expected", [
    (grpo_flux, "nothing", "", "there is no {}; give RUN/checkpoint-NNNNNN"),
    (grpo_flux, "model", "", "{} is no checkpoint, diffusers folder or LoRA file; give RUN/checkpoint-NNNNNN"),
    (grpo_flux, "run", "", "{} is no checkpoint, diffusers folder or LoRA file; give RUN/checkpoint-NNNNNN"),
    (grpo_flux, "run/metrics.jsonl", "", "{} is no checkpoint, diffusers folder or LoRA file; "),
    (grpo_flux, "sd", "", " {} (all weights) does not fit --model tiny/flux "),
    (grpo_flux, "hunyuan", "", " {} (all weights) does not fit --model tiny/flux "),
    (grpo_sd, "flux", "", " {} (all weights) does not fit --model tiny/sd "),
    (grpo_video, "flux", "", " {} (all weights) does not fit --model tiny/hunyuan "),
    (grpo_video, "hunyuan", "--preset tiny-i2v",
     " {} (all weights) does not fit --transformer tiny/skyreels with --lora-rank 0: 1 weights have other "),
    (grpo_flux, "lora", "", " {} (a LoRA of rank 2) does not fit --model tiny/flux with --lora-rank 0"),
    (grpo_flux, "lora", "--lora-rank 4", " {} (a LoRA of rank 2) does not fit --model tiny/flux with --lora-rank 4"),
    (grpo_sd, "lora", "--lora-rank 2", " {} (a LoRA of rank 2) does not fit --model tiny/sd with --lora-rank 2"),
    (grpo_flux, "flux", "--lora-rank 2", " {} (all weights) does not fit --model tiny/flux with --lora-rank 2"),
], ids=lambda x: x if isinstance(x, str) and " " not in x else "")  # fmt: skip
def test_init_with_what_is_no_start_for_this_run(trainer, name, words, expected, earlier, tmp_path):
    place = str(earlier / name)
    line = complaint(trainer, "--init", place, *words.split(), "--output-dir", str(tmp_path / "out"))
    assert line.startswith("--init") and expected.format(place) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how, expected", [
    ("cut", "cannot read {}/pytorch_lora_weights.safetensors ("),
    ("changed", " {} is damaged: its pytorch_lora_weights.safetensors is missing or damaged; take another checkpoint"),
    ("sums", " {} is damaged: its "),
])  # fmt: skip
def test_init_with_a_damaged_checkpoint(how, expected, earlier, tmp_path):
    copy = shutil.copytree(earlier / "lora", tmp_path / "copy")
    file = copy / ("SHA256SUMS" if how == "sums" else "pytorch_lora_weights.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content[:-20] if how == "cut" else content)
    line = complaint(grpo_flux, "--init", str(copy), "--lora-rank", "2", "--output-dir", str(tmp_path / "out"))
    assert line.startswith("--init") and expected.format(copy) in line


def test_init_and_resume_of_a_run_that_started_elsewhere(tmp_path):
    out = str(a_run(tmp_path / "run", init="runs/a/checkpoint-000050"))
    line = complaint(grpo_flux, "--output-dir", out, "--resume", "--init", "runs/b/checkpoint-000050")
    assert line.startswith("--init is 'runs/b/checkpoint-000050', but the run in ")
    assert "has 'runs/a/checkpoint-000050'; resume with the run's own options (or none)" in line


# ------------------------------------------------------------------------------------------------------ output folder


def a_run(folder, **changes):
    """The traces of a run that has one checkpoint."""
    import dataclasses

    config = dataclasses.asdict(grpo_flux.Config(preset="tiny", **grpo_flux.PRESETS["tiny"])) | changes
    config = config | {"script": "grpo_flux.py", "directory": os.getcwd()}
    (folder / "checkpoint-000010").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoint-000010.part").mkdir()
    line = complaint(grpo_flux, "--output-dir", str(tmp_path), "--resume")
    assert line.startswith("nothing to resume: no run in")


def test_resume_with_other_options(tmp_path):
    out = str(a_run(tmp_path / "run"))
    line = complaint(grpo_flux, "--output-dir", out, "--resume", "--group-size", "10")
    assert "--group-size is 10, but the run in" in line and "has 8" in line


def test_resume_takes_the_runs_own_options(tmp_path):
    out = a_run(tmp_path / "run", group_size=6, learning_rate=5e-5)
    words = ["--output-dir", str(out), "--resume", "--iterations", "99"]
    for more in ([], ["--preset", "tiny"], ["--group-size", "6"]):
        cfg = parse_config(grpo_flux.Config, grpo_flux.PRESETS, words + more)
        assert (cfg.preset, cfg.group_size, cfg.learning_rate, cfg.iterations) == ("tiny", 6, 5e-5, 99)


@pytest.mark.parametrize("value", ["0", "nan", "-1e-5"])
def test_resume_with_a_learning_rate_that_is_none(value, tmp_path):
    out = str(a_run(tmp_path / "run"))
    line = complaint(grpo_flux, "--output-dir", out, "--resume", f"--learning-rate={value}")
    assert line == f"--learning-rate must be above 0, got {float(value)}"


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    out = a_run(tmp_path / "run")
    before = tree(out)
    assert "already holds a run; add --resume" in complaint(grpo_flux, "--output-dir", str(out))
    assert tree(out) == before


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert re.match("could not write .*file/out", complaint(grpo_flux, "--output-dir", str(tmp_path / "file" / "out")))
    assert Path(tmp_path / "file").read_text() == ""


WITHOUT_FCNTL = """
import runpy, sys
import psutil  # its part for Linux needs resource
sys.modules |= {"fcntl": None, "resource": None}
for words in COMMANDS:
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as e:
        assert not e.code, e.code
"""


def test_scripts_start_where_python_lacks_fcntl_and_resource(tmp_path):
    """As on Windows."""
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    quick = {"iterations": 1, "prompts_per_iteration": 1, "group_size": 2, "steps": 3, "num_samples": 1}
    runs = {"grpo_sd.py": "sd", "grpo_flux.py": "flux", "grpo_video.py": "t2v"}
    commands = [[script, "--help"] for script in (*runs, "eval.py")]
    for script, case in runs.items():
        options = small.options(case) | quick | {"output_dir": tmp_path / case}
        commands.append([script, *command_words(options)])
    options = {"preset": "tiny", "checkpoint": tmp_path / "flux/checkpoint-000001", "output_dir": tmp_path / "eval"}
    options |= {"prompts": tmp_path / "prompts.txt", "metrics": "hps", "steps": 1, "images_per_prompt": 1}
    commands.append(["eval.py", *command_words(options)])
    subprocess.run([sys.executable, "-c", WITHOUT_FCNTL.replace("COMMANDS", repr(commands))], check=True)
    assert all((tmp_path / case / "checkpoint-000001").is_dir() for case in runs.values())
    assert (tmp_path / "eval/results.json").is_file()
