"""What recipes and flags stand for: the paper's values, RandAugment, a step, dtypes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import certify
import finetune
import pretrain
from finetune import make_augment, noisy_logits

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Recipes: the paper's values (DMAE, section 4 and appendix), as the stages see them
# --------------------------------------------------------------------------------------------------

IMAGENET = dict(dataset="folder", size=224, normalisation="")
CIFAR10 = dict(dataset="cifar10", normalisation="")


def check(args, expected):
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("recipe, expected", [
    ("imagenet-base", dict(IMAGENET, model="vit_base_patch16", epochs=1100, warmup_epochs=40,
                           batch=4096, base_lr=1.5e-4, augment="resized-crop")),
    ("imagenet-large", dict(IMAGENET, model="vit_large_patch16", epochs=1600, warmup_epochs=40,
                            batch=4096, base_lr=1.5e-4, augment="resized-crop")),
    ("imagenet-huge", dict(IMAGENET, model="vit_huge_patch14", mask_ratio=0.75)),
    ("cifar10-transfer", dict(CIFAR10, model="vit_base_patch16", epochs=50, warmup_epochs=10,
                              batch=512, base_lr=5e-5, augment="flip"))])
def test_pre_training_recipes_hold_the_papers_values(recipe, expected):
    common = dict(sigma=0.25, mask_ratio=0.75, norm_pix=True, loss_on="all", weight_decay=0.05)
    args = pretrain.parse(["--recipe", recipe])
    check(args, common | expected)
    optimizer = pretrain.build_optimizer(nn.Linear(2, 2), args)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
    assert optimizer.defaults["lr"] == pytest.approx(args.base_lr * args.batch / 256)


def tuned(recipe, *flags, sigma=0.25):
    return finetune.parse(["--init", "scratch", "--sigma", str(sigma), "--recipe", recipe, *flags])


MIXED = dict(mixup=0.8, cutmix=1.0, erasing=0.25, augment="rand-augment")
FLIPPED = dict(mixup=0.0, cutmix=0.0, erasing=0.0, augment="flip")
CONSISTENCY = dict(copies=2, lam=2.0, eta=0.5, label_smoothing=0.1)
CROSS_ENTROPY = dict(copies=1, label_smoothing=0.1)


@pytest.mark.parametrize("recipe, expected", [
    ("imagenet-base", dict(IMAGENET, **MIXED, model="vit_base_patch16", epochs=100, batch=1024,
                           base_lr=5e-4, layer_decay=0.65, drop_path=0.1, objective="consistency",
                           objective_args=CONSISTENCY)),
    ("imagenet-large", dict(IMAGENET, **MIXED, model="vit_large_patch16", epochs=50, batch=1024,
                            base_lr=1e-3, layer_decay=0.75, drop_path=0.2, objective="gaussian",
                            objective_args=CROSS_ENTROPY)),
    ("imagenet-huge", dict(IMAGENET, **MIXED, model="vit_huge_patch14")),
    ("cifar10-transfer", dict(CIFAR10, **FLIPPED, model="vit_base_patch16", epochs=50, batch=256,
                              base_lr=5e-4, layer_decay=0.65, drop_path=0.1,
                              objective="consistency", objective_args=CONSISTENCY))])
def test_fine_tuning_recipes_hold_the_papers_values(recipe, expected):
    args = tuned(recipe)
    check(args, dict(min_lr=1e-6, weight_decay=0.05, warmup_epochs=5) | expected)
    if args.objective == "consistency":
        etas = [tuned(recipe, sigma=sigma).objective_args["eta"] for sigma in (0.25, 0.5, 1.0)]
        assert etas == [0.5, 0.5, 0.1]
    optimizer = finetune.build_optimizer(finetune.build_vit("vit_digits", 10), args)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


@pytest.mark.parametrize("recipe", ["imagenet-base", "imagenet-large", "imagenet-huge"])
def test_the_linear_probe_has_the_papers_values(recipe):
    args = tuned(recipe, "--linear-probe")
    check(args, dict(epochs=90, batch=16384, base_lr=0.1, min_lr=0.0, weight_decay=0.0,
                     warmup_epochs=10, augment="resized-crop", mixup=0.0, cutmix=0.0, erasing=0.0,
                     drop_path=0.0, objective="gaussian",
                     objective_args=dict(copies=1, label_smoothing=0.0)))
    probe = finetune.build_vit("vit_digits", 10, pool="cls", probe=True)
    optimizer = finetune.build_optimizer(probe, args)
    assert isinstance(optimizer, finetune.LARS) and optimizer.defaults["momentum"] == 0.9
    assert (probe.head[0].eps, probe.head[0].affine) == (1e-6, False)


@pytest.mark.parametrize("module", [pretrain, finetune])
@pytest.mark.parametrize("recipe", pretrain.RECIPES)
def test_a_recipe_is_a_run_that_can_begin(module, recipe):
    """Its batch is whole micro-batches, its augmentation is one for its pictures."""
    args = pretrain.parse(["--recipe", recipe]) if module is pretrain else tuned(recipe)
    largest = {"digits": 1293, "folder": 1_271_167}.get(args.dataset, 45_000)
    _, accumulate, steps = module.plan(args.batch, args.device_batch, largest)
    assert args.batch % accumulate == 0 and 0 < args.warmup_epochs * steps < args.epochs * steps
    sides = {"digits": 8, "mnist": 28, "fashion-mnist": 28, "cifar10": 32, "folder": 224}
    assert args.size == sides[args.dataset]                    # a folder's, in this recipe
    more = [args.erasing] if module is finetune else []
    made = module.make_augment(args.augment, SimpleNamespace(size=args.size), *more)
    assert (made is None) == (args.augment == "none")


def test_imagenets_micro_batches_fill_a_gpu(monkeypatch):
    """On eight processes one is a step, in both stages (memory: tests/bench.py --cost)."""
    for module in (pretrain, finetune):
        monkeypatch.setattr(module, "WORLD", 8)
        for recipe in ("imagenet-base", "imagenet-large"):
            args = pretrain.parse(["--recipe", recipe]) if module is pretrain else tuned(recipe)
            assert module.plan(args.batch, args.device_batch, 1_281_167)[1] == 1


def test_fine_tuning_takes_data_and_model_from_the_checkpoint_and_refuses_others(tiny_run):
    init = ["--sigma", "0.25", "--init", str(tiny_run / "pretrain.pt")]
    check(finetune.parse(init), dict(recipe="digits", dataset="digits", model="vit_digits", size=8))
    with pytest.raises(ValueError, match="--model vit_fashion contradicts .*vit_digits"):
        finetune.parse([*init, "--model", "vit_fashion"])
    other = finetune.parse([*init, "--recipe", "mnist"])       # its weights move to other data
    check(other, dict(dataset="mnist", model="vit_fashion", size=28))


def test_a_checkpoint_of_the_old_version_is_taken_with_its_settings():
    init = Path(finetune.__file__).parent / "results" / "digits" / "pretrain.pt"
    args = finetune.parse(["--sigma", "0.25", "--init", str(init)])
    check(args, dict(recipe="digits", dataset="digits", model="vit_digits", size=8, holdout=0.1))
    vit = finetune.build_model(args, 10, CPU)
    theirs = torch.load(init, weights_only=True)["model"]
    state = vit.state_dict()
    assert {name for name in state if name not in theirs} == {
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert all(torch.equal(state[name], theirs[name]) for name in state if name in theirs)


# --------------------------------------------------------------------------------------------------
# RandAugment
# --------------------------------------------------------------------------------------------------

# Strengths at the paper's "magnitude 9", which is 9 of timm's 10, and of torchvision's magnitude 27
# of its 30. Translations are shares of the side (torchvision's largest is 150/331, timm's 0.45),
# solarisation is its threshold of 255. They differ by definition in posterize (timm keeps 1 bit,
# torchvision 4), and timm has Invert and SolarizeAdd besides, applies each operation with a chance
# of 1/2 and draws magnitudes with a deviation of 0.5.
STRENGTH = {  # torchvision's name: (timm's name, timm's strength, torchvision's, tolerance)
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


def test_rand_augment_is_as_strong_as_the_papers_operation_by_operation():
    recipe = tuned("imagenet-base")
    steps = make_augment(recipe.augment, SimpleNamespace(size=224), recipe.erasing).transforms
    (ours,) = (step for step in steps if isinstance(step, v2.RandAugment))
    assert (ours.num_ops, ours.magnitude, ours.num_magnitude_bins) == (2, 27, 31)
    space = ours._AUGMENTATION_SPACE
    for name, (_, paper, expected, tolerance) in STRENGTH.items():
        magnitudes, _ = space[name]
        strength = float(magnitudes(ours.num_magnitude_bins, 224, 224)[ours.magnitude])
        strength = strength / 224 if name.startswith("Translate") else strength
        assert strength == pytest.approx(expected, abs=1e-6), name
        assert strength == pytest.approx(paper, abs=tolerance), name
    graded = {name for name, (made, _) in space.items() if made(31, 224, 224) is not None}
    assert graded - {*STRENGTH} == {"Posterize"}


def test_those_strengths_are_timms():
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    for name, paper, *_ in STRENGTH.values():
        (level,) = auto_augment.LEVEL_TO_ARG[name](9.0, {})
        if "Solarize" in name:
            level = level / 255
        if name.split("Inc")[0] in ("Brightness", "Color", "Contrast", "Sharpness"):
            level = abs(level - 1)                             # a factor; the sign is drawn
        assert abs(level) == pytest.approx(paper), name


def test_what_fine_tuning_makes_of_a_picture_has_its_size_and_an_erased_rectangle_is_black():
    white = Image.new("RGB", (100, 80), "white")
    torch.manual_seed(0)
    for kind, share in (("rand-augment", 0.0), ("resized-crop", 0.999)):
        out = make_augment(kind, SimpleNamespace(size=72), share)(white)
        assert out.shape == (3, 72, 72) and out.dtype == torch.uint8
        black = (out == 0).all(0)
        assert (0.02 < black.float().mean() < 0.34) == (share > 0)
    assert black.sum() == black.any(0).sum() * black.any(1).sum()


# --------------------------------------------------------------------------------------------------
# A step and its micro-batches
# --------------------------------------------------------------------------------------------------


class Straight(nn.Module):
    """Logits, or a loss, that are linear in the weights."""

    grid = (2, 2)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, images, sigma=None, *_):
        logits = images.flatten(1) @ self.weight
        return logits if sigma is None else (logits.square().mean(), None, None)


def one_step(stage, network, parts):
    args = SimpleNamespace(seed=0, sigma=0.0, mask_ratio=0.0, dtype="fp32", epochs=1,
                           objective="gaussian", objective_args={})
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    if stage is pretrain:
        return pretrain.train_step(network, optimizer, iter(parts), len(parts), args, 0)
    plain = lambda f, x, targets, sigma, epoch, epochs: F.cross_entropy(
        f(x, torch.zeros(1, *x.shape))[0], targets)
    mix = lambda x, labels: (x, F.one_hot(labels, 3).float())
    return finetune.train_step(network, optimizer, iter(parts), mix, len(parts), plain, args, 0, 0)


@pytest.mark.parametrize("stage", [pretrain, finetune])
def test_a_step_is_down_the_mean_gradient_of_its_micro_batches(stage):
    network = Straight()
    x, labels = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 0, 1])
    weight = network.weight.detach().clone().requires_grad_()
    logits = x.flatten(1) @ weight
    loss = logits.square().mean() if stage is pretrain else F.cross_entropy(logits, labels)
    loss.backward()
    parts = [*zip(x.split(2), labels.split(2), strict=True)]
    assert float(one_step(stage, network, parts)) == pytest.approx(float(loss.detach()))
    torch.testing.assert_close(network.weight, weight - weight.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_none_says_what_to_try(tmp_path, monkeypatch, capsys):
    draw = pretrain.draw_corruption
    infinite = lambda *position: (draw(*position)[0] * float("inf"), draw(*position)[1])
    monkeypatch.setattr(pretrain, "draw_corruption", infinite)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "--base-lr" in error and "--dtype fp32" in error
    assert not [*(tmp_path / "run").glob("*.pt")]


# --------------------------------------------------------------------------------------------------
# Devices, dtypes
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [pretrain, finetune, certify])
@pytest.mark.parametrize("kind, native, expected", [
    ("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32"), ("mps", True, "fp32")])
def test_auto_is_the_accelerator_and_bf16_on_gpus_that_have_it_natively(
    module, kind, native, expected, monkeypatch
):
    found = None if kind == "cpu" else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    one = SimpleNamespace(device_count=lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda _: one)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    # Emulated bf16 would be slower than fp32.
    has = lambda including_emulation=True: native or including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has)
    device, dtype = module.pick_device("auto", "auto")
    assert (device.type, dtype) == (kind, expected)
    assert module.pick_device("cpu", "auto") == (CPU, "fp32")
    assert module.pick_device("auto", "bf16")[1] == "bf16"
    assert module.pick_device("auto", "fp32")[1] == "fp32"
    monkeypatch.setattr(module, "LOCAL_WORLD", 2)
    if kind != "cpu":
        with pytest.raises(ValueError, match=f"--device {kind}.*fewer than 2"):
            module.pick_device("auto", "auto")


@pytest.mark.parametrize("stage, more", [
    (pretrain, []), (finetune, ["--sigma", "0.25", "--init", "scratch"])])
def test_bf16_on_cpus_trains_with_plain_attention(stage, more, tmp_path, capsys, monkeypatch):
    """The fused kernel's backward takes twice the time of the whole step in fp32 there."""
    monkeypatch.setattr(finetune, "measure", lambda *_: dict(clean=0.5, noisy=0.5, vote=0.5))
    flags = [*more, "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu"]
    losses = {}
    try:
        for dtype in ("bf16", "auto"):
            out = tmp_path / dtype
            stage.main([*flags, "--dtype", dtype, "--out", str(out)])
            assert torch.backends.cuda.flash_sdp_enabled() == (dtype == "auto")
            said = capsys.readouterr().out
            assert (" in bf16" in said, " in fp32" in said) == (dtype == "bf16", dtype == "auto")
            (log,) = out.glob("*.jsonl")
            losses[dtype] = json.loads(log.read_text().splitlines()[0])["loss"]
            (settings,) = out.glob("*.json")
            wanted = {"bf16": "bf16", "auto": "fp32"}[dtype]
            assert json.loads(settings.read_text())["dtype"] == wanted
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert losses["bf16"] != losses["auto"]
    assert losses["bf16"] == pytest.approx(losses["auto"], rel=0.02)


def test_logits_are_fp32_computed_in_the_dtype_that_is_asked_for():
    network = Straight()
    x, noise = torch.rand(5, 1, 2, 2), torch.randn(3, 5, 1, 2, 2)
    exact = (x + noise).flatten(2) @ network.weight
    for dtype, error in (("fp32", 1e-6), ("bf16", 0.05)):
        f = noisy_logits(network, dtype)
        for logits in (f(x, noise), f.frozen(x, noise)):
            assert logits.dtype == torch.float32 and logits.shape == (3, 5, 3)
            assert (logits - exact).abs().max() < error
            assert torch.equal(logits, logits.bfloat16().float()) == (dtype == "bf16")
