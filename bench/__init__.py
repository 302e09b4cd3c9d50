"""Measure jtile's ops against their rivals: `python -m bench run`, then `python -m bench report`."""

import os

# PyTorch's kernels run on memory that JAX has not taken. Read when JAX first looks for a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
