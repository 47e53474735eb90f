"""What kernels make of calls, and the builtin target of routers, is what was reviewed.

`pytest tests/test_kernel_table.py --snapshot-update` accepts a change of the data or of the target;
`git diff` then says which methods of which releases it concerns.
"""

from __future__ import annotations

import pytest
from kernel_table import CALLS, table
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from pytest_moe_routing.schemes import SERVED_SCHEMES


class Text(SingleFileSnapshotExtension):
    """A table as a text file."""

    file_extension = "txt"
    _write_mode = WriteMode.TEXT


@pytest.mark.parametrize("scheme", SERVED_SCHEMES)
def test_table(scheme, snapshot):
    assert table(scheme) == snapshot(extension_class=Text)


def test_calls_are_distinct():
    assert len(CALLS) == len(set(CALLS)) > 1000
