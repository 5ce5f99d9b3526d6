"""timm takes what finetune.py writes; checkpoints of older runs, kept in results/, still load."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import certify
import finetune
import pretrain
from model import build_vit, load_encoder, read_checkpoint

DIGITS = Path(__file__).parents[1] / "results" / "digits"


@pytest.fixture(scope="module")
def probed(tiny_run, tmp_path_factory):
    """The directory of a linear probe on tiny_run's autoencoder."""
    out = tmp_path_factory.mktemp("probed")
    finetune.main(["--sigma", "0.25", "--linear-probe", "--epochs", "1", "--warmup-epochs", "0",
                   "--init", str(tiny_run / "pretrain.pt"), "--out", str(out), "--device", "cpu"])
    return out


@pytest.mark.parametrize("probe", [False, True])
def test_timm_takes_the_weights_as_they_are_and_gives_the_same_logits(tiny_run, probed, probe):
    """finetune.py's docstring says how. A probe's BatchNorm is what timm puts before its head."""
    timm = pytest.importorskip("timm")
    file = (probed if probe else tiny_run) / "finetune_sigma_0.25.pt"
    content = torch.load(file, weights_only=True)
    size = content["config"]
    theirs = timm.models.VisionTransformer(
        global_pool="token" if probe else "avg", num_classes=10, img_size=8, in_chans=1,
        patch_size=size["patch_size"], embed_dim=size["dim"], depth=size["depth"],
        num_heads=size["heads"], mlp_ratio=size["mlp_ratio"],
        norm_layer=partial(nn.LayerNorm, eps=1e-6)).eval()
    if probe:
        norm = nn.BatchNorm1d(size["dim"], affine=False, eps=1e-6)
        theirs.head = nn.Sequential(norm, theirs.head).eval()
    theirs.load_state_dict(content["model"])

    ours = certify.rebuild(read_checkpoint(file), file).eval()
    images = torch.rand(5, 1, 8, 8)
    mean, std = (torch.tensor(size[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        logits = theirs((images - mean) / std)
        torch.testing.assert_close(logits, ours(images), rtol=1e-4, atol=1e-5)
    assert logits.std() > 1e-3


def test_a_classifier_of_ours_starts_another_one(tiny_run):
    file = tiny_run / "finetune_sigma_0.25.pt"
    vit = build_vit("vit_digits", 10)
    assert load_encoder(vit, file) == ([], [])
    weights = torch.load(file, weights_only=True)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in vit.state_dict().items())


def test_checkpoints_of_the_version_before_are_read():
    """results/digits keeps them: fine-tuning starts from one, certification reads the other."""
    args = finetune.parse(["--sigma", "0.25", "--init", str(DIGITS / "pretrain.pt")])
    assert (args.recipe, args.dataset, args.model, args.holdout) == (
        "digits", "digits", "vit_digits", 0.1)
    finetune.build_model(args, 10, torch.device("cpu"))

    file = DIGITS / "finetune_sigma_0.25.pt"
    args, checkpoint = certify.parse(["--sigma", "0.25", "--checkpoint", str(file)])
    assert (args.recipe, args.dataset, args.skip) == ("digits", "digits", 3)
    certify.rebuild(checkpoint, file)


def test_an_unfinished_run_of_the_version_before_is_refused(tmp_path, capsys):
    for kind in ("json", "jsonl"):
        (tmp_path / f"pretrain.{kind}").write_text((DIGITS / f"pretrain.{kind}").read_text())
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--out", str(tmp_path), "--device", "cpu"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "has other settings" in error and error.count("\n") == 1
