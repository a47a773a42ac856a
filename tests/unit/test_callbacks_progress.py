"""Speed and time left, in closed form."""

from codetr.callbacks.progress import Meter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_that_of_the_last_stretch_and_time_left_that_of_the_whole_run() -> None:
    clock = Clock()
    meter = Meter(10, clock)
    meter.start(1000)  # continues an earlier run
    for _ in range(5):
        clock.now += 2
        meter.add(8)
    assert meter.due
    assert meter.read(1005, 100) == {"images/s": "4.0", "left": "0:03:20"}
    assert not meter.due
    clock.now += 30  # a validation
    meter.pause()
    clock.now += 1
    meter.add(8)
    assert meter.read(1006, 100) == {"images/s": "8.0", "left": "0:11:23"}  # 41 s for 6 batches, 100 to go


def test_without_an_end_nothing_is_promised() -> None:
    meter = Meter(1, Clock())
    assert meter.read(0, float("inf"))["left"] == "?"
