"""Shapes: a small detection benchmark that is drawn, not downloaded, in COCO's format.

A class is a shape; colour, texture, size, aspect and rotation tell nothing. `python -m codetr.shapes --help`.
"""

from codetr.shapes.generate import PRESETS, Preset, generate

__all__ = ["PRESETS", "Preset", "generate"]
