"""Noise kernels by device: `cpu` (C++ behind a C ABI), one sub-package per backend. Nothing in here imports `rse_fast`."""
