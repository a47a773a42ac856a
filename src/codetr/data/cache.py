"""Tables kept on disk, so that annotations are read and checked once."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from codetr.data import table
from codetr.data.findings import Example, Findings
from codetr.data.readers import Document, Reader
from codetr.data.table import Table
from codetr.data.tabulate import Tabulated, tabulate
from codetr.errors import UserError
from codetr.files import atomically

# Changes with what a table holds, or what the checks let pass.
_VERSION = 5
_log = logging.getLogger(__name__)
_TICK = 2 * 10**9  # nanoseconds, of the coarsest file systems' clocks
_PATIENCE = 2.0  # seconds without a progress bar


def open_table(
    annotations: Path, reader: Reader, *, masks: bool, cache: Path | None, progress: bool = True
) -> tuple[Table, Findings]:
    """The table of an annotation file and what its checks found, read by `reader` only if that is news.

    A table is kept per file, reader with its options, and `masks`; it is made anew when the content of what was read
    has changed. An unchanged size and time of modification counts as unchanged content. cache: the folder to keep it
    in; None: `.codetr_cache` beside the annotations, or the user's cache folder where nothing can be written there.
    Of several processes that want the same table, one makes it and the others wait. An unreadable table is made
    anew, with a warning.

    Raises UserError for what the reader cannot read.
    """
    folder = _folder(annotations, cache)
    stem = _stem(annotations, reader, masks)
    with FileLock(folder / f"{stem}.lock"):
        if found := _load(folder, stem):
            return found
        return _build(folder, stem, annotations, reader, masks, progress)


def _folder(annotations: Path, cache: Path | None) -> Path:
    """The first folder that can be written to."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "codetr"  # "~" where none has one
    beside = next(parent for parent in annotations.absolute().parents if parent.is_dir())
    choices = [cache] if cache else [beside / ".codetr_cache", *[user] * user.is_absolute()]
    for folder in choices:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            fault = error
    raise UserError(f"no table of {annotations} can be kept in {choices[-1]} ({fault.strerror}): set data.cache=FOLDER")


def _stem(annotations: Path, reader: Reader, masks: bool) -> str:
    """What the table's files are called, so that whatever changes it makes another one."""
    key = {"path": str(annotations.resolve()), "reader": _describe(reader), "masks": masks}
    return f"{annotations.stem}-{_digest(json.dumps(key).encode())}"


def _describe(reader: Any) -> str:
    """The function and its options, of a function or a partial of one."""
    options = ""
    while isinstance(reader, partial):
        options += repr((reader.args, sorted(reader.keywords.items())))
        reader = reader.func
    return f"{reader.__module__}.{reader.__qualname__}{options}"


def _load(folder: Path, stem: str) -> tuple[Table, Findings] | None:
    """The table that is there, unless it is stale or broken."""
    path = folder / f"{stem}.json"
    if not path.exists():
        return None
    try:
        head = json.loads(path.read_bytes())
        if head["version"] != _VERSION:
            return None
        findings = _findings(head["findings"])
        result = Table(folder / head["data"], head["layout"])
        sources = [_unchanged(s) for s in head["sources"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        _log.warning("%s is broken (%s): the annotations are read again", path, error)
        return None
    if None in sources:
        return None
    if sources != head["sources"]:
        _write_head(path, head | {"sources": sources})
    return result, findings


def _findings(found: dict[str, Any]) -> Findings:
    counts, records = found["counts"], found["records"]
    examples = {rule: [Example(record) for record in records[rule]] for rule in records}
    return Findings(Path(found["source"]), counts=Counter(counts), unmended=Counter(counts), examples=examples)


def _build(
    folder: Path, stem: str, annotations: Path, reader: Reader, masks: bool, progress: bool
) -> tuple[Table, Findings]:
    findings = Findings(annotations)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{stem}-") as temporary:
        document = reader(annotations)
        # Before the records are read: what changes meanwhile makes the table stale.
        sources = [_fingerprint(source) for source in document.get("sources", [annotations])]
        with _shown(document, annotations, progress) as shown:
            tabulated = tabulate(shown, Path(temporary), masks, findings)
        return _keep(folder, stem, Path(temporary), tabulated, findings, sources), findings


def _keep(
    folder: Path, stem: str, temporary: Path, tabulated: Tabulated, findings: Findings, sources: list[dict[str, Any]]
) -> Table:
    """Put the table where the next process looks for it."""
    layout = table.write(temporary / "table", *tabulated)
    name = f"{temporary.name}.table"
    (temporary / "table").rename(folder / name)
    records = {rule: [e.record for e in examples] for rule, examples in findings.examples.items()}
    found = {"source": str(findings.source), "counts": findings.counts, "records": records}
    head = {"version": _VERSION, "data": name, "layout": layout, "findings": found, "sources": sources}
    _write_head(folder / f"{stem}.json", head)
    for old in folder.glob(f"{glob.escape(stem)}-*.table"):
        if old.name != name:
            old.unlink()
    return Table(folder / name, layout)


def _write_head(path: Path, head: dict[str, Any]) -> None:
    """Write the head at once, so that no process ever sees half of it."""
    with atomically(path) as part:
        part.write_text(json.dumps(head))


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"path": str(path), "size": path.stat().st_size, "time": _settled_time(path), "digest": _content(path)}


def _settled_time(path: Path) -> int | None:
    """When it was modified; None so soon afterwards that the next change may have the same time."""
    modified = path.stat().st_mtime_ns
    return modified if time.time_ns() - modified > _TICK else None


def _unchanged(source: dict[str, Any]) -> dict[str, Any] | None:
    """The fingerprint of the same content, with its present time; None where the content has changed."""
    path = Path(source["path"])
    try:
        stat = path.stat()
        if (stat.st_size, stat.st_mtime_ns) == (source["size"], source["time"]):
            return source
        now = {"size": stat.st_size, "time": _settled_time(path)}
        return source | now if _content(path) == source["digest"] else None
    except OSError:
        return None


def _content(path: Path) -> str:
    """A digest of a file's bytes, or of the names in a folder."""
    if path.is_dir():
        return _digest("\0".join(sorted(os.listdir(path))).encode(errors="surrogateescape"))
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@contextmanager
def _shown(document: Document, annotations: Path, progress: bool) -> Iterator[Document]:
    """The same document; a bar counts its records once they take longer than a moment."""
    columns = TextColumn(f"Reading {annotations.name}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress)
    later = threading.Timer(_PATIENCE, bar.start)

    def counted(records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        task = bar.add_task("", total=len(records) if isinstance(records, list) else None)
        for number, record in enumerate(records):
            if not number % 10_000:
                bar.update(task, completed=number)
            yield record

    try:
        later.start()
        yield Document(**document | {k: counted(document[k]) for k in ("images", "annotations")})  # type: ignore
    finally:
        later.cancel()
        bar.stop()
