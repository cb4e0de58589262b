"""The load, the correctness probe and the summary, over HTTP alone."""
