"""One call from a model folder to text: for those who fork, for the command line, for bench/.

    from support.decoder import load
    decoder = load("models/stories")
    text, statistics = decoder.generate("Once upon a time", max_new_tokens=64)

    load: device and dtype, model, adapter, tokenizer, fast weights, self-check  ->  Decoder
    Decoder.encode -> ids;  .rounds -> what `kangaroo.generate` yields;  .generate -> text

Nothing of the algorithm. Left out on purpose: several texts at once.
"""
import hashlib
import sys
import time
import weakref
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from drafters.lookahead import LookaheadDrafter
from drafters.lookup import PromptLookupDrafter
from drafters.medusa import MedusaDrafter
from drafters.rest import REST_STEPS, RestDrafter
from drafters.sps import SPS_THRESHOLD, SpsDrafter
from drafters.tree import TOP_CANDIDATES, TREE_STEPS, TREE_THRESHOLD, TreeDrafter
from kangaroo import STEPS, THRESHOLD, WIDTH, KangarooDrafter, NoDrafter, generate
from llama import CHAIN_WIDTH, MAX_WIDTH, pack, rows_are_alike
from support.chat import encode_chat, find_chat_template
from support.checkpoint import load_adapter, load_heads, load_llama, read_config
from support.datastore import read_datastore
from support.errors import UserError
from support.graphs import (
    GraphedAdapter,
    GraphedLlama,
    GraphedSampler,
    exact_kernels,
    fuse_pointwise,
    graph_drafter,
)
from support.tokenizer import TextStream, Tokenizer, difference

import torch

DEFAULT_MODEL = Path(__file__).parents[1] / "models" / "stories"
DRAFTERS = {"kangaroo": KangarooDrafter, "tree": TreeDrafter, "medusa": MedusaDrafter,
            "medusa-tree": MedusaDrafter, "lookahead": LookaheadDrafter,
            "lookup": PromptLookupDrafter, "sps": SpsDrafter, "rest": RestDrafter,
            "none": NoDrafter}
ADAPTED = "kangaroo", "tree"  # the drafters that need an adapter
HEADED = "medusa", "medusa-tree"  # those that need Medusa heads
# What other drafters need: the attribute of Decoder, and the flag.
NEEDS = {"sps": ("draft_model", "--draft-model DIR"), "rest": ("datastore", "--datastore FILE")}
TREES = {"kangaroo": "tree", "medusa": "medusa-tree"}  # what --tree makes of a drafter


def pick_device_and_dtype(device=None, dtype=None, tf32=False):
    """(torch.device, torch.dtype) of their names; None is the best there is.

    That is CUDA, else the CPU, and bfloat16 where the device is fast at it. UserError for a device
    that is not there or a dtype that is not supported. Sets up CUDA's kernels.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device}: no such device, choose cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: not supported, choose cpu or cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {device}: PyTorch sees {count} CUDA devices here")
    fast = device.type == "cuda" or (torch.backends.mkldnn.is_available()
                                     and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    dtype = dtype or ("bfloat16" if fast else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: not supported, choose float32, bfloat16 or float16")
    if device.type == "cuda":
        exact_kernels(tf32)
    return device, getattr(torch, dtype)


def load(model=DEFAULT_MODEL, adapter=None, device=None, dtype=None, width=WIDTH, chat=None,
         exit_layer=None, tf32=False, compile=False, graphs=True, system=None, heads=False,
         draft_model=False, datastore=None):
    """A Decoder for a model folder.

    adapter: its folder, or "random"; None: the folder `adapter` in the model's, if there is one;
    False: none. heads: the same of Medusa heads and the folder `medusa`. device, dtype, chat:
    names, None chooses. width: rows of a step; a tree needs more than 8. exit_layer: overrides the
    adapter's. tf32, compile, graphs: for a GPU only. system: a message before all turns, if the
    chat template takes one; where the folder has no template, `template.note` says what is taken.
    draft_model: the same of a small model, for the drafter sps, and the folder `draft`. datastore:
    a file, for the drafter rest.
    UserError says what does not fit, and how it would.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, --model wants one with config.json and "
                        "*.safetensors or pytorch_model*.bin")
    if not 1 <= width <= MAX_WIDTH:
        raise UserError(f"--width {width}: must be from 1 to {MAX_WIDTH}")
    device, dtype = pick_device_and_dtype(device, dtype, tf32)
    chat, template = find_chat_template(folder, chat, system)
    tokenizer = Tokenizer(folder, read_config(folder))
    if draft_model is None and (folder / "draft").is_dir():
        draft_model = folder / "draft"
    draft_model = load_draft_model(Path(draft_model), folder, tokenizer, device, dtype,
                                   width) if draft_model else None
    if datastore is not None:
        datastore = read_datastore(datastore, tokenizer, read_config(folder).vocab_size)
    llama, facts = load_llama(folder, device, dtype), {}
    llama.config = tokenizer.with_ends(llama.config)
    if adapter is None and (folder / "adapter").is_dir():
        adapter = folder / "adapter"
    adapter = adapter or None
    if adapter is not None:
        adapter, facts = load_adapter(adapter, llama, exit_layer)
        pack(adapter, width)
    if heads is None and (folder / "medusa").is_dir():
        heads = folder / "medusa"
    heads = pack(load_heads(heads, llama), width) if heads else None
    pack(llama, width)
    if compile:
        fuse_pointwise()
    decoder = Decoder(folder, llama, tokenizer, chat, template, adapter, facts, width, heads,
                      draft_model, datastore)
    decoder.warn_unless(width == 1 or rows_are_alike(llama, width))
    if device.type == "cuda" and graphs:
        decoder.use_graphs()
    return decoder


def load_draft_model(folder, target, tokenizer, device, dtype, width):
    """The Llama of a folder, packed; UserError unless it has the tokenizer of the folder `target`.

    What it says in other tokens, the target would never accept.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, --draft-model wants that of a small model")
    if what := difference(tokenizer, Tokenizer(folder, read_config(folder))):
        raise UserError(f"{folder}: has another tokenizer than {target} ({what}), --draft-model "
                        "wants a model with the same")
    model = pack(load_llama(folder, device, dtype), width)
    model.source = str(folder)  # as an adapter has it
    return model


@dataclass
class Settings:
    """How to draft: γ, η, and for a tree the most children of a node and the most nodes."""
    steps: int
    threshold: float
    top_candidates: int = 1
    nodes: int = 0


class Decoder:
    """A model, its tokenizer and what drafters need, ready to decode one prompt after another."""

    def __init__(self, folder, model, tokenizer, chat, template, adapter, facts, width,
                 heads=None, draft_model=None, datastore=None):
        self.folder, self.model, self.tokenizer, self.width = folder, model, tokenizer, width
        self.chat, self.template = chat, template
        self.adapter, self.facts = adapter, facts  # facts: the adapter's config.json
        self.heads = heads  # Medusa's
        self.exit_layer = facts.get("exit_layer", 0)
        self.draft_model, self.datastore = draft_model, datastore
        self.device, self.dtype = model.norm.weight.device, model.norm.weight.dtype
        self.graphed, self.room = False, ""

    def warn_unless(self, rows_alike):
        if not rows_alike:
            print(f"warning: {self.device} does not treat the rows of a {self.dtype} step of width "
                  f"{self.width} alike, so the output may differ from vanilla decoding",
                  file=sys.stderr)

    def use_graphs(self, record=None):
        """Replay the decode steps from here on; `record` as in `graphs.Graphs`."""
        # Steps of one row are what speeds are compared with.
        self.graphed, self.model = True, GraphedLlama(self.model, (1, self.width), record)
        self.adapter = self.adapter and GraphedAdapter(self.adapter, self.model)
        if self.draft_model:
            self.draft_model = GraphedLlama(self.draft_model, (self.width,), record)

    def encode(self, *turns):
        """Turns of user, assistant, user, … (usually one) -> the ids that decoding starts from."""
        ids = encode_chat(self.tokenizer, self.template, turns)
        context = self.model.config.max_position_embeddings
        if not 0 < len(ids) < context:
            limit = "sliding_window" if self.model.config.sliding_window else (
                "max_position_embeddings")
            raise UserError(f"the prompt has {len(ids)} tokens, it must have from 1 to "
                            f"{context - 1} ({limit} {context})")
        return ids

    def settings(self, drafter="kangaroo", **wanted):
        """The Settings of a drafter: those wanted, else its adapter's, else the paper's.

        UserError for what the drafter or the width does not allow.
        """
        if drafter not in DRAFTERS:
            raise UserError(f"--drafter {drafter}: no such drafter, choose from "
                            f"{', '.join(DRAFTERS)}")
        if drafter in ADAPTED and self.adapter is None:
            raise UserError(f"no adapter for {self.folder}: give --adapter DIR (or `random`), or "
                            "--drafter lookup or none")
        needed, flag = NEEDS.get(drafter, ("model", ""))
        if getattr(self, needed) is None:
            raise UserError(f"--drafter {drafter}: give {flag} too")
        if drafter in HEADED and self.heads is None:
            raise UserError(f"no Medusa heads for {self.folder}: give --adapter DIR")
        found, width = asdict(Settings(STEPS, THRESHOLD)), self.width
        facts = self.facts if drafter in ADAPTED else {}
        if drafter == "tree":  # what suits a chain need not suit a tree
            found = asdict(Settings(TREE_STEPS, TREE_THRESHOLD, TOP_CANDIDATES, width))
            facts = facts.get("tree", {})
        elif drafter == "sps":
            found["threshold"] = SPS_THRESHOLD
        elif drafter == "rest":
            found |= {"steps": REST_STEPS, "nodes": width}
        elif drafter in HEADED:
            heads = self.heads
            found = asdict(Settings(len(heads.heads), 0.0, nodes=len(heads.tree)))
        elif drafter == "lookahead":
            LookaheadDrafter(self.model, width)  # refuses a width that is too small
            found = asdict(Settings(width - 1, 0.0))
        found |= {name: facts[name] for name in found if name in facts}
        found |= {name: min(found[name], width - 1) for name in ("steps", "nodes")}
        found |= {name: value for name, value in wanted.items() if value is not None}
        steps, threshold, candidates, nodes = found.values()
        below = f"one less than --width {width}"
        for fits, message in (
                (0 <= steps < width, f"--steps {steps}: must be from 0 to {width - 1}, {below}"),
                (0 <= threshold <= 1, f"--threshold {threshold}: must be in [0, 1]"),
                (drafter not in TREES.values() or width > CHAIN_WIDTH,
                 f"--width {width}: must be above {CHAIN_WIDTH} for --tree"),
                (drafter != "tree" or candidates >= 1,
                 f"--top-candidates {candidates}: must be at least 1"),
                (drafter not in (*TREES.values(), "rest") or min(1, width - 1) <= nodes < width,
                 f"--nodes {nodes}: must be from 1 to {width - 1}, {below}")):
            if not fits:
                raise UserError(message)
        return Settings(**found)

    def describe(self, drafter="kangaroo", settings=None):
        """All that decides what is decoded and how fast, in one line."""
        parts = [self.describe_model(), self.describe_drafter(drafter, settings),
                 f"width {self.width}"]
        if self.model.config.sliding_window:
            parts.append(f"context {self.model.config.sliding_window} (sliding_window)")
        return " · ".join(parts) + self.room

    def describe_model(self):
        return " · ".join([self.folder.name, str(self.device),
                           str(self.dtype).removeprefix("torch."), f"chat template {self.chat}"])

    def describe_drafter(self, drafter, settings=None):
        if drafter not in (*ADAPTED, *NEEDS, *HEADED):
            return f"drafter {drafter}"
        s = settings or self.settings(drafter)
        if drafter in ADAPTED:
            text = f"drafter exit layer {self.exit_layer}, γ {s.steps}, η {s.threshold:g}"
            if drafter == "tree":
                return text + f", tree of {s.nodes} nodes, {s.top_candidates} candidates"
        elif drafter in NEEDS:
            source = getattr(self, NEEDS[drafter][0]).source
            text = f"drafter {drafter} with {Path(source).name}, γ {s.steps}"
            text += f", η {s.threshold:g}" if drafter == "sps" else ""
        else:
            text = f"drafter medusa, {len(self.heads.heads)} heads, γ {s.steps}"
        return text + (f", tree of {s.nodes} nodes" if self.drafts_trees(drafter) else "")

    def drafts_trees(self, drafter):
        """Whether its drafts are trees; those of rest are chains where a step has no trees."""
        return drafter in (*TREES.values(), "lookahead") or (
            drafter == "rest" and self.width > CHAIN_WIDTH)

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
            self.model.room = end + 2 * self.width
            if self.draft_model:
                self.draft_model.room = self.model.room
            self.room = f" · {self.model.describe(*steps)}"
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

    def drafter(self, name="kangaroo", sampler=None, settings=None, width=None):
        """A drafter for one text, by its name in DRAFTERS."""
        settings = settings or self.settings(name)
        width = width or self.width
        if name in HEADED:
            tree = self.heads.tree[:settings.nodes] if name == "medusa-tree" else None
            return MedusaDrafter(self.model, self.heads, sampler, width, tree)
        if name == "lookahead":
            return LookaheadDrafter(self.model, width)
        if name == "sps":
            return SpsDrafter(self.model, self.draft_model, settings.threshold, sampler, width)
        if name == "rest":
            return RestDrafter(self.model, self.datastore, width, settings.nodes)
        if name not in ADAPTED:
            return DRAFTERS[name](self.model)
        more = (settings.top_candidates, settings.nodes) if name == "tree" else ()
        drafter = DRAFTERS[name](self.model, self.adapter, self.exit_layer, settings.threshold,
                                 sampler, width, *more)
        return graph_drafter(drafter) if self.graphed else drafter

    def rounds(self, ids, drafter="kangaroo", max_new_tokens=128, sampler=None, width=None,
               settings=None, eos=None):
        """Decode a list of ids; yields a `kangaroo.Round` for every verification.

        drafter: a name in DRAFTERS, or a drafter of one's own. sampler: None is greedy. width: None
        is the decoder's own, which the weights are packed for. settings: as `self.settings` returns
        them. eos: the ids that end a text; None is the model's own.
        """
        named = isinstance(drafter, str)
        settings = settings or self.settings(drafter if named else "none")
        drafter = self.drafter(drafter, sampler, settings, width) if named else drafter
        eos = self.model.config.eos_token_ids if eos is None else eos
        width = width or self.width
        if self.graphed and sampler:
            sampler = GraphedSampler(sampler, self.model, width)
        return generate(self.model, drafter, ids, max_new_tokens, settings.steps, sampler, eos,
                        width)

    def generate(self, prompt, drafter="kangaroo", max_new_tokens=128, sampler=None,
                 show=lambda text, drafted: None, watch=lambda round_: None, drafting=None,
                 **settings):
        """Decode a prompt: its text, or a list of ids. Returns (text, statistics).

        sampler: None is greedy. settings: steps, threshold, top_candidates, nodes. Statistics are
        what --json prints: ids, and for each round the numbers of tokens drafted and accepted.
        While decoding, drafting(text) is called whenever the draft has grown; after a verification
        watch(round), then show(text, whether it was drafted) a token.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        settings = self.settings(drafter, **settings)
        stream, eos = TextStream(self.tokenizer, ids), self.model.config.eos_token_ids
        result = {"prompt_ids": ids, "ids": [], "text": "", "rounds": 0, "drafted": [],
                  "accepted": [], "seconds": 0.0}
        trees = result.setdefault("trees", []) if self.drafts_trees(drafter) else None

        def begun(text):
            # An answer begins with its first word.
            return text if result["text"] or self.chat == "none" else text.lstrip()

        def put(text, drafted):
            text = begun(text)
            result["text"] += text
            show(text, drafted)

        if drafting:
            drafter = watch_drafts(
                self.drafter(drafter, sampler, settings),
                lambda tokens: drafting(begun(stream.preview([
                    token for token in tokens if token not in eos]))))
        rounds = self.rounds(ids, drafter, max_new_tokens, sampler, settings=settings)
        for round_, seconds in timed(rounds):
            draft = round_.draft
            result["seconds"] += seconds
            result["rounds"] += 1
            result["ids"] += round_.tokens
            result["drafted"].append(len(draft.tokens))
            result["accepted"].append(round_.accepted)
            watch(round_)
            if trees is not None:
                trees.append({"tokens": draft.tokens, "parents": draft.parents,
                              "confidence": draft.confidence, "accepted": round_.path})
            for i, token in enumerate(round_.tokens):
                if token not in eos:
                    put(stream.push(token), i < round_.accepted)
        put(stream.flush(), False)
        return result["text"], result


def watch_drafts(drafter, saw):
    """Have saw(tokens) called whenever the draft has grown; returns the drafter.

    A drafter that proposes tokens one by one is seen doing so. Of a tree, each node's first child.
    """
    tokens = []

    def watched_draft(draft, *arguments):
        tokens.clear()
        result, path, node = draft(*arguments), [], 0
        while node in result.parents:
            node = 1 + result.parents.index(node)
            path.append(result.tokens[node - 1])
        saw(path)
        return result

    def watched_propose(propose, *arguments):
        found = propose(*arguments)
        tokens.append(found[0])
        saw(tokens)
        return found

    call_through(drafter, "draft", watched_draft)
    if hasattr(drafter, "propose"):
        call_through(drafter, "propose", watched_propose)
    return drafter


def call_through(drafter, name, function):
    """From now on drafter.name(…) is function(the method, …).

    Nothing of it keeps the drafter alive: with a cycle its cache would be taken until some garbage
    collection, and the next text be decoded without CUDA graphs.
    """
    method, this = getattr(type(drafter), name), weakref.ref(drafter)
    setattr(drafter, name, lambda *arguments: function(partial(method, this()), *arguments))


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
