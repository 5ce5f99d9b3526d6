"""Pre-training and fine-tuning: data order, data sets, losses, optimizers, evaluation, whole runs.

Then runs that are stopped and go on, and several processes against one.
"""

import collections
import json
import math
import os
import sys
from types import SimpleNamespace

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
    accuracy,
    consistency_loss,
    few_labels,
    hold_out,
    layer_of,
    load_batches,
    make_mix,
    measure,
    micro_batches,
    open_images,
    parameter_groups,
    plan,
    shift_and_flip,
)
from model import SIZES, build_vit, learning_rate, load_weights, read_checkpoint

CPU = torch.device("cpu")
TINY_RGB = dict(image_size=16, patch_size=4, channels=3, dim=16, depth=2, heads=2,
                decoder_dim=16, decoder_depth=1, decoder_heads=2)


def rows(path):
    """The log without its times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "time"} for row in lines]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_weights(a, b):
    a, b = (read_checkpoint(path)["model"] for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def digits(train=True):
    return open_images("digits", "", train, 8, 1, CPU)


def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(finetune, "RANK", rank)
    monkeypatch.setattr(finetune, "WORLD", world)


# --------------------------------------------------------------------------------------------------
# Schedule and data order
# --------------------------------------------------------------------------------------------------


def test_learning_rate_at_its_corners():
    rate = [learning_rate(step, 100, 20, 3.0, 0.5) for step in range(101)]
    assert rate[:21:10] == [0, 1.5, 3.0]
    assert rate[60] == pytest.approx((3.0 + 0.5) / 2)
    assert rate[40] == pytest.approx(0.5 + 2.5 * (2 + math.sqrt(2)) / 4)
    assert rate[100] == pytest.approx(0.5)
    assert rate[:21] == sorted(rate[:21]) and rate[20:] == sorted(rate[20:], reverse=True)
    assert learning_rate(0, 10, 0, 2.0) == 2.0
    assert learning_rate(10, 10, 0, 2.0) == pytest.approx(0)


@pytest.mark.parametrize("batch, world, largest, expected", [
    (4096, 8, 64, (64, 8)), (128, 1, 128, (128, 1)), (96, 2, 20, (16, 3)), (14, 2, 4, (1, 7)),
    (6, 3, 100, (2, 1))])
def test_a_batch_is_shared_among_processes_and_micro_batches(
    monkeypatch, batch, world, largest, expected
):
    as_process(monkeypatch, 0, world)
    assert plan(batch, largest, 10_000) == (*expected, 10_000 // batch)


def test_a_batch_that_processes_do_not_divide_or_that_is_too_large_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="101.* 100 "):
        plan(101, 64, 100)
    as_process(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="100.*3 processes"):
        plan(100, 64, 1000)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("largest", [8, 2])
def test_a_step_takes_the_same_images_on_any_number_of_processes_and_none_twice_in_an_epoch(
    monkeypatch, world, largest
):
    index, batch, seed = torch.arange(45) * 3 + 1, 8, 3              # 45 images of a larger set
    taken = collections.defaultdict(list)
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        device_batch, accumulate, steps = plan(batch, largest, len(index))
        assert steps == 5
        for epoch in range(2):
            parts = micro_batches(index, batch, device_batch, epoch, seed)
            assert [len(part) for part in parts] == [device_batch] * accumulate * steps
            for i, part in enumerate(parts):
                taken[epoch, i // accumulate] += part.tolist()

    as_process(monkeypatch, 0, 1)
    for epoch in range(2):
        whole = [part.tolist() for part in micro_batches(index, batch, batch, epoch, seed)]
        assert [sorted(taken[epoch, step]) for step in range(5)] == [sorted(part) for part in whole]
        used = sum(whole, [])
        assert len({*used}) == len(used) == 40 and {*used} <= {*index.tolist()}


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return torch.cat(micro_batches(torch.arange(50), 5, 5, epoch, seed))

    places = [(seed, epoch) for seed in range(2) for epoch in range(3)]
    first = {place: order(*place) for place in places}
    assert len({tuple(found.tolist()) for found in first.values()}) == 6
    torch.manual_seed(9)
    assert all(torch.equal(order(*place), first[place]) for place in places[::-1])


def test_batches_in_memory_are_augmented_with_the_numbers_of_their_images():
    """The numbers are of (seed, epoch, image), whatever batch or process an image comes in."""
    images = digits()
    seen = []

    def augment(pixels, uniforms):
        seen.append(uniforms)
        return pixels // 2

    def load(parts, seed=4, epoch=1):
        """{image: its uniforms}"""
        seen.clear()
        for part, (x, labels) in zip(
            parts, load_batches(images, parts, CPU, augment, seed, epoch), strict=True
        ):
            raw, expected = images.items[part]
            assert torch.equal(x, (raw // 2) / 16) and torch.equal(labels, expected)
        return dict(zip(torch.cat(parts).tolist(), torch.cat(seen), strict=True))

    index = torch.arange(100, 140)
    first, again = load(index.split(10)), load(index.flip(0).split(7))
    assert all(torch.equal(first[i], again[i]) for i in first)
    numbers = torch.stack([*first.values()])
    assert numbers.shape == (40, 4) and numbers.min() >= 0 and numbers.max() < 1
    for other in (load([index], epoch=2), load([index], seed=5)):
        assert not any(torch.equal(first[i], other[i]) for i in first)


def test_pictures_from_files_are_augmented_by_seed_epoch_and_image_alone(make_folder):
    """In any batch, with any number of data workers."""
    images = open_images("folder", make_folder(80), True, 72, 3, CPU)
    augment = finetune.make_augment("rand-augment", images, 0.25)

    def load(parts, seed=3, epoch=0, workers=1):
        """{image: x}"""
        parts = [torch.tensor(part) for part in parts]
        found = {}
        batches = load_batches(images, parts, CPU, augment, seed, epoch, workers)
        for part, (x, labels) in zip(parts, batches, strict=True):
            assert torch.equal(labels, images.labels[part])
            found |= dict(zip(part.tolist(), x, strict=True))
        return found

    first = load([[0, 3, 6], [9, 12, 15]])
    assert all(x.shape == (3, 72, 72) and x.dtype == torch.float32 for x in first.values())
    assert max(x.max() for x in first.values()) <= 1
    again = load([[15, 3], [12], [9, 0, 6]], workers=2)
    assert all(torch.equal(again[i], first[i]) for i in first)
    for other in (load([[*first]], epoch=1), load([[*first]], seed=4)):
        assert not any(torch.equal(other[i], first[i]) for i in first)


@pytest.mark.parametrize("shift, flip", [(0, False), (0, True), (1, False), (2, True)])
def test_shift_and_flip_is_a_crop_of_the_padded_image(shift, flip):
    pixels = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)
    uniforms = torch.rand(64, 4)
    result = shift_and_flip(pixels, uniforms, shift, flip).numpy()
    seen = set()
    for image, u, out in zip(pixels.numpy(), uniforms, result, strict=True):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="edge")
        y, x = (int(value * (2 * shift + 1)) for value in u[:2])
        crop = padded[:, y:y + 8, x:x + 8]
        mirrored = flip and u[2] < 0.5
        assert (out == (crop[:, :, ::-1] if mirrored else crop)).all()
        seen.add((y, x, bool(mirrored)))
    assert len(seen) > (2 * shift + 1) ** 2 * (1 + flip) / 2 and result.dtype == np.uint8


# --------------------------------------------------------------------------------------------------
# Data sets
# --------------------------------------------------------------------------------------------------


def test_digits_are_split_into_the_last_360_and_disjoint_parts_of_the_others():
    theirs = load_digits()
    for images, part in ((digits(), slice(None, -360)), (digits(False), slice(-360, None))):
        pixels, labels = images.items[:]
        assert pixels.dtype == torch.uint8 and (images.white, images.size) == (16, 8)
        assert (pixels[:, 0].numpy() == theirs.images[part]).all()
        assert (labels.numpy() == theirs.target[part]).all() and torch.equal(labels, images.labels)
    train, held = hold_out(1437, 0.1)
    assert len(held) == 144 and len(train) == 1437 - 144
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(1437))
    again = hold_out(1437, 144)                                # fixed; a share or a number
    assert torch.equal(again[0], train) and torch.equal(again[1], held)
    assert held.tolist() != list(range(held[0], held[0] + 144))      # not the first or last ones


def test_without_a_held_out_part_all_images_are_both():
    assert all(part.tolist() == list(range(1437)) for part in hold_out(1437, 0))


@pytest.mark.parametrize("side, size", [(32, 32), (40, 32), (80, 80), (90, 70)])
def test_class_folders_are_read_with_their_labels_and_fitted_to_the_size(make_folder, side, size):
    """The shorter side becomes 256/224 of the size; a picture of that size is left as it is."""
    root = make_folder(side)
    images = open_images("folder", root, True, size, 3, CPU)
    assert images.classes == ["class_0", "class_1", "class_2"] and images.white == 255
    assert images.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    files = [root / "train" / f"class_{label}" / f"{i}.png" for label in range(3) for i in range(6)]
    for i, file in enumerate(files):
        pixels, label = images.items[i]
        assert label == i // 6 and pixels.dtype == torch.uint8
        picture = Image.open(file)
        if side != size:
            large = round(size * 256 / 224)
            before = round((large - size) / 2)
            picture = picture.resize((large, large), Image.Resampling.BICUBIC)
            picture = picture.crop((before, before, before + size, before + size))
        assert (pixels.permute(1, 2, 0).numpy() == np.asarray(picture)).all()
    test = open_images("folder", root, False, size, 3, CPU)
    assert len(test.labels) == 6
    (root / "val").rename(root / "test")                       # either name will do
    assert torch.equal(open_images("folder", root, False, size, 3, CPU).labels, test.labels)


def test_pictures_up_to_64_pixels_stay_in_memory(make_folder):
    root = make_folder(72)
    for size in (32, 64, 70):
        items = open_images("folder", root, True, size, 3, CPU).items
        assert isinstance(items, torch.utils.data.TensorDataset) == (size <= 64)


def test_a_few_labels_are_so_many_of_each_class_and_fixed_by_the_seed():
    labels = digits().labels
    train, _ = hold_out(1437, 0.1)
    few, again, other = (few_labels(train, labels, 4, seed) for seed in (0, 0, 1))
    times = collections.Counter(few.tolist())
    assert times.keys() <= {*train.tolist()}                   # none that is held out
    assert collections.Counter(labels[[*times]].tolist()) == dict.fromkeys(range(10), 4)
    assert max(times.values()) - min(times.values()) <= 1
    assert torch.equal(few, again) and not torch.equal(few, other)
    assert len(few) == len(train)


def test_evenly_spaced_images_are_of_all_classes():
    index = torch.arange(1000) * 2
    assert finetune.evenly_spaced(index, 5).tolist() == [0, 498, 998, 1498, 1998]
    assert finetune.evenly_spaced(index[:3], 5).tolist() == [0, 2, 4]


# --------------------------------------------------------------------------------------------------
# Losses and optimizers (more objectives: test_objectives.py)
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [2, 3])
def test_consistency_is_kl_from_the_mean_and_its_entropy(copies):
    logits = torch.randn(copies, 6, 5, dtype=torch.float64, requires_grad=True)
    each = logits.softmax(-1)
    mean = each.mean(0)
    divergence = sum(F.kl_div(one.log(), mean, reduction="batchmean") for one in each) / copies
    entropy = torch.distributions.Categorical(probs=mean).entropy().mean()
    for lam, eta in ((2.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
        both = consistency_loss(logits, lam, eta), lam * divergence + eta * entropy
        torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in both]
        torch.testing.assert_close(*gradients)


def test_consistency_stays_finite_for_certain_predictions():
    logits = torch.tensor([[[200.0, 0.0, -200.0]]] * 2, requires_grad=True)
    loss = consistency_loss(logits, 2.0, 0.5)
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


def test_mixed_targets_are_the_shares_of_the_mixed_images():
    labels = torch.arange(30) % 3
    white = F.one_hot(labels, 3).float()                       # in class c channel c is white
    images = white[:, :, None, None].expand(-1, -1, 16, 16)
    for mixup, cutmix in ((0.8, 0), (0, 1.0), (0.8, 1.0)):
        mixed, targets = make_mix(mixup, cutmix, 3)(images, labels)
        torch.testing.assert_close(mixed.mean((2, 3)), targets, rtol=1e-4, atol=1e-4)
        assert (targets.max(1).values < 1).any()
    same, targets = make_mix(0, 0, 3)(images, labels)
    assert torch.equal(same, images) and torch.equal(targets, white)


def test_layers_count_from_the_patch_embedding_to_the_head():
    expected = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.bias": 0,
                "blocks.0.norm1.weight": 1, "blocks.11.mlp.fc2.bias": 12, "norm.weight": 13,
                "fc_norm.bias": 13, "head.weight": 13, "head.1.bias": 13}
    assert {name: layer_of(name, 12) for name in expected} == expected


def test_groups_cover_every_parameter_once_with_the_scale_of_its_layer():
    vit = build_vit("vit_digits", 10)
    names = {parameter: name for name, parameter in vit.named_parameters()}
    scales = {"cls_token": 0.5**4, "pos_embed": 0.5**4, "patch_embed": 0.5**4, "blocks.0": 0.5**3,
              "blocks.1": 0.5**2, "blocks.2": 0.5, "fc_norm": 1, "head": 1}
    groups = parameter_groups(vit, 0.05, 0.5)
    grouped = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    for group in groups:
        for name in (names[parameter] for parameter in group["params"]):
            (scale,) = (value for start, value in scales.items() if name.startswith(start))
            assert group["lr_scale"] == scale, name
            spared = name in ("cls_token", "pos_embed") or name.endswith("bias") or "norm" in name
            assert group["weight_decay"] == (0 if spared else 0.05), name


def test_a_probes_optimizer_has_its_head_alone():
    args = finetune.parse(["--sigma", "0.25", "--init", "scratch", "--linear-probe"])
    vit = finetune.build_model(args, 10, CPU)
    grouped = [p for group in finetune.build_optimizer(vit, args).param_groups
               for p in group["params"]]
    assert {id(p) for p in grouped} == {id(vit.head[1].weight), id(vit.head[1].bias)}


def test_lars_takes_the_steps_computed_by_hand():
    start = ([[3.0, 4.0]], [1.0, 2.0], [[0.0, 0.0]])
    matrix, vector, still = (nn.Parameter(torch.tensor(value)) for value in start)
    groups = [dict(params=[matrix, still], decay=0.1), dict(params=[vector], decay=0.0)]
    optimizer = LARS(groups, lr=2.0, momentum=0.5)
    w, b, velocity_w, velocity_b = np.array([3.0, 4.0]), np.array([1.0, 2.0]), 0, 0
    for gradient in (np.array([1.0, -2.0]), np.array([0.5, 0.0])):
        matrix.grad = torch.tensor(gradient[None]).float()
        vector.grad = torch.tensor(gradient).float()
        still.grad = torch.ones(1, 2)
        before = still.detach().clone()
        optimizer.step()
        change = gradient + 0.1 * w
        scale = 0.001 * np.linalg.norm(w) / np.linalg.norm(change)
        velocity_w = 0.5 * velocity_w + scale * change
        velocity_b = 0.5 * velocity_b + gradient
        w, b = w - 2 * velocity_w, b - 2 * velocity_b
        np.testing.assert_allclose(matrix.detach().numpy()[0], w, rtol=1e-6)
        np.testing.assert_allclose(vector.detach().numpy(), b, rtol=1e-6)
        assert still.isfinite().all() and not torch.equal(still, before)


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A fixed linear classifier of digits that remembers which images it has seen."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.randn(64, 10)), []

    def forward(self, x):
        self.seen += [image.numpy().tobytes() for image in x]
        return x.flatten(1) @ self.weight


def evaluating(**values):
    return SimpleNamespace(**dict(seed=4, sigma=0.5, dtype="fp32", workers=0) | values)


def plain_accuracy(network, images, index, sigma, copies, seed):
    """The share of right votes, image by image; the noise comes in blocks of 50, five at a time."""
    right = 0
    for start in range(0, len(index), 50):
        block = index[start:start + 50]
        x = torch.stack([images.items[i][0] for i in block]) / 16
        number = np.random.SeedSequence([3, seed, start, 0]).generate_state(1)[0]
        torch.manual_seed(int(number))
        if copies > 1:
            torch.randn_like(x)                                # the draw of `noisy`
        noise = torch.cat([torch.randn(min(5, copies - first), *x.shape)
                           for first in range(0, copies, 5)])
        for j, i in enumerate(block):
            z = x[j] + sigma * noise[:, j]                     # copies C H W
            votes = np.bincount(network(z).argmax(1).numpy(), minlength=10)
            right += int(votes.argmax() == images.labels[i])
    return right / len(index)


def test_accuracies_are_those_of_a_plain_loop_with_the_documented_draws():
    """Votes choose the epoch that is kept, so other draws would give another model."""
    images, linear, args = digits(), Linear(), evaluating(sigma=4.0)     # so that votes are close
    index = torch.arange(1105) + 7
    for copies in (2, 7):
        expected = plain_accuracy(linear, images, index, 4.0, copies, 4)
        assert accuracy(linear, images, index, 4.0, copies, args, CPU) == round(expected, 6)
    thousand = index[np.linspace(0, 1104, 1000).astype(int)]
    found = measure(linear, images, index, args, CPU)
    assert found == dict(
        clean=round(plain_accuracy(linear, images, index, 0.0, 1, 4), 6),
        noisy=round(plain_accuracy(linear, images, index, 4.0, 1, 4), 6),
        vote=round(plain_accuracy(linear, images, thousand, 4.0, 100, 4), 6),
    )
    assert len({*found.values()}) == 3 and linear.training
    other = measure(linear, images, index, evaluating(sigma=4.0, seed=5), CPU)
    assert other["clean"] == found["clean"] and other["vote"] != found["vote"]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [101, 5])
@pytest.mark.parametrize("sigma, copies", [(0.0, 1), (0.5, 1), (0.5, 10)])
def test_evaluation_counts_each_image_once_on_any_number_of_processes(
    monkeypatch, world, count, sigma, copies
):
    test, linear, index = digits(False), Linear(), torch.arange(count) * 3 + 2
    alone = accuracy(linear, test, index, sigma, copies, evaluating(), CPU)
    whole = collections.Counter(linear.seen)
    linear.seen.clear()
    monkeypatch.setattr(finetune, "sum_over_ranks", lambda value: value)
    shares = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        shares.append(accuracy(linear, test, index, sigma, copies, evaluating(), CPU))
    assert sum(shares) == pytest.approx(alone, abs=1e-5)
    assert collections.Counter(linear.seen) == whole and len(linear.seen) == count * copies


def test_evaluation_adds_noise_of_sigma_and_takes_the_majority():
    class Corner(nn.Module):
        def forward(self, x):
            return F.one_hot((x[:, 0, 0, 0] < 0.3).long() * 3, 10).float()

    test = digits(False)
    pixels, labels = test.items[:]
    assert not pixels[:, :, 0, 0].any()
    labels[:] = 3
    found = measure(Corner(), test, torch.arange(360), evaluating(sigma=1.0), CPU)
    share = 0.5 * (1 + math.erf(0.3 / math.sqrt(2)))
    assert found["clean"] == 1 and found["vote"] > 0.95
    assert abs(found["noisy"] - share) < 5 * math.sqrt(share * (1 - share) / 360)


# --------------------------------------------------------------------------------------------------
# Whole runs
# --------------------------------------------------------------------------------------------------

COMMON = ["--device", "cpu", "--batch", "10", "--warmup-epochs", "1", "--augment", "shift"]
FOLDER = ["--dataset", "folder", "--model", "vit_digits", "--size", "8", "--normalisation",
          "digits", "--holdout", "20"]
PRETRAIN = [*COMMON, *FOLDER, "--epochs", "5", "--save-every", "2", "--mask-ratio", "0.5",
            "--base-lr", "0.02", "--norm-pix"]                 # 10 steps an epoch
FINETUNE = [*COMMON, "--sigma", "0.25", "--epochs", "5", "--save-every", "2", "--drop-path", "0.2",
            "--mixup", "0.8", "--cutmix", "1"]                 # all kinds of randomness
STAGES = ("pretrain", "finetune")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, folder8):
    """{stage: (module, arguments, run directory, stem)} of runs that nothing interrupted."""
    outs = {name: tmp_path_factory.mktemp(name) for name in STAGES}
    init = outs["pretrain"] / "pretrain.pt"
    runs = {
        "pretrain": (pretrain, [*PRETRAIN, "--data-path", str(folder8)], outs["pretrain"],
                     "pretrain"),
        "finetune": (finetune, [*FINETUNE, "--init", str(init)], outs["finetune"],
                     "finetune_sigma_0.25"),
    }
    for stage, arguments, out, _ in runs.values():
        stage.main([*arguments, "--out", str(out)])
    return runs


def test_the_log_has_a_row_an_epoch_with_the_scheduled_rate_and_a_falling_loss(undisturbed):
    _, _, out, stem = undisturbed["pretrain"]
    log = rows(out / f"{stem}.jsonl")
    assert [(row["step"], row["epoch"]) for row in log] == [(10 * e, e) for e in range(1, 6)]
    peak, warmup, steps = 0.02 * 10 / 256, 10, 50
    for row in log:
        step = row["step"] - 1
        cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert row["lr"] == pytest.approx(peak * (step / warmup if step < warmup else cosine))
    assert log[-1]["loss"] < log[0]["loss"]
    lines = (out / f"{stem}.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    assert times == sorted(times) and times[-1] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_a_row_of_the_log_is_the_mean_loss_of_its_epochs_steps(
    monkeypatch, undisturbed, tmp_path, stage
):
    module, arguments, out, stem = undisturbed[stage]
    losses, step = [], module.train_step

    def watched(*args):
        losses.append(float(step(*args)))
        return torch.tensor(losses[-1])

    monkeypatch.setattr(module, "train_step", watched)
    module.main([*arguments, "--out", str(tmp_path)])
    logged = [row["loss"] for row in rows(out / f"{stem}.jsonl") if "loss" in row]
    assert logged == pytest.approx(np.reshape(losses, (5, 10)).mean(1).tolist(), rel=1e-5)


def test_fine_tuning_votes_every_so_often_and_at_the_last_epoch_and_tests_once(undisturbed):
    _, _, out, stem = undisturbed["finetune"]
    log = rows(out / f"{stem}.jsonl")
    held, test = ([row for row in log if row.get("split") == part] for part in ("holdout", "test"))
    assert [row["epoch"] for row in held] == [2, 4, 5] and len(test) == 1
    for row in held + test:
        images = 20 if row in held else 15
        for key in ("clean", "noisy", "vote"):
            assert round(row[key] * images) == pytest.approx(row[key] * images, abs=1e-3)
    assert [row["epoch"] for row in log if "loss" in row] == [1, 2, 3, 4, 5]
    assert test[0]["epoch"] == max(held, key=lambda row: (row["vote"], row["epoch"]))["epoch"]


@pytest.mark.parametrize("votes, kept", [
    ((0.2, 0.9, 0.5, 0.3), 2), ((0.9, 0.2, 0.1, 0.3), 1), ((0.1, 0.2, 0.3, 0.4), 4),
    ((0.1, 0.5, 0.5, 0.2), 3)])
def test_the_model_that_votes_best_on_held_out_images_is_kept(
    monkeypatch, undisturbed, tmp_path, votes, kept
):
    seen, to_come = [], list(votes)

    def measured(network, images, index, *_):
        if to_come:
            assert len(images.labels) == 120 and len(index) == 20      # not the 15 test images
            seen.append({name: value.clone() for name, value in network.state_dict().items()})
            return dict(clean=0.5, noisy=0.5, vote=to_come.pop(0))
        assert len(images.labels) == len(index) == 15
        return dict(clean=0.5, noisy=0.5, vote=0.5)

    monkeypatch.setattr(finetune, "measure", measured)
    flags = ["--epochs", "4", "--save-every", "1", "--out", str(tmp_path)]
    finetune.main([*undisturbed["finetune"][1], *flags])
    best = read_checkpoint(tmp_path / "finetune_sigma_0.25.pt")["model"]
    same = [all(torch.equal(state[key], best[key]) for key in best) for state in seen]
    assert same == [epoch == kept for epoch in (1, 2, 3, 4)]
    assert rows(tmp_path / "finetune_sigma_0.25.jsonl")[-1]["epoch"] == kept


def test_the_picture_shows_ten_images_in_four_rows(tiny_run):
    """Clean, noisy, with patches dropped, restored."""
    with Image.open(tiny_run / "pretrain.png") as picture:
        pixels = np.asarray(picture.convert("L")) / 255
    assert pixels.shape == (4 * 100 + 4, 10 * 100 + 4)         # 96 pixels a digit, 4 between them
    clean, noisy, masked, restored = (pixels[4 + 100 * i:][:96, 4:1000] for i in range(4))
    first = open_images("digits", "", True, 8, 1, CPU).items[int(hold_out(1437, 0.1)[1][0])][0]
    np.testing.assert_allclose(clean[6:96:12, 6:96:12], first[0] / 16, atol=1 / 255)
    assert (masked == 128 / 255).mean() == pytest.approx(0.25, abs=0.04)
    half_normal = 0.25 / math.sqrt(2 * math.pi)                # black is clipped from below
    assert noisy[clean == 0].mean() == pytest.approx(half_normal, rel=0.2)
    assert 0.3 < np.corrcoef(clean.ravel(), restored.ravel())[0, 1] < 0.99


def test_checkpoints_hold_what_the_next_stage_needs_and_no_code(tiny_run):
    for name, kind, build in (
        ("pretrain.pt", "pretrain", model.DenoisingMaskedAutoencoder),
        ("finetune_sigma_0.25.pt", "finetune", model.VisionTransformer),
    ):
        content = torch.load(tiny_run / name, weights_only=True)
        assert (content["kind"], content["epoch"]) == (kind, 2)
        network = build(**content["config"])
        assert load_weights(network, content["model"], name) == ([], [])
        assert content["data"]["dataset"] == "digits"
        assert content["data"]["classes"] == list("0123456789")
        written = json.loads((tiny_run / name).with_suffix(".json").read_text())
        assert written == json.loads(json.dumps(content["settings"]))
    assert content["sigma"] == 0.25
    assert not list(tiny_run.glob("*.tmp")) and not list(tiny_run.glob("*.last.pt"))


def test_the_kept_classifier_has_the_accuracy_that_the_log_says(tiny_run):
    content = torch.load(tiny_run / "finetune_sigma_0.25.pt", weights_only=True)
    vit = model.VisionTransformer(**content["config"]).eval()
    vit.load_state_dict(content["model"])
    theirs = load_digits()
    with torch.no_grad():
        x = torch.tensor(theirs.images[-360:], dtype=torch.float32)[:, None] / 16
        guess = vit(x).argmax(1).numpy()
    logged = rows(tiny_run / "finetune_sigma_0.25.jsonl")[-1]
    right = (guess == theirs.target[-360:]).mean()
    assert logged["split"] == "test" and logged["clean"] == pytest.approx(right, abs=1e-5)


def test_a_linear_probe_trains_its_head_alone(undisturbed, tmp_path):
    init = undisturbed["pretrain"][2] / "pretrain.pt"
    finetune.main([*COMMON, "--epochs", "2", "--linear-probe", "--sigma", "0.25", "--base-lr",
                   "200", "--init", str(init), "--out", str(tmp_path)])
    before = torch.load(init, weights_only=True)["model"]
    after = torch.load(tmp_path / "finetune_sigma_0.25.pt", weights_only=True)["model"]
    head = {key for key in after if key not in before}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert head == {"head.1.weight", "head.1.bias", *(f"head.0.{name}" for name in statistics)}
    assert all(torch.equal(after[key], before[key]) for key in after.keys() - head)
    assert after["head.0.running_mean"].any() and after["head.1.bias"].any()
    assert after["head.1.weight"].std() > 0.011


@pytest.mark.parametrize("objective, copies", [
    ("gaussian", 1), ("gaussian", 3), ("consistency", 2)])
def test_noise_of_sigma_comes_after_mixing_and_differs_between_copies(
    monkeypatch, tmp_path, folder8, objective, copies
):
    inputs, build = [], finetune.build_vit

    def grey(*_):
        return lambda images, labels: (images * 0 + 0.5, F.one_hot(labels, 3).float())

    def watched(*args, **kwargs):
        vit = build(*args, **kwargs)
        keep = lambda network, x: inputs.append(x[0]) if network.training else None
        vit.register_forward_pre_hook(keep)
        return vit

    monkeypatch.setattr(finetune, "make_mix", grey)
    monkeypatch.setattr(finetune, "build_vit", watched)
    finetune.main([*FOLDER, "--data-path", str(folder8), "--init", "scratch", "--sigma", "0.4",
                   "--batch", "32", "--epochs", "1", "--objective", objective, "--objective-args",
                   f"copies={copies}", "--out", str(tmp_path), "--device", "cpu"])
    assert len(inputs) == 3 and all(x.shape == (32 * copies, 1, 8, 8) for x in inputs)
    noise = torch.stack(inputs) - 0.5
    assert noise.std() == pytest.approx(0.4, rel=0.05) and abs(noise.mean()) < 0.03
    assert len({x.numpy().tobytes() for x in noise.flatten(0, 1)}) == 3 * 32 * copies


@pytest.mark.parametrize("stage, least", [(pretrain, 0.2), (finetune, 0.08)])
def test_random_crops_are_those_that_pillow_would_make(stage, least):
    """Of the papers' share, bicubic: PSNR above 40 dB, for crops that shrink and that grow."""
    y, x = np.mgrid[:300, :450] / 40
    waves = np.stack([np.sin(x + 2 * y), np.sin(3 * x - y), np.cos(5 * x * y / 10)], axis=-1)
    picture = Image.fromarray(np.uint8(127.5 + 127.5 * waves))
    for size in (224, 70):
        images = SimpleNamespace(size=size)
        ours = stage.make_augment("resized-crop", images, *([0.0] if stage is finetune else []))
        bicubic = v2.InterpolationMode.BICUBIC
        crop = v2.RandomResizedCrop(size, (least, 1), interpolation=bicubic)
        theirs = v2.Compose([crop, v2.RandomHorizontalFlip()])
        for seed in range(20):
            torch.manual_seed(seed)
            a = ours(picture)
            torch.manual_seed(seed)
            b = torch.from_numpy(np.array(theirs(picture))).movedim(2, 0)
            assert a.shape == b.shape and a.dtype == torch.uint8
            error = (a.double() - b.double()).square().mean().item()
            assert 10 * math.log10(255**2 / max(error, 1e-9)) > 40


@pytest.mark.parametrize("side, augment", [
    (32, ("shift-flip", "shift-flip")), (80, ("resized-crop", "rand-augment"))])
def test_class_folders_go_through_both_stages_at_their_own_size(
    monkeypatch, make_folder, tmp_path, side, augment
):
    monkeypatch.setitem(SIZES, "vit_cifar_tiny", TINY_RGB)     # of 16 pixels: it resizes
    common = ["--batch", "6", "--epochs", "2", "--warmup-epochs", "1", "--workers", "1",
              "--device", "cpu", "--out", str(tmp_path), "--recipe", "cifar10"]
    pretrain.main([*common, "--dataset", "folder", "--data-path", str(make_folder(side)), "--size",
                   str(side), "--model", "vit_cifar_tiny", "--holdout", "3", "--augment",
                   augment[0]])
    erasing = ["--erasing", "0.25"] if side > 64 else []
    finetune.main([*common, *erasing, "--sigma", "0.5", "--augment", augment[1], "--mixup", "0.8",
                   "--cutmix", "1"])
    content = torch.load(tmp_path / "finetune_sigma_0.5.pt", weights_only=True)
    assert content["data"]["image_size"] == side
    assert content["data"]["classes"] == ["class_0", "class_1", "class_2"]
    assert content["model"]["head.weight"].shape == (3, 16)
    (test,) = (row for row in rows(tmp_path / "finetune_sigma_0.5.jsonl") if "split" in row
               and row["split"] == "test")
    assert test["step"] == 4


@pytest.mark.parametrize("side", [32, 80])
def test_an_unreadable_picture_stops_the_run_with_its_name(
    monkeypatch, make_folder, tmp_path, capsys, side
):
    """In memory it is found before the first step, in a data worker when its turn comes."""
    monkeypatch.setitem(SIZES, "vit_cifar_tiny", TINY_RGB)
    root = make_folder(side)
    for bad in (root / "train" / "class_1").iterdir():
        bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--recipe", "cifar10", "--dataset", "folder", "--data-path", str(root),
                       "--size", str(side), "--model", "vit_cifar_tiny", "--holdout", "3",
                       "--augment", "none" if side == 32 else "resized-crop", "--batch", "15",
                       "--epochs", "1", "--workers", "1", "--out", str(tmp_path / "run"),
                       "--device", "cpu"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and "class_1/" in error
    assert error.startswith("pretrain.py: error: cannot read the image")
    assert not (tmp_path / "run" / "pretrain.pt").exists()


# --------------------------------------------------------------------------------------------------
# Stopping and going on
# --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill -9 does to everything after it. (Real ones: test_robustness.py.)"""


def stop_at(monkeypatch, stage, step, how="kill"):
    """Kill the stage's run when it asks for the learning rate of `step`, or in its next save."""
    real_rate, real_save = stage.learning_rate, torch.save

    def torn_save(content, file):
        real_save(content, file)
        file.truncate(file.tell() // 2)
        raise Killed

    def rate(now, *args, **kwargs):
        if now == step and how == "kill":
            raise Killed
        if now == step and how == "tear":
            monkeypatch.setattr(torch, "save", torn_save)
        return real_rate(now, *args, **kwargs)

    monkeypatch.setattr(stage, "learning_rate", rate)


def run_until(module, arguments, step, how="kill"):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, module, step, how)
        module.main(arguments)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stops", [
    [(37, "kill"), (20, "kill")], [(20, "tear"), (44, "kill")],
    *(pytest.param(stops, marks=pytest.mark.slow) for stops in (
        [(0, "kill")], [(5, "kill")], [(49, "tear")], [(30, "tear"), (30, "tear"), (41, "kill")]))],
    ids=str)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    monkeypatch, undisturbed, tmp_path, capsys, stage, stops
):
    """Its log, too, which is first cut back to the epoch of the checkpoint."""
    module, arguments, undisturbed_out, stem = undisturbed[stage]
    arguments, last = [*arguments, "--out", str(tmp_path)], tmp_path / f"{stem}.last.pt"
    log = tmp_path / f"{stem}.jsonl"
    saved = 0
    for step, how in stops:
        begun = saved
        run_until(module, arguments, step, how)
        assert not (tmp_path / f"{stem}.pt").exists()
        saved = max(begun, step // 20 * 2)                     # nothing is saved while it dies
        assert last.exists() == (saved > 0)
        assert not saved or read_checkpoint(last)["epoch"] == saved
        epochs = [row["epoch"] for row in rows(log) if "loss" in row]
        assert epochs == [*range(1, epochs[-1] + 1 if epochs else 1)] and len(epochs) >= saved
        if how == "kill":
            assert len(epochs) == step // 10                   # no row of an earlier attempt
    capsys.readouterr()
    later = 1e6                                                # a pause that is no time of running
    monkeypatch.setattr(module.time, "time", lambda now=module.time.time: now() + later)
    module.main(arguments)
    said = f"continuing {last} after epoch {saved}" in capsys.readouterr().out
    assert said == (saved > 0)
    assert same_weights(tmp_path / f"{stem}.pt", undisturbed_out / f"{stem}.pt")
    assert rows(log) == rows(undisturbed_out / f"{stem}.jsonl")
    assert contents(tmp_path).keys() == contents(undisturbed_out).keys()
    times = [json.loads(line)["time"] for line in log.read_text().splitlines()]
    assert times == sorted(times) and times[-1] < later / 2


@pytest.mark.parametrize("stage", STAGES)
def test_a_torn_last_row_of_the_log_is_cut_off(undisturbed, tmp_path, stage):
    """As a full disk leaves it."""
    module, arguments, undisturbed_out, stem = undisturbed[stage]
    arguments = [*arguments, "--out", str(tmp_path)]
    run_until(module, arguments, 20)
    with open(tmp_path / f"{stem}.jsonl", "a") as log:
        log.write('{"step": 30, "epo')
    module.main(arguments)
    assert rows(tmp_path / f"{stem}.jsonl") == rows(undisturbed_out / f"{stem}.jsonl")


@pytest.mark.parametrize("stage", STAGES)
def test_a_repeated_command_says_that_it_is_done_and_changes_nothing(undisturbed, capsys, stage):
    module, arguments, out, stem = undisturbed[stage]
    before = contents(out)
    for more in ([], ["--device-batch", "5", "--workers", "2"]):
        capsys.readouterr()
        module.main([*arguments, *more, "--out", str(out)])
        assert f"{stem}.pt is done" in capsys.readouterr().out
        assert contents(out) == before


@pytest.mark.parametrize("stage, change, named", [
    ("pretrain", ["--seed", "3", "--mask-ratio", "0.25"],
     ("seed 0 -> 3", "mask_ratio 0.5 -> 0.25")),
    ("pretrain", ["--no-norm-pix"], ("norm_pix True -> False",)),
    ("finetune", ["--layer-decay", "0.5", "--labels-per-class", "5"],
     ("layer_decay 0.75 -> 0.5", "labels_per_class 0 -> 5")),
    ("finetune", ["--objective-args", "eta=1"], ("objective_args", "'eta': 0.5", "'eta': 1"))])
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_by_name_and_leave_the_run_alone(
    undisturbed, tmp_path, capsys, stage, change, named, finished
):
    module, arguments, out, stem = undisturbed[stage]
    if not finished:
        out = tmp_path
        run_until(module, [*arguments, "--out", str(out)], 20)
    before, stops = contents(out), []
    for _ in range(2):                                         # the first must not keep the lock
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            module.main([*arguments, *change, "--out", str(out)])
        stops.append(stop.value)                               # nor may who holds on to its error
        error = capsys.readouterr().err
        assert stop.value.code == 2 and len(error.splitlines()) == 1
        assert all(name in error for name in (*named, "--out")), error
    assert contents(out) == before


@pytest.mark.parametrize("stage", STAGES)
def test_an_unfinished_run_of_the_old_version_is_refused(undisturbed, tmp_path, capsys, stage):
    module, arguments, _, stem = undisturbed[stage]
    old = dict(recipe="digits", log_every=10, image_size=8, model_size=None, epochs=5.0)
    (tmp_path / f"{stem}.json").write_text(json.dumps(old))
    torch.save({"model": {}, "step": 3}, tmp_path / f"{stem}.last.pt")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as stop:
        module.main([*arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "log_every 10 -> None" in error and error.count("\n") == 1
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


# --------------------------------------------------------------------------------------------------
# Several processes: this file is also the script that torchrun starts
# --------------------------------------------------------------------------------------------------

BATCH, SEED = 96, 7                                            # one step an epoch


def share_of_global_noise(images, grid, *position, real=pretrain.draw_corruption):
    """In place of draw_corruption: drawn for a whole batch, of which each rank gets its part."""
    if len(position) < 4:
        return real(images, grid, *position)
    _, step, micro, rank = position
    generator = torch.Generator().manual_seed(step)
    first = (micro * pretrain.WORLD + rank) * len(images)
    part = slice(first, first + len(images))
    noise = torch.randn(BATCH, *images.shape[1:], generator=generator)
    return noise[part], torch.rand(BATCH, math.prod(grid), generator=generator)[part]


def five_steps(out, folder):
    """Into folders of `out`, in float64: two pre-trainings, one accumulated; two fine-tunings."""
    torch.set_default_dtype(torch.float64)
    pretrain.draw_corruption = share_of_global_noise
    common = [*FOLDER, "--device", "cpu", "--data-path", str(folder), "--seed", str(SEED),
              "--batch", str(BATCH), "--epochs", "5", "--warmup-epochs", "1", "--augment", "shift"]
    tune = ["--init", "scratch", "--sigma", "0", "--device-batch", "16", "--base-lr", "1e-4"]
    attack = ["--objective", "extras/smoothadv.py:smoothadv", "--objective-args", "eps=0.3",
              "copies=2", "steps=4"]
    pretrain.main([*common, "--out", f"{out}/plain"])
    pretrain.main([*common, "--device-batch", "16", "--out", f"{out}/accumulated"])
    finetune.main([*common, *tune, "--objective", "consistency", "--out", f"{out}/finetuned"])
    finetune.main([*common, *tune, *attack, "--out", f"{out}/attacked"])
    if pretrain.WORLD > 1:                                     # a batch that they cannot divide
        for stage, more in ((pretrain, []), (finetune, tune)):
            with pytest.raises(SystemExit) as stop:
                stage.main([*common, *more, "--batch", "97", "--out", f"{out}/indivisible"])
            assert stop.value.code == 2


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_with_the_same_batch(
    monkeypatch, torchrun, tmp_path, folder8, processes
):
    root = os.path.dirname(pretrain.__file__)
    workers = torchrun(processes, __file__, tmp_path / "many", folder8, cwd=root)
    monkeypatch.chdir(root)
    monkeypatch.setattr(pretrain, "draw_corruption", pretrain.draw_corruption)
    try:
        five_steps(tmp_path / "one", folder8)
    finally:
        torch.set_default_dtype(torch.float32)
    output = workers.communicate(timeout=300)[0]
    assert workers.returncode == 0, output
    for name in ("plain/pretrain", "accumulated/pretrain", "finetuned/finetune_sigma_0",
                 "attacked/finetune_sigma_0"):
        one, many = (read_checkpoint(tmp_path / which / f"{name}.pt") for which in ("one", "many"))
        assert one["epoch"] == 5 and one["model"].keys() == many["model"].keys()
        for key, value in one["model"].items():
            assert value.dtype == torch.float64
            torch.testing.assert_close(many["model"][key], value, rtol=0, atol=1e-9,
                                       msg=f"{name}: {key}")
        logs = (rows(tmp_path / which / f"{name}.jsonl") for which in ("one", "many"))
        for a, b in zip(*logs, strict=True):
            assert a == pytest.approx(b, abs=1e-9)
    plain, accumulated = (read_checkpoint(tmp_path / f"one/{name}/pretrain.pt")["model"]
                          for name in ("plain", "accumulated"))
    for key, value in plain.items():
        torch.testing.assert_close(accumulated[key], value, rtol=0, atol=1e-9, msg=key)
    assert output.count("a batch of 97 does not fit") == 2     # each stage says it once
    assert not (tmp_path / "many" / "indivisible").exists()


if __name__ == "__main__":
    five_steps(*sys.argv[1:])
