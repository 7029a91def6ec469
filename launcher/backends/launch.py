"""A launch: from a config to a job that is queued, or to a run that has ended here."""

from enc.encoder.config.schema import RunConfig
from enc.encoder.printable import Say, once
from enc.launcher.backends.interface import Backend, Launched
from enc.launcher.backends.registry import find_jobs
from enc.launcher.checks.before_launch import check_before
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.planning.plan import run_folder, with_tokens
from enc.launcher.planning.resume import plan_or_resume
from enc.launcher.run_folder.lock import RunLock


def launch(config: RunConfig, backend: Backend, facts: MachineFacts, allow_change: bool, say: Say) -> Launched:
    """Plan a run, look at what may go wrong, make or check its token store, and hand it to its backend.

    A missing token store is made here for a run that is here, else in the job. Raises UsageError, and nothing is left.
    """
    config = backend.defaults(config, say)
    notes = once(say)
    lock = RunLock(run_folder(config, facts), find_jobs)
    try:
        plan = plan_or_resume(config, facts, allow_change, say)
        check_before(plan, facts, backend.checks(plan, facts), notes)  # before hours of tokenising
        if plan.store_ready or not config.launch.on_cluster:
            planned, plan = plan, with_tokens(plan, say)
            if plan is not planned:  # it has a vocabulary now
                check_before(plan, facts, backend.checks(plan, facts), notes)
        return backend.submit(plan, lock, say)
    except BaseException:
        lock.release(remove_if_created=True)
        raise
