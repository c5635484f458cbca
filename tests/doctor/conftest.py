"""The servers that tests/teachers has are looked at here, too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "teachers"))
