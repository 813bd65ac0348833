"""Spec-Bench: vanilla decoding and several methods on all turns, as the paper's table.

    python bench/spec_bench.py --model DIR --adapter DIR --questions question.jsonl [--limit 10] \\
        [--methods kangaroo,tree,lookup,sps,lookahead,medusa,medusa-tree,rest] \\
        [--heads DIR] [--draft-model DIR] [--datastore FILE] [--settings FILE] --out results.json \\
        [--answers DIR]
    python bench/spec_bench.py --show results.json

All methods go through the same loop, question by question interleaved; a later turn follows
vanilla's answer to the earlier one. Compression rate: tokens ÷ passes of the whole model. Speedup:
seconds per token of the fastest vanilla decoding of this machine ÷ the method's, prefill included;
the median over turns, and beside it the ratio of mean tokens per second over questions, which is
what Spec-Bench's evaluation/speed.py calls so. Drafting: the share of a method's time that its
drafts take. Identical: of the outputs, those that equal vanilla's at the same width (rows of a
step), bit for bit. Beyond the target's own a method has parameters, bytes (of its files) and
seconds of training.

--settings is what `bench/choose.py --methods` has found on other prompts. --answers writes a file
per method in Spec-Bench's format, which its evaluation/speed.py and equal.py read. --out is written
after every question; the same command goes on from there. Options of kangaroo.py (--temperature,
--steps, --dtype, --width …) may be added and hold for all methods. The questions:
https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl.
"""
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import ALL, line, machine, parser_for, pick, results_of, software
from bench.methods import (
    Methods,
    add_flags,
    fastest_of,
    figures_of,
    names_of,
    read_settings,
)
from support.errors import UserError
from support.files import read_json, write_atomically
from support.program import refuse_below_one, run_program
from support.terminal import say, status, wipe_status

SUBTASKS = {  # in the order of Spec-Bench's own tables
    "mt_bench": "MT-Bench", "translation": "Translation", "summarization": "Summarization",
    "qa": "QA", "math_reasoning": "Math", "rag": "RAG"}


# --------------------------------------------------------------------------------------------------
# Measuring

def measure(methods, questions, results, args):
    """Ask what `results` has no answers to yet; the file is written after each question."""
    answered = {question["line"] for question in results["questions"]}
    todo = [question for question in questions if question.line not in answered]
    if todo:
        methods.warm_up([question.turns for question in todo], args.new_tokens)
    begin = time.perf_counter()
    for done, question in enumerate(todo, 1):
        turns = methods.answers(question.turns, question.line, args.new_tokens,
                                args.answers is not None)
        results["questions"].append({"line": question.line, "category": question.category,
                                     "turns": turns})
        write_atomically(args.out, json.dumps(results).encode())
        left = (time.perf_counter() - begin) / done * (len(todo) - done)
        bar = "█" * (20 * done // len(todo))
        status(f"{bar:░<20} {done}/{len(todo)} questions · {left / 60:.0f} min left")
    wipe_status()


def write_answers(results, questions, folder):
    """Spec-Bench's answer files, <method>.jsonl; `questions` are those of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {question.line: question.entry for question in questions}
    for name in results["questions"][0]["turns"][0]:
        lines = []
        for question in results["questions"]:
            turns, entry = [turn[name] for turn in question["turns"]], entries[question["line"]]
            lines.append(json.dumps({
                "question_id": entry.get("question_id", question["line"]),
                "category": entry.get("category", question["category"]), "model_id": name,
                "choices": [{"index": 0, "turns": [turn["text"] for turn in turns],
                             "decoding_steps": [turn["rounds"] for turn in turns],
                             "new_tokens": [turn["tokens"] for turn in turns],
                             "wall_time": [turn["seconds"] for turn in turns],
                             "accept_lengths": [n for turn in turns for n in turn["lengths"]]}]}))
        path = folder / f"{name.replace(', width ', '-')}.jsonl"
        write_atomically(path, "".join(line + "\n" for line in lines).encode())


# --------------------------------------------------------------------------------------------------
# Summary

def summarise(results):
    """{subtask or "all": {method: its figures}} of the object in a results file, and `fastest`.

    The figures are those of `methods.figures_of`, and `speed_ratio`, Spec-Bench's own speedup.
    """
    turns = [(q["category"], turn) for q in results["questions"] for turn in q["turns"]]
    fastest = fastest_of([turn for _, turn in turns])
    summary = {"fastest": fastest}
    for subtask in [*SUBTASKS, "all"]:
        rows = [turn for category, turn in turns if subtask in (category, "all")]
        if rows:
            speeds = {name: mean_speed(results, subtask, name) for name in rows[0]}
            summary[subtask] = {name: figures_of(rows, name, fastest) | {
                "speed_ratio": speeds[name] / speeds[fastest]} for name in rows[0]}
    return summary


def mean_speed(results, subtask, name):
    """The mean over questions of tokens per second, all turns of a question taken together."""
    return statistics.mean(
        sum(turn[name]["tokens"] for turn in q["turns"])
        / sum(turn[name]["seconds"] for turn in q["turns"])
        for q in results["questions"] if subtask in (q["category"], "all"))


def needs(cost):
    """The cells of a method's costs: parameters, bytes, seconds of training."""
    parameters, size, seconds = cost.values()
    return ("?" if parameters is None else f"{parameters / 1e6:.2f} M" if parameters else "0",
            "?" if size is None else f"{size / 1e6:.1f} MB" if size else "0",
            "?" if seconds is None else f"{seconds:,}")


def show(results):
    """Print the table: a column for each subtask, compression rate / speedup; then the needs."""
    summary = summarise(results)
    subtasks = [name for name in [*SUBTASKS, "all"] if name in summary]
    print(" · ".join(str(value) for value in results["settings"].values()
                     if isinstance(value, str)))
    print(f"compression rate / speedup against {summary['fastest']}, the fastest vanilla decoding "
          "/ the same as Spec-Bench's speed.py has it")
    print(line(f"{'':18}", [*(SUBTASKS.get(name, name) for name in subtasks), "identical"], 20))
    for name, every in summary["all"].items():
        cells = [f"{f['compression_rate']:.2f} / {f['speedup']:.2f} / {f['speed_ratio']:.2f}"
                 for f in (summary[subtask][name] for subtask in subtasks)]
        identical = f"{every['identical']:>13} of {every['turns']:3}"
        print(line(f"{name:18}", cells, 20) + identical)
    every = summary["all"][summary["fastest"]]
    print(f"{every['tokens']} tokens in {every['turns']} turns per method\n")
    print(line(f"{'':18}", ["parameters", "bytes", "training, s", "drafting"], 13) + "   settings")
    for name, words in results["settings"]["methods"].items():
        cells = [*needs(results["costs"][name]), f"{summary['all'][name]['drafting']:.0%}"]
        print(line(f"{name:18}", cells, 13) + "   " + words)


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    """(arguments, further ones, for kangaroo.py)"""
    parser = parser_for(__doc__, model=None, adapter=None, questions=None, out=None, limit=ALL,
                        skip=0, new_tokens=128)
    add_flags(parser)
    parser.add_argument("--settings", type=Path, help="what choose.py --methods has written")
    parser.add_argument("--answers", type=Path, metavar="DIR",
                        help="write a file per method in Spec-Bench's own format")
    parser.add_argument("--show", type=Path, metavar="FILE",
                        help="print the table of a results file, and stop")
    args, more = parser.parse_known_args(argv)
    refuse_below_one(args, "limit", "new_tokens")
    for name in () if args.show else ("model", "questions", "out"):
        if getattr(args, name) is None:
            raise UserError(f"give --{name} (see --help)")
    return args, more


def methods_of(args, more):
    """The Methods asked for, each at its settings; says which ones are left out."""
    methods = Methods(args, more)
    chosen = read_settings(args.settings) if args.settings else {}
    for name in names_of(args.methods):
        methods.add(name, name, chosen.get(name))
    if not any(m.drafter != "none" for m in methods.methods.values()):
        raise UserError(f"--methods {args.methods}: {'; '.join(methods.left_out.values())}")
    for name, why in methods.left_out.items():
        say(f"{name} is left out: {why}")
    return methods


def in_words(methods, args):
    """All that the figures depend on."""
    o, sampling = methods.options, "greedy"
    if o.temperature:
        sampling = (f"temperature {o.temperature:g}, top-k {o.top_k}, top-p {o.top_p:g}, seed "
                    f"{o.seed}")
    decoder = methods.methods["vanilla, width 1"].decoder
    return {"model": decoder.describe_model(), "sampling": sampling,
            "tokens": f"at most {args.new_tokens} tokens", "texts": args.answers is not None,
            "machine": machine(),
            "software": software(),
            "methods": {name: m.describe() for name, m in methods.methods.items()
                        if m.drafter != "none"}}


def main(argv=None):
    args, more = parse_arguments(argv)
    if args.show:
        results = read_json(args.show)
        if not results.get("questions"):
            raise UserError(f"--show {args.show}: holds no results of this program")
    else:
        questions, methods = pick(args.questions, args.limit, args.skip), methods_of(args, more)
        costs = {name: m.costs() for name, m in methods.methods.items() if m.drafter != "none"}
        results = results_of(args.out, in_words(methods, args), costs=costs, questions=[])
        measure(methods, questions, results, args)
        if args.answers:
            write_answers(results, questions, args.answers)
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("spec_bench.py", main))
