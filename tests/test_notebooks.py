"""The notebooks execute, are what their sources say, and name things that exist."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
IDS = [source.stem for source in SOURCES]


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_the_six_of_them():
    assert [source.name[:2] for source in SOURCES] == ["01", "02", "03", "04", "05", "06"]


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
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    text = json.dumps([cell["source"] for cell in notebook["cells"]]) + json.dumps(
        [{**output, "data": {kind: data for kind, data in output.get("data", {}).items() if kind != "image/png"}}
         for output in outputs]) + json.dumps(notebook["metadata"])
    assert not re.search(r"Warning|/root/|/home/|/work/|/Users/|/tmp/", text)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=IDS)
def test_the_notebook_executes_and_its_assertions_hold(source, tmp_path):
    assert sum(len(re.findall(r"^\s*assert |assert_allclose|assert_close", cell, re.MULTILINE))
               for cell in code(jupytext.read(source))) >= 5
    done = subprocess.run([sys.executable, "-m", "jupytext", "--to", "ipynb", "--run-path", source.parent, "--execute",
                           "--output", tmp_path / "out.ipynb", source], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [cell for cell in jupytext.read(tmp_path / "out.ipynb").cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)


def test_the_map_of_equations_names_what_exists():
    rows = [row.split("|")[1:-1] for row in (ROOT / "notebooks" / "README.md").read_text().splitlines() if row.startswith("| ")]
    rows = [row for row in rows if len(row) == 4 and ".py:" in row[2]]
    assert len(rows) >= 20
    for _, _, where, explained in rows:
        (notebook,) = (source for source in SOURCES if source.name.startswith(explained.strip()[:2]))
        for file, name in re.findall(r"`(\w+)\.py:([\w.]+)`", where):
            thing = importlib.import_module(file)
            for part in name.split("."):
                thing = getattr(thing, part)
            last = name.split(".")[-1]
            called_or_quoted = rf"\b{last}\(|`([\w.]+\.)?{last}`|\b{file}\.{re.escape(name)}\b"
            assert re.search(called_or_quoted, notebook.read_text()), f"{notebook.name} does not mention {name}"


def test_the_map_has_every_equation_that_has_a_number():
    numbers = {"notebooks": {}, "map": {}}
    for source in SOURCES:
        for number in re.findall(r"\\tag\{([\d.]+)\}", source.read_text()):
            assert number not in numbers["notebooks"], f"({number}) stands twice"
            assert number.split(".")[0] == source.name[:2].lstrip("0")
            numbers["notebooks"][number] = source.name[:2]
    for row in (ROOT / "notebooks" / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        if len(cells) == 4 and (leading := re.match(r"(\(\d+\.\d+\)(, )?)+", cells[0])):
            assert cells[2], f"no code, nor the word none: {row}"
            for number in re.findall(r"\d+\.\d+", leading.group()):
                numbers["map"][number] = cells[3]
    assert numbers["map"] == numbers["notebooks"]
