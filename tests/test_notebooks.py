"""The notebooks execute, are what their sources say, and name things that exist."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
IDS = [source.stem for source in SOURCES]
FRONT_PAGE = ROOT / "notebooks" / "00_the_method_on_one_page.py"       # no numbers of its own
COURSE = [source for source in SOURCES if source != FRONT_PAGE]
PAGES = {source.name[:2]: source.read_text() for source in COURSE}
SCRIPTS = ["model.py", "pretrain.py", "finetune.py", "certify.py"]
SCRIPTS += sorted(f"extras/{file.name}" for file in (ROOT / "extras").glob("*.py"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_the_front_page_and_the_seven_of_the_course():
    assert [source.name[:2] for source in SOURCES] == [f"0{number}" for number in range(8)]
    assert [*PAGES] == [f"0{number}" for number in range(1, 8)]


@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_the_pair_is_in_sync(source):
    script, notebook = ([(cell.cell_type, cell.source) for cell in jupytext.read(file).cells]
                        for file in (source, source.with_suffix(".ipynb")))
    assert script == notebook


@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_no_first_line_of_prose_is_lost_in_a_title(source):
    """`# %% [markdown] TEXT` would put TEXT into the cell's metadata, where nobody reads it."""
    assert not re.search(r"^# %% \[markdown\] \S", source.read_text(), re.MULTILINE)
    for cell in json.loads(source.with_suffix(".ipynb").read_text())["cells"]:
        assert not cell["metadata"].keys() & {"title", "incorrectly_encoded_metadata"}


@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_the_committed_notebook_was_executed_and_shows_nothing_of_the_machine(source):
    file = source.with_suffix(".ipynb")
    notebook = json.loads(file.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert file.stat().st_size < 2**20
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    pictures = [output["data"].pop("image/png", None) for output in outputs if "data" in output]
    assert len([picture for picture in pictures if picture]) >= 2
    sources = [cell["source"] for cell in notebook["cells"]]
    text = json.dumps([sources, outputs, notebook["metadata"]])
    assert not re.search(r"Warning|/root/|/home/|/work/|/Users/|/tmp/", text)


@pytest.mark.parametrize("source", COURSE, ids=IDS[1:])
def test_the_code_that_the_committed_notebook_shows_is_that_of_the_scripts(source):
    shown = []
    for cell in json.loads(source.with_suffix(".ipynb").read_text())["cells"]:
        outputs = [output.get("data", {}) for output in cell.get("outputs", ())]
        shown += ["".join(data["text/plain"]) for data in outputs if "text/html" in data]
    others = ["notebooks/two_processes.py", "results/digits/compare.py"]
    scripts = [(ROOT / file).read_text() for file in [*SCRIPTS, *others]]
    assert shown
    for text in shown:
        assert any(text in script for script in scripts), f"execute it again: {text[:60]}"


def execute(source, out):
    """Execute a source as if it stood in notebooks/, into the notebook `out`."""
    folder = ROOT / "notebooks"
    how = ["--to", "ipynb", "--run-path", folder, "--execute", "--output", out]
    done = subprocess.run(
        [sys.executable, "-m", "jupytext", *how, source],
        capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(cell.execution_count for cell in code_cells(jupytext.read(out)))


CHANGES = [                       # (page, its text, what a reader may make of it)
    ("01", "sigma, step = 0.35, 0.01\nline", "sigma, step = 0.25, 0.01\nline"),
    ("01", "DRAWS = 2000", "DRAWS = 5000"),
    ("02", "index, sigma, alpha = 3, 0.25, 0.001", "index, sigma, alpha = 10, 0.5, 0.01"),
    ("03", "SPREAD = 0.7 ", "SPREAD = 0.5 "),
    ("04", "DRAWS = 50", "DRAWS = 30"),
    ("05", "index = 3  ", "index = 174  "),
    ("06", "RIVALS, ASKED = 5, 2", "RIVALS, ASKED = 3, 2"),
    ("07", "sequential\n\nalpha = 0.001", "sequential\n\nalpha = 0.01"),
]


@pytest.mark.parametrize("page, old, new", CHANGES)
def test_the_changed_parameters_are_there(page, old, new):
    assert PAGES[page].count(old) == 1 and old != new


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_the_notebook_executes_also_with_a_parameter_changed(source, tmp_path):
    """Its assertions hold; two at a time, for there is time for all of them but not in turn."""
    assertions = r"^\s*assert |assert_allclose|assert_close"
    sources = [cell.source for cell in code_cells(jupytext.read(source))]
    least = 1 if source == FRONT_PAGE else 5
    assert len(re.findall(assertions, "\n".join(sources), re.MULTILINE)) >= least

    pages = [source]
    for page, old, new in CHANGES:
        if source.name.startswith(page):
            pages.append(tmp_path / f"changed{len(pages)}.py")
            pages[-1].write_text(PAGES[page].replace(old, new))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(execute, page, tmp_path / f"{page.stem}.ipynb") for page in pages]
    for job in jobs:
        job.result()


# The front page: the whole method without our files, and links to where each step is explained.


def test_the_front_page_imports_none_of_our_files():
    imported = set()
    for node in ast.walk(ast.parse(FRONT_PAGE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported == {"math", "matplotlib", "scipy", "sklearn", "torch"}


def test_the_links_of_the_front_page_lead_to_what_they_name():
    cells = [cell for cell in jupytext.read(FRONT_PAGE).cells if cell.cell_type == "markdown"]
    text = " ".join(" ".join(cell.source for cell in cells).split())
    equations = re.findall(r"\[(\d\d, )?\((\d+\.\d+)\)\]\((\d\d)(\w+)\.ipynb\)", text)
    functions = re.findall(r"\[`(\w+\.py):([\w.]+)`\]\(\.\./(\w+\.py)\)", text)
    others = re.findall(r"\[[^]]*\]\(([\w./]+)\)", text)

    assert len(equations) >= 20 and len(functions) >= 15
    for said, number, notebook, name in equations:
        assert said in ("", f"{notebook}, ") and number in numbers_in(notebook), number
        assert (ROOT / "notebooks" / f"{notebook}{name}.py").exists()
    for file, name, target in functions:
        assert file == target and (file, name) in docstrings(), f"{file}:{name}"
    for target in others:
        assert (ROOT / "notebooks" / target).exists(), target


# The short path, and the shared parts of README.md.

SHORT_PATH = ["1.2", "1.4", "1.5", "1.6", "1.8", "2.1", "2.2", "2.4", "2.7"]
SKIPPED = "*Not on the short path.*"


def prose_of(notebook):
    cells = jupytext.reads(PAGES[notebook], "py:percent").cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_what_the_short_path_skips_is_marked():
    kept = []
    for notebook in ("01", "02"):
        sections = re.split(r"^## ", prose_of(notebook), flags=re.MULTILINE)[1:]
        kept += [text.split()[0] for text in sections if text.split("\n\n")[1] != SKIPPED]
    assert kept == SHORT_PATH
    for notebook in ("03", "04", "05", "06", "07"):
        introduction, *_ = re.split(r"^## ", prose_of(notebook), flags=re.MULTILINE)
        assert SKIPPED in introduction


def test_the_contents_link_to_the_sections_of_the_short_path():
    text = (ROOT / "notebooks" / "README.md").read_text()
    links = re.findall(r"\[(\d\.\d+)\]\((\d\d)\w+\.ipynb#([^)]*)\)", text)
    assert [number for number, _, _ in links] == SHORT_PATH
    for number, notebook, anchor in links:
        assert anchor.startswith(f"{number}-")                 # as Jupyter makes anchors
        assert f"## {anchor.replace('-', ' ')}\n" in prose_of(notebook).replace("-", " ")


def test_pages_that_are_linked_are_there():
    for page in [*SOURCES, ROOT / "notebooks" / "README.md"]:
        for target in re.findall(r"\]\(([\w./]+\.(?:ipynb|py|md))[#)]", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


# The numbers of the equations: in the notebooks, in the map of README.md, in the docstrings.


class Row(NamedTuple):
    """A row of the map."""

    numbers: list                                              # ["2.2", "2.3"], or none
    functions: list                                            # [("certify.py", "predict"), ...]
    code: str
    notebook: str


def the_map():
    for line in (ROOT / "notebooks" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4 and cells[3] in PAGES:
            leading = re.match(r"((\(\d+\.\d+\)(, )?)*)", cells[0])[0]
            functions = re.findall(r"`([\w/]+\.py):([\w.]+)`", cells[2])
            yield Row(re.findall(r"\d+\.\d+", leading), functions, *cells[2:])


def docstrings():
    """{(file, name): docstring} of the functions and classes of the scripts and extras."""
    found = {}

    def visit(node, file, name):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                place = (file, f"{name}{child.name}")
                found[place] = " ".join((ast.get_docstring(child) or "").split())
                visit(child, file, f"{place[1]}.")

    for file in SCRIPTS:
        visit(ast.parse((ROOT / file).read_text()), file, "")
    return found


def numbers_of(docstring):
    """(notebook, numbers) that a docstring names: "notebook 02, (2.11), (2.12)"; None if none."""
    named = re.search(r"notebook (\d\d), ((?:\(\d+\.\d+\)(?:, )?)+)", docstring)
    return named and (named[1], re.findall(r"\d+\.\d+", named[2]))


def numbers_in(notebook):
    return re.findall(r"\\tag\{([\d.]+)\}", PAGES[notebook])


def is_mentioned(file, name, notebook):
    """Called, or quoted, or with its file's name: predict(, `certify.predict`, certify.predict."""
    last, stem = name.split(".")[-1], Path(file).stem
    mention = rf"\b{last}\(|`([\w.]+\.)?{last}`|\b{stem}\.{re.escape(name)}\b"
    return re.search(mention, PAGES[notebook])


def test_a_number_stands_once_in_the_notebook_that_it_begins_with():
    for notebook in PAGES:
        numbers = numbers_in(notebook)
        assert len(numbers) == len(set(numbers)) > 5
        assert all(f"{int(number.split('.')[0]):02}" == notebook for number in numbers)


def test_the_map_has_every_equation_that_has_a_number():
    everywhere = {number: notebook for notebook in PAGES for number in numbers_in(notebook)}
    assert {number: row.notebook for row in the_map() for number in row.numbers} == everywhere
    for row in the_map():
        assert row.code or not row.numbers, f"no code, nor the word none: {row}"


def test_the_map_names_what_exists_and_what_its_notebook_mentions():
    functions = [(place, row.notebook) for row in the_map() for place in row.functions]
    assert len(functions) >= 60
    for (file, name), notebook in functions:
        thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)
        assert is_mentioned(file, name, notebook), f"notebook {notebook} does not mention {name}"


def test_docstrings_name_the_numbers_of_the_map():
    """Both ways: a docstring's numbers are rows that name its function, and such a row has one."""
    named = {place: numbers_of(docstring) for place, docstring in docstrings().items()}
    named = {place: found for place, found in named.items() if found}
    rows = {(row.notebook, n, place) for row in the_map() for n in row.numbers
            for place in row.functions}
    for place, (notebook, numbers) in named.items():
        for number in numbers:
            assert number in numbers_in(notebook), f"{place}: no ({number}) in notebook {notebook}"
            assert (notebook, number, place) in rows, f"{place}: the map has it not by ({number})"
        assert is_mentioned(*place, notebook), f"notebook {notebook} does not mention {place}"
    assert {place for _, _, place in rows} == named.keys()


def test_a_docstring_that_names_a_notebook_names_a_number():
    for place, docstring in docstrings().items():
        assert ("notebook" in docstring) == bool(numbers_of(docstring)), place
