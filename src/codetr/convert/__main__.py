"""Checkpoints of the official Co-DETR into ours and back: `python -m codetr.convert source=FILE out=FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from codetr import application
from codetr.errors import UserError

if TYPE_CHECKING:
    from codetr.models.detector import Detector

EXPERIMENTS = "experiment/official"


def convert(config: DictConfig) -> Path:
    """Writes and returns `out`. Raises UserError for a source that cannot be read or does not fit."""
    # Imported here, so that --help answers at once.
    from codetr.checkpoint import read
    from codetr.inference import require

    require(config, source="co_dino_5scale_r50_1x_coco.pth", out="co_dino.ckpt")
    source, out = Path(config.source), Path(config.out)
    if out.exists() and not config.overwrite:
        raise UserError(f"out={out}: is there already; overwrite=true writes over it")
    content = read(source)
    made = _to_official(content, source) if "codetr" in content else _to_ours(content, source, config)
    _save(made, out)
    print(f"wrote {out}")
    return out


def _to_ours(content: dict[str, Any], source: Path, config: DictConfig) -> dict[str, Any]:
    from rich import print

    from codetr.convert import mmdet3, weights
    from codetr.convert.classes import class_names
    from codetr.convert.recognise import candidates, num_classes

    state = mmdet3.to_mmdet2(content.get("state_dict", content))
    number = num_classes(state)
    found = [config.config] if config.config else candidates(state, official_configs(), source.stem)
    if len(found) > 1:
        print(f"[bold]{found[0]}[/bold]; the same tensors fit {', '.join(found[1:])}: config=NAME chooses")
    settings = [f"experiment=official/{found[0]}", f"model.num_classes={number}", *config.overrides]
    full = application.compose("train", settings)
    result = weights.to_ours(state, build(full))
    print(result.table())
    result.settle(str(source))
    names = class_names(config.class_names, content.get("meta", {}), number)
    return {
        "state_dict": {f"detector.{name}": tensor for name, tensor in result.weights.items()},
        "codetr": {"config": application.plain(full), "class_names": list(names)},
    }


def _to_official(content: dict[str, Any], source: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from rich import print

    from codetr.checkpoint import load_weights
    from codetr.convert import weights

    checkpoint = load_weights(source)
    if checkpoint.config is None:
        raise UserError(f"{source}: does not say which detector it belongs to; give a checkpoint of codetr.train")
    result = weights.to_official(checkpoint.weights, build(OmegaConf.create(checkpoint.config)))
    print(result.table())
    result.settle(str(source))
    return {"state_dict": result.weights, "meta": {"CLASSES": tuple(checkpoint.class_names or ())}}


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

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    torch.save(content, partial)
    partial.replace(out)


def main() -> None:
    application.run(convert, config_name="convert")


if __name__ == "__main__":
    main()
