"""The README and docs/: size, links, the table of equations and lines of code, commands, and every figure in a table.

`uv run --group dev python -m tests.test_readme` sets moved lines right.
"""

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from runtime.options import check_ranges, parse_config
from sampling import flow_sde_step, flow_sigmas, gaussian_kl, gaussian_log_prob

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{file.name}" for file in ROOT.glob("docs/*.md")),
]
LINK = re.compile(r"\| `(?P<function>\w+)` \| \[`(?P<code>.+?)`\]\((?P<file>\w+\.py)#L(?P<line>\d+)\) \|")
EQUATIONS = [f"({n})" for n in range(1, 11)] + ["Alg. 1, line 8", "Alg. 1, line 10"]  # of version 4
ORDER = "`grpo_sd.py` → `sampling.py` → `grpo_flux.py` → `rewards.py` → `grpo_video.py`"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def table(page, first):
    """The cells of the rows of a page's only table whose header begins with `first`: {first cell: the others}."""
    text = read(page)
    assert text.count(f"\n| {first} |") == 1
    rows = text[text.index(f"\n| {first} |") + 1 :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert cells
    return {name.strip("`"): rest for name, *rest in cells}


# ------------------------------------------------------------------------------------------------------ size and links


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= 90
    assert len(read("README.md").split()) <= 900


def test_the_status_stands_before_the_first_command_of_full_size():
    text = read("README.md")
    assert text.index("not verified (never run on a GPU or with real weights)") < text.index("torchrun")


@pytest.mark.parametrize("page", ["README.md", "docs/reading.md"])
def test_there_is_one_reading_order(page):
    assert ORDER in read(page)


@pytest.mark.parametrize("page", PAGES)
def test_the_release_is_defined_where_it_is_first_named(page):
    paragraphs = [paragraph for paragraph in read(page).split("\n\n") if re.search(r"\bthe release\b", paragraph, re.I)]
    assert not paragraphs or "https://github.com/XueZeyue/DanceGRPO" in paragraphs[0]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_links_to_every_document():
    linked = set(re.findall(r"\((docs/[\w-]+\.md)\)", read("README.md")))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


# ----------------------------------------------------------------------------------------------------------- equations


def rows():
    """The table's rows: a match of LINK for each."""
    return list(LINK.finditer(read("README.md")))


def find_line(row):
    """The line of the row's file that has the row's code, and nothing but a comment more, in the row's function."""
    text = read(row["file"])
    (function,) = (f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name == row["function"])
    lines = enumerate(text.splitlines()[function.lineno - 1 : function.end_lineno], function.lineno)
    (number,) = (n for n, line in lines if line.split("  # ")[0].strip() == row["code"])
    return number


def test_the_table_has_every_equation_once():
    lines = [line for line in read("README.md").splitlines() if LINK.search(line)]
    found = [name for line in lines for name in re.findall(r"\(\d+\)|Alg\. 1, line \d+", line.split(" | ")[0])]
    assert sorted(found) == sorted(EQUATIONS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["function"])
def test_an_equation_stands_in_the_line_that_the_table_names(row):
    found = find_line(row)
    assert int(row["line"]) == found, f"{row['function']} is at {row['file']}#L{found}; run python -m tests.test_readme"


# ------------------------------------------------------------------------------------------------------------- figures


def test_the_readme_s_figures_are_those_of_the_claims():
    """Base and mean over the seeds, from the files that `python -m claims` made."""
    found = table("README.md", "| reward (tiny HPS)")
    assert len(found) == 2
    for command, claim in (("grpo_flux.py", "quick-start-flux"), ("grpo_sd.py", "quick-start-sd")):
        heldout = json.loads(read(f"claims/results/{claim}.json"))["heldout"]["DanceGRPO"]
        assert len(heldout["hps"]["gains"]) == 10  # "mean of ten seeds"
        ends = {name: (x["base"], x["base"] + sum(x["gains"]) / len(x["gains"])) for name, x in heldout.items()}
        hps = "{:.2f} → {:.2f}".format(*ends["hps"])
        accuracy = ["{:.0f} → {:.0f} %".format(*(100 * x for x in ends[judge])) for judge in ("geneval", "judged")]
        assert found[f"{command} --preset tiny"] == [hps, *accuracy]


def test_the_time_of_the_quick_start_is_what_was_measured():
    measured = json.loads(read("benchmarks/results/commands.json"))
    assert "each training takes about two minutes on two CPU cores" in read("README.md") and measured["cores"] == 2
    assert all(100 < measured[script]["whole"] < 130 for script in ("grpo_flux", "grpo_sd"))  # seconds


def test_the_memory_is_that_of_the_dry_runs():
    runs = json.loads(read("benchmarks/results/full_size.json"))
    expected = {
        run["command"]: [
            str(run["processes"]),
            f"{run['gpu_gib']['peak']:.1f}",
            f"{run['host_gib']:.0f}",
            f"{run['checkpoint_gib']['public']:.1f}",
            f"{run['checkpoint_gib']['state']:.1f}",
        ]
        for run in runs
        if "--shard-size" not in run["command"]
    }
    assert table("docs/full-scale.md", "command") == expected


def test_the_time_that_stopping_takes_and_what_a_killed_run_loses_follow_from_the_dry_runs():
    runs = {run["command"]: run for run in json.loads(read("benchmarks/results/full_size.json"))}
    for command, cells in table("docs/full-scale.md", "stopping").items():
        trainer, run = importlib.import_module(command.split(".")[0]), runs[command]
        cfg = parse_config(trainer.Config, trainer.PRESETS, command.split()[1:])
        rest = run["pflop"]["update"] * (1 - 1 / cfg.updates_per_rollout)  # after the first update
        written = sum(run["checkpoint_gib"].values())
        assert cells == [f"{rest / 0.4:.0f} s", f"{written:.0f} GiB"], command  # at 0.4 PFLOP/s
        assert cfg.save_every * sum(run["pflop"].values()) / 0.4 < 1.05 * 3600 or "video" not in command


def excess(levels, eta, window, spread):
    """How much the standard deviation of the latent before the last step is off, relative, with an exact predictor.

    Clean data are Gaussian of standard deviation `spread`, so every step is linear in z, and the variance of z follows
    from its coefficients.
    """
    variance = 1.0
    for t in range(len(levels) - 2):
        sigma, total = levels[t].item(), ((1 - levels[t]) * spread) ** 2 + levels[t] ** 2
        v = (sigma - (1 - sigma) * spread**2) / total  # E[x1 - x0 | z], for z = 1
        mean, std, _ = flow_sde_step(v.view(1, 1), torch.ones(1, 1), sigma, levels[t + 1], eta if t in window else 0.0)
        variance = mean.item() ** 2 * variance + std.item() ** 2
    sigma = levels[-2].item()
    return math.sqrt(variance / (((1 - sigma) * spread) ** 2 + sigma**2)) - 1


def preset(name):
    """("grpo_flux release") → its options, its sigmas, and the stochastic steps of its first iteration."""
    script, name = name.split()
    module = importlib.import_module(script)
    cfg = parse_config(module.Config, module.PRESETS, ["--preset", name])
    window = module.sde_window(0, cfg.steps, cfg.sde_window, cfg.sde_window_every)
    return cfg, flow_sigmas(cfg.steps, cfg.shift), window


def test_the_excess_noise_is_that_of_the_steps():
    for name, cells in table("docs/questions.md", "preset | T").items():
        cfg, levels, window = preset(name)
        found = [excess(levels, eta, window, x) for eta, x in ((cfg.eta, 0.0), (cfg.eta, 1.0), (0.0, 1.0))]
        assert cells == [f"{cfg.steps}", f"{cfg.shift:g}", f"{cfg.eta:g}", *(f"{100 * x:.1f} %" for x in found)], name


def test_a_step_s_excess_variance_is_the_formula_s():
    sigma, new, eta = 0.3, 0.2, 0.5
    mean, std, _ = flow_sde_step(torch.ones(1, 1), torch.full((1, 1), sigma), sigma, new, eta)  # clean data are 0
    delta = sigma - new
    expected = new**2 + eta**2 * delta**2 / sigma * (1 + eta**2 / (4 * sigma))
    assert mean.item() ** 2 + std.item() ** 2 == pytest.approx(expected, rel=1e-5)


def test_the_factor_of_the_kl_is_that_of_the_steps():
    for name, cells in table("docs/questions.md", "preset | w, first step").items():
        cfg, levels, window = preset(name)
        factors = []
        for t in window:
            z, v, v_ref = torch.randn(3, 1, 1000, generator=torch.Generator().manual_seed(t)).unbind(0)
            new, old = (flow_sde_step(x, z, levels[t], levels[t + 1], cfg.eta) for x in (v, v_ref))
            factors.append((gaussian_kl(new.mean, old.mean, new.std) / ((v - v_ref) ** 2).mean()).item())
            sigma, delta = levels[t].item(), (levels[t] - levels[t + 1]).item()
            formula = delta / (2 * cfg.eta**2) * (1 + cfg.eta**2 * (1 - sigma) / (2 * sigma)) ** 2
            assert factors[-1] == pytest.approx(formula, rel=1e-3)
        digits = [len(cell.partition(".")[2]) for cell in cells]
        assert cells == [f"{x:.{n}f}" for x, n in zip((factors[0], factors[-1]), digits, strict=True)], name


def test_the_log_ratio_has_the_mean_and_the_spread_that_the_table_says():
    d, std, generator = 4096, 0.1, torch.Generator().manual_seed(0)
    old = torch.randn(1, d, generator=generator)
    new = old + 0.01 * torch.randn(1, d, generator=generator)
    drawn = old + std * torch.randn(2000, d, generator=generator)
    log_rho = gaussian_log_prob(drawn, new, std) - gaussian_log_prob(drawn, old, std)
    k = gaussian_kl(new, old, std).item()
    assert log_rho.mean().item() == pytest.approx(-k, rel=0.05)
    assert log_rho.std().item() == pytest.approx(math.sqrt(2 * k / d), rel=0.05)


def test_the_log_ratios_of_the_models_follow_from_their_sizes():
    k = 1e-4
    sd, flux, video = (importlib.import_module(name).Config() for name in ("grpo_sd", "grpo_flux", "grpo_video"))
    sizes = [
        4 * (sd.height // 8) * (sd.width // 8),  # channels, and a latent's element for 8 x 8 pixels
        16 * (flux.height // 8) * (flux.width // 8),
        16 * ((video.frames - 1) // 4 + 1) * (video.height // 8) * (video.width // 8),
    ]
    expected = [
        [f"{d:,}", f"{-d * k:.1f} ± {math.sqrt(2 * d * k):.1f}", f"{-k:.1e} ± {math.sqrt(2 * k / d):.1e}"]
        for d in sizes
    ]
    assert list(table("docs/questions.md", "k = 1e-4").values()) == expected


# ------------------------------------------------------------------------------------------------------------ commands


def commands():
    """(script, its words) of every command of these pages that runs a script, in their order."""
    code = []
    for page in PAGES:
        text = read(page)
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        code += [line.split("  #")[0] for block in blocks for line in block.splitlines()]
        code += re.findall(r"`((?:uv run|python|torchrun) [^`]+)`", text)
    parts = [part for line in code if not line.startswith("#") for part in re.split(r";|&&", line)]
    return [(m[1], m[2].split()) for m in (re.search(r"\b(grpo_\w+|eval)\.py(.*)", part) for part in parts) if m]


def test_the_readme_has_a_full_size_command_for_each_model():
    text = read("README.md")
    block = text[text.index("## Full scale") :].split("```")[1]
    found = re.findall(r"^torchrun .*?(grpo_\w+\.py.*?)(?:  #.*)?$", block, re.MULTILINE)
    assert [" ".join(command.split()) for command in found] == [
        "grpo_sd.py --reward hps",
        "grpo_flux.py --preset 8gpu --reward hps",
        "grpo_video.py --preset wan",
        "grpo_video.py",
        "grpo_video.py --preset release-i2v",
    ]


def test_the_pages_name_every_script_and_the_presets_of_full_size():
    found = commands()
    assert {script for script, _ in found} == {"grpo_sd", "grpo_flux", "grpo_video", "eval"}
    named = {word for _, words in found for word in words}
    assert {"8gpu", "lora", "24gb", "lora-48gb", "lora-24gb", "release-i2v", "wan", "wan-48gb"} <= named


@pytest.mark.parametrize("script, words", commands(), ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_command_has_options_in_range(script, words):
    module = importlib.import_module(script)
    words = [word for word in words if word != "--resume"]  # needs the run that it continues
    check_ranges(parse_config(module.Config, module.PRESETS, words))


@pytest.mark.slow
def test_the_commands_of_the_quick_start_run(tmp_path):
    """Trainings of one iteration, then eval.py on their checkpoints, each in a process of its own."""
    found = [("grpo_video", ["--preset", "tiny-t2v"]), *commands()]
    short = {"tiny": "tiny_heldout.txt", "tiny-video": "moving_heldout.jsonl"}
    for file in short.values():
        lines = read(f"prompts/{file}").splitlines(keepends=True)
        (tmp_path / file).write_text("".join(lines[:2]).replace('"image": "', f'"image": "{ROOT / "prompts"}/'))
    ready = set()
    for script, words in sorted(found, key=lambda command: command[0] == "eval"):
        name = words[words.index("--preset") + 1] if "--preset" in words else ""
        if not name.startswith("tiny") or "my_rewards.py" in " ".join(words) or (script, name) in ready:
            continue
        ready.add((script, name))
        words = list(words)
        if script == "eval":
            run = words.index("--checkpoint") + 1
            words[run] = str(tmp_path / Path(words[run]).parent.name / "checkpoint-000001")
            words += ["--output-dir", str(tmp_path / f"{name}-eval"), "--prompts", str(tmp_path / short[name])]
        else:
            words += ["--output-dir", str(tmp_path / (f"tiny-{script[5:]}" if name == "tiny" else name))]
            words += ["--iterations", "1", "--num-samples", "1"]
        subprocess.run([sys.executable, f"{script}.py", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (tmp_path / "tiny-sd/checkpoint-000001/unet").is_dir()
    assert (tmp_path / "tiny-eval/index.html").is_file() and (tmp_path / "tiny-video-eval/index.html").is_file()


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = LINK.sub(lambda row: re.sub(r"#L\d+\)", f"#L{find_line(row)})", row[0]), read("README.md"))
    readme.write_text(text, encoding="utf-8")
