"""Training, end to end on a tiny model folder: what is learned, and that the adapter decodes."""
import json
import re
import shutil
from dataclasses import replace
from itertools import product

import kangaroo
import train_adapter
from drafters.adapters import ADAPTERS, load_adapter
from kangaroo import KangarooDrafter, generate
from models import own_answers
from support import start, training_text
from support.checkpoint import load_llama
from support.data import is_held_out, read_documents
from train_adapter import LOSSES, Target

import pytest
import torch
from helpers import TEXT, save_file, some, write_model
from safetensors.torch import load_file
from training import log_of, sentences, words


@pytest.mark.parametrize("architecture, loss, vocabulary", some(
    product(["attention", "layer"], LOSSES, [[], ["--vocabulary", 200]]), 5), ids=str)
def test_the_loss_falls(train, tmp_path, architecture, loss, vocabulary):
    """Guards training as such: a gradient that is zero, of the wrong sign or cleared too early, or
    broken by an evaluation."""
    data = {"attention": "chats.json", "layer": "plain.txt"}[architecture]
    status, err = train("--architecture", architecture, "--loss", loss, *vocabulary, "--updates",
                        30, "--passes", 30, "--eval-every", 15, data=data)
    updates, held_out = log_of(tmp_path / "out")
    assert status == 0 and [line["step"] for line in updates] == list(range(1, 31)), err
    losses = [line["loss"] for line in updates]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]
    assert updates[-1]["acceptance"] > 1.5 * updates[0]["acceptance"]
    before, after = (line["held_out"] for line in held_out)
    assert after["loss"] < before["loss"] and 1 <= after["compression_rate"] <= 7


def test_training_leaves_the_target_as_it_is(train, folder, monkeypatch):
    """Guards the frozen target: weights that share memory with the adapter's, as its final norm
    might."""
    models = []
    monkeypatch.setattr(train_adapter, "load_llama",
                        lambda *args: models.append(load_llama(*args)) or models[0])
    assert train("--vocabulary", 50, "--architecture", "layer")[0] == 0
    before = dict(load_llama(folder / "model").named_parameters())
    assert models and all(torch.equal(before[name], p) for name, p in models[0].named_parameters())


@pytest.mark.parametrize("vocabulary", some([["--vocabulary", 60], []], 2), ids=str)
def test_first_the_text_then_the_target(train, tmp_path, monkeypatch, vocabulary):
    """Guards scarce compute: updates on the text that run the whole target, held-out figures of the
    text, an adapter that distillation cannot go on from."""
    passes, distribution = [], Target.distribution
    monkeypatch.setattr(Target, "distribution",
                        lambda *args: passes.append(0) or distribution(*args))
    args = ["--architecture", "layer", "--updates", 30, "--passes", 10, *vocabulary]
    status, err = train(*args, "--learn", "text", "--eval-every", 30)
    updates, (held_out,) = log_of(tmp_path / "out")
    assert status == 0 and updates[-1]["loss"] < 0.7 * updates[0]["loss"], err
    assert len(passes) == 1, "the whole target runs for the held-out documents alone"
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert facts["learn"] == "text"
    assert train(*args, "--init", tmp_path / "out", "--lr", 1e-12, out="same")[0] == 0
    same = log_of(tmp_path / "same")[1][0]["held_out"]  # but for the saved weights' bfloat16
    assert same == pytest.approx(held_out["held_out"], rel=0.02)
    assert train(*args, "--init", tmp_path / "out", out="then")[0] == 0
    after = log_of(tmp_path / "then")[1][0]["held_out"]
    assert after["loss"] < held_out["held_out"]["loss"]
    facts = json.loads((tmp_path / "then" / "config.json").read_text())["training"]
    assert facts["learn"] == "target" and facts["init"]["learn"] == "text"


def test_training_sees_no_held_out_document(train, folder, monkeypatch):
    """Guards the figures on held-out data: a document of theirs that is trained on."""
    path, seen = folder / "many.txt", []
    path.write_text("\n\n".join(f"{i} {TEXT[i % 4]}" for i in range(500)))
    real = training_text.Windows
    monkeypatch.setattr(training_text, "Windows",
                        lambda documents, *args: seen.append(documents) or real(documents, *args))
    assert train("--updates", 1, "--vocabulary", 20, data="many.txt")[0] == 0
    assert len(seen) == 2  # the vocabulary's and the training's
    assert all(480 < len(documents) < 500 and not any(map(is_held_out, documents))
               for documents in seen)


def test_too_few_documents_to_hold_one_out(train, tmp_path):
    """Guards the figures on held-out data: a document that was trained on, without a word."""
    path = tmp_path / "few.txt"
    path.write_text("\n\n".join(t for i in range(30)
                                if not is_held_out(t := f"{i} {sentences(i, 3)}")))
    status, err = train("--data", path)
    assert status == 0 and " 0 held out (too few" in err, err
    facts = json.loads((tmp_path / "out" / "config.json").read_text())["training"]
    assert facts["held_out_documents"] == 0 and facts["documents"] == path.read_text().count(
        "\n\n") + 1


# --------------------------------------------------------------------------------------------------
# The adapter

def decode(folder, adapter, *args):
    return start.main([
        str(word) for word in [
            "--model", folder / "model", "--adapter", adapter, "--device", "cpu", "--dtype",
            "float32", "--prompt", TEXT[0], "--max-new-tokens", 40, "--chat", "zephyr", *args
        ]
    ])


@pytest.mark.parametrize("sampling", [[], ["--temperature", 0.8, "--top-p", 0.9]],
                         ids=["greedy", "sampled"])
def test_a_trained_adapter_decodes_losslessly(folder, adapter, capfd, sampling):
    """Guards what training is for: an adapter that kangaroo.py cannot load, or that changes the
    text."""
    assert decode(folder, adapter, "--compare", "--threshold", 0, *sampling) == 0
    out, err = capfd.readouterr()
    assert "\nidentical to vanilla" in err and "drafted tokens accepted" in err
    assert "exit layer 1" in err


def test_the_saved_adapter_is_the_trained_one(folder, adapter):
    """Guards saving: weights under wrong names, of another step, or without the facts that decoding
    goes by."""
    data = json.loads((adapter / "config.json").read_text())
    trained = torch.load(adapter / "checkpoint.pt", weights_only=True)["weights"]
    loaded = load_adapter(adapter, load_llama(folder / "model"))
    for name, weight in trained.items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float()), name
    assert type(loaded) is ADAPTERS[data["architecture"]] and loaded.exit_layer == 1
    assert data["training"]["updates"] == 30 and data["chat_template"] == "zephyr"
    if loaded.head is not None:
        assert len(loaded.head.vocabulary) == 60 and 2 in loaded.head.vocabulary
        assert 0 < data["training"]["vocabulary_coverage"] <= 1


def test_training_begins_from_another_adapter(folder, adapter, tmp_path):
    """Guards --init: fresh weights all the same, another architecture, or where it came from
    forgotten."""
    assert train_adapter.main(
        words(folder, tmp_path, "--init", adapter, "--updates", 1, "--lr", 1e-12)) == 0
    started, ended = (load_file(out / "adapter.safetensors") for out in (adapter, tmp_path))
    assert all(torch.equal(started[name], weight) for name, weight in ended.items())
    before, after = (json.loads((out / "config.json").read_text()) for out in (adapter, tmp_path))
    assert after["architecture"] == before["architecture"] and after["training"]["init"] == before[
        "training"]
    assert before["training"]["init"] is None


def test_drafts_come_from_the_vocabulary(folder, tmp_path):
    """Guards a smaller vocabulary: drafts by their number in it instead of their id, from outside
    of it, or not the likeliest."""
    assert train_adapter.main(words(folder, tmp_path, "--vocabulary", 60)) == 0
    model = load_llama(folder / "model")
    adapter = load_adapter(tmp_path, model)
    head, vocabulary, drafted = adapter.head, adapter.head.vocabulary, 0

    def watched(x):
        logits, subset = head(x), model.lm_head(x)[:, vocabulary]
        assert logits.shape == (1, 340) and logits.argmax() == vocabulary[subset.argmax()]
        assert torch.equal(logits.isfinite().nonzero()[:, 1], vocabulary)
        assert torch.allclose(logits.softmax(-1).max(), subset.softmax(-1).max())
        return logits

    for prompt in ([1, 5, 9], [1, 300, 7, 320]):
        for round_ in generate(
                model, KangarooDrafter(model, adapter, 1, 0, watched), prompt, 40):
            drafted += len(round_.draft.tokens)
            assert set(round_.draft.tokens) <= set(vocabulary.tolist())
    assert drafted > 50


def test_training_begins_from_an_untrained_adapter(train, tmp_path):
    """Guards --init random, which has no config.json: found out after the last update, with nothing
    saved."""
    assert train("--init", "random", "--updates", 1)[0] == 0
    assert json.loads(
        (tmp_path / "out" / "config.json").read_text())["training"]["init"] == "random"


def test_an_adapter_of_another_model_is_refused(folder, adapter, tmp_path, capfd):
    """Guards against a slow mispairing: a model of the same shape with other weights, with which
    nothing would be accepted."""
    write_model(tmp_path / "model", seed=1)
    assert decode(tmp_path, adapter) == 2
    assert re.fullmatch(r"kangaroo\.py: [^\n]*another model[^\n]*\n", capfd.readouterr().err)


@pytest.mark.parametrize("architecture", ["mamba", ["layer"], 1])
def test_an_unknown_architecture_is_refused(folder, adapter, tmp_path, capfd, architecture):
    """Guards an adapter of a later version: run as another architecture, or a traceback."""
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    data = json.loads((copied / "config.json").read_text()) | {"architecture": architecture}
    (copied / "config.json").write_text(json.dumps(data))
    assert decode(folder, copied) == 2
    assert re.fullmatch(r"kangaroo\.py: [^\n]*architecture = [^\n]*attention, layer\n",
                        capfd.readouterr().err)


@pytest.mark.parametrize("vocabulary", [[0, 340], [-1, 5], [], [[1, 2]], [0.5, 1]])
def test_a_damaged_vocabulary_is_refused(folder, adapter, tmp_path, capfd, vocabulary):
    """Guards --vocabulary's tensor: ids that no row of the LM head belongs to, or none."""
    copied = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(copied / "adapter.safetensors")
    tensors["vocabulary"] = torch.tensor(vocabulary)
    save_file({name: t.float() for name, t in tensors.items()}, copied / "adapter.safetensors")
    assert decode(folder, copied) == 2
    assert re.fullmatch(r"kangaroo\.py: [^\n]*vocabulary must be [^\n]*\n", capfd.readouterr().err)


def test_a_model_answers_by_itself(folder, tmp_path, capsys):
    """Guards models/own_answers.py: answers unlike those that decoding gives, to other prompts, or
    in a form nobody reads."""
    model, eos = load_llama(folder / "model"), (
        2, *range(3, 120))  # so many that answers end at different lengths
    model.config = replace(model.config, eos_token_ids=eos)
    prompts = torch.randint(130, 340, (6, 9), generator=torch.Generator().manual_seed(0)).tolist()
    found = own_answers.answers(model, prompts, 30)
    assert found == [[
        token
        for round_ in generate(model, kangaroo.NoDrafter(model), prompt, 30, eos=eos)
        for token in round_.tokens
    ]
                     for prompt in prompts]
    assert len(set(map(len, found))) > 2
    model.config = replace(model.config, max_position_embeddings=20, eos_token_ids=())
    assert own_answers.answers(model, prompts[:1], 30) == [[
        token for round_ in generate(model, kangaroo.NoDrafter(model), prompts[0], 30)
        for token in round_.tokens
    ]], "beyond the context"
    own_answers.main([
        str(word) for word in [
            "--model", folder / "model", "--data", folder / "chats.json", "--out", tmp_path
            / "own.jsonl", "--batch", 2, "--max-new-tokens", 20, "--device", "cpu", "--dtype",
            "float32"
        ]
    ])
    asked = {document[0] for document in read_documents(folder / "chats.json")}
    answered = {document[0] for document in read_documents(tmp_path / "own.jsonl")}
    assert answered and answered <= asked
