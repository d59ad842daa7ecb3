"""Kernels for CUDA devices, in CUDA C++, compiled when first used: multiplication without decoding
(`bits.cu`)."""
