"""certify.py's K-consensus and denoisers, against the plain definition and against closed forms."""

import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_certify_cli import NAME, ROOT, by_hand, digit, network, perturbed, refused, rows, timeless

import certify as c
import finetune
from certify import (
    Consensus,
    FixedN,
    GaussianNoise,
    certify_all,
    count_under_noise,
    denoise,
    denoise_by_diffusion,
    diffusion_step,
    generator_for,
    main,
)
from model import build_dmae, read_checkpoint

INDICES = range(0, 360, 120)                                          # --skip 120: three images
SMALL = ["--sigma", "0.25", "--device", "cpu", "--skip", "120", "--n", "300", "--n0", "50", "--alpha", "0.05",
         "--radii", "0", "0.25", "--batch", "100"]

# -- K-consensus ---------------------------------------------------------------------------------------------------------


class Linear:
    """Whole weights and images on a grid of sixteenths, in float64: sums are exact, so no batch can change them."""

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
    """The definition, copy by copy, with all networks on all copies; f.disputed counts where the first K disagree."""
    def f(x):
        logits = [each(x) for each in networks]
        result = []
        for i in range(len(x)):
            answers = {int(one[i].argmax()) for one in logits[:k]}
            f.disputed += len(answers) > 1
            winner = answers.pop() if len(answers) == 1 else int(sum(one[i] for one in logits).argmax())
            result.append(torch.eye(logits[0].shape[1])[winner])
        return torch.stack(result)
    f.disputed = 0
    return f


def ensemble(size=4):
    return [Linear(seed) for seed in range(size)]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("copies", [1, 7, 24, 25, 26, 100, 400])
def test_a_consensus_answers_as_the_definition_and_counts_its_passes(k, copies):
    x = torch.randint(0, 17, (copies, 3, 2, 2), generator=torch.Generator().manual_seed(copies)) / 16
    networks, definition = ensemble(), plain(ensemble(), k)
    f = Consensus(networks, k)
    logits, expected = f(x), definition(x)
    assert logits.shape == (copies, 4) and torch.equal(logits.argmax(1), expected.argmax(1))
    if copies >= 100:
        assert (0 < definition.disputed < copies) == (k > 1)
        same = torch.equal(expected.argmax(1), sum(each(x) for each in ensemble()).argmax(1))
        assert same or k < 4
        assert not same or k > 2                                       # two that agree can be outvoted: another f

    pack = min(25, copies)
    asked = math.ceil(definition.disputed / pack) * pack
    assert [each.copies for each in networks] == [copies] * k + [asked] * (4 - k)
    assert (f.done, f.most) == (copies * k + asked * (4 - k), 4 * copies)
    assert all(len(each.shapes) <= 1 for each in networks)


@pytest.mark.parametrize("k", [2, 4])
def test_counts_are_those_of_the_definition_whatever_the_batch(k):
    images = [(3 + i, torch.full((3, 2, 2), value)) for i, value in enumerate((0.2, 0.5, 0.8))]
    results = []
    for batch in (5, 20, 50, 100, 200, 500):
        networks = ensemble()
        trials = certify_all(Consensus(networks, k), images, GaussianNoise(0.5), 30, FixedN(330, 0.05), 1, batch)
        results.append([trial.counts.tolist() for trial in trials])
        assert all(len(each.shapes) == 1 for each in networks)
    by_definition = [count_under_noise(plain(ensemble(), k), x, 0.5, 330, generator_for(1, i, 1, x.device)).tolist()
                     for i, x in images]
    assert results == [by_definition] * len(results)
    others = [count_under_noise(lambda x: sum(each(x) for each in ensemble()), x, 0.5, 330, generator_for(1, i, 1, x.device)).tolist()
              for i, x in images]
    assert (by_definition == others) == (k == 4)


def test_where_the_first_agree_a_rounded_sum_cannot_make_a_tie_for_another_class():
    """Above 2^26 float32 knows multiples of 8 alone: both sums are 2^26 + 8, and class 0 would win."""
    one, two = torch.tensor([[14.0, 14.5]]), torch.tensor([[2.0**26 - 8, 2.0**26 - 4]])
    assert one.argmax() == two.argmax() == 1 and (one + two).argmax() == 0
    networks = [lambda x: one.expand(len(x), 2), lambda x: two.expand(len(x), 2)]
    assert Consensus(networks, 2)(torch.zeros(3, 1, 1, 1)).argmax(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_logits_that_are_none_are_never_agreed_on(bad, where):
    broken = [torch.tensor([[0.0, 1.0, 0.5]]).repeat(10, 1) for _ in range(3)]
    broken[where][4, 1] = bad
    result = Consensus([lambda x, one=one: one[:len(x)] for one in broken], 2)(torch.zeros(10, 1, 1, 1))
    _, usable = c.answers_of(result)
    assert usable.tolist() == [i != 4 for i in range(10)]


@pytest.mark.parametrize("k", [0, 5, -1])
def test_a_consensus_of_none_or_of_more_than_there_are_is_refused(k):
    with pytest.raises(ValueError, match=f"consensus of {k} among 4"):
        Consensus(ensemble(), k)


def test_it_serves_a_vision_transformer_as_the_definition_does(tiny_vit):
    networks = []
    for seed in range(3):
        vit = tiny_vit()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in vit.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
            vit.head.bias.sub_(vit(torch.rand(300, 1, 8, 8, generator=generator)).mean(0))
        networks.append(vit)
    x = torch.rand(300, 1, 8, 8)
    definition = plain(networks, 2)
    with torch.inference_mode():
        f = Consensus(networks, 2)
        assert torch.equal(f(x).argmax(1), definition(x).argmax(1))
    assert 0 < definition.disputed < 300 and f.done < f.most


@pytest.fixture(scope="module")
def three(tiny_run, tmp_path_factory):
    """Three fine-tuned checkpoints that differ."""
    folder = tmp_path_factory.mktemp("three")
    first = str(tiny_run / "finetune_sigma_0.25.pt")
    second = str(perturbed(first, folder / "second.pt"))
    return [first, second, str(perturbed(second, folder / "third.pt"))]


def saved_of(out):
    """(saved, of so many), as a run prints it."""
    (line,) = [line for line in out.splitlines() if "passes over copies saved" in line]
    saved, most = re.search(r"consensus: ([\d,]+) of ([\d,]+) network passes", line).groups()
    return int(saved.replace(",", "")), int(most.replace(",", ""))


COPIES = 3 * (100 + 300)                                               # n0 = 50 in a chunk of 100, and n = 300; batch 100


@pytest.fixture(scope="module")
def consensus_run(three, tmp_path_factory):
    """(its directory, the networks) of a finished run; not to be written to."""
    out = tmp_path_factory.mktemp("consensus")
    main([*SMALL, "--checkpoint", *three, "--consensus", "2", "--out", str(out)])
    return out, [network(file) for file in three]


def test_the_command_gives_the_rows_of_the_definition_and_says_what_it_saved(three, consensus_run, tmp_path, capsys):
    out, networks = consensus_run
    definition = plain(networks, 2)
    with torch.inference_mode():
        expected = by_hand(definition, INDICES)
    assert rows(out / NAME) == expected and definition.disputed > 0
    assert json.loads((out / "certify_sigma_0.25.json").read_text())["consensus"] == 2

    capsys.readouterr()
    main([*SMALL, "--checkpoint", *three, "--consensus", "2", "--out", str(tmp_path)])
    saved, most = saved_of(capsys.readouterr().out)
    spy = Consensus(networks, 2)
    with torch.inference_mode():
        by_hand(spy, INDICES)
    assert (saved, most) == (spy.most - spy.done, 3 * COPIES)
    at_best = COPIES - definition.disputed
    assert at_best - 24 * COPIES // 100 <= saved <= at_best      # a batch of 100 pads by at most 24

    main([*SMALL, "--checkpoint", *three, "--consensus", "2", "--out", str(tmp_path)])        # it is done: nothing to save
    assert "passes" not in capsys.readouterr().out


def test_after_a_resume_the_passes_are_those_since_the_start(three, consensus_run, tmp_path, capsys):
    out, _ = consensus_run
    argv = [*SMALL, "--checkpoint", *three, "--consensus", "2", "--out", str(tmp_path)]
    lines = (out / NAME).read_text().splitlines(keepends=True)[1:]
    (tmp_path / "certify_sigma_0.25.json").write_text((out / "certify_sigma_0.25.json").read_text())
    (tmp_path / f"{NAME}.part0").write_text(lines[0])
    main(argv)
    said = capsys.readouterr().out
    assert saved_of(said)[1] == 3 * 2 * 400 and "since this start" in said
    assert timeless(tmp_path / NAME) == timeless(out / NAME)


@pytest.mark.slow
def test_two_processes_give_the_same_rows_and_add_up_what_they_saved(three, consensus_run, torchrun, tmp_path, capsys):
    out, _ = consensus_run
    job = torchrun(2, ROOT / "certify.py", *SMALL, "--checkpoint", *three, "--consensus", "2", "--out", tmp_path)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert timeless(tmp_path / NAME) == timeless(out / NAME)
    main([*SMALL, "--checkpoint", *three, "--consensus", "2", "--out", str(tmp_path / "one")])
    assert saved_of(said) == saved_of(capsys.readouterr().out)         # each image fills its own batches here


def test_another_k_is_another_classifier(three, consensus_run, tmp_path, capsys):
    out, _ = consensus_run
    before = (out / NAME).read_bytes()
    for k, words in ((0, "consensus 2 -> None"), (1, "consensus 2 -> 1"), (3, "consensus 2 -> 3")):
        refused([*SMALL, "--checkpoint", *three, "--consensus", k, "--out", out], capsys, "other settings", words)
    assert (out / NAME).read_bytes() == before
    shards = []
    for part, k in ((0, 2), (1, 3)):
        main([*SMALL, "--checkpoint", *three, "--consensus", str(k), "--out", str(tmp_path), "--shard", f"{part}/2", "--max", "2"])
        shards.append(tmp_path / f"certify_sigma_0.25_shard_{part}_of_2.tsv")
    refused(["--report", *shards], capsys, "not merged")


def test_runs_that_know_no_consensus_go_on(three, tmp_path, capsys):
    """Their settings do not name it; the mean of logits is what they did."""
    argv = [*SMALL, "--checkpoint", *three, "--out", str(tmp_path), "--max", "1"]
    main(argv)
    file = tmp_path / "certify_sigma_0.25.json"
    settings = json.loads(file.read_text())
    assert all(settings.pop(key) is None for key in ("consensus", "denoiser", "denoiser_sha256"))
    file.write_text(json.dumps(settings))
    capsys.readouterr()
    main(argv)
    said = capsys.readouterr().out
    assert "is done" in said and "passes" not in said


@pytest.mark.parametrize("k", ["4", "-1", "two", "1.5"])
def test_a_k_that_cannot_be_is_one_line(three, tmp_path, capsys, k):
    refused([*SMALL, "--checkpoint", *three, "--consensus", k, "--out", tmp_path / "run"], capsys, "--consensus")
    assert not (tmp_path / "run").exists()


def test_a_consensus_needs_checkpoints(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import torch\nf = lambda x: torch.zeros(len(x), 10)\n")
    refused([*SMALL, "--classifier", f"{tmp_path}/mine.py:f", "--consensus", "1", "--out", tmp_path / "run"], capsys,
            "--consensus 1", "--checkpoint")
    assert not (tmp_path / "run").exists()


# -- Denoise, then classify ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, dict(image_size=16, patch_size=4)])
def test_denoising_is_the_prediction_of_every_patch_in_place(tiny_dmae, overrides):
    """Against forward() with sigma 0 and all kept: its loss is the distance of the result, not clamped, to the clean image."""
    dmae = tiny_dmae(norm_pix=False, **overrides).eval()
    with torch.no_grad():
        dmae.decoder_pred.weight.mul_(3)
        z = torch.rand(5, 1, *2 * [dmae.image_size])
        _, prediction, mask = dmae(z, 0.0, 0.0)                        # masking shuffles: here in another order
        result = denoise(dmae, z)
    assert mask.sum() == 0
    side = dmae.image_size // dmae.patch_size
    expected = torch.empty_like(z)
    for row in range(side):
        for column in range(side):
            patch = prediction[:, row * side + column].view(5, dmae.patch_size, dmae.patch_size)
            top, left = row * dmae.patch_size, column * dmae.patch_size
            expected[:, 0, top:top + dmae.patch_size, left:left + dmae.patch_size] = patch * 0.3755 + 0.3054
    assert expected.min() < 0 and expected.max() > 0.5
    torch.testing.assert_close(result, expected.clamp(0, 1), rtol=0, atol=1e-5)
    assert result.min() == 0 and result.max() <= 1


def test_colours_come_back_into_their_channels():
    """A network that predicts a constant in each channel of each patch, in normalised units."""
    dmae = build_dmae("vit_cifar_tiny", norm_pix=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3)).eval()
    with torch.no_grad():
        dmae.decoder_pred.weight.zero_()
        dmae.decoder_pred.bias.copy_(torch.tensor([1.0, -1.0, 0.5]).repeat(16))
        result = denoise(dmae, torch.rand(2, 3, 32, 32))
        smaller = denoise(dmae, torch.rand(2, 3, 24, 24))              # resized inside, and back
    colours = torch.tensor([0.7, 0.15, 0.45])[None, :, None, None]
    torch.testing.assert_close(result, colours.expand(2, 3, 32, 32))
    torch.testing.assert_close(smaller, colours.expand(2, 3, 24, 24))


@pytest.fixture(scope="module")
def clean(tiny_run, tmp_path_factory):
    """A directory with a classifier that says it is of clean images, finetune_sigma_0.pt."""
    out = tmp_path_factory.mktemp("clean")
    perturbed(tiny_run / "finetune_sigma_0.25.pt", out / "finetune_sigma_0.pt", sigma=0.0)
    return out


@pytest.fixture
def denoiser(tiny_run):
    return str(tiny_run / "pretrain.pt")


def autoencoder(file):
    checkpoint = read_checkpoint(file, "pretrain")
    dmae = c.rebuild(checkpoint, file).eval()
    assert checkpoint["settings"]["norm_pix"] is dmae.norm_pix is False
    return dmae


@pytest.mark.parametrize("tuned", ["0", "0.25"])
def test_a_denoiser_goes_before_a_clean_or_a_noisy_classifier(clean, tiny_run, denoiser, tmp_path, capsys, tuned):
    file = (clean if tuned == "0" else tiny_run) / f"finetune_sigma_{tuned}.pt"
    main([*SMALL, "--denoiser", denoiser, "--checkpoint", str(file), "--out", str(tmp_path)])
    dmae, vit = autoencoder(denoiser), network(str(file))
    with torch.inference_mode():
        expected = by_hand(lambda z: vit(denoise(dmae, z)), INDICES)
        assert expected != by_hand(vit, INDICES)
    assert rows(tmp_path / NAME) == expected
    settings = json.loads((tmp_path / "certify_sigma_0.25.json").read_text())
    assert settings["denoiser_sha256"] == hashlib.sha256(Path(denoiser).read_bytes()).hexdigest()

    moved = tmp_path / "moved.pt"
    moved.write_bytes(Path(denoiser).read_bytes())
    capsys.readouterr()
    main([*SMALL, "--denoiser", str(moved), "--checkpoint", str(file), "--out", str(tmp_path)])
    assert "is done" in capsys.readouterr().out
    other = perturbed(denoiser, tmp_path / "other.pt")
    refused([*SMALL, "--denoiser", other, "--checkpoint", file, "--out", tmp_path], capsys, "denoiser_sha256")
    if tuned != "0":
        refused([*SMALL, "--checkpoint", file, "--out", tmp_path], capsys, "denoiser_sha256")


@pytest.mark.slow
def test_what_fine_tuning_with_sigma_0_makes_is_such_a_classifier(tiny_run, denoiser, tmp_path):
    finetune.main(["--sigma", "0", "--epochs", "1", "--warmup-epochs", "0", "--vote-every", "2", "--out", str(tmp_path),
                   "--init", denoiser, "--device", "cpu"])
    file = str(tmp_path / "finetune_sigma_0.pt")
    main([*SMALL, "--denoiser", denoiser, "--checkpoint", file, "--out", str(tmp_path / "run"), "--max", "1"])
    dmae, vit = autoencoder(denoiser), network(file)
    with torch.inference_mode():
        assert rows(tmp_path / "run" / NAME) == by_hand(lambda z: vit(denoise(dmae, z)), INDICES[:1])


def test_without_a_denoiser_a_clean_classifier_is_refused_as_before(clean, tmp_path, capsys):
    refused([*SMALL, "--checkpoint", clean / "finetune_sigma_0.pt", "--out", tmp_path / "run"], capsys, "--any-sigma")
    assert not (tmp_path / "run").exists()


def test_with_a_denoiser_a_classifier_for_another_noise_is_refused(tiny_run, denoiser, tmp_path, capsys):
    refused([*SMALL, "--sigma", "0.5", "--denoiser", denoiser, "--checkpoint", tiny_run / "finetune_sigma_0.25.pt", "--out",
             tmp_path / "run"], capsys, "0.25", "0.5", "--any-sigma")


def test_a_denoiser_goes_before_a_consensus_and_before_any_callable(three, denoiser, tmp_path):
    dmae, networks = autoencoder(denoiser), [network(file) for file in three]
    main([*SMALL, "--denoiser", denoiser, "--checkpoint", *three, "--consensus", "2", "--out", str(tmp_path / "k")])
    definition = plain(networks, 2)
    with torch.inference_mode():
        assert rows(tmp_path / "k" / NAME) == by_hand(lambda z: definition(denoise(dmae, z)), INDICES)
    (tmp_path / "mine.py").write_text("import torch\nf = lambda x: torch.stack([x.mean((1, 2, 3)) - 0.3, 0.3 - x.mean((1, 2, 3))], 1)\n")
    main([*SMALL, "--denoiser", denoiser, "--classifier", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "f")])
    bright = lambda x: torch.stack([x.mean((1, 2, 3)) - 0.3, 0.3 - x.mean((1, 2, 3))], 1)
    with torch.inference_mode():
        assert rows(tmp_path / "f" / NAME) == by_hand(lambda z: bright(denoise(dmae, z)), INDICES)


def test_denoisers_that_do_not_fit_are_one_line(denoiser, tiny_run, tmp_path, capsys):
    def wrong(file, *words):
        refused([*SMALL, "--denoiser", file, "--checkpoint", tiny_run / "finetune_sigma_0.25.pt", "--out", tmp_path / "run"],
                capsys, file, *words)
        assert not (tmp_path / "run").exists()

    whole = torch.load(denoiser)
    (tmp_path / "torn.pt").write_bytes(Path(denoiser).read_bytes()[:1000])
    for name, change, words in [
            ("norm_pix.pt", {"config": whole["config"] | {"norm_pix": True}}, ("norm-pix", "--no-norm-pix")),
            ("default.pt", {"config": {k: v for k, v in whole["config"].items() if k != "norm_pix"}}, ("norm-pix",)),
            ("mae.pt", {"config": whole["config"] | {"loss_on": "dropped"}}, ("--loss-on all",)),
            ("cifar.pt", {"data": whole["data"] | dict(dataset="cifar10")}, ("dataset cifar10, not digits",)),
            ("size.pt", {"data": whole["data"] | dict(image_size=16)}, ("image_size 16, not 8",)),
            ("channels.pt", {"data": whole["data"] | dict(channels=3)}, ("channels 3, not 1",)),
            ("bare.pt", {"data": {}}, ("data set",)), ("config.pt", {"config": {}}, ("model",)),
            ("left.pt", {"model": whole["model"] | {"extra": torch.zeros(1)}}, ("extra",)),
            ("encoder.pt", {"model": {k: v for k, v in whole["model"].items() if not k.startswith("decoder_")}}, ("missing",))]:
        torch.save(whole | change, tmp_path / name)
        wrong(tmp_path / name, *words)
    wrong(tmp_path / "torn.pt")
    wrong(tmp_path / "none.pt")
    wrong(tiny_run / "finetune_sigma_0.25.pt", "pretrain")


# -- One step of a diffusion ---------------------------------------------------------------------------------------------


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
    abar = [1 / (1 + 4 * sigma**2) for sigma in (0.25, 0.5, 1.0)]       # 0.8, 0.5, 0.2
    assert diffusion_step(0.5, abar) == (1, pytest.approx(math.sqrt(0.5)))
    assert diffusion_step(0.01, abar)[0] == 0
    with pytest.raises(ValueError, match="sigma 1.5 is above the schedule's largest, 1$"):
        diffusion_step(1.5, abar)


def gaussian_data(pixels=4):
    """(mean, covariance) of data in [0, 1] that rarely leave it, and their best predictor of the noise, E[eps | x_t]."""
    generator = torch.Generator().manual_seed(5)
    mean = torch.tensor([0.4, 0.5, 0.6, 0.45], dtype=torch.float64)
    root = 0.1 * torch.randn(pixels, pixels, generator=generator, dtype=torch.float64)
    covariance = root @ root.T + 0.01 * torch.eye(pixels, dtype=torch.float64)

    def predictor(abar):
        def model(x_t, t):
            assert t.shape == (len(x_t),) and len(t.unique()) == 1
            a = abar[int(t[0])]
            centre, spread = 2 * mean - 1, 4 * covariance              # of 2x - 1
            total = a * spread + (1 - a) * torch.eye(pixels, dtype=torch.float64)
            deviation = x_t.flatten(1) - math.sqrt(a) * centre
            return (math.sqrt(1 - a) * deviation @ torch.linalg.inv(total)).view_as(x_t)
        return model
    return mean, covariance, predictor


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5])
def test_of_gaussian_data_the_posterior_mean_comes_back(sigma):
    """E[x | z] = mean + C (C + s^2 I)^-1 (z - mean), with the noise s of the step; on 4000 steps s is sigma to 1e-3."""
    mean, covariance, predictor = gaussian_data()
    generator = torch.Generator().manual_seed(6)
    x = mean + torch.randn(200, 4, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance).T
    z = x + sigma * torch.randn(200, 4, generator=generator, dtype=torch.float64)
    for abar, close in ((cosine_schedule(4000), 1e-3), (linear_schedule(), 1e-2)):
        result = denoise_by_diffusion(predictor(abar), z.view(200, 1, 2, 2), sigma, abar)
        assert result.shape == (200, 1, 2, 2)
        t, _ = diffusion_step(sigma, abar)
        noise = math.sqrt((1 - abar[t]) / abar[t]) / 2
        for level, tolerance in ((noise, 1e-12), (sigma, close)):
            gain = covariance @ torch.linalg.inv(covariance + level**2 * torch.eye(4, dtype=torch.float64))
            posterior = (mean + (z - mean) @ gain.T).clamp(0, 1)
            torch.testing.assert_close(result.flatten(1), posterior, rtol=0, atol=tolerance)
        assert (result.flatten(1) - x).square().mean() < 0.7 * (z - x).square().mean()


def test_what_leaves_the_range_is_clipped_and_the_same_image_gets_the_same_answer():
    abar = cosine_schedule(1000)
    z = torch.tensor([-0.5, 0.25, 1.5]).view(1, 1, 1, 3)
    nothing = lambda x_t, t: torch.zeros_like(x_t)
    assert torch.allclose(denoise_by_diffusion(nothing, z, 0.25, abar), torch.tensor([0.0, 0.25, 1.0]).view_as(z), atol=1e-6)
    model = lambda x_t, t: 0.3 * x_t
    assert torch.equal(denoise_by_diffusion(model, z, 0.25, abar), denoise_by_diffusion(model, z, 0.25, abar))


def test_the_file_of_the_docstring_certifies(tmp_path):
    """With a U-Net of one number and a classifier of brightness in the place of the dots."""
    example = re.search(r"( +from certify import .*?)\n\n", denoise_by_diffusion.__doc__, re.DOTALL)[1]
    lines = [line[8:].replace("0.5", "0.25") for line in example.splitlines()]
    (dots,) = [i for i, line in enumerate(lines) if "= ..." in line]
    lines[dots] = """
import torch
abar = torch.linspace(0.999, 0.01, 500)
unet = lambda x_t, t: 0.2 * x_t
vit = lambda x: torch.stack([x.mean((1, 2, 3)) - 0.3, 0.3 - x.mean((1, 2, 3))], 1)
"""
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    main([*SMALL, "--classifier", f"{tmp_path}/mine.py:f", "--out", str(tmp_path / "run")])
    space = {}
    exec("\n".join(lines), space)
    expected = by_hand(space["f"], INDICES)
    assert rows(tmp_path / "run" / NAME) == expected
    x = digit(0)[None]
    assert torch.equal(space["f"](x), space["vit"](denoise_by_diffusion(space["unet"], x, 0.25, space["abar"])))
