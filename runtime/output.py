"""A run: its setup in one call, what surrounds its iterations, and what it writes beside checkpoints."""

import dataclasses
import gc
import json
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from rewards import fetch_rewards, load_reward, parse_paths

from .card import write_card
from .checkpoints import Checkpoints, Folder, check_folder, name_of, open_folder
from .data import keyed_noise, load_metadata
from .files import write_atomically
from .loading import fetch_model
from .memory import require_fit
from .metrics import Metrics
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

    Fetch models, join the processes, take the folder, load the reward and the models, resume. component: the trained
    network's name in the pipeline; fits_whole: whether a GPU holds it, see `processes.choose_shard_size`;
    lora_targets: the layers that get a LoRA; before_loading: called with the world before models are loaded.
    """
    check_folder(config)  # before gigabytes are fetched
    # Before the process group exists: the processes of a machine wait for the first one for as long as it takes.
    fetch_model(config.model, getattr(config, "transformer", ""))
    fetch_rewards(config.reward, parse_paths(config.reward_paths))
    world = start_world(config.dtype, config.shard_size, config.offload, fits_whole)
    # On an H100 cuDNN takes the UNet's heads of 160 only without gradients; rollout and update must round alike.
    torch.backends.cuda.enable_cudnn_sdp(component != "unet")
    require_fit(config, world, component, lora_targets)
    folder = open_folder(config, world, prompts)
    tracker = Tracker(config.track if world.is_main else "", folder.config, folder.checkpoint)
    before_loading(world)
    metadata = load_metadata(config.prompts)
    with world.in_turn():
        reward = load_reward(config.reward, config.reward_paths, str(world.device), metadata, config.reward_batch)
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
        self.preempted, self.flat = Preemption(world), 0
        # Before an iteration's first optimizer step, the weights are those after `done` iterations: the run may end.
        self.saved, self.row, self.intact = self.done, {}, True
        self.optimizer.register_step_pre_hook(self._before_step)
        self.world = dataclasses.replace(world, poll=self.poll)

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
                self.seconds, self.last = {}, time.perf_counter()
                yield iteration
            if self.world.is_main:
                print(self.metrics.gain())
                checkpoint = str(Path(self.config.output_dir, name_of(max(self.done, self.config.iterations))))
                command = shlex.join(["python", "eval.py", "--checkpoint", checkpoint])
                is_local = Path(self.config.prompts).expanduser().is_file()
                if getattr(self.config, "frames", 1) > 1 and (self.config.first_frames or not is_local):
                    command += " --prompts FILE"
                print(
                    f"{checkpoint} is saved; its README.md says how to load it; evaluate it with {command}", flush=True
                )
        finally:
            self.tracker.close()
            self.preempted.restore()

    def lap(self, part: str) -> None:
        """The time since the last lap, or since the iteration began, was spent in `part`. Waits for the device."""
        if self.world.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now
        self.poll()

    def times(self, samples: int) -> dict[str, float]:
        """Seconds in all and of each part, and samples per second; `samples` is the number of this process."""
        total = sum(self.seconds.values())
        parts = {f"seconds_{part}": seconds for part, seconds in self.seconds.items()}
        return {"seconds": total} | parts | {"samples_per_second": samples * self.world.size / total}

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
        raise SystemExit(130 if self.preempted.received == signal.SIGINT else 0)  # 130: the shells' for Ctrl-C

    def _before_step(self, *_) -> None:
        self.poll()
        self.intact = False

    def save(self) -> None:
        """Redraw the curves, and save a checkpoint of the iterations that are done."""
        self.metrics.draw()
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
        row = row | {"learning_rate": c.learning_rate} | self.times(samples)
        drawn = done in (2, 5, c.iterations) or done % c.sample_every == 0  # much is gained at the beginning
        row = row | (self.samples.save(done) if drawn else {})
        self.metrics.write({"iteration": done} | row)
        self.tracker.log(done, row, self.samples.sheet(done) if drawn else None)
        self.bar.set_postfix_str(f"reward {row['reward_mean']:.4f}")
        self.check_spread(row["zero_variance_groups"] == c.prompts_per_iteration)
        self.done, self.row, self.intact = done, row, True
        self.poll()
        if done == c.iterations or done % c.save_every == 0:
            self.save()
        elif drawn:
            self.metrics.draw()

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


class Samples:
    """Sample pictures or videos: same prompts, same initial noise, the ODE. Their scores are the curve to watch.

    draw   (prompts, initial noise (b, *shape)) → images (b, 3, H, W) or videos (b, F, 3, H, W) in [0, 1]
    reward is that of the training. fps: frames per second, of videos.
    """

    SHOWN = 8  # are saved; all are scored

    def __init__(self, config, world: World, prompts: list[str], draw, shape: Sequence[int], reward, fps=None):
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
            scores = self.reward(images.squeeze(1), [self.prompts[i] for i in mine], self.fps)
        shown = (images[: -(-self.SHOWN // self.world.size)] * 255).round().byte().cpu()  # of all: too much for a GPU
        shown = self.world.collect(shown, min(count, self.SHOWN)) / 255
        if self.world.is_main:
            save = save_pictures if self.fps is None else partial(save_videos, fps=self.fps)
            save(self.sheet(iteration), shown, self.prompts[: len(shown)])
        return {f"sample_reward_{name}": self.world.collect(r, count).mean().item() for name, r in scores.items()}
