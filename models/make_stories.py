"""Make the default model, models/stories: a Llama that tells little stories, trained from scratch.

    python models/make_stories.py                  # vocabulary, training, samples, README.md;
                                                   # --resume goes on after a stop
    python models/make_stories.py --text FILE      # only write stories to FILE, JSONL with `text`:
                                                   # data for train_adapter.py
    python models/make_stories.py --prompts FILE   # only write the beginnings of stories that it
                                                   # was not trained on
    python models/make_stories.py --draft          # models/stories/draft, a draft model for it, of
                                                   # the same text and vocabulary

It is small, deep and narrow. Its text comes from story_grammar.py, which knows the probability of
every story: so the model's loss can be held against the entropy of its source. Held-out stories are
those of another seed.
"""
import argparse
import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from llama import Llama, LlamaConfig, Sampler
from support.checkpoint import config_json, named_weights, write_safetensors
from support.data import batches_of
from support.decoder import load, pick_device_and_dtype
from support.errors import UserError
from support.files import read_json, write_atomically, write_json
from support.program import Parser, refuse_below_one, run_program
from support.progress import Progress, load_checkpoint, save_checkpoint
from train_adapter import learning_rate

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from story_grammar import story

BOS, EOS = 1, 2
CONFIG = LlamaConfig(
    hidden_size=192, intermediate_size=512, num_hidden_layers=16, num_attention_heads=3,
    num_key_value_heads=1, head_dim=64, vocab_size=4096, max_position_embeddings=512,
    rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS, eos_token_ids=(EOS,))
# Shallow, because a draft step costs its layers: half of its weights are the embedding.
DRAFT_CONFIG = replace(CONFIG, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                       head_dim=32)


def stories(seed, count, start=0):
    """Stories start … start + count − 1 of a seed, as (text, bits)."""
    return (story(random.Random(f"{seed} {i}")) for i in range(start, start + count))


# --------------------------------------------------------------------------------------------------
# Training

def train_vocabulary(folder, args):
    """A sentencepiece vocabulary in which a line break is a piece of its own.

    It has at most CONFIG.vocab_size pieces.
    """
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
            std = 0.02 / math.sqrt(2 * model.config.num_hidden_layers) if deep else 0.02
            torch.nn.init.normal_(weight, std=std)
    return model


def loss_sum(model, ids, learn):
    """Σ −log p (nats) of the tokens that `learn` marks; ids (B, T)."""
    _, fast = pick_device_and_dtype(ids.device)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=fast == torch.bfloat16):
        logits = model(ids)[learn]
    return F.cross_entropy(logits.float(), ids.roll(-1, 1)[learn], reduction="sum")


class Training:
    """A run: `run` is the loop, all before it is preparation."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.checkpoint = args.out / "checkpoint.pt"
        if args.resume != self.checkpoint.exists():
            mend = ("is not there, leave out --resume to begin" if args.resume else
                    "is there, give --resume to go on from it, or another --out")
            raise UserError(f"{self.checkpoint}: {mend}")
        args.out.mkdir(parents=True, exist_ok=True)
        if not args.resume and args.draft:
            vocabulary = (HERE / "stories" / "tokenizer.model").read_bytes()
            write_atomically(args.out / "tokenizer.model", vocabulary)
        elif not args.resume:
            train_vocabulary(args.out, args)
        self.processor = SentencePieceProcessor(model_file=str(args.out / "tokenizer.model"))
        config = replace(DRAFT_CONFIG if args.draft else CONFIG,
                         vocab_size=self.processor.vocab_size())
        torch.manual_seed(0)
        self.model = initialise(Llama(config)).to(device)
        options = {name: getattr(args, name)
                   for name in ("updates", "lr", "warmup", "batch_tokens", "pool")}
        self.optimizers = self.new_optimizers()
        self.state = {"step": 0, "story": 0, "tokens": 0, "seconds": 0.0, "options": options}
        if args.resume:
            self.state = load_checkpoint(self.checkpoint, self.model, self.optimizers, options)

    def new_optimizers(self):
        """Muon for the matrices between vectors of the residual stream, AdamW for the rest."""
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.dim() > 1 and "embed" not in name]
        others = [p for name, p in named if p.dim() == 1 or "embed" in name]
        lr = self.args.lr
        return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.1,
                                 adjust_lr_fn="match_rms_adamw"),
                torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]

    def batches(self, texts):
        examples = []
        for text in texts:
            ids = [BOS, *self.processor.encode(text), EOS][:CONFIG.max_position_embeddings]
            examples.append((ids, [True] * len(ids)))
        return batches_of(examples, self.args.batch_tokens)

    def new_pool(self):
        """Batches of the next stories, shuffled."""
        start, count = self.state["story"], self.args.pool
        pool = self.batches(text for text, _ in stories("train", count, start))
        random.Random(start).shuffle(pool)
        self.state["story"] += count
        return pool

    def run(self):
        """All updates that are left."""
        args, state, pool = self.args, self.state, []
        total, elapsed, begin = args.updates * args.cycles, state["seconds"], time.perf_counter()
        progress = Progress(args.out / "log.jsonl", total, state)
        while state["step"] < total:
            # Stories of similar lengths share a batch; a pool is over when a checkpoint is written.
            pool = pool or self.new_pool()
            loss, tokens = self.update(*pool.pop())
            state["step"] += 1
            state["tokens"] += tokens
            state["seconds"] = elapsed + time.perf_counter() - begin
            progress.report({"loss": loss}, state)
            if not pool or state["step"] == total:
                save_checkpoint(self.checkpoint, self.model, self.optimizers, state)
                save(args.out, self.model)

    def update(self, ids, learn):
        """One step of the optimizers; (mean loss, tokens)"""
        args, tokens = self.args, learn.sum().item()
        share = learning_rate(self.state["step"] % args.updates, args.updates, args.warmup)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = args.lr * share
        loss = loss_sum(self.model, ids.to(self.device), learn.to(self.device)) / tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item(), tokens

    @torch.no_grad()
    def figures(self):
        """What training.json says: the loss on held-out stories beside their entropy."""
        args, state = self.args, self.state
        held_out = list(stories("held out", 200))
        batches = self.batches(text for text, _ in held_out)
        nats = sum(loss_sum(self.model, ids.to(self.device), learn.to(self.device)).item()
                   for ids, learn in batches)
        words, bits = sum(len(text.split()) for text, _ in held_out), sum(b for _, b in held_out)
        tokens = sum(learn.sum().item() for _, learn in batches)
        return {"parameters": sum(p.numel() for p in self.model.parameters()),
                "stories": state["story"], "tokens": state["tokens"],
                "seconds": round(state["seconds"]), "device": str(self.device),
                "updates": args.updates, "cycles": args.cycles,
                "held_out_nats_per_token": nats / tokens,
                "source_nats_per_token": bits * math.log(2) / tokens,
                "held_out_bits_per_word": nats / math.log(2) / words,
                "source_bits_per_word": bits / words}


def train(args, device):
    training = Training(args, device)
    training.run()
    figures = training.figures()
    write_json(args.out / "training.json", figures)
    print(json.dumps(figures, indent=2))


def save(folder, model):
    weights = {(name if name == "lm_head.weight" else f"model.{name}"): weight.bfloat16()
               for name, weight in named_weights(model).items()}
    write_safetensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", config_json(model.config))


# --------------------------------------------------------------------------------------------------
# Samples

def continued(decoder, prompt, sampler):
    """(text, whether the model ended it by itself) of what it makes of a prompt."""
    ids = decoder.tokenizer.encode(prompt)
    for round_ in decoder.rounds(list(ids), "none", CONFIG.max_position_embeddings, sampler):
        ids += round_.tokens
    return decoder.tokenizer.decode(ids), ids[-1] == EOS


def introduction(figures, config):
    """The head of the model's README.md, as lines."""
    return [
        "# Stories: the default model", "",
        f"A Llama of {figures['parameters'] / 1e6:.1f} M parameters, {config.num_hidden_layers} "
        f"layers, hidden size {config.hidden_size}, {config.vocab_size} pieces of vocabulary, that "
        f"tells little stories. Made by `python models/make_stories.py --updates "
        f"{figures['updates']} --cycles {figures['cycles']}` from {figures['stories']:,} stories "
        f"({figures['tokens'] / 1e6:.1f} M tokens, each seen once) of "
        f"[story_grammar.py](../story_grammar.py), in {figures['seconds'] / 60:.0f} minutes on "
        f"{figures['device']}.", "",
        "| held out | nats per token | bits per word |", "|---|---|---|",
        f"| loss | {figures['held_out_nats_per_token']:.3f} | "
        f"{figures['held_out_bits_per_word']:.3f} |",
        f"| entropy of the source, at most | {figures['source_nats_per_token']:.3f} | "
        f"{figures['source_bits_per_word']:.3f} |", "",
        "Below are one story greedy and one at temperature 0.8 (seed 0), unpicked. Each goes on "
        "from the first sentence (printed bold) of a story that the model has not seen. "
        "`python models/make_stories.py --samples` writes this page."]


def write_samples(folder):
    """README.md of the model: its figures, and two stories."""
    figures = read_json(folder / "training.json")
    decoder = load(folder, device="cpu", dtype="bfloat16", adapter=False)
    lines = introduction(figures, decoder.model.config)
    [(text, _)] = stories("samples", 1)
    prompt = text[:text.index(". ") + 1]
    for title, sampler in (("Greedy", Sampler()), ("Temperature 0.8", Sampler(0.8))):
        told, ended = continued(decoder, prompt, sampler)
        end = "ended by itself" if ended else "cut at the end of the context"
        paragraphs = (f"**{prompt}**" + told[len(prompt):]).split("\n")
        lines += ["", f"## {title}", "",
                  f"({len(told.split())} words, {end}) " + "\n\n".join(paragraphs)]
    write_atomically(folder / "README.md", ("\n".join(lines) + "\n").encode())


# --------------------------------------------------------------------------------------------------
# Command line

def parse_arguments(argv):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--out", type=Path, help="default: models/stories, or its draft")
    option("--draft", action="store_true", help="make the draft model")
    option("--text", type=Path, help="write stories that training sees")
    option("--prompts", type=Path, help="write the first words of stories that training does not "
           "see, a line each")
    option("--count", type=int, default=20000, help="how many of them")
    option("--samples", action="store_true", help="write README.md with samples, and nothing else")
    option("--resume", action="store_true")
    option("--updates", type=int, default=1300, help="of one cycle: a warm-up and a cosine to zero")
    option("--cycles", type=int, default=2,
           help="a finished run goes on with --resume and more of them")
    option("--lr", type=float, default=3e-3)
    option("--warmup", type=int, default=50)
    option("--batch-tokens", type=int, default=4096)
    option("--pool", type=int, default=512, help="stories made at a time; checkpoints come between")
    option("--vocabulary-stories", type=int, default=10000)
    args = parser.parse_args(argv)
    args.out = args.out or HERE / "stories" / ("draft" if args.draft else "")
    refuse_below_one(args, "count", "updates", "cycles", "warmup", "batch_tokens", "pool",
                     "vocabulary_stories")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.text:
        lines = (json.dumps({"text": text}) for text, _ in stories("train", args.count))
        write_atomically(args.text, ("\n".join(lines) + "\n").encode())
    elif args.prompts:
        lines = (" ".join(text.split()[:6]) for text, _ in stories("prompts", args.count))
        write_atomically(args.prompts, ("\n".join(lines) + "\n").encode())
    else:
        if not args.samples:
            train(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if not args.draft:
            write_samples(args.out)


if __name__ == "__main__":
    sys.exit(run_program("make_stories.py", main))
