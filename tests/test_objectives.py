"""The objectives of fine-tuning: functions against plain loops and closed forms, then as plugs.

What an objective may count on, its hyperparameters on the command line, files of users, and runs.
"""

import copy
import hashlib
import json
import math
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import norm
from test_training import run_until, same_weights
from torch import nn

import finetune
from extras.macer import macer, macer_loss
from extras.smoothadv import ascend, directions, smoothadv
from extras.smoothmix import smoothmix, smoothmix_loss
from finetune import consistency, cross_entropy, gaussian, log_smoothed, noisy_logits

ROOT = Path(finetune.__file__).parent
RIVALS = {"smoothadv": smoothadv, "macer": macer, "smoothmix": smoothmix}
OBJECTIVES = {"gaussian": gaussian, "consistency": consistency} | RIVALS
SHAPE = (1, 4, 4)


def place(objective):
    """What --objective has to be."""
    return f"{ROOT}/extras/{objective}.py:{objective}" if objective in RIVALS else objective


class Function:
    """f of a function logits_of(x, noise), which is as good frozen."""

    def __init__(self, logits_of):
        self.frozen = self.logits_of = logits_of

    def __call__(self, x, noise):
        return self.logits_of(x, noise)


def linear(classes):
    """(W (classes, 16), f) of a linear network on images (B, 1, 4, 4)."""
    weight = torch.randn(classes, 16, dtype=torch.float64)
    return weight, Function(lambda x, noise: (x + noise).flatten(2) @ weight.T)


def draw(batch, copies, sigma=0.25, dtype=torch.float64):
    """Images far from 0 and 1, and noise."""
    x = 0.4 + 0.2 * torch.rand(batch, *SHAPE, dtype=dtype)
    return x, sigma * torch.randn(copies, batch, *SHAPE, dtype=dtype)


def one_hot(labels, classes, dtype=torch.float64):
    return F.one_hot(torch.tensor(labels), classes).to(dtype)


# --------------------------------------------------------------------------------------------------
# Each function
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_the_mean_over_copies_and_images(smoothing):
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    targets = torch.rand(4, 5, dtype=torch.float64).softmax(-1)
    total = 0.0
    for copy_of_batch in logits:
        for row, target in zip(copy_of_batch, targets, strict=True):
            smoothed = (1 - smoothing) * target + smoothing / 5
            for share, p in zip(smoothed.tolist(), row.softmax(-1).tolist(), strict=True):
                total -= share * math.log(p)
    found = cross_entropy(logits, targets, smoothing).item()
    assert found == pytest.approx(total / 12, rel=1e-12)


def test_smoothed_scores_are_a_mean_of_probabilities_not_of_their_logarithms():
    logits = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]], dtype=torch.float64)           # they cancel
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(log_smoothed(logits).exp(), half)
    assert logits.log_softmax(-1).mean(0).exp().sum() < 0.3


def test_an_attack_on_two_classes_of_a_linear_network_goes_straight_to_the_plane():
    weight, f = linear(2)
    x, noise = draw(3, copies=4)
    labels = [0, 1, 0]
    away = torch.stack([weight[1 - y] - weight[y] for y in labels]).view(3, *SHAPE)
    away = away / away.flatten(1).norm(dim=1)[:, None, None, None]
    targets = one_hot(labels, 2)
    for steps in (1, 4):
        inside_eps = ascend(f, x, targets, noise, 2 * 0.1 / steps, steps, eps=0.1)     # SmoothAdv
        torch.testing.assert_close(inside_eps, x + 0.1 * away)
        free = ascend(f, x, targets, noise, 0.05, steps)                               # SmoothMix
        torch.testing.assert_close(free, x + steps * 0.05 * away)
    assert not free.requires_grad


def test_an_attack_is_the_plain_loop_over_images_and_copies():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    x, noise = draw(3, copies=4)
    x[0] = torch.where(x[0] > 0.5, 0.99, 0.01)                 # will be clipped
    labels, eps, steps, step = [4, 1, 2], 0.3, 5, 0.12
    f = Function(lambda images, noise: torch.stack([network(images + one) for one in noise]))

    expected = []
    for i, label in enumerate(labels):
        now = x[i].clone()
        for _ in range(steps):
            now = now.detach().requires_grad_()
            shares = [network((now + e[i])[None]).softmax(-1)[0, label] for e in noise]
            (-torch.log(sum(shares) / 4)).backward()
            there = (now + step * now.grad / now.grad.norm()).detach().numpy()
            way = np.clip(there, 0, 1) - x[i].numpy()
            way = way * min(1.0, eps / np.linalg.norm(way))
            now = x[i] + torch.from_numpy(way)
        expected.append(now)
    found = ascend(f, x, one_hot(labels, 5), noise, step, steps, eps)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-12)
    assert ascend(f, x, one_hot(labels, 5), noise, step, steps).max() == 1     # clipped


def test_an_attack_without_a_gradient_takes_the_noise_and_without_noise_stays():
    x, noise = draw(2, copies=3)
    f = Function(lambda images, noise: (images[None] * 0 + 0 * noise).flatten(2)[..., :3])
    targets = one_hot([0, 2], 3)
    direction = noise[0] / noise[0].flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(ascend(f, x, targets, noise, 0.1, 1), x + 0.1 * direction)
    assert torch.equal(ascend(f, x, targets, 0 * noise, 0.1, 2, eps=0.1), x)


def test_a_direction_has_length_one_however_small_the_gradient():
    tiny = torch.full((1, 1, 4, 4), 1e-30)                     # its square is 0
    torch.testing.assert_close(directions(tiny, 0 * tiny), torch.full((1, 1, 4, 4), 0.25))


@pytest.mark.parametrize("lam, beta, gamma", [
    (0.0, 16.0, 8.0), (12.0, 1.0, 8.0), (4.0, 16.0, 8.0), (4.0, 4.0, 0.5)])
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
    weight, f = linear(2)
    x, noise = draw(2, copies=40_000, sigma=0.5)
    difference = weight[0] - weight[1]
    height = x.flatten(1) @ difference
    distance = height.abs() / difference.norm()
    targets = one_hot((height < 0).long().tolist(), 2)
    losses = [macer_loss(f(x, noise), targets, 0.5, lam, 1e4, 8.0) for lam in (1.0, 0.0)]
    expected = (0.5 / 2 * 8.0 - distance).mean()
    assert distance.min() > 0.05 and distance.max() < 1.5
    assert (losses[0] - losses[1]).item() == pytest.approx(expected.item(), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_macer_has_no_nan_where_scores_are_0_and_1(dtype):
    rows = [[50.0, -50, -50], [-50, 50, -50], [0, 0, 0]]
    logits = torch.tensor([rows] * 2, dtype=dtype, requires_grad=True)
    loss = macer_loss(logits, one_hot([0, 0, 0], 3, dtype), 0.5, 12.0, 16.0, 8.0)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert logits.grad[:, 0].abs().max() < 1e-6                # beyond the margin


def test_smoothmix_is_the_plain_loop_and_reaches_the_clean_scores():
    logits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mixed = torch.randn(3, 4, 5, dtype=torch.float64)
    mu = torch.tensor([0.0, 0.1, 0.3, 0.5], dtype=torch.float64)
    labels = log_smoothed(logits).argmax(-1).tolist()
    labels[2] = (labels[2] + 1) % 5                            # F is wrong on one
    total = 0.0
    for i in range(4):
        scores = logits[:, i].softmax(-1).mean(0)
        target = (1 - mu[i]) * scores + mu[i] / 5
        if scores.argmax() == labels[i]:
            each = (F.kl_div(one[i].log_softmax(-1), target, reduction="sum") for one in mixed)
            total += sum(each) / 3
    both = smoothmix_loss(logits, mixed, one_hot(labels, 5), mu, 2.0), 2.0 * total / 4
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in both]
    torch.testing.assert_close(*gradients)
    assert gradients[0][:, 0].abs().max() > 0 and gradients[0][:, 2].abs().max() == 0


def test_smoothmix_at_the_clean_image_with_one_copy_and_no_mixing_is_nothing():
    logits = torch.randn(1, 4, 5, dtype=torch.float64)
    targets = log_smoothed(logits).exp().round()
    loss = smoothmix_loss(logits, logits, targets, torch.zeros(4, dtype=torch.float64), 5.0)
    assert abs(loss.item()) < 1e-12


# --------------------------------------------------------------------------------------------------
# What an objective is given: f, and f.frozen
# --------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A linear network that keeps what it was shown, and how it was set then."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 10)
        self.seen = []

    def forward(self, images):
        self.seen.append((images.detach(), self.training, self.linear.weight.requires_grad))
        return self.linear(images.flatten(1))


class Distributed(nn.Module):
    """As DDP: the network is its `module`, and it must be called once a step."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, images):
        self.calls += 1
        return self.module(images)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("distributed", [True, False])
def test_frozen_gives_gradients_to_images_alone_and_leaves_the_network_as_it_was(
    training, distributed
):
    network = Watched()
    network.linear.bias.requires_grad_(False)                  # as a probe's encoder
    network.train(training)
    outer = Distributed(network).train(training) if distributed else network
    f = noisy_logits(outer, "fp32")
    x, noise = draw(6, 3, dtype=torch.float32)
    x.requires_grad_()
    for _ in range(2):
        logits = f.frozen(x, noise)
        assert network.training == training
        assert network.linear.weight.requires_grad and not network.linear.bias.requires_grad
    logits.sum().backward()
    assert x.grad.abs().sum() > 0 and network.linear.weight.grad is None
    assert [how for _, *how in network.seen] == [[False, False]] * 2
    assert not distributed or outer.calls == 0

    torch.testing.assert_close(f(x, noise), logits, rtol=0, atol=1e-6)
    assert logits.shape == (3, 6, 10) and network.seen[-1][1:] == (training, True)
    f(x, noise).sum().backward()
    assert network.linear.weight.grad.abs().sum() > 0


def step_of(objective, network, targets, sigma=0.25, epoch=50.0, epochs=60, **values):
    """(loss, x) of an objective with values of its own, right after a seed, at the same x."""
    torch.manual_seed(4)
    x, _ = draw(6, 1, dtype=torch.float32)
    torch.manual_seed(5)
    given = finetune.hyperparameters(OBJECTIVES[objective], sigma, []) | values
    f = noisy_logits(network, "fp32")
    return OBJECTIVES[objective](f, x, targets, sigma, epoch, epochs, **given), x


SIX = one_hot([0, 1, 2, 3, 4, 5], 10, torch.float32)


@pytest.mark.parametrize("objective, copies, passes, longest", [
    ("gaussian", 1, 0, None), ("consistency", 2, 0, None), ("macer", 16, 0, None),
    ("smoothadv", 4, 10, 255 / 256), ("smoothmix", 2, 4, 4 * 0.5)])
def test_attack_and_loss_see_the_noise_that_is_drawn_first_and_weights_learn_from_the_loss_alone(
    objective, copies, passes, longest
):
    network = Distributed(Watched())
    loss, x = step_of(objective, network, SIX)
    loss.backward()
    torch.manual_seed(5)
    noise = 0.25 * torch.randn(copies, *x.shape)
    watched = network.module
    *attacks, (last, training, learning) = watched.seen
    assert training and learning and watched.linear.weight.grad.abs().sum() > 0
    assert network.calls == 1 and len(attacks) == passes
    assert not any(training or learning for _, training, learning in attacks)
    parts = last.view(copies, -1, *SHAPE).split(6, dim=1)
    if not passes:
        torch.testing.assert_close(parts[0], x + noise)
        return
    torch.testing.assert_close(attacks[0][0].view(copies, 6, *SHAPE), x + noise)
    way = parts[-1] - noise - x                                                        # m B C H W
    torch.testing.assert_close(way, way[:1].expand_as(way), rtol=0, atol=1e-6)         # one for all
    length = way[0].flatten(1).norm(dim=1)
    assert (length > 0.001).all() and (length < longest + 1e-6).all()
    if objective == "smoothmix":
        torch.testing.assert_close(parts[0], x + noise)


def test_smoothadv_in_a_ball_of_no_size_is_gaussian_to_the_bit():
    network = Watched()
    plain, _ = step_of("gaussian", network, SIX, copies=3)
    assert torch.equal(step_of("smoothadv", network, SIX, copies=3, eps=0.0)[0], plain)


def test_macer_without_its_hinge_and_consistency_without_its_terms_are_cross_entropy():
    network = Watched()
    plain, _ = step_of("gaussian", network, SIX, copies=2)
    assert torch.equal(step_of("consistency", network, SIX, lam=0.0, eta=0.0)[0], plain)
    plain, _ = step_of("gaussian", network, SIX, copies=1, label_smoothing=0.0)
    waiting, _ = step_of("macer", network, SIX, copies=1, epoch=19.9)
    torch.testing.assert_close(waiting, plain)                 # it waits a third of 60 epochs
    assert (step_of("macer", network, SIX, copies=1, epoch=20.0)[0] - waiting).abs() > 0.01


def test_the_strength_of_attacks_rises_over_ten_epochs_but_at_most_a_fifth_of_all():
    """smoothadv's eps and smoothmix's eta, in steps of an epoch."""
    network = Watched()

    def strength(objective, epoch, epochs, **values):
        network.seen.clear()
        loss, x = step_of(objective, network, SIX, epoch=epoch, epochs=epochs, **values)
        if objective == "smoothmix":
            none, _ = step_of(objective, network, SIX, eta=0.0)
            whole, _ = step_of(objective, network, SIX, warmup=0)
            return ((loss - none) / (whole - none)).item()
        torch.manual_seed(5)
        noise = 0.25 * torch.randn(2, *x.shape)
        way = network.seen[-1][0].view(2, 6, *SHAPE)[0] - noise[0] - x
        return float(way.flatten(1).norm(dim=1).max()) / 0.1

    for objective, values in (("smoothadv", dict(copies=2, eps=0.1)), ("smoothmix", {})):
        for epoch, epochs, warmup, expected in (
            (0, 60, 10, 0.1), (0.99, 60, 10, 0.1), (1, 60, 10, 0.2), (4.5, 60, 10, 0.5),
            (9, 60, 10, 1), (30, 60, 10, 1), (0, 20, 10, 0.25), (3.5, 20, 10, 1), (0, 60, 0, 1),
        ):
            found = strength(objective, epoch, epochs, warmup=warmup, **values)
            assert found == pytest.approx(expected, rel=1e-3), (objective, epoch, epochs, warmup)


@pytest.mark.parametrize("objective", RIVALS)
def test_mixed_classes_are_refused_where_an_objective_needs_one(objective):
    with pytest.raises(ValueError, match="--mixup 0 --cutmix 0"):
        step_of(objective, Watched(), 0.9 * SIX + 0.01)


# --------------------------------------------------------------------------------------------------
# Hyperparameters: the papers' values, triples, --objective-args, what is recorded
# --------------------------------------------------------------------------------------------------


def settings(*flags, sigma=0.25):
    return finetune.parse(["--init", "scratch", "--sigma", str(sigma), *flags])


def values(objective, *words, sigma=0.25, recipe="cifar10"):
    """The hyperparameters of a run."""
    flags = ["--recipe", recipe, "--objective", place(objective)]
    flags += ["--objective-args", *words] if words else []
    return settings(*flags, sigma=sigma).objective_args


SMOOTH = dict(warmup=10, label_smoothing=0.1)


@pytest.mark.parametrize("objective, sigma, expected", [
    ("gaussian", 0.25, dict(copies=1, label_smoothing=0.1)),
    ("consistency", 0.25, dict(copies=2, lam=5.0, eta=0.5, label_smoothing=0.1)),
    ("consistency", 1.0, dict(copies=2, lam=5.0, eta=0.1, label_smoothing=0.1)),
    ("smoothadv", 0.25, dict(copies=4, eps=255 / 256, steps=10, **SMOOTH)),
    ("smoothadv", 0.5, dict(copies=8, eps=1.0, steps=10, **SMOOTH)),
    ("smoothadv", 1.0, dict(copies=2, eps=2.0, steps=10, **SMOOTH)),
    ("macer", 0.25, dict(copies=16, lam=12.0, beta=16.0, gamma=8.0, wait=1 / 3)),
    ("macer", 0.5, dict(copies=16, lam=4.0, beta=16.0, gamma=8.0, wait=1 / 3)),
    ("macer", 1.0, dict(copies=16, lam=12.0, beta=16.0, gamma=8.0, wait=1 / 3)),
    ("smoothmix", 0.25, dict(copies=2, step=0.5, steps=4, eta=5.0, **SMOOTH)),
    ("smoothmix", 0.5, dict(copies=2, step=1.0, steps=4, eta=5.0, **SMOOTH)),
    ("smoothmix", 1.0, dict(copies=2, step=2.0, steps=4, eta=5.0, **SMOOTH))])
def test_each_sigma_has_the_papers_values_on_cifar10(objective, sigma, expected):
    assert values(objective, sigma=sigma) == expected


@pytest.mark.parametrize("sigma, nearest", [
    (0.0, 0.25), (0.12, 0.25), (0.37, 0.25), (0.38, 0.5), (0.7, 0.5), (0.8, 1.0), (2.0, 1.0)])
def test_another_sigma_has_the_values_of_the_nearest(sigma, nearest):
    for objective in ("smoothadv", "consistency"):
        assert values(objective, sigma=sigma) == values(objective, sigma=nearest)


def test_objective_args_replace_single_values_and_a_recipes_are_for_its_own_objective():
    assert values("consistency", "eta=0.3") == dict(copies=2, lam=5.0, eta=0.3, label_smoothing=0.1)
    assert values("consistency", "eta=(1,2,3)", "lam=0", sigma=0.5)["eta"] == 2
    assert values("consistency", recipe="digits")["lam"] == 2.0
    assert values("macer") == values("macer", recipe="fashion")           # no lam=5.0 in it
    assert values("smoothadv", "copies=2", "eps=0.5")["eps"] == 0.5
    assert settings().objective == settings("--recipe", "imagenet-base").objective == "consistency"
    clean = settings(sigma=0)                                             # unless one is named
    assert (clean.objective, clean.objective_args["copies"]) == ("gaussian", 1)
    assert settings("--objective", "consistency", sigma=0).objective == "consistency"
    named = settings("--objective", "consistency", "--objective-args", "lam=2.0")
    assert named == settings()                                 # a default that is typed out


@pytest.mark.parametrize("words, said", [
    ("gamma=1", "gamma=1: there are copies, lam, eta, label_smoothing"),
    ("sigma=1", "sigma=1: there are copies"),                             # no hyperparameter
    ("lam", "lam: give NAME=VALUE"), ("lam=", "lam=: give NAME=VALUE"),
    ("lam=two", "lam=two: give NAME=VALUE"), ("lam=1+", "give NAME=VALUE"),
    ("lam=__import__('os')", "give NAME=VALUE")])
def test_objective_args_that_mean_nothing_are_one_line(words, said, capsys, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--init", "scratch", "--sigma", "0.25", "--objective-args", words,
                       "--out", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1 and not out.exists()


def test_the_table_of_other_data_sets_in_a_docstring_names_hyperparameters():
    for name, objective in RIVALS.items():
        text = Path(ROOT, "extras", f"{name}.py").read_text().split('"""')[1]
        table = text.partition("On other data sets")[2]
        words = [word for line in table.splitlines() for word in line.split() if "=" in word]
        assert words, name
        for word in words:
            finetune.hyperparameters(objective, 0.5, [word.rstrip(",")])


# --------------------------------------------------------------------------------------------------
# Files of users
# --------------------------------------------------------------------------------------------------

FLAGS = ["--init", "scratch", "--sigma", "0.1", "--dataset", "folder", "--model", "vit_digits",
         "--normalisation", "digits", "--holdout", "0.2", "--batch", "32", "--device-batch", "16",
         "--device", "cpu"]
MINE = """
import torch
from finetune import cross_entropy, log_smoothed
from extras.smoothadv import ascend
from beside import HALF


def mine(f, x, targets, sigma, epoch, epochs, copies=(1, 2, 3), weight=1.0, name="a"):
    noise = sigma * torch.randn(copies, *x.shape, device=x.device)
    SEEN.append((x.shape, targets.sum(1).tolist(), sigma, epoch, epochs, copies, weight, name))
    return HALF * cross_entropy(f(x, noise), targets)


SEEN = []
"""


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    """A folder of mine.py, which imports from finetune, from extras and from a file beside it."""
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "beside.py").write_text("HALF = 0.5")
    monkeypatch.syspath_prepend(str(tmp_path))                 # taken away again, with what follows
    return tmp_path


def test_an_objective_of_ones_own_is_run_with_its_values_and_recorded(users_folder, folder8):
    file = users_folder / "mine.py"
    flags = [*FLAGS, "--data-path", str(folder8), "--epochs", "2", "--warmup-epochs", "0", "--out",
             str(users_folder / "run"), "--objective", f"{file}:mine"]
    finetune.main([*flags, "--objective-args", "weight=3", "name='b'"])
    seen = sys.modules["mine"].SEEN
    assert len(seen) == 2 * 3 * 2                              # epochs, steps, micro-batches
    assert [epoch for _, _, _, epoch, *_ in seen[::2]] == pytest.approx([i / 3 for i in range(6)])
    for shape, shares, sigma, _, *rest in seen:
        assert shape == (16, 1, 8, 8) and shares == [1.0] * 16
        assert (sigma, *rest) == (0.1, 2, 1, 3, "b")
    recorded = json.loads((users_folder / "run" / "finetune_sigma_0.1.json").read_text())
    assert recorded["objective"] == f"{file}:mine"
    assert recorded["objective_args"] == dict(copies=1, weight=3, name="b")
    assert recorded["objective_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert settings().objective_sha256 == ""


def test_a_run_does_not_go_on_with_another_file(users_folder, folder8, capsys):
    file = users_folder / "mine.py"
    flags = [*FLAGS, "--data-path", str(folder8), "--epochs", "1", "--warmup-epochs", "0", "--out",
             str(users_folder / "run"), "--objective", f"{file}:mine"]
    finetune.main(flags)
    file.write_text(MINE.replace("HALF *", "2 * HALF *"))
    with pytest.raises(SystemExit) as stop:
        finetune.main(flags)
    assert stop.value.code == 2 and "objective_sha256" in capsys.readouterr().err


@pytest.mark.parametrize("raised", ["ValueError('a\\nb')", "KeyError('k')", "ZeroDivisionError()",
                                    "FileNotFoundError('gone')", "FloatingPointError('x')"])
@pytest.mark.parametrize("where", ["at its import", "in a step"])
def test_an_exception_inside_keeps_its_traceback_and_ends_with_a_line_of_ours(
    raised, where, tmp_path, folder8
):
    file = tmp_path / "broken.py"
    if where == "at its import":
        file.write_text(f"raise {raised}\n")
    else:
        head = "def loss(f, x, targets, sigma, epoch, epochs):\n    return inner()\n"
        file.write_text(f"{head}def inner():\n    raise {raised}\n")
    flags = [*FLAGS, "--data-path", str(folder8), "--epochs", "1", "--warmup-epochs", "0"]
    with pytest.raises(RuntimeError) as error:
        finetune.main([*flags, "--objective", f"{file}:loss", "--out", str(tmp_path / "run")])
    assert type(error.value.__cause__).__name__ == raised.partition("(")[0]
    lines = "".join(traceback.format_exception(error.value)).splitlines()
    assert any(f'"{file}"' in line for line in lines) and f"    raise {raised}" in lines
    assert lines[-1].startswith("RuntimeError: in ") and "broken.py" in lines[-1]
    assert "--objective" in lines[-1]


@pytest.mark.parametrize("objective, said", [
    ("mean", "--objective mean: there is no such FILE.py:NAME"),
    ("gone.py:loss", "gone.py:loss: there is no such"), ("mine.py:", "mine.py has no function ''"),
    ("mine.py:gone", "mine.py has no function 'gone'"), ("mine.py:SEEN", "no function 'SEEN'"),
    ("extras/smoothadv.py", "FILE.py:NAME")])
def test_what_is_no_objective_is_one_line(objective, said, users_folder, monkeypatch, capsys):
    monkeypatch.chdir(users_folder)
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--init", "scratch", "--sigma", "0.25", "--objective", objective])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1
    assert not (users_folder / "runs").exists()


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [
    "smoothmix", *(pytest.param(name, marks=pytest.mark.slow)
                   for name in ("gaussian", "smoothadv", "macer"))])
def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path, folder8, objective):
    flags = [*FLAGS, "--data-path", str(folder8), "--epochs", "3", "--warmup-epochs", "1",
             "--save-every", "2", "--drop-path", "0.1", "--objective", place(objective)]
    if objective in RIVALS:
        flags += ["--objective-args", "copies=2", *([] if objective == "macer" else ["steps=2"])]
    finetune.main([*flags, "--out", str(tmp_path / "undisturbed")])
    run_until(finetune, [*flags, "--out", str(tmp_path / "killed")], 7)            # of 9
    assert (tmp_path / "killed" / "finetune_sigma_0.1.last.pt").exists()
    finetune.main([*flags, "--out", str(tmp_path / "killed")])
    results = (tmp_path / name / "finetune_sigma_0.1.pt" for name in ("undisturbed", "killed"))
    assert same_weights(*results)


def test_mixed_images_end_a_run_of_a_rival_in_one_line(tmp_path, folder8, capsys):
    with pytest.raises(SystemExit) as stop:
        finetune.main([*FLAGS, "--data-path", str(folder8), "--mixup", "0.8", "--objective",
                       place("macer"), "--out", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("finetune.py: error: ")
    assert "--mixup 0 --cutmix 0" in error


@pytest.mark.parametrize("objective", ["smoothadv", "smoothmix"])
def test_attacks_make_a_linear_network_more_robust_than_noise_alone(objective):
    """Two classes that differ a little, but surely, in all of 16 noisy pixels."""
    torch.manual_seed(0)
    labels = torch.randint(2, (512,))
    signs = (2 * labels - 1).float()[:, None]
    pixels = 0.5 + 0.05 * signs.expand(-1, 16) + 0.02 * torch.randn(512, 16)
    x, targets = pixels.clamp(0, 1).view(512, *SHAPE), F.one_hot(labels, 10).float()
    attack = dict(smoothadv=dict(copies=2, eps=0.25, steps=4), smoothmix=dict(step=0.25))
    found, start = {}, Watched()
    for name in ("gaussian", objective):
        network = copy.deepcopy(start)
        f = noisy_logits(network, "fp32")
        how = finetune.hyperparameters(OBJECTIVES[name], 0.25, [])
        how |= dict(label_smoothing=0.0) | attack.get(name, {})
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        torch.manual_seed(1)
        for _ in range(30):
            OBJECTIVES[name](f, x, targets, 0.1, 50.0, 60, **how).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = network(x)
        right, wrong = (logits.gather(1, column[:, None])[:, 0] for column in (labels, 1 - labels))
        weights = network.linear.weight
        found[name] = ((right - wrong) / (weights[0] - weights[1]).norm()).mean().item()
    assert found[objective] > found["gaussian"]
