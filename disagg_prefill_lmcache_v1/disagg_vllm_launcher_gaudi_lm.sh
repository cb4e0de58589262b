#!/usr/bin/env bash
# Starts one server of the disaggregated prefill example in the foreground.
#
#   bash disagg_vllm_launcher_gaudi_lm.sh prefiller|decoder|proxy|kv-server [model] [flags] [-- vLLM arguments]
#
# Start the KV server first: vLLM would serve without any reuse if it found none. Flags: --help.
set -Eeuo pipefail

# Settings to edit; empty: the default. An environment variable of the same name or a flag wins.
: "${DISAGG_BACKEND:=}"              # lm (LMCache's own server), redis, shm or nixl
: "${DISAGG_TENSOR_PARALLEL_SIZE:=}" # ranks (cards) of each vLLM server
: "${DISAGG_MODEL:=}"                # Hugging Face name or local directory

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

main() {
  local role
  parse_arguments "Starts one server: disagg_vllm_launcher_gaudi_lm.sh prefiller|decoder|proxy|kv-server [model] [flags]" "$@"
  role=${POSITIONAL[0]:-}
  case $role in
    prefiller | decoder | proxy | kv-server) ;;
    '') usage_error "name a server: prefiller, decoder, proxy or kv-server" ;;
    *) usage_error "unknown server '$role': allowed: prefiller, decoder, proxy, kv-server" ;;
  esac
  ((${#POSITIONAL[@]} <= 2)) || usage_error "unexpected argument '${POSITIONAL[2]}'"
  [[ -z ${POSITIONAL[1]:-} ]] || FLAGS[model]=${POSITIONAL[1]}
  resolve_settings
  if ((S[dry_run])); then
    print_command "$role" "$role"
    return
  fi
  # The example has made all checks and preparations before it starts a server.
  [[ -n ${DISAGG_PREPARED:-} ]] || prepare "$role"
  run_server "$role"
}

# prepare ROLE: checks and set-up for a server that is started by hand.
prepare() {
  begin_supervision
  check_machine "$1"
  setup_python "${PROFILE[SETUP_EXTRA]:-}"
  check_python
  case $1 in
    prefiller | decoder)
      build_model
      ! starts_kv_server || tcp_answers "${S[kv_port]}" ||
        die "no KV server answers on port ${S[kv_port]}: start one first (kv-server), or give its --kv-port or --redis-url"
      ;;
    kv-server)
      [[ ${S[backend]} != nixl ]] || die "with --backend nixl there is no KV server to start: the decoder receives"
      starts_kv_server || die "with --redis-url there is no KV server to start"
      [[ ${S[backend]} != redis ]] || setup_redis || die "$REDIS_PROBLEM"
      settle_kv_port
      ;;
  esac
  trap - EXIT HUP INT PIPE TERM
}

# run_server ROLE: becomes the server.
run_server() {
  build_command "$1"
  # Servers that share this directory (a process that imported LMCache has it set) would each report the sum of all.
  unset PROMETHEUS_MULTIPROC_DIR
  export "${CHILD_ENV[@]}"
  if [[ ${S[redis_url]} == *[@?]* ]]; then
    # LMCache writes its settings, the URL among them, to its log.
    exec > >(trap '' TERM INT && mask_passwords) 2>&1
  fi
  exec "${CHILD_CMD[@]}"
}

# exit on the same line: bash reads a script while it runs, and this one may be edited meanwhile
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; exit; fi
