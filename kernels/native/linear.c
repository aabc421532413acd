/* Linear layers in float32, with weights packed once.
 *
 * Packed weights are panels of PANEL output features, each [in_features][PANEL], so that one product reads them front
 * to back. They are kept in bfloat16 where that loses nothing, as with most checkpoints: the results are the same, bit
 * for bit, for half of the bytes.
 */
#include "operations.h"
#include "products.h"

enum { DEPTH_BLOCK = 256, ROW_BLOCK = 8 * TILE_ROWS, PANEL_GROUP = 8 };

int64_t panel_columns(void) { return PANEL; }

/* Or each operation in one thread, whatever it is told: a compiler may be without OpenMP. */
int computes_in_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

/* packed[panel][k][column] = weight[panel * PANEL + column][k], zero beyond the last output feature. */
void pack_weight(const float *weight, int64_t out_features, int64_t in_features, int element, void *packed) {
    int64_t num_panels = ceil_divide(out_features, PANEL);
    for (int64_t panel = 0; panel < num_panels; panel++)
        for (int64_t k = 0; k < in_features; k++)
            for (int64_t column = 0; column < PANEL; column++) {
                int64_t feature = panel * PANEL + column;
                float value = feature < out_features ? weight[feature * in_features + k] : 0.0f;
                store_element(packed, (panel * in_features + k) * PANEL + column, value, element);
            }
}

struct linear {
    const float *x; /* [rows, in_features], rows x_stride apart */
    int64_t x_stride;
    const void *packed;
    const float *bias;     /* [out_features] or none */
    const float *residual; /* [rows, out_features] or none */
    float *out;            /* [rows, out_features] */
    int64_t rows, in_features, out_features;
};

INLINE void add_bias_and_residual(const struct linear *job, int64_t row, int64_t first, int64_t last) {
    float *out = job->out + row * job->out_features;
    if (job->bias)
        for (int64_t column = first; column < last; column++) out[column] += job->bias[column];
    if (job->residual) {
        const float *residual = job->residual + row * job->out_features;
        for (int64_t column = first; column < last; column++) out[column] += residual[column];
    }
}

/* One tile over one block of depth. The last panel may be narrower than its packed weights: then by way of a buffer. */
INLINE void compute_tile(const struct linear *job, const void *weights, const int element, int64_t row, int64_t rows,
                         int64_t panel, int64_t k, int64_t depth) {
    struct matrix b = {.first = weights, .stride = PANEL};
    const float *a = job->x + row * job->x_stride + k;
    float *c = job->out + row * job->out_features + panel * PANEL;
    int64_t columns = smaller(PANEL, job->out_features - panel * PANEL);
    if (columns == PANEL) {
        multiply_tile((int)rows, depth, a, job->x_stride, b, element, c, job->out_features, k > 0);
        return;
    }
    float buffer[TILE_ROWS * PANEL] = {0};
    if (k > 0)
        for (int64_t r = 0; r < rows; r++) memcpy(buffer + r * PANEL, c + r * job->out_features, columns * sizeof *c);
    multiply_tile((int)rows, depth, a, job->x_stride, b, element, buffer, PANEL, k > 0);
    for (int64_t r = 0; r < rows; r++) memcpy(c + r * job->out_features, buffer + r * PANEL, columns * sizeof *c);
}

/* One panel over one block of depth, for all rows of a block. Many rows share one conversion of the weights. */
INLINE void compute_panel(const struct linear *job, const int element, int64_t first_row, int64_t last_row,
                          int64_t panel, int64_t k, int64_t depth) {
    const void *weights = element_at(job->packed, (panel * job->in_features + k) * PANEL, element);
    const int64_t rows = even_share(last_row - first_row, TILE_ROWS);
    if (element == BFLOAT16 && last_row - first_row > TILE_ROWS) {
        float converted[DEPTH_BLOCK * PANEL];
        for (int64_t i = 0; i < depth * PANEL; i += LANES)
            store_vector(converted + i, load_vector(element_at(weights, i, element), element), FLOAT32);
        for (int64_t row = first_row; row < last_row; row += rows)
            compute_tile(job, converted, FLOAT32, row, smaller(rows, last_row - row), panel, k, depth);
        return;
    }
    for (int64_t row = first_row; row < last_row; row += rows)
        compute_tile(job, weights, element, row, smaller(rows, last_row - row), panel, k, depth);
}

INLINE void compute_block(const struct linear *job, const int element, int64_t row_block, int64_t panel_group) {
    int64_t first_row = row_block * ROW_BLOCK, last_row = smaller(first_row + ROW_BLOCK, job->rows);
    int64_t first_panel = panel_group * PANEL_GROUP;
    int64_t last_panel = smaller(first_panel + PANEL_GROUP, ceil_divide(job->out_features, PANEL));
    /* A few rows read the weights once in any case, best front to back. */
    int64_t depth_block = last_row - first_row <= TILE_ROWS ? job->in_features : DEPTH_BLOCK;
    for (int64_t k = 0; k < job->in_features; k += depth_block) {
        int64_t depth = smaller(depth_block, job->in_features - k);
        for (int64_t panel = first_panel; panel < last_panel; panel++)
            compute_panel(job, element, first_row, last_row, panel, k, depth);
    }
    int64_t first_column = first_panel * PANEL, last_column = smaller(last_panel * PANEL, job->out_features);
    for (int64_t row = first_row; row < last_row; row++) add_bias_and_residual(job, row, first_column, last_column);
}

INLINE void compute_linear(const struct linear *job, const int element, int num_threads) {
    int64_t num_groups = ceil_divide(ceil_divide(job->out_features, PANEL), PANEL_GROUP);
    int64_t num_tasks = ceil_divide(job->rows, ROW_BLOCK) * num_groups;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1 && num_tasks > 1)
    for (int64_t task = 0; task < num_tasks; task++) compute_block(job, element, task / num_groups, task % num_groups);
}

/* out = x * weight' + bias + residual; see struct linear. Each output is one sum over in_features in order, whatever
 * the number of rows and threads.
 */
void linear(const float *x, int64_t x_stride, const void *packed, int element, const float *bias, const float *residual,
            float *out, int64_t rows, int64_t in_features, int64_t out_features, int num_threads) {
    struct linear job = {
        .x = x,
        .x_stride = x_stride,
        .packed = packed,
        .bias = bias,
        .residual = residual,
        .out = out,
        .rows = rows,
        .in_features = in_features,
        .out_features = out_features,
    };
    if (element == BFLOAT16)
        compute_linear(&job, BFLOAT16, num_threads);
    else
        compute_linear(&job, FLOAT32, num_threads);
}
