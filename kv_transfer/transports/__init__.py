"""Ways to move the bytes of blocks. All pass ``tests/contracts/test_transports.py``."""
