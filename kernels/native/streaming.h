/* Copying what will not be read again soon: past the caches, whose old contents stay, and without first reading the
 * lines that are overwritten, which an ordinary copy does.
 */
#pragma once

#include "vectors.h"

enum {
    PAGE = 4096,
    STREAM_CHUNK = 4 * PAGE, /* fits into the first-level cache, where the source can be looked at again */
    STREAM_RUN = 128,
};

#if defined(__SSE2__)
#include <immintrin.h>

/* 64 bytes; the target is aligned to them. */
INLINE void stream_line(char *target, const char *source) {
#if defined(__AVX512F__)
    _mm512_stream_si512((void *)target, _mm512_loadu_si512(source));
#elif defined(__AVX2__)
    for (int i = 0; i < 64; i += 32)
        _mm256_stream_si256((__m256i *)(target + i), _mm256_loadu_si256((const __m256i *)(source + i)));
#else
    for (int i = 0; i < 64; i += 16)
        _mm_stream_si128((__m128i *)(target + i), _mm_loadu_si128((const __m128i *)(source + i)));
#endif
}

/* A chunk or what is left of one. The pages of a whole one take turns: memory works on several at a time. The stores
 * may overtake later ones until stream_end.
 */
static inline void stream_chunk(char *target, const char *source, int64_t num_bytes) {
    if (num_bytes != STREAM_CHUNK || (intptr_t)target % 64) {
        memcpy(target, source, num_bytes);
        return;
    }
    for (int64_t run = 0; run < PAGE; run += STREAM_RUN)
        for (int64_t page = 0; page < STREAM_CHUNK; page += PAGE)
            for (int64_t i = page + run; i < page + run + STREAM_RUN; i += 64) stream_line(target + i, source + i);
}

static inline void stream_end(void) { _mm_sfence(); }

#else

static inline void stream_chunk(char *target, const char *source, int64_t num_bytes) {
    memcpy(target, source, num_bytes);
}

static inline void stream_end(void) {}

#endif

static inline void stream_copy(char *target, const char *source, int64_t num_bytes) {
    for (int64_t first = 0; first < num_bytes; first += STREAM_CHUNK)
        stream_chunk(target + first, source + first, smaller(STREAM_CHUNK, num_bytes - first));
    stream_end();
}
