"""The wheel carries conf/ and kernels/, and works from an empty directory without the checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_", "COVERAGE"))}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; its requirements are borrowed from the running one."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install", *options, wheel, cwd=home)
    # A path line, not a site directory: the editable install of the running environment stays out of it.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return home / "bin" / "python"


def test_the_wheel_holds_every_config_and_kernel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "conf", "kernels", "src"], cwd=ROOT, capture_output=True, text=True)
    for path in tracked.stdout.split():
        top, _, rest = path.partition("/")
        inside = {"conf": f"codetr/conf/{rest}", "kernels": f"codetr/kernels/{rest}", "src": rest}[top]
        assert inside in names or path.endswith(".md"), f"{path} is missing from the wheel"


def test_the_wheel_composes_a_run_from_an_empty_directory(python: Path, tmp_path: Path) -> None:
    where = run(python, "-c", "import codetr; print(codetr.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where
    job = run(python, "-m", "codetr.train", "--cfg", "job", "experiment=demo", cwd=tmp_path)
    assert "codetr.models.detector.build_detector" in job


def test_the_wheel_brings_the_command(python: Path, tmp_path: Path) -> None:
    command = python.with_name("codetr")
    assert "predict" in run(command, "--help", cwd=tmp_path)
    assert run(command, "--version", cwd=tmp_path) == f"{version('codetr')}\n"
    assert run(command, "train", "--cfg", "job", "-p", "metrics", cwd=tmp_path).startswith("# @package metrics")


@pytest.mark.slow
def test_the_wheel_trains_from_an_empty_directory(python: Path, tmp_path: Path) -> None:
    run(python, "-m", "codetr.train", "experiment=demo", "data=shapes_tiny", "debug=fast_dev_run", cwd=tmp_path)
