"""Checkpoints of a stranger: each is refused in one line, and nothing in it runs or is written."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from hydra.utils import instantiate

import codetr
from codetr.application import compose, plain
from codetr.errors import UserError
from codetr.trust import PARTS, check_run, parts

CANARY = "CODETR_CANARY"
TOUCH = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["canary"]}}
SIZES = ["model=co_deformable_tiny", "model.width=16", "model.num_heads=2", "model.ffn_width=16", "model.norm_groups=4"]


@pytest.fixture(scope="module")
def honest() -> dict[str, Any]:
    """What `codetr.train` writes, of a detector of toy size."""
    data = ["data=custom", "augment@data=small", "data.train_annotations=t.json", "data.val_annotations=v.json"]
    given = [*SIZES, *data, "model.num_classes=2", "run_dir=nowhere", "model.detector.backbone.pretrained=false"]
    config = plain(compose("train", given))
    detector = instantiate(config["model"]["detector"], _convert_="all")
    weights = {f"detector.{name}": value for name, value in detector.state_dict().items()}
    about = {"config": config, "class_names": ["cat", "dog"], "category_ids": [1, 2]}
    return {"state_dict": weights, "codetr": about, "global_step": 3}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(CANARY, raising=False)


def put(content: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of the checkpoint whose configuration has `value` at the dotted `key`."""
    config = copy.deepcopy(content["codetr"]["config"])
    *path, last = key.split(".")
    node = config
    for name in path:
        node = node[name]
    node[last] = value
    return content | {"codetr": content["codetr"] | {"config": config}}


def called(target: Any, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def deep(levels: int) -> Any:
    node: Any = 1
    for _ in range(levels):
        node = [node]
    return node


# What a configuration says that Hydra would do.
CONFIGURATIONS: dict[str, tuple[str, Any]] = {
    "a shell command": ("model.detector", called("os.system", command="touch canary")),
    "torch.load with pickles": ("model.detector.backbone", called("torch.load", f="x", weights_only=False)),
    "numpy.load": ("postprocess", called("numpy.load", file="x", allow_pickle=True)),
    "open": ("model.detector.neck", called("builtins.open", file="canary", mode="w")),
    "a hub": ("model.detector.encoder", called("torch.hub.load", repo_or_dir="a/b", model="c")),
    "a log file": ("criterion", called("logging.FileHandler", filename="canary")),
    "an address": ("schedule", called("urllib.request.urlopen", url="http://localhost:9")),
    "deep inside": ("model.detector.decoder.layer.cross_attention", TOUCH),
    "in a list": ("model.detector.extra", [1, [2, {"a": TOUCH}]]),
    "partial": ("optimizer", {**called("os.system", command="touch canary"), "_partial_": True}),
    "positional arguments": ("postprocess", called("os.putenv", _args_=[CANARY, "1"])),
    "in the arguments of an allowed part": ("postprocess.suppression", TOUCH),
    "a walk over attributes": ("model.detector.backbone", called("codetr.models.backbone.torch.load", f="x")),
    "a module's builtins": ("criterion", called("codetr.errors.__builtins__.exec", source="x")),
    "a codetr function that writes": ("criterion", called("codetr.shapes.generate", root="canary")),
    "a codetr method": ("model.detector", called("codetr.checkpoint.read", path="x")),
    "hydra's own call": ("model.detector", called("hydra.utils.call", config=TOUCH)),
    "a target that is a list": ("model.detector", called(["os", "system"])),
    "a target that is a number": ("criterion", called(7)),
    "a target with a line break": ("criterion", called("os.system\n")),
    "a resolver": ("model.width", "${oc.env:HOME}"),
    "a decoder": ("data.val_transform", "${oc.decode:'{_target_: os.system}'}"),
    "a reference": ("postprocess.max_detections", "${model.width}"),
    "timm reading a file": ("model.detector.backbone.arguments", {"checkpoint_path": "x"}),
    "timm's overlay": ("model.detector.backbone.arguments", {"pretrained_cfg_overlay": {"file": "x"}}),
    "positional arguments of an allowed part": ("postprocess._args_", [1]),
    "deep nesting": ("model.extra", deep(100)),
    "an endless list": ("data.extra", [0] * 200_000),
    "no mapping": ("model", "detector"),
    "no model": ("model.detector", None),
    "a detector that is a list": ("model.detector", [1]),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_a_configuration_that_calls_something_else_is_refused(
    kind: str, honest: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(put(honest, *CONFIGURATIONS[kind]), tmp_path / "best.ckpt")
    refused(lambda: codetr.load("best.ckpt"), tmp_path)


def refused(act: Callable[[], Any], folder: Path) -> None:
    """With a sentence that names the file, on few lines without control characters, and nothing else in the folder."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        act()
    text = str(error.value)
    assert "best.ckpt" in text
    assert len(text) < 1000
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert CANARY not in os.environ


def test_the_honest_one_loads(honest: dict[str, Any], tmp_path: Path) -> None:
    """Also where it was trained with weights from the hub, and makes its data: neither happens here."""
    content = put(honest, "model.detector.backbone.pretrained", True)
    content = put(content, "data.prepare", TOUCH)
    torch.save(content, "best.ckpt")
    model = codetr.load("best.ckpt", device="cpu")
    for name, value in model.detector.state_dict().items():
        assert torch.equal(value, honest["state_dict"][f"detector.{name}"]), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt"]


def test_what_is_named_is_trusted_and_nothing_that_it_imports(
    honest: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "their_parts"
    package.mkdir()
    (package / "__init__.py").write_text("import os\n\nclass Neck:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = put(honest, "model.detector.neck", called("their_parts.Neck"))["codetr"]["config"]
    with pytest.raises(UserError, match=r"trust=\[their_parts\.Neck\]"):
        parts(config, "best.ckpt")
    for trust in (["their_parts"], ["their_parts.Neck"]):
        assert parts(config, "best.ckpt", trust)["model"]["detector"]["neck"]["_target_"] == "their_parts.Neck"
    for target in ("their_parts.os.system", "their_parts.Neck.__init__.__globals__"):
        with pytest.raises(UserError, match=r"best\.ckpt"):
            parts(put(honest, "model.detector.neck", called(target))["codetr"]["config"], "best.ckpt", ["their_parts"])


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.putenv, (CANARY, "1")


def _pickle(honest: dict[str, Any], path: Path) -> None:
    torch.save(honest | {"more": _Runs()}, path)


def _legacy_pickle(honest: dict[str, Any], path: Path) -> None:
    torch.save(honest | {"more": _Runs()}, path, _use_new_zipfile_serialization=False)


def _bare_pickle(honest: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps(_Runs(), 2))


def _rewritten(honest: dict[str, Any], path: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> None:
    """The archive with other records; its checksums are right."""
    torch.save(honest, path)
    with ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(*change(name, data))


def _pickle_in_a_good_archive(honest: dict[str, Any], path: Path) -> None:
    _rewritten(honest, path, lambda n, d: (n, pickle.dumps(_Runs(), 2) if n.endswith("data.pkl") else d))


def _records_of_other_places(honest: dict[str, Any], path: Path) -> None:
    _rewritten(honest, path, lambda n, d: (f"../../{n}", d))


def _short_storages(honest: dict[str, Any], path: Path) -> None:
    _rewritten(honest, path, lambda n, d: (n, d[:4] if "/data/" in n else d))


def _bomb(honest: dict[str, Any], path: Path) -> None:
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        archive.writestr("best/data.pkl", bytes(200_000_000))
        archive.writestr("best/version", b"3\n")


def _nothing(honest: dict[str, Any], path: Path) -> None:
    path.write_bytes(b"")


def _text(honest: dict[str, Any], path: Path) -> None:
    path.write_text("<script>\x1b[2J</script>")


def _list(honest: dict[str, Any], path: Path) -> None:
    torch.save([1, 2], path)


def _numbers_for_weights(honest: dict[str, Any], path: Path) -> None:
    torch.save(honest | {"state_dict": {"detector.a": 3}}, path)


def _other_shapes(honest: dict[str, Any], path: Path) -> None:
    torch.save(honest | {"state_dict": {n: v.new_zeros(3) for n, v in honest["state_dict"].items()}}, path)


def _strange_names(honest: dict[str, Any], path: Path) -> None:
    torch.save(honest | {"state_dict": {"detector.[red]\x1b[31m\r": torch.zeros(1)}}, path)


FILES = [
    _pickle,
    _legacy_pickle,
    _bare_pickle,
    _pickle_in_a_good_archive,
    _records_of_other_places,
    _short_storages,
    _bomb,
    _nothing,
    _text,
    _list,
    _numbers_for_weights,
    _other_shapes,
    _strange_names,
]


@pytest.mark.parametrize("make", FILES, ids=lambda make: make.__name__.strip("_"))
def test_a_file_that_is_no_checkpoint_is_refused(
    make: Callable[[dict[str, Any], Path], None], honest: dict[str, Any], tmp_path: Path
) -> None:
    make(honest, tmp_path / "best.ckpt")
    refused(lambda: codetr.load("best.ckpt"), tmp_path)


def test_a_header_of_safetensors_that_lies_is_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "best.ckpt.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(lambda: codetr.load("best.ckpt.safetensors"), tmp_path)


RUNS: dict[str, str] = {
    "a command": "callbacks: {x: {_target_: os.system, command: touch canary}}",
    "a resolver": "name: ${oc.env:HOME}",
    "a composed resolver": "name: ${oc.decode:'${name}'}",
    "a search path": "hydra: {searchpath: [file:///tmp]}",
    "other defaults": "defaults: [evil]",
    "another package": "# @package _global_\nname: x",
    "a logger that writes elsewhere": "logger: {csv: {directory: /etc}}",
    "a callback that writes elsewhere": "callbacks: {checkpoints: {directory: ../../canary}}",
    "python in yaml": "name: !!python/object/apply:os.system ['touch canary']",
    "a list": "[1, 2]",
    "no text": "\x00\x01",
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_configuration_of_a_strangers_run_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt.yaml"
    path.write_text(RUNS[kind])
    refused(lambda: check_run(path), tmp_path)


def test_every_part_of_our_own_configurations_is_known(honest: dict[str, Any]) -> None:
    config = honest["codetr"]["config"]
    assert set(parts(config, "x")) == set(PARTS)
