/* Which tokens of a row top-k and top-p keep: from the best one down to a last one, in the order of score and then of
 * lower token.
 *
 * Scores are 0 for the best token and less for the others. Tokens are counted in buckets of like scores; only the
 * bucket in which the last one lies is sorted.
 */
#pragma once

#include <stdlib.h>

#include "vectors.h"

enum {
    BLOCK = 256, /* tokens that are looked at together; what is computed of them stays in the first-level cache */
    BUCKETS = 2048,
    BUCKETS_PER_UNIT = 64, /* the last bucket takes all that is 32 or more below the best */
    WEIGHT_BITS = 40,
};

static const float LEAST_SCORE = -28.0f; /* e^-28 < 2^-40: from here on the weight is 0 */

/* The logits of one row. */
struct row {
    const float *logits;
    int64_t size;
    float maximum, temperature;
};

/* What is kept: scores above the lowest, and of the lowest the tokens up to the last. */
struct limit {
    float lowest;
    int64_t last_token;
};

struct bucket {
    int64_t count, mass;
};

/* Scores of count tokens from first on. */
INLINE void row_scores(const struct row *row, int64_t first, int64_t count, float *scores) {
    for (int64_t i = 0; i < count; i++) scores[i] = (row->logits[first + i] - row->maximum) / row->temperature;
}

/* 2^40 e^score, about, by integers alone: see weights_of in reference.py, which it equals. With 2^56 times
 * x = -score log2(e) = n + f, the power 2^-f is a polynomial in f - 1/2.
 */
INLINE int64_t weight_of(float score) {
    static const int64_t series[8] = {3037000500, -2105088334, 729568022, -168566006,
                                      29210263, -4049402, 467805, -46323};
    float kept = score > LEAST_SCORE ? score : LEAST_SCORE;
    int64_t x = (int64_t)(int32_t)(kept * -0x1p24f) * 6196328019;
    int64_t f = ((x >> 26) & 0x3FFFFFFF) - 0x20000000, power = series[7];
    for (int n = 6; n >= 0; n--) power = series[n] + ((power * f) >> 30);
    return (power << (WEIGHT_BITS - 32)) >> (x >> 56);
}

INLINE int bucket_of(float score) {
    float depth = score * -BUCKETS_PER_UNIT;
    if (!(depth < BUCKETS - 1)) return BUCKETS - 1;
    return depth > 0 ? (int)depth : 0;
}

static void fill_buckets(const struct row *row, struct bucket *buckets) {
    float scores[BLOCK];
    int64_t weights[BLOCK];
    memset(buckets, 0, BUCKETS * sizeof *buckets);
    for (int64_t first = 0; first < row->size; first += BLOCK) {
        int64_t count = smaller(BLOCK, row->size - first);
        row_scores(row, first, count, scores);
        for (int64_t i = 0; i < count; i++) weights[i] = weight_of(scores[i]);
        for (int64_t i = 0; i < count; i++) {
            struct bucket *bucket = &buckets[bucket_of(scores[i])];
            bucket->count++;
            bucket->mass += weights[i];
        }
    }
}

/* Better tokens have smaller keys: the bits of -score, then the token. */
INLINE uint64_t key_of(float score, int64_t token) {
    float depth = fabsf(score);
    uint32_t bits;
    memcpy(&bits, &depth, sizeof bits);
    return (uint64_t)bits << 32 | (uint64_t)token;
}

INLINE float score_of(uint64_t key) {
    uint32_t bits = key >> 32;
    float depth;
    memcpy(&depth, &bits, sizeof depth);
    return -depth;
}

static int compare_keys(const void *a, const void *b) {
    uint64_t first = *(const uint64_t *)a, second = *(const uint64_t *)b;
    return (first > second) - (first < second);
}

/* The keys of the tokens of a bucket, best first. */
static void sort_bucket(const struct row *row, int bucket, uint64_t *keys) {
    float scores[BLOCK];
    int64_t num_keys = 0;
    for (int64_t first = 0; first < row->size; first += BLOCK) {
        int64_t count = smaller(BLOCK, row->size - first);
        row_scores(row, first, count, scores);
        for (int64_t i = 0; i < count; i++)
            if (bucket_of(scores[i]) == bucket) keys[num_keys++] = key_of(scores[i], first + i);
    }
    qsort(keys, num_keys, sizeof *keys, compare_keys);
}

/* The key of the top_k-th token, and in mass the weights of all up to it. */
static uint64_t cut_top_k(const struct row *row, const struct bucket *buckets, int64_t top_k, uint64_t *keys,
                          int64_t *mass) {
    int bucket = 0;
    *mass = 0;
    for (; buckets[bucket].count < top_k; bucket++) {
        top_k -= buckets[bucket].count;
        *mass += buckets[bucket].mass;
    }
    sort_bucket(row, bucket, keys);
    for (int64_t n = 0; n < top_k; n++) *mass += weight_of(score_of(keys[n]));
    return keys[top_k - 1];
}

/* The key of the last token before which less than `wanted` has been reached. */
static uint64_t cut_top_p(const struct row *row, const struct bucket *buckets, double wanted, uint64_t *keys) {
    int bucket = 0;
    int64_t mass = 0;
    for (; (double)(mass + buckets[bucket].mass) < wanted; bucket++) mass += buckets[bucket].mass;
    sort_bucket(row, bucket, keys);
    int64_t last = 0;
    for (; last < buckets[bucket].count - 1; last++) {
        mass += weight_of(score_of(keys[last]));
        if (!((double)mass < wanted)) break;
    }
    return keys[last];
}

/* What top_k (the size of the row is none) and top_p (1 is none) keep. keys: room for as many as the row has tokens. */
static struct limit truncate(const struct row *row, int64_t top_k, double top_p, uint64_t *keys) {
    struct bucket buckets[BUCKETS];
    uint64_t last = UINT64_MAX;
    int64_t mass = 0;
    fill_buckets(row, buckets);
    if (top_k < row->size)
        last = cut_top_k(row, buckets, larger(top_k, 1), keys, &mass);
    else
        for (int bucket = 0; bucket < BUCKETS; bucket++) mass += buckets[bucket].mass;
    if (top_p < 1.0) {
        uint64_t last_of_p = cut_top_p(row, buckets, top_p * (double)mass, keys);
        if (last_of_p < last) last = last_of_p;
    }
    return (struct limit){score_of(last), (int64_t)(last & 0xFFFFFFFF)};
}
