"""Text to ids and back: both kinds of tokenizer, special tokens, streaming."""
import json
import shutil
import sys
from dataclasses import replace

from support.errors import UserError
from support.tokenizer import TextStream, Tokenizer

import pytest
from helpers import TEXT, TINY, write_model
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

SENTENCEPIECE, BYTE_LEVEL = "tokenizer.model", "tokenizer.json"
BOS, EOS = 1, 2  # in both vocabularies below


def write_byte_level(folder, adds_bos=True, alter=lambda tokenizer: None):
    """A small byte-level BPE as Llama 3's is; returns its size."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXT * 20, tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if adds_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)])
    alter(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    write_model(folder)
    return folder


@pytest.fixture
def variant(sentencepiece_folder, tmp_path):
    """Loads the sentencepiece tokenizer with this tokenizer_config.json, vocab_size and other
    files."""
    def load(metadata, vocab_size=340, bos=BOS, **files):
        shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
        for name, data in ({"tokenizer_config": metadata} | files).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(data))
        return Tokenizer(tmp_path, replace(TINY, vocab_size=vocab_size, bos_token_id=bos))
    return load


@pytest.fixture(scope="module", params=[SENTENCEPIECE, BYTE_LEVEL])
def tokenizer(request, tmp_path_factory, sentencepiece_folder):
    """One of each kind."""
    if request.param == SENTENCEPIECE:
        return Tokenizer(sentencepiece_folder, replace(TINY, vocab_size=340, bos_token_id=BOS))
    folder = tmp_path_factory.mktemp("byte-level")
    return Tokenizer(folder, replace(TINY, vocab_size=write_byte_level(folder), bos_token_id=BOS))


# --------------------------------------------------------------------------------------------------
# Ids


@pytest.mark.parametrize(
    "text", ["The kangaroo", "a", "Über den Fluß", "你好 🦘 नमस्ते", "f(x) = {0} % \\n", ""])
def test_a_text_survives_the_round_trip(tokenizer, text):
    """Guards against lost or added spaces and characters, and against a special token in decoded
    text."""
    ids = tokenizer.encode(text)
    assert ids[0] == BOS and BOS not in ids[1:]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("metadata, bos, start", [({}, BOS, [BOS]),
                                                  ({"add_bos_token": True}, BOS, [BOS]),
                                                  ({"add_bos_token": False}, BOS, []),
                                                  ({}, None, [BOS])], ids=str)
def test_bos_is_as_the_model_wants_it(variant, metadata, bos, start):
    """Guards against a prompt without the token that every training text began with; without one in
    config.json too."""
    tokenizer, plain = variant(metadata, bos=bos), variant({"add_bos_token": False})
    assert tokenizer.encode("The kangaroo") == start + plain.encode("The kangaroo")


def test_bos_is_never_doubled(tokenizer):
    """Guards against two of them, which a chat template that writes its own would give."""
    ids = tokenizer.encode("<s>The kangaroo")
    assert ids[0] == BOS and BOS not in ids[1:]


@pytest.mark.parametrize("text", ["stones</s>stones", "</s>", "</s></s>the", "</s> the </s>"])
def test_special_tokens_in_a_text(tokenizer, text):
    """Guards against </s> spelt out in letters."""
    ids = tokenizer.encode(text)
    assert ids.count(EOS) == text.count("</s>") and "s>" not in tokenizer.decode(ids)


@pytest.mark.parametrize("metadata, begins", [({}, True), ({"legacy": None}, True),
                                              ({"legacy": True}, True), ({"legacy": False}, False)],
                         ids=str)
def test_text_behind_a_special_token(variant, sentencepiece_folder, metadata, begins):
    """Guards Vicuna's "</s>USER:": such models learned ▁ after every special token, and those that
    say legacy false did not."""
    tokenizer = variant(metadata)
    model = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ids = tokenizer.encode("the</s>stones</s></s> the")
    words = [model.encode(text) for text in ("the", "stones", " the")]
    assert model.id_to_piece(words[1])[0][0] == "▁"
    if begins:
        assert ids == [BOS, *words[0], EOS, *words[1], EOS, EOS, *words[2]]
    else:
        pieces = [model.id_to_piece(i) for i in ids]
        assert pieces[pieces.index("</s>") + 1][0] != "▁" and pieces[-1] == "▁the"
        assert "".join(pieces) == "<s>▁the</s>stones</s></s>▁the"


def test_no_letter_is_lost_where_legacy_is_false(tmp_path):
    """Guards against a guard before such a text that swallows the text's first letters ('>' and '='
    to '>=')."""
    SentencePieceTrainer.train(sentence_iterator=iter(["if a >= b then b >= c"] * 50 + TEXT * 20),
                               vocab_size=345, model_prefix=str(tmp_path / "tokenizer"),
                               model_type="bpe", byte_fallback=True, minloglevel=2)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = Tokenizer(tmp_path, replace(TINY, vocab_size=345, bos_token_id=BOS))
    assert tokenizer.decode(tokenizer.encode("a</s>= b")) == "a= b"


def test_a_prefix_space_can_be_declined(variant, sentencepiece_folder):
    """Guards add_prefix_space: false of the models that say legacy false."""
    model = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for wanted in (True, None, False):
        ids = variant({"legacy": False, "add_prefix_space": wanted}).encode("stones")
        blank = "" if wanted is False else "▁"
        assert "".join(map(model.id_to_piece, ids)) == f"<s>{blank}stones"


@pytest.mark.parametrize("beside, begins", [
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}}, True),
    ({"normalizer": None, "pre_tokenizer": {"prepend_scheme": "first"}}, False),
    ({"pre_tokenizer": {"prepend_scheme": "always"}}, True), ({}, False)],
    ids=["prepend", "first", "always", "silent"])
def test_tokenizer_json_says_where_a_word_begins(variant, beside, begins):
    """Guards TinyLlama: it says legacy false, but transformers 4 reads the tokenizer.json beside
    tokenizer.model, which puts ▁ after every special token."""
    tokenizer = variant({"legacy": not begins if beside else False}, tokenizer=beside)
    ids = tokenizer.encode("</s>the")
    assert (ids[2:] == tokenizer.encode("the")[1:]) == begins


@pytest.mark.parametrize("metadata, files, start", [
    ({"bos_token": "<s>"}, {}, [1]), ({"bos_token": {"content": "</s>"}}, {}, [2]),
    ({"bos_token": ""}, {}, [1]), ({"bos_token": None}, {}, [1]),
    ({}, {"special_tokens_map": {"bos_token": "</s>"}}, [2]),
    ({"added_tokens_decoder": {}}, {"special_tokens_map": {"bos_token": "</s>"}}, [1]),
    ({"bos_token": "<new>"}, {}, [340])], ids=str)
def test_bos_is_the_token_that_the_tokenizer_names(variant, metadata, files, start):
    """Guards llama-68m, whose config.json says 0, which is <unk>: the tokenizer's word counts."""
    assert variant(metadata, bos=0, vocab_size=341, **files).encode("the")[:1] == start


def test_eos_is_added_where_the_tokenizer_says_so(variant):
    """Guards add_eos_token, and that EOS is the token that the folder names."""
    assert variant({"add_eos_token": True}).encode("the")[-1] == EOS
    ids = variant({"add_eos_token": True, "eos_token": {"content": "<s>"}}).encode("the")
    assert ids[0] == ids[-1] == BOS
    assert variant({}).encode("the")[-1] not in (BOS, EOS)


@pytest.mark.parametrize(
    "added, text, ids",
    [({"340": {"content": "<|im_start|>", "special": True}}, "<|im_start|>", [340]),
     ({"340": {"content": "<pad>", "special": False}}, "<pad></s>", [340, EOS]),
     ({"0": {"content": "<unk>", "special": True}}, "<unk>", [0]),
     ({"340": {"content": "<|x|>", "special": True}, "0": {"content": ""},
       "341": {"content": "<|x|>+", "special": True}}, "<|x|>+<|x|>", [341, 340])],
    ids=str)
def test_added_tokens_are_one_id_each(variant, added, text, ids):
    """Guards against the tokens of a chat template spelt out in letters; the longest of those that
    fit wins."""
    tokenizer = variant({"added_tokens_decoder": added}, vocab_size=384)
    assert tokenizer.encode(text) == [BOS, *ids]
    assert tokenizer.decode([BOS, *ids]) == ("<pad>" if "<pad>" in text else "")


@pytest.mark.parametrize("i, tool", [(340, "<t>"), (EOS, "</s>")])
def test_an_added_token_that_is_not_special_is_shown(variant, i, tool):
    """Guards <tool_call>, lost where sentencepiece does not know it or calls it control."""
    added = {i: {"content": tool}, "341": {"content": "<e>", "special": True}}
    tokenizer = variant({"added_tokens_decoder": added, "legacy": False, "eos_token": "<e>"}, 342)
    for text in (f"a{tool}b", tool, f" {tool} {tool}🦘", f"{tool}<e>a"):
        ids = tokenizer.encode(text)
        assert i in ids and tokenizer.decode(ids) == text.replace("<e>", "")
    half = [*tokenizer.encode("the 🦘")[:-1], i, 341, *ids]
    assert f"\ufffd{tool}{tool}a" in tokenizer.decode(half)
    assert_streams(tokenizer, [BOS], half)
    tokenizer = variant({"added_tokens_decoder": added, "pad_token": tool}, 342)
    assert tokenizer.decode([i]) == "", "what has a role is special"


def test_added_tokens_of_a_tokenizer_json_beside(variant):
    """Guards tokens that stand in tokenizer.json alone; tokenizer_config.json counts before it."""
    beside = {"added_tokens": [{"id": 340, "content": "<t>", "lstrip": True},
                               {"id": 341, "content": "<e>", "special": True}]}
    tokenizer = variant({}, 342, tokenizer=beside)
    ids = tokenizer.encode("the <t><e>")
    assert ids == [*tokenizer.encode("the"), 340, 341] and tokenizer.decode(ids) == "the<t>"
    decoder = {"340": {"content": "<t>", "lstrip": False}}
    assert variant({"added_tokens_decoder": decoder}, 342,
                   tokenizer=beside).encode("the <t>") == [*tokenizer.encode("the "), 340]
    with pytest.raises(UserError, match="tokenizer.json: added_tokens must give an id and"):
        variant({}, tokenizer={"added_tokens": [{"content": "<t>"}]})


def test_a_token_of_the_vocabulary_can_be_added(tmp_path):
    """Guards one that tokenizer_config.json adds, and that tokenizer.json has as a piece alone."""
    config = replace(TINY, vocab_size=write_byte_level(tmp_path))
    ids = Tokenizer(tmp_path, config).vocabulary()
    piece, longer = next((a, b) for a in ids for b in ids if b[:-1] == a and len(a) > 1)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {ids[piece]: {"content": piece}}}))
    assert Tokenizer(tmp_path, config).encode(longer)[1] == ids[piece]


def test_added_tokens_json_is_read(variant):
    """Guards folders that are older than added_tokens_decoder; it counts where both are there."""
    old = {"<|user|>": 340, "<|end|>": 341}
    assert variant({}, 342, added_tokens=old).encode("<|user|><|end|>") == [BOS, 340, 341]
    newer = {"added_tokens_decoder": {"343": {"content": "<|user|>"}}}
    assert variant(newer, 350, added_tokens=old).encode("<|user|>") == [BOS, 343]
    with pytest.raises(UserError, match="added_tokens.json: must map texts to ids"):
        variant({}, added_tokens={"<|user|>": "x"})


@pytest.mark.parametrize("flags, text, same", [
    ({"rstrip": True}, "the<|x|> \n the", "the<|x|>the"),
    ({"lstrip": True}, "the \n <|x|>the", "the<|x|>the"),
    ({"lstrip": True, "rstrip": True}, " <|x|> ", "<|x|>"),
    ({"single_word": True}, "the\n<|x|>, the", None), ({}, "the <|x|> the", None)], ids=str)
def test_blanks_round_an_added_token(variant, flags, text, same):
    """Guards the line break after Phi-3's <|user|>, which the token takes in."""
    tokenizer = variant({"added_tokens_decoder": {"340": {"content": "<|x|>"} | flags}}, 341)
    ids = tokenizer.encode(text)
    assert 340 in ids and (same is None or ids == tokenizer.encode(same))
    assert (340 in tokenizer.encode("the<|x|>")) == ("single_word" not in flags)
    assert (340 in tokenizer.encode("<|x|>the")) == ("single_word" not in flags)


@pytest.mark.parametrize("vocab_size", [340, 341, 350, 384, 1000])
def test_an_embedding_may_have_more_rows_than_tokens(variant, vocab_size):
    """Guards against refusing padding of any size; the rows beyond have no text."""
    tokenizer = variant({}, vocab_size)
    assert tokenizer.decode(list(range(340, vocab_size))) == ""
    assert max(tokenizer.encode(" ".join(TEXT))) < 340


@pytest.mark.parametrize("kind", [SENTENCEPIECE, BYTE_LEVEL])
def test_a_token_beyond_the_embedding_is_refused_when_it_occurs(variant, tmp_path, kind):
    """Guards against refusing a folder for a [PAD] that nobody prompts, and against an index error
    for who does."""
    size = write_byte_level(tmp_path) if kind == BYTE_LEVEL else 340
    added = {"added_tokens_decoder": {size: {"content": "[PAD]", "special": True}}}
    if kind == SENTENCEPIECE:
        tokenizer = variant(added, size)
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
        tokenizer = Tokenizer(tmp_path, replace(TINY, vocab_size=size))
    assert tokenizer.decode(tokenizer.encode("the stones")) == "the stones"
    with pytest.raises(UserError, match=rf"{kind}: .*'\[PAD\]', which is {size}, .* = {size}"):
        tokenizer.encode("the[PAD]")
    for name in ("bos", "eos"):
        with pytest.raises(UserError, match="'<new>', which is 340"):
            variant({f"{name}_token": "<new>", f"add_{name}_token": True}).encode("the")


@pytest.mark.parametrize("name, damage", [
    (SENTENCEPIECE, lambda data: b""), (SENTENCEPIECE, lambda data: data[:len(data) // 2]),
    (SENTENCEPIECE, lambda data: b"<!DOCTYPE html>"), (BYTE_LEVEL, lambda data: b'{"model": 1}')],
    ids=["empty", "cut", "a web page", "JSON"])
def test_damaged_files_are_refused(sentencepiece_folder, tmp_path, name, damage):
    """Guards against a traceback, or a crash of the library."""
    if name == BYTE_LEVEL:
        pytest.importorskip("tokenizers")
    (tmp_path / name).write_bytes(damage((sentencepiece_folder / "tokenizer.model").read_bytes()))
    with pytest.raises(UserError, match=f"{name}: not a "):
        Tokenizer(tmp_path, TINY)


def test_no_tokenizer_at_all(tmp_path):
    """Guards against an error that does not say what is looked for."""
    with pytest.raises(UserError, match="neither tokenizer.model nor tokenizer.json"):
        Tokenizer(tmp_path, TINY)


def test_the_package_tokenizers_is_optional(sentencepiece_folder, tmp_path, monkeypatch):
    """Guards against a bare ImportError, and against one where tokenizer.model makes the package
    needless."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: .* pip install tokenizers"):
        Tokenizer(tmp_path, TINY)
    shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
    assert Tokenizer(tmp_path, replace(TINY, vocab_size=340)).decode([EOS]) == ""


@pytest.mark.parametrize("adds_bos, metadata, start", [(True, {}, [BOS]), (False, {}, []),
                                                       (True, {"add_bos_token": False}, []),
                                                       (False, {"add_bos_token": True}, [BOS])],
                         ids=str)
def test_bos_of_a_tokenizer_json(tmp_path, adds_bos, metadata, start):
    """Guards against a BOS that SmolLM2 never saw, or against none for Llama 3, whose
    tokenizer.json alone asks for it."""
    size = write_byte_level(tmp_path, adds_bos)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(metadata))
    ids = Tokenizer(tmp_path, replace(TINY, vocab_size=size,
                                      bos_token_id=BOS)).encode("The kangaroo")
    assert [i for i in ids if i <= EOS] == start


def test_settings_left_over_from_training_are_ignored(tmp_path):
    """Guards against a prompt that is cut or padded because tokenizer.json was saved by a training
    run."""
    def alter(tokenizer):
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=64)

    size = write_byte_level(tmp_path, alter=alter)
    tokenizer = Tokenizer(tmp_path, replace(TINY, vocab_size=size))
    assert tokenizer.decode(tokenizer.encode(TEXT[0])) == TEXT[0]
    assert tokenizer.encode("") == [BOS]


def write_prepending(folder):
    """A small tokenizer.json made from a sentencepiece model: ▁ before every part of a text."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    normalizers = tokenizers.normalizers
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(["▁" + text.replace(" ", "▁") for text in TEXT],
                                  tokenizers.trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_like_llama(folder):
    """A small tokenizer.model that keeps all blanks, as Llama's does."""
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT * 20), vocab_size=340,
                               model_prefix=str(folder / "tokenizer"), model_type="bpe",
                               byte_fallback=True, remove_extra_whitespaces=False,
                               normalization_rule_name="identity", minloglevel=2)
    return 340


@pytest.mark.parametrize("write", [write_byte_level, write_prepending, write_like_llama])
@pytest.mark.parametrize("parts", [["the", "stones"], ["the ", "stones"], ["the", " stones"],
                                   ["the</s>", "stones"], ["the</s>", " stones"],
                                   ["the", "</s>stones"], ["stones.", "a"]])
def test_a_text_goes_on_as_if_it_were_one(tmp_path, write, parts):
    """Guards training on answers that follow their prompt: no blank between, none lost, and ▁ after
    a special token where the whole text has it."""
    tokenizer = Tokenizer(tmp_path, replace(TINY, vocab_size=write(tmp_path), bos_token_id=BOS))
    first = tokenizer.encode_part(parts[0])
    ids = first + tokenizer.encode_part(parts[1], first[-1])
    whole = tokenizer.encode_part("".join(parts))
    texts = ["".join(map(tokenizer.text_of, i)) for i in (ids, whole)]
    assert texts[0] == texts[1]
    if "</s>" in "".join(parts):
        assert ids == whole


# --------------------------------------------------------------------------------------------------
# Streaming

texts = st.text() | st.lists(
    st.sampled_from([
        "🦘", "👩‍👩‍👧", "你好", "é", "e\u0301", "नमस्ते", " ", "\n", "the stones", "ß", "</s>",
        "\u200d", "\ufffd"
    ])).map("".join)


def assert_streams(tokenizer, prompt, ids):
    """The pieces are the text that follows the prompt's, none half a character, and none held back
    without need."""
    stream = TextStream(tokenizer, prompt)
    pieces, last = [stream.push(i) for i in ids], stream.flush()
    before, text = tokenizer.decode(prompt), tokenizer.decode(prompt + ids)
    assert "".join(pieces) + last == text[len(before):]
    assert "\ufffd" in text or "\ufffd" not in "".join(pieces)
    assert last == "" or text.endswith("\ufffd")


@given(prompt=texts, text=texts)
def test_a_text_streams_as_it_is_decoded_in_one_go(tokenizer, prompt, text):
    """Guards against lost or doubled spaces and half characters, whatever the tokens into which a
    character is split."""
    assert_streams(tokenizer, tokenizer.encode(prompt), tokenizer.encode(text)[1:])


@given(prompt=st.lists(st.integers(0, 327), max_size=12),
       ids=st.lists(st.integers(0, 327), max_size=12))
def test_any_ids_stream_as_they_are_decoded_in_one_go(tokenizer, prompt, ids):
    """Guards against a hot sample: bytes that are no character, special tokens in the middle."""
    assert_streams(tokenizer, prompt, ids)


def test_blanks_in_a_row_stream(sentencepiece_folder):
    """Guards against a window that begins with a blank, at which decoding drops all that follow it
    too."""
    tokenizer = Tokenizer(sentencepiece_folder, replace(TINY, vocab_size=340))
    model = SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    ids = [model.piece_to_id(piece) for piece in ("▁the", "▁", "▁", "▁the", "▁", "▁the")]
    assert model.unk_id() not in ids
    assert_streams(tokenizer, [BOS], ids)


def test_many_characters_in_many_bytes_stream(tmp_path):
    """Guards byte-level BPE: an emoji is four tokens, and several of them join to one character."""
    tokenizer = Tokenizer(tmp_path, replace(TINY, vocab_size=write_byte_level(tmp_path)))
    for text in ("🦘🦘 👩‍👩‍👧 你好", "नमस्ते é e\u0301 🇦🇺", "x\ufffdy 🦘"):
        ids = tokenizer.encode(text)[1:]
        assert_streams(tokenizer, [BOS], ids)
        stream = TextStream(tokenizer, [BOS])
        assert "".join(map(stream.push, ids)) + stream.flush() == text
