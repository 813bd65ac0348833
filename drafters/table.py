"""What can be had by name. Needs no PyTorch: importing that takes a second, for which --help and an
error of the command line need not wait.

A drafter of one's own has a file, and an Entry here.
"""
from importlib import import_module
from typing import NamedTuple

from support.errors import require


class Part(NamedTuple):
    """What a drafter needs beside the model."""
    name: str     # an attribute of the Decoder, and a keyword of `load`
    words: str
    flag: str     # the option that brings it
    metavar: str
    help: str
    place: str    # where in the model's folder it is looked for
    hint: str = ""


class Entry(NamedTuple):
    """A drafter, whose class derives from Method (drafters/method.py)."""
    path: str             # of its class: module.name
    settings: tuple = ()  # which it has; those that kangaroo.py has an option for work there
    part: Part = None
    tree_of: str = None   # the name of the drafter that --tree makes this one of

    @property
    def cls(self):
        module, name = self.path.rsplit(".", 1)
        return getattr(import_module(module), name)


ADAPTER = Part("adapter", "adapter", "--adapter", "DIR", "an adapter's folder, or `random`",
               "adapter", " (or `random`), or --drafter lookup or none")
HEADS = Part("heads", "Medusa heads", "--adapter", "DIR", "medusa: heads", "medusa")
DRAFT_MODEL = Part("draft_model", "draft model", "--draft-model", "DIR", "a small model's folder",
                   "draft")
DATASTORE = Part("datastore", "datastore", "--datastore", "FILE", "what drafters/rest.py has made",
                 "datastore.safetensors")

# A setting is known by its name: steps (γ), threshold (η), nodes (of a tree), or any other.
DRAFTERS = {
    "kangaroo": Entry("drafters.chain.ChainDrafter", ("steps", "threshold"), ADAPTER),
    "tree": Entry("drafters.tree.TreeDrafter", ("steps", "threshold", "top_candidates", "nodes"),
                  ADAPTER, tree_of="kangaroo"),
    "medusa": Entry("drafters.medusa.MedusaDrafter", ("steps",), HEADS),
    "medusa-tree": Entry("drafters.medusa.MedusaTreeDrafter", ("steps", "nodes"), HEADS,
                         tree_of="medusa"),
    "lookahead": Entry("drafters.lookahead.LookaheadDrafter",
                       ("steps", "window", "ngram", "candidates")),
    "lookup": Entry("drafters.lookup.PromptLookupDrafter", ("steps",)),
    "sps": Entry("drafters.sps.SpsDrafter", ("steps", "threshold"), DRAFT_MODEL),
    "rest": Entry("drafters.rest.RestDrafter", ("steps", "nodes"), DATASTORE),
    "none": Entry("drafters.method.Vanilla"),
}


def drafter_named(name):
    """Its Entry; UserError if there is none of this name."""
    require(name in DRAFTERS,
            f"--drafter {name}: no such drafter, choose from {', '.join(DRAFTERS)}")
    return DRAFTERS[name]


def parts_needed():
    """{name: (Part, name of the first drafter that needs it)}"""
    needed = {}
    for name, entry in DRAFTERS.items():
        if entry.part:
            needed.setdefault(entry.part.name, (entry.part, name))
    return needed
