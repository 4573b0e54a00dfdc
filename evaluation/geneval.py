"""GenEval (2310.11513): does a picture show what its prompt asks for? Objects are detected, counted and compared.

Metadata are GenEval's: {"tag", "include": [{"class", "count", "color"?, "position"? = [relation, index]}], "exclude"?}.
The six tags are single_object, two_object, counting, colors, position, color_attr; the overall figure is the mean of
their shares of correct pictures.

A detector, see `find_detector`, is an object with these attributes; FILE.py:CLASS is called without arguments:

    classes                         set of the names of all classes that it can detect
    __call__(picture)               (3, H, W) in [0, 1] → {class: [Found]}
    colors(picture, name, objects)  the name of each object's colour; `objects` are some of those found for class `name`
    NOTE                            one line for the report: what a reader must know about the figures
    metadata(prompt)                optional: GenEval's metadata for a prompt; raises ValueError where it has none
    sources, load(device)           optional: hub ids or folders of the weights; loads them, before the first picture

Legend: H and W the size of a picture in pixels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import rewards
from runtime import loading
from runtime.options import Lazy, RunError, require

TF, transformers = Lazy("torchvision.transforms.functional"), Lazy("transformers")
MASK2FORMER, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
OTHER_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}  # COCO's: GenEval's
OTHER_NAMES |= {"motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv"}  # mmdet's: its
OTHER_NAMES |= {"pottedplant": "potted plant", "diningtable": "dining table"}
# A detected object: box (left, top, right, bottom) in pixels, y downwards; score in [0, 1]; anything `colors` needs.
Found = tuple[Sequence[float], float, object]


# ---------------------------------------------------------------------------------------------------------- the rules


def judge(found: dict[str, list[Found]], metadata: dict, colors: Callable) -> tuple[bool, str]:
    """Does a picture with these objects show everything that the metadata ask for? Returns (verdict, what is wrong).

    found    {class: objects in any order}
    colors   (class, objects) → the name of each object's colour; called only where a colour is asked for
    Only objects with a score above 0.3 (counting: 0.9) count, at most 16 of a class. Colour and position are checked
    for as many of them as the prompt asks for: those with the highest scores.
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
    """The relations in which box a stands to box b; boxes are (left, top, right, bottom), y downwards.

    The offset between the centres is first reduced, along each axis, by a tenth of both sizes. A direction counts if
    its reduced offset is more than half of the distance between the centres.
    """
    a, b = np.reshape(a, (2, 2)).astype(float), np.reshape(b, (2, 2)).astype(float)  # two corners, each (x, y)
    offset = a.mean(0) - b.mean(0)
    reduced = np.maximum(np.abs(offset) - 0.1 * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0) * np.sign(offset)
    if (np.abs(reduced) < 1e-3).all():
        return set()
    x, y = reduced / np.linalg.norm(offset)
    return {name for name, part in zip(RELATIONS, (-x, x, -y, y), strict=True) if part > 0.5}


class GenEvalReward:
    """The reward `geneval`: 1.0 if a picture shows everything that its prompt asks for, else 0.0.

    path: what `find_detector` takes; metadata: {prompt: GenEval's metadata}, for prompts that the detector's own
    `metadata` cannot read.
    """

    name = "geneval"

    def __init__(self, path: str | None = None, device="cpu", metadata: Mapping[str, dict] | None = None):
        self.detector, self.metadata, self.device = find_detector(path, device=device), metadata or {}, device
        self.networks = torch.nn.ModuleList(x for x in vars(self.detector).values() if isinstance(x, torch.nn.Module))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, 0.0 or 1.0."""
        verdicts = []
        for image, prompt in zip(images, prompts, strict=True):
            metadata = find_metadata(prompt, self.metadata.get(prompt, {}), self.detector)
            verdicts.append(judge(self.detector(image), metadata, partial(self.detector.colors, image))[0])
        return torch.tensor(verdicts, dtype=torch.float32, device=self.device)

    @staticmethod
    def check(path: str | None, video: bool, prompts: Sequence[str], metadata: Mapping[str, dict] | None) -> None:
        """Raise an error of one line if it could not score these prompts."""
        require(not video, "reward geneval judges images; for video take vq, mq or ta")
        detector = find_detector(path)
        for prompt in prompts:
            find_metadata(prompt, (metadata or {}).get(prompt, {}), detector)

    @staticmethod
    def fetch(path: str | None, clip: str = CLIP) -> None:
        """Fetch the files of a detector from the hub, where the cache lacks them."""
        for source in getattr(find_detector(path, clip), "sources", ()):
            loading.find_folder(source, "GenEval's detector", pipeline=False)


def find_metadata(prompt: str, row: dict, detector) -> dict:
    """GenEval's metadata for a prompt: those in the row if it has some, else the detector's own.

    Raises RunError if there are none, if a field is missing or wrong, or if the detector does not know a class.
    """
    where = f"GenEval cannot judge the prompt {prompt!r}"
    if "include" not in row and hasattr(detector, "metadata"):
        try:
            row = detector.metadata(prompt)
        except ValueError as e:
            raise RunError(f"{where}: {rewards.first_line(e)}") from e
    try:
        things = [*row["include"], *row.get("exclude", ())]
        places = [(i, *thing["position"]) for i, thing in enumerate(row["include"]) if "position" in thing]
        fine = isinstance(row["tag"], str) and len(row["include"]) > 0 and all(x["count"] >= 1 for x in things)
        fine = fine and all(relation in RELATIONS and 0 <= target < i for i, relation, target in places)
        unknown = {x["class"] for x in things} - detector.classes
    except (KeyError, TypeError, ValueError, AttributeError):
        fine, unknown = False, ()
    require(fine, f"{where}: it lacks GenEval's tag, include and exclude; take a JSONL file that has them")
    require(not unknown, f"{where}: the detector does not know {', '.join(map(str, unknown))}")
    return row


# ------------------------------------------------------------------------------------------------------ the detectors


def find_detector(name: str | None, clip: str = CLIP, device=None):
    """The detector of this name, with its weights on `device`, or not loaded yet if that is None.

    name     hub id or folder of a Mask2Former, or FILE.py:CLASS; None: the usual Mask2Former
    clip     hub id or folder of the CLIPModel that names colours for Mask2Former
    Raises RunError or RewardError, one line, if there is no such thing or it is no detector.
    """
    name = name or MASK2FORMER
    if re.search(r"\.py(:|$)", name):
        detector = rewards.load_object(name)()
        lacks = [part for part in ("classes", "__call__", "colors", "NOTE") if not hasattr(detector, part)]
        require(not lacks, f"{name} is no detector: it lacks {', '.join(lacks)}")
    else:
        loading.check_path("--detector", name)
        loading.check_path("--detector-clip", clip)
        detector = Mask2FormerDetector(name, clip)
    if device and hasattr(detector, "load"):
        detector.load(device)
    return detector


class Mask2FormerDetector:
    """Mask2Former, with the boxes of its masks, and CLIP for colours. GenEval's was trained with mmdetection."""

    NOTE = "GenEval with transformers' Mask2Former, not the official one (mmdet): another training, so figures differ."
    SHORTEST, LONGEST = 800, 1333  # sides in pixels, of the picture that the network sees
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    GRAY = 0x99 / 255  # replaces what is not the object

    def __init__(self, path: str, clip_path: str):
        self.sources = path, clip_path
        try:
            folder = loading.find_folder(path, "--detector", pipeline=False, weights=False)
            names = transformers.Mask2FormerConfig.from_json_file(folder / "config.json").id2label
        except rewards.FILE_ERRORS as e:
            raise RunError(f"--detector: cannot read the config of {path}: {rewards.first_line(e)}") from e
        self.labels = [OTHER_NAMES.get(names[i], names[i]) for i in range(len(names))]
        self.classes = set(self.labels)

    def load(self, device) -> None:
        self.device = device
        try:
            path, clip_path = (loading.find_folder(x, "GenEval's detector", pipeline=False) for x in self.sources)
            self.model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(path).to(device).eval()
            self.clip = transformers.CLIPModel.from_pretrained(clip_path).to(device).eval()
            self.tokenizer = rewards.load_tokenizer(clip_path, "CLIPTokenizer")
        except rewards.FILE_ERRORS as e:
            raise RunError(f"cannot load GenEval's {' with '.join(self.sources)}: {rewards.first_line(e)}") from e

    @torch.no_grad()
    def __call__(self, picture: Tensor) -> dict[str, list[Found]]:
        """(3, H, W) in [0, 1] → objects; the third field of each is its mask (H, W) bool."""
        height, width = picture.shape[-2:]
        zoom = min(self.SHORTEST / min(height, width), self.LONGEST / max(height, width))
        size = [max(1, round(side * zoom / 32)) * 32 for side in (height, width)]  # 32: the network's largest stride
        pixels = F.interpolate(picture[None].to(self.device), size, mode="bilinear", antialias=True)
        out = self.model(pixel_values=TF.normalize(pixels, self.MEAN, self.STD))
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
        """The colour of each object: the most similar of ten by CLIP, which sees the object cut out on grey."""
        picture, size = picture.to(self.device), self.clip.config.vision_config.image_size
        crops = []
        for (left, top, right, bottom), _, inside in objects:
            crop = torch.where(inside, picture, torch.full_like(picture, self.GRAY))[:, top:bottom, left:right]
            crops.append(rewards.resize(crop[None], size, "shortest"))
        text = [template.format(color, name) for color in COLORS for template in self.TEMPLATES]
        tokens = self.tokenizer(text, padding=True, return_tensors="pt").to(self.device)
        out = self.clip(pixel_values=TF.normalize(torch.cat(crops), rewards.CLIP_MEAN, rewards.CLIP_STD), **tokens)
        colors = F.normalize(out.text_embeds.view(len(COLORS), len(self.TEMPLATES), -1).mean(1), dim=-1)
        return [COLORS[i] for i in (out.image_embeds @ colors.T).argmax(1).tolist()]


rewards.register(GenEvalReward)
