"""Pallas kernels compiled by Triton: kernel → source → cubin → custom call."""
