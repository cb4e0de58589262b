#!/usr/bin/env bash
# Runs the disaggregated prefill example: a KV server, a prefill and a decode vLLM server, the proxy, a load with a
# correctness probe, a summary. Leaves nothing running.
#
#   bash disagg_example_gaudi_lm.sh [flags] [-- vLLM arguments]      flags: --help; what it starts: --dry-run
#
# Logs beside this script (or in --run-dir): kv_server.log, prefiller.log, decoder.log, proxy.log; result: summary.json.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -Eeuo pipefail

# Settings to edit; empty: the default. An environment variable of the same name or a flag wins.
: "${DISAGG_BACKEND:=}"              # lm (LMCache's own server), redis, shm or nixl
: "${DISAGG_TENSOR_PARALLEL_SIZE:=}" # ranks (cards) of each vLLM server
: "${DISAGG_MODEL:=}"                # Hugging Face name or local directory
export DISAGG_BACKEND DISAGG_TENSOR_PARALLEL_SIZE DISAGG_MODEL

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
# shellcheck source-path=SCRIPTDIR source=launch/bootstrap.sh
source "$here/launch/bootstrap.sh"
hand_over "$here/launch" example "$(basename -- "$0")" "$@"
