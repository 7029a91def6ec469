"""Where the tests find the tree and what other systems computed."""

from pathlib import Path

import enc as package

ROOT = Path(package.__file__).parent
TESTS = Path(__file__).parent.parent
GOLDEN = TESTS / "golden"
