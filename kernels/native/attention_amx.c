/* Attention in bfloat16 by the matrix tiles of AMX (Intel's instruction set reference, TDPBF16PS).
 *
 * Scores and sums of values are kept in float32; weights are rounded to bfloat16, in which the tiles multiply. As in
 * attention.c what a token gets depends on its sequence alone: a row of a tile does not depend on the other rows,
 * blocks of keys begin at fixed positions, and keys that a row does not see add zeros.
 */
#include "attention.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include "transpose.h"

enum {
    BLOCK_KEYS = 256, /* that have one maximum and one sum */
    AHEAD = 64,       /* keys between what is fetched from memory and what is computed */
    TILE_ROWS_AMX = 256,
    SIDE = 16,             /* rows of one AMX tile, and its columns in float32 */
    DEPTH = 32,            /* bfloat16 elements of a row of one AMX tile: what one instruction sums over */
    PART_ROWS = 2 * SIDE,  /* rows that are multiplied together */
    AREA = SIDE * DEPTH,   /* bfloat16 elements of an AMX tile */
    SQUARE = SIDE * SIDE,  /* float32 elements of one */
    GROUPS = BLOCK_KEYS / SIDE,
    ROW_BYTES = 64,
};

/* Everything in AMX tiles, each in one piece of memory. Elements are bfloat16 where not float. */
struct amx_scratch {
    uint16_t query[TILE_ROWS_AMX * MAX_HEAD_DIM]; /* [rows / SIDE][head_dim / DEPTH] */
    uint16_t keys[BLOCK_KEYS * MAX_HEAD_DIM];     /* [keys / SIDE][head_dim / DEPTH], rows of pairs of dimensions */
    uint16_t values[BLOCK_KEYS * MAX_HEAD_DIM];   /* [head_dim / DEPTH][keys / DEPTH][2], rows of pairs of keys */
    float scores[PART_ROWS * BLOCK_KEYS];         /* [2][keys / SIDE] */
    uint16_t weights[PART_ROWS * BLOCK_KEYS];     /* [2][keys / DEPTH] */
    struct partial found;
} __attribute__((aligned(64)));

/* Groups of SIDE keys of one block, an even number: from `first` on, before `end`. */
struct range {
    int64_t first, end;
};

INLINE int64_t depth_steps(const struct batch *batch) { return ceil_divide(batch->head_dim, DEPTH); }

/* The elements of a row from `first` on, zero beyond the last. */
INLINE __m512i load_row(const struct batch *batch, const void *row, int64_t first) {
    int64_t count = smaller(DEPTH, batch->head_dim - first);
    return _mm512_maskz_loadu_epi16((__mmask32)bits_between(0, count), (const uint16_t *)row + first);
}

static void load_query_tiles(const struct batch *batch, const struct tile *tile, uint16_t *query) {
    int64_t steps = depth_steps(batch);
    for (int64_t row = 0; row < tile->num_rows; row++) {
        int64_t token, head;
        locate_row(batch, tile, row, &token, &head);
        int64_t first = token * batch->token_stride + head * batch->head_stride;
        const void *source = element_at(batch->query, first, BFLOAT16);
        uint16_t *target = query + row / SIDE * steps * AREA + row % SIDE * DEPTH;
        for (int64_t step = 0; step < steps; step++)
            _mm512_storeu_si512(target + step * AREA, load_row(batch, source, step * DEPTH));
    }
}

/* The share of SIDE rows that is fetched at one of `steps` steps, in the order of memory. */
INLINE void prefetch_rows(const struct batch *batch, const void *const *rows, int64_t step, int64_t steps) {
    for (int64_t row = step * SIDE / steps; row < (step + 1) * SIDE / steps; row++)
        for (int64_t byte = 0; byte < batch->head_dim * 2; byte += ROW_BYTES)
            _mm_prefetch((const char *)rows[row] + byte, _MM_HINT_T1);
}

/* SIDE keys: row i of each tile holds dimensions 2 i and 2 i + 1 of all of them. */
static void load_key_tiles(const struct batch *batch, const void *const *rows, uint16_t *keys) {
    int64_t steps = depth_steps(batch);
    for (int64_t step = 0; step < steps; step++) {
        vector square[SIDE];
        prefetch_rows(batch, rows + AHEAD, step, steps);
#pragma GCC unroll 16
        for (int row = 0; row < SIDE; row++) square[row] = (vector)load_row(batch, rows[row], step * DEPTH);
        transpose_square(square);
#pragma GCC unroll 16
        for (int row = 0; row < SIDE; row++) store_vector(keys + step * AREA + row * DEPTH, square[row], FLOAT32);
    }
}

/* DEPTH keys: row i of each tile holds SIDE dimensions of keys 2 i and 2 i + 1. */
static void load_value_tiles(const struct batch *batch, const void *const *rows, uint16_t *values) {
    uint16_t order[2][DEPTH];
    for (int i = 0; i < DEPTH; i++)
        for (int half = 0; half < 2; half++) order[half][i] = (uint16_t)(half * SIDE + i / 2 + i % 2 * DEPTH);
    __m512i low = _mm512_loadu_si512(order[0]), high = _mm512_loadu_si512(order[1]);
    int64_t steps = depth_steps(batch);
    for (int64_t step = 0; step < steps; step++) {
        uint16_t *target = values + step * (BLOCK_KEYS / DEPTH) * 2 * AREA;
        prefetch_rows(batch, rows + AHEAD, step, steps);
        prefetch_rows(batch, rows + AHEAD + SIDE, step, steps);
        for (int row = 0; row < SIDE; row++) {
            __m512i first = load_row(batch, rows[2 * row], step * DEPTH);
            __m512i second = load_row(batch, rows[2 * row + 1], step * DEPTH);
            _mm512_storeu_si512(target + row * DEPTH, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(target + AREA + row * DEPTH, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

/* Where keys and values of a block lie, and those of AHEAD keys that are computed next. */
struct rows {
    const void *keys[BLOCK_KEYS + AHEAD], *values[BLOCK_KEYS + AHEAD];
};

/* Keys [begin, end) of the block from `first` on go to rows from `target` on; zeros where the sequence has ended. */
static void find_rows(const struct batch *batch, const struct tile *tile, int64_t first, int64_t begin, int64_t end,
                      struct rows *rows, int64_t target) {
    static const uint16_t zeros[MAX_HEAD_DIM];
    int64_t to_value = batch->num_kv_heads * batch->block_size * batch->head_dim;
    int64_t count = larger(0, smaller(end, tile->end_key - first) - begin);
    find_keys(batch, tile, first + begin, count, rows->keys + target);
    for (int64_t j = 0; j < end - begin; j++) {
        if (j >= count) rows->keys[target + j] = zeros;
        rows->values[target + j] = j < count ? element_at(rows->keys[target + j], to_value, BFLOAT16) : zeros;
    }
}

/* Keys and values of the groups in range of the block from `first` on. */
static void load_block(const struct batch *batch, const struct tile *tile, int64_t first, struct range range,
                       const struct tile *next, struct amx_scratch *scratch) {
    struct rows rows;
    int64_t begin = range.first * SIDE, end = range.end * SIDE;
    find_rows(batch, tile, first, begin, end, &rows, begin);
    if (first + BLOCK_KEYS < tile->end_key)
        find_rows(batch, tile, first + BLOCK_KEYS, 0, AHEAD, &rows, end);
    else
        find_rows(batch, next, next->first_key / DEPTH * DEPTH, 0, AHEAD, &rows, end);
    for (int64_t j = begin; j < end; j += DEPTH) {
        for (int64_t group = j / SIDE; group < j / SIDE + 2; group++)
            load_key_tiles(batch, rows.keys + group * SIDE, scratch->keys + group * depth_steps(batch) * AREA);
        load_value_tiles(batch, rows.values + j, scratch->values + j / DEPTH * 2 * AREA);
    }
}

/* Which tiles hold what, as the instructions must name them: */
#define SUMS_00 0
#define SUMS_01 1
#define SUMS_10 2
#define SUMS_11 3
#define LEFT_0 4
#define LEFT_1 5
#define RIGHT_0 6
#define RIGHT_1 7

/* Tiles for `rows` rows on the left, in two halves. */
static void configure_tiles(int64_t rows) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.row_bytes[i] = ROW_BYTES, config.rows[i] = SIDE;
    uint8_t first = (uint8_t)smaller(rows, SIDE), second = (uint8_t)(rows > SIDE ? rows - SIDE : SIDE);
    config.rows[SUMS_00] = config.rows[SUMS_01] = config.rows[LEFT_0] = first;
    config.rows[SUMS_10] = config.rows[SUMS_11] = config.rows[LEFT_1] = second;
    __asm__ volatile("" : : "r"(&config) : "memory"); /* some compilers take the intrinsic to read only 8 bytes */
    _tile_loadconfig(&config);
}

/* sums [2][2] = left [2][steps] * right [steps][2], both halves of the rows or only the first. Strides are in elements.
 */
INLINE void multiply_tiles(const int halves, int64_t steps, const uint16_t *left, int64_t left_half,
                           const uint16_t *right, int64_t right_step, int64_t right_half) {
    _tile_zero(SUMS_00);
    _tile_zero(SUMS_01);
    if (halves == 2) {
        _tile_zero(SUMS_10);
        _tile_zero(SUMS_11);
    }
    for (int64_t step = 0; step < steps; step++) {
        _tile_loadd(LEFT_0, left + step * AREA, ROW_BYTES);
        _tile_loadd(RIGHT_0, right + step * right_step, ROW_BYTES);
        _tile_loadd(RIGHT_1, right + step * right_step + right_half, ROW_BYTES);
        _tile_dpbf16ps(SUMS_00, LEFT_0, RIGHT_0);
        _tile_dpbf16ps(SUMS_01, LEFT_0, RIGHT_1);
        if (halves == 2) {
            _tile_loadd(LEFT_1, left + left_half + step * AREA, ROW_BYTES);
            _tile_dpbf16ps(SUMS_10, LEFT_1, RIGHT_0);
            _tile_dpbf16ps(SUMS_11, LEFT_1, RIGHT_1);
        }
    }
}

INLINE void store_sums(const int halves, float *out, int64_t half, int64_t next, int64_t row_bytes) {
    _tile_stored(SUMS_00, out, row_bytes);
    _tile_stored(SUMS_01, out + next, row_bytes);
    if (halves == 2) {
        _tile_stored(SUMS_10, out + half, row_bytes);
        _tile_stored(SUMS_11, out + half + next, row_bytes);
    }
}

INLINE void score_keys(const int halves, int64_t steps, const uint16_t *query, struct range range,
                       struct amx_scratch *scratch) {
    for (int64_t group = range.first; group < range.end; group += 2) {
        multiply_tiles(halves, steps, query, steps * AREA, scratch->keys + group * steps * AREA, AREA, steps * AREA);
        store_sums(halves, scratch->scores + group * SQUARE, GROUPS * SQUARE, SQUARE, ROW_BYTES);
    }
}

INLINE void add_values(const int halves, int64_t steps, int64_t stride, struct range range,
                       struct amx_scratch *scratch) {
    int64_t first = range.first / 2, key_steps = range.end / 2 - first;
    for (int64_t step = 0; step < steps; step++) {
        const uint16_t *values = scratch->values + (step * (BLOCK_KEYS / DEPTH) + first) * 2 * AREA;
        multiply_tiles(halves, key_steps, scratch->weights + first * AREA, BLOCK_KEYS / DEPTH * AREA, values, 2 * AREA,
                       AREA);
        store_sums(halves, scratch->found.values + step * DEPTH, SIDE * stride, SIDE, stride * (int64_t)sizeof(float));
    }
}

/* 2^x for what will be rounded to bfloat16: x = n + r with |r| <= 1/2, and a cubic that is off by one part in 10^4. */
INLINE __m512 weight_of(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 sum = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0558282f), _mm512_set1_ps(0.2402265f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.6931472f));
    sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, _mm512_sub_ps(x, r));
}

/* One row: its scores, tiles of SIDE keys SQUARE apart, become weights. `visible` has a bit per key of the block. */
INLINE void weigh_row(const float *scores, const uint64_t *visible, const int sees_all, struct range range, float scale,
                      uint16_t *weights, float *maximum, float *weight) {
#define SEEN(group) (sees_all ? (__mmask16)-1 : (__mmask16)(visible[(group) / 4] >> (group) % 4 * SIDE))
    const float log2_e = 1.44269504f;
    __m512 best[2] = {_mm512_set1_ps(-INFINITY), _mm512_set1_ps(-INFINITY)};
    for (int64_t group = range.first; group < range.end; group += 2)
        for (int i = 0; i < 2; i++) {
            __m512 score = _mm512_load_ps(scores + (group + i) * SQUARE);
            best[i] = _mm512_mask_max_ps(best[i], SEEN(group + i), best[i], score);
        }
    *maximum = _mm512_reduce_max_ps(_mm512_max_ps(best[0], best[1])) * scale;
    __m512 factor = _mm512_set1_ps(scale * log2_e), highest = _mm512_set1_ps(*maximum * log2_e);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t group = range.first; group < range.end; group += 2) {
        __m512 some[2];
        for (int i = 0; i < 2; i++) {
            __m512 score = _mm512_load_ps(scores + (group + i) * SQUARE);
            some[i] = _mm512_maskz_mov_ps(SEEN(group + i), weight_of(_mm512_fmsub_ps(score, factor, highest)));
            sums[i] = _mm512_add_ps(sums[i], some[i]);
        }
        _mm512_store_si512(weights + group / 2 * AREA, (__m512i)_mm512_cvtne2ps_pbh(some[1], some[0]));
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

static void weigh_keys(const struct batch *batch, const struct tile *part, int64_t first, struct range range,
                       struct amx_scratch *scratch) {
    for (int64_t row = 0; row < part->num_rows; row++) {
        const float *scores = scratch->scores + row / SIDE * GROUPS * SQUARE + row % SIDE * SIDE;
        uint16_t *weights = scratch->weights + row / SIDE * (BLOCK_KEYS / DEPTH) * AREA + row % SIDE * DEPTH;
        float *maximum = &scratch->found.maximum[row], *weight = &scratch->found.weight[row];
        int64_t begin = first_visible(batch, part, row) - first, end = slot_of(batch, part, row) + 1 - first;
        if (!part->is_tree && begin <= range.first * SIDE && end >= range.end * SIDE) {
            weigh_row(scores, NULL, 1, range, batch->scale, weights, maximum, weight);
        } else {
            uint64_t visible[BLOCK_KEYS / 64];
            find_visible(batch, part, row, first, visible);
            weigh_row(scores, visible, 0, range, batch->scale, weights, maximum, weight);
        }
    }
}

/* The groups of the block from `first` on that some row of a tile sees. */
INLINE struct range range_of(const struct tile *tile, int64_t first) {
    int64_t begin = larger(tile->first_key - first, 0), end = smaller(tile->end_key - first, BLOCK_KEYS);
    return (struct range){begin / DEPTH * 2, ceil_divide(end, DEPTH) * 2};
}

/* Into scratch->found: what the rows of one part, PART_ROWS at most, find in the block from `first` on. */
static void attend_block(const struct batch *batch, const struct tile *part, const uint16_t *query, int64_t first,
                         struct amx_scratch *scratch) {
    struct range range = range_of(part, first);
    int64_t steps = depth_steps(batch), stride = row_stride(batch);
    configure_tiles(part->num_rows);
    if (part->num_rows > SIDE) {
        score_keys(2, steps, query, range, scratch);
        weigh_keys(batch, part, first, range, scratch);
        add_values(2, steps, stride, range, scratch);
    } else {
        score_keys(1, steps, query, range, scratch);
        weigh_keys(batch, part, first, range, scratch);
        add_values(1, steps, stride, range, scratch);
    }
}

/* All parts of a tile read the block once. */
static void attend_tile(const struct batch *batch, const struct tile *tile, const struct tile *next) {
    struct amx_scratch scratch;
    struct partial totals[TILE_ROWS_AMX / PART_ROWS];
    struct tile parts[TILE_ROWS_AMX / PART_ROWS];
    int64_t num_parts = ceil_divide(tile->num_rows, PART_ROWS);
    load_query_tiles(batch, tile, scratch.query);
    for (int64_t i = 0; i < num_parts; i++) {
        parts[i] = *tile;
        parts[i].first_row += i * PART_ROWS;
        parts[i].num_rows = smaller(PART_ROWS, tile->num_rows - i * PART_ROWS);
        bound_tile(batch, &parts[i]);
        clear_partial(batch, &parts[i], &totals[i]);
    }
    for (int64_t first = tile->first_key / BLOCK_KEYS * BLOCK_KEYS; first < tile->end_key; first += BLOCK_KEYS) {
        load_block(batch, tile, first, range_of(tile, first), next, &scratch);
        for (int64_t i = 0; i < num_parts; i++) {
            if (parts[i].end_key <= first || parts[i].first_key >= first + BLOCK_KEYS) continue;
            const uint16_t *query = scratch.query + i * 2 * depth_steps(batch) * AREA;
            attend_block(batch, &parts[i], query, first, &scratch);
            join_split(batch, &parts[i], &scratch.found, &totals[i]);
        }
    }
    for (int64_t i = 0; i < num_parts; i++) store_output(batch, &parts[i], &totals[i]);
    _tile_release();
}

static void attend_split(const struct batch *batch, const struct tile *tile, int64_t split, struct partial *found) {
    struct amx_scratch scratch;
    int64_t first = split * BLOCK_KEYS;
    if (tile->end_key <= first || tile->first_key >= first + BLOCK_KEYS) {
        clear_partial(batch, tile, found);
        return;
    }
    load_query_tiles(batch, tile, scratch.query);
    load_block(batch, tile, first, range_of(tile, first), tile, &scratch);
    attend_block(batch, tile, scratch.query, first, &scratch);
    memcpy(found, &scratch.found, sizeof *found);
    _tile_release();
}

const struct method amx_method = {
    .tile_rows = TILE_ROWS_AMX,
    .split_rows = PART_ROWS,
    .split_keys = BLOCK_KEYS,
    .attend_tile = attend_tile,
    .attend_split = attend_split,
};
#endif
