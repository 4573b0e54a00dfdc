"""How tiny/wan, in Wan 2.1's layout, was trained.

    python -m tiny wan      trains it from nothing

It draws clips of 9 frames of 32x32 pixels at 2 frames a second, as tiny/hunyuan does, and single frames. First it
learns to draw what is asked for. Then it picks up bad habits from clips that are often pale, flickering or trembling:
reinforcement learning has to undo them.

A clip is (9, 3, 32, 32), its latent (16, 3, 4, 4). N clips in a batch.
"""

import copy
import random
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tqdm import trange
from transformers import UMT5Config, UMT5EncoderModel

from tiny.clips import right
from tiny.make_video_models import (
    ANSWERS,
    FRAMES,
    answers,
    ask,
    fit_vae,
    heldout,
    load_clean,
    say,
    web_clips,
    web_frames,
    words_of_captions,
)
from tiny.text import supervise, t5_tokenizer
from tiny.training import CLEAN, MODELS, Pool, fast, optimizers, save_pipeline, update

TOKENS = 24  # that a caption needs at most


def latents_of(vae, draw, rng, count):
    """Latents (count, 16, f, 4, 4), standardised, of the clips of draw(rng, count), and their captions."""
    clips, captions = draw(rng, count)
    z, config = vae.encode(clips.transpose(1, 2).float() / 127.5 - 1).latent_dist.mode(), vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (z - mean) / std, captions


# -------------------------------------------------------------------------------------------------- the autoencoder


def train_vae(seed=0, clips=3000, iterations=2500):
    """AutoencoderKLWan, 9 frames of 32x32 → (16, 3, 4, 4) latents.

    It works on blocks of 2x2 pixels, which makes it four times as fast.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=8,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
    )
    for name, weight in vae.named_parameters():  # residual branches start at zero: a nearly linear network learns fast
        if name.endswith(("conv2.weight", "proj.weight")):
            torch.nn.init.zeros_(weight)
    z = fit_vae(vae, random.Random(seed), clips, iterations, precision=fast)
    mean, std = ([round(x, 4) for x in f(z.transpose(0, 1).flatten(1), 1).tolist()] for f in (torch.mean, torch.std))
    vae.register_to_config(latents_mean=mean, latents_std=std)
    return vae


# ------------------------------------------------------------------------------------------------- the text encoder


def make_umt5(seed=0):
    """T5 tokenizer and UMT5 encoder of 3 layers, 64 wide, trained until every token knows what the caption says.

    The bias of relative positions starts large, as in `tiny.text.t5_encoder`.
    """
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(words_of_captions())
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=32, d_ff=128, num_layers=3, num_heads=2, dropout_rate=0.0
    )
    encoder = UMT5EncoderModel(config)
    for block in encoder.encoder.block:
        torch.nn.init.normal_(block.layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)

    def states(words):
        mask = words != tokenizer.pad_token_id
        which, where = mask.nonzero(as_tuple=True)
        return encoder(words, mask).last_hidden_state[which, where], which

    return tokenizer, supervise(encoder, tokenizer, states, seed, 500, topic=(ask, say, answers, ANSWERS))


# ---------------------------------------------------------------------------------------------------- the transformer


def new_wan(vae):
    """A WanPipeline around this autoencoder: a trained text encoder, an untrained transformer."""
    tokenizer, encoder = make_umt5()
    transformer = WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        num_layers=5,
        ffn_dim=288,
        text_dim=64,
        freq_dim=64,
        rope_max_seq_len=64,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(tokenizer, encoder, vae, scheduler, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_loss(pipe, data, captions, i):
    """Flow matching: the mean square of v - (noise - data) at z = (1-sigma) data + sigma noise. i: the iteration.

    A tenth of the captions is left out, for classifier-free guidance.
    """
    # Usually 24 text tokens. Sometimes more, so that the padding means nothing: the pipeline's default is 512.
    length, share = random.Random(i).choices([(TOKENS, 1), (64, 1), (512, 8)], [0.92, 0.04, 0.04])[0]
    data, captions = data[::share], captions[::share]
    captions = [caption if keep else "" for caption, keep in zip(captions, torch.rand(len(data)) > 0.1, strict=True)]
    with torch.no_grad():
        text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
    sigma, noise = torch.sigmoid(torch.randn(len(data)) + 0.8), torch.randn_like(data)
    z = data + sigma.view(-1, 1, 1, 1, 1) * (noise - data)
    v = pipe.transformer(z, 1000 * sigma, text.float()).sample
    return F.mse_loss(v.float(), noise - data)


@torch.no_grad()
def sample(pipe, captions, steps=10, seed=0):
    """Videos (N, 9, 3, 32, 32) in [0, 1] by the stock pipeline, with its own sampler and guidance 2."""
    options = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": steps, "guidance_scale": 2.0}
    options |= {"max_sequence_length": TOKENS, "generator": torch.Generator().manual_seed(seed), "output_type": "pt"}
    return pipe(captions, **options).frames


def fit(pipe, draws, folder, iterations, seed, batch=64, learning_rate=2e-3):
    """Trains the transformer on clips of draws[0], and every sixth time on those of draws[1].

    Returns a copy of the pipeline with the running average, which it also saves now and then.
    """
    torch.manual_seed(seed)
    makes = [partial(latents_of, pipe.vae, draw) for draw in draws]
    pools = [Pool(make, seed + i, size=1536, chunk=64, fresh=4) for i, make in enumerate(makes)]
    prompts = [row["prompt"] for row in heldout()]
    average = copy.copy(pipe)
    average.transformer = copy.deepcopy(pipe.transformer)
    steps = optimizers([pipe.transformer], iterations, learning_rate)
    for i in (bar := trange(iterations, desc=folder.name)):
        with fast():
            loss = flow_loss(pipe, *pools[i % 6 == 5].batch(batch), i)
        loss.backward()
        update([pipe.transformer], [average.transformer], steps, i)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        if (i + 1) % 500 == 0 or i + 1 == iterations:
            save_pipeline(average, folder)
            bar.write(f"step {i + 1}: {right(sample(average, prompts), prompts).mean():.0%} right")
    return average


def make_wan():
    """Trains tiny/wan and saves it: first runs/tiny/wan, which draws well, then its bad habits."""
    fit(new_wan(train_vae()), [web_clips, web_frames], CLEAN / "wan", 4000, seed=0)
    pipe = load_clean(WanPipeline, "wan")
    habits = [partial(web_clips, pale=0.5, flicker=0.4, tremble=0.4), partial(web_frames, pale=0.6)]
    fit(pipe, habits, MODELS / "wan", 300, seed=10, learning_rate=1e-3)
