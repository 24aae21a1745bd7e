"""mpiml.train whose steps take PACE seconds longer: time to interrupt it, while the cores are left to other jobs."""

import os
import runpy
import time

from mpiml.parallel.stage import TrainingStage

quick = TrainingStage.train


def slow(*arguments, **flags):
    time.sleep(float(os.environ["PACE"]))
    return quick(*arguments, **flags)


TrainingStage.train = slow
runpy.run_module("mpiml.train", run_name="__main__", alter_sys=True)
