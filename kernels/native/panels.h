/* Products of packed activations with weights in panels: the inner loops of linear layers in bfloat16 and of quantised
 * ones, for AMX tiles, for dot products of AVX-512, and for any CPU.
 *
 * A word, 32 bits, holds two bfloat16 or four int8 that follow one another along in_features. Weights are panels of
 * COLUMNS output features, each [words][COLUMNS], so that they are one stream from memory; CHUNK_WORDS of these rows are
 * two AMX tiles beside each other. Activations are packed in tiles of up to ROWS rows, each [chunks][rows][CHUNK_WORDS].
 * All three loops read the same weights.
 *
 * Each output is one sum over in_features in a fixed order, whatever the other rows, and wherever a sum was cut into
 * several calls.
 */
#pragma once

#include "vectors.h"

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__) || defined(__AMX_TILE__)
#include <immintrin.h>
#endif

enum { TILE_COLUMNS = 16, COLUMNS = 2 * TILE_COLUMNS, ROWS = 16, CHUNK_WORDS = 16, PANEL_CHUNK = CHUNK_WORDS * COLUMNS };

/* What the numbers of a product are: activations, and in a word of the weights. */
enum numbers {
    FLOATS, /* float32 activations, bfloat16 weights: wherever no instruction takes bfloat16 */
    PAIRS,  /* bfloat16, summed in float32 */
    BYTES,  /* the same, with int8 weights in panels of half as many words */
    QUADS,  /* int8, summed in int32: exact */
};

#if defined(__AVX512BF16__)
#define BFLOAT16_ACTIVATIONS PAIRS
#else
#define BFLOAT16_ACTIVATIONS FLOATS
#endif

/* vpdpbusd takes unsigned activations: they are packed with their sign bit flipped, that is 128 too large. */
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
#define ACTIVATION_OFFSET 128
#else
#define ACTIVATION_OFFSET 0
#endif

typedef uint32_t loose_words __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

INLINE bit_vector load_words(const void *source) { return *(const loose_words *)source; }
INLINE void store_words(void *target, bit_vector value) { *(loose_words *)target = value; }

/* COLUMNS numbers, or the first `count` of them, rounded to the element type. */
INLINE void store_columns(void *target, const float *values, int64_t count, const int element) {
#if defined(__AVX512BF16__)
    if (element == BFLOAT16 && count >= COLUMNS) {
        __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + TILE_COLUMNS), _mm512_loadu_ps(values));
        memcpy(target, &pair, sizeof pair);
        return;
    }
#endif
    for (int64_t i = 0; i < count; i += LANES)
        store_some((void *)element_at(target, i, element), load_vector(values + i, FLOAT32), count - i, element);
}

INLINE int64_t chunk_features(const int numbers) { return numbers == QUADS ? 64 : 32; }
INLINE int64_t chunk_bytes(const int numbers) { return numbers == FLOATS ? 128 : 64; } /* of one row */

/* Up to 2 * ROWS rows by a panel over some chunks: c[rows][COLUMNS] of float32 or int32. */
struct block {
    const char *a[2];    /* tiles of activations, at the first chunk */
    int64_t a_row;       /* bytes from a row of a tile to the next */
    int64_t a_chunk[2];  /* bytes from a chunk of a tile to the next */
    int rows[2];         /* of each tile; the second may have none */
    const uint32_t *b;
    int64_t chunks;
    uint32_t *c;
    int accumulates;
};

#if defined(__AMX_TILE__)

/* The registers: 0 to 3 sums, 4 and 5 activations, 6 and 7 weights. */
INLINE void configure_tiles(const int rows[2]) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    const int tile_rows[8] = {rows[0], rows[0], rows[1], rows[1], rows[0], rows[1], ROWS, ROWS};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = (uint8_t)(tile_rows[tile] ? tile_rows[tile] : 1);
        config.row_bytes[tile] = 64;
    }
    __asm__ volatile("" : : "r"(&config) : "memory"); /* some compilers take the intrinsic to read only 8 bytes */
    _tile_loadconfig(&config);
}

INLINE void release_tiles(void) { _tile_release(); }

#define ADD_PRODUCT(sums, a, b)                   \
    do {                                          \
        if (numbers == PAIRS)                     \
            _tile_dpbf16ps(sums, a, b);           \
        else                                      \
            _tile_dpbssd(sums, a, b);             \
    } while (0)

INLINE void multiply_tiles(const struct block *block, const int numbers, const int has_second) {
    enum { STRIDE = COLUMNS * 4 };
    uint32_t *c0 = block->c, *c1 = block->c + ROWS * COLUMNS;
    if (block->accumulates) {
        _tile_loadd(0, c0, STRIDE);
        _tile_loadd(1, c0 + TILE_COLUMNS, STRIDE);
        if (has_second) _tile_loadd(2, c1, STRIDE);
        if (has_second) _tile_loadd(3, c1 + TILE_COLUMNS, STRIDE);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    const char *a0 = block->a[0], *a1 = block->a[1];
    const uint32_t *b = block->b;
    for (int64_t chunk = 0; chunk < block->chunks; chunk++) {
        _tile_loadd(4, a0, block->a_row);
        _tile_loadd(6, b, STRIDE);
        ADD_PRODUCT(0, 4, 6);
        _tile_loadd(7, b + TILE_COLUMNS, STRIDE);
        ADD_PRODUCT(1, 4, 7);
        if (has_second) {
            _tile_loadd(5, a1, block->a_row);
            ADD_PRODUCT(2, 5, 6);
            ADD_PRODUCT(3, 5, 7);
        }
        a0 += block->a_chunk[0], a1 += block->a_chunk[1];
        b += PANEL_CHUNK;
    }
    _tile_stored(0, c0, STRIDE);
    _tile_stored(1, c0 + TILE_COLUMNS, STRIDE);
    if (has_second) _tile_stored(2, c1, STRIDE);
    if (has_second) _tile_stored(3, c1 + TILE_COLUMNS, STRIDE);
}
#undef ADD_PRODUCT

#else
INLINE void configure_tiles(const int rows[2]) { (void)rows; }
INLINE void release_tiles(void) {}
#endif

/* sums + the products of a word of the activations with LANES words of the weights. */
INLINE bit_vector add_products(bit_vector sums, const char *activations, int word, bit_vector weights,
                               const int numbers) {
    if (numbers == FLOATS) {
        const float *a = (const float *)activations + 2 * word;
        vector sum = (vector)sums + a[0] * (vector)(weights << 16);
        return (bit_vector)(sum + a[1] * (vector)(weights & 0xffff0000));
    }
    uint32_t a;
    memcpy(&a, activations + 4 * word, sizeof a);
#if defined(__AVX512BF16__)
    if (numbers == PAIRS || numbers == BYTES)
        return (bit_vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)weights);
#endif
#if ACTIVATION_OFFSET
    return (bit_vector)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32((int)a), (__m512i)weights);
#else
    mask_vector products = {0}, b = (mask_vector)weights;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) products += ((int32_t)(a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24);
    return (bit_vector)((mask_vector)sums + products);
#endif
}

/* Two integers of at most 8 bits in float32, whose lower halves are zero, as a pair of bfloat16. */
INLINE bit_vector pair_of(vector low, vector high) { return (bit_vector)high | (bit_vector)low >> 16; }

/* Bytes 0 and 1 of words of int8 as pairs of bfloat16. They become the low bits of a float32 of 2^23 and more, offset by
 * 128 to have no sign, which then is subtracted: no shifts, of which a CPU does one at a time.
 */
INLINE bit_vector pair_of_bytes(bit_vector quads) {
    const uint32_t magic = 0x4b000000; /* 2^23 */
    vector low = (vector)((quads & 0xff) ^ (magic | 0x80)) - 8388736.0f;
    vector high = (vector)((quads & 0xff00) ^ (magic | 0x8000)) * 0x1p-8f - 32896.0f;
    return pair_of(low, high);
}

/* Words that several products share. Without a word from us compilers read them from memory for each of them, and a CPU
 * of today reads 64 bytes no more often than it multiplies them.
 */
INLINE bit_vector load_shared_words(const uint32_t *source) {
    bit_vector words = load_words(source);
#if defined(__AVX512F__)
    __asm__("" : "+v"(words));
#endif
    return words;
}

/* Sums of a few rows by as many columns as leave registers for weights. */
enum { SUM_ROWS = LANES / 2, SUM_COLUMNS = 2 * LANES < COLUMNS ? TILE_COLUMNS : COLUMNS, PARTS = SUM_COLUMNS / LANES };

/* Word `word` of a chunk of the weights at b, LANES of its columns, as add_products takes it. */
INLINE bit_vector load_weights(const uint32_t *b, int word, const int numbers) {
    if (numbers != BYTES) return load_shared_words(b + word * COLUMNS);
    return pair_of_bytes(load_words(b + word / 2 * COLUMNS) >> word % 2 * 16);
}

/* `rows` of a tile, from address a on, by SUM_COLUMNS of a panel. */
INLINE void multiply_some_rows(const int rows, const struct block *block, const char *a, int64_t a_chunk,
                               const uint32_t *b, uint32_t *c, const int numbers) {
    const int chunk_words = numbers == BYTES ? CHUNK_WORDS / 2 : CHUNK_WORDS; /* of weights */
    bit_vector sums[SUM_ROWS][PARTS], weights[PARTS];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++)
            sums[row][part] = block->accumulates ? load_words(c + row * COLUMNS + part * LANES) : (bit_vector){0};
    for (int64_t chunk = 0; chunk < block->chunks; chunk++, a += a_chunk, b += chunk_words * COLUMNS)
#pragma GCC unroll 2
        for (int word = 0; word < CHUNK_WORDS; word++) {
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) weights[part] = load_weights(b + part * LANES, word, numbers);
#pragma GCC unroll 8
            for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++)
                    sums[row][part] =
                        add_products(sums[row][part], a + row * block->a_row, word, weights[part], numbers);
        }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < PARTS; part++) store_words(c + row * COLUMNS + part * LANES, sums[row][part]);
}

/* Any number of rows of a tile, SUM_ROWS at a time, with code of its own for each remainder. */
INLINE void multiply_tile_rows(const struct block *block, int tile, int column, const int numbers) {
    const uint32_t *b = block->b + column;
    for (int row = 0; row < block->rows[tile]; row += SUM_ROWS) {
        const char *a = block->a[tile] + row * block->a_row;
        uint32_t *c = block->c + (tile * ROWS + row) * COLUMNS + column;
#define CASE(n) \
    case n: multiply_some_rows(n, block, a, block->a_chunk[tile], b, c, numbers); break;
        switch (smaller(SUM_ROWS, block->rows[tile] - row)) {
            CASE(1)
            CASE(2)
#if LANES >= 8
            CASE(3) CASE(4)
#endif
#if LANES >= 16
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
        }
#undef CASE
    }
}

/* Tiles must be configured for the rows of the block. */
INLINE void multiply_block(const struct block *block, const int numbers) {
#if defined(__AMX_TILE__)
    if (numbers != FLOATS) {
        if (block->rows[1])
            multiply_tiles(block, numbers, 1);
        else
            multiply_tiles(block, numbers, 0);
        return;
    }
#endif
    for (int tile = 0; tile < 2; tile++)
        for (int column = 0; column < COLUMNS; column += SUM_COLUMNS) multiply_tile_rows(block, tile, column, numbers);
}
