"""The reward: tensors in, tensor out. No file, no JPEG or mp4 round trip, one batched forward pass per call.

    reward = load_reward("hps:0.7,clip:1.4", paths={"hps": "tiny/hps", "clip": "tiny/clip"})
    scores = reward(images, prompts)          # {"hps": (B,), "clip": (B,)}
    reward.weights                            # {"hps": 0.7, "clip": 1.4}
    load_reward("vq,mq:2")(videos, prompts, fps=8)   # {"vq": (B,), "mq": (B,)}, from one forward pass

A score that is not a number stops the run: it never becomes a made-up number that would shift its whole group.
Scores of several rewards are not added here. Each is first normalised within its group (DanceGRPO, Algorithm 1).

Legend: B images or videos, F frames, H and W their size in pixels, L tokens.
"""

import ast
import hashlib
import json
import math
import os
import re
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HPS_HUB_ID, HPS_HUB_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
CLIP_HUB_ID = "apple/DFN5B-CLIP-ViT-H-14-378"
PICKSCORE_HUB_ID, PICKSCORE_TOKENIZER = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIDEOALIGN_HUB_ID, VIDEOALIGN_HUB_FILE = "KlingTeam/VideoReward", "checkpoint-11352/model.pth"
VIDEOALIGN_BASE = "Qwen/Qwen2-VL-2B-Instruct"  # its config and tokenizer
# The authors' prompt is part of the model: with another text the scores mean nothing.
TEMPLATE_URL = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/219ab9db64c045e5181a2202d11f686439351292/prompt_template.py"
)
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FRAMES_SCORED = 8  # of a video, by a reward for images


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
            raise RewardError(f"hps: {weights} does not fit its model config: {first_line(e)}") from e
        self.model.to(device).float().eval().requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.size = config["vision_cfg"]["image_size"]
        self.mean, self.std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, a cosine."""
        _check_images("hps", images, prompts)
        pixels = normalise(resize_longest_and_pad(images.to(self.device).float(), self.size), self.mean, self.std)
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
        pixels = normalise(pixels, self.preprocess["mean"], self.preprocess["std"])
        return _clip_cosine(self.model, pixels, self.tokenizer(list(prompts)).to(self.device))


class PickScoreReward:
    """PickScore (2305.01569): the cosine of CLIP features fine-tuned on the choices of Pick-a-Pic's users.

    path: a hub id, or a folder, in transformers' CLIPModel layout; a folder holds the tokenizer too, on the hub it is
    the one of the model's origin. Typical scores on real images: 0.2 (the authors' code multiplies by about 100).
    """

    def __init__(self, path: str = PICKSCORE_HUB_ID, device="cpu"):
        from transformers import CLIPModel, CLIPTokenizer

        try:
            self.model, info = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
            self.tokenizer = CLIPTokenizer.from_pretrained(path if Path(path).is_dir() else PICKSCORE_TOKENIZER)
        except (OSError, RuntimeError, ValueError) as e:
            raise RewardError(_not_loadable("pickscore", path, "a CLIPModel folder with its tokenizer", e)) from e
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:  # transformers would fill in random weights
            raise RewardError(
                f"pickscore: {path} does not fit its config: {len(missing)} weights missing, {len(unexpected)} "
                f"unexpected, first of them: {[*missing, *unexpected][0]}"
            )
        self.model.to(device).eval().requires_grad_(False)
        self.size = self.model.config.vision_config.image_size
        self.length = self.model.config.text_config.max_position_embeddings
        self.device = device

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, a cosine (not multiplied by 100)."""
        _check_images("pickscore", images, prompts)
        pixels = resize_shortest_and_crop(images.to(self.device).float(), self.size)
        pixels = normalise(pixels, CLIP_MEAN, CLIP_STD)
        text = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self.device)
        with torch.autocast(pixels.device.type, enabled=False):
            out = self.model(pixel_values=pixels, **text)
        return (out.image_embeds * out.text_embeds).sum(-1)  # image i with prompt i, and with no other


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


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    mean, std = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (mean, std))
    return (images - mean) / std


@torch.no_grad()
def _clip_cosine(model, pixels: Tensor, tokens: Tensor) -> Tensor:
    # Float32 whatever the caller's autocast: with bf16 weights the score is 5e-4 off, as much as a group's spread.
    with torch.autocast(pixels.device.type, enabled=False):
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokens, normalize=True)
    return (image * text).sum(-1)


# ---------------------------------------------------------------------------------------------------- video rewards


class VideoAlignReward:
    """VideoAlign (2501.13918): visual quality, motion quality and text alignment, judged by a vision-language model.

    Qwen2-VL reads video and prompt; a linear head on the hidden states of three extra tokens gives the three scores.
    path: a hub id, or a folder with `model.pth` in the released layout (a PEFT state dict), `config.json` and tokenizer
    of its Qwen2-VL, and `prompt_template.txt`. The template must have the released one's hash, or the one which the
    folder's config.json names as "prompt_template_sha256". Float32 on a CPU, bfloat16 on a GPU, as released.
    """

    NAMES = ("vq", "mq", "ta")
    MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of the released model's raw scores
    LORA_SCALE = 2.0  # alpha / rank

    def __init__(self, path: str = VIDEOALIGN_HUB_ID, device="cpu"):
        from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

        weights = _one_file(path, "model.pth", VIDEOALIGN_HUB_FILE, name="videoalign")
        base = path if Path(path).is_dir() else VIDEOALIGN_BASE
        try:
            config = Qwen2VLConfig.from_pretrained(base)
            self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
        except (OSError, ValueError) as e:
            raise RewardError(_not_loadable("videoalign", base, "config.json and the tokenizer", e)) from e
        self.template = load_template(path, getattr(config, "prompt_template_sha256", TEMPLATE_SHA256))
        reward_tokens = [f"<|{name.upper()}_reward|>" for name in self.NAMES]
        self.tokenizer.add_special_tokens({"extra_special_tokens": reward_tokens})
        self.reward_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(reward_tokens), device=device)

        state_dict = fold_lora(torch.load(weights, map_location="cpu", weights_only=True), self.LORA_SCALE)
        config.text_config.vocab_size = len(self.tokenizer)  # the reward tokens are new
        with torch.device("meta"):
            expected = {name: w.shape for name, w in Qwen2VLModel(config).state_dict().items()}
        expected["rm_head.weight"] = (1, config.text_config.hidden_size)
        found = {name: w.shape for name, w in state_dict.items()}
        if wrong := sorted(expected.items() ^ found.items()):
            missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
            raise RewardError(
                f"videoalign: {weights} does not fit its config: {len(missing)} weights missing, "
                f"{len(unexpected)} unexpected, first of those that differ: {wrong[0][0]} {tuple(wrong[0][1])}"
            )
        self.head = state_dict.pop("rm_head.weight").to(device)  # (1, D), float32
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = Qwen2VLModel.from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype)
        self.model.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(
        self,
        videos: Tensor | Sequence[Tensor],
        prompts: Sequence[str],
        fps: float | None = None,
        normalize: bool = True,
    ) -> dict[str, Tensor]:
        """videos (B, F, 3, H, W), or a list of (F, 3, H, W), in [0, 1]; one prompt each; frames per second.

        Returns {"vq": (B,), "mq": (B,), "ta": (B,)} float32: (raw - mean) / std of the released model, or raw.
        Raises RewardError on fewer than 4 frames, on fps that is missing or not positive, on what is no video.
        """
        _check_videos("videoalign", videos, prompts, fps)
        patches, grids = zip(*(self.patches(video, fps) for video in videos), strict=True)
        texts = [self.text(prompt, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            hidden = self.model(
                **tokens,  # (B, L) each, padded on the right
                # The weights were trained with plain 1-D positions, the same on all three axes of Qwen2-VL's rotary
                # embedding. With its own 3-D positions for video the scores are meaningless.
                position_ids=torch.arange(tokens.input_ids.shape[1], device=self.device).expand(3, len(texts), -1),
                pixel_values_videos=torch.cat(patches),
                video_grid_thw=torch.tensor(grids, device=self.device),
                use_cache=False,
            ).last_hidden_state  # (B, L, D)
            at = (tokens.input_ids[:, None] == self.reward_ids[:, None]).int().argmax(-1)  # (B, 3)
            raw = hidden[torch.arange(len(at), device=at.device)[:, None], at].float() @ self.head[0]  # (B, 3)
        if normalize:
            raw = (raw - raw.new_tensor(self.MEAN)) / raw.new_tensor(self.STD)
        return dict(zip(self.NAMES, raw.unbind(1), strict=True))

    def patches(self, video: Tensor, fps: float) -> tuple[Tensor, tuple[int, int, int]]:
        """(F, 3, H, W) → patches (t h w, 3 · 2 · 14 · 14), each 2x2 in a row for the merger to join, and (t, h, w)."""
        vision = self.model.config.vision_config
        p, m, tp = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        frames = (video[frame_indices(len(video), fps)].to(self.device).float() * 255).round()
        # Bytes before and after the resize, as from the authors' video reader.
        frames = _resize(frames, *smart_resize(*frames.shape[-2:], factor=p * m)).round().clamp(0, 255)
        frames = normalise(frames / 255, CLIP_MEAN, CLIP_STD)
        t, h, w = len(frames) // tp, frames.shape[2] // p, frames.shape[3] // p
        frames = frames.reshape(t, tp, 3, h // m, m, p, w // m, m, p)
        return frames.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1), (t, h, w)

    def text(self, prompt: str, grid: tuple[int, int, int]) -> str:
        """The chat for one video of this grid: default system line, video, question, start of the answer."""
        if "<|" in prompt:
            raise RewardError(f"videoalign: a prompt must not contain the model's control tokens: {prompt!r}")
        pads = "<|video_pad|>" * (math.prod(grid) // self.model.config.vision_config.spatial_merge_size**2)
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
            f"{self.template.replace('{text_prompt}', prompt)}<|im_end|>\n<|im_start|>assistant\n"
        )


def frame_indices(frames: int, fps: float) -> Tensor:
    """Which frames VideoAlign looks at: two a second, an even number, at least 4, from the first to the last."""
    count = min(max(2 * frames / fps, 4), 768, frames // 2 * 2)
    return torch.linspace(0, frames - 1, 2 * round(count / 2)).round().long()


def smart_resize(height: int, width: int, factor: int = 28, low: int = 128 * 784, high: int = 256 * 784):
    """The size, in multiples of `factor`, nearest to the given one with low <= height · width <= high pixels."""
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > high:
        scale, to_int = math.sqrt(high / (height * width)), math.floor
    elif h * w < low:
        scale, to_int = math.sqrt(low / (height * width)), math.ceil
    else:
        return h, w
    return tuple(max(1, to_int(side * scale / factor)) * factor for side in (height, width))


def fold_lora(state_dict: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A PEFT state dict → Qwen2VLModel's own names, float32, W + scale · B·A in place of W, A and B."""
    folded = {name.removeprefix("base_model.model."): w.float() for name, w in state_dict.items()}
    for name in [name for name in folded if name.endswith(".base_layer.weight")]:
        a, b = (folded.pop(name.replace("base_layer", f"lora_{x}.default"), None) for x in "AB")
        if a is None or b is None:
            raise RewardError(f"videoalign: the checkpoint lacks a LoRA weight of {name}")
        folded[name] = folded[name] + scale * b @ a
    folded.pop("lm_head.weight", None)  # the reward reads hidden states, it says no word
    return {re.sub(r"^model\.", "language_model.", name.replace(".base_layer", "")): w for name, w in folded.items()}


def load_template(path: str, sha256: str) -> str:
    """The prompt template in a local folder or, fetched once and cached, the released one. Its hash must be right."""
    file = Path(path) / "prompt_template.txt"
    if not file.is_file():
        file = Path(torch.hub.get_dir()) / "videoalign_prompt_template.txt"
    if not file.is_file():
        try:
            with urllib.request.urlopen(TEMPLATE_URL, timeout=60) as response:
                source = ast.parse(response.read())  # read, never executed
        except (OSError, SyntaxError) as e:
            raise RewardError(_not_loadable("videoalign", path, f"prompt_template.txt ({TEMPLATE_URL})", e)) from e
        assigned = {node.targets[0].id: node.value for node in source.body if isinstance(node, ast.Assign)}
        text = ast.literal_eval(assigned[TEMPLATE_NAME])
    else:
        text = file.read_bytes().decode()
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != sha256:
        raise RewardError(
            f"videoalign: the prompt template of {file} has sha256 {found[:12]}…, not {sha256[:12]}…: another text, "
            "and the scores would mean nothing"
        )
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")  # other processes may be loading too
        unfinished.write_bytes(text.encode())
        unfinished.replace(file)
    return text


def mean_over_frames(scorer: Callable, videos: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
    """A reward for images on videos (B, F, 3, H, W): the mean of up to 8 evenly spaced frames. → (B,)"""
    _check_prompts("reward", "video", videos, prompts)
    if not isinstance(videos, Tensor):
        return torch.cat([mean_over_frames(scorer, v[None], [p]) for v, p in zip(videos, prompts, strict=True)])
    frames = torch.linspace(0, videos.shape[1] - 1, min(videos.shape[1], FRAMES_SCORED)).round().long()
    prompts = [prompt for prompt in prompts for _ in frames]
    return scorer(videos[:, frames].flatten(0, 1), prompts).view(len(videos), -1).mean(1)


# -------------------------------------------------------------------------------------- from a spec to one callable

LOADERS: dict[str, Callable] = {
    "hps": HPSReward,
    "clip": CLIPReward,
    "pickscore": PickScoreReward,
    "videoalign": VideoAlignReward,
}
# What a spec may name → the model that gives it.
MODEL_OF = {name: name for name in LOADERS if name != "videoalign"} | dict.fromkeys(
    VideoAlignReward.NAMES, "videoalign"
)


@dataclass(frozen=True)
class Term:
    """One term of a reward spec: `name[@threshold][:weight]`."""

    name: str
    threshold: float | None
    weight: float

    @property
    def model(self) -> str:
        """The name under which the weights' path is given: one model serves vq, mq and ta."""
        return MODEL_OF[self.name]


def parse_spec(spec: str) -> list[Term]:
    """ "hps:0.7,clip@0.39" → terms. Raises RewardError on an unknown name, a bad number or a name given twice."""
    terms = []
    for part in spec.split(","):
        match = re.fullmatch(r"(\w+)(?:@([^:@]+))?(?::([^:@]+))?", part.strip())
        if not match or match[1] not in MODEL_OF:
            raise RewardError(
                f"unknown reward {part.strip()!r}; write NAME[@THRESHOLD][:WEIGHT], NAME one of {', '.join(MODEL_OF)}"
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


def check_reward(spec: str, paths: str, video: bool = False) -> None:
    """Raise RewardError if load_reward(spec, parse_paths(paths)) could not work, without loading anything."""
    for term in parse_spec(spec):
        if term.model == "videoalign" and not video:
            raise RewardError(f"reward {term.name} judges video; for images take hps, clip or pickscore")
    for name, path in parse_paths(paths).items():
        check_path(name, path)


class Reward:
    """Several rewards behind one call. `weights` are for the advantages, the scores come back as they are."""

    def __init__(self, terms: list[Term], scorers: dict[str, Callable]):
        self.terms, self.scorers = terms, scorers
        self.weights = {term.name: term.weight for term in terms}

    @property
    def models(self) -> list[torch.nn.Module]:
        """The networks, for moving them between devices."""
        return [part for s in self.scorers.values() for part in vars(s).values() if isinstance(part, torch.nn.Module)]

    def __call__(
        self, images: Tensor | Sequence[Tensor], prompts: Sequence[str], fps: float | None = None
    ) -> dict[str, Tensor]:
        """images (B, 3, H, W), or videos (B, F, 3, H, W) or a list of (F, 3, H, W), in [0, 1], and B prompts.

        Returns {name: (B,) float32}; with a threshold 1.0 above it, else 0.0. fps: frames per second of the videos.
        """
        videos = not isinstance(images, Tensor) or images.dim() == 5
        scores, judged = {}, {}
        for term in self.terms:
            scorer = self.scorers[term.model]
            if term.model == "videoalign":
                judged = judged or scorer(images, prompts, fps)
                raw = judged[term.name]
            else:
                raw = mean_over_frames(scorer, images, prompts) if videos else scorer(images, prompts).float()
            for prompt, value in zip(prompts, raw.tolist(), strict=True):
                if value != value or value in (float("inf"), float("-inf")):
                    raise RewardError(f"reward {term.name} gave {value} for the prompt {prompt!r}; the run stops here")
            scores[term.name] = raw if term.threshold is None else (raw > term.threshold).float()
        return scores


def load_reward(spec: str, paths: dict[str, str] | None = None, device="cpu") -> Reward:
    """Load every reward that `spec` names: comma-separated NAME[@THRESHOLD][:WEIGHT].

    hps@0.28 is the paper's binary reward (section 3.2). paths: {name: folder or hub id}, where not the default.
    vq, mq and ta share one VideoAlign model, whose path is given as "videoalign".
    Raises RewardError, before anything is loaded, if the spec or a path is wrong.
    """
    terms, paths = parse_spec(spec), paths or {}
    for name, path in paths.items():
        if name not in LOADERS:
            raise RewardError(f"a path is given for {name!r}, which is no reward; known: {', '.join(LOADERS)}")
        check_path(name, path)
    scorers = {}
    for name in dict.fromkeys(term.model for term in terms):
        arguments = {"path": paths[name]} if name in paths else {}
        scorers[name] = LOADERS[name](**arguments, device=device)
    return Reward(terms, scorers)


# ------------------------------------------------------------------------------------------------------ small helpers


def check_path(name: str, path: str) -> None:
    """Raise RewardError if `path` can be neither a local folder nor a hub id (OWNER/NAME)."""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).parent.is_dir()
    if not Path(path).is_dir() and not is_hub_id:
        raise RewardError(f"{name}: no folder {path!r} here; give a folder with the weights, or a hub id (OWNER/NAME)")


def _one_file(
    path: str, pattern: str, hub_file: str | None = None, optional: bool = False, name: str = "hps"
) -> str | None:
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
        raise RewardError(_not_loadable(name, path, hub_file, e)) from e


def _not_loadable(name: str, path: str, what: str, error: Exception) -> str:
    return (
        f"{name}: could not load {path!r} ({type(error).__name__}: {first_line(error)}); "
        f"download {what} into a folder and pass --reward-paths {name}=FOLDER"
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _check_images(name: str, images: Tensor, prompts: Sequence[str]) -> None:
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise RewardError(f"{name}: images must be (B, 3, H, W), got {tuple(images.shape)}")
    _check_prompts(name, "image", images, prompts)
    for prompt, image in zip(prompts, images, strict=True):
        _check_pixels(name, image, prompt)


def _check_videos(name: str, videos: Tensor | Sequence[Tensor], prompts: Sequence[str], fps: float | None) -> None:
    if isinstance(videos, Tensor) and videos.dim() != 5:
        raise RewardError(f"{name}: videos must be (B, F, 3, H, W), got {tuple(videos.shape)}")
    _check_prompts(name, "video", videos, prompts)
    if fps is None or not 0 < fps < math.inf:
        raise RewardError(f"{name}: fps must be the videos' frames per second, above 0, got {fps}")
    for prompt, video in zip(prompts, videos, strict=True):
        if video.dim() != 4 or video.shape[1] != 3 or 0 in video.shape:
            raise RewardError(f"{name}: each video must be (F, 3, H, W), got {tuple(video.shape)} for {prompt!r}")
        if len(video) < 4:
            raise RewardError(f"{name}: a video must have at least 4 frames, got {len(video)} for {prompt!r}")
        _check_pixels(name, video, prompt)


def _check_prompts(name: str, kind: str, visuals: Tensor | Sequence[Tensor], prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or len(prompts) != len(visuals):
        raise RewardError(f"{name}: one prompt per {kind}, got {len(visuals)} {kind}s and prompts {prompts!r:.80}")


def _check_pixels(name: str, pixels: Tensor, prompt: str) -> None:
    low, high = pixels.aminmax()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise RewardError(f"{name}: pixels must be in [0, 1], found {low:.3g} to {high:.3g} for the prompt {prompt!r}")
