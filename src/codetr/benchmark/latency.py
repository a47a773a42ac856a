"""Inference in several runtimes, in turns: its stages, its memory, and the longest operators of an exported graph."""

from __future__ import annotations

import gc
import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor, nn
from torchvision.transforms import v2

from codetr.benchmark.graphs import Drawn, require
from codetr.benchmark.timing import synchronise
from codetr.data.images import read_image
from codetr.errors import UserError
from codetr.exporting.graph import traceable
from codetr.inference.runtimes import RUNTIMES
from codetr.types import Frames

Run = Callable[[Tensor, Tensor], Sequence[Any]]
STAGES = ("decoding", "preprocessing", "model", "post-processing")
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".xml"}
OWN = ("eager", "compile")
FILE_SIZE = 480, 640  # (height, width) of the pictures that are decoded
PROFILED = 3  # runs
WARMUP = 1  # run of each, after the one that shows how much memory it takes
THRESHOLD = 0.3


def check_runtimes(names: Sequence[str]) -> None:
    """Raises UserError for one that is unknown or not installed."""
    for name in names:
        if name in SUFFIXES:
            runtime = RUNTIMES[SUFFIXES[name]]
            require(runtime.package, runtime.extra)
        elif name not in OWN:
            raise UserError(f"runtimes: {name} is none of {', '.join((*OWN, *SUFFIXES))}")


def opened(runtime: str, drawn: Drawn, file: Path, device: torch.device) -> Run:
    """What runs `drawn` in a runtime. file: its exported form, which the runtimes of PyTorch do not need."""
    if runtime in SUFFIXES:
        session = RUNTIMES[SUFFIXES[runtime]].open(file, device)

        def there(images: Tensor, sizes: Tensor) -> Sequence[Any]:
            found = session.run({"images": images.numpy(), "sizes": sizes.numpy()})
            return [found[name] for name in session.outputs]

        return there
    graph: Callable = drawn.graph.to(device)
    if runtime == "compile":
        graph = torch.compile(graph)

    def own(images: Tensor, sizes: Tensor) -> Sequence[Any]:
        with torch.inference_mode(), traceable() if runtime == "compile" else torch.no_grad():
            found = graph(images.to(device), sizes.to(device))
        synchronise(device)
        return tuple(one.cpu() for one in found)

    return own


def weights_of(graph: nn.Module) -> int:
    """Bytes."""
    return sum(tensor.nbytes for tensor in (*graph.parameters(), *graph.buffers()))


class Stages:
    """The way of `batch` pictures from their files to objects in pixels of the files."""

    def __init__(self, folder: Path, batch: int, size: tuple[int, int]) -> None:
        self.files, self.size = [folder / f"{i}.jpg" for i in range(batch)], size
        random = np.random.default_rng(0)
        for file in self.files:
            small = random.integers(0, 256, (FILE_SIZE[0] // 16, FILE_SIZE[1] // 16, 3), dtype=np.uint8)
            Image.fromarray(small).resize(FILE_SIZE[::-1]).save(file, quality=90)
        self.sizes = torch.tensor([size] * batch)
        scale = torch.tensor([[size[0] / FILE_SIZE[0], size[1] / FILE_SIZE[1]]] * batch)
        self.frames = Frames(self.sizes, scale, torch.tensor([FILE_SIZE] * batch))
        self.resize = v2.Resize(list(size))

    def blank(self) -> Tensor:
        """A batch without content: what detectors compute does not depend on it."""
        return torch.zeros(len(self.files), 3, *self.size, dtype=torch.uint8)

    def run(self, drawn: Drawn, run: Run) -> dict[str, float]:
        """Seconds of every stage."""
        times = [time.perf_counter()]
        pictures = [read_image(file, FILE_SIZE) for file in self.files]
        times.append(time.perf_counter())
        images = torch.stack([self.resize(picture) for picture in pictures])
        times.append(time.perf_counter())
        found = run(images, self.sizes)
        times.append(time.perf_counter())
        boxes, scores, labels = (torch.as_tensor(np.asarray(one)) for one in found)
        objects = drawn.postprocess.thinned(scores, labels, boxes)
        self.frames.to_files([one.above(THRESHOLD) for one in objects])
        times.append(time.perf_counter())
        return dict(zip(STAGES, np.diff(times).tolist(), strict=True))


def in_turns(cases: Mapping[str, tuple[Drawn, Run]], stages: Stages, repeats: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of the stages of every run, without those that warm up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in track(range(repeats + WARMUP), f"Batches of {len(stages.files)}"):
        for name, (drawn, run) in cases.items():
            own = stages.run(drawn, run)
            if number >= WARMUP:
                found[name].append(own)
    return found


def summary(runs: Sequence[Mapping[str, float]], batch: int) -> dict[str, float]:
    """Seconds: percentiles of whole runs, and medians of their stages; and images a second."""
    whole = [sum(own.values()) for own in runs]
    percentiles = {f"p{share}": float(np.percentile(whole, share)) for share in (50, 95, 99)}
    medians = {stage: float(np.median([own[stage] for own in runs])) for stage in STAGES}
    return {**percentiles, **medians, "images a second": batch / percentiles["p50"]}


def memory(first: Callable[[], object]) -> int | None:
    """Bytes by which this process grows at the highest point of `first`; None where the system does not tell."""
    status = Path("/proc/self/status")
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the highest point begins anew
    except OSError:
        first()
        return None

    def highest() -> int:
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024

    before = highest()
    first()
    return highest() - before


def operators(file: Path, images: Tensor, sizes: Tensor) -> dict[str, float]:
    """ONNX Runtime's own account: operator -> share of the time of all, the longest first."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    options.enable_profiling = True
    options.profile_file_prefix = str(file.with_suffix(""))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    for _ in range(PROFILED):
        session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
    seconds: dict[str, float] = defaultdict(float)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seconds[event["args"]["op_name"]] += event["dur"]
    whole = sum(seconds.values())
    return {name: own / whole for name, own in sorted(seconds.items(), key=lambda item: -item[1])}
