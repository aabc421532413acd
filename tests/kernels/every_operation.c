/* Runs kernels on made-up numbers and prints what two machines are compared by: a hash of each one's results, or where
 * compilers may fuse either of two products with their sum, a weighted sum of the results and one of their magnitudes.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "operations.h"

void pack_weight(const float *weight, int64_t out_features, int64_t in_features, int element, void *packed);
void pack_panels(const uint32_t *weight, int64_t out_features, int64_t words, int64_t panels, uint32_t *packed,
                 int num_threads);
void argmax_rows(const float *logits, int64_t stride, int64_t *out, int64_t rows, int64_t size, int num_threads);
void copy_blocks(const char *source_pool, char *target_pool, const int64_t *sources, const int64_t *targets,
                 int64_t num_pairs, int64_t block_bytes, int num_threads);
int fingerprint(const uint8_t *prefix, int64_t prefix_bytes, const uint8_t *const *sources, uint8_t *const *targets,
                const int64_t *sizes, int64_t num_segments, uint8_t *digest);

enum { FLOAT32 = 0, BFLOAT16 = 1, THREADS = 2, ROWS = 21, IN = 256, OUT = 70, PADDED = 96, SEED = 12345 };

static uint64_t state = SEED;

static uint32_t next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

/* Whole multiples of 2^-8 in [-1, 1): exact in bfloat16 too. */
static float number(void) { return (float)((int)(next() % 512) - 256) / 256; }

static void *floats(int64_t count) {
    float *made = malloc(count * sizeof *made);
    for (int64_t i = 0; i < count; i++) made[i] = number();
    return made;
}

static void *halves(int64_t count) {
    uint16_t *made = malloc(count * sizeof *made);
    for (int64_t i = 0; i < count; i++) {
        float value = number();
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        made[i] = bits >> 16;
    }
    return made;
}

static void *numbers(int64_t count, int element) { return element == BFLOAT16 ? halves(count) : floats(count); }

static void show(const char *name, int detail, const void *data, int64_t num_bytes) {
    uint64_t hash = 14695981039346656037u;
    for (int64_t i = 0; i < num_bytes; i++) hash = (hash ^ ((const uint8_t *)data)[i]) * 1099511628211u;
    printf("%s %d %016llx\n", name, detail, (unsigned long long)hash);
}

static void show_sum(const char *name, int element, const void *data, int64_t count) {
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits = element == BFLOAT16 ? (uint32_t)((const uint16_t *)data)[i] << 16 : ((const uint32_t *)data)[i];
        float value;
        memcpy(&value, &bits, sizeof value);
        sum += value * (double)(i % 251 - 125);
        magnitude += fabs(value * (double)(i % 251 - 125));
    }
    printf("%s %d %.9g %.9g\n", name, element, sum, magnitude);
}

static void linear_layers(void) {
    float *x = floats(ROWS * IN), *weight = floats(OUT * IN), *bias = floats(OUT), *out = calloc(ROWS * OUT, 4);
    float *packed = calloc(2 * OUT * IN, 4); /* panels may be wider than OUT needs */
    pack_weight(weight, OUT, IN, BFLOAT16, packed);
    linear(x, IN, packed, BFLOAT16, bias, NULL, out, ROWS, IN, OUT, THREADS);
    show("linear", FLOAT32, out, ROWS * OUT * 4);
    const int bits[] = {16, 8, 4, 8};
    for (int format = 0; format < 4; format++) {
        int64_t words = IN * bits[format] / 32;
        uint32_t *raw = format == 0 ? halves(OUT * IN) : malloc(OUT * words * 4);
        for (int64_t i = 0; format > 0 && i < OUT * words; i++) raw[i] = next(), raw[i] ^= next() << 16;
        uint32_t *panels = calloc(PADDED * words, 4);
        pack_panels(raw, OUT, words, PADDED / 32, panels, THREADS);
        int64_t group = format == 2 ? 128 : 0, groups = group ? IN / group : 1;
        float *scales = format == 0 ? NULL : floats(groups * PADDED);
        int32_t sums[PADDED] = {0};
        for (int64_t i = 0; i < OUT; i++)
            for (int64_t word = 0; word < words; word++)
                for (int part = 0; part < 32; part += 8) sums[i] += (int8_t)(raw[i * words + word] >> part);
        panel_linear(x, IN, FLOAT32, panels, format, scales, group, sums, bias, NULL, 0, out, OUT, FLOAT32, ROWS, words,
                     IN, OUT, THREADS);
        show("panel_linear", format, out, ROWS * OUT * 4);
    }
}

static void rows(int element) {
    int64_t bytes = element == BFLOAT16 ? 2 : 4;
    void *x = numbers(ROWS * 2 * IN, element), *out = calloc(ROWS * IN, bytes);
    rms_norm(x, IN, numbers(IN, element), 1e-6f, out, IN, ROWS, IN, element, THREADS);
    show("rms_norm", element, out, ROWS * IN * bytes);
    silu_and_multiply(x, 2 * IN, out, IN, ROWS, IN, element, THREADS);
    show("silu_and_multiply", element, out, ROWS * IN * bytes);
    int64_t found[ROWS];
    argmax_rows(floats(ROWS * IN), IN, found, ROWS, IN, THREADS);
    show("argmax_rows", element, found, sizeof found);
}

enum { HEADS = 6, KV_HEADS = 2, DIM = 64, BLOCK = 16, BLOCKS = 12, ALL_HEADS = HEADS + 2 * KV_HEADS };

static void attention(int element) {
    int64_t bytes = element == BFLOAT16 ? 2 : 4, block = 2 * KV_HEADS * BLOCK * DIM, slots[ROWS], positions[ROWS];
    void *heads = numbers(ROWS * ALL_HEADS * DIM, element), *kv = numbers(BLOCKS * block, element);
    void *cosine = calloc(ROWS * DIM, bytes), *sine = calloc(ROWS * DIM, bytes), *out = calloc(ROWS * HEADS * DIM, bytes);
    const int64_t starts[] = {0, 1, ROWS}, prefixes[] = {70, 30}, tables[] = {0, 5, 9};
    const int64_t blocks[] = {3, 9, 0, 7, 11, 1, 2, 8, 5};
    for (int64_t i = 0; i < ROWS; i++) {
        positions[i] = i == 0 ? prefixes[0] : prefixes[1] + i - 1;
        slots[i] = blocks[(i == 0 ? 0 : 5) + positions[i] / BLOCK] * BLOCK + positions[i] % BLOCK;
    }
    float *frequencies = floats(DIM / 2);
    rotary_angles(positions, 0, frequencies, 1.0f, cosine, sine, ROWS, DIM / 2, element);
    show("rotary_angles", element, cosine, ROWS * DIM * bytes);
    void *query_norm = numbers(DIM, element), *key_norm = numbers(DIM, element); /* arguments are made in any order */
    rotate_and_store(heads, ALL_HEADS * DIM, query_norm, key_norm, 1e-6f, cosine, sine, slots, kv, BLOCKS, block, ROWS,
                     HEADS, KV_HEADS, DIM, BLOCK, element, element, THREADS);
    show_sum("rotate_and_store", element, kv, BLOCKS * block);
    paged_attention(heads, ALL_HEADS * DIM, DIM, kv, BLOCKS, block, out, HEADS * DIM, 2, starts, prefixes, tables, blocks,
                    NULL, NULL, HEADS, KV_HEADS, DIM, BLOCK, 0, 0, 0.125f, element, element, THREADS);
    show_sum("paged_attention", element, out, ROWS * HEADS * DIM);
}

static void choices_and_copies(void) {
    int64_t out[ROWS], seeds[ROWS], some[ROWS];
    float temperatures[ROWS];
    for (int64_t i = 0; i < ROWS; i++) seeds[i] = next(), some[i] = i, temperatures[i] = 0.5f + i / 8.0f;
    guess_rows(floats(ROWS * IN), IN, NULL, temperatures, seeds, some, some, out, ROWS, IN, THREADS);
    show("guess_rows", FLOAT32, out, sizeof out);
    const int64_t from[] = {2, 0}, to[] = {1, 3};
    enum { BYTES = 40000 };
    char *pool = (char *)halves(4 * BYTES / 2);
    copy_blocks(pool, pool, from, to, 2, BYTES, THREADS);
    show("copy_blocks", 0, pool, 4 * BYTES);
    const uint8_t *source = (const uint8_t *)pool;
    const int64_t size = BYTES;
    uint8_t *target = malloc(BYTES), digest[8] = {0};
    fingerprint((const uint8_t *)"eagleray", 8, &source, &target, &size, 1, digest);
    show("fingerprint", 0, digest, sizeof digest);
}

int main(void) {
    linear_layers();
    for (int element = FLOAT32; element <= BFLOAT16; element++) rows(element), attention(element);
    choices_and_copies();
    return 0;
}
