"""results/digits/ablation.py, results/fashion-mnist/heatmap.py: plan, rows, tables; small runs.

And which runs of results/digits/objectives.py answer one class.
"""

import importlib.util
import itertools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_fashion import write_files

import certify
import finetune
import pretrain

ROOT = Path(__file__).parents[1]
DIGITS, FASHION = ROOT / "results/digits", ROOT / "results/fashion-mnist"


def open_script(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def opened(monkeypatch, tmp_path):
    """opened(file) -> the module, its runs and rows in a temporary folder."""

    def call(file):
        module = open_script(file)
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
        monkeypatch.setattr(module, "RESULT", tmp_path / f"{file.stem}.jsonl")
        monkeypatch.chdir(ROOT)
        return module

    return call


@pytest.fixture
def ablation(opened):
    return opened(DIGITS / "ablation.py")


@pytest.fixture
def heatmap(opened):
    return opened(FASHION / "heatmap.py")


def committed_rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def settings_of(command):
    """The script of a command of pretrain.py or finetune.py, and its settings."""
    python, file, *flags = shlex.split(command)
    assert python == "python"
    if file == "finetune.py":
        flags[flags.index("--init") + 1] = "scratch"           # which needs no file
    script = {"pretrain.py": pretrain, "finetune.py": finetune}[file]
    return script, vars(script.parse(flags))


def differences(settings, script, *flags):
    """Of settings from those of these flags; not the run's folder."""
    recipe = vars(script.parse(list(flags)))
    return {key for key in settings if settings[key] != recipe[key]} - {"out"}


# --------------------------------------------------------------------------------------------------
# The ablation on the digits
# --------------------------------------------------------------------------------------------------


def test_the_rows_are_all_combinations_seeds_and_heads_seed_by_seed():
    module = open_script(DIGITS / "ablation.py")
    rows = committed_rows(DIGITS, "ablation.jsonl")
    levels = (0.0, 0.25), (0.25, 0.75), ("all", "dropped")
    wanted = itertools.product(*levels, range(3), ("linear probe", "fine-tuned"))
    assert sorted(map(module.key_of, rows)) == sorted(wanted)
    assert [row["seed"] for row in rows] == sorted(row["seed"] for row in rows)


def test_every_command_of_the_rows_is_accepted_and_changes_only_what_the_row_says(monkeypatch):
    module = open_script(DIGITS / "ablation.py")
    checkpoint = pretrain.read_checkpoint(DIGITS / "finetune_sigma_0.25.pt")
    monkeypatch.setattr("model.read_checkpoint", lambda *_: checkpoint)
    factors = {"sigma", "mask_ratio", "loss_on", "seed"}
    for row in committed_rows(DIGITS, "ablation.jsonl"):
        before, after, certified = row["commands"]
        script, settings = settings_of(before)
        found = [settings[key] for key in ("sigma", "mask_ratio", "loss_on", "seed", "epochs")]
        assert script is pretrain
        assert found == [*module.key_of(row)[:4], row["epochs"][0]]
        assert differences(settings, pretrain) <= factors

        script, settings = settings_of(after)
        assert script is finetune and settings["linear_probe"] == (row["head"] == "linear probe")
        assert (settings["seed"], settings["epochs"]) == (row["seed"], row["epochs"][1])
        probe = ["--linear-probe"] if settings["linear_probe"] else []
        changed = differences(settings, finetune, "--sigma", "0.25", "--init", "scratch", *probe)
        assert changed <= {"seed", "save_every" if probe else "epochs"}
        assert f"--init {before.split()[-1]}/pretrain.pt " in after

        args, _ = certify.parse(shlex.split(certified)[2:])
        assert (args.sigma, args.n, args.skip, args.bound) == (0.25, 1000, 3, "one-sided")
        assert args.out == after.split()[-1]


def test_a_run_that_was_cut_off_goes_on_and_finished_ones_are_not_done_again(
    ablation, monkeypatch,
):
    small = "--epochs 1 --warmup-epochs 0 --device cpu"
    factors = dict(noise=(0.0, 0.25), mask_ratio=(0.75,), loss_on=("all",))
    monkeypatch.setattr(ablation, "SEEDS", (2,))
    monkeypatch.setattr(ablation, "FACTORS", factors)
    monkeypatch.setattr(ablation, "HEADS", {"linear probe": f"--linear-probe {small}"})
    monkeypatch.setattr(ablation, "QUICK", "--n 50 --n0 20 --skip 90")
    monkeypatch.setattr(finetune, "measure", lambda *args: dict(clean=0.5, noisy=0.25, vote=0.75))
    called = []

    def watch(script, more=""):
        main = script.main

        def watched(argv):
            called.append(script.__name__)
            if len(called) == 6:                               # the second certification
                raise KeyboardInterrupt
            main([*argv, *more.split()])

        monkeypatch.setattr(script, "main", watched)

    watch(pretrain, small)
    watch(finetune)
    watch(certify)
    with pytest.raises(KeyboardInterrupt):
        ablation.run_all()
    stages = ["pretrain", "finetune", "certify"]
    assert called == 2 * stages and len(ablation.read_rows()) == 1
    ablation.run_all()
    assert called == [*2 * stages, "certify"]
    ablation.run_all()
    assert len(called) == 7

    rows = ablation.read_rows()
    assert [row["noise"] for row in rows] == [0.0, 0.25]
    for row in rows:
        assert (row["clean"], row["noisy"], row["vote"]) == (0.5, 0.25, 0.75)
        assert len(row["seconds"]) == 3 and min(row["seconds"]) >= 0
        assert row["epochs"] == [1, 1] and 0 <= row["acr"] < 0.25 * 1.13     # Phi^-1(0.001^(1/50))
        log = certify.read_log(Path(row["commands"][2].split()[-1]) / "certify_sigma_0.25.tsv")
        right = log["predict"] == log["label"]
        assert row["acr"] == pytest.approx((log["radius"] * right).mean(), abs=1e-4)


def test_an_effect_is_the_mean_at_one_level_less_that_at_the_other_with_the_seeds_deviation(
    ablation, capsys,
):
    rows = []
    for seed, cell, head in itertools.product((0, 1, 2), ablation.cells(), ablation.HEADS):
        noise, few, every = cell["noise"] > 0, cell["mask_ratio"] == 0.25, cell["loss_on"] == "all"
        acr = 0.2 + 0.03 * noise * (1 + 2 * few) + 0.001 * seed * noise - 0.04 * every
        rows.append(cell | dict(seed=seed, head=head, clean=0.9, noisy=0.5 + seed / 100, vote=0.7,
                                acr=acr))
    ablation.print_table(rows)
    printed = capsys.readouterr().out.splitlines()
    cells = {line.split(" | ")[0]: line.split(" | ") for line in printed if line.startswith("| ")}
    # Of noise: 0.03 + 0.06 in half of the combinations, and 0.001 a seed: 0.061 +- 0.001.
    assert cells["| noise, less none"][2] == "+0.061 ± 0.001"
    assert cells["| mask ratio 25 %, less 75 %"][2] == "+0.030 ± 0.000"
    assert cells["| loss on all, less on dropped"][2] == "-0.040 ± 0.000"
    assert cells["| mask ratio 25 %, less 75 %, without noise"][2] == "+0.000 ± 0.000"
    assert cells["| mask ratio 25 %, less 75 %, with noise"][2] == "+0.060 ± 0.000"
    assert cells["| noise, less none, at 75 %, all"][2] == "+0.031 ± 0.001"
    assert cells["| noise, less none, at 25 %, all"][2] == "+0.091 ± 0.001"
    assert sum(" | 51.0 ± 1.0 | " in line for line in printed) == 16

    ablation.print_table([row for row in rows if row["seed"] < 2 or row["noise"]])
    assert "| effect, 2 seeds |" in capsys.readouterr().out    # the third has not all


def test_the_tables_of_the_ablation_are_those_of_the_readme(ablation, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RESULT", DIGITS / "ablation.jsonl")
    ablation.main(["--table"])
    printed = capsys.readouterr().out.strip()
    assert len(printed.splitlines()) == 2 * 10 + 13 + 2
    assert printed in (DIGITS / "README.md").read_text()


# --------------------------------------------------------------------------------------------------
# The heat map on Fashion-MNIST
# --------------------------------------------------------------------------------------------------


def test_the_heat_maps_rows_are_all_cells_and_change_mask_ratio_and_sigma_alone():
    module = open_script(FASHION / "heatmap.py")
    rows = committed_rows(FASHION, "heatmap.jsonl")
    cells = [(row["mask_ratio"], row["sigma"]) for row in rows]
    ratios, sigmas = (0.25, 0.5, 0.75, 0.9), (0.0, 0.25, 0.5, 1.0)
    assert sorted(cells) == list(itertools.product(ratios, sigmas)) == sorted(module.plan())
    length = {"holdout", "epochs", "warmup_epochs", "device", "dtype"}
    for row in rows:
        (script, before), (next_script, after) = map(settings_of, row["commands"])
        assert script is pretrain and next_script is finetune
        assert (before["mask_ratio"], before["sigma"]) == (row["mask_ratio"], row["sigma"])
        changed = differences(before, pretrain, "--recipe", "fashion")
        assert changed - {"mask_ratio", "sigma"} <= length | {"save_every"}
        assert (before["loss_on"], before["holdout"], before["seed"]) == ("all", 0.5, 0)
        probe = ["--recipe", "fashion", "--sigma", "0.5", "--init", "scratch", "--linear-probe"]
        assert differences(after, finetune, *probe) <= length
        assert [before["epochs"], after["epochs"]] == row["epochs"]
        assert len(row["radii"]) == 100 and max(row["radii"]) <= 0.5 * 2.2052
        assert row["acr"] == pytest.approx(sum(row["radii"]) / 100, abs=1e-4)


def test_a_small_heat_map_is_of_held_out_images_and_is_not_done_again(
    heatmap, monkeypatch, tmp_path,
):
    write_files(tmp_path / "data/FashionMNIST/raw")
    small = "--epochs 1 --warmup-epochs 0 --batch 50"
    shared = f"{heatmap.SHARED} --data-path {tmp_path / 'data'}"
    monkeypatch.setattr(heatmap, "SHARED", shared)
    monkeypatch.setattr(heatmap, "PRETRAIN", f"{shared} --holdout 0.5 {small}")
    monkeypatch.setattr(heatmap, "PROBE", f"{shared} --sigma 0.5 --linear-probe {small}")
    monkeypatch.setattr(heatmap, "RATIOS", (0.25, 0.75))
    monkeypatch.setattr(heatmap, "SIGMAS", (0.25,))
    for name, value in dict(IMAGES=6, N0=20, N=50).items():
        monkeypatch.setattr(heatmap, name, value)
    counted = finetune.measure
    asked = []
    certified = certify.certify

    def watched(f, x, sigma, index, **how):
        asked.append(index)
        return certified(f, x, sigma, index=index, **how)

    monkeypatch.setattr(certify, "certify", watched)
    heatmap.main([])
    assert finetune.measure is counted                         # as before
    rows = heatmap.read_rows()
    assert [row["mask_ratio"] for row in rows] == [0.75, 0.25]             # the recipe's first
    _, held_out = finetune.hold_out(300, 0.5)
    assert len(asked) == 12 and set(asked) <= set(held_out.tolist())
    assert asked[:6] == asked[6:] and len(set(asked)) == 6
    written = heatmap.RESULT.read_text()
    monkeypatch.setattr(pretrain, "main", None)
    monkeypatch.setattr(finetune, "main", None)
    heatmap.main([])
    assert heatmap.RESULT.read_text() == written and len(asked) == 12


def test_the_heat_maps_differences_are_paired_by_image(heatmap, capsys):
    radii = {(0.25, 0.0): [0.0, 0.1, 0.2, 0.5], (0.25, 0.25): [0.0, 0.2, 0.4, 0.6],
             (0.5, 0.25): [0.1, 0.1, 0.1, 0.1]}
    rows = [
        dict(mask_ratio=ratio, sigma=sigma, noisy=0.5, acr=sum(these) / 4, radii=these)
        for (ratio, sigma), these in radii.items()
    ]
    heatmap.print_table(rows)
    printed = capsys.readouterr().out.splitlines()[2:]         # 0, .1, .2, .1: .0816 / 2
    assert printed[0].endswith("| 0.200 |  | -0.100 ± 0.041 |")
    assert printed[1].endswith("| 0.300 | +0.100 ± 0.041 | the best |")
    assert printed[2].startswith("| 0.5 | 0.25 | 50.0 | 0.100 |  | -0.200 ± ")


def test_the_heat_maps_table_is_that_of_the_readme(heatmap, monkeypatch, capsys):
    heatmap.print_table(committed_rows(FASHION, "heatmap.jsonl"))
    printed = capsys.readouterr().out.strip()
    assert len(printed.splitlines()) == 2 + 16
    assert printed in (FASHION / "README.md").read_text()


# --------------------------------------------------------------------------------------------------
# Runs that answer one class
# --------------------------------------------------------------------------------------------------


def test_a_run_answers_one_class_if_it_is_right_on_all_images_of_a_class_and_on_no_other():
    module = open_script(DIGITS / "objectives.py")
    labels = np.array([3, 0, 3, 7, 0])

    def collapsed(*radii):
        return module.collapsed({"two-sided": dict(radii=radii)}, labels)

    assert collapsed(2.4, 0, 2.4, 0, 0) and collapsed(0, 0, 0, 0.1, 0)
    assert not collapsed(2.4, 0, 0, 0, 0)                      # a 3 is answered otherwise
    assert not collapsed(2.4, 0, 2.4, 2.4, 0)
    assert not collapsed(0, 0, 0, 0, 0)
    assert not collapsed(2.4, 2.4, 2.4, 2.4, 2.4)              # all right


def test_those_that_answer_one_class_are_crosses_and_set_no_axis(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    module = open_script(DIGITS / "objectives.py")
    rows, labels = module.read_rows(module.RESULT), module.labels_of_images()
    found = {(row["part"], row["objective"], row["sigma"])
             for row in rows if module.collapsed(row, labels)}
    assert found == {(part, "smoothadv", 1.0) for part in ("equal epochs", "equal time")}
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: figures.append(figure))
    module.draw(rows, tmp_path / "objectives.png")
    crosses = [
        sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "x")
        for axes in figures[0].axes
    ]
    assert crosses == [0, 0, 6]
    drawn = [row["two-sided"]["acr"] for row in rows if row["part"].startswith("equal")
             and row["sigma"] == 1 and not module.collapsed(row, labels)]
    assert max(drawn) < figures[0].axes[2].get_ylim()[1] < 1.05 * max(drawn)
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert names[-1].startswith("one class")
