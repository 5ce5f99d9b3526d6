"""results/gpu.py: its plan is one that the stages accept; limits, kills, resuming; a tiny run."""

import importlib.util
import json
import os
import shlex
import signal
import time
from pathlib import Path

import bench
import pytest
import test_gpu
import torch
from test_fashion import write_files
from test_lenet import open_script

import certify
import finetune
import pretrain

ROOT = Path(__file__).parents[1]


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module, in the repository's root."""
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "results" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def parsed(gpu, monkeypatch, tmp_path):
    """parsed(data, smoke) -> {step: what the stages' own parsers make of its commands}.

    In the order of the plan: a command has the checkpoints of those before it, and no other.
    """
    made, seen = {}, []

    def checkpoint_of(file, *_):
        return made[str(file)]

    def keep(args, file, kind):
        data = dict(dataset=args.dataset, data_path=args.data_path, holdout=args.holdout)
        data |= dict(image_size=args.size, channels=1, classes=[])
        sigma = args.sigma if kind == "finetune" else None
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
        made[file] = dict(kind=kind, data=data, settings=vars(args), sigma=sigma)

    def measure(*row):
        seen.append(row[:4])
        return {}

    monkeypatch.setattr(finetune, "read_checkpoint", checkpoint_of)
    original = pretrain.read_checkpoint
    read = lambda file, kind=None: made.get(file) or original(file, kind)
    monkeypatch.setattr("model.read_checkpoint", read)
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "describe", lambda *_: "")
    monkeypatch.setattr(bench, "large_matmul", lambda *_: (None, 0))

    def parse(command):
        python, script, *flags = shlex.split(command)
        assert python == "python"
        if script == "tests/bench.py":
            seen.clear()
            Path(flags[flags.index("--json") + 1]).parent.mkdir(parents=True, exist_ok=True)
            bench.main(flags)
            return [*seen]
        if script == "pretrain.py":
            args = pretrain.parse(flags)
            keep(args, f"{args.out}/pretrain.pt", "pretrain")
        elif script == "finetune.py":
            args = finetune.parse(flags)
            keep(args, f"{args.out}/finetune_sigma_{args.sigma:g}.pt", "finetune")
        elif script == "certify.py":
            args, _ = certify.parse(flags)
        else:
            assert [script, *flags[:3]] == ["-m", "pytest", "-m", "gpu"]
            return flags[flags.index("0") + 1:]
        return args

    def parse_all(data, smoke=False):
        steps = gpu.plan(f"{tmp_path}/runs", tmp_path / "out", str(data), "fashion", smoke)
        return {step.name: [parse(command) for command in step.commands] for step in steps}

    return parse_all


@pytest.fixture
def folders(tmp_path):
    """Class folders' place, with a space in its name."""
    (tmp_path / "my pictures" / "train").mkdir(parents=True)
    return tmp_path / "my pictures"


@pytest.mark.parametrize("smoke", [False, True])
def test_each_step_needs_what_earlier_ones_leave_and_has_results_of_its_own(gpu, smoke):
    left = set()
    steps = gpu.plan("runs/gpu", "results/gpu-X", "data", "data", smoke)
    for step in steps:
        assert all(need in left or (ROOT / need).exists() for need in step.needs), step.name
        assert step.results and not left & {*step.results}, step.name
        left |= {*step.results}
    names = [step.name for step in steps]
    assert len({*names}) == len(names)
    assert names[0] == "tests-fast" and names[-1] == "tests-rest"
    places = [names.index(name) for name in (
        "cifar10-pretrain", "cifar10-finetune", "cifar10-certify", "cifar10-certify-n100000-0.25",
        "cifar10-mae-pretrain", "cifar10-others-certify", "fashion-pretrain")]
    assert places == sorted(places)


def test_cifar10_is_trained_and_certified_as_cohen_did(parsed, folders):
    steps = parsed(folders)
    (before,) = steps["cifar10-pretrain"]
    for args in (before, *steps["cifar10-finetune"], *steps["cifar10-others-finetune"]):
        found = args.recipe, args.dataset, args.data_path, args.size, args.normalisation
        assert found == ("cifar10", "folder", str(folders), 32, "cifar10")
        assert (args.model, args.compile) == ("vit_cifar_small", "off")
    assert [args.sigma for args in steps["cifar10-finetune"]] == [0.25, 0.5, 1.0]
    assert {args.objective for args in steps["cifar10-finetune"]} == {"consistency"}
    certified = [*steps["cifar10-certify"], *steps["cifar10-others-certify"]]
    for sigma in (0.25, 0.5, 1.0):
        certified += steps[f"cifar10-certify-n100000-{sigma:g}"]
    for args in certified:
        assert (args.dataset, args.skip, args.max, args.alpha) == ("folder", 20, 0, 0.001)
        assert f"finetune_sigma_{args.sigma:g}.pt" in args.checkpoint
        assert args.out.endswith(f"-n{args.n}")
    assert [args.n for args in certified] == [10_000] * 5 + [100_000] * 3
    assert [args.sigma for args in certified] == [0.25, 0.5, 1.0, 0.25, 0.25, 0.25, 0.5, 1.0]


def test_torchvisions_files_are_the_other_form_of_cifar10(parsed, tmp_path):
    for step, stages in parsed(tmp_path / "folder").items():
        for args in stages if "cifar10" in step else []:
            assert args.dataset == "cifar10" and getattr(args, "normalisation", "") == ""


def test_mae_and_scratch_differ_from_dmae_in_what_they_are_named_for_alone(parsed, folders):
    steps = parsed(folders)
    dmae, mae = (vars(steps[f"cifar10-{name}"][0]) for name in ("pretrain", "mae-pretrain"))
    assert {key for key in dmae if dmae[key] != mae[key]} == {"sigma", "loss_on", "out"}
    assert (mae["sigma"], mae["loss_on"]) == (0, "dropped")
    (dmae, *_), (mae, scratch) = (
        [vars(args) for args in steps[f"cifar10-{name}"]] for name in ("finetune",
                                                                       "others-finetune"))
    assert {key for key in dmae if dmae[key] != mae[key]} == {"init", "out"}
    assert mae["init"].endswith("/mae/pretrain.pt")
    assert {key for key in dmae if dmae[key] != scratch[key]} == {"init", "out", "layer_decay"}
    assert (scratch["init"], scratch["layer_decay"]) == ("scratch", 1)


def test_fashion_mnist_has_the_smoothadv_of_its_own_script_and_every_tenth_image(parsed, folders):
    steps = parsed(folders)
    script = open_script("run").OBJECTIVES["smoothadv"]
    tuned = steps["fashion-finetune"]
    for args in tuned:
        flags = ["--recipe", "fashion", "--sigma", f"{args.sigma:g}", "--init", "scratch"]
        theirs = finetune.parse([*flags, *shlex.split(script)])
        assert (args.objective, args.objective_args) == (theirs.objective, theirs.objective_args)
        assert args.init.endswith("fashion-mnist/dmae/pretrain.pt")
    certified = [steps[f"fashion-certify-{sigma:g}"][0] for sigma in (0.25, 0.5, 1.0)]
    assert [args.sigma for args in tuned] == [args.sigma for args in certified] == [0.25, 0.5, 1.0]
    found = {(args.dataset, args.data_path, args.n, args.skip, args.max) for args in certified}
    assert found == {("fashion-mnist", "fashion", 100_000, 10, 0)}


def test_speed_is_measured_of_large_networks_of_batches_and_of_jobs(parsed, folders):
    steps = parsed(folders)
    for model in ("vit_base_patch16", "vit_large_patch16"):
        for stage in ("certify", "pretrain", "finetune"):
            ((name, measured, dtype, args),) = steps[f"{model}-{stage}"][0]
            assert (name, measured, dtype, args.batch) == (model, stage, "bf16", None)
    for batch in (400, 2000, 10_000):
        rows = steps[f"batch-{batch}"][0]
        assert [row[0] for row in rows] == ["vit_digits", "vit_fashion", "vit_cifar_small"]
        assert {(row[1], row[3].batch) for row in rows} == {("certify", batch)}
        assert rows[0][3].draws % batch == 0
    for place in ("digits-400", "digits-10000", "cifar10-4000"):
        found = []
        for jobs in (1, 2, 4):
            those = steps[f"jobs-{place}-{jobs}"]
            assert [args.shard for args in those] == [f"{job}/{jobs}" for job in range(jobs)]
            assert len({args.out for args in those}) == 1
            found += [{key: value for key, value in vars(args).items()
                       if key not in ("out", "shard")} for args in those]
        assert all(args == found[0] for args in found)
        assert found[0]["batch"] == int(place.split("-")[1])


def test_ten_cases_of_test_gpu_come_first_and_the_others_last(gpu, parsed, folders):
    cases = 0
    for name in gpu.FAST_TESTS:
        marks = getattr(getattr(test_gpu, name), "pytestmark", [])
        cases += max([len(mark.args[1]) for mark in marks if mark.name == "parametrize"], default=1)
    assert cases == 10
    steps = parsed(folders)
    ids = [f"tests/test_gpu.py::{name}" for name in gpu.FAST_TESTS]
    assert steps["tests-fast"][0][:-2] == ids
    rest = steps["tests-rest"][0][:-2]
    assert rest[0] == "tests/test_gpu.py" and rest[2::2] == ids
    assert {*rest[1::2]} == {"--deselect"}


def test_the_smoke_runs_commands_are_accepted_small_and_on_a_cpu(gpu, parsed, folders):
    steps = parsed(folders, smoke=True)
    full = gpu.plan("runs", "out", str(folders), "fashion")
    kinds = {step.name.partition("-")[0] for step in full} - {"vit_base_patch16",
                                                             "vit_large_patch16"}
    assert kinds <= {name.partition("-")[0] for name in steps}
    for name, stages in steps.items():
        for args in stages if "tests" not in name else []:
            for one in [row[3] for row in args] if isinstance(args, list) else [args]:
                assert one.device == "cpu"
                small = getattr(one, "epochs", 0) <= 1 and getattr(one, "n", 0) <= 200
                assert small and (getattr(one, "draws", None) or 0) <= 200


# --------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------

COUNTS = """
import sys, time
from pathlib import Path
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
log = folder / "progress"
while not log.exists() or len(log.read_text()) < steps:
    with open(log, "a") as file:
        file.write("x")
    time.sleep(0.02)
(folder / "result").write_text("done")
"""
STARTS_ANOTHER = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"
MEETS = """
import sys, time
from pathlib import Path
own, other = map(Path, sys.argv[1:])
own.touch()
end = time.time() + 60
while not other.exists() and time.time() < end:
    time.sleep(0.01)
sys.exit(not other.exists())
"""


@pytest.fixture
def scripts(tmp_path):
    """{name: file} of programs that stand for stages."""
    found = {}
    for name, text in dict(counts=COUNTS, starts_another=STARTS_ANOTHER, meets=MEETS,
                           fails="raise SystemExit(3)").items():
        found[name] = tmp_path / f"{name}.py"
        found[name].write_text(text)
    return found


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """run(steps, seconds=60) -> the rows of steps.jsonl so far, with {step: outcome} in .ends."""
    monkeypatch.setattr(gpu, "LEAST", 0.1)

    def run_and_read(steps, seconds=60):
        gpu.run(steps, seconds, tmp_path / "runs", tmp_path / "out", dict(commit="c", torch="t"))
        file = tmp_path / "out" / "steps.jsonl"
        return gpu.read_lines(file) if file.exists() else []

    return run_and_read


def counting(gpu, scripts, folder, steps, limit, name="counts", **how):
    folder.mkdir(exist_ok=True)
    command = f"python {scripts['counts']} {folder} {steps}"
    return gpu.Step(name, limit, [command], [f"{folder}/result"], **how)


def test_a_step_is_killed_at_its_limit_and_the_next_call_goes_on(gpu, run, scripts, tmp_path):
    endless = counting(gpu, scripts, tmp_path / "a", 10**6, 1)
    (row,) = run([endless])
    assert row["statuses"] == [None] and not row["finished"] and 1 <= row["seconds"] < 5
    assert row["commit"] == "c" and row["commands"] == endless.commands
    done = len((tmp_path / "a" / "progress").read_text())
    assert done > 1
    ends = counting(gpu, scripts, tmp_path / "a", done + 5, 60)
    _, row = run([ends])
    assert row["statuses"] == [0] and row["finished"]
    assert len((tmp_path / "a" / "progress").read_text()) == done + 5
    log = (tmp_path / "out" / "logs" / "counts-0.log").read_text()
    assert log.splitlines() == [f"$ {step.commands[0]}" for step in (endless, ends)]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| counts | killed at its limit |" in readme and "| counts | finished |" in readme


def test_what_is_finished_is_not_done_again(gpu, run, scripts, tmp_path, capsys):
    step = counting(gpu, scripts, tmp_path / "a", 3, 60)
    rows = run([step])
    (tmp_path / "a" / "progress").unlink()
    assert run([step]) == rows and not (tmp_path / "a" / "progress").exists()
    assert "counts: finished before" in capsys.readouterr().out


def test_what_a_command_started_is_killed_with_it(gpu, run, scripts, tmp_path):
    counts = counting(gpu, scripts, tmp_path / "a", 10**6, 2)
    command = counts.commands[0].replace("python ", f"python {scripts['starts_another']} ")
    run([counts._replace(commands=[command])])
    before = (tmp_path / "a" / "progress").read_text()
    assert before
    time.sleep(0.5)
    assert (tmp_path / "a" / "progress").read_text() == before


def test_commands_of_a_step_run_at_the_same_time(gpu, run, scripts, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    commands = [f"python {scripts['meets']} {a} {b}", f"python {scripts['meets']} {b} {a}"]
    (row,) = run([gpu.Step("meet", 60, commands, [f"{a}", f"{b}"])])
    assert row["statuses"] == [0, 0] and row["finished"]
    assert len(list((tmp_path / "out" / "logs").glob("meet-?.log"))) == 2


def test_what_fits_the_time_is_done_in_order(gpu, run, scripts, tmp_path, capsys):
    """A step that cannot go on waits for a call that has time for all of it."""
    steps = [counting(gpu, scripts, tmp_path / "a", 1, 100, "whole", resumes=False),
             counting(gpu, scripts, tmp_path / "b", 10**6, 100, "endless"),
             counting(gpu, scripts, tmp_path / "c", 1, 100, "late")]
    rows = run(steps, 2)
    assert [(row["step"], row["statuses"]) for row in rows] == [("endless", [None])]
    assert rows[0]["seconds"] < 4
    printed = capsys.readouterr().out
    assert "whole: no time" in printed and "late: no time" in printed
    rows = run([steps[0], steps[2]], 200)
    assert [row["step"] for row in rows[1:]] == ["whole", "late"]


def test_a_step_waits_for_what_it_needs_and_one_that_fails_stops_no_other(
    gpu, run, scripts, tmp_path, capsys,
):
    fails = gpu.Step("fails", 60, [f"python {scripts['fails']}"], [f"{tmp_path}/none"])
    waits = counting(gpu, scripts, tmp_path / "a", 1, 60, "waits", needs=[f"{tmp_path}/none"])
    last = counting(gpu, scripts, tmp_path / "b", 1, 60, "last")
    rows = run([fails, waits, last])
    assert [(row["step"], gpu.outcome(row)) for row in rows] == [
        ("fails", "ended with status 3"), ("last", "finished")]
    assert f"waits: waits for {tmp_path}/none" in capsys.readouterr().out
    again = run([fails])
    assert len(again) == 3, "what failed is tried again"


def test_tables_that_cannot_be_written_cost_no_step(gpu, run, scripts, tmp_path, capsys):
    broken = tmp_path / "out" / "bench" / "broken.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    steps = [counting(gpu, scripts, tmp_path / name, 1, 60, name) for name in ("a", "b")]
    assert [gpu.outcome(row) for row in run(steps)] == ["finished", "finished"]
    assert "JSONDecodeError" in capsys.readouterr().err


def test_when_the_script_is_ended_its_commands_are(gpu, scripts, tmp_path, monkeypatch):
    def end_me(*_):
        signal.setitimer(signal.ITIMER_REAL, 1)
        counts = counting(gpu, scripts, tmp_path / "a", 10**6, 60)
        gpu.execute(counts, 60, tmp_path / "logs")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("main() has no handler of its own"))
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(gpu, "run", end_me)
    try:
        with pytest.raises(SystemExit, match="143"):
            gpu.main(["--smoke", "--results", str(tmp_path / "out"), "--runs", str(tmp_path)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    before = (tmp_path / "a" / "progress").read_text()
    time.sleep(0.5)
    assert before and (tmp_path / "a" / "progress").read_text() == before


def test_jobs_that_were_cut_begin_again_since_they_are_a_measurement(gpu, tmp_path):
    result = tmp_path / "certify_sigma_0.25.tsv"
    part = tmp_path / f"{result.name}.part0-2-0-1"
    for resumes in (True, False):
        part.write_text("rows")
        gpu.execute(gpu.Step("jobs", 60, [], [str(result)], resumes=resumes), 60, tmp_path)
        assert part.exists() == resumes
    jobs = [step for step in gpu.plan("r", "o", "d", "d") if step.name.startswith("jobs")]
    assert jobs and not any(step.resumes for step in jobs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_lists_its_commands_and_refuses_to_run(gpu, capsys, tmp_path):
    gpu.main(["--list"])
    printed = capsys.readouterr().out
    for step in gpu.plan("runs/gpu", "results/gpu-CARD", "data", "data"):
        assert f"{step.name}: {step.limit} s at most" in printed
        assert all(f"  {command}\n" in printed for command in step.commands)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--minutes", "1"])
    assert "there is no GPU; --smoke is for CPUs" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Tables, and all of it
# --------------------------------------------------------------------------------------------------


def test_draws_a_second_are_the_sum_of_the_jobs_rates(gpu, tmp_path):
    """Job 0 of 2 has 2 x 1,100 draws in 4 s, job 1 has 1,100 in 1 s."""
    times = ["0:00:01", "0:00:01", "0:00:03.000000"]
    head = "\t".join(["idx", "label", "predict", "radius", "correct", "time", "n", "sigma"])
    rows = [f"{3 * i}\t0\t0\t0.1\t1\t{times[i]}\t1000\t0.25" for i in range(3)]
    folder = tmp_path / "jobs" / "digits-400-2"
    folder.mkdir(parents=True)
    (folder / "certify_sigma_0.25.tsv").write_text("\n".join([head, *rows]) + "\n")
    (folder / "certify_sigma_0.25.json").write_text(json.dumps(dict(n0=100)))
    assert gpu.draws_per_second(folder / "certify_sigma_0.25.tsv", 2) == 2200 / 4 + 1100
    assert "| digits | 400 | 2 | 1,650 |" in gpu.jobs_table(tmp_path)


@pytest.mark.slow
def test_all_steps_run_on_a_cpu_once_and_leave_tables_pictures_and_no_weights(
    gpu, make_folder, tmp_path, monkeypatch, capsys,
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pictures = make_folder(32, train=25, test=5)
    (pictures / "val").rename(pictures / "test")
    write_files(tmp_path / "data" / "FashionMNIST" / "raw")
    out = tmp_path / "out"
    argv = ["--smoke", "--minutes", "30", "--cifar10", str(pictures), "--results", str(out),
            "--data-path", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    previous = signal.getsignal(signal.SIGTERM)
    try:
        gpu.main(argv)
        rows = gpu.read_lines(out / "steps.jsonl")
        logs = {log.name: log.read_text()[-2000:] for log in (out / "logs").iterdir()}
        assert {row["step"]: gpu.outcome(row) for row in rows} == {
            step.name: "finished" for step in gpu.plan("", out, str(pictures), "", True)}, logs
        assert sum(row["seconds"] for row in rows) < 600
        written = {file: file.stat().st_mtime_ns for file in out.rglob("*.tsv")}
        capsys.readouterr()
        gpu.main(argv)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert capsys.readouterr().out.count("finished before") == len(rows)
    assert written == {file: file.stat().st_mtime_ns for file in out.rglob("*.tsv")}

    left = {file.suffix for file in out.rglob("*") if file.is_file()}
    assert left == {".md", ".jsonl", ".json", ".tsv", ".png", ".log"}       # no weights, no locks
    for which, cases in (("fast", 10), ("rest", 6)):
        assert f" {cases} skipped" in logs[f"tests-{which}-0.log"]
    readme = (out / "README.md").read_text()
    cifar10, fashion = readme.split("## fashion-mnist: certified")
    for name in ("dmae-n10000", "dmae-n100000", "mae-n10000", "scratch-n10000"):
        assert f" {name} |  0.25 | one-sided |      3 |" in cifar10
    assert " dmae-n100000 |  0.25 | two-sided |      3 |" in fashion
    assert readme.count("| vit_digits | ") == 2 and "| digits | 400 | 2 | " in readme
    test = json.loads((out / "cifar10/mae/finetune_sigma_0.25.jsonl").read_text().splitlines()[-1])
    assert f"| mae | 0.25 | 1 | {test['clean']:.1%} | {test['noisy']:.1%} |" in readme
    assert (out / "cifar10" / "curves.png").exists() and (out / "fashion-mnist/curves.png").exists()
    (out / "README.md").unlink()
    gpu.main(["--tables", str(out)])
    assert (out / "README.md").read_text() == readme
