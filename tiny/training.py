"""What the make_*.py share: optimizers, tokenizers and text encoders for the captions, and the public file formats."""

import contextlib
import copy
import io
import json
import random
import shutil
import zipfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

from tiny.pictures import SIZE, TAGS, phrase, random_metadata

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "tiny"  # one folder of weights for each model
CLEAN = ROOT / "runs/tiny"  # the generators before they have bad habits


@contextlib.contextmanager
def fast():
    """bfloat16 and unfused attention, whose backward pass is four times faster on a CPU than the fused kernel's."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


class Pool:
    """Training examples, of which the oldest make room for fresh ones before each batch.

    make(rng, count) → the parts of `count` examples, each a tensor (count, …) or a list; `chunk` of them at a time.
    """

    def __init__(self, make, seed, size, chunk, fresh):
        self.make, self.fresh, self.rng, self.oldest, self.size = make, fresh, random.Random(seed), 0, size
        chunks = [self._more(chunk) for _ in trange(size // chunk, desc="drawing examples")]
        self.parts = [
            torch.cat(part) if torch.is_tensor(part[0]) else [item for items in part for item in items]
            for part in zip(*chunks, strict=True)
        ]

    @torch.no_grad()
    def _more(self, count):
        return self.make(self.rng, count)

    def batch(self, B):
        """The parts of B examples."""
        new = slice(self.oldest, self.oldest + self.fresh)
        for part, more in zip(self.parts, self._more(self.fresh), strict=True):
            part[new] = more
        self.oldest = new.stop % self.size
        pick = self.rng.sample(range(self.size), B)
        return [part[pick] if torch.is_tensor(part) else [part[i] for i in pick] for part in self.parts]


def optimizers(modules, iterations, learning_rate):
    """Muon for the matrices of the blocks, AdamW for everything else, each with its one-cycle schedule."""
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim == 2 and "embed" not in name and "shared" not in name
            (matrices if hidden else rest).append(parameter)
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    cycle = {"total_steps": iterations, "pct_start": 0.05, "cycle_momentum": False}
    return [(o, torch.optim.lr_scheduler.OneCycleLR(o, learning_rate, **cycle)) for o in (muon, adamw)]


def step(modules, steps):
    """One step of every optimizer, after the backward pass."""
    for module in modules:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    for optimizer, schedule in steps:
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def update(modules, averages, steps, i):
    """One step of every optimizer, then of the running averages of the first modules' weights (i counts from 0)."""
    step(modules, steps)
    with torch.no_grad():
        for old, new in zip(averages, modules, strict=True):
            share = 1 - min(0.999, (i + 1) / (i + 10))
            torch._foreach_lerp_(list(old.parameters()), list(new.parameters()), share)


@torch.no_grad()
def sample(pipe, prompts, steps, seed=0, **options):
    """Pictures (B, 3, 64, 64) in [0, 1] by the stock pipeline, one for each prompt."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options |= {"num_inference_steps": steps, "height": SIZE, "width": SIZE, "output_type": "pt"}
    parts = [
        pipe(prompts[i : i + 64], generator=generator, **options).images
        for i in trange(0, len(prompts), 64, desc="sampling", leave=False)
    ]
    return torch.cat(parts).float()


def caption_words():
    """Every word that a caption can contain."""
    rng = random.Random(0)
    return sorted({word for i in range(6000) for word in phrase(rng, random_metadata(rng, TAGS[i % 6])).split()})


def clip_tokenizer():
    """CLIPTokenizer with one token for each caption word; other words are spelt out."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(model_max_length=77).train_new_from_iterator([" ".join(caption_words())] * 3, 1000)


def clip_text_encoder(tokenizer, layers):
    """CLIPTextModel, 64 wide, for this tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def save_pipeline(pipe, folder):
    """The pipeline's folder, float16; the pipeline itself stays as it is.

    Transformers loads a model in the type that its config names, diffusers in float32. The text encoders' configs say
    float32, so that `from_pretrained` without a type gives a pipeline that is float32 throughout.
    """
    shutil.rmtree(folder, ignore_errors=True)
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    half = {name: part.half() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    saved = type(pipe)(**half)
    saved.register_to_config(**{k: v for k, v in pipe.config.items() if k == "requires_safety_checker"})
    saved.save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)  # where it was loaded from before
        config |= {"dtype": "float32"} if file.parent.name.startswith("text_encoder") else {}
        file.write_text(json.dumps(config, indent=2) + "\n")
    if type(pipe).__name__.startswith("Hunyuan"):
        name_llama_s_tokenizer(folder)


def name_llama_s_tokenizer(folder):
    """Gives a HunyuanVideo's first tokenizer the name that it has on the hub, which is not that of its file's kind."""
    for file in (folder / "model_index.json", folder / "tokenizer/tokenizer_config.json"):
        file.write_text(file.read_text().replace('"TokenizersBackend"', '"LlamaTokenizerFast"'))


def stock_pipeline(kind, folder, **parts):
    """The pipeline as diffusers loads it, but for a HunyuanVideo's tokenizer: see `rewards.load_tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    if kind.__name__.startswith("Hunyuan"):
        parts["tokenizer"] = PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
    return kind.from_pretrained(folder, **parts)


def save_zipped(state, path):
    """torch.save, with its zip archive compressed. torch.load reads it as it is."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
