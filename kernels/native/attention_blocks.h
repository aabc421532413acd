/* Blocks of keys in bfloat16: what the ways share that multiply pairs of bfloat16, by AMX tiles or by dot products.
 *
 * A tile of keys or values is SIDE rows of 64 bytes, each SIDE pairs that one instruction multiplies: of two dimensions
 * of SIDE keys, or of two keys in SIDE dimensions.
 *
 * Scores and sums of values are kept in float32; weights are rounded to bfloat16, in which pairs are multiplied. A
 * block has one maximum and one sum of weights for each row. As in attention.c what a token gets depends on its
 * sequence alone: blocks of keys begin at fixed positions, and keys that a row does not see add zeros.
 */
#pragma once

#include <immintrin.h>

#include "attention.h"
#include "transpose.h"

enum {
    BLOCK_KEYS = 256,    /* that have one maximum and one sum */
    AHEAD = 64,          /* keys between what is fetched from memory and what is computed */
    SIDE = 16,           /* rows of one tile, and its columns in float32 */
    DEPTH = 32,          /* bfloat16 elements of a row of one tile: what one instruction of AMX sums over */
    AREA = SIDE * DEPTH, /* bfloat16 elements of a tile */
    ROW_BYTES = 64,
};

/* Groups of SIDE keys of one block, an even number: from `first` on, before `end`. */
struct range {
    int64_t first, end;
};

INLINE int64_t depth_steps(const struct batch *batch) { return ceil_divide(batch->head_dim, DEPTH); }

/* DEPTH dimensions of a row, or as many as there are. */
struct dimensions {
    int64_t first;
    __mmask32 mask;
};

INLINE struct dimensions dimensions_of(const struct batch *batch, int64_t step) {
    return (struct dimensions){step * DEPTH, (__mmask32)bits_between(0, batch->head_dim - step * DEPTH)};
}

/* Zero beyond the last. */
INLINE __m512i load_row(const void *row, struct dimensions dimensions) {
    return _mm512_maskz_loadu_epi16(dimensions.mask, (const uint16_t *)row + dimensions.first);
}

/* The share of SIDE rows that is fetched at one of `steps` steps, in the order of memory. */
INLINE void prefetch_rows(const struct batch *batch, const void *const *rows, int64_t step, int64_t steps) {
    for (int64_t row = step * SIDE / steps; row < (step + 1) * SIDE / steps; row++)
        for (int64_t byte = 0; byte < batch->head_dim * 2; byte += ROW_BYTES)
            _mm_prefetch((const char *)rows[row] + byte, _MM_HINT_T1);
}

/* SIDE keys: row i of each tile holds dimensions 2 i and 2 i + 1 of all of them. Meanwhile the rows `ahead` are
 * fetched, as many.
 */
static void load_key_tiles(const struct batch *batch, const void *const *rows, const void *const *ahead,
                           uint16_t *keys) {
    int64_t steps = depth_steps(batch);
    for (int64_t step = 0; step < steps; step++) {
        struct dimensions dimensions = dimensions_of(batch, step);
        vector square[SIDE];
        prefetch_rows(batch, ahead, step, steps);
#pragma GCC unroll 16
        for (int row = 0; row < SIDE; row++) square[row] = (vector)load_row(rows[row], dimensions);
        transpose_square(square);
#pragma GCC unroll 16
        for (int row = 0; row < SIDE; row++) store_vector(keys + step * AREA + row * DEPTH, square[row], FLOAT32);
    }
}

/* Pairs of two rows' elements: of the first SIDE, and of the others. */
struct pairing {
    __m512i low, high;
};

INLINE struct pairing find_pairing(void) {
    uint16_t order[2][DEPTH];
    for (int i = 0; i < DEPTH; i++)
        for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(half * SIDE + i / 2 + i % 2 * DEPTH);
    return (struct pairing){_mm512_loadu_si512(order[0]), _mm512_loadu_si512(order[1])};
}

/* DEPTH keys: row i of each tile holds SIDE dimensions of keys 2 i and 2 i + 1. */
static void load_value_tiles(const struct batch *batch, const void *const *rows, const void *const *ahead,
                             uint16_t *values) {
    struct pairing pairing = find_pairing();
    int64_t steps = depth_steps(batch);
    for (int64_t step = 0; step < steps; step++) {
        struct dimensions dimensions = dimensions_of(batch, step);
        uint16_t *target = values + step * (BLOCK_KEYS / DEPTH) * 2 * AREA;
        prefetch_rows(batch, ahead, step, steps);
        prefetch_rows(batch, ahead + SIDE, step, steps);
        for (int row = 0; row < SIDE; row++) {
            __m512i first = load_row(rows[2 * row], dimensions);
            __m512i second = load_row(rows[2 * row + 1], dimensions);
            _mm512_storeu_si512(target + row * DEPTH, _mm512_permutex2var_epi16(first, pairing.low, second));
            _mm512_storeu_si512(target + AREA + row * DEPTH, _mm512_permutex2var_epi16(first, pairing.high, second));
        }
    }
}

/* What is read in place of keys and values after the sequence's end. */
static const uint16_t no_row[MAX_HEAD_DIM];

/* Where keys and values of a block lie, and those of AHEAD keys that are computed next. */
struct rows {
    const void *keys[BLOCK_KEYS + AHEAD], *values[BLOCK_KEYS + AHEAD];
};

/* Keys [begin, end) of the block from `first` on go to rows from `target` on; zeros where the sequence has ended. */
static void find_rows(const struct batch *batch, const struct tile *tile, int64_t first, int64_t begin, int64_t end,
                      struct rows *rows, int64_t target) {
    int64_t to_value = batch->num_kv_heads * batch->block_size * batch->head_dim;
    int64_t count = larger(0, smaller(end, tile->end_key - first) - begin);
    find_keys(batch, tile, first + begin, count, rows->keys + target);
    for (int64_t j = 0; j < end - begin; j++) {
        if (j >= count) rows->keys[target + j] = no_row;
        rows->values[target + j] = j < count ? element_at(rows->keys[target + j], to_value, BFLOAT16) : no_row;
    }
}

/* The rows of the groups in range of the block from `first` on, and of what is computed next. */
static void find_block(const struct batch *batch, const struct tile *tile, int64_t first, struct range range,
                       const struct tile *next, struct rows *rows) {
    int64_t begin = range.first * SIDE, end = range.end * SIDE;
    find_rows(batch, tile, first, begin, end, rows, begin);
    if (first + BLOCK_KEYS < tile->end_key)
        find_rows(batch, tile, first + BLOCK_KEYS, 0, AHEAD, rows, end);
    else
        find_rows(batch, next, next->first_key / DEPTH * DEPTH, 0, AHEAD, rows, end);
}

/* Keys and values of the groups in range of the block from `first` on: keys become [keys / SIDE][head_dim / DEPTH]
 * tiles, values [head_dim / DEPTH][keys / DEPTH][2].
 */
static void load_block(const struct batch *batch, const struct tile *tile, int64_t first, struct range range,
                       const struct tile *next, uint16_t *keys, uint16_t *values) {
    struct rows rows;
    find_block(batch, tile, first, range, next, &rows);
    for (int64_t j = range.first * SIDE; j < range.end * SIDE; j += DEPTH) {
        for (int64_t key = j; key < j + DEPTH; key += SIDE)
            load_key_tiles(batch, rows.keys + key, rows.keys + key + AHEAD,
                           keys + key / SIDE * depth_steps(batch) * AREA);
        load_value_tiles(batch, rows.values + j, rows.values + j + AHEAD, values + j / DEPTH * 2 * AREA);
    }
}

/* The groups of the block from `first` on that some row of a tile sees. */
INLINE struct range range_of(const struct tile *tile, int64_t first) {
    int64_t begin = larger(tile->first_key - first, 0), end = smaller(tile->end_key - first, BLOCK_KEYS);
    return (struct range){begin / DEPTH * 2, ceil_divide(end, DEPTH) * 2};
}

/* 2^x for what will be rounded to bfloat16: x = n + r with |r| <= 1/2, and a cubic that is off by one part in 10^4. */
INLINE __m512 weight_of(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0558282f), _mm512_set1_ps(0.2402265f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931472f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, _mm512_sub_ps(x, r));
}

/* Scores of one row, SIDE keys in one piece, and its weights, DEPTH keys in one piece: elements from one to the next.
 */
struct spacing {
    int64_t scores, weights;
};

/* One row: its scores become weights. `visible` has a bit per key of the block. */
INLINE void weigh_row(const float *scores, const uint64_t *visible, const int sees_all, struct range range, float scale,
                      const struct spacing spacing, uint16_t *weights, float *maximum, float *weight) {
#define SEEN(group) (sees_all ? (__mmask16)-1 : (__mmask16)(visible[(group) / 4] >> (group) % 4 * SIDE))
    const float log2_e = 1.44269504f;
    __m512 best[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    for (int64_t group = range.first; group < range.end; group += 2)
        for (int i = 0; i < 2; i++) {
            __m512 score = _mm512_load_ps(scores + (group + i) * spacing.scores);
            best[i] = _mm512_mask_max_ps(best[i], SEEN(group + i), best[i], score);
        }
    *maximum = _mm512_reduce_max_ps(_mm512_max_ps(best[0], best[1])) * scale;
    __m512 factor = _mm512_set1_ps(scale * log2_e), highest = _mm512_set1_ps(*maximum * log2_e);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t group = range.first; group < range.end; group += 2) {
        __m512 some[2];
        for (int i = 0; i < 2; i++) {
            __m512 score = _mm512_load_ps(scores + (group + i) * spacing.scores);
            some[i] = _mm512_maskz_mov_ps(SEEN(group + i), weight_of(_mm512_fmsub_ps(score, factor, highest)));
            sums[i] = _mm512_add_ps(sums[i], some[i]);
        }
        _mm512_store_si512(weights + group / 2 * spacing.weights, (__m512i)_mm512_cvtne2ps_pbh(some[1], some[0]));
    }
    *weight = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
#undef SEEN
}

/* Which keys of the block from `first` on a row sees. */
INLINE void find_visible(const struct batch *batch, const struct tile *part, int64_t row, int64_t first,
                         uint64_t *visible) {
    int64_t begin = first_visible(batch, part, row) - first, end = slot_of(batch, part, row) + 1 - first;
    for (int i = 0; i < BLOCK_KEYS / 64; i++)
        visible[i] = part->is_tree ? visible_in_tree(batch, part, row, first + 64 * i)
                                   : bits_between(begin - 64 * i, end - 64 * i);
}

/* Row number `row` of a tile: its scores for the block from `first` on become weights. */
INLINE void weigh_keys(const struct batch *batch, const struct tile *tile, int64_t row, int64_t first,
                       struct range range, const struct spacing spacing, const float *scores, uint16_t *weights,
                       float *maximum, float *weight) {
    int64_t begin = first_visible(batch, tile, row) - first, end = slot_of(batch, tile, row) + 1 - first;
    if (!tile->is_tree && begin <= range.first * SIDE && end >= range.end * SIDE) {
        weigh_row(scores, NULL, 1, range, batch->scale, spacing, weights, maximum, weight);
    } else {
        uint64_t visible[BLOCK_KEYS / 64];
        find_visible(batch, tile, row, first, visible);
        weigh_row(scores, visible, 0, range, batch->scale, spacing, weights, maximum, weight);
    }
}
