"""What a run was told: its overrides, and its configuration beside those of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from codetr.errors import UserError

OVERRIDES, CONFIG = Path(".hydra") / "overrides.yaml", Path(".hydra") / "config.yaml"
ABSENT = "–"
_OF_THE_RUN = ("run_dir", "name", "resume", "resumed_step", "overwrite", "tags", "paths.", "logger.")


def overrides(folder: Path) -> list[tuple[str, str]]:
    """Keys and values that were given in addition to the experiment; empty where the run did not keep them."""
    given = _read(folder / OVERRIDES) or []
    pairs = [str(one).partition("=") for one in given if not str(one).startswith(("hydra.", "run_dir="))]
    return [(key, value) for key, _, value in pairs]


def flat(folder: Path) -> dict[str, str]:
    """key.of.a.value -> value as text, of the whole configuration; empty where the run did not keep it."""
    return dict(_leaves(_read(folder / CONFIG) or {}, ""))


def _read(path: Path) -> Any:
    """Raises UserError for what is no YAML."""
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML, as codetr writes it: {error}") from error


def _leaves(value: Any, key: str) -> Sequence[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [leaf for k, child in value.items() for leaf in _leaves(child, f"{key}.{k}".lstrip("."))]
    return [(key, str(value))]


def differences(configs: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Key -> its value in every configuration, where they are not all the same; without what only names a run."""
    keys = dict.fromkeys(key for config in configs for key in config if not key.startswith(_OF_THE_RUN))
    rows = {key: [config.get(key, ABSENT) for config in configs] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}
