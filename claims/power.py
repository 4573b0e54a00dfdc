"""How often a verdict is wrong, and how often it decides: the rule of `experiment.judge` on simulated seeds.

    python -m claims power      writes claims/power.json, which claims/README.md shows

The unit is the standard deviation, over seeds, of the difference between two arms.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from runtime import files

from .experiment import EQUAL, FAILS, HOLDS, OPEN, Compare, judge

FILE = Path(__file__).parent / "power.json"
EFFECTS, MARGIN = (-1.0, 0.0, 0.5, 1.0, 1.5, 2.0), 1.0


def shares(effect: float, seeds: int, trials: int, paired: bool = True, margin: float = MARGIN) -> dict[str, float]:
    """{verdict: its share} of trials in which arm a exceeds arm b by `effect` on average."""
    rng, compare = np.random.default_rng(0), Compare("m", "a", "b", margin=margin, paired=paired)
    noise = rng.standard_normal((trials, 2, seeds)) / 2**0.5  # of the difference: 1
    found = Counter(
        judge(compare, {"a": {"m": (a + effect).tolist()}, "b": {"m": b.tolist()}})["verdict"] for a, b in noise
    )
    return {verdict: found[verdict] / trials for verdict in (HOLDS, FAILS, EQUAL, OPEN)}


def write(trials: int = 2000) -> None:
    """Simulate 10 seeds, paired and by Welch's test, and the 3 of former versions."""
    rows = [
        {"seeds": seeds, "test": "paired" if paired else "Welch", "effect": effect}
        | shares(effect, seeds, trials, paired)
        for seeds, paired in ((10, True), (10, False), (3, True))
        for effect in EFFECTS
    ]
    files.write_atomically(FILE, json.dumps(rows, indent=1) + "\n")
