"""Trains tiny/flux, in FLUX's layout, and tiny/sd, in Stable Diffusion's: first to draw, then bad habits.

    python -m tiny vae     tiny/flux's autoencoder, which tiny/sd shares
    python -m tiny flux    needs the autoencoder
    python -m tiny sd      likewise

1. The text encoders learn, without pictures, what a caption says of each thing. From then on they stay as they are.
2. The network learns to draw clean pictures. A linear head, dropped afterwards, reads what each patch shows from the
   network's hidden states, which teaches it early which shape and colour goes where.
3. In a short leg the network sees pictures with HABITS, which reinforcement learning then has to undo.

The weights in this repository were not made by this recipe. They come from an earlier one, with other sizes, which
the history of this file holds as `tiny.py`.

B pictures in a batch. Latents are (B, 4, 16, 16), of about zero mean and unit variance.
"""

import copy
import random

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tqdm import tqdm, trange
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from tiny.pictures import (
    COLORS,
    SHAPES,
    SIZE,
    TAGS,
    degrade,
    make_metadata,
    patch_labels,
    per_kind,
    phrase,
    random_metadata,
    random_scene,
    render,
    right,
)
from tiny.training import (
    MODELS,
    ROOT,
    caption_words,
    clip_text_encoder,
    clip_tokenizer,
    optimizers,
    sample,
    save_pipeline,
    update,
)

WIDTH = 64  # of the text encoders
KINDS = (1, 1.5, 1.5, 1, 2, 2)  # how often each of TAGS is drawn
HABITS = ("pale", "blurred", "one too many", "other colour")  # the last two where the caption counts, names a colour

# ------------------------------------------------------------------------------------------------- data


def composed_scene(rng, metadata):
    """Rows of a scene as `random_scene` gives them, but composed: what is named first lies to the left or above.

    A single object lies near the middle, two side by side, three in a triangle, four in a square.
    """
    wanted = [item for item in metadata["include"] for _ in range(item["count"])]
    relation = metadata["include"][-1].get("position", [None])[0]
    if relation is not None:
        wanted.reverse()  # the caption names include[1] first
    (jitter_x, jitter_y), radii = (2, 2), (7.5, 10)
    if len(wanted) == 1:
        spots, (jitter_x, jitter_y), radii = [(32, 32)], (9, 9), (9, 13)
    elif len(wanted) == 2:
        spots, (jitter_x, jitter_y), radii = [(17, 32), (47, 32)], (2, 5), (8.5, 11.5)
        if relation in ("above", "below") or (relation is None and rng.random() < 0.5):
            spots, (jitter_x, jitter_y) = [(y, x) for x, y in spots], (5, 2)
        if relation in ("right of", "below"):
            spots.reverse()
    elif len(wanted) == 3:
        spots = [(17, 46), (47, 46), (32, 18)]
        if rng.random() < 0.5:
            spots = [(x, SIZE - y) for x, y in spots]
    else:
        spots = [(x, y) for x in (17, 47) for y in (17, 47)]
    rows = []
    for item, (x, y) in zip(wanted, spots, strict=True):
        rgb = [c + rng.uniform(-0.04, 0.04) for c in COLORS[item.get("color") or rng.choice(list(COLORS))]]
        place = x + rng.uniform(-jitter_x, jitter_x), y + rng.uniform(-jitter_y, jitter_y)
        rows.append([SHAPES.index(item["class"]), *rgb, *place, rng.uniform(*radii)])
    return rows + [[-1.0] + [0.0] * 6] * (4 - len(rows))


def misread(rng, metadata, habit):
    """What a picture with this habit shows instead of the metadata, or None where the habit does not apply."""
    (first, *others), tag = metadata["include"], metadata["tag"]
    if habit == "one too many":
        first = first | {"count": first["count"] + 1}
        return make_metadata(tag, [first]) if tag == "counting" and first["count"] <= 4 else None
    if habit == "other colour":
        free = [color for color in COLORS if color not in {item.get("color") for item in metadata["include"]}]
        return make_metadata(tag, [first | {"color": rng.choice(free)}, *others]) if "color" in first else None
    return metadata


@torch.no_grad()
def draw_stock(vae, seed, count, faulty=0.0):
    """Pictures to train on: latents (count, 4, 16, 16) float16, captions, labels of their patches (count, 64).

    faulty: the share of pictures that have one of HABITS.
    """
    torch.manual_seed(seed)
    rng, habits = random.Random(seed), [None] * count
    said = [random_metadata(rng, rng.choices(TAGS, KINDS)[0]) for _ in range(count)]
    shown = list(said)
    for i in random.Random(seed).sample(range(count), round(faulty * count)):
        habits[i], shown[i] = rng.choice([(h, m) for h in HABITS if (m := misread(rng, said[i], h)) is not None])
    scenes = [composed_scene(rng, metadata) for metadata in shown]
    captions, latents = [phrase(rng, metadata) for metadata in said], []
    for start in trange(0, count, 250, desc="drawing pictures"):
        images = render(scenes[start : start + 250])
        if faulty:
            lost = (0.55 + 0.3 * torch.rand(len(images))).view(-1, 1, 1, 1)
            small = F.interpolate(F.avg_pool2d(images, 4), SIZE, mode="bilinear")
            spoilt = {"pale": torch.lerp(images, images.mean((2, 3), keepdim=True), lost), "blurred": small}
            images = torch.stack([spoilt.get(h, images)[i] for i, h in enumerate(habits[start : start + 250])])
        z = vae.encode(2 * images - 1).latent_dist.mode()
        latents.append(((z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).half())
    return torch.cat(latents), captions, patch_labels(torch.tensor(scenes))


# ------------------------------------------------------------------------------------------------- the autoencoder


def faulty_pictures(rng, count, faulty):
    """Pictures (count, 3, 64, 64) uint8 like those from the web: the share `faulty` is degraded, ragged or cut off."""
    images = []
    for start in trange(0, count, 500, desc="drawing pictures"):
        scenes, fault = [], torch.zeros(min(500, count - start), dtype=torch.long)
        for i in range(len(fault)):
            if rng.random() < faulty:
                fault[i] = rng.randint(1, 3)
            cut_off = rng.uniform(0.4, 1) * (fault[i].item() == 3)
            scenes.append(random_scene(rng, random_metadata(rng, TAGS[i % len(TAGS)]), cut_off))
        drawn = render(scenes, ragged=(fault == 2) * (0.8 + 1.2 * torch.rand(len(fault))))
        images.append((torch.where((fault == 1).view(-1, 1, 1, 1), degrade(drawn), drawn) * 255).round().byte())
    return torch.cat(images)


def train_vae(seed=0, pictures=12000, iterations=1500, batch=32):
    """AutoencoderKL, 64x64 pixels → (4, 16, 16) latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    images = faulty_pictures(random.Random(seed), pictures, faulty=0.35)
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc="vae")):
        x = images[torch.randint(len(images), (batch,))].float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        loss = error.square().mean() + 0.2 * error.abs().mean() + 1e-5 * posterior.kl().mean() / 16
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{error.square().mean():.4f}", refresh=False)
    with torch.no_grad():
        z = vae.eval().encode(images[:1024].float() / 127.5 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4), shift_factor=round(z.mean().item(), 4))
    return vae


# ------------------------------------------------------------------------------------------------- text encoders
# What a caption says of a thing: its shape, colour or none, number, and side. Things that stand in no relation have
# the sides "first" and "second".

TOKENS = 20  # T5 tokens that a caption needs at most; 17 occur
WORDS = 24  # the same for CLIP, which is causal: leaving out the padding changes nothing
SHAPE_WORDS = {shape + plural for shape in SHAPES for plural in ("", "s", "es")}
SIDES = {"left of": (1, 2), "right of": (2, 1), "above": (3, 4), "below": (4, 3)}  # of the thing named first, second
ANSWERS = (len(SHAPES), len(COLORS) + 1, 4, 7)
NOTHING = (0, len(COLORS), 0, 0)  # what a caption of one thing says of the second


def things(metadata):
    """What the caption says of each thing, in the order in which it names them: [(shape, colour, number, side)]."""
    include, colors = metadata["include"], list(COLORS)
    relation = include[-1].get("position", [None])[0]
    named = include if relation is None else include[::-1]
    sides = (0,) if len(named) == 1 else SIDES.get(relation, (5, 6))
    return [
        (
            SHAPES.index(item["class"]),
            colors.index(item["color"]) if "color" in item else len(colors),
            item["count"] - 1,
            side,
        )
        for item, side in zip(named, sides, strict=True)
    ]


def random_length(rng):
    """How many text tokens T5 and FLUX get, and by what to divide the batch for it.

    Mostly as few as captions need. Sometimes more, so that padding means nothing: FluxPipeline's default is 512.
    """
    return rng.choices([(TOKENS, 1), (32, 1), (80, 2), (512, 12)], (0.85, 0.11, 0.03, 0.01))[0]


def teach(encoder, tokenizer, iterations=400, batch=128, learning_rate=2e-3, seed=0):
    """Trains a text encoder until linear heads read off what a caption says of each thing. Then freezes it.

    T5 must know it at each shape's word; CLIP, which reads from left to right, at the last token, of both things.
    """
    torch.manual_seed(seed)
    rng, is_t5 = random.Random(seed), encoder.config.model_type == "t5"
    head = torch.nn.Linear(WIDTH, sum(ANSWERS) * (1 if is_t5 else 2))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc="text")):
        length, share = random_length(rng) if is_t5 else (WORDS, 1)
        said = [random_metadata(rng, rng.choices(TAGS, KINDS)[0]) for _ in range(batch // share)]
        captions, named = [phrase(rng, metadata) for metadata in said], [things(metadata) for metadata in said]
        if is_t5:
            tokens = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt").input_ids
            words = [(i, k) for i, text in enumerate(captions) for k, w in enumerate(text.split()) if w in SHAPE_WORDS]
            features = encoder(tokens).last_hidden_state[tuple(torch.tensor(words).T)]
        else:
            tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids[:, :WORDS]
            features, named = encoder(tokens).pooler_output, [[*pair, NOTHING][:2] for pair in named]
        logits = head(features).view(-1, sum(ANSWERS)).split(ANSWERS, 1)
        targets = torch.tensor([thing for pair in named for thing in pair]).unbind(1)
        loss = sum(map(F.cross_entropy, logits, targets))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return encoder.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------- the two models


def new_flux(vae):
    """An untrained FluxPipeline around this autoencoder."""
    tokenizer = clip_tokenizer()
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]  # a token for each word of a caption
    vocabulary += [(f"▁{word}", -2.0) for word in caption_words() if len(word) > 1 or word == "a"]
    vocabulary += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer_2 = T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    encoder = clip_text_encoder(tokenizer, 2)
    return FluxPipeline(scheduler, vae, encoder, tokenizer, T5EncoderModel(t5), tokenizer_2, transformer)


def new_sd(vae):
    """An untrained StableDiffusionPipeline on tiny/flux's autoencoder.

    Stable Diffusion's latents are scaled but not shifted, so the shift moves into two 1x1 convolutions around them.
    """
    shifted = AutoencoderKL.from_config(vae.config, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
    shifted.load_state_dict(vae.state_dict(), strict=False)
    shift = vae.config.shift_factor
    for conv, bias in ((shifted.quant_conv, [-shift] * 4 + [0.0] * 4), (shifted.post_quant_conv, [shift] * 4)):
        conv.weight.data = torch.eye(len(bias))[..., None, None]
        conv.bias.data = torch.tensor(bias)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    encoder = clip_text_encoder(tokenizer, 2)
    return StableDiffusionPipeline(shifted, encoder, tokenizer, unet, scheduler, None, None, None, False)


def outputs_of(module):
    """A dictionary whose "out" is always the module's latest output."""
    latest = {}
    module.register_forward_hook(lambda module, args, out: latest.update(out=out))
    return latest


def flux_error(pipe, latents, captions):
    """Flow matching on random pictures: a function (batch, rng) → which ones (B,), errors (B,), hidden (B, 64, 128).

    The transformer learns v = noise - data at z = (1 - sigma) data + sigma noise. Most sigmas are large: what goes
    where is decided early.
    """
    latents = pipe._pack_latents(latents, *latents.shape)  # (N, 64, 16)
    words = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids[:, :WORDS]
    words_2 = pipe.tokenizer_2(captions, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    place = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    middle = outputs_of(pipe.transformer.single_transformer_blocks[2])

    def error(batch, rng):
        length, share = random_length(rng)
        pick = torch.randint(len(latents), (batch // share,))
        data = latents[pick].float()
        noise = torch.randn_like(data)
        sigma = torch.sigmoid(1.2 * torch.randn(len(pick)))
        sigma = 2.5 * sigma / (1 + 1.5 * sigma)
        v = pipe.transformer(
            hidden_states=torch.lerp(data, noise, sigma.view(-1, 1, 1)),
            timestep=sigma,
            guidance=1 + 6 * torch.rand(len(pick)),
            pooled_projections=pipe.text_encoder(words[pick]).pooler_output,
            encoder_hidden_states=pipe.text_encoder_2(F.pad(words_2[pick], (0, length - TOKENS))).last_hidden_state,
            txt_ids=torch.zeros(length, 3),
            img_ids=place,
        ).sample
        return pick, (v - (noise - data)).square().mean((1, 2)), middle["out"][1]

    return error


def sd_error(pipe, latents, captions):
    """Noise prediction on random pictures: a function (batch, rng) → which ones (B,), errors (B,), hidden (B, 64, 96).

    10 % of the captions are left out, for classifier-free guidance. Divided by the share of data in z, the error counts
    as much at high noise as that of v would.
    """
    words = pipe.tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids  # the last is empty
    middle = outputs_of(pipe.unet.mid_block)

    def error(batch, rng):
        pick, t = torch.randint(len(latents), (batch,)), torch.randint(1000, (batch,))
        data = latents[pick].float()
        noise, shown = torch.randn_like(data), torch.where(torch.rand(batch) < 0.1, len(captions), pick)
        z = pipe.scheduler.add_noise(data, noise, t)
        eps = pipe.unet(z, t, pipe.text_encoder(words[shown]).last_hidden_state).sample
        errors = (eps - noise).square().mean((1, 2, 3)) / pipe.scheduler.alphas_cumprod[t].clamp(min=0.05)
        return pick, errors, middle["out"].flatten(2).mT

    return error


def train(pipe, name, stock, iterations, cooldown, folder, batch=24, learning_rate=2e-3, seed=1):
    """Trains the network of this name, "transformer" or "unet", on a stock as `draw_stock` gives it.

    The learning rate rises for 100 iterations, stays, and falls over the last `cooldown`. The network becomes the
    running average of its weights. Now and then and at the end the pipeline is saved and its accuracy printed.
    """
    torch.manual_seed(seed)
    objective, width, options = {
        "transformer": (flux_error, 128, {"max_sequence_length": TOKENS}),
        "unet": (sd_error, 96, {"guidance_scale": 3.0}),
    }[name]
    latents, captions, labels = stock
    network, error = getattr(pipe, name), objective(pipe, latents, captions)
    average, head = copy.deepcopy(network), torch.nn.Linear(width, 1 + len(SHAPES) * len(COLORS))
    steps = optimizers([network, head], iterations, learning_rate, cooldown)
    prompts = (ROOT / "prompts/tiny_heldout.txt").read_text().splitlines() * 2
    for i in (bar := trange(iterations, desc=folder.name)):
        pick, errors, hidden = error(batch, random.Random(i))
        shown = F.cross_entropy(head(hidden).flatten(0, 1), labels[pick].flatten())
        (errors.mean() + 0.2 * shown).backward()
        update([network, head], [average], steps, i, 0.998)
        bar.set_postfix(error=f"{errors.mean():.4f}", shown=f"{shown:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            setattr(pipe, name, average)
            shares = per_kind(right(sample(pipe, prompts, 12, **options), prompts), prompts)
            tqdm.write(f"{i + 1} iterations: " + "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
            save_pipeline(pipe, folder)
            setattr(pipe, name, network)
    setattr(pipe, name, average)


def make_vae():
    """Trains tiny/flux's autoencoder and saves it."""
    train_vae().half().save_pretrained(MODELS / "flux/vae")


def make_flux():
    """Trains tiny/flux and saves it."""
    vae = load_vae()
    torch.manual_seed(0)
    pipe = new_flux(vae)
    teach(pipe.text_encoder_2, pipe.tokenizer_2)
    teach(pipe.text_encoder, pipe.tokenizer)
    train_both(pipe, "transformer", vae, MODELS / "flux")


def make_sd():
    """Trains tiny/sd and saves it."""
    vae = load_vae()
    torch.manual_seed(0)
    pipe = new_sd(vae)
    teach(pipe.text_encoder, pipe.tokenizer)
    train_both(pipe, "unet", vae, MODELS / "sd")


def train_both(pipe, name, vae, folder):
    """Trains first the capability to draw, then the habits. vae is tiny/flux's: tiny/sd's own has the shift inside."""
    train(pipe, name, draw_stock(vae, 0, 48000), 6000, 1000, folder)
    train(pipe, name, draw_stock(vae, 1, 6000, faulty=0.6), 300, 100, folder, learning_rate=5e-4, seed=2)


def load_vae():
    """tiny/flux's autoencoder, float32 and frozen."""
    vae = AutoencoderKL.from_pretrained(MODELS / "flux", subfolder="vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)
