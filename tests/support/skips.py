"""In CI nothing may be skipped but what its machine cannot have: a skip there is a test that has quietly stopped."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import TESTS

MAY_NOT = "ENC_TESTS_MAY_NOT_SKIP" in os.environ
GPU = TESTS / "gpu"
ACCEPTED = ("GPU", "root may read everything")  # CI has no GPU, and is root in order to mount small disks


def why(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def refuse(report: pytest.TestReport | pytest.CollectReport, path: Path) -> None:
    """Turn a skip into a failure, unless its reason is accepted."""
    if MAY_NOT and report.skipped and not hasattr(report, "wasxfail") and GPU not in path.parents:
        reason = why(report)
        if not any(accepted in reason for accepted in ACCEPTED):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nNothing may be skipped here (ENC_TESTS_MAY_NOT_SKIP)."


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    refuse(report, item.path)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    refuse(report, collector.path)
    return report
