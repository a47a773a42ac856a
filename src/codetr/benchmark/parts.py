"""Where a training step spends its time, memory, operator calls and arithmetic: by part, forward and backward.

Every module of a detector that is a part says when it begins and ends. Autograd numbers the operators of the forward
pass, and the backward pass carries the same numbers, so both are told by the part in which a number was given.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _get_sequence_nr as sequence_number
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

import codetr.criterion
from codetr.benchmark.timing import synchronise
from codetr.costs.flops import flops
from codetr.costs.step import Step

OTHER, MATCHING, UPDATE = "other", "matching", "optimizer"
PROFILED = 3  # steps
PREFIX = "part: "  # of the names that the profiler sees


@dataclass
class Part:
    """Of one step. forward, backward: seconds. calls: of operators, in both. flops: in both. saved: bytes that the
    forward pass keeps for the backward pass."""

    forward: float = 0.0
    backward: float = 0.0
    calls: float = 0.0
    flops: float = 0.0
    saved: float = 0.0


@dataclass
class Marks:
    """Which part runs, and which one ran when autograd gave a number.

    numbers, names: the part `names[i]` runs from number `numbers[i]` on.
    """

    stack: list[str] = field(default_factory=lambda: [OTHER])
    numbers: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    @property
    def current(self) -> str:
        return self.stack[-1]

    def of(self, number: int) -> str:
        place = bisect_right(self.numbers, number) - 1
        return self.names[place] if place >= 0 else OTHER

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.stack.append(name)
        self._note()
        with record_function(PREFIX + name):
            yield
        self.stack.pop()
        self._note()

    def _note(self) -> None:
        self.numbers.append(sequence_number())
        self.names.append(self.current)


@dataclass
class Profile:
    """Of one step. parts: each with what is not of another part in it. operators: (name, seconds, calls), the longest
    first."""

    parts: dict[str, Part]
    operators: list[tuple[str, float, float]]


def measure(step: Step) -> Profile:
    """Of a few steps, on the device of `step`."""
    parts: dict[str, Part] = defaultdict(Part)
    with marked(step) as marks:
        _count(step, marks, parts)
    with marked(step) as marks:
        operators = _time(step, marks, parts)
    return Profile(dict(parts), operators)


@contextmanager
def marked(step: Step) -> Iterator[Marks]:
    """In which the parts of a step say when they run."""
    marks = Marks()
    modules: dict[str, nn.Module] = {"criterion": step.criterion}
    for name, module in step.detector.named_children():
        several = isinstance(module, nn.ModuleDict)
        modules |= {f"{name}.{key}": child for key, child in module.named_children()} if several else {name: module}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.__dict__.pop, "forward", None)
            module.forward = _within(marks, name, module.forward)
        stack.callback(setattr, codetr.criterion, "match", codetr.criterion.match)
        codetr.criterion.match = _within(marks, MATCHING, codetr.criterion.match)
        stack.callback(step.__dict__.pop, "update")
        step.update = _within(marks, UPDATE, step.update)  # type: ignore[method-assign]
        yield marks


def _within(marks: Marks, name: str, function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with marks.part(name):
            return function(*args, **kwargs)

    return call


class _Calls(TorchDispatchMode):
    """Counts operators and their arithmetic, of the forward and of the backward pass."""

    def __init__(self, marks: Marks, parts: dict[str, Part]) -> None:
        super().__init__()
        self.marks, self.parts = marks, parts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        node = torch._C._current_autograd_node()
        part = self.parts[self.marks.current if node is None else self.marks.of(node._sequence_nr())]
        part.calls += 1
        part.flops += flops(func._overloadpacket, args, kwargs, result)
        return result


def _count(step: Step, marks: Marks, parts: dict[str, Part]) -> None:
    """Operators, arithmetic, and what is kept for the backward pass."""
    step.train()  # makes what is made once
    with kept(marks, parts, [step.detector]):
        step.train()
    with _Calls(marks, parts):
        step.train()


def kept(marks: Marks, parts: dict[str, Part], modules: Iterable[nn.Module]) -> saved_tensors_hooks:
    """In which the parts note what the forward pass keeps for the backward pass; parameters of `modules` do not count,
    and nothing counts twice."""
    counted = {parameter.untyped_storage().data_ptr() for module in modules for parameter in module.parameters()}
    alive = []  # so that no address is given again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            alive.append(storage)
            parts[marks.current].saved += storage.nbytes()
        return tensor

    return saved_tensors_hooks(keep, lambda tensor: tensor)


def _time(step: Step, marks: Marks, parts: dict[str, Part]) -> list[tuple[str, float, float]]:
    """Returns the operators."""
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step.train()
        synchronise(step.device)
    for event in profiler.events() or ():
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own <= 0 or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        backward, name = _owner(event, marks)
        seconds = own / 1e6 / PROFILED
        operators[event.name][0] += seconds
        operators[event.name][1] += 1 / PROFILED
        if backward:
            parts[name].backward += seconds
        else:
            parts[name].forward += seconds
    longest = sorted(operators.items(), key=lambda item: -item[1][0])
    return [(name, own, calls) for name, (own, calls) in longest if not name.startswith(PREFIX)]


def _owner(event: Any, marks: Marks) -> tuple[bool, str]:
    """(whether in the backward pass, the part) of a profiled operator."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return False, event.name.removeprefix(PREFIX)
        if event.name.startswith("autograd::engine::evaluate_function") and event.sequence_nr >= 0:
            return True, marks.of(event.sequence_nr)
        event = event.cpu_parent
    return False, OTHER
