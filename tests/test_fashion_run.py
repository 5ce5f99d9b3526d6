"""results/fashion-mnist/run.py: its plan is one that the stages accept, and a small plan runs from end to end."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest
from test_fashion import write_files

import certify
import finetune
import pretrain

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The module, its runs in a temporary folder."""
    spec = importlib.util.spec_from_file_location("fashion_run", ROOT / "results" / "fashion-mnist" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.chdir(ROOT)
    return module


def test_every_command_of_the_plan_is_accepted_and_each_run_has_a_folder_of_its_own(run):
    plan = run.plan()
    assert len({one.name for one in plan}) == len(plan) and not any(" " in one.name for one in plan)
    for one in plan:
        _, stage, *flags = shlex.split(one.commands("--device cpu --dtype bf16")[0])
        place = flags.index("--init") + 1
        assert flags[place] == ("scratch" if one.init == "scratch" else str(run.RUNS / one.init / "pretrain.pt"))
        flags[place] = "scratch"                                                          # which needs no file
        args = finetune.parse(flags)
        assert stage == "finetune.py" and args.sigma == one.sigma and args.seed == one.seed
        assert args.layer_decay == (1.0 if one.init == "scratch" else 0.75)
        assert args.linear_probe == (one.part == "linear probe")
        assert (args.labels_per_class or "all") == {"100 labels a class": 100, "10 labels a class": 10}.get(one.part, "all")
        assert args.consistency == (5.0 if one.part == "recipe" else 0.0)
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
def test_a_small_plan_is_trained_certified_and_collected_once(run, monkeypatch, tmp_path, capfd):
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    small = "--epochs 1 --warmup-epochs 0 --batch 50"
    monkeypatch.setattr(run, "PRETRAININGS", {init: f"{flags} {small}" for init, flags in run.PRETRAININGS.items()})
    plan = [run.Run("all labels", init, flags=f"--consistency 0 {small}", certify="--n 100 --n0 20 --skip 8")
            for init in run.INITS]
    monkeypatch.setattr(run, "plan", lambda: plan)
    shared = f"--device cpu --data-path {tmp_path / 'data'}"
    assert run.collect(plan[0]) is None
    run.run_all(2, shared)
    written = {file: file.stat().st_mtime_ns for file in run.RUNS.rglob("*") if file.suffix in (".pt", ".tsv")}
    assert len(written) == 2 + 2 * 3
    run.run_all(2, shared)
    assert written == {file: file.stat().st_mtime_ns for file in written}

    rows = [run.collect(one) for one in plan]
    for one, row in zip(plan, rows, strict=True):
        summary = certify.Summary(certify.read_rows(one.out / "certify_sigma_0.5.tsv"))
        assert (row["init"], row["images"], row["n"], row["labels"]) == (one.init, 5, 100, "all")
        assert row["one-sided"]["acr"] == pytest.approx(summary.acr, abs=1e-4)
        before = run.RUNS / one.init / "pretrain.jsonl"
        assert before.exists() == (one.init != "scratch")
        last = json.loads(before.read_text().splitlines()[-1])["time"] if before.exists() else 0
        assert row["seconds_pretraining"] == round(last)
    capfd.readouterr()
    run.print_table(rows)
    assert len(capfd.readouterr().out.splitlines()) == 2 + 3
    run.print_differences(plan)
    for line, other in zip(capfd.readouterr().out.splitlines()[3:], rows[1:], strict=True):
        difference = rows[0]["one-sided"]["acr"] - other["one-sided"]["acr"]
        assert line.startswith(f"| all labels | 1 | {other['init']} | ")
        assert float(line.split("|")[5].strip()) == pytest.approx(difference, abs=1e-3)


@pytest.mark.slow
def test_a_command_that_fails_ends_the_plan_and_names_its_output(run, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "PRETRAININGS", {"dmae": "--epochs -1"})
    with pytest.raises(SystemExit, match="exit status 2, see .*dmae/output: python pretrain.py"):
        run.run_all(1, "--device cpu")
    assert "--epochs" in (run.RUNS / "dmae" / "output").read_text()
