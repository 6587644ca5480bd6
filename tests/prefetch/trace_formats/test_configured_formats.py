"""Every format in conf/format keeps to what a format promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.config import check_knobs
from prefetch.errors import TraceError
from prefetch.trace_formats.base import TraceFormat

FORMATS = sorted((Path(__file__).parents[3] / "conf/format").glob("*.yaml"))


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.stem)
def test_it_refuses_what_is_not_its_own_in_one_line(path: Path, tmp_path: Path) -> None:
    config = OmegaConf.load(path)
    check_knobs("format", config)  # type: ignore[arg-type]
    reader = instantiate(config)
    assert isinstance(reader, TraceFormat)
    for name, content in (("empty", b""), ("text", b"layer,expert\n0,1\n"), ("binary", bytes(range(256)))):
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "text", "binary", "missing", "."):
        with pytest.raises(TraceError) as error:
            reader.read(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
