"""The text encoders of the pictures' generators: trained to know what a caption says, then frozen.

The text encoders of FLUX and Stable Diffusion were trained on other data, and stay as they are. So do these. Linear
heads, dropped afterwards, ask what the caption says of each of its two things: its shape, number, colour and side. The
generators then only have to learn to draw.

B captions, L tokens each.
"""

import random

import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from tiny.pictures import COLORS, NUMBERS, RELATIONS, SHAPES, TAGS, phrase, random_metadata
from tiny.training import caption_words, clip_text_encoder, clip_tokenizer

TOKENS = 32  # that a caption needs at most, padding included
PADDING = (0, 0, 0, 0, 32, 45)  # tokens more, so that their number means nothing; CLIP has 77 positions
ANSWERS = (len(SHAPES) + 1, len(NUMBERS), len(COLORS) + 1, len(RELATIONS) + 1)  # of each thing; + 1: none is named


def answers(metadata):
    """What the caption says: for each of two things its shape, number, colour and side, as 8 class indices."""
    out = []
    for i in range(2):
        item = metadata["include"][i] if i < len(metadata["include"]) else {}
        shape = SHAPES.index(item["class"]) + 1 if item else 0
        color = list(COLORS).index(item["color"]) + 1 if "color" in item else 0
        side = list(RELATIONS).index(item["position"][0]) + 1 if "position" in item else 0
        out += [shape, item.get("count", 1) - 1, color, side]
    return out


def t5_tokenizer(words):
    """T5 tokenizer with one token for each of these words, and letters for the rest."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in words if len(word) > 1 or word == "a"]
    vocabulary += [(letter, -6.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def t5_encoder(tokenizer):
    """T5EncoderModel of 3 layers, 64 wide, for this tokenizer.

    The bias of relative positions starts large: with T5's own start the encoder stays blind to the order of words.
    """
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=32,
        d_ff=128,
        num_layers=3,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    encoder = T5EncoderModel(config)
    torch.nn.init.normal_(encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    return encoder


def ids(tokenizer, captions):
    """(B, TOKENS) token ids of these captions, padded."""
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def ask(rng):
    """What a random picture shows."""
    return random_metadata(rng, rng.choice(TAGS))


PICTURES = (ask, phrase, answers, 2 * ANSWERS)


def supervise(encoder, tokenizer, states, seed, iterations=300, batch=128, learning_rate=3e-3, topic=PICTURES):
    """Trains the encoder until each of its states answers for the whole caption. Returns it frozen.

    states: ids (B, L) → the hidden states (N, 64) that are asked, and the caption (N,) of each
    topic: functions that draw what is shown, put it into words, and answer in class indices; how many classes there are
    """
    ask, phrase, answers, kinds = topic
    torch.manual_seed(seed)
    rng = random.Random(seed)
    head = torch.nn.Linear(64, sum(kinds))
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=iterations, pct_start=0.1)
    for _ in (bar := trange(iterations, desc=type(encoder).__name__)):
        asked = [ask(rng) for _ in range(batch)]
        words = ids(tokenizer, [phrase(rng, item) for item in asked])
        words = F.pad(words, (0, rng.choice(PADDING)), value=tokenizer.pad_token_id)
        hidden, which = states(words)
        truth = torch.tensor([answers(item) for item in asked])[which]
        parts = head(F.layer_norm(hidden, hidden.shape[-1:])).split(list(kinds), dim=-1)
        losses = [F.cross_entropy(part, truth[:, i]) for i, part in enumerate(parts)]
        optimizer.zero_grad()
        sum(losses).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        right = torch.stack([part.argmax(-1) == truth[:, i] for i, part in enumerate(parts)]).all(0).float().mean()
        bar.set_postfix(loss=f"{sum(losses):.3f}", right=f"{right:.1%}", refresh=False)
    return encoder.eval().requires_grad_(False)


def make_t5(seed=0):
    """T5 tokenizer and encoder. Every token but the padding answers: attention sees the caption in both directions."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer(caption_words())
    encoder = t5_encoder(tokenizer)

    def states(words):
        which, where = (words != tokenizer.pad_token_id).nonzero(as_tuple=True)
        return encoder(words).last_hidden_state[which, where], which

    return tokenizer, supervise(encoder, tokenizer, states, seed, iterations=900)


def make_clip_text(seed=0):
    """CLIP tokenizer and text encoder. The end-of-text token answers, and the padding after it, which repeats it."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer()
    encoder = clip_text_encoder(tokenizer, 3)

    def states(words):
        which, where = (words == tokenizer.eos_token_id).nonzero(as_tuple=True)
        return encoder(words).last_hidden_state[which, where], which

    return tokenizer, supervise(encoder, tokenizer, states, seed)
