"""--quantize: the frozen base of a LoRA in 8 or 4 bit.

A layer's codes and scales are ordinary tensors, its buffers: they are moved, broadcast and counted like all others.
"""

import torch
from torch import Tensor, nn

# The 16 levels of NF4 (QLoRA, 2305.14314, appendix E): quantiles of the normal distribution, scaled to [-1, 1].
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
BLOCK = 64  # weights of a row that share a scale in 4 bit


def quantize(network: nn.Module, kind: str) -> None:
    """Replace a network's frozen linear layers, in place. kind: int8 or nf4."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is not nn.Linear or child.weight.requires_grad:
                continue
            if kind == "int8" or child.in_features % BLOCK == 0:
                setattr(module, name, QuantizedLinear(child, kind))


class QuantizedLinear(nn.Module):
    """A frozen linear layer. int8: W = codes * scale, a scale for each row (LLM.int8's rows, without its outliers).
    nf4: W = level * scale, a scale for each 64 weights, two levels in a byte.
    """

    codes: Tensor
    scale: Tensor
    pairs: Tensor | None

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.bias, W, dtype = linear.bias, linear.weight.detach().float(), linear.weight.dtype
        if kind == "int8":
            scale = (W.abs().amax(1, keepdim=True) / 127).to(dtype)
            codes, pairs = (W / scale.float().clamp(min=1e-30)).round().clamp(-127, 127).to(torch.int8), None
        else:
            W, levels = W.unflatten(1, (-1, BLOCK)), torch.tensor(NF4, device=W.device)
            scale = W.abs().amax(2, keepdim=True).to(dtype)
            nearest = torch.bucketize(W / scale.float().clamp(min=1e-30), (levels[1:] + levels[:-1]) / 2).flatten(1)
            codes = (16 * nearest[:, ::2] + nearest[:, 1::2]).to(torch.uint8)
            pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1).to(dtype)  # (256, 2), by byte
        for name, tensor in {"codes": codes, "scale": scale, "pairs": pairs}.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> Tensor:
        return dequantize(self.codes, self.scale, self.pairs)

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedProduct.apply(x, self.bias, self.codes, self.scale, self.pairs)


def dequantize(codes: Tensor, scale: Tensor, pairs: Tensor | None) -> Tensor:
    """The weights (n, m) that codes and scales stand for, in the dtype of the scales."""
    if pairs is None:
        return codes.to(scale.dtype) * scale
    return (pairs[codes.int()].view(*scale.shape[:2], BLOCK) * scale).flatten(1)


class QuantizedProduct(torch.autograd.Function):
    """x W^T + bias. W is dequantized for every pass: autograd would keep it, in full size, from forward to backward."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, *stored) -> Tensor:
        ctx.save_for_backward(*stored)
        return nn.functional.linear(x, dequantize(*stored), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient @ dequantize(*ctx.saved_tensors), None, None, None, None
