/* Attention in bfloat16 by the dot products of AVX-512 (Intel's instruction set reference, VDPBF16PS), where there are no
 * tiles of AMX: an instruction multiplies SIDE pairs, each with the same pair of a row, and adds both products to SIDE
 * sums. The sums of a row are the same, in the same order, whatever the other rows and wherever they were cut into
 * several calls.
 */
#include "attention.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "attention_blocks.h"

enum { TILE_ROWS_DOT = 240 /* a multiple of QUERY_ROWS */ };

/* Elements are bfloat16 where not float. */
struct dot_scratch {
    uint16_t query[TILE_ROWS_DOT * MAX_HEAD_DIM]; /* [rows][row_stride] */
    uint16_t keys[BLOCK_KEYS * MAX_HEAD_DIM];     /* [keys / SIDE][head_dim / DEPTH] tiles, rows of pairs of dimensions */
    uint16_t values[BLOCK_KEYS * MAX_HEAD_DIM];   /* [head_dim / DEPTH][keys / DEPTH][2] tiles, rows of pairs of keys */
    float scores[QUERY_ROWS * BLOCK_KEYS];        /* [rows][keys] */
    uint16_t weights[QUERY_ROWS * BLOCK_KEYS];    /* [rows][keys] */
    struct partial found;
} __attribute__((aligned(64)));

static void load_query(const struct batch *batch, const struct tile *tile, uint16_t *query) {
    int64_t steps = depth_steps(batch);
    for (int64_t row = 0; row < tile->num_rows; row++) {
        int64_t token, head;
        locate_row(batch, tile, row, &token, &head);
        int64_t first = token * batch->token_stride + head * batch->head_stride;
        const void *source = element_at(batch->query, first, BFLOAT16);
        for (int64_t step = 0; step < steps; step++)
            _mm512_storeu_si512(query + (row * steps + step) * DEPTH, load_row(batch, source, step * DEPTH));
    }
}

/* out [rows][2 * SIDE] = left [rows][steps * DEPTH] * two columns of `steps` tiles, added to out if `accumulates`. All
 * strides are in elements.
 */
struct product {
    const uint16_t *left, *right;
    float *out;
    int64_t left_row, right_step, right_column, out_row, steps;
    int accumulates;
};

INLINE void multiply_rows(const int rows, const struct product product, int64_t first_row) {
    const uint16_t *left = product.left + first_row * product.left_row, *right = product.right;
    float *out = product.out + first_row * product.out_row;
    __m512 sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int column = 0; column < 2; column++)
            sums[row][column] =
                product.accumulates ? _mm512_loadu_ps(out + row * product.out_row + column * SIDE) : _mm512_setzero_ps();
    for (int64_t step = 0; step < product.steps; step++, right += product.right_step)
        for (int i = 0; i < SIDE; i++, left += 2) {
            __m512bh first = (__m512bh)_mm512_load_si512(right + i * DEPTH);
            __m512bh second = (__m512bh)_mm512_load_si512(right + product.right_column + i * DEPTH);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                int32_t pair;
                memcpy(&pair, left + row * product.left_row, sizeof pair);
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], (__m512bh)_mm512_set1_epi32(pair), first);
                sums[row][1] = _mm512_dpbf16_ps(sums[row][1], (__m512bh)_mm512_set1_epi32(pair), second);
            }
        }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int column = 0; column < 2; column++)
            _mm512_storeu_ps(out + row * product.out_row + column * SIDE, sums[row][column]);
}

/* The same for any number of rows, with code of its own for each remainder. */
INLINE void multiply(int64_t num_rows, const struct product product) {
    for (int64_t row = 0; row < num_rows; row += TILE_ROWS)
        switch (smaller(TILE_ROWS, num_rows - row)) {
#define CASE(n) \
    case n: multiply_rows(n, product, row); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
}

static void score_keys(const struct batch *batch, int64_t num_rows, const uint16_t *query, struct range range,
                       struct dot_scratch *scratch) {
    int64_t steps = depth_steps(batch);
    for (int64_t group = range.first; group < range.end; group += 2)
        multiply(num_rows, (struct product){
                               .left = query,
                               .left_row = steps * DEPTH,
                               .right = scratch->keys + group * steps * AREA,
                               .right_step = AREA,
                               .right_column = steps * AREA,
                               .out = scratch->scores + group * SIDE,
                               .out_row = BLOCK_KEYS,
                               .steps = steps,
                           });
}

static void add_values(const struct batch *batch, int64_t num_rows, struct range range, struct dot_scratch *scratch) {
    int64_t stride = row_stride(batch), first = range.first / 2;
    for (int64_t step = 0; step < depth_steps(batch); step++)
        multiply(num_rows, (struct product){
                               .left = scratch->weights + first * DEPTH,
                               .left_row = BLOCK_KEYS,
                               .right = scratch->values + (step * (BLOCK_KEYS / DEPTH) + first) * 2 * AREA,
                               .right_step = 2 * AREA,
                               .right_column = AREA,
                               .out = scratch->found.values + step * DEPTH,
                               .out_row = stride,
                               .steps = range.end / 2 - first,
                           });
}

/* Into scratch->found: what the rows of one part, QUERY_ROWS at most, find in the block from `first` on. */
static void attend_block(const struct batch *batch, const struct tile *part, const uint16_t *query, int64_t first,
                         struct dot_scratch *scratch) {
    struct range range = range_of(part, first);
    score_keys(batch, part->num_rows, query, range, scratch);
    for (int64_t row = 0; row < part->num_rows; row++)
        weigh_keys(batch, part, row, first, range, (struct spacing){SIDE, DEPTH}, scratch->scores + row * BLOCK_KEYS,
                   scratch->weights + row * BLOCK_KEYS, &scratch->found.maximum[row], &scratch->found.weight[row]);
    add_values(batch, part->num_rows, range, scratch);
}

/* All parts of a tile read the block once. */
static void attend_tile(const struct batch *batch, const struct tile *tile, const struct tile *next) {
    struct dot_scratch scratch;
    struct partial totals[TILE_ROWS_DOT / QUERY_ROWS];
    struct tile parts[TILE_ROWS_DOT / QUERY_ROWS];
    int64_t num_parts = ceil_divide(tile->num_rows, QUERY_ROWS);
    load_query(batch, tile, scratch.query);
    for (int64_t i = 0; i < num_parts; i++) {
        parts[i] = *tile;
        parts[i].first_row += i * QUERY_ROWS;
        parts[i].num_rows = smaller(QUERY_ROWS, tile->num_rows - i * QUERY_ROWS);
        bound_tile(batch, &parts[i]);
        clear_partial(batch, &parts[i], &totals[i]);
    }
    for (int64_t first = tile->first_key / BLOCK_KEYS * BLOCK_KEYS; first < tile->end_key; first += BLOCK_KEYS) {
        load_block(batch, tile, first, range_of(tile, first), next, scratch.keys, scratch.values);
        for (int64_t i = 0; i < num_parts; i++) {
            if (parts[i].end_key <= first || parts[i].first_key >= first + BLOCK_KEYS) continue;
            attend_block(batch, &parts[i], scratch.query + i * QUERY_ROWS * row_stride(batch), first, &scratch);
            join_split(batch, &parts[i], &scratch.found, &totals[i]);
        }
    }
    for (int64_t i = 0; i < num_parts; i++) store_output(batch, &parts[i], &totals[i]);
}

static void attend_split(const struct batch *batch, const struct tile *tile, int64_t split, struct partial *found) {
    struct dot_scratch scratch;
    int64_t first = split * BLOCK_KEYS;
    if (tile->end_key <= first || tile->first_key >= first + BLOCK_KEYS) {
        clear_partial(batch, tile, found);
        return;
    }
    load_query(batch, tile, scratch.query);
    load_block(batch, tile, first, range_of(tile, first), tile, scratch.keys, scratch.values);
    attend_block(batch, tile, scratch.query, first, &scratch);
    memcpy(found, &scratch.found, sizeof *found);
}

const struct method dot_method = {
    .tile_rows = TILE_ROWS_DOT,
    .split_rows = QUERY_ROWS,
    .split_keys = BLOCK_KEYS,
    .attend_tile = attend_tile,
    .attend_split = attend_split,
};
#endif
