"""certify.py from the command line: files, resume, processes, reports, and what is refused."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch.distributed.run import get_args_parser

import certify as c
from certify import FixedN, GaussianNoise, certify, certify_all, main
from model import VisionTransformer

COLUMNS = ["idx", "label", "predict", "radius", "correct", "count", "n", "sigma", "alpha", "top", "runner_up", "classes",
           "one_sided", "two_sided"]                                  # less the time

ROOT, TEST = Path(c.__file__).parent, 1437                            # the test set: load_digits()'s images from 1437 on
NAME = "certify_sigma_0.25.tsv"
NEAREST_MEAN = f"""
import numpy as np, torch
from sklearn.datasets import load_digits
digits = load_digits()
x, y = digits.images[:{TEST}] / 16, digits.target[:{TEST}]
MEANS = torch.tensor(np.stack([x[y == k].mean(0) for k in range(10)]), dtype=torch.float32)
calls = 0
def nearest(images):
    return -(images - MEANS[None, :]).square().sum((2, 3))
def second_nearest(images):
    return nearest(images).where(nearest(images) < nearest(images).amax(1, keepdim=True), torch.tensor(-1e9))
def constant(images):
    return torch.eye(10)[torch.full((len(images),), 7)]
not_callable = 3
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As OMP_NUM_THREADS=1 in the subprocesses."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tiny_run):
    return str(tiny_run / "finetune_sigma_0.25.pt")


INDICES = range(0, 360, 55)                                           # --skip 55: seven images
SMALL = ["--sigma", "0.25", "--device", "cpu", "--skip", "55", "--n", "300", "--n0", "50", "--alpha", "0.05",
         "--radii", "0", "0.25", "--batch", "100"]


@pytest.fixture(scope="module")
def command(tiny_run):
    """command(out, *more): the arguments of a small run. A flag that stands twice: the later one counts."""
    file = str(tiny_run / "finetune_sigma_0.25.pt")
    return lambda out, *more: [*SMALL, "--checkpoint", file, "--out", str(out), *map(str, more)]


@pytest.fixture(scope="module")
def reference(command, tmp_path_factory):
    """The directory of a finished run of command()'s arguments; not to be written to."""
    out = tmp_path_factory.mktemp("reference")
    main(command(out))
    return out


@pytest.fixture(scope="module")
def unfinished(command, tmp_path_factory):
    """As reference, but interrupted (Ctrl-C) in the fourth of the seven images; not to be written to."""
    out = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert interrupted(command, out, monkeypatch) == 130
    return out


def copied(folder, out):
    """A copy of a run, to go on in."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    return out


def rows(path):
    """The rows as dicts, without the time."""
    return [{key: value for key, value in row.items() if key != "time"} for row in
            csv.DictReader(io.StringIO(Path(path).read_text()), delimiter="\t")]


def timeless(path):
    """The file's bytes less the time column."""
    return [line.split(b"\t")[:5] + line.split(b"\t")[6:] for line in Path(path).read_bytes().split(b"\n")]


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.endswith(".lock")}


def refused(argv, capsys, *words, status=2):
    """main(argv) ends with `status` and one line on stderr that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([*map(str, argv)])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == status and len(lines) == 1 and lines[0].startswith("certify.py: error: "), lines
    for word in words:
        assert str(word) in lines[0]


def digit(i):
    """Test image i as the network sees it."""
    return torch.tensor(load_digits().images[TEST + i] / 16, dtype=torch.float32)[None]


def network(file):
    content = torch.load(file)
    vit = VisionTransformer(**content["config"])
    vit.load_state_dict(content["model"])
    return vit.eval()


def by_hand(classifier, indices, n=300, n0=50, alpha=0.05, seed=0, noise=None):
    """What the TSV must say of these test images, through the Python interface."""
    trials = certify_all(classifier, [(i, digit(i)) for i in indices], noise or GaussianNoise(0.25), n0, FixedN(n, alpha), seed)
    labels, result = load_digits().target[TEST:], []
    for t in trials:
        prediction, radius = t.certificate(0.25)
        correct, k = int(prediction == labels[t.index]), t.counts[t.top]
        rivals = t.counts.tolist()
        del rivals[t.top]
        values = [t.index, labels[t.index], prediction, f"{radius:.6f}", correct, int(k), n, 0.25, alpha, t.top,
                  max(rivals) + n - sum(rivals) - int(k), len(rivals) + 1]
        for bound in c.BOUNDS:
            guess, by_that = t.certificate(0.25, bound)
            values.append(-1 if guess == -1 else f"{by_that:.6f}")
        result.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return result


# -- The file ------------------------------------------------------------------------------------------------------------


def test_the_tsv_is_cohens_with_our_columns_and_holds_what_certify_gives(reference, checkpoint):
    lines = (reference / NAME).read_text().splitlines()
    assert lines[0].split("\t") == ["idx", "label", "predict", "radius", "correct", "time", *COLUMNS[5:]]
    assert [int(line.split("\t")[0]) for line in lines[1:]] == [*INDICES]
    assert all(re.fullmatch(r"\d+:\d\d:\d\d(\.\d{6})?", line.split("\t")[5]) for line in lines[1:])
    assert rows(reference / NAME) == by_hand(network(checkpoint), INDICES)
    vit = network(checkpoint)
    for row in rows(reference / NAME)[:3]:                            # and the two-line interface says the same
        prediction, radius = certify(vit, digit(int(row["idx"])), 0.25, 50, 300, 0.05, index=int(row["idx"]))
        assert (row["predict"], row["radius"]) == (str(prediction), f"{radius:.6f}")


def test_settings_lie_beside_it_with_the_checkpoints_hash(reference, checkpoint):
    settings = json.loads((reference / "certify_sigma_0.25.json").read_text())
    assert settings["sha256"] == [hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()]
    expected = dict(sigma=0.25, n=300, n0=50, alpha=0.05, seed=0, skip=55, max=None, dataset="digits", device="cpu",
                    dtype="fp32", sequential=False, sound=False, bound="one-sided")
    assert settings | expected == settings
    with Image.open(reference / "certify_sigma_0.25.png") as picture:
        assert picture.format == "PNG"
    assert {*files(reference)} == {NAME, "certify_sigma_0.25.json", "certify_sigma_0.25.png"}         # no part is left


def test_a_second_directory_gets_the_same_bytes_time_aside(reference, command, tmp_path):
    main(command(tmp_path / "b"))
    assert timeless(tmp_path / "b" / NAME) == timeless(reference / NAME)
    main(command(tmp_path / "c", "--seed", "1"))
    assert timeless(tmp_path / "c" / NAME) != timeless(reference / NAME)


def test_the_table_is_printed_with_abstentions_and_an_exact_interval(command, tmp_path, capsys):
    main(command(tmp_path / "new"))
    out = capsys.readouterr().out
    done = rows(tmp_path / "new" / NAME)
    right = sum(row["correct"] == "1" for row in done)
    interval = binomtest(right, 7).proportion_ci(method="exact")
    assert f"{interval.low:.1%}" in out and f"{interval.high:.1%}" in out and f"{right / 7:.1%}" in out
    cells = next(line for line in out.splitlines() if line.split()[:3] == ["0.25", "one-sided", "7"]).split()
    assert cells[3] == f"{100 * right / 7:.1f}"
    two = sum(row["top"] == row["label"] and float(row["two_sided"]) >= 0 for row in done)
    assert f"0.25 two-sided 7 {100 * two / 7:.1f} " in " ".join(out.split())
    assert f"{100 * sum(row['predict'] == '-1' for row in done) / 7:.1f}%" in cells
    assert f"{sum(float(row['radius']) for row in done if row['correct'] == '1') / 7:.3f}" in cells


def test_repeated_it_says_that_it_is_done_and_changes_nothing(command, reference, tmp_path, capsys):
    before = files(copied(reference, tmp_path))
    capsys.readouterr()
    main(command(tmp_path))
    assert "done" in capsys.readouterr().out and files(tmp_path) == before


def test_what_a_kill_left_undone_after_the_last_row_is_done_by_the_same_command(command, reference, tmp_path, capsys):
    """The TSV is there, its picture is not, and its parts are still there."""
    copied(reference, tmp_path)
    (tmp_path / "certify_sigma_0.25.png").unlink()
    (tmp_path / f"{NAME}.part0").write_bytes((tmp_path / NAME).read_bytes())
    main(command(tmp_path))
    assert {*files(tmp_path)} == {*files(reference)} and timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert "ACR" in capsys.readouterr().out


def test_overwrite_starts_again(command, reference, unfinished, tmp_path):
    for before in (reference, unfinished):
        copied(before, tmp_path)
    main(command(tmp_path, "--overwrite", "--max", "2"))
    assert not list(tmp_path.glob("*.part*"))
    assert [row["idx"] for row in rows(tmp_path / NAME)] == ["0", "55"]


def test_a_classifier_never_sees_a_label(reference, command, tmp_path, monkeypatch):
    original = c.open_images

    def shuffled(*arguments):
        images = original(*arguments)
        images.labels = (images.labels + 1 + torch.arange(len(images)) % 9) % 10          # every label is wrong
        return images

    monkeypatch.setattr(c, "open_images", shuffled)
    main(command(tmp_path))
    ours, theirs = rows(tmp_path / NAME), rows(reference / NAME)
    assert [row["label"] for row in ours] != [row["label"] for row in theirs]
    for row in (*ours, *theirs):
        assert row.pop("correct") == str(int(row.pop("label") == row["predict"]))
    assert ours == theirs


@pytest.mark.parametrize("batch", [50, 200])
def test_another_batch_gives_the_same_rows_for_a_classifier_that_does_not_round(tmp_path, batch):
    (tmp_path / "mine.py").write_text(NEAREST_MEAN)
    for size in (100, batch):
        main([*SMALL, "--classifier", f"{tmp_path}/mine.py:nearest", "--out", str(tmp_path / str(size)), "--batch", str(size)])
    assert timeless(tmp_path / "100" / NAME) == timeless(tmp_path / str(batch) / NAME)


# -- Processes, interruptions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_tsv_does_not_depend_on_the_number_of_processes(reference, command, torchrun, tmp_path, processes):
    """Seven images: an uneven share for two processes and for three."""
    job = torchrun(processes, ROOT / "certify.py", *command(tmp_path))
    out = job.communicate(timeout=300)[0]
    assert job.returncode == 0, out
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert not list(tmp_path.glob("*.part*"))
    assert out.count("ACR  abstain") == 1                             # one process talks


def test_every_flag_passes_through_torchrun(capsys):
    """torchrun's parser reads a script's flags too, and calls --n and --max ambiguous; -- keeps it out."""
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = {*re.findall(r"^  (?:-h, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)}
    assert {"--sigma", "--skip", "--shard", "--sound"} <= flags
    refused_flags = []
    for flag in sorted(flags):
        try:
            assert get_args_parser().parse_args(["--", "certify.py", flag, "1"]).training_script_args == [flag, "1"]
        except SystemExit:
            refused_flags.append(flag)
    assert not refused_flags


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_mid_run_it_goes_on_to_the_same_file(command, tmp_path, number):
    argv = ["--n", "1500", "--max", "5"]
    main(command(tmp_path / "whole", *argv))
    part = tmp_path / "cut" / f"{NAME}.part0"
    job = subprocess.Popen([sys.executable, ROOT / "certify.py", *command(tmp_path / "cut", *argv)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        end = time.time() + 200
        while time.time() < end and job.poll() is None and not (part.exists() and part.read_text().count("\n") >= 2):
            time.sleep(0.005)
    finally:
        job.send_signal(number)
        err = job.communicate()[1]
    assert job.returncode == (130 if number == signal.SIGINT else -number) and not (tmp_path / "cut" / NAME).exists()
    if number == signal.SIGINT:
        assert err.splitlines()[-1] == "certify.py: interrupted; the same command continues" and "Traceback" not in err
    left = part.read_text()
    assert 2 <= left.count("\n") < 5
    main(command(tmp_path / "cut", *argv))
    assert timeless(tmp_path / "cut" / NAME) == timeless(tmp_path / "whole" / NAME)
    assert set(left.splitlines()[:2]) <= {*(tmp_path / "cut" / NAME).read_text().splitlines()}        # kept, time and all
    assert not list((tmp_path / "cut").glob("*.part*"))


def interrupted(command, out, monkeypatch, images=3):
    """A run that gets a Ctrl-C while it works on the image after so many; returns its exit status."""
    original, calls = c.generator_for, []

    def generator(seed, index, phase, device):
        calls.append(index)
        if len(calls) > 2 * images:
            raise KeyboardInterrupt
        return original(seed, index, phase, device)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as status:
        patch.setattr(c, "generator_for", generator)
        main(command(out))
    return status.value.code


def test_ctrl_c_is_one_line_and_the_run_can_be_resumed(reference, command, tmp_path, monkeypatch, capsys):
    assert interrupted(command, tmp_path, monkeypatch) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "certify.py: interrupted; the same command continues"
    assert not (tmp_path / NAME).exists() and (tmp_path / f"{NAME}.part0").read_text().count("\n") == 3
    main(command(tmp_path))
    assert "3 of 7" in capsys.readouterr().out
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)


@pytest.mark.parametrize("torn", [
    "275\t3", "275\t3\t-1\t0.000000\t0\t0:00:01\t120\t300\t0.25\t0.05\t3\t90\t10\t-1\t-", "2", "\n"])
def test_a_torn_line_in_any_part_is_done_again(reference, unfinished, command, tmp_path, torn):
    copied(unfinished, tmp_path)
    done = (tmp_path / f"{NAME}.part0").read_text().splitlines(keepends=True)
    (tmp_path / f"{NAME}.part0").write_text("".join(done[:2]) + torn)
    (tmp_path / f"{NAME}.part11").write_text("".join(done[1:]) + torn)                    # from a run of more processes
    main(command(tmp_path))
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert not list(tmp_path.glob("*.part*"))


def test_rows_of_an_interrupted_run_are_not_done_again(command, unfinished, tmp_path, monkeypatch):
    copied(unfinished, tmp_path)
    seen, original = set(), c.generator_for
    monkeypatch.setattr(c, "generator_for", lambda seed, index, *rest: seen.add(index) or original(seed, index, *rest))
    main(command(tmp_path))
    assert seen == {165, 220, 275, 330}


@pytest.mark.parametrize(("flag", "value", "words"), [
    ("--alpha", "0.01", ("alpha", "0.05", "0.01")), ("--seed", "1", ("seed", "0", "1")), ("--n", "400", ("n 300", "400")),
    ("--n0", "60", ("n0", "50", "60")), ("--sequential", None, ("sequential",)), ("--sound", None, ("sound",)),
    ("--skip", "40", ("skip", "55", "40")), ("--max", "6", ("max", "None", "6")),
    ("--dtype", "bf16", ("dtype", "fp32", "bf16")), ("--batch", "50", ("batch", "100", "50")),
    ("--bound", "two-sided", ("bound", "one-sided", "two-sided"))])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(command, reference, unfinished, tmp_path, capsys, flag, value, words, finished):
    before = files(copied(reference if finished else unfinished, tmp_path))
    refused(command(tmp_path, flag, *[value] * (value is not None)), capsys, "other settings", "--out", *words)
    assert files(tmp_path) == before


def perturbed(checkpoint, path, **other):
    content = torch.load(checkpoint)
    generator = torch.Generator().manual_seed(1)
    content["model"] = {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in content["model"].items()}
    torch.save(content | other, path)
    return path


def test_another_checkpoint_is_refused_and_a_moved_one_is_not(command, reference, checkpoint, tmp_path, capsys):
    before = files(copied(reference, tmp_path / "run"))
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(checkpoint).read_bytes())
    other = perturbed(checkpoint, tmp_path / "other.pt")
    refused(command(tmp_path / "run", "--checkpoint", other), capsys, "sha256")
    assert files(tmp_path / "run") == before
    main(command(tmp_path / "run", "--checkpoint", moved))
    assert "done" in capsys.readouterr().out


def test_a_run_in_use_is_refused(command, tmp_path, capsys):
    with filelock.FileLock(tmp_path / f".{Path(NAME).stem}.lock"):    # as another process holds it
        refused(command(tmp_path), capsys, "in use")
        assert files(tmp_path) == {}
    main(command(tmp_path, "--max", "1"))


# -- Which images ----------------------------------------------------------------------------------------------------------


def test_skip_and_max_choose_images(command, tmp_path):
    main(command(tmp_path, "--skip", "100", "--max", "3"))
    assert [row["idx"] for row in rows(tmp_path / NAME)] == ["0", "100", "200"]
    main(command(tmp_path / "all", "--skip", "170", "--max", "100"))
    assert [row["idx"] for row in rows(tmp_path / "all" / NAME)] == ["0", "170", "340"]


@pytest.mark.parametrize("shards", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_merged_by_report_are_the_whole(reference, command, tmp_path, capsys, shards):
    for i in range(shards):
        main(command(tmp_path, "--shard", f"{i}/{shards}"))
    parts = sorted(tmp_path.glob("*.tsv"))
    assert len(parts) == shards
    lines = [line for part in parts for line in timeless(part)[1:-1]]
    assert sorted(lines, key=lambda line: int(line[0])) == timeless(reference / NAME)[1:-1]
    tables = []
    for logs in (parts, [*parts, reference / NAME], [reference / NAME]):
        capsys.readouterr()
        main(["--report", *map(str, logs), "--format", "csv"])
        tables.append([line.rsplit(",", 1)[0] for line in capsys.readouterr().out.splitlines()])      # less the mean time
    assert tables[0] == tables[1] == tables[2]


# -- Modes -------------------------------------------------------------------------------------------------------------------


def test_sequential_saves_draws_and_says_so(command, checkpoint, tmp_path, capsys):
    argv = command(tmp_path, "--sequential", "--n", "4000", "--max", "4", "--radii", "0", "0.25", "5")
    main(argv)
    out, err = capsys.readouterr()
    done = rows(tmp_path / NAME)
    draws = [int(row["n"]) for row in done]
    assert all(1000 <= n <= 4000 and n % 100 == 0 for n in draws) and min(draws) < 4000
    assert f"{sum(draws):,}" in out and f"{sum(draws) / 16000:.1%}" in out
    assert "cannot be reached" in err and "r=5" not in out
    rule = c.Sequential(4000, 0.05, 0.25, (0, 0.25))
    trials = {str(t.index): t for t in certify_all(network(checkpoint), [(i, digit(i)) for i in INDICES[:4]],
                                                  GaussianNoise(0.25), 50, rule)}
    for row in done:
        trial = trials[row["idx"]]
        prediction, radius = trial.certificate(0.25)
        assert (row["predict"], row["radius"], row["count"]) == (str(prediction), f"{radius:.6f}", str(trial.k))


def test_sequential_knows_which_radii_its_own_bound_can_reach(command, tmp_path, capsys):
    """With n of n successes its last bound is Clopper-Pearson's at alpha / 2: no image may draw on for a radius above."""
    n, sigma = 2000, 0.25
    fixed, own = (c.certified_radius(c.lower_confidence_bound(n, n, alpha), sigma) for alpha in (0.05, 0.025))
    between = (own + fixed) / 2
    assert own < between < fixed
    main(command(tmp_path, "--sequential", "--n", n, "--max", "1", "--radii", "0", f"{between:.6f}"))
    assert f"above {own:.3f} cannot be reached" in capsys.readouterr().err


def test_a_run_that_can_only_abstain_is_refused_and_told_the_least_n(command, tmp_path, capsys):
    two = ["--bound", "two-sided"]
    for flags, alpha in ((["--sequential"], 0.0005), ([], 0.001), (two, 0.0005), ([*two, "--sequential"], 0.00025)):
        least = next(n for n in range(1, 99) if c.lower_confidence_bound(n, n, alpha) > 0.5)
        refused(command(tmp_path / "run", *flags, "--n", least - 1, "--alpha", "0.001"), capsys, "abstain", f"--n {least} ")


def test_sound_certifies_with_integer_noise(command, checkpoint, tmp_path, monkeypatch):
    def no_floats(*_):
        raise AssertionError("floating-point noise")

    monkeypatch.setattr(GaussianNoise, "__call__", no_floats)
    main(command(tmp_path, "--sound", "--max", "3"))
    grid = c.GridNoise(0.25, 16, torch.device("cpu"))
    assert rows(tmp_path / NAME) == by_hand(network(checkpoint), INDICES[:3], noise=grid)


def picture(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("flag", ["--sound", "--sequential"])
def test_no_mode_is_silently_dropped_for_pictures(command, tmp_path, monkeypatch, flag):
    """--images with --sound or --sequential: done in that mode, or refused."""
    used = []
    for kind in (c.GridNoise, c.Sequential):
        original = kind.__init__
        monkeypatch.setattr(kind, "__init__", lambda self, *a, _of=original: used.append(type(self)) or _of(self, *a))
    try:
        main(command(tmp_path, "--images", picture(tmp_path / "a.png", np.full((8, 8), 255)), flag))
    except SystemExit as error:
        assert error.code == 2
    else:
        assert used


def test_sound_refuses_a_picture_off_the_grid_or_uses_the_pictures_own(command, tmp_path, monkeypatch):
    """100/255 is not on the grid of sixteenths that the digits have: rounding it would certify another picture."""
    copies = []
    constant = lambda x: copies.append(x.clone()) or torch.eye(10)[[0] * len(x)]
    monkeypatch.setattr(c, "open_classifier", lambda *_: constant)
    try:
        main(command(tmp_path, "--images", picture(tmp_path / "a.png", np.full((8, 8), 100)), "--sound"))
    except SystemExit as error:
        assert error.code == 2 and not copies
    else:
        on_grid = torch.cat(copies) * 255
        assert ((on_grid - on_grid.round()).abs() < 1e-3).all()


def test_pictures_are_certified_as_the_interface_does(command, checkpoint, tmp_path, capsys):
    pixels = [(load_digits().images[TEST + i] * 255 / 16).round() for i in (0, 50, 100)]
    paths = [picture(tmp_path / f"{i}.png", image) for i, image in enumerate(pixels)]
    main(command(tmp_path / "run", "--images", *paths))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and not (tmp_path / "run").exists()
    for line, path, image in zip(lines, paths, pixels, strict=True):
        assert str(path) in line
        x = torch.tensor(image / 255, dtype=torch.float32)[None]
        answers = [certify(network(checkpoint), x, 0.25, 50, 300, 0.05, index=i) for i in range(3)]    # whatever its stream
        assert any(("abstain" in line) if guess == -1 else (f": {guess}" in line and f"{radius:.6f}" in line)
                   for guess, radius in answers)


def test_two_pictures_do_not_share_their_noise(command, tmp_path, monkeypatch):
    """Certificates fail independently only with fresh noise for each picture."""
    streams, original = [], c.generator_for
    monkeypatch.setattr(c, "generator_for", lambda *a: streams.append(a[:3]) or original(*a))
    main(command(tmp_path, "--images", *(picture(tmp_path / f"{i}.png", np.full((8, 8), 50 * i)) for i in (1, 2))))
    assert len(streams) == len({*streams}) == 6


def test_a_picture_of_another_size_is_resized_aloud(command, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3))
    main(command(tmp_path, "--images", picture(tmp_path / "big.png", pixels)))
    out = capsys.readouterr().out
    assert "resized" in out and "8 x 8" in out and len(out.splitlines()) == 2


def test_any_classifier_certifies(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(NEAREST_MEAN)
    argv = [*SMALL, "--dataset", "digits", "--out", str(tmp_path / "run"), "--classifier", f"{tmp_path}/mine.py:"]
    main([*argv[:-1], argv[-1] + "nearest"])
    space = {}
    exec(NEAREST_MEAN, space)
    done = rows(tmp_path / "run" / NAME)
    assert done == by_hand(space["nearest"], INDICES) and sum(row["correct"] == "1" for row in done) >= 4
    before = files(tmp_path / "run")
    refused([*argv[:-1], argv[-1] + "constant"], capsys)              # another function of the same file: another classifier
    assert files(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["net", "through", "wrapped"])
def test_a_classifiers_networks_are_put_into_eval_mode_aloud(tmp_path, capsys, name):
    """Dropout in training mode would make another f in every pass."""
    (tmp_path / "mine.py").write_text("""
import torch
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
def through(images):
    return net(images)
class Wrapper:
    def __init__(self):
        self.network = net
    def __call__(self, images):
        return {"logits": self.network(images)}
wrapped = Wrapper()
""")
    main([*SMALL, "--classifier", f"{tmp_path}/mine.py:{name}", "--out", str(tmp_path / "run"), "--max", "3"])
    assert "mine.py: a Sequential is put into eval mode" in capsys.readouterr().out
    space = {}
    exec((tmp_path / "mine.py").read_text(), space)
    assert rows(tmp_path / "run" / NAME) == by_hand(space["net"].eval(), INDICES[:3])


@pytest.mark.parametrize(("broken", "words", "traceback"), [
    ("return nearest(images) * float('nan')", ("NaN", "fp32"), False), ("return 1 / 0", ("ZeroDivisionError",), True),
    ("raise RuntimeError('no memory left')", ("no memory left",), True)])
def test_a_classifier_that_breaks_later_loses_no_row(tmp_path, capsys, broken, words, traceback):
    """Four passes an image; the third image, 110, gets the broken one. Its author needs to see where it broke."""
    (tmp_path / "mine.py").write_text(NEAREST_MEAN + f"""
def breaking(images):
    global calls
    calls += 1
    if calls > 10:
        {broken}
    return nearest(images)
""")
    with pytest.raises(SystemExit) as status:
        main([*SMALL, "--classifier", f"{tmp_path}/mine.py:breaking", "--out", str(tmp_path / "run")])
    err = capsys.readouterr().err
    assert status.value.code == 1 and ("Traceback" in err and "in breaking" in err) == traceback
    line = err.splitlines()[-1]
    assert line.startswith("certify.py: error: ") and all(word in line for word in ("image 110", *words))
    assert (tmp_path / "run" / f"{NAME}.part0").read_text().count("\n") == 2


def test_two_checkpoints_average_their_logits(command, checkpoint, tmp_path):
    other = perturbed(checkpoint, tmp_path / "other.pt")
    main(command(tmp_path / "both", "--max", "3", "--checkpoint", checkpoint, other))
    one, two = network(checkpoint), network(other)
    expected = by_hand(lambda x: (one(x) + two(x)) / 2, INDICES[:3])
    assert rows(tmp_path / "both" / NAME) == expected
    assert expected not in (by_hand(one, INDICES[:3]), by_hand(two, INDICES[:3]))
    hashes = json.loads((tmp_path / "both" / "certify_sigma_0.25.json").read_text())["sha256"]
    assert hashes == [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in (checkpoint, other)]


def test_any_sigma_certifies_at_another(command, tmp_path, capsys):
    refused(command(tmp_path / "run", "--sigma", "0.5"), capsys, "0.25", "0.5", "--any-sigma")
    assert not (tmp_path / "run").exists()
    main(command(tmp_path / "run", "--sigma", "0.5", "--any-sigma"))
    assert {row["sigma"] for row in rows(tmp_path / "run" / "certify_sigma_0.5.tsv")} == {"0.5"}


# -- Reports -----------------------------------------------------------------------------------------------------------------


def test_report_of_several_sigmas_as_csv_and_plot(reference, tmp_path, capsys):
    cohen = tmp_path / "sigma_1.00"
    cohen.write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n"
                     "0\t3\t3\t3.5\t1\t0:00:12.345678\n20\t1\t-1\t0.0\t0\t0:00:01.0\n")
    before = files(reference)
    main(["--report", str(cohen), str(reference / NAME), "--format", "csv", "--radii", "0", "2.5",
          "--plot", str(tmp_path / "p.png"), "--published", "cifar10"])
    header, ours, theirs, best, *_ = csv.reader(capsys.readouterr().out.splitlines())
    assert header[2:4] == ["r=0", "r=2.5"] and (ours[0], ours[1]) == ("0.25", "7") and ours[3] == "0.0"
    assert theirs[:4] == ["1", "2", "50.0", "50.0"] and theirs[-1] == "6.67" and best[0] == "best" and best[3] == "50.0"
    assert float(best[2]) == max(float(ours[2]), 50)
    assert files(reference) == before and (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_report_of_several_classifiers_at_one_sigma_names_them(reference, command, tmp_path, capsys):
    main(command(tmp_path / "seed_1", "--seed", "1"))
    logs = [str(reference / NAME), str(tmp_path / "seed_1" / NAME)]
    for labels in ([reference.name, "seed_1"], ["ours", "again"]):
        capsys.readouterr()
        main(["--report", *logs, "--format", "csv", *(["--label", *labels] if labels[0] == "ours" else [])])
        lines = [line.split(",") for line in capsys.readouterr().out.splitlines()[1:]]
        assert [line[0] for line in lines] == 2 * [f"0.25 {label}" for label in labels]
        assert [line[1] for line in lines] == ["7", "7", "proven*", "proven*"]
    refused(["--report", *logs, "--label", "one"], capsys, "--label needs a name for each of the 2 folders", reference, tmp_path / "seed_1")


@pytest.mark.parametrize("content", [None, "", "hello\n", "a\tb\n1\t2\n", "\x00\xff\n", "idx\tlabel\tpredict\tradius\n1\n"])
def test_report_of_what_is_no_log_is_refused(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "x.tsv").write_bytes(content.encode("latin1"))
    refused(["--report", tmp_path / "x.tsv"], capsys, "x.tsv")


def test_report_of_no_rows_is_refused(tmp_path, capsys):
    (tmp_path / "x.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n")
    refused(["--report", tmp_path / "x.tsv"], capsys)


@pytest.mark.parametrize(("name", "status"), [("curve.unknown", 2), ("missing/curve.png", 2)])
def test_a_plot_that_cannot_be_written_is_one_line(reference, tmp_path, capsys, name, status):
    refused(["--report", reference / NAME, "--plot", tmp_path / name], capsys, status=status)
    assert not list(tmp_path.iterdir())


# -- Bad input ---------------------------------------------------------------------------------------------------------------

BAD = {
    "sigma zero": ["--sigma", "0"], "sigma negative": ["--sigma", "-0.25"], "sigma nan": ["--sigma", "nan"],
    "sigma infinite": ["--sigma", "inf"], "sigma a word": ["--sigma", "much"], "sigma alone": ["--sigma"],
    "alpha 0": ["--alpha", "0"], "alpha 1": ["--alpha", "1"], "alpha nan": ["--alpha", "nan"], "alpha < 0": ["--alpha", "-1"],
    "n 0": ["--n", "0"], "n negative": ["--n", "-5"], "n fraction": ["--n", "1e5"], "n0 0": ["--n0", "0"],
    "only abstention": ["--n", "4"], "another sigma": ["--sigma", "0.5"], "unknown recipe": ["--recipe", "digit"],
    "contradicting dataset": ["--dataset", "cifar10"], "contradicting size": ["--image-size", "16"],
    "unknown data set": ["--dataset", "mnist"], "shard word": ["--shard", "half"], "shard 2/2": ["--shard", "2/2"],
    "shard 0/0": ["--shard", "0/0"], "shard negative": ["--shard", "-1/2"], "empty shard": ["--shard", "8/9"],
    "batch 0": ["--batch", "0"], "batch 30": ["--batch", "30"], "batch 150": ["--batch", "150"],
    "skip 0": ["--skip", "0"], "max 0": ["--max", "0"], "seed negative": ["--seed", "-1"], "unknown flag": ["--fast"],
    "radius negative": ["--radii", "-1"],
    "radius nan": ["--radii", "nan"], "tolerance": ["--boundary-tolerance", "-1"], "device": ["--device", "tpu"],
    "checkpoint without value": ["--checkpoint"], "no classifier file": ["--classifier", "none.py:f"],
    "seed beyond 32 bits": ["--seed", str(2**32)], "both bounds": ["--bound", "both"], "no bound": ["--bound", "three-sided"],
    "plot of a run": ["--plot", "x.png"], "label of a run": ["--label", "DMAE"], "format of a run": ["--format", "csv"],
    "published results of a run": ["--published", "cifar10"], "gone": ["--resume", "never"],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_one_line_with_status_2_and_write_nothing(command, tmp_path, capsys, kind):
    refused(command(tmp_path / "run", *BAD[kind]), capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sigma", ["0", "-1", "nan", "inf", "much", "1e400"])
def test_bad_sigma_without_a_checkpoint_is_about_sigma(tmp_path, capsys, sigma):
    refused(["--out", tmp_path / "run", "--sigma", sigma], capsys, "sigma")
    assert not (tmp_path / "run").exists()


def test_sigma_is_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused([], capsys, "--sigma")
    assert not list(tmp_path.iterdir())


def test_the_least_n_that_is_named_suffices_and_one_less_does_not(command, tmp_path, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(command(tmp_path / "run", "--n", "2", "--alpha", "0.001"))
    least = int(re.search(r"--n (\d+)", capsys.readouterr().err)[1])
    assert 0.001 ** (1 / least) > 0.5 >= 0.001 ** (1 / (least - 1))
    main(command(tmp_path / "run", "--n", least, "--alpha", "0.001", "--max", "1"))


def test_damaged_and_foreign_checkpoints_are_refused(command, checkpoint, tiny_run, tmp_path, capsys):
    def wrong(path, *words):
        refused(command(tmp_path / "run", "--checkpoint", path), capsys, path, *words)
        assert not (tmp_path / "run").exists()

    content = Path(checkpoint).read_bytes()
    for part in (content[: len(content) // 2], content[:100], b"", b"hello\n" * 50):
        (tmp_path / "damaged.pt").write_bytes(part)
        wrong(tmp_path / "damaged.pt")
    wrong(tmp_path / "missing.pt")
    wrong(tmp_path)
    wrong(tiny_run / "pretrain.pt", "finetune")
    whole = torch.load(checkpoint)
    for name, other in (("list.pt", [1, 2]), ("bare.pt", whole["model"]), ("nothing.pt", {"model": {}})):
        torch.save(other, tmp_path / name)
        wrong(tmp_path / name)
    for name in ("nan.pt", "left.pt", "missing_key.pt", "shape.pt"):
        model = dict(whole["model"])
        if name == "nan.pt":
            model["head.bias"] = model["head.bias"] * float("nan")
        if name == "left.pt":
            model["extra"] = torch.zeros(1)
        if name == "missing_key.pt":
            del model["head.bias"]
        if name == "shape.pt":
            model["head.bias"] = torch.zeros(11)
        torch.save(whole | {"model": model}, tmp_path / name)
        wrong(tmp_path / name)


@pytest.mark.parametrize("key", ["config", "data", "settings", "sigma"])
def test_a_checkpoint_that_says_it_is_ours_and_lacks_a_part_is_refused(command, checkpoint, tmp_path, capsys, key):
    torch.save({k: v for k, v in torch.load(checkpoint).items() if k != key}, tmp_path / "other.pt")
    refused(command(tmp_path / "run", "--checkpoint", tmp_path / "other.pt"), capsys, "other.pt")
    assert not (tmp_path / "run").exists()


def test_two_checkpoints_must_agree(command, checkpoint, tmp_path, capsys):
    whole = torch.load(checkpoint)
    for name, other in (("sigma", {"sigma": 0.5}), ("classes", {"data": whole["data"] | {"classes": list("abcdefghij")}}),
                        ("dataset", {"data": whole["data"] | {"dataset": "cifar10", "image_size": 32, "channels": 3}})):
        perturbed(checkpoint, tmp_path / f"{name}.pt", **other)
        refused(command(tmp_path / "run", "--checkpoint", checkpoint, tmp_path / f"{name}.pt"), capsys, tmp_path / f"{name}.pt")


@pytest.mark.parametrize("name", ["", ":", ":not_callable", ":missing"])
def test_a_classifier_that_is_none_is_refused(tmp_path, capsys, name):
    (tmp_path / "mine.py").write_text(NEAREST_MEAN)
    refused(["--sigma", "0.25", "--classifier", f"{tmp_path}/mine.py{name}", "--out", tmp_path / "run"], capsys, "mine.py")
    assert not (tmp_path / "run").exists()


def test_a_classifier_and_a_checkpoint_contradict(command, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(NEAREST_MEAN)
    refused(command(tmp_path / "run", "--classifier", tmp_path / "mine.py:nearest"), capsys, "--checkpoint", "--classifier")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_picture_that_is_none_is_one_line(command, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    refused(command(tmp_path / "run", "--images", tmp_path / "a.png"), capsys, "a.png")
    assert not (tmp_path / "run").exists()
