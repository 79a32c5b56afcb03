"""One run of a sweep: python job.py GPUS ASIDE FINAL COMMAND...

Runs the command, which writes to ASIDE and goes on there if it was killed before, and renames that folder to FINAL when
it ended well. Of the first GPUS of this machine it takes one that no other run has (0: a scheduler gives them out).
"""

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(gpus, aside, final, *command):
    aside, final, environment = Path(aside), Path(final), dict(os.environ)
    aside.parent.mkdir(parents=True, exist_ok=True)
    locks = [lock(aside.with_name(f"{aside.name}.lock"))]  # waits where a killed sweep has left this very run going
    if (final / "record.json").exists():
        return 0
    if final.is_dir() and any(final.iterdir()) and not aside.exists():
        os.replace(final, aside)  # that is where `vitad table --run` was cut off
    if int(gpus):
        environment["CUDA_VISIBLE_DEVICES"], held = free_gpu(int(gpus))
        locks.append(held)
    environment.setdefault("TQDM_MININTERVAL", "10")  # seconds, since bars go to a log
    status = subprocess.run(command, env=environment, pass_fds=locks).returncode
    if status == 0:
        os.replace(aside, final)
    return status


def free_gpu(count):
    """(name of a GPU as CUDA has it, its lock); waits until one of the first `count` is free."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = (visible.split(",") if visible else [str(i) for i in range(count)])[:count]
    while True:
        for device in devices:
            held = lock(Path(tempfile.gettempdir()) / f"vitad-{os.getuid()}-gpu-{device}.lock", fcntl.LOCK_NB)
            if held is not None:
                return device, held
        time.sleep(0.5)


def lock(path, how=0):
    """Descriptor of a file that is now locked; None if it is and `how` says not to wait.

    Whoever inherits the descriptor keeps the lock, so a command holds it even if this process is killed.
    """
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        return file
    except BlockingIOError:
        os.close(file)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
