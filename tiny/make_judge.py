"""How tiny/judge was trained: a convolutional network that tells what is true of a picture.

python -m tiny judge

It learns from the renderer's labels alone. It never saw a generator's picture, CLIP, HPS or the checker's verdicts, so
it is a second judge of pictures, independent of all of them: `--metrics tiny/make_judge.py:judged`. A network of
another seed, runs/tiny/labeller, tells HPS in its training what is true of the pictures that generators draw.
"""

import functools
import itertools
import random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import trange

from tiny.make_image_models import load_vae
from tiny.pictures import (
    COLORS,
    NUMBERS,
    RELATIONS,
    SHAPES,
    SIZE,
    TAGS,
    composed_scene,
    degrade,
    hard_negatives,
    holds,
    make_metadata,
    parse,
    random_metadata,
    random_scene,
    render,
    scene_objects,
)
from tiny.training import CLEAN, MODELS, Pool, fast

JUDGE, LABELLER = MODELS / "judge", CLEAN / "labeller"


def facts():
    """Everything simple that can be true of a scene, as metadata: a shape's presence, colour, number, relation."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    one = [make_metadata("single_object", [{"class": a, "count": 1}]) for a in SHAPES]
    one += [make_metadata("colors", [{"class": a, "count": 1, "color": c}]) for a in SHAPES for c in COLORS]
    one += [make_metadata("counting", [{"class": a, "count": n}]) for a in SHAPES for n in NUMBERS.values()]
    return one + [
        make_metadata("position", [{"class": a, "count": 1}, {"class": b, "count": 1, "position": [relation, 0]}])
        for a, b in pairs
        for relation in RELATIONS
    ]


FACTS = facts()


def asserted(metadata):
    """Which of the FACTS a caption states, as a list of 0 and 1."""
    if metadata["tag"] in ("two_object", "color_attr"):
        parts = [{"include": [item]} for item in metadata["include"]]
    else:
        parts = [metadata]
    stated = [part["include"] for part in parts]
    kind = {"two_object": "single_object", "color_attr": "colors"}.get(metadata["tag"], metadata["tag"])
    return [float(fact["tag"] == kind and fact["include"] in stated) for fact in FACTS]


def new_judge():
    """The untrained network: images (B, 3, 64, 64) in [0, 1] → logits (B, facts) of what is true of each."""
    widths, layers = (3, 32, 64, 96, 128), []
    for a, b in itertools.pairwise(widths):  # 64 → 4 pixels
        layers += [nn.Conv2d(a, b, 5 if a == 3 else 3, 2, 2 if a == 3 else 1), nn.GroupNorm(8, b), nn.SiLU()]
        layers += [nn.Conv2d(b, b, 3, 1, 1), nn.GroupNorm(8, b), nn.SiLU()] * (a > 3)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * widths[-1], 128), nn.SiLU(), nn.Linear(128, len(FACTS)))


def spoil_colors(rng, scenes, share):
    """Gives a share of the shapes a second colour or a colour between two, in place; half of these so little of it that
    nothing changes.

    scenes: lists of rows. Returns the colours `second` that `render` takes, and for each scene the objects
    {"class", "color", "box"} that it shows. A shape with two colours, or one between two, is none.
    """
    second, objects = torch.tensor(scenes)[..., 1:4], [scene_objects(scene) for scene in scenes]
    for i, found in enumerate(objects):
        for k, item in enumerate(found):
            if rng.random() >= share:
                continue
            other = rng.choice([rgb for name, rgb in COLORS.items() if name != item["color"]])
            much, two = rng.random() < 0.5, rng.random() < 0.5
            mix = rng.uniform(0.6, 1) if much and two else rng.uniform(0.42, 0.5) if much else rng.uniform(0, 0.15)
            mixed = [a + mix * (b - a) for a, b in zip(scenes[i][k][1:4], other, strict=True)]
            second[i, k] = torch.tensor(mixed)
            if not two:
                scenes[i][k][1:4] = mixed
            if much:
                item["class"] = None
    return second, objects


def labelled_pictures(vae, rng, count):
    """Pictures (count, 3, 64, 64), and which FACTS are true of them (count, facts). A pale picture shows nothing."""
    asked = [random_metadata(rng, TAGS[i % len(TAGS)]) for i in range(count)]
    scenes = [rng.choice((random_scene, composed_scene))(rng, metadata) for metadata in asked]
    second, objects = spoil_colors(rng, scenes, share=0.35)
    pictures = render(scenes, (torch.rand(count) < 0.2) * 1.5 * torch.rand(count), second=second)
    some = torch.rand(count, 1, 1, 1)
    pictures = torch.where(some < 0.2, degrade(pictures, 0.6 * torch.rand(count) + 0.01), pictures)
    pale = torch.rand(count) < 0.15
    lost = torch.where(pale, 0.5 + 0.35 * torch.rand(count), 0.25 * torch.rand(count)).view(-1, 1, 1, 1)
    pictures = torch.lerp(pictures, pictures.mean((2, 3), keepdim=True), lost)
    z = vae.encode(pictures * 2 - 1).latent_dist.mode()
    decoded = vae.decode(z + 0.3 * torch.rand(count, 1, 1, 1) * torch.randn_like(z)).sample / 2 + 0.5
    pictures = torch.where(some % 0.1 < 0.07, decoded.clamp(0, 1), pictures)
    true = torch.tensor([[float(holds(o, fact)) for fact in FACTS] for o in objects])
    return pictures, true * ~pale[:, None]


def train_judge(seed, iterations=2000, batch=96):
    """A judge, by binary cross-entropy on each of the FACTS."""
    torch.manual_seed(seed)
    pool = Pool(functools.partial(labelled_pictures, load_vae()), seed, size=8192, chunk=256, fresh=32)
    model = new_judge()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc="judge")):
        pictures, true = pool.batch(batch)
        with fast():
            logits = model(pictures)
        loss = F.binary_cross_entropy_with_logits(logits.float(), true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return model.eval()


@functools.cache
def load_judge(folder=JUDGE):
    """The trained network, float32."""
    model = new_judge()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.float().eval()


@torch.no_grad()
def true_facts(model, images):
    """(B, facts) bool: what the judge finds true of images (B, 3, 64, 64) in [0, 1]."""
    return torch.cat([model(part) for part in images.split(256)]) > 0


def judged(images, prompts):
    """(B,) float, 1 or 0: does each image show what its prompt asks for, by tiny/judge?

    images (B, 3, H, W) in [0, 1] of any size. Raises ValueError for a prompt of another world.
    """
    images = F.interpolate(images.detach().float().cpu(), (SIZE, SIZE), mode="bilinear")
    stated = torch.tensor([asserted(parse(prompt)) for prompt in prompts])
    return (stated <= true_facts(load_judge(), images)).all(1).float()


@torch.no_grad()
def accuracy(model, count, seed=6):
    """Shares of captions accepted on fresh scenes as generators compose them: the right one, one with an attribute
    changed, and the right one of a scene whose shapes have two colours each."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    asked = [random_metadata(rng, TAGS[i % len(TAGS)]) for i in range(count)]
    wrong = [rng.choice(hard_negatives(metadata)) for metadata in asked]
    scenes = torch.tensor([composed_scene(rng, metadata) for metadata in asked])
    second = torch.tensor(list(COLORS.values())).roll(3, 0)  # the opposite hue
    second = second[torch.cdist(scenes[..., 1:4], torch.tensor(list(COLORS.values()))).argmin(-1)]

    def accepted(pictures, captions):
        stated = torch.tensor([asserted(metadata) for metadata in captions])
        return (stated <= true_facts(model, pictures)).all(1).float().mean().item()

    pure = render(scenes)
    spoilt = torch.cat([render(a, second=b) for a, b in zip(scenes.split(20), second.split(20), strict=True)])
    return {
        "correct captions accepted": accepted(pure, asked),
        "wrong captions accepted": accepted(pure, wrong),
        "spoilt colours accepted": accepted(spoilt, asked),
    }


def save_judge(model, folder):
    """The weights, float16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half() for name, value in model.state_dict().items()}, folder / "model.safetensors")


def make_judge():
    """Trains tiny/judge, and runs/tiny/labeller, and saves them."""
    save_judge(train_judge(seed=20), LABELLER)
    save_judge(train_judge(seed=21), JUDGE)
