"""Text to ids and back: both kinds of tokenizer, special tokens, streaming, chat templates."""
import json
import shutil
import sys
from dataclasses import replace

import pytest
from helpers import TEXT, TINY, write_model
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama import UserError
from support.tokenizer import CHAT_TEMPLATES, TextStream, Tokenizer, find_chat_template, render_chat

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
    """Loads the sentencepiece tokenizer with this tokenizer_config.json and vocab_size."""
    def load(metadata, vocab_size=340, bos=BOS):
        shutil.copy(sentencepiece_folder / "tokenizer.model", tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(metadata))
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


@pytest.mark.parametrize("text, plain", [("stones</s>stones", "stonesstones"),
                                         ("stones</s> stones", "stones stones"), ("</s>", ""),
                                         ("</s></s>the", "the")])
def test_special_tokens_in_a_text(tokenizer, text, plain):
    """Guards against </s> spelt out in letters, and against the space that sentencepiece puts
    before every text."""
    ids = tokenizer.encode(text)
    assert ids.count(EOS) == text.count("</s>")
    assert tokenizer.decode(ids) == plain


def test_no_letter_is_lost_behind_a_special_token(tmp_path):
    """Guards the guard before such a text: its last piece must not swallow the text's first letters
    ('>' and '=' to '>=')."""
    SentencePieceTrainer.train(sentence_iterator=iter(["if a >= b then b >= c"] * 50 + TEXT * 20),
                               vocab_size=345, model_prefix=str(tmp_path / "tokenizer"),
                               model_type="bpe", byte_fallback=True, minloglevel=2)
    tokenizer = Tokenizer(tmp_path, replace(TINY, vocab_size=345, bos_token_id=BOS))
    assert tokenizer.decode(tokenizer.encode("a</s>= b")) == "a= b"


@pytest.mark.parametrize(
    "added, text, ids",
    [({"340": {"content": "<|im_start|>", "special": True}}, "<|im_start|>", [340]),
     ({"340": {"content": "<pad>", "special": False}}, "<pad></s>", [340, EOS]),
     ({"0": {"content": "<unk>", "special": True}}, "<unk>", [0]),
     ({"340": {"content": "<|x|>"}, "341": {"content": "<|x|>+"}}, "<|x|>+<|x|>", [341, 340])],
    ids=str)
def test_added_tokens_are_one_id_each(variant, added, text, ids):
    """Guards against the tokens of a chat template spelt out in letters; the longest of those that
    fit wins."""
    tokenizer = variant({"added_tokens_decoder": added}, vocab_size=384)
    assert tokenizer.encode(text) == [BOS, *ids]
    assert tokenizer.decode([BOS, *ids]) == ""


@pytest.mark.parametrize("vocab_size, fits", [(340, True), (384, True), (339, False), (341, False),
                                              (40, False)])
def test_the_vocabulary_must_be_the_models(variant, vocab_size, fits):
    """Guards against the tokenizer of another model. Padding to a multiple of 64 is no mismatch,
    and has no text."""
    if fits:
        assert variant({}, vocab_size).decode(list(range(340, vocab_size))) == ""
    else:
        with pytest.raises(UserError,
                           match=f"tokenizer.model: has 340 tokens, .* vocab_size = {vocab_size}"):
            variant({}, vocab_size)


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


# --------------------------------------------------------------------------------------------------
# Chat templates

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions. ")
LLAMA3_END = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize("name, one, three", [
    ("chatml", "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n",
     "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"
     ),
    ("llama3", "<|start_header_id|>user<|end_header_id|>\n\nA?" + LLAMA3_END,
     "<|start_header_id|>user<|end_header_id|>\n\nA?" + LLAMA3_END
     + "B.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nC?" + LLAMA3_END),
    ("zephyr", "<|user|>\nA?</s>\n<|assistant|>\n",
     "<|user|>\nA?</s>\n<|assistant|>\nB.</s>\n<|user|>\nC?</s>\n<|assistant|>\n"),
    ("llama2", "[INST] A? [/INST]", "[INST] A? [/INST] B. </s><s>[INST] C? [/INST]"),
    ("vicuna", VICUNA + "USER: A? ASSISTANT:",
     VICUNA + "USER: A? ASSISTANT: B.</s>USER: C? ASSISTANT:"), ("none", "A?", "A?B.C?")
])
def test_templates_are_the_models_own(name, one, three):
    """Guards against a space or line break too many, at which an instruction-tuned model answers
    worse."""
    assert render_chat(CHAT_TEMPLATES[name], ["A?"]) == one
    assert render_chat(CHAT_TEMPLATES[name], ["A?", "B.", "C?"]) == three


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_braces_in_a_turn_stay(name):
    """Guards against str.format on what the user wrote."""
    turns = ["{0} {x!r} {{}} {", "} %s {1}", "{}"]
    text = render_chat(CHAT_TEMPLATES[name], turns)
    assert [text.count(turn) for turn in turns[:2]] == [1, 1] and text.count("{") == sum(
        turn.count("{") for turn in turns)


# Jinja programs of such models, shortened
ZEPHYR = "{% for m in messages %}{{ '<|user|>\n' + m['content'] + eos_token }}{% endfor %}{{ '<|assistant|>' }}"
LLAMA3 = "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] }}{% endfor %}"
LLAMA2 = "{{ bos_token + '[INST] ' + messages[0]['content'].strip() + ' [/INST]' }}"
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
SMOLLM2 = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, " \
          "trained by Hugging Face<|im_end|>\n' }}{% endif %}" + CHATML


@pytest.mark.parametrize(
    "config, jinja, asked, name",
    [(ZEPHYR, None, None, "zephyr"), (LLAMA3, None, None, "llama3"), (LLAMA2, None, None, "llama2"),
     (CHATML, None, None, "chatml"),
     ("{{ 'USER: ' + messages[0]['content'] + ' ASSISTANT:' }}", None, None, "vicuna"),
     ([{"name": "tool_use", "template": LLAMA3}, {"name": "default", "template": ZEPHYR}
       ], None, None, "zephyr"), ([{"name": "tool_use", "template": LLAMA3}], None, None, "none"),
     (None, LLAMA3, None, "llama3"), (CHATML, LLAMA3, None, "llama3"), (None, None, None, "none"),
     ("{{ x }}", None, None, "none"), (CHATML, None, "zephyr", "zephyr"),
     (CHATML, None, "none", "none"), (None, None, "llama2", "llama2")])
def test_the_folders_template_is_found(tmp_path, config, jinja, asked, name):
    """Guards against a chat model that gets a bare prompt, or another model's markers; --chat has
    the last word."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({} if config is None else {"chat_template": config}))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    assert find_chat_template(tmp_path, asked) == (name, CHAT_TEMPLATES[name])


def test_a_folder_without_metadata_has_no_template(tmp_path):
    """Guards against an error about files that a base model need not have."""
    assert find_chat_template(tmp_path) == ("none", CHAT_TEMPLATES["none"])


def test_an_unknown_template_is_refused(tmp_path):
    """Guards against a KeyError where the user has mistyped --chat."""
    with pytest.raises(UserError,
                       match="--chat alpaca: .*chatml, llama3, zephyr, llama2, vicuna, none"):
        find_chat_template(tmp_path, "alpaca")


@pytest.mark.parametrize("source", [SMOLLM2, SMOLLM2.replace("\n", "\\n")],
                         ids=["line breaks", "escaped"])
def test_a_default_system_message_is_kept(tmp_path, source):
    """Guards against SmolLM2 without the system message that all its training conversations began
    with."""
    (tmp_path / "chat_template.jinja").write_text(source)
    assert render_chat(find_chat_template(tmp_path)[1], ["Hi {}"]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi {}<|im_end|>\n<|im_start|>assistant\n")
