"""Make again what the docs show of the stories model: the replay page and two examples.

    python docs/make.py

Writes docs/example.html and the parts of docs/algorithm.md between the `example` and the `tree`
comments. All of it comes from decodes of one prompt, one a method: in float32, which all machines
have, and at one width, because another width is another text. A method whose models are not there
is left out, and named; run it again when they are.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
from support import replay, start
from support.decoder import DEFAULT_MODEL
from support.files import write_atomically
from support.limits import TREE_WIDTH
from support.terminal import say

PROMPT = "Once upon a time"


# --------------------------------------------------------------------------------------------------
# The replay page

# Which methods, and what they need.
METHODS = {
    "none": [], "lookup": [], "rest": [], "lookahead": [],
    "sps": ["--draft-model", DEFAULT_MODEL / "draft"],
    "medusa": ["--adapter", DEFAULT_MODEL / "medusa"],
    "medusa-tree": ["--adapter", DEFAULT_MODEL / "medusa"], "tree": [], "kangaroo": []}


def recorded():
    """{method: its trace on the page}, which is written."""
    page = DOCS / "example.html"
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "page.html"
        for method, needs in METHODS.items():
            if method == "rest":
                needs = ["--datastore", datastore(Path(folder))]
            if not all(Path(word).exists() for word in needs[1:]):
                say(f"left out: {method}, for there is no {needs[1]}")
                continue
            name = method.removesuffix("-tree")
            flags = ["--drafter", "kangaroo" if name == "tree" else name, *needs]
            words = ["--prompt", PROMPT, "--device", "cpu", "--dtype", "float32", "--width",
                     TREE_WIDTH, "--compare", "--trace", fresh, *flags,
                     *["--tree"] * method.endswith("tree")]
            if status := start.main(list(map(str, words))):
                raise SystemExit(f"kangaroo.py ended with status {status}: nothing was written")
        write_atomically(page, fresh.read_bytes())
    return {trace["drafter"]: trace for trace in replay.read_page(page)}


def datastore(folder):
    """A datastore of little stories, as docs/methods.md makes one."""
    texts, store = folder / "stories.jsonl", folder / "store.safetensors"
    for program, *words in (
            ("models/make_stories.py", "--text", texts, "--count", "3000"),
            ("drafters/rest.py", "--model", DEFAULT_MODEL, "--data", texts, "--out", store)):
        subprocess.run([sys.executable, DOCS.parent / program, *words], check=True)
    return store


def most_telling(rounds):
    """The number of the round with the longest draft that was accepted in part.

    And that the second early exit stopped.
    """
    def telling(r):
        drafted, accepted = len(rounds[r]["drafted"]), rounds[r]["accepted"]
        return rounds[r]["stopped"] == "unsure", 0 < accepted < drafted, drafted

    return max(range(len(rounds) - 1), key=telling)


# --------------------------------------------------------------------------------------------------
# The worked example

def show(label):
    return "`" + label.replace(" ", "·").replace("\n", "↵").replace("`", "'") + "`"


def table(data, r):
    """One round as a Markdown table."""
    round_, eta, L, N = data["rounds"][r], data["threshold"], data["exit_layer"], data["layers"]
    drafted, committed = round_["drafted"], round_["committed"]
    lines = [f"| position | token in | draft after layers 0 … {L - 1} and the adapter | confidence "
             f"| the model's choice, after layer {N - 1} | cache rows |",
             "|---|---|---|---|---|---|"]
    for i in range(len(drafted) + 1):
        token = show(drafted[i - 1]["label"] if i else round_["input"])
        draft, sure = "–", ""
        if i < len(drafted):
            draft, sure = show(drafted[i]["label"]), f"{drafted[i]['confidence']:.3f}"
            unsure = i + 1 == len(drafted) and round_["stopped"] == "unsure"
            sure += f" ≤ η = {eta:g}: stop" if unsure else ""
        choice, rows = "not used", "stale"
        if i < len(committed):
            verdict = ("= draft" if i < round_["accepted"] else
                       "≠ draft: replaces it" if i < len(drafted) else "one token more")
            choice, rows = f"{show(committed[i]['label'])} {verdict}", "kept"
        lines.append(f"| {round_['position'] + i} | {token} | {draft} | {sure} | {choice} | "
                     f"{rows} |")
    return lines


def catching_up(rounds):
    """A sentence on the first round that follows a fully accepted draft, if there is one."""
    for k, (before, then) in enumerate(zip(rounds, rounds[1:]), 1):
        n = len(before["drafted"])
        if 0 < n == before["accepted"] < len(before["committed"]) and then["drafted"]:
            first = next(run[1] for group in then["passes"] for run in group if run[0] == "adapter")
            return (f"In round {k} all {n} drafted tokens were accepted, so round {k + 1} starts "
                    f"at position {then['position']}. But the adapter starts at {first}: it has "
                    "not seen the last drafted token, and takes two rows to catch up.")
    return ""


def example(data, r):
    """The worked example: the most telling round, what ran in it, and how the next one begins."""
    rounds, L, N, s = data["rounds"], data["exit_layer"], data["layers"], data["summary"]
    round_, after, prompt = rounds[r], rounds[r + 1], data["prompt_tokens"]
    n, m, p = len(round_["drafted"]), len(round_["committed"]), round_["position"]
    passes = sum(replay.layer_passes(run) for group in round_["passes"] for run in group)
    begins = "goes on behind the rows that were kept. "
    if m <= n:
        begins = f"overwrites the rows from {after['position']} on. "
    return "\n".join([
        f"Prompt `{PROMPT}`, {prompt} tokens; N = {N} layers, ℓ = {L}, γ = {data['steps']}, η = "
        f"{data['threshold']:g}; greedy, float32, width {TREE_WIDTH}. Prefill has run "
        f"positions 0 … {prompt - 2}. This is round {r + 1} of {s['rounds']}; `·` is a space.", "",
        *table(data, r), "",
        f"What ran, as hooks on the layers recorded it: layers 0 … {L - 1} at each of the "
        f"positions {p} … {p + n}, one after another; the adapter {n} times; layers {L} … {N - 1} "
        f"once, over all {n + 1} rows. That is {passes} layer passes for {m} tokens, where vanilla "
        f"decoding takes {m} × {N} = {m * N} (the adapter counts as one layer).", "",
        f"Round {r + 2} begins with {show(after['input'])} at position {after['position']}, which "
        f"no layer has seen yet, and {begins}{catching_up(rounds)}", "",
        f"The whole decode: {s['tokens']} tokens in {s['rounds']} rounds, compression rate "
        f"{s['compression_rate']:.2f}; {s['accepted']} of {s['drafted']} drafted tokens accepted; "
        f"{s['layer_passes']:,} layer passes instead of {s['vanilla_layer_passes']:,}."])


# --------------------------------------------------------------------------------------------------
# The tree

def draw_tree(tree, texts, node=0):
    """The lines of a tree from `node` down; ✓ for accepted nodes.

    The first child stands beside its parent, the others below.
    """
    label = f"{node} {show(texts[node])[1:-1]}"
    if node:
        label += f" {tree['confidence'][node - 1]:.2f}" + " ✓" * (node in tree["accepted"])
    blocks = [draw_tree(tree, texts, child) for child, parent in enumerate(tree["parents"], 1)
              if parent == node]
    lines, blank = [], " " * len(label)
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1
        first = blank + (" └─ " if last else " ├─ ") if i else label + (" ── " if last else " ┬─ ")
        rest = blank + ("    " if last else " │  ")
        lines += [first + block[0], *(rest + line for line in block[1:])]
    return lines or [label]


def second_choices(tree):
    """How many accepted nodes are not their parents' first children."""
    parents = tree["parents"]
    return sum(node > parents.index(parents[node - 1]) + 1 for node in tree["accepted"])


def tree_example(trace):
    """The round of a decode with --tree that leaves the drafter's first choices most often, drawn.

    That is, whose accepted path does.
    """
    trees = [{"parents": [node["parent"] for node in round_["drafted"]], "accepted": round_["path"],
              "confidence": [node["confidence"] for node in round_["drafted"]]}
             for round_ in trace["rounds"]]
    r = max(range(len(trees)), key=lambda r: (second_choices(trees[r]), len(trees[r]["accepted"])))
    texts = [node["label"] for node in trace["rounds"][r]["drafted"]]
    return "\n".join([
        f"Round {r + 1} of the same text, drafted with `--tree`: {len(texts)} drafted "
        "nodes, numbered in the order in which they ran, with the drafter's probability of each; ✓ "
        "is the accepted path.", "", "```",
        *draw_tree(trees[r], ["last committed", *texts]), "```"])


def insert(path, name, text):
    """Put text between the two comments `name` of a Markdown file."""
    old = path.read_text(encoding="utf-8")
    between = re.compile(rf"(<!-- {name}: .*?-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, count = between.subn(lambda found: found[1] + text + "\n" + found[2], old)
    assert count == 1, f"{path} wants one pair of {name} comments"
    write_atomically(path, new.encode())


if __name__ == "__main__":
    traces = recorded()
    data = traces["kangaroo"]
    r = most_telling(data["rounds"])
    insert(DOCS / "algorithm.md", "example", example(data, r))
    insert(DOCS / "algorithm.md", "tree", tree_example(traces["tree"]))
