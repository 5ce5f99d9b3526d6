"""results/digits/compare.py, objectives.py: their rows and tables; small runs from end to end."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import certify
import finetune

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def open_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"results/digits/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """The module, its runs in a temporary folder."""
    module = open_script("compare")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(ROOT)
    return module


@pytest.fixture
def objectives(monkeypatch, tmp_path):
    """The module, its runs and its rows in a temporary folder; it trains in this process."""
    monkeypatch.chdir(ROOT)
    module = open_script("objectives")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "MAE", tmp_path / "runs/mae/pretrain.pt")
    for name in ("TUNING", "RESULT"):
        committed = getattr(module, name)
        monkeypatch.setattr(module, name, tmp_path / committed.name)
        shutil.copy(committed, tmp_path)
    monkeypatch.setattr(module, "train_all", lambda jobs, _: map(module.train, jobs.items()))
    return module


@pytest.fixture
def unmeasured(monkeypatch):
    """Training that does not count votes."""
    found = dict(clean=0.5, noisy=0.25, vote=0.75)
    monkeypatch.setattr(finetune, "measure", lambda *args: found)
    return found


def test_the_posteriors_committed_row_is_what_it_gives(compare):
    (row,) = [
        row for row in map(json.loads, compare.RESULT.read_text().splitlines())
        if (row["part"], row["labels"], row["seed"]) == ("posterior", 10, 0)
    ]
    found = compare.posterior(10, 0)
    assert found.keys() == {"clean", "noisy", "vote"}
    for name, share in found.items():
        assert share == pytest.approx(row[name], abs=1.5 / 360)            # another CPU: an image


def test_the_posterior_is_bayes_rule(compare):
    """Under the training images as the distribution of the data, by plain sums."""
    images, labels = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 1, 4, 9, 4])
    noisy = torch.rand(3, 1, 2, 2)
    found = compare.Posterior(images, labels, 0.5)(noisy).exp()
    for x, shares in zip(noisy, found, strict=True):
        density = [float((-(x - image).square() / 0.5).exp().prod()) for image in images]
        for label in range(10):
            mine = sum(d for d, of in zip(density, labels.tolist(), strict=True) if of == label)
            assert shares[label].item() == pytest.approx(mine / sum(density), abs=1e-6)


@pytest.mark.slow
def test_a_small_comparison_has_the_committed_rows_parts(compare, unmeasured, monkeypatch):
    small = "--epochs 1 --warmup-epochs 0 --device cpu"
    monkeypatch.setattr(compare, "SEEDS", (0,))
    monkeypatch.setattr(compare, "posterior", lambda labels, seed: unmeasured)
    pretrained = {init: f"{flags}{small} " for init, flags in compare.PRETRAIN.items()}
    monkeypatch.setattr(compare, "PRETRAIN", pretrained)
    tasks = {name: (what, f"{flags} {small}") for name, (what, flags) in compare.TASKS.items()}
    monkeypatch.setattr(compare, "TASKS", tasks)
    rows = list(compare.compare())
    committed = list(map(json.loads, compare.RESULT.read_text().splitlines()))
    keys = ("part", "init", "labels", "head", "consistency", "seed")
    expected = [[row[key] for key in keys] for row in committed if row["seed"] == 0]
    assert [[row[key] for key in keys] for row in rows] == expected
    assert [*rows[0]] == [*committed[0]]
    for row in rows:
        assert {name: row[name] for name in unmeasured} == unmeasured
        name = Path(row["command"].split("--out ")[-1]).name
        if row["part"] != "posterior":
            clock = float((compare.RUNS / name / "seconds").read_text())
            assert row["finetune_seconds"] == clock
    monkeypatch.setattr(finetune, "main", None)                # all that is there is read
    assert list(compare.compare()) == rows


def test_the_table_of_all_sigmas_is_that_of_the_readme(capsys):
    folder = ROOT / "results/digits"
    files = sorted(map(str, folder.glob("certify_sigma_*.tsv")))
    certify.main(["--report", *files])
    assert capsys.readouterr().out in (folder / "README.md").read_text()


def test_what_was_tried_is_accepted_and_is_not_tried_again(objectives, monkeypatch):
    for objective, variants in objectives.TRIED.items():
        for tried in variants:
            flags = objectives.flags_of(objective, tried, 1.0, 2, "scratch").split()
            args = finetune.parse(flags)
            assert (args.sigma, args.seed, args.epochs, args.warmup_epochs) == (1.0, 2, 10, 2.0)
            assert args.objective.rpartition(":")[2] == objective
            for name, value in tried.items():
                scale = 2 if name in ("eps", "step") else 1
                assert args.objective_args[name] == scale * value
    monkeypatch.setattr(objectives, "train", None)
    best, strongest = objectives.tune(1, CPU)
    assert strongest == "smoothmix" and best == dict(
        gaussian={},
        consistency=dict(lam=2),
        smoothadv=dict(warmup=1, eps=0.5),
        macer=dict(lam=1),
        smoothmix=dict(warmup=1, step=0.5, eta=5),
    )


def test_the_table_of_objectives_is_that_of_the_readme(objectives, capsys, monkeypatch, tmp_path):
    table = (objectives.HERE / "README.md").read_text()
    monkeypatch.setattr(objectives, "HERE", tmp_path)
    objectives.main(["--table"])
    printed, differences = capsys.readouterr().out.split("\n\n")
    assert len(printed.splitlines()) > 40 and all(row in table for row in printed.splitlines())
    (paragraph,) = re.findall(r"(Paired by image in the same way.*?)\n\n", table, re.DOTALL)
    stated = re.findall(r"[+-]?\d\.\d+ ± \d\.\d+", paragraph)
    assert len(stated) == 10 and all(number in differences for number in stated)
    assert (tmp_path / "objectives.png").exists()


def test_measured_radii_are_those_of_certify(objectives, monkeypatch):
    monkeypatch.setattr(objectives, "N", 500)
    file = "results/digits/finetune_sigma_0.25.pt"
    network = objectives.rebuild(file, CPU)
    test = finetune.open_images("digits", "", False, 8, 1, CPU)
    index = [0, 3, 6, 33]
    found = objectives.measure(network, test, index, 0.25, CPU)
    for bound, row in found.items():
        radii = []
        for i in index:
            x = test.items[i][0] / 16
            how = dict(n0=100, n=500, index=i, bound=bound, batch=objectives.BATCH)
            prediction, radius = certify.certify(network, x, 0.25, **how)
            radii.append(radius * (prediction == int(test.labels[i])))
        assert row["radii"] == pytest.approx(radii, abs=1e-4)
        assert row["acr"] == pytest.approx(sum(radii) / 4, abs=1e-4)
        assert row["certified"]["0.25"] == sum(radius >= 0.25 for radius in radii) / 4


@pytest.mark.slow
def test_a_small_set_of_objectives_is_tuned_trained_and_certified(
    objectives, unmeasured, monkeypatch,
):
    monkeypatch.setattr(objectives, "SEEDS", (0, 1))
    monkeypatch.setattr(objectives, "SIGMAS", (0.5,))
    monkeypatch.setattr(objectives, "TRIED", dict(
        consistency=[dict(lam=2)],                             # this one is known
        smoothadv=[dict(steps=1, copies=1)],
    ))
    monkeypatch.setattr(objectives, "EPOCHS", 2)
    monkeypatch.setattr(objectives.flags_of, "__defaults__", (objectives.DMAE, 2))
    monkeypatch.setattr(objectives, "N", 100)
    measure = objectives.measure

    def measure_fewer(classifier, images, index, *rest):
        return measure(classifier, images, index[::10], *rest)

    monkeypatch.setattr(objectives, "measure", measure_fewer)
    rows = objectives.read_rows(objectives.TUNING)
    known = [row for row in rows if row["objective"] == "consistency"]
    objectives.TUNING.write_text("".join(json.dumps(row) + "\n" for row in known))
    objectives.MAE.parent.mkdir(parents=True)
    shutil.copy(objectives.DMAE, objectives.MAE)
    (objectives.MAE.parent / "seconds").write_text("1.0")
    objectives.run_all(1, CPU)

    new = objectives.read_rows(objectives.TUNING)[len(known):]
    assert [row["arguments"] for row in new] == [dict(steps=1, copies=1)]
    assert new[0]["flags"].endswith("--objective-args copies=1 steps=1")
    rows = objectives.read_rows(objectives.RESULT)
    parts = [row["part"] for row in rows]
    counts = {part: parts.count(part) for part in dict.fromkeys(parts)}
    assert counts == {"denoised": 1, "ensemble": 2, "equal epochs": 2 * 3 * 3, "equal time": 2 * 2}
    for row in rows:
        assert len(row["one-sided"]["radii"]) == 12 and row["sigma"] == 0.5
        if row["part"].startswith("equal"):
            start = row["command"].split("--init ")[1].split()[0]
            files = dict(dmae=objectives.DMAE, mae=objectives.MAE, scratch="scratch")
            assert start == str(files[row["init"]]) and f"--seed {row['seed']} " in row["command"]
    names = [name for _, name, *_ in objectives.groups_of(rows)]
    assert "smoothadv, ensemble of 3" in names and "smoothadv, consensus of 2" in names
