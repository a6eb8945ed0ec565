# The front door of the workbook. Settings: N=chapter/name PROFILE=quick|paper P='a=1 b=2' JOBS=2 RUN='srun -c4' FORCE=1
MAKEFLAGS += --no-print-directory
PYTHON ?= python3
export N P PROFILE JOBS RUN FORCE PYTHON
export PYTHONPATH := $(CURDIR)/lib
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
# idle threads sleep instead of spinning: two notebooks side by side would else slow each other twentyfold
export GOMP_SPINCOUNT ?= 1000
# makes the environment if there is none that satisfies the lock, and names its interpreter
ENV = python="$$($(PYTHON) tools/setup.py)" && "$$python"
NOTEBOOKS = $(filter-out notebooks/checkpoints/%,$(wildcard notebooks/*/*.ipynb))

.PHONY: help setup figures quick checkpoints verify why list params scorecard test lab bench lint strip clean
help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 22; sed -n '1s/^# */\n/p' Makefile
setup:  ## make .venv, or take the active environment if it satisfies requirements.lock
	@$(ENV) --version
figures:  ## run the notebooks whose code, parameters, library, data or lock changed; N= for one
	@$(ENV) -m doit figures
quick:  ## the same with small settings, into build/quick/
	@PROFILE=quick; export PROFILE; $(ENV) -m doit figures
checkpoints:  ## train the models that ship in data/checkpoints/; N= for one
	@$(ENV) -m doit checkpoints
verify:  ## run every notebook once more and compare with the committed numbers
	@$(ENV) -m workbook verify $(N)
why:  ## say what would run and why; N= for one
	@$(ENV) -m workbook why $(N)
list:  ## the notebooks and whether their figures are up to date
	@$(ENV) -m workbook list
params:  ## the parameters of a notebook: make params N=decoding/spectr
	@$(ENV) -m workbook params $(N)
scorecard:  ## write the README's table and figures/scorecard.svg from the records
	@$(ENV) -m workbook scorecard
test: lint  ## ruff, every test, and every notebook in its quick profile
	@$(ENV) -m pytest -n 2 --dist loadscope -p no:importnb --nbval-lax --nbval-current-env --nbval-cell-timeout 600 tests $(NOTEBOOKS)
lab:  ## JupyterLab on this machine only, with its token
	@unset JUPYTER_PATH; $(ENV) -m jupyterlab --ip 127.0.0.1 $(if $(filter 0,$(shell id -u)),--allow-root)
bench:  ## what the workbook itself costs, each beside its limit
	@$(ENV) tools/bench.py
lint:  ## ruff over code and notebooks
	@$(ENV) -m ruff check --quiet . && "$$python" -m ruff format --quiet --check .
strip:  ## remove stored outputs, but for the tables that nbval compares (tag keep_output)
	@$(ENV) -m nbstripout $(wildcard notebooks/*/*.ipynb)
clean:  ## remove build/; figures/, data/ and .venv stay
	@rm -rf build
