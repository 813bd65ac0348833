"""--trace: the page holds what the run did, and in a real browser shows it. Chromium or Chrome,
where one is installed. The page is also held against axe-core's rules of accessibility; in the
repository's folder, `npm install --no-save axe-core` brings them."""
import html
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import kangaroo
from support import replay, start
from support.decoder import load

import pytest
from helpers import some, write_adapter, write_model

PROMPT = "Once </script><script>document.title = window.hacked = 1</script><!-- <b>upon & a time"
# The noise that drafter and target share decides: many drafted tokens are accepted.
CONFIDENT = ["--temperature", 5]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder with an adapter, and without an end-of-sequence token."""
    folder = tmp_path_factory.mktemp("trace") / "model"
    write_adapter(folder / "adapter", write_model(folder))
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"eos_token_id": []}))
    return folder


@pytest.fixture
def run(model, tmp_path, capfd):
    """Decode with --trace; returns (the data in the page, what --json printed, the page's path)."""
    def run(*args, prompt=PROMPT, folder=model):
        page = tmp_path / f"page {len(list(tmp_path.iterdir()))}.html"
        words = [
            "--model", folder, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 40,
            "--prompt", prompt, "--json", "--trace", page, *args
        ]
        status, (out, err) = start.main([str(word) for word in words]), capfd.readouterr()
        assert status == 0, err
        data = replay.read_page(page)[0] if page.exists() else None
        if data is None:
            return
        summary = r"{tokens} tokens in .*\n.* {compression_rate:.2f} tokens per pass".format(
            **data["summary"])
        assert re.search(summary, err)
        return data, json.loads(out), page
    return run


@pytest.fixture
def ending(model, tmp_path):
    """A function: the model's folder with the token that stands i-th in `ids` as its
    end-of-sequence token."""
    def ending(ids, i):
        folder = shutil.copytree(model, tmp_path / "ending")
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | {"eos_token_id": ids[i]}))
        return folder
    return ending


RUNS = {
    "kangaroo": [*CONFIDENT, "--threshold", 0.01],
    "unsure": [*CONFIDENT, "--threshold", 0.9],
    "greedy": [],
    "rejected": ["--adapter", "random", "--threshold", 0, "--max-new-tokens", 9],
    "exit layer 0": [*CONFIDENT, "--exit-layer", 0, "--threshold", 0],
    "lookup": ["--drafter", "lookup"],
    "vanilla": ["--drafter", "none"],
    "γ 0": ["--steps", 0],
    "chat": ["--chat", "vicuna", *CONFIDENT],
    "compared": [*CONFIDENT, "--compare"],
    "tree": ["--tree", *CONFIDENT, "--threshold", 0, "--top-candidates", 2],
    "tree, unsure": ["--tree", *CONFIDENT, "--threshold", 0.005, "--top-candidates", 2],
    "tree, greedy": ["--tree", "--threshold", 0.01],
    "tree, exit layer 0": ["--tree", *CONFIDENT, "--threshold", 0, "--exit-layer", 0],
    "tree of one path": [
        "--tree", *CONFIDENT, "--threshold", 0, "--top-candidates", 1, "--nodes", 3
    ],
}


def depths(round_):
    """How deep the nodes of a recorded round are, the root first."""
    depth = [0]
    for node in round_["drafted"]:
        depth.append(depth[node["parent"]] + 1)
    return depth


@pytest.mark.parametrize("args", RUNS.values(), ids=RUNS)
def test_the_data_is_the_run(run, args):
    """Tokens, counts and text are those of --json; what was recorded of layers is what the
    algorithm says it runs."""
    data, result, _ = run(*args)
    rounds, L, N = data["rounds"], data["exit_layer"], data["layers"]
    assert data["identical"] == result.get("identical")
    assert [token["id"] for r in rounds for token in r["committed"]] == result["ids"]
    assert "".join(token["text"]
                   for r in rounds
                   for token in r["committed"]) + data["rest"] == data["text"] == result["text"]
    assert [len(r["drafted"])
            for r in rounds] == result["drafted"] and [r["accepted"]
                                                       for r in rounds] == result["accepted"]
    assert data["summary"] | {"layer_passes": 0} == {
        "tokens": len(result["ids"]), "rounds": result["rounds"],
        "compression_rate": len(result["ids"]) / result["rounds"],
        "drafted": sum(result["drafted"]), "accepted": sum(result["accepted"]), "layer_passes": 0,
        "vanilla_layer_passes": N * len(result["ids"])
    }
    start, passes = data["prompt_tokens"] - 1, 0
    for r in rounds:
        assert r["position"] == start and r["accepted"] == len(r["path"])
        if data["drafter"] in ("kangaroo", "tree"):
            runs, steps = [run for group in r["passes"]
                           for run in group], [node["step"] for node in r["drafted"]]
            n = len(set(steps))  # a chain has a node a step
            firsts = [start + 1 + steps.index(step) for step in range(n)]
            assert steps == sorted(steps) and len(r["passes"]) == n + 1
            seen = [run[1] for run in runs if run[0] == "adapter"]  # the first may catch up
            assert len(seen) == n and seen[1:] == firsts[:-1]
            assert sum(run[1] - run[0]
                       for run in runs
                       if run[0] != "adapter" and run[2] == start) == N
            assert [run for run in runs if run[0] != "adapter" and run[2] > start
                    ] == [[0, L, slot] for slot in firsts if L]
            passes += L * (n + 1) + N - L + n
        else:
            assert r["passes"] == [[[0, N, start]]]
            passes += N
        start += len(r["committed"])
    assert data["summary"]["layer_passes"] == passes


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("tree")])
def test_the_tree_is_the_run(run, name):
    """Nodes, parents, confidences and path are those of --json. A node is chosen after its parent;
    siblings differ."""
    data, result, _ = run(*RUNS[name])
    assert result["trees"] == [{
        "tokens": [node["id"]
                   for node in r["drafted"]], "parents": [node["parent"]
                                                          for node in r["drafted"]],
        "confidence": [node["confidence"]
                       for node in r["drafted"]], "accepted": r["path"]
    }
                               for r in data["rounds"]]
    for r in data["rounds"]:
        drafted, path = r["drafted"], r["path"]
        assert all(node["step"] > ([-1] + [node["step"]
                                           for node in drafted])[node["parent"]]
                   for node in drafted)
        assert [drafted[i - 1]["parent"] for i in path] == [0, *path][:-1]
        assert [(drafted[i - 1]["id"], drafted[i - 1]["label"]) for i in path] == [
            (token["id"], token["label"]) for token in r["committed"][:len(path)]]
        assert len({(node["parent"], node["id"]) for node in drafted}) == len(drafted)
    forks = any(depths(r) != list(range(len(r["drafted"]) + 1)) for r in data["rounds"])
    assert forks == (name != "tree of one path")
    if name in ("tree", "tree, unsure"):
        assert any(r["path"] != list(range(1, r["accepted"] + 1))
                   for r in data["rounds"])  # not first choices alone


def test_a_label_is_read_along_the_path(model):
    """Guards against a label read after the node before: a byte completes the character that its
    own path has begun."""
    decoder = load(model, device="cpu", width=16)
    recorder = replay.Recorder(decoder, "a", decoder.encode("a"), "tree", 40, {})
    # The 256 bytes follow 3 special tokens.
    tokens = [3 + byte for byte in (0xE2, 0xC4, 0x82, 0xA9, 0xAC)]
    recorder.read = [1, 2, 2, 16]
    draft = kangaroo.Draft(tokens, None, [0.5] * 5, [0, 0, 1, 2, 3])
    labels = [node["label"] for node in recorder.nodes(draft)]
    assert labels == [f"‹{tokens[0]}›", f"‹{tokens[1]}›", f"‹{tokens[2]}›", "ĩ", "€"]


def test_why_a_draft_stopped(run):
    """The second early exit is where the confidence says so, and nowhere else; the other reasons
    have their lengths."""
    reasons = set()
    for threshold, length in ((0, 7), (0.05, 40), (0, 150)):
        data, _, _ = run(*CONFIDENT, "--threshold", threshold, "--max-new-tokens", length)
        for r in data["rounds"]:
            unsure = [token["confidence"] <= threshold for token in r["drafted"]]
            assert any(unsure[:-1]) is False and (r["stopped"] == "unsure") == (unsure[-1:]
                                                                                == [True])
            assert r["stopped"] != "full" or len(unsure) == data["steps"]
            reasons.add(r["stopped"])
    assert reasons == {"unsure", "full", "edge", "end"}


def test_why_a_tree_stopped(run):
    """Only the nodes of the last step can be unsure or as deep as can be; if one is neither, then
    there was no room for more."""
    reasons = set()
    for threshold, more in ((0, []), (0.005, ["--steps", 4])):
        data, _, _ = run("--tree", *CONFIDENT, "--threshold", threshold, "--top-candidates", 2,
                         *more)
        for r in data["rounds"]:
            sure, depth = [node["confidence"] > threshold for node in r["drafted"]], depths(r)[1:]
            is_last = [node["step"] == r["drafted"][-1]["step"] for node in r["drafted"]]
            assert all(sure[i] and depth[i] < data["steps"]
                       for i in range(len(sure))
                       if not is_last[i])
            last = [(s, d) for s, d, inside in zip(sure, depth, is_last) if inside]
            if r["stopped"] == "unsure":
                assert not any(s for s, _ in last)
            elif r["stopped"] == "nodes":
                assert all(s for s, _ in last) and len(sure) == 15
            elif last:
                deepest = max(d for s, d in last if s)
                assert all(d == deepest for s, d in last if s)
                assert (r["stopped"] == "full") == (deepest == data["steps"])
            reasons.add(r["stopped"])
    assert reasons == {"unsure", "full", "edge", "end", "nodes"}


def test_recording_changes_nothing(run, model, capfd):
    """The same ids as without --trace, the same pieces, and no hook left behind, whether a text
    has come to its end or not."""
    _, result, page = run(*CONFIDENT)
    start.main(["--model", str(model), "--device", "cpu", "--dtype", "float32",
                       "--max-new-tokens", "40", "--prompt", PROMPT, "--json",
                       *map(str, CONFIDENT)])
    plain = json.loads(capfd.readouterr().out)
    assert plain | {"seconds": 0} == result | {"seconds": 0}
    decoder = load(model, device="cpu", dtype="float32")

    def hooks():
        return [hook for module in (decoder.model, decoder.adapter) for m in module.modules()
                for hook in m._forward_pre_hooks]

    def watched():
        recorder = replay.Recorder(decoder, PROMPT, decoder.encode(PROMPT), "kangaroo", 40, {})
        return recorder.watch(decoder.stream(PROMPT, max_new_tokens=40))

    pieces, alone = list(watched()), list(decoder.stream(PROMPT, max_new_tokens=40))
    assert [piece[:3] for piece in pieces] == [piece[:3] for piece in alone] and not hooks()
    broken_off = watched()
    next(broken_off)
    assert hooks()
    broken_off.close()
    assert not hooks()


def test_a_prompt_cannot_leave_its_string(run):
    """Guards against a prompt or a token that ends the script element: "<" never occurs in the
    data."""
    data, _, page = run()
    text, template = page.read_text(encoding="utf-8"), replay.TEMPLATE.read_text(encoding="utf-8")
    head, tail = template.split(replay.HERE)
    tables, inside = text.removeprefix(head).removesuffix(tail).split(replay.JSON)
    assert data["prompt"] == PROMPT and inside.count("<") == 1 and inside.endswith("</script>")
    assert html.escape(PROMPT) in tables and set(re.findall("<([^ >]*)", tables)) == {
        "noscript", "/noscript", "p", "div", "/div", "h2", "/h2", "table", "/table", "thead",
        "tbody", "tr", "th", "td", "b", "/b"}


def test_the_page_stands_alone():
    """Under 200 KB without its data, nothing that a browser would fetch, and a policy that forbids
    it to try."""
    text = replay.TEMPLATE.read_text(encoding="utf-8")
    assert len(text.encode()) < 200_000 and text.count(replay.HERE) == 1
    assert "default-src 'none'" in text
    assert re.findall(r"https?://[^\"]+",
                      text) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(
        r"\bsrc=|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|document\.write|eval\(", text)


def test_methods_share_a_page_if_their_text_is_the_same(run, model, tmp_path):
    """A second method's trace is added, the same method's is replaced, and so is a page of another
    text, or of another version."""
    page = tmp_path / "shared.html"

    def write(*args, **more):
        run(*args, "--trace", page, **more)
        return [(trace["drafter"], trace["steps"]) for trace in replay.read_page(page)]

    page.write_text(replay.JSON + '[{"rounds": 1}]</script>')
    assert write("--drafter", "lookup") == [("lookup", 6)]
    assert write() == [("kangaroo", 6), ("lookup", 6)]
    assert write("--steps", 2) == [("kangaroo", 2), ("lookup", 6)]
    assert write("--drafter", "none") == [("kangaroo", 2), ("lookup", 6), ("none", 6)]
    kept = replay.read_page(page)
    assert replay.page(kept) == page.read_text(encoding="utf-8")
    assert write("--drafter", "lookup", "--max-new-tokens", 39) == [("lookup", 6)]
    assert write(prompt="Another") == [("kangaroo", 6)]
    page.write_text(replay.JSON + "[" * 200_000 + "</script>")
    replay.add_trace(page, kept[0])
    assert replay.read_page(page) == kept[:1]


def test_writers_of_one_page_wait_for_each_other(run, tmp_path, monkeypatch):
    """Guards two decodes at once: the later of two writers had read the page before the other had
    written it, and lost its trace."""
    traces = [run("--drafter", name)[0] for name in ("kangaroo", "lookup", "none")]
    page, read_page = tmp_path / "page.html", replay.read_page
    replay.add_trace(page, traces[0])

    def slowly(path):
        found = read_page(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(replay, "read_page", slowly)
    writers = [Thread(target=replay.add_trace, args=(page, trace)) for trace in traces[1:]]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [trace["drafter"] for trace in read_page(page)] == ["kangaroo", "lookup", "none"]


@pytest.mark.parametrize(
    "args, word",
    [(["--prompts", "{two}"], "one text"),
     (["--prompt", "a", "--trace", "{folder}/two"], "another name"),
     (["--prompt", "a", "--trace", os.devnull], "another name"),
     (["--prompt", "a", "--trace", "{folder}"], "must be a file"),
     (["--prompt", "a", "--trace", "{folder}/none/page.html"], "in a folder that exists")])
def test_refused_before_decoding(model, tmp_path, capfd, args, word):
    (tmp_path / "two").write_text("one\ntwo\n")
    args = [arg.format(two=tmp_path / "two", folder=tmp_path) for arg in args]
    page = str(tmp_path / "page.html")
    status = start.main(["--trace", page, "--model", str(model), *args])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "") and re.fullmatch(r"kangaroo\.py: --trace [^\n]+\n",
                                                     err) and word in err
    assert not list(tmp_path.glob("*.html"))


# --------------------------------------------------------------------------------------------------
# In a browser

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
in_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium or Chrome (Debian: apt-get install chromium)")

WATCH = """<script>
window.problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
</script>"""

# What a page shows: its text and counters, and the boxes and lit layers of the round drawn last.
TELL = """<script>
const text = id => document.getElementById(id).textContent;
const tell = () => ({
  prompt: text("prompt"), output: text("output"), pending: text("pending"), say: text("say"),
  where: text("where"),
  counters: ["tokens", "rounds", "rate", "saved"].map(name => text("n-" + name)),
  stage: document.getElementById("rows").innerHTML,
  rounds: [...document.querySelectorAll("#rounds li")].map(li => li.innerHTML)});
const press = (key, shiftKey) => document.dispatchEvent(
  new KeyboardEvent("keydown", {key, shiftKey, cancelable: true}));
const click = id => document.getElementById(id).click();
const done = what => {
  const node = document.createElement("pre");
  node.id = "told";
  node.textContent = encodeURIComponent(JSON.stringify(
    {...what, problems, hacked: window.hacked, title: document.title}));
  document.body.append(node);
};
{
%s
}
</script>"""


def browse(page, tmp_path, script, fragment="", dark=False, timeout=120):
    """Open the page with `script`, which ends by calling done(object); returns the object. No
    error, no word on the console."""
    text = page.read_text(encoding="utf-8")
    page = tmp_path / "driven.html"
    page.write_text(
        text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", TELL % script + "</body>"),
        encoding="utf-8")
    shown = subprocess.run([
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'of'}", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={int(not dark)}",
        "--virtual-time-budget=20000", "--dump-dom",
        page.as_uri() + fragment
    ], capture_output=True, text=True, timeout=timeout)
    found = re.search(r'<pre id="told">(.*?)</pre>', shown.stdout, re.DOTALL)
    end = f"{shown.stdout[-2000:]}\n{shown.stderr[-2000:]}"
    assert found, f"the script did not come to its end:\n{end}"
    assert "CONSOLE" not in shown.stderr, shown.stderr
    told = json.loads(unquote(html.unescape(found[1])))
    assert told["problems"] == [] and "hacked" not in told and told["title"] == "Kangaroo, replayed"
    return told


def counters(data):
    """The counters at the end, from the data's summary."""
    s = data["summary"]
    saved = f"{100 * (1 - s['layer_passes'] / s['vanilla_layer_passes']):.0f}".replace("-", "−")
    return [
        f"{s['tokens']}{s['accepted']} of {s['drafted']} drafted accepted",
        f"{s['rounds']}full-model passes", f"{s['compression_rate']:.2f}vanilla: 1.00",
        f"{saved}\u00a0%{s['layer_passes']:,} instead of {s['vanilla_layer_passes']:,}"
    ]


STEP_TO_THE_END = """
const seen = [tell()];
while (!document.getElementById("step").disabled) { click("step"); seen.push(tell()); }
done({seen});
"""


@in_browser
@pytest.mark.parametrize("name", some(["kangaroo", "rejected", "lookup", "tree", "chat"], 3))
def test_stepping_to_the_end_shows_the_decode(run, tmp_path, name):
    """At every step the text is what had been decoded by then; at the end it is all of it, with the
    run's counts."""
    data, result, page = run(*RUNS[name])
    seen = browse(page, tmp_path, STEP_TO_THE_END)["seen"]
    ends = [""]
    for r in data["rounds"]:
        ends.append(ends[-1] + "".join(token["text"] for token in r["committed"]))
    ends[-1] += data["rest"]
    assert [text for text, _ in itertools.groupby(
        s["output"] for s in seen)] == [text for text, _ in itertools.groupby(ends)]
    assert seen[-1]["output"] == result["text"] and all(s["prompt"].rstrip("\n") == PROMPT
                                                        for s in seen)
    assert seen[-1]["counters"] == counters(data)
    assert len(
        seen[-1]["rounds"]) == result["rounds"] and f"{result['rounds']} rounds" in seen[-1]["say"]
    proposed = [s["pending"] for s in seen if s["pending"]]
    if name == "kangaroo":
        assert proposed == ["".join(token["label"] for token in r["drafted"][:i + 1])
                            for r in data["rounds"] for i in range(len(r["drafted"]))]
    own = sum(len(r["committed"]) > r["accepted"] for r in data["rounds"])
    rejected = sum(r["accepted"] < len(r["drafted"])
                   for r in data["rounds"]) if name != "tree" else 0  # lists the path alone
    for kind, sign, count in (("accepted", "✓", sum(
            result["accepted"])), ("rejected", "✗", rejected), ("own", "▸", own)):
        boxes = re.findall(rf'<span class="tok {kind}".*?</span>', "".join(seen[-1]["rounds"]),
                           re.DOTALL)
        assert len(boxes) == count and all(sign in box
                                           for box in boxes)  # told apart by more than colour


def depth_first(drafted, node=0):
    return [
        node, *(n for child, of in enumerate(drafted, 1) if of["parent"] == node
                for n in depth_first(drafted, child))
    ]


def fate(round_, node):
    """The shape, sign and words of a verified node."""
    parent, path = round_["drafted"][node - 1]["parent"], [0, *round_["path"]]
    if node in path:
        return "accepted", "✓", "accepted"
    if parent == path[-1]:
        return "rejected", "✗", "rejected"
    return "unused", "–", "not chosen" if parent in path else "not judged"


READ_ROWS = """
const frames = {}, read = row => {
  const box = row.querySelector(".tok");
  return {kind: box.className.slice(4).trim(), title: box.title,
    depth: Number(box.style.getPropertyValue("--at")), says: row.querySelector("td").textContent,
    sure: row.querySelector(".sure")?.textContent, text: row.textContent,
    lit: row.querySelectorAll(".run i, .kept i").length,
    hatched: row.querySelectorAll(".unsure").length};
};
const rows = () => [...document.querySelectorAll("#rows tr:not([aria-hidden])")].map(read);
do frames[text("round-title") + text("round-note")] = rows();
while (!document.getElementById("step").disabled && (click("step"), true));
done({frames});
"""


@in_browser
def test_a_tree_has_a_row_a_node(run, tmp_path):
    """Depth first, each with its own sign, confidence and layers; while it grows, only the nodes
    drafted so far."""
    data, _, page = run(*RUNS["tree, unsure"])
    frames, fates = browse(page, tmp_path, READ_ROWS)["frames"], set()
    for i, r in enumerate(data["rounds"], 1):
        title, drafted, depth = f"Round {i} of {len(data['rounds'])}", r["drafted"], depths(r)
        step, order = [-1, *(node["step"] for node in drafted)], depth_first(drafted)
        for now in set(step[1:]):
            rows, nodes = frames[f"{title}draft {now + 1}"], [
                node for node in order if step[node] <= now
            ]
            assert [row["depth"] for row in rows] == [depth[node] for node in nodes]
            assert [row["lit"]
                    for row in rows] == [data["exit_layer"] * (step[node] < now) for node in nodes]
            assert {row["kind"] for row in rows[1:]} == {"drafted"}
        rows = frames[f"{title}verification"]
        assert [row["depth"] for row in rows] == [depth[node] for node in order]
        assert all(row["lit"] == data["layers"] for row in rows)
        for row, node in zip(rows[1:], order[1:]):
            (kind, sign, words), token = fate(r, node), drafted[node - 1]
            fates.add(words)
            assert row["kind"] == kind and row["says"].startswith(
                sign) and row["title"] == f"{token['label']} ({words})"
            assert f"at depth {depth[node]} after" in row["says"] and (
                "overwritten" in row["text"]) == (kind != "accepted")
            stops = token["confidence"] <= data["threshold"]
            assert row["hatched"] == ("⇥" in row["sure"]) == ("early exit" in row["sure"]) == stops
            assert f"{100 * token['confidence']:.0f}\u00a0%" in row["sure"]
    assert fates == {"accepted", "rejected", "not chosen", "not judged"}


@in_browser
@pytest.mark.parametrize("args", [[*CONFIDENT, "--threshold", 0], RUNS["tree"]],
                         ids=["chain", "tree"])
def test_a_text_that_ends_by_itself(run, tmp_path, ending, args):
    """An end-of-sequence token is no text. After a drafted one nothing is replaced."""
    data, result, _ = run(*args)
    k = next(k for k, r in enumerate(data["rounds"]) if k and r["accepted"] > 1)
    i = sum(len(r["committed"]) for r in data["rounds"][:k])
    data, result, page = run(*args, folder=ending(result["ids"], i))
    last = data["rounds"][-1]
    assert last["committed"][-1]["end"]
    told = browse(page, tmp_path, "done(tell());", "#end")
    assert told["output"] == result["text"] and told["counters"] == counters(
        data) and "The text ends here" in told["say"]
    assert ("own" in told["rounds"][-1]) == (len(last["committed"]) > last["accepted"])


@in_browser
def test_every_way_of_moving_shows_the_same(run, tmp_path):
    """A frame depends on its number alone, reached by buttons, keys, slider, clicks, an address or
    while playing."""
    data, result, page = run(*RUNS["kangaroo"])
    told = browse(
        page, tmp_path, """
        const all = [tell()], slider = document.getElementById("seek"), ways = {};
        while (!document.getElementById("step").disabled) { click("step"); all.push(tell()); }
        const at = n => JSON.stringify(tell()) === JSON.stringify(all[n]), end = all.length - 1;
        ways.back = all.map((_, i) => i).reverse().every(
          i => { const same = at(i); click("back"); return same; });
        ways.keys = all.every((_, i) => { const same = at(i); press("ArrowRight"); return same; });
        press("ArrowLeft"); ways.left = at(end - 1);
        press("Home"); ways.home = at(0);
        press("End"); ways.end = at(end);
        click("first"); ways.first = at(0);
        press("ArrowRight", true); const first = Number(tell().where.split(" ")[0]);
        ways.round = at(first) && tell().rounds.length === 1;
        click("step-round"); ways.second = tell().rounds.length === 2;
        click("back-round"); ways.backRound = at(first);
        click("last"); ways.last = at(end);
        document.querySelector("#rounds button").click(); ways.list = at(first);
        click("last"); document.querySelector("#text b").click(); ways.word = at(first);
        document.querySelector("#hops rect").dispatchEvent(new MouseEvent("click"));
        ways.hop = at(first);
        slider.value = 5; slider.dispatchEvent(new Event("input")); ways.slider = at(5);
        location.hash = "#round-1"; dispatchEvent(new Event("hashchange"));
        ways.address = at(first);
        location.hash = "#end"; dispatchEvent(new Event("hashchange")); ways.addressEnd = at(end);
        location.hash = "#3"; dispatchEvent(new Event("hashchange")); ways.number = at(3);
        press("Home"); document.getElementById("speed").value = "8"; press(" ");
        ways.playing = document.getElementById("play").getAttribute("aria-label") === "Pause";
        const stopped = () => document.getElementById("play").getAttribute("aria-label") === "Play";
        const wait = () => at(end) ? done({ways: {...ways, stopped: stopped()}})
                                   : setTimeout(wait, 100);
        wait();""")
    assert told["ways"] and all(told["ways"].values()), told["ways"]


# In a frame of some width: what is there after opening an address.
FRAMES = """
const open = (width, hash) => new Promise(resolve => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
  frame.onload = () => {
    frame.contentWindow.location.hash = hash;
    setTimeout(() => resolve(frame.contentWindow), 500);
  };
  frame.srcdoc = page;
  document.body.append(frame);
});
"""


def framed(page, tmp_path, script, head="", **more):
    """Run a script on an empty page that can open the page in frames of its own."""
    text = page.read_text(encoding="utf-8").replace("</body>", head + "</body>")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!doctype html><html lang=en><head><title>Kangaroo, replayed</title></head>"
        "<body></body></html>", encoding="utf-8")
    quoted = json.dumps(text).replace("<", "\\u003c")
    return browse(outer, tmp_path, f"const page = {quoted};{FRAMES}{script}", **more)


@in_browser
@pytest.mark.parametrize("name", some(["tree", "kangaroo"], 2))
def test_a_phone_needs_no_sideways_scrolling_and_all_controls_have_names(run, tmp_path, name):
    """At 390 and 320 pixels nothing is wider than the screen and the controls are in sight; each
    says what it does."""
    _, _, page = run(*RUNS[name])
    told = framed(page, tmp_path, """
        const measure = async width => {
          const {document: inside} = await open(width, "#end"), root = inside.documentElement;
          const out = c => { const box = c.getBoundingClientRect();
                             return box.right > root.clientWidth || box.bottom > 800; };
          const named = c => c.getAttribute("aria-label") || c.closest("label")
            || c.textContent.trim();
          const controls = [...inside.querySelectorAll("button, input, select")];
          return {fits: root.scrollWidth === root.clientWidth,
            live: inside.getElementById("say").getAttribute("aria-live"),
            out: [...inside.querySelectorAll("#controls *")].filter(out).map(c => c.id),
            nameless: controls.filter(c => !named(c)).map(c => c.id)};
        };
        Promise.all([390, 320].map(measure)).then(sizes => done({sizes}));""")
    for size in told["sizes"]:
        assert size == {"fits": True, "out": [], "live": "polite", "nameless": []}


# --------------------------------------------------------------------------------------------------
# Two methods, words, no scripts, everybody

@pytest.fixture
def several(run, tmp_path):
    """A page with a chain, a tree and vanilla decoding, and its traces."""
    page = tmp_path / "several.html"
    for name in ("unsure", "tree", "vanilla"):
        run(*CONFIDENT, *RUNS[name], "--width", 16, "--trace", page)
    return page, replay.read_page(page)


def spans(trace):
    """[(first token, end)] of the rounds."""
    ends = list(itertools.accumulate(len(r["committed"]) for r in trace["rounds"]))
    return list(zip([0, *ends], ends))


@in_browser
def test_two_methods_side_by_side(several, tmp_path):
    """Each line holds the rounds of both that wrote its words; at each step the round that wrote
    the word is marked on both sides, and what comes later is not there yet."""
    page, traces = several
    told = browse(page, tmp_path, """
        const all = query => [...document.querySelectorAll(query)];
        const number = button => Number(button.querySelector(".n").textContent.slice(6));
        const lines = all("#pairs li").map(li => ({words: li.querySelector("p").textContent,
          sides: [...li.querySelectorAll(".side")].map(
            side => [...side.querySelectorAll("button")].map(number))}));
        const seen = [], say = new Set();
        click("first");
        do {
          seen.push({ahead: all("#output .ahead").length, arcs: all("#arcs path").length,
            now: all(".side [aria-current]").map(number)});
          say.add(text("pair-say"));
          if (document.getElementById("step").disabled) break;
        } while (click("step") || true);
        const ends = [];
        for (click("first"); !document.getElementById("step").disabled; click("step-round"))
          ends.push(Number(text("where").split(" ")[0]));
        click("last");
        done({lines, seen, ends, said: say.size, output: text("output"),
          names: all("#sides h2").map(h => h.textContent), counters: all("#sides dd").map(
            dd => dd.textContent), title: text("heading")});""", "#tree,kangaroo")
    by_name = {trace["drafter"]: trace for trace in traces}
    two = by_name["tree"], by_name["kangaroo"]
    assert told["names"] == ["Kangaroo with a tree", "Kangaroo"]
    assert told["output"] == two[0]["text"]
    count = len([token for r in two[0]["rounds"] for token in r["committed"]])
    assert told["counters"] == [cell for trace in two for cell in (
        str(len(trace["rounds"])), f"{count / len(trace['rounds']):.2f}")]
    start = 0
    for line in told["lines"]:
        written = [[spans(trace)[n - 1] for n in side] for trace, side in zip(two, line["sides"])]
        assert {side[0][0] for side in written} == {start}
        (start,) = {side[-1][1] for side in written}
    assert start == count and [sum((line["sides"][k] for line in told["lines"]), []) for k in (
        0, 1)] == [list(range(1, len(trace["rounds"]) + 1)) for trace in two]
    assert len(told["seen"]) == told["said"] == count + 1
    for t, step in enumerate(told["seen"]):
        wrote = [i for trace in two for i, (a, b) in enumerate(spans(trace), 1) if a < t <= b]
        assert step == {"ahead": count - t, "now": wrote,
                        "arcs": sum(len(trace["rounds"]) for trace in two)}
    assert told["ends"] == [0, *sorted({b for trace in two for _, b in spans(trace)} - {count})]


POINT = """
const words = () => [...document.querySelectorAll("#output b")];
const tip = document.getElementById("tip"), box = document.getElementById("text");
const read = () => tip.hidden ? null : {said: [...tip.querySelectorAll("p")].map(
  p => p.textContent), alternatives: [...tip.querySelectorAll(".alt")].map(a => a.textContent)};
const type = key => box.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
click("last");
const hover = words().map(word => {
  word.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  return read();
});
const inside = tip.getBoundingClientRect().right <= innerWidth;
document.querySelector("h1").dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
const left = read();
click("first"); click("last"); box.focus();
words().forEach(() => type("ArrowLeft"));
const typed = words().map((_, i) => { if (i) type("ArrowRight"); return read(); });
press("Escape");
done({hover, typed, inside, left, escaped: read()});
"""


@in_browser
@pytest.mark.parametrize("hash", some(["#kangaroo,tree", "#tree", "#kangaroo"], 3))
def test_what_was_rejected_can_be_read_at_its_word(several, tmp_path, hash):
    """Every drafted token that was not accepted is in the tip of one word, in its own round, by
    hovering and by the arrow keys alike. Escape and leaving take the tip away."""
    page, traces = several
    told = browse(page, tmp_path, POINT, hash)
    assert told["inside"] and told["left"] is told["escaped"] is None
    two = [next(t for t in traces if t["drafter"] == name) for name in hash[1:].split(",")]
    wanted = [[] for _ in told["hover"]]
    for trace in two:
        for r, (begin, end) in zip(trace["rounds"], spans(trace)):
            for node in range(1, len(r["drafted"]) + 1):
                if node not in r["path"]:
                    token = r["drafted"][node - 1]
                    label = token["label"].replace("\n", "↵").strip(" ") or "·"
                    sure = f"{label} {100 * token['confidence']:.0f}\u00a0%"
                    wanted[min(begin + depths(r)[node], end) - 1].append(sure)
    assert any(wanted)
    for found in (told["hover"], told["typed"]):
        assert [sorted(tip["alternatives"]) for tip in found] == list(map(sorted, wanted))
        for i, tip in enumerate(found):
            rounds = [next(k for k, (a, b) in enumerate(spans(trace), 1) if a <= i < b)
                      for trace in two]
            assert [f"round {k}:" in said for k, said in zip(rounds, tip["said"])] == [True] * len(
                two)


@in_browser
@pytest.mark.parametrize("hash, names, missing", some([
    ("", ["Kangaroo"], ""), ("#none", ["vanilla decoding"], ""), ("#sps", ["Kangaroo"], "sps"),
    ("#medusa,none/round-2", ["vanilla decoding"], "medusa"),
    ("#none,tree", ["vanilla decoding", "Kangaroo with a tree"], ""),
    ("#tree,tree", ["Kangaroo with a tree"], ""),
    ("#none%2Ckangaroo/7", ["vanilla decoding", "Kangaroo"], "")], 3))
def test_an_address_names_methods_and_a_place(several, tmp_path, hash, names, missing):
    """Methods that a page does not have are named, and the others shown."""
    told = browse(several[0], tmp_path, """
        const name = id => document.getElementById(id).selectedOptions[0].textContent;
        const pick = (id, value) => { const select = document.getElementById(id);
          select.value = value; select.dispatchEvent(new Event("change")); };
        const now = () => [name("left"), name("right")].filter(n => n !== "nothing");
        const first = now(), where = text("where"), missing = text("missing");
        pick("left", "tree"); pick("right", "none");
        const two = now();
        pick("left", "none");
        done({first, where, missing, two, one: now(), heading: text("heading")});""", hash)
    assert told["first"] == names and (missing in told["missing"]) and (
        bool(missing) == bool(told["missing"]))
    assert told["two"] == ["Kangaroo with a tree", "vanilla decoding"]
    assert told["one"] == ["vanilla decoding"] and "vanilla decoding" in told["heading"]
    place = {"/7": "7", "-2": "2"}.get(hash[-2:], "40" if "," in hash else "0")
    assert told["where"].split(" ")[0] == ("0" if hash == "#tree,tree" else place)


@in_browser
def test_without_scripts_the_page_is_tables(several, tmp_path):
    """A row a round and a table a method, with all drafted tokens; no controls that do nothing."""
    page, traces = several
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub("<script>.*?</script>", "", text, flags=re.DOTALL), encoding="utf-8")
    told = framed(page, tmp_path, """
        const frame = document.createElement("iframe");
        frame.sandbox = "allow-same-origin";  // and no scripts
        frame.style.width = "360px";
        frame.onload = () => {
          const inside = frame.contentDocument, root = inside.documentElement;
          const cells = row => [...row.cells].map(
            cell => [...cell.querySelectorAll("b")].map(b => b.textContent));
          done({fits: root.scrollWidth === root.clientWidth, tables: [...inside.querySelectorAll(
              "table.plain")].map(table => [...table.tBodies[0].rows].map(cells)),
            controls: [...inside.querySelectorAll("button, input, select")].filter(
              control => control.getClientRects().length).length});
        };
        frame.srcdoc = page;
        document.body.append(frame);""")
    assert told["fits"] and told["controls"] == 0
    for trace, table in zip(traces, told["tables"], strict=True):
        for r, (_, accepted, others, own) in zip(trace["rounds"], table, strict=True):
            said = [replay.visible(token["label"]) for token in r["committed"]]
            assert accepted + own == said and len(accepted) == r["accepted"]
            assert len(others) == len(r["drafted"]) - r["accepted"]


@in_browser
def test_arcs_follow_their_words_when_a_phone_is_turned(several, tmp_path):
    """They are then as on a page that was opened at that width, and a tip is on the screen."""
    told = framed(several[0], tmp_path, """
        const arcs = inside => [...inside.document.querySelectorAll("#arcs path")].map(
          path => path.getAttribute("d"));
        (async () => {
          const [fresh, turned] = await Promise.all(
            [390, 844].map(width => open(width, "#tree,kangaroo")));
          const words = [...turned.document.querySelectorAll("#output b")], before = arcs(turned);
          const left = word => word.getBoundingClientRect().left;
          words.sort((a, b) => left(b) - left(a))[0].dispatchEvent(
            new MouseEvent("mouseover", {bubbles: true}));
          turned.frameElement.style.width = "390px";
          turned.dispatchEvent(new Event("resize"));  // nothing is drawn here, so none comes
          done({before, after: arcs(turned), wanted: arcs(fresh),
                right: turned.document.getElementById("tip").getBoundingClientRect().right});
        })();""")
    assert told["after"] == told["wanted"] != told["before"]
    assert 0 < told["right"] <= 390


@in_browser
def test_a_phone_shows_all_layers_above_the_controls(run, tmp_path):
    """At 390 × 844, unscrolled, from the first frame to the last."""
    _, _, page = run(*RUNS["kangaroo"])
    told = framed(page, tmp_path, """
        open(390, "#0").then(({document: inside, frameElement}) => {
          frameElement.style.height = "844px";
          const find = id => inside.getElementById(id), below = [];
          do {
            below.push(find("table").getBoundingClientRect().bottom
                       - find("controls").getBoundingClientRect().top);
            find("step").click();
          } while (!find("step").disabled);
          done({below});
        });""")
    assert max(told["below"]) <= 0


AXE = Path(__file__).parents[1] / "node_modules" / "axe-core" / "axe.min.js"


@in_browser
@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: npm install --no-save axe-core")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_rules_of_accessibility(several, tmp_path, dark):
    """axe-core finds nothing on a phone and on a desk, in any view, with a tip in it."""
    told = framed(several[0], tmp_path, """
        const check = async (width, hash) => {
          const inside = await open(width, hash), root = inside.document.documentElement;
          inside.document.querySelector("#output b").dispatchEvent(
            new MouseEvent("mouseover", {bubbles: true}));
          const fits = root.scrollWidth === root.clientWidth
            && !inside.document.getElementById("tip").hidden;
          const found = (await inside.axe.run()).violations.map(rule => ({
            rule: rule.id, nodes: rule.nodes.map(
              node => node.html.slice(0, 200) + " " + node.any.map(c => c.message).join())}));
          inside.frameElement.remove();
          return {width, hash, fits, found};
        };
        (async () => {
          const checked = [];
          for (const width of [360, 1280])
            for (const hash of ["#kangaroo/8", "#tree/end", "#none/4", "#tree,none/20"])
              checked.push(await check(width, hash));
          done({checked});
        })();""", head=f"<script>{AXE.read_text(encoding='utf-8')}</script>",
        dark=dark, timeout=900)
    assert len(told["checked"]) == 8
    for view in told["checked"]:
        assert view["fits"] and view["found"] == [], view
