"""A whole training step of an experiment: time, peak memory, where the time goes, and where the host waits.

By default Co-DINO R50, 800 x 1333, batch 2, bfloat16; another one is, for example,
`--experiment dino_r50_12e --batch 4 model.detector.encoder.checkpointed_layers=6`.

Forward, losses, backward, clipping and the optimizer, on random images and objects with random weights. Steps with the
default implementation of deformable attention alternate with steps with its reference (CODETR_MSDA=reference).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.progress import track
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import codetr.criterion
from benchmarks import report
from codetr.types import Frames, Targets

SOURCE = Path(codetr.criterion.__file__).parent
EXPERIMENT = "official/co_dino_5scale_r50_1x_coco"
CLASSES, WARMUP, PROFILED, TOP = 80, 3, 3, 25
IMPLEMENTATIONS = {"default": "", "reference": "reference"}  # CODETR_MSDA
# Parts of the model, each with what lies in it; the backward pass is what is left of the whole.
PARTS = ("backbone", "neck", "encoder", "adapter", "heads", "queries", "decoder", "criterion", "optimizer")
MATCHING = "matching (in criterion)"
# The first that is found in a kernel's (on a CPU, an operator's) name.
KINDS = {
    "deformable attention": r"msda|deform|grid_sample",
    "copies": r"memcpy|memset|copy_|::copy|_to_copy|direct_copy|CatArray|::cat\b",
    "optimizer": r"multi_tensor|adam|foreach",
    "regions and suppression": r"roi_align|nms",
    "attention": r"flash|fmha|attention|sdp",
    "convolutions": r"conv|cudnn|implicit|wgrad|dgrad|fprop",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|mm\b|bmm|linear",
    "norms": r"norm",
    "sorting": r"sort|topk|scan|radix",
    "indexing": r"index|gather|scatter|embedding",
    "reductions": r"reduce|sum|amax|softmax",
    "elementwise": r"elementwise|vectorized|::(add|mul|div|sub|where|clamp|sigmoid|relu|threshold)",
}


class Step:
    """One model with its optimizer and one batch; calling it trains once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        overrides = [f"experiment={options.experiment}", "model.detector.backbone.pretrained=false"]
        with initialize_config_module("codetr.conf", version_base="1.3"):
            config = compose("train", [*overrides, f"model.num_classes={CLASSES}", *options.overrides])
        torch.manual_seed(0)
        self.detector: nn.Module = instantiate(config.model.detector, _convert_="all").to(self.device)
        self.criterion = instantiate(config.criterion)
        self.optimizer = instantiate(config.optimizer)(self.detector, fused=True)
        self.clip, self.autocast = config.trainer.gradient_clip_val, options.precision == "bf16-mixed"
        self._draw(options.batch, *options.size, objects=options.objects, classes=config.model.num_classes)
        self._name_parts()

    def _draw(self, batch: int, height: int, width: int, objects: int, classes: int) -> None:
        """All images but the first are an eighth less wide, and padded."""
        sizes = torch.tensor([[height, width], *[[height, width - width // 8]] * (batch - 1)])
        boxes = torch.cat([torch.rand(batch, objects, 2) * 0.6 + 0.2, torch.rand(batch, objects, 2) * 0.3 + 0.05], -1)
        valid = torch.arange(objects) < torch.tensor([objects, *[max(1, objects - 3)] * (batch - 1)])[:, None]
        targets = Targets(boxes, torch.randint(classes, (batch, objects)), valid, Frames.unscaled(sizes))
        images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8)
        padding = torch.arange(width).expand(batch, height, -1) >= sizes[:, 1, None, None]
        self.inputs = [x.to(self.device) for x in (images, padding, targets)]

    def _name_parts(self) -> None:
        for name, module in self.detector.named_children():
            for child in module.children() if isinstance(module, nn.ModuleDict) else [module]:
                child.forward = named(name, child.forward)
        codetr.criterion.match = named(MATCHING, codetr.criterion.match)  # type: ignore[assignment]

    def __call__(self) -> None:
        images, padding, targets = self.inputs
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.detector(images, padding, targets)
            with record_function("criterion"):
                loss = torch.stack(list(self.criterion(output, targets).values())).sum()
        loss.backward()
        with record_function("optimizer"):
            if self.clip:
                nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def named(name: str, function: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return call


def choose(implementation: str) -> None:
    os.environ["CODETR_MSDA"] = IMPLEMENTATIONS[implementation]


def timed(step: Step, steps: int) -> dict[str, dict[str, float]]:
    """Per implementation, alternating: the median of its steps, and its peak memory (of a GPU)."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
    peak = dict.fromkeys(IMPLEMENTATIONS, 0.0)
    for number in track(range(steps + WARMUP), "Steps"):
        for name in IMPLEMENTATIONS:
            choose(name)
            step.synchronize()
            if step.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step()
            step.synchronize()
            if number >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
            if step.device.type == "cuda":
                peak[name] = torch.cuda.max_memory_allocated() / 2**30
    return {name: {"step_ms": statistics.median(seconds[name]) * 1e3, "peak_gb": peak[name]} for name in seconds}


def host_waits(step: Step) -> list[list[Any]]:
    """[times in a step, file, function], innermost of codetr's, where torch warns that a call waits; on a GPU."""
    if step.device.type != "cuda":
        return []
    places: Counter[tuple[str, str]] = Counter()

    def show(message: Warning | str, *_: object) -> None:
        if "synchronizing" in str(message):
            frames = [frame for frame in traceback.extract_stack() if SOURCE in Path(frame.filename).parents]
            file = str(Path(frames[-1].filename).relative_to(SOURCE)) if frames else "outside of codetr, or backward"
            places[file, frames[-1].name if frames else ""] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    step.synchronize()
    return [[count, *place] for place, count in places.most_common()]


def profiled(step: Step) -> dict[str, Any]:
    """Of a step, in milliseconds of the device: the whole, its parts, kinds of kernels, the longest kernels."""
    cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED):
            step()
        step.synchronize()
    rows = profiler.key_averages()
    own, whole = ("self_device_time_total", "device_time_total") if cuda else ("self_cpu_time_total", "cpu_time_total")
    device = DeviceType.CUDA if cuda else DeviceType.CPU
    labels = {*PARTS, MATCHING}

    def ms(microseconds: float) -> float:
        return microseconds / PROFILED / 1e3

    kernels = {}
    for row in rows:
        if row.device_type == device and row.key not in labels and not row.is_user_annotation and getattr(row, own) > 0:
            kernels[row.key] = [ms(getattr(row, own)), row.count / PROFILED]
    total = sum(time for time, _ in kernels.values())
    found = {r.key: ms(getattr(r, whole)) for r in rows if r.key in labels and r.device_type == DeviceType.CPU}
    parts = {name: found[name] for name in PARTS if name in found}
    parts["backward, and what lies between"] = total - sum(parts.values())
    kinds: Counter[str] = Counter()
    for name, (time_, _) in kernels.items():
        kinds[kind_of(name)] += time_  # type: ignore[assignment]
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    runtime = [r for r in rows if re.fullmatch(r"cuda(Stream|Device|Event)Synchronize|Memcpy DtoH.*", r.key)]
    return {
        "busy_ms": total,
        "parts_ms": {**parts, MATCHING: found.get(MATCHING, 0.0)},
        "kinds_ms": dict(kinds.most_common()),
        "kernels": [[name, *numbers] for name, numbers in longest],
        "calls": {r.key: r.count / PROFILED for r in runtime},
    }


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def surroundings(device: torch.device) -> dict[str, str]:
    versions = {name: version(name) for name in ("torch", "torchvision", "triton", "numba")}
    where = {"device": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
        where = {"device": torch.cuda.get_device_name(), "driver": driver[0] if driver else "unknown"}
    return where | versions


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def markdown(result: dict[str, Any]) -> str:
    base = result["steps"]["reference"]["step_ms"]
    rows = []
    for name, numbers in result["steps"].items():
        times, busy = base / numbers["step_ms"], result["profiles"][name]["busy_ms"] / numbers["step_ms"]
        cells = [f"{numbers['peak_gb']:.2f}", f"{busy:.0%}"] if numbers["peak_gb"] else ["", ""]
        rows.append([name, f"{numbers['step_ms']:.1f}", f"{times:.2f}", *cells])
    own = result["profiles"]["default"]

    def share(ms: float) -> list[str]:
        return [f"{ms:.2f}", f"{ms / own['busy_ms']:.1%}"]

    kernels = [[f"`{name[:90].replace('|', ' ')}`", *share(ms), f"{calls:g}"] for name, ms, calls in own["kernels"]]
    waits = [[f"{file} {function}", str(count)] for count, file, function in result["waits"]]
    waits += [[f"`{call}`, counted by the profiler", f"{count:g}"] for call, count in own["calls"].items()]
    tables = [
        report.table(["deformable attention", "step, ms", "times faster", "peak memory, GB", "device busy"], rows),
        *(
            report.table([title, "ms", "share"], [[name, *share(ms)] for name, ms in own[key].items()])
            for title, key in (("part of the model, forward", "parts_ms"), ("kind of kernel", "kinds_ms"))
        ),
        report.table([f"the {len(kernels)} longest kernels", "ms", "share", "calls"], kernels),
        report.table(["the host waits in", "times a step"], waits),
    ]
    about = ", ".join(f"{key} {value}" for key, value in result["surroundings"].items())
    about = f"Medians of {result['repeats']} alternating steps; {result['date']}, {about}."
    about += f" Implementations: {'; '.join(result['log']) or 'unknown'}. `{result['command']}`"
    return "\n\n".join([*tables, about])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--experiment", default=EXPERIMENT, help=f"of conf/experiment (default: {EXPERIMENT})")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--batch", type=int, default=2, help="images per step (default: 2)")
    parser.add_argument("--objects", type=int, default=20, help="per image (default: 20)")
    parser.add_argument("--steps", type=int, default=20, help=f"measured, after {WARMUP} to warm up (default: 20)")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("overrides", nargs="*", help="of the composed configuration, as for codetr.train")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu")
    return options


class Heard(logging.Handler):
    """What codetr says of its choice of an implementation."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    options, heard = parsed(), Heard()
    log = logging.getLogger("codetr.ops.choice")
    log.addHandler(heard)
    log.setLevel(logging.INFO)
    step = Step(options)
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": " ".join(sys.argv),
        "surroundings": surroundings(step.device),
        "repeats": options.steps,
        "steps": timed(step, options.steps),
        "profiles": {},
    }
    for name in IMPLEMENTATIONS:
        choose(name)
        result["profiles"][name] = profiled(step)
    choose("default")
    result |= {"waits": host_waits(step), "log": heard.messages}
    report.write("training_step" if options.device == "cuda" else "training_step_cpu", markdown(result), result)
