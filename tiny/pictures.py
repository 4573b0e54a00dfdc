"""The pictures of the tiny world: captions, a renderer, and a checker that reads the objects back from the pixels.

A scene is drawn for a caption of one of GenEval's six kinds: single_object, two_object, counting, colors, position,
color_attr. What the caption leaves open is random. The checker shares no code with the renderer.

B = images in a batch. Images are (B, 3, 64, 64) in [0, 1].
"""

import colorsys
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from evaluation.geneval import judge

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


SPOTS = {1: [(0.5, 0.5)], 2: [(0.27, 0.5), (0.73, 0.5)], 3: [(0.5, 0.27), (0.27, 0.73), (0.73, 0.73)]}
SPOTS[4] = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]


def composed_scene(rng, metadata):
    """Rows as of `random_scene`, composed as a careful illustrator would: the things have their spots, and one colour
    if the caption leaves it open. A small generator learns so narrow a range of layouts well in an hour."""
    wanted = [item for item in metadata["include"] for _ in range(item["count"])]
    spots = SPOTS[len(wanted)]
    relation = metadata["include"][-1].get("position")
    if relation is not None:  # include[1] stands in this relation to include[0]
        rx, ry = RELATIONS[relation[0]]
        spots = [(0.5 - 0.23 * rx, 0.5 - 0.23 * ry), (0.5 + 0.23 * rx, 0.5 + 0.23 * ry)]
    largest = {1: 15.0, 2: 12.0}.get(len(wanted), 10.5)
    color, rows = rng.choice(list(COLORS)), []
    for item, (x, y) in zip(wanted, spots, strict=True):
        rgb = COLORS[item.get("color", color)]
        place = [SIZE * v + rng.uniform(-2.5, 2.5) for v in (x, y)]
        rows.append([SHAPES.index(item["class"]), *(c + rng.uniform(-0.04, 0.04) for c in rgb), *place])
        rows[-1].append(rng.uniform(0.8, 1) * largest)
    return rows + [[-1.0] + [0.0] * 6] * (4 - len(rows))


def distances(dx, dy, radius):
    """Signed distances in pixels to the edge of each of SHAPES, by the offsets from its centre; negative inside."""
    ax, ay = dx.abs(), dy.abs()
    side, bar, tip = 0.9 * radius, 0.36 * radius, 1.15 * radius
    below = dy + 0.25 * tip  # the triangle hangs around its centroid, not the middle of its box
    return (
        torch.hypot(dx, dy) - radius,
        torch.maximum(ax - side, ay - side),
        torch.maximum(below, math.sqrt(0.75) * ax - 0.5 * below) - 0.5 * tip,
        torch.minimum(torch.maximum(ax - radius, ay - bar), torch.maximum(ax - bar, ay - radius)),
    )


def render(scenes, ragged=None, grain=20, second=None):
    """Scenes (B, 4, 7) → images (B, 3, 64, 64) in [0, 1]; ragged (B,) is the unevenness of the edges in pixels,
    and grain the number of bumps across the picture. second (B, 4, 3): in parts of a shape its colour is this one.

    Each shape is a signed distance in pixels, turned into a soft edge one pixel wide.
    """
    scenes = torch.as_tensor(scenes, dtype=torch.float32)
    B = len(scenes)
    grid = torch.arange(SIZE) + 0.5
    shape, rgb, radius = scenes[..., 0], scenes[..., 1:4, None, None], scenes[..., 6, None, None]
    if second is not None:  # about half of the area, in lumps or across a front
        size = (5, 9)[torch.randint(2, ()).item()]
        lumps = F.interpolate(torch.randn(B, 4, size, size), SIZE, mode="bicubic")
        rgb = torch.lerp(rgb, second[..., None, None], (0.5 + 1.5 * lumps).clamp(0, 1)[:, :, None])
    dx = grid[None, None, None, :] - scenes[..., 4, None, None]  # (B, 4, 1, 64)
    dy = grid[None, None, :, None] - scenes[..., 5, None, None]  # (B, 4, 64, 1)
    edges = distances(dx, dy, radius)
    unevenness = torch.zeros(B, 4, 1, 1)
    if ragged is not None:
        unevenness = F.interpolate(torch.randn(B, 4, grain, grain), SIZE, mode="bilinear") * ragged.view(B, 1, 1, 1)
    light = 0.86 + 0.10 * torch.rand(B, 1, 1, 1) + 0.015 * torch.randn(B, 3, 1, 1)
    slope = 0.03 * torch.randn(B, 2, 1, 1, 1) * torch.linspace(-1, 1, SIZE)
    images = (light + slope[:, 0] + slope[:, 1].transpose(-1, -2)).expand(B, 3, SIZE, SIZE)
    for k in range(4):
        distance = torch.full((B, SIZE, SIZE), 9.0)
        for i, candidate in enumerate(edges):
            distance = torch.where(shape[:, k, None, None] == i, candidate[:, k], distance)
        cover = (0.5 - distance - unevenness[:, k]).clamp(0, 1)[:, None]
        images = images * (1 - cover) + rgb[:, k] * cover
    return images.clamp(0, 1)


def patch_labels(rows):
    """(B, 64) what each 8x8 patch shows: 0 background, else 1 + shape and colour. A help for training only."""
    palette = torch.tensor(list(COLORS.values()))
    color = torch.cdist(rows[..., 1:4], palette).argmin(-1)
    kind = torch.where(rows[..., 0] >= 0, 1 + rows[..., 0].long() * len(COLORS) + color, 0)  # (B, 4)
    y, x = torch.meshgrid(torch.arange(4.0, SIZE, 8), torch.arange(4.0, SIZE, 8), indexing="ij")
    far = torch.maximum((rows[..., 4, None] - x.flatten()).abs(), (rows[..., 5, None] - y.flatten()).abs())
    return ((far < rows[..., 6, None] + 1) * kind[..., None]).amax(1)


def washed_out(rng, images, share):
    """The images (B, 3, H, W), of which a share has lost more than half of its contrast."""
    lost = torch.tensor([rng.uniform(0.55, 0.85) * (rng.random() < share) for _ in images])
    return torch.lerp(images, images.mean((2, 3), keepdim=True), lost.view(-1, 1, 1, 1))


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
    for planes in color_planes(images):
        objects = []
        for color, plane in zip(COLORS, planes, strict=True):
            labels, count = ndimage.label(plane.numpy(), structure=np.ones((3, 3)))  # 8 neighbours
            for mask in torch.from_numpy(labels) == torch.arange(1, count + 1).view(-1, 1, 1):
                if mask.sum() >= smallest:
                    name, box, area = read_object(mask)
                    objects.append({"class": name, "color": color, "box": box, "area": area})
        found.append(sorted(objects, key=lambda o: -o["area"]))
    return found


# ------------------------------------------------------------------------------------------------- verdicts


def scene_objects(rows):
    """The objects of a scene, in the form in which `detect` gives them."""
    objects = []
    for shape, *rgb, x, y, r in (row for row in rows if row[0] >= 0):
        color = min(COLORS, key=lambda name: math.dist(rgb, COLORS[name]))
        objects.append({"class": SHAPES[int(shape)], "color": color, "box": (x - r, y - r, x + r, y + r)})
    return objects


def findings(objects):
    """Objects {"class", "color", "box"}, the most prominent first, in the form of a GenEval detector.

    Returns {class: [(box, score, color)]}. The scores only keep the order. Objects of class None are left out.
    """
    found = {}
    for i, item in enumerate(objects):
        if item["class"] is not None:
            found.setdefault(item["class"], []).append((item["box"], 1 - 1e-4 * i, item["color"]))
    return found


def holds(objects, metadata):
    """GenEval's verdict (bool) on a list of objects {"class", "color", "box"}, the most prominent first."""
    return judge(findings(objects), metadata, lambda name, group: [color for *_, color in group])[0]


def right(images, prompts):
    """(B,) float, 1 or 0: does each image show what its prompt asks for? Judged from the pixels alone.

    images (B, 3, H, W) or (B, 1, 3, H, W) in [0, 1] of any size. Raises ValueError for a prompt of another world.
    """
    images = F.interpolate(images.detach().float().cpu().flatten(0, -4), (SIZE, SIZE), mode="bilinear")
    return torch.tensor([float(holds(o, parse(p))) for o, p in zip(detect(images), prompts, strict=True)])


def per_kind(verdicts, prompts):
    """{kind: mean verdict} over the prompts' kinds, and the mean of the kinds, which is GenEval's overall figure."""
    kinds = [parse(prompt)["tag"] for prompt in prompts]
    verdicts = torch.as_tensor(verdicts, dtype=torch.float32)
    shares = {tag: verdicts[[kind == tag for kind in kinds]].mean().item() for tag in TAGS if tag in kinds}
    return shares | {"overall": sum(shares.values()) / len(shares)}


class Detector:
    """The checker as a detector for GenEval's rules. The largest object has the highest score."""

    NOTE = "GenEval's six kinds of prompt with the tiny world's shapes, seen by its own checker."
    classes = frozenset(SHAPES)

    def metadata(self, prompt):
        """What a caption of the tiny world asks for, as GenEval metadata. Raises ValueError for any other prompt."""
        return parse(prompt)

    def __call__(self, picture):
        """(3, H, W) in [0, 1] → {class: [(box in pixels of 64x64, score, color)]}."""
        picture = F.interpolate(picture[None].float(), (SIZE, SIZE), mode="bilinear")
        return findings(detect(picture)[0])

    def colors(self, picture, name, objects):
        """The colour of each of the objects."""
        return [color for *_, color in objects]
