"""Reports: numbers from others' logs, several classifiers in one table, and what is never merged."""

import csv
import json

import pytest
from scipy.stats import binomtest

from certify import excess, main, summarise

COHEN = "idx\tlabel\tpredict\tradius\tcorrect\ttime"


def log(path, *rows, header=COHEN, **settings):
    """Rows (idx, label, predict, radius) as a TSV; with `settings` also the JSON beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header] + ["\t".join([*map(str, row), str(int(row[1] == row[2])), "0:00:01.000000"]) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    if settings:
        path.with_name(path.name.removesuffix(".tsv") + ".json").write_text(json.dumps(settings))
    return path


def report(capsys, *argv):
    capsys.readouterr()
    main(["--report", *map(str, argv), "--format", "csv", "--radii", "0", "0.5"])
    out, err = capsys.readouterr()
    return list(csv.reader(out.splitlines())), err


def refused(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["--report", *map(str, argv)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    return error


def test_right_is_who_predicts_the_label_whatever_the_column_says(tmp_path, capsys):
    """Some published scripts write a running count there: read as it stands, four of four would be right."""
    file = tmp_path / "sigma_0.50"
    file.write_text(f"{COHEN}\n0\t3\t3\t0.6\t1\t0:00:01\n1\t2\t5\t0.6\t1\t0:00:01\n2\t2\t-1\t0.0\t1\t0:00:01\n3\t1\t1\t0.7\t2\t0:00:01\n")
    rows, err = report(capsys, file)
    assert rows[1][2:4] == ["50.0", "50.0"]
    assert err.count("\n") == 1 and "sigma_0.50" in err and "3 of 4 rows" in err


def test_a_right_column_is_not_mentioned(tmp_path, capsys):
    assert report(capsys, log(tmp_path / "sigma_1", (0, 3, 3, 0.6)))[1] == ""


def test_a_log_of_predictions_is_called_one(tmp_path, capsys):
    (tmp_path / "sigma_1").write_text("idx\tlabel\tpredict\tcorrect\ttime\n0\t3\t3\t1\t0:00:01\n")
    assert "predictions, but no radii" in refused(capsys, tmp_path / "sigma_1")


def test_a_run_ends_with_the_exact_interval_of_its_accuracy(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import torch\ndef f(x):\n    return torch.eye(10)[torch.full((len(x),), 2)]\n")
    main(["--sigma", "0.25", "--classifier", f"{tmp_path}/mine.py:f", "--dataset", "digits", "--device", "cpu", "--skip", "20",
          "--n", "100", "--out", str(tmp_path / "run")])
    out = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "run" / "certify_sigma_0.25.tsv").open(), delimiter="\t"))
    right = sum(row["label"] == "2" for row in rows)
    exact = binomtest(right, len(rows)).proportion_ci(0.95, "exact")
    assert 0 < right < len(rows) == 18
    assert f"certified accuracy at r = 0: {right / 18:.1%}" in out and f"{exact.low:.1%} to {exact.high:.1%}" in out
    assert "clean accuracy" not in out


def test_the_best_row_is_a_choice_and_has_its_own_proven_value(tmp_path, capsys):
    """400 and 400 images: at r = 0.5 the first sigma is right on 390, the second on 200; the union is over two sigmas."""
    a = log(tmp_path / "sigma_0.25", *[(i, 1, 1 if i < 390 else 2, 0.6) for i in range(400)])
    b = log(tmp_path / "sigma_0.50", *[(i, 1, 1, 0.6 if i < 200 else 0.1) for i in range(400)])
    rows, _ = report(capsys, a, b)
    best, proven = (next(row for row in rows if row[0] == "best" and row[1] == kind) for kind in ("", "proven*"))
    assert best[2:4] == ["100.0", "97.5"]
    q = excess(400, 0.001, 0.001 / 2)
    assert q >= excess(400, 0.001) and proven[2:4] == [f"{100 * (400 - q) / 400:.1f}", f"{100 * (390 - q) / 400:.1f}"]
    main(["--report", str(a), str(b)])
    assert "a choice made on these test images" in capsys.readouterr().out


# -- Two classifiers at one sigma ----------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """DMAE against MAE on the same images."""
    return [log(tmp_path / name / f"certify_sigma_{sigma}.tsv", (0, 3, 3, r), (1, 4, 4, 0.2), sha256=[name])
            for name, r in (("dmae", 0.9), ("mae", 0.4)) for sigma in ("0.25", "0.5")]


def test_two_classifiers_stand_in_one_table_named_by_folder(two, capsys):
    rows, _ = report(capsys, *two)
    assert [row[0] for row in rows[1:5]] == ["0.25 dmae", "0.25 mae", "0.5 dmae", "0.5 mae"]
    assert [row[3] for row in rows[1:5]] == ["50.0", "0.0", "50.0", "0.0"]
    assert [row[0] for row in rows if row[0].startswith("best") and row[1] == ""] == ["best dmae", "best mae"]


def test_or_by_labels(two, tmp_path, capsys):
    """One name for each folder, or for each file; both in the order in which they were given, whatever sigma is."""
    for files, labels in ((two, ["A", "B"]), (two, ["A", "A", "B", "B"]), (two[::-1], ["B", "A"])):
        rows, _ = report(capsys, *files, "--label", *labels, "--plot", str(tmp_path / "p.png"))
        assert {row[0]: row[3] for row in rows[1:5]} == {"0.25 A": "50.0", "0.25 B": "0.0", "0.5 A": "50.0", "0.5 B": "0.0"}
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    mixed = [two[1], two[2]]                                           # DMAE at 0.5, MAE at 0.25: labels follow the files
    rows, _ = report(capsys, *mixed, "--label", "DMAE", "MAE")
    assert [row[0] for row in rows[1:3]] == ["0.25 MAE", "0.5 DMAE"]
    assert "or of the 4 files" in refused(capsys, *two, "--label", "A", "B", "C")


def test_folders_of_one_name_are_told_apart(tmp_path, capsys):
    files = [log(tmp_path / name / "cifar10" / "certify_sigma_1.tsv", (0, 3, 3, r), sha256=[name])
             for name, r in (("dmae", 0.9), ("mae", 0.4))]
    rows, _ = report(capsys, *files)
    assert [row[0] for row in rows[1:3]] == ["1 dmae/cifar10", "1 mae/cifar10"]


def test_a_label_needs_a_report(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--sigma", "1", "--label", "A"])
    assert stop.value.code == 2 and "--label needs --report" in capsys.readouterr().err


def test_shards_of_one_run_are_one_curve(tmp_path, capsys):
    shards = [log(tmp_path / f"certify_sigma_1_shard_{i}_of_2.tsv", *rows, sha256=["a"], dtype="fp32", shard=f"{i}/2", max=None)
              for i, rows in enumerate([[(0, 3, 3, 0.6)], [(1, 4, 4, 0.2), (3, 1, 0, 0.2)]])]
    rows, _ = report(capsys, *shards)
    assert rows[1][:2] == ["1", "3"] and rows[2][1] == "proven*"


@pytest.mark.parametrize("key, value", [("dtype", "bf16"), ("n", 7), ("sha256", ["b"]), ("alpha", 0.05), ("sound", True)])
def test_shards_of_different_settings_are_refused(tmp_path, capsys, key, value):
    common = dict(sha256=["a"], dtype="fp32", n=5, alpha=0.001, sound=False)
    files = [log(tmp_path / f"certify_sigma_1_shard_{i}_of_2.tsv", (i, 3, 3, 0.6), **common | dict(shard=f"{i}/2") | more)
             for i, more in enumerate([{}, {key: value}])]
    assert "different settings" in refused(capsys, *files)


def test_one_run_that_contradicts_itself_is_refused(tmp_path, capsys):
    files = [log(tmp_path / name / "certify_sigma_1.tsv", (0, 3, 3, r), sha256=["a"]) for name, r in (("x", 0.6), ("y", 0.7))]
    assert "contradict each other" in refused(capsys, *files)


def test_logs_without_settings_are_one_until_they_contradict_each_other(tmp_path, capsys):
    """Cohen's logs have no settings beside them: parts of one run as long as they agree; else by folder, then by file."""
    whole = [log(tmp_path / "a" / "sigma_1.part", (0, 3, 3, 0.6)), log(tmp_path / "b" / "sigma_1.part", (1, 3, 3, 0.6))]
    rows, _ = report(capsys, *whole)
    assert rows[1][:2] == ["1", "2"]
    folders = [*whole, log(tmp_path / "b" / "sigma_1.more", (0, 3, 3, 0.1))]
    rows, _ = report(capsys, *folders)
    assert [row[:2] for row in rows[1:3]] == [["1 a", "1"], ["1 b", "2"]]
    files = [log(tmp_path / "c" / f"noise_0.25_{name}", (0, 3, 3, r)) for name, r in (("x", 0.6), ("y", 0.1))]
    names = [one.name for one in summarise(files)]
    assert names == ["c/noise_0.25_x", "c/noise_0.25_y"]


def test_files_with_and_without_settings_are_never_merged(tmp_path, capsys):
    a = log(tmp_path / "a" / "certify_sigma_1.tsv", (0, 3, 3, 0.6), sha256=["a"])
    b = log(tmp_path / "b" / "sigma_1", (1, 3, 3, 0.6))
    rows, _ = report(capsys, a, b)
    assert [row[:2] for row in rows[1:3]] == [["1 a", "1"], ["1 b", "1"]]
