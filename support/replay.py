"""Records one decode and writes it as a page that replays it (`--trace page.html`).

    Decoder.stream -> Recorder: rounds, texts, every run of a layer -> a trace -> into replay.html

A page holds a trace a method, all of the same text, and shows any two side by side: who writes a
second method's trace to the same file adds it. A draft is recorded as a tree; a chain is one. Left
out on purpose: all that is shown, but for the tables that a browser without scripts shows. The page
itself, one file without network, its styles and its script are `replay.html`, which can be read on
its own; the comment at the top of its script describes the JSON.
"""
import json
import os
from functools import partial
from html import escape
from pathlib import Path

from drafters.table import DRAFTERS, drafter_named
from kangaroo import KangarooDrafter
from support.errors import require
from support.files import lock, write_atomically

TEMPLATE = Path(__file__).with_name("replay.html")
HERE = "<!-- here replay.py puts the traces, as tables and as JSON -->"
JSON = '<script type="application/json" id="data">'
# In the JSON a token is a list of these.
DRAFTED, COMMITTED = ("id", "label", "parent", "step", "confidence"), ("id", "label", "end", "text")


class Recorder:
    """Watches a `Decoder` decode one prompt, and keeps what it commits and runs.

    settings: what `Decoder.settings` is asked for.
    """

    def __init__(self, decoder, prompt, ids, drafter, max_new_tokens, settings):
        self.decoder, self.prompt, self.ids, self.drafter = decoder, prompt, list(ids), drafter
        self.prompt_length, self.settings = len(ids), decoder.settings(drafter, **settings)
        self.threshold = getattr(self.settings, "threshold", 0.0)
        self.kangaroo = issubclass(drafter_named(drafter).cls, KangarooDrafter)
        context = decoder.model.config.max_position_embeddings
        self.end = min(len(ids) + max_new_tokens, context)
        self.rounds, self.pieces = [], []
        # Of this round, a list up to each use of the LM head: of [first layer, last + 1, slot] and
        # ["adapter", slot]. A slot is the cache row of a pass's first node: position of the last
        # committed token + node. And how many rows the LM head read.
        self.passes, self.read = [[]], []

    def watch(self, stream):
        """The pieces of a `Decoder.stream`, which are kept."""
        model, adapter = self.decoder.model, self.decoder.adapter
        watched = [(layer, partial(self.saw_layer, i)) for i, layer in enumerate(model.layers)]
        if self.kangaroo:  # the others run no layer of the target before they verify
            watched += [(model.lm_head, self.saw_head), (adapter, self.saw_adapter)]
            watched += [(adapter.head, self.saw_head)] * (adapter.head is not None)
        hooks = [module.register_forward_pre_hook(hook) for module, hook in watched]
        try:
            for piece in stream:
                if not self.pieces or piece.round is not self.pieces[-1].round:
                    self.saw_round(piece.round)
                self.pieces.append(piece)
                yield piece
        finally:
            for hook in hooks:
                hook.remove()

    def saw_layer(self, i, _, args):
        slot, runs = int(args[1].slots[0]), self.passes[-1]
        if slot < self.prompt_length - 1:
            return  # prefill
        if runs and runs[-1][1:] == [i, slot]:
            runs[-1][1] = i + 1  # the next layer of the same pass
        else:
            runs.append([i, i + 1, slot])

    def saw_adapter(self, _, args):
        _, positions, cache = args
        slot = int((positions if cache.slots is None else cache.slots)[0])
        if slot >= self.prompt_length - 1:
            self.passes[-1].append(["adapter", slot])

    def saw_head(self, _, args):
        self.passes.append([])
        self.read.append(args[0].shape[-2])

    def saw_round(self, round_):
        eos = self.decoder.model.config.eos_token_ids
        committed = [{"id": token, "label": self.label(self.ids + round_.tokens[:i], token),
                      "end": token in eos} for i, token in enumerate(round_.tokens)]
        self.rounds.append({
            "position": len(self.ids) - 1, "input": self.label(self.ids[:-1], self.ids[-1]),
            "drafted": self.nodes(round_.draft), "stopped": self.why_stopped(round_.draft),
            "accepted": round_.accepted, "path": round_.path, "committed": committed,
            "passes": self.passes[:-1] or self.passes})
        self.ids += round_.tokens
        self.passes, self.read = [[]], []

    def nodes(self, draft):
        """The drafted tokens, each with its parent's number and that of the step that chose it."""
        # What the LM head reads in a step, the step before has chosen. The verification, all rows,
        # comes last.
        step = [max(k - 1, 0) for k, rows in enumerate(self.read) for _ in range(rows)]
        step = step or [0] * (1 + len(draft.tokens))
        nodes, paths = [], [self.ids]  # the ids up to each node
        for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents)):
            nodes.append({"id": token, "label": self.label(paths[parent], token),
                          "parent": parent, "step": step[i + 1],
                          "confidence": draft.confidence[i] if draft.confidence else None})
            paths.append([*paths[parent], token])
        return nodes

    def why_stopped(self, draft):
        """What ended a draft, None if there was no more to propose.

        Kangaroo's drafters go on while they find a node that is sure and less deep than the limits
        of `generate`: so a sure node at a limit, or unsure ones alone, or no more room.
        """
        room = self.decoder.model.new_cache(0, self.decoder.width).room(len(self.ids) - 1)
        limits = {"full": self.settings.steps, "edge": room, "end": self.end - len(self.ids) - 1}
        unsure = [p <= self.threshold for p in draft.confidence]
        unsure = unsure or [False] * len(draft.tokens)
        deepest = max(depth for depth, stop in zip(draft.levels(), [False, *unsure]) if not stop)
        limit = next((name for name, limit in limits.items() if limit == deepest), None)
        return limit or ("unsure" if any(unsure[-1:]) else "nodes" if draft.confidence else None)

    def label(self, before, token):
        """How one token reads after the others: its text, or its number if it has none."""
        if token in self.decoder.model.config.eos_token_ids:
            return "‹end›"
        decode, before = self.decoder.tokenizer.decode, before[-8:]
        head, text = decode(before), decode([*before, token])
        head = head.rstrip("\ufffd")  # what a token before has begun, this one may complete
        text = text[len(head):] if text.startswith(head) else ""
        return text.replace("\ufffd", "") or f"‹{token}›"

    def trace(self, result):
        """What a page keeps; `result`: what --json prints."""
        decoder, texts = self.decoder, iter([piece.text for piece in self.pieces])
        for token in (token for round_ in self.rounds for token in round_["committed"]):
            token["text"] = next(texts)
        layers = len(decoder.model.layers)
        runs = [run for r in self.rounds for group in r["passes"] for run in group]
        tokens, rounds = len(result["ids"]), result["rounds"]
        summary = {
            "tokens": tokens, "rounds": rounds, "drafted": sum(result["drafted"]),
            "accepted": sum(result["accepted"]), "compression_rate": tokens / rounds,
            "layer_passes": sum(map(layer_passes, runs)),
            "vanilla_layer_passes": layers * tokens}
        exit_layer = decoder.adapter.exit_layer if self.kangaroo else 0
        return {
            "settings": decoder.describe(self.drafter, self.settings),
            "drafter": self.drafter,
            "prompt": self.prompt, "chat": decoder.chat, "prompt_tokens": self.prompt_length,
            "layers": layers, "exit_layer": exit_layer, "steps": self.settings.steps,
            "threshold": self.threshold, "identical": result.get("identical"),
            "rounds": self.rounds, "rest": "".join(texts), "text": result["text"],
            "summary": summary}


def layer_passes(run):
    """How many layers a recorded run went through, with however many rows.

    The adapter, one layer at most, counts as one.
    """
    return 1 if run[0] == "adapter" else run[1] - run[0]


# --------------------------------------------------------------------------------------------------
# The page

def refuse_other_files(path):
    """UserError if a file is there that `add_trace` has not written."""
    try:
        ours = Path(path).is_file() and JSON in Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        ours = False
    require(ours or not os.path.exists(path),
            f"--trace {path}: is no page that --trace has written, give another name")


def add_trace(path, trace):
    """Write a page with this trace, and with those of other methods if it holds such already.

    They must be of the same text; those of another are replaced.
    """
    def text(trace):
        return trace["prompt"], trace["chat"], [
            token["id"] for round_ in trace["rounds"] for token in round_["committed"]]

    with open(TEMPLATE) as template:
        lock(template)  # one page at a time: else of two writers the later would lose the other's
        refuse_other_files(path)
        try:
            others = [other for other in read_page(path)
                      if text(other) == text(trace) and other["drafter"] != trace["drafter"]]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            others = []
        order = list(DRAFTERS)
        traces = sorted([trace, *others], key=lambda trace: order.index(trace["drafter"]))
        write_atomically(path, page(traces).encode())


def page(traces):
    """The page of some traces; the first is shown first."""
    compact = []
    for trace in traces:
        rounds = [round_ | {name: [list(token.values()) for token in round_[name]]
                            for name in ("drafted", "committed")} for round_ in trace["rounds"]]
        compact.append(trace | {"rounds": rounds})
    # In a script element only "<" could end the JSON early or open a comment; in JSON it may be
    # written as an escape.
    data = json.dumps(compact, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    first = traces[0]
    tables = (f"<p class=card>{escape(first['prompt'])}<b>{escape(first['text'])}</b>"
              + "".join(map(table, traces)))
    head, tail = TEMPLATE.read_text(encoding="utf-8").split(HERE)
    return f"{head}<noscript>{tables}</noscript>\n{JSON}{data}</script>{tail}"


def read_page(path):
    """The traces of a page that `add_trace` wrote."""
    text = Path(path).read_text(encoding="utf-8").split(JSON)[1]
    traces = json.loads(text[:text.index("</script>")])
    for trace in traces:
        for round_ in trace["rounds"]:
            for name, keys in (("drafted", DRAFTED), ("committed", COMMITTED)):
                round_[name] = [dict(zip(keys, token)) for token in round_[name]]
    return traces


def table(trace):
    """A trace as HTML: a row a round."""
    def words(tokens):
        return " ".join(f"<b>{escape(visible(token['label']))}</b>" for token in tokens)

    rows = []
    for i, round_ in enumerate(trace["rounds"], 1):
        drafted, path = round_["drafted"], round_["path"]
        others = [token for node, token in enumerate(drafted, 1) if node not in path]
        cells = (words(drafted[node - 1] for node in path), words(others),
                 words(round_["committed"][len(path):]))
        rows.append(f"<tr><th scope=row>{i}<td>" + "<td>".join(cells))
    s = trace["summary"]
    return (f"<div class=card><h2>{trace['drafter']}</h2><p>{escape(trace['settings'])}. "
            f"{s['tokens']} tokens in {s['rounds']} rounds; {s['accepted']} of {s['drafted']} "
            "drafted tokens accepted.\n"
            "<table class=plain><thead><tr><th scope=col>Round<th scope=col>Drafted and accepted"
            "<th scope=col>Drafted and not accepted<th scope=col>The model’s own token<tbody>\n"
            + "\n".join(rows) + "</table></div>")


def visible(label):
    """A token's label with its leading space and its line breaks as signs."""
    text = label.lstrip(" ")
    return ("·" * (len(label) - len(text)) + text).replace("\n", "↵")
