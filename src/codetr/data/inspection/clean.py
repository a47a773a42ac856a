"""A cleaned copy of a COCO annotation file: what is bad is removed or clipped, all else stays as it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from codetr.data.inspection.split import Split
from codetr.errors import UserError


def write_clean(split: Split, folder: Path | None) -> tuple[Path, str]:
    """Write NAME.clean.json, beside the original or in `folder`; its path, and what was done in words.

    Raises UserError when that file cannot be written.
    """
    source = split.findings.source
    target = (folder or source.parent) / f"{source.stem}.clean.json"
    document = json.loads(source.read_bytes())
    done = clean(document, split)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f"{target.name}.{os.getpid()}")
        draft.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): choose a folder with output=FOLDER") from error
    return target, done


def clean(document: dict[str, Any], split: Split) -> str:
    """Change `document`, the one that `split` was read from, in place; says what was done."""
    repair = split.repair
    for position, values in repair.changes.items():
        document["annotations"][position].update(values)
    kept = {key for key, i in split.usable.items() if i not in repair.images}
    orphans = {i for i, a in enumerate(split.annotations) if i not in repair.annotations and a["image_id"] not in kept}
    removed = {
        "categories": repair.categories,
        "images": repair.images,
        "annotations": repair.annotations | orphans,
    }
    for key, positions in removed.items():
        document[key] = [r for i, r in enumerate(document[key]) if i not in positions]
    changed = sum(i not in removed["annotations"] for i in repair.changes)
    words = [f"{len(positions)} {key} removed" for key, positions in removed.items() if positions]
    if orphans:
        words[-1] += f" ({len(orphans)} with their image)"
    if changed:
        words.append(f"{changed} annotations corrected")
    return ", ".join(words) or "nothing to mend"
