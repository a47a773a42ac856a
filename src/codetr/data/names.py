"""Image files under names that tools spell otherwise: in %20, with backslashes, with the paths of another machine."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from urllib.parse import unquote

Entries = Callable[[str], Mapping[str, list[str]]]
"""A folder -> of its entries, the names by what they are in small letters."""


def find_misspelt(root: Path, missing: Mapping[int, str], taken: Iterable[str] = ()) -> dict[int, str]:
    """The file below `root` that a name must mean, of those of `missing` (position -> name) where there is one.

    Letter case, %-escapes, backslashes and a ./ in front do not count. Of a path of another machine, or one with ../ in
    front, the longest end that exists below `root` counts; of other paths, folders that `root` itself ends with may be
    left out. A name is left alone where two files fit, and where another name means the same file. taken: names of
    other images, which were found as they are.
    """
    entries = cache(_entries)
    found = {}
    for position, name in missing.items():
        fits = {file for path in _ways_to_write(name) if (file := _file(root, path, entries))}
        if len(fits) == 1:
            found[position] = fits.pop()
    wanted = set(found.values())
    uses = Counter([*found.values(), *(name for name in taken if name in wanted)])
    return {position: file for position, file in found.items() if uses[file] == 1}


def find_files(root: Path, names: Mapping[int, str]) -> dict[int, str]:
    """The file below `root` of each of `names` (position -> name) that has one, as it is spelt there."""
    there = {position: name for position, name in names.items() if (root / name).is_file()}
    missing = {position: name for position, name in names.items() if position not in there}
    return there | find_misspelt(root, missing, there.values())


def advice_on(name: str) -> str:
    """What may be wrong with a name that no file has."""
    odd = [sign for sign in ("%", "\\") if sign in name]
    if is_foreign(name.replace("\\", "/")):
        return "; the path is of another place: write names from data.*_images on"
    return f"; tools write {' and '.join(odd)} for other signs: no one file fits" if odd else ""


def _ways_to_write(name: str) -> list[str]:
    return list(dict.fromkeys(way.replace("\\", "/") for way in (name, unquote(name))))


def is_foreign(path: str) -> bool:
    """Whether a path, with slashes, is no relative one below some folder."""
    return path.startswith(("/", "../")) or path[1:3] == ":/" or "://" in path


def _file(root: Path, path: str, entries: Entries) -> str | None:
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    here = [part.casefold() for part in root.absolute().parts]
    for start in range(len(parts)):
        dropped = [part.casefold() for part in parts[:start]]
        if dropped and not is_foreign(path) and here[-start:] != dropped:
            continue
        if file := _spelt(root, parts[start:], entries):
            return file
    return None


def _spelt(root: Path, parts: list[str], entries: Entries) -> str | None:
    """The one path below `root` that differs from `parts` in letter case at most."""
    below = ""
    for part in parts:
        names = entries(str(root / below)).get(part.casefold(), [])
        if part not in names and len(names) != 1:
            return None
        below = os.path.join(below, part if part in names else names[0])
    return below if (root / below).is_file() else None


def _entries(folder: str) -> Mapping[str, list[str]]:
    names = defaultdict(list)
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        names[name.casefold()].append(name)
    return names
