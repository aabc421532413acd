from __future__ import annotations

from eagleray.kv_transfer.fingerprint import fingerprint


def test_it_is_the_same_in_every_process_and_release() -> None:
    digest = fingerprint("layout", [memoryview(b"keys"), memoryview(b"values")])
    assert digest.hex() == "6be8eefd2cec87c892b5967e912f0f14"


def test_every_byte_and_the_layout_count() -> None:
    block = bytearray(4096)
    whole = fingerprint("a", [memoryview(block)])
    assert fingerprint("b", [memoryview(block)]) != whole
    for position in (0, 2048, 4095):
        block[position] ^= 1
        assert fingerprint("a", [memoryview(block)]) != whole
        block[position] ^= 1
    assert fingerprint("a", [memoryview(block)]) == whole
