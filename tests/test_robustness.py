"""Killed anywhere, fed anything: nothing lost, nothing wrong, one clear line. Long variants: pytest -m slow, -m soak."""

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
STAGES = {"pretrain": pretrain, "finetune": finetune, "certify": certify}
TRAIN = ["--dataset", "folder", "--batch", "10", "--holdout", "20", "--log-every", "3"]                      # 10 steps an epoch
SMALL = {"pretrain": [*TRAIN, "--epochs", "4", "--save-every", "12"],
         "finetune": [*TRAIN, "--sigma", "0.25", "--init", "scratch", "--epochs", "3", "--vote-every", "3",
                      "--save-every", "6"],
         "certify": ["--sigma", "0.25", "--n", "300", "--n0", "100", "--skip", "30"]}                        # 12 images
RESULT = {"pretrain": "pretrain.pt", "finetune": "finetune_sigma_0.25.pt", "certify": "certify_sigma_0.25.tsv"}


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
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")                 # noqa: SIM115
        pretrain.draw_loss = pretrain.draw_reconstructions = lambda *_: None              # which would take longest
        before()
        STAGES[stage].main(argv)
    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def finished(process, seconds=120):
    process.join(seconds)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def outcome(out, stage):
    """What a run leaves that must not depend on what happened to it: weights, log and rows, without the times."""
    if stage == "certify":
        rows = (line.split("\t") for line in (out / RESULT[stage]).read_text().splitlines())
        return [[*row[:5], *row[6:]] for row in rows]
    weights = read_checkpoint(out / RESULT[stage])["model"]
    return log_rows(out, stage), {key: value.numpy().tobytes() for key, value in weights.items()}


def log_rows(out, stage):
    log = (out / RESULT[stage]).with_suffix(".jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(row).items() if key != "time"} for row in log]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


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


# --- stopped


@pytest.mark.parametrize(("stage", "number", "kills"), [
    ("pretrain", signal.SIGKILL, 3), ("certify", signal.SIGKILL, 3), slow("finetune", signal.SIGKILL, 3),
    *(slow(stage, signal.SIGTERM, 3) for stage in STAGES),
    *(slow(stage, number, 20, marks=pytest.mark.soak) for stage in STAGES for number in (signal.SIGKILL, signal.SIGTERM))])
def test_a_kill_at_random_moments_changes_nothing(stage, number, kills, command, undisturbed, tmp_path):
    """So many kills; a run that ends before all of them were given is followed by another one."""
    expected, moments, done, run = undisturbed(stage), random.Random(kills), 0, 0
    while done < kills:
        out = tmp_path / str(run)
        process = fork(stage, command(stage, out))
        process.join(moments.uniform(0, 0.6))
        (process.kill if number == signal.SIGKILL else process.terminate)()               # nothing, if it has ended
        done += finished(process) == -number
        if done == kills:
            assert finished(fork(stage, command(stage, out))) == 0
        if (out / RESULT[stage]).exists():
            run += 1
            assert outcome(out, stage) == expected
    assert run


@pytest.mark.parametrize(("stage", "number"), [
    ("pretrain", signal.SIGTERM), ("finetune", signal.SIGINT), ("certify", signal.SIGINT), ("certify", signal.SIGTERM),
    slow("pretrain", signal.SIGINT), slow("finetune", signal.SIGTERM)])
def test_a_signal_in_the_middle_of_a_run_ends_it_at_once(stage, number, command, undisturbed, tmp_path):
    """SIGTERM simply kills; Ctrl-C says so in one line, with the status that shells give it. Nothing is written any more."""
    out, argv = tmp_path / "run", command(stage, tmp_path / "run")
    name, moment = ("format_row", 4) if stage == "certify" else ("learning_rate", 20)     # in the fourth row, the 20th step

    def interrupt():
        real, calls = getattr(STAGES[stage], name), iter(range(1, 100))

        def interrupting(*args):
            if next(calls) == moment:
                (tmp_path / "left").mkdir()
                for file, content in contents(out).items():
                    (tmp_path / "left" / file).write_bytes(content)
                os.kill(os.getpid(), number)
                time.sleep(60)
            return real(*args)
        setattr(STAGES[stage], name, interrupting)
    code = finished(fork(stage, argv, interrupt, tmp_path / "errors"))
    errors = (tmp_path / "errors").read_text()
    if number == signal.SIGINT:
        assert code == 130 and errors == f"{stage}.py: interrupted; the same command continues\n"
    else:
        assert code == -number and not errors
    assert contents(out) == contents(tmp_path / "left")
    assert finished(fork(stage, argv)) == 0
    assert outcome(out, stage) == undisturbed(stage)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_one_line_and_130(make_folder, tmp_path):
    """A terminal sends it to the data workers, too."""
    job = subprocess.Popen(
        [sys.executable, ROOT / "pretrain.py", "--recipe", "cifar10", "--dataset", "folder", "--data-path", make_folder(80),
         "--model", "vit_cifar_tiny", "--image-size", "80", "--model-size", "32", "--augment", "resized-crop", "--batch", "4",
         "--epochs", "1000", "--log-every", "1", "--holdout", "2", "--workers", "2", "--out", tmp_path, "--device", "cpu"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for line in job.stdout:
            if line.startswith("step 3/"):
                break
        os.killpg(job.pid, signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 130 and errors == "pretrain.py: interrupted; the same command continues\n"


@pytest.mark.parametrize("stage", ["pretrain", "certify", slow("finetune")])
def test_kill_9_while_files_are_renamed_changes_nothing(stage, command, undisturbed, tmp_path):
    expected, argv, deaths = undisturbed(stage), command(stage, tmp_path), 0
    for call, early in [(1, True), (1, False), (2, True), (2, False), (3, True), (3, False)]:
        def die(call=call, early=early):
            rename, calls = os.replace, iter(range(1, 100))

            def replace(*args):
                mine = next(calls) == call
                if mine and early:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(*args)
                if mine:
                    os.kill(os.getpid(), signal.SIGKILL)
            os.replace = replace
        deaths += finished(fork(stage, argv, die)) == -signal.SIGKILL
    assert deaths == 6 and finished(fork(stage, argv)) == 0
    assert outcome(tmp_path, stage) == expected
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("where", ["before", "after"])
def test_kill_9_between_rows_changes_nothing(where, command, undisturbed, tmp_path):
    """Just before the third row of a process is written, and just after it."""
    expected, argv, deaths = undisturbed("certify"), command("certify", tmp_path), 0
    name, owner = {"before": ("format_row", certify), "after": ("add", certify.Progress)}[where]

    def die():
        real, calls = getattr(owner, name), iter(range(1, 100))

        def killing(*args):
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)
        setattr(owner, name, killing)
    while not (tmp_path / RESULT["certify"]).exists() and deaths < 20:
        deaths += finished(fork("certify", argv, die)) == -signal.SIGKILL
    assert deaths == {"before": 5, "after": 4}[where] and outcome(tmp_path, "certify") == expected


@pytest.fixture
def two(torchrun, tmp_path):
    """two(stage, argv, setup, flags) -> the Popen of that stage on two processes, after the lines of code `setup`.

    Each leaves its process number in the file pid_RANK, and its exit status, unless it is killed, in status_RANK.
    """
    def start(stage, argv, setup="", flags=()):
        worker = tmp_path / "worker.py"
        worker.write_text(f"""
import os, pathlib, signal, sys, time
import {stage} as stage
here, rank = pathlib.Path({str(tmp_path)!r}), os.environ["RANK"]
(here / f"pid_{{rank}}").write_text(str(os.getpid()))
if hasattr(stage, "draw_loss"):
    stage.draw_loss = stage.draw_reconstructions = lambda *_: None
{setup}
try:
    stage.main(sys.argv[1:])
except SystemExit as stop:
    (here / f"status_{{rank}}").write_text(str(stop.code))
    raise
""")
        return torchrun(2, worker, *argv, flags=flags, stderr=subprocess.PIPE)
    return start


@pytest.fixture(scope="module")
def undisturbed_on_two():
    """{stage: outcome}, filled by who needs it."""
    return {}


SLOWLY = {"certify": "real = stage.format_row\nstage.format_row = lambda *a: time.sleep(0.5) or real(*a)",
          **dict.fromkeys(("pretrain", "finetune"),
                          "rate = stage.learning_rate\nstage.learning_rate = lambda *a: time.sleep(0.1) or rate(*a)")}


@pytest.mark.parametrize(("stage", "number", "to", "continued"), [
    ("pretrain", signal.SIGTERM, "torchrun", "on one"),
    slow("pretrain", signal.SIGTERM, "all", "on two"),
    slow("pretrain", signal.SIGINT, "torchrun", "on two"),
    slow("finetune", signal.SIGTERM, "torchrun", "on two"),
    slow("finetune", signal.SIGINT, "all", "on one"),
    slow("certify", signal.SIGTERM, "all", "on one"),
    slow("certify", signal.SIGINT, "torchrun", "on two")])
def test_a_signal_ends_all_processes(stage, number, to, continued, command, undisturbed, undisturbed_on_two, two, tmp_path):
    """Sent to torchrun alone, or (a terminal's Ctrl-C; Slurm) to its processes, too. No hang, and the same command continues.

    One process draws other noise for training than two did: then the rows before count, and all steps.
    """
    out = tmp_path / "run"
    argv = command(stage, out)
    workers = two(stage, argv, SLOWLY[stage])
    begun = out / (f"{RESULT[stage]}.part1" if stage == "certify" else Path(RESULT[stage]).with_suffix(".last.pt"))
    end = time.time() + 150
    while not (begun.exists() and begun.stat().st_size):
        assert workers.poll() is None and time.time() < end, workers.communicate()
        time.sleep(0.02)
    pids = [int((tmp_path / f"pid_{rank}").read_text()) for rank in (0, 1)]
    for pid in [workers.pid, *(pids if to == "all" else ())]:
        os.kill(pid, number)
    errors = workers.communicate(timeout=60)[1]                       # torchrun would wait for 30 s before it kills them
    assert workers.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not (out / RESULT[stage]).exists() and not list(out.glob("*.tmp"))
    assert 'worker.py", line' not in errors                           # torchrun prints a traceback, and the stage none
    if number == signal.SIGINT:
        assert "interrupted; the same command continues" in errors
    if number == signal.SIGINT and to == "torchrun":                  # else the second Ctrl-C may end the first one's end
        assert [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)] == ["130", "130"]
    if stage == "certify":
        assert sum(part.read_text().count("\n") for part in out.glob("*.part*")) < 12
    else:
        state = read_checkpoint(begun)
        before = log_rows(out, stage)[:state["rows"]]
        assert before[-1]["step"] == state["step"]

    if continued == "on one":
        assert finished(fork(stage, argv)) == 0
    else:
        workers = two(stage, argv)
        output, errors = workers.communicate(timeout=300)
        assert workers.returncode == 0 and "continuing" in output, errors[-2000:]
    if stage == "certify":
        assert outcome(out, stage) == undisturbed(stage)
        return
    log, _ = outcome(out, stage)
    assert [row["step"] for row in log] == [row["step"] for row in undisturbed(stage)[0]]
    assert log[:len(before)] == before
    if continued == "on two":
        if stage not in undisturbed_on_two:
            workers = two(stage, command(stage, tmp_path / "whole"))
            assert workers.communicate(timeout=300) and workers.returncode == 0
            undisturbed_on_two[stage] = outcome(tmp_path / "whole", stage)
        assert outcome(out, stage) == undisturbed_on_two[stage]


@pytest.mark.slow
def test_a_refusal_on_two_processes_is_one_line_and_no_traceback(command, two, tmp_path):
    assert finished(fork("pretrain", command("pretrain", tmp_path / "run"))) == 0
    workers = two("pretrain", [*command("pretrain", tmp_path / "run"), "--seed", "3"])
    errors = workers.communicate(timeout=300)[1]
    assert workers.returncode != 0 and errors.count("pretrain.py: error: ") == 1 and "seed 0 -> 3" in errors
    assert 'pretrain.py", line' not in errors
    assert [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


@pytest.mark.slow
def test_a_probe_on_two_processes_is_measured_as_its_checkpoint_is(command, two, tmp_path, folder8):
    """Its BatchNorm statistics differ from rank to rank; what is logged must be the accuracy of what is saved."""
    probe = ["--linear-probe", "--augment", "none", "--base-lr", "20"]
    workers = two("finetune", [*command("finetune", tmp_path / "run"), *probe])
    errors = workers.communicate(timeout=300)[1]
    assert workers.returncode == 0, errors[-2000:]
    log, _ = outcome(tmp_path / "run", "finetune")
    content = read_checkpoint(tmp_path / "run" / RESULT["finetune"])
    model = VisionTransformer(**content["config"])
    model.load_state_dict(content["model"])
    test = open_images("folder", folder8, False, 8, 1)
    found = finetune.evaluate(model, test, torch.arange(len(test)), 0.25, 100, 250, 0, 0, 1, torch.device("cpu"))
    assert log[-1]["split"] == "test" and [log[-1][key] for key in ("clean", "noisy", "vote")] == [*found]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_a_restart_goes_on(command, two, undisturbed, tmp_path):
    """Rank 1 kills itself once, after the first checkpoint; torchrun names it, starts both again, and they continue."""
    start = time.time()
    workers = two("pretrain", command("pretrain", tmp_path / "run"), """
rate, flag = stage.learning_rate, here / "died"
def learning_rate(step, *rest):
    if step == 30 and rank == "1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, *rest)
stage.learning_rate = learning_rate
""", ["--max-restarts=1"])
    output, errors = workers.communicate(timeout=300)
    assert workers.returncode == 0, errors[-2000:]
    assert time.time() - start < 200 and (tmp_path / "died").exists()
    assert re.search(r"exitcode: -9\).*local_rank: 1", errors) and "after step 24" in output
    log, _ = outcome(tmp_path / "run", "pretrain")
    assert [row["step"] for row in log] == [row["step"] for row in undisturbed("pretrain")[0]]


def test_a_second_run_in_the_same_directory_is_refused_until_the_first_is_dead(command, tmp_path, capsys):
    argv = command("pretrain", tmp_path)
    first = fork("pretrain", argv, lambda: setattr(pretrain, "learning_rate", lambda *_: time.sleep(600)))
    while not (tmp_path / "pretrain.jsonl").exists():
        time.sleep(0.05)
    before = contents(tmp_path)
    for more in ([], ["--overwrite"], ["--seed", "3"]):
        with pytest.raises(SystemExit) as stop:
            pretrain.main([*argv, *more])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and f"{tmp_path}/pretrain is in use by another process" in error and error.count("\n") == 1
    assert contents(tmp_path) == before
    first.kill()
    finished(first)
    assert finished(fork("pretrain", argv)) == 0


@pytest.mark.parametrize("stage", ["pretrain", slow("finetune")])
def test_a_full_disk_spares_the_checkpoint_before_it(stage, command, undisturbed, tmp_path):
    argv, last = command(stage, tmp_path / "run"), (tmp_path / "run" / RESULT[stage]).with_suffix(".last.pt")

    def stop_early():
        STAGES[stage].learning_rate = lambda step, *rest: os.kill(os.getpid(), 9) if step == 20 else rate(step, *rest)
    rate = STAGES[stage].learning_rate
    assert finished(fork(stage, argv, stop_early)) == -signal.SIGKILL
    before, limit = last.read_bytes(), last.stat().st_size // 2
    code = finished(fork(stage, argv, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), tmp_path / "errors"))
    assert code == 1 and last.read_bytes() == before and not list((tmp_path / "run").glob("*.tmp"))
    assert f"cannot write {last}" in (tmp_path / "errors").read_text().splitlines()[-1]
    assert finished(fork(stage, argv)) == 0
    assert outcome(tmp_path / "run", stage) == undisturbed(stage)


def test_a_full_disk_in_the_middle_of_a_row_loses_that_row_alone(command, undisturbed, tmp_path):
    argv, part = command("certify", tmp_path / "run"), tmp_path / "run" / f"{RESULT['certify']}.part0"

    def fill():
        real = certify.Progress.add

        def add(*args):
            limit = part.stat().st_size + 20                          # less than a row
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return real(*args)
        certify.Progress.add = add
    assert finished(fork("certify", argv, fill, tmp_path / "errors")) == 1
    errors = (tmp_path / "errors").read_text()
    assert errors.startswith("certify.py: error: ") and errors.count("\n") == 1
    torn = part.read_text()
    assert torn.count("\n") == 1 and not torn.endswith("\n")
    assert finished(fork("certify", argv)) == 0
    assert outcome(tmp_path / "run", "certify") == undisturbed("certify")


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_that_may_not_be_written_to_is_named(stage, command, tmp_path, capsys):
    (tmp_path / "shut").mkdir(mode=0o500)
    if os.access(tmp_path / "shut", os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].main(command(stage, tmp_path / "shut" / "run"))
    error = capsys.readouterr().err
    assert stop.value.code in (1, 2) and str(tmp_path / "shut") in error and error.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(command, undisturbed, tmp_path, monkeypatch, capsys):
    argv, draw = command("pretrain", tmp_path), pretrain.draw_corruption

    def poisoned(images, patches, *position):
        noise, mask = draw(images, patches, *position)
        return noise * float("inf") if position[1:2] == (30,) else noise, mask
    for name in ("draw_loss", "draw_reconstructions"):
        monkeypatch.setattr(pretrain, name, lambda *_: None)          # which would take longest
    monkeypatch.setattr(pretrain, "draw_corruption", poisoned)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "loss nan at step 33" in error and "lr " in error
    assert read_checkpoint(tmp_path / "pretrain.last.pt")["step"] == 24
    monkeypatch.setattr(pretrain, "draw_corruption", draw)
    pretrain.main(argv)
    assert outcome(tmp_path, "pretrain") == undisturbed("pretrain")


# --- fed


def refused(stage, argv, capsys, statuses=(2,)):
    """The line by which main(argv) was refused, or ""; there must be one, on stderr, and never a traceback."""
    capsys.readouterr()
    try:
        STAGES[stage].main(argv)
    except SystemExit as stop:
        errors = capsys.readouterr().err.strip().splitlines()
        assert stop.code in (0, *statuses), errors
        assert stop.code == 0 or (len(errors) == 1 and errors[0].startswith(f"{stage}.py: error: ")), errors
        return errors[0] if stop.code else ""
    return ""


CONSUMERS = {"finetune": ("pretrain.pt", ["--sigma", "0.25", "--dry-run", "--init"]),
             "certify": ("finetune_sigma_0.25.pt", ["--sigma", "0.25", "--n", "20", "--max", "1", "--checkpoint"])}


def damaged(content, how, chance):
    model = content["model"]
    key = chance.choice([key for key in model if model[key].ndim > 1 and not key.startswith(("decoder", "mask"))])
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
    if how == "config":
        content["config"] = {"dim": -3}
    if how == "data":
        content["data"] = {}
    return content


@pytest.mark.parametrize("stage", CONSUMERS)
@pytest.mark.parametrize("how", ["shape", "dtype", "nan", "missing", "extra", "no tensors", "config", "data"])
def test_a_checkpoint_that_was_tampered_with_is_refused(tiny_run, stage, how, tmp_path, capsys):
    name, argv = CONSUMERS[stage]
    if stage == "finetune" and how in ("config", "data"):
        pytest.skip("fine-tuning takes neither from it")
    torch.save(damaged(read_checkpoint(tiny_run / name), how, random.Random(1)), tmp_path / name)
    assert refused(stage, [*argv, str(tmp_path / name), "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stage", "cuts", "flips"), [
    ("finetune", 10, 10), ("certify", 10, 10), slow("finetune", 50, 50), slow("certify", 50, 50)])
def test_a_checkpoint_that_was_cut_or_flipped_is_refused_or_whole(tiny_run, stage, cuts, flips, tmp_path, capsys):
    name, argv = CONSUMERS[stage]
    whole, chance, file = (tiny_run / name).read_bytes(), random.Random(2), tmp_path / name
    argv = [*argv, str(file), "--out", str(tmp_path / "out"), "--overwrite"]
    for length in [0, 1, 4, *(chance.randrange(len(whole)) for _ in range(cuts))]:
        file.write_bytes(whole[:length])
        assert refused(stage, argv, capsys)
    for _ in range(flips):                                            # in the archive's first and last bytes: its headers
        flipped, at = bytearray(whole), chance.choice([chance.randrange(2000), -1 - chance.randrange(2000)])
        flipped[at] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        refused(stage, argv, capsys)
    file.unlink()
    file.mkdir()
    assert refused(stage, argv, capsys)


def folder(root):
    """Class folders a and b in train/ and val/, three 32 x 32 pictures in each."""
    for part in ("train", "val"):
        for label in "ab":
            (root / part / label).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (32, 32), (40 * i, 99, 200)).save(root / part / label / f"{i}.png")
    return root


def waves(mode="RGB", size=(45, 30)):
    """A smooth picture: what is read of it does not hinge on how a codec rounds."""
    x, y = np.meshgrid(*(np.arange(side) for side in size))
    pixels = np.uint8(127 + 100 * np.sin(np.stack([x / 9, y / 7, (x + y) / 8], axis=-1)))
    return Image.fromarray(pixels).convert(mode)


def turned():
    """The orientation 6: the camera was turned, and the picture is to be shown a quarter to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return dict(exif=exif)


LOSSLESS, FINE = dict(lossless=True, exact=True), dict(quality=95, subsampling=0)
PICTURES = {                                                          # name of the file, kind of picture, how to save it, PSNR
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
    assert pixels.dtype == torch.uint8 and pixels.shape == (expected.shape[2], *expected.shape[:2])
    error = np.square(pixels.movedim(0, 2).numpy() - expected).mean()
    return 10 * np.log10(255**2 / max(error, 1e-9)) >= decibels


@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures_are_read_upright_with_three_channels_or_one_of_eight_bits(name, tmp_path):
    """As what was saved, whose transparency is dropped."""
    file, picture, how, decibels = PICTURES[name]
    file = folder(tmp_path) / "train" / "a" / file
    picture.save(file, **how)
    shown = picture.transpose(Image.Transpose.ROTATE_270) if "exif" in how else picture
    for channels, mode in ((3, "RGB"), (1, "L")):
        read = open_picture(file, channels)
        pixels = torch.from_numpy(np.atleast_3d(np.array(read))).movedim(2, 0)
        assert read.mode == mode and similar(pixels, shown.convert(mode), decibels)
    images = pretrain.keep_small_images(open_images("folder", tmp_path, True, 32, 3), torch.device("cpu"))
    assert images.pixels.shape == (7, 3, 32, 32) and images.pixels.dtype == torch.uint8


@pytest.mark.parametrize("size", [(45, 30), (30, 45), (300, 301), (64, 20), (37, 37), (32, 40), (8, 8)])
def test_pictures_are_fitted_by_their_shorter_side_and_cropped(size):
    """To 256/224 of what is wanted, bicubic, and the middle of that: against pictures drawn at that size. What fits stays."""
    wanted = 32
    width, height = (int(37 * side / min(size)) for side in size)                         # 32 * 256 / 224 is 36.6
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
        Image.new("1", (20_000, 20_000)).save(file, "PNG")            # what Pillow takes for an attack
    elif name == "folder":
        file.mkdir()


BAD = ["truncated JPEG", "truncated PNG", "empty file", "text", "16 bits", "floating point", "20000 x 20000"]
TINY = ["--recipe", "cifar10", "--dataset", "folder", "--model", "vit_cifar_tiny", "--batch", "4", "--holdout", "1",
        "--dry-run"]


@pytest.mark.parametrize(("name", "side"), [*((name, 32) for name in BAD), *(slow(name, 80) for name in BAD)])
def test_bad_pictures_stop_the_run_with_their_name(name, side, tmp_path, capsys):
    """Where they are kept in memory, and (side 80) where data workers read them."""
    put(folder(tmp_path) / "train" / "a" / "odd.jpg", name)
    argv = [*TINY, "--data-path", str(tmp_path), "--holdout", "0", "--batch", "7", "--out", str(tmp_path / "out")]
    if side > 64:
        argv += ["--image-size", str(side), "--model-size", "32", "--augment", "resized-crop", "--workers", "1"]
    error = refused("pretrain", argv, capsys, (1, 2))
    assert "train/a/odd.jpg" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*BAD, "folder"])
def test_bad_pictures_to_certify_are_wrong_use(name, tiny_run, tmp_path, capsys):
    put(tmp_path / "odd.jpg", name)
    error = refused("certify", [*CONSUMERS["certify"][1], str(tiny_run / "finetune_sigma_0.25.pt"), "--images",
                                str(tmp_path / "odd.jpg")], capsys)
    assert "odd.jpg" in error


def test_a_picture_that_may_not_be_read_stops_the_run_with_its_name(tmp_path, capsys):
    file = folder(tmp_path) / "train" / "a" / "0.png"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*TINY, "--data-path", str(tmp_path)])
    assert stop.value.code in (1, 2) and str(file) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("change", "words"), [
    (lambda root: (root / "train" / "c").mkdir(), "c"),
    (lambda root: (root / "train" / "a" / "again").symlink_to(root / "train" / "a"), "reaches a folder twice"),
    (lambda root: (root / "val" / "b").rename(root / "val" / "z"), "classes")], ids=["empty class", "loop", "other classes"])
def test_bad_folders_are_refused(change, words, tmp_path, capsys):
    change(folder(tmp_path))
    with pytest.raises(SystemExit) as stop:
        finetune.main([*TINY, "--data-path", str(tmp_path), "--init", "scratch", "--sigma", "0.25"])
    assert stop.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_a_certifier_refuses_test_images_of_other_classes(tiny_run, tmp_path, monkeypatch, capsys):
    real = certify.open_images

    def relabelled(*args, **kwargs):
        images = real(*args, **kwargs)
        images.classes = [*images.classes, "ten"]
        return images
    monkeypatch.setattr(certify, "open_images", relabelled)
    assert refused("certify", ["--sigma", "0.25", "--out", str(tmp_path / "out"), "--checkpoint",
                               str(tiny_run / "finetune_sigma_0.25.pt")], capsys)
    assert not (tmp_path / "out").exists()


VALUES = ["0", "1", "2", "7", "-1", "0.5", "0.25", "1e-3", "1e400", "nan", "inf", "", "x", "none", "all", "dropped", "digits",
          "folder", "cifar", "vit_digits", "vit_base", "imagenet", "shift", "flip", "0/2", "2/2", "auto", "fp32", "bf16", "cpu",
          "\N{OWL}"]
BASE = {"pretrain": ["--dry-run", "--device", "cpu"],
        "finetune": ["--dry-run", "--device", "cpu", "--sigma", "0.25", "--init", "scratch"],
        "certify": ["--device", "cpu", "--sigma", "0.25", "--max", "1", "--n", "20", "--n0", "5"]}
SKIP = {"--help", "--out", "--plot", "--export", "--init", "--checkpoint", "--overwrite", "--compile", "--device", "--max",
        "--n", "--dry-run", "--no-dry-run", "--recipe"}


def flags(stage, capsys):
    with pytest.raises(SystemExit):
        STAGES[stage].main(["--help"])
    return sorted({*re.findall(r"(?:^  |, )(--[\w-]+)", capsys.readouterr().out, re.MULTILINE)} - SKIP)


@pytest.mark.parametrize(("stage", "calls"), [*((stage, 15) for stage in STAGES), *(slow(stage, 60) for stage in STAGES)])
def test_any_flags_give_a_run_or_one_line(stage, calls, tiny_run, tmp_path, capsys):
    names, out = flags(stage, capsys), tmp_path / "out"
    assert len(names) > 15
    more = ["--out", str(out)]
    more += ["--checkpoint", str(tiny_run / "finetune_sigma_0.25.pt"), "--overwrite"] if stage == "certify" else []
    tried = {True: 0, False: 0}

    @settings(max_examples=calls, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.sampled_from(names), st.one_of(st.none(), st.sampled_from(VALUES))), max_size=3))
    def check(chosen):
        existed = out.exists()
        given = [part for flag in chosen for part in flag if part is not None]
        bad = bool(refused(stage, [*BASE[stage], *more, *given], capsys))
        tried[bad] += 1
        assert not bad or out.exists() == existed
    check()
    assert min(tried.values()) > 0
