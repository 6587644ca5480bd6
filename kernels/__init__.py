"""Triton kernels and their PyTorch references: one operation per file.

The folder shares its import name with Hugging Face's distribution `kernels`, which must not be installed beside it.
"""

from importlib.metadata import PackageNotFoundError, distribution


def _refuse_namesake() -> None:
    try:
        namesake = distribution("kernels")
    except PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution 'kernels' {namesake.version} (Hugging Face) is installed and has the same import name as gatecast's "
        "kernels/: uninstall it from this environment (pip uninstall kernels), or use gatecast's own (make venv)"
    )


_refuse_namesake()
