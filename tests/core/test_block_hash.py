"""Block identity: the same bytes everywhere and for ever, and different whenever anything that matters differs."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import pytest

from eagleray.core.block_hash import DIGEST_BYTES, BlockHash, HashNamespace, extend_block_hashes, hash_blocks

NAMESPACE = HashNamespace(model="model-1", block_size_tokens=4, kv_format="format-1")
ROOT_DIGEST = "1077b8cf9f192b3edc151411fd89f367"
TENANT_DIGESTS = ["49699b227d8c39413eb2914868d7f1d2", "e058e000af45f702cce290f67de45aaf"]  # of tokens 0 to 8


def digests(token_ids: list[int], namespace: HashNamespace = NAMESPACE, tenant_salt: str = "") -> list[BlockHash]:
    return hash_blocks(namespace.root(tenant_salt), token_ids, namespace.block_size_tokens)


def test_digests_are_those_that_earlier_versions_wrote_into_the_index() -> None:
    assert NAMESPACE.root().hex() == ROOT_DIGEST
    assert [digest.hex() for digest in digests(list(range(9)), tenant_salt="tenant")] == TENANT_DIGESTS


def test_another_process_computes_the_same_digests() -> None:
    program = (
        "from eagleray.core.block_hash import HashNamespace, hash_blocks\n"
        "namespace = HashNamespace('model-1', 4, 'format-1')\n"
        "print(*(digest.hex() for digest in hash_blocks(namespace.root('tenant'), list(range(9)), 4)))\n"
    )
    run = [sys.executable, "-c", program]
    printed = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.split() == TENANT_DIGESTS


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (9, 2)])
def test_only_full_blocks_have_a_hash(num_tokens: int, num_blocks: int) -> None:
    hashes = digests(list(range(num_tokens)))
    assert len(hashes) == num_blocks
    assert all(len(digest) == DIGEST_BYTES for digest in hashes)


def test_a_changed_token_changes_its_block_and_all_after_it_and_none_before() -> None:
    original = list(range(16))
    changed = [*original]
    changed[5] = 99
    same = [mine == theirs for mine, theirs in zip(digests(original), digests(changed), strict=True)]
    assert same == [True, False, False, False]


def test_equal_tokens_at_another_depth_of_the_chain_are_another_block() -> None:
    assert len(set(digests([1, 2, 3, 4] * 3))) == 3


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(HashNamespace)])
def test_every_field_of_the_namespace_enters_the_root(field: str) -> None:
    other = 8 if field == "block_size_tokens" else "other"
    assert dataclasses.replace(NAMESPACE, **{field: other}).root() != NAMESPACE.root()


def test_tenants_share_no_block_unless_they_share_a_salt() -> None:
    tokens = list(range(8))
    assert not set(digests(tokens, tenant_salt="a")) & {*digests(tokens, tenant_salt="b"), *digests(tokens)}
    assert digests(tokens, tenant_salt="a") == digests(tokens, tenant_salt="a")


def test_text_that_moves_between_fields_makes_another_root() -> None:
    """Lengths are hashed too: "ab" + "c" is not "a" + "bc"."""
    first = HashNamespace("m", 4, "f", draft="ab", adapter="c")
    second = HashNamespace("m", 4, "f", draft="a", adapter="bc")
    assert first.root() != second.root()


def test_extending_while_tokens_come_equals_hashing_them_at_once() -> None:
    chance = random.Random(1)
    tokens = [chance.randrange(2**40) for _ in range(50)]
    grown: list[BlockHash] = []
    for end in [*sorted(chance.choices(range(51), k=12)), 50]:
        extend_block_hashes(grown, NAMESPACE.root(), tokens[:end], 4)
    assert grown == digests(tokens)
