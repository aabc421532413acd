/* The one inner loop of linear layers, attention scores and weighted values: a small tile of a matrix product. */
#pragma once

#include "vectors.h"

/* Rows of PANEL elements or more: `stride` elements apart from `first` on, or wherever `rows` says, from `column` on.
 */
struct matrix {
    const void *first;
    int64_t stride;
    const void *const *rows;
    int64_t column;
};

INLINE const void *matrix_row(struct matrix matrix, int64_t row, const int element) {
    if (matrix.rows) return element_at(matrix.rows[row], matrix.column, element);
    return element_at(matrix.first, row * matrix.stride, element);
}

/* c[rows][PANEL] = a[rows][depth] * b[depth][PANEL], added to c if `accumulates`. Each element of c is one sum over
 * depth, in order, with every product fused into it: it does not depend on the number of rows, nor on where depth was
 * cut into several calls.
 */
INLINE void multiply_tile_rows(const int rows, int64_t depth, const float *a, int64_t a_stride, struct matrix b,
                               const int b_element, float *c, int64_t c_stride, int accumulates) {
    vector sums[TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++)
            sums[row][part] = accumulates ? load_vector(c + row * c_stride + part * LANES, FLOAT32) : (vector){0};
    for (int64_t k = 0; k < depth; k++) {
        const void *b_row = matrix_row(b, k, b_element);
        vector b0 = load_vector(b_row, b_element);
        vector b1 = load_vector(element_at(b_row, LANES, b_element), b_element);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            float factor = a[row * a_stride + k];
            sums[row][0] += factor * b0;
            sums[row][1] += factor * b1;
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 2
        for (int part = 0; part < 2; part++) store_vector(c + row * c_stride + part * LANES, sums[row][part], FLOAT32);
}

/* The same for any number of rows up to TILE_ROWS, with code of its own for each. */
INLINE void multiply_tile(int rows, int64_t depth, const float *a, int64_t a_stride, struct matrix b,
                          const int b_element, float *c, int64_t c_stride, int accumulates) {
#define CASE(n) \
    case n: multiply_tile_rows(n, depth, a, a_stride, b, b_element, c, c_stride, accumulates); break;
    switch (rows) {
        CASE(1)
        CASE(2)
        CASE(3) CASE(4) CASE(5) CASE(6)
#if TILE_ROWS == 12
            CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
#undef CASE
}
