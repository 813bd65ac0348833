"""Train Medusa's heads (drafters/medusa.py) for any Llama that loads, and choose their tree.

    python drafters/train_medusa.py --model DIR --data FILE… --heads 3 --out DIR

Head k reads the last layer's state of a position, and learns what the target says k positions after
the one whose state it reads. So this is `Training` of train_adapter.py, whose exit layer is the
last one, with one batch for each head: its states, moved k positions. At the end the tree is
chosen, by how often each choice of each head is right on held-out text. Output:
medusa_lm_head.safetensors, config.json and log.jsonl; figures are means over the heads. Left out on
purpose: several processes. Read train_adapter.py first.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from drafters.medusa import Heads, MedusaDrafter
from support.checkpoint import trained_weights, write_safetensors
from support.errors import require
from support.files import write_json
from support.program import options, refuse_below_one, run_program
from support.training_options import make_parser, prepare_folder, refuse_wrong_values
from train_adapter import Distribution, States, Target, Training

import torch

WEIGHT = 0.8  # of a head's loss against that of the one before
NODES, CANDIDATES = 31, 10  # of the tree that is chosen; choices of a head that it may have


class MedusaTarget(Target):
    """The frozen model as heads are to learn it: their states are those of its last layer."""

    @torch.no_grad()
    def states_for(self, k, states):
        """The States of a batch -> those of head k, which reads at t − k and learns what stands at
        t: x is normed and moved k positions, and the first k positions have no state to read."""
        later = states.learn.clone()
        later[:, :k] = False
        kept = later[states.learn]
        x = self.model.norm(states.x.to(self.head.dtype)).float()
        return States(x.roll(k, 1), later, Distribution(*(t[kept] for t in states.goal)))

    @torch.no_grad()
    def choose_tree(self, heads, held_out, nodes=NODES, candidates=CANDIDATES):
        """Medusa's tree for these heads, the likeliest path first: how often each choice of each
        is right on held-out States decides. Its first n nodes are the tree of n nodes."""
        right = []
        for k, head in enumerate(heads.heads, 1):
            hits, n = torch.zeros(candidates), 0
            for states in held_out:
                x, learn, goal = self.states_for(k, states)
                top = self.draft_logits(head(x[learn])).topk(candidates).indices
                top = top if self.vocabulary is None else self.vocabulary[top]
                hits += (top == goal.best[:, None]).sum(0).cpu()
                n += len(goal.best)
            right.append((hits / max(1, n)).tolist())
        return sparse_tree(right, nodes)


def sparse_tree(right, nodes):
    """The paths that are likeliest to be the text: how Medusa's tree is chosen.

    right[k][i]: how often the i-th choice of head k + 1 was right, on other text. Of [[0.5, 0.3],
    [0.4, 0.1]] the first four are (0) 0.5, (1) 0.3, (0, 0) 0.5 × 0.4, (1, 0) 0.3 × 0.4.
    """
    tree, near = [], {(i,): p for i, p in enumerate(right[0])}
    while near and len(tree) < nodes:
        path = max(near, key=near.get)
        p = near.pop(path)
        tree.append(path)
        if len(path) < len(right):
            near |= {(*path, i): p * q for i, q in enumerate(right[len(path)])}
    return tree


def new_heads(n, model):
    """Medusa heads in float32 that begin as the target's LM head: their blocks add zero."""
    heads = Heads((n, 1, model.config.hidden_size, 0))
    for weight in heads.parameters():
        weight.data.zero_()
    return heads.to(model.norm.weight.device)


class MedusaTraining(Training):
    """A run that trains heads in place of an adapter."""
    EXACT = (*Training.EXACT, "heads")

    def make_adapter(self):
        require(self.processes.ranks == 1, "--nproc-per-node: Medusa's heads train in one process")
        return new_heads(self.args.heads, self.model), "medusa", None

    def make_target(self, vocabulary):
        last = self.model.config.num_hidden_layers
        return MedusaTarget(self.model, last, vocabulary, self.args.loss)

    def parts(self, batches, scale):
        for states in batches:
            for k, head in enumerate(self.adapter.heads, 1):
                yield (lambda x, _, head=head: head(x), self.target.states_for(k, states),
                       scale * WEIGHT ** (k - 1))

    def make_drafter(self, heads):
        return MedusaDrafter(self.model, heads)

    def save(self, facts):
        """The weights, named as the authors name them, and config.json with the tree."""
        tensors = trained_weights(self.adapter, self.target.vocabulary)
        tensors = {name.removeprefix("heads."): tensor for name, tensor in tensors.items()}
        write_safetensors(self.args.out / "medusa_lm_head.safetensors", tensors)
        write_json(self.args.out / "config.json", {
            "architecture": "medusa", "medusa_num_heads": self.args.heads, "medusa_num_layers": 1,
            "medusa_choices": self.target.choose_tree(self.adapter, self.held_out),
            "target": self.model.fingerprint, "chat_template": self.text.chat, "training": facts})


def parse_arguments(argv):
    parser = make_parser("drafters/train_medusa.py", "--heads K", "Train Medusa's heads for a "
                         "Llama. See docs/training.md.")
    option, _ = options(parser)
    option("--heads", "K", "heads, each for a position further ahead", 3, type=int)
    # What `Training` asks of, and heads have no choice in.
    parser.set_defaults(learn="target", init=None, norm=None, exit_layer=None)
    args = parser.parse_args(argv)
    refuse_below_one(args, "heads")
    refuse_wrong_values(args)
    prepare_folder(args)
    return args


def main(argv=None):
    return run_program("train_medusa.py", lambda: MedusaTraining(parse_arguments(argv)).run())


if __name__ == "__main__":
    sys.exit(main())
