"""Where a program makes the host wait for its accelerator, seen without one.

`Pretended` runs the program on a device that is only pretended: its tensors hold their numbers on the CPU and claim to
be elsewhere, so that whatever the host reads of them, and whatever it lacks to allocate the next tensor, is seen; so is
a tensor that was left on the wrong device.

An op of our own, such as `codetr::assign`, is one operator here, and its code for the CPU stands in for its kernel:
that the kernel itself does not wait, tests/kernels shows.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import codetr

SOURCE = Path(codetr.__file__).parent
ELSEWHERE = torch.device("lazy")  # needs no driver, and autograd treats it as the CPU
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_")
SIZED_BY_DATA = ("torchvision::nms",)  # operators without PyTorch's tags


class Place(NamedTuple):
    """Where the host waits: the innermost function of codetr, and what it calls."""

    file: str
    function: str
    operator: str


def place(operator: str) -> Place:
    """Of the running code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if SOURCE in path.parents:
            return Place(str(path.relative_to(SOURCE)), frame.f_code.co_qualname, operator)
        frame = frame.f_back
    return Place("", "", operator)  # of the caller, or of the backward pass


class Remote(Tensor):
    """A tensor that claims to be ELSEWHERE; `held` is the tensor itself."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Remote:
        remote = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=ELSEWHERE
        )
        remote.held = held
        return remote

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} on a pretended device outside of `Pretended`")

    def tolist(self) -> Any:  # Tensor's refuses subclasses
        return self.cpu().tolist()


class Pretended(TorchDispatchMode):
    """Runs what is ELSEWHERE on the CPU, and counts the `places` where a real device would make the host wait.

    Raises RuntimeError where tensors of both devices meet in an operator that does not take them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[Place] = Counter()

    def __enter__(self) -> Pretended:
        # torch.tensor(..., device=...) then copies where it can be seen, instead of beneath the modes.
        self.lifting = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        torch._C._set_only_lift_cpu_tensors(self.lifting)
        super().__exit__(kind, value, traceback)

    def __torch_dispatch__(self, func: Any, types: Sequence, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        remote = {id(x.held): x for x in tensors if isinstance(x, Remote)}
        device = kwargs.get("device")
        elsewhere = bool(remote) if device is None else torch.device(device).type == ELSEWHERE.type
        if remote or elsewhere:
            local = [x for x in tensors if not isinstance(x, Remote) and x.dim()]
            if waits(func, args, kwargs, bool(remote), elsewhere, bool(local)):
                self.places[place(func._schema.name)] += 1
            elif remote and local and func not in COPIES:
                raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = func(*_here(args), **_here(kwargs))
        if func is torch.ops.aten.copy_.default:
            elsewhere = id(result) in remote
        return tree_map(lambda x: _there(x, remote), result) if elsewhere else result

    def send(self, module: nn.Module) -> None:
        """Moves the parameters and buffers of a module ELSEWHERE, in place."""
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                setattr(owner, name, nn.Parameter(Remote(parameter.data), parameter.requires_grad))
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, Remote(buffer))


def _here(values: Any) -> Any:
    return tree_map(lambda x: x.held if isinstance(x, Remote) else x, values)


def _there(value: Any, known: dict[int, Remote]) -> Any:
    """known: what was changed in place stays the tensor that it was."""
    if not isinstance(value, Tensor):
        return value
    return known[id(value)] if id(value) in known else Remote(value)


def waits(func: Any, args: tuple, kwargs: dict, remote: bool, elsewhere: bool, local: bool) -> bool:
    """Whether an accelerator would make the host wait here.

    remote: an argument is ELSEWHERE. elsewhere: the result is. local: an argument that is no number is on the CPU.
    """
    name = func._schema.name
    if func in COPIES:
        across = local or elsewhere != remote
        asynchronous = kwargs.get("non_blocking", False) or (func is COPIES[1] and args[2:] == (True,))
        return across and not (asynchronous and elsewhere)  # what goes to the host is wanted there at once
    if name in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return bool(masks) or local
    if kwargs.get("output_size") is not None:
        return False
    sized = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    return bool(sized) or name in SIZED_BY_DATA
