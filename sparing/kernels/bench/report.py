"""What a run leaves: JSON, a Markdown table, bars; and what became slower since an older run."""

import json
from pathlib import Path
from typing import Any

__all__ = ["ceilings_line", "markdown", "read", "regressions", "row_line", "write"]

SLOWER = 0.07  # a slow-down up to this share is taken for the machine's


def read(path: str | Path) -> dict[str, Any]:
    """The JSON of an older run.

    Raises:
        ValueError: the file is none.
    """
    try:
        data = json.loads(Path(path).read_text())
        _ = data["rows"], data["ceilings"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of the kernel benchmarks") from error
    return data


def regressions(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Rows that became slower by more than 7% and more than the noise of both runs; other devices do not compare.

    Raises:
        ValueError: the runs are of different devices.
    """
    if before["device"] != after["device"]:
        raise ValueError(f"cannot compare runs on {before['device']} and {after['device']}")
    key = lambda row: (row["op"], row["case"], row["dtype"], row["direction"], row["backend"])  # noqa: E731
    old = {key(row): row for row in before["rows"] if row["median_us"]}
    found = []
    for row in after["rows"]:
        was = old.get(key(row))
        if was is None or not row["median_us"]:
            continue
        slower = row["median_us"] / was["median_us"] - 1.0
        if slower > SLOWER + (row["noise"] or 0.0) + (was["noise"] or 0.0):
            found.append(f"{' '.join(key(row))}: {was['median_us']:.1f} -> {row['median_us']:.1f} us (+{slower:.0%})")
    return found


def ceilings_line(data: dict[str, Any]) -> str:
    """The device and what it was measured to do."""
    ceilings = data["ceilings"]
    rates = ", ".join(f"{dtype} {rate:.3g} TFLOP/s" for dtype, rate in ceilings["matmul_tflops"].items())
    label = " (a sanity check, no statement about speed)" if data["device"].startswith("CPU") else ""
    return (
        f"{data['device']}{label}: matrix product {rates}; copy {ceilings['copy_tb_per_s']:.3g} TB/s read + written; "
        f"launch {ceilings['launch_us']:.2g} us"
    )


def row_line(rows: list[dict[str, Any]]) -> str:
    """One line for the terminal: a case and its peers."""
    if not rows:
        return ""
    first = rows[0]
    timed = [f"{r['backend']}{'*' if r['auto'] else ''} {r['median_us']:.1f}" for r in rows if r["median_us"]]
    wrong = [f"{r['backend']} WRONG" for r in rows if r["wrong"]]
    where = f"{first['op']} {first['case']} {first['dtype']} {first['direction']}"
    return f"{where}: floor {first['floor_us']:.1f} us; {', '.join(timed + wrong) or 'nothing ran'}"


def markdown(data: dict[str, Any]) -> str:
    """The table; * = what ``auto`` takes."""
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    lines = [ceilings_line(data), "", f"Versions: {versions}. Suite {data['suite']}. * = what `auto` takes.", ""]
    lines.append(
        "| op | case | dtype | direction | backend | median us | p10-p90 | graph us | of floor | vs best peer | MB |"
    )
    lines.append("| --- | --- | --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for row in data["rows"]:
        head = f"| {row['op']} | {row['case']} | {row['dtype']} | {row['direction']} | "
        head += f"{row['backend']}{' *' if row['auto'] else ''} | "
        if row["median_us"] is None:
            lines.append(head + f"- | {row['reason_if_skipped']} | | | | |")
            continue
        graph, ratio, peak = row["graph_us"], row["ratio_vs_best_peer"], row["peak_mb"]
        lines.append(
            head + f"{row['median_us']:.1f} | {row['p10']:.1f}-{row['p90']:.1f} | {_number(graph, '.1f')} | "
            f"{row['roofline']:.2f} | {_number(ratio, '.2f')} | {_number(peak, '.0f')} |"
        )
    return "\n".join(lines) + "\n"


def write(data: dict[str, Any], folder: Path) -> None:
    """``kernels.json``, ``kernels.md`` and ``kernels.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "kernels.md").write_text(markdown(data))
    _bars(data, folder / "kernels.png")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _bars(data: dict[str, Any], path: Path) -> None:
    """Per case, what ``auto`` takes: its time against the best peer, and the floor against its time."""
    from matplotlib.figure import Figure

    rows = [row for row in data["rows"] if row["auto"] and row["median_us"]]
    figure = Figure(figsize=(12, max(2.5, 0.28 * len(rows) + 1.5)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [f"{row['op']}: {row['case']} {row['direction']} [{row['backend']}]" for row in rows]
    places = range(len(rows))
    left.barh(places, [row["ratio_vs_best_peer"] or 0.0 for row in rows], color="#4477aa")
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("time of the best peer / time (above 1: faster)")
    right.barh(places, [row["roofline"] for row in rows], color="#228833")
    right.axvline(1.0, color="black", linewidth=0.8)
    right.set_xlabel("floor / time")
    left.set_yticks(list(places), names, fontsize=7)
    left.invert_yaxis()
    figure.suptitle(f"{data['device']}, suite {data['suite']}")
    figure.savefig(path, dpi=120)
