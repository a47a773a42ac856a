"""Files that grow while a run goes on, and are there as a whole at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codetr.files import cannot_write


class Growing:
    """The file `path`, which is there from `close` on, as a whole.

    Until then it grows beside `path` and is complete after every `add`, whether or not there was space for it; an older
    file of the same name is deleted. opening, closing: what it begins and ends with. Raises UserError for what the file
    system refuses.
    """

    def __init__(self, path: Path, opening: bytes = b"", closing: bytes = b"") -> None:
        self.path, self._closing = path, closing
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("xb", buffering=0)
            self._end = len(opening)
            self._put(0, opening + closing)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error

    def grow(self, data: bytes) -> None:
        try:
            self._put(self._end, data + self._closing)
        except OSError as error:
            self._put(self._end, self._closing)  # over bytes that are there: a full disk takes them
            self._file.truncate(self._end + len(self._closing))
            raise cannot_write(self.path, error) from error
        self._end += len(data)

    def _put(self, position: int, data: bytes) -> None:
        self._file.seek(position)
        while data:
            data = data[self._file.write(data) :]

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
            try:
                self._partial.replace(self.path)
            except OSError as error:
                raise cannot_write(self.path, error) from error

    def close_early(self) -> None:
        """What is there so far becomes `path` with ".part" in its name: nobody takes it for the whole."""
        self.path = unfinished(self.path)
        self.close()


def unfinished(path: Path) -> Path:
    return path.with_suffix(f".part{path.suffix}")


class Records(Growing):
    """A list of records in a JSON file; count: how many."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, b"[", b"\n]\n")
        self.count = 0

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        if records:
            self.grow((",\n" if self.count else "\n").encode() + ",\n".join(map(json.dumps, records)).encode())
            self.count += len(records)
