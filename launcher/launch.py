"""Starting a run on this machine: the only place where folders are changed and processes started.

The ranks run side by side and are watched from here. torchrun is not used: it turns every exit code into 1 and kills
ranks 30 s after a signal, whether or not their checkpoint is written.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from enc.encoder.checkpoints.folder import (
    CheckpointStatus,
    find_checkpoint,
    read_trainer_state,
    remove_leftovers,
    set_aside_newer,
)
from enc.encoder.config.load import load_text
from enc.encoder.config.schema import RunConfig, differences, keeps_numbers
from enc.encoder.data.store import read_manifest
from enc.encoder.data.tokenizer import EncoderTokenizer
from enc.encoder.engine.settings import engine_name
from enc.encoder.errors import UsageError
from enc.encoder.signals import STOP_SIGNALS
from enc.launcher.machine.rank_environment import Place, blocked_stop_signals, rank_environment
from enc.launcher.planning.plan import Plan, make_plan, plan_notes, render, self_contained, store_fingerprint
from enc.launcher.preflight import preflight
from enc.launcher.run_folder.lock import RunLock
from enc.launcher.run_folder.records import move_aside, record_launch, refuse_older_run

_GRACE_S = 20.0


def launch(config: RunConfig, allow_change: bool, prepare: Any, say: Any) -> int:
    """Prepare the data, write the run folder and train; return the exit code.

    `prepare(config)` makes the token store where there is none yet, `say(text)` tells a person.
    """
    run_dir = make_plan(config).run_dir
    lock = RunLock(run_dir)
    try:
        config = settled(run_dir, config, allow_change, say)
        prepare(config)
        plan = make_plan(config)
        check_before(plan, say)
        if config.trainer.resume_from_checkpoint:
            set_aside(run_dir, Path(str(config.trainer.resume_from_checkpoint)), say)
        else:
            move_aside(run_dir, say)
        say(f"Engine: {engine_name(plan.config)}, {plan.engine_reason}.")
        for note in plan_notes(plan):
            say(note)
        relay = SignalRelay()  # from here on there is a run, and a signal is for its ranks
        attempt = record_launch(run_dir, render(plan), sys.argv, plan.as_dict())
    except BaseException:
        lock.release(remove_if_created=True)
        raise
    return start(run_dir, plan, attempt, lock, relay)


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


def settled(run_dir: Path, config: RunConfig, allow_change: bool, say: Any) -> RunConfig:
    """Return the config, fixed to the checkpoint that it goes on from if it resumes a run.

    Raises UsageError when it cannot go on, or when a new run would meet the checkpoints of an older one.
    """
    remove_leftovers(run_dir)
    if config.trainer.resume_from_checkpoint:
        return resumed(run_dir, config, allow_change, say)
    if not config.trainer.overwrite_output_dir:
        refuse_older_run(run_dir)
    return config


# --- resuming --------------------------------------------------------------------------------------------------------


def resumed(run_dir: Path, config: RunConfig, allow_change: bool, say: Any) -> RunConfig:
    """Find the checkpoint to go on from, compare its config with this one, and return this one fixed to it.

    Raises UsageError when there is no complete checkpoint, or when the change would not continue the same run.
    """
    folder, passed_over = find_checkpoint(run_dir, config.trainer.resume_from_checkpoint or "latest")
    for status in passed_over:
        say(passed_over_text(status))
    old = load_text((folder / "config.yaml").read_text(), str(folder / "config.yaml")).config
    plan = make_plan(_inherit(config, old))
    new = self_contained(plan)
    changes = {key: pair for key, pair in differences(old, new).items() if not _is_bookkeeping(key)}
    made_from, tokens = read_trainer_state(folder)["data_fingerprint"], store_fingerprint(plan)
    if made_from is None:  # an imported checkpoint does not know its text, but it has the tokenizer
        if config.tokenizer == old.tokenizer and _has_tokenizer_of(folder, plan):
            changes.pop("tokenizer.path", None)
    elif tokens not in (None, made_from):
        changes["the token store's contents"] = (made_from, tokens)
    if changes:
        say(
            "Changed since the checkpoint:\n" + "\n".join(f"  {key}: {a!r} -> {b!r}" for key, (a, b) in changes.items())
        )
    breaking = [key for key in changes if not keeps_numbers(key) and not _schedule_is_fixed(key, old, new)]
    if breaking and not allow_change:
        listed = "\n".join(f"- {key}: {changes[key][0]!r} -> {changes[key][1]!r}" for key in breaking)
        raise UsageError(
            f"The config differs from that of {folder} in ways that change what the run computes:\n{listed}\n"
            "Undo them for an exact continuation, or add --allow-change to go on with the new values."
        )
    say(f"Resuming from {folder}.")
    return plan.config.changed({"trainer.resume_from_checkpoint": str(folder.absolute())})


def set_aside(run_dir: Path, folder: Path, say: Any) -> None:
    """Take checkpoints that lie after the one to go on from out of the run's way."""
    aside = set_aside_newer(run_dir, read_trainer_state(folder)["step"])
    if aside:
        say(f"Newer checkpoints of this run are set aside: {', '.join(path.name for path in aside)}.")


def _has_tokenizer_of(folder: Path, plan: Plan) -> bool:
    """Tell whether the token store was made with the checkpoint's tokenizer; one that is yet to be made will be."""
    if not plan.store_ready:
        return True
    return (
        read_manifest(plan.store)["tokenizer"]["fingerprint"]
        == EncoderTokenizer.load(folder / "tokenizer").fingerprint()
    )


def passed_over_text(status: CheckpointStatus) -> str:
    return f"Passed over checkpoint {status.path}: it is {status.state} ({'; '.join(status.problems[:2])})."


def _inherit(config: RunConfig, old: RunConfig) -> RunConfig:
    """Take over what the first launch resolved: sizes from the tokenizer, and the global batch unless it is given."""
    updates: dict[str, Any] = {"model.vocab_size": old.model.vocab_size, "model.pad_token_id": old.model.pad_token_id}
    if config.trainer.global_batch_size is None:
        updates["trainer.global_batch_size"] = old.trainer.global_batch_size
    return config.changed(updates)


def _is_bookkeeping(key: str) -> bool:
    return key in (
        "trainer.resume_from_checkpoint",
        "trainer.output_dir",
        "trainer.overwrite_output_dir",
    )


def _schedule_is_fixed(key: str, old: RunConfig, new: RunConfig) -> bool:
    """Tell whether a change of `max_steps` leaves the learning rates as they are."""
    same = old.scheduler == new.scheduler
    fixed = new.scheduler.total_steps is not None
    constant = new.scheduler.name == "constant" and new.scheduler.warmup_percent is None
    return key == "trainer.max_steps" and same and (fixed or constant)


# --- processes -------------------------------------------------------------------------------------------------------


class SignalRelay:
    """Passes stop signals on to the ranks, also those that arrive before the ranks exist."""

    def __init__(self) -> None:
        self.early: list[int] = []
        self.processes: list[subprocess.Popen] = []
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _frame: object) -> None:
        if not self.processes:
            self.early.append(number)
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def connect(self, processes: list[subprocess.Popen]) -> None:
        """Name the ranks; what came early reaches them now."""
        self.processes = processes
        for number in self.early:
            self._pass_on(number, None)


def start(run_dir: Path, plan: Plan, attempt: int, lock: RunLock, relay: SignalRelay) -> int:
    """Run the training processes under the run's lock and return their common exit code."""
    command = [sys.executable, "-m", "enc.encoder.run.start", str(run_dir)]
    with blocked_stop_signals():
        processes = [_start_rank(command, rank, plan, attempt, lock) for rank in range(plan.split.world_size)]
        relay.connect(processes)
    return _watch(processes)


def _start_rank(command: list[str], rank: int, plan: Plan, attempt: int, lock: RunLock) -> subprocess.Popen:
    world_size = plan.split.world_size
    place = Place(rank, rank, world_size, world_size, "127.0.0.1", _port())
    environment = rank_environment(place, plan.config.launch.env | {"ENC_ATTEMPT": str(attempt)})
    output = None
    if rank > 0:
        folder = plan.run_dir / "logs" / str(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        output = (folder / f"rank{rank}.log").open("a")
    # A group of its own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(
        command, env=environment, stderr=output, stdout=output, pass_fds=[lock.file.fileno()], process_group=0
    )


_chosen_port: list[int] = []


def _port() -> int:
    """Return a TCP port that was free a moment ago, the same one for all ranks."""
    if not _chosen_port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            _chosen_port.append(probe.getsockname()[1])
    return _chosen_port[0]


def _watch(processes: list[subprocess.Popen]) -> int:
    """Wait for all ranks; when one fails, the others get 20 s to end by themselves."""
    kill_at = None
    while any(process.poll() is None for process in processes):
        failed = any(process.poll() not in (None, 0, 75) for process in processes)
        if failed and kill_at is None:
            kill_at = time.monotonic() + _GRACE_S
        if kill_at is not None and time.monotonic() > kill_at:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return _common_exit_code([process.returncode for process in processes])


def _common_exit_code(codes: list[int]) -> int:
    """Return 0 or 75 when all ranks agree, else the code of the first failure; a killed rank counts as 3."""
    for rank, code in enumerate(codes):
        if code < 0:
            print(f"Rank {rank} was killed by {signal.Signals(-code).name}.", file=sys.stderr)
    bad = [code for code in codes if code not in (0, 75)]
    if bad:
        return 2 if 2 in bad else 3
    return max(codes)
