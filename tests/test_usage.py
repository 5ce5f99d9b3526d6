"""Bad input: one clear line on stderr, exit status 2, nothing written."""

import os
from pathlib import Path

import pytest
import torch

import certify
import finetune
import model
import pretrain
from model import SIZES, UsageError, number

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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, tiny_run, make_folder):
    """A working directory with good and damaged checkpoints and data sets to name on the command line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "tiny_rgb", dict(image_size=16, patch_size=4, channels=3, dim=16, depth=1, heads=2,
                                                decoder_dim=16, decoder_depth=1, decoder_heads=2))
    os.symlink(tiny_run / "pretrain.pt", "good.pt")
    os.symlink(tiny_run / "finetune_sigma_0.25.pt", "tuned.pt")
    Path("torn.pt").write_bytes((tiny_run / "pretrain.pt").read_bytes()[:5000])
    Path("text.pt").write_text("hello")
    torch.save([1, 2], "list.pt")
    weights = torch.load("good.pt", weights_only=True)["model"]
    torch.save({"model": weights | {"cls_token": torch.ones(1, 1, 8)}}, "wide.pt")
    torch.save({"model": weights | {"extra.weight": torch.ones(1)}}, "extra.pt")
    torch.save({"model": weights, "kind": "pretrain"}, "bare.pt")
    for name in ("no_train/val/a", "no_val/train/a", "no_classes/train", "no_pictures/train/a"):
        Path(name).mkdir(parents=True)
    (make_folder(8, grey=True)).rename("no_val_either")
    for path in sorted(Path("no_val_either/val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    Path("no_val_either/val").rmdir()
    make_folder(8, grey=True).rename("other_classes")
    Path("other_classes/val/class_2").rename("other_classes/val/class_3")
    Path("classifier.py").write_text("import torch\ndef f(x):\n    return torch.zeros(len(x), 10)\nvalue = 3\n")


FOLDER = ["--dataset", "folder", "--data-path"]
BOTH = {                                                                    # pretrain.py and finetune.py: (arguments, named)
    "recipe": (["--recipe", "digit"], "'digits'"),
    "recipe, nothing close": (["--recipe", "xyz"], "imagenet-base"),
    "data set": (["--dataset", "cifar"], "'cifar10'"),
    "model": (["--model", "vit_bas_patch16"], "'vit_base_patch16'"),
    "normalisation": (["--normalisation", "imagnet"], "'imagenet'"),
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
    "resume": (["--resume", "maybe"], "--resume"),
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
        "recipe": (["--sigma", "0.25", "--recipe", "cifar"], "'cifar10'"),
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
        "data set": (["--dataset", "digit"], "'digits'"),
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
    assert not stop.value.code and text.count("(default: ") > 15 and "--sigma" in text


def test_a_run_directory_that_cannot_be_made_is_one_line(capsys):
    assert "text.pt" in refused("pretrain", ["--device", "cpu", "--out", "text.pt/run"], capsys, status=(1, 2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(capsys):
    assert "cuda device" in refused("pretrain", ["--device", "cuda", "--out", "run"], capsys).lower()


@pytest.mark.parametrize("limits, good, bad", [
    (dict(least=0), ["0", "2.5", "1e9"], ["-0.1", "nan", "inf", "-inf"]),
    (dict(above=0, below=1), ["0.5", "1e-300"], ["0", "1", "-1", "nan"]),
    (dict(least=0, below=1), ["0", "0.999"], ["1", "-1e-9"])])
def test_numbers_keep_within_their_limits(limits, good, bad):
    convert = number(float, **limits)
    assert [convert(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(Exception, match="must be") as error:
            convert(text)
        assert type(error.value).__name__ == "ArgumentTypeError" and text in str(error.value)


def test_errors_of_several_lines_become_one(capsys):
    @model.command
    def main(argv):
        raise UsageError("first\nmodel.UsageError: last")

    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and capsys.readouterr().err == "test_usage.py: error: last\n"
