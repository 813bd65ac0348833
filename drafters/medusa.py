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
from pathlib import Path

from drafters.adapters import PartialHead
from drafters.method import Method
from kangaroo import Draft, NoDrafter
from llama import Linear
from support.checkpoint import (
    build,
    file_entries,
    first_of,
    load_weights,
    refuse_misfit,
    vocabulary_ids,
)
from support.errors import require
from support.files import read_json
from support.limits import CHAIN_WIDTH, TREE_WIDTH

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
    def __init__(self, shape):
        super().__init__()
        heads, blocks, size, vocab_size = shape  # vocab_size 0: the target's LM head projects
        self.heads = nn.ModuleList(nn.Sequential(*(Block(size) for _ in range(blocks)))
                                   for _ in range(heads))
        for head in self.heads if vocab_size else ():
            head.append(Linear(size, **{str(blocks): vocab_size}))
        self.own, self.tree, self.source = bool(vocab_size), TREE, "heads"
        self.head = None  # a PartialHead that projects in the place of the target's LM head

    def forward(self, x, n, lm_head):
        """The target's normed state x (1, hidden_size) -> what the first n heads say, (n, V)."""
        x = torch.cat([head(x) for head in self.heads[:n]])
        return x if self.own else (self.head or lm_head)(x)


class MedusaDrafter(Method, NoDrafter):
    """Drafts each head's first choice; with `tree`, its paths of choices, at most width − 1 nodes.
    """
    grid = [{"width": width, "steps": width - 1} for width in (2, 3, 4)]

    def __init__(self, model, heads, tree=None):
        super().__init__(model)
        self.heads, self.source = heads, heads.source
        chain = [(0,) * (k + 1) for k in range(len(heads.heads))]
        self.tree = [tuple(path) for path in tree or chain if len(path) <= len(chain)]

    @classmethod
    def usual(cls, decoder):
        return {"steps": len(decoder.heads.heads)}

    @classmethod
    def usual_width(cls, decoder, asked):
        return 1 + len(decoder.heads.heads)

    @classmethod
    def make(cls, decoder, settings):
        return cls(decoder.model, decoder.heads)

    @classmethod
    def load(cls, path, decoder):
        return load_heads(path, decoder.model)

    @classmethod
    def describe(cls, decoder, settings):
        return f"medusa, {len(decoder.heads.heads)} heads, γ {settings.steps}"

    @classmethod
    def advise(cls, decoder):
        return f"check that the heads {decoder.heads.source} are trained, for this model"

    def prefill(self, ids, cache, sampler):
        self.state, self.sampler = None, sampler
        return super().prefill(ids, cache, sampler)

    def observe(self, hidden, choices, path):
        last = path[-1] if path else 0  # the last token that was run and is committed
        self.state = self.model.norm(hidden[0, last:last + 1])

    def draft(self, ids, n_max, cache):
        tokens, confidence, parents, nodes = [], [], [], {(): 0}
        choices = self.choices(len(ids), n_max)
        for path in self.tree[:cache.width - 1]:
            if len(path) <= len(choices) and path[:-1] in nodes:
                of_head = choices[len(path) - 1]
                if path[-1] < len(of_head):  # top-k and top-p may leave fewer
                    token, p = of_head[path[-1]]
                    nodes[path] = len(nodes)
                    tokens.append(token)
                    confidence.append(p)
                    parents.append(nodes[path[:-1]])
        return Draft(tokens, None, confidence, parents)

    def choices(self, position, n):
        """Of each of the first n heads the likeliest (token, probability), the first one's token to
        stand at `position`. The noise is that of where a token will stand. Host syncs: one."""
        if self.state is None or not n:
            return []  # nothing has been run yet: the prompt was one token
        logits = self.heads(self.state, n, self.model.lm_head)
        return self.sampler.draw(logits, position, k=1 + max(map(max, self.tree)))


class MedusaTreeDrafter(MedusaDrafter):
    """Drafts the tree of choices that the heads' folder names, its first `nodes` nodes."""
    grid = [{"width": width, "nodes": width - 1} for width in (9, 12, 16)]

    @classmethod
    def usual(cls, decoder):
        return super().usual(decoder) | {"nodes": len(decoder.heads.tree)}

    @classmethod
    def usual_width(cls, decoder, asked):
        return max(CHAIN_WIDTH, asked.get("nodes", TREE_WIDTH - 1)) + 1

    @classmethod
    def drafts_trees(cls, width):
        return True

    @classmethod
    def make(cls, decoder, settings):
        return cls(decoder.model, decoder.heads, decoder.heads.tree[:settings.nodes])

    @classmethod
    def describe(cls, decoder, settings):
        return super().describe(decoder, settings) + f", tree of {settings.nodes} nodes"


# --------------------------------------------------------------------------------------------------
# Folders

HEADS_FILES = "medusa_lm_head.safetensors", "medusa_lm_head.pt"


def load_heads(folder, model):
    """The heads in a folder, for this target: config.json, and one of HEADS_FILES.

    They are as many as the file has: a published config.json may count fewer. Without projections
    of their own they use the target's LM head, or the rows of it that `vocabulary` lists.
    """
    folder = Path(folder)
    path, data, entries = heads_files(folder)
    refuse_misfit(folder, model.config, data, model)
    vocabulary, size = entries.pop("vocabulary", None), model.config.hidden_size
    theirs = [*entries["0.0.linear.weight"][0]][-1] if "0.0.linear.weight" in entries else size
    require(theirs == size, f"{path}: the heads have hidden_size = {theirs}, the model {size}")
    blocks = data["medusa_num_layers"]
    n = max(data["medusa_num_heads"], len({name.split(".")[0] for name in entries}))
    own = model.config.vocab_size if f"0.{blocks}.weight" in entries else 0
    require(not own or not vocabulary,
            f"{path}: holds projections, which have no use for `vocabulary`")
    weight = model.norm.weight
    heads = build(Heads, (n, blocks, size, own), weight.device, weight.dtype)
    load_weights(heads, {f"heads.{name}": entry for name, entry in entries.items()}, path)
    if vocabulary:
        heads.head = PartialHead(model.lm_head, vocabulary_ids(folder, vocabulary[1](), model))
    heads.tree = tree_of(folder / "config.json", data.get("medusa_choices", TREE))
    heads.source, heads.facts = str(folder), data
    return heads.eval()


def heads_files(folder):
    """(path of the weights, config.json as a dict, {name: (shape, function that reads)})."""
    path = first_of(folder, HEADS_FILES)
    require(path, f"{folder}: --drafter medusa wants a folder with config.json and "
            f"{' or '.join(HEADS_FILES)}")
    where = folder / "config.json"
    data = {"medusa_num_layers": 1} | read_json(where)
    for name in ("medusa_num_heads", "medusa_num_layers"):
        require(isinstance(data.get(name), int) and data[name] >= 1,
                f"{where}: {name} = {data.get(name)!r}, must be an integer of at least 1")
    return path, data, file_entries(path, {})


def tree_of(where, paths):
    """The tree that a config.json names, checked: paths of choices, each one's parent before it."""
    seen = {()}
    for path in paths if isinstance(paths, (list, tuple)) else [None]:
        require(path and isinstance(path, (list, tuple))
                and all(isinstance(i, int) and i >= 0 for i in path)
                and tuple(path[:-1]) in seen and tuple(path) not in seen,
                f"{where}: medusa_choices must be a list of paths such as [0, 1], each after the "
                f"path without its last choice, {path!r} is not")
        seen.add(tuple(path))
    return [tuple(path) for path in paths]
