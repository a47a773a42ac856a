"""`python -m codetr.data check` as a person or a CI job uses it: text, page, JSON, exit status, cleaned file."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from coco_files import document, write
from PIL import Image

from codetr.data.__main__ import run
from codetr.data.commands import check
from codetr.errors import UserError


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """train.json and val.json without an error, in the working directory."""
    for name, seed in (("train", 0), ("val", 7)):
        doc = document(6, seed)
        root, _ = write(tmp_path, doc, name)
        for i, image in enumerate(doc["images"]):  # unlike those of the other split
            picture = Image.effect_noise((image["width"], image["height"]), 50 + 10 * i + seed).convert("RGB")
            picture.save(root / image["file_name"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


def arguments(*more: str, train: str = "train.json") -> list[str]:
    own = [f"data.train_annotations={train}", "data.train_images=train"]
    return ["data=custom", *own, "data.val_annotations=val.json", "data.val_images=val", *more]


def plant(data: Path) -> None:
    doc = json.loads((data / "train.json").read_bytes())
    doc["annotations"][0]["bbox"] = [9, 9, -5, 4]
    doc["annotations"][0]["segmentation"] = [[1, 1, 2, 1, 2, 2]]
    doc["annotations"][1] |= {"iscrowd": 0, "bbox": [20, 20, 0.2, 0.2]}
    doc["images"][3]["file_name"] = "<b>.jpg"
    doc["info"] = {"ünï": 1}
    (data / "train.json").write_text(json.dumps(doc))


def test_a_good_set_is_clean(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(arguments()) == 0
    printed = capsys.readouterr().out
    assert "0 errors, 0 warnings" in printed
    assert re.search(r"train +│ +6 │ +1 │", printed)


def test_errors_are_told_in_text_page_and_json(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(data)
    assert check.main(arguments("report=out/check.json", "page=out/check.html")) == 1
    printed = capsys.readouterr().out
    said = re.sub(r"[\s│]+", " ", printed)  # a narrow terminal breaks lines anywhere
    first = json.loads((data / "train.json").read_bytes())["annotations"][0]["id"]
    for text in ("train.json", f"annotation {first} of image", "bbox [9, 9, -5, 4]", "must be above 0", "2 errors"):
        assert text in said
    report = json.loads((data / "out" / "check.json").read_bytes())
    kinds = {f["kind"]: f for f in report["train"]["findings"]}
    assert kinds["inverted box"]["severity"] == "error"
    assert kinds["inverted box"]["count"] == 1
    assert kinds["missing image file"]["records"][0] in said
    assert report["val"]["statistics"]["images"] == 6
    page = (data / "out" / "check.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;.jpg" in page
    assert "<code>bbox</code> is [x, y, width, height]" in page
    assert "<b>.jpg" not in page


class Page(HTMLParser):
    """Addresses that a browser would open, pictures, and tags that are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_what_it_found(data: Path) -> None:
    plant(data)
    check.main(arguments())
    page = Page()
    text = (data / "check.html").read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == []
    assert all(a.startswith(("data:image/jpeg;base64,", "#")) for a in page.addresses)
    assert sum(a.startswith("data:") for a in page.addresses) >= 3
    assert "http" not in text
    anchors = {a[1:] for a in page.addresses if a.startswith("#")}
    assert anchors == set(re.findall('id="(f[0-9-]+)"', text))


def test_warnings_count_only_when_asked(data: Path) -> None:
    shutil.copy(data / "train" / "001.jpg", data / "train" / "spare.jpg")
    doc = json.loads((data / "train.json").read_bytes())
    doc["images"].append({**doc["images"][1], "id": 1, "file_name": "spare.jpg"})
    (data / "train.json").write_text(json.dumps(doc))
    assert check.main(arguments()) == 0
    assert check.main(arguments("strict=true")) == 1


def test_fix_writes_a_file_that_passes_and_keeps_the_rest(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(data)
    before = (data / "train.json").read_bytes()
    assert check.main(arguments("fix=true", "output=clean")) == 0
    assert "1 images removed" in capsys.readouterr().out
    assert (data / "train.json").read_bytes() == before
    cleaned = json.loads((data / "clean" / "train.clean.json").read_bytes())
    assert cleaned["info"] == {"ünï": 1}
    assert len(cleaned["images"]) == 5
    assert check.main(arguments(train="clean/train.clean.json")) == 0
    assert (data / "clean" / "val.clean.json").exists()


def test_fix_says_what_it_cannot_mend(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doc = json.loads((data / "train.json").read_bytes())
    doc["categories"][1] = {"id": 3, "name": "disc"}
    (data / "train.json").write_text(json.dumps(doc))
    assert check.main(arguments("fix=true")) == 1
    assert "not mended: 1 x duplicate category name" in capsys.readouterr().out


def test_one_split_may_be_missing(data: Path) -> None:
    assert check.main(["data=custom", "data.train_annotations=train.json", "data.train_images=train"]) == 0
    with pytest.raises(UserError, match="is not set"):
        check.main(["data=custom"])


def test_the_same_file_for_both_splits_is_one_warning(data: Path) -> None:
    both = [f"data.{s}_{k}" for s in ("train", "val") for k in ("annotations=train.json", "images=train")]
    assert check.main(["data=custom", *both, "report=check.json"]) == 0
    findings = json.loads((data / "check.json").read_bytes())["val"]["findings"]
    assert "one file for both splits" in [f["kind"] for f in findings]


def test_decoding_finds_what_headers_hide(data: Path) -> None:
    """The same pixels in other bytes; a hole in the middle of a file."""
    doc = json.loads((data / "train.json").read_bytes())
    with Image.open(data / "train" / "001.jpg") as picture:
        for name in ("a.png", "b.png"):
            picture.save(data / "train" / name, compress_level=1 if name == "a.png" else 9)
    doc["images"] += [{**doc["images"][1], "id": i, "file_name": n} for i, n in ((1, "a.png"), (2, "b.png"))]
    broken = data / "val" / "003.png"
    with Image.open(data / "val" / "003.jpg") as picture:
        picture.save(broken)
    content = bytearray(broken.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = bytes(400)
    broken.write_bytes(content)
    (data / "train.json").write_text(json.dumps(doc))
    val = (data / "val.json").read_text().replace("003.jpg", "003.png")
    (data / "val.json").write_text(val)
    assert check.main(arguments()) == 0
    assert check.main(arguments("decode=true", "report=check.json")) == 1
    report = json.loads((data / "check.json").read_bytes())
    assert {"same image twice": 2}.items() <= {f["kind"]: f["count"] for f in report["train"]["findings"]}.items()
    assert {"unreadable image file": 1}.items() <= {f["kind"]: f["count"] for f in report["val"]["findings"]}.items()


def test_help_names_the_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "check    Find what is wrong" in capsys.readouterr().out
    assert run(["check", "--help"]) == 0
    assert "fix=false" in capsys.readouterr().out
    assert run([]) == 2
    with pytest.raises(UserError, match="no command chek: did you mean check"):
        run(["chek"])


def test_wrong_use_is_one_line_without_a_stack_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "codetr.data", "check", "data=custm"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Did you mean custom?" in result.stderr
    assert "Traceback" not in result.stderr


def roboflow(data: Path) -> list[str]:
    """_annotations.coco.json of each split among its images."""
    for split in ("train", "val"):
        (data / f"{split}.json").rename(data / split / "_annotations.coco.json")
    own = [f"data.{s}_{k}" for s in ("train", "val") for k in ("annotations", "images")]
    values = [v for s in ("train", "val") for v in (f"{s}/_annotations.coco.json", s)]
    return ["data=custom", *(f"{k}={v}" for k, v in zip(own, values, strict=True))]


def test_files_of_one_name_do_not_overwrite_each_other(data: Path) -> None:
    own = roboflow(data)
    originals = [(data / s / "_annotations.coco.json").read_bytes() for s in ("train", "val")]
    assert check.main([*own, "fix=true", "output=clean"]) == 0
    written = [data / f"clean/_annotations.coco.{s}.clean.json" for s in ("train", "val")]
    assert [json.loads(p.read_bytes()) for p in written] == [json.loads(o) for o in originals]
    assert [(data / s / "_annotations.coco.json").read_bytes() for s in ("train", "val")] == originals
    written[0].write_text("mine")
    assert check.main([*own, "fix=true", "output=clean"]) == 0
    assert (data / "clean" / f"{written[0].name}.old").read_text() == "mine"
    assert json.loads(written[0].read_bytes()) == json.loads(originals[0])


def test_a_fix_never_writes_to_an_original(data: Path) -> None:
    (data / "val.json").rename(data / "train.clean.json")
    before = (data / "train.clean.json").read_bytes()
    own = [a.replace("val.json", "train.clean.json") for a in arguments("fix=true")]
    with pytest.raises(UserError, match=r"train\.clean\.json is an original"):
        check.main(own)
    assert (data / "train.clean.json").read_bytes() == before


def test_a_fix_mends_before_it_removes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cleaned file is the one that was spoilt, number for number."""
    pristine, spoilt = (json.loads((data / "train.json").read_bytes()) for _ in range(2))
    for image in spoilt["images"]:
        image.update(id=str(image["id"]), width=float(image["width"]), height=f"{image['height']}.0")
        image["file_name"] = image["file_name"].upper()
    for record in spoilt["annotations"]:
        record.update({k: str(record[k]) for k in ("iscrowd", "image_id", "category_id", "area")})
        record["bbox"] = [str(v) for v in record["bbox"]]
    (data / "train.json").write_text(json.dumps(spoilt))
    assert check.main(arguments("fix=true")) == 0
    assert f"{len(spoilt['images'])} images mended, {len(spoilt['annotations'])} annot" in capsys.readouterr().out
    assert json.loads((data / "train.clean.json").read_bytes()) == pristine


def test_a_fix_that_would_leave_nothing_is_refused(data: Path) -> None:
    for picture in (data / "train").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match=r"train\.json: nothing is written, for none of its 6 images would be left"):
        check.main(arguments("fix=true"))
    assert not (data / "train.clean.json").exists()
