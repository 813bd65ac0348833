"""Bugs that tests/test_notebook.py must see; tests/mutations.py plants them."""
BUGS = [
    ("the notebook's own loop drafts otherwise", "kangaroo.py",
     "return Draft(tokens, self.states[:, start:start + len(tokens) + 1], confidence)",
     "n = len(tokens) - any(p <= self.threshold for p in confidence)\n"
     "        return Draft(tokens[:n], self.states[:, start:start + n + 1], confidence[:n])"),
]
