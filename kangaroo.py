"""Kangaroo: lossless self-speculative decoding with two early exits (Liu et al., NeurIPS 2024).

    prompt ids -> prefill -> (draft -> verify -> commit)* -> ids

The first ℓ layers of the model (the target), a small adapter and the model's own LM head draft
tokens one by one (first early exit); drafting stops as soon as the draft is unsure (second early
exit). The remaining layers then verify all drafted tokens in one pass that resumes from the hidden
states which the first ℓ layers have already computed. Paper: arXiv 2404.18911.

The output equals vanilla decoding bit for bit, greedy and sampled: see `one_shape` and `Sampler` in
`llama.py`.

**One fact carries all state: `ids`, the committed tokens.** Between rounds every cache is valid for
the positions 0 … len(ids) − 2; the last committed token has not been run yet. (The adapter's may
lag behind, and catches up: `adapt`.) Rows are addressed by position, a row sees the positions up to
its own, and the next round writes the same positions again. So a rejected draft needs no undoing.
Who writes what:

    prefill   layers 0 … N−1, adapter    all positions of the prompt but the last, once
    draft     layers 0 … ℓ−1             one position a step, from the last committed token on
              the adapter's own cache    these positions but the last drafted token's
    verify    layers ℓ … N−1             all these positions, one pass a round

Read first `generate`, then `KangarooDrafter.draft`; next `llama.py`. Left out on purpose: batches;
draft trees and other methods (`drafters/`); files, text and the command line (`support/`).
"""
import sys

if __name__ == "__main__":  # as a program; here, because importing PyTorch takes a second
    from support.start import main
    sys.exit(main())

import math
from dataclasses import dataclass, field, replace
from functools import partial

from llama import Attention, RMSNorm, Rows, Sampler, one_shape
from support.errors import UserError, require
from support.limits import CHAIN_WIDTH

import torch
import torch.nn as nn

# The paper's γ and η, and the rows of a step: the last committed token and up to 7 drafted ones.
STEPS, THRESHOLD, WIDTH = 6, 0.6, 8
PREFILL_ROWS = 256  # rows of a prompt that run at once


# --------------------------------------------------------------------------------------------------
# The loop: draft, verify, commit

@dataclass
class Draft:
    """n proposed tokens. Node 0 is the last committed token; node i > 0 proposes tokens[i − 1].

    In a chain the parent of each node is the one before; in a tree, any one before.
    """
    tokens: list  # n ids
    # (1, 1 + n, hidden_size): the nodes' states before layer `drafter.depth`; at 0 not needed
    hidden: torch.Tensor = None
    confidence: list = field(default_factory=list)  # how sure it was of each; n numbers, or none
    parents: list = None  # of the nodes 1 … n; None: a chain

    def __post_init__(self):
        self.parents = list(range(len(self.tokens))) if self.parents is None else self.parents

    def levels(self):
        """How many steps below the root each of the n + 1 nodes is."""
        levels = [0]
        for parent in self.parents:
            levels.append(levels[parent] + 1)
        return levels

    def child(self, node, token):
        """The child of `node` that proposes `token`, or None.

        With tokens [7, 8, 9] and parents [0, 0, 2]: child(0, 8) is 2, child(2, 9) is 3, child(1, 9)
        is None.
        """
        edges = enumerate(zip(self.parents, self.tokens), 1)
        return next((i for i, edge in edges if edge == (node, token)), None)

    def refuse_unless_fit(self, n_max, cache, depth):
        """UserError for what a step could not verify: then the drafter is at fault."""
        n, parents, width = len(self.tokens), self.parents, cache.width
        require(len(parents) == n and all(0 <= p < i for i, p in enumerate(parents, 1)),
                f"a draft's parents must come before their children, {parents} do not")
        require(n < width and max(self.levels()) <= n_max,
                f"a draft of {n} tokens, {max(self.levels())} levels deep, where there is room for "
                f"{width - 1} tokens, {n_max} levels deep")
        require(width > CHAIN_WIDTH or parents == list(range(n)),
                f"a draft tree at width {width}: needs a width above {CHAIN_WIDTH}")
        require(self.hidden is not None or not depth, f"a draft needs its states at depth {depth}")


@dataclass
class Round:
    """What one verification committed: the accepted tokens and, unless one ends the text, one of
    the target's own, which it says where the draft ends or goes wrong."""
    tokens: list
    path: list  # the accepted nodes of the draft, from the top down; path[i] proposed tokens[i]
    draft: Draft  # without its states, whose memory the next round writes to

    @property
    def accepted(self):
        """How many of `tokens` were drafted."""
        return len(self.path)


class NotFinite(UserError):
    """The target's logits hold NaN or infinity. `ids`: the tokens that it read."""

    def __init__(self, ids, dtype):
        super().__init__(f"NaN or infinite logits: damaged weights, or too large for {dtype}")
        self.ids = ids


@torch.inference_mode()
def generate(model, drafter, prompt, max_new_tokens, steps=STEPS, sampler=None, eos=(),
             width=WIDTH, cache=None):
    """Yield a Round for every verification, until one of these: `max_new_tokens`; a token of `eos`;
    the end of the context.

    prompt is a list of at least one token id; `steps` is γ, the most tokens drafted in a round (the
    depth of a tree); `width` is how many rows a step has (of `cache`, if one is given, its own).
    With any drafter, γ and exit layer the tokens are those of NoDrafter for the same width: the
    target itself chooses every one, the draft decides only how many are checked at once. Host
    syncs: one a round, one a drafted token. UserError for a prompt or a draft that does not fit,
    and if logits or confidences are not finite.
    """
    ids, n_layers, sampler = list(prompt), len(model.layers), sampler or Sampler()
    context, dtype = model.config.max_position_embeddings, model.norm.weight.dtype
    require(0 < len(ids) < context, f"a prompt of {len(ids)} tokens: must have from 1 to "
            f"{context - 1}, for the context is {context}")
    end = min(len(ids) + max_new_tokens, context)
    cache = cache or model.new_cache(end + 2 * width, width)  # a tree's dead rows lie so far beyond
    h = drafter.prefill(ids[:-1], cache, sampler)
    h = in_chunks(partial(model.run_layers, first=drafter.depth, last=n_layers), h, cache)
    if len(ids) > 1:
        drafter.observe(h, ids[1:], list(range(1, len(ids) - 1)))
    while len(ids) < end:
        start = len(ids) - 1  # the position of the last committed token, which has not been run yet
        # Near the end of a block of the cache a draft is shorter, or empty: its rows share a view.
        n_max = min(steps, end - len(ids) - 1, cache.room(start))
        draft = drafter.draft(ids, n_max, cache)
        draft.refuse_unless_fit(n_max, cache, drafter.depth)
        # Verify: the remaining layers, in one pass over the last committed token and all drafted.
        x = ids[-1:] + draft.tokens if draft.hidden is None else draft.hidden
        h = model.step(x, start, cache, drafter.depth, n_layers, draft.parents)
        logits = model.logits(h)[0, :len(draft.tokens) + 1]
        # What it says after each node, and whether it is finite there: one host sync.
        choices, finite = sampler.judge(logits, start + 1, draft.levels()).tolist()
        if not all(finite):
            raise NotFinite(ids + draft.tokens, dtype)
        if not all(map(math.isfinite, draft.confidence)):
            raise UserError(f"{drafter.source}: what it drafts with is not finite: damaged "
                            f"weights, or too large for {dtype}")
        # Accept: from the root down, the child that proposes what the target itself says. In a
        # chain that is the longest prefix of the draft that equals the target's choices.
        path, node = [], 0
        while (node := draft.child(node, choices[node])) is not None:
            path.append(node)
        drafter.observe(h[:, :len(choices)], choices, path)
        # Commit. The cache rows of rejected tokens are overwritten by the next round.
        new = cut_at_end([choices[node] for node in (0, *path)], eos)
        cache.keep(start, path)
        ids += new
        yield Round(new, path[:len(new)], replace(draft, hidden=None))
        if new[-1] in eos:
            return


def cut_at_end(tokens, eos):
    """`tokens` up to the first one that ends the text, itself included."""
    end = next((i for i, token in enumerate(tokens) if token in eos), len(tokens))
    return tokens[:end + 1]


def in_chunks(run, x, cache):
    """Run a prompt's rows x (1, T, d) from position 0 on, PREFILL_ROWS at a time; (1, T, d)."""
    chunks = []
    for start in range(0, x.shape[1], PREFILL_ROWS):
        chunk = x[:, start:start + PREFILL_ROWS]
        end = start + chunk.shape[1]
        chunks.append(run(chunk, torch.arange(start, end, device=x.device), cache.view(end)))
    return torch.cat(chunks, dim=1) if chunks else x


# --------------------------------------------------------------------------------------------------
# Drafters: one that proposes nothing, and Kangaroo

class NoDrafter:
    """Proposes nothing, which makes `generate` vanilla decoding. What a drafter is:

    - `depth`: how many of the target's layers it has run on the states that it hands over;
    - `prefill(ids, cache, sampler)`: a new text. All prompt tokens but the last -> their states
      before layer `depth`. The sampler is the one that the target chooses with;
    - `draft(ids, n_max, cache)`: a Draft to follow the committed `ids`, at most n_max tokens deep;
    - `observe(hidden, choices, path)`: after each verification of n drafted tokens, hidden
      (1, 1 + n, hidden_size), the target's last states, before its final norm; choices, what the
      target says after each of these nodes; path, the accepted nodes. Committed are the choices
      of node 0 and of the path. The prompt comes first, as a draft that was accepted whole.

    In `cache` it writes the rows of layers below `depth` alone. What the command line wants to know
    of it besides is in drafters/method.py.
    """
    depth = 0
    source = "drafter"  # where its weights come from, for messages

    def __init__(self, model):
        self.model = model

    def prefill(self, ids, cache, sampler):
        return self.model.embed(ids)

    def draft(self, ids, n_max, cache):
        return Draft([])

    def observe(self, hidden, choices, path):
        pass


class KangarooDrafter(NoDrafter):
    """Drafts a chain with the first `exit_layer` layers, the adapter and the target's LM head.

    In the place of that one there may be `head`, which knows fewer tokens.

    It has the sampler of the text: the same noise makes drafter and target choose alike.
    """

    def __init__(self, model, adapter, exit_layer, threshold=THRESHOLD, head=None):
        super().__init__(model)
        self.adapter, self.depth, self.threshold = adapter, exit_layer, threshold
        self.head, self.source = head or model.lm_head, adapter.source

    def prefill(self, ids, cache, sampler):
        config, self.sampler = self.adapter.config, sampler
        self.adapter_cache = self.model.new_cache(cache.length, cache.width, config)
        self.seen = len(ids)  # the adapter's cache is valid for positions < seen
        # The exit layer's states by position, from which the adapter catches up.
        self.states = self.adapter_cache.rows.new_zeros(1, cache.length, config.hidden_size)
        run_shallow_layers = partial(self.model.run_layers, first=0, last=self.depth)
        h = in_chunks(run_shallow_layers, self.model.embed(ids), cache)
        in_chunks(self.adapter, h, self.adapter_cache)
        return h

    def draft(self, ids, n_max, cache):
        start, token, tokens, confidence = len(ids) - 1, ids[-1], [], []
        self.seen = min(self.seen, start)  # what the adapter has seen of a rejected draft is void
        for position in range(start, start + n_max):
            token, sure = self.propose(token, position, cache)
            tokens.append(token)
            confidence.append(sure)
            if sure <= self.threshold:  # second early exit; the unsure token is verified too
                break
        # The newest token goes to the exit layer too: the verification starts from its state.
        self.run_to_exit(token, start + len(tokens), cache)
        return Draft(tokens, self.states[:, start:start + len(tokens) + 1], confidence)

    def propose(self, token, position, cache):
        """The token drafted to follow `token`, and the top-1 probability there: one host sync."""
        self.run_to_exit(token, position, cache)
        logits = self.head(self.adapt(position + 1))
        [[drafted]] = self.sampler.draw(logits, position + 1)
        return drafted

    def run_to_exit(self, token, position, cache):
        """First early exit: run a token through the shallow layers alone."""
        h = self.model.step([token], position, cache, 0, self.depth)
        self.states[:, position] = h[:, 0]

    def adapt(self, end):
        """Run the adapter on the positions < end that it has not seen; its state (1, hidden_size)
        at end − 1.

        That is one position; after a draft that was accepted whole two, for nothing was drafted
        from its last token; and one more for a round without a draft.
        """
        while self.seen < end:
            h = self.states[:, self.seen:min(end, self.seen + self.adapter_cache.width)]
            x = self.adapter(*one_shape(h, self.seen, self.adapter_cache))
            self.seen += h.shape[1]
        return x[:, h.shape[1] - 1]


# --------------------------------------------------------------------------------------------------
# The adapter: what makes sense of the exit layer's states

class Adapter(nn.Module):
    """The paper's: norm → attention → residual → norm, no MLP. The target's own LM head follows.

    Others, and how they are read from a folder, are in drafters/adapters.py.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config  # a LlamaConfig with num_hidden_layers = 1
        self.source = "adapter"  # where its weights come from, for messages
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, positions, cache=None):
        """Exit-layer states x (B, T, hidden_size) at positions (T,) -> what the LM head reads."""
        rows = Rows.at(self.config, positions, x, cache)
        return self.norm(x + self.self_attn(self.input_layernorm(x), rows, cache))
