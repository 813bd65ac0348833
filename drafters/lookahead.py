"""Lookahead decoding (Fu et al. 2024): guess many positions at once, keep the n-grams it gives.

The paper's window, as nodes of one tree. Column j stands for position start + j and has N − 1
tokens: its first is a link of a chain that begins with the last committed token, the others hang
below it one by one. For W = 3 and N = 4, where every row sees its ancestors alone:

    position   start  +1   +2   +3   +4      column 0: the last committed token, a1, a2 -> a3
    chain        0 ── 1 ── 2                 column 1: 1, b2, b3                        -> b4
    column 0     └── a1 ── a2                column 2: 2, c3, c4                        -> c5
    column 1          └── b2 ── b3
    column 2               └── c3 ── c4

What the target says after a column's last token makes it an n-gram, which goes into the pool, and
is the last token of the column that stands one position further on: a Jacobi iteration, in which
each token has been guessed N − 1 times before it is the first of its column. Below the last
committed token hang the pool's n-grams that begin with it, at most G. Nodes with the same path are
one node. All are drafted tokens: those that the target says too are accepted.

State between rounds: the window's columns, and the pool: for a token, what followed it. Rows of a
step: the window's W (N − 1) − 1 and G (N − 1) at most. Needs: a width above 8, nothing trained. The
paper's W, N, G are 15, 5, 15, in 120 rows. Left out on purpose: several GPUs.
"""
import random

from drafters.method import Method
from kangaroo import Draft, NoDrafter
from support.errors import require
from support.limits import TREE_WIDTH

# W, N and G: for a CPU, where a wide step is expensive.
WINDOW, NGRAM, CANDIDATES = 6, 3, 2


class LookaheadDrafter(Method, NoDrafter):
    """Drafts a tree of `window` columns and of up to `candidates` n-grams of `ngram` tokens."""
    grid = [{"width": 16, "window": w, "ngram": n, "candidates": g}
            for w, n, g in ((6, 3, 2), (4, 3, 4), (3, 4, 2), (1, 4, 4))]

    def __init__(self, model, window=WINDOW, ngram=NGRAM, candidates=CANDIDATES):
        super().__init__(model)
        require(window >= 1 and ngram >= 2 and candidates >= 0,
                f"lookahead: window {window}, ngram {ngram} and candidates {candidates} must be at "
                "least 1, 2 and 0")
        self.window, self.ngram, self.candidates = window, ngram, candidates

    @classmethod
    def usual(cls, decoder):
        return {"steps": decoder.width - 1, "window": WINDOW, "ngram": NGRAM,
                "candidates": CANDIDATES}

    @classmethod
    def usual_width(cls, decoder, asked):
        return TREE_WIDTH

    @classmethod
    def make(cls, decoder, settings):
        return cls(decoder.model, settings.window, settings.ngram, settings.candidates)

    @classmethod
    def drafts_trees(cls, width):
        return True

    @classmethod
    def check(cls, settings, width):
        super().check(settings, width)
        rows = settings.window * (settings.ngram - 1)  # the last committed token among them
        require(rows <= width, f"--width {width}: must be at least {rows}, the rows of a window of "
                f"{settings.window} columns of {settings.ngram - 1} tokens")

    def prefill(self, ids, cache, sampler):
        self.columns, self.ends = [], []  # of the window, and the node of each one's last token
        self.pool, self.random = {}, random.Random(0)
        for i in range(len(ids) - self.ngram + 1):  # the prompt as a reference
            self.learn(ids[i:i + self.ngram])
        return super().prefill(ids, cache, sampler)

    def learn(self, ngram):
        """Remember how the text goes on after the first token; the latest `candidates` stay."""
        known = self.pool.setdefault(ngram[0], [])
        if ngram[1:] in known:
            known.remove(ngram[1:])
        known.append(ngram[1:])
        del known[:len(known) - self.candidates]

    def draft(self, ids, n_max, cache):
        self.fill(ids)
        edges, chain, self.ends = {}, 0, []  # edges: (parent, token) -> node
        for j, column in enumerate(self.columns):
            if j + self.ngram - 2 > n_max:
                break  # so deep no node may lie: this column and the next ones are not run
            chain = hang(edges, chain, column[:1]) if j else 0
            self.ends.append(hang(edges, chain, column[1:]))
        for tokens in reversed(self.pool.get(ids[-1], [])):
            hang(edges, 0, tokens[:min(n_max, cache.width - 1 - len(edges))])
        parents, tokens = zip(*edges) if edges else ((), ())
        return Draft(list(tokens), parents=list(parents))

    def fill(self, ids):
        """Columns for all positions of the window: by guess, where there is none yet.

        A new column is the one before, moved on by a token.
        """
        first = [ids[-1], *(self.columns[0][1:] if self.columns else [])]  # known by now
        while len(first) < self.ngram - 1:
            first.append(self.guess(ids, first[-1]))
        self.columns[:1] = [first]
        while len(self.columns) < self.window:
            before = self.columns[-1]
            self.columns.append([*before[1:], self.guess(ids, before[-1])])

    def guess(self, ids, token):
        """What the pool has after a token, or any token of the text."""
        known = self.pool.get(token)
        return known[-1][0] if known else self.random.choice(ids)

    def observe(self, hidden, choices, path):
        """Each column that was run goes on by one token; the text goes on by 1 + len(path).

        One position is held by two columns then: the last one that was run, and the first one that
        was not.
        """
        run = [[*column, choices[end]] for column, end in zip(self.columns, self.ends)]
        for ngram in run:
            self.learn(ngram)
        moved = [ngram[1:] for ngram in run] + self.columns[1 + len(run):]
        self.columns = moved[len(path):]


def hang(edges, node, tokens):
    """Hang a path of tokens below a node, as far as it is not there yet; returns its last node."""
    for token in tokens:
        node = edges.setdefault((node, token), 1 + len(edges))
    return node
