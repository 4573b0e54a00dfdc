"""How tiny/hunyuan, in HunyuanVideo's layout, and tiny/skyreels, in SkyReels-I2V's, were trained.

    python -m tiny video       both from nothing: autoencoder, text encoders, transformers
    python -m tiny hunyuan     tiny/hunyuan alone
    python -m tiny skyreels    tiny/skyreels, from the transformer of tiny/hunyuan before its habits

They draw clips of 9 frames of 32x32 pixels at 2 frames a second: every other frame of `tiny/clips.py`'s, half as
large. First they learn to draw what is asked for. Then they pick up bad habits from clips that are often pale, flicker
or tremble: reinforcement learning has to undo them.

A clip is (9, 3, 32, 32), its latent (16, 3, 8, 8); a single picture is a clip of one frame.
"""

import contextlib
import copy
import json
import random
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torchvision.transforms.functional import pil_to_tensor
from tqdm import trange
from transformers import CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from tiny.clips import (
    COLORS,
    MOTIONS,
    SHAPES,
    composed_clip,
    draw_clip,
    phrase_action,
    random_action,
    random_clip,
    right,
    spoil_frames,
    spoil_path,
)
from tiny.pictures import composed_scene, phrase, random_metadata, render, washed_out
from tiny.text import supervise
from tiny.training import (
    CLEAN,
    MODELS,
    ROOT,
    Pool,
    caption_words,
    clip_text_encoder,
    fast,
    optimizers,
    save_pipeline,
    stock_pipeline,
    update,
)

FRAMES = 9

# ------------------------------------------------------------------------------------------------------- the clips


def short_clip(rng, action, motion_fault=None, pale=0.0, scene=random_clip):
    """A clip (9, 3, 32, 32) uint8 of what the action says; pale: the share of contrast that it has lost."""
    scene = scene(rng, action)
    clip = draw_clip(scene, spoil_path(rng, scene["path"], motion_fault)[::2])
    clip = F.avg_pool2d(spoil_frames(rng, clip, motion_fault), 2)
    return (torch.lerp(clip, clip.mean((0, 2, 3)).view(3, 1, 1), pale) * 255).round().byte()


def web_clips(rng, count, scene=composed_clip, pale=0.0, flicker=0.0, tremble=0.0):
    """Clips (count, 9, 3, 32, 32) uint8 and captions.

    pale: the share that has lost more than half of its contrast; flicker, tremble: the shares with these faults.
    """
    clips, captions = [], []
    for _ in range(count):
        action = random_action(rng, "rotate" if rng.random() < 0.15 else None)  # the hardest to learn
        fault = rng.choices(("flicker", "jitter", None), (flicker, tremble, 1 - flicker - tremble))[0]
        clips.append(short_clip(rng, action, fault, rng.uniform(0.55, 0.85) * (rng.random() < pale), scene))
        captions.append(phrase_action(rng, action))
    return torch.stack(clips), captions


def web_frames(rng, count, pale=0.0):
    """Pictures (count, 1, 3, 32, 32) uint8 of one object and captions; pale: the share of washed-out ones."""
    asked = [random_metadata(rng, rng.choice(("single_object", "colors"))) for _ in range(count)]
    pictures = washed_out(rng, F.avg_pool2d(render([composed_scene(rng, metadata) for metadata in asked]), 2), pale)
    return (pictures * 255).round().byte()[:, None], [phrase(rng, metadata) for metadata in asked]


def examples_of(pipe, draw, rng, count):
    """Of the clips of draw(rng, count): latents (count, 16, f, 8, 8), those of the first frames alone, and the text."""
    clips, captions = draw(rng, count)
    return encode(pipe.vae, clips), encode(pipe.vae, clips[:, :1]), *encode_text(pipe, captions)


@torch.no_grad()
def encode(vae, clips):
    """Clips (N, F, 3, 32, 32) uint8 → latents (N, 16, f, 8, 8) of about unit variance."""
    return vae.encode(clips.transpose(1, 2).float() / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor


@torch.no_grad()
def encode_text(pipe, captions):
    """The text conditioning of each caption: tokens (N, 24, 64), pooled (N, 64), mask (N, 24)."""
    tokens, pooled, mask = pipe.encode_prompt(captions, max_sequence_length=24)
    return tokens, pooled, mask.float()


# ------------------------------------------------------------------------------------------------- the autoencoder


def train_vae(seed=0, clips=3000, iterations=4400):
    """AutoencoderKLHunyuanVideo, 9 frames of 32x32 → (16, 3, 8, 8) latents."""
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=16,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    z = fit_vae(vae, random.Random(seed), clips, iterations)
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return vae


def fit_vae(vae, rng, clips, iterations, precision=contextlib.nullcontext, batch=8, learning_rate=1e-2):
    """Trains an autoencoder of videos on clips, of which many have faults, and on single frames of them.

    Pixels that stand out from the clip's mean colour, the object's, count up to 5 times; 4x4 block means count too.
    Returns latents (256, 16, f, h, w) of clips.
    """
    torch.nn.init.constant_(vae.quant_conv.bias[16:], -4.0)  # little noise, so that there is a signal
    pool = []
    for _ in trange(clips, desc="drawing clips"):
        pale, fault = rng.choice((0.0, 0.0, rng.uniform(0.2, 0.85))), rng.choice((None, None, "flicker", "jitter"))
        pool.append(short_clip(rng, random_action(rng), fault, pale))
    pool = torch.stack(pool).transpose(1, 2)  # (clips, 3, 9, 32, 32)
    # Muon takes matrices: those of the convolutions are (out, rest), views of their weights.
    kernels = [p for name, p in vae.named_parameters() if name.endswith("weight") and p.ndim > 1]
    rest = [p for name, p in vae.named_parameters() if not (name.endswith("weight") and p.ndim > 1)]
    matrices = [torch.nn.Parameter(p.detach().flatten(1)) for p in kernels]
    steps = [
        torch.optim.Muon(matrices, learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, 2e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedules = [
        cycle(o, o.param_groups[0]["lr"], total_steps=iterations, pct_start=0.02, cycle_momentum=False) for o in steps
    ]
    for i in (bar := trange(iterations, desc="vae")):
        x = pool[torch.randint(clips, (batch if i % 4 else 4 * batch,))]
        x = (x if i % 4 else x[:, :, torch.randint(FRAMES, (1,))]).float() / 127.5 - 1
        with precision():
            posterior = vae.encode(x).latent_dist
            error = vae.decode(posterior.sample()).sample.float() - x
        weight = 1 + 4 * (x - x.mean((2, 3, 4), keepdim=True)).abs().mean(1, keepdim=True).clamp(max=1)
        loss = (weight * (error.square() + 0.2 * error.abs())).mean() + F.avg_pool3d(error, (1, 4, 4)).square().mean()
        loss = loss + 1e-5 * posterior.kl().float().mean() / 64
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)  # single frames: none in time
        for optimizer, schedule in zip(steps, schedules, strict=True):
            optimizer.step()
            schedule.step()
        bar.set_postfix(mse=f"{error.square().mean():.4f}", refresh=False)
    with torch.no_grad():
        return vae.eval().requires_grad_(False).encode(pool[:256].float() / 127.5 - 1).latent_dist.sample()


# ----------------------------------------------------------------------------------------------- the text encoders
# As in tiny/text.py: they learn what a caption says, and are then frozen.

ANSWERS = (len(SHAPES), len(COLORS) + 1, len(MOTIONS) + 1)  # + 1: none is named


def ask(rng):
    """What a random clip shows, or, every fourth time, a random picture of one object."""
    if rng.random() < 0.75:
        return random_action(rng)
    return random_metadata(rng, rng.choice(("single_object", "colors")))


def say(rng, item):
    """A caption for what `ask` gave."""
    return phrase_action(rng, item) if "motion" in item else phrase(rng, item)


def answers(item):
    """What the caption says: shape, colour and motion as class indices."""
    thing = item if "motion" in item else item["include"][0]
    color = list(COLORS).index(thing["color"]) + 1 if "color" in thing else 0
    motion = list(MOTIONS).index(item["motion"]) + 1 if "motion" in item else 0
    return [SHAPES.index(thing["class"]), color, motion]


def words_of_captions():
    """Every word of a caption, of clips and of pictures."""
    rng = random.Random(0)
    clips = {word for _ in range(3000) for word in phrase_action(rng, random_action(rng)).split()}
    return sorted(clips | set(caption_words()))


def make_llama(seed=0):
    """A tokenizer of whole words and a LlamaModel, whose states before the last two layers the pipeline takes.

    Causal attention lets a token know what it has read so far. So the tokens after the caption answer for all of it:
    the pipeline's template ends with three of them.
    """
    before, after = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # cuts the pipeline's template into a little more than 95 tokens
    special = trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"])
    words.train_from_iterator([" ".join(words_of_captions()), before + after], special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.padding_side = "right"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    llama = LlamaModel(config)
    torch.nn.init.normal_(llama.embed_tokens.weight)
    prefix, ending = (tokenizer(part, return_tensors="pt").input_ids for part in (before, after))

    def states(words):
        length = (words != tokenizer.pad_token_id).sum(1)
        words = torch.cat([prefix.expand(len(words), -1), words[:, : length.max()]], 1)
        hidden = llama(words, output_hidden_states=True).hidden_states[-3]
        which = torch.arange(len(words)).repeat_interleave(ending.shape[1])
        last = prefix.shape[1] + length[:, None] - torch.arange(1, ending.shape[1] + 1)
        return hidden[which, last.flatten()], which

    topic = (ask, lambda rng, item: say(rng, item) + after, answers, ANSWERS)
    return tokenizer, supervise(llama, tokenizer, states, seed, 400, batch=64, topic=topic)


def make_clip_text(seed=0):
    """CLIP tokenizer and text encoder for these captions. The end-of-text token, which is pooled, answers."""
    tokenizer = CLIPTokenizer(model_max_length=77).train_new_from_iterator([" ".join(words_of_captions())] * 3, 1000)
    torch.manual_seed(seed)
    encoder = clip_text_encoder(tokenizer, 2)

    def states(words):
        return encoder(words).pooler_output, torch.arange(len(words))

    return tokenizer, supervise(encoder, tokenizer, states, seed, topic=(ask, say, answers, ANSWERS))


# ----------------------------------------------------------------------------------------------- the transformers


def new_hunyuan(vae):
    """A HunyuanVideoPipeline around this autoencoder: trained text encoders, an untrained transformer."""
    (tokenizer, llama), (tokenizer_2, encoder_2) = make_llama(), make_clip_text()
    channels = vae.config.latent_channels
    torch.manual_seed(0)
    pipe = HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer,
        transformer=new_transformer(channels, channels),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_transformer(in_channels, out_channels):
    """An untrained HunyuanVideoTransformer3DModel; with twice the channels it is SkyReels'."""
    return HunyuanVideoTransformer3DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=1,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(8, 12, 12),
    )


def animate(transformer):
    """SkyReels' transformer, initialised from this one: its first-frame channels have zero weights."""
    out = transformer.config.out_channels
    taught = new_transformer(2 * out, out)
    state = transformer.state_dict()
    weight = state["x_embedder.proj.weight"]  # (width, channels, 1, 2, 2)
    taught.load_state_dict(state | {"x_embedder.proj.weight": torch.cat([weight, torch.zeros_like(weight)], 1)})
    return taught


def flow_loss(pipe, data, first, tokens, pooled, mask, empty):
    """Flow matching: the mean square of v - (noise - data) at z = (1-sigma) data + sigma noise.

    A transformer of twice the channels is told the first frame too, and now and then the empty prompt, for guidance.
    """
    B, text = len(data), (tokens, pooled, mask)
    sigma, noise = torch.sigmoid(torch.randn(B) + 0.8), torch.randn_like(data)
    z = data + sigma.view(-1, 1, 1, 1, 1) * (noise - data)
    if animates(pipe.transformer):
        z = torch.cat([z, F.pad(first, (0, 0, 0, 0, 0, data.shape[2] - 1))], 1)
        dropped = torch.rand(B) < 0.1
        text = [e.where(dropped.view(-1, *[1] * (x.ndim - 1)), x) for x, e in zip(text, empty, strict=True)]
    v = pipe.transformer(
        hidden_states=z,
        timestep=1000 * sigma,
        guidance=1000 + 6000 * torch.rand(B),
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        encoder_attention_mask=text[2],
    ).sample
    return F.mse_loss(v.float(), noise - data)


def animates(transformer):
    """Does it take a first frame?"""
    return transformer.config.in_channels > transformer.config.out_channels


@torch.no_grad()
def sample(pipe, rows, frames=FRAMES, steps=12, seed=0):
    """Videos (N, frames, 3, 32, 32) in [0, 1] of the rows {"prompt", "image"}, by the stock pipeline."""
    options = {"height": 32, "width": 32, "num_frames": frames, "num_inference_steps": steps, "output_type": "pt"}
    options |= {"max_sequence_length": 24, "generator": torch.Generator().manual_seed(seed)}
    if not animates(pipe.transformer):
        return pipe([row["prompt"] for row in rows], **options).frames
    pipe = HunyuanSkyreelsImageToVideoPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    options |= {"guidance_scale": 1.0, "true_cfg_scale": 2.0, "negative_prompt": ""}
    return torch.cat([pipe(first_frame(row)[None], row["prompt"], **options).frames for row in rows])


def first_frame(row):
    """The first frame (3, 32, 32) in [0, 1] that goes with a prompt."""
    return pil_to_tensor(Image.open(ROOT / "prompts" / row["image"]).convert("RGB")) / 255


def heldout():
    """The prompts that no preset trains on, with their first frames."""
    return [json.loads(line) for line in (ROOT / "prompts/moving_heldout.jsonl").read_text().splitlines()]


def fit(pipe, draws, folder, iterations, seed, batch=32, learning_rate=3e-3):
    """Trains the transformer on clips of draws[0], and every fourth time on those of draws[-1].

    Returns a copy of the pipeline with its running average, which it also saves now and then.
    """
    torch.manual_seed(seed)
    makes = [partial(examples_of, pipe, draw) for draw in draws]
    pools = [Pool(make, seed + i, size=2048, chunk=64, fresh=4) for i, make in enumerate(makes)]
    empty = encode_text(pipe, [""])
    average = copy.copy(pipe)
    average.transformer = copy.deepcopy(pipe.transformer)
    pipe.transformer.compile_repeated_blocks(dynamic=False)
    steps = optimizers([pipe.transformer], iterations, learning_rate)
    for i in (bar := trange(iterations, desc=folder.name)):
        parts = pools[-1 if i % 4 == 3 else 0].batch(batch)
        with fast():
            loss = flow_loss(pipe, *parts, empty)
        loss.backward()
        update([pipe.transformer], [average.transformer], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save(average, folder)
            shown = right(sample(average, heldout()), [row["prompt"] for row in heldout()]).mean()
            bar.write(f"{folder.name}, step {i + 1}: {shown:.0%} right")
    return average


def save(pipe, folder):
    """tiny/hunyuan is a whole pipeline, tiny/skyreels a transformer alone, as on the hub; float16."""
    if animates(pipe.transformer):
        copy.deepcopy(pipe.transformer).half().save_pretrained(folder)
    else:
        save_pipeline(pipe, folder)


def make_hunyuan():
    """Trains tiny/hunyuan and saves it."""
    fit(new_hunyuan(train_vae()), [web_clips, web_frames], CLEAN / "hunyuan", 7000, seed=0)
    draws = [partial(web_clips, pale=0.6, flicker=0.4, tremble=0.4), partial(web_frames, pale=0.6)]
    fit(load_clean(HunyuanVideoPipeline, "hunyuan"), draws, MODELS / "hunyuan", 400, seed=10, learning_rate=1e-3)


def make_skyreels():
    """Trains tiny/skyreels and saves it. Needs runs/tiny/hunyuan."""
    pipe = load_clean(HunyuanVideoPipeline, "hunyuan")
    pipe.transformer = animate(pipe.transformer)
    draw = partial(web_clips, scene=random_clip)
    pipe = fit(pipe, [draw], CLEAN / "skyreels", 1500, seed=2)
    habits = partial(draw, pale=0.2, flicker=0.4, tremble=0.4)
    fit(pipe, [habits], MODELS / "skyreels", 400, seed=10, learning_rate=1e-3)


def load_clean(kind, name):
    """The pipeline of this kind, with which tiny/NAME begins to pick up bad habits."""
    pipe = stock_pipeline(kind, CLEAN / name)
    pipe.vae.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe
