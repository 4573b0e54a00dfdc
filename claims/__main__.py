"""The paper's claims in miniature, with seeds and a verdict.

    python -m claims                       the list
    python -m claims NAME                  train, evaluate, judge: claims/results/NAME.json and NAME.png
    python -m claims NAME --iterations 2 --seeds 1      a trial; its result stays in OUTPUT_DIR/results
    python -m claims power                 how often the verdicts are wrong, and how often they decide, by simulation
    python -m claims table                 writes the tables of RESULTS.md and claims/README.md

Interrupted claims go on where they stopped, and every finished run is used again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from rewards import RewardError
from runtime import files
from runtime.options import Natural, check_ranges, one_line_errors, parse_config, require

from . import (
    advantages,
    baselines,
    best_of_n,
    diversity,
    experiment,
    faults,
    noise,
    one_form,
    power,
    quick_start,
    rewards,
    tables,
    timesteps,
    variants,
    video,
)

EXPERIMENTS = quick_start.CLAIMS | noise.CLAIMS | timesteps.CLAIMS | best_of_n.CLAIMS | rewards.CLAIMS
EXPERIMENTS |= diversity.CLAIMS | video.CLAIMS | baselines.CLAIMS | faults.CLAIMS | variants.CLAIMS
EXPERIMENTS |= advantages.CLAIMS
NAMES = (*EXPERIMENTS, "one-form")
CLAIMS = tuple(name for name in NAMES if not name.startswith("learning-rates"))  # which are none


@dataclass(frozen=True)
class Config:
    preset: str = "full"  # full is the only one
    output_dir: str = "runs/claims"  # runs, evaluations, and the results of trials
    seeds: Natural = 10  # runs of each arm
    first_seed: Natural = 11  # the first of consecutive seeds; options were chosen with 1 to 10
    iterations: Natural = 0  # of each run; 0: those of the preset


def main(name: str, cfg: Config) -> None:
    require(name in NAMES, f"unknown claim {name!r}; known: {', '.join(NAMES)}")
    check_ranges(cfg)
    folder = Path(cfg.output_dir)
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    official = len(seeds) == 10 and not cfg.iterations and seeds.start == 11
    results = Path("claims/results") if official else folder / "results"
    with files.writing(results):
        results.mkdir(parents=True, exist_ok=True)
    if name == "one-form":
        kind, result = one_form, one_form.run(seeds)
    else:
        kind, claim = experiment, EXPERIMENTS[name]
        result = kind.summarize(claim, kind.run_arms(claim, name, seeds, cfg.iterations, folder))
    files.write_atomically(results / f"{name}.json", json.dumps(result, indent=1) + "\n")
    kind.draw(result, results / f"{name}.png")
    print(kind.report(result), f"{results / name}.json, .png", sep="\n")


if __name__ == "__main__":
    with one_line_errors(RewardError):
        words = sys.argv[1:]
        asked = words.pop(0) if words and not words[0].startswith("-") else ""
        cfg = parse_config(Config, {"full": {}}, words)
        if asked == "table":
            tables.write(CLAIMS)
        elif asked == "power":
            power.write()
        elif asked:
            main(asked, cfg)
        else:
            for name in NAMES:
                print(f"{name:<24}{one_form.SAYS if name == 'one-form' else EXPERIMENTS[name].says}")
