"""The batch process of a job: `python -m enc.launcher.supervise RUN_DIR [BACKEND] -- COMMAND...`."""

import sys
from pathlib import Path

from enc.encoder.errors import EncError
from enc.launcher.backends.registry import backend_of
from enc.launcher.supervise.attempt import say
from enc.launcher.supervise.supervise import supervise


def main(words: list[str]) -> int:
    """Run as the batch process of a job; `COMMAND` starts its ranks."""
    (folder, *named), command = words[: words.index("--")], words[words.index("--") + 1 :]
    run_dir = Path(folder)
    try:
        backend = backend_of(named[0] if named else "slurm")  # scripts of SLURM jobs, which may wait long, name none
        return supervise(run_dir, backend.host(run_dir, command))
    except EncError as error:
        say(str(error))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
