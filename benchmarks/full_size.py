"""What runs of full size take, as --dry-run predicts it: python -m benchmarks.full_size

Takes about ten minutes on one core, and needs no weights. Writes benchmarks/results/full_size.json.
"""

import importlib
import json
import tempfile
from pathlib import Path

from runtime.options import one_line_errors, parse_config

FILE = Path(__file__).resolve().parent / "results/full_size.json"
COMMANDS = (  # most are the README's; and the number of processes
    ("grpo_flux", "", 16),
    ("grpo_flux", "--preset 8gpu", 8),
    ("grpo_flux", "--preset lora", 8),
    ("grpo_flux", "--preset lora-48gb", 1),
    ("grpo_flux", "--preset lora-24gb", 1),
    ("grpo_video", "", 32),
    ("grpo_video", "--preset release-i2v", 32),
    ("grpo_video", "--preset release-i2v --shard-size 8", 32),  # why the preset has 16
    ("grpo_video", "--preset t2i", 32),
    ("grpo_video", "--preset wan", 8),
    ("grpo_video", "--preset wan-48gb", 1),
    ("grpo_sd", "", 8),
    ("grpo_sd", "--preset 24gb", 1),
)


def predict(script: str, options: str, processes: int) -> dict:
    """The content of dryrun.json, and the command."""
    trainer = importlib.import_module(script)
    with tempfile.TemporaryDirectory() as folder:
        words = [*options.split(), "--dry-run", "--processes", str(processes), "--output-dir", folder]
        result = trainer.dry_run(parse_config(trainer.Config, trainer.PRESETS, words))
    return {"command": f"{script}.py {options}".strip()} | result


if __name__ == "__main__":
    with one_line_errors():
        FILE.write_text(json.dumps([predict(*command) for command in COMMANDS], indent=1) + "\n")
