"""The JSON of one device: rows by section as they come, so that a stop loses nothing, and a later run goes on where this one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.atomic import write_json
from prefetch.errors import ResultsError
from scripts.gpu.forked import Row
from scripts.gpu.verdicts import judge

# "device": facts; "sections": name -> {"rows", "commit", "seconds", "stopped"}; "skipped": name -> reason
Found = dict[str, Any]


class Findings:
    """What has been found of one device, written to `path` whenever it grows.

    Raises:
        ResultsError: `path` holds another device's results, or is damaged.
    """

    def __init__(self, path: Path, device: Row):
        self.path = path
        self.found: Found = read(path) if path.exists() else {"sections": {}, "skipped": {}}
        before = self.found.get("device", {}).get("name", device["name"])
        if before != device["name"]:
            raise ResultsError(f"{path} holds results of {before}, this is {device['name']}: choose another --out")
        self.found |= {"device": device}
        self.write()

    def holds(self, section: str) -> bool:
        """Whether it came to its end in an earlier run."""
        return section in self.found["sections"] and self.found["sections"][section]["stopped"] is None

    def begin(self, section: str, commit: str | None) -> None:
        """The section's rows of an earlier run, which was stopped, stay until there are as many new ones: this run may be stopped sooner."""
        self.found["skipped"].pop(section, None)
        self.growing: Found = {"rows": [], "commit": commit, "seconds": None, "stopped": "not at its end yet"}
        self._overtake(section)

    def add(self, section: str, row: Row) -> None:
        self.growing["rows"].append(row)
        self._overtake(section)
        self.write()

    def end(self, section: str, seconds: float, stopped: str | None) -> None:
        """`stopped` says why it did not come to its end."""
        self.growing |= {"seconds": seconds, "stopped": stopped}
        self._overtake(section)
        self.write()

    def _overtake(self, section: str) -> None:
        before = self.found["sections"].get(section, self.growing)
        if None in (before["stopped"], self.growing["stopped"]) or len(self.growing["rows"]) >= len(before["rows"]):
            self.found["sections"][section] = self.growing

    def skip(self, section: str, reason: str) -> None:
        """It was not begun; rows of an earlier run stay."""
        self.found["skipped"][section] = reason
        self.write()

    def judged(self) -> Found:
        """Everything, with what it says of the targets."""
        return judge(self.found)

    def write(self) -> None:
        write_json(self.path, self.judged())


def read(path: Path) -> Found:
    """One device's results.

    Raises:
        ResultsError: the file is damaged.
    """
    try:
        found: Found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ResultsError(f"{path}: not a GPU check's result ({error}); remove it or run the check again") from error
    if not {"device", "sections", "skipped"} <= set(found):
        raise ResultsError(
            f"{path}: not a GPU check's result (no device, sections or skipped); remove it or run the check again"
        )
    return found
