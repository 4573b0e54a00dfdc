"""What goes into a run: prompts and their embeddings, first frames, and noise that is a function of its key alone."""

import gc
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub import errors
from torch import Tensor, nn
from tqdm import tqdm

from rewards import fetched_once, first_line, text_at

from .files import write_atomically
from .options import RunError, find_place, require
from .pictures import read_picture, save_image
from .processes import World

RELEASE = "https://raw.githubusercontent.com/XueZeyue/DanceGRPO/15cc71d53cc2e6e18a68ee607d5fb6ba9a99e344/assets"
# name: (data set on the hub, its JSON file with a "prompt" in each row), or (address, text file of one prompt a line)
PROMPT_SETS = {
    "hpdv2": ("ymhao/HPDv2", "train.json"),
    "vidprom": (RELEASE, "video_prompts.txt"),  # filtered
    "consisid": (RELEASE, "consist-id.txt"),
}


# --------------------------------------------------------------------------------------------------------- randomness


def keyed_rng(purpose: str, *key: int) -> np.random.Generator:
    """A generator that is a function of its key alone: same on any process, before and after a resume."""
    return np.random.default_rng([zlib.crc32(purpose.encode()), *key])


def keyed_noise(shape: Sequence[int], keys: Iterable[Sequence[int]], purpose: str, device) -> Tensor:
    """Standard normal (len(keys), *shape) float32; each sample drawn from its own key."""
    rows = [keyed_rng(purpose, *key).standard_normal(shape, dtype=np.float32) for key in keys]
    return torch.from_numpy(np.stack(rows)).to(device)


# ------------------------------------------------------------------------------------------------------------ prompts


def load_prompts(source: str) -> list[str]:
    """Prompts from a text file (one a line), a JSONL file ({"prompt": …}), or a public set named in PROMPT_SETS.

    A public set is fetched from the hub once and kept as a text file in the hub's cache folder.
    """
    path = _fetch_prompt_set(source) if source in PROMPT_SETS else Path(source).expanduser()
    is_text = path.is_file() and path.suffix.lower() not in (".json", ".csv", ".tsv", ".parquet")
    known = f"a text file (one a line), a JSONL file ({{prompt: …}} a line), or one of: {', '.join(PROMPT_SETS)}"
    require(is_text, f"no prompt file {source!r}; give {known}")
    prompts = []
    for number, line in enumerate(read_lines(path), 1):
        if path.suffix.lower() == ".jsonl" and line.strip():
            line = _json_field(line, "prompt", f"{source} line {number}")
        require(bool(line.strip()), f"{source} line {number} is blank; remove it, every line is a prompt")
        whole = line.encode("utf-8", "ignore").decode() == line
        require(whole, f"{source} line {number} holds half a character (a lone surrogate); correct it")
        prompts.append(line.strip())
    require(bool(prompts), f"the prompt file {source} is empty; write one prompt a line")
    return prompts


def load_metadata(source: str) -> dict[str, dict]:
    """{prompt: its row} of a JSONL file, for first frames and for GenEval; {} of any other source.

    Raises RunError if a prompt has two rows that differ in what it is to show.
    """
    path, rows = Path(source).expanduser(), {}
    if source in PROMPT_SETS or path.suffix.lower() != ".jsonl":
        return {}
    for number, row in enumerate(map(json.loads, read_lines(path)), 1):
        first = rows.setdefault(row["prompt"].strip(), row)
        other = [key for key in ("image", "tag", "include", "exclude") if first.get(key) != row.get(key)]
        same = f"{source} line {number}: its prompt appears above with another {' and '.join(other)}"
        require(not other, f"{same}; write the difference into the prompt, or remove one of them")
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, with or without byte order mark; a blank last line is left out.

    Only a line feed ends a line: `splitlines` would also split at characters that a prompt may contain.
    Raises RunError if it cannot be read.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # read_text would split at carriage returns, too
    except (OSError, UnicodeDecodeError) as e:
        raise RunError(f"cannot read {path}: {e}; it must be UTF-8 text") from e
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _json_field(line: str, name: str, where: str) -> str:
    try:
        value = json.loads(line)[name]
    except (ValueError, RecursionError, KeyError, TypeError) as e:
        raise RunError(f'{where} is not {{"{name}": "…"}} ({type(e).__name__}: {e})') from e
    require(isinstance(value, str), f"{where}: the {name} must be a string")
    return value


def _fetch_prompt_set(name: str) -> Path:
    source, file = PROMPT_SETS[name]

    def fetch() -> str:
        if source.startswith("https://"):
            lines = text_at(f"{source}/{file}").split("\n")
        else:
            lines = [row["prompt"] for row in json.loads(text_on_hub(source, file))]
        prompts = dict.fromkeys(" ".join(line.split()) for line in lines)  # unique, in the file's order
        return "\n".join(prompt for prompt in prompts if prompt) + "\n"

    return fetched_set(f"{name}.txt", fetch, f"{file} of {source}")


def text_on_hub(data_set: str, file: str) -> str:
    """The text of a file of a data set on the hub. Raises OSError."""
    try:
        return Path(huggingface_hub.hf_hub_download(data_set, file, repo_type="dataset")).read_text(encoding="utf-8")
    except errors.HTTPError as e:
        raise OSError(first_line(e)) from e


def fetched_set(name: str, fetch: Callable[[], str], source: str) -> Path:
    """`rewards.fetched_once` for a file of prompts. Raises RunError if it cannot be fetched."""
    try:
        return fetched_once(name, fetch)
    except OSError as e:  # every error of the hub's own is one
        raise RunError(f"cannot fetch {source} ({first_line(e)}); give --prompts a file of your own") from e


def prompt_batch(num_prompts: int, batch_size: int, iteration: int, seed: int) -> list[int]:
    """Indices of an iteration's prompts: epochs of a shuffled list, one after the other, without a gap."""
    positions = range(iteration * batch_size, (iteration + 1) * batch_size)
    order = {
        epoch: keyed_rng("prompts", seed, epoch).permutation(num_prompts)
        for epoch in {p // num_prompts for p in positions}
    }
    return [int(order[p // num_prompts][p % num_prompts]) for p in positions]


class PromptCache:
    """What frozen encoders make of prompts, so that each prompt is encoded once.

    encode   list of prompts → a tensor (P, …), or a tuple or list of them
    network  the trained one, which with --offload makes room for the encoders
    Prompts are encoded one by one: the result must not depend on which were encoded before, or in another process.
    """

    SIZE = 256  # prompts that are kept

    def __init__(self, encode: Callable, world: World, network: nn.Module, *encoders: nn.Module):
        self.encode, self.world, self.network, self.encoders, self.kept = encode, world, network, encoders, {}

    def __call__(self, prompts: Sequence[str]) -> Any:
        """What `encode` gives for these prompts."""
        if missing := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]:
            with self.world.on_device(*self.encoders, instead_of=self.network):
                self.kept |= {prompt: self.encode([prompt]) for prompt in missing}
        rows = [self.kept[prompt] for prompt in prompts]
        for prompt in list(self.kept)[: -self.SIZE]:
            del self.kept[prompt]
        return join(rows) if isinstance(rows[0], Tensor) else type(rows[0])(map(join, zip(*rows, strict=True)))


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors (n, …); shorter ones are padded with zeros to the size of the largest."""
    sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    pads = [
        [x for size, own in zip(sizes[::-1], t.shape[:0:-1], strict=True) for x in (0, size - own)] for t in tensors
    ]
    return torch.cat([nn.functional.pad(tensor, pad) for tensor, pad in zip(tensors, pads, strict=True)])


# ------------------------------------------------------------------------------------------------------- first frames


def first_frames(config, prompts: list[str]) -> dict[str, Path]:
    """{prompt: picture} for all prompts that an image-to-video run will visit; checked before any model is loaded.

    --first-frames is a JSONL file of {"prompt": …, "image": …}, images relative to it, or a folder with such a
    first_frames.jsonl. --prompts may be such a JSONL file, too; --first-frames comes first. A picture that neither
    lists is FOLDER/HASH-WIDTHxHEIGHT.png; `paint_first_frames` makes it, given a --first-frame-model.
    Raises RunError if one is missing or broken.
    """
    asked, listed = Path(config.prompts).expanduser(), {}
    source = Path(config.first_frames).expanduser() if config.first_frames else asked
    index = source if source.suffix.lower() == ".jsonl" else source / "first_frames.jsonl"
    painter = "" if index == source else config.first_frame_model  # a JSONL file is no folder to paint into
    require(
        index == source or bool(config.first_frames),
        "image to video needs first frames: name a folder or a JSONL file with --first-frames, or give --prompts a "
        'JSONL file of {"prompt", "image"}',
    )
    for number, line in enumerate(read_lines(index) if index.is_file() else [], 1):
        for name in ("prompt", "image"):
            _json_field(line, name, f"{index} line {number}")
    for file in dict.fromkeys([asked, index] if index.is_file() else [asked]):
        images = {prompt: row.get("image") for prompt, row in load_metadata(str(file)).items()}
        listed |= {prompt: file.parent / str(image) for prompt, image in images.items() if image}
    batch_size = config.prompts_per_iteration
    epoch = range(min(config.iterations, -(-len(prompts) // batch_size)))  # of iterations, after which all were visited
    batches = (prompt_batch(len(prompts), batch_size, i, config.seed) for i in epoch)
    pictures, visited = {}, prompts[: config.num_samples] + [prompts[i] for batch in batches for i in batch]
    place, size = find_place(), f"{config.width}x{config.height}"
    for n, prompt in enumerate(tqdm(dict.fromkeys(visited), desc="first frames", delay=2.0, disable=place.rank > 0)):
        path = listed.get(prompt, source / f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}-{size}.png")
        if n % place.size == place.rank and (prompt in listed or path.is_file()):  # the processes share the reading
            read_picture(path)
        require(
            prompt in listed or path.is_file() or bool(painter),
            f"no first frame for {prompt!r} in {index}; add it there, or give --first-frames a folder and "
            "--first-frame-model a text-to-image model that paints it",
        )
        pictures[prompt] = path
    return pictures


def paint_first_frames(config, pictures: dict[str, Path], world: World) -> None:
    """Paint each missing picture once, from noise that depends on its prompt alone."""
    from diffusers import AutoPipelineForText2Image

    from .loading import load_pipeline

    missing = world.from_main([(prompt, path) for prompt, path in pictures.items() if not path.exists()])
    if not missing:
        require_there(pictures)
        return
    folder, size = Path(config.first_frames).expanduser(), f"{config.width}x{config.height}"
    world.require_shared(folder)
    with world.in_turn():
        pipe = load_pipeline(AutoPipelineForText2Image, config.first_frame_model, world, "--first-frame-model")
        pipe.to(world.device)  # also with --offload: nothing else is there yet
    options = {"height": config.height, "width": config.width, "num_inference_steps": config.first_frame_steps}
    for prompt, path in world.progress(missing[world.rank :: world.size], desc="painting first frames"):
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        save_image(path, pipe(prompt, generator=generator, **options).images[0])
    del pipe
    gc.collect()  # its parts refer to each other, and the run needs the room
    if world.is_main:  # for eval.py --prompts
        places = {prompt: os.path.relpath(path, folder) for prompt, path in pictures.items()}
        rows = [json.dumps({"prompt": prompt, "image": place}) for prompt, place in places.items()]
        write_atomically(folder / f"painted-{size}.jsonl", "\n".join(rows) + "\n")
    world.barrier()
    require_there(pictures)


def require_there(pictures: dict[str, Path]) -> None:
    lost = [path for path in pictures.values() if not path.is_file()]
    first = (lost or [""])[0]
    require(not lost, f"{first} is not here; --first-frames must be on a file system that all machines share")
