"""Bugs that tests/test_lookahead.py must see; tests/mutations.py plants them."""
BUGS = [
    ("the window moves by the drafted length", "drafters/lookahead.py",
     "self.columns = moved[len(path):]", "self.columns = moved[len(choices) - 1:]"),
    ("the window moves by one", "drafters/lookahead.py",
     "self.columns = moved[len(path):]", "self.columns = moved"),
    ("columns that were not run move on too", "drafters/lookahead.py",
     "self.columns[1 + len(run):]", "self.columns[len(run):]"),
    ("a pool keyed by the last token", "drafters/lookahead.py",
     "self.pool.setdefault(ngram[0], [])", "self.pool.setdefault(ngram[-1], [])"),
    ("the pool is asked for the token before", "drafters/lookahead.py",
     "self.pool.get(ids[-1], [])", "self.pool.get(ids[-2:][0], [])"),
    ("a column hangs below the one before", "drafters/lookahead.py",
     "self.ends.append(hang(edges, chain, column[1:]))",
     "self.ends.append(hang(edges, max(0, chain - 1), column[1:]))"),
    ("a window is deeper than it may be", "drafters/lookahead.py",
     "if j + self.ngram - 2 > n_max:", "if j > n_max:"),
]
