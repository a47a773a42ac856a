"""Files that are whole or not there, and the room that they need."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

from codetr.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomically(path: Path, size: int = 0) -> Iterator[Path]:
    """Yields a name beside `path`, of the same suffix, to write to: at its end the block's file becomes `path`, in a
    folder that is made where there is none.

    Until then `path` is as it was, and nothing is left of a block that fails. size: bytes that will be written, where
    that is known. Raises UserError when there is no room.
    """
    part = path.with_name(f"{path.stem}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        size = max(size, part.stat().st_size if part.exists() else 0)
        part.unlink(missing_ok=True)
        if _no_room(error):
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"{path}: there is no room for it: it takes {_megabytes(size)}, and {path.parent} has "
                f"{_megabytes(free)} (or a quota or a limit of file sizes ends it earlier); delete something there or "
                "write elsewhere, then run the command again"
            ) from error
        raise


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
