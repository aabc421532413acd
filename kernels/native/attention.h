/* A step's attention as tiles: what the ways to compute one share. */
#pragma once

#include "vectors.h"

enum {
    QUERY_ROWS = 48,    /* of one partial result, at most */
    MAX_HEAD_DIM = 256, /* and a multiple of PANEL on every CPU */
};

struct batch {
    const void *query; /* [tokens, num_heads, head_dim] */
    int64_t token_stride, head_stride;
    const void *kv; /* [blocks, 2, num_kv_heads, block_size, head_dim], blocks block_stride elements apart */
    int64_t block_stride;
    void *out; /* [tokens, num_heads, head_dim], tokens out_stride elements apart */
    int64_t out_stride;
    int64_t num_sequences;
    const int64_t *query_starts;   /* [num_sequences + 1] */
    const int64_t *prefix_lengths; /* [num_sequences] */
    const int64_t *table_starts;   /* [num_sequences + 1], in blocks */
    const int64_t *blocks;
    const int64_t *tree_masks;  /* [tokens], or none: bit j, the token sees token j of its run; 0: it is in no tree */
    const int64_t *tree_depths; /* [tokens], or none */
    int64_t num_heads, num_kv_heads, head_dim, block_size, window; /* no window: 0 */
    int64_t first_key; /* keys before it are never seen */
    float scale;
    int element, kv_element;
    int64_t tile_rows; /* of one tile of queries, at most: a row is one token and one of the heads that share KV */
};

/* A tile of queries: rows that read the same KV head, of consecutive tokens. Or tiles of several KV heads, of the same
 * tokens: whoever numbers their rows together numbers head by head.
 */
struct tile {
    int64_t sequence, kv_head, first_row, num_rows;
    int64_t num_heads; /* from kv_head on, each with num_rows rows */
    int64_t first_key, end_key; /* that any of its rows sees */
    int is_tree;
};

INLINE int64_t group_size(const struct batch *batch) { return batch->num_heads / batch->num_kv_heads; }

INLINE int64_t num_tiles(const struct batch *batch, int64_t sequence) {
    int64_t num_tokens = batch->query_starts[sequence + 1] - batch->query_starts[sequence];
    return ceil_divide(num_tokens * group_size(batch), batch->tile_rows) * batch->num_kv_heads;
}

/* Index of a row's token among all of the query. */
INLINE int64_t token_of(const struct batch *batch, const struct tile *tile, int64_t row) {
    return batch->query_starts[tile->sequence] + (tile->first_row + row) / group_size(batch);
}

/* Slot in its sequence of a row's token: the one after its last key. */
INLINE int64_t slot_of(const struct batch *batch, const struct tile *tile, int64_t row) {
    return batch->prefix_lengths[tile->sequence] + (tile->first_row + row) / group_size(batch);
}

/* The first key that a row sees: by position, which in a tree counts depths. */
INLINE int64_t first_visible(const struct batch *batch, const struct tile *tile, int64_t row) {
    if (!batch->window) return batch->first_key;
    int64_t position = slot_of(batch, tile, row);
    if (tile->is_tree)
        position = batch->prefix_lengths[tile->sequence] + batch->tree_depths[token_of(batch, tile, row)];
    return larger(batch->first_key, position - batch->window + 1);
}

/* Bits [first, end) of 64. */
INLINE uint64_t bits_between(int64_t first, int64_t end) {
    first = larger(first, 0), end = smaller(end, 64);
    if (first >= end) return 0;
    return ~(uint64_t)0 >> (64 - (end - first)) << first;
}

/* Which of the 64 keys from `first` a row of a tree sees, the lowest bit being the first. */
static inline uint64_t visible_in_tree(const struct batch *batch, const struct tile *tile, int64_t row, int64_t first) {
    int64_t prefix = batch->prefix_lengths[tile->sequence], begin = first_visible(batch, tile, row);
    const int64_t *depths = batch->tree_depths + batch->query_starts[tile->sequence];
    uint64_t seen = (uint64_t)batch->tree_masks[token_of(batch, tile, row)];
    for (int64_t token = 0; token < 64 && seen >> token; token++)
        if (seen >> token & 1 && prefix + depths[token] < begin) seen &= ~((uint64_t)1 << token);
    int64_t shift = prefix - first;
    if (shift >= 64 || shift <= -64)
        seen = 0;
    else
        seen = shift >= 0 ? seen << shift : seen >> -shift;
    return seen | bits_between(begin - first, prefix - first);
}

/* Of a tile whose rows are known: what they see. */
static inline void bound_tile(const struct batch *batch, struct tile *tile) {
    tile->is_tree = batch->tree_masks && batch->tree_masks[batch->query_starts[tile->sequence]];
    tile->first_key = first_visible(batch, tile, 0);
    for (int64_t row = 1; tile->is_tree && row < tile->num_rows; row++)
        tile->first_key = smaller(tile->first_key, first_visible(batch, tile, row));
    tile->end_key = slot_of(batch, tile, tile->num_rows - 1) + 1;
}

/* Number `index` of the tiles of all sequences, counted sequence by sequence. */
static inline struct tile find_tile(const struct batch *batch, int64_t index) {
    struct tile tile = {.num_heads = 1};
    while (index >= num_tiles(batch, tile.sequence)) index -= num_tiles(batch, tile.sequence++);
    int64_t num_tokens = batch->query_starts[tile.sequence + 1] - batch->query_starts[tile.sequence];
    int64_t num_rows = num_tokens * group_size(batch);
    tile.kv_head = index % batch->num_kv_heads;
    tile.first_row = index / batch->num_kv_heads * batch->tile_rows;
    tile.num_rows = smaller(batch->tile_rows, num_rows - tile.first_row);
    bound_tile(batch, &tile);
    return tile;
}

INLINE int64_t rows_of_heads(const struct tile *tile) { return tile->num_heads * tile->num_rows; }

/* Index in the query and in the output of the token and the head of a row among those of all heads. */
INLINE void locate_row(const struct batch *batch, const struct tile *tile, int64_t row, int64_t *token, int64_t *head) {
    int64_t kv_head = tile->kv_head;
    if (tile->num_heads > 1) kv_head += row / tile->num_rows, row %= tile->num_rows;
    *token = token_of(batch, tile, row);
    *head = kv_head * group_size(batch) + (tile->first_row + row) % group_size(batch);
}

/* The softmax of every row of a tile so far: values weighted by exp(score - maximum), and the sum of the weights. */
struct partial {
    float values[QUERY_ROWS * MAX_HEAD_DIM]; /* rows row_stride apart */
    float maximum[QUERY_ROWS], weight[QUERY_ROWS];
};

/* A way to compute attention. Tiles and splits are its own measure of the work. */
struct method {
    int64_t tile_rows, split_rows; /* of a tile of queries, and of one whose splits are computed apart */
    int64_t split_keys;            /* splits begin at multiples of it */
    int64_t rows_together;         /* of several KV heads in one tile, at most; 0: a tile has one head */
    /* `next`: the tile that the thread is to compute afterwards, or the same once more. */
    void (*attend_tile)(const struct batch *batch, const struct tile *tile, const struct tile *next);
    void (*attend_split)(const struct batch *batch, const struct tile *tile, int64_t split, struct partial *found);
};

#if defined(__AMX_BF16__)
extern const struct method amx_method;
#elif defined(__AVX512BF16__)
extern const struct method dot_method;
#endif

/* For all methods alike; in attention.c. */
void clear_partial(const struct batch *batch, const struct tile *tile, struct partial *partial);
void join_split(const struct batch *batch, const struct tile *tile, const struct partial *split, struct partial *total);
void store_output(const struct batch *batch, const struct tile *tile, const struct partial *total);

INLINE int64_t row_stride(const struct batch *batch) { return ceil_divide(batch->head_dim, PANEL) * PANEL; }

/* Where the keys of `count` positions from `first` begin. Their values lie num_kv_heads pages further. */
static inline void find_keys(const struct batch *batch, const struct tile *tile, int64_t first, int64_t count,
                             const void **keys) {
    const int64_t *table = batch->blocks + batch->table_starts[tile->sequence];
    int64_t index = first / batch->block_size, offset = first % batch->block_size;
    for (int64_t j = 0; j < count; index++, offset = 0) {
        int64_t row = table[index] * batch->block_stride + tile->kv_head * batch->block_size * batch->head_dim;
        for (; offset < batch->block_size && j < count; offset++, j++)
            keys[j] = element_at(batch->kv, row + offset * batch->head_dim, batch->kv_element);
    }
}
