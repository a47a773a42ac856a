"""The rows of the papers' tables, as they stand in this folder's files."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from codetr.errors import UserError

PAPERS = ("co_detr", "group_detr", "group_detr_iccv")
SCORES = {
    "ap": ("AP", "map"),
    "ap50": ("AP50", "map_50"),
    "ap75": ("AP75", "map_75"),
    "aps": ("APs", "map_small"),
    "apm": ("APm", "map_medium"),
    "apl": ("APl", "map_large"),
}


@dataclass(frozen=True)
class Row:
    """A row of a table of a paper.

    epochs: of the training.
    batch: images per step, in all.
    overrides: what `codetr.train` is given, besides epochs, batch and name.
    scores: the paper's, in percent, by the keys of `SCORES`; what it does not give is absent.
    memory: the paper's, in MB of one GPU, if it gives it.
    hours: the paper's GPU hours, if it gives them.
    needs: what is missing here for the row to run; empty: nothing.
    branch: the auxiliary head that is scored; empty: the decoder.
    masks: the scores are those of masks.
    sources: who says a value of the recipe, by subject (see `codetr.papers.recipe`), where it is not the experiment's.
    departs: where the recipe is not what the paper says, by subject: what it says, and why ours is another.
    note: what else a reader must know.
    """

    name: str
    paper: str
    table: str
    title: str
    row: str
    epochs: int
    batch: int
    scores: Mapping[str, float]
    overrides: tuple[str, ...] = ()
    memory: int | None = None
    hours: int | None = None
    needs: str = ""
    branch: str = ""
    masks: bool = False
    note: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    departs: Mapping[str, str] = field(default_factory=dict)

    @property
    def experiment(self) -> str:
        """Empty where there is none yet."""
        return next((o.removeprefix("experiment=") for o in self.overrides if o.startswith("experiment=")), "")

    def arguments(self, processes: int = 1) -> list[str]:
        """What `codetr.train` is given. Raises UserError where the batch cannot be shared equally."""
        if self.batch % processes:
            raise UserError(f"{self.name} takes {self.batch} images per step, which {processes} processes cannot share")
        return [
            *self.overrides,
            f"trainer.max_epochs={self.epochs}",
            f"data.batch_size={self.batch // processes}",
            f"name={self.name}",
        ]


def load_rows() -> dict[str, Row]:
    """By name, in the order of the papers."""
    return {row.name: row for paper in PAPERS for row in _rows_of(paper)}


def _rows_of(paper: str) -> Iterator[Row]:
    """What a section says holds for its rows unless they say otherwise; overrides, sources and departures add up."""
    content = read(paper)
    for section in content["sections"]:
        shared = {key: value for key, value in section.items() if key != "rows"}
        for name, own in section["rows"].items():
            values = {"paper": content["paper"], **shared, **own}
            values["overrides"] = (*shared.get("overrides", ()), *own.get("overrides", ()))
            for key in ("sources", "departs"):
                values[key] = {**shared.get(key, {}), **own.get(key, {})}
            values["table"] = f"table {values['table']}" if isinstance(values["table"], int) else values["table"]
            scores = {key: values.pop(key) for key in SCORES if key in values}
            yield Row(name=name, scores=scores, **values)


@cache
def read(name: str) -> Any:
    """A file of this folder."""
    text = (files("codetr.papers") / f"{name}.yaml").read_text(encoding="utf-8")
    return OmegaConf.to_container(OmegaConf.create(text))


def find(rows: Mapping[str, Row], name: str) -> Row:
    """Raises UserError for an unknown name, with those that were perhaps meant."""
    if name in rows:
        return rows[name]
    near = difflib.get_close_matches(name, rows, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "`python -m codetr.papers` lists them"
    raise UserError(f"no row is called {name}; {hint}")


def tables(rows: Mapping[str, Row]) -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of every table."""
    for heading, group in itertools.groupby(rows.values(), lambda row: f"{row.paper}, {row.table}: {row.title}"):
        yield heading, list(group)
