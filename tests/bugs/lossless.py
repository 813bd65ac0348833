"""Bugs that tests/test_lossless.py must see; tests/mutations.py plants them."""
BUGS = [
    ("the width dropped for a single row", "llama.py",
     "    first = 0 if parents is None else 1 + len(parents) - T\n",
     "    first = 0 if parents is None else 1 + len(parents) - T\n"
     "    width = width if T > 1 else 1\n"),
    ("a draft crosses the edge of a view", "llama.py",
     "return min(self.width - 1, -(start + self.width) % block)", "return self.width - 1"),
    ("the view depends on the live rows", "llama.py",
     "cache.view(start + width)", "cache.view(start + 1 + len(parents or []))"),
]
