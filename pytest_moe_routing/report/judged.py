"""Fails a run that judges less of a framework than its release is known to allow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.errors import MoERoutingError, Unsupported
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.report.endings import PASSED
from pytest_moe_routing.report.unanswered import FILES, METHODS, PROPERTY

if TYPE_CHECKING:
    from pytest_moe_routing.session import MoESession
    from pytest_moe_routing.targets.framework import FrameworkTarget

#: So many cases are named for each reason, and so many reasons.
_NAMED, _REASONS = 5, 10
#: The property of a test of which a part is not judged that should be.
_PART = "moe_part_not_judged"
#: What is counted of code that no packaged model runs; nothing is expected of it.
_OF_NO_MODEL = (FILES, METHODS)


def _note(item: pytest.Item, skipped: BaseException) -> None:
    """Tell the reports of a test that its framework has no answer."""
    from pytest_moe_routing.goldens import packaged_directory

    target, reason = _target(item), skipped.__context__
    if target is None or not isinstance(reason, Unsupported):
        return
    model = getattr(item, "funcargs", {}).get("moe_model")
    # Nothing is known of what releases do with a user's own model.
    is_held = model is None or model.folder.parent == packaged_directory()
    asked = {**_asked(item, target), "reason": str(reason), "is_held": is_held}
    item.user_properties.append(("moe_not_judged", asked))


def _note_part(item: pytest.Item, session: MoESession) -> None:
    """Tell the reports of a test that a part of it is not judged, and should be."""
    properties: dict[str, Any] = dict(item.user_properties)
    counts: dict[str, dict[str, int]] = properties.get(PROPERTY, {})
    target = _target(item) if counts else None
    if target is None:
        return
    from pytest_moe_routing.targets.contract import lost_names
    from pytest_moe_routing.targets.expected import is_known_reason

    release, found = (target.package, target.source.version), list[str]()
    for sentence, reasons in counts.items():
        is_asked = session.asks_what_is_known and sentence not in _OF_NO_MODEL
        for reason in reasons:
            is_new = is_asked and is_known_reason(*release, reason) is False
            if is_new or lost_names(*release, reason):
                found.append(reason)
    if found:
        item.user_properties.append((_PART, {**_asked(item, target), "reasons": found}))


def _target(item: pytest.Item) -> FrameworkTarget | None:
    """Return the framework that a test is about."""
    from pytest_moe_routing.targets.framework import FrameworkTarget

    target = getattr(item, "funcargs", {}).get("moe_target")
    return target if isinstance(target, FrameworkTarget) else None


def _asked(item: pytest.Item, target: FrameworkTarget) -> dict[str, Any]:
    assert isinstance(item, pytest.Function)
    return {
        "package": target.package,
        "release": target.source.version,
        "test": item.originalname,
        "case": item.callspec.id if hasattr(item, "callspec") else "",
    }


class JudgedReporter:
    """Counts verdicts, and collects the cases that should have been judged.

    Registered in every process, as the reasons are noted where the tests run.

    Args:
        wanted: How many verdicts the run must give, whatever is known of the release; None where
            that is not given.
        session: The options of the run.
    """

    def __init__(self, wanted: int | None, session: MoESession) -> None:
        self.wanted, self.session = wanted, session
        self.verdicts: set[str] = set()
        #: Cases whose verdict was asked for, and which are not judged.
        self.unjudged: set[str] = set()
        self.missing: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, wanted: str | None, session: MoESession) -> JudgedReporter:
        """Make one from the value of --moe-min-verdicts.

        Raises:
            MoERoutingError: It is no number.
        """
        if wanted and not re.fullmatch("[0-9]{1,9}", wanted):
            found = repr(shorten(wanted))
            raise MoERoutingError(f"--moe-min-verdicts: found {found}, expected a number")
        return cls(int(wanted) if wanted else None, session)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Tell the reports of a test, where it runs, that it has no answer."""
        __tracebackhide__ = True
        try:
            return (yield)
        except pytest.skip.Exception as skipped:
            _note(item, skipped)
            raise
        finally:
            _note_part(item, self.session)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if report.when != "call":
            return
        # A known failure is a verdict, though pytest counts it among what was skipped.
        is_judged = not report.skipped or hasattr(report, "wasxfail")
        if "moe_verdict" in properties and not is_judged:
            self.unjudged.add(report.nodeid)
        if _PART in properties:
            self.missing[report.nodeid] = properties[_PART]
        elif "moe_not_judged" in properties:
            self._note(report.nodeid, properties["moe_not_judged"])
        if "moe_verdict" in properties and is_judged and "moe_not_judged" not in properties:
            from pytest_moe_routing.oracle.verdict import Verdict

            if Verdict(properties["moe_verdict"]["verdict"]).is_given:
                self.verdicts.add(report.nodeid)

    def _note(self, nodeid: str, asked: dict[str, Any]) -> None:
        from pytest_moe_routing.targets.expected import is_known_reason, is_open

        where = asked["package"], asked["release"]
        # A case of a scheme is about the chosen models: perhaps none of them can be judged.
        of_some = bool(self.session.model_patterns) and is_known_reason(*where, asked["reason"])
        is_allowed = of_some or is_open(*where, asked["test"], asked["case"])
        if asked["is_held"] and not is_allowed:
            self.missing[nodeid] = {**asked, "reasons": [asked["reason"]]}

    @property
    def failed(self) -> bool:
        """Whether the run judged too little."""
        if self.wanted is not None:
            return len(self.verdicts) < self.wanted
        return bool(self.missing or (self.unjudged and not self.verdicts))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.failed and session.exitstatus in PASSED:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.failed:
            for line in self._lines():
                terminalreporter.write_line(line, red=True)

    def _lines(self) -> Iterator[str]:
        if self.wanted is not None:
            yield (
                f"moe-routing: --moe-min-verdicts: found {len(self.verdicts)} verdicts, expected "
                f"at least {self.wanted}"
            )
            return
        accept = "this fails the run; --moe-min-verdicts 0 accepts it"
        if not self.missing:
            count = len(self.unjudged)
            are = "1 case is" if count == 1 else f"{count} cases are"
            yield f"moe-routing: no verdict was given, {are} not judged: {accept}"
            return
        what = "1 case is" if len(self.missing) == 1 else f"{len(self.missing)} cases are"
        yield (
            f"moe-routing: {what} not judged, although this framework release, or the newest known "
            f"release before it, is known to answer: {accept}"
        )
        reasons: dict[str, list[str]] = {}
        for asked in self.missing.values():
            for reason in dict.fromkeys(asked["reasons"]):
                reasons.setdefault(reason, []).append(f"{asked['test']}[{asked['case']}]")
        for reason, cases in list(reasons.items())[:_REASONS]:
            more = f" and {len(cases) - _NAMED} more" if len(cases) > _NAMED else ""
            yield f"  {', '.join(cases[:_NAMED])}{more}: {reason}"
        if len(reasons) > _REASONS:
            yield f"  and {len(reasons) - _REASONS} more reasons; a report lists them all"
