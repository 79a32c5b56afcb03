"""Two processes on the CPU train as one does: losses, weights, maps, a run that is killed, and what is refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import two_processes
from helpers import CPU, make
from torch import nn

from vitad import methods, runs
from vitad.cli import main
from vitad.errors import UserError
from vitad.processes import Processes, Share, drawn
from vitad.training import Phase

TESTS = Path(__file__).parent


def together(words, folder):
    """Two processes, each running Python with these words, connected as `accelerate launch` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    env = os.environ | where | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    started = []
    for rank in "01":
        with open(folder / f"log-{rank}", "w") as log:
            command = [sys.executable, *map(str, words)]
            started.append(subprocess.Popen(command, env=env | {"RANK": rank, "LOCAL_RANK": rank}, stderr=log))
    return started


# --- training and scoring -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory, make_toy):
    """What one process found, and what each of two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "toy").symlink_to(make_toy(("gear",), 12, 4, 2))
    both = together([TESTS / "two_processes.py", folder], folder)
    two_processes.main(folder)
    for process, rank in zip(both, "01", strict=True):
        assert process.wait(200) == 0, (folder / f"log-{rank}").read_text()
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", two_processes.TRAININGS)
def test_two_processes_train_and_score_as_one(name, found):
    """Random masks, damage, dropout, batch norm, the adversary, the validation: all are those of the whole batch."""
    one, first, second = (each[name] for each in found)
    assert first == second  # to the bit
    assert len(one["steps"]) == (20 if name == "mala" else 10)
    for x, y in zip(one["steps"], first["steps"], strict=True):
        assert x == pytest.approx(y, abs=1e-5)
    for what, tolerance in (("val", 1e-5), ("norms", 1e-3), ("maps", 1e-4), ("scores", 1e-5)):
        np.testing.assert_allclose(one[what], first[what], rtol=tolerance, atol=tolerance, err_msg=what)


@pytest.mark.parametrize("total", range(1, 10))
def test_shares_are_each_row_once(total):
    shares = [Processes(CPU, 3, rank).share_of(total) for rank in range(3)]
    assert sum(share.weight for share in shares) == pytest.approx(1)
    rows = [list(range(total))[share.rows] for share in shares]
    if total < 3:
        assert rows == [list(range(total))] * 3
    else:
        assert sum(rows, []) == list(range(total)) and max(map(len, rows)) - min(map(len, rows)) <= 1


def test_a_share_draws_for_the_whole_batch():
    def draw(n):
        return torch.rand(n, 2, generator=torch.Generator().manual_seed(0))

    whole = drawn({"image": torch.zeros(5)}, draw)
    assert torch.equal(whole, draw(5))
    assert torch.equal(drawn({"image": torch.zeros(2), "share": Share(3, 5, 5, 0.4)}, draw), whole[3:])


# --- a run ------------------------------------------------------------------------------------------------

OFTEN = """
import sys, vitad.training as training
training.SAVE_SECONDS, training.CHECK_STEPS = 0, 1
from vitad.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(900)  # four starts of Python, where others may use the processor
def test_a_killed_run_of_two_is_resumed_and_has_the_metrics_of_one(toy_root, tmp_path, capsys):
    """kill -9 of both, then `accelerate launch` of the same run; then the same by one process."""
    out, alone = tmp_path / "two", tmp_path / "one"
    command = ["run", "mala", "--data-root", str(toy_root), "--preset", "smoke"]
    command += ["--device", "cpu", "--set", "stage1_epochs=4", "--out", str(out)]  # more would magnify the rounding
    both = together(["-c", OFTEN, *command], tmp_path)
    state, patience = out / ".run" / "state.pt", time.monotonic() + 250
    while not state.exists() and both[0].poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    for process in both:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log-0").read_text()
    assert {p.name for p in out.iterdir()} == {".run"}
    at = torch.load(state, weights_only=True)["at"]
    assert at["phase"] == 0 and at["epoch"] < 4

    # The launcher of several GPUs, which needs none; with --cpu it starts one process.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path])}
    words = [*launcher, "--main_process_port", "0", "-m", "vitad", *command]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1  # one speaks
    assert not list(out.glob(".*"))
    command[-1] = str(alone)
    assert main(command) == 0
    two, one = runs.read_record(out), runs.read_record(alone)
    assert (two["environment"]["processes"], "processes" in one["environment"]) == (2, False)
    assert runs.hash_of(two) == runs.hash_of(one)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert two["counts"] == one["counts"]
    maps = [runs.read_maps(folder)["maps"] for folder in (out, alone)]
    np.testing.assert_allclose(*maps, atol=1e-4)
    assert {p.name for p in out.iterdir()} == {p.name for p in alone.iterdir()}


def test_one_process_does_without_accelerate(toy_root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    record = runs.run("l2cae", data_root=toy_root, preset="smoke", device="cpu", out=tmp_path / "run")
    assert "processes" not in record["environment"]


# --- what is refused --------------------------------------------------------------------------------------


def test_several_without_accelerate_say_what_to_install(toy_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "l2cae", "--data-root", str(toy_root), "--device", "cpu", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 processes were started, but accelerate is missing" in said
    assert "pip install vitad[multi]" in said and not (tmp_path / "run").exists()


def test_more_processes_than_gpus_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="torch sees 1. Start as many with --num_processes 1, or use --device cpu"):
        Processes.join(torch.device("cuda"))


def test_a_batch_that_cannot_be_shared_says_which_numbers_can():
    phases = [Phase("even", [], 1, 9, 0.1), Phase("odd", [], 1, 8, 0.1)]
    with pytest.raises(UserError, match="3 processes .* phase odd evenly: they hold 8 images. .* such as 1, 2, with"):
        Processes(CPU, 3).check(phases)
    Processes(CPU, 1).check(phases)


def test_damage_that_is_made_in_a_step_is_not_shared(gears):
    model = make(methods.get("ssltok"), "random", pool=0)
    model.prepare(gears.train, CPU)
    batch = gears.train.batch([0, 1]) | {"share": Share(0, 2, 4, 0.5)}
    with pytest.raises(UserError, match="with pool=0, is that of one process"):
        model.train().losses(batch)


# --- layers -----------------------------------------------------------------------------------------------


def test_layers_are_as_before_when_the_training_is_over(monkeypatch):
    """Also when it fails."""
    monkeypatch.setattr("vitad.processes.distributed.broadcast", lambda *_, **__: None)
    net = nn.Sequential(nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Dropout(0.0))
    with pytest.raises(ZeroDivisionError), Processes(CPU, 2).joined(net):
        assert ["forward" in vars(layer) for layer in net] == [True, True, False]
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in net)
