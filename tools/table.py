"""Makes tables from logs. A row is a folder: mean +- sample standard deviation over its random seeds.

    python tools/table.py                    # rewrites the tables in README.md and results/*.md
    python tools/table.py runs/a runs/b      # prints a table of any folders with finished runs

In a page a table stands between two comments, each on a line of its own:

    <!-- table gdfq/main fashion_w4a4 -->     a folder below results/, and rows of it; none: all, sorted
    <!-- end -->

For each seed the newest finished run counts. Its accuracies are those of the last state. The command of
a row makes it today. Where it no longer runs, the row names the commit at which it did.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
from common import need  # noqa: E402

# Figures of `end` records that stand beside the accuracies.
COST_COLUMNS = {
    "drop_pct": "drop",
    "uploads_pct": "uploads %",
    "eta_backwards_pct": "eta learns from %",
    "trainable_params_step1": "step-1 params",
    "features_s": "F s",
    "step1_train_s": "step 1 s",
    "finetune_s": "finetune s",
}
# Programs that have moved since the first logs. A log has a program's name without its folder.
MOVED = {
    r"^python (common\.py pretrain|pretrain\.py)\b": "python tools/pretrain.py",
    r"^python (gdfq-cost|cost)\.py\b": "python tools/cost.py",
}
# These flags differ between the runs of a row, or say nothing about what was run.
UNTOLD = ("--seed", "--seeds", "--out", "--resume", "--data-dir")


# ===== Logs ===========================================================================================


def read_log(file: Path) -> list[dict]:
    """The records of a log. The half line that a killed run leaves at the end is skipped.

    Raises InputError for any other line that is no record.
    """
    records = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            record = None
        good = isinstance(record, dict) and "event" in record
        need(good, f"{file}: line {number} is no record of a run")
        records.append(record)
    return records


def read_runs(folder: Path) -> list[list[dict]]:
    """Of each seed the newest finished run below a folder: its records, from `start` to `end`.

    Raises InputError if there is none, or if the runs are of different commands.
    """
    newest = {}
    for file in sorted(folder.rglob("*.jsonl")):
        run = read_log(file)
        if run and {"argv", "args", "time"} <= run[0].keys() and run[-1]["event"] == "end":
            seed = run[0]["args"].get("seed", file)
            other = newest.setdefault(seed, run)
            if run[0]["time"] >= other[0]["time"]:
                newest[seed] = run
    runs = list(newest.values())
    need(runs, f"{folder}: no .jsonl log of a finished run in it")
    # A mean over different runs would look like one over seeds.
    commands = {str(sorted(flags_of(run[0]))): run[0]["argv"] for run in runs}
    need(len(commands) == 1, f"{folder}: runs of different commands: {'; '.join(commands.values())}")
    return runs


def flags_of(start: dict) -> list[list[str]]:
    """The command of a run by its `start` record: the program, then each flag with its values."""
    flags = [[]]
    with common.door(f"{start['argv']}: not a command"):
        words = shlex.split(start["argv"])
    for word in words:
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(word)
    flags = [flag for flag in flags if flag[0].split("=")[0] not in UNTOLD]
    # For a time --recipe many-classes mixed images without a word in the command. Nothing does today.
    mixed = ["--fmix", "0.5"]
    if start["args"].get("fmix") == 0.5 and mixed not in flags:
        flags.append(mixed)
    return [flag for flag in flags if flag != ["--fmix", "0"]]


def command(start: dict) -> str:
    """What makes this run today, but for its seed; or what made it, with ` at commit ...`."""
    then = shlex.join(word for flag in flags_of(start) for word in flag)
    today = then
    for old, new in MOVED.items():
        today = re.sub(old, new, today)
    is_gdfq = today.startswith("python gdfq.py") and "--recipe paper" not in today
    if is_gdfq and start["args"] and "rounding" not in start["args"]:
        today += " --rounding nearest"  # as every run before there was this flag
    return today if runs_today(today) else f"{then} at commit {start['commit']}"


def runs_today(text: str) -> bool:
    """Whether the program of a command is there and takes its flags."""
    _, program, *argv = shlex.split(text)
    if not (common.ROOT / program).exists():
        return False
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    try:
        module.parse(argv)
    except common.InputError:
        return False
    return True


# ===== Tables =========================================================================================


def row_command(runs: list[list[dict]]) -> str:
    """The command of its runs, and their seeds where there are several."""
    text = command(runs[0][0])
    if len(runs) == 1 or " at commit " in text:
        return text
    seeds = sorted(run[0]["args"].get("seed", n) for n, run in enumerate(runs))
    return f"{text} --seeds {' '.join(map(str, seeds))}"


def mean_std(values: list[float]) -> str:
    mean = statistics.mean(values)
    std = statistics.stdev(values) if len(values) > 1 else 0
    return (f"{mean:.2f}" if mean < 1000 else f"{mean:.0f}") + (f" +- {std:.2f}" if std > 0 else "")


def time_and_place(runs: list[list[dict]]) -> str:
    """`216 s, 1 thread`: mean wall time and threads; a device that is no CPU stands between.

    Of a run that was resumed, the threads are those of its last part.
    """
    seconds = [run[-1]["wall_s"] for run in runs if "wall_s" in run[-1]]
    places = []
    for run in runs:
        start = [r for r in run if r["event"] == "start"][-1]
        device = "" if start["device"] == "cpu (x86_64)" else f"{start['device']}, "
        places.append(f"{device}{start['threads']} thread" + "s" * (start["threads"] > 1))
    place = " and ".join(dict.fromkeys(places))
    return f"{statistics.mean(seconds):.0f} s, {place}" if seconds else place


def cells(folders: list[Path]) -> list[list[str]]:
    """The heads, then a line for each folder: row, figures that any run has, seeds, time, command."""
    rows = []
    for folder in folders:
        runs = read_runs(folder)
        ends = [{k: v for k, v in run[-1].items() if v is not None} for run in runs]
        for end in ends:
            if {"acc_fp_pct", "acc_pct"} <= end.keys():
                end["drop_pct"] = end["acc_fp_pct"] - end["acc_pct"]
        rows.append((folder, runs, ends))
    # The fullest record comes first: the order of columns does not depend on the order of rows.
    records = sorted((end for *_, ends in rows for end in ends), key=len, reverse=True)
    keys = dict.fromkeys(k for end in records for k in end)
    keys = [k for k in keys if k.startswith("acc_")] + [k for k in keys if k in COST_COLUMNS]
    heads = {k: k.removeprefix("acc_").removesuffix("_pct").replace("_", " ") for k in keys}
    heads |= COST_COLUMNS | {"acc_pct": "**ours**"}
    lines = [["row", *(heads[k] for k in keys), "seeds", "time", "command"]]
    for folder, runs, ends in rows:
        values = [[end[k] for end in ends if k in end] for k in keys]
        figures = [mean_std(v) if v else "" for v in values]
        lines.append([str(folder), *figures, str(len(runs)), time_and_place(runs), row_command(runs)])
    return lines


def table(folders: list[Path], page: Path) -> str:
    """Markdown for `page`; a row's name is a link to its folder."""
    heads, *lines = cells(folders)
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for folder, (_, *figures, made_by) in zip(folders, lines):
        link = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
        words, at, commit = made_by.partition(" at commit ")
        line = [f"[{folder.name}]({link})", *figures, f"`{words}`{at}{commit}"]
        text.append("| " + " | ".join(line) + " |")
    return "\n".join(text)


def plain_table(folders: list[Path]) -> str:
    """For a terminal: a folder is a line or, if that is narrower, a column. Commands stand below."""
    heads, *lines = cells(folders)
    parent = os.path.commonpath([folder.resolve().parent for folder in folders])
    for folder, line in zip(folders, lines):
        line[0] = os.path.relpath(folder.resolve(), parent)
    rows = [[head.strip("*") for head in heads[:-1]]] + [line[:-1] for line in lines]
    printed = []
    for body in (rows, list(zip(*rows))):
        widths = [max(len(cell) for cell in column) for column in zip(*body)]
        printed.append(["  ".join(map(str.ljust, line, widths)).rstrip() for line in body])
    narrowest = min(printed, key=lambda body: max(len(line) for line in body))
    return "\n".join([*narrowest, "", *(f"{line[0]}: {line[-1]}" for line in lines)])


def with_tables(text: str, page: Path) -> str:
    """`text` with its tables made anew, for a file at `page`.

    Raises InputError for a table or row without logs, and for a table without its end.
    """
    def rewrite(match) -> str:
        name, *rows = match[1].split()
        folder = common.ROOT / "results" / name
        every = sorted({file.parent for file in folder.glob("*/*.jsonl")})
        folders = [folder / row for row in rows] or every
        need(folders, f"{page}: table {name}: no logs in {folder}/*/")
        return f"<!-- table {match[1]} -->\n{table(folders, page)}\n<!-- end -->"

    # A table ends before the next one begins, so that a lost `end` swallows nothing.
    block = r"^<!-- table (.+?) -->\n(?:(?!<!-- table ).*\n)*?<!-- end -->$"
    text, found = re.subn(block, rewrite, text, flags=re.M)
    begun = len(re.findall("^<!-- table ", text, flags=re.M))
    need(found == begun, f"{page}: a table without its line <!-- end -->")
    return text


# ===== Run ============================================================================================


def main(args: argparse.Namespace) -> None:
    if args.folders:
        print(plain_table(args.folders))
        return
    for page in (common.ROOT / "README.md", *sorted((common.ROOT / "results").glob("*.md"))):
        if page.exists():
            text = with_tables(page.read_text(encoding="utf-8"), page)
            page.write_text(text, encoding="utf-8")
            tables = len(re.findall("^<!-- table ", text, flags=re.M))
            print(f"{page.relative_to(common.ROOT)}: {tables} tables")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = common.Parser("tools/table.py", __doc__)
    p.add_argument("folders", nargs="*", type=Path, metavar="DIR",
                   help="print a row for each; none: rewrite the pages")
    return p.parse_args(argv)


if __name__ == "__main__":
    common.run(main, parse)
