"""A run: its setup in one call, what surrounds its iterations, and what it writes beside checkpoints."""

import dataclasses
import gc
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rewards import load_reward

from .card import write_card
from .checkpoints import Checkpoints, Folder, check_folder, name_of, open_folder
from .data import PromptCache, keyed_noise, load_metadata
from .files import write_atomically, writing
from .loading import fetch_all
from .memory import require_fit
from .pictures import save_pictures, save_videos
from .processes import EMA, Preemption, World, adamw, start_world, trainable
from .tracking import Tracker


def start(
    config,
    prompts: list[str],
    load_models: Callable,
    component: str,
    fits_whole: bool,
    lora_targets: Sequence[str],
    before_loading: Callable[[World], None] = lambda world: None,
) -> "Run":
    """Everything that comes before the first iteration. Raises RunError, before anything is written.

    Fetch models, join the processes, take the folder, load the reward and the models, resume.
    prompts         checked ones, of which the first are drawn as sample pictures
    load_models     the trainer's own
    component       the trained network's name in the pipeline
    fits_whole      whether a GPU holds the whole network, see `processes.choose_shard_size`
    lora_targets    the layers that get a LoRA, with --lora-rank
    before_loading  called with the world before models are loaded
    """
    check_folder(config)  # before gigabytes are fetched
    fetch_all(config)
    world = start_world(config.dtype, config.shard_size, config.offload, fits_whole)
    require_fit(config, world, component, lora_targets)
    folder = open_folder(config, world, prompts)
    tracker = Tracker(config.track if world.is_main else "", folder.config, folder.checkpoint)
    before_loading(world)
    metadata = load_metadata(config.prompts)
    with world.in_turn():
        reward = load_reward(config.reward, config.reward_paths, world.device, metadata, config.reward_batch)
        world.freeze(*reward.models)
    return Run(config, world, folder, prompts, reward, load_models(config, world, folder.init), component, tracker)


class Run:
    """What surrounds the algorithm: resuming, and drawing, writing and saving when it is time.

    world, reward, pipe, network (the trained one), reference (the KL term's) and optimizer are what a trainer needs.
    """

    def __init__(self, config, world: World, folder: Folder, prompts, reward, models: tuple, component: str, tracker):
        self.config, self.world, self.prompts, self.reward, self.tracker = config, world, prompts, reward, tracker
        self.pipe, self.network, self.reference = models
        self.optimizer = adamw(self.network, config.learning_rate)
        self.ema = EMA(self.network, config.ema_decay)
        self.checkpoints = Checkpoints(self.pipe, component, self.optimizer, self.ema, world, config.keep_states)
        self.done = self.checkpoints.restore(folder.checkpoint) if folder.checkpoint else 0
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate  # it may have been changed on --resume
        if world.is_main:
            self.checkpoints.check_room(config, self.done)
            write_atomically(Path(config.output_dir, "config.json"), json.dumps(folder.config, indent=2) + "\n")
        self.metrics = Metrics(config.output_dir, world, folder.checkpoint)
        self.preempted, self.flat, self.stopwatch = Preemption(world), 0, Stopwatch(world)
        # The weights are those after `done` iterations until the next one's first optimizer step: till then it may end.
        self.saved, self.row, self.intact = self.done, {}, True
        self.optimizer.register_step_pre_hook(self._before_step)
        self.world = dataclasses.replace(world, poll=self.poll)

    def cached(self, encode: Callable, *encoders) -> PromptCache:
        """`encode`, a function of a list of prompts, that encodes each prompt once; encoders: the networks it uses."""
        return PromptCache(encode, self.world, self.network, *encoders)

    def iterations(self, draw: Callable, shape: Sequence[int], fps: float | None = None) -> Iterator[int]:
        """The iterations that are still to do, under a progress bar. `finish` must be called at the end of each.

        draw, shape, fps: of the sample pictures, see `Samples`.
        """
        self.samples = Samples(self.config, self.world, self.prompts, draw, shape, self.reward, fps)
        options = {"initial": self.done, "total": self.config.iterations, "desc": "GRPO"}
        if self.world.is_main:
            print(start_line(self.config, self.checkpoints, self.done), flush=True)
        try:
            if not self.done:
                scores = self.samples.save(0)
                self.metrics.start(scores)
                self.tracker.log(0, scores, self.samples.sheet(0))
            self.bar = self.world.progress(range(self.done, self.config.iterations), **options)
            for iteration in self.bar:
                self.stopwatch.reset()
                yield iteration
            if self.world.is_main:
                print(self.metrics.gain(), flush=True)
                print(end_line(self.config, self.checkpoints, max(self.done, self.config.iterations)), flush=True)
        finally:
            self.tracker.close()
            self.preempted.restore()

    def lap(self, part: str) -> None:
        """The time since the last lap, or since the iteration began, was spent in `part`."""
        self.stopwatch.lap(part)
        self.poll()

    def poll(self) -> None:
        """End the run if a signal asks for it, unless this iteration has changed a weight. A collective.

        What was begun is dropped: the resumed run does it again.
        """
        c = self.config
        if not self.intact or self.done >= c.iterations or not self.preempted():
            return
        if self.saved < self.done:
            self.save()
        if self.world.is_main:
            self.metrics.path.touch()  # by which --resume knows a run, also before its first iteration is done
            tqdm.write(f"stopped after iteration {self.done}; continue with --output-dir {c.output_dir} --resume")
        if self.world.size > 1:
            torch.distributed.destroy_process_group()
        gc.freeze()  # else Python's end takes a second or two: it looks for garbage among all that is loaded
        raise SystemExit(self.preempted.exit_code)

    def _before_step(self, *_) -> None:
        self.poll()
        self.intact = False

    def save(self) -> None:
        """Save a checkpoint of the iterations that are done."""
        of_run = {"config": self.config, "checkpoints": self.checkpoints, "iteration": self.done, "row": self.row}
        self.checkpoints.save(self.config.output_dir, self.done, partial(write_card, **of_run))
        self.saved = self.done

    def finish(self, iteration: int, row: dict, samples: int) -> None:
        """Update the EMA, write the line of metrics; draw sample pictures and save a checkpoint if it is time.

        samples: how many this process drew in this iteration.
        """
        self.ema.update()
        self.lap("update")
        done, c = iteration + 1, self.config
        self.checkpoints.require_finite(done)  # before pictures are drawn with such weights
        row = row | {"learning_rate": c.learning_rate} | self.stopwatch.metrics(samples)
        drawn = done in (2, 5, c.iterations) or done % c.sample_every == 0  # much is gained at the beginning
        row = row | (self.samples.save(done) if drawn else {})
        self.metrics.write({"iteration": done} | row)
        self.tracker.log(done, row, self.samples.sheet(done) if drawn else None)
        self.bar.set_postfix_str(f"reward {row['reward_mean']:.4f}")
        self.check_spread(row["zero_variance_groups"] == c.prompts_per_iteration)
        self.done, self.row, self.intact = done, row, True
        self.poll()
        if done == c.iterations or done % c.save_every == 0:
            self.metrics.draw()
            self.save()

    def check_spread(self, flat: bool) -> None:
        """Say so when no group has had any spread of rewards for ten iterations: then nothing is learned."""
        self.flat = self.flat + 1 if flat else 0
        if self.flat == 10 and self.world.is_main:
            what = "in ten iterations all rewards of every group were equal, so nothing is learned"
            self.bar.write(f"warning: {what}; see samples/, raise --eta or --group-size, or change the threshold")


def start_line(config, checkpoints: Checkpoints, done: int) -> str:
    """What is trained, on what, where the run is, and how to watch it."""
    count, world = sum(weight.numel() for weight in trainable(checkpoints.network)) / 1e6, checkpoints.world
    what = f"LoRA of rank {config.lora_rank}" if checkpoints.is_lora else "all weights"
    todo = f"iterations {done + 1} to {config.iterations}" + f", after {name_of(done)}" * bool(done)
    if done >= config.iterations:
        todo = f"all {done} iterations are done; raise --iterations to go on"
    model = getattr(config, "transformer", "") or config.model
    where = f"{world.device.type}, {str(world.dtype).removeprefix('torch.')}, processes: {world.size}"
    where += f", {world.shard_size} of them share a copy of the network" * (world.shard_size > 1)
    return (
        f"{model}, {checkpoints.component}: {what}, {count:.3g} million; on {where}; reward {config.reward}; {todo}; "
        f"in {config.output_dir}: reward.png and samples/ show how it goes, metrics.jsonl has the numbers"
    )


def end_line(config, checkpoints: Checkpoints, done: int) -> str:
    """How to evaluate the last checkpoint, and how to load it."""
    checkpoint = str(Path(config.output_dir, name_of(done)))
    kind, part = type(checkpoints.network).__name__, checkpoints.component
    load = f"diffusers.{kind}.from_pretrained({checkpoint!r}, subfolder={part!r})"
    load = f"pipeline.load_lora_weights({checkpoint!r})" if checkpoints.is_lora else load
    command = shlex.join(["python", "eval.py", "--checkpoint", checkpoint])
    return f"{checkpoint} is saved; to evaluate it: {command}; to load it: {load}"


class Stopwatch:
    """Seconds spent in each part of an iteration; waits for the device so that they are true on a GPU."""

    def __init__(self, world: World):
        self.world = world
        self.reset()

    def reset(self) -> None:
        self.seconds, self.last = {}, time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last lap to `part`."""
        if self.world.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def metrics(self, samples: int) -> dict[str, float]:
        """Seconds in all and of each part, and samples per second; `samples` is the number of this process."""
        total = sum(self.seconds.values())
        parts = {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}
        return {"seconds": total} | parts | {"samples_per_second": samples * self.world.size / total}


# ------------------------------------------------------------------------------------------- metrics, samples, curves


class Metrics:
    """metrics.jsonl, a line per iteration, and reward.png, its curves. On rank 0; elsewhere it does nothing.

    A resumed run takes the lines of its checkpoint: later ones belong to iterations that are run again.
    """

    REDRAW_SECONDS = 20.0

    def __init__(self, output_dir: str, world: World, checkpoint: Path | None):
        self.path, self.world, self.drawn = Path(output_dir) / "metrics.jsonl", world, time.monotonic()
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
        if time.monotonic() - self.drawn > self.REDRAW_SECONDS:
            self.draw()
            self.drawn = time.monotonic()

    def gain(self) -> str:
        """What the sample pictures' scores were before training and are now, and where to look."""
        last = self.rows[-1] if self.rows else {}
        names = [key for key in last if key.startswith("sample_reward_") and not key.endswith("_before")]
        scores = [f"{key} {y[0]:.3f} → {y[-1]:.3f}" for key in names for _, y in [curve(self.rows, key)]]
        return f"{', '.join(scores)}; see {self.path.with_name('samples')} and {self.path.with_name('reward.png')}"

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


class Samples:
    """Sample pictures or videos: same prompts, same initial noise, the ODE. Their scores are the curve to watch.

    draw   (prompts, initial noise (b, *shape)) → images (b, 3, H, W) or videos (b, F, 3, H, W) in [0, 1]
    reward is that of the training. fps: frames per second, of videos.
    """

    SHOWN = 8  # are saved; all are scored

    def __init__(self, config, world: World, prompts: list[str], draw: Callable, shape: tuple, reward, fps=None):
        self.folder, self.seed, self.micro_batch = Path(config.output_dir, "samples"), config.seed, config.micro_batch
        self.prompts, self.draw, self.shape, self.reward = prompts[: config.num_samples], draw, shape, reward
        self.world, self.fps = world, fps

    def sheet(self, iteration: int) -> Path:
        """The file of the pictures that are drawn after so many iterations; a film lies beside it, as .mp4."""
        return self.folder / f"{iteration:06d}.png"

    @torch.no_grad()
    def save(self, iteration: int) -> dict[str, float]:
        """Draw all, shared out over the processes, and save the first. Returns {"sample_reward_NAME": mean score}."""
        mine, count, images = self.world.share(len(self.prompts)), len(self.prompts), []
        for part in self.world.chunks(mine, self.micro_batch, "sample pictures"):
            z = keyed_noise(self.shape, [(self.seed, i) for i in part], "sample pictures", self.world.device)
            images.append(self.draw([self.prompts[i] for i in part], z))
        images = torch.cat(images)
        with self.world.on_device(*self.reward.models):
            scores = self.reward(images, [self.prompts[i] for i in mine], self.fps)
        shown = self.world.collect(images[: self.SHOWN], min(count, self.SHOWN))
        if self.world.is_main:
            captions, path = self.prompts[: len(shown)], self.sheet(iteration)
            if self.fps is None:
                save_pictures(path, shown, captions)
            else:
                save_videos(path, shown, captions, self.fps)
        return {f"sample_reward_{name}": self.world.collect(r, count).mean().item() for name, r in scores.items()}
