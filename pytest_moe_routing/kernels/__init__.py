"""The real kernels: is there a GPU for them, and how they are called."""
