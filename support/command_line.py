"""The command line of kangaroo.py: arguments, progress in colour, the summary, --compare, --json.

    parse_arguments -> support.decoder.load -> Decoder.generate -> what is printed

Nothing of the algorithm.
"""
import json
import statistics
from pathlib import Path

import support.decoder
from drafters.tree import TOP_CANDIDATES, TREE_STEPS, TREE_THRESHOLD, TREE_WIDTH
from kangaroo import STEPS, THRESHOLD, WIDTH, Draft
from llama import CHAIN_WIDTH, MAX_WIDTH, Sampler
from support.chat import CHAT_TEMPLATES
from support.data import read_prompts
from support.decoder import (
    DEFAULT_MODEL,
    drafter_named,
    load,
    parts_needed,
    seed_of,
    statistics_of,
    timed,
)
from support.errors import UserError, require
from support.program import HELP, Parser, options, run_program
from support.replay import Recorder, add_trace, refuse_other_files
from support.terminal import DIM, Screen, say


def flags_of_parts():
    """{flag: (metavar, help)} of the options that bring what drafters need."""
    parts = [cls.part for cls in parts_needed().values()]
    return {flag: (next(part.metavar for part in parts if part.flag == flag),
                   "; ".join(part.help for part in parts if part.flag == flag))
            for flag in sorted({part.flag for part in parts})}


def names_of_drafters():
    """What --drafter takes: a tree is named by --tree besides."""
    return [cls.name for cls in support.decoder.DRAFTERS if not cls.tree_of]


def tree_forms():
    """{name of a drafter: name of what --tree makes of it}"""
    return {cls.tree_of: cls.name for cls in support.decoder.DRAFTERS if cls.tree_of}


def make_parser():
    parser = Parser(prog="kangaroo.py", usage="python kangaroo.py [options] --prompt TEXT",
                    add_help=False, formatter_class=HELP, description="Decode a Llama with "
                    "Kangaroo's self-speculation; the output is that of vanilla decoding, bit for "
                    "bit.")
    option, flag, greedy = options(parser), parser.add_argument, Sampler()
    option("--prompt", "TEXT", "the prompt; - reads standard input")
    option("--prompts", "FILE", "instead: a prompt a line, or JSONL with `prompt` or Spec-Bench's "
           "`turns`")
    option("--model", "DIR", "a Hugging Face folder (default: models/stories)")
    option("--drafter", "NAME", ", ".join(names_of_drafters()), "kangaroo")
    for flag_name, (metavar, text) in flags_of_parts().items():
        option(flag_name, metavar, f"{text} (default: the model's)")
    option("--max-new-tokens", "N", "stop after this many tokens", 128, type=int)
    option("--exit-layer", "ℓ", "layers that draft (default: the adapter's)", type=int)
    option("--steps", "γ", "the most tokens drafted in a round (default: the adapter's or "
           f"{STEPS})", type=int)
    option("--threshold", "η", "stop drafting at this top-1 probability, 0 … 1 (default: the "
           f"adapter's or {THRESHOLD})", type=float)
    option("--temperature", "T", "0 is greedy", greedy.temperature, type=float)
    option("--top-k", "K", "sample from the K likeliest tokens, 0 is off", greedy.top_k, type=int)
    option("--top-p", "P", "sample from the likeliest tokens of total probability P",
           greedy.top_p, type=float)
    option("--seed", "S", "of the sampling noise", greedy.seed, type=int)
    option("--samples", "N", "texts of each prompt; --json tells the seed of each", 1, type=int)
    option("--chat", "NAME", f"{', '.join(CHAT_TEMPLATES)} (default: the model folder's)")
    option("--system", "TEXT", "a system message, for chat templates that take one")
    option("--dtype", "TYPE", "float32, bfloat16, float16 (default: bfloat16 where the device is "
           "fast at it)")
    option("--device", "DEV", "cpu, cuda, cuda:1, … (default: cuda if there is one)")
    flag("--tree", action="store_true", help="draft a tree: where the draft is unsure, several "
         f"continuations; γ and η are then the adapter's for a tree, or {TREE_STEPS} and "
         f"{TREE_THRESHOLD}")
    option("--top-candidates", "K", "the most children of a node of the tree (default: the "
           f"adapter's or {TOP_CANDIDATES})", type=int)
    option("--nodes", "N", "the most tokens in the tree (default: the adapter's or the width − 1)",
           type=int)
    option("--width", "W", f"rows of a step (default: {WIDTH}), for a tree above {CHAIN_WIDTH} "
           f"(default: {TREE_WIDTH}); 1 with --drafter none is the plain baseline", type=int)
    flag("--no-graphs", action="store_true",
         help="on a GPU: start every kernel from Python, without CUDA graphs")
    flag("--compile", action="store_true",
         help="on a GPU: fuse pointwise operations (starts slowly)")
    flag("--tf32", action="store_true",
         help="on a GPU: let products of float32 be rounded to TF32")
    flag("--compare", action="store_true",
         help="decode vanilla too: identical? (exit 1 if not), and the speedup")
    flag("--json", action="store_true",
         help="write a JSON object a prompt, and nothing else, to standard output")
    flag("--show-drafts", action="store_true",
         help="on a terminal: show drafted tokens, dim, until they are verified")
    option("--trace", "FILE", "write an HTML page that replays a decode, beside those it holds")
    flag("-h", "--help", action="help", help="show this text")
    return parser


def parse_arguments(argv):
    args = make_parser().parse_args(argv)
    names, trees = names_of_drafters(), tree_forms()
    trace, tree, drafter = args.trace and Path(args.trace), args.tree, args.drafter
    require((args.prompt is None) != (args.prompts is None),
            "give one of --prompt TEXT and --prompts FILE (see --help)")
    require(drafter in names,
            f"--drafter {drafter}: no such drafter, choose from {', '.join(names)}")
    require(not tree or drafter in trees,
            f"--tree: is for --drafter {' and '.join(trees)}, not {drafter}")
    args.drafter = trees[drafter] if tree else drafter
    cls = drafter_named(args.drafter)
    args.width = cls.usual_width if args.width is None else args.width
    require(args.max_new_tokens >= 1,
            f"--max-new-tokens {args.max_new_tokens}: must be at least 1")
    require(not (args.show_drafts and args.json), "--show-drafts: shows text, leave out --json")
    require(args.samples >= 1, f"--samples {args.samples}: must be at least 1")
    require(args.samples == 1 or args.temperature > 0,
            f"--samples {args.samples}: greedy decoding has one text, give --temperature too")
    require(1 <= args.width, f"--width {args.width}: must be at least 1")
    require(args.width <= MAX_WIDTH, f"--width {args.width}: must be at most {MAX_WIDTH}")
    require(trace is None or trace.parent.is_dir() and not trace.is_dir(),
            f"--trace {trace}: must be a file, in a folder that exists")
    if trace:
        refuse_other_files(trace)
    require(args.width > 1 or args.drafter == "none",
            "--width 1: has no room for a draft, give --drafter none too")
    require(args.width > CHAIN_WIDTH or not tree,
            f"--width {args.width}: must be above {CHAIN_WIDTH} for --tree")
    has = {name for settings in cls.grid for name in settings}
    require(args.top_candidates is None or "top_candidates" in has,
            "--top-candidates: is for a tree of --drafter kangaroo, give --tree too")
    require(args.nodes is None or "nodes" in has,
            "--nodes: is for a tree, give --tree too")
    for flag in flags_of_parts().keys() - {"--adapter"}:
        value = getattr(args, attribute(flag))
        users = [other.name for other in support.decoder.DRAFTERS
                 if other.part and other.part.flag == flag]
        require(value is None or args.drafter in users,
                f"{flag} {value}: is for --drafter {' and '.join(users)}")
    return args


def attribute(flag):
    """Where argparse puts what a flag is given."""
    return flag.removeprefix("--").replace("-", "_")


def make_sampler(*settings):
    """A Sampler, whose UserError speaks of flags."""
    try:
        return Sampler(*settings)
    except UserError as e:
        name, rest = str(e).split(" ", 1)
        raise UserError(f"--{name.replace('_', '-')} {rest}") from None


def summary(results):
    """One line on all prompts: tokens, speed, acceptance, and what --compare found."""
    tokens, seconds = sum(len(r["ids"]) for r in results), sum(r["seconds"] for r in results)
    rounds = [pair for r in results for pair in zip(r["drafted"], r["accepted"])]
    parts = [f"{tokens} tokens in {seconds:.2f} s", f"{tokens / seconds:.1f} tokens/s",
             f"compression rate {tokens / len(rounds):.2f}"]
    if "trees" in results[0]:
        drafted, accepted = (statistics.mean(pair) for pair in zip(*rounds))
        parts.append(f"{drafted:.1f} nodes drafted and {accepted:.2f} accepted a round")
    elif any(drafted for drafted, _ in rounds):
        reached = [[a >= w for d, a in rounds if d >= w]
                   for w in range(1, max(d for d, _ in rounds) + 1)]
        shares = " ".join(f"{statistics.mean(hits):.0%}" for hits in reached)
        parts.append(f"accepted by draft position {shares}")
    if "identical" in results[0]:
        same = sum(r["identical"] for r in results)
        ratio = statistics.median(r["vanilla_seconds"] / r["seconds"] for r in results)
        parts.append(f"{same} of {len(results)} identical to vanilla, speedup {ratio:.2f}")
    return " · ".join(parts)


def warning(results, decoder, drafter):
    """What to say of a run in which almost nothing was accepted, else None.

    A level of a tree counts as one drafted token.
    """
    if "trees" in results[0]:
        trees = [Draft(tree["tokens"], None, parents=tree["parents"])
                 for r in results for tree in r["trees"]]
        drafted = sum(max(tree.levels()) for tree in trees)
    else:
        drafted = sum(sum(r["drafted"]) for r in results)
    accepted = sum(sum(r["accepted"]) for r in results)
    if drafted < 64 or accepted >= 0.03 * drafted:
        return None
    return (f"warning: of {drafted} drafted tokens {accepted} were accepted: "
            f"{drafter_named(drafter).advise(decoder)}")


def vanilla(decoder, ids, args, sampler):
    """What --compare adds to a result: vanilla decoding of the same prompt."""
    rounds = decoder.rounds(ids, "none", args.max_new_tokens, sampler)
    rounds, seconds = zip(*timed(rounds))
    return {"vanilla_ids": [token for round_ in rounds for token in round_.tokens],
            "vanilla_seconds": sum(seconds)}


def prepare(args):
    """(decoder, settings) that parsed arguments ask for."""
    part = drafter_named(args.drafter).part
    parts = dict.fromkeys(parts_needed(), False)
    if part:
        parts[part.name] = getattr(args, attribute(part.flag))
    # The page wants to see each layer run, so --trace goes without graphs.
    decoder = load(args.model or DEFAULT_MODEL, device=args.device, dtype=args.dtype,
                   width=args.width, chat=args.chat, system=args.system,
                   exit_layer=args.exit_layer, tf32=args.tf32, compile=args.compile,
                   graphs=not (args.no_graphs or args.trace), **parts)
    return decoder, decoder.settings(args.drafter, **asked_settings(args))


def asked_settings(args):
    """The settings of a drafter that the user gave, others as None."""
    return {name: getattr(args, name)
            for name in ("steps", "threshold", "top_candidates", "nodes")}


def texts_to_decode(args):
    """[(prompt, number of the sample, sampler)]: every text that is to be decoded."""
    prompts = read_prompts(args.prompt, args.prompts)
    if args.trace and len(prompts) > 1:
        raise UserError(f"--trace {args.trace}: replays one prompt, --prompts {args.prompts} holds "
                        f"{len(prompts)}")
    if args.trace and args.samples > 1:
        raise UserError(f"--trace {args.trace}: replays one text, leave out --samples")
    return [(prompt, sample, make_sampler(args.temperature, args.top_k, args.top_p,
                                          seed_of(args.seed, i, sample)))
            for i, prompt in enumerate(prompts) for sample in range(args.samples)]


def decode(decoder, args, prompt, ids, sampler, screen, vanilla_first):
    """What --json prints of one text."""
    compared = vanilla(decoder, ids, args, sampler) if args.compare and vanilla_first else {}
    pieces = []
    stream = decoder.stream(ids, args.drafter, args.max_new_tokens, sampler,
                            on_draft=screen.draft if screen.drafts else None,
                            **asked_settings(args))
    recorder = args.trace and Recorder(decoder, prompt, ids, args.drafter, args.max_new_tokens,
                                       asked_settings(args))
    for piece in recorder.watch(stream) if recorder else stream:
        screen.show(piece.text, piece.drafted)
        pieces.append(piece)
    result = statistics_of(ids, pieces, decoder.drafts_trees(args.drafter))
    if args.compare:
        result |= compared or vanilla(decoder, ids, args, sampler)
        result["identical"] = result["ids"] == result["vanilla_ids"]
    if args.trace:
        add_trace(args.trace, recorder.trace(result))
    return result


def run(args):
    """Decode all prompts and print; returns the exit status."""
    texts = texts_to_decode(args)
    decoder, settings = prepare(args)
    all_ids = [decoder.encode(prompt) for prompt, _, _ in texts]  # errors come before any output
    decoder.make_room(all_ids, args.max_new_tokens)
    if args.model and decoder.template.note:
        say(decoder.template.note)
    say(decoder.describe(args.drafter, settings))
    screen = Screen(args.show_drafts, silent=args.json)
    if args.compare:
        methods = (args.drafter, None), ("none", None)
        decoder.warm_up(all_ids, args.max_new_tokens, methods, texts[0][2], settings)
    results = []
    for i, ((prompt, sample, sampler), ids) in enumerate(zip(texts, all_ids)):
        if decoder.chat == "none" or len(texts) > 1:
            screen.write(prompt, DIM)
            screen.write("" if decoder.chat == "none" else "\n")
        # Neither is always second.
        try:
            result = decode(decoder, args, prompt, ids, sampler, screen, vanilla_first=i % 2)
        finally:
            screen.wipe()
        results.append(result | {"sample": sample, "seed": sampler.seed})
        end = "" if i + 1 == len(texts) else "\n"
        screen.write(end + "\n")
        if args.json:
            print(json.dumps(results[-1]), flush=True)
    (say if args.json else print)(summary(results))
    if text := warning(results, decoder, args.drafter):
        say(text)
    return 0 if all(r.get("identical", True) for r in results) else 1


def main(argv=None):
    return run_program("kangaroo.py", lambda: run(parse_arguments(argv)))
