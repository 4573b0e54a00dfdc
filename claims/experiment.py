"""The machinery of `python -m claims`: train every arm with every seed, evaluate, compare, judge, plot.

An arm is a trainer with some of its options changed, or with a loop of its own. Its runs are in OUTPUT_DIR/runs, in
folders named by a hash of all that determines a run: options, seed, files of models, rewards and prompts, and the
loop's code. A finished run is used again, by other claims too; an interrupted one is resumed. Held-out figures are
eval.py's.

What the verdicts mean and how they were fixed beforehand stands in claims/README.md.

Legend: S seeds.
"""

import contextlib
import hashlib
import importlib
import io
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from runtime import checkpoints, files, metrics
from runtime.options import command_words, latest_checkpoint, parse_config

from . import policy

HOLDS, FAILS, EQUAL, OPEN = "holds", "does not hold", "equivalent", "undecided"
SPEED = "gain in HPS of sample pictures, mean over training (cosine)"  # the area under the curve, over its length
EARLY = dict(iterations=16, sample_every=2, learning_rate=2.5e-5)  # of the tiny presets: before the plateau
FREE = EARLY | {"clip_range": 1e-2}  # for arms whose ratios differ in scale; in `clip-range` it clips nothing
SAMPLERS = ("steps", "guidance", "true_guidance", "shift", "height", "width", "frames")  # what eval.py takes from a run


class Run(NamedTuple):
    """A finished run: its options, the lines of its metrics, and what eval.py found on held-out prompts."""

    config: dict
    rows: list[dict]
    heldout: dict[str, dict]  # metric, or "metric, kind of prompt" → {"mean", "difference" from the base, "error"}
    pictures: list[Path]  # of the held-out prompts, P x N, those of a prompt side by side
    base_pictures: list[Path]


@dataclass(frozen=True)
class Compare:
    """The assertion  measure(higher) - times x measure(lower) > by.  Without `lower` it is  measure(higher) > by.

    With a margin the two are equivalent if the difference is shown to be smaller, whichever its sign.
    """

    measure: str
    higher: str
    lower: str = ""
    by: float = 0.0
    times: float = 1.0
    margin: float = 0.0
    paired: bool = True  # runs with the same seed share prompts and noise; False: they do not, Welch's test

    def __str__(self):
        lower = f"{self.times:g} x " * (self.times != 1) + self.lower
        return f"{self.measure}: {self.higher}{f' - {lower}' if self.lower else ''} > {self.by:g}"


@dataclass(frozen=True)
class Experiment:
    """A claim: what is trained, what is measured, and what must come out."""

    says: str  # the claim, and where it is made
    trainer: str  # grpo_sd, grpo_flux or grpo_video
    preset: str
    arms: dict[str, dict]  # name → options that differ from the preset; "loop": MODULE[:FUNCTION] trains instead;
    # "seed": is added to every seed
    measures: dict[str, Callable[[Run], float]]  # name with its unit → what is measured of a run
    compares: tuple[Compare, ...]  # the first is primary: its verdict is the claim's
    curves: tuple[tuple[str, str, str], ...]  # x, key of the metrics, name with its unit; x is a key of AXES
    heldout: dict = field(default_factory=lambda: {"preset": "tiny"})  # options of eval.py
    paper: str = "-"  # what the paper, or whoever makes the claim, measured


# ------------------------------------------------------------------------------------------------- what is measured


def heldout(metric: str) -> Callable[[Run], float]:
    """The mean on held-out prompts."""
    return lambda run: run.heldout[metric]["mean"]


def gain(metric: str) -> Callable[[Run], float]:
    """The difference from the base on held-out prompts."""
    return lambda run: run.heldout[metric]["difference"]


def speed(key: str) -> Callable[[Run], float]:
    """A curve's mean height above its start, over training: of two curves with equal ends, the faster has more.

    The beginning is the untrained model's, which differs from seed to seed with the noise of the sample pictures.
    """

    def measure(run: Run) -> float:
        x, y = metrics.curve(run.rows, key)
        return float(np.trapezoid(y - y[0], x) / (x[-1] - x[0]))

    return measure


def mean(key: str) -> Callable[[Run], float]:
    """The mean over the iterations."""
    return lambda run: float(np.mean([row[key] for row in run.rows]))


def evaluations(config: dict) -> float:
    """Passes of one sample through the network in an iteration; a backward pass counts as two.

    With shared noise a group's first step is one pass, in the rollout and in each update that trains it.
    """
    c, T, G, shared = config, config["steps"], config["group_size"], config["shared_noise"]
    trained = c["sde_window"] or int((T - 1) * c["timestep_fraction"])  # steps of each sample
    samples, updates = 2 * c["keep_best_worst"] or G, c["updates_per_rollout"]
    first = 1.0 if c["sde_window"] else trained / (T - 1)  # how often a sample's first step is among them
    once = updates * (1 - (1 - first) ** (samples / updates))  # updates of a group that train it
    rollout, update = G * T - shared * (G - 1), samples * trained - shared * (samples * first - once)
    return c["prompts_per_iteration"] * (rollout + 3 * update)


def sums(values: list[float]) -> np.ndarray:
    """0, and the sums up to each of n values (n+1,)."""
    return np.concatenate([[0.0], np.cumsum(values)])


AXES = {  # of a plot: its label, and iterations (n,) of a run → positions (n,)
    "iteration": ("iteration", lambda run, x: x),
    "evaluations": (
        "evaluations of the network, thousands",
        lambda run, x: sums([row.get("evaluations", evaluations(run.config)) / 1000 for row in run.rows])[x],
    ),
}


# ---------------------------------------------------------------------------------------------- training, evaluation


def digest(*parts) -> str:
    """Ten hexadecimal digits of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def files_of(options: dict) -> dict[str, str]:
    """Hashes of the models, rewards and prompts that are files here."""
    paths = [*checkpoints.files_of(**options), options.get("prompts", "")]
    return {path: files.fingerprint(path) for path in paths if path and Path(path).exists()}


def parse(trainer, options: dict):
    """The trainer's Config with these options."""
    return parse_config(trainer.Config, trainer.PRESETS, command_words(options))


def train(name: str, options: dict, folder: Path, loop: str = "") -> Path:
    """The folder of the finished run of the trainer called `name`, or of loop, MODULE[:FUNCTION], with its options.

    Trains what is not done yet.
    """
    loop = loop or name
    module, _, function = loop.partition(":")
    trainer, own = importlib.import_module(name), importlib.import_module(module)
    options = options | {"save_every": 20, "keep_states": 1}  # an interrupted run goes on from there
    config = parse(trainer, options)
    code = [] if own is trainer else [files.fingerprint(path) for path in (own.__file__, policy.__file__)]
    key = digest(name, loop, asdict(config), files_of(asdict(config)), *code)
    run = folder / f"{loop.split('.')[-1].replace(':', '-')}-{key}"
    if not (run / f"checkpoint-{config.iterations:06d}").is_dir():
        begun = (run / "metrics.jsonl").exists() or latest_checkpoint(run)
        options |= {"output_dir": str(run)} | ({"resume": True} if begun else {})
        getattr(own, function or "main")(parse(trainer, options))
    return run


def evaluate(runs: list[Path], options: dict, folder: Path) -> list[tuple]:
    """(held-out figures, pictures, the base's pictures) of each run's newest checkpoint, by eval.py."""
    evaluation = importlib.import_module("eval")
    stored = json.loads((runs[0] / "config.json").read_text(encoding="utf-8"))
    sampler = {name: stored[name] for name in SAMPLERS if name in stored}
    known = asdict(parse(evaluation, options))
    where = folder / f"{stored['script'][:-3]}-{digest(sampler, options, files_of(stored), files_of(known))}"
    checkpoints = [str(latest_checkpoint(run)) for run in runs]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its table
        given = [*command_words(options), "--output-dir", str(where), "--checkpoint", *checkpoints]
        evaluation.main(parse_config(evaluation.Config, evaluation.PRESETS, given))
    results = json.loads((where / "results.json").read_text(encoding="utf-8"))
    names = [row["picture"] for row in results["pictures"]]
    found = []
    for checkpoint in checkpoints:
        model = "/".join(Path(checkpoint).parts[-2:])
        figures = {
            metric if kind == "overall" else f"{metric}, {kind}": figure
            for metric, models in results["summary"].items()
            for kind, figure in models[model].items()
        }
        folders = (where / results["models"][m]["pictures"] for m in (model, "base"))
        found.append((figures, *([place / name for name in names] for place in folders)))
    return found


def run_arms(experiment: Experiment, name: str, seeds: range, iterations: int, folder: Path) -> dict[str, list[Run]]:
    """{arm: its S runs}, trained and evaluated."""
    todo = [(arm, seed) for seed in seeds for arm in experiment.arms]
    runs = []
    for arm, seed in (bar := tqdm(todo, desc=name, unit="run", dynamic_ncols=True)):
        bar.set_postfix_str(f"{arm}, seed {seed}")
        options = {"preset": experiment.preset} | experiment.arms[arm]
        options["seed"] = seed + options.get("seed", 0)
        options |= {"iterations": iterations} if iterations else {}
        loop = options.pop("loop", "")
        runs.append(train(experiment.trainer, options, folder / "runs", loop))
    found, arms = evaluate(runs, experiment.heldout, folder / "evaluations"), {arm: [] for arm in experiment.arms}
    for (arm, _), run, figures in zip(todo, runs, found, strict=True):
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        arms[arm].append(Run(config, [json.loads(line) for line in lines], *figures))
    return arms


# ---------------------------------------------------------------------------------------------------------- verdict


def judge(compare: Compare, measured: dict[str, dict[str, list[float]]]) -> dict:
    """The verdict on an assertion, from {arm: {measure: a value for each of S seeds}}.

    It holds, or does not, if Student's interval for the difference, 95 %, lies on one side of the bound. It is
    equivalent if the interval of two one-sided tests, 90 %, lies within the margin, and undecided otherwise.
    p is that of the test that decided. A single seed decides nothing.
    """
    from scipy import stats

    a = np.array(measured[compare.higher][compare.measure])
    b = compare.times * np.array(measured[compare.lower][compare.measure]) if compare.lower else np.zeros(len(a))
    values = [(a - b).tolist()] if compare.paired else [a.tolist(), b.tolist()]
    mean, constant = float(a.mean() - b.mean()), len(a) > 1 and all(np.std(v) < 1e-12 for v in values)
    if len(a) == 1:
        low, high, p, smaller = -math.inf, math.inf, 1.0, 1.0
    elif constant:  # a cost, say
        low, high, p, smaller = mean, mean, 0.0, 0.0 if abs(mean) < compare.margin else 1.0
    else:
        test = partial(stats.ttest_1samp, a - b) if compare.paired else partial(welch, a, b)
        low, high = test(0.0).confidence_interval(0.95)
        p = test(compare.by).pvalue
        sides = ((-compare.margin, "greater"), (compare.margin, "less"))
        smaller = max(test(bound, alternative=side).pvalue for bound, side in sides) if compare.margin else 1.0
    verdict = HOLDS if low > compare.by else FAILS if high <= compare.by else OPEN
    if smaller < 0.05:
        verdict, p = EQUAL, smaller
    finite = [float(x) if math.isfinite(x) else None for x in (low, high)]  # JSON has no infinity
    return {
        "says": str(compare),
        "values": values,
        "mean": mean,
        "interval": finite,
        "constant": constant,
        "margin": compare.margin,
        "p": float(p),
        "verdict": verdict,
    }


def welch(a: np.ndarray, b: np.ndarray, by: float, alternative: str = "two-sided"):
    """Welch's test that a exceeds b by more or less than `by`; its interval is for a - b - by."""
    from scipy import stats

    return stats.ttest_ind(a, b + by, equal_var=False, alternative=alternative)


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values: the chance of any false positive among those below 0.05 is at most 5 %."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        adjusted[i] = highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def gains(runs: list[Run]) -> dict[str, dict]:
    """{metric: the base's mean, and for each seed the gain and its standard error, paired by prompt}."""
    found = {}
    for metric, first in runs[0].heldout.items():
        figures = [run.heldout[metric] for run in runs]
        found[metric] = {
            "base": first["mean"] - first["difference"],
            "gains": [figure["difference"] for figure in figures],
            "errors": [figure["error"] for figure in figures],
        }
    return found


def summarize(experiment: Experiment, arms: dict[str, list[Run]]) -> dict:
    """The content of results/NAME.json."""
    measured = {
        arm: {name: [measure(run) for run in runs] for name, measure in experiment.measures.items()}
        for arm, runs in arms.items()
    }
    parts = [judge(compare, measured) for compare in experiment.compares]
    curves = []
    for axis, key, label in experiment.curves:
        lines = {}
        for arm, runs in arms.items():
            drawn = [metrics.curve(run.rows, key) for run in runs]
            place = [AXES[axis][1](run, x) for run, (x, _) in zip(runs, drawn, strict=True)]
            lines[arm] = {"x": np.mean(place, 0).tolist(), "y": [y.tolist() for _, y in drawn]}
        curves.append({"x": AXES[axis][0], "y": label, "arms": lines})
    return {
        "says": experiment.says,
        "paper": experiment.paper,
        "verdict": parts[0]["verdict"],
        "parts": parts,
        "measures": measured,
        "heldout": {arm: gains(runs) for arm, runs in arms.items()},
        "curves": curves,
        "rewards": {arm: runs[0].config["reward"] for arm, runs in arms.items()},
        "arms": {arm: {"trainer": experiment.trainer, "preset": experiment.preset} | options for arm, options in
                 experiment.arms.items()},
        "iterations": {arm: runs[0].config["iterations"] for arm, runs in arms.items()},
        "seeds": [run.config["seed"] for run in next(iter(arms.values()))],
        "versions": next(iter(arms.values()))[0].config["versions"],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- plot


def band(ys: list[list[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, lowest and highest of S curves, at each point."""
    ys = np.array(ys)
    return ys.mean(0), ys.min(0), ys.max(0)


def draw(result: dict, path: Path) -> None:
    """The plot of a result: a panel for each curve, and one for each measure with a dot for each seed."""
    arms = list(result["measures"])
    measures = list(result["measures"][arms[0]])
    panels = len(result["curves"]) + len(measures)
    figure, axes = new_figure(panels)
    for axis, panel in zip(axes, result["curves"], strict=False):
        for arm, line in panel["arms"].items():
            center, low, high = band(line["y"])
            axis.plot(line["x"], center, "o-", label=arm, markersize=3)
            axis.fill_between(line["x"], low, high, alpha=0.2)
        axis.set(xlabel=panel["x"], ylabel=panel["y"])
        axis.locator_params(axis="x", integer=True)
        axis.legend(fontsize="small")
    for axis, name in zip(axes[len(result["curves"]) :], measures, strict=True):
        for i, arm in enumerate(arms):
            values = result["measures"][arm][name]
            axis.plot([i] * len(values), values, "o", alpha=0.5, color=f"C{i}")
            axis.plot(i, np.mean(values), "_", markersize=28, markeredgewidth=2, color=f"C{i}")
        axis.set_xticks(range(len(arms)), arms, rotation=20, ha="right")
        axis.set(xlabel="arm", ylabel=textwrap.fill(name, 45), xlim=(-0.5, len(arms) - 0.5))
    seeds = len(result["seeds"])
    title = textwrap.fill(result["says"], 50 * panels)
    figure.suptitle(f"{title}\n{result['verdict']}; mean and range; seeds: {seeds}", fontsize="medium")
    save_figure(figure, path)


def new_figure(panels: int):
    """A matplotlib figure, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.2), layout="constrained", squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0]


def save_figure(figure, path: Path) -> None:
    """Write it as a PNG, whole or not at all."""
    part = path.with_suffix(".part.png")
    with files.writing(part):
        figure.savefig(part, dpi=110)
        part.replace(path)


def difference(part: dict) -> str:
    """What was measured: the mean with Student's interval, or a constant alone."""
    if part["constant"]:
        return f"{part['mean']:+.3g}"
    low, high = ("?" if x is None else f"{x:+.3g}" for x in part["interval"])
    return f"{part['mean']:+.3g} ({low} to {high})"


def verdict(part: dict) -> str:
    """In words."""
    return f"{EQUAL} within {part['margin']:g}" if part["verdict"] == EQUAL else part["verdict"]


def figures(result: dict) -> list[str]:
    """A line for each part of the claim, the primary one first: what was measured, and the verdict."""
    return [f"{part['says']}: {difference(part)}, {verdict(part)}" for part in result["parts"]]


def report(result: dict) -> str:
    """The verdict in words, with a line for each part."""
    return "\n  ".join([f"{result['says']}: {verdict(result['parts'][0])}", *figures(result)])
