"""One OpenAI endpoint in front of prefill and decode servers."""
