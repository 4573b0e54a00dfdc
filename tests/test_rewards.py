"""The image rewards against the packages they come from, rewards of one's own, and what is refused."""

import base64
import gzip
import io
import json
import re
import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import rewards
from docs import reward_server
from evaluation import geneval  # noqa: F401, it registers itself as a reward
from rewards import (
    CLIPReward,
    HPSReward,
    HTTPReward,
    RewardError,
    check_reward,
    load_object,
    load_reward,
    parse_paths,
    parse_spec,
)
from runtime.options import RunError

GOLDEN = Path(__file__).resolve().parent / "golden" / "hps"  # scores by the hpsv2 package, of a small random model
TINY = {"hps": "tiny/hps", "clip": "tiny/clip"}


@pytest.fixture(scope="module")
def tiny_reward():
    return load_reward("hps,clip", TINY)


def picture(height, width, seed=0):
    """Smooth random colours with some detail, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def tensor(array):
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None] / 255


# ---------------------------------------------------------------------------------------------------------------- hps


def test_hps_matches_the_reference_scores():
    cases, reward = np.load(GOLDEN / "cases.npz"), HPSReward(str(GOLDEN))
    for i, score in enumerate(cases["scores"]):
        ours = reward(tensor(cases[f"image{i}"]), [str(cases["prompts"][i])])
        assert abs(ours.item() - score) < 1e-5


def test_hps_has_the_activation_that_its_config_names(tmp_path):
    """Many of open_clip's configs have "quick_gelu", which no weight shows."""
    config = json.loads(Path("tiny/hps/ViT-tiny-hps.json").read_text())
    torch.manual_seed(0)
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"], quick_gelu=True).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "HPS.pt")
    (tmp_path / "ViT.json").write_text(json.dumps(config | {"quick_gelu": True}))
    reward = HPSReward(str(tmp_path))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = reward(images, ["a red circle", "a cross"])
    reward.model = model
    assert torch.allclose(found, reward(images, ["a red circle", "a cross"]), atol=1e-6)
    reward.model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"]).eval()
    reward.model.load_state_dict(model.state_dict())
    assert not torch.allclose(found, reward(images, ["a red circle", "a cross"]), atol=1e-5)


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


def test_each_image_is_scored_against_its_own_prompt(tiny_reward):
    """The official PickScore compares every image with the first prompt."""
    images = torch.cat([tensor(picture(64, 64, seed)) for seed in range(3)])
    prompts = ["a red circle", "three blue squares", "a green cross"]
    together = tiny_reward(images, prompts)
    for name, scores in together.items():
        alone = torch.cat([tiny_reward(images[i, None], [prompts[i]])[name] for i in range(3)])
        torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)
        assert scores.dtype == torch.float32
        assert scores.std() > 0


def test_a_model_gets_a_batch_at_a_time_and_a_function_all(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "def count(images, prompts):\n    return images.new_full((len(prompts),), len(images))"
    )
    seen, features = [], HPSReward.features
    monkeypatch.setattr(HPSReward, "features", lambda self, pixels, p: seen.append(len(p)) or features(self, pixels, p))
    spec = f"hps,{tmp_path}/own.py:count"
    images, prompts = torch.cat([tensor(picture(64, 64, seed)) for seed in range(5)]), [f"{i} cats" for i in range(5)]
    pieces, whole = (load_reward(spec, TINY, batch=batch)(images, prompts) for batch in (2, 100))
    assert seen == [2, 2, 1, 5]
    assert torch.allclose(pieces["hps"], whole["hps"], atol=1e-6) and whole["hps"].std() > 0.001
    assert pieces["count"].tolist() == [5] * 5  # it may compare them
    videos = images[:4, None].expand(-1, 3, -1, -1, -1)
    found = load_reward("hps", TINY, batch=3)(videos, prompts[:4])["hps"]
    assert seen[4:] == [9, 3]  # frames
    assert torch.allclose(found, whole["hps"][:4], atol=1e-6)


def test_specs_weights_and_thresholds(tiny_reward):
    images, prompts = torch.cat([tensor(picture(64, 64, seed)) for seed in range(6)]), ["a red circle"] * 6
    raw = tiny_reward(images, prompts)["hps"]
    threshold = raw.sort().values[2:4].mean().item()
    reward = load_reward(f"hps@{threshold}:0.7,clip:1.4", TINY)
    scores = reward(images, prompts)
    assert reward.weights == {"hps": 0.7, "clip": 1.4}
    assert scores["hps"].tolist() == (raw > threshold).float().tolist()
    assert scores["hps"].sum() == 3
    largest = load_reward(f"hps@{raw.max().item()!r}", TINY)(images, prompts)["hps"]
    assert largest.sum() == 0  # above the threshold, not at it
    assert parse_paths("hps=a/b, clip=tiny/clip") == {"hps": "a/b", "clip": "tiny/clip"}


def test_the_grammar_of_a_spec():
    (own,) = parse_spec("some/my.py:f@0.3:2")
    assert tuple(own) == ("f", "some/my.py:f", 0.3, 2.0)
    terms = parse_spec("vq,mq:0, ta@-1.5:-2e-1,my_rewards.py:sharpness:0.5")  # a weight of 0 only logs a reward
    assert [term.name for term in terms] == ["vq", "mq", "ta", "sharpness"]
    assert [term.model for term in terms] == ["videoalign"] * 3 + ["my_rewards.py:sharpness"]
    assert [term.threshold for term in terms] == [None, None, -1.5, None]
    assert [term.weight for term in terms] == [1.0, 0.0, -0.2, 0.5]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("beauty", "unknown reward 'beauty'"),
        ("", "unknown reward ''"),
        ("hps:", "unknown reward 'hps:'"),
        ("hps@high", "must be numbers"),
        ("hps:much", "must be numbers"),
        ("hps@nan", "must be numbers"),
        ("hps:nan", "must be numbers"),
        ("hps:inf", "must be numbers"),
        ("hps@-inf", "must be numbers"),
        ("hps:1e999", "must be numbers"),
        ("hps:0", "every weight in 'hps:0' is 0"),
        ("hps:0,clip:0.0", "every weight in .* is 0"),
        ("hps,hps@0.2", "'hps' is given twice"),
        ("a.py:f,b.py:f", "'f' is given twice"),
        ("hps,my.py:hps", "'hps' is given twice"),
        ("my.py:mean", "must not be called mean"),
        ("my.py", "unknown reward 'my.py'"),
        ("my.py:", "unknown reward 'my.py:'"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(RewardError, match=message) as error:
        parse_spec(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "paths, message",
    [
        ("hps=", r"reward path hps=: no folder"),
        ("hps", r"reward path hps=: no folder"),
        ("beauty=tiny/hps", "'beauty' is no reward model; known: hps, "),
        ("hps=tiny/nothing", "no folder 'tiny/nothing' here"),
    ],
)
def test_bad_paths_are_refused(paths, message):
    with pytest.raises(RewardError, match=message):
        parse_paths(paths)


@pytest.mark.parametrize(
    "images, prompts, message",
    [
        (torch.zeros(2, 64, 64, 3), ["a", "b"], r"each must be \(3, H, W\), got \(64, 64, 3\)"),
        (torch.zeros(1, 64, 64), ["a"], r"each must be \(3, H, W\), got \(64, 64\)"),
        (torch.zeros(2, 3, 64, 64), ["a"], "one prompt per image"),
        (torch.zeros(1, 3, 64, 64), ["a", "b"], "one prompt per image"),
        (torch.zeros(1, 3, 64, 64), "a", "one prompt per image"),
        (torch.full((1, 3, 64, 64), 255.0), ["a"], r"pixels must be in \[0, 1\], found .*; scale them"),
        (torch.full((1, 3, 64, 64), torch.nan), ["a cat"], "found nan to nan for 'a cat'; NaN is the model's: lower"),
    ],
)
def test_bad_images_are_refused(tiny_reward, images, prompts, message):
    for call in (tiny_reward, *tiny_reward.scorers.values()):
        with pytest.raises(RewardError, match=message):
            call(images, prompts)


def test_a_score_that_is_not_a_number_names_prompt_and_reward(monkeypatch):
    """The official code turns a failing reward into -1, which shifts the whole group."""
    reward = load_reward("clip", TINY)
    reward.scorers["clip"] = lambda images, prompts: torch.tensor([0.5, float("nan")])
    with pytest.raises(RewardError, match="reward clip gave nan for the prompt 'the second'"):
        reward(torch.zeros(2, 3, 64, 64), ["the first", "the second"])


def test_a_reward_that_fails_names_itself_and_its_prompts():
    reward = load_reward("clip", TINY)

    def broken(images, prompts):
        raise RuntimeError("kernel failed\nmore")

    reward.scorers["clip"] = broken
    with pytest.raises(RewardError, match=r"^reward clip: .*RuntimeError: kernel failed; its prompts: \['a', 'b'\]$"):
        reward(torch.zeros(3, 3, 64, 64), ["a", "b", "a"])


def test_a_hub_that_cannot_be_reached_ends_in_one_line_that_says_what_to_download(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = r"^hps: cannot fetch xswu/HPSv2 .*no route to host.*HPS_v2.1_compressed.pt .* --reward-paths hps=FOLDER$"
    with pytest.raises(RewardError, match=message):
        rewards.HPSReward()


def test_folders_that_are_not_as_they_should_be(tmp_path):
    with pytest.raises(RewardError, match="no folder"):
        load_reward("hps", {"hps": str(tmp_path / "nowhere" / "at" / "all")})
    with pytest.raises(RewardError, match=r"exactly one \*.pt"):
        load_reward("hps", {"hps": str(tmp_path)})
    with pytest.raises(RewardError, match="clip: could not load"):
        load_reward("clip", {"clip": str(tmp_path)})
    with pytest.raises(RewardError, match="'beauty' is no reward model"):
        load_reward("hps", {"beauty": str(tmp_path)})
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "a.pt")
    config = next(Path("tiny/hps").glob("*.json"))
    (tmp_path / "model.json").write_text(config.read_text())
    with pytest.raises(RewardError, match=r"hps: could not load .*Missing key"):
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


def test_position_ids_of_older_files_are_no_surplus():
    """CLIP files from before transformers 4.31, PickScore's among them, hold these constants."""

    class Network:
        @staticmethod
        def from_pretrained(path, output_loading_info):
            return path, {"missing_keys": set(), "unexpected_keys": {path}}

    assert rewards.load_whole(Network, "text_model.embeddings.position_ids") == "text_model.embeddings.position_ids"
    with pytest.raises(ValueError, match=r"0 weights missing, 1 unexpected, first: text_model.bias"):
        rewards.load_whole(Network, "text_model.bias")


# ----------------------------------------------------------------------------------------------------------- one's own

OWN = """import torch

def sharpness(images, prompts):
    assert not torch.is_grad_enabled()
    return (images.diff(dim=-1).abs().flatten(1).mean(1) > 0.01).long()

def length(images, prompts):
    return torch.tensor([len(prompt) / 10 for prompt in prompts])

def fails(images, prompts):
    return helper(images)

def helper(images):
    raise KeyError("no such thing\\nand more")

def column(images, prompts):
    return torch.zeros(len(prompts), 1)

def number(images, prompts):
    return 0.5

def nan(images, prompts):
    return torch.tensor([0.0, float("nan")])

def one_argument(images):
    return torch.zeros(len(images))

def shape(videos, prompts):
    return torch.tensor([float(videos.shape[1])] * len(prompts))

constant = 3
"""


@pytest.fixture
def own(tmp_path):
    """The path of a file with rewards of one's own."""
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_a_function_of_ones_own_is_a_reward(own, tiny_reward):
    images, prompts = torch.stack([torch.zeros(3, 64, 64), torch.rand(3, 64, 64)]), ["a", "bcd"]
    reward = load_reward(f"{own}:sharpness:0.5,{own}:length@0.2:2,hps", TINY)
    scores = reward(images, prompts)
    assert reward.weights == {"sharpness": 0.5, "length": 2.0, "hps": 1.0}
    assert scores["sharpness"].tolist() == [0.0, 1.0] and scores["sharpness"].dtype == torch.float32
    assert scores["length"].tolist() == [0.0, 1.0]
    assert torch.equal(scores["hps"], tiny_reward(images, prompts)["hps"])
    check_reward(f"{own}:sharpness", "", video=True)


def test_the_example_of_the_documentation(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", Path("docs/rewards.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    spec = f"hps,{tmp_path}/my_rewards.py:red:0.5"
    check_reward(spec, "hps=tiny/hps")
    reward = load_reward(spec, TINY)
    images = torch.zeros(3, 3, 64, 64)
    images[:2, 0], images[2, 2] = 1.0, 0.5  # red, red, a dark blue
    scores = reward(images, ["a red circle", "a blue circle", "a blue circle"])
    assert reward.weights == {"hps": 1.0, "red": 0.5} and scores["red"].tolist() == [1.0, -1.0, 0.25]


def test_a_function_of_ones_own_gets_videos_as_they_are(own):
    assert load_reward(f"{own}:shape")(torch.rand(2, 9, 3, 8, 8), ["a", "b"])["shape"].tolist() == [9.0, 9.0]


def test_a_file_is_executed_once(tmp_path):
    (tmp_path / "once.py").write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('x')\ndef f(i, p): pass\n")
    for _ in range(2):
        load_object(f"{tmp_path}/once.py:f")
    assert (tmp_path / "log").read_text() == "x"


@pytest.mark.parametrize(
    "name, message",
    [
        ("fails", r"reward fails: .*own\.py, line 14: KeyError: 'no such thing.*; its prompts: \['a', 'b'\]$"),
        (
            "column",
            r"reward column: it must give a tensor of shape \(2,\), and it gave \(2, 1\); its prompts: \['a'",
        ),
        ("number", r"reward number: it must give a tensor of shape \(2,\), and it gave float"),
        ("nan", "reward nan gave nan for the prompt 'b'; the run stops here"),
        (
            "one_argument",
            r"reward one_argument: .*own\.py: TypeError: one_argument\(\) takes 1 positional argument but 2",
        ),
    ],
)
def test_a_function_that_fails_ends_in_one_line(own, name, message):
    reward = load_reward(f"{own}:{name}")
    with pytest.raises(RewardError, match=message) as error:
        reward(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "place, message",
    [
        ("nowhere.py:f", "there is no file 'nowhere.py'"),
        ("OWN:nothing", r"own\.py has no function or class 'nothing'"),
        ("OWN:constant", r"own\.py has no function or class 'constant'"),
        ("BROKEN:f", r"broken\.py, line 2: ZeroDivisionError"),
        ("SYNTAX:f", r"syntax\.py: SyntaxError: .*line 1"),
    ],
)
def test_a_function_that_is_not_there_is_named_before_anything_is_loaded(own, tmp_path, place, message):
    (tmp_path / "broken.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    for name, file in (("OWN", own), ("BROKEN", f"{tmp_path}/broken.py"), ("SYNTAX", f"{tmp_path}/syntax.py")):
        place = place.replace(name, file)
    for _ in range(2):  # the second time as the first
        with pytest.raises(RewardError, match=message) as error:
            check_reward(place, "")
        assert "\n" not in str(error.value)
    with pytest.raises(RewardError, match=message):
        load_reward(place)


# --------------------------------------------------------------------------------------------------- rewards over HTTP


def first_red(file):
    """The red of the first pixel of a PNG file in base64, 0 to 1."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))[0, 0, 0] / 255


class Judge(BaseHTTPRequestHandler):
    """A scorer whose behaviour is the last part of its path."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind, server = self.path.rpartition("/")[2], self.server
        server.requests.append(body)
        pictures = body.get("images") or [video[-1] for video in body.get("videos", [])]
        scores = [first_red(picture) for picture in pictures]
        if kind == "slow":
            server.release.wait(20)  # until the test is over
        answers = {
            "nan": [float("nan")] * len(scores),
            "short": scores[:-1],
            "words": ["good"] * len(scores),
            "one": 0.5,
        }
        answer = json.dumps({"scores": answers.get(kind, scores)}).encode()
        answer = {"text": b"<html>welcome", "list": b"[1, 2]", "other": b'{"score": 1}'}.get(kind, answer)
        status = {"broken": 500, "nothing": 404}.get(kind, 200)
        if kind == "once" and len(server.requests) == 1:
            status = 503
        self.send_response(status)
        self.end_headers()
        if kind != "slow":
            self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge(monkeypatch):
    """A server on this machine; `url` is its address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(HTTPReward, "BACKOFF", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.requests, server.release, server.url = [], threading.Event(), f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def test_a_server_is_a_reward(judge):
    spec = f"{judge.url}/judge:0.5,{judge.url}/v2/other_judge@0.5,hps"
    check_reward(spec, "hps=tiny/hps")
    reward = load_reward(spec, TINY)
    assert reward.weights == {"judge": 0.5, "other_judge": 1.0, "hps": 1.0}
    red = torch.linspace(0, 1, 10)  # more than a batch
    images = red.view(10, 1, 1, 1).expand(10, 3, 4, 6)
    scores = reward(images, [f"prompt {i}" for i in range(10)])
    torch.testing.assert_close(scores["judge"], (red * 255).round() / 255)
    assert scores["other_judge"].tolist() == [0.0] * 5 + [1.0] * 5
    sizes = [len(request["images"]) for request in judge.requests]
    assert sizes == [8, 2, 8, 2]
    assert judge.requests[1]["prompts"] == ["prompt 8", "prompt 9"] and "fps" not in judge.requests[0]


def test_the_example_server_gives_the_scores_of_the_reward_that_it_serves(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = reward_server.serve("clip", 0, TINY)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, prompts = f"http://127.0.0.1:{server.server_port}/clip", ["a red circle", "two crosses"]
    images = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    check_reward(url, "")
    served, own = (load_reward(spec, TINY)(images, prompts)["clip"] for spec in (url, "clip"))
    torch.testing.assert_close(served, own)
    with pytest.raises(RewardError, match=r"/hps.*404 .*this server has clip"):
        load_reward(url.replace("/clip", "/hps"))(images, prompts)
    server.shutdown()
    server.server_close()


def test_a_server_judges_videos(judge):
    videos = torch.zeros(2, 5, 3, 4, 4)
    videos[1, 4] = 1.0  # the last frame
    scores = load_reward(f"{judge.url}/judge")(videos, ["a", "b"], fps=8.0)
    assert scores["judge"].tolist() == [0.0, 1.0]
    (request,) = judge.requests
    assert [len(video) for video in request["videos"]] == [5, 5] and request["fps"] == 8.0


def test_a_server_that_fails_once_is_asked_again(judge):
    assert load_reward(f"{judge.url}/once")(torch.ones(2, 3, 4, 4), ["a", "b"])["once"].tolist() == [1.0, 1.0]
    assert len(judge.requests) == 2


@pytest.mark.parametrize(
    "kind, requests, message",
    [
        ("slow", 2, "timed out"),
        ("broken", 2, "HTTPError: 500 Server Error: Internal Server Error"),
        ("nothing", 1, "HTTPError: 404 Client Error: Not Found"),
        ("text", 1, "JSONDecodeError"),
        ("list", 1, "TypeError"),
        ("other", 1, "KeyError: 'scores'"),
        ("one", 1, "TypeError"),
        ("words", 1, "ValueError"),
        ("short", 1, r"must give a tensor of shape \(2,\), and it gave \(1,\)"),
        ("nan", 1, "gave nan for the prompt 'a'; the run stops here"),
    ],
)
def test_a_server_that_fails_ends_in_one_line(judge, monkeypatch, kind, requests, message):
    monkeypatch.setattr(HTTPReward, "ATTEMPTS", 2)
    monkeypatch.setattr(HTTPReward, "SECONDS", 0.3 if kind == "slow" else 20.0)
    with pytest.raises(RewardError, match=f"reward {kind}.*{message}") as error:
        load_reward(f"{judge.url}/{kind}")(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert "\n" not in str(error.value) and len(judge.requests) == requests


def test_a_server_that_is_down_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(HTTPReward, "BACKOFF", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/judge"
    with pytest.raises(RewardError, match=rf"reward judge: nothing answers at {url}: .*refused.*; start the server"):
        check_reward(f"hps,{url}", "hps=tiny/hps")
    with pytest.raises(RewardError, match=rf"reward judge: no scores from {url}: .*refused.*; fix the server"):
        load_reward(url)(torch.rand(1, 3, 8, 8), ["a"])


@pytest.mark.parametrize(
    "spec", ["http://host", "http://host:8000", "https://host/", "ftp://host/judge", "http:///judge"]
)
def test_an_address_without_a_name_is_refused(spec):
    with pytest.raises(RewardError, match=r"unknown reward .*http://HOST:PORT/NAME"):
        parse_spec(spec)


# --------------------------------------------------------------------------------------------- rewards of other modules


def test_a_registered_reward(monkeypatch):
    for name in ("LOADERS", "MODEL_OF"):
        monkeypatch.setattr(rewards, name, dict(getattr(rewards, name)))
    calls = []

    class Bright:
        name = "bright"

        def __init__(self, *arguments):
            calls.append(arguments)

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

        fetch = check = staticmethod(lambda *arguments: calls.append(arguments))

    rewards.register(Bright)
    path = "anything, also no folder"
    check_reward("bright", "", True, ["a"], {"a": {}})
    rewards.fetch_rewards("bright", {})
    rewards.fetch_rewards("bright", {"bright": path})
    reward = load_reward("bright@0.5:2", {"bright": path}, metadata={"a": {}})
    assert calls == [(None, True, ["a"], {"a": {}}), (None,), (path,), (path, "cpu", {"a": {}})]
    assert reward(torch.ones(1, 3, 4, 4), ["a"]) == {"bright": 1.0}
    with pytest.raises(RewardError, match="reward path bright=: no folder"):
        parse_paths("bright=")


# ------------------------------------------------------------------------------------------------------------- geneval

DETECTOR = "tiny/pictures.py:Detector"
MINE = """
class Detector:
    NOTE, classes = "Anything bright is a dog.", {"dog"}
    def load(self, device): self.loaded = device
    def __call__(self, picture):
        return {"dog": [((0, 0, 8, 8), 0.99, None)]} if self.loaded and picture.mean() > 0.5 else {}
    def colors(self, picture, name, objects): return ["white"] * len(objects)
"""


def test_geneval_as_a_reward(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    place = f"{tmp_path}/mine.py:Detector"
    images, prompts = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)]), ["a dog", "no dog"]
    dog = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    reward = load_reward("geneval:2", {"geneval": place}, metadata={"a dog": dog, "no dog": dog})
    scores = reward(images, prompts)["geneval"]
    assert scores.tolist() == [1.0, 0.0] and scores.dtype == torch.float32
    assert reward(images, prompts[::-1])["geneval"].tolist() == [1.0, 0.0]
    check_reward("geneval", f"geneval={place}", prompts=prompts, metadata={"a dog": dog, "no dog": dog})
    with pytest.raises(RunError, match="cannot judge the prompt 'no dog': it lacks GenEval's tag"):
        check_reward("geneval", f"geneval={place}", prompts=prompts, metadata={"a dog": dog})
    with pytest.raises(RunError, match="reward geneval judges images"):
        check_reward("geneval", f"geneval={place}", video=True)


def test_geneval_reads_the_prompt_if_its_detector_can():
    from tiny import pictures as tiny

    torch.manual_seed(0)
    row = [tiny.SHAPES.index("cross"), *tiny.COLORS["blue"], 20.0, 40.0, 10.0]
    image = tiny.render([[row] + [[-1.0] + [0.0] * 6] * 3])
    reward = load_reward("geneval", {"geneval": DETECTOR})
    prompts = ["a blue cross", "a red cross", "two crosses", "a cross"]
    assert reward(image.expand(4, -1, -1, -1), prompts)["geneval"].tolist() == [1.0, 0.0, 0.0, 1.0]
    small = torch.nn.functional.interpolate(image, 32, mode="area")  # of another size than the checker's own
    assert reward(small, ["a blue cross"])["geneval"].tolist() == [1.0]
    with pytest.raises(RunError, match="not a caption of the tiny world: 'a dog'"):
        check_reward("geneval", f"geneval={DETECTOR}", prompts=["a blue cross", "a dog"])
