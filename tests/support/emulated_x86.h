/* AVX-512 and AMX in plain C: the instructions that kernels/native uses, under their names, with the results of Intel's
 * instruction set reference. What a CPU refuses, such as an address that is not aligned or tiles whose shapes do not
 * fit, ends the program. The compiler itself makes two vectors of each of 64 bytes.
 *
 * To be included before a source, which then finds immintrin.h included already, and macros in place of its functions.
 */
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <immintrin.h>

#define EMULATED static inline __attribute__((always_inline))

typedef uint16_t emulated_halves __attribute__((vector_size(64)));
typedef uint32_t emulated_words __attribute__((vector_size(64)));
typedef int32_t emulated_integers __attribute__((vector_size(64)));
typedef uint64_t emulated_longs __attribute__((vector_size(64)));

EMULATED void emulated_check(int holds) {
    if (!holds) __builtin_trap();
}

/* ---- AVX-512 ---- */

EMULATED __m512 emulated_loadu(const void *source) {
    __m512 value;
    memcpy(&value, source, sizeof value);
    return value;
}

EMULATED void emulated_storeu(void *target, __m512 value) { memcpy(target, &value, sizeof value); }

EMULATED __m512 emulated_load(const void *source) {
    emulated_check((uintptr_t)source % 64 == 0);
    return emulated_loadu(source);
}

EMULATED void emulated_store(void *target, __m512 value) {
    emulated_check((uintptr_t)target % 64 == 0);
    emulated_storeu(target, value);
}

EMULATED __m512i emulated_load_some_halves(__mmask32 mask, const void *source) {
    uint16_t halves[32] = {0};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) memcpy(&halves[i], (const char *)source + 2 * i, 2);
    return (__m512i)emulated_loadu(halves);
}

EMULATED emulated_integers emulated_bits_of(__mmask16 mask) {
    const emulated_integers bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (mask & bits) != 0;
}

EMULATED __m512 emulated_choose(emulated_integers mask, __m512 if_set, __m512 otherwise) {
    return (__m512)((mask & (emulated_integers)if_set) | (~mask & (emulated_integers)otherwise));
}

/* The second where one is no number. */
EMULATED __m512 emulated_max(__m512 a, __m512 b) { return emulated_choose(a > b, a, b); }

EMULATED float emulated_reduce(__m512 value, int is_sum) {
    float lanes[16];
    emulated_storeu(lanes, value);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) {
            float a = lanes[i + half], b = lanes[i];
            lanes[i] = is_sum ? a + b : a > b ? a : b;
        }
    return lanes[0];
}

/* What rounding to a whole number takes away; of infinity nothing is left. */
EMULATED __m512 emulated_fraction(__m512 value) {
    for (int i = 0; i < 16; i++) value[i] = isinf(value[i]) ? 0.0f : value[i] - rintf(value[i]);
    return value;
}

EMULATED __m512 emulated_scale(__m512 value, __m512 power) {
    for (int i = 0; i < 16; i++)
        value[i] = isnan(power[i]) ? power[i] : ldexpf(value[i], (int)fmaxf(fminf(floorf(power[i]), 512), -512));
    return value;
}

EMULATED __m512i emulated_multiply_longs(__m512i a, __m512i b) {
    return (__m512i)(((emulated_longs)a & UINT32_MAX) * ((emulated_longs)b & UINT32_MAX));
}

EMULATED __m512i emulated_add_products_of_two(__m512i a, __m512i b) {
    emulated_integers x = (emulated_integers)a, y = (emulated_integers)b;
    return (__m512i)((x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16));
}

/* Of an unsigned and a signed byte. */
EMULATED __m512i emulated_add_products_of_four(__m512i sums, __m512i a, __m512i b) {
    emulated_integers total = (emulated_integers)sums, y = (emulated_integers)b;
    emulated_words x = (emulated_words)a;
    for (int i = 0; i < 32; i += 8) total += (emulated_integers)(x >> i & 255) * (y << (24 - i) >> 24);
    return (__m512i)total;
}

EMULATED __m512i emulated_permute(__m512i index, __m512i table) {
    emulated_halves from = (emulated_halves)table, at = (emulated_halves)index, out;
    for (int i = 0; i < 32; i++) out[i] = from[at[i] % 32];
    return (__m512i)out;
}

EMULATED __m512i emulated_permute_two(__m512i a, __m512i index, __m512i b) {
    emulated_halves first = (emulated_halves)a, second = (emulated_halves)b, at = (emulated_halves)index, out;
    for (int i = 0; i < 32; i++) out[i] = at[i] & 32 ? second[at[i] % 32] : first[at[i] % 32];
    return (__m512i)out;
}

/* ---- AVX512_BF16, by halves: those stay in registers ---- */

typedef uint32_t emulated_half __attribute__((vector_size(32), may_alias));
typedef uint16_t emulated_short_half __attribute__((vector_size(16)));

/* What is too small for a normal number is zero. */
EMULATED emulated_half emulated_flush(emulated_half bits) {
    return bits & ~((emulated_half)((bits & 0x7f800000) == 0) & 0x7fffffff);
}

EMULATED emulated_half emulated_first_of_pairs(emulated_half pairs) { return emulated_flush(pairs << 16); }
EMULATED emulated_half emulated_second_of_pairs(emulated_half pairs) { return emulated_flush(pairs & 0xffff0000); }

/* sums + a * b, rounded once: a product of bfloat16 is exact. */
EMULATED __m256 emulated_add_product(__m256 sums, emulated_half a, emulated_half b) {
    return (__m256)emulated_flush((emulated_half)((__m256)a * (__m256)b + sums));
}

EMULATED __m512 emulated_add_pairs(__m512 sums, __m512bh a, __m512bh b) {
    emulated_half total[2], x[2], y[2];
    memcpy(total, &sums, sizeof sums), memcpy(x, &a, sizeof a), memcpy(y, &b, sizeof b);
    for (int i = 0; i < 2; i++) {
        __m256 sum = (__m256)emulated_flush(total[i]);
        sum = emulated_add_product(sum, emulated_second_of_pairs(x[i]), emulated_second_of_pairs(y[i]));
        sum = emulated_add_product(sum, emulated_first_of_pairs(x[i]), emulated_first_of_pairs(y[i]));
        total[i] = (emulated_half)sum;
    }
    return emulated_loadu(total);
}

EMULATED emulated_short_half emulated_round(emulated_half bits) {
    emulated_half is_nan = (emulated_half)((bits & 0x7fffffff) > 0x7f800000), value = emulated_flush(bits);
    emulated_half rounded = (value + 0x7fff + (value >> 16 & 1)) >> 16;
    return __builtin_convertvector((is_nan & (bits >> 16 | 0x40)) | (~is_nan & rounded), emulated_short_half);
}

EMULATED __m256bh emulated_to_halves(__m512 value) {
    emulated_half bits[2];
    memcpy(bits, &value, sizeof bits);
    emulated_short_half rounded[2] = {emulated_round(bits[0]), emulated_round(bits[1])};
    __m256bh halves;
    memcpy(&halves, rounded, sizeof halves);
    return halves;
}

EMULATED __m512bh emulated_to_more_halves(__m512 high, __m512 low) {
    __m256bh halves[2] = {emulated_to_halves(low), emulated_to_halves(high)};
    return (__m512bh)emulated_loadu(halves);
}

/* ---- AMX ---- */

struct emulated_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

/* Of a thread; all sources share them. */
__attribute__((weak)) _Thread_local struct {
    struct emulated_config config;
    emulated_words rows[8][16];
} emulated_tiles;

EMULATED void emulated_release(void) { memset(&emulated_tiles, 0, sizeof emulated_tiles); }

EMULATED void emulated_configure(const void *source) {
    struct emulated_config config;
    memcpy(&config, source, sizeof config);
    emulated_check(config.palette == 1 && config.start_row == 0);
    for (int i = 0; i < 14; i++) emulated_check(config.reserved[i] == 0);
    for (int tile = 0; tile < 16; tile++) {
        emulated_check(config.rows[tile] <= (tile < 8 ? 16 : 0) && config.row_bytes[tile] <= (tile < 8 ? 64 : 0));
        emulated_check(!config.rows[tile] == !config.row_bytes[tile]);
    }
    emulated_release();
    emulated_tiles.config = config;
}

EMULATED int emulated_rows(int tile) {
    emulated_check(emulated_tiles.config.rows[tile] > 0);
    return emulated_tiles.config.rows[tile];
}

EMULATED int emulated_row_bytes(int tile) { return emulated_tiles.config.row_bytes[tile]; }

EMULATED void emulated_zero(int tile) {
    emulated_rows(tile);
    memset(emulated_tiles.rows[tile], 0, sizeof emulated_tiles.rows[tile]);
}

EMULATED void emulated_load_tile(int tile, const void *source, int64_t stride) {
    emulated_zero(tile);
    for (int row = 0; row < emulated_rows(tile); row++)
        memcpy(&emulated_tiles.rows[tile][row], (const char *)source + row * stride, emulated_row_bytes(tile));
}

EMULATED void emulated_store_tile(int tile, void *target, int64_t stride) {
    for (int row = 0; row < emulated_rows(tile); row++)
        memcpy((char *)target + row * stride, &emulated_tiles.rows[tile][row], emulated_row_bytes(tile));
}

EMULATED void emulated_check_shapes(int sums, int a, int b) {
    emulated_check(sums != a && sums != b && a != b);
    emulated_check(emulated_rows(sums) == emulated_rows(a) && emulated_row_bytes(sums) == emulated_row_bytes(b));
    emulated_check(emulated_row_bytes(a) == 4 * emulated_rows(b));
}

/* The sums of the first of all pairs, and of the second, are added to the tile as one. */
static inline void emulated_multiply_pairs(int sums, int a, int b) {
    emulated_check_shapes(sums, a, b);
    for (int row = 0; row < emulated_rows(a); row++)
        for (int i = 0; i < 2; i++) {
            __m256 first = {0}, second = {0};
            for (int k = 0; k < emulated_rows(b); k++) {
                emulated_half pair = (emulated_half){0} + emulated_tiles.rows[a][row][k];
                emulated_half pairs = ((const emulated_half *)&emulated_tiles.rows[b][k])[i];
                first = emulated_add_product(first, emulated_first_of_pairs(pair), emulated_first_of_pairs(pairs));
                second = emulated_add_product(second, emulated_second_of_pairs(pair), emulated_second_of_pairs(pairs));
            }
            emulated_half *total = (emulated_half *)&emulated_tiles.rows[sums][row] + i;
            __m256 both = (__m256)emulated_flush((emulated_half)(first + second));
            *total = emulated_flush((emulated_half)((__m256)emulated_flush(*total) + both));
        }
}

/* Of signed bytes. */
static inline void emulated_multiply_quads(int sums, int a, int b) {
    emulated_check_shapes(sums, a, b);
    for (int row = 0; row < emulated_rows(a); row++)
        for (int k = 0; k < emulated_rows(b); k++) {
            int32_t quad = (int32_t)emulated_tiles.rows[a][row][k];
            emulated_integers quads = (emulated_integers)emulated_tiles.rows[b][k];
            for (int i = 0; i < 32; i += 8)
                emulated_tiles.rows[sums][row] += (emulated_words)((int8_t)(quad >> i) * (quads << (24 - i) >> 24));
        }
}

/* ---- Under their names ---- */

#undef _mm512_reduce_ps
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd

#define _mm512_setzero_ps() ((__m512){0})
#define _mm512_set1_ps(value) ((float)(value) - (__m512){0}) /* keeps the sign of zero */
#define _mm512_set1_epi32(value) ((__m512i)((emulated_integers){0} + (int32_t)(value)))
#define _mm512_loadu_ps(source) emulated_loadu(source)
#define _mm512_loadu_si512(source) ((__m512i)emulated_loadu(source))
#define _mm512_load_ps(source) emulated_load(source)
#define _mm512_load_si512(source) ((__m512i)emulated_load(source))
#define _mm512_storeu_ps(target, value) emulated_storeu(target, value)
#define _mm512_storeu_si512(target, value) emulated_storeu(target, (__m512)(value))
#define _mm512_store_si512(target, value) emulated_store(target, (__m512)(value))
#define _mm512_stream_si512(target, value) emulated_store(target, (__m512)(value))
#define _mm512_maskz_loadu_epi16(mask, source) emulated_load_some_halves(mask, source)
#define _mm512_maskz_mov_ps(mask, value) emulated_choose(emulated_bits_of(mask), value, (__m512){0})
#define _mm512_add_ps(a, b) ((a) + (b))
#define _mm512_sub_ps(a, b) ((a) - (b))
#define _mm512_fmadd_ps(a, b, c) ((a) * (b) + (c))
#define _mm512_fmsub_ps(a, b, c) ((a) * (b) - (c))
#define _mm512_max_ps(a, b) emulated_max(a, b)
#define _mm512_mask_max_ps(source, mask, a, b) emulated_choose(emulated_bits_of(mask), emulated_max(a, b), source)
#define _mm512_reduce_max_ps(value) emulated_reduce(value, 0)
#define _mm512_reduce_add_ps(value) emulated_reduce(value, 1)
#define _mm512_reduce_ps(value, to_nearest) emulated_fraction(value)
#define _mm512_scalef_ps(value, power) emulated_scale(value, power)
#define _mm512_mul_epu32(a, b) emulated_multiply_longs(a, b)
#define _mm512_madd_epi16(a, b) emulated_add_products_of_two(a, b)
#define _mm512_dpbusd_epi32(sums, a, b) emulated_add_products_of_four(sums, a, b)
#define _mm512_permutexvar_epi16(index, table) emulated_permute(index, table)
#define _mm512_permutex2var_epi16(a, index, b) emulated_permute_two(a, index, b)
#define _mm512_dpbf16_ps(sums, a, b) emulated_add_pairs(sums, a, b)
#define _mm512_cvtneps_pbh(value) emulated_to_halves(value)
#define _mm512_cvtne2ps_pbh(high, low) emulated_to_more_halves(high, low)

#define _tile_loadconfig(config) emulated_configure(config)
#define _tile_release() emulated_release()
#define _tile_zero(tile) emulated_zero(tile)
#define _tile_loadd(tile, source, stride) emulated_load_tile(tile, source, stride)
#define _tile_stored(tile, target, stride) emulated_store_tile(tile, target, stride)
#define _tile_dpbf16ps(sums, a, b) emulated_multiply_pairs(sums, a, b)
#define _tile_dpbssd(sums, a, b) emulated_multiply_quads(sums, a, b)

/* Some tell the compiler that a vector stays in its register, of which there is none as wide. Those that are `volatile`
 * are not concerned.
 */
#define __asm__(...)
