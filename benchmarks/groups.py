"""What K groups of queries cost a training step: Conditional DETR on C5, 300 queries per group (Group DETR, sec. 4.4).

Beside codetr's self-attention (group by group, equal ones folded into the batch) runs the usual form: one attention
over all queries under a mask of their size. Times alternate in one process; peak memory is that of a process per case.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.progress import track
from torch import Tensor, nn

from codetr.nn.group_attention import Bucket, GroupSelfAttention
from codetr.types import Targets

RESULTS = Path(__file__).parent / "results"
GROUPS, OBJECTS, CLASSES = (1, 3, 6, 11), 7, 80


class OneMask(GroupSelfAttention):
    """The same weights, one softmax over the queries of all groups."""

    def forward(self, content: Tensor, position: Tensor, plan: list[Bucket]) -> Tensor:
        assert self.position is not None
        query, key = (self.query_key(content) + self.position(position)).chunk(2, -1)
        owner = torch.cat(
            [torch.full((span.stop - span.start,), span.start) for bucket in plan for span in bucket.spans]
        ).to(content.device)
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, self.value(content))]
        out = F.scaled_dot_product_attention(*heads, attn_mask=owner[:, None] == owner[None])
        return self.output(out.transpose(1, 2).flatten(2))


class Case:
    """One model with its optimizer and one batch."""

    def __init__(self, groups: int, masked: bool, size: int, batch: int, device: str) -> None:
        overrides = ["model=conditional_detr", f"model.query_groups={groups}", f"model.num_classes={CLASSES}"]
        with initialize_config_module("codetr.conf", version_base="1.3"):
            config = compose("train", [*overrides, "model.detector.backbone.pretrained=false", "model.dropout=0"])
        torch.manual_seed(0)
        self.detector: nn.Module = instantiate(config.model.detector, _convert_="all").to(device)
        self.criterion = instantiate(config.criterion)
        if masked:
            for module in self.detector.modules():
                if isinstance(module, GroupSelfAttention):
                    module.__class__ = OneMask
        self.optimizer = torch.optim.AdamW(self.detector.parameters(), 1e-5)
        self.images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
        self.padding = torch.zeros(batch, size, size, dtype=torch.bool, device=device)
        boxes = torch.cat([torch.rand(batch, OBJECTS, 2) * 0.4 + 0.3, torch.rand(batch, OBJECTS, 2) * 0.4 + 0.1], -1)
        self.targets = Targets(
            boxes,
            torch.randint(CLASSES, (batch, OBJECTS)),
            torch.ones(batch, OBJECTS, dtype=torch.bool),
            torch.full((batch, 2), size),
        ).to(device)

    def step(self) -> float:
        """Seconds of one training step."""
        synchronize()
        start = time.perf_counter()
        output = self.detector(self.images, self.padding, self.targets)
        loss = torch.stack(list(self.criterion(output, self.targets).values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.detector.parameters(), 0.1)
        self.optimizer.step()
        synchronize()
        return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(groups: int, masked: bool, options: argparse.Namespace) -> float:
    """Megabytes at the highest point of three steps, in a process of its own."""
    command = [sys.executable, __file__, "--peak", str(groups), str(int(masked)), "--size", str(options.size)]
    command += ["--batch", str(options.batch), "--device", options.device]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak(groups: int, masked: bool, options: argparse.Namespace) -> float:
    case = Case(groups, masked, options.size, options.batch, options.device)
    for _ in range(3):
        case.step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # not ru_maxrss: a child starts with its parent's
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512, help="side of the image")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(own_peak(options.peak[0], bool(options.peak[1]), options))
        return
    keys = [(k, masked) for k in GROUPS for masked in (False, True)]
    memory = {key: peak(*key, options) for key in track(keys, "Memory")}
    cases = {key: Case(*key, options.size, options.batch, options.device) for key in keys}
    times: dict[tuple[int, bool], list[float]] = {key: [] for key in keys}
    for repeat in track(range(options.repeat + 1), "Steps"):
        for key, case in cases.items():
            seconds = case.step()
            if repeat:  # the first is a warm-up
                times[key].append(seconds)
    numbers = {
        f"{k}{'_mask' if masked else ''}": {
            "seconds": statistics.median(times[k, masked]),
            "megabytes": memory[k, masked],
        }
        for k, masked in keys
    }
    name = "groups" if options.device == "cpu" else f"groups_{options.device}"
    (RESULTS / f"{name}.json").write_text(json.dumps(numbers, indent=1))
    (RESULTS / f"{name}.md").write_text(markdown(numbers, options))
    print((RESULTS / f"{name}.md").read_text())


def markdown(numbers: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    base = numbers["1"]
    lines = ["| K | step, s | of K = 1 | with one mask | peak memory, GB | of K = 1 | with one mask |"]
    lines.append("|---|---|---|---|---|---|---|")
    for k in GROUPS:
        ours, mask = numbers[f"{k}"], numbers[f"{k}_mask"]
        time_ratios = [f"{x['seconds'] / base['seconds']:.2f}" for x in (ours, mask)]
        memory_ratios = [f"{x['megabytes'] / base['megabytes']:.2f}" for x in (ours, mask)]
        cells = [f"{ours['seconds']:.2f}", *time_ratios, f"{ours['megabytes'] / 1024:.2f}", *memory_ratios]
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()}, 2 CPU cores"
    lines.append(
        f"\nMedians of {options.repeat} alternating steps, batch {options.batch}, {options.size} x {options.size}; "
        f"`benchmarks/groups.py`, {date.today()}, {where}, torch {torch.__version__}."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
