"""The mathematics and the sampling of certify.py, extras/sequential.py and extras/integer_noise.py.

Against closed forms, exact binomial sums, integrals, simulation and brute force.
"""

import functools
import itertools
import math
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom, binomtest, chi2, kstest, norm

import certify as c
import extras.sequential
from certify import (
    ABSTAIN,
    CHUNK,
    certificate,
    certified_radius,
    certify,
    certify_all,
    clear_winner,
    count_under_noise,
    fixed_n,
    generator_for,
    lower_confidence_bound,
    predict,
    round_down,
)
from extras.integer_noise import BITS, SLACK, GridNoise, certify_on_grid, count
from extras.sequential import (
    EARLY,
    anytime_lower_bound,
    bounds_after,
    log_e_value,
    sequential,
)
from model import build_vit

ROOT = Path(c.__file__).parent
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
BATCHES = (1, 2, 5, 10, 20, 25, 50, 100, 200, 400)
CPU = torch.device("cpu")


def by_digits(x):
    """Seven classes by the first pixel's third decimal: any change shows, nothing is rounded."""
    return torch.nn.functional.one_hot((x.flatten(1)[:, 0] * 1000).long() % 7, 7).float()


def noisy_copies(x, generator, copies, sigma):
    """Whole chunks, as drawn: the definition, by brute force."""
    chunks = -(-copies // CHUNK)
    draw = lambda: torch.randn(CHUNK, *x.shape, generator=generator)
    return torch.cat([x + sigma * draw() for _ in range(chunks)])


def expected_counts(x, generator, copies, sigma, classifier=by_digits, classes=7):
    answers = classifier(noisy_copies(x, generator, copies, sigma)[:copies]).argmax(1)
    return answers.bincount(minlength=classes)


def drive(trial, answers):
    """What a procedure returns that is sent these counts, one after the other."""
    next(trial)
    with pytest.raises(StopIteration) as end:
        for counts in answers:
            trial.send(torch.as_tensor(counts))
    return end.value.value


def exact_cdf(x):
    """Phi(x) to 50 digits: 1/2 + phi(x) (x + x^3/3 + x^5/15 + ...), all positive for x > 0."""
    with localcontext(prec=60):
        x = Decimal(x)
        if x < 0:
            return 1 - exact_cdf(-x)
        term, total, j = x, x, 1
        while term > total * Decimal(10) ** -58 and total:
            j += 2
            term *= x * x / j
            total += term
        return Decimal("0.5") + total * (-x * x / 2).exp() / (2 * PI).sqrt()


def exact_tail(k, n, p):
    """P[Binomial(n, p) >= k] by the sum, in the arithmetic of p (Fraction or Decimal)."""
    return sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))


# -- Clopper-Pearson and the radius ----------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.4])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_lower_bound_is_where_the_exact_binomial_tail_is_alpha(n, alpha):
    for k in range(1, n + 1):
        p = Fraction(lower_confidence_bound(k, n, alpha))
        assert float(exact_tail(k, n, p)) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("n", [1, 3, 10, 100, 1000])
def test_lower_bound_covers_every_p(n, alpha):
    k = np.arange(n + 1)
    bounds = np.array([lower_confidence_bound(int(i), n, alpha) for i in k])
    worst = bounds[1:] * (1 - 1e-12)                           # coverage is lowest below a bound
    for p in (*np.linspace(0, 1, 41), *worst[:: max(1, n // 50)]):
        assert binom.pmf(k[bounds <= p], n, p).sum() >= 1 - alpha - 1e-9
    tight = binom.pmf(k[bounds <= worst[-1]], n, worst[-1]).sum()
    assert tight == pytest.approx(1 - alpha, abs=1e-6)


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-4, 0.49))
@settings(max_examples=60, deadline=None)
def test_lower_bound_is_scipys_exact_interval_and_grows_with_k(n, share, alpha):
    k = round(share * n)
    bound = lower_confidence_bound(k, n, alpha)
    interval = binomtest(k, n).proportion_ci(confidence_level=1 - 2 * alpha, method="exact")
    assert bound == pytest.approx(interval.low, abs=1e-9)
    assert bound <= k / n and (k == n or bound < lower_confidence_bound(k + 1, n, alpha))
    assert k == 0 or bound < lower_confidence_bound(k, n, alpha * 1.01)


@pytest.mark.parametrize("n", [1, 10, 100_000])
def test_lower_bound_at_the_ends(n):
    assert lower_confidence_bound(0, n, 0.001) == 0
    assert lower_confidence_bound(n, n, 0.001) == pytest.approx(0.001 ** (1 / n), rel=1e-12)


@pytest.mark.parametrize(("p_a", "p_b"), [
    (0.9, None), (0.51, None), (0.999, None), (0.9, 0.02), (0.4, 0.3), (0.7, 0.7)])
@pytest.mark.parametrize("sigma", [0.12, 0.5, 1.0])
def test_radius_is_half_sigma_times_the_difference_of_quantiles(p_a, p_b, sigma):
    def inverse(p):
        return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))

    expected = sigma * inverse(p_a) if p_b is None else sigma / 2 * (inverse(p_a) - inverse(p_b))
    assert certified_radius(p_a, sigma, p_b) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    same = certified_radius(p_a, sigma, 1 - p_a)
    assert certified_radius(p_a, sigma) == pytest.approx(same, rel=1e-12)


def test_radius_is_zero_without_a_majority_and_never_nan():
    assert [certified_radius(p, 0.5) for p in (0.0, 1e-300, 0.3, 0.5)] == [0, 0, 0, 0]
    assert certified_radius(0.3, 0.5, 0.6) == 0 and certified_radius(0.3, 0.5, 0.3) == 0
    assert certified_radius(1.0, 0.5) == math.inf
    assert certified_radius(np.nextafter(1, 0), 0.5) == pytest.approx(0.5 * 8.2, rel=0.01)


@given(st.floats(0, 10))
def test_round_down_is_below_and_within_a_millionth(radius):
    rounded = round_down(radius)
    assert rounded == 0 or rounded < radius
    assert rounded >= 0 and radius - rounded <= 1.01e-6
    assert float(f"{rounded:.6f}") == rounded                  # six decimals say it all


@pytest.mark.parametrize(("k", "n"), [
    (10, 10), (60, 80), (100, 100), (350, 400), (399, 400), (1000, 1000), (990, 1000)])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_radius_as_written_is_sound_in_exact_arithmetic(k, n, sigma):
    """Were P[f = c_A] = Phi(R / sigma), k or more successes would have chance <= alpha.

    No rounding error eats that.
    """
    alpha, p_a = 0.001, lower_confidence_bound(k, n, 0.001)
    radius = round_down(certified_radius(p_a, sigma))
    with localcontext(prec=60):
        at = lambda r: exact_tail(k, n, exact_cdf(Decimal(r) / Decimal(sigma)))
        assert p_a < 0.5 or at(f"{radius:.6f}") <= Decimal(alpha)
        assert p_a < 0.5 or at(radius + 2e-6) > Decimal(alpha)


@pytest.mark.parametrize(("p_a", "p_b"), [(0.5, 0.5), (0.3, 0.7), (math.nan, math.nan)])
def test_whoever_is_not_above_the_rival_abstains(p_a, p_b):
    """A comparison with NaN is false: certified is only p_a > p_b."""
    assert certificate(3, p_a, p_b, 0.5) == (ABSTAIN, 0.0)


# -- A linear classifier, for which everything is known --------------------------------------------

NORMAL = torch.tensor([0.6, -0.8, 0.0, 0.0]).view(1, 2, 2)


def half_space(x):
    """Class 1 beyond the plane <NORMAL, x> = 0: P[f(x + e) = 1] = Phi(<NORMAL, x> / sigma)."""
    return torch.stack([torch.zeros(len(x)), (x * NORMAL).sum((1, 2, 3))], dim=1)


def at_distance(distances):
    """(index, x) at these signed distances from the plane; index from 0."""
    random = torch.Generator().manual_seed(5)
    along = torch.randn(len(distances), 1, 2, 2, generator=random)
    along -= (along * NORMAL).sum((1, 2, 3), keepdim=True) * NORMAL
    return [(i, NORMAL * d + a) for i, (d, a) in enumerate(zip(distances, along, strict=True))]


def test_radius_exceeds_the_distance_to_the_plane_with_chance_alpha_only():
    sigma, alpha, m = 0.5, 0.05, 1000
    distances = np.random.default_rng(1).uniform(0.05, 0.8, m) * np.where(np.arange(m) % 2, 1, -1)
    wrong = 0
    trials = certify_all(half_space, at_distance(distances), sigma, 20, 1000, alpha, 3, batch=400)
    for index, _, top, _, _, bounds in trials:
        prediction, radius = certificate(top, *bounds["one-sided"], sigma)
        true = distances[index] if prediction == 1 else -distances[index]
        wrong += prediction != ABSTAIN and radius > true
    assert wrong <= binom.ppf(1 - 1e-6, m, alpha)
    assert wrong >= binom.ppf(1e-6, m, alpha / 2)              # little is wasted at n = 1000


def test_radius_approaches_the_distance_like_one_over_root_n():
    sigma, x = 0.25, at_distance([0.25])[0][1]
    for n in (1000, 10_000, 100_000):
        how = dict(n0=100, n=n, alpha=0.001, seed=1, batch=400, any_range=True)
        prediction, radius = certify(half_space, x, sigma, **how)
        deviation = sigma * math.sqrt(norm.cdf(1) * norm.sf(1) / n) / norm.pdf(1)
        assert prediction == 1 and 0.25 - 7 * deviation < radius < 0.25      # about 3.1 below


def test_predict_is_right_far_from_the_plane_and_abstains_on_it():
    for d, expected in ((0.5, 1), (-0.5, 0), (0.2, 1)):
        x = at_distance([d])[0][1]
        assert predict(half_space, x, 0.5, n=1000, alpha=0.001, any_range=True) == expected
    small = dict(n=200, alpha=0.05, any_range=True)
    images = at_distance(np.zeros(400))
    on_it = [predict(half_space, x, 0.5, **small, index=i) for i, x in images]
    answers = sum(guess != ABSTAIN for guess in on_it)
    assert 1 <= answers <= binom.ppf(1 - 1e-6, 400, 0.05)
    images = at_distance(np.full(200, 0.03))
    near = [predict(half_space, x, 0.5, **small, index=i) for i, x in images]
    assert near.count(ABSTAIN) > 100 and near.count(0) <= binom.ppf(1 - 1e-6, 200, 0.05)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_predict_does_the_two_sided_binomial_test_on_the_top_two(monkeypatch, alpha):
    for first, second, third in itertools.product(range(0, 41, 4), range(0, 41, 4), (0, 3)):
        if not min(first, second) >= third or first + second == 0:
            continue
        counts, n = torch.tensor([third, first, second]), first + second
        monkeypatch.setattr(c, "count_under_noise", lambda *_, _counts=counts: _counts[None])
        p_value = min(1, 2 * exact_tail(max(first, second), n, Fraction(1, 2)))
        expected = ABSTAIN if p_value > Fraction(alpha) else 1 if first > second else 2
        x = torch.zeros(1, 2, 2)
        assert predict(half_space, x, 0.5, n=n, alpha=alpha) == expected, counts
        assert clear_winner(counts, alpha) == expected


def test_a_classifier_that_always_answers_one_class_has_the_largest_radius():
    constant, x = lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), torch.zeros(1, 2, 2)
    assert predict(constant, x, 0.5, n=100) == 0
    for bound in c.BOUNDS:
        prediction, radius = certify(constant, x, 0.5, n=100, bound=bound)
        p_a = (0.001 if bound == "one-sided" else 0.0009) ** (1 / 100)       # n of n successes
        assert prediction == 0 and radius == pytest.approx(0.5 * norm.ppf(p_a), abs=2e-6)


# -- CERTIFY ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [half_space, by_digits])
def test_certificate_is_select_estimate_bound_abstain(classifier):
    sigma, n0, n, alpha, seed = 0.5, 50, 430, 0.01, 7
    results = []
    for i, x in at_distance([0.4, -0.2, 0.02, 0.0, 1.5]):
        selection, counts = (
            expected_counts(x, generator_for(seed, i, phase, CPU), copies, sigma, classifier)
            for phase, copies in ((0, n0), (1, n)))
        top = selection.tolist().index(max(selection))
        k = int(counts[top])
        p_a = beta.ppf(alpha, k, n - k + 1) if k else 0.0
        found = certify(classifier, x, sigma, n0, n, alpha, seed, index=i, any_range=True)
        if p_a > 0.5:
            exact = sigma * norm.ppf(p_a)
            assert found[0] == top and exact - 1e-6 <= found[1] + 1e-8 and found[1] < exact
        else:
            assert found == (ABSTAIN, 0.0)
        results.append(found[0])
    assert ABSTAIN in results and (classifier is by_digits or {0, 1} <= {*results})


def test_fixed_n_asks_for_n0_and_then_n_fresh_copies():
    x = torch.zeros(1, 2, 2)
    trial = fixed_n(5, x, 0.5, 30, 200, 0.01, 9, (0.25,), "two-sided")
    index, image, generator, copies = next(trial)
    assert (index, copies) == (5, 30) and image is x
    assert generator.initial_seed() == generator_for(9, 5, 0, CPU).initial_seed()
    index, image, generator, copies = trial.send(torch.tensor([0, 30, 0]))
    assert (index, copies) == (5, 200) and image is x
    assert generator.initial_seed() == generator_for(9, 5, 1, CPU).initial_seed()
    with pytest.raises(StopIteration) as end:
        trial.send(torch.tensor([30, 140, 30]))
    top, counts, n, bounds = end.value.value
    assert (top, counts.tolist(), n) == (1, [30, 140, 30], 200)  # never the selection's copies
    p_a = beta.ppf(0.01, 140, 61)
    assert bounds["one-sided"] == pytest.approx((p_a, 1 - p_a), rel=1e-12)
    pair = beta.ppf(0.009, 140, 61), beta.isf(0.001, 31, 170)
    assert bounds["two-sided"] == pytest.approx(pair, rel=1e-12)


def test_of_classes_with_equally_many_copies_the_first_is_selected():
    top, *_ = drive(fixed_n(0, torch.zeros(1), 0.5, 10, 10, 0.01, 0, (), ""), [[0, 5, 5]] * 2)
    assert top == 1


@pytest.mark.parametrize("batch", [50, 100, 400])
@pytest.mark.parametrize(("procedure", "n"), [(fixed_n, 330), (sequential, 1500)])
def test_certificates_do_not_depend_on_order_or_company(tiny_vit, batch, procedure, n):
    vit, random = tiny_vit(), torch.Generator().manual_seed(3)
    images = [*enumerate(torch.rand(7, 1, 8, 8, generator=random))]
    with torch.inference_mode():                               # centred, it answers every class
        centre = vit(torch.rand(300, 1, 8, 8, generator=random)).mean(0)

    def run(images):
        how = (0.25, 40, n, 0.01, 2, (0.1, 0.25), "one-sided", procedure, batch)
        trials = certify_all(lambda x: vit(x) - centre, images, *how)
        return {i: (top, counts.tolist(), n, bounds) for i, _, top, counts, n, bounds in trials}

    whole = run(images)
    assert sorted(whole) == list(range(7)) and len({str(row[1]) for row in whole.values()}) > 3
    assert run(images[::-1]) == whole
    assert run(images[::3]) | run(images[1::3]) | run(images[2::3]) == whole
    assert run(images[4:5]) == {4: whole[4]}
    for i, x in images[:3]:                                    # and certify() is the same
        for bound in c.BOUNDS:
            found = certify(lambda x: vit(x) - centre, x, 0.25, 40, n, 0.01, 2, i, batch, bound,
                            procedure=procedure, radii=(0.1, 0.25))
            if procedure is fixed_n or bound == "one-sided":
                assert found == certificate(whole[i][0], *whole[i][3][bound], 0.25)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_rows_logits_do_not_depend_on_its_place_or_neighbours(tiny_vit, batch):
    vit, random = tiny_vit(), torch.Generator().manual_seed(0)
    crowd = torch.rand(batch, 1, 8, 8, generator=random)
    x = torch.rand(1, 8, 8, generator=random)
    with torch.inference_mode():
        alike = vit(x.expand(batch, 1, 8, 8))
        assert (alike == alike[0]).all()
        for place in {0, batch // 3, batch - 1}:
            crowd[place] = x
            assert torch.equal(vit(crowd)[place], alike[0])


def test_any_generator_is_a_procedure():
    """Five draws of 100 copies, of which the smallest count of class 1 is believed."""
    def least_of_five(index, x, sigma, n0, n, alpha, seed, radii, bound):
        generator, least = generator_for(seed, index, 1, x.device), 100
        for _ in range(5):
            counts = yield index, x, generator, 100
            least = min(least, int(counts[1]))
        pair = lower_confidence_bound(least, 100, alpha / 5), 0.25
        return 1, counts, 500, dict.fromkeys(c.BOUNDS, pair)

    images = at_distance([0.4, 0.7, 0.1, 0.5, 0.9])
    trials = certify_all(half_space, images, 0.5, 1, 1, 0.05, procedure=least_of_five, batch=200)
    found = {index: (n, bounds["two-sided"]) for index, _, _, _, n, bounds in trials}
    for i, x in images:
        stream = generator_for(0, i, 1, CPU)
        every = [expected_counts(x, stream, 100, 0.5, half_space, 2)[1] for _ in range(5)]
        p_a = lower_confidence_bound(int(min(every)), 100, 0.01)
        assert found[i] == (500, (p_a, 0.25))
        alone = certify(half_space, x, 0.5, 1, 1, 0.05, index=i, any_range=True,
                        procedure=least_of_five)
        radius = 0.25 * (norm.ppf(p_a) - norm.ppf(0.25))
        assert alone[0] == 1 and alone[1] == pytest.approx(radius, abs=2e-6)


# -- Counting --------------------------------------------------------------------------------------

COPIES = (100, 250, 37, 1, 1000, 199)
PIXELS = torch.rand(len(COPIES), 1, 3, 3, generator=torch.Generator().manual_seed(9))


def ask(rows, seed=0):
    return [(i, PIXELS[i], generator_for(seed, i, 1, CPU), COPIES[i]) for i in rows]


@pytest.mark.parametrize("batch", BATCHES)
def test_counts_are_those_of_a_plain_loop_for_any_batch_and_pooling(batch):
    expected = torch.stack([expected_counts(*request, sigma=0.5) for _, *request in ask(range(6))])
    assert expected.sum(1).tolist() == list(COPIES)
    one_each = [[i] for i in range(6)]
    for pools in ([range(6)], [[5, 4, 3, 2, 1, 0]], one_each, [[1, 4], [3, 0, 2], [5]]):
        for pool in pools:
            counts = count_under_noise(by_digits, ask(pool), 0.5, batch)
            assert counts.dtype == torch.int64 and torch.equal(counts, expected[list(pool)])


@pytest.mark.parametrize("batch", BATCHES)
def test_every_forward_pass_has_one_shape_and_there_are_no_more_than_needed(batch):
    seen = []
    count_under_noise(lambda x: seen.append(x.clone()) or by_digits(x), ask(range(6)), 0.5, batch)
    chunks = sum(-(-copies // CHUNK) for copies in COPIES)
    slots = max(1, batch // CHUNK)
    assert {tuple(x.shape) for x in seen} == {(batch, 1, 3, 3)}
    assert len(seen) == -(-chunks // slots) * slots * CHUNK // batch
    rows = {row.numpy().tobytes() for row in torch.cat(seen)}                # padding repeats some
    drawn = {row.numpy().tobytes()
             for _, *request in ask(range(6)) for row in noisy_copies(*request, sigma=0.5)}
    assert drawn <= rows and len(rows - drawn) <= 1            # at most an empty slot's zeros


@pytest.mark.parametrize("batch", [30, 150, 250])
def test_a_batch_that_would_split_chunks_is_refused(batch):
    with pytest.raises(ValueError, match=f"divisor of 100, not {batch}"):
        count_under_noise(by_digits, ask([0]), 0.5, batch)


def test_a_request_continues_its_stream_where_the_last_one_ended():
    stream, whole = generator_for(0, 3, 1, CPU), generator_for(0, 3, 1, CPU)
    parts = sum(count_under_noise(by_digits, [(3, PIXELS[0], stream, copies)], 0.5)
                for copies in (100, 700, 250))
    expected = count_under_noise(by_digits, [(3, PIXELS[0], whole, 1050)], 0.5, 400)
    assert torch.equal(parts, expected)


def test_streams_are_injective_in_32_bits():
    key = lambda seed, i, phase: generator_for(seed, i, phase, CPU).initial_seed()
    phases = range(4)                                          # select, estimate, predict, check
    keys = [key(0, i, phase) for i in range(20_000) for phase in phases]
    assert len(set(keys)) == len(keys) and max(keys) < 2**32
    others = {key(seed, i, phase) for seed in (1, 2, 3) for i in range(2000) for phase in phases}
    assert len(others) == 24_000 and len(others & set(keys)) < 10            # chance meetings
    for seed in range(50):
        assert len({key(seed, i, phase) for i in (0, 1, 2**30 - 1) for phase in phases}) == 12
    for seed, index in ((0, 2**30), (0, -1), (2**32, 0), (-1, 0)):
        with pytest.raises(ValueError, match=f"seed and 4 . index .*{seed}, {4 * index}$"):
            generator_for(seed, index, 0, CPU)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_image_and_phase_can_be_read_off_a_streams_key(seed):
    """So no two share one: the lines of generator_for, undone from the last to the first.

    A shift by 16 undoes itself, one by 15 with the help of one by 30; a product with an odd number
    is undone by the number's inverse modulo 2^32.
    """
    def undo(key):
        for word in (0x9E3779B9, seed):
            key ^= key >> 16
            key = key * pow(0x846CA68B, -1, 2**32) % 2**32
            key ^= key >> 15 ^ key >> 30
            key = key * pow(0x7FEB352D, -1, 2**32) % 2**32
            key ^= key >> 16
            key = (key - word * 0x85EBCA6B) % 2**32
        return divmod(key, 4)

    for index in (0, 1, 359, 9999, 49_999, 2**30 - 1):
        for phase in range(4):
            assert undo(generator_for(seed, index, phase, CPU).initial_seed()) == (index, phase)


def test_streams_begin_with_other_numbers():
    first = [tuple(torch.randn(4, generator=generator_for(seed, i, phase, CPU)).tolist())
             for seed in (0, 1) for i in range(300) for phase in (0, 1, 2)]
    assert len({number for row in first for number in row}) > 0.999 * 4 * len(first)


def test_noise_is_standard_normal_and_independent_between_images_and_phases():
    sigma, x, draws = 0.5, torch.full((1, 4, 4), 0.3), []

    def watch(copies):
        draws.append((copies - x) / sigma)
        return copies.flatten(1)

    streams = [*itertools.product(range(6), (0, 1, 2))]
    requests = [(i, x, generator_for(0, i, phase, CPU), 1000) for i, phase in streams]
    count_under_noise(watch, requests, sigma)
    every = torch.cat(draws).double().view(len(streams), -1).numpy()         # 18 of 16 000 each
    assert abs(every.mean()) < 5 / math.sqrt(every.size)
    assert abs(every.std() - 1) < 5 / math.sqrt(2 * every.size)
    assert kstest(every.flatten(), "norm").pvalue > 1e-4
    correlations = np.corrcoef(every)[np.triu_indices(len(every), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(every.shape[1])
    pixels = every.reshape(-1, 16)
    between = np.corrcoef(pixels.T)[np.triu_indices(16, 1)]
    assert np.abs(between).max() < 5 / math.sqrt(len(pixels))
    assert abs((pixels[1:, 0] * pixels[:-1, 0]).mean()) < 5 / math.sqrt(len(pixels))


# -- The sequential test ---------------------------------------------------------------------------


def integrated_log_e_value(k, n, p):
    """The mixture by quadrature.

    With q = sin^2 t the Beta(1/2, 1/2) law is uniform in t, and (p, 1] is t > asin sqrt p.
    """
    def log_ratio(t):
        successes = k * (2 * np.log(np.sin(t)) - np.log(p)) if k else 0.0
        failures = (n - k) * (2 * np.log(np.cos(t)) - np.log1p(-p)) if n > k else 0.0
        return successes + failures

    low, high = math.asin(math.sqrt(p)), math.pi / 2
    width = 1 / math.sqrt(n)
    best = min(max(math.asin(math.sqrt(k / n)), low), high - 1e-12)
    top = float(log_ratio(best))
    steps = np.array([-12, -6, -3, -1, 0, 1, 3, 6, 12])
    points = sorted({low, high, *np.clip(best + width * steps, low, high)})
    ratio = lambda t: np.exp(log_ratio(t) - top)
    pieces = [quad(ratio, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in itertools.pairwise(points)]
    return top + math.log(math.fsum(pieces) / (high - low))


@pytest.mark.filterwarnings("ignore")                          # log(0), and quad's of zeros
@pytest.mark.parametrize(("k", "n"), [
    (0, 1), (1, 1), (0, 50), (50, 50), (3, 10), (8, 9), (700, 1000), (99_000, 10**5)])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.75, 0.98])
def test_e_value_is_the_integral_that_its_docstring_states(k, n, p):
    expected = integrated_log_e_value(k, n, p)
    if expected > -500:                                        # below, the density underflows
        assert log_e_value(k, n, p) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    else:
        assert log_e_value(k, n, p) < -400


@pytest.mark.parametrize("p", [0.05, 0.5, 0.84, 0.99])
def test_e_value_is_a_martingale_at_p_and_a_supermartingale_below(p):
    e = {(k, n): math.exp(log_e_value(k, n, p)) for n in range(1, 41) for k in range(n + 1)}
    assert p * e[1, 1] + (1 - p) * e[0, 1] == pytest.approx(1, rel=1e-9)     # it starts at 1
    for (k, n), now in e.items():
        if n < 40:
            for s in (p, 0.7 * p, 0.1 * p):
                then = s * e[k + 1, n + 1] + (1 - s) * e[k, n + 1]
                assert then == pytest.approx(now, rel=1e-9) if s == p else then < now * (1 + 1e-9)
    for n in (5, 40):
        mean = lambda s, n=n: sum(binom.pmf(k, n, s) * e[k, n] for k in range(n + 1))
        assert mean(p) == pytest.approx(1, rel=1e-9) and mean(0.1 * p) < mean(0.7 * p) < 1


@pytest.mark.parametrize(("k", "n"), [
    (1, 1), (4, 5), (1, 20), (77, 100), (9_100, 10_000), (100_000, 100_000)])
def test_e_value_falls_with_p_below_k_over_n(k, n):
    values = log_e_value(k, n, np.linspace(0, k / n, 400)[1:-1])
    assert np.isfinite(values).all() and (np.diff(values) < 1e-9).all() and values[0] > values[-1]


@given(st.integers(1, 20_000), st.floats(0, 1), st.sampled_from([0.001, 0.01, 0.05]))
@settings(max_examples=60, deadline=None)
def test_anytime_bound_is_the_crossing_and_below_clopper_pearson(n, share, alpha):
    k = max(1, round(share * n))
    bound = anytime_lower_bound(k, n, alpha)
    assert 0 < bound < k / n
    assert log_e_value(k, n, bound) == pytest.approx(math.log(1 / alpha), abs=1e-5)
    assert bound <= lower_confidence_bound(k, n, alpha) * (1 + 1e-12)        # Markov's inequality
    assert bound < anytime_lower_bound(k, n, alpha * 1.5)
    assert k == n or bound < anytime_lower_bound(k + 1, n, alpha)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n", [1, 100, 100_000])
def test_anytime_bound_at_the_ends_without_a_warning(n):
    assert anytime_lower_bound(0, n, 0.001) == 0
    assert anytime_lower_bound(n, n, 0.001) < 0.001 ** (1 / n)
    first = min(n, 1000)
    for counts, bound in itertools.product(([first, 0], [0, first]), c.BOUNDS):
        trial = sequential(0, torch.zeros(1), 0.25, 9, n, 0.001, 0, (0.25, 0.5), bound)
        assert drive(trial, [[9, 0], counts])[2] == first      # settled at the first look


def count_that_exceeds(bound, n, p, alpha):
    """The smallest k with bound(k, n, alpha) > p (n + 1 if none), by bisection."""
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle, n, alpha) > p else (middle + 1, high)
    return low


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("p", [0.5, 0.84, 0.97])
def test_peeking_ruins_clopper_pearson_and_not_the_anytime_bound(p):
    alpha, runs = 0.05, 20_000
    random = np.random.default_rng(11)
    looks = np.arange(100, 10_001, 100)
    k = random.binomial(100, p, (runs, len(looks))).cumsum(1)

    def errs(bound, looks, k, alpha):
        least = [count_that_exceeds(bound, int(n), p, alpha) for n in looks]
        return (k >= least).any(1).mean()

    naive = errs(lower_confidence_bound, looks[9::10], k[:, 9::10], alpha)   # at ten looks
    once = errs(lower_confidence_bound, looks[-1:], k[:, -1:], alpha)
    anytime = errs(anytime_lower_bound, looks, k, alpha)                     # at a hundred
    last = errs(lower_confidence_bound, looks[-1:], k[:, -1:], (1 - EARLY) * alpha)
    early = errs(anytime_lower_bound, looks, k, EARLY * alpha)
    assert 0.10 < naive < 0.25 and once <= binom.ppf(1 - 1e-6, runs, alpha) / runs
    assert 0 < anytime < alpha                                 # Ville's inequality; not vacuous
    assert 0 < early + last < alpha                            # what sequential() does


SIGMA, RADII = 0.25, (0.25, 0.5)


def first_look(k, n=1000, most=100_000, radii=RADII, before=None):
    """(one-sided p_a, whether sequential() stops) after k of the first n draws."""
    trial = sequential(0, torch.zeros(1), SIGMA, 10, most, 0.001, 0, radii, "one-sided")
    assert next(trial)[-1] == 10 and trial.send(torch.tensor([0, 10]))[-1] == n
    start = dict.fromkeys(c.BOUNDS, (0.0, 1.0))
    bounds = bounds_after([n - k, k], 1, n, most, 0.001, start)
    assert bounds["one-sided"][1] == 1 - bounds["one-sided"][0]
    try:
        trial.send(torch.tensor([n - k, k]))
    except StopIteration as end:
        assert end.value[:1] + end.value[2:] == (1, n, bounds)
        return bounds["one-sided"][0], True
    return bounds["one-sided"][0], False


@pytest.mark.parametrize("n", [50, 1000, 12_345, 100_000])
def test_looks_are_whole_chunks_that_grow_by_a_tenth_up_to_n(n):
    """Three deviations above a radius of the table: too few to certify it, too many to stop."""
    trial = sequential(0, torch.zeros(1), SIGMA, 10, n, 0.001, 0, (0.5,), "one-sided")
    next(trial)
    request, drawn, looks = trial.send(torch.tensor([10, 0])), 0, []
    with pytest.raises(StopIteration):
        while True:
            looks.append(looks[-1] + request[-1] if looks else request[-1])
            mean, variance = looks[-1] * norm.cdf(2), looks[-1] * norm.cdf(2) * norm.sf(2)
            k = round(min(looks[-1], mean + 3 * math.sqrt(variance))) - drawn
            drawn += k
            request = trial.send(torch.tensor([k, request[-1] - k]))
    assert looks[0] == min(1000, n) and looks[-1] == n
    assert all(look % CHUNK == 0 for look in looks[:-1])
    assert all(1.1 * a <= b < 1.1 * a + CHUNK for a, b in itertools.pairwise(looks[:-1]))


def test_stops_when_the_largest_radius_is_certified_and_not_before():
    bound, stop = first_look(1000)
    assert stop and certified_radius(bound, SIGMA) > 0.5
    bound, stop = first_look(950)                              # Phi(1) = 0.84, not Phi(2) = 0.977
    assert 0.25 < certified_radius(bound, SIGMA) < 0.5 and binom.cdf(950, 1000, norm.cdf(2)) < 0.01
    assert stop == (integrated_log_e_value(50, 1000, norm.sf(2)) >= math.log(100))
    assert not first_look(972)[1]


def test_stops_when_the_next_radius_is_futile():
    bound, stop = first_look(400)                              # not even a majority
    assert stop and bound < 0.5
    assert not first_look(500)[1]
    for k in range(700, 1000, 7):                              # the next radius up is what counts
        bound, stop = first_look(k)
        after = next((r for r in (0, *RADII) if r > SIGMA * norm.ppf(bound)), None)
        against = after and integrated_log_e_value(1000 - k, 1000, norm.sf(after / SIGMA))
        assert stop == (after is None or against >= math.log(100))


def test_stops_at_n_and_keeps_the_best_bound():
    assert first_look(550, most=1000)[1] and not first_look(550, most=2000)[1]

    def one_sided(k, n, before=0.0):
        start = dict.fromkeys(c.BOUNDS, (before, 1 - before))
        return bounds_after([n - k, k], 1, n, 1000, 0.001, start)["one-sided"][0]

    assert one_sided(550, 1000, 0.83) == 0.83                  # all looks hold: the largest counts
    last = lower_confidence_bound(900, 1000, 0.8 * 0.001)
    assert one_sided(900, 1000) == last > anytime_lower_bound(900, 1000, 0.2 * 0.001)
    assert one_sided(900, 999) == anytime_lower_bound(900, 999, 0.2 * 0.001)


def looks_of(n):
    looks = [0]
    while looks[-1] < n:
        look = max(1000, math.ceil(looks[-1] * 1.1))
        looks.append(min(n, math.ceil(look / CHUNK) * CHUNK))
    return looks


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("m", "bound"), [
    (80, "one-sided"), *(pytest.param(400, bound, marks=pytest.mark.slow) for bound in c.BOUNDS),
    *(pytest.param(4000, bound, marks=pytest.mark.soak) for bound in c.BOUNDS)])
def test_sequential_tables_match_fixed_n_with_a_fraction_of_the_draws(m, bound, monkeypatch):
    """Synthetic images like a trained network's.

    A fifth is hopeless, a fifth certain, the others are spread over all radii.
    """
    sigma, alpha, n, table_radii = 0.25, 0.001, 100_000, (0.0, 0.25, 0.5, 0.75)
    cached = functools.cache(anytime_lower_bound)
    monkeypatch.setattr(extras.sequential, "anytime_lower_bound", cached)
    random = np.random.default_rng(4)
    parts = ((m // 5, -1, 0), (m // 5, 1, 1.5), (m - 2 * (m // 5), -0.1, 1))
    distance = np.concatenate([random.uniform(low, high, size) for size, low, high in parts])
    p_a = norm.cdf(distance / sigma)
    rivals = (1 - p_a)[:, None] * random.dirichlet((3, 1, 1, 1), m)
    p = np.concatenate([p_a[:, None], rivals], axis=1)         # images classes
    true = {"one-sided": distance,
            "two-sided": sigma / 2 * (norm.ppf(p_a) - norm.ppf(rivals.max(1)))}
    looks = looks_of(n)
    drawn = np.stack([random.multinomial(size, p) for size in np.diff(looks)], axis=1)

    radius = lambda pair: sigma / 2 * (norm.ppf(pair[0]) - norm.ppf(pair[1]))
    accuracy = lambda radii: np.array([np.mean((radii > 0) & (radii >= r)) for r in table_radii])
    found, total = {(kind, one): [] for kind in ("fixed", "early") for one in c.BOUNDS}, 0
    for path in drawn:
        selection, x = [100, 0, 0, 0, 0], torch.zeros(1)
        whole = fixed_n(0, x, sigma, 100, n, alpha, 0, table_radii, bound)
        early = sequential(0, x, sigma, 100, n, alpha, 0, table_radii, bound)
        answers = {"fixed": drive(whole, [selection, path.sum(0)]),
                   "early": drive(early, [selection, *path])}
        total += answers["early"][2]
        for kind, one in found:
            found[kind, one].append(radius(answers[kind][3][one]))
    found = {key: np.array(radii) for key, radii in found.items()}

    difference = np.abs(accuracy(found["early", bound]) - accuracy(found["fixed", bound]))
    assert (difference <= max(1 / m, 0.004) + 1e-9).all()
    for one in c.BOUNDS:                                       # both hold, wherever it stopped
        assert np.sum(found["early", one] > true[one]) <= binom.ppf(1 - 1e-6, m, alpha)
    assert total < 0.17 * m * n


# -- Sound in floating point -----------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "levels"), [
    (0.25, 16), (0.25, 255), (1.0, 16), (1.0, 255), (0.12, 255)])
def test_grid_table_errs_by_less_than_8_units(sigma, levels):
    noise = GridNoise(sigma, levels, CPU)
    entries = np.unique(np.linspace(0, len(noise.table) - 1, 300).round().astype(int))
    scale = Decimal(2**BITS)
    for j in entries:
        value = int(j) - noise.reach                           # entry j: P[rounded noise <= value]
        exact = exact_cdf((Decimal(value) + Decimal("0.5")) / (Decimal(sigma) * levels)) * scale
        assert abs(int(noise.table[j]) - exact) < 8 < SLACK
    beyond = exact_cdf(Decimal(noise.reach) / (Decimal(sigma) * levels))
    assert beyond > 1 - 1 / scale                              # past the table there is nothing
    assert (noise.table.diff() >= 0).all()


def integers(noise, x, copies=CHUNK, seed=0):
    """(the integers added to x, whether each copy may count)."""
    z, sure = noise(x, torch.Generator().manual_seed(seed), copies)
    assert z.shape == (copies, *x.shape) and sure.shape == (copies,)
    assert torch.equal(z, (z * noise.levels).round() / noise.levels)         # on the grid
    return ((z * noise.levels).round() - (x * noise.levels).round()).long(), sure


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 16), (0.5, 255), (0.02, 16)])
def test_grid_noise_is_the_rounded_gaussian(sigma, levels):
    random = torch.Generator().manual_seed(1)
    x = torch.randint(levels + 1, (1, 8, 8), generator=random) / levels
    drawn, sure = integers(GridNoise(sigma, levels, CPU), x, copies=3000)
    assert sure.all() and drawn.unique().numel() > 2
    values, observed = np.unique(drawn.numpy(), return_counts=True)
    edges = np.arange(values[0], values[-1] + 2) - 0.5
    inner = [float(exact_cdf(edge / (sigma * levels))) for edge in edges[1:-1]]
    share = np.diff([0, *inner, 1])
    counts = np.zeros(len(share))
    counts[values - values[0]] = observed
    expected, total = share * counts.sum(), counts.sum()
    keep = expected >= 10
    rest = [(counts[~keep].sum(), expected[~keep].sum())] if expected[~keep].sum() >= 5 else []
    pairs = [*zip(counts[keep], expected[keep], strict=True), *rest]
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    assert chi2.sf(statistic, len(pairs) - 1) > 1e-4
    assert abs(drawn.double().mean()) < 5 * drawn.double().std() / math.sqrt(total)


@pytest.mark.parametrize(("sigma", "levels", "expected"), [
    (1e-12, 16, 0), (1e-4, 255, 0), (4.0, 255, 4.0), (1, 16, 1)])
def test_grid_noise_for_tiny_and_large_sigma(sigma, levels, expected):
    x = torch.tensor([0, 1, levels]).view(1, 1, 3) / levels
    drawn, sure = integers(GridNoise(sigma, levels, CPU), x, copies=10_000)
    spread = (drawn.double().std() / levels).item()
    assert sure.all() and spread == pytest.approx(expected, rel=0.02, abs=0)


def test_an_image_off_the_grid_is_refused():
    """100/255 is no sixteenth: rounding it would certify another picture."""
    with pytest.raises(ValueError, match="grid 1/16"):
        GridNoise(0.25, 16, CPU)(torch.full((1, 2, 2), 100 / 255), None, CHUNK)


def test_a_draw_that_the_tables_last_bits_would_decide_does_not_count(monkeypatch):
    noise, x = GridNoise(0.25, 16, CPU), torch.zeros(1, 1, 1)
    entries = [int(t) for t in noise.table]
    middle = len(entries) // 2
    steps = (-1000, -65, -64, -1, 0, 1, 64, 65, 1000)
    bits = [entries[j] + step for j in (middle - 3, middle, middle + 2) for step in steps]
    bits = (bits * CHUNK)[:CHUNK]
    drawn = torch.tensor(bits).view(CHUNK, 1, 1, 1)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: drawn)
    added, sure = integers(noise, x)
    for value, may, b in zip(added.flatten().tolist(), sure.tolist(), bits, strict=True):
        assert value == sum(t <= b for t in entries) - noise.reach
        assert may == (min(abs(t - b) for t in entries) > SLACK)
    counts = count(lambda x: torch.eye(2)[[0] * len(x)], x, noise, None, 60)
    assert counts.tolist() == [int(sure[:60].sum()), 0] and 0 < sure[:60].sum() < 60


def test_grid_noise_does_not_certify_logits_that_are_none():
    noise, x = GridNoise(0.25, 16, CPU), torch.full((1, 1, 1), 0.5)
    broken = lambda z: torch.stack([z.flatten(), 1 / (z.flatten() - 0.5)], dim=1)        # 1 / 0
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        count(broken, x, noise, torch.Generator().manual_seed(0), 300)


def on_grid(f, x, sigma, levels, index=0, n0=100, n=500, alpha=0.001, bound="one-sided"):
    """(prediction, radius) of extras/integer_noise.py."""
    args = SimpleNamespace(sigma=sigma, n0=n0, n=n, alpha=alpha, seed=0, bound=bound)
    return certify_on_grid(f, x, GridNoise(sigma, levels, CPU), index, args)


def test_sound_certificates_of_a_half_space_hold_for_the_rounded_classifier():
    """f after rounding is the base classifier: its exact probability may not be exceeded."""
    sigma, levels, alpha, m = 0.25, 16, 0.05, 400
    along = lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1)[:, 0] - 0.5], dim=1)
    values = [i % 8 + 8 for i in range(m)]                     # x at 0 to 7/16 beyond the plane
    step = Decimal(sigma) * levels
    true = {v: float(exact_cdf(Decimal(v - 8.5) / step)) for v in {*values}}             # P[> 8]
    wrong = 0
    for i, v in enumerate(values):
        x = torch.full((1, 1, 1), v / levels)
        top, radius = on_grid(along, x, sigma, levels, i, 50, 500, alpha)
        p = true[v] if top == 1 else 1 - true[v]
        wrong += top != ABSTAIN and radius > sigma * norm.ppf(p)
    assert 1 <= wrong <= binom.ppf(1 - 1e-6, m, alpha)


# -- What a radius is about: the image that got the noise, and the arithmetic that was done --------


def test_certifying_the_resized_image_claims_a_radius_that_the_small_one_does_not_have():
    """f: is the mean of the image, resized to 224 by the model, above a half?

    It is linear, so the true distances are known.
    """
    resize = build_vit("vit_digits", 2, image_size=224, patch_size=16, mean=(0,), std=(1,)).prepare

    def f(x):
        return torch.stack([torch.zeros(len(x)), resize(x).mean(dim=(1, 2, 3)) - 0.5], dim=1)

    small = torch.full((1, 32, 32), 0.51)
    weights = torch.zeros(1, 1, 32, 32, requires_grad=True)
    f(weights)[0, 1].backward()
    distance = 0.01 / weights.grad.norm().item()               # of `small`, among 32 x 32 images
    assert 0.3 < distance < 0.35

    prediction, radius = certify(f, small, 0.25, n0=100, n=2000)
    _, wrong = certify(f, resize(small[None])[0], 0.25, n0=100, n=2000)
    assert prediction == 1 and 0.8 * distance < radius < distance
    assert wrong > 2 * distance                                # true of 224 x 224, false of 32 x 32
    beyond = small - wrong * 0.9 * weights.grad[0] / weights.grad.norm()
    assert f(beyond[None]).argmax() == 0


def test_floating_point_noise_certifies_what_is_false_and_grid_noise_does_not():
    """Noise around 1 leaves multiples of 2^-24; noise around 0 mostly does not.

    A classifier that looks at this is certified for class 1 far beyond the image 0, where g answers
    class 0: in real arithmetic both have probability 0. Integer noise closes the gap: what it
    certifies around 1 also holds at 0.
    """
    def f(x):
        coarse = (x.double() * 2**24).frac() == 0
        return torch.stack([~coarse.flatten(), coarse.flatten()], dim=1).float()

    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    prediction, radius = certify(f, one, 0.3, n=20_000)
    assert prediction == 1 and radius > 1                      # |1 - 0| = 1: "g(0) = 1" is claimed
    assert predict(f, zero, 0.3, n=20_000) == 0                # and false
    for x in (one, zero):
        assert on_grid(f, x, 0.3, 16, n=20_000)[0] == 1
