/* What this machine can do when nothing holds it up: what kernels are held against. Of no use to the engine. */
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* Reads pieces of memory and does nothing with them but what keeps the compiler from leaving it out; a thread takes
 * `together` of them, which follow one another in `offsets`. */
int64_t read_pieces(const char *base, const int64_t *offsets, int64_t num_pieces, int64_t piece_bytes, int64_t together,
                    int num_threads) {
    int64_t seen = 0;
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) reduction(^ : seen)
    for (int64_t first = 0; first < num_pieces; first += together)
        for (int64_t i = first; i < first + together && i < num_pieces; i++) {
            const int64_t *piece = (const int64_t *)(base + offsets[i]);
            for (int64_t j = 0; j < piece_bytes / 8; j++) seen ^= piece[j];
        }
    return seen;
}

enum { TILE_BYTES = 1024, NUM_OPERANDS = 4, BUFFER_BYTES = NUM_OPERANDS * TILE_BYTES };

#if defined(__AMX_BF16__) && defined(__AMX_INT8__)

struct tile_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

static void shape_tiles(void) {
    struct tile_shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
    _tile_loadconfig(&shapes);
}

/* Two tiles of activations with two of weights, loaded anew each time. */
#define MULTIPLY(product)                      \
    for (int64_t i = 0; i < repeats; i++) {    \
        _tile_loadd(4, data, 64);              \
        _tile_loadd(5, data + TILE_BYTES, 64); \
        _tile_loadd(6, data + 2 * TILE_BYTES, 64); \
        _tile_loadd(7, data + 3 * TILE_BYTES, 64); \
        product(0, 4, 6);                      \
        product(1, 4, 7);                      \
        product(2, 5, 6);                      \
        product(3, 5, 7);                      \
    }

static int64_t multiply(const char *data, int is_int8, int64_t repeats) {
    shape_tiles();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (is_int8) {
        MULTIPLY(_tile_dpbssd)
    } else {
        MULTIPLY(_tile_dpbf16ps)
    }
    _tile_release();
    return repeats * 4 * 2 * 16 * 16 * (is_int8 ? 64 : 32);
}

#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)

enum { ROWS = 6 };

/* Six rows, of which one word each is spread over a vector, with two vectors of weights. */
static int64_t multiply(const char *data, int is_int8, int64_t repeats) {
    __m512i sums[ROWS][2];
    memset(sums, 0, sizeof sums);
    for (int64_t i = 0; i < repeats; i++) {
        const char *at = data + i % 16 * 128;
        __m512i left = _mm512_loadu_si512(at), right = _mm512_loadu_si512(at + 64);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            int32_t word;
            memcpy(&word, data + 2048 + (row * 16 + i % 16) * 4, sizeof word);
            __m512i spread = _mm512_set1_epi32(word);
            if (is_int8) {
                sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], spread, left);
                sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], spread, right);
            } else {
                sums[row][0] = (__m512i)_mm512_dpbf16_ps((__m512)sums[row][0], (__m512bh)spread, (__m512bh)left);
                sums[row][1] = (__m512i)_mm512_dpbf16_ps((__m512)sums[row][1], (__m512bh)spread, (__m512bh)right);
            }
        }
    }
    for (int row = 0; row < ROWS; row++) __asm__ volatile("" ::"v"(sums[row][0]), "v"(sums[row][1]));
    return repeats * ROWS * 2 * 2 * 16 * (is_int8 ? 4 : 2);
}

#elif defined(__AVX2__) && defined(__FMA__)

enum { ROWS = 4 };

/* Four rows of one float, or of two int16, with two vectors: no instruction takes bfloat16 or int8. */
static int64_t multiply(const char *data, int is_int8, int64_t repeats) {
    __m256 sums[ROWS][2];
    __m256i whole_sums[ROWS][2];
    memset(sums, 0, sizeof sums);
    memset(whole_sums, 0, sizeof whole_sums);
    for (int64_t i = 0; i < repeats; i++) {
        const char *at = data + i % 16 * 64;
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 2
            for (int part = 0; part < 2; part++) {
                const char *spread = data + 2048 + (row * 16 + i % 16) * 4;
                if (is_int8) {
                    int32_t word;
                    memcpy(&word, spread, sizeof word);
                    __m256i products = _mm256_madd_epi16(_mm256_set1_epi32(word),
                                                         _mm256_loadu_si256((const __m256i *)(at + 32 * part)));
                    whole_sums[row][part] = _mm256_add_epi32(whole_sums[row][part], products);
                } else {
                    sums[row][part] = _mm256_fmadd_ps(_mm256_broadcast_ss((const float *)spread),
                                                      _mm256_loadu_ps((const float *)(at + 32 * part)), sums[row][part]);
                }
            }
    }
    for (int row = 0; row < ROWS; row++)
        __asm__ volatile("" ::"x"(sums[row][0]), "x"(sums[row][1]), "x"(whole_sums[row][0]), "x"(whole_sums[row][1]));
    return repeats * ROWS * 2 * 2 * 8 * (is_int8 ? 2 : 1);
}

#else

static int64_t multiply(const char *data, int is_int8, int64_t repeats) {
    (void)data, (void)is_int8, (void)repeats;
    return 0;
}

#endif

/* Products of operands that stay in the first-level cache, on all threads at once. Returns how many operations that
 * were; 0 where the CPU has no instruction for them. */
int64_t multiply_in_cache(int is_int8, int64_t repeats, int num_threads) {
    int64_t operations = 0;
#pragma omp parallel num_threads(num_threads) reduction(+ : operations)
    {
        char data[BUFFER_BYTES] __attribute__((aligned(64)));
        memset(data, 0, sizeof data);
        operations += multiply(data, is_int8, repeats);
    }
    return operations;
}
