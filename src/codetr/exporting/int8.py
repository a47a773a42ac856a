"""Eight bits: weights and activations rounded by ONNX Runtime's own tool, to ranges that the user's images showed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from codetr.errors import UserError
from codetr.inference import Model
from codetr.inference.about import About
from codetr.inference.sources import Images, Source, Unreadable, collate_items, find_sources

# Where int8 pays: most multiplications of a detector are in these.
ROUNDED_PARTS = ("backbone", "neck", "encoder")
# Of those what makes coordinates and their weights: 256 steps over an image of 1333 pixels are five pixels each.
KEPT_LAYERS = ("sampling_offsets", "attention_weights")
KEPT = (
    "in eight bits: convolutions and products with weights of backbone, neck and encoder. In float32: offsets and "
    "weights of deformable attention, normalisation, queries, decoder, heads: they make coordinates and the order of "
    "scores, which 256 steps are too coarse for, and are few multiplications"
)
ROUNDED_OPERATIONS = ("Conv", "MatMul", "Gemm")


def calibration_images(model: Model, wanted: Any, count: int) -> list[Source]:
    """Up to `count` images, spread evenly over those that `wanted` names.

    wanted: files, folders or patterns as for `codetr predict`, or "data": the images with which the checkpoint was
    trained. Raises UserError for names without a file.
    """
    if wanted is None:
        raise UserError(
            "precision=int8 needs images of the kind that the detector will see: calibration=FOLDER, or "
            "calibration=data for those with which the checkpoint was trained; about a hundred do"
        )
    if type(count) is not int or count < 1:
        raise UserError(f"calibration_images={count}: give a number of images, 100")
    if wanted == "data":
        wanted = model.config["data"].get("train_images")
        if not wanted or not Path(wanted).is_dir():
            raise UserError(f"calibration=data: the checkpoint's images ({wanted}) are not here; calibration=FOLDER")
    found = find_sources(wanted if isinstance(wanted, str) else list(wanted))
    places = np.linspace(0, len(found) - 1, min(count, len(found))).round().astype(int)
    return [found[place] for place in places]


def batches(model: Model, about: About, sources: Sequence[Source]) -> Iterator[dict[str, np.ndarray]]:
    """Each image as a batch of the graph, behind the checkpoint's resize. Raises UserError for one that cannot be."""
    images = Images(sources, model.transform)
    for i in track(range(len(images)), "calibration"):
        item = images[i]
        if isinstance(item, Unreadable):
            raise UserError(f"calibration: {item.reason}")
        batch = collate_items([item], model.size_divisor).batch
        assert batch is not None
        yield about.inputs(batch.images.numpy(), batch.frames.sizes.numpy(), model.path)


def rounded_nodes(model: Any) -> list[str]:
    """Names of the nodes that multiply with weights, in the parts that are rounded. model: of onnx."""
    weights = {one.name for one in model.graph.initializer}
    names = []
    for node in model.graph.node:
        module = node.name.split("/")[0].split(".")
        inside = len(module) > 1 and module[1] in ROUNDED_PARTS and not set(KEPT_LAYERS) & set(module)
        if inside and node.op_type in ROUNDED_OPERATIONS and len(node.input) > 1 and node.input[1] in weights:
            names.append(node.name)
    return names


def rounded(model: Any, inputs: Iterator[dict[str, np.ndarray]]) -> Any:
    """A model of onnx whose `rounded_nodes` take and give eight bits; all others stay in float32.

    Weights have seven bits, a scale per channel: processors without VNNI would overflow with eight. Ranges of
    activations are the least and the largest values seen. inputs: batches of the graph.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(inputs, None)

    said = model.metadata_props.add()  # that constants are folded, see `formats.tidy`
    said.key, said.value = "onnx.quant.pre_process", "onnxruntime.quant"
    with tempfile.TemporaryDirectory(prefix="codetr-int8-") as folder:
        path = Path(folder) / "model.onnx"
        quantize_static(
            model,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(ROUNDED_OPERATIONS),
            nodes_to_quantize=rounded_nodes(model),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)
