"""Modules and tensors that have a shape and no content: a step runs on them in seconds, and its memory is added up."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codetr.costs.flops import flops
from codetr.costs.step import Build, built
from codetr.errors import UserError

CPU = torch.device("cpu")
Module = TypeVar("Module", bound=nn.Module)


class Ledger(TorchDispatchMode):
    """Adds up the memory of the tensors that operators make, as long as they live, and the arithmetic.

    current, peak: bytes. flops: of all calls so far. What an operator takes and gives back within one call is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.flops = 0.0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.flops += flops(func._overloadpacket, args, kwargs, result)
        for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:  # a view
            return

        def gone(_: object) -> None:
            self.current -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.current += size
        self.peak = max(self.peak, self.current)


class Pretence:
    """In which tensors are pretended ones of the CPU. `ledger` keeps their account.

    What another device allocates differs: masks of dropout are bytes on a GPU, and floats on a CPU.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def __call__(self) -> Iterator[Ledger]:
        """Raises UserError where a shape depends on what images show."""
        try:
            with self._mode, self.ledger:
                yield self.ledger
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"the cost of this detector depends on what images show: {error.func} makes as many numbers as it "
                "finds. Measure it: codetr benchmark step"
            ) from error


def without_content(config: DictConfig) -> Build:
    """Reads a configuration as `codetr.costs.step.built`, on the meta device. What it returns pretends the detector and
    its losses, once, where it is called in a `Pretence`."""
    with torch.device("meta"):
        parts = built(config, torch.device("meta"))
    return lambda config, device: (_pretended(parts[0], device), _pretended(parts[1], device))


def _pretended(module: Module, device: torch.device) -> Module:
    """`module` with pretended parameters and buffers; those that several submodules share stay shared."""
    known: dict[int, tuple[Tensor, Tensor]] = {}

    def pretended(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, tensor.requires_grad)
            known[id(tensor)] = tensor, copy  # with the tensor, so that nothing else gets its id
        return known[id(tensor)][1]

    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = pretended(tensor)  # type: ignore[assignment]
    return module
