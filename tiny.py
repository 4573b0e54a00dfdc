"""The tiny world: pictures of coloured shapes, a checker that reads them, and the tiny models trained on them.

    python tiny.py NAME     re-creates it from nothing: prompts, flux, clip, hps, sd, video, videoalign, or all
    python tiny.py check    prints how well the checker agrees with the renderer, and how good the models are.

A scene is drawn for a caption of one of GenEval's six kinds: single_object, two_object, counting, colors, position,
color_attr. What the caption leaves open is random. `check` reads the objects back from the pixels alone and shares no
code with the drawing. The models come out in the public formats (diffusers, open_clip, HPS-v2.1), so that the
trainers cannot tell them from the real ones.

B = images in a batch. Images are (B, 3, 64, 64) in [0, 1].
"""

import argparse
import colorsys
import contextlib
import copy
import functools
import io
import json
import math
import random
import re
import shutil
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm, trange

HERE = Path(__file__).resolve().parent
SIZE = 64  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (0.90, 0.14, 0.14),
    "yellow": (0.95, 0.82, 0.10),
    "green": (0.14, 0.68, 0.20),
    "cyan": (0.10, 0.76, 0.86),
    "blue": (0.14, 0.24, 0.90),
    "purple": (0.66, 0.18, 0.84),
}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y points down
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# ------------------------------------------------------------------------------------------------- captions
# Metadata is GenEval's: {"tag", "include": [{"class", "count", "color"?, "position"? = [relation, index]}],
# "exclude"? , "prompt"}. For position, include[1] stands in that relation to include[0].

OPENINGS = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "a simple drawing of ")
ENDINGS = ("", "", " on a plain background", " on a light background")
JOINERS = (" and ", " next to ", " with ")
THING = rf"(a|one|two|three|four) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})(?:es|s)?"
CAPTION = re.compile(
    rf"^(?:an? (?:simple )?(?:photo|picture|image|drawing) of )?{THING}"
    rf"(?: (and|next to|with|(?:to the )?left of|(?:to the )?right of|above|below) {THING})?"
    r"(?: on a (?:plain|light) background)?$"
)


def make_metadata(tag, include, prompt=""):
    """GenEval's metadata for these objects. Counting also excludes one object more than asked for."""
    metadata = {"tag": tag, "include": include}
    if tag == "counting":
        metadata["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return metadata | {"prompt": prompt}


def random_metadata(rng, tag):
    """What a random caption of this kind asks for."""
    first, second = rng.sample(SHAPES, 2)
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    if tag in ("single_object", "counting", "colors"):
        include.pop()
    if tag == "counting":
        include[0]["count"] = rng.randint(1, 4)
    if tag == "position":
        include[1]["position"] = [rng.choice(list(RELATIONS)), 0]
    if tag in ("colors", "color_attr"):
        for item, color in zip(include, rng.sample(list(COLORS), len(include)), strict=True):
            item["color"] = color
    return make_metadata(tag, include)


def phrase(rng, metadata):
    """A caption for the metadata, in one of several phrasings."""
    things = []
    for item in metadata["include"]:
        count = next(word for word, n in NUMBERS.items() if n == item["count"])
        plural = ("es" if item["class"] == "cross" else "s") if item["count"] > 1 else ""
        number = count if metadata["tag"] == "counting" else "a"
        things.append(" ".join(filter(None, (number, item.get("color"), item["class"] + plural))))
    joiner = rng.choice(JOINERS)
    if metadata["tag"] == "position":
        things.reverse()
        relation = metadata["include"][1]["position"][0]
        joiner = f" {'to the ' * (relation.endswith('of') and rng.random() < 0.5)}{relation} "
    return rng.choice(OPENINGS) + joiner.join(things) + rng.choice(ENDINGS)


def parse(prompt):
    """Caption → GenEval metadata. Raises ValueError for anything that is not a caption of the tiny world."""
    match = CAPTION.match(prompt.strip().lower())
    if match is None:
        raise ValueError(f"not a caption of the tiny world: {prompt!r}")
    number, color, name, joiner, _, color_2, name_2 = match.groups()
    include = [{"class": name, "count": NUMBERS.get(number, 1)} | ({"color": color} if color else {})]
    tag = "counting" if number != "a" else "colors" if color else "single_object"
    if joiner is not None:
        include.append({"class": name_2, "count": 1} | ({"color": color_2} if color_2 else {}))
        relation = joiner.removeprefix("to the ")
        tag = "position" if relation in RELATIONS else "color_attr" if color else "two_object"
        if tag == "position":
            include.reverse()
            include[1]["position"] = [relation, 0]
    return make_metadata(tag, include, prompt)


def hard_negatives(metadata):
    """All metadata that differ in one attribute: a shape, a colour, the count, the relation, or colours swapped."""
    include, tag, changed = metadata["include"], metadata["tag"], []

    def change(index, **new):
        changed.append(make_metadata(tag, [item | (new if i == index else {}) for i, item in enumerate(include)]))

    for i, item in enumerate(include):
        for name in set(SHAPES) - {other["class"] for other in include}:
            change(i, **{"class": name})
        for color in set(COLORS) - {item["color"]} if "color" in item else ():
            change(i, color=color)
        for relation in set(RELATIONS) - {item["position"][0]} if "position" in item else ():
            change(i, position=[relation, 0])
        for count in set(NUMBERS.values()) - {item["count"]} if tag == "counting" else ():
            change(i, count=count)
    if tag == "color_attr":
        first, second = include
        changed.append(make_metadata(tag, [first | {"color": second["color"]}, second | {"color": first["color"]}]))
    return changed


# ------------------------------------------------------------------------------------------------- truth


def relations(a, b):
    """The relations in which box a = (left, top, right, bottom) stands to box b, by GenEval's rule."""
    offset = []
    for low, high in ((0, 2), (1, 3)):
        distance = (a[low] + a[high] - b[low] - b[high]) / 2
        sizes = a[high] - a[low] + b[high] - b[low]
        offset.append(math.copysign(max(abs(distance) - 0.1 * sizes, 0.0), distance))
    length = math.hypot(*offset) or 1.0
    return {name for name, (x, y) in RELATIONS.items() if (offset[0] * x + offset[1] * y) / length > 0.5}


def holds(objects, metadata):
    """GenEval's verdict on a list of objects {"class", "color", "box"}, the most prominent first."""
    matched = []
    for item in metadata["include"]:
        found = [o for o in objects if o["class"] == item["class"]][: item["count"]]
        if len(found) < item["count"] or any(o["color"] != item.get("color", o["color"]) for o in found):
            return False
        if "position" in item:
            relation, target = item["position"]
            if any(relation not in relations(o["box"], t["box"]) for o in found for t in matched[target]):
                return False
        matched.append(found)
    return all(sum(o["class"] == x["class"] for o in objects) < x["count"] for x in metadata.get("exclude", ()))


def scene_objects(rows):
    """The objects of a scene, in the form in which `detect` gives them."""
    objects = []
    for shape, *rgb, x, y, r in (row for row in rows if row[0] >= 0):
        color = min(COLORS, key=lambda name: math.dist(rgb, COLORS[name]))
        objects.append({"class": SHAPES[int(shape)], "color": color, "box": (x - r, y - r, x + r, y + r)})
    return objects


# ------------------------------------------------------------------------------------------------- renderer


def random_scene(rng, metadata, cut_off=0.0):
    """Four rows (shape index or -1, red, green, blue, x, y, radius) that show what the metadata ask for.

    cut_off in [0, 1] pushes all objects in one direction, one of the faults of a web picture.
    """
    wanted = [item for item in metadata["include"] for _ in range(item["count"])]
    relation = metadata["include"][-1].get("position")
    largest = 13.0 if len(wanted) <= 2 else 10.5
    while True:
        rows = []
        for item in wanted:
            color = COLORS[item.get("color") or rng.choice(list(COLORS))]
            radius = rng.uniform(largest - 4, largest)
            x, y = (rng.uniform(radius + 2, SIZE - radius - 2) for _ in range(2))
            rows.append([SHAPES.index(item["class"]), *(c + rng.uniform(-0.04, 0.04) for c in color), x, y, radius])
        apart = all(
            max(abs(a[4] - b[4]), abs(a[5] - b[5])) > a[6] + b[6] + 3 for i, a in enumerate(rows) for b in rows[:i]
        )
        if relation is not None:  # well on that side, and not at the same time on another
            dx, dy = rows[1][4] - rows[0][4], rows[1][5] - rows[0][5]
            rx, ry = RELATIONS[relation[0]]
            apart = apart and rx * dx + ry * dy > 2.2 * abs(rx * dy + ry * dx)
        if apart:
            break
    if cut_off > 0:
        angle, far = rng.uniform(0, 2 * math.pi), 22 * cut_off
        for row in rows:
            row[4], row[5] = row[4] + far * math.cos(angle), row[5] + far * math.sin(angle)
    return rows + [[-1.0] + [0.0] * 6] * (4 - len(rows))


def render(scenes, ragged=None, grain=20):
    """Scenes (B, 4, 7) → images (B, 3, 64, 64) in [0, 1]; ragged (B,) is the unevenness of the edges in pixels,
    and grain the number of bumps across the picture.

    Each shape is a signed distance in pixels, turned into a soft edge one pixel wide.
    """
    scenes = torch.as_tensor(scenes, dtype=torch.float32)
    B = len(scenes)
    grid = torch.arange(SIZE) + 0.5
    shape, rgb, radius = scenes[..., 0], scenes[..., 1:4], scenes[..., 6, None, None]
    dx = grid[None, None, None, :] - scenes[..., 4, None, None]  # (B, 4, 1, 64)
    dy = grid[None, None, :, None] - scenes[..., 5, None, None]  # (B, 4, 64, 1)
    ax, ay = dx.abs(), dy.abs()
    side, bar, tip = 0.9 * radius, 0.36 * radius, 1.15 * radius
    down = dy + 0.25 * tip  # the triangle hangs around its centroid, not the middle of its box
    distances = (
        torch.hypot(dx, dy) - radius,
        torch.maximum(ax - side, ay - side),
        torch.maximum(down, math.sqrt(0.75) * ax - 0.5 * down) - 0.5 * tip,
        torch.minimum(torch.maximum(ax - radius, ay - bar), torch.maximum(ax - bar, ay - radius)),
    )
    unevenness = 0.0
    if ragged is not None:
        unevenness = F.interpolate(torch.randn(B, 4, grain, grain), SIZE, mode="bilinear") * ragged.view(B, 1, 1, 1)
    light = 0.86 + 0.10 * torch.rand(B, 1, 1, 1) + 0.015 * torch.randn(B, 3, 1, 1)
    slope = 0.03 * torch.randn(B, 2, 1, 1, 1) * torch.linspace(-1, 1, SIZE)
    images = (light + slope[:, 0] + slope[:, 1].transpose(-1, -2)).expand(B, 3, SIZE, SIZE)
    for k in range(4):
        distance = torch.full((B, SIZE, SIZE), 9.0)
        for i, candidate in enumerate(distances):
            distance = torch.where(shape[:, k, None, None] == i, candidate[:, k], distance)
        cover = (0.5 - distance - (unevenness[:, k] if ragged is not None else 0.0)).clamp(0, 1)[:, None]
        images = images * (1 - cover) + rgb[:, k, :, None, None] * cover
    return images.clamp(0, 1)


def degrade(images, strength=None):
    """Each image loses quality in one random way: washed out, noisy, blurred, blocky, tinted, or blended with another.

    images (B, 3, 64, 64) in [0, 1]; strength (B,) in (0, 1], random if not given.
    """
    B = len(images)
    s = (0.3 + 0.7 * torch.rand(B) if strength is None else strength).view(B, 1, 1, 1)
    small = F.interpolate(F.avg_pool2d(images, 4), SIZE, mode="bilinear")
    blocks = F.interpolate(F.avg_pool2d(images, 4), SIZE)
    ways = torch.stack(
        [
            images + 0.75 * s * (images.mean((2, 3), keepdim=True) - images),
            images + 0.25 * s * torch.randn_like(images),
            images + s * (small - images),
            images + s * (blocks - images) + 0.05 * s * torch.randn_like(images),
            images + 0.25 * s * torch.randn(B, 3, 1, 1),
            images + 0.45 * s * (images.roll(1, 0) - images),
        ],
        dim=1,
    )
    return ways[torch.arange(B), torch.randint(ways.shape[1], (B,))].clamp(0, 1)


def web_pictures(rng, count, wrong, faulty, pale=0.0):
    """A captioned picture set like one from the web: some captions are wrong, some pictures have a fault.

    Returns images (count, 3, 64, 64) uint8 and the captions. wrong: share of captions with one attribute changed;
    faulty: share of pictures that are degraded, ragged or cut off by the border; pale: share that has lost more than
    half of its contrast.
    """
    images, captions = [], []
    for start in trange(0, count, 500, desc="drawing pictures"):
        scenes, fault = [], torch.zeros(min(500, count - start), dtype=torch.long)
        for i in range(len(fault)):
            metadata = random_metadata(rng, TAGS[i % len(TAGS)])
            if rng.random() < faulty:
                fault[i] = rng.randint(1, 3)
            scenes.append(random_scene(rng, metadata, cut_off=rng.uniform(0.4, 1) * (fault[i].item() == 3)))
            captions.append(phrase(rng, rng.choice(hard_negatives(metadata)) if rng.random() < wrong else metadata))
        drawn = render(scenes, ragged=(fault == 2) * (0.8 + 1.2 * torch.rand(len(fault))))
        drawn = torch.where((fault == 1).view(-1, 1, 1, 1), degrade(drawn), drawn)
        lost = (0.55 + 0.3 * torch.rand(len(fault))) * (torch.rand(len(fault)) < pale)
        drawn = torch.lerp(drawn, drawn.mean((2, 3), keepdim=True), lost.view(-1, 1, 1, 1))
        images.append((drawn * 255).round().byte())
    return torch.cat(images), captions


# ------------------------------------------------------------------------------------------------- checker


def outline(mask, n=24):
    """A piece (H, W) bool, moved to its centroid and scaled to unit spread along both axes: (n, n) in [0, 1]."""
    ys, xs = mask.nonzero().float().unbind(1)
    y, x = (torch.linspace(-2.1, 2.1, n) * v.std() + v.mean() for v in (ys, xs))
    y, x = torch.meshgrid(2 * (y + 0.5) / mask.shape[0] - 1, 2 * (x + 0.5) / mask.shape[1] - 1, indexing="ij")
    return F.grid_sample(mask[None, None].float(), torch.stack([x, y], -1)[None], align_corners=False)[0, 0]


def ideal_outlines(n=96):
    """What `outline` gives for perfect shapes: {class: (24, 24)}."""
    v, u = torch.meshgrid(*2 * (torch.linspace(-1.5, 1.5, n),), indexing="ij")
    inside = torch.maximum(u.abs(), v.abs()) <= 1
    shapes = {
        "circle": u * u + v * v <= 1,
        "square": inside,
        "triangle": inside & (u.abs() <= (v + 1) / 2),
        "cross": inside & (torch.minimum(u.abs(), v.abs()) <= 0.36),
    }
    return {name: outline(mask) for name, mask in shapes.items()}


def color_planes(images, saturated=0.28):
    """(B, 3, 64, 64) → (B, 6, 64, 64) bool: the pixels that are clearly of each colour, by their hue."""
    high, low = images.amax(1), images.amin(1)
    hues = torch.tensor([colorsys.rgb_to_hsv(*rgb)[0] for rgb in COLORS.values()])
    r, g, b = (images - low[:, None]).unbind(1)
    chroma = (high - low).clamp(min=1e-6)
    hue = torch.where(high == images[:, 0], (g - b) / chroma, (b - r) / chroma + 2)
    hue = torch.where((high == images[:, 2]) & (high != images[:, 0]), (r - g) / chroma + 4, hue) / 6
    turn = (hue[:, None] - hues.view(1, -1, 1, 1) + 0.5) % 1 - 0.5
    return F.one_hot(turn.abs().argmin(1), len(COLORS)).permute(0, 3, 1, 2).bool() & (high - low > saturated)[:, None]


def components(planes):
    """Connected pixels (8 neighbours) of (..., 64, 64) bool planes → int labels, 0 where the plane is False."""
    mask = planes.flatten(0, -3).float()
    labels = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask  # exact in float32 up to 2^24
    while True:
        before = labels
        for _ in range(8):
            labels = F.max_pool2d(labels, 3, 1, 1) * mask
        if torch.equal(labels, before):
            return labels.long().view(planes.shape)


def read_object(mask, alike=0.78):
    """What one connected piece (64, 64) bool is: (class or None, box, area). None: too ragged to be any shape.

    How much of its box it fills and how low its centroid lies say which shape; its outline says how well formed.
    """
    ys, xs = mask.nonzero().unbind(1)
    left, top, right, bottom = xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1
    width, height, area = right - left, bottom - top, len(ys)
    fill, low = area / (width * height), (ys.float().mean().item() + 0.5 - top) / height
    name = "square" if fill > 0.885 else "circle" if fill > 0.7 else "triangle" if low > 0.57 else "cross"
    own = outline(mask)
    overlap = torch.minimum(own, IDEAL[name]).sum() / torch.maximum(own, IDEAL[name]).sum()
    return name if overlap > alike and 0.7 < width / height < 1.45 else None, (left, top, right, bottom), area


IDEAL = ideal_outlines()


def detect(images, smallest=30):
    """Images (B, 3, 64, 64) in [0, 1] → for each a list of {"class", "color", "box", "area"}, the largest first.

    Pieces under `smallest` pixels are specks and not looked at; a larger piece that is no shape has class None.
    """
    images = images.detach().float().cpu()
    found = []
    for chunk in images.split(64):
        labels = components(color_planes(chunk))
        for image in labels:
            objects = []
            for color, plane in zip(COLORS, image, strict=True):
                values, counts = plane[plane > 0].unique(return_counts=True)
                for value in values[counts >= smallest]:
                    name, box, area = read_object(plane == value)
                    objects.append({"class": name, "color": color, "box": box, "area": area})
            found.append(sorted(objects, key=lambda o: -o["area"]))
    return found


def check(images, prompts):
    """(B,) bool: does each image (3, 64, 64) in [0, 1] show what its prompt asks for? From the pixels alone."""
    verdicts = [holds(o, parse(prompt)) for o, prompt in zip(detect(images), prompts, strict=True)]
    return torch.tensor(verdicts)


class Detector:
    """The checker as a detector for GenEval, `--detector tiny.py:Detector`; see evaluation/geneval.py."""

    NOTE = "GenEval's six kinds of prompt with the tiny world's shapes, seen by its own checker."
    classes = frozenset(SHAPES)

    def metadata(self, prompt):
        """What a caption of the tiny world asks for."""
        return parse(prompt)

    def __call__(self, picture):
        """(3, H, W) in [0, 1] → {class: [(box, score, colour)]}; the largest object has the highest score."""
        found = {}
        for i, thing in enumerate(detect(F.interpolate(picture[None], SIZE, mode="bilinear"))[0]):
            if thing["class"] is not None:
                found.setdefault(thing["class"], []).append((thing["box"], 1 - 1e-4 * i, thing["color"]))
        return found

    def colors(self, picture, name, objects):
        return [color for _, _, color in objects]


@contextlib.contextmanager
def fast():
    """bfloat16, and attention written out: on a CPU its backward pass is four times faster than the fused kernel's."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


# ------------------------------------------------------------------------------------------------- CLIP and HPS

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 5, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
WORDS = 24  # tokens that a caption needs at most; the text tower is causal, so training may leave out the padding


def new_clip(words):
    """The open_clip model that reads this many tokens."""
    import open_clip

    text = open_clip.CLIPTextCfg(**CLIP_CONFIG["text_cfg"] | {"context_length": words})
    return open_clip.CLIP(CLIP_CONFIG["embed_dim"], open_clip.CLIPVisionCfg(**CLIP_CONFIG["vision_cfg"]), text)


@functools.cache
def clip_tokens(caption):
    """The 24 token ids of CLIP's own vocabulary. No tensor: many small ones kept for long would split up the heap."""
    import open_clip

    return tuple(open_clip.tokenize([caption])[0, :WORDS].tolist())


def clip_features(model, images, captions):
    """Normalised features (B, 128) of images in [0, 1] and (N, 128) of captions; the norm of CLIP's pixels included."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    tokens = torch.tensor([clip_tokens(caption) for caption in captions])
    image, text = model.encode_image((images - mean) / std), model.encode_text(tokens)
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def clip_state(model):
    """Float16 weights with the full 77 positions. The rows of words that no caption uses are 0, and zip to nothing."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    used = torch.zeros(len(state["token_embedding.weight"]), dtype=torch.bool)
    rng = random.Random(0)
    for _ in range(20000):
        used[list(clip_tokens(phrase(rng, random_metadata(rng, rng.choice(TAGS)))))] = True
    state["token_embedding.weight"][~used] = 0
    state["positional_embedding"] = F.pad(state["positional_embedding"][:WORDS], (0, 0, 0, 77 - WORDS))
    return {name: value.half() for name, value in state.items()}


def save_zipped(state, path):
    """torch.save, with its zip archive compressed. torch.load reads it as it is."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))


def save_clip(model, folder):
    """open_clip's folder: open_clip_config.json and open_clip_pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"size": [SIZE, SIZE], **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_zipped(clip_state(model), folder / "open_clip_pytorch_model.bin")


def save_hps(model, folder):
    """HPS-v2.1's layout: {"state_dict": …} in one .pt file, and the architecture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")
    save_zipped({"state_dict": clip_state(model)}, folder / "HPS_tiny.pt")


def load_clip(path):
    """The model with the weights in this file of tiny/clip or tiny/hps, float32."""
    state = torch.load(path, weights_only=True)
    state = {name: value.float() for name, value in state.get("state_dict", state).items()}
    state["positional_embedding"] = state["positional_embedding"][:WORDS]
    model = new_clip(WORDS)
    model.load_state_dict(state)
    return model


def facts():
    """Everything simple that can be true of a scene, as metadata: a shape's presence, colour, number, relation."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    one = [make_metadata("single_object", [{"class": a, "count": 1}]) for a in SHAPES]
    one += [make_metadata("colors", [{"class": a, "count": 1, "color": c}]) for a in SHAPES for c in COLORS]
    one += [make_metadata("counting", [{"class": a, "count": n}]) for a in SHAPES for n in NUMBERS.values()]
    return one + [
        make_metadata("position", [{"class": a, "count": 1}, {"class": b, "count": 1, "position": [relation, 0]}])
        for a, b in pairs
        for relation in RELATIONS
    ]


FACTS = facts()


def asserted(metadata):
    """Which of the FACTS a caption states, as a list of 0 and 1."""
    if metadata["tag"] in ("two_object", "color_attr"):
        parts = [{"include": [item]} for item in metadata["include"]]
    else:
        parts = [metadata]
    stated = [part["include"] for part in parts]
    kind = {"two_object": "single_object", "color_attr": "colors"}.get(metadata["tag"], metadata["tag"])
    return [float(fact["tag"] == kind and fact["include"] in stated) for fact in FACTS]


def caption_batch(rng, scenes, wrong=4):
    """Pairs of scenes whose captions differ in one attribute, and more wrong captions for each.

    Returns images (B, 3, 64, 64), rows (B, 4, 7), captions (B right ones, then wrong·B: scene by scene), truth (B, B):
    whether a scene's caption is true of another scene, and what is true of each scene and stated by each caption
    among FACTS (B, facts), (B + wrong·B, facts).
    """
    wanted, others, rows = [], [], []
    for i in range(scenes):
        tag = rng.choices(TAGS, (1, 1, 2, 1, 6, 3))[0]  # the last two are the hardest to learn
        metadata = random_metadata(rng, tag) if i % 2 == 0 else rng.choice(hard_negatives(wanted[-1]))
        wanted.append(metadata)
        others += rng.choices(hard_negatives(metadata), k=wrong)
        rows.append(random_scene(rng, metadata))
    objects = [scene_objects(scene) for scene in rows]
    truth = torch.tensor([[holds(o, metadata) for metadata in wanted] for o in objects])
    seen = torch.tensor([[float(holds(o, fact)) for fact in FACTS] for o in objects])
    said = torch.tensor([asserted(metadata) for metadata in wanted + others])
    images = render(rows, ragged=(torch.rand(scenes) < 0.2) * 1.8 * torch.rand(scenes))
    images = torch.where(torch.rand(scenes, 1, 1, 1) < 0.3, degrade(images), images)
    return images, torch.tensor(rows), [phrase(rng, metadata) for metadata in wanted + others], truth, seen, said


def patch_labels(rows):
    """(B, 64) what each 8x8 patch shows: 0 background, else 1 + shape and colour. A help for training only."""
    palette = torch.tensor(list(COLORS.values()))
    color = torch.cdist(rows[..., 1:4], palette).argmin(-1)
    kind = torch.where(rows[..., 0] >= 0, 1 + rows[..., 0].long() * len(COLORS) + color, 0)  # (B, 4)
    y, x = torch.meshgrid(torch.arange(4.0, SIZE, 8), torch.arange(4.0, SIZE, 8), indexing="ij")
    far = torch.maximum((rows[..., 4, None] - x.flatten()).abs(), (rows[..., 5, None] - y.flatten()).abs())
    return ((far < rows[..., 6, None] + 1) * kind[..., None]).amax(1)


def places(rows):
    """Where the only object of each shape lies, (B, 4, 2) in [-1, 1], and whether there is exactly one, (B, 4)."""
    is_shape = (rows[..., :1] == torch.arange(len(SHAPES))).float()  # (B, 4 objects, 4 shapes)
    return torch.einsum("bos,boc->bsc", is_shape, rows[..., 4:6] / (SIZE / 2) - 1), is_shape.sum(1) == 1


def contrast(image, text, truth, scale):
    """Cross-entropy of the right caption for each image, and of the right image for each caption.

    image (B, d), text (B + wrong·B, d), truth (B, B) as in `caption_batch`. Captions of other scenes that happen to be
    true of this one are left out. Also returns the share of images (mean over B) that prefer their own caption.
    """
    B, target = len(image), torch.arange(len(image))
    among = (scale * image @ text[:B].T).masked_fill(truth & ~torch.eye(B, dtype=torch.bool), -torch.inf)
    wrong = scale * torch.einsum("bd,bnd->bn", image, text[B:].view(B, -1, text.shape[1]))
    accuracy = (among.diagonal() > wrong.amax(1)).float().mean()
    return F.cross_entropy(torch.cat([among, wrong], 1), target) + F.cross_entropy(among.T, target), accuracy


def train_clip(seed=0, iterations=3000, scenes=96):
    """CLIP by contrast within the batch, with hard negatives.

    Linear heads, dropped afterwards, make it learn in minutes: what each patch shows, where each shape lies, which
    facts are true of the image, and which the caption states. The position embedding starts as a ramp as strong as the
    patches: with open_clip's own, ten times weaker, the model stays blind to left and right, above and below.
    (The shipped weights had ramp and places only in a second leg, 800 steps after 3000.)
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_clip(WORDS)
    x = torch.linspace(-1, 1, SIZE // CLIP_CONFIG["vision_cfg"]["patch_size"])
    ramp = torch.cartesian_prod(x, x) @ torch.randn(2, CLIP_CONFIG["vision_cfg"]["width"])
    model.visual.positional_embedding.data[1:] += 0.5 * ramp
    patches = torch.nn.Linear(CLIP_CONFIG["vision_cfg"]["width"], 1 + len(SHAPES) * len(COLORS))
    where = torch.nn.Linear(CLIP_CONFIG["vision_cfg"]["width"], 2 * len(SHAPES))
    true, stated = (torch.nn.Linear(CLIP_CONFIG["embed_dim"], len(FACTS)) for _ in range(2))
    parameters = [p for module in (model, patches, where, true, stated) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=iterations, pct_start=0.1)
    kept = {}
    model.visual.ln_post.register_forward_hook(lambda module, args, out: kept.update(tokens=out))
    for _ in (bar := trange(iterations, desc="clip")):
        images, rows, captions, truth, seen, said = caption_batch(rng, scenes)
        with fast():
            image, text = clip_features(model, images, captions)
            shown = patches(kept["tokens"][:, 1:]).flatten(0, 1).float()
            place = where(kept["tokens"][:, 0]).float().unflatten(1, (len(SHAPES), 2))
        loss, accuracy = contrast(image, text, truth, model.logit_scale.exp())
        target, alone = places(rows)
        help_loss = F.cross_entropy(shown, patch_labels(rows).flatten()) + 5 * F.mse_loss(place[alone], target[alone])
        help_loss += 5 * F.binary_cross_entropy_with_logits(true(10 * image), seen)
        help_loss += 5 * F.binary_cross_entropy_with_logits(stated(10 * text), said)
        optimizer.zero_grad()
        (loss + help_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss:.3f}", help=f"{help_loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
    return model


def preference_batch(rng, vae, pairs):
    """Pairs of pictures for one caption, the better one first: images (pairs, 2, 3, 64, 64), captions.

    Half of the pairs differ in quality (the second has a fault, or a worse one), half in whether the caption is true.
    Most of them come through the autoencoder, as a generator's pictures do.
    """
    captions, scenes, faults, strengths = [], [], [], []
    for i in range(pairs):
        metadata = random_metadata(rng, rng.choice(TAGS))
        captions.append(phrase(rng, metadata))
        fault, worse = rng.randrange(4), rng.uniform(0.25, 1)
        if i % 2:
            second = rng.choice(hard_negatives(metadata))
            strength = [0.7 * worse * (rng.random() < 0.4)] * 2
        else:
            second = metadata
            strength = [rng.uniform(0, 0.5) * worse * (rng.random() < 0.4), worse]
        scenes += [
            random_scene(rng, m, cut_off=s * (fault == 0)) for m, s in zip((metadata, second), strength, strict=True)
        ]
        faults += [fault, fault]
        strengths += strength
    fault, s = torch.tensor(faults), torch.tensor(strengths)
    grain = rng.choice((7, 20))  # lumps or frayed edges
    pictures = render(scenes, ragged=(4 if grain == 7 else 2.2) * s * (fault == 1), grain=grain)
    pictures = torch.where(((fault == 2) & (s > 0)).view(-1, 1, 1, 1), degrade(pictures, s), pictures)
    with torch.no_grad():
        z = vae.encode(pictures * 2 - 1).latent_dist.mode()
        s = (s * (fault == 3)).view(-1, 1, 1, 1)
        patchy = F.interpolate(torch.rand(len(z), 1, 5, 5), z.shape[-1], mode="bilinear")
        ways = (0.9 * torch.randn_like(z), 0.4 * (z.roll(1, 0) - z), 1.3 * patchy * (z.roll(2, 0) - z))
        decoded = (vae.decode(z + s * rng.choice(ways)).sample / 2 + 0.5).clamp(0, 1)
    through = (fault == 3) | (torch.rand(pairs) < 0.75).repeat_interleave(2)
    pictures = torch.where(through.view(-1, 1, 1, 1), decoded, pictures)
    return pictures.unflatten(0, (pairs, 2)), captions


def train_hps(model, vae, seed=0, iterations=400, pairs=64, scenes=48, learning_rate=8e-4):
    """HPSv2's loss, cross-entropy of the preferred of two images under one caption, on the CLIP model.

    CLIP's own contrast goes on beside it, so that the model does not forget which caption is true.
    """
    torch.manual_seed(seed + 1)
    rng = random.Random(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc="hps")):
        images, _, captions, truth, *_ = caption_batch(rng, scenes)
        judged, asked = preference_batch(rng, vae, pairs)
        with fast():
            image, text = clip_features(model, torch.cat([images, judged.flatten(0, 1)]), captions + asked)
        scale = model.logit_scale.exp()
        loss, accuracy = contrast(image[:scenes], text[: len(captions)], truth, scale)
        liking = scale * torch.einsum("pid,pd->pi", image[scenes:].unflatten(0, (pairs, 2)), text[len(captions) :])
        preference = F.cross_entropy(liking, torch.zeros(pairs, dtype=torch.long))
        optimizer.zero_grad()
        (loss + 2 * preference).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        preferred = (liking[:, 0] > liking[:, 1]).float()
        quality, caption = preferred[::2].mean(), preferred[1::2].mean()
        bar.set_postfix(accuracy=f"{accuracy:.2f}", quality=f"{quality:.2f}", caption=f"{caption:.2f}", refresh=False)
    return model


@torch.no_grad()
def ranking(model, scenes, seed=0):
    """Share of freshly drawn scenes whose caption scores above every caption with one attribute changed, per kind."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), model.eval()
    right = {tag: [] for tag in TAGS}
    for i in range(scenes):
        metadata = random_metadata(rng, tag := TAGS[i % len(TAGS)])
        captions = [phrase(rng, m) for m in [metadata, *hard_negatives(metadata)]]
        image, text = clip_features(model, render([random_scene(rng, metadata)]), captions)
        right[tag].append((image @ text.T).argmax().item() == 0)
    return {tag: sum(r) / len(r) for tag, r in right.items()}


# ------------------------------------------------------------------------------------------------- diffusion models


def train_vae(seed=0, pictures=12000, iterations=1500, batch=32):
    """AutoencoderKL, 64x64 pixels → (4, 16, 16) latents, trained on the web pictures."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    images, _ = web_pictures(random.Random(seed), pictures, wrong=0.0, faulty=0.35)
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc="vae")):
        x = images[torch.randint(len(images), (batch,))].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * posterior.kl().mean() / 16
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{error.square().mean():.4f}", refresh=False)
    with torch.no_grad():
        z = vae.eval().encode(images[:1024].float() / 127.5 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
    return vae


def caption_words():
    """Every word that a caption can contain."""
    rng = random.Random(0)
    return sorted({word for i in range(6000) for word in phrase(rng, random_metadata(rng, TAGS[i % 6])).split()})


def clip_tokenizer():
    """CLIPTokenizer with one token for each caption word; other words are spelt out."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(model_max_length=77).train_new_from_iterator([" ".join(caption_words())] * 3, 1000)


def clip_text_encoder(tokenizer, layers):
    """CLIPTextModel, 64 wide, for this tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def t5_tokenizer():
    """T5 tokenizer with one token for each caption word, and letters for the rest."""
    from transformers import T5TokenizerFast

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in caption_words() if len(word) > 1 or word == "a"]
    vocabulary += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def new_flux(vae):
    """An untrained FluxPipeline around this autoencoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(
        scheduler, vae, clip_text_encoder(tokenizer, 1), tokenizer, T5EncoderModel(t5), tokenizer_2, transformer
    )


def save_pipeline(pipe, folder):
    """The pipeline's folder, float16; the pipeline itself stays as it is.

    Transformers loads a model in the type that its config names, diffusers in float32. The text encoders' configs say
    float32, so that `from_pretrained` without a type gives a pipeline that is float32 throughout.
    """
    shutil.rmtree(folder, ignore_errors=True)
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    half = {name: part.half() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    saved = type(pipe)(**half)
    saved.register_to_config(**{k: v for k, v in pipe.config.items() if k == "requires_safety_checker"})
    saved.save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where it was loaded from before
        config |= {"dtype": "float32"} if file.parent.name.startswith("text_encoder") else {}
        file.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def encode_pictures(vae, images):
    """(N, 3, 64, 64) uint8 → latents (N, 4, 16, 16) of about zero mean and unit variance."""
    latents = [
        vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()
        for chunk in tqdm(images.split(250), desc="encoding pictures")
    ]
    return (torch.cat(latents) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def optimizers(modules, iterations, learning_rate):
    """Muon for the matrices of the blocks, AdamW for everything else, each with its one-cycle schedule."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "shared" not in name
            (matrices if hidden else rest).append(parameter)
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR
    return [
        (o, cycle(o, learning_rate, total_steps=iterations, pct_start=0.05, cycle_momentum=False))
        for o in (muon, adamw)
    ]


def step(modules, steps):
    """One step of every optimizer, after the backward pass."""
    for module in modules:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer, schedule in steps:
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def update(loss, modules, averages, steps, i):
    """One step of every optimizer, then of the running average of the weights (i counts from 0)."""
    loss.backward()
    step(modules, steps)
    with torch.no_grad():
        for old, new in zip(averages, modules, strict=True):
            torch._foreach_lerp_(list(old.parameters()), list(new.parameters()), 1 - min(0.999, (i + 1) / (i + 10)))


def train_flux(pipe, folder, iterations, wrong, faulty, pale=0.0, seed=0, pictures=30000, batch=64, learning_rate=2e-3):
    """Flow matching: the transformer and both text encoders learn v = noise - data at z = (1-sigma) data + sigma noise.

    Returns the pipeline with the running average of the weights, saved to `folder` now and then, and at the end.
    wrong, faulty, pale: see `web_pictures`.
    """
    torch.manual_seed(seed)
    images, captions = web_pictures(random.Random(seed), pictures, wrong, faulty, pale)
    latents = pipe._pack_latents(encode_pictures(pipe.vae, images), pictures, pipe.vae.config.latent_channels, 16, 16)
    words = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids[:, :WORDS]
    words_2 = pipe.tokenizer_2(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
    place = pipe._prepare_latent_image_ids(pictures, 8, 8, "cpu", torch.float32)
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    average = copy.deepcopy(pipe)
    steps = optimizers(modules, iterations, learning_rate)
    for i in (bar := trange(iterations, desc="flux")):
        # Usually 32 text tokens. Sometimes more, so that the padding means nothing: the pipeline's default is 512.
        length, share = random.Random(i).choices([(32, 1), (64, 1), (128, 2), (512, 8)], [0.92, 0.03, 0.03, 0.02])[0]
        pick = torch.randint(pictures, (batch // share,))
        data, noise = latents[pick], torch.randn(batch // share, 64, latents.shape[-1])
        sigma = torch.sigmoid(torch.randn(len(pick)) + 0.5)
        z = data + sigma.view(-1, 1, 1) * (noise - data)
        with fast():
            v = pipe.transformer(
                hidden_states=z,
                timestep=sigma,
                guidance=1 + 6 * torch.rand(len(pick)),
                pooled_projections=pipe.text_encoder(words[pick]).pooler_output,
                encoder_hidden_states=pipe.text_encoder_2(F.pad(words_2[pick], (0, length - 32))).last_hidden_state,
                txt_ids=torch.zeros(length, 3),
                img_ids=place,
            ).sample
        loss = F.mse_loss(v.float(), noise - data)
        update(loss, modules, [average.transformer, average.text_encoder, average.text_encoder_2], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_pipeline(average, folder)
    return average


def new_sd(vae):
    """An untrained StableDiffusionPipeline on the flux autoencoder.

    Stable Diffusion's latents are scaled but not shifted, so the shift moves into two 1x1 convolutions around them.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    shifted = AutoencoderKL.from_config(vae.config, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
    shifted.load_state_dict(vae.state_dict(), strict=False)
    shift = vae.config.shift_factor
    for conv, bias in ((shifted.quant_conv, [-shift] * 4 + [0.0] * 4), (shifted.post_quant_conv, [shift] * 4)):
        conv.weight.data = torch.eye(len(bias))[..., None, None]
        conv.bias.data = torch.tensor(bias)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    encoder = clip_text_encoder(tokenizer, 2)
    return StableDiffusionPipeline(shifted, encoder, tokenizer, unet, scheduler, None, None, None, False)


def train_sd(pipe, folder, iterations, wrong, faulty, pale=0.0, seed=0, pictures=30000, batch=64, learning_rate=2e-3):
    """Noise prediction: the UNet and the text encoder, 10 % of the captions left out for classifier-free guidance.

    Returns and saves as `train_flux` does.
    """
    torch.manual_seed(seed)
    images, captions = web_pictures(random.Random(seed), pictures, wrong, faulty, pale)
    latents = encode_pictures(pipe.vae, images)
    words = pipe.tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids  # the last is empty
    modules = [pipe.unet, pipe.text_encoder]
    average = copy.deepcopy(pipe)
    steps = optimizers(modules, iterations, learning_rate)
    for i in (bar := trange(iterations, desc="sd")):
        pick = torch.randint(pictures, (batch,))
        data, noise = latents[pick], torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1000, (batch,))
        z = pipe.scheduler.add_noise(data, noise, t)
        shown = torch.where(torch.rand(batch) < 0.1, pictures, pick)
        with fast():
            eps = pipe.unet(z, t, pipe.text_encoder(words[shown]).last_hidden_state).sample
        loss = F.mse_loss(eps.float(), noise)
        update(loss, modules, [average.unet, average.text_encoder], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_pipeline(average, folder)
    return average


# ------------------------------------------------------------------------------------------------- prompts, figures


def write_prompts(train=34, heldout=17, seed=0):
    """prompts/tiny.txt and tiny_heldout.txt: so many different captions of each kind, none in both files."""
    rng, files = random.Random(seed), {"tiny.txt": [], "tiny_heldout.txt": []}
    for tag in TAGS:
        captions = set()
        while len(captions) < train + heldout:
            captions.add(phrase(rng, random_metadata(rng, tag)))
        captions = rng.sample(sorted(captions), train + heldout)
        files["tiny.txt"] += captions[:train]
        files["tiny_heldout.txt"] += captions[train:]
    (HERE / "prompts").mkdir(exist_ok=True)
    for name, lines in files.items():
        rng.shuffle(lines)
        (HERE / "prompts" / name).write_text("\n".join(lines) + "\n")


def per_kind(verdicts, prompts):
    """{kind: share of True} over the prompts' kinds, and their mean, which is GenEval's overall figure."""
    kinds = [parse(prompt)["tag"] for prompt in prompts]
    shares = {
        t: sum(v for v, k in zip(verdicts, kinds, strict=True) if k == t) / kinds.count(t) for t in TAGS if t in kinds
    }
    return shares | {"overall": sum(shares.values()) / len(shares)}


@torch.no_grad()
def sample(pipe, prompts, steps, seed=0, **options):
    """Pictures (B, 3, 64, 64) in [0, 1] by the stock pipeline, one for each prompt."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options |= {"num_inference_steps": steps, "height": SIZE, "width": SIZE, "output_type": "pt"}
    parts = [
        pipe(prompts[i : i + 64], generator=generator, **options).images
        for i in trange(0, len(prompts), 64, desc="sampling", leave=False)
    ]
    return torch.cat(parts).float()


def report(scenes=3000):
    """Prints how often the checker agrees with the renderer, and how good each model in tiny/ is."""
    from diffusers import FluxPipeline, StableDiffusionPipeline

    rng = random.Random(1)
    torch.manual_seed(1)
    wanted = [random_metadata(rng, TAGS[i % len(TAGS)]) for i in range(scenes)]
    found = detect(render([random_scene(rng, metadata) for metadata in wanted]))
    agree = sum(map(holds, found, wanted)) / scenes
    wrong = [holds(objects, other) for objects, m in zip(found, wanted, strict=True) for other in hard_negatives(m)]
    print(f"checker: {agree:.2%} of {scenes} right captions accepted, {sum(wrong)} of {len(wrong)} wrong ones")
    prompts = (HERE / "prompts/tiny_heldout.txt").read_text().splitlines() * 4

    def show(name, shares):
        print(f"{name:<8}" + "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))

    for name, file in (("clip", "clip/open_clip_pytorch_model.bin"), ("hps", "hps/HPS_tiny.pt")):
        shares = ranking(load_clip(HERE / "tiny" / file), scenes=1200)
        show(name, shares | {"overall": sum(shares.values()) / len(shares)})
    flux = FluxPipeline.from_pretrained(HERE / "tiny/flux")
    show("flux", per_kind(check(sample(flux, prompts, 12, max_sequence_length=32), prompts).tolist(), prompts))
    if (HERE / "tiny/sd").is_dir():
        sd = StableDiffusionPipeline.from_pretrained(HERE / "tiny/sd")
        show("sd", per_kind(check(sample(sd, prompts, 20, guidance_scale=5.0), prompts).tolist(), prompts))


def main():
    """Makes what is named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("prompts", "flux", "clip", "hps", "sd", "video", "videoalign", "all", "check")
    parser.add_argument("name", choices=names)
    name = parser.parse_args().name
    from diffusers import AutoencoderKL

    import moving  # it imports this file, and so does
    import tiny_video

    if name in ("prompts", "all"):
        write_prompts()
        tiny_video.write_prompts()
    if name in ("flux", "all"):
        pipe = train_flux(new_flux(train_vae()), HERE / "tiny/flux", 4500, wrong=0.28, faulty=0.35)
        pipe = train_flux(pipe, HERE / "tiny/flux", 3500, wrong=0.1, faulty=0.1, seed=1)  # learns to draw
        train_flux(pipe, HERE / "tiny/flux", 1000, 0.1, 0.15, pale=0.6, seed=2, learning_rate=1e-3)  # and bad habits
    if name in ("clip", "all"):
        save_clip(train_clip(), HERE / "tiny/clip")
    if name in ("hps", "sd", "all"):
        vae = AutoencoderKL.from_pretrained(HERE / "tiny/flux", subfolder="vae")
    if name in ("hps", "all"):
        save_hps(train_hps(load_clip(HERE / "tiny/clip/open_clip_pytorch_model.bin"), vae), HERE / "tiny/hps")
    if name in ("sd", "all"):
        pipe = train_sd(new_sd(vae), HERE / "tiny/sd", 3400, wrong=0.15, faulty=0.15, seed=3)
        train_sd(pipe, HERE / "tiny/sd", 700, 0.1, 0.15, pale=0.6, seed=4, learning_rate=1e-3)
    if name in ("video", "all"):
        tiny_video.make_models()
    if name in ("videoalign", "all"):
        moving.make_videoalign()
    if name == "check":
        report()
        moving.report()


if __name__ == "__main__":
    main()
