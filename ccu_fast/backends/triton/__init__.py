"""Triton kernels for NVIDIA GPUs, sm_80 and later; Triton's interpreter runs them on CPU tensors for the tests."""
