"""certify.py, its mathematics and its sampling: against closed forms, exact binomial sums, integrals and brute force."""

import csv
import functools
import itertools
import json
import math
import types
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.integrate import quad
from scipy.stats import beta, binom, binomtest, chi2, kstest, norm

import certify as c
from certify import (
    ABSTAIN,
    CHUNK,
    FixedN,
    GaussianNoise,
    GridNoise,
    Sequential,
    anytime_lower_bound,
    certified_radius,
    certify,
    certify_all,
    clear_winner,
    count_classes,
    excess,
    generator_for,
    log_e_value,
    lower_confidence_bound,
    plot,
    predict,
    read_rows,
    round_down,
    summarise,
    table,
)
from model import build_vit

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
BATCHES = (1, 2, 5, 10, 20, 25, 50, 100, 200, 400)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)                                          # these networks are too small for more
    yield
    torch.set_num_threads(before)


def exact_cdf(x):
    """Phi(x) to 50 digits: 1/2 + phi(x) (x + x^3/3 + x^5/15 + ...), a series of positive terms for x > 0."""
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


# -- Clopper-Pearson and the radius ------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.4])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_lower_bound_is_where_the_exact_binomial_tail_is_alpha(n, alpha):
    for k in range(1, n + 1):
        assert float(exact_tail(k, n, Fraction(lower_confidence_bound(k, n, alpha)))) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("n", [1, 3, 10, 100, 1000])
def test_lower_bound_covers_every_p(n, alpha):
    k = np.arange(n + 1)
    bounds = np.array([lower_confidence_bound(int(i), n, alpha) for i in k])
    worst = bounds[1:] * (1 - 1e-12)                                  # coverage is lowest just below a bound
    for p in (*np.linspace(0, 1, 41), *worst[:: max(1, n // 50)]):
        assert binom.pmf(k[bounds <= p], n, p).sum() >= 1 - alpha - 1e-9
    assert binom.pmf(k[bounds <= worst[-1]], n, worst[-1]).sum() == pytest.approx(1 - alpha, abs=1e-6)    # and tight


@given(st.integers(1, 3000), st.floats(0, 1), st.floats(1e-4, 0.49))
@settings(max_examples=60, deadline=None)
def test_lower_bound_is_scipys_exact_interval_and_grows_with_k(n, share, alpha):
    k = round(share * n)
    bound = lower_confidence_bound(k, n, alpha)
    two_sided = binomtest(k, n).proportion_ci(confidence_level=1 - 2 * alpha, method="exact").low
    assert bound == pytest.approx(two_sided, abs=1e-9)
    assert bound <= k / n and (k == n or bound < lower_confidence_bound(k + 1, n, alpha))
    assert k == 0 or bound < lower_confidence_bound(k, n, alpha * 1.01)


@pytest.mark.parametrize("n", [1, 10, 100_000])
def test_lower_bound_at_the_ends(n):
    assert lower_confidence_bound(0, n, 0.001) == 0
    assert lower_confidence_bound(n, n, 0.001) == pytest.approx(0.001 ** (1 / n), rel=1e-12)


@pytest.mark.parametrize(("p_a", "p_b"), [(0.9, None), (0.51, None), (0.999, None), (0.9, 0.02), (0.4, 0.3), (0.7, 0.7)])
@pytest.mark.parametrize("sigma", [0.12, 0.5, 1.0])
def test_radius_is_half_sigma_times_the_difference_of_quantiles(p_a, p_b, sigma):
    radius = certified_radius(p_a, sigma, p_b)
    inverse = lambda p: math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * p - 1, dtype=torch.float64)))
    expected = sigma * inverse(p_a) if p_b is None else sigma / 2 * (inverse(p_a) - inverse(p_b))
    assert radius == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert certified_radius(p_a, sigma) == pytest.approx(certified_radius(p_a, sigma, 1 - p_a), rel=1e-12)


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
    assert float(f"{rounded:.6f}") == rounded                         # six decimals say it all


@pytest.mark.parametrize(("k", "n"), [(10, 10), (60, 80), (100, 100), (350, 400), (399, 400), (1000, 1000), (990, 1000)])
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_radius_as_written_is_sound_in_exact_arithmetic(k, n, sigma):
    """Were P[f = c_A] = Phi(R / sigma), a count of k or more would have chance <= alpha: no rounding error eats that."""
    alpha, p_a = 0.001, lower_confidence_bound(k, n, 0.001)
    radius = round_down(certified_radius(p_a, sigma))
    with localcontext(prec=60):
        at = lambda r: exact_tail(k, n, exact_cdf(Decimal(r) / Decimal(sigma)))
        assert p_a < 0.5 or at(f"{radius:.6f}") <= Decimal(alpha)
        assert p_a < 0.5 or at(radius + 2e-6) > Decimal(alpha)


# -- A linear classifier, for which everything is known ------------------------------------------------------------------

NORMAL = torch.tensor([0.6, -0.8, 0.0, 0.0]).view(1, 2, 2)


def half_space(x):
    """Class 1 on the far side of the plane <NORMAL, x> = 0: P[f(x + e) = 1] = Phi(<NORMAL, x> / sigma)."""
    return torch.stack([torch.zeros(len(x)), (x * NORMAL).sum((1, 2, 3))], dim=1)


def at_distance(distances):
    """(index, x) at these signed distances from the plane; index from 0."""
    along = torch.randn(len(distances), 1, 2, 2, generator=torch.Generator().manual_seed(5))
    along -= (along * NORMAL).sum((1, 2, 3), keepdim=True) * NORMAL
    return [(i, NORMAL * d + a) for i, (d, a) in enumerate(zip(distances, along, strict=True))]


def test_radius_exceeds_the_distance_to_the_plane_with_chance_alpha_only():
    sigma, alpha, m = 0.5, 0.05, 1000
    distances = np.random.default_rng(1).uniform(0.05, 0.8, m) * np.where(np.arange(m) % 2, 1, -1)
    wrong = 0
    images = at_distance(distances)
    for trial in certify_all(half_space, images, GaussianNoise(sigma), 20, FixedN(1000, alpha), seed=3, batch=400):
        prediction, radius = trial.certificate(sigma)
        true = distances[trial.index] if prediction == 1 else -distances[trial.index]    # g's distance on that side
        wrong += prediction != ABSTAIN and radius > true
    assert wrong <= binom.ppf(1 - 1e-6, m, alpha)
    assert wrong >= binom.ppf(1e-6, m, alpha / 2)                     # Clopper-Pearson wastes little at n = 1000


def test_radius_approaches_the_distance_like_one_over_root_n():
    sigma, x = 0.25, at_distance([0.25])[0][1]
    for n in (1000, 10_000, 100_000):
        prediction, radius = certify(half_space, x, sigma, n0=100, n=n, alpha=0.001, seed=1, batch=400, any_range=True)
        deviation = sigma * math.sqrt(norm.cdf(1) * norm.sf(1) / n) / norm.pdf(1)
        assert prediction == 1 and 0.25 - 7 * deviation < radius < 0.25                   # about 3.1 deviations below


def test_predict_is_right_far_from_the_plane_and_abstains_on_it():
    for d, expected in ((0.5, 1), (-0.5, 0), (0.2, 1)):
        assert predict(half_space, at_distance([d])[0][1], 0.5, n=1000, alpha=0.001, any_range=True) == expected
    small = dict(n=200, alpha=0.05, any_range=True)
    on_it = [predict(half_space, x, 0.5, **small, index=i) for i, x in at_distance(np.zeros(400))]
    answers = sum(guess != ABSTAIN for guess in on_it)
    assert 1 <= answers <= binom.ppf(1 - 1e-6, 400, 0.05)
    near = [predict(half_space, x, 0.5, **small, index=i) for i, x in at_distance(np.full(200, 0.03))]
    assert near.count(ABSTAIN) > 100 and near.count(0) <= binom.ppf(1 - 1e-6, 200, 0.05)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
def test_predict_does_the_two_sided_binomial_test_on_the_top_two(monkeypatch, alpha):
    for first, second, third in itertools.product(range(0, 41, 4), range(0, 41, 4), (0, 3)):
        if not min(first, second) >= third or first + second == 0:
            continue
        counts = torch.tensor([third, first, second])
        monkeypatch.setattr(c, "count_under_noise", lambda *_, _counts=counts: _counts)
        half, n = Fraction(1, 2), first + second
        p_value = min(1, 2 * exact_tail(max(first, second), n, half))                     # symmetric under 1/2
        expected = ABSTAIN if p_value > Fraction(alpha) else 1 if first > second else 2
        assert predict(half_space, torch.zeros(1, 2, 2), 0.5, n=n, alpha=alpha) == expected, (first, second, third)
        assert clear_winner(counts, alpha) == expected


def test_a_classifier_that_always_answers_one_class_has_the_largest_radius():
    constant = lambda x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
    assert predict(constant, torch.zeros(1, 2, 2), 0.5, n=100) == 0
    for bound in c.BOUNDS:
        prediction, radius = certify(constant, torch.zeros(1, 2, 2), 0.5, n=100, bound=bound)
        p_a = (0.001 if bound == "one-sided" else 0.0005) ** (1 / 100)                    # n of n successes
        assert prediction == 0 and radius == pytest.approx(0.5 * norm.ppf(p_a), abs=2e-6)


# -- Counting ------------------------------------------------------------------------------------------------------------


def by_digits(x):
    """Seven classes from the fourth decimal of the first pixel: any change of a noisy copy shows, no rounding in f."""
    return torch.nn.functional.one_hot((x.flatten(1)[:, 0] * 1000).long() % 7, 7).float()


def noisy_copies(x, generator, copies, sigma):
    """Whole chunks, as drawn: the definition, by brute force."""
    chunks = -(-copies // CHUNK)
    return torch.cat([x + sigma * torch.randn(CHUNK, *x.shape, generator=generator) for _ in range(chunks)])


def expected_counts(x, generator, copies, sigma, classifier=by_digits, classes=7):
    return classifier(noisy_copies(x, generator, copies, sigma)[:copies]).argmax(1).bincount(minlength=classes)


COPIES = (100, 250, 37, 1, 1000, 199)
PIXELS = torch.rand(len(COPIES), 1, 3, 3, generator=torch.Generator().manual_seed(9))


def ask(rows, seed=0):
    return [(PIXELS[i], generator_for(seed, i, 1, CPU), COPIES[i]) for i in rows]


@pytest.mark.parametrize("batch", BATCHES)
def test_counts_are_those_of_a_plain_loop_for_any_batch_and_pooling(batch):
    expected = torch.stack([expected_counts(*request, sigma=0.5) for request in ask(range(6))])
    assert expected.sum(1).tolist() == list(COPIES)
    for pools in ([range(6)], [[5, 4, 3, 2, 1, 0]], [[i] for i in range(6)], [[1, 4], [3, 0, 2], [5]]):
        for pool in pools:
            counts = count_classes(by_digits, ask(pool), GaussianNoise(0.5), batch)
            assert counts.dtype == torch.int64 and torch.equal(counts, expected[list(pool)])


@pytest.mark.parametrize("batch", BATCHES)
def test_every_forward_pass_has_one_shape_and_there_are_no_more_than_needed(batch):
    seen = []
    count_classes(lambda x: seen.append(x.clone()) or by_digits(x), ask(range(6)), GaussianNoise(0.5), batch)
    chunks, slots = sum(-(-copies // CHUNK) for copies in COPIES), max(1, batch // CHUNK)
    assert {tuple(x.shape) for x in seen} == {(batch, 1, 3, 3)}
    assert len(seen) == -(-chunks // slots) * slots * CHUNK // batch
    rows = {row.numpy().tobytes() for row in torch.cat(seen)}                             # padding repeats some of them
    drawn = {row.numpy().tobytes() for request in ask(range(6)) for row in noisy_copies(*request, sigma=0.5)}
    assert drawn <= rows and len(rows - drawn) <= 1                                       # at most an empty slot's zeros


def test_a_request_continues_its_stream_where_the_last_one_ended():
    stream, whole = generator_for(0, 3, 1, CPU), generator_for(0, 3, 1, CPU)
    parts = sum(count_classes(by_digits, [(PIXELS[0], stream, copies)], GaussianNoise(0.5)) for copies in (100, 700, 250))
    assert torch.equal(parts, count_classes(by_digits, [(PIXELS[0], whole, 1050)], GaussianNoise(0.5), 400))


def test_streams_are_injective_in_32_bits():
    key = lambda seed, i, phase: generator_for(seed, i, phase, CPU).initial_seed()
    keys = [key(0, i, phase) for i in range(20_000) for phase in (0, 1, 2)]
    assert len(set(keys)) == len(keys) and max(keys) < 2**32
    others = {key(seed, i, phase) for seed in (1, 2, 3) for i in range(2000) for phase in (0, 1, 2)}
    assert len(others) == 18_000 and len(others & set(keys)) < 10                         # a hash's few chance meetings
    for seed in range(50):
        assert len({key(seed, i, phase) for i in (0, 1, 2**30 - 1) for phase in (0, 1, 2)}) == 9
    for seed, index in ((0, 2**30), (0, -1), (2**32, 0), (-1, 0)):
        with pytest.raises(ValueError, match=f"{max(seed, index, key=abs)}$"):
            generator_for(seed, index, 0, CPU)


def test_streams_begin_with_other_numbers():
    first = [tuple(torch.randn(4, generator=generator_for(seed, i, phase, CPU)).tolist())
             for seed in (0, 1) for i in range(300) for phase in (0, 1, 2)]
    assert len({number for row in first for number in row}) > 0.999 * 4 * len(first)


def test_noise_is_standard_normal_and_independent_between_images_and_phases():
    sigma, x = 0.5, torch.full((1, 4, 4), 0.3)
    draws = {}
    for i, phase in itertools.product(range(6), (0, 1, 2)):
        out, generator = torch.empty(CHUNK, 1, 4, 4), generator_for(0, i, phase, CPU)
        pieces = []
        for _ in range(10):
            assert GaussianNoise(sigma)(x, generator, out) is True
            pieces.append(((out - x) / sigma).flatten())
        draws[i, phase] = torch.cat(pieces).double().numpy()
    every = np.stack([*draws.values()])                                                   # 18 streams of 16 000
    assert abs(every.mean()) < 5 / math.sqrt(every.size)
    assert abs(every.std() - 1) < 5 / math.sqrt(2 * every.size)
    assert kstest(every.flatten(), "norm").pvalue > 1e-4
    correlations = np.corrcoef(every)[np.triu_indices(len(every), 1)]
    assert np.abs(correlations).max() < 5 / math.sqrt(every.shape[1])
    pixels = every.reshape(-1, 16)
    assert np.abs(np.corrcoef(pixels.T)[np.triu_indices(16, 1)]).max() < 5 / math.sqrt(len(pixels))
    assert abs((pixels[1:, 0] * pixels[:-1, 0]).mean()) < 5 / math.sqrt(len(pixels))


# -- The procedure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [half_space, by_digits])
def test_certificate_is_select_estimate_bound_abstain(classifier):
    sigma, n0, n, alpha, seed = 0.5, 50, 430, 0.01, 7
    images = at_distance([0.4, -0.2, 0.02, 0.0, 1.5])
    for i, x in images:
        selection = expected_counts(x, generator_for(seed, i, 0, CPU), n0, sigma, classifier).tolist()
        top = selection.index(max(selection))
        k = int(expected_counts(x, generator_for(seed, i, 1, CPU), n, sigma, classifier)[top])
        p_a = beta.ppf(alpha, k, n - k + 1) if k else 0.0
        prediction, radius = certify(classifier, x, sigma, n0, n, alpha, seed, index=i, any_range=True)
        if p_a > 0.5:
            assert prediction == top and sigma * norm.ppf(p_a) - 1e-6 <= radius + 1e-8 and radius < sigma * norm.ppf(p_a)
        else:
            assert (prediction, radius) == (ABSTAIN, 0.0)
    results = [certify(classifier, x, sigma, n0, n, alpha, seed, index=i, any_range=True)[0] for i, x in images]
    assert (ABSTAIN in results) and (classifier is by_digits or {0, 1} <= {*results})


@pytest.mark.parametrize("batch", [50, 100, 400])
@pytest.mark.parametrize("sequential", [False, True])
def test_certificates_do_not_depend_on_order_or_company(tiny_vit, batch, sequential):
    vit, generator = tiny_vit(), torch.Generator().manual_seed(3)
    rule = Sequential(1500, 0.01, 0.25, (0.1, 0.25)) if sequential else FixedN(330, 0.01)
    images = [*enumerate(torch.rand(7, 1, 8, 8, generator=generator))]
    with torch.inference_mode():                                      # centred, the random network answers every class
        centre = vit(torch.rand(300, 1, 8, 8, generator=generator)).mean(0)

    def run(images):
        trials = certify_all(lambda x: vit(x) - centre, images, GaussianNoise(0.25), 40, rule, seed=2, batch=batch)
        return {t.index: (t.top, t.k, t.n, tuple(t.counts.tolist()), *t.bounds.items()) for t in trials}

    whole = run(images)
    assert sorted(whole) == list(range(7)) and len({row[1] for row in whole.values()}) > 3
    assert run(images[::-1]) == whole
    assert run(images[::3]) | run(images[1::3]) | run(images[2::3]) == whole
    assert run(images[4:5]) == {4: whole[4]}


@pytest.mark.parametrize("batch", BATCHES)
def test_a_rows_logits_do_not_depend_on_its_place_or_neighbours(tiny_vit, batch):
    vit, generator = tiny_vit(), torch.Generator().manual_seed(0)
    crowd, x = torch.rand(batch, 1, 8, 8, generator=generator), torch.rand(1, 8, 8, generator=generator)
    with torch.inference_mode():
        alike = vit(x.expand(batch, 1, 8, 8))
        assert (alike == alike[0]).all()
        for place in {0, batch // 3, batch - 1}:
            crowd[place] = x
            assert torch.equal(vit(crowd)[place], alike[0])


# -- The sequential test -------------------------------------------------------------------------------------------------


def integrated_log_e_value(k, n, p):
    """The mixture by quadrature. With q = sin^2 t the Beta(1/2, 1/2) law is uniform in t, (p, 1] is t > asin sqrt p."""
    log_ratio = lambda t: (k * (2 * np.log(np.sin(t)) - np.log(p)) if k else 0.0) \
        + ((n - k) * (2 * np.log(np.cos(t)) - np.log1p(-p)) if n > k else 0.0)
    low, high = math.asin(math.sqrt(p)), math.pi / 2
    width = 1 / math.sqrt(n)
    best = min(max(math.asin(math.sqrt(k / n)), low), high - 1e-12)
    top = float(log_ratio(best))
    steps = np.array([-12, -6, -3, -1, 0, 1, 3, 6, 12])
    points = sorted({low, high, *np.clip(best + width * steps, low, high)})
    ratio = lambda t: np.exp(log_ratio(t) - top)
    pieces = [quad(ratio, a, b, epsabs=0, epsrel=1e-11)[0] for a, b in itertools.pairwise(points)]
    return top + math.log(math.fsum(pieces) / (high - low))


@pytest.mark.filterwarnings("ignore")                                 # log(0), and quad's where the integrand is 0
@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (3, 10), (8, 9), (700, 1000), (99_000, 10**5)])
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.75, 0.98])
def test_e_value_is_the_integral_that_its_docstring_states(k, n, p):
    expected = integrated_log_e_value(k, n, p)
    if expected > -500:                                               # where the density of q > p underflows it says -inf
        assert log_e_value(k, n, p) == pytest.approx(expected, rel=1e-7, abs=1e-7)
    else:
        assert log_e_value(k, n, p) < -400


@pytest.mark.parametrize("p", [0.05, 0.5, 0.84, 0.99])
def test_e_value_is_a_martingale_at_p_and_a_supermartingale_below(p):
    e = {(k, n): math.exp(log_e_value(k, n, p)) for n in range(1, 41) for k in range(n + 1)}
    assert p * e[1, 1] + (1 - p) * e[0, 1] == pytest.approx(1, rel=1e-9)                  # it starts at 1
    for (k, n), now in e.items():
        if n < 40:
            for s in (p, 0.7 * p, 0.1 * p):
                then = s * e[k + 1, n + 1] + (1 - s) * e[k, n + 1]
                assert then == pytest.approx(now, rel=1e-9) if s == p else then < now * (1 + 1e-9)
    for n in (5, 40):
        mean = lambda s, n=n: sum(binom.pmf(k, n, s) * e[k, n] for k in range(n + 1))
        assert mean(p) == pytest.approx(1, rel=1e-9) and mean(0.1 * p) < mean(0.7 * p) < 1


@pytest.mark.parametrize(("k", "n"), [(1, 1), (4, 5), (1, 20), (77, 100), (9_100, 10_000), (100_000, 100_000)])
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
    assert bound <= lower_confidence_bound(k, n, alpha) * (1 + 1e-12)                     # Markov's inequality for E
    assert bound < anytime_lower_bound(k, n, alpha * 1.5)
    assert k == n or bound < anytime_lower_bound(k + 1, n, alpha)


def decide(rule, k, n, before=None):
    """(one-sided p_a, whether to stop) after k of n, the others all of one rival; `before`: p_a of the look before."""
    pair = None if before is None else dict.fromkeys(c.BOUNDS, (before, 1 - before))
    bounds, stop = rule.decide(torch.tensor([n - k, k]), 1, n, pair)
    assert bounds["one-sided"][1] == 1 - bounds["one-sided"][0]
    return bounds["one-sided"][0], stop


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bound", c.BOUNDS)
@pytest.mark.parametrize("n", [1, 100, 100_000])
def test_anytime_bound_at_the_ends_without_a_warning(n, bound):
    assert anytime_lower_bound(0, n, 0.001) == 0
    assert anytime_lower_bound(n, n, 0.001) < 0.001 ** (1 / n)
    rule = Sequential(10 * n, 0.001, 0.25, (0.25, 0.5), tolerance=0.01, bound=bound)
    assert decide(rule, 0, n)[0] == 0 and decide(rule, n, n)[0] > 0


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
    errs = lambda bound, looks, k: (k >= [count_that_exceeds(bound, int(n), p, alpha) for n in looks]).any(1).mean()
    naive = errs(lower_confidence_bound, looks[9::10], k[:, 9::10])
    once = errs(lower_confidence_bound, looks[-1:], k[:, -1:])
    anytime = errs(anytime_lower_bound, looks, k)
    last = errs(lambda k, n, alpha: lower_confidence_bound(k, n, alpha / 2), looks[-1:], k[:, -1:])
    early = errs(lambda k, n, alpha: anytime_lower_bound(k, n, alpha / 2), looks, k)
    print(f"p = {p}: wrong at one look {once:.3%}, at ten looks {naive:.3%}; anytime bound, at 100 looks {anytime:.3%}")
    assert 0.10 < naive < 0.25 and once <= binom.ppf(1 - 1e-6, runs, alpha) / runs
    assert 0 < anytime < alpha                                        # Ville's inequality; not vacuous either
    assert 0 < early + last < alpha                                   # what Sequential does


@pytest.mark.parametrize("n", [50, 1000, 12_345, 100_000])
def test_looks_are_whole_chunks_that_grow_by_a_tenth_up_to_n(n):
    rule, looks = Sequential(n, 0.001, 0.25, (0.5,)), [0]
    while looks[-1] < n:
        looks.append(rule.next_look(looks[-1]))
    looks = looks[1:]
    assert looks[0] == min(1000, n) and looks[-1] == n
    assert all(look % CHUNK == 0 for look in looks[:-1])
    assert all(1.1 * a <= b < 1.1 * a + CHUNK for a, b in itertools.pairwise(looks[:-1]))


def test_stops_when_the_largest_radius_is_certified_and_not_before():
    rule = Sequential(100_000, 0.001, 0.25, (0.25, 0.5))
    bound, stop = decide(rule, 1000, 1000)
    assert stop and certified_radius(bound, 0.25) > 0.5
    bound, stop = decide(rule, 950, 1000)                         # Phi(1) = 0.84 is certified, Phi(2) = 0.977 not
    assert 0.25 < certified_radius(bound, 0.25) < 0.5 and binom.cdf(950, 1000, norm.cdf(2)) < 0.01
    assert stop == (integrated_log_e_value(50, 1000, norm.sf(2)) >= math.log(100))
    assert not decide(rule, 972, 1000)[1]


def test_stops_when_the_next_radius_is_futile():
    rule = Sequential(100_000, 0.001, 0.25, (0.25, 0.5))
    bound, stop = decide(rule, 400, 1000)                         # not even a majority
    assert stop and bound < 0.5
    assert not decide(rule, 500, 1000)[1]
    for k in range(700, 1000, 7):                                     # the next radius up is what counts
        bound, stop = decide(rule, k, 1000)
        radius = 0.25 * norm.ppf(bound)
        after = next((r for r in (0, 0.25, 0.5) if r > radius), None)
        assert stop == (after is None or integrated_log_e_value(1000 - k, 1000, norm.sf(after / 0.25)) >= math.log(100))


def test_stops_at_n_and_keeps_the_best_bound():
    rule = Sequential(1000, 0.001, 0.25, (0.25, 0.5))
    assert decide(rule, 550, 1000)[1] and not decide(Sequential(2000, 0.001, 0.25, (0.25, 0.5)), 550, 1000)[1]
    assert decide(rule, 550, 1000, 0.83)[0] == 0.83                    # all looks' bounds hold at once: the largest counts
    assert decide(rule, 900, 1000)[0] == lower_confidence_bound(900, 1000, 0.0005) > anytime_lower_bound(900, 1000, 0.0005)
    assert decide(rule, 900, 999)[0] == anytime_lower_bound(900, 999, 0.0005)
    assert decide(FixedN(1000, 0.001), 600, 1000, 0.99) == (lower_confidence_bound(600, 1000, 0.001), True)


def test_tolerance_stops_only_when_both_bounds_are_near_the_radius():
    sigma, radius, alpha = 0.25, 0.25, 0.001
    rule = Sequential(10**6, alpha, sigma, (radius,), tolerance=0.02)
    stops = []
    for n in (1000, 3000, 10_000, 30_000, 100_000):
        k = round(norm.cdf(radius / sigma) * n)                       # exactly on the boundary
        bound, stop = decide(rule, k, n)
        low, high = sigma * norm.ppf(bound), sigma * norm.ppf(1 - anytime_lower_bound(n - k, n, 0.01))
        assert low < radius < high
        assert stop == (radius - low <= 0.02 and high - radius <= 0.02)
        assert not decide(Sequential(10**6, alpha, sigma, (radius,)), k, n)[1]
        stops.append(stop)
    assert not stops[0] and stops[-1]


def simulate(rule, looks, paths):
    """({bound: radii}, draws) of images under `rule`, for paths of counts (images, looks, classes); class 0 is the top."""
    radii, draws = {bound: [] for bound in c.BOUNDS}, []
    for path in paths:
        bounds = None
        for n, counts in zip(looks, path, strict=True):
            bounds, stop = rule.decide(counts, 0, int(n), bounds)
            if stop:
                break
        for bound in c.BOUNDS:
            radii[bound].append(rule.sigma / 2 * (norm.ppf(bounds[bound][0]) - norm.ppf(bounds[bound][1])))
        draws.append(n)
    return {bound: np.array(found) for bound, found in radii.items()}, np.array(draws)


def looks_of(n):
    looks = [0]
    while looks[-1] < n:
        looks.append(Sequential(n, 0.001, 0.25, (0.5,)).next_look(looks[-1]))
    return looks


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("m", "bound"), [
    (80, "one-sided"), *(pytest.param(m, bound, marks=mark) for m, mark in ((400, pytest.mark.slow), (4000, pytest.mark.soak))
                          for bound in c.BOUNDS)])
def test_sequential_tables_match_fixed_n_with_a_fraction_of_the_draws(m, bound, monkeypatch):
    """Synthetic images like a trained network's: a fifth hopeless, a fifth certain, the others spread over all radii."""
    sigma, alpha, n, table_radii = 0.25, 0.001, 100_000, (0.0, 0.25, 0.5, 0.75)
    monkeypatch.setattr(c, "anytime_lower_bound", functools.cache(anytime_lower_bound))   # both rules see the same paths
    random = np.random.default_rng(4)
    parts = ((m // 5, -1, 0), (m // 5, 1, 1.5), (m - 2 * (m // 5), -0.1, 1))
    distance = np.concatenate([random.uniform(low, high, size) for size, low, high in parts])
    p_a = norm.cdf(distance / sigma)
    shares_of_rivals = random.dirichlet((3, 1, 1, 1), m)
    p = np.concatenate([p_a[:, None], (1 - p_a)[:, None] * shares_of_rivals], axis=1)     # images classes
    p_b = p[:, 1:].max(1)
    true = {"one-sided": distance, "two-sided": sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b))}
    looks = looks_of(n)
    paths = np.stack([random.multinomial(size, p) for size in np.diff(looks)], axis=1).cumsum(1)
    accuracy = lambda radii: np.array([np.mean((radii > 0) & (radii >= r)) for r in table_radii])
    fixed, _ = simulate(FixedRule(n, alpha, sigma), looks[-1:], paths[:, -1:])
    shares = {}
    for tolerance in (0.0, 0.01):
        radii, draws = simulate(Sequential(n, alpha, sigma, table_radii, tolerance, bound), looks[1:], paths)
        shares[tolerance], difference = draws.sum() / (m * n), np.abs(accuracy(radii[bound]) - accuracy(fixed[bound]))
        print(f"{bound}, m = {m}, tolerance {tolerance}: {shares[tolerance]:.1%} of the draws, tables within "
              f"{difference.max():.2%}")
        assert (difference <= max(1 / m, 0.01 if tolerance else 0.004) + 1e-9).all()
        for of in c.BOUNDS:                                           # both hold, wherever either one stopped
            assert np.sum(radii[of] > true[of]) <= binom.ppf(1 - 1e-6, m, alpha)
    assert shares[0.0] < 0.17 and shares[0.01] <= shares[0.0] and (m < 400 or shares[0.01] < shares[0.0])


class FixedRule(FixedN):
    """FixedN that knows sigma, as simulate() asks."""

    def __init__(self, n, alpha, sigma):
        super().__init__(n, alpha)
        self.sigma = sigma


# -- Sound in floating point ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 16), (0.25, 255), (1.0, 16), (1.0, 255), (0.12, 255)])
def test_grid_table_errs_by_less_than_8_units(sigma, levels):
    noise = GridNoise(sigma, levels, CPU)
    entries = np.unique(np.linspace(0, len(noise.table) - 1, 300).round().astype(int))
    scale = Decimal(2**noise.BITS)
    for j in entries:
        value = int(j) - noise.reach                                  # entry j: P[rounded noise <= value]
        exact = exact_cdf((Decimal(value) + Decimal("0.5")) / (Decimal(sigma) * levels)) * scale
        assert abs(int(noise.table[j]) - exact) < 8 < noise.SLACK
    assert exact_cdf(Decimal(noise.reach) / (Decimal(sigma) * levels)) > 1 - 1 / scale     # beyond the table: nothing
    assert (noise.table.diff() >= 0).all()


def integers(noise, x, chunks=1, seed=0):
    """(the integers added to x, whether each copy may count)."""
    generator, out, sums, sure = torch.Generator().manual_seed(seed), torch.empty(CHUNK, *x.shape), [], []
    for _ in range(chunks):
        sure.append(noise(x, generator, out))
        sums.append((out * noise.levels).round() - (x * noise.levels).round())
        assert torch.equal(out, (out * noise.levels).round() / noise.levels)              # on the grid, not clipped
    return torch.cat(sums).long(), torch.cat(sure)


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 16), (0.5, 255), (0.02, 16)])
def test_grid_noise_is_the_rounded_gaussian(sigma, levels):
    x = torch.randint(levels + 1, (1, 8, 8), generator=torch.Generator().manual_seed(1)) / levels
    drawn, sure = integers(GridNoise(sigma, levels, CPU), x, chunks=30)
    assert sure.all() and (drawn.unique().numel() > 2)
    values, observed = np.unique(drawn.numpy(), return_counts=True)
    edges = np.arange(values[0], values[-1] + 2) - 0.5
    share = np.diff([0, *(float(exact_cdf(edge / (sigma * levels))) for edge in edges[1:-1]), 1])
    counts = np.zeros(len(share))
    counts[values - values[0]] = observed
    expected, total = share * counts.sum(), counts.sum()
    keep = expected >= 10
    rest = [(counts[~keep].sum(), expected[~keep].sum())] if expected[~keep].sum() >= 5 else []
    statistic = sum((o - e) ** 2 / e for o, e in [*zip(counts[keep], expected[keep], strict=True), *rest])
    assert chi2.sf(statistic, keep.sum() + len(rest) - 1) > 1e-4
    assert abs(drawn.double().mean()) < 5 * drawn.double().std() / math.sqrt(total)


@pytest.mark.parametrize(("sigma", "levels", "expected"), [(1e-12, 16, 0), (1e-4, 255, 0), (4.0, 255, 4.0), (1, 16, 1)])
def test_grid_noise_for_tiny_and_large_sigma(sigma, levels, expected):
    x = torch.tensor([0, 1, levels]).view(1, 1, 3) / levels
    drawn, sure = integers(GridNoise(sigma, levels, CPU), x, chunks=100)
    assert sure.all() and (drawn.double().std() / levels).item() == pytest.approx(expected, rel=0.02, abs=0)


def test_a_draw_that_the_tables_last_bits_would_decide_does_not_count(monkeypatch):
    noise, x = GridNoise(0.25, 16, CPU), torch.zeros(1, 1, 1)
    entries = [int(t) for t in noise.table]
    middle = len(entries) // 2
    steps = (-1000, -65, -64, -1, 0, 1, 64, 65, 1000)
    bits = [entries[j] + step for j in (middle - 3, middle, middle + 2) for step in steps]
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor((bits * CHUNK)[:CHUNK]).view(CHUNK, 1, 1, 1))
    added, sure = integers(noise, x)
    for value, may, b in zip(added.flatten().tolist(), sure.tolist(), bits * CHUNK, strict=False):
        assert value == sum(t <= b for t in entries) - noise.reach
        assert may == (min(abs(t - b) for t in entries) > noise.SLACK)
    counts = count_classes(lambda x: torch.eye(2)[torch.zeros(len(x), dtype=torch.long)], [(x, None, 60)], noise)
    assert counts.tolist() == [[sum(sure[:60].tolist()), 0]] and 0 < sum(sure[:60].tolist()) < 60


def test_sound_certificates_of_a_half_space_hold_for_the_rounded_classifier():
    """f after rounding is the base classifier: its exact probability is what the bound may not exceed."""
    sigma, levels, alpha, m = 0.25, 16, 0.05, 400
    along = lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1)[:, 0] - 0.5], dim=1)
    values = [i % 8 + 8 for i in range(m)]                            # x on the grid, at 0 to 7/16 beyond the plane
    true = {v: float(exact_cdf(Decimal(v - 8.5) / (Decimal(sigma) * levels))) for v in {*values}}     # P[v + e > 8]
    images = [(i, torch.full((1, 1, 1), v / levels)) for i, v in enumerate(values)]
    trials = list(certify_all(along, images, GridNoise(sigma, levels, CPU), 50, FixedN(500, alpha)))
    wrong = sum(t.bounds["one-sided"][0] > (true[values[t.index]] if t.top else 1 - true[values[t.index]]) for t in trials)
    assert len(trials) == m and 1 <= wrong <= binom.ppf(1 - 1e-6, m, alpha)


# -- Reports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "alpha"), [(100, 0.001), (500, 0.001), (500, 0.05), (1, 0.001), (2000, 0.001)])
@pytest.mark.parametrize("rho", [0.001, 0.05])
def test_excess_is_the_exact_binomial_quantile(m, alpha, rho):
    q, a = excess(m, alpha, rho), Fraction(alpha)
    beyond = lambda q: 1 - sum(math.comb(m, j) * a**j * (1 - a) ** (m - j) for j in range(q + 1))         # P[X > q]
    assert beyond(q) <= Fraction(rho) and (q == 0 or beyond(q - 1) > Fraction(rho))


COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
ROWS = ["0\t3\t3\t0.5\t1\t0:00:01.000000", "20\t1\t1\t0.25\t1\t0:00:02.500000", "40\t2\t-1\t0.0\t0\t0:01:00.500000",
        "60\t5\t4\t0.9\t0\t1:00:00.000000", "80\t6\t6\t0.0\t1\t1 day, 0:00:00"]


def write(path, *rows, header=COHEN, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + end)
    return path


def ours(row, count, n, sigma, alpha=0.001):
    return f"{row}\t{count}\t{n}\t{sigma}\t{alpha}"


OURS = f"{COHEN}\tcount\tn\tsigma\talpha"


def test_cohens_logs_are_read_and_summed_by_hand(tmp_path):
    (one,) = summarise([write(tmp_path / "sigma_0.50", *ROWS)])
    assert (one.m, one.sigma, one.draws) == (5, 0.5, 0)
    assert one.acr == pytest.approx((0.5 + 0.25) / 5) and one.abstained == pytest.approx(1 / 5)
    assert [one.accuracy(r) for r in (0, 0.25, 0.250001, 0.5, 0.51)] == [3 / 5, 2 / 5, 1 / 5, 1 / 5, 0]
    assert one.seconds == pytest.approx((1 + 2.5 + 60.5 + 3600 + 86400) / 5)
    assert one.guaranteed(0) == pytest.approx((3 - excess(5, 0.001)) / 5) and one.guaranteed(0.5) == pytest.approx(
        max(0, 1 - excess(5, 0.001)) / 5)


@pytest.mark.parametrize(("path", "sigma"), [
    ("resnet110/noise_0.50/test/sigma_0.25", 0.25), ("noise_1.00/sigma_0.50.tsv", 0.5), ("run/certify_sigma_1.tsv", 1)])
def test_sigma_of_a_log_without_that_column_is_in_its_name(tmp_path, path, sigma):
    """Cohen's logs lie in noise_TRAINED/test/sigma_CERTIFIED, and the two may differ."""
    assert {row["sigma"] for row in read_rows(write(tmp_path / path, *ROWS))} == {sigma}


def test_our_columns_give_sigma_alpha_and_draws(tmp_path):
    file = write(tmp_path / "x.tsv", *(ours(row, 90, 1000 + i, 0.25, 0.01) for i, row in enumerate(ROWS)), header=OURS)
    (one,) = summarise([file])
    assert (one.sigma, one.alpha, one.draws) == (0.25, 0.01, 5010)
    assert one.guaranteed(0) == pytest.approx(max(0, 3 - excess(5, 0.01)) / 5)


@pytest.mark.parametrize("torn", ["80\t6\t6\t0.7", "80\t6\t6\t0.70\t1\t0:00:01", "8", "80\t6"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    whole, half = write(tmp_path / "a_sigma_1", *ROWS[:4]), write(tmp_path / "b_sigma_1", *ROWS[:4], torn, end="")
    assert read_rows(whole) == read_rows(half) and len(read_rows(half)) == 4


def test_overlapping_shards_count_once_and_logs_that_contradict_each_other_are_curves_of_their_own(tmp_path):
    whole = summarise([write(tmp_path / "sigma_1", *ROWS)])[0]
    shards = [write(tmp_path / f"shard{i}_sigma_1", *rows) for i, rows in enumerate((ROWS[::2], ROWS[1::2], ROWS[1:3]))]
    (merged,) = summarise(shards)
    assert table([merged], (0, 0.25)) == table([whole], (0, 0.25)) and merged.m == 5
    for column, other in ((1, "9"), (2, "-1"), (3, "0.26")):
        fields = ROWS[1].split("\t")
        fields[column] = other
        log = write(tmp_path / f"other{column}_sigma_1", "\t".join(fields))
        found = summarise([*shards, log])                             # of one folder: each file is one
        assert [one.m for one in found] == [3, 2, 2, 1]
        assert [one.name for one in found] == [f"{tmp_path.name}/{file.name}" for file in (*shards, log)]
        elsewhere = write(tmp_path / "b" / log.name, "\t".join(fields))
        one, two = summarise([*shards, elsewhere])                    # of two folders: each folder is one
        assert (one.m, one.name, two.m, two.name) == (5, tmp_path.name, 1, "b")


def test_logs_of_one_run_may_not_contradict_each_other_and_those_of_two_are_two_curves(tmp_path):
    """The settings beside a log say whose it is."""
    def log(name, row, **settings):
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(sha256=["a"], n=300) | settings))
        return write(tmp_path / f"{name}.tsv", row)

    one = log("sigma_1_shard_0_of_2", ROWS[0], shard="0/2", device="cpu")
    two = log("sigma_1_shard_1_of_2", ROWS[1], shard="1/2", device="cuda")
    assert [found.m for found in summarise([one, two])] == [2]        # of one run: what may differ, does
    again = log("again_sigma_1", ROWS[0].replace("0.5", "0.6"))
    with pytest.raises(ValueError, match="again_sigma_1.*contradict"):
        summarise([one, again])
    other = log("other_sigma_1", ROWS[0].replace("0.5", "0.6"), sha256=["b"])
    assert [found.m for found in summarise([one, other])] == [1, 1]
    strange = log("sigma_1_shard_2_of_3", ROWS[2], shard="2/3", n=400)
    with pytest.raises(ValueError, match="shards.*different settings"):
        summarise([one, two, strange])
    with pytest.raises(ValueError, match="twice_sigma_1.*contradict"):
        summarise([write(tmp_path / "twice_sigma_1", ROWS[0], ROWS[0].replace("0.5", "0.6"))])


def test_curves_have_the_names_that_are_asked_for(tmp_path):
    files = [write(tmp_path / folder / "sigma_1", f"0\t3\t3\t{radius}\t1\t0:00:01")
             for folder, radius in (("a", 0.5), ("b", 0.6))]
    assert [one.name for one in summarise(files)] == ["a", "b"]
    named = summarise(files, ["DMAE", "MAE"])
    assert [one.name for one in named] == ["DMAE", "MAE"]
    lines = cells(table(named, (0, 0.55), "csv"), "csv")[1:]
    assert [line[0] for line in lines] == ["1 DMAE", "1 MAE", "1 DMAE", "1 MAE"]          # each name has one sigma: no best
    assert [line[3] for line in lines[:2]] == ["0.0", "100.0"]
    with pytest.raises(ValueError, match="2 folders .*/a, .*/b, or of the 2 files"):
        summarise(files, ["DMAE"])


def test_right_is_who_predicts_the_label_whatever_the_column_says(tmp_path, capsys):
    """Some published scripts write a running count into it."""
    wrong = [row.replace("\t1\t0:00", f"\t{i}\t0:00") for i, row in enumerate(ROWS[:2], 2)]
    (one,) = summarise([write(tmp_path / "sigma_1", *wrong, *ROWS[2:])])
    assert one.accuracy(0) == 3 / 5 and "sigma_1" in (err := capsys.readouterr().err) and "2 of 5" in err
    summarise([write(tmp_path / "right_sigma_1", *ROWS)])
    assert not capsys.readouterr().err


def test_predictions_without_radii_are_named_as_such(tmp_path):
    with pytest.raises(ValueError, match="sigma_1.*predictions, but no radii"):
        read_rows(write(tmp_path / "sigma_1", "0\t3\t3\t1\t0:00:01", header="idx\tlabel\tpredict\tcorrect\ttime"))


def test_sigmas_are_summed_apart_whatever_the_order_of_files(tmp_path):
    files = [write(tmp_path / f"{name}_sigma_{sigma}", row) for name, sigma, row in
             (("a", 1, ROWS[0]), ("b", 0.5, ROWS[1]), ("c", 1, ROWS[2]), ("d", 0.5, ROWS[3]))]
    for order in itertools.permutations(files):
        assert [(group.m, group.sigma) for group in summarise(order)] == [(2, 0.5), (2, 1)]
    with pytest.raises(ValueError, match="nameless does not say its sigma"):
        summarise([*files, write(tmp_path / "nameless", ROWS[4])])


def cells(text, kind):
    if kind == "csv":
        return [*csv.reader(text.splitlines())]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n\n")[0].splitlines()]


@pytest.mark.parametrize("kind", ["csv", "markdown"])
def test_table_parses_and_holds_the_best_over_sigma(tmp_path, kind):
    low = write(tmp_path / "sigma_0.25", *ROWS)
    high = write(tmp_path / "sigma_1", "0\t3\t3\t0.1\t1\t0:00:01", "20\t1\t1\t3.0\t1\t0:00:02",
                 "40\t2\t2\t3.0\t1\t0:00:02", "60\t5\t-1\t0.0\t0\t0:00:01")
    rows = cells(table(summarise([high, low]), (0, 0.25, 1), kind), kind)
    assert len({len(row) for row in rows}) == 1
    if kind == "markdown":
        assert all(set(cell) <= set("-:") and len(cell) >= 3 for cell in rows.pop(1))
    header, first, second, best, proven, also, most_proven = rows
    assert header[:5] == ["sigma", "images", "r=0", "r=0.25", "r=1"] and "ACR" in header
    assert first[:5] == ["0.25", "5", "60.0", "40.0", "0.0"] and second[:5] == ["1", "4", "75.0", "50.0", "50.0"]
    assert first[header.index("ACR")] == "0.150" and second[header.index("ACR")] == "1.525"
    assert first[header.index("abstain")].strip("%") == "20.0" and float(second[header.index("s/image")]) == 1.5
    assert best[0] == "best" and best[2:5] == ["75.0", "50.0", "50.0"]
    assert proven[:2] == ["0.25", "proven*"] and float(proven[2]) == pytest.approx(100 * (3 - excess(5, 0.001)) / 5)
    assert also[:2] == ["1", "proven*"] and float(also[2]) == pytest.approx(100 * (3 - excess(4, 0.001)) / 4)
    # the best over two sigmas holds for both at once: half of the 0.1 % for each
    at_once = [max(0, right - excess(m, 0.001, 0.0005)) / m for right, m in ((3, 5), (3, 4))]
    assert most_proven[:2] == ["best", "proven*"] and float(most_proven[2]) == pytest.approx(100 * max(at_once))


def test_text_table_is_aligned(tmp_path):
    lines = table(summarise([write(tmp_path / "sigma_0.25", *ROWS)]), (0, 0.25)).splitlines()[:-1]
    assert len({len(line) for line in lines}) == 1 and lines[1].split()[:4] == ["0.25", "5", "60.0", "40.0"]


@pytest.mark.parametrize("published", [None, "cifar10", "imagenet"])
def test_plot_writes_a_picture(tmp_path, published):
    none_right = write(tmp_path / "sigma_1", ROWS[2])
    plot(tmp_path / "curve.png", summarise([write(tmp_path / "sigma_0.25", *ROWS), none_right]), published)
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300 and len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("text", ["", "\n", "idx,label\n1,2\n", f"{COHEN}\n1\t2\n", f"{COHEN}\na\tb\tc\td\te\tf\n"])
def test_what_is_no_log_is_refused(tmp_path, text):
    (tmp_path / "sigma_1").write_text(text)
    with pytest.raises(ValueError, match="sigma_1"):
        summarise([tmp_path / "sigma_1"])


# --- what a radius is about: the image that got the noise, and the arithmetic that was done


def test_certifying_the_resized_image_claims_a_radius_that_the_small_one_does_not_have():
    """f: is the mean of the image, resized to 224 by the model, above a half? Linear, so the true distances are known."""
    resize = build_vit("vit_digits", 2, image_size=224, patch_size=16, mean=(0.0,), std=(1.0,)).prepare

    def f(x):
        return torch.stack([torch.zeros(len(x)), resize(x).mean(dim=(1, 2, 3)) - 0.5], dim=1)

    small = torch.full((1, 32, 32), 0.51)
    weights = torch.zeros(1, 1, 32, 32, requires_grad=True)
    f(weights)[0, 1].backward()
    distance = 0.01 / weights.grad.norm().item()                      # of `small` from the plane, among 32 x 32 images
    assert 0.3 < distance < 0.35

    prediction, radius = certify(f, small, 0.25, n0=100, n=2000)
    _, wrong = certify(f, resize(small[None])[0], 0.25, n0=100, n=2000)
    assert prediction == 1 and 0.8 * distance < radius < distance
    assert wrong > 2 * distance                                       # true of 224 x 224 images, false of the 32 x 32 one
    beyond = small - wrong * 0.9 * weights.grad[0] / weights.grad.norm()
    assert f(beyond[None]).argmax() == 0


def test_floating_point_noise_certifies_what_is_false_and_grid_noise_does_not():
    """Noise around 1 leaves multiples of 2^-24, since floats there are no finer; noise around 0 mostly does not. A classifier
    that looks at this is certified for "class 1" far beyond the image 0, where g answers "class 0": in real arithmetic both
    have probability 0. Integer noise closes the gap: what it certifies around 1 also holds at 0."""
    def f(x):
        coarse = (x.double() * 2**24).frac() == 0
        return torch.stack([~coarse.flatten(), coarse.flatten()], dim=1).float()

    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    prediction, radius = certify(f, one, 0.3, n=20_000)
    assert prediction == 1 and radius > 1                             # |1 - 0| = 1: "g(0) = 1" is claimed
    assert predict(f, zero, 0.3, n=20_000) == 0                       # and false
    grid = GridNoise(0.3, 16, CPU)
    for x in (one, zero):
        (trial,) = certify_all(f, [(0, x)], grid, 100, FixedN(20_000, 0.001))
        assert trial.certificate(0.3)[0] == 1


# --- misuse of the interface, and networks as people have them


PLAIN = lambda x: torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], dim=1)
OUTPUTS = {
    "an object with logits": lambda x: types.SimpleNamespace(logits=PLAIN(x), hidden_states=None),
    "a dict": lambda x: {"loss": None, "logits": PLAIN(x)},
    "a tuple": lambda x: (PLAIN(x), None),
    "a list": lambda x: [PLAIN(x)],
    "a map of one pixel": lambda x: PLAIN(x)[:, :, None, None],
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_logits_are_found_in_what_networks_return(kind):
    x = torch.full((1, 3, 3), 0.6)
    assert certify(OUTPUTS[kind], x, 0.5, 20, 200) == certify(PLAIN, x, 0.5, 20, 200) != (ABSTAIN, 0.0)
    assert predict(OUTPUTS[kind], x, 0.5, 200) == 0
    request = [(x, generator_for(0, 0, 1, CPU), 200)]
    assert count_classes(OUTPUTS[kind], request, GaussianNoise(0.5)).sum() == 200


@pytest.mark.parametrize(("output", "found"), [
    (lambda x: x.mean((1, 2, 3)), r"Tensor of shape \(100,\)"), (lambda x: PLAIN(x)[:50], r"Tensor of shape \(50, 2\)"),
    (lambda x: x, r"Tensor of shape \(100, 1, 3, 3\)"), (lambda x: None, "NoneType"), (lambda x: {"out": PLAIN(x)}, "dict"),
    (lambda x: (), "tuple"), (lambda x: PLAIN(x).numpy(), "ndarray")])
def test_what_is_no_logits_is_refused_with_what_it_is(output, found):
    x = torch.full((1, 3, 3), 0.6)
    for call in (lambda: certify(output, x, 0.5, 20, 200), lambda: predict(output, x, 0.5, 200),
                 lambda: count_classes(output, [(x, generator_for(0, 0, 1, CPU), 200)], GaussianNoise(0.5))):
        with pytest.raises(ValueError, match=rf"logits of shape \(100, classes\), not an? {found}"):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_certificate_rests_on_logits_that_are_not_finite(bad):
    """One copy of a hundred is enough; -inf, a masked class, is an answer like any other."""
    x, threshold = torch.full((1, 3, 3), 0.6), 0.95                   # the mean of 9 pixels: sigma / 3 from 0.6

    def sometimes(x):
        logits = PLAIN(x)
        logits[x.mean((1, 2, 3)) > threshold, 1] = bad
        return logits

    copies = noisy_copies(x, generator_for(0, 7, 2, CPU), 200, 0.5)[:200]
    expected = int((copies.mean((1, 2, 3)) > threshold).sum())
    assert 0 < expected < 20
    with pytest.raises(c.RunError, match=f"image 7: {expected} of 200 noisy copies got NaN or infinite"):
        predict(sometimes, x, 0.5, 200, index=7)
    requests = [(torch.zeros(1, 3, 3), generator_for(0, 8, 2, CPU), 200), (x, generator_for(0, 7, 2, CPU), 200)]
    with pytest.raises(c.RunError, match=f"image 7: {expected} of 200"):
        count_classes(sometimes, requests, GaussianNoise(0.5), images=[8, 7])
    with pytest.raises(c.RunError, match="image 7"):
        list(certify_all(sometimes, [(7, x)], GaussianNoise(0.5), 200, FixedN(200, 0.001)))
    bad = -math.inf
    assert predict(sometimes, x, 0.5, 200, index=7) == 0


@pytest.mark.parametrize(("x", "words"), [
    (torch.full((1, 3, 3), 255, dtype=torch.uint8), "uint8"), (torch.rand(1, 1, 3, 3), r"\(1, 1, 3, 3\)"),
    (torch.rand(3, 3), r"\(3, 3\)"), (np.zeros((1, 3, 3)), "ndarray"), (255 * torch.ones(1, 3, 3), "255.*divide by 255")])
def test_what_is_no_image_is_refused(x, words):
    for call in (certify, predict):
        with pytest.raises(ValueError, match=words):
            call(PLAIN, x, 0.5, n=200)


def test_images_in_other_units_are_taken_if_that_is_said():
    """Pixels and sigma 255 times as large: the same counts of the scaled classifier, and 255 times the radius."""
    x, scaled = torch.full((1, 3, 3), 0.6), lambda x: PLAIN(x / 255)
    prediction, radius = certify(PLAIN, x, 0.5, 20, 200)
    other, larger = certify(scaled, 255 * x, 127.5, 20, 200, any_range=True)
    assert other == prediction == 0 and larger == pytest.approx(255 * radius, rel=1e-4)
    normalised = (x - 0.9) / 0.2                                       # negative pixels: units of their own, no mistake
    assert predict(lambda x: PLAIN(x * 0.2 + 0.9), normalised, 2.5, 200) == 0


def test_half_precision_images_get_the_noise_of_single_precision():
    for dtype in (torch.float16, torch.bfloat16):
        seen = []
        record = lambda x, seen=seen: seen.append(x) or PLAIN(x.float())
        x = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(2)).to(dtype)
        predict(record, x, 0.5, 250)
        count_classes(record, [(x, generator_for(0, 0, 2, CPU), 250)], GaussianNoise(0.5))
        whole = noisy_copies(x.float(), generator_for(0, 0, 2, CPU), 250, 0.5).to(dtype)
        plain, pooled = torch.cat(seen[:3]), torch.cat(seen[3:])
        assert plain.dtype == pooled.dtype == dtype and torch.equal(plain, whole) and torch.equal(pooled, whole)
