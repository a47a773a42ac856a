"""Files that are whole or not there, and the room that they need."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import ZipFile

from codetr.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def part_of(path: Path) -> Path:
    """Where `atomically` writes what will become `path`."""
    return path.with_name(f".{path.stem}.part{path.suffix}")


@contextmanager
def atomically(path: Path, size: int = 0, advice: str = "") -> Iterator[Path]:
    """Yields a name beside `path`, of the same suffix, to write to: at its end the block's file becomes `path`, in a
    folder that is made where there is none.

    Until then `path` is as it was, and nothing is left of a block that fails. Where `path` is a link, the link is
    replaced and not its target.

    size: bytes that will be written, where that is known, for the message when there is no room for them.
    advice: what else may help, for the message when the file system refuses to write.

    Raises UserError when there is no room, and for whatever else the file system refuses.
    """
    part = part_of(path)
    try:
        if path.exists() and not path.is_file():  # a folder, a device
            raise UserError(f"cannot write {path}: it is there already, and no file")
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with suppress(OSError):  # there may be no part yet
            size = max(size, part.stat().st_size)
            part.unlink()
        if _no_room(error):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"{path}: there is no room for it: it takes {_megabytes(size)}, and {path.parent} has "
                f"{_megabytes(free)} (or a quota or a limit of file sizes ends it earlier); delete something there or "
                "write elsewhere, then run the command again"
            ) from error
        if isinstance(error, OSError):
            raise cannot_write(path, error, advice) from error
        raise


def cannot_write(path: Path, error: OSError, advice: str = "") -> UserError:
    """What a user is told when the file system refuses to write `path`."""
    return UserError(f"cannot write {path}: {error.strerror or error}{advice and f'; {advice}'}")


def _no_room(error: BaseException | None) -> bool:
    """Whether it, or what it came from, is a full disk: PyTorch's writer fails once more while it gives up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def check_archive(path: Path) -> None:
    """Compare every record of a zip archive, such as PyTorch's files of tensors are, with its checksum.

    Raises ValueError, which names a record that differs, or what zipfile raises where the archive itself is damaged.
    """
    with ZipFile(path) as archive:
        if record := archive.testzip():
            raise ValueError(f"the checksum of its record {record} is another one")
