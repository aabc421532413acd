/* Linear layers with weights in panels: bfloat16, int8 with int8 activations (W8A8), and int8 or int4 weights that are
 * turned into bfloat16, or into float32 where no instruction takes that, on the way to the inner loop. Every integer up
 * to 8 bits is exact in both; scales are applied to sums, in float32.
 *
 * What a row gets does not depend on the other rows or on the number of threads, bit for bit.
 */
#include <stdlib.h>

#include "operations.h"
#include "panels.h"

enum {
    TILE_PAIR = 2 * ROWS,       /* rows of one block of panels.h */
    /* A panel over these fits into half of the first-level cache, beside activations and sums: CPUs with tiles have 48
     * KiB, others 32. Widened to float32 it is twice as large, but is read by halves.
     */
#if defined(__AMX_TILE__)
    DEPTH_CHUNKS = 11,
#else
    DEPTH_CHUNKS = 6,
#endif
    MAX_GROUP_CHUNKS = 16,      /* with one scale */
    BLOCK_ROWS = 512,           /* that pass by a panel; a multiple of TILE_PAIR */
    BLOCK_BYTES = 1 << 20,      /* or fewer: half of a usual second-level cache */
    TASK_PANELS = 4,            /* that one thread takes at a time, so that it has use for what it prefetches */
};

struct product {
    const void *x; /* [rows, in_features], rows x_stride elements apart */
    int64_t x_stride;
    int x_element;
    const uint32_t *panels; /* [num_panels][words][COLUMNS] */
    int weights;            /* enum weights */
    int numbers;            /* enum numbers */
    const float *scales;    /* [groups][num_panels * COLUMNS]; none for bfloat16 */
    int64_t group_chunks;   /* of one scale; 0: one scale for all of in_features */
    const int32_t *column_sums; /* of the weights, [num_panels * COLUMNS]; W8A8 */
    const float *bias;      /* [out_features] or none */
    const void *residual;   /* [rows, out_features] or none, of out's element type */
    int64_t residual_stride;
    void *out;              /* [rows, out_features], rows out_stride elements apart */
    int64_t out_stride;
    int out_element;
    int64_t rows, in_features, out_features;
    /* Derived. */
    int64_t words, chunks, num_panels, row_bytes, block_rows; /* words of a panel's column; bytes of a packed row */
    int in_place; /* x is read as it is */
    char *packed;                            /* activations of a block of rows */
    float *row_scales;                       /* of these; W8A8 */
};

/* ---- Activations ---- */

INLINE char *packed_tile(const struct product *job, int64_t tile) { return job->packed + tile * ROWS * job->row_bytes; }

/* The largest magnitude of a row; NaN if the row has an infinity or NaN. */
INLINE float largest_magnitude(const void *x, int64_t size, const int element) {
    float lanes[LANES], highest = 0.0f;
    vector best = {0}, poison = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        vector value = load_some(element_at(x, i, element), size - i, element);
        vector magnitude = (vector)((bit_vector)value & 0x7fffffff);
        best = choose(magnitude > best, magnitude, best);
        poison += value * 0.0f;
    }
    store_vector(lanes, best, FLOAT32);
    for (int lane = 0; lane < LANES; lane++) highest = lanes[lane] > highest ? lanes[lane] : highest;
    store_vector(lanes, poison, FLOAT32);
    for (int lane = 0; lane < LANES; lane++) highest += lanes[lane];
    return highest;
}

/* One chunk of a row, converted; zero beyond in_features. */
INLINE void pack_chunk(const struct product *job, const void *x, int64_t chunk, char *target, const int element,
                       const int numbers) {
    const int packed_element = numbers == FLOATS ? FLOAT32 : BFLOAT16;
    int64_t first = chunk * chunk_features(numbers), count = job->in_features - first;
    if (numbers == PAIRS && element == BFLOAT16 && count >= 32) {
        memcpy(target, element_at(x, first, element), 64);
        return;
    }
    for (int64_t i = 0; i < chunk_features(numbers); i += LANES) {
        vector value = i < count ? load_some(element_at(x, first + i, element), count - i, element) : (vector){0};
        store_vector((void *)element_at(target, i, packed_element), value, packed_element);
    }
}

/* The same as int8, in steps of `scale`; as int16 where products are of these, in the order of QUAD_STEPS. */
INLINE void quantize_chunk(const struct product *job, const void *x, int64_t chunk, float scale, char *target,
                           const int element) {
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    typedef int16_t words __attribute__((vector_size(2 * LANES)));
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    for (int64_t i = 0; i < 64; i += LANES) {
        int64_t first = chunk * 64 + i, count = job->in_features - first;
        vector value = {0};
        if (count > 0 && scale > 0.0f) value = load_some(element_at(x, first, element), count, element) / scale;
        /* The whole number is in the low bits of the sum. */
        if (QUAD_STEPS == 2) {
            mask_vector whole = (mask_vector)(value + to_integer);
            uint64_t halves[LANES / 2], *pairs = (uint64_t *)(target + 2 * i);
            const uint64_t low = 0x0000ffff0000ffff;
            memcpy(halves, &whole, sizeof whole);
            for (int quad = 0; quad < LANES / 4; quad++)
                pairs[quad] = (halves[2 * quad] & low) | (halves[2 * quad + 1] & low) << 16;
            continue;
        }
        /* gcc narrows vectors by half; by more, lane after lane. */
        words whole = __builtin_convertvector((mask_vector)(value + to_integer), words);
        bytes quantized = __builtin_convertvector(whole, bytes) ^ (int8_t)ACTIVATION_OFFSET;
        memcpy(target + i, &quantized, sizeof quantized);
    }
}

/* ROWS rows from `row` of a block on, chunk by chunk: written front to back. */
INLINE void pack_tile(const struct product *job, int64_t first_row, int64_t row, int64_t num_rows, const int element,
                      const int numbers) {
    int64_t rows = smaller(ROWS, num_rows - row);
    char *target = packed_tile(job, row / ROWS);
    const void *x = element_at(job->x, (first_row + row) * job->x_stride, element);
    for (int64_t i = 0; numbers == QUADS && i < rows; i++) {
        float largest = largest_magnitude(element_at(x, i * job->x_stride, element), job->in_features, element);
        job->row_scales[row + i] = largest / 127.0f;
    }
    for (int64_t chunk = 0; chunk < job->chunks; chunk++)
        for (int64_t i = 0; i < rows; i++, target += chunk_bytes(numbers)) {
            const void *source = element_at(x, i * job->x_stride, element);
            if (numbers == QUADS)
                quantize_chunk(job, source, chunk, job->row_scales[row + i], target, element);
            else
                pack_chunk(job, source, chunk, target, element, numbers);
        }
}

/* ---- Weights ---- */

/* Weights are read as they are where that costs no more than what several groups of rows save by sharing what was
 * widened for all of them.
 */
INLINE int is_widened(const struct product *job, int64_t num_rows, const int weights, const int numbers) {
    if (numbers == FLOATS || (numbers == QUADS && QUAD_STEPS > 1)) return num_rows > 2 * sum_rows(numbers);
    if (weights != WEIGHTS_INT8 && weights != WEIGHTS_INT4) return 0;
#if !defined(__AMX_TILE__)
    if (weights == WEIGHTS_INT8 && !job->group_chunks) return num_rows > sum_rows(numbers);
#endif
    return 1;
}

INLINE const uint32_t *panel_at(const struct product *job, int64_t panel, int64_t chunk, const int weights,
                                const int numbers) {
    return job->panels + (panel * job->words + chunk * chunk_words(weights, numbers)) * COLUMNS;
}

/* Into words that each are one step. */
INLINE const uint32_t *widen(const uint32_t *panel, int64_t chunks, uint32_t *target, const int weights,
                             const int numbers) {
    const int64_t words = chunks * chunk_words(weights, numbers), steps = chunks * chunk_steps(numbers) / words;
    for (int64_t word = 0; word < words; word++)
#pragma GCC unroll 8
        for (int step = 0; step < steps; step++)
            for (int part = 0; part < COLUMNS; part += LANES)
                store_words(target + (word * steps + step) * COLUMNS + part,
                            load_weights(panel + word * COLUMNS + part, step, weights, numbers));
    return target;
}

/* ---- Products ---- */

/* c = or += partial * scales, for rows [.][COLUMNS]. */
INLINE void add_scaled(float *c, const float *partial, const float *scales, int rows, int accumulates) {
    for (int row = 0; row < rows; row++)
        for (int column = 0; column < COLUMNS; column += LANES) {
            int at = row * COLUMNS + column;
            vector sum = accumulates ? load_vector(c + at, FLOAT32) : (vector){0};
            sum += load_vector(partial + at, FLOAT32) * load_vector(scales + column, FLOAT32);
            store_vector(c + at, sum, FLOAT32);
        }
}

/* Scales, bias and residual, and the only rounding. */
INLINE void finish_any_row(const struct product *job, int64_t row, float row_scale, int64_t first, const float *sums,
                       const int numbers, const int element) {
    int64_t count = smaller(COLUMNS, job->out_features - first);
    float values[COLUMNS];
    for (int64_t i = 0; i < COLUMNS; i += LANES) {
        vector sum = load_vector(sums + i, FLOAT32);
        if (numbers == QUADS) {
            mask_vector offset = (mask_vector)load_words(job->column_sums + first + i) * ACTIVATION_OFFSET;
            sum = __builtin_convertvector((mask_vector)sum - offset, vector);
        }
        if (job->scales && !job->group_chunks) sum *= load_vector(job->scales + first + i, FLOAT32) * row_scale;
        if (job->bias && i < count) sum += load_some(job->bias + first + i, count - i, FLOAT32);
        if (job->residual && i < count)
            sum += load_some(element_at(job->residual, row * job->residual_stride + first + i, element), count - i,
                             element);
        store_vector(values + i, sum, FLOAT32);
    }
    store_columns((void *)element_at(job->out, row * job->out_stride + first, element), values, count, element);
}

/* The usual case, nothing to add to whole columns, without a question per row. */
INLINE void finish_row(const struct product *job, int64_t row, float row_scale, int64_t first, const float *sums,
                       const int is_plain, const int numbers, const int element) {
    if (is_plain)
        store_columns((void *)element_at(job->out, row * job->out_stride + first, element), sums, COLUMNS,
                      element);
    else
        finish_any_row(job, row, row_scale, first, sums, numbers, element);
}

INLINE void finish_rows(const struct product *job, int64_t first_row, int64_t row, int64_t rows, int64_t panel,
                        const float *sums, const int numbers) {
    int is_plain = numbers != QUADS && (!job->scales || job->group_chunks) && !job->bias && !job->residual &&
                   (panel + 1) * COLUMNS <= job->out_features;
    for (int64_t i = 0; i < rows; i++, row++, sums += COLUMNS) {
        float row_scale = numbers == QUADS ? job->row_scales[row] : 1.0f;
        if (job->out_element == BFLOAT16)
            finish_row(job, first_row + row, row_scale, panel * COLUMNS, sums, is_plain, numbers, BFLOAT16);
        else
            finish_row(job, first_row + row, row_scale, panel * COLUMNS, sums, is_plain, numbers, FLOAT32);
    }
}

/* Part `part` of `parts` of what a panel has at some chunks, into the second-level cache. */
INLINE void prefetch_panel(const struct product *job, int64_t panel, int64_t chunk, int64_t chunks, int64_t part,
                           int64_t parts, const int weights, const int numbers) {
    int64_t words = smaller(chunks, job->chunks - chunk) * chunk_words(weights, numbers);
    const uint32_t *first = panel_at(job, panel, chunk, weights, numbers);
    for (int64_t word = words * part / parts; word < words * (part + 1) / parts; word++)
        for (int column = 0; column < COLUMNS; column += TILE_COLUMNS)
            __builtin_prefetch(first + word * COLUMNS + column, 0, 2);
}

/* What a block of few rows should have on the way while it multiplies chunks of a panel; see struct block. */
INLINE const char *weights_ahead(const struct product *job, int64_t num_rows, int64_t panel, int64_t chunk,
                                 int64_t chunks, const int weights, const int numbers) {
    if (is_widened(job, num_rows, weights, numbers)) return NULL;
#if defined(__AMX_TILE__)
    /* Tiles wait for their weights: those of two chunks later, of this panel or the next. */
    return num_rows > TILE_PAIR ? NULL : (const char *)(panel_at(job, panel, chunk, weights, numbers) + 2 * PANEL_CHUNK);
#else
    /* Several passes compute over what is in the cache; nothing would be read from memory meanwhile. */
    int64_t next_panel = chunk + chunks < job->chunks ? panel : panel + 1, next = next_panel > panel ? 0 : chunk + chunks;
    if (num_rows <= sum_rows(numbers) || num_rows > ROWS) return NULL;
    if (next_panel >= job->num_panels || next + chunks > job->chunks) return NULL;
    return (const char *)panel_at(job, next_panel, next, weights, numbers);
#endif
}

INLINE struct block block_of(const struct product *job, int64_t first_row, int64_t row, int64_t num_rows, int64_t chunk,
                             const int numbers) {
    int upper = (int)smaller(ROWS, num_rows - row), lower = (int)smaller(ROWS, num_rows - row - upper);
    struct block block = {.rows = {upper, lower}};
    if (job->in_place) {
        block.a_row = job->x_stride * element_bytes(BFLOAT16);
        block.a_chunk[0] = block.a_chunk[1] = chunk_bytes(numbers);
        block.a[0] = (const char *)job->x + (first_row + row) * block.a_row;
        block.a[1] = block.a[0] + ROWS * block.a_row;
    } else {
        block.a_row = chunk_bytes(numbers);
        for (int i = 0; i < 2; i++) {
            block.a_chunk[i] = block.rows[i] * block.a_row;
            block.a[i] = packed_tile(job, row / ROWS + i);
        }
    }
    for (int i = 0; i < 2; i++) block.a[i] += chunk * block.a_chunk[i];
    return block;
}

/* Once for all formats: a compiler takes a second for it. */
__attribute__((noinline)) static void multiply_widened_floats(const struct block *block) {
    multiply_block(block, WEIGHTS_WIDENED, FLOATS);
}

/* All rows of a block by one panel, over some chunks, whose weights are at b. */
INLINE void multiply_rows(const struct product *job, int64_t first_row, int64_t num_rows, int64_t panel, int64_t chunk,
                          int64_t chunks, const uint32_t *b, float *sums, const int weights, const int numbers) {
    float partial[TILE_PAIR * COLUMNS] __attribute__((aligned(64)));
    const float *scales = NULL;
    if (job->group_chunks) scales = job->scales + (chunk / job->group_chunks * job->num_panels + panel) * COLUMNS;
    int64_t next_panel = chunk + chunks < job->chunks ? panel : panel + 1;
    int64_t next_chunk = next_panel > panel ? 0 : chunk + chunks, parts = ceil_divide(num_rows, TILE_PAIR);
    int configured_rows = 0;
    for (int64_t row = 0; row < num_rows; row += TILE_PAIR, sums += TILE_PAIR * COLUMNS) {
        struct block block = block_of(job, first_row, row, num_rows, chunk, numbers);
        int rows = block.rows[0] + block.rows[1];
        block.b = b;
        block.chunks = chunks;
        block.c = (uint32_t *)(scales ? partial : sums);
        block.accumulates = !scales && chunk > 0;
        if (numbers != FLOATS && rows != configured_rows) configure_tiles(block.rows);
        configured_rows = rows;
        block.ahead = weights_ahead(job, num_rows, panel, chunk, chunks, weights, numbers);
        if (num_rows > TILE_PAIR && next_panel < job->num_panels)
            prefetch_panel(job, next_panel, next_chunk, chunks, row / TILE_PAIR, parts, weights, numbers);
        if (!is_widened(job, num_rows, weights, numbers))
            multiply_block(&block, weights, numbers);
        else if (numbers == FLOATS)
            multiply_widened_floats(&block);
        else
            multiply_block(&block, WEIGHTS_WIDENED, numbers);
        if (scales) add_scaled(sums, partial, scales, rows, chunk > 0);
        if (chunk + chunks < job->chunks) continue;
        /* A block later: sums that tiles have just stored cannot be read before they have reached the cache. */
        if (row > 0)
            finish_rows(job, first_row, row - TILE_PAIR, TILE_PAIR, panel, sums - TILE_PAIR * COLUMNS, numbers);
        if (row + TILE_PAIR >= num_rows) finish_rows(job, first_row, row, rows, panel, sums, numbers);
    }
}

/* One block of rows by one panel. */
INLINE void compute_panel_as(const struct product *job, int64_t first_row, int64_t num_rows, int64_t panel,
                             const int weights, const int numbers) {
    float sums[BLOCK_ROWS * COLUMNS] __attribute__((aligned(64)));
    uint32_t widened[MAX_GROUP_CHUNKS * 32 * COLUMNS] __attribute__((aligned(64)));
    const int widens = is_widened(job, num_rows, weights, numbers);
#if defined(__AVX512F__)
    const int few_rows = TILE_PAIR;
#else
    const int few_rows = panel_rows(numbers);
#endif
    /* A few rows read the weights once in any case, best front to back. */
    int64_t depth = widens || num_rows > few_rows ? DEPTH_CHUNKS : job->chunks;
    if (job->group_chunks) depth = job->group_chunks;
    for (int64_t chunk = 0; chunk < job->chunks; chunk += depth) {
        int64_t chunks = smaller(depth, job->chunks - chunk);
        const uint32_t *b = panel_at(job, panel, chunk, weights, numbers);
        if (widens) b = widen(b, chunks, widened, weights, numbers);
        multiply_rows(job, first_row, num_rows, panel, chunk, chunks, b, sums, weights, numbers);
    }
}

/* Code of its own for each format and kind of numbers. What is constant here would be a variable in the bodies of
 * OpenMP's loops, which the compiler makes functions of.
 */
static void compute_panel(const struct product *job, int64_t first_row, int64_t num_rows, int64_t panel) {
#define CASE(format, kind) \
    if (job->weights == format && job->numbers == kind) \
        compute_panel_as(job, first_row, num_rows, panel, format, kind);
#if defined(__AVX512BF16__)
    CASE(WEIGHTS_BFLOAT16, PAIRS)
    CASE(WEIGHTS_INT8, PAIRS)
    CASE(WEIGHTS_INT4, PAIRS)
#endif
    CASE(WEIGHTS_BFLOAT16, FLOATS)
    CASE(WEIGHTS_INT8, FLOATS)
    CASE(WEIGHTS_INT4, FLOATS)
    CASE(WEIGHTS_W8A8, QUADS)
#undef CASE
}

static void pack_rows(const struct product *job, int64_t first_row, int64_t row, int64_t num_rows) {
#define CASE(element, kind) \
    if (job->x_element == element && job->numbers == kind) \
        pack_tile(job, first_row, row, num_rows, element, kind);
    CASE(BFLOAT16, FLOATS)
    CASE(BFLOAT16, PAIRS)
    CASE(BFLOAT16, QUADS)
    CASE(FLOAT32, FLOATS)
    CASE(FLOAT32, QUADS)
#undef CASE
}

static void compute_product(const struct product *job, int num_threads) {
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        for (int64_t first_row = 0; first_row < job->rows; first_row += job->block_rows) {
            int64_t num_rows = smaller(job->block_rows, job->rows - first_row);
            if (!job->in_place) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < num_rows; row += ROWS) pack_rows(job, first_row, row, num_rows);
            }
#pragma omp for schedule(dynamic, TASK_PANELS)
            for (int64_t panel = 0; panel < job->num_panels; panel++) compute_panel(job, first_row, num_rows, panel);
        }
        if (job->numbers != FLOATS) release_tiles();
    }
}

/* out = x * weight' * scale + bias + residual; see struct product. `group` is the number of input features with one
 * scale, a multiple of 32 up to 512, or 0. Returns 0, or -1 for want of memory.
 */
int panel_linear(const void *x, int64_t x_stride, int x_element, const uint32_t *panels, int weights,
                 const float *scales, int64_t group, const int32_t *column_sums, const float *bias,
                 const void *residual, int64_t residual_stride, void *out, int64_t out_stride, int out_element,
                 int64_t rows, int64_t words, int64_t in_features, int64_t out_features, int num_threads) {
    int numbers = weights == WEIGHTS_W8A8 ? QUADS : x_element == BFLOAT16 ? BFLOAT16_ACTIVATIONS : FLOATS;
    struct product job = {
        .x = x,
        .x_stride = x_stride,
        .x_element = x_element,
        .panels = panels,
        .weights = weights,
        .numbers = numbers,
        .scales = scales,
        .group_chunks = group / 32,
        .column_sums = column_sums,
        .bias = bias,
        .residual = residual,
        .residual_stride = residual_stride,
        .out = out,
        .out_stride = out_stride,
        .out_element = out_element,
        .rows = rows,
        .in_features = in_features,
        .out_features = out_features,
        .words = words,
        .chunks = ceil_divide(in_features, chunk_features(numbers)),
        .num_panels = ceil_divide(out_features, COLUMNS),
    };
    job.in_place = numbers == PAIRS && in_features % 32 == 0;
    job.row_bytes = job.chunks * chunk_bytes(numbers);
    job.block_rows = larger(TILE_PAIR, smaller(BLOCK_ROWS, BLOCK_BYTES / job.row_bytes / TILE_PAIR * TILE_PAIR));
    int64_t packed_rows = ceil_divide(smaller(job.block_rows, rows), TILE_PAIR) * TILE_PAIR;
    if (!job.in_place && !(job.packed = aligned_alloc(64, packed_rows * (job.row_bytes + 64)))) return -1;
    if (numbers == QUADS) job.row_scales = (float *)(job.packed + packed_rows * job.row_bytes);
    compute_product(&job, num_threads);
    free(job.packed);
    return 0;
}
