"""The commands that the pages show for programs which replay or import routing: each composes, as it is written there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from experiments import config
from experiments.import_trace import ImportTraceConfig
from tests.experiments.in_process import CONF

PAGES = ("README.md", "docs/replay.md", "docs/traces.md", "conf/replay.yaml", "conf/break_even.yaml", "conf/import_trace.yaml")
COMMAND = re.compile(r"python -m experiments\.(replay|break_even|import_trace) (.*[=].*)")
FILLED_IN = re.compile(r"^(Usage|NAME)|GROUP=|format=NAME")  # lines of --help that say how, not what


def shown() -> list[tuple[str, tuple[str, ...]]]:
    """(program, overrides) of every command on the pages, once."""
    pages = [(CONF.parent / Path(page)).read_text().replace("\\\n", " ") for page in PAGES]  # broken lines are one
    lines = (line for page in pages for line in page.splitlines())
    found = (COMMAND.search(line) for line in lines if not FILLED_IN.search(line))
    return list(dict.fromkeys((m[1], tuple(shlex.split(m[2], comments=True))) for m in found if m))


def test_there_are_commands_of_each_program() -> None:
    assert {program for program, _ in shown()} == {"replay", "break_even", "import_trace"}


@pytest.mark.parametrize(
    ("program", "overrides"), shown(), ids=lambda part: " ".join(part) if isinstance(part, tuple) else part
)
def test_a_command_composes(program: str, overrides: tuple[str, ...]) -> None:
    config.register()
    ConfigStore.instance().store(name="import_trace_schema", node=ImportTraceConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        if "--multirun" in overrides:  # its first job
            overrides = tuple(part.partition(",")[0] for part in overrides if part != "--multirun")
        compose(program, overrides=list(overrides))
