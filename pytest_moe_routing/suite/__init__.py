"""The golden suite: the test modules that `--moe-golden` collects, and what they freeze."""
