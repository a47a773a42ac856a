"""Checkpoints of other code into ours, official ones also back: `python -m codetr.convert source=FILE out=FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError
from codetr.files import atomically

if TYPE_CHECKING:
    from codetr.convert.names import NameTable
    from codetr.convert.official import Weights
    from codetr.models.detector import Detector
    from codetr.tensor_report import TensorReport

EXPERIMENTS = "experiment/official"


def convert(config: DictConfig) -> Path:
    """Writes and returns `out`. Raises UserError for a source that cannot be read or does not fit."""
    # Imported here, so that --help answers at once.
    from codetr.checkpoint import read

    application.require(config, source="co_dino_5scale_r50_1x_coco.pth", out="co_dino.ckpt")
    source, out = Path(config.source), Path(config.out)
    if out.exists() and not config.overwrite:
        raise UserError(f"out={out}: is there already; overwrite=true writes over it")
    content = read(source)
    made = _to_official(source, config) if "codetr" in content else _to_ours(content, source, config)
    _save(made, out)
    print(f"wrote {out}")
    return out


def _to_ours(content: dict[str, Any], source: Path, config: DictConfig) -> dict[str, Any]:
    from torch import Tensor

    from codetr.convert import backbone, huggingface

    state = content.get("state_dict", content.get("model", content))
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{source}: holds no named tensors")
    if not config.config:
        if model := huggingface.model(state):
            return _from_huggingface(state, model, source, config)
        if names := backbone.table(state):
            return _from_backbone(state, names, source, config)
    return _from_official(state, content.get("meta", {}), source, config)


def _from_official(state: Weights, about: dict[str, Any], source: Path, config: DictConfig) -> dict[str, Any]:
    from rich import print

    from codetr.convert import mmdet3, weights
    from codetr.convert.recognise import candidates, num_classes

    state = mmdet3.to_mmdet2(state)
    number = num_classes(state)
    found = [config.config] if config.config else candidates(state, official_configs(), source.stem)
    if len(found) > 1:
        print(f"[bold]{found[0]}[/bold]; the same tensors fit {', '.join(found[1:])}: config=NAME chooses")
    settings = [f"experiment=official/{found[0]}", f"model.num_classes={number}", *config.overrides]
    full = application.compose("train", settings)
    return _checkpoint(*weights.to_ours(state, build(full)), full, about, source, config)


def _from_huggingface(state: Weights, model: str, source: Path, config: DictConfig) -> dict[str, Any]:
    import json

    from codetr.convert import huggingface

    file = source.with_name("config.json")
    try:
        about = json.loads(file.read_text()) if file.is_file() else {}
        if not isinstance(about, dict):
            raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{file}: is no JSON ({error}); move it away, or take the one that belongs to {source.name}"
        ) from error
    settings = [*huggingface.settings(state, model, about), *config.overrides]
    print(f"{model} of transformers: {' '.join(settings)}")
    if not about:
        print(f"there is no {file}: heads and dilation, which weights do not show, are those of conf/ and overrides")
    full = application.compose("train", settings)
    result, report = huggingface.to_ours(state, model, build(full))
    names = huggingface.class_names(about)
    if len(names) == full.model.num_classes and None in names:
        result = huggingface.without_gaps(result, names)
        full.model.num_classes = len(names) - names.count(None)
        print(f"{names.count(None)} of {len(names)} labels are gaps without a name: left out")
    labels = [label for label, name in enumerate(names) if name is not None]  # there they are the data set's ids
    known = {"CLASSES": tuple(names[label] for label in labels), "CATEGORY_IDS": labels}
    return _checkpoint(result, report, full, known, source, config)


def _from_backbone(state: Weights, names: NameTable, source: Path, config: DictConfig) -> dict[str, Any]:
    """The backbone's tensors alone: what `initialise.checkpoint` needs."""
    import rich

    from codetr.convert import backbone, weights

    settings = [f"{key}={value}" for key, value in backbone.settings(names.rename(state)).items()]
    body = build(application.compose("train", [*settings, "model.num_classes=1"])).get_submodule("backbone.body")
    wanted = {f"backbone.body.{name}": shape for name, shape in weights.shapes(body).items()}
    result, report = weights.translate(state, names, wanted)
    rich.print(report.table(source))
    report.require_fit(source)
    settings += ["model.detector.backbone.pretrained=false", f"initialise.checkpoint={config.out}"]
    print(f"to start from it: python -m codetr.train {' '.join(settings)} initialise.strict=false")
    return {"state_dict": _prefixed(result)}


def _checkpoint(
    weights: Weights, report: TensorReport, full: DictConfig, about: dict[str, Any], source: Path, config: DictConfig
) -> dict[str, Any]:
    """What `out` will hold. about: what the source says of its classes."""
    from rich import print

    from codetr.convert.classes import category_ids, class_names

    print(report.table(source))
    report.require_fit(source)
    names = class_names(config.class_names, about, full.model.num_classes)
    ids = category_ids(config.class_names, about, names)
    known = {"class_names": list(names), "category_ids": None if ids is None else list(ids)}
    return {"state_dict": _prefixed(weights), "codetr": {"config": application.plain(full), **known}}


def _prefixed(weights: Weights) -> Weights:
    return {f"detector.{name}": tensor for name, tensor in weights.items()}


def _to_official(source: Path, config: DictConfig) -> dict[str, Any]:
    import torch
    from rich import print

    from codetr import trust
    from codetr.checkpoint import load_weights
    from codetr.convert import weights

    checkpoint = load_weights(source)
    if checkpoint.config is None:
        raise UserError(f"{source}: does not say which detector it belongs to; give a checkpoint of codetr.train")
    known = trust.parts(checkpoint.config, source, application.as_names(config.trust))
    with torch.device("meta"):
        detector = trust.build(known["model"].get("detector"), source)
    result, report = weights.to_official(checkpoint.weights, detector)
    print(report.table(source))
    report.require_fit(source)
    return {"state_dict": result, "meta": {"CLASSES": tuple(checkpoint.class_names or ())}}


def official_configs() -> list[str]:
    """Names of the official configurations that there are experiments for."""
    from importlib.resources import files

    folder = files(application.CONFIG_MODULE).joinpath(EXPERIMENTS)
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.startswith("co_"))


def build(config: DictConfig) -> Detector:
    """The detector of a whole configuration, without memory."""
    import torch
    from hydra.utils import instantiate

    config.model.detector.backbone.pretrained = False
    with torch.device("meta"):
        return instantiate(config.model.detector, _convert_="all")


def _save(content: dict[str, Any], out: Path) -> None:
    import torch

    with atomically(out) as part, part.open("wb") as file:
        torch.save(content, file)


def main() -> None:
    application.run(convert, config_name="convert")


if __name__ == "__main__":
    main()
