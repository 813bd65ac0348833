"""The command line, end to end on a tiny model folder: what a user types, what comes back, and with
which exit status."""
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import kangaroo
from drafters.method import Vanilla
from drafters.tree import TREE_STEPS
from support import arguments, command_line, decoder, start

import pytest
import torch
from helpers import save_file, some, thorough, write_adapter, write_model
from safetensors.torch import load_file

PROMPT = "Once upon a time"
SCRIPT = Path(kangaroo.__file__).resolve()
TREE = ["--tree", "--threshold", 0]
DRAFTERS = [["--drafter", "kangaroo", "--threshold", 0], TREE, ["--drafter", "lookup"],
            ["--drafter", "none"]]
SAMPLED = ["--temperature", 0.9, "--top-k", 30, "--top-p", 0.9, "--seed", 3]
HOT = ["--temperature",
       5]  # the noise, which drafter and target share, decides: many drafted tokens are accepted


# --------------------------------------------------------------------------------------------------
# A model folder, ways to change it, and ways to run the program on it

def edit(path, **changes):
    """Change fields of a JSON file; None removes the field."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with an adapter, and without an end-of-sequence token, so that the length of a
    text is never luck."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_adapter(folder / "adapter", write_model(folder))
    edit(folder / "config.json", eos_token_id=[])
    return folder


@pytest.fixture
def variant(model, tmp_path):
    """A copy of the model folder with changes to its config.json."""
    def copy(**changes):
        folder = shutil.copytree(model, tmp_path / "variant", dirs_exist_ok=True)
        edit(folder / "config.json", **changes)
        return folder
    return copy


def words_for(model, prompt, args):
    """The words of a command line; later ones win, so `args` may name the defaults again."""
    words = ["--model", model, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 24]
    return [
        str(word)
        for word in [*words, *(["--prompt", prompt] if prompt is not None else []), *args]
    ]


@pytest.fixture
def cli(model, capfd):
    """Run the program in this process; returns (exit status, stdout, stderr)."""
    def run(*args, prompt=PROMPT):
        status, (out, err) = start.main(words_for(model, prompt, args)), capfd.readouterr()
        return status, out, re.sub("^.*: has no chat template, .*\n", "", err)
    return run


@pytest.fixture
def decode(cli):
    """The one JSON object that --json prints."""
    def run(*args, **kwargs):
        status, out, err = cli("--json", *args, **kwargs)
        assert status == 0, err
        return json.loads(out)
    return run


@pytest.fixture
def refused(cli, recwarn):
    """Check that a command line is refused as a user should see it: status 2, one line that has all
    `words`, no output."""
    def run(words, *args, **kwargs):
        status, out, err = cli(*args, **kwargs)
        assert (status, out) == (2, "")
        assert re.fullmatch(r"kangaroo\.py: [^\n]+\n", err), err
        assert not recwarn.list, "a warning would be a second line"
        for word in [words] if isinstance(words, str) else words:
            assert word in err
    return run


def facts(result):
    """All of a result but what the clock and the place in a file decide."""
    return {name: value for name, value in result.items()
            if "seconds" not in name and name != "seed"}


# --------------------------------------------------------------------------------------------------
# Output

def test_plain_output_is_prompt_text_summary(cli, decode):
    """Guards what a user sees: text lost, doubled or mixed with settings or escape codes, a summary
    of other numbers."""
    result = decode()
    status, out, err = cli()
    assert status == 0 and out == PROMPT + result["text"] + "\n" and "\033" not in err
    settings, speed, drafting = err.splitlines()
    assert settings == ("model · cpu · float32 · chat template none · drafter exit layer 1, γ 6, "
                        "η 0.6 · width 7")
    assert re.fullmatch(r"24 tokens in [\d.]+ s · [\d.]+ tokens/s · stopped at --max-new-tokens",
                        speed)
    drafted, accepted, passes = (sum(result["drafted"]), sum(result["accepted"]), result["rounds"])
    assert drafting == (f"{passes} passes of the whole model · {accepted} of {drafted} drafted "
                        f"tokens accepted · {24 / passes:.2f} tokens per pass")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_settings_name_the_dtype(cli, dtype):
    """Guards the report of what ran: a --dtype that is not the one used, or not shown."""
    status, _, err = cli("--dtype", dtype, "--max-new-tokens", 2)
    assert status == 0 and f" · cpu · {dtype} · " in err


def test_summary_counts():
    """Guards the summary's arithmetic: a speedup of texts that differ in length, a mean of ratios,
    a median that is none."""
    one = {"ids": [7] * 4, "rounds": 2, "drafted": [2, 1], "accepted": [2, 0], "seconds": 1.5,
           "stopped_at": None}
    two = {"ids": [7] * 2, "rounds": 1, "drafted": [1], "accepted": [1], "seconds": 0.5,
           "stopped_at": "--max-new-tokens"}
    lines = ["6 tokens in 2.00 s · 3.0 tokens/s · 1 of 2 stopped at --max-new-tokens",
             "3 passes of the whole model · 3 of 4 drafted tokens accepted · 2.00 tokens per pass"]
    assert command_line.summary([one, two]) == lines
    more = {"width": 5, "repeats": 1}
    compared = [one | more | {"identical": True, "vanilla_seconds": 3.0, "one_row_seconds": 2.0,
                              "one_row_tokens": 8},
                two | more | {"identical": False, "vanilla_seconds": 2.0, "one_row_seconds": 1.0,
                              "one_row_tokens": 2}]
    assert command_line.summary(compared) == [*lines, (
        "1 of 2 identical to vanilla at width 5, speedup 3.00 · against width 1 1.33 (one run)")]
    one = [compared[0] | {"repeats": 3}]
    assert command_line.summary(one)[2] == ("identical to vanilla at width 5, speedup 2.00 · "
                                            "against width 1 0.67 (medians of 3 runs)")
    assert "NOT identical" in command_line.summary([one[0] | {"identical": False}])[2]


class Letters:
    """Stands in for TextStream: a token's text is its id in brackets, at once."""

    def __init__(self, tokenizer, prompt_ids):
        pass

    def push(self, token):
        return f"<{token}>"

    def flush(self):
        return ""


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_a_terminal_shows_accepted_tokens_in_green(cli, decode, monkeypatch, drafter):
    """Guards the colours: the target's own token in green, a drafted one not, codes in spite of
    NO_COLOR, changed text."""
    monkeypatch.setattr(decoder, "TextStream", Letters)
    args = *drafter, *HOT
    result = decode(*args)
    assert any(result["accepted"]) or not {"kangaroo", "--tree"} & set(drafter)
    ids, expected = iter(result["ids"]), ""
    for accepted in result["accepted"]:
        expected += "".join(f"\033[32m<{next(ids)}>\033[0m"
                            for _ in range(accepted)) + f"<{next(ids)}>"
    plain = cli(*args)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    coloured = cli(*args)[1]
    assert expected in coloured
    assert re.sub(r"\033\[\d*m", "", coloured) == plain == PROMPT + result["text"] + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in cli(*args)[1]


def test_an_answer_begins_with_its_first_word(decode, monkeypatch):
    """Guards the space in front of a first word: shown after a chat template, or lost where the
    text goes on from the prompt."""
    monkeypatch.setattr(Letters, "push", lambda self, token: f" {token}")
    monkeypatch.setattr(decoder, "TextStream", Letters)
    result, answer = decode(), decode("--chat", "chatml")
    assert result["text"] == "".join(f" {token}" for token in result["ids"])
    assert answer["text"] == " ".join(map(str, answer["ids"]))


def test_chat_shows_the_answer_only(cli, decode):
    """Guards --chat: a template not applied, or the user's own words and the template's shown as
    the answer."""
    result = decode("--chat", "chatml")
    status, out, err = cli("--chat", "chatml")
    assert status == 0 and out == result["text"] + "\n" and "chat template chatml" in err
    assert len(result["prompt_ids"]) > len(decode()["prompt_ids"]) + 10


# --------------------------------------------------------------------------------------------------
# --json and losslessness

@pytest.mark.parametrize("steps", [0, 1, 3, 7])
@pytest.mark.parametrize("sampling", [[], SAMPLED])
def test_json_is_consistent(decode, steps, sampling):
    """Guards what experiments are computed from: rounds, drafts and ids that do not add up, --steps
    not respected."""
    result = decode("--steps", steps, "--threshold", 0, *sampling)
    assert result.keys() == {"prompt_ids", "ids", "text", "rounds", "drafted", "accepted",
                             "seconds", "sample", "seed", "stopped_at",
                             "accepted_by_position"}
    assert result["rounds"] == len(result["drafted"]) == len(result["accepted"])
    assert sum(result["accepted"]) + result["rounds"] == len(result["ids"]) == 24
    assert all(0 <= a <= d <= steps
               for d, a in zip(result["drafted"], result["accepted"], strict=True))
    assert max(result["drafted"]) == steps and result["seconds"] > 0


@pytest.mark.parametrize("sampling, drafter", some(product([[], SAMPLED], [
    [], ["--drafter", "lookup"], ["--steps", 0], ["--steps", 7], ["--threshold", 0],
    ["--threshold", 1], ["--exit-layer", 0], ["--exit-layer", 3], ["--adapter", "random"]]), 2))
def test_every_drafter_gives_vanilla_ids(decode, drafter, sampling):
    """Guards the promise of the whole program, from flags to ids: an option about drafting that
    changes the output."""
    wide = "--width", 8  # other widths round in other ways
    vanilla = decode("--drafter", "none", *wide, *sampling)
    result = decode(*wide, *drafter, *sampling)
    assert vanilla.keys() == result.keys() and not any(
        vanilla["drafted"]) and vanilla["rounds"] == 24
    assert [vanilla[name] for name in ("prompt_ids", "ids", "text")
            ] == [result[name] for name in ("prompt_ids", "ids", "text")]


@pytest.mark.parametrize("sampling, tree", some(product([[], SAMPLED], [
    [], ["--nodes", 3], ["--top-candidates", 2], ["--width", 32], ["--steps", 2]]), 2))
def test_a_tree_gives_vanilla_ids(cli, decode, tree, sampling):
    """Guards --tree from flags to ids, and what is told of trees: nodes, parents and paths that do
    not fit the text."""
    result = decode(*TREE, *tree, *sampling)
    vanilla = decode("--drafter", "none", "--width", "32" if "--width" in tree else "16", *sampling)
    assert vanilla["ids"] == result["ids"] and vanilla["text"] == result[
        "text"] and "trees" not in vanilla
    assert [len(t["tokens"]) for t in result["trees"]] == result["drafted"]
    assert [len(t["accepted"]) for t in result["trees"]] == result["accepted"]
    limits = dict(zip(tree[::2], tree[1::2]))
    nodes = limits.get("--nodes", limits.get("--width", 16) - 1)
    ids = iter(result["ids"])
    for t in result["trees"]:
        assert len(t["tokens"]) == len(t["parents"]) == len(t["confidence"]) <= nodes
        assert max(map(t["parents"].count, t["parents"]),
                   default=0) <= limits.get("--top-candidates", 10)
        assert len(t["accepted"]) <= limits.get("--steps", TREE_STEPS)
        assert [t["parents"][node - 1]
                for node in t["accepted"]] == [0, *t["accepted"]][:len(t["accepted"])]
        assert [t["tokens"][node - 1]
                for node in t["accepted"]] == [next(ids) for _ in t["accepted"]]
        next(ids, None)
    status, out, err = cli(*TREE, *tree, *sampling)
    drafted, accepted = (sum(result[name]) for name in ("drafted", "accepted"))
    assert status == 0 and f"{accepted} of {drafted} drafted tokens accepted" in err
    assert f"tree of {nodes} nodes" in err


def test_an_adapter_has_settings_of_its_own_for_a_tree(cli, refused, variant):
    """Guards the adapter's key `tree`: a chain's γ and η used for a tree or the other way round,
    flags that do not win."""
    folder = variant()
    edit(folder / "adapter" / "config.json", steps=3, threshold=0.5,
         tree={"steps": 4, "threshold": 0.2, "top_candidates": 5, "nodes": 12})
    for args, settings in (([], "γ 3, η 0.5 · width 4"), ([
            "--tree"
    ], "γ 4, η 0.2, tree of 12 nodes, 5 candidates · width 13"), ([
            "--tree", "--width", 16
    ], "tree of 12 nodes, 5 candidates · width 16"), ([
            "--tree", "--nodes", 9, "--steps", 5
    ], "γ 5, η 0.2, tree of 9 nodes, 5 candidates"), (["--tree", "--width",
                                                       10], "tree of 9 nodes")):
        assert settings in cli("--model", folder, "--max-new-tokens", 2, *args)[2]
    edit(folder / "adapter" / "config.json", tree={"nodes": "many"})
    refused(["config.json", "nodes", "'many'"], "--model", folder)
    edit(folder / "adapter" / "config.json", tree=7)
    refused(["config.json", "tree", "7"], "--model", folder)


@pytest.mark.parametrize("changed",
                         [["--seed", 4], ["--temperature", 3], ["--top-k", 2], ["--top-p", 0.1]])
def test_sampling_flags_reach_the_sampler(decode, changed):
    """Guards against a flag that is read and forgotten, which no comparison with vanilla decoding
    can see."""
    assert decode(*SAMPLED, *changed)["ids"] != decode(*SAMPLED)["ids"]


@pytest.mark.parametrize("temperature", ["1e-30", "1e-40", "1e-300"])
def test_a_tiny_temperature_is_greedy_or_refused(cli, decode, temperature):
    """Guards against logits / T that overflows to infinity: the lowest id with a positive logit
    then wins, without a word."""
    status, out, _ = cli("--json", "--temperature", temperature)
    assert status == 2 or json.loads(out)["ids"] == decode()["ids"]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_compare_adds_the_vanilla_run(decode, monkeypatch, drafter):
    """Guards --compare: a comparison of the drafter with itself, or one that is reported in words
    only."""
    alone, generate, drafters = decode(*drafter), decoder.generate, []
    monkeypatch.setattr(decoder, "generate",
                        lambda *args: drafters.append(type(args[1])) or generate(*args))
    result = decode("--compare", *drafter)
    assert drafters[-1] is drafters[-2] is Vanilla
    assert drafters[-3] is not Vanilla or "none" in drafter
    added = {name: result.pop(name) for name in ("vanilla_ids", "vanilla_seconds", "identical",
                                                 "width", "repeats", "one_row_tokens")}
    assert facts(result) == facts(alone)
    assert added["identical"] is True and added["vanilla_ids"] == result["ids"] and added[
        "vanilla_seconds"] > 0


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_compare_fails_when_one_prompt_differs(cli, tmp_path, monkeypatch, json_flag):
    """Guards the exit status that a script relies on: 1 as soon as one prompt of several differs, 0
    only when none does."""
    (tmp_path / "prompts").write_text("One day\nshe met\n")
    args = "--compare", "--prompts", tmp_path / "prompts", *json_flag
    status, out, err = cli(*args, prompt=None)
    assert status == 0 and "2 of 2 identical to vanilla at width 7, speedup " in err
    decode, calls = command_line.Session.decode, iter(range(9))

    def wrong(self, ids, drafter, width, sampler):
        ids, seconds = decode(self, ids, drafter, width, sampler)
        return ids if next(calls) else [*ids[:-1], 0], seconds

    monkeypatch.setattr(command_line.Session, "decode", wrong)
    status, out, err = cli(*args, prompt=None)
    assert status == 1 and "1 of 2 identical to vanilla at width 7, speedup " in err


# --------------------------------------------------------------------------------------------------
# Several texts

def test_prompts_and_samples_are_drawn_independently(cli, decode, tmp_path):
    """Guards against one noise for all: equal prompts gave one text, and others correlated ones.
    The first text is what it is alone; the seed that --json tells gives any of them alone."""
    (tmp_path / "prompts").write_text(f"{PROMPT}\n{PROMPT}\n{PROMPT}\n")
    _, out, _ = cli("--prompts", tmp_path / "prompts", "--samples", 2, "--json", *SAMPLED,
                    prompt=None)
    results = [json.loads(line) for line in out.splitlines()]
    assert [r["sample"] for r in results] == [0, 1] * 3
    assert len({r["text"] for r in results}) == len({r["seed"] for r in results}) == 6
    assert results[0]["seed"] == 3 and results[0]["ids"] == decode(*SAMPLED)["ids"]
    for r in results[1:]:
        assert decode(*SAMPLED, "--seed", r["seed"])["ids"] == r["ids"]


def test_a_drafter_of_which_nothing_is_accepted_is_told(cli, model):
    """Guards against an adapter for another model, template or none at all: right, slow, silent."""
    long = "--max-new-tokens", 60, "--threshold", 0
    for tree in ([], ["--tree", "--top-candidates", 1]):
        err = cli("--adapter", "random", *long, *tree)[2].splitlines()
        assert len(err) == 4 and "warning: of " in err[3] and "random" in err[3], err
        assert "chat template (trained with: unknown, now: none)" in err[3]
    few = "--max-new-tokens", 8, "--threshold", 0
    assert "warning" not in cli("--adapter", "random", *few)[2]
    assert "warning" not in cli(*long, *HOT)[2]  # enough is accepted


# --------------------------------------------------------------------------------------------------
# Prompts

@pytest.mark.parametrize("text", [
    "One day\n\n  \nshe met\n", "One day\r\nshe met",
    '{"prompt": "One day"}\n\n{"prompt": "she met", "id": 1}\n',
    '{"turns": ["One day"]}\n{"turns": ["she met"], "category": "writing"}',
    '\ufeff{"prompt": "One day"}\n{"prompt": "she met"}',
    '["One day", "she met"]', '[\n{"prompt": "One day"},\n{"turns": ["she met"]}\n]\n',
], ids=["lines", "CRLF", "prompt", "turns", "BOM", "list", "list of objects"])
def test_prompt_files(cli, decode, tmp_path, text):
    """Guards the formats: blank lines as prompts, JSON taken for text, lines of a list for prompts.
    """
    path = tmp_path / "prompts"
    path.write_bytes(text.encode())
    status, out, err = cli("--json", "--prompts", path, prompt=None)
    assert status == 0, err
    assert [facts(json.loads(line)) for line in out.splitlines()
            ] == [facts(decode(prompt=p)) for p in ("One day", "she met")]


@pytest.fixture
def converse(cli, model, monkeypatch):
    """What --json prints of a conversation in which a person types these lines."""
    def run(*lines, args=(), model=model):
        lines = iter(lines)

        def typed(prompt):
            line = next(lines, EOFError)
            if line in (EOFError, KeyboardInterrupt):
                raise line
            return line

        monkeypatch.setattr("builtins.input", typed)
        monkeypatch.setattr(arguments, "on_a_terminal", lambda: True)
        status, out, err = cli("--json", "--model", model, *args, prompt=None)
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()], err
    return run


def test_a_conversation(converse, model):
    """Guards what a turn follows: all that was said before it; nothing, for a model without chat
    template; and a blank line, Ctrl-C where nothing is typed, what no tokenizer takes."""
    for chat in ("chatml", "none"):
        found, err = converse("One day", " ", KeyboardInterrupt, "a\udcff", "she met",
                              args=("--chat", chat, "--samples", 2, *SAMPLED))
        encode = decoder.load(model, device="cpu", chat=chat).encode
        said = ["One day", found[1]["text"].strip()] if chat == "chatml" else []
        assert [r["prompt_ids"] for r in found] == 2 * [encode("One day")] + 2 * [
            encode(*said, "she met")]
        assert len({str(r["ids"]) for r in found}) == 4 and "not UTF-8" in err
        assert err.count("tokens per pass") == 4 and err.count("stopped at --max-new-tokens") == 4


def test_a_conversation_that_outgrows_the_context(converse, variant):
    """Guards the end of the context: it ended the program, or the answer, without a word."""
    folder = variant(max_position_embeddings=64)
    found, err = converse("One day", "she met", "word " * 90, args=("--chat", "chatml"),
                          model=folder)
    encode = decoder.load(folder, device="cpu", chat="chatml").encode
    assert [r["prompt_ids"] for r in found] == [encode("One day"), encode("she met")]
    assert "what was said before is forgotten" in err
    assert "stopped at the end of the context" in err and err.count("max_position_embedd") == 2


def test_an_answer_that_is_stopped_is_gone_on_from(converse, model, monkeypatch):
    """Guards Ctrl-C in an answer: it ended the program, or what was said so far was lost."""
    show, shown = command_line.Screen.show, []

    def stop(self, text, drafted):
        shown.append(text)
        show(self, text, drafted)
        if len(shown) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(command_line.Screen, "show", stop)
    found, _ = converse("One day", "she met", args=("--chat", "chatml"))
    encode = decoder.load(model, device="cpu", chat="chatml").encode
    said = "".join(shown[:8])  # the piece that was being shown when it came is not certain
    assert [r["prompt_ids"] for r in found] == [encode("One day", said.strip(), "she met")]


def test_several_prompts_are_told_apart(cli, decode, tmp_path):
    """Guards the plain output of a file: prompts not shown, texts that run into one another, a
    summary for each."""
    (tmp_path / "prompts").write_text("One day\nshe met")
    _, out, _ = cli("--prompts", tmp_path / "prompts", prompt=None)
    one, two = decode(prompt="One day")["text"], decode(prompt="she met")["text"]
    text = f"One day{one}\n\nshe met{two}\n"
    assert out == text


def test_all_turns_are_a_conversation(cli, model, variant, tmp_path):
    """Guards Spec-Bench's second turn, which was left out without a word: it follows the answer to
    the first, and has an object of its own."""
    (tmp_path / "turns").write_text('{"turns": ["One day", "she met"]}\n{"turns": ["He"]}')
    args = "--chat", "chatml", "--prompts", tmp_path / "turns"
    status, out, err = cli(*args, "--json", prompt=None)
    results = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(results) == 3, err
    said = "One day", results[0]["text"].strip(), "she met"
    encode = decoder.load(model, device="cpu", chat="chatml").encode
    assert [r["prompt_ids"] for r in results] == [
        encode("One day"), encode(*said), encode("He")]
    room = len(encode("One day")) + 30
    status, out, err = cli(*args, "--model", variant(max_position_embeddings=room), prompt=None)
    assert status == 2 and "turn 2 of prompt 1: left out" in err and "max_position_embedd" in err
    assert "48 tokens" in err  # the other conversation is answered


def test_a_jsonl_line_ends_at_a_newline_only(decode, tmp_path):
    """Guards against str.splitlines, which also breaks at U+2028 and U+0085: these may stand raw
    inside a JSON string."""
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"prompt": "One\u2028day\u0085"}, ensure_ascii=False), encoding="utf-8")
    assert facts(decode("--prompts", tmp_path / "prompts.jsonl",
                        prompt=None)) == facts(decode(prompt="One\u2028day\u0085"))


@pytest.mark.parametrize("text, where, words",
                         [('{"prompt": "a"}\n\n{"prompt": \n', ":3", ["JSON"]),
                          ('{"prompt": "a"}\nplain', ":2", ["JSON"]),
                          ('{"question": "a"}', ":1", ["prompt", "turns"]),
                          ('{"prompt": " "}', ":1", ["prompt"]),
                          ('{"prompt": 5}', ":1", ["prompt"]), ('{"turns": []}', ":1", ["turns"]),
                          ('{"turns": "text"}', ":1", ["turns"]), ('{"turns": 5}', ":1", ["turns"]),
                          ('{"turns": {"a": 1}}', ":1", ["turns"]),
                          ('{"prompt": "a"}\n["b"]', ":2", ["object"]),
                          ('{"prompt": "a\\ud800"}', ":1", ["prompt"]), ("", "", ["prompt"]),
                          ("\n \n", "", ["prompt"]), (None, "", ["No such file"]),
                          ("\udcff", "", ["utf-8"])])
def test_bad_prompt_files_are_refused(refused, tmp_path, text, where, words):
    """Guards against a traceback, or a prompt made up of what is no prompt; file and line say where
    to look."""
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_bytes(text.encode(errors="surrogateescape"))
    refused([*words, str(path) + where], "--prompts", path, prompt=None)


@pytest.mark.parametrize("data", ["One day", "Über den Fluß\n"])
def test_a_dash_reads_standard_input(decode, monkeypatch, data):
    """Guards `--prompt -`: a minus sign as the prompt, input that loses characters, or the line
    break that `echo` adds."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode()), encoding="utf-8"))
    assert facts(decode("--prompt", "-")) == facts(decode(prompt=data.strip()))


def test_a_byte_order_mark_is_no_text(decode, monkeypatch):
    """Guards what some shells write before a text, which became three tokens."""
    marked = "\ufeff" + PROMPT
    assert decode(prompt=marked)["prompt_ids"] == decode()["prompt_ids"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(marked.encode()), "utf-8"))
    assert decode(prompt=None)["prompt_ids"] == decode()["prompt_ids"]  # a pipe needs no --prompt -


@pytest.mark.parametrize("data", [b"", b" \n", b"\xff\xfe"])
def test_bad_standard_input_is_refused(refused, monkeypatch, data):
    """Guards against a traceback from input that is empty or is not UTF-8."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    refused("prompt", "--prompt", "-")


# --------------------------------------------------------------------------------------------------
# Where a text ends

@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("n", [1, 2, 7, 65])
def test_max_new_tokens_is_exact(decode, drafter, n):
    """Guards the end of a text: an accepted draft that runs past the limit, or a last token left
    out."""
    assert len(decode(*drafter, "--max-new-tokens", n)["ids"]) == n


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_context_ends_the_text(decode, refused, variant, drafter):
    """Guards the last positions of the context: one token too many has a position that the model
    never saw."""
    full = decode(*drafter)
    for room in (5, 1):
        folder = variant(max_position_embeddings=len(full["prompt_ids"]) + room)
        assert decode(*drafter, "--model", folder)["ids"] == full["ids"][:room]
    folder = variant(max_position_embeddings=len(full["prompt_ids"]))
    refused([str(len(full["prompt_ids"])), "max_position_embeddings"], *drafter, "--model", folder)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("which", [0, 5])
def test_an_eos_token_ends_the_text(decode, variant, drafter, which):
    """Guards eos: a text that goes on behind it, an eos inside an accepted draft overlooked, a
    count with tokens behind it."""
    args = *drafter, *HOT
    ids = decode(*args)["ids"]
    eos = ids[which]
    result = decode(*args, "--model", variant(eos_token_id=[eos]))
    assert result["ids"] == ids[:ids.index(eos) + 1]
    assert len(result["ids"]) - sum(result["accepted"]) in (result["rounds"], result["rounds"] - 1)
    assert which or result["text"] == ""


# --------------------------------------------------------------------------------------------------
# --help

def test_help_names_every_option_and_default(capfd, monkeypatch):
    """Guards the help: an option forgotten or twice, a default missing or not the one that is used,
    lines that wrap."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        start.main(["--help"])
    out = capfd.readouterr().out
    assert stop.value.code == 0 and max(map(len, out.splitlines())) <= 80
    titles = re.findall(r"^(\w.*):$", out, re.M)
    assert titles == ["what to decode", "drafting", "sampling", "what to show", "device and GPU",
                      "examples"]
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)|\n\n", out)]
    entries = {re.search("--[a-z0-9-]+", entry)[0]: entry for entry in entries if entry[0] == "-"}
    defaults = {"--" + name.replace("_", "-"): value
                for name, value in vars(arguments.make_parser().parse_args([])).items()}
    assert {*entries} == {*defaults, "--help"} - {"--text"}
    for name, default in defaults.items():
        # Without these nothing is said, read or written.
        if default is None and name not in ("--text", "--prompt", "--prompts", "--system",
                                            "--trace", "--repeats"):
            assert "(default: " in entries[name]
        elif not isinstance(default, bool) and default is not None:
            assert f"(default: {default})" in entries[name]


# --------------------------------------------------------------------------------------------------
# Bad input

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("args, words",
                         [("--model absent", ["absent", "--model"]),
                          ("--adapter absent", ["absent", "--adapter"]),
                          ("--dtype float8", ["--dtype", "float8"]),
                          ("--chat alpaca", ["--chat", "alpaca"]),
                          ("--drafter eagle", ["--drafter", "eagle"]),
                          ("--device tpu", ["--device", "tpu"]), ("--device meta", "meta"),
                          ("--device cuda:99", "cuda:99"),
                          pytest.param("--device cuda", ["--device", "cuda"], marks=no_cuda),
                          ("--threshold -0.1", "--threshold"), ("--threshold 1.5", "--threshold"),
                          ("--threshold nan", "--threshold"), ("--steps -1", "--steps"),
                          ("--steps 8 --width 8", ["--steps", "--width 8"]),
                          ("--steps 64", ["--steps 64", "63"]), ("--steps x", "--steps"),
                          ("--temperature -1", "--temperature"),
                          ("--temperature nan", "--temperature"),
                          ("--temperature inf", "--temperature"), ("--top-p 0", "--top-p"),
                          ("--top-p 1.5", "--top-p"), ("--top-p nan", "--top-p"),
                          ("--top-k -1", "--top-k"), ("--seed x", "--seed"),
                          ("--max-new-tokens 0", "--max-new-tokens"),
                          ("--max-new-tokens", "--max-new-tokens"), ("--width 0", "--width"),
                          ("--width 65", "--width"), ("--width 1", ["--width", "--drafter none"]),
                          ("--tree --width 8", ["--width 8", "tree"]),
                          ("--tree --drafter none", ["--tree", "none"]),
                          ("--nodes 5", ["--nodes 5", "kangaroo has none"]),
                          ("--top-candidates 5", ["--top-candidates 5", "steps, threshold"]),
                          ("--top-k 5", ["--top-k 5", "--temperature"]),
                          ("--top-p 0.5", ["--top-p 0.5", "--temperature"]),
                          ("--seed 5", ["--seed 5", "--temperature"]),
                          ("--repeats 2", ["--repeats 2", "--compare"]),
                          ("--compare --repeats 0", "--repeats 0"),
                          ("--drafter none --steps 3", ["--steps 3", "none"]),
                          ("--drafter lookup --exit-layer 1", ["--exit-layer 1", "lookup"]),
                          ("--drafter lookup --adapter x", ["--adapter x", "kangaroo"]),
                          ("--drafter none --datastore x", ["--datastore x", "rest"]),
                          ("--no-graphs", ["--no-graphs", "cpu"]), ("--tf32", ["--tf32", "cpu"]),
                          ("--compile", ["--compile", "cpu"]),
                          ("--prompt -hello", ["--prompt", "--prompt=-…"]),
                          ("--system -x", "--system=-…"),
                          ("--samples 0", "--samples"), ("--samples 2", "--temperature"),
                          ("--samples 2 --temperature 1 --trace page.html", "--trace"),
                          ("--tree --nodes 16 --width 16", ["--nodes 16", "--width 16"]),
                          ("--tree --nodes 0", "--nodes"),
                          ("--tree --top-candidates 0", "--top-candidates"),
                          ("--tree --steps 16 --width 16", ["--steps", "--width 16"]),
                          ("--exit-layer -1", ["exit layer", "-1"]),
                          ("--exit-layer 4", ["exit layer 4", "4 layers"]),
                          ("--drafter lookup --threshold 0", ["--threshold", "lookup", "steps"]),
                          ("--prompts absent", ["--prompt", "--prompts"]), ("--bogus", "--bogus"),
                          ("stray", "TEXT")])
def test_bad_flags_are_refused(refused, args, words):
    """Guards against a traceback, a silent default, or a run that fails later; the message names
    the flag and the value."""
    refused(words, *args.split())


@pytest.mark.parametrize("prompt, word", [("", "empty"), (" \n\t", "empty"), ("a\udcff", "prompt"),
                                          (None, "empty"),
                                          ("kangaroo " * 2000, "max_position_embeddings")],
                         ids=["empty", "blank", "not UTF-8", "none", "too long"])
def test_bad_prompts_are_refused(refused, monkeypatch, prompt, word):
    """Guards against an index error deep in the model, or in a library, for a prompt that cannot be
    decoded."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    refused(word, prompt=prompt)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage(path, content):
    """Remove a file (None), change its fields (a dict) or its bytes, or do with it what a function
    does."""
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        edit(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


@pytest.mark.parametrize(
    "name, content, words",
    [("config.json", b"{", ["config.json", "JSON"]), ("config.json", None, "config.json"),
     ("config.json", {"vocab_size": 341}, ["embed_tokens", "340", "341"]),
     ("config.json", {"num_hidden_layers": 5}, ["missing", "layers.4."]),
     ("config.json", {"hidden_size": "32"}, "hidden_size"),
     ("config.json", {"model_type": "gpt2"}, "model_type"),
     ("config.json", {"rope_scaling": "default"}, "rope_scaling"),
     ("config.json", {"rope_scaling": ["x"]}, "rope_scaling"),
     ("config.json", {"eos_token_id": [[1]]}, "eos_token_id"),
     ("config.json", {"bos_token_id": 999}, "bos_token_id"),
     ("config.json", {"bos_token_id": "<s>"}, "bos_token_id"),
     ("model.safetensors", truncate, "model.safetensors"),
     ("model.safetensors", None, "model.safetensors"),
     ("tokenizer.model", b"garbage" * 9, "tokenizer.model"),
     ("tokenizer.model", None, "tokenizer.model"),
     ("tokenizer_config.json", b"[", ["tokenizer_config.json", "JSON"]),
     ("tokenizer_config.json", b'{"chat_template": [1]}', "tokenizer_config.json"),
     ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "tokenizer_config.json"),
     ("chat_template.jinja", b"\xff", "chat_template.jinja")])
def test_damaged_model_folders_are_refused(refused, variant, name, content, words):
    """Guards against a traceback from a file that is missing, cut off or not what it should be; the
    message names the file."""
    folder = variant()
    damage(folder / name, content)
    refused(words, "--model", folder)


@pytest.mark.parametrize(
    "name, content, words",
    [("config.json", {"hidden_size": 64}, ["hidden_size = 64", "model 32"]),
     ("config.json", {"vocab_size": 64}, ["vocab_size = 64", "model 340"]),
     ("config.json", {"num_attention_heads": 2}, ["num_attention_heads = 2", "model 4"]),
     ("config.json", {"exit_layer": None}, ["exit_layer", "--exit-layer", "adapter/config.json"]),
     ("config.json", {"exit_layer": "1"}, ["exit layer", "'1'"]),
     ("config.json", {"exit_layer": 4}, ["exit layer 4", "4 layers"]),
     ("config.json", {"steps": "x"}, "steps"), ("config.json", {"steps": 2.5}, "steps"),
     ("config.json", {"threshold": "x"}, "threshold"),
     ("config.json", {"threshold": 2}, "threshold"), ("config.json", b"{", "adapter/config.json"),
     ("adapter.safetensors", truncate, "adapter.safetensors"),
     ("adapter.safetensors", None, "adapter.safetensors")])
def test_adapters_that_do_not_fit_are_refused(refused, variant, name, content, words):
    """Guards against an adapter of another model, which would draft nonsense or fail in a product;
    both values are named."""
    folder = variant()
    damage(folder / "adapter" / name, content)
    refused(words, "--model", folder)


def test_a_model_without_an_adapter_says_so(refused, variant):
    """Guards the first mistake of a new user; the message lists the ways out."""
    folder = variant()
    shutil.rmtree(folder / "adapter")
    refused(["adapter", "--adapter", "random", "--drafter"], "--model", folder)


def test_no_default_model(capfd, monkeypatch, tmp_path):
    """Guards a traceback where the folder of the default model has been deleted."""
    monkeypatch.setattr(command_line, "DEFAULT_MODEL", tmp_path / "absent")
    assert start.main(["--prompt", PROMPT]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"kangaroo.py: {tmp_path / 'absent'}") and "--model" in err


@pytest.mark.parametrize("name, where", [("model.embed_tokens.weight", "the embedding"),
                                         ("model.layers.0.self_attn.v_proj.weight", "layer 0"),
                                         ("model.layers.2.mlp.down_proj.weight", "layer 2"),
                                         ("model.norm.weight", "the final norm or the LM head")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("args", [[], ["--drafter", "none"], SAMPLED],
                         ids=["kangaroo", "none", "sampled"])
def test_damaged_weights_are_named(cli, variant, name, where, bad, args):
    """Guards against text made of NaN, which wins every comparison and looks like any other
    token."""
    path = variant() / "model.safetensors"
    weights = load_file(path)
    weights[name][:] = bad
    save_file(weights, path)
    status, _, err = cli("--model", path.parent, *args)
    assert status == 2 and err.splitlines()[-1].startswith(
        "kangaroo.py: ") and where in err.splitlines()[-1]


def test_a_damaged_adapter_is_named(cli, variant):
    """Guards against an adapter that drafts nonsense in silence: the output right, and slow."""
    path = variant() / "adapter" / "adapter.safetensors"
    save_file({name: w * float("nan") for name, w in load_file(path).items()}, path)
    status, _, err = cli("--model", path.parents[1])
    assert status == 2 and re.search(r"^kangaroo\.py: .*adapter: .* not finite", err, re.M)


# --------------------------------------------------------------------------------------------------
# Adapters

@pytest.fixture
def published(variant):
    """The folder of a model whose adapter is laid out like the published ones, and the adapter's
    pytorch_model.bin."""
    adapter = variant() / "adapter"
    weights = load_file(adapter / "adapter.safetensors")
    state = {
        name if name == "norm.weight" else f"layers.0.{name}": weight
        for name, weight in weights.items()
    }
    torch.save(state, adapter / "pytorch_model.bin")
    (adapter / "adapter.safetensors").unlink()
    edit(adapter / "config.json", exit_layer=None)
    return adapter.parent, adapter / "pytorch_model.bin"


@pytest.mark.parametrize("constant",
                         [None, "layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"])
def test_published_adapters_draft_as_their_safetensors_do(decode, published, constant):
    """Guards the other file format: a name or a constant not understood, weights that end up in the
    wrong place."""
    folder, path = published
    if constant:
        torch.save(torch.load(path, weights_only=True) | {constant: torch.ones(4)}, path)
    args = "--exit-layer", 1, "--threshold", 0, *HOT
    result, expected = decode("--model", folder, "--compare", *args), decode(*args)
    assert result["identical"] and facts(expected).items() <= result.items() and any(
        result["accepted"])


def save_truncated(path):
    torch.save({"norm.weight": torch.ones(1000)}, path)
    truncate(path)


@pytest.mark.parametrize(
    "content", [
        b"", b"garbage" * 50, b"hello\n" * 10, b"}", save_truncated,
        lambda path: torch.save(torch.ones(3), path),
        lambda path: torch.save({"norm.weight": 1}, path),
        lambda path: torch.save({0: torch.ones(3)}, path)
    ], ids=["empty", "garbage", "words", "brace", "truncated", "tensor", "number", "key"])
def test_damaged_published_adapters_are_refused(refused, published, content):
    """Guards against a traceback: torch.load raises many kinds of exception, some without a
    message."""
    folder, path = published
    damage(path, content)
    refused(f"{folder.name}/adapter", "--model", folder, "--exit-layer", 1)


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [
    lambda code, path: path.write_bytes(pickle.dumps(code)),
    lambda code, path: torch.save({"norm.weight": code}, path)
], ids=["pickle", "torch.save"])
def test_code_in_an_adapter_does_not_run(refused, published, tmp_path, save):
    """Guards against torch.load without weights_only: who loads a downloaded adapter would run
    whatever is in it."""
    folder, path = published
    save(Code(str(tmp_path / "ran")), path)
    refused("pytorch_model.bin", "--model", folder, "--exit-layer", 1)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("args, settings", [([], "γ 2, η 0 "),
                                            (["--steps", 4, "--threshold", 0.5], "γ 4, η 0.5 "),
                                            (["--width", 2], "γ 1, η 0 · width 2"),
                                            (["--steps", 9], "γ 9, η 0 · width 10"),
                                            (["--exit-layer", 3], "exit layer 3, γ 2, η 0 "),
                                            (["--adapter", "random"],
                                             "exit layer 2, γ 6, η 0.6 · width 7")])
def test_flags_go_before_the_adapters_own_settings(cli, variant, args, settings):
    """Guards the defaults that an adapter was tuned for: ignored, or stronger than what the user
    asks for."""
    folder = variant()
    edit(folder / "adapter" / "config.json", steps=2, threshold=0)
    status, _, err = cli("--model", folder, *args)
    assert status == 0 and settings in err


@pytest.mark.parametrize("width", [1, 3, 64])
def test_any_width_decodes(decode, width):
    """Guards --width: 1 is the plain baseline that a benchmark compares with, 64 fills a whole
    block."""
    assert decode("--width", width, "--drafter", "none")["rounds"] == 24
    assert width == 1 or decode("--width", width, "--compare", "--threshold", 0)["identical"]


# --------------------------------------------------------------------------------------------------
# The process

@pytest.fixture
def started(variant):
    """Start a real process that has far more to say than anyone waits for."""
    folder, processes = variant(max_position_embeddings=200_000), []

    def run():
        signal.signal(signal.SIGINT,
                      signal.default_int_handler)  # a child of a background job would ignore it
        words = [sys.executable, SCRIPT, *words_for(folder, PROMPT, [
            "--max-new-tokens", 200_000, "--chat", "none"])]
        processes.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0))
        return processes[-1]
    yield run
    for process in processes:
        process.kill()
        process.communicate()


def test_a_closed_pipe_ends_quietly(started):
    """Guards `kangaroo.py … | head`: a traceback, or a program that goes on decoding for nobody."""
    process = started()
    assert process.stdout.read(5) == PROMPT[:5].encode()
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read().decode().count("\n") == 1  # the settings


def test_interrupt_ends_quietly(started):
    """Guards Ctrl-C: a traceback, or a status that lets a script carry on."""
    process = started()
    while len(process.stdout.read(1000)) < 10:  # the prompt comes first, at once
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    err = process.stderr.read().decode()
    assert "Traceback" not in err and err.endswith("interrupted\n")


def test_a_pipe_closed_before_the_summary_ends_quietly(cli, monkeypatch):
    """Guards the last line: left in a buffer, it fails when the interpreter exits, with an ugly
    message and status 120."""
    reader, writer = os.pipe()
    statistics = command_line.statistics_of
    monkeypatch.setattr(command_line, "statistics_of",
                        lambda *args: os.close(reader) or statistics(*args))
    monkeypatch.setattr(sys, "stdout", open(writer, "w", encoding="utf-8"))
    assert cli("--max-new-tokens", 2)[0] == 141


@thorough
def test_fresh_processes_agree(model):
    """One seed, one text, in as many processes at once as the machine is too small for: memory that
    is not initialised, a race, a hash that differs from process to process."""
    texts, words = set(), words_for(model, PROMPT, ["--json", *SAMPLED])
    command = [sys.executable, SCRIPT, *words]
    for _ in range(13):
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
        texts |= {str(json.loads(p.communicate(timeout=120)[0])["ids"]) for p in processes}
    assert len(texts) == 1


def test_runs_from_another_directory(model, tmp_path):
    """Guards the imports and relative paths: of the program beside its own modules, of the model
    where the user is."""
    words = [sys.executable, SCRIPT, *words_for("model", PROMPT, ["--json", "--compare"])]
    done = subprocess.run(words, cwd=model.parent, capture_output=True, text=True, encoding="utf-8",
                          timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["identical"], done.stderr


@pytest.mark.parametrize("args", [["--max-new-tokens", "2"], ["--help"]], ids=["decode", "help"])
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_encoding_of_the_output_will_do(cli, monkeypatch, encoding, args):
    """Guards against UnicodeEncodeError: a redirected output on Windows is cp1252, which has no ℓ,
    γ or η."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    try:
        status = cli(*args)[0]
    except SystemExit as stop:
        status = stop.code
    out.flush()
    assert status == 0 and len(out.buffer.getvalue()) > 10
