"""What the command line, bench/ and the replay page know of a drafter. It says so itself.

A drafter of one's own is to be had there if it derives from Method too, with a name, and stands in
DRAFTERS of support/decoder.py. All else has a default.

    class EchoDrafter(Method, NoDrafter):
        name = "echo"
"""
from typing import NamedTuple

from kangaroo import STEPS, WIDTH, NoDrafter
from llama import CHAIN_WIDTH
from support.errors import require

# What may be given a drafter that has a setting of this name: (what fits, in words).
LIMITS = {"threshold": (lambda value: 0 <= value <= 1, "in [0, 1]"),
          "top_candidates": (lambda value: value >= 1, "at least 1")}


class Part(NamedTuple):
    """What a drafter needs beside the model."""
    name: str     # an attribute of the Decoder, and a keyword of `load`
    words: str
    flag: str     # the option that brings it
    metavar: str
    help: str
    place: str    # where in the model's folder it is looked for
    hint: str = ""


class Method:
    """The defaults are those of a drafter that needs nothing and drafts a chain.

    A setting is known by its name: `steps` (γ), `threshold` (η), `nodes` (of a tree), `width` (rows
    of a step), or any other.
    """
    name = None
    tree_of = None       # the name of the method that --tree makes this one of
    part = None
    usual_width = WIDTH
    grid = ()            # settings that `bench/choose.py --methods` tries, each a dict

    @classmethod
    def usual(cls, decoder):
        """All settings that it has, by name, with the values where the user gives none."""
        return {"steps": STEPS}

    @classmethod
    def make(cls, decoder, settings):
        """A drafter for any number of texts, one after another."""
        return cls(decoder.model)

    @classmethod
    def load(cls, path, decoder):
        """Its part, of a file or folder, for the decoder's model. It has a `source`, for messages,
        and maybe `facts`, a dict of what is written beside it."""
        raise NotImplementedError

    @classmethod
    def describe(cls, decoder, settings):
        """All that decides how fast it is, in words."""
        return cls.name

    @classmethod
    def advise(cls, decoder):
        """What to say when almost nothing of its drafts was accepted."""
        return f"this text does not suit --drafter {cls.name}"

    @classmethod
    def drafts_trees(cls, width):
        """Whether its drafts are trees in steps of `width` rows."""
        return cls.tree_of is not None

    @classmethod
    def check(cls, settings, width):
        """UserError for settings that cannot be."""
        below = f"must be from {{}} to {width - 1}, one less than --width {width}"
        require(width > CHAIN_WIDTH or not cls.drafts_trees(width), f"--width {width}: must be "
                f"above {CHAIN_WIDTH} for {'--tree' if cls.tree_of else '--drafter ' + cls.name}")
        require(0 <= settings.steps < width, f"--steps {settings.steps}: {below.format(0)}")
        for name, (fits, words) in LIMITS.items():
            value = getattr(settings, name, None)
            require(value is None or fits(value),
                    f"--{name.replace('_', '-')} {value}: must be {words}")
        nodes = getattr(settings, "nodes", None)
        require(nodes is None or min(1, width - 1) <= nodes < width,
                f"--nodes {nodes}: {below.format(1)}")


class Vanilla(Method, NoDrafter):
    """Vanilla decoding."""
    name = "none"


def overrule(usual, facts):
    """The settings `usual` with the values that a config.json has for them."""
    return usual | {name: facts[name] for name in usual if name in facts}
