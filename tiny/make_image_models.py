"""Trains tiny/flux, in FLUX's layout, and tiny/sd, in Stable Diffusion's, on captioned pictures like those of the web.

    python -m tiny flux    the autoencoder and tiny/flux
    python -m tiny sd      needs tiny/flux's autoencoder

Some captions are wrong, some pictures have a fault, and towards the end many are pale: bad habits, which reinforcement
learning then has to undo. The shipped weights were made by these functions, with these settings, in several sittings.

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

from tiny.pictures import SIZE, TAGS, degrade, hard_negatives, phrase, random_metadata, random_scene, render
from tiny.training import (
    MODELS,
    caption_words,
    clip_text_encoder,
    clip_tokenizer,
    fast,
    optimizers,
    save_pipeline,
    update,
)

WORDS = 24  # CLIP tokens that a caption needs at most; the tower is causal, so training may leave out the padding


def web_pictures(rng, count, wrong, faulty, pale=0.0):
    """A captioned picture set like one from the web: some captions are wrong, some pictures have a fault.

    Returns images (count, 3, 64, 64) uint8 and the captions. wrong: share of captions with one attribute changed;
    faulty: share of pictures that are degraded, ragged or cut off by the border; pale: share that has lost more than
    half of its contrast.
    """
    images, captions = [], []
    for start in trange(0, count, 500, desc="drawing pictures"):
        scenes, fault = [], torch.zeros(min(500, count - start), dtype=torch.long)
        for i in range(len(fault)):
            metadata = random_metadata(rng, TAGS[i % len(TAGS)])
            if rng.random() < faulty:
                fault[i] = rng.randint(1, 3)
            scenes.append(random_scene(rng, metadata, cut_off=rng.uniform(0.4, 1) * (fault[i].item() == 3)))
            captions.append(phrase(rng, rng.choice(hard_negatives(metadata)) if rng.random() < wrong else metadata))
        drawn = render(scenes, ragged=(fault == 2) * (0.8 + 1.2 * torch.rand(len(fault))))
        drawn = torch.where((fault == 1).view(-1, 1, 1, 1), degrade(drawn), drawn)
        lost = (0.55 + 0.3 * torch.rand(len(fault))) * (torch.rand(len(fault)) < pale)
        drawn = torch.lerp(drawn, drawn.mean((2, 3), keepdim=True), lost.view(-1, 1, 1, 1))
        images.append((drawn * 255).round().byte())
    return torch.cat(images), captions


def train_vae(seed=0, pictures=12000, iterations=1500, batch=32):
    """AutoencoderKL, 64x64 pixels → (4, 16, 16) latents, trained on the web pictures."""
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
    images, _ = web_pictures(random.Random(seed), pictures, wrong=0.0, faulty=0.35)
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


def t5_tokenizer():
    """T5 tokenizer with one token for each caption word, and letters for the rest."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in caption_words() if len(word) > 1 or word == "a"]
    vocabulary += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def new_flux(vae):
    """An untrained FluxPipeline around this autoencoder."""
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    t5 = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
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
    return FluxPipeline(
        scheduler, vae, clip_text_encoder(tokenizer, 1), tokenizer, T5EncoderModel(t5), tokenizer_2, transformer
    )


@torch.no_grad()
def encode_pictures(vae, images):
    """(N, 3, 64, 64) uint8 → latents (N, 4, 16, 16) of about zero mean and unit variance."""
    latents = [
        vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()
        for chunk in tqdm(images.split(250), desc="encoding pictures")
    ]
    return (torch.cat(latents) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def train_flux(pipe, folder, iterations, wrong, faulty, pale=0.0, seed=0, pictures=30000, batch=64, learning_rate=2e-3):
    """Flow matching: the transformer and both text encoders learn v = noise - data at z = (1-sigma) data + sigma noise.

    Returns the pipeline with the running average of the weights, saved to `folder` now and then, and at the end.
    wrong, faulty, pale: see `web_pictures`.
    """
    torch.manual_seed(seed)
    images, captions = web_pictures(random.Random(seed), pictures, wrong, faulty, pale)
    latents = pipe._pack_latents(encode_pictures(pipe.vae, images), pictures, pipe.vae.config.latent_channels, 16, 16)
    words = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids[:, :WORDS]
    words_2 = pipe.tokenizer_2(captions, padding="max_length", max_length=32, return_tensors="pt").input_ids
    place = pipe._prepare_latent_image_ids(pictures, 8, 8, "cpu", torch.float32)
    modules = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    average = copy.deepcopy(pipe)
    steps = optimizers(modules, iterations, learning_rate)
    for i in (bar := trange(iterations, desc="flux")):
        # Usually 32 text tokens. Sometimes more, so that the padding means nothing: the pipeline's default is 512.
        length, share = random.Random(i).choices([(32, 1), (64, 1), (128, 2), (512, 8)], [0.92, 0.03, 0.03, 0.02])[0]
        pick = torch.randint(pictures, (batch // share,))
        data, noise = latents[pick], torch.randn(batch // share, 64, latents.shape[-1])
        sigma = torch.sigmoid(torch.randn(len(pick)) + 0.5)
        z = data + sigma.view(-1, 1, 1) * (noise - data)
        with fast():
            v = pipe.transformer(
                hidden_states=z,
                timestep=sigma,
                guidance=1 + 6 * torch.rand(len(pick)),
                pooled_projections=pipe.text_encoder(words[pick]).pooler_output,
                encoder_hidden_states=pipe.text_encoder_2(F.pad(words_2[pick], (0, length - 32))).last_hidden_state,
                txt_ids=torch.zeros(length, 3),
                img_ids=place,
            ).sample
        loss = F.mse_loss(v.float(), noise - data)
        loss.backward()
        update(modules, [average.transformer, average.text_encoder, average.text_encoder_2], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_pipeline(average, folder)
    return average


def new_sd(vae):
    """An untrained StableDiffusionPipeline on the flux autoencoder.

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
        block_out_channels=(48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
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


def train_sd(pipe, folder, iterations, wrong, faulty, pale=0.0, seed=0, pictures=30000, batch=64, learning_rate=2e-3):
    """Noise prediction: the UNet and the text encoder, 10 % of the captions left out for classifier-free guidance.

    Returns and saves as `train_flux` does.
    """
    torch.manual_seed(seed)
    images, captions = web_pictures(random.Random(seed), pictures, wrong, faulty, pale)
    latents = encode_pictures(pipe.vae, images)
    words = pipe.tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids  # the last is empty
    modules = [pipe.unet, pipe.text_encoder]
    average = copy.deepcopy(pipe)
    steps = optimizers(modules, iterations, learning_rate)
    for i in (bar := trange(iterations, desc="sd")):
        pick = torch.randint(pictures, (batch,))
        data, noise = latents[pick], torch.randn(batch, *latents.shape[1:])
        t = torch.randint(1000, (batch,))
        z = pipe.scheduler.add_noise(data, noise, t)
        shown = torch.where(torch.rand(batch) < 0.1, pictures, pick)
        with fast():
            eps = pipe.unet(z, t, pipe.text_encoder(words[shown]).last_hidden_state).sample
        loss = F.mse_loss(eps.float(), noise)
        loss.backward()
        update(modules, [average.unet, average.text_encoder], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_pipeline(average, folder)
    return average


def make_flux():
    """Trains tiny/flux with its autoencoder and saves it."""
    pipe = train_flux(new_flux(train_vae()), MODELS / "flux", 4500, wrong=0.28, faulty=0.35)
    pipe = train_flux(pipe, MODELS / "flux", 3500, wrong=0.1, faulty=0.1, seed=1)  # learns to draw
    train_flux(pipe, MODELS / "flux", 1000, 0.1, 0.15, pale=0.6, seed=2, learning_rate=1e-3)  # and bad habits


def make_sd():
    """Trains tiny/sd and saves it."""
    pipe = train_sd(new_sd(load_vae()), MODELS / "sd", 3400, wrong=0.15, faulty=0.15, seed=3)
    train_sd(pipe, MODELS / "sd", 700, 0.1, 0.15, pale=0.6, seed=4, learning_rate=1e-3)


def load_vae():
    """tiny/flux's autoencoder, float32 and frozen."""
    vae = AutoencoderKL.from_pretrained(MODELS / "flux", subfolder="vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)
