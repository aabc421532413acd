/* RMS norm, rotary embedding with the write into the KV pool, the gate of the MLP, and rows
 * side by side. Row by row: no result depends on
 * other rows.
 */
#include <string.h>

#include "operations.h"
#include "vectors.h"

enum { MANY_ROWS = 32 }; /* from where on a second thread saves more than it costs */

INLINE float mean_square(const void *x, int64_t size, const int element) {
    struct lane_sums sums = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        vector value = load_some(element_at(x, i, element), size - i, element);
        add_to_lanes(&sums, i, value * value);
    }
    return total_of(&sums) / (float)size;
}

/* Rounded to the element type before the weight, as the reference does. x and out may be the same. */
INLINE void normalise_row(const void *x, const void *weight, float eps, void *out, int64_t size, const int element) {
    float factor = 1.0f / sqrtf(mean_square(x, size, element) + eps);
    for (int64_t i = 0; i < size; i += LANES) {
        vector normed = round_to(load_some(element_at(x, i, element), size - i, element) * factor, element);
        vector scaled = normed * load_some(element_at(weight, i, element), size - i, element);
        store_some((void *)element_at(out, i, element), scaled, size - i, element);
    }
}

/* x: [rows, size], rows x_stride apart; out: [rows, size]. */
void rms_norm(const void *x, int64_t x_stride, const void *weight, float eps, void *out, int64_t rows, int64_t size,
              int element, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows >= MANY_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        const void *from = element_at(x, row * x_stride, element);
        void *to = (void *)element_at(out, row * size, element);
        if (element == BFLOAT16)
            normalise_row(from, weight, eps, to, size, BFLOAT16);
        else
            normalise_row(from, weight, eps, to, size, FLOAT32);
    }
}

/* out[rows, size] = silu(gate) * up for gate_up [rows, 2 * size]. The gate is rounded before the product, as torch
 * does. */
INLINE void gate_row(const void *gate, const void *up, void *out, int64_t size, const int element) {
    for (int64_t i = 0; i < size; i += LANES) {
        vector x = load_some(element_at(gate, i, element), size - i, element);
        vector activated = round_to(x / (1.0f + exp_vector(-x)), element);
        vector gated = activated * load_some(element_at(up, i, element), size - i, element);
        store_some((void *)element_at(out, i, element), gated, size - i, element);
    }
}

void silu_and_multiply(const void *gate_up, void *out, int64_t rows, int64_t size, int element, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows >= MANY_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        const void *gate = element_at(gate_up, 2 * row * size, element);
        const void *up = element_at(gate_up, (2 * row + 1) * size, element);
        void *to = (void *)element_at(out, row * size, element);
        if (element == BFLOAT16)
            gate_row(gate, up, to, size, BFLOAT16);
        else
            gate_row(gate, up, to, size, FLOAT32);
    }
}

/* out[row] = left[row], right[row]; sizes in bytes. */
void join_columns(const char *left, int64_t left_bytes, const char *right, int64_t right_bytes, char *out,
                  int64_t rows) {
    for (int64_t row = 0; row < rows; row++, out += left_bytes + right_bytes) {
        memcpy(out, left + row * left_bytes, left_bytes);
        memcpy(out + left_bytes, right + row * right_bytes, right_bytes);
    }
}

struct rotation {
    int64_t num_heads, num_kv_heads, head_dim, block_size;
    void *kv; /* the layer: [blocks, 2, num_kv_heads, block_size, head_dim], blocks block_stride elements apart */
    int64_t block_stride;
    float eps;
    const void *query_norm, *key_norm; /* [head_dim], or none: no norm before the rotation */
};

/* Dimension i turns together with i + head_dim / 2. From and to may be the same. */
INLINE void rotate_head(const void *head, const void *cos, const void *sin, void *out, int64_t head_dim,
                        const int element, const int out_element) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t j = i + half, count = half - i;
        vector first = load_some(element_at(head, i, element), count, element);
        vector second = load_some(element_at(head, j, element), count, element);
        vector first_turned = first * load_some(element_at(cos, i, element), count, element) -
                              second * load_some(element_at(sin, i, element), count, element);
        vector second_turned = second * load_some(element_at(cos, j, element), count, element) +
                               first * load_some(element_at(sin, j, element), count, element);
        store_some((void *)element_at(out, i, out_element), first_turned, count, out_element);
        store_some((void *)element_at(out, j, out_element), second_turned, count, out_element);
    }
}

/* One token: heads [num_heads + 2 * num_kv_heads, head_dim]; queries are turned in place, keys and values go to slot.
 */
INLINE void rotate_and_store_token(const struct rotation *job, void *heads, const void *cos, const void *sin,
                                   int64_t slot, const int element, const int kv_element) {
    int64_t head_dim = job->head_dim, page = job->block_size * head_dim;
    int64_t first = slot / job->block_size * job->block_stride + slot % job->block_size * head_dim;
    for (int64_t h = 0; h < job->num_heads + job->num_kv_heads; h++) {
        void *head = (void *)element_at(heads, h * head_dim, element);
        const int is_query = h < job->num_heads;
        const void *norm = is_query ? job->query_norm : job->key_norm;
        if (norm) normalise_row(head, norm, job->eps, head, head_dim, element);
        if (is_query) {
            rotate_head(head, cos, sin, head, head_dim, element, element);
        } else {
            void *key = (void *)element_at(job->kv, first + (h - job->num_heads) * page, kv_element);
            rotate_head(head, cos, sin, key, head_dim, element, kv_element);
        }
    }
    const void *values = element_at(heads, (job->num_heads + job->num_kv_heads) * head_dim, element);
    int64_t first_value = first + job->num_kv_heads * page;
    for (int64_t h = 0; h < job->num_kv_heads; h++)
        for (int64_t i = 0; i < head_dim; i += LANES)
            store_some((void *)element_at(job->kv, first_value + h * page + i, kv_element),
                       load_some(element_at(values, h * head_dim + i, element), head_dim - i, element), head_dim - i,
                       kv_element);
}

/* Returns 0, or -1 without having written anything if a slot lies outside the pool. */
int rotate_and_store(void *heads, const void *query_norm, const void *key_norm, float eps, const void *cos,
                     const void *sin, const int64_t *slots, void *kv, int64_t num_blocks, int64_t block_stride,
                     int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                     int element, int kv_element, int num_threads) {
    for (int64_t token = 0; token < num_tokens; token++)
        if (slots[token] < 0 || slots[token] >= num_blocks * block_size) return -1;
    struct rotation job = {
        .num_heads = num_heads,
        .num_kv_heads = num_kv_heads,
        .head_dim = head_dim,
        .block_size = block_size,
        .kv = kv,
        .block_stride = block_stride,
        .eps = eps,
        .query_norm = query_norm,
        .key_norm = key_norm,
    };
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_tokens >= MANY_ROWS)
    for (int64_t token = 0; token < num_tokens; token++) {
        void *row = (void *)element_at(heads, token * (num_heads + 2 * num_kv_heads) * head_dim, element);
        const void *row_cos = element_at(cos, token * head_dim, element);
        const void *row_sin = element_at(sin, token * head_dim, element);
        if (element == FLOAT32 && kv_element == FLOAT32)
            rotate_and_store_token(&job, row, row_cos, row_sin, slots[token], FLOAT32, FLOAT32);
        else if (element == BFLOAT16 && kv_element == BFLOAT16)
            rotate_and_store_token(&job, row, row_cos, row_sin, slots[token], BFLOAT16, BFLOAT16);
        else
            rotate_and_store_token(&job, row, row_cos, row_sin, slots[token], element, kv_element);
    }
    return 0;
}
