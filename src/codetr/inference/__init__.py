"""Inference: a checkpoint opened once (`model`), images in any form (`sources`), what is found in them (`result`), and
files of that (`outputs`)."""

from codetr.inference.exported import Exported
from codetr.inference.model import Model, load
from codetr.inference.result import Result

__all__ = ["Exported", "Model", "Result", "load"]
