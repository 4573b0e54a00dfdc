"""The reward: tensors in, tensor out. No file, no JPEG or mp4 round trip, one batched forward pass per call.

    reward = load_reward("hps:0.7,clip:1.4", paths={"hps": "tiny/hps", "clip": "tiny/clip"})
    scores = reward(images, prompts)          # {"hps": (B,), "clip": (B,)}
    reward.weights                            # {"hps": 0.7, "clip": 1.4}

A score that is not a number stops the run: it never becomes a made-up number that would shift its whole group.
Scores of several rewards are not added here. Each is first normalised within its group (DanceGRPO, Algorithm 1).

Legend: B images, H and W their size in pixels.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HPS_HUB_ID, HPS_HUB_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
CLIP_HUB_ID = "apple/DFN5B-CLIP-ViT-H-14-378"


class RewardError(ValueError):
    """A reward that cannot be loaded, was called wrongly, or gave no number. Its message is one line for the user."""


# ---------------------------------------------------------------------------------------------------- image rewards


class HPSReward:
    """Human preference score v2.1 (2306.09341): the cosine of CLIP features fine-tuned on human choices.

    path: a hub id, or a folder with one `*.pt` in HPS's layout ({"state_dict": …}) and, unless the model is
    ViT-H-14, one open_clip model config `*.json`. Typical scores on real images: 0.2 to 0.4.
    Images are resized by their longest side and padded with black to a square, as the authors do; open_clip's own
    resize-and-crop shifts the score by some hundredths on wide images.
    """

    def __init__(self, path: str = HPS_HUB_ID, device="cpu"):
        import open_clip

        weights, config = _one_file(path, "*.pt", HPS_HUB_FILE), None
        if Path(path).is_dir():
            config = _one_file(path, "*.json", optional=True)
        config = json.loads(Path(config).read_text()) if config else open_clip.get_model_config("ViT-H-14")
        self.model = open_clip.CLIP(**{k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")})
        state_dict = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
        try:
            self.model.load_state_dict(state_dict)
        except RuntimeError as e:
            raise RewardError(f"hps: {weights} does not fit its model config: {_first_line(e)}") from e
        self.model.to(device).float().eval().requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.size = config["vision_cfg"]["image_size"]
        self.mean, self.std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, a cosine."""
        _check_images("hps", images, prompts)
        pixels = _normalise(resize_longest_and_pad(images.to(self.device).float(), self.size), self.mean, self.std)
        return _clip_cosine(self.model, pixels, self.tokenizer(list(prompts)).to(self.device))


class CLIPReward:
    """CLIP score: the cosine of image and text features, by default of DFN5B's ViT-H-14 at 378 px (2309.17425).

    path: a hub id, or a folder, in open_clip's layout (open_clip_config.json and weights). Sizes, colour statistics
    and the way to resize are the model's own; DFN5B squashes to a square. Typical scores on real images: 0.3 to 0.4.
    """

    def __init__(self, path: str = CLIP_HUB_ID, device="cpu"):
        import open_clip

        name = f"local-dir:{path}" if Path(path).is_dir() else f"hf-hub:{path}"
        try:
            self.model = open_clip.create_model(name, device=device, require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as e:
            raise RewardError(_not_loadable("clip", path, "an open_clip model folder", e)) from e
        self.model.float().eval().requires_grad_(False)
        self.preprocess = self.model.visual.preprocess_cfg
        if self.preprocess["resize_mode"] not in ("squash", "shortest"):
            raise RewardError(
                f"clip: {path} wants resize_mode {self.preprocess['resize_mode']!r}; known: squash, shortest"
            )
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, a cosine (not multiplied by 100)."""
        _check_images("clip", images, prompts)
        resize = {"squash": resize_squash, "shortest": resize_shortest_and_crop}[self.preprocess["resize_mode"]]
        size = self.preprocess["size"]
        size = size if isinstance(size, int) else size[0]
        pixels = resize(images.to(self.device).float(), size)
        pixels = _normalise(pixels, self.preprocess["mean"], self.preprocess["std"])
        return _clip_cosine(self.model, pixels, self.tokenizer(list(prompts)).to(self.device))


def resize_longest_and_pad(images: Tensor, size: int) -> Tensor:
    """Longest side to `size` (bicubic, antialiased), then black to a square. (B, 3, H, W) → (B, 3, size, size)."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    images = _resize(images, height, width)
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


def resize_squash(images: Tensor, size: int) -> Tensor:
    """Both sides to `size`, whatever the aspect ratio. (B, 3, H, W) → (B, 3, size, size)."""
    return _resize(images, size, size)


def resize_shortest_and_crop(images: Tensor, size: int) -> Tensor:
    """Shortest side to `size`, then the centre square. (B, 3, H, W) → (B, 3, size, size)."""
    height, width = images.shape[-2:]
    scale = size / min(height, width)
    height, width = round(height * scale), round(width * scale)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resize(images, height, width)[..., top : top + size, left : left + size]


def _resize(images: Tensor, height: int, width: int) -> Tensor:
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return (images - mean) / std


@torch.no_grad()
def _clip_cosine(model, pixels: Tensor, tokens: Tensor) -> Tensor:
    # Float32 whatever the caller's autocast: with bf16 weights the score is 5e-4 off, as much as a group's spread.
    with torch.autocast(pixels.device.type, enabled=False):
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokens, normalize=True)
    return (image * text).sum(-1)


# -------------------------------------------------------------------------------------- from a spec to one callable

LOADERS: dict[str, Callable] = {"hps": HPSReward, "clip": CLIPReward}


@dataclass(frozen=True)
class Term:
    """One term of a reward spec: `name[@threshold][:weight]`."""

    name: str
    threshold: float | None
    weight: float


def parse_spec(spec: str) -> list[Term]:
    """ "hps:0.7,clip@0.39" → terms. Raises RewardError on an unknown name, a bad number or a name given twice."""
    terms = []
    for part in spec.split(","):
        match = re.fullmatch(r"(\w+)(?:@([^:@]+))?(?::([^:@]+))?", part.strip())
        if not match or match[1] not in LOADERS:
            raise RewardError(
                f"unknown reward {part.strip()!r}; write NAME[@THRESHOLD][:WEIGHT], NAME one of {', '.join(LOADERS)}"
            )
        try:
            threshold, weight = match[2] and float(match[2]), float(match[3] or 1.0)
        except ValueError:
            raise RewardError(f"reward {part.strip()!r}: threshold and weight must be numbers") from None
        if match[1] in [term.name for term in terms]:
            raise RewardError(f"reward {match[1]!r} is given twice in {spec!r}; give each once")
        terms.append(Term(match[1], threshold, weight))
    return terms


def parse_paths(text: str) -> dict[str, str]:
    """ "hps=DIR,clip=DIR" → {"hps": DIR, "clip": DIR}. Raises RewardError on an unknown name or a missing `=`."""
    paths = dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())
    for name, path in paths.items():
        if name not in LOADERS or not path:
            raise RewardError(f"reward path {name}={path}: write NAME=DIR, NAME one of {', '.join(LOADERS)}")
    return paths


class Reward:
    """Several rewards behind one call. `weights` are for the advantages, the scores come back as they are."""

    def __init__(self, terms: list[Term], scorers: dict[str, Callable]):
        self.terms, self.scorers = terms, scorers
        self.weights = {term.name: term.weight for term in terms}

    def __call__(self, images: Tensor, prompts: Sequence[str], fps: float | None = None) -> dict[str, Tensor]:
        """images (B, 3, H, W) in [0, 1], B prompts → {name: (B,) float32}; with a threshold 1.0 above it, else 0.0."""
        scores = {}
        for term in self.terms:
            raw = self.scorers[term.name](images, prompts).float()
            for prompt, value in zip(prompts, raw.tolist(), strict=True):
                if value != value or value in (float("inf"), float("-inf")):
                    raise RewardError(f"reward {term.name} gave {value} for the prompt {prompt!r}; the run stops here")
            scores[term.name] = raw if term.threshold is None else (raw > term.threshold).float()
        return scores


def load_reward(spec: str, paths: dict[str, str] | None = None, device="cpu") -> Reward:
    """Load every reward that `spec` names: comma-separated NAME[@THRESHOLD][:WEIGHT].

    hps@0.28 is the paper's binary reward (section 3.2). paths: {name: folder or hub id}, where not the default.
    Raises RewardError, before anything is loaded, if the spec or a path is wrong.
    """
    terms, paths = parse_spec(spec), paths or {}
    for name, path in paths.items():
        if name not in LOADERS:
            raise RewardError(f"a path is given for {name!r}, which is no reward; known: {', '.join(LOADERS)}")
        check_path(name, path)
    scorers = {}
    for term in terms:
        arguments = {"path": paths[term.name]} if term.name in paths else {}
        scorers[term.name] = LOADERS[term.name](**arguments, device=device)
    return Reward(terms, scorers)


# ------------------------------------------------------------------------------------------------------ small helpers


def check_path(name: str, path: str) -> None:
    """Raise RewardError if `path` can be neither a local folder nor a hub id (OWNER/NAME)."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.is_dir()
    if not Path(path).is_dir() and not is_hub_id:
        raise RewardError(f"{name}: no folder {path!r} here; give a folder with the weights, or a hub id (OWNER/NAME)")


def _one_file(path: str, pattern: str, hub_file: str | None = None, optional: bool = False) -> str | None:
    """The only file of a local folder that fits the pattern, or a named file fetched from the hub (and cached)."""
    if Path(path).is_dir():
        files = sorted(Path(path).glob(pattern))
        if len(files) == 1 or (optional and not files):
            return str(files[0]) if files else None
        raise RewardError(f"{path} must hold exactly one {pattern}, it holds {len(files)}")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(path, hub_file)
    except OSError as e:  # every error of the hub's own is one
        raise RewardError(_not_loadable("hps", path, f"{hub_file} (hub: {HPS_HUB_ID})", e)) from e


def _not_loadable(name: str, path: str, what: str, error: Exception) -> str:
    return (
        f"{name}: could not load {path!r} ({type(error).__name__}: {_first_line(error)}); "
        f"download {what} into a folder and pass --reward-paths {name}=FOLDER"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _check_images(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    if images.dim() != 4 or images.shape[1] != 3:
        raise RewardError(f"{name}: images must be (B, 3, H, W), got {tuple(images.shape)}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        raise RewardError(f"{name}: one prompt per image, got {len(images)} images and prompts {prompts!r:.80}")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):  # also catches NaN
        bad = [p for p, image in zip(prompts, images, strict=True) if not (image.min() >= 0 and image.max() <= 1)]
        raise RewardError(f"{name}: pixels must be in [0, 1], found {low:.3g} to {high:.3g} for the prompt {bad[0]!r}")
