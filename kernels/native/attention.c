/* Attention over paged KV for prefill, decode and the verification of drafts alike, by the online softmax of Milakov
 * and Gimelshein (arXiv 1805.02867) in tiles (Dao et al., arXiv 2205.14135), with the splits of long contexts that
 * Flash-Decoding computes in parallel.
 *
 * What a token gets depends on its own sequence alone, bit for bit: not on how the sequence was cut into steps, not on
 * the rest of the batch, not on the number of threads. For that, tiles and splits of the keys begin at fixed positions
 * of the sequence, and partial results are joined in the order of the splits, whether they were computed one after the
 * other or at the same time.
 */
#include <stdlib.h>

#include "attention.h"
#include "operations.h"
#include "products.h"
#include "transpose.h"

enum {
    KEYS = 64,       /* positions in one tile of keys */
    /* Elements between dimensions of transposed keys, and between widened values: powers of two would crowd a few sets
     * of the cache. */
    KEYS_APART = 80,
    VALUES_APART = MAX_HEAD_DIM + 16,
    SPLIT_TILES = 8, /* tiles whose softmax runs on before it is joined to what came before */
    SPLIT_KEYS = KEYS * SPLIT_TILES,
    ROUND_SPLITS = 128, /* that are computed before they are joined: 6 MB */
};

struct scratch {
    float query[QUERY_ROWS * MAX_HEAD_DIM];
    float keys[MAX_HEAD_DIM * KEYS_APART]; /* transposed */
    float values[KEYS * VALUES_APART]; /* widened and padded, where that pays or must be */
    float weights[QUERY_ROWS * KEYS];
};

static void load_query(const struct batch *batch, const struct tile *tile, float *query) {
    for (int64_t row = 0; row < tile->num_rows; row++) {
        int64_t token, head;
        locate_row(batch, tile, row, &token, &head);
        int64_t first = token * batch->token_stride + head * batch->head_stride;
        for (int64_t i = 0; i < batch->head_dim; i++)
            query[row * batch->head_dim + i] = load_element(batch->query, first + i, batch->element) * batch->scale;
    }
}

/* Where keys and values of a tile lie, and the keys of the one that is computed next. */
struct rows {
    const void *keys[KEYS], *values[KEYS], *next_keys[KEYS];
    int64_t count, next_count;
};

INLINE int64_t count_keys(const struct tile *tile, int64_t first) { return smaller(KEYS, tile->end_key - first); }

/* Of the keys from `first` on. `next` is the tile of queries that comes after the last of them. */
static void find_rows(const struct batch *batch, const struct tile *tile, int64_t first, const struct tile *next,
                      struct rows *rows) {
    int64_t to_value = batch->num_kv_heads * batch->block_size * batch->head_dim, following = first + KEYS;
    rows->count = count_keys(tile, first);
    find_keys(batch, tile, first, rows->count, rows->keys);
    for (int64_t j = 0; j < rows->count; j++)
        rows->values[j] = element_at(rows->keys[j], to_value, batch->kv_element);
    int is_last = following >= tile->end_key;
    int is_same = next->sequence == tile->sequence && next->kv_head == tile->kv_head;
    if (is_last) tile = next, following = next->first_key / KEYS * KEYS;
    rows->next_count = is_last && is_same ? 0 : count_keys(tile, following); /* the same keys are in the cache */
    find_keys(batch, tile, following, rows->next_count, rows->next_keys);
}

/* Of LANES rows from `first` on, those before `end`: the share of one of `steps` steps is fetched. Pages are too short
 * for the CPU to foresee what is read next, and it can wait for only so many rows at once. */
INLINE void prefetch_rows(const struct batch *batch, const void *const *rows, int64_t first, int64_t end, int64_t step,
                          int64_t steps) {
    int64_t row_bytes = batch->head_dim * element_bytes(batch->kv_element);
    for (int64_t j = first + step * LANES / steps; j < smaller(end, first + (step + 1) * LANES / steps); j++)
        for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch((const char *)rows[j] + byte, 0, 2);
}

/* keys[i][j] = element i of key j, rows KEYS_APART apart; zero for what else is in the last panel of keys. Meanwhile
 * what is read after them is fetched. */
INLINE void load_keys(const struct batch *batch, const struct rows *rows, float *keys, const int element) {
    const void *const *source = rows->keys;
    int64_t count = rows->count, steps = batch->head_dim / LANES;
    int64_t whole_keys = count - count % LANES, whole_dims = steps * LANES;
    for (int64_t j = 0; j < KEYS; j += LANES)
        for (int64_t step = 0; step < steps; step++) {
            prefetch_rows(batch, rows->values, j, count, step, steps);
            prefetch_rows(batch, rows->next_keys, j, rows->next_count, step, steps);
            if (j >= whole_keys) continue;
            vector square[LANES];
#pragma GCC unroll 16
            for (int row = 0; row < LANES; row++)
                square[row] = load_vector(element_at(source[j + row], step * LANES, element), element);
            transpose_square(square);
#pragma GCC unroll 16
            for (int row = 0; row < LANES; row++)
                store_vector(keys + (step * LANES + row) * KEYS_APART + j, square[row], FLOAT32);
        }
    for (int64_t i = 0; i < batch->head_dim; i++)
        for (int64_t j = i < whole_dims ? whole_keys : 0; j < count; j++)
            keys[i * KEYS_APART + j] = load_element(source[j], i, element);
    int64_t others = ceil_divide(count, PANEL) * PANEL - count;
    for (int64_t i = 0; others > 0 && i < batch->head_dim; i++)
        memset(keys + i * KEYS_APART + count, 0, others * sizeof *keys);
}

/* Scores of every row for `count` keys, and others up to a whole panel: query [rows][head_dim] times keys. */
static void score_keys(const struct batch *batch, const struct tile *tile, const float *query, const float *keys,
                       int64_t count, float *scores) {
    multiply_panels(tile->num_rows, ceil_divide(count, PANEL) * PANEL, batch->head_dim, query, batch->head_dim,
                    (struct matrix){.first = keys, .stride = KEYS_APART}, FLOAT32, scores, KEYS, 0);
}

/* Values that are read more than once are widened once; those that do not fill the last panel are copied into ones that
 * do. */
INLINE void widen_values(const struct batch *batch, const struct rows *rows, float *widened, const int element) {
    int64_t whole_dims = batch->head_dim - batch->head_dim % LANES, stride = row_stride(batch);
    for (int64_t j = 0; j < rows->count; j++) {
        float *row = widened + j * VALUES_APART;
        for (int64_t i = 0; i < whole_dims; i += LANES)
            store_vector(row + i, load_vector(element_at(rows->values[j], i, element), element), FLOAT32);
        for (int64_t i = whole_dims; i < stride; i++)
            row[i] = i < batch->head_dim ? load_element(rows->values[j], i, element) : 0.0f;
    }
}

/* Add values, weighted, to what every row has: weights [rows][KEYS] times values [count][stride]. */
INLINE void add_values(const struct batch *batch, const struct tile *tile, const struct rows *rows,
                       struct scratch *scratch, float *sums, const int element) {
    const int64_t stride = row_stride(batch);
    if ((element == BFLOAT16 && tile->num_rows > TILE_ROWS) || stride != batch->head_dim) {
        widen_values(batch, rows, scratch->values, element);
        multiply_panels(tile->num_rows, stride, rows->count, scratch->weights, KEYS,
                        (struct matrix){.first = scratch->values, .stride = VALUES_APART}, FLOAT32, sums, stride, 1);
    } else {
        multiply_panels(tile->num_rows, stride, rows->count, scratch->weights, KEYS,
                        (struct matrix){.rows = rows->values}, element, sums, stride, 1);
    }
}

/* The largest of a row's scores and `highest`. */
INLINE float highest_score(const float *scores, float highest) {
    float lanes[LANES];
    vector best = broadcast(highest);
    for (int j = 0; j < KEYS; j += LANES) {
        vector some = load_vector(scores + j, FLOAT32);
        best = choose(some > best, some, best);
    }
    store_vector(lanes, best, FLOAT32);
    for (int lane = 0; lane < LANES; lane++) highest = lanes[lane] > highest ? lanes[lane] : highest;
    return highest;
}

/* Of a row of a tree: scores of keys that it does not see, and the range of those that it does. */
static void hide_keys(float *scores, uint64_t visible, int64_t *begin, int64_t *end) {
    *begin = visible ? __builtin_ctzll(visible) : KEYS;
    *end = visible ? KEYS - __builtin_clzll(visible) : 0;
    for (int64_t j = *begin; j < *end; j++)
        if (!(visible >> j & 1)) scores[j] = -INFINITY;
}

/* Turn a row's scores into weights, relative to the largest score of the split so far. Outside [first, end) weights are
 * zero; a row that sees nothing of the tile is left as it was.
 */
static void weigh_row(float *scores, int first, int end, float *maximum, float *weight, float *values,
                      int64_t num_values) {
    if (first >= end) {
        memset(scores, 0, KEYS * sizeof *scores);
        return;
    }
    for (int j = 0; j < first; j++) scores[j] = -INFINITY;
    for (int j = end; j < KEYS; j++) scores[j] = -INFINITY;
    float highest = highest_score(scores, *maximum);
    struct lane_sums sums = {0};
    for (int j = 0; j < KEYS; j += LANES) {
        vector score = load_vector(scores + j, FLOAT32);
        vector some = choose(score == -INFINITY, broadcast(0.0f), exp_vector(score - highest));
        add_to_lanes(&sums, j, some);
        store_vector(scores + j, some, FLOAT32);
    }
    float keep = exp_float(*maximum - highest);
    *weight = *weight * keep + total_of(&sums);
    *maximum = highest;
    for (int64_t i = 0; i < num_values; i += LANES)
        store_vector(values + i, load_vector(values + i, FLOAT32) * keep, FLOAT32);
}

INLINE void attend_keys(const struct batch *batch, const struct tile *tile, int64_t first, const struct tile *next,
                        struct scratch *scratch, struct partial *split, const int element) {
    int64_t stride = row_stride(batch);
    struct rows rows;
    find_rows(batch, tile, first, next, &rows);
    load_keys(batch, &rows, scratch->keys, element);
    score_keys(batch, tile, scratch->query, scratch->keys, rows.count, scratch->weights);
    for (int64_t row = 0; row < tile->num_rows; row++) {
        int64_t begin = larger(0, first_visible(batch, tile, row) - first);
        int64_t end = smaller(rows.count, slot_of(batch, tile, row) + 1 - first);
        if (tile->is_tree)
            hide_keys(scratch->weights + row * KEYS, visible_in_tree(batch, tile, row, first), &begin, &end);
        weigh_row(scratch->weights + row * KEYS, (int)begin, (int)end, &split->maximum[row], &split->weight[row],
                  split->values + row * stride, stride);
    }
    add_values(batch, tile, &rows, scratch, split->values, element);
}

void clear_partial(const struct batch *batch, const struct tile *tile, struct partial *partial) {
    memset(partial->values, 0, rows_of_heads(tile) * row_stride(batch) * sizeof(float));
    memset(partial->weight, 0, sizeof partial->weight);
    for (int64_t row = 0; row < rows_of_heads(tile); row++) partial->maximum[row] = -INFINITY;
}

static void attend_loaded(const struct batch *batch, const struct tile *tile, int64_t split, const struct tile *next,
                          struct scratch *scratch, struct partial *found) {
    int64_t begin = larger(split * SPLIT_KEYS, tile->first_key / KEYS * KEYS);
    int64_t end = smaller((split + 1) * SPLIT_KEYS, tile->end_key);
    clear_partial(batch, tile, found);
    for (int64_t first = begin; first < end; first += KEYS)
        if (batch->kv_element == BFLOAT16)
            attend_keys(batch, tile, first, next, scratch, found, BFLOAT16);
        else
            attend_keys(batch, tile, first, next, scratch, found, FLOAT32);
}

/* Add what the next split found to what those before it did. */
void join_split(const struct batch *batch, const struct tile *tile, const struct partial *split,
                struct partial *total) {
    int64_t stride = row_stride(batch);
    for (int64_t row = 0; row < rows_of_heads(tile); row++) {
        if (split->maximum[row] == -INFINITY && split->weight[row] == 0.0f) continue; /* saw no key; not so if NaN */
        float highest = split->maximum[row] > total->maximum[row] ? split->maximum[row] : total->maximum[row];
        float keep = exp_float(total->maximum[row] - highest), take = exp_float(split->maximum[row] - highest);
        float *values = total->values + row * stride;
        const float *added = split->values + row * stride;
        for (int64_t i = 0; i < stride; i += LANES)
            store_vector(values + i, load_vector(values + i, FLOAT32) * keep + load_vector(added + i, FLOAT32) * take,
                         FLOAT32);
        total->weight[row] = total->weight[row] * keep + split->weight[row] * take;
        total->maximum[row] = highest;
    }
}

INLINE void store_rows(const struct batch *batch, const struct tile *tile, const struct partial *total,
                       const int element) {
    for (int64_t row = 0; row < rows_of_heads(tile); row++) {
        int64_t token, head;
        locate_row(batch, tile, row, &token, &head);
        int64_t first = token * batch->out_stride + head * batch->head_dim;
        const float *values = total->values + row * row_stride(batch);
        float weight = total->weight[row] == 0.0f ? 1.0f : total->weight[row]; /* zeros for a row that sees no key */
        for (int64_t i = 0; i < batch->head_dim; i += LANES)
            store_some((void *)element_at(batch->out, first + i, element),
                       load_vector(values + i, FLOAT32) / weight, batch->head_dim - i, element);
    }
}

void store_output(const struct batch *batch, const struct tile *tile, const struct partial *total) {
    if (batch->element == BFLOAT16)
        store_rows(batch, tile, total, BFLOAT16);
    else
        store_rows(batch, tile, total, FLOAT32);
}

static void attend_split(const struct batch *batch, const struct tile *tile, int64_t split, struct partial *found) {
    struct scratch scratch;
    load_query(batch, tile, scratch.query);
    attend_loaded(batch, tile, split, tile, &scratch, found);
}

static void attend_tile(const struct batch *batch, const struct tile *tile, const struct tile *next) {
    struct scratch scratch;
    struct partial found, total;
    load_query(batch, tile, scratch.query);
    clear_partial(batch, tile, &total);
    for (int64_t split = tile->first_key / SPLIT_KEYS; split * SPLIT_KEYS < tile->end_key; split++) {
        attend_loaded(batch, tile, split, next, &scratch, &found);
        join_split(batch, tile, &found, &total);
    }
    store_output(batch, tile, &total);
}

static const struct method vector_method = {
    .tile_rows = QUERY_ROWS,
    .split_rows = QUERY_ROWS,
    .split_keys = SPLIT_KEYS,
    .attend_tile = attend_tile,
    .attend_split = attend_split,
};

static const struct method *choose_method(const struct batch *batch) {
    /* Of the model alone: what a token gets does not depend on the step that computes it. */
    int in_pairs = batch->element == BFLOAT16 && batch->kv_element == BFLOAT16 && batch->scale > 0;
#if defined(__AMX_BF16__)
    if (in_pairs) return &amx_method;
#elif defined(__AVX512BF16__)
    if (in_pairs) return &dot_method;
#endif
    (void)in_pairs;
    return &vector_method;
}

static int64_t count_tiles(const struct batch *batch) {
    int64_t tiles = 0;
    for (int64_t b = 0; b < batch->num_sequences; b++) tiles += num_tiles(batch, b);
    return tiles;
}

/* Few tiles with long contexts, for several threads: splits at the same time, then the joining, in rounds that take a
 * fixed amount of memory however long the contexts are. A tile may begin in one round and end in a later one.
 */
static int attend_in_splits(const struct batch *batch, const struct method *method, int64_t tiles, int64_t splits,
                            int num_threads) {
    int64_t tasks = tiles * splits, round = smaller(tasks, larger(ROUND_SPLITS, num_threads));
    struct partial total, *found = malloc(round * sizeof *found);
    if (!found) return 0;
    for (int64_t first = 0; first < tasks; first += round) {
        int64_t end = smaller(tasks, first + round);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads)
        for (int64_t task = first; task < end; task++) {
            struct tile tile = find_tile(batch, task / splits);
            method->attend_split(batch, &tile, task % splits, &found[task - first]);
        }
        for (int64_t task = first; task < end; task++) {
            struct tile tile = find_tile(batch, task / splits);
            if (task % splits == 0) clear_partial(batch, &tile, &total);
            join_split(batch, &tile, &found[task - first], &total);
            if (task % splits == splits - 1) store_output(batch, &tile, &total);
        }
    }
    free(found);
    return 1;
}

/* Tiles [index, end), of which those of one sequence's heads come one after the other. */
static void attend_tiles(const struct batch *batch, const struct method *method, int64_t index, int64_t end) {
    struct tile tile = find_tile(batch, index);
    while (index < end) {
        int64_t heads = smaller(end - index, batch->num_kv_heads - tile.kv_head);
        tile.num_heads = smaller(heads, larger(1, method->rows_together / tile.num_rows));
        struct tile next = tile;
        index += tile.num_heads, next.kv_head += tile.num_heads;
        if (index == end)
            next = tile;
        else if (next.kv_head == batch->num_kv_heads)
            next = find_tile(batch, index);
        method->attend_tile(batch, &tile, &next);
        tile = next;
    }
}

static void attend(struct batch *batch, int num_threads) {
    const struct method *method = choose_method(batch);
    int64_t longest = 0, all = 0; /* keys of one sequence and of all */
    for (int64_t b = 0; b < batch->num_sequences; b++) {
        int64_t keys = batch->prefix_lengths[b] + batch->query_starts[b + 1] - batch->query_starts[b];
        longest = larger(longest, keys), all += keys;
    }
    int64_t splits = ceil_divide(longest, method->split_keys);
    batch->tile_rows = method->split_rows;
    int64_t tiles = count_tiles(batch);
    if (num_threads > 1 && tiles < 2 * num_threads && splits > 1 &&
        attend_in_splits(batch, method, tiles, splits, num_threads))
        return;
    batch->tile_rows = method->tile_rows;
    tiles = count_tiles(batch);
    /* A thread takes several heads of a sequence that is one tile per head: their pages are neighbours. All of them, if
     * the method reads them together and no sequence has so many keys that the other threads would wait for its.
     */
    int64_t shares = method->rows_together && 2 * longest * num_threads <= all ? 1 : num_threads;
    int64_t together = tiles == batch->num_sequences * batch->num_kv_heads ? batch->num_kv_heads / shares : 1;
    int64_t step = larger(1, together);
#pragma omp parallel for schedule(dynamic) num_threads(num_threads) if (num_threads > 1 && tiles > step)
    for (int64_t index = 0; index < tiles; index += step)
        attend_tiles(batch, method, index, smaller(index + step, tiles));
}

/* Returns 0, or -1 without having written anything if a block lies outside the pool. */
int paged_attention(const void *query, int64_t token_stride, int64_t head_stride, const void *kv, int64_t num_blocks,
                    int64_t block_stride, void *out, int64_t out_stride, int64_t num_sequences,
                    const int64_t *query_starts, const int64_t *prefix_lengths, const int64_t *table_starts,
                    const int64_t *blocks, const int64_t *tree_masks, const int64_t *tree_depths, int64_t num_heads,
                    int64_t num_kv_heads, int64_t head_dim, int64_t block_size, int64_t window, int64_t first_key,
                    float scale, int element, int kv_element, int num_threads) {
    struct batch batch = {
        .query = query,
        .token_stride = token_stride,
        .head_stride = head_stride,
        .kv = kv,
        .block_stride = block_stride,
        .out = out,
        .out_stride = out_stride,
        .num_sequences = num_sequences,
        .query_starts = query_starts,
        .prefix_lengths = prefix_lengths,
        .table_starts = table_starts,
        .blocks = blocks,
        .tree_masks = tree_masks,
        .tree_depths = tree_depths,
        .num_heads = num_heads,
        .num_kv_heads = num_kv_heads,
        .head_dim = head_dim,
        .block_size = block_size,
        .window = window,
        .first_key = first_key,
        .scale = scale,
        .element = element,
        .kv_element = kv_element,
    };
    for (int64_t i = 0; i < table_starts[num_sequences]; i++)
        if (blocks[i] < 0 || blocks[i] >= num_blocks) return -1;
    attend(&batch, num_threads);
    return 0;
}
