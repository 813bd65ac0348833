"""What numbers may be: for Python, and for the command line, before PyTorch is there.

Messages name the flags of kangaroo.py.
"""
import math

from support.errors import require

CHAIN_WIDTH = 8  # steps of up to 8 rows hold a chain, and use PyTorch's fused attention
TREE_WIDTH = 16  # for a tree, if none is given; a wide step costs vanilla decoding more, too
MAX_WIDTH = 64   # a step of more rows might not fit in a block of the cache

DTYPES = "float32", "bfloat16", "float16"


def check_dtype(dtype):
    require(dtype is None or dtype in DTYPES,
            f"--dtype {dtype}: not supported, choose {', '.join(DTYPES[:2])} or {DTYPES[2]}")


def check_width(width):
    require(1 <= width <= MAX_WIDTH, f"--width {width}: must be from 1 to {MAX_WIDTH}")


def check_sampling(temperature, top_k, top_p):
    require(temperature == 0 or 1e-6 <= temperature < math.inf,
            f"--temperature {temperature}: must be 0 (greedy) or from 1e-6 on")
    require(top_k >= 0, f"--top-k {top_k}: must be at least 0 (0: off)")
    require(0 < top_p <= 1, f"--top-p {top_p}: must be in (0, 1]")


def check_settings(width=None, tree=False, steps=None, threshold=None, top_candidates=None,
                   nodes=None, **others):
    """UserError for settings of a drafter that cannot be; None is one that is not known yet."""
    width, given = (MAX_WIDTH, "") if width is None else (width, f", one less than --width {width}")
    require(width > CHAIN_WIDTH or not tree,
            f"--width {width}: must be above {CHAIN_WIDTH} for a tree of drafts")
    require(steps is None or 0 <= steps < width,
            f"--steps {steps}: must be from 0 to {width - 1}{given}")
    require(threshold is None or 0 <= threshold <= 1,
            f"--threshold {threshold}: must be in [0, 1]")
    require(top_candidates is None or top_candidates >= 1,
            f"--top-candidates {top_candidates}: must be at least 1")
    require(nodes is None or min(1, width - 1) <= nodes < width,
            f"--nodes {nodes}: must be from 1 to {width - 1}{given}")
