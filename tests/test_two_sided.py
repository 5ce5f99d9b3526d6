"""Two-sided certificates: bounds against exact sums and simulation, fixed and sequential, and through the command line."""

import csv
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy.stats import binom, binomtest, multinomial, norm

import certify as c
from certify import (
    ABSTAIN,
    FixedN,
    GaussianNoise,
    Sequential,
    certified_radius,
    certify,
    certify_all,
    lower_confidence_bound,
    main,
    rivals_of,
    two_sided_bounds,
    upper_confidence_bound,
)

CPU = torch.device("cpu")
ROOT = Path(c.__file__).parent

# -- The upper bound -----------------------------------------------------------------------------------------------------


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
    assert upper_confidence_bound(0, n, alpha) == pytest.approx(-math.expm1(math.log(alpha) / n), rel=1e-9)
    for k in {0, 1, n // 3, n // 2, n - 1}:
        bound = upper_confidence_bound(k, n, alpha)
        assert bound == pytest.approx(1 - lower_confidence_bound(n - k, n, alpha), rel=1e-9)
        assert bound == pytest.approx(binomtest(k, n).proportion_ci(1 - 2 * alpha, "exact").high, abs=1e-9)


@pytest.mark.parametrize("n", [1, 10, 200])
def test_upper_bound_covers_every_p(n):
    alpha, k = 0.05, np.arange(n + 1)
    bounds = np.array([upper_confidence_bound(int(i), n, alpha) for i in k])
    for p in (*np.linspace(0, 1, 41), *bounds[:-1] * (1 + 1e-12)):
        assert binom.pmf(k[bounds >= p], n, p).sum() >= 1 - alpha - 1e-9


# -- The pair ------------------------------------------------------------------------------------------------------------


def test_the_pair_is_clopper_pearson_at_half_of_alpha_each():
    counts, n, alpha = [40, 3, 900, 57], 1000, 0.01
    p_a, p_b = two_sided_bounds(counts, 2, n, alpha)
    assert p_a == pytest.approx(binomtest(900, n).proportion_ci(1 - alpha, "exact").low, abs=1e-9)
    assert p_b == pytest.approx(binomtest(57, n).proportion_ci(1 - alpha, "exact").high, abs=1e-9)
    assert two_sided_bounds(torch.tensor(counts), 2, n, alpha) == (p_a, p_b)
    assert two_sided_bounds([995, 5], 0, n, alpha)[1] == pytest.approx(1 - lower_confidence_bound(995, n, alpha / 2))
    assert two_sided_bounds([10], 0, 10, alpha) == (lower_confidence_bound(10, 10, alpha / 2),) * 1 + (
        1 - lower_confidence_bound(10, 10, alpha / 2),)


def test_copies_without_an_answer_count_for_every_rival():
    assert rivals_of([90, 4, 1], 0, 100) == (4 + 5, 2)
    assert two_sided_bounds([90, 4, 1], 0, 100, 0.01) == two_sided_bounds([90, 9, 1], 0, 100, 0.01)
    assert two_sided_bounds([90, 4, 1], 0, 100, 0.01)[1] > two_sided_bounds([90, 4, 1], 0, 95, 0.01)[1]


def holds(p, counts, top, n, alpha):
    p_a, p_b = two_sided_bounds(counts, top, n, alpha)
    return p_a <= p[top] and p_b >= max(q for i, q in enumerate(p) if i != top)


@pytest.mark.parametrize("p", [(0.5, 0.5, 0.0), (0.5, 0.49, 0.01), (0.34, 0.33, 0.33), (1.0, 0.0, 0.0), (0.9, 0.05, 0.05),
                               (0.6, 0.4, 0.0), (0.2, 0.7, 0.1)])
@pytest.mark.parametrize("n", [5, 25])
def test_the_pair_covers_exactly_for_three_classes(p, n):
    """All outcomes of a multinomial; also for a class that is not the largest: nothing depends on a lucky selection."""
    alpha, wrong = 0.1, 0.0
    for a in range(n + 1):
        for b in range(n + 1 - a):
            counts = (a, b, n - a - b)
            if not holds(p, counts, 0, n, alpha):
                wrong += multinomial.pmf(counts, n, p)
    assert wrong <= alpha + 1e-9


CASES = {"near half": lambda k: [0.51, 0.49] + [0.0] * (k - 2), "all on one": lambda k: [1.0] + [0.0] * (k - 1),
         "runner-up spread": lambda k: [0.4] + [0.6 / (k - 1)] * (k - 1),
         "decaying": lambda k: (np.array([0.5**min(i, 60) for i in range(k)]) / sum(0.5**min(i, 60) for i in range(k))).tolist()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
def test_the_pair_covers_in_simulation(case, classes):
    n, alpha, runs, p = 500, 0.1, 2000, CASES[case](classes)
    drawn = np.random.default_rng(classes).multinomial(n, p, runs)
    p_a, p_b = {}, {}
    top, rival = drawn[:, 0], drawn[:, 1:].max(1)
    for k, r in {*zip(top.tolist(), rival.tolist(), strict=True)}:
        p_a[k, r], p_b[k, r] = two_sided_bounds([k, r] + [0] * (classes - 2), 0, k + r, alpha) if k + r == n else (
            lower_confidence_bound(k, n, alpha / 2),
            min(upper_confidence_bound(r, n, alpha / 2), 1 - lower_confidence_bound(k, n, alpha / 2)))
    wrong = sum(p_a[k, r] > p[0] or p_b[k, r] < max(p[1:]) for k, r in zip(top.tolist(), rival.tolist(), strict=True))
    assert wrong <= binom.ppf(1 - 1e-6, runs, alpha)


def test_it_pays_where_answers_are_spread_and_loses_a_hair_where_two_classes_hold_everything():
    n, alpha = 10_000, 0.001
    one = lambda k: certified_radius(lower_confidence_bound(k, n, alpha), 1.0)
    two = lambda counts: certified_radius(*(lambda p: (p[0], 1.0, p[1]))(two_sided_bounds(counts, 0, n, alpha)))
    assert one(6000) < 0.3 and two([6000] + [500] * 8) > 2 * one(6000)
    assert one(4500) == 0 and two([4500] + [550] * 10) > 0.5                              # no majority, and a certificate
    assert 0.95 * one(9000) < two([9000, 1000]) < one(9000)


# -- certify() and the pooled engine -------------------------------------------------------------------------------------


def three_sectors(x):
    """The largest of three linear scores: P[f = c] is known up to an integral, the distances to the planes exactly."""
    return torch.stack([x[:, 0, 0, 0], x[:, 0, 0, 1], torch.zeros(len(x))], dim=1)


def points(seed, m):
    return torch.rand(m, 1, 1, 2, generator=torch.Generator().manual_seed(seed)) * 1.2 - 0.2


def true_radius(x):
    scores = sorted((float(x[0, 0, 0]), float(x[0, 0, 1]), 0.0), reverse=True)
    between = {(0, 1): math.sqrt(2)}
    a, b = float(x[0, 0, 0]), float(x[0, 0, 1])
    top = max((a, 0), (b, 1), (0.0, 2))[1]
    others = [((a if top == 0 else b if top == 1 else 0.0) - other) / between.get(tuple(sorted((top, i))), 1.0)
              for i, other in enumerate((a, b, 0.0)) if i != top]
    return top, min(others), scores


def test_two_sided_radii_stay_below_the_distance_and_the_functions_agree():
    sigma, alpha, n, m = 0.5, 0.05, 1000, 400
    images = list(enumerate(points(1, m)))
    trials = {t.index: t for t in certify_all(three_sectors, images, GaussianNoise(sigma), 30, FixedN(n, alpha), seed=4)}
    wrong = gained = 0
    for i, x in images:
        prediction, radius = trials[i].certificate(sigma, "two-sided")
        _, one = trials[i].certificate(sigma)
        top, distance, _ = true_radius(x)
        wrong += prediction != ABSTAIN and (prediction != top or radius > distance)
        gained += radius > one
        if i < 40:
            for bound in c.BOUNDS:
                assert certify(three_sectors, x, sigma, 30, n, alpha, 4, i, bound=bound) == trials[i].certificate(sigma, bound)
    assert wrong <= binom.ppf(1 - 1e-6, m, alpha) and gained > m / 10


def test_an_unknown_bound_is_refused():
    with pytest.raises(ValueError, match="one-sided, two-sided"):
        certify(three_sectors, points(0, 1)[0], 0.5, n=100, bound="both")


def test_two_sided_abstains_where_p_a_is_not_above_p_b_and_not_at_one_half():
    spread = lambda x: torch.nn.functional.one_hot(((x.flatten(1)[:, 0] * 1000).long() % 10).clamp(max=6), 7).float()
    x = torch.full((1, 1, 1), 0.5)                                    # class 6: four tenths, the others: one tenth each
    assert certify(spread, x, 0.5, n0=500, n=3000) == (ABSTAIN, 0.0)
    prediction, radius = certify(spread, x, 0.5, n0=500, n=3000, bound="two-sided")
    exact = 0.25 * (norm.ppf(0.4) - norm.ppf(0.1))
    assert prediction == 6 and 0.7 * exact < radius < exact
    even = lambda x: torch.nn.functional.one_hot((x.flatten(1)[:, 0] * 1000).long() % 7, 7).float()
    assert certify(even, x, 0.5, n0=500, n=3000, bound="two-sided")[0] == ABSTAIN


def test_uncertain_grid_draws_count_for_every_rival():
    """A noise that declares every tenth copy uncertain: they are nobody's success and every rival's."""
    class Doubtful(GaussianNoise):
        def __call__(self, x, generator, out):
            super().__call__(x, generator, out)
            return torch.arange(len(out)) % 10 != 0

    (trial,) = certify_all(three_sectors, [(0, torch.tensor([[[0.9, 0.0]]]))], Doubtful(0.3), 100, FixedN(1000, 0.01))
    assert int(trial.counts.sum()) == 900
    runner_up, _ = rivals_of(trial.counts, trial.top, trial.n)
    assert runner_up == max(int(x) for i, x in enumerate(trial.counts) if i != trial.top) + 100
    p_a, p_b = trial.bounds["two-sided"]
    assert p_a == lower_confidence_bound(trial.k, 1000, 0.005)
    assert p_b == min(upper_confidence_bound(runner_up, 1000, 0.01 / 2), 1 - p_a)


# -- Sequential ----------------------------------------------------------------------------------------------------------


def path_of(rule, p, random, top=0):
    """(bounds, draws, counts) of one image with answers of probabilities p, stopped by the rule."""
    counts, n, bounds = np.zeros(len(p), dtype=int), 0, None
    while True:
        look = rule.next_look(n)
        counts, n = counts + random.multinomial(look - n, p), look
        bounds, stop = rule.decide(counts.tolist(), top, n, bounds)
        if stop:
            return bounds, n, counts


@pytest.mark.parametrize("p", [(0.5, 0.3, 0.2), (0.45, 0.44, 0.11), (0.3,) + (0.7 / 9,) * 9, (0.28, 0.27) + (0.45 / 8,) * 8])
@pytest.mark.parametrize("bound", c.BOUNDS)
@pytest.mark.parametrize("runs", [25, pytest.param(300, marks=pytest.mark.slow)])
def test_sequential_bounds_hold_under_optional_stopping(p, bound, runs):
    """Both pairs must hold wherever the rule stops; a radius near the true one makes it look often."""
    alpha, sigma, random = 0.1, 0.5, np.random.default_rng(len(p))
    true = sigma / 2 * (norm.ppf(p[0]) - norm.ppf(max(p[1:])))
    rule = Sequential(4000, alpha, sigma, (true * 0.98,), bound=bound, first=100, growth=1.15)
    wrong = dict.fromkeys(c.BOUNDS, 0)
    for _ in range(runs):
        bounds, _, _ = path_of(rule, p, random)
        wrong["one-sided"] += bounds["one-sided"][0] > p[0]
        wrong["two-sided"] += bounds["two-sided"][0] > p[0] or bounds["two-sided"][1] < max(p[1:])
    assert max(wrong.values()) <= binom.ppf(1 - 1e-6, runs, alpha)


@pytest.mark.parametrize("bound", c.BOUNDS)
def test_curtailment_changes_no_table_and_saves_draws(bound, monkeypatch):
    """Same paths with and without it: every radius of the table is certified in both or in neither."""
    sigma, radii, n = 0.25, (0.0, 0.25, 0.5), 3000
    shapes = [(q, (1 - q) * 0.6) + ((1 - q) * 0.4 / 3,) * 3 for q in np.linspace(0.3, 0.999, 25)]
    settled = {}
    for curtailed in (True, False):
        with monkeypatch.context() as patch:
            if not curtailed:
                patch.setattr(Sequential, "most", lambda *_: math.inf)
            rule, total, table = Sequential(n, 0.01, sigma, radii, bound=bound), 0, []
            for i, p in enumerate(shapes):
                bounds, drawn, _ = path_of(rule, p, np.random.default_rng(i))
                p_a, p_b = bounds[bound]
                table.append([p_a > p_b and rule.radius(p_a, p_b) >= r for r in radii])
                total += drawn
            settled[curtailed] = table, total
    assert settled[True][0] == settled[False][0] and settled[True][1] < 0.97 * settled[False][1]


@pytest.mark.parametrize("bound", c.BOUNDS)
def test_what_is_out_of_reach_is_what_only_successes_would_give(bound):
    rule = Sequential(2000, 0.01, 0.5, (0.5,), bound=bound)
    for counts in ([700, 200, 100], [900, 60, 40], [400, 350, 250]):
        now = rule.bounds(counts, 0, 1000, None)
        later = rule.bounds([counts[0] + 1000, *counts[1:]], 0, 2000, now)
        assert rule.most(counts, 0, 1000, now) == pytest.approx(rule.radius(*later[bound]), abs=1e-12)


def test_the_two_sided_rule_stops_for_its_own_radius():
    counts, n = [600, 50, 50, 50, 50, 50, 50, 50, 50], 1000
    one, two = (Sequential(100_000, 0.001, 0.5, (0.25,), bound=bound) for bound in c.BOUNDS)
    assert two.decide(counts, 0, n)[1] and two.radius(*two.decide(counts, 0, n)[0]["two-sided"]) > 0.25
    assert one.decide(counts, 0, n)[1]                                # futile: P < Phi(1/2), clearly
    assert certified_radius(one.decide(counts, 0, n)[0]["one-sided"][0], 0.5) < 0.25


# -- The command line ----------------------------------------------------------------------------------------------------

SPREAD = """
import torch
W = torch.randn(64, 10, generator=torch.Generator().manual_seed(3))
def f(x):
    return x.flatten(1) @ W
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(*flags) -> the TSV of a small run with a linear classifier of ten classes."""
    folder = tmp_path_factory.mktemp("spread")
    (folder / "mine.py").write_text(SPREAD)
    made = {}

    def get(*flags):
        if flags not in made:
            out = folder / str(len(made))
            main(["--sigma", "0.5", "--classifier", f"{folder}/mine.py:f", "--dataset", "digits", "--device", "cpu", "--skip",
                  "24", "--n", "1000", "--n0", "100", "--alpha", "0.01", "--radii", "0", "0.25", "--out", str(out), *flags])
            made[flags] = out / "certify_sigma_0.5.tsv"
        return made[flags]
    return get


def rows(path):
    return list(csv.DictReader(Path(path).open(), delimiter="\t"))


def test_either_run_keeps_what_both_bounds_need(run):
    one, two = rows(run()), rows(run("--bound", "two-sided"))
    assert [*one[0]][-5:] == ["top", "runner_up", "classes", "one_sided", "two_sided"]
    for a, b in zip(one, two, strict=True):
        keep = [key for key in a if key not in ("predict", "radius", "correct", "time")]
        assert [a[key] for key in keep] == [b[key] for key in keep] and a["classes"] == "10"
        for row, bound in ((a, "one_sided"), (b, "two_sided")):
            assert row["predict"] == (row["top"] if float(row[bound]) >= 0 else "-1")
            assert float(row["radius"]) == max(0.0, float(row[bound]))
        k, r, n = int(a["count"]), int(a["runner_up"]), int(a["n"])
        p_a, p_b = lower_confidence_bound(k, n, 0.005), upper_confidence_bound(r, n, 0.01 / 2)
        p_b = min(p_b, 1 - p_a)
        expected = c.round_down(certified_radius(p_a, 0.5, p_b)) if p_a > p_b else -1
        assert float(a["two_sided"]) == pytest.approx(expected, abs=1e-9)
    assert any(a["predict"] == "-1" != b["predict"] for a, b in zip(one, two, strict=True))


def test_a_report_gives_either_table_of_either_run(run, capsys):
    tables = {}
    for flags, bound in itertools.product([(), ("--bound", "two-sided")], ("one-sided", "two-sided", "both")):
        file = str(run(*flags))
        capsys.readouterr()
        main(["--report", file, "--bound", bound, "--format", "csv", "--radii", "0", "0.25"])
        lines = [line.rsplit(",", 1)[0] for line in capsys.readouterr().out.splitlines()]                # less the mean time
        tables.setdefault(bound, []).append(lines)
    assert all(one == two for one, two in tables.values())
    one, two, both = (tables[bound][0] for bound in ("one-sided", "two-sided", "both"))
    numbers = lambda line: line.split(",")[1:]
    assert numbers(both[1]) == numbers(one[1]) and numbers(both[2]) == numbers(two[1])
    assert both[1].startswith("0.5 one-sided,") and both[2].startswith("0.5 two-sided,") and "two-sided" in two[0]
    assert float(numbers(two[1])[3]) > float(numbers(one[1])[3])                          # ACR


def test_the_end_of_a_run_prints_both_and_draws_the_second_dashed(run, tmp_path, capsys, monkeypatch):
    axes = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: axes.append(self.axes[0]) or save(self, *a, **k))
    capsys.readouterr()
    run("--seed", "3")
    out = capsys.readouterr().out
    assert "0.5 one-sided" in out and "0.5 two-sided" in out and "each holds by itself" in out
    first, second = axes[0].lines
    assert (first.get_linestyle(), second.get_linestyle()) == ("-", "--") and first.get_color() == second.get_color()


def test_a_file_without_those_columns_has_the_one_sided_radius_only(tmp_path, capsys):
    (tmp_path / "sigma_1").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t0.5\t1\t0:00:01\n")
    main(["--report", str(tmp_path / "sigma_1")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["--report", str(tmp_path / "sigma_1"), "--bound", "two-sided"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "one-sided radius only" in error


def test_rows_of_a_version_without_bounds_are_refused_as_other_settings(run, tmp_path, capsys):
    settings = json.loads(Path(str(run()).replace(".tsv", ".json")).read_text())
    del settings["bound"]
    (tmp_path / "certify_sigma_0.5.json").write_text(json.dumps(settings))
    (tmp_path / "certify_sigma_0.5.tsv.part0").write_text("0\t2\t2\t0.1\t1\t0:00:01\t900\t1000\t0.5\t0.01\n")
    with pytest.raises(SystemExit) as stop:
        main(["--sigma", "0.5", "--classifier", settings["classifier"], "--dataset", "digits", "--device", "cpu", "--skip", "24",
              "--n", "1000", "--alpha", "0.01", "--radii", "0", "0.25", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "bound None -> one-sided" in capsys.readouterr().err
    assert (tmp_path / "certify_sigma_0.5.tsv.part0").exists()


@pytest.mark.parametrize("bound", c.BOUNDS)
def test_sequential_mode_and_shards_have_both_bounds(run, bound, tmp_path, capsys):
    whole = rows(run("--sequential", "--n", "3000", "--bound", bound))
    assert min(int(row["n"]) for row in whole) < 3000
    for row in whole:
        column = bound.replace("-", "_")
        assert float(row["radius"]) == max(0.0, float(row[column]))
    files = [run("--sequential", "--n", "3000", "--bound", bound, "--shard", f"{i}/2") for i in range(2)]
    parts = [row for file in files for path in file.parent.glob("*.tsv") for row in rows(path)]
    time = lambda row: {key: value for key, value in row.items() if key != "time"}
    assert sorted(map(str, map(time, parts))) == sorted(map(str, map(time, whole)))


def test_pictures_are_certified_by_the_bound_that_is_asked_for(run, tmp_path, capsys):
    from PIL import Image
    for i, pixels in enumerate((np.eye(8) * 255, np.full((8, 8), 90))):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{i}.png")
    folder = run().parent.parent
    out = {}
    for bound in c.BOUNDS:
        capsys.readouterr()
        main(["--sigma", "0.5", "--classifier", f"{folder}/mine.py:f", "--dataset", "digits", "--device", "cpu", "--n", "1000",
              "--bound", bound, "--images", *(str(tmp_path / f"{i}.png") for i in range(2))])
        out[bound] = capsys.readouterr().out.splitlines()
    space = {}
    exec(SPREAD, space)
    for i, pixels in enumerate((np.eye(8) * 255, np.full((8, 8), 90))):
        x = torch.tensor(pixels.astype(np.uint8), dtype=torch.float32)[None] / 255
        for bound in c.BOUNDS:
            prediction, radius = certify(space["f"], x, 0.5, n=1000, index=i, batch=400, bound=bound)
            assert ("abstains," in out[bound][i] or ": abstains (" in out[bound][i]) if prediction == ABSTAIN else (
                f"{radius:.6f}" in out[bound][i])
