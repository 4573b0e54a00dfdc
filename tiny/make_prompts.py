"""How the prompt files of the tiny presets were written: prompts/tiny*.txt, tiny_single*.txt, moving*.jsonl."""

import itertools
import json
import random

from PIL import Image

from tiny.clips import phrase_action, random_action
from tiny.make_video_models import short_clip
from tiny.pictures import COLORS, NUMBERS, RELATIONS, SHAPES, TAGS, make_metadata, phrase, random_metadata
from tiny.training import ROOT


def balanced_metadata():
    """What the training prompts ask for: every colour, shape, number and relation equally often within its kind. 108 of
    216 name colours."""
    pairs = list(itertools.permutations(SHAPES, 2))
    of_colors = list(itertools.permutations(COLORS, 2))
    asked = [("single_object", [{"class": shape}]) for shape in SHAPES]
    asked += [("two_object", [{"class": a}, {"class": b}]) for a, b in pairs * 2]
    asked += [("counting", [{"class": shape, "count": n}]) for shape in SHAPES for n in NUMBERS.values()] * 2
    asked += [("colors", [{"class": shape, "color": color}]) for shape in SHAPES for color in COLORS] * 2
    asked += [
        ("position", [{"class": a}, {"class": b, "position": [relation, 0]}])
        for a, b in pairs
        for relation in RELATIONS
    ]
    asked += [
        ("color_attr", [{"class": shape, "color": color} for shape, color in zip(pair, colors, strict=True)])
        for pair, colors in zip(pairs * 5, of_colors * 2, strict=True)
    ]
    return [make_metadata(tag, [{"count": 1} | item for item in include]) for tag, include in asked]


def write_picture_prompts(seed=0):
    """prompts/tiny.txt, to train on: `balanced_metadata`; tiny_dev.txt, to choose options by: 17 captions of each kind.

    No caption is in two files. tiny_heldout.txt, to evaluate on, stays as it is: random captions, 17 of each kind.
    """
    rng, known = random.Random(seed), set((ROOT / "prompts/tiny_heldout.txt").read_text().splitlines())
    dev = [random_metadata(rng, tag) for tag in TAGS for _ in range(17)]
    for name, asked in (("tiny_dev", dev), ("tiny", balanced_metadata())):
        lines = [new_phrase(rng, metadata, known) for metadata in asked]
        rng.shuffle(lines)
        (ROOT / f"prompts/{name}.txt").write_text("\n".join(lines) + "\n")


def new_phrase(rng, metadata, known):
    """A caption for the metadata that is not among those known, to which it is added."""
    while (caption := phrase(rng, metadata)) in known:
        pass
    known.add(caption)
    return caption


def write_video_prompts(seed=0):
    """Prompts of clips, prompts/moving*.jsonl, with first frames in prompts/moving/; prompts/tiny_single*.txt."""
    rng = random.Random(seed)
    captions = {}
    while len(captions) < 96:
        action = random_action(rng)
        captions.setdefault(phrase_action(rng, action), action)
    (ROOT / "prompts/moving").mkdir(exist_ok=True)
    rows = []
    for i, (caption, action) in enumerate(captions.items()):
        rows.append(json.dumps({"prompt": caption, "image": f"moving/{i:02d}.png"}))
        pixels = short_clip(rng, action)[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(ROOT / f"prompts/moving/{i:02d}.png")
    singles = {}
    while len(singles) < 192:
        singles[phrase(rng, random_metadata(rng, rng.choice(("single_object", "colors"))))] = None
    for name, lines, train in (("moving{}.jsonl", rows, 48), ("tiny_single{}.txt", list(singles), 64)):
        for suffix, part in (("", lines[:train]), ("_heldout", lines[train:])):
            (ROOT / "prompts" / name.format(suffix)).write_text("\n".join(part) + "\n")


def write_prompts():
    """Writes all prompt files."""
    write_picture_prompts()
    write_video_prompts()
