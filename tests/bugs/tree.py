"""Bugs that tests/test_tree.py must see; tests/mutations.py plants them."""
ATTENTION = "support/attention.py"
BUGS = [
    ("the mask includes a sibling", "llama.py", "mask = make_mask(positions, cache.length,",
     "mask = make_mask(positions + (cache.slots is not None), cache.length,"),
    ("RoPE's position is the slot, not the depth", "llama.py",
     "angle = positions[:, None].float()",
     "slots = positions if cache is None or cache.slots is None else cache.slots\n"
     "        angle = slots[:, None].float()"),
    ("values are summed in the order of slots", ATTENTION,
     "    (_, T, H, D), (_, S, K, _) = q.shape, k.shape\n",
     "    (_, T, H, D), (_, S, K, _) = q.shape, k.shape\n"
     "    mask = torch.full_like(mask, -math.inf).scatter_reduce(1, columns, mask, 'amax')\n"
     "    columns = torch.arange(S, device=q.device).expand(T, S)\n"),
    ("a tree's rows are not moved", "llama.py",
     "self.rows[:, :, :, start + 1:start + 1 + len(path)] = self.rows[:, :, :, moved]", "pass"),
    ("the parents' rows are moved", "llama.py",
     "moved = to_device([start + node for node in path], self.rows.device)",
     "moved = to_device([start + node for node in (0, *path)][:-1], self.rows.device)"),
    ("the adapter's rows are not moved", "drafters/tree.py",
     "        self.adapter_cache.keep(start, path)\n", ""),
    ("the exit states are not moved", "drafters/tree.py",
     "self.states[:, start + 1:start + 1 + len(path)] = self.states[:, moved]", "pass"),
    ("a leaf is taken for a node that the adapter has seen", "drafters/tree.py",
     "self.seen += sum(node < adapted for node in path)", "self.seen += len(path)"),
    ("verifier's noise keyed by node", "kangaroo.py",
     "sampler.choose(logits, start + 1, draft.levels())", "sampler.choose(logits, start + 1)"),
    ("drafter's noise keyed by node", "drafters/tree.py",
     "[node.depth for node in rows]", "range(first, first + len(rows))"),
    ("the tree grows by a node's own confidence", "drafters/tree.py", "p, node.product * p)",
     "p, p)"),
    ("an unsure leaf of a tree is not verified", "drafters/tree.py", "nodes += sure or best",
     "nodes += sure"),
    ("a child of another node is accepted", "kangaroo.py",
     "if edge == (node, token)), None)", "if edge[1] == token and i > node), None)"),
]
