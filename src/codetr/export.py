"""A checkpoint as one file for other runtimes: `codetr export checkpoint=FILE format=onnx`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError

if TYPE_CHECKING:
    from codetr.exporting.graph import Canvas
    from codetr.inference import Model
    from codetr.inference.about import About

FORMATS = ("torch", "onnx", "openvino", "tensorrt", "triton")
PRECISIONS = ("fp32", "fp16", "int8")


def export(config: DictConfig) -> Path:
    """Returns the path of the file. Raises UserError for bad keys, and for what cannot be exported."""
    # Imported here, so that --help and --cfg answer at once.
    from codetr.exporting import formats
    from codetr.exporting.graph import Canvas, graph_of
    from codetr.inference.model import load_checkpoint
    from codetr.inference.runtimes import SUFFIXES

    application.require(config, checkpoint="outputs/train/<date>/checkpoints/best.ckpt")
    application.one_of(config, format=FORMATS, precision=PRECISIONS, weights=("ema", "raw"))
    if Path(config.checkpoint).suffix in SUFFIXES:
        raise UserError(f"{config.checkpoint} is exported already: give the checkpoint that it was made of")
    if type(config.compare) is not int or config.compare < 0:
        raise UserError(f"compare={config.compare}: give a number of images, 0 for none")
    form = formats.FORMATS[config.format]
    form.check(config.format, config.precision)
    if config.format != "torch":
        formats.check_opset(config.opset)
    out = _target(config, form.suffix)
    trust = application.as_names(config.trust)
    model = load_checkpoint(config.checkpoint, device="cpu", weights=config.weights, trust=trust)
    canvas = Canvas.of(model, _size(config.size), config.format)
    graph = graph_of(model, config.max_detections, config.precision)
    about = _about(config, model, canvas, graph.postprocess.max_detections)
    rounding = _rounding(config, model, about) if config.precision == "int8" else None
    form.write(formats.Work(graph, canvas, about, config.opset, rounding), out)
    print(_summary(config, about, out))
    if config.precision != "fp32" and config.compare:
        print(_comparison(config, out))
    return out


def _target(config: DictConfig, suffix: str) -> Path:
    checkpoint = Path(config.checkpoint)
    out = Path(config.out) if config.out is not None else Path(checkpoint.with_suffix(suffix).name)
    if out.suffix != suffix:
        ends = f"a file of format={config.format} ends in {suffix}" if suffix else "give a folder, without an ending"
        raise UserError(f"out={out}: {ends}")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} is there already; overwrite=true writes over it")
    return out


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise UserError(f"size={list(size)}: give height and width in pixels, size=[800,1344]")
    return size[0], size[1]


def _about(config: DictConfig, model: Model, canvas: Canvas, max_detections: int) -> About:
    from codetr.inference.about import FORM, About

    return About(
        form=FORM,
        class_names=model.class_names,
        category_ids=model.category_ids,
        size_divisor=canvas.divisor,
        least_side=canvas.least,
        size=canvas.size,
        precision=config.precision,
        max_detections=max_detections,
        score_threshold=config.score_threshold,
        step=model.step,
        config={name: model.config[name] for name in ("postprocess", "data", "views") if name in model.config},
    )


def _rounding(config: DictConfig, model: Model, about: About) -> Any:
    from codetr.exporting import int8

    images = int8.calibration_images(model, application.plain(config)["calibration"], config.calibration_images)
    print(f"int8: ranges of {len(images)} images; {int8.KEPT}")
    return partial(int8.rounded, inputs=int8.batches(model, about, images))


def _summary(config: DictConfig, about: About, out: Path) -> str:
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in {*files, *out.parent.glob(f"{out.stem}.bin")}) / 1e6
    sides = "x".join(map(str, about.size)) if about.size else f"any multiple of {about.size_divisor}"
    from_ = f", from {about.least_side} pixels on" if not about.size else ""
    lines = [f"{out}: {size:.1f} MB, {config.precision}; height and width {sides}{from_}"]
    if config.format == "tensorrt":
        lines.append(_trtexec(out, about))
    return "\n".join(lines)


def _trtexec(out: Path, about: About) -> str:
    """The command that builds a plan on a machine with TensorRT."""

    def shapes(batch: int, side: int) -> str:
        height, width = about.size or (side, side)
        return f"images:{batch}x3x{height}x{width},sizes:{batch}x2"

    side = -(-1344 // about.size_divisor) * about.size_divisor
    given = f"--minShapes={shapes(1, about.least_side)} --optShapes={shapes(1, side)} --maxShapes={shapes(8, side)}"
    return f"trtexec --onnx={out} --saveEngine={out.with_suffix('.plan')} --stronglyTyped {given}"


def _comparison(config: DictConfig, out: Path) -> str:
    """AP and speed of the checkpoint and of the file; where the checkpoint's data set is not here, how to get them."""
    from codetr.before_after import compare

    file = out / "1" / "model.onnx" if config.format == "triton" else out
    try:
        return compare(config, file)
    except UserError as error:
        return (
            f"warning: what precision={config.precision} costs is not known: {error}. Give a data set, data=custom "
            f"data.val_images=... data.val_annotations=..., or evaluate: codetr eval checkpoint={file}"
        )


def main() -> None:
    application.run(export, config_name="export")


if __name__ == "__main__":
    main()
