"""Each stage stands alone: what is copied is the same everywhere, little is imported, and few files are enough to run one."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits

import certify as c
from certify import (
    CHUNK,
    FixedN,
    GaussianNoise,
    certify,
    certify_all,
    clear_winner,
    count_classes,
    count_under_noise,
    generator_for,
    predict,
)

ROOT = Path(c.__file__).parent
STAGES = ("pretrain.py", "finetune.py", "certify.py")
TEXTS = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}

# ---------------------------------------------------------------------------------------------------------------------
# What is copied is the same everywhere
# ---------------------------------------------------------------------------------------------------------------------

RULER = "# " + "=" * 106


def blocks_of(text):
    """{its title: (files that it names, number of its first line, lines, what is wrong with its rulers or None)}."""
    lines, blocks = text.splitlines(), {}
    for i, line in enumerate(lines):
        if not (title := re.fullmatch(r"# The same in (.+): (.+)", line)):
            continue
        ends = [j for j in range(i, len(lines)) if lines[j].startswith("# The end of what ")]
        end = ends[0] if ends else len(lines) - 1
        problem = None
        if lines[end] != f"# The end of what {title[1]} share":
            problem = f"does not end with its own files' names, but: {lines[end]}"
        elif {lines[i - 1], lines[i + 1], lines[end - 1], *lines[end + 1:end + 2]} != {RULER}:
            problem = "lacks a ruler"
        blocks[title[0]] = re.findall(r"\w+\.py", title[1]), i + 1, lines[i:end + 1], problem
    return blocks


def complaints(texts):
    """What is wrong with the blocks of {file: text}, a sentence each."""
    found, sentences = {file: blocks_of(text) for file, text in texts.items()}, []
    for file, blocks in found.items():
        for title, (names, start, lines, problem) in blocks.items():
            if problem:
                sentences.append(f"{file}:{start}: {title!r} {problem}")
            if file not in names or len(names) < 2:
                sentences.append(f"{file}:{start}: {title!r} stands in {file}, but does not say so")
            for other in names:
                if title not in found.get(other, {}):
                    sentences.append(f"{file}:{start}: {title!r} does not stand in {other}")
                    continue
                _, there, theirs, _ = found[other][title]
                for i, (a, b) in enumerate(itertools.zip_longest(lines, theirs)):
                    if a != b:
                        sentences.append(f"{title!r} differs first in {file}:{start + i}: {a!r} and {other}:{there + i}: {b!r}")
                        break
    return sentences


def test_the_texts_between_rulers_are_the_same_in_the_files_that_they_name():
    found = complaints(TEXTS)
    assert not found, "\n".join(found)
    assert {file for file in TEXTS if blocks_of(TEXTS[file])} == {*STAGES}
    assert sum(len(lines) for _, _, lines, _ in blocks_of(TEXTS["pretrain.py"]).values()) > 100


def edited(file, before, after):
    """The texts with all copies mended (each as its first file has it), and then a change in one of them."""
    texts = dict(TEXTS)
    for name, text in TEXTS.items():
        for title, ((first, *_), _, lines, _) in blocks_of(text).items():
            texts[name] = texts[name].replace("\n".join(lines), "\n".join(blocks_of(TEXTS[first])[title][2]))
    assert complaints(texts) == [] and texts[file].count(before) == 1
    return texts | {file: texts[file].replace(before, after)}


def test_a_change_in_one_copy_is_named_with_its_block_and_line():
    changed = edited("finetune.py", "os.fsync(file.fileno())", "pass")
    line = changed["finetune.py"].splitlines().index("            pass") + 1
    first, *_ = complaints(changed)
    assert "'# The same in pretrain.py, finetune.py and certify.py: " in first
    assert f"finetune.py:{line}: '            pass'" in first
    assert "os.fsync" in first and re.search(r"(pretrain|certify)\.py:\d+: ", first)
    for file in STAGES:                                               # in whatever copy, each pair that differs is told
        told = complaints(edited(file, "    return rank, world, torch.device(", "    return world, rank, torch.device("))
        assert len(told) == 4 and all(f" {file}:" in sentence for sentence in told)


@pytest.mark.parametrize(("file", "before", "after", "words"), [
    ("certify.py", "        os.replace(temporary, path)\n", "", "os.replace"),            # a line that is missing
    ("finetune.py", "# The same in pretrain.py and finetune.py: ", "# Of ", "does not stand in finetune.py"),
    ("pretrain.py", "# The same in pretrain.py and finetune.py: ", "# The same in pretrain.py and model.py: ",
     "does not stand in model.py"),
    ("certify.py", "# The end of what pretrain.py, finetune.py and certify.py share", "# The end", "does not end"),
    ("certify.py", "# The end of what pretrain.py, finetune.py and certify.py share\n# =", "# The end of what pretrain.py, "
     "finetune.py and certify.py share\n# -", "lacks a ruler")])
def test_other_damage_is_found_too(file, before, after, words):
    assert any(words in sentence for sentence in complaints(edited(file, before, after)))


def test_nothing_else_is_copied():
    """A definition that two files have letter for letter belongs into a block, or into model.py."""
    outside = {}
    for file, text in TEXTS.items():
        for _, _, lines, _ in blocks_of(text).values():
            text = text.replace("\n".join(lines), "")
        lines = text.splitlines()
        outside[file] = {"\n".join(lines[node.lineno - 1:node.end_lineno]) for node in ast.parse(text).body
                         if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert len(outside[file]) > 10
    for one, other in itertools.combinations(outside, 2):
        assert not outside[one] & outside[other]


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------


def imports_of(text):
    """[(module, name or None)] of all imports, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found += [(node.module, alias.name) for alias in node.names]
    return found


OURS = {Path(file).stem for file in TEXTS}


def test_the_networks_know_nothing_of_files_flags_processes_and_data_sets():
    modules = {module.partition(".")[0] for module, _ in imports_of(TEXTS["model.py"])}
    forbidden = {"argparse", "PIL", "sklearn", "torchvision", "signal", "ctypes", "fcntl", "json"}
    assert not modules & (forbidden | OURS | {"os", "sys", "filelock", "tqdm"})
    assert "torch.distributed" not in TEXTS["model.py"] and "dist" not in {name for _, name in imports_of(TEXTS["model.py"])}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_at_most_ten_names_of_ours_all_of_them_the_networks(stage):
    ours = {(module, name) for module, name in imports_of(TEXTS[stage]) if module.partition(".")[0] in OURS}
    assert {module for module, _ in ours} == {"model"}
    assert all(name not in (None, "*") for _, name in ours) and len(ours) <= 10


def test_imports_inside_functions_are_seen():
    found = imports_of("import a.b\ndef f():\n    from model import x, y as z\n    class C:\n        import json\n")
    assert {*found} == {("a.b", None), ("model", "x"), ("model", "y"), ("json", None)}


def test_what_is_imported_is_in_the_requirements():
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    needed = {module.partition(".")[0] for text in TEXTS.values() for module, _ in imports_of(text)}
    needed -= {*sys.stdlib_module_names, *OURS}
    stated = {re.match(r"[\w-]*", line)[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert {names.get(module, module) for module in needed} <= stated


# ---------------------------------------------------------------------------------------------------------------------
# Copied files alone. No repository is on sys.path
# ---------------------------------------------------------------------------------------------------------------------

LEAN = ("matplotlib", "torchvision", "sklearn", "PIL", "tqdm", "filelock", "safetensors", "einops", "model")
LINEAR = """
import torch
def bright(images):
    mean = images.mean((1, 2, 3))
    return torch.stack([0.3 - mean, mean - 0.3], dim=1)
"""


@pytest.fixture
def alone(tmp_path):
    """run(files of ours, *arguments) -> the finished process of `python *arguments` in a folder that holds those files."""
    def run(files, *arguments):
        for file in files:
            shutil.copy(ROOT / file, tmp_path)
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, *map(str, arguments)], cwd=tmp_path, env=clean, capture_output=True, text=True,
                              timeout=300)
    return run


def test_the_certifier_alone_is_imported_light_and_certifies_any_callable(alone, tmp_path):
    (tmp_path / "linear.py").write_text(LINEAR)
    job = alone(["certify.py"], "-c", f"""
import json, sys
import torch                                                           # which loads tqdm by itself
before = {{*sys.modules}}
from certify import certify, predict, lower_confidence_bound, certified_radius
loaded = sorted({{*{LEAN!r}}} & (sys.modules.keys() - before))
from linear import bright
x = torch.full((1, 8, 8), 0.5)
print(json.dumps([loaded, sys.path, certify(bright, x, 0.25, n=1000), predict(bright, x, 0.25, n=1000),
                  lower_confidence_bound(1000, 1000, 0.001), certified_radius(0.9, 0.25)]))
""")
    assert job.returncode == 0, job.stderr
    loaded, path, certificate, prediction, bound, radius = json.loads(job.stdout)
    assert loaded == [] and str(ROOT) not in path
    space = {}
    exec(LINEAR, space)
    assert certificate == list(certify(space["bright"], torch.full((1, 8, 8), 0.5), 0.25, n=1000)) and prediction == 1
    assert bound == pytest.approx(0.001 ** (1 / 1000)) and radius == pytest.approx(0.25 * 1.2815515655446004)


@pytest.mark.slow
def test_the_certifier_alone_runs_on_any_classifier(alone, tmp_path):
    (tmp_path / "linear.py").write_text(LINEAR)
    job = alone(["certify.py"], "certify.py", "--sigma", "0.25", "--classifier", "linear.py:bright", "--n", "200", "--n0", "20",
                "--skip", "90", "--out", "run", "--device", "cpu")
    assert job.returncode == 0, job.stderr
    log = tmp_path / "run" / "certify_sigma_0.25.tsv"
    images = load_digits().images[-360::90] / 16
    answers = [line.split("\t")[2] for line in log.read_text().splitlines()[1:]]
    assert len(answers) == 4 and all(answer in ("-1", str(int(image.mean() > 0.3)))
                                     for answer, image in zip(answers, images, strict=True))


@pytest.mark.slow
def test_the_certifier_alone_reports(alone, tmp_path):
    log = tmp_path / "sigma_0.50"
    log.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.6\t1\t0:00:01\n1\t2\t-1\t0.0\t0\t0:00:01\n")
    job = alone(["certify.py"], "certify.py", "--report", log, "--format", "csv", "--radii", "0.5", "--plot", "curve.png")
    assert job.returncode == 0 and job.stdout.splitlines()[1].startswith("0.5,2,50.0,"), job.stderr
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_certifier_without_the_networks_says_what_it_needs_for_a_checkpoint(alone, tiny_run, tmp_path):
    checkpoint = tiny_run / "finetune_sigma_0.25.pt"
    job = alone(["certify.py"], "certify.py", "--sigma", "0.25", "--checkpoint", checkpoint, "--out", "run")
    assert (job.returncode, job.stdout) == (2, "") and not (tmp_path / "run").exists()
    (line,) = job.stderr.splitlines()
    assert line.startswith("certify.py: error: ") and "model.py" in line and "--classifier" in line


@pytest.mark.slow
def test_the_certifier_beside_the_networks_certifies_a_checkpoint(alone, tiny_run, tmp_path):
    shutil.copy(tiny_run / "finetune_sigma_0.25.pt", tmp_path)
    job = alone(["certify.py", "model.py"], "certify.py", "--sigma", "0.25", "--checkpoint", "finetune_sigma_0.25.pt",
                "--n", "200", "--n0", "20", "--max", "2", "--out", "run", "--device", "cpu")
    assert job.returncode == 0, job.stderr
    assert (tmp_path / "run" / "certify_sigma_0.25.tsv").read_text().count("\n") == 3


def test_pre_training_needs_the_networks_only(alone, tmp_path):
    job = alone(["model.py", "pretrain.py"], "pretrain.py", "--epochs", "0.2", "--warmup-epochs", "0", "--device", "cpu")
    assert job.returncode == 0, job.stderr
    made = {path.name for path in (tmp_path / "runs" / "digits").iterdir()}
    assert {"pretrain.pt", "pretrain.json", "pretrain.jsonl", "pretrain.png", "pretrain.loss.png"} <= made


@pytest.mark.slow
def test_fine_tuning_needs_the_networks_and_a_checkpoint_only(alone, tiny_run, tmp_path):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    shutil.copy(tiny_run / "pretrain.pt", tmp_path / "runs" / "digits")
    job = alone(["model.py", "finetune.py"], "finetune.py", "--sigma", "0.25", "--epochs", "1", "--warmup-epochs", "0",
                "--device", "cpu")
    assert job.returncode == 0, job.stderr
    made = {path.name for path in (tmp_path / "runs" / "digits").iterdir()}
    assert {"finetune_sigma_0.25.pt", "finetune_sigma_0.25.json", "finetune_sigma_0.25.jsonl"} <= made


# ---------------------------------------------------------------------------------------------------------------------
# CERTIFY and PREDICT as one reads them, and as they run
# ---------------------------------------------------------------------------------------------------------------------


def exact(x):
    """Four classes from two pixels, compared as they are: nothing in it rounds, so no batch can matter."""
    a, b = x.flatten(1)[:, 0] > 0.5, x.flatten(1)[:, -1] > 0.6
    return torch.stack([a & b, a & ~b, ~a & b, ~a & ~b], dim=1).float()


def same_in_both(classifier, images, sigma, n0, n, batch, seed):
    """certify(), predict() and their counts one by one against all images at once; returns what came out."""
    noise, alpha, indexed = GaussianNoise(sigma), 0.01, [(5 + 3 * i, x) for i, x in enumerate(images)]
    trials = {trial.index: trial for trial in certify_all(classifier, indexed, noise, n0, FixedN(n, alpha), seed, batch)}
    votes = count_classes(classifier, [(x, generator_for(seed, i, 2, x.device), n) for i, x in indexed], noise, batch)
    results = []
    for (i, x), vote in zip(indexed, votes, strict=True):
        for phase, copies in ((0, n0), (1, n), (2, n)):
            plain = count_under_noise(classifier, x, sigma, copies, generator_for(seed, i, phase, x.device), batch)
            pooled = count_classes(classifier, [(x, generator_for(seed, i, phase, x.device), copies)], noise, batch)[0]
            assert torch.equal(plain, pooled) and plain.sum() == copies
            assert phase != 1 or torch.equal(plain, trials[i].counts)
            assert phase != 2 or torch.equal(plain, vote)
        for bound in c.BOUNDS:
            result = certify(classifier, x, sigma, n0, n, alpha, seed, i, batch, bound)
            assert result == trials[i].certificate(sigma, bound)
        prediction = predict(classifier, x, sigma, n, alpha, seed, i, batch)
        assert prediction == clear_winner(vote, alpha)
        results.append((result, prediction))
    return results


@pytest.mark.parametrize("batch", [5, 20, 100, 200, 500])
@pytest.mark.parametrize(("n0", "n"), [(1, 1), (10, 99), (100, 100), (101, 250), (250, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_functions_and_the_pooled_engine_agree_exactly_where_nothing_rounds(n0, n, batch, dtype):
    images = torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(n), dtype=dtype)
    results = same_in_both(exact, images, 0.2, n0, n, batch, seed=n0)
    if n >= 250:                                                      # not everything abstains
        assert len({*results}) > 1 and any(radius > 0 for (_, radius), _ in results)
    assert results == same_in_both(exact, images, 0.2, n0, n, CHUNK, seed=n0)


@pytest.mark.parametrize(("batch", "n0", "n"), [(50, 30, 130), (100, 30, 130), (400, 100, 500)])
def test_the_functions_and_the_pooled_engine_agree_exactly_for_a_vision_transformer_in_the_same_batch(tiny_vit, batch, n0, n):
    vit, generator = tiny_vit(), torch.Generator().manual_seed(3)
    images = torch.rand(4, 1, 8, 8, generator=generator)
    with torch.inference_mode():                                      # centred, the random network answers every class
        centre = vit(torch.rand(300, 1, 8, 8, generator=generator)).mean(0)
    results = same_in_both(lambda x: vit(x) - centre, images, 0.25, n0, n, batch, seed=4)
    assert len({answer for _, answer in results}) > 1
    if n == 130:
        same_in_both(lambda x: vit(x.float()) - centre, images.half(), 0.25, n0, n, batch, seed=4)


# ---------------------------------------------------------------------------------------------------------------------
# A run directory
# ---------------------------------------------------------------------------------------------------------------------


def test_a_refused_run_lets_go_of_its_directory(tmp_path):
    """In one process, as notebooks call the stages: who holds on to the error must not hold the lock as well."""
    stem, result = f"{tmp_path}/run", tmp_path / "run.pt"
    with c.run_directory(stem, dict(n=1), {"out"}, result, False):
        pass
    with pytest.raises(ValueError, match="other settings.*n 1 -> 2") as error:
        c.run_directory(stem, dict(n=2), {"out"}, result, False).__enter__()
    with c.run_directory(stem, dict(n=1), {"out"}, result, False):
        assert error.value.args
