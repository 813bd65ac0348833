"""The text of a training: which documents are trained on, which are held out, and how both are
encoded. Nothing of the algorithm."""
import os
import random
from functools import partial
from itertools import islice

from support.chat import find_chat_template
from support.data import (
    Windows,
    batches_of,
    encode,
    every_token,
    most_frequent,
    prompt_of,
    split,
)
from support.errors import require
from support.tokenizer import Tokenizer

COUNTED = 4000  # documents whose tokens are counted: all take minutes, and hardly change the order


class Text:
    """The documents of --data for a model with this config, which its tokenizer completes."""

    def __init__(self, args, config, device):
        self.args, self.tokenizer = args, Tokenizer(args.model, config)
        self.workers = usual_workers(device) if args.workers is None else args.workers
        self.config = config = self.tokenizer.with_ends(config)
        self.chat, self.template = find_chat_template(args.model, args.chat)
        self.encode = partial(encode, tokenizer=self.tokenizer, template=self.template,
                              eos=config.eos_token_ids,
                              max_length=min(args.max_length, config.max_position_embeddings))
        self.documents, self.held = split(args.data, self.template,
                                           args.allow_truncated)
        self.tested = self.held or self.documents[:1]
        examples = [self.encode(document) for document in self.tested[:args.eval_documents]]
        self.held_batches = batches_of(examples, args.batch_tokens)
        require(self.held_batches, f"--max-length {args.max_length}: leaves nothing to learn of "
                f"the {len(self.tested)} held-out documents")
        self.vocabulary, self.coverage = self.choose_vocabulary(args.vocabulary)

    def choose_vocabulary(self, size):
        """(ids (size,), ascending, of the most frequent tokens, their share of the text); None and
        1 if drafts may be any token."""
        if size is None:
            return None, 1.0
        config, n = self.config, min(COUNTED, len(self.documents))
        require(size <= config.vocab_size, f"--vocabulary {size}: must be at most the model's "
                f"vocab_size {config.vocab_size}")
        documents = random.Random(0).sample(self.documents, n)
        encoded = Windows(documents, 1, 0, lambda one: self.encode(*one)).numbered(0, self.workers)
        examples = (example for _, example in islice(encoded, n))
        return most_frequent(examples, size, config.vocab_size, config.eos_token_ids)

    def windows(self, first):
        """Endless: (number, batches) of each window of documents from number `first` on.

        To be learned are answers; with --learn text all tokens that can be drafted.
        """
        args, learned = self.args, self.encode
        if args.learn == "text":
            every = range(self.config.vocab_size)
            wanted = set(every if self.vocabulary is None else self.vocabulary.tolist())
            learned = partial(every_token, encode=self.encode, wanted=wanted)

        def make(documents):  # by the workers: each takes a GPU's time if the trainer does it
            return batches_of(map(learned, documents), args.batch_tokens)

        return Windows(self.documents, args.window, args.seed, make).numbered(first, self.workers)

    def prompts(self):
        """What --eval-prompts held-out documents begin with, encoded; none beyond the context."""
        prompts = (prompt_of(document, self.tokenizer, self.template)
                   for document in self.tested[:self.args.eval_prompts])
        return [ids for ids in prompts if 0 < len(ids) < self.config.max_position_embeddings]

    def note(self):
        """What is to be said of the chat template, if conversations are rendered with it."""
        return self.template.note if any(isinstance(d, list) for d in self.documents) else None

    def describe(self):
        text = f"{len(self.documents)} documents, {len(self.held)} held out"
        if not self.held:
            text += " (too few: figures are of one that is trained on)"
        if self.vocabulary is not None:
            text += (f" · drafts from {len(self.vocabulary)} tokens, {self.coverage:.1%} of the "
                     "text")
        return text


def usual_workers(device):
    """Processes that encode the next windows if --workers does not say: a GPU should not wait for
    them, and one process encodes about as fast as a small model learns."""
    return min(4, os.cpu_count() or 1) if device.type == "cuda" and hasattr(os, "fork") else 0
