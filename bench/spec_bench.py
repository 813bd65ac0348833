"""Spec-Bench: vanilla decoding, Kangaroo and prompt lookup on all turns, as the paper's table.

    python bench/spec_bench.py --model DIR --adapter DIR --questions question.jsonl [--limit 10] \\
        --out results.json
    python bench/spec_bench.py --show results.json

All methods go through the same loop, question by question interleaved; a later turn follows
vanilla's answer to the earlier one. Compression rate: tokens ÷ passes of the whole model. Speedup:
seconds a token of the fastest vanilla decoding, at the one shape or at width 1, ÷ the method's,
prefill included; the median over turns. Identical: of the outputs, those that equal vanilla's at
the one shape, bit for bit.

--out is written after every question; the same command goes on from there. Options of kangaroo.py
(--temperature, --steps, --dtype, --tree …) may be added. The questions:
https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl.
"""
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import (
    ALL,
    asked_for,
    line,
    machine,
    parser_for,
    pick,
    results_of,
    rotated,
    software,
)
from llama import UserError
from support.checkpoint import read_json, write_atomically
from support.decoder import timed
from support.program import refuse_below_one, run_program

SUBTASKS = {  # in the order of Spec-Bench's own tables
    "mt_bench": "MT-Bench", "translation": "Translation", "summarization": "Summarization",
    "qa": "QA", "math_reasoning": "Math", "rag": "RAG"}
VANILLA = "vanilla", "vanilla, width 1"
METHODS = {  # their drafters, and the rows of a step: None are the decoder's
    "vanilla, width 1": ("none", 1), "vanilla": ("none", None), "Kangaroo": ("kangaroo", None),
    "prompt lookup": ("lookup", None)}


# --------------------------------------------------------------------------------------------------
# Measuring

def decode(asked, ids, drafter, width=None):
    """(ids, figures) of a decode.

    drafted[w − 1] and accepted[w − 1] count the rounds that drafted, or accepted, w tokens or more.
    """
    rounds, seconds = zip(*timed(asked.rounds(ids, drafter, width)))
    columns = [len(r.draft.tokens) for r in rounds], [r.accepted for r in rounds]
    drafted, accepted = ([sum(n >= w for n in column) for w in range(1, max(column) + 1)]
                         for column in columns)
    tokens = [token for r in rounds for token in r.tokens]
    return tokens, {"tokens": len(tokens), "rounds": len(rounds),
                    "seconds": round(sum(seconds), 4), "drafted": drafted, "accepted": accepted}


def ask(asked, turns, first):
    """The figures of every turn of a question: [{method: figures}].

    `first` says which method begins.
    """
    decoder, said, figures = asked.decoder, [], []
    for turn in turns:
        said.append(turn)
        prompt = decoder.encode(*said)
        outputs = {name: decode(asked, prompt, *METHODS[name]) for name in rotated(METHODS, first)}
        answer = outputs["vanilla"][0]
        figures.append({name: {**f, "identical": ids == answer}
                        for name, (ids, f) in outputs.items()})
        said.append(decoder.tokenizer.decode(answer).strip())
    return figures


def measure(asked, questions, results, path):
    """Ask what `results` has no answers to yet; the file is written after each question."""
    answered = {question["line"] for question in results["questions"]}
    todo = [question for question in questions if question.line not in answered]
    if todo:  # the first pass over a shape compiles kernels
        ask(asked, ["Hello"], 0)
    begin = time.perf_counter()
    for done, question in enumerate(todo, 1):
        turns = ask(asked, question.turns, question.line)
        results["questions"].append({"line": question.line, "category": question.category,
                                     "turns": turns})
        write_atomically(path, json.dumps(results).encode())
        left = (time.perf_counter() - begin) / done * (len(todo) - done)
        bar = "█" * (20 * done // len(todo))
        print(f"\r{bar:░<20} {done}/{len(todo)} questions · {left / 60:.0f} min left ", end="",
              file=sys.stderr, flush=True)
    print(file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Summary

def summarise(results):
    """{subtask or "all": {method: its figures}} of the object in a results file, and `fastest`.

    The figures are turns, tokens, compression_rate, speedup and identical.
    """
    turns = [(q["category"], turn) for q in results["questions"] for turn in q["turns"]]

    def seconds_a_token(name):
        seconds, tokens = (sum(turn[name][key] for _, turn in turns)
                           for key in ("seconds", "tokens"))
        return seconds / tokens

    fastest = min(VANILLA, key=seconds_a_token)
    summary = {"fastest": fastest}
    for subtask in [*SUBTASKS, "all"]:
        rows = [turn for category, turn in turns if subtask in (category, "all")]
        if rows:
            summary[subtask] = {name: figures_of(rows, name, fastest) for name in METHODS}
    return summary


def figures_of(turns, name, fastest):
    tokens, rounds, identical = (sum(turn[name][key] for turn in turns)
                                 for key in ("tokens", "rounds", "identical"))
    speedups = [turn[fastest]["seconds"] / turn[fastest]["tokens"] * turn[name]["tokens"]
                / turn[name]["seconds"] for turn in turns]
    return {"turns": len(turns), "tokens": tokens, "compression_rate": tokens / rounds,
            "speedup": statistics.median(speedups), "identical": identical}


def show(results):
    """Print the table: a column for each subtask, compression rate / speedup."""
    summary = summarise(results)
    subtasks = [name for name in [*SUBTASKS, "all"] if name in summary]
    print(" · ".join(str(value) for value in results["settings"].values()))
    print(f"compression rate / speedup against {summary['fastest']}, the fastest vanilla decoding")
    print(line(f"{'':18}", [*(SUBTASKS.get(name, name) for name in subtasks), "identical"], 15))
    for method in METHODS:
        figures, every = [summary[name][method] for name in subtasks], summary["all"][method]
        cells = [f"{f['compression_rate']:.2f} / {f['speedup']:.2f}" for f in figures]
        identical = f"{every['identical']:>8} of {every['turns']:3}"
        print(line(f"{method:18}", cells, 15) + identical)
    every = summary["all"]["vanilla"]
    print(f"{every['tokens']} tokens in {every['turns']} turns a method")


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    """(arguments, further ones, for kangaroo.py)"""
    parser = parser_for(__doc__, model=None, adapter=None, questions=None, out=None, limit=ALL,
                        skip=0, new_tokens=128)
    parser.add_argument("--show", type=Path, metavar="FILE",
                        help="print the table of a results file, and stop")
    args, more = parser.parse_known_args(argv)
    refuse_below_one(args, "limit", "new_tokens")
    for name in () if args.show else ("model", "adapter", "questions", "out"):
        if getattr(args, name) is None:
            raise UserError(f"give --{name} (see --help)")
    return args, more


def in_words(asked, adapter):
    """All that the figures depend on."""
    sampler, sampling = asked.sampler, "greedy"
    if sampler.temperature:
        sampling = (f"temperature {sampler.temperature:g}, top-k {sampler.top_k}, top-p "
                    f"{sampler.top_p:g}, seed {sampler.seed}")
    return {"model": asked.describe(), "adapter": adapter.name, "sampling": sampling,
            "tokens": f"at most {asked.new_tokens} tokens", "machine": machine(),
            "software": software()}


def main(argv=None):
    args, more = parse_arguments(argv)
    if args.show:
        results = read_json(args.show)
        if not results.get("questions"):
            raise UserError(f"--show {args.show}: holds no results of this program")
    else:
        questions = pick(args.questions, args.limit, args.skip)
        asked = asked_for(args, more)
        if asked.decoder.graphed:
            asked.decoder.model.widths = 1, asked.decoder.width
        results = results_of(args.out, in_words(asked, args.adapter), questions=[])
        measure(asked, questions, results, args.out)
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("spec_bench.py", main))
