"""What test_accelerator.py looks at: the same small pieces of work on the CPU and on the pretended accelerator.

`python accelerator_cases.py FOLDER` leaves FOLDER/results.json: {"cpu" or "pretend": {case: its numbers, or its
traceback}, "operations": {expression: "", or what it raised}}; what the runs saved lies in FOLDER/cpu and
FOLDER/pretend. The process keeps the accelerator, so it is one of its own.
"""

import functools
import gc
import json
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem

import conftest  # noqa: F401  finds the repository
import eval as evaluation
import pretend
import small
from rewards import load_reward
from runtime import data, output, processes
from runtime.options import command_words, parse_config

QUICK = {"iterations": 1, "group_size": 2, "steps": 2, "timestep_fraction": 1, "updates_per_rollout": 1}
QUICK |= {"num_samples": 1, "dtype": "float32"}
SCORERS = "hps=tiny/hps,clip=tiny/clip,geneval=tiny/pictures.py:Detector"
TRAININGS = {
    "sd": ("sd", {"reward": "hps,clip,geneval,tiny/pictures.py:right", "reward_paths": SCORERS, "keep_best_worst": 1}),
    "flux": ("flux", {"kl_weight": 0.1, "ema_decay": 0.5}),
    "flux-lora": ("flux", {"kl_weight": 0.1, "lora_rank": 4, "offload": True, "ema_decay": 0.5}),
    "t2v": ("t2v", {"reward": "vq,mq,tiny/clips.py:right", "sde": "cps"}),
    "i2v": ("i2v", {"offload": True, "sde": "flow", "ratio": "guard"}),
    "wan": ("wan", {"ratio": "dppo"}),
}
ONE = {"steps": 2, "images_per_prompt": 1}
REWARDS = {"hps": "tiny/hps", "clip": "tiny/clip", "pickscore": "tests/golden/hub/PickScore_v1"}


def train(name: str, folder: Path, device, **changes) -> dict:
    """The metrics of the last iteration."""
    case, own = TRAININGS[name]
    out = small.train(case, folder / name, **QUICK | own | changes)
    assert torch.backends.cuda.cudnn_sdp_enabled() == (case != "sd")  # rollout and update with one kernel
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
        num_samples=1, iterations=1, prompts_per_iteration=1, seed=0, prompts="",
    )  # fmt: skip
    pictures = data.first_frames(config, ["a red circle"])
    data.paint_first_frames(config, pictures, processes.start_world("float32"))
    return {prompt: np.mean(data.read_picture(path)).item() / 255 for prompt, path in pictures.items()}


CASES = {name: partial(train, name) for name in TRAININGS}
CASES["resume"] = partial(train, "flux-lora", iterations=2, resume=True)
EVALUATION = {"preset": "tiny", "metrics": "hps,geneval", "offload": True}
CASES["eval"] = partial(evaluate, "flux-lora", "prompts/tiny_heldout.txt", **ONE, **EVALUATION)
CASES["eval-i2v"] = partial(evaluate, "i2v", "prompts/moving_heldout.jsonl", **ONE, preset="tiny-video", metrics="mq")
CASES["images"] = partial(score, ",".join(REWARDS), REWARDS, (3, 48, 64))
CASES["videos"] = partial(score, "vq,mq,ta", {"videoalign": "tiny/videoalign"}, (5, 3, 32, 48))
CASES["first frame"] = paint

# Of `there` (2, 2) on the device and `host` (2, 2) in host memory: what a GPU refuses, and what it does not.
REFUSED = [
    "there + host", "host @ there", "torch.cat([there, host])", "there.addmm_(host, host)", "host[there.long()]",
    "there.index_put_((host.long(),), host)", "torch.nn.functional.embedding(there.long(), host)", "there.numpy()",
    "torch.randn(2, device='pretend', generator=torch.Generator())", "load_file(file, device='pretend:0')",
]  # fmt: skip
ALLOWED = [
    "there + host[0, 0]", "there[host.long()]", "there.copy_(host)", "there.cpu() + host", "host.to('pretend') + there",
    "there.to('cpu', non_blocking=True).numpy()", "there.tolist()", "torch.as_tensor([1, 2], device='pretend') + there",
]  # fmt: skip


def attempt(expression: str, folder: Path) -> str:
    """What the expression raises, "" if nothing."""
    names = {"there": torch.ones(2, 2, device=pretend.NAME), "host": torch.ones(2, 2), "torch": torch}
    names |= {"load_file": load_file, "file": folder / "one.safetensors"}
    save_file({"host": names["host"]}, names["file"])
    try:
        eval(expression, names)
    except Exception as e:
        return str(e)
    return ""


def require_device(module: torch.nn.Module, _) -> None:
    """No network may compute in host memory, which would go unnoticed otherwise: pipelines move their inputs."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and pretend.Module.present and weight.device.type == "cpu":
        raise RuntimeError(f"a {type(module).__name__} computes on the CPU")


def main(folder: Path) -> None:
    output.Metrics.draw = lambda self: None  # curves take as long as the run
    processes.compute_dtype = lambda *_: torch.float32  # eval.py has no --dtype
    open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)
    gc.disable()  # and see gc.freeze() below
    torch.nn.modules.module.register_module_forward_pre_hook(require_device)
    filesystem._OverlappingCpuLoader = None  # it would keep the state in pinned memory
    pretend.start()
    results = {"cpu": {}, "pretend": {}}
    for place, numbers in list(results.items()):
        pretend.Module.present = place == "pretend"
        for name, case in CASES.items():
            gc.freeze()  # or every gc.collect() looks through all that torch imported
            try:
                numbers[name] = case(folder / place, torch.device(place))
            except Exception:
                numbers[name] = traceback.format_exc()
    results["operations"] = {expression: attempt(expression, folder) for expression in REFUSED + ALLOWED}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
