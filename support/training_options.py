"""The options of train_adapter.py and of drafters/train_medusa.py, and which values are refused.

Nothing of the algorithm. What only the model can tell (its layers, its vocabulary) is checked when
it is loaded, by `Training`.
"""
import math
import os
import weakref
from pathlib import Path

from support.errors import UserError, require
from support.files import lock, remove_parts, require_folder
from support.limits import check_dtype
from support.program import Parser, formatter, options, refuse_below_one

LEARN = "target", "text"
# Their functions and classes need PyTorch: LOSSES of train_adapter.py, ADAPTERS of adapters.py.
LOSSES, ARCHITECTURES = ("cross-entropy", "reverse", "acceptance", "hard"), ("attention", "layer")


def make_parser(prog, needs, description):
    """A parser with the options that adapters and Medusa's heads share; `needs` is what else its
    usage names."""
    parser = Parser(prog=Path(prog).name, formatter_class=formatter, description=description,
                    usage=f"python {prog} --model DIR --data FILE… {needs} --out DIR")
    option, flag = options(parser)
    option("--model", "DIR", "the target, a Hugging Face folder", type=Path, required=True)
    option("--data", "FILE", "ShareGPT conversations (JSON list, JSONL) or text, also .gz",
           nargs="+", required=True)
    option("--out", "DIR", "where what is trained, its log and checkpoint go", type=Path,
           required=True)
    option("--vocabulary", "N", "draft from the N most frequent tokens alone (default: from all)",
           type=int)
    option("--loss", "NAME", "cross-entropy, reverse (KL of the adapter to the target), acceptance "
           "(-log Σ min(p, q)) or hard (the target's likeliest token alone)", "cross-entropy")
    option("--updates", "N", "optimizer steps", 2000, type=int)
    option("--batch-tokens", "N", "the most tokens of a batch, padding included", 4096, type=int)
    option("--batches", "N", "batches of an update, over all processes", 4, type=int)
    option("--max-length", "N", "documents are cut here", 1024, type=int)
    option("--window", "N", "documents that are in memory at once", 128, type=int)
    option("--workers", "N", "processes that encode the next windows (default: up to 4 with a "
           "GPU, else none)", type=int)
    option("--passes", "N", "passes over a window while the target's states for it are in memory",
           1, type=int)
    option("--lr", "X", "peak learning rate; warm-up and a cosine to zero around it", 1e-3,
           type=float)
    option("--warmup", "N", "updates of warm-up", 50, type=int)
    option("--seed", "S", "of weights and order", 0, type=int)
    option("--eval-every", "N", "updates between evaluations on held-out data", 200, type=int)
    option("--eval-documents", "N", "documents of an evaluation", 32, type=int)
    option("--eval-prompts", "N", "prompts that an evaluation decodes", 4, type=int)
    option("--save-every", "S", "seconds between checkpoints; 0: one after each update", 60,
           type=int)
    option("--chat", "NAME", "chat template (default: the model folder's)")
    option("--dtype", "TYPE", "of the target: float32, bfloat16, float16 (default: bfloat16 where "
           "the device is fast at it)")
    option("--device", "DEV", "cpu, cuda, … (default: cuda if there is one)")
    flag("--resume", "go on from the checkpoint in --out")
    flag("--overwrite", "begin anew in an --out that holds a checkpoint or an adapter")
    flag("--allow-truncated", "take what is readable of a JSON list that breaks off")
    return parser


def parse_adapter_arguments(argv):
    """The arguments of train_adapter.py. UserError names the option that is wrong."""
    parser = make_parser("train_adapter.py", "--exit-layer ℓ", "Train Kangaroo's adapter for a "
                         "Llama. See docs/training.md.")
    option, _ = options(parser)
    option("--exit-layer", "ℓ", "layers that draft, with the adapter", type=int)
    option("--architecture", "NAME", "attention (default), or layer (attention and an MLP)")
    option("--norm", "X", "a new adapter begins with the model's final norm times X: below 1, what "
           "it says at first is less sure (default: 0.3)", type=float)
    option("--init", "DIR", "begin from this adapter, with its architecture (default: from a new "
           "one)", type=Path)
    option("--learn", "NAME", "target, what the whole model says; or text, the next token of all "
           "that is said, for which the first ℓ layers suffice", "target")
    args = parser.parse_args(argv)
    refuse_wrong_values(args)
    require(args.architecture != "medusa", "--architecture medusa: heads are trained by python "
            "drafters/train_medusa.py")
    require_one_of("architecture", args.architecture or ARCHITECTURES[0], ARCHITECTURES)
    require_one_of("learn", args.learn, LEARN)
    require(args.exit_layer is not None, "--exit-layer: is needed, see --help")
    require_folder(args.model, "--model")
    require(args.norm is None or args.init is None and 0 < args.norm < math.inf,
            f"--norm {args.norm}: must be above 0, and is for a new adapter, not for --init")
    require(args.learn == "target" or args.loss == "cross-entropy",
            f"--loss {args.loss}: not for --learn text, where one token has all of p")
    prepare_folder(args)
    return args


def refuse_wrong_values(args):
    """UserError for a value that no model could make right."""
    refuse_below_one(args, "updates", "batch_tokens", "batches", "max_length", "window", "passes",
                     "warmup", "eval_every", "eval_documents")
    require(args.vocabulary is None or args.vocabulary >= 1,
            f"--vocabulary {args.vocabulary}: must be at least 1")
    for name in ("eval_prompts", "save_every", "workers"):
        value = getattr(args, name)
        require(value is None or value >= 0,
                f"--{name.replace('_', '-')} {value}: must be at least 0")
    require(0 < args.lr < math.inf, f"--lr {args.lr}: must be above 0")
    require(-2 ** 63 <= args.seed < 2 ** 63, f"--seed {args.seed}: must be an integer of 64 bits")
    require_one_of("loss", args.loss, LOSSES)
    check_dtype(args.dtype)
    require(args.max_length <= args.batch_tokens,
            f"--max-length {args.max_length}: must be at most --batch-tokens {args.batch_tokens}")


def require_one_of(name, value, values):
    require(value in values, f"--{name} {value}: choose from {', '.join(values)}")


def prepare_folder(args):
    """Make --out, for this training alone. UserError if it holds what is not to be lost, or lacks
    the checkpoint to go on from."""
    held = [name for name in ("checkpoint.pt", "config.json") if (args.out / name).exists()]
    require(args.resume or args.overwrite or not held,
            f"--out {args.out}: holds {' and '.join(held)}; give another folder, --resume to go on "
            "from a checkpoint, or --overwrite")
    require(not args.resume or "checkpoint.pt" in held,
            f"--resume: {args.out / 'checkpoint.pt'} is not there, leave out --resume to begin")
    if args.resume and args.init and not args.init.exists():  # the checkpoint has all of it
        from support.progress import read_checkpoint
        made_with = read_checkpoint(args.out / "checkpoint.pt")["options"]
        if made_with.get("init"):
            args.init, args.architecture = None, made_with["architecture"]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: cannot be made a folder ({e.strerror})") from None
    if os.name == "posix" and os.environ.get("RANK", "0") == "0":  # Windows opens no folder
        folder = os.open(args.out, os.O_RDONLY)
        weakref.finalize(args, os.close, folder)
        require(lock(folder, wait=False),
                f"--out {args.out}: another training writes there, give another folder")
        remove_parts(args.out)
