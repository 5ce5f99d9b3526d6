"""Killed anywhere, fed anything: nothing lost, nothing wrong, one clear line.

Long variants: pytest -m slow, -m soak.
"""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import certify
import finetune
import pretrain
from certify import fit, open_images, open_picture
from model import VisionTransformer, read_checkpoint

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
STAGES = {"pretrain": pretrain, "finetune": finetune, "certify": certify}
FOLDER = ["--dataset", "folder", "--model", "vit_digits", "--normalisation", "digits",
          "--batch", "10", "--holdout", "20"]
SMALL = {                                        # 10 steps an epoch; 12 images
    "pretrain": [*FOLDER, "--epochs", "6", "--save-every", "2"],
    "finetune": [*FOLDER, "--epochs", "6", "--save-every", "2", "--sigma", "0.25",
                 "--init", "scratch"],
    "certify": ["--sigma", "0.25", "--N", "300", "--N0", "100", "--skip", "30"],
}
RESULT = {
    "pretrain": "pretrain.pt",
    "finetune": "finetune_sigma_0.25.pt",
    "certify": "certify_sigma_0.25.tsv",
}


def slow(*case, marks=pytest.mark.slow):
    return pytest.param(*case, marks=marks)


@pytest.fixture(scope="module")
def command(tiny_run, folder8):
    """(stage, out) -> the arguments of a small run of that stage."""

    def arguments(stage, out):
        source = ["--data-path", str(folder8)]
        if stage == "certify":
            source = ["--checkpoint", str(tiny_run / "finetune_sigma_0.25.pt")]
        return [*SMALL[stage], *source, "--out", str(out), "--device", "cpu"]

    return arguments


def fork(stage, argv, before=lambda: None, errors=os.devnull):
    """The stage in a process of its own, forked, so that nothing has to be imported again."""

    def run():
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")     # noqa: SIM115
        before()
        STAGES[stage].main(argv)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finished(process, seconds=120):
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def killing_at(owner, name, call, number=signal.SIGKILL):
    """A function that lets the process kill itself when it calls owner.name for that time."""

    def prepare():
        real, calls = getattr(owner, name), iter(range(1, 1000))

        def counting(*args, **more):
            if next(calls) == call:
                os.kill(os.getpid(), number)
            return real(*args, **more)

        setattr(owner, name, counting)

    return prepare


def log_rows(out, stage):
    log = (out / RESULT[stage]).with_suffix(".jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(row).items() if key != "time"} for row in log]


def outcome(out, stage):
    """What must not depend on what happened to a run: weights, log and rows, without times."""
    if stage == "certify":
        rows = (line.split("\t") for line in (out / RESULT[stage]).read_text().splitlines())
        return [[*row[:5], *row[6:]] for row in rows]
    weights = read_checkpoint(out / RESULT[stage])["model"]
    return log_rows(out, stage), {key: value.numpy().tobytes() for key, value in weights.items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """stage -> the outcome of a run that nobody touched."""
    found = {}

    def get(stage):
        if stage not in found:
            out = tmp_path_factory.mktemp(stage)
            assert finished(fork(stage, command(stage, out))) == 0
            found[stage] = outcome(out, stage)
        return found[stage]

    return get


# --------------------------------------------------------------------------------------------------
# Stopped
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "number", "kills"), [
    ("pretrain", signal.SIGKILL, 3), ("certify", signal.SIGKILL, 3),
    slow("finetune", signal.SIGKILL, 3),
    *(slow(stage, signal.SIGINT, 3) for stage in STAGES),
    *(slow(stage, number, 20, marks=pytest.mark.soak)
      for stage in STAGES for number in (signal.SIGKILL, signal.SIGINT))])
def test_a_kill_at_random_moments_changes_nothing(
    stage, number, kills, command, undisturbed, tmp_path
):
    """So many kills; a run that ends before all of them were given is followed by another one."""
    expected, moments, done, run = undisturbed(stage), random.Random(kills), 0, 0
    while done < kills:
        out = tmp_path / str(run)
        process = fork(stage, command(stage, out))
        process.join(moments.uniform(0, 0.8))
        if process.exitcode is None:
            os.kill(process.pid, number)
        done += finished(process) != 0
        if done == kills:
            assert finished(fork(stage, command(stage, out))) == 0
        if (out / RESULT[stage]).exists():
            run += 1
            assert finished(fork(stage, command(stage, out))) == 0
            assert outcome(out, stage) == expected
            assert not list(out.glob("*.part*"))
    assert run


@pytest.mark.parametrize(("stage", "calls"), [
    ("pretrain", [1, 1, 2, 2, 3, 3]),
    ("certify", [1, 1, 1, 1]),
    slow("finetune", [1, 1, 2, 2, 3, 3])])
def test_kill_9_around_renames_changes_nothing(stage, calls, command, undisturbed, tmp_path):
    """In turns just before and just after the rename of that number: settings, log, results."""
    expected, argv, deaths = undisturbed(stage), command(stage, tmp_path), 0
    for turn, call in enumerate(calls):

        def die(call=call, late=turn % 2):
            rename, count = os.replace, iter(range(1, 100))

            def replace(*args):
                mine = next(count) == call
                if not mine or late:
                    rename(*args)
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.replace = replace

        deaths += finished(fork(stage, argv, die)) == -signal.SIGKILL
    assert deaths == len(calls) and finished(fork(stage, argv)) == 0
    assert outcome(tmp_path, stage) == expected
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("stage", ["pretrain", "certify"])
def test_kill_9_before_what_is_finished_is_tidied_up_changes_nothing(
    stage, command, undisturbed, tmp_path
):
    expected, argv = undisturbed(stage), command(stage, tmp_path)
    assert finished(fork(stage, argv, killing_at(Path, "unlink", 1))) == -signal.SIGKILL
    assert (tmp_path / RESULT[stage]).exists()
    assert finished(fork(stage, argv)) == 0
    assert outcome(tmp_path, stage) == expected and not list(tmp_path.glob("*.part*"))


def test_kill_9_between_rows_changes_nothing(command, undisturbed, tmp_path):
    """Each run makes two rows; the sixth makes the last two, and merges."""
    expected, argv, deaths = undisturbed("certify"), command("certify", tmp_path), 0
    while not (tmp_path / RESULT["certify"]).exists() and deaths < 20:
        process = fork("certify", argv, killing_at(certify, "row_of", 3))
        deaths += finished(process) == -signal.SIGKILL
    assert deaths == 5 and outcome(tmp_path, "certify") == expected


@pytest.mark.parametrize("stage", ["pretrain", "certify"])
def test_half_a_row_that_a_kill_left_is_cut_off(stage, command, undisturbed, tmp_path):
    argv, name = command(stage, tmp_path), "row_of" if stage == "certify" else "learning_rate"
    killed = fork(stage, argv, killing_at(STAGES[stage], name, 8 if stage == "certify" else 25))
    assert finished(killed) == -signal.SIGKILL
    (rows,) = [*tmp_path.glob("*.part*"), *tmp_path.glob("*.jsonl")]
    lines = rows.read_text().splitlines(keepends=True)
    with open(rows, "a") as file:
        file.write(lines[-1][:len(lines[-1]) // 2])
    assert finished(fork(stage, argv)) == 0
    assert outcome(tmp_path, stage) == undisturbed(stage)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_ends_the_data_workers_and_the_run_goes_on(make_folder, tmp_path):
    """A terminal sends it to all of them."""
    argv = ["--recipe", "cifar10", "--dataset", "folder", "--data-path", make_folder(80),
            "--size", "80", "--model", "vit_cifar_tiny", "--augment", "resized-crop",
            "--batch", "4", "--holdout", "2", "--workers", "2", "--device", "cpu"]

    def start(out, **more):
        line = [sys.executable, ROOT / "pretrain.py", *argv, "--epochs", "9", "--save-every", "1",
                "--out", out]
        return subprocess.Popen(
            [str(part) for part in line], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **more)

    job = start(tmp_path / "cut")
    try:
        for line in job.stdout:
            if line.startswith("epoch 3/"):
                break
        os.killpg(job.pid, signal.SIGINT)
        job.communicate(timeout=60)
        with pytest.raises(ProcessLookupError):                          # nobody is left
            os.killpg(job.pid, 0)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0 and not (tmp_path / "cut" / "pretrain.pt").exists()
    for out in ("cut", "whole"):
        job = start(tmp_path / out)
        output, errors = job.communicate(timeout=300)
        assert job.returncode == 0 and ("continuing" in output) == (out == "cut"), errors
    assert outcome(tmp_path / "cut", "pretrain") == outcome(tmp_path / "whole", "pretrain")


# --------------------------------------------------------------------------------------------------
# Several processes
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def two(torchrun, tmp_path):
    """two(stage, argv, setup, flags) -> the Popen of that stage on two processes.

    They run the lines of code `setup` before. Each leaves its process number in the file pid_RANK,
    and its exit status, unless it is killed, in status_RANK.
    """

    def start(stage, argv, setup="", flags=()):
        worker = tmp_path / "worker.py"
        worker.write_text(f"""
import os, pathlib, signal, sys, time
import {stage} as stage
here, rank = pathlib.Path({str(tmp_path)!r}), os.environ["RANK"]
(here / f"pid_{{rank}}").write_text(str(os.getpid()))
{setup}
try:
    stage.main(sys.argv[1:])
except SystemExit as stop:
    (here / f"status_{{rank}}").write_text(str(stop.code))
    raise
""")
        return torchrun(2, worker, *argv, flags=flags, stderr=subprocess.PIPE)

    return start


def ended_well(job):
    output, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors[-2000:]
    return output


@pytest.fixture(scope="module")
def undisturbed_on_two():
    """{stage: outcome}, filled by who needs it."""
    return {}


SLOWLY = {                                       # so that there is a middle
    "pretrain": "real = stage.learning_rate\n"
                "stage.learning_rate = lambda *a: time.sleep(0.1) or real(*a)",
    "certify": "real = stage.row_of\nstage.row_of = lambda *a: time.sleep(0.5) or real(*a)",
}
SLOWLY["finetune"] = SLOWLY["pretrain"]


@pytest.mark.parametrize(("stage", "number", "to", "continued"), [
    ("pretrain", signal.SIGTERM, "torchrun", "on one"),
    slow("pretrain", signal.SIGTERM, "all", "on two"),
    slow("pretrain", signal.SIGINT, "torchrun", "on two"),
    slow("finetune", signal.SIGTERM, "torchrun", "on two"),
    slow("finetune", signal.SIGINT, "all", "on one"),
    slow("certify", signal.SIGTERM, "all", "on one"),
    slow("certify", signal.SIGINT, "torchrun", "on two")])
def test_a_signal_ends_all_processes_and_the_same_command_goes_on(
    stage, number, to, continued, command, undisturbed, undisturbed_on_two, two, tmp_path
):
    """Sent to torchrun alone, or (a terminal's Ctrl-C; Slurm) to its processes, too: no hang.

    One process draws other noise for training than two did: then the rows before count, and steps.
    """
    out = tmp_path / "run"
    argv = command(stage, out)
    workers = two(stage, argv, SLOWLY[stage])
    begun = Path(RESULT[stage]).with_suffix(".last.pt")
    if stage == "certify":
        begun = f"{RESULT[stage]}.part0-1-1-2"
    end = time.time() + 150
    while not ((out / begun).exists() and (out / begun).stat().st_size):
        assert workers.poll() is None and time.time() < end, workers.communicate()
        time.sleep(0.02)
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in (0, 1)]
    for pid in [workers.pid, *(pids if to == "all" else ())]:
        os.kill(pid, number)
    workers.communicate(timeout=60)
    assert workers.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (out / RESULT[stage]).exists()
    if stage == "certify":
        assert sum(part.read_text().count("\n") for part in out.glob("*.part*")) < 12
    else:
        epoch = read_checkpoint(out / begun)["epoch"]
        before = [row for row in log_rows(out, stage) if row["epoch"] <= epoch]
        assert before[-1]["epoch"] == epoch

    if continued == "on one":
        assert finished(fork(stage, argv)) == 0
    else:
        output = ended_well(two(stage, argv))
        assert stage == "certify" or f"after epoch {epoch}" in output
    if stage == "certify":
        assert outcome(out, stage) == undisturbed(stage)
        return
    log, _ = outcome(out, stage)
    assert [row["step"] for row in log] == [row["step"] for row in undisturbed(stage)[0]]
    assert log[:len(before)] == before
    if continued == "on two":
        if stage not in undisturbed_on_two:
            ended_well(two(stage, command(stage, tmp_path / "whole")))
            undisturbed_on_two[stage] = outcome(tmp_path / "whole", stage)
        assert outcome(out, stage) == undisturbed_on_two[stage]


@pytest.mark.slow
def test_a_refusal_on_two_processes_is_one_line_of_one_of_them(command, two, tmp_path):
    assert finished(fork("pretrain", command("pretrain", tmp_path / "run"))) == 0
    for more, words in ((["--seed", "3"], "seed 0 -> 3"), (["--batch", "15"], "2 processes"),
                        (["--data-path", "nowhere"], "nowhere")):
        workers = two("pretrain", [*command("pretrain", tmp_path / "run"), *more])
        errors = workers.communicate(timeout=300)[1]
        assert workers.returncode != 0
        assert errors.count("pretrain.py: error: ") == 1 and words in errors
        assert 'pretrain.py", line' not in errors
        assert [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.slow
def test_a_probe_on_two_processes_is_measured_as_its_checkpoint_is(command, two, tmp_path, folder8):
    """Its BatchNorm statistics differ from rank to rank; what is saved is what is measured."""
    probe = ["--linear-probe", "--base-lr", "20"]
    ended_well(two("finetune", [*command("finetune", tmp_path / "run"), *probe]))
    log, _ = outcome(tmp_path / "run", "finetune")
    content = read_checkpoint(tmp_path / "run" / RESULT["finetune"])
    model = VisionTransformer(**content["config"])
    model.load_state_dict(content["model"])
    test = open_images("folder", folder8, False, 8, 1, CPU)
    args = SimpleNamespace(seed=0, sigma=0.25, dtype="fp32", workers=0)
    found = finetune.measure(model, test, torch.arange(len(test.labels)), args, CPU)
    assert log[-1]["split"] == "test" and {key: log[-1][key] for key in found} == found


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_a_restart_goes_on(
    command, two, undisturbed, tmp_path, monkeypatch
):
    """Rank 1 kills itself once, in epoch 4; torchrun names it and starts both again.

    With the variable of results/cluster.md: without it they meet at the addresses of the dead.
    """
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    start = time.time()
    workers = two("pretrain", command("pretrain", tmp_path / "run"), """
rate, flag = stage.learning_rate, here / "died"
def learning_rate(step, *rest):
    if step == 35 and rank == "1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, *rest)
stage.learning_rate = learning_rate
""", ["--max-restarts=1"])
    output, errors = workers.communicate(timeout=300)
    assert workers.returncode == 0, errors
    assert time.time() - start < 200 and (tmp_path / "died").exists()
    assert re.search(r"exitcode: -9\).*local_rank: 1", errors) and "after epoch 2" in output
    log, _ = outcome(tmp_path / "run", "pretrain")
    assert [row["step"] for row in log] == [row["step"] for row in undisturbed("pretrain")[0]]


@pytest.mark.parametrize("stage", ["pretrain", "certify"])
def test_a_second_run_in_the_same_directory_is_refused_until_the_first_is_dead(
    stage, command, undisturbed, tmp_path, capsys
):
    """In certification it is one process's part of the rows that no second one may write."""
    argv, name = command(stage, tmp_path), "row_of" if stage == "certify" else "learning_rate"
    waiting = lambda: setattr(STAGES[stage], name, lambda *_: time.sleep(600))
    first = fork(stage, argv, waiting)
    while not [*tmp_path.glob("*.part*"), *tmp_path.glob("*.jsonl")]:
        assert first.is_alive()
        time.sleep(0.05)
    before = contents(tmp_path)
    for more in ([], ["--seed", "3"]):
        with pytest.raises(SystemExit) as stop:
            STAGES[stage].main([*argv, *more])
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "could not be acquired" in error or ("seed 0 -> 3" in error and more)
        assert stop.value.code == (2 if "seed 0 -> 3" in error else 1)
        assert str(tmp_path) in error
    assert contents(tmp_path) == before
    first.kill()
    finished(first)
    assert finished(fork(stage, argv)) == 0
    assert outcome(tmp_path, stage) == undisturbed(stage)


# --------------------------------------------------------------------------------------------------
# Full disks, numbers that are not finite
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["pretrain", slow("finetune")])
def test_a_full_disk_spares_the_checkpoint_before_it(stage, command, undisturbed, tmp_path):
    argv, last = command(stage, tmp_path), (tmp_path / RESULT[stage]).with_suffix(".last.pt")
    killed = fork(stage, argv, killing_at(STAGES[stage], "learning_rate", 25))
    assert finished(killed) == -signal.SIGKILL
    before, limit = last.read_bytes(), last.stat().st_size // 2
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    assert finished(fork(stage, argv, fill, tmp_path / "errors")) == 1
    assert last.read_bytes() == before
    assert "File too large" in (tmp_path / "errors").read_text()
    assert finished(fork(stage, argv)) == 0
    assert outcome(tmp_path, stage) == undisturbed(stage)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_find_different_checkpoints_are_refused(rank, tmp_path, monkeypatch):
    """Two machines without a common disk: one has epoch 2, the other one begins."""
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(pretrain, "RANK", rank)
    monkeypatch.setattr(pretrain, "WORLD", 2)
    monkeypatch.setattr(pretrain, "sum_over_ranks", lambda _: 2)
    monkeypatch.setattr(pretrain, "read_checkpoint", lambda _: dict(
        epoch=2, rows=0, model=model.state_dict(), optimizer=torch.optim.SGD(
            model.parameters(), 0.1).state_dict()))
    if rank == 0:
        (tmp_path / "run.last.pt").touch()
        (tmp_path / "run.jsonl").touch()
    with pytest.raises(ValueError, match="not on a disk that all processes share"):
        pretrain.resume(f"{tmp_path}/run", model, torch.optim.SGD(model.parameters(), 0.1))


def test_a_full_disk_in_the_middle_of_a_row_loses_that_row_alone(command, undisturbed, tmp_path):
    argv, part = command("certify", tmp_path), tmp_path / f"{RESULT['certify']}.part0-1-0-1"

    def fill():
        real = certify.row_of

        def row_of(*args):
            if part.stat().st_size:
                limit = part.stat().st_size + 20                         # less than a row
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return real(*args)

        certify.row_of = row_of

    assert finished(fork("certify", argv, fill, tmp_path / "errors")) == 1
    (*_, error) = (tmp_path / "errors").read_text().splitlines()
    assert error.startswith("certify.py: error: ") and "File too large" in error
    assert part.read_text().count("\n") == 1 and not part.read_text().endswith("\n")
    assert finished(fork("certify", argv)) == 0
    assert outcome(tmp_path, "certify") == undisturbed("certify")


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_may_not_be_written_to_is_named(stage, command, tmp_path, capsys):
    (tmp_path / "shut").mkdir(mode=0o500)
    if os.access(tmp_path / "shut", os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].main(command(stage, tmp_path / "shut" / "run"))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and str(tmp_path / "shut") in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(
    command, undisturbed, tmp_path, monkeypatch, capsys
):
    argv, draw = command("pretrain", tmp_path), pretrain.draw_corruption

    def poisoned(images, grid, *position):
        noise, mask = draw(images, grid, *position)
        return noise * float("inf") if position[1:2] == (32,) else noise, mask

    monkeypatch.setattr(pretrain, "draw_corruption", poisoned)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "loss nan in epoch 4" in error and "--base-lr" in error
    assert read_checkpoint(tmp_path / "pretrain.last.pt")["epoch"] == 2
    monkeypatch.setattr(pretrain, "draw_corruption", draw)
    pretrain.main(argv)
    assert outcome(tmp_path, "pretrain") == undisturbed("pretrain")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_weights_that_are_not_finite_after_a_finite_loss_are_never_saved(
    stage, command, tmp_path, capsys
):
    """An epoch of one step, at a learning rate that is infinite in fp32."""
    argv = [*command(stage, tmp_path), "--batch", "100", "--save-every", "1"]
    argv += ["--warmup-epochs", "0", "--base-lr", "1e300"]
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and error.startswith(f"{stage}.py: error: ")
    assert "not finite" in error or "NaN or infinite logits" in error
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("stage", [pretrain, finetune])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_renamed_into_place(stage, value, tmp_path):
    stage.save(tmp_path / "x.pt", {"weight": torch.ones(3)}, epoch=1)
    before = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(FloatingPointError, match="x.pt"):
        stage.save(tmp_path / "x.pt", {"weight": torch.tensor([1, value, 2])}, epoch=2)
    assert contents(tmp_path) == {"x.pt": before}


# --------------------------------------------------------------------------------------------------
# Checkpoints that were tampered with
# --------------------------------------------------------------------------------------------------


def refused(stage, argv, capsys, statuses=(2,)):
    """The line by which main(argv) was refused, or ""; one, on stderr, and never a traceback."""
    capsys.readouterr()
    try:
        STAGES[stage].main(argv)
    except SystemExit as stop:
        errors = capsys.readouterr().err.strip().splitlines()
        assert stop.code in (0, *statuses), errors
        if not stop.code:
            return ""
        assert len(errors) == 1 and errors[0].startswith(f"{stage}.py: error: "), errors
        return errors[0]
    return ""


@pytest.fixture
def untrained(monkeypatch):
    """The training stages stop where they would open their run directory: all is checked then."""

    def stop(*_):
        raise SystemExit(0)

    for stage in (pretrain, finetune):
        monkeypatch.setattr(stage, "run_directory", stop)


CONSUMERS = {
    "finetune": ("pretrain.pt", ["--sigma", "0.25", "--init"]),
    "certify": ("finetune_sigma_0.25.pt", ["--sigma", "0.25", "--n", "20", "--max", "1",
                                           "--checkpoint"]),
}


class Touch:
    """What a pickle runs when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def damage(content, how, chance, ran):
    model = content["model"]
    decoder = ("decoder", "mask_token")
    key = chance.choice([key for key in model
                         if model[key].ndim > 1 and not key.startswith(decoder)])
    if how == "shape":
        model[key] = model[key][1:]
    if how == "dtype":
        model[key] = model[key].long()
    if how == "nan":
        model[key].view(-1)[0] = float("nan")
    if how == "missing":
        del model[key]
    if how == "extra":
        model["blocks.99.norm1.weight"] = torch.ones(3)
    if how == "no tensors":
        content["model"] = {"weight": "a string"}
    if how == "kind alone":
        for key in ("config", "data", "settings"):
            del content[key]
    if how == "code":
        content["settings"] = Touch(ran)
    return content


WEIGHTS = ("shape", "dtype", "nan", "missing", "extra", "no tensors", "code")


@pytest.mark.parametrize("stage, how", [
    *(("finetune", how) for how in WEIGHTS),
    *(("certify", how) for how in (*WEIGHTS, "kind alone"))])
def test_a_checkpoint_that_was_tampered_with_is_refused(
    tiny_run, stage, how, tmp_path, capsys, untrained
):
    name, argv = CONSUMERS[stage]
    ran, file = tmp_path / "ran", tmp_path / name
    torch.save(damage(read_checkpoint(tiny_run / name), how, random.Random(1), ran), file)
    error = refused(stage, [*argv, str(file), "--out", str(tmp_path / "out")], capsys)
    assert str(file) in error
    assert not ran.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "cuts", "flips"), [
    ("finetune", 10, 10), ("certify", 10, 10), slow("finetune", 50, 50), slow("certify", 50, 50)])
def test_a_checkpoint_that_was_cut_or_flipped_is_refused_or_whole(
    tiny_run, stage, cuts, flips, tmp_path, capsys, untrained
):
    name, argv = CONSUMERS[stage]
    whole, chance, file = (tiny_run / name).read_bytes(), random.Random(2), tmp_path / name
    argv = [*argv, str(file), "--out"]
    for length in [0, 1, 4, *(chance.randrange(len(whole)) for _ in range(cuts))]:
        file.write_bytes(whole[:length])
        assert refused(stage, [*argv, str(tmp_path / "out")], capsys)
    for flip in range(flips):                              # in the archive's headers, at both ends
        flipped = bytearray(whole)
        at = chance.choice([chance.randrange(2000), -1 - chance.randrange(2000)])
        flipped[at] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        refused(stage, [*argv, str(tmp_path / f"out{flip}")], capsys, (1, 2))
    file.unlink()
    file.mkdir()
    assert refused(stage, [*argv, str(tmp_path / "out")], capsys)


@pytest.mark.parametrize("content", ["", "{", '{"seed": 0}'])
@pytest.mark.parametrize("stage", ["pretrain", "certify"])
def test_a_settings_file_that_is_none_is_refused(stage, content, command, tmp_path, capsys):
    file = (tmp_path / RESULT[stage]).with_suffix(".json")
    file.write_text(content)
    assert refused(stage, command(stage, tmp_path), capsys)
    assert file.read_text() == content and not (tmp_path / RESULT[stage]).exists()


# --------------------------------------------------------------------------------------------------
# Pictures and folders
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """A folder with classes a and b in train/ and val/, three 32 x 32 pictures in each."""
    for part in ("train", "val"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(3):
                picture = Image.new("RGB", (32, 32), (40 * i, 99, 200))
                picture.save(tmp_path / part / label / f"{i}.png")
    return tmp_path


def waves(mode="RGB", size=(45, 30)):
    """A smooth picture: what is read of it does not hinge on how a codec rounds."""
    x, y = np.meshgrid(*(np.arange(side) for side in size))
    pixels = np.uint8(127 + 100 * np.sin(np.stack([x / 9, y / 7, (x + y) / 8], axis=-1)))
    return Image.fromarray(pixels).convert(mode)


def turned():
    """Orientation 6: the camera was turned; the picture is to be shown a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return dict(exif=exif)


LOSSLESS, FINE = dict(lossless=True, exact=True), dict(quality=95, subsampling=0)
PICTURES = {                                     # file, kind of picture, how to save it, PSNR
    "RGB": ("odd.png", waves(), {}, 99),
    "grey": ("odd.png", waves("L"), {}, 99),
    "black and white": ("odd.png", waves("1"), {}, 99),
    "palette": ("odd.png", waves("P"), {}, 99),
    "transparent": ("odd.png", waves("RGBA"), {}, 99),
    "transparent grey": ("odd.png", waves("LA"), {}, 99),
    "transparent palette": ("odd.png", waves("P"), dict(transparency=3), 99),
    "1 x 1": ("odd.png", waves(size=(1, 1)), {}, 99),
    "20000 x 20": ("odd.png", waves(size=(20_000, 20)), {}, 99),
    "JPEG": ("odd.jpg", waves(), FINE, 40),
    "grey JPEG": ("odd.jpg", waves("L"), {}, 40),
    "progressive JPEG": ("odd.jpeg", waves(), dict(progressive=True, **FINE), 40),
    "CMYK JPEG": ("odd.jpg", waves("CMYK"), {}, 25),
    "turned JPEG": ("odd.jpg", waves(), FINE | turned(), 40),
    "turned PNG": ("odd.png", waves(), turned(), 99),
    "WEBP": ("odd.webp", waves(), LOSSLESS, 99),
    "transparent WEBP": ("odd.webp", waves("RGBA"), LOSSLESS, 99),
    "BMP": ("odd.bmp", waves(), {}, 99),
    "TIFF": ("odd.tiff", waves(), {}, 99),
    "PPM": ("odd.ppm", waves(), {}, 99),
    "PNG called JPEG": ("odd.jpg", waves(), dict(format="PNG"), 99),
}


def similar(pixels, picture, decibels):
    """Whether uint8 (C, H, W) is the picture, but for rounding."""
    expected = np.atleast_3d(np.asarray(picture)).astype(float)
    height, width, channels = expected.shape
    assert pixels.dtype == torch.uint8 and pixels.shape == (channels, height, width)
    error = np.square(pixels.movedim(0, 2).numpy() - expected).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9)) >= decibels


@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures_are_read_upright_with_three_channels_or_one_of_eight_bits(name, pictures):
    """As what was saved, whose transparency is dropped."""
    file, picture, how, decibels = PICTURES[name]
    file = pictures / "train" / "a" / file
    picture.save(file, **how)
    shown = picture.transpose(Image.Transpose.ROTATE_270) if "exif" in how else picture
    for channels, mode in ((3, "RGB"), (1, "L")):
        read = open_picture(file, channels)
        pixels = torch.from_numpy(np.atleast_3d(np.array(read))).movedim(2, 0)
        assert read.mode == mode and similar(pixels, shown.convert(mode), decibels)
        images = open_images("folder", pictures, True, 32, channels, CPU)
        pixels, labels = images.items.tensors
        assert pixels.shape == (7, channels, 32, 32) and pixels.dtype == torch.uint8
        assert labels.tolist() == images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("size", [
    (45, 30), (30, 45), (300, 301), (64, 20), (37, 37), (32, 40), (8, 8)])
def test_pictures_are_fitted_by_their_shorter_side_and_cropped(size):
    """To 256/224 of what is wanted, bicubic, and the middle of that: against Pillow's own.

    What fits already stays as it is.
    """
    wanted = 32
    width, height = (int(37 * side / min(size)) for side in size)            # 32 * 256 / 224 = 36.6
    left, top = round((width - wanted) / 2), round((height - wanted) / 2)
    expected = waves(size=size).resize((width, height), Image.Resampling.BICUBIC)
    expected = expected.crop((left, top, left + wanted, top + wanted))
    assert similar(fit(waves(size=size), wanted), expected, 40)
    assert similar(fit(expected, wanted), expected, 99)


def put(file, name):
    """A file that is no good picture."""
    noise = Image.effect_noise((64, 64), 50).convert("RGB")
    if name in ("truncated JPEG", "truncated PNG"):
        noise.save(file, name.split()[1])
        file.write_bytes(file.read_bytes()[:600])
    elif name == "empty file":
        file.touch()
    elif name == "text":
        file.write_text("not a picture")
    elif name == "16 bits":
        Image.new("I;16", (32, 32), 40_000).save(file, "PNG")
    elif name == "floating point":
        Image.new("F", (32, 32), 0.5).save(file, "TIFF")
    elif name == "20000 x 20000":
        Image.new("1", (20_000, 20_000)).save(file, "PNG")               # Pillow: an attack


BAD = ["truncated JPEG", "truncated PNG", "empty file", "text", "16 bits", "floating point",
       "20000 x 20000"]
TINY = ["--dataset", "folder", "--recipe", "cifar10", "--model", "vit_cifar_tiny", "--size", "32",
        "--epochs", "1", "--holdout", "0", "--batch", "7", "--device", "cpu", "--data-path"]


@pytest.mark.parametrize(("name", "size"), [
    *((name, 32) for name in BAD), ("text", 80), *(slow(name, 80) for name in BAD)])
def test_bad_pictures_stop_the_run_with_their_name(name, size, pictures, capsys):
    """Where they are kept in memory, and (larger ones) where data workers read them."""
    put(pictures / "train" / "a" / "odd.jpg", name)
    out = pictures / "out"
    argv = [*TINY, str(pictures), "--out", str(out), "--size", str(size)]
    argv += ["--augment", "resized-crop", "--workers", "1"] if size > 64 else []
    error = refused("pretrain", argv, capsys, (1,))
    assert "train/a/odd.jpg" in error and not (out / "pretrain.pt").exists()
    assert out.exists() == (size > 64)


@pytest.mark.parametrize("size", [32, 80])
def test_a_bad_picture_stops_the_certification_with_its_name(size, pictures, capsys):
    put(pictures / "val" / "b" / "1.png", "truncated PNG")
    (pictures / "f.py").write_text("import torch\ndef f(x):\n    return x.flatten(1)[:, :2]\n")
    argv = ["--sigma", "0.25", "--classifier", str(pictures / "f.py:f"), "--dataset", "folder"]
    argv += ["--data-path", str(pictures), "--size", str(size), "--n", "20", "--out"]
    error = refused("certify", [*argv, str(pictures / "out"), "--device", "cpu"], capsys, (1,))
    assert "val/b/1.png" in error and not (pictures / "out" / RESULT["certify"]).exists()


def test_a_picture_that_may_not_be_read_stops_the_run_with_its_name(pictures, capsys):
    file = pictures / "train" / "a" / "0.png"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read everything")
    assert str(file) in refused("pretrain", [*TINY, str(pictures)], capsys, (1,))


@pytest.mark.parametrize(("change", "words"), [
    (lambda root: (root / "train" / "c").mkdir(), "classes c"),
    (lambda root: (root / "val" / "b").rename(root / "val" / "z"), "b, z"),
    (lambda root: (root / "train" / "a" / "again").symlink_to(root / "train" / "a"),
     "reaches a folder twice")],
    ids=["empty class", "other classes", "a link to itself"])
def test_bad_folders_are_refused(change, words, pictures, capsys):
    change(pictures)
    argv = [*TINY, str(pictures), "--batch", "4", "--holdout", "1", "--out", str(pictures / "out")]
    assert words in refused("finetune", [*argv, *BASE["finetune"]], capsys)
    assert not (pictures / "out").exists()


def test_a_certifier_refuses_test_images_of_other_classes(tiny_run, tmp_path, monkeypatch, capsys):
    real = certify.open_images

    def relabelled(*args):
        images = real(*args)
        return images._replace(classes=[*images.classes[:9], "ten"])

    monkeypatch.setattr(certify, "open_images", relabelled)
    argv = ["--sigma", "0.25", "--out", str(tmp_path / "out")]
    argv += ["--checkpoint", str(tiny_run / "finetune_sigma_0.25.pt")]
    assert "9, ten" in refused("certify", argv, capsys)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Any flags
# --------------------------------------------------------------------------------------------------

VALUES = ["0", "1", "2", "7", "-1", "0.5", "0.25", "1e-3", "1e400", "nan", "inf", "", "x", "none",
          "all", "dropped", "digits", "folder", "cifar", "vit_digits", "vit_base", "imagenet",
          "shift", "flip", "0/2", "2/2", "auto", "fp32", "bf16", "cpu", "gaussian", "lam=1",
          "\N{OWL}"]
BASE = {
    "pretrain": [],
    "finetune": ["--sigma", "0.25", "--init", "scratch"],
    "certify": ["--sigma", "0.25", "--max", "1", "--n", "20", "--n0", "5"],
}
FIXED = {"recipe", "out", "init", "checkpoint", "compile", "device", "max", "n", "report", "label",
         "plot"}


@pytest.mark.parametrize(("stage", "calls"), [
    *((stage, 15) for stage in STAGES), *(slow(stage, 60) for stage in STAGES)])
def test_any_flags_give_a_run_or_one_line(stage, calls, tiny_run, tmp_path, capsys, untrained):
    table = STAGES[stage].FLAGS | STAGES[stage].RUN_FLAGS
    names = [f"--{name.replace('_', '-')}" for name in sorted({*table} - FIXED)]
    more = ["--checkpoint", str(tiny_run / RESULT["finetune"])] if stage == "certify" else []
    tried = {True: 0, False: 0}
    how = dict(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    value = st.one_of(st.none(), st.sampled_from(VALUES))

    @settings(max_examples=calls, derandomize=True, **how)
    @given(st.lists(st.tuples(st.sampled_from(names), value), max_size=3))
    def check(chosen):
        out = tmp_path / f"out{sum(tried.values())}"
        flags = [part for flag in chosen for part in flag if part is not None]
        argv = [*BASE[stage], *more, "--out", str(out), "--device", "cpu", *flags]
        bad = bool(refused(stage, argv, capsys))
        tried[bad] += 1
        assert not bad or not out.exists()

    check()
    assert min(tried.values()) > 0
