"""Kernels on a GPU: which GPU there is, how kernels are built, given weights, and called."""
