"""Bugs that tests/test_sampling.py must see; tests/mutations.py plants them."""
BUGS = [
    ("greedy takes the last of equals", "llama.py",
     "return self.perturbed(logits, position, depth).max(-1).indices",
     "flipped = self.perturbed(logits, position, depth).flip(-1)\n"
     "        return logits.shape[-1] - 1 - flipped.max(-1).indices"),
    ("noise that can be infinite", "llama.py", ".clamp_(min=2 ** -54)", ".float()"),
    ("top-k keeps all equals", "llama.py", "~largest(scores, least, self.top_k)",
     "scores < least"),
    ("top-p keeps all equals", "llama.py", "~largest(probs, least, V - cut)",
     "probs < least"),
]
