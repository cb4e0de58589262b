#!/usr/bin/env bash
# Sets up what the tests need and runs them: ruff, ShellCheck, pytest. Arguments go to pytest.
#
#   bash tests/run.sh [pytest arguments]
set -Eeuo pipefail

# shellcheck source-path=SCRIPTDIR source=../disagg_prefill_lmcache_v1/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../disagg_prefill_lmcache_v1/lib.sh"

FAILED=()

main() {
  local scripts shellcheck
  # The tests run on CPU whatever the machine has.
  FLAGS[device]=cpu FLAGS[run_dir]=$REPO/runs/tests
  resolve_settings
  begin_supervision
  mkdir -p -- "${S[run_dir]}"
  setup_python "${PROFILE[SETUP_EXTRA]}"
  setup_python test
  "$PYTHON" -c 'import pytest, ruff' 2>/dev/null || die "pytest and ruff are missing in $PYTHON: install the extra 'test'"
  setup_redis || info "Redis tests are left out: $REDIS_PROBLEM"
  cd -- "$REPO"
  scripts=(disagg_prefill_lmcache_v1/*.sh tests/*.sh)
  check "ruff check" "$PYTHON" -m ruff check .
  shellcheck=$(PATH=$(dirname -- "$PYTHON"):$PATH command -v shellcheck) || die "shellcheck is missing: install the extra 'test'"
  check "shellcheck of ${#scripts[@]} scripts" "$shellcheck" -x "${scripts[@]}"
  check pytest "$PYTHON" -m pytest --durations=15 "$@"
  ((${#FAILED[@]} == 0)) || die "failed: $(join_comma "${FAILED[@]}")"
}

# check NAME COMMAND...: one step, in a group of its own, so that nothing of it outlives this script. The next one runs
# even if it fails.
check() {
  local name=$1 begin=$SECONDS status=0
  shift
  info "$name"
  start_child "$name" - "$@"
  await_end "$name" || status=$?
  if ((status == 0)); then
    info "$name: passed in $((SECONDS - begin)) s"
  else
    info "$name: FAILED after $((SECONDS - begin)) s (exit status $status)"
    FAILED+=("$name")
  fi
}

main "$@"; exit
