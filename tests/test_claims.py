"""The machinery of the claims, on made-up runs: measures, intervals, verdicts, plots, and that no run is done twice."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

import claims.__main__ as command
import grpo_flux
import grpo_sd
from claims import advantages, diversity, dpo, experiment, forward, one_form, policy, power, tables, timesteps
from claims.experiment import EQUAL, FAILS, HOLDS, OPEN, Compare, Experiment, Run
from claims.quality import quality
from rewards import load_reward
from runtime import metrics
from runtime.options import RunError, check_options


@dataclass(frozen=True)
class Config:
    """Of the trainer that this module plays."""

    preset: str = "p"  # p
    output_dir: str = "runs/fake"  # folder
    resume: bool = False  # go on
    seed: int = 0  # seed
    iterations: int = 4  # rollouts
    eta: float = 1.0  # noise
    save_every: int = 50  # iterations
    keep_states: int = 2  # checkpoints


PRESETS, STARTED = {"p": {}}, []


def main(cfg):
    """As a trainer: leaves config.json, metrics.jsonl and a checkpoint. With eta 13 it is interrupted once."""
    STARTED.append(cfg)
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"script": "test_claims.py", "directory": ".", "versions": {}} | cfg.__dict__ | {"resume": False}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(f'{{"iteration": {i + 1}}}\n' for i in range(cfg.iterations)))
    if cfg.eta == 13 and not cfg.resume:
        raise KeyboardInterrupt
    (folder / f"checkpoint-{cfg.iterations:06d}").mkdir()


CONFIG = dict(sde_window=2, steps=6, timestep_fraction=0.6, keep_best_worst=0, group_size=8, prompts_per_iteration=8)
CONFIG |= dict(shared_noise=False, updates_per_rollout=1)
CONFIG |= dict(seed=1, iterations=20, versions={"torch": "0"}, reward="hps")


def a_run(before=0.0, middle=1.0, end=2.0, hps=0.3, **config):
    """A run of 20 iterations of 3 seconds, whose sample pictures were scored before, after 10 and at the end."""
    rows = [{"iteration": i + 1, "seconds": 3.0} for i in range(20)]
    rows[0]["score_before"], rows[9]["score"], rows[19]["score"] = before, middle, end
    return Run(CONFIG | config, rows, {"hps": {"mean": hps, "difference": hps - 0.2, "error": 0.1}}, [], [])


# -------------------------------------------------------------------------------------------------------- measures


def test_a_curve_begins_before_training():
    x, y = metrics.curve(a_run(0.5, 1.0, 4.0).rows, "score")
    assert x.tolist() == [0, 10, 20] and y.tolist() == [0.5, 1.0, 4.0]


def test_measures_of_a_run():
    run = a_run(5.0, 7.0, 9.0)
    assert experiment.speed("score")(run) == 2.0  # (10 · 1 + 10 · 3) / 20
    assert experiment.speed("score")(a_run(5.0, 9.0, 9.0)) == 3.0  # faster
    assert experiment.mean("seconds")(run) == 3.0
    assert experiment.heldout("hps")(run) == 0.3 and experiment.gain("hps")(run) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 768),  # 8 prompts x (8 samples x 6 steps + 3 x 8 samples x 2 steps)
        ({"sde_window": 0}, 960),  # int(5 · 0.6) = 3 steps
        ({"sde_window": 0, "timestep_fraction": 1.0}, 1344),
        ({"group_size": 32, "keep_best_worst": 4}, 1920),  # 8 x (32 x 6 + 3 x 8 x 2)
        ({"shared_noise": True}, 544),  # 8 x (1 + 8 x 5 + 3 x (1 + 8 x 1))
        ({"shared_noise": True, "updates_per_rollout": 2}, 568),  # the first step in both updates
    ],
)
def test_evaluations_of_the_network(changes, expected):
    assert experiment.evaluations(CONFIG | changes) == pytest.approx(expected)


def test_positions_on_the_axes():
    run, x = a_run(), np.array([0, 10, 20])
    found = {name: place(run, x).tolist() for name, (_, place) in experiment.AXES.items()}
    assert found["iteration"] == [0, 10, 20]
    assert found["evaluations"] == pytest.approx([0, 7.68, 15.36])
    for row in run.rows:
        row["evaluations"] = 100  # as a baseline counts them itself
    assert experiment.AXES["evaluations"][1](run, x).tolist() == pytest.approx([0, 1, 2])


def test_distance_of_features():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert diversity.mean_distance(features) == pytest.approx(2 / 3)  # pairs: 0, 1, 1


# --------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    "higher, lower, options, verdict",
    [
        ([4.0, 5.0, 6.0], [1.0, 2.0, 3.1], {}, HOLDS),
        ([1.0, 2.0, 3.1], [4.0, 5.0, 6.0], {}, FAILS),
        ([1.0, 5.0, 3.0], [2.0, 3.0, 3.0], {}, OPEN),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], {}, FAILS),  # exactly equal is not more
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], {"by": -0.01}, HOLDS),  # but it is not less either
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], {"margin": 0.01}, EQUAL),
        ([1.0, 2.1, 2.9], [1.0, 2.0, 3.0], {"margin": 0.2}, EQUAL),  # 0 ± 0.17
        ([1.0, 2.1, 2.9], [1.0, 2.0, 3.0], {"margin": 0.15}, OPEN),
        ([1.1, 2.11, 3.12], [1.0, 2.0, 3.0], {"margin": 0.2}, EQUAL),  # 0.11 for certain, and that does not matter
        ([1.0, 2.1, 2.9], [1.0, 2.0, 3.0], {"margin": 0.2, "paired": False}, OPEN),  # the spread of each arm counts
        ([4.0, 5.0, 6.0], [1.0, 2.0, 3.1], {"paired": False}, HOLDS),
        ([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], {"times": 1.9}, OPEN),  # 0.1, 0.2, 0.3: 0.2 ± 0.25
        ([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], {"times": 1.0, "by": -0.5}, HOLDS),  # 1, 2, 3: above -0.484
        ([9.0], [0.0], {}, OPEN),  # one seed shows nothing
    ],
)
def test_a_part_of_a_claim(higher, lower, options, verdict):
    measured = {"a": {"m": higher}, "b": {"m": lower}}
    part = experiment.judge(Compare("m", "a", "b", **options), measured)
    assert part["verdict"] == verdict
    json.dumps(part, allow_nan=False)


def test_a_part_against_a_number():
    """Student's t of two degrees of freedom is 4.3027 at 97.5 %."""
    part = experiment.judge(Compare("m", "a", by=0.9), {"a": {"m": [1.0, 1.0, 1.1]}})
    assert part["values"] == [[1.0, 1.0, 1.1]]
    assert part["mean"] == pytest.approx(1.0333, abs=1e-4)
    assert part["interval"] == pytest.approx([0.8899, 1.1768], abs=1e-4) and part["verdict"] == OPEN
    assert part["p"] == pytest.approx(0.0572, abs=1e-4)  # t = 4, two-sided


def test_welchs_interval():
    """Means 2 and 5, variances 1 and 4 of three values each: 3 ± t √(5/3), 2.94 degrees of freedom, t = 3.2188."""
    part = experiment.judge(Compare("m", "b", "a", paired=False), {"a": {"m": [1, 2, 3]}, "b": {"m": [3, 5, 7]}})
    assert part["mean"] == 3 and part["interval"] == pytest.approx([3 - 4.1555, 3 + 4.1555], abs=1e-3)


def test_a_cost_has_no_interval():
    part = experiment.judge(Compare("m", "a", "b", times=2.0), {"a": {"m": [5.0] * 3}, "b": {"m": [2.0] * 3}})
    assert part["constant"] and experiment.difference(part) == "+1" and part["verdict"] == HOLDS


def test_holm():
    """The smallest p is multiplied by 4, the next by 3, and none may fall below the one before it."""
    assert experiment.holm([0.02, 0.001, 0.03, 0.6]) == pytest.approx([0.06, 0.004, 0.06, 0.6])
    assert experiment.holm([]) == []


def test_the_verdicts_are_right_and_decide():
    """At most 5 % false verdicts, up to what 400 trials tell, and four of five decided at one standard deviation."""
    none, one = (power.shares(effect, seeds=10, trials=400) for effect in (0.0, 1.0))
    assert none[HOLDS] + none[FAILS] <= 0.07 and one[EQUAL] + one[FAILS] <= 0.07
    assert none[EQUAL] >= 0.75 and one[HOLDS] >= 0.75
    assert power.shares(1.0, seeds=3, trials=400)[HOLDS] <= 0.25  # three seeds do not


# ---------------------------------------------------------------------------------------------------- results, plots

CLAIM = Experiment(
    says="a is better than b (Fig. 0)", trainer="test_claims", preset="p", arms={"a": {"eta": 2.0}, "b": {}},
    measures={"HPS (cosine)": experiment.heldout("hps")}, compares=(Compare("HPS (cosine)", "a", "b"),),
    curves=(("iteration", "score", "score (points)"),),
)  # fmt: skip
ARMS = {
    "a": [a_run(0, 3, 6, 0.5), a_run(0, 4, 7, 0.6), a_run(0, 5, 11, 0.71)],
    "b": [a_run(0, 1, 2, 0.3), a_run(0, 1, 2, 0.4), a_run(0, 1, 2, 0.5)],
}


def test_a_result_has_every_seed_and_the_verdict():
    result = experiment.summarize(CLAIM, ARMS)
    assert result["verdict"] == HOLDS and result["parts"][0]["values"] == [pytest.approx([0.2, 0.2, 0.21])]
    assert result["measures"] == {"a": {"HPS (cosine)": [0.5, 0.6, 0.71]}, "b": {"HPS (cosine)": [0.3, 0.4, 0.5]}}
    assert result["curves"][0]["arms"]["a"] == {"x": [0, 10, 20], "y": [[0, 3, 6], [0, 4, 7], [0, 5, 11]]}
    assert result["heldout"]["a"]["hps"]["base"] == pytest.approx(0.2)
    assert result["arms"]["a"] == {"trainer": "test_claims", "preset": "p", "eta": 2.0}
    assert experiment.report(result).splitlines() == [
        "a is better than b (Fig. 0): holds",
        "  HPS (cosine): a - b > 0: +0.203 (+0.189 to +0.218), holds",
    ]


def test_the_plot_has_axes_with_units_and_bands_over_the_seeds(tmp_path, monkeypatch):
    saved, save = [], experiment.save_figure
    monkeypatch.setattr(experiment, "save_figure", lambda figure, path: (saved.append(figure), save(figure, path)))
    experiment.draw(experiment.summarize(CLAIM, ARMS), tmp_path / "a.png")
    curves, dots = saved[0].axes
    assert (curves.get_xlabel(), curves.get_ylabel()) == ("iteration", "score (points)")
    assert (dots.get_xlabel(), dots.get_ylabel()) == ("arm", "HPS (cosine)")
    assert [label.get_text() for label in dots.get_xticklabels()] == ["a", "b"]
    assert curves.lines[0].get_ydata().tolist() == [0, 4, 8]  # the mean
    at_the_end = {y for x, y in curves.collections[0].get_paths()[0].vertices if x == 20}
    assert at_the_end == {6, 11}  # the range
    assert dots.lines[0].get_ydata().tolist() == [0.5, 0.6, 0.71]
    assert Image.open(tmp_path / "a.png").width > 900 and not list(tmp_path.glob("*.part*"))


# -------------------------------------------------------------------------------------------------------------- runs


def test_a_finished_run_is_used_again_and_an_interrupted_one_resumed(tmp_path):
    STARTED.clear()
    first = experiment.train(__name__, {"preset": "p", "seed": 1}, tmp_path)
    assert experiment.train(__name__, {"preset": "p", "seed": 1, "eta": 1.0}, tmp_path) == first  # the same options
    assert len(STARTED) == 1
    other = experiment.train(__name__, {"preset": "p", "seed": 2}, tmp_path)
    assert other != first and len(STARTED) == 2
    with pytest.raises(KeyboardInterrupt):
        experiment.train(__name__, {"preset": "p", "eta": 13.0}, tmp_path)
    assert experiment.train(__name__, {"preset": "p", "eta": 13.0}, tmp_path).is_dir()
    assert [cfg.resume for cfg in STARTED[2:]] == [False, True]


def test_another_loop_makes_another_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_loop.py").write_text("from tests.test_claims import main as train\n")
    first = experiment.train(__name__, {"preset": "p"}, tmp_path, "own_loop:train")
    assert experiment.train(__name__, {"preset": "p"}, tmp_path, "own_loop:train") == first
    (tmp_path / "own_loop.py").write_text("from tests.test_claims import main as train  # changed\n")
    assert experiment.train(__name__, {"preset": "p"}, tmp_path, "own_loop:train") != first


def test_other_weights_make_another_run(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.json").write_text("1")
    before = experiment.files_of({"model": str(tmp_path / "model"), "eta": 1.0})
    (tmp_path / "model" / "a.json").write_text("2")
    assert before != experiment.files_of({"model": str(tmp_path / "model"), "eta": 1.0})
    assert list(before) == [str(tmp_path / "model")]
    assert list(experiment.files_of({"reward_paths": "geneval=tiny/pictures.py:Detector"})) == ["tiny/pictures.py"]


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_a_claim_asks_for_runs_that_are_possible(name):
    """Of every arm the trainer's options are in range; parts and curves name what is measured."""
    claim = command.EXPERIMENTS[name]
    for options in claim.arms.values():
        trainer = importlib.import_module(claim.trainer)
        chosen = {"preset": claim.preset} | {key: value for key, value in options.items() if key != "loop"}
        check_options(experiment.parse(trainer, chosen))
        module, _, function = options.get("loop", claim.trainer).partition(":")
        assert callable(getattr(importlib.import_module(module), function or "main"))
    for part in claim.compares:
        assert {part.higher, part.lower or part.higher} <= set(claim.arms) and part.measure in claim.measures
    assert {axis for axis, *_ in claim.curves} <= set(experiment.AXES)


def test_a_trial_leaves_the_results_alone(tmp_path, monkeypatch, capsys):
    asked = []

    def run_arms(claim, name, seeds, iterations, folder):
        asked.append((name, list(seeds), iterations))
        return {arm: runs[: len(seeds)] for arm, runs in ARMS.items()}

    monkeypatch.setattr(command, "EXPERIMENTS", {"fake": CLAIM})
    monkeypatch.setattr(command, "NAMES", ("fake",))
    monkeypatch.setattr(experiment, "run_arms", run_arms)
    monkeypatch.chdir(tmp_path)
    command.main("fake", command.Config(seeds=1, iterations=2))
    trial = json.loads((tmp_path / "runs/claims/results/fake.json").read_text())
    assert trial["verdict"] == OPEN and not (tmp_path / "claims").exists()
    command.main("fake", command.Config())
    assert json.loads((tmp_path / "claims/results/fake.json").read_text())["verdict"] == HOLDS
    assert (tmp_path / "claims/results/fake.png").is_file()
    assert asked == [("fake", [11], 2), ("fake", list(range(11, 21)), 0)]
    assert "a is better than b (Fig. 0): holds" in capsys.readouterr().out


def test_the_tables_in_results_md_say_what_the_files_say():
    for page in ("claims/README.md", "RESULTS.md"):
        written = (tables.ROOT / page).read_text(encoding="utf-8")
        assert written == tables.filled(written, command.CLAIMS), "run python -m claims table"
    places = [name for _, name, _ in tables.PLACE.findall(written)]
    others = {"verdicts", "parts", "throughput", "commands", "full_size", "tiny"}
    assert others < set(places) <= others | set(command.EXPERIMENTS)
    assert {path.stem for path in tables.RESULTS.glob("*.json")} <= set(command.NAMES)


def test_generators_that_were_not_there_to_be_checked_have_no_row(monkeypatch):
    figures = tables.read(tables.ROOT / "tiny/figures.json")
    known = tables.tiny()
    here = {name: row for name, row in figures.items() if not name.startswith("runs/")}
    assert len(here) < len(figures)
    monkeypatch.setattr(tables, "read", lambda path: here)
    assert tables.tiny().splitlines() == [line for line in known.splitlines() if "before its habits" not in line]


def test_a_table_takes_its_place_and_leaves_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "sde.json").write_text(json.dumps(experiment.summarize(CLAIM, ARMS)))
    file = tmp_path / "RESULTS.md"
    place = "<!-- python -m claims table: {} -->\n"
    file.write_text(f"1\n{place.format('verdicts')}old\n<!-- end -->\n2\n{place.format('sde')}<!-- end -->\n3\n")
    tables.write(["kl", "sde"], [file])
    lines = file.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("1", "3") and "old" not in lines and lines.count("<!-- end -->") == 2
    assert lines[4] == (
        "| [sde](claims/results/sde.png) | HPS (cosine): a - b > 0 | +0.203 (+0.189 to +0.218) | holds | < 0.001 |"
    )
    assert lines[-3] == "| HPS, trained on | 0.200 | 0.603 | +0.403 (+0.300 to +0.510) | +3.0 |"


def test_an_unknown_claim_is_one_line():
    with pytest.raises(RunError, match=r"^unknown claim 'noise'; known: quick-start-sd, quick-start-flux, "):
        command.main("noise", command.Config())


# ---------------------------------------------------------------------------------------------------------- one form


def test_diffusion_and_rectified_flow_are_one_form():
    result = one_form.run([1, 2])
    assert result["verdict"] == HOLDS and max(result["differences"]) <= 1e-5
    ends = [path[-1] for path in result["paths"].values()]
    assert ends == pytest.approx([round(ends[0])] * 2, abs=1e-4) and abs(round(ends[0])) == 1  # the data


def test_another_schedule_would_show(monkeypatch):
    step = one_form.flow_sde_step
    monkeypatch.setattr(one_form, "flow_sde_step", lambda v, z, a, b, eta: step(v, z, a, 1.001 * b, eta))
    assert one_form.run([1])["verdict"] == FAILS


# --------------------------------------------------------------------------------------------------------- baselines


def test_losses_on_the_forward_process():
    """Gradients where v = v_old, by hand. AWM: A 2 (v - target) / d, away from the target if A < 0. NFT: the same with
    (2 r - 1) in place of A, times sigma² from the prediction of z0, over its mean absolute error."""
    target, sigma = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([0.5, 0.8])
    errors = torch.tensor([0.5 * 1.5, 0.8 * 0.5])
    for loss, weights in (
        (forward.nft_loss, torch.tensor([0.5, -1.0]) * sigma**2 / errors),
        (forward.awm_loss, torch.tensor([1.0, -3.0])),
    ):
        v = torch.zeros(2, 2, requires_grad=True)
        loss(v, v.detach(), target, torch.tensor([1.0, -3.0]), sigma).backward()
        torch.testing.assert_close(v.grad, weights[:, None] * -target / 2)


def test_a_single_stochastic_step_is_the_asked_one():
    with patch.object(grpo_flux, "main", lambda cfg: STARTED.append(grpo_flux.sde_window(3, 6, 1, 25))):
        timesteps.branch_2(None)
    assert STARTED.pop() == range(2, 3)


def test_the_loss_of_online_dpo():
    """-log sigmoid(-beta/2 (0.1 - (-0.3))): the better sample is predicted worse than by the reference, the worse one
    better, so the loss is high."""
    error, reference = torch.tensor([[0.5], [0.2]]), torch.tensor([[0.4], [0.5]])
    assert dpo.dpo_loss(error, reference, 10.0).item() == pytest.approx(2.1269, abs=1e-4)  # log(1 + e²)
    assert dpo.dpo_loss(error.flip(0), reference.flip(0), 10.0).item() == pytest.approx(0.1269, abs=1e-4)
    assert dpo.dpo_loss(error, error, 10.0).item() == pytest.approx(0.6931, abs=1e-4)  # log 2


def test_the_score_that_refl_climbs_is_the_rewards_own():
    reward = load_reward("hps", {"hps": "tiny/hps"})
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompts = ["a red circle", "two crosses"]
    score = policy.differentiable_score(reward.scorers["hps"], images, prompts)
    torch.testing.assert_close(score.detach(), reward(images.detach(), prompts)["hps"])
    score.sum().backward()
    better = (images + 0.01 * images.grad.sign()).clamp(0, 1).detach()
    assert (reward(better, prompts)["hps"] > score).all()


FAST = dict(preset="tiny", iterations=2, prompts_per_iteration=2, group_size=4, steps=4, num_samples=2, micro_batch=4)
FAST |= dict(sde_window=2, updates_per_rollout=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loop, trainer, cost",
    [
        ("claims.ddpo", grpo_sd, 8 * 4 + 3 * 8 * 2),
        ("claims.ddpo", grpo_flux, 8 * 4 + 3 * 8 * 2),
        ("claims.forward:nft", grpo_flux, 8 * 4 + 4 * 8 * 1),
        ("claims.forward:awm", grpo_flux, 8 * 4 + 4 * 8 * 1),
        ("claims.refl", grpo_sd, None),
        ("claims.dpo", grpo_sd, 2 * (4 * 4 - 3) + 2 * 24 * 4 // 2),  # two texts with guidance, one without
    ],
)
def test_a_baseline_trains_and_leaves_a_checkpoint(loop, trainer, cost, tmp_path):
    run = experiment.train(trainer.__name__, FAST | {"ema_decay": 0.5}, tmp_path, loop)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    costs = [row["evaluations"] for row in rows]
    assert costs == [cost] * 2 if cost else all(c in (8 * (2 + 3), 8 * (3 + 3)) for c in costs)
    assert all(row["grad_norm"] > 0 and np.isfinite(row["loss"]) for row in rows)
    if loop == "claims.ddpo":
        assert all(row["ratio_max_deviation_first_update"] == 0 for row in rows)
    component = "unet" if trainer is grpo_sd else "transformer"
    weights = "diffusion_pytorch_model.safetensors"
    before = safetensors.torch.load_file(f"tiny/{'sd' if trainer is grpo_sd else 'flux'}/{component}/{weights}")
    for part in (component, f"{component}_ema"):
        after = safetensors.torch.load_file(run / "checkpoint-000002" / part / weights)
        assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


def test_a_win_rate_is_the_share_of_the_others_that_a_sample_beats(monkeypatch):
    r = torch.tensor([0.1, 0.3, 0.2, 0.4, 50.0, 10.0, 20.0, 30.0])  # two groups of 4
    noisy = advantages.win_rates(r[:4].repeat(500), 4)
    assert noisy.view(-1, 4).sum(1).tolist() == pytest.approx([2] * 500)  # of 6 pairs, each has one winner
    mean = noisy.view(-1, 4).mean(0)
    assert mean[0] < mean[2] < mean[1] < mean[3] and mean[0] > 0.2 and mean[3] < 0.8
    beats = torch.distributions.Normal(0, 1).cdf(torch.tensor([0.3, 0.1, 0.2]) / (2**0.5 * advantages.NOISE)).mean()
    assert mean[3].item() == pytest.approx(beats.item(), abs=0.03)
    monkeypatch.setattr(advantages, "NOISE", 0.0)
    assert advantages.win_rates(r, 4).tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1, 1, 0, 1 / 3, 2 / 3])


def test_arms_that_are_compared_at_equal_cost_cost_the_same():
    """Evaluations of an iteration, as the loops report them; see test_a_baseline_trains… for these formulas.

    The baselines may cost a little more than GRPO, never less.
    """
    of_preset = grpo_sd.Config(**grpo_sd.PRESETS["tiny"])
    B, T, grpo = 64, of_preset.steps, experiment.evaluations(vars(of_preset))
    assert of_preset.prompts_per_iteration * of_preset.group_size == B
    cost = {"GRPO": grpo, "DDPO": B * T + 3 * B * 3, "ReFL": B * (T - 1.5 + 3)}
    cost["online DPO"] = B * T - 8 * 7 + 8 * dpo.DRAWS * 4
    arms = command.EXPERIMENTS["baselines-hps"].arms
    for name, arm in arms.items():
        assert 1 <= arm["iterations"] * cost[name] / (arms["GRPO"]["iterations"] * grpo) <= 1.03
    arms = command.EXPERIMENTS["forward"].arms
    of_preset = grpo_flux.Config(**grpo_flux.PRESETS["tiny"])
    total = arms["GRPO"]["iterations"] * experiment.evaluations(vars(of_preset))
    assert all(arms[x]["iterations"] * B * (6 + 4 * 3) == pytest.approx(total, rel=0.01) for x in ("NFT", "AWM"))


def test_noise_of_scores_is_a_function_of_them():
    r = torch.linspace(0, 1, 4000)
    assert torch.equal(advantages.noisy(r), advantages.noisy(r.clone()))
    assert (advantages.noisy(r) - r).std().item() == pytest.approx(advantages.NOISE, rel=0.05)
    assert (advantages.noisy(r, 4) - r).std().item() == pytest.approx(advantages.NOISE / 2, rel=0.05)
    assert not torch.allclose(advantages.noisy(r) - r, advantages.noisy(r + 0.1) - r - 0.1)


def test_sums_and_gdpo_differ_from_the_papers_advantages_as_their_formulas_say():
    rewards = {"small": torch.tensor([0.0, 0.1, 0.0, 0.2]), "large": torch.tensor([0.0, 0.0, 10.0, 10.0])}
    weights = {"small": 1.0, "large": 2.0}
    total = (rewards["small"] + 2 * rewards["large"]).numpy()
    found = advantages.of_sum(rewards, weights, 4, 5.0)
    assert found.tolist() == pytest.approx(((total - total.mean()) / total.std(ddof=1)).tolist(), abs=1e-5)
    own = grpo_flux.group_advantages(rewards, weights, 4, 5.0)
    found = advantages.gdpo(rewards, weights, 4, 5.0)
    assert found.tolist() == pytest.approx((own / own.std()).tolist(), abs=1e-5)  # of one group the mean is 0 already


def test_the_reward_for_quality_does_not_depend_on_the_prompt():
    images = torch.rand(3, 3, 64, 64)
    hps = load_reward("hps", {"hps": "tiny/hps"})
    prompts = Path("prompts/tiny.txt").read_text().splitlines()
    best = torch.stack([hps(images, [prompt] * 3)["hps"] for prompt in prompts]).amax(0)
    assert quality(images, prompts[:3]).tolist() == pytest.approx(best.tolist(), abs=1e-5)
    own = hps(images, ["one of its own"] * 3)["hps"]
    assert quality(images, ["one of its own"] * 3).tolist() == pytest.approx(best.maximum(own).tolist(), abs=1e-5)


@pytest.mark.parametrize("loop", ["claims.refl", "claims.dpo"])
def test_baselines_for_diffusion_refuse_rectified_flow_before_anything_is_written(loop, tmp_path):
    with pytest.raises(RunError, match=r"is here for diffusion only; take grpo_sd$"):
        experiment.train("grpo_flux", FAST, tmp_path, loop)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["bf16_latents", "integer_time"])
def test_a_fault_moves_the_ratio_where_the_trainer_has_1(fault, tmp_path):
    options = FAST | {"iterations": 1, "steps": 6}  # of which 1000 sigma is no integer at the second
    run = experiment.train("grpo_flux", options, tmp_path, f"claims.faults:{fault}")
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 1e-6 < row["ratio_max_deviation_first_update"] < 1


@pytest.mark.slow
def test_a_rollout_of_single_samples_is_what_its_fault_draws(tmp_path, monkeypatch):
    sizes, step = [], grpo_flux.SDE["dance"][0]

    def spy(v, z, *rest):
        if not torch.is_grad_enabled():  # in the rollout
            sizes.append(len(z))
        return step(v, z, *rest)

    monkeypatch.setitem(grpo_flux.SDE, "dance", (spy, grpo_flux.SDE["dance"][1]))
    experiment.train("grpo_flux", FAST | {"iterations": 1}, tmp_path, "claims.faults:other_batch")
    assert set(sizes) == {1} and len(sizes) % 8 == 0


@pytest.mark.slow
def test_heldout_figures_are_those_of_the_pictures_that_a_run_gets(tmp_path):
    prompts = ["a red circle", "two blue squares"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    runs = [experiment.train("grpo_flux", FAST | {"iterations": 1, "seed": seed}, tmp_path) for seed in (1, 2)]
    options = {"preset": "tiny", "prompts": str(tmp_path / "prompts.txt"), "images_per_prompt": 2, "metrics": "hps"}
    found = experiment.evaluate(runs, options, tmp_path)
    reward, captions = load_reward("hps", {"hps": "tiny/hps"}), [prompt for prompt in prompts for _ in range(2)]
    for figures, *pictures in found:
        trained, base = (
            reward(torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in paths]), captions)["hps"].mean()
            for paths in pictures
        )
        assert figures["hps"]["mean"] == pytest.approx(trained.item(), abs=1e-6)
        assert figures["hps"]["difference"] == pytest.approx((trained - base).item(), abs=1e-6)
    assert found[0][1][0].parent != found[1][1][0].parent and found[0][2] == found[1][2]  # one base for all
