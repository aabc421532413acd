/* Attention in bfloat16 by the matrix tiles of AMX (Intel's instruction set reference, TDPBF16PS): a row of a tile does
 * not depend on the other rows.
 */
#include "attention.h"

#if defined(__AMX_BF16__)
#include "attention_blocks.h"

enum {
    TILE_ROWS_AMX = 256,
    PART_ROWS = 2 * SIDE, /* rows that are multiplied together */
    SQUARE = SIDE * SIDE, /* float32 elements of a tile */
    GROUPS = BLOCK_KEYS / SIDE,
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

static void load_query_tiles(const struct batch *batch, const struct tile *tile, uint16_t *query) {
    int64_t steps = depth_steps(batch);
    for (int64_t row = 0; row < tile->num_rows; row++) {
        int64_t token, head;
        locate_row(batch, tile, row, &token, &head);
        int64_t first = token * batch->token_stride + head * batch->head_stride;
        const void *source = element_at(batch->query, first, BFLOAT16);
        uint16_t *target = query + row / SIDE * steps * AREA + row % SIDE * DEPTH;
        for (int64_t step = 0; step < steps; step++)
            _mm512_storeu_si512(target + step * AREA, load_row(source, dimensions_of(batch, step)));
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

static void weigh_rows(const struct batch *batch, const struct tile *part, int64_t first, struct range range,
                       struct amx_scratch *scratch) {
    for (int64_t row = 0; row < part->num_rows; row++)
        weigh_keys(batch, part, row, first, range, (struct spacing){SQUARE, AREA},
                   scratch->scores + row / SIDE * GROUPS * SQUARE + row % SIDE * SIDE,
                   scratch->weights + row / SIDE * (BLOCK_KEYS / DEPTH) * AREA + row % SIDE * DEPTH,
                   &scratch->found.maximum[row], &scratch->found.weight[row]);
}

/* Into scratch->found: what the rows of one part, PART_ROWS at most, find in the block from `first` on. */
static void attend_block(const struct batch *batch, const struct tile *part, const uint16_t *query, int64_t first,
                         struct amx_scratch *scratch) {
    struct range range = range_of(part, first);
    int64_t steps = depth_steps(batch), stride = row_stride(batch);
    configure_tiles(part->num_rows);
    if (part->num_rows > SIDE) {
        score_keys(2, steps, query, range, scratch);
        weigh_rows(batch, part, first, range, scratch);
        add_values(2, steps, stride, range, scratch);
    } else {
        score_keys(1, steps, query, range, scratch);
        weigh_rows(batch, part, first, range, scratch);
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
        load_block(batch, tile, first, range_of(tile, first), next, scratch.keys, scratch.values);
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
    load_block(batch, tile, first, range_of(tile, first), tile, scratch.keys, scratch.values);
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
