"""For all tests, and for the processes that they start: one thread.

Threads make a tiny model slower; and the tests themselves run in several processes (pytest-xdist).
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when PyTorch is imported, which is later
