"""Bad input: one clear line on stderr, exit status 2, nothing written."""

import builtins
import os
import shutil
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

import certify
import finetune
import pretrain
from model import SIZES

STAGES = {"pretrain": pretrain, "finetune": finetune, "certify": certify}


def refused(stage, arguments, capsys, status=(2,)):
    """The one line that the stage prints when it refuses the arguments, in a folder where nothing changes."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code in status and error.count("\n") == 1 and "Traceback" not in error
    assert error.startswith(f"{stage}.py: error: ")
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    return error


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_run, make_folder):
    """A folder with good and damaged checkpoints and data sets to name on the command line; no test changes it."""
    root = tmp_path_factory.mktemp("usage")
    os.symlink(tiny_run / "pretrain.pt", root / "good.pt")
    os.symlink(tiny_run / "finetune_sigma_0.25.pt", root / "tuned.pt")
    (root / "torn.pt").write_bytes((tiny_run / "pretrain.pt").read_bytes()[:5000])
    (root / "text.pt").write_text("hello")
    torch.save([1, 2], root / "list.pt")
    weights = torch.load(root / "good.pt", weights_only=True)["model"]
    torch.save({"model": weights | {"cls_token": torch.ones(1, 1, 8)}}, root / "wide.pt")
    torch.save({"model": weights | {"extra.weight": torch.ones(1)}}, root / "extra.pt")
    torch.save({"model": weights, "kind": "pretrain"}, root / "bare.pt")
    for name in ("no_train/val/a", "no_val/train/a", "no_classes/train", "no_pictures/train/a"):
        (root / name).mkdir(parents=True)
    make_folder(8, grey=True).rename(root / "no_val_either")
    shutil.rmtree(root / "no_val_either" / "val")
    make_folder(8, grey=True).rename(root / "other_classes")
    (root / "other_classes" / "val" / "class_2").rename(root / "other_classes" / "val" / "class_3")
    (root / "classifier.py").write_text("import torch\ndef f(x):\n    return torch.zeros(len(x), 10)\nvalue = 3\n")
    return root


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setitem(SIZES, "tiny_rgb", dict(image_size=16, patch_size=4, channels=3, dim=16, depth=1, heads=2,
                                                decoder_dim=16, decoder_depth=1, decoder_heads=2))


FOLDER = ["--dataset", "folder", "--data-path"]
BOTH = {                                                                    # pretrain.py and finetune.py: (arguments, named)
    "recipe": (["--recipe", "digit"], "digits"),
    "recipe, nothing close": (["--recipe", "xyz"], "imagenet-base"),
    "data set": (["--dataset", "cifar"], "cifar10"),
    "model": (["--model", "vit_bas_patch16"], "vit_base_patch16"),
    "normalisation": (["--normalisation", "imagnet"], "imagenet"),
    "normalisation of other channels": (["--normalisation", "cifar10"], "normalisation|channels"),
    "model of other channels": (["--model", "vit_cifar", "--normalisation", "cifar10"], "1 x 8 x 8"),
    "image size": (["--image-size", "16"], "16 x 16"),
    "no image size": (["--image-size", "0"], "image-size"),
    "missing data folder": ([*FOLDER, "nowhere"], "nowhere"),
    "folder without train": ([*FOLDER, "no_train"], "no_train/train"),
    "folder without classes": ([*FOLDER, "no_classes"], "no_classes"),
    "class without pictures": ([*FOLDER, "no_pictures"], "a"),
    "no data folder": (["--dataset", "folder"], "data-path|data_path"),
    "no such flag": (["--colour", "red"], "--colour"),
    "no abbreviations": (["--epoch", "3"], "--epoch"),
    "no value": (["--epochs"], "--epochs"),
    "augmentation": (["--augment", "spin"], "--augment"),
    "augmentation of files": (["--augment", "resized-crop"], "resized-crop"),
    "negative sigma": (["--sigma", "-0.1"], "--sigma"),
    "nan": (["--sigma", "nan"], "--sigma"),
    "infinite": (["--sigma", "inf"], "--sigma"),
    "word for sigma": (["--sigma", "much"], "--sigma"),
    "word for epochs": (["--epochs", "ten"], "--epochs"),
    "no epochs": (["--epochs", "0"], "--epochs"),
    "less than one step": (["--epochs", "0.01"], "epochs"),
    "infinitely many epochs": (["--epochs", "inf"], "--epochs"),
    "fraction of an image": (["--batch", "12.5"], "--batch"),
    "empty batch": (["--batch", "0"], "--batch"),
    "negative batch": (["--batch", "-128"], "--batch"),
    "empty device batch": (["--device-batch", "0"], "--device-batch"),
    "batch beyond the data": (["--batch", "5000"], "5000"),
    "learning rate": (["--base-lr", "0"], "--base-lr"),
    "weight decay": (["--weight-decay", "-1"], "--weight-decay"),
    "negative warm-up": (["--warmup-epochs", "-1"], "--warmup-epochs"),
    "negative seed": (["--seed", "-1"], "--seed"),
    "everything held out": (["--holdout", "1437"], "1437"),
    "more than everything held out": (["--holdout", "5000"], "5000"),
    "missing checkpoint": (["--init", "gone.pt"], "gone.pt"),
    "folder for a checkpoint": (["--init", "no_val"], "no_val"),
    "truncated checkpoint": (["--init", "torn.pt"], "torn.pt"),
    "text for a checkpoint": (["--init", "text.pt"], "text.pt"),
    "list for a checkpoint": (["--init", "list.pt"], "list.pt"),
    "checkpoint of another shape": (["--init", "wide.pt"], "cls_token"),
    "checkpoint with another parameter": (["--init", "extra.pt"], "extra.weight"),
    "no such device": (["--device", "abacus"], "--device"),
    "no such dtype": (["--dtype", "fp4"], "--dtype"),
    "resume": (["--resume", "never"], "--resume"),                          # there is no such flag any more
}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("arguments, named", BOTH.values(), ids=BOTH)
def test_training_refuses(capsys, stage, arguments, named):
    sigma = [] if stage == "pretrain" else ["--sigma", "0.25"]
    init = [] if stage == "pretrain" or "--init" in arguments else ["--init", "scratch"]
    error = refused(stage, [*sigma, *init, "--device", "cpu", "--out", "run", *arguments], capsys)
    assert any(word in error for word in named.split("|")), error


ONLY = {
    "pretrain": {
        "everything dropped": (["--mask-ratio", "1"], "--mask-ratio"),
        "more than everything dropped": (["--mask-ratio", "1.5"], "--mask-ratio"),
        "negative share dropped": (["--mask-ratio", "-0.1"], "--mask-ratio"),
        "nan dropped": (["--mask-ratio", "nan"], "--mask-ratio"),
        "no patch kept": (["--mask-ratio", "0.99"], "0.99"),
        "loss on dropped ones of none": (["--mask-ratio", "0", "--loss-on", "dropped"], "--loss-on dropped"),
        "loss": (["--loss-on", "kept"], "--loss-on"),
        "fine-tuned checkpoint": (["--init", "tuned.pt"], "tuned.pt"),
        "pictures too small for random crops": ([*FOLDER, "other_classes", "--holdout", "3", "--batch", "4", "--augment",
                                                 "resized-crop"], "resized-crop"),
    },
    "finetune": {
        "no sigma": (["--init", "scratch"], "--sigma"),
        "nothing to start from": (["--sigma", "0.25"], "run/pretrain.pt"),
        "other model than the checkpoint's": (["--sigma", "0.25", "--init", "good.pt", "--model", "vit_cifar"], "vit_digits"),
        "other data than the checkpoint's": (["--sigma", "0.25", "--init", "good.pt", "--dataset", "cifar10"], "digits"),
        "other size than the checkpoint's": (["--sigma", "0.25", "--init", "good.pt", "--image-size", "16"], "16"),
        "checkpoint without settings": (["--sigma", "0.25", "--init", "bare.pt", "--epochs", "0.01"], "bare.pt|epochs"),
        "folder without val": (["--sigma", "0.25", "--init", "scratch", *FOLDER, "no_val_either"], "val"),
        "classes that differ": (["--sigma", "0.25", "--init", "scratch", *FOLDER, "other_classes", "--batch", "4"], "classes"),
        "no labels": (["--sigma", "0.25", "--init", "scratch", "--labels-per-class", "0"], "--labels-per-class"),
        "nothing held out": (["--sigma", "0.25", "--init", "scratch", "--holdout", "0"], "--holdout"),
        "certain to erase": (["--sigma", "0.25", "--init", "scratch", "--erasing", "1"], "--erasing"),
        "certain to drop": (["--sigma", "0.25", "--init", "scratch", "--drop-path", "1"], "--drop-path"),
        "negative consistency": (["--sigma", "0.25", "--init", "scratch", "--consistency", "-1"], "--consistency"),
        "never voting": (["--sigma", "0.25", "--init", "scratch", "--vote-every", "0"], "--vote-every"),
    },
    "certify": {
        "no sigma": ([], "--sigma"),
        "no noise": (["--sigma", "0"], "--sigma"),
        "negative noise": (["--sigma", "-0.25"], "--sigma"),
        "nan": (["--sigma", "nan"], "--sigma"),
        "infinite": (["--sigma", "inf"], "--sigma"),
        "word for sigma": (["--sigma", "much"], "--sigma"),
        "recipe": (["--sigma", "0.25", "--recipe", "cifar"], "cifar10"),
        "nothing to certify": (["--sigma", "0.25"], "run/finetune_sigma_0.25.pt"),
        "missing checkpoint": (["--sigma", "0.25", "--checkpoint", "gone.pt"], "gone.pt"),
        "truncated checkpoint": (["--sigma", "0.25", "--checkpoint", "torn.pt"], "torn.pt"),
        "pre-trained checkpoint": (["--sigma", "0.25", "--checkpoint", "good.pt"], "finetune"),
    } | {name: (["--sigma", "0.25", "--classifier", "classifier.py:f", *arguments], named) for name, (arguments, named) in {
        "certain error": (["--alpha", "1"], "--alpha"),
        "impossible error": (["--alpha", "0"], "--alpha"),
        "negative error": (["--alpha", "-0.1"], "--alpha"),
        "nan error": (["--alpha", "nan"], "--alpha"),
        "no copies": (["--n", "0"], "--n"),
        "no copies to select": (["--n0", "0"], "--n0"),
        "fraction of a copy": (["--n", "1e4"], "--n"),
        "no noise": (["--sigma", "0"], "--sigma"),
        "negative noise": (["--sigma", "-0.25"], "--sigma"),
        "too few copies to certify": (["--n", "9"], "abstain"),
        "data set": (["--dataset", "digit"], "digits"),
        "missing data folder": ([*FOLDER, "nowhere"], "nowhere"),
        "folder without val": ([*FOLDER, "no_val_either"], "no_val_either/val"),
        "no step": (["--skip", "0"], "--skip"),
        "no image": (["--max", "0"], "--max"),
        "negative seed": (["--seed", "-1"], "--seed"),
        "negative radius": (["--radii", "-1"], "--radii"),
        "odd batch": (["--batch", "70"], "--batch"),
        "missing classifier": (["--classifier", "gone.py:f"], "gone.py"),
        "no such function": (["--classifier", "classifier.py:g"], "'g'"),
        "no function": (["--classifier", "classifier.py:value"], "'value'"),
    }.items()},
}


@pytest.mark.parametrize("stage, arguments, named", [
    pytest.param(stage, *case, id=f"{stage}: {name}") for stage, cases in ONLY.items() for name, case in cases.items()])
def test_a_stage_refuses(capsys, stage, arguments, named):
    error = refused(stage, [*arguments, "--device", "cpu", "--out", "run"], capsys)
    assert any(word in error for word in named.split("|")), error


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_default_and_exits_well(capsys, stage):
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].main(["--help"])
    text = capsys.readouterr().out
    defaults = "".join(text[text.index("default values, of --recipe digits: "):].split())                # however wrapped
    assert not stop.value.code and "--sigma" in text
    for key, value in (STAGES[stage].DEFAULTS | STAGES[stage].RECIPES["digits"]).items():
        assert f"{key.replace('_', '-')}{value}".replace(" ", "") in defaults


def test_a_run_directory_that_cannot_be_made_is_one_line(capsys):
    assert "text.pt" in refused("pretrain", ["--device", "cpu", "--out", "text.pt/run"], capsys, status=(1, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(capsys):
    assert "cuda device" in refused("pretrain", ["--device", "cuda", "--out", "run"], capsys).lower()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("limits, good, bad", [
    (dict(), ["0", "-2.5"], ["nan", "inf", "-inf", "1e400"]),
    (dict(least=0), ["0", "2.5", "1e9"], ["-0.1", "nan", "inf", "-inf"]),
    (dict(above=0, below=1), ["0.5", "1e-300"], ["0", "1", "-1", "nan"]),
    (dict(least=0, below=1), ["0", "0.999"], ["1", "-1e-9"])])
def test_numbers_keep_within_their_limits(stage, limits, good, bad):
    convert = STAGES[stage].number(float, **limits)
    assert [convert(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(ArgumentTypeError, match="must be") as error:
            convert(text)
        assert text in str(error.value)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind, status", [("ValueError", 2), ("FileNotFoundError", 2), ("RunError", 1), ("OSError", 1)])
def test_errors_of_several_lines_become_one(capsys, stage, kind, status):
    """Wrong use is status 2, what breaks later 1; of a data worker's error, which holds its traceback, the last line counts."""
    module = STAGES[stage]
    error = getattr(module, kind, None) or getattr(builtins, kind)
    with pytest.raises(SystemExit) as stop, module.one_line_errors():
        raise error(f"Caught {kind} in worker 0.\nTraceback:\n  x = 1\n{stage}.RunError: last")
    assert stop.value.code == status and capsys.readouterr().err == f"{stage}.py: error: last\n"


@pytest.mark.parametrize("stage", STAGES)
def test_errors_of_ours_are_not_hidden(stage):
    """A mistake in the program itself keeps its traceback."""
    with pytest.raises(ZeroDivisionError), STAGES[stage].one_line_errors():
        raise ZeroDivisionError("3")
