/* XXH3 with 128 bits over the bytes of a block, taken while they are copied: what was just read is still in the cache.
 *
 * The algorithm is that of inputs longer than 240 bytes in the specification (xxHash, doc/xxhash_spec.md), with its
 * default secret and seed 0, so that any xxHash library computes the same. The input may lie in several segments.
 */
#include "streaming.h"

enum {
    STRIPE = 64, /* bytes that are accumulated at once, eight in each of eight lanes */
    PARTS = STRIPE / VECTOR_BYTES,
    STRIPES_PER_BLOCK = 16,
    LONG_INPUT = 241,
};

typedef uint64_t part __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t loose_part __attribute__((vector_size(VECTOR_BYTES), aligned(1), may_alias));

static const uint64_t PRIME32_1 = 0x9E3779B1, PRIME32_2 = 0x85EBCA77, PRIME32_3 = 0xC2B2AE3D;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87, PRIME64_2 = 0xC2B2AE3D27D4EB4F, PRIME64_3 = 0x165667B19E3779F9;
static const uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63, PRIME64_5 = 0x27D4EB2F165667C5;

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

/* What is added up over a block of stripes. */
struct sums {
    part products[PARTS];
    part data[PARTS]; /* count in the neighbouring lanes */
};

struct hash {
    struct sums sums;
    int64_t num_stripes;  /* accumulated so far */
    int64_t stripes_left; /* the last 1 to 64 bytes of the input are none */
    int64_t num_pending;  /* bytes of a stripe that continues in the next segment */
    uint8_t pending[STRIPE];
    uint8_t last[STRIPE]; /* of the input so far */
};

static struct hash hash_begin(int64_t num_bytes) {
    const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    struct hash hash = {.stripes_left = (num_bytes - 1) / STRIPE};
    memcpy(hash.sums.products, start, sizeof start);
    return hash;
}

INLINE part load_part(const uint8_t *source, int n) { return *(const loose_part *)(source + n * VECTOR_BYTES); }

/* The lower half of each lane times its upper half. */
INLINE part product_of_halves(part key) {
#if defined(__AVX512F__)
    return (part)_mm512_mul_epu32((__m512i)key, (__m512i)(key >> 32));
#elif defined(__AVX2__)
    return (part)_mm256_mul_epu32((__m256i)key, (__m256i)(key >> 32));
#elif defined(__SSE2__)
    return (part)_mm_mul_epu32((__m128i)key, (__m128i)(key >> 32));
#else
    return (key & 0xFFFFFFFF) * (key >> 32);
#endif
}

INLINE void accumulate(struct sums *sums, const uint8_t *input, const uint8_t *secret) {
    for (int n = 0; n < PARTS; n++) {
        part data = load_part(input, n);
        sums->data[n] += data;
        sums->products[n] += product_of_halves(data ^ load_part(secret, n));
    }
}

/* Let the data count in the neighbouring lanes. */
INLINE void join(struct sums *sums) {
    for (int n = 0; n < PARTS; n++) {
        part data = sums->data[n], swapped;
        for (int lane = 0; lane < VECTOR_BYTES / 8; lane++) swapped[lane] = data[lane ^ 1];
        sums->products[n] += swapped;
        sums->data[n] = (part){0};
    }
}

INLINE void scramble(struct sums *sums) {
    join(sums);
    for (int n = 0; n < PARTS; n++) {
        part value = sums->products[n];
        value ^= (value >> 47) ^ load_part(SECRET + sizeof SECRET - STRIPE, n);
        sums->products[n] = value * PRIME32_1;
    }
}

static void hash_stripes(struct hash *hash, const uint8_t *input, int64_t count) {
    struct sums sums = hash->sums;
    int64_t in_block = hash->num_stripes % STRIPES_PER_BLOCK;
    for (int64_t n = 0; n < count; n++) {
        __builtin_prefetch(input + n * STRIPE + PAGE); /* across its end the CPU does not look ahead */
        accumulate(&sums, input + n * STRIPE, SECRET + 8 * in_block);
        if (++in_block < STRIPES_PER_BLOCK) continue;
        scramble(&sums);
        in_block = 0;
    }
    hash->sums = sums;
    hash->num_stripes += count;
    hash->stripes_left -= count;
}

/* The next segment of the input. */
static void hash_segment(struct hash *hash, const uint8_t *input, int64_t num_bytes) {
    int64_t num_new = smaller(num_bytes, STRIPE);
    memmove(hash->last, hash->last + num_new, STRIPE - num_new);
    memcpy(hash->last + STRIPE - num_new, input + num_bytes - num_new, num_new);
    if (hash->num_pending) {
        int64_t missing = smaller(STRIPE - hash->num_pending, num_bytes);
        memcpy(hash->pending + hash->num_pending, input, missing);
        hash->num_pending += missing;
        input += missing;
        num_bytes -= missing;
        if (hash->num_pending < STRIPE || !hash->stripes_left) return;
        hash_stripes(hash, hash->pending, 1);
    }
    int64_t count = smaller(num_bytes / STRIPE, hash->stripes_left);
    hash_stripes(hash, input, count);
    hash->num_pending = smaller(num_bytes - count * STRIPE, STRIPE); /* 64 at the very end only */
    memcpy(hash->pending, input + count * STRIPE, hash->num_pending);
}

INLINE uint64_t fold_product(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t merge(const uint64_t sums[8], const uint8_t *secret, uint64_t start) {
    uint64_t keys[8];
    memcpy(keys, secret, sizeof keys);
    for (int lane = 0; lane < 8; lane += 2)
        start += fold_product(sums[lane] ^ keys[lane], sums[lane + 1] ^ keys[lane + 1]);
    start = (start ^ (start >> 37)) * 0x165667919E3779F9;
    return start ^ (start >> 32);
}

INLINE void store_big_endian(uint8_t *target, uint64_t value) {
    for (int byte = 0; byte < 8; byte++) target[byte] = (uint8_t)(value >> (56 - 8 * byte));
}

/* The digest, 16 bytes, of an input of num_bytes in all. */
static void hash_end(struct hash *hash, int64_t num_bytes, uint8_t *digest) {
    accumulate(&hash->sums, hash->last, SECRET + sizeof SECRET - STRIPE - 7);
    join(&hash->sums);
    uint64_t sums[8];
    memcpy(sums, hash->sums.products, sizeof sums);
    store_big_endian(digest, merge(sums, SECRET + sizeof SECRET - STRIPE - 11, ~((uint64_t)num_bytes * PRIME64_2)));
    store_big_endian(digest + 8, merge(sums, SECRET + 11, (uint64_t)num_bytes * PRIME64_1));
}

/* Fingerprint of a prefix and the segments sources[n] of sizes[n] bytes, one after the other; with targets, each
 * segment is copied to targets[n] on the way. Returns 0, or -1 without having done anything if there are not as many
 * bytes as the algorithm for long inputs takes.
 */
int fingerprint(const uint8_t *prefix, int64_t prefix_bytes, const uint8_t *const *sources, uint8_t *const *targets,
                const int64_t *sizes, int64_t num_segments, uint8_t *digest) {
    int64_t num_bytes = prefix_bytes;
    for (int64_t n = 0; n < num_segments; n++) num_bytes += sizes[n];
    if (num_bytes < LONG_INPUT) return -1;
    struct hash hash = hash_begin(num_bytes);
    hash_segment(&hash, prefix, prefix_bytes);
    for (int64_t n = 0; n < num_segments; n++) {
        for (int64_t first = 0; first < sizes[n]; first += STREAM_CHUNK) {
            int64_t count = smaller(STREAM_CHUNK, sizes[n] - first);
            if (targets) stream_chunk((char *)targets[n] + first, (const char *)sources[n] + first, count);
            hash_segment(&hash, sources[n] + first, count);
        }
    }
    stream_end();
    hash_end(&hash, num_bytes, digest);
    return 0;
}
