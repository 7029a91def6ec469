"""What each task of a job starts, `python -m enc.launcher.rank RUN_DIR`: its name is in the scripts of queued jobs."""

import sys
from pathlib import Path

from enc.launcher.backends.slurm.rank import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
