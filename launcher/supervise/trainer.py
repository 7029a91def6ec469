"""Starting the training process of one rank."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from enc.launcher.machine.rank_environment import Place, rank_environment


def start_trainer(
    run_dir: Path, place: Place, output: IO[Any] | None, more: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> subprocess.Popen[bytes]:
    """Start a rank as a child of this process; `output` None leaves it on the terminal.

    Stop signals must be blocked meanwhile (`blocked_stop_signals`): the rank lets them in once it can save. `more` is
    what the config adds to its environment, `options` are those of Popen.
    """
    words = [sys.executable, "-P", "-m", "enc.encoder.run.start", str(run_dir)]
    return subprocess.Popen(words, env=rank_environment(place, more), stdout=output, stderr=output, **options)
