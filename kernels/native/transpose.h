/* Turning rows of elements into columns, a square of LANES by LANES at a time. */
#pragma once

#include "vectors.h"

#if defined(__clang__)
INLINE vector shuffle(vector a, vector b, const uint32_t *source) {
    vector out;
    for (int lane = 0; lane < LANES; lane++)
        out[lane] = source[lane] < LANES ? a[source[lane]] : b[source[lane] - LANES];
    return out;
}
#else
INLINE vector shuffle(vector a, vector b, const uint32_t *source) {
    bit_vector lanes;
    memcpy(&lanes, source, sizeof lanes);
    return __builtin_shuffle(a, b, lanes);
}
#endif

/* Transpose LANES rows of LANES elements, exchanging ever smaller squares. */
INLINE void transpose_square(vector rows[LANES]) {
#pragma GCC unroll 4
    for (int size = LANES / 2; size > 0; size /= 2) {
        uint32_t low[LANES], high[LANES];
#pragma GCC unroll 16
        for (int lane = 0; lane < LANES; lane++) {
            low[lane] = lane & size ? LANES + lane - size : lane;
            high[lane] = lane & size ? LANES + lane : lane + size;
        }
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) {
            if (row & size) continue;
            vector first = rows[row], second = rows[row + size];
            rows[row] = shuffle(first, second, low);
            rows[row + size] = shuffle(first, second, high);
        }
    }
}
