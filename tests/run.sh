#!/usr/bin/env bash
# Sets up what the tests need and runs them, linters among them. Arguments go to pytest.
#
#   bash tests/run.sh [pytest arguments]
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -Eeuo pipefail

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source-path=SCRIPTDIR source=../disagg_prefill_lmcache_v1/launch/bootstrap.sh
source "$here/../disagg_prefill_lmcache_v1/launch/bootstrap.sh"
hand_over "$here/run.py" "$@"
