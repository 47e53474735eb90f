"""References in torch. They compute what is meant; they know nothing of kernels or frameworks."""
