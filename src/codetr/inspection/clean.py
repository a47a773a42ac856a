"""A cleaned copy of a COCO annotation file: what can be mended is, the rest of what is bad is removed, and all else
stays as it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from codetr.errors import UserError
from codetr.files import atomically
from codetr.inspection.split import Split


def targets(splits: Sequence[Split], folder: Path | None) -> list[Path]:
    """NAME.clean.json of each split, beside the original or in `folder`; NAME.SPLIT.clean.json where two would meet,
    as with the _annotations.coco.json of Roboflow in a folder per split.

    Raises UserError where that is one of the originals.
    """
    sources = [s.findings.source for s in splits]
    plain = [(folder or p.parent) / f"{p.stem}.clean.json" for p in sources]
    if len({p.resolve() for p in plain}) < len({p.resolve() for p in sources}):
        plain = [p.with_name(f"{q.stem}.{s.name}.clean.json") for p, q, s in zip(plain, sources, splits, strict=True)]
    if taken := {p.resolve() for p in plain} & {p.resolve() for p in sources}:
        raise UserError(f"{taken.pop()} is an original: choose another folder with output=FOLDER")
    return plain


def write_clean(split: Split, target: Path) -> str:
    """Write a cleaned copy to `target`; what was done in words. A file there with other content keeps a copy, .old.

    Raises UserError when that file cannot be written, and when no image, or no annotation, would be left in it.
    """
    document = json.loads(split.findings.source.read_bytes())
    before = {key: len(document[key]) for key in ("images", "annotations")}
    done = clean(document, split)
    for key, number in before.items():
        if number and not document[key]:
            raise UserError(
                f"{split.findings.source}: nothing is written, for none of its {number} {key} would be left; "
                "mend what the findings have in common, such as a folder or the names of the files"
            )
    text = json.dumps(document, ensure_ascii=False)
    with atomically(target, advice="choose a folder with output=FOLDER") as part:
        part.write_text(text, encoding="utf-8")
        if target.exists() and target.read_bytes() != part.read_bytes():
            target.replace(_unused(target))
    return done


def _unused(path: Path) -> Path:
    """NAME.old, NAME.old2, ..."""
    names = (path.with_name(f"{path.name}.old{n if n > 1 else ''}") for n in count(1))
    return next(p for p in names if not p.exists())


def clean(document: dict[str, Any], split: Split) -> str:
    """Change `document`, the one that `split` was read from, in place; says what was done."""
    repair = split.repair
    for key, changes in (("annotations", repair.changes), ("images", repair.image_changes)):
        for position, values in changes.items():
            document[key][position].update(values)
    kept = {key for key, i in split.usable.items() if i not in repair.images}
    orphans = {i for i, a in enumerate(split.annotations) if i not in repair.annotations and a["image_id"] not in kept}
    removed = {
        "categories": repair.categories,
        "images": repair.images,
        "annotations": repair.annotations | orphans,
    }
    for key, positions in removed.items():
        document[key] = [r for i, r in enumerate(document[key]) if i not in positions]
    words = [f"{len(positions)} {key} removed" for key, positions in removed.items() if positions]
    if orphans:
        words[-1] += f" ({len(orphans)} with their image)"
    for key, changes in (("images", repair.image_changes), ("annotations", repair.changes)):
        if mended := sum(i not in removed[key] for i in changes):
            words.append(f"{mended} {key} mended")
    return ", ".join(words) or "nothing to mend"
