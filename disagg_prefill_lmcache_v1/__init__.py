"""Disaggregated prefill with vLLM and LMCache: launch scripts, proxy, KV connector and checks."""
