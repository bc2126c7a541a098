"""A pretended CUDA device: what a script does on a GPU, done by a CPU, so that a machine without a GPU can test it.

Inside `pretended_cuda()` a tensor "on cuda" is a `CudaTensor`. It says that it is on cuda:0, and wraps the CPU tensor
that holds its values. PyTorch gives every operator to `Device`, which runs it on the CPU tensors and wraps what comes
out. What CUDA refuses is refused here, in CUDA's words: operators that meet tensors of two devices, and while a graph
is captured everything that waits for the GPU. To PyTorch's C++ code a CudaTensor is on the device `meta`, for which
autograd needs no hardware; so whatever is asked for on `meta` is meant to be on cuda.

It cannot tell: speed, memory, the rounding of CUDA's kernels, and what happens when memory that a graph reads is freed.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
MEMORY = 80 * 2**30
# These may read and write different devices.
COPIES = {"copy_", "_to_copy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Where a 0-dimensional CPU tensor is taken as a number, besides element-wise operators.
TAKES_NUMBERS = {"fill_", "fill", "masked_fill", "masked_fill_", "index_put", "index_put_"}
# The CPU needs their result, or its size, so it waits for the GPU.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "bincount",
}  # fmt: skip


class CudaTensor(Tensor):
    """A tensor on cuda:0, whose values are those of the CPU tensor `value`."""

    value: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> "CudaTensor":
        layout: dict[str, Any] = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, value.size(), dtype=value.dtype, device=META, **layout)  # type: ignore[attr-defined]
        tensor.value = value
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} got a tensor of the pretended device outside of pretended_cuda()")

    def get_device(self) -> int:
        return 0

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **how: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return f"cuda:0 {self.value!r}"


def leaves(values: Any) -> list[Any]:
    """The arguments of an operator, those in lists too."""
    found = []
    for value in values:
        found.extend(value if isinstance(value, list | tuple) else [value])
    return found


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def to_cpu(x: Any) -> Any:
    """An argument for the operator that runs on the CPU."""
    if isinstance(x, CudaTensor):
        return x.value
    if isinstance(x, list | tuple):
        return type(x)(map(to_cpu, x))
    return CPU if isinstance(x, torch.device) else x


@functools.cache
def written_arguments(function: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operator writes."""
    schema = enumerate(function._schema.arguments)
    return [(place, given.name) for place, given in schema if given.alias_info and given.alias_info.is_write]


def check_devices(function: Any, name: str, args: Any, tensors: list[Tensor], written: list[Tensor]) -> None:
    """Raises as CUDA does if an operator meets tensors of two devices."""
    if name in COPIES:
        return
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if not isinstance(args[0], CudaTensor) and any(isinstance(index, CudaTensor) for index in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [tensor for tensor in (args[0], *args[2:]) if isinstance(tensor, Tensor)]
    takes_numbers = name in TAKES_NUMBERS or torch.Tag.pointwise in function.tags
    for tensor in tensors:
        is_number = takes_numbers and tensor.dim() == 0 and not any(tensor is other for other in written)
        if not isinstance(tensor, CudaTensor) and not is_number:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"(when checking arguments of {function})"
            )


class Graph:
    """torch.cuda.CUDAGraph: the operators of a capture, with the memory that they read and write."""

    captured: ClassVar[list["Graph"]] = []
    capturing: ClassVar["Graph | None"] = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # memory that was written, and what had been in it
        self.made: dict[int, Tensor] = {}  # memory that is the graph's own
        self.replays = 0

    def check(self, name: str, args: Any, tensors: list[Tensor], wanted: Any) -> None:
        """Raises as CUDA does if the CPU would wait for the GPU, or copy to it from memory that is not pinned."""
        devices = {isinstance(tensor, CudaTensor) for tensor in tensors}
        if wanted is not None:
            devices.add(is_cuda(wanted))
        waits = name in WAITS or (name in COPIES and len(devices) == 2)
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            waits = any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, CudaTensor) for i in indices)
        if waits:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")

    def run(self, function: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Runs an operator on CPU tensors, for the shape of its result, and records it."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made:
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        try:
            result = function(*args, **kwargs)
        except IndexError:
            # A capture runs nothing, so it does not see that a place is out of bounds.
            if not written:
                raise
            result = written[0]
        read = {tensor.untyped_storage().data_ptr() for tensor in leaves(args) if isinstance(tensor, Tensor)}
        results = [tensor for tensor in leaves([result]) if isinstance(tensor, Tensor)]
        for tensor in results:
            if tensor.untyped_storage().data_ptr() not in read:
                self.made[tensor.untyped_storage().data_ptr()] = tensor
        self.calls.append((function, args, kwargs, results))
        return result

    def end(self) -> None:
        """A capture takes no effect: what it wrote is put back, and the graph's own memory holds no results."""
        for storage, before in self.before.values():
            storage.copy_(before)
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.calls:
            again = [tensor for tensor in leaves([function(*args, **kwargs)]) if isinstance(tensor, Tensor)]
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Device(TorchDispatchMode):
    """Runs every operator that has to do with cuda."""

    off = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        tensors = [value for value in leaves((*args, *kwargs.values())) if isinstance(value, Tensor)]
        wrappers = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, CudaTensor)}
        if self.off or not (wrappers or is_cuda(wanted)):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        targets = [args[place] if place < len(args) else kwargs[key] for place, key in written_arguments(function)]
        written = [value for value in leaves(targets) if isinstance(value, Tensor)]
        if wrappers:
            check_devices(function, name, args, tensors, written)
        if name == "empty" and torch.Size(args[0]).numel() * (kwargs.get("dtype") or torch.float32).itemsize > MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than the device has.")
        arguments, options = to_cpu(args), {key: to_cpu(value) for key, value in kwargs.items()}
        if Graph.capturing is None:
            result = function(*arguments, **options)
        else:
            Graph.capturing.check(name, args, tensors, wanted)
            result = Graph.capturing.run(function, arguments, options, to_cpu(written))

        def wrapped(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(wrapped, value))
            if not isinstance(value, Tensor):
                return value
            return wrappers[id(value)] if id(value) in wrappers else CudaTensor(value)

        if (wanted is not None and not is_cuda(wanted)) or any(not isinstance(t, CudaTensor) for t in written):
            return result
        return wrapped(result)


class Placement(TorchFunctionMode):
    """Calls `cuda` by the name that C++ knows, before it looks for hardware."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.pretended = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.pretended.off or function is torch.device:
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor):
            # These copy Python's numbers in C++, where meta has no memory for them.
            device = kwargs.get("device")
            made = function(*args, **(kwargs | {"device": None}))
            return made.to(META) if is_cuda(device) else made
        if function is Tensor.cuda:
            return args[0].to(META)

        def renamed(x: Any) -> Any:
            named = isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda"))
            return META if named and is_cuda(x) else x

        return function(*map(renamed, args), **{key: renamed(value) for key, value in kwargs.items()})


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """A machine with one GPU, on which everything else in PyTorch, transformers and accelerate finds its way."""
    device = Device()
    Graph.captured = []

    @contextlib.contextmanager
    def switched_off() -> Iterator[None]:
        before, device.off = device.off, True
        try:
            yield
        finally:
            device.off = before

    @contextlib.contextmanager
    def capture(graph: Graph, *given: Any, **how: Any) -> Iterator[None]:
        Graph.captured.append(graph)
        Graph.capturing = graph
        try:
            yield
        finally:
            Graph.capturing = None
            with switched_off():
                graph.end()

    def is_capturing() -> bool:
        return Graph.capturing is not None

    def synchronize(*given: Any) -> None:
        if is_capturing():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (synchronize)")

    def by_device(*tensors: Any) -> Any:
        found = group(*tensors)
        return {(CUDA if is_cuda(key[0]) else key[0], key[1]): values for key, values in found.items()}

    def save(state: Any, *given: Any, **how: Any) -> None:
        real_save(tree_map(to_cpu, state), *given, **how)

    def load(*given: Any, map_location: Any = None, **how: Any) -> Any:
        state = real_load(*given, map_location="cpu", **how)
        return tree_map(lambda x: x.to(map_location) if isinstance(x, Tensor) and map_location else x, state)

    def from_pretrained(cls: Any, *given: Any, **how: Any) -> Any:
        # It makes models on meta before it reads their weights.
        with switched_off():
            return real_from.__func__(cls, *given, **how)

    def save_pretrained(model: Any, *given: Any, **how: Any) -> None:
        state = {name: to_cpu(value) for name, value in model.state_dict().items()}
        with switched_off():
            real_to(model, *given, state_dict=state, **how)

    group, real_save, real_load = torch._C._group_tensors_by_device_and_dtype, torch.save, torch.load
    real_from, real_to = transformers.PreTrainedModel.from_pretrained, transformers.PreTrainedModel.save_pretrained
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
        "_lazy_init": None, "empty_cache": None, "is_bf16_supported": True, "get_device_capability": (9, 0),
        "get_device_name": "NVIDIA H100 80GB HBM3", "memory_allocated": 2**30, "max_memory_allocated": 2**30,
        "reset_peak_memory_stats": None, "device_memory_used": 2**31, "utilization": 50,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *given, answer=answer, **how: answer)
        patch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
        patch.setattr(torch.accelerator, "current_stream", lambda *given: SimpleNamespace(is_capturing=is_capturing))
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
        patch.setattr(torch, "save", save)
        patch.setattr(torch, "load", load)
        patch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        patch.setattr(transformers.PreTrainedModel, "save_pretrained", save_pretrained)
        # Parameters that move keep their identity, and so do tied weights.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        PartialState._reset_state()
        try:
            with Placement(device), device:
                yield
        finally:
            PartialState._reset_state()
            torch.__future__.set_swap_module_params_on_conversion(before)
