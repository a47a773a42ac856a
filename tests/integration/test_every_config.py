"""Every file in conf/ is part of something that runs, and so is every value that a comment there offers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from codetr import application
from codetr.training import fit
from toy import make_coco, overrides

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"

# Trainings of a step or a few, with validation, loggers, pictures and report.
TRAINED = {
    "loggers": "logger=many logger.wandb.offline=true debug=limit schedule=cosine optimizer=adamw_detr "
    "postprocess=soft_nms trainer.deterministic=true trainer.profiler=simple +callbacks@callbacks=[pictures,report]",
    "rare": "debug=fast_dev_run data/sampling=repeat_factor augment/colour@data.colour=jitter criterion=varifocal "
    "+criterion/fed_loss=sampled metrics.backend=pycocotools optimizer=adamw_deformable trainer.detect_anomaly=true "
    "data.verify=decode trainer.deterministic=warn data.on_error=skip postprocess=nms model/auxiliary_head=[retinanet] "
    "model.detector.heads.retinanet.box_loss=l1",
    "overfit": "debug=overfit callbacks=[default,early_stopping] "
    "trainer.max_epochs=1 trainer.check_val_every_n_epoch=1 data/sampling=class_balanced "
    "augment/colour@data.colour=photometric criterion=quality_focal metrics.backend=faster_coco_eval "
    "trainer.profiler=advanced data.verify=exists logger=csv data.on_error=stop",
    "profiler": "debug=profiler trainer.profiler=pytorch trainer.limit_train_batches=1 trainer.limit_val_batches=1 "
    "postprocess=soft_nms postprocess.suppression.method=gaussian metrics.backend=hotcoco logger=tensorboard "
    "data.verify=complete criterion=focal",
}

# What other tests run, and in which module.
ELSEWHERE = {
    "benchmark": "test_benchmark_step.py",
    "estimate": "test_estimate.py",
    "latency": "test_benchmark_latency.py",
    "analyse": "test_analyse.py",
    "figure/discriminability": "test_analyse.py",
    "figure/instability": "test_analyse.py",
    "figure/conflict": "test_analyse.py",
    "figure/queries": "test_analyse.py",
    "figure/groups": "test_analyse.py",
    "figure/every_group": "test_analyse.py",
    "callbacks/snapshots": "test_analyse.py",
    "callbacks/instability": "test_analyse.py",
    "eval": "test_eval.py",
    "predict": "test_predict.py",
    "serve": "test_serve.py",
    "export": "test_export.py",
    "check": "test_check.py",
    "show": "test_readme.py",
    "convert": "test_convert_command.py",
    "data/voc": "test_formats.py",
    "data/yolo": "test_formats.py",
    "metrics/lvis": "test_lvis.py",
    "callbacks/results": "test_results.py",
    "views/tiles": "test_views_run.py",
    "views/tta": "test_views_run.py",
    "views/none": "test_views_run.py",
    "views/merge/nms": "../unit/test_views_merging.py",
    "views/merge/soft_nms": "../unit/test_views_merging.py",
    "views/merge/wbf": "../unit/test_views_merging.py",
    "criterion/masks": "test_mask2former_run.py",
    "postprocess/masks": "test_mask2former_run.py",
    "trainer/gpu": "modes.py",
    "trainer/ddp": "modes.py",
    "trainer/fsdp": "modes.py",
}
# Built, with every size as it stands there, but not run: they want a data set, weights, and hours.
BUILT = ("experiment/", "model/", "optimizer/", "schedule/", "augment/", "data/")


def files(*given: str, config_name: str = "train") -> set[str]:
    """The files of conf/ that a composition reads, without their suffix."""
    with initialize_config_module("codetr.conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list(config_name, list(given), RunMode.RUN).defaults
    return {one.config_path for one in found if one.config_path and (CONF / f"{one.config_path}.yaml").is_file()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("every_config") / "data"
    make_coco(folder, train=4, val=2)
    return folder


def given(name: str, data: Path) -> list[str]:
    base = [o for o in overrides(data) if not (o.startswith("~") or o == "trainer=cpu")]
    schedule = [o for o in base if o.startswith("schedule")] if "schedule=" in TRAINED[name] else []
    return [*(o for o in base if o not in schedule), "trainer=cpu", *TRAINED[name].split()]


@pytest.mark.filterwarnings("default")  # of the loggers' and the profilers' own code
@pytest.mark.parametrize("name", TRAINED)
def test_trainings(name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = application.compose("train", [*given(name, data), "run_dir=run"])
    fit(config)
    if config.trainer.get("fast_dev_run"):
        return
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file()
    assert (tmp_path / "run/predictions.png").is_file()
    if name == "loggers":
        seen_by_every_logger(tmp_path)
        config = application.compose(
            "train", [*given(name, data), "run_dir=run", "resume=auto", "trainer.max_epochs=4"]
        )
        fit(config)
        assert len(list((tmp_path / "outputs/mlruns").glob("*/*/metrics/train/loss"))) >= 1


def seen_by_every_logger(folder: Path) -> None:
    """Numbers and pictures."""
    (loss,) = (folder / "outputs/mlruns").glob("*/*/metrics/train/loss")
    assert len(loss.read_text().splitlines()) == 6  # three epochs of two steps
    assert list((folder / "outputs/mlruns").glob("*/*/artifacts/predictions/*.png"))
    assert list((folder / "run/wandb").glob("offline-run-*/files/media/images/**/*.png"))
    assert list((folder / "run/tensorboard").glob("events.out.tfevents.*"))
    assert (folder / "run/csv/metrics.csv").is_file()
    in_their_own_parts(folder)


def in_their_own_parts(folder: Path) -> None:
    """Beyond numbers: TensorBoard's plugins, W&B's tables and boxes, MLflow's artifacts, and the final numbers."""
    final = json.loads((folder / "run/metrics.json").read_text())["map"]
    events = EventAccumulator(str(folder / "run/tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["mAP", "losses"]
    scalars = events.Tags()["scalars"]
    for chart in (chart for category in layout.category for chart in category.chart):
        if chart.title in ("AP, AP50, AP75", "AP by size", "AP of classes", "main queries", "auxiliary heads"):
            assert any(re.match(tag, scalar) for tag in chart.multiline.tag for scalar in scalars), chart.title
    curves = events.PluginTagToContent("pr_curves")
    assert "val/pr/all classes" in curves
    assert "val/confusion" in events.Tags()["images"]
    assert events.Scalars("final/map")[-1].value == pytest.approx(final)
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    ).experiment
    assert "final/map" in {info.name.tag for info in experiment.metric_infos}
    (table,) = list((folder / "run/wandb").glob("offline-run-*/files/media/table/val/classes*.json"))[:1]
    assert [row[0] for row in json.loads(table.read_text())["data"]] == ["red", "green", "blue"]
    (boxes,) = list((folder / "run/wandb").glob("offline-run-*/files/media/metadata/**/*.json"))[:1]
    assert json.loads(boxes.read_text())["box_data"]
    assert list((folder / "outputs/mlruns").glob("*/*/artifacts/report.html"))
    (number,) = (folder / "outputs/mlruns").glob("*/*/metrics/final/map")
    assert float(number.read_text().split()[1]) == pytest.approx(final)


def test_every_file_is_run_or_built() -> None:
    every = {str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml")}
    run = set().union(*(files(*given(name, Path("x"))) for name in TRAINED)) | set(ELSEWHERE)
    assert run <= every
    left = {name for name in every - run if not name.startswith(BUILT)}
    assert not left, f"nothing runs {sorted(left)}"
    for name, module in ELSEWHERE.items():
        text = (Path(__file__).parent / module).read_text()
        assert name.rpartition("/")[2] in text, f"{module} no longer runs {name}"


# Of keys whose values are other tests' matter.
OTHER = {
    "precision",
    "format",
    "device",
    "on_error",
    "weights",
    "split",
    "update",
    "fill",
    "activation",
    "norm",
    "places",
    "content",
    "unused",
    "of",
    "foreground",
    "checkpoint",
}


def test_every_value_that_a_comment_offers_is_run() -> None:
    """`key: value  # a | b | c` in the keys of training; `value` itself is run with its file."""
    chosen = {o for line in TRAINED.values() for o in line.split()}
    for path in CONF.rglob("*.yaml"):
        for key, own, comment in re.findall(r"^\s*(\w+): *(\w*)[^#\n]*#(.*\|.*)$", path.read_text(), re.MULTILINE):
            if key in OTHER or "experiment" in path.parts:
                continue
            for value in re.findall(r"(?:^|\|)\s*(\w+)", comment):
                assert value == own or any(o.endswith(f"{key}={value}") for o in chosen), (
                    f"{path.name}: nothing runs {key}={value}"
                )
