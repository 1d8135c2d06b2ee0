# Needs Python 3.11+ and make. The two commands are `make run` and `make test`.

# The Python to make .venv with (empty: the first that fits)
PYTHON ?=
# What `make run` trains on (synthetic, nih, auto), where its images lie, and further papermill arguments: ARGS='-p epochs 2'
DATA = synthetic
DATA_ROOT =
ARGS =
# Many small synthetic images (or those of a folder that is given): the default 400 at 256 pixels for 8 epochs take about as long on a CPU and teach less
DEMO = $(if $(filter synthetic,$(DATA)),$(if $(DATA_ROOT)$(CXR_SYNTHETIC_ROOT),,-p data_options n=800+size=128) -p image_size 128 -p anchor_scale 2 -p augment light -p lr 6e-3 -p epochs 9)
# Processes that `make test` uses; one more than the two cores, since each of them waits now and then
WORKERS = 3

BIN   := .venv/bin
STAMP := .venv/installed
# The rendered record shows the run; the library's own code in it is on the site
NO_LIBRARY = --RegexRemovePreprocessor.enabled=True --RegexRemovePreprocessor.patterns='^\#\|\s*(export|hide|default_exp)'
SET_UP = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHON DATA DATA_ROOT
export JUPYTER_PREFER_ENV_PATH = 1
export NO_ALBUMENTATIONS_UPDATE = 1
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: help setup run test test-slow ladder weights docs lab prepare pins clean distclean
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(STAMP) ## install everything into .venv

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@py=$$(sh tools/find_python.sh) || exit 1; \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || "$$py" -m venv --clear .venv
	@echo "Installing into .venv (a download of about 3 GB the first time)"
	@$(SET_UP) uv && $(BIN)/uv pip install --python $(BIN)/python --compile-bytecode -c constraints.txt -e '.[dev]' \
	|| { echo "uv could not do it; trying pip"; $(SET_UP) -e '.[dev]'; }
	@touch $@

run: $(STAMP) ## train and evaluate the demo (DATA=nih DATA_ROOT=DIR: on your images)
	@rm -rf runs/demo runs/demo.ipynb runs/demo.html runs/demo_eval.ipynb runs/demo_eval.html && mkdir -p runs
	papermill nbs/04_train.ipynb runs/demo.ipynb -p data $(DATA) $(DEMO) $${DATA_ROOT:+-r data_root "$$DATA_ROOT"} $(ARGS)
	papermill nbs/05_eval.ipynb runs/demo_eval.ipynb -p run demo
	@jupyter nbconvert --log-level ERROR --to html $(NO_LIBRARY) runs/demo.ipynb runs/demo_eval.ipynb
	@python tools/summary.py runs/demo

test: $(STAMP) ## run every test
	pytest tests -n $(WORKERS) --dist worksteal

test-slow: $(STAMP) ## the slow and the real-data tests too; keeps the result in nbs/last_slow_test.qmd
	pytest tests -n $(WORKERS) --dist worksteal --slow
	pytest tests -k make_run --slow

# a recipe that trains on drawn films, made or continued where it is not finished
drawn-%: $(STAMP)
	@[ -f runs/drawn_$*/metrics.json ] || cxr_train -cn drawn_$* run=drawn_$* $$([ -f runs/drawn_$*/config.json ] && echo resume=true)

ladder: drawn-128 ## the recorded ladder on real images (DATA_ROOT=DIR); goes on where it was stopped
	papermill nbs/04b_ladder.ipynb runs/ladder.ipynb -f configs/ladders/nih.yaml $${DATA_ROOT:+-r data_root "$$DATA_ROOT"} $(ARGS)

weights: drawn-lite0 ## train the shipped detector anew on real images (DATA_ROOT=DIR), and put it into the package
	@[ -f runs/nih7_lite0/metrics.json ] || cxr_train -cn nih7_lite0 run=nih7_lite0 $${DATA_ROOT:+data_root="$$DATA_ROOT"} $$([ -f runs/nih7_lite0/config.json ] && echo resume=true)
	CXR_NIH_ROOT="$${DATA_ROOT:-$$CXR_NIH_ROOT}" python tools/ship.py nih7_lite0 nih7_lite0

docs: $(STAMP) ## build the site into _docs and check its links
	python tools/build_docs.py

lab: $(STAMP) ## open the notebooks in JupyterLab
	jupyter lab nbs

prepare: $(STAMP) ## before a commit: export, clean, README, reference page
	nbdev_export && nbdev_clean && python tools/readme.py && python tools/reference.py

pins: $(STAMP) ## write constraints.txt anew from the newest versions that fit
	@{ sed '/^[^#]/d' constraints.txt; uv pip compile -q --upgrade --python-version 3.11.2 --extra dev setup.py --no-annotate \
	--no-header | grep -vE '^(nvidia|cuda|triton)'; } > constraints.new && mv constraints.new constraints.txt

clean: ## remove what was built (runs and data stay)
	rm -rf _docs _proc build dist *.egg-info .pytest_cache

distclean: clean ## remove .venv too
	rm -rf .venv
