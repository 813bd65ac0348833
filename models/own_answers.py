"""Let a model answer the first turns of ShareGPT conversations itself.

    python models/own_answers.py --model DIR --data FILE… --out FILE [--minutes 25]

That is training text which its adapter meets when it decodes. Greedy, in batches of prompts of one
length, which need neither padding nor masks. Writes JSONL of ShareGPT's form for train_adapter.py.
"""
import argparse
import collections
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.chat import encode_chat, find_chat_template
from support.checkpoint import load_llama
from support.data import read_documents
from support.decoder import pick_device_and_dtype
from support.errors import UserError
from support.packing import pack
from support.program import Parser, refuse_below_one, run_program
from support.terminal import status, wipe_status
from support.tokenizer import Tokenizer

import torch


@torch.inference_mode()
def answers(model, prompts, max_new_tokens):
    """Prompts, lists of ids of one length -> lists of ids.

    Each goes on to the end-of-sequence token or to max_new_tokens.
    """
    length, alive = len(prompts[0]), list(range(len(prompts)))
    room = min(length + max_new_tokens, model.config.max_position_embeddings)
    cache = model.new_cache(room, width=1)
    cache.layers[:] = [layer.expand(-1, len(prompts), -1, -1, -1).contiguous()
                       for layer in cache.layers]
    ids = torch.tensor(prompts, device=model.norm.weight.device)
    result, position = [[] for _ in prompts], 0
    while alive:
        positions = torch.arange(position, position + ids.shape[1], device=ids.device)
        position += ids.shape[1]
        x, view = model.embed_tokens(ids), cache.view(position)
        x = model.run_layers(x, positions, view, 0, len(model.layers))
        ids = model.logits(x[:, -1]).max(-1).indices[:, None]
        for i, token in zip(alive, ids[:, 0].tolist()):
            result[i].append(token)
        rows = [row for row, i in enumerate(alive)
                if result[i][-1] not in model.config.eos_token_ids]
        if position + 1 >= room:
            break
        if len(rows) < len(alive):  # those that have ended leave the batch
            alive, ids = [alive[row] for row in rows], ids[rows]
            cache.layers[:] = [layer[:, rows] for layer in cache.layers]
    return result


def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", required=True)
    option("--data", nargs="+", required=True)
    option("--out", type=Path, required=True)
    option("--batch", type=int, default=128,
           help="the most prompts at once; less than half is left out")
    option("--longest", type=int, default=300, help="leave out prompts of more tokens")
    option("--max-new-tokens", type=int, default=256)
    option("--minutes", type=float, default=25)
    option("--allow-truncated", action="store_true",
           help="take what is readable of a JSON list that breaks off")
    option("--dtype")
    option("--device")
    args = parser.parse_args(argv)
    refuse_below_one(args, "batch", "longest", "max_new_tokens")
    return args


def batches_of_questions(args, tokenizer, context):
    """Lists of (first turn, its ids), all of one length, in random order."""
    _, template = find_chat_template(args.model)
    documents = [document for path in args.data
                 for document in read_documents(path, args.allow_truncated)]
    by_length, longest = collections.defaultdict(list), min(args.longest, context - 1)
    for first in dict.fromkeys(document[0] for document in documents if isinstance(document, list)):
        ids = encode_chat(tokenizer, template, [first])
        by_length[len(ids)].append((first, ids))
    batches = [group[i:i + args.batch] for length, group in by_length.items() if length <= longest
               for i in range(0, len(group), args.batch)]
    least = max(1, args.batch // 2)
    batches = [batch for batch in batches if len(batch) >= least]
    if not batches:
        raise UserError(f"--batch {args.batch}: --data has no {least} conversations whose first "
                        f"turns are of one length up to {longest} tokens, take a smaller --batch "
                        "or more data")
    random.Random(0).shuffle(batches)
    return batches


def main(argv=None):
    args = parse_arguments(argv)
    # Not `support.decoder.load`: rows of a batch are no rows of a step, and need no self-check.
    device, dtype = pick_device_and_dtype(args.device, args.dtype)
    model = pack(load_llama(args.model, device, dtype), args.batch)
    tokenizer = Tokenizer(args.model, model.config)
    model.config = tokenizer.with_ends(model.config)
    batches = batches_of_questions(args, tokenizer, model.config.max_position_embeddings)
    begin, tokens = time.perf_counter(), 0
    with open(args.out, "w", encoding="utf-8") as out:
        for batch in batches:
            found = answers(model, [ids for _, ids in batch], args.max_new_tokens)
            for (first, _), ids in zip(batch, found):
                tokens += len(ids)
                turns = [{"from": "human", "value": first},
                         {"from": "gpt", "value": tokenizer.decode(ids)}]
                out.write(json.dumps({"conversations": turns}) + "\n")
            seconds = time.perf_counter() - begin
            status(f"{tokens} tokens, {tokens / seconds:.0f}/s")
            if seconds > 60 * args.minutes:
                break
    wipe_status()


if __name__ == "__main__":
    sys.exit(run_program("own_answers.py", main))
