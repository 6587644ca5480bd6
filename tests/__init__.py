"""All tests run with Triton's interpreter, which needs no GPU; triton reads the variable once, when it is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
