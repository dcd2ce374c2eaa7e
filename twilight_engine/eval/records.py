"""A run's folder: settings.json, and results.jsonl with a line for each length, item and method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS, RESULTS = "settings.json", "results.jsonl"

Record = dict[str, Any]


class RunFolder:
    """Results of a run, on disk as soon as they are there; a run that was cut short goes on.

    Args:
        path: made if it is not there.
        settings: whatever decides about results, as JSON values; methods may be added later.
    Raises: ValueError for a folder with other settings, naming them, or with a broken file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.records: list[Record] = []
        path.mkdir(parents=True, exist_ok=True)
        self._check_settings(self.settings)
        self._read()
        self._have = {_key(record) for record in self.records}

    def has(self, length: int, item_id: str, method: str) -> bool:
        return (length, item_id, method) in self._have

    def add(self, records: Iterable[Record]) -> None:
        """Append the records that are not there yet; they are on disk when this returns."""
        new = [record for record in records if _key(record) not in self._have]
        lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in new)
        with (self.path / RESULTS).open("a", encoding="utf-8") as file:
            file.write(lines)
        self.records += new
        self._have |= {_key(record) for record in new}

    def of(self, methods: Sequence[str]) -> list[Record]:
        """The records of these methods."""
        return [record for record in self.records if record["method"] in methods]

    def _check_settings(self, settings: dict[str, Any]) -> None:
        path = self.path / SETTINGS
        if not path.exists():
            if (self.path / RESULTS).exists():
                raise ValueError(
                    f"{self.path} holds {RESULTS} but no {SETTINGS}; use another --out"
                )
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            return
        there = _parse(path.read_text(encoding="utf-8"), str(path))
        names = [n for n in {**there, **settings} if there.get(n) != settings.get(n)]
        if names:
            differ = "; ".join(f"{n} was {there.get(n)!r}, is {settings.get(n)!r}" for n in names)
            raise ValueError(
                f"{self.path} holds results of other settings ({differ}); use another --out, or "
                "the same settings to go on"
            )

    def _read(self) -> None:
        """Read the lines; a last one that was cut off in writing is dropped from the file."""
        path = self.path / RESULTS
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(data[:whole].decode("utf-8").splitlines(), start=1):
            self.records.append(_parse(line, f"{path}, line {number}"))


def _key(record: Record) -> tuple[int, str, str]:
    return record["length"], record["item"], record["method"]


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}); use another --out") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no JSON object; use another --out")
    return value
