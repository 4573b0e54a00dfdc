"""The reward: tensors in, tensor out. No file, no JPEG or mp4 round trip; samples are scored in batches.

    reward = load_reward("hps:0.7,clip:1.4", paths={"hps": "tiny/hps", "clip": "tiny/clip"})
    scores = reward(images, prompts)          # {"hps": (B,), "clip": (B,)}; reward.weights: {"hps": 0.7, "clip": 1.4}
    load_reward("vq,mq:2")(videos, prompts, fps=8)   # {"vq": (B,), "mq": (B,)}, from one forward pass
    load_reward("my_rewards.py:sharpness")    # a function of your own: sharpness(images, prompts) → (B,)
    load_reward("http://gpu2:8000/judge:0.5")  # a server of your own, see HTTPReward; the reward is called judge

A score that is not finite stops the run: a substitute would shift the advantages of its whole group.
Scores of several rewards are not added here. Each is first normalised within its group (DanceGRPO, Algorithm 1).

Legend: B images or videos, F frames, H and W their size in pixels, L tokens, D features.
"""

import ast
import base64
import contextlib
import hashlib
import io
import json
import math
import pickle
import re
import runpy
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from textwrap import shorten

import huggingface_hub
import requests
import torch
from einops import rearrange
from filelock import FileLock
from huggingface_hub import constants, errors
from PIL import Image
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, implementations, pre_tokenizers
from torch import Tensor
from urllib3 import Retry

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# What libraries raise on files that are missing, damaged or of another kind.
FILE_ERRORS = (OSError, RuntimeError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, EOFError)
FILE_ERRORS += (pickle.UnpicklingError, SafetensorError)
Visuals = Tensor | Sequence[Tensor]  # images (B, 3, H, W), videos (B, F, 3, H, W), or a list of (F, 3, H, W); in [0, 1]


class RewardError(ValueError):
    """A reward that cannot be loaded, was called wrongly, or gave no number. Its message is one line for the user."""


def require(condition, message: str) -> None:
    """Raise RewardError with this message unless the condition holds."""
    if not condition:
        raise RewardError(message)


class Scorer:
    """A model that scores, with its files in a folder or on the hub.

    A subclass has a name, FILES (what a folder holds), HUB (`hub_folder`'s arguments, for each folder it needs) and
    `load`, which gets these folders and sets `model`.
    """

    def __init__(self, path: str | None = None, device: str | torch.device = "cpu", metadata=None):
        """path: a folder with all files, or a hub id for the first one; metadata: not used. Raises RewardError."""
        self.device = device
        with reading(self.name, path or self.HUB[0][0], self.FILES):
            self.load(*self.fetch(path))
        self.model.to(device).eval().requires_grad_(False)

    @classmethod
    def fetch(cls, path: str | None = None) -> list[str]:
        (repo, *files), *others = cls.HUB
        if path and Path(path).is_dir():
            return [path] * len(cls.HUB)
        return [hub_folder(path or repo, *files), *(hub_folder(*other) for other in others)]

    @classmethod
    def check(cls, path: str | None, video: bool, prompts: Sequence[str], metadata) -> None:
        """Raise an error of one line, before weights are loaded, if it could not score these prompts."""


# ---------------------------------------------------------------------------------------------------- image rewards


class CosineReward(Scorer):
    """The cosine of a CLIP model's image and text features.

    A subclass also sets tokenizer, size and mode (of `resize`), and mean and std of colours where they are not CLIP's.
    """

    mean, std = CLIP_MEAN, CLIP_STD

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, a cosine (not multiplied by 100)."""
        from torchvision.transforms.functional import normalize

        check_visuals(self.name, images, prompts, "3, H, W")
        pixels = normalize(resize(images.to(self.device).float(), self.size, self.mode), self.mean, self.std)
        # Float32 whatever the caller's autocast: bfloat16 weights put the score off by 5e-4.
        with torch.autocast(pixels.device.type, enabled=False):
            image, text = self.features(pixels, list(prompts))  # (B, D) each, of unit length
        return (image * text).sum(-1)  # image i with prompt i, and with no other

    def features(self, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(prompts).to(self.device)
        return self.model.encode_image(pixels, normalize=True), self.model.encode_text(tokens, normalize=True)


class HPSReward(CosineReward):
    """Human preference score v2.1 (2306.09341): the cosine of CLIP features fine-tuned on human choices.

    A folder holds one `*.pt` in HPS's layout ({"state_dict": …}) and, unless the model is ViT-H-14, one open_clip model
    config `*.json`. Images are resized by their longest side, as the authors do: cropping shifts the score by some
    hundredths on wide images. Typical scores on real images: 0.2 to 0.4.
    """

    name, mode, FILES = "hps", "longest", "HPS_v2.1_compressed.pt"
    HUB = (("xswu/HPSv2", FILES),)

    def load(self, folder: str) -> None:
        import open_clip

        c = open_clip.get_model_config("ViT-H-14")
        if any(Path(folder).glob("*.json")):
            c = json.loads(only_file(folder, "*.json").read_text())
        self.model = open_clip.CLIP(c["embed_dim"], c["vision_cfg"], c["text_cfg"], c.get("quick_gelu", False))
        weights = only_file(folder, self.FILES, "*.pt")
        self.model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["state_dict"])
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.size = c["vision_cfg"]["image_size"]


class CLIPReward(CosineReward):
    """CLIP score: the cosine of image and text features, by default of DFN5B's ViT-H-14 at 378 px (2309.17425).

    A folder is in open_clip's layout (open_clip_config.json and weights). Sizes, colour statistics and the way to
    resize are the model's own; DFN5B squashes to a square. Typical scores on real images: 0.3 to 0.4.
    """

    name, FILES = "clip", "open_clip_config.json and weights"
    WEIGHTS = "open_clip_model.safetensors|open_clip_pytorch_model.bin"
    HUB = (("apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_config.json", WEIGHTS),)

    def load(self, folder: str) -> None:
        import open_clip

        self.model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        own = open_clip.get_model_preprocess_cfg(self.model)
        self.size = own["size"] if isinstance(own["size"], int) else own["size"][0]
        self.mode, self.mean, self.std = own["resize_mode"], own["mean"], own["std"]


class PickScoreReward(CosineReward):
    """PickScore (2305.01569): the cosine of CLIP features fine-tuned on the choices of Pick-a-Pic's users.

    A folder is in transformers' CLIPModel layout and holds the tokenizer too; on the hub it is the one of the model's
    origin. Typical scores on real images: 0.2 (the authors' code multiplies by about 100).
    """

    name, mode, FILES = "pickscore", "shortest", "a CLIPModel folder with its tokenizer"
    MODEL = "yuvalkirstain/PickScore_v1", "config.json", "model.safetensors|pytorch_model.bin"
    HUB = MODEL, ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer_config.json", "tokenizer.json|merges.txt")

    def load(self, folder: str, tokenizer: str) -> None:
        from transformers import CLIPModel

        self.tokenizer = load_tokenizer(tokenizer, "CLIPTokenizer")
        self.model = load_whole(CLIPModel, folder, dtype=torch.float32)
        self.size = self.model.config.vision_config.image_size

    def features(self, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        out = self.model(pixel_values=pixels, **text.to(self.device))
        return out.image_embeds, out.text_embeds


def resize(images: Tensor, size: int, mode: str) -> Tensor:
    """(B, 3, H, W) → (B, 3, size, size), bicubic and antialiased.

    mode (open_clip's): longest side to size, then black to a square; shortest, then the centre square; squash both.
    """
    from torchvision.transforms import functional as TF

    sides = images.shape[-2:]
    scale = size / (max(sides) if mode == "longest" else min(sides))
    shape = [size, size] if mode == "squash" else [round(side * scale) for side in sides]
    return TF.center_crop(TF.resize(images, shape, TF.InterpolationMode.BICUBIC), [size, size])  # pads what is small


# ---------------------------------------------------------------------------------------------------- video rewards

# The authors' prompt is part of the model: with another text the scores mean nothing.
TEMPLATE_URL = (
    "https://raw.githubusercontent.com/KwaiVGI/VideoAlign/219ab9db64c045e5181a2202d11f686439351292/prompt_template.py"
)
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"


class VideoAlignReward(Scorer):
    """VideoAlign (2501.13918): visual quality, motion quality and text alignment, judged by a vision-language model.

    Qwen2-VL reads video and prompt; a linear head on the hidden states of three extra tokens gives the three scores.
    A folder holds `model.pth` in the released layout (a PEFT state dict), `config.json` and tokenizer of its Qwen2-VL,
    and `prompt_template.txt`, of the released text's sha256 or that in config.json as "prompt_template_sha256".
    Float32 on a CPU, bfloat16 on a GPU, as released.
    """

    name, FILES = "videoalign", f"model.pth, config.json, tokenizer and prompt_template.txt ({TEMPLATE_URL})"
    WEIGHTS, CONFIGS = "checkpoint-11352/model.pth", ("config.json", "tokenizer_config.json", "tokenizer.json")
    HUB = (("KlingTeam/VideoReward", WEIGHTS), ("Qwen/Qwen2-VL-2B-Instruct", *CONFIGS))
    NAMES = ("vq", "mq", "ta")
    MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of the released model's raw scores
    LORA_SCALE, PIXELS = 2.0, (128 * 28**2, 256 * 28**2)  # alpha / rank; least and most of a frame

    @classmethod
    def check(cls, path: str | None, video: bool, prompts: Sequence[str], metadata) -> None:
        for prompt in prompts:
            require("<|" not in prompt, f"videoalign: a prompt must not contain the model's control tokens: {prompt!r}")

    @classmethod
    def fetch(cls, path: str | None = None) -> list[str]:
        template = Path(path or "-", "prompt_template.txt")
        if not template.is_file():
            with reading(cls.name, path or cls.HUB[0][0], cls.FILES):
                template = fetched_once("videoalign_prompt_template.py", partial(text_at, TEMPLATE_URL))
        return [*super().fetch(path), str(template)]

    def load(self, folder: str, base: str, template: str) -> None:
        from transformers import Qwen2VLConfig, Qwen2VLModel

        config = Qwen2VLConfig.from_pretrained(base)
        self.template = load_template(Path(template), getattr(config, "prompt_template_sha256", TEMPLATE_SHA256))
        self.tokenizer = load_tokenizer(base, "Qwen2Tokenizer", padding_side="right")
        reward_tokens = [f"<|{name.upper()}_reward|>" for name in self.NAMES]
        self.tokenizer.add_special_tokens({"extra_special_tokens": reward_tokens})
        self.reward_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(reward_tokens), device=self.device)
        config.text_config.vocab_size = len(self.tokenizer)  # the reward tokens are new
        weights = torch.load(only_file(folder, self.WEIGHTS, "model.pth"), map_location="cpu", weights_only=True)
        dtype = torch.bfloat16 if torch.device(self.device).type == "cuda" else torch.float32
        weights = fold_lora(weights, self.LORA_SCALE, dtype)
        self.head = weights.pop("rm_head.weight").view(config.text_config.hidden_size).to(self.device).float()  # (D,)
        self.model = load_whole(Qwen2VLModel, None, config=config, state_dict=weights, dtype=dtype)

    @torch.no_grad()
    def __call__(self, videos: Visuals, prompts: Sequence[str], fps: float | None = None, normalize=True) -> dict:
        """Videos of at least 4 frames, one prompt each; fps: their frames per second.

        Returns {"vq": (B,), "mq": (B,), "ta": (B,)} float32: (raw - mean) / std of the released model, or raw.
        """
        check_visuals(self.name, videos, prompts, "F, 3, H, W")
        known, shortest = fps is not None and 0 < fps < math.inf, min(map(len, videos))
        require(known, f"videoalign: fps must be the videos' frames per second, above 0, got {fps}")
        require(shortest >= 4, f"videoalign: a video must have at least 4 frames, got {shortest}")
        patches, grids = zip(*(self.patches(video, fps) for video in videos), strict=True)
        texts = [self.text(prompt, grid) for prompt, grid in zip(prompts, grids, strict=True)]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)  # (B, L), padded on the right
        # The weights were trained with plain 1-D positions, the same on all three axes of Qwen2-VL's rotary embedding.
        # With its own 3-D positions for video the scores are meaningless.
        positions = torch.arange(tokens.input_ids.shape[1], device=self.device).expand(3, len(texts), -1)
        video = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids, device=self.device)}
        with torch.autocast(torch.device(self.device).type, enabled=False):
            out = self.model(**tokens, **video, position_ids=positions, use_cache=False)
            at = (tokens.input_ids[:, None] == self.reward_ids[:, None]).int().argmax(-1)  # (B, 3)
            hidden = out.last_hidden_state[torch.arange(len(at), device=at.device)[:, None], at]  # (B, 3, D)
            raw = hidden.float() @ self.head  # (B, 3)
        if normalize:
            raw = (raw - raw.new_tensor(self.MEAN)) / raw.new_tensor(self.STD)
        return dict(zip(self.NAMES, raw.unbind(1), strict=True))

    def patches(self, video: Tensor, fps) -> tuple[Tensor, tuple]:
        """(F, 3, H, W) → patches (t h w, 3 · 2 · 14 · 14), each 2x2 in a row for the merger to join, and (t, h, w)."""
        from torchvision.transforms import functional as TF
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        vision = self.model.config.vision_config
        p, m, t = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        frames = (video[frame_indices(len(video), fps)].to(self.device).float() * 255).round()
        # Rounded to 8 bits before and after the resize, as in the authors' video reader.
        height, width = smart_resize(*frames.shape[-2:], p * m, *self.PIXELS)
        frames = TF.resize(frames, [height, width], TF.InterpolationMode.BICUBIC).round().clamp(0, 255)
        frames = TF.normalize(frames / 255, CLIP_MEAN, CLIP_STD)
        sizes = {"tp": t, "mh": m, "mw": m, "ph": p, "pw": p}
        patches = rearrange(frames, "(t tp) c (h mh ph) (w mw pw) -> (t h w mh mw) (c tp ph pw)", **sizes)
        return patches, (len(frames) // t, height // p, width // p)

    def text(self, prompt: str, grid: tuple[int, int, int]) -> str:
        """The chat for one video of this grid: default system line, video, question, start of the answer."""
        self.check(None, True, [prompt], None)
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


def fold_lora(state_dict: dict[str, Tensor], scale: float, dtype=torch.float32) -> dict[str, Tensor]:
    """A PEFT state dict → Qwen2VLModel's own names, W + scale · B·A, of this dtype, in place of W, A and B."""
    folded = {name.removeprefix("base_model.model."): w for name, w in state_dict.items()}
    for name in [name for name in folded if name.endswith(".base_layer.weight")]:
        a, b = (folded.pop(name.replace("base_layer", f"lora_{x}.default")) for x in "AB")
        folded[name] = (folded[name].float() + scale * b.float() @ a.float()).to(dtype)
    folded.pop("lm_head.weight", None)  # the reward reads hidden states, not logits
    return {re.sub(r"^model\.", "language_model.", name.replace(".base_layer", "")): w for name, w in folded.items()}


def load_template(file: Path, sha256: str) -> str:
    """The prompt template, a text file or the authors' Python file. Raises RewardError if its hash is another one."""
    text = file.read_bytes().decode(errors="replace")  # the hash decides
    if file.suffix == ".py":  # read, never executed
        assigned = {node.targets[0].id: node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)}
        text = ast.literal_eval(assigned[TEMPLATE_NAME])
    found = hashlib.sha256(text.encode()).hexdigest()
    require(found == sha256, f"videoalign: the prompt template {file} has sha256 {found[:12]}…, not {sha256[:12]}…")
    return text


# ------------------------------------------------------------------------------------------------------- own rewards


def load_object(place: str):
    """The function or class that FILE.py:NAME names; the file is executed once. Raises RewardError, one line."""
    file, _, name = place.rpartition(":")
    require(file.endswith(".py") and Path(file).is_file(), f"{place}: there is no file {file!r}; write FILE.py:NAME")
    try:
        found = run_file(str(Path(file).resolve())).get(name)
    except Exception as e:  # the file is not ours: it may raise anything
        raise RewardError(f"{place}: {where(e, file)}") from e
    require(callable(found), f"{place}: {file} has no function or class {name!r}")
    return found


run_file = cache(runpy.run_path)  # not an import, which would leave a __pycache__ beside the reader's file


def where(error: Exception, file: str) -> str:
    """ "FILE, line 7: ValueError: what it says" """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(Path(file).resolve())]
    return f"{file}{''.join(lines[-1:])}: {type(error).__name__}: {first_line(error)}"


class HTTPReward:
    """A scorer on a server, called over HTTP: for a judge too large to run in the trainer's process.

    It gets a POST with JSON, at most BATCH samples at a time, and answers with one score for each prompt:
        {"prompts": ["a red circle", …], "images": ["iVBORw0…", …]}                             PNG files in base64
        {"prompts": ["a red circle", …], "videos": [["iVBORw0…", …], …], "fps": 8.0}            their frames
        → {"scores": [0.27, …]}
    If no answer begins within SECONDS, or its status is 500 or above, the request is repeated, ATTEMPTS times in all.
    After that, and on any other bad answer: RewardError. Proxies are taken from the environment.
    """

    BATCH, SECONDS, ATTEMPTS, BACKOFF = 8, 300.0, 3, 5.0  # BACKOFF: urllib3.Retry's, in seconds

    def __init__(self, name: str, url: str):
        self.name, self.url, self.session = name, url, requests.Session()
        options = {"raise_on_status": False, "respect_retry_after_header": False, "backoff_factor": self.BACKOFF}
        retry = Retry(self.ATTEMPTS - 1, allowed_methods=None, status_forcelist=range(500, 600), **options)
        self.session.mount(url, requests.adapters.HTTPAdapter(max_retries=retry))

    def __call__(self, visuals: Visuals, prompts: Sequence[str], fps: float | None = None) -> Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W), or a list of (F, 3, H, W), in [0, 1] → (B,) float32."""
        scores = []
        for i in range(0, len(prompts), self.BATCH):
            request, part = {"prompts": list(prompts[i : i + self.BATCH])}, visuals[i : i + self.BATCH]
            if part[0].dim() == 3:
                request["images"] = [png(image) for image in part]
            else:
                request |= {"videos": [[png(frame) for frame in video] for video in part], "fps": fps}
            try:
                answer = self.session.post(self.url, json=request, timeout=self.SECONDS)
                answer.raise_for_status()
                scores += [float(score) for score in answer.json()["scores"]]
            except FILE_ERRORS as e:  # requests raises OSErrors
                raise RewardError(f"no scores from {where(e, self.url)}; fix the server") from e
        return torch.tensor(scores)

    def check(self) -> None:
        """Raise RewardError if nothing answers at the URL. Any answer to a GET will do, also an error's."""
        try:
            requests.get(self.url, timeout=60.0, stream=True).close()
        except FILE_ERRORS as e:
            raise RewardError(f"reward {self.name}: nothing answers at {where(e, self.url)}; start the server") from e


def png(image: Tensor) -> str:
    """(3, H, W) in [0, 1] as a PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray((image.float() * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


# -------------------------------------------------------------------------------------- from a spec to one callable

LOADERS = {"hps": HPSReward, "clip": CLIPReward, "pickscore": PickScoreReward, "videoalign": VideoAlignReward}
# The names of a spec → the model that gives the score.
MODEL_OF = {n: n for n in LOADERS if n != "videoalign"} | dict.fromkeys(VideoAlignReward.NAMES, "videoalign")
Term = namedtuple("Term", "name model threshold weight")  # model: one of LOADERS, FILE.py:FUNCTION or a URL


def register(loader: type) -> None:
    """Add a reward of another module: a class with a name, and __init__, fetch and check as those of `Scorer`."""
    LOADERS[loader.name], MODEL_OF[loader.name] = loader, loader.name


def parse_spec(spec: str) -> list[Term]:
    """ "hps:0.7,clip@0.39,my_rewards.py:sharpness" → terms. Raises RewardError if there is something wrong with it.

    A reward at http://HOST:PORT/NAME is named after the last part of its path, which weight and threshold may follow.
    """
    terms, number = [], r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d\d?)?)"
    known = f"NAME[@THRESHOLD][:WEIGHT], NAME one of {', '.join(MODEL_OF)}, FILE.py:FUNCTION or http://HOST:PORT/NAME"
    for part in map(str.strip, spec.split(",")):
        match = re.fullmatch(rf"(.+\.py:|https?://[^/@]+/(?:[^:@]*/)?)?(\w+)(?:@{number})?(?::{number})?", part)
        file, name, threshold, weight = match.groups() if match else (None, None, None, None)
        model = file + name if file else MODEL_OF.get(name or "")
        require(model, f"unknown reward {part!r}; write {known}; threshold and weight must be numbers")
        require(name not in [t.name for t in terms], f"reward {name!r} is given twice in {spec!r}; give each name once")
        # metrics.jsonl has reward_mean and reward_std
        require(name not in ("mean", "std"), f"reward {part!r}: the function must not be called {name}; rename it")
        terms.append(Term(name, model, None if threshold is None else float(threshold), float(weight or 1)))
    require(any(term.weight for term in terms), f"every weight in {spec!r} is 0, so nothing is rewarded; change one")
    return terms


def split_paths(text: str) -> dict[str, str]:
    """ "hps=DIR,clip=DIR" → {"hps": DIR, "clip": DIR}, unchecked."""
    return {name: path for name, _, path in (x.strip().partition("=") for x in text.split(",") if x.strip())}


def parse_paths(paths: str | dict[str, str]) -> dict[str, str]:
    """`split_paths`. Raises RewardError on a name that is no reward model, or a path that is no folder or hub id."""
    paths = split_paths(paths) if isinstance(paths, str) else paths
    for name, path in paths.items():
        given, known = f"reward path {name}={path}", ", ".join(LOADERS)
        require(name in LOADERS, f"{given}: {name!r} is no reward model; known: {known}")
        fine = is_folder_or_hub_id(path) if issubclass(LOADERS[name], Scorer) else path
        require(fine, f"{given}: no folder {path!r} here; or give a hub id (OWNER/NAME)")
    return paths


def is_folder_or_hub_id(path: str) -> bool:
    """Whether `path` is a folder, or OWNER/NAME where there is no folder OWNER (else it is a misspelt path)."""
    is_hub_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path))
    return bool(path) and (Path(path).is_dir() or (is_hub_id and not Path(path).parent.is_dir()))


def check_reward(spec: str, paths: str, video: bool = False, prompts: Sequence[str] = (), metadata=None) -> None:
    """Raise an error of one line, without loading weights, if these rewards could not score these prompts."""
    terms, places = parse_spec(spec), parse_paths(paths)
    for term in terms:
        require(video or term.model != "videoalign", f"reward {term.name} judges video; take hps, clip or pickscore")
        if term.model in LOADERS:
            LOADERS[term.model].check(places.get(term.model), video, prompts, metadata)
        elif "://" in term.model:
            HTTPReward(term.name, term.model).check()
        else:
            load_object(term.model)


def fetch_rewards(spec: str, paths: dict[str, str]) -> None:
    """Fetch the files of all rewards that `spec` names from the hub, where they are not here. Raises RewardError."""
    for model in {term.model for term in parse_spec(spec)} & LOADERS.keys():
        LOADERS[model].fetch(paths.get(model))


def load_reward(spec: str, paths: dict | str | None = None, device="cpu", metadata=None, batch=32) -> "Reward":
    """Load every reward that `spec` names: comma-separated NAME[@THRESHOLD][:WEIGHT].

    NAME      hps, clip, pickscore, vq, mq, ta, one that was given to `register` (geneval),
              FILE.py:FUNCTION, a function (visuals, prompts) → (B,) tensor, or http://HOST:PORT/NAME (see `HTTPReward`)
    paths     {name: folder or hub id}, where not the default; vq, mq and ta share one model, "videoalign"
    metadata  for registered rewards; geneval's: {prompt: GenEval's metadata}, where its detector cannot read the prompt
    batch     images or videos in a forward pass of a model; your own function gets all at once, a server 8 at a time
    hps@0.28 is one of the paper's binary rewards (section 3.2). Raises RewardError.
    """
    terms, paths, scorers = parse_spec(spec), parse_paths(paths or {}), {}
    for model, name in {term.model: term.name for term in terms}.items():
        if model in LOADERS:
            scorers[model] = LOADERS[model](paths.get(model), device, metadata)
        elif "://" in model:
            scorers[model] = HTTPReward(name, model)
        else:
            scorers[model] = load_object(model)
    return Reward(terms, scorers, batch)


class Reward:
    """Several rewards behind one call. `weights` are for the advantages; scores are returned unweighted."""

    def __init__(self, terms: list[Term], scorers: dict[str, Callable], batch: int = 32):
        self.terms, self.scorers, self.batch = terms, scorers, batch
        self.weights = {term.name: term.weight for term in terms}
        # The networks, for moving them between devices.
        ours = [scorer for name, scorer in scorers.items() if name in LOADERS]
        self.models = [part for scorer in ours for part in vars(scorer).values() if isinstance(part, torch.nn.Module)]

    @torch.no_grad()
    def __call__(self, visuals: Visuals, prompts: Sequence[str], fps: float | None = None) -> dict[str, Tensor]:
        """B images or videos, one prompt each → {name: (B,) float32}; with a threshold 1.0 above it, else 0.0.

        fps: the videos' frames per second. A built-in reward for images gives a video the mean over up to 8 frames.
        """
        check_visuals("reward", visuals, prompts)
        is_video = not isinstance(visuals, Tensor) or visuals.dim() == 5
        pieces = [slice(i, i + self.batch) for i in range(0, len(prompts), self.batch)]
        scores, judged = {}, []
        for term in self.terms:
            scorer = self.scorers[term.model]
            with naming(term, prompts):
                if term.model == "videoalign":
                    judged = judged or [scorer(visuals[piece], prompts[piece], fps) for piece in pieces]
                    raw = torch.cat([part[term.name] for part in judged])
                elif term.model in LOADERS:
                    judge = partial(mean_over_frames, scorer) if is_video else scorer
                    raw = torch.cat([judge(visuals[piece], prompts[piece]) for piece in pieces])
                else:
                    raw = scorer(visuals, list(prompts), *([fps] if isinstance(scorer, HTTPReward) else []))
                wanted, shape = (len(prompts),), tuple(raw.shape) if isinstance(raw, Tensor) else type(raw).__name__
                require(shape == wanted, f"it must give a tensor of shape {wanted}, and it gave {shape}")
            raw = raw.to(visuals[0].device, torch.float32)
            for prompt, value in zip(prompts, raw.tolist(), strict=True):
                message = f"reward {term.name} gave {value} for the prompt {prompt!r}; the run stops here"
                require(math.isfinite(value), message)
            scores[term.name] = raw if term.threshold is None else (raw > term.threshold).float()
        return scores


@contextlib.contextmanager
def naming(term: Term, prompts: Sequence[str]) -> Iterator[None]:
    """Make any error of a scorer a RewardError of one line, which says which reward failed, where, and its prompts."""
    try:
        yield
    except Exception as e:  # a scorer may raise anything
        reason = e if isinstance(e, RewardError) else where(e, term.model.rpartition(":")[0] or term.model)
        raise RewardError(f"reward {term.name}: {reason}; its prompts: {[*dict.fromkeys(prompts)]}") from e


def mean_over_frames(scorer: Callable, videos: Visuals, prompts: Sequence[str]) -> Tensor:
    """A reward for images on videos: the mean of up to 8 evenly spaced frames. → (B,)"""
    if not isinstance(videos, Tensor):
        return torch.cat([mean_over_frames(scorer, v[None], [p]) for v, p in zip(videos, prompts, strict=True)])
    frames = torch.linspace(0, videos.shape[1] - 1, min(videos.shape[1], 8)).round().long()
    prompts = [prompt for prompt in prompts for _ in frames]
    return scorer(videos[:, frames].flatten(0, 1), prompts).view(len(videos), -1).mean(1)


# ------------------------------------------------------------------------------------------------- files and the hub


def hub_folder(path: str, *names: str) -> str:
    """`fetched_folder` for these files ("a|b": one of them); with a .json also the root's configs and tokenizers."""

    def choose(files: Sequence[str]) -> tuple[list[str], str]:
        configs = any(name.endswith(".json") for name in names)
        small = [file for file in files if configs and "/" not in file and file.endswith((".json", ".txt", ".model"))]
        found = [next((file for file in name.split("|") if file in files), "") for name in names]
        return small + found, next((name for name, file in zip(names, found, strict=True) if not file), "")

    return fetched_folder(path, choose)


def fetched_folder(path: str, choose: Callable[[Sequence[str]], tuple[list[str], str]]) -> str:
    """A local folder as it is; of OWNER/NAME or OWNER/NAME@REVISION on the hub, the folder in the hub's cache.

    choose(names of files) → those that are needed, and the first that is needed and not among them, "" if none is.
    What the cache lacks is fetched, by one process of a machine: huggingface_hub has locks. So a full cache needs no
    network. Raises RewardError, one line; what was fetched stays.
    """
    if Path(path).is_dir():
        return path
    repo, _, revision = path.partition("@")
    options = {"repo_id": repo, "revision": revision or None}
    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError):  # nothing of it is cached
            # allow_patterns: we never fetch a whole repository, and huggingface_hub would call its folder incomplete.
            folder = huggingface_hub.snapshot_download(**options, local_files_only=True, allow_patterns=[])
            cached = [file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()]
            if not choose(cached)[1]:  # else something is lacking, as after a broken fetch
                return folder
        files, missing = choose(huggingface_hub.list_repo_files(**options))
        require(not missing, f"{path} on the hub lacks {missing}; give another one, or a complete folder")
        return huggingface_hub.snapshot_download(**options, allow_patterns=files)
    except (OSError, errors.HTTPError) as e:
        login = "log in with `hf auth login`"
        advice = {
            errors.GatedRepoError: f"accept its licence at https://huggingface.co/{repo} and {login}",
            errors.RepositoryNotFoundError: f"there is no such repository, or it is private; {login}",
            errors.RevisionNotFoundError: "it has no such revision; correct what follows the @",
        }
        usual = f"{first_line(e)}; fix this and run again (what was fetched is kept), or give a folder"
        raise RewardError(f"cannot fetch {path} from the hub: {advice.get(type(e), usual)}") from e


def fetched_once(name: str, fetch: Callable[[], str]) -> Path:
    """The file HF_HOME/dancegrpo/NAME, whose text `fetch` gives; the first process makes it, the others wait for it."""
    file = Path(constants.HF_HOME, "dancegrpo", name)
    if not file.is_file():
        with FileLock(f"{file}.lock"):  # makes the folder, too
            if not file.is_file():
                file.with_suffix(".part").write_text(fetch(), encoding="utf-8")
                file.with_suffix(".part").replace(file)
    return file


def text_at(address: str) -> str:
    """The text at an address. Raises OSError."""
    response = requests.get(address, timeout=60)
    response.raise_for_status()
    return response.content.decode()


PROBE = "A red Circle, two naïve cats!"  # spaces, capitals, punctuation, a letter that is not ASCII
VOCABULARIES = ({"tokenizer.json"}, {"spiece.model"}, {"vocab.json", "merges.txt"})  # else the tokenizer would be empty


def load_tokenizer(folder: str | Path, kind: str, **options):
    """A tokenizer that gives the ids which its files give by themselves. Raises RewardError if it does not.

    kind: its class in transformers, which is taken where there is no tokenizer.json. A class may replace what stands
    there: transformers' LlamaTokenizer drops the spaces of Llama 3's texts, and HunyuanVideo names that class.
    """
    import transformers

    names = {path.name for path in Path(folder).glob("*") if path.is_file()}
    whole = "tokenizer_config.json" in names and any(files <= names for files in VOCABULARIES)
    require(whole, f"{folder} lacks a tokenizer's files, tokenizer_config.json and tokenizer.json")
    kind = "PreTrainedTokenizerFast" if "tokenizer.json" in names else kind
    tokenizer = getattr(transformers, kind).from_pretrained(folder, **options)
    found, expected = tokenizer(PROBE, add_special_tokens=False)["input_ids"], file_ids(Path(folder), PROBE)
    advice = "install another version of transformers, or give a folder whose tokenizer.json is whole"
    reads = f"{type(tokenizer).__name__} reads {PROBE!r} as {found[:8]}…, its files say {expected[:8]}…"
    require(found == expected, f"{folder}: {reads}; {advice}")
    return tokenizer


def file_ids(folder: Path, text: str) -> list[int]:
    """The ids of a text that a tokenizer's files give without transformers, without special tokens."""
    vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    elif (folder / "spiece.model").is_file():
        return SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode(text)
    elif "a</w>" in json.loads(Path(vocabulary).read_text(encoding="utf-8")):  # CLIP's
        options = {"lowercase": True, "end_of_word_suffix": "</w>"}
        tokenizer = implementations.ByteLevelBPETokenizer(vocabulary, merges, **options)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), to_bytes])
    else:
        tokenizer = implementations.ByteLevelBPETokenizer(vocabulary, merges)
    return tokenizer.encode(text, add_special_tokens=False).ids


# ------------------------------------------------------------------------------------------------------ small helpers


def load_whole(network_class: type, path: str | None, **options) -> torch.nn.Module:
    """`from_pretrained` of transformers. Raises ValueError where it would fill in random weights, or drop some."""
    network, info = network_class.from_pretrained(path, output_loading_info=True, **options)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if wrong := missing + [name for name in unexpected if "position_ids" not in name]:  # older files hold these
        raise ValueError(f"{len(missing)} weights missing, {len(unexpected)} unexpected, first: {wrong[0]}")
    return network


def only_file(folder: str, *patterns: str) -> Path:
    """The one file in a folder that matches the first pattern with any match. Raises ValueError."""
    files = next(filter(None, (list(Path(folder).glob(pattern)) for pattern in patterns)), [])
    if len(files) != 1:
        raise ValueError(f"{folder} must hold exactly one {patterns[-1]}, it holds {len(files)}")
    return files[0]


@contextlib.contextmanager
def reading(name: str, path: str, what: str) -> Iterator[None]:
    """Turn the errors of libraries into one line that says what to download."""
    advice = f"download {what} into a folder and pass --reward-paths {name}=FOLDER"
    try:
        yield
    except RewardError as e:
        raise (RewardError(f"{name}: {e}; or {advice}") if e.__cause__ and advice not in str(e) else e) from e.__cause__
    except FILE_ERRORS as e:
        # torch's own text advises to load the pickle, which would run what is in it
        reason = "not a file of weights alone" if isinstance(e, pickle.UnpicklingError) else shorten(str(e), 200)
        raise RewardError(f"{name}: could not load {path!r} ({type(e).__name__}: {reason}); {advice}") from e


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def check_visuals(name: str, visuals: Visuals, prompts: Sequence[str], dims: str = "") -> None:
    """Raise RewardError unless each has a prompt and, given dims ("3, H, W" or "F, 3, H, W"), these, within [0, 1]."""
    fine = not isinstance(prompts, str) and len(prompts) == len(visuals)
    require(fine, f"{name}: one prompt per image or video, got {len(visuals)} and prompts {prompts!r:.80}")
    for prompt, visual in zip(prompts, visuals, strict=True) if dims else []:
        fine = visual.dim() == len(dims.split(",")) and visual.shape[-3] == 3 and 0 not in visual.shape
        require(fine, f"{name}: each must be ({dims}), got {tuple(visual.shape)}")
        low, high = visual.aminmax()
        found = f"found {low:.3g} to {high:.3g} for {prompt!r}"
        advice = "NaN is the model's: lower the learning rate, the guidance or eta" if low.isnan() else "scale them"
        require(low >= 0 and high <= 1, f"{name}: pixels must be in [0, 1], {found}; {advice}")  # also catches NaN
