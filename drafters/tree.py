"""Kangaroo's draft tree: where the draft is unsure, several continuations (the NeurIPS version).

State between rounds: that of the chain, and the last draft, because accepted nodes lie scattered
among the rejected ones and are moved together when the next round begins. Rows of a step: the nodes
of the tree, whose growth docs/trees.md explains. Needs: what the chain needs.
"""
from typing import NamedTuple

from drafters.chain import ChainDrafter
from drafters.method import overrule
from kangaroo import Draft
from llama import one_shape
from support.device import to_device
from support.limits import CHAIN_WIDTH, TREE_WIDTH

# γ, η and the most children of a node.
TREE_STEPS, TREE_THRESHOLD, TOP_CANDIDATES = 8, 0.2, 10


class Node(NamedTuple):
    """A drafted token while the tree grows."""
    token: int
    parent: int
    depth: int
    confidence: float  # of the token, given its path: for the j-th candidate the j-th probability
    product: float     # of the confidences along its path


class TreeDrafter(ChainDrafter):
    """Drafts a tree of at most `nodes` tokens, best first, with up to `candidates` children each.

    A node is followed further if its confidence is above `threshold`. nodes: None is as many as a
    step has room for.
    """
    grid = [{"width": 16, "steps": steps, "threshold": threshold, "top_candidates": candidates,
             "nodes": 15}
            for steps in (4, 8) for threshold in (0.05, 0.2) for candidates in (4, 10)]

    def __init__(self, model, adapter, exit_layer, threshold=TREE_THRESHOLD, head=None,
                 candidates=TOP_CANDIDATES, nodes=None):
        super().__init__(model, adapter, exit_layer, threshold, head)
        self.candidates, self.nodes = candidates, nodes

    @classmethod
    def usual(cls, decoder):
        """What suits a chain need not suit a tree."""
        usual = {"steps": TREE_STEPS, "threshold": TREE_THRESHOLD, "top_candidates": TOP_CANDIDATES,
                 "nodes": decoder.width}
        return overrule(usual, decoder.adapter.facts.get("tree", {}))

    @classmethod
    def usual_width(cls, decoder, asked):
        facts = decoder.adapter.facts.get("tree", {})
        width = None if "nodes" in asked else facts.get("width")
        return width or max(CHAIN_WIDTH, ({"nodes": TREE_WIDTH - 1} | facts | asked)["nodes"]) + 1

    @classmethod
    def drafts_trees(cls, width):
        return True

    @classmethod
    def make(cls, decoder, settings):
        adapter = decoder.adapter
        return cls(decoder.model, adapter, adapter.exit_layer, settings.threshold, adapter.head,
                   settings.top_candidates, settings.nodes)

    @classmethod
    def describe(cls, decoder, settings):
        return (super().describe(decoder, settings) + f", tree of {settings.nodes} nodes, "
                f"{settings.top_candidates} candidates")

    def prefill(self, ids, cache, sampler):
        self.last = None  # the last draft, where its root stood, and how many nodes were adapted
        self.most = min(self.nodes or cache.width - 1, cache.width - 1)
        return super().prefill(ids, cache, sampler)

    def draft(self, ids, n_max, cache):
        start, nodes, open_from, pool = len(ids) - 1, [Node(ids[-1], 0, 0, 1.0, 1.0)], 0, []
        self.keep(ids)
        growing = n_max > 0
        while True:
            rows, parents = nodes[open_from:], [node.parent for node in nodes[1:]]
            h = self.model.step([node.token for node in rows], start, cache, 0, self.depth,
                                parents)[:, :len(rows)]  # first early exit
            self.states[:, start + open_from:start + len(nodes)] = h
            if not growing:
                draft = Draft([node.token for node in nodes[1:]],
                              self.states[:, start:start + len(nodes)],
                              [node.confidence for node in nodes[1:]], parents)
                self.last = draft, start, open_from
                return draft
            if open_from:
                x = one_shape(h, start, self.adapter_cache, parents)
                x = self.adapter(*x)[0, :len(rows)]
            else:
                x = self.adapt(start + 1)
            pool += self.children(x, rows, open_from, start)
            # Best first: of the candidates that there is room for, those that are sure enough are
            # followed further. Second early exit: when none is, the others end the draft. They are
            # chosen already, so they are verified too.
            pool.sort(key=lambda node: -node.product)
            best = pool[:self.most + 1 - len(nodes)]
            sure = [node for node in best
                    if node.depth < n_max and node.confidence > self.threshold]
            open_from, pool = len(nodes), [node for node in pool if node not in sure]
            nodes += sure or best
            growing = bool(sure) and len(nodes) <= self.most

    def children(self, x, rows, first, start):
        """The candidates that follow the open nodes `rows`, of which node `first` is the first.

        x (T, hidden_size) is what the adapter makes of them.
        """
        drafted = self.draw(x, start + 1, [node.depth for node in rows])
        return [Node(token, parent, node.depth + 1, p, node.product * p)
                for parent, (node, candidates) in enumerate(zip(rows, drafted), first)
                for token, p in candidates]

    def draw(self, x, position, depth):
        """For each of the adapter's states x (T, hidden_size) the pairs of a candidate and its
        confidence: one host sync."""
        return self.sampler.draw(self.head(x), position, depth, self.candidates)

    def keep(self, ids):
        """Keep of the last draft what became part of `ids`: the adapter's rows and exit states."""
        if self.last is None:
            return
        draft, start, adapted = self.last
        path, node = [], 0
        for token in ids[start + 1:]:
            if (node := draft.child(node, token)) is None:
                break
            path.append(node)
        self.adapter_cache.keep(start, path)
        if path != list(range(1, 1 + len(path))):
            moved = to_device([start + node for node in path], self.states.device)
            self.states[:, start + 1:start + 1 + len(path)] = self.states[:, moved]
        self.seen += sum(node < adapted for node in path)
