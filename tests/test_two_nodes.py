"""Two machines, as README says it: two torchrun agents that meet at an address, here both on this machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import read_checkpoint

ROOT = Path(__file__).parents[1]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_agents(script, *arguments):
    """The outputs of both agents, each with one process of the script, which must end well."""
    port, jobs = free_port(), []
    for _ in range(2):
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=test",
                "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--", script, *arguments]
        jobs.append(subprocess.Popen([str(part) for part in line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                     env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT))
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    return outputs


def weights(path):
    return read_checkpoint(path)["model"]


@pytest.mark.slow
def test_two_agents_train_and_certify_as_one_job(tiny_run, tmp_path, torchrun):
    """Same command under one agent with two processes: same ranks, so the same bits; certification: the same rows."""
    short = ["--epochs", "3", "--device", "cpu", "--out"]
    outputs = two_agents("pretrain.py", *short, tmp_path / "two")
    assert sum("2 x cpu" in output for output in outputs) == 1         # rank 0 alone talks
    one = torchrun(2, ROOT / "pretrain.py", *short, tmp_path / "one")
    assert one.wait(300) == 0, one.communicate()
    a, b = (weights(tmp_path / name / "pretrain.pt") for name in ("two", "one"))
    assert all(torch.equal(a[key], b[key]) for key in a)

    argv = ["--sigma", "0.25", "--checkpoint", tiny_run / "finetune_sigma_0.25.pt", "--n", "300", "--skip", "40", "--device",
            "cpu", "--out"]
    two_agents("certify.py", *argv, tmp_path / "two")
    alone = subprocess.run([sys.executable, "certify.py", *map(str, argv), str(tmp_path / "one")], cwd=ROOT, text=True,
                           capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert alone.returncode == 0, alone.stderr
    rows = [[line.split("\t")[:5] + line.split("\t")[6:] for line in (tmp_path / name / "certify_sigma_0.25.tsv").open()]
            for name in ("two", "one")]
    assert rows[0] == rows[1] and len(rows[0]) == 10


@pytest.mark.slow
def test_one_agent_continues_what_two_began(tmp_path, torchrun):
    """The log's steps and the schedule go on; the same number of processes gives the same bits."""
    argv = ["--epochs", "3", "--save-every", "10", "--log-every", "5", "--device", "cpu", "--out"]
    one = torchrun(2, ROOT / "pretrain.py", *argv, tmp_path / "whole")
    assert one.wait(300) == 0, one.communicate()
    worker = tmp_path / "worker.py"
    worker.write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import pretrain
rate = pretrain.learning_rate
def learning_rate(step, *rest):
    if step == 17:
        sys.exit(0)                                                    # both nodes are switched off at one moment
    return rate(step, *rest)
pretrain.learning_rate = learning_rate
pretrain.main(sys.argv[1:])
""")
    two_agents(worker, *argv, tmp_path / "cut")
    assert read_checkpoint(tmp_path / "cut" / "pretrain.last.pt")["step"] == 10
    again = torchrun(2, ROOT / "pretrain.py", *argv, tmp_path / "cut")
    assert again.wait(300) == 0, again.communicate()
    a, b = (weights(tmp_path / name / "pretrain.pt") for name in ("cut", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    steps = [[json.loads(line)["step"] for line in (tmp_path / name / "pretrain.jsonl").open()] for name in ("cut", "whole")]
    assert steps[0] == steps[1]
