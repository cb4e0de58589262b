"""Settings, command lines, set-up, preflight and supervision of the stack."""
