"""Every row of the papers' tables composes, builds at full size and trains; the command that lists and runs them."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import ResNetConfig
from transformers.models.conditional_detr.configuration_conditional_detr import ConditionalDetrConfig
from transformers.models.conditional_detr.modeling_conditional_detr import ConditionalDetrForObjectDetection
from transformers.models.dab_detr.configuration_dab_detr import DabDetrConfig
from transformers.models.dab_detr.modeling_dab_detr import DabDetrForObjectDetection
from transformers.models.deformable_detr.configuration_deformable_detr import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrForObjectDetection

from codetr.derived import read_needed_masks
from codetr.errors import UserError
from codetr.models.detector import Detector
from codetr.papers import Row, command, find, load_rows, slurm, torchrun
from codetr.types import MAIN, Frames, Targets
from toy_model import NARROW, SIZES

ROOT = Path(__file__).resolve().parents[1]
ROWS = load_rows()
READY = [row for row in ROWS.values() if not row.needs]


def slow(row: Row) -> Any:
    return pytest.param(row, marks=pytest.mark.slow)


def _id(value: object) -> str | None:
    return value.name if isinstance(value, Row) else None


def composed(row: Row, *overrides: str) -> DictConfig:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        return compose("train", [*row.arguments(8), "model.num_classes=80", *overrides])


class Models(dict[str, Detector]):
    """Rows at full size without memory, by name, built when they are asked for; the same overrides share one."""

    def __missing__(self, name: str) -> Detector:
        row = ROWS[name]
        key = " ".join(row.overrides)
        if key not in self:
            config = composed(row, "model.detector.backbone.pretrained=false")
            assert config.trainer.max_epochs == row.epochs
            with torch.device("meta"):
                self[key] = instantiate(config.model.detector, _convert_="all")
                instantiate(config.criterion)
            instantiate(config.postprocess)
        return self[key]


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()


def test_every_table_is_there() -> None:
    tables = {(row.paper, row.table) for row in ROWS.values()}
    assert {("Co-DETR", f"table {n}") for n in range(2, 14)} <= tables
    assert {("Group DETR (arXiv v1)", place) for place in ("table 1", "table 2", "table 3", "figure 1")} <= tables
    assert {("Group DETR (ICCV 2023)", f"table {n}") for n in (1, 2, 3, 4, 7)} <= tables
    without = [row.name for row in ROWS.values() if "ap" not in row.scores]
    assert all(re.match("group_detr_(f1|t2_dino)", name) for name in without), without


def test_the_documents_count_the_rows() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    assert f"{len(ROWS)} rows of the two papers' tables" in text
    assert f"; {len(READY)} can run now" in text
    assert f"[{len(ROWS)} rows of the papers' tables]" in (ROOT / "README.md").read_text()


def parameters(detector: Detector, *prefixes: str) -> int:
    named = detector.named_parameters()
    return sum(p.numel() for name, p in named if name.startswith(prefixes or ("",)))


def deployed(detector: Detector) -> int:
    """Parameters that inference has, without the backbone: timm's have the same, with frozen norms as buffers."""
    drop = (*detector.training_only_prefixes(), "backbone.")
    return sum(p.numel() for name, p in detector.named_parameters() if not name.startswith(drop))


def of_transformers(model: type, config: type, **options: object) -> int:
    """The same detector in the `transformers` library, by its defaults; without the backbone."""
    body = ResNetConfig(out_features=options.pop("stages", ["stage4"]))
    common = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "num_labels": 80}
    with torch.device("meta"):
        theirs = model(config(**common, num_queries=300, backbone_config=body, **options))
    return sum(p.numel() for name, p in theirs.named_parameters() if "backbone" not in name)


STAGES = ["stage2", "stage3", "stage4"]
COUNTED = {
    "co_detr_t2_conditional_c5_k0": (ConditionalDetrForObjectDetection, ConditionalDetrConfig, {}),
    "co_detr_t2_dab_c5_k0": (DabDetrForObjectDetection, DabDetrConfig, {}),
    "co_detr_t2_deformable_12e_k0": (DeformableDetrForObjectDetection, DeformableDetrConfig, {"stages": STAGES}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_base_detectors_have_the_parameters_of_the_transformers_library(models: Models, name: str) -> None:
    model, config, options = COUNTED[name]
    assert deployed(models[name]) == of_transformers(model, config, **dict(options))


SCHEMES = [("co_detr_t2_conditional_c5", "_k0"), ("co_detr_t2_dab_c5", "_k0"), ("co_detr_t3_dino", "_k0")]
SCHEMES += [("co_detr_t3_deformable_pp", "_k0"), ("group_detr_iccv_t3_conditional", ""), ("group_detr_t2_dn", "")]


@pytest.mark.parametrize(("base", "plain"), SCHEMES)
def test_training_schemes_add_nothing_to_the_deployed_model(models: Models, base: str, plain: str) -> None:
    trained = [row.name for row in READY if row.name.startswith(f"{base}_k")]
    assert len(trained) >= 1
    assert {deployed(models[name]) for name in trained} == {deployed(models[base + plain])}
    assert parameters(models[trained[-1]]) > parameters(models[base + plain])


SAMPLE = ("co_detr_t4_group_dino_swin_l", "group_detr_t1_k3", "group_detr_t2_dab_k11")


K_GROUPS = [row if row.name in SAMPLE else slow(row) for row in READY]


@pytest.mark.parametrize("row", K_GROUPS, ids=_id)
def test_k_groups_are_k_sets_of_query_parameters(models: Models, row: Row) -> None:
    detector = models[row.name]
    groups = next((int(o.split("=")[1]) for o in row.overrides if o.startswith("model.query_groups=")), 1)
    replicas = [name for name in detector.queries if name.startswith("group_")]
    assert len(replicas) == groups - 1
    own = parameters(detector, f"queries.{MAIN}.")
    assert all(parameters(detector, f"queries.{name}.") == own for name in replicas)


# Of the size and the training alone; in small, every row has the same backbone and few queries.
OF_THE_FULL_SIZE = ("trainer", "postprocess", "optimizer", "data", "model/backbone")
OF_THE_FULL_SIZE += ("model.detector.backbone", "model.detector.main.num_queries")


def distinct() -> Iterator[Any]:
    """One row per combination of model, heads and groups; those that differ from an earlier one in numbers are slow."""
    seen: set[str] = set()
    for row in READY:
        kept = " ".join(o for o in row.overrides if not o.startswith(OF_THE_FULL_SIZE))
        kind = re.sub(r"\d+(\.\d+)?", "", kept)
        if kept not in seen:
            yield slow(row) if kind in seen else row
        seen |= {kept, kind}


@pytest.mark.parametrize("row", list(distinct()), ids=_id)
def test_a_step_of_every_distinct_composition(row: Row) -> None:
    """In small: finite, and every parameter has a gradient, which DDP relies on."""
    full = composed(row)
    backbone = full.model.detector.backbone
    first = 1 if "swin" in backbone.name else 0  # a Swin's stages count from 0
    indices = [index + first for index in backbone.out_indices]
    small = [*SIZES, NARROW, "model.num_points=2", "model.num_classes=3", "model.dropout=0"]
    small += [f"model.detector.backbone.out_indices={indices}", "model.detector.main.num_queries=12"]
    kept = tuple(o for o in row.overrides if not o.startswith("model.detector.backbone"))
    config = composed(replace(row, overrides=kept), "model/backbone=resnet10_small", *small)
    read_needed_masks(config)
    torch.manual_seed(0)
    detector, criterion = instantiate(config.model.detector, _convert_="all"), instantiate(config.criterion)
    if criterion.fed_loss is not None:
        criterion.fed_loss.weigh([5, 0, 2])
    targets = Targets(
        boxes=torch.tensor([[0.5, 0.5, 0.4, 0.5], [0.3, 0.6, 0.3, 0.2]])[None],
        labels=torch.tensor([[0, 2]]),
        valid=torch.ones(1, 2, dtype=torch.bool),
        frames=Frames.unscaled(torch.tensor([[64, 64]])),
        masks=torch.rand(1, 2, 64, 64) < 0.5 if config.data.masks else None,
    )
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    losses = criterion(detector(images, torch.zeros(1, 64, 64, dtype=torch.bool), targets), targets)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    assert loss.isfinite()
    silent = [n for n, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent, silent


def test_commands() -> None:
    row = find(ROWS, "group_detr_t1_k11")
    one = command(row, 2, ["seed=1"])
    expected = {"model.query_groups=11", "trainer.max_epochs=12", "trainer.devices=2", "data.batch_size=8", "seed=1"}
    assert expected <= set(one)
    many = torchrun(row, devices=8, nodes=2, extra=[])
    assert "--nnodes=2 --node-rank=$RANK" in many
    assert "data.batch_size=1 " in many
    assert "trainer.num_nodes=2 trainer.devices=8" in slurm(row, devices=8, nodes=2, extra=[])
    with pytest.raises(UserError, match="16 images per step, which 3 processes cannot share"):
        command(row, 3, [])
    with pytest.raises(UserError, match=r"did you mean .*group_detr_t1_k11"):
        find(ROWS, "group_detr_t1_k_11")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "codetr.papers", *arguments], capture_output=True, text=True)


def test_the_command_line() -> None:
    listed = run()
    assert listed.returncode == 0
    assert all(name in listed.stdout for name in ROWS)
    shown = run("group_detr_t1_k11", "data.root=/data/coco")
    assert "AP 37.6" in shown.stderr
    assert shown.stdout.rstrip().endswith("data.root=/data/coco")
    wrong = run("nothing", "--run")
    assert (wrong.returncode, "Traceback" in wrong.stderr) == (2, False)
    needs = run("co_detr_t4_anchor", "--run")
    assert needs.returncode == 2
    assert "needs Anchor DETR" in needs.stderr
