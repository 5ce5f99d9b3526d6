"""Fine-tuned classifiers leave for timm, and are what they were."""

import pytest
import torch

import finetune
from certify import rebuild
from model import read_checkpoint

timm = pytest.importorskip("timm")


@pytest.mark.parametrize("probe", [False, True])
def test_an_exported_classifier_is_timms_with_the_same_logits(tiny_run, tmp_path, probe, capsys):
    run = tiny_run
    if probe:
        run = tmp_path
        finetune.main(["--sigma", "0.25", "--linear-probe", "--epochs", "1", "--init", str(tiny_run / "pretrain.pt"), "--out",
                       str(run)])
    finetune.main(["--sigma", "0.25", "--out", str(run), "--init", str(tiny_run / "pretrain.pt"), "--export",
                   str(tmp_path / "vit.pt")])
    file = torch.load(tmp_path / "vit.pt", weights_only=True)
    theirs = timm.models.VisionTransformer(**file["model_args"]).eval()
    theirs.load_state_dict(file["state_dict"])

    source = run / "finetune_sigma_0.25.pt"
    ours = rebuild(read_checkpoint(source), source).eval()
    images = torch.rand(5, 1, 8, 8)
    mean, std = (torch.tensor(file[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(theirs((images - mean) / std), ours(images), rtol=1e-4, atol=1e-5)
    assert file["classes"] == [str(digit) for digit in range(10)] and file["sigma"] == 0.25


def test_an_unfinished_run_exports_nothing(tiny_run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--sigma", "0.5", "--out", str(tiny_run), "--export", str(tmp_path / "vit.pt")])
    assert stop.value.code == 2 and not (tmp_path / "vit.pt").exists()
    assert "finetune_sigma_0.5.pt" in capsys.readouterr().err
