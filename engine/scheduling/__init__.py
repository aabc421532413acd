"""Decisions of one engine: which tokens of which requests a step computes, and which KV blocks they use. No torch."""
