"""What is looked at before a run starts or is queued."""

from enc.encoder.errors import UsageError
from enc.encoder.printable import Say
from enc.launcher.checks.findings import Finding
from enc.launcher.checks.preflight import preflight
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.planning.plan import Plan


def check_before(plan: Plan, facts: MachineFacts, of_place: list[Finding], say: Say) -> None:
    """Look at what a run needs before anything is written; say what may spoil it.

    `of_place` is what the checks of the place found where its ranks will run. Raises UsageError that lists what cannot
    work.
    """
    findings = [*preflight(plan, facts), *of_place]
    for finding in findings:
        if finding.level == "yellow":
            say(f"Note: {finding.as_sentence()}")
    bad = [finding.as_sentence() for finding in findings if finding.level == "red"]
    if len(bad) > 1:
        raise UsageError("This run cannot work:\n" + "\n".join(f"- {text}" for text in bad))
    if bad:
        raise UsageError(f"This run cannot work: {bad[0]}")
