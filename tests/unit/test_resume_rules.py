"""The table of what may change on resume: docs/resume.md against what happens, row by row."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from codetr import application, resume
from codetr.errors import UserError

DOCS = Path(__file__).parents[2] / "docs" / "resume.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in re.findall(r"^\| `.*", DOCS.read_text(), re.M)
]
CASES = [(pattern, row[1], row[0]) for row in ROWS for pattern in re.findall(r"`([^`]+)`", row[0].split(" with ")[0])]
CHECKPOINT = Path("last.ckpt")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    overrides = ["experiment=co_deformable_r50_12e", "model.num_classes=3", "run_dir=x", "+criterion/fed_loss=sampled"]
    config = application.plain(application.compose("train", overrides))
    config["trainer"]["strategy"] = config["data"]["prepare"] = {}  # a word and null here, but not everywhere
    return config


def checkpoint(config: dict[str, Any], complete: bool) -> dict[str, Any]:
    epoch = {"ready": 1, "started": 1, "processed": int(complete), "completed": 0}
    batches = {"ready": 2, "started": 2, "processed": 2, "completed": 1}
    loop = {
        "state_dict": {"combined_loader": [{"epoch": 0, "images": 4, "order": {}}]},
        "epoch_progress": {"current": epoch},
        "epoch_loop.batch_progress": {"current": batches, "total": dict(batches), "is_last_batch": complete},
    }
    return {"codetr": {"config": config}, "loops": {"fit_loop": loop}, "global_step": 2}


def effect(saved: dict[str, Any], now: dict[str, Any], complete: bool) -> str:
    try:
        said = resume.check_configuration(CHECKPOINT, checkpoint(saved, complete), now)
    except UserError:
        return "refused"
    assert len(said) <= 1
    return said[0].partition(": ")[2].partition(" (")[0] if said else "nothing"


@pytest.mark.parametrize(("pattern", "promise", "row"), CASES, ids=[case[0] for case in CASES])
def test_each_row_of_the_table_is_what_happens(config: dict[str, Any], pattern: str, promise: str, row: str) -> None:
    now = OmegaConf.create(copy.deepcopy(config))
    key = re.sub(r"\.?\*$", ".changed", pattern).replace("*", "any") if pattern != "*" else "evaluate_heads"
    new = "codetr.trainer.FullyShardedStrategy" if " with " in row else "another"
    OmegaConf.update(now, key, new, force_add=True, merge=False)
    found = [effect(config, OmegaConf.to_container(now), complete) for complete in (False, True)]
    promised = {
        "may change": ["nothing"] * 2,
        "takes effect, and is said": ["takes effect"] * 2,
        "has no effect, and is said": ["has no effect"] * 2,
        "refused": ["refused"] * 2,
        "takes effect at an epoch's end, and is said; refused within an epoch": ["refused", "takes effect"],
    }
    assert found == promised[promise]


def test_the_table_in_docs_is_the_one_in_code(config: dict[str, Any]) -> None:
    assert resume.table() in DOCS.read_text()
    assert effect(config, copy.deepcopy(config), complete=False) == "nothing"


def test_every_key_of_the_configuration_has_a_row(config: dict[str, Any]) -> None:
    rest = {key for key, _ in resume._leaves(config) if resume.rule_of(resume.Change(key, 0, 1)).keys == ("*",)}
    assert {key.split(".")[0] for key in rest} <= {
        *("evaluate_heads", "normalise_over_step", "static_shapes", "compile"),
        *("callbacks", "metrics", "postprocess"),
    }


@pytest.mark.parametrize(
    ("epochs", "images", "complete", "batch", "world", "batches", "accumulate", "steps"),
    [
        (0, 4, False, 2, 1, 6, 1, 2),  # as it was
        (0, 4, False, 1, 4, 3, 1, 1),
        (3, 8, False, 1, 2, 6, 2, 3 * 3 + 2),
        (0, 4, True, 4, 1, 3, 1, 3),
        (4, 4, True, 1, 2, 7, 2, 5 * 4),  # an accumulated epoch ends with a smaller step
    ],
)
def test_the_position_in_new_units(
    epochs: int, images: int, complete: bool, batch: int, world: int, batches: int, accumulate: int, steps: int
) -> None:
    """By counting: whole epochs, and the steps of the current one."""

    class Sampler:
        batch_size, world_size, order_key = batch, world, {"images": 9}

        def __len__(self) -> int:
            return batches

    content = checkpoint({}, complete)
    loop = content["loops"]["fit_loop"]
    loop["state_dict"]["combined_loader"][0].update(epoch=epochs, images=images)
    ahead = resume.go_on(content, Sampler(), batches, accumulate)
    assert content["global_step"] + ahead == steps
    progress = loop["epoch_loop.batch_progress"]
    done = batches if complete else images // (batch * world)
    assert progress["current"] == {"ready": done, "started": done, "processed": done, "completed": done - 1}
    assert progress["total"]["ready"] == epochs * batches + done
