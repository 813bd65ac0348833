"""Bugs that tests/test_lossless.py must see; tests/mutations.py plants them."""
BUGS = [
    ("the width dropped for a single row", "llama.py",
     "    width, T = cache.width, x.shape[1]\n",
     "    width, T = cache.width if x.shape[1] > 1 else 1, x.shape[1]\n"),
    ("a draft crosses the edge of a view", "llama.py",
     "return min(self.width - 1, -(start + self.width) % block)", "return self.width - 1"),
    ("the view depends on the live rows", "llama.py",
     "cache.view(start + width)", "cache.view(start + 1 + len(parents or []))"),
]
