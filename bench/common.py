"""What the programs here share: flags, questions, results files, timing, walking through drafts.

    flags -> questions -> support.decoder.load -> decode, or drafts_everywhere and walk -> tables

The programs do not import each other. None prepares a model itself: `support.decoder.load` does.
"""
import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from kangaroo import WIDTH, NoDrafter, generate
from llama import Llama, Sampler
from support import arguments, command_line
from support.chat import encode_chat
from support.checkpoint import build, config_json, named_weights
from support.decoder import Settings, timed
from support.errors import UserError
from support.files import read_json, write_json
from support.program import Parser
from support.prompts import read_prompts
from support.terminal import status, wipe_status
from support.watch import TimedDrafter

import torch

# --------------------------------------------------------------------------------------------------
# Flags

NEEDED, ALL = object(), math.inf  # defaults: the flag must be given; every question
SHARED = {
    "--model": dict(type=Path, help="a Hugging Face folder"),
    "--adapter": dict(type=Path, help="its adapter's folder, or random"),
    "--prompts": dict(type=Path, help="a prompt a line, or Spec-Bench's JSONL"),
    "--questions": dict(type=Path, help="Spec-Bench's JSONL, or a prompt a line"),
    "--out": dict(type=Path, help="the results file; what it holds already is kept"),
    "--each": dict(type=int, help="prompts of each category"),
    "--limit": dict(type=int, help="questions of each subtask"),
    "--skip": dict(type=int, help="questions of each category to leave out first"),
    "--new-tokens": dict(type=int, help="of an answer at most"),
    "--longest": dict(type=int, help="tokens of a prompt; of a longer one the last ones"),
    "--dtype": dict(help="default: the command line's"),
    "--device": dict(help="default: the command line's")}


def parser_for(doc, **defaults):
    """A parser whose help is a program's docstring, with these flags of SHARED."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, **SHARED[flag], **(
            {"required": True} if default is NEEDED else {"default": default}))
    return parser


class Asked(NamedTuple):
    """What options of kangaroo.py ask for, to decode one prompt after another with."""
    decoder: object
    drafter: str
    settings: Settings
    sampler: Sampler
    new_tokens: int

    def rounds(self, ids, drafter, width=None):
        """What `Decoder.rounds` yields; drafter "kangaroo" is the tree if --tree was given."""
        drafter = self.drafter if drafter == "kangaroo" else drafter
        return self.decoder.rounds(ids, drafter, self.new_tokens, self.sampler, width,
                                   self.settings)

    def warm_up(self, prompts, drafters):
        """Do once what happens only once (`Decoder.warm_up`); drafters as `rounds` has them."""
        drafters = [self.drafter if drafter == "kangaroo" else drafter for drafter in drafters]
        self.decoder.warm_up(prompts, self.new_tokens, [(drafter, None) for drafter in drafters],
                             self.sampler, self.settings)

    def describe(self):
        return self.decoder.describe(self.drafter, self.settings)


def asked_for(args, options):
    """The Asked of a model, an adapter and a list of further options of kangaroo.py."""
    more = arguments.parse_arguments([
        "--prompt", "-", "--model", str(args.model), "--adapter", str(args.adapter),
        "--max-new-tokens", str(args.new_tokens), *options])
    sampler = Sampler(more.temperature, more.top_k, more.top_p, more.seed)
    decoder, settings = command_line.prepare(more)
    return Asked(decoder, more.drafter, settings, sampler, args.new_tokens)


# --------------------------------------------------------------------------------------------------
# Questions

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem",
            "humanities")


class Question(NamedTuple):
    line: int      # of the file
    category: str  # Spec-Bench's subtask; "prompts" in other files
    turns: list    # what the user says, turn by turn
    entry: dict    # the line's JSON object; empty in other files


def pick(path, each=ALL, skip=0):
    """[Question]: `each` of each category, after the first `skip`.

    The file is one of prompts, or of Spec-Bench's questions.
    """
    taken, seen = [], Counter()
    for i, turns, entry in read_prompts(path):
        category = str(entry.get("category", "prompts"))
        category = "mt_bench" if category in MT_BENCH else category
        seen[category] += 1
        if skip < seen[category] <= skip + each:
            taken.append(Question(i, category, turns, entry))
    if not taken:
        raise UserError(f"{path}: of its {seen.total()} prompts, after the first {skip} of each "
                        "category, none is left (--skip)")
    return taken


def ids_of(decoder, question, longest):
    """The ids of a first turn; of one that is too long the last ones, with room for one more."""
    longest = min(longest, decoder.model.config.max_position_embeddings - 1)
    return encode_chat(decoder.tokenizer, decoder.template, question.turns[:1])[-longest:]


# --------------------------------------------------------------------------------------------------
# The machine, and results files

def processor():
    """The CPU's own name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def machine():
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{processor()}, {torch.get_num_threads()} threads"


def software():
    return f"Python {platform.python_version()}, torch {torch.__version__}"


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def weights_of(model):
    """The parameters of a model, without memory: a packed one has given its own away."""
    return list(build(Llama, model.config, "meta", model.norm.weight.dtype).parameters())


def results_of(path, settings, **empty):
    """The object in a results file, to go on with, or a new one.

    UserError if it was made with other settings.
    """
    if not path.exists():
        return {"settings": settings, **empty}
    results = read_json(path)
    made_with = results.get("settings", {})
    for name, value in settings.items():
        if made_with.get(name) != value:
            raise UserError(f"--out {path}: was made with other settings ({made_with.get(name)}; "
                            f"now {value}), give another file")
    return results


# --------------------------------------------------------------------------------------------------
# Timing and printing

def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device, size):
    """Bytes read and written per second by a copy of `size` bytes, the best of 10."""
    source, seconds = torch.zeros(size, dtype=torch.uint8, device=device), []
    target = torch.empty_like(source)

    def copied():
        target.copy_(source)
        synchronize(device)

    for _ in range(10):
        synchronize(device)
        seconds.append(stopwatch(copied)[1])
    return 2 * size / min(seconds)


def stopwatch(function, *arguments):
    """(what function(*arguments) returns, seconds that it took)"""
    begin = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begin


def rotated(items, first):
    """All items, beginning with another one each time: nobody is always first."""
    items, first = list(items), first % len(items)
    return items[first:] + items[:first]


def progress(items, before=""):
    """Each of a list of items; on standard error how many are done."""
    for i, item in enumerate(items, 1):
        yield item
        status(f"{before}{i}/{len(items)}")
    wipe_status()


def line(label, cells, width):
    """A line of a table: its label, then cells of one width."""
    return label + "".join(f"{cell:>{width}}" for cell in cells)


# --------------------------------------------------------------------------------------------------
# Decoding, and walking through drafts on paper

class Decoded(NamedTuple):
    rounds: tuple
    seconds: tuple  # of each round; the prompt's are in the first
    drafting: list  # of these, the drafter's

    @property
    def tokens(self):
        return [token for round_ in self.rounds for token in round_.tokens]

    @property
    def step(self):
        """Median seconds of a draft step; of a tree that is a level."""
        return statistics.median(seconds / (1 + max(r.draft.levels()))
                                 for r, seconds in zip(self.rounds, self.drafting))

    @property
    def rest(self):
        """Median seconds of the rest of a round."""
        rest = [a - b for a, b in zip(self.seconds, self.drafting)]
        return statistics.median(rest[1:] or [0.0])


def decode(decoder, ids, drafter, new_tokens, sampler=None, settings=None, width=None):
    """Decode as `Decoder.rounds` does, with a clock in the drafter."""
    named = isinstance(drafter, str)
    settings = settings or decoder.settings(drafter if named else "none")
    drafter = TimedDrafter(decoder.drafter(drafter, settings) if named else drafter,
                           partial(synchronize, decoder.device))
    rounds = decoder.rounds(ids, drafter, new_tokens, sampler, width, settings)
    return Decoded(*zip(*timed(rounds)), drafter.seconds)


# The pairs of γ and η that are walked through.
GRID_STEPS = 1, 2, 3, 4, 5, 6, 7
GRID_THRESHOLDS = 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8


@torch.inference_mode()
def drafts_everywhere(decoder, ids, output, sampler=None):
    """[(tokens, confidence)] of the longest drafts, one for each token of the output.

    The first is drafted from the prompt, the next ones from what the output adds to it.
    """
    drafter = decoder.drafter("kangaroo", Settings(steps=max(GRID_STEPS), threshold=0.0))
    cache = decoder.model.new_cache(len(ids) + len(output) + decoder.width, decoder.width)
    drafter.prefill(ids[:-1], cache, sampler or Sampler())
    drafts = []
    for i in range(len(output)):
        n_max = min(max(GRID_STEPS), cache.room(len(ids) + i - 1))
        draft = drafter.draft(ids + output[:i], n_max, cache)
        drafts.append((draft.tokens, draft.confidence))
    return drafts


def walk(drafts, output, left, steps, threshold):
    """[(tokens drafted, tokens accepted)] of the rounds that γ = steps and η = threshold come to.

    `left`: the most tokens.
    """
    rounds, done = [], 0
    while done < len(output):
        tokens, confidence = drafts[done]
        n = min(steps, left - done - 1, len(tokens))
        n = next((k + 1 for k in range(n) if confidence[k] <= threshold), n)
        wrong = (k for k in range(n) if done + k >= len(output) or tokens[k] != output[done + k])
        accepted = next(wrong, n)
        rounds.append((n, accepted))
        done += accepted + 1
    return rounds


def count_tokens(output, rounds):
    """(tokens, rounds, tokens drafted)"""
    return len(output), len(rounds), sum(drafted for drafted, _ in rounds)


def add_tables(tables):
    """One table of the sums of several: {key: tuple of numbers}."""
    return {key: tuple(map(sum, zip(*(table[key] for table in tables)))) for key in tables[0]}


def estimate_speedup(counts, step, draft, verify):
    """The speedup that (tokens, rounds, tokens drafted) come to.

    The seconds are those of a vanilla step, a draft step and a verification. A round runs the
    shallow layers once more than it drafts; `draft` is the mean over these.
    """
    tokens, rounds, drafted = counts
    return tokens * step / (rounds * (verify + draft) + drafted * draft)


# --------------------------------------------------------------------------------------------------
# Beside the authors' code

def write_model_bin(folder, model):
    """A model in the files that older code reads: pytorch_model.bin in two shards, their index."""
    weights = {name if name == "lm_head.weight" else f"model.{name}": weight.clone()
               for name, weight in named_weights(model).items()}
    weights["lm_head.weight"] = model.lm_head.weight.clone()  # theirs wants a tied one too
    names, files = list(weights), [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    folder.mkdir()
    for file in files:
        torch.save({name: weights[name] for name in names if weight_map[name] == file},
                   folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", config_json(model.config))


def run_theirs(flag, checkout, python, code, job, folder):
    """What `code` finds in a process of its own, in the folder of a checkout that `flag` named.

    It is called with two files of JSON in `folder`: the job, and where it is to write.
    """
    write_json(folder / "job.json", job)
    run = subprocess.run([python, "-c", code, folder / "job.json", folder / "found.json"],
                         cwd=checkout, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"{flag} {checkout}: their code failed: "
                        f"{(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads((folder / "found.json").read_text())


def rounds_as_theirs(drafters, prompts, theirs, width=WIDTH, skip=0, steps=None, eos=()):
    """[{ids, lengths}], a text a drafter, for as many rounds as theirs has.

    ids: the new tokens; lengths: how many each round committed. theirs: these of the authors'
    code. width: rows of our steps. skip: 1 if it has its first token from prefill, so that ours
    begins after it.
    """
    found = []
    for drafter, ids, text in zip(drafters, prompts, theirs):
        model = drafter.model
        start = generate(model, NoDrafter(model), ids, skip, eos=eos)
        rounds = generate(model, drafter, ids + text["ids"][:skip], 10 ** 6, steps or width - 1,
                          eos=eos, width=width)
        start, rounds = ([round_.tokens for round_ in part] for part in (
            start, islice(rounds, len(text["lengths"]))))
        found.append({"ids": sum(start + rounds, []), "lengths": [len(r) for r in rounds]})
    return found


def compare(name, drafters, prompts, theirs, **more):
    """Print how many ids and rounds are equal, and where a text first differs; returns whether all
    are equal. For the parameters see `rounds_as_theirs`.

    After as many rounds one side may be further on: ids are compared as far as both have come.
    """
    found = rounds_as_theirs(drafters, prompts, theirs, **more)
    pairs = {what: [pair for a, b in zip(found, theirs) for pair in zip(a[what], b[what])]
             for what in ("ids", "lengths")}
    equal = {what: f"{sum(a == b for a, b in pairs[what])} of {len(pairs[what])}" for what in pairs}
    rounds, expected = zip(*pairs["lengths"])
    print(f"{name}: {len(theirs)} texts · ids equal {equal['ids']} · rounds equal "
          f"{equal['lengths']} · tokens per round: theirs {sum(expected) / len(expected):.2f}, "
          f"ours {sum(rounds) / len(rounds):.2f}; theirs of each length from 1 on: "
          f"{' '.join(str(expected.count(i)) for i in range(1, max(expected) + 1))}", flush=True)
    for i, (a, b) in enumerate(zip(found, theirs), 1):
        differs = [j for j, pair in enumerate(zip(a["lengths"], b["lengths"])) if len({*pair}) > 1]
        for j in differs[:1]:
            print(f"    text {i} differs from round {j + 1} on: theirs {b['lengths'][j]}, ours "
                  f"{a['lengths'][j]}")
    missing = sum(len(text["lengths"]) for text in theirs) - len(rounds)
    return not missing and all(a == b for what in pairs for a, b in pairs[what])
