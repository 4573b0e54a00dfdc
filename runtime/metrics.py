"""metrics.jsonl, a line per iteration, and reward.png, its curves."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import write_atomically, writing
from .processes import World


def statistics(rewards: dict, weights: dict, A: Tensor, group_size: int, ratios: list, kls: list, clip_range, gather):
    """The metrics of an iteration, over all processes, whose values `gather` puts side by side.

    rewards {name: (B,)}, advantages A (B,); ratios, kls: for each update rho and the step's KL (M,) of its
    micro-batches.
    """
    rewards, A = {name: gather(r) for name, r in rewards.items()}, gather(A)
    total = sum(weights[name] * r for name, r in rewards.items())
    excess = [gather(torch.cat(rhos)).cpu().double() - 1 for rhos in ratios]
    of_all, kl = torch.cat(excess), torch.cat([gather(torch.cat(parts)) for parts in kls])
    return {
        "reward_mean": total.mean().item(),
        "reward_std": total.view(-1, group_size).std(1).mean().item(),  # the spread within a group
        **{f"reward_{name}": r.mean().item() for name, r in rewards.items()},
        "advantage_abs": A.abs().mean().item(),
        "zero_variance_groups": int((A.view(-1, group_size) == 0).all(1).sum()),  # these give no gradient
        "ratio_mean": 1 + of_all.mean().item(),
        "ratio_max_deviation_first_update": excess[0].abs().max().item(),  # 0, unless the update replays another policy
        "clip_fraction": (of_all.abs() > clip_range).double().mean().item(),  # outside the range, on either side
        "kl": kl.mean().item(),  # of the steps' Gaussians, old against new
    }


class Metrics:
    """metrics.jsonl, a line per iteration, and reward.png, its curves. On rank 0; elsewhere it does nothing.

    A resumed run takes the lines of its checkpoint: later ones belong to iterations that are run again.
    """

    def __init__(self, output_dir: str, world: World, checkpoint: Path | None):
        self.path, self.world = Path(output_dir) / "metrics.jsonl", world
        self.rows, self.before = [], {}
        if world.is_main and (checkpoint or self.path.exists()):  # resumed: what came after the checkpoint is run again
            lines = (checkpoint / "state" / "metrics.jsonl").read_text(encoding="utf-8") if checkpoint else ""
            self.rows = [json.loads(line) for line in lines.splitlines()]
            write_atomically(self.path, lines)

    def start(self, scores: dict[str, float]) -> None:
        """The scores of the sample pictures before training; the first line holds them as NAME_before."""
        self.before = {f"{name}_before": score for name, score in scores.items()}

    def write(self, row: dict) -> None:
        """Add an iteration's line."""
        if not self.world.is_main:
            return
        row, self.before = row | self.before, {}
        self.rows.append(row)
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def gain(self) -> str:
        """What the sample pictures' scores were before training and are now, and where to look."""
        last = self.rows[-1] if self.rows else {}
        names = [key for key in last if key.startswith("sample_reward_") and not key.endswith("_before")]
        scores = [f"{key} {y[0]:.3f} → {y[-1]:.3f}" for key in names for _, y in [curve(self.rows, key)]]
        places = f"see {self.path.with_name('samples')} and {self.path.with_name('reward.png')}"
        return "; ".join(filter(None, (", ".join(scores), places)))

    def draw(self) -> None:
        """Redraw reward.png."""
        if not self.rows:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        sampled = {key for row in self.rows for key in row if key.startswith("sample_reward_")}
        names = [key for key in self.rows[-1] if key.startswith("reward_") and key not in ("reward_mean", "reward_std")]
        panels = {
            "reward": names,
            "spread of rewards": ["reward_std"],
            "ratios outside the clip range": ["clip_fraction"],
            "gradient norm": ["grad_norm"],
        }
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
        for axis, (title, keys) in zip(axes.flat, panels.items(), strict=True):
            for key in keys:
                steps, values = curve(self.rows, key)
                (line,) = axis.plot(steps, values, alpha=0.3)
                last_ten = [values[max(0, i - 9) : i + 1].mean() for i in range(len(values))]
                axis.plot(steps, last_ten, color=line.get_color(), label=f"{key}, mean of 10")
                if f"sample_{key}" in sampled:
                    steps, values = curve(self.rows, f"sample_{key}")
                    axis.plot(steps, values, "o-", color=line.get_color(), linewidth=3, label=f"sample_{key}")
            axis.set(title=title, xlabel="iteration")
            axis.legend()
            axis.grid(alpha=0.3)
        write_atomically(self.path.with_name("reward.png"), partial(figure.savefig, dpi=110))
        plt.close(figure)


def curve(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of a key in lines of metrics; scores of sample pictures begin before training, at 0."""
    points = [(row["iteration"], row[key]) for row in rows if key in row]
    if f"{key}_before" in rows[0]:
        points.insert(0, (0, rows[0][f"{key}_before"]))
    x, y = zip(*points, strict=True)
    return np.array(x), np.array(y)
