"""Settings that a recipe or a flag stands for: RandAugment's strength, gradient clipping, dtypes, processes, workers."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import certify
import finetune
import pretrain
from finetune import make_augment, open_images
from model import build_dmae, build_vit

# -- RandAugment ---------------------------------------------------------------------------------------------------------

# Strengths at the paper's "magnitude 9", which is 9 of timm's 10, and of torchvision's magnitude 27 of its 30. Translations
# are shares of the side (torchvision's largest is 150/331, timm's 0.45), solarisation is its threshold of 255. They differ by
# definition in posterize (timm keeps 1 bit, torchvision 4), and timm has Invert and SolarizeAdd besides, applies each
# operation with a chance of 1/2 and draws magnitudes with a deviation of 0.5.
STRENGTH = {  # torchvision's name: (timm's name, timm's strength, torchvision's strength, tolerance)
    "Rotate": ("Rotate", 27.0, 27.0, 1e-6),
    "ShearX": ("ShearX", 0.27, 0.27, 1e-6),
    "ShearY": ("ShearY", 0.27, 0.27, 1e-6),
    "TranslateX": ("TranslateXRel", 0.405, 0.9 * 150 / 331, 0.004),
    "TranslateY": ("TranslateYRel", 0.405, 0.9 * 150 / 331, 0.004),
    "Brightness": ("BrightnessIncreasing", 0.81, 0.81, 1e-6),
    "Color": ("ColorIncreasing", 0.81, 0.81, 1e-6),
    "Contrast": ("ContrastIncreasing", 0.81, 0.81, 1e-6),
    "Sharpness": ("SharpnessIncreasing", 0.81, 0.81, 1e-6),
    "Solarize": ("SolarizeIncreasing", 26 / 255, 25.5 / 255, 0.003),
}


def rand_augment():
    """The one in the recipe that claims the paper's setting."""
    images = SimpleNamespace(files=["a"], size=224)
    steps = make_augment(finetune.RECIPES["imagenet-base"]["augment"], images, 0.25).transforms
    (found,) = (step for step in steps if isinstance(step, v2.RandAugment))
    return found


def test_rand_augment_is_as_strong_as_the_papers_operation_by_operation():
    ours = rand_augment()
    assert (ours.num_ops, ours.magnitude, ours.num_magnitude_bins) == (2, 27, 31)
    for name, (_, paper, expected, tolerance) in STRENGTH.items():
        magnitudes, _ = ours._AUGMENTATION_SPACE[name]
        strength = float(magnitudes(ours.num_magnitude_bins, 224, 224)[ours.magnitude])
        strength = strength / 224 if name.startswith("Translate") else strength
        assert strength == pytest.approx(expected, abs=1e-6), name
        assert strength == pytest.approx(paper, abs=tolerance), name
    graded = {name for name, (magnitudes, _) in ours._AUGMENTATION_SPACE.items() if magnitudes(31, 224, 224) is not None}
    assert graded - {*STRENGTH} == {"Posterize"}


def test_those_strengths_are_timms():
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    for name, paper, *_ in STRENGTH.values():
        (level,) = auto_augment.LEVEL_TO_ARG[name](9.0, {})
        if "Solarize" in name:
            level = level / 255
        if name.split("Inc")[0] in ("Brightness", "Color", "Contrast", "Sharpness"):
            level = abs(level - 1)                                     # a factor; the sign is drawn
        assert abs(level) == pytest.approx(paper), name


def test_rand_augment_runs_on_pictures(make_folder):
    images = open_images("folder", make_folder(80), True, 64, 3)
    picture = finetune.open_picture(images.files[0], 3)
    torch.manual_seed(0)
    out = make_augment("rand-augment", images, 0.25)(picture)
    assert isinstance(picture, Image.Image) and out.shape == (3, 64, 64) and out.dtype == torch.uint8


# -- Clipping ------------------------------------------------------------------------------------------------------------


def test_clipping_scales_the_gradient_down_to_the_norm_and_never_up():
    for largest in (0.5, 100.0):
        weights = [nn.Parameter(torch.tensor([3.0, 0.0])), nn.Parameter(torch.tensor([[4.0]]))]
        network = nn.ParameterList(weights)
        sum((w * w).sum() / 2 for w in weights).backward()             # the gradient is (3, 0), (4): of norm 5
        assert float(pretrain.clip_gradients(network, largest)) == pytest.approx(5.0)
        scale = min(1.0, largest / 5)
        torch.testing.assert_close(weights[0].grad, torch.tensor([3.0, 0.0]) * scale, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[1].grad, torch.tensor([[4.0]]) * scale, rtol=1e-5, atol=1e-6)
    assert pretrain.clip_gradients(network, None) is None


SHORT = {"pretrain": (pretrain, [], "pretrain"),
         "finetune": (finetune, ["--sigma", "0.25", "--init", "scratch", "--vote-every", "9"], "finetune_sigma_0.25")}


def log_of(out, stem):
    return [{key: value for key, value in json.loads(line).items() if key != "time"}
            for line in (out / f"{stem}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", SHORT)
def test_the_norm_is_logged_clipping_acts_and_is_off_by_default(stage, tmp_path, monkeypatch):
    module, more, stem = SHORT[stage]
    for name in ("draw_loss", "draw_reconstructions"):
        monkeypatch.setattr(pretrain, name, lambda *_: None)
    monkeypatch.setattr(finetune, "measure", lambda *_: dict(clean=0.5, noisy=0.5, vote=0.5))
    for name, flags in (("off", []), ("wide", ["--clip-grad", "1e6"]), ("tight", ["--clip-grad", "0.001"])):
        module.main([*more, *flags, "--epochs", "0.6", "--log-every", "2", "--device", "cpu", "--out", str(tmp_path / name)])
    off, wide, tight = (log_of(tmp_path / name, stem) for name in ("off", "wide", "tight"))
    losses = lambda rows: [row["loss"] for row in rows if "loss" in row]
    assert not any("grad_norm" in row for row in off) and losses(off) == losses(wide) != losses(tight)
    norms = [row["grad_norm"] for row in wide if "loss" in row]
    assert all(np.isfinite(norms)) and min(norms) > 0.001


def test_a_clipped_run_that_was_cut_ends_as_one_that_was_not(tmp_path, monkeypatch):
    for name in ("draw_loss", "draw_reconstructions"):
        monkeypatch.setattr(pretrain, name, lambda *_: None)
    argv = ["--clip-grad", "0.01", "--epochs", "1", "--save-every", "4", "--log-every", "2", "--device", "cpu", "--out"]
    pretrain.main([*argv, str(tmp_path / "whole")])
    rate = pretrain.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", lambda step, *rest: 1 / 0 if step == 6 else rate(step, *rest))
        with pytest.raises(ZeroDivisionError):
            pretrain.main([*argv, str(tmp_path / "cut")])
    pretrain.main([*argv, str(tmp_path / "cut")])
    whole, cut = (torch.load(tmp_path / name / "pretrain.pt", weights_only=True)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert log_of(tmp_path / "cut", "pretrain") == log_of(tmp_path / "whole", "pretrain")


def test_a_loss_that_is_none_says_what_to_try(tmp_path, monkeypatch, capsys):
    draw = pretrain.draw_corruption
    monkeypatch.setattr(pretrain, "draw_corruption", lambda *a: (draw(*a)[0] * float("inf"), draw(*a)[1]))
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--epochs", "1", "--log-every", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "--clip-grad" in error and "--dtype fp32" in error


# -- Dtypes, processes, workers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pretrain, finetune, certify])
@pytest.mark.parametrize("device, native, expected", [("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32"),
                                                      ("mps", True, "fp32")])
def test_auto_is_bf16_on_gpus_that_have_it_natively_and_fp32_elsewhere(module, device, native, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: asked.append(how) or native)
    assert module.pick_dtype("auto", SimpleNamespace(type=device), {}) == expected
    assert asked == ([{"including_emulation": False}] if device == "cuda" else [])
    assert module.pick_dtype("bf16", SimpleNamespace(type="cpu"), {}) == "bf16"
    assert module.pick_dtype("auto", SimpleNamespace(type="cpu"), {"dtype": "bf16"}) == "bf16"     # a run goes on as it began


@pytest.mark.parametrize("module", [pretrain, finetune])
@pytest.mark.parametrize("device, dtype, image_size, model_size, fused", [
    ("cpu", "bf16", 28, None, False), ("cpu", "fp32", 28, None, True), ("cpu", "bf16", 224, None, True),
    ("cpu", "bf16", 32, 224, True), ("cuda", "bf16", 28, None, True),
])
def test_bf16_on_cpus_trains_small_models_with_plain_attention(module, device, dtype, image_size, model_size, fused):
    """The fused kernel's backward took twice the time of the whole step in fp32 (results/speed.md). Either is attention."""
    q, k, v = torch.randn(3, 2, 4, 17, 32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    try:
        module.choose_attention(SimpleNamespace(dtype=dtype, image_size=image_size, model_size=model_size),
                                SimpleNamespace(type=device))
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    torch.testing.assert_close(found, expected)


def test_a_resume_takes_the_dtype_of_the_run(tmp_path, monkeypatch, capsys):
    for name in ("draw_loss", "draw_reconstructions"):
        monkeypatch.setattr(pretrain, name, lambda *_: None)
    argv = ["--epochs", "0.3", "--device", "cpu", "--out", str(tmp_path)]
    rate = pretrain.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", lambda step, *rest: 1 / 0 if step == 2 else rate(step, *rest))
        with pytest.raises(ZeroDivisionError):
            pretrain.main([*argv, "--dtype", "bf16"])
    pretrain.main(argv)
    assert " in bf16" in capsys.readouterr().out
    assert json.loads((tmp_path / "pretrain.json").read_text())["dtype"] == "bf16"


@pytest.mark.parametrize("build, broadcast", [
    (lambda: build_dmae("vit_digits"), False), (lambda: build_vit("vit_digits", 10), False),
    (lambda: build_vit("vit_digits", 10, pool="cls", probe=True), True)])
def test_buffers_are_broadcast_only_where_statistics_are_learned(build, broadcast, monkeypatch):
    made = {}
    monkeypatch.setattr(pretrain, "DistributedDataParallel", lambda model, **how: made.update(how) or SimpleNamespace())
    network = pretrain.distribute(build())
    assert network.broadcast_buffers == broadcast and made == dict(gradient_as_bucket_view=True)


@pytest.mark.parametrize("cores, processes, expected", [(16, 1, 15), (64, 8, 7), (2, 2, 1), (1, 1, 1)])
def test_workers_are_the_cores_of_a_process_less_one(cores, processes, expected, monkeypatch, make_folder):
    asked = []

    class Loader:
        def __init__(self, *_, num_workers, **__):
            asked.append(num_workers)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    images = open_images("folder", make_folder(80), True, 80, 3)
    for workers in (None, 0, 3):
        list(finetune.load_batches(images, [[(0, 0)]], torch.device("cpu"), workers=workers))
    assert asked == [expected, 0, 3]


def test_imagenets_micro_batches_fill_a_gpu():
    """On eight processes: one micro-batch of pre-training and of fine-tuning (memory: tests/bench.py --cost)."""
    for module in (pretrain, finetune):
        for name in ("imagenet-base", "imagenet-large"):
            recipe = module.RECIPES[name]
            assert module.share_batch(recipe["batch"], 8, recipe["device_batch"])[1] == 1
