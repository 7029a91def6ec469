"""Watching runs: what is said of a run follows from its files and SLURM's word, and nothing in them stops it."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import processes
import pytest
from running import ENC, Enc

from enc.encoder.quantities import span
from enc.launcher.backends.slurm.commands import Job
from enc.launcher.run_folder.find import find_runs
from enc.launcher.run_folder.logs import LogReader, plain
from enc.launcher.watch.run_state import RunState, last_checkpoint, read_files, state_of
from enc.launcher.watch.text import ago, runs_text, status_text

NOW = 1_800_000_000.0


def stamp(seconds_ago: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(NOW - seconds_ago))


def write_run(
    run: Path,
    events: list[dict[str, Any]],
    steps: int = 0,
    seconds_ago: float = 10,
    host: str | None = None,
    job: str | None = None,
) -> Path:
    """Write a run folder as the contract says: a record a second, the last one `seconds_ago`."""
    (run / "launches" / "1").mkdir(parents=True)
    (run / "config.yaml").write_text(
        "dataset:\n  max_steps: 7\ntrainer:\n  output_dir: x\n  max_steps: 1000\nlaunch:\n  heartbeat_s: 5.0\n"
        "  hang_timeout_s: 1800.0\n"
    )
    (run / ".lock").write_text(json.dumps({"host": host or socket.gethostname(), "pid": 1, "job": job}))
    launch = {"attempt": 1, "time": stamp(86400), "host": host or socket.gethostname(), "job": job}
    (run / "launches" / "1" / "launch.json").write_text(json.dumps(launch))
    lines = [json.dumps({"time": stamp(600), **event}) + "\n" for event in events]
    (run / "events.jsonl").write_text("".join(lines))
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {"step": step, "time": NOW - seconds_ago - (steps - step), "loss": 3.0, "tokens_per_s": 500.0,
                      "step_s": 0.5, "tokens": 500 * step}  # fmt: skip
            file.write(json.dumps(record) + "\n")
    return run


def slurm_job(state: str, id: str = "12") -> Job:
    return Job(id, state, "None", "1:00", "4:00:00", "N/A", "n1", 1)


def look(run: Path, job: Job | str | None = "unasked") -> RunState:
    """Judge a run with SLURM's word on job 12 (None: SLURM does not know it)."""
    jobs = None if isinstance(job, str) else {"12": job.neutral()} if job else {}
    return state_of(read_files(run), jobs, NOW)


SUBMITTED = {"event": "submitted", "job": "12", "nodes": 2}
ATTEMPT = {"event": "attempt", "attempt": 1, "job": "12", "nodes": ["n1", "n2"], "from_step": 0}
STARTED = {"event": "started", "step": 0}
SIGNAL = {"event": "signal", "signal": "SIGTERM", "step": 40}
SAVED = {"event": "saved", "step": 40}
FAILED = {"event": "failed", "step": 40, "error": "No memory."}
CANCELLED = {"event": "cancelled", "by": "ann@login"}


def ended(cause: str, decision: str) -> dict[str, Any]:
    return {"event": "attempt_ended", "attempt": 1, "cause": cause, "step": 40, "detail": "rank 1 fell",
            "reason": "so it is", "decision": decision}  # fmt: skip


@pytest.mark.parametrize(
    ("events", "job", "state"),
    [
        ([SUBMITTED], slurm_job("PENDING"), "queued"),
        ([SUBMITTED], slurm_job("RUNNING"), "starting"),
        ([SUBMITTED], slurm_job("CANCELLED"), "cancelled"),
        ([SUBMITTED], None, "lost"),
        ([SUBMITTED], "unasked", "unknown"),
        ([SUBMITTED, CANCELLED], slurm_job("CANCELLED"), "cancelled"),
        ([SUBMITTED, ATTEMPT], slurm_job("RUNNING"), "starting"),
        ([SUBMITTED, ATTEMPT, STARTED], slurm_job("RUNNING"), "running"),
        ([SUBMITTED, ATTEMPT, STARTED], slurm_job("PENDING"), "requeued"),
        ([SUBMITTED, ATTEMPT, STARTED], slurm_job("NODE_FAIL"), "lost"),
        ([ATTEMPT, STARTED, ended("signal", "requeue"), {"event": "not_continued"}], slurm_job("FAILED"), "stopped"),
        ([SUBMITTED, ATTEMPT, STARTED], "unasked", "unknown"),
        ([SUBMITTED, ATTEMPT, STARTED, SIGNAL], slurm_job("RUNNING"), "stopping"),
        ([SUBMITTED, ATTEMPT, STARTED, CANCELLED], slurm_job("RUNNING"), "stopping"),
        ([SUBMITTED, ATTEMPT, STARTED, CANCELLED, SIGNAL, SAVED], slurm_job("CANCELLED"), "cancelled"),
        ([SUBMITTED, ATTEMPT, STARTED, ended("hang", "restart")], slurm_job("RUNNING"), "restarting"),
        ([SUBMITTED, ATTEMPT, STARTED, ended("time_limit", "requeue")], slurm_job("PENDING"), "requeued"),
        ([SUBMITTED, ATTEMPT, STARTED, ended("time_limit", "requeue")], slurm_job("RUNNING"), "restarting"),
        ([SUBMITTED, ATTEMPT, STARTED, {"event": "hang", "detail": "x"}], slurm_job("RUNNING"), "hung?"),
        ([SUBMITTED, ATTEMPT, STARTED, {"event": "finished", "step": 1000}], slurm_job("COMPLETED"), "finished"),
        ([SUBMITTED, ATTEMPT, STARTED, FAILED, ended("config", "stop")], None, "failed"),
        ([SUBMITTED, ATTEMPT, STARTED, SIGNAL, SAVED, ended("preempted", "stop")], "unasked", "stopped"),
        ([SUBMITTED, ATTEMPT, STARTED, ended("cancelled", "stop")], None, "cancelled"),
        ([STARTED], None, "lost"),
        ([STARTED, SIGNAL, SAVED], None, "stopped"),
        ([STARTED, SIGNAL], None, "lost"),
        ([STARTED, FAILED], None, "failed"),
        ([STARTED, {"event": "finished", "step": 1000}], None, "finished"),
        ([], None, "lost"),
    ],
)  # fmt: skip
def test_state(tmp_path: Path, events: list[dict[str, Any]], job: Job | str | None, state: str) -> None:
    """The word for a run, from its events and SLURM's word on its job."""
    assert look(write_run(tmp_path / "run", events), job).state == state


def test_a_held_lock_means_life(tmp_path: Path) -> None:
    """A local run lives as long as its lock is held; looking leaves the lock as it is."""
    run = write_run(tmp_path / "run", [STARTED], steps=40)
    before = (run / ".lock").read_bytes(), (run / ".lock").stat().st_mtime_ns
    with (run / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = look(run)
        assert (found.state, found.alive) == ("running", True)
    assert look(run).state == "lost"
    assert ((run / ".lock").read_bytes(), (run / ".lock").stat().st_mtime_ns) == before


def test_a_local_run_of_another_host_is_not_judged(tmp_path: Path) -> None:
    found = look(write_run(tmp_path / "run", [STARTED], steps=3, host="elsewhere"))
    assert (found.state, found.alive) == ("unknown", None)
    assert "elsewhere" in (found.detail or "")


def test_a_launch_without_an_event_is_starting(tmp_path: Path) -> None:
    """A run that was stopped and resumed is not said to be stopped while it builds its model."""
    run = write_run(tmp_path / "run", [STARTED, SIGNAL, SAVED])
    (run / "launches" / "2").mkdir()
    (run / "launches" / "2" / "launch.json").write_text(json.dumps({"time": stamp(5), "host": socket.gethostname()}))
    with (run / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = look(run)
    assert (found.state, found.attempt) == ("starting", 2)


def test_numbers(tmp_path: Path) -> None:
    """Step, loss, rates and the time left come from the newest records, ranks and nodes from their notes."""
    straggler = {"event": "straggler", "step": 30, "rank": 1, "host": "n2", "ratio": 1.5}
    excluded = {"event": "node_excluded", "node": "n3", "evidence": ["x"]}
    events = [SUBMITTED, ATTEMPT, STARTED, ended("hang", "restart"), excluded, ATTEMPT | {"attempt": 2},
              STARTED | {"event": "resumed", "step": 20}, straggler]  # fmt: skip
    run = write_run(tmp_path / "run", events, steps=40)
    (run / "logs" / "2" / "ranks").mkdir(parents=True)
    for rank, (phase, silent_s) in enumerate([("forward", 2), ("data_wait", 200)]):
        note = {"rank": rank, "host": f"n{rank + 1}", "time": NOW - silent_s, "phase": phase, "step": 41, "marks": 9}
        (run / "logs" / "2" / "ranks" / f"{rank}.json").write_text(json.dumps(note))
    found = look(run, slurm_job("RUNNING"))
    assert (found.state, found.attempt, found.step, found.total_steps, found.loss) == ("running", 2, 41, 1000, 3.0)
    assert (found.tokens_per_s, found.s_per_step) == (500.0, 1.0)
    assert found.eta_s == pytest.approx(959)
    assert found.heard_s == pytest.approx(2)
    assert found.phases == {"forward": 1, "data_wait": 1}
    assert found.silent_ranks == [{"rank": 1, "host": "n2", "silent_s": pytest.approx(200)}]
    assert found.restarts == {"hang": 1}
    assert found.why == "Rank 1 fell. So it is."
    assert found.excluded_nodes == ["n3"]
    text = status_text(found)
    assert max(map(len, text.splitlines())) <= 80
    for part in ("running, attempt 2", "12 RUNNING, 1:00 of 4:00:00", "n1, n2", "41 of 1,000 (4%)", "3.0000",
                 "500 tokens/s, 1 s a step", "about 15 min", "forward (1 rank), data_wait (1 rank)",
                 "rank 1 on n2 for 3 min 20 s", "hang 1", "rank 1 on n2, 1.50 times as long a step"):  # fmt: skip
        assert part in text, text


def test_a_loss_that_is_not_finite_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [STARTED], steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time": NOW, "loss": None, "tokens_per_s": 1.0}) + "\n")
    found = look(run)
    assert (found.loss, found.loss_is_finite) == (None, False)
    assert "not finite" in status_text(found)


def test_silent_ranks_look_hung(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [SUBMITTED, ATTEMPT, STARTED], steps=3, seconds_ago=900)
    (run / "logs" / "1" / "ranks").mkdir(parents=True)
    note = {"rank": 0, "host": "n1", "time": NOW - 600, "phase": "forward", "step": 3}
    (run / "logs" / "1" / "ranks" / "0.json").write_text(json.dumps(note))
    assert look(run, slurm_job("RUNNING")).state == "hung?"


@pytest.mark.parametrize(
    "name", ["events.jsonl", "metrics.jsonl", ".lock", "config.yaml", "launches/1/launch.json", "logs/1/ranks/0.json"]
)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00garbage\n", b"null\n", b"[1, 2]\n", b'{"event": 5, "step": "x", "time": [], "job": 7}\n',
     b'{"rank": -1, "time": "soon", "phase": {}, "step": 1e999, "host": 3, "pid": "q"}\n', b"[" * 100000, None],
    ids=["empty", "half", "binary", "null", "list", "types", "numbers", "deep", "missing"],
)  # fmt: skip
def test_no_file_stops_the_reader(enc: Enc, name: str, content: bytes | None) -> None:
    """Whatever one file of a run holds, status and ls show the rest."""
    run = write_run(enc.folder / "run", [SUBMITTED, ATTEMPT, STARTED], steps=3)
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    found = look(run, slurm_job("RUNNING"))
    json.dumps(asdict(found), allow_nan=False)
    assert status_text(found)
    assert runs_text([("run", found)])


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [STARTED], steps=3)
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 99, "event": "fini')
    found = look(run)
    assert (found.state, found.step) == ("lost", 3)


def test_times_in_the_future_are_called_so(tmp_path: Path) -> None:
    """A machine whose clock is ahead makes no negative ages and no false alarm."""
    run = write_run(tmp_path / "run", [SUBMITTED, ATTEMPT, STARTED], steps=3, seconds_ago=-3600)
    found = look(run, slurm_job("RUNNING"))
    assert found.state == "running"
    assert "1 h in the future (clocks differ)" in status_text(found)
    assert ago(-3) == "0 s ago"


def test_spans() -> None:
    assert [span(s) for s in (0, 59.4, 61, 600, 3600, 7261, 90000, None)] == [
        "0 s", "59 s", "1 min 1 s", "10 min", "1 h", "2 h 1 min", "1 d 1 h", "unknown"
    ]  # fmt: skip


def test_names_are_printed_harmlessly(tmp_path: Path) -> None:
    """An escape sequence in an event or a folder name does not reach the terminal."""
    events = [SUBMITTED | {"job": "1\x1b[2J"}, FAILED | {"error": "bad\x1b]0;x\x07\nname"}, ended("crash", "stop")]
    found = look(write_run(tmp_path / "r\x1b[2Jun", [*events[:2], events[2] | {"detail": "\x1b[2J"}]))
    for text in (status_text(found), runs_text([(Path(found.run).name, found)])):
        assert text.replace("\n", "").isprintable()


# --- finding and listing ---------------------------------------------------------------------------------------------


def test_find_runs(tmp_path: Path) -> None:
    """Runs three levels deep, the newest first, also one that is only queued or has no events; not what they hold."""
    old = write_run(tmp_path / "a" / "b" / "old", [STARTED])
    queued = write_run(tmp_path / "queued", [SUBMITTED])
    silent = write_run(tmp_path / "a" / "silent", [])
    (silent / "events.jsonl").unlink()
    write_run(tmp_path / "1" / "2" / "3" / "4", [STARTED])
    (old / "checkpoints" / "5").mkdir(parents=True)
    (old / "checkpoints" / "5" / "config.yaml").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    for age, run in enumerate([silent, queued, old]):
        for name in ("config.yaml", "events.jsonl"):
            if (run / name).exists():
                os.utime(run / name, (NOW - age, NOW - age))
    (tmp_path / "loop").unlink()
    assert find_runs(tmp_path) == [silent, queued, old]
    assert find_runs(old) == [old]


def test_a_thousand_runs_are_listed_at_once(enc: Enc) -> None:
    """1,000 runs with 2,000 records each: only the ends of files are read, for all would take 10 processor seconds."""
    first = write_run(enc.folder / "runs" / "0", [STARTED, {"event": "finished", "step": 2000}], steps=2000)
    metrics = (first / "metrics.jsonl").read_bytes()
    for number in range(1, 1000):
        run = write_run(enc.folder / "runs" / str(number), [STARTED, {"event": "finished", "step": 2000}])
        (run / "metrics.jsonl").write_bytes(metrics)
    began = processes.cpu_s()
    found = json.loads(enc("ls", "--json").stdout)
    listed = processes.cpu_s()
    assert len(found) == 1000
    assert {(run["state"], run["step"], run["loss"]) for run in found} == {("finished", 2000, 3.0)}
    enc("status")
    assert listed - began < 4
    assert processes.cpu_s() - listed < 4


def test_list_fits_80_columns(tmp_path: Path) -> None:
    state = RunState("x", state="restarting", step=1_000_000, total_steps=2_000_000, loss=10.5, loss_is_finite=True,
                     heard_s=3599, job="12345678")  # fmt: skip
    text = runs_text([("a-rather-long-name/" * 5, state), ("b", RunState("b"))])
    assert max(map(len, text.splitlines())) <= 80
    assert "1000000/2000000" in text
    assert text.splitlines()[2].split() == ["b", "unknown", "-/?", "-", "unknown", "-"]


def test_nothing_there(enc: Enc) -> None:
    assert "There is no run in" in enc("ls").stderr
    assert enc("ls", "--json").stdout == "[]\n"
    assert "There is no folder" in enc("ls", "nowhere", code=2).stderr
    assert "There is no run in" in enc("status", code=2).stderr
    assert "No run is active here" in enc("cancel", code=2).stderr
    assert "had job 77" in enc("status", "77", code=2).stderr


# --- logs ------------------------------------------------------------------------------------------------------------


def test_lines_are_harmless() -> None:
    """Colours go, a progress bar leaves its last state, the rest of what does not print is escaped."""
    assert plain(b"\x1b[1;31mred\x1b[0m\tx") == "red     x"
    assert plain(b"10%\r50%\r100%\r\n") == "100%"
    assert plain(b"\x1b]0;title\x07\xff") == "\\x1b]0;title\\x07\\xff"
    assert plain("Größe\n".encode()) == "Größe"


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("end", ["", "\n"])
def test_last_lines(tmp_path: Path, lines: int, end: str) -> None:
    path = tmp_path / "log"
    text = ["a" * 70000, "b", "c"]
    path.write_text("\n".join(text) + end)
    reader = LogReader(path)
    reader.skip_to_last(lines)
    assert list(reader.lines(to_the_end=True)) == text[len(text) - min(lines, 3) :]


def test_a_growing_log(tmp_path: Path) -> None:
    """A line comes once it is whole; a file that starts anew is read from its start."""
    path = tmp_path / "log"
    path.write_text("one\ntw")
    reader = LogReader(path)
    assert list(reader.lines()) == ["one"]
    with path.open("a") as file:
        file.write("o\n")
    assert list(reader.lines()) == ["two"]
    path.write_text("x\n")
    assert list(reader.lines()) == ["x"]


def test_logs(enc: Enc) -> None:
    """Which log the options mean, and what is said when there is none."""
    run = write_run(enc.folder / "run", [STARTED, {"event": "finished", "step": 3}])
    assert "no log of its rank 0 yet" in enc("logs", "run", code=2).stderr
    for attempt in (1, 2):
        (run / "logs" / str(attempt)).mkdir(parents=True)
        (run / "logs" / str(attempt) / "console.log").write_text(f"hello {attempt}\nbye {attempt}")
    (run / "launches" / "2").mkdir()
    (run / "logs" / "2" / "rank1.log").write_text("rank 1\n")
    assert enc("logs").stdout == "hello 2\nbye 2\n"
    assert enc("logs", "run", "--attempt", "1", "-n", "1").stdout == "bye 1\n"
    assert enc("logs", "--rank", "1").stdout == "rank 1\n"
    assert enc("logs", "-f", "-n", "1").stdout == "bye 2\n"
    assert "Logs of ranks: 1." in enc("logs", "--rank", "7", code=2).stderr
    assert "Attempts with logs: 1, 2." in enc("logs", "--attempt", "7", code=2).stderr
    assert "no log of its batch process" in enc("logs", "--batch", code=2).stderr


# --- real local runs -------------------------------------------------------------------------------------------------


def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    limit = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def shown_state(enc: Enc, run: str = "run") -> dict[str, Any]:
    return json.loads(enc("status", run, "--json").stdout)


def test_a_local_run_is_watched_and_cancelled(enc: Enc, smoke: Callable[..., list[str]]) -> None:
    """Starting, running, followed, cancelled with its state saved; resumed and killed it is lost, not running."""
    options = ["trainer.max_steps=100000", "trainer.save_steps=100000", "trainer.eval_steps=100000"]
    process = enc.start(*smoke("run", *options))
    until(lambda: (enc.folder / "run" / "launches" / "1" / "launch.json").exists())
    assert shown_state(enc)["state"] in ("starting", "running")
    until(lambda: shown_state(enc)["step"] is not None and shown_state(enc)["step"] > 2)
    found = shown_state(enc)
    assert (found["state"], found["alive"], found["pid"], found["job"]) == ("running", True, process.pid, None)
    assert found["loss"] > 0
    assert found["eta_s"] > 0
    with (enc.folder / "followed").open("w") as file:
        follower = subprocess.Popen(
            [*ENC, "logs", "-f", "-n", "0"], cwd=enc.folder, env=enc.environment, stdout=file, stderr=file
        )
    said = enc("cancel").stderr
    assert f"process {process.pid} got SIGTERM" in said
    assert process.wait(60) == 75
    assert follower.wait(60) == 0
    assert (enc.folder / "followed").read_text().endswith("--- cancelled\n")
    found = shown_state(enc)
    assert (found["state"], found["checkpoint"]["step"]) == ("cancelled", found["step"])
    assert found["detail"] == f"Its state of step {found['step']} is saved."
    assert "not active: it is cancelled" in enc("cancel", "run", code=2).stderr

    process = enc.start("resume", "latest", "--run", "run")
    until(lambda: enc.events("run")[-1]["event"] == "resumed")
    assert (shown_state(enc)["state"], shown_state(enc)["attempt"]) == ("running", 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: shown_state(enc)["alive"] is False)
    assert shown_state(enc)["state"] == "lost"
    assert "gone without a word" in enc("status").stdout


def test_following_ends_at_ctrl_c(enc: Enc) -> None:
    """Quietly, with code 130."""
    run = write_run(enc.folder / "run", [STARTED], steps=3)
    (run / "logs" / "1").mkdir(parents=True)
    (run / "logs" / "1" / "console.log").write_text("hello\n")
    with (run / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = enc.start("logs", "-f")
        until(lambda: "hello" in (enc.folder / "background.log").read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert (enc.folder / "background.log").read_text() == "hello\n"


def test_a_stranger_is_not_killed(enc: Enc) -> None:
    """A lock that names a process which does not hold it, or another host: nothing is done."""
    run = write_run(enc.folder / "run", [STARTED], steps=3)
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        for owner, words in (({"pid": stranger.pid, "host": socket.gethostname()}, "is not of the run any more"),
                             ({"pid": stranger.pid, "host": "elsewhere"}, "runs on elsewhere"),
                             ({"pid": 0, "host": socket.gethostname()}, "cannot be read from its lock")):  # fmt: skip
            (run / ".lock").write_text(json.dumps({**owner, "job": None}))
            with (run / ".lock").open() as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                error = enc("cancel", "run", code=2).stderr
            assert words in " ".join(error.split())
        assert stranger.poll() is None
        assert [event["event"] for event in enc.events("run")] == ["started"]
    finally:
        stranger.kill()
        stranger.wait()


def test_checkpoints_by_name_and_size(finished_run: Path, tmp_path: Path) -> None:
    """The newest complete one is shown; a newer one that lacks a file is counted, not shown."""
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished_run), str(copy)], check=True)
    found, passed_over = last_checkpoint(copy, time.time())
    assert found is not None
    assert (found["step"], passed_over) == (6, 0)
    (copy / "checkpoints" / "6" / "model.safetensors").unlink()
    found, passed_over = last_checkpoint(copy, time.time())
    assert found is not None
    assert (found["step"], passed_over) == (3, 1)
    assert last_checkpoint(tmp_path / "nothing", time.time()) == (None, 0)


def test_the_report_words_every_event(enc: Enc) -> None:
    """Events of the launcher read as sentences and values; a garbled line does not stop the page."""
    hang = {"event": "hang", "attempt": 1, "ranks": [{"rank": 1, "host": "n2", "phase": "forward", "step": 3}]}
    excluded = {"event": "node_excluded", "node": "n2", "evidence": ["attempt 1: rank 1 fell", "attempt 2: again"]}
    run = write_run(enc.folder / "run", [SUBMITTED, ATTEMPT, STARTED, hang, ended("hang", "restart"), excluded])
    with (run / "events.jsonl").open("a") as file:
        file.write("garbage\n[1]\n{}\n")
    page = (enc.folder / enc("report", "run").stdout.strip()).read_text()
    for part in ("nodes n1, n2", "ranks rank 1 host n2 phase forward step 3",
                 "attempt 1: rank 1 fell; attempt 2: again",
                 "Rank 1 fell. So it is. attempt 1, cause hang, step 40, decision restart"):  # fmt: skip
        assert part in page


def test_a_run_whose_text_is_tokenised_is_told(enc: Enc) -> None:
    """A launch that still tokenises has no config yet; whoever asks for its status learns how far it is."""
    run = enc.folder / "run"
    run.mkdir()
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (run / ".doing").write_text("Tokenising: 27%, 1,234 tokens, 40 s")
        told = enc("status", "run", code=2).stderr
    assert "run is being prepared and has not begun to train. Tokenising: 27%, 1,234 tokens, 40 s." in told
    assert "is not a run folder" in enc("status", "run", code=2).stderr
