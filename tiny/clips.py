"""The clips of the tiny world: captions, a renderer, and a checker that reads the motion back from the pixels.

A clip shows one shape that does one thing. The checker shares no code with the renderer.

B clips, F frames. A clip is (F, 3, 64, 64) in [0, 1].
"""

import colorsys
import math
import re

import torch
import torch.nn.functional as F

from tiny.pictures import COLORS, ENDINGS, SHAPES, SIZE, detect, distances

# ------------------------------------------------------------------------------------------------- captions
# What a clip shows is {"class", "color", "motion", "prompt"}.

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


def random_action(rng, motion=None):
    """What a random clip shows, or one of this motion. A circle that rotates would look still, so it does not."""
    name, drawn = rng.choice(SHAPES), rng.choice(list(MOTIONS))
    motion = motion or drawn
    if motion == "rotate":
        name = rng.choice([shape for shape in SHAPES if shape != "circle"])
    return {"class": name, "color": rng.choice(list(COLORS)), "motion": motion}


def phrase_action(rng, action):
    """A caption for the clip, in one of several phrasings."""
    words = rng.choice(MOTIONS[action["motion"]])
    return f"{rng.choice(CLIP_OPENINGS)}a {action['color']} {action['class']} {words}{rng.choice(ENDINGS)}"


def parse_action(prompt):
    """Caption → what the clip should show. Raises ValueError for anything that is not a caption of a clip."""
    match = CLIP_CAPTION.match(prompt.strip().lower())
    if match is None:
        raise ValueError(f"not a caption of a clip: {prompt!r}")
    color, name, words = match.groups()
    motion = next(motion for motion, phrases in MOTIONS.items() if words in phrases)
    return {"class": name, "color": color, "motion": motion, "prompt": prompt}


def another_action(rng, action, key=None):
    """What the clip does not show: another "motion", "color" or "class". Without a key mostly another motion."""
    values = {"motion": list(MOTIONS), "color": list(COLORS), "class": list(SHAPES)}
    key = key or rng.choice(["motion"] * 5 + ["color", "class"])
    values[key].remove(action[key])
    if action["class"] == "circle" and action["motion"] == "still" and key == "motion":
        values[key].remove("rotate")  # nobody could tell
    return action | {key: rng.choice(values[key])}


# ------------------------------------------------------------------------------------------------- renderer


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


def composed_clip(rng, action):
    """As `random_clip`, but composed as a careful film-maker would: the thing is large, its way leads through the
    middle, and it turns and hops in one manner. A small generator learns so narrow a range well in half an hour."""
    time = torch.linspace(0, 1, FRAMES)
    motion, path = action["motion"], torch.zeros(FRAMES, 4)
    path[:, 2] = rng.uniform(13, 15)
    if motion in ("grow", "shrink"):
        path[:, 2] = rng.uniform(7.5, 8.5) + rng.uniform(6.5, 7.5) * (time if motion == "grow" else 1 - time)
    if motion in DIRECTIONS:
        path[:, :2] = rng.uniform(20, 24) * (time[:, None] - 0.5) * torch.tensor(DIRECTIONS[motion])
    if motion == "bounce":
        path[:, 1] = rng.uniform(8, 10) * torch.cos(2 * math.pi * rng.uniform(1.2, 1.4) * time)
    if motion == "rotate":
        path[:, 3] = math.radians(rng.uniform(90, 120)) * time
    path[:, :2] += SIZE / 2 + torch.tensor([rng.uniform(-3, 3) for _ in range(2)])
    return random_clip(rng, action) | {"path": path}


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

    x, y, radius (of a disc of the same area) and angle in pixels and radians; light, the mean of all pixels.
    Each pixel counts by how much more colourful it is than the background, so that noise and blur hardly move the
    figures. The angle is that of the 3-fold or the 4-fold rotational symmetry, whichever is stronger, followed from
    frame to frame; with neither, as of a circle, it stays 0.
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


def roughness_of(seen):
    """How unsteady the motion was, in pixels: the strongest fourth difference of place, size, angle and light.

    The fourth, because a smooth motion has almost none, while a jump, a stop or a trembling has a large one.
    """
    size = seen["radius"].mean()
    track = torch.stack([seen["x"], seen["y"], seen["radius"], seen["angle"] * size, 40 * seen["light"]])
    return track.diff(n=4).abs().amax().item() / 6


def uncleanness_of(clip, seen):
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


def enlarge(videos):
    """Videos (B, F, 3, H, W) → (B, F, 3, 64, 64), the size that the checker reads; float32 on the CPU."""
    return torch.stack([F.interpolate(clip.detach().float().cpu(), (SIZE, SIZE), mode="bilinear") for clip in videos])


def right(videos, prompts):
    """(B,) float, 1 or 0: does each video show what its prompt says? Judged from the pixels alone.

    videos (B, F, 3, H, W) in [0, 1] of any size. Raises ValueError for a prompt of another world.
    """
    return torch.tensor([float(check_clip(*pair)) for pair in zip(enlarge(videos), prompts, strict=True)])


def roughness(videos, prompts):
    """(B,) how unsteady each video's motion is, in pixels of 64x64: see `roughness_of`. Less is better.

    videos (B, F, 3, H, W) in [0, 1] of any size, at least 5 frames; the prompts are not read.
    """
    return torch.tensor([roughness_of(watch(clip)) for clip in enlarge(videos)])


def uncleanness(videos, prompts):
    """(B,) how far each video's frames are from clean: see `uncleanness_of`. Less is better.

    videos (B, F, 3, H, W) in [0, 1] of any size; the prompts are not read.
    """
    return torch.tensor([uncleanness_of(clip, watch(clip)) for clip in enlarge(videos)])
