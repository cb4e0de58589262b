# shellcheck shell=bash
# Library of the launch scripts: settings, device profiles, commands, set-up, preflight, supervision.
# Source it; it only defines functions and tables. Every function that fails says so in one line on stderr.
# Exit codes: 0 success, 1 failure, 2 wrong usage, 129/130/143 ended by HUP/INT/TERM.

HERE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
REPO=$(dirname -- "$HERE")

# One line per setting: flag | value | what it is. The environment variable is DISAGG_ and the name in capitals, the
# key of the profiles the name in capitals: --kv-port, DISAGG_KV_PORT, KV_PORT.
SETTINGS_TABLE=(
  "device|auto, hpu, cuda or cpu|what the vLLM servers run on"
  "backend|lm, redis, shm or nixl|way of the KV: LMCache's server, Redis, shared memory, peer to peer"
  "tensor-parallel-size|N|ranks (cards) of each vLLM server"
  "model|NAME or DIR|Hugging Face name or local directory; needs HF_TOKEN only if it is gated and not local"
  "served-model-name|NAME|name that clients use"
  "max-model-len|N|longest prompt plus answer, in tokens"
  "run-dir|DIR|where logs and summary.json go"
  "proxy-port|PORT|port of the proxy"
  "prefiller-port|PORT|port of the prefill server"
  "decoder-port|PORT|port of the decode server"
  "kv-port|PORT|port of the KV server started here; nixl: of the decoder, one more for each further rank"
  "kv-load|auto, always or never|load KV from the store: auto where it is faster than computing it again"
  "redis-url|URL|use this Redis (redis:// or rediss://) instead of starting one"
  "num-prompts|N|requests of the load; 0: only the correctness probe"
  "input-len|N|prompt tokens of each request"
  "output-len|N|answer tokens of each request"
  "request-rate|R|requests per second"
  "min-reuse-ratio|R|smallest share of prompt tokens that the decoder must reuse"
  "ready-timeout|S|seconds that the vLLM servers get until they answer"
)
SWITCHES_TABLE=(
  "serve|stay up when ready and print a request to try; Ctrl-C ends it"
  "dry-run|print every command with its environment, start nothing"
)

# What makes the two vLLM roles differ.
declare -A KV_ROLE=([prefiller]=kv_producer [decoder]=kv_consumer)
declare -A ROLE_ARGS=([prefiller]="--middleware disagg_prefill_lmcache_v1.kv.visibility.HoldUntilVisible" [decoder]="")

declare -A FLAGS=()       # given on the command line
declare -A PROFILE=()     # from profiles/*.env
declare -A PROFILE_ENV=() # ENV_<NAME> entries of the profiles
declare -A S=()           # resolved settings, by name with underscores
declare -A CARDS=()       # role -> value of the device's visibility variable
EXTRA_ARGS=()             # after --, for both vLLM servers
POSITIONAL=()
CHILD_ENV=()
CHILD_CMD=()

# --- messages -------------------------------------------------------------------------------------------------------

PROGRESS_OPEN=0 # 1 while a live line without newline is on the terminal
PROGRESS_LAST=-10 # so that the first line may come at once

info() {
  progress_end
  printf '[disagg] %s\n' "$*" >&2
}

die() {
  progress_end
  printf '[disagg] error: %s\n' "$*" >&2
  exit 1
}

usage_error() {
  printf '[disagg] usage: %s (see --help)\n' "$*" >&2
  exit 2
}

# progress BEGIN TEXT: a live line on a terminal; elsewhere one line after 5 s and then every 10 s.
progress() {
  local elapsed=$((SECONDS - $1))
  if [[ -t 2 ]]; then
    printf '\r\033[K[disagg] %s: %d s' "$2" "$elapsed" >&2
    PROGRESS_OPEN=1
  elif ((elapsed >= 5 && SECONDS - PROGRESS_LAST >= 10)); then
    printf '[disagg] %s: %d s\n' "$2" "$elapsed" >&2
    PROGRESS_LAST=$SECONDS
  fi
}

progress_end() {
  ((PROGRESS_OPEN)) || return 0
  printf '\n' >&2
  PROGRESS_OPEN=0
}

# --- settings -------------------------------------------------------------------------------------------------------

# print_help SUMMARY
print_help() {
  local row name value text default
  read_profile "$HERE/profiles/common.env"
  printf '%s\n\nEach flag is also an environment variable: --kv-port is DISAGG_KV_PORT. A flag wins over the environment,\n' "$1"
  printf 'the environment over the settings at the top of the script, those over the profile of the device.\n\n'
  for row in "${SETTINGS_TABLE[@]}"; do
    IFS='|' read -r name value text <<<"$row"
    default=${name^^}
    default=${PROFILE[${default//-/_}]:-}
    printf '  --%-36s %s%s\n' "$name $value" "$text" "${default:+ (default: $default)}"
  done
  for row in "${SWITCHES_TABLE[@]}"; do
    IFS='|' read -r name text <<<"$row"
    printf '  --%-36s %s\n' "$name" "$text"
  done
  printf '  --%-36s %s\n  %-38s %s\n\n' help "this text" "-- ARGS" "further arguments of both vLLM servers"
  printf 'Defaults not shown depend on the device: see profiles/hpu.env, cuda.env and cpu.env in\n  %s\n' "$HERE/profiles"
  printf 'Ports by default: proxy %s, prefiller %s, decoder %s, LMCache server %s, Redis %s, shm %s, nixl %s.\n' \
    "${PROFILE[PROXY_PORT]}" "${PROFILE[PREFILLER_PORT]}" "${PROFILE[DECODER_PORT]}" "${PROFILE[KV_PORT_LM]}" \
    "${PROFILE[KV_PORT_REDIS]}" "${PROFILE[KV_PORT_SHM]}" "${PROFILE[KV_PORT_NIXL]}"
  printf 'DISAGG_PYTHON names the Python to use as it is; VLLM_PROGRAM the words that start vLLM, before the model.\n'
}

# setting_kind NAME: prints value or switch; fails for an unknown name.
setting_kind() {
  local row
  for row in "${SETTINGS_TABLE[@]}"; do
    [[ ${row%%|*} != "$1" ]] || { printf value && return 0; }
  done
  for row in "${SWITCHES_TABLE[@]}"; do
    [[ ${row%%|*} != "$1" ]] || { printf switch && return 0; }
  done
  return 1
}

# parse_arguments SUMMARY ARGS...: fills FLAGS, POSITIONAL, EXTRA_ARGS.
parse_arguments() {
  local summary=$1 name value kind
  shift
  while (($#)); do
    case $1 in
      -h | --help)
        print_help "$summary"
        exit 0
        ;;
      --)
        shift
        EXTRA_ARGS=("$@")
        return 0
        ;;
      --*)
        name=${1#--} value=
        [[ $name != *=* ]] || { value=${name#*=} && name=${name%%=*}; }
        kind=$(setting_kind "$name") || usage_error "unknown flag --$name"
        if [[ $kind == switch ]]; then
          [[ $1 != *=* ]] || usage_error "--$name takes no value"
          value=1
        elif [[ $1 != *=* ]]; then
          (($# > 1)) || usage_error "--$name needs a value"
          value=$2
          shift
        fi
        [[ -n $value ]] || usage_error "--$name needs a value that is not empty"
        FLAGS[${name//-/_}]=$value
        ;;
      -*) usage_error "unknown flag $1" ;;
      *) POSITIONAL+=("$1") ;;
    esac
    shift
  done
}

# read_profile FILE: KEY=VALUE lines into PROFILE and PROFILE_ENV. Data only: nothing is executed.
read_profile() {
  local line key value
  [[ -r $1 ]] || die "cannot read the profile $1"
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line#"${line%%[![:space:]]*}"}
    line=${line%"${line##*[![:space:]]}"}
    [[ -n $line && $line != \#* ]] || continue
    [[ $line =~ ^([A-Z][A-Za-z0-9_]*)=(.*)$ ]] || die "$1: this line is not KEY=VALUE: $line"
    key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
    if [[ $value =~ ^\"(.*)\"$ || $value =~ ^\'(.*)\'$ ]]; then value=${BASH_REMATCH[1]}; fi
    if [[ $key == ENV_* ]]; then PROFILE_ENV[${key#ENV_}]=$value; else PROFILE[$key]=$value; fi
  done <"$1"
}

# resolve NAME: flag, then environment, then profile, into S[NAME].
resolve() {
  local name=$1 variable=DISAGG_${1^^}
  S[$name]=${FLAGS[$name]:-${!variable:-${PROFILE[${name^^}]:-}}}
}

# source_of NAME: how a person sets it, for messages.
source_of() {
  local flag=--${1//_/-} variable=DISAGG_${1^^}
  if [[ -z ${FLAGS[$1]:-} && -n ${!variable:-} ]]; then flag=$variable; fi
  printf '%s' "$flag"
}

given() {
  local variable=DISAGG_${1^^}
  [[ -n ${FLAGS[$1]:-}${!variable:-} ]]
}

need_integer() { # NAME LOW HIGH
  local value=${S[$1]}
  if ! [[ $value =~ ^[0-9]{1,9}$ ]] || ((10#$value < $2 || 10#$value > $3)); then
    usage_error "$(source_of "$1") '$value': allowed: a whole number from $2 to $3"
  fi
  S[$1]=$((10#$value))
}

need_number() { # NAME PATTERN ALLOWED
  [[ ${S[$1]} =~ ^[0-9]+(\.[0-9]+)?$ && ${S[$1]} =~ $2 ]] || usage_error "$(source_of "$1") '${S[$1]}': allowed: $3"
}

need_choice() { # NAME CHOICE...
  local name=$1 choice
  shift
  for choice; do [[ ${S[$name]} != "$choice" ]] || return 0; done
  usage_error "$(source_of "$name") '${S[$name]}': allowed: $*"
}

# resolve_settings: fills S from FLAGS, the environment and the profiles, and checks every value.
resolve_settings() {
  local row name other
  read_profile "$HERE/profiles/common.env"
  resolve device
  need_choice device auto hpu cuda cpu
  choose_device
  read_profile "$HERE/profiles/${S[device]}.env"
  for row in "${SETTINGS_TABLE[@]}" "${SWITCHES_TABLE[@]}"; do
    name=${row%%|*} name=${name//-/_}
    [[ $name == device ]] || resolve "$name"
  done

  need_choice backend lm redis shm nixl
  need_choice kv_load auto always never
  need_integer tensor_parallel_size 1 64
  need_integer max_model_len 16 10000000
  need_integer num_prompts 0 1000000
  need_integer input_len 1 10000000
  need_integer output_len 1 10000000
  need_integer ready_timeout 1 86400
  need_number request_rate '[1-9]' 'a number above 0'
  need_number min_reuse_ratio '^(0(\.[0-9]+)?|1(\.0+)?)$' 'a number from 0 to 1'
  for name in serve dry_run; do need_choice "$name" 0 1; done

  S[kv_port]=${S[kv_port]:-${PROFILE[KV_PORT_${S[backend]^^}]}}
  for name in proxy_port prefiller_port decoder_port kv_port; do
    need_integer "$name" 1 65535
    for other in proxy_port prefiller_port decoder_port kv_port; do
      [[ $name == "$other" || ${S[$name]} != "${S[$other]:-}" ]] ||
        usage_error "--${name//_/-} and --${other//_/-} are both ${S[$name]}: four different ports are needed"
    done
  done
  for name in proxy_port prefiller_port decoder_port; do
    ! is_kv_port "${S[$name]}" || usage_error "--${name//_/-} ${S[$name]} is one of the $(kv_ports) ports from" \
      "--kv-port ${S[kv_port]} on, one for each rank of the decoder"
  done
  ((S[kv_port] + $(kv_ports) < 65537)) || usage_error "--kv-port ${S[kv_port]}: $(kv_ports) ports in a row are needed"
  if [[ -n ${S[redis_url]} ]]; then
    [[ ${S[backend]} == redis ]] || usage_error "$(source_of redis_url) goes with --backend redis"
    [[ ${S[redis_url]} =~ ^rediss?://[^[:space:]/]+(/[^[:space:]]*)?$ ]] ||
      usage_error "$(source_of redis_url): allowed: redis:// or rediss://, as in redis://:password@host:6379/0"
  fi

  if [[ ${S[backend]} == shm || ${S[backend]} == nixl ]]; then
    [[ $(kv_size) =~ ^[0-9]{1,12}([kKmMgG][bB]?|[bB])?$ ]] ||
      usage_error "KV_${S[backend]^^}_SIZE '$(kv_size)': allowed: a whole number and a unit, as in 512mb or 2gb"
  fi

  S[run_dir]=${S[run_dir]:-$HERE}
  [[ ${S[run_dir]} == /* ]] || S[run_dir]=$PWD/${S[run_dir]}
  resolve_model
  assign_cards
  choose_python
}

# resolve_model: the model built here when the profile has one and none is asked for; a short name for it.
resolve_model() {
  local model=${S[model]}
  BUILD_MODEL=0
  if [[ -z $model ]]; then
    model=$REPO/.models/${PROFILE[BUILT_MODEL]}
    BUILD_MODEL=1
    S[served_model_name]=${S[served_model_name]:-${PROFILE[BUILT_MODEL]}}
  elif [[ -e $model ]]; then
    [[ -f $model/config.json ]] ||
      usage_error "$(source_of model) '$model': allowed: a Hugging Face name or a directory with a config.json"
    model=$(cd -- "$model" && pwd)
    if [[ $model == "$REPO/.models/${PROFILE[BUILT_MODEL]:-}" ]]; then
      S[served_model_name]=${S[served_model_name]:-${PROFILE[BUILT_MODEL]}}
    fi
  else
    [[ $model =~ ^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$ ]] ||
      usage_error "$(source_of model) '$model': no such directory and not a Hugging Face name (NAME or OWNER/NAME)"
  fi
  S[model]=$model
  S[served_model_name]=${S[served_model_name]:-$model}
}

model_is_local() { ((BUILD_MODEL)) || [[ -d ${S[model]} ]]; }

# --- device ---------------------------------------------------------------------------------------------------------

# list_cards DEVICE: one line per card; nothing if there is no card or no tool that lists them.
list_cards() {
  local -A PROFILE=() PROFILE_ENV=() # read_profile fills these instead of the global ones
  local words
  read_profile "$HERE/profiles/$1.env"
  [[ -n ${PROFILE[LIST_CARDS]:-} ]] || return 0
  read -r -a words <<<"${PROFILE[LIST_CARDS]}"
  command -v "${words[0]}" >/dev/null || return 0
  timeout 30 "${words[@]}" 2>/dev/null </dev/null | grep -E -- "${PROFILE[CARD_ROW]}" || true
}

# choose_device: an explicit device wins; else the first accelerator with a card; else cpu.
# shellcheck disable=SC2034 # DEVICE_REASON is for the scripts
choose_device() {
  local device
  DEVICE_REASON="as asked"
  [[ ${S[device]} == auto ]] || return 0
  for device in hpu cuda; do
    if [[ -n $(list_cards "$device") ]]; then
      S[device]=$device DEVICE_REASON="a card was found"
      return 0
    fi
  done
  S[device]=cpu DEVICE_REASON="hl-smi and nvidia-smi list no card"
}

# assign_cards: CARDS[prefiller], CARDS[decoder]. The first N cards, then the next N, of the visible ones.
assign_cards() {
  local variable=${PROFILE[VISIBLE_DEVICES_VARIABLE]:-} need i cards=() visible
  CARDS=([prefiller]="" [decoder]="")
  CARD_SHARED=0 CARDS_FOUND=-1 CARDS_NEEDED=0
  [[ -n $variable ]] || return 0
  need=$((S[tensor_parallel_size] * PROFILE[CARDS_PER_RANK]))
  CARDS_NEEDED=$((2 * need))
  visible=${!variable:-}
  if [[ -n $visible && $visible != all ]]; then
    IFS=, read -r -a cards <<<"$visible"
    CARDS_FOUND=${#cards[@]}
  else
    CARDS_FOUND=$(list_cards "${S[device]}" | wc -l)
    for ((i = 0; i < CARDS_NEEDED; i++)); do cards+=("$i"); done
  fi
  if [[ -n ${PROFILE[SHARED_GPU_MEMORY_UTILIZATION]:-} ]] && ((CARDS_FOUND == 1 && need == 1)); then
    CARD_SHARED=1
    cards=("${cards[0]}" "${cards[0]}")
  fi
  CARDS[prefiller]=$(join_comma "${cards[@]:0:need}")
  CARDS[decoder]=$(join_comma "${cards[@]:need:need}")
}

join_comma() {
  local IFS=,
  printf '%s' "$*"
}

# --- commands -------------------------------------------------------------------------------------------------------

# program KEY: the words of a program from environment or profile, into CHILD_CMD.
program() {
  local text=${!1:-${PROFILE[$1]}} words word
  case $1=$text in
    VLLM_PROGRAM=module) text='{python} -m vllm.entrypoints.openai.api_server --model' ;;
    VLLM_PROGRAM=vllm) text='vllm serve' ;;
  esac
  read -r -a words <<<"$text"
  CHILD_CMD=()
  for word in "${words[@]}"; do
    word=${word//'{python}'/"$PYTHON"}
    CHILD_CMD+=("${word//'{package}'/"$HERE"}")
  done
}

# add_environment NAME VALUE: the caller's own environment wins over a profile's value.
add_environment() { CHILD_ENV+=("$1=${!1:-$2}"); }

# build_command ROLE: CHILD_CMD and CHILD_ENV of prefiller, decoder, proxy, kv-server, load, calibration or
# model-builder.
build_command() {
  local role=$1 name words
  CHILD_ENV=("PYTHONPATH=$REPO${PYTHONPATH:+:$PYTHONPATH}" "DISAGG_DEVICE=${S[device]}")
  case $role in
    prefiller | decoder) build_vllm_command "$role" ;;
    proxy)
      program PROXY_PROGRAM
      CHILD_CMD+=(--host "${PROFILE[HOST]}" --port "${S[proxy_port]}")
      for name in prefiller decoder; do
        CHILD_CMD+=("--$name-host" "${PROFILE[HOST]}" "--$name-port" "${S[${name}_port]}")
      done
      ;;
    kv-server)
      case ${S[backend]} in
        redis)
          program REDIS_SERVER_PROGRAM
          CHILD_CMD+=(--bind "${PROFILE[HOST]}" --port "${S[kv_port]}" --save '' --appendonly no
            --maxmemory "${REDIS_MAXMEMORY:-${PROFILE[REDIS_MAXMEMORY]}}" --maxmemory-policy allkeys-lru)
          name=$(redis_socket)
          [[ -z $name ]] || CHILD_CMD+=(--unixsocket "$name" --unixsocketperm 700)
          read -r -a words <<<"${PROFILE[REDIS_ARGS]:-}"
          CHILD_CMD+=(${words[@]+"${words[@]}"})
          ;;
        shm)
          program KV_SHM_SERVER_PROGRAM
          CHILD_CMD+=("${PROFILE[HOST]}" "${S[kv_port]}" --size "$(kv_size)")
          ;;
        *)
          program KV_SERVER_PROGRAM
          CHILD_CMD+=("${PROFILE[HOST]}" "${S[kv_port]}")
          ;;
      esac
      ;;
    load)
      program LOAD_PROGRAM
      for name in proxy prefiller decoder; do
        CHILD_CMD+=("--$name-url" "http://${PROFILE[HOST]}:${S[${name}_port]}")
      done
      CHILD_CMD+=(--model "${S[served_model_name]}")
      for name in num_prompts input_len output_len request_rate max_model_len run_dir device backend \
        tensor_parallel_size min_reuse_ratio kv_load; do
        CHILD_CMD+=("--${name//_/-}" "${S[$name]}")
      done
      ;;
    calibration)
      build_command load
      CHILD_CMD+=(--calibrate only)
      ;;
    model-builder)
      program MODEL_BUILDER
      CHILD_CMD+=(--output "${S[model]}")
      ;;
  esac
}

build_vllm_command() {
  local role=$1 port=${S[${1}_port]} name words variable=${PROFILE[VISIBLE_DEVICES_VARIABLE]:-} connector transfer
  connector=${KV_CONNECTOR_MODULE:-${PROFILE[KV_CONNECTOR_MODULE]}}
  # A chunk that cannot be loaded is computed again; vLLM's default is to fail the request.
  printf -v transfer '{"kv_connector":"%s","kv_connector_module_path":"%s","kv_role":"%s",%s,%s}' \
    LMCacheDisaggConnectorV1 "$connector" "${KV_ROLE[$role]}" '"kv_load_failure_policy":"recompute"' \
    "\"kv_connector_extra_config\":{\"discard_partial_chunks\":false,\"lmcache_rpc_port\":\"$role-$port\"}"
  program VLLM_PROGRAM
  CHILD_CMD+=("${S[model]}" --host "${PROFILE[HOST]}" --port "$port" --served-model-name "${S[served_model_name]}"
    --tensor-parallel-size "${S[tensor_parallel_size]}" --max-model-len "${S[max_model_len]}"
    --enable-prompt-tokens-details --kv-transfer-config "$transfer")
  read -r -a words <<<"${PROFILE[VLLM_ARGS]} ${ROLE_ARGS[$role]}"
  CHILD_CMD+=("${words[@]}")
  name=GPU_MEMORY_UTILIZATION
  ((CARD_SHARED == 0)) || name=SHARED_GPU_MEMORY_UTILIZATION
  [[ -z ${PROFILE[$name]:-} ]] || CHILD_CMD+=(--gpu-memory-utilization "${PROFILE[$name]}")
  ((${#EXTRA_ARGS[@]} == 0)) || CHILD_CMD+=("${EXTRA_ARGS[@]}")

  for name in $(printf '%s\n' "${!PROFILE_ENV[@]}" | sort); do add_environment "$name" "${PROFILE_ENV[$name]}"; done
  CHILD_ENV+=("LMCACHE_CONFIG_FILE=$(lmcache_config "$role")")
  CHILD_ENV+=("DISAGG_KV_LOAD=${S[kv_load]}")
  if [[ ${S[backend]} == shm || ${S[backend]} == nixl ]]; then
    CHILD_ENV+=("DISAGG_${S[backend]^^}_URL=$(kv_url)")
    unset LMCACHE_REMOTE_URL # LMCache would use that store too
    if [[ ${S[backend]} == nixl ]]; then
      [[ $role != decoder ]] || CHILD_ENV+=("KV_NIXL_SIZE=$(kv_size)")
      add_environment UCX_NET_DEVICES "${PROFILE[UCX_NET_DEVICES]}"
    fi
  else
    CHILD_ENV+=("LMCACHE_REMOTE_URL=$(kv_url)")
    name=$(redis_socket)
    [[ ${S[backend]} != redis || -z $name ]] || CHILD_ENV+=("DISAGG_REDIS_SOCKET=$name")
  fi
  if model_is_local; then CHILD_ENV+=(HF_HUB_OFFLINE=1); fi
  [[ -z $variable ]] || CHILD_ENV+=("$variable=${CARDS[$role]}")
  [[ $role != prefiller ]] || CHILD_ENV+=("DISAGG_KV_VISIBILITY=@disagg-kv-$port-$$")
}

# redis_socket: where the Redis that is started here listens besides its port: a Unix socket costs less than TCP. Nothing
# where the path would be longer than the kernel takes.
redis_socket() {
  local path=${S[run_dir]}/redis-${S[kv_port]}.sock
  if [[ -z ${S[redis_url]} ]] && ((${#path} < 100)); then printf '%s' "$path"; fi
}

kv_url() {
  if [[ ${S[backend]} == redis ]]; then
    printf '%s' "${S[redis_url]:-redis://${PROFILE[HOST]}:${S[kv_port]}}"
  else
    printf '%s://%s:%s' "${S[backend]}" "${PROFILE[HOST]}" "${S[kv_port]}"
  fi
}

# kv_size: memory of the store, of each rank with nixl.
kv_size() {
  local name=KV_${S[backend]^^}_SIZE
  printf '%s' "${!name:-${PROFILE[$name]}}"
}

# With nixl there is no KV server: every rank of the decoder has a port for the prefiller.
starts_kv_server() { [[ -z ${S[redis_url]} && ${S[backend]} != nixl ]]; }
kv_ports() { if [[ ${S[backend]} == nixl ]]; then printf '%s' "${S[tensor_parallel_size]}"; else printf 1; fi; }
is_kv_port() { (($1 >= S[kv_port] && $1 < S[kv_port] + $(kv_ports))); }

# lmcache_config ROLE: LMCache's settings of a server.
lmcache_config() {
  local name=lmcache-config-${S[backend]}
  [[ ${S[backend]} != nixl ]] || name=lmcache-$1-config
  printf '%s' "${LMCACHE_CONFIG_FILE:-$HERE/configs/$name.yaml}"
}

# Replaces the password in a Redis URL, wherever it stands in a text (a filter).
mask_passwords() { sed -u -E "s#(rediss?://[^:@/ ]*):[^ ,'\"]*@#\1:***@#g; s#([?&]password=)[^& '\"]*#\1***#g"; }

# print_command ROLE TITLE: one comment, then the environment and the command as one line that a shell understands.
print_command() {
  build_command "$1"
  printf '# %s\nenv' "$2"
  printf ' %q' "${CHILD_ENV[@]}" "${CHILD_CMD[@]}" | mask_passwords
  printf '\n'
}

# --- Python and set-up ----------------------------------------------------------------------------------------------

# choose_python: PYTHON and PYTHON_KIND. Looks only; set-up comes later.
#   given   DISAGG_PYTHON                               used as it is
#   active  the active virtual environment
#   system  a python3 that has vLLM and LMCache         used as it is (containers)
#   bundle  the virtual environment in the clone        made by set-up, only for devices that have SETUP_EXTRA
choose_python() {
  PYTHON_KIND=system PYTHON=python3
  if [[ -n ${DISAGG_PYTHON:-} ]]; then
    PYTHON_KIND=given PYTHON=$DISAGG_PYTHON
  elif [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
    PYTHON_KIND=active PYTHON=$VIRTUAL_ENV/bin/python
  elif has_servers python3; then
    PYTHON=$(command -v python3)
  elif [[ -n ${PROFILE[SETUP_EXTRA]:-} ]]; then
    PYTHON_KIND=bundle PYTHON=$REPO/.venv/bin/python
  fi
}

# has_servers PYTHON: whether it finds vLLM (on the cpu device: a CPU build) and LMCache. Imports neither.
has_servers() {
  command -v "$1" >/dev/null && "$1" "$HERE/launch/preflight.py" --has-servers "${S[device]}" >/dev/null 2>&1
}

# setup_python EXTRA: installs an extra of pyproject.toml into PYTHON's environment if that is ours to fill; a stamp makes
# the next call take no time.
setup_python() {
  local extra=$1 stamp log=${S[run_dir]}/setup.log venv
  [[ $PYTHON_KIND == bundle || $PYTHON_KIND == active ]] || return 0
  [[ -n ${PROFILE[SETUP_EXTRA]:-} ]] || return 0 # never install beside an accelerator's own vLLM
  venv=$(dirname -- "$(dirname -- "$PYTHON")")
  if [[ $PYTHON_KIND == active && $1 == "${PROFILE[SETUP_EXTRA]}" && ! -e $venv/.disagg ]]; then
    if has_servers "$PYTHON"; then return 0; fi
    "$PYTHON" "$HERE/launch/preflight.py" --untouched ||
      die "$venv already has a vLLM, LMCache or torch of its own: complete it by hand or deactivate it"
    : >"$venv/.disagg" # filled by set-up from here on, even if this run is interrupted
  fi
  stamp=$venv/.disagg-$extra-$(sha256sum "$REPO/pyproject.toml" | cut -c 1-16)
  [[ ! -f $stamp ]] || return 0
  exec {SETUP_LOCK}<"$REPO/pyproject.toml"
  lock_setup
  if [[ ! -f $stamp ]]; then # another run may just have done it
    info "setting up $venv for '$extra' (first time: a few minutes; log: $log)"
    install_extra "$venv" "$extra" "$log"
    : >"$stamp"
  fi
  exec {SETUP_LOCK}<&-
}

lock_setup() {
  local begin=$SECONDS
  until flock -n "$SETUP_LOCK"; do
    progress "$begin" "waiting for another set-up of this clone"
    ((SECONDS - begin < 1800)) || die "another set-up of $REPO has been running for 30 minutes"
    tick
  done
  progress_end
}

# install_extra VENV EXTRA LOG
install_extra() {
  local venv=$1 extra=$2 log=$3 python=$1/bin/python base pip packages=()
  pip=("$python" -m pip --disable-pip-version-check --no-input)
  if [[ $PYTHON_KIND == bundle ]] && ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_base_python)
    run_step "creating $venv" "$log" "$base" -m venv --clear "$venv"
  fi
  if [[ $extra == "${PROFILE[SETUP_EXTRA]:-}" ]]; then
    # Torch first and alone, what it needs comes with the rest: where this index cannot be reached (a mirror has the
    # CPU build then), every package that is asked through it costs some 8 s of retries.
    "$python" "$HERE/launch/preflight.py" --has-version torch "${PROFILE[SETUP_TORCH]}+cpu" ||
      run_step "installing torch ${PROFILE[SETUP_TORCH]} for CPU" "$log" "${pip[@]}" install --no-deps \
        --extra-index-url https://download.pytorch.org/whl/cpu "torch==${PROFILE[SETUP_TORCH]}+cpu"
  fi
  mapfile -t packages < <("$python" "$HERE/launch/preflight.py" --missing "$extra" || printf 'failed\n')
  [[ ${packages[*]} != *failed* ]] || die "cannot read the extra '$extra' of $REPO/pyproject.toml with $python"
  [[ -z ${packages[*]} ]] || run_step "installing ${packages[*]}" "$log" "${pip[@]}" install "${packages[@]}"
  if [[ $extra == "${PROFILE[SETUP_EXTRA]:-}" ]]; then
    # These come as CUDA builds; with CPU torch their import fails and takes transformers down with it.
    run_step "removing CUDA builds" "$log" "${pip[@]}" uninstall -y torchvision torchaudio torchcodec
  fi
}

# find_base_python: prints a Python that vLLM's CPU build has wheels for and that can make virtual environments.
find_base_python() {
  local candidate found=
  for candidate in ${PROFILE[SETUP_PYTHONS]}; do
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 || continue
    found=$candidate
    "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1 || continue
    command -v "$candidate"
    return 0
  done
  [[ -z $found ]] || die "$found cannot make virtual environments: install python3-venv (apt-get install $found-venv)"
  die "no Python 3.11, 3.12 or 3.13 found: install one, or name it with DISAGG_PYTHON"
}

# build_model: makes the small local model where the profile has one; returns at once when it is there.
build_model() {
  ((BUILD_MODEL)) || return 0
  build_command model-builder
  run_step "building the model ${S[model]}" "${S[run_dir]}/setup.log" env "${CHILD_ENV[@]}" "${CHILD_CMD[@]}"
}

# setup_redis: installs redis-server where that is allowed without a question. Fails with the reason in REDIS_PROBLEM.
# shellcheck disable=SC2034 # REDIS_PROBLEM is for the scripts
setup_redis() {
  local sudo=() log=${S[run_dir]}/setup.log install='apt-get install -y --no-install-recommends redis-server'
  program REDIS_SERVER_PROGRAM
  if command -v "${CHILD_CMD[0]}" >/dev/null; then return 0; fi
  REDIS_PROBLEM="redis-server is missing: install it (apt-get install redis-server), or use --redis-url"
  command -v apt-get >/dev/null || return 1
  if ((EUID != 0)); then
    sudo=(sudo -n)
    sudo -n true 2>/dev/null || return 1
  fi
  # RUNLEVEL=1 keeps the package from starting a server of its own.
  start_child set-up "$log" "${sudo[@]}" env RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive \
    sh -c "$install || { apt-get update && $install; }"
  await_end set-up "installing redis-server" && command -v "${CHILD_CMD[0]}" >/dev/null && return 0
  REDIS_PROBLEM="installing redis-server failed (log: $log): install it by hand, or use --redis-url"
  return 1
}

# --- preflight ------------------------------------------------------------------------------------------------------

PROBLEMS=()
problem() { # once each: two roles may share one
  local line
  for line in ${PROBLEMS[@]+"${PROBLEMS[@]}"}; do [[ $line != "$*" ]] || return 0; done
  PROBLEMS+=("$*")
}

report_problems() {
  local line
  ((${#PROBLEMS[@]})) || return 0
  for line in "${PROBLEMS[@]}"; do printf '[disagg] error: %s\n' "$line" >&2; done
  exit 1
}

# check_machine ROLE...: what can be known before anything is installed. Roles: whose ports and programs matter.
check_machine() {
  local role flag tool key port
  for tool in setsid timeout awk grep sed flock sha256sum; do
    command -v "$tool" >/dev/null || problem "the program $tool is missing: install it"
  done
  if ((CARDS_NEEDED > 0 && CARDS_FOUND < CARDS_NEEDED && CARD_SHARED == 0)); then
    problem "$CARDS_FOUND ${S[device]} card(s) found, $CARDS_NEEDED needed for two servers of" \
      "tensor parallel size ${S[tensor_parallel_size]}: free some, or choose another --device"
  fi
  for role in "$@"; do
    key=
    case $role in
      prefiller | decoder) key=VLLM_PROGRAM ;;
      kv-server)
        case ${S[backend]} in
          lm) key=KV_SERVER_PROGRAM ;;
          shm) key=KV_SHM_SERVER_PROGRAM ;;
        esac
        ;;
      proxy) key=PROXY_PROGRAM ;;
    esac
    if [[ -n $key ]]; then
      program "$key"
      [[ ${CHILD_CMD[0]} == "$PYTHON" ]] || command -v "${CHILD_CMD[0]}" >/dev/null ||
        problem "the program ${CHILD_CMD[0]} is missing: install it, or name another with $key"
    fi
    flag=${role/kv-server/kv}_port
    check_port "${S[$flag]}" "$flag"
    case $role in
      prefiller | decoder)
        [[ -r $(lmcache_config "$role") ]] || problem "cannot read LMCache's settings $(lmcache_config "$role")"
        ;;
    esac
    if [[ $role == decoder && ${S[backend]} == nixl ]]; then
      for ((port = S[kv_port]; port < S[kv_port] + $(kv_ports); port++)); do check_port "$port" kv_port; done
    fi
  done
  if mkdir -p -- "${S[run_dir]}" 2>/dev/null && [[ -w ${S[run_dir]} ]]; then
    check_space "${S[run_dir]}" "${PROFILE[RUN_DIR_GIB]}" "logs and results"
  else
    problem "$(source_of run_dir) '${S[run_dir]}' cannot be written to"
  fi
  if [[ $PYTHON_KIND == bundle && ! -x $PYTHON ]]; then check_space "$REPO" "${PROFILE[SETUP_GIB]}" "set-up"; fi
  check_token
  report_problems
}

check_port() { # PORT SETTING
  ! port_is_listening "$1" || problem "port $1 is used by another program: stop it, or give another $(source_of "$2")"
}

check_space() { # DIR GIB PURPOSE
  local free
  free=$(df -Pk -- "$1" 2>/dev/null | awk 'NR == 2 { print int($4 / 1048576) }') || return 0
  [[ -z $free ]] || ((free >= $2)) || problem "$1 has $free GiB free, $3 need(s) $2 GiB: free some, or use another place"
}

# check_token: a gated model needs a token unless it lies in the cache already.
check_token() {
  local pattern patterns home=${HF_HOME:-${HOME:-}/.cache/huggingface} cache
  cache=${HF_HUB_CACHE:-$home/hub}
  if model_is_local || [[ -n ${HF_TOKEN:-}${HUGGING_FACE_HUB_TOKEN:-} || -s $home/token ]]; then return 0; fi
  [[ ! -d $cache/models--${S[model]/\//--}/snapshots ]] || return 0
  read -r -a patterns <<<"${PROFILE[GATED_MODELS]}"
  for pattern in "${patterns[@]}"; do
    # shellcheck disable=SC2053 # the right side is a pattern on purpose
    [[ ${S[model]} == $pattern ]] || continue
    problem "the model ${S[model]} is gated: set HF_TOKEN to a Hugging Face token with access, or choose another --model"
  done
}

# check_python: modules and versions, and Redis when it is not started here.
check_python() {
  local modules line
  command -v "$PYTHON" >/dev/null || die "the Python $PYTHON is missing: check DISAGG_PYTHON"
  read -r -a modules <<<"${PROFILE[REQUIRED_MODULES]} ${PROFILE[DEVICE_MODULES]:-}"
  [[ ${S[backend]} != nixl ]] || modules+=("${PROFILE[NIXL_MODULES]}")
  while IFS= read -r line; do problem "$line"; done < <(DISAGG_REDIS_URL=${S[redis_url]} \
    "$PYTHON" "$HERE/launch/preflight.py" --device "${S[device]}" --modules "${modules[@]}" 2>&1 || true)
  report_problems
}

# check_redis_answers: PING to the Redis that the servers will use.
check_redis_answers() {
  DISAGG_REDIS_URL=$(kv_url) "$PYTHON" "$HERE/launch/preflight.py" >&2 || die "the KV server cannot be used"
}

# --- ports ----------------------------------------------------------------------------------------------------------

# port_rows PORT: state and inode of each TCP socket on this local port that a loopback server would collide with.
port_rows() {
  local hex
  printf -v hex '%04X' "$1"
  awk -v port="$hex" '
    $2 ~ ":" port "$" && $2 ~ /^(0100007F|00000000|0000000000000000FFFF00000100007F|00000000000000000000000000000000):/ {
      print $4, $10
    }' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true
}

port_is_listening() { [[ $(port_rows "$1") == *"0A "* ]]; }

# settle_kv_port: a port with remains of old connections is left for the next one, or waited out if it was asked for.
# LMCache's server binds without SO_REUSEADDR, so such remains would stop it.
settle_kv_port() {
  local port=${S[kv_port]} begin=$SECONDS rows
  while rows=$(port_rows "$port") && [[ -n $rows ]]; do
    if given kv_port; then
      [[ $rows != *"0A "* ]] || die "port $port is used by another program: stop it, or give another --kv-port"
      ((SECONDS - begin < 70)) || die "port $port still has old connections after 70 s: give another --kv-port"
      progress "$begin" "waiting until old connections on port $port (--kv-port) are gone"
      tick
    else
      port=$((port + 1))
      while [[ $port == "${S[proxy_port]}" || $port == "${S[prefiller_port]}" || $port == "${S[decoder_port]}" ]]; do
        port=$((port + 1))
      done
      ((port < 65536)) || die "no free port found for the KV server: give one with --kv-port"
    fi
  done
  progress_end
  [[ $port == "${S[kv_port]}" ]] || info "KV server takes port $port: ${S[kv_port]} still has old connections"
  S[kv_port]=$port
}

# tcp_answers PORT, http_answers PORT PATH: one quick try.
tcp_answers() { (exec 3<>"/dev/tcp/${PROFILE[HOST]}/$1") 2>/dev/null; }

http_answers() {
  (
    exec 3<>"/dev/tcp/${PROFILE[HOST]}/$1" || exit 1
    printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$2" >&3
    IFS= read -r -t 2 line <&3 || exit 1
    [[ $line == HTTP/1.?\ 200* ]]
  ) 2>/dev/null
}

# port_is_ours PID PORT: whether the listening socket belongs to the child or to one of the stack's processes.
port_is_ours() {
  local inode pid
  inode=$(port_rows "$2" | awk '$1 == "0A" && !seen++ { print $2 }')
  [[ -n $inode ]] || return 0 # cannot be seen here
  for pid in "$1" $(stack_pids); do
    [[ $(readlink /proc/"$pid"/fd/* 2>/dev/null) != *"socket:[$inode]"* ]] || return 0
  done
  return 1
}

# --- supervision ----------------------------------------------------------------------------------------------------

declare -A CHILD_NAME=()  # pid -> name, of the living
declare -A CHILD_LOG=()   # name -> log
declare -A ENDED=()       # name -> exit status, of those that may end
declare -A STACK_GROUP=() # process group -> name
STACK_ID=

# handle_interrupts ARGS...: a script that another one started in the background ignores Ctrl-C's signal and cannot trap
# it; it starts once more with the signal back to normal.
handle_interrupts() {
  local ignored
  ignored=$(awk '$1 == "SigIgn:" { print substr($2, 9) }' /proc/self/status)
  ((16#${ignored:-0} & 2)) && env --default-signal=INT true 2>/dev/null || return 0
  exec env --default-signal=INT bash "$0" "$@"
}

# begin_supervision: from here on every way out ends what was started.
begin_supervision() {
  STACK_ID=$$-$RANDOM$RANDOM
  trap stop_stack EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 141' PIPE
  trap 'exit 143' TERM
}

# start_child NAME LOG COMMAND...: in its own session and process group, marked with DISAGG_STACK_ID. LOG - means: here.
# SPT_NOENV keeps setproctitle from overwriting the environment in which the mark is looked for; pdeathsig ends the child
# when this script is killed in a way that it cannot notice.
start_child() {
  local name=$1 log=$2 detach=(setsid)
  shift 2
  ! command -v setpriv >/dev/null || detach+=(setpriv --pdeathsig TERM)
  if [[ $log == - ]]; then
    env DISAGG_STACK_ID="$STACK_ID" SPT_NOENV=1 "${detach[@]}" "$@" </dev/null &
  else
    env DISAGG_STACK_ID="$STACK_ID" SPT_NOENV=1 "${detach[@]}" "$@" </dev/null >"$log" 2>&1 &
  fi
  CHILD_PID=$!
  CHILD_NAME[$CHILD_PID]=$name CHILD_LOG[$name]=$log STACK_GROUP[$CHILD_PID]=$name
}

# tick: a short pause. The group keeps bash's own notices about killed jobs off the terminal.
tick() { { sleep 0.2 || true; :; } 2>/dev/null; }

# check_children [NAME]: ends the stack if a child is dead; NAME alone may end, its status goes to ENDED.
check_children() {
  local pid name status
  for pid in "${!CHILD_NAME[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then continue; fi
    name=${CHILD_NAME[$pid]} status=0
    wait "$pid" || status=$?
    unset "CHILD_NAME[$pid]"
    kill -0 -- "-$pid" 2>/dev/null || unset "STACK_GROUP[$pid]"
    ENDED[$name]=$status
    [[ $name == "${1:-}" ]] || report_death "$name" "$status"
  done
}

report_death() { # NAME STATUS
  local how="ended with exit status $2"
  (($2 <= 128)) || how="was killed by signal $(kill -l "$2" 2>/dev/null || printf '%s' "$2")"
  show_tail "$1"
  die "$1 $how: the example ends (log: ${CHILD_LOG[$1]})"
}

show_tail() {
  [[ -s ${CHILD_LOG[$1]} ]] || return 0
  progress_end
  printf '[disagg] last lines of %s:\n' "${CHILD_LOG[$1]}" >&2
  tail -n 15 -- "${CHILD_LOG[$1]}" | awk '{ print "    " $0 }' >&2
}

# await_ready SECONDS NAME:PID:PORT:PATH...: until every server answers (PATH empty: a TCP connect is enough).
await_ready() {
  local timeout=$1 begin=$SECONDS target name pid port path pending=() left
  shift
  pending=("$@")
  while ((${#pending[@]})); do
    check_children
    left=()
    for target in "${pending[@]}"; do
      IFS=: read -r name pid port path <<<"$target"
      if { [[ -n $path ]] && http_answers "$port" "$path"; } || { [[ -z $path ]] && tcp_answers "$port"; }; then
        check_children
        port_is_ours "$pid" "$port" || die "port $port is answered by another program, not by the $name started here"
        info "$name is ready on port $port${path:+ ($path)} after $((SECONDS - begin)) s"
      else
        left+=("$target")
      fi
    done
    pending=("${left[@]+"${left[@]}"}")
    ((${#pending[@]})) || break
    if ((SECONDS - begin >= timeout)); then
      name=${pending[0]%%:*}
      show_tail "$name"
      die "$name was not ready after $timeout s (log: ${CHILD_LOG[$name]})"
    fi
    name=${pending[*]%%:*}
    progress "$begin" "waiting for ${name// /, } (at most $timeout s)"
    tick
  done
}

# await_end NAME [TEXT]: until the child NAME ends; its status is the result. Another child's death ends the stack.
await_end() {
  local begin=$SECONDS
  unset "ENDED[$1]"
  while check_children "$1" && [[ -z ${ENDED[$1]:-} ]]; do
    [[ -z ${2:-} ]] || progress "$begin" "$2"
    tick
  done
  return "${ENDED[$1]}"
}

# run_step TEXT LOG COMMAND...: a command of the set-up, supervised, with a progress line.
run_step() {
  local text=$1 log=$2
  shift 2
  start_child set-up "$log" "$@"
  await_end set-up "$text" && { progress_end && return 0; }
  show_tail set-up
  die "$text failed (log: $log)"
}

# stack_pids: every process with this stack's mark, however it changed its group or parent.
stack_pids() {
  [[ -n $STACK_ID ]] || return 0
  { grep -lsaF "DISAGG_STACK_ID=$STACK_ID" /proc/[0-9]*/environ || true; } | cut -d/ -f3
}

# stack_is_alive: whether any of it runs. Zombies do not count: in a container nothing may ever collect them.
stack_is_alive() {
  local group groups=' '
  for group in "${!STACK_GROUP[@]}"; do
    if kill -0 -- "-$group" 2>/dev/null; then
      groups+="$group "
    elif kill -0 "$group" 2>/dev/null && [[ -n ${CHILD_NAME[$group]:-} ]]; then
      return 0 # not yet in its own group
    fi
  done
  # cat fails when a process ends meanwhile.
  if [[ $groups != ' ' ]] && { cat /proc/[0-9]*/stat 2>/dev/null || true; } | awk -v groups="$groups" '
    { sub(/^.*\) /, ""); if ($1 != "Z" && $1 != "X" && index(groups, " " $3 " ")) found = 1 }
    END { exit !found }'; then
    return 0
  fi
  [[ -n $(stack_pids) ]]
}

# signal_stack SIGNAL: to every group and to whatever has left its group.
signal_stack() {
  local pid
  for pid in "${!STACK_GROUP[@]}"; do
    kill -"$1" -- "-$pid" 2>/dev/null || { [[ -n ${CHILD_NAME[$pid]:-} ]] && kill -"$1" "$pid" 2>/dev/null; }
  done
  for pid in $(stack_pids); do kill -"$1" "$pid" 2>/dev/null; done
}

# kill_workers: KILL to all but Python's resource trackers. Those end by themselves once the others are dead, and free
# the shared memory (hundreds of MB) that these had no time to free.
kill_workers() {
  local pid
  for pid in $(stack_pids) "${!STACK_GROUP[@]}"; do
    [[ $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") == *multiprocessing.resource_tracker* ]] || kill -KILL "$pid"
  done 2>/dev/null
}

# stack_is_gone SECONDS: waits that long for the end of all.
stack_is_gone() {
  local begin=$SECONDS
  while stack_is_alive; do
    ((SECONDS - begin < $1)) || return 1
    progress "$begin" "ending all servers"
    tick
  done
}

# stop_stack: the EXIT trap. TERM, a grace period, KILL; the exit status stays.
stop_stack() {
  local status=$?
  trap - EXIT ERR
  trap '' INT TERM HUP PIPE
  set +e
  progress_end
  if stack_is_alive; then
    signal_stack TERM
    stack_is_gone "${PROFILE[STOP_GRACE]}" || { kill_workers || :; stack_is_gone 3; } ||
      { signal_stack KILL || :; stack_is_gone 10; } || info "could not be ended: $(stack_pids | tr '\n' ' ')"
    progress_end
  fi
  exit "$status"
}
