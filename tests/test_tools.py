"""Claims about the pages in results/, and about tools/table.py, plot.py, cost.py and sweep.py.

Each docstring ends with the change under which the test was seen to fail.
"""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

import common
import gdfq
from tools import cost, plot, sweep, table

RESULTS = common.ROOT / "results"
PAGES = [common.ROOT / "README.md", *sorted(RESULTS.glob("*.md"))]
PAGES.remove(RESULTS / "sweep.md")  # tools/sweep.py writes all of it
PAGES.remove(RESULTS / "scale.md")  # times, and arithmetic: no row of it is an accuracy
MATPLOTLIB = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib here")


def write_log(file: Path, argv: str = "", accs: tuple = (50.0,), seed: int = 0, day: int = 1) -> Path:
    """A finished run of gdfq.py: the accuracies in order, the last one in its `end` record."""
    start = dict(event="start", argv=f"python gdfq.py{argv}", args={"seed": seed, "rounding": "squant"},
                 commit="abc1234", device="cpu (x86_64)", threads=1, time=f"2026-01-0{day} 00:00:00")
    evals = [dict(event="eval", acc_pct=a) for a in accs]
    end = dict(event="end", acc_fp_pct=90.0, acc_pct=accs[-1], wall_s=60.0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in (start, *evals, end)))
    return file


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))


# ----- pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_tables_of_a_page_are_those_of_the_logs(page):
    """Fails if a digit of a table is edited by hand, or if a page in results/ has no table."""
    text = page.read_text(encoding="utf-8")
    assert table.with_tables(text, page) == text, "run: python tools/table.py"
    assert page.parent == common.ROOT or "<!-- table " in text


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_links_and_pictures_of_a_results_page_exist(page):
    """Fails if a linked log folder or picture is renamed."""
    links = links_of(page)
    assert links
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_every_committed_log_is_in_a_table_or_linked():
    """Negative results stay. Fails if a row is left out of a table that names its rows."""
    linked = {(p.parent / link).resolve() for p in RESULTS.glob("*.md") for link in links_of(p)}
    assert not {file.parent for file in RESULTS.rglob("*.jsonl")} - linked


def test_a_table_without_its_end_swallows_nothing(tmp_path):
    """Fails if a table may reach to the end of the next one."""
    text = "<!-- table pretrain -->\nkeep\n<!-- table pretrain -->\n<!-- end -->\n"
    with pytest.raises(common.InputError, match="without its line"):
        table.with_tables(text, tmp_path / "page.md")


# ----- rows ------------------------------------------------------------------------------------------


def test_a_row_is_mean_and_sample_std_of_the_last_states(tmp_path):
    """Each seed ends below its best. Fails if the best is taken, or the standard deviation of the
    population, or if the command makes one seed alone."""
    for seed, acc in enumerate((50.0, 60.0, 70.0)):
        write_log(tmp_path / "row" / f"seed{seed}.jsonl", f" --seed {seed}", (80.0, acc), seed)
    row = table.table([tmp_path / "row"], tmp_path / "page.md").splitlines()[-1]
    figures = "90.00 | 60.00 +- 10.00 | 30.00 +- 10.00"  # fp, ours, drop
    assert row == f"| [row](row) | {figures} | 3 | 60 s, 1 thread | `python gdfq.py --seeds 0 1 2` |"


def test_of_each_seed_the_newest_finished_run_counts(tmp_path):
    """Seed 0 was run three times; the last time is not through. Seed 1 ran at the same time as another.

    Fails if the first or the unfinished run counts, or if a seed counts twice.
    """
    write_log(tmp_path / "seed0-2" / "log.jsonl", " --out 'my runs'", (70.0,), day=2)
    write_log(tmp_path / "seed0" / "log.jsonl", accs=(50.0,), day=1)
    write_log(tmp_path / "seed1" / "log.jsonl", " --seed 0 1", (60.0,), seed=1, day=1)
    file = write_log(tmp_path / "seed0-3" / "log.jsonl", " --lr 0.1", (10.0,), day=3)
    file.write_text("".join(file.read_text().splitlines(True)[:-1]) + '{"event": "e')
    runs = table.read_runs(tmp_path)
    assert [run[-1]["acc_pct"] for run in runs] == [70.0, 60.0]
    assert table.row_command(runs) == "python gdfq.py --seeds 0 1"


@pytest.mark.parametrize("then, args, today", [
    ("gdfq.py --wbits 3 --seed 1 --out a --resume --data-dir /d", {}, "gdfq.py --wbits 3"),
    ("cema.py --seed-images 64 --seed=0", {}, "cema.py --seed-images 64"),
    ("tdmr.py --seeds 0 1 2 --out 'runs of/b'", {}, "tdmr.py"),
    ("common.py pretrain --arch resnet20 --resume", {}, "tools/pretrain.py --arch resnet20"),
    ("gdfq-cost.py --out results/gdfq-cost", {}, "tools/cost.py"),
    ("cema.py --bn edge --seed 2", {}, "cema.py --bn edge at commit abc1234"),
    ("tdmr.py --proxy mlp", {}, "tdmr.py --proxy mlp at commit abc1234"),
    ("gdfq_bc.py", {}, "gdfq_bc.py at commit abc1234"),
    ("cema.py --bn ema", {"lam": 1}, "cema.py --bn ema"),
    ("gdfq.py", {"wbits": 4}, "gdfq.py --rounding nearest"),
    ("gdfq.py --recipe paper", {"wbits": 4}, "gdfq.py --recipe paper"),
    ("gdfq.py", {"rounding": "squant"}, "gdfq.py"),
    ("gdfq.py --recipe many-classes", {"rounding": "squant", "fmix": 0.5},
     "gdfq.py --recipe many-classes --fmix 0.5 at commit abc1234"),
    ("gdfq.py --fmix 0 --wbits 3", {"rounding": "squant", "fmix": 0.0}, "gdfq.py --wbits 3"),
])
def test_a_row_has_the_command_that_makes_it_today(then, args, today):
    """Fails if a program that moved keeps its old name, if a flag that is gone has no commit, or if the
    command leaves out what a run had before a default changed."""
    start = {"argv": f"python {then}", "args": args, "commit": "abc1234"}
    assert table.command(start) == f"python {today}"


@pytest.mark.parametrize("a, b, says", [
    (" --wbits 3 --epochs 9", " --epochs 9", "different commands"),  # a mean over different runs
    ('{"event": "st\n', "", "line 1"),
    ("5\n", "", "line 1"),
    (None, None, "no .jsonl log"),
])
def test_a_folder_that_makes_no_row_is_one_line(a, b, says, tmp_path, fails):
    """Fails if the mean is taken nevertheless, or if a broken line before the last one is skipped."""
    if b:
        write_log(tmp_path / "a.jsonl", a)
        write_log(tmp_path / "b.jsonl", b, seed=1)
    elif a:
        file = write_log(tmp_path / "log.jsonl")
        file.write_text(a + file.read_text())
    assert says in fails(table, str(tmp_path))


@pytest.mark.parametrize("folders", ["tdmr/older/few-shots", "cema/ablation/*"])
def test_many_figures_and_many_folders_both_print_in_100_columns(folders, capsys):
    """16 figures, 16 folders. Fails if a line is always a folder, or always a figure."""
    paths = sorted(RESULTS.glob(folders))
    table.main(table.parse([str(p) for p in paths]))
    printed, commands = capsys.readouterr().out.strip().split("\n\n")
    assert max(map(len, printed.splitlines())) <= 100
    assert all(p.name in printed and f"{p.name}: python " in commands for p in paths)


# ----- figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders, says", [
    ("gdfq/main/fashion_w4a4 cema/loop/default", "one script"),
    ("gdfq/nothing", "no .jsonl log"),
    ("gdfq/trials/unfinished-cifar100", "finished"),
    ("pretrain/fashion_resnet20", "common.py"),
    pytest.param("tdmr/older/100 tdmr/older/100-mlp tdmr/older/20", "--shots 100", marks=MATPLOTLIB),
    pytest.param("cema/order/mixed cema/tuning/1500-tent1e-3", "uploads", marks=MATPLOTLIB),
])
def test_plot_refuses_folders_that_make_no_figure(folders, says, tmp_path, fails):
    """Fails if one of these ends in a traceback or in a picture."""
    paths = " ".join(str(RESULTS / f) for f in folders.split())
    assert says in fails(plot, f"{paths} --out {tmp_path}/a.png")
    assert not list(tmp_path.iterdir())


@MATPLOTLIB
@pytest.mark.parametrize("folders", [
    "gdfq/main/fashion_w4a4 gdfq/main/cifar100_w4a4_real",
    "cema/loop/default",
    "cema/budget/entropy-0.5 cema/budget/random-0.5",
    "tdmr/older/5 tdmr/older/20",
    "tdmr/main/unlabelled",
])
def test_plot_draws_a_picture_of_finished_logs(folders, tmp_path):
    """Fails if a script's logs lack a key that its figure reads."""
    paths = [str(RESULTS / f) for f in folders.split()]
    plot.main(plot.parse([*paths, "--out", str(tmp_path / "a.png")]))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_one_line(monkeypatch, tmp_path, fails):
    """Fails if the ImportError reaches the user."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = RESULTS / "cema" / "loop" / "default"
    assert "pip install matplotlib" in fails(plot, f"{folder} --out {tmp_path}/a.png")


# ----- measurements ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, key", [
    ("--iterations 1", "ratio"), ("loader --images 8 --arch shufflenet_v2_x0_5", "img_per_s_net")])
def test_cost_logs_what_it_measured(flags, key, tmp_path, monkeypatch):
    """A small iteration, and few files. Fails if gdfq.py or common.py changes a name that it needs."""
    fused = common.fake_quant
    small = dict(batch_size=4, g_width=4, calibration_batches=1)
    monkeypatch.setattr(gdfq, "PAPER", gdfq.PAPER | small)
    monkeypatch.setattr(common.Workers, "count", None)
    cost.main(cost.parse([*flags.split(), "--out", str(tmp_path)]))
    start, *_, end = table.read_log(tmp_path / "log.jsonl")
    assert start["event"] == "start" and end[key] > 0 and common.fake_quant is fused


def test_sweep_says_what_the_scripts_make_of_a_network():
    """Fails if a script no longer takes it, or if --max-params is not read."""
    assert sweep.row("shufflenet_v2_x0_5", 1) is None
    cells = sweep.row("shufflenet_v2_x0_5", 100)
    assert cells[:3] == ["shufflenet_v2_x0_5", "1.4", "57 of 57"] and cells[5:7] == ["exact", "same"]
    assert int(cells[7]) > 1
