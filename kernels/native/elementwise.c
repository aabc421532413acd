/* RMS norm, rotary embedding with the write into the KV pool, the gate of the MLP, rows picked from a table, and rows
 * side by side. Row by row: no result depends on other rows.
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

/* x, out: [rows, size], rows x_stride and out_stride apart. */
void rms_norm(const void *x, int64_t x_stride, const void *weight, float eps, void *out, int64_t out_stride,
              int64_t rows, int64_t size, int element, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows >= MANY_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        const void *from = element_at(x, row * x_stride, element);
        void *to = (void *)element_at(out, row * out_stride, element);
        if (element == BFLOAT16)
            normalise_row(from, weight, eps, to, size, BFLOAT16);
        else
            normalise_row(from, weight, eps, to, size, FLOAT32);
    }
}

/* out[rows, size] = silu(gate) * up for gate_up [rows, 2 * size], with strides of their own. The gate is rounded before
 * the product, as torch does.
 */
INLINE void gate_row(const void *gate, const void *up, void *out, int64_t size, const int element) {
    for (int64_t i = 0; i < size; i += LANES) {
        vector x = load_some(element_at(gate, i, element), size - i, element);
        vector activated = round_to(x / (1.0f + exp_vector(-x)), element);
        vector gated = activated * load_some(element_at(up, i, element), size - i, element);
        store_some((void *)element_at(out, i, element), gated, size - i, element);
    }
}

void silu_and_multiply(const void *gate_up, int64_t gate_up_stride, void *out, int64_t out_stride, int64_t rows,
                       int64_t size, int element, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows >= MANY_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        const void *gate = element_at(gate_up, row * gate_up_stride, element);
        const void *up = element_at(gate, size, element);
        void *to = (void *)element_at(out, row * out_stride, element);
        if (element == BFLOAT16)
            gate_row(gate, up, to, size, BFLOAT16);
        else
            gate_row(gate, up, to, size, FLOAT32);
    }
}

/* out[row] = left[row], right[row]; sizes and strides in bytes. */
void join_columns(const char *left, int64_t left_bytes, int64_t left_stride, const char *right, int64_t right_bytes,
                  int64_t right_stride, char *out, int64_t rows) {
    for (int64_t row = 0; row < rows; row++, out += left_bytes + right_bytes) {
        memcpy(out, left + row * left_stride, left_bytes);
        memcpy(out + left_bytes, right + row * right_stride, right_bytes);
    }
}

enum { FLOAT16 = 2 }; /* an element of tables alone */

/* Subnormal numbers too: the exponent is brought up to float's by a product. */
INLINE float from_float16(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13, special = (half & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
    float value;
    memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    memcpy(&bits, &value, sizeof bits);
    bits |= special | (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void convert_row(const void *row, const int element, void *out, const int out_element, int64_t size) {
    for (int64_t i = 0; i < size; i++) {
        float value = element == FLOAT16 ? from_float16(((const uint16_t *)row)[i]) : load_element(row, i, element);
        store_element(out, i, value, out_element);
    }
}

INLINE void copy_row(const void *row, int element, void *out, int out_element, int64_t size) {
    if (element == out_element)
        memcpy(out, row, size * element_bytes(element));
    else if (element == BFLOAT16)
        convert_row(row, BFLOAT16, out, FLOAT32, size);
    else if (element == FLOAT16)
        convert_row(row, FLOAT16, out, out_element, size);
    else
        convert_row(row, FLOAT32, out, BFLOAT16, size);
}

/* out[n] = table[rows[n]], converted; table: [table_rows, size]. Returns 0, or -1 without having written anything if a
 * row is none of the table's.
 */
int gather_rows(const void *table, int element, int64_t table_rows, const int64_t *rows, void *out, int out_element,
                int64_t num_rows, int64_t size) {
    for (int64_t n = 0; n < num_rows; n++)
        if (rows[n] < 0 || rows[n] >= table_rows) return -1;
    for (int64_t n = 0; n < num_rows; n++) {
        const void *row = element_at(table, rows[n] * size, element == FLOAT16 ? BFLOAT16 : element);
        void *to = (void *)element_at(out, n * size, out_element);
        copy_row(row, element, to, out_element, size);
    }
    return 0;
}

/* For each of num_rows rows: previous[n] = rows[sources[n]], or where that is negative the pool's row ~sources[n].
 * Then rows[n] goes to the pool's row keeps[n], unless that is negative. All rows have `size` elements of `element`;
 * the pool's are of pool_element. Returns 0, or -1 without having written anything if there is no such row.
 */
int pass_features(const void *rows, const int64_t *sources, const int64_t *keeps, void *pool, int pool_element,
                  int64_t pool_rows, void *previous, int64_t num_rows, int64_t size, int element) {
    for (int64_t n = 0; n < num_rows; n++)
        if (sources[n] >= num_rows || sources[n] < -pool_rows || keeps[n] >= pool_rows) return -1;
    for (int64_t n = 0; n < num_rows; n++) {
        void *to = (void *)element_at(previous, n * size, element);
        if (sources[n] >= 0)
            memcpy(to, element_at(rows, sources[n] * size, element), size * element_bytes(element));
        else
            copy_row(element_at(pool, ~sources[n] * size, pool_element), pool_element, to, element, size);
    }
    for (int64_t n = 0; n < num_rows; n++)
        if (keeps[n] >= 0)
            copy_row(element_at(rows, n * size, element), element,
                     (void *)element_at(pool, keeps[n] * size, pool_element), pool_element, size);
    return 0;
}

/* Cosine and sine of x = n pi / 2 + r with |r| <= pi / 4, by Taylor's series to r^12. In double, so that what is
 * rounded to float is right even a million turns from zero.
 */
INLINE void turn(float angle, float *cosine, float *sine) {
    const double to_integer = 0x1.8p52; /* adding it rounds to a whole number in the low bits */
    double shifted = angle * 0.63661977236758134 + to_integer, n = shifted - to_integer;
    double r = angle - n * 1.5707963267341256; /* pi / 2 in two parts: the first has few bits, so that n times it */
    r = r - n * 6.077100506506192e-11;         /* is exact */
    double s = r * r;
    double c = 1 + s * (-1.0 / 2 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320 + s * (-1.0 / 3628800 +
               s * (1.0 / 479001600))))));
    double d = r + r * s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880 + s * -1.0 / 39916800))));
    uint64_t quarter;
    memcpy(&quarter, &shifted, sizeof quarter);
    double across = quarter & 1 ? d : c, up = quarter & 1 ? c : d;
    *cosine = (float)((quarter + 1) & 2 ? -across : across);
    *sine = (float)(quarter & 2 ? -up : up);
}

/* Cosine and sine of (positions[t] + shift) * frequencies, times magnitude: [num_tokens, 2 * half], both halves alike.
 */
void rotary_angles(const int64_t *positions, int64_t shift, const float *frequencies, float magnitude, void *cos,
                   void *sin, int64_t num_tokens, int64_t half, int element) {
    for (int64_t token = 0; token < num_tokens; token++) {
        float position = (float)(positions[token] + shift);
        for (int64_t first = 0; first < half; first += SUM_LANES) {
            float cosines[SUM_LANES], sines[SUM_LANES];
            int64_t count = smaller(SUM_LANES, half - first);
            for (int64_t i = 0; i < count; i++) turn(position * frequencies[first + i], &cosines[i], &sines[i]);
            for (int64_t i = 0; i < count; i++)
                for (int64_t at = token * 2 * half + first + i, copy = 0; copy < 2; copy++, at += half) {
                    store_element(cos, at, cosines[i] * magnitude, element);
                    store_element(sin, at, sines[i] * magnitude, element);
                }
        }
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

/* heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], tokens heads_stride elements apart. Returns 0, or -1
 * without having written anything if a slot lies outside the pool.
 */
int rotate_and_store(void *heads, int64_t heads_stride, const void *query_norm, const void *key_norm, float eps,
                     const void *cos, const void *sin, const int64_t *slots, void *kv, int64_t num_blocks,
                     int64_t block_stride, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, int64_t block_size, int element, int kv_element, int num_threads) {
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
        void *row = (void *)element_at(heads, token * heads_stride, element);
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
