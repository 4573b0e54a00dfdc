"""How much of an iteration is computation that cannot be avoided, and what an iteration costs.

    python -m benchmarks.throughput grpo_flux --preset tiny               efficiency of a preset
    python -m benchmarks.throughput grpo_flux --preset tiny --scaling     its cost against samples, steps, pixels

The trainer runs as it always does. After each iteration the same passes are repeated alone, in the same order and on
the same inputs: the network's, with their backward passes where there were any, the text encoders', the decoder's and
the rewards'. Efficiency is the time of these over the time of the iteration. The two alternate in one run, so that
other work on the machine slows both. Options after the trainer's name are the trainer's. Writes
benchmarks/results/NAME.json, or with --scaling NAME_scaling.json and .png.
"""

import importlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from runtime import output
from runtime.options import RunError, command_words, one_line_errors, parse_config

from .commands import metrics

ROUNDS, WARM_UP = 6, 2  # iterations that are measured, and before them those that are not
RESULTS = Path(__file__).resolve().parent / "results"


class Recorder:
    """The passes of an iteration, to be repeated alone."""

    def __init__(self, device):
        self.device, self.passes, self.on = device, [], True

    def note(self, module, args, kwargs):
        """A forward pre-hook of the network."""
        if self.on:
            kind = self.device.type
            autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
            autocast["enabled"] = torch.is_autocast_enabled(kind)
            self.passes.append((module, args, kwargs, torch.is_grad_enabled(), autocast))

    def wrap(self, function):
        """The function, which notes its calls."""

        def noted(*args, **kwargs):
            if self.on:
                self.passes.append((function, args, kwargs, False, dict(device_type=self.device.type, enabled=False)))
            return function(*args, **kwargs)

        return noted

    def seconds(self) -> float:
        """Repeats what was noted, and forgets it. Returns how long that took."""
        self.on, networks = False, {p[0] for p in self.passes if isinstance(p[0], torch.nn.Module)}
        start = time.perf_counter()
        for call, args, kwargs, grad, autocast in self.passes:
            with torch.set_grad_enabled(grad):
                with torch.autocast(**autocast):
                    out = call(*args, **kwargs)
                if grad:
                    out[0].float().square().mean().backward()
            out = None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        for network in networks:
            network.zero_grad()
        self.on, self.passes = True, []
        return taken


def measure(trainer, cfg) -> list[dict]:
    """Rows {seconds, seconds_rollout, …, necessary, samples_per_second}, one for each measured iteration of the run."""
    rows, recorder = [], None
    load_models, load_reward, finish = trainer.load_models, output.load_reward, output.Run.finish

    def models(cfg, world, *args):
        nonlocal recorder
        recorder = Recorder(world.device)
        pipe, network, *rest = load_models(cfg, world, *args)
        network.register_forward_pre_hook(recorder.note, with_kwargs=True)
        pipe.vae.decode = recorder.wrap(pipe.vae.decode)
        pipe.encode_prompt = recorder.wrap(pipe.encode_prompt)
        return pipe, network, *rest

    class Judge:
        """The reward, whose calls are noted."""

        def __init__(self, reward):
            self.reward = reward

        def __getattr__(self, name):
            return getattr(self.reward, name)

        def __call__(self, *args, **kwargs):
            return recorder.wrap(self.reward)(*args, **kwargs)

    def alternate(run, iteration, row, samples):
        run.lap("update")
        row = row | run.times(samples) | {"necessary": recorder.seconds()}
        if iteration >= WARM_UP:
            rows.append({name: value for name, value in row.items() if "second" in name or name == "necessary"})
        run.metrics.write({"iteration": iteration + 1} | row)
        recorder.passes = []

    trainer.load_models, output.Run.finish = models, alternate
    output.load_reward = lambda *args, **kwargs: Judge(load_reward(*args, **kwargs))
    try:
        trainer.main(cfg)
    finally:
        trainer.load_models, output.load_reward, output.Run.finish = load_models, load_reward, finish
    return rows


def run(trainer, words: list[str], rounds: int = ROUNDS) -> dict:
    """Medians over the measured iterations of a run with these options: seconds of each part, and the efficiency."""
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--output-dir", f"{folder}/run", "--iterations", str(WARM_UP + rounds), "--num-samples", "1"]
        rows = measure(trainer, parse_config(trainer.Config, trainer.PRESETS, words + extra))
    row = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return row | {"efficiency": statistics.median(row["necessary"] / row["seconds"] for row in rows)}


def fastest(trainer, words: list[str]) -> float:
    """Seconds of the fastest of three iterations, after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--output-dir", f"{folder}/run", "--iterations", "4", "--num-samples", "1"]
        trainer.main(parse_config(trainer.Config, trainer.PRESETS, words + extra))
        return min(row["seconds"] for row in metrics(Path(folder, "run"))[1:])


def scaling(trainer, words: list[str], rounds: int = 3) -> dict:
    """{what: [(factor, seconds of an iteration), …]} for 1, 2 and 4 times the samples, the steps and the pixels.

    With the steps the window grows, so that as large a share of them is trained. The settings take turns, and the
    fastest iteration of each counts, since other work on the machine can only slow it.
    """
    cfg = parse_config(trainer.Config, trainer.PRESETS, words)
    grows = {"samples": ["group_size"], "steps": ["steps", "sde_window"], "pixels": ["height"]}
    settings = {(what, k): {name: k * getattr(cfg, name) for name in grows[what]} for what in grows for k in (2, 4)}
    extra = {"as it is": []} | {setting: command_words(options) for setting, options in settings.items()}
    seconds = [{setting: fastest(trainer, words + more) for setting, more in extra.items()} for _ in range(rounds)]
    best = {setting: min(row[setting] for row in seconds) for setting in extra}
    return {what: [(1, best["as it is"]), *((k, best[what, k]) for k in (2, 4))] for what in grows}


def plot(curves: dict, path: Path) -> None:
    """Seconds of an iteration against the factor, beside the straight line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for what, points in curves.items():
        factors, seconds = zip(*points, strict=True)
        axes.plot(factors, [s / seconds[0] for s in seconds], marker="o", label=what)
    axes.plot([1, 4], [1, 4], color="grey", linestyle=":", label="in proportion")
    axes.set(xlabel="factor", ylabel="cost of an iteration, relative to factor 1", xticks=[1, 2, 4])
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures what the command line names, prints it and writes it."""
    if len(sys.argv) < 2 or sys.argv[1] not in ("grpo_sd", "grpo_flux", "grpo_video"):
        raise RunError("name the trainer first: python -m benchmarks.throughput grpo_flux --preset tiny")
    words = [word for word in sys.argv[2:] if word != "--scaling"]
    trainer, command = importlib.import_module(sys.argv[1]), [sys.argv[1], *words]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    result = {"command": command, "machine": machine, "torch": torch.__version__}
    name = "_".join(word.lstrip("-") for word in command)
    RESULTS.mkdir(exist_ok=True)
    print(f"{' '.join(command)}, {machine}:")
    if "--scaling" in sys.argv:
        name, curves = f"{name}_scaling", scaling(trainer, words)
        for what, points in curves.items():
            print(f"{what}: " + ", ".join(f"{factor}x {s:.3g} s ({s / points[0][1]:.2f})" for factor, s in points))
        plot(curves, RESULTS / f"{name}.png")
        result["scaling"] = curves
    else:
        result |= run(trainer, words)
        print("  ".join(f"{what} {value:.3g}" for what, value in result.items() if isinstance(value, float)))
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main()
