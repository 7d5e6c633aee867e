"""Draws figures from logs. The script that wrote the logs decides what is drawn.

    python tools/plot.py DIR [DIR ...] --out FILE.png

    gdfq.py    accuracy against iterations and against minutes, of runs with --eval-every
    cema.py    one folder: accuracy of each method in each pass of --loop
               several folders: accuracy of CEMA against the share of uploaded images
    tdmr.py    folders of one --shots: accuracy of each method against the seconds that it takes
               folders of several --shots: accuracy against the number of labelled images per class

All runs in a folder are of one command. For each random seed the newest finished run is drawn. A bar
is one sample standard deviation. The program needs matplotlib.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import need  # noqa: E402
from tools.table import read_runs  # noqa: E402

LABELS = {"bn": "BN adapt", "tent": "Tent", "eta": "ETA", "cema": "CEMA", "kd": "KD", "fitnet": "FitNet",
          "tdmr": "TDMR", "foundation source": "f, source", "foundation": "f, adapted by CEMA"}
TOP1 = "top-1 accuracy, %"


def label(key: str) -> str:
    """acc_kd_pct -> KD"""
    name = key.removeprefix("acc_").removesuffix("_pct").replace("_", " ")
    return LABELS.get(name, name)


def accuracies(record: dict) -> list[str]:
    return [k for k in record if k.startswith("acc_") and record[k] is not None]


def curve(ax, x: list[float], y: list[list[float]], **look) -> None:
    """A line through the means of y, a list of seeds for each x, with bars of one sample std."""
    std = [statistics.stdev(values) if len(values) > 1 else 0 for values in y]
    ax.errorbar(x, [statistics.mean(values) for values in y], std, marker="o", capsize=3, **look)


# ===== One figure a script ============================================================================


def draw_gdfq(plt, runs: dict[Path, list]):
    """Accuracy against iterations and minutes: a colour per folder, a line per seed."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    fig.get_layout_engine().set(wspace=0.05)
    for k, (folder, logs) in enumerate(runs.items()):
        for log in logs:
            evals = [r for r in log if r["event"] == "eval" and {"acc_pct", "wall_s"} <= r.keys()]
            acc = [r["acc_pct"] for r in evals]
            look = dict(marker="o", ms=4, color=f"C{k}", alpha=0.8)
            axes[0].plot([r["iteration"] for r in evals], acc, **look)
            axes[1].plot([r["wall_s"] / 60 for r in evals], acc, **look)
        axes[0].plot([], [], marker="o", ms=4, color=f"C{k}", label=f"{folder.name}, seeds: {len(logs)}")
    for ax in axes:
        for fp in {log[-1]["acc_fp_pct"] for logs in runs.values() for log in logs}:
            ax.axhline(fp, color="grey", ls="--", lw=1)
            ax.text(0.98, fp, f"full precision, {fp:.2f} %", color="grey", ha="right", va="bottom",
                    transform=ax.get_yaxis_transform())
        ax.margins(y=0.1)
    axes[0].set(xlabel="iterations", ylabel=TOP1)
    axes[1].set(xlabel="minutes", ylabel=TOP1)
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def draw_cema(plt, runs: dict[Path, list]):
    fig, ax = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    if len(runs) == 1:
        draw_passes(ax, *runs.items())
    else:
        draw_uploads(ax, runs)
    return fig


def draw_passes(ax, run: tuple[Path, list]) -> None:
    folder, logs = run
    evals = [[r for r in log if r["event"] == "eval"] for log in logs]
    need(evals[0], f"{folder}: no eval record in its logs")
    n = len({r["domain"] for r in evals[0]})  # a pass visits each domain once
    starts = range(0, len(evals[0]), n)
    for key in accuracies(evals[0][0]):
        y = [[statistics.mean(r[key] for r in visits[i:i + n]) for visits in evals] for i in starts]
        curve(ax, range(1, len(y) + 1), y, label=label(key))
    ax.set(xlabel="pass over the stream", ylabel=TOP1, xticks=range(1, len(starts) + 1))


def draw_uploads(ax, runs: dict[Path, list]) -> None:
    """A line for each --select, a point for each folder."""
    points = {}
    for folder, logs in runs.items():
        ends = [log[-1] for log in logs]
        uploaded = all({"uploads_pct", "acc_cema_pct"} <= end.keys() for end in ends)
        need(uploaded, f"{folder}: no uploads in its logs (--methods without cema)")
        uploads = statistics.mean(end["uploads_pct"] for end in ends)
        line = points.setdefault(logs[0][0]["args"]["select"], [])
        line.append((uploads, [end["acc_cema_pct"] for end in ends]))
    for select, line in points.items():
        x, y = zip(*sorted(line))
        curve(ax, x, y, label=f"--select {select}")
    ax.set(xlabel="images uploaded, % of the stream", ylabel=f"CEMA, {TOP1}")


def draw_tdmr(plt, runs: dict[Path, list]):
    fig, ax = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
    if len({logs[0][0]["args"]["shots"] for logs in runs.values()}) == 1:
        draw_seconds(ax, runs)
    else:
        draw_shots(ax, runs)
    return fig


def draw_seconds(ax, runs: dict[Path, list]) -> None:
    """A line for each method, a point for each folder. Seconds are those of step 1 and step 2."""
    points = {}
    for logs in runs.values():
        evals = [r for log in logs for r in log if r["event"] == "eval" and "step2_s" in r]
        for method in dict.fromkeys(r["method"] for r in evals):
            mine = [r for r in evals if r["method"] == method]
            seconds = statistics.mean(r["step1_s"] + r["step2_s"] for r in mine)
            points.setdefault(method, []).append((seconds, [r["acc_pct"] for r in mine]))
    for method, line in points.items():
        x, y = zip(*sorted(line))
        curve(ax, x, y, label=label(method.replace("-", "_")))
    ax.set(xlabel="seconds per seed", ylabel=TOP1, xlim=(0, None))


def draw_shots(ax, runs: dict[Path, list]) -> None:
    """A line for each method that all logs have; teachers are dashed."""
    points = {}
    for folder, logs in runs.items():
        shots = logs[0][0]["args"]["shots"]
        need(shots not in points, f"{folder}: a second folder with --shots {shots}; draw them apart")
        points[shots] = [log[-1] for log in logs]
    shots = sorted(points)
    ends = [end for s in shots for end in points[s]]
    for key in accuracies(ends[0]):
        if all(end.get(key) is not None for end in ends):
            look = dict(ls="-", label=label(key))
            if key in ("acc_probe_pct", "acc_proxy_pct"):
                look = dict(ls="--", label=f"{label(key)} (teacher)")
            curve(ax, shots, [[end[key] for end in points[s]] for s in shots], **look)
    ax.set(xlabel="labelled images per class", ylabel=TOP1, xscale="log")
    ax.set_xticks(shots, [str(s) for s in shots])
    ax.minorticks_off()


# ===== Run ============================================================================================

DRAW = {"gdfq.py": draw_gdfq, "cema.py": draw_cema, "tdmr.py": draw_tdmr}


def main(args: argparse.Namespace) -> None:
    runs = {folder: read_runs(folder) for folder in args.folders}
    script, *others = sorted({logs[0][0]["argv"].split()[1] for logs in runs.values()})
    need(not others, f"logs of {script} and {' and '.join(others)}: give the folders of one script")
    need(script in DRAW, f"{args.folders[0]}: logs of {script}; drawn are {', '.join(DRAW)}")
    file = args.out or Path(f"{args.folders[0]}.png")
    good = file.suffix in (".png", ".pdf", ".svg")
    need(good, f"--out {file}: expected a name that ends in .png, .pdf or .svg")
    with common.door("figures need matplotlib: pip install matplotlib"):
        import matplotlib
        matplotlib.use("Agg")  # no window
        import matplotlib.pyplot as plt
    plt.rcParams["font.size"] = 11
    fig = DRAW[script](plt, runs)
    for ax in fig.axes:
        ax.grid(alpha=0.3)
    if script != "gdfq.py":
        fig.legend(loc="outside right center")
    fig.savefig(file, dpi=110)
    print(file)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = common.Parser("tools/plot.py", __doc__)
    p.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a folder of finished runs")
    p.add_argument("--out", type=Path, metavar="FILE", help="the picture; default: <first folder>.png")
    return p.parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
