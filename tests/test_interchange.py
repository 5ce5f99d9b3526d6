"""Fine-tuned classifiers leave for timm, others' arrive (test_weights.py: in which files), and are what they were."""

import json

import pytest
import torch
from conftest import randomise
from safetensors import safe_open
from safetensors.torch import load_file

import finetune
from certify import rebuild
from model import load_autoencoder, load_encoder, read_checkpoint

# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(tiny_run, tmp_path_factory):
    """The directory of a linear probe on tiny_run's autoencoder."""
    out = tmp_path_factory.mktemp("probed")
    finetune.main(["--sigma", "0.25", "--linear-probe", "--epochs", "1", "--init", str(tiny_run / "pretrain.pt"), "--out",
                   str(out), "--device", "cpu", "--holdout", "9"])
    return out


@pytest.mark.parametrize("name", ["vit.pt", "vit.safetensors"])
@pytest.mark.parametrize("probe", [False, True])
def test_an_exported_classifier_is_timms_with_the_same_logits(tiny_run, probed, tmp_path, probe, name, capsys):
    timm = pytest.importorskip("timm")
    run, path = probed if probe else tiny_run, tmp_path / name
    finetune.main(["--sigma", "0.25", "--out", str(run), "--init", str(tiny_run / "pretrain.pt"), "--export", str(path)])
    if path.suffix == ".pt":
        file = torch.load(path, weights_only=True)
        state = file["state_dict"]
    else:
        state = load_file(path)
        with safe_open(path, "pt") as opened:
            file = {key: json.loads(value) for key, value in opened.metadata().items()}
    theirs = timm.models.VisionTransformer(**file["model_args"]).eval()
    theirs.load_state_dict(state)

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


# ---------------------------------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------------------------------


def test_a_decoder_of_which_a_part_is_missing_is_refused(tiny_dmae, tmp_path):
    state = tiny_dmae().state_dict()
    del state["decoder_norm.bias"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="decoder_norm.bias is missing"):
        load_autoencoder(tiny_dmae(), tmp_path / "half.pt")


def test_positions_of_encoder_and_decoder_are_interpolated_for_another_image_size(tiny_dmae, tmp_path):
    state = tiny_dmae().state_dict()
    state |= {name: torch.full_like(state[name], 0.25) for name in ("pos_embed", "decoder_pos_embed")}
    torch.save(state, tmp_path / "weights.pt")
    dmae = tiny_dmae(image_size=12)
    assert load_autoencoder(dmae, tmp_path / "weights.pt") == ([], [])
    for table in (dmae.pos_embed, dmae.decoder_pos_embed):
        torch.testing.assert_close(table.detach(), torch.full((1, 37, table.shape[-1]), 0.25))


@pytest.mark.slow
def test_hugging_faces_classifier_gives_the_same_logits(tiny_vit, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    image_size=8, patch_size=2, num_channels=1, layer_norm_eps=1e-6, num_labels=5)
    theirs = randomise(transformers.ViTForImageClassification(config)).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")            # with the names of the version that is installed
    theirs.save_pretrained(tmp_path)                                   # and with those of files on the hub
    images = torch.rand(4, 1, 8, 8)
    for name in ("theirs.pt", "model.safetensors"):
        vit = tiny_vit(pool="cls")
        assert load_encoder(vit, tmp_path / name) == ([], [])
        with torch.no_grad():
            logits = theirs((images - vit.mean) / vit.std).logits
            assert logits.std() > 0.01
            torch.testing.assert_close(vit(images), logits, rtol=1e-5, atol=1e-5)
