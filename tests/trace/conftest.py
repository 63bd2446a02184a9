"""The points of the library of routing are those of the script that remakes it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
