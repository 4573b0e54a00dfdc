"""GenEval (2310.11513): does a picture show what its prompt asks for? Objects are found, then counted and compared.

    found = detector(picture)                                            # {class: [(box, score, what colors needs)]}
    judge(found, metadata, lambda name, objects: detector.colors(picture, name, objects))     # (verdict, what is wrong)

Metadata are GenEval's: {"tag", "include": [{"class", "count", "color"?, "position"? = [relation, index]}], "exclude"?}.
The six tags are single_object, two_object, counting, colors, position, color_attr; the overall figure is the mean of
their shares of right pictures. Detectors: Mask2Former on COCO's 80 classes, or the tiny world's own checker.

Legend: H and W the size of a picture in pixels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewards import CLIP_MEAN, CLIP_STD, first_line, normalise, resize_shortest_and_crop
from runtime import cli, data, output

PROMPTS_URL = (
    "https://raw.githubusercontent.com/djghosh13/geneval/d927da8e42fde2b1b5cd743da4df5ff83c1654ff/"
    "prompts/evaluation_metadata.jsonl"
)
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# An object that a detector found: box (left, top, right, bottom) in pixels, score, and what its `colors` needs to see.
Found = tuple[Sequence[float], float, object]


# ---------------------------------------------------------------------------------------------------------- the rules


def judge(found: dict[str, list[Found]], metadata: dict, colors: Callable) -> tuple[bool, str]:
    """Is everything there that the prompt asks for? And if not, what is wrong.

    found    {class: objects in any order}
    colors   (class, objects) → the name of each one's colour; only called where a colour is asked for
    Looked at are only objects with a score above 0.3 (counting: 0.9), at most 16 of a class; and of these, for colour
    and position, as many as the prompt asks for: those with the highest scores.
    """
    least = 0.9 if metadata["tag"] == "counting" else 0.3
    objects = {}
    for name, candidates in found.items():
        order = np.argsort([-score for _, score, _ in candidates], kind="stable")
        objects[name] = [candidates[i] for i in order if candidates[i][1] > least][:16]
    groups, wrong = [], []
    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        group = objects.get(name, [])[:count]
        groups.append(group)
        if len(group) < count:
            wrong.append(f"{len(group)} {name}, not {count}")
            continue
        if "color" in wanted and (others := [color for color in colors(name, group) if color != wanted["color"]]):
            wrong.append(f"{others[0]} {name}, not {wanted['color']}")
        if "position" in wanted:
            relation, target = wanted["position"]
            if any(relation not in relations(a[0], b[0]) for a in group for b in groups[target]):
                wrong.append(f"{name} not {relation} {metadata['include'][target]['class']}")
    for unwanted in metadata.get("exclude", ()):
        if len(objects.get(unwanted["class"], ())) >= unwanted["count"]:
            wrong.append(f"{len(objects[unwanted['class']])} {unwanted['class']}, {unwanted['count']} are too many")
    return not wrong, "; ".join(wrong)


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """How box a stands to box b: a direction counts if it makes up more than half of the way between the centres.

    From the way along each axis a tenth of both sizes is taken off first: boxes that overlap much stand in none.
    """
    a, b = np.reshape(a, (2, 2)).astype(float), np.reshape(b, (2, 2)).astype(float)  # two corners, each (x, y)
    way = a.mean(0) - b.mean(0)
    rest = np.maximum(np.abs(way) - 0.1 * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0) * np.sign(way)
    if (np.abs(rest) < 1e-3).all():
        return set()
    x, y = rest / np.linalg.norm(way)
    return {name for name, part in zip(RELATIONS, (-x, x, -y, y), strict=True) if part > 0.5}


# --------------------------------------------------------------------------------------------------------- the prompts


def fetch_prompts() -> Path:
    """evaluation_metadata.jsonl, 553 lines, fetched once and kept in the hub's cache folder."""
    from huggingface_hub import constants

    path = Path(constants.HF_HOME) / "dancegrpo" / "geneval.jsonl"
    if not path.is_file():
        try:
            text = data.fetch_text(PROMPTS_URL)
        except OSError as e:
            raise cli.RunError(f"cannot fetch {PROMPTS_URL}; download it and give --prompts its path") from e
        path.parent.mkdir(parents=True, exist_ok=True)
        output.write_atomically(path, text)
    return path


def check_metadata(row: dict, classes: set[str], where: str) -> None:
    """Raise RunError unless the row has GenEval's fields and asks for nothing but these classes."""
    try:
        things = [*row["include"], *row.get("exclude", ())]
        fine = isinstance(row["tag"], str) and len(row["include"]) > 0 and all(x["count"] >= 1 for x in things)
        for i, wanted in enumerate(row["include"]):
            relation, target = wanted.get("position", (RELATIONS[0], 0))
            fine &= relation in RELATIONS and (0 <= target < i or "position" not in wanted)
        unknown = {x["class"] for x in things} - classes
    except (KeyError, TypeError, ValueError, AttributeError):
        fine, unknown = False, ()
    cli.require(fine, f"{where} lacks GenEval's tag, include and exclude; take --prompts geneval, or leave it out")
    cli.require(not unknown, f"{where}: the detector does not know {', '.join(map(str, unknown))}")


# ------------------------------------------------------------------------------------------------------- the detectors


class Mask2FormerDetector:
    """Mask2Former, with boxes that are those of its masks, and CLIP for colours, as in the original.

    The original runs the same network in mmdetection 2, with other roundings: single verdicts can differ.
    """

    NOTE = "GenEval with transformers' Mask2Former: figures can differ a little from the official detector's (mmdet)."
    SHORTEST, LONGEST = 800, 1333  # sides in pixels, of the picture that the network sees
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    GRAY = 0x99 / 255  # stands where the object is not

    def __init__(self, path: str, clip_path: str, device):
        from transformers import CLIPModel, CLIPTokenizer, Mask2FormerForUniversalSegmentation

        self.labels, self.device = coco_labels(path), device
        try:
            self.model = Mask2FormerForUniversalSegmentation.from_pretrained(path).to(device).eval()
            self.clip = CLIPModel.from_pretrained(clip_path).to(device).eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(clip_path)
        except (OSError, ValueError) as e:
            raise cli.RunError(f"cannot load GenEval's {path} with {clip_path}: {first_line(e)}") from e

    @torch.no_grad()
    def __call__(self, picture: Tensor) -> dict[str, list[Found]]:
        """(3, H, W) in [0, 1] → objects; the third field of each is its mask (H, W) bool."""
        height, width = picture.shape[-2:]
        zoom = min(self.SHORTEST / min(height, width), self.LONGEST / max(height, width))
        size = [max(1, round(side * zoom / 32)) * 32 for side in (height, width)]  # 32: the network's largest stride
        pixels = F.interpolate(picture[None].to(self.device), size, mode="bilinear", antialias=True)
        out = self.model(pixel_values=normalise(pixels, self.MEAN, self.STD))
        probability = out.class_queries_logits[0].softmax(-1)[:, :-1]  # (queries, classes); the last is "nothing"
        top, index = probability.flatten().topk(min(100, probability.numel()))
        masks = F.interpolate(out.masks_queries_logits, (height, width), mode="bilinear")[0]  # (queries, H, W)
        found = {}
        for score, i in zip(top.tolist(), index.tolist(), strict=True):
            query, label = divmod(i, probability.shape[1])
            inside = masks[query] > 0
            if inside.any():
                score *= masks[query][inside].sigmoid().mean().item()
                (upper, left), (lower, right) = inside.nonzero().amin(0).tolist(), inside.nonzero().amax(0).tolist()
                box = (left, upper, right + 1, lower + 1)
                found.setdefault(self.labels[label], []).append((box, score, inside))
        return found

    @torch.no_grad()
    def colors(self, picture: Tensor, name: str, objects: list[Found]) -> list[str]:
        """The colour of each object: the one of ten that CLIP finds most like it, cut out and put on grey."""
        picture, size = picture.to(self.device), self.clip.config.vision_config.image_size
        crops = []
        for (left, top, right, bottom), _, inside in objects:
            crop = torch.where(inside, picture, torch.full_like(picture, self.GRAY))[:, top:bottom, left:right]
            crops.append(resize_shortest_and_crop(crop[None], size))
        text = [template.format(color, name) for color in COLORS for template in self.TEMPLATES]
        tokens = self.tokenizer(text, padding=True, return_tensors="pt").to(self.device)
        out = self.clip(pixel_values=normalise(torch.cat(crops), CLIP_MEAN, CLIP_STD), **tokens)
        colors = F.normalize(out.text_embeds.view(len(COLORS), len(self.TEMPLATES), -1).mean(1), dim=-1)
        return [COLORS[i] for i in (out.image_embeds @ colors.T).argmax(1).tolist()]


class TinyDetector:
    """The tiny world's checker as a detector. It is sure of what it sees, so the largest goes for the surest."""

    NOTE = "GenEval's six kinds of prompt with the tiny world's shapes, seen by its own checker."

    def __init__(self):
        import tiny

        self.tiny = tiny

    def metadata(self, prompt: str) -> dict:
        """What a caption of the tiny world asks for."""
        try:
            return self.tiny.parse(prompt)
        except ValueError as e:
            raise cli.RunError(f"--detector tiny: {e}") from e

    def __call__(self, picture: Tensor) -> dict[str, list[Found]]:
        found = {}
        for i, thing in enumerate(self.tiny.detect(picture[None])[0]):  # the largest first
            if thing["class"] is not None:
                found.setdefault(thing["class"], []).append((thing["box"], 1 - 1e-4 * i, thing["color"]))
        return found

    def colors(self, picture: Tensor, name: str, objects: list[Found]) -> list[str]:
        return [color for _, _, color in objects]


def detector_classes(path: str) -> set[str]:
    """What a detector can find, without loading its weights."""
    return set(TinyDetector().tiny.SHAPES if path == "tiny" else coco_labels(path))


def coco_labels(path: str) -> list[str]:
    """The classes of a Mask2Former folder or hub id, in its order, by GenEval's names."""
    from transformers import Mask2FormerConfig

    try:
        names = Mask2FormerConfig.from_pretrained(path).id2label
    except (OSError, ValueError) as e:
        raise cli.RunError(f"--detector: cannot read the config of {path}: {first_line(e)}") from e
    other = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
    return [other.get(names[i], names[i]) for i in range(len(names))]
