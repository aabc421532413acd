/* Products of packed activations with weights in panels: the inner loops of linear layers in bfloat16 and of quantised
 * ones, for AMX tiles, for dot products of AVX-512, and for any CPU.
 *
 * A word, 32 bits, holds two bfloat16, four int8 or eight int4 that follow one another along in_features. Weights are
 * panels of COLUMNS output features, each [words][COLUMNS], so that they are one stream from memory; CHUNK_WORDS of these
 * rows are two AMX tiles beside each other. Activations are packed in tiles of up to ROWS rows, each
 * [chunks][rows][words]. All three loops read the same weights.
 *
 * Each output is one sum over in_features in a fixed order, whatever the other rows, and wherever a sum was cut into
 * several calls.
 */
#pragma once

#include "vectors.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { TILE_COLUMNS = 16, COLUMNS = 2 * TILE_COLUMNS, ROWS = 16, CHUNK_WORDS = 16, PANEL_CHUNK = CHUNK_WORDS * COLUMNS };

/* What the numbers of a product are: activations, and weights once they are read. */
enum numbers {
    FLOATS, /* wherever no instruction takes bfloat16 */
    PAIRS,  /* bfloat16, summed in float32 */
    QUADS,  /* int8, summed in int32: exact */
};

/* What panels hold, or are widened to: words that are multiplied in one step. An int4 stands for itself less 8; pair i
 * of a word of int4 is nibble i of its lower and of its upper half.
 */
enum weights { WEIGHTS_BFLOAT16 = 0, WEIGHTS_INT8 = 1, WEIGHTS_INT4 = 2, WEIGHTS_W8A8 = 3, WEIGHTS_WIDENED = 4 };

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

/* Without an instruction for four int8, two products at a time of int16: of bytes 0 and 2 of a word, then of 1 and 3. */
#if defined(__AVX512VNNI__)
#define QUAD_STEPS 1
#else
#define QUAD_STEPS 2
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

INLINE int chunk_features(const int numbers) { return numbers == QUADS ? 64 : 32; }

/* That one instruction multiplies in each lane, from 32 bits of activations. */
INLINE int step_features(const int numbers) { return numbers == QUADS ? 4 / QUAD_STEPS : numbers == PAIRS ? 2 : 1; }

INLINE int chunk_steps(const int numbers) { return chunk_features(numbers) / step_features(numbers); }
INLINE int64_t chunk_bytes(const int numbers) { return 4 * chunk_steps(numbers); } /* of one row of activations */

/* Of a panel's column, for one chunk of activations. */
INLINE int chunk_words(const int weights, const int numbers) {
    if (weights == WEIGHTS_WIDENED) return chunk_steps(numbers);
    return chunk_features(numbers) / (weights == WEIGHTS_BFLOAT16 ? 2 : weights == WEIGHTS_INT4 ? 8 : 4);
}

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
    const char *ahead; /* as many weights to be fetched meanwhile, or none: those read next, or with tiles a little later */
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
    const char *a0 = block->a[0], *a1 = block->a[1], *ahead = block->ahead;
    const uint32_t *b = block->b;
    for (int64_t chunk = 0; chunk < block->chunks; chunk++) {
        if (ahead)
#pragma GCC unroll 32
            for (int line = 0; line < PANEL_CHUNK * 4 / 64; line++)
                __builtin_prefetch(ahead + chunk * PANEL_CHUNK * 4 + line * 64, 0, 3);
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

/* sums + the products of one step: of 32 bits of activations with LANES times as many of weights. */
INLINE bit_vector add_products(bit_vector sums, const char *activations, bit_vector weights, const int numbers) {
    uint32_t a;
    memcpy(&a, activations, sizeof a);
    if (numbers == FLOATS) {
        float factor;
        memcpy(&factor, activations, sizeof factor);
        return (bit_vector)((vector)sums + factor * (vector)weights);
    }
#if defined(__AVX512BF16__)
    if (numbers == PAIRS)
        return (bit_vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)weights);
#endif
#if ACTIVATION_OFFSET
    return (bit_vector)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32((int)a), (__m512i)weights);
#elif defined(__AVX512BW__)
    return sums + (bit_vector)_mm512_madd_epi16(_mm512_set1_epi32((int)a), (__m512i)weights);
#elif defined(__AVX2__)
    sums += (bit_vector)_mm256_madd_epi16(_mm256_set1_epi32((int)a), (__m256i)weights);
    __asm__("" : "+x"(sums)); /* or the compiler first adds up products, for which there are no registers */
    return sums;
#elif defined(__SSE2__)
    return sums + (bit_vector)_mm_madd_epi16(_mm_set1_epi32((int)a), (__m128i)weights);
#else
    mask_vector b = (mask_vector)weights;
    return sums + (bit_vector)((int16_t)a * (b << 16 >> 16) + ((int32_t)a >> 16) * (b >> 16));
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

/* Pair `pair` of words of int4. */
INLINE bit_vector pair_of_nibbles(bit_vector words, int pair) {
#if defined(__AVX512BW__)
    typedef uint16_t halves __attribute__((vector_size(64)));
    halves table;
    for (int i = 0; i < 32; i++) table[i] = to_bfloat16((float)(i % 16 - 8)); /* the fifth bit of an index is ignored */
    return (bit_vector)_mm512_permutexvar_epi16((__m512i)((halves)words >> 4 * pair), (__m512i)table);
#else
    mask_vector nibbles = (mask_vector)words >> 4 * pair;
    return pair_of(__builtin_convertvector((nibbles & 15) - 8, vector),
                   __builtin_convertvector((nibbles >> 16 & 15) - 8, vector));
#endif
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

/* What step `step` of a word of weights multiplies, LANES columns from b on. */
INLINE bit_vector load_weights(const uint32_t *b, int step, const int weights, const int numbers) {
#if VECTOR_BYTES < 64
    /* Anew for every step: of 16 registers none is left to keep words in. */
    if (step > 0) __asm__ volatile("" : "+r"(b));
#endif
    if (weights == WEIGHTS_WIDENED) return load_shared_words(b);
    if (numbers == PAIRS) {
        if (weights == WEIGHTS_INT8) return pair_of_bytes(load_words(b) >> 16 * step);
        if (weights == WEIGHTS_INT4) return pair_of_nibbles(load_words(b), step);
        return load_shared_words(b);
    }
    if (numbers == QUADS) {
#if QUAD_STEPS == 2
        typedef int16_t shorts __attribute__((vector_size(VECTOR_BYTES)));
        shorts pairs = (shorts)load_words(b);
        return (bit_vector)(step ? pairs >> 8 : pairs << 8 >> 8);
#else
        return load_shared_words(b);
#endif
    }
    bit_vector words = load_words(b);
    if (weights == WEIGHTS_BFLOAT16) return step ? words & 0xffff0000 : words << 16;
    const int bits = weights == WEIGHTS_INT8 ? 8 : 4;
    const int shift = weights == WEIGHTS_INT8 ? 8 * step : 16 * (step % 2) + 4 * (step / 2);
    if (weights == WEIGHTS_INT4) words ^= 0x88888888; /* less 8 */
    return (bit_vector)__builtin_convertvector((mask_vector)(words << (32 - bits - shift)) >> (32 - bits), vector);
}

/* Sums of a few rows by as many columns as leave registers for weights, and for products of integers before they are
 * added; of fewer rows, by a whole panel.
 */
#if defined(__AVX512F__)
enum { MAX_SUM_ROWS = 8, SUM_COLUMNS = COLUMNS };
INLINE int sum_rows(const int numbers) { return (void)numbers, 8; }
INLINE int panel_rows(const int numbers) { return sum_rows(numbers); }
#elif defined(__AVX2__)
enum { MAX_SUM_ROWS = 6, SUM_COLUMNS = COLUMNS / 2 };
INLINE int sum_rows(const int numbers) { return numbers == QUADS ? 4 : 6; }
INLINE int panel_rows(const int numbers) { return sum_rows(numbers) / 2; }
#else
enum { MAX_SUM_ROWS = 2, SUM_COLUMNS = COLUMNS / 2 };
INLINE int sum_rows(const int numbers) { return (void)numbers, 2; }
INLINE int panel_rows(const int numbers) { return sum_rows(numbers) / 2; }
#endif

/* One of several passes over a block: its share of the weights that are read next. */
struct share {
    int64_t first, end; /* lines of each chunk */
};

/* `rows` of a tile, from address a on, by `columns` of a panel. */
INLINE void multiply_some_rows(const int rows, const int columns, const struct block *block, const char *a,
                               int64_t a_chunk, const uint32_t *b, uint32_t *c, struct share share, const int weights,
                               const int numbers) {
    const int words = chunk_words(weights, numbers), steps = chunk_steps(numbers) / words, parts = columns / LANES;
    bit_vector sums[MAX_SUM_ROWS][COLUMNS / LANES], factors[COLUMNS / LANES];
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++)
            sums[row][part] = block->accumulates ? load_words(c + row * COLUMNS + part * LANES) : (bit_vector){0};
    for (int64_t chunk = 0; chunk < block->chunks; chunk++, a += a_chunk, b += words * COLUMNS) {
        if (columns < COLUMNS)
            for (int64_t line = share.first; line < share.end; line++)
                __builtin_prefetch(block->ahead + (chunk * words * COLUMNS * 4 + line * 64), 0, 2);
#pragma GCC unroll 2
        for (int word = 0; word < words; word++)
#pragma GCC unroll 8
            for (int step = 0; step < steps; step++) {
#pragma GCC unroll 8
                for (int part = 0; part < parts; part++)
                    factors[part] = load_weights(b + word * COLUMNS + part * LANES, step, weights, numbers);
#pragma GCC unroll 8
                for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
                    for (int part = 0; part < parts; part++)
                        sums[row][part] =
                            add_products(sums[row][part], a + row * block->a_row + 4 * (word * steps + step),
                                         factors[part], numbers);
            }
    }
#pragma GCC unroll 8
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++) store_words(c + row * COLUMNS + part * LANES, sums[row][part]);
}

/* Any number of rows of a tile by `columns` of a panel, about as many rows at a time each time, with code of its own for
 * each number.
 */
INLINE void multiply_tile_rows(const struct block *block, int tile, int column, const int columns, const int weights,
                               const int numbers) {
    const int most = columns == COLUMNS ? panel_rows(numbers) : sum_rows(numbers), num_rows = block->rows[tile];
    const int some = (int)even_share(num_rows, most);
    const uint32_t *b = block->b + column;
    int64_t passes = COLUMNS / columns * ceil_divide(num_rows, some), pass = column * passes / COLUMNS;
    int64_t lines = block->ahead ? chunk_words(weights, numbers) * COLUMNS * 4 / 64 : 0;
    for (int row = 0; row < num_rows; row += some, pass++) {
        struct share share = {lines * pass / passes, lines * (pass + 1) / passes};
        const char *a = block->a[tile] + row * block->a_row;
        uint32_t *c = block->c + (tile * ROWS + row) * COLUMNS + column;
#define CASE(n)                                                                                     \
    case n:                                                                                                \
        if (n <= most)                                                                                     \
            multiply_some_rows(n, columns, block, a, block->a_chunk[tile], b, c, share, weights, numbers); \
        break;
        switch (smaller(some, num_rows - row)) {
            CASE(1)
            CASE(2)
#if LANES >= 8
            CASE(3) CASE(4) CASE(5) CASE(6)
#endif
#if LANES >= 16
            CASE(7) CASE(8)
#endif
        }
#undef CASE
    }
}

/* Tiles must be configured for the rows of the block. */
INLINE void multiply_block(const struct block *block, const int weights, const int numbers) {
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
        if ((int)SUM_COLUMNS == COLUMNS || block->rows[tile] <= panel_rows(numbers))
            multiply_tile_rows(block, tile, 0, COLUMNS, weights, numbers);
        else
            for (int column = 0; column < COLUMNS; column += SUM_COLUMNS)
                multiply_tile_rows(block, tile, column, SUM_COLUMNS, weights, numbers);
}
