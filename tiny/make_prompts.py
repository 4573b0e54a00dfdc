"""How the prompt files of the tiny presets were written: prompts/tiny*.txt, tiny_single*.txt, moving*.jsonl."""

import json
import random

from PIL import Image

from tiny.clips import phrase_action, random_action
from tiny.make_video_models import short_clip
from tiny.pictures import TAGS, phrase, random_metadata
from tiny.training import ROOT


def write_picture_prompts(train=34, heldout=17, seed=0):
    """prompts/tiny.txt and tiny_heldout.txt: so many different captions of each kind, none in both files."""
    rng, files = random.Random(seed), {"tiny.txt": [], "tiny_heldout.txt": []}
    for tag in TAGS:
        captions = set()
        while len(captions) < train + heldout:
            captions.add(phrase(rng, random_metadata(rng, tag)))
        captions = rng.sample(sorted(captions), train + heldout)
        files["tiny.txt"] += captions[:train]
        files["tiny_heldout.txt"] += captions[train:]
    (ROOT / "prompts").mkdir(exist_ok=True)
    for name, lines in files.items():
        rng.shuffle(lines)
        (ROOT / "prompts" / name).write_text("\n".join(lines) + "\n")


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
