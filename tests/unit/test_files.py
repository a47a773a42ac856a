"""Files on a full disk, with numbers that are not finite, and with bits that have changed."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from codetr.callbacks.resume import AtomicCheckpointIO, names_not_finite
from codetr.checkpoint import load_weights, newest_whole, read
from codetr.errors import UserError
from codetr.files import atomically


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing beyond fails as on a full disk, in the middle."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def content(step: int, size: int = 1000) -> dict:
    return {"state_dict": {"detector.w": torch.full((size,), float(step))}, "global_step": step}


def test_without_room_the_old_checkpoint_stays_and_nothing_else(tmp_path: Path) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint(content(1), path)
    with (
        no_file_above(200_000),
        pytest.raises(UserError, match=r"last\.ckpt: there is no room for it: it takes 4\.0 MB"),
    ):
        io.save_checkpoint(content(2, 1_000_000), path, storage_options=3)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert load_weights(path).step == 1


def test_any_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with no_file_above(10_000), pytest.raises(UserError, match="there is no room"), atomically(path) as part:
        part.write_text("x" * 100_000)
    with pytest.raises(TypeError), atomically(path) as part, part.open("w") as file:
        file.writelines(["half", 2])  # type: ignore[list-item]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_file_system_refuses_is_said_of_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for path, reason in (
        (tmp_path / "folder", "it is there already, and no file"),
        (Path("/dev/null"), "it is there already, and no file"),
        (tmp_path / "file" / "x.json", "(Not a directory|File exists); choose another"),
        (tmp_path / ("x" * 300), "File name too long; choose another"),
    ):
        with (
            pytest.raises(UserError, match=f"cannot write {path}: {reason}"),
            atomically(path, advice="choose another") as part,
        ):
            part.write_text("new")
    assert (tmp_path / "file").read_text() == "old"
    assert Path("/dev/null").is_char_device()


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    with atomically(link) as part:
        part.write_text("new")
    assert (target.read_text(), link.read_text(), link.is_symlink()) == ("old", "new", False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["state_dict", "ema", "optimizer_states"])
def test_what_is_not_finite_is_not_written(tmp_path: Path, value: float, where: str) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint(content(1), path)
    bad = content(2) | {"ema": {"weights": {"w": torch.ones(3)}}, "optimizer_states": [{"state": {0: [torch.ones(2)]}}]}
    tensor = {
        "state_dict": bad["state_dict"]["detector.w"],
        "ema": bad["ema"]["weights"]["w"],
        "optimizer_states": bad["optimizer_states"][0]["state"][0][0],
    }[where]
    tensor[-1] = value
    with pytest.raises(UserError, match=rf"1 of 3 tensors are not finite at step 2, such as {where}/"):
        io.save_checkpoint(bad, path)
    assert load_weights(path).step == 1


def test_large_and_odd_numbers_are_finite() -> None:
    tensors = {
        "max": torch.full((9,), torch.finfo(torch.float32).max),
        "none": torch.empty(0),
        "int": torch.ones(2).long(),
    }
    assert not names_not_finite(tensors | {"half": torch.full((3,), 65504.0, dtype=torch.float16)})
    assert names_not_finite({**tensors, "bad": torch.tensor(float("nan")).bfloat16()}) == ["bad"]


def test_the_newest_generation_that_is_whole_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    for step in range(1, 6):
        io.save_checkpoint(content(step), path, storage_options=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.1.ckpt", "last.2.ckpt", "last.ckpt"]
    assert newest_whole(path)[0] == path
    assert [load_weights(tmp_path / f"last{age}.ckpt").step for age in ("", ".1", ".2")] == [5, 4, 3]
    path.write_bytes(path.read_bytes()[:-100])
    flip(tmp_path / "last.1.ckpt", 8 * 1500)
    found, kept = newest_whole(path)
    assert (found.name, kept["global_step"]) == ("last.2.ckpt", 3)
    assert "last.ckpt: is damaged" in caplog.text
    assert "going on with" in caplog.text
    path.unlink()
    assert newest_whole(path)[0].name == "last.2.ckpt"
    assert "last.ckpt: no such checkpoint" in caplog.text
    (tmp_path / "last.2.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.2\.ckpt"):
        newest_whole(path)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_flipped_bit_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    path, generator = tmp_path / "x.ckpt", np.random.default_rng(0)
    saved = {f"detector.{i}": torch.randn(64, generator=torch.Generator().manual_seed(i)) for i in range(8)}
    torch.save({"state_dict": saved, "codetr": {"class_names": ["a", "b"]}, "global_step": 3}, path)
    whole = path.read_bytes()
    seen = 0
    for bit in generator.choice(8 * len(whole), 400, replace=False).tolist():
        path.write_bytes(whole)
        flip(path, bit)
        try:
            found = read(path)
        except UserError:
            seen += 1
            continue
        assert found["global_step"] == 3
        assert found["codetr"] == {"class_names": ["a", "b"]}
        assert found["state_dict"].keys() == saved.keys()
        assert all(torch.equal(found["state_dict"][name], value) for name, value in saved.items())
    assert seen > 150
