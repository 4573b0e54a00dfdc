"""--track: metrics and samples in TensorBoard or Weights & Biases."""

import os
import sys
from pathlib import Path

import numpy as np

from rewards import first_line

from .options import RunError


class Tracker:
    """--track: metrics and samples in TensorBoard or Weights & Biases, beside metrics.jsonl. kind "": nowhere.

    config: the content of config.json; checkpoint: where the run is continued from. Raises RunError if it cannot start.
    If it fails later it says so, and is left out from then on: metrics.jsonl and samples/ hold everything.
    """

    def __init__(self, kind: str, config: dict, checkpoint: Path | None):
        self.kind, self.backend = kind, None
        try:
            self.backend = {"tensorboard": TensorBoard, "wandb": WandB}[kind](config, checkpoint) if kind else None
        except Exception as e:  # a tracker is not ours: it may raise anything
            login = "log in with `wandb login`, set WANDB_MODE=offline, or " if kind == "wandb" else ""
            advice = f"{login}leave the option out"
            raise RunError(f"--track {kind} cannot start ({type(e).__name__}: {first_line(e)}); {advice}") from e

    def log(self, iteration: int, values: dict[str, float], samples: Path | None = None) -> None:
        """The values after an iteration, and the sample pictures drawn then: the .png, and in W&B the .mp4."""
        self._call("log", iteration, values, samples)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *args) -> None:
        if self.backend is None:
            return
        try:
            getattr(self.backend, method)(*args)
        except Exception as e:
            self.backend = None
            failed = f"--track {self.kind} failed ({type(e).__name__}: {first_line(e)}) and is left out from now on"
            print(f"warning: {failed}; metrics.jsonl and samples/ hold everything", file=sys.stderr)


class TensorBoard:
    """What goes to OUTPUT_DIR/tensorboard; see `Tracker`."""

    def __init__(self, config: dict, checkpoint: Path | None):
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is dropped, for these iterations are run again.
        purge = int(checkpoint.name[11:]) + 1 if checkpoint else None
        self.writer = SummaryWriter(str(Path(config["output_dir"], "tensorboard")), purge_step=purge)

    def log(self, iteration: int, values: dict[str, float], samples: Path | None) -> None:
        from PIL import Image

        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        if samples:
            self.writer.add_image("samples", np.array(Image.open(samples)), iteration, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """What goes to Weights & Biases, or with WANDB_MODE=offline to OUTPUT_DIR/wandb; see `Tracker`.

    A resumed run goes on under its id. Iterations that are run again are logged again, with the same values.
    """

    def __init__(self, config: dict, checkpoint: Path | None):
        import wandb

        self.wandb, out = wandb, Path(config["output_dir"]).resolve()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dancegrpo"),
            name=out.name,
            id=config["tracker_id"],
            resume="allow",
            dir=str(out),
            config=config,
            allow_val_change=True,
            settings=wandb.Settings(console="off"),  # the progress bar would fill its log
        )
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, values: dict[str, float], samples: Path | None) -> None:
        row, film = values | {"iteration": iteration}, samples and samples.with_suffix(".mp4")
        row |= {"samples": self.wandb.Image(str(samples))} if samples else {}
        row |= {"film": self.wandb.Video(str(film), format="mp4")} if film and film.exists() else {}
        self.run.log(row)

    def close(self) -> None:
        self.run.finish()
