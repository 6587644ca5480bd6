"""gatecast refuses to run beside the distribution that shares the name of its kernels folder."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def import_kernels(path: Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(path)!r}]; import kernels"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_an_installed_namesake_is_refused(tmp_path: Path) -> None:
    info = tmp_path / "kernels-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 9.9\n")
    refused = import_kernels(tmp_path)
    assert refused.returncode != 0 and "pip uninstall kernels" in refused.stderr and "9.9" in refused.stderr


def test_without_it_kernels_import(tmp_path: Path) -> None:
    assert import_kernels(tmp_path).returncode == 0
