"""lvis-api, without OpenCV: it draws with it, which needs libraries of a screen, and no test draws."""

import sys
from types import ModuleType

_drawing = sys.modules.setdefault("cv2", ModuleType("cv2"))
try:
    from lvis import LVIS, LVISEval, LVISResults
finally:
    if _drawing.__spec__ is None:
        del sys.modules["cv2"]

__all__ = ["LVIS", "LVISEval", "LVISResults"]
