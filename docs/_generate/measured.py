"""Tables of the figures that the benchmarks have written to `docs/benchmarks/`."""

from __future__ import annotations

import json
from typing import Any

from _generate import ROOT, table

_SENSES = {">=": "≥", "<=": "≤"}


def figures(name: str) -> Any:
    return json.loads((ROOT / "docs" / "benchmarks" / f"{name}.json").read_text("utf-8"))


def bars(*names: str) -> str:
    """What was asked of benchmarks and what was measured, in the order of their files."""
    rows = [_bar(bar) for name in names for bar in figures(name)["bars"] if bar["measured"] is not None]
    files = ", ".join(f"`docs/benchmarks/{name}.json`" for name in names)
    return table(["figure", "asked", "measured", "spread"], rows, right=(1, 2, 3)) + f"\n\nFrom {files}."


def _bar(bar: dict[str, Any]) -> tuple[str, str, str, str]:
    asked = f"{_SENSES[bar['sense']]} {number(bar['asked'])}"
    measured = number(bar["measured"]) + ("" if bar["holds"] else "&nbsp;(misses)")
    return bar["name"], asked, measured, "" if bar["spread"] is None else number(bar["spread"])


def number(value: float) -> str:
    """Three significant digits, and whole numbers as they are."""
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if 0.9 < abs(value) < 1 else f"{value:.3g}"


def queries() -> str:
    """Milliseconds of each question on the larger of two stores."""
    found = figures("queries")
    rows = []
    for name, about in found["warm"][-1].items():
        asked = "" if about["asked_ms"] is None else f"≤ {about['asked_ms']}"
        misses = "&nbsp;(misses)" if asked and about["median_ms"] > about["asked_ms"] else ""
        times = [f"{about[key]:.1f}" for key in ("median_ms", "p95_ms", "cold_ms")]
        rows.append((name, asked, times[0] + misses, *times[1:]))
    return table(["question", "asked, ms", "warm median", "95%", "cold"], rows, right=(1, 2, 3, 4))


def queries_by_size() -> str:
    """Milliseconds of each question on runs of 10^8, 10^9 and 10^10 values, made alike."""
    found = [figures(f"queries_{size}") for size in ("1e8", "1e9", "1e10")]
    asked = {bar["name"].partition(":")[0]: bar["asked"] for bar in found[-1]["bars"]}
    rows = []
    for name, about in found[-1]["answers"].items():
        times = [*(each["answers"][name]["median_ms"] for each in found), about["cold_ms"]]
        most = f"≤ {asked[name]}" if name in asked else ""
        rows.append((name, *(f"{time:.1f}" for time in times), most, f"{times[2] / times[0]:.1f}"))
    header = ["question", "10⁸, warm", "10⁹, warm", "10¹⁰, warm", "10¹⁰, cold", "asked", "10¹⁰ / 10⁸"]
    return table(header, rows, right=(1, 2, 3, 4, 5, 6))


def buckets() -> str:
    """Requests, megabytes and seconds of each question to a bucket, cold and warm."""
    rows = []
    for name, about in figures("buckets")["questions"].items():
        spent = [each for state in ("cold", "warm") for each in _spent(about[state])]
        rows.append((f"`{name}`", str(about["files"]), *spent))
    header = ["question", "files", "cold: requests", "MB", "s", "warm: requests", "MB", "s"]
    return table(header, rows, right=range(1, 8))


def _spent(about: dict[str, Any]) -> tuple[str, str, str]:
    return str(sum(about["requests"].values())), f"{about['bytes'] / 1e6:.1f}", f"{about['seconds']:.1f}"


def synth(name: str = "synth") -> str:
    """Scores of every architecture and peer on the same made rows."""
    found = figures(name)
    keys = ["l0", "variance_unexplained", "found_share", "precision", "mcc", "f1"]
    by_f1 = sorted(found["scores"].items(), key=lambda item: -item[1]["f1"])
    rows = [(name, *_scores(scores, keys)) for name, scores in [*by_f1, *found["peers"].items()]]
    header = ["", "L0", "variance unexplained", "found", "precision", "MCC", "F1"]
    return table(header, rows, right=range(1, 7))


def _scores(scores: dict[str, float], keys: list[str]) -> list[str]:
    return [f"{scores[key]:.1f}" if key == "l0" else f"{scores[key]:.3f}" for key in keys]


def toys() -> str:
    """The founding article's toys, trained, untrained and on shuffled columns."""
    found = figures("toys")
    phrases = {f"eight phrases, {n} features: share of seeds": about for n, about in found["eight_phrases"].items()}
    others = {name: about for name, about in found.items() if "," in name and isinstance(about, dict)}
    keys = ["trained", "untrained", "trained on shuffled columns"]
    rows = []
    for name, about in (phrases | others).items():
        about = about | {keys[2]: about.get(keys[2], about.get("trained on a shuffled table"))}
        rows.append((name, *("" if about.get(key) is None else f"{about[key]:.4g}" for key in keys)))
    return table(["toy", *keys], rows, right=(1, 2, 3))


def l0() -> str:
    """L0 over the k that was asked for, and the variance unexplained, of BatchTopK and JumpReLU."""
    rows = []
    for data, saes in figures("l0")["saes"].items():
        beside = {(sae["architecture"], sae["k"], sae["n_steps"]): sae for sae in saes}
        for k, steps in sorted({key[1:] for key in beside}):
            found = [beside[name, k, steps] for name in ("batchtopk", "jumprelu")]
            ratios = [f"{sae['l0_over_k']:.3f}" for sae in found]
            rows.append((f"{data}, {k}, {steps:,}", *ratios, *(f"{sae['variance_unexplained']:.3f}" for sae in found)))
    header = ["data, k, steps", "BatchTopK: L0 / k", "JumpReLU: L0 / k", "BatchTopK: variance unexplained", "JumpReLU"]
    return table(header, rows, right=range(1, 5))


def low_precision() -> str:
    """Scores with moments in 8 bits and weights in bfloat16 beside float32's, and how far seeds lie apart."""
    found, keys = figures("low_precision"), ["found_share", "precision", "f1", "variance_unexplained"]
    rows = []
    for architecture, ways in found["means"].items():
        rows += [(f"{architecture}, {way}", *(f"{scores[key]:.3f}" for key in keys)) for way, scores in ways.items()]
        noise = found["seed_noise"][architecture].values()
        rows.append((f"{architecture}, standard deviation of float32's seeds", *(f"{each:.3f}" for each in noise), ""))
    return table(["", "found", "precision", "F1", "variance unexplained"], rows, right=range(1, 5))


def defaults() -> str:
    """Variance that trainings with default rates leave, ours and the peers'."""
    names = ["ours topk", "sparsify topk", "saelens topk", "ours batchtopk", "saelens batchtopk"]
    rows = [
        (", ".join(f"{about[key]:,}" for key in ("width", "n_features", "k", "n_steps")),
         *(f"{about[name]['variance_unexplained']:.3f}" for name in names))
        for about in figures("defaults")["trainings"]
    ]  # fmt: skip
    header = ["D, F, K, steps", "TopK: saeflow", "sparsify", "SAELens", "BatchTopK: saeflow", "SAELens"]
    return table(header, rows, right=range(1, 6))


def compression() -> str:
    """Ratio and speed of zstd by site and precision."""
    rows = [
        (name, f"{about['ratio']:.2f}", *(f"{about[key]:,.0f}" for key in
         ("write_none", "write_zstd", "read_none", "read_zstd")))
        for name, about in figures("compression")["megabytes_per_second_and_ratio"].items()
    ]  # fmt: skip
    header = ["activations", "size over size with zstd", "write, MB/s", "write zstd", "read", "read zstd"]
    return table(header, rows, right=range(1, 6))
