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
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.inputs import read_text

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion
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
        # syrupy asks about every test of a run, also about those that are not ours.
        callspec: Any = getattr(test_location.item, "callspec", None)
        model = callspec.params.get("moe_model") if callspec else None
        return super().dirname(test_location=test_location) if model is None else str(model.folder)

    @classmethod
    def get_file_basename(cls, *, test_location: PyTestLocation, index: SnapshotIndex) -> str:
        return str(index)

    @classmethod
    def matches_test_location(
        cls, *, test_location: PyTestLocation, snapshot_location: str
    ) -> bool:
        return Path(snapshot_location).parent == Path(cls.dirname(test_location=test_location))

    def read_snapshot_data_from_location(
        self, *, snapshot_location: str, snapshot_name: str, session_id: str
    ) -> str | None:
        path = Path(snapshot_location)
        return read_text(path, goldens.MAX_BYTES) if path.exists() else None

    def discover_snapshots(self, **kwargs: Any) -> SnapshotCollections:
        return SnapshotCollections()

    @classmethod
    def write_snapshot_collection(
        cls, *, snapshot_collection: SnapshotCollection, name_order: dict[str, int] | None = None
    ) -> None:
        text = str(next(iter(snapshot_collection)).data)
        goldens.write_in_one_step(Path(snapshot_collection.location), text)


def update(snapshot: SnapshotAssertion, name: str, data: dict[str, Any]) -> None:
    """Write a golden, unless it is what it should be.

    Raises:
        MoERoutingError: It cannot be written. What was there before is untouched.
    """
    if data == snapshot(name=name, extension_class=GoldenExtension):
        return
    result = snapshot.executions[snapshot.num_executions - 1]
    error = result.exception
    if not isinstance(error, OSError):
        # An error of ours is one line, and any other one a defect of ours.
        raise error or AssertionError(f"syrupy did not write {result.snapshot_location}")
    reason = error.strerror or error
    raise MoERoutingError(f"{result.snapshot_location}: cannot be written: {reason}") from None
