"""Speed and memory of decoding: ratios in one process, methods interleaved run by run, medians.

    python bench/speed.py --model DIR [--adapter DIR]
    python bench/speed.py --model DIR --widths 8 16 32

Compares, for one prompt of about 100 tokens and the same number of new tokens: vanilla decoding at
width 1, vanilla at the one shape (the second command: at several widths), Kangaroo if an adapter is
given, and the transformers package's greedy `generate` with its default cache where that package is
installed. Prefill is included in all of them; nobody stops at an end-of-sequence token. Many
prompts, and other methods: `bench/spec_bench.py`.
"""
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import (
    NEEDED,
    copy_bandwidth,
    dtype_name,
    machine,
    parser_for,
    stopwatch,
    weights_of,
)
from kangaroo import STEPS, THRESHOLD, WIDTH, generate
from support.decoder import Settings, load, pick_device_and_dtype
from support.errors import UserError
from support.limits import check_width
from support.program import refuse_below_one, run_program

import torch

PROMPT = (
    "Kangaroos are large marsupials that live in Australia. They have strong hind legs, a long "
    "tail for balance, and a pouch in which the mother carries her joey for many months after its "
    "birth. Most of them feed on grass at dawn and at dusk, and rest in the shade while the sun is "
    "high. A group of kangaroos is called a mob, and its members warn one another of danger by "
    "thumping the ground with their feet. Explain to a child who has never seen one how a kangaroo "
    "jumps, why it can cross long distances without getting tired, and what it does when it meets "
    "a river on its way.")


def load_for(args, width):
    """A decoder with weights packed for steps of this width."""
    return load(args.model, device=args.device, dtype=args.dtype, width=width,
                adapter=args.adapter or False, heads=False, draft_model=False, datastore=False)


# --------------------------------------------------------------------------------------------------
# One prompt

def peak_memory(device):
    """The most memory that this process has ever had, in MB: resident, or given out by a GPU."""
    if device.type == "cuda":  # PyTorch's allocator keeps what it once had
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def ours(decoder, prompt, n, drafter="none", width=None):
    """n tokens, past any end of sequence, with the paper's settings."""
    drafter = decoder.drafter(drafter, Settings(steps=STEPS, threshold=THRESHOLD))
    rounds = generate(decoder.model, drafter, prompt, n, width=width or decoder.width)
    return [token for r in rounds for token in r.tokens]


def theirs(args, decoder, prompt):
    """{name: function of n} of transformers' generate, if that package is installed."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: left out")
        return {}
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=decoder.dtype)
    model, ids = model.to(decoder.device).eval(), torch.tensor([prompt], device=decoder.device)

    def run(n):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               min_new_tokens=n, max_new_tokens=n, pad_token_id=0)
        return found[0, len(prompt):].tolist()

    return {f"transformers {transformers.__version__}": run}


def one_prompt(args):
    """The table of the docstring."""
    decoder = load_for(args, WIDTH)
    prompt, context = decoder.tokenizer.encode(PROMPT), decoder.model.config.max_position_embeddings
    if len(prompt) + args.new_tokens > context:
        raise UserError(f"--new-tokens {args.new_tokens}: the context has room for "
                        f"{context - len(prompt)} behind the prompt")
    if args.memory:
        decoder.make_room([prompt], args.new_tokens)
        ours(decoder, prompt, args.new_tokens)
        print(peak_memory(decoder.device))
        return
    decoder.make_room([prompt], args.new_tokens)
    methods = {"vanilla, width 1": partial(ours, decoder, prompt, width=1)}
    for width in args.widths:
        wide = decoder if width == WIDTH else load_for(args, width)
        wide.make_room([prompt], args.new_tokens)
        methods[f"vanilla, one shape (width {width})"] = partial(ours, wide, prompt)
    if args.adapter:
        methods["Kangaroo"] = partial(ours, decoder, prompt, drafter="kangaroo")
    methods |= theirs(args, decoder, prompt)
    compare(args, decoder, prompt, methods)
    print_memory(args, decoder, prompt)


def compare(args, decoder, prompt, methods):
    """Run all methods, interleaved, and print a line for each."""
    for method in methods.values():
        method(n=args.new_tokens)  # the first pass over a shape compiles kernels, or records them
    seconds, tokens, bandwidth = {name: [] for name in methods}, {}, []
    for _ in range(args.repeats):
        bandwidth.append(copy_bandwidth(decoder.device, 2 ** 28))
        for name, method in methods.items():
            tokens[name], spent = stopwatch(partial(method, n=args.new_tokens))
            seconds[name].append(spent)
            assert len(tokens[name]) == args.new_tokens
    bandwidth = statistics.median(bandwidth)
    weights = sum(p.nbytes for p in weights_of(decoder.model))
    print(f"{args.model.name} · {dtype_name(decoder.dtype)} · {decoder.device} ({machine()}) · "
          f"torch {torch.__version__}\n{len(prompt)} prompt tokens, {args.new_tokens} new, median "
          f"of {args.repeats} interleaved runs")
    print(f"{'':32} {'tokens/s':>9} {'ms/token':>9} {'÷ width 1':>10} {'bandwidth share':>16}")
    for name in methods:
        each = statistics.median(seconds[name]) / args.new_tokens
        ratio = statistics.median(b / a for a, b in zip(seconds["vanilla, width 1"], seconds[name]))
        print(f"{name:32} {1 / each:9.1f} {each * 1e3:9.1f} {ratio:10.2f} "
              f"{weights / bandwidth / each:16.2f}")
    print(f"bandwidth share = {weights / 1e6:.0f} MB of weights ÷ {bandwidth / 1e9:.1f} GB/s "
          "(a measured copy) ÷ seconds per token")
    names = [name for name in methods if f"(width {WIDTH})" in name or name == "Kangaroo"]
    if len(names) == 2:
        print(f"Kangaroo's tokens equal vanilla's: {tokens[names[0]] == tokens[names[1]]}")


def print_memory(args, decoder, prompt):
    """One line: what the peak memory of a process that only decodes is made of, in MB.

    On a GPU all processes count, this one too, so what they have is named first.
    """
    this = [sys.executable, __file__, "--model", args.model, "--dtype", dtype_name(decoder.dtype),
            "--device", str(decoder.device), "--new-tokens", str(args.new_tokens), "--memory"]
    base, peak = (float(subprocess.run([*this, what], capture_output=True, text=True,
                                       check=True).stdout) for what in ("nothing", "decode"))
    weights = sum(p.nbytes for p in weights_of(decoder.model)) / 1e6
    cache = decoder.model.new_cache(len(prompt) + args.new_tokens + WIDTH, WIDTH).rows.nbytes / 1e6
    first = "before" if decoder.device.type == "cuda" else "Python and torch"
    print(f"peak memory {peak:.0f} MB = {base:.0f} {first} + {weights:.0f} weights + {cache:.0f} "
          f"cache + {peak - base - weights - cache:.0f} other")


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = parser_for(__doc__, model=NEEDED, adapter=None, new_tokens=128, dtype=None,
                        device=None)
    option = parser.add_argument
    option("--repeats", type=int, default=7)
    option("--widths", type=int, nargs="+", default=[WIDTH], help="vanilla at these widths")
    option("--memory", choices=("nothing", "decode"),
           help="print the peak memory of doing just this, and stop")
    args = parser.parse_args(argv)
    refuse_below_one(args, "new_tokens", "repeats")
    for width in args.widths:
        check_width(width)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.memory == "nothing":
        device, _ = pick_device_and_dtype(args.device, args.dtype)
        torch.zeros(1, device=device)
        print(peak_memory(device))
    else:
        one_prompt(args)


if __name__ == "__main__":
    sys.exit(run_program("speed.py", main))
