# The few commands of this project. Each installs what it lacks.
#   make quickstart   a small real model trained with SimPO on this machine, from nothing to a table of results
#   make build        simpo-coordinator, simpo-worker and simpoctl in build/bin
#   make test         all tests           (TEST_ARGS="-L unit" for a part)
#   make parity       the same steps in live TRL and transformers, and ours (6 GB of Python packages)
#   make mutants      whether the numeric tests catch planted mistakes
#   make sanitize     unit tests under the thread sanitizer (control plane), and the address and undefined-behaviour ones
#   make fuzz         every fuzzer for FUZZ_SECONDS, FUZZ_TARGETS of them, and a million mutated job files
#   make faults       what real gangs make of broken networks, disks, clocks and clients, in full (root)
#   make lint         clang-format and clang-tidy
#   make clean        removes build folders and run/, not the downloaded dependencies
SHELL := /bin/bash
JOBS ?= $(shell nproc)
PRESET ?= release
TEST_ARGS ?=
FUZZ_SECONDS ?= 1800
FUZZ_TARGETS ?=
.DEFAULT_GOAL := build
.PHONY: deps build test quickstart parity mutants sanitize fuzz faults lint clean

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

lint:
	@deploy/install-deps.sh --with lint
	@git ls-files '*.h' '*.cc' | xargs clang-format --dry-run --Werror
	@cmake --preset $(PRESET) --log-level=WARNING
	@git ls-files 'common/*.cc' 'coordinator/*.cc' 'simpoctl/*.cc' 'worker/*.cc' | xargs -P $(JOBS) -n 4 clang-tidy -p build --quiet

clean:
	@rm -rf build build-* run
