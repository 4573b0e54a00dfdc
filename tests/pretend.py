"""A pretended accelerator, on which the tests find what would fail on a GPU: after `start` torch has one.

Its tensors are torch's own, of a device called "pretend" (torch's PrivateUse1). They lie in host memory, and the CPU's
kernels compute on them, so that results equal the CPU's. As on a GPU, `.numpy()` raises, and so does an operation that
mixes devices: only copies, numbers (0-d tensors) and the indices of a tensor's elements may come from the CPU. As on
Apple's MPS, nothing is converted to float64. Files cannot be loaded straight to it.

It cannot do: several processes, hence sharding (torch has no collectives for it); torch.compile (nobody writes its
code); bfloat16 (autocast has no rules for it), so runs need --dtype float32.
"""

import contextlib
import ctypes
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
CPU, EXTENSION = 1, 12  # DLPack's numbers of device types; torch takes the second for PrivateUse1
INDEXING = ("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_")
LIBRARIES = []  # what they register holds as long as they live

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def relabel(tensor: Tensor, device_type: int) -> Tensor:
    """The same memory as a tensor of another device: DLPack hands it over, and we change the device that it names."""
    capsule = torch._C._to_dlpack(tensor)  # points to (data, type of device, …)
    ctypes.c_int32.from_address(pointer_of(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p)).value = device_type
    return torch._C._from_dlpack(capsule)


def kernel(op, *args, **kwargs):
    """Any operation on tensors of the device, or one that makes such a tensor."""
    if makes_view(op):  # keeps the tensor's own memory, whatever the device
        return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    if op.name() == "aten::_to_copy" and kwargs.get("dtype") == torch.float64 and args[0].device.type == NAME:
        raise TypeError(f"Cannot convert a {NAME} tensor to float64")  # as on Apple's MPS
    originals, device, kinds = {}, None, set()  # {id of a tensor on the CPU: (it, what it stands for)}

    def to_host(x):
        nonlocal device
        if isinstance(x, torch.device):
            device = x
            return torch.device("cpu")
        if isinstance(x, torch.Generator):
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
        if not isinstance(x, Tensor):
            return x
        here = x.device.type == "cpu"
        kinds.update([] if here and not x.dim() else [x.device.type])
        y = x if here else relabel(x, CPU) if x.numel() else torch.empty_like(x, device="cpu")  # that can be resized
        originals[id(y)] = y, x
        return y

    def to_device(y):
        if not isinstance(y, Tensor) or id(y) in originals:
            return originals[id(y)][1] if id(y) in originals else y
        return y if device and device.type == "cpu" else relabel(y, EXTENSION)

    if op.name().startswith(INDEXING) and args[0].device.type == NAME:
        args = args[0], [x if x is None else x.to(NAME) for x in args[1]], *args[2:]
    args, kwargs = each(to_host, args), {name: each(to_host, value) for name, value in kwargs.items()}
    is_copy = op is torch.ops.aten._copy_from.default
    if len(kinds) > 1 and not is_copy:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op.name()} got {NAME} and cpu")
    result = args[1].copy_(args[0]) if is_copy else op(*args, **kwargs)
    for y, x in originals.values():
        if x.shape != y.shape:  # it was resized
            x.data = relabel(y, EXTENSION)
    return each(to_device, result)


def each(function, x):
    """`function` of x, or of each item, where x is a list or a tuple, also of lists."""
    return type(x)([each(function, y) for y in x]) if type(x) in (list, tuple) else function(x)


@cache
def makes_view(op) -> bool:
    """Whether the result shares the memory of an argument that stays as it is."""
    return any(result.alias_info and not result.alias_info.is_write for result in op._schema.returns)


class Module:
    """What torch.cuda is for CUDA, as far as somebody asks; `present` hides the device."""

    present = True
    stream = device = contextlib.nullcontext

    @classmethod
    def is_available(cls) -> bool:
        return cls.present

    @classmethod
    def current_stream(cls):
        return cls

    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)


def start() -> None:
    """From now on this process has the device, as its only accelerator. Comes before the first backward pass."""
    _setup_privateuseone_for_python_backend(NAME, Module)
    torch.accelerator.synchronize = Module.synchronize  # torch's own asks C++ for streams
    everything, aten = LIBRARIES[:] = [torch.library.Library(name, "IMPL") for name in ("_", "aten")]
    everything.fallback(kernel, "PrivateUse1")
    here = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutogradNonFunctional")
    for name in (*here, "aten::_to_copy", "aten::convolution", "aten::convolution_backward"):  # would not fall back
        packet, _, overload = name.removeprefix("aten::").partition(".")
        aten.impl(name, partial(kernel, getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    aten.impl("_has_compatible_shallow_copy_type", lambda a, b: True, "PrivateUse1")  # x.data = x.data.to(device)
