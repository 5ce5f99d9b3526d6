"""What a classifier may return, and what certify() may be given: taken, or refused in one line."""

import csv

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import certify as c
import finetune
import pretrain
from certify import (
    FixedN,
    GaussianNoise,
    certify,
    certify_all,
    count_classes,
    count_under_noise,
    generator_for,
    main,
    predict,
)
from model import build_vit

CPU = torch.device("cpu")
MINE = """
import torch

torch.manual_seed(2)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))

class Holder:
    def __init__(self):
        torch.manual_seed(2)
        self.inner = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10))
    def __call__(self, x):
        return self.inner(x)

class Output:
    def __init__(self, logits):
        self.logits = logits

holder = Holder()
nets = [Holder().inner]
def closed():
    inner = Holder()
    return lambda x: inner(x)
closure = closed()
in_a_list = lambda x: nets[0](x)
method = Holder().__call__
partial = __import__("functools").partial(Holder().inner)
plain = lambda x: net(x)
masked = lambda x: net(x).index_fill(1, torch.tensor([3]), -float("inf"))
pair = lambda x: (net(x), "attention")
listed = lambda x: [net(x)]
mapping = lambda x: {"loss": None, "logits": net(x)}
thing = lambda x: Output(net(x))
spatial = lambda x: net(x)[:, :, None, None]
vector = lambda x: net(x)[:, 0]
classes = lambda x: net(x).argmax(1)
half = lambda x: net(x)[:7]
words = lambda x: {"scores": net(x)}
nothing = lambda x: None
image = lambda x: x
constant = lambda x: torch.zeros(len(x), 10)
all_nan = lambda x: net(x) * float("nan")
all_masked = lambda x: net(x) * 0 - float("inf")
def one_infinite(x):
    logits = net(x).clone()
    logits[5, 2] = float("inf")
    return logits
def broken(x):
    raise KeyError("no such layer")
made = []
def late(x):
    if not made:
        made.append(Holder().inner)
    return made[0](x)
def late_in_eval_mode(x):
    if not made:
        made.append(Holder().inner.eval())
    return made[0](x)
score = lambda x: net(x)[:, :1]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return path


@pytest.fixture
def run(file, tmp_path):
    """run(name, *flags) -> rows of a small run with that classifier."""
    def call(name, *flags):
        main(["--sigma", "0.25", "--classifier", f"{file}:{name}", "--dataset", "digits", "--device", "cpu", "--skip", "120",
              "--n", "300", "--n0", "50", "--alpha", "0.05", "--radii", "0", "--out", str(tmp_path / name), *flags])
        return [{k: v for k, v in row.items() if k != "time"} for row in
                csv.DictReader((tmp_path / name / "certify_sigma_0.25.tsv").open(), delimiter="\t")]
    return call


def space():
    names = {}
    exec(MINE, names)
    return names


@pytest.mark.parametrize("name", ["net", "holder", "plain", "closure", "in_a_list", "method", "partial"])
def test_networks_are_put_into_eval_mode_and_it_is_said(run, name, capsys):
    """With dropout on, f would not be one function. The network may be the callable, in its file, or in an object."""
    rows = run(name)
    assert "Sequential is put into eval mode" in capsys.readouterr().out
    net = space()["net"].eval()
    digits = load_digits()
    for row in rows:
        i = int(row["idx"])
        x = torch.tensor(digits.images[1437 + i] / 16, dtype=torch.float32)[None]
        prediction, radius = certify(net, x, 0.25, 50, 300, 0.05, index=i, batch=400)
        assert (row["predict"], row["radius"]) == (str(prediction), f"{radius:.6f}")


def test_a_network_made_at_the_first_call_is_in_eval_mode_or_refused(run, capsys, tmp_path):
    assert run("late_in_eval_mode") == run("plain")
    with pytest.raises(SystemExit) as stop:
        run("late")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "late made a " in error and "in training mode, at its first call" in error
    assert "".join(part.read_text() for part in (tmp_path / "late").glob("*.tsv*")) == ""


@pytest.mark.parametrize("name", ["pair", "listed", "mapping", "thing", "spatial"])
def test_outputs_that_hold_logits_are_taken(run, name):
    assert run(name) == run("plain")


@pytest.mark.parametrize("name, words", [
    ("vector", ("(400, classes)", "Tensor of shape (400,)")), ("classes", ("(400, classes)", "(400,)")),
    ("half", ("(400, classes)", "(7, 10)")), ("words", ("(400, classes)", "dict")), ("nothing", ("NoneType",)),
    ("image", ("(400, 1, 8, 8)",)), ("score", ("a single logit", "torch.cat([-s, s], dim=1)"))])
def test_other_outputs_are_refused_by_the_shape_found_and_the_shape_wanted(run, capsys, tmp_path, name, words):
    with pytest.raises(SystemExit) as stop:
        run(name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words), error


def test_a_masked_class_is_fine_and_never_answered(run):
    rows = run("masked")
    assert len(rows) == 3 and "3" not in {row["top"] for row in rows}


@pytest.mark.parametrize("name, count", [("all_nan", "50 of 50"), ("all_masked", "50 of 50"), ("one_infinite", "1 of 50")])
def test_no_certificate_rests_on_logits_that_are_none(run, capsys, tmp_path, name, count):
    with pytest.raises(SystemExit) as stop:
        run(name)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert f"image 0: {count}" in error and "fp32" in error
    written = "".join(part.read_text() for part in (tmp_path / name).glob("*.tsv*"))
    assert written == ""


def test_nan_is_found_in_the_image_where_it_is():
    """The third of three pooled images has pixels at which f breaks; counts of the others are untouched by that."""
    def f(x):
        return torch.where(x.mean(dim=(1, 2, 3))[:, None] > 0.8, float("nan"), x.flatten(1)[:, :3])

    images = [(i, torch.full((1, 2, 2), value)) for i, value in ((11, 0.0), (12, 0.1), (13, 1.0))]
    with pytest.raises(c.RunError, match="image 13: 100 of 100"):
        list(certify_all(f, images, GaussianNoise(0.01), 100, FixedN(200, 0.05), batch=400))
    with pytest.raises(c.RunError, match="image 13: 100 of 100"):
        certify(f, images[2][1], 0.01, n=200, alpha=0.05, index=13)
    for batch in (50, 100, 400):                                       # copies that fill up the last batch do not matter
        assert len(list(certify_all(f, images[:2], GaussianNoise(0.01), 100, FixedN(130, 0.05), batch=batch))) == 2


def test_an_error_in_the_users_function_keeps_its_traceback_and_names_the_image(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("broken")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "Traceback" in error and "KeyError: 'no such layer'" in error
    last = error.splitlines()[-1]
    assert last.startswith("certify.py: error: ") and "mine.py:broken failed: KeyError" in last and "image 0" in last


def test_ties_go_to_the_first_class(run):
    assert {row["top"] for row in run("constant")} == {"0"}
    tie = lambda x: torch.tensor([[0.0, 2.0, 2.0]]).expand(len(x), 3)
    assert certify(tie, torch.zeros(1, 2, 2), 0.5, n=100)[0] == 1
    assert count_classes(tie, [(torch.zeros(1, 2, 2), generator_for(0, 0, 1, CPU), 60)], GaussianNoise(0.5)).tolist() == [[0, 60, 0]]


# -- What certify() and predict() are given ------------------------------------------------------------------------------


def linear(x):
    return x.flatten(1).float() @ torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.0, 0.5], [-1.0, 1.0]]).to(x.device)


@pytest.mark.parametrize("x, words", [
    (torch.rand(1, 2, 2) * 255, "255"), (torch.rand(2, 1, 2, 2), r"\(2, 1, 2, 2\)"), (torch.rand(2, 2), r"\(2, 2\)"),
    (torch.zeros(1, 2, 2, dtype=torch.uint8), "uint8"), (torch.full((1, 2, 2), float("nan")), "not finite"), (np.zeros((1, 2, 2)), "ndarray"), (torch.zeros(1, 2, 2).long(), "int64")])
@pytest.mark.parametrize("function", [certify, predict])
def test_what_is_no_image_in_0_1_is_refused_in_a_sentence(function, x, words):
    with pytest.raises(ValueError, match=words) as error:
        function(linear, x, 0.5, n=100)
    assert "\n" not in str(error.value)


def test_another_range_of_pixels_can_be_asked_for():
    x = torch.tensor([[[255.0, 10.0], [20.0, 30.0]]])
    prediction, radius = certify(linear, x, 30.0, n=1000, any_range=True)
    assert prediction == 0 and radius > 30
    assert certify(linear, x / 255 - 0.5, 0.1, n=100)[0] == 0          # below zero: no picture of 0..255


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_get_noise_of_full_precision(dtype):
    x, seen = torch.rand(1, 2, 2).to(dtype), []

    def watch(copies):
        seen.append(copies)
        return linear(copies)

    count_under_noise(watch, x, 0.5, 100, generator_for(0, 7, 1, CPU))
    exact = x.float() + 0.5 * torch.randn(100, 1, 2, 2, generator=generator_for(0, 7, 1, CPU))
    assert torch.equal(seen[0], exact.to(dtype)) and seen[0].dtype == dtype
    count_classes(watch, [(x, generator_for(0, 7, 1, CPU), 100)], GaussianNoise(0.5))
    assert torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("function", [certify, predict])
def test_a_single_logit_is_refused(function):
    """A binary classifier's score: its argmax would be class 0 for every image, with the largest radius there is."""
    with pytest.raises(ValueError, match="single logit"):
        function(lambda x: x.flatten(1)[:, :1], torch.zeros(1, 2, 2), 0.5, n=100)


def test_seeds_that_would_share_a_stream_are_refused(capsys, tmp_path):
    """2^32 + s and s would be one seed of a 32-bit generator."""
    for seed in (2**32, -1):
        with pytest.raises(ValueError, match="seed"):
            generator_for(seed, 0, 0, CPU)
    for stage, more in ((pretrain, []), (finetune, ["--sigma", "1", "--init", "scratch"]), (c, ["--sigma", "1"])):
        with pytest.raises(SystemExit) as stop:
            stage.main([*more, "--seed", str(2**32), "--out", str(tmp_path / "run")])
        assert stop.value.code == 2 and "--seed" in capsys.readouterr().err


def test_an_index_of_its_own_gives_an_image_its_own_noise():
    seen = []
    watch = lambda copies: seen.append(copies) or linear(copies)
    for index in (0, 0, 1):
        certify(watch, torch.zeros(1, 2, 2), 0.5, n0=100, n=100, index=index)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[4])


def test_fine_tunings_evaluation_refuses_logits_that_are_none():
    images = finetune.open_images("digits", None, False, 8, 1)
    vit = build_vit("vit_digits", 10)
    with torch.no_grad():
        vit.head.bias[2] = float("nan")
    with pytest.raises(finetune.RunError, match="40 images or copies got NaN.*fp32"):
        finetune.evaluate(vit, images, torch.arange(20), 0.25, 0, 10, 0, 0, 1, CPU)


def test_another_network_from_the_same_file_is_another_classifier(monkeypatch, tmp_path, capsys):
    """The file is the same; what it reads, by an environment variable for instance, is not."""
    file = tmp_path / "mine.py"
    file.write_text("import os\nimport torch\ntorch.manual_seed(int(os.environ['WHICH']))\n"
                    "f = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n")
    line = ["--sigma", "0.25", "--classifier", f"{file}:f", "--n", "100", "--n0", "10", "--max", "2", "--device", "cpu",
            "--out", str(tmp_path)]
    monkeypatch.setenv("WHICH", "1")
    c.main(line)
    c.main(line)
    assert "is done" in capsys.readouterr().out
    monkeypatch.setenv("WHICH", "2")
    with pytest.raises(SystemExit):
        c.main(line)
    assert "other settings (weights_sha256" in capsys.readouterr().err
