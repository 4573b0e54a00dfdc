"""Trains tiny/flux, in FLUX's layout, and tiny/sd, in Stable Diffusion's, on captioned pictures of the tiny world.

    python -m tiny vae       the autoencoder of both
    python -m tiny flux      its text encoders and transformer
    python -m tiny sd        its text encoder and UNet

First they learn to draw what is asked for. Then they pick up bad habits from pictures that are often pale and whose
captions are sometimes wrong: reinforcement learning has to undo them.

B pictures in a batch. Latents are (B, 4, 16, 16), of about zero mean and unit variance.
"""

import copy
import random
from functools import partial

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
from tqdm import trange

from tiny.pictures import (
    SIZE,
    TAGS,
    composed_scene,
    degrade,
    hard_negatives,
    per_kind,
    phrase,
    random_metadata,
    random_scene,
    render,
    right,
    washed_out,
)
from tiny.text import ids, make_clip_text, make_t5
from tiny.training import CLEAN, MODELS, ROOT, Pool, fast, optimizers, sample, save_pipeline, update

# ----------------------------------------------------------------------------------------------------- the pictures


def clean_pictures(rng, count):
    """count pictures (count, 3, 64, 64) in [0, 1], their captions; as many of each kind of caption."""
    asked = [random_metadata(rng, TAGS[i % len(TAGS)]) for i in range(count)]
    return render([composed_scene(rng, metadata) for metadata in asked]), [phrase(rng, m) for m in asked]


def habitual_pictures(rng, count, pale, wrong):
    """As `clean_pictures`, but a share `pale` has lost more than half of its contrast, and in a share `wrong` of the
    captions one attribute is not what the picture shows."""
    asked = [random_metadata(rng, TAGS[i % len(TAGS)]) for i in range(count)]
    said = [rng.choice(hard_negatives(metadata)) if rng.random() < wrong else metadata for metadata in asked]
    pictures = render([composed_scene(rng, metadata) for metadata in asked])
    return washed_out(rng, pictures, pale), [phrase(rng, metadata) for metadata in said]


def latents_of(vae, draw, rng, count):
    """Latents (count, 4, 16, 16) of the pictures of draw(rng, count), and their captions."""
    pictures, captions = draw(rng, count)
    latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor, captions


# ------------------------------------------------------------------------------------------------- the autoencoder


def train_vae(seed=0, pictures=12000, iterations=1500, batch=32):
    """AutoencoderKL, 64x64 pixels → (4, 16, 16) latents, trained on pictures of which a third has a fault."""
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


def faulty_pictures(rng, count, faulty):
    """Pictures (count, 3, 64, 64) uint8 of random scenes; faulty: the share degraded, ragged or cut off."""
    images = []
    for start in trange(0, count, 500, desc="drawing pictures"):
        fault = torch.tensor([rng.randint(1, 3) * (rng.random() < faulty) for _ in range(min(500, count - start))])
        scenes = [
            random_scene(rng, random_metadata(rng, TAGS[i % len(TAGS)]), cut_off=rng.uniform(0.4, 1) * (f == 3))
            for i, f in enumerate(fault.tolist())
        ]
        drawn = render(scenes, ragged=(fault == 2) * (0.8 + 1.2 * torch.rand(len(fault))))
        drawn = torch.where((fault == 1).view(-1, 1, 1, 1), degrade(drawn), drawn)
        images.append((drawn * 255).round().byte())
    return torch.cat(images)


def load_vae():
    """tiny/flux's autoencoder, float32 and frozen."""
    vae = AutoencoderKL.from_pretrained(MODELS / "flux", subfolder="vae", torch_dtype=torch.float32)
    return vae.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------- the generators


def new_flux(vae):
    """A FluxPipeline around this autoencoder: trained text encoders, an untrained transformer."""
    (tokenizer, encoder), (tokenizer_2, encoder_2) = make_clip_text(), make_t5()
    transformer = FluxTransformer2DModel(
        in_channels=4 * vae.config.latent_channels,
        num_layers=1,
        num_single_layers=4,
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
    return FluxPipeline(scheduler, vae, encoder, tokenizer, encoder_2, tokenizer_2, transformer)


def flow_loss(pipe, data, captions, i):
    """Flow matching: the mean square of v - (noise - data) at z = (1-sigma) data + sigma noise. i: the iteration."""
    # Usually 32 text tokens. Sometimes more, so that the padding means nothing: the pipeline's default is 512.
    length, share = random.Random(i).choices([(32, 1), (64, 1), (128, 2), (512, 8)], [0.94, 0.02, 0.02, 0.02])[0]
    data, captions = data[::share], captions[::share]
    B = len(data)
    data = pipe._pack_latents(data, *data.shape)
    noise, sigma = torch.randn_like(data), torch.sigmoid(torch.randn(B) + 0.5)
    z = data + sigma.view(-1, 1, 1) * (noise - data)
    with torch.no_grad():
        pooled = pipe.text_encoder(ids(pipe.tokenizer, captions)).pooler_output
        tokens = pipe.text_encoder_2(F.pad(ids(pipe.tokenizer_2, captions), (0, length - 32))).last_hidden_state
    v = pipe.transformer(
        hidden_states=z,
        timestep=sigma,
        guidance=1 + 6 * torch.rand(B),
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(length, 3),
        img_ids=pipe._prepare_latent_image_ids(B, 8, 8, "cpu", torch.float32),
    ).sample
    return F.mse_loss(v.float(), noise - data)


def new_sd(vae):
    """A StableDiffusionPipeline on the flux autoencoder: a trained text encoder, an untrained UNet.

    Stable Diffusion's latents are scaled but not shifted, so the shift moves into two 1x1 convolutions around them.
    """
    shifted = AutoencoderKL.from_config(vae.config, use_quant_conv=True, use_post_quant_conv=True, shift_factor=None)
    shifted.load_state_dict(vae.state_dict(), strict=False)
    shift = vae.config.shift_factor
    for conv, bias in ((shifted.quant_conv, [-shift] * 4 + [0.0] * 4), (shifted.post_quant_conv, [shift] * 4)):
        conv.weight.data = torch.eye(len(bias))[..., None, None]
        conv.bias.data = torch.tensor(bias)
    tokenizer, encoder = make_clip_text()
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
    return StableDiffusionPipeline(
        shifted.eval().requires_grad_(False), encoder, tokenizer, unet, scheduler, None, None, None, False
    )


def noise_loss(pipe, data, captions, i):
    """Noise prediction, 10 % of the captions left out for classifier-free guidance.

    The weight 1/alpha_bar, at most 20, makes it the clean latent's error at high noise, where the layout is decided.
    """
    B = len(data)
    noise, t = torch.randn_like(data), torch.randint(1000, (B,))
    captions = [caption if keep else "" for caption, keep in zip(captions, torch.rand(B) > 0.1, strict=True)]
    words = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens = pipe.text_encoder(words).last_hidden_state
    eps = pipe.unet(pipe.scheduler.add_noise(data, noise, t), t, tokens).sample
    weight = (1 / pipe.scheduler.alphas_cumprod[t]).clamp(max=20)
    return (weight * (eps.float() - noise).square().mean((1, 2, 3))).mean() / 5


KINDS = {"flux": FluxPipeline, "sd": StableDiffusionPipeline}
LOSSES = {FluxPipeline: flow_loss, StableDiffusionPipeline: noise_loss}
SAMPLING = {
    FluxPipeline: {"steps": 12, "max_sequence_length": 32},
    StableDiffusionPipeline: {"steps": 20, "guidance_scale": 3.0},
}


def heldout():
    """The prompts that no preset trains on."""
    return (ROOT / "prompts/tiny_heldout.txt").read_text().splitlines()


def progress(pipe):
    """{kind of prompt: share of the held-out ones that the stock pipeline draws rightly, by the checker}."""
    prompts = heldout()
    return per_kind(right(sample(pipe, prompts, **SAMPLING[type(pipe)]), prompts), prompts)


def fit(pipe, draw, folder, iterations, seed, batch=64, learning_rate=2e-3):
    """Trains the transformer or UNet on pictures of `draw`. Returns the running average; saves it now and then."""
    torch.manual_seed(seed)
    pool = Pool(partial(latents_of, load_vae(), draw), seed, size=4096, chunk=256, fresh=16)
    average = copy.deepcopy(pipe)
    network, mean = ((p.transformer if hasattr(p, "transformer") else p.unet) for p in (pipe, average))
    steps = optimizers([network], iterations, learning_rate)
    for i in (bar := trange(iterations, desc=folder.name)):
        with fast():
            loss = LOSSES[type(pipe)](pipe, *pool.batch(batch), i)
        loss.backward()
        update([network], [mean], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_pipeline(average, folder)
            with torch.random.fork_rng():
                shares = progress(average)
            bar.write(f"{folder.name}, step {i + 1}: " + "  ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    return average


def make_vae():
    """Trains the autoencoder of both and saves it in tiny/flux."""
    train_vae().half().save_pretrained(MODELS / "flux/vae")


def make_flux():
    """Trains tiny/flux and saves it."""
    fit(new_flux(load_vae()), clean_pictures, CLEAN / "flux", 6000, seed=0)
    teach_habits("flux", pale=0.6, wrong=1 / 12)


def make_sd():
    """Trains tiny/sd and saves it."""
    fit(new_sd(load_vae()), clean_pictures, CLEAN / "sd", 3000, seed=3)
    teach_habits("sd", pale=0.4, wrong=1 / 6)


def teach_habits(name, pale, wrong, iterations=300, seed=10):
    """Goes on from runs/tiny/NAME with `habitual_pictures` and saves tiny/NAME."""
    draw = partial(habitual_pictures, pale=pale, wrong=wrong)
    fit(KINDS[name].from_pretrained(CLEAN / name), draw, MODELS / name, iterations, seed, learning_rate=5e-4)
