"""Kangaroo's draft tree: where the draft is unsure, several continuations (the NeurIPS version).

State between rounds: that of the chain, and the last draft, because accepted nodes lie scattered
among the rejected ones and are moved together when the next round begins. Rows of a step: the nodes
of the tree, whose growth docs/trees.md explains. Needs: what the chain needs.
"""
from typing import NamedTuple

from kangaroo import Draft, KangarooDrafter
from llama import one_shape, to_device

# γ, η, the rows of a step and the most children of a node. A wide step costs vanilla more, too.
TREE_STEPS, TREE_THRESHOLD, TREE_WIDTH, TOP_CANDIDATES = 8, 0.2, 16, 10


class Node(NamedTuple):
    """A drafted token while the tree grows."""
    token: int
    parent: int
    depth: int
    confidence: float  # of the token, given its path: for the j-th candidate the j-th probability
    product: float     # of the confidences along its path


class TreeDrafter(KangarooDrafter):
    """Drafts a tree of at most `nodes` tokens, best first, with up to `candidates` children each.

    A node is followed further if its confidence is above `threshold`.
    """

    def __init__(self, model, adapter, exit_layer, threshold=TREE_THRESHOLD, sampler=None,
                 width=TREE_WIDTH, candidates=TOP_CANDIDATES, nodes=None):
        super().__init__(model, adapter, exit_layer, threshold, sampler, width)
        self.candidates, self.nodes = candidates, min(nodes or width - 1, width - 1)

    def prefill(self, ids, cache):
        self.last = None  # the last draft, where its root stood, and how many nodes were adapted
        return super().prefill(ids, cache)

    def draft(self, ids, n_max, cache):
        start, nodes, open_from, pool = len(ids) - 1, [Node(ids[-1], 0, 0, 1.0, 1.0)], 0, []
        self.keep(ids)
        growing = n_max > 0
        while True:
            rows, parents = nodes[open_from:], [node.parent for node in nodes[1:]]
            h = self.model.step([node.token for node in rows], start, cache, self.width, 0,
                                self.depth, parents)[:, :len(rows)]  # first early exit
            self.states[:, start + open_from:start + len(nodes)] = h
            if not growing:
                draft = Draft([node.token for node in nodes[1:]],
                              self.states[:, start:start + len(nodes)],
                              [node.confidence for node in nodes[1:]], parents)
                self.last = draft, start, open_from
                return draft
            if open_from:
                x = one_shape(h, start, self.adapter_cache, self.width, parents)
                x = self.adapter(*x)[0, :len(rows)]
            else:
                x = self.adapt(start + 1)
            pool += self.children(x, rows, open_from, start)
            # Best first: of the candidates that there is room for, those that are sure enough are
            # followed further. Second early exit: when none is, the others end the draft. They are
            # chosen already, so they are verified too.
            pool.sort(key=lambda node: -node.product)
            best = pool[:self.nodes + 1 - len(nodes)]
            sure = [node for node in best
                    if node.depth < n_max and node.confidence > self.threshold]
            open_from, pool = len(nodes), [node for node in pool if node not in sure]
            nodes += sure or best
            growing = bool(sure) and len(nodes) <= self.nodes

    def children(self, x, rows, first, start):
        """The candidates that follow the open nodes `rows`, of which node `first` is the first.

        x (T, hidden_size) is what the adapter makes of them.
        """
        drafted = self.choose(x, start + 1, [node.depth for node in rows]).tolist()  # one host sync
        return [Node(int(token), parent, node.depth + 1, p, node.product * p)
                for parent, (node, candidates) in enumerate(zip(rows, drafted), first)
                for token, p in candidates if token >= 0]

    def top(self, probabilities):
        """(T, V) float32 -> the K highest of each row (T, K)."""
        return probabilities.topk(min(self.candidates, probabilities.shape[1])).values

    def keep(self, ids):
        """Keep of the last draft what became part of `ids`: the adapter's rows and exit states."""
        if self.last is None:
            return
        draft, start, adapted = self.last
        path, node = [], 0
        for token in ids[start + 1:]:
            if not (node := draft.child(node, token)):
                break
            path.append(node)
        self.adapter_cache.keep(start, path)
        if path != list(range(1, 1 + len(path))):
            moved = to_device([start + node for node in path], self.states.device)
            self.states[:, start + 1:start + 1 + len(path)] = self.states[:, moved]
        self.seen += sum(node < adapted for node in path)
