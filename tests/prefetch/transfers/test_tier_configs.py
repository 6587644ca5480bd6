"""Every file in conf/tier describes transfers that can be built and that move the right bytes."""

import mmap
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prefetch.geometry import ExpertKey
from prefetch.transfers.base import TransferState
from prefetch.transfers.link import EmulatedLink
from prefetch.transfers.sources import DiskSource, HostSource
from prefetch.transfers.threads import ThreadTransfers
from tests.prefetch.transfers.gated_source import row_of

TIERS = sorted((Path(__file__).parents[3] / "conf" / "tier").glob("*.yaml"))
KEY = ExpertKey(2, 5)


@pytest.mark.parametrize("path", TIERS, ids=lambda path: path.stem)
def test_tier_moves_an_expert(path, tmp_path):
    tier = OmegaConf.to_container(OmegaConf.load(path))
    assert set(tier) == {"kind", "n_threads", "chunk_bytes", "verify", "link"}
    row = row_of(KEY, 3 * tier["chunk_bytes"] // 2)
    (tmp_path / "pack").write_bytes(row)
    source = {"disk": DiskSource, "host": HostSource}[tier["kind"]](tmp_path / "pack", lambda key: 0, len(row))
    slot = memoryview(mmap.mmap(-1, len(row)))
    link = EmulatedLink(**tier["link"]) if tier["link"] else None
    transfers = ThreadTransfers(source, lambda _: slot, n_threads=tier["n_threads"], chunk_bytes=tier["chunk_bytes"], link=link)
    transfer = transfers.submit(KEY, 0, demand=True)
    transfers.wait_any([transfer])
    transfers.close()
    assert transfer.state is TransferState.DONE and slot == row


def test_emulated_tiers_say_so_in_their_name():
    assert TIERS
    for path in TIERS:
        assert path.stem.endswith("_emulated") == (OmegaConf.load(path).link is not None)
