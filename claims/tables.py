"""The tables of RESULTS.md and claims/README.md: `python -m claims table` writes them from files of other commands.

Each stands between a line `<!-- python -m claims table: NAME -->` and a line `<!-- end -->`. NAME is that of a claim,
whose held-out figures are shown; `verdicts`, for a row of every claim; `parts`, for all that was asserted of each;
`power`, for the simulation of the verdicts; `throughput`, `commands` or `full_size`, for what the benchmark of this
name measured; or `tiny`, for what `python -m tiny check` found.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from runtime import files

from . import experiment, one_form

ROOT = Path(__file__).resolve().parent.parent
RESULTS, SPEED = ROOT / "claims/results", ROOT / "benchmarks/results"
PLACE = re.compile(r"(<!-- python -m claims table: (\S+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
KINDS = {"single_object": "single object", "colors": "colours", "counting": "counting", "two_object": "two objects"}
KINDS |= {"position": "position", "color_attr": "two coloured objects"}
TITLES = {"hps": "HPS", "clip": "CLIP", "vq": "VQ", "mq": "MQ", "ta": "TA"}
TITLES |= {"judged": "accuracy by the second judge", "geneval": "accuracy by the checker"}
TITLES |= {f"geneval, {kind}": f"... {title}" for kind, title in KINDS.items()}
LOWER = ("roughness", "uncleanness")  # is better
VERDICTS = (experiment.HOLDS, experiment.FAILS, experiment.EQUAL, experiment.OPEN)
TITLES |= {"right": "accuracy by the checker", "roughness": "roughness", "uncleanness": "uncleanness"}


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table. The cells of its head stand in one string, with | between them."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *lines]) + "\n"


def load(name: str) -> dict | None:
    """The result of a claim, or None if there is none."""
    path = RESULTS / f"{name}.json"
    return read(path) if path.exists() else None


def verdicts(names) -> str:
    """A row for each claim that has a result: its primary part, and whether it outlasts Holm's correction.

    A claim without a result counts in the correction, with p = 1.
    """
    results = {name: load(name) for name in names if name != "one-form"}  # which has no parts
    adjusted = experiment.holm([result["parts"][0]["p"] if result else 1.0 for result in results.values()])
    rows = []
    for (name, result), p in zip(results.items(), adjusted, strict=True):
        if result is None:
            continue
        part = result["parts"][0]
        holm = "-" if part["constant"] else f"{p:.2g}" if p >= 0.001 else "< 0.001"
        claim = f"[{name}](claims/results/{name}.png)"
        rows.append([claim, part["says"], experiment.difference(part), experiment.verdict(part), holm])
    return table("claim | primary part | mean difference (95 %) | verdict | p after Holm", rows)


def parts(names) -> str:
    """What each claim says, what the paper measured, and every part of it."""
    lines = []
    for name in names:
        if result := load(name):
            found = (one_form if name == "one-form" else experiment).figures(result)
            paper = f" Paper: {result['paper']}." if result["paper"] != "-" else ""
            lines.append(f"* **{name}**, {len(result['seeds'])} seeds. {result['says']}.{paper}")
            lines += [f"  * {line}" for line in found]
    return "\n".join(lines) + "\n"


def power() -> str:
    """What `python -m claims power` simulated."""
    rows = [
        [str(row["seeds"]), row["test"], f"{row['effect']:g}", *(f"{100 * row[v]:.1f} %" for v in VERDICTS)]
        for row in read(ROOT / "claims/power.json")
    ]
    return table(" | ".join(["seeds", "test", "true difference, standard deviations", *VERDICTS]), rows)


def heldout(name: str) -> str:
    """A row for each metric: base, trained, and the gain; of the first arm of a claim."""
    result = load(name)
    if result is None:
        return f"`python -m claims {name}` has not been run yet.\n"
    arm, figures = next(iter(result["heldout"].items()))
    command, rows = result["arms"][arm], []
    for metric, title in TITLES.items():
        if metric in figures:
            base, gains, errors = (figures[metric][key] for key in ("base", "gains", "errors"))
            gain = sum(gains) / len(gains)
            worst = (max if metric in LOWER else min)(g / e if e else 0.0 for g, e in zip(gains, errors, strict=True))
            title += ", trained on" if metric in result["rewards"][arm] else ""
            spread = f"{gain:+.3f} ({min(gains):+.3f} to {max(gains):+.3f})"
            rows.append([title, f"{base:.3f}", f"{base + gain:.3f}", spread, f"{worst:+.1f}"])
    head = " | base | trained | gain: mean (lowest to highest seed) | gain / its standard error, worst seed"
    said = f"`{command['trainer']}.py --preset {command['preset']}`, {result['iterations'][arm]} iterations, seeds "
    first, n = result["seeds"][0], len(result["seeds"])
    usual = "" if (first, n) == (11, 10) else f" --first-seed {first} --seeds {n}"
    said += f"{', '.join(map(str, result['seeds']))}: `python -m claims {name}{usual}`.\n\n"
    return said + table(head, rows)


def throughput() -> str:
    """A row for each preset that was measured, and what an iteration costs with more samples, steps and pixels."""
    rows, costs = [], []
    for result in map(read, sorted(SPEED.glob("grpo_*.json"))):
        words = f"`{' '.join(result['command'])}`"
        if "scaling" in result:
            for what, points in result["scaling"].items():
                times = (f"{seconds / points[0][1]:.2f}" for _, seconds in points)
                costs.append([f"{words[:-1]} --scaling`, {what}", *times])
            continue
        parts = ("seconds", "seconds_rollout", "seconds_reward", "seconds_update", "necessary", "efficiency")
        rows.append([words, *(f"{result[part]:.2f}" for part in parts), f"{result['samples_per_second']:.1f}"])
    head = "`python -m benchmarks.throughput …` | iteration, s | rollout, s | reward, s | update, s | necessary, s "
    speed = table(f"{head}| efficiency | samples/s", rows)
    return speed + "\n" + table("cost of an iteration with more | x 1 | x 2 | x 4", costs)


def commands() -> str:
    """What `python -m benchmarks.commands` measured."""
    found = read(SPEED / "commands.json")
    rows = []
    for script in ("grpo_flux", "grpo_sd"):
        times = {what: seconds for what, seconds in found[script].items() if what != "iterations"}
        parts = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in times.items())
        rows.append([f"`{script}.py --preset tiny`, {found[script]['iterations']} iterations", parts])
    rows.append(["`import torch`; a wrong option", f"{found['import torch']:.2f} s; {found['wrong option']:.2f} s"])
    for setting, (alone, beside) in found["threads"].items():
        what = f"a FLUX iteration, {setting if setting == 'default' else f'`{setting}`'}"
        rows.append([what, f"alone {alone:.2f} s, beside another run {beside:.2f} s"])
    first, later, deviation = found["compile"].values()
    rows.append(["... `--compile`", f"the first {first:.1f} s, then {later:.2f} s; ratio's deviation {deviation}"])
    return table(f"{found['cores']} cores | ", rows)


def full_size() -> str:
    """A row for each command whose dry run `python -m benchmarks.full_size` made."""
    rows = []
    for run in read(SPEED / "full_size.json"):
        peak, *parts = run["gpu_gib"].values()
        cells = [f"`{run['command']}`", str(run["processes"]), str(run["shard_size"])]
        cells += [f"{gib:.1f}" for gib in (*parts, peak)] + [f"{run['host_gib']:.0f}"]
        cells += ["{public:.1f} + {state:.1f}".format(**run["checkpoint_gib"])]
        cells += ["{rollout:.1f} + {update:.1f}".format(**run["pflop"]), f"{run['gathered_gib'] / 1024:.1f}"]
        rows.append(cells)
    head = ["command, with `--dry-run --processes N`", "N", "shard size", *list(run["gpu_gib"])[1:], "peak", "host"]
    return table(" | ".join([*head, "checkpoint", "PFLOP, rollout + update", "TiB received"]), rows)


def tiny() -> str:
    """What `python -m tiny check` found: generators of pictures, of clips, and the judges.

    A generator before its habits has a row only where it was there to be checked.
    """
    found = read(ROOT / "tiny/figures.json")
    drawn, filmed, judged = [], [], []
    for rows, names in ((drawn, ("flux", "sd")), (filmed, ("hunyuan", "skyreels", "wan"))):
        for name in names:
            for folder, title in ((f"runs/tiny/{name}", "{} before its habits"), (f"tiny/{name}", "{}")):
                if figures := found.get(folder):
                    columns = [*KINDS, "overall", "AUC, hps", "AUC, clip"] if rows is drawn else list(figures)
                    cells = (f"{figures[column]:.2f}" if column in figures else "-" for column in columns)
                    rows.append([title.format(f"`tiny/{name}`"), *cells])
    for name in ("clip", "hps", "hps, of two pictures", "judge", "videoalign"):
        figures = {"true caption first": found[name]["overall"]} if "overall" in found[name] else found[name]
        judged.append([name, ", ".join(f"{what} {share:.2f}" for what, share in figures.items())])
    pictures = table(" | ".join(["", *KINDS.values(), "overall", "AUC of HPS", "AUC of CLIP"]), drawn)
    films = table(" | right | roughness | uncleanness", filmed)
    return "\n".join([pictures, films, table("judge | share of unseen cases", judged)])


def filled(text: str, names) -> str:
    """The text with every table as the files have it."""
    others = {"verdicts": lambda: verdicts(names), "parts": lambda: parts(names)}
    others |= {part.__name__: part for part in (power, throughput, commands, full_size, tiny)}
    return PLACE.sub(lambda m: m[1] + others.get(m[2], lambda: heldout(m[2]))() + m[3], text)


def write(names, paths: Iterable[Path] = (ROOT / "RESULTS.md", ROOT / "claims/README.md")) -> None:
    """Put the tables in their places."""
    for path in paths:
        files.write_atomically(path, filled(path.read_text(encoding="utf-8"), names))
