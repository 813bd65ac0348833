"""Prompt lookup (Saxena 2023): propose what followed the last words when they last occurred.

State between rounds: none. Rows of a step: the last committed token and the copied ones. Needs: a
text that repeats its prompt or itself. No layer runs for a draft, and nothing is trained.
"""
from drafters.method import Method
from kangaroo import Draft, NoDrafter


class PromptLookupDrafter(Method, NoDrafter):
    """Proposes what followed the latest earlier occurrence of the last `ngram` tokens."""
    ngram = 2
    grid = [{"width": width, "steps": width - 1} for width in (2, 4, 8)]

    def draft(self, ids, n_max, cache):
        key, latest = ids[-self.ngram:], len(ids) - self.ngram - 1
        start = next((i for i in range(latest, -1, -1) if ids[i:i + self.ngram] == key), len(ids))
        tokens = ids[start + self.ngram:][:n_max]
        return Draft(tokens)
