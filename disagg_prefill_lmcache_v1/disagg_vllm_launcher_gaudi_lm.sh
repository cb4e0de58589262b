#!/usr/bin/env bash
# Starts one server of the disaggregated prefill example in the foreground.
#
#   bash disagg_vllm_launcher_gaudi_lm.sh prefiller|decoder|proxy|kv-server [model] [flags] [-- vLLM arguments]
#
# Start the KV server first: vLLM would serve without any reuse if it found none. Flags: --help; command: --dry-run.
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
hand_over "$here/launch" server "$(basename -- "$0")" "$@"
