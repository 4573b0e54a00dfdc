"""VideoAlign and PickScore against independent implementations, and what they refuse."""

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLModel,
)

import rewards
from rewards import (
    PickScoreReward,
    RewardError,
    VideoAlignReward,
    fold_lora,
    frame_indices,
    load_reward,
    parse_paths,
)

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "videoalign"
RAW = [[0.03331, 0.859396, -0.04173], [0.421522, -0.171597, -0.160841]]  # vq, mq, ta
TEMPLATE = "Look. <|VQ_reward|> It moves. <|MQ_reward|> It was asked for {text_prompt}: <|TA_reward|>"
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


class Judge(nn.Module):
    """The modules of the released model under the names they had when it was trained."""

    def __init__(self, config):
        super().__init__()
        qwen = Qwen2VLModel(config)
        self.visual, self.model = qwen.visual, qwen.language_model
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.rm_head = nn.Linear(config.text_config.hidden_size, 1, bias=False)


def make_judge(folder, seed=0):
    """A random judge in the released layout, written by peft itself. Returns the PEFT model."""
    folder.mkdir(exist_ok=True)
    letters = byte_letters()
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": CONTROL})
    tokenizer.save_pretrained(folder)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    torch.manual_seed(seed)
    judge = Judge(config)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r"model\.layers\..*_proj")
    judge = peft.get_peft_model(judge, lora)
    for parameter in judge.parameters():  # larger than transformers' own, so that everything counts
        parameter.data = 0.15 * torch.randn_like(parameter) + (parameter.data if parameter.ndim == 1 else 0)
    torch.save(judge.state_dict(), folder / "model.pth")
    (folder / "prompt_template.txt").write_text(TEMPLATE)
    config.prompt_template_sha256 = hashlib.sha256(TEMPLATE.encode()).hexdigest()
    config.save_pretrained(folder)
    return judge


def byte_letters():
    """The 256 characters by which byte-level tokenizers write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def clip(frames=9, height=64, width=64, seed=0):
    """Smooth random colours that drift, (F, 3, H, W) in whole bytes."""
    noise = torch.rand(1, 3, frames, 5, 6, generator=torch.Generator().manual_seed(seed))
    video = nn.functional.interpolate(noise, (frames, height, width), mode="trilinear")[0].transpose(0, 1)
    return (video * 255).round() / 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("judge")
    make_judge(path)
    return path


@pytest.fixture(scope="module")
def judge(folder):
    return VideoAlignReward(str(folder))


def scores(judge, videos, prompts, fps=8.0, **options):
    return torch.stack([*judge(videos, prompts, fps, **options).values()], 1)


# ---------------------------------------------------------------------------------------------------------- videoalign


@pytest.mark.skipif(
    not GOLDEN.is_dir(),
    reason="VideoAlign's reference scores need its own prompt template, which is not ours to copy: no ../shared/golden",
)
def test_videoalign_matches_the_reference_scores_and_token_ids():
    """VideoAlign's own classes under the transformers of its time, on videos of two sizes and lengths."""
    cases, judge = np.load(GOLDEN / "cases.npz"), VideoAlignReward(str(GOLDEN))
    videos = [torch.from_numpy(cases[f"video{i}"]) / 255 for i in range(2)]
    prompts, fps = [str(p) for p in cases["prompts"]], float(cases["fps"][0])
    raw = torch.from_numpy(cases["raw_rewards"])
    assert (scores(judge, videos, prompts, fps, normalize=False) - raw).abs().max() < 1e-4
    for i in range(2):
        assert (scores(judge, videos[i][None], prompts[i : i + 1], fps, normalize=False) - raw[i]).abs().max() < 1e-4
    grids = [judge.patches(video, fps)[1] for video in videos]
    texts = [judge.text(prompt, grid) for prompt, grid in zip(prompts, grids, strict=True)]
    assert [list(grid) for grid in grids] == cases["video_grid_thw"].tolist()
    assert judge.tokenizer(texts, padding=True).input_ids == cases["input_ids"].tolist()


def test_videoalign_keeps_its_scores(judge):
    """Numbers of the day on which the same code matched the reference to 2e-6; the model comes from a seed."""
    videos, prompts = [clip(), clip(13, 48, 96, seed=1)], ["a red circle", "two dogs, cinematic, 4k"]
    raw = torch.tensor(RAW)
    assert torch.allclose(scores(judge, videos, prompts, normalize=False), raw, atol=1e-4)
    mean, std = torch.tensor([3.6757, 1.1646, 2.8105]), torch.tensor([2.2476, 1.3811, 2.5121])
    assert torch.allclose(scores(judge, videos, prompts), (raw - mean) / std, atol=1e-4)


def test_sizes_of_the_authors_reader(judge):
    for size, patches in (
        ((480, 480), (32, 32)),  # at most 448² pixels, in patches of 14²
        ((400, 640), (24, 40)),
        ((64, 64), (24, 24)),  # at least 128 · 28²
        ((96, 128), (20, 28)),
        ((400, 400), (28, 28)),  # in between: the nearest multiples of 28
    ):
        assert judge.patches(torch.zeros(4, 3, *size), fps=8)[1] == (2, *patches)


def test_frames_of_the_authors_reader():
    assert len(frame_indices(53, 8)) == 14
    assert frame_indices(53, 8).tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]
    assert frame_indices(13, 8).tolist() == frame_indices(13, 100).tolist() == [0, 4, 8, 12]  # at least 4
    assert frame_indices(9, 1).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]  # an even number, at most all
    assert len(frame_indices(2000, 2)) == 768


def test_positions_are_the_same_on_all_three_axes_and_reach_the_attention(judge):
    seen = []
    hook = judge.model.language_model.rotary_emb.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    videos, prompts = [clip(), clip(seed=1)], ["a", "bcd"]
    with_ours = scores(judge, videos, prompts)
    hook.remove()
    length = seen[0].shape[-1]
    assert seen[0].expand(3, 2, length).tolist() == torch.arange(length).expand(3, 2, length).tolist()
    # Qwen2-VL's own positions give other scores, so the assertion above is about something that matters.
    forward = judge.model.forward
    kinds = {"position_ids": None}
    judge.model.forward = lambda **kw: forward(
        **kw | kinds, mm_token_type_ids=2 * (kw["input_ids"] == judge.model.config.video_token_id).int()
    )
    assert (scores(judge, videos, prompts) - with_ours).abs().max() > 1e-3
    judge.model.forward = forward


def test_folding_equals_pefts_own_merge(tmp_path):
    model = make_judge(tmp_path, seed=3)
    ours = fold_lora(model.state_dict(), VideoAlignReward.LORA_SCALE)
    theirs = fold_lora(model.merge_and_unload().state_dict(), 0.0)
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)
    assert sum(".lora_" in name for name in torch.load(tmp_path / "model.pth")) == 2 * 7 * 2  # layers, linears, A and B


def test_patches_are_those_of_transformers_own_processor(judge):
    from transformers import Qwen2VLVideoProcessor

    video = clip(8, 336, 364)
    theirs = Qwen2VLVideoProcessor()(
        [(video * 255).byte()], do_resize=False, do_sample_frames=False, return_tensors="pt"
    )
    ours, grid = judge.patches(video, fps=2)
    assert theirs.video_grid_thw.tolist() == [list(grid)]
    assert torch.allclose(ours, theirs.pixel_values_videos, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(judge):
    videos = [clip(9), clip(16, 80, 64, seed=1), clip(30, 64, 112, seed=2)]
    prompts = ["a red circle", "a long prompt " * 10, ""]
    alone = torch.cat([scores(judge, [v], [p]) for v, p in zip(videos, prompts, strict=True)])
    assert torch.allclose(scores(judge, videos, prompts), alone, atol=1e-5)
    same = torch.stack([videos[0], videos[0].flip(0)])  # a tensor as good as a list, with the order of frames seen
    assert torch.allclose(scores(judge, same, ["x", "x"]), scores(judge, list(same), ["x", "x"]), atol=1e-6)
    assert (scores(judge, same, ["x", "x"]).diff(dim=0).abs() > 1e-4).all()


def test_only_ta_reads_the_prompt(judge):
    a, b = scores(judge, [clip()] * 2, ["a red circle", "a blue square"])
    assert torch.allclose(a[:2], b[:2], atol=1e-5)  # the prompt stands behind the tokens of VQ and MQ
    assert (a[2] - b[2]).abs() > 1e-4


@pytest.mark.parametrize(
    "videos, prompts, fps, message",
    [
        (torch.zeros(2, 3, 64, 64), ["a", "b"], 8, r"each must be \(F, 3, H, W\), got \(3, 64, 64\)"),
        (torch.zeros(1, 4, 64, 64, 3), ["a"], 8, r"each must be \(F, 3, H, W\), got \(4, 64, 64, 3\)"),
        ([torch.zeros(64, 64, 3)], ["a"], 8, r"each must be \(F, 3, H, W\), got \(64, 64, 3\)"),
        (torch.zeros(1, 3, 3, 64, 64), ["a"], 8, "at least 4 frames, got 3"),
        (torch.full((1, 4, 3, 64, 64), 255.0), ["a"], 8, r"pixels must be in \[0, 1\], found 255 to 255"),
        (torch.full((1, 4, 3, 64, 64), float("nan")), ["a cat"], 8, "found nan to nan for 'a cat'"),
        (torch.zeros(1, 4, 3, 64, 64), ["a", "b"], 8, "one prompt per image or video, got 1 and prompts"),
        (torch.zeros(1, 4, 3, 64, 64), "a", 8, "one prompt per image or video"),
        (torch.zeros(1, 4, 3, 64, 64), ["a"], None, "fps must be the videos' frames per second, above 0, got None"),
        (torch.zeros(1, 4, 3, 64, 64), ["a"], 0, "fps must be .* got 0"),
        (torch.zeros(1, 4, 3, 64, 64), ["a"], -8, "fps must be .* got -8"),
        (torch.zeros(1, 4, 3, 64, 64), ["a"], float("nan"), "fps must be .* got nan"),
        (torch.zeros(1, 4, 3, 64, 64), ["a <|VQ_reward|>"], 8, "control tokens"),
    ],
)
def test_bad_calls_are_refused_in_one_line(judge, videos, prompts, fps, message):
    with pytest.raises(RewardError, match=message) as error:
        judge(videos, prompts, fps)
    assert "\n" not in str(error.value)


def test_a_prompt_with_control_tokens_is_refused_before_the_model_is_loaded():
    rewards.check_reward("vq", "", True, ["a cat"])
    with pytest.raises(RewardError, match=r"must not contain the model's control tokens: 'a <\|im_end\|>'"):
        rewards.check_reward("vq", "", True, ["a cat", "a <|im_end|>"])


def test_bad_checkpoints_are_refused(tmp_path):
    make_judge(tmp_path)
    state = torch.load(tmp_path / "model.pth")
    name = "base_model.model.model.layers.1.mlp.up_proj"

    def error(**changed):
        torch.save({k: v for k, v in (state | changed).items() if v is not None}, tmp_path / "model.pth")
        with pytest.raises(RewardError) as caught:
            VideoAlignReward(str(tmp_path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "1 weights missing, 0 unexpected" in error(**{"base_model.model.model.norm.weight": None})
    assert "KeyError: 'rm_head.weight'" in error(**{"base_model.model.rm_head.weight": None})
    assert "0 weights missing, 1 unexpected, first: new" in error(new=torch.zeros(1))
    assert "lora_B.default.weight'" in error(**{f"{name}.lora_B.default.weight": None})
    assert "2 unexpected" in error(**{f"{name}.base_layer.weight": None})
    assert "videoalign: could not load" in error(**{"base_model.model.rm_head.weight": torch.zeros(2, 32)})
    assert "videoalign: could not load" in error(**{"base_model.model.model.norm.weight": torch.zeros(33)})
    (tmp_path / "model.pth").unlink()
    with pytest.raises(RewardError, match=r"exactly one model.pth"):
        VideoAlignReward(str(tmp_path))


def test_another_template_is_refused(tmp_path, monkeypatch):
    make_judge(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompt_template.txt").write_text(TEMPLATE + " ")
    with pytest.raises(RewardError, match=r"prompt template .* has sha256"):
        VideoAlignReward(str(tmp_path))
    (tmp_path / "prompt_template.txt").write_text(TEMPLATE)
    VideoAlignReward(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["prompt_template_sha256"]  # then the released one is asked for
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RewardError, match="not fdb6309bac61…"):
        VideoAlignReward(str(tmp_path))


def test_the_template_is_fetched_once_read_not_run_and_checked(tmp_path, monkeypatch):
    texts = [f"OTHER = 'x'\nraise_if_run = 1 / 0\n{rewards.TEMPLATE_NAME} = {TEMPLATE!r}\n"]
    monkeypatch.setattr(rewards, "text_at", lambda address: texts.pop())
    monkeypatch.setattr(rewards, "hub_folder", lambda path, *_: path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        *_, template = VideoAlignReward.fetch("OWNER/NAME")
    assert rewards.load_template(Path(template), hashlib.sha256(TEMPLATE.encode()).hexdigest()) == TEMPLATE
    with pytest.raises(RewardError, match="not fdb6309bac61…"):
        rewards.load_template(Path(template), rewards.TEMPLATE_SHA256)


def test_a_template_that_cannot_be_fetched(tmp_path, monkeypatch):
    def fetch(address):
        raise OSError("no route to host")

    monkeypatch.setattr(rewards, "text_at", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    with pytest.raises(RewardError, match=r"no route to host.*download .*prompt_template\.txt"):
        rewards.fetch_rewards("vq", {"videoalign": "OWNER/NAME"})

    with pytest.raises(RewardError) as caught:
        VideoAlignReward("OWNER/NAME")
    assert str(caught.value).count("videoalign: ") == str(caught.value).count("download ") == 1


# ----------------------------------------------------------------------------------------------------------- pickscore


@pytest.fixture(scope="module")
def pickscore_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pickscore")
    tokenizer = CLIPTokenizer(model_max_length=20).train_new_from_iterator(["a red circle and a blue square"] * 3, 600)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = size | special | {"vocab_size": len(tokenizer), "max_position_embeddings": 20}
    vision = size | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=5.0)
    CLIPModel(config).save_pretrained(path)
    return str(path)


def test_pickscore_equals_transformers_own_cosine(pickscore_folder):
    """On square images of the model's size, where resizing has no say; and one image at a time."""
    images = (clip(3, 32, 32) * 255).round() / 255
    prompts = ["a red circle", "a blue square and a red circle", "something else, much too long for it " * 3]
    model, reward = CLIPModel.from_pretrained(pickscore_folder), PickScoreReward(pickscore_folder)
    tokenizer = CLIPTokenizer.from_pretrained(pickscore_folder)
    pixels = (images - torch.tensor(rewards.CLIP_MEAN).view(3, 1, 1)) / torch.tensor(rewards.CLIP_STD).view(3, 1, 1)
    for i in range(3):
        text = tokenizer(prompts[i], truncation=True, max_length=20, return_tensors="pt")
        theirs = model(pixel_values=pixels[i : i + 1], **text).logits_per_image / model.logit_scale.exp()
        assert abs(reward(images, prompts)[i] - theirs.item()) < 1e-5


def test_pickscore_scores_each_image_with_its_own_prompt(pickscore_folder):
    """The official code scores every image against the first prompt."""
    reward, images = PickScoreReward(pickscore_folder), clip(2, 40, 32)
    apart = [reward(images[i : i + 1], [prompt]).item() for i, prompt in enumerate(["a red circle", "blue"])]
    assert reward(images, ["a red circle", "blue"]).tolist() == pytest.approx(apart, abs=1e-6)
    assert abs(reward(images, ["a red circle"] * 2)[1] - apart[1]) > 1e-4
    with pytest.raises(RewardError, match="one prompt per image or video, got 2 and"):
        reward(images, ["a red circle"])


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.zeros(1, 32, 32, 3), ["a"], r"each must be \(3, H, W\), got \(32, 32, 3\)"),
        (torch.zeros(1, 3, 32, 32), ["a", "b"], "one prompt per image or video, got 1 and"),
        (torch.full((1, 3, 32, 32), -0.1), ["a"], r"pixels must be in \[0, 1\], found -0.1"),
        (torch.full((1, 3, 32, 32), float("nan")), ["a cat"], "found nan to nan for 'a cat'"),
    ],
)
def test_pickscore_refuses_bad_images(pickscore_folder, images, prompts, message):
    with pytest.raises(RewardError, match=message) as error:
        PickScoreReward(pickscore_folder)(images, prompts)
    assert "\n" not in str(error.value)


def test_pickscore_refuses_a_checkpoint_with_other_keys(pickscore_folder, tmp_path):
    """Transformers alone would fill in random weights and go on."""
    shutil.copytree(pickscore_folder, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    less = {name: w for name, w in state.items() if name != "visual_projection.weight"}
    save_file(less, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"1 weights missing, 0 unexpected, first: visual_projection\.weight"):
        PickScoreReward(str(tmp_path))
    save_file(state | {"new": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match="0 weights missing, 1 unexpected, first: new"):
        PickScoreReward(str(tmp_path))


# ------------------------------------------------------------------------------------------------------ from a spec


def test_one_forward_pass_serves_vq_mq_and_ta(folder, monkeypatch):
    calls = []
    call = VideoAlignReward.__call__
    monkeypatch.setattr(VideoAlignReward, "__call__", lambda self, *a: calls.append(a) or call(self, *a))
    reward = load_reward("vq:0.5,mq@-100,ta", parse_paths(f"videoalign={folder}"))
    videos = torch.stack([clip(), clip(seed=1)])
    found = reward(videos, ["a", "b"], 8.0)
    assert len(calls) == 1
    assert list(found) == ["vq", "mq", "ta"]
    assert reward.weights == {"vq": 0.5, "mq": 1.0, "ta": 1.0}
    assert found["mq"].tolist() == [1.0, 1.0]
    assert torch.allclose(found["vq"], scores(reward.scorers["videoalign"], videos, ["a", "b"])[:, 0])
    with pytest.raises(RewardError, match="fps must be"):
        reward(videos, ["a", "b"])
    with pytest.raises(RewardError, match=r"'vq' is no reward model; known: .*videoalign"):
        load_reward("vq", {"vq": str(folder)})


def test_a_video_reward_is_called_with_a_batch_at_a_time(folder, monkeypatch):
    seen, call = [], VideoAlignReward.__call__
    monkeypatch.setattr(VideoAlignReward, "__call__", lambda self, *a: seen.append(len(a[0])) or call(self, *a))
    videos, prompts = [clip(seed=i) for i in range(3)], ["a", "b", "a dog"]
    reward = load_reward("ta,vq", {"videoalign": str(folder)}, batch=2)
    found = reward(videos, prompts, 8.0)
    assert seen == [2, 1]  # of both scores
    together = scores(reward.scorers["videoalign"], videos, prompts)
    assert torch.allclose(torch.stack([found["vq"], found["ta"]], 1), together[:, [0, 2]], atol=1e-5)


def test_image_rewards_score_a_video_by_evenly_sampled_frames(pickscore_folder):
    reward = load_reward("pickscore", {"pickscore": pickscore_folder})
    videos, prompts = torch.stack([clip(15), clip(15, seed=1)]), ["a red circle", "blue"]
    frames = videos[:, ::2]  # 8 of 15
    expected = [reward.scorers["pickscore"](frames[i], prompts[i : i + 1] * 8).mean().item() for i in range(2)]
    assert reward(videos, prompts)["pickscore"].tolist() == pytest.approx(expected, abs=1e-6)
    assert reward(list(videos), prompts)["pickscore"].tolist() == pytest.approx(expected, abs=1e-6)
    one_frame = reward(videos[:, :1], prompts)["pickscore"]
    assert torch.allclose(one_frame, reward(videos[:, 0], prompts)["pickscore"])
    with pytest.raises(RewardError, match="one prompt per image or video, got 2 and prompts"):
        reward(videos, ["a"])
