"""Every row's resolved configuration against the independent table, value by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf, open_dict

from codetr.papers import Row, load_rows
from papers.resolved import Facts, resolve
from papers.table import PAPERS, Recipe, recipes

ROWS = load_rows()
READY = {name: row for name, row in ROWS.items() if not row.needs}
EXPECTED = recipes(*PAPERS)

# A row of every kind is compared by `make test`, all rows by `make test-all`.
KINDS = ["norms", "lr", "lr_offsets", "detections", "canvas", "class_loss", "dn_number", "hybrid_queries"]


def _sample() -> set[str]:
    first: dict[str, str] = {}
    for name in READY:
        recipe = EXPECTED.get(name, {})
        first.setdefault(repr([recipe[key].value for key in KINDS if key in recipe]), name)
    return set(first.values())


SAMPLE = _sample()
COMPARED = [name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow) for name in READY]

# What every recipe must say, be it that nobody knows.
NEEDED = {"weights", "norms", "frozen", "lr", "lr_backbone", "weight_decay", "batch", "epochs", "milestones", "gamma"}
NEEDED |= {"clip", "queries", "groups", "dn_number", "detections", "short", "long", "canvas", "eval_size", "ema"}
NEEDED |= {"loss_weights", "heads", "suppression"}


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_module("codetr.conf", version_base="1.3"):
        yield


def composed(row: Row) -> DictConfig:
    return _composed(row.overrides, tuple(row.arguments(1)[len(row.overrides) : -1])).copy()


@cache
def _composed(*parts: tuple[str, ...]) -> DictConfig:
    """Rows that differ in the name alone share it."""
    return compose("train", [*(override for part in parts for override in part), "model.num_classes=80"])


def differences(recipe: Recipe, facts: Facts) -> dict[str, str]:
    """What differs, by key, in words."""
    return {
        key: f"{key} is {facts.get(key, 'absent')}; {said.source}: {said.value}"
        for key, said in recipe.items()
        if not said.agrees(facts.get(key))
    }


def test_the_table_and_the_rows_are_the_same() -> None:
    assert sorted(EXPECTED) == sorted(ROWS), "a row without an entry in tests/papers, or an entry without a row"


def test_every_recipe_is_whole() -> None:
    missing = {name: sorted(NEEDED - recipe.keys()) for name, recipe in EXPECTED.items() if NEEDED - recipe.keys()}
    assert {name: keys for name, keys in missing.items() if name in READY} == {}
    for name, recipe in EXPECTED.items():
        assert all(said.source for said in recipe.values()), name


@pytest.mark.parametrize("name", COMPARED)
def test_a_row_is_what_the_sources_say(name: str) -> None:
    found = differences(EXPECTED[name], resolve(composed(READY[name])))
    assert not found, "\n".join([name, *found.values()])


def _at(path: str) -> Callable[[DictConfig, Any], None]:
    """Sets one value of the configuration, whatever stood there."""

    def change(config: DictConfig, value: Any) -> None:
        with open_dict(config):
            OmegaConf.update(config, path, value, merge=False)

    return change


def _rules(**factors: float) -> dict[str, dict[str, Any]]:
    return {name: {"pattern": name, "lr_multiplier": factor} for name, factor in factors.items()}


R50, SWIN, CO = "group_detr_t1_k11", "co_detr_t4_co_dino_swin_l_36e", "co_detr_t4_co_dino"
DINO, DAB, PLAIN = "group_detr_t2_dino", "group_detr_t2_dab_deformable_50e", "co_detr_t2_deformable_12e_k1"
BACKBONE, MODEL = "model.detector.backbone", "model.detector"
SHORT = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]

# (key, row, where, right, wrong): one of every kind of mistake that was ever found here, and of every kind of value.
MISTAKES = [
    ("weights", R50, f"{BACKBONE}.name", "resnet50.tv_in1k", "resnet50"),
    ("weights", SWIN, f"{BACKBONE}.name", "swin_large_patch4_window12_384.ms_in22k", "swin_large_patch4_window12_384"),
    ("frozen", R50, f"{BACKBONE}.frozen_stages", 2, 1),
    ("norms", R50, f"{BACKBONE}.norm", "frozen", "batch"),
    ("drop_path", SWIN, f"{BACKBONE}.arguments.drop_path_rate", 0.6, 0.3),
    ("lr", R50, "optimizer.lr", 1e-4, 2e-4),
    ("lr_backbone", R50, "optimizer.rules", _rules(backbone=0.1), _rules(backbone=1)),
    ("lr_reference", R50, "optimizer.rules", _rules(backbone=0.1), _rules(backbone=0.1, reference_head=0.1)),
    ("lr_reference", PLAIN, "optimizer.rules", _rules(backbone=0.1, reference_head=0.1), _rules(backbone=0.1)),
    ("lr_offsets", DAB, "optimizer.rules", _rules(backbone=0.1), _rules(backbone=0.1, sampling_offsets=0.1)),
    ("lr_offsets", PLAIN, "optimizer.rules", _rules(sampling_offsets=0.1), _rules(backbone=0.1)),
    ("lr", PLAIN, "optimizer.rules", _rules(backbone=0.1), _rules(encoder=0.1)),
    ("weight_decay", CO, "optimizer.weight_decay", 1e-4, 0.05),
    ("undecayed", R50, "optimizer.no_decay", [], ["norm"]),
    ("batch", R50, "data.batch_size", 16, 32),
    ("batch", R50, "trainer.accumulate_grad_batches", 1, 2),
    ("epochs", R50, "trainer.max_epochs", 12, 36),
    ("milestones", R50, "schedule.decay.milestones", {"e12": [11]}, {"e12": [8]}),
    ("gamma", R50, "schedule.decay.gamma", 0.1, 0.5),
    ("warmup_steps", R50, "schedule.warmup_steps", 0, 500),
    ("clip", R50, "trainer.gradient_clip_val", 0.1, 1.0),
    ("detections", DINO, "postprocess.max_detections", 300, 100),
    ("suppression", CO, "postprocess.suppression.iou", 0.8, 0.7),
    ("queries", R50, f"{MODEL}.main.num_queries", 300, 900),
    ("groups", R50, "model.query_groups", 11, 3),
    ("dn_number", DINO, f"{MODEL}.queries.denoising.num_queries", 100, 1000),
    ("dn_box_noise", DINO, f"{MODEL}.queries.denoising.box_noise", 1.0, 0.4),
    ("dn_label_noise", DINO, f"{MODEL}.queries.denoising.label_noise", 0.25, 0.5),
    ("dn_unused", CO, f"{MODEL}.queries.denoising.unused", "background", "masked"),
    ("lambda_1", CO, f"{MODEL}.collaborative.weight", 1.0, 2.0),
    ("lambda_2", CO, "criterion.lambda_2", 2.0, 1.0),
    ("lambda_2", CO, "criterion.lambda_2_by_head", {}, {"atss": 1.0}),
    ("atss_convs", CO, f"{MODEL}.heads.atss.num_convs", 1, 4),
    ("loss_weights", DINO, "criterion.focal", 1.0, 2.0),
    ("matching_cost", DINO, "criterion.matching_cost.focal", 2.0, 1.0),
    ("dropout", R50, "model.dropout", 0.1, 0.0),
    ("size_divisor", CO, "data.size_divisor", 1, 32),
    ("aspect_groups", CO, "data.aspect_ratio_grouping", True, False),
    ("short", R50, "data.train_transform.short_sides", SHORT, SHORT[1:]),
    ("long", R50, "data.train_transform.long_side", 1333, 2400),
    ("eval_size", R50, "data.val_transform.size", 800, 480),
    ("canvas", "co_detr_t4_co_dino_pp_36e", "data.train_transform.canvas", 1024, 1280),
]


def _id(value: Any) -> str:
    return str(value)[:30]


@pytest.mark.parametrize(("key", "name", "where", "right", "wrong"), MISTAKES, ids=_id)
def test_an_injected_mistake_is_caught(key: str, name: str, where: str, right: Any, wrong: Any) -> None:
    """The right value passes, so that the wrong one is what is caught."""
    found = []
    for value in (right, wrong):
        config = composed(READY[name])
        _at(where)(config, value)
        found.append(differences(EXPECTED[name], resolve(config)))
    assert key not in found[0]
    assert key in found[1]
    assert found[1].keys() - found[0].keys() <= {key, "lr_backbone", "milestones", "eval_size"}


def test_an_average_of_the_weights_is_caught() -> None:
    config = composed(READY[R50])
    _at("callbacks.ema")(config, {"decay": 0.9999})
    assert "ema" in differences(EXPECTED[R50], resolve(config))
