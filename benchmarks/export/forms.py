"""Forms in which one layer of a deformable encoder can be exported, in ONNX Runtime and OpenVINO.

Its attention without the linear layers, and its feed-forward layer: 256 channels, eight heads, four levels. The forms
take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
import torch.nn.functional as F
from codetr.kernels.msda import (
    deformable_attention,
    deformable_attention_gathered,
    deformable_attention_reference,
    deformable_attention_sampled,
)
from torch import Tensor, nn

from benchmarks import report
from codetr.exporting.formats import tidy
from codetr.exporting.graph import traceable
from codetr.ops.export_form import for_onnx

HEADS, WIDTH, POINTS, FFN = 8, 32, 4, 2048
STRIDES = (8, 16, 32, 64)


def one_map(
    value: Tensor, shapes: Sequence[tuple[int, int]], reference: Tensor, offsets: Tensor, logits: Tensor, _: Tensor
) -> Tensor:
    """All levels below one another on one map, with a row of zeros between, for a single `grid_sample`. Of points."""
    batch, _, heads, _ = value.shape
    levels, points = offsets.shape[3:5]
    high, wide = sum(h + 1 for h, _ in shapes), max(w for _, w in shapes)
    parts = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in shapes], -1)
    maps = [
        F.pad(part.unflatten(-1, shape), (0, wide - shape[1], 0, 1)) for part, shape in zip(parts, shapes, strict=True)
    ]
    starts = np.cumsum([0, *(h + 1 for h, _ in shapes[:-1])])

    def rows(numbers: Any) -> Tensor:
        return torch.as_tensor(numbers).float().view(levels, 1, 2).expand(heads, levels, points, 2).flatten()

    sizes = torch.tensor([(w, h) for h, w in shapes]).float()
    repeat = torch.eye(levels * 2).view(-1, 1, levels, 1, 2).expand(-1, heads, levels, points, 2).flatten(1)
    places = (reference * sizes - 0.5).flatten(2) @ repeat + offsets.flatten(2)
    places = places.clamp(min=-1).minimum(rows(sizes))
    scale = torch.tensor([2 / wide, 2 / high])
    shift = torch.tensor([(0.5, start + 0.5) for start in starts.tolist()]) * scale - 1
    grid = places * rows(scale.expand(levels, 2)) + rows(shift)
    grid = grid.view(batch, -1, heads, levels * points, 2).permute(0, 2, 3, 1, 4).flatten(0, 1)
    weights = logits.flatten(3).softmax(-1).permute(0, 2, 3, 1).flatten(0, 1)
    seen = F.grid_sample(torch.cat(maps, 2), grid, padding_mode="zeros", align_corners=False)
    return (seen * weights[:, None]).sum(-2).unflatten(0, (batch, heads)).permute(0, 3, 1, 2).flatten(2)


class Attention(nn.Module):
    def __init__(self, form: Callable[..., Tensor], shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.form, self.shapes = form, shapes

    def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        return self.form(value, self.shapes, reference, offsets, logits, valid)


def attention_inputs(shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Noise, no padding; places all over the image, which caches help less with than with those of a detector."""
    torch.manual_seed(0)
    cells, levels = sum(h * w for h, w in shapes), len(shapes)
    centres = torch.rand(1, cells, levels, 2)
    offsets = torch.randn(1, cells, HEADS, levels, POINTS, 2) * 2
    value, logits = torch.randn(1, cells, HEADS, WIDTH), torch.randn(1, cells, HEADS, levels, POINTS)
    return value, centres, offsets, logits, torch.tensor([shapes], dtype=torch.int32)


class Rows(nn.Module):
    """Layers on one long axis of rows, whose linear ones become Gemm."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.layers(tokens.flatten(0, 1))
        return found.unflatten(0, tokens.shape[:2])


def written(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Path:
    """As ONNX with a symbolic batch."""
    import onnx
    import onnx_ir

    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = tuple({0: batch} for _ in inputs)
    twice = tuple(torch.cat([one, one]) for one in inputs)  # one image would fix the batch
    with traceable(), for_onnx():
        traced = torch.export.export(module.eval(), twice, dynamic_shapes=shapes)
        names = [f"in{i}" for i in range(len(inputs))]
        program = torch.onnx.export(
            traced, twice, dynamo=True, opset_version=20, input_names=names, optimize=False, verbose=False
        )
    assert program is not None
    tidy(program.model)
    onnx.save(onnx_ir.to_proto(program.model), path)
    return path


def runs(path: Path, inputs: Sequence[Tensor]) -> dict[str, Callable[[], np.ndarray]]:
    """A file in each runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    arrays = {one.name: inputs[int(one.name.removeprefix("in"))].numpy() for one in session.get_inputs()}
    return {"ONNX Runtime": lambda: session.run(None, arrays)[0], "OpenVINO": lambda: compiled(arrays)[0]}


def measured(size: int, repeats: int) -> list[dict[str, Any]]:
    shapes = tuple((-(-size // stride), -(-size // stride)) for stride in STRIDES)
    attention, tokens = attention_inputs(shapes), (torch.randn(1, sum(h * w for h, w in shapes), HEADS * WIDTH),)
    forms = {
        "`grid_sample`, in PyTorch's order": deformable_attention_reference,
        "`grid_sample`, in whole rows": deformable_attention_sampled,
        "`grid_sample` once, all levels on one map": one_map,
        "gathers": deformable_attention_gathered,
    }
    layer = nn.Sequential(nn.Linear(HEADS * WIDTH, FFN), nn.ReLU(), nn.Linear(FFN, HEADS * WIDTH))
    cases: list[tuple[str, str, nn.Module, tuple[Tensor, ...]]] = [
        ("attention", name, Attention(form, shapes), attention) for name, form in forms.items()
    ]
    cases += [("feed-forward", "MatMul, Add", layer, tokens), ("feed-forward", "Gemm", Rows(layer), tokens)]
    eager = {
        "attention": lambda: deformable_attention(attention[0], shapes, *attention[1:]).numpy(),
        "feed-forward": lambda: layer(*tokens).numpy(),
    }
    taking: dict[tuple[str, str, str], Callable[[], np.ndarray]] = {}
    for part, run in eager.items():
        taking[part, "codetr's kernel" if part == "attention" else "PyTorch", "PyTorch"] = run
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for number, (part, name, module, inputs) in enumerate(cases):
            with torch.inference_mode(False):
                path = written(module, inputs, Path(folder) / f"{number}.onnx")
            for runtime, run in runs(path, inputs).items():
                taking[part, name, runtime] = run
        return timed(taking, eager, repeats)


def timed(
    taking: dict[tuple[str, str, str], Callable[[], np.ndarray]],
    eager: dict[str, Callable[[], np.ndarray]],
    repeats: int,
) -> list[dict[str, Any]]:
    """Milliseconds, in turns, and the largest difference from PyTorch's numbers. The first turn does not count."""
    taken: dict[tuple[str, str, str], list[float]] = {key: [] for key in taking}
    for _ in range(repeats + 1):
        for key, run in taking.items():
            begun = time.perf_counter()
            run()
            taken[key].append(1000 * (time.perf_counter() - begun))
    truth = {part: run() for part, run in eager.items()}
    return [
        {"part": part, "form": form, "runtime": runtime, "ms": median(taken[part, form, runtime][1:])}
        | {"difference": float(np.abs(run() - truth[part]).max())}
        for (part, form, runtime), run in taking.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=640, help="side of a square image in pixels")
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    rows = measured(options.size, options.repeat)
    cells = [[row["part"], row["form"], row["runtime"], f"{row['ms']:.1f}", f"{row['difference']:.0e}"] for row in rows]
    foot = (
        f"Medians of {options.repeat} runs in turns, of an image of {options.size} x {options.size}, float32, threads: "
        f"{torch.get_num_threads()}; `make bench NAME=export/forms`, {date.today()}, {report.machine()}."
    )
    report.write(
        "export_forms", f"{report.table(['part', 'form', 'runtime', 'ms', 'differs by'], cells)}\n\n{foot}", rows
    )


if __name__ == "__main__":
    main()
