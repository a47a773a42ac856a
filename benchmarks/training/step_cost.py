"""What a training scheme costs a training step: time and peak memory as ratios to the plain detector.

groups: K groups of 300 queries on Conditional DETR C5 (Group DETR), with codetr's self-attention (group by group, equal
ones folded into the batch) and with the usual form, one attention over all queries under a mask of their size. heads:
the rows of Co-DETR's table 7, auxiliary heads on Deformable-DETR++, and H-Deformable-DETR.

Times alternate in one process; peak memory is that of a process per case. Beside the times stands what arithmetic alone
would take: the operations that PyTorch's own counter finds in a step, as a ratio too.
"""

import argparse
import statistics
import time
from datetime import date

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from rich.progress import track
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from codetr.nn.group_attention import AttentionPlan, GroupSelfAttention
from codetr.papers import load_rows
from codetr.types import Frames, Targets

OBJECTS, CLASSES = 7, 80
MASKED = "one mask"  # a case with `OneMask`


def groups(k: int) -> list[str]:
    return ["model=conditional_detr", f"model.query_groups={k}"]


TABLE_7 = {row.row: row for row in load_rows().values() if (row.paper, row.table) == ("Co-DETR", "table 7")}
# study -> case -> overrides. The first case is the plain detector.
STUDIES = {
    "groups": {
        **{f"K = {k}": groups(k) for k in (1, 3, 6, 11)},
        **{f"K = {k}, {MASKED}": groups(k) for k in (1, 3, 6, 11)},
    },
    "heads": {name: list(row.overrides) for name, row in TABLE_7.items()},
}


class OneMask(GroupSelfAttention):
    """The same weights, one softmax over the queries of all groups."""

    def forward(self, content: Tensor, position: Tensor, plan: AttentionPlan) -> Tensor:
        assert self.position is not None
        query, key = (self.query_key(content) + self.position(position)).chunk(2, -1)
        groups = torch.arange(len(plan.sizes), device=content.device)
        owner = groups.repeat_interleave(torch.tensor(plan.sizes, device=content.device))
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, self.value(content))]
        out = F.scaled_dot_product_attention(*heads, attn_mask=owner[:, None] == owner[None])
        return self.output(out.transpose(1, 2).flatten(2))


class Case:
    """One model with its optimizer and one batch."""

    def __init__(self, study: str, name: str, size: tuple[int, int], batch: int, device: str) -> None:
        overrides = [*STUDIES[study][name], f"model.num_classes={CLASSES}"]
        with initialize_config_module("codetr.conf", version_base="1.3"):
            config = compose("train", [*overrides, "model.detector.backbone.pretrained=false", "model.dropout=0"])
        torch.manual_seed(0)
        self.detector: nn.Module = instantiate(config.model.detector, _convert_="all").to(device)
        self.criterion = instantiate(config.criterion)
        if MASKED in name:
            for module in self.detector.modules():
                if isinstance(module, GroupSelfAttention):
                    module.__class__ = OneMask
        self.optimizer = torch.optim.AdamW(self.detector.parameters(), 1e-5)
        self.images = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)
        self.padding = torch.zeros(batch, *size, dtype=torch.bool, device=device)
        boxes = torch.cat([torch.rand(batch, OBJECTS, 2) * 0.4 + 0.3, torch.rand(batch, OBJECTS, 2) * 0.4 + 0.1], -1)
        self.targets = Targets(
            boxes,
            torch.randint(CLASSES, (batch, OBJECTS)),
            torch.ones(batch, OBJECTS, dtype=torch.bool),
            Frames.unscaled(torch.tensor([size] * batch)),
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

    def flops(self) -> int:
        """Operations of one training step."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak(name: str, options: argparse.Namespace) -> float:
    """Mebibytes at the highest point of three steps."""
    case = Case(options.study, name, options.size, options.batch, options.device)
    for _ in range(3):
        case.step()
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return report.peak()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("HEIGHT", "WIDTH"), help="pixels")
    parser.add_argument("--cases", nargs="+", help="some of the study's, the first one among them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    names = options.cases or list(STUDIES[options.study])
    memory = {name: report.alone(peak, name, options) for name in track(names, "Memory")}
    cases = {name: Case(options.study, name, options.size, options.batch, options.device) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in track(range(options.repeat + 1), "Steps"):
        for name, case in cases.items():
            seconds = case.step()
            if repeat:  # the first is a warm-up
                times[name].append(seconds)
    numbers = {
        n: {"seconds": statistics.median(times[n]), "megabytes": memory[n], "flops": cases[n].flops()} for n in names
    }
    name = options.study if options.device == "cpu" else f"{options.study}_{options.device}"
    height, width = options.size
    name += "" if (height, width) == (512, 512) else f"_{height}x{width}"
    report.write(name, markdown(numbers, options), numbers)


def _paper(name: str) -> list[float]:
    """Ratios of GPU hours and memory to the first row of the paper's table."""
    first, row = next(iter(TABLE_7.values())), TABLE_7[name]
    return [row.hours / first.hours, row.memory / first.memory]  # type: ignore[operator]


def markdown(numbers: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    """Ratios to the first case; beside them those of the paper, or of the same case with one mask."""
    base = next(iter(numbers.values()))

    def ratios_of(case: dict[str, float]) -> list[float]:
        return [case[key] / base[key] for key in ("seconds", "megabytes")]

    beside = "paper" if options.study == "heads" else f"with {MASKED}"
    rows = []
    for name, ours in ((n, x) for n, x in numbers.items() if MASKED not in n):
        ratios, masked = ratios_of(ours), numbers.get(f"{name}, {MASKED}")
        second = _paper(name) if beside == "paper" else ratios_of(masked) if masked else None
        shown = [f"{x:.2f}" for x in second] if second else ["", ""]
        cells = [f"{ours['seconds']:.2f}", f"{ratios[0]:.2f}", f"{ours['flops'] / base['flops']:.2f}", shown[0]]
        rows.append([name, *cells, f"{ours['megabytes'] / 1024:.2f}", f"{ratios[1]:.2f}", shown[1]])
    height, width = options.size
    about = (
        f"Medians of {options.repeat} alternating steps, batch {options.batch}, {height} x {width}; "
        f'`make bench NAME="training/step_cost {options.study}"`, {date.today()}, {report.machine()}'
    )
    about += f", {torch.cuda.get_device_name()}." if options.device == "cuda" else "."
    head = ["case", "step, s", "ratio", "of the arithmetic", beside, "peak memory, GB", "ratio", beside]
    return f"{report.table(head, rows)}\n\n{about}"
