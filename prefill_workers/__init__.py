"""Workers that compute prompts in chunks, emit the first token, and keep the KV until its reader has it."""
