"""The comparison with the authors' code, without their code: it must be able to fail."""
from itertools import islice

from bench.authors_methods import Replay, TheirLookahead
from bench.common import compare
from kangaroo import NoDrafter, generate

import pytest
from helpers import block, random_model


def test_a_round_that_differs_from_the_authors_is_told(capsys):
    """Bug: a comparison that cannot fail. Rounds that differ, or are missing, are not equal."""
    model, width = random_model(), 16
    first, *ids = [token for round_ in generate(model, NoDrafter(model), [1, 2, 3], 9, width=width)
                   for token in round_.tokens]
    trees = [[ids[:2]], [[ids[3], 0]], []]  # two are right; one of two; nothing is drafted
    text = {"ids": [first, *ids[:6]], "lengths": [3, 2, 1]}

    def same(theirs):
        return compare("replay", [Replay(model, trees)], [[1, 2, 3]], [theirs], width=width,
                       skip=1)

    assert same(text)
    assert "ids equal 7 of 7 · rounds equal 3 of 3" in capsys.readouterr().out
    assert not same(text | {"lengths": [3, 1, 2]})
    assert "text 1 differs from round 2 on: theirs 1, ours 2" in capsys.readouterr().out
    assert not same(text | {"ids": [first, *ids[:5], ids[5] + 1]})


@pytest.mark.parametrize("options", [{}, {"prompt": True}, {"move": True},
                                     {"whole": True, "anywhere": True, "move": True}], ids=str)
def test_lookahead_as_the_authors_do_it_is_lossless(options):
    """Bugs: a node of the window that is accepted, or that stands at another node's place."""
    model, shape = random_model(), (5, 4, 3)
    ids, drafter = [1, 2, 3, 4, 1, 2, 3], TheirLookahead(model, *shape, **options)
    with block(512):  # theirs knows no edges and no end, so there must be none near
        rounds = list(islice(generate(model, drafter, ids, 400, 31, width=32), 40))
        tokens = [token for round_ in rounds for token in round_.tokens]
        vanilla = generate(model, NoDrafter(model), ids, len(tokens), width=32)
        assert tokens == [token for round_ in vanilla for token in round_.tokens]
    assert all(len(round_.tokens) == 1 for round_ in rounds[:2])  # the window is being filled
    assert len(tokens) > 40
