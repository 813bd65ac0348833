"""Several methods on the same prompts: what spec_bench.py and choose.py have in common.

    Methods(args, options)  ->  add(name, drafter, width, …)  ->  answers(turns)  ->  figures_of

A method is a drafter with the settings and the rows of a step (width) that suit it. Each width has
vanilla decoding of its own, whose output the methods of this width must equal; speedup is against
the fastest of these, or against width 1. A width also has a copy of the model's weights, in the
layout that is fastest for it.
"""
import math
import statistics
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from bench.common import decode, rotated
from drafters.table import DRAFTERS, drafter_named, parts_needed
from llama import Sampler
from support.arguments import asked_settings, parse_arguments
from support.checkpoint import safetensors_entries
from support.decoder import Settings, load, seed_of
from support.errors import UserError, require
from support.files import read_json

WEIGHTS = "*.safetensors", "*.bin", "medusa_lm_head.pt"  # and no checkpoint of a training


def drafting():
    """The names of all methods but vanilla decoding."""
    return [name for name in DRAFTERS if name != "none"]


def add_flags(parser, default="kangaroo,lookup"):
    """--methods, and what they need besides a model and its adapter."""
    parser.add_argument("--methods", default=default,
                        help=f"of {', '.join(drafting())}; one whose needs are missing is left out")
    for name, (part, _) in parts_needed().items():
        if name != "adapter":
            parser.add_argument(f"--{name.replace('_', '-')}", type=Path,
                                help=f"{part.help} (default: {part.place} in the model's)")


def names_of(text):
    """--methods as a list; UserError for one that does not exist."""
    names = text.split(",")
    for name in names:
        require(name in drafting(),
                f"--methods {text}: {name!r} is none, choose from {', '.join(drafting())}")
    return names


def read_settings(path):
    """{drafter: {"width": …, "steps": …, …}} of a file that choose.py has written."""
    known = {"width", *(name for entry in DRAFTERS.values() for name in entry.settings)}
    data = read_json(path)
    for name, values in data.items():
        require(name in drafting() and isinstance(values, dict) and known >= values.keys(),
                f"--settings {path}: {name!r} must be one of {', '.join(drafting())}, with an "
                f"object of some of {', '.join(sorted(known))}")
    return data


class Method(NamedTuple):
    decoder: object
    drafter: str
    settings: Settings

    def decode(self, ids, new_tokens, sampler):
        """A `common.Decoded`."""
        return decode(self.decoder, ids, self.drafter, new_tokens, sampler, self.settings)

    def describe(self):
        """Settings and width, in words."""
        text = self.decoder.describe_drafter(self.drafter, self.settings).removeprefix("drafter ")
        if self.drafter == "none":
            text = "vanilla"
        elif text == self.drafter:  # it has no words for its settings
            named = dict(vars(self.settings))
            steps = named.pop("steps")
            text = ", ".join(f"{name} {value}" for name, value in (named or {"γ": steps}).items())
        return f"{text}, width {self.decoder.width}"

    def costs(self):
        """{"parameters", "bytes", "training_seconds"} beyond the target's; None is not known."""
        part = drafter_named(self.drafter).part
        if part is None:
            return {"parameters": 0, "bytes": 0, "training_seconds": 0}
        source = Path(getattr(self.decoder, part.name).source)
        if source.is_file():
            return {"parameters": 0, "bytes": source.stat().st_size, "training_seconds": 0}
        facts = next((read_json(source / name) for name in ("training.json", "config.json")
                      if (source / name).exists()), {})
        shapes = [shape for path in source.glob("*.safetensors")
                  for name, (shape, _) in safetensors_entries(path).items() if name != "vocabulary"]
        return {"parameters": sum(map(math.prod, shapes)) or None,
                "bytes": sum(path.stat().st_size for name in WEIGHTS
                             for path in source.glob(name)) or None,
                "training_seconds": seconds_of(facts.get("training", facts))}


def seconds_of(facts):
    """The seconds of a training, and of the one that it began from."""
    if not isinstance(facts, dict) or "seconds" not in facts:
        return None
    return facts["seconds"] + (seconds_of(facts.get("init")) or 0)


class Methods:
    """The methods of a run, with vanilla decoding at each of their widths and at width 1.

    args: model, and of what drafters need (adapter, heads, …) the paths. options: further ones, of
    kangaroo.py, which hold for all methods.
    """

    def __init__(self, args, options):
        self.args = args
        words = ["--prompt", "-", *options]
        self.options = parse_arguments(words)
        if self.options.drafter != "kangaroo":
            raise UserError("--drafter and --tree: give --methods instead")
        self.decoders, self.methods, self.left_out = {}, {}, {}
        self.add("vanilla, width 1", "none", {"width": 1})

    def decoder(self, width):
        if width not in self.decoders:
            args, o = self.args, self.options
            self.decoders[width] = load(
                args.model, device=o.device, dtype=o.dtype, width=width, chat=o.chat,
                system=o.system, exit_layer=o.exit_layer, tf32=o.tf32, compile=o.compile,
                graphs=not o.no_graphs,
                **{name: getattr(args, name, None) for name in parts_needed()})
        return self.decoders[width]

    def add(self, name, drafter, found=None):
        """A method by the name that it is to have; `found`: its settings, others are the usual.

        What kangaroo.py's options say comes before them. Left out if it needs what is not there.
        """
        found = dict(found or {})
        width, entry = found.pop("width", self.options.width), drafter_named(drafter)
        found |= {key: value for key, value in asked_settings(self.options).items()
                  if value is not None and key in entry.settings}
        try:
            if width is None:
                any_width = self.decoder(1)
                any_width.require_part(entry.part)
                width = entry.cls.usual_width(any_width, found)
            decoder = self.decoder(width)
            settings = decoder.settings(drafter, **found)
        except UserError as e:
            self.left_out[name] = str(e)
            return
        if drafter != "none" and vanilla(width) not in self.methods:
            self.add(vanilla(width), "none", {"width": width})
        self.methods[name] = Method(decoder, drafter, settings)

    def warm_up(self, texts, new_tokens):
        """Warm up all methods as far into the cache as these texts, lists of turns, may reach."""
        prompts, o = [], self.options
        encode = self.methods["vanilla, width 1"].decoder.encode
        for turns in texts:
            said = [text for turn in turns for text in (turn, "")]
            prompts += [encode(turns[0]), encode(*said[:-1])]
        most, sampler = max(map(len, texts)) * new_tokens, Sampler(o.temperature, o.top_k, o.top_p)
        for method in self.methods.values():
            method.decoder.warm_up(prompts, most, [(method.drafter, None)], sampler,
                                   method.settings)

    def answers(self, turns, line, new_tokens, texts=False):
        """Decode all turns of a question by all methods: [{method: figures}], one for each turn.

        `line` says which method begins and, with --seed, which noise is sampled with. A later turn
        follows vanilla's answer, at width 1, to the earlier one. texts: what is said is kept too.
        """
        o, said, figures = self.options, [], []
        sampler = Sampler(o.temperature, o.top_k, o.top_p, seed_of(o.seed, line - 1))
        first = self.methods["vanilla, width 1"].decoder
        for turn in turns:
            said.append(turn)
            prompt = first.encode(*said)
            found = {name: self.methods[name].decode(prompt, new_tokens, sampler)
                     for name in rotated(self.methods, line)}
            of_vanilla = {self.methods[name].decoder.width: decoded.tokens
                          for name, decoded in found.items() if name.startswith("vanilla")}
            figures.append({name: counts_of(found[name]) | {
                "identical": found[name].tokens == of_vanilla[method.decoder.width]}
                for name, method in self.methods.items()})
            for name, decoded in found.items() if texts else ():
                figures[-1][name] |= {"text": first.tokenizer.decode(decoded.tokens).strip(),
                                      "lengths": [len(r.tokens) for r in decoded.rounds]}
            said.append(first.tokenizer.decode(of_vanilla[1]).strip())
        return figures


def vanilla(width):
    return f"vanilla, width {width}"


# --------------------------------------------------------------------------------------------------
# Figures

def counts_of(decoded):
    """What a results file has of a decode.

    drafted[w − 1] and accepted[w − 1] count the rounds that drafted, or accepted, to depth w.
    """
    rounds = decoded.rounds
    columns = [max(r.draft.levels()) for r in rounds], [r.accepted for r in rounds]
    drafted, accepted = ([sum(n >= w for n in column) for w in range(1, max(column) + 1)]
                         for column in columns)
    return {"tokens": len(decoded.tokens), "rounds": len(rounds),
            "seconds": round(sum(decoded.seconds), 4),
            "drafting": round(sum(decoded.drafting), 4), "drafted": drafted, "accepted": accepted}


def fastest_of(turns):
    """The name of the vanilla decoding with the fewest seconds a token."""
    def seconds_a_token(name):
        return (sum(turn[name]["seconds"] for turn in turns)
                / sum(turn[name]["tokens"] for turn in turns))

    return min((name for name in turns[0] if name.startswith("vanilla")), key=seconds_a_token)


def figures_of(turns, name, fastest):
    """The figures of a method over turns; speedup is the median, against the method `fastest`."""
    tokens, rounds, seconds, drafting, identical = (
        sum(turn[name][key] for turn in turns)
        for key in ("tokens", "rounds", "seconds", "drafting", "identical"))
    speedups = [turn[fastest]["seconds"] / turn[fastest]["tokens"] * turn[name]["tokens"]
                / turn[name]["seconds"] for turn in turns]
    by_depth = [[sum(column) for column in zip_longest(*(turn[name][key] for turn in turns),
                                                       fillvalue=0)]
                for key in ("drafted", "accepted")]
    return {"turns": len(turns), "tokens": tokens, "compression_rate": tokens / rounds,
            "speedup": statistics.median(speedups), "drafting": drafting / seconds,
            "accepted_by_depth": [a / d for d, a in zip(*by_depth)], "identical": identical}
