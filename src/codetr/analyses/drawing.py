"""What the pictures share: quiet axes, a colour for every label, images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from codetr.names import plotted
from codetr.types import Batch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Heights = Mapping[str, Mapping[str, float | int | None]]


def plots(rows: int, columns: int, width: float = 5.0, height: float = 4.0) -> tuple[Figure, np.ndarray]:
    """A figure that belongs to no window and no global state, and its axes [rows, columns]. Sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def colour(number: int) -> str:
    """One of matplotlib's ten, for the runs or heads with this number."""
    return f"C{number % 10}"


def named(axis: Any, title: str = "", x: str = "", y: str = "", legend: bool = True) -> None:
    """Texts around a plot; none of them is read as a formula."""
    axis.set(title=plotted(title), xlabel=plotted(x), ylabel=plotted(y))
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small")


def pixels(batch: Batch, i: int) -> np.ndarray:
    """Image i without its padding: [h, w, 3] uint8."""
    height, width = batch.frames.sizes[i].tolist()
    return batch.images[i, :, :height, :width].permute(1, 2, 0).cpu().numpy()


def show(axis: Any, image: np.ndarray, title: str = "", **how: Any) -> None:
    """An image or a map in the place of a plot. how: of `matplotlib.axes.Axes.imshow`."""
    axis.imshow(image, **how)
    axis.set_title(plotted(title), fontsize="small")
    axis.set_axis_off()


def bars(axis: Any, heights: Heights, number: int = 0, of: int = 1, name: str | None = None) -> None:
    """A bar per label with its spread. heights: see `by_label`. number, of: which one of so many bars per label. name:
    of this one."""
    places = np.arange(len(heights)) + (number - (of - 1) / 2) * 0.8 / of
    means, spreads = [[one[key] or 0.0 for one in heights.values()] for key in ("mean", "spread")]
    axis.bar(places, means, 0.8 / of, yerr=spreads, color=colour(number), capsize=3, label=name)
    axis.set_ylim(0, max(1.4 * max(means), axis.get_ylim()[1]))  # room for a legend
    axis.set_xticks(range(len(heights)), [plotted(label) for label in heights], rotation=20, ha="right")
