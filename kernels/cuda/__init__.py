"""The GPU's kernels: CUDA C++, compiled by NVRTC when they are first needed."""
