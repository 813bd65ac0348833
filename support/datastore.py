"""The datastore of drafters/rest.py on disk: text files -> token ids -> one safetensors file.

    python drafters/rest.py --model DIR --data FILE --out store.safetensors

    make: documents -> ids, END behind each -> order of the suffixes -> write     read: -> Datastore

Nothing of the algorithm. Left out on purpose: documents that are held out of training, for a
drafter is measured on these.
"""
import argparse
import sys
import time
from array import array
from pathlib import Path

from drafters.rest import END, Datastore, suffix_order
from support.chat import find_chat_template
from support.checkpoint import read_config, safetensors_entries, write_safetensors
from support.data import encode, split
from support.errors import UserError
from support.program import Parser, run_program
from support.tokenizer import Tokenizer, vocabulary_digest

import torch
from safetensors import safe_open

MAKE_ONE = "make one with python drafters/rest.py"


def write_datastore(path, tokens, order, tokenizer):
    write_safetensors(path, {"tokens": tokens, "order": order},
                      {"tokenizer": vocabulary_digest(tokenizer),
                       "vocabulary": str(len(tokenizer.vocabulary()))})


def read_datastore(path, tokenizer, vocab_size):
    """A Datastore from its file; UserError if it is none, or one of another tokenizer."""
    entries = safetensors_entries(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata() or {}
    if set(entries) != {"tokens", "order"} or not {"tokenizer", "vocabulary"} <= set(facts):
        raise UserError(f"{path}: is no datastore, {MAKE_ONE}")
    size, made_with = len(tokenizer.vocabulary()), facts["tokenizer"]
    if made_with != vocabulary_digest(tokenizer):
        raise UserError(f"{path}: made with another tokenizer (of {facts['vocabulary']} tokens, "
                        f"digest {made_with}) than the model's (of {size} tokens, digest "
                        f"{vocabulary_digest(tokenizer)}), {MAKE_ONE}")
    tokens, order = (entries[name][1]() for name in ("tokens", "order"))
    for name, t, least, end in (("tokens", tokens, END, vocab_size),
                                ("order", order, 0, tokens.numel())):
        if t.dtype != torch.int32 or t.shape != tokens.shape or t.dim() != 1 or not len(t) or (
                t.min() < least or t.max() >= end):
            raise UserError(f"{path}: damaged, {name} must be as many int32 as there are tokens, "
                            f"from {least} to {end - 1}; {MAKE_ONE}")
    return Datastore(tokens, order, str(path))


def joined(documents):
    """Lists of token ids -> tokens (n,) int32, with END behind each document."""
    tokens = array("i")
    for ids in documents:
        tokens.extend(ids)
        tokens.append(END)
    return torch.frombuffer(tokens, dtype=torch.int32)


def parse_arguments(argv):
    parser = Parser(prog="rest.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", required=True, type=Path, help="a folder, for its tokenizer")
    option("--data", required=True, nargs="+", type=Path,
           help="files as train_adapter.py takes them: JSON, JSONL or text, also as .gz")
    option("--out", required=True, type=Path, help="the datastore's file")
    option("--chat", help="chat template of conversations (default: the model folder's, or none)")
    args = parser.parse_args(argv)
    if not args.out.absolute().parent.is_dir() or args.out.is_dir():
        raise UserError(f"--out {args.out}: must be a file, in a folder that exists")
    return args


def make(args):
    begin, config = time.perf_counter(), read_config(args.model)
    tokenizer = Tokenizer(args.model, config)
    config = tokenizer.with_ends(config)
    _, template = find_chat_template(args.model, args.chat)
    documents, _ = split(args.data)
    tokens = joined(encode(document, tokenizer, template, config.eos_token_ids, sys.maxsize)[0]
                    for document in documents)
    read = time.perf_counter()
    order = suffix_order(tokens)
    write_datastore(args.out, tokens, order, tokenizer)
    print(f"{args.out}: {len(documents)} documents, {len(tokens) - len(documents)} tokens, "
          f"{args.out.stat().st_size / 1e6:.0f} MB; text to ids {read - begin:.0f} s, order "
          f"{time.perf_counter() - read:.0f} s")


def main(argv=None):
    return run_program("rest.py", lambda: make(parse_arguments(argv)))
