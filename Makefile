# The few commands of this project. Each installs what it lacks.
#   make quickstart   a small real model trained with SimPO on this machine, from nothing to a table of results
#   make build        simpo-coordinator, simpo-worker and simpoctl in build/bin
#   make test         all tests           (TEST_ARGS="-L unit" for a part)
#   make parity       the same steps in live TRL and transformers, and ours (6 GB of Python packages)
#   make mutants      whether the numeric tests catch planted mistakes
#   make chaos        kill -9: 1,000 rounds on simulated gangs, 100 on real training, 10,000 ranks (CHAOS_SEED=N
#                     does what an earlier run did)
#   make soak         two hours of short jobs: what the coordinator takes must stay flat (SOAK_MINUTES=N)
#   make sanitize     unit tests under the thread sanitizer (control plane), and the address and undefined-behaviour ones
#   make fuzz         every fuzzer for FUZZ_SECONDS, FUZZ_TARGETS of them, and a million mutated job files
#   make faults       what real gangs make of broken networks, disks, clocks and clients, in full (root)
#   make lint         clang-format and clang-tidy
#   make clean        removes build folders and run/, not the downloaded dependencies
SHELL := /bin/bash
JOBS ?= $(shell nproc)
PRESET ?= release
TEST_ARGS ?=
CHAOS_SEED ?= $(shell date +%s)
CHAOS_ROUNDS ?= 1000
SOAK_MINUTES ?= 120
FUZZ_SECONDS ?= 1800
FUZZ_TARGETS ?=
.DEFAULT_GOAL := build
.PHONY: deps build test quickstart parity mutants chaos soak faults sanitize fuzz lint clean

deps:
	@deploy/install-deps.sh

build: deps
	@cmake --preset $(PRESET) --log-level=WARNING
	@cmake --build --preset $(PRESET) -j $(JOBS)

# The build comes first, so that tests never wait for a compiler.
test: build
	@ctest --test-dir build -j $(JOBS) --output-on-failure --no-tests=error $(TEST_ARGS)

quickstart: build
	@deploy/quickstart/run.sh

parity: build
	@deploy/install-deps.sh --with parity
	@tests/parity/run_parity.sh

mutants: build
	@tests/parity/mutants.py

chaos: build
	@build/bin/chaos --data-dir run/chaos --rounds $(CHAOS_ROUNDS) --seed $(CHAOS_SEED)
	@build/bin/fleet_bench --data-dir run/fleet --gangs 1000 --restart
	@build/bin/fleet_bench --data-dir run/fleet --gangs 10 --ranks 1000 --tls
	@SIMPO_BIN_DIR=$(CURDIR)/build/bin SIMPO_CHAOS_SEED=$(CHAOS_SEED) /usr/bin/python3 -B -m pytest -q -s \
		-p no:cacheprovider --basetemp=run/chaos-training tests/integration/chaos_training.py

soak: build
	@rm -rf run/soak
	@build/bin/soak --data-dir run/soak --minutes $(SOAK_MINUTES)

sanitize: deps
	@cmake --preset tsan --log-level=WARNING && cmake --build --preset tsan -j $(JOBS)
	@ctest --preset tsan -j $(JOBS)
	@cmake --preset asan-ubsan --log-level=WARNING && cmake --build --preset asan-ubsan -j $(JOBS)
	@ctest --preset asan-ubsan -j $(JOBS)

fuzz: build
	@deploy/install-deps.sh --with lint
	@cmake --preset fuzz --log-level=WARNING && cmake --build --preset fuzz -j $(JOBS)
	@build/bin/mutate_job_files configs 1000000
	@tests/fuzz/run.sh build-fuzz $(FUZZ_SECONDS) $(FUZZ_TARGETS)

faults: build
	@SIMPO_LONG_TESTS=1 ctest --test-dir build --output-on-failure --no-tests=error \
	  -R "user_calls|UserCall|WorkerCalls|service_stalls|service_network|service_disk|service_clock|service_slow_disk|slow_clients"

# kernels_cpu.cc asks for x86-64-v3 by a name that clang 14 does not know.
lint:
	@deploy/install-deps.sh --with lint
	@git ls-files '*.h' '*.cc' | xargs clang-format --dry-run --Werror
	@cmake --preset $(PRESET) -B build-lint -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON --log-level=WARNING  # clang reads no gcc's
	@cmake --build build-lint --target simpo_proto -j $(JOBS)
	@git ls-files 'common/*.cc' 'coordinator/*.cc' 'simpoctl/*.cc' 'worker/*.cc' ':!worker/model/kernels_cpu.cc' | \
	  xargs -P $(JOBS) -n 4 clang-tidy -p build-lint --quiet

clean:
	@rm -rf build build-* run
