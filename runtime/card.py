"""The model card of a checkpoint, as the hub shows it."""

import dataclasses
import importlib.metadata
import os
import shlex
import shutil
from pathlib import Path

from .checkpoints import CARD, Checkpoints, script_of
from .lora import LORA_FILE
from .options import command_words


def write_card(folder: Path, config, checkpoints: Checkpoints, iteration: int, row: dict) -> None:
    """README.md of a checkpoint: what was trained on what, how, and the lines that load it; with the run's curves and
    newest sample pictures. row: the iteration's metrics."""
    (folder / CARD[0]).write_text(model_card(folder, config, checkpoints, iteration, row), encoding="utf-8")
    sheets = [path for path in sorted(folder.parent.glob("samples/*.png")) if path.stem.isdigit()]
    sheets = [path for path in sheets if int(path.stem) <= iteration]  # later ones are left from before a resume
    for file, name in zip([folder.parent / "reward.png", *sheets[-1:]], CARD[1:], strict=False):
        if file.is_file():
            shutil.copy(file, folder / name)


def model_card(folder: Path, config, checkpoints: Checkpoints, iteration: int, row: dict) -> str:
    from huggingface_hub import ModelCardData
    from jinja2 import Template

    kind = type(checkpoints.pipeline).__name__
    model, transformer = (  # as they are found from the checkpoint
        os.path.relpath(path, folder) if path and Path(path).is_dir() else path.replace("@", '", revision="')
        for path in (config.model, getattr(config, "transformer", ""))
    )
    source = getattr(config, "transformer", "") or config.model
    name = "/".join(Path(source).parts[-2:]).partition("@")[0]  # OWNER/NAME, also of a folder
    video = "image-to-video" if "ImageToVideo" in kind else "text-to-video"
    header = ModelCardData(
        base_model=name,
        base_model_relation="adapter" if checkpoints.is_lora else "finetune",
        library_name="diffusers",
        pipeline_tag=video if getattr(config, "frames", 1) > 1 else "text-to-image",
        tags=["dancegrpo", "grpo", "reinforcement-learning", *["lora"] * checkpoints.is_lora],
    ).to_yaml()
    fields = [field for field in dataclasses.fields(config) if field.name not in ("preset", "output_dir", "resume")]
    changed = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}
    template = Template(Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8"))
    return template.render(
        header=header, name=name, title=Path(name).name, iteration=iteration, config=config, pipeline=kind,
        model=model, transformer=transformer, network=type(checkpoints.network).__name__,
        component=checkpoints.component, dtype=checkpoints.world.dtype, is_lora=checkpoints.is_lora,
        lora_file=LORA_FILE,
        versions=", ".join(f"{x} {importlib.metadata.version(x)}" for x in ("diffusers", "transformers", "peft")),
        scores={key: value for key, value in row.items() if key.startswith(("reward_", "sample_reward_"))},
        command=shlex.join(["python", script_of(config), *command_words(changed)]),
    )  # fmt: skip
