"""Names out of files (classes, image files, tensors), made harmless for the place where they are shown.

Pages have `html.escape`, and JSON its own escapes; here is what the terminal, loggers and plots need.
"""

from __future__ import annotations

import re
from collections.abc import Iterable


def shown(text: object) -> str:
    """For a terminal or a log: on one line, without anything that a terminal would obey or that changes the reading
    direction; such characters are shown as Python writes them, `\\x1b`. Where rich reads markup, wrap it in `Text`."""
    return "".join(c if c.isprintable() or c == "\u3000" else ascii(c)[1:-1] for c in str(text))


def shown_lines(text: object) -> str:
    """As `shown`, for messages of several lines, which stay lines."""
    return "\n".join(map(shown, str(text).split("\n")))


def plotted(text: object) -> str:
    """For a plot, where dollars would begin a formula."""
    return shown(text).replace("$", r"\$")


def tags(names: Iterable[str]) -> dict[str, str]:
    """Of each name what loggers call it: letters, digits, blanks, `_`, `-` and `.`, and no two alike."""
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        plain = re.sub(r"[^\w .-]", "_", name)
        tag, number = plain, 1
        while tag in taken:
            number += 1
            tag = f"{plain}_{number}"
        taken.add(tag)
        found[name] = tag
    return found
