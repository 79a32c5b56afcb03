"""What each of two processes does for test_processes.py: `python tests/two_processes.py FOLDER`.

The variables that `accelerate launch` sets say which one it is. Without them it is alone and does all of it.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

from helpers import CPU, make

from vitad import data, methods, training
from vitad.processes import Processes
from vitad.runs import score
from vitad.training import train

# Ten steps of each phase, the last of an epoch with another number of images: 12 are 8 and 4, or 10 and 2; the 9 of
# anovit are 8 and 1, and 3 are held out. Adam makes much of rounding, and so does the shrinking of the memory, which
# jumps: one process that sees the rows of a batch in another order is as far from itself. Hence the small steps.
TRAININGS = {
    "mala": ("mala", {"stage1_batch_size": 8, "batch_size": 10, "stage1_epochs": 5, "epochs": 5}),
    "mala in parts": ("mala", {"stage1_batch_size": 8, "micro_batch": 3, "stage1_epochs": 5, "pipeline": "recon"}),
    "vitmem": ("vitmem", {"batch_size": 10, "epochs": 5, "lr": 1e-6, "shrink": 0.0}),
    "ssltok": ("ssltok", {"batch_size": 8, "epochs": 5, "lr": 1e-5}),
    "anovit": ("anovit", {"batch_size": 8, "epochs": 5, "lr": 1e-5, "val_fraction": 0.25, "decoder_norm": "batch"}),
}


def main(folder):
    """Train, score, and write what came of it to `NUMBER-RANK.json`."""
    processes = Processes.join(CPU)
    images = data.load("toy", folder / "toy", "gear", image_size=32)
    found = {}
    for name, (method, overrides) in TRAININGS.items():
        model = make(methods.get(method), "random", image_size=32, **overrides)
        model.prepare(images.train, CPU)
        with steps_of() as steps:
            history = train(model, images.train, 0, CPU, amp=False, processes=processes)
        maps, scores = score(model, images.test, CPU, 3, False, processes)
        found[name] = {
            "steps": [step.tolist() for step in steps],
            "val": [row["val"] for row in history if "val" in row],
            "norms": [float(t.double().norm()) for t in model.state_dict().values()],
            "maps": maps.tolist(),
            "scores": scores.tolist(),
        }
    (folder / f"{processes.number}-{processes.rank}.json").write_text(json.dumps(found))


@contextmanager
def steps_of():
    """The losses of each step that is trained within."""
    steps, check = [], training._check_finite
    training._check_finite = lambda progress, *rest: steps.extend(progress.losses) or check(progress, *rest)
    try:
        yield steps
    finally:
        training._check_finite = check


if __name__ == "__main__":
    main(Path(sys.argv[1]))
