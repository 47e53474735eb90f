"""The child processes that run vLLM's own code."""
