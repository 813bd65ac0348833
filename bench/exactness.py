"""In how many outputs does a method differ from its own library's vanilla decoding?

    pip install transformers
    python bench/exactness.py --model DIR --adapter DIR --questions FILE [--limit 4] \\
        --out results.json

Kangaroo's and transformers' side by side: the same model, prompts and dtypes, greedily. Ours:
Kangaroo and prompt lookup against vanilla decoding (`--drafter none`). transformers: its
prompt-lookup decoding (`prompt_lookup_num_tokens`) against its plain greedy `generate`. Whether the
two libraries' vanilla decodings agree is another matter, and counted apart. Dtypes that --out holds
already are kept. Options of kangaroo.py may be added.
"""
import json
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import NEEDED, asked_for, machine, parser_for, pick, progress, results_of
from support.files import write_atomically
from support.program import refuse_below_one, run_program

import torch

LOOKUP_TOKENS = 10  # transformers' own example value


def first_difference(a, b):
    """The index of the first token that differs; None for equal lists."""
    if a == b:
        return None
    differ = (i for i, pair in enumerate(zip(a, b)) if pair[0] != pair[1])
    return next(differ, min(len(a), len(b)))


def theirs(args, dtype, config, device):
    """A function of transformers' generate: ids and its options -> new ids."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)

    def generate(ids, **options):
        prompt = torch.tensor([ids], device=device)
        return model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            eos_token_id=list(config.eos_token_ids), max_new_tokens=args.new_tokens,
            **options)[0, len(ids):].tolist()

    return generate


def measure(dtype, args, more):
    """{method: the first differing token of each output} for one dtype."""
    asked = asked_for(args, ["--dtype", dtype, *more])
    decoder, found = asked.decoder, {}
    generate = theirs(args, dtype, decoder.model.config, decoder.device)

    def ours(ids, drafter):
        return [token for round_ in asked.rounds(ids, drafter) for token in round_.tokens]

    prompts = [decoder.encode(question.turns[0])[-args.longest:]
               for question in pick(args.questions, args.limit, args.skip)]
    asked.warm_up(prompts, ["none", "kangaroo", "lookup"])
    for ids in progress(prompts, f"{dtype} "):
        vanilla, plain = ours(ids, "none"), generate(ids)
        lookup = generate(ids, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        for method, output, reference in (
                ("Kangaroo", ours(ids, "kangaroo"), vanilla),
                ("prompt lookup", ours(ids, "lookup"), vanilla),
                ("transformers, prompt lookup", lookup, plain),
                ("transformers' vanilla against ours", plain, vanilla)):
            found.setdefault(method, []).append(first_difference(output, reference))
    return found


def show(results):
    print(" · ".join(results["settings"].values()))
    for dtype, methods in results["dtypes"].items():
        for method, differences in methods.items():
            differ = sum(d is not None for d in differences)
            print(f"{dtype:10}{method:36}{differ:4} of {len(differences)} outputs differ")


def main(argv=None):
    parser = parser_for(__doc__, model=NEEDED, adapter=NEEDED, questions=NEEDED, out=NEEDED,
                        limit=4, skip=0, new_tokens=128, longest=1024)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    args, more = parser.parse_known_args(argv)
    refuse_below_one(args, "limit", "new_tokens", "longest")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = {
        "model": args.model.name, "tokens": f"at most {args.new_tokens} tokens",
        "prompts": f"of at most {args.longest} tokens", "machine": machine(),
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}"}
    results = results_of(args.out, settings, dtypes={})
    for dtype in args.dtypes:
        if dtype not in results["dtypes"]:
            results["dtypes"][dtype] = measure(dtype, args, more)
            write_atomically(args.out, json.dumps(results).encode())
    show(results)


if __name__ == "__main__":
    sys.exit(run_program("exactness.py", main))
