"""Ctrl-C at random moments of the first chain of a process, and of later captures."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# A process without threads forks a child for each try. The child says that it begins, and samples until Ctrl-C ends it.
# One that is still there after a minute has lost its Ctrl-C. In the first children, PyTorch still imports what a
# capture needs, which takes a second; the parent of the others has captured an energy.
PARENT = """
import json, os, random, select, signal, sys, time
import torch
import fastebm
from torch import nn

torch.set_num_threads(1)


def child(out=None):
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(512, 1)).train()
    sampler, x = fastebm.Langevin(net, 0.05, 0.01), torch.zeros(4, 1, 8, 8)
    try:
        if out is None:
            return sampler.sample(x, 20, seed=0)
        os.write(out, b"b")
        sampler.sample(x, 20, seed=0)
        os.write(out, b"e")
        while True:
            sampler.sample(x, 20, seed=0)
    except KeyboardInterrupt:
        frozen = [part for part in net.modules() if not part.training]
        return 8 if frozen or signal.getsignal(signal.SIGINT) is not signal.default_int_handler else 130


def fork():
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = child(writing)
        finally:
            os._exit(code)
    os.close(writing)
    os.read(reading, 1)
    return pid, reading


def end(pid, reading):
    os.kill(pid, signal.SIGINT)
    while select.select([reading], [], [], 60)[0]:
        if not os.read(reading, 1):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "lost"


def interrupt(tries):
    pid, reading = fork()
    begin = time.monotonic()
    os.read(reading, 1)
    first_chain = time.monotonic() - begin
    end(pid, reading)
    for i in tries:
        pid, reading = fork()
        time.sleep(random.uniform(0, 1.1 * first_chain))
        ends.setdefault(end(pid, reading), []).append(i)
        os.close(reading)


random.seed(0)
ends = {}
tries = range(int(sys.argv[1]))
interrupt(tries[: len(tries) // 5])
child()
interrupt(tries[len(tries) // 5 :])
print(json.dumps(ends))
"""


def test_ctrl_c_in_the_first_chain_of_a_process(tries: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, str(tries)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]).keys() == {"130"}, done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
