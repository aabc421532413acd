/* What every kernel is written with: vectors of float as wide as the CPU has them, bfloat16, and exp.
 *
 * The compiler's own vector types make one source serve AVX-512, AVX2, SSE2 and NEON. No kernel's result depends on the
 * width: sums run either along a lane, in order, or over SUM_LANES partial sums whatever the CPU.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define TILE_ROWS 12 /* with two vectors each, 24 of 32 registers hold sums */
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define TILE_ROWS 6 /* 12 of 16 */
#else
#define VECTOR_BYTES 16
#define TILE_ROWS 6
#endif

#define LANES (VECTOR_BYTES / 4)
#define PANEL (2 * LANES) /* columns of one tile of a product */
#define SUM_LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
typedef float loose_vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t mask_vector __attribute__((vector_size(VECTOR_BYTES))); /* of a comparison: 0 or -1 */
typedef uint32_t bit_vector __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t half_vector __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

/* Element types of tensors, as the Python side names them. */
enum element { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Of `total`, so many at a time that all turns have about as many, and none more than `most`. */
INLINE int64_t even_share(int64_t total, int64_t most) {
    return total > most ? ceil_divide(total, ceil_divide(total, most)) : most;
}

INLINE float from_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

INLINE int64_t element_bytes(int element) { return element == BFLOAT16 ? 2 : 4; }

INLINE const void *element_at(const void *base, int64_t index, int element) {
    return (const char *)base + index * element_bytes(element);
}

INLINE float load_element(const void *base, int64_t index, int element) {
    return element == BFLOAT16 ? from_bfloat16(((const uint16_t *)base)[index]) : ((const float *)base)[index];
}

INLINE void store_element(void *base, int64_t index, float value, int element) {
    if (element == BFLOAT16)
        ((uint16_t *)base)[index] = to_bfloat16(value);
    else
        ((float *)base)[index] = value;
}

INLINE vector load_vector(const void *source, int element) {
    if (element == FLOAT32) return *(const loose_vector *)source;
#if defined(__AVX2__) && !defined(__AVX512F__) /* one instruction, of which compilers make five */
    return (vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)source)), 16);
#else
    return (vector)(__builtin_convertvector(*(const half_vector *)source, bit_vector) << 16);
#endif
}

/* As to_bfloat16, in the low half of each lane. */
INLINE bit_vector bfloat16_bits(vector value) {
    bit_vector bits = (bit_vector)value, is_nan = (bit_vector)(value != value);
    bit_vector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (is_nan & 0x7fc0) | (~is_nan & rounded);
}

/* The instruction does the same in one step, except that it takes numbers below the smallest normal one for zero. */
INLINE half_vector to_halves(vector value) {
#if defined(__AVX512BF16__)
    return (half_vector)_mm512_cvtneps_pbh((__m512)value);
#else
    return __builtin_convertvector(bfloat16_bits(value), half_vector);
#endif
}

INLINE void store_vector(void *target, vector value, int element) {
    if (element == FLOAT32) {
        *(loose_vector *)target = value;
        return;
    }
    *(half_vector *)target = to_halves(value);
}

/* The same for the end of a row: no more than `count` elements are touched; lanes beyond are zero. */
INLINE vector load_some(const void *source, int64_t count, int element) {
    if (count >= LANES) return load_vector(source, element);
    float buffer[LANES] = {0};
    memcpy(buffer, source, count * element_bytes(element));
    return load_vector(buffer, element);
}

INLINE void store_some(void *target, vector value, int64_t count, int element) {
    if (count >= LANES) {
        store_vector(target, value, element);
        return;
    }
    float buffer[LANES];
    store_vector(buffer, value, element);
    memcpy(target, buffer, count * element_bytes(element));
}

/* As if stored and loaded again. */
INLINE vector round_to(vector value, int element) {
    return element == FLOAT32 ? value : (vector)(__builtin_convertvector(to_halves(value), bit_vector) << 16);
}

INLINE vector choose(mask_vector mask, vector if_set, vector otherwise) {
    return (vector)((mask & (mask_vector)if_set) | (~mask & (mask_vector)otherwise));
}

INLINE vector broadcast(float value) { return (vector){0} + value; }

/* exp(x) to about one part in 10^7; what would be no normal number is clamped. x = n ln 2 + r with |r| <= ln 2 / 2, and
 * Taylor's series to r^7.
 */
INLINE vector exp_vector(vector x) {
    x = choose(x < -86.0f, broadcast(-86.0f), x);
    x = choose(x > 88.0f, broadcast(88.0f), x);
    const float to_integer = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number in the low bits */
    vector shifted = x * 1.44269504f + to_integer;
    vector n = shifted - to_integer;
    vector r = x - n * 0.693145752f; /* ln 2 in two parts: the first has few bits, so that its product is exact */
    r = r - n * 1.42860677e-6f;
    vector sum = broadcast(1.0f / 5040);
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    return sum * (vector)(((bit_vector)shifted + 127 - 0x4b400000u) << 23); /* times 2^n */
}

INLINE float exp_float(float x) { return exp_vector(broadcast(x))[0]; }

/* Partial sums of a row: element i goes to lane i % SUM_LANES, whatever the width of a vector. */
struct lane_sums {
    vector parts[SUM_LANES / LANES];
};

INLINE void add_to_lanes(struct lane_sums *sums, int64_t first, vector value) {
    sums->parts[first / LANES % (SUM_LANES / LANES)] += value;
}

/* Halves are added until one lane is left: always in the same order. */
INLINE float total_of(const struct lane_sums *sums) {
    float lanes[SUM_LANES];
    memcpy(lanes, sums->parts, sizeof lanes);
    for (int half = SUM_LANES / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}
