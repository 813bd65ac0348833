"""In how many outputs does a method differ from its own library's vanilla decoding? Kangaroo's and
transformers' side by side.

    pip install transformers python bench/exactness.py --model DIR --adapter DIR --questions FILE
    [--limit 4] --out results.json

The same model, prompts and dtypes, greedily. Ours: Kangaroo and prompt lookup against vanilla
decoding (`--drafter none`). transformers: its prompt-lookup decoding (`prompt_lookup_num_tokens`)
against its plain greedy `generate`. Whether the two libraries' vanilla decodings agree is another
matter, and counted apart. Dtypes that --out holds already are kept.
"""
import argparse
import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.speed import pick, processor
from llama import UserError
from support.checkpoint import read_json, write_atomically
from support.command_line import parse_arguments
from support.decoder import Decoder
from support.program import Parser, refuse_below_one, run_program

LOOKUP_TOKENS = 10  # transformers' own example value


def first_difference(a, b):
    """The index of the first token that differs; None for equal lists."""
    return None if a == b else next(
        (i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def measure(dtype, args, more):
    """{method: the first differing token of each output} for one dtype."""
    decoder = Decoder(
        parse_arguments([
            "--prompt", "-", "--model",
            str(args.model), "--adapter",
            str(args.adapter), "--dtype", dtype, "--max-new-tokens",
            str(args.new_tokens), *more
        ]))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(
        decoder.model.norm.weight.device)
    eos = list(decoder.model.config.eos_token_ids)

    def ours(ids, drafter):
        return [token for round_, _ in decoder.rounds(ids, drafter) for token in round_.tokens]

    def generate(ids, **options):
        prompt = torch.tensor([ids], device=theirs.device)
        return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               eos_token_id=eos, pad_token_id=0, max_new_tokens=args.new_tokens,
                               **options)[0, len(ids):].tolist()

    found, questions = {}, pick(args.questions, args.limit, args.skip)
    for done, question in enumerate(questions, 1):
        ids = decoder.encode(question.turns[0])[-args.longest:]
        vanilla, plain = ours(ids, "none"), generate(ids)
        for method, output, reference in (("Kangaroo", ours(
                ids, "kangaroo"), vanilla), ("prompt lookup", ours(ids, "lookup"), vanilla),
                                          ("transformers, prompt lookup",
                                           generate(ids,
                                                    prompt_lookup_num_tokens=LOOKUP_TOKENS), plain),
                                          ("transformers' vanilla against ours", plain, vanilla)):
            found.setdefault(method, []).append(first_difference(output, reference))
        print(f"\r{dtype} {done}/{len(questions)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def show(results):
    print(" · ".join(results["settings"].values()))
    for dtype, methods in results["dtypes"].items():
        for method, differences in methods.items():
            print(
                f"{dtype:10}{method:36}{sum(d is not None for d in differences):4} of {len(differences)} outputs differ"
            )


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--adapter", "--questions", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--limit", type=int, default=4,
                        help="so many questions of each subtask (default: 4)")
    parser.add_argument("--skip", type=int, default=0,
                        help="after the first so many of each subtask")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--longest", type=int, default=1024,
                        help="of a longer prompt, only so many last tokens")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    args, more = parser.parse_known_args(argv)
    refuse_below_one(args, "limit", "new_tokens", "longest")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = {
        "model": args.model.name, "tokens": f"at most {args.new_tokens} tokens",
        "prompts": f"of at most {args.longest} tokens",
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}"
    }
    results = read_json(args.out) if args.out.exists() else {"settings": settings, "dtypes": {}}
    if results.get("settings") != settings:
        raise UserError(f"--out {args.out}: was made with other settings, give another file")
    for dtype in args.dtypes:
        if dtype not in results["dtypes"]:
            results["dtypes"][dtype] = measure(dtype, args, more)
            write_atomically(args.out, json.dumps(results).encode())
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("exactness.py", main))
