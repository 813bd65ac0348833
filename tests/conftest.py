"""For all tests, and for the processes that they start: one thread, and none that waits busily.

Threads make a tiny model slower; and the tests themselves run in several processes (pytest-xdist).
"""
import gc
import os

# Read when PyTorch is imported, which is later.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

from training import adapter, folder, killed, refused, train  # noqa: F401 (fixtures)


def pytest_collection_finish():
    """What is imported stays: no garbage collection need look through it again."""
    gc.freeze()
