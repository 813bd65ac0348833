"""What the command line, bench/ and the replay page know of a drafter. It says so itself.

A drafter of one's own is to be had there if it derives from Method too, and has an Entry in
drafters/table.py. All else has a default.

    class EchoDrafter(Method, NoDrafter):
        …

    "echo": Entry("drafters.echo.EchoDrafter", ("steps",)),
"""
from kangaroo import STEPS, WIDTH, NoDrafter
from support.limits import check_settings


class Method:
    """The defaults are those of a drafter that needs nothing and drafts a chain."""
    grid = ()  # settings that `bench/choose.py --methods` tries, each a dict, `width` among them

    @classmethod
    def usual(cls, decoder):
        """All settings that it has, by name, with the values where the user gives none."""
        return {"steps": STEPS}

    @classmethod
    def usual_width(cls, decoder, asked):
        """Rows of a step where the user gives none: a chain of γ tokens needs γ + 1.

        asked: the settings that the user gave.
        """
        return max(2, 1 + (cls.usual(decoder) | asked)["steps"])

    @classmethod
    def make(cls, decoder, settings):
        """A drafter for any number of texts, one after another."""
        return cls(decoder.model)

    @classmethod
    def load(cls, path, decoder):
        """Its part, of a file or folder, for the decoder's model, not packed yet. It has a
        `source`, for messages, and maybe `facts`, a dict of what is written beside it."""
        raise NotImplementedError

    @classmethod
    def describe(cls, decoder, settings):
        """All that decides how fast it is, in words; none: its name says all."""
        return ""

    @classmethod
    def advise(cls, decoder):
        """What to say when almost nothing of its drafts was accepted."""
        return "this text does not suit such a drafter"

    @classmethod
    def drafts_trees(cls, width):
        """Whether its drafts are trees in steps of `width` rows."""
        return False

    @classmethod
    def check(cls, settings, width):
        """UserError for settings that cannot be."""
        check_settings(width, cls.drafts_trees(width), **vars(settings))


class Vanilla(Method, NoDrafter):
    """Vanilla decoding."""

    @classmethod
    def usual_width(cls, decoder, asked):
        return WIDTH


def overrule(usual, facts):
    """The settings `usual` with the values that a config.json has for them."""
    return usual | {name: facts[name] for name in usual if name in facts}
