"""How tiny/clip and tiny/hps were trained.

python -m tiny clip    needs tiny/sd, tiny/flux, and runs/tiny/labeller, which `python -m tiny judge` makes
python -m tiny hps     needs tiny/clip beside them

They learn from rendered scenes first. Then they see what generators draw, and what the labeller says about it. HPS also
sees what policies draw that were trained with it.
"""

import functools
import json
import math
import random

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, StableDiffusionPipeline
from tqdm import trange

import grpo_flux
import grpo_sd
from rewards import CLIP_MEAN, CLIP_STD
from runtime.options import latest_checkpoint, parse_config
from tiny.make_image_models import heldout, load_vae
from tiny.make_judge import FACTS, LABELLER, asserted, load_judge, true_facts
from tiny.pictures import (
    COLORS,
    SHAPES,
    SIZE,
    TAGS,
    composed_scene,
    degrade,
    hard_negatives,
    holds,
    patch_labels,
    phrase,
    random_metadata,
    random_scene,
    render,
    scene_objects,
)
from tiny.training import CLEAN, MODELS, fast, sample, save_zipped

CLIP_CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": 5, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
WORDS = 24  # tokens that a caption needs at most; the text tower is causal, so training may leave out the padding


def new_clip(words):
    """The open_clip model that reads this many tokens."""
    import open_clip

    text = open_clip.CLIPTextCfg(**CLIP_CONFIG["text_cfg"] | {"context_length": words})
    return open_clip.CLIP(CLIP_CONFIG["embed_dim"], open_clip.CLIPVisionCfg(**CLIP_CONFIG["vision_cfg"]), text)


@functools.cache
def clip_tokens(caption):
    """The 24 token ids of CLIP's own vocabulary. Not a tensor: many small ones would fragment the heap."""
    import open_clip

    return tuple(open_clip.tokenize([caption])[0, :WORDS].tolist())


def clip_features(model, images, captions):
    """Normalised features (B, 128) of images in [0, 1] and (N, 128) of captions; the norm of CLIP's pixels included."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    tokens = torch.tensor([clip_tokens(caption) for caption in captions])
    image, text = model.encode_image((images - mean) / std), model.encode_text(tokens)
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def clip_state(model):
    """Float16 weights with the full 77 positions. The embeddings of unused words are 0, so that they compress well."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    used = torch.zeros(len(state["token_embedding.weight"]), dtype=torch.bool)
    rng = random.Random(0)
    for _ in range(20000):
        used[list(clip_tokens(phrase(rng, random_metadata(rng, rng.choice(TAGS)))))] = True
    state["token_embedding.weight"][~used] = 0
    state["positional_embedding"] = F.pad(state["positional_embedding"][:WORDS], (0, 0, 0, 77 - WORDS))
    return {name: value.half() for name, value in state.items()}


def save_clip(model, folder):
    """open_clip's folder: open_clip_config.json and open_clip_pytorch_model.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "squash"}
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": {"size": [SIZE, SIZE], **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_zipped(clip_state(model), folder / "open_clip_pytorch_model.bin")


def save_hps(model, folder):
    """HPS-v2.1's layout: {"state_dict": …} in one .pt file, and the architecture beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ViT-tiny-hps.json").write_text(json.dumps(CLIP_CONFIG, indent=2) + "\n")
    save_zipped({"state_dict": clip_state(model)}, folder / "HPS_tiny.pt")


def load_clip(path):
    """The float32 model with the weights in this file of tiny/clip or tiny/hps."""
    state = torch.load(path, weights_only=True)
    state = {name: value.float() for name, value in state.get("state_dict", state).items()}
    state["positional_embedding"] = state["positional_embedding"][:WORDS]
    model = new_clip(WORDS)
    model.load_state_dict(state)
    return model


def caption_batch(rng, scenes, wrong=4):
    """Pairs of scenes whose captions differ in one attribute, and more wrong captions for each.

    Returns images (B, 3, 64, 64), rows (B, 4, 7), captions (B right ones, then wrong·B: scene by scene), truth (B, B):
    whether a scene's caption is true of another scene, and what is true of each scene and stated by each caption
    among FACTS (B, facts), (B + wrong·B, facts).
    """
    wanted, others, rows = [], [], []
    for i in range(scenes):
        tag = rng.choices(TAGS, (1, 1, 2, 1, 6, 3))[0]  # the last two are the hardest to learn
        metadata = random_metadata(rng, tag) if i % 2 == 0 else rng.choice(hard_negatives(wanted[-1]))
        wanted.append(metadata)
        others += rng.choices(hard_negatives(metadata), k=wrong)
        rows.append(random_scene(rng, metadata))
    objects = [scene_objects(scene) for scene in rows]
    truth = torch.tensor([[holds(o, metadata) for metadata in wanted] for o in objects])
    seen = torch.tensor([[float(holds(o, fact)) for fact in FACTS] for o in objects])
    said = torch.tensor([asserted(metadata) for metadata in wanted + others])
    images = render(rows, ragged=(torch.rand(scenes) < 0.2) * 1.8 * torch.rand(scenes))
    images = torch.where(torch.rand(scenes, 1, 1, 1) < 0.3, degrade(images), images)
    return images, torch.tensor(rows), [phrase(rng, metadata) for metadata in wanted + others], truth, seen, said


def places(rows):
    """Where the only object of each shape lies, (B, 4, 2) in [-1, 1], and whether there is exactly one, (B, 4)."""
    is_shape = (rows[..., :1] == torch.arange(len(SHAPES))).float()  # (B, 4 objects, 4 shapes)
    return torch.einsum("bos,boc->bsc", is_shape, rows[..., 4:6] / (SIZE / 2) - 1), is_shape.sum(1) == 1


def contrast(image, text, truth, scale):
    """Cross-entropy of the right caption for each image, and of the right image for each caption.

    image (B, d), text (B + wrong·B, d), truth (B, B) as in `caption_batch`. Captions of other scenes that happen to be
    true of this one are left out. Also returns the share of images (mean over B) that prefer their own caption.
    """
    B, target = len(image), torch.arange(len(image))
    among = (scale * image @ text[:B].T).masked_fill(truth & ~torch.eye(B, dtype=torch.bool), -torch.inf)
    wrong = scale * torch.einsum("bd,bnd->bn", image, text[B:].view(B, -1, text.shape[1]))
    accuracy = (among.diagonal() > wrong.amax(1)).float().mean()
    return F.cross_entropy(torch.cat([among, wrong], 1), target) + F.cross_entropy(among.T, target), accuracy


def train_clip(seed=0, iterations=3000, scenes=96):
    """CLIP by contrast within the batch, with hard negatives.

    Linear heads, dropped afterwards, make it learn in minutes: what each patch shows, where each shape lies, which
    facts are true of the image, and which the caption states. The position embedding starts as a ramp as strong as the
    patches: with open_clip's own, ten times weaker, the model stays blind to left and right, above and below.
    (The shipped weights: 3000 steps without the ramp and the places, 800 with them, then `refine`.)
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = new_clip(WORDS)
    x = torch.linspace(-1, 1, SIZE // CLIP_CONFIG["vision_cfg"]["patch_size"])
    ramp = torch.cartesian_prod(x, x) @ torch.randn(2, CLIP_CONFIG["vision_cfg"]["width"])
    model.visual.positional_embedding.data[1:] += 0.5 * ramp
    patches = torch.nn.Linear(CLIP_CONFIG["vision_cfg"]["width"], 1 + len(SHAPES) * len(COLORS))
    where = torch.nn.Linear(CLIP_CONFIG["vision_cfg"]["width"], 2 * len(SHAPES))
    true, stated = (torch.nn.Linear(CLIP_CONFIG["embed_dim"], len(FACTS)) for _ in range(2))
    parameters = [p for module in (model, patches, where, true, stated) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=iterations, pct_start=0.1)
    kept = {}
    model.visual.ln_post.register_forward_hook(lambda module, args, out: kept.update(tokens=out))
    for _ in (bar := trange(iterations, desc="clip")):
        images, rows, captions, truth, seen, said = caption_batch(rng, scenes)
        with fast():
            image, text = clip_features(model, images, captions)
            shown = patches(kept["tokens"][:, 1:]).flatten(0, 1).float()
            place = where(kept["tokens"][:, 0]).float().unflatten(1, (len(SHAPES), 2))
        loss, accuracy = contrast(image, text, truth, model.logit_scale.exp())
        target, alone = places(rows)
        help_loss = F.cross_entropy(shown, patch_labels(rows).flatten()) + 5 * F.mse_loss(place[alone], target[alone])
        help_loss += 5 * F.binary_cross_entropy_with_logits(true(10 * image), seen)
        help_loss += 5 * F.binary_cross_entropy_with_logits(stated(10 * text), said)
        optimizer.zero_grad()
        (loss + help_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(loss=f"{loss:.3f}", help=f"{help_loss:.3f}", accuracy=f"{accuracy:.2f}", refresh=False)
    return model


def recolored(rng, scene, metadata):
    """The scene with other colours wherever the caption leaves them open: all of one colour, or each of its own."""
    shared = rng.choice(list(COLORS.values())) if rng.random() < 0.5 else None
    items = [item for item in metadata["include"] for _ in range(item["count"])]
    other = [list(row) for row in scene]
    for row, item in zip(other, items, strict=False):
        if "color" not in item:
            row[1:4] = [c + rng.uniform(-0.04, 0.04) for c in shared or rng.choice(list(COLORS.values()))]
    return other


FAULTS = ("cut off", "ragged", "degraded", "from a bad latent", "two colours", "colour between two", "tinted")


def preference_batch(rng, vae, pairs):
    """Pairs of pictures for one caption: images (pairs, 2, 3, 64, 64), captions, and kinds (pairs,) of the pairs.

    0: the second picture has a fault, or a worse one. 1: the caption is true of the first only. 2: a tie, the same
    scene in other colours, which the caption leaves open. Most of them come through the autoencoder, as a generator's
    pictures do.
    """
    captions, scenes, faults, strengths, kinds = [], [], [], [], []
    for i in range(pairs):
        kind = (0, 0, 0, 1, 1, 2)[i % 6]
        metadata = random_metadata(rng, rng.choice(TAGS if kind < 2 else (*TAGS[:3], "position")))
        captions.append(phrase(rng, metadata))
        fault, worse = rng.randrange(len(FAULTS)), rng.uniform(0.25, 1)
        if kind == 0:
            strength = [rng.uniform(0, 0.5) * worse * (rng.random() < 0.4), worse]
        else:
            strength = [0.7 * worse * (rng.random() < 0.4)] * 2
        second = rng.choice(hard_negatives(metadata)) if kind == 1 else metadata
        draw = functools.partial(random_scene, cut_off=strength[1]) if fault == 0 else random_scene
        draw = composed_scene if fault and rng.random() < 0.5 else draw
        for m, s in zip((metadata, second), strength, strict=True):
            scenes.append(random_scene(rng, m, cut_off=s) if fault == 0 else draw(rng, m))
        if kind == 2:
            scenes[-1] = recolored(rng, scenes[-2], metadata)
        faults += [fault, fault]
        strengths += strength
        kinds.append(kind)
    fault, s, colors = torch.tensor(faults), torch.tensor(strengths), torch.tensor(list(COLORS.values()))
    grain = rng.choice((7, 20))  # lumps or frayed edges
    rows = torch.tensor(scenes)
    other = colors[torch.randint(len(colors), rows.shape[:2])]
    second = torch.lerp(rows[..., 1:4], other, (s * (fault == 4)).view(-1, 1, 1))
    rows[..., 1:4] = between = torch.lerp(rows[..., 1:4], other, (0.5 * s * (fault == 5)).view(-1, 1, 1))
    second = torch.where((fault == 4).view(-1, 1, 1), second, between)
    pictures = render(rows, ragged=(4 if grain == 7 else 2.2) * s * (fault == 1), grain=grain, second=second)
    pictures = torch.where(((fault == 2) & (s > 0)).view(-1, 1, 1, 1), degrade(pictures, s), pictures)
    pictures = pictures + 0.2 * (s * (fault == 6)).view(-1, 1, 1, 1) * torch.randn(len(s), 3, 1, 1)
    pictures = pictures.clamp(0, 1)
    with torch.no_grad():
        z = vae.encode(pictures * 2 - 1).latent_dist.mode()
        s = (s * (fault == 3)).view(-1, 1, 1, 1)
        patchy = F.interpolate(torch.rand(len(z), 1, 5, 5), z.shape[-1], mode="bilinear")
        ways = (0.9 * torch.randn_like(z), 0.4 * (z.roll(1, 0) - z), 1.3 * patchy * (z.roll(2, 0) - z))
        decoded = (vae.decode(z + s * rng.choice(ways)).sample / 2 + 0.5).clamp(0, 1)
    through = (fault == 3) | (torch.rand(pairs) < 0.75).repeat_interleave(2)
    pictures = torch.where(through.view(-1, 1, 1, 1), decoded, pictures)
    return pictures.unflatten(0, (pairs, 2)), captions, torch.tensor(kinds)


def draw_gallery(pipes, labeller, count=2048, seed=0):
    """What these pipelines draw, `count` pictures each, and what `labeller`, a judge, finds true of them.

    Returns a list of (picture (3, 64, 64) uint8, facts (92,) bool, metadata of the prompt).
    """
    rng, known, gallery = random.Random(seed), set(heldout()), []
    for i, pipe in enumerate(pipes):
        asked, captions = [], []
        while len(asked) < count:
            metadata = random_metadata(rng, TAGS[len(asked) % len(TAGS)])
            if (caption := phrase(rng, metadata)) not in known:
                asked.append(metadata)
                captions.append(caption)
        pictures = sample(pipe, captions, seed=seed + i, **GALLERY_SAMPLING[type(pipe)])
        gallery += zip((pictures * 255).round().byte(), true_facts(labeller, pictures), asked, strict=True)
    return gallery


def gallery_batch(rng, gallery, count, wrong=3):
    """Generated pictures (count, 3, 64, 64), captions, the prompt and `wrong` neighbours of it for each picture, and
    the labeller's verdict on each pair (count, 1 + wrong)."""
    images, captions, truth = [], [], []
    for picture, true, metadata in rng.choices(gallery, k=count):
        images.append(picture)
        asked = [metadata, *rng.choices(hard_negatives(metadata), k=wrong)]
        captions += [phrase(rng, m) for m in asked]
        truth.append((torch.tensor([asserted(m) for m in asked]) <= true).all(-1).float())
    return torch.stack(images) / 255, captions, torch.stack(truth)


def refine(model, gallery, vae=None, seed=1, iterations=400, scenes=48, pictures=64, pairs=48, learning_rate=8e-4):
    """The last part of CLIP's training: generated pictures, whose cosine must tell what the labeller finds true.

    With the autoencoder `vae` it makes HPS of CLIP, by HPSv2's loss: cross-entropy of the preferred of two images under
    one caption; of a tie, half of each. CLIP's own contrast goes on beside it, so that the model does not forget which
    caption is true.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    gain, bias = (torch.nn.Parameter(torch.tensor(x)) for x in (15.0, 0.4))  # of the cosine, dropped afterwards
    parameters = [*model.parameters(), gain, bias]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc="hps" if vae else "clip")):
        images, _, captions, truth, *_ = caption_batch(rng, scenes)
        drawn, asked, verdicts = gallery_batch(rng, gallery, pictures)
        judged, named, kinds = images.new_zeros(0, 2, *images.shape[1:]), [], torch.zeros(0)
        if vae:
            judged, named, kinds = preference_batch(rng, vae, pairs)
        with fast():
            image, text = clip_features(
                model, torch.cat([images, drawn, judged.flatten(0, 1)]), captions + asked + named
            )
        image, of_drawn, of_judged = image.split([scenes, pictures, 2 * len(judged)])
        text, of_asked, of_named = text.split([len(captions), len(asked), len(named)])
        scale = model.logit_scale.exp()
        loss, accuracy = contrast(image, text, truth, scale)
        cosine = torch.einsum("bd,bnd->bn", of_drawn, of_asked.unflatten(0, (pictures, -1)))
        agreement = F.binary_cross_entropy_with_logits(gain * (cosine - bias), verdicts)
        loss = loss + 4 * agreement
        if vae:
            liking = scale * torch.einsum("pid,pd->pi", of_judged.unflatten(0, (pairs, 2)), of_named)
            better = torch.where(kinds == 2, 0.5, 1.0)
            loss = loss + 2 * F.cross_entropy(liking, torch.stack([better, 1 - better], 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=math.log(100))
        bar.set_postfix(accuracy=f"{accuracy:.2f}", agreement=f"{agreement:.3f}", refresh=False)
    return model


@torch.no_grad()
def ranking(model, scenes, seed=0):
    """Share of freshly drawn scenes whose caption scores above every caption with one attribute changed, per kind."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), model.eval()
    right = {tag: [] for tag in TAGS}
    for i in range(scenes):
        metadata = random_metadata(rng, tag := TAGS[i % len(TAGS)])
        captions = [phrase(rng, m) for m in [metadata, *hard_negatives(metadata)]]
        image, text = clip_features(model, render([random_scene(rng, metadata)]), captions)
        right[tag].append((image @ text.T).argmax().item() == 0)
    return {tag: sum(r) / len(r) for tag, r in right.items()}


@torch.no_grad()
def preference(model, batches, pairs=96, seed=4):
    """Share of fresh pairs of pictures of which the model prefers the better: the one without the fault, often a slight
    one, and the one that the caption is true of. And how far apart ties are, in cosine."""
    torch.manual_seed(seed)
    rng, model = random.Random(seed), model.eval()
    vae, margins, kinds = load_vae(), [], []
    for _ in range(batches):
        images, captions, kind = preference_batch(rng, vae, pairs)
        image, text = clip_features(model, images.flatten(0, 1), captions)
        better, worse = torch.einsum("pid,pd->ip", image.unflatten(0, (pairs, 2)), text)
        margins.append(better - worse)
        kinds.append(kind)
    margin, kind = torch.cat(margins), torch.cat(kinds)
    shares = {name: (margin[kind == k] > 0).float().mean().item() for k, name in enumerate(("better", "true"))}
    return {f"{name} picture preferred": share for name, share in shares.items()} | {
        "median difference of a tie": margin[kind == 2].abs().median().item()
    }


PARTS = {FluxPipeline: ("flux", "transformer", grpo_flux), StableDiffusionPipeline: ("sd", "unet", grpo_sd)}
GALLERY_SAMPLING = {  # not as eval.py samples
    FluxPipeline: {"steps": 6, "max_sequence_length": 32},
    StableDiffusionPipeline: {"steps": 8, "guidance_scale": 3.0},
}


def bases():
    """tiny/sd and tiny/flux, one after the other."""
    for kind, (name, *_) in PARTS.items():
        yield kind.from_pretrained(MODELS / name)


def policies():
    """The same after the training of their tiny presets, with the present tiny/hps."""
    for kind, (name, part, trainer) in PARTS.items():
        folder = CLEAN / f"policy-{name}"
        cfg = parse_config(trainer.Config, trainer.PRESETS, ["--preset", "tiny", "--output-dir", str(folder)])
        trainer.main(cfg)
        pipe = kind.from_pretrained(MODELS / name)
        trained = type(getattr(pipe, part)).from_pretrained(latest_checkpoint(folder) / part)
        pipe.register_modules(**{part: trained})
        yield pipe


def make_clip():
    """Trains tiny/clip and saves it. (The shipped one has seen tiny/sd before and after its habits, and the checker's
    verdicts in place of the labeller's.)"""
    gallery = draw_gallery(bases(), load_judge(LABELLER))
    save_clip(refine(train_clip(), gallery), MODELS / "clip")


def make_hps():
    """Trains tiny/hps, starting from tiny/clip, and saves it: once to train policies with, and again with what these
    draw, where they exploit it. (For the shipped one, the policies were trained with its predecessor.)"""
    vae, labeller, gallery = load_vae(), load_judge(LABELLER), []
    for seed, pipes in enumerate((bases(), policies())):
        gallery += draw_gallery(pipes, labeller, seed=10 * seed)
        model = load_clip(MODELS / "clip/open_clip_pytorch_model.bin")
        save_hps(refine(model, gallery, vae, seed=2), MODELS / "hps")
