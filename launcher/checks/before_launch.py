"""What is looked at before a run starts or is queued."""

from typing import Any

from enc.encoder.errors import UsageError
from enc.launcher.checks.preflight import preflight
from enc.launcher.planning.plan import Plan


def check_before(plan: Plan, say: Any) -> None:
    """Look at what a run needs before anything is written; say what may spoil it.

    Raises UsageError that lists what cannot work.
    """
    findings = preflight(plan, for_slurm=plan.config.launch.scheduler == "slurm")
    for finding in findings:
        if finding.level == "yellow":
            say(f"Note: {finding.as_sentence()}")
    bad = [finding.as_sentence() for finding in findings if finding.level == "red"]
    if len(bad) > 1:
        raise UsageError("This run cannot work:\n" + "\n".join(f"- {text}" for text in bad))
    if bad:
        raise UsageError(f"This run cannot work: {bad[0]}")
