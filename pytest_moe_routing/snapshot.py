"""Writes goldens, through syrupy's `--snapshot-update`. Nothing else of syrupy is used.

syrupy's own hazards (unused snapshots are deleted; a test that never ran counts as unused) all
start with discovery, so this extension discovers nothing and never deletes. A file is replaced in
one step, never half-written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from syrupy.data import SnapshotCollections
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from pytest_moe_routing import goldens

if TYPE_CHECKING:
    from syrupy.data import SnapshotCollection
    from syrupy.location import PyTestLocation
    from syrupy.types import SnapshotIndex


class GoldenExtension(SingleFileSnapshotExtension):
    """Stores `snapshot(name=NAME)` of one model's test as `<its folder>/NAME.golden.json`."""

    _write_mode = WriteMode.TEXT
    file_extension = goldens.SUFFIX.lstrip(".")

    def serialize(self, data: Any, **kwargs: Any) -> str:
        return goldens.serialize(data)

    @classmethod
    def dirname(cls, *, test_location: PyTestLocation) -> str:
        item: Any = test_location.item
        return str(item.callspec.params["moe_model"].folder)

    @classmethod
    def get_file_basename(cls, *, test_location: PyTestLocation, index: SnapshotIndex) -> str:
        return str(index)

    @classmethod
    def matches_test_location(
        cls, *, test_location: PyTestLocation, snapshot_location: str
    ) -> bool:
        return Path(snapshot_location).parent == Path(cls.dirname(test_location=test_location))

    def discover_snapshots(self, **kwargs: Any) -> SnapshotCollections:
        return SnapshotCollections()

    @classmethod
    def write_snapshot_collection(
        cls, *, snapshot_collection: SnapshotCollection, name_order: dict[str, int] | None = None
    ) -> None:
        text = str(next(iter(snapshot_collection)).data)
        goldens.write_in_one_step(Path(snapshot_collection.location), text)
