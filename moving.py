"""The moving world: clips of one shape that does one thing, a checker that reads them, and the tiny judge of clips.

    python tiny.py videoalign    trains tiny/videoalign from nothing and saves it
    python tiny.py check         prints how well checker and judge do, among the other figures of the tiny world

A checker shares no code with the drawing. The judge comes out in the layout of VideoAlign's released checkpoint.

B clips, F frames. A clip is (F, 3, 64, 64) in [0, 1].
"""

import colorsys
import copy
import hashlib
import math
import random
import re

import torch
import torch.nn.functional as F
from tqdm import trange

from tiny import CLIP_MEAN, CLIP_STD, COLORS, ENDINGS, HERE, SHAPES, SIZE, detect, fast, optimizers, save_zipped, step

# ------------------------------------------------------------------------------------------------- the moving world
# A clip shows one shape that does one thing. What it shows is {"class", "color", "motion", "prompt"}.

FRAMES, CLIP_FPS = 17, 4  # at 4 frames a second VideoAlign looks at 8 of 17
MOTIONS = {
    "left": ("moving left", "moving to the left", "sliding to the left"),
    "right": ("moving right", "moving to the right", "sliding to the right"),
    "up": ("moving up", "rising", "sliding up"),
    "down": ("moving down", "falling", "sliding down"),
    "bounce": ("bouncing", "bouncing up and down", "hopping up and down"),
    "rotate": ("rotating", "spinning", "turning around"),
    "grow": ("growing", "getting bigger", "becoming larger"),
    "shrink": ("shrinking", "getting smaller", "becoming smaller"),
    "still": ("standing still", "not moving", "staying in place"),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # y points down
CLIP_OPENINGS = ("", "a video of ", "a clip of ", "an animation of ")
CLIP_CAPTION = re.compile(
    rf"^(?:an? (?:video|clip|animation) of )?a ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    rf"({'|'.join(words for phrases in MOTIONS.values() for words in phrases)})(?: on a (?:plain|light) background)?$"
)
MOTION_FAULTS = ("jitter", "jumps", "flicker", "freezing", "tearing")
QUALITY_FAULTS = ("noise", "blur", "washed-out", "blockiness")


def random_action(rng):
    """What a random clip shows. A circle that rotates would look still, so it does not."""
    name, motion = rng.choice(SHAPES), rng.choice(list(MOTIONS))
    if motion == "rotate":
        name = rng.choice([shape for shape in SHAPES if shape != "circle"])
    return {"class": name, "color": rng.choice(list(COLORS)), "motion": motion}


def phrase_action(rng, action):
    """A caption for the clip, in one of several phrasings."""
    words = rng.choice(MOTIONS[action["motion"]])
    return f"{rng.choice(CLIP_OPENINGS)}a {action['color']} {action['class']} {words}{rng.choice(ENDINGS)}"


def parse_action(prompt):
    """Caption → what the clip should show. Raises ValueError for anything that is not a caption of the moving world."""
    match = CLIP_CAPTION.match(prompt.strip().lower())
    if match is None:
        raise ValueError(f"not a caption of the moving world: {prompt!r}")
    color, name, words = match.groups()
    motion = next(motion for motion, phrases in MOTIONS.items() if words in phrases)
    return {"class": name, "color": color, "motion": motion, "prompt": prompt}


def random_clip(rng, action):
    """A scene that moves: {"shape": index, "rgb", "light", "slope", "path": (F, 4) of x, y, radius, angle}."""
    time = torch.linspace(0, 1, FRAMES)
    motion, radius = action["motion"], rng.uniform(9, 13)
    path = torch.zeros(FRAMES, 4)
    path[:, 2] = radius
    if motion in ("grow", "shrink"):
        small, large = rng.uniform(5.5, 7.5), rng.uniform(12.5, 15.5)
        radius, rising = large, time if motion == "grow" else 1 - time
        path[:, 2] = small + (large - small) * rising
    if motion in DIRECTIONS:
        path[:, :2] = rng.uniform(18, 30) * time[:, None] * torch.tensor(DIRECTIONS[motion])
    if motion == "bounce":
        hops, start = rng.uniform(1, 1.6), rng.choice((0, 0.5))
        path[:, 1] = rng.uniform(7, 10) * torch.cos(2 * math.pi * (hops * time + start))
    if motion == "rotate":
        path[:, 3] = math.radians(rng.uniform(80, 130)) * rng.choice((-1, 1)) * time
    for axis in range(2):  # anywhere, as long as it stays in the picture
        low, high = (f(path[:, axis]).item() for f in (torch.min, torch.max))
        path[:, axis] += rng.uniform(radius + 1.5 - low, SIZE - radius - 1.5 - high)
    light = 0.86 + 0.10 * rng.random()
    return {
        "shape": SHAPES.index(action["class"]),
        "rgb": [c + rng.uniform(-0.04, 0.04) for c in COLORS[action["color"]]],
        "light": [light + rng.gauss(0, 0.015) for _ in range(3)],
        "slope": [rng.gauss(0, 0.03) for _ in range(2)],
        "path": path,
    }


def faults_of_motion(action):
    """The faults that can be seen in this motion: what stands still cannot freeze."""
    return [fault for fault in MOTION_FAULTS if (fault, action["motion"]) != ("freezing", "still")]


def spoil_path(rng, path, fault):
    """The path (F, 4) with a fault in its motion: jitter, jumps or freezing. Other faults leave it as it is."""
    path, radius = path.clone(), path[:, 2].max().item()
    room = (radius, SIZE - radius)
    if fault == "jitter":
        reach = rng.uniform(2.5, 4.5)
        shaken = torch.tensor([[rng.uniform(-reach, reach) for _ in range(2)] for _ in range(FRAMES)])
        path[:, :2] = (path[:, :2] + shaken).clamp(*room)
    if fault == "jumps":
        for start in sorted(rng.sample(range(2, FRAMES - 1), 3)):
            shift = torch.zeros(2)
            while shift.norm() < 12:  # to anywhere else, at least 12 pixels away
                shift = torch.tensor([rng.uniform(*room) for _ in range(2)]) - path[start, :2]
            path[start:, :2] = (path[start:, :2] + shift).clamp(*room)
    if fault == "freezing":  # two stops, and all that was missed is caught up at once
        for start in (rng.randint(1, 3), rng.randint(9, 10)):
            path[start : start + rng.randint(5, 6)] = path[start]
    return path


def draw_clip(scene, path=None):
    """A scene as a clip (F, 3, 64, 64) in [0, 1]; path (F, 4) instead of the scene's own."""
    x, y, radius, angle = (scene["path"] if path is None else path).T[:, :, None, None]
    grid = torch.arange(SIZE) + 0.5
    right, down = grid[None, None, :] - x, grid[None, :, None] - y
    dx, dy = right * angle.cos() + down * angle.sin(), down * angle.cos() - right * angle.sin()
    cover = (0.5 - distances(dx, dy, radius)[scene["shape"]]).clamp(0, 1)[:, None]
    ramp = torch.linspace(-1, 1, SIZE)
    slope = scene["slope"][0] * ramp[None, :] + scene["slope"][1] * ramp[:, None]
    light, rgb = (torch.tensor(scene[name]).view(3, 1, 1) for name in ("light", "rgb"))
    return ((light + slope) * (1 - cover) + rgb * cover).clamp(0, 1)


def distances(dx, dy, radius):
    """Signed distances in pixels to the edge of each shape, by the offsets from its centre. In the order of SHAPES."""
    ax, ay = dx.abs(), dy.abs()
    side, bar, tip = 0.9 * radius, 0.36 * radius, 1.15 * radius
    below = dy + 0.25 * tip  # the triangle hangs around its centroid, not the middle of its box
    return (
        torch.hypot(dx, dy) - radius,
        torch.maximum(ax - side, ay - side),
        torch.maximum(below, math.sqrt(0.75) * ax - 0.5 * below) - 0.5 * tip,
        torch.minimum(torch.maximum(ax - radius, ay - bar), torch.maximum(ax - bar, ay - radius)),
    )


def spoil_frames(rng, clip, fault):
    """The clip (F, 3, 64, 64) with frames that flicker or are torn. Other faults leave it as it is."""
    clip = clip.clone()
    if fault == "flicker":
        gain = torch.tensor([rng.choice((1.0, rng.uniform(0.45, 0.75))) for _ in range(len(clip))])
        clip *= gain.view(-1, 1, 1, 1)
    if fault == "tearing":
        for i in range(len(clip)):
            if rng.random() < 0.7:
                row, shift = rng.randint(8, SIZE - 8), rng.choice((-1, 1)) * rng.randint(7, 14)
                clip[i, :, row:] = clip[i, :, row:].roll(shift, -1)
    return clip


def degrade_clip(clip, fault, strength):
    """The clip (F, 3, 64, 64) with every frame noisy, blurred, washed out or blocky; strength in (0, 1]."""
    small = F.avg_pool2d(clip, 4)
    worst = {
        "noise": clip + 0.25 * torch.randn_like(clip),
        "blur": F.interpolate(small, SIZE, mode="bilinear"),
        "washed-out": 0.75 * clip.mean((0, 2, 3)).view(3, 1, 1) + 0.25 * clip,
        "blockiness": F.interpolate(small, SIZE),
    }
    return torch.lerp(clip, worst[fault], strength).clamp(0, 1)


def make_clip(rng, scene, motion_fault=None, quality_fault=None):
    """A scene as a clip (F, 3, 64, 64) in [0, 1] with the given faults, or none."""
    clip = draw_clip(scene, spoil_path(rng, scene["path"], motion_fault))
    clip = spoil_frames(rng, clip, motion_fault)
    return degrade_clip(clip, quality_fault, rng.uniform(0.45, 1)) if quality_fault else clip


# ------------------------------------------------------------------------------------------------- checker of clips


def watch(clip):
    """What is seen in each frame of a clip (F, 3, 64, 64): a dictionary of (F,) tensors, and the colour.

    x, y, radius (of a disc of the same area) and angle in pixels and radians; light, the mean of all pixels; rest,
    the share of colour that lies away from the shape. Each pixel counts by how much more colourful it is than the
    background, so that noise and blur hardly move the figures. The angle is that of the 3-fold or the 4-fold
    asymmetry, whichever is stronger, followed from frame to frame; without asymmetry it stays 0.
    """
    clip = clip.detach().float().cpu()
    smooth = F.avg_pool2d(clip, 5, 1, 2, count_include_pad=False)
    chroma = smooth.amax(1) - smooth.amin(1)  # (F, 64, 64)
    peak, floor = chroma.flatten(1).quantile(0.995, 1), chroma.flatten(1).median(1).values
    threshold = floor + 0.25 * (peak - floor)
    weight = ((chroma - threshold.view(-1, 1, 1)) / (peak - threshold).clamp(min=1e-3).view(-1, 1, 1)).clamp(0, 1)
    mass = weight.sum((1, 2)).clamp(min=1e-6)
    grid = torch.arange(SIZE) + 0.5
    x, y = (weight.sum(1) @ grid) / mass, (weight.sum(2) @ grid) / mass
    place = torch.complex(
        (grid - x[:, None])[:, None, :].expand_as(weight), (grid - y[:, None])[:, :, None] + 0 * weight
    )
    folds = [(weight * place**k).sum((1, 2)) / (weight * place.abs() ** k).sum((1, 2)).clamp(min=1e-6) for k in (3, 4)]
    k = 3 if folds[0].abs().median() > folds[1].abs().median() else 4
    turn = (folds[k - 3][1:] * folds[k - 3][:-1].conj()).angle() / k
    angle = torch.cat([torch.zeros(1), turn.cumsum(0)]) * (folds[k - 3].abs().median() > 0.08)
    r, g, b = ((weight[:, None] * clip).sum((0, 2, 3)) / mass.sum()).tolist()
    hue = colorsys.rgb_to_hsv(r, g, b)[0]
    color = min(COLORS, key=lambda name: abs((hue - colorsys.rgb_to_hsv(*COLORS[name])[0] + 0.5) % 1 - 0.5))
    return {
        "x": x,
        "y": y,
        "radius": (mass / math.pi).sqrt(),
        "angle": angle,
        "light": clip.mean((1, 2, 3)),
        "color": color,
    }


def read_motion(seen):
    """Which of MOTIONS was seen, or None if it is none of them clearly."""
    x, y, radius, angle = (seen[name].unfold(0, 3, 1).median(1).values for name in ("x", "y", "radius", "angle"))
    dx, dy, turn = ((v[-1] - v[0]).item() for v in (x, y, angle))
    growth = (radius[-1] / radius[0]).log().item()
    back = y.diff().abs().sum().item() - abs(dy)  # how far it went only to come back
    if abs(growth) > 0.35:
        return "grow" if growth > 0 else "shrink"
    if back > 8 and abs(dx) < 6:
        return "bounce"
    if math.hypot(dx, dy) > 9:
        axis, other = (dx, dy) if abs(dx) > abs(dy) else (dy, dx)
        name = ("right", "left") if axis == dx else ("down", "up")
        return name[axis < 0] if abs(axis) > 2.2 * abs(other) else None
    if math.hypot(dx, dy) < 7:
        return "rotate" if abs(turn) > math.radians(45) else "still" if abs(turn) < math.radians(20) else None
    return None


def roughness(seen):
    """How unsteady the motion was, in pixels: the strongest fourth difference of place, size, angle and light.

    The fourth, because a smooth motion has almost none, while a jump, a stop or a trembling has a large one.
    """
    size = seen["radius"].mean()
    track = torch.stack([seen["x"], seen["y"], seen["radius"], seen["angle"] * size, 40 * seen["light"]])
    return track.diff(n=4).abs().amax().item() / 6


def uncleanness(clip, seen):
    """How far the frames are from clean, 0 for clean: noise, blur, paleness and blocks, measured at the pixels."""
    clip = clip.detach().float().cpu()
    across, down = clip.diff(dim=-1).abs(), clip.diff(dim=-2).abs()
    noise = (across[..., 1:] - across[..., :-1]).abs().median() + (down[..., 1:, :] - down[..., :-1, :]).abs().median()
    high, low = (clip.flatten(2).quantile(q, 2) for q in (0.99, 0.01))  # (F, 3)
    contrast = (high - low).amax(1).clamp(min=1e-3)  # (F,)
    steepest = torch.maximum(across.amax(1).flatten(1).quantile(0.995, 1), down.amax(1).flatten(1).quantile(0.995, 1))
    blur = (1 - steepest / contrast).clamp(min=0).mean()
    full = max(COLORS[seen["color"]]) - min(COLORS[seen["color"]])
    pale = (1 - (clip.amax(1) - clip.amin(1)).flatten(1).quantile(0.97, 1) / full).clamp(min=0).mean()
    steps = torch.stack([across.mean((0, 1, 2)), down.mean((0, 1, 3))])  # at the boundaries 1 … 63 of columns, rows
    phases = torch.stack([steps[:, phase::4].mean(1) for phase in (3, 0, 1, 2)]).clamp(min=1e-4)
    blocks = (phases[0] / phases[1:].amax(0)).log().clamp(min=0).amin()
    return (20 * noise + 2 * blur + 2 * pale + blocks).item()


def check_clip(clip, prompt):
    """Does the clip (F, 3, 64, 64) show what the caption says? From the pixels alone.

    The shape is the one read most often; if it rotates, in the first frame only, since `detect` knows upright shapes.
    """
    wanted, seen = parse_action(prompt), watch(clip)
    if read_motion(seen) != wanted["motion"] or seen["color"] != wanted["color"]:
        return False
    frames = clip[:1] if wanted["motion"] == "rotate" else clip[::4]
    shapes = [objects[0]["class"] for objects in detect(frames) if objects]
    return bool(shapes) and max(shapes, key=shapes.count) == wanted["class"]


def show_checker(count=300, seed=1):
    """Prints how well the checker of clips agrees with the renderer."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    right, wrong, steady, rough, uglier = 0, 0, [], [], 0
    for _ in trange(count, desc="clips"):
        action = random_action(rng)
        scene = random_clip(rng, action)
        clip, ugly = make_clip(rng, scene), make_clip(rng, scene, None, rng.choice(QUALITY_FAULTS))
        right += check_clip(clip, phrase_action(rng, action))
        wrong += check_clip(clip, phrase_action(rng, another_action(rng, action)))
        steady.append(roughness(watch(clip)))
        rough.append(roughness(watch(make_clip(rng, scene, rng.choice(faults_of_motion(action))))))
        uglier += uncleanness(ugly, watch(ugly)) > uncleanness(clip, watch(clip))
    print(f"captions: {right / count:.1%} of {count} right ones accepted, {wrong / count:.1%} of as many wrong ones")
    print(f"roughness: at most {max(steady):.2f} of smooth clips, at least {min(rough):.2f} of spoilt ones")
    print(f"uncleanness: higher for {uglier / count:.1%} of degraded clips")


# ------------------------------------------------------------------------------------------------- VideoAlign
# A small Qwen2-VL that reads a clip and its caption and gives three scores at three special tokens.

JUDGE_TEMPLATE = (
    "Rate this clip.\nHow clean are its pictures? <|VQ_reward|>\nHow smooth is its motion? <|MQ_reward|>\n"
    "It should show {text_prompt}. Does it? <|TA_reward|>\n"
)
JUDGE_PATCH = 4  # pixels; VideoAlign enlarges 64 pixels to 336, where such a patch has 21
JUDGE_FRAMES = [0, 2, 5, 7, 9, 11, 14, 16]  # of 17
JUDGE_TOKENS = [f"<|{name}_reward|>" for name in ("VQ", "MQ", "TA")]
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]


def judge_text(caption):
    """What VideoAlign reads about a clip of 64x64 pixels; four pairs of frames of 8x8 tokens each."""
    pads = "<|video_pad|>" * (len(JUDGE_FRAMES) // 2 * (SIZE // JUDGE_PATCH // 2) ** 2)
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>"
        f"{JUDGE_TEMPLATE.replace('{text_prompt}', caption)}<|im_end|>\n<|im_start|>assistant\n"
    )


def judge_patches(frames):
    """Pairs of frames (2 · N, 3, S, S) in [0, 1] → patches (N · (S/4)², 3 · 2 · 4 · 4), in Qwen2-VL's order."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    p, n = JUDGE_PATCH, frames.shape[-1] // JUDGE_PATCH // 2
    frames = ((frames - mean) / std).view(-1, 2, 3, n, 2, p, n, 2, p)
    return frames.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * 2 * p * p)


def new_judge():
    """An untrained Qwen2VLModel and its tokenizer, which has a token for each word of a caption."""
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLModel

    rng = random.Random(0)
    texts = [judge_text(phrase_action(rng, random_action(rng))).replace("<|video_pad|>", "") for _ in range(3000)]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, 512)
    tokenizer.add_special_tokens({"extra_special_tokens": CONTROL_TOKENS})
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + len(JUDGE_TOKENS),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "initializer_range": 0.08,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
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
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        tie_word_embeddings=True,
    )
    return Qwen2VLModel(config), tokenizer


def random_pairs(rng, count):
    """Two frames of a clip each, cut out around the shape, with any faults: what the eye of the judge is taught on.

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


def train_eye(visual, seed=0, iterations=1600, count=64, learning_rate=4e-3):
    """Teaches the vision tower what is to be seen in each cell of a pair of frames."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    answers = [1, len(SHAPES), len(COLORS), 10]
    teacher = torch.nn.Linear(64, sum(answers))
    modules = torch.nn.ModuleList([visual, teacher])
    steps = optimizers([modules], iterations, learning_rate)
    grid = torch.tensor([[1, 12, 12]] * count)
    for _ in (bar := trange(iterations, desc="eye")):
        frames, cells, kind, number = random_pairs(rng, count)
        with fast():
            seen = visual(judge_patches(frames), grid_thw=grid).pooler_output
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
    """tiny/hunyuan's autoencoder, without which the judge would not know how that model's clips look."""
    from diffusers import AutoencoderKLHunyuanVideo

    return AutoencoderKLHunyuanVideo.from_pretrained(HERE / "tiny/hunyuan", subfolder="vae")


def judge_clips(rng, scenes, vae=None):
    """Preference pairs from the moving world: what each scene shows, and clips of it (scenes, 4, F, 3, 64, 64).

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
    """The clip (F, 3, 64, 64) with its shape faded away, or nearly, and instead a faint pattern that stands still."""
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


def another_action(rng, action, key=None):
    """What the clip does not show: another "motion", "color" or "class". Without a key mostly another motion."""
    values = {"motion": list(MOTIONS), "color": list(COLORS), "class": list(SHAPES)}
    key = key or rng.choice(["motion"] * 5 + ["color", "class"])
    values[key].remove(action[key])
    if action["class"] == "circle" and action["motion"] == "still" and key == "motion":
        values[key].remove("rotate")  # nobody could tell
    return action | {key: rng.choice(values[key])}


def prefer(good, bad):
    """Bradley-Terry: the mean of -log sigmoid(good - bad) over all pairs of a good and a bad one."""
    return F.softplus(bad[None, :] - good[:, None]).mean()


def judge_see(model, clips):
    """Clips (B, F, 3, 64, 64) → what the vision tower sees in 8 frames of them (B, 256, 64)."""
    with fast():
        frames = torch.linspace(0, clips.shape[1] - 1, len(JUDGE_FRAMES)).round().long()
        patches = judge_patches(clips[:, frames].flatten(0, 1))
        grid = torch.tensor([[len(JUDGE_FRAMES) // 2, SIZE // JUDGE_PATCH, SIZE // JUDGE_PATCH]] * len(clips))
        return model.visual(patches, grid_thw=grid).pooler_output.view(len(clips), -1, 64)


def judge_read(model, tokenizer, seen, captions):
    """What the model makes of clips seen (B, 256, 64) and captions: hidden states (captions, 3, 64) at the scores.

    With more captions than clips, the further captions are about the first clips again.
    """
    tokens = tokenizer([judge_text(caption) for caption in captions], padding=True, return_tensors="pt")
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
    train_eye(model.visual, seed)
    tokenizer.add_special_tokens({"extra_special_tokens": JUDGE_TOKENS})
    actions, seen = [], []
    with torch.no_grad():
        for block in trange(stock // scenes, desc="watching clips"):
            new, clips = judge_clips(rng, scenes, vae if block % 2 else None)
            actions += new
            seen.append(judge_see(model, clips.flatten(0, 1)).bfloat16().unflatten(0, (scenes, 4)))
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
        hidden = judge_read(model, tokenizer, seen[pick].transpose(0, 1).flatten(0, 1), captions)
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
    """How good a VideoAlignReward is on so many pairs of each kind, as shares in [0, 1].

    {"vq": clean preferred to degraded, "mq": smooth to spoilt, "ta": the right caption to one with a wrong motion,
    "empty": by all three scores to a clip without its shape, "vq indifferent", "mq indifferent": faults of motion that
    move the score by less than half of what the faults it is meant for move it by (median)}. Half of the clips went
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
    from rewards import VideoAlignReward

    figures = judge_figures(VideoAlignReward(str(HERE / "tiny/videoalign")), scenes)
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
    save_judge(*train_judge(), HERE / "tiny/videoalign")
    show_judge()


def report():
    """Prints how often the checker of clips agrees with the renderer, and how good the judge of clips is."""
    show_checker()
    show_judge()
