"""--quantize: the frozen base of a LoRA in 8 or 4 bit."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from scipy.stats import norm
from torch import nn

import grpo_flux
import small
from runtime import dryrun, processes
from runtime.options import RunError
from runtime.quantize import BLOCK, NF4, QuantizedLinear, quantize
from small import TRAINERS, train

KINDS = pytest.mark.parametrize("kind, error, bits", [("int8", 0.005, 8.1), ("nf4", 0.10, 4.6)])


def linear(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(128, 48).to(dtype).requires_grad_(False)


def test_the_levels_of_nf4_are_quantiles_of_the_normal_distribution():
    """As the text of QLoRA defines them: eight quantiles below and nine above zero, which both halves share."""
    above = norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(NF4, levels, atol=1e-6)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_layer_is_close_to_the_layer_and_takes_less(kind, error, bits, dtype):
    plain = linear(dtype)
    layer = QuantizedLinear(plain, kind)
    difference = (layer.weight.float() - plain.weight.float()).pow(2).mean().sqrt() / plain.weight.float().std()
    assert layer.weight.dtype == dtype and difference < error
    assert layer.codes.dtype == (torch.int8 if kind == "int8" else torch.uint8)
    assert 8 * (layer.codes.nbytes + layer.scale.nbytes * 2 // dtype.itemsize) / plain.weight.numel() < bits + 0.1


def test_each_weight_gets_the_nearest_level_of_its_scale():
    plain = linear()
    blocks = plain.weight.view(48, -1, BLOCK)
    scale = blocks.abs().amax(2, keepdim=True)
    nearest = (blocks[..., None] / scale[..., None] - torch.tensor(NF4)).abs().argmin(-1)
    assert torch.equal(QuantizedLinear(plain, "nf4").weight, (torch.tensor(NF4)[nearest] * scale).flatten(1))
    int8 = QuantizedLinear(plain, "int8")
    assert ((int8.weight - plain.weight).abs() <= int8.scale * 0.5001).all()
    empty = plain.requires_grad_(False)
    empty.weight.zero_()
    assert not QuantizedLinear(empty, "int8").weight.any() and not QuantizedLinear(empty, "nf4").weight.any()


@KINDS
def test_the_gradient_is_that_of_the_dequantized_layer_and_nothing_large_is_kept(kind, error, bits):
    layer, kept = QuantizedLinear(linear(), kind), []
    x = torch.randn(5, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(x)
    ((out**2).sum()).backward()
    mine, x.grad = x.grad, None
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    ((expected**2).sum()).backward()
    assert torch.equal(out, expected) and torch.allclose(mine, x.grad, rtol=1e-5, atol=1e-5)
    assert all(tensor.numel() < 48 * 128 / 2 for tensor in kept if tensor.is_floating_point())  # scales, levels
    compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
    x.grad = None
    ((compiled**2).sum()).backward()
    assert torch.equal(compiled, out) and torch.equal(x.grad, mine)
    with torch.autocast("cpu", torch.bfloat16):  # the output has the dtype that a plain layer's has
        assert QuantizedLinear(linear(torch.bfloat16), kind)(x).dtype == torch.bfloat16


def test_only_frozen_linear_layers_are_replaced():
    network = nn.Sequential(linear(), nn.Conv2d(3, 3, 1), nn.Linear(128, 4), nn.Linear(40, 4).requires_grad_(False))
    quantize(network, "nf4")  # rows of 40 weights do not divide into blocks
    assert [type(layer).__name__ for layer in network] == ["QuantizedLinear", "Conv2d", "Linear", "Linear"]


@pytest.mark.parametrize("case, kind", [("flux", "int8"), ("flux", "nf4"), ("sd", "int8")])
def test_a_lora_learns_over_a_quantized_base_and_loads_in_stock_diffusers(case, kind, tmp_path, monkeypatch):
    found, load = [], TRAINERS[case].load_models

    def load_models(*args):
        models = load(*args)
        found.append(models[1])
        return models

    monkeypatch.setattr(TRAINERS[case], "load_models", load_models)
    options = dict(lora_rank=4, iterations=1, num_samples=1, learning_rate=0.01, kl_weight=0.1)
    out = train(case, tmp_path / "out", **options, quantize=kind)
    (row,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert row["ratio_max_deviation_first_update"] <= 1e-6 and row["grad_norm"] > 0
    layers = [module for module in found[0].modules() if isinstance(module, QuantizedLinear)]
    plain = {"flux": FluxTransformer2DModel, "sd": UNet2DConditionModel}[case]
    plain = plain.from_pretrained(f"tiny/{case}", subfolder="unet" if case == "sd" else "transformer")
    linears = [module for module in plain.modules() if type(module) is nn.Linear]
    fit = [module for module in linears if kind == "int8" or module.in_features % BLOCK == 0]
    count = sum(module.weight.numel() for module in fit)
    assert sum(layer.codes.nbytes for layer in layers) == count // (1 if kind == "int8" else 2)
    pipeline = FluxPipeline if case == "flux" else StableDiffusionPipeline
    pipe = pipeline.from_pretrained(f"tiny/{case}")
    pipe.load_lora_weights(out / "checkpoint-000001")
    assert pipe.get_active_adapters() == ["default_0"]


@pytest.mark.slow
@KINDS
def test_the_dry_run_counts_the_quantized_base_to_the_byte(kind, error, bits, tmp_path):
    cfg = small.config("flux", output_dir=tmp_path, lora_rank=4, quantize=kind, dry_run=True, dtype="float32")
    predicted = grpo_flux.dry_run(cfg)["gpu_gib"]["parameters"] * dryrun.GIB
    _, network, _ = grpo_flux.load_models(cfg, processes.start_world("float32"), None)
    assert predicted == sum(x.nbytes for x in processes.tensors_of([network]))


@pytest.mark.parametrize("options, expected", [
    ({"quantize": "int8"}, "--quantize int8 is for the frozen base of a LoRA; give --lora-rank"),
    ({"quantize": "nf4", "lora_rank": 4, "shard_size": 2}, "--quantize keeps a whole base on every GPU; give"),
])  # fmt: skip
def test_quantize_that_does_not_apply_is_refused(options, expected, tmp_path):
    with pytest.raises(RunError, match=f"^{expected}"):
        train("flux", tmp_path / "out", **options)
