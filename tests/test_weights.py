"""Weights as people have them: every form of file gives the plain one's network, or one line."""

import re

import pytest
import torch
from conftest import randomise
from safetensors.torch import save_file
from torch import nn

import finetune
import pretrain
from model import (
    build_dmae,
    build_vit,
    load_autoencoder,
    load_encoder,
    load_weights,
    read_checkpoint,
)

SIZE = dict(image_size=8, dim=16, depth=2, heads=2)
DECODER = dict(decoder_dim=8, decoder_depth=1, decoder_heads=2)


@pytest.fixture
def state():
    """The weights of a small autoencoder, all of them random."""
    torch.manual_seed(3)
    return randomise(build_dmae("vit_digits", **SIZE, **DECODER)).state_dict()


def encoder_of(path, **overrides):
    torch.manual_seed(0)
    vit = build_vit("vit_digits", 5, **SIZE | overrides)
    load_encoder(vit, path)
    return vit.state_dict()


def autoencoder_of(path, **overrides):
    torch.manual_seed(0)
    dmae = build_dmae("vit_digits", **SIZE | DECODER | overrides)
    load_autoencoder(dmae, path)
    return dmae.state_dict()


def equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


FORMS = {
    "bare": lambda s: s,
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s, "arch": "vit"},
    "model_ema beside others": lambda s: {
        "optimizer": {"state": {}, "param_groups": []}, "epoch": 9, "scaler": {"scale": 2.0},
        "model_ema": s,
    },
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "DeepSpeed": lambda s: {"module": s, "lr_scheduler": None},
    "any other entry": lambda s: {"net": s, "acc": 93.1, "epoch": 9},
    "a number among them": lambda s: {"model": s | {"step": 9}},
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "DDP of a compiled model": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2"},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **prefixed(s, "module.")},
    "no class row": lambda s: {"model": s | {key: s[key][:, 1:] for key in TABLES}},
}
TABLES = ("pos_embed", "decoder_pos_embed")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_plain_files_weights_to_the_last_bit(state, tmp_path, form):
    if form == "no class row":                                           # it comes back as zeros
        for key in TABLES:
            state[key][:, 0] = 0
    torch.save(state, tmp_path / "plain.pt")
    torch.save(FORMS[form](state), tmp_path / "form.pt")
    equal(encoder_of(tmp_path / "form.pt"), encoder_of(tmp_path / "plain.pt"))
    equal(autoencoder_of(tmp_path / "form.pt"), autoencoder_of(tmp_path / "plain.pt"))
    assert torch.equal(autoencoder_of(tmp_path / "form.pt")["mask_token"], state["mask_token"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_safetensors_are_read(state, tmp_path, prefix):
    torch.save(state, tmp_path / "plain.pt")
    save_file(prefixed(state, prefix), tmp_path / "form.safetensors", {"format": "pt"})
    equal(encoder_of(tmp_path / "form.safetensors"), encoder_of(tmp_path / "plain.pt"))
    equal(autoencoder_of(tmp_path / "form.safetensors"), autoencoder_of(tmp_path / "plain.pt"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_go_on_in_fp32(state, tmp_path, dtype):
    half = {key: value.to(dtype) for key, value in state.items()}
    torch.save({"model": half}, tmp_path / "half.pt")
    torch.save({key: value.float() for key, value in half.items()}, tmp_path / "plain.pt")
    equal(encoder_of(tmp_path / "half.pt"), encoder_of(tmp_path / "plain.pt"))
    equal(autoencoder_of(tmp_path / "half.pt"), autoencoder_of(tmp_path / "plain.pt"))


@pytest.mark.parametrize("names", [("model", "model_ema"), ("model", "net"), ("state_dict", "net"),
                                   ("model_ema", "net")])
def test_of_several_entries_the_models_own_is_taken_wherever_it_stands(state, tmp_path, names):
    other = {key: value + 1 for key, value in state.items()}
    entries = dict(zip(names, (state, other), strict=True))
    for order in (names, names[::-1]):
        torch.save({name: entries[name] for name in order}, tmp_path / "two.pt")
        equal(read_checkpoint(tmp_path / "two.pt")["model"], state)


def test_an_encoder_alone_starts_pre_training_with_a_fresh_decoder(state, tmp_path):
    decoder = ("decoder", "mask_token")
    encoder = {key: value for key, value in state.items() if not key.startswith(decoder)}
    head = {"head.weight": torch.ones(3, 16), "head.bias": torch.ones(3)}
    torch.save(encoder | head, tmp_path / "encoder.pt")
    dmae = build_dmae("vit_digits", **SIZE, **DECODER)
    fresh = dmae.decoder_pred.weight.detach().clone()
    missing, left_over = load_autoencoder(dmae, tmp_path / "encoder.pt")
    assert missing and all(key.startswith(decoder) for key in missing)
    assert left_over == ["head.weight", "head.bias"]
    assert torch.equal(dmae.decoder_pred.weight, fresh)
    assert torch.equal(dmae.cls_token, state["cls_token"])


def test_half_a_decoder_is_refused(state, tmp_path):
    del state["decoder_pred.bias"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="decoder_pred.bias is missing"):
        autoencoder_of(tmp_path / "half.pt")


def test_positions_of_encoder_and_decoder_are_interpolated_for_another_grid(state, tmp_path):
    for key in TABLES:
        state[key] = torch.full_like(state[key], 0.25)
    torch.save(state, tmp_path / "grid.pt")
    found = autoencoder_of(tmp_path / "grid.pt", image_size=16)
    for key, width in zip(TABLES, (16, 8), strict=True):
        torch.testing.assert_close(found[key], torch.full((1, 65, width), 0.25))


def test_a_networks_own_weights_are_not_fitted_to_another_grid():
    """A run that goes on, or is certified, has the grid it was trained with."""
    own = build_vit("vit_digits", 10).state_dict()
    with pytest.raises(ValueError, match="run.last.pt does not fit the model: pos_embed is"):
        load_weights(build_vit("vit_digits", 10, image_size=16), own, "run.last.pt")


def test_a_file_of_numbered_tensors_is_refused(tmp_path):
    torch.save({0: torch.ones(1)}, tmp_path / "numbered.pt")
    with pytest.raises(ValueError, match="numbered.pt holds no vision transformer"):
        read_checkpoint(tmp_path / "numbered.pt")


@pytest.mark.parametrize("content, found", [
    ({"epoch": 3, "optimizer": {}}, "epoch, optimizer"),
    ({"model": "a string", "args": 3}, "model, args"),
    ({"model": {f"conv{i}.weight": torch.ones(1) for i in range(9)}},
     "conv0.weight, conv1.weight, conv2.weight, conv3.weight"),
])
def test_what_is_none_of_these_is_refused_with_what_is_expected_and_what_was_found(
    tmp_path, content, found
):
    torch.save(content, tmp_path / "other.pt")
    names = "cls_token, patch_embed.proj.weight, blocks.0.norm1.weight, ..."
    expected = re.escape(f"no vision transformer ({names}), but {found}")
    with pytest.raises(ValueError, match=expected) as error:
        read_checkpoint(tmp_path / "other.pt")
    assert "\n" not in str(error.value) and "other.pt" in str(error.value)


# --------------------------------------------------------------------------------------------------
# Through the command line
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [
    "state_dict", "any other entry", "DDP of a compiled model", "AveragedModel", "safetensors"])
def test_both_stages_take_them_by_init(tiny_run, tmp_path, form):
    plain = read_checkpoint(tiny_run / "pretrain.pt")["model"]
    file = tmp_path / ("form.safetensors" if form == "safetensors" else "form.pt")
    if form == "safetensors":
        save_file(plain, file)
    else:
        torch.save(FORMS[form](plain), file)
    cpu = torch.device("cpu")
    dmae = pretrain.build_model(pretrain.parse(["--init", str(file)]), cpu)
    equal(dmae.state_dict(), plain)
    vit = finetune.build_model(finetune.parse(["--init", str(file), "--sigma", "0.25"]), 10, cpu)
    taken = {key: value for key, value in vit.state_dict().items() if "norm." not in key[:8]}
    del taken["head.weight"], taken["head.bias"]
    equal(taken, {key: plain[key] for key in taken})


def test_a_file_that_holds_none_is_one_line_with_status_2(tmp_path, capsys):
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for stage, more in ((pretrain, []), (finetune, ["--sigma", "0.25"])):
        argv = ["--init", str(tmp_path / "none.pt"), "--out", str(tmp_path / "run")]
        with pytest.raises(SystemExit) as stop:
            stage.main([*argv, *more, "--device", "cpu"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "but epoch" in error
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# Hugging Face
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mae():
    """transformers' ViTMAE with random weights; layer_norm_eps is the MAE code's, not its own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, layer_norm_eps=1e-6, mask_ratio=0.5, norm_pix_loss=True,
        image_size=8, patch_size=2, num_channels=1)
    return randomise(transformers.ViTMAEForPreTraining(config).eval())


CLASSIC = [                              # what transformers 5 says, and what 4 said
    (r"^vit\.layers\.", "vit.encoder.layer."),
    (r"\.q_proj\.", ".attention.query."),
    (r"\.k_proj\.", ".attention.key."),
    (r"\.v_proj\.", ".attention.value."),
    (r"\.o_proj\.", ".output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
]


def classic(state):
    """The names that transformers 4 gave, and that the published files carry."""
    renamed = {}
    for key, value in state.items():
        for now, then in CLASSIC:
            key = re.sub(now, then, key)
        renamed[key] = value
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in renamed
    assert "vit.encoder.layer.1.attention.output.dense.weight" in renamed
    return renamed


@pytest.mark.parametrize("form", ["state dict", "classic names", "save_pretrained"])
def test_hugging_faces_autoencoder_has_the_same_loss_prediction_and_mask(mae, tmp_path, form):
    file = tmp_path / "mae.pt"
    if form == "save_pretrained":
        mae.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    else:
        state = mae.state_dict()
        torch.save(classic(state) if form == "classic names" else state, file)
    dmae = build_dmae("vit_digits", **SIZE, **DECODER, loss_on="dropped", norm_pix=True)
    assert load_autoencoder(dmae, file) == ([], [])
    images, mask_noise = torch.rand(3, 1, 8, 8), torch.rand(3, 16)
    with torch.no_grad():
        theirs = mae((images - dmae.mean) / dmae.std, noise=mask_noise)
        loss, prediction, mask = dmae(images, 0.0, 0.5, torch.zeros_like(images), mask_noise)
    assert prediction.std() > 0.1 and torch.equal(mask, theirs.mask)
    torch.testing.assert_close(prediction, theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_hugging_faces_encoder_becomes_the_classifier(mae, tmp_path, whole):
    torch.save(mae.state_dict() if whole else mae.vit.state_dict(), tmp_path / "mae.pt")
    vit = build_vit("vit_digits", 5, pool="cls", **SIZE)
    missing, left_over = load_encoder(vit, tmp_path / "mae.pt")
    assert set(missing) == {"head.weight", "head.bias"} and bool(left_over) == whole
    images = torch.rand(3, 1, 8, 8)
    vit.head = nn.Identity()
    before, mae.config.mask_ratio = mae.config.mask_ratio, 0.0
    with torch.no_grad():                # all patches, in any order: the class token is the same
        tokens = mae.vit((images - vit.mean) / vit.std, noise=torch.rand(3, 16)).last_hidden_state
        torch.testing.assert_close(vit(images), tokens[:, 0], rtol=1e-4, atol=1e-5)
    mae.config.mask_ratio = before


def test_hugging_faces_classifier_gives_the_same_logits(tiny_vit, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=2, num_channels=1, layer_norm_eps=1e-6, num_labels=5)
    theirs = randomise(transformers.ViTForImageClassification(config)).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")      # names of the installed version
    theirs.save_pretrained(tmp_path)                             # names of files on the hub
    images = torch.rand(4, 1, 8, 8)
    for name in ("theirs.pt", "model.safetensors"):
        vit = tiny_vit(pool="cls")
        assert load_encoder(vit, tmp_path / name) == ([], [])
        with torch.no_grad():
            logits = theirs((images - vit.mean) / vit.std).logits
            assert logits.std() > 0.01
            torch.testing.assert_close(vit(images), logits, rtol=1e-5, atol=1e-5)
