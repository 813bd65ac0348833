"""Bugs that tests/test_rest.py must see; tests/mutations.py plants them."""
REST = "drafters/rest.py"
BUGS = [
    ("a continuation goes on in the next document", REST,
     "takewhile(lambda token: token != END, text)", "text"),
    ("a match at the end of a document counts", REST, 'key + array("i", [0])', "key"),
    ("documents run into one another", "support/datastore.py",
     "        tokens.append(END)\n", ""),
    ("suffixes are sorted by too few tokens", REST, "for k in 1, 2, 4, 8, 16:",
     "for k in 1, 2, 4:"),
    ("a branch hangs below another node", REST, "node[path[:-1]] for path in best",
     "max(0, node[path] - 1) for path in best"),
    ("a datastore of another tokenizer is read", REST,
     "require(made_with == vocabulary_digest(tokenizer),", "require(True,"),
]
