#!/usr/bin/env bash
# The server launcher with tensor parallel size 2; everything else, flags included, is in disagg_vllm_launcher_gaudi_lm.sh.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # called with sh
set -Eeuo pipefail

: "${DISAGG_TENSOR_PARALLEL_SIZE:=2}" # ranks (cards) of each vLLM server; edit for more
export DISAGG_TENSOR_PARALLEL_SIZE
exec bash "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/disagg_vllm_launcher_gaudi_lm.sh" "$@"
