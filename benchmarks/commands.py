"""How long whole commands take, from their start: python -m benchmarks.commands

The quick start until its first picture and to its end; how soon a wrong option is answered; two jobs on one machine,
with several settings of the threads; --compile. Takes a quarter of an hour, in which nothing else may run. Writes
benchmarks/results/commands.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "benchmarks/results/commands.json"
SHORT = ["--preset", "tiny", "--iterations", "8", "--num-samples", "1"]
WARM_UP = 2  # iterations
THREADS = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def start(words: list[str], **environment: str) -> subprocess.Popen:
    """A command of Python, in the root of the repository."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=os.environ | environment, **quiet)


def wait(*jobs: subprocess.Popen) -> None:
    """Until all have ended; raises RuntimeError if one of them failed."""
    if any([job.wait() for job in jobs]):
        raise RuntimeError(f"{' '.join(jobs[0].args[1:])} failed")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def seconds(run: Path) -> float:
    """Median over the iterations after the warm-up."""
    return statistics.median(row["seconds"] for row in metrics(run)[WARM_UP:])


def answer(words: list[str]) -> float:
    """Seconds until a command ends; the median of five."""
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        start(words).wait()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def quick_start(script: str, folder: Path) -> dict:
    """Seconds from the start to the first picture and to the end, and of all iterations."""
    run, began = folder / script, time.time()
    wait(start([f"{script}.py", "--preset", "tiny", "--output-dir", str(run)]))
    ended, first = time.time(), (run / "samples/000000.png").stat().st_mtime
    rows = metrics(run)
    training = sum(row["seconds"] for row in rows)
    return {"iterations": len(rows), "first picture": first - began, "training": training, "whole": ended - began}


def beside_each_other(environment: dict[str, str], folder: Path) -> list[float]:
    """Seconds of a FLUX iteration, alone and beside another such run."""
    medians = []
    for count in (1, 2):
        runs = [folder / f"{count}-{i}" for i in range(count)]
        wait(*[start(["grpo_flux.py", *SHORT, "--output-dir", str(run)], **environment) for run in runs])
        medians.append(statistics.mean(map(seconds, runs)))
    return medians


def compiled(folder: Path) -> dict:
    """Seconds of the first and of later iterations with --compile, and how far the ratio was from 1."""
    wait(start(["grpo_flux.py", *SHORT, "--compile", "--output-dir", str(folder)]))
    rows = metrics(folder)
    deviation = max(row["ratio_max_deviation_first_update"] for row in rows)
    return {"first iteration": rows[0]["seconds"], "iteration": seconds(folder), "ratio deviation": deviation}


def main() -> None:
    """Measures, prints and writes."""
    result = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for script in ("grpo_flux", "grpo_sd"):
            result[script] = quick_start(script, folder)
        result["import torch"] = answer(["-c", "import torch"])
        result["wrong option"] = answer(["grpo_flux.py", "--group-size", "1"])
        result["threads"] = {
            setting: beside_each_other(environment, folder / setting) for setting, environment in THREADS.items()
        }
        result["compile"] = compiled(folder / "compile")
    print(text := json.dumps(result, indent=1))
    FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
