"""The stack's servers as files for those who run them elsewhere: Kubernetes, compose, systemd."""
