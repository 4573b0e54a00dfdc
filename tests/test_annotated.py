"""docs/annotated.html: it is what the sources give and has every function; its laboratory computes the same steps."""

import ast
import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from py_mini_racer import mini_racer

import sampling
from docs import annotate, figures
from grpo_flux import grpo_loss
from sampling import SDE, cps_log_prob, ddim_sde_step, flow_sigmas, gaussian_log_prob, rollout

ROOT = Path(__file__).resolve().parent.parent
FIGURE = re.compile(r'<svg class="plot".*?</svg>|<img [^>]*>', re.DOTALL)
NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?")  # noqa: RUF001
STEPS = {name: step for name, (step, _) in SDE.items()} | {"ddim": ddim_sde_step}
MEASURES = {"dance": gaussian_log_prob, "flow": gaussian_log_prob, "cps": cps_log_prob, "ddim": gaussian_log_prob}
EVERY = pytest.mark.parametrize("kind", STEPS)


@pytest.fixture(scope="module")
def page():
    return (ROOT / "docs/annotated.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def built():
    return annotate.build()


# ------------------------------------------------------------------------------------------------------------ the page


def pixels(tag):
    data = base64.b64decode(re.search(r"base64,([^\"]+)", tag)[1])
    return np.asarray(Image.open(io.BytesIO(data)), dtype=float)


def numbers(figure):
    return [float(x.replace("−", "-")) for x in NUMBER.findall(figure)]  # noqa: RUF001


def test_the_page_is_what_the_sources_give(page, built):
    """Words, formulas, code, line numbers, laboratory: exactly. If this fails, run `python -m docs.annotate`.

    Figures: another processor or version of torch rounds differently, so they are compared by what they show. A plot
    must have the same parts, and its numbers, which are places in a drawing of 330 by 220, may differ by 2. A picture
    may differ by 3 of 255 on average.
    """
    assert FIGURE.sub("", page) == FIGURE.sub("", built)
    here, there = FIGURE.findall(page), FIGURE.findall(built)
    assert len(here) == len(there) and sum(figure[:4] == "<svg" for figure in here) == 22
    for old, new in zip(here, there, strict=True):
        if old.startswith("<img"):
            assert old.partition("alt=")[2] == new.partition("alt=")[2]
            assert np.abs(pixels(old) - pixels(new)).mean() < 3
        else:
            assert NUMBER.sub("0", old) == NUMBER.sub("0", new)
            assert numbers(new) == pytest.approx(numbers(old), abs=2)


def test_a_second_build_gives_the_same_bytes(built):
    assert annotate.build() == built


def shown(page):
    """(file, function) → {line number: line} of all code on the page, and the captions."""
    found = {}
    for figure in re.findall(r'<figure class="code".*?</figure>', page, re.DOTALL):
        name, file, caption = re.search(r"<b>(\w+)</b> <a href=\"../([\w/]+\.py)\">(.*?)</figcaption>", figure).groups()
        lines, captions = found.setdefault((file, name), ({}, []))
        captions.append(caption)
        for number, line in re.findall(r'<span class="l" data-n="(\d+)"[^>]*>(.*?)\n</span>', figure, re.DOTALL):
            lines[int(number)] = html.unescape(re.sub(r"<[^>]*>", "", line))
    return found


def functions(file):
    return [x for x in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if isinstance(x, ast.FunctionDef)]


def grpo_functions(file):
    """Those under the heading "GRPO, as in the paper", the rollout and Algorithm 1."""
    text = (ROOT / file).read_text(encoding="utf-8").splitlines()
    headings = [n for n, line in enumerate(text, 1) if line.startswith("# ------")]
    start = next(n for n in headings if text[n - 1].endswith("GRPO, as in the paper"))
    end = min(n for n in headings if n > start)
    names = [x.name for x in functions(file) if start < x.lineno < end]
    assert "grpo_loss" in names
    return [*names, "sample_groups", "main"]


@pytest.mark.parametrize("file", ["sampling.py", "grpo_sd.py", "grpo_flux.py"])
def test_every_function_stands_in_the_page_with_its_numbers(page, file):
    found, text = shown(page), (ROOT / file).read_text(encoding="utf-8").splitlines()
    names = [x.name for x in functions(file)] if file == "sampling.py" else grpo_functions(file)
    for function in (x for x in functions(file) if x.name in names):
        numbered = {n: text[n - 1] for n in range(function.lineno, function.end_lineno + 1)}
        if (file, function.name) in found:
            assert numbered.items() <= found[file, function.name][0].items(), function.name
        else:  # named in the caption of its twin, which is the same letter for letter
            lines, (caption, *_) = found["grpo_sd.py", function.name]
            assert list(lines.values()) == list(numbered.values())
            assert f"the same in {file}, lines {function.lineno} to {function.end_lineno}" in caption


@pytest.mark.parametrize("label", [*(f"{n}" for n in range(1, 11)), "line 8", "line 10"])
def test_an_equation_leads_to_its_line(page, label):
    equation = annotate.equations()[label]
    (place,) = re.findall(rf'<span class="l" data-n="(\d+)" data-tag="([^"]*)">[^\n]*<a id="{equation.anchor}">', page)
    assert int(place[0]) == equation.number and equation.tag in place[1].split(", ")
    assert f'<a href="#{equation.anchor}">{equation.file} {equation.number}</a>' in page


def test_the_other_lines_of_an_equation_are_marked(page):
    places = annotate.parts()
    assert len(places) == len(annotate.PARTS)
    for (_, number), tag in places.items():
        assert re.findall(rf'data-n="(\d+)" data-tag="{tag}">', page) == [f"{number}"]


def test_links_lead_somewhere_and_nothing_is_loaded(page):
    anchors = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(anchors)) == len(anchors)
    targets = re.findall(r'href="([^"]+)"', page)
    assert {target[1:] for target in targets if target[0] == "#"} <= set(anchors)
    assert {t for t in targets if t[0] != "#"} <= {"data:,", "https://arxiv.org/abs/2505.07818"} | {
        f"../{file}" for file in ("sampling.py", "grpo_sd.py", "grpo_flux.py", "runtime/metrics.py")
    }
    assert not re.search(r'src="(?!data:)|url\(|@import|<link (?!rel="icon")|fetch\(|<script src', page)
    assert len(page.encode()) <= 1_500_000


def test_formulas_are_mathml_without_rest(page):
    formulas = re.findall(r"<math.*?</math>", page, re.DOTALL)
    assert len(formulas) > 100 and not any("\\" in formula for formula in formulas)
    assert "$" not in page.partition("<script>")[0]


def test_the_page_has_no_sentence_of_another_page(page):
    """Nor eight words in a row. Code is left out, on both sides."""

    def runs(text):
        words = re.findall(r"[a-z]+", html.unescape(re.sub(r"<[^>]*>|`[^`]*`", " ", text)).lower())
        return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}

    prose = re.sub(r'<figure class="code".*?</figure>|<math.*?</math>|<svg.*?</svg>', " ", page, flags=re.DOTALL)
    prose = runs(prose.partition("<body>")[2].partition("<script>")[0])
    for other in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        assert prose & runs(other.read_text(encoding="utf-8")) == set(), other


# ------------------------------------------------------------------------------------------------------ the laboratory


@pytest.fixture(scope="module")
def call():
    """Calls a function of laboratory.js in V8, the engine of Chromium."""
    with mini_racer() as engine:
        engine.eval((ROOT / "docs/laboratory.js").read_text(encoding="utf-8"))
        yield lambda code, **values: json.loads(
            engine.eval(f"(({{{', '.join(values)}}}) => JSON.stringify({code}))({json.dumps(values)})")
        )


def exact(kind, z, level):
    """The prediction for the mixture. Levels are sigmas, or ddim's alpha_bars."""
    if kind == "ddim":
        a, b = level.sqrt(), (1 - level).sqrt()
        return (z - a * figures.posterior_mean(z, a, b)) / b
    return (z - figures.posterior_mean(z, 1 - level, level)) / level


@EVERY
def test_a_step_is_that_of_sampling(kind, call):
    """One step from many places, 1e-6 apart at most."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        level, other = sorted(rng.uniform(0.05, 0.95, 2), reverse=kind != "ddim")
        p, z, eta = rng.standard_normal(), rng.standard_normal(), rng.uniform(0, 1)
        found = call("STEP[kind](p, z, s, n, eta)", kind=kind, p=p, z=z, s=level, n=other, eta=eta)
        step = STEPS[kind](torch.tensor([[p]]), torch.tensor([[z]]), level, other, eta)
        expected = [step.mean.item(), float(step.std), step.z0_hat.item()]
        assert [found["mean"], found["std"], found["x0"]] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.fixture(scope="module")
def double():
    """sampling.py with float64 in place of float32."""
    source = (ROOT / "sampling.py").read_text(encoding="utf-8")
    module = {"__name__": "double"}
    exec(source.replace("torch.float32", "torch.float64").replace(".float()", ".double()"), module)
    return module


@EVERY
@pytest.mark.parametrize("T, eta", [(2, 1.0), (6, 1.0), (16, 0.3), (50, 0.7), (16, 0.0)])
def test_whole_trajectories_are_those_of_sampling(kind, T, eta, call, double, monkeypatch):
    """From the same noise, with the exact prediction, in float64: in float32 rounding alone reaches 1e-5."""
    monkeypatch.setattr(figures, "WEIGHTS", torch.tensor([0.6, 0.4], dtype=torch.float64))
    monkeypatch.setattr(figures, "MEANS", torch.tensor([-1.5, 1.5], dtype=torch.float64))
    noise = np.random.default_rng(T).standard_normal((20, T))
    levels = torch.tensor(call("levels(kind, T, 3)", kind=kind, T=T), dtype=torch.float64)
    code = "noise.map((n) => rollout(kind, levels(kind, T, 3), eta, range(34, () => 0), n))"
    found = call(code, kind=kind, T=T, eta=eta, noise=noise.tolist())
    draws = torch.tensor(noise)[..., None]
    step = double[STEPS[kind].__name__]
    trajectory, _, z0 = double["rollout"](
        lambda z, t: exact(kind, z, levels[t]), draws[:, 0], levels, eta, step, lambda t: draws[:, t + 1], range(T - 1)
    )
    path = [[draw["z"] for draw in sample["draws"]] for sample in found]
    assert np.abs(np.array(path) - trajectory[:, : T - 1, 0].numpy()).max() < 1e-9
    assert np.abs([sample["z0"] for sample in found] - z0[:, 0].numpy()).max() < 1e-9


def test_the_levels_are_those_of_sampling(call):
    for T, shift in ((2, 1), (6, 3), (50, 7)):
        sigmas = flow_sigmas(T, shift)
        assert call("levels('dance', T, shift)", T=T, shift=shift) == pytest.approx(sigmas.tolist(), abs=1e-6)
        a, s = 1 - sigmas, sigmas
        expected = (0.005 + 0.995 * a**2 / (a**2 + s**2)).tolist()
        assert call("levels('ddim', T, shift)", T=T, shift=shift) == pytest.approx(expected, abs=1e-6)


@EVERY
def test_the_gradient_is_that_of_grpo_loss(kind, call):
    """Of the laboratory's 34 weights: its own derivation against autograd through the step, log-prob and loss."""
    rng, T, eta, clip = np.random.default_rng(1), 6, 0.6, 0.02
    old_theta, theta = 0.3 * rng.standard_normal((2, 34))
    noise = rng.standard_normal((40, T))
    levels = torch.tensor(call("levels(kind, T, 3)", kind=kind, T=T))
    code = "noise.map((n) => rollout(kind, levels(kind, T, 3), eta, theta, n).draws).flat()"
    draws = call(code, kind=kind, T=T, eta=eta, theta=old_theta.tolist(), noise=noise.tolist())
    draws = [draw | {"A": A} for draw, A in zip(draws, rng.standard_normal(len(draws)), strict=True)]
    values = {"kind": kind, "T": T, "eta": eta, "theta": theta.tolist(), "draws": draws, "clip": clip}
    found = call("gradient(kind, levels(kind, T, 3), eta, theta, draws, clip)", **values)

    z, z_next, A = (torch.tensor([[draw[name]] for draw in draws]) for name in ("z", "next", "A"))
    level, level_next = (levels[[draw["t"] + k for draw in draws]] for k in (0, 1))
    noisiness = ((1 - level).sqrt() if kind == "ddim" else level)[:, None]

    def log_prob(theta):
        hats = (1 - (2 * z.clamp(-4, 4) - torch.arange(-8, 9)).abs()).clamp(min=0)
        low, high = theta.view(2, 17)
        prediction = exact(kind, z, level[:, None]) + (hats * ((1 - noisiness) * low + noisiness * high)).sum(1, True)
        mean, std, _ = STEPS[kind](prediction, z, level, level_next, eta)
        return MEASURES[kind](z_next, mean, std)

    weights = torch.tensor(theta, dtype=torch.float32, requires_grad=True)
    with torch.no_grad():
        old = log_prob(torch.tensor(old_theta, dtype=torch.float32))
    loss, rho = grpo_loss(log_prob(weights), old, A.flatten(), clip)
    (-loss * len(draws)).backward()
    assert kind == "cps" or ((rho - 1).abs() > clip).float().mean() > 0.1  # the clip range acts
    scale = weights.grad.abs().max().item()
    assert np.abs(np.array(found) - weights.grad.numpy()).max() < 1e-4 * scale


@EVERY
@pytest.mark.parametrize("eta, steps, iterations", [(0.7, 10, 60), (1.0, 6, 240)])
def test_the_laboratory_learns(kind, eta, steps, iterations, call):
    """GRPO raises the mean reward, whatever the step, and the reward stays high."""
    code = """(() => {
      const theta = range(34, () => 0), l = levels(kind, steps, 3), reward = (x) => Math.exp(-((x - 1.5) ** 2) / 0.5);
      const random = ((i) => () => noise[i++])(0);
      const rewards = range(iterations, () => iterate(theta, kind, l, eta, reward, random));
      return [mean(rewards.slice(0, 5)), mean(rewards.slice(-5))];
    })()"""
    draws = iterations * 8 * (1 + 16 * (steps - 1))  # of iterations, groups, samples, steps
    noise = np.random.default_rng(2).standard_normal(draws).tolist()
    before, after = call(code, kind=kind, noise=noise, eta=eta, steps=steps, iterations=iterations)
    assert after > 0.75 and after > before + 0.1


def test_the_toy_of_the_figures_is_the_laboratory_s(call):
    z, sigma = torch.tensor([[-2.2], [0.3], [1.1]]), 0.4
    policy = figures.Policy()
    policy.theta.data = torch.linspace(-1, 1, 34).view(2, 17) ** 3
    found = [
        call("predict('dance', z, s, theta).p", z=x, s=sigma, theta=policy.theta.flatten().tolist())
        for x in z.flatten().tolist()
    ]
    assert found == pytest.approx(policy(z, sigma).flatten().tolist(), abs=1e-5)
    assert sampling.rollout is rollout
