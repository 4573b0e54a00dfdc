"""The page of human votes: its pairs, that it is blind, and the sum of several people's votes."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluation import vote
from evaluation.report import Results
from runtime.options import RunError

PROMPTS = ["a & b", "a </script> b", "a red circle", "two dogs"]
MODELS = ["base", "run/checkpoint-000010", "run/checkpoint-000020"]


def make_results(folder, prompts=PROMPTS, models=MODELS):
    """Made-up results: model k's picture of prompt p has the one colour (10 k, 20 p, 0)."""
    pictures = {name: [[folder / f"{k}-{p}.png"] for p in range(len(prompts))] for k, name in enumerate(models)}
    for k, own in enumerate(pictures.values()):
        for p, [path] in enumerate(own):
            Image.new("RGB", (16, 8), (10 * k, 20 * p, 0)).save(path)
    return Results([{"prompt": p} for p in prompts], {name: {} for name in models}, pictures, {}, {}, [], {}, {})


def content(folder):
    """The page without its data, and the data."""
    page = (folder / "vote.html").read_text(encoding="utf-8")
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return page.replace(text, ""), json.loads(text)


def colour(uri):
    """(model, prompt) of a picture in the page."""
    kind, _, code = uri.partition("base64,")
    assert kind == "data:image/webp;"
    red, green, _ = np.array(Image.open(io.BytesIO(base64.b64decode(code))).convert("RGB"))[0, 0].tolist()
    return red // 10, green // 20


def test_the_page_has_every_prompt_of_every_model_beside_the_base(tmp_path):
    vote.write_page(make_results(tmp_path), tmp_path)
    page, data = content(tmp_path)
    assert data["models"] == MODELS[1:]
    seen = []
    for pair in data["pairs"]:
        model, p = MODELS.index(pair["model"]), PROMPTS.index(pair["prompt"])
        shown = dict(zip(("left", "right"), map(colour, pair["pictures"]), strict=True))
        trained = shown.pop(pair["trained"])
        assert trained == (model, p) and list(shown.values()) == [(0, p)]
        seen.append((model, p))
    assert sorted(seen) == [(model, p) for model in (1, 2) for p in range(4)]
    assert seen != sorted(seen)  # in random order
    assert not re.search(r"https?://|(src|href)=", page)  # needs no other file


def test_the_page_is_blind(tmp_path):
    vote.write_page(make_results(tmp_path), tmp_path)
    page, data = content(tmp_path)
    assert not any(name in page for name in MODELS[1:])  # names are in the data, which only the result shows
    assert page.count("</script>") == 2  # the prompt that has one does not end the script
    for model in MODELS[1:]:
        sides = [pair["trained"] for pair in data["pairs"] if pair["model"] == model]
        assert sorted(sides) == ["left", "left", "right", "right"]


def test_sides_and_order_are_random_and_the_same_each_time():
    pairs = vote.make_pairs(300, 1, 200)
    assert len({prompt for prompt, _, _ in pairs}) == 200 and pairs == vote.make_pairs(300, 1, 200)
    sides = np.array([side == "left" for _, _, side in pairs])
    assert sides.sum() == 100
    assert 80 < (sides[1:] != sides[:-1]).sum() < 120  # changes of side; 100 are expected, with deviation 7
    ranks = np.array([prompt for prompt, _, _ in pairs])
    assert abs(np.corrcoef(ranks, np.arange(200))[0, 1]) < 0.2


def test_videos_are_animations_of_all_their_frames(tmp_path):
    results = make_results(tmp_path, ["a cross moves up"], ["base", "trained"])
    for [[path]] in results.pictures.values():
        frames = [np.full((8, 16, 3), 60 * k, np.uint8) for k in range(1, 4)]
        Image.fromarray(np.concatenate(frames)).save(path)  # one below the other
    vote.write_page(replace(results, frames=3, fps=8.0), tmp_path)
    (pair,) = content(tmp_path)[1]["pairs"]
    for uri in pair["pictures"]:
        video = Image.open(io.BytesIO(base64.b64decode(uri.partition("base64,")[2])))
        assert (video.n_frames, video.size) == (3, (16, 8))


def test_without_a_trained_model_there_is_nothing_to_vote_on(tmp_path):
    vote.write_page(make_results(tmp_path, models=["base"]), tmp_path)
    assert not (tmp_path / "vote.html").exists()


def export(path, *votes, page="p"):
    rows = [{"prompt": "a", "model": "m", "trained": trained, "choice": choice} for trained, choice in votes]
    path.write_text(json.dumps({"page": page, "votes": rows}))
    return str(path)


def test_votes_of_several_people_are_added(tmp_path, capsys):
    first = export(tmp_path / "1.json", ("left", "left"), ("right", "left"), ("left", "tie"))
    second = export(tmp_path / "2.json", *[("right", "right")] * 7, ("left", "right"))
    vote.main([first, second])
    assert capsys.readouterr().out.splitlines()[2] == "| m | 8 | 2 | 1 | 0.800 (0.490 to 0.943) |"


@pytest.mark.parametrize(
    "wins, losses, expected",
    [
        (0, 0, "- (0.000 to 1.000)"),
        (0, 10, "0.000 (0.000 to 0.278)"),  # z² / (n + z²), with z² = 3.8415
        (5, 5, "0.500 (0.237 to 0.763)"),  # 1/2 ± 1.96 / 13.84 · sqrt(2.5 + 0.9604)
        (8, 2, "0.800 (0.490 to 0.943)"),
        (10, 0, "1.000 (0.722 to 1.000)"),
    ],
)
def test_the_share_has_wilsons_interval(wins, losses, expected, tmp_path, capsys):
    votes = [("left", "left")] * wins + [("left", "right")] * losses + [("right", "tie")]
    vote.main([export(tmp_path / "1.json", *votes)])
    assert capsys.readouterr().out.splitlines()[2] == f"| m | {wins} | {losses} | 1 | {expected} |"


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("none.json", None, "cannot be read as votes"),
        ("text.json", "no JSON", "cannot be read as votes"),
        ("list.json", "[1]", "cannot be read as votes"),
        ("other.json", '{"page": "p"}', "cannot be read as votes"),
        ("number.json", '{"page": "p", "votes": [3]}', "cannot be read as votes"),
        (
            "choice.json",
            '{"page": "p", "votes": [{"model": "m", "trained": "left", "choice": "up"}]}',
            "cannot be read as votes",
        ),
        (
            "model.json",
            '{"page": "p", "votes": [{"model": 1, "trained": "left", "choice": "left"}]}',
            "cannot be read as votes",
        ),
        ("page.json", '{"page": "q", "votes": []}', "votes on different pages, p, q"),
    ],
)
def test_files_that_are_no_votes_are_refused_in_one_line(name, text, expected, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RunError, match=expected) as error:
        vote.main([export(tmp_path / "good.json", ("left", "left")), str(tmp_path / name)])
    assert "\n" not in str(error.value)
