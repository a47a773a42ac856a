"""The command `codetr`, and what it says about a machine."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import codetr
from codetr import doctor
from codetr.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["codetr", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_help_names_every_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert run(monkeypatch) == 2
    assert capsys.readouterr().out == shown
    assert re.findall(r"^  (\w+) {2,}", shown, re.MULTILINE) == list(COMMANDS)
    assert max(map(len, shown.splitlines())) <= 120
    for name in COMMANDS:
        assert importlib.util.find_spec(f"codetr.{name}"), name


def test_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert capsys.readouterr().out.strip() == version("codetr") == pyproject["project"]["version"]


def test_a_mistyped_command_is_guessed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "trian", "experiment=demo") == 2
    assert capsys.readouterr().err == "error: codetr has no command 'trian': did you mean train?\n"
    assert run(monkeypatch, "xyzzy\x1b[2J") == 2
    assert "give one of train, eval" in (err := capsys.readouterr().err)
    assert "\x1b" not in err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # other tests import these modules
def test_a_command_is_its_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra's overrides, a module of commands, argparse's flags, and the status of each."""
    assert run(monkeypatch, "train", "--cfg", "job", "experiment=demo", "seed=41") == 0
    assert re.search(r"^seed: 41$", capsys.readouterr().out, re.MULTILINE)
    assert run(monkeypatch, "predict", "images=photos") == 2
    assert capsys.readouterr().err.startswith("error: checkpoint is not given")
    assert run(monkeypatch, "data", "check", "--help") == 0
    assert "python -m codetr.data check" in capsys.readouterr().out
    assert run(monkeypatch, "papers", "co_detr_t7_k3") == 0
    assert "codetr.train" in capsys.readouterr().out
    assert run(monkeypatch, "papers", "co_detr_t99") == 2


def test_help_imports_nothing_that_is_slow() -> None:
    """Nor does `import codetr`, whose doors open when they are used."""
    code = """
import sys, codetr, codetr.__main__ as command
sys.argv[1:] = ["--help"]
try:
    command.main()
except SystemExit:
    slow = {"torch", "hydra", "lightning", "numpy", "omegaconf", "rich"} & sys.modules.keys()
    sys.exit(str(slow or 0))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "0"


def test_the_function_train_is_not_the_module() -> None:
    """`python -m codetr.train` needs a module of this name; importing it must not put it in the function's place."""
    assert set(codetr.__all__) <= set(dir(codetr))
    assert callable(codetr.train)
    with pytest.raises(ImportError, match=r"codetr\.train is a function"):
        importlib.import_module("codetr.train")
    assert callable(codetr.train)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        codetr.trian  # noqa: B018


def test_doctor_tells_versions_devices_and_the_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CODETR_MSDA", "reference")
    with pytest.raises(SystemExit) as end:
        doctor.main()
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in ("torch", "lightning", "timm", "hydra-core", "codetr"):
        assert re.search(rf"^  {name} +{re.escape(version(name))}$", shown, re.MULTILINE), name
    assert re.search(r"^    deformable attention +reference; CODETR_MSDA$", shown, re.MULTILINE)
    assert "fault" not in shown
    assert str(ROOT) not in shown


def test_doctor_names_what_is_missing_and_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an installation without supervision, with too old a timm, and a kernel that cannot be."""
    needs = ["torch>=2.0", "timm>=99", 'supervision>=99; extra == "supervision"', 'pytest; extra == "dev"']
    monkeypatch.setattr(doctor, "requires", lambda name: needs)
    monkeypatch.setenv("CODETR_MSDA", "triton")
    text, fault = doctor.report()
    assert fault
    assert re.search(rf"timm +{re.escape(version('timm'))} \(needs >=99\)   <-- fault", text)
    assert "Result.to_supervision: missing supervision: pip install 'codetr[supervision]'" in text
    assert re.search(
        r"deformable attention fails: UserError: CODETR_MSDA=triton: it cannot run on cpu.*<-- fault", text
    )


def test_every_extra_has_its_feature() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(pyproject["project"]["optional-dependencies"]) == set(doctor.FEATURES)
