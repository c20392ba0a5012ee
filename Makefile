# Development commands. `make build` compiles specforge_ext._C into python/, so that
# PYTHONPATH=python runs the working tree.
PYTHON ?= python
CUDA ?= OFF
BUILD ?= build/dev
export PYTHONPATH := $(CURDIR)/python:$(PYTHONPATH)

.PHONY: build stubs lint format test test-rdma peers clean

build:
	mkdir -p $(BUILD)
	cmake -S . -B $(BUILD) -G Ninja -DSPECFORGE_EXT_CUDA=$(CUDA) -DPython_EXECUTABLE=$$($(PYTHON) -c "import sys; print(sys.executable)")
	cmake --build $(BUILD) --target _C
	cp --remove-destination $(BUILD)/_C*.so python/specforge_ext/  # processes keep the file they have mapped

stubs:
	$(PYTHON) tools/make_stubs.py

lint:
	ruff check python tests benchmarks tools
	ruff format --check python tests benchmarks tools
	mypy
	clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

format:
	ruff check --fix python tests benchmarks tools
	ruff format python tests benchmarks tools
	clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

test:
	$(PYTHON) -m pytest -q

# The Mooncake stores over soft-RoCE in an emulated guest: root, apt, minutes (docs/stores.md).
test-rdma:
	$(PYTHON) tests/rigs/soft_roce/run.py

# What benchmarks compare with and integrations patch. --no-deps: they pin other versions of torch and
# transformers than ours.
peers:
	$(PYTHON) -m pip install -q --no-deps -r benchmarks/peers.txt
	$(PYTHON) -m pip install -q -r benchmarks/peers_need.txt

clean:
	rm -rf build python/specforge_ext/_C*.so
