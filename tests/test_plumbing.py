"""Each file stands alone: what is copied is the same everywhere, little is imported, few files run.

extras/ are imported as extras.NAME, and the stages need none of them.
"""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch
from sklearn.datasets import load_digits

from certify import certify
from finetune import run_directory

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain.py", "finetune.py", "certify.py")
TEXTS = {str(path.relative_to(ROOT)): path.read_text()
         for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")])}

# --------------------------------------------------------------------------------------------------
# What is copied is the same everywhere
# --------------------------------------------------------------------------------------------------

RULER = "# " + "=" * 98
BLOCK = re.compile(rf"{RULER}\n# The same in (.+): .+\n{RULER}\n(?:.*\n)*?"
                   rf"(?={RULER}|if __name__)")


def blocks_of(text):
    """{the files that a block names: its text, down to the next ruler or the last lines}"""
    return {block[1]: block[0] for block in BLOCK.finditer(text)}


def test_the_texts_between_rulers_are_the_same_in_the_files_that_they_name():
    found = {file: blocks_of(text) for file, text in TEXTS.items()}
    two, plugs, three = ("pretrain.py and finetune.py", "finetune.py and certify.py",
                         "pretrain.py, finetune.py and certify.py")
    assert {file: [*blocks] for file, blocks in found.items() if blocks} == {
        "pretrain.py": [two, three], "finetune.py": [two, plugs, three],
        "certify.py": [plugs, three]}
    for names in (two, plugs, three):
        first, *others = (found[file][names] for file in re.findall(r"\w+\.py", names))
        for other in others:
            assert other.splitlines() == first.splitlines()
    for file in STAGES:                                        # no ruler that the pattern missed
        text = "".join(found[file].values())
        assert TEXTS[file].count("# The same in ") == text.count("# The same in ")
        assert TEXTS[file].count(RULER) == text.count(RULER)


def test_nothing_else_is_copied():
    """A definition that two files have letter for letter belongs into a block, or into model.py."""
    outside = {}
    for file, text in TEXTS.items():
        for block in blocks_of(text).values():
            text = text.replace(block, "")
        outside[file] = {ast.get_source_segment(text, node) for node in ast.parse(text).body
                         if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for one, other in itertools.combinations(outside, 2):
        assert not outside[one] & outside[other]


# --------------------------------------------------------------------------------------------------
# Imports
# --------------------------------------------------------------------------------------------------


def imports_of(text):
    """{module} of all imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and "*" not in {alias.name for alias in node.names}
            found.add(node.module)
    return found


OURS = {file.removesuffix(".py").replace("/", ".") for file in TEXTS}


def test_the_networks_know_nothing_of_files_flags_processes_and_data_sets():
    modules = {module.partition(".")[0] for module in imports_of(TEXTS["model.py"])}
    assert not modules & {"argparse", "PIL", "sklearn", "torchvision", "json", "os", "sys",
                          "filelock", "tqdm", *OURS}
    assert "distributed" not in TEXTS["model.py"]


def test_a_stage_imports_the_networks_and_nothing_else_of_ours():
    assert {file: imports_of(TEXTS[file]) & OURS for file in STAGES} == {
        file: {"model"} for file in STAGES}


def test_what_is_imported_is_in_the_requirements():
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    needed = {module.partition(".")[0] for text in TEXTS.values() for module in imports_of(text)}
    needed -= {*sys.stdlib_module_names, *OURS, "extras"}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    stated = {re.match(r"[\w-]*", line)[0] for line in lines}
    assert {names.get(module, module) for module in needed} <= stated


# --------------------------------------------------------------------------------------------------
# Copied files alone. No repository is on sys.path
# --------------------------------------------------------------------------------------------------

LEAN = ("matplotlib", "torchvision", "sklearn", "PIL", "tqdm", "safetensors", "einops", "model",
        "extras")
LINEAR = """
import torch
def bright(images):
    mean = images.mean((1, 2, 3))
    return torch.stack([0.3 - mean, mean - 0.3], dim=1)
def digit(images):                                             # 0 or 1 of ten classes
    return torch.cat([bright(images), torch.full((len(images), 8), -9.0)], dim=1)
"""


@pytest.fixture
def alone(tmp_path):
    """run(files, *arguments) -> the ended `python *arguments` in a folder of copies of files."""

    def run(files, *arguments, folder=tmp_path):
        for file in files:
            (tmp_path / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        line = [sys.executable, *map(str, arguments)]
        return subprocess.run(line, cwd=folder, env=clean | {"OMP_NUM_THREADS": "1"},
                              capture_output=True, text=True, timeout=300)

    return run


def test_the_certifier_alone_is_imported_light_and_certifies_any_callable(alone, tmp_path):
    (tmp_path / "linear.py").write_text(LINEAR)
    job = alone(["certify.py"], "-c", f"""
import json, sys
import torch                                                   # which loads tqdm by itself
before = {{*sys.modules}}
from certify import certify, predict, lower_confidence_bound, certified_radius
loaded = sorted({{*{LEAN!r}}} & (sys.modules.keys() - before))
from linear import bright
x = torch.full((1, 8, 8), 0.5)
print(json.dumps([loaded, sys.path, certify(bright, x, 0.25, n=1000),
                  predict(bright, x, 0.25, n=1000), lower_confidence_bound(1000, 1000, 0.001),
                  certified_radius(0.9, 0.25)]))
""")
    assert job.returncode == 0, job.stderr
    loaded, path, certificate, prediction, bound, radius = json.loads(job.stdout)
    assert loaded == [] and str(ROOT) not in path
    space = {}
    exec(LINEAR, space)
    here = certify(space["bright"], torch.full((1, 8, 8), 0.5), 0.25, n=1000)
    assert certificate == list(here) and prediction == 1
    assert bound == pytest.approx(0.001 ** (1 / 1000))
    assert radius == pytest.approx(0.25 * 1.2815515655446004)


@pytest.mark.slow
def test_the_certifier_alone_runs_on_any_classifier_and_reports(alone, tmp_path):
    (tmp_path / "linear.py").write_text(LINEAR)
    job = alone(["certify.py"], "certify.py", "--sigma", "0.25", "--classifier", "linear.py:digit",
                "--n", "200", "--n0", "20", "--skip", "90", "--out", "run", "--device", "cpu")
    assert job.returncode == 0, job.stderr
    log = tmp_path / "run" / "certify_sigma_0.25.tsv"
    images = load_digits().images[-360::90] / 16
    answers = [line.split("\t")[2] for line in log.read_text().splitlines()[1:]]
    assert len(answers) == len(images) == 4
    for answer, image in zip(answers, images, strict=True):
        assert answer in ("-1", str(int(image.mean() > 0.3)))

    job = alone([], "certify.py", "--report", log, "--radii", "0.5", "--plot", "curve.png")
    assert job.returncode == 0 and "r=0.5" in job.stdout, job.stderr
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_certifier_without_the_networks_lacks_them_for_a_checkpoint(alone, tiny_run, tmp_path):
    job = alone(["certify.py"], "certify.py", "--sigma", "0.25", "--checkpoint",
                tiny_run / "finetune_sigma_0.25.pt", "--out", "run")
    assert (job.returncode, job.stdout) == (1, "") and not (tmp_path / "run").exists()
    assert job.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'model'"


@pytest.mark.slow
def test_the_certifier_beside_the_networks_certifies_a_checkpoint(alone, tiny_run, tmp_path):
    shutil.copy(tiny_run / "finetune_sigma_0.25.pt", tmp_path)
    job = alone(["certify.py", "model.py"], "certify.py", "--sigma", "0.25", "--checkpoint",
                "finetune_sigma_0.25.pt", "--n", "200", "--n0", "20", "--max", "2", "--out", "run",
                "--device", "cpu")
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "run" / "certify_sigma_0.25.tsv").read_text().count("\n") == 3


@pytest.mark.slow
def test_pre_training_needs_the_networks_only(alone, tmp_path):
    job = alone(["model.py", "pretrain.py"], "pretrain.py", "--epochs", "1", "--warmup-epochs", "0",
                "--device", "cpu")
    assert job.returncode == 0, job.stderr
    made = {path.name for path in (tmp_path / "runs" / "digits").iterdir()}
    assert {f"pretrain.{end}" for end in ("pt", "json", "jsonl", "png")} <= made


@pytest.mark.slow
def test_fine_tuning_needs_the_networks_and_a_checkpoint_only(alone, tiny_run, tmp_path):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    shutil.copy(tiny_run / "pretrain.pt", tmp_path / "runs" / "digits")
    job = alone(["model.py", "finetune.py"], "finetune.py", "--sigma", "0.25", "--epochs", "1",
                "--warmup-epochs", "0", "--device", "cpu")
    assert job.returncode == 0, job.stderr
    made = {path.name for path in (tmp_path / "runs" / "digits").iterdir()}
    assert {f"finetune_sigma_0.25.{end}" for end in ("pt", "json", "jsonl")} <= made


PLUG = """
import sys
import STAGE, extras.EXTRA
from beside import here
print(STAGE is sys.modules["__main__"], here, extras.EXTRA.__file__)
raise KeyError("reached")
"""


@pytest.mark.parametrize("stage, extra, flag, more", [
    ("finetune", "macer", "--objective", ["--init", "scratch"]),
    pytest.param("certify", "sequential", "--classifier", [], marks=pytest.mark.slow)])
def test_a_plug_imports_the_running_stage_extras_and_what_lies_beside_it(
    alone, tmp_path, stage, extra, flag, more
):
    """From any folder: the stage's own is on the path, and the plug's."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mine" / "beside.py").write_text("here = 5")
    plug = PLUG.replace("STAGE", stage).replace("EXTRA", extra)
    (tmp_path / "mine" / "plug.py").write_text(plug)
    files = ["model.py", f"{stage}.py", "extras/smoothadv.py", f"extras/{extra}.py"]
    job = alone(files, f"../{stage}.py", "--sigma", "0.25", *more, flag, "../mine/plug.py:f",
                "--device", "cpu", folder=tmp_path / "elsewhere")
    main, here, place = job.stdout.splitlines()[-1].split()
    assert (main, here) == ("True", "5") and Path(place) == tmp_path / "extras" / f"{extra}.py"
    assert "KeyError: 'reached'" in job.stderr and 'plug.py", line' in job.stderr
    assert job.returncode == 1
    assert job.stderr.splitlines()[-1].startswith("RuntimeError: in the import of ")


# --------------------------------------------------------------------------------------------------
# A run directory
# --------------------------------------------------------------------------------------------------


def test_a_refused_run_lets_go_of_its_directory(tmp_path):
    """In one process, as notebooks call the stages: who keeps the error must not keep the lock."""
    stem = f"{tmp_path}/run"
    with run_directory(stem, dict(n=1)):
        pass
    with pytest.raises(ValueError, match="other settings.*n 1 -> 2") as error:
        run_directory(stem, dict(n=2)).__enter__()
    with run_directory(stem, dict(n=1)):
        assert error.value.args
        with pytest.raises(filelock.Timeout):
            run_directory(stem, dict(n=1)).__enter__()
