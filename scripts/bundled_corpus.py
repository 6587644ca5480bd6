"""The bundled model's text: the sources of Python's own standard library, split by module.

Every machine with Python has it. Test suites are left out on both sides (no held-out module is seen through its tests), and
so are the character tables of `encodings`: they are numbers, not text. The language reference that `pydoc` carries is prose,
not code: it is kept apart as the shifted domain, which training never sees either.
"""

from __future__ import annotations

import ast
import hashlib
import lzma
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEPARATOR = 256  # the token between files; tokens 0..255 are the bytes themselves
HELD_OUT_ONE_IN = 16  # modules
SHIFTED_MODULE = "pydoc_data"
EXCLUDED = {"site-packages", "__pycache__", "encodings", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class Corpus:
    """Files of one side of the split, in a fixed order."""

    files: dict[str, bytes]  # path relative to the library -> content

    @property
    def text(self) -> bytes:
        return b"".join(self.files.values())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text).hexdigest()

    def tokens(self) -> np.ndarray:
        """uint16 [N]: a separator before every file, then its bytes."""
        parts = [np.concatenate(([SEPARATOR], np.frombuffer(data, np.uint8))) for data in self.files.values()]
        return np.concatenate(parts).astype(np.uint16)

    def xz_bits_per_byte(self) -> float:
        """What `xz -9e` needs for all files in one stream, the harder opponent: it may copy between files."""
        return xz_bits(self.text) / len(self.text)

    def xz_bits_per_byte_by_file(self) -> float:
        """What `xz -9e` needs for each file on its own, as the model must do with it."""
        return sum(xz_bits(data) for data in self.files.values()) / len(self.text)


def xz_bits(data: bytes) -> int:
    """Size of `data` after `xz -9e`, in bits."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def module_of(path: Path) -> str:
    """The top-level module or package a library file belongs to; `_json` counts as `json`."""
    return Path(path.parts[0]).stem.removeprefix("_")


def is_held_out(module: str) -> bool:
    """Decided by a hash of the module's name, so it never depends on order or machine."""
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def split_library(library: Path | None = None) -> tuple[Corpus, Corpus, Corpus]:
    """(training, held-out, shifted-domain) files of the standard library at `library` (default: this Python's)."""
    root = library or Path(sysconfig.get_paths()["stdlib"])
    by_module: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not any(part in EXCLUDED for part in relative.parts):
            by_module[module_of(relative)].append(relative)
    sides: dict[str, dict[str, bytes]] = {"training": {}, "held out": {}, "shifted": {}}
    for module in sorted(by_module):
        side = "shifted" if module == SHIFTED_MODULE else "held out" if is_held_out(module) else "training"
        for relative in by_module[module]:
            data = (root / relative).read_bytes()
            sides[side][str(relative)] = _prose_in(data) if side == "shifted" else data
    return Corpus(sides["training"]), Corpus(sides["held out"]), Corpus(sides["shifted"])


def _prose_in(source: bytes) -> bytes:
    """The string values of the dictionaries a module assigns: the text itself, without quotes and escapes."""
    assigned = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    texts = [text for node in assigned if isinstance(node, ast.Dict) for text in ast.literal_eval(node).values()]
    return "\n\n".join(texts).encode()
