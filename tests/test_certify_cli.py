"""certify.py from the command line: its files, processes, kills, resuming, and what is refused."""

import csv
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import traceback
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import certify as c
import extras.integer_noise
import extras.pictures
import extras.sequential
import finetune
from certify import certificate, certify, certify_all, generator_for, main
from extras.sequential import sequential
from model import VisionTransformer

COLUMNS = ["idx", "label", "predict", "radius", "correct", "count", "n", "sigma", "alpha", "top",
           "runner_up", "classes", "one_sided", "two_sided"]   # less the time
ROOT, TEST = Path(c.__file__).parent, 1437                     # test images: load_digits()'s rest
STEM, NAME = "certify_sigma_0.25", "certify_sigma_0.25.tsv"
SEQUENTIAL = f"{extras.sequential.__file__}:sequential"
INDICES = range(0, 360, 55)                                    # --skip 55: seven images
SMALL = ["--sigma", "0.25", "--device", "cpu", "--skip", "55", "--N", "300", "--N0", "50",
         "--alpha", "0.05", "--radii", "0", "0.25", "--batch", "100"]
NEAREST_MEAN = f"""
import numpy as np, torch
from sklearn.datasets import load_digits
digits = load_digits()
x, y = digits.images[:{TEST}] / 16, digits.target[:{TEST}]
MEANS = torch.tensor(np.stack([x[y == k].mean(0) for k in range(10)]), dtype=torch.float32)
calls = 0
def nearest(images):
    return -(images - MEANS[None, :]).square().sum((2, 3))
def farthest(images):
    return -nearest(images)
"""


@pytest.fixture
def checkpoint(tiny_run):
    return str(tiny_run / "finetune_sigma_0.25.pt")


@pytest.fixture(scope="module")
def command(tiny_run):
    """command(out, *more): a small run's arguments. Of two equal flags the later counts."""
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
    """As reference, but stopped in the fourth of the seven images; not to be written to."""
    out = tmp_path_factory.mktemp("unfinished")
    original, calls = c.row_of, itertools.count(1)

    def row_of(*arguments):
        if next(calls) > 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(c, "row_of", row_of)
        main(command(out))
    return out


@pytest.fixture
def mine(tmp_path):
    """mine(source) -> FILE of a classifier: the nearest class mean, and what source says."""

    def write(source=""):
        (tmp_path / "mine.py").write_text(NEAREST_MEAN + source)
        return tmp_path / "mine.py"

    return write


def copied(folder, out):
    """A copy of a run, to go on in."""
    return Path(shutil.copytree(folder, out, dirs_exist_ok=True))


def rows(path):
    """The rows as dicts, without the time."""
    lines = csv.DictReader(io.StringIO(Path(path).read_text()), delimiter="\t")
    return [{key: value for key, value in row.items() if key != "time"} for row in lines]


def timeless(path):
    """The file's bytes less the time column."""
    lines = Path(path).read_bytes().split(b"\n")
    return [line.split(b"\t")[:5] + line.split(b"\t")[6:] for line in lines]


def files(folder):
    """{name: content}, less the locks."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name[0] != "."}


def refused(argv, capsys, *words, status=2, by=main):
    """main(argv) ends with `status` and one line on stderr that holds the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        by([*map(str, argv)])
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == status and len(lines) == 1, lines
    assert lines[0].startswith("certify.py: error: ")
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


def by_hand(classifier, indices, procedure=c.fixed_n, n=300, radii=()):
    """What the TSV must say of these test images, through the Python interface."""
    images = [(i, digit(i)) for i in indices]
    trials = certify_all(classifier, images, 0.25, 50, n, 0.05, 0, radii, procedure=procedure)
    labels, result = load_digits().target[TEST:], {}
    for i, _, top, counts, drawn, bounds in trials:
        prediction, radius = certificate(top, *bounds["one-sided"], 0.25)
        k, rivals = int(counts[top]), counts.tolist()
        del rivals[top]
        values = [i, labels[i], prediction, f"{radius:.6f}", int(prediction == labels[i]), k, drawn,
                  0.25, 0.05, top, max(rivals) + drawn - sum(rivals) - k, len(rivals) + 1]
        for bound in c.BOUNDS:
            guess, by_that = certificate(top, *bounds[bound], 0.25)
            values.append(-1 if guess == -1 else f"{by_that:.6f}")
        result[i] = dict(zip(COLUMNS, map(str, values), strict=True))
    return [result[i] for i in indices]


def perturbed(checkpoint, path, **other):
    content = torch.load(checkpoint)
    generator = torch.Generator().manual_seed(1)
    content["model"] = {k: v + 0.05 * torch.randn(v.shape, generator=generator)
                        for k, v in content["model"].items()}
    torch.save(content | other, path)
    return path


# -- The file --------------------------------------------------------------------------------------


def test_the_tsv_is_cohens_with_our_columns_and_holds_what_certify_gives(reference, checkpoint):
    lines = (reference / NAME).read_text().splitlines()
    assert lines[0].split("\t") == [*COLUMNS[:5], "time", *COLUMNS[5:]]
    assert [int(line.split("\t")[0]) for line in lines[1:]] == [*INDICES]
    for line in lines[1:]:
        assert re.fullmatch(r"\d+:\d\d:\d\d(\.\d{6})?", line.split("\t")[5])
    vit = network(checkpoint)
    assert rows(reference / NAME) == by_hand(vit, INDICES)
    for row in rows(reference / NAME)[:3]:                     # and the two-line interface
        i = int(row["idx"])
        prediction, radius = certify(vit, digit(i), 0.25, 50, 300, 0.05, index=i)
        assert (row["predict"], row["radius"]) == (str(prediction), f"{radius:.6f}")


def test_settings_and_a_fingerprint_lie_beside_it(reference, checkpoint):
    settings = json.loads((reference / f"{STEM}.json").read_text())
    expected = dict(
        sigma=0.25, n=300, n0=50, alpha=0.05, seed=0, skip=55, max=0, dataset="digits", size=8,
        procedure="fixed_n", bound="one-sided", batch=100, device="cpu", dtype="fp32",
        recipe="digits", checkpoint=checkpoint)
    assert settings | expected == settings and "radii" not in settings
    noise = torch.randn(100, 1, 8, 8, generator=generator_for(0, 0, 3, torch.device("cpu")))
    with torch.no_grad():
        logits = network(checkpoint)(digit(0) + 0.25 * noise)
    expected = torch.cat([logits[:8], logits.mean(0, keepdim=True)])         # and of all copies
    assert np.allclose(settings["fingerprint"], expected, rtol=1e-5, atol=1e-6)
    with Image.open(reference / f"{STEM}.png") as picture:
        assert picture.format == "PNG"
    assert {*files(reference)} == {NAME, f"{STEM}.json", f"{STEM}.png"}      # no part is left


def test_a_second_directory_gets_the_same_bytes_time_aside(reference, command, tmp_path):
    main(command(tmp_path / "b", "--radii", "0.1"))            # the table's alone
    assert timeless(tmp_path / "b" / NAME) == timeless(reference / NAME)
    main(command(tmp_path / "c", "--seed", "1"))
    assert timeless(tmp_path / "c" / NAME) != timeless(reference / NAME)


def test_the_table_is_printed_with_both_bounds(command, tmp_path, capsys):
    main(command(tmp_path / "new"))
    out = capsys.readouterr().out
    assert f"wrote {tmp_path}/new/{NAME}\n" in out
    done = rows(tmp_path / "new" / NAME)
    for bound in c.BOUNDS:
        column = bound.replace("-", "_")
        right = [float(row[column]) for row in done
                 if row["top"] == row["label"] and float(row[column]) >= 0]
        share = [f"{100 * sum(r >= least for r in right) / 7:.1f}" for least in (0, 0.25)]
        abstained = sum(row[column] == "-1" for row in done) / 7
        (line,) = [line for line in out.splitlines() if bound in line]
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        assert cells == ["0.25", bound, "7", *share, f"{sum(right) / 7:.3f}", f"{abstained:.1%}"]


def test_repeated_it_prints_the_table_and_changes_nothing(command, reference, tmp_path, capsys):
    before = files(copied(reference, tmp_path))
    capsys.readouterr()
    main(command(tmp_path))
    assert "ACR" in capsys.readouterr().out and files(tmp_path) == before


def test_of_a_finished_run_rank_0_alone_prints_the_table(reference, process, tmp_path):
    """Any rank removes a part that was left behind."""
    copied(reference, tmp_path)
    (tmp_path / f"{NAME}.part0-1-1-2").touch()
    assert "ACR" not in process(tmp_path, 0, 1, 1, 2)
    assert files(tmp_path) == files(reference)
    assert "ACR" in process(tmp_path, 0, 1, 0, 2)


def test_a_classifier_never_sees_a_label(reference, command, tmp_path, monkeypatch):
    original = c.open_images

    def shuffled(*arguments):
        images = original(*arguments)
        shift = 1 + torch.arange(len(images.labels)) % 9       # every label is wrong
        return images._replace(labels=(images.labels + shift) % 10)

    monkeypatch.setattr(c, "open_images", shuffled)
    main(command(tmp_path))
    ours, theirs = rows(tmp_path / NAME), rows(reference / NAME)
    assert all(a["label"] != b["label"] for a, b in zip(ours, theirs, strict=True))
    for row in (*ours, *theirs):
        assert row.pop("correct") == str(int(row.pop("label") == row["predict"]))
    assert ours == theirs


@pytest.mark.parametrize("batch", [50, 200])
def test_another_batch_gives_the_same_rows_where_f_does_not_round(mine, tmp_path, batch):
    for size in (100, batch):
        main([*SMALL, "--classifier", f"{mine()}:nearest", "--out", str(tmp_path / str(size)),
              "--batch", str(size)])
    assert timeless(tmp_path / "100" / NAME) == timeless(tmp_path / str(batch) / NAME)


def test_any_classifier_certifies(mine, tmp_path):
    main([*SMALL, "--out", str(tmp_path / "run"), "--classifier", f"{mine()}:nearest"])
    space = {}
    exec(NEAREST_MEAN, space)
    done = rows(tmp_path / "run" / NAME)
    assert done == by_hand(space["nearest"], INDICES)
    assert sum(row["correct"] == "1" for row in done) >= 4


def test_the_committed_rows_are_those_of_the_committed_classifier(tmp_path):
    """Of another kind of CPU a few counts may differ."""
    folder = ROOT / "results/digits"
    main(["--sigma", "0.25", "--checkpoint", str(folder / "finetune_sigma_0.25.pt"), "--device",
          "cpu", "--out", str(tmp_path), "--max", "3"])
    for ours, theirs in zip(rows(tmp_path / NAME), rows(folder / NAME)[:3], strict=True):
        for key in ("idx", "label", "predict", "correct", "n", "sigma", "alpha", "top", "classes"):
            assert ours[key] == theirs[key]
        assert abs(int(ours["count"]) - int(theirs["count"])) <= 3


def test_another_sigma_than_the_checkpoints_is_a_note(command, tmp_path, capsys):
    main(command(tmp_path, "--sigma", "0.5", "--max", "1"))
    assert "was fine-tuned for sigma 0.25" in capsys.readouterr().out
    assert {row["sigma"] for row in rows(tmp_path / "certify_sigma_0.5.tsv")} == {"0.5"}


# -- Which images, which flags ---------------------------------------------------------------------


def test_skip_and_max_choose_images(command, tmp_path):
    main(command(tmp_path, "--skip", "100", "--max", "3"))
    assert [row["idx"] for row in rows(tmp_path / NAME)] == ["0", "100", "200"]
    main(command(tmp_path / "all", "--skip", "170", "--max", "100"))
    assert [row["idx"] for row in rows(tmp_path / "all" / NAME)] == ["0", "170", "340"]


def test_cohens_names_of_flags_are_other_names(command, tmp_path):
    main(command(tmp_path, "--N", "200", "--N0", "20", "--limit", "2"))
    settings = json.loads((tmp_path / f"{STEM}.json").read_text())
    assert (settings["n"], settings["n0"], settings["max"]) == (200, 20, 2)
    assert [row["n"] for row in rows(tmp_path / NAME)] == ["200", "200"]


# -- Processes that never talk ---------------------------------------------------------------------


@pytest.fixture
def process(command, monkeypatch, capsys):
    """process(out, job, jobs, rank, world, *more) -> what that process of a job array prints."""

    def run(out, job=0, jobs=1, rank=0, world=1, *more):
        with monkeypatch.context() as patch:
            patch.setattr(c, "RANK", rank)
            patch.setattr(c, "WORLD", world)
            capsys.readouterr()
            main(command(out, "--shard", f"{job}/{jobs}", *more))
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("order", [
    [(0, 2, 0, 1), (1, 2, 0, 1)], [(2, 3, 0, 1), (0, 3, 0, 1), (1, 3, 0, 1)],
    [(0, 1, 1, 2), (0, 1, 0, 2)], [(1, 2, 1, 2), (0, 2, 0, 1), (1, 2, 0, 2)]])
def test_whoever_finds_all_rows_merges(reference, process, tmp_path, order):
    """Jobs and processes share images by a stride; the others say how many of 7 are there."""
    there = 0
    for job, jobs, rank, world in order[:-1]:
        said = process(tmp_path, job, jobs, rank, world)
        part = tmp_path / f"{NAME}.part{job}-{jobs}-{rank}-{world}"
        share = [*INDICES][job + rank * jobs::jobs * world]
        assert [int(line.split("\t")[0]) for line in part.read_text().splitlines()] == share
        there += len(share)
        assert f"{there} of 7 images are there\n" in said and not (tmp_path / NAME).exists()
    said = process(tmp_path, *order[-1])
    assert f"wrote {tmp_path / NAME}" in said and "ACR" in said
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert {*files(tmp_path)} == {*files(reference)}


def test_other_numbers_of_jobs_and_processes_leave_out_what_is_done(
        reference, unfinished, process, tmp_path, monkeypatch):
    """Shares are strides of all images; what is finished is left out only after that."""
    seen, original = [], c.generator_for
    watch = lambda seed, index, *rest: seen.append(index) or original(seed, index, *rest)
    monkeypatch.setattr(c, "generator_for", watch)
    copied(unfinished, tmp_path)                               # 0, 55 and 110 are done
    process(tmp_path, 1, 2)
    assert {*seen} - {0} == {165, 275}                         # of 55, 165, 275
    process(tmp_path, 0, 1, 1, 2)
    assert {*seen} - {0} == {165, 275}                         # of 55, 165, 275: nothing is left
    process(tmp_path, 2, 3)
    assert {*seen} - {0} == {165, 275}                         # of 110, 275
    process(tmp_path)
    assert {*seen} - {0} == {165, 220, 275, 330}
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert {*files(tmp_path)} == {*files(reference)}


def test_of_a_row_that_two_jobs_made_the_first_counts(reference, unfinished, command, tmp_path):
    copied(unfinished, tmp_path)
    done = (tmp_path / f"{NAME}.part0-1-0-1").read_text().splitlines(keepends=True)
    later = "".join(re.sub(r"\t\d+:\d\d:[\d.]+\t", "\t9:59:59\t", line) for line in done[1:])
    (tmp_path / f"{NAME}.part1-4-0-1").write_text(later)
    main(command(tmp_path))
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert (tmp_path / NAME).read_text().splitlines(keepends=True)[1:4] == done


def test_a_job_without_images_has_nothing_to_do(process, tmp_path):
    assert "0 of 7 images are there\n" in process(tmp_path, 8, 9)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_tsv_does_not_depend_on_the_number_of_processes(
        reference, command, torchrun, tmp_path, processes):
    """Seven images: an uneven share for two processes and for three."""
    job = torchrun(processes, ROOT / "certify.py", *command(tmp_path))
    out = job.communicate(timeout=300)[0]
    assert job.returncode == 0, out
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert {*files(tmp_path)} == {*files(reference)}
    assert out.count("ACR") == out.count("wrote") == 1         # one of them merges


@pytest.mark.slow
def test_jobs_of_different_sizes_at_the_same_time(reference, command, torchrun, tmp_path):
    jobs = [torchrun(processes, ROOT / "certify.py", *command(tmp_path, "--shard", f"{job}/2"))
            for job, processes in ((0, 2), (1, 1))]
    said = "".join(job.communicate(timeout=300)[0] for job in jobs)
    assert [job.returncode for job in jobs] == [0, 0], said
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert said.count("wrote") == 1 and {*files(tmp_path)} == {*files(reference)}


def test_a_part_in_use_is_refused(command, tmp_path, capsys):
    tmp_path.joinpath("run").mkdir()
    with filelock.FileLock(tmp_path / f"run/.{NAME}.lock0-1-0-1"):           # of another process
        refused(command(tmp_path / "run"), capsys, "lock0-1-0-1", status=1)
        assert not list((tmp_path / "run").glob("*.part*"))
        main(command(tmp_path / "run", "--shard", "0/2"))      # another part is free
    main(command(tmp_path / "run"))


# -- Killed anywhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [
    "275\t3", "275\t3\t-1\t0.000000\t0\t0:00:01\t120\t300\t0.25\t0.05\t3\t90\t10\t-1\t-", "2",
    "275\t3\t-1\t0.0\t0\t0:00:01\t120\t300\t0.25\t0.05\t3\t90\t10\t-1\t-1", "\n"])
def test_a_torn_row_in_any_part_is_done_again(reference, unfinished, command, tmp_path, torn):
    """Also one that only lacks its end of line, and one to which another row was glued."""
    copied(unfinished, tmp_path)
    part = tmp_path / f"{NAME}.part0-1-0-1"
    done = part.read_text().splitlines(keepends=True)
    part.write_text("".join(done[:2]) + torn)
    (tmp_path / f"{NAME}.part3-8-1-2").write_text("".join(done[1:]) + torn)
    (tmp_path / f"{NAME}.part5-8-0-1").write_text(torn.strip() + done[0])
    main(command(tmp_path))
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert not list(tmp_path.glob("*.part*"))


def test_nobody_merges_while_a_torn_row_is_cut_off(command, unfinished, tmp_path, monkeypatch):
    """Whoever merges removes the parts."""
    copied(unfinished, tmp_path)
    truncate, cut = os.truncate, []

    def watched(path, size):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(tmp_path / f".{NAME}.lock").acquire(blocking=False)
        cut.append(truncate(path, size))

    monkeypatch.setattr(os, "truncate", watched)
    main(command(tmp_path))
    assert len(cut) == 1


def test_rows_of_a_stopped_run_are_not_done_again(command, unfinished, tmp_path, monkeypatch):
    copied(unfinished, tmp_path)
    seen, original = set(), c.generator_for
    watch = lambda seed, index, *rest: seen.add(index) or original(seed, index, *rest)
    monkeypatch.setattr(c, "generator_for", watch)
    main(command(tmp_path))
    assert seen == {0, 165, 220, 275, 330}                     # 0 for the fingerprint


def test_what_a_kill_left_undone_after_the_last_row_is_done(command, reference, tmp_path, capsys):
    """The TSV is there, its picture is not, and a part is still there."""
    copied(reference, tmp_path)
    (tmp_path / f"{STEM}.png").unlink()
    (tmp_path / f"{NAME}.part1-2-0-1").write_text("".join((tmp_path / NAME).open().readlines()[1:]))
    main(command(tmp_path))
    assert {*files(tmp_path)} == {*files(reference)}
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)
    assert "ACR" in capsys.readouterr().out


LINEAR = """
import torch
W = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
f = lambda x: x.flatten(1) @ W
"""


class Moments:
    """A process's appends, truncations, renames and unlinks; at one of them it kills itself."""

    def __init__(self, last):
        self.last, self.passed = last, 0

    def now(self):
        self.passed += 1
        if self.passed == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        @functools.wraps(function)
        def wrapped(*arguments, **more):
            self.now()
            result = function(*arguments, **more)
            self.now()
            return result
        return wrapped

    def open(self, path, mode="r"):
        return TwoHalves(self, path) if mode == "a" else open(path, mode)


class TwoHalves(io.TextIOWrapper):
    """A text file to append to, where a row reaches the disk in two halves."""

    def __init__(self, moments, path):
        super().__init__(open(path, "ab"))                     # noqa: SIM115
        self.moments = moments

    def write(self, row):
        self.moments.now()
        for half in (row[:len(row) // 2], row[len(row) // 2:]):
            super().write(half)
            self.flush()
            self.moments.now()


def start(argv, last=0, rank=0, world=1):
    """A forked process `rank` of `world` of certify.py, which dies at its moment `last`."""
    def run():
        moments = Moments(last)
        c.RANK, c.WORLD, c.open = rank, world, moments.open
        os.replace, os.truncate = moments.around(os.replace), moments.around(os.truncate)
        Path.unlink = moments.around(Path.unlink)
        c.plot = lambda path, curves: Path(path).touch()       # which would take longest
        sys.stdout = sys.stderr = open(os.devnull, "w")        # noqa: SIM115
        main(argv)

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    return child


def ended(child):
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode == 0


@pytest.fixture
def array(tmp_path, monkeypatch):
    """(argv(out, job, jobs), the rows of an undisturbed run) of a classifier that is quick."""
    (tmp_path / "linear.py").write_text(LINEAR)
    monkeypatch.setattr(c, "open_images", functools.cache(c.open_images))    # for all that fork

    def argv(out, job=0, jobs=1):
        return ["--sigma", "0.25", "--classifier", f"{tmp_path}/linear.py:f", "--device", "cpu",
                "--skip", "30", "--n", "100", "--batch", "100", "--out", f"{tmp_path}/{out}",
                "--shard", f"{job}/{jobs}"]

    main(argv("whole"))
    return argv, timeless(tmp_path / "whole" / NAME)


def is_whole(out, expected):
    """Exactly the chosen images, each once, with the rows of an undisturbed run; no part left."""
    return (timeless(out / NAME) == expected and len(expected) == 12 + 2
            and {*files(out)} == {NAME, f"{STEM}.json", f"{STEM}.png"})


@pytest.mark.slow
@pytest.mark.parametrize(("torn_at", "moments"), [(0, 2 + 12 * 3 + 2 + 2), (22, 2 + 6 * 3 + 2 + 2)])
def test_a_kill_at_every_append_rename_and_unlink_changes_nothing(
        array, tmp_path, torn_at, moments):
    """Of a new run, and of one that goes on behind half of the seventh row, and cuts it off."""
    argv, expected = array
    for last in itertools.count(1):
        out = tmp_path / str(last)
        if torn_at:
            assert not ended(start(argv(last), torn_at))
        survived = ended(start(argv(last), last))
        assert ended(start(argv(last))) and is_whole(out, expected)
        if survived:
            break
    assert last == moments + 1


@pytest.mark.parametrize("trials", [
    pytest.param(8, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)])
def test_jobs_that_are_killed_and_mixed_end_with_the_same_file(array, tmp_path, trials):
    """One, two or three jobs, each of one or two processes, at the same time, any of them killed.

    Then others, until all rows are there.
    """
    argv, expected = array
    deaths = 0
    for trial in range(trials):
        chance, out = random.Random(trial), tmp_path / str(trial)
        while not (out / NAME).exists() or list(out.glob("*.part*")):
            before = len(c.finished_rows(out / NAME))
            jobs = chance.choice((1, 2, 3))
            children = []
            for job in range(jobs):
                world = chance.choice((1, 2))
                for rank in range(world):
                    if chance.random() < 0.8:
                        last = chance.randrange(25)             # 0: it lives
                        children.append(start(argv(trial, job, jobs), last, rank, world))
            deaths += sum(not ended(child) for child in children)
            assert (out / NAME).exists() or len(c.finished_rows(out / NAME)) >= before
        assert ended(start(argv(trial))) and is_whole(out, expected)
    assert deaths >= trials


# -- The same run, or another ----------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "value", "words"), [
    ("--alpha", "0.01", "alpha 0.05 -> 0.01"), ("--seed", "1", "seed 0 -> 1"),
    ("--n", "400", "n 300 -> 400"), ("--n0", "60", "n0 50 -> 60"),
    ("--skip", "40", "skip 55 -> 40"), ("--max", "6", "max 0 -> 6"),
    ("--dtype", "bf16", "dtype fp32 -> bf16"), ("--batch", "50", "batch 100 -> 50"),
    ("--bound", "two-sided", "bound one-sided -> two-sided"),
    ("--procedure", SEQUENTIAL, "procedure fixed_n -> ")])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name(
        command, reference, unfinished, tmp_path, capsys, flag, value, words, finished):
    before = files(copied(reference if finished else unfinished, tmp_path))
    refused(command(tmp_path, flag, value), capsys, "other settings", "--out", words)
    assert files(tmp_path) == before


def test_how_a_run_is_run_may_change(command, reference, unfinished, checkpoint, tmp_path):
    """The checkpoint's place, the radii of the table, the share of the images."""
    copied(unfinished, tmp_path)
    moved = shutil.copy(checkpoint, tmp_path / "moved.pt")
    for job in (0, 1):
        main(command(tmp_path, "--checkpoint", moved, "--radii", "0.1", "--compile", "off",
                     "--shard", f"{job}/2"))
    assert timeless(tmp_path / NAME) == timeless(reference / NAME)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_numbers_of_threads_have_the_same_fingerprint(command, tmp_path, dtype):
    argv = command(tmp_path, "--dtype", dtype, "--max", "1", "--n", "100")
    main(argv)
    torch.set_num_threads(2)
    try:
        main(argv)
    finally:
        torch.set_num_threads(1)


def test_another_checkpoint_is_refused(
        command, reference, unfinished, checkpoint, tmp_path, capsys):
    other = perturbed(checkpoint, tmp_path / "other.pt")
    for folder in (reference, unfinished):
        before = files(copied(folder, tmp_path / folder.name))
        refused(command(tmp_path / folder.name, "--checkpoint", other), capsys,
                "begun by another classifier", "--out")
        assert files(tmp_path / folder.name) == before


@pytest.mark.slow
def test_the_weights_of_the_epoch_before_are_another_classifier(
        command, tiny_run, tmp_path, monkeypatch, capsys):
    original, epochs = finetune.save, []

    def save(path, *arguments, epoch, **rest):
        original(path, *arguments, epoch=epoch, **rest)
        epochs.append(shutil.copy(path, tmp_path / f"{len(epochs)}.pt"))

    monkeypatch.setattr(finetune, "save", save)
    finetune.main(["--sigma", "0.25", "--epochs", "4", "--warmup-epochs", "1", "--save-every", "1",
                   "--init", str(tiny_run / "pretrain.pt"), "--device", "cpu",
                   "--out", str(tmp_path / "tuned")])
    for dtype in ("fp32", "bf16"):
        argv = ["--dtype", dtype, "--max", "1", "--checkpoint"]
        main(command(tmp_path / dtype, *argv, epochs[3]))
        refused(command(tmp_path / dtype, *argv, epochs[2]), capsys, "begun by another classifier")


WEIGHTS = {
    "in functools.cache": """
@functools.cache
def network():
    torch.manual_seed(WHICH)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
f = lambda x: network()(x)
""",
    "in .npy": """
numpy.save(f"{__file__}.npy", numpy.random.default_rng(WHICH).normal(size=(64, 10)))
weights = torch.from_numpy(numpy.load(f"{__file__}.npy")).float()
f = lambda x: x.flatten(1) @ weights
""",
    "in a module beside it": """
pathlib.Path(__file__).with_name("beside.py").write_text("SEED = " + str(WHICH) + WHICH * " ")
import beside
importlib.reload(beside)
weights = torch.randn(64, 10, generator=torch.Generator().manual_seed(beside.SEED))
f = lambda x: x.flatten(1) @ weights
""",
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_changed_while_the_file_did_not_are_refused(
        kind, tmp_path, monkeypatch, capsys):
    """A row of one network and a row of another would stand in one table."""
    first = "import functools, importlib, os, numpy, pathlib, torch\n"
    first += "WHICH = int(os.environ['WHICH'])\n"
    (tmp_path / "mine.py").write_text(first + WEIGHTS[kind])
    argv = [*SMALL, "--classifier", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "run")]
    monkeypatch.setenv("WHICH", "1")
    main([*argv, "--shard", "0/2"])
    before = files(tmp_path / "run")
    monkeypatch.setenv("WHICH", "2")
    refused([*argv, "--shard", "1/2"], capsys, "begun by another classifier: its logits differ")
    assert files(tmp_path / "run") == before
    monkeypatch.setenv("WHICH", "1")
    main([*argv, "--shard", "1/2"])
    assert len(rows(tmp_path / "run" / NAME)) == 7


def test_another_function_of_the_same_file_is_another_classifier(mine, tmp_path, capsys):
    argv = [*SMALL, "--out", str(tmp_path / "run"), "--max", "1", "--classifier"]
    main([*argv, f"{mine()}:nearest"])
    refused([*argv, f"{mine()}:farthest"], capsys, "begun by another classifier")


@pytest.mark.parametrize("finished", [True, False])
def test_rows_without_their_settings_are_refused(
        command, reference, unfinished, tmp_path, capsys, finished):
    copied(reference if finished else unfinished, tmp_path)
    (tmp_path / f"{STEM}.json").unlink()
    before = files(tmp_path)
    refused(command(tmp_path), capsys, f"{STEM}.json is missing")
    assert files(tmp_path) == before


def test_an_unfinished_run_of_the_old_version_is_refused(command, tmp_path, capsys):
    old = ROOT / "results/digits"
    shutil.copy(old / f"{STEM}.json", tmp_path)
    (tmp_path / f"{NAME}.part0").write_text("".join((old / NAME).open().readlines()[1:5]))
    before = files(tmp_path)
    refused(command(tmp_path), capsys, "other settings", "--out")
    assert files(tmp_path) == before


# -- Procedures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", c.BOUNDS)
def test_sequential_saves_draws_and_gives_what_the_interface_does(
        command, checkpoint, tmp_path, bound):
    radii, argv = (0.0, 0.25), ["--procedure", SEQUENTIAL, "--n", "4000", "--max", "4"]
    main(command(tmp_path, *argv, "--bound", bound))
    done = rows(tmp_path / NAME)
    draws = [int(row["n"]) for row in done]
    assert all(1000 <= n <= 4000 and n % 100 == 0 for n in draws) and min(draws) < 4000
    vit = network(checkpoint)
    for row in done:
        i = int(row["idx"])
        prediction, radius = certify(vit, digit(i), 0.25, 50, 4000, 0.05, index=i, bound=bound,
                                     procedure=sequential, radii=radii)
        assert (row["predict"], row["radius"]) == (str(prediction), f"{radius:.6f}")
    if bound == "one-sided":
        assert done == by_hand(vit, INDICES[:4], sequential, 4000, radii)


HALVES = """
from certify import generator_for, lower_confidence_bound, two_sided_bounds

def halves(index, x, sigma, n0, n, alpha, seed, radii, bound):
    # n copies in two requests, of the streams that fixed_n has: its rows, exactly.
    selection = yield index, x, generator_for(seed, index, 0, x.device), n0
    top = int(selection.numpy().argmax())
    generator = generator_for(seed, index, 1, x.device)
    counts = yield index, x, generator, 100
    counts = counts + (yield index, x, generator, n - 100)
    p_a = lower_confidence_bound(int(counts[top]), n, alpha)
    pair = two_sided_bounds(counts, top, n, alpha)
    return top, counts, n, {"one-sided": (p_a, 1 - p_a), "two-sided": pair}
"""


def test_a_procedure_of_ones_own_and_its_settings(reference, command, process, tmp_path, capsys):
    """In the pool, alone and in shards; the radii and the file's content belong to the run."""
    file = tmp_path / "halves.py"
    file.write_text(HALVES)
    argv = ["--procedure", f"{file}:halves"]
    main(command(tmp_path / "run", *argv))
    assert timeless(tmp_path / "run" / NAME) == timeless(reference / NAME)
    settings = json.loads((tmp_path / "run" / f"{STEM}.json").read_text())
    assert settings["procedure"] == f"{file}:halves" and settings["radii"] == [0, 0.25]
    assert settings["procedure_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()

    for job, rank in ((1, 0), (0, 1), (0, 0)):
        process(tmp_path / "jobs", job, 2, rank, 2 - job, *argv)
    assert timeless(tmp_path / "jobs" / NAME) == timeless(reference / NAME)

    before = files(tmp_path / "run")
    main(command(tmp_path / "run", *argv))
    other = command(tmp_path / "run", *argv, "--radii", "0.5")
    refused(other, capsys, "radii [0.0, 0.25] -> [0.5]")
    file.write_text(HALVES + "# looks twice\n")
    refused(command(tmp_path / "run", *argv), capsys, "procedure_sha256")
    assert files(tmp_path / "run") == before


def test_an_error_in_a_procedure_keeps_its_traceback_and_all_rows(command, tmp_path):
    broken = HALVES.replace("counts = yield", "1 / (index != 330)\n    counts = yield")
    (tmp_path / "halves.py").write_text(broken)
    with pytest.raises(RuntimeError, match=f"in --procedure {tmp_path}/halves.py:halves") as error:
        main(command(tmp_path / "run", "--procedure", f"{tmp_path}/halves.py:halves"))
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    deepest = traceback.extract_tb(error.value.__cause__.__traceback__)[-1]
    assert deepest.filename == f"{tmp_path}/halves.py"
    part = tmp_path / "run" / f"{NAME}.part0-1-0-1"
    there = [int(line.split("\t")[0]) for line in part.read_text().splitlines()]
    assert there == [*INDICES[:4]]                             # four are in the pool at a time


@pytest.mark.parametrize(("broken", "error", "words"), [
    ("return 0 * nearest(images) / 0", SystemExit, "1"), ("1 / 0", RuntimeError, "mine.py:break"),
    ("raise RuntimeError('no memory left')", RuntimeError, "mine.py:breaking")])
def test_a_classifier_that_breaks_later_loses_no_row(mine, tmp_path, capsys, broken, error, words):
    """Three passes for the check, four an image: the third image, 110, gets the broken one."""
    file = mine(f"""
def breaking(images):
    global calls
    calls += 1
    if calls > 3 + 2 * 4 + 2:
        {broken}
    return nearest(images)
""")
    with pytest.raises(error, match=words) as stop:
        main([*SMALL, "--classifier", f"{file}:breaking", "--out", str(tmp_path / "run")])
    if error is SystemExit:
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 1 and line.startswith("certify.py: error: image 110: ")
        assert "NaN" in line and "fp32" in line
    else:
        assert re.search("zero|no memory left", str(stop.value.__cause__))
    assert (tmp_path / "run" / f"{NAME}.part0-1-0-1").read_text().count("\n") == 2


# -- Programs of extras/ ---------------------------------------------------------------------------


def picture(path, pixels):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pictures(command, tmp_path, capsys):
    """pictures(files, *flags) -> the lines of extras/pictures.py, which writes no file."""

    def run(paths, *more):
        argv = [*map(str, paths), *command(tmp_path / "run", *more)]
        before = {*tmp_path.iterdir()}
        capsys.readouterr()
        extras.pictures.main(argv)
        assert {*tmp_path.iterdir()} == before
        return capsys.readouterr().out.splitlines()[1:]        # less the classes

    return run


@pytest.mark.parametrize(("bound", "more", "how"), [
    ("one-sided", ["--n", "1200"], {}), ("two-sided", ["--n", "1200"], {}),
    ("one-sided", ["--n", "1200", "--procedure", SEQUENTIAL],
     dict(procedure=sequential, radii=(0.0, 0.25)))])
def test_pictures_are_certified_as_the_interface_does(
        pictures, checkpoint, tmp_path, bound, more, how):
    pixels = [(load_digits().images[TEST + i] * 255 / 16).round() for i in (0, 50, 100)]
    paths = [picture(tmp_path / f"{i}.png", image) for i, image in enumerate(pixels)]
    lines = pictures(paths, "--bound", bound, *more)
    for i, (line, path, image) in enumerate(zip(lines, paths, pixels, strict=True)):
        x = torch.tensor(image / 255, dtype=torch.float32)[None]
        vit = network(checkpoint)
        guess, radius = certify(vit, x, 0.25, 50, 1200, 0.05, index=i, bound=bound, **how)
        vote = c.predict(vit, x, 0.25, 1200, 0.05, index=i)
        answer = "abstains" if guess == -1 else f"{guess}, certified within an l2 radius of"
        assert line.startswith(f"{path}: {answer}") and (guess == -1 or f"{radius:.6f}" in line)
        assert line.endswith(f"(without a radius: {'abstains' if vote == -1 else vote})")


def test_two_pictures_do_not_share_their_noise(pictures, tmp_path, monkeypatch):
    """Certificates fail independently only with fresh noise for each picture."""
    streams, original = [], c.generator_for
    monkeypatch.setattr(c, "generator_for", lambda *a: streams.append(a[:3]) or original(*a))
    pictures(picture(tmp_path / f"{i}.png", np.full((8, 8), 50 * i)) for i in (1, 2))
    assert {*streams} == {(0, 0, 3), *itertools.product([0], [0, 1], [0, 1, 2])}
    assert len(streams) == 7


def test_a_picture_of_another_size_is_fitted_aloud(pictures, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3))
    first, second = pictures([picture(tmp_path / "big.png", pixels)])
    assert "fitted to 8 x 8" in first and "big.png: " in second


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_a_picture_that_is_none_is_one_line(command, tmp_path, content):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(OSError, match="cannot read the image .*a.png"):
        extras.pictures.main([str(tmp_path / "a.png"), *command(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_integer_noise_certifies_test_images(command, checkpoint, tmp_path, capsys):
    """Its flags are certify.py's; each image has the stream of its index."""
    extras.integer_noise.main(["0", "55", "110", *command(tmp_path / "run", "--seed", "1")])
    lines = capsys.readouterr().out.splitlines()[1:]
    args = c.argparse.Namespace(sigma=0.25, n0=50, n=300, alpha=0.05, seed=1, bound="one-sided")
    noise = extras.integer_noise.GridNoise(0.25, 16, torch.device("cpu"))
    for i, line in zip((0, 55, 110), lines, strict=True):
        guess, radius = extras.integer_noise.certify_on_grid(
            network(checkpoint), digit(i), noise, i, args)
        answer = "abstains" if guess == -1 else str(guess)
        assert line == f"image {i}: {answer}, radius {radius:.6f}"
    assert not (tmp_path / "run").exists()


def test_integer_noise_has_no_other_procedure(command, tmp_path):
    """A flag is used or refused, never dropped."""
    with pytest.raises(ValueError, match="--procedure"):
        extras.integer_noise.main(["0", *command(tmp_path / "run", "--procedure", SEQUENTIAL)])


# -- Bad input -------------------------------------------------------------------------------------

BAD = {                                                        # the rest is in test_usage.py
    "n fraction": ["--n", "1e5"], "seed beyond 32 bits": ["--seed", str(2**32)],
    "batch 30": ["--batch", "30"], "batch 150": ["--batch", "150"], "alpha 5": ["--alpha", "5"],
    "contradicting dataset": ["--dataset", "cifar10"], "contradicting size": ["--size", "16"],
    "both bounds": ["--bound", "both"], "plot of a run": ["--plot", "x.png"],
    "label of a run": ["--label", "DMAE"], "report of a run": ["--report", "x.tsv"],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_one_line_with_status_2_and_write_nothing(command, tmp_path, capsys, kind):
    refused(command(tmp_path / "run", *BAD[kind]), capsys, BAD[kind][0])
    assert not (tmp_path / "run").exists()


def test_damaged_and_foreign_checkpoints_are_refused(
        command, checkpoint, tiny_run, tmp_path, capsys):
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
    model = whole["model"]
    others = {
        "list": [1, 2], "bare": model, "nothing": {"model": {}},
        "nan": whole | {"model": model | {"head.bias": model["head.bias"] * float("nan")}},
        "left": whole | {"model": model | {"extra": torch.zeros(1)}},
        "key": whole | {"model": {k: v for k, v in model.items() if k != "head.bias"}},
        "shape": whole | {"model": model | {"head.bias": torch.zeros(11)}}}
    for name, other in others.items():
        torch.save(other, tmp_path / f"{name}.pt")
        wrong(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("key", ["config", "data", "settings", "sigma"])
def test_a_checkpoint_that_lacks_a_part_is_refused(command, checkpoint, tmp_path, capsys, key):
    torch.save({k: v for k, v in torch.load(checkpoint).items() if k != key}, tmp_path / "other.pt")
    argv = command(tmp_path / "run", "--checkpoint", tmp_path / "other.pt")
    if key == "sigma":                                         # which need not be the run's
        main(argv)
        assert "fine-tuned for sigma None" in capsys.readouterr().out
        return
    refused(argv, capsys, "other.pt")
    assert not (tmp_path / "run").exists()


def test_a_data_set_with_other_classes_than_the_checkpoint_is_refused(
        command, checkpoint, tmp_path, capsys):
    data = torch.load(checkpoint)["data"]
    for name, classes, words in (
            ("other", [*"abc", *"3456789"], "has other classes than the checkpoint: 0, 1, 2"),
            ("order", [*"1023456789"], "their order")):
        file = perturbed(checkpoint, tmp_path / f"{name}.pt", data=data | {"classes": classes})
        refused(command(tmp_path / "run", "--checkpoint", file), capsys, words)
    assert not (tmp_path / "run").exists()
