"""What f may be, and what certify() may be given: taken, or refused in one line."""

import csv
import hashlib
import math
import os
import re
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_certify import ROOT, noisy_copies

import certify as c
import finetune
import pretrain
from certify import (
    ABSTAIN,
    certify,
    certify_all,
    check_function,
    count_under_noise,
    generator_for,
    main,
    predict,
)

CPU = torch.device("cpu")
NAME = "certify_sigma_0.25"
MINE = """
import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

def make(*layers):
    torch.manual_seed(2)
    layers = layers or (torch.nn.Dropout(0.5),)
    return torch.nn.Sequential(torch.nn.Flatten(), *layers, torch.nn.Linear(64, 10))

# One network in many dresses: all give the same logits.
net = make()
evaluated = make().eval()
plain = lambda x: evaluated(x)
pair = lambda x: (plain(x), "attention")
listed = lambda x: [plain(x)]
partial = functools.partial(plain)

@dataclass
class Output:
    logits: torch.Tensor

thing = lambda x: Output(plain(x))

class Holder:
    def __init__(self):
        self.inner = make()
    def eval(self):
        self.inner.eval()
    def __call__(self, x):
        return self.inner(x)

class OddEval:
    def eval(self, expression):
        raise KeyError(expression)
    def __call__(self, x):
        return plain(x)

holder, odd_eval = Holder(), OddEval()

@functools.cache
def opened():
    return make().eval()
cached = lambda x: opened()(x)

def by_a_gradient(x):
    # The logits are the gradient of sum(s . logits) with respect to s: a purifier's kind of work.
    with torch.enable_grad():
        s = torch.ones(len(x), 10, requires_grad=True)
        moved = x.requires_grad_()
        assert torch.autograd.grad(plain(moved).sum(), moved)[0].abs().sum() > 0
        return torch.autograd.grad((s * plain(x.detach())).sum(), s)[0]

# Other functions.
masked = lambda x: plain(x).index_fill(1, torch.tensor([8]), -float("inf"))
constant = lambda x: torch.zeros(len(x), 10)

# No functions of one image.
def closed(network):
    return lambda x: network(x)
in_a_closure = closed(make())
in_a_list = lambda x, networks=[make()]: networks[0](x)
batch_norm = make(torch.nn.BatchNorm1d(64, track_running_stats=False))
batch_norm_in_a_closure = closed(make(torch.nn.BatchNorm1d(64)))
batch_statistics = lambda x: plain(x - x.mean(0))
always_dropout = lambda x: plain(F.dropout(x, 0.1, training=True))
neighbours = lambda x: plain(x) + 0.05 * plain(x.flip(0))
sees_black = lambda x: plain(x) * (1 + (x.flatten(1).amax(1).amin() <= 0))
sees_no_noise = lambda x: plain(x) * (1 + (x.flatten(1).amin(1).amax() > 0))
calls = []
def another_at_the_second_call(x):
    calls.append(1)
    return plain(x) if len(calls) == 1 else plain(x).flip(1)

# No logits.
vector = lambda x: plain(x)[:, 0]
classes = lambda x: plain(x).argmax(1)
half = lambda x: plain(x)[:7]
mapping = lambda x: {"logits": plain(x)}
nothing = lambda x: None
array = lambda x: plain(x).detach().numpy()
empty = lambda x: ()
image = lambda x: x
spatial = lambda x: plain(x)[:, :, None, None]
score = lambda x: plain(x)[:, :1]
seven = lambda x: plain(x)[:, :7]

# Logits that are none.
all_nan = lambda x: plain(x) * float("nan")
all_masked = lambda x: plain(x) * 0 - float("inf")
def one_infinite(x):
    logits = plain(x).clone()
    logits[5, 2] = float("inf")
    return logits

not_callable = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MINE)
    return path


def flags(place, out, *more):
    return ["--sigma", "0.25", "--classifier", str(place), "--device", "cpu", "--skip", "120",
            "--n", "300", "--n0", "50", "--alpha", "0.05", "--out", str(out), *map(str, more)]


def rows(out):
    """Of a finished run, without the time."""
    with (out / f"{NAME}.tsv").open() as file:
        found = [*csv.DictReader(file, delimiter="\t")]
    return [{key: value for key, value in row.items() if key != "time"} for row in found]


@pytest.fixture
def run(file, tmp_path):
    """run(name) -> rows of a small run with that function of MINE."""

    def call(name, *more):
        main(flags(f"{file}:{name}", tmp_path / name, *more))
        return rows(tmp_path / name)

    return call


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(arguments) -> the one line of a run that ends with that status and leaves no row."""

    def call(arguments, status=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == status and error.count("\n") == 1, error
        assert error.startswith("certify.py: error: ")
        assert "".join(part.read_text() for part in tmp_path.rglob("*.tsv*")) == ""
        return error

    return call


def alone(*arguments, **more):
    """certify.py as a command of its own: the finished process, its output as text."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.run([sys.executable, ROOT / "certify.py", *map(str, arguments)],
                          capture_output=True, text=True, env=environment)


# -- A function of one noisy image -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["net", "holder", "odd_eval", "cached", "by_a_gradient"])
def test_a_function_is_certified_as_the_interface_does(run, name):
    """A module, and whatever has an eval() that works, is put into eval mode."""
    names = {}
    exec(MINE, names)
    digits = load_digits()
    for row in run(name):
        i = int(row["idx"])
        x = torch.tensor(digits.images[1437 + i] / 16, dtype=torch.float32)[None]
        how = dict(n0=50, n=300, alpha=0.05, index=i, batch=400)
        prediction, radius = certify(names["plain"], x, 0.25, **how)
        assert (row["predict"], row["radius"]) == (str(prediction), f"{radius:.6f}")


@pytest.mark.parametrize("name", ["pair", "listed", "thing", "partial"])
def test_logits_are_found_in_what_networks_return(run, name):
    assert run(name) == run("plain")


@pytest.mark.parametrize("name", [
    "in_a_closure", "in_a_list", "batch_norm", "batch_norm_in_a_closure", "batch_statistics",
    "always_dropout", "neighbours", "sees_black", "sees_no_noise", "another_at_the_second_call"])
def test_what_depends_on_the_rest_of_the_batch_or_on_chance_is_refused(
        file, tmp_path, refused, name):
    error = refused(flags(f"{file}:{name}", tmp_path / "run"))
    assert "no function of one image" in error and "eval mode" in error
    assert not (tmp_path / "run").exists()


def checked(f, batch, dtype="fp32"):
    x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(4))
    return check_function(f, x, 0.25, batch, generator_for(0, 0, 3, CPU), dtype)


@pytest.mark.parametrize("batch", [1, 2, 25, 400])
def test_a_function_of_one_image_passes_in_any_batch(tiny_vit, batch):
    vit = tiny_vit()
    copies = torch.randn(batch, 1, 8, 8, generator=generator_for(0, 0, 3, CPU)) * 0.25
    x = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(checked(vit, batch), vit(x + copies))             # its fingerprint
    if batch > 1:
        with pytest.raises(ValueError, match="no function of one image"):
            checked(lambda z: vit(z - 0.5 * z.mean(0)), batch)


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 0.002), ("bf16", 0.02)])
def test_answers_may_differ_by_rounding_next_to_their_spread(tiny_vit, dtype, most):
    vit, calls = tiny_vit(), []

    def shaky(share):
        def f(z):
            calls.append(1)
            logits = vit(z)
            if len(calls) % 3 != 2:
                return logits
            spread = logits[:50].max() - logits[:50].min()
            return logits + share * spread * torch.eye(len(z), logits.shape[1])
        return f

    checked(shaky(0.9 * most), 100, dtype)
    calls.clear()
    with pytest.raises(ValueError, match="images of the batch became black"):
        checked(shaky(1.1 * most), 100, dtype)


def test_ties_go_to_the_first_class(run):
    assert {row["top"] for row in run("constant")} == {"0"}
    tie, x = lambda x: torch.tensor([[0.0, 2.0, 2.0]]).expand(len(x), 3), torch.zeros(1, 2, 2)
    assert certify(tie, x, 0.5, n=100)[0] == 1
    counts = count_under_noise(tie, [(0, x, generator_for(0, 0, 1, CPU), 60)], 0.5)
    assert counts.tolist() == [[0, 60, 0]]


# -- Logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "words"), [
    ("vector", "Tensor (400,)"), ("classes", "Tensor (400,)"), ("half", "Tensor (7, 10)"),
    ("mapping", "dict"), ("nothing", "NoneType"), ("array", "ndarray (400, 10)"),
    ("empty", "tuple"), ("image", "Tensor (400, 1, 8, 8)"),
    ("spatial", "Tensor (400, 10, 1, 1)"), ("score", "torch.cat([-s, s], dim=1)")])
def test_what_is_no_logits_is_refused_with_what_it_is(file, tmp_path, refused, name, words):
    error = refused(flags(f"{file}:{name}", tmp_path / "run"))
    assert words in error and ("single logit" if name == "score" else "(400, classes)") in error
    names = {}
    exec(MINE, names)
    for call in (certify, predict):
        with pytest.raises(ValueError, match="single logit|shape .100, classes"):
            call(names[name], torch.zeros(1, 8, 8), 0.25, n=100)


def test_as_many_logits_as_classes_are_wanted_and_the_classes_printed(
        file, tmp_path, refused, make_folder, capsys):
    """A network of another data set certifies nothing here, whatever the labels are."""
    error = refused(flags(f"{file}:seven", tmp_path / "run"))
    assert "7 logits" in error and "10 classes" in error and "FILE.py:NAME" in error
    folder = make_folder(8, classes=3, train=1, test=1)
    for i in range(3):                                         # numbers are sorted as text
        (folder / f"val/class_{i}").rename(folder / f"val/{9 + i}")
    where = ["--dataset", "folder", "--data-path", folder, "--size", "8"]
    (tmp_path / "mine.py").write_text("f = lambda x: x.flatten(1)[:, :100]\n")
    error = refused(flags(f"{tmp_path}/mine.py:f", tmp_path / "run", *where))
    assert "100 logits" in error and "3 classes" in error
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine.py").write_text("f = lambda x: x.flatten(1)[:, :3]\n")
    capsys.readouterr()
    main(flags(f"{tmp_path}/mine.py:f", tmp_path / "run", *where, "--skip", "1"))
    assert "folder: classes 10, 11, 9\n" in capsys.readouterr().out
    assert [row["label"] for row in rows(tmp_path / "run")] == ["0", "1", "2"]


def test_a_masked_class_is_fine_and_never_answered(run):
    assert "8" in {row["top"] for row in run("plain", "--skip", "30")}
    found = run("masked", "--skip", "30")
    assert len(found) == 12 and "8" not in {row["top"] for row in found}


@pytest.mark.parametrize(("name", "words"), [
    ("all_nan", "50 of 50"), ("all_masked", "50 of 50"), ("one_infinite", "1 of 50")])
def test_no_row_rests_on_logits_that_are_none(file, tmp_path, refused, name, words):
    error = refused(flags(f"{file}:{name}", tmp_path / "run"), status=1)
    assert f"image 0: {words}" in error and "NaN or infinite" in error and "fp32" in error


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_copy_without_an_answer_is_enough(bad):
    """Minus infinity, a masked class, is an answer like any other."""
    brightness = lambda x: torch.stack([x.mean((1, 2, 3)), 1 - x.mean((1, 2, 3))], dim=1)
    x, threshold = torch.full((1, 3, 3), 0.6), 0.95            # 9 pixels: sigma / 3 from 0.6

    def sometimes(x):
        logits = brightness(x)
        logits[x.mean((1, 2, 3)) > threshold, 1] = bad
        return logits

    request = 7, x, generator_for(0, 7, 2, CPU), 200
    if bad == -math.inf:
        assert predict(sometimes, x, 0.5, 200, index=7) == 0
        assert count_under_noise(sometimes, [request], 0.5).sum() == 200
        return
    copies = noisy_copies(x, generator_for(0, 7, 2, CPU), 200, 0.5)[:200]
    expected = int((copies.mean((1, 2, 3)) > threshold).sum())
    assert 0 < expected < 20
    message = f"image 7: {expected} of 200 noisy copies got NaN or infinite"
    with pytest.raises(FloatingPointError, match=message):
        predict(sometimes, x, 0.5, 200, index=7)
    dark = 8, torch.zeros(1, 3, 3), generator_for(0, 8, 2, CPU), 200
    with pytest.raises(FloatingPointError, match=message):
        count_under_noise(sometimes, [dark, request], 0.5)
    with pytest.raises(FloatingPointError, match="image 7"):
        certify(sometimes, x, 0.5, 200, 200, index=7)


def test_the_broken_image_is_named_and_copies_that_fill_a_batch_do_not_matter():
    def f(x):
        bright = x.mean(dim=(1, 2, 3))[:, None] > 0.8
        return torch.where(bright, math.nan, x.flatten(1)[:, :3])

    images = [(i, torch.full((1, 2, 2), value)) for i, value in ((11, 0.0), (12, 0.1), (13, 1.0))]
    with pytest.raises(FloatingPointError, match="image 13: 100 of 100"):
        list(certify_all(f, images, 0.01, 100, 200, 0.05, batch=400))
    for batch in (50, 100, 400):
        assert len(list(certify_all(f, images[:2], 0.01, 100, 130, 0.05, batch=batch))) == 2


# -- FILE.py:NAME is an import ---------------------------------------------------------------------


@pytest.mark.parametrize(("place", "words"), [
    ("none.py:f", "none.py:f: there is no"), ("mine.py", "mine.py: there is no"),
    (":f", "--classifier :f: there is no"),
    ("mine.py:", "no function ''"), ("mine.py:missing", "no function 'missing'"),
    ("mine.py:not_callable", "no function 'not_callable'"),
    ("mine.py:Holder", "no function 'Holder'")])
def test_a_name_that_is_no_function_is_refused(
        file, tmp_path, refused, monkeypatch, place, words):
    monkeypatch.chdir(file.parent)
    assert words in refused(flags(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_file_written_again_at_once_is_read_again(tmp_path):
    """Python's own cache of compiled files sees neither another time nor another size."""
    for value in (1, 2):
        source = f"def f(x):\n    return {value}\n"
        (tmp_path / "mine.py").write_text(source)
        f, found = c.open_plug(f"{tmp_path}/mine.py:f", "--classifier")
        assert f(0) == value and found == hashlib.sha256(source.encode()).hexdigest()


@pytest.mark.parametrize("source", ["import nothing_of_this_name", "raise ValueError('odd')",
                                    "open('/nowhere/weights.npy')", "def f(x:"])
def test_an_error_at_import_keeps_its_traceback_and_names_the_file(tmp_path, source):
    (tmp_path / "mine.py").write_text(f"\n{source}\n")
    with pytest.raises(RuntimeError, match=f"in the import of {tmp_path}/mine.py") as error:
        main(flags(f"{tmp_path}/mine.py:f", tmp_path / "run"))
    assert re.search("nothing_of|odd|nowhere|never closed", str(error.value.__cause__))
    assert not (tmp_path / "run").exists()


def test_a_traceback_ends_with_the_line_that_says_where_it_was(tmp_path):
    (tmp_path / "mine.py").write_text("\n1 / 0\n")
    job = alone(*flags(f"{tmp_path}/mine.py:f", tmp_path / "run"))
    *lines, last = job.stderr.splitlines()
    assert job.returncode == 1 and lines[0].startswith("Traceback")
    assert any("mine.py" in line and "line 2" in line for line in lines)
    assert "ZeroDivisionError: division by zero" in lines
    assert last == f"RuntimeError: in the import of {tmp_path}/mine.py (--classifier)"


@pytest.mark.parametrize("source", [
    "{}['no such layer']", "1 / 0", "raise ValueError('odd')", "raise OSError('no disk')"])
def test_an_error_inside_f_keeps_its_traceback_and_names_the_data_set(tmp_path, source):
    """Of a file that expects colour pictures, when --dataset was forgotten, for instance."""
    (tmp_path / "mine.py").write_text(f"def f(x):\n    {source}\n")
    with pytest.raises(RuntimeError) as error:
        main(flags(f"{tmp_path}/mine.py:f", tmp_path / "run"))
    assert str(error.value) == (                               # the last line of a traceback
        f"in {tmp_path}/mine.py:f, given images (400, 1, 8, 8) of --dataset digits")
    assert re.search("layer|zero|odd|disk", str(error.value.__cause__))
    deepest = traceback.extract_tb(error.value.__cause__.__traceback__)[-1]
    assert deepest.filename == f"{tmp_path}/mine.py"


def test_a_module_beside_the_file_is_found(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("CLASS = 4\n")
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom helper_of_mine import CLASS\n"
        "f = lambda x: torch.eye(10)[CLASS].expand(len(x), 10)\n")
    main(flags(f"{tmp_path}/mine.py:f", tmp_path))
    assert {row["top"] for row in rows(tmp_path)} == {"4"}


def test_the_users_own_modules_win_and_certify_is_the_one_that_runs(tmp_path):
    """A model.py beside the file, and a data class, which needs its module in sys.modules."""
    (tmp_path / "model.py").write_text("mine = 6\n")
    (tmp_path / "f.py").write_text("""
from __future__ import annotations
import dataclasses, sys
import torch
import model
from certify import RANK, refuse
assert sys.modules["certify"] is sys.modules["__main__"]

@dataclasses.dataclass
class Network:
    answer: int = model.mine
    def __call__(self, x):
        return torch.eye(10)[self.answer].expand(len(x), 10)

f = Network()
""")
    job = alone(*flags(f"{tmp_path}/f.py:f", tmp_path))
    assert job.returncode == 0, job.stderr
    assert {row["top"] for row in rows(tmp_path)} == {"6"}


OTHERS = """
from model import build_vit, load_encoder
vit = build_vit("vit_digits", 10)
missing, left_over = load_encoder(vit, "others.pt")
assert not missing and not left_over
"""


def test_others_fine_tuned_weights_are_certified_by_a_file_that_builds_the_network(
    tiny_run, tmp_path, monkeypatch, refused
):
    """What the refusal of `--checkpoint others.pt` says, done."""
    monkeypatch.chdir(tmp_path)
    own = torch.load(tiny_run / "finetune_sigma_0.25.pt", weights_only=True)
    torch.save({"model": own["model"], "epoch": 9}, "others.pt")
    (tmp_path / "theirs.py").write_text(OTHERS)
    how = ["--sigma", "0.25", "--skip", "120", "--n", "300", "--device", "cpu"]
    assert "a file for --classifier" in refused([*how, "--checkpoint", "others.pt"])
    main([*how, "--classifier", "theirs.py:vit", "--out", "theirs"])
    main([*how, "--checkpoint", str(tiny_run / "finetune_sigma_0.25.pt"), "--out", "own"])
    assert rows(tmp_path / "theirs") == rows(tmp_path / "own")


def test_a_file_may_refuse_in_one_line(tmp_path, refused):
    (tmp_path / "mine.py").write_text(
        "from certify import refuse\nrefuse('mine.py needs WEIGHTS=file')\n")
    assert "mine.py needs WEIGHTS=file" in refused(flags(f"{tmp_path}/mine.py:f", tmp_path))


# -- What certify() and predict() are given --------------------------------------------------------


def linear(x):
    weights = torch.tensor([[1.0, -1.0], [0.5, 0.0], [0.0, 0.5], [-1.0, 1.0]])
    return x.flatten(1).float() @ weights


@pytest.mark.parametrize(("x", "words"), [
    (torch.rand(2, 1, 2, 2), r"\(2, 1, 2, 2\)"), (torch.rand(2, 2), r"\(2, 2\)"),
    (torch.zeros(1, 2, 2, dtype=torch.uint8), "uint8"), (torch.zeros(1, 2, 2).long(), "int64"),
    (np.zeros((1, 2, 2)), "ndarray"), (torch.full((1, 2, 2), math.nan), "pixels from nan to nan"),
    (torch.rand(1, 2, 2) * 254 + 1, "255|2[0-9][0-9]|not in .0, 1."),
    (torch.tensor([[[0.0, 1.51]]]), "from 0 to 1.51"),
    (torch.tensor([[[-0.51, 1.0]]]), "from -0.51 to 1"),
    (torch.rand(1, 2, 2) * 255 - 128, "not in .0, 1."),
    (torch.tensor([[[-1.0, 1.0]]]), "from -1 to 1.*any_range=True")])
@pytest.mark.parametrize("function", [certify, predict])
def test_what_is_no_image_in_0_1_is_refused_in_a_sentence(function, x, words):
    with pytest.raises(ValueError, match=words) as error:
        function(linear, x, 0.5, n=100)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("function", [certify, predict])
@pytest.mark.parametrize("how", [
    dict(alpha=5), dict(alpha=1), dict(alpha=0), dict(alpha=-0.1), dict(alpha=math.nan),
    dict(sigma=0), dict(sigma=-1), dict(sigma=math.nan), dict(n=0), dict(n=-3)])
def test_numbers_that_mean_nothing_are_refused(function, how):
    """alpha = 5, meant as 5 %, once certified a fair coin, since a comparison with NaN is false."""
    with pytest.raises(ValueError, match="alpha between 0 and 1"):
        function(linear, torch.rand(1, 2, 2), **dict(sigma=0.5, n=100) | how)


@pytest.mark.parametrize("function", [certify, predict])
def test_a_network_in_training_mode_is_refused(function):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"training mode: call its eval\(\)"):
        function(network, torch.rand(1, 2, 2), 0.5, n=100)
    function(network.eval(), torch.rand(1, 2, 2), 0.5, n=100)


def test_images_in_other_units_are_taken_if_that_is_said():
    """Pixels and sigma 255 times as large: the same counts, and 255 times the radius."""
    x = torch.tensor([[[1.0, 0.0], [0.1, 0.2]]])
    prediction, radius = certify(linear, x, 0.5, 20, 200)
    scaled = lambda x: linear(x / 255)
    other, larger = certify(scaled, 255 * x, 127.5, 20, 200, any_range=True)
    assert other == prediction == 0 and larger == pytest.approx(255 * radius, rel=1e-4)
    normalised = (x - 0.9) / 0.2                               # negative, too
    assert predict(lambda x: linear(x * 0.2 + 0.9), normalised, 2.5, 200, any_range=True) == 0
    assert certify(linear, x * 1.5 - 0.5, 0.1, n=100)[0] != ABSTAIN          # a little outside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_get_the_noise_of_single_precision(dtype):
    x = torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(2)).to(dtype)
    seen = []

    def watch(copies):
        seen.append(copies.clone())
        return linear(copies)

    predict(watch, x, 0.5, 250)
    whole = noisy_copies(x.float(), generator_for(0, 0, 2, CPU), 250, 0.5).to(dtype)
    assert torch.equal(torch.cat(seen), whole) and seen[0].dtype == dtype


def test_seeds_that_would_share_a_stream_are_refused(capsys, tmp_path):
    """2^32 + s and s would be one seed of a 32-bit generator."""
    for seed in (2**32, -1):
        with pytest.raises(ValueError, match="seed"):
            generator_for(seed, 0, 0, CPU)
    for stage, more in ((pretrain, []), (finetune, ["--sigma", "1"]), (c, ["--sigma", "1"])):
        with pytest.raises(SystemExit) as stop:
            stage.main([*more, "--seed", str(2**32), "--out", str(tmp_path / "run")])
        assert stop.value.code == 2 and "--seed" in capsys.readouterr().err


def test_an_index_of_its_own_gives_an_image_its_own_noise():
    seen = []
    watch = lambda copies: seen.append(copies.clone()) or linear(copies)
    for index in (0, 0, 1):
        certify(watch, torch.zeros(1, 2, 2), 0.5, n0=100, n=100, index=index)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[4])
