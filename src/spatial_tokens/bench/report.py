"""A benchmark's results as a file: the machine, the command, and every row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from os import PathLike
from typing import Any

from spatial_tokens.bench.comparison import Row
from spatial_tokens.errors import SpatialTokensError, shown
from spatial_tokens.storage.files import write_text
from spatial_tokens.storage.text import read_text

FORMAT = 1


@dataclass(frozen=True)
class Report:
    """Rows, and what they were taken on."""

    command: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def write(self, path: str | PathLike[str]) -> None:
        """Writes JSON, completely or not at all.

        Raises:
            SpatialTokensError: If it cannot be written.
        """
        write_text(
            path, json.dumps({"format": FORMAT, **asdict(self), "rows": [_plain(row) for row in self.rows]}, indent=1) + "\n"
        )


def _plain(row: Row) -> dict[str, Any]:
    """JSON has no NaN and no infinity: figures that are none are left out."""
    return {**asdict(row), "values": {name: value for name, value in row.values.items() if isfinite(value)}}


def read_report(path: str | PathLike[str]) -> Report:
    """The report that `Report.write` wrote.

    Raises:
        SpatialTokensError: If it cannot be read or is not one.
    """
    try:
        content = json.loads(read_text(path))
    except SpatialTokensError:
        raise
    except ValueError as error:
        raise SpatialTokensError(f"{path} is not JSON: {error}; give a file that `spatial-tokens bench --json` wrote") from error
    except RecursionError as error:
        raise SpatialTokensError(f"{path} is nested too deeply; give a file that `spatial-tokens bench --json` wrote") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise SpatialTokensError(f"{path} is no benchmark report of format {FORMAT}: found {shown(found)}")
    try:
        json.dumps(content, ensure_ascii=False).encode()  # JSON can say what UTF-8, and a terminal, cannot
        command, machine = content["command"], content["machine"]
        if not isinstance(command, str) or not isinstance(machine, dict):
            raise TypeError("command must be a string and machine an object")
        return Report(command, machine, [_row(row) for row in content["rows"]])
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise SpatialTokensError(f"{path} is a damaged benchmark report: {type(error).__name__}: {error}") from error


def _row(fields: dict[str, Any]) -> Row:
    values = {str(name): float(value) for name, value in fields["values"].items()}
    setting = {str(name): value for name, value in fields["setting"].items()}
    if not all(isfinite(value) for value in values.values()) or values.get("ms", 1.0) <= 0:
        raise ValueError(f"values must be finite and times positive, got {shown(values)}")
    if not all(isinstance(value, (str, int)) for value in setting.values()):
        raise TypeError(f"settings must be strings and integers, got {shown(setting)}")
    failure = fields["failure"]
    if failure is not None and not isinstance(failure, str):
        raise TypeError(f"failure must be a string or null, got {shown(failure)}")
    return Row(str(fields["suite"]), str(fields["subject"]), str(fields["implementation"]), setting, values, failure)


def paired_rows(before: Report, after: Report) -> list[tuple[Row, Row, float]]:
    """Rows that both reports timed, with the second's time over the first's.

    Raises:
        SpatialTokensError: If they have none in common.
    """
    timed = {row.key: row for row in before.rows if "ms" in row.values}
    pairs = [(timed[row.key], row) for row in after.rows if row.key in timed and "ms" in row.values]
    if not pairs:
        raise SpatialTokensError("the two reports have no timed row in common; run the same suites, dtypes and batches")
    return [(a, b, b.values["ms"] / a.values["ms"]) for a, b in pairs]


def settings_of(rows: Sequence[Row]) -> list[str]:
    """The names of all rows' settings, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row.setting))
