"""Killed anywhere, fed anything: nothing lost, nothing wrong, one clear line. Long variants: pytest -m soak."""

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

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import certify
import finetune
import pretrain
from model import VisionTransformer, open_images, read_checkpoint

ROOT = Path(__file__).parents[1]
STAGES = {"pretrain": pretrain, "finetune": finetune, "certify": certify}
SMALL = {"pretrain": ["--epochs", "4", "--log-every", "3", "--save-every", "12"],
         "finetune": ["--sigma", "0.25", "--epochs", "3", "--vote-every", "3", "--log-every", "3", "--save-every", "6"],
         "certify": ["--sigma", "0.25", "--n", "300", "--n0", "100", "--skip", "30"]}
RESULT = {"pretrain": "pretrain.pt", "finetune": "finetune_sigma_0.25.pt", "certify": "certify_sigma_0.25.tsv"}


@pytest.fixture
def command(tiny_run):
    """(stage, out) -> the arguments of a small run of that stage."""
    def arguments(stage, out):
        source = {"pretrain": [], "finetune": ["--init", str(tiny_run / "pretrain.pt")],
                  "certify": ["--checkpoint", str(tiny_run / "finetune_sigma_0.25.pt")]}[stage]
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
    log = (out / RESULT[stage]).with_suffix(".jsonl").read_text().splitlines()
    weights = read_checkpoint(out / RESULT[stage])["model"]
    return ([{key: value for key, value in json.loads(row).items() if key != "time"} for row in log],
            {key: value.numpy().tobytes() for key, value in weights.items()})


@pytest.fixture(scope="module")
def undisturbed(tiny_run, tmp_path_factory):
    found = {}

    def get(stage, arguments):
        if stage not in found:
            out = tmp_path_factory.mktemp(stage)
            assert finished(fork(stage, arguments(stage, out))) == 0
            found[stage] = outcome(out, stage)
        return found[stage]
    return get


# --- stopped


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_at_random_moments_changes_nothing(stage, kills, command, undisturbed, tmp_path):
    """So many kills; a run that ends before all of them were given is followed by another one."""
    expected, moments, done, run = undisturbed(stage, command), random.Random(kills), 0, 0
    while done < kills:
        out = tmp_path / str(run)
        process = fork(stage, command(stage, out))
        process.join(moments.uniform(0, 0.8))
        process.kill()
        done += finished(process) == -signal.SIGKILL
        if done == kills:
            assert finished(fork(stage, command(stage, out))) == 0
        if (out / RESULT[stage]).exists():
            run += 1
            assert outcome(out, stage) == expected
    assert run


@pytest.mark.parametrize("stage", STAGES)
def test_kill_9_while_files_are_renamed_changes_nothing(stage, command, undisturbed, tmp_path):
    expected, argv, deaths = undisturbed(stage, command), command(stage, tmp_path), 0
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
    expected, argv, deaths = undisturbed("certify", command), command("certify", tmp_path), 0
    name, owner = {"before": ("certificate", certify.Trial), "after": ("update", certify.tqdm)}[where]

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


def torchrun(tmp_path, stage, argv, setup="", *flags):
    """The stage under torchrun with two processes, each of which leaves its exit status in the file status_RANK."""
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import {stage} as stage
here, rank = pathlib.Path({str(tmp_path)!r}), os.environ["RANK"]
{setup}
try:
    stage.main(sys.argv[1:])
except SystemExit as stop:
    (here / f"status_{{rank}}").write_text(str(stop.code))
    raise
""")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags, "--", worker, *argv]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


SLOW = {"certify": "real = stage.Trial.certificate\nstage.Trial.certificate = lambda *a: time.sleep(0.5) or real(*a)",
        **dict.fromkeys(("pretrain", "finetune"),
                        "rate = stage.learning_rate\nstage.learning_rate = lambda *a: time.sleep(0.3) or rate(*a)")}


@pytest.mark.parametrize(("stage", "number", "everyone"), [
    ("pretrain", signal.SIGTERM, False), ("finetune", signal.SIGINT, True), ("certify", signal.SIGTERM, True)])
def test_a_signal_stops_all_ranks_together(stage, number, everyone, command, undisturbed, tmp_path):
    """Sent to torchrun, or (a terminal's Ctrl-C; Slurm) to everyone, so that workers get it twice. One checkpoint, no hang."""
    out = tmp_path / "run"
    workers = torchrun(tmp_path, stage, command(stage, out), SLOW[stage])
    first = out / (f"{RESULT[stage]}.part1" if stage == "certify" else Path(RESULT[stage]).with_suffix(".jsonl"))
    end = time.time() + 150
    while not (first.exists() and first.read_text().count("\n")):
        assert workers.poll() is None and time.time() < end, workers.communicate()
        time.sleep(0.02)
    (os.killpg if everyone else os.kill)(workers.pid, number)
    output, errors = workers.communicate(timeout=120)
    before = first.read_text()
    assert workers.returncode != 0
    assert [(tmp_path / f"status_{rank}").read_text() for rank in (0, 1)] == 2 * [str(128 + number)], errors[-2000:]
    assert not (out / RESULT[stage]).exists() and not list(out.glob("*.tmp"))
    if stage == "certify":
        assert all(part.read_text().endswith("\n") for part in out.glob("*.part*"))
    else:
        assert output.count(f"stopped by signal {number}") == 1
        step = read_checkpoint(first.with_suffix(".last.pt"))["step"]
        assert json.loads(first.read_text().splitlines()[-1])["step"] == step
    assert finished(fork(stage, command(stage, out))) == 0            # one process continues what two began
    if stage == "certify":
        assert outcome(out, stage) == undisturbed(stage, command)
    else:
        steps = [[row["step"] for row in log] for log in (outcome(out, stage)[0], undisturbed(stage, command)[0])]
        assert steps[0] == steps[1] and first.read_text().startswith(before)


def test_a_probe_on_two_processes_is_measured_as_its_checkpoint_is(command, tmp_path):
    """Its BatchNorm statistics differ from rank to rank; what is logged must be the accuracy of what is saved."""
    workers = torchrun(tmp_path, "finetune", [*command("finetune", tmp_path / "run"), "--linear-probe", "--base-lr", "20"])
    errors = workers.communicate(timeout=300)[1]
    assert workers.returncode == 0, errors[-2000:]
    log, _ = outcome(tmp_path / "run", "finetune")
    content = read_checkpoint(tmp_path / "run" / RESULT["finetune"])
    model = VisionTransformer(**content["config"])
    model.load_state_dict(content["model"])
    test = open_images("digits", None, "test", 8, 1)
    found = finetune.evaluate(model, test, 0.25, 100, 250, 0, 0, 1, torch.device("cpu"))
    assert log[-1]["split"] == "test" and [log[-1][key] for key in ("clean", "noisy", "vote")] == found


def test_a_rank_that_dies_ends_the_others_and_a_restart_goes_on(command, undisturbed, tmp_path):
    """Rank 1 kills itself once, after the first checkpoint; torchrun names it, starts both again, and they continue."""
    start = time.time()
    workers = torchrun(tmp_path, "pretrain", command("pretrain", tmp_path / "run"), """
rate, flag = stage.learning_rate, here / "died"
def learning_rate(step, *rest):
    if step == 30 and rank == "1" and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return rate(step, *rest)
stage.learning_rate = learning_rate
""", "--max-restarts=1")
    output, errors = workers.communicate(timeout=300)
    assert workers.returncode == 0, errors[-2000:]
    assert time.time() - start < 200 and (tmp_path / "died").exists()
    assert re.search(r"exitcode: -9\).*local_rank: 1", errors) and "after step 24" in output
    log, _ = outcome(tmp_path / "run", "pretrain")
    assert [row["step"] for row in log] == [row["step"] for row in undisturbed("pretrain", command)[0]]


def test_a_second_run_in_the_same_directory_is_refused_until_the_first_is_dead(command, tmp_path, capsys):
    argv = command("pretrain", tmp_path)
    first = fork("pretrain", argv, lambda: setattr(pretrain, "learning_rate", lambda *_: time.sleep(600)))
    while not (tmp_path / "pretrain.jsonl").exists():
        time.sleep(0.05)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"process {first.pid} on" in error and error.count("\n") == 1
    first.kill()
    finished(first)
    assert finished(fork("pretrain", argv)) == 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
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
    assert outcome(tmp_path / "run", stage) == undisturbed(stage, command)


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
    monkeypatch.setattr(pretrain, "draw_corruption", poisoned)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "loss nan at step 33" in error and "lr " in error
    assert read_checkpoint(tmp_path / "pretrain.last.pt")["step"] == 24
    monkeypatch.undo()
    pretrain.main(argv)
    assert outcome(tmp_path, "pretrain") == undisturbed("pretrain", command)


# --- fed


def refused(stage, argv, capsys, statuses=(2,)):
    """Whether main(argv) was refused: then by one line on stderr, and never by a traceback."""
    capsys.readouterr()
    try:
        STAGES[stage].main(argv)
    except SystemExit as stop:
        errors = capsys.readouterr().err.strip().splitlines()
        assert stop.code in (0, *statuses), errors
        assert stop.code == 0 or (len(errors) == 1 and errors[0].startswith(f"{stage}.py: error: ")), errors
        return stop.code != 0
    return False


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


@pytest.mark.parametrize("stage", CONSUMERS)
def test_a_checkpoint_that_was_cut_or_flipped_is_refused_or_whole(tiny_run, stage, tmp_path, capsys):
    name, argv = CONSUMERS[stage]
    whole, chance, file = (tiny_run / name).read_bytes(), random.Random(2), tmp_path / name
    argv = [*argv, str(file), "--out", str(tmp_path / "out"), "--overwrite"]
    for length in [0, 1, 4, *(chance.randrange(len(whole)) for _ in range(50))]:
        file.write_bytes(whole[:length])
        assert refused(stage, argv, capsys)
    for _ in range(50):                                               # in the archive's first and last bytes: its headers
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


def put(root, name):
    """Put a picture of the named kind into the training images."""
    file = root / "train" / "a" / ("odd.jpg" if "JPEG" in name or "text" in name else "odd.png")
    if name == "truncated JPEG":
        Image.effect_noise((64, 64), 50).convert("RGB").save(file)
        file.write_bytes(file.read_bytes()[:600])
    elif name == "empty file":
        file.touch()
    elif name == "text as JPEG":
        file.write_text("not a picture")
    elif name == "CMYK JPEG":
        Image.new("CMYK", (40, 30), (10, 20, 30, 40)).save(file)
    elif name == "16 bits":
        Image.new("I;16", (32, 32), 40_000).save(file)
    elif name == "20000 x 20000":
        Image.new("1", (20_000, 20_000)).save(file)
    else:
        mode = {"grey": "L", "alpha": "RGBA", "palette": "P", "1 x 1": "RGB", "20000 x 20": "RGB"}[name]
        Image.new(mode, tuple(map(int, name.split(" x "))) if " x " in name else (32, 32)).save(file)


TRAIN = ["--recipe", "cifar10", "--dataset", "folder", "--model", "vit_cifar", "--batch", "4", "--holdout", "1", "--dry-run"]


@pytest.mark.parametrize("name", ["CMYK JPEG", "grey", "alpha", "palette", "1 x 1", "20000 x 20"])
def test_odd_pictures_are_read_as_three_channels_of_eight_bits(name, tmp_path):
    put(folder(tmp_path), name)
    images = open_images("folder", tmp_path, "train", 32, 3)
    assert images.pixels.shape == (7, 3, 32, 32) and images.pixels.dtype == torch.uint8


@pytest.mark.parametrize("name", ["truncated JPEG", "empty file", "text as JPEG", "16 bits", "20000 x 20000"])
def test_bad_pictures_stop_the_run_with_their_name(name, tmp_path, capsys):
    put(folder(tmp_path), name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*TRAIN, "--data-path", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code in (1, 2) and "train/a/odd." in error


def test_a_picture_that_may_not_be_read_stops_the_run_with_its_name(tmp_path, capsys):
    file = folder(tmp_path) / "train" / "a" / "0.png"
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*TRAIN, "--data-path", str(tmp_path)])
    assert stop.value.code in (1, 2) and str(file) in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("change", "words"), [
    (lambda root: (root / "train" / "c").mkdir(), "c"),
    (lambda root: (root / "train" / "a" / "again").symlink_to(root / "train" / "a"), "reaches a folder twice"),
    (lambda root: (root / "val" / "b").rename(root / "val" / "z"), "classes")], ids=["empty class", "loop", "other classes"])
def test_bad_folders_are_refused(change, words, tmp_path, capsys):
    change(folder(tmp_path))
    with pytest.raises(SystemExit) as stop:
        finetune.main([*TRAIN, "--data-path", str(tmp_path), "--init", "scratch", "--sigma", "0.25"])
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


@pytest.mark.parametrize("stage", STAGES)
def test_any_flags_give_a_run_or_one_line(stage, tiny_run, tmp_path, capsys):
    names, out = flags(stage, capsys), tmp_path / "out"
    assert len(names) > 15
    more = ["--out", str(out)]
    more += ["--checkpoint", str(tiny_run / "finetune_sigma_0.25.pt"), "--overwrite"] if stage == "certify" else []
    tried = {True: 0, False: 0}

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.sampled_from(names), st.one_of(st.none(), st.sampled_from(VALUES))), max_size=3))
    def check(chosen):
        existed = out.exists()
        bad = refused(stage, [*BASE[stage], *more, *(part for flag in chosen for part in flag if part is not None)], capsys)
        tried[bad] += 1
        assert not bad or out.exists() == existed
    check()
    assert min(tried.values()) > 0
