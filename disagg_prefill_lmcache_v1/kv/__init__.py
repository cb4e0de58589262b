"""vLLM's side: the KV connector, what it copies, when a prefill may be answered."""
