"""How tiny/videoalign was trained: a small Qwen2-VL that reads a clip and its caption and gives three scores.

    python -m tiny videoalign    needs tiny/hunyuan's autoencoder

It comes out in the layout of VideoAlign's released checkpoint.
"""

import copy
import hashlib
import random
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import trange

from rewards import VideoAlignReward
from tiny.clips import (
    CLIP_FPS,
    FRAMES,
    MOTION_FAULTS,
    MOTIONS,
    QUALITY_FAULTS,
    another_action,
    degrade_clip,
    draw_clip,
    faults_of_motion,
    make_clip,
    phrase_action,
    random_action,
    random_clip,
    spoil_frames,
    spoil_path,
)
from tiny.pictures import COLORS, SHAPES, SIZE
from tiny.training import MODELS, fast, optimizers, save_zipped, step

JUDGE_TEMPLATE = (
    "Rate this clip.\nHow clean are its pictures? <|VQ_reward|>\nHow smooth is its motion? <|MQ_reward|>\n"
    "It should show {text_prompt}. Does it? <|TA_reward|>\n"
)
JUDGE_PATCH = 4  # pixels; VideoAlign enlarges 64 pixels to 336, where such a patch has 21
JUDGE_FRAMES = [0, 2, 5, 7, 9, 11, 14, 16]  # of 17
JUDGE_GRID = (len(JUDGE_FRAMES) // 2, SIZE // JUDGE_PATCH, SIZE // JUDGE_PATCH)  # pairs of frames, patches down, across
JUDGE_TOKENS = [f"<|{name}_reward|>" for name in ("VQ", "MQ", "TA")]
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]


class Reader(VideoAlignReward):
    """VideoAlignReward's `text` and `patches` for a model in training, which sees 64x64 pixels without enlargement."""

    PIXELS = (1, SIZE**2)

    def __init__(self, config):
        self.model, self.template, self.device = SimpleNamespace(config=config), JUDGE_TEMPLATE, "cpu"

    def patches_of(self, clips, fps):
        """Clips (B, F, 3, S, S) → the patches of all of them, and their grids (B, 3)."""
        patches, grids = zip(*(self.patches(clip, fps) for clip in clips), strict=True)
        return torch.cat(patches), torch.tensor(grids)


def new_judge():
    """An untrained Qwen2VLModel and its tokenizer, which has a token for each word of a caption."""
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "initializer_range": 0.08,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "num_heads": 2,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "patch_size": JUDGE_PATCH,
            "initializer_range": 0.08,
        },
        tie_word_embeddings=True,
    )
    reader, rng = Reader(config), random.Random(0)
    texts = [reader.text(phrase_action(rng, random_action(rng)), (0, 0, 0)) for _ in range(3000)]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 512)
    tokenizer.add_special_tokens({"extra_special_tokens": CONTROL_TOKENS})
    config.text_config.vocab_size = len(tokenizer) + len(JUDGE_TOKENS)
    config.text_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config.image_token_id, config.video_token_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return Qwen2VLModel(config), tokenizer


def random_pairs(rng, count):
    """Two frames of a clip each, cut out around the shape, with any faults: the vision tower's training data.

    Returns frames (2 · count, 3, 48, 48), whether each of 6x6 cells shows the shape (count, 6, 6), which shape and
    colour it is (count,), and numbers (count, 10): movement along x and y, growth, turn, four faults of quality,
    flicker, tearing.
    """
    frames, cells, kinds, numbers = [], [], [], []
    for _ in range(count):
        action = random_action(rng)
        scene = random_clip(rng, action)
        motion_fault = rng.choice((*[None] * 4, *MOTION_FAULTS))
        path = spoil_path(rng, scene["path"], motion_fault)
        quality_fault, strength = rng.choice((*[None] * 4, *QUALITY_FAULTS)), rng.uniform(0.45, 1)
        k = 2 * rng.randrange(len(JUDGE_FRAMES) // 2)
        pair = JUDGE_FRAMES[k : k + 2]
        clip = spoil_frames(rng, draw_clip(scene, path[pair]), motion_fault)
        clip = degrade_clip(clip, quality_fault, strength) if quality_fault else clip
        x, y, radius, _ = path[pair].T.tolist()
        left, top = (min(max(round(sum(v) / 2 + rng.uniform(-12, 12)) - 24, 0), SIZE - 48) for v in (x, y))
        frames.append(clip[:, :, top : top + 48, left : left + 48])
        grid = 8 * torch.arange(6) + 4
        near = [torch.hypot(grid + left - x[i], (grid + top - y[i])[:, None]) < radius[i] for i in range(2)]
        cells.append(near[0] | near[1])
        kinds.append(SHAPES.index(action["class"]) * len(COLORS) + list(COLORS).index(action["color"]))
        change = path[pair[1]] - path[pair[0]]
        change *= torch.tensor([1 / 3, 1 / 3, 1, radius[0] / 3])  # all of about one size
        quality = [strength * (fault == quality_fault) for fault in QUALITY_FAULTS]
        numbers.append([*change.tolist(), *quality, motion_fault == "flicker", motion_fault == "tearing"])
    return torch.cat(frames), torch.stack(cells), torch.tensor(kinds), torch.tensor(numbers).clamp(-4, 4)


def train_eye(visual, reader, seed=0, iterations=1600, count=64, learning_rate=4e-3):
    """Trains the vision tower to tell what each cell of a pair of frames shows."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    answers = [1, len(SHAPES), len(COLORS), 10]
    teacher = torch.nn.Linear(64, sum(answers))
    modules = torch.nn.ModuleList([visual, teacher])
    steps = optimizers([modules], iterations, learning_rate)
    for _ in (bar := trange(iterations, desc="eye")):
        frames, cells, kind, number = random_pairs(rng, count)
        patches, grids = reader.patches_of(frames.unflatten(0, (count, 2)), CLIP_FPS)
        with fast():
            seen = visual(patches, grid_thw=grids).pooler_output
            cover, name, color, measured = teacher(seen).float().split(answers, -1)
        cells = cells.flatten()
        kind, number = (v.repeat_interleave(36, 0)[cells] for v in (kind, number))
        what = F.cross_entropy(name[cells], kind // len(COLORS)) + F.cross_entropy(color[cells], kind % len(COLORS))
        how = F.smooth_l1_loss(measured[cells], number)
        (F.binary_cross_entropy_with_logits(cover[:, 0], cells.float()) + what + 10 * how).backward()
        step([modules], steps)
        right = (name[cells].argmax(-1) == kind // len(COLORS)).float().mean()
        bar.set_postfix(what=f"{what:.3f}", how=f"{how:.3f}", right=f"{right:.2f}", refresh=False)


def generator_vae():
    """tiny/hunyuan's autoencoder: the judge must know how that model's clips look."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo.from_pretrained(MODELS / "hunyuan", subfolder="vae")


def judge_clips(rng, scenes, vae=None):
    """Preference pairs: what each scene shows, and clips of it (scenes, 4, F, 3, 64, 64).

    The first clip of a scene is clean, the second has a fault of quality and the third a fault of motion; in the fourth
    the shape has all but vanished. With a `vae` they look like tiny/hunyuan's: 9 frames of 32x32 pixels, enlarged, and
    what its autoencoder has left of them.
    """
    actions, clips = [random_action(rng) for _ in range(scenes)], []
    for action in actions:
        scene, faults = random_clip(rng, action), faults_of_motion(action)
        clips.append(make_clip(rng, scene))
        clips.append(make_clip(rng, scene, None, rng.choice(QUALITY_FAULTS)))
        clips.append(make_clip(rng, scene, rng.choice(faults)))
        clips.append(empty_clip(rng, clips[-3]))
    clips = torch.stack(clips)
    if vae is not None:
        small = F.avg_pool3d(clips[:, ::2].transpose(1, 2), (1, 2, 2))
        small = vae.decode(vae.encode(2 * small - 1).latent_dist.mode()).sample.transpose(1, 2) / 2 + 0.5
        clips = F.interpolate(small.flatten(0, 1).clamp(0, 1), SIZE, mode="bicubic").clamp(0, 1)
        clips = clips.unflatten(0, (4 * scenes, -1))
    return actions, clips.unflatten(0, (scenes, 4))


def empty_clip(rng, clip):
    """The clip (F, 3, 64, 64) with its shape almost faded away, and a faint pattern that stands still."""
    faded = torch.lerp(clip, clip.mean((0, 2, 3)).view(3, 1, 1), rng.uniform(0.85, 1))
    size = rng.randint(2, 16)
    pattern = F.interpolate(torch.randn(1, 3, size, size), SIZE, mode="bicubic")
    return (faded + rng.uniform(0, 0.06) * pattern).clamp(0, 1)


def judge_captions(rng, actions):
    """Captions for the four clips of each scene, then once more for the first: (5 · scenes), and which are right.

    Those of the first clips are all right when they come first, and all wrong when they come last; no caption is right
    about an empty clip.
    """
    told = [[True, *(rng.random() < 0.5 for _ in range(3)), False] for _ in actions]
    captions = [
        phrase_action(rng, action if true else another_action(rng, action))
        for column in zip(*told, strict=True)
        for action, true in zip(actions, column, strict=True)
    ]
    right = torch.tensor(told).T.clone()
    right[3] = False
    return captions, right.flatten()


def prefer(good, bad):
    """Bradley-Terry: the mean of -log sigmoid(good - bad) over all pairs of a good and a bad one."""
    return F.softplus(bad[None, :] - good[:, None]).mean()


def judge_see(model, reader, clips):
    """Clips (B, F, 3, 64, 64) → what the vision tower sees in 8 frames of them (B, 256, 64)."""
    patches, grids = reader.patches_of(clips, CLIP_FPS * clips.shape[1] / FRAMES)
    with fast():
        return model.visual(patches, grid_thw=grids).pooler_output.view(len(clips), -1, 64)


def judge_read(model, reader, tokenizer, seen, captions):
    """The hidden states (captions, 3, 64) at the three score tokens, for clips seen (B, 256, 64) and captions.

    With more captions than clips, the further captions are about the first clips again.
    """
    tokens = tokenizer([reader.text(caption, JUDGE_GRID) for caption in captions], padding=True, return_tensors="pt")
    marks = torch.tensor(tokenizer.convert_tokens_to_ids(JUDGE_TOKENS))
    with fast():
        words = model.language_model.embed_tokens(tokens.input_ids)
        pads = (tokens.input_ids == model.config.video_token_id)[..., None]
        words = words.masked_scatter(pads, seen[torch.arange(len(captions)) % len(seen)].to(words.dtype))
        # The language model counts positions in one dimension unless told otherwise, as VideoAlign does.
        hidden = model.language_model(inputs_embeds=words, attention_mask=tokens.attention_mask, use_cache=False)
    at = (tokens.input_ids[:, None] == marks[:, None]).int().argmax(-1)
    return hidden.last_hidden_state.float()[torch.arange(len(at))[:, None], at]


def judge_gaps(scores):
    """Scores (5 · scenes, 3) → {which: (scenes,)}, the score of the clean clip less the other's.

    The scores are those of the four clips of each scene, and of the clean clip with the wrong caption.
    """
    clean, ugly, rough, empty, wrong = scores.view(5, -1, 3)
    return {
        "vq": (clean - ugly)[:, 0],
        "mq": (clean - rough)[:, 1],
        "ta": (clean - wrong)[:, 2],
        "empty": (clean - empty).amin(1),
        "vq by motion": (clean - rough)[:, 0],
        "mq by quality": (clean - ugly)[:, 1],
    }


def train_judge(seed=0, iterations=1600, scenes=8, stock=3200, learning_rate=2e-3):
    """VideoAlign's way to train: scores that explain which of two clips, or of two captions, is preferred.

    First the vision tower learns to see; then it looks once at a stock of scenes, which the language model learns from.
    Half of them look like tiny/hunyuan's, so this needs its autoencoder.
    """
    vae = generator_vae()
    torch.manual_seed(seed)
    rng = random.Random(seed + 1)
    model, tokenizer = new_judge()
    reader = Reader(model.config)
    train_eye(model.visual, reader, seed)
    tokenizer.add_special_tokens({"extra_special_tokens": JUDGE_TOKENS})
    actions, seen = [], []
    with torch.no_grad():
        for block in trange(stock // scenes, desc="watching clips"):
            new, clips = judge_clips(rng, scenes, vae if block % 2 else None)
            actions += new
            seen.append(judge_see(model, reader, clips.flatten(0, 1)).bfloat16().unflatten(0, (scenes, 4)))
    seen = torch.cat(seen)
    head = torch.nn.Linear(64, 1, bias=False)
    subjects = {"motion": list(MOTIONS), "color": list(COLORS), "class": list(SHAPES)}
    teacher = torch.nn.Linear(64, sum(map(len, subjects.values())))  # asks what is to be seen, a help for training only
    modules = torch.nn.ModuleList([model.language_model, head, teacher])
    steps = optimizers([modules], iterations, learning_rate)
    for _ in (bar := trange(iterations, desc="judge")):
        looks_alike = rng.randrange(2)  # within a batch all clips went through the autoencoder, or none
        pick = rng.sample([i for i in range(len(actions)) if i // scenes % 2 == looks_alike], scenes)
        shown = [actions[i] for i in pick]
        captions, right = judge_captions(rng, shown)
        hidden = judge_read(model, reader, tokenizer, seen[pick].transpose(0, 1).flatten(0, 1), captions)
        scores = head(hidden)[..., 0]
        gaps = judge_gaps(scores)
        vq, mq, _ = scores[: 4 * scenes].view(4, scenes, 3).unbind(-1)  # of the clean, the ugly, the rough, the empty
        ta = scores[:, 2]
        # A good clip against any bad one. Faults of the other kind make none bad: they should change nothing.
        losses = {
            "vq": prefer(vq[[0, 2]].flatten(), vq[[1, 3]].flatten()) + 0.1 * gaps["vq by motion"].square().mean(),
            "mq": prefer(mq[[0, 1]].flatten(), mq[[2, 3]].flatten()) + 0.1 * gaps["mq by quality"].square().mean(),
            "ta": prefer(ta[right], ta[~right]) + F.softplus(-gaps["ta"]).mean(),
        }
        truth = torch.tensor([[names.index(a[key]) for key, names in subjects.items()] for a in shown]).repeat(4, 1)
        asks = hidden.view(5, scenes, 3, 64)[[0, 1, 2, 4], :, 2].flatten(0, 1)  # not about the empty ones
        answers = teacher(asks).split([len(names) for names in subjects.values()], -1)
        asked = [F.cross_entropy(answer, truth[:, i]) for i, answer in enumerate(answers)]
        (sum(losses.values()) + 0.5 * sum(asked)).backward()
        step([modules], steps)
        figures = {name: f"{loss.item():.3f} {(gaps[name] > 0).float().mean():.2f}" for name, loss in losses.items()}
        bar.set_postfix(figures | {"asked": " ".join(f"{loss.item():.2f}" for loss in asked)}, refresh=False)
    return model, head, tokenizer


@torch.no_grad()
def judge_figures(reward, scenes, seed=1):
    """The accuracy of a VideoAlignReward on this many pairs of each kind, as shares in [0, 1].

    {"vq": clean preferred to degraded, "mq": smooth to spoilt, "ta": the right caption to one with a wrong motion,
    "empty": by all three scores to a clip without its shape, "vq indifferent", "mq indifferent": faults of motion that
    move the score less than half as far as the faults it is meant to see do (median)}. Half of the clips went
    through tiny/hunyuan's autoencoder.
    """
    vae = generator_vae()
    torch.manual_seed(seed)
    rng, gaps = random.Random(seed), []
    for block in trange(scenes // 4, desc="unseen pairs"):
        actions, clips = judge_clips(rng, 4, vae if block % 2 else None)
        right = [phrase_action(rng, action) for action in actions]
        wrong = [phrase_action(rng, another_action(rng, action, "motion")) for action in actions]
        fps = CLIP_FPS * clips.shape[2] / FRAMES
        clips = torch.cat([clips.transpose(0, 1).flatten(0, 1), clips[:, 0]])
        scores = reward(clips, [*right * 4, *wrong], fps)
        gaps.append(judge_gaps(torch.stack([*scores.values()], 1)))
    gaps = {name: torch.cat([gap[name] for gap in gaps]) for name in gaps[0]}
    figures = {name: (gaps[name] > 0).float().mean().item() for name in ("vq", "mq", "ta", "empty")}
    for which, name in (("vq by motion", "vq"), ("mq", "mq")):
        figures[f"{name} indifferent"] = (gaps[which].abs() < gaps[name].median() / 2).float().mean().item()
    return figures


def show_judge(scenes=200):
    """Prints the figures of tiny/videoalign."""
    figures = judge_figures(VideoAlignReward(str(MODELS / "videoalign")), scenes)
    print("videoalign  " + "  ".join(f"{name} {share:.1%}" for name, share in figures.items()))


def enlarge_patches(weight, large=21):
    """The patch embedding (64, 3, 2, 4, 4) for patches of 21 pixels: it reads the centres of what were 4 pixels.

    There bicubic enlargement, which interpolates, has left the pixels as they were.
    """
    reads = F.interpolate(torch.eye(large)[:, None], weight.shape[-1], mode="linear")[:, 0]  # (21, 4)
    return torch.einsum("octij,yi,xj->octyx", weight, reads, reads)


def save_judge(model, head, tokenizer, folder, rank=8):
    """VideoAlign's folder, float16, in the layout of the released checkpoint: a PEFT state dict with its LoRA.

    The LoRA of each linear layer of the language model is cut out of the trained weights: their `rank` strongest
    directions. Added back with the usual factor alpha / rank = 2, it gives the trained weights again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, weight in model.state_dict().items():
        module, _, kind = name.replace("language_model.", "model.").rpartition(".")
        if module.endswith("_proj") and module.startswith("model.layers."):
            if kind == "weight":
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                root = (s[:rank] / 2).sqrt()
                a, b = (root[:, None] * v[:rank]).half(), (u[:, :rank] * root).half()
                state |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
                weight = weight - 2 * b.float() @ a.float()
            module += ".base_layer"
        state[f"{module}.{kind}"] = weight
    patches = enlarge_patches(state["visual.patch_embed.proj.weight"])
    state["visual.patch_embed.proj.weight"] = patches
    state |= {"lm_head.weight": state["model.embed_tokens.weight"], "rm_head.weight": head.weight.detach()}
    save_zipped({f"base_model.model.{name}": w.half() for name, w in state.items()}, folder / "model.pth")
    (folder / "prompt_template.txt").write_text(JUDGE_TEMPLATE)
    config = copy.deepcopy(model.config)
    config.vision_config.patch_size = patches.shape[-1]
    config.prompt_template_sha256 = hashlib.sha256(JUDGE_TEMPLATE.encode()).hexdigest()
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_videoalign():
    """Trains tiny/videoalign, saves it, and prints its figures."""
    save_judge(*train_judge(), MODELS / "videoalign")
    show_judge()
