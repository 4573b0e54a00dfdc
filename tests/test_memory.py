"""A training that cannot fit its GPUs is refused before anything is loaded, and one that can never is."""

import dataclasses
from functools import partial

import pytest
import torch
from diffusers import FluxTransformer2DModel

import grpo_flux
import small
from runtime import loading, memory, processes
from runtime.options import RunError


def config(**changes):
    return small.config("flux", prompts_per_iteration=8, output_dir="nowhere", **changes)


def bytes_of(copies, ema_decay=0.0, lora_rank=0, kl_weight=0.0, quantize="", dtype=torch.float32):
    """Of the first of so many parts of tiny/flux, by what torch allocates."""
    world = processes.World(0, 1, torch.device("cpu"), dtype)
    options = {"lora_rank": lora_rank, "lora_targets": grpo_flux.LORA_TARGETS, "subfolder": "transformer"}
    network = loading.load_network(FluxTransformer2DModel, "tiny/flux", world, **options, quantized=quantize)
    parts = [torch.nn.Parameter(p.detach().chunk(copies)[0].clone(), p.requires_grad) for p in network.parameters()]
    trained = [p for p in parts if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    held = [
        *parts,
        *network.buffers(),
        *(p.grad for p in trained),
        *(x for state in optimizer.state.values() for x in state.values()),
    ]
    held += [p.clone() for p in trained] if ema_decay else []
    held += [p.to(dtype) for p in parts] if kl_weight else []
    return sum(x.nbytes for x in held)


CASES = [
    (1, {}),
    (1, {"ema_decay": 0.5}),
    (1, {"kl_weight": 0.1}),
    (4, {"ema_decay": 0.5, "kl_weight": 0.1}),
    (1, {"lora_rank": 4, "ema_decay": 0.5}),
    (1, {"lora_rank": 4, "quantize": "int8"}),
    (3, {"lora_rank": 4}),  # 3 divides no dimension
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size, changes", CASES)
def test_what_fits_to_the_byte_passes_and_one_byte_less_is_refused(monkeypatch, shard_size, changes, dtype):
    world = processes.World(0, shard_size, torch.device("cpu"), dtype, shard_size)
    arguments = config(**changes), world, "transformer", grpo_flux.LORA_TARGETS
    exact = bytes_of(shard_size, dtype=dtype, **changes)
    monkeypatch.setattr(memory, "gpu_memory", lambda device: exact)
    memory.require_fit(*arguments)
    monkeypatch.setattr(memory, "gpu_memory", lambda device: exact - 1)
    with pytest.raises(RunError, match=r"^tiny/flux: weights, gradients, AdamW's moments and EMA take 0\.0 GiB of"):
        memory.require_fit(*arguments)


def test_it_is_said_how_many_processes_or_which_preset_would_do(monkeypatch):
    world = processes.World(0, 1, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setitem(grpo_flux.PRESETS, "small-lora", {"model": "tiny/flux", "lora_rank": 4})

    def advice(limit, **changes):
        monkeypatch.setattr(memory, "gpu_memory", lambda device: limit)
        with pytest.raises(RunError) as error:
            memory.require_fit(config(**changes), world, "transformer", grpo_flux.LORA_TARGETS)
        return str(error.value).split("; ", 1)[1]

    processes_of, lora = "start {0} processes or a multiple of {0}, with --shard-size {0}", "train a LoRA: "
    assert advice(bytes_of(2)) == f"{processes_of.format(2)}, or {lora}--preset small-lora"
    three_too_few = bytes_of(2) - 1  # 3 do not divide the 8 prompts
    assert advice(three_too_few) == f"{processes_of.format(4)}, or {lora}--preset small-lora"
    of_lora = partial(bytes_of, lora_rank=4, dtype=torch.bfloat16)
    assert advice(of_lora(8), lora_rank=4) == f"{processes_of.format(8)}, or give --quantize nf4"
    assert advice(1000, lora_rank=4, quantize="nf4") == "take a smaller model"
    monkeypatch.delitem(grpo_flux.PRESETS, "small-lora")
    assert advice(1000) == f"{lora}--lora-rank 64"


def test_it_is_asked_before_anything_is_loaded_or_written(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "gpu_memory", lambda device: 1000)
    monkeypatch.setattr("runtime.output.load_reward", lambda *_: pytest.fail("a reward was loaded"))
    with pytest.raises(RunError, match=r"which has 0\.0 GiB"):
        grpo_flux.main(dataclasses.replace(config(), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_the_memory_is_asked_of_what_torch_calls_the_device(monkeypatch):
    assert memory.gpu_memory(torch.device("cpu")) is None and memory.gpu_memory(torch.device("mps")) is None
    properties = type("Properties", (), {"total_memory": 7})
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    assert memory.gpu_memory(torch.device("xpu", 1)) == 7
