"""The report of an evaluation, made of its results alone: results.json, results.md, compare.png and index.html.

Legend: P prompts, N pictures of each, F frames of a video, H and W their size in pixels.
"""

import base64
import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from runtime import files, pictures

PAGE_PROMPTS, SHEET_PROMPTS = 24, 8  # shown in index.html and in compare.png


@dataclass(frozen=True)
class Results:
    """What an evaluation found. In every dictionary the base model comes first."""

    prompts: list[dict]  # P of {"prompt": …, and anything else that results.json is to say of it}
    models: dict[str, dict]  # name → anything that results.json is to say of it
    pictures: dict[str, list[list[Path]]]  # name → P x N PNG files; the frames of a video stand one below the other
    scores: dict[str, list[list[dict]]]  # name → P x N of {metric: value}; also "wrong": GenEval's reason
    summary: dict[str, dict[str, dict[str, dict]]]  # metric → name → group → {"mean", "difference", "error"}
    remarks: list[str]  # what a reader of the table must know
    settings: dict  # for results.json alone, as are the versions
    versions: dict
    frames: int = 1  # F, 1 for pictures
    fps: float = 24.0  # of videos


def write_report(results: Results, folder: Path) -> None:
    """Write results.json, results.md, compare.png and index.html into the folder."""
    table = make_table(results.summary)
    content = {name: vars(results)[name] for name in ("settings", "versions", "models", "remarks", "summary")}
    content["pictures"] = [
        row | {"picture": path.name, "scores": {name: own[p][n] for name, own in results.scores.items()}}
        for p, row in enumerate(results.prompts)
        for n, path in enumerate(next(iter(results.pictures.values()))[p])
    ]
    lines = ["| " + " | ".join(line) + " |" for line in [table[0], ["---"] * len(table[0]), *table[1:]]]
    text = "\n".join(["# Evaluation", "", *lines, "", *(f"- {remark}" for remark in results.remarks), ""])
    files.write_atomically(folder / "results.json", json.dumps(content, indent=1) + "\n")
    files.write_atomically(folder / "results.md", text)
    pictures.save_image(folder / "compare.png", make_sheet(results))
    files.write_atomically(folder / "index.html", make_page(results, table))


def make_table(summary: dict) -> list[list[str]]:
    """Head and lines: metric, base, then for each other model its mean and its difference from the base."""
    tuned = list(next(iter(summary.values())))[1:]
    table = [["metric", "base", *(head for model in tuned for head in (model, "difference"))]]
    for metric, models in summary.items():
        several = len(models["base"]) > 1
        scale = 100 if metric == "hps" and several else 1  # as HPS's benchmark is published
        for group, base in models["base"].items():
            line = [metric + several * f" {group}" + (scale == 100) * " x 100", f"{scale * base['mean']:.4f}"]
            for own in (models[model][group] for model in tuned):
                error = "" if own["error"] is None else f" ± {scale * own['error']:.4f}"
                line += [f"{scale * own['mean']:.4f}", f"{scale * own['difference']:+.4f}{error}"]
            table.append(line)
    return table


def spread(count: int, most: int) -> list[int]:
    """At most `most` of 0 … count - 1, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def previews(path: Path, frames: int, most: int, side: int = 256) -> list[Image.Image]:
    """A picture, or at most `most` frames of a video, the longest side `side` pixels; small ones enlarged by pixels."""
    pixels = np.array(pictures.read_picture(path))
    pixels = pixels.reshape(frames, -1, *pixels.shape[1:])  # (F, H, W, 3)
    _, height, width, _ = pixels.shape
    zoom = side / max(height, width)
    size = round(width * zoom), round(height * zoom)
    how = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.LANCZOS
    return [Image.fromarray(pixels[i]).resize(size, how) for i in spread(frames, most)]


def make_sheet(results: Results) -> Image.Image:
    """compare.png: a row for each of some prompts, a column for each model; of a video four frames side by side."""
    shown, text, head, gap = spread(len(results.prompts), SHEET_PROMPTS), 200, 32, 8
    cells = [[previews(paths[p][0], results.frames, 4) for paths in results.pictures.values()] for p in shown]
    (w, h), across = cells[0][0][0].size, len(cells[0][0])
    column = w * across + gap
    sheet = Image.new("RGB", (text + len(results.models) * column, head + len(shown) * (h + gap)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, name in enumerate(results.models):
        pen.text((text + k * column, gap), name[-w * across // 8 :], fill="black", font=font)
    for i, (p, row) in enumerate(zip(shown, cells, strict=True)):
        top = head + i * (h + gap)
        lines = textwrap.wrap(results.prompts[p]["prompt"], 25)[: h // 20]
        pen.multiline_text((gap, top), "\n".join(lines), fill="black", font=font)
        for k, frames in enumerate(row):
            for j, frame in enumerate(frames):
                sheet.paste(frame, (text + k * column + j * w, top))
    return sheet


def make_page(results: Results, table: list[list[str]]) -> str:
    """index.html: the table, and for some prompts the first picture of each model with its scores, embedded."""
    shown = {
        p: {name: data_uri(paths[p][0], results.frames, results.fps) for name, paths in results.pictures.items()}
        for p in spread(len(results.prompts), PAGE_PROMPTS)
    }
    return render("report.html.j2", results=results, table=table, shown=shown)


def render(template: str, **values) -> str:
    """A page from a template of this folder; what is put in is escaped."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=folder, autoescape=True).get_template(template).render(values)


def data_uri(path: Path, frames: int, fps: float, side: int = 256) -> str:
    """The picture, or the video as an animation, as text for the src of an <img>; the longest side `side` pixels."""
    shown, buffer, movie = previews(path, frames, frames, side), io.BytesIO(), {}
    if frames > 1:
        movie = {"save_all": True, "append_images": shown[1:], "duration": round(1000 / fps), "loop": 0}
    with Image.open(path) as picture:
        is_small = picture.width <= 128
    shown[0].save(buffer, "WEBP", lossless=is_small, quality=85, **movie)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
