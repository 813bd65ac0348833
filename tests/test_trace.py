"""--trace: the page holds what the run did, and in a real browser shows it. Chromium or Chrome, where one is installed."""
import html
import itertools
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest
from helpers import write_adapter, write_model

import kangaroo
import replay

PROMPT = "Once </script><script>document.title = window.hacked = 1</script><!-- <b>upon & a time"
CONFIDENT = ["--temperature", 5]  # the noise that drafter and target share decides: many drafted tokens are accepted


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
        words = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 40, "--prompt", prompt,
                 "--json", "--trace", page, *args]
        status, (out, err) = kangaroo.main([str(word) for word in words]), capfd.readouterr()
        assert status == 0, err
        data = replay.read_page(page)
        summary = "{tokens} tokens in .* compression rate {compression_rate:.2f}".format(**data["summary"])
        assert re.search(summary, err)
        return data, json.loads(out), page
    return run


@pytest.fixture
def ending(model, tmp_path):
    """A function: the model's folder with the token that stands i-th in `ids` as its end-of-sequence token."""
    def ending(ids, i):
        folder = shutil.copytree(model, tmp_path / "ending")
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | {"eos_token_id": ids[i]}))
        return folder
    return ending


RUNS = {
    "kangaroo": [*CONFIDENT, "--threshold", 0.01], "unsure": [*CONFIDENT, "--threshold", 0.9], "greedy": [],
    "rejected": ["--adapter", "random", "--threshold", 0, "--max-new-tokens", 9],
    "exit layer 0": [*CONFIDENT, "--exit-layer", 0, "--threshold", 0],
    "lookup": ["--drafter", "lookup"], "vanilla": ["--drafter", "none"], "γ 0": ["--steps", 0],
    "chat": ["--chat", "vicuna", *CONFIDENT], "compared": [*CONFIDENT, "--compare"],
}


@pytest.mark.parametrize("args", RUNS.values(), ids=RUNS)
def test_the_data_is_the_run(run, args):
    """Tokens, counts and text are those of --json; what was recorded of layers is what the algorithm says it runs."""
    data, result, _ = run(*args)
    rounds, L, N = data["rounds"], data["exit_layer"], data["layers"]
    assert [token["id"] for r in rounds for token in r["committed"]] == result["ids"]
    assert "".join(token["text"] for r in rounds for token in r["committed"]) + data["rest"] == data["text"] == result["text"]
    assert [len(r["drafted"]) for r in rounds] == result["drafted"] and [r["accepted"] for r in rounds] == result["accepted"]
    assert data["summary"] | {"layer_passes": 0} == {
        "tokens": len(result["ids"]), "rounds": result["rounds"], "compression_rate": len(result["ids"]) / result["rounds"],
        "drafted": sum(result["drafted"]), "accepted": sum(result["accepted"]), "layer_passes": 0,
        "vanilla_layer_passes": N * len(result["ids"])}
    start, passes = data["prompt_tokens"] - 1, 0
    for r in rounds:
        n = len(r["drafted"])
        assert r["position"] == start
        if data["drafter"] == "kangaroo":
            runs = [run for group in r["passes"] for run in group]
            assert len(r["passes"]) == n + 1
            seen = [run[1] for run in runs if run[0] == "adapter"]  # the first may catch up
            assert len(seen) == n and seen[1:] == list(range(start + 1, start + n))
            assert sum(run[1] - run[0] for run in runs if run[0] != "adapter" and run[2] == start) == N
            assert [run for run in runs if run[0] != "adapter" and run[2] > start] == [
                [0, L, p] for p in range(start + 1, start + n + 1) if L]
            passes += L * (n + 1) + N - L + n
        else:
            assert r["passes"] == [[[0, N, start]]]
            passes += N
        start += len(r["committed"])
    assert data["summary"]["layer_passes"] == passes


def test_why_a_draft_stopped(run):
    """The second early exit is where the confidence says so, and nowhere else; the other reasons have their lengths."""
    reasons = set()
    for threshold, length in ((0, 7), (0.05, 40), (0, 150)):
        data, _, _ = run(*CONFIDENT, "--threshold", threshold, "--max-new-tokens", length)
        for r in data["rounds"]:
            unsure = [token["confidence"] <= threshold for token in r["drafted"]]
            assert any(unsure[:-1]) is False and (r["stopped"] == "unsure") == (unsure[-1:] == [True])
            assert r["stopped"] != "full" or len(unsure) == data["steps"]
            reasons.add(r["stopped"])
    assert reasons == {"unsure", "full", "edge", "end"}


def test_recording_changes_nothing(run, model, capfd):
    """The same ids as without --trace, and no hook left behind."""
    _, result, page = run(*CONFIDENT)
    kangaroo.main(["--model", str(model), "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "40", "--prompt", PROMPT,
                   "--json", *map(str, CONFIDENT)])
    plain = json.loads(capfd.readouterr().out)
    assert {k: v for k, v in plain.items() if k != "seconds"} == {k: v for k, v in result.items() if k != "seconds"}
    args = kangaroo.parse_arguments(["--model", str(model), "--device", "cpu", "--dtype", "float32", "--prompt", PROMPT])
    decoder = kangaroo.Decoder(args)
    replay.Recorder(decoder, PROMPT, decoder.encode(PROMPT)).decode(lambda text, drafted: None)
    assert not any(m._forward_pre_hooks for module in (decoder.model, decoder.adapter) for m in module.modules())


def test_a_prompt_cannot_leave_its_string(run):
    """Guards against a prompt or a token that ends the script element: "<" never occurs in the data."""
    data, _, page = run()
    text, template = page.read_text(encoding="utf-8"), replay.TEMPLATE.read_text(encoding="utf-8")
    inside = text.split(replay.HERE)[1].split("</script>")[0]
    assert data["prompt"] == PROMPT and "<" not in inside
    assert text.replace(inside, "", 1) == template


def test_the_page_stands_alone():
    """Under 200 KB without its data, nothing that a browser would fetch, and a policy that forbids it to try."""
    text = replay.TEMPLATE.read_text(encoding="utf-8")
    assert len(text.encode()) < 200_000 and text.count(replay.HERE) == 1
    assert "default-src 'none'" in text
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not re.search(r"\bsrc=|@import|url\(|fetch\(|XMLHttpRequest|innerHTML|document\.write|eval\(", text)


@pytest.mark.parametrize("args, word", [
    (["--prompts", "{two}"], "holds 2"), (["--prompt", "a", "--trace", "{folder}"], "must be a file"),
    (["--prompt", "a", "--trace", "{folder}/none/page.html"], "in a folder that exists")])
def test_refused_before_decoding(model, tmp_path, capfd, args, word):
    (tmp_path / "two").write_text("one\ntwo\n")
    args = [arg.format(two=tmp_path / "two", folder=tmp_path) for arg in args]
    status = kangaroo.main(["--trace", str(tmp_path / "page.html"), "--model", str(model), *args])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "") and re.fullmatch(r"kangaroo\.py: --trace [^\n]+\n", err) and word in err
    assert not list(tmp_path.glob("*.html"))


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome (Debian: apt-get install chromium)")

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
  prompt: text("prompt"), output: text("output"), pending: text("pending"), say: text("say"), where: text("where"),
  counters: ["tokens", "rounds", "rate", "saved"].map(name => text("n-" + name)),
  stage: document.getElementById("rows").innerHTML,
  rounds: [...document.querySelectorAll("#rounds li")].map(li => li.innerHTML)});
const press = (key, shiftKey) => document.dispatchEvent(new KeyboardEvent("keydown", {key, shiftKey, cancelable: true}));
const click = id => document.getElementById(id).click();
const done = what => {
  const node = document.createElement("pre");
  node.id = "told";
  node.textContent = encodeURIComponent(JSON.stringify({...what, problems, hacked: window.hacked, title: document.title}));
  document.body.append(node);
};
{
%s
}
</script>"""


def browse(page, tmp_path, script, fragment=""):
    """Open the page with `script`, which ends by calling done(object); returns the object. No error, no word on the console."""
    text = page.read_text(encoding="utf-8")
    page = tmp_path / "driven.html"
    page.write_text(text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", TELL % script + "</body>"), encoding="utf-8")
    shown = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'of'}",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", page.as_uri() + fragment],
        capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="told">(.*?)</pre>', shown.stdout, re.DOTALL)
    assert found, f"the script did not come to its end:\n{shown.stdout[-2000:]}\n{shown.stderr[-2000:]}"
    assert "CONSOLE" not in shown.stderr, shown.stderr
    told = json.loads(unquote(html.unescape(found[1])))
    assert told["problems"] == [] and "hacked" not in told and told["title"] == "Kangaroo, replayed"
    return told


def counters(data):
    """The counters at the end, from the data's summary."""
    s = data["summary"]
    saved = f"{100 * (1 - s['layer_passes'] / s['vanilla_layer_passes']):.0f}".replace("-", "−")
    return [f"{s['tokens']}{s['accepted']} of {s['drafted']} drafted accepted", f"{s['rounds']}full-model passes",
            f"{s['compression_rate']:.2f}vanilla: 1.00",
            f"{saved}\u00a0%{s['layer_passes']:,} instead of {s['vanilla_layer_passes']:,}"]


STEP_TO_THE_END = """
const seen = [tell()];
while (!document.getElementById("step").disabled) { click("step"); seen.push(tell()); }
done({seen});
"""


@in_browser
@pytest.mark.parametrize("name", ["kangaroo", "rejected", "lookup", "chat"])
def test_stepping_to_the_end_shows_the_decode(run, tmp_path, name):
    """At every step the text is what had been decoded by then; at the end it is all of it, with the run's counts."""
    data, result, page = run(*RUNS[name])
    seen = browse(page, tmp_path, STEP_TO_THE_END)["seen"]
    ends = [""]
    for r in data["rounds"]:
        ends.append(ends[-1] + "".join(token["text"] for token in r["committed"]))
    ends[-1] += data["rest"]
    assert [text for text, _ in itertools.groupby(s["output"] for s in seen)] == [text for text, _ in itertools.groupby(ends)]
    assert seen[-1]["output"] == result["text"] and all(s["prompt"].rstrip("\n") == PROMPT for s in seen)
    assert seen[-1]["counters"] == counters(data)
    assert len(seen[-1]["rounds"]) == result["rounds"] and f"{result['rounds']} rounds" in seen[-1]["say"]
    proposed = [s["pending"] for s in seen if s["pending"]]
    if name == "kangaroo":
        assert proposed == ["".join(token["label"] for token in r["drafted"][:i + 1])
                            for r in data["rounds"] for i in range(len(r["drafted"]))]
    own = sum(len(r["committed"]) > r["accepted"] for r in data["rounds"])
    rejected = sum(r["accepted"] < len(r["drafted"]) for r in data["rounds"])
    for kind, sign, count in (("accepted", "✓", sum(result["accepted"])), ("rejected", "✗", rejected), ("own", "▸", own)):
        boxes = re.findall(rf'<span class="tok {kind}".*?</span>', "".join(seen[-1]["rounds"]), re.DOTALL)
        assert len(boxes) == count and all(sign in box for box in boxes)  # told apart by more than colour


@in_browser
def test_a_text_that_ends_by_itself(run, tmp_path, ending):
    """An end-of-sequence token is no text. After a drafted one nothing is replaced."""
    data, result, _ = run(*CONFIDENT, "--threshold", 0)
    k = next(k for k, r in enumerate(data["rounds"]) if k and r["accepted"] > 1)
    i = sum(len(r["committed"]) for r in data["rounds"][:k])
    data, result, page = run(*CONFIDENT, "--threshold", 0, folder=ending(result["ids"], i))
    last = data["rounds"][-1]
    assert last["committed"][-1]["end"]
    told = browse(page, tmp_path, "done(tell());", "#end")
    assert told["output"] == result["text"] and told["counters"] == counters(data) and "The text ends here" in told["say"]
    assert ("own" in told["rounds"][-1]) == (len(last["committed"]) > last["accepted"])


@in_browser
def test_every_way_of_moving_shows_the_same(run, tmp_path):
    """A frame depends on its number alone, reached by buttons, keys, slider, clicks, an address or while playing."""
    data, result, page = run(*RUNS["kangaroo"])
    told = browse(page, tmp_path, """
        const all = [tell()], slider = document.getElementById("seek"), ways = {};
        while (!document.getElementById("step").disabled) { click("step"); all.push(tell()); }
        const at = n => JSON.stringify(tell()) === JSON.stringify(all[n]), end = all.length - 1;
        ways.back = all.map((_, i) => i).reverse().every(i => { const same = at(i); click("back"); return same; });
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
        document.querySelector("#hops rect").dispatchEvent(new MouseEvent("click")); ways.hop = at(first);
        slider.value = 5; slider.dispatchEvent(new Event("input")); ways.slider = at(5);
        location.hash = "#round-1"; dispatchEvent(new Event("hashchange")); ways.address = at(first);
        location.hash = "#end"; dispatchEvent(new Event("hashchange")); ways.addressEnd = at(end);
        location.hash = "#3"; dispatchEvent(new Event("hashchange")); ways.number = at(3);
        press("Home"); document.getElementById("speed").value = "8"; press(" ");
        ways.playing = document.getElementById("play").getAttribute("aria-label") === "Pause";
        const stopped = () => document.getElementById("play").getAttribute("aria-label") === "Play";
        const wait = () => at(end) ? done({ways: {...ways, stopped: stopped()}}) : setTimeout(wait, 100);
        wait();""")
    assert told["ways"] and all(told["ways"].values()), told["ways"]


@in_browser
def test_a_phone_needs_no_sideways_scrolling_and_all_controls_have_names(run, tmp_path):
    """At 390 and 320 pixels nothing is wider than the screen and the controls are in sight; each says what it does."""
    _, _, page = run(*RUNS["kangaroo"])
    frame = json.dumps(page.read_text(encoding="utf-8")).replace("<", "\\u003c")
    outer = tmp_path / "outer.html"
    outer.write_text("<!doctype html><html><head><title>Kangaroo, replayed</title></head><body></body></html>", encoding="utf-8")
    told = browse(outer, tmp_path, f"""
        const page = {frame};""" + """
        const measure = width => new Promise(resolve => {
          const frame = document.createElement("iframe");
          frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
          frame.onload = () => {
            const inside = frame.contentDocument, root = inside.documentElement;
            const out = c => c.getBoundingClientRect().right > root.clientWidth || c.getBoundingClientRect().bottom > 800;
            const named = c => c.getAttribute("aria-label") || c.textContent.trim();
            inside.getElementById("last").click();
            resolve({fits: root.scrollWidth === root.clientWidth, live: inside.getElementById("say").getAttribute("aria-live"),
              out: [...inside.querySelectorAll("#controls *")].filter(out).map(c => c.id),
              nameless: [...inside.querySelectorAll("button, input, select")].filter(c => !named(c)).map(c => c.id)});
          };
          frame.srcdoc = page;
          document.body.append(frame);
        });
        Promise.all([390, 320].map(measure)).then(sizes => done({sizes}));""")
    for size in told["sizes"]:
        assert size == {"fits": True, "out": [], "live": "polite", "nameless": []}
