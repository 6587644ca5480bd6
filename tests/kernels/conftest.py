"""Kernel tests run under Triton's interpreter with its bf16 arithmetic put right."""

from tests.kernels.interpreter_bf16 import repair

repair()
