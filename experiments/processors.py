"""Make the book's own runs again under other arithmetic: how far may one more run lie from those in `results/`?

    python experiments/processors.py [anovit vitmem mala ssltok]     # or: make processors ONLY="anovit"

The four methods that a chapter trains, as the chapter does: preset `demo` on `toy`, seeds 0 to 2, on one thread. Each
is run with all vector instructions of the processor, with AVX2, and with none, since other instructions add in another
order. The records go to `results/processors/METHOD-CAPABILITY-sSEED`. `vitad.evidence.expected` counts them. A run that
is there is kept. Delete the folders of a method when its training changes, even if only its random numbers do.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from vitad.runs import Request
from vitad.runs.record import PROCESSORS, results_folder

METHODS = ("anovit", "vitmem", "mala", "ssltok")
CAPABILITIES = (None, "avx2", "default")  # None: the best that this processor has
SEEDS = range(3)


def environment(capability: str | None) -> dict[str, str]:
    """Variables of a process that computes with this capability on one thread."""
    plain = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    return plain | {"OMP_NUM_THREADS": "1"} | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})


def name_of(capability: str | None) -> str:
    """What torch calls it in the records, in lower case."""
    ask = "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"
    command = [sys.executable, "-c", ask]
    return subprocess.check_output(command, env=environment(capability), text=True).strip()


def make(request: Request, capability: str | None, folder: Path) -> None:
    """Run `request` with a capability, and keep its record and scores in `folder`."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", *request.command(temporary), "--device", "cpu"]
        subprocess.run(command, env=environment(capability), stdout=subprocess.DEVNULL, check=True)
        folder.mkdir(parents=True)
        for name in ("scores.csv", "record.json"):
            shutil.copy(Path(temporary) / name, folder)


def main(methods: list[str]) -> None:
    todo = []
    for capability in CAPABILITIES:
        label = name_of(capability)
        for method in methods or METHODS:
            for seed in SEEDS:
                folder = results_folder() / PROCESSORS / f"{method}-{label}-s{seed}"
                if not folder.exists():
                    todo.append((Request(method, seed=seed), capability, folder))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(make, *zip(*todo, strict=True)) if todo else ()
        for _ in tqdm(made, total=len(todo), unit="run"):
            pass


if __name__ == "__main__":
    main(sys.argv[1:])
