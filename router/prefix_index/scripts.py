"""The index's writes, as Lua on one key each, so that they also run on a cluster. Redis 6.2 or later, or Valkey.

Reads need no script. All scripts may run twice with the same effect. What they find and cannot read counts as absent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

MIN_VERSION: Final = (6, 2)  # HRANDFIELD. Valkey counts on from Redis 7.2


def why_too_old(version: str) -> str | None:
    """Why a server of ``version`` ("7.0.15") cannot hold the index; None when it can, or does not say what it is."""
    parts = version.split(".")[:2]
    if not all(part.isdecimal() for part in parts) or tuple(map(int, parts)) >= MIN_VERSION:
        return None
    return f"version {version} is too old for the prefix index, which needs Redis {MIN_VERSION[0]}.{MIN_VERSION[1]}"


@dataclass(frozen=True, slots=True)
class Script:
    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        # SHA-1 is how the server names scripts; nothing here relies on it being hard to forge.
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


# KEYS: the roster. ARGV: worker id, epoch (zero-padded to one length), lease in ms.
# Returns {number, 1 when it is new}; number 0 when a later epoch of the worker is alive.
# Numbers count up from a start taken from the time in microseconds, so that a server that lost its data gives out
# others than before. They are written with %.0f, because Lua would turn large ones into 1.7e+12.
JOIN = Script("""
local worker, epoch, lease_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local row = string.format('%s:%.0f:%s', epoch, now_ms + lease_ms, worker)
local newest, mine, gone = 0, nil, {}
local rows = redis.call('HGETALL', KEYS[1])
for i = 1, #rows, 2 do
  local number, value = rows[i], rows[i + 1]
  local its_epoch, until_ms, its_worker = string.match(value, '^(%d+):(%d+):(.*)$')
  if number == 'newest' then
    newest = tonumber(value) or 0
  elseif not its_worker or not string.match(number, '^%d+$') or tonumber(number) > 4294967295 then
    gone[#gone + 1] = number
  elseif its_worker == worker and its_epoch == epoch then
    mine = number
  elseif its_worker == worker and its_epoch > epoch and tonumber(until_ms) > now_ms then
    return {0, 0}
  elseif its_worker == worker or tonumber(until_ms) <= now_ms then
    gone[#gone + 1] = number
  end
end
for _, number in ipairs(gone) do redis.call('HDEL', KEYS[1], number) end
if mine then
  redis.call('HSET', KEYS[1], mine, row)
  return {tonumber(mine), 0}
end
if newest <= 0 or newest >= 4294967295 then
  newest = (tonumber(time[1]) * 1000000 + tonumber(time[2])) % 2147483648
end
local number = newest + 1
redis.call('HSET', KEYS[1], 'newest', string.format('%.0f', number), string.format('%.0f', number), row)
return {number, 1}
""")

# KEYS: one root. ARGV: own number and all members' numbers (4 bytes each), newest number given out when the members
# were read, seconds to keep the root, number of stored blocks; then the stored blocks, then the evicted ones.
# A number that is no member and not newer than the member list is dead, and goes wherever it is met. A few fields at
# random are cleaned besides: what a crashed worker left in a busy root goes with that root's own traffic.
UPDATE = Script("""
local root, own, members, newest = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3])
local ttl_s, num_stored = ARGV[4], tonumber(ARGV[5])
local alive = {}
for at = 1, #members, 4 do alive[string.sub(members, at, at + 3)] = true end

-- Of the holders in `value` those who may be alive, without `left_out`.
local function living(value, left_out)
  local kept = {}
  if #value % 4 ~= 0 then value = '' end
  for at = 1, #value, 4 do
    local number = string.sub(value, at, at + 3)
    if number ~= left_out and (alive[number] or struct.unpack('>I4', number) > newest) then
      kept[#kept + 1] = number
    end
  end
  return table.concat(kept)
end

local function put(field, before, after)
  if after == '' then
    redis.call('HDEL', root, field)
  elseif after ~= before then
    redis.call('HSET', root, field, after)
  end
end

local fields = {unpack(ARGV, 6)}
local values = redis.call('HMGET', root, unpack(fields))
for i, field in ipairs(fields) do
  local others = living(values[i] or '', own)
  put(field, values[i], i <= num_stored and others .. own or others)
end
if num_stored > 0 then redis.call('EXPIRE', root, ttl_s) end
local sample = redis.call('HRANDFIELD', root, 8, 'WITHVALUES')
for i = 1, #sample, 2 do put(sample[i], sample[i + 1], living(sample[i + 1])) end
return 1
""")

ALL_SCRIPTS = (JOIN, UPDATE)
