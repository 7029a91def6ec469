"""`enc launch … --rehearse`: a few steps of a user's own run on this machine, with trouble made on purpose.

    undisturbed: N steps ──────────────────────────────────────────────▶ weights ─┐
    rehearsal:   the same under `supervise`, hit by each trouble in turn ▶ weights ─┴▶ equal, byte for byte?

What makes the trouble is real: signals, SIGKILL, SIGSTOP, a file size limit on the ranks. Only the scheduler is played.
"""

import math
import resource
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from enc.encoder.checkpoints.folder import checkpoints_dir
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import RunError, UsageError
from enc.encoder.events import Event, append_event
from enc.encoder.heartbeat import read_rank_files
from enc.encoder.printable import Say
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.backends.local_host import LocalHost
from enc.launcher.machine.facts import MachineFacts
from enc.launcher.planning.plan import Plan, make_plan, plan_run, run_folder, with_tokens
from enc.launcher.planning.ranks import usable_gpus
from enc.launcher.planning.render import render
from enc.launcher.run_folder.events import read_events
from enc.launcher.supervise.supervise import supervise

PlanOf = Callable[[RunConfig], Plan]

_LEAST_STEPS = 24
_S_PER_TROUBLE = 4.0  # a trouble needs some seconds of training around it
_LIMIT_S = 18.0  # what is left of the job's time when the rehearsed time limit comes into sight
TROUBLES = {
    "preempt": "the job is preempted (SIGTERM to all ranks)",
    "lost-rank": "a rank is killed (SIGKILL)",
    "time-limit": "the job's time limit comes",
    "full-disk": "the disk is full at a save",
    "hang": "a rank stops moving (SIGSTOP)",
}


@dataclass(frozen=True)
class Act:
    """A trouble and what came of it."""

    trouble: str
    at_step: int
    cause: str
    went_on_from: int | None


@dataclass(frozen=True)
class Verdict:
    """The outcome of a rehearsal."""

    acts: list[Act]
    finished: bool
    same_bytes: bool
    folder: Path

    @property
    def survived(self) -> bool:
        return self.finished and self.same_bytes


class RehearsalHost(LocalHost):
    """Ranks on this machine, spread over made-up nodes, and the trouble that hits them."""

    restarts = True

    def __init__(self, run_dir: Path, config: RunConfig, troubles: list[str], say: Say) -> None:
        super().__init__(run_dir, config.launch.env, lock=None)
        self.config, self.say = config, say
        part = config.trainer.max_steps // max(len(troubles), 1)
        self.acts = {2 + i * part: trouble for i, trouble in enumerate(troubles)}
        self.job = "1"
        self.nodes = [f"node{i + 1}" for i in range(config.launch.num_nodes)]
        self.limit: float | None = None
        self.done_to_job: str | None = None

    def start(self, attempt: int, world_size: int) -> None:
        self.limit, self.done_to_job = None, None
        super().start(attempt, world_size)

    def _output(self, rank: int) -> AbstractContextManager[IO[Any]]:
        return self._log(rank)

    def running(self) -> bool:
        if not super().running():
            return False
        self._make_trouble()
        return True

    def _make_trouble(self) -> None:
        step = max((file.get("step", 0) for file in read_rank_files(self.run_dir, self.attempt).values()), default=0)
        due = min(self.acts, default=None)
        if due is None or step < due or self.limit is not None:
            return
        trouble = self.acts.pop(due)
        self.say(f"step {step:>3}: {TROUBLES[trouble]}")
        append_event(self.run_dir, Event.TROUBLE, trouble=trouble, step=step)
        last = self.ranks[-1]
        match trouble:
            case "preempt":
                self.done_to_job = "preempted"
                self.signal(signal.SIGTERM)
            case "lost-rank":
                last.kill()
            case "time-limit":
                self.limit = time.time() + _LIMIT_S
            case "full-disk":
                small = checkpoint_bytes(self.config) // 4
                for process in self.ranks:
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (small, small))
            case "hang":
                last.send_signal(signal.SIGSTOP)

    def end_time(self) -> float | None:
        return self.limit

    def interruption(self) -> str | None:
        return self.done_to_job

    def next_job_by(self, must_be_new: bool) -> str:
        return "requeue"

    def next_job(self, must_be_new: bool) -> None:
        self.restart_count += 1


def rehearse(config: RunConfig, facts: MachineFacts, troubles: list[str], say: Say) -> Verdict:
    """Run a config's first steps undisturbed and disturbed, and compare the weights. Raises UsageError."""
    unknown = [trouble for trouble in troubles if trouble not in TROUBLES]
    if unknown:
        raise UsageError(f"There is no trouble {unknown[0]!r}. Troubles are: {', '.join(TROUBLES)}.")
    small = rehearsal_config(config, facts)
    folder = Path(small.trainer.output_dir)
    _make_room(folder)
    plan = with_tokens(plan_run(small, facts), say)
    plan_of = partial(make_plan, facts=facts, store=plan.store_facts)
    small = _long_enough(plan.asked, _undisturbed(plan_of, plan.asked, folder / "undisturbed", say), len(troubles))
    if small.trainer.max_steps > _LEAST_STEPS:
        shutil.rmtree(folder / "undisturbed")
        _undisturbed(plan_of, small, folder / "undisturbed", say)
    hit = _run(plan_of, small, folder / "disturbed", troubles, say)
    finished = hit[-1]["cause"] == "finished"
    steps = small.trainer.max_steps
    same = finished and _weights(folder / "disturbed", steps) == _weights(folder / "undisturbed", steps)
    verdict = Verdict(_acts(folder / "disturbed"), finished, same, folder)
    if verdict.survived:
        shutil.rmtree(folder)
    return verdict


def _undisturbed(plan_of: PlanOf, config: RunConfig, run_dir: Path, say: Say) -> float:
    """Run without trouble and return the mean seconds a step. Raises RunError when even that fails."""
    last = _run(plan_of, config, run_dir, [], say)[-1]
    if last["cause"] != "finished":
        raise RunError(f"The run fails even undisturbed: {last['detail']} Its logs are in {run_dir / 'logs'}.")
    step_s: float = read_rank_files(run_dir, last["attempt"])[0]["step_s"]
    return step_s


def _long_enough(config: RunConfig, step_s: float, num_troubles: int) -> RunConfig:
    """Return the config with so many steps that each trouble finds the run at work."""
    steps = max(_LEAST_STEPS, math.ceil(num_troubles * _S_PER_TROUBLE / step_s))
    return config.changed({"trainer.max_steps": steps, "trainer.save_steps": max(1, steps // 8)})


def rehearsal_config(config: RunConfig, facts: MachineFacts) -> RunConfig:
    """Return the config of a rehearsal: the same model, data and engine on the ranks that this machine can take."""
    gpus = usable_gpus(config, facts)
    wanted = config.launch.num_nodes * (config.launch.nproc_per_node or max(gpus, 2))
    ranks = max(1, min(wanted, gpus or 2))
    trainer = config.trainer
    return config.changed({
        "trainer.output_dir": f"{run_folder(config, facts)}.rehearsal",
        "trainer.max_steps": _LEAST_STEPS, "trainer.save_steps": _LEAST_STEPS // 8, "trainer.save_strategy": "steps",
        "trainer.logging_steps": 5, "trainer.eval_max_batches": 2, "trainer.eval_steps": 20,
        "trainer.save_total_limit": 2, "trainer.disable_tqdm": True, "trainer.resume_from_checkpoint": None,
        "trainer.tensorboard_dir": None,
        "trainer.global_batch_size": trainer.per_device_train_batch_size * ranks,
        "trainer.gradient_accumulation_steps": 1, "trainer.use_cpu": gpus == 0,
        "scheduler.total_steps": config.scheduler.total_steps or trainer.max_steps,
        "wandb.enabled": False, "launch.scheduler": "local", "launch.nodes": 1, "launch.nproc_per_node": ranks,
        "launch.heartbeat_s": 0.25, "launch.hang_timeout_s": 30.0, "launch.gpu": None,
    })  # fmt: skip


def _make_room(folder: Path) -> None:
    if folder.exists():
        inner = [path for path in folder.iterdir() if path.name not in ("undisturbed", "disturbed")]
        if inner:
            raise UsageError(f"{folder} is in the way and does not look like an older rehearsal; move it away.")
        shutil.rmtree(folder)


def _run(plan_of: PlanOf, config: RunConfig, run_dir: Path, troubles: list[str], say: Say) -> list[dict[str, Any]]:
    """Take a run to its end, through as many jobs as it needs; return its endings."""
    plan = plan_of(config.changed({"trainer.output_dir": str(run_dir)}))
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(render(plan)["config.yaml"])
    append_event(run_dir, Event.REHEARSED)
    name, ranks = "The same, disturbed" if troubles else "Undisturbed", plan.split.world_size
    say(f"{name}: {config.trainer.max_steps} steps on {ranks} rank{'s' if ranks > 1 else ''}.")
    host = RehearsalHost(run_dir, plan.config, troubles, say)
    while supervise(run_dir, host) == 75 and read_events(run_dir)[-1].get("decision") != "stop":
        pass
    return [event for event in read_events(run_dir) if event["event"] == Event.ATTEMPT_ENDED]


def _weights(run_dir: Path, steps: int) -> bytes:
    return (checkpoints_dir(run_dir) / str(steps) / "model.safetensors").read_bytes()


def _acts(run_dir: Path) -> list[Act]:
    """Pair each trouble with the ending and the next start that follow it."""
    acts: list[Act] = []
    events = read_events(run_dir)
    for index, event in enumerate(events):
        if event["event"] == Event.TROUBLE:
            after = events[index:]
            cause = next((e["cause"] for e in after if e["event"] == Event.ATTEMPT_ENDED), "none")
            start = next((e["from_step"] for e in after if e["event"] == Event.ATTEMPT), None)
            acts.append(Act(event["trouble"], event["step"], cause, start))
    return acts
