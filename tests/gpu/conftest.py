"""The GPU tests share their formulas with those of the emulated kernels."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
