"""What a configuration that comes out of a file may build: named parts of codetr, and what the user allows by name.

Hydra calls whatever `_target_` names, with the arguments beside it. A checkpoint, or the directory of a run, is often
somebody else's: here it is looked through, all of it, before anything is built (`parts`, then `build`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from codetr.errors import UserError
from codetr.names import shown

CONFIG_MODULE = "codetr.conf"
# Parts of a checkpoint's configuration that are built from it, and the folders of conf/ that they are made of.
_log = logging.getLogger(__name__)
PARTS = ("model", "criterion", "postprocess", "optimizer", "schedule", "data")
OPTIONAL = ("views",)  # null in most
_OF_MODEL, _OF_DATA = (*PARTS[:-1], *OPTIONAL), ("data", "augment")
# Makes files, where and as many as the file says; a checkpoint's data is read, not made.
_PREPARE = "prepare"
# Among `arguments` of a backbone those by which timm reads files or fetches weights.
_WEIGHTS = re.compile("pretrained|checkpoint_path|cache_dir")
# Of torchvision.transforms.v2, besides those in conf/.
_TRANSFORMS = [
    "CenterCrop",
    "GaussianBlur",
    "GaussianNoise",
    "Grayscale",
    "Identity",
    "Pad",
    "RandomAdjustSharpness",
    "RandomAffine",
    "RandomApply",
    "RandomAutocontrast",
    "RandomChannelPermutation",
    "RandomChoice",
    "RandomCrop",
    "RandomEqualize",
    "RandomErasing",
    "RandomGrayscale",
    "RandomInvert",
    "RandomIoUCrop",
    "RandomOrder",
    "RandomPerspective",
    "RandomPosterize",
    "RandomResize",
    "RandomRotation",
    "RandomSolarize",
    "RandomVerticalFlip",
    "RandomZoomOut",
    "SanitizeBoundingBoxes",
    "ScaleJitter",
]
_PLAIN = (str, int, float, bool, type(None))
_MOST, _DEEPEST = 100_000, 60  # nodes and levels; the largest configuration of conf/ has about 700 and 10
_REFERENCE = re.compile(r"\$\{[\w.]+\}")
_RESOLVER = re.compile(r"\$\{[\w.]+:[^{}]*\}")
_AWAY = re.compile(r"^[/~\\]|^[A-Za-z]:\\|://|(^|/)\.\.(/|$)")  # a path or an address outside of the run


def parts(config: Any, source: Path | str, trust: Sequence[str] = (), names: Sequence[str] = PARTS) -> dict[str, Any]:
    """Of a checkpoint's configuration what may be built, as a copy: a backbone fetches no weights, data is not made.

    names: of the parts, `data` among them. trust: further targets by name, or packages whose classes and functions are
    allowed. Raises UserError for anything else that would be called, for values that are resolved only when they are
    used, and for what is no configuration.
    """
    if type(config) is not dict:
        raise UserError(f"{source}: its configuration is no mapping; give a checkpoint of codetr.train")
    if missing := [name for name in names if type(config.get(name)) is not dict]:
        raise UserError(f"{source}: its configuration has no {missing[0]}; give a checkpoint of codetr.train")
    if type(config.get("tiles")) is dict:
        _log.warning(
            "%s was trained with `tiles`, which are views now, and looks at whole images unless you say: views=tiles "
            "views.tiles.size=%s, in pixels of the image",
            source,
            _short(config["tiles"].get("size")),
        )
    found = {name: config[name] for name in (*names, *OPTIONAL) if config.get(name) is not None}
    found["data"] = found["data"] | {_PREPARE: None, "cache": None}
    for name, part in found.items():
        allowed = _targets(_OF_DATA if name == "data" else _OF_MODEL)
        for key, node in _nodes(part, name, source):
            _check(node, key, source, allowed, trust)
            if type(node) is str and "${" in node:
                raise UserError(f"{source}: {shown(key)} is {_short(node)}: files hold values, not interpolations")
    return _without_weights(found)


def build(part: Any, source: str | Path) -> Any:
    """The object that one of the `parts` of a configuration describes.

    source: the file that it comes from, for messages. Raises UserError for a part that says nothing that can be built.
    """
    from hydra.utils import instantiate

    try:
        made = instantiate(part, _convert_="all")
    except Exception as error:  # whatever the constructors raise at what is in the file
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise UserError(f"{source}: {cause}") from error
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise UserError(f"{source}: its configuration cannot be built ({reason})") from error
    if made is None or isinstance(made, (dict, list)):
        raise UserError(f"{source}: its configuration names nothing to build; give a checkpoint of codetr.train")
    return made


def check_run(path: Path, trust: Sequence[str] = ()) -> None:
    """Raises UserError unless the configuration of a run at `path` may be used: it calls only what conf/ calls,
    resolves only what conf/ resolves, and its loggers and callbacks stay in the directory of the run."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = shown((str(error) or type(error).__name__).splitlines()[0])
        raise UserError(f"{path}: cannot be read ({reason}); take a copy of the run") from error
    if type(config) is not dict:
        raise UserError(f"{path}: is no configuration; give the directory of a run")
    # Hydra obeys these in a file of its search path; it writes neither into the configuration of a run.
    if (more := [k for k in ("defaults", "hydra") if k in config]) or "@package" in path.read_text(encoding="utf-8"):
        what = more[0] if more else "@package"
        raise UserError(f"{path}: has {what}, which no run of codetr writes: restore the file")
    allowed, expressions = _targets(None), _expressions()
    for key, node in _nodes(config, "", path):
        _check(node, key, path, allowed, trust)
        if type(node) is not str:
            continue
        left = _RESOLVER.sub(lambda m: "" if m[0] in expressions else m[0], node)
        if "${" in _REFERENCE.sub("", left):
            raise UserError(f"{path}: {shown(key)} is {_short(node)}, which conf/ does not resolve: write the value")
        if key.split(".")[0] in ("logger", "callbacks", "trainer") and _AWAY.search(node) and node not in trust:
            raise UserError(
                f"{path}: {shown(key)} is {_short(node)}, outside of the run; if that is meant: trust=['{shown(node)}']"
            )


def _check(node: Any, key: str, source: Path | str, allowed: Collection[str], trust: Sequence[str]) -> None:
    if type(node) is not dict or "_target_" not in node:
        return
    target = node["_target_"]
    if type(target) is not str or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise UserError(f"{source}: {shown(key)}._target_ is {_short(target)}, which is no name of a class")
    if target not in allowed and not _is_trusted(target, trust):
        raise UserError(
            f"{source}: {shown(key)}._target_ is {target}, which is no part of a detector of codetr. It would run "
            f"code: only if you know who made the file, allow it by name: trust=[{target}]"
        )
    if "_args_" in node and target in _targets(_OF_MODEL) | _targets(_OF_DATA):
        raise UserError(f"{source}: {shown(key)} has _args_: its arguments need their names")
    arguments = node.get("arguments")
    for name in arguments if type(arguments) is dict and target in allowed else ():
        if _WEIGHTS.match(str(name)):
            raise UserError(f"{source}: {shown(key)}.arguments.{shown(name)} would read other files: remove it")


def _is_trusted(target: str, trust: Sequence[str]) -> bool:
    """Whether it is named, or defined (not only imported) in a package that is: my_package.torch.load is torch's."""
    if target in trust:
        return True
    packages = [name for name in trust if target.startswith(f"{name}.")]
    if not packages or "__" in target:
        return False
    from hydra.errors import HydraException
    from hydra.utils import get_object

    try:
        home = getattr(get_object(target), "__module__", None)
    except HydraException as error:
        raise UserError(f"{target} cannot be imported ({shown(str(error).splitlines()[0])}): install it") from error
    return any(home == name or str(home).startswith(f"{name}.") for name in packages)


def _nodes(root: Any, name: str, source: Path | str) -> Iterator[tuple[str, Any]]:
    """(key path, node) of a tree of plain containers and values. Raises UserError for anything else in it."""
    waiting, count = [(name, root, 0)], 0
    while waiting:
        key, node, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST:
            raise UserError(f"{source}: its configuration is nested too deeply or too large; it is none of codetr's")
        if type(node) is dict:
            waiting += [(f"{key}.{k}".lstrip("."), child, depth + 1) for k, child in node.items()]
        elif type(node) in (list, tuple):
            waiting += [(f"{key}[{i}]", child, depth + 1) for i, child in enumerate(node)]
        elif type(node) not in _PLAIN:
            raise UserError(f"{source}: {shown(key)} is a {type(node).__name__}; a configuration holds plain values")
        yield key, node


def _without_weights(node: Any) -> Any:
    """A copy whose backbones, wherever they are, fetch no pretrained weights: those of the file follow."""
    if isinstance(node, dict):
        return {k: False if k == "pretrained" else _without_weights(v) for k, v in node.items()}
    return [_without_weights(v) for v in node] if isinstance(node, (list, tuple)) else node


def _short(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@cache
def _targets(folders: tuple[str, ...] | None) -> frozenset[str]:
    """Every `_target_` below these folders of conf/, except what makes files; None: everywhere, and that too."""
    root = files(CONFIG_MODULE)
    trees = [root] if folders is None else [root / folder for folder in folders]
    found = {f"torchvision.transforms.v2.{name}" for name in _TRANSFORMS} if folders != _OF_MODEL else set()
    for file in (f for tree in trees for f in _yaml_files(tree)):
        waiting = [yaml.safe_load(file.read_text(encoding="utf-8"))]
        while waiting:
            node = waiting.pop()
            if isinstance(node, dict):
                waiting += [v for k, v in node.items() if folders is None or k != _PREPARE]
                found |= {node["_target_"]} if "_target_" in node else set()
            elif isinstance(node, list):
                waiting += node
    return frozenset(found)


@cache
def _expressions() -> frozenset[str]:
    """Every resolver with its arguments in conf/: `${now:%Y-%m-%d}`."""
    texts = (file.read_text(encoding="utf-8") for file in _yaml_files(files(CONFIG_MODULE)))
    return frozenset(match for text in texts for match in _RESOLVER.findall(text))


def _yaml_files(folder: Traversable) -> Iterator[Traversable]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _yaml_files(entry)
        elif entry.name.endswith(".yaml"):
            yield entry
