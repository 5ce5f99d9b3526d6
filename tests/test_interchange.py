"""Weights arrive from timm, Hugging Face and wrapped models; classifiers leave for timm; all are what they were."""

import json

import pytest
import torch
from conftest import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


WRAPPED = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "arch": "vit"},
    "model_ema": lambda state: {"model_ema": state, "epoch": 3},
    "state_dict_ema": lambda state: {"state_dict_ema": state, "epoch": 3},
    "DeepSpeed": lambda state: {"module": state, "lr_scheduler": None},
    "DataParallel": lambda state: {"model": under("module.", state)},
    "torch.compile": lambda state: {"model": under("_orig_mod.", state)},
    "compiled, then distributed": lambda state: under("module._orig_mod.", state),
    "Lightning": lambda state: {"state_dict": under("model.", state), "hyper_parameters": {"lr": 0.1}},
    "AveragedModel": lambda state: {"model": under("module.", state) | {"n_averaged": torch.tensor(7)}},
}


@pytest.mark.parametrize("way", WRAPPED)
def test_weights_are_found_wherever_they_lie(tiny_dmae, tiny_vit, tmp_path, way):
    state = randomise(tiny_dmae()).state_dict()
    torch.save(WRAPPED[way](state), tmp_path / "weights.pt")
    vit, again = tiny_vit(pool="cls"), tiny_dmae()
    missing, left = load_encoder(vit, tmp_path / "weights.pt")
    assert {*missing} == {"head.weight", "head.bias"} and all(name.startswith(("decoder_", "mask_token")) for name in left)
    assert load_autoencoder(again, tmp_path / "weights.pt") == ([], [])
    for name, value in again.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert name in left or torch.equal(vit.state_dict()[name], value), name


def test_wrappers_that_torch_makes_are_read(tiny_dmae, tmp_path):
    dmae = randomise(tiny_dmae())
    for i, wrapper in enumerate((torch.nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel)):
        torch.save(wrapper(dmae).state_dict(), tmp_path / f"{i}.pt")
        again = tiny_dmae()
        assert load_autoencoder(again, tmp_path / f"{i}.pt") == ([], [])
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), dmae.state_dict().values(), strict=True))


def test_of_two_sets_of_weights_in_a_file_the_first_is_taken_aloud(tiny_dmae, tmp_path):
    one, two = (randomise(tiny_dmae()).state_dict() for _ in range(2))
    two = {name: value + 1 for name, value in two.items()}
    torch.save({"model_ema": two, "model": one}, tmp_path / "both.pt")
    with pytest.warns(UserWarning, match="model and model_ema.*model is taken"):
        found = read_checkpoint(tmp_path / "both.pt")["model"]
    assert all(torch.equal(found[name], one[name]) for name in one)


def test_safetensors_are_read(tiny_dmae, tmp_path):
    state = randomise(tiny_dmae()).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    again = tiny_dmae()
    assert load_autoencoder(again, tmp_path / "weights.safetensors") == ([], [])
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    (tmp_path / "weights.safetensors").write_bytes((tmp_path / "weights.safetensors").read_bytes()[:-40])
    with pytest.raises(ValueError, match="weights.safetensors is not a readable checkpoint"):
        read_checkpoint(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(("content", "named"), [
    ({"net": {"cls_token": torch.ones(1)}, "epoch": 3}, "net, epoch"), ([1, 2], "list"), ({}, "nothing"),
    ({"model": {"conv1.weight": torch.ones(1), "fc.bias": torch.ones(1)}}, "conv1.weight, fc.bias")])
def test_a_file_without_a_transformer_is_refused_with_what_it_holds(tmp_path, content, named):
    torch.save(content, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=f"resnet.pt.*{named}"):
        read_checkpoint(tmp_path / "resnet.pt")


def test_a_table_of_positions_without_the_class_row_gets_zeros_there(tiny_vit, tmp_path):
    """As the published DMAE's code builds it for some models: N rows, the class token has no position."""
    state = randomise(tiny_vit()).state_dict() | {"pos_embed": torch.randn(1, 16, 16)}
    torch.save(state, tmp_path / "weights.pt")
    vit = tiny_vit()
    load_encoder(vit, tmp_path / "weights.pt")
    assert not vit.pos_embed[0, 0].any() and torch.equal(vit.pos_embed[:, 1:], state["pos_embed"])


def test_pre_training_starts_from_an_encoder_alone_and_a_fresh_decoder(tiny_dmae, tiny_vit, tmp_path):
    torch.save(randomise(tiny_vit(pool="cls")).state_dict(), tmp_path / "vit.pt")
    dmae, fresh = tiny_dmae(), tiny_dmae().state_dict()
    missing, left = load_autoencoder(dmae, tmp_path / "vit.pt")
    state = torch.load(tmp_path / "vit.pt")
    assert {*left} == {"head.weight", "head.bias"}
    assert {*missing} == {name for name in fresh if name.startswith(("decoder_", "mask_token"))}
    for name, value in dmae.state_dict().items():
        assert torch.equal(value, (fresh if name in missing else state)[name])


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


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face
# ---------------------------------------------------------------------------------------------------------------------

LAYER = {4: ("encoder.layer", "attention.attention.{}", ("query", "key", "value"), "attention.output.dense",
             "intermediate.dense", "output.dense"),
         5: ("layers", "attention.{}", ("q_proj", "k_proj", "v_proj"), "attention.o_proj", "mlp.fc1", "mlp.fc2")}


def to_hugging_face(state, version):
    """Our classifier's state dict under the names of transformers' ViTForImageClassification."""
    layers, part, qkv, proj, fc1, fc2 = LAYER[version]
    theirs = {"vit.embeddings.cls_token": state["cls_token"], "vit.embeddings.position_embeddings": state["pos_embed"]}
    for kind in ("weight", "bias"):
        theirs[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        theirs[f"vit.layernorm.{kind}"] = state[f"norm.{kind}"]
        theirs[f"classifier.{kind}"] = state[f"head.{kind}"]
        for i in range(2):
            at, ours = f"vit.{layers}.{i}", f"blocks.{i}"
            for name, value in zip(qkv, state[f"{ours}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{at}.{part.format(name)}.{kind}"] = value
            for a, b in ((proj, "attn.proj"), (fc1, "mlp.fc1"), (fc2, "mlp.fc2"), ("layernorm_before", "norm1"),
                         ("layernorm_after", "norm2")):
                theirs[f"{at}.{a}.{kind}"] = state[f"{ours}.{b}.{kind}"]
    return theirs


@pytest.mark.parametrize("version", LAYER)
@pytest.mark.parametrize("base", [False, True])
def test_hugging_faces_names_are_ours(tiny_vit, tmp_path, version, base):
    """base: the model without a classifier, whose names lack vit."""
    source = randomise(tiny_vit(pool="cls"))
    theirs = {name: value.contiguous() for name, value in to_hugging_face(source.state_dict(), version).items()}
    if base:
        theirs = {name.removeprefix("vit."): value for name, value in theirs.items() if not name.startswith("classifier")}
    save_file(theirs, tmp_path / "model.safetensors")
    vit = tiny_vit(pool="cls")
    missing, left = load_encoder(vit, tmp_path / "model.safetensors")
    assert ({*missing}, left) == ({"head.weight", "head.bias"} if base else set(), [])
    for name, value in vit.state_dict().items():
        assert name in missing or torch.equal(value, source.state_dict()[name]), name


@pytest.fixture
def hugging_face():
    """transformers, if it is there, and the arguments of a network like tiny_dmae's and tiny_vit's."""
    transformers = pytest.importorskip("transformers")
    return transformers, dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
                              patch_size=2, num_channels=1, layer_norm_eps=1e-6)


def written(theirs, folder):
    """The files that people have: torch.save's, with the names of the version that is installed, and save_pretrained's."""
    torch.save(theirs.state_dict(), folder / "theirs.pt")
    theirs.save_pretrained(folder)
    return folder / "theirs.pt", folder / "model.safetensors"


@pytest.mark.slow
def test_hugging_faces_classifier_gives_the_same_logits(hugging_face, tiny_vit, tmp_path):
    transformers, size = hugging_face
    theirs = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**size, num_labels=5))).eval()
    images = torch.rand(4, 1, 8, 8)
    for path in written(theirs, tmp_path):
        vit = tiny_vit(pool="cls")
        assert load_encoder(vit, path) == ([], [])
        with torch.no_grad():
            logits = theirs((images - vit.mean) / vit.std).logits
            assert logits.std() > 0.01
            torch.testing.assert_close(vit(images), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_hugging_faces_autoencoder_has_the_same_loss_and_reconstruction(hugging_face, tiny_dmae, tmp_path):
    transformers, size = hugging_face
    config = transformers.ViTMAEConfig(**size, decoder_hidden_size=8, decoder_num_hidden_layers=1, mask_ratio=0.5,
                                       decoder_num_attention_heads=2, decoder_intermediate_size=16, norm_pix_loss=True)
    theirs = randomise(transformers.ViTMAEForPreTraining(config)).eval()
    images, mask_noise = torch.rand(4, 1, 8, 8), torch.rand(4, 16)
    for path in written(theirs, tmp_path):
        dmae = tiny_dmae(loss_on="dropped")                            # Hugging Face has the plain MAE only
        assert load_autoencoder(dmae, path) == ([], [])
        with torch.no_grad():
            expected = theirs((images - dmae.mean) / dmae.std, noise=mask_noise)
            loss, prediction, mask = dmae(images, 0.0, 0.5, torch.zeros_like(images), mask_noise)
        assert torch.equal(mask, expected.mask) and prediction.std() > 0.01
        torch.testing.assert_close(prediction, expected.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-4, atol=1e-5)
