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
	$(PYTHON) -m disagg_prefill_lmcache_v1.launch export kustomize --output deploy/kubernetes
	$(PYTHON) -m disagg_prefill_lmcache_v1.launch export compose --device cpu --output deploy/compose
	$(PYTHON) -m disagg_prefill_lmcache_v1.launch export systemd --device cuda --output deploy/systemd
test:
	bash tests/run.sh
