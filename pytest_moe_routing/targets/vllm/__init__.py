"""vLLM: everything that is known about it, and the code that asks it."""
