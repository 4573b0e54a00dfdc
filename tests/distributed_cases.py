"""What test_distributed.py compares: the same small trainings on one process and on several.

`main`, started on each process, writes FOLDER/results.pt on rank 0: {name of the case: its results}.
"""

import dataclasses
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import FluxTransformer2DModel, HunyuanVideoTransformer3DModel, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from runtime import loading, processes
from runtime.checkpoints import Checkpoints, newest_whole_checkpoint
from runtime.options import latest_checkpoint

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
NETWORKS = {"flux": (FluxTransformer2DModel, "tiny/flux"), "hunyuan": (HunyuanVideoTransformer3DModel, "tiny/hunyuan")}
NETWORKS["wan"] = WanTransformer3DModel, "tiny/wan"  # diffusers would keep its norms in float32
SAMPLES, MICRO_BATCH = 8, 2
# name: (network, compute dtype, LoRA rank, --quantize); each also with every sharding that the processes allow
TRAININGS = {
    "full": ("flux", torch.float32, 0, ""),
    "full-bfloat16": ("hunyuan", torch.bfloat16, 0, ""),
    "lora-bfloat16": ("hunyuan", torch.bfloat16, 4, ""),
    "lora-bfloat16-wan": ("wan", torch.bfloat16, 4, ""),
    "lora-int8": ("flux", torch.bfloat16, 4, "int8"),
    "lora-nf4": ("flux", torch.bfloat16, 4, "nf4"),
}


class Table(ModelMixin, ConfigMixin):
    """A network with buffers of both kinds, as rotary tables are: in the state dict, and not."""

    @register_to_config
    def __init__(self, width: int = 4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("kept", torch.arange(width).float())
        self.register_buffer("computed", torch.arange(width).float().cos(), persistent=False)


def predict(network: nn.Module, world: processes.World, samples: list[int]) -> torch.Tensor:
    """One prediction of each of the samples, whose inputs are functions of their numbers; (B, d) float32."""

    def draw(*shape):
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in samples])

    sigma = torch.tensor([0.98684 - 0.1 * i for i in samples])
    with torch.autocast("cpu", world.dtype, enabled=world.dtype != torch.float32):
        if isinstance(network, FluxTransformer2DModel):
            out = network(
                draw(16, 16), draw(5, 64), draw(64), timestep=sigma, guidance=torch.full_like(sigma, 3.5),
                img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
                txt_ids=torch.zeros(5, 3), return_dict=False,
            )  # fmt: skip
        elif isinstance(network, WanTransformer3DModel):
            out = network(draw(16, 2, 4, 4), 1000 * sigma, draw(5, 64), return_dict=False)
        else:
            out = network(
                draw(16, 2, 4, 4), 1000 * sigma, draw(5, 64), torch.ones(len(samples), 5), draw(64),
                guidance=torch.full_like(sigma, 6000.0), return_dict=False,
            )  # fmt: skip
    return out[0].float().flatten(1)


def train(world: processes.World, name: str, iterations: int = 3, folder: str = "") -> dict:
    """A few updates on all the samples, each process on its share → predictions before, norms, weights after.

    With a folder the end is saved there as checkpoint-000003, unless one is there: then it is the start.
    """
    family, dtype, lora_rank, quantized = TRAININGS[name]
    world = dataclasses.replace(world, dtype=dtype)
    network_class, path = NETWORKS[family]
    network = loading.load_network(
        network_class,
        path,
        world,
        subfolder="transformer",
        lora_rank=lora_rank,
        lora_targets=TARGETS,
        checkpointing=True,
        quantized=quantized,
    )
    optimizer = torch.optim.AdamW(processes.trainable(network), lr=1e-3, eps=1e-3)
    pipe, ema = SimpleNamespace(transformer=network), processes.EMA(network, 0.5)
    checkpoints = Checkpoints(pipe, "transformer", optimizer, ema, world)
    resumed = bool(folder) and latest_checkpoint(folder) is not None
    if resumed:
        checkpoints.restore(newest_whole_checkpoint(Path(folder), world, {}))
    share = SAMPLES // world.size
    mine = list(range(world.rank * share, (world.rank + 1) * share))
    with torch.no_grad():
        before = torch.cat([predict(network, world, mine[i : i + MICRO_BATCH]) for i in range(0, share, MICRO_BATCH)])
    norms = []
    for iteration in range(iterations):
        optimizer.zero_grad()
        for start in range(0, share, MICRO_BATCH):
            processes.sync_gradients(network, now=start + MICRO_BATCH == share)
            out = predict(network, world, mine[start : start + MICRO_BATCH])
            ((out**2).mean() * MICRO_BATCH / share).backward()
            held = [p.grad for p in processes.trainable(network) if p.grad is not None]
        processes.average_gradients(network)
        norm = torch.nn.utils.clip_grad_norm_(processes.trainable(network), 1.0)
        norms.append(processes.finite_norm(norm, iteration))
        optimizer.step()
        ema.update()
    if folder and not resumed:
        checkpoints.save(folder, iterations)
    return {
        "predictions": world.gather(before),
        "norms": norms,
        "weights": gathered(network),
        "elements": sum(p.numel() for p in processes.trainable(network)),
        "gradient_elements": sum((g.to_local() if isinstance(g, DTensor) else g).numel() for g in held),
    }


def gathered(network: nn.Module) -> dict:
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in network.state_dict().items()}


def load(world: processes.World, path: str) -> dict:
    network = loading.load_network(Table, path, world)
    weight = network.linear.weight
    weight = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
    # What another process has, seen on rank 0
    last = slice(-len(network.kept), None)
    return {name: world.gather(x)[last] for name, x in (("kept", network.kept), ("computed", network.computed))} | {
        "weight": weight
    }


def main(folder: str) -> None:
    size, results = int(os.environ["WORLD_SIZE"]), {}
    first = processes.start_world(shard_size=1)
    for shard_size in [n for n in (1, 2, 4) if size % n == 0]:
        mesh = processes.shard_mesh("cpu", size, shard_size)
        world = dataclasses.replace(first, shard_size=shard_size, mesh=mesh)
        for name in TRAININGS:
            results[name, shard_size] = train(world, name)
        results["saved", shard_size] = train(world, "full", folder=str(Path(folder, f"saved-{shard_size}")))
        init = Path(folder, f"saved-{shard_size}", "checkpoint-000003", "transformer")
        results["init", shard_size] = gathered(
            loading.load_network(*NETWORKS["flux"], world, subfolder="transformer", init=init)
        )
        results["load", shard_size] = load(world, str(Path(folder, "table")))
    for shard_size in [n for n in (1, 2, 4) if size % n == 0]:  # saved by copies of one kind, continued by the others
        world = dataclasses.replace(first, shard_size=shard_size, mesh=processes.shard_mesh("cpu", size, shard_size))
        results["continued", shard_size] = train(world, "full", folder=str(Path(folder, f"saved-{size // shard_size}")))
    if world.is_main:
        torch.save(results, Path(folder, "results.pt"))
    torch.distributed.destroy_process_group()
