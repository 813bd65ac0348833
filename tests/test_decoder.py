"""support/decoder.py from Python: `load`, `Decoder.stream` and `Decoder.generate`, as README and
the notebook use them."""
import json
import shutil

import kangaroo
from drafters.lookup import PromptLookupDrafter
from drafters.table import DRAFTERS
from drafters.tree import TreeDrafter
from llama import Sampler
from support.decoder import load
from support.errors import UserError

import pytest
from helpers import config_json, random_adapter, write_adapter, write_model

PROMPT = "Once upon a time"
HERE = dict(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with an adapter, and without an end-of-sequence token."""
    folder = tmp_path_factory.mktemp("decoder") / "model"
    config = write_model(folder)
    write_adapter(folder / "adapter", config)
    (folder / "config.json").write_text(
        json.dumps(config_json(config) | {"eos_token_id": []}))
    return folder


@pytest.fixture(scope="module")
def decoder(folder):
    return load(folder, **HERE, width=16)


@pytest.mark.parametrize("drafter", ["kangaroo", "tree", "lookup", "none"])
def test_the_pieces_of_a_stream_are_the_text(decoder, drafter):
    """Guards who prints a text as it comes: a piece a token, of its own round, drafted or not; the
    rest of a character at the end; each round's seconds once."""
    options = dict(max_new_tokens=40, sampler=Sampler(5.0, seed=1))
    text, statistics = decoder.generate(PROMPT, drafter, **options)
    pieces = list(decoder.stream(PROMPT, drafter, **options))
    tokens = [piece for piece in pieces if piece.token is not None]
    assert [piece.token for piece in tokens] == statistics["ids"]
    assert "".join(piece.text for piece in pieces) == text == statistics["text"]
    assert pieces[len(tokens):] == [] or pieces[len(tokens):] == pieces[-1:]
    rounds = list({id(piece.round): piece.round for piece in pieces}.values())
    assert len(rounds) == statistics["rounds"]
    written = iter(tokens)
    for round_ in rounds:
        of_it = [next(written) for _ in round_.tokens]
        assert all(piece.round is round_ for piece in of_it)
        assert [piece.token for piece in of_it] == round_.tokens
        assert [piece.drafted for piece in of_it] == [
            i < round_.accepted for i in range(len(of_it))]
        assert of_it[0].seconds > 0 and not any(piece.seconds for piece in of_it[1:])
    assert drafter not in ("kangaroo", "tree") or any(piece.drafted for piece in pieces)


def test_a_prompt_is_a_text_or_its_ids(decoder):
    """Guards against ids that are encoded once more, and a list that is changed."""
    ids = decoder.encode(PROMPT)
    before = list(ids)
    text, statistics = decoder.generate(PROMPT, max_new_tokens=12)
    assert decoder.generate(ids, max_new_tokens=12)[0] == text
    assert ids == before == statistics["prompt_ids"]
    assert "".join(piece.text for piece in decoder.stream(tuple(ids), max_new_tokens=12)) == text


def test_a_sampler_or_its_settings(decoder):
    """Guards against a temperature that is read and forgotten."""
    settings = dict(temperature=0.9, top_k=30, top_p=0.9, seed=3)
    texts = [decoder.generate(PROMPT, max_new_tokens=24, **more)[0] for more in (
        settings, {"sampler": Sampler(0.9, 30, 0.9, 3)}, {}, {"temperature": 0.0},
        settings | {"seed": 4}, settings | {"top_k": 2}, settings | {"top_p": 0.1})]
    assert texts[0] == texts[1] and texts[2] == texts[3] and len({*texts[1:3], *texts[4:]}) == 5
    with pytest.raises(UserError, match="a sampler or a temperature, not both"):
        decoder.generate(PROMPT, sampler=Sampler(), temperature=1.0)
    with pytest.raises(UserError, match="^--temperature -1: must be 0"):
        decoder.generate(PROMPT, temperature=-1)


@pytest.mark.parametrize("call", ["generate", "stream", "settings"])
def test_an_unknown_keyword_is_named(decoder, folder, call):
    """Guards against a misspelt setting that is ignored; before anything is decoded."""
    arguments = (PROMPT, "kangaroo") if call != "settings" else ("kangaroo",)
    with pytest.raises(TypeError, match="'stepps'.*kangaroo has steps, threshold"):
        getattr(decoder, call)(*arguments, stepps=3)
    with pytest.raises(TypeError, match="load.* unexpected keyword argument 'adaptor'"):
        load(folder, adaptor="random")
    with pytest.raises(TypeError):
        load(folder, "random")  # what comes second is nobody's to remember


@pytest.mark.parametrize("drafter, setting, has", [
    ("lookup", "threshold", "steps"), ("kangaroo", "nodes", "steps, threshold"),
    ("none", "top_candidates", "steps"), ("lookahead", "nodes", "steps, window")])
def test_a_setting_of_another_drafter_is_refused(decoder, drafter, setting, has):
    """Guards against one that does nothing."""
    flag = "--" + setting.replace("_", "-")
    with pytest.raises(UserError, match=f"^{flag}: --drafter {drafter} has none, it has {has}"):
        decoder.generate(PROMPT, drafter, **{setting: 1})
    decoder.settings(drafter, **{setting: None})  # None leaves it to the drafter


@pytest.mark.parametrize("name, words", [
    ("kangaroo", "no adapter for {}: give --adapter DIR (or `random`), or --drafter lookup or"),
    ("tree", "no adapter for {}: give --adapter DIR"),
    ("medusa", "no Medusa heads for {}: give --adapter DIR"),
    ("medusa-tree", "no Medusa heads for {}: give --adapter DIR"),
    ("sps", "no draft model for {}: give --draft-model DIR"),
    ("rest", "no datastore for {}: give --datastore FILE")])
def test_a_part_that_is_not_there(folder, name, words):
    """Guards against an AttributeError of None, whichever way one comes there."""
    decoder = load(folder, **HERE, width=16, adapter=False)
    for call in (lambda: decoder.generate(PROMPT, name), lambda: decoder.drafter(name),
                 lambda: decoder.stream(PROMPT, name), lambda: decoder.settings(name),
                 lambda: list(decoder.rounds([1, 2], name))):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(words.format(folder))


def test_where_parts_come_from(folder, tmp_path):
    """None: what lies in the model's folder; False: none; else a path, which must be there."""
    shutil.copytree(folder, tmp_path / "model")
    where = tmp_path / "model"
    adapter = load(where, **HERE).adapter
    assert adapter.source == str(where / "adapter") and adapter.exit_layer == 1
    assert adapter.facts["exit_layer"] == 1 and adapter.head is None
    assert load(where, **HERE, adapter=False).adapter is None
    assert load(where, **HERE, exit_layer=3).adapter.exit_layer == 3
    assert load(where, **HERE, adapter="random").adapter.source == "random"
    (where / "adapter").rename(tmp_path / "elsewhere")
    for given in (tmp_path / "elsewhere", str(tmp_path / "elsewhere")):
        assert load(where, **HERE, adapter=given).adapter.source == str(given)
    decoder = load(where, **HERE)
    assert decoder.adapter is decoder.heads is decoder.draft_model is decoder.datastore is None
    for part in ("adapter", "heads", "draft_model", "datastore"):
        with pytest.raises(UserError, match="absent"):
            load(where, **HERE, **{part: tmp_path / "absent"})
    shutil.copytree(folder, where / "draft")
    assert load(where, **HERE).draft_model.source == str(where / "draft")
    assert load(where, **HERE, draft_model=False).draft_model is None


@pytest.mark.parametrize("asked, words", [
    ({"eos_token_id": 2, "max_length": 4096, "do_sample": False, "temperature": 0.6,
      "repetition_penalty": 1.0, "suppress_tokens": [], "no_repeat_ngram_size": 0,
      "bad_words_ids": None, "num_beams": 1}, None),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "typical_p": 1.0},
     "to sample as it asks: --temperature 0.6 --top-p 0.9"),
    ({"do_sample": True, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3},
     "not followed: repetition_penalty 1.3, min_p 0.1; to sample as it asks: --temperature 1 "
     "--top-k 5"),
    ({"min_p": 0.1, "suppress_tokens": [3, 4]}, "not followed: suppress_tokens [3, 4]")], ids=str)
def test_what_a_folder_asks_of_decoding_is_told(folder, tmp_path, asked, words):
    """Guards against text that differs from transformers' for what nobody was told of, and a line
    on what changes nothing."""
    shutil.copytree(folder, tmp_path / "model")
    where = tmp_path / "model" / "generation_config.json"
    where.write_text(json.dumps(asked))
    _, *notes = load(tmp_path / "model", **HERE, adapter=False).notes  # the first: no template
    assert notes == ([f"note: {where}: {words}"] if words else [])


def test_a_drafter_of_ones_own_making(decoder):
    """Guards an instance: other texts than its name has, or one text only."""
    names = [name for name in DRAFTERS if name in ("kangaroo", "tree", "lookup", "none")]
    samplers = [Sampler(), Sampler(5.0, seed=1), Sampler(5.0, seed=2)]
    for name in names:
        drafter = decoder.drafter(name, decoder.settings(name, steps=4))
        for sampler in samplers:  # one drafter, text after text
            named, own = (decoder.generate(PROMPT, who, 24, sampler, steps=4)[1]
                          for who in (name, drafter))
            named.pop("seconds"), own.pop("seconds")
            assert named == own and ("trees" in own) == (name == "tree")
    adapter = random_adapter(decoder.model)
    vanilla = decoder.generate(PROMPT, "none", 24)[0]
    for drafter in (TreeDrafter(decoder.model, adapter, 1, 0.0), kangaroo.NoDrafter(decoder.model),
                    kangaroo.KangarooDrafter(decoder.model, adapter, 2, 0.1),
                    PromptLookupDrafter(decoder.model)):
        told = []
        assert decoder.generate(PROMPT, drafter, 24)[0] == vanilla
        assert decoder.generate(PROMPT, drafter, 24, on_draft=told.append)[0] == vanilla
        assert told


def test_no_such_drafter(decoder):
    """Guards a KeyError where a name is mistyped."""
    with pytest.raises(UserError, match="--drafter kangoroo: no such drafter, choose from kangaro"):
        decoder.generate(PROMPT, "kangoroo")
