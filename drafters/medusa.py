"""Medusa (Cai et al. 2024): heads on the target's last state, each for a position further ahead.

The target's LM head reads the last state of position t and says what stands at t + 1; head k reads
the same state and says what stands at t + 1 + k. So a draft costs K small heads and no layer.

    norm(state of t) -> LM head: the last committed token, at t + 1
                     -> residual block of head 1 -> projection: the first drafted token, at t + 2
                     -> residual block of head 2 -> projection: the second one, at t + 3   …

The heads do not know what the others chose. Without a tree the draft is each head's first choice, a
chain of K; Medusa's tree has further choices of each head below one another, on paths that are the
same in every round: (1, 0) is the second choice of head 1 and then the first of head 2.

State between rounds: one row, the last state of the last token that was run. Rows of a step: the
last committed token and the K or the tree's. Needs: heads trained for this target, and for a tree a
width above 8. Reads the heads that the authors' code saves (Medusa-1). Left out on purpose: their
"typical acceptance", which changes the text.
"""
import math

from kangaroo import WIDTH, Adapter, Draft, NoDrafter
from llama import Linear, Sampler

import torch
import torch.nn as nn
import torch.nn.functional as F

# A path a node, parents first, the likeliest first: of 3 heads, in 15 rows.
TREE = ((0,), (0, 0), (1,), (0, 1), (0, 0, 0), (2,), (1, 0), (0, 2), (0, 0, 1), (3,), (0, 1, 0),
        (2, 0), (1, 1), (1, 0, 0), (0, 0, 2))


class Block(nn.Module):
    """A residual block: x + SiLU(W x + b)."""

    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        return x + F.silu(self.linear(x))


class Heads(nn.Module):
    """K heads, each of some blocks and, if it has one of its own, a projection to the vocabulary.

    Named as the authors name them: 0.0.linear.weight is of head 1's first block, and with one block
    0.1.weight its projection.
    """
    draft_from = Adapter.draft_from  # sets vocabulary, and head: these rows of the target's LM head

    def __init__(self, shape):
        super().__init__()
        heads, blocks, size, vocab_size = shape  # vocab_size 0: the target's LM head projects
        self.heads = nn.ModuleList(nn.Sequential(*(Block(size) for _ in range(blocks)))
                                   for _ in range(heads))
        for head in self.heads if vocab_size else ():
            head.append(Linear(size, **{str(blocks): vocab_size}))
        self.own, self.tree, self.source = bool(vocab_size), TREE, "heads"
        self.head = self.vocabulary = None

    def forward(self, x, n, lm_head):
        """The target's normed state x (1, hidden_size) -> what the first n heads say, (n, V)."""
        x = torch.cat([head(x) for head in self.heads[:n]])
        return x if self.own else (self.head or lm_head)(x)


class MedusaDrafter(NoDrafter):
    """Drafts each head's first choice; with `tree`, its paths of choices, at most width − 1 nodes.

    Serves one call of `generate`, and is given its width and its sampler too.
    """

    def __init__(self, model, heads, sampler=None, width=WIDTH, tree=None):
        super().__init__(model)
        self.heads, self.sampler, self.source = heads, sampler or Sampler(), heads.source
        self.width = width
        chain = [(0,) * (k + 1) for k in range(len(heads.heads))]
        paths = [tuple(path) for path in tree or chain if len(path) <= len(chain)]
        self.tree = paths[:width - 1]

    def prefill(self, ids, cache):
        self.state = None
        return super().prefill(ids, cache)

    def observe(self, hidden, choices, path):
        last = path[-1] if path else 0  # the last token that was run and is committed
        self.state = self.model.norm(hidden[0, last:last + 1])

    def draft(self, ids, n_max, cache):
        tokens, confidence, parents, nodes = [], [], [], {(): 0}
        choices = self.choices(len(ids), n_max)
        for path in self.tree:
            if len(path) <= len(choices) and path[:-1] in nodes:
                token, p = choices[len(path) - 1][path[-1]]
                if token >= 0:  # top-k and top-p may leave fewer
                    nodes[path] = len(nodes)
                    tokens.append(int(token))
                    confidence.append(p)
                    parents.append(nodes[path[:-1]])
        return Draft(tokens, None, confidence, parents)

    def choices(self, position, n):
        """Of each of the first n heads the likeliest (token, probability), the first one's token to
        stand at `position`. The noise is that of where a token will stand."""
        if self.state is None or not n:
            return []  # nothing has been run yet: the prompt was one token
        logits = self.heads(self.state, n, self.model.lm_head)
        size = self.model.config.vocab_size
        if self.heads.vocabulary is not None:
            every = logits.new_full((len(logits), size), -math.inf)
            logits = every.index_copy_(1, self.heads.vocabulary, logits)
        k = 1 + max(map(max, self.tree))
        top = (logits.float() / (self.sampler.temperature or 1)).softmax(-1).topk(min(k, size))
        tokens = self.sampler.candidates(logits, position, None, min(k, size))
        drafted = torch.stack((tokens.double(), top.values.double()), -1)
        none = [[-1, 0.0]] * k  # a vocabulary may be smaller than the tree is wide
        return [row + none for row in drafted.tolist()]  # one host sync


def sparse_tree(right, nodes):
    """The paths that are likeliest to be the text: how Medusa's tree is chosen.

    right[k][i]: how often the i-th choice of head k + 1 was right, on other text.
    """
    tree, near = [], {(i,): p for i, p in enumerate(right[0])}
    while near and len(tree) < nodes:
        path = max(near, key=near.get)
        p = near.pop(path)
        tree.append(path)
        if len(path) < len(right):
            near |= {(*path, i): p * q for i, q in enumerate(right[len(path)])}
    return tree
