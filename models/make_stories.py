"""Make the default model, models/stories: a small, deep and narrow Llama that tells little stories,
trained from scratch.

    python models/make_stories.py                  # vocabulary, training, samples, README.md;
    --resume goes on after a stop python models/make_stories.py --text FILE      # only write
    stories to FILE, JSONL with `text`: data for train_adapter.py python models/make_stories.py
    --prompts FILE   # only write the beginnings of stories that it was not trained on

Its text comes from story_grammar.py, which knows the probability of every story: so the model's
loss can be held against the entropy of its source. Held-out stories are those of another seed.
"""
import argparse
import json
import math
import random
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
warnings.filterwarnings(
    "ignore", "Failed to initialize NumPy")  # PyTorch says so at import; nothing here needs it
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from story_grammar import story

from kangaroo import WIDTH, NoDrafter, generate
from llama import Llama, LlamaConfig, Sampler, UserError, pack
from support.checkpoint import (
    load_llama,
    named_weights,
    read_json,
    write_atomically,
    write_safetensors,
)
from support.data import batches_of
from support.program import Parser, refuse_below_one, run_program
from support.progress import Progress, load_checkpoint, save_checkpoint, trim_log
from train_adapter import learning_rate

BOS, EOS = 1, 2
CONFIG = LlamaConfig(hidden_size=192, intermediate_size=512, num_hidden_layers=16,
                     num_attention_heads=3, num_key_value_heads=1, head_dim=64, vocab_size=4096,
                     max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
                     bos_token_id=BOS, eos_token_ids=(EOS,))


def stories(seed, count, start=0):
    """Stories start … start + count − 1 of a seed, as (text, bits)."""
    return (story(random.Random(f"{seed} {i}")) for i in range(start, start + count))


def train_vocabulary(folder, args):
    """A sentencepiece vocabulary in which a line break is a piece of its own; at most
    CONFIG.vocab_size pieces."""
    SentencePieceTrainer.train(
        sentence_iterator=(text for text, _ in stories("train", args.vocabulary_stories)),
        model_prefix=str(folder / "tokenizer"), vocab_size=CONFIG.vocab_size,
        hard_vocab_limit=False, model_type="unigram", byte_fallback=True, minloglevel=2, unk_id=0,
        bos_id=BOS, eos_id=EOS, user_defined_symbols=["\n"], normalization_rule_name="identity",
        remove_extra_whitespaces=False)
    (folder / "tokenizer.vocab").unlink()


def initialise(model):
    """Normal weights, smaller where they add to the residual stream, which all layers share."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            deep = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(
                weight, std=0.02 / math.sqrt(2 * CONFIG.num_hidden_layers) if deep else 0.02)
    return model


def loss_sum(model, ids, learn):
    """Σ −log p (nats) of the tokens that `learn` marks; ids (B, T)."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids)[learn]
    return F.cross_entropy(logits.float(), ids.roll(-1, 1)[learn], reduction="sum")


def train(args, device):
    folder, checkpoint, log = args.out, args.out / "checkpoint.pt", args.out / "log.jsonl"
    if args.resume != checkpoint.exists():
        raise UserError(f"{checkpoint}: "
                        + ("is not there, leave out --resume to begin" if args.resume else
                           "is there, give --resume to go on from it, or another --out"))
    folder.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        train_vocabulary(folder, args)
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    config = replace(CONFIG, vocab_size=processor.vocab_size())

    def encoded(text):
        ids = [BOS, *processor.encode(text), EOS][:CONFIG.max_position_embeddings]
        return ids, [True] * len(ids)

    torch.manual_seed(0)
    model = initialise(Llama(config)).to(device)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    ]
    options = {
        name: getattr(args, name)
        for name in ("updates", "lr", "warmup", "batch_tokens", "pool")
    }
    total = args.updates * args.cycles
    state = {"step": 0, "story": 0, "tokens": 0, "seconds": 0.0, "options": options}
    if args.resume:
        state = load_checkpoint(checkpoint, model, optimizers, options, device)
    trim_log(log, state["step"])
    held_out = [(text, bits) for text, bits in stories("held out", 200)]
    held_batches = batches_of([encoded(text) for text, _ in held_out], args.batch_tokens)
    progress, elapsed, begin = Progress(log, total,
                                        state["step"]), state["seconds"], time.perf_counter()
    pool = []
    while state["step"] < total:
        if not pool:  # stories of similar lengths share a batch; a pool is over when a checkpoint is written
            pool = batches_of(
                [encoded(text) for text, _ in stories("train", args.pool, state["story"])],
                args.batch_tokens)
            random.Random(state["story"]).shuffle(pool)
            state["story"] += args.pool
        ids, learn = (t.to(device) for t in pool.pop())
        tokens = learn.sum().item()
        for optimizer in optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * learning_rate(state["step"] % args.updates, args.updates,
                                                      args.warmup)
        loss = loss_sum(model, ids, learn) / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        state["step"] += 1
        state["tokens"] += tokens
        state["seconds"] = elapsed + time.perf_counter() - begin
        progress.report(state["step"], {"loss": loss.item()}, tokens)
        if not pool or state["step"] == total:
            save_checkpoint(checkpoint, model, optimizers, state)
            save(folder, model)
    with torch.no_grad():
        nats = sum(
            loss_sum(model, ids.to(device), learn.to(device)).item() for ids, learn in held_batches)
    words, bits = sum(len(text.split()) for text, _ in held_out), sum(bits for _, bits in held_out)
    tokens = sum(learn.sum().item() for _, learn in held_batches)
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()), "stories": state["story"],
        "tokens": state["tokens"], "seconds": round(state["seconds"]), "device": str(device),
        "updates": args.updates, "cycles": args.cycles, "held_out_nats_per_token": nats / tokens,
        "source_nats_per_token": bits * math.log(2) / tokens,
        "held_out_bits_per_word": nats / math.log(2) / words, "source_bits_per_word": bits / words
    }
    write_atomically(folder / "training.json", (json.dumps(figures, indent=2) + "\n").encode())
    print(json.dumps(figures, indent=2))


def save(folder, model):
    weights = {(name if name == "lm_head.weight" else f"model.{name}"): w.bfloat16()
               for name, w in named_weights(model).items()}
    write_safetensors(folder / "model.safetensors", weights)
    write_atomically(folder / "config.json",
                     (json.dumps(model.config.as_json(), indent=2) + "\n").encode())


@torch.inference_mode()
def continued(model, processor, prompt, sampler):
    """(text, whether the model ended it by itself) of what it makes of a prompt."""
    ids = [BOS, *processor.encode(prompt)]
    for round_ in generate(model, NoDrafter(model), list(ids), CONFIG.max_position_embeddings,
                           sampler=sampler, eos=(EOS,)):
        ids += round_.tokens
    return processor.decode([i for i in ids if i not in (BOS, EOS)]), ids[-1] == EOS


def write_samples(folder):
    """README.md of the model: its figures, and ten stories greedy and ten at temperature 0.8,
    unpicked."""
    figures = read_json(folder / "training.json")
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    model = pack(load_llama(folder, "cpu", torch.bfloat16), WIDTH)
    config = model.config
    lines = [
        "# Stories: the default model", "",
        f"A Llama of {figures['parameters'] / 1e6:.1f} M parameters, {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, {config.vocab_size} pieces of vocabulary, that tells little stories. Made by "
        f"`python models/make_stories.py --updates {figures['updates']} --cycles {figures['cycles']}` from "
        f"{figures['stories']:,} stories ({figures['tokens'] / 1e6:.1f} M tokens, each seen once) of "
        f"[story_grammar.py](../story_grammar.py), in {figures['seconds'] / 60:.0f} minutes on {figures['device']}.",
        "", "| held out | nats a token | bits a word |", "|---|---|---|",
        "| loss | {held_out_nats_per_token:.3f} | {held_out_bits_per_word:.3f} |".format(**figures),
        "| entropy of the source, at most | {source_nats_per_token:.3f} | {source_bits_per_word:.3f} |"
        .format(**figures), "",
        "Below are ten stories greedy and ten at temperature 0.8 (seeds 0 to 9), unpicked. Each goes on from the first sentence "
        "(printed bold) of a story that the model has not seen. `python models/make_stories.py --samples` writes this page."
    ]
    for title, sampler in (("Greedy", lambda i: Sampler()), ("Temperature 0.8",
                                                             lambda i: Sampler(0.8, seed=i))):
        lines += ["", f"## {title}"]
        for i, (text, _) in enumerate(stories("samples", 10)):
            prompt = text[:text.index(". ") + 1]
            told, ended = continued(model, processor, prompt, sampler(i))
            words = f"{len(told.split())} words, " + ("ended by itself"
                                                      if ended else "cut at the end of the context")
            paragraphs = (f"**{prompt}**" + told[len(prompt):]).split("\n")
            lines += ["", f"{i + 1}. ({words}) " + "\n\n   ".join(paragraphs)]
    write_atomically(folder / "README.md", ("\n".join(lines) + "\n").encode())


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "stories")
    parser.add_argument("--text", type=Path, help="write stories that training sees")
    parser.add_argument(
        "--prompts", type=Path,
        help="write the first words of stories that training does not see, a line each")
    parser.add_argument("--count", type=int, default=20000, help="how many of them")
    parser.add_argument("--samples", action="store_true",
                        help="write README.md with samples, and nothing else")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--updates", type=int, default=1300,
                        help="of one cycle: a warm-up and a cosine to zero")
    parser.add_argument("--cycles", type=int, default=2,
                        help="a finished run goes on with --resume and more of them")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--pool", type=int, default=512,
                        help="stories made at a time; checkpoints come between")
    parser.add_argument("--vocabulary-stories", type=int, default=10000)
    args = parser.parse_args(argv)
    refuse_below_one(args, "count", "updates", "cycles", "warmup", "batch_tokens", "pool",
                     "vocabulary_stories")
    if args.text:
        lines = (json.dumps({"text": text}) for text, _ in stories("train", args.count))
        write_atomically(args.text, ("\n".join(lines) + "\n").encode())
    elif args.prompts:
        lines = (" ".join(text.split()[:6]) for text, _ in stories("prompts", args.count))
        write_atomically(args.prompts, ("\n".join(lines) + "\n").encode())
    elif args.samples:
        write_samples(args.out)
    else:
        train(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        write_samples(args.out)


if __name__ == "__main__":
    sys.exit(run_program("make_stories.py", main))
