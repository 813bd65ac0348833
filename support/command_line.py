"""What kangaroo.py does: decode texts and conversations, show them, compare, sum up.

    parse_arguments -> Session: prepare; answer, turn by turn: encode, decode, compare -> summary

Nothing of the algorithm.
"""
import contextlib
import json
import statistics
from itertools import count
from pathlib import Path

from drafters.table import drafter_named, parts_needed
from kangaroo import Draft
from llama import Sampler
from support.arguments import asked_settings, attribute, flag_of
from support.decoder import (
    DEFAULT_MODEL,
    lacks,
    load,
    pick_device_and_dtype,
    seed_of,
    statistics_of,
    timed,
)
from support.errors import UserError, require
from support.files import require_folder
from support.prompts import check_text
from support.replay import Recorder, add_trace, refuse_other_files
from support.terminal import DIM, Screen, say

ROOM = 2048  # tokens of a conversation that CUDA graphs are recorded for; a longer one waits again


def prepare(args):
    """(decoder, settings) that parsed arguments ask for."""
    if args.trace:
        refuse_other_files(args.trace)
    folder, part = Path(args.model or DEFAULT_MODEL), drafter_named(args.drafter).part
    require_folder(folder, "--model")
    parts = dict.fromkeys(parts_needed(), False)
    if part:
        path = parts[part.name] = getattr(args, attribute(part.flag))
        if path is None and not (folder / part.place).exists():
            raise UserError(lacks(folder, part))
    device, _ = pick_device_and_dtype(args.device, args.dtype)
    for name in "no_graphs", "compile", "tf32":
        require(device.type == "cuda" or not getattr(args, name),
                f"{flag_of(name)}: is for a GPU, this runs on the {device}")
    asked = asked_settings(args)
    # The page wants to see each layer run, so --trace goes without graphs.
    decoder = load(folder, device=args.device, dtype=args.dtype, width=args.width,
                   drafter=args.drafter, asked=asked, chat=args.chat, system=args.system,
                   exit_layer=args.exit_layer, tf32=args.tf32, compile=args.compile,
                   graphs=not (args.no_graphs or args.trace), **parts)
    return decoder, decoder.settings(args.drafter, **asked)


class Session:
    """One run of the program: the decoder, the screen, and the results so far."""

    def __init__(self, args):
        self.args, self.results = args, []
        self.decoder, self.settings = prepare(args)
        self.screen = Screen(args.show_drafts, silent=args.json)
        self.ways = [(args.drafter, None)]  # (drafter, rows of a step; None: the decoder's own)
        self.ways += [("none", None), ("none", 1)] if args.compare else []

    def introduce(self):
        for note in self.decoder.notes if self.args.model else ():
            say(note)
        say(self.decoder.describe(self.args.drafter, self.settings))

    def make_ready(self, prompts, new_tokens):
        """Before these lists of ids are decoded: what happens once, and should not be timed."""
        self.decoder.make_room(prompts, new_tokens)
        if self.args.compare:
            self.decoder.warm_up(prompts, new_tokens, self.ways, self.sampler(0, 0), self.settings)

    def sampler(self, number, sample):
        args = self.args
        return Sampler(args.temperature, args.top_k, args.top_p, seed_of(args.seed, number, sample))

    def answer(self, prompt, ids, number=0, sample=0):
        """Decode, show and compare a text; returns what --json prints of it."""
        args, sampler = self.args, self.sampler(number, sample)
        result, found = {}, [[] for _ in self.ways]  # of each way [(new ids, seconds)]
        for repeat in range(args.repeats or 1):
            first = (number + repeat) % len(self.ways)  # none is always first
            for i in [*range(first, len(self.ways)), *range(first)]:
                if i == repeat == 0:
                    result, recorder = self.show(prompt, ids, sampler)
                    found[i].append((result["ids"], result["seconds"]))
                else:
                    found[i].append(self.decode(ids, *self.ways[i], sampler))
        times = [statistics.median(seconds for _, seconds in runs) for runs in found]
        result |= {"seconds": times[0], "sample": sample, "seed": sampler.seed,
                   "stopped_at": self.stopped_at(ids, result["ids"])}
        if args.compare:
            vanilla, one_row = found[1][0][0], found[2][0][0]
            result |= {"vanilla_ids": vanilla, "vanilla_seconds": times[1],
                       "one_row_tokens": len(one_row), "one_row_seconds": times[2],
                       "repeats": args.repeats or 1, "width": self.decoder.width,
                       "identical": all(run == vanilla for run, _ in found[0] + found[1])}
        if recorder:  # now that the result says whether it is vanilla's
            add_trace(args.trace, recorder.trace(result))
        self.results.append(result)
        if args.json:
            print(json.dumps(result), flush=True)
        return result

    def decode(self, ids, drafter, width, sampler):
        """(new ids, seconds) of a text that nobody sees."""
        settings = self.settings if drafter == self.args.drafter else None
        rounds, seconds = zip(*timed(self.decoder.rounds(
            ids, drafter, self.args.max_new_tokens, sampler, width, settings)))
        return [token for round_ in rounds for token in round_.tokens], sum(seconds)

    def show(self, prompt, ids, sampler):
        """Decode a text as it is shown."""
        args, screen, decoder, pieces = self.args, self.screen, self.decoder, []
        asked = asked_settings(args)
        stream = decoder.stream(ids, args.drafter, args.max_new_tokens, sampler,
                                on_draft=screen.draft if screen.drafts else None, **asked)
        recorder = args.trace and Recorder(decoder, prompt, ids, args.drafter,
                                           args.max_new_tokens, asked)
        try:
            for piece in recorder.watch(stream) if recorder else stream:
                screen.show(piece.text, piece.drafted)
                pieces.append(piece)
        except KeyboardInterrupt as e:
            e.said = "".join(piece.text for piece in pieces)  # a conversation goes on from there
            raise
        finally:
            screen.wipe()
            stream.close()
        return statistics_of(ids, pieces, decoder.drafts_trees(args.drafter)), recorder

    def stopped_at(self, prompt, ids):
        """What ended a text before its end; None if nothing did."""
        config = self.decoder.model.config
        if ids[-1] in config.eos_token_ids:
            return None
        full = len(prompt) + len(ids) == config.max_position_embeddings
        return "the end of the context" if full else "--max-new-tokens"


def decode_all(args, conversations):
    """Answer the turns of all conversations, or if they are None a person's; the exit status."""
    session = Session(args)
    status = converse(session) if conversations is None else talk(session, conversations)
    results = session.results
    if conversations is not None:
        for line in summary(results):
            say(line)
    if text := warning(results, session.decoder, args.drafter):
        say(text)
    return status or (0 if all(r.get("identical", True) for r in results) else 1)


def talk(session, conversations):
    """Answer the turns of each, every one with those before it; returns 2 if one had no room."""
    args, decoder, screen, status = session.args, session.decoder, session.screen, 0
    most = max(map(len, conversations))
    require(not args.trace or len(conversations) * most == 1,
            f"--trace {args.trace}: replays one text, --prompts {args.prompts} asks for more")
    # Errors come before any output.
    prompts = [decoder.encode(turns[0]) for turns in conversations]
    session.make_ready(prompts, most * args.max_new_tokens)
    session.introduce()
    for number, turns in enumerate(conversations):
        for sample in range(args.samples):
            said = []
            for turn in turns:
                try:
                    ids = decoder.encode(*said, turn)
                except UserError as e:
                    say(f"warning: turn {len(said) // 2 + 1} of prompt {number + 1}: left out, {e}")
                    status = 2
                    break
                if session.results:
                    screen.write("\n")  # between two texts
                if decoder.chat == "none" or len(conversations) * most * args.samples > 1:
                    screen.write(turn, DIM)
                    screen.write("" if decoder.chat == "none" else "\n")
                result = session.answer(turn, ids, number, sample)
                said += [turn, result["text"].strip()]
                screen.write("\n")
    return status


# --------------------------------------------------------------------------------------------------
# A conversation

def converse(session):
    """Answer what a person types, each turn with those before it; a model that takes text as it is
    goes on from each line anew."""
    decoder, screen, said, numbers = session.decoder, session.screen, [], count()
    plain = decoder.chat == "none"
    session.introduce()
    say("Ctrl-D ends, Ctrl-C stops an answer" + "; each line begins a new text" * plain, DIM)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  so that input() has a history, and a line can be edited
    while True:
        try:
            turn = input("> ").strip()
            if not turn:
                continue
            check_text(turn)
            said, ids = encode_turn(decoder, said, turn)
            if (number := next(numbers)) == 0:
                session.make_ready([ids], ROOM)
            said = [*said, turn]
            for sample in range(session.args.samples):
                if plain:
                    screen.write(turn, DIM)
                result = session.answer(turn, ids, number, sample)
                screen.write("\n")
                say(" · ".join(short(result)), DIM)
            answer = result["text"]
        except EOFError:
            say("")
            return 0
        except UserError as e:
            say(str(e))
            continue
        except KeyboardInterrupt as e:
            say("")
            answer = getattr(e, "said", None)
        # A turn without an answer is forgotten; so is everything, where each line is a new text.
        said = [*said, answer.strip()] if answer and not plain else said[:len(said) // 2 * 2]


def encode_turn(decoder, said, turn):
    """(what the turn follows, its ids): nothing, if what was said leaves no room any more."""
    try:
        return said, decoder.encode(*said, turn)
    except UserError as e:
        if not said:
            raise
        ids = decoder.encode(turn)
        say(f"{e}: what was said before is forgotten")
        return [], ids


# --------------------------------------------------------------------------------------------------
# What is said of results

def summary(results):
    """Three short lines on all texts: speed; drafting; what --compare found."""
    tokens, seconds, rounds = (sum(numbers) for numbers in zip(*map(counts, results)))
    drafted, accepted = (sum(sum(r[name]) for r in results) for name in ("drafted", "accepted"))
    speed = [f"{tokens} tokens in {seconds:.2f} s", f"{tokens / seconds:.1f} tokens/s"]
    drafting = [f"{rounds} pass{'es' * (rounds != 1)} of the whole model"]
    drafting += [f"{accepted} of {drafted} drafted tokens accepted"] * bool(drafted)
    drafting += [f"{tokens / rounds:.2f} tokens per pass"]
    lines = speed + stopped(results), drafting, compared(results)
    return [" · ".join(line) for line in lines if line]


def short(result):
    """The parts of one line on one text."""
    tokens, seconds, rounds = counts(result)
    speed = [f"{tokens / seconds:.1f} tokens/s", f"{tokens / rounds:.2f} tokens per pass"]
    return speed + compared([result]) + stopped([result])


def counts(result):
    """Its tokens, seconds and passes."""
    return len(result["ids"]), result["seconds"], result["rounds"]


def stopped(results):
    """What ended texts before their end."""
    where = [r["stopped_at"] for r in results if r["stopped_at"]]
    return [f"{where.count(what)} of {len(results)} " * (len(results) > 1) + f"stopped at {what}"
            for what in sorted({*where})]


def compared(results):
    """What --compare found; the speedups are medians over the texts."""
    if "identical" not in results[0]:
        return []
    n, same = len(results), sum(r["identical"] for r in results)
    words = f"{same} of {n} identical" if n > 1 else "identical" if same else "NOT identical"
    beside = statistics.median(r["vanilla_seconds"] / r["seconds"] for r in results)
    # Its text may be another, for it rounds in another way: so this is per token.
    one_row = statistics.median(r["one_row_seconds"] / r["one_row_tokens"]
                                * len(r["ids"]) / r["seconds"] for r in results)
    repeats = results[0]["repeats"]
    runs = "one run" if repeats == 1 else f"medians of {repeats} runs"
    return [f"{words} to vanilla at width {results[0]['width']}, speedup {beside:.2f}",
            f"against width 1 {one_row:.2f} ({runs})"]


def warning(results, decoder, drafter):
    """What to say of a run in which almost nothing was accepted, else None.

    A level of a tree counts as one drafted token.
    """
    if results and "trees" in results[0]:
        trees = [Draft(tree["tokens"], None, parents=tree["parents"])
                 for r in results for tree in r["trees"]]
        drafted = sum(max(tree.levels()) for tree in trees)
    else:
        drafted = sum(sum(r["drafted"]) for r in results)
    accepted = sum(sum(r["accepted"]) for r in results)
    if drafted < 64 or accepted >= 0.03 * drafted:
        return None
    return (f"warning: of {drafted} drafted tokens {accepted} were accepted: "
            f"{drafter_named(drafter).cls.advise(decoder)}")
