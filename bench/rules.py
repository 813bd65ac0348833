"""What reproducible sampling gives up: shared noise against the rule min(1, p / q).

    python bench/rules.py --model DIR --adapter DIR --prompts FILE [--temperature 0.8]

A measurement only: decoding here accepts a drafted token if it equals the target's own choice, both
chosen with the noise of the position. Speculative sampling as it was published draws the draft with
noise of its own and accepts it with probability min(1, p / q), which no rule can exceed; its text
then depends on how it was drafted. Both rules give texts of the target's distribution p. So along a
text that the target has sampled, with q what the drafter says at the same place, a draft follows
the text through token x with probability

    min(1, p / q), published       min(1, q(x) / p(x))
    shared noise                   1 / (p(x) Σ_j max(p_j / p(x), q_j / q(x)))
    own noise, equality            q(x)

and a draft of γ tokens brings 1 + Σ_w (the product of the first w of these) tokens per round. No
second early exit here: all drafts have γ tokens. The last column is what a real decode with η = 0
made of the same prompts.
"""
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import NEEDED, decode, ids_of, parser_for, pick, progress
from kangaroo import STEPS, WIDTH
from llama import Sampler
from support.decoder import Settings, load, seed_of
from support.errors import UserError
from support.program import refuse_below_one, run_program

import torch

RULES = {"min(1, p / q)": lambda p, q, x: (q[x] / p[x]).clamp(max=1),
         "shared noise": lambda p, q, x: coupled(p, q, x),
         "own noise": lambda p, q, x: q[x]}


def coupled(p, q, x):
    """How likely the draft is x too, if the target is: both the argmax with the same Gumbel noise.

    p, q (V,) are distributions. A 0 of q at x gives 0: the ratio is infinite there.
    """
    ratios = torch.maximum(p / p[x], (q / q[x]).nan_to_num(0))
    return 1 / (p[x] * ratios.sum()) if q[x] > 0 else q[x]


@torch.inference_mode()
def distributions(decoder, ids, sampler):
    """p and q (T, V), float64, of what follows each of ids: the target's and the drafter's."""
    model, adapter, depth = decoder.model, decoder.adapter, decoder.adapter.exit_layer
    positions = torch.arange(len(ids), device=decoder.device)
    x = model.embed_tokens(torch.tensor([ids], device=decoder.device))
    x = model.run_layers(x, positions, None, 0, depth)
    y = model.run_layers(x, positions, None, depth, len(model.layers))
    p, q = model.logits(y)[0], (adapter.head or model.lm_head)(adapter(x, positions)[0])
    return [torch.stack([sampler.scores(row) for row in logits]).double().softmax(-1)
            for logits in (p, q)]


def tokens_a_round(follow, steps):
    """1 + the mean over all places of Σ_w Π of the next w of follow (T,), w = 1 … steps."""
    follow = torch.cat((follow, torch.zeros(steps)))
    windows = follow.unfold(0, steps, 1)[:-1]
    return 1 + windows.cumprod(-1).sum(-1).mean().item()


def main(argv=None):
    parser = parser_for(__doc__, model=NEEDED, adapter=NEEDED, prompts=NEEDED, each=4, skip=0,
                        new_tokens=128, longest=1024, dtype=None, device=None)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    refuse_below_one(args, "each", "new_tokens", "longest", "steps")
    if args.temperature <= 0:
        raise UserError(f"--temperature {args.temperature}: must be above 0, greedy texts have no "
                        "such choice")
    decoder = load(args.model, device=args.device, dtype=args.dtype, graphs=False,
                   width=WIDTH, adapter=args.adapter)
    settings, real = Settings(steps=args.steps, threshold=0.0), []
    found = {name: [] for name in RULES}
    for i, question in enumerate(progress(pick(args.prompts, args.each, args.skip))):
        sampler = Sampler(args.temperature, seed=seed_of(0, i))
        prompt = ids_of(decoder, question, args.longest)
        decoded = decode(decoder, prompt, "kangaroo", args.new_tokens, sampler, settings)
        real.append((len(decoded.tokens), len(decoded.rounds)))
        text = decoded.tokens
        p, q = (rows[len(prompt) - 1:] for rows in
                distributions(decoder, (prompt + text)[:-1], sampler))
        for name, rule in RULES.items():
            follow = [rule(*row) for row in zip(p, q, text)]
            found[name].append(torch.stack(follow).float().cpu())
    tokens, rounds = map(sum, zip(*real))
    print(f"{decoder.describe('kangaroo', settings)} · temperature {args.temperature:g} · "
          f"{len(real)} prompts, {tokens} tokens")
    print(f"{'':16}{'accepted, first drafted':>26}{'tokens per round':>18}")
    for name, follows in found.items():
        first = torch.cat(follows).mean().item()
        a_round = statistics.fmean(tokens_a_round(follow, args.steps) for follow in follows)
        print(f"{name:16}{first:>26.1%}{a_round:>18.2f}")
    print(f"{'a real decode':16}{'':26}{tokens / rounds:>18.2f}")


if __name__ == "__main__":
    sys.exit(run_program("rules.py", main))
