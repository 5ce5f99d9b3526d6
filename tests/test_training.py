"""Pre-training and fine-tuning: schedules, groups, losses, data order, runs and their resumption, several processes."""

import collections
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torchvision.transforms import v2

import finetune
import model
import pretrain
from finetune import LARS, consistency_loss, evaluate, few_labels, layer_of, make_mix, parameter_groups
from model import (
    SIZES,
    ResizedCrop,
    UsageError,
    build_vit,
    epoch_draws,
    learning_rate,
    load_weights,
    open_images,
    read_checkpoint,
    share_batch,
    shift_and_flip,
    training_positions,
)

TINY_RGB = dict(image_size=16, patch_size=4, channels=3, dim=16, depth=2, heads=2,
                decoder_dim=16, decoder_depth=1, decoder_heads=2)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def rows(path):
    """The log without its times."""
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in path.read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def same_weights(a, b):
    a, b = (read_checkpoint(path)["model"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and data order
# ---------------------------------------------------------------------------------------------------------------------


def test_learning_rate_at_its_corners():
    rate = [learning_rate(step, 100, 20, 3.0, 0.5) for step in range(101)]
    assert rate[:21:10] == [0, 1.5, 3.0]
    assert rate[60] == pytest.approx((3.0 + 0.5) / 2) and rate[40] == pytest.approx(0.5 + 2.5 * (2 + math.sqrt(2)) / 4)
    assert rate[100] == pytest.approx(0.5)
    assert rate[:21] == sorted(rate[:21]) and rate[20:] == sorted(rate[20:], reverse=True)
    assert learning_rate(0, 10, 0, 2.0) == 2.0 and learning_rate(10, 10, 0, 2.0) == pytest.approx(0)


@pytest.mark.parametrize("batch, world, largest, expected", [
    (4096, 8, 64, (64, 8)), (128, 1, 128, (128, 1)), (96, 2, 20, (16, 3)), (14, 2, 4, (1, 7)), (6, 3, 100, (2, 1))])
def test_batch_is_shared_among_processes_and_micro_batches(batch, world, largest, expected):
    assert share_batch(batch, world, largest) == expected


def test_a_batch_that_processes_do_not_divide_is_refused():
    with pytest.raises(UsageError, match="100.*3"):
        share_batch(100, 3, 64)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("largest", [8, 2])
def test_every_step_takes_the_same_images_on_any_number_of_processes_and_none_twice_in_an_epoch(world, largest):
    size, batch, steps, seed = 45, 8, 12, 3
    device_batch, accumulate = share_batch(batch, world, largest)
    taken = collections.defaultdict(list)
    for rank in range(world):
        micro_batches, later = (list(training_positions(size, batch, device_batch, start, steps, seed, rank, world))
                                for start in (0, 7))
        assert [len(micro) for micro in micro_batches] == [device_batch] * accumulate * steps
        assert later == micro_batches[7 * accumulate:]
        for i, micro in enumerate(micro_batches):
            taken[i // accumulate] += micro
    for step in range(steps):
        order = epoch_draws(size, seed, step // 5)[0].tolist()                            # 5 steps of 8 in 45 images
        assert sorted(order) == list(range(size))
        assert sorted(taken[step]) == sorted((step // 5, i) for i in order[step % 5 * 8:step % 5 * 8 + 8])


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    draws = {(seed, epoch): epoch_draws(50, seed, epoch) for seed in range(2) for epoch in range(3)}
    assert len({tuple(order.tolist()) for order, _ in draws.values()}) == 6
    torch.manual_seed(9)
    for (seed, epoch), (order, uniforms) in draws.items():
        again = epoch_draws(50, seed, epoch)
        assert torch.equal(again[0], order) and torch.equal(again[1], uniforms)
        assert uniforms.shape == (50, 4) and uniforms.min() >= 0 and uniforms.max() < 1


@pytest.mark.parametrize("shift, flip", [(0, False), (0, True), (1, False), (2, True)])
def test_shift_and_flip_is_crop_of_the_padded_image(shift, flip):
    pixels, uniforms = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.rand(64, 4)
    result, seen = shift_and_flip(shift, flip)(pixels, uniforms).numpy(), set()
    for image, u, out in zip(pixels.numpy(), uniforms, result, strict=True):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="edge")
        y, x = (int(value * (2 * shift + 1)) for value in u[:2])
        crop = padded[:, y:y + 8, x:x + 8]
        mirrored = flip and u[2] < 0.5
        assert (out == (crop[:, :, ::-1] if mirrored else crop)).all()
        seen.add((y, x, bool(mirrored)))
    assert len(seen) > (2 * shift + 1) ** 2 * (1 + flip) / 2 and result.dtype == np.uint8


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


def test_digits_are_split_into_the_last_360_and_disjoint_parts_of_the_others():
    train, held, test = (open_images("digits", None, split, 8, 1, 0.1) for split in ("train", "holdout", "test"))
    digits = load_digits()
    assert (test.pixels[:, 0].numpy() == digits.images[-360:]).all() and (test.labels.numpy() == digits.target[-360:]).all()
    assert len(held) == 144 and len(train) == 1437 - 144

    def multiset(*arrays):
        return collections.Counter((np.asarray(x).astype(int).tobytes(), int(y)) for xs, ys in arrays
                                   for x, y in zip(xs, ys, strict=True))
    parts = multiset((train.pixels[:, 0], train.labels), (held.pixels[:, 0], held.labels))
    assert parts == multiset((digits.images[:-360], digits.target[:-360]))
    assert torch.equal(open_images("digits", None, "holdout", 8, 1, 0.1).pixels, held.pixels)


@pytest.mark.parametrize("side, size", [(32, 32), (40, 32), (80, 80), (90, 70)])
def test_class_folders_are_read_with_their_labels_and_fitted_to_the_size(make_folder, side, size):
    root = make_folder(side)
    images = open_images("folder", root, "train", size, 3)
    assert images.classes == ["class_0", "class_1", "class_2"] and images.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    files = [root / "train" / f"class_{label}" / f"{i}.png" for label in range(3) for i in range(6)]
    for i, file in enumerate(files):
        picture = images.read(i)
        assert picture.shape == (3, size, size) and picture.dtype == torch.uint8
        if side == size:
            assert (picture.permute(1, 2, 0).numpy() == np.asarray(Image.open(file))).all()
    assert len(open_images("folder", root, "test", size, 3)) == 6


def test_a_few_labels_are_so_many_of_each_class_and_fixed_by_the_seed():
    train = open_images("digits", None, "train", 8, 1, 0.1)
    of = {train.pixels[i].numpy().tobytes(): int(train.labels[i]) for i in range(len(train))}
    few, again, other = (few_labels(train, 4, seed) for seed in (0, 0, 1))
    chosen = [(pixels.numpy().tobytes(), int(label)) for pixels, label in zip(few.pixels, few.labels, strict=True)]
    assert all(of[pixels] == label for pixels, label in chosen)
    assert collections.Counter(label for _, label in set(chosen)) == dict.fromkeys(range(10), 4)
    assert max(collections.Counter(chosen).values()) - min(collections.Counter(chosen).values()) <= 1
    assert torch.equal(few.pixels, again.pixels) and not torch.equal(few.pixels, other.pixels)
    assert len(few) == len(train)


# ---------------------------------------------------------------------------------------------------------------------
# Losses, optimizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 3])
def test_consistency_is_kl_from_the_mean_and_its_entropy(copies):
    logits = torch.randn(copies, 6, 5, dtype=torch.float64, requires_grad=True)
    each = logits.softmax(-1)
    mean = each.mean(0)
    divergence = sum(F.kl_div(one.log(), mean, reduction="batchmean") for one in each) / copies
    entropy = torch.distributions.Categorical(probs=mean).entropy().mean()
    for lam, eta in ((2.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
        loss, expected = consistency_loss(logits, lam, eta), lam * divergence + eta * entropy
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))


def test_consistency_stays_finite_for_certain_predictions():
    logits = torch.tensor([[[200.0, 0.0, -200.0]], [[200.0, 0.0, -200.0]]], requires_grad=True)
    loss = consistency_loss(logits, 2.0, 0.5)
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


def test_mixed_targets_are_the_shares_of_the_mixed_images():
    labels = torch.arange(30) % 3
    images = F.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 16, 16)        # class c: channel c is white
    for mixup, cutmix in ((0.8, 0), (0, 1.0), (0.8, 1.0)):
        mixed, targets = make_mix(mixup, cutmix, 3)(images, labels)
        torch.testing.assert_close(mixed.mean((2, 3)), targets, rtol=1e-4, atol=1e-4)
        assert (targets.max(1).values < 1).any()
    same, targets = make_mix(0, 0, 3)(images, labels)
    assert torch.equal(same, images) and torch.equal(targets, F.one_hot(labels, 3).float())


def test_layers_count_from_the_patch_embedding_to_the_head():
    expected = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.bias": 0, "blocks.0.norm1.weight": 1,
                "blocks.11.mlp.fc2.bias": 12, "norm.weight": 13, "fc_norm.bias": 13, "head.weight": 13, "head.1.bias": 13}
    assert {name: layer_of(name, 12) for name in expected} == expected


def test_groups_cover_every_parameter_once_with_the_scale_of_its_layer():
    vit = build_vit("vit_digits", 10)
    names = {parameter: name for name, parameter in vit.named_parameters()}
    scale = {"cls_token": 0.5**4, "pos_embed": 0.5**4, "patch_embed": 0.5**4, "blocks.0": 0.5**3, "blocks.1": 0.5**2,
             "blocks.2": 0.5, "fc_norm": 1, "head": 1}
    groups = parameter_groups(vit, 0.05, 0.5)
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    for group in groups:
        for name in (names[parameter] for parameter in group["params"]):
            assert group["lr_scale"] == next(value for start, value in scale.items() if name.startswith(start)), name
            spared = name in ("cls_token", "pos_embed") or name.endswith("bias") or "norm" in name
            assert group["weight_decay"] == (0 if spared else 0.05), name


def test_groups_leave_frozen_parameters_out():
    vit = build_vit("vit_digits", 10, pool="cls", probe=True).requires_grad_(False)
    vit.head.requires_grad_(True)
    grouped = [p for group in parameter_groups(vit, 0.0, 0.5) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(vit.head[1].weight), id(vit.head[1].bias)}


def test_lars_takes_the_steps_computed_by_hand():
    matrix, vector, still = (nn.Parameter(torch.tensor(value)) for value in ([[3.0, 4.0]], [1.0, 2.0], [[0.0, 0.0]]))
    groups = [dict(params=[matrix, still], weight_decay=0.1), dict(params=[vector], weight_decay=0.0)]
    optimizer = LARS(groups, lr=2.0, momentum=0.5, trust=0.01)
    w, b, velocity_w, velocity_b = np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0, 0
    for gradient in (np.array([1.0, -2.0]), np.array([0.5, 0.0])):
        matrix.grad, vector.grad = torch.tensor(gradient[None]).float(), torch.tensor(gradient).float()
        still.grad = torch.ones(1, 2)
        before = still.detach().clone()
        optimizer.step()
        change = gradient + 0.1 * w
        velocity_w = 0.5 * velocity_w + 0.01 * np.linalg.norm(w) / np.linalg.norm(change) * change
        velocity_b = 0.5 * velocity_b + gradient
        w, b = w - 2 * velocity_w, b - 2 * velocity_b
        np.testing.assert_allclose(matrix.detach().numpy()[0], w, rtol=1e-6)
        np.testing.assert_allclose(vector.detach().numpy(), b, rtol=1e-6)
        assert still.isfinite().all() and not torch.equal(still, before)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A fixed linear classifier of digits that remembers which images it has seen."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.randn(64, 10)), []

    def forward(self, x):
        self.seen += [image.numpy().tobytes() for image in x]
        return x.flatten(1) @ self.weight


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [101, 5])
def test_evaluation_counts_each_image_once_on_any_number_of_processes(monkeypatch, world, count):
    test, linear = open_images("digits", None, "test", 8, 1).subset(torch.arange(count)), Linear()
    expected = ((test.pixels / 16).flatten(1) @ linear.weight).argmax(1).eq(test.labels).float().mean().item()
    device = torch.device("cpu")
    args = dict(sigma=0.5, draws=3, batch=16, seed=4, device=device)
    alone = evaluate(linear, test, rank=0, world=1, **args)
    assert alone[0] == pytest.approx(expected, abs=1e-6)
    linear.seen.clear()
    monkeypatch.setattr(finetune, "gather", lambda values, world: torch.tensor(values, dtype=torch.float64)[:, None])
    shares = [evaluate(linear, test, rank=rank, world=world, **args) for rank in range(world)]
    for one, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert sum(parts) == pytest.approx(one, abs=1e-5)
    clean = collections.Counter(image.numpy().tobytes() for image in test.pixels / 16)
    assert clean <= collections.Counter(linear.seen) and len(linear.seen) == count * (1 + 1 + 3)
    assert all(collections.Counter(linear.seen)[image] == times for image, times in clean.items())


def test_evaluation_adds_noise_of_sigma_and_takes_the_majority():
    class Corner(nn.Module):
        def forward(self, x):
            return F.one_hot((x[:, 0, 0, 0] < 0.3).long() * 3, 10)

    test = open_images("digits", None, "test", 8, 1)
    test.labels[:] = 3
    assert not test.pixels[:, :, 0, 0].any()
    clean, noisy, vote = evaluate(Corner(), test, 1.0, 100, 50, 0, 0, 1, torch.device("cpu"))
    share = 0.5 * (1 + math.erf(0.3 / math.sqrt(2)))
    assert clean == 1 and vote > 0.95
    assert abs(noisy - share) < 5 * math.sqrt(share * (1 - share) / 360)
    assert evaluate(Corner(), test, 1.0, 0, 50, 0, 0, 1, torch.device("cpu"))[2] is None


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: the paper's values (DMAE, section 4 and appendix)
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, expected", [
    ("imagenet-base", dict(model="vit_base_patch16", epochs=1100, base_lr=1.5e-4, batch=4096)),
    ("imagenet-large", dict(model="vit_large_patch16", epochs=1600, base_lr=1.5e-4, batch=4096)),
    ("cifar10-transfer", dict(model="vit_base_patch16", epochs=50, warmup_epochs=10, base_lr=5e-5, batch=512, augment="flip",
                              image_size=32, normalisation="cifar10"))])
def test_pre_training_recipes_hold_the_papers_values(name, expected):
    common = dict(sigma=0.25, mask_ratio=0.75, norm_pix=True, loss_on="all", weight_decay=0.05, warmup_epochs=40,
                  augment="resized-crop", image_size=224, normalisation="imagenet")
    recipe = pretrain.RECIPES[name]
    assert {key: recipe[key] for key in common | expected} == common | expected


@pytest.mark.parametrize("name, expected", [
    ("imagenet-base", dict(model="vit_base_patch16", epochs=100, base_lr=5e-4, layer_decay=0.65, drop_path=0.1,
                           consistency=2.0)),
    ("imagenet-large", dict(model="vit_large_patch16", epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2,
                            consistency=0.0)),
    ("cifar10-transfer", dict(model="vit_base_patch16", epochs=50, base_lr=5e-4, layer_decay=0.65, drop_path=0.1, batch=256,
                              consistency=2.0, augment="flip", mixup=0.0, cutmix=0.0, erasing=0.0, image_size=32))])
def test_fine_tuning_recipes_hold_the_papers_values(name, expected):
    common = dict(min_lr=1e-6, weight_decay=0.05, label_smoothing=0.1, warmup_epochs=5, batch=1024, mixup=0.8, cutmix=1.0,
                  erasing=0.25, augment="rand-augment", image_size=224)
    recipe = finetune.RECIPES[name]
    assert {key: recipe[key] for key in common | expected} == common | expected


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------

COMMON = ["--device", "cpu", "--batch", "10", "--epochs", "2", "--warmup-epochs", "1", "--augment", "shift", "--log-every", "3"]
PRETRAIN = [*COMMON, "--dataset", "folder", "--image-size", "8", "--holdout", "20", "--mask-ratio", "0.5", "--save-every", "6",
            "--base-lr", "0.02", "--norm-pix"]                                                          # 2 x 10 steps
FINETUNE = [*COMMON, "--sigma", "0.25", "--vote-every", "1", "--save-every", "4", "--drop-path", "0.2", "--consistency", "1",
            "--mixup", "0.8", "--cutmix", "1", "--layer-decay", "0.75"]                   # all kinds of randomness
STAGES = ("pretrain", "finetune")


def draw_nothing(patch):
    """Pictures take most of a short run's time."""
    for name in ("draw_loss", "draw_reconstructions"):
        patch.setattr(pretrain, name, lambda *_: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, folder8):
    """{stage: (module, arguments, run directory, stem of its files)} of runs that nothing interrupted."""
    outs = {name: tmp_path_factory.mktemp(name) for name in STAGES}
    runs = {"pretrain": (pretrain, [*PRETRAIN, "--data-path", str(folder8)], outs["pretrain"], "pretrain"),
            "finetune": (finetune, [*FINETUNE, "--init", str(outs["pretrain"] / "pretrain.pt")], outs["finetune"],
                         "finetune_sigma_0.25")}
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        for stage, arguments, out, _ in runs.values():
            stage.main([*arguments, "--out", str(out)])
    return runs


@pytest.fixture
def undrawn(monkeypatch):
    draw_nothing(monkeypatch)


def test_log_has_a_row_every_so_often_with_the_scheduled_rate_and_a_falling_loss(undisturbed):
    _, _, out, stem = undisturbed["pretrain"]
    log = rows(out / f"{stem}.jsonl")
    assert [row["step"] for row in log] == [3, 6, 9, 12, 15, 18, 20]
    peak, warmup, steps = 0.02 * 10 / 256, 10, 20
    for row in log:
        step = row["step"] - 1
        cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert row["lr"] == pytest.approx(peak * (step / warmup if step < warmup else cosine))
        assert row["epoch"] == pytest.approx(row["step"] / 10, abs=1e-4)
    assert log[-1]["loss"] < log[0]["loss"]
    times = [json.loads(line)["time"] for line in (out / f"{stem}.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[-1] > 0


def test_log_rows_average_the_steps_since_the_row_before(undisturbed, undrawn, tmp_path):
    _, arguments, out, _ = undisturbed["pretrain"]
    pretrain.main([*arguments, "--log-every", "1", "--out", str(tmp_path)])
    single = [row["loss"] for row in rows(tmp_path / "pretrain.jsonl")]
    assert len(single) == 20
    for row, first in zip(rows(out / "pretrain.jsonl"), range(0, 20, 3), strict=True):
        assert row["loss"] == pytest.approx(np.mean(single[first:row["step"]]), rel=1e-5)


def test_fine_tuning_logs_held_out_accuracies_each_epoch_and_those_on_test_images_once(undisturbed):
    _, _, out, stem = undisturbed["finetune"]
    log = rows(out / f"{stem}.jsonl")
    held, test = ([row for row in log if row.get("split") == split] for split in ("holdout", "test"))
    assert [row["epoch"] for row in held] == [1, 2] and len(test) == 1
    for row in held + test:
        images = 20 if row in held else 15
        for key in ("clean", "noisy", "vote"):
            assert round(row[key] * images) == pytest.approx(row[key] * images, abs=1e-3)
    assert [row["step"] for row in log if "loss" in row] == [3, 6, 9, 10, 12, 15, 18, 20]


@pytest.mark.parametrize("votes, kept", [((0.2, 0.9, 0.5, 0.3), 2), ((0.9, 0.2, 0.1, 0.3), 1), ((0.1, 0.2, 0.3, 0.4), 4)])
def test_the_model_that_votes_best_on_held_out_images_is_kept(monkeypatch, undisturbed, tmp_path, votes, kept):
    seen, to_come = [], list(votes)

    def evaluate(network, images, sigma, draws, *_):
        if draws and to_come:
            assert len(images) == 20                                                      # held out, not the 15 test images
            seen.append({key: value.clone() for key, value in network.state_dict().items()})
            return 0.5, 0.5, to_come.pop(0)
        return 0.5, 0.5, 0.5 if draws else None

    monkeypatch.setattr(finetune, "evaluate", evaluate)
    finetune.main([*undisturbed["finetune"][1], "--epochs", "4", "--out", str(tmp_path)])
    best = read_checkpoint(tmp_path / "finetune_sigma_0.25.pt")["model"]
    assert [epoch for epoch, state in enumerate(seen, 1) if all(torch.equal(state[key], best[key]) for key in best)] == [kept]
    assert rows(tmp_path / "finetune_sigma_0.25.jsonl")[-1]["epoch"] == kept


def test_pictures_show_something(tiny_run):
    for name, colours in (("pretrain.png", 100), ("pretrain.loss.png", 20)):
        with Image.open(tiny_run / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
            pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > colours and pixels.std() > 10


def test_checkpoints_hold_what_the_next_stage_needs_and_no_code(tiny_run):
    for name, kind, build in (("pretrain.pt", "pretrain", model.DenoisingMaskedAutoencoder),
                              ("finetune_sigma_0.25.pt", "finetune", model.VisionTransformer)):
        content = torch.load(tiny_run / name, weights_only=True)
        assert content["kind"] == kind
        network = build(**content["config"])
        assert load_weights(network, content["model"], name) == ([], [])
        assert content["data"]["dataset"] == "digits" and content["data"]["classes"] == list("0123456789")
        assert json.loads((tiny_run / name).with_suffix(".json").read_text()) == content["settings"]
    assert content["sigma"] == 0.25
    assert not list(tiny_run.glob("*.tmp")) and not list(tiny_run.glob("*.last.pt"))


def test_the_kept_classifier_has_the_accuracy_that_the_log_says(tiny_run):
    content = torch.load(tiny_run / "finetune_sigma_0.25.pt", weights_only=True)
    vit = model.VisionTransformer(**content["config"]).eval()
    vit.load_state_dict(content["model"])
    digits = load_digits()
    with torch.no_grad():
        guess = vit(torch.tensor(digits.images[-360:], dtype=torch.float32)[:, None] / 16).argmax(1).numpy()
    logged = rows(tiny_run / "finetune_sigma_0.25.jsonl")[-1]
    assert logged["split"] == "test" and logged["clean"] == pytest.approx((guess == digits.target[-360:]).mean(), abs=1e-5)


def test_a_linear_probe_trains_its_head_alone(undisturbed, tmp_path):
    init = undisturbed["pretrain"][2] / "pretrain.pt"
    finetune.main([*COMMON, "--linear-probe", "--sigma", "0.25", "--base-lr", "200", "--init", str(init), "--out",
                   str(tmp_path)])
    before = torch.load(init, weights_only=True)["model"]
    after = torch.load(tmp_path / "finetune_sigma_0.25.pt", weights_only=True)["model"]
    head = {key for key in after if key not in before}
    assert head == {"head.1.weight", "head.1.bias", "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked"}
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - head)
    assert after["head.0.running_mean"].any() and after["head.1.bias"].any() and after["head.1.weight"].std() > 0.011


@pytest.mark.parametrize("copies", [1, 2])
def test_noise_of_sigma_comes_after_mixing_and_differs_between_copies(monkeypatch, tmp_path, folder8, copies):
    inputs, build = [], finetune.build_vit

    def grey(*_):
        return lambda images, labels: (images * 0 + 0.5, F.one_hot(labels, 3).float())

    def watched(*args, **kwargs):
        vit = build(*args, **kwargs)
        vit.register_forward_pre_hook(lambda module, x: inputs.append(x[0]) if module.training else None)
        return vit

    monkeypatch.setattr(finetune, "make_mix", grey)
    monkeypatch.setattr(finetune, "build_vit", watched)
    finetune.main(["--init", "scratch", "--sigma", "0.4", "--dataset", "folder", "--data-path", str(folder8), "--batch", "32",
                   "--epochs", "1", "--consistency", str(copies - 1), "--out", str(tmp_path), "--device", "cpu"])
    assert len(inputs) == 3 and all(x.shape == (32 * copies, 1, 8, 8) for x in inputs)
    noise = torch.stack(inputs) - 0.5
    assert noise.std() == pytest.approx(0.4, rel=0.05) and abs(noise.mean()) < 0.03
    assert len({x.numpy().tobytes() for x in noise.flatten(0, 1)}) == 3 * 32 * copies


def test_the_faster_crop_draws_and_resizes_like_torchvisions_of_pictures():
    """Same numbers drawn, PSNR above 40 dB: for crops that shrink and that grow, upright and flat."""
    y, x = np.mgrid[:300, :450] / 40
    waves = np.stack([np.sin(x + 2 * y), np.sin(3 * x - y), np.cos(5 * x * y / 10)], axis=-1)
    picture = Image.fromarray(np.uint8(127.5 + 127.5 * waves))
    for size in (224, 64):
        ours, theirs = (kind(size, (0.05, 1), interpolation=v2.InterpolationMode.BICUBIC)
                        for kind in (ResizedCrop, v2.RandomResizedCrop))
        for seed in range(20):
            torch.manual_seed(seed)
            a, after = ours(picture), torch.rand(1)
            torch.manual_seed(seed)
            b = torch.from_numpy(np.array(theirs(picture))).movedim(2, 0)
            assert a.shape == b.shape and a.dtype == torch.uint8 and after == torch.rand(1)
            error = (a.double() - b.double()).square().mean().item()
            assert 10 * math.log10(255**2 / max(error, 1e-9)) > 40


def test_a_signal_before_a_run_has_begun_ends_it_at_once(monkeypatch, tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        monkeypatch.setattr(pretrain, "cost", lambda *_, number=number: os.kill(os.getpid(), number) or pytest.fail("went on"))
        with pytest.raises(SystemExit) as stop:
            pretrain.main(["--dry-run", "--device", "cpu", "--out", str(tmp_path)])
        assert stop.value.code == 128 + number


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_the_deterministic_mode_runs_on_a_cpu(name, tmp_path):
    common = ["--epochs", "1", "--deterministic", "--device", "cpu", "--out", str(tmp_path)]
    tune = ["--sigma", "0.25", "--init", "scratch", "--vote-every", "1"]
    try:
        {"pretrain": pretrain, "finetune": finetune}[name].main([*common, *(tune if name == "finetune" else [])])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize("side, augment", [(32, ("shift-flip", "shift-flip")), (80, ("resized-crop", "rand-augment"))])
def test_class_folders_go_through_both_stages_at_their_own_size(monkeypatch, make_folder, tmp_path, side, augment):
    monkeypatch.setitem(SIZES, "tiny_rgb", TINY_RGB)
    root, common = make_folder(side), ["--batch", "6", "--epochs", "2", "--warmup-epochs", "1", "--workers", "0", "--device",
                                       "cpu", "--out", str(tmp_path), "--recipe", "cifar10"]
    pretrain.main([*common, "--dataset", "folder", "--data-path", str(root), "--image-size", str(side), "--model", "tiny_rgb",
                   "--holdout", "3", "--augment", augment[0]])
    finetune.main([*common, "--sigma", "0.5", "--vote-every", "2", "--augment", augment[1], "--mixup", "0.8", "--cutmix", "1",
                   "--erasing", "0.25"])
    content = torch.load(tmp_path / "finetune_sigma_0.5.pt", weights_only=True)
    assert content["data"]["image_size"] == side and content["data"]["classes"] == ["class_0", "class_1", "class_2"]
    assert content["model"]["head.weight"].shape == (3, 16)
    assert [row["step"] for row in rows(tmp_path / "finetune_sigma_0.5.jsonl") if row.get("split") == "test"] == [4]


@pytest.mark.parametrize("side, workers", [(32, 0), (80, 0), (80, 1)])
def test_an_unreadable_picture_stops_the_run_with_its_name(monkeypatch, make_folder, tmp_path, capsys, side, workers):
    monkeypatch.setitem(SIZES, "tiny_rgb", TINY_RGB)
    root = make_folder(side)
    for bad in (root / "train" / "class_1").iterdir():
        bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--recipe", "cifar10", "--dataset", "folder", "--data-path", str(root), "--image-size", str(side),
                       "--model", "tiny_rgb", "--holdout", "3", "--augment", "none" if side == 32 else "resized-crop",
                       "--batch", "15", "--epochs", "1", "--workers", str(workers), "--out", str(tmp_path / "run"),
                       "--device", "cpu"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code not in (0, None) and "class_1/" in error and error.startswith("pretrain.py: error:")
    assert not (tmp_path / "run" / "pretrain.pt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and continuing
# ---------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill -9 does to everything after it."""


def stop_at(monkeypatch, stage, step, how):
    """Let `how` happen in the stage's run when the learning rate of `step` is asked for."""
    real_rate, real_save = stage.learning_rate, torch.save

    def torn_save(content, path):
        real_save(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise Killed

    def rate(now, *args, **kwargs):
        if now == step and how == "kill":
            raise Killed
        if now == step and how == "tear":
            monkeypatch.setattr(torch, "save", torn_save)
        if now == step and isinstance(how, signal.Signals):
            assert callable(signal.getsignal(how)) and signal.getsignal(how) is not signal.default_int_handler
            signal.raise_signal(how)
        return real_rate(now, *args, **kwargs)

    monkeypatch.setattr(stage, "learning_rate", rate)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stops", [[(0, signal.SIGTERM)], [(2, "kill")], [(7, signal.SIGINT), (13, "kill")], [(10, "tear")],
                                   [(19, signal.SIGTERM)], [(16, "tear"), (16, "kill")]], ids=str)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(monkeypatch, undisturbed, undrawn, tmp_path, capsys, stage, stops):
    module, arguments, undisturbed_out, stem = undisturbed[stage]
    for step, how in stops:
        with monkeypatch.context() as patch, pytest.raises((SystemExit, Killed)) as stop:
            stop_at(patch, module, step, how)
            module.main([*arguments, "--out", str(tmp_path)])
        assert not (tmp_path / f"{stem}.pt").exists()
        if isinstance(how, signal.Signals):
            assert stop.type is SystemExit and stop.value.code == 128 + how
            assert torch.load(tmp_path / f"{stem}.last.pt", weights_only=True)["step"] >= step + 1
    capsys.readouterr()
    module.main([*arguments, "--out", str(tmp_path)])
    assert ("continuing" in capsys.readouterr().out) == (stops != [(2, "kill")])
    assert same_weights(tmp_path / f"{stem}.pt", undisturbed_out / f"{stem}.pt")
    assert rows(tmp_path / f"{stem}.jsonl") == rows(undisturbed_out / f"{stem}.jsonl")
    assert contents(tmp_path).keys() == contents(undisturbed_out).keys()


@pytest.mark.parametrize("stage", STAGES)
def test_a_repeated_command_says_that_it_is_done_and_changes_nothing(undisturbed, capsys, stage):
    module, arguments, out, stem = undisturbed[stage]
    before = contents(out)
    for more in ([], ["--device-batch", "16"]):
        capsys.readouterr()
        module.main([*arguments, *more, "--out", str(out)])
        assert f"{stem}.pt is done" in capsys.readouterr().out
        assert contents(out) == before


@pytest.mark.parametrize("stage, change, named", [
    ("pretrain", ["--seed", "3", "--mask-ratio", "0.25"], ("seed 0 -> 3", "mask_ratio 0.5 -> 0.25")),
    ("pretrain", ["--no-norm-pix"], ("norm_pix True -> False",)),
    ("finetune", ["--layer-decay", "0.5", "--labels-per-class", "5"],
     ("layer_decay 0.75 -> 0.5", "labels_per_class None -> 5"))])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name_and_leave_the_run_alone(monkeypatch, undisturbed, undrawn, tmp_path, capsys,
                                                                    stage, change, named, finished):
    module, arguments, out, stem = undisturbed[stage]
    if not finished:
        out = tmp_path
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            stop_at(patch, module, 2, signal.SIGTERM)
            module.main([*arguments, "--out", str(out)])
    before = contents(out)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        module.main([*arguments, *change, "--out", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and len(error.splitlines()) == 1
    assert all(name in error for name in (*named, "--out", "--overwrite"))
    assert contents(out) == before


def test_other_weights_to_start_from_are_other_settings_but_another_place_is_not(undisturbed, tmp_path, capsys):
    _, arguments, out, _ = undisturbed["finetune"]
    content = torch.load(arguments[-1], weights_only=True)
    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(arguments[-1]).read_bytes())
    finetune.main([*arguments[:-1], str(moved), "--out", str(out)])
    assert "is done" in capsys.readouterr().out
    torch.save(content | {"step": 3}, moved)
    with pytest.raises(SystemExit) as stop:
        finetune.main([*arguments[:-1], str(moved), "--out", str(out)])
    assert stop.value.code == 2 and "init" in capsys.readouterr().err


def test_an_unfinished_run_is_left_alone_when_told_never_to_resume(monkeypatch, undisturbed, undrawn, tmp_path, capsys):
    arguments = [*undisturbed["pretrain"][1], "--out", str(tmp_path)]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_at(patch, pretrain, 2, signal.SIGTERM)
        pretrain.main(arguments)
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        pretrain.main([*arguments, "--resume", "never"])
    assert stop.value.code == 2 and "unfinished" in capsys.readouterr().err and contents(tmp_path) == before


def test_overwriting_starts_anew_and_spares_the_other_stage(undisturbed, undrawn, tmp_path):
    _, arguments, out, _ = undisturbed["pretrain"]
    for name, value in contents(out).items():
        (tmp_path / name).write_bytes(value)
    tune = ["--device", "cpu", "--sigma", "0.5", "--batch", "10", "--out", str(tmp_path)]
    finetune.main([*tune, "--epochs", "0.2"])
    first = contents(tmp_path)
    finetune.main([*tune, "--epochs", "0.3", "--seed", "2", "--overwrite"])
    second = contents(tmp_path)
    changed = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    assert changed == {f"finetune_sigma_0.5.{end}" for end in ("json", "jsonl", "pt")}
    assert {row["step"] for row in rows(tmp_path / "finetune_sigma_0.5.jsonl")} == {3}
    pretrain.main([*arguments, "--seed", "4", "--overwrite", "--out", str(tmp_path)])
    assert not same_weights(tmp_path / "pretrain.pt", out / "pretrain.pt")
    assert len(rows(tmp_path / "pretrain.jsonl")) == 7
    assert all(contents(tmp_path)[name] == second[name] for name in changed)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: this file is also the script that torchrun starts
# ---------------------------------------------------------------------------------------------------------------------

BATCH, SEED = 96, 7                                                                      # one step an epoch


def share_of_global_noise(images, patches, *position, real=pretrain.draw_corruption):
    """In place of draw_corruption: noise and masks are drawn for a whole batch, and each rank gets its own images' part."""
    if len(position) < 4:
        return real(images, patches, *position)
    _, step, micro, rank = position
    generator = torch.Generator().manual_seed(step)
    first = (micro * int(os.environ.get("WORLD_SIZE", 1)) + rank) * len(images)
    part = slice(first, first + len(images))
    noise = torch.randn(BATCH, *images.shape[1:], generator=generator)
    return noise[part], torch.rand(BATCH, patches, generator=generator)[part]


def five_steps(out, folder):
    """Into folders of `out`, in float64: pre-training, the same with accumulation, fine-tuning; and a batch of no use."""
    torch.set_default_dtype(torch.float64)
    pretrain.draw_corruption = share_of_global_noise
    common = ["--device", "cpu", "--dataset", "folder", "--data-path", str(folder), "--seed", str(SEED), "--batch", str(BATCH),
              "--epochs", "5", "--warmup-epochs", "1", "--log-every", "2", "--augment", "shift"]
    tune = ["--init", "scratch", "--sigma", "0", "--consistency", "1", "--vote-every", "5", "--base-lr", "1e-4"]
    pretrain.main([*common, "--out", f"{out}/plain"])
    pretrain.main([*common, "--device-batch", "16", "--out", f"{out}/accumulated"])
    finetune.main([*common, *tune, "--device-batch", "16", "--out", f"{out}/finetuned"])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for stage, more in ((pretrain, []), (finetune, tune)):
            try:
                stage.main([*common, *more, "--batch", "97", "--out", f"{out}/indivisible"])
                raise AssertionError("a batch of 97 was taken")
            except SystemExit as stop:
                assert stop.code == 2


def torchrun(processes, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen([*TORCHRUN, f"--nproc_per_node={processes}", *map(str, arguments)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_as_one_with_the_same_batch(monkeypatch, undrawn, tmp_path, folder8, processes):
    workers = torchrun(processes, __file__, tmp_path / "many", folder8)
    monkeypatch.setattr(pretrain, "draw_corruption", pretrain.draw_corruption)
    try:
        five_steps(tmp_path / "one", folder8)
    finally:
        torch.set_default_dtype(torch.float32)
    output = workers.communicate(timeout=300)[0]
    assert workers.returncode == 0, output
    for name in ("plain/pretrain", "accumulated/pretrain", "finetuned/finetune_sigma_0"):
        one, many = (torch.load(tmp_path / which / f"{name}.pt", weights_only=True) for which in ("one", "many"))
        assert one["step"] == 5 and one["model"].keys() == many["model"].keys()
        for key, value in one["model"].items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(many["model"][key], value, rtol=0, atol=1e-9, msg=f"{name}: {key}")
        for a, b in zip(*(rows(tmp_path / which / f"{name}.jsonl") for which in ("one", "many")), strict=True):
            assert a == pytest.approx(b, abs=1e-9)
    plain, accumulated = (read_checkpoint(tmp_path / f"one/{name}/pretrain.pt")["model"] for name in ("plain", "accumulated"))
    for key, value in plain.items():
        torch.testing.assert_close(accumulated[key], value, rtol=0, atol=1e-9, msg=key)
    assert "97 cannot be divided by" in output and not (tmp_path / "many" / "indivisible").exists()


if __name__ == "__main__":
    draw_nothing(pytest.MonkeyPatch())
    five_steps(*sys.argv[1:])
