"""Bugs that tests/test_sps.py must see; tests/mutations.py plants them."""
SPS = "drafters/sps.py"
BUGS = [
    ("the draft model keeps rejected positions", SPS,
     "self.seen = min(self.seen, len(ids) - 1)", "pass"),
    ("the draft model misses the last token of a full accept", SPS,
     "self.seen = min(self.seen, len(ids) - 1)", "self.seen = len(ids) - 1"),
    ("the draft model's noise keyed by draft index", SPS,
     "self.sampler.draw(self.catch_up(ids), len(ids))",
     "self.sampler.draw(self.catch_up(ids), 0)"),
    ("a step of the draft model crosses the edge of a view", SPS,
     "self.seen + 1 + self.cache.room(self.seen)]", "self.seen + self.cache.width]"),
    ("the draft model's padding is drafted", SPS,
     "return F.pad(logits, (0, more), value=-math.inf)", "return logits"),
    ("the draft model goes on beyond its context", SPS,
     "self.draft_model.config.max_position_embeddings - len(ids)", "n_max"),
]
