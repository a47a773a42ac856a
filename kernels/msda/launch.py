"""Launch constants per architecture: launch.json, which `make tune` writes."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("launch.json")


class Launch(NamedTuple):
    """tile: elements (queries x channels, padded to a power of two) of a program. tile_width: of the tiles of
    neighbouring queries where queries are the cells of the maps; 0: consecutive queries."""

    tile: int
    tile_width: int
    num_warps: int

    def block_q(self, block_d: int) -> int:
        return max(1, self.tile // block_d)


def launch_for(device: torch.device, kernel: str, dtype: torch.dtype) -> Launch:
    """kernel: forward or backward. dtype: of value."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return launch_for_capability(10 * major + minor, kernel, 8 * dtype.itemsize)


@cache
def launch_for_capability(capability: int, kernel: str, bits: int) -> Launch:
    """The row of the newest architecture in the table that is not newer. capability: 90 for sm_90."""
    table = json.loads(TABLE.read_text())
    known = [int(name.removeprefix("sm_")) for name in table]
    name = f"sm_{max((one for one in known if one <= capability), default=min(known))}"
    return Launch(**table[name][kernel][f"{bits} bits"])
