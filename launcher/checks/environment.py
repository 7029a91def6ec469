"""Checks of the environment of a run: limits, caches, build locks, accounts. `enc doctor` has some without a config.

Each check is a function of what was observed; `enc.launcher.checks.preflight` and `enc.launcher.checks.doctor` observe.
"""

import netrc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from enc.encoder.quantities import size_text
from enc.launcher.checks.findings import Finding, green, red, yellow
from enc.launcher.machine.build_locks import BuildLock, home
from enc.launcher.machine.mounts import Mount, mount_of

_OPEN_FILES = 4096
_STALE_LOCK_S = 600


def check_open_files(soft: int, hard: int) -> Finding:
    """A rank opens a file for each data shard, worker and peer; -1 is no limit."""
    if soft == -1 or soft >= _OPEN_FILES:
        return green("open files", "no limit" if soft == -1 else f"up to {soft:,} a process")
    more = f"`ulimit -n {_OPEN_FILES}` before the launch"
    if hard != -1 and hard < _OPEN_FILES:
        more = f"ask the administrator: the hard limit is {hard:,}"
    return yellow("open files", f"only {soft:,} a process; ranks with many peers or workers run out", more)


def check_build_locks(locks: list[BuildLock], is_needed: bool, mounts: Sequence[Mount]) -> Iterator[Finding]:
    """A build that was killed leaves a lock behind, and every later one waits for it without a word."""
    for lock in locks:
        if lock.holder is not None:
            yield yellow("build lock", f"process {lock.holder} is building in {lock.path.parent}", "wait for it to end")
        elif lock.age_s > _STALE_LOCK_S:
            mount = mount_of(lock.path, mounts)
            is_shared = mount is not None and mount.is_network
            here = "here " if is_shared else ""
            text = (
                f"{lock.path} is {_age(lock.age_s)} old and no process {here}holds it; every build there waits for it"
            )
            fix = f"{'if no other machine is building: ' if is_shared else ''}rm {lock.path}"
            yield red("build lock", text, fix) if is_needed and not is_shared else yellow("build lock", text, fix)


def _age(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} minutes"
    return f"{minutes // 60} hours" if minutes < 48 * 60 else f"{minutes // 1440} days"


def cache_folders(variables: Mapping[str, str]) -> dict[str, Path]:
    """Return the variable of each cache and the folder that it stands for."""
    own = home(variables)
    default = {
        "TRITON_CACHE_DIR": own / ".triton" / "cache",
        "TORCH_EXTENSIONS_DIR": own / ".cache" / "torch_extensions",
        "HF_HOME": own / ".cache" / "huggingface",
    }
    return {name: Path(variables.get(name) or folder).expanduser() for name, folder in default.items()}


def check_caches(folders: dict[str, Path], mounts: Sequence[Mount]) -> Iterator[Finding]:
    """Many ranks that compile into, or lock, one folder of a file server are slow and sometimes wrong."""
    for name, folder in folders.items():
        mount = mount_of(folder, mounts)
        if mount is not None and mount.is_network:
            text = f"{name} is {folder}, on a network file system ({mount.type}): slow, and its locks may not work"
            yield yellow("caches", text, f"set {name} to a folder on a local disk of the node, e.g. in launch.env")


def check_wandb_login(variables: Mapping[str, str], netrc_file: Path, more_setup: bool) -> Finding:
    """W&B asks for its key on a terminal, which a job has not."""
    host = variables.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].strip("/")
    if variables.get("WANDB_API_KEY"):
        return green("W&B", "WANDB_API_KEY is set")
    try:
        if netrc_file.exists() and netrc.netrc(str(netrc_file)).authenticators(host):
            return green("W&B", f"{netrc_file} has an entry for {host}")
        why = f"neither WANDB_API_KEY nor an entry for {host} in {netrc_file}"
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        why = f"no WANDB_API_KEY, and {netrc_file} cannot be read ({_first_line(error)})"
    fix = "`wandb login`, or set wandb.mode offline"
    if more_setup:
        return yellow("W&B", f"{why}; unless launch.setup sets the key, the run fails at its start", fix)
    return red("W&B", f"{why}: the run would fail at its start", fix)


def check_hub(names: list[str], variables: Mapping[str, str]) -> Iterator[Finding]:
    """`names` are the hub names, with what they are, that will be fetched when the token store is made."""
    offline = [key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if variables.get(key, "0") not in ("", "0")]
    token = variables.get("HF_TOKEN") or (cache_folders(variables)["HF_HOME"] / "token").exists()
    for name in names:
        if offline:
            fix = f"unset {' and '.join(offline)}, or use local files"
            yield yellow(
                "hub", f"{name} is fetched from the hub, but {offline[0]} is set: only a cached one works", fix
            )
        else:
            note = "" if token else "; without HF_TOKEN, which a gated one needs"
            yield green("hub", f"{name} is fetched from the Hugging Face hub{note}")


def ram_finding(needed: int, available: int, where: str, parts: str, more: str) -> Finding:
    """What a machine must hold beside the processes themselves; `more` is how a run gets more of it."""
    text = f"about {size_text(needed)} of {size_text(available)} {where}, for {parts}"
    if needed <= 0.9 * available:
        return green("RAM", text)
    return yellow("RAM", f"it may run out: {text}", more)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
