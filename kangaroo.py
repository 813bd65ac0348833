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
              the adapter's own cache    the same, but for the last drafted token
    verify    layers ℓ … N−1             all these positions, one pass a round

Read first `generate`, then `KangarooDrafter.draft`; next `llama.py`. Left out on purpose: batches;
draft trees and other methods (`drafters/`); files, text and the command line (`support/`).
"""
import math
import sys
from dataclasses import dataclass, field
from functools import partial

from llama import (
    MLP,
    Attention,
    Linear,
    RMSNorm,
    Rows,
    Sampler,
    find_nonfinite,
    one_shape,
    room_for_draft,
)
from support.errors import UserError

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
        """The child of `node` that proposes `token`; 0 if there is none."""
        edges = enumerate(zip(self.parents, self.tokens), 1)
        return next((i for i, edge in edges if edge == (node, token)), 0)


@dataclass
class Round:
    """What one verification committed: the accepted tokens and, unless one ends the text, one of
    the target's own, which it says where the draft ends or goes wrong."""
    tokens: list
    path: list  # the accepted nodes of the draft, from the top down; path[i] proposed tokens[i]
    draft: Draft

    @property
    def accepted(self):
        """How many of `tokens` were drafted."""
        return len(self.path)


@torch.inference_mode()
def generate(model, drafter, prompt, max_new_tokens, steps=STEPS, sampler=None, eos=(),
             width=WIDTH, cache=None):
    """Yield a Round for every verification, until one of these: `max_new_tokens`; a token of `eos`;
    the end of the context.

    prompt is a list of at least one token id; `steps` is γ, the most tokens drafted in a round (the
    depth of a tree). With any drafter, γ and exit layer the tokens are those of NoDrafter for the
    same width: the target itself chooses every one, the draft decides only how many are checked at
    once. Host syncs: one a round, one a drafted token. UserError if logits or confidences are not
    finite.
    """
    if drafter.width not in (None, width):  # its rows of the cache would have other bits
        raise ValueError(f"the drafter's width is {drafter.width}, generate's is {width}")
    ids, n_layers, sampler = list(prompt), len(model.layers), sampler or Sampler()
    end = min(len(ids) + max_new_tokens, model.config.max_position_embeddings)
    cache = cache or model.new_cache(end + 2 * width)  # a tree's dead rows lie so far beyond
    h = drafter.prefill(ids[:-1], cache)
    h = in_chunks(partial(model.run_layers, first=drafter.depth, last=n_layers), h, cache)
    if len(ids) > 1:
        drafter.observe(h, ids[1:], list(range(1, len(ids) - 1)))
    while len(ids) < end:
        start = len(ids) - 1  # the position of the last committed token, which has not been run yet
        # Near the end of a block of the cache a draft is shorter, or empty: its rows share a view.
        n_max = min(steps, end - len(ids) - 1, room_for_draft(start, width, cache.rows.device))
        draft = drafter.draft(ids, n_max, cache)
        # Verify: the remaining layers, in one pass over the last committed token and all drafted.
        x = ids[-1:] + draft.tokens if draft.hidden is None else draft.hidden
        h = model.step(x, start, cache, width, drafter.depth, n_layers, draft.parents)
        logits = model.logits(h)[0, :len(draft.tokens) + 1]
        choices = sampler.choose(logits, start + 1, draft.levels())  # what it says after each node
        finite = logits.isfinite().all(-1)
        choices, finite = torch.stack((choices, finite)).tolist()  # one host sync
        refuse_nonfinite(all(finite), model, ids, drafter, draft)
        # Accept: from the root down, the child that proposes what the target itself says.
        path, node = [], 0
        while node := draft.child(node, choices[node]):
            path.append(node)
        drafter.observe(h[:, :len(choices)], choices, path)
        # Commit. The cache rows of rejected tokens are overwritten by the next round.
        new = [choices[node] for node in (0, *path)]  # up to the first token that ends the text:
        new = new[:next((i for i, token in enumerate(new) if token in eos), len(new)) + 1]
        cache.keep(start, path)
        ids += new
        yield Round(new, path[:len(new)], draft)
        if new[-1] in eos:
            return


def refuse_nonfinite(finite, model, ids, drafter, draft):
    """UserError naming whose NaN or infinity it is: the target's, whose text would be nonsense, or
    the drafter's, which would draft in vain."""
    why = f"damaged weights, or too large for {model.norm.weight.dtype} (see --dtype)"
    if not finite:
        where = find_nonfinite(model, ids + draft.tokens)
        raise UserError(f"NaN or infinite values come out of {where}: {why}")
    if not all(map(math.isfinite, draft.confidence)):
        raise UserError(f"{drafter.source}: what it drafts with is not finite: {why}")


def in_chunks(run, x, cache):
    """Run a prompt's rows x (1, T, d) from position 0 on, so many at a time; returns (1, T, d)."""
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
    - `width`: the rows of a step that it counts on, which must be `generate`'s; None: any will do;
    - `prefill(ids, cache)`: all prompt tokens but the last -> their states before layer `depth`;
    - `draft(ids, n_max, cache)`: a Draft to follow the committed `ids`, at most n_max tokens deep;
    - `observe(hidden, choices, path)`: after each verification of n drafted tokens, hidden
      (1, 1 + n, hidden_size), the target's last states, before its final norm; choices, what the
      target says after each of these nodes; path, the accepted nodes. Committed are the choices
      of node 0 and of the path. The prompt comes first, as a draft that was accepted whole.

    In `cache` it writes the rows of layers below `depth` alone. See docs/drafters.md.
    """
    depth, width = 0, None
    source = "drafter"  # where its weights come from, for messages

    def __init__(self, model):
        self.model = model

    def prefill(self, ids, cache):
        return self.model.embed(ids)

    def draft(self, ids, n_max, cache):
        return Draft([])

    def observe(self, hidden, choices, path):
        pass


class KangarooDrafter(NoDrafter):
    """Drafts a chain with the first `exit_layer` layers, the adapter and the target's LM head.

    Serves one call of `generate`, and is given its width and its sampler too: the same noise makes
    drafter and target choose alike.
    """

    def __init__(self, model, adapter, exit_layer, threshold=THRESHOLD, sampler=None, width=WIDTH):
        super().__init__(model)
        self.adapter, self.depth, self.threshold = adapter, exit_layer, threshold
        self.sampler, self.width, self.source = sampler or Sampler(), width, adapter.source

    def prefill(self, ids, cache):
        config = self.adapter.config
        self.adapter_cache = self.model.new_cache(cache.length, config)
        self.seen = len(ids)  # the adapter's cache is valid for positions < seen
        # The exit layer's states by position, from which the adapter catches up.
        self.states = self.adapter_cache.rows.new_zeros(1, cache.length, config.hidden_size)
        run_shallow_layers = partial(self.model.run_layers, first=0, last=self.depth)
        h = in_chunks(run_shallow_layers, self.model.embed(ids), cache)
        in_chunks(self.adapter, h, self.adapter_cache)
        return h

    def draft(self, ids, n_max, cache):
        start, tokens, confidence = len(ids) - 1, [], []
        self.seen = min(self.seen, start)  # what the adapter has seen of a rejected draft is void
        while True:
            # The newest token goes to the exit layer even if the draft ends with it, because the
            # verification starts from its state. At first this is the last committed token.
            newest, position = [*ids[-1:], *tokens][-1], start + len(tokens)
            unsure = tokens and confidence[-1] <= self.threshold  # second early exit: the unsure
            if unsure or len(tokens) == n_max:                    # token itself is verified too
                self.run_to_exit(newest, position, cache)
                return Draft(tokens, self.states[:, start:position + 1], confidence)
            token, probability = self.propose(newest, position, cache)
            tokens.append(token)
            confidence.append(probability)

    def propose(self, token, position, cache):
        """The token drafted to follow `token`, and the drafter's top-1 probability there."""
        token, top = self.draft_step(token, position, cache).flatten().tolist()  # one host sync
        return int(token), top

    def draft_step(self, token, position, cache):
        """What `propose` returns, as a tensor (1, 1, 2) float64."""
        self.run_to_exit(token, position, cache)
        return self.choose(self.adapt(position + 1), position + 1)

    def run_to_exit(self, token, position, cache):
        """First early exit: run a token through the shallow layers alone."""
        h = self.model.step([token], position, cache, self.width, 0, self.depth)
        self.states[:, position] = h[:, 0]

    def adapt(self, end):
        """Run the adapter on the positions < end that it has not seen; its state (1, hidden_size)
        at end − 1.

        That is one position; after a draft that was accepted whole two, for nothing was drafted
        from its last token; and one more for a round without a draft.
        """
        while self.seen < end:
            h = self.states[:, self.seen:min(end, self.seen + self.width)]
            x = self.adapter(*one_shape(h, self.seen, self.adapter_cache, self.width))
            self.seen += h.shape[1]
        return x[:, h.shape[1] - 1]

    def choose(self, x, position, depth=None):
        """Adapter states (T, hidden_size) -> (T, K, 2) float64: the K tokens drafted to follow each
        (K = 1, but for a tree), with its K highest probabilities.

        The tokens stand at position + depth[i] (None: + i).
        """
        logits, top = self.predict(x)
        tokens = self.sampler.candidates(logits, position, depth, top.shape[1])
        return torch.stack((tokens.double(), top.double()), -1)

    def predict(self, x):
        """Adapter states (T, hidden_size) -> logits (T, vocab_size), and the top probabilities."""
        logits = (self.adapter.head or self.model.lm_head)(x)
        top = self.top((logits.float() / (self.sampler.temperature or 1)).softmax(-1))
        if self.adapter.vocabulary is not None:
            every = logits.new_full((len(x), self.model.config.vocab_size), -math.inf)
            logits = every.index_copy_(1, self.adapter.vocabulary, logits)
        return logits, top

    def top(self, probabilities):
        """(T, V) float32 -> the highest of each row (T, 1); of a tree's drafter, more of them."""
        return probabilities.max(-1, keepdim=True).values


# --------------------------------------------------------------------------------------------------
# Adapters: what makes sense of the exit layer's states

class Adapter(nn.Module):
    """The paper's: norm → attention → residual → norm, no MLP. The target's own LM head follows."""

    def __init__(self, config):
        super().__init__()
        self.config = config  # a LlamaConfig with num_hidden_layers = 1
        self.source = "adapter"  # where its weights come from, for messages
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = self.vocabulary = None  # see draft_from

    def forward(self, x, positions, cache=None):
        """Exit-layer states x (B, T, hidden_size) at positions (T,) -> what the LM head reads."""
        rows = Rows.at(self.config, positions, x, cache)
        return self.norm(x + self.self_attn(self.input_layernorm(x), rows, cache))

    def draft_from(self, vocabulary, lm_head):
        """Draft from the token ids `vocabulary` (N,) alone: a cheaper step, a smaller LM head."""
        self.vocabulary = vocabulary
        self.head = Linear(lm_head.weight.shape[1], head=len(vocabulary))
        self.head.weight = nn.Parameter(lm_head.weight[vocabulary], requires_grad=False)


class LayerAdapter(Adapter):
    """The same with an MLP after the attention: one full layer of a Llama."""

    def __init__(self, config):
        super().__init__(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, positions, cache=None):
        rows = Rows.at(self.config, positions, x, cache)
        x = x + self.self_attn(self.input_layernorm(x), rows, cache)
        return self.norm(x + self.mlp(self.post_attention_layernorm(x)))


# By the name in an adapter's config.json. The first is the paper's.
ADAPTERS = {"attention": Adapter, "layer": LayerAdapter}


if __name__ == "__main__":
    from support.command_line import main
    sys.exit(main())
