"""A campaign against the package, `make chaos`: whatever happens to a job, nothing saved is lost, and it ends.

Each part is a space of trials in the random order of a seed, so that a shorter campaign is a sample of a longer one:
kills, signals, calls on the run directory that fail, power failures, damaged and forged checkpoints, jobs that want the
same directory, and every way out of every phase, of a run and of a loop of one's own. Run directories are judged by
what a user sees: the exit code, what is printed, the weights' SHA-256, metrics.jsonl, result.json, and which files are
there, compared with a run that nobody disturbed. `python -m tests.chaos --parts faults:17 --seed 5` repeats a trial
that a line "MISS faults:17" tells of.

    campaign   draws trials and judges; parts: which there are     report   the table and chaos.json
    jobs, runs starting and ending jobs; run directories           disk     what may be on a disk after a crash
    shim       calls on a directory recorded, or made to fail      others   misses that are MPI's, with their reasons
"""
