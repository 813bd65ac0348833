"""Retrieval (REST: He et al., NAACL 2024): propose what followed the last words in other texts.

    python drafters/rest.py --model DIR --data FILE --out store.safetensors     # makes a datastore

A datastore is the token ids of many documents and the order of their suffixes, sorted like the
words of a dictionary. So all places where the last words of the text occur stand side by side in
it, and bisection finds them. Of the last 16 tokens down to the last one, as many are looked up as
occur at all. What follows these places is merged into a tree, in which a node weighs as much as
there are places that go on by way of it, and the heaviest nodes are the draft.

State between rounds: none. Rows of a step: the last committed token and the nodes of the tree; at a
width that has no trees the chain of the most frequent token at every turn. Needs: a datastore of
text like the one to come. No layer runs for a draft, and nothing is trained. There is no
distribution to choose from, so under sampling a token is accepted if it is the one that is sampled.
"""
import ctypes
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from itertools import takewhile
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from drafters.method import Method
from kangaroo import WIDTH, Draft, NoDrafter
from support.checkpoint import safetensors_entries
from support.errors import require
from support.limits import CHAIN_WIDTH
from support.tokenizer import vocabulary_digest

import torch
import torch.nn.functional as F
from safetensors import safe_open

LONGEST, MATCHES = 16, 128  # tokens of the text to look up; places to look at
REST_STEPS = 10  # how deep a tree is: γ
MAKE_ONE = "make one with python drafters/rest.py"
END = -1  # stands behind each document: no id, and before all ids in the order


class Datastore:
    """The tokens (n,) of documents, END behind each, and the order (n,) of their suffixes, both
    int32."""

    def __init__(self, tokens, order, source="datastore"):
        self.source = source  # where it comes from, for messages
        # One number at a time is read here, which is slow of a tensor.
        self.tokens, self.order = (
            array("i", ctypes.string_at(t.data_ptr(), t.nbytes)) for t in (tokens, order))

    def continuations(self, ids, longest):
        """What followed the longest suffix of `ids` that occurs, up to the end of the document.

        At most MATCHES tuples of 1 to `longest` tokens; if there are more, from all over them.
        """
        lengths = range(1, min(LONGEST, len(ids)) + 1)  # where n tokens occur, so do n − 1
        n = bisect_left(lengths, True, key=lambda n: not self.places(ids[-n:]))
        places = self.places(ids[-n:]) if n else range(0)
        starts = [self.order[i] + n for i in places[::-(-len(places) // MATCHES) or 1]]
        texts = (self.tokens[start:start + longest] for start in starts)
        return [tuple(takewhile(lambda token: token != END, text)) for text in texts]

    def places(self, key):
        """Where in the order the suffixes are that begin with `key` and go on in their document."""
        key = array("i", key)
        first = self.rank(key + array("i", [0]))  # before it are those that go on with END
        key[-1] += 1
        return range(first, self.rank(key))

    def rank(self, key):
        """How many suffixes come before `key`."""
        return bisect_left(self.order, key, key=lambda i: self.tokens[i:i + len(key)])


def read_datastore(path, tokenizer, vocab_size):
    """A Datastore from its file; UserError if it is none, or one of another tokenizer."""
    entries = safetensors_entries(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
    require(set(entries) == {"tokens", "order"} and {"tokenizer", "vocabulary"} <= set(facts),
            f"{path}: is no datastore, {MAKE_ONE}")
    size, made_with = len(tokenizer.vocabulary()), facts["tokenizer"]
    require(made_with == vocabulary_digest(tokenizer),
            f"{path}: made with another tokenizer (of {facts['vocabulary']} tokens, digest "
            f"{made_with}) than the model's (of {size} tokens, digest "
            f"{vocabulary_digest(tokenizer)}), {MAKE_ONE}")
    tokens, order = (entries[name][1]() for name in ("tokens", "order"))
    for name, t, least, end in (("tokens", tokens, END, vocab_size),
                                ("order", order, 0, tokens.numel())):
        require(t.dtype == torch.int32 and t.shape == tokens.shape and t.dim() == 1 and len(t)
                and t.min() >= least and t.max() < end,
                f"{path}: damaged, {name} must be as many int32 as there are tokens, from {least} "
                f"to {end - 1}; {MAKE_ONE}")
    return Datastore(tokens, order, str(path))


def suffix_order(tokens):
    """Where the suffixes of tokens (n,) begin, in the order of their first 32 tokens: (n,) int32.

    Prefix doubling (Manber and Myers 1990): suffixes that have a rank by k tokens are sorted by two
    of these, their own and that of what comes k tokens later, which is their rank by 2 k.
    """
    rank = tokens.long() - END  # from 0 on, which also stands for what lies behind the last token
    for k in 1, 2, 4, 8, 16:
        pair = rank * (rank.max() + 1) + F.pad(rank, (0, k))[k:]
        pair, order = pair.sort()
        rank[order] = F.pad(pair[1:] != pair[:-1], (1, 0)).cumsum(0)
    return order.int()


class RestDrafter(Method, NoDrafter):
    """Proposes the `nodes` heaviest nodes of the tree of continuations in `store`.

    nodes: None is as many as a step has room for.
    """
    grid = [{"width": width, "steps": steps, "nodes": width - 1}
            for width, steps in ((4, 3), (8, 7), (12, 10), (16, 10))]

    def __init__(self, model, store, nodes=None):
        super().__init__(model)
        self.store, self.nodes = store, nodes

    @classmethod
    def usual(cls, decoder):
        return {"steps": REST_STEPS, "nodes": decoder.width}

    @classmethod
    def usual_width(cls, decoder, asked):
        return asked["nodes"] + 1 if "nodes" in asked else WIDTH

    @classmethod
    def make(cls, decoder, settings):
        return cls(decoder.model, decoder.datastore, settings.nodes)

    @classmethod
    def load(cls, path, decoder):
        return read_datastore(path, decoder.tokenizer, decoder.model.config.vocab_size)

    @classmethod
    def drafts_trees(cls, width):
        return width > CHAIN_WIDTH

    @classmethod
    def describe(cls, decoder, settings):
        text = f"rest with {Path(decoder.datastore.source).name}, γ {settings.steps}"
        return text + f", tree of {settings.nodes} nodes" * cls.drafts_trees(decoder.width)

    def draft(self, ids, n_max, cache):
        texts = self.store.continuations(ids, n_max)
        weight = Counter(text[:n] for text in texts for n in range(1, len(text) + 1))
        # A node is the path that leads to it. No path weighs more than one that it goes on from.
        best = sorted(weight, key=lambda path: (-weight[path], len(path)))
        best = best if self.drafts_trees(cache.width) else heaviest_chain(best)
        best = best[:min(self.nodes or cache.width - 1, cache.width - 1)]
        node = {(): 0} | {path: i for i, path in enumerate(best, 1)}
        tokens = [path[-1] for path in best]
        return Draft(tokens, parents=[node[path[:-1]] for path in best])


def heaviest_chain(paths):
    """Of paths, the heaviest first: from the root on, always the heaviest that goes on."""
    chain = [()]
    for path in paths:
        if path[:-1] == chain[-1]:
            chain.append(path)
    return chain[1:]


if __name__ == "__main__":
    from support.datastore import main
    sys.exit(main())
