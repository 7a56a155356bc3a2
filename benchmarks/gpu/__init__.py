"""Measurements on a CUDA device. run.sh builds, tests and measures in one call; see docs/kernels.md."""
