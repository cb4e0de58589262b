# shellcheck shell=bash
# Sourced by the scripts: finds a Python for the launcher, which needs nothing beyond the standard library, and becomes
# it. Which Python the servers run with is the launcher's choice (see --help: DISAGG_PYTHON).

# hand_over PROGRAM ARGUMENTS...: PROGRAM is a file or folder that Python runs.
hand_over() {
  local python
  for python in python3 python3.13 python3.12 python3.11 python3.10 "${DISAGG_PYTHON:-}"; do
    if [[ -n $python ]] && "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info)' >/dev/null 2>&1; then
      exec "$python" "$@"
    fi
  done
  printf '[disagg] error: no Python 3.10 or newer found: install python3, or name one with DISAGG_PYTHON\n' >&2
  exit 1
}
