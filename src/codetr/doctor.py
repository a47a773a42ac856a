"""What a report of a fault needs: `codetr doctor` prints versions, devices, and what is missing for which feature."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from typing import NamedTuple

from packaging.requirements import Requirement

# What the optional extras of pyproject.toml are for.
FEATURES = {
    "loggers": "logger=wandb, logger=mlflow, logger=many",
    "supervision": "Result.to_supervision",
    "tiff": "codetr predict views=tiles of TIFF files that do not fit into memory",
    "parquet": "codetr predict formats=[parquet]",
    "video": "codetr predict images=film.mp4, a stream or a camera; track=true",
    "albumentations": "augment@data=albumentations",
    "sweeps": "hydra/sweeper=optuna, hydra/launcher=submitit_local",
    "onnx": "codetr export format=onnx, tensorrt, triton, precision=int8, and running ONNX files",
    "openvino": "codetr export format=openvino, and running its files",
    "serve": "codetr serve",
    "dev": "make check, make test",
}
_VARIABLES = (
    "CODETR_MSDA",
    "CODETR_ROI_ALIGN",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
    "WORLD_SIZE",
)


class Line(NamedTuple):
    """A line of the report. fault: whether codetr cannot work as it should."""

    name: str
    text: str
    fault: bool = False


def system() -> Iterator[Line]:
    """codetr, Python, the machine, and the environment variables that change what codetr does."""
    yield Line("codetr", version("codetr"))
    yield Line("Python", f"{platform.python_version()} ({platform.python_implementation()})")
    yield Line("system", f"{platform.platform()}, {os.cpu_count()} CPUs")
    for name in _VARIABLES:
        if name in os.environ:
            yield Line(name, os.environ[name])


def packages() -> Iterator[Line]:
    """The packages that codetr requires, with their versions."""
    for requirement in _requirements(""):
        fault = _fault(requirement)
        yield Line(requirement.name, fault or version(requirement.name), bool(fault))


def extras() -> Iterator[Line]:
    """The optional extras, with what they are for and which of their packages are missing."""
    plain = {requirement.name for requirement in _requirements("")}
    for extra, feature in FEATURES.items():
        own = [r for r in _requirements(extra) if r.name not in plain]
        missing = [r.name for r in own if _fault(r)]
        state = f"missing {', '.join(missing)}: pip install 'codetr[{extra}]'" if missing else "there"
        yield Line(extra, f"{feature}: {state}")


def devices() -> Iterator[Line]:
    """The devices that PyTorch sees, and on each what runs deformable attention, after it has run once."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    yield Line("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    yield _deformable_attention("cpu")
    if accelerator is None:
        yield Line("GPU", f"none; torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "none")
    for i in range(torch.accelerator.device_count() if accelerator else 0):
        name = f"{accelerator}:{i}"
        yield Line(name, _described(i) if accelerator and accelerator.type == "cuda" else "")
        yield _deformable_attention(name)


def _described(index: int) -> str:
    import torch

    about = torch.cuda.get_device_properties(index)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    memory = f"{about.total_memory / 2**30:.0f} GiB"
    return f"{about.name}, {memory}, compute capability {about.major}.{about.minor}, {runtime}"


def _deformable_attention(device: str) -> Line:
    import torch

    from codetr.ops.msda import MSDA, deformable_attention

    name, place = "  deformable attention", torch.device(device)
    try:
        kind, reason, remedy = MSDA.choose(place, os.environ.get(MSDA.variable, ""))
        value = torch.rand(1, 5, 2, 16, device=place)
        reference, offsets = torch.rand(1, 3, 2, 2, device=place), torch.rand(1, 3, 2, 2, 2, 2, device=place)
        sizes = torch.tensor([[[2, 2], [1, 1]]], dtype=torch.int32, device=place)
        found = deformable_attention(value, ((2, 2), (1, 1)), reference, offsets, offsets[..., 0], sizes)
        if not found.isfinite().all():
            raise ArithmeticError("its result is not finite")
    except Exception as error:  # whatever a compiler or a driver raises
        return Line(name, f"fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}", fault=True)
    return Line(name, "; ".join(filter(None, (kind, reason, remedy))))


def _requirements(extra: str) -> list[Requirement]:
    """Those of codetr itself (""), or with an optional extra, on this system."""
    every = [Requirement(text) for text in requires("codetr") or ()]
    return [
        r
        for r in every
        if (not r.marker or r.marker.evaluate({"extra": extra})) and (not extra or "extra" in str(r.marker))
    ]


def _fault(requirement: Requirement) -> str:
    """Why an installed package does not do; "" if it does."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"missing (needs {requirement.specifier})"
    return "" if requirement.specifier.contains(found, prereleases=True) else f"{found} (needs {requirement.specifier})"


SECTIONS = {"system": system, "packages": packages, "optional": extras, "devices": devices}


def report() -> tuple[str, bool]:
    """The text, and whether there is a fault in it."""
    texts, fault = [], False
    for title, lines in SECTIONS.items():
        try:
            found = list(lines())
        except ImportError as error:  # a package that is there and broken
            found = [Line("fault", f"{type(error).__name__}: {error}", fault=True)]
        marks = [f"  {line.name:22} {line.text}{'   <-- fault' if line.fault else ''}" for line in found]
        texts += [title, *marks]
        fault |= any(line.fault for line in found)
    return "\n".join(texts), fault


def main() -> None:
    """Print the report; the exit status is 1 where there is a fault."""
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        print(f"{__doc__}\nIt takes no arguments. Exit status: 0, or 1 where something is broken or missing.")
        return
    text, fault = report()
    print(text)
    raise SystemExit(int(fault))


if __name__ == "__main__":
    main()
