"""From the hub to a folder: what is fetched, by whom, and what happens without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import grpo_flux
import grpo_sd
import grpo_video
import rewards
from evaluation.models import Model, find_weights, load_pipeline
from fake_hub import COMMIT, FakeHub
from runtime import card, initial, loading, lora, processes
from runtime.files import read_json
from runtime.lora import LORA_FILE
from runtime.options import RunError, parse_config

ROOT = Path(__file__).resolve().parent.parent
HUB = ROOT / "tests/golden/hub"
REPOSITORIES = {
    "CompVis/stable-diffusion-v1-4": "stable-diffusion-v1-4",
    "black-forest-labs/FLUX.1-dev": "FLUX.1-dev",
    "hunyuanvideo-community/HunyuanVideo": "HunyuanVideo",
    "Skywork/SkyReels-V1-Hunyuan-I2V": "SkyReels-V1-Hunyuan-I2V",
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Wan2.1-T2V-1.3B-Diffusers",
}


def python(code, folder, *arguments, **variables):
    """Run code in a Python of its own, in an empty folder, whose hub's cache is FOLDER/home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


# -------------------------------------------------------------------------------------------------- a cache, no network

EACH_FAMILY = """
import json, sys, grpo_flux, grpo_sd, grpo_video
from runtime.options import parse_config
common = "--reward red.py:red --prompts prompts.txt --iterations 1 --prompts-per-iteration 1 --group-size 2 --steps 3 \
--updates-per-rollout 1 --micro-batch 2 --num-samples 1 --dtype float32 --height 32 --width 32 --keep-states 1".split()
video = ["--frames", "5", "--keep-best-worst", "0", "--max-sequence-length", "32"]
for name, trainer, words in (
    ("sd", grpo_sd, []),
    ("flux", grpo_flux, []),
    ("hunyuan", grpo_video, video),
    ("skyreels", grpo_video, ["--preset", "release-i2v", "--first-frames", "", "--shard-size", "0", *video]),
    ("wan", grpo_video, ["--preset", "wan", *video]),
):
    words = [*words, *common, "--output-dir", name]
    if name == "skyreels":
        words[words.index("prompts.txt")] = "frames.jsonl"
    trainer.main(parse_config(trainer.Config, trainer.PRESETS, words))
    print("trained", name)
"""


def test_every_default_model_trains_from_a_full_cache_without_a_network(tmp_path):
    for name, folder in REPOSITORIES.items():
        place = tmp_path / "home/hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(HUB / folder, place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(COMMIT)
    (tmp_path / "red.py").write_text("def red(visuals, prompts):\n    return visuals.flatten(1).mean(1)\n")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "frame.png")
    (tmp_path / "frames.jsonl").write_text(json.dumps({"prompt": "a red circle", "image": "frame.png"}) + "\n")
    run = python(EACH_FAMILY, tmp_path, HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line for line in run.stdout.splitlines() if line.startswith("trained")] == [
        f"trained {name}" for name in ("sd", "flux", "hunyuan", "skyreels", "wan")
    ]
    assert not (tmp_path / "__pycache__").exists()  # nothing is left beside the reader's own reward


# ---------------------------------------------------------------------------------------------------- what is fetched

FETCH = "import sys; from runtime.loading import find_folder\nfor name in sys.argv[1:]: print(find_folder(name))"
SD = "CompVis/stable-diffusion-v1-4"


@pytest.fixture
def repositories(tmp_path):
    """FLUX and Stable Diffusion as on the hub, with all that a loader does not need beside it."""
    for name in list(REPOSITORIES)[:2]:
        shutil.copytree(HUB / REPOSITORIES[name], tmp_path / "repositories" / name)
    folder = tmp_path / "repositories" / SD
    for part, file in {"unet": "diffusion_pytorch_model", "text_encoder": "model"}.items():
        for twin in (f"{file}.fp16.safetensors", f"{file}.bin", f"{file}.fp16.bin", "pytorch_model.bin"):
            (folder / part / twin).write_bytes(b"not needed")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text("{}")
    (folder / "sd-v1-4.ckpt").write_bytes(b"not needed")
    return tmp_path / "repositories"


def test_one_copy_of_the_weights_is_fetched_and_nothing_else(repositories, tmp_path):
    with FakeHub(repositories) as hub:
        assert python(FETCH, tmp_path, SD, HF_ENDPOINT=hub.address).returncode == 0
        fetched, requests = hub.fetched(), len(hub.requests)
        assert python(FETCH, tmp_path, SD, SD, HF_ENDPOINT=hub.address).returncode == 0
        assert len(hub.requests) == requests  # the second process asks for nothing
    assert python(FETCH, tmp_path, SD, HF_HUB_OFFLINE="1").returncode == 0
    assert fetched == sorted({
        f"{SD}/{file.relative_to(HUB / 'stable-diffusion-v1-4').as_posix()}"
        for file in (HUB / "stable-diffusion-v1-4").rglob("*")
        if file.is_file()
    })  # fmt: skip


def test_eight_processes_of_a_machine_make_one_request_for_a_file(repositories, tmp_path):
    code = "import multiprocessing, sys\nfrom runtime.loading import find_folder\nname = sys.argv[1]\n"
    code += "with multiprocessing.get_context('fork').Pool(8, maxtasksperchild=1) as pool:\n"
    code += "    print(len(set(pool.map(find_folder, [name] * 8, chunksize=1))))"
    with FakeHub(repositories) as hub:
        run = python(code, tmp_path, "black-forest-labs/FLUX.1-dev", HF_ENDPOINT=hub.address)
    assert run.stdout.split() == ["1"], run.stderr
    assert len(hub.fetched()) == len(set(hub.fetched())) > 30


@pytest.mark.slow
def test_a_fetch_that_broke_off_is_completed(repositories, tmp_path):
    file = "diffusion_pytorch_model-00003-of-00007.safetensors"
    code = "import sys; from runtime.loading import find_folder; from runtime.options import *\n"
    code += "with one_line_errors(): find_folder(sys.argv[1])"
    name = "black-forest-labs/FLUX.1-dev"
    with FakeHub(repositories, broken=[file]) as hub:
        run = python(code, tmp_path, name, HF_ENDPOINT=hub.address, HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert run.returncode == 1 and run.stderr.splitlines()[-1].startswith("error: --model: cannot fetch"), run.stderr
    offline = python(code, tmp_path, name, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1 and "what was fetched is kept" in offline.stderr.splitlines()[-1]
    with FakeHub(repositories) as hub:
        assert python(code, tmp_path, name, HF_ENDPOINT=hub.address).returncode == 0
    assert f"{name}/transformer/{file}" in hub.fetched()
    assert not [path for path in hub.fetched() if path.endswith("config.json")]  # those stayed


REWARDS = """
from rewards import *
print(hub_folder("a/clip", "open_clip_config.json", "open_clip_model.safetensors|open_clip_pytorch_model.bin"))
print(hub_folder("a/hps", "HPS.pt"), hub_folder("a/network", "config.json", "model.safetensors|pytorch_model.bin"))
print(hub_folder("a/tokenizer", "config.json", "tokenizer_config.json"))
for name, files in (("a/hps", "model.safetensors"), ("a/clip", "b|c")):
    try: hub_folder(name, "config.json", files)
    except RewardError as e: print(e)
"""


def test_a_reward_s_files_are_fetched_and_nothing_else(tmp_path):
    files = {
        "clip": ["open_clip_config.json", "vocab.json", "open_clip_pytorch_model.bin"],
        "hps": ["HPS.pt"],
        "network": ["config.json", "model.safetensors"],
        "tokenizer": ["config.json", "tokenizer_config.json", "merges.txt", "vocab.json"],
    }
    others = {"hps": ["old.json", "HPS2.pt"], "tokenizer": ["model.safetensors"]}
    others["network"] = ["pytorch_model.bin", "README.md", "part/config.json"]
    for name, wanted in files.items():
        for file in [*wanted, *others.get(name, [])]:
            (tmp_path / "hub/a" / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub/a" / name / file).write_text(file)
    with FakeHub(tmp_path / "hub") as hub:
        run = python(REWARDS, tmp_path, HF_ENDPOINT=hub.address)
    assert run.returncode == 0, run.stderr
    assert hub.fetched() == sorted(f"a/{name}/{file}" for name, wanted in files.items() for file in wanted)
    assert run.stdout.splitlines()[3:] == [
        "a/hps on the hub lacks config.json; give another one, or a complete folder",
        "a/clip on the hub lacks config.json; give another one, or a complete folder",
    ]
    shutil.rmtree(tmp_path / "hub")
    offline = python(REWARDS.partition("for")[0], tmp_path, HF_HUB_OFFLINE="1")
    assert offline.stdout.splitlines() == run.stdout.splitlines()[:3], offline.stderr


def test_what_cannot_be_fetched_is_one_line_with_advice(repositories, tmp_path):
    code = "import sys; from runtime.loading import find_folder; from runtime.options import *\n"
    code += "for name in sys.argv[1:]:\n    try: find_folder(name)\n    except RunError as e: print(e)"
    names = ("black-forest-labs/FLUX.1-dev", "no/body", f"{SD}@v7", f"{SD}@main", f"{SD}@{COMMIT}")
    with FakeHub(repositories, gated=[names[0]]) as hub:
        run = python(code, tmp_path, *names, HF_ENDPOINT=hub.address)
    gated, absent, revision = run.stdout.splitlines()
    assert "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev and log in with" in gated
    assert "--model: cannot fetch no/body from the hub: there is no such repository" in absent
    assert f"cannot fetch {SD}@v7 from the hub: it has no such revision; correct what follows the @" in revision


@pytest.mark.parametrize("files, expected", {
    "safetensors": (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
    "bin": (["pytorch_model.bin", "model.fp16.safetensors"], ["pytorch_model.bin"]),
    "half": (["model.fp16.safetensors", "pytorch_model.fp16.bin", "README.md"], ["model.fp16.safetensors"]),
    "shards": (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.fp16.safetensors"],
               ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
    "half shards": (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors", "tf_model.h5"],
                    ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]),
    "others": (["flux1-dev.safetensors", "open_clip_pytorch_model.bin", "flax_model.msgpack"], []),
}.values())  # fmt: skip
def test_the_copy_that_is_chosen(files, expected):
    found, _ = loading.choose_files([f"unet/{file}" for file in files], ["unet"])
    assert found == [f"unet/{file}" for file in expected]


def test_a_tokenizer_comes_with_its_chat_template():
    files = [f"tokenizer/{name}" for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja")]
    assert loading.choose_files(files, ["tokenizer"]) == (files, "")


@pytest.mark.parametrize("file, lacking", [
    ("unet/config.json", "unet/config.json"),
    ("tokenizer/tokenizer_config.json", "tokenizer/tokenizer_config.json"),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"), ("tokenizer/merges.txt", "tokenizer/tokenizer.json"),
])  # fmt: skip
def test_a_fetch_that_broke_off_before_any_small_file_is_not_whole(file, lacking):
    names = "config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"
    files = [f"unet/{name}" for name in names]
    files += [f"tokenizer/{name}" for name in ("tokenizer_config.json", "vocab.json", "merges.txt")]
    assert loading.choose_files(files, ["unet", "tokenizer"])[1] == ""
    files.remove(file)
    assert loading.choose_files(files, ["unet", "tokenizer"])[1] == lacking


def test_a_pipeline_without_its_index_is_not_whole():
    files, parts = ["unet/config.json", "unet/model.safetensors"], ["unet"]
    assert loading.choose_files(files, parts) == (files, "")
    cached = ["tokenizer_config.json", "tokenizer.json"]  # of a network whose tokenizer alone was fetched before
    assert loading.choose_files(cached, [""])[1] == "config.json"
    assert loading.choose_files(files, parts, index="model_index.json")[1] == "model_index.json"
    whole = ["model_index.json", *files]
    assert loading.choose_files(whole, parts, index="model_index.json") == (whole, "")


# ------------------------------------------------------------------------------------------------- forms of folders


def copy_of(name, tmp_path):
    return Path(shutil.copytree(HUB / name, tmp_path / "model"))


@pytest.mark.parametrize("form", ["fp16", "bin"])
def test_folders_with_other_copies_of_the_weights(form, tmp_path, capsys):
    folder = copy_of("stable-diffusion-v1-4", tmp_path)
    for file in sorted(folder.rglob("*.safetensors")):
        weights = load_file(file)
        if form == "fp16":
            save_file({n: w.half() for n, w in weights.items()}, f"{file.with_suffix('')}.fp16.safetensors")
        else:
            stem = "pytorch_model" if file.stem == "model" else file.stem
            torch.save(weights, file.with_name(f"{stem}.bin"))
        file.unlink()
    cfg = parse_config(grpo_sd.Config, grpo_sd.PRESETS, ["--model", str(folder)])
    pipe, unet, _ = grpo_sd.load_models(cfg, processes.start_world("float32"), None)
    expected = load_file(HUB / "stable-diffusion-v1-4/unet/diffusion_pytorch_model.safetensors")
    for name, weight in unet.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[name].half().float() if form == "fp16" else expected[name].float())
    assert pipe.text_encoder.dtype == torch.float32
    assert ("/unet: the only weights here are fp16" in capsys.readouterr().out) == (form == "fp16")


def test_a_single_file_is_answered_with_the_call_that_converts_it(tmp_path):
    file = tmp_path / "dream.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1)}, file)
    expected = rf"--model: no folder '{file}'; .* of a single file .*PIPELINE\.from_single_file\(FILE\)"
    with pytest.raises(RunError, match=expected):
        grpo_sd.check(parse_config(grpo_sd.Config, grpo_sd.PRESETS, ["--model", str(file), "--reward", "hps"]))


# ---------------------------------------------------------------------------------------------------------------- LoRA


def test_an_exported_lora_needs_no_metadata(tmp_path):
    """W + B·A, which is what a reader without diffusers' metadata computes, is the network that was trained."""
    from test_trainers import train

    out = train("flux", tmp_path / "run", lora_rank=4, learning_rate=0.01, num_samples=1, iterations=2)
    file = out / "checkpoint-000002" / LORA_FILE
    base = load_file("tiny/flux/transformer/diffusion_pytorch_model.safetensors")
    lora = load_file(file)
    import diffusers

    pipe = diffusers.FluxPipeline.from_pretrained("tiny/flux")
    pipe.load_lora_weights(file.parent)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused, effect, error = pipe.transformer.state_dict(), 0.0, 0.0
    for name in [name for name in lora if ".lora_A." in name]:
        layer = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
        delta = lora[name.replace("lora_A", "lora_B")] @ lora[name]
        effect += (fused[f"{layer}.weight"] - base[f"{layer}.weight"]).norm().item()
        error += (base[f"{layer}.weight"] + delta - fused[f"{layer}.weight"]).norm().item()
    assert effect > 0.01 and error < 0.01 * effect


def test_the_card_gives_a_revision_as_an_argument(tmp_path):
    made = {name: type(kind, (), {})() for name, kind in (("pipeline", "FluxPipeline"), ("network", "Network"))}
    made |= {"is_lora": True, "component": "transformer", "world": SimpleNamespace(dtype=torch.bfloat16)}
    config = grpo_flux.Config(model="OWNER/NAME@v1")
    text = card.model_card(tmp_path, config, SimpleNamespace(**made), 3, {})
    assert 'FluxPipeline.from_pretrained("OWNER/NAME", revision="v1", dtype=' in text
    assert "base_model: OWNER/NAME\n" in text


@torch.no_grad()
def test_the_original_names_of_wans_lora(tmp_path):
    """The model card's replacements make names that diffusers reads as the original repository's, with one effect."""
    import diffusers
    from peft import get_peft_model_state_dict

    cfg = parse_config(grpo_video.Config, grpo_video.PRESETS, ["--preset", "tiny-wan", "--lora-rank", "2"])
    _, network, _ = grpo_video.load_models(cfg, processes.start_world("float32"), None)
    for number, parameter in enumerate(processes.trainable(network)):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
    layers, _ = lora.public_lora(network, network.state_dict())
    names = [
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        ("to_out.0", "o"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ]
    renamed = {}
    for name, weight in layers.items():
        for ours, theirs in names:
            name = name.replace(f".{ours}.", f".{theirs}.")
        renamed[f"diffusion_model.{name}"] = weight
    pipe = diffusers.WanPipeline.from_pretrained("tiny/wan")
    pipe.load_lora_weights(renamed)
    for name, module in network.named_modules():
        if hasattr(module, "lora_B"):
            other = pipe.transformer.get_submodule(name)
            (adapter,) = other.active_adapters
            torch.testing.assert_close(other.lora_A[adapter].weight, module.lora_A["default"].weight)
            ours, theirs = (m.scaling[a] * m.lora_B[a].weight for m, a in ((module, "default"), (other, adapter)))
            torch.testing.assert_close(theirs, ours)
    net = pipe.transformer  # and back, as docs/full-scale.md has it
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(net, adapter_name=adapter),
        transformer_lora_adapter_metadata=net.peft_config[adapter].to_dict(),
    )
    back = lora.read_lora(tmp_path / LORA_FILE)
    assert back.keys() == {f"transformer.{name}" for name in layers}
    for name, weight in layers.items():
        torch.testing.assert_close(back[f"transformer.{name}"], weight)


@torch.no_grad()
def test_kohya_s_names_of_stable_diffusion_s_lora(tmp_path):
    """The model card's call makes a file that diffusers reads from kohya's names, with the same effect."""
    import diffusers
    from diffusers.utils import convert_state_dict_to_kohya

    cfg = parse_config(grpo_sd.Config, grpo_sd.PRESETS, ["--preset", "tiny", "--lora-rank", "2"])
    _, network, _ = grpo_sd.load_models(cfg, processes.start_world("float32"), None)
    for parameter in processes.trainable(network):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    z, text = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((1, 4, 8, 8), (1, 77, 64)))
    expected = network(z, 501, text).sample
    layers, _ = lora.public_lora(network, network.state_dict())
    ours = {f"unet.{name}": weight for name, weight in layers.items()}
    save_file(convert_state_dict_to_kohya(ours), tmp_path / "kohya.safetensors")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("tiny/sd")
    base = pipe.unet(z, 501, text).sample
    pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors")
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(pipe.unet(z, 501, text).sample, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["new", "metadata", "rslora", "release", "alpha keys"])
def test_init_reads_every_form_of_a_lora(form, tmp_path):
    """One LoRA, written with alpha = rank, with alpha = 2 rank in the metadata, as an rsLoRA, whose scale is
    alpha / sqrt(rank), with a file beside it as the release's trainer does, or with weights called alpha."""
    cfg = parse_config(grpo_flux.Config, grpo_flux.PRESETS, ["--preset", "tiny", "--lora-rank", "2"])
    world = processes.start_world("float32")
    _, network, _ = grpo_flux.load_models(cfg, world, None)
    for number, parameter in enumerate(processes.trainable(network)):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    layers, metadata = lora.public_lora(network, network.state_dict())
    assert metadata["lora_alpha"] == metadata["r"] == 2
    weights = {f"transformer.{name}": weight.clone() for name, weight in layers.items()}
    stored = {f"transformer.{name}": metadata[name] for name in ("lora_alpha", "r")}
    if form != "new":
        weights = {name: weight / 2 if ".lora_B." in name else weight for name, weight in weights.items()}
    if form == "metadata":
        stored["transformer.lora_alpha"] = 4
    if form == "release":  # its trainer's file has no metadata, and this beside it
        beside = {"step": 300, "lora_params": {"lora_rank": 2, "lora_alpha": 4, "target_modules": ["to_q"]}}
        (tmp_path / "lora_config.json").write_text(json.dumps(beside))
        stored = {}
    if form == "rslora":
        stored |= {"transformer.lora_alpha": 2 * 2**0.5, "transformer.use_rslora": True}
    if form == "alpha keys":
        weights |= {n.replace("lora_B.weight", "alpha"): torch.tensor(4.0) for n in list(weights) if ".lora_B." in n}
        stored = {}
    save_file(weights, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(stored)} if stored else None)
    cfg = parse_config(
        grpo_flux.Config, grpo_flux.PRESETS,
        ["--preset", "tiny", "--lora-rank", "2", "--init", str(tmp_path / "lora.safetensors")],
    )  # fmt: skip
    model = Model("lora", "lora", str(tmp_path / "lora.safetensors"), "")
    pipe = load_pipeline(model, "FluxPipeline", "tiny/flux", "", world)  # as eval.py reads it
    for name, module in network.named_modules():
        if hasattr(module, "lora_B"):
            B = pipe.transformer.get_submodule(name)
            adapter = B.active_adapters[0]
            ours, theirs = (m.scaling[a] * m.lora_B[a].weight for m, a in ((module, "default"), (B, adapter)))
            torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)
    grpo_flux.check(cfg)
    _, started, _ = grpo_flux.load_models(cfg, world, initial.find_init(cfg.init))
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(started.state_dict()[name], weight, rtol=1e-6 if form == "rslora" else 0, atol=0)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_strength_of_a_layer_follows_its_own_rank_as_in_peft(rslora, tmp_path):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 6), "b": torch.nn.Linear(6, 7)})
    options = {"r": 4, "lora_alpha": 8, "rank_pattern": {"b": 2}, "lora_bias": True, "use_rslora": rslora}
    model = get_peft_model(layers, LoraConfig(target_modules=["a", "b"], init_lora_weights=False, **options))
    prefix = "base_model.model."
    weights = {n.replace(prefix, "transformer."): w for n, w in get_peft_model_state_dict(model).items()}
    assert any(name.endswith("lora_B.bias") for name in weights)
    metadata = {f"transformer.{name}": value for name, value in model.peft_config["default"].to_dict().items()}
    file = tmp_path / "lora.safetensors"
    save_file(weights, file, {"lora_adapter_metadata": json.dumps(metadata, default=sorted)})
    found = lora.read_lora(file)
    for name in ("a", "b"):
        A, B, bias = (found[f"transformer.{name}.{part}"] for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
        layer = model.base_model.model[name]
        torch.testing.assert_close(B @ A, layer.get_delta_weight("default"))
        torch.testing.assert_close(bias, layer.lora_B["default"].bias * layer.scaling["default"])


def test_a_base_that_is_quantized_already_is_refused_before_it_is_loaded(tmp_path):
    for part in ("transformer", "text_encoder_2"):
        model = Path(shutil.copytree("tiny/flux", tmp_path / part))
        config = json.loads((model / part / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (model / part / "config.json").write_text(json.dumps(config))
        cfg = parse_config(grpo_flux.Config, grpo_flux.PRESETS, ["--preset", "tiny", "--model", str(model)])
        with pytest.raises(RunError, match=rf"{part} is quantized already; give --model .* and --quantize"):
            grpo_flux.check(cfg)
    with pytest.raises(RunError, match=r"is quantized already; give --transformer"):
        loading.load_config(str(tmp_path / "transformer/transformer"), None, "--transformer")


def test_a_checkpoint_is_of_a_base_whose_config_is_older_than_a_key(tmp_path):
    """FLUX.1-dev's own config.json has no axes_dims_rope; the default is a tuple, and a checkpoint has a list."""
    config = read_json(HUB / "FLUX.1-dev/transformer/config.json") | {"axes_dims_rope": [16, 56, 56]}
    for name, own in (("checkpoint", config), ("base", {k: v for k, v in config.items() if k != "axes_dims_rope"})):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer/config.json").write_text(json.dumps(own))
    original = loading.load_config(str(tmp_path / "base/transformer"))
    found = find_weights(str(tmp_path / "checkpoint"), "FluxPipeline", "transformer", "base", original)
    assert found == ("network", str(tmp_path / "checkpoint/transformer"))


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_that_does_not_read_as_its_files_say_is_refused(monkeypatch):
    import transformers

    folder = HUB / "HunyuanVideo/tokenizer"
    monkeypatch.setattr(transformers, "PreTrainedTokenizerFast", transformers.LlamaTokenizerFast)
    with pytest.raises(rewards.RewardError, match=r"reads 'A red Circle, .* its files say"):
        rewards.load_tokenizer(folder, "LlamaTokenizerFast")


TOKENIZERS = sorted(file.parent for file in HUB.rglob("tokenizer_config.json"))


@pytest.mark.parametrize("folder", TOKENIZERS, ids=lambda folder: "-".join(folder.parts[-2:]))
def test_the_ids_of_the_files_themselves(folder):
    """Of tokenizer.json, of spiece.model, or of vocab.json and merges.txt."""
    kind = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    tokenizer = rewards.load_tokenizer(folder, kind)
    ids = rewards.file_ids(folder, rewards.PROBE)
    assert len(set(ids)) > 8 and tokenizer(rewards.PROBE, add_special_tokens=False)["input_ids"] == ids
