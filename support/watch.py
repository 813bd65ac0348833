"""Drafters that tell what they do, by wrappers that delegate: nothing is patched.

A wrapper knows its drafter, and no drafter knows its wrapper: with a cycle its cache would be taken
until some garbage collection, and the next text be decoded without CUDA graphs.
"""
import time


class Wrapper:
    """A drafter in all that it does not do itself."""

    def __init__(self, drafter):
        self.drafter = drafter

    def __getattr__(self, name):
        return getattr(self.drafter, name)


class WatchedDrafter(Wrapper):
    """Calls saw(tokens) whenever the draft has grown; of a tree, with each node's first child.

    A drafter that draws its tokens one by one is seen doing so.
    """

    def __init__(self, drafter, saw):
        super().__init__(drafter)
        self.saw, self.tokens = saw, []

    def prefill(self, ids, cache, sampler):
        return self.drafter.prefill(ids, cache, WatchedSampler(sampler, self.saw, self.tokens))

    def draft(self, *arguments):
        self.tokens.clear()
        draft, path, node = self.drafter.draft(*arguments), [], 0
        while node in draft.parents:
            node = 1 + draft.parents.index(node)
            path.append(draft.tokens[node - 1])
        self.saw(path)
        return draft


class WatchedSampler:
    """A sampler that tells of the single tokens that are drawn; in all else it is the sampler."""

    def __init__(self, sampler, saw, tokens):
        self.sampler, self.saw, self.tokens = sampler, saw, tokens

    def __getattr__(self, name):
        return getattr(self.sampler, name)

    def draw(self, *arguments, **more):
        return self.fetch(self.sampler.candidates(*arguments, **more))

    def fetch(self, candidates):
        rows = self.sampler.fetch(candidates)
        if len(rows) == len(rows[0]) == 1:
            self.tokens.append(rows[0][0][0])
            self.saw(self.tokens)
        return rows


class TimedDrafter(Wrapper):
    """Keeps the seconds that each draft took; `wait` ends when the device has done all of it."""

    def __init__(self, drafter, wait):
        super().__init__(drafter)
        self.wait, self.seconds = wait, []

    def draft(self, *arguments):
        begin = time.perf_counter()
        draft = self.drafter.draft(*arguments)
        self.wait()  # the last token's layers are drafting too
        self.seconds.append(time.perf_counter() - begin)
        return draft
