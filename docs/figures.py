"""Make the tables and figures of docs/results.md from the measurements in docs/results/*.json.

    pip install matplotlib
    python docs/figures.py

bench/spec_bench.py, bench/ablations.py and bench/exactness.py measure; this only draws, beside the
paper's own figures (arXiv 2404.18911; those that it shows as plots are read off, ± 0.02). A
measurement that is missing is left out.
"""
import math
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
from bench.ablations import PAPER, at, with_speedups
from bench.spec_bench import SUBTASKS, needs, summarise
from support.files import read_json

from make import insert

BLUE, VIOLET, GREEN, RED, GREY = "#1668b8", "#6a3fb5", "#14733f", "#b3261e", "#8a8f99"
MODELS = {"stories": "stories (16 layers)", "smollm2": "SmolLM2-135M (30 layers)"}
PAPER_BENCH = {  # compression rate, speedup, by subtask in Spec-Bench's order
    name: dict(zip(SUBTASKS, cells)) for name, cells in {
        "Vicuna-7B, Lookahead": ((1.70, 1.40), (1.24, 1.15), (1.53, 1.27), (1.56, 1.21),
                                 (1.96, 1.51), (1.49, 1.19)),
        "Vicuna-7B, Medusa": ((1.76, 1.55), (1.58, 1.41), (1.49, 1.32), (1.50, 1.34),
                              (1.73, 1.54), (1.51, 1.29)),
        "Vicuna-7B, REST": ((2.00, 1.58), (1.54, 1.26), (1.64, 1.33), (1.91, 1.63), (1.53, 1.23),
                            (1.92, 1.46)),
        "Vicuna-7B, Kangaroo": ((2.22, 1.68), (1.41, 1.24), (1.87, 1.50), (1.87, 1.43),
                                (2.14, 1.61), (2.05, 1.52)),
        "Vicuna-13B, Kangaroo": ((2.44, 1.66), (1.45, 1.18), (2.00, 1.41), (1.79, 1.34),
                                 (2.42, 1.63), (2.16, 1.40))}.items()}
PAPER_EXITS = {  # of 32 layers
    0: (1.42, 1.28), 2: (2.01, 1.50), 4: (2.32, 1.44), 8: (2.61, 1.28), 16: (3.40, 1.07)}
PAPER_ADAPTERS = {"ℓ = 2": ("67 M", "1.50"), "attention + MLP": ("202 M", "1.37"),
                  "MLP only": ("165 M", "1.22"), "own LM head": ("198 M", "1.44")}
PAPER_THRESHOLDS = {  # η = 0, .1, .3, .5, .7, .9
    4: (1.36, 1.31, 1.44, 1.47, 1.48, 1.40), 6: (1.21, 1.26, 1.41, 1.46, 1.48, 1.41),
    8: (1.11, 1.18, 1.37, 1.48, 1.49, 1.44)}
BOTH = ("compression_rate", "Compression rate"), ("speedup", "Speedup")

matplotlib.rcParams.update({
    "svg.fonttype": "none", "svg.hashsalt": "kangaroo", "font.size": 9,
    "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "legend.frameon": False, "figure.facecolor": "white"})


def save(figure, name):
    figure.savefig(DOCS / "results" / f"{name}.svg", bbox_inches="tight",
                   metadata={"Date": None, "Creator": None})
    plt.close(figure)


def write(name, lines):
    insert(DOCS / "results.md", name, "\n".join(lines))


def table(head, rows):
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows)]


def both(cell):
    return f"{cell['compression_rate']:.2f} / {cell['speedup']:.2f}"


def settings(results):
    return " · ".join(v for v in results["settings"].values() if isinstance(v, str))


def load(name):
    path = DOCS / "results" / f"{name}.json"
    return read_json(path) if path.exists() else None


# --------------------------------------------------------------------------------------------------
# bench/spec_bench.py and bench/exactness.py

def spec_bench():
    """The paper's table, ours above the paper's; what each method needs; the paper's Figure 1."""
    panels = {}
    for name in MODELS:
        if not (results := load(f"spec_bench-{name}")):
            continue
        panels[name] = summary = summarise(results)
        subtasks = [key for key in SUBTASKS if key in summary]
        lines = methods_table(summary, subtasks, with_paper=name == "smollm2")
        tokens = summary["all"][summary["fastest"]]["tokens"]
        write(f"spec_bench-{name}", [
            *lines, "", *needs_table(results, summary), "",
            f"({settings(results)}; {tokens:,} tokens per method. Speedup against "
            f"{summary['fastest']}.)"])
    if panels:
        draw_spec_bench(panels)


def methods_table(summary, subtasks, with_paper):
    rows = []
    for method, every in sorted(summary["all"].items(), key=lambda item: vanilla_first(item[0])):
        cells = [both(summary[key][method]) for key in [*subtasks, "all"]]
        rows.append([method, *cells, f"{every['identical']} of {every['turns']}"])
    for name, figures in PAPER_BENCH.items() if with_paper else ():
        mean = sum(speedup for _, speedup in figures.values()) / len(figures)
        cells = ["{:.2f} / {:.2f}".format(*figures[key]) for key in subtasks]
        rows.append([f"*the paper, {name}*", *cells, f"– / {mean:.2f}", "not claimed"])
    return table(["", *(SUBTASKS[key] for key in subtasks), "all", "identical"], rows)


def vanilla_first(method):
    """Sorts vanilla decoding by width, and leaves the methods in their order."""
    return int(method.split()[-1]) if method.startswith("vanilla") else math.inf


def needs_table(results, summary):
    rows = [[name, *needs(results["costs"][name]), f"{summary['all'][name]['drafting']:.0%}", words]
            for name, words in results["settings"]["methods"].items()]
    return table(["", "parameters", "bytes", "training, s", "time in drafts", "settings"], rows)


def draw_spec_bench(panels):
    """The paper's Figure 1 for our models: accepted by draft position, speedup by subtask."""
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(3.6 + 2.8 * len(panels), 2.9),
                                width_ratios=[1] * len(panels) + [1.5])
    names = dict.fromkeys(name for summary in panels.values() for name in summary["all"]
                          if not name.startswith("vanilla"))
    colours = dict(zip(names, plt.get_cmap("tab10").colors))
    for axis, (model, summary) in zip(axes, panels.items()):
        for name in names:
            shares = summary["all"].get(name, {}).get("accepted_by_depth", [])[:7]
            axis.plot(range(1, 1 + len(shares)), shares, ".-", color=colours[name], label=name)
        axis.set_ylim(0, 1)
        axis.set_xlabel("draft position")
        axis.set_title(f"{MODELS[model]}: accepted")
    model, summary = list(panels.items())[-1]
    groups = [key for key in [*SUBTASKS, "all"] if key in summary]
    shown = [name for name in names if name in summary["all"]]
    for i, name in enumerate(shown):
        axes[-1].bar([x + 0.8 * (i - (len(shown) - 1) / 2) / len(shown)
                      for x in range(len(groups))], [summary[g][name]["speedup"] for g in groups],
                     0.8 / len(shown), color=colours[name])
    axes[-1].axhline(1, color="black", linewidth=0.8)
    axes[-1].set_xticks(range(len(groups)), [SUBTASKS.get(g, g) for g in groups], rotation=25,
                        ha="right")
    axes[-1].set_title(f"{MODELS[model]}: speedup")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center left",
                    bbox_to_anchor=(1, 0.5))  # over no bar
    figure.tight_layout()
    save(figure, "spec_bench")


def exactness():
    rows, lines = [], []
    for model in MODELS:
        if results := load(f"exactness-{model}"):
            for dtype, methods in results["dtypes"].items():
                cells = [f"{sum(d is not None for d in differences)} of {len(differences)}"
                         for differences in methods.values()]
                rows.append([model, dtype, *cells])
            lines += ["", f"({settings(results)})"]
    if rows:
        head = ["", "", "Kangaroo", "prompt lookup", "transformers, prompt lookup",
                "transformers' vanilla, from ours"]
        write("exactness", table(head, rows) + lines)


# --------------------------------------------------------------------------------------------------
# bench/ablations.py

def each_ablation():
    found = [(model, results) for model in MODELS if (results := load(f"ablations-{model}"))]
    for _, results in found:
        with_speedups(results["variants"])
    return found


def in_full():
    """[(model, figures)] of the adapters that were trained in full."""
    return [(model, results["variants"]["in full"]) for model, results in each_ablation()
            if "in full" in results["variants"]]


def exit_layers():
    found = {model: {int(name[4:]): f for name, f in results["variants"].items()
                     if name.startswith("ℓ = ")} for model, results in each_ablation()}
    if not found:
        return
    layers = sorted(set().union(*found.values()))
    rows = []
    for model, by_layer in found.items():
        for what, cell in (
                (f"{MODELS[model]}: compression rate / speedup", lambda f: both(at(f))),
                ("draft step ÷ vanilla step",
                 lambda f: f"{f['seconds']['draft'] / f['seconds']['step']:.2f}"),
                ("held-out agreement", lambda f: f"{f['agreement']:.1%}")):
            rows.append([what, *(cell(by_layer[x]) if x in by_layer else "–" for x in layers)])
    paper = ["{:.2f} / {:.2f}".format(*PAPER_EXITS[x]) if x in PAPER_EXITS else "–" for x in layers]
    rows.append(["*the paper, Vicuna-7B (32 layers)*", *paper])
    write("exit-layers", table(["ℓ", *layers], rows))
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.6))
    for j, (axis, (key, title)) in enumerate(zip(axes, BOTH)):
        for (model, by_layer), colour in zip(found.items(), (VIOLET, BLUE)):
            axis.plot(list(by_layer), [at(f)[key] for f in by_layer.values()], "o-", color=colour,
                      label=MODELS[model])
        axis.plot(list(PAPER_EXITS), [pair[j] for pair in PAPER_EXITS.values()], "s--", color=GREY,
                  label="Vicuna-7B, the paper")
        axis.set_title(title)
        axis.set_xlabel("exit layer ℓ")
        axis.axhline(1, color="black", linewidth=0.8)
    axes[0].legend(fontsize=7.5)
    save(figure, "exit-layers")


def adapters():
    names = ["ℓ = 2", "no input norm", "attention + MLP", "MLP only", "own LM head",
             "attention + MLP, loss −log Σ min(p, q)", "attention + MLP, whole vocabulary"]
    rows, found = [], each_ablation()
    if not found:
        return
    for name in names:
        cells, measured = [], [results["variants"].get(name) for _, results in found]
        if not any(measured):
            continue
        for f in measured:
            cells += [f"{f['parameters'] / 1e6:.2f} M", f"{f['agreement']:.1%}",
                      both(at(f))] if f else ["–"] * 3
        label = "the paper's" if name == "ℓ = 2" else name
        rows.append([label, *cells, *PAPER_ADAPTERS.get(name, ("–", "–"))])
    head = [cell for model, _ in found
            for cell in (f"{model}: parameters", "agreement", "compression rate / speedup")]
    write("adapters", table(["", *head, "*the paper, 7B*: parameters", "speedup"], rows))
    draw_adapters(found)


def draw_adapters(found):
    figure, axes = plt.subplots(1, len(found) + 1, figsize=(8.4, 2.4), sharey=True)
    shown = list(PAPER_ADAPTERS)
    panels = [(MODELS[model], [at(results["variants"][name])["speedup"]
                               if name in results["variants"] else 0 for name in shown], colour)
              for (model, results), colour in zip(found, (VIOLET, BLUE))]
    panels.append(("Vicuna-7B, the paper", [float(PAPER_ADAPTERS[n][1]) for n in shown], GREY))
    for axis, (title, speedups, colour) in zip(axes, panels):
        bars = axis.barh(range(len(shown)), speedups, color=colour)
        axis.bar_label(bars, [f"{s:.2f}" for s in speedups], padding=2, fontsize=8)
        axis.set_yticks(range(len(shown)), ["the paper's adapter", *shown[1:]])
        axis.set_xlim(0, max(speedups) * 1.2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(title)
    axes[0].invert_yaxis()
    axes[1].set_xlabel("speedup")
    save(figure, "adapters")


def thresholds():
    found = in_full()
    if not found:
        return
    steps = sorted({cell["steps"] for cell in found[0][1]["grid"]})
    etas = sorted({cell["threshold"] for cell in found[0][1]["grid"]})
    lines = []
    for model, f in found:
        rows, best = [], at(f)
        for s in steps:
            cells = [at(f, s, t) for t in etas]
            rows.append([f"γ = {s}", *(f"**{both(cell)}**" if cell is best else both(cell)
                                       for cell in cells)])
        lines += [f"{MODELS[model]}, compression rate / speedup:", "",
                  *table(["", *(f"η = {t}" for t in etas)], rows), ""]
    write("thresholds", lines[:-1])
    figure, axes = plt.subplots(1, len(found) + 1, figsize=(8.4, 2.6))
    for axis, (model, f) in zip(axes, found):
        for s, colour in zip((2, 4, 6), (GREEN, BLUE, VIOLET)):
            axis.plot(etas, [at(f, s, t)["speedup"] for t in etas], "o-", markersize=3,
                      color=colour, label=f"γ = {s}")
        axis.set_title(MODELS[model])
    for (s, speedups), colour in zip(PAPER_THRESHOLDS.items(), (BLUE, VIOLET, RED)):
        axes[-1].plot((0, .1, .3, .5, .7, .9), speedups, "s--", markersize=3, color=colour,
                      label=f"γ = {s}")
    axes[-1].set_title("Vicuna-7B, the paper")
    for axis in axes:
        axis.set_xlabel("threshold η")
        axis.legend(fontsize=7.5)
    axes[0].set_ylabel("speedup")
    save(figure, "thresholds")


def positions():
    found = in_full()
    if not found:
        return
    places = range(1, PAPER[0] + 1)
    shares = {}
    for model, f in found:
        drafted, accepted = f["by_position"]["drafted"], f["by_position"]["accepted"]
        shares[model] = [accepted[w - 1] / drafted[w - 1] for w in places]
    rows = [[MODELS[model], *(f"{share:.0%}" for share in row)] for model, row in shares.items()]
    write("positions", table(["draft position w", *places], rows))
    figure, axis = plt.subplots(figsize=(4.2, 2.4))
    for (model, row), colour in zip(shares.items(), (VIOLET, BLUE)):
        axis.plot(places, row, "o-", color=colour, label=MODELS[model])
    axis.set_ylim(0, 1)
    axis.set_xlabel("draft position w")
    axis.set_ylabel("tokens 1 … w accepted")
    axis.legend(fontsize=7.5)
    save(figure, "positions")


def confidence():
    panels, rows = [], []
    for model, f in in_full():
        by_subtask = f["confidence"]
        for subtask in [key for key in SUBTASKS if key in by_subtask] or list(by_subtask):
            name = f"{model}: {SUBTASKS[subtask]}" if subtask in SUBTASKS else model
            panels.append((name, by_subtask[subtask]))
    if not panels:
        return
    for name, bins in panels:
        n = len(bins["accepted"])
        total = {kind: sum(counts) for kind, counts in bins.items()}
        mean = {kind: sum((i + .5) / n * c for i, c in enumerate(counts)) / max(1, total[kind])
                for kind, counts in bins.items()}
        above = [sum(counts[int(PAPER[1] * n):]) for counts in (bins["accepted"], bins["rejected"])]
        rows.append([name, total["accepted"], total["rejected"], f"{mean['accepted']:.2f}",
                     f"{mean['rejected']:.2f}", f"{above[0] / max(1, sum(above)):.0%}"])
    head = ["", "right", "wrong", "mean top-1 probability, right", "wrong",
            f"right of those above {PAPER[1]}"]
    write("confidence", table(head, rows))
    draw_confidence(panels)


def draw_confidence(panels, columns=4):
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(8.4, 1.7 * lines), squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    for axis, (name, bins) in zip(axes.flat, panels):
        n = len(bins["accepted"])
        middles = [(i + .5) / n for i in range(n)]
        axis.bar(middles, bins["accepted"], 1 / n, color=GREEN, label="right")
        axis.bar(middles, [-c for c in bins["rejected"]], 1 / n, color=RED, label="wrong")
        axis.axvline(PAPER[1], color="black", linestyle="--", linewidth=0.8)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    save(figure, "confidence")


if __name__ == "__main__":
    for make in (spec_bench, exactness, exit_layers, adapters, thresholds, positions, confidence):
        make()
