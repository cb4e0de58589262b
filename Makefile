# check never edits, fix does what a program can do, test runs everything.
# bash tests/run.sh sets up .venv first; PYTHON=... takes another interpreter that has the extras cpu and test.
PYTHON ?= .venv/bin/python

.PHONY: check fix test
check:
	$(PYTHON) -m pytest -q tests/repository
fix:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(PYTHON) tests/repository/tables.py --write
test:
	bash tests/run.sh
