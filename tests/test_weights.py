"""Weights as people have them: every form of file gives the same network as the plain one, or one clear line."""

import json
import re

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file
from torch import nn

import finetune
import pretrain
from model import build_dmae, build_vit, load_autoencoder, load_encoder, read_checkpoint

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
    "model_ema beside others": lambda s: {"model_ema": s, "optimizer": {"state": {}, "param_groups": []}, "epoch": 9,
                                          "scaler": {"scale": 2.0}},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "DeepSpeed": lambda s: {"module": s, "lr_scheduler": None},
    "DataParallel": lambda s: prefixed(s, "module."),
    "torch.compile": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "DDP of a compiled model": lambda s: {"state_dict": prefixed(s, "module._orig_mod.")},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "pytorch-lightning_version": "2"},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(7), **prefixed(s, "module.")},
    "no class row": lambda s: {"model": {k: v[:, 1:] if k.endswith("pos_embed") else v for k, v in s.items()}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_plain_files_weights_to_the_last_bit(state, tmp_path, form):
    if form == "no class row":                                         # it comes back as zeros
        state = {k: torch.cat([0 * v[:, :1], v[:, 1:]], dim=1) if k.endswith("pos_embed") else v for k, v in state.items()}
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
    torch.save({"model": {key: value.to(dtype) for key, value in state.items()}}, tmp_path / "half.pt")
    torch.save({key: value.to(dtype).float() for key, value in state.items()}, tmp_path / "plain.pt")
    equal(encoder_of(tmp_path / "half.pt"), encoder_of(tmp_path / "plain.pt"))
    equal(autoencoder_of(tmp_path / "half.pt"), autoencoder_of(tmp_path / "plain.pt"))


def test_of_two_readings_the_first_is_taken_and_named(state, tmp_path):
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"model_ema": other, "model": state}, tmp_path / "two.pt")
    with pytest.warns(UserWarning, match=r"two\.pt holds model and model_ema: model is taken"):
        content = read_checkpoint(tmp_path / "two.pt")
    equal(content["model"], state)


def test_an_encoder_alone_starts_pre_training_with_a_fresh_decoder(state, tmp_path):
    encoder = {key: value for key, value in state.items() if not key.startswith(("decoder", "mask_token"))}
    torch.save(encoder | {"head.weight": torch.ones(3, 16), "head.bias": torch.ones(3)}, tmp_path / "encoder.pt")
    dmae = build_dmae("vit_digits", **SIZE, **DECODER)
    fresh = dmae.decoder_pred.weight.detach().clone()
    missing, left_over = load_autoencoder(dmae, tmp_path / "encoder.pt")
    assert all(key.startswith(("decoder", "mask_token")) for key in missing) and missing
    assert left_over == ["head.weight", "head.bias"]
    assert torch.equal(dmae.decoder_pred.weight, fresh) and torch.equal(dmae.cls_token, state["cls_token"])


def test_half_a_decoder_is_refused(state, tmp_path):
    del state["decoder_pred.bias"]
    torch.save(state, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="decoder_pred.bias is missing"):
        autoencoder_of(tmp_path / "half.pt")


def test_positions_of_another_grid_are_interpolated_for_pre_training(state, tmp_path):
    state["pos_embed"] = torch.full((1, 17, 16), 0.25)
    torch.save(state, tmp_path / "grid.pt")
    found = autoencoder_of(tmp_path / "grid.pt", image_size=16)
    torch.testing.assert_close(found["pos_embed"], torch.full((1, 65, 16), 0.25))
    assert found["decoder_pos_embed"].shape == (1, 65, 8)


@pytest.mark.parametrize("content, found", [
    ({"epoch": 3, "optimizer": {}}, "epoch, optimizer"),
    ({"model": {"layer1.weight": torch.ones(2), "layer1.bias": torch.ones(2), "fc.weight": torch.ones(1)}},
     "layer1.weight, layer1.bias, fc.weight"),
    ({"model": "a string", "args": 3}, "model, args"),
    ({f"conv{i}.weight": torch.ones(1) for i in range(9)}, "conv0.weight, conv1.weight, conv2.weight, conv3.weight and 5 more"),
])
def test_what_is_none_of_these_is_refused_with_what_was_found_and_what_is_expected(tmp_path, content, found):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        read_checkpoint(tmp_path / "other.pt")
    assert "\n" not in str(error.value) and "expected" in str(error.value) and "other.pt" in str(error.value)


# -- Through the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["state_dict", "DDP of a compiled model", "AveragedModel", "safetensors"])
def test_both_stages_take_them_by_init(tiny_run, tmp_path, form):
    plain = read_checkpoint(tiny_run / "pretrain.pt")["model"]
    file = tmp_path / ("form.safetensors" if form == "safetensors" else "form.pt")
    if form == "safetensors":
        save_file(plain, file)
    else:
        torch.save(FORMS[form](plain), file)
    common = ["--recipe", "digits", "--init", str(file), "--dry-run", "--device", "cpu", "--out", str(tmp_path / "run")]
    pretrain.main(common)
    finetune.main([*common, "--sigma", "0.25"])


def test_a_file_that_holds_none_is_one_line_with_status_2(tmp_path, capsys):
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for stage, more in ((pretrain, []), (finetune, ["--sigma", "0.25"])):
        with pytest.raises(SystemExit) as stop:
            stage.main([*more, "--init", str(tmp_path / "none.pt"), "--device", "cpu", "--out", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and "epoch" in error and "expected" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["vit.pt", "vit.safetensors"])
def test_an_exported_classifier_is_read_back_and_describes_itself(tiny_run, tmp_path, name):
    source = str(tiny_run / "pretrain.pt")
    finetune.main(["--sigma", "0.25", "--out", str(tiny_run), "--init", source, "--export", str(tmp_path / name)])
    tuned = read_checkpoint(tiny_run / "finetune_sigma_0.25.pt")
    equal(dict(sorted(read_checkpoint(tmp_path / name)["model"].items())), dict(sorted(tuned["model"].items())))
    vit = build_vit("vit_digits", 10)
    assert load_encoder(vit, tmp_path / name) == ([], [])
    if name.endswith(".safetensors"):
        from safetensors import safe_open
        with safe_open(tmp_path / name, "pt") as file:
            described = {key: json.loads(value) for key, value in file.metadata().items()}
        assert load_file(tmp_path / name).keys() == tuned["model"].keys()
    else:
        described = torch.load(tmp_path / name, weights_only=True)
    assert described["model_args"]["embed_dim"] == 64 and described["sigma"] == 0.25
    assert described["classes"] == list("0123456789") and described["mean"] == [0.3054] or described["mean"] == (0.3054,)
    finetune.main(["--sigma", "0.5", "--recipe", "digits", "--init", str(tmp_path / name), "--dry-run", "--device", "cpu"])


# -- Hugging Face --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mae():
    """transformers' ViTMAE with random weights; layer_norm_eps as in the MAE paper's code (its own default is 1e-12)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=2,
        num_channels=1, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16, layer_norm_eps=1e-6, mask_ratio=0.5, norm_pix_loss=True)
    return randomise(transformers.ViTMAEForPreTraining(config).eval())


CLASSIC = [(r"^vit\.layers\.", "vit.encoder.layer."), (r"\.q_proj\.", ".attention.query."), (r"\.k_proj\.", ".attention.key."),
           (r"\.v_proj\.", ".attention.value."), (r"\.o_proj\.", ".output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
           (r"\.mlp\.fc2\.", ".output.dense.")]


def classic(state):
    """The names that transformers 4 gave, and that the published files carry."""
    renamed = {}
    for key, value in state.items():
        for now, then in CLASSIC:
            key = re.sub(now, then, key)
        renamed[key] = value
    assert any(re.match(r"decoder\.decoder_layers\.0\.attention\.attention\.query", key) for key in renamed)
    assert any(re.match(r"vit\.encoder\.layer\.1\.attention\.output\.dense", key) for key in renamed)
    return renamed


@pytest.mark.parametrize("form", ["state dict", "classic names", "save_pretrained"])
def test_hugging_faces_autoencoder_has_the_same_loss_prediction_and_mask(mae, tmp_path, form):
    file = tmp_path / "mae.pt"
    if form == "save_pretrained":
        mae.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    else:
        torch.save(classic(mae.state_dict()) if form == "classic names" else mae.state_dict(), file)
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
    mae.config.mask_ratio, before = 0.0, mae.config.mask_ratio
    with torch.no_grad():                                              # all patches, in any order: the class token is the same
        theirs = mae.vit((images - vit.mean) / vit.std, noise=torch.rand(3, 16)).last_hidden_state[:, 0]
        torch.testing.assert_close(vit(images), theirs, rtol=1e-4, atol=1e-5)
    mae.config.mask_ratio = before
