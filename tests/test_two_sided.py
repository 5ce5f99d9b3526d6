"""Two-sided certificates: against exact sums and simulation, fixed and sequential, and as rows."""

import csv
import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest, multinomial, norm

import certify as c
import extras.sequential
from certify import (
    ABSTAIN,
    certificate,
    certified_radius,
    certify,
    certify_all,
    lower_confidence_bound,
    main,
    round_down,
    runner_up_of,
    two_sided_bounds,
    upper_confidence_bound,
)
from extras.integer_noise import certify_on_grid, count
from extras.sequential import bounds_after, largest_radius, radius_of, sequential

# -- The upper bound -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0005, 0.05, 0.4])
@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_upper_bound_is_where_the_exact_lower_tail_is_alpha(n, alpha):
    for k in range(n):
        p = Fraction(upper_confidence_bound(k, n, alpha))
        tail = sum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k + 1))
        assert float(tail) == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("n", [1, 10, 1000, 100_000])
@pytest.mark.parametrize("alpha", [1e-6, 0.001, 0.05])
def test_upper_bound_mirrors_the_lower_one_and_is_scipys(n, alpha):
    assert upper_confidence_bound(n, n, alpha) == 1
    at_zero = -math.expm1(math.log(alpha) / n)
    assert upper_confidence_bound(0, n, alpha) == pytest.approx(at_zero, rel=1e-9)
    for k in {0, 1, n // 3, n // 2, n - 1}:
        bound = upper_confidence_bound(k, n, alpha)
        assert bound == pytest.approx(1 - lower_confidence_bound(n - k, n, alpha), rel=1e-9)
        interval = binomtest(k, n).proportion_ci(1 - 2 * alpha, "exact")
        assert bound == pytest.approx(interval.high, abs=1e-9)


@pytest.mark.parametrize("n", [1, 10, 200])
def test_upper_bound_covers_every_p(n):
    alpha, k = 0.05, np.arange(n + 1)
    bounds = np.array([upper_confidence_bound(int(i), n, alpha) for i in k])
    for p in (*np.linspace(0, 1, 41), *bounds[:-1] * (1 + 1e-12)):
        assert binom.pmf(k[bounds >= p], n, p).sum() >= 1 - alpha - 1e-9


# -- The pair --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_the_pair_is_clopper_pearson_at_its_shares_of_alpha(share):
    """scipy's two-sided intervals at a level of 1 - 2 a are one-sided bounds at the error a."""
    counts, n, alpha = [40, 3, 900, 57], 1000, 0.01
    p_a, p_b = two_sided_bounds(counts, 2, n, alpha, share)
    interval = lambda k, error: binomtest(k, n).proportion_ci(1 - 2 * error, "exact")
    assert p_a == pytest.approx(interval(900, share * alpha).low, abs=1e-9)
    assert p_b == pytest.approx(interval(57, (1 - share) * alpha).high, abs=1e-9)
    assert two_sided_bounds(torch.tensor(counts), 2, n, alpha, share) == (p_a, p_b)
    rest = 1 - lower_confidence_bound(995, n, share * alpha)
    assert two_sided_bounds([995, 5], 0, n, alpha, share)[1] == pytest.approx(rest)


def test_nine_tenths_of_alpha_are_the_top_classes_unless_another_share_is_named():
    assert two_sided_bounds([900, 57, 43], 0, 1000, 0.01) == two_sided_bounds(
        [900, 57, 43], 0, 1000, 0.01, share=0.9
    )


def test_copies_without_an_answer_count_for_every_rival():
    assert runner_up_of([90, 4, 1], 0, 100) == 4 + 5
    pair = two_sided_bounds([90, 4, 1], 0, 100, 0.01)
    assert pair == two_sided_bounds([90, 9, 1], 0, 100, 0.01)
    assert pair[1] > two_sided_bounds([90, 4, 1], 0, 95, 0.01)[1]


def holds(p, counts, top, n, alpha, share):
    p_a, p_b = two_sided_bounds(counts, top, n, alpha, share)
    return p_a <= p[top] and p_b >= max(q for i, q in enumerate(p) if i != top)


@pytest.mark.parametrize("p", [
    (0.5, 0.5, 0.0), (0.5, 0.49, 0.01), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0), (0.9, 0.05, 0.05),
    (0.6, 0.4, 0.0), (0.2, 0.7, 0.1)])
@pytest.mark.parametrize("n", [5, 25])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_pair_covers_exactly_for_three_classes(p, n, share):
    """Summed over all outcomes of a multinomial; also for a class that is not the largest."""
    alpha, wrong = 0.1, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            counts = (a, b, n - a - b)
            if not holds(p, counts, 0, n, alpha, share):
                wrong += multinomial.pmf(counts, n, p)
    assert wrong <= alpha + 1e-9


def decaying(classes):
    shares = np.array([0.5 ** min(i, 60) for i in range(classes)])
    return (shares / shares.sum()).tolist()


CASES = {
    "near half": lambda classes: [0.51, 0.49] + [0.0] * (classes - 2),
    "all on one": lambda classes: [1.0] + [0.0] * (classes - 1),
    "runner-up spread": lambda classes: [0.4] + [0.6 / (classes - 1)] * (classes - 1),
    "decaying": decaying,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_the_pair_covers_in_simulation(case, classes):
    n, alpha, runs, p = 500, 0.1, 2000, CASES[case](classes)
    drawn = np.random.default_rng(classes).multinomial(n, p, runs)
    pairs, wrong = {}, 0
    for counts in drawn:
        known = int(counts[0]), int(counts[1:].max())
        if known not in pairs:
            pairs[known] = two_sided_bounds(counts.tolist(), 0, n, alpha)
        p_a, p_b = pairs[known]
        wrong += p_a > p[0] or p_b < max(p[1:])
    assert wrong <= binom.ppf(1 - 1e-6, runs, alpha)


def test_it_pays_where_answers_are_spread_and_loses_a_hair_where_two_classes_hold_everything():
    n, alpha = 10_000, 0.001
    one = lambda k: certified_radius(lower_confidence_bound(k, n, alpha), 1.0)

    def two(counts):
        p_a, p_b = two_sided_bounds(counts, 0, n, alpha)
        return certified_radius(p_a, 1.0, p_b)

    assert one(6000) < 0.3 and two([6000] + [500] * 8) > 2 * one(6000)
    assert one(4500) == 0 and two([4500] + [550] * 10) > 0.5   # no majority, and a certificate
    assert 0.99 * one(9000) < two([9000, 1000]) < one(9000)


# -- certify() and the pool ------------------------------------------------------------------------


def three_sectors(x):
    """The largest of three linear scores, whose distances to the planes are known."""
    return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 1], torch.zeros(len(x))], dim=1)


def points(seed, m):
    return torch.rand(m, 1, 1, 2, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.2


def true_radius(x):
    """(class, distance to the nearest other class)."""
    scores = [float(x[0, 0, 0]), float(x[0, 0, 1]), 0.0]
    top = scores.index(max(scores))
    lengths = {(0, 1): math.sqrt(2)}                           # of the differences' gradients
    gaps = [(scores[top] - scores[i]) / lengths.get((min(top, i), max(top, i)), 1.0)
            for i in range(3) if i != top]
    return top, min(gaps)


def test_two_sided_radii_stay_below_the_distance_and_the_functions_agree():
    sigma, alpha, n, m = 0.5, 0.05, 1000, 400
    images = list(enumerate(points(1, m)))
    wrong = gained = 0
    trials = certify_all(three_sectors, images, sigma, 30, n, alpha, 4)
    for i, _, found, _, _, bounds in trials:
        x = images[i][1]
        both = {bound: certificate(found, *bounds[bound], sigma) for bound in c.BOUNDS}
        prediction, radius = both["two-sided"]
        top, distance = true_radius(x)
        wrong += prediction != ABSTAIN and (prediction != top or radius > distance)
        gained += radius > both["one-sided"][1]
        if i < 40:
            for bound in c.BOUNDS:
                alone = certify(three_sectors, x, sigma, 30, n, alpha, 4, i, bound=bound)
                assert alone == both[bound]
    assert wrong <= binom.ppf(1 - 1e-6, m, alpha) and gained > m / 10


def test_an_unknown_bound_is_refused():
    with pytest.raises(ValueError, match="one-sided, two-sided"):
        certify(three_sectors, points(0, 1)[0], 0.5, n=100, bound="both")


def test_two_sided_abstains_where_p_a_is_not_above_p_b_and_not_at_one_half():
    """Class 6 has four tenths, the others have one tenth each; then all seven are equal."""
    digit = lambda x, tenths: (x.flatten(1)[:, 0] * 1000).long() % tenths
    spread = lambda x: torch.nn.functional.one_hot(digit(x, 10).clamp(max=6), 7).float()
    even = lambda x: torch.nn.functional.one_hot(digit(x, 7), 7).float()
    x, how = torch.full((1, 1, 1), 0.5), dict(n0=500, n=3000)
    assert certify(spread, x, 0.5, **how) == (ABSTAIN, 0.0)
    prediction, radius = certify(spread, x, 0.5, **how, bound="two-sided")
    exact = 0.25 * (norm.ppf(0.4) - norm.ppf(0.1))
    assert prediction == 6 and 0.7 * exact < radius < exact
    assert certify(even, x, 0.5, **how, bound="two-sided")[0] == ABSTAIN


def test_uncertain_draws_of_integer_noise_count_for_every_rival():
    """A noise that declares every tenth copy uncertain: nobody's success and every rival's."""
    def doubtful(x, generator, copies):
        z = x + 0.3 * torch.randn(copies, *x.shape, generator=generator)
        return z, torch.arange(copies) % 10 != 0

    x, n, alpha = torch.tensor([[[0.9, 0.0]]]), 1000, 0.01
    args = SimpleNamespace(sigma=0.3, n0=100, n=n, alpha=alpha, seed=0, bound="two-sided")
    counts = count(three_sectors, x, doubtful, c.generator_for(0, 0, 1, x.device), n)
    assert int(counts.sum()) == 900
    top = int(counts.argmax())
    runner_up = max(int(k) for i, k in enumerate(counts) if i != top) + 100
    assert runner_up_of(counts, top, n) == runner_up
    p_a = lower_confidence_bound(int(counts[top]), n, 0.9 * alpha)
    p_b = min(upper_confidence_bound(runner_up, n, alpha - 0.9 * alpha), 1 - p_a)
    expected = top, round_down(certified_radius(p_a, 0.3, p_b))
    assert certify_on_grid(three_sectors, x, doubtful, 0, args) == expected and expected[1] > 0


# -- Sequential ------------------------------------------------------------------------------------


def path_of(p, random, n, alpha, sigma, radii, bound):
    """(bounds, draws, counts) of one image with answers of probabilities p, class 0 the top."""
    trial = sequential(0, torch.zeros(1), sigma, 10, n, alpha, 0, radii, bound)
    next(trial)
    request = trial.send(torch.tensor([10] + [0] * (len(p) - 1)))
    while True:
        drawn = torch.from_numpy(random.multinomial(request[-1], p))
        try:
            request = trial.send(drawn)
        except StopIteration as end:
            _, counts, draws, bounds = end.value
            return bounds, draws, counts


@pytest.mark.parametrize("p", [
    (0.5, 0.3, 0.2), (0.45, 0.44, 0.11), (0.3,) + (0.7 / 9,) * 9, (0.28, 0.27) + (0.45 / 8,) * 8])
@pytest.mark.parametrize("bound", c.BOUNDS)
@pytest.mark.parametrize("runs", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_sequential_bounds_hold_under_optional_stopping(p, bound, runs, monkeypatch):
    """Both pairs must hold wherever it stops; a radius near the true one makes it look often."""
    monkeypatch.setattr(extras.sequential, "FIRST", 100)
    monkeypatch.setattr(extras.sequential, "GROWTH", 1.15)
    alpha, sigma, random = 0.1, 0.5, np.random.default_rng(len(p))
    true = radius_of(p[0], max(p[1:]), sigma)
    wrong = dict.fromkeys(c.BOUNDS, 0)
    for _ in range(runs):
        bounds, _, _ = path_of(p, random, 4000, alpha, sigma, (true * 0.98,), bound)
        (one, _), (p_a, p_b) = (bounds[name] for name in c.BOUNDS)
        wrong["one-sided"] += one > p[0]
        wrong["two-sided"] += p_a > p[0] or p_b < max(p[1:])
    assert max(wrong.values()) <= binom.ppf(1 - 1e-6, runs, alpha)


@pytest.mark.parametrize("bound", c.BOUNDS)
def test_curtailment_changes_no_table_and_saves_draws(bound, monkeypatch):
    """Same paths with and without it: every radius is certified in both or in neither."""
    sigma, radii, n = 0.25, (0.0, 0.25, 0.5), 3000
    shapes = [(q, (1 - q) * 0.6) + ((1 - q) * 0.4 / 3,) * 3 for q in np.linspace(0.3, 0.999, 25)]
    settled = {}
    for curtailed in (True, False):
        with monkeypatch.context() as patch:
            if not curtailed:
                patch.setattr(extras.sequential, "largest_radius", lambda *_: math.inf)
            total, table = 0, []
            for i, p in enumerate(shapes):
                random = np.random.default_rng(i)
                bounds, drawn, _ = path_of(p, random, n, 0.01, sigma, radii, bound)
                table.append([radius_of(*bounds[bound], sigma) >= r for r in radii])
                total += drawn
            settled[curtailed] = table, total
    assert settled[True][0] == settled[False][0]
    assert settled[True][1] < 0.97 * settled[False][1]


START = {bound: (0.0, 1.0) for bound in c.BOUNDS}


@pytest.mark.parametrize("counts", [[700, 200, 100], [900, 60, 40], [400, 350, 250]])
def test_what_is_out_of_reach_is_what_clopper_pearson_gives_after_only_successes(counts):
    """Nine tenths of the four fifths of alpha that the last look has are the top class's."""
    most, alpha, sigma = 2000, 0.01, 0.5
    now = bounds_after(counts, 0, 1000, most, alpha, START)
    one = lower_confidence_bound(counts[0] + 1000, most, 0.8 * alpha)
    two = lower_confidence_bound(counts[0] + 1000, most, 0.9 * 0.8 * alpha)
    rival = min(1 - two, upper_confidence_bound(counts[1], most, 0.1 * 0.8 * alpha))
    for bound, pair in zip(c.BOUNDS, ((one, 1 - one), (two, rival)), strict=True):
        found = largest_radius(counts, 0, 1000, most, alpha, sigma, bound, now)
        assert found == pytest.approx(radius_of(*pair, sigma), abs=1e-12)


def test_the_two_sided_rule_stops_for_its_own_radius():
    counts, sigma = torch.tensor([600] + [50] * 8), 0.5
    radii = {}
    for bound in c.BOUNDS:
        trial = sequential(0, torch.zeros(1), sigma, 10, 100_000, 0.001, 0, (0.25,), bound)
        next(trial)
        trial.send(torch.tensor([10] + [0] * 8))
        with pytest.raises(StopIteration) as end:
            trial.send(counts)
        radii[bound] = radius_of(*end.value.value[3][bound], sigma)
    assert radii["two-sided"] > 0.25
    assert radii["one-sided"] < 0.25                           # futile: P < Phi(1/2), clearly


# -- As rows ---------------------------------------------------------------------------------------

SPREAD = """
import torch
W = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
def f(x):
    return x.flatten(1) @ W
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(*flags) -> rows of a small run with a linear classifier of ten classes."""
    folder = tmp_path_factory.mktemp("spread")
    (folder / "mine.py").write_text(SPREAD)
    made = {}

    def get(*flags):
        if flags not in made:
            out = folder / str(len(made))
            main(["--sigma", "0.5", "--classifier", f"{folder}/mine.py:f", "--dataset", "digits",
                  "--device", "cpu", "--skip", "24", "--n", "1000", "--n0", "100", "--alpha",
                  "0.01", "--radii", "0", "0.25", "--out", str(out), *flags])
            with (out / "certify_sigma_0.5.tsv").open() as file:
                made[flags] = [*csv.DictReader(file, delimiter="\t")]
        return made[flags]

    return get


def test_either_run_keeps_what_both_bounds_need(run):
    one, two = run(), run("--bound", "two-sided")
    assert [*one[0]][-5:] == ["top", "runner_up", "classes", "one_sided", "two_sided"]
    for a, b in zip(one, two, strict=True):
        keep = [key for key in a if key not in ("predict", "radius", "correct", "time")]
        assert [a[key] for key in keep] == [b[key] for key in keep] and a["classes"] == "10"
        for row, bound in ((a, "one_sided"), (b, "two_sided")):
            assert row["predict"] == (row["top"] if float(row[bound]) >= 0 else "-1")
            assert float(row["radius"]) == max(0.0, float(row[bound]))
        k, r, n = int(a["count"]), int(a["runner_up"]), int(a["n"])
        p_a, p_b = lower_confidence_bound(k, n, 0.009), upper_confidence_bound(r, n, 0.001)
        p_b = min(p_b, 1 - p_a)
        expected = round_down(certified_radius(p_a, 0.5, p_b)) if p_a > p_b else -1
        assert float(a["two_sided"]) == pytest.approx(expected, abs=1e-9)
    assert any(a["predict"] == "-1" != b["predict"] for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("bound", c.BOUNDS)
def test_a_sequential_run_certifies_by_its_own_bound_and_keeps_both(run, bound):
    plug = f"{extras.sequential.__file__}:sequential"
    rows = run("--procedure", plug, "--n", "3000", "--bound", bound)
    assert 1000 <= min(int(row["n"]) for row in rows) < 3000
    for row in rows:
        own = float(row[bound.replace("-", "_")])
        assert row["predict"] == (row["top"] if own >= 0 else "-1")
        assert float(row["radius"]) == max(0.0, own)
    assert any(row["one_sided"] != row["two_sided"] for row in rows)
