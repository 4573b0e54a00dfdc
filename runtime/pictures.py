"""Picture and video files: first frames are read, sample pictures and films are written."""

import contextlib
import struct
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rewards import first_line

from .files import write_atomically
from .options import RunError


def save_image(path: Path, image) -> None:
    """A PIL image as a PNG file, which is whole or not there."""
    write_atomically(path, image.save)


def read_picture(path: str | Path):
    """A picture file as a person sees it, as PIL's RGB image; of an animation the first frame.

    Turned as its EXIF data says; what is transparent lies on white. Raises RunError if it is no readable picture.
    """
    from PIL import Image, ImageOps

    verify_picture(path)
    with reading_picture(path), Image.open(path) as file:
        picture = ImageOps.exif_transpose(file)
        if picture.mode[0] == "I":  # 16 bits of grey, which `convert` would cut off at 255
            picture = Image.fromarray((np.asarray(picture) / 257).round().clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")


def verify_picture(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture file. Raises RunError if it is none, or a PNG whose checksums are wrong."""
    from PIL import Image

    with reading_picture(path), Image.open(path) as picture:
        picture.verify()
        return picture.size


def is_whole(path: Path, size: tuple[int, int]) -> bool:
    """Whether a picture file has this width and height, and is as it was written."""
    try:
        return verify_picture(path) == size
    except RunError:
        return False


@contextlib.contextmanager
def reading_picture(path: str | Path) -> Iterator[None]:
    """Turn Pillow's errors for broken files into one line."""
    from PIL import Image

    try:
        yield
    except (OSError, SyntaxError, ValueError, LookupError, EOFError, struct.error, Image.DecompressionBombError) as e:
        advice = "correct its path, convert it to PNG or JPEG, or put a whole one in its place"
        raise RunError(f"cannot read the picture {path} ({first_line(e)}); {advice}") from e


def save_frames(path: Path, picture: Tensor) -> None:
    """(3, H, W), or (F, 3, H, W) with the frames one below the other, as a PNG of 8 bits a channel."""
    from PIL import Image

    pixels = (picture.movedim(-3, -1) * 255).round().byte().cpu().numpy()
    save_image(path, Image.fromarray(pixels.reshape(-1, *pixels.shape[-2:])))


def save_pictures(path: Path, images: Tensor, captions: Sequence[str], columns: int = 4) -> None:
    """images (N, 3, H, W) in [0, 1] as one PNG, each with its caption below."""
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, 192 // images.shape[-2])  # small pictures are shown larger, pixel for pixel
    pixels = (images.float().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = images.shape[-2] * zoom, images.shape[-1] * zoom
    size = max(12, height // 24)
    font, strip, gap = ImageFont.load_default(size), int(size * 3.2), size // 2
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + strip) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, top = gap + i % columns * (width + gap), gap + i // columns * (height + strip)
        sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (left, top))
        line_length = max(8, int(width / (0.55 * size)))
        lines = textwrap.wrap(caption, line_length)[:2]
        draw.multiline_text((left, top + height + 2), "\n".join(lines), fill="black", font=font)
    save_image(path, sheet)


def save_videos(path: Path, videos: Tensor, captions: Sequence[str], fps: float) -> None:
    """videos (N, F, 3, H, W) in [0, 1] as path.png, six frames of each in a row, and path.mp4, side by side.

    One frame is a picture, and becomes path.png only.
    """
    frames = videos.shape[1]
    shown = torch.linspace(0, frames - 1, min(frames, 6)).round().long()
    rows = torch.cat(videos[:, shown].unbind(1), -1)  # (N, 3, H, 6 W)
    save_pictures(path.with_suffix(".png"), rows, captions, columns=1 if frames > 1 else 4)
    if frames == 1:
        return
    import imageio.v3 as imageio

    zoom = max(1, 192 // videos.shape[-2])
    film = torch.cat(videos.unbind(0), -1).repeat_interleave(zoom, -2).repeat_interleave(zoom, -1)  # (F, 3, H', W')
    pixels = (film.float().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    options = {"plugin": "FFMPEG", "fps": fps, "quality": 8, "macro_block_size": 2}
    write_atomically(path.with_suffix(".mp4"), lambda file: imageio.imwrite(file, pixels, **options))
