"""`codetr serve` over HTTP: what it answers, what it refuses, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pycocotools import mask as coco_mask

from codetr.application import compose
from codetr.errors import UserError
from codetr.inference import Model, Result, load
from codetr.serve import bound, serve, settings_of
from codetr.views import TTA, Tiles
from served import process, served

if TYPE_CHECKING:
    from conftest import Trained

TOKEN = "0123456789abcdef"
SEEN = ("codetr_requests_served", "codetr_requests_total200")  # accepted: under way, or answered


@pytest.fixture(scope="module")
def server(sure: Model) -> Iterator[httpx.Client]:
    with served(sure, "max_bytes=300_000", "max_pixels=1_000_000", "batch_wait=0.05") as client:
        yield client


@pytest.fixture(scope="module")
def files(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of three sizes, in PNG and JPEG; the last is stored on its side and grey, the one before has a palette."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for i, pixels in enumerate(photos):
        paths.append(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
        image, exif = Image.fromarray(pixels), Image.Exif()
        if i == len(photos) - 2:
            image = image.quantize(32)
        if i == len(photos) - 1:
            image, exif[0x0112] = image.convert("L"), 6
        image.save(paths[-1], exif=exif)
    return paths


@pytest.fixture(scope="module")
def expected(sure: Model, files: list[Path]) -> list[Result]:
    return [sure.predict(path, score_threshold=0.2)[0] for path in files]


def same(answer: dict[str, Any], result: Result) -> None:
    """Up to what the sums of a batch differ by from those of one image."""
    assert (answer["height"], answer["width"]) == result.size
    objects = answer["objects"]
    assert [one["name"] for one in objects] == result.names
    assert [one["category_id"] for one in objects] == [result.category_ids[i] for i in result.labels.tolist()]
    np.testing.assert_allclose([one["score"] for one in objects], result.scores, atol=1e-5)
    np.testing.assert_allclose([one["box"] for one in objects] or np.zeros((0, 4)), result.boxes_xyxy, atol=1e-3)
    assert result.masks is not None
    for one, mask in zip(objects, result.masks.numpy(), strict=True):
        assert np.mean(coco_mask.decode(one["mask"]) != mask) < 1e-3


def test_answers_are_those_of_predict(server: httpx.Client, files: list[Path], expected: list[Result]) -> None:
    """As a whole body, and as the file of a form."""
    assert min(map(len, expected)) > 3
    for path, result in zip(files, expected, strict=True):
        content = path.read_bytes()
        for sent in ({"content": content}, {"files": {"image": (path.name, content)}}):
            answer = server.post("/predict?threshold=0.2", **sent)
            assert answer.status_code == 200, answer.text
            same(answer.json(), result)


def test_answers_do_not_depend_on_who_else_asks(
    server: httpx.Client, files: list[Path], expected: list[Result]
) -> None:
    """40, with other thresholds and with files that are none among them."""

    def ask(i: int) -> httpx.Response:
        content = b"\xff\xd8 broken" if i % 5 == 4 else files[i % 8].read_bytes()
        return server.post(f"/predict?threshold={0.2 if i % 2 else 0.5}", content=content)

    before = numbers(server)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(40)))
    for i, answer in enumerate(answers):
        assert answer.status_code == (422 if i % 5 == 4 else 200)
        if i % 5 != 4:
            result = expected[i % 8]
            same(answer.json(), result if i % 2 else result.above(0.5))
    after = numbers(server)
    right = sum(i % 5 != 4 for i in range(40))
    assert after["codetr_batch_images_sum"] - before["codetr_batch_images_sum"] == right
    assert after["codetr_batch_images_count"] - before["codetr_batch_images_count"] < right
    assert after["codetr_requests_served"] == 0


def numbers(server: httpx.Client) -> dict[str, float]:
    """Of /metrics, by name and status."""
    text = server.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name + sample.labels.get("status", ""): sample.value for sample in samples if "le" not in sample.labels
    }


def test_views_are_chosen(server: httpx.Client, files: list[Path], sure: Model) -> None:
    """By name, as `predict` has them; a request without any is looked at as before."""
    content, chosen = files[0].read_bytes(), (Tiles(size=96), TTA(scales=[1.0, 1.25]))
    with served(sure, "views.tiles.size=96", "views.tta.scales=[1,1.25]") as client:
        for names, views in (["tta"], chosen[1:]), (["tiles", "tta"], chosen), ([], ()):
            answer = client.post("/predict", params={"threshold": 0.2, "views": names}, content=content)
            same(answer.json(), sure.predict(files[0], score_threshold=0.2, views=views)[0])
    assert server.get("/model").json()["views"] == ["tiles", "tta"]
    refused = server.post("/predict", params={"views": "tile"}, content=content)
    assert (refused.status_code, refused.json()["detail"]) == (
        422,
        "views: there is no 'tile' here: did you mean tiles?",
    )


def test_classes_are_chosen(server: httpx.Client, files: list[Path], expected: list[Result]) -> None:
    names = sorted(set(expected[0].names))
    assert len(names) > 1
    for wanted in ([names[0]], names):
        answer = server.post("/predict", params={"threshold": 0.2, "classes": wanted}, content=files[0].read_bytes())
        assert [o["name"] for o in answer.json()["objects"]] == [n for n in expected[0].names if n in wanted]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int) -> bytes:
    """Its header, and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def in_parts(count: int) -> Iterator[bytes]:
    """Without a length in the head of the request."""
    for _ in range(count):
        yield bytes(10_000)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({"content": b""}, 422, "no image of a kind"),
    "text": ({"content": b"hello"}, 422, "no image of a kind that can be read here: JPEG, PNG"),
    "half a png": ({"content": png(60, 40)}, 422, "cannot be decoded"),
    "postscript": ({"content": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, 422, "no image of a kind"),
    "a bomb": ({"content": png(12_000, 12_000)}, 413, "12000x12000 pixels, and the most are 1,000,000"),
    "a bomb of Pillow's": ({"content": png(65_000, 65_000)}, 413, "and the most are 1,000,000"),
    "too long, as it says": ({"content": bytes(300_001)}, 413, "more than 300,000 bytes"),
    "too long, without saying": ({"content": in_parts(31)}, 413, "more than 300,000 bytes"),
    "too long a file": ({"files": {"image": bytes(300_000)}}, 413, "more than 300,000 bytes"),
    "two files": ({"files": [("image", b"a"), ("image", b"b")]}, 400, "send one file"),
    "a field": ({"files": {"image": b"a"}, "data": {"threshold": "1"}}, 400, "everything else behind /predict?"),
    "no file": (
        {"content": b"--x--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
        400,
        "no file",
    ),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
    "a class": ({"content": b"", "params": {"classes": "cirle"}}, 422, "did you mean circle?"),
    "a threshold": ({"content": b"", "params": {"threshold": "nan"}}, 422, "threshold: "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_say_why(server: httpx.Client, what: str) -> None:
    given, status, reason = REFUSED[what]
    answer = server.post("/predict", **given)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"detail"}
    assert reason in answer.json()["detail"]


def half_a_request(client: httpx.Client) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port))
    connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nhalf")
    return connection


def test_too_many_at_a_time_are_told_when_to_come_again(sure: Model, files: list[Path]) -> None:
    """A request that never ends holds the only place, until its time is over."""
    with served(sure, "max_requests=1", "read_seconds=1") as client, half_a_request(client) as slow:
        while numbers(client)["codetr_requests_served"] == 0:
            time.sleep(0.01)
        refused = client.post("/predict", content=files[0].read_bytes())
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 60
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert client.post("/predict", content=files[0].read_bytes()).status_code == 200
        with half_a_request(client):
            pass
        assert client.get("/health").status_code == 200


def test_who_waits_too_long_is_told_so(sure: Model, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    detect = sure.detect

    def slowly(*given: Any) -> Any:
        time.sleep(0.5)
        return detect(*given)

    monkeypatch.setattr(sure, "detect", slowly)
    with served(sure, "answer_seconds=0.2") as client:
        answer = client.post("/predict", content=files[0].read_bytes())
        assert answer.status_code == 503
        assert "no answer within 0.2 seconds" in answer.json()["detail"]
        assert int(answer.headers["Retry-After"]) >= 1


def test_a_fault_of_the_model_is_logged_and_not_told(
    sure: Model, files: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    detect = sure.detect

    def fails(batch: Any, threshold: float) -> Any:
        if threshold == 0.7:
            raise RuntimeError("a secret")
        if threshold == 0.8:
            raise UserError("this model takes other images")
        return detect(batch, threshold)

    with served(sure) as client:
        monkeypatch.setattr(sure, "detect", fails)
        content = files[0].read_bytes()
        answers = [client.post(f"/predict?threshold={score}", content=content) for score in (0.7, 0.8, 0.9)]
    assert [answer.status_code for answer in answers] == [500, 422, 200]
    assert answers[0].json() == {"detail": "the server failed; its log says why"}
    assert answers[1].json() == {"detail": "this model takes other images"}
    assert "RuntimeError: a secret" in caplog.text


def test_a_token_is_asked_for(sure: Model, files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODETR_TOKEN", TOKEN)
    with served(sure) as client:
        for path in ("/", "/health", "/docs", "/openapi.json"):
            assert client.get(path).status_code == 200, path
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for path in ("/model", "/metrics"):
                assert client.get(path, headers=header).status_code == 401, path
            refused = client.post("/predict", content=files[0].read_bytes(), headers=header)
            assert refused.status_code == 401
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        header = {"Authorization": f"Bearer {TOKEN}", "Host": "detector.example"}
        assert client.post("/predict", content=files[0].read_bytes(), headers=header).status_code == 200
        assert client.get("/model", headers=header).json()["finds_masks"] is True


def test_a_name_of_the_web_does_not_reach_this_machine(server: httpx.Client) -> None:
    port = server.base_url.port
    for name, status in (("localhost", 200), (f"127.0.0.1:{port}", 200), ("[::1]:9", 200), ("detector.example", 400)):
        assert server.get("/health", headers={"Host": name}).status_code == status, name


def test_a_page_of_another_site_is_not_answered(server: httpx.Client, files: list[Path]) -> None:
    for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
        answer = server.post("/predict", content=files[0].read_bytes(), headers={"Sec-Fetch-Site": site})
        assert answer.status_code == status, site


def test_what_is_said_of_model_and_interface(server: httpx.Client, sure: Model) -> None:
    told = server.get("/model").json()
    assert [one["name"] for one in told["classes"]] == list(sure.class_names)
    assert told["max_bytes"] == 300_000
    schema = server.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/health", "/model", "/metrics", "/predict"}
    post = schema["paths"]["/predict"]["post"]
    defaults = {p["name"]: p["schema"].get("default") for p in post["parameters"]}
    assert defaults == {"threshold": 0.3, "classes": [], "views": []}
    assert set(post["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert set(post["responses"]) == {"200", "400", "401", "403", "408", "413", "422", "429", "503"}
    docs = server.get("/docs").text
    assert not re.search(r"""(src|href)=["']https?:""", docs)
    for path in re.findall(r"""(?:src|href)=["'](/[^"']+)""", docs):
        assert server.get(path).status_code == 200


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["host=0.0.0.0"], "host=0.0.0.0: others can reach this address, so that a token is needed"),
        (["host=::"], "so that a token is needed"),
        (["host=my-machine"], "so that a token is needed"),
        (["host=0.0.0.0", "token=1234"], "token: it has 4 characters"),
        (["batch_size=0"], "batch_size=0: must be a whole number, 1 or more"),
        (["max_bytes=many"], "max_bytes=many: must be a whole number"),
        (["batch_wait=-1"], "batch_wait=-1: must be a number, 0 or more"),
        (["read_seconds=nan"], "read_seconds=nan: must be a number"),
        (["score_threshold=30"], "score_threshold=30: must be from 0 to 1"),
        (["port=123456"], "port=123456: must be a whole number from 0 to 65535"),
        (["host=192.0.2.1", f"token={TOKEN}"], "host=192.0.2.1 port=8000: "),
        (["checkpoint=absent.ckpt", "port=0"], "absent.ckpt: no such checkpoint"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *given: None)  # of pytest's own process
    with pytest.raises(UserError, match=re.escape(words)):
        serve(compose("serve", ["checkpoint=best.ckpt", *overrides]))


def test_a_port_that_is_taken_is_named() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: Address already in use; take another"):
            bound("127.0.0.1", port)


def test_only_loopback_needs_no_token() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        assert settings_of(compose("serve", ["checkpoint=x", f"host='{host}'"])).token is None


def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('no fastapi here')")
    command = [sys.executable, "-m", "codetr.serve", "checkpoint=best.ckpt"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == ("error: codetr serve needs more packages (no fastapi here): pip install 'codetr[serve]'\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_exported_files_are_served(
    kind: str, small: Trained, onnx_file: Path, files: list[Path], tmp_path: Path
) -> None:
    path = onnx_file
    if kind == "openvino":
        from codetr.export import export

        path = tmp_path / "model.xml"
        export(compose("export", [f"checkpoint={small.checkpoint}", "format=openvino", f"out={path}"]))
    model = load(path, device="cpu")
    with served(model) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda p: client.post("/predict?threshold=0", content=p.read_bytes()).json(), files))
    for answer, file in zip(answers, files, strict=True):
        (result,) = model.predict(file, score_threshold=0)
        np.testing.assert_allclose([one["score"] for one in answer["objects"]], result.scores, atol=1e-4)
        np.testing.assert_allclose([one["box"] for one in answer["objects"]][:5], result.boxes_xyxy[:5], atol=1e-2)


def ask_on(address: str, content: bytes, answers: list[bytes | None]) -> None:
    """One request on a connection of its own: the content of an answer of status 200, or None for whatever fails."""
    try:
        answer = httpx.post(f"{address}/predict?threshold=0", content=content, timeout=60, trust_env=False)
        answers.append(answer.content if answer.status_code == 200 else None)
    except httpx.TransportError:
        answers.append(None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_how_it_ends(number: signal.Signals, trained: Trained, files: list[Path]) -> None:
    """SIGTERM: all that were accepted are answered, and the status is 143. SIGKILL: an answer is whole, or there is
    none."""
    content, answers = files[0].read_bytes(), []
    with process(trained.checkpoint, "batch_size=1", "batch_wait=0") as (server, address):
        threads = [threading.Thread(target=ask_on, args=(address, content, answers)) for _ in range(16)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=address, trust_env=False) as client:
            while sum(value for name, value in numbers(client).items() if name in SEEN) < 16:
                time.sleep(0.01)
        server.send_signal(number)
        for thread in threads:
            thread.join()
        status = server.wait(60)
    assert len(answers) == 16
    whole = [json.loads(answer) for answer in answers if answer is not None]
    assert all(answer == whole[0] for answer in whole)
    if number == signal.SIGTERM:
        assert len(whole) == 16
        assert status == 128 + signal.SIGTERM
