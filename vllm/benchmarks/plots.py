"""Plots of results, as PNG files. Needs matplotlib, which is in the `bench` extra.

Colours are those of Okabe and Ito, which people with any common colour blindness can tell apart; markers and dashes repeat what colours say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
PALE = ("#9ecae1", "#fdd0a2", "#a1d9bf", "#e7c1d6", "#fde2a7", "#cfe8f7", "#d9d9d9", "#faf6c3")
_INTERVAL = "bars: interval of the median"


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Every plot that a result has numbers for; the files, in the order in which a reader wants them."""
    made: list[Path] = []
    for key, name, plot in _PLOTS:
        if not result.get(key):
            continue
        figures = plot(result)
        for suffix, figure in figures.items():
            path = folder / f"{result['benchmark']}-{name}{suffix}.png"
            figure.savefig(path, dpi=100)
            plt.close(figure)
            made.append(path)
    return made


def speed(result: dict[str, Any]) -> dict[str, Figure]:
    """Decode speed of all sequences and of one, and the ratio to the first variant, over concurrency."""
    points = result["points"]
    figure, (total, each, ratio) = plt.subplots(1, 3, figsize=(15, 5.2), layout="constrained")
    for axes, name, title in (
        (total, "decode_tok_s", "all sequences together"),
        (each, "tok_s_a_request", "one sequence"),
    ):
        for i, label in enumerate(result["variants"]):
            medians = [point["variants"][label][name] for point in points]
            bounds = [(m["low"], m["high"]) for m in medians]
            _line(
                axes, i, points, [m["median"] for m in medians], bounds, _name(result, label), len(result["variants"])
            )
        axes.set(title=f"Decode, {title}", ylabel="tokens a second", ylim=(0, None))
        _over_concurrency(axes, points)
    labels = list(result["variants"])[1:]
    for i, label in enumerate(labels, 1):
        found = [point["comparisons"][label]["decode_tok_s"] for point in points]
        bounds = [(f["low"], f["high"]) for f in found]
        _line(ratio, i, points, [f["ratio"] for f in found], bounds, _name(result, label), len(labels) + 2)
    ratio.axhline(1, color="grey", linewidth=1)
    ratio.set(title="Decode speed beside A", ylabel="times as fast as A")
    _over_concurrency(ratio, points)
    handles, names = total.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 3), frameon=False, title=_INTERVAL)
    return {"": figure}


def _name(result: dict[str, Any], label: str) -> str:
    return f"{label}: {_short(result['variants'][label]['text'], 44)}"


def _line(
    axes: Axes, i: int, points: Sequence[dict], values: Sequence[float], bounds: Sequence[tuple], name: str, lines: int
) -> None:
    """Variants stand a little beside each other, so that bars do not hide bars."""
    numbers = [point["concurrency"] for point in points]
    apart = 0.03 + 0.02 * math.log2(max(numbers) / min(numbers))  # in powers of two, as the axis
    x = [n * 2 ** (apart * (i - (lines - 1) / 2)) for n in numbers]
    known = [low is not None and high is not None and 0 < low <= high < float("inf") for low, high in bounds]
    below = [max(v - b[0], 0) if k else 0 for v, b, k in zip(values, bounds, known)]
    above = [max(b[1] - v, 0) if k else 0 for v, b, k in zip(values, bounds, known)]
    style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i], "markersize": 6}
    axes.errorbar(x, values, yerr=(below, above), capsize=3, linewidth=1.4, label=name, **style)


def _over_concurrency(axes: Axes, points: Sequence[dict]) -> None:
    numbers = sorted({point["concurrency"] for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(n) for n in numbers])
    axes.minorticks_off()
    axes.set_xlim(numbers[0] / 1.3, numbers[-1] * 1.3)
    axes.set_xlabel("concurrency (sequences at once)")
    axes.grid(alpha=0.3)


def roofline(result: dict[str, Any]) -> dict[str, Figure]:
    """The share of the read bandwidth that is reached, and what the bytes are."""
    rows = result["roofline"]["rows"]
    labels = list(dict.fromkeys(row["variant"] for row in rows))
    figure, (share, moved) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    for i, label in enumerate(labels):
        own = [row for row in rows if row["variant"] == label]
        name = _name(result, label) if "variants" in result else label
        _line(share, i, own, [100 * row["share"] for row in own], [(None, None)] * len(own), name, len(labels))
    bandwidth = result["roofline"]["read_bytes_s"]
    highest = 115 * max(row["share"] for row in rows)
    share.set(title=f"Share of the read bandwidth ({bandwidth / 1e9:,.0f} GB/s) reached", ylabel="%", ylim=(0, highest))
    _over_concurrency(share, rows)
    share.legend(loc="best", fontsize=9)
    first = [row for row in rows if row["variant"] == labels[0]]
    unit, name = (1e9, "GB") if max(row["total"] for row in first) >= 1e9 else (1e6, "MB")
    parts = sorted(
        {part for row in first for part in row["bytes"]}, key=lambda part: -max(r["bytes"].get(part, 0) for r in first)
    )
    shown, rest = parts[:7], parts[7:]
    bottom = [0.0] * len(first)
    for i, part in enumerate([*shown, "other"] if rest else shown):
        heights = [sum(row["bytes"].get(p, 0) for p in (rest if part == "other" else [part])) / unit for row in first]
        moved.bar(
            range(len(first)),
            heights,
            bottom=bottom,
            label=part,
            color=COLOURS[i],
            edgecolor="white",
            hatch=("", "//")[i % 2],
        )
        bottom = [b + h for b, h in zip(bottom, heights)]
    moved.set_xticks(range(len(first)), [str(row["concurrency"]) for row in first])
    moved.set(title="Bytes that a step must move", ylabel=name, xlabel="concurrency (sequences at once)")
    handles, names = moved.get_legend_handles_labels()
    moved.legend(handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
    return {"": figure}


def components(result: dict[str, Any]) -> dict[str, Figure]:
    """Time by component, variants beside each other; then each variant's step as a flame: step, components, kernels."""
    figures = {}
    for concurrency in sorted({found["concurrency"] for found in result["profile"]}):
        own = [found for found in result["profile"] if found["concurrency"] == concurrency]
        figures[f"-at-{concurrency}"] = _component_bars(result, own, concurrency)
    for found in result["profile"]:
        label = found.get("variant")
        figures[f"-flame-{label or 'step'}-at-{found['concurrency']}"] = _flame(result, found)
    return figures


def _component_bars(result: dict[str, Any], own: list[dict], concurrency: int) -> Figure:
    parts = list(dict.fromkeys(part["name"] for found in own for part in found["components"]))
    height = 0.8 / len(own)
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.17 * len(parts) * (1 + len(own))), layout="constrained")
    for i, found in enumerate(own):
        us = {part["name"]: part["us_a_step"] for part in found["components"]}
        name = _name(result, found["variant"]) if "variant" in found else f"all, {found['busy_us_a_step']:,.0f} µs"
        y = [place + (i - (len(own) - 1) / 2) * height for place in range(len(parts))]
        bars = axes.barh(
            y,
            [us.get(part, 0) for part in parts],
            height,
            label=name,
            color=COLOURS[i],
            edgecolor="white",
            hatch=("", "//", "..", "xx")[i % 4],
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    axes.set_yticks(range(len(parts)), parts)
    axes.set_ylim(len(parts) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.set(title=f"Time of a decode step by component, concurrency {concurrency}", xlabel="µs a step")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return figure


def _flame(result: dict[str, Any], found: dict[str, Any]) -> Figure:
    """Widths are time. What is too narrow for its name stays without; the table has it."""
    figure, axes = plt.subplots(figsize=(14, 4.6), layout="constrained")
    busy = found["busy_us_a_step"]
    unit = "kernels" if result["environment"]["gpu"] else "operators"
    _box(axes, 0, busy, 0, f"one decode step: {busy:,.0f} µs in {found['kernels_a_step']:,.0f} {unit}", "#eeeeee", busy)
    start = 0.0
    for i, part in enumerate(found["components"]):
        text = f"{part['name']}\n{part['us_a_step']:,.0f} µs, {part['share']:.0%}"
        _box(axes, start, part["us_a_step"], 1, text, PALE[i % len(PALE)], busy)
        at = start
        for kernel in part["kernels"]:
            text = f"{_short(kernel['name'], 40)}\n{kernel['us_a_step']:,.0f} µs, {kernel['calls_a_step']:,.0f} calls"
            _box(axes, at, kernel["us_a_step"], 2, text, PALE[i % len(PALE)], busy)
            at += kernel["us_a_step"]
        start += part["us_a_step"]
    axes.set(xlim=(0, busy), ylim=(3, 0), xlabel="µs a step, largest component first")
    axes.set_yticks([0.5, 1.5, 2.5], ["step", "components", f"largest\n{unit}"])
    name = _name(result, found["variant"]) if "variant" in found else result.get("model", "")
    axes.set_title(f"{name}, concurrency {found['concurrency']}")
    return figure


def _box(axes: Axes, start: float, width: float, row: int, text: str, colour: str, whole: float) -> None:
    axes.barh(row + 0.5, width, 0.96, left=start, color=colour, edgecolor="white", linewidth=0.6)
    # A box of the figure's 13 inches holds about 150 letters of 8 points; one that is high and narrow takes its text upright.
    letters, longest = 150 * width / whole, max(map(len, text.split("\n")))
    if letters >= longest + 1:
        axes.text(start + width / 2, row + 0.5, text, ha="center", va="center", fontsize=8)
    elif letters >= 3:
        lines = [_short(line, 21) for line in text.split("\n")[: 2 if letters >= 5 else 1]]
        axes.text(start + width / 2, row + 0.5, "\n".join(lines), ha="center", va="center", fontsize=7, rotation=90)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def phases(result: dict[str, Any]) -> dict[str, Figure]:
    """Starts as bars of their phases, cold above warm."""
    starts = result["starts"]
    names = list(dict.fromkeys(name for start in starts for name in start["phases"]))
    figure, axes = plt.subplots(figsize=(12, 1.8 + 0.6 * len(starts)), layout="constrained")
    left = [0.0] * len(starts)
    for i, name in enumerate(names):
        widths = [start["phases"].get(name, 0.0) for start in starts]
        bars = axes.barh(
            range(len(starts)), widths, left=left, label=name, color=PALE[i % 8], edgecolor="black", linewidth=0.5
        )
        whole = max(sum(start["phases"].values()) for start in starts)
        axes.bar_label(bars, [f"{w:.1f}" if w > 0.04 * whole else "" for w in widths], label_type="center", fontsize=8)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(range(len(starts)), [f"{start['kind']} {start['number']}" for start in starts])
    axes.invert_yaxis()
    axes.set(title="From the start of the process to the first token", xlabel="seconds")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return {"": figure}


def latencies(result: dict[str, Any]) -> dict[str, Figure]:
    """What share of requests is at most as slow: time to first token, time per output token, whole request."""
    kinds = [("ttfts", "time to first token"), ("tpots", "time per output token"), ("e2els", "whole request")]
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained", sharey=True)
    for i, (axes, (name, title)) in enumerate(zip(panels, kinds)):
        values = sorted(1e3 * value for value in result["distributions"][name])
        share = [100 * (k + 1) / len(values) for k in range(len(values))]
        axes.step(values, share, where="post", color=COLOURS[i])
        axes.set(title=title, xlabel="ms", ylim=(0, 101))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("% of requests at most as slow")
    return {"": figure}


_PLOTS: list[tuple[str, str, Callable[[dict[str, Any]], dict[str, Figure]]]] = [
    ("points", "speed", speed),
    ("roofline", "roofline", roofline),
    ("profile", "components", components),
    ("starts", "phases", phases),
    ("distributions", "latencies", latencies),
]
