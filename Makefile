# Two commands do all there is to do on a fresh machine: `make book` and `make test`.
# Every target first makes the environment it needs, in .venv, and makes it again when its definition changes.

PYTHON ?= python3
VENV   ?= .venv
CHAPTER ?=

BIN     := $(VENV)/bin
ENV     := $(VENV)/.installed
MATHJAX := book/_static/vendor/mathjax/SHA256
HTML    := _build/html

.DEFAULT_GOAL := help
.PHONY: help book test lab notebooks mutants results lock clean pages

help:          ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: pages    ## build the book in _build/html and check its links
	@index="$$PWD/$(HTML)/index.html"; echo "The book is built: $$index"; \
	if [ -t 1 ] && [ -z "$$CI" ]; then \
	  if [ "$$(uname)" = Darwin ]; then open "$$index"; \
	  elif [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] && command -v xdg-open >/dev/null; then xdg-open "$$index"; fi; fi

test: $(ENV)   ## every check: style, library, chapters, the built book, its pages in a browser
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(MAKE) --no-print-directory pages
	$(BIN)/python tools/check_pages.py $(HTML)

lab: $(ENV)    ## open the chapters in JupyterLab
	$(BIN)/jupyter lab book $(if $(filter 0,$(shell id -u)),--allow-root)

notebooks: $(ENV)  ## run the chapters' texts and store the notebooks (CHAPTER=name for one)
	$(BIN)/python tools/notebooks.py $(CHAPTER)

mutants: $(ENV)    ## plant bugs in the library, one at a time: the tests must notice each
	$(BIN)/python tests/mutants.py

results: $(ENV)    ## the table of the stored training runs
	$(BIN)/kernelbook results list

lock: $(ENV)   ## write requirements.lock anew from the environment
	$(BIN)/python tools/lock.py

clean:         ## remove what the other targets made, but not the environment
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---------------------------------------------------------------------------------------------------------------------

# One call, so that pip chooses all versions together; the lock says which.
$(ENV): pyproject.toml requirements.lock
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[book,test,lab]' -c requirements.lock
	@touch $@

$(MATHJAX): tools/fetch_mathjax.py | $(ENV)
	$(BIN)/python $<
	@touch $@

# Sphinx reads again the pages that changed. Where what every page depends on has changed, begin from nothing; and after
# a failure too, for a page that is not read again does not repeat its warnings.
_build/.settings: _config.yml _toc.yml book/macros.yml $(wildcard book/_ext/*.py book/_inventories/*) requirements.lock
	@rm -rf $(HTML) _build/.doctrees
	@mkdir -p _build && touch $@

pages: $(ENV) $(MATHJAX) _build/.settings
	@$(BIN)/jupyter-book build . -W -n --keep-going -q || { rm -rf _build/.doctrees; exit 1; }
	@$(BIN)/python tools/check_links.py $(HTML)
