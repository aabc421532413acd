"""Workers that reserve, pull KV, and decode in continuous batches; short suffixes they prefill themselves."""
