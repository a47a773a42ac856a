"""Which implementation of an operation runs: the reference in PyTorch, or a kernel. Says so, once."""

import importlib.util
import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from codetr.errors import UserError

log = logging.getLogger(__name__)


class Operation(NamedTuple):
    """An operation that has a reference and kernels.

    name: for the log.
    variable: of the environment, =reference or =a kernel's package, overrides the choice.
    cpu, cuda: the package that the kernel for this kind of device needs, "" where there is none.
    """

    name: str
    variable: str
    cpu: str = ""
    cuda: str = ""

    def takes_kernel(self, *tensors: Tensor) -> bool:
        """Whether a kernel runs for these arguments. Raises UserError where the environment asks for what cannot be."""
        if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
            return False
        double = any(t.dtype == torch.float64 for t in tensors)
        return _decision(tuple(self), os.environ.get(self.variable, ""), tensors[0].device, double)

    def choose(self, device: torch.device, wish: str = "", double: bool = False) -> tuple[str, str, str]:
        """Which implementation runs on `device`: (its name, why it is not the kernel, what to do about that), the
        latter two empty where there is nothing to say.

        wish: the value of `variable`. double: for float64. Raises UserError for a wish that cannot be.
        """
        kernels = tuple(filter(None, (self.cpu, self.cuda)))
        if wish not in ("", "reference", *kernels):
            raise UserError(
                f"{self.variable}={wish!r} is unknown; unset it, or set it to {' or '.join(('reference', *kernels))}"
            )
        if wish == "reference":
            return wish, self.variable, ""
        kernel = {"cpu": self.cpu, "cuda": self.cuda}.get(device.type, "")
        if wish and wish != kernel:
            raise UserError(f"{self.variable}={wish}: it cannot run on {device}; unset it to let codetr choose")
        reason, remedy = ("it has no float64", "") if double else _obstacle(kernel, device)
        if reason and wish:
            raise UserError(f"{self.variable}={wish}: {reason}; {remedy or 'unset it to let codetr choose'}")
        return "reference" if reason else kernel, reason, remedy


@torch.compiler.assume_constant_result
def _decision(operation: tuple[str, ...], wish: str, device: torch.device, double: bool) -> bool:
    return _decide(Operation(*operation), wish, device, double)


@cache
def _decide(operation: Operation, wish: str, device: torch.device, double: bool) -> bool:
    """Once per situation: whether a kernel runs. Logs which implementation, and why."""
    name, reason, remedy = operation.choose(device, wish, double)
    what = f"{operation.name} on {device}"
    if remedy:
        log.warning("%s: reference, several times slower: %s; %s", what, reason, remedy)
    else:
        log.info("%s: %s", what, f"{name} ({reason})" if reason else f"{name} kernel")
    return name != "reference"


def _obstacle(kernel: str, device: torch.device) -> tuple[str, str]:
    """(why the kernel cannot run, what to do about it), empty where it can and where nothing can be done."""
    if not kernel:
        return f"no kernel for {device.type}", ""
    if importlib.util.find_spec(kernel) is None:
        return f"{kernel} is not installed", f"pip install {kernel}"
    if device.type == "cuda" and torch.version.hip:
        return "the kernel was never tried on ROCm", ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton needs compute capability 8.0 (Ampere) or newer", ""
    return "", ""
