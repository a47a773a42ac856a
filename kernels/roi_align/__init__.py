"""RoIAlign over the levels of a pyramid: a reference by torchvision, and the op `codetr::roi_align` for the CPU."""

from .op import roi_align
from .reference import NOWHERE, roi_align_reference

__all__ = ["NOWHERE", "roi_align", "roi_align_reference"]
