"""Nothing of the algorithm: files, text, the command line, kernels, graphs.

This file runs before all else of ours, and so before PyTorch is first imported, which warns if
there is no NumPy. Nothing here needs it.
"""
import os
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", "Failed to initialize NumPy")
# OpenMP's threads wait for one another by turning in a loop, by default for so long that beside
# another program's threads a decode took 46 s instead of 0.2. So it takes 1.2, and alone no longer.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def end_quietly(kind, error, traceback, usual=sys.excepthook):
    """Ctrl-C while a program of ours is still being imported, which takes seconds, is no error."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        usual(kind, error, traceback)


ROOT = Path(__file__).resolve().parents[1]
if ROOT in Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parents:
    sys.excepthook = end_quietly
