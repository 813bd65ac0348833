r"""The other methods beside their authors' code: the same ids, the same accepted lengths a round?

    python -m venv theirs
    theirs/bin/pip install torch==2.13.0 transformers==4.36.2 tokenizers==0.15.2 "numpy<2" \
        sentencepiece accelerate einops REST/DraftRetriever
    python bench/authors_methods.py --python theirs/bin/python --model models/stories \
        --prompts FILE --medusa Medusa --heads DIR --rest REST --datastore FILE \
        --lookahead LookaheadDecoding --spec-bench Spec-Bench

The checkouts are of FasterDecoding/Medusa, FasterDecoding/REST (whose DraftRetriever wants Rust; a
package of this name on PyPI is another program), hao-ai-lab/LookaheadDecoding and
hemingkx/Spec-Bench, whose older state of Lookahead can move its window by what was accepted. A
method whose checkout is not given is left out.

On the CPU in float32, greedily, to a number of tokens whatever ends a text. Theirs runs in
processes of its own; nothing of it is here but the names of what is called. Changed there, and why:

- `AutoTokenizer` gives a stand-in that leaves ids as ids and knows no token that ends a text.
- REST: `Reader` is wrapped, as its caller sets neither how many places are looked at nor how many
  tokens follow, and to note the trees; `token_spans` end with 1, as ours; the cache has one head a
  key head, where theirs makes one a query head and so fails with grouped heads.
- Lookahead: a stopping criterion notes the rounds, which are not returned; attention is the eager
  one, as its mask is made for no other; the random numbers have a seed.
"""
import argparse
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import compare, run_theirs, write_model_bin
from drafters import rest
from drafters.lookahead import LookaheadDrafter, hang
from drafters.medusa import TREE, MedusaDrafter, load_heads
from kangaroo import Draft, NoDrafter
from llama import KVCache
from support.checkpoint import load_llama, named_weights
from support.errors import UserError
from support.files import write_json
from support.program import Parser, run_program
from support.tokenizer import Tokenizer

import torch

LOOKAHEADS = (6, 3, 2), (15, 5, 15)  # W, N, G: the default here, and the paper's
OURS = "whole", "anywhere", "move"  # what TheirLookahead can have of ours
# REST's places and tokens that follow. Of the first two no tree is cut. The last is theirs, and
# twice: which nodes are cut depends on the order of a hash map, which is another in every search.
CUT, NODES = (5000, 10), 64
RESTS = (1, 10), (6, 4), CUT, CUT

# What their process runs, in the folder of their checkout.
START = """
import argparse, json, os, random, sys
import torch, transformers
torch.set_num_threads(1)
job, found = json.load(open(sys.argv[1])), []
class Ids:
    eos_token_id = -1
    decode = staticmethod(lambda ids, **more: ids.tolist())
transformers.AutoTokenizer.from_pretrained = lambda *a, **more: Ids
def record(steps, **more):
    lengths, ids = [], []
    for step in steps:
        lengths.append(len(step["text"]) - len(ids))
        ids = step["text"]
        if len(ids) >= job["new_tokens"]:
            return {"ids": ids, "lengths": lengths} | more
"""
END = """
json.dump(found, open(sys.argv[2], "w"))
"""
MEDUSA = START + """
from medusa.model import medusa_choices
from medusa.model.medusa_model import MedusaModel
model = MedusaModel.from_pretrained(job["heads"], torch_dtype=torch.float32)
for paths in [*job["runs"], medusa_choices.mc_sim_7b_63]:
    paths = [path for path in paths if len(path) <= job["heads_in_file"]]
    found.append((paths, [record(model.medusa_generate(torch.tensor([ids]), medusa_choices=paths))
                          for ids in job["prompts"]]))
""" + END
REST = START + """
import draftretriever
from rest.model.rest_model import RestModel, initialize_past_key_values
writer = draftretriever.Writer(sys.argv[2], max_chunk_len=len(job["tokens"]))
writer.add_entry(job["tokens"])
writer.finalize()
reader = draftretriever.Reader(sys.argv[2])
class Reader:
    def __init__(self, places, following, nodes):
        self.limits, self.trees = {"k": places, "long": following, "choices": nodes}, [[]]
    def search(self, ids, choices):
        if len(ids) == model.token_spans[0] or self.trees[-1]:
            self.trees.append([])  # another round
        answer = reader.search(ids, **self.limits)
        self.trees[-1] = [[token for token in path if token != -2] for path in answer[0]]
        return answer
model = RestModel.from_pretrained(job["model"], torch_dtype=torch.float32)
model.token_spans = list(range(16, 0, -1))
config = argparse.Namespace(**vars(model.config))
config.hidden_size = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
config.num_attention_heads = config.num_key_value_heads
model.past_key_values, model.past_key_values_data, model.current_length_data = (
    initialize_past_key_values(argparse.Namespace(config=config, device="cpu", dtype=None)))
for limits in job["runs"]:
    stores = [Reader(*limits) for ids in job["prompts"]]
    found.append([record(model.rest_generate(torch.tensor([ids]), store), trees=store.trees)
                  for ids, store in zip(job["prompts"], stores)])
""" + END
LOOKAHEAD = START + """
os.environ["USE_LADE"] = "1"
sys.path.insert(0, "model")  # of Spec-Bench
from lade.utils import augment_all, config_lade
augment_all()
model = transformers.AutoModelForCausalLM.from_pretrained(
    job["model"], torch_dtype=torch.float32, attn_implementation="eager")
model.generation_config.eos_token_id = None
def steps_of(ids):
    steps = []
    def note(now, scores, **more):
        steps.append({"text": now[0, len(ids):].tolist()})
        return len(steps[-1]["text"]) >= job["new_tokens"]
    random.seed(10)
    model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=10 ** 4,
                   stopping_criteria=transformers.StoppingCriteriaList([note]))
    return steps
for (window, ngram, candidates), more in job["runs"]:
    config_lade(WINDOW_SIZE=window, LEVEL=ngram, GUESS_SET_SIZE=candidates, DEBUG=0, **more)
    found.append([record(steps_of(ids)) for ids in job["prompts"]])
""" + END


class FirstPlaces(rest.Datastore):
    """Looks at the first places, as theirs, where ours looks at some from all over."""

    def places(self, key):
        return super().places(key)[:rest.MATCHES]


class Replay(NoDrafter):
    """Drafts trees that are given, each a list of paths of tokens."""

    def __init__(self, model, trees):
        super().__init__(model)
        self.trees = iter(trees)

    def draft(self, ids, n_max, cache):
        edges = {}
        for path in next(self.trees):
            hang(edges, 0, path)
        return draft_of(self.model, ids, edges)


@dataclass
class FromNode(Draft):
    """A draft of which only the nodes from `first` on can be accepted."""
    first: int = 0

    def child(self, node, token):
        edges = enumerate(zip(self.parents, self.tokens), 1)
        return next((i for i, edge in edges if i >= self.first and edge == (node, token)), None)


def draft_of(model, ids, edges, first=0):
    parents, tokens = zip(*edges) if edges else ((), ())
    return FromNode(list(tokens), model.embed([ids[-1], *tokens]),
                    parents=[parent or 0 for parent in parents], first=first)


class TheirLookahead(LookaheadDrafter):
    """Lookahead as the authors' code has it: the window is filled in N − 2 rounds, from tokens of
    the prompt; it moves by one a round; and what is accepted are n-grams, without their last token.
    What can be had besides:

    whole: the last token too. anywhere: tokens of the window, as ours. move: the window moves by
    what was accepted; new columns are tokens of the text. prompt: the n-grams of prompt and text
    are in the pool; of several accepted tokens, theirs takes the last for each.
    """

    def __init__(self, *args, whole=False, anywhere=False, move=False, prompt=False):
        super().__init__(*args)
        self.whole, self.anywhere, self.move, self.prompt = whole, anywhere, move, prompt

    def draft(self, ids, n_max, cache):
        self.ids = ids
        if not self.columns:  # the first round
            self.pool, self.random, self.text = {}, random.Random(10), list(ids)
            guesses = [self.random.choice(ids) for _ in range(self.window + self.ngram - 3)]
            self.columns = [[token] for token in (ids[-1], *guesses)]
            for i in range(len(ids) - self.ngram + 1) if self.prompt else ():
                self.learn(ids[i:i + self.ngram])
        self.columns[0][0] = ids[-1]
        edges, chain, self.ends = {}, 0, []
        for j, column in enumerate(self.columns):
            chain = hang(edges, chain, column[:1]) if j else 0
            self.ends.append(hang(edges, chain, column[1:]))
        first, full = 1 + len(edges), len(self.columns[0]) == self.ngram - 1
        for tokens in self.pool.get(ids[-1], []) if full else ():
            # None is the root too, but keeps these nodes apart from the window's.
            hang(edges, 0 if self.anywhere else None, tokens if self.whole else tokens[:-1])
        return draft_of(self.model, ids, edges, 0 if self.anywhere else first)

    def observe(self, hidden, choices, path):
        run = [[*column, choices[end]] for column, end in zip(self.columns, self.ends)]
        if not run:  # the prompt
            return
        if len(run[0]) < self.ngram:  # the window is not full
            self.columns = run[1:]
        else:
            for ngram in run:
                self.learn(ngram)
            self.columns = [ngram[1:] for ngram in run]
            if self.move:
                new = [[self.random.choice(self.ids) for _ in path] for _ in self.columns[0]]
                self.columns = self.columns[len(path):] + [list(column) for column in zip(*new)]
        for _ in range(1 + len(path)) if self.prompt else ():
            self.text.append(choices[path[-1] if path else 0])
            if len(self.text) >= self.ngram:
                self.learn(self.text[-self.ngram:])


def medusa(args, model, job, folder, flag, checkout):
    heads = load_heads(args.heads, model)
    if heads.head is not None:
        raise UserError(f"--heads {args.heads}: draft from some tokens, theirs need all of them")
    n, blocks = len(heads.heads), len(heads.heads[0]) - heads.own
    weights = {name.removeprefix("heads."): weight for name, weight in named_weights(heads).items()}
    for k in range(0 if heads.own else n):  # theirs wants a projection for each head
        weights[f"{k}.{blocks}.weight"] = model.lm_head.weight.clone()
    (folder / "heads").mkdir()
    torch.save(weights, folder / "heads" / "medusa_lm_head.pt")
    write_json(folder / "heads" / "config.json", {
        "medusa_num_heads": n, "medusa_num_layers": blocks,
        "base_model_name_or_path": job["model"]})
    heads = load_heads(folder / "heads", model)
    job |= {"heads": str(folder / "heads"), "heads_in_file": n, "runs": [
        [[0] * k for k in range(1, n + 1)], [list(path) for path in TREE]]}
    for paths, theirs in run_theirs(flag, checkout, args.python, MEDUSA, job, folder):
        drafters = [MedusaDrafter(model, heads, paths) for _ in theirs]
        yield compare(f"medusa, {len(paths)} nodes", drafters, job["prompts"], theirs,
                      width=1 + len(paths), skip=1)


def retrieval(args, model, job, folder, flag, checkout):
    """With the documents joined, as theirs does; ours else stops at the end of each."""
    store = rest.read_datastore(args.datastore, Tokenizer(args.model, model.config),
                           model.config.vocab_size)
    tokens = torch.tensor([token for token in store.tokens if token != rest.END]).int()
    store = FirstPlaces(tokens, rest.suffix_order(tokens))
    job |= {"tokens": tokens.tolist(), "runs": [(*limits, NODES) for limits in RESTS]}
    found = run_theirs(flag, checkout, args.python, REST, job, folder)
    for (rest.MATCHES, following), theirs in zip(RESTS, found):
        name = f"rest, {rest.MATCHES} places"
        more = {"width": 1 + NODES, "skip": 1, "steps": following}
        drafters = [rest.RestDrafter(model, store) for _ in theirs]
        equal = compare(name, drafters, job["prompts"], theirs, **more)
        trees = [text["trees"][-len(text["lengths"]):] for text in theirs]
        nodes = sum(len(tree) for text in trees for tree in text) / sum(map(len, trees))
        drafters = [Replay(model, tree) for tree in trees]
        yield compare(f"{name}, on their trees of {nodes:.1f} nodes", drafters, job["prompts"],
                      theirs, **more)
        if (rest.MATCHES, following) != CUT:
            yield equal


def lookahead(args, model, job, folder, flag, checkout, choices):
    """choices: pairs of what config_lade is given and what TheirLookahead is given."""
    job["runs"] = [(sizes, more) for sizes in LOOKAHEADS for more, _ in choices]
    found = run_theirs(flag, checkout, args.python, LOOKAHEAD, job, folder)
    for i, (sizes, more) in enumerate(job["runs"]):
        (window, ngram, candidates), as_theirs = sizes, choices[i % len(choices)][1]
        runs = [(f"lookahead, {sizes}, {more}", TheirLookahead, as_theirs)]
        if not as_theirs:  # from theirs to ours, one difference after another
            runs += [(f"    and {', '.join(and_)}", TheirLookahead, dict.fromkeys(and_, True))
                     for and_ in (OURS[:1], OURS[:2], OURS)]
            runs += [("    ours as it is", LookaheadDrafter, {})]
        for j, (name, kind, options) in enumerate(runs):
            width = (window + candidates) * (ngram - 1)
            drafters = [kind(model, *sizes, **options) for _ in job["prompts"]]
            equal = compare(name, drafters, job["prompts"], found[i], width=width)
            if not j:
                yield equal


def run(args):
    model = load_llama(args.model)
    tokenizer = Tokenizer(args.model, model.config)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[:args.limit]
    prompts = [tokenizer.encode(line) for line in lines]
    # One block, or our drafts would end with each.
    KVCache.BLOCK = {"cpu": max(map(len, prompts)) + 2 * args.new_tokens + 512}
    same = []
    with tempfile.TemporaryDirectory() as folder:
        write_model_bin(Path(folder) / "model", model)
        job = {"model": f"{folder}/model", "prompts": prompts, "new_tokens": args.new_tokens}
        for method, *more in (
                (medusa, "--medusa", args.medusa), (retrieval, "--rest", args.rest),
                (lookahead, "--lookahead", args.lookahead,
                 [({"POOL_FROM_PROMPT": 0}, {}), ({"POOL_FROM_PROMPT": 1}, {"prompt": True})]),
                (lookahead, "--spec-bench", args.spec_bench,
                 [({"ALWAYS_FWD_ONE": 0}, {"move": True})])):
            if more[1]:
                same += method(args, model, dict(job), Path(folder), *more)
    return 0 if all(same) else 1


def parse_arguments(argv):
    parser = Parser(prog="authors_methods.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--python", "--model", "--prompts"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--medusa", "--heads", "--rest", "--datastore", "--lookahead", "--spec-bench"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--limit", type=int, default=8, help="prompts (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=80, help="of a text (default: 80)")
    args = parser.parse_args(argv)
    if not args.python.exists():
        raise UserError(f"--python {args.python}: no such program")
    args.python = args.python.absolute()  # not resolved: it is a link out of its environment
    for flag, file, needed in (("--medusa", "medusa/model/medusa_model.py", "--heads"),
                               ("--rest", "rest/model/rest_model.py", "--datastore"),
                               ("--lookahead", "lade/decoding.py", None),
                               ("--spec-bench", "model/lade/decoding.py", None)):
        folder, also = (getattr(args, (name or flag)[2:].replace("-", "_"))
                        for name in (flag, needed))
        if folder and not also:
            raise UserError(f"{flag}: give {needed} too")
        if folder and not (folder / file).exists():
            raise UserError(f"{flag} {folder}: is no checkout of it, {file} is missing")
    return args


def main(argv=None):
    return run(parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(run_program("authors_methods.py", main))
