"""Child processes in which a framework's own code answers for itself; see `probe.py`."""
