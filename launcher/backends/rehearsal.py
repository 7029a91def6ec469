"""`enc launch … --rehearse`: a few steps of a user's own run on this machine, with trouble made on purpose.

    undisturbed: N steps ──────────────────────────────────────────────▶ weights ─┐
    rehearsal:   the same under `supervise`, hit by each trouble in turn ▶ weights ─┴▶ equal, byte for byte?

What makes the trouble is real: signals, SIGKILL, SIGSTOP, a file size limit on the ranks. Only the scheduler is played.
"""

import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from enc.encoder.checkpoints.folder import checkpoints_dir
from enc.encoder.config.schema import RunConfig
from enc.encoder.errors import RunError, UsageError
from enc.encoder.heartbeat import read_rank_files
from enc.encoder.sizing.sizes import checkpoint_bytes
from enc.launcher.backends.slurm.host import free_port
from enc.launcher.backends.slurm.rank import note
from enc.launcher.machine.devices import num_gpus
from enc.launcher.machine.rank_environment import Place, blocked_stop_signals, rank_environment
from enc.launcher.planning.plan import make_plan, render
from enc.launcher.run_folder.events import append_event, read_events
from enc.launcher.supervise.supervise import supervise

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


class LocalHost:
    """Ranks on this machine, spread over made-up nodes, and the trouble that hits them."""

    def __init__(self, run_dir: Path, config: RunConfig, troubles: list[str], say: Callable[[str], None]) -> None:
        self.run_dir, self.config, self.say = run_dir, config, say
        part = config.trainer.max_steps // max(len(troubles), 1)
        self.acts = {2 + i * part: trouble for i, trouble in enumerate(troubles)}
        self.job = "1"
        self.nodes = [f"node{i + 1}" for i in range(config.launch.num_nodes)]
        self.restart_count = 0
        self.ranks: list[subprocess.Popen] = []
        self.attempt = 0
        self.limit: float | None = None
        self.did: str | None = None

    def start(self, attempt: int, world_size: int) -> None:
        self.attempt, self.limit, self.did = attempt, None, None
        port = free_port()
        per_node = world_size // len(self.nodes)
        log = self.run_dir / "logs" / str(attempt) / "rank{}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with blocked_stop_signals():
            self.ranks = []
            for rank in range(world_size):
                place = Place(rank, rank, world_size, world_size, "127.0.0.1", port)
                named = {"ENC_ATTEMPT": str(attempt), "SLURMD_NODENAME": self.nodes[rank // per_node]}
                with Path(str(log).format(rank)).open("a") as output:
                    self.ranks.append(subprocess.Popen(
                        [sys.executable, "-m", "enc.encoder.run.start", str(self.run_dir)],
                        stdout=output, stderr=output,
                        env=rank_environment(place, self.config.launch.env) | named, process_group=0,
                    ))  # fmt: skip

    def running(self) -> bool:
        codes = [process.poll() for process in self.ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                note(self.run_dir, self.attempt, rank, code=code, error=None, lost_peer=False)
        if all(code is not None for code in codes):
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
        append_event(self.run_dir, "trouble", trouble=trouble, step=step)
        last = self.ranks[-1]
        match trouble:
            case "preempt":
                self.did = "preempted"
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

    def signal(self, number: int) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()

    def end_time(self) -> float | None:
        return self.limit

    def said(self) -> str | None:
        return self.did

    def never_started(self) -> dict[int, str]:
        return {}

    def unhealthy(self) -> str | None:
        return None

    def next_job(self, must_be_new: bool) -> str:
        self.restart_count += 1
        return "requeue"

    def over(self) -> None:
        pass


def rehearse(
    config: RunConfig, troubles: list[str], prepare: Callable[[RunConfig], Any], say: Callable[[str], None]
) -> Verdict:
    """Run a config's first steps undisturbed and disturbed, and compare the weights. Raises UsageError."""
    unknown = [trouble for trouble in troubles if trouble not in TROUBLES]
    if unknown:
        raise UsageError(f"There is no trouble {unknown[0]!r}. Troubles are: {', '.join(TROUBLES)}.")
    small = rehearsal_config(config)
    folder = Path(small.trainer.output_dir)
    _make_room(folder)
    prepare(small)
    small = _long_enough(small, _undisturbed(small, folder / "undisturbed", say), len(troubles))
    if small.trainer.max_steps > _LEAST_STEPS:
        shutil.rmtree(folder / "undisturbed")
        _undisturbed(small, folder / "undisturbed", say)
    hit = _run(small, folder / "disturbed", troubles, say)
    finished = hit[-1]["cause"] == "finished"
    steps = small.trainer.max_steps
    same = finished and _weights(folder / "disturbed", steps) == _weights(folder / "undisturbed", steps)
    verdict = Verdict(_acts(folder / "disturbed"), finished, same, folder)
    if verdict.survived:
        shutil.rmtree(folder)
    return verdict


def _undisturbed(config: RunConfig, run_dir: Path, say: Callable[[str], None]) -> float:
    """Run without trouble and return the mean seconds a step. Raises RunError when even that fails."""
    last = _run(config, run_dir, [], say)[-1]
    if last["cause"] != "finished":
        raise RunError(f"The run fails even undisturbed: {last['detail']} Its logs are in {run_dir / 'logs'}.")
    return read_rank_files(run_dir, last["attempt"])[0]["step_s"]


def _long_enough(config: RunConfig, step_s: float, num_troubles: int) -> RunConfig:
    """Return the config with so many steps that each trouble finds the run at work."""
    steps = max(_LEAST_STEPS, math.ceil(num_troubles * _S_PER_TROUBLE / step_s))
    return config.changed({"trainer.max_steps": steps, "trainer.save_steps": max(1, steps // 8)})


def rehearsal_config(config: RunConfig) -> RunConfig:
    """Return the config of a rehearsal: the same model, data and engine on the ranks that this machine can take."""
    gpus = num_gpus(config)
    wanted = config.launch.num_nodes * (config.launch.nproc_per_node or max(gpus, 2))
    ranks = max(1, min(wanted, gpus or 2))
    trainer = config.trainer
    return config.changed({
        "trainer.output_dir": f"{Path(trainer.output_dir).absolute()}.rehearsal",
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


def _run(config: RunConfig, run_dir: Path, troubles: list[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Take a run to its end, through as many jobs as it needs; return its endings."""
    config = config.changed({"trainer.output_dir": str(run_dir)})
    run_dir.mkdir(parents=True)
    plan = make_plan(config)
    (run_dir / "config.yaml").write_text(render(plan)["config.yaml"])
    append_event(run_dir, "rehearsed")
    name, ranks = "The same, disturbed" if troubles else "Undisturbed", plan.split.world_size
    say(f"{name}: {config.trainer.max_steps} steps on {ranks} rank{'s' if ranks > 1 else ''}.")
    host = LocalHost(run_dir, plan.config, troubles, say)
    while supervise(run_dir, host) == 75 and read_events(run_dir)[-1].get("decision") != "stop":
        pass
    return [event for event in read_events(run_dir) if event["event"] == "attempt_ended"]


def _weights(run_dir: Path, steps: int) -> bytes:
    return (checkpoints_dir(run_dir) / str(steps) / "model.safetensors").read_bytes()


def _acts(run_dir: Path) -> list[Act]:
    """Pair each trouble with the ending and the next start that follow it."""
    acts: list[Act] = []
    events = read_events(run_dir)
    for index, event in enumerate(events):
        if event["event"] == "trouble":
            after = events[index:]
            cause = next((e["cause"] for e in after if e["event"] == "attempt_ended"), "none")
            start = next((e["from_step"] for e in after if e["event"] == "attempt"), None)
            acts.append(Act(event["trouble"], event["step"], cause, start))
    return acts
