"""Classifiers of extras/: ensembles, the denoiser, one step of a diffusion.

Against the plain definition and against closed forms.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_certify_cli import NAME, by_hand, digit, network, perturbed, refused, rows

import certify as c
import extras.diffusion
import finetune
from certify import certify_all, count_under_noise, generator_for, main
from extras.denoise import denoise
from extras.diffusion import denoise_by_diffusion, diffusion_step
from extras.ensemble import Consensus
from model import DenoisingMaskedAutoencoder, build_dmae

INDICES = range(0, 360, 120)                                   # --skip 120: three images
SMALL = ["--sigma", "0.25", "--device", "cpu", "--skip", "120", "--n", "300", "--n0", "50",
         "--alpha", "0.05", "--radii", "0", "0.25", "--batch", "100"]
EXTRAS = Path(extras.diffusion.__file__).parent

# -- K-consensus -----------------------------------------------------------------------------------


class Linear:
    """Whole weights and images on a grid of sixteenths, in float64: exact sums, in any batch."""

    def __init__(self, seed, classes=4):
        common, own = (torch.Generator().manual_seed(number) for number in (100, seed))
        self.weight = torch.randint(-8, 9, (12, classes), generator=common).double()
        self.weight += torch.randint(-5, 6, (12, classes), generator=own)
        self.copies = 0
        self.shapes = set()

    def __call__(self, x):
        self.copies += len(x)
        self.shapes.add(len(x))
        return (x.double() * 16).round().flatten(1) @ self.weight


def plain(networks, k):
    """The definition, copy by copy, with all networks on all copies.

    f.disputed counts where the first k disagree.
    """
    def f(x):
        logits = [each(x) for each in networks]
        result = []
        for i in range(len(x)):
            answers = {int(one[i].argmax()) for one in logits[:k]}
            f.disputed += len(answers) > 1
            agreed = len(answers) == 1
            winner = answers.pop() if agreed else int(sum(one[i] for one in logits).argmax())
            result.append(torch.eye(logits[0].shape[1])[winner])
        return torch.stack(result)
    f.disputed = 0
    return f


def ensemble(size=4):
    return [Linear(seed) for seed in range(size)]


def total(networks):
    return lambda x: sum(each(x) for each in networks)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("copies", [1, 7, 24, 25, 26, 100, 400])
def test_a_consensus_answers_as_the_definition_and_asks_no_more_than_it_must(k, copies):
    random = torch.Generator().manual_seed(copies)
    x = torch.randint(0, 17, (copies, 3, 2, 2), generator=random) / 16
    networks, definition = ensemble(), plain(ensemble(), k)
    logits, expected = Consensus(networks, k)(x), definition(x)
    assert logits.shape == (copies, 4) and torch.equal(logits.argmax(1), expected.argmax(1))
    if copies >= 100:
        assert (0 < definition.disputed < copies) == (k > 1)
        same = torch.equal(expected.argmax(1), total(ensemble())(x).argmax(1))
        assert same or k < 4
        assert not same or k > 2                               # two can be outvoted: another f
    pack = min(25, copies)
    asked = math.ceil(definition.disputed / pack) * pack
    assert [each.copies for each in networks] == [copies] * k + [asked] * (4 - k)
    assert all(len(each.shapes) <= 1 for each in networks)


@pytest.mark.parametrize("k", [2, 4])
def test_counts_are_those_of_the_definition_whatever_the_batch(k):
    images = [(3 + i, torch.full((3, 2, 2), value)) for i, value in enumerate((0.2, 0.5, 0.8))]

    def counts(f):
        return [count_under_noise(f, [(i, x, generator_for(1, i, 1, x.device), 330)], 0.5)[0]
                .tolist() for i, x in images]

    definition = counts(plain(ensemble(), k))
    assert (definition == counts(total(ensemble()))) == (k == 4)
    for batch in (5, 20, 50, 100, 200, 500):
        networks = ensemble()
        trials = certify_all(Consensus(networks, k), images, 0.5, 30, 330, 0.05, 1, batch=batch)
        assert [found.tolist() for _, _, _, found, _, _ in trials] == definition
        assert all(len(each.shapes) == 1 for each in networks)


def test_where_the_first_agree_a_rounded_sum_cannot_make_a_tie_for_another_class():
    """Above 2^26 float32 knows multiples of 8 alone: both sums are 2^26 + 8; class 0 would win."""
    one, two = torch.tensor([[14.0, 14.5]]), torch.tensor([[2.0**26 - 8, 2.0**26 - 4]])
    assert one.argmax() == two.argmax() == 1 and (one + two).argmax() == 0
    networks = [lambda x: one.expand(len(x), 2), lambda x: two.expand(len(x), 2)]
    assert Consensus(networks, 2)(torch.zeros(3, 1, 1, 1)).argmax(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_logits_that_are_none_are_never_agreed_on(bad, where):
    broken = [torch.tensor([[0.0, 1.0, 0.5]]).repeat(10, 1) for _ in range(3)]
    broken[where][4, 1] = bad
    networks = [lambda x, one=one: one[:len(x)] for one in broken]
    votes = c.votes_of(Consensus(networks, 2)(torch.zeros(10, 1, 1, 1)))
    assert votes[:, -1].tolist() == [int(i == 4) for i in range(10)]


def test_it_serves_vision_transformers_as_the_definition_does(tiny_vit):
    networks = []
    for seed in range(3):
        vit, random = tiny_vit(), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in vit.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=random))
            vit.head.bias.sub_(vit(torch.rand(300, 1, 8, 8, generator=random)).mean(0))
        networks.append(vit)
    x, definition = torch.rand(300, 1, 8, 8), plain(networks, 2)
    with torch.inference_mode():
        assert torch.equal(Consensus(networks, 2)(x).argmax(1), definition(x).argmax(1))
    assert 0 < definition.disputed < 300


@pytest.fixture(scope="module")
def three(tiny_run, tmp_path_factory):
    """Three fine-tuned checkpoints that differ."""
    folder = tmp_path_factory.mktemp("three")
    first = str(tiny_run / "finetune_sigma_0.25.pt")
    second = str(perturbed(first, folder / "second.pt"))
    return [first, second, str(perturbed(second, folder / "third.pt"))]


@pytest.fixture
def command(monkeypatch):
    """command(plug, checkpoints, out): arguments, with CHECKPOINTS in the environment."""

    def arguments(plug, checkpoints, out):
        monkeypatch.setenv("CHECKPOINTS", ":".join(map(str, checkpoints)))
        return [*SMALL, "--classifier", f"{EXTRAS}/{plug}", "--out", str(out)]

    return arguments


def test_the_command_gives_the_rows_of_the_definition(three, command, tmp_path, capsys):
    networks = [network(file) for file in three]
    definition = plain(networks, 2)
    with torch.inference_mode():
        expected = {"mean": by_hand(total(networks), INDICES),
                    "consensus": by_hand(definition, INDICES)}
    assert definition.disputed > 0 and expected["mean"] != expected["consensus"]
    for name, found in expected.items():
        main(command(f"ensemble.py:{name}", three, tmp_path / name))
        assert rows(tmp_path / name / NAME) == found
    for name, files in (("consensus", three[:2]), ("consensus", three[::-1]), ("mean", three)):
        refused(command(f"ensemble.py:{name}", files, tmp_path / "consensus"), capsys,
                "another classifier")


def test_ensembles_that_do_not_fit_are_one_line(three, command, tmp_path, capsys):
    data = torch.load(three[0])["data"]
    perturbed(three[0], tmp_path / "classes.pt", data=data | {"classes": [*"abcdefghij"]})
    perturbed(three[0], tmp_path / "dataset.pt", data=data | {"dataset": "mnist"})
    for files, words in (
            ([], "CHECKPOINTS=a.pt:b.pt"), (three[:1], "CHECKPOINTS=a.pt:b.pt"),
            ([three[0], tmp_path / "classes.pt"], "classes.pt are for different data"),
            ([three[0], tmp_path / "dataset.pt"], "dataset.pt are for different data"),
            ([three[0], tmp_path / "missing.pt"], "missing.pt")):
        for name in ("mean", "consensus"):
            refused(command(f"ensemble.py:{name}", files, tmp_path / "run"), capsys, words)
    assert not (tmp_path / "run").exists()


# -- Denoise, then classify ------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, dict(image_size=16, patch_size=4)])
def test_denoising_is_the_prediction_of_every_patch_in_place(tiny_dmae, overrides):
    """Against forward() without noise and with all patches kept, in whose order masking stirs."""
    dmae = tiny_dmae(norm_pix=False, **overrides).eval()
    with torch.no_grad():
        dmae.decoder_pred.weight.mul_(3)
        z = torch.rand(5, 1, *2 * [dmae.image_size])
        _, prediction, mask = dmae(z, 0.0, 0.0)
        result = denoise(dmae, z)
    assert mask.sum() == 0
    size, expected = dmae.patch_size, torch.empty_like(z)
    side = dmae.image_size // size
    for row in range(side):
        for column in range(side):
            patch = prediction[:, row * side + column].view(5, size, size) * 0.3755 + 0.3054
            top, left = row * size, column * size
            expected[:, 0, top:top + size, left:left + size] = patch
    assert expected.min() < 0 and expected.max() > 0.5
    torch.testing.assert_close(result, expected.clamp(0, 1), rtol=0, atol=1e-5)
    assert result.min() == 0 and result.max() <= 1


def test_colours_come_back_into_their_channels():
    """A network that predicts a constant in each channel of each patch, in normalised units."""
    colours = dict(norm_pix=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    dmae = build_dmae("vit_cifar_tiny", **colours).eval()
    with torch.no_grad():
        dmae.decoder_pred.weight.zero_()
        dmae.decoder_pred.bias.copy_(torch.tensor([1.0, -1.0, 0.5]).repeat(16))
        result = denoise(dmae, torch.rand(2, 3, 32, 32))
        smaller = denoise(dmae, torch.rand(2, 3, 24, 24))      # resized inside, and back
    expected = torch.tensor([0.7, 0.15, 0.45])[None, :, None, None]
    torch.testing.assert_close(result, expected.expand(2, 3, 32, 32))
    torch.testing.assert_close(smaller, expected.expand(2, 3, 24, 24))


@pytest.fixture
def denoiser(tiny_run):
    return str(tiny_run / "pretrain.pt")


def denoised(denoiser, classifier):
    """f, from the two files, without what extras/denoise.py opens them with."""
    content, vit = torch.load(denoiser), network(classifier)
    dmae = DenoisingMaskedAutoencoder(**content["config"])
    dmae.load_state_dict(content["model"])
    return lambda z: vit(denoise(dmae.eval(), z))


def test_a_denoiser_goes_before_a_classifier(tiny_run, denoiser, command, tmp_path, capsys):
    tuned = str(tiny_run / "finetune_sigma_0.25.pt")
    main(command("denoise.py:denoised", [denoiser, tuned], tmp_path / "run"))
    with torch.inference_mode():
        expected = by_hand(denoised(denoiser, tuned), INDICES)
        assert expected != by_hand(network(tuned), INDICES)
    assert rows(tmp_path / "run" / NAME) == expected
    other = perturbed(denoiser, tmp_path / "other.pt")
    refused(command("denoise.py:denoised", [other, tuned], tmp_path / "run"), capsys,
            "another classifier")


@pytest.mark.slow
def test_what_fine_tuning_with_sigma_0_makes_is_such_a_classifier(denoiser, command, tmp_path):
    finetune.main(["--sigma", "0", "--epochs", "1", "--warmup-epochs", "0", "--init", denoiser,
                   "--device", "cpu", "--out", str(tmp_path)])
    clean = str(tmp_path / "finetune_sigma_0.pt")
    main(command("denoise.py:denoised", [denoiser, clean], tmp_path / "run"))
    with torch.inference_mode():
        expected = by_hand(denoised(denoiser, clean), INDICES)
    assert rows(tmp_path / "run" / NAME) == expected


def test_denoisers_that_do_not_fit_are_one_line(tiny_run, denoiser, command, tmp_path, capsys):
    tuned, whole = str(tiny_run / "finetune_sigma_0.25.pt"), torch.load(denoiser)

    def wrong(files, *words):
        refused(command("denoise.py:denoised", files, tmp_path / "run"), capsys, *words)
        assert not (tmp_path / "run").exists()

    without = {key: value for key, value in whole["config"].items() if key != "norm_pix"}
    encoder = {key: value for key, value in whole["model"].items() if "decoder" not in key}
    (tmp_path / "torn.pt").write_bytes(Path(denoiser).read_bytes()[:1000])
    for name, change, words in (
            ("norm_pix", {"config": whole["config"] | {"norm_pix": True}}, "--no-norm-pix"),
            ("default", {"config": without}, "--no-norm-pix"),
            ("mae", {"config": whole["config"] | {"loss_on": "dropped"}}, "--loss-on all"),
            ("left", {"model": whole["model"] | {"extra": torch.zeros(1)}}, "extra"),
            ("encoder", {"model": encoder}, "decoder")):
        torch.save(whole | change, tmp_path / f"{name}.pt")
        wrong([tmp_path / f"{name}.pt", tuned], f"{name}.pt", words)
    wrong([tmp_path / "torn.pt", tuned], "torn.pt")
    wrong([tmp_path / "none.pt", tuned], "none.pt")
    wrong([tuned, denoiser], "finetune_sigma_0.25.pt", "pretrain")
    for files in ([], [denoiser], [denoiser, tuned, tuned]):
        wrong(files, "CHECKPOINTS=DENOISER.pt:CLASSIFIER.pt")


# -- One step of a diffusion -----------------------------------------------------------------------


def linear_schedule(steps=1000):
    return np.cumprod(1 - np.linspace(1e-4, 0.02, steps))


def cosine_schedule(steps):
    level = lambda t: math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.cumprod([1 - min(1 - level(t + 1) / level(t), 0.999) for t in range(steps)])


STEPS = [(linear_schedule(), {0.12: 70, 0.25: 145, 0.5: 259, 1.0: 396}),
         (cosine_schedule(4000), {0.12: 573, 0.25: 1158, 0.5: 1984, 1.0: 2809}),
         (cosine_schedule(1000), {0.25: 289, 0.5: 496, 1.0: 702})]


@pytest.mark.parametrize("schedule", range(3))
def test_the_step_of_a_sigma_is_that_of_the_published_schedules(schedule):
    abar, expected = STEPS[schedule]
    for sigma, step in expected.items():
        t, scale = diffusion_step(sigma, abar)
        assert t == step and scale == pytest.approx(math.sqrt(abar[step]), rel=1e-12)
        level = lambda s: math.sqrt((1 - abar[s]) / abar[s]) / 2
        assert level(t - 1) < sigma <= level(t)
        assert diffusion_step(sigma, torch.tensor(abar)) == (t, scale)


def test_a_sigma_that_a_schedule_meets_exactly_is_met_and_one_above_all_is_refused():
    abar = [1 / (1 + 4 * sigma**2) for sigma in (0.25, 0.5, 1.0)]            # 0.8, 0.5, 0.2
    assert diffusion_step(0.5, abar) == (1, pytest.approx(math.sqrt(0.5)))
    assert diffusion_step(0.01, abar)[0] == 0
    with pytest.raises(ValueError, match="sigma 1.5 is above the schedule's largest, 1$"):
        diffusion_step(1.5, abar)


def gaussian_data(pixels=4):
    """(mean, covariance) of data that rarely leave [0, 1], and their best predictor of the noise.

    That is E[eps | x_t].
    """
    random = torch.Generator().manual_seed(5)
    mean = torch.tensor([0.4, 0.5, 0.6, 0.45], dtype=torch.float64)
    root = 0.1 * torch.randn(pixels, pixels, generator=random, dtype=torch.float64)
    covariance = root @ root.T + 0.01 * torch.eye(pixels, dtype=torch.float64)

    def predictor(abar):
        def model(x_t, t):
            assert t.shape == (len(x_t),) and len(t.unique()) == 1
            a = abar[int(t[0])]
            centre, spread = 2 * mean - 1, 4 * covariance      # of 2x - 1
            total = a * spread + (1 - a) * torch.eye(pixels, dtype=torch.float64)
            deviation = x_t.flatten(1) - math.sqrt(a) * centre
            return (math.sqrt(1 - a) * deviation @ torch.linalg.inv(total)).view_as(x_t)
        return model
    return mean, covariance, predictor


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5])
def test_of_gaussian_data_the_posterior_mean_comes_back(sigma):
    """E[x | z] = mean + C (C + s^2 I)^-1 (z - mean), with the noise s of the step.

    On 4000 steps s is sigma to 1e-3.
    """
    mean, covariance, predictor = gaussian_data()
    random, exact = torch.Generator().manual_seed(6), dict(dtype=torch.float64)
    draw = lambda: torch.randn(200, 4, generator=random, **exact)
    x = mean + draw() @ torch.linalg.cholesky(covariance).T
    z = x + sigma * draw()
    for abar, close in ((cosine_schedule(4000), 1e-3), (linear_schedule(), 1e-2)):
        result = denoise_by_diffusion(predictor(abar), z.view(200, 1, 2, 2), sigma, abar)
        assert result.shape == (200, 1, 2, 2)
        t, _ = diffusion_step(sigma, abar)
        noise = math.sqrt((1 - abar[t]) / abar[t]) / 2
        for level, tolerance in ((noise, 1e-12), (sigma, close)):
            gain = covariance @ torch.linalg.inv(covariance + level**2 * torch.eye(4, **exact))
            posterior = (mean + (z - mean) @ gain.T).clamp(0, 1)
            torch.testing.assert_close(result.flatten(1), posterior, rtol=0, atol=tolerance)
        assert (result.flatten(1) - x).square().mean() < 0.7 * (z - x).square().mean()


def test_what_leaves_the_range_is_clipped_and_the_same_image_gets_the_same_answer():
    abar, z = cosine_schedule(1000), torch.tensor([-0.5, 0.25, 1.5]).view(1, 1, 1, 3)
    nothing = denoise_by_diffusion(lambda x_t, t: torch.zeros_like(x_t), z, 0.25, abar)
    assert torch.allclose(nothing, torch.tensor([0.0, 0.25, 1.0]).view_as(z), atol=1e-6)
    twice = [denoise_by_diffusion(lambda x_t, t: 0.3 * x_t, z, 0.25, abar) for _ in range(2)]
    assert torch.equal(*twice)


def test_the_file_of_the_docstring_certifies(tmp_path):
    """With a U-Net of one number and a classifier of brightness in the place of the dots."""
    lines = re.search(r"( +from extras.*?)\n\n", extras.diffusion.__doc__, re.DOTALL)[1]
    lines = [line[4:].replace("0.5", "0.25") for line in lines.splitlines()]
    (dots,) = [i for i, line in enumerate(lines) if "= ..." in line]
    lines[dots] = """
import torch
abar = torch.linspace(0.999, 0.01, 500)
unet = lambda x_t, t: 0.2 * x_t
W = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
vit = lambda x: x.flatten(1) @ W
"""
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    main([*SMALL, "--classifier", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "run")])
    space = {}
    exec("\n".join(lines), space)
    assert rows(tmp_path / "run" / NAME) == by_hand(space["f"], INDICES)
    x = digit(0)[None]
    clean = denoise_by_diffusion(space["unet"], x, 0.25, space["abar"])
    assert torch.equal(space["f"](x), space["vit"](clean))
