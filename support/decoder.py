"""One call from a model folder to text: for those who fork, for the command line, for bench/.

    from support.decoder import load
    decoder = load("models/stories")
    text, statistics = decoder.generate("Once upon a time", max_new_tokens=64, temperature=0.8)
    for piece in decoder.stream("Once upon a time"):
        print(piece.text, end="")

    load: device and dtype, model, tokenizer, what drafters need, self-check  ->  Decoder
    Decoder.encode -> ids;  .rounds -> what `kangaroo.generate` yields;  .stream -> text

Nothing of the algorithm. Left out on purpose: several texts at once.
"""
import hashlib
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace as Settings  # of a drafter: what its `usual` names
from typing import NamedTuple

from drafters.adapters import trained_for
from drafters.table import ADAPTER, DRAFTERS, drafter_named, parts_needed
from kangaroo import WIDTH, NotFinite, Round, generate
from llama import Sampler
from support.chat import encode_chat, find_chat_template
from support.checkpoint import load_llama, not_followed, read_config
from support.errors import UserError, require
from support.files import require_folder
from support.graphs import (
    GRAPHED,
    GraphedLlama,
    GraphedSampler,
    exact_kernels,
    fuse_pointwise,
    graph_part,
)
from support.limits import check_dtype, check_width
from support.packing import pack
from support.self_check import find_nonfinite, rows_are_alike
from support.terminal import say
from support.tokenizer import TextStream, Tokenizer
from support.watch import WatchedDrafter

import torch

DEFAULT_MODEL = Path(__file__).parents[1] / "models" / "stories"


def pick_device_and_dtype(device=None, dtype=None, tf32=False):
    """(torch.device, torch.dtype) of their names; None is the best there is.

    That is CUDA, else the CPU, and bfloat16 where the device is fast at it. UserError for a device
    that is not there or a dtype that is not supported. Sets up CUDA's kernels.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device}: no such device, choose cpu or cuda") from None
    require(device.type in ("cpu", "cuda"),
            f"--device {device}: not supported, choose cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    require(device.type != "cuda" or (device.index or 0) < count,
            f"--device {device}: PyTorch sees {count} CUDA devices here")
    fast = device.type == "cuda" or (torch.backends.mkldnn.is_available()
                                     and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    check_dtype(dtype)
    dtype = dtype or ("bfloat16" if fast else "float32")
    if device.type == "cuda":
        exact_kernels(tf32)
    return device, getattr(torch, dtype)


def load(model=DEFAULT_MODEL, *, device=None, dtype=None, width=None, drafter="kangaroo",
         asked=None, chat=None, system=None, exit_layer=None, tf32=False, compile=False,
         graphs=True, **parts):
    """A Decoder for a model folder.

    device, dtype, chat: names, None chooses. width: rows of a step; a tree needs more than 8. None:
    as many as suit `drafter`, a name, with the settings `asked`, a dict (8, if it lacks its part).
    system: a message before all turns, if the chat template takes one. exit_layer: overrides the
    adapter's. tf32, compile, graphs: for a GPU only.

    parts: what drafters need beside the model, `adapter`, `heads` (Medusa's), `draft_model` and
    `datastore`: a path; None: what lies in the model's folder (its folders adapter, medusa, draft,
    its datastore.safetensors), if there is such; False: none. An adapter may be "random".
    UserError says what does not fit, and how it would.
    """
    folder, needed = Path(model), parts_needed()
    for name in parts:
        if name not in needed:
            raise TypeError(f"load() got an unexpected keyword argument {name!r}")
    require_folder(folder, "--model")
    if width is not None:
        check_width(width)
    entry = drafter_named(drafter)
    device, dtype = pick_device_and_dtype(device, dtype, tf32)
    chat, template = find_chat_template(folder, chat, system)
    config = read_config(folder)
    tokenizer = Tokenizer(folder, config)
    llama = load_llama(folder, device, dtype, tokenizer.with_ends(config))
    decoder = Decoder(folder, llama, tokenizer, chat, template, exit_layer=exit_layer)
    for name, (part, first) in needed.items():
        path = parts.get(name)
        if path is None and (folder / part.place).exists():
            path = folder / part.place
        setattr(decoder, name, DRAFTERS[first].cls.load(path, decoder) if path else None)
    if width is None:
        there = entry.part is None or getattr(decoder, entry.part.name) is not None
        asked = {name: value for name, value in (asked or {}).items() if value is not None}
        width = entry.cls.usual_width(decoder, asked) if there else WIDTH
        check_width(width)
    decoder.width = width
    modules = [part for part in (llama, *decoder.parts()) if hasattr(part, "modules")]
    for module in modules:
        pack(module, width)
    if compile:
        fuse_pointwise(*modules)
    decoder.warn_unless(width == 1 or rows_are_alike(llama, width))
    if device.type == "cuda" and graphs:
        decoder.use_graphs()
    return decoder


def lacks(folder, part):
    """What to say where a Part is missing; of an adapter, where there is one."""
    if part == ADAPTER and (path := trained_for(folder)):
        return f"no adapter in {folder}: give --adapter {path}, which was trained for this model"
    return f"no {part.words} for {folder}: give {part.flag} {part.metavar}{part.hint}"


class Piece(NamedTuple):
    """What a committed token adds to the text."""
    text: str      # may be empty: an unfinished character, or the end of the text
    drafted: bool
    token: int     # None for the last piece, of characters that nothing has finished
    round: Round
    seconds: float  # that the round took, in its first piece; else 0


class Decoder:
    """A model that is ready to decode, with its tokenizer and chat template, and of what drafters
    need (`load`) the attributes adapter, heads, draft_model, datastore, None where there is none.
    `notes` are lines on what the folder does not say, or asks for and does not get.
    """

    def __init__(self, folder, model, tokenizer, chat, template, width=WIDTH, exit_layer=None):
        self.folder, self.model, self.tokenizer = folder, model, tokenizer
        self.chat, self.template, self.width = chat, template, width
        self.notes = [note for note in (template and template.note, not_followed(folder)) if note]
        self.asked_exit_layer = exit_layer  # None: the adapter's own
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        self.graphed, self.graph_words = False, ""
        for name in parts_needed():
            setattr(self, name, None)

    def parts(self):
        """What there is of what drafters need."""
        return [part for name in parts_needed() if (part := getattr(self, name)) is not None]

    def warn_unless(self, rows_alike):
        if not rows_alike:
            say(f"warning: {self.device} does not treat the rows of a {self.dtype} step of width "
                f"{self.width} alike, so the output may differ from vanilla decoding")

    def use_graphs(self, record=None):
        """Replay the decode steps from here on; `record` as in `graphs.Graphs`."""
        # Steps of one row are what speeds are compared with.
        self.graphed, self.model = True, GraphedLlama(self.model, (1, self.width), record)
        for name in parts_needed():
            setattr(self, name, graph_part(getattr(self, name), self.model, self.width, record))

    def encode(self, *turns):
        """Turns of user, assistant, user, … (usually one) -> the ids that decoding starts from."""
        ids, config = encode_chat(self.tokenizer, self.template, turns), self.model.config
        context = config.max_position_embeddings
        limit = "sliding_window" if config.sliding_window else "max_position_embeddings"
        require(0 < len(ids) < context, f"the prompt has {len(ids)} tokens, it must have from 1 to "
                f"{context - 1} ({limit} {context})")
        return ids

    def settings(self, drafter="kangaroo", **asked):
        """The Settings of a drafter: those asked for, None leaves it to the adapter's or the usual.

        UserError for what the drafter does not have, or it or the width does not allow; TypeError
        for a name that no drafter has.
        """
        entry = drafter_named(drafter)
        self.require_part(entry.part)
        cls, asked = entry.cls, {name: v for name, v in asked.items() if v is not None}
        values = cls.usual(self)
        for name in asked.keys() - values.keys():
            if not any(name in other.settings for other in DRAFTERS.values()):
                raise TypeError(f"unexpected keyword argument {name!r}: {drafter} has "
                                f"{', '.join(values)}")
            raise UserError(f"--{name.replace('_', '-')}: --drafter {drafter} has none, it has "
                            f"{', '.join(values)}")
        values |= {name: min(values[name], self.width - 1) for name in ("steps", "nodes")
                   if name in values}
        settings = Settings(**values | asked)
        cls.check(settings, self.width)
        return settings

    def require_part(self, part):
        """UserError unless there is this Part, or none is needed."""
        if part and getattr(self, part.name) is None:
            raise UserError(lacks(self.folder, part))

    def describe(self, drafter="kangaroo", settings=None):
        """All that decides what is decoded and how fast, in one line."""
        parts = [self.describe_model(), self.describe_drafter(drafter, settings),
                 f"width {self.width}"]
        if self.model.config.sliding_window:
            parts.append(f"context {self.model.config.sliding_window} (sliding_window)")
        return " · ".join(parts) + self.graph_words

    def describe_model(self):
        return " · ".join([self.folder.name, str(self.device),
                           str(self.dtype).removeprefix("torch."), f"chat template {self.chat}"])

    def describe_drafter(self, drafter, settings=None):
        cls = drafter_named(drafter).cls
        words = cls.describe(self, settings or self.settings(drafter))
        return f"drafter {words or drafter}"

    def make_room(self, prompts, max_new_tokens):
        """Before decoding these lists of ids with graphs: room in the caches for the longest.

        So it need not be made twice, and nothing recorded twice. Returns the first and the last
        position where a step will start.
        """
        first = min(map(len, prompts)) - 1
        context = self.model.config.max_position_embeddings
        end = min(max(map(len, prompts)) + max_new_tokens, context)
        steps = first, max(first, end - 2)
        if self.graphed:
            for part in (self.model, *self.parts()):
                if isinstance(part, GraphedLlama):
                    part.capacity = end + 2 * self.width
            self.graph_words = f" · {self.model.describe(*steps)}"
            self.warn_unless(self.width == 1 or self.model.are_alike(*steps))
        return steps

    def warm_up(self, prompts, max_new_tokens, methods, sampler=None, settings=None):
        """Before these lists of ids are decoded and timed: all that happens only once.

        The first pass over a shape compiles kernels, and with graphs the first in a view of the
        cache is recorded. So each of `methods`, pairs of a drafter and the rows of a step as
        `rounds` takes them, decodes a round in every view that the texts reach; and at its edge one
        that follows a round without a draft, when the adapter is a row late.
        """
        steps = self.make_room(prompts, max_new_tokens)
        for drafter, width in methods:
            starts = self.model.starts(*steps, width or self.width) if self.graphed else steps[:1]
            for start in starts:
                text = prompts[0] * (1 + start // len(prompts[0]))
                for before in (0, 1) if start > steps[0] else (0,):
                    rounds = self.rounds(text[:start + 1 - before], drafter, self.width + 1,
                                         sampler, width, settings, eos=())
                    list(islice(rounds, 1 + before))

    def drafter(self, name="kangaroo", settings=None):
        """A drafter by its name."""
        entry = drafter_named(name)
        self.require_part(entry.part)
        make = GRAPHED.get(entry.cls, entry.cls) if self.graphed else entry.cls
        return make.make(self, settings or self.settings(name))

    def rounds(self, ids, drafter="kangaroo", max_new_tokens=128, sampler=None, width=None,
               settings=None, eos=None):
        """Decode a list of ids; returns an iterator of a `kangaroo.Round` for every verification.

        drafter: a name that drafters/table.py has, or a drafter of one's own. sampler: None is
        greedy. width: None is the decoder's own, which the weights are packed for. settings: as
        `self.settings` returns them. eos: the ids that end a text; None is the model's own.
        """
        named = isinstance(drafter, str)
        settings = settings or self.settings(drafter if named else "none")
        drafter = self.drafter(drafter, settings) if named else drafter
        eos = self.model.config.eos_token_ids if eos is None else eos
        width = width or self.width
        if self.graphed:
            sampler = GraphedSampler(sampler or Sampler(), self.model, width)
        return self.explain_nan(generate(self.model, drafter, ids, max_new_tokens, settings.steps,
                                         sampler, eos, width))

    def explain_nan(self, rounds):
        """The rounds; where logits are not finite, the error names the layer where that begins."""
        try:
            yield from rounds
        except NotFinite as e:
            where = find_nonfinite(self.model, e.ids)
            raise UserError(f"NaN or infinite values come out of {where}: damaged weights, or too "
                            f"large for {self.dtype} (see --dtype)") from None

    def stream(self, prompt, drafter="kangaroo", max_new_tokens=128, sampler=None, *,
               on_draft=None, temperature=None, top_k=0, top_p=1.0, seed=0, **settings):
        """Decode a prompt, its text or a list of ids; returns an iterator of a Piece a token.

        drafter: a name, or a drafter of one's own. sampler: a Sampler, or instead of it
        `temperature` (None is greedy) and the others. settings: what the drafter has, as steps,
        threshold, top_candidates, nodes. on_draft(text) is called whenever the draft has grown,
        while the next Piece is on its way.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if temperature is not None:
            require(sampler is None, "give a sampler or a temperature, not both")
            sampler = Sampler(temperature, top_k, top_p, seed)
        named = isinstance(drafter, str)
        require(named or settings.keys() <= {"steps"}, f"{', '.join(settings)}: a drafter of one's "
                "own has its settings already, but for steps")
        settings = self.settings(drafter if named else "none", **settings)
        if on_draft:
            drafter = self.drafter(drafter, settings) if named else drafter
        return self.pieces(ids, drafter, max_new_tokens, sampler, settings, on_draft)

    def pieces(self, ids, drafter, max_new_tokens, sampler, settings, on_draft):
        text, eos = TextStream(self.tokenizer, ids), self.model.config.eos_token_ids
        begun = self.chat == "none"  # an answer begins with its first word

        def trim(piece):
            return piece if begun else piece.lstrip()

        if on_draft:
            drafter = WatchedDrafter(drafter, lambda tokens: on_draft(trim(text.preview([
                token for token in tokens if token not in eos]))))
        round_ = None
        for round_, seconds in timed(self.rounds(ids, drafter, max_new_tokens, sampler,
                                                 settings=settings)):
            for i, token in enumerate(round_.tokens):
                piece = "" if token in eos else trim(text.push(token))
                begun = begun or bool(piece)
                yield Piece(piece, i < round_.accepted, token, round_, 0.0 if i else seconds)
        if rest := trim(text.flush()):
            yield Piece(rest, False, None, round_, 0.0)

    def generate(self, prompt, drafter="kangaroo", max_new_tokens=128, sampler=None, **options):
        """Decode a prompt, as `stream` does. Returns (text, statistics).

        Statistics are what --json prints: ids, and for each round the numbers of tokens drafted and
        accepted.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        pieces = list(self.stream(ids, drafter, max_new_tokens, sampler, **options))
        statistics = statistics_of(ids, pieces, self.drafts_trees(drafter))
        return statistics["text"], statistics

    def drafts_trees(self, drafter):
        """Whether the drafts of a drafter, or of its name, are trees."""
        cls = drafter_named(drafter).cls if isinstance(drafter, str) else type(drafter)
        return hasattr(cls, "drafts_trees") and cls.drafts_trees(self.width)


def statistics_of(ids, pieces, trees=False):
    """What --json prints of a decoded text, from its prompt's ids and its pieces."""
    rounds = list({id(piece.round): piece.round for piece in pieces}.values())
    result = {"prompt_ids": ids, "ids": [token for r in rounds for token in r.tokens],
              "text": "".join(piece.text for piece in pieces), "rounds": len(rounds),
              "drafted": [len(r.draft.tokens) for r in rounds],
              "accepted": [r.accepted for r in rounds],
              "seconds": sum(piece.seconds for piece in pieces)}
    if trees:
        return result | {"trees": [{"tokens": r.draft.tokens, "parents": r.draft.parents,
                                    "confidence": r.draft.confidence, "accepted": r.path}
                                   for r in rounds]}
    # Of the rounds that drafted at least so many tokens, the share that accepted as many.
    pairs, longest = list(zip(result["drafted"], result["accepted"])), max(result["drafted"])
    result["accepted_by_position"] = [
        sum(a >= w for _, a in pairs) / sum(d >= w for d, _ in pairs)
        for w in range(1, longest + 1)]
    return result


def seed_of(seed, prompt, sample=0):
    """The seed of a prompt's sample, both counted from 0: the texts of one run draw independently.

    The first sample of the first prompt has `seed` itself, so a run of one text is as it was.
    """
    if prompt == sample == 0:
        return seed
    key = hashlib.blake2b(f"{seed} {prompt} {sample}".encode(), digest_size=6).digest()
    return int.from_bytes(key, "little")


def timed(iterator):
    """(item, seconds that it took) of each item."""
    while True:
        begin = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - begin
