"""Turns to text to ids: the folder's own template, the named ones, and which tokens are learned."""
import json
import shutil
import sys
from dataclasses import replace
from datetime import datetime

from support.chat import (
    CHAT_TEMPLATES,
    encode_chat,
    find_chat_template,
    render_chat,
    takes_system,
)
from support.data import Conversation, encode, prompt_of
from support.decoder import load
from support.errors import UserError
from support.start import main
from support.tokenizer import Tokenizer

import pytest
from helpers import TEXT, TINY, write_model
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import write_byte_level, write_like_llama, write_prepending

# Templates as models have them, each with something of its own.
OWN = {
    "BOS once": "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}"
                "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}",
    "BOS every turn": "{% for m in messages %}{% if m['role'] == 'user' %}"
                      "{{ bos_token + '<u> ' + m['content'] | trim + ' <a>' }}"
                      "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
                      "{% endif %}{% endfor %}",
    "lines": """\
{% for m in messages %}
    {% if m.role == 'user' %}
{{ '<u>\n' + m.content + eos_token }}
    {% else %}
{{ '<a>\n' + m.content + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<a>' }}
    {% endif %}
{% endfor %}""",
    "a default system message": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
                                "{{ '<u>system\nBe kind.<e>\n' }}{% endif %}"
                                "{{ '<u>' + m.role + '\n' + m.content + '<e>\n' }}{% endfor %}"
                                "{% if add_generation_prompt %}{{ '<u>assistant\n' }}{% endif %}",
    "generation": "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
                  "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
                  "{% else %}{{ m.content }}{% endif %}{% endfor %}"
                  "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}",
    "an end of its own": "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<e>\n' }}"
                         "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}"
                         "{{ eos_token }}{% endif %}",
    "loops, JSON, no end": "{% for m in messages %}{% if m.content == 'skip' %}{% continue %}"
                           "{% endif %}{{ m.role }}: {{ m.content | tojson }}\n{% endfor %}"
                           "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"}
THINKING = ("{% for m in messages %}{% if m.role == 'user' %}{{ '<u>' + m.content }}{% else %}"
            "{% if loop.last %}{{ '<a>' + m.content + '</s>' }}{% else %}"
            "{{ '<a>' + m.content.split('</t>')[-1] + '</s>' }}{% endif %}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}")
ADDED = {"340": {"content": "<u>", "special": True}, "341": {"content": "<a>", "special": True},
         "342": {"content": "<e>", "special": True}}
END = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False,
       "normalized": False, "single_word": False}
BOS, EOS = 1, 2


@pytest.fixture
def folder(tmp_path):
    """Writes a model folder's metadata: the template in tokenizer_config.json, and files."""
    def write(source=None, files=(), **metadata):
        metadata = {"bos_token": "<s>", "eos_token": END} | metadata
        metadata |= {} if source is None else {"chat_template": source}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(metadata))
        for name, text in dict(files).items():
            (tmp_path / name).write_text(text)
        return tmp_path
    return write


def rendered(folder, turns, **options):
    return render_chat(find_chat_template(folder, **options)[1], turns)


# --------------------------------------------------------------------------------------------------
# The folder's own template


@pytest.mark.parametrize("name, one, three", [
    ("BOS once", "<s>[user]A?[assistant]", "<s>[user]A?[assistant]B.</s>[user]C?[assistant]"),
    ("BOS every turn", "<s><u> A? <a>", "<s><u> A? <a> B. </s><s><u> C? <a>"),
    ("lines", "<u>\nA?</s>\n<a>\n", "<u>\nA?</s>\n<a>\nB.</s>\n<u>\nC?</s>\n<a>\n"),
    ("a default system message", "<u>system\nBe kind.<e>\n<u>user\nA?<e>\n<u>assistant\n",
     "<u>system\nBe kind.<e>\n<u>user\nA?<e>\n<u>assistant\nB.<e>\n<u>user\nC?<e>\n"
     "<u>assistant\n"),
    ("generation", "<user>A?<assistant>", "<user>A?<assistant>B.</s><user>C?<assistant>"),
    ("an end of its own", "<user>A?<e>\n<assistant>",
     "<user>A?<e>\n<assistant>B.<e>\n<user>C?<e>\n<assistant>"),
    ("loops, JSON, no end", 'user: "A?"\nassistant: ',
     'user: "A?"\nassistant: "B."\nuser: "C?"\nassistant: ')])
def test_the_folders_program_is_run(folder, name, one, three):
    """Guards against another prompt than the model was trained with: a line break that jinja2 keeps
    and transformers does not, `generation` or loop controls unknown, JSON with HTML escapes."""
    where = folder(OWN[name])
    assert rendered(where, ["A?"]) == one and rendered(where, ["A?", "B.", "C?"]) == three
    if "JSON" in name:
        assert rendered(where, ["<é>'", "skip", "C?"]).startswith('user: "<é>\'"\nuser: "C?"')


def test_which_of_a_folders_templates(folder):
    """Guards against the tool template of a list, or one older than chat_template.jinja."""
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert rendered(folder(several), ["A?"]) == "plain"
    assert find_chat_template(folder(several[:1]))[0] == "none"
    where = folder("old", {"chat_template.jinja": "new"})
    assert find_chat_template(where)[0] == "own" and rendered(where, ["A?"]) == "new"
    assert find_chat_template(where, "chatml") == find_chat_template(folder(), "chatml")


def test_the_words_that_a_template_knows(folder):
    """Guards special tokens written as text or object, in either file, unset ones, and the date."""
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ sep_token }}|{{ tools is none }}|"
    source += "{{ strftime_now('%Y') }}"
    where = folder(source, {"special_tokens_map.json": '{"pad_token": {"content": "<p>"}}'})
    assert rendered(where, ["A?"]) == f"<s></s><p>|True|{datetime.now().year}"


@pytest.mark.parametrize("source, message", [
    ("{% if %}", "tokenizer_config.json: not a chat template (Expected an expression"),
    ("{{ raise_exception('Roles must alternate\nin turn') }}",
     "tokenizer_config.json: the chat template says: Roles must alternate in turn"),
    ("{{ messages[7].content + 'x' }}", "tokenizer_config.json: the chat template says: "),
    ("{{ messages.append(1) }}", "tokenizer_config.json: the chat template says: "),
    ("{{ ''.__class__.__mro__ }}", "tokenizer_config.json: the chat template says: "),
    ("{{ messages[0].content / 2 }}", "tokenizer_config.json: the chat template says: "),
    ([1], "tokenizer_config.json: chat_template = [1], must be")])
def test_a_template_that_fails_ends_in_one_line(folder, source, message):
    """Guards against a traceback out of somebody's program, and against one that leaves the
    sandbox."""
    with pytest.raises(UserError) as caught:
        rendered(folder(source), ["A?"])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_is_no_text(folder):
    """Guards against a traceback for a damaged file."""
    (folder() / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja: cannot be read"):
        find_chat_template(folder())


def test_without_jinja2(folder, monkeypatch):
    """Guards against a bare ImportError, and against one for a model that needs no template."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="pip install jinja2"):
        find_chat_template(folder(OWN["lines"]))
    assert rendered(folder(OWN["lines"]), ["A?"], name="none") == "A?"
    assert rendered(folder(), ["A?"]) == "A?"


@pytest.mark.parametrize("name", ["BOS once", "a default system message", *CHAT_TEMPLATES])
def test_a_system_message(folder, name):
    """Guards against a system message lost without a word, or beside the default one."""
    where = folder(OWN.get(name))
    chat = None if name in OWN else name
    if name == "none":
        with pytest.raises(UserError, match="--system: .* of --chat none takes no system"):
            find_chat_template(where, chat, system="Be brief.")
        return
    text, plain = rendered(where, ["A?"], name=chat, system="Be brief."), rendered(where, ["A?"],
                                                                                   name=chat)
    assert text.count("Be brief.") == 1 and text.index("Be brief.") < text.index("A?")
    assert "kind" not in text and "curious" not in text and "Be brief." not in plain


def test_a_template_without_system_messages(folder):
    """Guards against a traceback, or silence, where a template takes none."""
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    for source, message in ((refuses, "--system: .*config.json: .*No system!"),
                            ("{{ messages[-1].content }}", "--system: .*config.json takes no sy")):
        with pytest.raises(UserError, match=message):
            find_chat_template(folder(source), system="Be brief.")


# --------------------------------------------------------------------------------------------------
# The named templates

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions. ")
LLAMA3 = "<|start_header_id|>{}<|end_header_id|>\n\n"


@pytest.mark.parametrize("name, one, three", [
    ("chatml", "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n",
     "<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\nB.<|im_end|>\n"
     "<|im_start|>user\nC?<|im_end|>\n<|im_start|>assistant\n"),
    ("llama3", LLAMA3.format("user") + "A?<|eot_id|>" + LLAMA3.format("assistant"),
     LLAMA3.format("user") + "A?<|eot_id|>" + LLAMA3.format("assistant") + "B.<|eot_id|>"
     + LLAMA3.format("user") + "C?<|eot_id|>" + LLAMA3.format("assistant")),
    ("zephyr", "<|user|>\nA?</s>\n<|assistant|>\n",
     "<|user|>\nA?</s>\n<|assistant|>\nB.</s>\n<|user|>\nC?</s>\n<|assistant|>\n"),
    ("llama2", "[INST] A? [/INST]", "[INST] A? [/INST] B. </s><s>[INST] C? [/INST]"),
    ("vicuna", VICUNA + "USER: A? ASSISTANT:",
     VICUNA + "USER: A? ASSISTANT: B.</s>USER: C? ASSISTANT:"), ("none", "A?", "A?B.C?")])
def test_templates_are_the_models_own(name, one, three):
    """Guards against a space or line break too many, at which an instruction-tuned model answers
    worse."""
    assert render_chat(CHAT_TEMPLATES[name], ["A?"]) == one
    assert render_chat(CHAT_TEMPLATES[name], ["A?", "B.", "C?"]) == three


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_braces_in_a_turn_stay(name):
    """Guards against running what the user wrote as a template."""
    turns = ["{0} {x!r} {{ 7 }} {", "{% if %} %s", "{# c #}"]
    text = render_chat(CHAT_TEMPLATES[name], turns)
    assert [text.count(turn) for turn in turns] == [1, 1, 1]


def test_an_unknown_template_is_refused(tmp_path):
    """Guards against a KeyError where the user has mistyped --chat."""
    with pytest.raises(UserError,
                       match="--chat alpaca: .*chatml, llama3, zephyr, llama2, vicuna, none"):
        find_chat_template(tmp_path, "alpaca")


@pytest.mark.parametrize("config, name, said", [
    ({"_name_or_path": "lmsys/vicuna-7b-v1.3"}, "vicuna", "vicuna-7b-v1.3 shows Vicuna's"),
    ({"_name_or_path": "models/Llama-2"}, "none", "decoded as it is; --chat chatml|"),
    ({}, "none", "has no chat template")])
def test_a_folder_without_a_template(folder, config, name, said):
    """Guards a Vicuna that is prompted with bare text, and a guess that nobody is told of."""
    where = folder()
    (where / "config.json").write_text(json.dumps(config))
    found, template = find_chat_template(where)
    assert found == template.name == name and said in template.note and str(where) in template.note
    assert find_chat_template(where, "llama2")[1].note is None
    assert find_chat_template(folder("x"))[1].note is None


def test_who_gave_a_model_is_told_which_template(tmp_path, capsys):
    """Guards against silence about a guess, and against noise where the folder or the user says, or
    nobody has chosen a model."""
    write_model(tmp_path / "vicuna")
    common = ["--prompt", "the", "--drafter", "lookup", "--max-new-tokens", "1", "--dtype",
              "float32", "--device", "cpu"]
    for arguments, lines in ((["--model", str(tmp_path / "vicuna")], 4), ([], 3),
                             (["--model", str(tmp_path / "vicuna"), "--chat", "none"], 3)):
        main([*common, *arguments])
        told = capsys.readouterr().err.splitlines()
        assert len(told) == lines and ("Vicuna's" in told[0]) == (lines == 4)
        assert f"chat template {'vicuna' if lines == 4 else 'none'}" in told[-3]


# --------------------------------------------------------------------------------------------------
# Ids

def a_tokenizer(folder, write=write_like_llama, **metadata):
    size = write(folder)
    path = folder / "tokenizer_config.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(data | metadata))
    return Tokenizer(folder, replace(TINY, vocab_size=size + 8, bos_token_id=BOS))


@pytest.mark.parametrize("name", OWN)
def test_the_template_decides_on_bos(folder, name):
    """Guards against a second BOS, and against one where the template writes none."""
    where = folder(OWN[name], added_tokens_decoder=ADDED)
    tokenizer = a_tokenizer(where)
    template = find_chat_template(where)[1]
    ids = encode_chat(tokenizer, template, ["A?", "B.", "C?"])
    assert ids.count(BOS) == {"BOS once": 1, "BOS every turn": 2}.get(name, 0)
    assert (ids[0] == BOS) == name.startswith("BOS")
    named = encode_chat(tokenizer, CHAT_TEMPLATES["vicuna"], ["A?", "B.", "C?"])
    assert named[0] == BOS and named.count(BOS) == 1
    assert encode_chat(tokenizer, CHAT_TEMPLATES["none"], ["the"]) == tokenizer.encode("the")


# --------------------------------------------------------------------------------------------------
# Which tokens are learned

def marked(ids, learn):
    """The runs of ids that are to be learned."""
    runs = [[]]
    for i, wanted in zip(ids, learn):
        runs[-1].append(i) if wanted else runs.append([])
    return [run for run in runs if run]


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def encode_part(self, text, after=None):
        self.count += len(text)
        return self.tokenizer.encode_part(text, after)


ALL = {**OWN, **dict.fromkeys(CHAT_TEMPLATES)}
CLOSING = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "none": "", "loops, JSON, no end": "",
           "a default system message": "<e>", "an end of its own": "<e>"}


@pytest.fixture(scope="module", params=ALL)
def chat(request, tmp_path_factory):
    """(name of a template, its tokenizer, the template, the text of its end of sequence)."""
    name, folder = request.param, tmp_path_factory.mktemp("chat")
    texts = ["<u>", "<a>", "<e>", "<|im_end|>", "<|eot_id|>"]
    added = {340 + i: {"content": text, "special": True} for i, text in enumerate(texts)}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": ALL[name], "added_tokens_decoder": added}))
    tokenizer = a_tokenizer(folder)
    return name, tokenizer, find_chat_template(folder, None if name in OWN else name)[1]


words = st.sampled_from(["the stones", "a\n\nb", " {} %", "<é>", "kangaroo", "</s", "user", "x "])
said = st.lists(words, min_size=1, max_size=4).map("".join).filter(str.strip)


@given(turns=st.lists(said, min_size=2, max_size=8), special=st.booleans())
def test_answers_are_learned_and_nothing_else(chat, turns, special):
    """Guards the mask for every template: prompts or the template's own words learned, answers or
    their ends not, an answer counted twice, blanks round an answer."""
    name, tokenizer, template = chat
    end = CLOSING.get(name, "</s>")
    turns = turns[:len(turns) // 2 * 2]
    eos = [i for i in (2, 342, 343, 344) if special and end and tokenizer.text_of(i) == end]
    ids, learn = encode(turns, tokenizer, template, eos, 10 ** 6)
    if "JSON" in name:  # what stands in the text is not what was said
        return
    texts = [plain(tokenizer, run) for run in marked(ids, learn)]
    expected = [plain(tokenizer, tokenizer.encode_part(turn)) + end for turn in turns[1::2]]
    if name == "an end of its own" and not eos:  # what that template writes only at the very end
        expected = [text.removesuffix(end) for text in expected[:-1]] + [expected[-1] + "</s>"]
    assert texts == expected


def plain(tokenizer, ids):
    """The pieces in a row, without blanks."""
    return "".join(map(tokenizer.text_of, ids)).replace("▁", "").replace("<0x0A>", "")


@given(turns=st.lists(said, min_size=2, max_size=8))
def test_training_sees_the_prompts_of_decoding(chat, turns):
    """Guards against an answer learned behind another prompt than decoding gives it."""
    name, tokenizer, template = chat
    turns = [turn.strip() for turn in turns[:len(turns) // 2 * 2]]
    ids, learn = encode(turns, tokenizer, template, (2, 342, 343, 344), 10 ** 6)
    prompt = encode_chat(tokenizer, template, turns[:1])
    assert prompt == prompt_of(turns, tokenizer, template) == ids[:len(prompt)]
    assert not any(learn[:len(prompt)])
    if CLOSING.get(name, "</s>"):  # then answers and turns cannot grow together
        assert learn[len(prompt)]
        for k in range(3, len(turns), 2):
            prompt = encode_chat(tokenizer, template, turns[:k])
            assert prompt == ids[:len(prompt)] and learn[len(prompt)]
            assert not learn[len(prompt) - 1]


def test_training_sees_the_system_message_of_a_conversation(chat):
    """Guards an answer that is learned without what it obeys, or a message that is learned."""
    _, tokenizer, template = chat
    turns = Conversation(["A?", "the stones", "B?", "kangaroo"])
    plain = encode(turns, tokenizer, template, (2,), 10 ** 6)
    turns.system = "Be brief."
    ids, learn = encode(turns, tokenizer, template, (2,), 10 ** 6)
    if not takes_system(template):
        return
    template = replace(template, system="Be brief.")
    assert (ids, learn) == encode([*turns], tokenizer, template, (2,), 10 ** 6)
    assert marked(ids, learn) == marked(*plain) and ids != plain[0]
    prompt = prompt_of(turns, tokenizer, template)
    assert prompt == encode_chat(tokenizer, template, ["A?"]) == ids[:len(prompt)]


@pytest.mark.parametrize("write", [write_like_llama, write_prepending, write_byte_level])
def test_a_conversation_is_the_ids_of_its_text(folder, write):
    """Guards the cuts between turns: at special tokens nothing may be added or lost."""
    where = folder(OWN["lines"], **({"added_tokens_decoder": ADDED} if write == write_like_llama
                                    else {}))
    tokenizer, (_, template) = a_tokenizer(where, write), find_chat_template(where)
    turns = [TEXT[i % 4] for i in range(6)]
    ids, learn = encode(turns, tokenizer, template, (2,), 10 ** 6)
    assert ids == tokenizer.encode_part(render_chat(template, turns, answer=False))
    assert [run[-1] for run in marked(ids, learn)] == [EOS] * 3


@pytest.mark.parametrize("first, learned", [("a</s>b", "a</s>"), ("</s>", "</s>"),
                                            ("<u>a", "<u>a</s>"), ("a<s>b", "a<s>b</s>")])
def test_an_answer_that_spells_a_special_token(folder, first, learned):
    """Guards the mask's edges: such an answer is learned from its first token to where decoding
    would end, and moves no other."""
    where = folder(OWN["lines"], added_tokens_decoder=ADDED)
    tokenizer, (_, template) = a_tokenizer(where), find_chat_template(where)
    ids, learn = encode(["Why?", first, "So?", "yes"], tokenizer, template, (2,), 1000)
    texts = [plain(tokenizer, run) for run in marked(ids, learn)]
    assert texts == [learned, "yes</s>"]


def test_what_the_text_shows_otherwise_is_not_learned(folder):
    """Guards templates that drop the thinking of earlier turns: what is learned is what the text
    says behind the very prompt of decoding, or nothing."""
    where = folder(THINKING)
    tokenizer, (_, template) = a_tokenizer(where), find_chat_template(where)
    turns = ["one", "<t>why</t>the", "two", "stones", "three", "<t>so</t>end"]
    ids, learn = encode(turns, tokenizer, template, (2,), 1000)
    texts = [plain(tokenizer, run) for run in marked(ids, learn)]
    assert texts == [plain(tokenizer, tokenizer.encode_part(text))
                     for text in ("stones</s>", "<t>so</t>end</s>")]
    shown = THINKING.replace("'<a>' + m.content + '</s>'", "'<a><t></t>' + m.content + '</s>'")
    _, template = find_chat_template(folder(shown))
    ids, learn = encode(["one", "the", "two", "end"], tokenizer, template, (2,), 1000)
    texts = [plain(tokenizer, run) for run in marked(ids, learn)]
    assert texts == [plain(tokenizer, tokenizer.encode_part(text))
                     for text in ("the</s>", "<t></t>end</s>")]


def test_a_conversation_is_encoded_once(folder):
    """Guards 8 minutes for 17,000 conversations: every turn encoded all turns before it again."""
    where = folder(OWN["lines"])
    tokenizer, (_, template) = Counting(a_tokenizer(where)), find_chat_template(where)
    turns = [TEXT[i % 4] for i in range(100)]
    encode(turns, tokenizer, template, (2,), 10 ** 6)
    assert tokenizer.count == len(render_chat(template, turns, answer=False))
    tokenizer.count = 0
    encode(turns, tokenizer, template, (2,), 50)
    assert tokenizer.count < 500


# --------------------------------------------------------------------------------------------------
# Against transformers

FLAGS = [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    write_like_llama(folder)
    return folder / "tokenizer.model"


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("seed", range(3))
def test_ids_are_those_of_transformers(folder, vocabulary, name, legacy, seed):
    """Guards templates × added tokens × legacy: another prompt than the model was trained with."""
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("4."):
        pytest.skip("transformers 5 has no tokenizer by sentencepiece, see support/tokenizer.py")
    added = {i: token | FLAGS[(int(i) + seed) % 4] for i, token in ADDED.items()}
    where = folder(OWN[name], legacy=legacy, add_bos_token=seed != 1, add_eos_token=seed == 2,
                   added_tokens_decoder=added if seed else {}, tokenizer_class="LlamaTokenizer",
                   additional_special_tokens=["<u>", "<a>", "<e>"] if seed or legacy else [],
                   pad_token="[PAD]" if seed == 2 else None)
    shutil.copy(vocabulary, where)
    theirs = transformers.LlamaTokenizer.from_pretrained(where)
    ours = Tokenizer(where, replace(TINY, vocab_size=400))
    template = find_chat_template(where)[1]
    for text in ("the stones", " the  stones ", "a</s>b <s> c", "x\n\n<u>\n y <e> z<a>", "é 🦘</s>",
                 "▁the", "<unk>the [PAD] x", ""):
        assert ours.encode(text) == theirs(text).input_ids
    for turns in (["the stones"], [" a ", "b</s>c", "<u> \nd"], ["1", "2", "3", "4 ", "5"]):
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn}
                    for i, turn in enumerate(turns)]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_chat(template, turns) == text
        assert encode_chat(ours, template, turns) == theirs(text, add_special_tokens=False
                                                            ).input_ids


@pytest.mark.parametrize("legacy", [None, False])
@pytest.mark.parametrize("flags", [*FLAGS, {"single_word": True}, {"special": True}], ids=str)
def test_added_tokens_are_those_of_transformers(folder, vocabulary, legacy, flags):
    """Guards tokens that are not special: where they are cut out, and their text in decoding."""
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith("4."):
        pytest.skip("transformers 5 has no tokenizer by sentencepiece, see support/tokenizer.py")
    added = {i: token | {"special": False, "normalized": False} | flags
             for i, token in ADDED.items()}
    where = folder(legacy=legacy, added_tokens_decoder=added, tokenizer_class="LlamaTokenizer")
    shutil.copy(vocabulary, where)
    theirs = transformers.AutoTokenizer.from_pretrained(where)
    ours = Tokenizer(where, replace(TINY, vocab_size=400))
    for text in ("the<u>stones", "the <u> <a>\n the", "<u><a>🦘<e>", "<u>the", "a, <e>. b</s>"):
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("write", [write_prepending, write_byte_level])
@pytest.mark.parametrize("name", OWN)
def test_ids_of_a_tokenizer_json_are_those_of_transformers(folder, write, name):
    """Guards the package tokenizers' half, with the added tokens of tokenizer_config.json."""
    transformers = pytest.importorskip("transformers")
    where = folder(OWN[name])
    ours = a_tokenizer(where, write, tokenizer_class="PreTrainedTokenizerFast")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(where)
    template = find_chat_template(where)[1]
    for turns in (["the stones"], [" a ", "b</s>c", "<u> \nd"], ["1", "2", "3", "4 ", "5"]):
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn}
                    for i, turn in enumerate(turns)]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_chat(template, turns) == text
        assert encode_chat(ours, template, turns) == theirs(text, add_special_tokens=False
                                                            ).input_ids


def test_a_text_ends_with_the_eos_of_the_tokenizer_too(tmp_path):
    """A chat model whose config.json names the base model's EOS, and its tokenizer_config.json the
    one that closes an answer: decoding ran on into a turn of the user's."""
    config = write_model(tmp_path)
    decoder = load(tmp_path, device="cpu", dtype="float32")
    assert decoder.model.config.eos_token_ids == config.eos_token_ids == (2,)
    ids = decoder.generate("Once upon a time", "none", 40)[1]["ids"]
    end = next(i for i in ids if i > 2)
    text = decoder.tokenizer.text_of(end)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": text, "added_tokens_decoder": {end: {"content": text, "special": True}}}))
    decoder = load(tmp_path, device="cpu", dtype="float32")
    assert decoder.model.config.eos_token_ids == (2, end)
    found = decoder.generate("Once upon a time", "none", 40)[1]["ids"]
    assert found == ids[:ids.index(end) + 1]
