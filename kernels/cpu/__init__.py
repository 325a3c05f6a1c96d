"""The CPU's kernels: C++, built on installation."""
