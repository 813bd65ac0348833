"""Train Medusa's heads for any Llama that loads, by the trainer of Kangaroo's adapter.

    python drafters/train_medusa.py --model DIR --data FILE… --heads 3 --out DIR

    text -> token ids -> one pass of the frozen target -> last states         -> heads
                                                       -> final distribution  -> loss

Head k is to say at position t what the target says at t + k; it reads the last layer's state k
positions before. In the end Medusa's tree is chosen by how often each choice of each head is right
on held-out text. Output: medusa_lm_head.safetensors, config.json and log.jsonl. All else is in
train_adapter.py.
"""
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from drafters.medusa import Heads, MedusaDrafter
from support.checkpoint import trained_weights, write_json, write_safetensors
from support.errors import require
from support.processes import run_among_others
from support.program import refuse_below_one, run_program
from support.training_options import EXACT, check, make_parser
from train_adapter import Target, Training, for_decoding

import torch


class MedusaTarget(Target):
    """The frozen model, as heads learn from it. Its exit layer is the last."""
    WEIGHT = 0.8  # of a head's loss against that of the one before

    def loss(self, heads, states, kind, scale=None, autocast=torch.bfloat16):
        """What `Target.loss` sums up, over all heads."""
        sums = 0
        for k, head in enumerate(heads.heads, 1):
            sums += super().loss(lambda x, _, head=head: head(x), self.states_before(k, states),
                                 kind, scale and scale * self.WEIGHT ** (k - 1), autocast)
        return sums

    @torch.no_grad()
    def states_before(self, k, states):
        """The States of a batch for head k: of every position the normed ones k positions before
        it, as it reads them."""
        later = states.learn.clone()
        later[:, :k] = False  # no state is k positions before these
        kept = later[states.learn]
        x = self.model.norm(states.x.to(self.head.dtype)).float()
        return states._replace(x=x.roll(k, 1), learn=later, y=states.y[kept],
                               log_sums=states.log_sums[kept], best=states.best[kept])

    @torch.no_grad()
    def choose_tree(self, heads, held_out, nodes=31, candidates=10):
        """Medusa's tree for these heads, the likeliest path first: how often each choice of each
        is right on held-out states decides. Its first n nodes are the tree of n nodes."""
        right = []
        for k, head in enumerate(heads.heads, 1):
            hits, n = torch.zeros(candidates), 0
            for states in held_out:
                before = self.states_before(k, states)
                top = self.draft_logits(head(before.x[before.learn])).topk(candidates).indices
                top = top if self.vocabulary is None else self.vocabulary[top]
                hits += (top == before.best[:, None]).sum(0).cpu()
                n += len(before.best)
            right.append((hits / max(1, n)).tolist())
        return sparse_tree(right, nodes)


def sparse_tree(right, nodes):
    """The paths that are likeliest to be the text: how Medusa's tree is chosen.

    right[k][i]: how often the i-th choice of head k + 1 was right, on other text.
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
    """A run that trains heads in the place of an adapter."""
    exact = (*EXACT, "heads")

    def first_adapter(self):
        require(self.processes.ranks == 1, "heads are trained in one process, without torchrun")
        return new_heads(self.args.heads, self.model), "medusa", None

    def make_target(self, vocabulary):
        target = MedusaTarget(self.model, self.model.config.num_hidden_layers, vocabulary)
        return target, target

    def make_drafter(self):
        return MedusaDrafter(self.model, for_decoding(self.adapter, self.target))

    def save(self, facts):
        """The weights and config.json, which `kangaroo.py --drafter medusa --adapter` takes."""
        args, tensors = self.args, trained_weights(self.adapter, self.target.vocabulary)
        tensors = {name.removeprefix("heads."): tensor for name, tensor in tensors.items()}
        write_safetensors(args.out / "medusa_lm_head.safetensors", tensors)
        write_json(args.out / "config.json", {
            "architecture": "medusa", "medusa_num_heads": args.heads, "medusa_num_layers": 1,
            "medusa_choices": self.target.choose_tree(self.adapter, self.held_out),
            "target": self.model.fingerprint, "chat_template": self.chat, "training": facts})


def parse_options(argv):
    parser, option = make_parser(
        "train_medusa.py", "python drafters/train_medusa.py --model DIR --data FILE… --out DIR",
        "Train Medusa's heads for a Llama. See docs/training.md.")
    option("--heads", "K", "heads", 3, type=int)
    args = parser.parse_args(argv)
    refuse_below_one(args, "heads")
    return check(args)


def main(argv=None):
    return run_program("train_medusa.py", lambda: run_among_others(
        lambda: MedusaTraining(parse_options(argv)).run()),
        "interrupted, --resume goes on from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main())
