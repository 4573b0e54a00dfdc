"""The paper's claims in miniature, with seeds and a verdict.

    python -m claims                       the list
    python -m claims NAME                  train, evaluate, judge: claims/results/NAME.json and NAME.png
    python -m claims NAME --iterations 2 --seeds 1      a trial; its result stays in OUTPUT_DIR/results
    python -m claims table                 writes the table of results into RESULTS.md

Interrupted claims go on where they stopped, and every finished run is used again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rewards import RewardError
from runtime import cli, data
from runtime.cli import Natural

from . import (
    baselines,
    best_of_n,
    diversity,
    experiment,
    faults,
    noise,
    one_form,
    quick_start,
    rewards,
    timesteps,
    variants,
    video,
)

EXPERIMENTS = quick_start.CLAIMS | noise.CLAIMS | timesteps.CLAIMS | best_of_n.CLAIMS | rewards.CLAIMS
EXPERIMENTS |= diversity.CLAIMS | video.CLAIMS | baselines.CLAIMS | faults.CLAIMS | variants.CLAIMS
NAMES = (*EXPERIMENTS, "one-form")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "claims/results"
TABLE = "<!-- python -m claims table -->\n"  # stands in RESULTS.md before and after the table


@dataclass(frozen=True)
class Config:
    preset: str = "full"  # full is the only one
    output_dir: str = "runs/claims"  # runs, evaluations, and the results of trials
    seeds: Natural = 0  # of each arm: 1, 2, …; 0: as many as the claim asks for, 3 or 5
    iterations: Natural = 0  # of each run; 0: those of the preset


def main(name: str, cfg: Config) -> None:
    cli.require(name in NAMES, f"unknown claim {name!r}; known: {', '.join(NAMES)}")
    cli.check_ranges(cfg)
    folder = Path(cfg.output_dir)
    needed = 3 if name == "one-form" else EXPERIMENTS[name].seeds
    seeds = cfg.seeds or needed
    results = Path("claims/results") if seeds >= needed and not cfg.iterations else folder / "results"
    with data.writing(results):
        results.mkdir(parents=True, exist_ok=True)
    if name == "one-form":
        kind, result = one_form, one_form.run(seeds)
    else:
        kind, claim = experiment, EXPERIMENTS[name]
        result = kind.summarize(claim, kind.run_arms(claim, name, seeds, cfg.iterations, folder))
    data.write_atomically(results / f"{name}.json", json.dumps(result, indent=1) + "\n")
    kind.draw(result, results / f"{name}.png")
    print(kind.report(result), f"{results / name}.json, .png", sep="\n")


def table() -> str:
    """A row for each claim that has a result."""
    rows = ["| claim | paper | here: mean over seeds, Student's interval | seeds | verdict |", "|---|---|---|---|---|"]
    for name in NAMES:
        if (RESULTS / f"{name}.json").exists():
            result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
            found = (one_form if name == "one-form" else experiment).figures(result)
            claim = f"[{name}](claims/results/{name}.png): {result['says']}"
            cells = [claim, result["paper"], "<br>".join(found), str(len(result["seeds"])), result["verdict"]]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def write_table(path: Path = ROOT / "RESULTS.md") -> None:
    """Put the table in its place."""
    before, _, after = path.read_text(encoding="utf-8").split(TABLE)
    data.write_atomically(path, before + TABLE + table() + TABLE + after)


if __name__ == "__main__":
    with cli.one_line_errors(RewardError):
        words = sys.argv[1:]
        asked = words.pop(0) if words and not words[0].startswith("-") else ""
        cfg = cli.parse_config(Config, {"full": {}}, words)
        if asked == "table":
            write_table()
        elif asked:
            main(asked, cfg)
        else:
            for name in NAMES:
                print(f"{name:<20}{one_form.SAYS if name == 'one-form' else EXPERIMENTS[name].says}")
