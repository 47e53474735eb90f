"""Other implementations of the same thing, where they are installed."""

import importlib
import warnings

import pytest


def independent(name):
    """The module of this name; the test is skipped where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"no independent implementation to compare with: {error}")
