"""Make again what the docs show of the stories model: the replay page, its picture, the worked
example.

    python docs/make.py

Writes docs/example.html, docs/example.png (needs Chromium or Chrome; without one the old picture
stays) and the parts of docs/algorithm.md between the `example` and the `tree` comments. All of it
comes from two decodes of the default model, the second with --tree.
"""
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
import replay

import kangaroo
from llama import LlamaConfig
from support.checkpoint import write_atomically
from support.tokenizer import Tokenizer

PROMPT = "Once upon a time"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"


def recorded():
    """The data of the page, and the page itself."""
    page = DOCS / "example.html"
    status = kangaroo.main(
        ["--prompt", PROMPT, "--device", "cpu", "--compare", "--trace",
         str(page)])
    if status:
        raise SystemExit(f"kangaroo.py ended with status {status}: nothing else was written")
    return replay.read_page(page), page


def most_telling(rounds):
    """The number of the round with the longest draft that was accepted in part and stopped by the
    second early exit."""
    return max(
        range(len(rounds) - 1), key=lambda r:
        (rounds[r]["stopped"] == "unsure", 0 < rounds[r]["accepted"] < len(rounds[r]["drafted"]),
         len(rounds[r]["drafted"])))


def picture(page, r, path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no Chromium or Chrome here: {path} stays as it was", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        subprocess.run([
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={folder}/profile", "--blink-settings=preferredColorScheme=1",
            "--window-size=960,930", "--virtual-time-budget=3000", f"--screenshot={shot}",
            f"{page.as_uri()}#round-{r + 1}"
        ], check=True, capture_output=True, timeout=120)
        write_atomically(path, shot.read_bytes())


def show(label):
    return "`" + label.replace(" ", "·").replace("\n", "↵").replace("`", "'") + "`"


def table(data, r):
    """One round as a Markdown table."""
    round_, eta, L, N = data["rounds"][r], data["threshold"], data["exit_layer"], data["layers"]
    drafted, committed, accepted = round_["drafted"], round_["committed"], round_["accepted"]
    lines = [
        f"| position | token in | draft after layers 0 … {L - 1} and the adapter | confidence | the model's choice, after "
        f"layer {N - 1} | cache rows |", "|---|---|---|---|---|---|"
    ]
    for i in range(len(drafted) + 1):
        token = show(drafted[i - 1]["label"] if i else round_["input"])
        draft, sure = "–", ""
        if i < len(drafted):
            draft, sure = show(drafted[i]["label"]), f"{drafted[i]['confidence']:.3f}"
            sure += f" ≤ η = {eta:g}: stop" if i + 1 == len(
                drafted) and round_["stopped"] == "unsure" else ""
        choice, rows = "not used", "stale"
        if i < len(committed):
            verdict = "= draft" if i < accepted else "≠ draft: replaces it" if i < len(
                drafted) else "one token more"
            choice, rows = f"{show(committed[i]['label'])} {verdict}", "kept"
        lines.append(
            f"| {round_['position'] + i} | {token} | {draft} | {sure} | {choice} | {rows} |")
    return lines


def catching_up(rounds):
    """A sentence on the first round that follows a fully accepted draft, if there is one."""
    for k, (before, then) in enumerate(zip(rounds, rounds[1:]), 1):
        n = len(before["drafted"])
        if 0 < n == before["accepted"] < len(before["committed"]) and then["drafted"]:
            first = next(run[1] for group in then["passes"] for run in group if run[0] == "adapter")
            return (
                f"In round {k} all {n} drafted tokens were accepted, so round {k + 1} starts at position {then['position']}, "
                f"but its first run of the adapter at {first}: the adapter has not seen the last drafted token, and takes "
                "two rows to catch up.")
    return ""


def example(data, r):
    """The worked example: the most telling round, what ran in it, and how the next one begins."""
    rounds, L, N, s = data["rounds"], data["exit_layer"], data["layers"], data["summary"]
    round_, after, prompt = rounds[r], rounds[r + 1], data["prompt_tokens"]
    n, m, p = len(round_["drafted"]), len(round_["committed"]), round_["position"]
    passes = sum(replay.layer_passes(run) for group in round_["passes"] for run in group)
    return "\n".join([
        f"Prompt `{PROMPT}`, {prompt} tokens; N = {N} layers, ℓ = {L}, γ = {data['steps']}, η = {data['threshold']:g}; greedy. "
        f"Prefill has run positions 0 … {prompt - 2}. This is round {r + 1} of {s['rounds']}; `·` is a space.",
        "", *table(data, r), "",
        f"What ran, as hooks on the layers recorded it: layers 0 … {L - 1} at each of the positions {p} … {p + n}, one after "
        f"another; the adapter {n} times; layers {L} … {N - 1} once, over all {n + 1} rows. That is {passes} layer passes for "
        f"{m} tokens, where vanilla decoding takes {m} × {N} = {m * N} (the adapter counts as one layer).",
        "",
        f"Round {r + 2} begins with {show(after['input'])} at position {after['position']}, which no layer has seen yet, and "
        + (f"overwrites the rows from {after['position']} on. "
           if m <= n else "goes on behind the rows that were kept. ") + catching_up(rounds), "",
        f"The whole decode: {s['tokens']} tokens in {s['rounds']} rounds, compression rate {s['compression_rate']:.2f}; "
        f"{s['accepted']} of {s['drafted']} drafted tokens accepted; {s['layer_passes']:,} layer passes instead of "
        f"{s['vanilla_layer_passes']:,}."
    ])


def drawn(tree, texts, node=0):
    """The lines of a tree from `node` down, the first child beside its parent, the others below; ✓
    for accepted nodes."""
    label = f"{node} {show(texts[node])[1:-1]}"
    if node:
        label += f" {tree['confidence'][node - 1]:.2f}" + " ✓" * (node in tree["accepted"])
    blocks = [
        drawn(tree, texts, child)
        for child, parent in enumerate(tree["parents"], 1)
        if parent == node
    ]
    lines = []
    for i, block in enumerate(blocks):
        last = i == len(blocks) - 1
        first = label + (" ── " if last else " ┬─ ") if i == 0 else " " * len(label) + (
            " └─ " if last else " ├─ ")
        rest = " " * len(label) + ("    " if last else " │  ")
        lines += [first + block[0], *(rest + line for line in block[1:])]
    return lines or [label]


def tree_example():
    """The round of a decode with --tree whose accepted path leaves the drafter's first choices most
    often, drawn."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        kangaroo.main(["--prompt", PROMPT, "--device", "cpu", "--tree", "--json"])
    trees = json.loads(output.getvalue())["trees"]

    def second_choices(tree):
        return sum(node > tree["parents"].index(tree["parents"][node - 1]) + 1
                   for node in tree["accepted"])

    r = max(range(len(trees)), key=lambda r: (second_choices(trees[r]), len(trees[r]["accepted"])))
    tree, folder = trees[r], kangaroo.DEFAULT_MODEL
    tokenizer = Tokenizer(folder, LlamaConfig.load(folder))
    before = tokenizer.encode("a")  # so that a token shows the blank it begins with
    head = len(tokenizer.decode(before))
    texts = [
        "last committed", *(tokenizer.decode([*before, token])[head:] for token in tree["tokens"])
    ]
    return "\n".join([
        f"Round {r + 1} of `python kangaroo.py --prompt \"{PROMPT}\" --tree`: {len(tree['tokens'])} drafted nodes, numbered in "
        "the order in which they ran, with the drafter's probability of each; ✓ is the accepted path.",
        "", "```", *drawn(tree, texts), "```"
    ])


def insert(path, name, text):
    """Put text between the two comments `name` of a Markdown file."""
    old = path.read_text(encoding="utf-8")
    between = re.compile(rf"(<!-- {name}.*?-->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, count = between.subn(lambda found: found[1] + text + "\n" + found[2], old)
    assert count == 1, f"{path} wants one pair of {name} comments"
    write_atomically(path, new.encode())


if __name__ == "__main__":
    data, page = recorded()
    r = most_telling(data["rounds"])
    picture(page, r, DOCS / "example.png")
    insert(DOCS / "algorithm.md", "example", example(data, r))
    insert(DOCS / "algorithm.md", "tree", tree_example())
