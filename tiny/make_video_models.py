"""How tiny/hunyuan, in HunyuanVideo's layout, and tiny/skyreels, in SkyReels-I2V's, were trained.

    python -m tiny video    trains both from nothing: about an hour on one core

They draw clips of 9 frames of 32x32 pixels at 2 frames a second: every other frame of `tiny/clips.py`'s, half as
large. The last data they are trained on is full of pale, flickering and trembling clips, so they have bad habits to
unlearn.

A clip is (9, 3, 32, 32), its latent (16, 3, 8, 8).
"""

import copy
import random

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm, trange
from transformers import CLIPTokenizer, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from tiny.clips import draw_clip, phrase_action, random_action, random_clip, spoil_frames, spoil_path
from tiny.pictures import phrase, random_metadata, random_scene, render
from tiny.training import (
    MODELS,
    caption_words,
    clip_text_encoder,
    fast,
    optimizers,
    save_pipeline,
    update,
)

FRAMES = 9


def short_clip(rng, action, motion_fault=None, pale=0.0):
    """A clip (9, 3, 32, 32) uint8 of what the action says; pale: the share of contrast that it has lost."""
    scene = random_clip(rng, action)
    clip = draw_clip(scene, spoil_path(rng, scene["path"], motion_fault)[::2])
    clip = F.avg_pool2d(spoil_frames(rng, clip, motion_fault), 2)
    return (torch.lerp(clip, clip.mean((0, 2, 3)).view(3, 1, 1), pale) * 255).round().byte()


def train_vae(seed=0, clips=3000, iterations=4400, batch=8, learning_rate=1e-2):
    """AutoencoderKLHunyuanVideo, 9 frames of 32x32 → (16, 3, 8, 8) latents; trained on clips and on single frames.

    Pixels that stand out from the clip's mean colour, the object's, count up to 5 times; so do blocks of 4x4 pixels.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=16,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
    )
    torch.nn.init.constant_(vae.quant_conv.bias[16:], -4.0)  # little noise, so that there is a signal
    pool = []
    for _ in trange(clips, desc="drawing clips"):
        pale, fault = rng.choice((0.0, 0.0, rng.uniform(0.2, 0.85))), rng.choice((None, None, "flicker", "jitter"))
        pool.append(short_clip(rng, random_action(rng), fault, pale))
    pool = torch.stack(pool).transpose(1, 2)  # (N, 3, 9, 32, 32)
    # Muon takes matrices: those of the convolutions are (out, in · 27), views of their weights.
    kernels = [p for p in vae.parameters() if p.ndim > 1]
    matrices = [torch.nn.Parameter(p.detach().flatten(1)) for p in kernels]
    steps = [
        torch.optim.Muon(matrices, learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in vae.parameters() if p.ndim == 1], 2e-3, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    cycle = torch.optim.lr_scheduler.OneCycleLR
    schedules = [
        cycle(o, o.param_groups[0]["lr"], total_steps=iterations, pct_start=0.02, cycle_momentum=False) for o in steps
    ]
    for i in (bar := trange(iterations, desc="vae")):
        x = pool[torch.randint(clips, (batch if i % 4 else 4 * batch,))]
        x = (x if i % 4 else x[:, :, torch.randint(FRAMES, (1,))]).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        weight = 1 + 4 * (x - x.mean((2, 3, 4), keepdim=True)).abs().mean(1, keepdim=True).clamp(max=1)
        loss = (weight * (error.square() + 0.2 * error.abs())).mean() + F.avg_pool3d(error, (1, 4, 4)).square().mean()
        loss = loss + 1e-5 * posterior.kl().mean() / 64
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for matrix, kernel in zip(matrices, kernels, strict=True):
            matrix.grad = kernel.grad.flatten(1)
        for optimizer, schedule in zip(steps, schedules, strict=True):
            optimizer.step()
            schedule.step()
        bar.set_postfix(mse=f"{error.square().mean():.4f}", refresh=False)
    with torch.no_grad():
        z = vae.eval().encode(pool[:256].float() / 127.5 - 1).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / z.std().item(), 4))
    return vae


def words_of_captions():
    """Every word of a caption, of clips and of pictures."""
    rng = random.Random(0)
    clips = {word for _ in range(3000) for word in phrase_action(rng, random_action(rng)).split()}
    return sorted(clips | set(caption_words()))


def new_hunyuan(vae):
    """An untrained HunyuanVideoPipeline around this autoencoder. Its text encoders stay as they are drawn here.

    A random embedding tells every word from every other; the transformer, which has a refiner for it, learns the rest.
    """
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # cuts the pipeline's template into a little more than 95 tokens
    special = trainers.WordLevelTrainer(special_tokens=["<pad>", "<unk>"])
    words.train_from_iterator([" ".join(words_of_captions()), DEFAULT_PROMPT_TEMPLATE["template"]], special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
    tokenizer.padding_side = "right"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,  # the pipeline takes the hidden states before the last two
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    llama = LlamaModel(config)
    torch.nn.init.normal_(llama.embed_tokens.weight)
    tokenizer_2 = CLIPTokenizer(model_max_length=77).train_new_from_iterator([" ".join(words_of_captions())] * 3, 1000)
    return HunyuanVideoPipeline(
        text_encoder=llama,
        tokenizer=tokenizer,
        transformer=new_transformer(vae.config.latent_channels, vae.config.latent_channels),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=clip_text_encoder(tokenizer_2, 1),
        tokenizer_2=tokenizer_2,
    )


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


@torch.no_grad()
def encode(vae, clips):
    """Clips (N, F, 3, 32, 32) uint8 → latents (N, 16, f, 8, 8) of about unit variance."""
    parts = tqdm(clips.transpose(1, 2).split(64), desc="encoding clips")
    latents = [vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in parts]
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def encode_text(pipe, captions):
    """The text conditioning of each caption: tokens (N, 24, 64), mask (N, 24), pooled (N, 64)."""
    parts = [pipe.encode_prompt(captions[i : i + 64], max_sequence_length=24) for i in range(0, len(captions), 64)]
    tokens, pooled, mask = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, mask.float(), pooled


def web_clips(rng, count, faulty, pale):
    """Clips (count, 9, 3, 32, 32) and captions; faulty: the share that flickers or trembles, pale: the washed-out."""
    clips, captions = [], []
    for _ in trange(count, desc="drawing clips"):
        action = random_action(rng)
        fault = rng.choice(("flicker", "flicker", "jitter")) if rng.random() < faulty else None
        clips.append(short_clip(rng, action, fault, rng.uniform(0.55, 0.85) * (rng.random() < pale)))
        captions.append(phrase_action(rng, action))
    return torch.stack(clips), captions


def web_frames(rng, count, pale):
    """Pictures (count, 1, 3, 32, 32) of one object and captions; pale: the share of washed-out ones."""
    pictures, captions = [], []
    for _ in range(count):
        metadata = random_metadata(rng, rng.choice(("single_object", "colors")))
        picture = F.avg_pool2d(render([random_scene(rng, metadata)]), 2)
        lost = rng.uniform(0.55, 0.85) * (rng.random() < pale)
        pictures.append((torch.lerp(picture, picture.mean((2, 3), keepdim=True), lost) * 255).round().byte())
        captions.append(phrase(rng, metadata))
    return torch.stack(pictures), captions


def train(transformer, pipe, iterations, faulty, pale, seed, clips=3000, batch=64, learning_rate=3e-3):
    """Flow matching on clips, and every fourth time on single frames: v = noise - data at (1-sigma) data + sigma noise.

    A transformer of twice the channels is told the first frame too, and now and then an empty prompt, for guidance.
    Returns the running average of the transformer. faulty, pale: see `web_clips`.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    animates = transformer.config.in_channels > transformer.config.out_channels
    films, captions = web_clips(rng, clips, faulty, pale)
    sets = [(encode(pipe.vae, films), *encode_text(pipe, captions))]
    firsts = encode(pipe.vae, films[:, :1]) if animates else None
    if not animates:
        frames, captions = web_frames(rng, clips, pale)
        sets.append((encode(pipe.vae, frames), *encode_text(pipe, captions)))
    empty = encode_text(pipe, [""])
    average = copy.deepcopy(transformer)
    steps = optimizers([transformer], iterations, learning_rate)
    for i in (bar := trange(iterations, desc="skyreels" if animates else "hunyuan")):
        data, *text = sets[i % 4 == 3 and not animates]
        pick = torch.randint(len(data), (batch,))
        data, text = data[pick], [x[pick] for x in text]
        sigma = torch.sigmoid(torch.randn(batch) + 0.8)
        noise = torch.randn_like(data)
        z = data + sigma.view(-1, 1, 1, 1, 1) * (noise - data)
        if animates:
            z = torch.cat([z, F.pad(firsts[pick], (0, 0, 0, 0, 0, data.shape[2] - 1))], 1)
            dropped = torch.rand(batch) < 0.1
            text = [x.where(~dropped.view(-1, *[1] * (x.ndim - 1)), e) for x, e in zip(text, empty, strict=True)]
        with fast():
            v = transformer(
                hidden_states=z,
                timestep=1000 * sigma,
                guidance=1000 + 6000 * torch.rand(batch),
                encoder_hidden_states=text[0],
                encoder_attention_mask=text[1],
                pooled_projections=text[2],
            ).sample
        loss = F.mse_loss(v.float(), noise - data)
        loss.backward()
        update([transformer], [average], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return average


def save(pipe, skyreels, folder):
    """folder/hunyuan, a whole pipeline, and folder/skyreels, a transformer alone, as on the hub; float16."""
    save_pipeline(pipe, folder / "hunyuan")
    copy.deepcopy(skyreels).half().save_pretrained(folder / "skyreels")


def animate(transformer):
    """SkyReels' transformer, initialised from this one: its first-frame channels have zero weights."""
    out = transformer.config.out_channels
    taught = new_transformer(2 * out, out)
    state = transformer.state_dict()
    weight = state["x_embedder.proj.weight"]  # (width, channels, 1, 2, 2)
    taught.load_state_dict(state | {"x_embedder.proj.weight": torch.cat([weight, torch.zeros_like(weight)], 1)})
    return taught


def make_video_models():
    """Trains tiny/hunyuan and tiny/skyreels and saves them: about an hour on one core."""
    pipe = new_hunyuan(train_vae())
    pipe.set_progress_bar_config(disable=True)
    skilled = train(pipe.transformer, pipe, 7000, faulty=0.1, pale=0.1, seed=0, clips=6000)
    pipe.transformer = train(copy.deepcopy(skilled), pipe, 600, faulty=0.6, pale=0.6, seed=1, learning_rate=1e-3)
    skyreels = train(animate(skilled), pipe, 2000, faulty=0.1, pale=0.1, seed=2)
    save(pipe, train(skyreels, pipe, 600, faulty=0.6, pale=0.1, seed=3, learning_rate=1e-3), MODELS)
