# Everything runs in .venv, made from the lock files.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m unet_jax.main
DEMO := runs/demo
# One worker a core; a file's tests stay together, since they share a run.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow coverage mutants bench format clean

demo: .venv/core
	$(RUN) --config configs/synthetic.py --workdir $(DEMO)
	$(RUN) --mode evaluate --workdir $(DEMO) --config.eval.split=test
	$(RUN) --mode predict --workdir $(DEMO) --config.eval.split=test \
	  --config.predict.max_images=4 --config.predict.mask_values=scaled
	@echo "Look at $(DEMO)/pictures (input, truth, prediction, error)"
	@echo "and at $(DEMO)/predictions (masks and overlays of unseen images)."

test: .venv/test
	$(PYTEST) -m "not slow"

test-slow: .venv/test
	$(PYTEST) -m slow

# All tests, fast and slow; the processes that they start count, too.
coverage: .venv/test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=92

# docs/quality.md; MUTANTS="unet_jax.geometry.*" for those of one module.
MUTANTS ?=
mutants: .venv/mutants
	.venv/mutants/bin/mutmut run --max-children 1 $(MUTANTS)
	.venv/mutants/bin/mutmut results

bench: .venv/test
	$(BIN)/python benchmarks/all.py

format: .venv/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info $(DEMO)

.venv/core: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $@

# Beside the locked packages, not among them.
.venv/mutants: .venv/test
	$(PYTHON) -m venv .venv/mutants
	.venv/mutants/bin/pip install --quiet mutmut==3.8.1
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
	  $$(echo .venv/mutants/lib/python*/site-packages)/shared.pth

.venv/test: .venv/core requirements-test.lock
	$(BIN)/python -m pip install --quiet -r requirements-test.lock
	touch $@
