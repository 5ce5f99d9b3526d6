"""Reports: logs of ours and of others, tables and curves, and what is refused."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import beta, norm

from certify import (
    BOUNDS,
    certified_accuracy,
    main,
    plot,
    read_curve,
    read_curves,
    read_log,
    table,
)
from extras.published import PUBLISHED
from extras.published import main as published

ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "results").rglob("*.tsv"))
COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
OURS = f"{COHEN}\tcount\tn\tsigma\talpha"
BOTH = f"{OURS}\ttop\trunner_up\tclasses\tone_sided\ttwo_sided"
ROWS = [
    "0\t3\t3\t0.5\t1\t0:00:01.000000", "20\t1\t1\t0.25\t1\t0:00:02.500000",
    "40\t2\t-1\t0.0\t0\t0:01:00.500000", "60\t5\t4\t0.9\t0\t1:00:00.000000",
    "80\t6\t6\t0.0\t1\t1 day, 0:00:00"]


def write(path, *rows, header=COHEN, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + end)
    return path


def log(path, *rows):
    """Rows (idx, label, predict, radius) in Cohen's format."""
    return write(path, *("\t".join([*map(str, row), "1", "0:00:01"]) for row in rows))


def both(row, sigma, top, one_sided, two_sided):
    return f"{row}\t900\t1000\t{sigma}\t0.001\t{top}\t60\t10\t{one_sided}\t{two_sided}"


def cells(text):
    """A markdown table's header and rows, after a look at its form."""
    lines = [line.strip() for line in text.strip().splitlines()]
    assert all(line[0] == line[-1] == "|" for line in lines)
    header, rule, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    assert len({len(line) for line in (header, rule, *rows)}) == 1 == len({*map(len, lines)})
    assert all(cell and {*cell} <= {*"-:"} for cell in rule)   # else it is no table in markdown
    return header, rows


def report(capsys, *argv):
    """(header, rows) of the table that --report prints."""
    capsys.readouterr()
    main(["--report", *map(str, argv)])
    return cells(capsys.readouterr().out)


def refused(capsys, *argv):
    """The one line of a report that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["--report", *map(str, argv)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


# -- One log ---------------------------------------------------------------------------------------


def test_cohens_logs_are_read_and_summed_by_hand(tmp_path):
    one = read_curve(write(tmp_path / "sigma_0.50", *ROWS))
    assert (one.images, one.sigma, one.bound) == (5, 0.5, "one-sided")
    assert one.acr == pytest.approx((0.5 + 0.25) / 5) and one.abstained == pytest.approx(1 / 5)
    radii = (0, 0.25, 0.250001, 0.5, 0.51)
    assert [certified_accuracy(one, r) for r in radii] == [3 / 5, 2 / 5, 1 / 5, 1 / 5, 0]


def test_right_is_who_predicts_the_label_whatever_the_column_says(tmp_path):
    """Some published scripts write a running count into it; label -1 stands for an unknown one."""
    odd = [row.replace("\t1\t0:00", f"\t{i}\t0:00") for i, row in enumerate(ROWS[:2], 2)]
    unknown = "100\t-1\t-1\t0.5\t1\t0:00:01"
    one = read_curve(write(tmp_path / "sigma_1", *odd, *ROWS[2:], unknown))
    assert certified_accuracy(one, 0) == 3 / 6 and one.acr == pytest.approx(0.75 / 6)


@pytest.mark.parametrize(("path", "sigma"), [
    ("resnet110/noise_0.50/test/sigma_0.25", 0.25), ("noise_1.00/sigma_0.50.tsv", 0.5),
    ("run/certify_sigma_1.tsv", 1), ("cohen/imagenet/noise_0.25", 0.25)])
def test_sigma_of_a_log_without_that_column_is_in_its_name(tmp_path, path, sigma):
    """Cohen's logs lie in noise_TRAINED/test/sigma_CERTIFIED, and the two may differ."""
    assert read_curve(write(tmp_path / path, *ROWS)).sigma == sigma


@pytest.mark.parametrize("name", [
    "x.tsv", "sigma0.25.tsv", "s_0.25", "sigma_0", "sigma_large", "sigma_0.25_0.5.tsv",
    "sigma_1_old.tsv", "sigma_1.25_old.tsv", "noise_1.50_2"])
def test_a_sigma_that_is_not_certain_is_refused(tmp_path, capsys, name):
    assert name in refused(capsys, write(tmp_path / name, *ROWS))


def test_a_part_of_a_run_of_the_old_version_is_refused(tmp_path, capsys):
    rows = [f"{row}\t90\t1000\t0.25\t0.01" for row in ROWS]
    file = write(tmp_path / "certify_sigma_0.25_shard_0_of_2.tsv", *rows, header=OURS)
    assert f"{file} is a part of a run: concatenate" in refused(capsys, file)


def test_our_column_gives_sigma_whatever_the_name_says(tmp_path):
    rows = [f"{row}\t90\t1000\t0.25\t0.01" for row in ROWS]
    assert read_curve(write(tmp_path / "sigma_1", *rows, header=OURS)).sigma == 0.25


def test_rows_of_several_sigmas_are_no_curve(tmp_path, capsys):
    rows = [f"{row}\t90\t1000\t{sigma}\t0.01" for row, sigma in zip(ROWS, (1, 1, 1, 1, 0.5),
                                                                   strict=True)]
    error = refused(capsys, write(tmp_path / "x.tsv", *rows, header=OURS))
    assert "x.tsv must have one sigma" in error and "it has 2" in error


def test_an_image_twice_counts_once_and_with_other_values_never(tmp_path, capsys):
    assert len(read_log(write(tmp_path / "same_sigma_1", *ROWS, *ROWS[1:3]))) == 5
    later = ROWS[1].replace("0:00:02", "0:00:03")              # only a time differs
    assert len(read_log(write(tmp_path / "time_sigma_1", *ROWS, later))) == 5
    for column, other in ((1, "9"), (2, "-1"), (3, "0.26")):
        fields = ROWS[1].split("\t")
        fields[column] = other
        file = write(tmp_path / f"other{column}_sigma_1", *ROWS, "\t".join(fields))
        assert f"{file} has an image twice, with other values" in refused(capsys, file)


@pytest.mark.parametrize("torn", [
    "80\t6\t6\t0.7", "80\t6\t6\t0.70\t1", "8", "80\t6"])
def test_a_torn_last_row_is_dropped(tmp_path, torn):
    whole = write(tmp_path / "a_sigma_1", *ROWS[:4])
    half = write(tmp_path / "b_sigma_1", *ROWS[:4], torn, end="")
    assert read_log(half).tolist() == read_log(whole).tolist() and len(read_log(whole)) == 4


def test_a_complete_last_row_without_a_newline_counts(tmp_path):
    whole, bare = (write(tmp_path / f"{len(end)}_sigma_1", *ROWS, end=end) for end in ("\n", ""))
    assert read_log(whole).tolist() == read_log(bare).tolist() and len(read_log(bare)) == 5


def test_marks_of_editors_and_of_joined_files_are_harmless(tmp_path):
    """A byte-order mark, blank lines, a repeated header, lines that end as Windows has them."""
    plain = write(tmp_path / "plain_sigma_1", *ROWS)
    odd = tmp_path / "odd_sigma_1"
    lines = [COHEN, *ROWS[:2], "", "  ", COHEN, *ROWS[2:], ""]
    odd.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_log(odd).tolist() == read_log(plain).tolist()


def test_shards_of_a_log_in_cohens_columns_joined_by_cat_are_its_curve(tmp_path, capsys):
    """A log of ours without our columns, in two shards that overlap, the last of them torn."""
    log_file = ROOT / "results/digits/certify_sigma_0.25.tsv"
    lines = ["\t".join(line.split("\t")[:6]) for line in log_file.read_text().splitlines()]
    shards = "\n".join([*lines[:80], lines[0], *lines[60:]]) + "\n"
    file = tmp_path / "noise_0.25"
    file.write_text(shards + lines[80][:9])
    theirs, ours = read_curve(file), read_curve(log_file)
    assert (theirs.images, theirs.acr, theirs.abstained) == (120, ours.acr, ours.abstained)
    assert np.array_equal(theirs.radii, ours.radii)

    forged = lines[80].split("\t")
    forged[3] = "9.000000"
    file.write_text(shards + "\t".join(forged) + "\n")
    assert f"{file} has an image twice, with other values" in refused(capsys, file)


@pytest.mark.parametrize(("row", "words"), [
    ("20\t1\t1\t0.25", "line 3: 4 columns, not 6"),
    ("20\t1\t1\t0.25\t1\t0:00:01\t7\t8", "line 3: 8 columns, not 6"),
    ("20\tcat\t1\t0.25\t1\t0:00:01", "label is no number in row '20\\tcat"),
    ("20\t1\t1\tnan\t1\t0:00:01", "radius is no number in row '20\\t1\\t1\\tnan"),
    ("20\t1\t1\tinf\t1\t0:00:01", "radius is no number in row '20"),
    ("x\t1\t1\t0.5\t1\t0:00:01", "idx is no number in row 'x")])
def test_a_malformed_row_is_named(tmp_path, capsys, row, words):
    file = write(tmp_path / "sigma_1", ROWS[0], row, *ROWS[2:])
    error = refused(capsys, file)
    assert str(file) in error and words in error


@pytest.mark.parametrize("text", [
    None, "", "\n", "hello\n", "idx,label\n1,2\n", "a\tb\n1\t2\n", "\x00\xff\n", f"{COHEN}\n",
    f"{COHEN}\n1\t2\n", f"{COHEN}\na\tb\tc\td\te\tf\n",
    "idx\tlabel\tpredict\tcorrect\ttime\n0\t3\t3\t1\t0:00:01\n"])                # has no radii
def test_what_is_no_log_is_refused_by_name(tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "sigma_1.tsv").write_bytes(text.encode("latin1"))
    assert "sigma_1.tsv" in refused(capsys, tmp_path / "sigma_1.tsv")


# -- Both bounds -----------------------------------------------------------------------------------

PAIRS = [both("0\t3\t3\t0.5\t1\t0:00:01", 1, 3, "0.500000", "0.600000"),
         both("1\t4\t-1\t0.0\t0\t0:00:01", 1, 4, "-1", "0.200000"),
         both("2\t5\t-1\t0.0\t0\t0:00:01", 1, 6, "-1", "0.300000")]


def test_a_report_shows_both_bounds_where_the_log_has_both(tmp_path, capsys):
    file = write(tmp_path / "x.tsv", *PAIRS, header=BOTH)
    header, rows = report(capsys, file, "--radii", "0", "0.55")
    assert header[1:6] == ["sigma", "bound", "images", "r=0", "r=0.55"]
    one, two = rows
    assert one[1:6] == ["1", "one-sided", "3", "33.3", "0.0"]
    assert two[1:6] == ["1", "two-sided", "3", "66.7", "33.3"]
    abstain, acr = header.index("abstain"), header.index("ACR")
    assert one[abstain] == "66.7%" and two[abstain] == "0.0%"
    assert one[acr] == f"{0.5 / 3:.3f}" and two[acr] == f"{0.8 / 3:.3f}"
    assert report(capsys, file, "--radii", "0", "0.55", "--bound", "two-sided")[1] == [two]
    assert report(capsys, file, "--radii", "0", "0.55", "--bound", "one-sided")[1] == [one]


def test_logs_of_cohens_kind_are_one_sided_and_say_so(tmp_path, capsys):
    for name, header in (("a", COHEN), ("b", OURS)):
        more = "\t90\t1000\t1\t0.01" if header == OURS else ""
        file = write(tmp_path / f"{name}_sigma_1", *(row + more for row in ROWS), header=header)
        (row,) = report(capsys, file)[1]
        assert row[2] == "one-sided"
        assert f"{file} has no counts of other classes: its radii are one-sided" in refused(
            capsys, file, "--bound", "two-sided")


# -- Curves and their names ------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """Two classifiers, each at two sigmas, in folders of their own."""
    return [log(tmp_path / name / f"certify_sigma_{sigma}.tsv", (0, 3, 3, r), (1, 4, 4, 0.2))
            for name, r in (("dmae", 0.9), ("mae", 0.4)) for sigma in ("0.25", "0.5")]


def test_curves_have_the_names_of_folders_or_of_labels(two, tmp_path, capsys):
    """One label a folder, or one a file; both in the order in which the files were given."""
    folders = [str(tmp_path / name) for name in ("dmae", "mae")]
    for files, labels, names in (
            (two, [], folders), (two, ["A", "B"], "AB"), (two, ["A", "A", "B", "B"], "AB"),
            (two[::-1], ["B", "A"], "AB"), ([*two[2:], *two[:2]], ["B", "B", "A", "A"], "AB")):
        header, rows = report(capsys, *files, "--radii", "0", "0.5",
                              *(["--label", *labels] if labels else []))
        first, second = names
        assert [row[:2] for row in rows] == [
            [first, "0.25"], [first, "0.5"], [second, "0.25"], [second, "0.5"],
            [first, "best"], [second, "best"]]
        assert [row[header.index("r=0.5")] for row in rows] == [
            "50.0", "50.0", "0.0", "0.0", "50.0", "0.0"]
    error = refused(capsys, *two, "--label", "A", "B", "C")
    assert "4 files or 2 folders" in error


def test_files_are_never_merged(tmp_path, capsys):
    """Halves of one run in one folder are two curves of half the images each."""
    files = [log(tmp_path / f"{name}_sigma_1", row)
             for name, row in (("a", (0, 3, 3, 0.6)), ("b", (1, 3, 3, 0.1)))]
    _, rows = report(capsys, *files)
    assert [row[3] for row in rows] == ["1", "1"]
    _, rows = report(capsys, *files, "--label", "A", "B", "--radii", "0.5")
    assert [(row[0], row[4]) for row in rows] == [("A", "100.0"), ("B", "0.0")]


def test_best_stands_only_where_the_files_of_a_label_differ_in_sigma(tmp_path, capsys):
    """It is the best at each radius, of one label and one bound."""
    a, b, c = (log(tmp_path / f"{name}_sigma_{sigma}.tsv", *rows) for name, sigma, rows in (
        ("a", 0.25, [(i, 1, 1, 0.4) for i in range(4)]),
        ("b", 1, [(i, 1, 1 if i < 2 else 2, 0.9) for i in range(4)]),
        ("c", 0.25, [(i, 1, 1, 0.7) for i in range(4)])))
    options = ["--radii", "0", "0.5", "0.8"]
    _, rows = report(capsys, b, a, *options)
    assert [row[1] for row in rows] == ["0.25", "1", "best"]
    assert rows[-1][2:7] == ["one-sided", "", "100.0", "50.0", "50.0"]
    _, rows = report(capsys, a, b, c, "--label", "A", "B", "A", *options)
    assert "best" not in {row[1] for row in rows}
    _, rows = report(capsys, a, b, c, "--label", "A", "B", "B", *options)
    assert [row[:2] for row in rows if row[1] == "best"] == [["B", "best"]]


def test_best_is_of_each_bound(tmp_path, capsys):
    files = []
    for sigma, one, two in ((0.5, "-1", "0.500000"), (1, "0.300000", "0.100000")):
        row = both("0\t3\t3\t0.5\t1\t0:00:01", sigma, 3, one, two)
        files.append(write(tmp_path / f"{sigma}.tsv", row, header=BOTH))
    _, rows = report(capsys, *files, "--radii", "0", "0.4")
    assert [(row[2], *row[4:6]) for row in rows if row[1] == "best"] == [
        ("one-sided", "100.0", "0.0"), ("two-sided", "100.0", "100.0")]


# -- The picture -----------------------------------------------------------------------------------


def is_picture(file):
    with Image.open(file) as picture:
        colours = len(picture.convert("RGB").getcolors(1 << 24))
        return picture.format == "PNG" and min(picture.size) > 300 and colours > 10


def test_the_curves_are_the_accuracy_at_each_radius(tmp_path):
    """Two-sided is dashed, in the colour of the same log's one-sided curve."""
    pairs = write(tmp_path / "pairs.tsv", *PAIRS, header=BOTH)
    none_right = write(tmp_path / "sigma_0.5", ROWS[2])
    curves = read_curves([pairs, none_right])
    axis = plot(tmp_path / "curve.png", curves)
    assert is_picture(tmp_path / "curve.png") and len(axis.lines) == len(curves) == 3
    for line, curve in zip(axis.lines, curves, strict=True):
        r, accuracy = line.get_data()
        assert r[0] == 0 and r[-1] >= max([0.1, *curve.radii])
        expected = [100 * np.mean(np.pad(curve.radii, (0, curve.images - len(curve.radii)),
                                         constant_values=-1) >= x) for x in r]
        assert accuracy == pytest.approx(expected)
    styles = {curve.bound: (line.get_linestyle(), line.get_color())
              for line, curve in zip(axis.lines, curves, strict=True) if curve.sigma == 1}
    (solid, colour), (dashed, same) = styles["one-sided"], styles["two-sided"]
    assert (solid, dashed) == ("-", "--") and colour == same


def test_a_report_draws_what_it_prints(two, tmp_path, capsys, monkeypatch):
    axes, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: axes.append(self.axes[0]) or save(self, *a, **k))
    report(capsys, *two, "--label", "A", "B", "--plot", tmp_path / "p.png")
    assert is_picture(tmp_path / "p.png") and len(axes[0].lines) == 4
    labels = [line.get_label() for line in axes[0].lines]
    assert all(name in label for name, label in zip("AABB", labels, strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_curves_stand_beside_the_published_figures(two, name, tmp_path, capsys, monkeypatch):
    axes, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: axes.append(self.axes[0]) or save(self, *a, **k))
    published([name, str(tmp_path / "p.png"), *map(str, two)])
    assert is_picture(tmp_path / "p.png")
    radii, methods = PUBLISHED[name]
    header, rows = cells(capsys.readouterr().out)
    assert [cell for cell in header if cell.startswith("r=")] == [f"r={r:g}" for r in radii]
    assert len(rows) == 6
    marks = {line.get_label(): line.get_data() for line in axes[-1].lines[4:]}
    assert {label: tuple(y) for label, (x, y) in marks.items()} == methods
    assert all(tuple(x) == radii for x, _ in marks.values())
    with pytest.raises(ValueError, match="imagenet|cifar10"):
        published(["svhn", "p.png", *map(str, two)])


# -- What is committed -----------------------------------------------------------------------------


@functools.cache
def radii_of(count, runner_up, n, sigma, alpha):
    """Both columns, from the two counts that they rest on."""
    lower = lambda alpha: beta.ppf(alpha, count, n - count + 1) if count else 0
    upper = beta.isf(0.1 * alpha, runner_up + 1, n - runner_up) if runner_up < n else 1
    radii = []
    for p_a, p_b in ((lower(alpha), 1), (lower(0.9 * alpha), upper)):
        p_b = min(p_b, 1 - p_a)
        radii.append(sigma / 2 * (norm.ppf(p_a) - norm.ppf(p_b)) if p_a > p_b else -1)
    return radii


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_committed_log_is_read_and_holds_what_its_counts_say(file):
    rows = read_log(file)
    (one, *two) = read_curves([file])
    assert one.images == len(rows) == len(file.read_text().splitlines()) - 1
    shown = BOUNDS if "top" in rows.dtype.names else BOUNDS[:1]
    assert tuple(curve.bound for curve in (one, *two)) == shown
    if len({*rows["n"].tolist()}) > 1 or not two:              # sequential, or before both bounds
        return
    for row in rows:
        k, r, n = (int(row[name]) for name in ("count", "runner_up", "n"))
        exact = radii_of(k, r, n, float(row["sigma"]), float(row["alpha"]))
        for written, radius in zip((row["one_sided"], row["two_sided"]), exact, strict=True):
            assert (written == radius == -1) or radius - 1.1e-6 < written < max(radius, 1e-9)


def test_the_table_of_committed_logs_is_what_it_was():
    """Of results/digits, at sigma 0.25, as README prints it."""
    curves = read_curves([ROOT / "results/digits/certify_sigma_0.25.tsv"])
    _, rows = cells(table(curves, (0, 0.25, 0.5, 0.75)))
    numbers = [[float(cell.strip("%")) for cell in row[3:]] for row in rows]
    assert numbers == [[120, 98.3, 85.8, 65.0, 17.5, 0.538, 0.8],
                       [120, 98.3, 87.5, 68.3, 17.5, 0.552, 0.0]]
    assert all(math.isfinite(x) for row in numbers for x in row)
