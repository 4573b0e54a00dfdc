"""The reward: tensors in, tensor out. No file, no JPEG or mp4 round trip, one batched forward pass per call.

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
import errno
import hashlib
import http.client
import io
import json
import math
import pickle
import re
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from einops import rearrange
from safetensors import SafetensorError
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
TEMPLATE_FILE = "videoalign_prompt_template.py"
TEMPLATE_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# What libraries raise on files that are missing, damaged or of another kind.
FILE_ERRORS = (OSError, RuntimeError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, EOFError)
FILE_ERRORS += (pickle.UnpicklingError, SafetensorError)
Visuals = Tensor | Sequence[Tensor]  # images (B, 3, H, W), videos (B, F, 3, H, W), or a list of (F, 3, H, W); in [0, 1]


class RewardError(ValueError):
    """A reward that cannot be loaded, was called wrongly, or gave no number. Its message is one line for the user."""


# ---------------------------------------------------------------------------------------------------- image rewards


class CosineReward:
    """What HPS, CLIP score and PickScore have in common: the cosine of a CLIP model's image and text features.

    A subclass sets name, device, model, tokenizer, size and mode (of `resize`), and may set mean and std (of colours).
    """

    mean, std = CLIP_MEAN, CLIP_STD

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], one prompt each → (B,) float32, a cosine (not multiplied by 100)."""
        from torchvision.transforms import functional as TF

        check_visuals(self.name, images, prompts, "3, H, W")
        pixels = TF.normalize(resize(images.to(self.device).float(), self.size, self.mode), self.mean, self.std)
        # Float32 whatever the caller's autocast: bfloat16 weights put the score off by 5e-4.
        with torch.autocast(pixels.device.type, enabled=False):
            image, text = self.features(pixels, list(prompts))  # (B, D) each, of unit length
        return (image * text).sum(-1)  # image i with prompt i, and with no other

    def features(self, pixels: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(prompts).to(self.device)
        return self.model.encode_image(pixels, normalize=True), self.model.encode_text(tokens, normalize=True)


class HPSReward(CosineReward):
    """Human preference score v2.1 (2306.09341): the cosine of CLIP features fine-tuned on human choices.

    path: a hub id, or a folder with one `*.pt` in HPS's layout ({"state_dict": …}) and, unless the model is
    ViT-H-14, one open_clip model config `*.json`. Images are resized by their longest side, as the authors do: cropping
    shifts the score by some hundredths on wide images. Typical scores on real images: 0.2 to 0.4.
    """

    def __init__(self, path: str = HPS_HUB_ID, device="cpu"):
        import open_clip

        path = self.fetch(path)
        weights, config = only_file("hps", path, "*.pt", HPS_HUB_FILE), open_clip.get_model_config("ViT-H-14")
        with reading("hps", path, HPS_HUB_FILE):
            if any(Path(path).glob("*.json")):
                config = json.loads(Path(only_file("hps", path, "*.json")).read_text())
            self.model = open_clip.CLIP(**{k: config[k] for k in ("embed_dim", "vision_cfg", "text_cfg")})
            state_dict = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
            check_fit("hps", weights, self.model.state_dict(), state_dict)
            self.model.load_state_dict(state_dict)
        self.model.to(device).float().eval().requires_grad_(False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=self.model.context_length)
        self.name, self.device = "hps", device
        self.size, self.mode = config["vision_cfg"]["image_size"], "longest"

    @staticmethod
    def fetch(path: str = HPS_HUB_ID) -> str:
        return hub_folder(path, (), [HPS_HUB_FILE])


class CLIPReward(CosineReward):
    """CLIP score: the cosine of image and text features, by default of DFN5B's ViT-H-14 at 378 px (2309.17425).

    path: a hub id, or a folder, in open_clip's layout (open_clip_config.json and weights). Sizes, colour statistics
    and the way to resize are the model's own; DFN5B squashes to a square. Typical scores on real images: 0.3 to 0.4.
    """

    def __init__(self, path: str = CLIP_HUB_ID, device="cpu"):
        import open_clip

        name = f"local-dir:{self.fetch(path)}"
        with reading("clip", path, "an open_clip model folder"):
            self.model = open_clip.create_model(name, device=device, require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(name)
        self.model.float().eval().requires_grad_(False)
        self.name, self.device = "clip", device
        own = self.model.visual.preprocess_cfg
        self.size = own["size"] if isinstance(own["size"], int) else own["size"][0]
        self.mode, self.mean, self.std = own["resize_mode"], own["mean"], own["std"]

    @staticmethod
    def fetch(path: str = CLIP_HUB_ID) -> str:
        weights = "open_clip_model.safetensors|open_clip_pytorch_model.bin"
        return hub_folder(path, [""], ["open_clip_config.json", weights], weights=False)


class PickScoreReward(CosineReward):
    """PickScore (2305.01569): the cosine of CLIP features fine-tuned on the choices of Pick-a-Pic's users.

    path: a hub id, or a folder, in transformers' CLIPModel layout; a folder holds the tokenizer too, on the hub it is
    the one of the model's origin. Typical scores on real images: 0.2 (the authors' code multiplies by about 100).
    """

    def __init__(self, path: str = PICKSCORE_HUB_ID, device="cpu"):
        from transformers import CLIPModel

        path, tokenizer = self.fetch(path)
        with reading("pickscore", path, "a CLIPModel folder with its tokenizer"):
            self.tokenizer = load_tokenizer(tokenizer, "CLIPTokenizer")
            self.model, info = CLIPModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        missing, unexpected = (dict.fromkeys(info[keys]) for keys in ("missing_keys", "unexpected_keys"))
        check_fit("pickscore", path, missing, unexpected)  # transformers would fill in random weights
        self.model.to(device).eval().requires_grad_(False)
        self.name, self.device = "pickscore", device
        self.size, self.mode = self.model.config.vision_config.image_size, "shortest"

    @staticmethod
    def fetch(path: str = PICKSCORE_HUB_ID) -> tuple[str, str]:
        tokenizer = path if Path(path).is_dir() else PICKSCORE_TOKENIZER
        return hub_folder(path), hub_folder(tokenizer, weights=False)

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
    return TF.center_crop(TF.resize(images, shape, TF.InterpolationMode.BICUBIC), size)  # pads what is too small


# ---------------------------------------------------------------------------------------------------- video rewards


class VideoAlignReward:
    """VideoAlign (2501.13918): visual quality, motion quality and text alignment, judged by a vision-language model.

    Qwen2-VL reads video and prompt; a linear head on the hidden states of three extra tokens gives the three scores.
    path: a hub id, or a folder with `model.pth` in the released layout (a PEFT state dict), `config.json` and tokenizer
    of its Qwen2-VL, and `prompt_template.txt`, of the released text's sha256 or that in config.json as
    "prompt_template_sha256". Float32 on a CPU, bfloat16 on a GPU, as released.
    """

    NAMES = ("vq", "mq", "ta")
    MEAN, STD = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of the released model's raw scores
    LORA_SCALE, PIXELS = 2.0, (128 * 28**2, 256 * 28**2)  # alpha / rank; least and most of a frame

    def __init__(self, path: str = VIDEOALIGN_HUB_ID, device="cpu"):
        from transformers import Qwen2VLConfig, Qwen2VLModel

        path, base = self.fetch(path)
        weights = only_file("videoalign", path, "model.pth", VIDEOALIGN_HUB_FILE)
        with reading("videoalign", base, "config.json and the tokenizer"):
            config = Qwen2VLConfig.from_pretrained(base)
            self.tokenizer = load_tokenizer(base, "Qwen2Tokenizer", padding_side="right")
        self.template = load_template(path, getattr(config, "prompt_template_sha256", TEMPLATE_SHA256))
        reward_tokens = [f"<|{name.upper()}_reward|>" for name in self.NAMES]
        self.tokenizer.add_special_tokens({"extra_special_tokens": reward_tokens})
        self.reward_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(reward_tokens), device=device)
        with reading("videoalign", path, VIDEOALIGN_HUB_FILE):
            state_dict = fold_lora(torch.load(weights, map_location="cpu", weights_only=True), self.LORA_SCALE)
        config.text_config.vocab_size = len(self.tokenizer)  # the reward tokens are new
        with torch.device("meta"):
            expected = Qwen2VLModel(config).state_dict()
            expected["rm_head.weight"] = torch.empty(1, config.text_config.hidden_size)
        check_fit("videoalign", weights, expected, state_dict)
        self.head = state_dict.pop("rm_head.weight").to(device)  # (1, D), float32
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.model = Qwen2VLModel.from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype)
        self.model.to(device).eval().requires_grad_(False)
        self.device = device

    @staticmethod
    def fetch(path: str = VIDEOALIGN_HUB_ID) -> tuple[str, str]:
        """→ the folder of the weights, and that of the Qwen2-VL from which they were trained."""
        if not Path(path, "prompt_template.txt").is_file():
            with reading("videoalign", path, f"prompt_template.txt ({TEMPLATE_URL})"):
                fetched_once(TEMPLATE_FILE, partial(text_at, TEMPLATE_URL))
        base = path if Path(path).is_dir() else VIDEOALIGN_BASE
        return hub_folder(path, (), [VIDEOALIGN_HUB_FILE]), hub_folder(base, weights=False)

    @torch.no_grad()
    def __call__(self, videos: Visuals, prompts: Sequence[str], fps: float | None = None, normalize=True) -> dict:
        """Videos of at least 4 frames, one prompt each; fps: their frames per second.

        Returns {"vq": (B,), "mq": (B,), "ta": (B,)} float32: (raw - mean) / std of the released model, or raw.
        """
        check_visuals("videoalign", videos, prompts, "F, 3, H, W")
        if fps is None or not 0 < fps < math.inf:
            raise RewardError(f"videoalign: fps must be the videos' frames per second, above 0, got {fps}")
        if short := [len(video) for video in videos if len(video) < 4]:
            raise RewardError(f"videoalign: a video must have at least 4 frames, got {short[0]}")
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
        from torchvision.transforms import functional as TF
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        vision = self.model.config.vision_config
        p, m = vision.patch_size, vision.spatial_merge_size
        frames = (video[frame_indices(len(video), fps)].to(self.device).float() * 255).round()
        # Rounded to 8 bits before and after the resize, as in the authors' video reader.
        size = smart_resize(*frames.shape[-2:], p * m, *self.PIXELS)
        frames = TF.resize(frames, size, TF.InterpolationMode.BICUBIC).round().clamp(0, 255)
        frames = TF.normalize(frames / 255, CLIP_MEAN, CLIP_STD)
        sizes = {"tp": vision.temporal_patch_size, "mh": m, "mw": m, "ph": p, "pw": p}
        patches = rearrange(frames, "(t tp) c (h mh ph) (w mw pw) -> (t h w mh mw) (c tp ph pw)", **sizes)
        return patches, (len(frames) // vision.temporal_patch_size, frames.shape[2] // p, frames.shape[3] // p)

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


def fold_lora(state_dict: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A PEFT state dict → Qwen2VLModel's own names, float32, W + scale · B·A in place of W, A and B."""
    folded = {name.removeprefix("base_model.model."): w.float() for name, w in state_dict.items()}
    for name in [name for name in folded if name.endswith(".base_layer.weight")]:
        a, b = (folded.pop(name.replace("base_layer", f"lora_{x}.default"), None) for x in "AB")
        if a is None or b is None:
            raise RewardError(f"videoalign: the checkpoint lacks a LoRA weight of {name}")
        folded[name] = folded[name] + scale * b @ a
    folded.pop("lm_head.weight", None)  # the reward reads hidden states, not logits
    return {re.sub(r"^model\.", "language_model.", name.replace(".base_layer", "")): w for name, w in folded.items()}


def load_template(path: str, sha256: str) -> str:
    """The prompt template in a local folder or, fetched once and cached, the released one. Its hash must be right."""
    file = Path(path) / "prompt_template.txt"
    if file.is_file():
        text = file.read_bytes().decode(errors="replace")  # the hash decides
    else:
        with reading("videoalign", path, f"prompt_template.txt ({TEMPLATE_URL})"):
            file = fetched_once(TEMPLATE_FILE, partial(text_at, TEMPLATE_URL))
            body = ast.parse(file.read_bytes()).body  # read, never executed
        assigned = {node.targets[0].id: node.value for node in body if isinstance(node, ast.Assign)}
        text = ast.literal_eval(assigned[TEMPLATE_NAME])
    found = hashlib.sha256(text.encode()).hexdigest()
    if found != sha256:
        raise RewardError(f"videoalign: the prompt template of {file} has sha256 {found[:12]}…, not {sha256[:12]}…")
    return text


def mean_over_frames(scorer: Callable, videos: Visuals, prompts: Sequence[str]) -> Tensor:
    """A reward for images on videos: the mean of up to 8 evenly spaced frames. → (B,)"""
    if not isinstance(videos, Tensor):
        return torch.cat([mean_over_frames(scorer, v[None], [p]) for v, p in zip(videos, prompts, strict=True)])
    frames = torch.linspace(0, videos.shape[1] - 1, min(videos.shape[1], 8)).round().long()
    prompts = [prompt for prompt in prompts for _ in frames]
    return scorer(videos[:, frames].flatten(0, 1), prompts).view(len(videos), -1).mean(1)


def own_reward(place: str, visuals: Visuals, prompts: Sequence[str]) -> Tensor:
    """FILE.py:FUNCTION, with a function(visuals, prompts) → (B,) tensor. If it fails, RewardError names the line."""
    function, (file, _, name) = load_object(place), place.rpartition(":")
    try:
        scores = function(visuals, list(prompts))
    except Exception as e:  # the function is not ours: it may raise anything
        raise RewardError(f"reward {name}: {where(e, file)}") from e
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        found = f"one of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise RewardError(f"reward {name}: {file} must return a tensor of shape ({len(prompts)},), it returned {found}")
    return scores.detach().to(visuals[0].device)


class HTTPReward:
    """A scorer on a server, called over HTTP: for a judge too large to run in the trainer's process.

    It gets a POST with JSON, at most BATCH samples at a time, and answers with one score for each prompt:
        {"prompts": ["a red circle", …], "images": ["iVBORw0…", …]}                             PNG files in base64
        {"prompts": ["a red circle", …], "videos": [["iVBORw0…", …], …], "fps": 8.0}            their frames
        → {"scores": [0.27, …]}
    After no answer within SECONDS, a broken connection or a status of 500 and above it tries again, ATTEMPTS times in
    all. After the last one, and at once on any other bad answer: RewardError. Proxies are taken from the environment.
    """

    BATCH, SECONDS, ATTEMPTS, PAUSE, MOST_BYTES = 8, 120.0, 3, 5.0, 1_000_000

    def __init__(self, name: str, url: str):
        self.name, self.url = name, url

    def __call__(self, visuals: Visuals, prompts: Sequence[str], fps: float | None = None) -> Tensor:
        """Images (B, 3, H, W) or videos (B, F, 3, H, W), or a list of (F, 3, H, W), in [0, 1] → (B,) float32."""
        scores = []
        for i in range(0, len(prompts), self.BATCH):
            request, part = {"prompts": list(prompts[i : i + self.BATCH])}, visuals[i : i + self.BATCH]
            if part[0].dim() == 3:
                request["images"] = [png(image) for image in part]
            else:
                request |= {"videos": [[png(frame) for frame in video] for video in part], "fps": fps}
            scores += self.ask(json.dumps(request).encode(), len(part))
        return torch.tensor(scores, dtype=torch.float32, device=visuals[0].device)

    def ask(self, request: bytes, count: int) -> list[float]:
        headers = {"Content-Type": "application/json"}
        for attempt in range(1, self.ATTEMPTS + 1):
            try:
                answer = self.fetch(urllib.request.Request(self.url, request, headers))
                break
            except urllib.error.HTTPError as e:
                reason, final = f"it answers with status {e.code} {e.reason}", e.code < 500
            except (OSError, http.client.HTTPException) as e:  # refused, reset, timed out, no HTTP
                reason, final = f"no answer ({first_line(getattr(e, 'reason', None) or e)})", False
            if final or attempt == self.ATTEMPTS:
                raise RewardError(
                    f"reward {self.name}: {self.url}: {reason}, attempt {attempt} of {self.ATTEMPTS}; fix the server"
                )
            time.sleep(self.PAUSE)
        try:
            scores = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError) as e:
            found = f"{answer[:60]!r} ({type(e).__name__})"
            raise RewardError(f'reward {self.name}: {self.url} must answer {{"scores": […]}}, not {found}') from e
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise RewardError(f"reward {self.name}: the scores of {self.url} must be numbers, got {scores!r:.60}")
        if len(scores) != count:
            raise RewardError(f"reward {self.name}: {self.url} gave {len(scores)} scores for {count} prompts")
        return scores

    def fetch(self, request: urllib.request.Request | str) -> bytes:
        """The body of the answer, read within SECONDS, cut off after MOST_BYTES. Raises OSError or HTTPException."""
        body, end = b"", time.monotonic() + self.SECONDS
        with urllib.request.urlopen(request, timeout=self.SECONDS) as response:
            while len(body) < self.MOST_BYTES and (part := response.read1(65536)):
                body += part
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
        return body

    def check(self) -> None:
        """Raise RewardError if nothing answers at the URL. Any answer to a GET will do, also an error's."""
        try:
            self.fetch(self.url)
        except urllib.error.HTTPError:
            return
        except (OSError, http.client.HTTPException, ValueError) as e:
            reason = first_line(getattr(e, "reason", None) or e)
            raise RewardError(f"reward {self.name}: nothing answers at {self.url} ({reason}); start the server") from e


def png(image: Tensor) -> str:
    """(3, H, W) in [0, 1] as a PNG file in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((image.float() * 255).round().byte().permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def load_object(place: str) -> Callable:
    """The function or class that FILE.py:NAME names; the file is executed once. Raises RewardError, one line."""
    file, _, name = place.rpartition(":")
    path = str(Path(file).resolve())
    if not file.endswith(".py") or not Path(path).is_file():
        raise RewardError(f"{place}: there is no file {file!r}; write FILE.py:NAME")
    if path not in sys.modules:
        sys.modules[path] = ModuleType(path)
        sys.modules[path].__file__ = path
        try:  # not by an import, which would leave a __pycache__ beside the reader's file
            exec(compile(Path(path).read_bytes(), path, "exec"), vars(sys.modules[path]))
        except Exception as e:  # the file is not ours: it may raise anything
            del sys.modules[path]
            raise RewardError(f"{place}: {where(e, file)}") from e
    if not callable(found := getattr(sys.modules[path], name, None)):
        raise RewardError(f"{place}: {file} has no function or class {name!r}")
    return found


def where(error: Exception, file: str) -> str:
    """ "FILE, line 7: ValueError: what it says" """
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(Path(file).resolve())]
    return f"{file}{''.join(lines[-1:])}: {type(error).__name__}: {first_line(error)}"


# -------------------------------------------------------------------------------------- from a spec to one callable

LOADERS: dict[str, Callable] = {
    "hps": HPSReward,
    "clip": CLIPReward,
    "pickscore": PickScoreReward,
    "geneval": lambda **options: import_module("evaluation.geneval").GenEvalReward(**options),  # it needs this file
    "videoalign": VideoAlignReward,
}
# The names of a spec → the model that gives the score.
MODEL_OF = {n: n for n in LOADERS if n != "videoalign"} | dict.fromkeys(VideoAlignReward.NAMES, "videoalign")
Term = namedtuple("Term", "name model threshold weight")  # model: one of LOADERS, FILE.py:FUNCTION or a URL


def parse_spec(spec: str) -> list[Term]:
    """ "hps:0.7,clip@0.39,my_rewards.py:sharpness" → terms. Raises RewardError if there is something wrong with it.

    A reward at http://HOST:PORT/NAME is called by the last part of its path, which weight and threshold may follow.
    """
    terms, number = [], r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d\d?)?)"
    for part in map(str.strip, spec.split(",")):
        match = re.fullmatch(rf"(.+\.py:|https?://[^/@]+/(?:[^:@]*/)?)?(\w+)(?:@{number})?(?::{number})?", part)
        file, name, threshold, weight = match.groups() if match else (None, None, None, None)
        if not file and name not in MODEL_OF:
            known = f"NAME[@THRESHOLD][:WEIGHT], NAME one of {', '.join(MODEL_OF)}, FILE.py:FUNCTION or http://HOST:PORT/NAME"
            raise RewardError(f"unknown reward {part!r}; write {known}; threshold and weight must be numbers")
        if name in [term.name for term in terms]:
            raise RewardError(f"reward {name!r} is given twice in {spec!r}; give each name once")
        if name in ("mean", "std"):  # of metrics.jsonl's own reward_mean and reward_std
            raise RewardError(f"reward {part!r}: the function must not be called {name}; rename it")
        model = file + name if file else MODEL_OF[name]
        terms.append(Term(name, model, None if threshold is None else float(threshold), float(weight or 1)))
    if not any(term.weight for term in terms):
        raise RewardError(f"every weight in {spec!r} is 0, so nothing is rewarded; change one")
    return terms


def parse_paths(text: str) -> dict[str, str]:
    """ "hps=DIR,clip=DIR" → {"hps": DIR, "clip": DIR}. Raises RewardError as `check_paths` does."""
    paths = split_paths(text)
    check_paths(paths)
    return paths


def split_paths(text: str) -> dict[str, str]:
    """What `parse_paths` returns, unchecked."""
    return dict(part.strip().partition("=")[::2] for part in text.split(",") if part.strip())


def check_paths(paths: dict[str, str]) -> None:
    """Raise RewardError on a name that is no reward model, or a path that is neither a folder nor a hub id."""
    for name, path in paths.items():
        if name not in LOADERS:
            raise RewardError(f"reward path {name}={path}: {name!r} is no reward model; known: {', '.join(LOADERS)}")
        if not path or (name != "geneval" and not is_folder_or_hub_id(path)):
            raise RewardError(f"reward path {name}={path}: no folder {path!r} here; or give a hub id (OWNER/NAME)")


def is_folder_or_hub_id(path: str) -> bool:
    """Whether `path` is a folder, or OWNER/NAME where there is no folder OWNER (else it is a misspelt path)."""
    is_hub_id = bool(re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path))
    return bool(path) and (Path(path).is_dir() or (is_hub_id and not Path(path).parent.is_dir()))


def check_reward(spec: str, paths: str, video: bool = False, prompts: Sequence[str] = (), metadata=None) -> None:
    """Raise an error of one line, without loading weights, if these rewards could not score these prompts."""
    terms, places = parse_spec(spec), parse_paths(paths)
    for term in terms:
        if term.model == "videoalign" and not video:
            raise RewardError(f"reward {term.name} judges video; for images take hps, clip or pickscore")
        if term.model == "geneval":
            import_module("evaluation.geneval").check(places.get("geneval"), video, prompts, metadata)
        if is_url(term.model):
            HTTPReward(term.name, term.model).check()
        elif term.model not in LOADERS:
            load_object(term.model)


def is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


class Reward:
    """Several rewards behind one call. `weights` are for the advantages; scores are returned unweighted."""

    def __init__(self, terms: list[Term], scorers: dict[str, Callable]):
        self.terms, self.scorers = terms, scorers
        self.weights = {term.name: term.weight for term in terms}

    @property
    def models(self) -> list[torch.nn.Module]:
        """The networks, for moving them between devices."""
        return [part for s in self.scorers.values() for part in vars(s).values() if isinstance(part, torch.nn.Module)]

    @torch.no_grad()
    def __call__(self, visuals: Visuals, prompts: Sequence[str], fps: float | None = None) -> dict[str, Tensor]:
        """B images or videos, one prompt each → {name: (B,) float32}; with a threshold 1.0 above it, else 0.0.

        fps: the videos' frames per second. A built-in reward for images gives a video the mean over up to 8 frames.
        """
        check_prompts("reward", visuals, prompts)
        is_video = not isinstance(visuals, Tensor) or visuals.dim() == 5
        scores, judged = {}, {}
        for term in self.terms:
            scorer = self.scorers[term.model]
            if term.model == "videoalign":
                judged = judged or scorer(visuals, prompts, fps)
                raw = judged[term.name]
            elif is_video and term.model in LOADERS:
                raw = mean_over_frames(scorer, visuals, prompts)
            elif isinstance(scorer, HTTPReward):
                raw = scorer(visuals, prompts, fps)
            else:
                raw = scorer(visuals, prompts).float()
            for prompt, value in zip(prompts, raw.tolist(), strict=True):
                if not math.isfinite(value):
                    raise RewardError(f"reward {term.name} gave {value} for the prompt {prompt!r}; the run stops here")
            scores[term.name] = raw if term.threshold is None else (raw > term.threshold).float()
        return scores


def load_reward(spec: str, paths: dict[str, str] | None = None, device="cpu", metadata=None) -> Reward:
    """Load every reward that `spec` names: comma-separated NAME[@THRESHOLD][:WEIGHT].

    NAME      hps, clip, pickscore, geneval, vq, mq, ta, FILE.py:FUNCTION (see `own_reward`),
              or http://HOST:PORT/NAME (see `HTTPReward`)
    paths     {name: folder or hub id}, where not the default; vq, mq and ta share one model, "videoalign"
    metadata  for geneval: {prompt: GenEval's metadata}, of the prompts that the detector cannot read by itself
    hps@0.28 is the paper's binary reward (section 3.2). Raises RewardError.
    """
    terms, paths, scorers = parse_spec(spec), paths or {}, {}
    check_paths(paths)
    for model, name in {term.model: term.name for term in terms}.items():
        if is_url(model):
            scorers[model] = HTTPReward(name, model)
            continue
        options = {"path": paths[model]} if model in paths else {}
        options |= {"metadata": metadata} if model == "geneval" else {}
        own = None if model in LOADERS else load_object(model)  # what is not there raises here already
        scorers[model] = partial(own_reward, model) if own else LOADERS[model](**options, device=device)
    return Reward(terms, scorers)


def fetch_rewards(spec: str, paths: dict[str, str]) -> None:
    """Fetch the files of all rewards that `spec` names from the hub, where they are not here. Raises RewardError."""
    for model in {term.model for term in parse_spec(spec)}:
        if model == "geneval":
            import_module("evaluation.geneval").fetch(paths.get(model))
        elif model in LOADERS:
            LOADERS[model].fetch(**({"path": paths[model]} if model in paths else {}))


# ------------------------------------------------------------------------------------------------- files and the hub

# Names of weights, the best first: safetensors before pickles, a copy in half precision only where nothing else is.
WEIGHTS = [
    re.compile(rf"(diffusion_)?(pytorch_)?model{half}(-\d+-of-\d+)?{half}\.{suffix}")
    for half in ("", r"(\.fp16|\.bf16)?")
    for suffix in ("safetensors", "bin")
]


def hub_folder(path: str, parts: Sequence[str] = ("",), names: Sequence[str] = (), weights: bool = True) -> str:
    """A local folder as it is; of OWNER/NAME or OWNER/NAME@REVISION on the hub, the folder in the hub's cache.

    parts: folders that hold a model or a tokenizer each, "" for the root; names: other files; "a|b" is one of them.
    weights: whether the models' weights are needed.
    The first process of a machine fetches what its cache lacks; the others wait for it, and find everything there. So
    a full cache needs no network. Raises RewardError, one line; what was fetched stays.
    """
    if Path(path).is_dir():
        return path
    from filelock import FileLock
    from huggingface_hub import constants, errors, list_repo_files, snapshot_download

    repo, _, revision = path.partition("@")
    lock = Path(constants.HF_HOME, "dancegrpo", f"{repo.replace('/', '--')}.lock")
    try:
        if lacking(folder := cached_folder(path), parts, names, weights):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                if lacking(folder := cached_folder(path), parts, names, weights):
                    files = wanted_files(list_repo_files(repo, revision=revision or None), parts, names, weights)
                    folder = snapshot_download(repo, revision=revision or None, allow_patterns=files)
    except (OSError, errors.HTTPError) as e:
        raise RewardError(f"cannot fetch {path} from the hub: {hub_advice(e, repo)}") from e
    if missing := lacking(folder, parts, names, weights):
        raise RewardError(f"{path} on the hub lacks {missing}; give another repository, or a complete folder")
    return folder


def hub_advice(error: Exception, repo: str) -> str:
    """Why a repository cannot be fetched, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return f"accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private; correct the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision; correct what follows the @"
    if getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full; make room or set HF_HOME, and run again: what was fetched stays"
    return f"{first_line(error)}; run again where the hub can be reached: what was fetched stays; or give a folder"


def cached_folder(path: str) -> str:
    """Where the hub's cache has files of a hub id; "" where it has none."""
    from huggingface_hub import errors, snapshot_download

    repo, _, revision = path.partition("@")
    try:
        return snapshot_download(repo, revision=revision or None, local_files_only=True)
    except errors.LocalEntryNotFoundError:
        return ""


def wanted_files(files: Sequence[str], parts: Sequence[str], names: Sequence[str] = (), weights=True) -> list[str]:
    """Those of a repository's files that `hub_folder` fetches: of each part's weights one copy."""
    chosen = [found[0] for name in names if (found := [file for file in name.split("|") if file in files])]
    for part in parts:
        here = [file for file in files if file.rpartition("/")[0] == part]
        chosen += [file for file in here if file.endswith((".json", ".txt", ".model"))]
        copies = ([f for f in here if kind.fullmatch(f.rpartition("/")[2])] for kind in WEIGHTS if weights)
        chosen += next(filter(None, copies), [])
    return chosen


def lacking(folder: str, parts: Sequence[str], names: Sequence[str] = (), weights: bool = True) -> str:
    """What a folder lacks of what `hub_folder` needs, "" if nothing: it may be what a broken fetch has left."""
    files = (
        [file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()] if folder else []
    )
    for name in names:
        if not wanted_files(files, (), [name]):
            return name
    for part in parts:
        here = [file.rpartition("/")[2] for file in wanted_files(files, [part], (), weights)]
        vocabulary = {"tokenizer.json", "spiece.model", "tokenizer.model", "merges.txt"}.intersection(here)
        shards = [name for name in here if name.endswith((".safetensors", ".bin"))]
        count = int(re.search(r"-of-(\d+)|$", shards[0])[1] or 1) if shards else 1
        if not here:
            return part or "config.json"
        if "tokenizer_config.json" in here and not vocabulary:
            return f"{part}/tokenizer.json".lstrip("/")
        if weights and "config.json" in here and len(shards) < count:
            return f"weights in {part}" if part else "weights"
    return ""


def fetched_once(name: str, fetch: Callable[[], str]) -> Path:
    """The file HF_HOME/dancegrpo/NAME, whose text `fetch` gives; the first process makes it, the others wait for it."""
    from filelock import FileLock
    from huggingface_hub import constants

    file = Path(constants.HF_HOME, "dancegrpo", name)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                file.with_suffix(".part").write_text(fetch(), encoding="utf-8")
                file.with_suffix(".part").replace(file)
    return file


def text_at(address: str) -> str:
    """What stands at an address. Raises OSError."""
    with urllib.request.urlopen(address, timeout=60) as response:
        return response.read().decode()


def text_on_hub(data_set: str, file: str) -> str:
    """What stands in a file of a data set on the hub. Raises OSError."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(data_set, file, repo_type="dataset")).read_text(encoding="utf-8")
    except errors.HTTPError as e:
        raise OSError(first_line(e)) from e


PROBE = "A red Circle, two naïve cats!"  # spaces, capitals, punctuation, a letter that is not ASCII


def load_tokenizer(folder: str | Path, kind: str, **options):
    """A tokenizer that gives the ids which its files give by themselves. Raises RewardError if it does not.

    kind: its class in transformers, which is taken where there is no tokenizer.json. A class may replace what stands
    there: transformers' LlamaTokenizer drops the spaces of Llama 3's texts, and HunyuanVideo names that class.
    """
    import transformers

    check_tokenizer(folder)
    kind = "PreTrainedTokenizerFast" if Path(folder, "tokenizer.json").is_file() else kind
    tokenizer = getattr(transformers, kind).from_pretrained(folder, **options)
    found, expected = tokenizer(PROBE, add_special_tokens=False)["input_ids"], file_ids(Path(folder), PROBE)
    if found != expected:
        raise RewardError(
            f"{folder}: {type(tokenizer).__name__} reads {PROBE!r} as {found[:8]}…, its files say {expected[:8]}…; "
            "install another version of transformers, or give a folder whose tokenizer.json is whole"
        )
    return tokenizer


def file_ids(folder: Path, text: str) -> list[int]:
    """The ids of a text that a tokenizer's files give without transformers, without special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    elif (folder / "spiece.model").is_file():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(folder / "spiece.model")).encode(text)
    else:
        vocabulary, merges = str(folder / "vocab.json"), str(folder / "merges.txt")
        is_clip = "a</w>" in json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        bpe = models.BPE.from_file(vocabulary, merges, **({"end_of_word_suffix": "</w>"} if is_clip else {}))
        tokenizer, to_bytes = Tokenizer(bpe), pre_tokenizers.ByteLevel(False, use_regex=not is_clip)
        if is_clip:
            tokenizer.normalizer = normalizers.Lowercase()
            to_bytes = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), to_bytes])
        tokenizer.pre_tokenizer = to_bytes
    return tokenizer.encode(text, add_special_tokens=False).ids


def check_tokenizer(folder: str | Path) -> None:
    """Raise RewardError if a folder lacks a tokenizer's files: transformers would build an empty one."""
    names = {path.name for path in Path(folder).glob("*") if path.is_file()}
    vocabulary = names & {"tokenizer.json", "spiece.model"} or {"vocab.json", "merges.txt"} <= names
    if not ("tokenizer_config.json" in names and vocabulary):
        raise RewardError(f"{folder} lacks a tokenizer's files, tokenizer_config.json and tokenizer.json")


# ------------------------------------------------------------------------------------------------------ small helpers


def only_file(name: str, folder: str, pattern: str, hub_file: str = "") -> str:
    """The file of a folder that is called as on the hub, else the only one that fits the pattern."""
    if hub_file and Path(folder, hub_file).is_file():
        return str(Path(folder, hub_file))
    files = sorted(Path(folder).glob(pattern))
    if len(files) != 1:
        raise RewardError(f"{name}: {folder} must hold exactly one {pattern}, it holds {len(files)}")
    return str(files[0])


@contextlib.contextmanager
def reading(name: str, path: str, what: str) -> Iterator[None]:
    """Turn the errors of libraries into one line that says what to download."""
    try:
        yield
    except RewardError:
        raise
    except FILE_ERRORS as e:
        # torch's own text advises to load the pickle, which would run what is in it
        reason = "not a file of weights alone" if isinstance(e, pickle.UnpicklingError) else first_line(e)
        raise RewardError(
            f"{name}: could not load {path!r} ({type(e).__name__}: {reason}); "
            f"download {what} into a folder and pass --reward-paths {name}=FOLDER"
        ) from e


def check_fit(name: str, path: str, expected: dict, found: dict) -> None:
    """Raise RewardError unless both have the same weights, of the same shapes."""
    shapes, own = ({key: tuple(getattr(w, "shape", ())) for key, w in d.items()} for d in (expected, found))
    if wrong := sorted(shapes.items() ^ own.items()):
        counts = f"{len(shapes.keys() - own.keys())} weights missing, {len(own.keys() - shapes.keys())} unexpected"
        raise RewardError(f"{name}: {path} does not fit its config: {counts}, first: {wrong[0][0]}")


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def check_visuals(name: str, visuals: Visuals, prompts: Sequence[str], dims: str) -> None:
    """Raise RewardError unless each image ("3, H, W") or video ("F, 3, H, W") is one, in [0, 1], with its prompt."""
    for visual in visuals:
        if visual.dim() != len(dims.split(",")) or visual.shape[-3] != 3 or 0 in visual.shape:
            raise RewardError(f"{name}: each must be ({dims}), got {tuple(visual.shape)}")
    check_prompts(name, visuals, prompts)
    for prompt, visual in zip(prompts, visuals, strict=True):
        low, high = visual.aminmax()
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise RewardError(
                f"{name}: pixels must be in [0, 1], found {low:.3g} to {high:.3g} for {prompt!r}; NaN comes from the "
                "model that drew them: lower the learning rate, the guidance or eta"
            )


def check_prompts(name: str, visuals: Visuals, prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or len(prompts) != len(visuals):
        raise RewardError(f"{name}: one prompt per image or video, got {len(visuals)} and prompts {prompts!r:.80}")
