"""Two machines: two torchrun agents that meet at an address, here both on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import read_checkpoint

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_agents(script, *arguments):
    """The outputs of both agents, each with one process of the script, which must end well."""
    flags = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-id=test", "--rdzv-backend=c10d",
             f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    line = [sys.executable, "-m", "torch.distributed.run", *flags, script, *arguments]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    jobs = [subprocess.Popen([str(part) for part in line], **how) for _ in range(2)]
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    return outputs


def same_weights(a, b):
    a, b = (read_checkpoint(path)["model"] for path in (a, b))
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_two_agents_train_and_certify_as_one_job(tiny_run, tmp_path, torchrun):
    """One agent with two processes has the same ranks, so the same bits; certification: rows."""
    short = ["--epochs", "3", "--device", "cpu", "--out"]
    outputs = two_agents(ROOT / "pretrain.py", *short, tmp_path / "two")
    assert sum("2 x cpu" in output for output in outputs) == 1                # rank 0 alone talks
    one = torchrun(2, ROOT / "pretrain.py", *short, tmp_path / "one")
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    assert same_weights(tmp_path / "two" / "pretrain.pt", tmp_path / "one" / "pretrain.pt")

    argv = ["--sigma", "0.25", "--checkpoint", tiny_run / "finetune_sigma_0.25.pt", "--N", "300",
            "--limit", "9", "--device", "cpu", "--out"]
    two_agents(ROOT / "certify.py", *argv, tmp_path / "two")
    line = [sys.executable, ROOT / "certify.py", *argv, tmp_path / "one"]
    subprocess.run([str(part) for part in line], check=True, env=ENVIRONMENT)
    rows = []
    for name in ("two", "one"):
        lines = (tmp_path / name / "certify_sigma_0.25.tsv").read_text().splitlines()
        rows.append([line.split("\t")[:5] + line.split("\t")[6:] for line in lines])
    assert rows[0] == rows[1] and len(rows[0]) == 10
    assert not list((tmp_path / "two").glob("*.part*"))


@pytest.mark.slow
def test_one_agent_continues_what_two_began(tmp_path, torchrun):
    """The same number of processes gives the same bits."""
    argv = ["--epochs", "3", "--save-every", "1", "--device", "cpu", "--out"]

    def on_one_agent(out):
        job = torchrun(2, ROOT / "pretrain.py", *argv, tmp_path / out)
        output, _ = job.communicate(timeout=300)
        assert job.returncode == 0, output
        return output

    on_one_agent("whole")
    worker = tmp_path / "worker.py"
    worker.write_text("""
import sys
import pretrain
rate = pretrain.learning_rate
def learning_rate(step, *rest):
    if step == 17:                                   # in the second epoch of ten steps
        sys.exit(0)                                  # both nodes are switched off at one moment
    return rate(step, *rest)
pretrain.learning_rate = learning_rate
pretrain.main(sys.argv[1:])
""")
    two_agents(worker, *argv, tmp_path / "cut")
    assert read_checkpoint(tmp_path / "cut" / "pretrain.last.pt")["epoch"] == 1
    assert "after epoch 1" in on_one_agent("cut")
    assert same_weights(tmp_path / "cut" / "pretrain.pt", tmp_path / "whole" / "pretrain.pt")
