"""Bugs that tests/test_cli.py must see; tests/mutations.py plants them."""
BUGS = [
    ("--tree accepts a child of another node", "kangaroo.py",
     "if edge == (node, token)), None)", "if edge[1] == token and i > node), None)"),
    ("a verification starts from the embedding", "kangaroo.py",
     "self.states[:, position] = h[:, 0]",
     "self.states[:, position] = self.model.embed([token])[:, 0]"),
]
