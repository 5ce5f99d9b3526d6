"""Pre-training and fine-tuning: schedules, groups, losses, data order, runs and their resumption, several processes."""

import collections
import json
import math
import os
import signal
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
from finetune import (
    LARS,
    consistency_loss,
    evaluate,
    few_labels,
    hold_out,
    layer_of,
    load_batches,
    make_mix,
    open_images,
    order_of,
    parameter_groups,
    share_batch,
    shift_and_flip,
    training_positions,
    uniforms_of,
)
from model import SIZES, build_vit, learning_rate, load_weights, read_checkpoint

TINY_RGB = dict(image_size=16, patch_size=4, channels=3, dim=16, depth=2, heads=2,
                decoder_dim=16, decoder_depth=1, decoder_heads=2)


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
    with pytest.raises(ValueError, match="100.*3"):
        share_batch(100, 3, 64)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("largest", [8, 2])
def test_every_step_takes_the_same_images_on_any_number_of_processes_and_none_twice_in_an_epoch(world, largest):
    index, batch, steps, seed = torch.arange(45) * 3 + 1, 8, 12, 3                         # 45 images of a larger data set
    device_batch, accumulate = share_batch(batch, world, largest)
    taken = collections.defaultdict(list)
    for rank in range(world):
        micro_batches, later = (list(training_positions(index, batch, device_batch, start, steps, seed, rank, world))
                                for start in (0, 7))
        assert [len(micro) for micro in micro_batches] == [device_batch] * accumulate * steps
        assert later == micro_batches[7 * accumulate:]
        for i, micro in enumerate(micro_batches):
            taken[i // accumulate] += micro
    for step in range(steps):
        order = order_of(step // 5, 45, seed)                                             # 5 steps of 8 in 45 images
        assert sorted(order.tolist()) == list(range(45))
        expected = index[order[step % 5 * 8:step % 5 * 8 + 8]].tolist()
        assert sorted(taken[step]) == sorted((step // 5, i) for i in expected)


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    draws = {(seed, epoch): (order_of(epoch, 50, seed), uniforms_of(epoch, 50, seed))
             for seed in range(2) for epoch in range(3)}
    assert len({tuple(order.tolist()) for order, _ in draws.values()}) == 6
    assert len({uniforms.numpy().tobytes() for _, uniforms in draws.values()}) == 6
    torch.manual_seed(9)
    for drawn in (order_of, uniforms_of):
        drawn.cache_clear()                                                               # what they gave must come again
    for (seed, epoch), (order, uniforms) in draws.items():
        assert torch.equal(order_of(epoch, 50, seed), order) and torch.equal(uniforms_of(epoch, 50, seed), uniforms)
        assert uniforms.shape == (50, 4) and uniforms.min() >= 0 and uniforms.max() < 1


def test_batches_in_memory_are_augmented_with_the_numbers_of_their_images():
    """The same images, whatever batch or process they come in: the augmentation sees pixels and numbers side by side."""
    images, device = open_images("digits", None, True, 8, 1), torch.device("cpu")
    positions = list(training_positions(torch.arange(100, 200), 40, 10, 0, 3, 4, 1, 2))
    seen = []

    def augment(pixels, uniforms):
        seen.append(uniforms)
        return pixels + 100

    batches = list(load_batches(images, positions, device, augment, seed=4))
    assert len(batches) == len(positions) == 6
    for (pixels, labels), batch, uniforms in zip(batches, positions, seen, strict=True):
        index = [i for _, i in batch]
        assert torch.equal(pixels, images.pixels[index] + 100) and torch.equal(labels, images.labels[index])
        assert torch.equal(uniforms, uniforms_of(batch[0][0], len(images), 4)[index])


def test_pictures_from_files_are_augmented_by_seed_epoch_and_image_alone(make_folder):
    """In any batch, in a data worker or not: and other numbers in another epoch."""
    images, device = open_images("folder", make_folder(80), True, 64, 3), torch.device("cpu")
    augment = finetune.make_augment("rand-augment", images, 0.25)

    def load(positions, seed=3, workers=0):
        """{position: pixels}"""
        batches = load_batches(images, iter(positions), device, augment, seed, workers)
        return {place: pixels for batch, (part, labels) in zip(positions, batches, strict=True)
                for place, pixels, label in zip(batch, part, labels, strict=True) if label == images.labels[place[1]]}

    places = [(epoch, i) for epoch in range(2) for i in range(0, 18, 3)]
    first = load([places[:4], places[4:]])
    assert first.keys() == {*places} and all(x.shape == (3, 64, 64) and x.dtype == torch.uint8 for x in first.values())
    for again in (load([[place] for place in places[::-1]]), load([places], workers=2)):
        assert all(torch.equal(again[place], first[place]) for place in places)
    for i in range(0, 18, 3):
        assert not torch.equal(first[0, i], first[1, i]) and not torch.equal(first[0, i], load([[(0, i)]], seed=4)[0, i])


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
    images, test = (open_images("digits", None, train, 8, 1) for train in (True, False))
    digits = load_digits()
    for part, of in ((images, slice(None, -360)), (test, slice(-360, None))):
        assert (part.pixels[:, 0].numpy() == digits.images[of]).all() and (part.labels.numpy() == digits.target[of]).all()
    train, held = hold_out(images, 0.1)
    assert len(held) == 144 and len(train) == 1437 - 144
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(1437))
    again = hold_out(images, 144)                                                          # fixed; a share or a number
    assert torch.equal(again[0], train) and torch.equal(again[1], held)
    assert held.tolist() != list(range(held[0], held[0] + 144))                            # not the first or the last ones


def test_without_a_held_out_part_all_images_are_both():
    images = open_images("digits", None, True, 8, 1)
    assert all(part.tolist() == list(range(1437)) for part in hold_out(images, 0))
    for everything in (1437, 5000):
        with pytest.raises(ValueError, match=f"{everything} of 1437"):
            hold_out(images, everything)


@pytest.mark.parametrize("side, size", [(32, 32), (40, 32), (80, 80), (90, 70)])
def test_class_folders_are_read_with_their_labels_and_fitted_to_the_size(make_folder, side, size):
    root = make_folder(side)
    images = open_images("folder", root, True, size, 3)
    assert images.classes == ["class_0", "class_1", "class_2"] and images.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    files = [root / "train" / f"class_{label}" / f"{i}.png" for label in range(3) for i in range(6)]
    for i, file in enumerate(files):
        picture = images.read(i)
        assert picture.shape == (3, size, size) and picture.dtype == torch.uint8
        if side == size:
            assert (picture.permute(1, 2, 0).numpy() == np.asarray(Image.open(file))).all()
    assert len(open_images("folder", root, False, size, 3)) == 6


def test_small_images_stay_in_memory_as_they_are_read(make_folder):
    for size in (32, 64, 70):
        images = open_images("folder", make_folder(72), True, size, 3)
        expected = torch.stack([images.read(i) for i in range(len(images))])
        assert images.pixels is None and len(images.files) == 18
        kept = pretrain.keep_small_images(images, torch.device("cpu"))
        assert kept is images and (images.files is None) == (images.pixels is not None) == (size <= 64)
        assert all(torch.equal(images.read(i), picture) for i, picture in enumerate(expected))


def test_a_few_labels_are_so_many_of_each_class_and_fixed_by_the_seed():
    images = open_images("digits", None, True, 8, 1)
    train, _ = hold_out(images, 0.1)
    few, again, other = (few_labels(train, images.labels, 10, 4, seed) for seed in (0, 0, 1))
    times = collections.Counter(few.tolist())
    assert times.keys() <= {*train.tolist()}                                              # none that is held out
    assert collections.Counter(images.labels[[*times]].tolist()) == dict.fromkeys(range(10), 4)
    assert max(times.values()) - min(times.values()) <= 1
    assert torch.equal(few, again) and not torch.equal(few, other)
    assert len(few) == len(train)


def test_evenly_spaced_images_are_of_all_classes():
    index = torch.arange(1000) * 2
    assert pretrain.evenly_spaced(index, 5).tolist() == [0, 498, 998, 1498, 1998]
    assert pretrain.evenly_spaced(index[:3], 5).tolist() == [0, 2, 4]


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
    test, linear, index = open_images("digits", None, False, 8, 1), Linear(), torch.arange(count) * 3 + 2
    pixels, labels = test.pixels[index] / 16, test.labels[index]
    expected = (pixels.flatten(1) @ linear.weight).argmax(1).eq(labels).float().mean().item()
    device = torch.device("cpu")
    args = dict(sigma=0.5, draws=3, batch=16, seed=4, device=device)
    alone = evaluate(linear, test, index, rank=0, world=1, **args)
    assert alone[0] == pytest.approx(expected, abs=1e-6)
    linear.seen.clear()
    monkeypatch.setattr(finetune, "gather", lambda values: torch.tensor(values, dtype=torch.float64)[:, None])
    shares = [evaluate(linear, test, index, rank=rank, world=world, **args) for rank in range(world)]
    for one, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert sum(parts) == pytest.approx(one, abs=1e-5)
    clean = collections.Counter(image.numpy().tobytes() for image in pixels)
    assert clean <= collections.Counter(linear.seen) and len(linear.seen) == count * (1 + 1 + 3)
    assert all(collections.Counter(linear.seen)[image] == times for image, times in clean.items())


def test_evaluation_adds_noise_of_sigma_and_takes_the_majority():
    class Corner(nn.Module):
        def forward(self, x):
            return F.one_hot((x[:, 0, 0, 0] < 0.3).long() * 3, 10)

    test, index = open_images("digits", None, False, 8, 1), torch.arange(360)
    test.labels[:] = 3
    assert not test.pixels[:, :, 0, 0].any()
    clean, noisy, vote = evaluate(Corner(), test, index, 1.0, 100, 50, 0, 0, 1, torch.device("cpu"))
    share = 0.5 * (1 + math.erf(0.3 / math.sqrt(2)))
    assert clean == 1 and vote > 0.95
    assert abs(noisy - share) < 5 * math.sqrt(share * (1 - share) / 360)
    assert evaluate(Corner(), test, index, 1.0, 0, 50, 0, 0, 1, torch.device("cpu"))[2] is None


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
PRETRAIN = [*COMMON, "--dataset", "folder", "--image-size", "8", "--holdout", "20", "--mask-ratio", "0.5", "--save-every", "8",
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
    assert [row["step"] for row in log] == [3, 6, 8, 9, 12, 15, 16, 18, 20]                # every 3 steps, and every 8
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
    log = rows(out / "pretrain.jsonl")
    for row, first in zip(log, [0, *(row["step"] for row in log[:-1])], strict=True):
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
    assert [row["step"] for row in log if "loss" in row] == [3, 4, 6, 8, 9, 10, 12, 15, 16, 18, 20]


@pytest.mark.parametrize("votes, kept", [((0.2, 0.9, 0.5, 0.3), 2), ((0.9, 0.2, 0.1, 0.3), 1), ((0.1, 0.2, 0.3, 0.4), 4)])
def test_the_model_that_votes_best_on_held_out_images_is_kept(monkeypatch, undisturbed, tmp_path, votes, kept):
    seen, to_come = [], list(votes)

    def evaluate(network, images, index, sigma, draws, *_):
        if draws and to_come:
            assert len(images) == 120 and len(index) == 20                                # held out, not the 15 test images
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


@pytest.mark.parametrize("stage, least", [(pretrain, 0.2), (finetune, 0.08)])
def test_random_crops_are_those_that_pillow_would_make(make_folder, stage, least):
    """The papers' share of the picture, bicubic: PSNR above 40 dB, for crops that shrink and that grow, upright and flat."""
    y, x = np.mgrid[:300, :450] / 40
    waves = np.stack([np.sin(x + 2 * y), np.sin(3 * x - y), np.cos(5 * x * y / 10)], axis=-1)
    pixels = np.uint8(127.5 + 127.5 * waves)
    for size in (224, 70):
        images = open_images("folder", make_folder(80), True, size, 3)
        ours = stage.make_augment("resized-crop", images, *([0.0] if stage is finetune else []))
        crop = v2.RandomResizedCrop(size, (least, 1), interpolation=v2.InterpolationMode.BICUBIC)
        theirs = v2.Compose([crop, v2.RandomHorizontalFlip()])
        for seed in range(20):
            torch.manual_seed(seed)
            a = ours(Image.fromarray(pixels))
            torch.manual_seed(seed)
            b = torch.from_numpy(np.array(theirs(Image.fromarray(pixels)))).movedim(2, 0)
            assert a.shape == b.shape and a.dtype == torch.uint8
            error = (a.double() - b.double()).square().mean().item()
            assert 10 * math.log10(255**2 / max(error, 1e-9)) > 40


@pytest.mark.parametrize("stage", STAGES)
def test_the_deterministic_mode_runs_on_a_cpu(undisturbed, undrawn, stage, tmp_path):
    """And gives the same bits as without it, since a CPU's kernels are deterministic."""
    module, arguments, out, stem = undisturbed[stage]
    try:
        module.main([*arguments, "--deterministic", "--out", str(tmp_path)])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert same_weights(tmp_path / f"{stem}.pt", out / f"{stem}.pt")


@pytest.mark.parametrize("side, augment", [(32, ("shift-flip", "shift-flip")), (80, ("resized-crop", "rand-augment"))])
def test_class_folders_go_through_both_stages_at_their_own_size(monkeypatch, make_folder, tmp_path, side, augment):
    monkeypatch.setitem(SIZES, "tiny_rgb", TINY_RGB | dict(patch_size=side // 8))
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
    """What a kill -9, or SIGTERM, does to everything after it. (Real ones: test_robustness.py.)"""


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
        if now == step and how == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        return real_rate(now, *args, **kwargs)

    monkeypatch.setattr(stage, "learning_rate", rate)


def ctrl_c_ends(main, arguments, capsys):
    """Whether main(arguments), in which Ctrl-C is pressed, says so in one line and ends with 130, as shells do."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    return stop.value.code == 130 and error.count("\n") == 1 and ".py: interrupted" in error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stops", [
    [(2, "kill")], [(7, "Ctrl-C"), (13, "kill")], [(10, "tear")], [(19, "Ctrl-C")],
    pytest.param([(0, "kill")], marks=pytest.mark.slow), pytest.param([(16, "tear"), (16, "kill")], marks=pytest.mark.slow)],
    ids=str)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(monkeypatch, undisturbed, undrawn, tmp_path, capsys, stage, stops):
    module, arguments, undisturbed_out, stem = undisturbed[stage]
    arguments, last = [*arguments, "--out", str(tmp_path)], tmp_path / f"{stem}.last.pt"
    every = int(arguments[arguments.index("--save-every") + 1])
    for step, how in stops:
        with monkeypatch.context() as patch:
            stop_at(patch, module, step, how)
            if how == "Ctrl-C":
                assert ctrl_c_ends(module.main, arguments, capsys)
            else:
                with pytest.raises(Killed):
                    module.main(arguments)
        assert not (tmp_path / f"{stem}.pt").exists()
        saved = step // every * every                                                     # nothing is saved while it dies
        assert last.exists() == (saved > 0) and (not saved or read_checkpoint(last)["step"] == saved)
    capsys.readouterr()
    module.main(arguments)
    assert (f"continuing {last} after step {saved}" in capsys.readouterr().out) == (saved > 0)
    assert same_weights(tmp_path / f"{stem}.pt", undisturbed_out / f"{stem}.pt")
    assert rows(tmp_path / f"{stem}.jsonl") == rows(undisturbed_out / f"{stem}.jsonl")
    assert contents(tmp_path).keys() == contents(undisturbed_out).keys()


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_before_a_run_has_begun_leaves_nothing(monkeypatch, undisturbed, tmp_path, capsys, stage):
    module, arguments, _, _ = undisturbed[stage]
    monkeypatch.setattr(module, "open_images", lambda *_: signal.raise_signal(signal.SIGINT) or pytest.fail("went on"))
    assert ctrl_c_ends(module.main, [*arguments, "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


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
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, module, 2, "kill")
            module.main([*arguments, "--out", str(out)])
    before, stops = contents(out), []
    for _ in range(2):                                                # the first refusal must not keep the directory's lock
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.main([*arguments, *change, "--out", str(out)])
        stops.append(stop.value)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1
        assert all(name in error for name in (*named, "--out", "--overwrite")), error
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
    assert [row["step"] for row in rows(tmp_path / "pretrain.jsonl")] == [row["step"] for row in rows(out / "pretrain.jsonl")]
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
    """Into folders of `out`, in float64: pre-training, with accumulation, too; two fine-tunings; and a batch of no use."""
    torch.set_default_dtype(torch.float64)
    pretrain.draw_corruption = share_of_global_noise
    common = ["--device", "cpu", "--dataset", "folder", "--data-path", str(folder), "--seed", str(SEED), "--batch", str(BATCH),
              "--epochs", "5", "--warmup-epochs", "1", "--log-every", "2", "--augment", "shift"]
    tune = ["--init", "scratch", "--sigma", "0", "--consistency", "1", "--vote-every", "5", "--base-lr", "1e-4"]
    pretrain.main([*common, "--out", f"{out}/plain"])
    pretrain.main([*common, "--device-batch", "16", "--out", f"{out}/accumulated"])
    finetune.main([*common, *tune, "--device-batch", "16", "--out", f"{out}/finetuned"])
    finetune.main([*common, *tune, "--device-batch", "16", "--objective", "smoothadv", "--attack-eps", "0.3",
                   "--objective-warmup", "2", "--copies", "2",
                   "--out", f"{out}/attacked"])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        for stage, more in ((pretrain, []), (finetune, tune)):
            try:
                stage.main([*common, *more, "--batch", "97", "--out", f"{out}/indivisible"])
                raise AssertionError("a batch of 97 was taken")
            except SystemExit as stop:
                assert stop.code == 2


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_with_the_same_batch(monkeypatch, undrawn, torchrun, tmp_path, folder8, processes):
    workers = torchrun(processes, __file__, tmp_path / "many", folder8)
    monkeypatch.setattr(pretrain, "draw_corruption", pretrain.draw_corruption)
    try:
        five_steps(tmp_path / "one", folder8)
    finally:
        torch.set_default_dtype(torch.float32)
    output = workers.communicate(timeout=300)[0]
    assert workers.returncode == 0, output
    for name in ("plain/pretrain", "accumulated/pretrain", "finetuned/finetune_sigma_0", "attacked/finetune_sigma_0"):
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
