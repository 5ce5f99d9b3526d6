"""results/fashion-mnist/run.py: its plan is one that the stages accept, and a small plan runs from end to end."""

import json
import shlex
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


def test_every_command_of_the_plan_is_accepted_and_each_run_has_a_folder_of_its_own(run):
    plan = run.plan()
    assert len({one.name for one in plan}) == len(plan) and not any(" " in one.name for one in plan)
    for one in plan:
        _, stage, *flags = shlex.split(one.commands("--device cpu --dtype bf16")[0])
        lenet = one.init == "lenet"
        if lenet:
            assert stage == "results/fashion-mnist/lenet.py"
            args, _ = open_script("lenet").parse(flags)
        else:
            assert stage == "finetune.py"
            place = flags.index("--init") + 1
            assert flags[place] == ("scratch" if one.init == "scratch" else str(run.RUNS / one.init / "pretrain.pt"))
            flags[place] = "scratch"                                                      # which needs no file
            args = finetune.parse(flags)
            assert args.layer_decay == (1.0 if one.init == "scratch" else 0.75)
        assert (args.sigma, args.seed, args.dtype) == (one.sigma, one.seed, "bf16")
        assert args.linear_probe == (one.part == "linear probe")
        assert (args.labels_per_class or "all") == {"100 labels a class": 100, "10 labels a class": 10}.get(one.part, "all")
        objective = one.part.removesuffix(", three epochs")
        if objective in run.OBJECTIVES:
            assert args.objective == objective and args.epochs == (3 if "three epochs" in one.part else 60 if lenet else 8)
            assert args.objective_warmup <= max(1, args.epochs / 5)                       # then attacks at full length
        assert args.consistency == (5.0 if objective in ("recipe", "consistency") else 0.0)
        certified = shlex.split(one.commands("--device cpu")[1])
        n = "10000" if one.part == "recipe" else "1000"
        if not lenet:
            assert certified[-4:] == ["--n", n, "--skip", "20"]
        else:
            assert certified[:3] == [f"LENET={one.out}/lenet.pt", "python", "certify.py"]
            args, _ = certify.parse(certified[3:])
            assert (args.sigma, args.out, args.n, args.skip) == (one.sigma, str(one.out), int(n), 20)
    dmae, mae = (pretrain.parse(["--recipe", "fashion", *shlex.split(run.PRETRAININGS[init])]) for init in ("dmae", "mae"))
    assert (dmae.sigma, dmae.loss_on, mae.sigma, mae.loss_on) == (0.25, "all", 0.0, "dropped")
    differing = {key for key, value in vars(dmae).items() if vars(mae)[key] != value}
    assert differing == {"sigma", "loss_on"}


def test_rows_of_runs_that_lie_elsewhere_are_kept(run, monkeypatch, tmp_path, capsys):
    committed = run.RESULT.read_text()
    monkeypatch.setattr(run, "RESULT", tmp_path / "runs.jsonl")
    run.RESULT.write_text(committed)
    run.main(["--table"])
    assert run.RESULT.read_text() == committed and committed.count("\n") > 1
    assert "| all labels | dmae |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_small_plan_is_trained_certified_collected_once_timed_and_drawn(run, monkeypatch, tmp_path, capfd):
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    small = "--epochs 1 --warmup-epochs 0 --batch 50"
    monkeypatch.setattr(run, "PRETRAININGS", {init: f"{flags} {small}" for init, flags in run.PRETRAININGS.items()})
    plan = [run.Run("all labels", init, flags=f"--consistency 0 {flags}", certify="--n 100 --n0 20 --skip 8")
            for init, flags in [*((init, small) for init in run.INITS), ("lenet", "--epochs 1 --batch 50")]]
    monkeypatch.setattr(run, "plan", lambda: plan)
    shared = f"--device cpu --data-path {tmp_path / 'data'}"
    assert run.collect(plan[0]) is None
    run.run_all(2, shared)
    written = {file: file.stat().st_mtime_ns for file in run.RUNS.rglob("*") if file.suffix in (".pt", ".tsv")}
    assert len(written) == 2 + 2 * 4
    run.run_all(2, shared)
    assert written == {file: file.stat().st_mtime_ns for file in written}

    rows = [run.collect(one) for one in plan]
    for one, row in zip(plan, rows, strict=True):
        logged = certify.read_rows(one.out / "certify_sigma_0.5.tsv")
        assert (row["init"], row["images"], row["n"], row["labels"]) == (one.init, 5, 100, "all")
        assert row["one-sided"]["acr"] == pytest.approx(certify.Summary(logged).acr, abs=1e-4)
        assert row["seconds_certifying"] == round(sum(certify.seconds_of(image["time"]) for image in logged))
        before = run.RUNS / one.init / "pretrain.jsonl"
        assert before.exists() == (one.init in run.PRETRAININGS)
        last = json.loads(before.read_text().splitlines()[-1])["time"] if before.exists() else 0
        assert row["seconds_pretraining"] == round(last)
        assert 0 <= row["held_out"] <= 1 and (row["noisy"] is None) == (one.init == "lenet")
    capfd.readouterr()
    run.print_table(rows)
    assert len(capfd.readouterr().out.splitlines()) == 2 + 4 + 2
    run.print_differences(plan)
    for line, other in zip(capfd.readouterr().out.splitlines()[3:], rows[1:], strict=True):
        difference = rows[0]["one-sided"]["acr"] - other["one-sided"]["acr"]
        assert line.startswith(f"| all labels | 0.5 | 1 | {other['init']} | ")
        assert float(line.split("|")[5].split("±")[0]) == pytest.approx(difference, abs=1e-3)
    run.time_steps(f"{shared} --batch 50")
    seconds = json.loads(run.SECONDS.read_text())
    (epoch,) = run.read_log(run.RUNS / "time" / "lenet.jsonl")
    assert seconds.keys() == {"pretrain", "finetune", "lenet"} and min(seconds.values()) > 0
    assert seconds["lenet"] == pytest.approx(epoch["seconds"] / epoch["step"], abs=1e-4)
    run.draw(tmp_path / "accuracy.png")
    start = {line.get_label().split(",")[0]: line.get_xdata()[0] for line in run.plt.gca().get_lines()}
    steps = run.last_row(run.RUNS / "mae", "pretrain")["step"] * seconds["pretrain"]
    assert start["mae"] == start["dmae"] == pytest.approx(start["scratch"] + steps / 60) and 0 < start["scratch"] < start["mae"]
    labels = [text.get_text() for text in run.plt.gca().get_legend().get_texts()]
    assert labels == [f"{one.init}, 1 epochs" for one in plan]


@pytest.mark.slow
def test_a_command_that_fails_ends_the_plan_and_names_its_output(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "PRETRAININGS", {"dmae": "--epochs -1"})
    with pytest.raises(SystemExit, match="exit status 2, see .*dmae/output: python pretrain.py"):
        run.run_all(1, "--device cpu")
    assert "--epochs" in (run.RUNS / "dmae" / "output").read_text()
