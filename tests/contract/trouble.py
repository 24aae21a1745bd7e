"""A training script in which ranks get into trouble: `python trouble.py RANK[,RANK] PHASE KIND [mpiml.train flags]`."""

import os
import resource
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpiml.config import parse
from mpiml.data.dataset import Dataset, Split, open_dataset
from mpiml.data.sources import Source
from mpiml.nn.layers import At, Layer
from mpiml.nn.perceptrons import mlp
from mpiml.run import watch
from mpiml.run.failure import exit_code
from mpiml.run.saving import Saver
from mpiml.train import train
from mpiml.training.storage import Store

RANKS, PHASE, KIND = [int(rank) for rank in sys.argv[1].split(",")], sys.argv[2], sys.argv[3]
STEP = 7


def in_thread(action: Any) -> None:
    thread = threading.Thread(target=action, name="helper")
    thread.start()
    thread.join()
    time.sleep(60)


def fail() -> None:
    raise RuntimeError("this rank is in trouble")


def read_slowly() -> None:
    for _ in range(30):
        time.sleep(0.2)
        with open("/dev/zero", "rb") as file:
            file.read(1 << 20)


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError("this error cannot be told")


def fail_unspeakably() -> None:
    os.close(2)
    raise UnspeakableError


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave_unnoticed() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)  # the launcher's process on this node, which would notice
    os._exit(0)


def kill_the_launcher() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def fail_slowly() -> None:
    sync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.5), sync(descriptor))  # type: ignore[assignment]
    fail()


KINDS: dict[str, Any] = {
    "raise": fail,
    "raise-unspeakable": fail_unspeakably,
    "exit0": lambda: sys.exit(0),
    "exit1": lambda: sys.exit(1),
    "exit-text": lambda: sys.exit("no more"),
    "thread-raise": lambda: in_thread(fail),
    "thread-exit": lambda: in_thread(lambda: sys.exit(0)),
    "os-exit0": lambda: os._exit(0),
    "unnoticed": leave_unnoticed,
    "kill-launcher": kill_the_launcher,
    "raise-slowly": fail_slowly,
    "os-exit3": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "stop": stop,
    "sleep": lambda: time.sleep(300),
    "small-files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
    "read-slowly": read_slowly,
    "slow": lambda: time.sleep(0.3),
}


def trouble(phase: str) -> None:
    if phase == PHASE and MPI.COMM_WORLD.rank in RANKS:
        KINDS[KIND]()


class Troubled(Layer):
    """Passes rows through, except where the trouble is."""

    def __call__(self, x: Any, at: At) -> Any:
        if at.training and at.step >= STEP:
            trouble("forward")
        if not at.training:
            trouble("evaluation")

        def backward(dy: Any, grads: Any) -> Any:
            if at.step >= STEP:
                trouble("backward")
            return dy

        return x, backward


class TroubledSource:
    """A source in whose reading the trouble is."""

    def __init__(self, source: Source):
        self.source = source
        self.name, self.shape, self.dtype = source.name, source.shape, source.dtype
        self.reads = 0

    def __len__(self) -> int:
        return len(self.source)

    def hold(self, rows: Any) -> None:
        trouble("start")
        self.source.hold(rows)

    def rows(self, indices: Any) -> Any:
        self.reads += 1
        if self.reads > STEP:
            trouble("data")
        return self.source.rows(np.asarray(indices))


def model(shape: tuple[int, ...], outputs: int) -> list[Layer]:
    layers: list[Layer] = [Troubled()]
    for layer in mlp(shape, outputs, (64, 64)):
        layers += [layer, Troubled()]
    return layers


def at_end(store: Store, outcome: Any) -> Any:
    trouble("end")
    return finish(store, outcome)


def in_save(*arguments: Any) -> Any:
    trouble("save")
    return begin(*arguments)


if KIND in ("kill-launcher", "unnoticed"):
    watch.LOOK = 0.1
finish, Store.finish = Store.finish, at_end  # type: ignore[method-assign]
begin, Saver.begin = Saver.begin, in_save  # type: ignore[method-assign]
digits = open_dataset("digits")
data = Dataset(Split(TroubledSource(digits.train.x), TroubledSource(digits.train.y)), digits.test, "digits")
try:
    code = train(parse(sys.argv[4:]), model=model, data=data)["exit_code"]
except BaseException as error:  # train has told of it
    code = exit_code(error)
sys.exit(code)
