/* The one inner loop of linear layers, attention scores and weighted values: a small tile of a matrix product. */
#pragma once

#include "vectors.h"

enum { WIDE_ROWS = 3 }; /* of a tile of two panels, at most: 12 sums */

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

INLINE struct matrix from_column(struct matrix matrix, int64_t column, const int element) {
    matrix.first = element_at(matrix.first, column, element);
    matrix.column += column;
    return matrix;
}

/* c[rows][parts * LANES] = a[rows][depth] * b[depth][parts * LANES], added to c if `accumulates`. Each element of c is
 * one sum over depth, in order, with every product fused into it: it does not depend on the number of rows, nor on
 * where depth was cut into several calls.
 */
INLINE void multiply_tile_rows(const int rows, const int parts, int64_t depth, const float *a, int64_t a_stride,
                               struct matrix b, const int b_element, float *c, int64_t c_stride, int accumulates) {
    vector sums[TILE_ROWS][4];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            sums[row][part] = accumulates ? load_vector(c + row * c_stride + part * LANES, FLOAT32) : (vector){0};
    for (int64_t k = 0; k < depth; k++) {
        const void *b_row = matrix_row(b, k, b_element);
        vector columns[4];
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            columns[part] = load_vector(element_at(b_row, part * LANES, b_element), b_element);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            float factor = a[row * a_stride + k];
#pragma GCC unroll 4
            for (int part = 0; part < parts; part++) sums[row][part] += factor * columns[part];
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < parts; part++)
            store_vector(c + row * c_stride + part * LANES, sums[row][part], FLOAT32);
}

#define CASE(n, parts) \
    case n: multiply_tile_rows(n, parts, depth, a, a_stride, b, b_element, c, c_stride, accumulates); break;

/* A panel of columns, for any number of rows up to TILE_ROWS, with code of its own for each. */
INLINE void multiply_tile(int rows, int64_t depth, const float *a, int64_t a_stride, struct matrix b,
                          const int b_element, float *c, int64_t c_stride, int accumulates) {
    switch (rows) {
        CASE(1, 2)
        CASE(2, 2)
        CASE(3, 2) CASE(4, 2) CASE(5, 2) CASE(6, 2)
#if TILE_ROWS == 12
            CASE(7, 2) CASE(8, 2) CASE(9, 2) CASE(10, 2) CASE(11, 2) CASE(12, 2)
#endif
    }
}

/* Two panels: one of a few rows has so few sums that each product would wait for the one before. */
INLINE void multiply_wide_tile(int rows, int64_t depth, const float *a, int64_t a_stride, struct matrix b,
                               const int b_element, float *c, int64_t c_stride, int accumulates) {
    switch (rows) {
        CASE(1, 4)
        CASE(2, 4)
        CASE(3, 4)
    }
}

#undef CASE

/* Any number of rows, and of whole panels of columns. */
INLINE void multiply_panels(int64_t num_rows, int64_t columns, int64_t depth, const float *a, int64_t a_stride,
                            struct matrix b, const int b_element, float *c, int64_t c_stride, int accumulates) {
    const int64_t rows = even_share(num_rows, TILE_ROWS), wide = num_rows <= WIDE_ROWS ? 2 * PANEL : columns + 1;
    int64_t column = 0;
    for (; column + wide <= columns; column += wide)
        multiply_wide_tile((int)num_rows, depth, a, a_stride, from_column(b, column, b_element), b_element, c + column,
                           c_stride, accumulates);
    for (; column < columns; column += PANEL)
        for (int64_t row = 0; row < num_rows; row += rows)
            multiply_tile((int)smaller(rows, num_rows - row), depth, a + row * a_stride, a_stride,
                          from_column(b, column, b_element), b_element, c + row * c_stride + column, c_stride,
                          accumulates);
}
