"""Spec-Bench: vanilla decoding, Kangaroo and prompt lookup on all turns of its questions, as the
paper's table.

    python bench/spec_bench.py --model DIR --adapter DIR --questions question.jsonl [--limit 10]
    --out results.json python bench/spec_bench.py --show results.json

All methods go through the same loop, question by question interleaved; a later turn follows
vanilla's answer to the earlier one. Compression rate: tokens ÷ passes of the whole model. Speedup:
seconds a token of the fastest vanilla decoding, at the one shape or at width 1, ÷ the method's,
prefill included; the median over turns. Identical: of the outputs, those that equal vanilla's at
the one shape, bit for bit.

--out is written after every question; the same command goes on from there. Options of kangaroo.py
(--temperature, --steps, --dtype, --tree …) may be added. The questions:
https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl.
"""
import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.speed import pick, processor
from llama import UserError
from support.checkpoint import read_json, write_atomically
from support.command_line import parse_arguments
from support.decoder import Decoder
from support.program import Parser, refuse_below_one, run_program

SUBTASKS = {
    "mt_bench": "MT-Bench", "translation": "Translation", "summarization": "Summarization",
    "qa": "QA", "math_reasoning": "Math", "rag": "RAG"
}  # in the order of Spec-Bench's own tables
VANILLA = "vanilla", "vanilla, width 1"
METHODS = {
    "vanilla, width 1": "none", "vanilla": "none", "Kangaroo": "kangaroo", "prompt lookup": "lookup"
}  # their drafters


def decode(decoder, ids, drafter):
    """(ids, figures); drafted[w − 1] and accepted[w − 1] count the rounds that drafted, or
    accepted, at least w tokens."""
    rounds, seconds = zip(*decoder.rounds(ids, drafter))
    counts = [(len(r.draft.tokens), r.accepted) for r in rounds]
    drafted, accepted = ([sum(n >= w
                              for n in column)
                          for w in range(1,
                                         max(column) + 1)]
                         for column in zip(*counts))
    tokens = [token for r in rounds for token in r.tokens]
    return tokens, {
        "tokens": len(tokens), "rounds": len(rounds), "seconds": round(sum(seconds), 4),
        "drafted": drafted, "accepted": accepted
    }


def ask(decoders, turns, first):
    """The figures of every turn of a question: [{method: figures}]. `first` says which method
    begins: nobody always does."""
    decoder, said, figures = decoders["vanilla"], [], []
    for turn in turns:
        said.append(turn)
        prompt, outputs = decoder.encode(*said), {}
        for i in range(len(METHODS)):
            name = list(METHODS)[(first + i) % len(METHODS)]
            outputs[name] = decode(decoders[name], prompt, METHODS[name])
        answer = outputs["vanilla"][0]
        figures.append(
            {name: {**f, "identical": ids == answer}
             for name, (ids, f) in outputs.items()})
        said.append(decoder.tokenizer.decode(answer).strip())
    return figures


def summarise(results):
    """{subtask or "all": {method: {turns, tokens, compression_rate, speedup, identical}}} of the
    object in a results file."""
    asked = results["questions"]
    turns = [(q["category"], turn) for q in asked for turn in q["turns"]]

    def seconds_a_token(name):
        return sum(turn[name]["seconds"] for _, turn in turns) / sum(turn[name]["tokens"]
                                                                     for _, turn in turns)

    fastest = min(VANILLA, key=seconds_a_token)
    summary = {"fastest": fastest}
    for subtask in [*SUBTASKS, "all"]:
        rows = [turn for category, turn in turns if subtask in (category, "all")]
        if rows:
            summary[subtask] = {
                name: {
                    "turns": len(rows), "tokens": sum(row[name]["tokens"]
                                                      for row in rows),
                    "compression_rate": sum(row[name]["tokens"]
                                            for row in rows) / sum(row[name]["rounds"]
                                                                   for row in rows),
                    "speedup": statistics.median(row[fastest]["seconds"] / row[fastest]["tokens"]
                                                 * row[name]["tokens"] / row[name]["seconds"]
                                                 for row in rows), "identical": sum(
                                                     row[name]["identical"]
                                                     for row in rows)
                }
                for name in METHODS
            }
    return summary


def show(results):
    """Print the table: a column for each subtask, compression rate / speedup."""
    summary = summarise(results)
    subtasks = [name for name in [*SUBTASKS, "all"] if name in summary]
    print(" · ".join(str(value) for value in results["settings"].values()))
    print(f"compression rate / speedup against {summary['fastest']}, the fastest vanilla decoding")
    print(f"{'':18}" + "".join(f"{SUBTASKS.get(name, name):>15}" for name in subtasks)
          + f"{'identical':>15}")
    for method in METHODS:
        cells = [
            f"{s['compression_rate']:.2f} / {s['speedup']:.2f}" for s in (summary[name][method]
                                                                          for name in subtasks)
        ]
        every = summary["all"][method]
        print(f"{method:18}" + "".join(f"{cell:>15}" for cell in cells)
              + f"{every['identical']:>8} of {every['turns']:3}")
    print(
        f"{summary['all']['vanilla']['tokens']} tokens in {summary['all']['vanilla']['turns']} turns a method"
    )


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--out", type=Path, help="the results file")
    parser.add_argument("--limit", type=int, default=10 ** 9,
                        help="so many questions of each subtask (default: all)")
    parser.add_argument("--skip", type=int, default=0,
                        help="after the first so many of each subtask")
    parser.add_argument("--new-tokens", type=int, default=128,
                        help="of an answer at most (default: 128)")
    parser.add_argument("--show", type=Path, metavar="FILE",
                        help="print the table of a results file, and stop")
    args, more = parser.parse_known_args(argv)
    refuse_below_one(args, "limit", "new_tokens")
    if args.show:
        results = read_json(args.show)
        if not results.get("questions"):
            raise UserError(f"--show {args.show}: holds no results of this program")
        show(results)
        return
    for name in ("model", "adapter", "questions", "out"):
        if getattr(args, name) is None:
            raise UserError(f"give --{name} (see --help)")
    questions = pick(args.questions, args.limit, args.skip)
    decoder = Decoder(
        parse_arguments([
            "--prompt", "-", "--model",
            str(args.model), "--adapter",
            str(args.adapter), "--max-new-tokens",
            str(args.new_tokens), *more
        ]))
    sampler = decoder.sampler
    results = {
        "settings": {
            "model": decoder.settings, "adapter": args.adapter.name,
            "sampling": f"temperature {sampler.temperature:g}, top-k "
            f"{sampler.top_k}, top-p {sampler.top_p:g}, seed {sampler.seed}"
            if sampler.temperature else "greedy", "tokens": f"at most {args.new_tokens} tokens",
            "machine": f"{processor()}, {torch.get_num_threads()} threads",
            "software": f"Python {platform.python_version()}, torch {torch.__version__}"
        }, "questions": []
    }
    if args.out.exists():
        settings, results = results["settings"], read_json(args.out)
        for name, value in settings.items():
            if results.get("settings", {}).get(name) != value:
                raise UserError(
                    f"--out {args.out}: was made with other settings ({results.get('settings', {}).get(name)}; now "
                    f"{value}), give another file")
    narrow = copy.copy(decoder)
    narrow.args = argparse.Namespace(**vars(decoder.args) | {"width": 1})
    if decoder.graphs:
        decoder.model.widths = (1, decoder.args.width)
    decoders = {name: narrow if name == "vanilla, width 1" else decoder for name in METHODS}
    answered = {question["line"] for question in results["questions"]}
    todo = [question for question in questions if question.line not in answered]
    if todo:  # the first pass over a shape compiles kernels
        ask(decoders, ["Hello"], 0)
    begin = time.perf_counter()
    for done, question in enumerate(todo):
        results["questions"].append({"line": question.line, "category": question.category,
                                     "turns": ask(decoders, question.turns, question.line)})
        write_atomically(args.out, json.dumps(results).encode())
        left = (time.perf_counter() - begin) / (done + 1) * (len(todo) - done - 1)
        bar = "█" * (20 * (done + 1) // len(todo))
        print(f"\r{bar:░<20} {done + 1}/{len(todo)} questions · {left / 60:.0f} min left ", end="",
              file=sys.stderr, flush=True)
    print(file=sys.stderr)
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("spec_bench.py", main))
