"""Speculative sampling with a separate draft model (Leviathan et al. 2023; Chen et al. 2023).

A second, smaller Llama with the same tokenizer writes γ tokens one by one, and the target verifies
them in one step. The papers accept a token with probability min(1, p / q). Here it is accepted if
it equals the target's own choice, as with every drafter: both choose with the noise of the token's
position, so they tend to agree, and the text is vanilla's.

State between rounds: the draft model's own KV cache, and how many positions of it are valid: a
rejected draft makes them fewer, and that is the whole rollback. After a draft that was accepted
whole its last token, which was chosen but not run, is run together with the target's own. Rows of a
step: the last committed token and the drafted ones. A drafted token costs a step of the draft
model, of one shape too, so a draft does not depend on what was rejected before it. Needs: the draft
model. Its vocabulary may be padded to another size.
"""
import math
from functools import partial
from pathlib import Path

from drafters.method import Method
from kangaroo import STEPS, Draft, NoDrafter, in_chunks
from support.checkpoint import load_llama, read_config
from support.errors import require
from support.files import require_folder
from support.tokenizer import Tokenizer, difference

import torch.nn.functional as F

SPS_THRESHOLD = 0.0  # the papers draft γ tokens, however unsure


class SpsDrafter(Method, NoDrafter):
    """Drafts a chain with `draft_model`, up to the first token whose top-1 probability is at or
    below `threshold`: at 0 none is."""
    grid = [{"width": width, "steps": width - 1, "threshold": threshold}
            for width in (4, 8) for threshold in (0.0, 0.3, 0.5)]

    def __init__(self, model, draft_model, threshold=SPS_THRESHOLD):
        super().__init__(model)
        self.draft_model, self.threshold = draft_model, threshold
        self.source = getattr(draft_model, "source", "draft model")

    @classmethod
    def usual(cls, decoder):
        return {"steps": STEPS, "threshold": SPS_THRESHOLD}

    @classmethod
    def make(cls, decoder, settings):
        return cls(decoder.model, decoder.draft_model, settings.threshold)

    @classmethod
    def load(cls, path, decoder):
        """UserError unless it has the target's tokenizer: what it says in other tokens, the target
        would never accept."""
        require_folder(path, "--draft-model", "that of a small model")
        config = read_config(path)
        what = difference(decoder.tokenizer, Tokenizer(path, config))
        require(not what, f"{path}: has another tokenizer than {decoder.folder} ({what}), "
                "--draft-model wants a model with the same")
        model = load_llama(path, decoder.device, decoder.dtype, config)
        model.source = str(path)
        return model

    @classmethod
    def describe(cls, decoder, settings):
        return (f"sps with {Path(decoder.draft_model.source).name}, γ {settings.steps}, "
                f"η {settings.threshold:g}")

    def prefill(self, ids, cache, sampler):
        self.cache = self.draft_model.new_cache(cache.length, cache.width)
        self.sampler = sampler
        self.seen = len(ids)  # the cache is valid for positions < seen
        run = partial(self.draft_model.run_layers, first=0, last=len(self.draft_model.layers))
        in_chunks(run, self.read(ids), self.cache)
        return super().prefill(ids, cache, sampler)

    def draft(self, ids, n_max, cache):
        self.seen = min(self.seen, len(ids) - 1)  # what was run of a rejected draft is void
        n_max = min(n_max, self.draft_model.config.max_position_embeddings - len(ids))
        tokens, confidence = [], []
        for _ in range(n_max):
            token, sure = self.propose(ids + tokens)
            tokens.append(token)
            confidence.append(sure)
            if sure <= self.threshold:
                break
        return Draft(tokens, confidence=confidence)

    def propose(self, ids):
        """The token to follow `ids`, and the top-1 probability there: one host sync."""
        [[drafted]] = self.sampler.draw(self.catch_up(ids), len(ids))
        return drafted

    def catch_up(self, ids):
        """Run the draft model on those of `ids` that it has not seen; logits of what follows.

        That is one token, or two after a draft that was accepted whole, or more where there was no
        room to draft. A step ends where its rows would no longer share a view: so each has the bits
        that it has alone. Returns (1, vocab_size), of the target's vocabulary.
        """
        while self.seen < len(ids):
            new = ids[self.seen:self.seen + 1 + self.cache.room(self.seen)]
            h = self.draft_model.step(self.read(new), self.seen, self.cache, 0,
                                      len(self.draft_model.layers))
            self.seen += len(new)
        logits = self.draft_model.logits(h)[0, len(new) - 1:len(new)]
        # Of padded vocabularies: cuts off what only the draft model has, fills up what it has not.
        more = self.model.config.vocab_size - logits.shape[1]
        return F.pad(logits, (0, more), value=-math.inf)

    def read(self, ids):
        """The draft model's embedding of ids. Padding that it has not is its last id."""
        last = self.draft_model.config.vocab_size - 1
        return self.draft_model.embed([min(i, last) for i in ids])
