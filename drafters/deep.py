"""Kangaroo with an adapter that also reads the target's last state. Not the paper's: beside it.

A verification leaves the target's last states of the committed tokens behind, and they know more
than the exit layer's. So the adapter is given, at position t, the exit layer's state there and the
last state of the newest token that has been verified, with how many tokens back that lies:

    t = the last committed token's    the last state of t − 1, 1 back
    t = the first drafted token's     the same one, which is now 2 back
    t = the second drafted token's    the same one, 3 back   …

One linear map of these two is added to the exit state, and then all is as in `LayerAdapter`. The
map begins as zero, so training may begin from such an adapter.

State between rounds: that of the chain, and the target's last states of all committed tokens. A
drafted token's row of the adapter's cache is void even if the token was accepted: it is run again,
now 1 back, in one step with the last committed token, so that a draft follows from the committed
ids alone, and a round has no step more. Needs: an adapter trained with `--architecture deep`. Left
out on purpose: trees.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from kangaroo import WIDTH, KangarooDrafter, LayerAdapter, in_chunks
from llama import Linear, Rows, one_shape

BACK = WIDTH - 1  # so many tokens back are told apart; further ones count as the last of them


def inputs(states, before, positions, committed):
    """What the adapter reads at positions (T,): (B, T, 2 hidden_size + BACK).

    states (B, T, hidden_size): the exit layer's there. before (B, S, hidden_size): in row t the
    target's last state of the token before t, normed; zeros in row 0. committed (T,): for each
    position that of the last committed token, at or before it, whose own last state is not known.
    """
    back = (positions - committed).clamp(max=BACK - 1)  # 0 is 1 back
    flags = back[:, None] == torch.arange(BACK, device=back.device)
    flags = flags.to(states.dtype).expand(len(states), -1, -1)
    return torch.cat((states, before[:, committed], flags), -1)


class DeepDrafter(KangarooDrafter):
    """Drafts a chain, as Kangaroo does. Serves one call of `generate`."""

    def prefill(self, ids, cache):
        config = self.adapter.config
        self.adapter_cache = self.model.new_cache(cache.length, config)
        self.states = self.adapter_cache.rows.new_zeros(1, cache.length, config.hidden_size)
        self.before = torch.zeros_like(self.states)  # see `inputs`
        self.seen = self.known = 0  # the last states of positions < known are in `before`
        run_shallow_layers = partial(self.model.run_layers, first=0, last=self.depth)
        h = in_chunks(run_shallow_layers, self.model.embed(ids), cache)
        self.states[:, :len(ids)] = h
        return h

    def observe(self, hidden, choices, path):
        prompt, n = self.known == 0, 1 + len(path)
        self.seen = min(self.seen, self.known + 1)  # the rows after it were more than 1 back
        self.before[:, self.known + 1:self.known + 1 + n] = self.model.norm(hidden[:, :n])
        self.known += n
        if prompt:
            in_chunks(self.adapter, self.read(0, n), self.adapter_cache)
            self.seen = n

    def adapt(self, end):
        while self.seen < end:
            x = self.read(self.seen, min(end, self.seen + self.width))
            n = x.shape[1]
            x = self.adapter(*one_shape(x, self.seen, self.adapter_cache, self.width))
            self.seen += n
        return x[:, n - 1]

    def read(self, start, end):
        """What the adapter reads at the positions start … end − 1."""
        positions = torch.arange(start, end, device=self.states.device)
        return inputs(self.states[:, start:end], self.before, positions,
                      positions.clamp(max=self.known))


class DeepAdapter(LayerAdapter):
    """One full layer of a Llama, on the exit layer's states and a linear map of the rest."""
    drafter = DeepDrafter

    def __init__(self, config):
        super().__init__(config)
        self.last_proj = Linear(config.hidden_size + BACK, last_proj=config.hidden_size)

    def forward(self, x, positions, cache=None, mask=None):
        """x as `inputs` gives it; mask (T, T), for training: 0 where a row sees another, else −inf.
        """
        x, more = x.tensor_split((self.config.hidden_size,), -1)
        x = x + self.last_proj(more)
        rows = Rows.at(self.config, positions, x, cache)
        rows = rows if mask is None else rows._replace(mask=mask)
        x = x + self.self_attn(self.input_layernorm(x), rows, cache)
        return self.norm(x + self.mlp(self.post_attention_layernorm(x)))


# --------------------------------------------------------------------------------------------------
# Training: each position as decoding meets it, in one pass

def round_starts(n, seed):
    """Positions 0 … n − 1 cut into rounds of 1 … BACK at random: (n,), where each one's begins."""
    lengths = torch.randint(1, BACK + 1, (n,), generator=torch.Generator().manual_seed(seed))
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)[:n]


def committed_and_drafted(states, last, start):
    """Each position twice, as the last committed one and as one drafted in the round from `start`.

    states and last (B, T, hidden_size): the exit layer's and the target's last ones, normed. start
    (T,). Returns the adapter's x (B, 2 T, …), positions (2 T,) and mask (2 T, 2 T), and which
    positions (T,) are drafted: where a round begins, the second row is that of the first again.
    """
    own = torch.arange(len(start), device=start.device)
    positions, committed = torch.cat((own, own)), torch.cat((own, start))
    before = F.pad(last, (0, 0, 1, -1))
    x, drafted = inputs(torch.cat((states, states), 1), before, positions, committed), own > start
    # A row sees committed rows up to where its round begins, and then the drafted ones before it.
    mine = (start == start[:, None]) & (own <= own[:, None]) & drafted
    seen = torch.cat((torch.zeros_like(mine), mine))
    seen = torch.cat((own <= committed[:, None], seen), 1)
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -math.inf)
    return x, positions, mask, drafted
