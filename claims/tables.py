"""The tables of RESULTS.md that follow from claims/results: `python -m claims table` writes them.

Each stands between a line `<!-- python -m claims table: NAME -->` and a line `<!-- end -->`. NAME is that of a claim,
whose held-out figures are shown; `verdicts`, for a row of every claim; or `throughput`, for what
`python -m benchmarks.throughput` measured.
"""

import json
import re
from pathlib import Path

from runtime import data

from . import experiment, one_form

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SPEED = ROOT / "claims/results", ROOT / "benchmarks/results"
PLACE = re.compile(r"(<!-- python -m claims table: (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
KINDS = {"single_object": "single object", "colors": "colours", "counting": "counting", "two_object": "two objects"}
KINDS |= {"position": "position", "color_attr": "two coloured objects"}
TITLES = {"hps": "HPS", "clip": "CLIP", "vq": "VQ", "mq": "MQ", "ta": "TA", "geneval": "checker accuracy"}
TITLES |= {f"geneval, {kind}": f"... {title}" for kind, title in KINDS.items()}
TITLES |= {"right": "checker accuracy", "roughness": "roughness", "uncleanness": "uncleanness"}


def load(name: str) -> dict | None:
    """The result of a claim, or None if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def verdicts(names) -> str:
    """A row for each claim that has a result."""
    rows = ["| claim | paper | here: mean over seeds, Student's interval | seeds | verdict |", "|---|---|---|---|---|"]
    for name in names:
        if result := load(name):
            found = (one_form if name == "one-form" else experiment).figures(result)
            claim = f"[{name}](claims/results/{name}.png): {result['says']}"
            cells = [claim, result["paper"], "<br>".join(found), str(len(result["seeds"])), result["verdict"]]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def heldout(name: str) -> str:
    """A row for each metric: base, trained, and the gain; of the first arm of a claim."""
    result = load(name)
    if result is None:
        return f"`python -m claims {name}` has not been run yet.\n"
    arm, figures = next(iter(result["heldout"].items()))
    command = result["arms"][arm]
    rows = [
        f"`{command['trainer']}.py --preset {command['preset']}`, {result['iterations'][arm]} iterations, seeds "
        f"{', '.join(map(str, result['seeds']))}: `python -m claims {name}`.\n",
        "| | base | trained | gain: mean (lowest to highest seed) | in standard errors, weakest seed |",
        "|---|---|---|---|---|",
    ]
    for metric, title in TITLES.items():
        if metric in figures:
            base, gains, errors = (figures[metric][key] for key in ("base", "gains", "errors"))
            gain = sum(gains) / len(gains)
            worst = min((g / e if e else 0.0 for g, e in zip(gains, errors, strict=True)), key=abs)
            title += ", trained on" if metric in result["rewards"][arm] else ""
            spread = f"{gain:+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
            rows.append(f"| {title} | {base:.3f} | {base + gain:.3f} | {spread} | {worst:+.1f} |")
    return "\n".join(rows) + "\n"


def throughput() -> str:
    """A row for each preset that was measured."""
    rows = [
        "| `python -m benchmarks.throughput …` | iteration, s | rollout, s | reward, s | update, s | necessary, s "
        "| efficiency | samples/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(SPEED.glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        words = " ".join(word for word in row["command"] if word != "--scaling")
        seconds = [row[key] for key in ("seconds", "seconds_rollout", "seconds_reward", "seconds_update", "necessary")]
        cells = [f"`{words}`", *(f"{s:.2f}" for s in seconds), f"{row['efficiency']:.2f}"]
        rows.append(f"| {' | '.join(cells)} | {row['samples_per_second']:.1f} |")
    return "\n".join(rows) + "\n"


def filled(text: str, names) -> str:
    """The text with every table as the files have it."""
    others = {"verdicts": lambda: verdicts(names), "throughput": throughput}
    return PLACE.sub(lambda m: m[1] + others.get(m[2], lambda: heldout(m[2]))() + m[3], text)


def write(names, path: Path = ROOT / "RESULTS.md") -> None:
    """Put the tables in their places."""
    data.write_atomically(path, filled(path.read_text(encoding="utf-8"), names))
