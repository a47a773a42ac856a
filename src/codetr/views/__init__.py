"""Several views of a picture in place of the picture: tiles of it (`Tiles`), test-time augmentation (`TTA`), one
through the other, and your own.

A view shows a part of a picture, mirrored or at another scale (`view`); what it shows is again a picture, and is looked
at as one (`eye`). What the views found comes back into pixels of the picture: parts of objects on borders are joined
(`borders`), and what several views found becomes one (`merging`).
"""

from codetr.views.eye import Eye, listed, made, through
from codetr.views.kinds import TTA, Tiles, Track, Views, untracked
from codetr.views.merging import NMS, WBF, Merge, SoftNMS
from codetr.views.view import Found, Picture, Pixels, View

__all__ = [
    "NMS",
    "TTA",
    "WBF",
    "Eye",
    "Found",
    "Merge",
    "Picture",
    "Pixels",
    "SoftNMS",
    "Tiles",
    "Track",
    "View",
    "Views",
    "listed",
    "made",
    "through",
    "untracked",
]
