"""Kangaroo: lossless self-speculative decoding with two early exits (Liu et al., NeurIPS 2024, arXiv 2404.18911).

    prompt ids -> prefill -> (draft -> verify -> commit)* -> ids

The first ℓ layers of the model, a small adapter and the model's own LM head draft tokens one by one (first early exit);
drafting stops as soon as the draft is unsure (second early exit). The remaining layers then verify all drafted tokens in
one pass that resumes from the hidden states which the first ℓ layers have already computed.

The output equals vanilla decoding bit for bit, greedy and sampled: see `one_shape` and `Sampler` in `llama.py`.

**One fact carries all state: `ids`, the committed tokens.** Between rounds every cache is valid for the positions
0 … len(ids) − 2; the last committed token has not been run yet. Undoing a rejected draft is therefore no work at all.

Left out on purpose: batches. Read first `generate`, then `KangarooDrafter.draft`; then `train_adapter.py`.
"""
import argparse
import contextlib
import json
import math
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch
import torch.nn as nn

from graphs import GraphedAdapter, GraphedLlama, exact_kernels, fuse_pointwise, graph_drafter
from llama import (
    CHAIN_WIDTH,
    MLP,
    Attention,
    KVCache,
    Linear,
    LlamaConfig,
    RMSNorm,
    Rows,
    Sampler,
    UserError,
    build,
    find_nonfinite,
    load_llama,
    load_weights,
    one_shape,
    pack,
    read_json,
    room_for_draft,
    rows_are_alike,
    safetensors_entries,
    to_device,
)
from replay import Recorder, write_page
from tokenizer import CHAT_TEMPLATES, TextStream, Tokenizer, find_chat_template, render_chat

# The paper's γ and η, and the rows of a step: room for the last committed token and up to 7 drafted ones.
STEPS, THRESHOLD, WIDTH = 6, 0.6, 8
# The same for a tree, and the most children of a node. A wider step costs more, vanilla's too.
TREE_STEPS, TREE_THRESHOLD, TREE_WIDTH, TOP_CANDIDATES = 8, 0.2, 16, 10
PREFILL_ROWS = 256  # rows of a prompt that run at once


# What an adapter's config.json may choose: for a chain, and under the key `tree` for a tree.
SETTINGS = {"steps": int, "threshold": (int, float), "top_candidates": int, "nodes": int}

# ---------------------------------------------------------------------------------------------------------------------
# The algorithm

@dataclass
class Draft:
    """A tree of n proposed tokens. Node 0, its root, is the last committed token; node i > 0 proposes tokens[i − 1]."""
    tokens: list          # n ids
    hidden: torch.Tensor  # (1, 1 + n, hidden_size): last committed token and proposals, before layer `drafter.depth`
    confidence: list = field(default_factory=list)  # top-1 probability of the distribution that each token came from
    parents: list = None  # of the nodes 1 … n, each before its children; None: a chain, each node's parent is the one before

    def __post_init__(self):
        self.parents = list(range(len(self.tokens))) if self.parents is None else self.parents

    def depth(self):
        """How many steps below the root each of the n + 1 nodes is."""
        depth = [0]
        for parent in self.parents:
            depth.append(depth[parent] + 1)
        return depth

    def child(self, node, token):
        """The child of `node` that proposes `token`; 0 if there is none."""
        return next((i for i, edge in enumerate(zip(self.parents, self.tokens), 1) if edge == (node, token)), 0)


@dataclass
class Round:
    """What one verification committed: the accepted part of the draft and, unless that ended the text, one token more."""
    tokens: list
    path: list  # the accepted nodes of the draft, from the top down; tokens[i] is what path[i] proposed
    draft: Draft

    @property
    def accepted(self):
        """How many of `tokens` were drafted."""
        return len(self.path)


class Adapter(nn.Module):
    """norm → attention → residual → norm on the states of the exit layer; no MLP. The target's own LM head follows."""

    def __init__(self, config):
        super().__init__()
        self.config = config  # a LlamaConfig with num_hidden_layers = 1
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = self.vocabulary = None  # see draft_from

    def forward(self, x, positions, cache=None):
        rows = Rows.at(self.config, positions, x, cache)
        return self.norm(x + self.self_attn(self.input_layernorm(x), rows, cache))

    def draft_from(self, vocabulary, lm_head):
        """Draft from the token ids `vocabulary` (N,) alone, with their rows of the LM head: a cheaper draft step."""
        self.vocabulary, self.head = vocabulary, Linear(lm_head.weight.shape[1], head=len(vocabulary))
        self.head.weight = nn.Parameter(lm_head.weight[vocabulary], requires_grad=False)


class LayerAdapter(Adapter):
    """The same with an MLP after the attention: one full layer of a Llama."""

    def __init__(self, config):
        super().__init__(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, positions, cache=None):
        rows = Rows.at(self.config, positions, x, cache)
        x = x + self.self_attn(self.input_layernorm(x), rows, cache)
        return self.norm(x + self.mlp(self.post_attention_layernorm(x)))


ADAPTERS = {"attention": Adapter, "layer": LayerAdapter}  # by the name in an adapter's config.json; the first is the paper's


class NoDrafter:
    """Proposes nothing, which makes `generate` vanilla decoding. A drafter is these two methods and `depth`."""
    depth = 0  # how many of the target's layers it has run on the states that it hands over

    def __init__(self, model):
        self.model = model

    def prefill(self, ids, cache):
        """All prompt tokens but the last -> their states (1, T, hidden_size) before layer `depth`."""
        return self.model.embed(ids)

    def draft(self, ids, n_max, cache):
        """At most n_max tokens to follow the committed `ids`."""
        return Draft([], self.model.embed(ids[-1:]))


class PromptLookupDrafter(NoDrafter):
    """Proposes what followed the latest earlier occurrence of the last `ngram` tokens. No layer runs."""
    ngram = 2

    def draft(self, ids, n_max, cache):
        key = ids[-self.ngram:]
        found = next((i for i in range(len(ids) - self.ngram - 1, -1, -1) if ids[i:i + self.ngram] == key), len(ids))
        tokens = ids[found + self.ngram:][:n_max]
        return Draft(tokens, self.model.embed(ids[-1:] + tokens))


class Node(NamedTuple):
    """A drafted token while the tree grows."""
    token: int
    parent: int
    depth: int
    confidence: float  # of the token, given its path: 1 … 0, for the j-th candidate the j-th largest probability
    product: float     # of the confidences along its path


class KangarooDrafter:
    """Drafts with the first `exit_layer` layers, the adapter and the target's LM head; serves one call of `generate`.

    With `candidates` = 1 a draft is a chain. With more it is a tree of at most `nodes` tokens, grown best first.
    """

    def __init__(self, model, adapter, exit_layer, threshold=THRESHOLD, sampler=None, width=WIDTH, candidates=1, nodes=None):
        self.model, self.adapter, self.depth = model, adapter, exit_layer
        self.threshold, self.sampler, self.width = threshold, sampler or Sampler(), width
        self.candidates, self.nodes = candidates, min(nodes or width - 1, width - 1)

    def prefill(self, ids, cache):
        self.cache = self.model.new_cache(cache.length, self.adapter.config)
        self.states = self.cache.rows.new_zeros(1, cache.length, self.adapter.config.hidden_size)  # exit-layer states, by slot
        self.seen = len(ids)  # the adapter's cache is valid for positions < seen
        self.last = None  # the last draft, where its root stood, and how many of its first nodes the adapter has seen
        h = in_chunks(partial(self.model.run_layers, first=0, last=self.depth), self.model.embed(ids), cache)
        in_chunks(self.adapter, h, self.cache)
        return h

    def draft(self, ids, n_max, cache):
        start, nodes, open_from, pool = len(ids) - 1, [Node(ids[-1], 0, 0, 1.0, 1.0)], 0, []
        self.keep(ids)
        growing = n_max > 0
        while True:
            rows, parents = nodes[open_from:], [node.parent for node in nodes[1:]]
            x = one_shape(self.model.embed([node.token for node in rows]), start, cache, self.width, parents)
            h = self.model.run_layers(*x, 0, self.depth)[:, :len(rows)]  # first early exit
            self.states[:, start + open_from:start + len(nodes)] = h
            if not growing:
                draft = Draft([node.token for node in nodes[1:]], self.states[:, start:start + len(nodes)],
                              [node.confidence for node in nodes[1:]], parents)
                self.last = draft, start, open_from
                return draft
            if open_from:
                x = self.adapter(*one_shape(h, start, self.cache, self.width, parents))[0, :len(rows)]
            else:
                x = self.adapt(start + 1)
            pool += self.children(x, rows, open_from, start)
            # Best first: of the candidates that there is room for, those that are sure enough are followed further. Second
            # early exit: when none is, the others end the draft. They are chosen already, so they are verified too.
            pool.sort(key=lambda node: -node.product)
            best = pool[:self.nodes + 1 - len(nodes)]
            sure = [node for node in best if node.depth < n_max and not node.confidence <= self.threshold]
            open_from, pool = len(nodes), [node for node in pool if node not in sure]
            nodes += sure or best
            growing = bool(sure) and len(nodes) <= self.nodes

    def children(self, x, rows, first, start):
        """The candidates that follow the open nodes `rows`, whose first is node `first`, from the adapter's states x."""
        logits, sure = self.predict(x)
        tokens = self.sampler.candidates(logits, start + 1, [node.depth for node in rows], sure.shape[1])
        drafted = torch.stack((tokens.double(), sure.double()), -1).tolist()  # one host sync
        return [Node(int(token), parent, node.depth + 1, p, node.product * p) for parent, (node, candidates)
                in enumerate(zip(rows, drafted), first) for token, p in candidates if token >= 0]

    def predict(self, x):
        """The adapter's states (T, hidden_size) -> logits (T, vocab_size), and the K highest probabilities (T, K) float32."""
        logits = (self.adapter.head or self.model.lm_head)(x)
        probabilities = (logits.float() / (self.sampler.temperature or 1)).softmax(-1)
        sure = probabilities.max(-1, keepdim=True).values if self.candidates == 1 else probabilities.topk(
            min(self.candidates, logits.shape[1])).values
        if self.adapter.vocabulary is not None:
            every = logits.new_full((len(x), self.model.config.vocab_size), -math.inf)
            logits = every.index_copy_(1, self.adapter.vocabulary, logits)
        return logits, sure

    def keep(self, ids):
        """Of the last draft, keep what became part of `ids`: the adapter's rows and the exit states of the accepted path."""
        if self.last is None:
            return
        draft, start, seen = self.last
        path, node = [], 0
        for token in ids[start + 1:]:
            if not (node := draft.child(node, token)):
                break
            path.append(node)
        self.cache.keep(start, path)
        if path != list(range(1, 1 + len(path))):
            kept = self.states[:, to_device([start + node for node in path], self.states.device)]
            self.states[:, start + 1:start + 1 + len(path)] = kept
        self.seen += sum(node < seen for node in path)

    def adapt(self, end):
        """Run the adapter on the positions < end that it has not seen; its state (1, hidden_size) at end − 1.

        That is one position, or after a fully accepted path two: its last token was run but never drafted from.
        """
        while self.seen < end:
            rows = self.states[:, self.seen:min(end, self.seen + self.width)]
            x = self.adapter(*one_shape(rows, self.seen, self.cache, self.width))
            self.seen += rows.shape[1]
        return x[:, rows.shape[1] - 1]


def in_chunks(run, x, cache):
    """Run a prompt's rows x (1, T, d) from position 0 on, a bounded number at a time; returns (1, T, d)."""
    chunks = []
    for start in range(0, x.shape[1], PREFILL_ROWS):
        chunk = x[:, start:start + PREFILL_ROWS]
        end = start + chunk.shape[1]
        chunks.append(run(chunk, torch.arange(start, end, device=x.device), cache.view(end)))
    return torch.cat(chunks, dim=1) if chunks else x


@torch.inference_mode()
def generate(model, drafter, prompt, max_new_tokens, steps=STEPS, sampler=None, eos=(), width=WIDTH, cache=None):
    """Yield a Round for every verification, until `max_new_tokens`, a token of `eos`, or the end of the context.

    prompt is a list of at least one token id; `steps` is γ, the most tokens drafted in a round. With any drafter, γ and
    exit layer the tokens are those of NoDrafter for the same width. Host syncs: one a round, one a drafted token.
    """
    ids, n_layers, sampler = list(prompt), len(model.layers), sampler or Sampler()
    end = min(len(ids) + max_new_tokens, model.config.max_position_embeddings)
    cache = cache or model.new_cache(end + 2 * width)
    h = drafter.prefill(ids[:-1], cache)
    in_chunks(partial(model.run_layers, first=drafter.depth, last=n_layers), h, cache)
    while len(ids) < end:
        start = len(ids) - 1  # the position of the last committed token, which has not been run yet
        draft = drafter.draft(ids, min(steps, end - len(ids) - 1, room_for_draft(start, width)), cache)
        # Verify: the remaining layers, in one pass over the last committed token and all drafted ones.
        h = model.run_layers(*one_shape(draft.hidden, start, cache, width, draft.parents), drafter.depth, n_layers)
        logits = model.logits(h)[0, :len(draft.tokens) + 1]
        choices = sampler.choose(logits, start + 1, draft.depth())  # what the target itself would say after each of them
        top = logits.gather(1, choices[:, None])[:, 0]  # NaN and infinity win every comparison, so here they show
        choices, finite = torch.stack((choices, top.isfinite())).tolist()  # one host sync
        if not all(finite):
            raise UserError(f"NaN or infinite values come out of {find_nonfinite(model, ids)}: "
                            f"damaged weights, or too large for {logits.dtype} (see --dtype)")
        path, node = [], 0  # from the root down, the child that proposes what the target itself says
        while node := draft.child(node, choices[node]):
            path.append(node)
        new = [choices[node] for node in (0, *path)]  # the accepted path says the target's choices; one more is its own
        new = new[:next((i for i, token in enumerate(new) if token in eos), len(new)) + 1]
        cache.keep(start, path)
        ids += new  # commit; the cache rows of rejected tokens are overwritten by the next round
        yield Round(new, path[:len(new)], draft)
        if new[-1] in eos:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Adapters on disk

def load_adapter(folder, model, exit_layer=None):
    """(adapter, its config.json as a dict with `exit_layer`) for this target, not packed yet; UserError if it does not fit.

    Reads config.json with adapter.safetensors, or with pytorch_model.bin as the published Kangaroo adapters have it.
    `exit_layer` overrides the config's. The name "random" gives an untrained adapter, to test with.
    """
    target, dtype, device = model.config, model.norm.weight.dtype, model.norm.weight.device
    if str(folder) == "random":
        config, data = replace(target, num_hidden_layers=1), {"exit_layer": min(2, target.num_hidden_layers - 1)}
    else:
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, --adapter wants one with config.json and adapter.safetensors")
        config, data = LlamaConfig.load(folder), read_json(folder / "config.json")
    where = folder / "config.json" if isinstance(folder, Path) else folder
    for name in ("hidden_size", "num_attention_heads", "head_dim", "vocab_size"):
        if getattr(config, name) != getattr(target, name):
            raise UserError(f"{folder}: the adapter has {name} = {getattr(config, name)}, the model {getattr(target, name)}")
    if data.get("target", model.fingerprint) != model.fingerprint:
        raise UserError(f"{where}: trained for another model (fingerprint {data['target']}, this one has {model.fingerprint}); "
                        "remove `target` to use it all the same")
    exit_layer = data.get("exit_layer") if exit_layer is None else exit_layer
    if exit_layer is None:
        raise UserError(f"{where}: names no exit_layer, give --exit-layer (the paper: 2 for 7B, 3 for 13B)")
    if not isinstance(exit_layer, int) or not 0 <= exit_layer < target.num_hidden_layers:
        raise UserError(f"exit layer {exit_layer!r}: must be at least 0 and below the model's {target.num_hidden_layers} layers")
    if not isinstance(data.get("tree", {}), dict):
        raise UserError(f"{where}: tree = {data['tree']!r} is no object with the settings of --tree")
    for settings in (data, data.get("tree", {})):
        for name, kind in SETTINGS.items():
            if name in settings and not isinstance(settings[name], kind):
                flag = name.replace("_", "-")
                raise UserError(f"{where}: {name} = {settings[name]!r} is not a number that --{flag} would take")
    architecture = data.get("architecture", "attention")
    if architecture not in list(ADAPTERS):  # a list, for JSON may hold what cannot be looked up
        raise UserError(f"{where}: architecture = {architecture!r}, choose from {', '.join(ADAPTERS)}")
    adapter = build(ADAPTERS[architecture], config, device, dtype)
    if str(folder) == "random":
        generator = torch.Generator().manual_seed(0)
        for p in adapter.parameters():  # norms are ones, matrices keep the size of what passes through
            noise = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
            p.copy_(noise if p.dim() > 1 else torch.ones_like(p))
    else:
        entries = adapter_entries(folder)
        vocabulary = entries.pop("vocabulary", None)
        load_weights(adapter, entries, folder)
        if vocabulary:
            ids = vocabulary[1]()
            if ids.is_floating_point() or ids.dim() != 1 or not len(ids) or ids.min() < 0 or ids.max() >= target.vocab_size:
                raise UserError(f"{folder}: vocabulary must be a list of token ids below vocab_size = {target.vocab_size}")
            adapter.draft_from(ids.long().to(device), model.lm_head)
    return adapter.eval(), {**data, "exit_layer": exit_layer}


def adapter_entries(folder):
    """{name: (shape, function that reads the tensor)} of an adapter folder, named as in `Adapter`."""
    entries, pickled = {}, folder / "pytorch_model.bin"
    if (folder / "adapter.safetensors").exists() or not pickled.exists():
        entries = safetensors_entries(folder / "adapter.safetensors")
    else:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on pickle protocols
                state = torch.load(pickled, map_location="cpu", weights_only=True)
            entries = {str(name): (tensor.shape, lambda tensor=tensor: tensor) for name, tensor in state.items()}
        except Exception as e:  # torch.load raises whatever a damaged pickle leads it to
            raise UserError(f"{pickled}: damaged, or holds more than tensors ({type(e).__name__})") from None
    return {k.removeprefix("layers.0."): v for k, v in entries.items() if not k.endswith("rotary_emb.inv_freq")}


# ---------------------------------------------------------------------------------------------------------------------
# Command line

DRAFTERS = {"kangaroo": KangarooDrafter, "lookup": PromptLookupDrafter, "none": NoDrafter}
DEFAULT_MODEL = Path(__file__).parent / "models" / "stories"


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, as all errors are, in place of the usage
        raise UserError(message)


def refuse_below_one(args, *names):
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")


def run_program(name, run, interrupted="interrupted"):
    """run()'s exit status, None is 0; what the user can put right ends as one line and status 2. All programs here start so."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal or a file that cannot take a character gets a ? for it
    try:
        return run() or 0
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 2


def parse_arguments(argv):
    parser = Parser(
        prog="kangaroo.py", usage="python kangaroo.py [options] --prompt TEXT", add_help=False,
        formatter_class=partial(argparse.HelpFormatter, max_help_position=23, width=110),
        description="Decode a Llama with Kangaroo's self-speculation; the output is that of vanilla decoding, bit for bit.")

    def option(name, metavar, text, default=None, **more):  # a default that depends on other things is told in the text
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(name, metavar=metavar, default=default, help=text, **more)

    greedy = Sampler()
    option("--prompt", "TEXT", "the prompt; - reads standard input")
    option("--prompts", "FILE", "instead: a prompt a line, or JSONL with `prompt` or Spec-Bench's `turns` (the first)")
    option("--model", "DIR", "a Hugging Face folder (default: models/stories)")
    option("--adapter", "DIR", "the adapter's folder, or `random` (default: the folder `adapter` in the model's)")
    option("--drafter", "NAME", "kangaroo, lookup, or none for vanilla decoding", "kangaroo")
    option("--max-new-tokens", "N", "stop after this many tokens", 128, type=int)
    option("--exit-layer", "ℓ", "layers that draft (default: the adapter's)", type=int)
    option("--steps", "γ", f"the most tokens drafted in a round, below the width (default: the adapter's or {STEPS})", type=int)
    option("--threshold", "η", f"stop drafting at this top-1 probability, 0 … 1 (default: the adapter's or {THRESHOLD})",
           type=float)
    option("--temperature", "T", "0 is greedy", greedy.temperature, type=float)
    option("--top-k", "K", "sample from the K likeliest tokens, 0 is off", greedy.top_k, type=int)
    option("--top-p", "P", "sample from the likeliest tokens of total probability P", greedy.top_p, type=float)
    option("--seed", "S", "of the sampling noise", greedy.seed, type=int)
    option("--chat", "NAME", f"chat template: {', '.join(CHAT_TEMPLATES)} (default: the model folder's, or none)")
    option("--dtype", "TYPE", "float32, bfloat16, float16 (default: bfloat16 where the device is fast at it)")
    option("--device", "DEV", "cpu, cuda, cuda:1, … (default: cuda if there is one)")
    parser.add_argument("--tree", action="store_true", help="draft a tree: where the draft is unsure, several continuations; "
                        f"γ and η are then the adapter's for a tree, or {TREE_STEPS} and {TREE_THRESHOLD}")
    option("--top-candidates", "K", f"the most children of a node of the tree (default: the adapter's or {TOP_CANDIDATES})",
           type=int)
    option("--nodes", "N", "the most tokens in the tree (default: the adapter's or one less than the width)", type=int)
    option("--width", "W", f"rows of a step (default: {WIDTH}), for a tree above {CHAIN_WIDTH} (default: {TREE_WIDTH}); "
           "1 with --drafter none is the plain baseline", type=int)
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU: start every kernel from Python, without CUDA graphs")
    parser.add_argument("--compile", action="store_true", help="on a GPU: fuse pointwise operations (starts slowly)")
    parser.add_argument("--tf32", action="store_true", help="on a GPU: let products of float32 be rounded to TF32")
    parser.add_argument("--compare", action="store_true", help="decode vanilla too: identical? (exit 1 if not), and the speedup")
    parser.add_argument("--json", action="store_true", help="write a JSON object a prompt, and nothing else, to standard output")
    option("--trace", "FILE", "write a page (HTML) that replays the decoding of one prompt round by round")
    parser.add_argument("-h", "--help", action="help", help="show this text")
    args = parser.parse_args(argv)
    if args.width is None:
        args.width = TREE_WIDTH if args.tree else WIDTH
    for fits, message in (
            ((args.prompt is None) != (args.prompts is None), "give one of --prompt TEXT and --prompts FILE (see --help)"),
            (args.drafter in DRAFTERS, f"--drafter {args.drafter}: no such drafter, choose from {', '.join(DRAFTERS)}"),
            (args.max_new_tokens >= 1, f"--max-new-tokens {args.max_new_tokens}: must be at least 1"),
            (args.width >= 1, f"--width {args.width}: must be at least 1"),
            (args.width <= KVCache.BLOCK, f"--width {args.width}: must be at most {KVCache.BLOCK}"),
            (args.trace is None or Path(args.trace).parent.is_dir() and not Path(args.trace).is_dir(),
             f"--trace {args.trace}: must be a file, in a folder that exists"),
            (args.width > 1 or args.drafter == "none", "--width 1: has no room for a draft, give --drafter none too"),
            (args.drafter == "kangaroo" or not args.tree, f"--tree: --drafter {args.drafter} drafts no tree, only kangaroo does"),
            (args.width > CHAIN_WIDTH or not args.tree, f"--width {args.width}: must be above {CHAIN_WIDTH} for --tree"),
            (args.tree or args.top_candidates is None, "--top-candidates: is for a tree, give --tree too"),
            (args.tree or args.nodes is None, "--nodes: is for a tree, give --tree too")):
        if not fits:
            raise UserError(message)
    return args


def read_prompts(args):
    """The prompts as a list of strings, none of them empty."""
    if args.prompt is not None:
        try:
            prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
            prompt.encode()  # bytes of the command line that are not UTF-8 become lone surrogates
        except UnicodeError as e:
            raise UserError(f"the prompt is not UTF-8 ({e})") from None
        if not prompt.strip():
            raise UserError("the prompt is empty, --prompt wants some text")
        return [prompt]
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompts {args.prompts}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    lines = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompts {args.prompts}: holds no prompt")
    if not (args.prompts.endswith(".jsonl") or lines[0][1].startswith("{")):
        return [line for _, line in lines]
    return [json_turns(line, f"{args.prompts}:{i}")[0] for i, line in lines]


def json_turns(line, where):
    """What the user says in a line of JSON: a list of texts, usually of one."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not valid JSON ({e})") from None
    entry = entry if isinstance(entry, dict) else {}
    turns = [entry["prompt"]] if entry.get("prompt") else entry.get("turns")
    # A lone surrogate, which JSON can escape, is no text.
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)) or any(
            "\ud800" <= c <= "\udfff" for turn in turns for c in turn):
        raise UserError(f"{where}: wants an object with a text `prompt`, or with `turns`, a list of texts")
    return turns


def pick_device_and_dtype(args):
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {args.device}: no such device, choose cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: not supported, choose cpu or cuda")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UserError(f"--device {device}: PyTorch sees {torch.cuda.device_count()} CUDA devices here")
    fast = device.type == "cuda" or torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = args.dtype or ("bfloat16" if fast else "float32")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: not supported, choose float32, bfloat16 or float16")
    if device.type == "cuda":
        exact_kernels(getattr(args, "tf32", False))  # of the programs that ask here, only some have the flag
    return device, getattr(torch, dtype)


class Decoder:
    """All that the command line needs to decode prompts one after another: model, adapter, tokenizer, settings."""

    def __init__(self, args):
        self.args, self.sampler = args, Sampler(args.temperature, args.top_k, args.top_p, args.seed)
        folder = Path(args.model) if args.model else DEFAULT_MODEL
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder, --model wants one with config.json and *.safetensors")
        device, dtype = pick_device_and_dtype(args)
        self.chat, self.template = find_chat_template(folder, args.chat)
        self.tokenizer = Tokenizer(folder, LlamaConfig.load(folder))
        self.model = load_llama(folder, device, dtype)
        self.adapter, facts = None, {}
        if args.drafter == "kangaroo":
            where = args.adapter or folder / "adapter"
            if not args.adapter and not where.is_dir():
                raise UserError(f"no adapter for {folder}: give --adapter DIR (or `random`), or --drafter lookup or none")
            self.adapter, facts = load_adapter(where, self.model, args.exit_layer)
            self.exit_layer = facts["exit_layer"]
        if args.tree:  # what suits a chain need not suit a tree
            facts = {"steps": TREE_STEPS, "threshold": TREE_THRESHOLD} | facts.get("tree", {})
        facts = {"steps": STEPS, "threshold": THRESHOLD, "top_candidates": TOP_CANDIDATES, "nodes": args.width} | facts
        facts |= {name: min(facts[name], args.width - 1) for name in ("steps", "nodes")}
        facts |= {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
        self.steps, self.threshold = facts["steps"], facts["threshold"]
        self.tree = (facts["top_candidates"], facts["nodes"]) if args.tree else (1, None)
        if not 0 <= self.steps < args.width:
            raise UserError(f"--steps {self.steps}: must be from 0 to {args.width - 1}, one less than --width {args.width}")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold {self.threshold}: must be in [0, 1]")
        if args.tree and self.tree[0] < 1:
            raise UserError(f"--top-candidates {self.tree[0]}: must be at least 1")
        if args.tree and not 1 <= self.tree[1] < args.width:
            raise UserError(f"--nodes {self.tree[1]}: must be from 1 to {args.width - 1}, one less than --width {args.width}")
        for module in (self.model, self.adapter):
            if module is not None:
                pack(module, args.width)
        if args.compile:
            fuse_pointwise()
        exact = args.width == 1 or rows_are_alike(self.model, args.width)
        if not exact:
            print(f"warning: {device} does not treat the rows of a {dtype} step of width {args.width} alike, "
                  "so the output may differ from vanilla decoding", file=sys.stderr)
        drafter = f"exit layer {self.exit_layer}, γ {self.steps}, η {self.threshold:g}" if self.adapter else args.drafter
        drafter += f", tree of {self.tree[1]} nodes, {self.tree[0]} candidates" if args.tree else ""
        self.settings = (f"{folder.name} · {device} · {str(dtype).removeprefix('torch.')} · chat template {self.chat} · "
                         f"drafter {drafter} · width {args.width}")
        self.graphs = False
        if device.type == "cuda" and not args.no_graphs and not args.trace:  # the page wants to see each layer run
            self.use_graphs()

    def use_graphs(self, record=None):
        """Replay the decode steps from here on; `record` as in `graphs.Graphs`."""
        self.graphs, self.model = True, GraphedLlama(self.model, (self.args.width,), record)
        self.adapter = self.adapter and GraphedAdapter(self.adapter, self.model)

    def encode(self, *turns):
        """Turns of user, assistant, user, … (usually one) -> the ids that decoding starts from."""
        text = render_chat(self.template, turns)
        ids, context = self.tokenizer.encode(text), self.model.config.max_position_embeddings
        if not 0 < len(ids) < context:
            raise UserError(f"the prompt has {len(ids)} tokens, it must have from 1 to {context - 1} "
                            f"(max_position_embeddings {context})")
        return ids

    def make_room(self, prompts):
        """Before decoding these lists of ids: room in the caches for the longest, so that it need not be made twice."""
        if self.graphs:
            ends = [min(len(ids) + self.args.max_new_tokens, self.model.config.max_position_embeddings) for ids in prompts]
            self.model.room = max(ends) + 2 * self.args.width
            self.settings += " · " + self.model.describe(min(map(len, prompts)) - 1, max(ends) - 2)

    def rounds(self, ids, drafter, max_new_tokens=None):
        """Decode ids with the drafter so named; yields (Round, seconds that it took)."""
        args, model = self.args, self.model
        more = ()
        if drafter == "kangaroo":
            more = self.adapter, self.exit_layer, self.threshold, self.sampler, args.width, *self.tree
        drafter = DRAFTERS[drafter](model, *more)
        if self.graphs and more:
            graph_drafter(drafter)
        rounds = generate(model, drafter, ids, max_new_tokens or args.max_new_tokens, self.steps, self.sampler,
                          model.config.eos_token_ids, args.width)
        while True:
            begin = time.perf_counter()
            round_ = next(rounds, None)
            if round_ is None:
                return
            yield round_, time.perf_counter() - begin

    def decode(self, ids, show, watch=lambda round_: None):
        """Decode ids, calling watch(round), then show(text, whether it was drafted) a token; returns what --json prints."""
        stream = TextStream(self.tokenizer, ids)
        result = {"prompt_ids": ids, "ids": [], "text": "", "rounds": 0, "drafted": [], "accepted": [], "seconds": 0.0}
        trees = result.setdefault("trees", []) if self.args.tree else None

        def put(text, drafted):
            if not result["text"] and self.chat != "none":
                text = text.lstrip()  # an answer begins with its first word
            result["text"] += text
            show(text, drafted)

        for round_, seconds in self.rounds(ids, self.args.drafter):
            result["seconds"] += seconds
            result["rounds"] += 1
            result["ids"] += round_.tokens
            result["drafted"].append(len(round_.draft.tokens))
            result["accepted"].append(round_.accepted)
            watch(round_)
            if self.args.tree:
                draft = round_.draft
                trees.append({"tokens": draft.tokens, "parents": draft.parents, "confidence": draft.confidence,
                              "accepted": round_.path})
            for i, token in enumerate(round_.tokens):
                if token not in self.model.config.eos_token_ids:
                    put(stream.push(token), i < round_.accepted)
        put(stream.flush(), False)
        return result

    def decode_vanilla(self, ids):
        """What --compare adds: vanilla decoding of the same prompt."""
        rounds = list(self.rounds(ids, "none"))
        return {"vanilla_ids": [token for round_, _ in rounds for token in round_.tokens],
                "vanilla_seconds": sum(seconds for _, seconds in rounds)}


def summary(results):
    """One line on all prompts: tokens, speed, compression rate, acceptance by position, and what --compare found."""
    tokens, seconds = sum(len(r["ids"]) for r in results), sum(r["seconds"] for r in results)
    rounds = [pair for r in results for pair in zip(r["drafted"], r["accepted"])]
    parts = [f"{tokens} tokens in {seconds:.2f} s", f"{tokens / seconds:.1f} tokens/s",
             f"compression rate {tokens / len(rounds):.2f}"]
    if "trees" in results[0]:
        drafted, accepted = (statistics.mean(pair) for pair in zip(*rounds))
        parts.append(f"{drafted:.1f} nodes drafted and {accepted:.2f} accepted a round")
    elif any(drafted for drafted, _ in rounds):
        reached = [[a >= w for d, a in rounds if d >= w] for w in range(1, max(d for d, _ in rounds) + 1)]
        parts.append("accepted by draft position " + " ".join(f"{statistics.mean(hits):.0%}" for hits in reached))
    if "identical" in results[0]:
        same = sum(r["identical"] for r in results)
        ratio = statistics.median(r["vanilla_seconds"] / r["seconds"] for r in results)
        parts.append(f"{same} of {len(results)} identical to vanilla, speedup {ratio:.2f}")
    return " · ".join(parts)


def run(args):
    """Decode all prompts and print; returns the exit status."""
    prompts = read_prompts(args)
    if args.trace and len(prompts) > 1:
        raise UserError(f"--trace {args.trace}: replays one prompt, --prompts {args.prompts} holds {len(prompts)}")
    decoder = Decoder(args)
    all_ids = [decoder.encode(prompt) for prompt in prompts]  # all errors come before any output
    decoder.make_room(all_ids)
    print(decoder.settings, file=sys.stderr)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    green, dim, plain = ("\033[32m", "\033[2m", "\033[0m") if colour else ("", "", "")

    def show(text, drafted):
        if text and not args.json:
            print(green + text + plain if drafted else text, end="", flush=True)

    results = []
    for i, (prompt, ids) in enumerate(zip(prompts, all_ids)):
        if args.compare and i == 0:  # the first pass over a shape compiles kernels: not the fault of whoever comes first
            for drafter in (args.drafter, "none"):
                list(decoder.rounds(ids, drafter, max_new_tokens=8))
        vanilla = decoder.decode_vanilla(ids) if args.compare and i % 2 else {}  # neither is always second
        if not args.json and (decoder.chat == "none" or len(prompts) > 1):
            print(f"{dim}{prompt}{plain}", end="" if decoder.chat == "none" else "\n", flush=True)
        recorder = Recorder(decoder, prompt, ids) if args.trace else None
        result = recorder.decode(show) if recorder else decoder.decode(ids, show)
        if args.compare:
            result |= vanilla or decoder.decode_vanilla(ids)
            result["identical"] = result["ids"] == result["vanilla_ids"]
        print(json.dumps(result) if args.json else "" if i + 1 == len(prompts) else "\n", flush=True)
        results.append(result)
        if recorder:
            write_page(args.trace, recorder.data(result))
    print(summary(results), file=sys.stderr if args.json else sys.stdout, flush=True)
    return 0 if all(r.get("identical", True) for r in results) else 1


def main(argv=None):
    return run_program("kangaroo.py", lambda: run(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
