"""A pretended CUDA device: what a script does on a GPU, done by a CPU, so that a machine without a GPU can test it.

Inside `pretended_cuda()` a tensor "on cuda" is a `CudaTensor`. It says that it is on cuda:0, and wraps the CPU tensor
that holds its values. PyTorch gives every operator to `Device`, which runs it on the CPU tensors and wraps what comes
out. What CUDA refuses is refused in CUDA's words: an operator that meets tensors of two devices, and whatever waits
for the GPU while a graph is captured. PyTorch's C++ code sees a CudaTensor on the device `meta`, for which autograd
needs no hardware; so whatever C++ asks for on `meta` is meant to be on cuda. It cannot tell speed, memory,
how CUDA's kernels round, or that a graph reads memory which has been freed.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import transformers
from accelerate import PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
REAL = torch.cuda.is_available()
MEMORY = 80 * 2**30
COPIES = {"copy_", "_to_copy"}  # from one device to another, too
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Besides element-wise operators, these take a CPU tensor without dimensions as a number.
TAKES_NUMBERS = {"fill", "fill_", "masked_fill", "masked_fill_", "index_put", "index_put_"}
# The CPU needs their result, or its size.
WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "unique_dim_consecutive", "bincount",
}  # fmt: skip
# What torch.cuda says of the device.
ANSWERS: dict[str, Any] = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "set_device": None,
    "_lazy_init": None, "empty_cache": None, "is_bf16_supported": True, "get_device_capability": (9, 0),
    "get_device_name": "NVIDIA H100 80GB HBM3", "memory_allocated": 2**30, "max_memory_allocated": 2**30,
    "reset_peak_memory_stats": None, "device_memory_used": 2**31, "utilization": 50,
}  # fmt: skip


class CudaTensor(Tensor):
    """A tensor on cuda:0 with the values of the CPU tensor `value`."""

    value: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor) -> Any:
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset()}
        tensor = make(cls, value.size(), dtype=value.dtype, device=META, **layout)
        tensor.value = value
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, *_: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{function} got a tensor of the pretended device outside of pretended_cuda()")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"cuda:0 {self.value!r}"


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors among some values, those in lists too."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def to_cpu(x: Any) -> Any:
    """An argument, for the operator that runs on the CPU."""
    if isinstance(x, list | tuple):
        return type(x)(map(to_cpu, x))
    if isinstance(x, torch.device):
        return CPU
    return x.value if isinstance(x, CudaTensor) else x


def to_cuda(x: Any, known: dict[int, CudaTensor]) -> Any:
    """What an operator returns. known: its arguments, as it may return what it has written."""
    if isinstance(x, list | tuple):
        return type(x)(to_cuda(y, known) for y in x)
    if not isinstance(x, Tensor):
        return x
    return known[id(x)] if id(x) in known else CudaTensor(x)


@functools.cache
def written_arguments(function: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments that an operator writes."""
    schema = enumerate(function._schema.arguments)
    return [(place, given.name) for place, given in schema if given.alias_info and given.alias_info.is_write]


def check_devices(function: Any, name: str, args: Any, tensors: list[Tensor], written: list[Tensor]) -> None:
    """Raises as CUDA does if an operator meets tensors of two devices."""
    if name in INDEXING:
        if not isinstance(args[0], CudaTensor) and any(isinstance(index, CudaTensor) for index in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = tensors_of([args[0], *args[2:]])
    takes_numbers = name in TAKES_NUMBERS or torch.Tag.pointwise in function.tags
    for tensor in tensors:
        is_number = takes_numbers and tensor.dim() == 0 and all(tensor is not other for other in written)
        if not isinstance(tensor, CudaTensor) and not is_number and name not in COPIES:
            both = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
            raise RuntimeError(f"{both} (when checking arguments of {function})")


class Graph:
    """torch.cuda.CUDAGraph: the operators of a capture, with the memory that they read and write."""

    captured: ClassVar[list["Graph"]] = []
    capturing: ClassVar["Graph | None"] = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.before: dict[int, tuple[Any, Any]] = {}  # memory that was written, and what had been in it
        self.made: dict[int, Tensor] = {}  # memory that is the graph's own
        self.replays = 0

    @staticmethod
    def check(name: str, args: Any, tensors: list[Tensor], wanted: Any) -> None:
        """Raises as CUDA does if the CPU would have to wait for the GPU."""
        waits = name in WAITS
        if name in COPIES:
            devices = {isinstance(tensor, CudaTensor) for tensor in tensors} | {wanted is None or is_cuda(wanted)}
            waits = len(devices) == 2
        if name in INDEXING:
            waits = any(i.dtype == torch.bool or not isinstance(i, CudaTensor) for i in tensors_of(args[1]))
        if waits:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")

    def run(self, function: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Runs an operator on CPU tensors, which gives the shape of its result, and records it."""
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made and storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        try:
            result = function(*args, **kwargs)
        except IndexError:
            # A capture runs nothing, so it does not see that a place is out of bounds.
            if not written:
                raise
            result = written[0]
        read = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(args)}
        for tensor in tensors_of([result]):
            if tensor.untyped_storage().data_ptr() not in read:
                self.made[tensor.untyped_storage().data_ptr()] = tensor
        self.calls.append((function, args, kwargs, tensors_of([result])))
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
            for old, new in zip(results, tensors_of([function(*args, **kwargs)]), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Device(TorchDispatchMode):
    """Runs every operator that has to do with cuda."""

    off: ClassVar[bool] = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        tensors = tensors_of([*args, *kwargs.values()])
        on_cuda = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, CudaTensor)}
        if self.off or not (on_cuda or is_cuda(wanted)):
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        places = written_arguments(function)
        written = tensors_of([args[place] if place < len(args) else kwargs[key] for place, key in places])
        if on_cuda:
            check_devices(function, name, args, tensors, written)
        if name == "empty" and torch.Size(args[0]).numel() * (kwargs.get("dtype") or torch.float32).itemsize > MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        arguments, options = to_cpu(args), {key: to_cpu(value) for key, value in kwargs.items()}
        if Graph.capturing is None:
            result = function(*arguments, **options)
        else:
            Graph.check(name, args, tensors, wanted)
            result = Graph.capturing.run(function, arguments, options, to_cpu(written))

        to_the_cpu = not is_cuda(wanted or CUDA) or not all(isinstance(tensor, CudaTensor) for tensor in written)
        return result if to_the_cpu else to_cuda(result, on_cuda)


class Placement(TorchFunctionMode):
    """Gives C++ its own name for cuda, before it looks for hardware."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if Device.off or function is torch.device:
            return function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor) and is_cuda(kwargs.get("device")):
            # Python's numbers would be copied by C++, where meta has no memory for them.
            return function(*args, **(kwargs | {"device": CPU})).to(META)
        if function is Tensor.cuda:
            return args[0].to(META)

        def renamed(x: Any) -> Any:
            named = isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda"))
            return META if named and is_cuda(x) else x

        return function(*map(renamed, args), **{key: renamed(value) for key, value in kwargs.items()})


@contextlib.contextmanager
def pretended_cuda() -> Iterator[None]:
    """A machine with one GPU, as PyTorch, transformers and accelerate see it."""
    models, real_c = transformers.PreTrainedModel, torch._C
    Graph.captured = []
    group, to_file, from_file = real_c._group_tensors_by_device_and_dtype, torch.save, torch.load
    to_folder: Any = models.save_pretrained
    from_folder: Any = models.__dict__["from_pretrained"].__func__

    @contextlib.contextmanager
    def capture(graph: Graph, *_: Any, **how: Any) -> Iterator[None]:
        Graph.captured.append(graph)
        with mock.patch.object(Graph, "capturing", graph):
            yield
        graph.end()

    def is_capturing() -> bool:
        return Graph.capturing is not None

    def synchronize(*_: Any) -> None:
        if is_capturing():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing (synchronize)")

    def by_device(*tensors: Any) -> Any:
        return {(CUDA if is_cuda(place) else place, dtype): x for (place, dtype), x in group(*tensors).items()}

    def load(path: Any, map_location: Any = None, **how: Any) -> Any:
        state = from_file(path, map_location=CPU, **how)
        return tree_map(lambda x: x.to(map_location or CPU) if isinstance(x, Tensor) else x, state)

    def from_pretrained(cls: Any, *given: Any, **how: Any) -> Any:
        # Models are made on meta before their weights are read.
        with mock.patch.object(Device, "off", True):
            return from_folder(cls, *given, **how)

    def save_pretrained(model: Any, *given: Any, **how: Any) -> None:
        state = {name: to_cpu(value) for name, value in model.state_dict().items()}
        with mock.patch.object(Device, "off", True):
            to_folder(model, *given, **how, state_dict=state)

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in ANSWERS.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **how: answer)
        patch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
        patch.setattr(torch.accelerator, "current_stream", lambda *_: SimpleNamespace(is_capturing=is_capturing))
        patch.setattr(torch.cuda, "synchronize", synchronize)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(real_c, "_group_tensors_by_device_and_dtype", by_device)
        patch.setattr(torch, "save", lambda state, *given, **how: to_file(tree_map(to_cpu, state), *given, **how))
        patch.setattr(torch, "load", load)
        patch.setattr(models, "from_pretrained", classmethod(from_pretrained))
        patch.setattr(models, "save_pretrained", save_pretrained)
        # A parameter that moves stays the same object, so tied weights stay tied.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        PartialState._reset_state()
        try:
            with Placement(), Device():
                yield
        finally:
            PartialState._reset_state()
            torch.__future__.set_swap_module_params_on_conversion(before)


def any_cuda() -> contextlib.AbstractContextManager[None]:
    """The real device if there is one."""
    return contextlib.nullcontext() if REAL else pretended_cuda()
