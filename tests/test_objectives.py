"""The objectives of fine-tuning against plain loops, closed forms for linear networks, and their runs."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from test_training import Killed, stop_at
from torch import nn

import finetune
from finetune import (
    ascend,
    classification_loss,
    consistency_loss,
    cross_entropy,
    log_smoothed,
    macer_loss,
    smoothmix_loss,
    strength_of,
)
from model import read_checkpoint

SHAPE = (1, 4, 4)
AT_ONCE = dict.fromkeys(("smoothadv", "macer", "smoothmix"), ["--objective-warmup", "0"])


def linear(classes, dtype=torch.float64):
    """(W (classes, 16), logits_of) of a linear network on images (B, 1, 4, 4)."""
    weight = torch.randn(classes, 16, dtype=dtype)
    return weight, lambda x, noise: (x + noise).flatten(2) @ weight.T


def draw(batch, copies, sigma=0.25, dtype=torch.float64):
    """Images far from 0 and 1, and noise."""
    x = 0.4 + 0.2 * torch.rand(batch, *SHAPE, dtype=dtype)
    return x, sigma * torch.randn(copies, batch, *SHAPE, dtype=dtype)


def one_hot(labels, classes, dtype=torch.float64):
    return F.one_hot(torch.tensor(labels), classes).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Each function
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_copies_and_images(smoothing):
    logits, targets = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64).softmax(-1)
    total = 0.0
    for copy_of_batch in logits:
        for row, target in zip(copy_of_batch, targets, strict=True):
            smoothed = (1 - smoothing) * target + smoothing / 5
            total -= sum(share * math.log(p) for share, p in zip(smoothed.tolist(), row.softmax(-1).tolist(), strict=True))
    assert cross_entropy(logits, targets, smoothing).item() == pytest.approx(total / 12, rel=1e-12)


def test_smoothed_scores_are_a_mean_of_probabilities_not_of_their_logarithms():
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]], dtype=torch.float64)                          # they cancel
    torch.testing.assert_close(log_smoothed(logits).exp(), torch.full((1, 2), 0.5, dtype=torch.float64))
    assert logits.log_softmax(-1).mean(0).exp().sum() < 0.3


def test_an_attack_on_two_classes_of_a_linear_network_goes_straight_to_the_plane():
    weight, logits_of = linear(2)
    x, noise = draw(3, copies=4)
    labels = [0, 1, 0]
    away = torch.stack([weight[1 - y] - weight[y] for y in labels]).view(3, *SHAPE)
    away = away / away.flatten(1).norm(dim=1)[:, None, None, None]
    for steps in (1, 4):
        adversarial = ascend(logits_of, x, one_hot(labels, 2), noise, 2 * 0.1 / steps, steps, eps=0.1)
        torch.testing.assert_close(adversarial, x + 0.1 * away)                                       # SmoothAdv
        adversarial = ascend(logits_of, x, one_hot(labels, 2), noise, 0.05, steps)
        torch.testing.assert_close(adversarial, x + steps * 0.05 * away)                              # SmoothMix
    assert not adversarial.requires_grad


def test_an_attack_is_the_plain_loop_over_images_and_copies():
    weight, _ = linear(5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, noise = draw(3, copies=4)
    x[0] = torch.where(x[0] > 0.5, 0.99, 0.01)                                                        # will be clipped
    labels, eps, steps, step = [4, 1, 2], 0.3, 5, 0.12

    def logits_of(images, noise):
        return torch.stack([network(images + one) for one in noise])

    expected = []
    for i, label in enumerate(labels):
        now = x[i].clone()
        for _ in range(steps):
            now = now.detach().requires_grad_()
            shares = [network((now + noise[j, i])[None]).softmax(-1)[0, label] for j in range(4)]
            (-torch.log(sum(shares) / 4)).backward()
            way = np.clip((now + step * now.grad / now.grad.norm()).detach().numpy(), 0, 1) - x[i].numpy()
            way = way * min(1.0, eps / np.linalg.norm(way))
            now = x[i] + torch.from_numpy(way)
        expected.append(now)
    found = ascend(logits_of, x, one_hot(labels, 5), noise, step, steps, eps)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert ascend(logits_of, x, one_hot(labels, 5), noise, step, steps).max() == 1                    # clipped


def test_an_attack_without_a_gradient_takes_the_noise_and_without_noise_stays():
    x, noise = draw(2, copies=3)
    constant = lambda images, noise: (images[None] * 0 + 0 * noise).flatten(2)[..., :3]
    found = ascend(constant, x, one_hot([0, 2], 3), noise, 0.1, 1)
    torch.testing.assert_close(found, x + 0.1 * noise[0] / noise[0].flatten(1).norm(dim=1)[:, None, None, None])
    assert torch.equal(ascend(constant, x, one_hot([0, 2], 3), 0 * noise, 0.1, 2, eps=0.1), x)


@pytest.mark.parametrize("lam, beta, gamma", [(0.0, 16.0, 8.0), (12.0, 1.0, 8.0), (4.0, 16.0, 8.0), (4.0, 4.0, 0.5)])
def test_macer_is_the_plain_loop(lam, beta, gamma):
    logits, sigma, labels = torch.randn(6, 5, 4, dtype=torch.float64), 0.5, [0, 1, 2, 3, 0]
    total = 0.0
    for i, label in enumerate(labels):
        total -= math.log(logits[:, i].softmax(-1).mean(0)[label])
        z = (beta * logits[:, i]).softmax(-1).mean(0).numpy()
        if z.argmax() == label:
            xi = norm.ppf(z[label]) - norm.ppf(np.delete(z, label).max())
            total += lam * sigma / 2 * max(gamma - xi, 0)
    found = macer_loss(logits, one_hot(labels, 4), sigma, lam, beta, gamma)
    assert found.item() == pytest.approx(total / 5, rel=1e-6)


def test_macers_radius_of_a_linear_network_is_the_distance_to_the_plane():
    weight, logits_of = linear(2)
    x, noise = draw(2, copies=40_000, sigma=0.5)
    difference = weight[0] - weight[1]
    distance = (x.flatten(1) @ difference).abs() / difference.norm()
    labels = (x.flatten(1) @ difference < 0).long().tolist()
    logits = logits_of(x, noise)
    with_hinge, without = (macer_loss(logits, one_hot(labels, 2), 0.5, lam, 1e4, 8.0) for lam in (1.0, 0.0))
    expected = (0.5 / 2 * 8.0 - distance).mean()
    assert distance.min() > 0.05 and distance.max() < 1.5
    assert (with_hinge - without).item() == pytest.approx(expected.item(), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_macer_has_no_nan_where_scores_are_0_and_1(dtype):
    logits = torch.tensor([[[50.0, -50, -50], [-50, 50, -50], [0, 0, 0]]] * 2, dtype=dtype, requires_grad=True)
    loss = macer_loss(logits, one_hot([0, 0, 0], 3, dtype), 0.5, 12.0, 16.0, 8.0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert logits.grad[:, 0].abs().max() < 1e-6                                                       # beyond the margin


def test_smoothmix_is_the_plain_loop_and_reaches_the_clean_scores():
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mixed = torch.randn(3, 4, 5, dtype=torch.float64)
    mu, labels = torch.tensor([0.0, 0.1, 0.3, 0.5], dtype=torch.float64), log_smoothed(logits).argmax(-1).tolist()
    labels[2] = (labels[2] + 1) % 5                                                                   # F is wrong on one
    total = 0.0
    for i in range(4):
        scores = logits[:, i].softmax(-1).mean(0)
        target = (1 - mu[i]) * scores + mu[i] / 5
        if scores.argmax() == labels[i]:
            total += sum(F.kl_div(mixed[j, i].log_softmax(-1), target, reduction="sum") for j in range(3)) / 3
    found = smoothmix_loss(logits, mixed, one_hot(labels, 5), mu, 2.0)
    torch.testing.assert_close(found, 2.0 * total / 4, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (found, 2.0 * total / 4)]
    torch.testing.assert_close(*gradients)
    assert gradients[0][:, 0].abs().max() > 0 and gradients[0][:, 2].abs().max() == 0


def test_smoothmix_at_the_clean_image_with_one_copy_and_no_mixing_is_nothing():
    logits = torch.randn(1, 4, 5, dtype=torch.float64)
    loss = smoothmix_loss(logits, logits, log_smoothed(logits).exp().round(), torch.zeros(4, dtype=torch.float64), 5.0)
    assert abs(loss.item()) < 1e-12


def test_strength_rises_over_ten_epochs_and_macer_waits():
    assert [strength_of("smoothadv", epoch, 10) for epoch in (0, 0.99, 1, 4.5, 9, 30)] == [0.1, 0.1, 0.2, 0.5, 1, 1]
    assert [strength_of("smoothmix", epoch, 0) for epoch in (0, 5)] == [1, 1]
    assert [strength_of("macer", epoch, 20) for epoch in (0, 19.9, 20, 50)] == [0, 0, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# The objective of a step
# ---------------------------------------------------------------------------------------------------------------------


def settings(objective, *flags, sigma=0.25):
    return finetune.parse(["--init", "scratch", "--sigma", str(sigma), "--objective", objective, "--dtype", "fp32", *flags])


class Watched(nn.Module):
    """A linear network that keeps what it was shown, and how it was set then."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 10)
        self.seen = []

    def forward(self, images):
        self.seen.append((images.detach(), self.training, self.linear.weight.requires_grad))
        return self.linear(images.flatten(1))


@pytest.mark.parametrize("objective, copies, passes", [
    ("gaussian", 1, 0), ("consistency", 2, 0), ("macer", 8, 0), ("smoothadv", 2, 4), ("smoothmix", 2, 4)])
def test_attack_and_loss_see_the_same_noise_and_the_weights_learn_from_the_loss_alone(objective, copies, passes):
    network, args = Watched(), settings(objective, *AT_ONCE.get(objective, []))
    x, _ = draw(6, 1, dtype=torch.float32)
    targets = one_hot([0, 1, 2, 3, 4, 5], 10, torch.float32)
    classification_loss(network, x, targets, args, 0).backward()
    *attacks, (last, training, learning) = network.seen
    assert training and learning and network.training and network.linear.weight.grad.abs().sum() > 0
    assert len(attacks) == passes and not any(training or learning for _, training, learning in attacks)
    assert len(last) == 6 * copies * (2 if objective == "smoothmix" else 1)
    if objective in ("smoothadv", "smoothmix"):
        noise = attacks[0][0].view(copies, 6, *SHAPE) - x                                             # the first sees x
        assert noise.std() == pytest.approx(0.25, rel=0.1)
        torch.testing.assert_close(attacks[0][0].view(copies, 6, *SHAPE), noise + x)
        parts = last.view(copies, -1, *SHAPE).split(6, dim=1)
        way = parts[-1] - noise - x                                                                   # m B C H W
        torch.testing.assert_close(way, way[:1].expand_as(way), rtol=0, atol=1e-6)                    # one for all copies
        length = way[0].flatten(1).norm(dim=1)
        assert (length > 0.001).all() and (length < (args.attack_eps or 4 * args.attack_step / 2) + 1e-6).all()
        if objective == "smoothmix":
            torch.testing.assert_close(parts[0], x + noise)


def test_smoothadv_in_a_ball_of_no_size_is_gaussian_to_the_bit():
    x, _ = draw(6, 1, dtype=torch.float32)
    targets, network = one_hot([0, 1, 2, 3, 4, 5], 10, torch.float32), Watched()
    losses = []
    for objective in ("gaussian", "smoothadv"):
        args = settings(objective, "--copies", "3")
        args.attack_eps = 0.0
        torch.manual_seed(5)
        losses.append(classification_loss(network, x, targets, args, 50))
    assert torch.equal(*losses)


def test_the_objectives_combine_with_the_consistency_term():
    x, _ = draw(6, 1, dtype=torch.float32)
    targets, network = one_hot([0, 1, 2, 3, 4, 5], 10, torch.float32), Watched()
    for objective in ("smoothadv", "smoothmix", "macer", "gaussian"):
        found = []
        for lam in ("0", "3"):
            torch.manual_seed(5)
            args = settings(objective, "--consistency", lam, "--copies", "2", *AT_ONCE.get(objective, []))
            found.append(classification_loss(network, x, targets, args, 50))
        logits = network(network.seen[-1][0]).view(2, -1, 10)[:, :6]
        term = consistency_loss(logits, 3.0, 0.5)
        torch.testing.assert_close(found[1] - found[0], term, rtol=1e-4, atol=1e-6)
        assert term > 0.01


def test_each_sigma_has_the_papers_values():
    assert (settings("smoothadv", "--recipe", "cifar10", sigma=0.5).copies,
            settings("smoothadv", "--recipe", "cifar10", sigma=1).attack_eps) == (8, 2.0)
    assert settings("macer", "--recipe", "cifar10", sigma=0.5).macer_lambda == 4.0
    assert settings("macer", "--recipe", "cifar10").objective_warmup == pytest.approx(50 / 3)
    assert settings("smoothadv", "--recipe", "cifar10").objective_warmup == 10
    assert settings("smoothadv", "--recipe", "cifar10", "--epochs", "20").objective_warmup == 4
    assert settings("smoothmix", "--recipe", "cifar10", sigma=1).attack_step == 2.0
    assert settings("smoothmix", "--recipe", "imagenet-base").mixup == 0
    assert settings("gaussian").copies == 1 and settings("gaussian").consistency == 0
    default = finetune.parse(["--init", "scratch", "--sigma", "0.25"])
    assert (default.objective, default.copies, default.consistency) == ("consistency", 2, 2.0)
    clean = finetune.parse(["--init", "scratch", "--sigma", "0"])
    assert (clean.objective, clean.copies) == ("gaussian", 1)


@pytest.mark.parametrize("objective, flags, said", [
    ("gaussian", "--attack-eps 1", "--attack-eps means nothing to --objective gaussian"),
    ("smoothadv", "--attack-step 1", "--attack-step means nothing"),
    ("macer", "--attack-steps 3", "--attack-steps means nothing"),
    ("macer", "--label-smoothing 0.1", "macer has no --label-smoothing"),
    ("consistency", "--copies 1", "needs --copies 2 or more"),
    ("consistency", "--consistency 0", "it is gaussian"),
    ("smoothadv", "--epochs 3 --objective-warmup 3", "--objective-warmup 3 is not over"),
    ("macer", "--objective-warmup 60", "--objective-warmup 60 is not over")])
def test_flags_that_an_objective_has_no_use_for_are_refused(objective, flags, said):
    with pytest.raises(ValueError, match=said):
        settings(objective, *flags.split())


def test_a_default_that_is_typed_out_changes_nothing():
    for recipe in finetune.RECIPES:
        if finetune.RECIPES[recipe]["consistency"]:
            default = finetune.parse(["--init", "scratch", "--sigma", "0.5", "--recipe", recipe])
            assert settings("consistency", "--recipe", recipe, "--dtype", "auto", sigma=0.5) == default


def test_a_direction_has_length_one_however_small_the_gradient():
    tiny = torch.full((1, 1, 4, 4), 1e-30)                                                            # its square is 0
    torch.testing.assert_close(finetune.directions(tiny, 0 * tiny), torch.full((1, 1, 4, 4), 0.25))


def test_runs_that_know_no_objectives_go_on(monkeypatch, tmp_path, capsys, folder8):
    """What an earlier version finished is done, and not other settings."""
    flags = ["--init", "scratch", "--sigma", "0.1", "--dataset", "folder", "--data-path", str(folder8), "--holdout", "0.2",
             "--batch", "32", "--epochs", "1", "--warmup-epochs", "0", "--device", "cpu", "--out", str(tmp_path)]
    finetune.main(flags)
    file = tmp_path / "finetune_sigma_0.1.json"
    new = {"objective", "copies", *(flag for flags in finetune.ITS_FLAGS.values() for flag in flags)}
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in new}))
    capsys.readouterr()
    finetune.main(flags)
    assert "is done" in capsys.readouterr().out


@pytest.mark.parametrize("objective", ["smoothadv", "macer", "smoothmix"])
def test_mixed_classes_are_refused_where_an_objective_needs_one(objective):
    with pytest.raises(ValueError, match="images of one class"):
        settings(objective, "--mixup", "0.8")


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gaussian", "smoothadv", "macer", "smoothmix"])
def test_a_run_learns_and_one_that_was_killed_ends_with_the_same_bits(monkeypatch, tmp_path, folder8, objective):
    flags = ["--init", "scratch", "--sigma", "0.1", "--dataset", "folder", "--data-path", str(folder8), "--holdout", "0.2",
             "--batch", "32", "--device-batch", "16", "--epochs", "6", "--warmup-epochs", "1", "--save-every", "4",
             "--vote-every", "6", "--log-every", "3", "--drop-path", "0.1", "--device", "cpu", "--objective", objective,
             *(["--objective-warmup", "2"] if objective in AT_ONCE else [])]
    finetune.main([*flags, "--out", str(tmp_path / "undisturbed")])

    with monkeypatch.context() as patch:
        stop_at(patch, finetune, 10, "kill")
        with pytest.raises(Killed):
            finetune.main([*flags, "--out", str(tmp_path / "killed")])
    assert (tmp_path / "killed" / "finetune_sigma_0.1.last.pt").exists()
    finetune.main([*flags, "--out", str(tmp_path / "killed")])
    one, other = (read_checkpoint(tmp_path / name / "finetune_sigma_0.1.pt") for name in ("undisturbed", "killed"))
    assert one["settings"]["objective"] == (None if objective == "gaussian" else objective)           # as before there were others
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())


@pytest.mark.parametrize("objective", ["smoothadv", "smoothmix"])
def test_attacks_make_a_linear_network_more_robust_than_noise_alone(objective):
    """Two classes that differ much in one noisy pixel and a little, but surely, in fifteen others."""
    torch.manual_seed(0)
    labels = torch.randint(2, (512,))
    signs = (2 * labels - 1).float()[:, None]
    pixels = 0.5 + 0.05 * signs.expand(-1, 16) + 0.02 * torch.randn(512, 16)
    x, targets = pixels.clamp(0, 1).view(512, *SHAPE), F.one_hot(labels, 10).float()
    found = {}
    start = Watched()
    for name in ("gaussian", objective):
        network, args = copy.deepcopy(start), settings(name, *AT_ONCE.get(name, []), "--label-smoothing", "0", sigma=0.1)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        torch.manual_seed(1)
        for _ in range(30):
            classification_loss(network, x, targets, args, 50).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = network(x)
        wrong = logits.gather(1, 1 - labels[:, None])[:, 0]
        weights = network.linear.weight
        found[name] = ((logits.gather(1, labels[:, None])[:, 0] - wrong) / (weights[0] - weights[1]).norm()).mean().item()
    assert found[objective] > found["gaussian"]
