"""Every file of extras/ can be imported as extras.NAME, and its docstring's commands can be run.

What they compute: test_objectives.py, test_rivals_certify.py, test_certify.py, test_reports.py.
"""

import importlib
import itertools
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import certify
import finetune
import pretrain

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "extras").glob("*.py"))
STAGES = {"pretrain.py": pretrain, "finetune.py": finetune, "certify.py": certify}


def commands_of(name):
    """[(environment, words)] of the docstring's commands."""
    text = (ROOT / "extras" / f"{name}.py").read_text().split('"""')[1]
    text = text.replace("\\\\\n", " ")                         # a docstring's escaped line ends
    found = []
    for line in re.findall(r"^ *((?:\w+=\S+ )?python .+)", text, flags=re.MULTILINE):
        words = shlex.split(line, comments=True)
        variables = dict(word.split("=", 1) for word in words[:words.index("python")])
        found.append((variables, words[words.index("python") + 1:]))
    return found


@pytest.fixture
def users_folder(tiny_run, tmp_path, monkeypatch):
    """A folder with extras/, and with every checkpoint that a docstring names."""
    (tmp_path / "extras").symlink_to(ROOT / "extras")
    for name in ("digits", "denoiser"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(tiny_run / "pretrain.pt", tmp_path / "runs" / name)
    (tmp_path / "runs" / "clean").mkdir()
    for file in ("a.pt", "b.pt", "c.pt", "runs/clean/finetune_sigma_0.pt",
                 *(f"runs/digits/finetune_sigma_{sigma}.pt" for sigma in (0.25, 0.5))):
        shutil.copy(tiny_run / "finetune_sigma_0.25.pt", tmp_path / file)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_it_is_imported_as_a_module_of_extras_and_needs_no_checkpoint_for_that(name, monkeypatch):
    monkeypatch.delenv("CHECKPOINTS", raising=False)
    assert importlib.import_module(f"extras.{name}").__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_its_docstring_parse(name, users_folder, monkeypatch):
    commands = commands_of(name)
    assert commands
    for variables, (script, *words) in commands:
        for variable, value in variables.items():
            assert variable == "CHECKPOINTS"
            assert all(os.path.exists(file) for file in value.split(":"))
            monkeypatch.setenv(variable, value)
        if script == "-m":                                     # a program with certify.py's flags
            assert words[0] == f"extras.{name}"
            assert callable(importlib.import_module(words[0]).main)
            flags = [*itertools.dropwhile(lambda word: not word.startswith("--"), words)]
            if flags:
                certify.parse(flags)
            continue
        STAGES[script].parse(words)
        for flag in {"--objective", "--classifier", "--procedure"} & {*words}:
            plug = words[words.index(flag) + 1]
            if plug != "mine.py:f":                            # the reader's
                assert plug.startswith(f"extras/{name}.py:")
                assert callable(STAGES[script].open_plug(plug, flag)[0])
