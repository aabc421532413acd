/* Attention in bfloat16 by the dot products of AVX-512 (Intel's instruction set reference, VDPBF16PS), where there are
 * no tiles of AMX: an instruction multiplies SIDE pairs, each with the same pair of a row, and adds both products to
 * SIDE sums. The sums of a row are the same, in the same order, whatever the other rows and wherever they were cut into
 * several calls.
 */
#include "attention.h"

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#include "attention_blocks.h"

enum {
    TILE_ROWS_DOT = 240, /* a multiple of QUERY_ROWS */
    FETCHED_HEADS = 4,   /* between the one whose keys or values are fetched and the one that is computed */
};

/* Elements are bfloat16 where not float. */
struct dot_scratch {
    uint16_t query[TILE_ROWS_DOT * MAX_HEAD_DIM]; /* [rows][row_stride] */
    uint16_t keys[BLOCK_KEYS * MAX_HEAD_DIM];   /* [keys / SIDE][head_dim / DEPTH] tiles, rows of pairs of dimensions */
    uint16_t values[BLOCK_KEYS * MAX_HEAD_DIM]; /* [head_dim / DEPTH][keys / DEPTH][2] tiles, rows of pairs of keys */
    float scores[QUERY_ROWS * BLOCK_KEYS];      /* [rows][keys] */
    uint16_t weights[QUERY_ROWS * BLOCK_KEYS];  /* [rows][keys] */
    uint16_t stripe[SIDE * MAX_HEAD_DIM];       /* rows as they come, [SIDE][row_stride] */
    struct partial found;
} __attribute__((aligned(64)));

static void load_query(const struct batch *batch, const struct tile *tile, uint16_t *query) {
    int64_t steps = depth_steps(batch);
    for (int64_t row = 0; row < rows_of_heads(tile); row++) {
        int64_t token, head;
        locate_row(batch, tile, row, &token, &head);
        int64_t first = token * batch->token_stride + head * batch->head_stride;
        const void *source = element_at(batch->query, first, BFLOAT16);
        for (int64_t step = 0; step < steps; step++)
            _mm512_storeu_si512(query + (row * steps + step) * DEPTH, load_row(source, dimensions_of(batch, step)));
    }
}

/* out [rows][columns * SIDE] = left [rows][steps * DEPTH] * one or two columns of `steps` tiles. Strides are in
 * elements.
 */
struct product {
    const uint16_t *left, *right;
    float *out;
    int64_t left_row, right_step, right_column, out_row, steps;
};

INLINE void multiply_rows(const int rows, const int columns, const struct product product, int64_t first_row) {
    const uint16_t *left = product.left + first_row * product.left_row, *right = product.right;
    float *out = product.out + first_row * product.out_row;
    __m512 sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (int64_t step = 0; step < product.steps; step++, right += product.right_step)
        for (int i = 0; i < SIDE; i++, left += 2) {
            __m512bh first = (__m512bh)_mm512_load_si512(right + i * DEPTH);
            __m512bh second = (__m512bh)_mm512_load_si512(right + product.right_column + i * DEPTH);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                int32_t pair;
                memcpy(&pair, left + row * product.left_row, sizeof pair);
                sums[row][0] = _mm512_dpbf16_ps(sums[row][0], (__m512bh)_mm512_set1_epi32(pair), first);
                if (columns == 2)
                    sums[row][1] = _mm512_dpbf16_ps(sums[row][1], (__m512bh)_mm512_set1_epi32(pair), second);
            }
        }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int column = 0; column < columns; column++)
            _mm512_storeu_ps(out + row * product.out_row + column * SIDE, sums[row][column]);
}

/* The same for any number of rows, with code of its own for each remainder. */
INLINE void multiply(int64_t num_rows, const int columns, const struct product product) {
    for (int64_t row = 0; row < num_rows; row += TILE_ROWS) switch (smaller(TILE_ROWS, num_rows - row)) {
#define CASE(n) \
    case n: multiply_rows(n, columns, product, row); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
}

/* Scores [rows][BLOCK_KEYS] of SIDE keys, or of two times as many. */
INLINE void score_keys(const struct batch *batch, int64_t num_rows, const int columns, const uint16_t *query,
                       const uint16_t *keys, float *scores) {
    int64_t steps = depth_steps(batch);
    multiply(num_rows, columns,
             (struct product){
                 .left = query,
                 .left_row = steps * DEPTH,
                 .right = keys,
                 .right_step = AREA,
                 .right_column = steps * AREA,
                 .out = scores,
                 .out_row = BLOCK_KEYS,
                 .steps = steps,
             });
}

static void add_values(const struct batch *batch, int64_t num_rows, struct range range, struct dot_scratch *scratch) {
    int64_t first = range.first / 2;
    for (int64_t step = 0; step < depth_steps(batch); step++)
        multiply(num_rows, 2,
                 (struct product){
                     .left = scratch->weights + first * DEPTH,
                     .left_row = BLOCK_KEYS,
                     .right = scratch->values + (step * (BLOCK_KEYS / DEPTH) + first) * 2 * AREA,
                     .right_step = 2 * AREA,
                     .right_column = AREA,
                     .out = scratch->found.values + step * DEPTH,
                     .out_row = row_stride(batch),
                     .steps = range.end / 2 - first,
                 });
}

static void weigh_rows(const struct batch *batch, const struct tile *part, int64_t first, struct range range,
                       struct dot_scratch *scratch) {
    for (int64_t row = 0; row < rows_of_heads(part); row++)
        weigh_keys(batch, part, row % part->num_rows, first, range, (struct spacing){SIDE, DEPTH},
                   scratch->scores + row * BLOCK_KEYS, scratch->weights + row * BLOCK_KEYS,
                   &scratch->found.maximum[row], &scratch->found.weight[row]);
}

/* Into scratch->found: what the rows of one part, QUERY_ROWS at most, find in the block from `first` on, which is
 * loaded.
 */
static void attend_block(const struct batch *batch, const struct tile *part, const uint16_t *query, int64_t first,
                         struct dot_scratch *scratch) {
    struct range range = range_of(part, first);
    for (int64_t group = range.first; group < range.end; group += 2)
        score_keys(batch, part->num_rows, 2, query, scratch->keys + group * depth_steps(batch) * AREA,
                   scratch->scores + group * SIDE);
    weigh_rows(batch, part, first, range, scratch);
    add_values(batch, part->num_rows, range, scratch);
}

/* Add to the sums of some rows SIDE values [SIDE][row_stride], weighted: the products of a pair of keys at a time, as
 * add_values does. The rows `ahead` are fetched meanwhile.
 */
INLINE void add_stripe_rows(const int rows, const struct batch *batch, const uint16_t *values, const void *const *ahead,
                            const uint16_t *weights, float *sums) {
    struct pairing pairing = find_pairing();
    int64_t stride = row_stride(batch), steps = depth_steps(batch);
    for (int64_t step = 0; step < steps; step++, sums += DEPTH, values += DEPTH) {
        __m512 found[TILE_ROWS][2];
        if (ahead) prefetch_rows(batch, ahead, step, steps);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) found[row][half] = _mm512_loadu_ps(sums + row * stride + half * SIDE);
        for (int key = 0; key < SIDE; key += 2) {
            __m512i first = _mm512_loadu_si512(values + key * stride);
            __m512i second = _mm512_loadu_si512(values + (key + 1) * stride);
            __m512bh low = (__m512bh)_mm512_permutex2var_epi16(first, pairing.low, second);
            __m512bh high = (__m512bh)_mm512_permutex2var_epi16(first, pairing.high, second);
#pragma GCC unroll 12
            for (int row = 0; row < rows; row++) {
                int32_t pair;
                memcpy(&pair, weights + row * BLOCK_KEYS + key, sizeof pair);
                found[row][0] = _mm512_dpbf16_ps(found[row][0], (__m512bh)_mm512_set1_epi32(pair), low);
                found[row][1] = _mm512_dpbf16_ps(found[row][1], (__m512bh)_mm512_set1_epi32(pair), high);
            }
        }
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) _mm512_storeu_ps(sums + row * stride + half * SIDE, found[row][half]);
    }
}

INLINE void add_stripe(const struct batch *batch, int64_t num_rows, const uint16_t *values, const void *const *ahead,
                       const uint16_t *weights, float *sums) {
    for (int64_t row = 0; row < num_rows; row += TILE_ROWS, ahead = NULL) switch (smaller(TILE_ROWS, num_rows - row)) {
#define CASE(n) \
    case n: add_stripe_rows(n, batch, values, ahead, weights + row * BLOCK_KEYS, sums + row * row_stride(batch)); break;
            CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
        }
}

/* SIDE keys or values of a head, copied to scratch->stripe: `rows` are those of the first head. The CPU foresees what is
 * read from front to back, but not what is read across, as transposing does. `ahead` becomes what is to be fetched next:
 * of a later head in this stripe, or in the one after it.
 */
INLINE void copy_stripe(const struct batch *batch, const struct tile *tile, int64_t head, const void *const *rows,
                        const void *const *next_rows, struct dot_scratch *scratch, const void **ahead) {
    int64_t page_bytes = batch->block_size * batch->head_dim * 2, steps = depth_steps(batch);
    int64_t fetched = head + FETCHED_HEADS;
    const void *const *fetched_rows = fetched < tile->num_heads ? rows : next_rows;
    fetched %= tile->num_heads;
    for (int64_t j = 0; j < SIDE; j++) {
        const void *row = rows[j] == no_row ? no_row : element_at(rows[j], head * page_bytes / 2, BFLOAT16);
        for (int64_t step = 0; step < steps; step++)
            _mm512_storeu_si512(scratch->stripe + (j * steps + step) * DEPTH,
                                load_row(row, dimensions_of(batch, step)));
        ahead[j] = fetched_rows[j] == no_row ? no_row : element_at(fetched_rows[j], fetched * page_bytes / 2, BFLOAT16);
    }
}

/* As attend_block, for few rows of each of several heads. Pages of a pool's block lie one after the other, head by
 * head, so all heads read a stripe of SIDE keys before any reads the next. Every sum has the order that it has there.
 */
static void attend_stripes(const struct batch *batch, const struct tile *tile, const uint16_t *query, int64_t first,
                           const struct tile *next, struct dot_scratch *scratch) {
    struct range range = range_of(tile, first);
    struct rows rows;
    const void *ahead[SIDE], *copied[SIDE];
    int64_t begin = range.first * SIDE, end = range.end * SIDE, num_rows = tile->num_rows, stride = row_stride(batch);
    find_block(batch, tile, first, range, next, &rows);
    for (int64_t j = 0; j < SIDE; j++) copied[j] = scratch->stripe + j * stride;
    for (int64_t j = begin; j < end; j += SIDE) {
        const void *const *next_rows = j + SIDE < end ? rows.keys + j + SIDE : rows.values + begin;
        for (int64_t head = 0; head < tile->num_heads; head++) {
            copy_stripe(batch, tile, head, rows.keys + j, next_rows, scratch, ahead);
            load_key_tiles(batch, copied, ahead, scratch->keys);
            score_keys(batch, num_rows, 1, query + head * num_rows * stride, scratch->keys,
                       scratch->scores + head * num_rows * BLOCK_KEYS + j);
        }
    }
    weigh_rows(batch, tile, first, range, scratch);
    memset(scratch->found.values, 0, rows_of_heads(tile) * stride * sizeof(float));
    for (int64_t j = begin; j < end; j += SIDE) {
        const void *const *next_rows = j + SIDE < end ? rows.values + j + SIDE : rows.keys + end;
        for (int64_t head = 0; head < tile->num_heads; head++) {
            copy_stripe(batch, tile, head, rows.values + j, next_rows, scratch, ahead);
            add_stripe(batch, num_rows, scratch->stripe, ahead, scratch->weights + head * num_rows * BLOCK_KEYS + j,
                       scratch->found.values + head * num_rows * stride);
        }
    }
}

static void attend_together(const struct batch *batch, const struct tile *tile, const struct tile *next) {
    struct dot_scratch scratch;
    struct partial total;
    load_query(batch, tile, scratch.query);
    clear_partial(batch, tile, &total);
    for (int64_t first = tile->first_key / BLOCK_KEYS * BLOCK_KEYS; first < tile->end_key; first += BLOCK_KEYS) {
        attend_stripes(batch, tile, scratch.query, first, next, &scratch);
        join_split(batch, tile, &scratch.found, &total);
    }
    store_output(batch, tile, &total);
}

/* All parts of a tile read the block once. */
static void attend_parts(const struct batch *batch, const struct tile *tile, const struct tile *next) {
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

static void attend_tile(const struct batch *batch, const struct tile *tile, const struct tile *next) {
    if (tile->num_rows > QUERY_ROWS)
        attend_parts(batch, tile, next);
    else
        attend_together(batch, tile, next);
}

static void attend_split(const struct batch *batch, const struct tile *tile, int64_t split, struct partial *found) {
    struct dot_scratch scratch;
    int64_t first = split * BLOCK_KEYS;
    if (tile->end_key <= first || tile->first_key >= first + BLOCK_KEYS) {
        clear_partial(batch, tile, found);
        return;
    }
    load_query(batch, tile, scratch.query);
    attend_stripes(batch, tile, scratch.query, first, tile, &scratch);
    memcpy(found, &scratch.found, sizeof *found);
}

const struct method dot_method = {
    .tile_rows = TILE_ROWS_DOT,
    .split_rows = QUERY_ROWS,
    .split_keys = BLOCK_KEYS,
    .rows_together = QUERY_ROWS,
    .attend_tile = attend_tile,
    .attend_split = attend_split,
};
#endif
