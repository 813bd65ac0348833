"""The options of a training, and what of them cannot be. Nothing of the algorithm."""
import math
from functools import partial
from pathlib import Path

from drafters.adapters import ADAPTERS
from support.errors import UserError, require
from support.program import HELP, Parser, options, refuse_below_one

LEARN = "target", "text"
# Options that a resumed run must share with the one that it goes on from.
EXACT = ("vocabulary", "lr", "warmup", "updates", "batches", "batch_tokens", "max_length", "window",
         "passes", "seed")


def make_parser(prog, usage, description):
    """A parser with the options of every training, and a function that adds one."""
    parser = Parser(prog=prog, formatter_class=HELP, usage=usage, description=description)
    option, flag = options(parser), partial(parser.add_argument, action="store_true")
    option("--model", "DIR", "the target, a Hugging Face folder", type=Path, required=True)
    option("--data", "FILE", "ShareGPT conversations (JSON list, JSONL) or text, also .gz",
           nargs="+", required=True)
    option("--out", "DIR", "where the result, its log and checkpoint go", type=Path, required=True)
    option("--vocabulary", "N", "draft from the N most frequent tokens alone (default: from all)",
           type=int)
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
    option("--save-every", "N", "updates between checkpoints", 50, type=int)
    option("--chat", "NAME", "chat template (default: the model folder's)")
    option("--dtype", "TYPE", "of the target: float32, bfloat16, float16 (default: bfloat16 where "
           "the device is fast at it)")
    option("--device", "DEV", "cpu, cuda, … (default: cuda if there is one)")
    flag("--resume", help="go on from the checkpoint in --out")
    flag("--allow-truncated", help="take what is readable of a JSON list that breaks off")
    return parser, option


def parse_adapter_options(argv, losses):
    """The options of train_adapter.py; losses: the names that --loss may have."""
    parser, option = make_parser(
        "train_adapter.py", "python train_adapter.py --model DIR --data FILE… --exit-layer ℓ --out "
        "DIR", "Train Kangaroo's adapter for a Llama. See docs/training.md.")
    option("--exit-layer", "ℓ", "layers that draft", type=int)
    option("--architecture", "NAME", "attention, or layer (attention and an MLP)", "attention")
    option("--init", "DIR", "begin from this adapter, with its architecture (default: from a new "
           "one)", type=Path)
    option("--learn", "NAME", "target, what the whole model says; or text, the next token of all "
           "that is said, for which the first ℓ layers suffice", "target")
    option("--loss", "NAME", "with --learn target: cross-entropy, reverse (KL of the adapter to "
           "the target), acceptance (-log Σ min(p, q)) or hard (the target's likeliest token "
           "alone)", "cross-entropy")
    args = parser.parse_args(argv)
    require(args.architecture != "medusa", "--architecture medusa: heads are trained by python "
            "drafters/train_medusa.py")
    for name, values in (("architecture", ADAPTERS), ("learn", LEARN), ("loss", losses)):
        value = getattr(args, name)
        require(value in values, f"--{name} {value}: choose from {', '.join(values)}")
    require(args.learn == "target" or args.loss == "cross-entropy",
            f"--loss {args.loss}: is for --learn target; text has one loss, −log q of its token")
    require(args.exit_layer is not None, "--exit-layer: is needed, see --help")
    return check(args)


def check(args):
    """The options of every training, checked; makes the folder --out."""
    refuse_below_one(args, "updates", "batch_tokens", "batches", "max_length", "window", "passes",
                     "warmup", "eval_every", "eval_documents", "save_every")
    for name, fits, words in (
            ("vocabulary", args.vocabulary is None or args.vocabulary >= 1, "at least 1"),
            ("eval_prompts", args.eval_prompts >= 0, "at least 0"),
            ("workers", args.workers is None or args.workers >= 0, "at least 0"),
            ("lr", 0 < args.lr < math.inf, "above 0"),
            ("seed", -2 ** 63 <= args.seed < 2 ** 63, "an integer of 64 bits")):
        require(fits, f"--{name.replace('_', '-')} {getattr(args, name)}: must be {words}")
    require(args.max_length <= args.batch_tokens, f"--max-length {args.max_length}: must be at "
            f"most --batch-tokens {args.batch_tokens}")
    checkpoint = args.out / "checkpoint.pt"
    require(args.resume or not checkpoint.exists(), f"--out {args.out}: holds a checkpoint, give "
            "--resume to go on from it or another folder")
    require(not args.resume or checkpoint.exists(),
            f"--resume: {checkpoint} is not there, leave out --resume to begin")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {args.out}: cannot be made a folder ({e.strerror})") from None
    return args


def refuse_misfit(args, config, ranks):
    """UserError for options that this model or number of processes does not allow."""
    require(args.batches % ranks == 0,
            f"--batches {args.batches}: must be a multiple of the {ranks} processes")
    require(not args.vocabulary or args.vocabulary <= config.vocab_size,
            f"--vocabulary {args.vocabulary}: must be at most the model's vocab_size "
            f"{config.vocab_size}")
