"""What each test file costs: processor seconds, with all processes that its tests start, against tests/budgets.toml.

Processor seconds hardly depend on what else a machine does. In CI a session fails when a file takes far more than its
budget: either make it cheaper, or raise the budget in the same commit, where everybody sees it.
"""

import os
from collections import defaultdict
from collections.abc import Iterator

import processes
import pytest
import shared
from order import BUDGETS, file_of

OTHERS = 15.0  # the budget of a file that is not in the table
IN_CI = "ENC_TESTS_MAY_NOT_SKIP" in os.environ
_spent: defaultdict[str, float] = defaultdict(float)


def allowed(budget: float) -> float:
    """Return the seconds that are not yet far more than a budget: another machine, a busy one."""
    return 4 * budget + 30


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_before] = (processes.cpu_s(), sum(shared.cpu_s.values()))
    return (yield)


_before = pytest.StashKey[tuple[float, float]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    if call.when == "teardown":
        total, made = item.stash[_before]
        made = sum(shared.cpu_s.values()) - made
        report.user_properties.append(("cpu", (file_of(item), processes.cpu_s() - total - made)))
        report.user_properties.append(("made", dict(shared.cpu_s)))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "cpu":
            _spent[value[0]] += value[1]
        if name == "made":
            _spent.update({f"({thing})": seconds for thing, seconds in value.items()})


def over() -> list[str]:
    """Name the files that took far more than their budget."""
    files = {name: seconds for name, seconds in _spent.items() if name.endswith(".py")}
    return [name for name, seconds in files.items() if seconds > allowed(BUDGETS.get(name, OTHERS))]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if IN_CI and not hasattr(session.config, "workerinput") and over() and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("processor seconds, with all processes")
    total = sum(_spent.values())
    for name, spent in sorted(_spent.items(), key=lambda pair: -pair[1])[:25]:
        budget = BUDGETS.get(name)
        terminalreporter.write_line(f"{spent:7.1f}  {name}" + (f"  (budget {budget})" if budget else ""))
    terminalreporter.write_line(f"{total:7.1f}  in all")
    for name in over():
        terminalreporter.write_line(f"far over its budget in tests/budgets.toml: {name}", red=True)
