"""Wrong use of any flag is one line on standard error, status 2, and nothing written."""

import argparse
import inspect
import os
import re
import shlex
import shutil
import types
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import certify
import finetune
import pretrain

ROOT = Path(__file__).parents[1]
STAGES = {"pretrain": pretrain, "finetune": finetune, "certify": certify}
CLASSIFIER = ["--classifier", "plugs.py:zeros"]
SCRATCH = ["--init", "scratch"]
GOOD = {                                                   # a command to which a test adds
    "pretrain": [],
    "finetune": ["--sigma", "0.25", *SCRATCH],
    "certify": ["--sigma", "0.25", *CLASSIFIER],
}
FOLDER = ["--dataset", "folder", "--model", "vit_digits", "--data-path"]


def flags_of(stage):
    """{name: (value, text, *choices)}, all of them."""
    return stage.FLAGS | stage.RUN_FLAGS | getattr(stage, "REPORT_FLAGS", {})


def dashed(name):
    return f"--{name.replace('_', '-')}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_run, make_folder):
    """Good and damaged checkpoints, class folders and plugs to name; no test changes it."""
    root = tmp_path_factory.mktemp("usage")
    os.symlink(tiny_run / "pretrain.pt", root / "good.pt")
    os.symlink(tiny_run / "finetune_sigma_0.25.pt", root / "tuned.pt")
    (root / "torn.pt").write_bytes((tiny_run / "pretrain.pt").read_bytes()[:5000])
    (root / "text.pt").write_text("hello")
    torch.save([1, 2], root / "list.pt")
    weights = torch.load(root / "good.pt", weights_only=True)["model"]
    torch.save({"model": weights | {"cls_token": torch.ones(1, 1, 8)}}, root / "wide.pt")
    torch.save({"model": weights | {"extra.weight": torch.ones(1)}}, root / "extra.pt")
    torch.save({"model": weights | {"dist_token": torch.ones(1, 1, 48)}}, root / "distilled.pt")
    torch.save({"model": weights | {"head.weight": torch.ones(10, 48)}, "optimizer": {}, "epoch": 9,
                "args": argparse.Namespace(model="vit")}, root / "authors.pt")
    for name in ("no_train/val/a", "no_classes/train", "no_pictures/train/a"):
        (root / name).mkdir(parents=True)
    make_folder(8, grey=True).rename(root / "pictures")
    for name in ("no_val", "other_classes"):
        shutil.copytree(root / "pictures", root / name)
    shutil.rmtree(root / "no_val" / "val")
    (root / "other_classes" / "val" / "class_2").rename(root / "other_classes" / "val" / "class_3")
    (root / "plugs.py").write_text(
        "import torch\nvalue = 3\n"
        "class Network(torch.nn.Module):\n    pass\n"
        "def zeros(x):\n    return torch.zeros(len(x), 10)\n"
        "def three(x):\n    return torch.zeros(len(x), 3)\n")
    rows = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.3\t1\t0:00:01.0\n"
    (root / "sigma_0.25.tsv").write_text(rows)
    return root


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def refused(capsys):
    """refused(stage, arguments) -> the one line that it prints; nothing may change."""

    def run(stage, arguments, status=2):
        before = {path: path.lstat().st_mtime_ns for path in Path().rglob("*")}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            STAGES[stage].main([str(argument) for argument in arguments])
        error = capsys.readouterr().err
        assert stop.value.code == status, error
        assert error.count("\n") == 1 and error.startswith(f"{stage}.py: error: "), error
        assert {path: path.lstat().st_mtime_ns for path in Path().rglob("*")} == before
        return error

    return run


# --------------------------------------------------------------------------------------------------
# Every flag, by its table
# --------------------------------------------------------------------------------------------------

# Flags that take any word: ways to be wrong, each with what the line names.
WORDS = {
    "pretrain": {
        "out": [],                                         # those of [] have tests of their own
        "data_path": [],
        "init": [("gone.pt", "gone.pt"), ("no_val", "no_val"), ("torn.pt", "torn.pt"),
                 ("text.pt", "text.pt"), ("list.pt", "list.pt"), ("wide.pt", "cls_token"),
                 ("extra.pt", "extra.weight")],
    },
    "finetune": {
        "objective": [("smoothadv", "FILE.py:NAME"), ("gone.py:f", "gone.py"),
                      ("plugs.py:f", "'f'"), ("plugs.py:value", "'value'"),],
        "objective_args": [("copies", "copies"), ("colour=3", "colour"), ("lam=much", "lam=much")],
    },
    "certify": {
        "out": [],
        "data_path": [],
        "checkpoint": [("tuned.pt", "--checkpoint")],      # besides --classifier
        "classifier": [("gone.py:zeros", "gone.py"), ("plugs.py", "plugs.py"),
                       ("plugs.py:f", "'f'"), ("plugs.py:value", "'value'"),
                       ("plugs.py:Network", "'Network'"), ("plugs.py:three", "3 logits")],
        "procedure": [("gone.py:f", "gone.py"), ("sequential", "sequential"),
                      ("plugs.py:value", "'value'")],
        "shard": [("2/2", "--shard"), ("1", "--shard"), ("-1/2", "--shard"), ("0/0", "--shard")],
        "report": [("sigma_0.25.tsv", "--report")],        # besides what is to be certified
        "label": [],
        "plot": [],
    },
}
WORDS["finetune"] |= {key: WORDS["pretrain"][key] for key in ("out", "data_path", "init")}


def wrong_values(stage):
    """(name, arguments, what the line must name) of every flag of a stage, from its tables."""
    for name, (value, text, *choices) in flags_of(STAGES[stage]).items():
        kind = type(value[0] if isinstance(value, tuple) else value)
        flag = dashed(name)
        if kind is bool:
            yield name, [f"{flag}=3"], flag
            continue
        yield name, [flag], flag
        if choices:
            yield name, [flag, "nonsense"], flag
        elif kind is str:
            for word, named in WORDS[stage][name]:
                yield name, [flag, word], named
        else:
            wrong = ["x", "-1", "nan", "inf", "-inf", "1e400"]
            wrong += ["1.5", "1e2"] if kind is int else []
            wrong += ["0"] if "0:" not in text else []
            wrong += ["1", "1.5"] if name in ("mask_ratio", "erasing", "drop_path", "alpha") else []
            for word in wrong:
                yield name, [flag, word], flag


CASES = [
    pytest.param(stage, arguments, named, id=f"{stage} {' '.join(arguments)}")
    for stage in STAGES for _, arguments, named in wrong_values(stage)
]


@pytest.mark.parametrize("stage, arguments, named", CASES)
def test_a_wrong_value_of_any_flag_is_refused(refused, stage, arguments, named):
    out = [] if "--out" in arguments else ["--out", "run"]
    assert named in refused(stage, [*GOOD[stage], *out, "--device", "cpu", *arguments])


@pytest.mark.parametrize("stage", STAGES)
def test_zero_is_refused_but_where_the_help_says_what_it_means(refused, stage):
    """Written out once, by hand: the table of the test above is the code's own."""
    zero = {
        "pretrain": {"holdout", "sigma", "mask_ratio", "warmup_epochs", "weight_decay",
                     "seed", "workers"},
        "finetune": {"sigma", "labels_per_class", "erasing", "mixup", "cutmix", "warmup_epochs",
                     "min_lr", "weight_decay", "drop_path", "seed", "workers"},
        "certify": {"max", "radii", "seed", "batch"},
    }
    number = {name for name, (value, *_) in flags_of(STAGES[stage]).items()
              if type(value[0] if isinstance(value, tuple) else value) in (int, float)}
    for name in number:
        if name in zero[stage]:
            given = STAGES[stage].parse([*GOOD[stage], dashed(name), "0"])
            given = given[0] if stage == "certify" else given
            assert getattr(given, name) in (0, [0])
        else:
            refused(stage, [*GOOD[stage], dashed(name), "0"])


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("arguments", [["--colour", "red"], ["digits"], ["--see", "3"],
                                       ["--dry-run"], ["--overwrite"], ["--resume", "never"]])
def test_what_is_no_flag_is_refused(refused, stage, arguments):
    """Abbreviations, too, since a later flag would change what they mean."""
    assert arguments[0] in refused(stage, [*GOOD[stage], *arguments])


@pytest.mark.parametrize("stage", STAGES)
def test_help_names_every_flag_its_choices_and_its_value(capsys, stage):
    with pytest.raises(SystemExit) as stop:
        STAGES[stage].main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not stop.value.code
    for name, (value, what, *choices) in flags_of(STAGES[stage]).items():
        what = " ".join(f"{what} [{value}]".split())
        assert dashed(name) in text and what.replace("- ", "-") in text.replace("- ", "-")
        assert not choices or f"{{{','.join(choices)}}}" in text


# --------------------------------------------------------------------------------------------------
# Flags against each other, checkpoints and data
# --------------------------------------------------------------------------------------------------

BOTH = {                                                   # what pretrain.py and finetune.py refuse
    "normalisation of other channels": (["--normalisation", "cifar10"], "channels"),
    "model of other channels": (["--model", "vit_cifar"], "channels"),
    "data set of another recipe": (["--dataset", "cifar10"], "--model"),
    "missing data folder": ([*FOLDER, "nowhere"], "nowhere"),
    "folder without train": ([*FOLDER, "no_train"], "no_train/train"),
    "folder without classes": ([*FOLDER, "no_classes"], "no_classes"),
    "class without pictures": ([*FOLDER, "no_pictures"], "a"),
    "folder for a file of weights": (["--init", "pictures"], "pictures is a folder: name the file"),
    "distilled weights": (["--init", "distilled.pt"], "take a plain one, or give certify.py"),
    "augmentation of large pictures": (["--augment", "resized-crop"], "resized-crop"),
    "augmentation of small pictures": (
        [*FOLDER, "pictures", "--size", "80", "--augment", "flip", "--batch", "4"], "flip"),
    "batch beyond the data": (["--batch", "5000"], "5000"),
    "batch beyond what is not held out": (["--holdout", "1400"], "128"),
    "everything held out": (["--holdout", "1437"], "0 training images"),
    "more than everything held out": (["--holdout", "5000"], "0 training images"),
}
TUNED = ["--sigma", "0.25", "--init", "good.pt"]
ONLY = {
    "pretrain": {
        "no patch kept": (["--mask-ratio", "0.99"], "0.99"),
        "fine-tuned checkpoint": (["--init", "tuned.pt"], "tuned.pt"),
    },
    "finetune": {
        "no sigma": (SCRATCH, "--sigma"),
        "nothing to start from": (["--sigma", "0.25"], "run/pretrain.pt"),
        "model of the checkpoint": ([*TUNED, "--model", "vit_cifar"], "vit_digits"),
        "data of the checkpoint": ([*TUNED, "--dataset", "cifar10"], "made with digits"),
        "size of the checkpoint": ([*TUNED, "--size", "16"], "made with 8"),
        "normalisation of the checkpoint": ([*TUNED, "--normalisation", "mnist"], "good.pt"),
        "weights of another model": (
            [*TUNED, "--recipe", "mnist", *FOLDER[:3], "vit_fashion", "--data-path", "pictures",
             "--size", "8", "--normalisation", "mnist", "--batch", "4"], "good.pt does not fit"),
        "folder without val": ([*GOOD["finetune"], *FOLDER, "no_val"], "no_val/val"),
        "classes that differ": (
            [*GOOD["finetune"], *FOLDER, "other_classes", "--batch", "4"], "class_2, class_3"),
        "arguments of another objective": (
            [*GOOD["finetune"], "--objective", "gaussian", "--objective-args", "lam=1"], "lam=1"),
    },
    "certify": {
        "no sigma": ([], "--sigma"),
        "nothing to certify": (["--sigma", "0.25"], "run/finetune_sigma_0.25.pt"),
        "missing checkpoint": (["--sigma", "0.25", "--checkpoint", "gone.pt"], "gone.pt"),
        "truncated checkpoint": (["--sigma", "0.25", "--checkpoint", "torn.pt"], "torn.pt"),
        "pre-trained checkpoint": (["--sigma", "0.25", "--checkpoint", "good.pt"], "finetune"),
        "folder for a checkpoint": (["--sigma", "0.25", "--checkpoint", "pictures"], "is a folder"),
        "distilled checkpoint": (["--sigma", "0.25", "--checkpoint", "distilled.pt"], "DeiT"),
        "the authors' fine-tuned file": (["--sigma", "0.25", "--checkpoint", "authors.pt"],
                                         "build_vit(...); load_encoder(vit, FILE) in a file for"),
        "data of the checkpoint": (
            ["--sigma", "0.25", "--checkpoint", "tuned.pt", "--dataset", "mnist"], "digits"),
        "size of the checkpoint": (
            ["--sigma", "0.25", "--checkpoint", "tuned.pt", "--size", "16"], "contradicts"),
        "odd batch": ([*GOOD["certify"], "--batch", "70"], "--batch"),
        "classes of other data": ([*GOOD["certify"], "--recipe", "mnist", *FOLDER[:2],
                                   "--data-path", "pictures", "--size", "8"], "3 classes"),
        "missing data folder": ([*GOOD["certify"], *FOLDER[:2], "--data-path", "nowhere"],
                                "nowhere"),
        "folder without val": ([*GOOD["certify"], *FOLDER[:2], "--data-path", "no_val"],
                               "no_val/val"),
    },
}
REPORT = ["--report", "sigma_0.25.tsv"]
REPORTS = {
    "missing file": (["--report", "gone.tsv"], "gone.tsv"),
    "no log": (["--report", "text.pt"], "text.pt"),
    "labels of other files": ([*REPORT, "--label", "a", "b"], "--label"),
    "counts that a log lacks": ([*REPORT, "--bound", "two-sided"], "sigma_0.25.tsv"),
    "negative radius": ([*REPORT, "--radii", "0", "-1"], "--radii"),
    "picture into no folder": ([*REPORT, "--plot", "gone/x.png"], "gone"),
    "picture of no kind": ([*REPORT, "--plot", "x.doc"], "doc"),
}


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("arguments, named", BOTH.values(), ids=BOTH)
def test_training_refuses(refused, stage, arguments, named):
    common = ["--device", "cpu", "--out", "run"]
    assert named in refused(stage, [*GOOD[stage], *common, *arguments])


@pytest.mark.parametrize("stage, arguments, named", [
    pytest.param(stage, *case, id=f"{stage}: {name}")
    for stage, cases in ONLY.items() for name, case in cases.items()])
def test_a_stage_refuses(refused, stage, arguments, named):
    error = refused(stage, [*arguments, "--device", "cpu", "--out", "run"])
    assert any(word in error for word in named.split("|")), error


@pytest.mark.parametrize("arguments, named", REPORTS.values(), ids=REPORTS)
def test_a_report_refuses(refused, arguments, named):
    assert named in refused("certify", arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_directory_that_cannot_be_made_is_named(refused, stage):
    argv = [*GOOD[stage], "--device", "cpu", "--out", "text.pt/run"]
    assert "text.pt" in refused(stage, argv, status=1)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_missing_accelerator_is_named(refused, stage, device):
    found = torch.accelerator.current_accelerator(check_available=True)
    if found and found.type == device:
        pytest.skip("there is one")
    assert f"--device {device}" in refused(stage, [*GOOD[stage], "--device", device])


@pytest.mark.parametrize("stage", STAGES)
def test_an_empty_word_is_the_default(stage):
    """--out "$R" without R must not write into the root directory."""
    plain = STAGES[stage].parse(GOOD[stage])
    assert STAGES[stage].parse([*GOOD[stage], "--out", ""]) == plain


# --------------------------------------------------------------------------------------------------
# Errors
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind, status", [
    (ValueError, 2), (FileNotFoundError, 2), (OSError, 1), (PermissionError, 1),
    (FloatingPointError, 1)])
def test_errors_of_several_lines_become_one(capsys, stage, kind, status):
    """Wrong use is status 2, what breaks later 1; of a data worker's error the last line counts."""
    with pytest.raises(SystemExit) as stop, STAGES[stage].one_line_errors():
        raise kind(f"Caught {kind} in worker 0.\nTraceback:\n  x = 1\nthe last line")
    assert stop.value.code == status
    assert capsys.readouterr().err == f"{stage}.py: error: the last line\n"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", [RuntimeError, KeyError, TypeError, AssertionError])
def test_mistakes_of_the_program_itself_keep_their_traceback(stage, kind):
    with pytest.raises(kind), STAGES[stage].one_line_errors():
        raise kind("3")


PLUG_ERRORS = {
    "import": "raise ValueError('mine')\n",
    "call": "def plug(*arguments, **more):\n    raise ValueError('mine')\n",
    "line": "def plug(*arguments, **more):\n    return arguments[0].gone\n",
}


@pytest.mark.parametrize("content", PLUG_ERRORS.values(), ids=PLUG_ERRORS)
@pytest.mark.parametrize("stage, flag", [("finetune", "--objective"), ("certify", "--classifier")])
def test_an_error_in_a_users_own_file_keeps_its_traceback(tmp_path, stage, flag, content):
    (tmp_path / "mine.py").write_text(content)
    argv = GOOD[stage][:2] + (SCRATCH if stage == "finetune" else [])
    argv += [flag, f"{tmp_path}/mine.py:plug", "--device", "cpu", "--out", str(tmp_path / "run")]
    with pytest.raises(RuntimeError, match="^in .*mine.py") as error:
        STAGES[stage].main(argv)
    assert str(error.value.__cause__) == "mine" or "gone" in str(error.value.__cause__)


# --------------------------------------------------------------------------------------------------
# Commands: torchrun's parser, and those that are written down
# --------------------------------------------------------------------------------------------------


def torchrun_settings(*line):
    return vars(get_args_parser().parse_args(["--nproc_per_node=2", "script.py", *line]))


@pytest.mark.parametrize("stage", STAGES)
def test_torchrun_leaves_every_flag_alone(stage):
    """But for --n, --n0 and --max, which it may take for its own: their other names pass."""
    known = {"n": "--N", "n0": "--N0", "max": "--limit"}
    for name in flags_of(STAGES[stage]):
        given = [known.get(name, dashed(name)), "1"]
        assert torchrun_settings(*given) == torchrun_settings() | {"training_script_args": given}
    if stage == "certify":
        line = [*GOOD["certify"], "--N", "300", "--N0", "20", "--limit", "7"]
        args, _ = certify.parse(line)
        assert (args.n, args.n0, args.max) == (300, 20, 7)


RUN = re.compile(r"(?:^|[\s`(])(?P<launcher>python3?|torchrun(?:\s+-\S+)*)\s+"
                 r"(?P<script>-m extras\.\w+|[\w./-]+\.py)\b(?P<rest>[^;|&`#)]*)")
PLACES = ["README.md", "extras/README.md", "results/cluster.md",
          *(f"{stage}.py" for stage in STAGES),
          *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "extras").glob("*.py"))]


def commands(place):
    """[(launcher, script, arguments), ...] written in a file, values in place of $VARIABLES."""
    text = (ROOT / place).read_text()
    if place.endswith(".py"):
        text = inspect.cleandoc(re.match(r'"""(.*?)"""', text, re.DOTALL)[1]).replace("\\\\", "\\")
    text = text.replace("\\\n", " ")
    loops = re.findall(r"for (\w+) in ([^\s;]+)", text)
    values = dict([*re.findall(r"^(\w+)=(\S+)", text, re.MULTILINE), *loops])
    found = []
    for line in text.splitlines():
        line = re.sub(r"\$\{?(\w+)\}?", lambda name: values.get(name[1], "1"), line)
        for run in RUN.finditer(line):
            script = re.sub(r"-m extras\.(\w+)", r"extras/\1.py", run["script"])
            found.append((run["launcher"].split(), script, shlex.split(run["rest"])))
    return found


@pytest.fixture
def as_if_trained(tmp_path, monkeypatch):
    """parse(stage, argv), in a folder where every checkpoint that it names seems to be."""
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "extras", "extras")
    Path("mine.py").write_text("import torch\nf = torch.nn.Linear(3, 3)\n")

    def parse(stage, argv):
        recipe = argv[argv.index("--recipe") + 1] if "--recipe" in argv else "digits"
        settings = vars(pretrain.parse(["--recipe", recipe]))
        data = settings | {"image_size": settings["size"]}
        checkpoint = dict(kind="pretrain", data=data, settings=settings, sigma=0.25)
        monkeypatch.setattr(finetune, "read_checkpoint", lambda *_: checkpoint)
        monkeypatch.setattr("model.read_checkpoint", lambda *_: checkpoint)
        monkeypatch.setattr(finetune, "Path", lambda *path: types.SimpleNamespace(
            exists=lambda: True, is_file=Path(*path).is_file, stem=Path(*path).stem,
            resolve=Path(*path).resolve, read_bytes=Path(*path).read_bytes))
        return STAGES[stage].parse(argv)

    return parse


@pytest.mark.parametrize("place", PLACES)
def test_written_commands_are_accepted(place, as_if_trained):
    found = commands(place)
    assert len(found) >= {"README.md": 10, "extras/README.md": 5}.get(place, 1), found
    for launcher, script, argv in found:
        assert (ROOT / script).is_file() or script == "mine.py", script
        if launcher[0] == "torchrun":
            args = get_args_parser().parse_args([*launcher[1:], script, *argv])
            assert args.training_script == script and args.training_script_args == argv
        if Path(script).stem in STAGES:
            as_if_trained(Path(script).stem, argv)
