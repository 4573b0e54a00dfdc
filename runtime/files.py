"""Files: a JSON object, a fingerprint, writes that are whole or not there, and a folder's lock."""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .options import GLOO, Lazy, RunError

dcp = Lazy("torch.distributed.checkpoint")


def read_json(file: Path) -> dict:
    """The object in a JSON file, {} if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


FINGERPRINTED = {".json", ".safetensors", ".bin", ".pt", ".pth", ".txt", ".model", ".py"}


def fingerprint(path: str) -> str:
    """A hash of a file, or of the configs and weights in a folder, by which a change is noticed; "" of a hub id.

    Of a file above 8 MiB it covers the size and three parts of 1 MiB: the first, the middle and the last.
    """
    place, digest, mib = Path(path).expanduser(), hashlib.sha256(), 2**20
    files = sorted(p for p in place.rglob("*") if p.suffix in FINGERPRINTED) if place.is_dir() else [place]
    files = [file for file in files if file.is_file()]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(place)} {size}\n".encode())
        with file.open("rb") as content:
            for start, length in [(0, size)] if size <= 8 * mib else [(0, mib), (size // 2, mib), (size - mib, mib)]:
                content.seek(start)
                digest.update(content.read(length))
    return digest.hexdigest() if files else ""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Turn a failed write of `path` (disk full, no permission) into one line of advice. Yields the path."""
    from safetensors import SafetensorError

    try:
        yield path
    except (torch.OutOfMemoryError, torch.distributed.DistError):  # of what is to be written
        raise
    except (OSError, SafetensorError, RuntimeError, dcp.CheckpointException) as e:
        if GLOO in str(e):  # another process is lost
            raise
        # torch and safetensors report a full disk as errors of their own
        reason = (str(e).strip() or type(e).__name__).splitlines()[-1]
        raise RunError(
            f"could not write {path}: {reason}; make room or take another --output-dir; "
            "checkpoints already there are complete, --resume continues from the newest"
        ) from e


def write_atomically(path: Path, content: str | Callable[[Path], object]) -> None:
    """The file is whole or not there, also when several processes write the same one at once. Its folder is made.

    content: its text, or a function that writes the file of this name.
    """
    part = path.with_name(f"{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(content, encoding="utf-8") if isinstance(content, str) else content(part)
        part.replace(path)


def lock_folder(folder: Path) -> None:
    """One process at a time works in a folder. The lock goes when the process ends, in whatever way."""
    from filelock import FileLock

    while LOCKS:  # of an earlier run of this process
        LOCKS.pop().release()
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except (OSError, NotImplementedError) as e:  # Timeout is an OSError
        advice = "wait for it, or take another --output-dir"
        raise RunError(f"another process is working in {folder}, or it cannot be locked ({e}); {advice}") from e
    LOCKS.append(lock)


LOCKS: list = []  # that of this process's run
