"""The batch process of a job: `python -m enc.launcher.supervise RUN_DIR -- srun ...`."""

import os
import sys
from pathlib import Path

from enc.encoder.errors import EncError
from enc.launcher.backends.slurm.host import SlurmHost
from enc.launcher.supervise.attempt import say
from enc.launcher.supervise.supervise import supervise


def main(words: list[str]) -> int:
    """Run as the batch process of a SLURM job."""
    run_dir, command = Path(words[0]), words[2:]
    try:
        return supervise(run_dir, SlurmHost(run_dir, command, os.environ))
    except EncError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
