"""The prompts of an evaluation: a file, HPS-v2's benchmark, or GenEval's; checked before any model is loaded."""

import json
from pathlib import Path

from evaluation import geneval
from rewards import text_at
from runtime import data, pictures
from runtime.options import require

HPS_REPO, HPS_STYLES = "zhwang/HPDv2", ("anime", "concept-art", "paintings", "photo")
GENEVAL_URL = "https://raw.githubusercontent.com/djghosh13/geneval/d927da8e42fde2b1b5cd743da4df5ff83c1654ff/"
GENEVAL_URL += "prompts/evaluation_metadata.jsonl"


def load_rows(source: str, detector, needs_image: bool) -> list[dict]:
    """A row for each prompt: {"prompt"}, and where it has one its "style", its "image", GenEval's metadata.

    source: a text or JSONL file, hpsv2 or geneval; detector: GenEval's, or None if it is not a metric.
    """
    file = Path(source).expanduser()
    if source == "geneval":
        file = data.fetched_set("geneval.jsonl", lambda: text_at(GENEVAL_URL), GENEVAL_URL)
    if source == "hpsv2":
        rows = [{"prompt": prompt, "style": style} for style in HPS_STYLES for prompt in fetch_hps_prompts(style)]
    else:
        require(file.is_file(), f"no prompt file {source!r}; give a text or JSONL file, or one of: hpsv2, geneval")
        rows = [{"prompt": prompt} for prompt in data.load_prompts(str(file))]
    if file.suffix.lower() == ".jsonl":
        rows = [json.loads(line) | row for line, row in zip(data.read_lines(file), rows, strict=True)]
    for number, row in enumerate(rows, 1):
        require(isinstance(row.get("style", ""), str), f"{source} line {number}: the style must be a string")
        if detector:
            row |= geneval.find_metadata(row["prompt"], row, detector)
        if needs_image:
            require("image" in row, f'{source} line {number} has no "image", which the video is to start from')
            row["image"] = str(file.parent / str(row["image"]))
            pictures.read_picture(row["image"])
    return rows


def fetch_hps_prompts(style: str) -> list[str]:
    """The 800 prompts of one style of HPS-v2's benchmark."""
    source = HPS_REPO, f"benchmark/{style}.json"
    file = data.fetched_set(f"hpsv2-{style}.json", lambda: data.text_on_hub(*source), " ".join(source))
    return json.loads(file.read_text(encoding="utf-8"))
