"""The README's lines for one's own data, as they stand there, but for the size of the detector."""

import os
import re
import subprocess
import sys
from pathlib import Path

from toy import data_overrides, environment, make_coco, overrides

README = Path(__file__).parents[2] / "README.md"


def lines() -> list[str]:
    block = re.search(r"## Train on your own data\n```bash\n(.*?)```", README.read_text(), re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def test_lines_for_ones_own_data(tmp_path: Path) -> None:
    """Images and annotations lie where they say; every line ends well and leaves what it promises."""
    data = tmp_path / "mine"
    make_coco(data, train=4, val=2)
    for split in ("train", "val"):
        text = (data / f"{split}.json").read_text()
        (data / f"{split}.json").write_text(re.sub(r'"file_name": "', f'"file_name": "{split}/', text))
    (tmp_path / "photos").symlink_to(data / "val")
    toy = [o for o in overrides(data) if o not in data_overrides(data)]
    toy += ["augment@data=small", "data.num_workers=0", "trainer.max_epochs=1"]
    small = {"experiment=co_deformable_r50_12e": " ".join(toy), "output=grid.png": "output=grid.png augment@data=small"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    text = "\n".join(["set -e", *lines()])
    for given, instead in small.items():
        assert given in text
        text = text.replace(given, instead)
    variables = {**environment(), "PATH": path}
    done = subprocess.run(
        ["bash", "-c", text], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "check.html").stat().st_size > 10_000
    assert (tmp_path / "grid.png").exists()
    assert (tmp_path / "outputs/mine/metrics.json").exists() or list((tmp_path / "outputs/mine").rglob("metrics.csv"))
    assert len(lines()) <= 10
    assert list(tmp_path.rglob("predictions.json"))
