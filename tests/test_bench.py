"""The paper's experiments, in small: what they count must be what was decoded."""
import json

import pytest
from helpers import one_thread  # noqa: F401

from bench import ablations, spec_bench
from llama import LlamaConfig, UserError
from support.command_line import parse_arguments
from support.decoder import DEFAULT_MODEL as STORIES
from support.decoder import Decoder

MODEL = ["--model", str(STORIES), "--adapter", str(STORIES / "adapter")]
QUESTIONS = [{"category": "qa", "turns": ["Once upon a time"]},
             {"category": "stem",
              "turns": ["A small", "And then"]}, {"category": "qa", "turns": ["In a village"]}]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def run_spec_bench(questions, out, *more):
    spec_bench.main([
        *MODEL, "--questions",
        str(questions), "--out",
        str(out), "--new-tokens", "12", "--device", "cpu", *more
    ])
    return json.loads(out.read_text())


def test_spec_bench_counts_what_is_decoded_and_goes_on_where_it_was(questions, tmp_path, capsys):
    """Bugs: a second turn that does not follow vanilla's answer; counts of another method; finished
    questions run again."""
    out = tmp_path / "results.json"
    first = run_spec_bench(questions, out, "--limit", "1")["questions"]
    assert [(q["line"], q["category"], len(q["turns"])) for q in first] == [(1, "qa", 1),
                                                                            (2, "mt_bench", 2)]
    results = run_spec_bench(questions, out)
    assert results["questions"][:2] == first and len(results["questions"]) == 3

    decoder = Decoder(
        parse_arguments(
            ["--model",
             str(STORIES), "--prompt", "-", "--max-new-tokens", "12", "--device", "cpu"]))
    answer = [t for r, _ in decoder.rounds(decoder.encode("A small"), "none") for t in r.tokens]
    follow_up = decoder.encode("A small", decoder.tokenizer.decode(answer).strip(), "And then")
    rounds = [r for r, _ in decoder.rounds(follow_up, "kangaroo")]
    figures = first[1]["turns"][1]
    assert figures["Kangaroo"]["rounds"] == len(rounds) and figures["Kangaroo"]["tokens"] == sum(
        len(r.tokens) for r in rounds)
    assert sum(figures["Kangaroo"]["accepted"]) == sum(r.accepted for r in rounds)
    assert all(turn[method]["identical"] for q in results["questions"] for turn in q["turns"]
               for method in ("vanilla", "Kangaroo", "prompt lookup"))
    summary = spec_bench.summarise(results)
    assert summary["all"]["vanilla"]["compression_rate"] == 1 and summary["all"]["Kangaroo"][
        "turns"] == 4
    rounds = [
        q["turns"][0]["Kangaroo"]["rounds"] for q in results["questions"] if q["category"] == "qa"
    ]
    assert len(rounds) == 2 and summary["qa"]["Kangaroo"]["compression_rate"] == 24 / sum(rounds)
    spec_bench.main(["--show", str(out)])
    assert "3 of   4" not in capsys.readouterr().out

    with pytest.raises(UserError,
                       match=r"other settings \(at most 12 tokens; now at most 9 tokens\)"):
        run_spec_bench(questions, out, "--new-tokens", "9")


def test_spec_bench_sees_an_output_that_differs(questions, tmp_path, monkeypatch):
    """Bug: comparing a method with itself."""
    decode = spec_bench.decode

    def tampered(decoder, ids, drafter):
        tokens, figures = decode(decoder, ids, drafter)
        return (tokens[:-1] + [0] if drafter == "lookup" else tokens), figures

    monkeypatch.setattr(spec_bench, "decode", tampered)
    summary = spec_bench.summarise(
        run_spec_bench(questions, tmp_path / "results.json", "--limit", "1"))
    assert (summary["all"]["prompt lookup"]["identical"],
            summary["all"]["Kangaroo"]["identical"]) == (0, 3)


def test_ablations_train_and_measure_each_kind_of_variant(questions, tmp_path):
    """Bugs: an adapter without attention or with a head of its own that decodes otherwise than it
    was trained; counts that a real decode does not confirm (asserted in `measure`); variants run
    again."""
    text, out = tmp_path / "stories.jsonl", tmp_path / "results.json"
    story = "Once upon a time there lived a small mouse called Thistle, who was patient. One day she met an owl. "
    text.write_text("".join(json.dumps({"text": f"{i}. {story * 3}"}) + "\n" for i in range(120)))
    argv = [
        *MODEL, "--data",
        str(text), "--questions",
        str(questions), "--limit", "1", "--out",
        str(out), "--tokens", "1500", "--passes", "4", "--batch-tokens", "512", "--new-tokens", "8",
        "--device", "cpu", "--only", "MLP only", "own LM head"
    ]
    ablations.main(argv)
    first = json.loads(out.read_text())["variants"]
    assert list(first) == ["MLP only", "own LM head", "in full"]
    d, n, vocabulary = 192, 512, LlamaConfig.load(STORIES).vocab_size
    assert first["own LM head"][
        "parameters"] == 2 * d * d + 2 * d * 64 + 2 * d + vocabulary * d  # one key-value head of 64
    assert first["MLP only"]["parameters"] == 3 * d * n + 2 * d
    assert first["MLP only"][
        "agreement"] > 0.3  # of a text that repeats itself; an untrained adapter has next to none
    for found in first.values():
        drafted, accepted = (found["by_position"][what] for what in ("drafted", "accepted"))
        assert all(a >= b for counts in (drafted, accepted) for a, b in zip(counts, counts[1:]))
        judged = [
            count for by in found["confidence"].values() for bins in by.values() for count in bins
        ]
        assert sum(judged) == 2 * 8  # tokens of two answers
    ablations.main(argv)
    assert json.loads(out.read_text())["variants"] == first  # with the seconds of then
