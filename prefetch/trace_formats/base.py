"""What a trace format is: one way in which others publish the routing of their runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from prefetch.trace import RoutingTrace


class TraceFormat(ABC):
    """Reads one kind of file. Knobs are the fields of a dataclass.

    What the file does not hold is filled in so that replay sees what the recorded run saw, and the trace's metadata says so. Keys
    of the metadata that every format writes: `source`, `model`, `licence`, and `row_bytes`, the bytes of one expert, an int as text.
    """

    @abstractmethod
    def read(self, path: Path) -> RoutingTrace:
        """The routing in `path`, its sequences numbered from 0.

        Raises:
            TraceError: the file is missing, truncated or not of this format; the message names it and what would be right.
        """
