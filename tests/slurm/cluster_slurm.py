"""A real SLURM on this machine: munged, slurmctld and four slurmd on loopback, in a folder of their own."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from enc.launcher.machine.ports import free_port

NODES = ("n1", "n2", "n3", "n4")

_CONF = """\
ClusterName=enc
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
MailProg=/bin/true
JobRequeue=1
SlurmdTimeout={slurmd_timeout}
KillWait=30
MinJobAge=600
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
TaskProlog={folder}/task_prolog.sh
{more}
{nodes}
PartitionName=main Nodes=n1,n2,n3,n4 Default=YES MaxTime=INFINITE State=UP
"""


# A node with a file bad.<name> is one on which no Python starts.
_PROLOG = """\
#!/bin/sh
if [ -e "{folder}/bad.$SLURMD_NODENAME" ]; then echo "export PYTHONHOME=/nonexistent"; fi
"""


def missing() -> str | None:
    """Return why no SLURM can be started here, or None."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            return f"{program} is not installed (apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "starting a SLURM needs root"


class Slurm:
    """Four virtual nodes; `variables` let the SLURM commands find them."""

    def __init__(self, folder: Path, slurmd_timeout_s: int = 10, more: str = "") -> None:
        """Start everything below `folder`; `more` are further lines of slurm.conf."""
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        self.conf = folder / "slurm.conf"
        host = socket.gethostname().partition(".")[0]
        ports = _free_ports(len(NODES) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=2000"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = _CONF.format(
            host=host, folder=folder, port=ports[0], nodes=nodes, slurmd_timeout=slurmd_timeout_s, more=more
        )
        self.conf.write_text(text)
        (folder / "state").mkdir()
        (folder / "task_prolog.sh").write_text(_PROLOG.format(folder=folder))
        (folder / "task_prolog.sh").chmod(0o755)
        self.variables = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM_")},
            "SLURM_CONF": str(self.conf),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for name in NODES:
            self.start_node(name)
        self.until_idle()

    def _start_munge(self) -> None:
        place = self.folder / "munge"
        place.mkdir()
        (place / "key").write_bytes(os.urandom(128))
        user = pwd.getpwnam("munge")
        for path in (place, place / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
            path.chmod(0o700 if path.is_dir() else 0o400)
        for folder in [self.folder, *self.folder.parents][:-2]:  # munge has to get to its key
            if folder.stat().st_uid == os.geteuid():
                folder.chmod(folder.stat().st_mode | 0o011)
        words = [
            "munged", "--foreground", "--force", f"--key-file={place / 'key'}", f"--socket={place / 'socket'}",
            f"--pid-file={place / 'pid'}", f"--log-file={place / 'log'}", f"--seed-file={place / 'seed'}",
        ]  # fmt: skip
        self._start("munged", *words, user="munge")
        _until(lambda: (place / "socket").exists(), 10, "munged did not start")
        (self.folder / "munge.socket").symlink_to(place / "socket")

    def _start(self, name: str, *words: str, user: str | None = None) -> None:
        with (self.folder / f"{name}.out").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                words, env=self.variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL, user=user, group=user,
                extra_groups=[] if user else None, start_new_session=True,
            )  # fmt: skip

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-f", str(self.conf), "-N", name)

    def spoil_node(self, name: str, bad: bool = True) -> None:
        """Make a node one on which no Python starts, or mend it."""
        mark = self.folder / f"bad.{name}"
        mark.touch() if bad else mark.unlink(missing_ok=True)

    def fail_node(self, name: str) -> None:
        """Kill a slurmd with all that it started, as when a machine loses its power."""
        victims = [self.daemons[name].pid, *_processes_of_node(name, self.folder)]
        for pid in victims:
            _kill(pid)
        self.daemons[name].wait(20)

    def __call__(self, *words: str) -> str:
        """Run a SLURM command and return what it printed."""
        done = subprocess.run(words, env=self.variables, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (0, 229), f"{' '.join(words)}: {done.stderr}"  # 229: a job that has just ended
        return done.stdout

    def until_idle(self, timeout_s: float = 60) -> None:
        """Wait until all four nodes are up and empty."""

        def idle() -> bool:
            done = subprocess.run(
                ["sinfo", "-h", "-N", "-o", "%N %t"], env=self.variables, capture_output=True, text=True, check=False
            )
            return {line.split()[1] for line in done.stdout.splitlines()} == {"idle"}

        _until(idle, timeout_s, "the nodes do not become idle")

    def stop(self) -> None:
        """Kill all that is left."""
        subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=self.variables, check=False)
        for name in NODES:
            self.fail_node(name)
        for name in ("slurmctld", "munged"):
            self.daemons[name].terminate()
            self.daemons[name].wait(20)


def _processes_of_node(name: str, folder: Path) -> list[int]:
    """Return the step daemons of a node and everything below them."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            command = (place / "cmdline").read_bytes()
        except OSError:
            continue
        belongs = f"SLURM_CONF={folder}/slurm.conf".encode() in variables
        if belongs and (f"SLURMD_NODENAME={name}".encode() in variables or b"slurmstepd" in command):
            found.append(int(place.name))
    return found


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def _until(condition, timeout_s: float, text: str) -> None:  # type: ignore[no-untyped-def]
    limit = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < limit, text
        time.sleep(0.1)
