"""Do the tests see the bugs that this kind of code has? Run by hand, some minutes.

    python tests/mutations.py [WORD …]     # all, or those whose names hold one of the words

Plants each bug in a copy of the code, runs the property tests on it, and reports the first test
that turned red. Fails if a bug goes unseen, or if a line to replace is no longer there.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_drafter.py", "tests/test_lossless.py", "tests/test_sampling.py"]
ATTENTION = "support/attention.py"
MUTATIONS = [  # what is wrong, file, line as it is, line as it becomes
    ("verifier positions off by one", "kangaroo.py",
     "h = model.step(x, start, cache, drafter", "h = model.step(x, start + 1, cache, drafter"),
    ("adapter positions off by one", "kangaroo.py",
     "*one_shape(h, self.seen, self.adapter_cache)",
     "*one_shape(h, self.seen + 1, self.adapter_cache)"),
    ("shallow positions off by one", "kangaroo.py", "self.model.step([token], position, cache,",
     "self.model.step([token], position + 1, cache,"),
    ("adapter keeps rejected positions", "kangaroo.py",
     "self.seen = min(self.seen, start)", "pass"),
    ("adapter misses the last token of a full accept", "kangaroo.py",
     "self.seen = min(self.seen, start)", "self.seen = start"),
    ("verifier's noise keyed by draft index", "kangaroo.py",
     "sampler.choose(logits, start + 1, draft.levels())",
     "sampler.choose(logits, 0, draft.levels())"),
    ("drafter's noise keyed by draft index", "kangaroo.py",
     "self.sampler.draw(logits, position + 1)", "self.sampler.draw(logits, 0)"),
    ("a drafter keeps the sampler of its first text", "kangaroo.py",
     "config, self.sampler = self.adapter.config, sampler",
     'config, self.sampler = self.adapter.config, getattr(self, "sampler", sampler)'),
    ("a draft that does not fit is verified", "kangaroo.py",
     "draft.refuse_unless_fit(n_max, cache, drafter.depth)", "pass"),
    ("the width dropped for a single row", "llama.py",
     "    first = 0 if parents is None else 1 + len(parents) - T\n",
     "    first = 0 if parents is None else 1 + len(parents) - T\n"
     "    width = width if T > 1 else 1\n"),
    ("a draft crosses the edge of a view", "llama.py",
     "return min(self.width - 1, -(start + self.width) % block)", "return self.width - 1"),
    ("the view depends on the live rows", "llama.py",
     "cache.view(start + width)", "cache.view(start + 1 + len(parents or []))"),
    ("a draft of one token too many at the end", "kangaroo.py",
     "min(steps, end - len(ids) - 1, cache.room(start))",
     "min(steps, end - len(ids), cache.room(start))"),
    ("the unsure token is not verified", "kangaroo.py",
     "return Draft(tokens, self.states[:, start:start + len(tokens) + 1], confidence)",
     "n = len(tokens) - any(p <= self.threshold for p in confidence)\n"
     "        return Draft(tokens[:n], self.states[:, start:start + n + 1], confidence[:n])"),
    ("greedy takes the last of equals", "llama.py",
     "return self.perturbed(logits, position, depth).max(-1).indices",
     "flipped = self.perturbed(logits, position, depth).flip(-1)\n"
     "        return logits.shape[-1] - 1 - flipped.max(-1).indices"),
    ("noise that can be infinite", "llama.py", ".clamp_(min=2 ** -54)", ".float()"),
    ("top-k keeps all equals", "llama.py", "~largest(scores, least, self.top_k)",
     "scores < least"),
    ("top-p keeps all equals", "llama.py", "~largest(probs, least, V - cut)",
     "probs < least"),
    ("a drafter observes rejected rows as accepted", "kangaroo.py",
     "drafter.observe(h[:, :len(choices)], choices, path)",
     "drafter.observe(h[:, :len(choices)], choices, list(range(1, len(choices))))"),
    ("a drafter does not observe the prompt", "kangaroo.py", "    if len(ids) > 1:\n",
     "    if False:\n"),
    ("only the chosen logits are checked", "kangaroo.py", "logits.isfinite().all(-1)",
     "logits.gather(1, choices[:, None])[:, 0].isfinite()"),
    ("an adapter full of NaN drafts in silence", "kangaroo.py",
     "all(map(math.isfinite, draft.confidence))", "True"),
]
TREE_TESTS = ["tests/test_tree.py"]
TREE_MUTATIONS = [
    ("the mask includes a sibling", "llama.py", "mask = make_mask(positions, cache.length,",
     "mask = make_mask(positions + (cache.slots is not None), cache.length,"),
    ("RoPE's position is the slot, not the depth", "llama.py",
     ".index_select(1, positions)",
     ".index_select(1, positions if cache.slots is None else cache.slots)"),
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
METHOD_TESTS = ["tests/test_methods.py"]
SPS, REST = "drafters/sps.py", "drafters/rest.py"
METHOD_MUTATIONS = [
    ("the draft model keeps rejected positions", SPS,
     "self.seen = min(self.seen, len(ids) - 1)", "pass"),
    ("the draft model misses the last token of a full accept", SPS,
     "self.seen = min(self.seen, len(ids) - 1)", "self.seen = len(ids) - 1"),
    ("the draft model's noise keyed by draft index", SPS,
     "self.sampler.draw(self.catch_up(ids), len(ids))",
     "self.sampler.draw(self.catch_up(ids), 0)"),
    ("a step of the draft model crosses the edge of a view", SPS,
     "self.seen + 1 + self.cache.room(self.seen)]", "self.seen + self.cache.width]"),
    ("the draft model's padding is drafted", SPS,
     "return F.pad(logits, (0, more), value=-math.inf)", "return logits"),
    ("the draft model goes on beyond its context", SPS,
     "self.draft_model.config.max_position_embeddings - len(ids)", "n_max"),
    ("a continuation goes on in the next document", REST,
     "takewhile(lambda token: token != END, text)", "text"),
    ("a match at the end of a document counts", REST, 'key + array("i", [0])', "key"),
    ("documents run into one another", "support/datastore.py",
     "        tokens.append(END)\n", ""),
    ("suffixes are sorted by too few tokens", REST, "for k in 1, 2, 4, 8, 16:",
     "for k in 1, 2, 4:"),
    ("a branch hangs below another node", REST, "node[path[:-1]] for path in best",
     "max(0, node[path] - 1) for path in best"),
    ("a datastore of another tokenizer is read", REST,
     "require(made_with == vocabulary_digest(tokenizer),", "require(True,"),
]
GRAPH_TESTS = ["tests/test_graphs.py"]
GRAPHS = "support/graphs.py"
GRAPH_MUTATIONS = [
    ("an input is not copied before a replay", GRAPHS,
     "            static.copy_(tensor, non_blocking=True)\n", "            pass\n"),
    ("an output is not copied after a replay", GRAPHS,
     "return tuple(output.clone() for output in outputs)", "return tuple(outputs)"),
    ("the caller's tensors become the recording's", GRAPHS,
     "inputs = [self.static(*numbered) for numbered in enumerate(tensors)]",
     "inputs = list(tensors)"),
    ("recordings are kept after the cache grew", GRAPHS,
     "                self.graphs.forget()\n", ""),
    ("a recording of another view is replayed", GRAPHS, "self.key = view.length, id(view.rows)",
     "self.key = 0, id(view.rows)"),
    ("a recording of other layers is replayed", GRAPHS, '("layers", first, last)',
     '("layers", 0, 0)'),
    ("a lone node of a tree is taken for its root", GRAPHS, "len(x) == 1 and not parents:",
     "len(x) == 1:"),
    ("the adapter's row comes late", GRAPHS, "[*range(self.seen, self.seen + width),",
     "[*range(position, position + width),"),
    ("a dead row of the adapter is none of zeros", GRAPHS, "[states.shape[1] - 1] *", "[0] *"),
    ("the token that runs ahead is not the drafted one", GRAPHS,
     "newest.copy_(drafted[0, 0, :1])", "newest.copy_(drafted[0, 0, :1] + 1)"),
    ("what ran ahead is taken for another token's", GRAPHS,
     "        self.ahead = None\n\n    def replay", "\n    def replay"),
    ("only the first view is warmed up", GRAPHS,
     "- width + 1) for view in views]", "- width + 1) for view in views[:1]]"),
    ("a recording keeps the first tree's slots", GRAPHS,
     "fixed.view(slots, columns)", "fixed.view(cache.slots, columns)"),
    ("a recording keeps the first tree's columns", GRAPHS,
     "fixed.view(slots, columns)", "fixed.view(slots, cache.columns)"),
    ("two texts write to one cache", GRAPHS,
     "if config in self.lent and self.lent[config]() is not None:", "if False:"),
    ("a text finds the rows of the last", GRAPHS, "        memory.rows.zero_()",
     "        pass"),
    ("the temperature is not in a draft step's key", GRAPHS, "*settings_of(sampler), width,",
     "*settings_of(sampler)[1:], width,"),
    ("the top-k is not in the key of a tree's choice", GRAPHS,
     "id(head), *settings_of(sampler), k", "id(head), *settings_of(sampler)[::2], k"),
    ("the top-p is not in a verification's key", GRAPHS, "self.width, *settings_of(self))",
     "self.width, *settings_of(self)[:2])"),
    ("the adapter is not in a draft step's key", GRAPHS, '"draft", id(adapter), id(head),',
     '"draft", id(head),'),
    ("the head is not in the key of a tree's choice", GRAPHS, 'key = "draw", id(head),',
     'key = "draw",'),
    ("one model's compiled operations are in force for all", GRAPHS,
     "module.rotate_and_write = rotate", "type(module).rotate_and_write = staticmethod(rotate)"),
    ("a draft step is given another position's noise", GRAPHS,
     "noise_of(sampler, [position + 1]", "noise_of(sampler, [position]"),
    ("a tree's rows are given one another's noise", GRAPHS,
     "noise_of(sampler, (position + i for", "noise_of(sampler, (position + 0 * i for"),
    ("a verification's rows are given one another's noise", GRAPHS,
     "positions = [position + i for i", "positions = [position + 0 * i for i"),
    ("a copy from pageable memory", "llama.py", "to_device(depth, x.device) + start",
     "torch.tensor(depth).to(x.device) + start"),
]


METHODS_2_TESTS = ["tests/test_methods_2.py"]
METHODS_2_MUTATIONS = [
    ("the window moves by the drafted length", "drafters/lookahead.py",
     "self.columns = moved[len(path):]", "self.columns = moved[len(choices) - 1:]"),
    ("the window moves by one", "drafters/lookahead.py",
     "self.columns = moved[len(path):]", "self.columns = moved"),
    ("columns that were not run move on too", "drafters/lookahead.py",
     "self.columns[1 + len(run):]", "self.columns[len(run):]"),
    ("a pool keyed by the last token", "drafters/lookahead.py",
     "self.pool.setdefault(ngram[0], [])", "self.pool.setdefault(ngram[-1], [])"),
    ("the pool is asked for the token before", "drafters/lookahead.py",
     "self.pool.get(ids[-1], [])", "self.pool.get(ids[-2:][0], [])"),
    ("a column hangs below the one before", "drafters/lookahead.py",
     "self.ends.append(hang(edges, chain, column[1:]))",
     "self.ends.append(hang(edges, max(0, chain - 1), column[1:]))"),
    ("a window is deeper than it may be", "drafters/lookahead.py",
     "if j + self.ngram - 2 > n_max:", "if j > n_max:"),
    ("heads read the state of a rejected row", "drafters/medusa.py",
     "last = path[-1] if path else 0", "last = len(choices) - 1"),
    ("heads read the row that a chain would have", "drafters/medusa.py",
     "last = path[-1] if path else 0", "last = len(path)"),
    ("heads read what the final norm has not seen", "drafters/medusa.py",
     "self.model.norm(hidden[0, last:last + 1])", "hidden[0, last:last + 1]"),
    ("heads' noise keyed by their number", "drafters/medusa.py",
     "self.sampler.draw(logits, position, k=", "self.sampler.draw(logits, 0, k="),
    ("a path's choices are of the head before", "drafters/medusa.py",
     "of_head = choices[len(path) - 1]", "of_head = choices[len(path) - 2]"),
    ("a tree hangs below the root", "drafters/medusa.py",
     "parents.append(nodes[path[:-1]])", "parents.append(nodes[path[:-2]])"),
]


CUDA_TESTS = ["tests/test_pretend_cuda.py"]
CUDA_MUTATIONS = [
    ("a host value is frozen into a recording", GRAPHS,
     "width), numbers[1:],", "width), numbers[1:] - numbers[1] + start,"),
    ("an answer is read before it has come", "support/device.py",
     "ready.synchronize() or copy", "copy"),
    ("a CPU tensor in a step", ATTENTION, "torch.arange(length, device=device)",
     "torch.arange(length)"),
    ("an .item() in a step", "llama.py",
     "        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)\n",
     "        x.sum().item()\n"
     "        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)\n"),
    ("a missing warm-up", GRAPHS,
     "            with torch.cuda.stream(self.stream):\n                function(*inputs)\n", ""),
    ("a replay finds the first input", GRAPHS,
     "            static.copy_(tensor, non_blocking=True)\n", "            pass\n"),
    ("a second sync a round", "kangaroo.py", "        choices, finite = torch.stack(",
     "        logits.sum().item()\n        choices, finite = torch.stack("),
    ("a mask of another dtype", ATTENTION, "torch.full((), x, dtype=dtype, device=device)",
     "torch.full((), x, device=device)"),
]


SUITES = ((TESTS, MUTATIONS), (TREE_TESTS, TREE_MUTATIONS), (METHOD_TESTS, METHOD_MUTATIONS),
          (METHODS_2_TESTS, METHODS_2_MUTATIONS), (GRAPH_TESTS, GRAPH_MUTATIONS),
          (CUDA_TESTS, CUDA_MUTATIONS))


def mutated(file, old, new):
    """The text of a file in which `old` stands as `new`."""
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        sys.exit(f"{file}: {old!r} stands there {source.count(old)} times, it must be once: mend "
                 "tests/mutations.py")
    return source.replace(old, new)


def run_with(tests, file, old, new):
    """The first red test of a copy of the code so changed; None if all are green."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bench", "drafters", "support", "tests"):
            shutil.copytree(ROOT / name, Path(folder) / name)
        for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
            shutil.copy(path, folder)
        (Path(folder) / file).write_text(mutated(file, old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests]
        env = os.environ | {"HYPOTHESIS_PROFILE": "hurried", "OMP_NUM_THREADS": "1",
                            "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
        red = re.search(r"^FAILED (\S+)", result.stdout, re.M)
        if result.returncode not in (0, 1) or (result.returncode == 1 and not red):
            sys.exit(f"pytest itself failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
        return red and red[1]


def main(words):
    """Plant the bugs whose names hold one of the words, or all."""
    planted = [(tests, *mutation) for tests, mutations in SUITES for mutation in mutations
               if not words or any(word in mutation[0] for word in words)]
    for _, _, *mutation in planted:
        mutated(*mutation)  # all lines are there, before the first minutes are spent
    unseen = 0
    for tests, name, *mutation in planted:
        begin = time.perf_counter()
        red = run_with(tests, *mutation)
        unseen += not red
        seconds = time.perf_counter() - begin
        print(f"{'UNSEEN' if not red else 'seen  '} {seconds:4.0f} s  {name:52} {red or ''}",
              flush=True)
    print(f"{len(planted) - unseen} of {len(planted)} bugs turned a test red")
    sys.exit(bool(unseen))


if __name__ == "__main__":
    main(sys.argv[1:])
