"""The page of `codetr serve` in a real browser: an image goes in, its objects are drawn, listed and switched."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from codetr.inference import Model, Result
from served import served

WIDE, PHONE = (1280, 900), (390, 844)
FLOOR = 0.05  # the lowest score that the page asks for


@pytest.fixture(scope="module")
def server(sure: Model) -> Iterator[httpx.Client]:
    with served(sure) as client:
        yield client


@pytest.fixture(scope="module")
def photo(photos: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(photos[0]).save(path)
    return path


@pytest.fixture(scope="module")
def expected(sure: Model, photo: Path) -> Result:
    return sure.predict(photo, score_threshold=FLOOR)[0]


def opened(browser: Any, server: httpx.Client, size: tuple[int, int] = WIDE, place: str = "") -> None:
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get("about:blank")
    browser.get(f"{server.base_url}/{place}")
    until(browser, "document.querySelector('#model').textContent")


def until(browser: Any, condition: str) -> Any:
    end = time.monotonic() + 20
    while not (value := browser.execute_script(f"return {condition}")):
        assert time.monotonic() < end, condition
        time.sleep(0.05)
    return value


def choose(browser: Any, path: Path) -> None:
    browser.find_element("id", "file").send_keys(str(path))
    until(browser, "document.querySelector('#status').textContent.includes('found in')")


def drawn(browser: Any, what: str = "boxes") -> int:
    return int(browser.execute_script(f"return document.querySelector('#canvas').dataset.{what}"))


def slide(browser: Any, score: float) -> None:
    script = "const s=document.querySelector('#score');s.value=arguments[0];s.dispatchEvent(new Event('input'))"
    browser.execute_script(script, score)


def quiet(browser: Any, width: int) -> None:
    """Nothing is complained about, and nothing stands out at the side."""
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["desktop", "phone"])
def test_an_image_goes_in_and_its_objects_are_drawn(
    browser: Any, server: httpx.Client, photo: Path, expected: Result, size: tuple[int, int]
) -> None:
    opened(browser, server, size)
    quiet(browser, size[0])
    choose(browser, photo)
    scores = expected.scores.numpy()
    for score in (0.3, 0.05, 0.5, 1.0):  # the first is where the slider stands
        if score != 0.3:
            slide(browser, score)
        count = int((scores >= score).sum())
        assert (drawn(browser), drawn(browser, "masks")) == (count, count)
        assert browser.execute_script("return document.querySelectorAll('#list button').length") == count
        assert f"{count} of {len(scores)} objects" in browser.find_element("id", "status").text
    assert len({int((scores >= score).sum()) for score in (0.3, 0.05, 0.5, 1.0)}) >= 3
    quiet(browser, size[0])


def test_classes_are_switched(browser: Any, server: httpx.Client, photo: Path, expected: Result) -> None:
    opened(browser, server)
    choose(browser, photo)
    slide(browser, FLOOR)
    counts = Counter(expected.names)
    boxes = browser.find_elements("css selector", "#classes input")
    labels = [one.text for one in browser.find_elements("css selector", "#classes label")]
    assert labels == sorted(counts, key=lambda name: (-counts[name], name))
    boxes[0].click()
    assert drawn(browser) == len(expected) - counts[labels[0]]
    browser.find_element("id", "none").click()
    assert drawn(browser) == 0
    browser.find_element("id", "all").click()
    assert drawn(browser) == len(expected)


def test_the_list_is_walked_by_keys(browser: Any, server: httpx.Client, photo: Path, expected: Result) -> None:
    """One stop of Tab; arrows from object to object, which is lit and said in words."""
    from selenium.webdriver.common.keys import Keys

    opened(browser, server)
    choose(browser, photo)
    slide(browser, FLOOR)
    items = browser.find_elements("css selector", "#list button")
    assert [item.get_attribute("tabindex") for item in items[:3]] == ["0", "-1", "-1"]
    items[0].send_keys(Keys.ARROW_DOWN)
    browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    place = browser.execute_script("return state.objects.indexOf(state.lit)")
    assert place == 2
    said = browser.switch_to.active_element.get_attribute("aria-label")
    assert said.startswith(f"{expected.names[2]}, score {expected.scores[2]:.2f}, ")
    assert browser.execute_script("return document.querySelectorAll('#list .lit').length") == 1
    named = browser.find_element("id", "canvas").get_attribute("aria-label")
    assert all(f"{count} {name}" in named for name, count in Counter(expected.names).items())


def test_what_one_points_at_is_lit(browser: Any, server: httpx.Client, photo: Path, expected: Result) -> None:
    """In the middle of the smallest box, over the canvas."""
    opened(browser, server)
    choose(browser, photo)
    slide(browser, FLOOR)
    boxes = expected.boxes_xyxy
    smallest = int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).argmin())
    x, y = ((boxes[smallest, :2] + boxes[smallest, 2:]) / 2).tolist()
    script = """const c=document.querySelector('#canvas'),p=c.getBoundingClientRect(),s=Number(c.dataset.scale);
    c.dispatchEvent(new PointerEvent('pointermove',{clientX:p.left+arguments[0]*s,clientY:p.top+arguments[1]*s,
    pointerType:'mouse'}));return state.objects.indexOf(state.lit)"""
    assert browser.execute_script(script, x, y) == smallest
    assert browser.execute_script("return document.querySelectorAll('#list .lit').length") == 1


def test_masks_are_those_of_the_answer(browser: Any, server: httpx.Client, photo: Path, expected: Result) -> None:
    """Run lengths as pycocotools reads them, and pictures of them that cover as many pixels within their boxes."""
    opened(browser, server)
    choose(browser, photo)
    slide(browser, FLOOR)
    rle = expected.detections.rle
    assert rle is not None
    runs = browser.execute_script("return state.objects.map(one=>runs(one.mask.counts))")
    for own, found in zip(rle, runs, strict=True):
        flat = coco_mask.decode(own).flatten(order="F")
        assert np.array_equal(np.repeat(np.arange(len(found)) % 2, found), flat)
    covered = browser.execute_script(
        """return state.objects.map(({picture:{canvas}})=>{const data=canvas.getContext('2d').getImageData(0,0,
        canvas.width,canvas.height).data;let n=0;for(let i=3;i<data.length;i+=4)n+=data[i]>0;return n})"""
    )
    assert covered == [int(coco_mask.area(own)) for own in rle]


OFFER = """const done=arguments[arguments.length-1],c=document.createElement('canvas');c.width=c.height=64;
c.getContext('2d').fillRect(9,9,20,20);c.toBlob(blob=>{const data=new DataTransfer();
data.items.add(new File([blob],'a.png',{type:'image/png'}));
const kinds={drop:()=>new DragEvent('drop',{dataTransfer:data,bubbles:true,cancelable:true}),
paste:()=>new ClipboardEvent('paste',{clipboardData:data,bubbles:true})};
document.querySelector('#stage').dispatchEvent(kinds[arguments[0]]());done()})"""


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(browser: Any, server: httpx.Client, how: str) -> None:
    opened(browser, server)
    browser.execute_async_script(OFFER, how)
    until(browser, "document.querySelector('#status').textContent.includes('found in')")
    assert browser.execute_script("return [state.size.width,state.size.height]") == [64, 64]
    quiet(browser, WIDE[0])


def test_what_is_wrong_is_said(browser: Any, server: httpx.Client, photo: Path, tmp_path: Path) -> None:
    opened(browser, server)
    (tmp_path / "broken.png").write_bytes(photo.read_bytes()[:300])
    browser.find_element("id", "file").send_keys(str(tmp_path / "broken.png"))
    assert "cannot be decoded" in until(browser, "document.querySelector('#fault').textContent")
    choose(browser, photo)
    assert not browser.find_element("id", "fault").is_displayed()
    browser.get_log("browser")  # Chromium notes the refusal


@pytest.mark.slow
def test_a_token_is_asked_for_or_comes_with_the_address(browser: Any, sure: Model, photo: Path) -> None:
    token = "0123456789abcdef"
    with served(sure, f"token={token}") as server:
        browser.get(str(server.base_url))
        field = browser.find_element("id", "token")
        assert field.is_displayed()
        field.send_keys(token)
        field.submit()
        until(browser, "document.querySelector('#model').textContent")
        choose(browser, photo)
        assert drawn(browser) > 0
        opened(browser, server, place=f"#token={token}")
        choose(browser, photo)
        quiet(browser, WIDE[0])
