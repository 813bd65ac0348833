"""Bugs that tests/test_medusa.py must see; tests/mutations.py plants them."""
BUGS = [
    ("heads read the state of a rejected row", "drafters/medusa.py",
     "last = path[-1] if path else 0", "last = len(choices) - 1"),
    ("heads read the row that a chain would have", "drafters/medusa.py",
     "last = path[-1] if path else 0", "last = len(path)"),
    ("heads read what the final norm has not seen", "drafters/medusa.py",
     "self.model.norm(hidden[0, last:last + 1])", "hidden[0, last:last + 1]"),
    ("heads' noise keyed by their number", "drafters/medusa.py",
     "self.sampler.draw(logits, position, k=", "self.sampler.draw(logits, 0, k="),
    ("a path's choices are of the head before", "drafters/medusa.py",
     "of_head = choices[len(path) - 1]", "of_head = choices[len(path) - 2]"),
    ("a tree hangs below the root", "drafters/medusa.py",
     "parents.append(nodes[path[:-1]])", "parents.append(nodes[path[:-2]])"),
]
