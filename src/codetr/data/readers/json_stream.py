"""The lists of a large JSON object, read piece by piece.

A pass of compiled code finds where the pieces end, and orjson decodes one after the other: memory does not grow with
the file. Measured against ijson, msgspec, simdjson and json (benchmarks/results/table.md and libraries.md).
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from codetr.errors import UserError

_KEY = re.compile(rb'"((?:[^"\\]|\\.)*)"\s*:\s*$')
_LONGEST_KEY = 1000
_OPENED, _COMMA, _CLOSED = 0, 1, 2


def scan_lists(path: Path, piece: int) -> dict[str, list[tuple[int, int]]]:
    """Key -> spans [start, end) of bytes, each of about `piece` bytes and whole elements, of the object's lists.

    Raises UserError when the file is no JSON object or ends too early; what is in the spans is not looked at.
    """
    scan = _scanner()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        data = np.frombuffer(view, np.uint8)
        events, depth = scan(data, piece)
        del data
        start = re.match(rb"(\xef\xbb\xbf)?\s*", view[:1000])
        if start is None or view[start.end() : start.end() + 1] != b"{":
            raise UserError(f"{path} is not a COCO instances file: it does not begin with an object, {{")
        if depth != 0:
            raise UserError(f"{path} is not JSON: it ends within a record or list; was it copied in full?")
        lists: dict[str, list[tuple[int, int]]] = {}
        spans: list[tuple[int, int]] = []
        begin = 0
        for position, kind in events:
            if kind == _OPENED:
                key = _KEY.search(view[max(0, position - _LONGEST_KEY) : position])
                is_list = view[position : position + 1] == b"["
                spans = lists.setdefault(_text(key[1]), []) if key and is_list else []
            else:
                spans.append((begin, position))
            begin = int(position) + 1
        return lists


def read_pieces(path: Path, spans: list[tuple[int, int]]) -> Iterator[list[Any]]:
    """The elements of every span, decoded. Raises UserError when one is not JSON; NaN and Infinity pass."""
    with path.open("rb") as file:
        for start, end in spans:
            file.seek(start)
            text = b"[" + file.read(end - start) + b"]"
            try:
                yield orjson.loads(text)
            except orjson.JSONDecodeError:
                yield _lenient(text, path, start)


def _lenient(text: bytes, path: Path, start: int) -> list[Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        offset = start + getattr(error, "pos", getattr(error, "start", 0)) - 1
        raise UserError(f"{path} is not JSON ({error}; about byte {offset} of the file)") from error


def _text(key: bytes) -> str:
    return str(json.loads(b'"' + key + b'"'))


@cache
def _scanner() -> Any:
    """Compiled on first use: files of ordinary size never need it."""
    from codetr.kernels.common.compiled import compiled

    def scan(data, piece):  # type: ignore[no-untyped-def]
        """Where the values of the top level begin and end, and commas between their elements, `piece` bytes apart."""
        events = []
        depth, last = 0, 0
        inside, escaped = False, False
        for i in range(data.size):
            c = data[i]
            if inside:
                if escaped:
                    escaped = False
                elif c == 92:  # backslash
                    escaped = True
                elif c == 34:
                    inside = False
            elif c == 34:  # quote
                inside = True
            elif c == 123 or c == 91:  # { [
                depth += 1
                if depth == 2:
                    events.append((i, 0))
                    last = i
            elif c == 125 or c == 93:  # } ]
                depth -= 1
                if depth == 1:
                    events.append((i, 2))
            elif c == 44 and depth == 2 and i - last >= piece:  # ,
                events.append((i, 1))
                last = i
        return events, depth + inside

    return compiled(scan, nogil=True)
