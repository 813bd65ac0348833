"""The command line of kangaroo.py: what may be asked for, and what is wrong with it.

    parse_arguments -> the arguments, for support/command_line.py

Needs no PyTorch, so --help and an error of the command line are there at once.
"""
import sys
from pathlib import Path

from drafters.table import ADAPTER, DRAFTERS, drafter_named, parts_needed
from support.chat import CHAT_TEMPLATES
from support.errors import require
from support.limits import TREE_WIDTH, check_dtype, check_sampling, check_settings, check_width
from support.program import Parser, formatter, options

EXAMPLES = """examples:
  python kangaroo.py                                    a conversation
  python kangaroo.py "Once upon a time" --compare       is it vanilla's text?
  python kangaroo.py --model DIR --prompts FILE --json  for programs"""


def flags_of_parts():
    """{flag: (metavar, help)} of the options that bring what drafters need."""
    parts = [part for part, _ in parts_needed().values()]
    return {flag: (next(part.metavar for part in parts if part.flag == flag),
                   "; ".join(part.help for part in parts if part.flag == flag))
            for flag in sorted({part.flag for part in parts})}


def names_of_drafters():
    """What --drafter takes: a tree is named by --tree besides."""
    return [name for name, entry in DRAFTERS.items() if not entry.tree_of]


def tree_forms():
    """{name of a drafter: name of what --tree makes of it}"""
    return {entry.tree_of: name for name, entry in DRAFTERS.items() if entry.tree_of}


def make_parser():
    parser = Parser(prog="kangaroo.py", usage="python kangaroo.py [TEXT] [options]",
                    add_help=False, formatter_class=formatter, epilog=EXAMPLES,
                    description="Decode a Llama with Kangaroo's self-speculation.\nThe output is "
                    "that of vanilla decoding, bit for bit.")

    option, flag = options(parser, "what to decode")
    option("text", "TEXT", "the prompt; without one, on a terminal: a conversation, in a pipe: "
           "standard input", nargs="?")
    option("--prompt", "TEXT", "the same; - reads standard input")
    option("--prompts", "FILE", "a prompt a line; JSONL or a JSON list with `prompt` or "
           "Spec-Bench's `turns`")
    option("--model", "DIR", "a Hugging Face folder (default: models/stories)")
    option("--chat", "NAME", f"{', '.join(CHAT_TEMPLATES)} (default: the model folder's)")
    option("--system", "TEXT", "a system message, for chat templates that take one")
    option("--max-new-tokens", "N", "stop after this many tokens", 128, type=int)

    option, flag = options(parser, "drafting")
    option("--drafter", "NAME", ", ".join(names_of_drafters()), "kangaroo")
    flag("--tree", "draft a tree: where the draft is unsure, several continuations")
    for name, (metavar, text) in flags_of_parts().items():
        option(name, metavar, f"{text} (default: the model's)")
    option("--exit-layer", "ℓ", "layers that draft (default: the adapter's)", type=int)
    option("--steps", "γ", "the most tokens drafted in a round; of a tree: its depth (default: the "
           "adapter's)", type=int)
    option("--threshold", "η", "stop drafting at this top-1 probability, 0 … 1 (default: the "
           "adapter's)", type=float)
    option("--top-candidates", "K", "the most children of a node of the tree (default: the "
           "adapter's)", type=int)
    option("--nodes", "N", "the most tokens in the tree (default: the width − 1)", type=int)
    option("--width", "W", "rows of a step (default: the adapter's, else γ + 1; of a tree "
           f"{TREE_WIDTH}); 1 with --drafter none is plain decoding", type=int)

    option, flag = options(parser, "sampling")
    option("--temperature", "T", "0 is greedy", 0.0, type=float)
    option("--top-k", "K", "sample from the K likeliest tokens (default: from all)", type=int)
    option("--top-p", "P", "sample from the likeliest tokens of total probability P (default: 1)",
           type=float)
    option("--seed", "S", "of the sampling noise (default: 0)", type=int)
    option("--samples", "N", "texts of each prompt; --json tells the seed of each", 1, type=int)

    option, flag = options(parser, "what to show")
    flag("--compare", "decode vanilla too: identical? (exit 1 if not), and the speedup")
    option("--repeats", "N", "with --compare: decode so many times, show medians", type=int)
    flag("--show-drafts", "on a terminal: show drafted tokens, dim, until they are verified")
    flag("--json", "write a JSON object a text, and nothing else, to standard output")
    option("--trace", "FILE", "write an HTML page that replays a decode, beside those it holds")
    flag("--help", "show this text", "-h", action="help")

    option, flag = options(parser, "device and GPU")
    option("--device", "DEV", "cpu, cuda, cuda:1, … (default: cuda if there is one)")
    option("--dtype", "TYPE", "float32, bfloat16, float16 (default: bfloat16 where the device is "
           "fast at it)")
    flag("--no-graphs", "on a GPU: start every kernel from Python, without CUDA graphs")
    flag("--compile", "on a GPU: fuse pointwise operations (starts slowly)")
    flag("--tf32", "on a GPU: let products of float32 be rounded to TF32")
    return parser


def parse_arguments(argv):
    """The arguments, of which `drafter` is the tree's name for --tree. UserError names the flag."""
    args, trees = make_parser().parse_args(argv), tree_forms()
    asked = [args.text, args.prompt, args.prompts]
    require(sum(value is not None for value in asked) <= 1,
            "give one of TEXT, --prompt TEXT and --prompts FILE (see --help)")
    args.prompt = args.text if args.prompt is None else args.prompt
    args.conversation = args.prompt is args.prompts is None and on_a_terminal()
    if args.prompt is args.prompts is None and not args.conversation:
        require(not sys.stdin.isatty(), "give a text, or --prompts FILE (see --help)")
        args.prompt = "-"
    require(args.drafter in names_of_drafters(), f"--drafter {args.drafter}: no such drafter, "
            f"choose from {', '.join(names_of_drafters())}")
    require(not args.tree or args.drafter in trees,
            f"--tree: is for --drafter {' and '.join(trees)}, not {args.drafter}")
    args.drafter = trees[args.drafter] if args.tree else args.drafter
    refuse_wrong_values(args)
    refuse_without_effect(args)
    args.top_k, args.seed = args.top_k or 0, args.seed or 0
    args.top_p = 1.0 if args.top_p is None else args.top_p
    return args


def on_a_terminal():
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def refuse_wrong_values(args):
    trace = args.trace and Path(args.trace)
    for name in "max_new_tokens", "samples", "repeats":
        value = getattr(args, name)
        require(value is None or value >= 1, f"{flag_of(name)} {value}: must be at least 1")
    check_dtype(args.dtype)
    check_sampling(args.temperature, args.top_k or 0, 1.0 if args.top_p is None else args.top_p)
    if args.width is not None:
        check_width(args.width)
        require(args.width > 1 or args.drafter == "none",
                "--width 1: has no room for a draft, give --drafter none too")
    check_settings(args.width, args.tree, **asked_settings(args))
    require(not (args.show_drafts and args.json), "--show-drafts: shows text, leave out --json")
    require(trace is None or trace.parent.is_dir() and not trace.is_dir(),
            f"--trace {trace}: must be a file, in a folder that exists")
    require(not args.trace or args.samples == 1,
            f"--trace {trace}: replays one text, leave out --samples")


def refuse_without_effect(args):
    """UserError for an option that would do nothing: somebody expects that it does."""
    entry = drafter_named(args.drafter)
    drafter = f"--drafter {entry.tree_of} --tree" if entry.tree_of else f"--drafter {args.drafter}"
    idle = {}  # name: why
    if not args.temperature:
        idle |= dict.fromkeys(("top_k", "top_p", "seed"),
                              "greedy decoding has no use for it, give --temperature too")
        if args.samples > 1:
            idle["samples"] = "greedy decoding has one text, give --temperature too"
    if not args.compare:
        idle["repeats"] = "is for --compare"
    has = list(entry.settings) + ["exit_layer"] * (entry.part == ADAPTER)
    for name in [name for name in [*asked_settings(args), "exit_layer"] if name not in has]:
        idle[name] = f"{drafter} has none, it has {', '.join(has) or 'no settings'}"
    for flag in flags_of_parts():
        users = [name for name, other in DRAFTERS.items()
                 if other.part and other.part.flag == flag and not other.tree_of]
        if not (entry.part and entry.part.flag == flag):
            idle[attribute(flag)] = f"is for --drafter {' and '.join(users)}"
    for name, why in idle.items():
        value = getattr(args, name)
        require(value is None, f"{flag_of(name)} {value}: {why}")


def asked_settings(args):
    """The settings of a drafter that options bring; those that the user did not give as None."""
    return {name: getattr(args, name)
            for name in ("steps", "threshold", "top_candidates", "nodes")}


def flag_of(name):
    return "--" + name.replace("_", "-")


def attribute(flag):
    """Where argparse puts what a flag is given."""
    return flag.removeprefix("--").replace("-", "_")
