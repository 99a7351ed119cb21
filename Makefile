# Sets a checkout up, and keeps it so. Every target does the set-up it needs; where nothing has
# changed since, that takes a moment. Needs: make, any Python 3.9+ with venv (3.11-3.13 is found, or
# fetched by uv), a network to the Python and Rust package registries.
#
# TORCH=cpu make setup   installs PyTorch's CPU-only build instead of the default one, which brings
#                        6 GB of CUDA libraries on Linux. The choice is kept. It comes from PyTorch's
#                        own index, which the lock file has no hashes for; CI does not try it.
# PYTHON=3.12 make setup chooses the Python of a new environment.
# PYTEST="-k tokenizer" make test   gives pytest arguments.
# STRINGS=1000000 make fuzz   tries so many strings; another number tries others.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= >=3.11,<3.14
# Two workers, a file to one of them: its fixtures (a trained model, a server) are made once.
PYTEST ?= -n 2 --dist loadfile
STRINGS ?= 10000000
TORCH ?= $(shell cat .venv/torch-build 2>/dev/null || echo default)
ifeq ($(filter $(TORCH),default cpu),)
$(error TORCH=$(TORCH): write default or cpu)
endif

UV := .tools/bin/uv
BIN := .venv/bin
# Byte code now, on all cores: else the first run of everything makes it, module by module.
INSTALL := $(UV) pip install --python $(BIN)/python --build-constraints tools.lock --compile-bytecode
COMPILE := $(UV) pip compile --quiet --universal --generate-hashes --custom-compile-command "make lock"

# A checkout that was moved or copied: the environment's scripts and paths name the old place.
ifneq ($(wildcard .venv/made-in),)
ifneq ($(shell cat .venv/made-in),$(CURDIR))
$(shell rm -rf .venv)
endif
endif

.PHONY: help setup environment quickstart test test-image test-serverless-image serverless-sdk histories load fuzz \
  sanitize emulator check format images lock graph clean

help:
	@echo "make quickstart   set up, train the quick model through the whole graph, ask it its name"
	@echo "make test         set up, run every test"
	@echo "make histories    tell histories of RunPod's faults (HISTORIES=), with a bucket and with training, too"
	@echo "make fuzz         hold splitting and encoding against other engines on ten million strings (STRINGS=)"
	@echo "make load         64 clients of nanochat serve for two minutes (SECONDS_OF_LOAD=, CLIENTS=)"
	@echo "make sanitize     run the Rust crate's tests under the address sanitizer"
	@echo "make emulator     set up, serve an emulated RunPod with an S3 server beside it"
	@echo "make test-image   build the training image, push it to a registry on loopback, train in it"
	@echo "make test-serverless-image  the same for the image of serverless workers, which answers a prompt"
	@echo "make check        set up, check format, style, types, package arrows, Dockerfiles and the Rust crate"
	@echo "make setup        .tools (uv), .venv (Python packages, Rust build), .env"
	@echo "make format       format Python and Rust"
	@echo "make images       build the training image (IMAGE=registry/name:tag; PUSH=1 pushes it, too)"
	@echo "make lock         resolve the lock files anew (UPGRADE=--upgrade for newer versions)"
	@echo "make graph        draw docs/graph.svg from the definitions"
	@echo "make clean        remove environment and caches; models, data and history stay"

# -- set-up ----------------------------------------------------------------------------------------

setup: .tools/made .venv/rustbpe-made .venv/project-made environment

.tools/made: tools.lock
	@python3 -m venv .tools || { echo "The set-up needs Python's venv (Debian: apt-get install python3-venv)"; exit 1; }
	.tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r tools.lock
	@touch $@

.venv/made-in: | .tools/made
	$(UV) venv --quiet --allow-existing --python "$(PYTHON)" .venv
	@echo "$(CURDIR)" > $@

.venv/requirements-cpu.lock: requirements.lock
	@mkdir -p .venv
	@awk '/^[a-z]/ { keep = !/^(torch|triton|nvidia-|cuda-)/ } keep' requirements.lock > $@

.venv/packages-$(TORCH): requirements.lock $(if $(filter cpu,$(TORCH)),.venv/requirements-cpu.lock) | .venv/made-in
ifeq ($(TORCH),cpu)
	$(INSTALL) --require-hashes -r .venv/requirements-cpu.lock
	$(INSTALL) --no-deps --torch-backend cpu --reinstall-package torch $$(grep -o '^torch==[^ ]*' requirements.lock)
else
	$(INSTALL) --require-hashes -r requirements.lock $(if $(wildcard .venv/packages-cpu),--reinstall-package torch)
endif
	@rm -f .venv/packages-*
	@echo $(TORCH) > .venv/torch-build
	@touch $@

RUST_SOURCES := $(shell find rustbpe \( -name target -o -name __pycache__ \) -prune -o -type f -print)

.venv/rustbpe-made: $(RUST_SOURCES) tools.lock | .venv/packages-$(TORCH)
	@command -v cc > /dev/null || { echo "The Rust build needs a C linker, cc (Debian: apt-get install gcc)"; exit 1; }
	$(INSTALL) --no-deps --reinstall-package rustbpe ./rustbpe
	@touch $@

.venv/project-made: pyproject.toml tools.lock | .venv/packages-$(TORCH)
	$(INSTALL) --no-deps --reinstall-package dagster-nanochat --editable .
	@touch $@

# RunPod's SDK asks for a newer click than dg bears: what the tests of serverless workers import lies in a
# folder of its own, before the environment's packages. (It has no torch: that is the environment's.)
serverless-sdk: .venv/serverless/made

.venv/serverless/made: requirements-serverless.lock | .venv/packages-$(TORCH)
	@rm -rf .venv/serverless
	@awk '/^[a-z]/ { keep = !/^(torch|triton|nvidia-|cuda-)/ } keep' $< > .venv/serverless.lock
	$(UV) pip install --python $(BIN)/python --target .venv/serverless --no-deps --require-hashes -r .venv/serverless.lock
	@touch $@

# `.env` is git-ignored and yours: lines of your own stay. Dagster refuses a relative DAGSTER_HOME, so
# the line that the set-up wrote is put right where the checkout has moved. A DAGSTER_MODULE_NAME in it
# keeps `dg dev` from ever answering (1.13.27: its web server takes it for a second workspace), so none stays.
environment:
	@mkdir -p .dagster && touch .env
	@[ -f .dagster/dagster.yaml ] || cp src/dagster_nanochat/instance.yaml .dagster/dagster.yaml
	@home=$$(sed -n 's/^DAGSTER_HOME=//p' .env | tail -n 1); \
	case "$$home" in \
	  "$(CURDIR)/.dagster") ;; \
	  ""|*/.dagster) \
	    { grep -v '^DAGSTER_HOME=' .env || true; echo 'DAGSTER_HOME=$(CURDIR)/.dagster'; } > .env.new && mv .env.new .env ;; \
	esac
	@if grep -q '^DAGSTER_MODULE_NAME=' .env; then \
	  { grep -v '^DAGSTER_MODULE_NAME=' .env || true; } > .env.new && mv .env.new .env; fi

# -- what people run -------------------------------------------------------------------------------

quickstart: setup
	@$(BIN)/nanochat quickstart

test: setup serverless-sdk
	@if command -v cargo > /dev/null; then cargo test --quiet --manifest-path rustbpe/Cargo.toml; \
	else echo "Rust is not installed: the crate's own tests are skipped"; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

emulator: setup
	@PYTHONPATH=$(CURDIR)/tests exec $(BIN)/python -m emulators.runpod

# Not among the others: it writes some 20 GB, all of it temporary, for minutes.
test-image: setup
	TEST_IMAGE=1 $(BIN)/python -m pytest -rP tests/nanochat/training/test_training_image.py

test-serverless-image: setup serverless-sdk
	TEST_IMAGE=1 $(BIN)/python -m pytest -rP tests/nanochat/serving/test_serverless_image.py

histories: export HISTORIES ?= 300
histories: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dagster_nanochat/launch/runpod/test_histories.py \
	  tests/dagster_nanochat/launch/runpod/test_trained_histories.py \
	  tests/dagster_nanochat/launch/runpod/test_nodes.py

# A short form of it is among the tests.
load: setup
	$(BIN)/python benchmarks/serving_load.py --seconds $(or $(SECONDS_OF_LOAD),120) --clients $(or $(CLIENTS),64)

# Splitting against two regular expression engines, in every instruction set that the processor has;
# then encoding against tiktoken.
fuzz: setup
	RUSTBPE_FUZZ=$(STRINGS) cargo test --release --manifest-path rustbpe/Cargo.toml --lib random_texts
	RUSTBPE_FUZZ=$(STRINGS) $(BIN)/python -m pytest --timeout 0 tests/rustbpe/test_encoding.py -k tiktoken

# Sanitizers are no part of stable Rust; RUSTC_BOOTSTRAP has a stable compiler take the flag.
sanitize: export RUSTC_BOOTSTRAP := 1
sanitize: export RUSTFLAGS := -Zsanitizer=address
sanitize:
	cargo test --manifest-path rustbpe/Cargo.toml --target $$(rustc -vV | sed -n 's/^host: //p') --lib

# `make -k check` goes on after the first that fails.
CHECKS := check-format check-style check-types check-arrows check-shell check-images check-rust
.PHONY: $(CHECKS)

check: $(CHECKS)

$(CHECKS): | setup

check-format:
	$(BIN)/ruff format --check

check-style:
	$(BIN)/ruff check

check-types:
	$(BIN)/mypy

check-arrows:
	$(BIN)/lint-imports --no-logo

check-shell:
	bash -n .ci/run
	$(BIN)/shellcheck build_and_push_serverless.sh

check-images:
	$(BIN)/hadolint $(wildcard Dockerfile*)

check-rust:
	@if command -v cargo > /dev/null; then set -ex; \
	  cargo fmt --manifest-path rustbpe/Cargo.toml --check; \
	  cargo clippy --quiet --manifest-path rustbpe/Cargo.toml --all-targets --all-features -- -D warnings; \
	else echo "Rust is not installed: the crate is not checked"; fi

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	@if command -v cargo > /dev/null; then cargo fmt --manifest-path rustbpe/Cargo.toml; fi

# -- images ----------------------------------------------------------------------------------------

# Whichever builder is there: BUILDER=podman chooses. BUILD_FLAGS and PUSH_FLAGS are handed to it.
BUILDER ?= $(shell if docker buildx version > /dev/null 2>&1; then echo docker; \
  elif command -v podman > /dev/null; then echo podman; elif command -v buildah > /dev/null; then echo buildah; fi)
# The commit, with + where files differ from it.
REVISION = $(shell git describe --always --abbrev=40 --exclude '*' --dirty=+ 2> /dev/null || echo unknown)
DOCKERFILE ?= Dockerfile.training
# The platform of the rented machines, whatever this one is.
IMAGE_FLAGS = --file $(DOCKERFILE) --platform linux/amd64 --tag "$(IMAGE)" \
  --label org.opencontainers.image.revision=$(REVISION) $(if $(BASE_IMAGE),--build-arg "BASE_IMAGE=$(BASE_IMAGE)") $(BUILD_FLAGS)

# With PUSH=1 the last line printed is the reference by digest.
images:
	@[ -n "$(IMAGE)" ] || { echo "Name the image: make images IMAGE=registry.example/team/nanochat:1" >&2; exit 1; }
	@[ -n "$(BUILDER)" ] || { echo "Images are built by docker buildx, podman or buildah: none of the three is installed" >&2; exit 1; }
	@set -eo pipefail; told=$$(mktemp); trap 'rm -f "$$told"' EXIT; \
	if [ "$(BUILDER)" = docker ]; then \
	  docker buildx build $(IMAGE_FLAGS) $(if $(PUSH),--push $(PUSH_FLAGS) --metadata-file "$$told",--load) .; \
	else \
	  $(BUILDER) build --layers $(IMAGE_FLAGS) .; \
	  $(if $(PUSH),$(BUILDER) push $(PUSH_FLAGS) --digestfile "$$told" "$(IMAGE)";) \
	fi; \
	$(if $(PUSH),digest=$$(sed -nE 's/^(.*"containerimage.digest": *")?(sha256:[0-9a-f]{64}).*$$/\2/p' "$$told"); \
	name="$(IMAGE)"; last="$${name##*/}"; echo "$${name%"$$last"}$${last%%:*}@$$digest")

# -- upkeep ----------------------------------------------------------------------------------------

# The crate in rustbpe/ is installed from the checkout, so it has no pin; what it needs has.
lock: .tools/made
	$(COMPILE) --python-version 3.9 --group tools $(UPGRADE) --output-file tools.lock
	$(COMPILE) --python-version 3.11 --extra dev --no-emit-package rustbpe $(UPGRADE) --output-file requirements.lock pyproject.toml
	@sed -i.old -e '/^$$/,$$d' requirements.lock && rm requirements.lock.old
	$(COMPILE) --python-version 3.11 --group training --constraints requirements.lock --output-file requirements-training.lock
	@mkdir -p .venv && grep -o '^torch==[^ ]*' requirements.lock > .venv/torch.txt
	$(COMPILE) --python-version 3.11 --group serverless --constraints .venv/torch.txt $(UPGRADE) --output-file requirements-serverless.lock

graph: setup
	$(BIN)/python docs/draw_graph.py

clean:
	rm -rf .venv .tools rustbpe/target .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests scripts docs benchmarks rustbpe -name __pycache__ -prune -exec rm -rf {} + 2> /dev/null || true
