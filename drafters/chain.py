"""Kangaroo as the paper has it, for the command line: the drafter itself is in kangaroo.py.

State between rounds: the adapter's KV cache, and how far it is valid. Rows of a step: the last
committed token and the drafted ones. Needs: an adapter that was trained for the target.
"""
from drafters.adapters import load_adapter
from drafters.method import Method, overrule
from kangaroo import STEPS, THRESHOLD, KangarooDrafter
from support.terminal import say


class ChainDrafter(Method, KangarooDrafter):
    """Kangaroo's chain."""
    grid = [{"width": 2, "steps": 1, "threshold": 0.2}] + [  # no η ends a draft of one token
        {"width": width, "steps": width - 1, "threshold": threshold}
        for width in (4, 8) for threshold in (0.2, 0.4, 0.6)]

    @classmethod
    def usual(cls, decoder):
        return overrule({"steps": STEPS, "threshold": THRESHOLD}, decoder.adapter.facts)

    @classmethod
    def usual_width(cls, decoder, asked):
        width = None if "steps" in asked else decoder.adapter.facts.get("width")
        return width or super().usual_width(decoder, asked)

    @classmethod
    def make(cls, decoder, settings):
        adapter = decoder.adapter
        return cls(decoder.model, adapter, adapter.exit_layer, settings.threshold, adapter.head)

    @classmethod
    def load(cls, path, decoder):
        adapter = load_adapter(path, decoder.model, decoder.asked_exit_layer)
        trained = adapter.facts.get("exit_layer", adapter.exit_layer)
        if adapter.exit_layer != trained:
            say(f"warning: --exit-layer {adapter.exit_layer}: {path} was trained behind layer "
                f"{trained}, of its drafts little will be accepted")
        return adapter

    @classmethod
    def describe(cls, decoder, settings):
        return (f"exit layer {decoder.adapter.exit_layer}, γ {settings.steps}, "
                f"η {settings.threshold:g}")

    @classmethod
    def advise(cls, decoder):
        trained = decoder.adapter.facts.get("chat_template", "unknown")
        return (f"check that the adapter {decoder.adapter.source} is trained, for this model, exit "
                f"layer and chat template (trained with: {trained}, now: {decoder.chat})")
