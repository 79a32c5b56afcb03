"""Sweeps for real: killed, resumed, with a run that fails and a setting that changes; GPUs and Slurm as far as goes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from vitad import methods, runs
from vitad.errors import UserError
from vitad.papers.tables import Reproduction, combinations
from vitad.runs import Request, by_hash

ROOT = Path(__file__).parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--cores", "2"]
pytestmark = pytest.mark.timeout(900)  # several runs, on machines that do other things beside
THAT_FAILS = {"method": "l2cae", "category": "weave", "seed": 1}


def sweep(folder, *words, **options):
    """The command, in `folder`; its output as text."""
    words = [*SNAKEMAKE, *words]
    return subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def finished(folder):
    """{name of a run: time and inode of its record}, which any other record would not have."""
    found = {p.parent.name: p.stat() for p in (folder / "runs").glob("*/record.json")}
    return {name: (s.st_mtime_ns, s.st_ino) for name, s in found.items()}


def written(folder, toy_root, lr):
    """A file with five runs; one of them, alone in its block, has its own learning rate."""
    common = {"dataset": "toy", "preset": "smoke"}
    blocks = [
        {"method": ["patchknn", "l2cae"], "category": "gear", "seed": [0, 1]},
        THAT_FAILS | {"overrides": {"lr": lr}},
    ]
    blocks = [common | b for b in blocks]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"data_root": str(toy_root), "runs": blocks}))
    names = [r.folder for r in combinations(blocks)]
    return names[:-1], names[-1]


@pytest.fixture(scope="module")
def killed(toy_root, tmp_path_factory):
    """(folder, names of the runs that can be made, name of the one that fails, what was finished at the kill)"""
    folder = tmp_path_factory.mktemp("sweep")
    good, bad = written(folder, toy_root, lr=1e30)
    words = [*SNAKEMAKE, "--configfile", "sweep.yaml"]
    with open(folder / "first.log", "w") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        patience = time.monotonic() + 200
        while not finished(folder) and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (folder / "first.log").read_text()
    return folder, good, bad, finished(folder)


@pytest.fixture(scope="module")
def resumed(killed):
    """The same command again."""
    return sweep(killed[0], "--configfile", "sweep.yaml")


def test_after_kill_9_the_same_command_makes_the_rest_and_only_that(killed, resumed):
    folder, good, bad, before = killed
    assert 1 <= len(before) < len(good)
    after = finished(folder)
    assert sorted(after) == sorted(good)
    assert {name: after[name] for name in before} == before
    assert f"{len(good) + 1 - len(before)} of {len(good) + 1} runs to go" in resumed.stdout


def test_a_failing_run_is_reported_with_its_log_and_stops_no_other(killed, resumed):
    folder, good, bad, _ = killed
    assert resumed.returncode == 1 and not (folder / "runs" / bad / "record.json").exists()
    end = resumed.stdout[resumed.stdout.rindex("failed: 1.") :]
    assert f"{bad}, log runs/.log/{bad}.log:" in end and "vitad: error: the loss is not finite" in end
    assert "the loss is not finite" in (folder / "runs" / ".log" / f"{bad}.log").read_text()
    assert not any(name in end for name in good)


def test_the_time_that_is_left_is_said(resumed):
    assert re.search("[23] runs to go, about 0:00:", resumed.stdout)  # not each number, since two may end together


@pytest.mark.parametrize("method", ["patchknn", "l2cae"])
def test_a_run_of_a_sweep_equals_a_single_one(method, killed, resumed, toy_root, tmp_path):
    asked = Request(method, "toy", "gear", preset="smoke", seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each run of the sweep has
    try:
        single = runs.run(method, data_root=toy_root, category="gear", preset="smoke", seed=1, out=tmp_path / "single")
    finally:
        torch.set_num_threads(threads)
    folder = killed[0] / "runs" / asked.folder
    record = runs.read_record(folder)
    differ = {key for key in single if single[key] != record[key]}
    assert differ <= {"timings", "finished", "git"}  # somebody may commit meanwhile
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "single").iterdir()}
    assert (runs.read_maps(folder)["maps"] == runs.read_maps(tmp_path / "single")["maps"]).all()


def test_a_changed_setting_runs_what_depends_on_it_and_nothing_else(killed, resumed, toy_root):
    folder, good, bad, _ = killed
    before = finished(folder)
    _, mended = written(folder, toy_root, lr=1e-3)
    done = sweep(folder, "--configfile", "sweep.yaml")
    assert done.returncode == 0, done.stdout
    after = finished(folder)
    assert set(after) - set(before) == {mended} and {name: after[name] for name in before} == before
    assert runs.read_record(folder / "runs" / mended)["overrides"] == {"lr": 1e-3}

    began = time.monotonic()
    again = sweep(folder, "--configfile", "sweep.yaml")
    seconds = time.monotonic() - began
    assert again.returncode == 0 and "Nothing to be done" in again.stdout
    assert finished(folder) == after
    assert seconds < 15  # 1.3 on two idle cores; the bound is for busy ones


def test_another_default_is_another_folder(monkeypatch):
    """In the library as in the file: of that preset, and of nothing else."""
    before = [Request("l2cae", "toy", preset=p) for p in ("smoke", "demo")]
    names = [(r.name, r.folder) for r in before]
    monkeypatch.setitem(methods.get("l2cae").PRESETS["smoke"], "latent", 17)
    after = [Request("l2cae", "toy", preset=p) for p in ("smoke", "demo")]
    assert (after[0].name, after[1].name, after[1].folder) == (names[0][0], *names[1])
    assert after[0].folder != names[0][1]


# --- what is asked for ------------------------------------------------------------------------------------


def test_combinations_of_lists():
    found = combinations(
        [
            {"method": ["vitmem", "l2cae"], "dataset": "btad", "category": "each", "preset": "paper", "seed": [0, 1]},
            {"method": "vitmem", "dataset": "btad", "category": [1, "03"], "preset": "paper"},
            {"method": "vitmem", "dataset": "toy", "overrides": [{}, {"memory": False}]},
        ]
    )
    assert len(found) == 2 * 3 * 2 + 2  # the second block's are among them
    assert {r.category for r in found[:12]} == {"01", "02", "03"} and {r.seed for r in found} == {0, 1}
    assert [r.overrides for r in found[-2:]] == [{}, {"memory": False}]


@pytest.mark.parametrize(
    "blocks, said",
    [
        ({"method": "l2cae"}, "have to be a list"),
        ([{"methods": "l2cae"}], "unknown field of a run 'methods'. Did you mean 'method'"),
        ([{"method": "l2cae"}], "need a method and a dataset"),
        ([{"method": "l2cae", "dataset": "toy", "overrides": "lrr=3"}], "unknown setting 'lrr'"),
        ([{"method": "l2cae", "dataset": "toy", "overrides": 3}], "Write them as {key: value}"),
        ([{"method": "l2cae", "dataset": "toy", "overrides": {"lrr": 3}}], "unknown setting 'lrr'"),
        ([{"method": "l2cae", "dataset": "tory"}], "unknown dataset 'tory'"),
    ],
)
def test_mistakes_in_the_file_are_said_at_once(blocks, said):
    with pytest.raises(UserError, match=said):
        combinations(blocks)


def test_a_mistake_on_the_command_line_is_said_before_anything_runs(tmp_path):
    done = sweep(tmp_path, "--config", "table=yang2024-6", "presets=demo")
    assert done.returncode and "unknown key of the configuration 'presets'. Did you mean 'preset'?" in done.stdout
    assert not (tmp_path / "runs").exists()


# --- GPUs, Slurm ------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
began = time.monotonic()
time.sleep(0.3)
os.makedirs(sys.argv[1])
print(os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic())
"""


def job(folder, name, gpus, *command, **environment):
    words = [sys.executable, ROOT / "workflow" / "job.py", str(gpus), folder / "aside" / name, folder / name, *command]
    environment = os.environ | {"TMPDIR": str(folder)} | environment
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("visible, names", [("", {"0", "1"}), ("4,GPU-7,2", {"4", "GPU-7"})])
def test_each_run_has_a_gpu_of_its_own(visible, names, tmp_path):
    """Five at a time on two GPUs: never two on the same."""
    jobs = []
    for i in range(5):
        command = [sys.executable, "-c", WORKER, tmp_path / "aside" / f"run{i}"]
        jobs.append(job(tmp_path, f"run{i}", 2, *command, CUDA_VISIBLE_DEVICES=visible))
    spans = {}
    for i, process in enumerate(jobs):
        device, began, ended = process.communicate()[0].split()
        assert process.returncode == 0 and (tmp_path / f"run{i}").is_dir()
        spans.setdefault(device, []).append((float(began), float(ended)))
    assert spans.keys() == names
    for ones in map(sorted, spans.values()):
        assert all(a[1] <= b[0] for a, b in zip(ones, ones[1:], strict=False))


def test_a_run_that_a_killed_sweep_left_behind_is_waited_for(tmp_path):
    """Only the job is killed, as by a scheduler; its command goes on and keeps the folder to itself."""
    script = "import sys, time; time.sleep(1); open(sys.argv[1], 'a').write('once\\n')"
    command = [sys.executable, "-c", script, tmp_path / "told"]
    first = job(tmp_path, "run", 0, *command)
    time.sleep(0.5)
    first.kill()
    (tmp_path / "aside" / "run").mkdir()
    began = time.monotonic()
    second = job(tmp_path, "run", 0, "test", "-e", tmp_path / "told")
    assert second.wait() == 0 and time.monotonic() - began > 0.2
    assert (tmp_path / "run").is_dir() and (tmp_path / "told").read_text() == "once\n"


def test_a_run_that_was_cut_off_in_its_final_folder_goes_on(tmp_path):
    """As `vitad table --run` leaves it."""
    (tmp_path / "run" / ".run").mkdir(parents=True)
    assert job(tmp_path, "run", 0, "test", "-d", tmp_path / "aside" / "run" / ".run").wait() == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".run"]


def test_slurm_gets_the_commands_of_the_runs_that_are_missing(tmp_path):
    """Dry runs of a table on toy, of which results/ has ten seeds; Slurm gives out GPUs itself."""
    asked = Reproduction("yang2024-6", dataset="toy", seeds=11).requests
    missing = [r for r in asked if r.hash not in by_hash()]
    assert 0 < len(missing) < len(asked)
    words = ["--dry-run", "--printshellcmds", "--config", "table=yang2024-6", "dataset=toy", "seeds=11"]
    done = sweep(tmp_path, "--profile", ROOT / "workflow" / "profiles" / "slurm", "--executor", "slurm", *words)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("job.py 0 runs/.unfinished/") == len(missing)
    lines = [line.partition(": ")[2].split() for line in done.stdout.splitlines() if ": vitad run " in line]
    expected = [r.command(f"runs/.unfinished/{r.folder}") for r in missing]
    assert sorted(lines) == sorted(expected)
    (plan,) = (tmp_path / "runs" / ".plan").iterdir()
    assert json.loads(plan.read_text())["committed"] == len(asked) - len(missing)
    assert sweep(tmp_path, "--resources", "gpu=2", *words).stdout.count("job.py 2 runs/.unfinished/") == len(missing)
