r"""Against the authors' own code, round for round: the same ids and the same accepted lengths?

    git clone https://github.com/Equationliu/Kangaroo authors
    python -m venv theirs
    theirs/bin/pip install torch==2.13.0 transformers==4.33.3 tokenizers==0.13.3 "numpy<2" \
        accelerate
    python bench/authors.py --checkout authors --python theirs/bin/python --model models/stories \
        --adapter DIR --prompts FILE

On the CPU in float32, greedily, with the paper's γ 6 and η 0.6. Both sides read the same files:
pytorch_model.bin in two shards with their index, and an adapter in the form of the published ones.
Then a random miniature that has llama3 RoPE and grouped heads. Their code does not know that RoPE;
it is given the frequencies.

Theirs takes its first token from prefill, so ours begins after it; and theirs stops up to γ tokens
early, so the rounds compared are those that it has. Theirs runs in a process of its own; nothing
of it is in this repository but the names of what is called.
"""
import argparse
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.common import compare, run_theirs, write_model_bin
from drafters.adapters import load_adapter
from kangaroo import STEPS, THRESHOLD, Adapter, KangarooDrafter
from llama import KVCache, Llama, LlamaConfig, inverse_frequencies
from support.checkpoint import build, config_json, load_llama, named_weights
from support.errors import UserError
from support.files import read_json, write_json
from support.program import Parser, run_program
from support.tokenizer import Tokenizer

import torch

MINIATURE = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=200, max_position_embeddings=512,
    rope_theta=500000.0, rope_type="llama3", rope_scaling=(8.0, 1.0, 4.0, 64.0),
    bos_token_id=1, eos_token_ids=(2,))

# What their process runs, in the folder of their checkout. FastChat is needed for one function.
THEIRS = """
import json, sys, types
from argparse import Namespace as N
import torch
utils = types.ModuleType("fastchat.utils")
utils.str_to_torch_dtype = lambda name: getattr(torch, name)
questions = types.ModuleType("evaluation.eval")
questions.run_eval = questions.reorg_answer_file = None
sys.modules |= {"fastchat": types.ModuleType("fastchat"), "fastchat.utils": utils,
                "evaluation.eval": questions}
from evaluation.inference_kangaroo import kangaroo_forward
from kangaroo.kangaroo_model import KangarooModel
torch.set_num_threads(1)
job = json.load(open(sys.argv[1]))
model = KangarooModel(job["model"], job["adapter"], N(dtype="float32"), job["exit_layer"])
for layer in model.base_model.model.layers if job["frequencies"] else []:
    rope = layer.self_attn.rotary_emb
    rope.inv_freq = torch.tensor(job["frequencies"])
    rope._set_cos_sin_cache(job["context"], rope.inv_freq.device, torch.float32)
found = []
for ids in job["prompts"]:
    [out], _, _, lengths = kangaroo_forward(
        N(input_ids=torch.tensor([ids])), model, N(eos_token_id=job["eos"]), job["new_tokens"],
        max_length=job["context"], EARLY_STOP_LAYER=job["exit_layer"],
        SPECULATIVE_DECODING_STEPS=job["steps"], threshold=job["threshold"])
    found.append({"ids": out[len(ids):], "lengths": lengths[1:]})
json.dump(found, open(sys.argv[2], "w"))
"""


def write_for_both(folder, model, adapter):
    """The model and the adapter in the files that the authors' code reads."""
    write_model_bin(folder / "model", model)
    (folder / "adapter").mkdir()
    torch.save({name if name == "norm.weight" else f"layers.0.{name}": weight.clone()
                for name, weight in named_weights(adapter).items()},
               folder / "adapter" / "pytorch_model.bin")
    write_json(folder / "adapter" / "config.json", config_json(adapter.config))


def miniature():
    """A random model and adapter that agree about as often as trained ones.

    The layers after the first two change the state little, the adapter less.
    """
    model = build(Llama, MINIATURE, "cpu", torch.float32)
    config = replace(MINIATURE, num_hidden_layers=1, rope_type="default", rope_scaling=(),
                     rope_theta=10000.0)  # their adapter knows no other RoPE
    adapter, generator = build(Adapter, config, "cpu", torch.float32), torch.Generator()
    generator.manual_seed(0)
    for module, scale in ((model, 0.03), (adapter, 0.1)):
        for name, weight in named_weights(module).items():
            noise = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
            weight.copy_(noise if weight.dim() > 1 else torch.ones_like(weight))
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(1 if name.startswith(("layers.0.", "layers.1.")) else scale)
    model.lm_head.weight.mul_(8)  # sure enough for η to stop some drafts and not others
    return model, adapter


def theirs(args, folder, model, prompts):
    """[{ids, lengths}] of the authors' code: the new tokens, and how many each round committed."""
    config, frequencies = model.config, None
    if config.rope_type == "llama3":
        frequencies = inverse_frequencies(config, torch.device("cpu")).tolist()
        shutil.copytree(folder / "model", folder / "theirs")
        data = read_json(folder / "model" / "config.json")
        write_json(folder / "theirs" / "config.json", data | {"rope_scaling": None})
    job = {"model": str(folder / ("theirs" if frequencies else "model")),
           "adapter": str(folder / "adapter"), "exit_layer": args.exit_layer, "steps": STEPS,
           "threshold": THRESHOLD, "frequencies": frequencies, "eos": config.eos_token_ids[0],
           "context": config.max_position_embeddings, "prompts": prompts,
           "new_tokens": args.new_tokens}
    return run_theirs("--checkout", args.checkout, args.python, THEIRS, job, folder)


def beside(name, args, model, adapter, prompts):
    """Print how many ids and rounds are equal; returns whether all are."""
    # Or our drafts would end with a block.
    KVCache.BLOCK = {"cpu": model.config.max_position_embeddings}
    with tempfile.TemporaryDirectory() as folder:
        write_for_both(Path(folder), model, adapter)
        expected = theirs(args, Path(folder), model, prompts)
        model = load_llama(Path(folder) / "model")
        adapter = load_adapter(Path(folder) / "adapter", model, args.exit_layer)
    drafters = [KangarooDrafter(model, adapter, adapter.exit_layer) for _ in prompts]
    return compare(name, drafters, prompts, expected, skip=1, steps=STEPS,
                   eos=model.config.eos_token_ids)


def run(args):
    model = load_llama(args.model)
    adapter = load_adapter(args.adapter, model)
    if type(adapter) is not Adapter:
        raise UserError(f"--adapter {args.adapter}: has another architecture than theirs, "
                        "attention")
    args.exit_layer = adapter.exit_layer
    tokenizer = Tokenizer(args.model, model.config)
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[:args.limit]
    same = beside(args.model.name, args, model, adapter, [tokenizer.encode(x) for x in lines])
    args.exit_layer, generator = 2, torch.Generator().manual_seed(0)
    prompts = torch.randint(3, MINIATURE.vocab_size, (args.limit, 20), generator=generator)
    same &= beside("miniature, llama3 RoPE, grouped heads", args, *miniature(), prompts.tolist())
    return 0 if same else 1


def parse_arguments(argv):
    parser = Parser(prog="authors.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--checkout", "--python", "--model", "--adapter", "--prompts"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8, help="prompts (default: 8)")
    parser.add_argument("--new-tokens", type=int, default=80, help="of a text (default: 80)")
    args = parser.parse_args(argv)
    args.python = args.python.absolute()  # not resolved: it is a link out of its environment
    if not (args.checkout / "kangaroo" / "kangaroo_model.py").exists():
        raise UserError(f"--checkout {args.checkout}: is no checkout of Equationliu/Kangaroo")
    if not args.python.exists():
        raise UserError(f"--python {args.python}: no such program")
    return args


if __name__ == "__main__":
    sys.exit(run_program("authors.py", lambda: run(parse_arguments(None))))
