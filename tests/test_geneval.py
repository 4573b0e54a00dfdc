"""GenEval's rules on a table of made-up detections, and the detectors behind one interface."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

import rewards
from evaluation.geneval import (
    COLORS,
    Mask2FormerDetector,
    find_detector,
    find_metadata,
    judge,
    relations,
)
from rewards import RewardError
from runtime.options import RunError
from tiny import pictures as tiny

TINY = "tiny/pictures.py:Detector"


def at(x=0.0, y=0.0, size=10.0, score=0.95, color="red"):
    """An object whose box has its centre there."""
    return ((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score, color)


def one(name="dog", count=1, **more):
    return {"class": name, "count": count} | more


def verdict(found, tag, include, exclude=()):
    metadata = {"tag": tag, "include": include} | ({"exclude": list(exclude)} if exclude else {})
    return judge(found, metadata, lambda name, objects: [color for _, _, color in objects])


def count(n):
    """What a prompt for n dogs asks for."""
    return "counting", [one(count=n)], [one(count=n + 1)]


def place(relation):
    return "position", [one("cat"), one("dog", position=[relation, 0])]


TWO = "two_object", [one("dog"), one("cat")]
RED_DOG = "colors", [one(color="red")]
RED_DOG_BLUE_CAT = "color_attr", [one(color="red"), one("cat", color="blue")]
CASES = {
    # one object, and the threshold of 0.3
    "there": ({"dog": [at()]}, ("single_object", [one()]), True),
    "nothing found": ({}, ("single_object", [one()]), False),
    "another class": ({"cat": [at()]}, ("single_object", [one()]), False),
    "an empty list": ({"dog": []}, ("single_object", [one()]), False),
    "just above 0.3": ({"dog": [at(score=0.3001)]}, ("single_object", [one()]), True),
    "exactly 0.3": ({"dog": [at(score=0.3)]}, ("single_object", [one()]), False),
    "below 0.3": ({"dog": [at(score=0.2)]}, ("single_object", [one()]), False),
    "more than asked for": ({"dog": [at(), at(50)]}, ("single_object", [one()]), True),
    "others besides": ({"dog": [at()], "cat": [at()], "car": [at()]}, ("single_object", [one()]), True),
    # two objects
    "both": ({"dog": [at()], "cat": [at()]}, TWO, True),
    "only the first": ({"dog": [at()]}, TWO, False),
    "only the second": ({"cat": [at()]}, TWO, False),
    "one of them unsure": ({"dog": [at()], "cat": [at(score=0.3)]}, TWO, False),
    "the same class asked for twice": ({"dog": [at()]}, ("two_object", [one(), one()]), True),
    # counting, and its threshold of 0.9
    "two of two": ({"dog": [at(), at(50)]}, count(2), True),
    "one of two": ({"dog": [at()]}, count(2), False),
    "three of two": ({"dog": [at(), at(50), at(90)]}, count(2), False),
    "four of four": ({"dog": [at()] * 4}, count(4), True),
    "five of four": ({"dog": [at()] * 5}, count(4), False),
    "the third is unsure": ({"dog": [at(), at(50), at(90, score=0.9)]}, count(2), True),
    "the third is just sure": ({"dog": [at(), at(50), at(90, score=0.9001)]}, count(2), False),
    "the second is unsure": ({"dog": [at(), at(50, score=0.89)]}, count(2), False),
    "sure enough elsewhere, not for counting": ({"dog": [at(score=0.5)]}, count(1), False),
    "others do not count": ({"dog": [at(), at(50)], "cat": [at()] * 9}, count(2), True),
    "sixteen of sixteen": ({"dog": [at()] * 16}, count(16), True),
    "more than sixteen are not looked at": ({"dog": [at()] * 40}, count(16), True),
    "so seventeen are never found": ({"dog": [at()] * 40}, ("counting", [one(count=17)]), False),
    # exclusions
    "an excluded class is there": ({"dog": [at()], "cat": [at()]}, ("x", [one()], [one("cat")]), False),
    "an excluded class is not there": ({"dog": [at()]}, ("x", [one()], [one("cat")]), True),
    "an excluded class is unsure": ({"dog": [at()], "cat": [at(score=0.3)]}, ("x", [one()], [one("cat")]), True),
    "fewer than excluded": ({"dog": [at()], "cat": [at()]}, ("x", [one()], [one("cat", 2)]), True),
    "any exclusion is enough": ({"dog": [at()], "car": [at()]}, ("x", [one()], [one("cat"), one("car")]), False),
    # colours
    "the right colour": ({"dog": [at(color="red")]}, RED_DOG, True),
    "a wrong colour": ({"dog": [at(color="blue")]}, RED_DOG, False),
    "not there, so without colour": ({"cat": [at(color="red")]}, RED_DOG, False),
    "only the surest counts, right": ({"dog": [at(color="blue", score=0.5), at(color="red")]}, RED_DOG, True),
    "only the surest counts, wrong": ({"dog": [at(color="red", score=0.5), at(color="blue")]}, RED_DOG, False),
    "two, both red": ({"dog": [at(), at()]}, ("colors", [one(count=2, color="red")]), True),
    "two, one red": ({"dog": [at(), at(color="blue")]}, ("colors", [one(count=2, color="red")]), False),
    "both right": ({"dog": [at()], "cat": [at(color="blue")]}, RED_DOG_BLUE_CAT, True),
    "colours swapped": ({"dog": [at(color="blue")], "cat": [at()]}, RED_DOG_BLUE_CAT, False),
    "second wrong": ({"dog": [at()], "cat": [at()]}, RED_DOG_BLUE_CAT, False),
    "second missing": ({"dog": [at()]}, RED_DOG_BLUE_CAT, False),
    # position: the dog to the cat
    "left of": ({"dog": [at(0)], "cat": [at(50)]}, place("left of"), True),
    "right of": ({"dog": [at(50)], "cat": [at(0)]}, place("right of"), True),
    "above": ({"dog": [at(0, 0)], "cat": [at(0, 50)]}, place("above"), True),
    "below": ({"dog": [at(0, 50)], "cat": [at(0, 0)]}, place("below"), True),
    "on the other side": ({"dog": [at(50)], "cat": [at(0)]}, place("left of"), False),
    "above, not left": ({"dog": [at(0, 0)], "cat": [at(0, 50)]}, place("left of"), False),
    "diagonal, is left": ({"dog": [at(0, 0)], "cat": [at(50, 50)]}, place("left of"), True),
    "diagonal, is above": ({"dog": [at(0, 0)], "cat": [at(50, 50)]}, place("above"), True),
    "too near": ({"dog": [at(0)], "cat": [at(1.9)]}, place("left of"), False),
    "at the same place": ({"dog": [at(0)], "cat": [at(0)]}, place("left of"), False),
    "no target": ({"dog": [at(0)]}, place("left of"), False),
    "no object": ({"cat": [at(50)]}, place("left of"), False),
    "the surest is elsewhere": ({"dog": [at(0, score=0.5), at(90)], "cat": [at(50)]}, place("left of"), False),
    "every one of two": (
        {"dog": [at(0), at(90)], "cat": [at(50)]},
        ("position", [one("cat"), one("dog", 2, position=["left of", 0])]),
        False,
    ),
    "to every one of two": (
        {"dog": [at(20)], "cat": [at(50), at(0)]},
        ("position", [one("cat", 2), one("dog", position=["left of", 0])]),
        False,
    ),
}


@pytest.mark.parametrize("found, asked, expected", CASES.values(), ids=CASES)
def test_rules(found, asked, expected):
    correct, wrong = verdict(found, *asked)
    assert correct is expected and bool(wrong) is not expected


@pytest.mark.parametrize(
    "way, expected",
    [
        ((2.0, 0), set()),  # exactly a tenth of both sizes: nothing is left
        ((4.0, 0), set()),  # half of the way is left: not more than half
        ((4.1, 0), {"right of"}),
        ((-4.1, 0), {"left of"}),
        ((0, 4.1), {"below"}),
        ((50, 1.9), {"right of"}),
        ((50, 31.0), {"right of"}),  # (31 - 2) / 58.8 = 0.49
        ((50, 33.0), {"right of", "below"}),  # (33 - 2) / 59.9 = 0.52
        ((30, -30), {"right of", "above"}),
        ((5, 5), set()),  # 3 / 7.07 on each axis
        ((8, 8), {"right of", "below"}),  # 6 / 11.3
    ],
)
def test_relations_at_their_boundaries(way, expected):
    """Two boxes of size 10, so 2 is taken off the way along each axis."""
    assert relations(at(*way)[0], at()[0]) == expected


def test_the_order_of_the_detections_does_not_matter():
    rng = random.Random(0)
    for found, asked, expected in CASES.values():
        shuffled = {name: rng.sample(objects, len(objects)) for name, objects in found.items()}
        scores = [score for objects in found.values() for _, score, _ in objects]
        if len(set(scores)) == len(scores):  # with equal scores there is no surest one
            assert verdict(shuffled, *asked)[0] is expected


def test_colours_are_asked_for_only_where_they_matter():
    def forbidden(name, objects):
        raise AssertionError("no colour was asked for")

    assert judge({"dog": [at()]}, {"tag": "single_object", "include": [one()]}, forbidden) == (True, "")


def test_what_is_wrong_is_said():
    assert verdict({"dog": [at(color="blue")]}, *RED_DOG)[1] == "blue dog, not red"
    assert verdict({"dog": [at()]}, *count(2))[1] == "1 dog, not 2"
    assert verdict({"dog": [at()] * 3}, *count(2))[1] == "3 dog, 3 are too many"
    assert verdict({"dog": [at(50)], "cat": [at()]}, *place("above"))[1] == "dog not above cat"


def test_metadata_are_checked():
    detector = SimpleNamespace(classes={"dog", "cat", "car"})
    for _, (tag, include, *exclude), _ in CASES.values():
        row = {"tag": tag, "include": include} | ({"exclude": exclude[0]} if exclude else {})
        assert find_metadata("a dog", row, detector) == row
    for row in (
        {},
        {"tag": "counting"},
        {"tag": "counting", "include": []},
        {"tag": "counting", "include": [{"class": "dog"}]},
        {"tag": "counting", "include": [one(count=0)]},
        {"tag": "counting", "include": "dog"},
        {"tag": "position", "include": [one(position=["left of", 0])]},
        {"tag": "position", "include": [one("cat"), one(position=["beside", 0])]},
    ):
        with pytest.raises(RunError, match="cannot judge the prompt 'a dog': it lacks GenEval's tag"):
            find_metadata("a dog", row, detector)
    with pytest.raises(RunError, match="does not know unicorn"):
        find_metadata("a unicorn", {"tag": "single_object", "include": [one("unicorn")]}, detector)


def test_metadata_of_the_prompt_file_come_before_the_detectors_own():
    read = {"tag": "single_object", "include": [one("cat")]}
    given = {"tag": "counting", "include": [one(count=2)], "exclude": [one(count=3)]}
    detector = SimpleNamespace(classes={"dog", "cat"}, metadata=lambda prompt: read)
    assert find_metadata("x", {"prompt": "x"}, detector) == read
    assert find_metadata("x", {"prompt": "x"} | given, detector) == {"prompt": "x"} | given


# ------------------------------------------------------------------------------------------------------- the detectors


def test_a_detector_is_found_by_its_file_and_class():
    detector = find_detector(TINY)
    assert detector.classes == set(tiny.SHAPES)
    assert detector.metadata("two red circles") == tiny.parse("two red circles")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.py:Detector", "there is no file 'nowhere.py'"),
        ("sampling.py:Eye", "sampling.py has no function or class 'Eye'"),
        ("rewards.py:CLIP_MEAN", "rewards.py has no function or class 'CLIP_MEAN'"),
        ("sampling.py", "there is no file ''; write FILE.py:NAME"),
        ("EMPTY:Blind", r"Blind is no detector: it lacks classes, __call__, colors, NOTE"),
        ("tiny/nothing", "--detector: no folder 'tiny/nothing'"),
    ],
)
def test_a_detector_that_is_not_there_is_one_line(name, message, tmp_path):
    (tmp_path / "empty.py").write_text("class Blind: pass\n")
    with pytest.raises((RunError, RewardError), match=message) as caught:
        find_detector(name.replace("EMPTY", f"{tmp_path}/empty.py"))
    assert "\n" not in str(caught.value)


def test_the_tiny_detector_judges_all_six_tags():
    rng, agree, seen = random.Random(3), [], set()
    torch.manual_seed(3)
    wanted = [tiny.random_metadata(rng, tiny.TAGS[i % 6]) for i in range(60)]
    pictures = tiny.render([tiny.random_scene(rng, metadata) for metadata in wanted])
    detector = find_detector(TINY)
    for picture, metadata in zip(pictures, wanted, strict=True):
        found = detector(picture)
        for asked in (metadata, rng.choice(tiny.hard_negatives(metadata))):
            own, _ = judge(found, asked, lambda name, objects: detector.colors(None, name, objects))
            agree.append(own == (asked is metadata))
            seen.add((asked["tag"], own))
    assert np.mean(agree) >= 0.98
    assert seen == {(tag, own) for tag in tiny.TAGS for own in (True, False)}


@pytest.fixture(scope="module")
def mask2former(mask2former_folders):
    detector = find_detector(*mask2former_folders, "cpu")
    assert detector.classes == {"person", "computer mouse", "couch"}
    return detector


@pytest.fixture(scope="module")
def mask2former_folders(tmp_path_factory):
    """A small random Mask2Former and CLIP, in folders as on the hub."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("detector")
    config = Mask2FormerConfig(
        backbone_config={
            "model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
            "window_size": 4, "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
        id2label={0: "person", 1: "mouse", 2: "sofa"},  # as the hub's file has them
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "mask2former")
    words = [f"a photo of a {color}-colored computer mouse, person, couch object" for color in COLORS]
    tokenizer = CLIPTokenizer(model_max_length=77).train_new_from_iterator(words, 600)
    tokenizer.save_pretrained(folder / "clip")
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPConfig(
        text_config=tower | special | {"vocab_size": len(tokenizer)},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
        initializer_factor=5.0,
    )
    CLIPModel(clip).save_pretrained(folder / "clip")
    return str(folder / "mask2former"), str(folder / "clip")


def test_mask2former_finds_objects_by_their_masks(mask2former, monkeypatch):
    detector = mask2former
    monkeypatch.setattr(detector, "SHORTEST", 64, raising=False)
    picture = torch.rand(3, 48, 80)
    found = detector(picture)
    assert found and found.keys() <= {"person", "computer mouse", "couch"}
    for objects in found.values():
        for (left, top, right, bottom), score, inside in objects:
            ys, xs = inside.nonzero(as_tuple=True)
            assert inside.shape == (48, 80) and 0 < score < 1
            assert (left, top, right, bottom) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    name = next(iter(found))
    colors = detector.colors(picture, name, found[name])
    assert len(colors) == len(found[name]) and set(colors) <= set(COLORS)


def test_mask2former_scores_are_class_probability_times_mean_mask_probability(mask2former, monkeypatch):
    detector = mask2former
    classes = torch.full((1, 5, 4), -30.0)
    classes[0, :, 3] = 30.0  # nothing, but for the first two queries
    classes[0, 0] = torch.tensor([0.0, 0.0, 2.0, 0.0])
    classes[0, 1] = torch.tensor([30.0, 0.0, 0.0, 0.0])
    masks = torch.full((1, 5, 12, 20), -8.0)
    masks[0, 0, 3:6, 5:15] = 1.5
    out = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    monkeypatch.setattr(detector, "model", lambda pixel_values: out)
    found = detector(torch.zeros(3, 12, 20))
    (box, score, inside), *_ = found["couch"]
    assert box == (5, 3, 15, 6) and inside.sum() == 30
    expected = torch.tensor([0.0, 0, 2, 0]).softmax(0)[2] * torch.tensor(1.5).sigmoid()
    assert score == pytest.approx(expected.item(), rel=1e-5)
    assert all(inside.any() for objects in found.values() for *_, inside in objects)  # the empty mask is no object


def test_a_colour_is_read_off_the_object_alone(mask2former, monkeypatch):
    """What lies beside the object, inside its box or not, does not reach CLIP; grey does."""
    detector, seen = mask2former, []
    forward = detector.clip.forward
    monkeypatch.setattr(detector.clip, "forward", lambda **kw: seen.append(kw["pixel_values"]) or forward(**kw))
    inside = torch.zeros(40, 40, dtype=torch.bool)
    inside[10:30, 10:20] = inside[20:30, 10:30] = True
    for other in (0.0, 1.0):
        picture = torch.full((3, 40, 40), other)
        picture[:, inside] = 0.5
        detector.colors(picture, "couch", [((10, 10, 30, 30), 0.9, inside)])
    assert torch.equal(*seen) and seen[0].shape == (1, 3, 32, 32)
    square = torch.where(inside, 0.5, 0x99 / 255)[10:30, 10:30].expand(1, 3, 20, 20)
    square = F.interpolate(square, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(seen[0], normalize(square, rewards.CLIP_MEAN, rewards.CLIP_STD))


def test_a_detector_without_weights_is_one_line(tmp_path):
    with pytest.raises(RunError, match="cannot read the config of"):
        Mask2FormerDetector(str(tmp_path), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mask2former"}))
    with pytest.raises(RunError, match="cannot load GenEval's") as caught:
        Mask2FormerDetector(str(tmp_path), str(tmp_path)).load("cpu")
    assert "\n" not in str(caught.value)
