"""The rows are what the papers print: gains, repeated runs, official sizes; the generated page is current."""

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from codetr.papers import composed, load_rows, markdown
from codetr.papers.page import describe
from codetr.papers.recipe import SUBJECTS, recipe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = load_rows()
SAMPLE = ["co_detr_t4_dab", "co_detr_t6_swin_l_val", "co_detr_t4_co_dino_pp_36e", "group_detr_f1_many_900"]
RUNNABLE = [name for name, row in ROWS.items() if row.experiment and name not in SAMPLE]

# What the papers print beside the numbers: (row, its baseline, gain in AP).
K1_K2 = {
    "co_detr_t2_conditional_c5": (2.1, 2.4),
    "co_detr_t2_dab_c5": (1.9, 2.3),
    "co_detr_t2_deformable_12e": (5.2, 5.8),
    "co_detr_t2_deformable_36e": (3.5, 3.2),
    "co_detr_t3_deformable_pp": (1.6, 2.4),
    "co_detr_t3_dino": (1.6, 1.8),
    "co_detr_t3_deformable_pp_swin_l": (1.2, 1.7),
    "co_detr_t3_dino_swin_l": (0.8, 1.0),
    "co_detr_t11_decoder": (1.6, 2.4),
    "co_detr_t11_atss": (0.6, 1.2),
}
K11 = {
    "t3": {"conditional": 5.0, "conditional_dc5": 4.8, "dab": 3.9, "dab_dc5": 4.4, "dn": 2.0, "dn_dc5": 2.6}
    | {"dab_deformable": 1.5, "dino": 0.7},
    "t4": {"conditional": 2.5, "conditional_dc5": 2.1, "dab": 2.3, "dab_dc5": 2.2, "dn": 1.4, "dn_dc5": 0.5}
    | {"dab_deformable": 1.6, "dino": 0.4, "dino_swin_l": 0.4},
}
V1_K11 = {
    "dab": 3.9,
    "dab_50e": 2.3,
    "dab_dc5": 4.4,
    "dab_dc5_50e": 2.2,
    "dab_deformable": 1.5,
    "dab_deformable_50e": 1.6,
}
V1_K11 |= {"dn_dc5": 2.6}
COMPONENTS = {"head_12e": 4.5, "head_36e": 2.9, "queries_12e": 3.4, "queries_36e": 2.0}
COMPONENTS |= {"both_12e": 5.2, "both_36e": 3.5}
GAINS = [(f"{name}_k{k}", f"{name}_k0", gain) for name, pair in K1_K2.items() for k, gain in enumerate(pair, 1)]
GAINS += [
    (f"group_detr_iccv_{t}_{n}_k11", f"group_detr_iccv_{t}_{n}", gain)
    for t, of in K11.items()
    for n, gain in of.items()
]
GAINS += [(f"co_detr_t9_{n}", f"co_detr_t9_neither_{n[-3:]}", gain) for n, gain in COMPONENTS.items()]
GAINS += [(f"group_detr_t2_{name}_k11", f"group_detr_t2_{name}", gain) for name, gain in V1_K11.items()]
GAINS += [("group_detr_t1_k11", "group_detr_t1_k1", 5.0), ("group_detr_t1_50e_k11", "group_detr_t1_50e_k1", 2.5)]
GAINS += [("co_detr_t11_faster_rcnn_k2", "co_detr_t11_faster_rcnn_k0", 0.8)]

# H-Deformable-DETR: 48.7 in its own paper (table 4), 48.4 when the authors of Co-DETR trained it (table 7).
TRAINED_AGAIN = {"co_detr_t4_h_deformable", "co_detr_t7_h_deformable"}


@pytest.mark.parametrize(("name", "baseline", "gain"), GAINS, ids=[name for name, _, _ in GAINS])
def test_the_printed_gains_are_the_differences(name: str, baseline: str, gain: float) -> None:
    assert ROWS[name].scores["ap"] - ROWS[baseline].scores["ap"] == pytest.approx(gain, abs=1e-9)
    assert (ROWS[name].epochs, ROWS[name].batch) == (ROWS[baseline].epochs, ROWS[baseline].batch)


def test_the_same_run_has_the_same_ap_wherever_a_paper_repeats_it() -> None:
    runs = defaultdict(dict)
    for row in ROWS.values():
        if row.scores and not row.branch and not row.needs and row.name not in TRAINED_AGAIN:
            overrides = frozenset(row.overrides) - {"evaluate_heads=true"}
            official = "experiment=official/co_deformable_detr_r50_1x_coco"
            if official in overrides:  # by its parts
                parts = {"experiment=deformable_pp_r50_12e", "model/auxiliary_head=[faster_rcnn,atss]"}
                overrides = overrides - {official} | parts
            runs[row.paper, overrides, row.epochs][row.name] = row.scores["ap"]
    repeated = {key: names for key, names in runs.items() if len(names) > 1}
    assert len(repeated) >= 15
    for names in repeated.values():
        assert len(set(names.values())) == 1, names


def test_scores_are_in_their_order() -> None:
    for row in ROWS.values():
        scores = row.scores
        if "ap50" in scores:
            assert scores["ap50"] > scores["ap75"] > scores["ap"] > 0, row
        if "aps" in scores:
            assert scores["aps"] < scores["apm"] < scores["apl"], row


def test_the_rate_drops_before_the_end() -> None:
    """Once: every length that the papers train has its own milestone in conf/schedule/step.yaml."""
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train")
    schedule, own = instantiate(config.schedule), config.schedule.decay.milestones
    for epochs in {row.epochs for row in ROWS.values() if not row.needs}:
        (milestone,) = own[f"e{epochs}"]
        assert 0.7 * epochs < milestone < epochs
        for epoch, factor in ((milestone - 0.5, 1.0), (milestone, 0.1), (epochs - 0.5, 0.1)):
            assert schedule.factor(1, epoch, float(epochs)) == pytest.approx(factor)


def test_co_dino_has_the_official_number_of_parameters(official: Path) -> None:
    """By the modules of the official model."""
    counted = json.loads((official / "keys" / "co_dino_5scale_r50_1x_coco.json").read_text())["parameters_by_module"]
    own = ["model.num_classes=80", "model.detector.backbone.pretrained=false"]
    with initialize_config_module("codetr.conf", version_base="1.3"):
        config = compose("train", [*ROWS["co_detr_t4_co_dino"].arguments(), *own])
    with torch.device("meta"):
        detector = instantiate(config.model.detector, _convert_="all")
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in detector.named_children()}
    assert count["neck"] == counted["neck"]
    assert count["heads"] == counted["rpn_head"] + counted["roi_head"] + counted["bbox_head"]
    assert sum(count[name] for name in ("encoder", "adapter", "queries", "decoder")) == counted["query_head"]


def test_parameters_are_what_the_paper_counts() -> None:
    """Co-DETR, tables 5 and 6: the backbone of ViT-L, the whole deployed detector of Swin-L."""
    counted = json.loads((RESULTS / "rows.json").read_text())
    assert round(counted["co_detr_t5_vit_l_val"]["parameters"]["backbone"]) == 304
    assert round(counted["co_detr_t4_co_dino_swin_l_36e"]["parameters"]["inference"]) == 218


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "reproduction.md").read_text()
    assert page == markdown(ROWS, RESULTS), "run `make readme`"


def test_finished_rows_appear_in_the_page(tmp_path: Path) -> None:
    shutil.copy(RESULTS / "rows.json", tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "co_detr_t3_deformable_pp_k2.json").write_text(json.dumps({"map": 0.4937, "map_50": 0.67}))
    branches = {"map": 0.49, "branches": {"atss": {"map": 0.4812}}}
    (tmp_path / "rows" / "co_detr_t11_atss_k2.json").write_text(json.dumps(branches))
    masks = {"map": 0.1, "segm": {"map": 0.3717}}
    (tmp_path / "rows" / "group_detr_t3_mask2former.json").write_text(json.dumps(masks))
    cells = [[cell.strip() for cell in line.split("|")] for line in markdown(ROWS, tmp_path).splitlines()]
    assert {(row[1], row[4]) for row in cells if len(row) > 5 and row[4] in ("49.4", "48.1")} == {
        ("Deformable-DETR++, K = 2", "49.4"),
        ("ATSS, K = 2", "48.1"),
    }
    assert {row[7] for row in cells if len(row) > 8 and row[1] == "Mask2Former"} == {"37.2"}  # of masks


@pytest.mark.parametrize("name", [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in RUNNABLE)])
def test_the_page_says_what_the_rows_say(name: str) -> None:
    recorded = json.loads((RESULTS / "rows.json").read_text())[name]["recipe"]
    values = recipe(ROWS[name], composed(ROWS[name]))
    assert {value.subject: value.value for value in values} == recorded, "run `python -m benchmarks papers/rows`"
    assert all(value.source for value in values)


def test_a_row_tells_who_says_its_values_and_where_it_departs() -> None:
    lines = list(describe(ROWS["co_detr_t4_co_dino"], composed(ROWS["co_detr_t4_co_dino"])))
    assert any("0.0002, backbone x 0.1  [Sense-X/Co-DETR co_dino_5scale_r50_1x_coco.py]" in line for line in lines)
    assert any(line.startswith("departs in detections: The paper says NMS") for line in lines)
    plain = list(describe(ROWS["co_detr_t4_dino_12e"], composed(ROWS["co_detr_t4_dino_12e"])))
    assert not [line for line in plain if line.startswith("departs")]


def test_who_says_a_value_that_a_row_sets_is_said() -> None:
    """A value that a row or its section sets is its own line's in the table, but for those which no table prints."""
    unprinted = {"drop path", "weight decay", "detections", "learning rate", "batch", "losses", "average of weights"}
    for row in ROWS.values():
        for name in unprinted - row.sources.keys():
            keys = SUBJECTS[name].keys
            assert not [o for o in row.overrides if o.lstrip("+").startswith(keys) and o != "evaluate_heads=true"], row


def test_a_row_that_needs_something_prints_no_command() -> None:
    for how in ([], ["--slurm", "8"], ["--torchrun", "8"], ["--run"]):
        given = [sys.executable, "-m", "codetr.papers", "co_detr_t5_vit_l_val", *how]
        done = subprocess.run(given, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "cannot run yet, it needs a checkpoint pretrained on Objects365" in done.stderr


def test_run_passes_on_what_is_appended_and_the_exit_code() -> None:
    given = [sys.executable, "-m", "codetr.papers", "group_detr_t2_dab", "--run", "optimizer.nonsense=1"]
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "optimizer.nonsense" in done.stderr
    assert "Traceback" not in done.stderr
