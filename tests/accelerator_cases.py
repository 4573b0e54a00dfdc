"""What test_accelerator.py compares: the same small pieces of work on the CPU and on the pretended accelerator.

`python accelerator_cases.py FOLDER` leaves FOLDER/results.json: {"cpu" or "pretend": {case: its numbers, or what it
raised}}, and what the runs saved in FOLDER/cpu and FOLDER/pretend.
"""

import json
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import conftest  # noqa: F401  finds the repository
import eval as evaluation
import pretend
import small
from rewards import load_reward
from runtime import data, output, processes
from runtime.options import command_words, parse_config

QUICK = {"iterations": 1, "group_size": 2, "steps": 2, "timestep_fraction": 1, "updates_per_rollout": 1}
QUICK |= {"num_samples": 1, "dtype": "float32"}
TRAININGS = {
    "sd": ("sd", {"reward": "hps,clip"}),
    "flux": ("flux", {"kl_weight": 0.1, "ema_decay": 0.5}),
    "flux-lora": ("flux", {"kl_weight": 0.1, "lora_rank": 4, "offload": True, "ema_decay": 0.5}),
    "t2v": ("t2v", {"reward": "vq,mq"}),
    "i2v": ("i2v", {"offload": True}),
    "wan": ("wan", {}),
}
REWARDS = {"hps": "tiny/hps", "clip": "tiny/clip", "pickscore": "tests/golden/hub/PickScore_v1"}


def train(name: str, folder: Path, device, **changes) -> dict:
    """The metrics of the last iteration."""
    case, own = TRAININGS[name]
    out = small.train(case, folder / name, **QUICK | own | changes)
    row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {key: value for key, value in row.items() if "second" not in key}


def evaluate(run: str, prompts: str, folder: Path, device, **options) -> dict:
    """The mean of every metric, of a run here and of its base."""
    file = folder / Path(prompts).name
    lines = Path(prompts).read_text().splitlines()[:2]
    file.write_text("\n".join(lines).replace("moving/", f"{Path('prompts/moving').absolute()}/"))
    options |= {"checkpoint": folder / run / "checkpoint-000001", "output_dir": folder / f"eval-{run}", "prompts": file}
    evaluation.main(parse_config(evaluation.Config, evaluation.PRESETS, command_words(options)))
    summary = json.loads((options["output_dir"] / "results.json").read_text())["summary"]
    return {f"{metric} of {m}": row["overall"]["mean"] for metric in summary for m, row in summary[metric].items()}


def score(spec: str, paths: dict, shape: tuple, folder: Path, device) -> dict:
    """What rewards make of noise that lies on the device, as in training, and in host memory, as in an evaluation."""
    reward, scores = load_reward(spec, paths, device), {}
    noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    for place, samples in {"device": noise.to(device), "host": noise}.items():
        for name, values in reward(samples, ["a red circle", "a cross"], 8.0).items():
            scores |= {f"{name} {i}, {place}": value for i, value in enumerate(values.tolist())}
    return scores


def paint(folder: Path, device) -> dict:
    """The mean of a first frame that a text-to-image model paints."""
    config = SimpleNamespace(
        first_frames=str(folder / "frames"), first_frame_model="tiny/sd", first_frame_steps=1, height=64, width=64,
        num_samples=1, iterations=1, prompts_per_iteration=1, seed=0,
    )  # fmt: skip
    pictures = data.first_frames(config, ["a red circle"])
    data.paint_first_frames(config, pictures, processes.start_world("float32"))
    return {prompt: data.read_picture(path).mean().item() / 255 for prompt, path in pictures.items()}


CASES = {name: partial(train, name) for name in TRAININGS}
CASES["resume"] = partial(train, "flux-lora", iterations=2, resume=True)
CASES["eval"] = partial(evaluate, "flux-lora", "prompts/tiny_heldout.txt", preset="tiny", steps=2, images_per_prompt=1)
CASES["eval-i2v"] = partial(
    evaluate, "i2v", "prompts/moving_heldout.jsonl", preset="tiny-video", metrics="mq", steps=2, images_per_prompt=1
)
CASES["images"] = partial(score, ",".join(REWARDS), REWARDS, (3, 48, 64))
CASES["videos"] = partial(score, "vq,mq,ta", {"videoalign": "tiny/videoalign"}, (5, 3, 32, 48))
CASES["first frame"] = paint


def main(folder: Path) -> None:
    output.Metrics.draw = lambda self: None  # curves take as long as the run
    processes.compute_dtype = lambda *_: torch.float32  # eval.py has no --dtype
    pretend.start()
    results = {"cpu": {}, "pretend": {}}
    for place, numbers in results.items():
        pretend.Module.present = place == "pretend"
        for name, case in CASES.items():
            import time; t=time.process_time()
            try:
                numbers[name] = case(folder / place, torch.device(place))
            except Exception:
                numbers[name] = traceback.format_exc()
            print(place, name, "TIME", time.process_time()-t)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
