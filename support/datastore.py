"""The datastore of drafters/rest.py on disk: text files -> token ids -> one safetensors file.

    python drafters/rest.py --model DIR --data FILE --out store.safetensors

    documents -> ids, END behind each -> order of the suffixes -> write

Nothing of the algorithm. Left out on purpose: documents that are held out of training, for a
drafter is measured on these.
"""
import argparse
import sys
import time
from array import array
from pathlib import Path

from drafters.rest import END, suffix_order
from support.chat import find_chat_template
from support.checkpoint import read_config, write_safetensors
from support.data import encode, split
from support.errors import UserError
from support.program import Parser, run_program
from support.tokenizer import Tokenizer, vocabulary_digest

import torch


def write_datastore(path, tokens, order, tokenizer):
    write_safetensors(path, {"tokens": tokens, "order": order},
                      {"tokenizer": vocabulary_digest(tokenizer),
                       "vocabulary": str(len(tokenizer.vocabulary()))})


def join_documents(documents):
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
    documents, _ = split(args.data, template)
    tokens = join_documents(
        encode(document, tokenizer, template, config.eos_token_ids, sys.maxsize)[0]
        for document in documents)
    read = time.perf_counter()
    order = suffix_order(tokens)
    write_datastore(args.out, tokens, order, tokenizer)
    print(f"{args.out}: {len(documents)} documents, {len(tokens) - len(documents)} tokens, "
          f"{args.out.stat().st_size / 1e6:.0f} MB; text to ids {read - begin:.0f} s, order "
          f"{time.perf_counter() - read:.0f} s")


def main(argv=None):
    return run_program("rest.py", lambda: make(parse_arguments(argv)))
