"""Claims about tools/table.py, tools/plot.py and the pages in results/.

Each docstring ends with the change under which the test was seen to fail.
"""

import json
import re
from pathlib import Path

import pytest

import common
from tools import plot, table

PAGES = [common.ROOT / "README.md", *sorted((common.ROOT / "results").glob("*.md"))]
PAGES.remove(common.ROOT / "results" / "sweep.md")  # tools/sweep.py writes all of it
PAGES.remove(common.ROOT / "results" / "scale.md")  # times, and arithmetic: no row of it is an accuracy


def write_log(file: Path, argv: str = "python gdfq.py", accs: tuple = (50.0,), tail: str = "") -> None:
    """A finished run: the accuracies in order, the last one in its `end` record."""
    start = dict(event="start", argv=argv, args={}, commit="abc1234", device="cpu (x86_64)", threads=1)
    evals = [dict(event="eval", acc_pct=a) for a in accs]
    end = dict(event="end", acc_fp_pct=90.0, acc_pct=accs[-1], wall_s=60.0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r) + "\n" for r in (start, *evals, end)) + tail)


# ----- pages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_tables_of_a_page_are_those_of_the_logs(page):
    """Fails if a digit of a table is edited by hand, or if a page in results/ has no table."""
    text = page.read_text(encoding="utf-8")
    assert table.with_tables(text, page) == text, "run: python tools/table.py"
    assert page.parent == common.ROOT or "<!-- table " in text


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda p: p.name)
def test_links_and_pictures_of_a_results_page_exist(page):
    """Fails if a linked log folder or picture is renamed."""
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_committed_log_is_in_a_table_or_linked():
    """Negative results stay. Fails if a row is left out of a table that names its rows."""
    results = common.ROOT / "results"
    linked = {(p.parent / link).resolve() for p in results.glob("*.md")
              for link in re.findall(r"\]\(([^)]+)\)", p.read_text(encoding="utf-8"))}
    assert not {file.parent for file in results.rglob("*.jsonl")} - linked


def test_a_table_without_its_end_swallows_nothing(tmp_path):
    """Fails if a table may reach to the end of the next one."""
    text = "<!-- table pretrain -->\nkeep\n<!-- table pretrain -->\n<!-- end -->\n"
    with pytest.raises(common.InputError, match="without its line"):
        table.with_tables(text, tmp_path / "page.md")


# ----- rows --------------------------------------------------------------------------------------------


def test_a_row_is_mean_and_sample_std_of_the_last_states(tmp_path):
    """Each seed ends below its best. Fails if the best is taken, or the population's std, or if the command
    makes one seed alone.
    """
    for seed, acc in enumerate((50.0, 60.0, 70.0)):
        write_log(tmp_path / "row" / f"seed{seed}.jsonl", f"python gdfq.py --seed {seed}", (80.0, acc))
    row = table.table([tmp_path / "row"], tmp_path / "page.md").splitlines()[-1]
    figures = "90.00 | 60.00 +- 10.00 | 30.00 +- 10.00"  # fp, ours, drop
    assert row == f"| [row](row) | {figures} | 3 | 60 s, 1 thread | `python gdfq.py --seeds 0 1 2` |"


@pytest.mark.parametrize("old, today", [
    ("python gdfq.py --wbits 3 --seed 1 --out a --resume --data-dir /d", "python gdfq.py --wbits 3"),
    ("python cema.py --seed-images 64 --seed 0", "python cema.py --seed-images 64"),
    ("python tdmr.py --seeds 0 1 2 --out runs/b", "python tdmr.py"),
    ("python common.py pretrain --arch resnet20 --resume", "python tools/pretrain.py --arch resnet20"),
    ("python gdfq-cost.py --out results/gdfq-cost", "python tools/cost.py"),
    ("python cema.py --bn edge --seed 2", "python cema.py --bn edge at commit abc1234"),
    ("python cema.py --edges 4", "python cema.py --edges 4 at commit abc1234"),
    ("python tdmr.py --proxy mlp", "python tdmr.py --proxy mlp at commit abc1234"),
    ("python cema.py --bn ema", "python cema.py --bn ema"),
])
def test_a_row_has_the_command_that_makes_it_today(old, today):
    """Fails if a program that moved keeps its old name, or a flag that is gone has no commit."""
    assert table.command({"argv": old, "commit": "abc1234"}) == today


@pytest.mark.parametrize("argv, args, today", [
    ("gdfq.py", {"wbits": 4}, "gdfq.py --rounding nearest"), ("cema.py", {"lam": 1}, "cema.py"),
    ("gdfq.py --recipe paper", {"wbits": 4}, "gdfq.py --recipe paper"),
    ("gdfq.py", {"rounding": "squant"}, "gdfq.py"),
    ("gdfq.py --recipe many-classes", {"rounding": "squant", "fmix": 0.5},
     "gdfq.py --recipe many-classes --fmix 0.5"),
    ("gdfq.py --fmix 0.5", {"rounding": "squant", "fmix": 0.5}, "gdfq.py --fmix 0.5"),
    ("gdfq.py --fmix 0 --wbits 3", {"rounding": "squant", "fmix": 0.0}, "gdfq.py --wbits 3"),
])
def test_a_run_from_before_a_default_changed_names_what_it_had(argv, args, today):
    """Fails if the table's command makes another row today."""
    start = {"argv": f"python {argv}", "commit": "abc1234", "args": args}
    assert table.command(start) == f"python {today}"


def test_a_half_last_line_is_skipped_and_a_broken_one_before_it_is_not(tmp_path, fails):
    """A killed run leaves one. Fails if it is an error, or if any broken line is skipped."""
    file = tmp_path / "row" / "log.jsonl"
    write_log(file, tail='{"event": "st')
    assert [r["event"] for r in table.read_log(file)] == ["start", "eval", "end"]
    file.write_text('{"event": "st\n' + file.read_text())
    assert "line 1" in fails(table, str(file.parent))


def test_runs_of_different_commands_are_not_averaged(tmp_path, fails):
    """Fails if a folder above two rows gives the mean of both."""
    write_log(tmp_path / "a" / "log.jsonl")
    write_log(tmp_path / "b" / "log.jsonl", "python gdfq.py --wbits 3")
    assert "different commands" in fails(table, str(tmp_path))


def test_a_seed_counts_once(tmp_path, fails):
    """Fails if a run and its repetition in a folder below are two seeds of a mean."""
    for file in (tmp_path / "log.jsonl", tmp_path / "seed3" / "log.jsonl"):
        write_log(file)
        file.write_text(file.read_text().replace('"args": {}', '"args": {"seed": 3}'))
    assert "two runs of seed 3" in fails(table, str(tmp_path))


@pytest.mark.parametrize("folders", ["tdmr/older/few-shots", "cema/ablation/*"])
def test_many_figures_and_many_folders_both_print_in_100_columns(folders, capsys):
    """16 figures, 16 folders. Fails if a line is always a folder, or always a figure."""
    paths = sorted(common.ROOT.glob(f"results/{folders}"))
    table.main(table.parse([str(p) for p in paths]))
    printed, commands = capsys.readouterr().out.strip().split("\n\n")
    assert max(map(len, printed.splitlines())) <= 100
    assert all(p.name in printed and f"{p.name}: python " in commands for p in paths)


# ----- figures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folders, what", [
    ("gdfq/main/fashion_w4a4 cema/loop/default", "one script"),
    ("gdfq/nothing", "no .jsonl log"),
    ("gdfq/trials/unfinished-cifar100", "finished"),
    ("pretrain/fashion_resnet20", "common.py"),
    ("tdmr/older/100 tdmr/older/100-mlp tdmr/older/20", "--shots 100"),
    ("cema/order/mixed cema/tuning/1500-tent1e-3", "uploads"),
])
def test_plot_refuses_folders_that_make_no_figure(folders, what, tmp_path, fails):
    """Fails if one of these ends in a traceback or in a picture."""
    pytest.importorskip("matplotlib")
    paths = " ".join(str(common.ROOT / "results" / f) for f in folders.split())
    assert what in fails(plot, f"{paths} --out {tmp_path}/a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folders", [
    "gdfq/main/fashion_w4a4 gdfq/main/cifar100_w4a4_real",
    "cema/loop/default",
    "cema/budget/entropy-0.5 cema/budget/random-0.5",
    "tdmr/older/5 tdmr/older/20",
    "tdmr/main/unlabelled",
])
def test_plot_draws_a_picture_of_finished_logs(folders, tmp_path):
    """Fails if a script's logs lack a key that its figure reads."""
    pytest.importorskip("matplotlib")
    paths = [str(common.ROOT / "results" / f) for f in folders.split()]
    plot.main(plot.parse([*paths, "--out", str(tmp_path / "a.png")]))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
