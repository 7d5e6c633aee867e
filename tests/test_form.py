"""Claims about the form: what a reader is promised of every file. Each docstring ends with what makes it fail."""

import ast
import importlib
import re

import pytest

from common import ROOT

SCRIPTS = ["gdfq.py", "cema.py", "tdmr.py"]
CODE = [*SCRIPTS, "common.py", *(f"tools/{p.name}" for p in sorted((ROOT / "tools").glob("*.py")))]
SECTIONS = ["Hyperparameters", "Equations", "Model surgery", "Method", "Evaluation and figures", "Run"]


def functions(file: str) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_name_in_the_readmes_paper_tables_is_in_its_file(script):
    """`Edge.choose`, `entropy` of common.py. Fails if a function is renamed and the README is not."""
    readme = (ROOT / "README.md").read_text()
    chapter = re.search(rf"^## {script}.*?(?=^## )", readme, re.S | re.M)[0]
    rows = re.findall(r"^\| [^|]+ \| (.*`.*) \|$", chapter.split("    python")[0], re.M)
    assert len(rows) >= 3
    for cell in rows:
        for part in re.split(r",\s*(?:and )?", cell):
            name = re.search(r"`([\w.]+)`", part)[1]
            found = importlib.import_module("common" if "common.py" in part else script[:-3])
            for attribute in name.split("."):
                assert hasattr(found, attribute), f"{name} is not in {found.__name__}"
                found = getattr(found, attribute)


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_scripts_have_the_same_sections_in_the_same_order(script):
    """Fails if one is missing, renamed or moved."""
    found = re.findall(r"^# =====\s+(.+?) =+$", (ROOT / script).read_text(), re.M)
    assert found == SECTIONS


@pytest.mark.parametrize("file", CODE)
def test_code_is_narrow_and_its_functions_are_short(file):
    """105 columns, 80 lines but for build_parser, 8 parameters of a constructor. Fails if one grows."""
    lines = (ROOT / file).read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 105] == []
    for f in functions(file):
        assert f.name == "build_parser" or f.end_lineno - f.lineno < 80, f.name
        assert f.name != "__init__" or len(f.args.args) + len(f.args.kwonlyargs) <= 9, f"line {f.lineno}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_worth_changing_say_what_came_of_it(script):
    """Three ABLATE lines or more, each followed by a figure or by "not measured", and 40 full-line comments. Fails without."""
    source = (ROOT / script).read_text()
    comments = re.findall(r"(?:^ *#.*\n)+", source, re.M)
    ablate = [block for block in comments if "ABLATE" in block]
    assert len(ablate) >= 3 and all(re.search(r"\d\d\.\d\d|measured", block) for block in ablate)
    assert sum(block.count("\n") for block in comments) >= 40


def test_the_readme_is_two_screens_a_script():
    """200 lines and 14 kB. Fails if tables move back."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14_000


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read_and_documented(script):
    """As hp.name or args.name, by scripts or streams. Fails if a flag is added and forgotten."""
    module = importlib.import_module(script[:-3])
    source = "".join((ROOT / f).read_text() for f in (script, "common.py", "tools/streams.py"))
    for action in module.build_parser()._actions:
        if action.dest != "help":
            assert action.help and len(action.help) > 5, action.dest
            assert re.search(rf"(hp|args)\.{action.dest}\b|\"{action.dest}\"", source), action.dest
