/* What Python calls in the step of a model, and programs replay. Each is described where it is defined. */
#ifndef OPERATIONS_H
#define OPERATIONS_H

#include <stdint.h>

void linear(const float *x, int64_t x_stride, const void *packed, int element, const float *bias, const float *residual,
            float *out, int64_t rows, int64_t in_features, int64_t out_features, int num_threads);

int panel_linear(const void *x, int64_t x_stride, int x_element, const uint32_t *panels, int weights,
                 const float *scales, int64_t group, const int32_t *column_sums, const float *bias,
                 const void *residual, int64_t residual_stride, void *out, int64_t out_stride, int out_element,
                 int64_t rows, int64_t words, int64_t in_features, int64_t out_features, int num_threads);

void rms_norm(const void *x, int64_t x_stride, const void *weight, float eps, void *out, int64_t out_stride,
              int64_t rows, int64_t size, int element, int num_threads);

void silu_and_multiply(const void *gate_up, int64_t gate_up_stride, void *out, int64_t out_stride, int64_t rows,
                       int64_t size, int element, int num_threads);

void join_columns(const char *left, int64_t left_bytes, int64_t left_stride, const char *right, int64_t right_bytes,
                  int64_t right_stride, char *out, int64_t rows);

int gather_rows(const void *table, int element, int64_t table_rows, const int64_t *rows, void *out, int out_element,
                int64_t num_rows, int64_t size);

int pass_features(const void *rows, const int64_t *sources, const int64_t *keeps, void *pool, int pool_element,
                  int64_t pool_rows, void *previous, int64_t num_rows, int64_t size, int element);

void rotary_angles(const int64_t *positions, int64_t shift, const float *frequencies, float magnitude, void *cos,
                   void *sin, int64_t num_tokens, int64_t half, int element);

int rotate_and_store(void *heads, int64_t heads_stride, const void *query_norm, const void *key_norm, float eps,
                     const void *cos, const void *sin, const int64_t *slots, void *kv, int64_t num_blocks,
                     int64_t block_stride, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                     int64_t head_dim, int64_t block_size, int element, int kv_element, int num_threads);

int paged_attention(const void *query, int64_t token_stride, int64_t head_stride, const void *kv, int64_t num_blocks,
                    int64_t block_stride, void *out, int64_t out_stride, int64_t num_sequences,
                    const int64_t *query_starts, const int64_t *prefix_lengths, const int64_t *table_starts,
                    const int64_t *blocks, const int64_t *tree_masks, const int64_t *tree_depths, int64_t num_heads,
                    int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t window, int64_t first_key,
                    float scale, int element, int kv_element, int num_threads);

void argmax_rows(const float *logits, int64_t stride, int64_t *out, int64_t rows, int64_t size, int num_threads);

void guess_rows(const float *logits, int64_t stride, const int64_t *token_ids, const float *temperature,
                const int64_t *seed, const int64_t *choice, const int64_t *position, int64_t *out, int64_t rows,
                int64_t size, int num_threads);

#endif
