"""The rewards against the packages they come from, and what they refuse."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from rewards import CLIPReward, HPSReward, RewardError, load_reward, parse_paths, parse_spec

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "hps"
TINY = {"hps": "tiny/hps", "clip": "tiny/clip"}


def picture(height, width, seed=0):
    """Smooth random colours with some detail, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def tensor(array):
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 255


# ---------------------------------------------------------------------------------------------------------------- hps


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference folder ../shared/golden is not beside this checkout")
def test_hps_matches_the_reference_scores():
    cases, reward = np.load(GOLDEN / "cases.npz"), HPSReward(str(GOLDEN))
    for i, score in enumerate(cases["scores"]):
        ours = reward(tensor(cases[f"image{i}"]), [str(cases["prompts"][i])])
        assert abs(ours.item() - score) < 1e-5


@pytest.mark.parametrize("height, width", [(64, 64), (100, 160), (300, 200), (40, 40)])
def test_hps_equals_the_hpsv2_package(height, width, monkeypatch):
    """hpsv2's own scoring, on our small model: its preprocessing, its tokenizer, its way from features to score."""
    theirs_open = gzip.open
    vocabulary = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"  # the package forgot its copy
    monkeypatch.setattr(
        gzip, "open", lambda file, *a: theirs_open(vocabulary if "bpe_simple_vocab" in str(file) else file, *a)
    )
    from hpsv2 import img_score
    from hpsv2.src.open_clip.transform import image_transform

    reward = HPSReward("tiny/hps")
    preprocess = image_transform(reward.size, is_train=False, resize_longest_max=True)

    class Model(torch.nn.Module):
        def forward(self, image, text):
            features = reward.model.encode_image(image, normalize=True), reward.model.encode_text(text, normalize=True)
            return dict(zip(["image_features", "text_features"], features, strict=True))

        def load_state_dict(self, state_dict):
            assert "visual.conv1.weight" in state_dict

    monkeypatch.setattr(img_score, "model_dict", {"model": Model(), "preprocess_val": preprocess})
    weights = next(str(path) for path in Path("tiny/hps").glob("*.pt"))
    image = picture(height, width)
    theirs = img_score.score(Image.fromarray(image), "a red circle", cp=weights, hps_version="v2.1")[0]
    assert abs(reward(tensor(image), ["a red circle"]).item() - float(theirs)) < 1e-5


# --------------------------------------------------------------------------------------------------------------- clip


@pytest.mark.parametrize("height, width", [(64, 64), (48, 96), (200, 120)])
def test_clip_equals_open_clips_own_pipeline(height, width):
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{Path('tiny/clip').resolve()}")
    tokens = open_clip.get_tokenizer(f"local-dir:{Path('tiny/clip').resolve()}")(["two blue squares"])
    image = picture(height, width)
    with torch.no_grad():
        pixels = preprocess(Image.fromarray(image))[None]
        features = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
        theirs = (features[0] * features[1]).sum().item()
    ours = CLIPReward("tiny/clip")(tensor(image), ["two blue squares"]).item()
    assert abs(ours - theirs) < (1e-6 if (height, width) == (64, 64) else 2e-2)  # PIL resizes in 8 bits, we do not


# ----------------------------------------------------------------------------------------------------------- together


def test_each_image_is_scored_against_its_own_prompt():
    """The official PickScore compares every image with the first prompt."""
    images = torch.cat([tensor(picture(64, 64, seed)) for seed in range(3)])
    prompts = ["a red circle", "three blue squares", "a green cross"]
    reward = load_reward("hps,clip", TINY)
    together = reward(images, prompts)
    for name, scores in together.items():
        alone = torch.cat([reward(images[i, None], [prompts[i]])[name] for i in range(3)])
        torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)
        assert scores.dtype == torch.float32
        assert scores.std() > 0


def test_specs_weights_and_thresholds():
    images, prompts = torch.cat([tensor(picture(64, 64, seed)) for seed in range(6)]), ["a red circle"] * 6
    raw = load_reward("hps", TINY)(images, prompts)["hps"]
    threshold = raw.sort().values[2:4].mean().item()
    reward = load_reward(f"hps@{threshold}:0.7,clip:1.4", TINY)
    scores = reward(images, prompts)
    assert reward.weights == {"hps": 0.7, "clip": 1.4}
    assert scores["hps"].tolist() == (raw > threshold).float().tolist()
    assert scores["hps"].sum() == 3
    assert parse_paths("hps=a, clip=b/c") == {"hps": "a", "clip": "b/c"}


@pytest.mark.parametrize(
    "spec, message",
    [
        ("beauty", "unknown reward 'beauty'"),
        ("", "unknown reward ''"),
        ("hps:", "unknown reward 'hps:'"),
        ("hps@high", "must be numbers"),
        ("hps:much", "must be numbers"),
        ("hps,hps@0.2", "given twice"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(RewardError, match=message):
        parse_spec(spec)


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.zeros(2, 64, 64, 3), ["a", "b"], r"must be \(B, 3, H, W\)"),
        (torch.zeros(3, 64, 64), ["a"], r"must be \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 64, 64), ["a"], "one prompt per image"),
        (torch.zeros(1, 3, 64, 64), ["a", "b"], "one prompt per image"),
        (torch.zeros(1, 3, 64, 64), "a", "one prompt per image"),
        (torch.full((1, 3, 64, 64), 255.0), ["a"], r"pixels must be in \[0, 1\]"),
        (torch.full((1, 3, 64, 64), float("nan")), ["a cat"], "for the prompt 'a cat'"),
    ],
)
@pytest.mark.parametrize("name", ["hps", "clip"])
def test_bad_images_are_refused(name, images, prompts, message):
    with pytest.raises(RewardError, match=message):
        load_reward(name, TINY)(images, prompts)


def test_a_score_that_is_not_a_number_names_prompt_and_reward(monkeypatch):
    """The official code turns a failing reward into -1, which shifts the whole group."""
    reward = load_reward("clip", TINY)
    reward.scorers["clip"] = lambda images, prompts: torch.tensor([0.5, float("nan")])
    with pytest.raises(RewardError, match="reward clip gave nan for the prompt 'the second'"):
        reward(torch.zeros(2, 3, 64, 64), ["the first", "the second"])


def test_folders_that_are_not_as_they_should_be(tmp_path):
    with pytest.raises(RewardError, match="no folder"):
        load_reward("hps", {"hps": str(tmp_path / "nowhere" / "at" / "all")})
    with pytest.raises(RewardError, match=r"exactly one \*.pt"):
        load_reward("hps", {"hps": str(tmp_path)})
    with pytest.raises(RewardError, match="clip: could not load"):
        load_reward("clip", {"clip": str(tmp_path)})
    with pytest.raises(RewardError, match="which is no reward"):
        load_reward("hps", {"beauty": str(tmp_path)})
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "a.pt")
    config = next(Path("tiny/hps").glob("*.json"))
    (tmp_path / "model.json").write_text(config.read_text())
    with pytest.raises(RewardError, match="does not fit its model config"):
        load_reward("hps", {"hps": str(tmp_path)})


@pytest.mark.parametrize(
    "name, file", [("hps", "hps/HPS_tiny.pt"), ("clip", "clip/open_clip_pytorch_model.bin")], ids=["hps", "clip"]
)
def test_checkpoints_with_missing_or_unexpected_keys_are_refused(tmp_path, name, file):
    shutil.copytree(Path("tiny") / name, tmp_path, dirs_exist_ok=True)
    saved = torch.load(Path("tiny") / file, weights_only=True)
    state = saved.get("state_dict", saved)
    for change in ({"logit_scale": None}, {"new": torch.zeros(1)}):
        changed = {key: w for key, w in (state | change).items() if w is not None}
        torch.save({"state_dict": changed} if name == "hps" else changed, tmp_path / Path(file).name)
        with pytest.raises(RewardError) as error:
            load_reward(name, {name: str(tmp_path)})
        assert "\n" not in str(error.value)
