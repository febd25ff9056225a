"""posttrain with a fault built in, as a process of its own: `python faults.py FAULT sft OPTION...`."""

import os
import signal
import subprocess
import sys
import time

from posttrain.loops.training_data import TrainingData

FAULT, RANK = sys.argv.pop(1), int(os.environ.get("RANK", 0))
AT_FAULT = int(os.environ.get("FAULTY_RANK", 1))
micro_batches = TrainingData.micro_batches


def faulty(self, step, world):
    """Reading the rows of step 3 goes wrong on one rank."""
    at_fault = step == 2 and RANK == AT_FAULT
    if FAULT == "sleeps" and at_fault:
        time.sleep(1000)  # the line that must be named
    if FAULT == "stops" and at_fault:
        time.sleep(1)  # so that it was seen here
        os.kill(os.getpid(), signal.SIGSTOP)
    if FAULT == "breaks" and at_fault:
        raise ValueError("a shard is broken")
    if FAULT == "crashes" and at_fault:
        os.kill(os.getpid(), signal.SIGSEGV)  # as a library's native code does
    if FAULT == "is_paused_then_sleeps":
        if step == 1:  # as by Ctrl-Z and `fg`, for twice the timeout
            subprocess.Popen(["sh", "-c", f"sleep 7; kill -CONT {os.getpid()}"])
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1)
        if step == 2:
            time.sleep(1000)
    if FAULT == "is_slow" and RANK == AT_FAULT:
        time.sleep(0.3)
    if FAULT == "is_slow" and step == 2 and RANK == 0:  # long work that shows its progress
        for _ in range(9):
            time.sleep(1)
            world.watchdog.alive()
    return micro_batches(self, step, world)


TrainingData.micro_batches = faulty

if __name__ == "__main__":
    from posttrain.cli import main

    main()
