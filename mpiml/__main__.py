"""`python -m mpiml` lists the commands."""

import mpiml

print(
    f"""mpiml {mpiml.__version__}: MPI-first training, with the same bits on every layout

  mpirun -n 16 python -m mpiml.train    train a model          (--help lists the settings)
  mpirun -n 4 python -m mpiml.evaluate  score a run's checkpoint, and write predictions
  mpirun -n 16 python -m mpiml.doctor   look at a job: ranks, cores, MPI, speed; what is wrong with it
  python -m mpiml.report RUN [RUN ...]  draw runs as one page, finished or going on (needs no MPI)
  python -m mpiml.compare A B           where two runs part, and what explains it
  python -m mpiml.export metrics|onnx   a run for other programs: TensorBoard, CSV, ONNX
  python -m mpiml.plan --ranks 64       size a job on any grid: stages, memory, bytes that move (needs no MPI)
  python -m mpiml.scaling run|report    a scaling study        (starts its own MPI jobs)
  python -m mpiml.predict calibrate     what a step takes on grids that were not measured, from a study
  python -m mpiml.bench                 measure this machine   (starts its own MPI jobs)"""
)
