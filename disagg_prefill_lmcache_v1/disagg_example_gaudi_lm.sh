#!/usr/bin/env bash
# Runs the disaggregated prefill example: a KV server, a prefill and a decode vLLM server, the proxy, a load with a
# correctness probe, a summary. Leaves nothing running.
#
#   bash disagg_example_gaudi_lm.sh [flags] [-- vLLM arguments]      flags: --help
#
# Logs beside this script (or in --run-dir): kv_server.log, prefiller.log, decoder.log, proxy.log; result: summary.json.
set -Eeuo pipefail

# Settings to edit; empty: the default. An environment variable of the same name or a flag wins.
: "${DISAGG_BACKEND:=}"              # lm (LMCache's own server), redis, shm or nixl
: "${DISAGG_TENSOR_PARALLEL_SIZE:=}" # ranks (cards) of each vLLM server
: "${DISAGG_MODEL:=}"                # Hugging Face name or local directory

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

main() {
  handle_interrupts "$@"
  parse_arguments "Runs the disaggregated prefill example: disagg_example_gaudi_lm.sh [flags] [-- vLLM arguments]" "$@"
  ((${#POSITIONAL[@]} == 0)) || usage_error "unexpected argument '${POSITIONAL[0]}'"
  resolve_settings
  ((S[input_len] + S[output_len] <= S[max_model_len])) ||
    usage_error "--input-len ${S[input_len]} plus --output-len ${S[output_len]} is more than --max-model-len ${S[max_model_len]}"
  if ((S[dry_run])); then
    dry_run
    return
  fi
  begin_supervision
  prepare
  start_servers
  if ((S[serve])); then serve; else measure; fi
}

dry_run() {
  local role
  ((BUILD_MODEL == 0)) || print_command model-builder model
  ! starts_kv_server || print_command kv-server "kv-server (log: ${S[run_dir]}/kv_server.log)"
  for role in prefiller decoder proxy; do print_command "$role" "$role (log: ${S[run_dir]}/$role.log)"; done
  if ((S[serve] == 0)); then
    print_command load load
  elif [[ ${S[kv_load]} == auto ]]; then
    print_command calibration "calibration (log: ${S[run_dir]}/calibration.log)"
  fi
}

prepare() {
  local roles=(prefiller decoder proxy)
  info "device ${S[device]} ($DEVICE_REASON), backend ${S[backend]}, tensor parallel size ${S[tensor_parallel_size]}," \
    "model ${S[served_model_name]}"
  ((CARD_SHARED == 0)) || info "one card for both servers: each takes ${PROFILE[SHARED_GPU_MEMORY_UTILIZATION]} of its memory"
  ! starts_kv_server || roles+=(kv-server)
  check_machine "${roles[@]}"
  rm -f -- "${S[run_dir]}/summary.json" # an old one would pass for this run's
  setup_python "${PROFILE[SETUP_EXTRA]:-}"
  check_python
  [[ ${S[backend]} != redis || -n ${S[redis_url]} ]] || setup_redis || die "$REDIS_PROBLEM"
  build_model
}

# launch ROLE LOG: one server through the launcher script, with the settings found here.
launch() {
  local flags=() name
  for name in device backend tensor_parallel_size model served_model_name max_model_len run_dir proxy_port \
    prefiller_port decoder_port kv_port kv_load; do
    flags+=("--${name//_/-}" "${S[$name]}")
  done
  # The URL goes through the environment: a command line can be read by everyone on the machine.
  start_child "$1" "${S[run_dir]}/$2" env DISAGG_PREPARED=1 DISAGG_PYTHON="$PYTHON" DISAGG_REDIS_URL="${S[redis_url]}" \
    bash "$HERE/disagg_vllm_launcher_gaudi_lm.sh" "$1" "${flags[@]}" -- ${EXTRA_ARGS[@]+"${EXTRA_ARGS[@]}"}
}

start_servers() {
  local role servers=() first=prefiller second=decoder proxy
  if starts_kv_server; then
    settle_kv_port
    launch kv-server kv_server.log
    await_ready "${PROFILE[KV_READY_TIMEOUT]}" "kv-server:$CHILD_PID:${S[kv_port]}:"
    [[ ${S[backend]} != redis ]] || check_redis_answers
  fi
  [[ ${S[backend]} != nixl ]] || first=decoder second=prefiller # which waits for the decoder
  for role in "$first" "$second"; do
    launch "$role" "$role.log"
    servers+=("$role:$CHILD_PID:${S[${role}_port]}:/health")
    # Servers on one card size their memory by what is free, so the second must come after the first.
    [[ $CARD_SHARED == 0 || $role == "$second" ]] || await_ready "${S[ready_timeout]}" "${servers[0]}"
  done
  launch proxy proxy.log
  proxy=proxy:$CHILD_PID:${S[proxy_port]}
  await_ready "${PROFILE[PROXY_READY_TIMEOUT]}" "$proxy:/health"
  await_ready "${S[ready_timeout]}" "${servers[@]}"
  await_ready "${PROFILE[PROXY_READY_TIMEOUT]}" "$proxy:/ready" # it has noticed both
  check_lmcache
}

# check_lmcache: LMCache goes on without any reuse when it cannot work; the example must not.
check_lmcache() {
  local role
  for role in prefiller decoder; do
    if grep -qsiE 'LMCache is unhealthy|degraded mode|Failed to initialize .*remote' -- "${S[run_dir]}/$role.log"; then
      show_tail "$role"
      die "LMCache in the $role works without its KV store (log: ${S[run_dir]}/$role.log)"
    fi
  done
}

# calibrate: lets the decoder learn how fast it computes, so that the first request is already decided by measurements.
calibrate() {
  [[ ${S[kv_load]} == auto ]] || return 0
  build_command calibration
  run_step "measuring how fast the decoder computes" "${S[run_dir]}/calibration.log" env "${CHILD_ENV[@]}" "${CHILD_CMD[@]}"
}

serve() {
  calibrate
  info "ready. Try:"
  printf "curl http://%s:%s/v1/completions -H 'Content-Type: application/json' -d '%s'\n" "${PROFILE[HOST]}" \
    "${S[proxy_port]}" "{\"model\": \"${S[served_model_name]}\", \"prompt\": \"Once upon a time\", \"max_tokens\": 16}"
  info "logs: ${S[run_dir]}; Ctrl-C ends everything"
  while check_children; do tick; done
}

measure() {
  local status=0
  build_command load
  start_child load - env "${CHILD_ENV[@]}" "${CHILD_CMD[@]}"
  await_end load || status=$?
  ((status == 0)) || die "the load or the correctness probe failed (exit status $status; logs: ${S[run_dir]})"
  check_lmcache
  info "done; logs and summary.json: ${S[run_dir]}"
}

# exit on the same line: bash reads a script while it runs, and this one may be edited meanwhile
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; exit; fi
