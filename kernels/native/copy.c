/* Whole blocks from one pool to another. */
#include "streaming.h"

enum { MANY_BYTES = 1 << 18 }; /* from where on a second thread saves more than it costs */

/* Block sources[n] of one pool to block targets[n] of the other; no target is a source, and none comes twice. */
void copy_blocks(const char *source_pool, char *target_pool, const int64_t *sources, const int64_t *targets,
                 int64_t num_pairs, int64_t block_bytes, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_pairs * block_bytes >= MANY_BYTES)
    for (int64_t n = 0; n < num_pairs; n++)
        stream_copy(target_pool + targets[n] * block_bytes, source_pool + sources[n] * block_bytes, block_bytes);
}
