# Everything runs in .venv, made from the lock files.
PYTHON ?= python3
BIN := .venv/bin
RUN := $(BIN)/python -m unet_jax.main
DEMO := runs/demo
# One worker a core; a file's tests stay together, since they share a run.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-slow bench format clean

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

.venv/test: .venv/core requirements-test.lock
	$(BIN)/python -m pip install --quiet -r requirements-test.lock
	touch $@
