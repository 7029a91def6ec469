"""The job scripts that tests compare with `tests/golden/scripts/`; run this file to write those anew."""

from pathlib import Path

from places import GOLDEN

from enc.encoder.config.load import load_config
from enc.encoder.config.schema import RunConfig
from enc.encoder.config.sites import SITES
from enc.launcher.backends.slurm.script import job_script

SCRIPTS = GOLDEN / "scripts"
CASES = [path.stem for path in sorted(SITES.glob("*.yaml"))]
RUN_DIR, CWD, PYTHON = Path("/scratch/me/runs/books"), Path("/home/me/books"), "/home/me/venv/bin/python"


def config_of(site: str, **more: object) -> RunConfig:
    """Return the config of a run on two nodes of a site."""
    return load_config("smoke", {"launch.site": site, "launch.nodes": 2, **more}).config


def script(site: str) -> str:
    return job_script(config_of(site), RUN_DIR, CWD, PYTHON)


if __name__ == "__main__":
    for name in CASES:
        (SCRIPTS / f"{name}.sbatch").write_text(script(name))
