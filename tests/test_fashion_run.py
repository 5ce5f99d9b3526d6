"""results/fashion-mnist/run.py: its plan is one that the stages accept; a small one, end to end."""

import json
import shlex
import statistics
from pathlib import Path

import pytest
from test_fashion import write_files
from test_lenet import open_script

import certify
import finetune
import pretrain

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The module, its runs in a temporary folder."""
    module = open_script("run")
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(module, "SECONDS", tmp_path / "seconds.json")
    monkeypatch.chdir(ROOT)
    return module


def trained(run, one):
    """The settings of a run's training command."""
    _, stage, *flags = shlex.split(one.commands("--device cpu --dtype bf16")[0])
    if one.init == "lenet":
        assert stage == "results/fashion-mnist/lenet.py"
        return open_script("lenet").parse(flags)[0]
    assert stage == "finetune.py"
    place = flags.index("--init") + 1
    file = str(run.RUNS / one.init / "pretrain.pt")
    assert flags[place] == ("scratch" if one.init == "scratch" else file)
    flags[place] = "scratch"                                   # which needs no file
    args = finetune.parse(flags)
    assert args.layer_decay == (1.0 if one.init == "scratch" else 0.75)
    return args


def test_every_training_of_the_plan_is_accepted_and_is_what_its_part_says(run):
    few = {"100 labels a class": 100, "10 labels a class": 10}
    labels = few | {f"{part}, equal time": count for part, count in few.items()}
    for one in run.plan():
        args = trained(run, one)
        assert (args.sigma, args.seed, args.dtype) == (one.sigma, one.seed, "bf16")
        assert args.linear_probe == (one.part == "linear probe")
        assert args.labels_per_class == labels.get(one.part, 0)
        objective = one.part.removesuffix(", three epochs")
        name = args.objective.rpartition(":")[2]
        if objective in run.OBJECTIVES:
            short, lenet = "three epochs" in one.part, one.init == "lenet"
            assert name == objective and args.epochs == (3 if short else 60 if lenet else 8)
        elif objective != "recipe":
            assert name == "gaussian"
        if objective in ("recipe", "consistency"):
            assert (name, args.objective_args["lam"]) == ("consistency", 5.0)


def test_equal_time_is_as_many_seconds_of_steps_as_both_stages_of_dmae(run):
    seconds = json.loads(Path(run.FOLDER, "seconds.json").read_text())
    before = pretrain.parse(["--recipe", "fashion"])
    plan = {run.key_of(vars(one)): trained(run, one) for one in run.plan() if one.init != "lenet"}
    pairs = {"equal time": "all labels"}
    for part in ("10 labels a class", "100 labels a class"):
        pairs[f"{part}, equal time"] = part
    for part, other in pairs.items():
        for seed in run.SEEDS:
            longer, dmae = plan[part, "scratch", 0.5, seed], plan[other, "dmae", 0.5, seed]
            after = before.epochs * seconds["pretrain"] / seconds["finetune"] + dmae.epochs
            assert longer.epochs == round(after) and longer.batch == before.batch
            same = ("labels_per_class", "objective", "objective_args", "batch", "linear_probe")
            assert all(getattr(longer, key) == getattr(dmae, key) for key in same)
            assert longer.save_every == (10 if part == "equal time" else 2)     # held-out votes


def test_attacks_are_those_of_mnist_with_fewer_copies_and_steps(run):
    args = {one.part: trained(run, one).objective_args for one in run.plan()}
    smoothadv, macer, smoothmix = (
        args[f"{name}, three epochs"] for name in ("smoothadv", "macer", "smoothmix")
    )
    assert (smoothadv["eps"], smoothadv["copies"], smoothadv["steps"]) == (255 / 256, 2, 2)
    assert args["smoothadv"] == smoothadv | dict(copies=1, steps=1)
    assert (macer["lam"], macer["copies"]) == (16.0, 4)
    found = [smoothmix[key] for key in ("step", "eta", "copies", "steps")]
    assert found == [1.0, 1.0, 2, 2]


def test_every_certification_of_the_plan_is_of_its_run_which_has_a_folder_of_its_own(run):
    plan = run.plan()
    assert len({one.name for one in plan}) == len(plan)
    for one in plan:
        assert " " not in one.name
        words = shlex.split(one.commands("--device cpu")[1])
        n = "10000" if one.part == "recipe" else "1000"
        if one.init != "lenet":
            assert words[-4:] == ["--n", n, "--skip", "20"]
            continue
        assert words[:3] == [f"LENET={one.out}/lenet.pt", "python", "certify.py"]
        args, _ = certify.parse(words[3:])
        found = args.sigma, args.out, args.n, args.skip, args.dataset
        assert found == (one.sigma, str(one.out), int(n), 20, "fashion-mnist")


def test_the_maes_pretraining_differs_from_dmaes_in_noise_and_loss_alone(run):
    dmae, mae = (
        vars(pretrain.parse(["--recipe", "fashion", *shlex.split(run.PRETRAININGS[init])]))
        for init in ("dmae", "mae")
    )
    assert {key for key in dmae if mae[key] != dmae[key]} == {"sigma", "loss_on"}
    found = [args[key] for args in (dmae, mae) for key in ("sigma", "loss_on")]
    assert found == [0.25, "all", 0.0, "dropped"]


def test_committed_rows_are_those_of_the_plan_and_keep_their_commands(
    run, monkeypatch, tmp_path, capsys,
):
    committed = run.RESULT.read_text()
    rows = run.read_rows(run.RESULT)
    planned = {run.key_of(vars(one)) for one in run.plan()}
    assert len(planned) == len(run.plan()) and {run.key_of(row) for row in rows} == planned
    monkeypatch.setattr(run, "RESULT", tmp_path / "runs.jsonl")
    run.RESULT.write_text(committed)
    run.main(["--table"])
    assert run.RESULT.read_text() == committed
    table = Path(run.FOLDER, "README.md").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| all labels | dmae | 0.5 | 3 |") for line in printed) == 1
    for line in printed[2:printed.index("")]:                  # README leaves zeros out
        assert line.replace(" 0.0 |", "  |") in table


def test_a_run_that_is_done_again_replaces_the_row_of_its_part_encoder_sigma_and_seed(
    run, monkeypatch, tmp_path,
):
    rows = run.read_rows(run.RESULT)
    monkeypatch.setattr(run, "RESULT", tmp_path / "runs.jsonl")
    run.RESULT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (again,) = [one for one in run.plan() if run.key_of(vars(one)) == run.key_of(rows[3])]
    new = rows[3] | dict(epochs=9, commands=["python finetune.py --new"])
    monkeypatch.setattr(run, "collect", lambda one: new if one == again else None)
    monkeypatch.setattr(run, "print_differences", lambda runs: None)
    monkeypatch.setattr(run, "draw", lambda path: None)
    run.main(["--table"])
    assert run.read_rows(run.RESULT) == [*rows[:3], new, *rows[4:]]


@pytest.mark.slow
def test_a_small_plan_is_trained_certified_collected_once_timed_and_drawn(
    run, monkeypatch, tmp_path, capfd,
):
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    small = "--epochs 1 --batch 50"
    vit = f"{small} --warmup-epochs 0"
    for init, flags in run.PRETRAININGS.items():
        monkeypatch.setitem(run.PRETRAININGS, init, f"{flags} {vit}")
    plan = []
    for init, flags in [*((init, vit) for init in run.INITS), ("lenet", small)]:
        quick = "--n 100 --n0 20 --skip 8"
        flags = f"--objective gaussian {flags}"
        plan.append(run.Run("all labels", init, flags=flags, certify=quick))
    monkeypatch.setattr(run, "plan", lambda: plan)
    shared = f"--device cpu --data-path {tmp_path / 'data'}"
    assert run.collect(plan[0]) is None
    run.run_all(2, shared)
    results = [file for file in run.RUNS.rglob("*") if file.suffix in (".pt", ".tsv")]
    written = {file: file.stat().st_mtime_ns for file in results}
    assert len(written) == 2 + 2 * 4
    run.run_all(2, shared)
    assert written == {file: file.stat().st_mtime_ns for file in written}

    rows = [run.collect(one) for one in plan]
    for one, row in zip(plan, rows, strict=True):
        logged = certify.read_log(one.out / "certify_sigma_0.5.tsv")
        found = row["init"], row["images"], row["n"], row["labels"]
        assert found == (one.init, 5, 100, "all")
        right = logged["predict"] == logged["label"]
        acr = sum(logged["radius"] * right) / 5
        assert row["one-sided"]["acr"] == pytest.approx(acr, abs=1e-4)
        assert row["one-sided"]["certified"]["0"] == pytest.approx(right.mean())
        seconds = [float(time.rpartition(":")[2]) for time in logged["time"]]     # of a minute
        assert row["seconds_certifying"] == round(sum(seconds))
        before = run.RUNS / one.init / "pretrain.jsonl"
        assert before.exists() == (one.init in run.PRETRAININGS)
        last = json.loads(before.read_text().splitlines()[-1])["time"] if before.exists() else 0
        assert row["seconds_pretraining"] == round(last)
        assert 0 <= row["held_out"] <= 1 and (row["noisy"] is None) == (one.init == "lenet")

    capfd.readouterr()
    run.print_table(rows)
    assert len(capfd.readouterr().out.splitlines()) == 2 + 4 + 2
    run.print_differences(plan)
    printed = capfd.readouterr().out.splitlines()[3:]
    for line, other in zip(printed, rows[1:], strict=True):
        difference = rows[0]["one-sided"]["acr"] - other["one-sided"]["acr"]
        assert line.startswith(f"| all labels | 0.5 | 1 | {other['init']} | ")
        shown = float(line.split("|")[5].split("±")[0])
        assert shown == pytest.approx(difference, abs=1e-3)

    run.time_steps(f"{shared} --batch 50")
    seconds = json.loads(run.SECONDS.read_text())
    assert seconds.keys() == {"pretrain", "finetune", "lenet"} and min(seconds.values()) > 0
    log = run.read_rows(run.RUNS / "time" / "lenet.jsonl")
    ends = [0, *(row["seconds"] for row in log)]
    each = [(later - now) / log[0]["step"] for now, later in zip(ends, ends[1:], strict=False)]
    assert len(each) == 3 and seconds["lenet"] == pytest.approx(statistics.median(each), abs=1e-4)

    run.draw(tmp_path / "accuracy.png")
    lines = run.plt.gca().get_lines()
    start = {line.get_label().split(",")[0]: line.get_xdata()[0] for line in lines}
    minutes = run.last_row(run.RUNS / "mae", "pretrain")["step"] * seconds["pretrain"] / 60
    assert start["mae"] == start["dmae"] == pytest.approx(start["scratch"] + minutes)
    assert 0 < start["scratch"] < start["mae"]
    labels = [text.get_text() for text in run.plt.gca().get_legend().get_texts()]
    assert labels == [f"{one.init}, 1 epochs" for one in plan]


@pytest.mark.slow
def test_a_command_that_fails_ends_the_plan_and_names_its_output(run, monkeypatch):
    monkeypatch.setattr(run, "PRETRAININGS", {"dmae": "--epochs -1"})
    with pytest.raises(SystemExit, match="exit status 2, see .*dmae/output: python pretrain.py"):
        run.run_all(1, "--device cpu")
    assert "--epochs" in (run.RUNS / "dmae" / "output").read_text()
