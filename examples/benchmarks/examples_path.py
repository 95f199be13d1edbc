"""Import this module before those of `examples/`: `python examples/benchmarks/<name>.py` knows its own folder only."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
