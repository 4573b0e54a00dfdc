"""The README: its table of equations and lines of code, and its commands.

`uv run python -m tests.test_readme` sets moved lines right.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.options import check_ranges, parse_config

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\| `(?P<function>\w+)` \| \[`(?P<code>.+?)`\]\((?P<file>\w+\.py)#L(?P<line>\d+)\) \|")
EQUATIONS = [f"({n})" for n in range(1, 11)] + ["Alg. 1, 8", "Alg. 1, 10"]  # of version 4


def rows():
    """The table's rows: a match of LINK for each."""
    return list(LINK.finditer((ROOT / "README.md").read_text(encoding="utf-8")))


def find_line(row):
    """The line of the row's file that has the row's code, and nothing but a comment more, in the row's function."""
    text = (ROOT / row["file"]).read_text(encoding="utf-8")
    (function,) = (f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name == row["function"])
    lines = enumerate(text.splitlines()[function.lineno - 1 : function.end_lineno], function.lineno)
    (number,) = (n for n, line in lines if line.split("  # ")[0].strip() == row["code"])
    return number


def test_the_table_has_every_equation_once():
    lines = [line for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() if LINK.search(line)]
    found = [name for line in lines for name in re.findall(r"\(\d+\)|Alg\. 1, \d+", line.split(" | ")[0])]
    assert sorted(found) == sorted(EQUATIONS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["function"])
def test_an_equation_stands_in_the_line_that_the_table_names(row):
    found = find_line(row)
    assert int(row["line"]) == found, f"{row['function']} is at {row['file']}#L{found}; run python -m tests.test_readme"


def test_the_readme_s_figures_are_those_of_the_claims():
    """Base and mean over the seeds, from the files that `python -m claims` made."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def figures(claim, metric):
        file = ROOT / f"claims/results/{claim}.json"
        found = json.loads(file.read_text(encoding="utf-8"))["heldout"]["DanceGRPO"][metric]
        return found["base"], found["base"] + sum(found["gains"]) / len(found["gains"])

    flux, sd, t2v = (
        "{:.0f} to {:.0f} %".format(*(100 * share for share in figures(*names)))
        for names in (("quick-start-flux", "geneval"), ("quick-start-sd", "geneval"), ("t2v", "right"))
    )
    assert "HPS rises from {:.2f} to {:.2f}".format(*figures("quick-start-flux", "hps")) in text
    assert f"an independent checker, from {flux}; Stable Diffusion's from {sd}, clips from {t2v} " in text


def test_the_readme_s_memory_is_that_of_the_dry_runs():
    """The GiB a GPU behind each command of full size, or behind the commands of one line in their order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    file = ROOT / "benchmarks/results/full_size.json"
    peaks = {run["command"]: run["gpu_gib"]["peak"] for run in json.loads(file.read_text(encoding="utf-8"))}
    block = text[text.index("## At full scale") :].split("```")[1]
    lines = [line for line in block.splitlines() if ".py" in line]
    assert len(lines) == 7
    for line in lines:
        code, comment = line.split("  #")
        named = [(m[1], *re.findall(r"--preset [\w-]+", m[2])) for m in re.finditer(r"(grpo_\w+\.py)([^;]*)", code)]
        named += [(named[0][0], preset) for preset in re.findall(r"--preset [\w-]+", comment)]
        expected = [f"{peaks[' '.join(words)]:.1f}" for words in named]
        assert re.findall(r"\d+\.\d", comment.replace("v1.4", "").replace("2.1", "")) == expected, line


def commands():
    """(script, its words) of every command of the README that runs a script, in its order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    code = [line.split("  #")[0] for block in blocks for line in block.splitlines()]
    code += re.findall(r"`((?:uv run|python|torchrun) [^`]+)`", text)
    parts = [part for line in code for part in re.split(r";|&&", line)]
    return [(m[1], m[2].split()) for m in (re.search(r"\b(grpo_\w+|eval)\.py(.*)", part) for part in parts) if m]


def test_the_readme_names_every_script_and_the_presets_of_full_size():
    found = commands()
    assert {script for script, _ in found} == {"grpo_sd", "grpo_flux", "grpo_video", "eval"}
    named = {word for _, words in found for word in words}
    assert {"8gpu", "lora", "24gb", "lora-48gb", "release-i2v", "wan", "wan-48gb"} <= named


@pytest.mark.parametrize("script, words", commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_command_of_the_readme_has_options_in_range(script, words):
    module = importlib.import_module(script)
    words = [word for word in words if word != "--resume"]  # needs the run that it continues
    check_ranges(parse_config(module.Config, module.PRESETS, words))


@pytest.mark.slow
def test_the_commands_of_the_quick_start_run(tmp_path):
    """Trainings of one iteration, then eval.py on their checkpoints, each in a process of its own."""
    short = {"tiny": "tiny_heldout.txt", "tiny-video": "moving_heldout.jsonl"}
    for file in short.values():
        lines = (ROOT / "prompts" / file).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / file).write_text("".join(lines[:2]).replace('"image": "', f'"image": "{ROOT / "prompts"}/'))
    for script, words in commands():
        preset = words[words.index("--preset") + 1] if "--preset" in words else ""
        if not preset.startswith("tiny") or "--reward" in words:
            continue
        if script == "eval":
            run = words.index("--checkpoint") + 1
            words[run] = str(tmp_path / Path(words[run]).parent.name / "checkpoint-000001")
            words += ["--output-dir", str(tmp_path / f"{preset}-eval"), "--prompts", str(tmp_path / short[preset])]
        else:
            name = f"tiny-{script[5:]}" if preset == "tiny" else preset
            words += ["--output-dir", str(tmp_path / name)]
            words += ["--iterations", "1", "--num-samples", "1"]
        subprocess.run([sys.executable, f"{script}.py", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (tmp_path / "tiny-sd/checkpoint-000001/unet").is_dir()
    assert (tmp_path / "tiny-eval/index.html").is_file() and (tmp_path / "tiny-video-eval/index.html").is_file()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(LINK.sub(lambda row: re.sub(r"#L\d+\)", f"#L{find_line(row)})", row[0]), text), encoding="utf-8")
