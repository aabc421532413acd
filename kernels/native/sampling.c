/* The next token of a row: greedy, or by Gumbel noise that is a function of (seed, choice, position, token).
 *
 * Noise costs two logarithms, and nearly all of them are for tokens that have no chance. From the upper bits of its
 * uniform number a token's noise is bounded at the cost of a conversion; only those whose bound reaches the best score
 * so far get their noise computed, some tens in a row of any length. The result is that of the reference, which
 * computes all of them.
 */
#include "operations.h"
#include "truncation.h"

enum { MANY_TOKENS = 1 << 15 }; /* from where on a second thread saves more than it costs */

/* ---- noise: see kernels/sampling/noise.py, which it equals bit for bit */

static const uint64_t STRIDE = 0x9E3779B97F4A7C15;

/* The finaliser of splitmix64. */
INLINE uint64_t mix(uint64_t value) {
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
    return value ^ (value >> 31);
}

static uint64_t row_key(int64_t seed, int64_t choice, int64_t position) {
    uint64_t key = mix((uint64_t)seed + STRIDE);
    key = mix((key ^ (uint64_t)choice) + STRIDE);
    return mix(mix((key ^ (uint64_t)position) + STRIDE) + STRIDE);
}

INLINE uint64_t token_bits(uint64_t key, int64_t token) { return mix(key + (uint64_t)(token + 1) * STRIDE); }

#if defined(__x86_64__)
#define REGISTER "x"
#elif defined(__aarch64__)
#define REGISTER "w"
#else
#define REGISTER "m"
#endif

/* The same value, which the compiler cannot see through: else it would fuse a product with the sum that follows, and
 * the result would depend on the CPU.
 */
INLINE double product(double a, double b) {
    double value = a * b;
    __asm__("" : "+" REGISTER(value));
    return value;
}

/* The steps of noise.py's logarithm. */
static double fixed_log(double x) {
    int64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int64_t exponent = (bits - 0x3FE6A09E667F3BCD) >> 52; /* of x / sqrt(1/2) */
    bits -= (int64_t)((uint64_t)exponent << 52);
    double mantissa;
    memcpy(&mantissa, &bits, sizeof mantissa);
    double s = (mantissa - 1.0) / (mantissa + 1.0), square = product(s, s);
    double series = 2.0 / 11;
    for (int divisor = 9; divisor > 0; divisor -= 2) series = product(series, square) + 2.0 / divisor;
    return product((double)exponent, 0.6931471805599453) + product(s, series);
}

static float gumbel(uint64_t bits) {
    double uniform = ((double)(int64_t)(bits >> 12) + 0.5) * 0x1p-52;
    return (float)-fixed_log(-fixed_log(uniform));
}

/* No less than gumbel(bits). As -log(u) >= 1 - u, the noise is at most -log(1 - u); and log2(v) is at least the line
 * through its values at powers of two, which is what the bits of a float are when read as an integer.
 */
INLINE float gumbel_bound(uint64_t bits) {
    float above = (float)(int32_t)(~bits >> 33); /* (1 - u) * 2^31, rounded down */
    int32_t line;                                /* 2^23 * (log2(above) + 127) */
    memcpy(&line, &above, sizeof line);
    const float ln2 = 0.693147181f, rounding = 1e-3f;
    return (127 + 31) * ln2 + rounding - ln2 * 0x1p-23f * (float)line;
}

/* ---- rows */

struct candidate {
    float score;
    int64_t token;
};

INLINE float row_maximum(const float *logits, int64_t size) {
    vector maxima = broadcast(-INFINITY);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vector value = load_vector(logits + i, FLOAT32);
        maxima = choose(value > maxima, value, maxima);
    }
    float maximum = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) maximum = maxima[lane] > maximum ? maxima[lane] : maximum;
    for (; i < size; i++) maximum = logits[i] > maximum ? logits[i] : maximum;
    return maximum;
}

/* The lowest token whose logit is the row's maximum; 0 when all are forbidden, or no numbers. */
static struct candidate best_logit(const float *logits, int64_t size) {
    float maximum = row_maximum(logits, size);
    for (int64_t first = 0; first < size && maximum > -INFINITY; first += BLOCK) {
        int64_t count = smaller(BLOCK, size - first);
        int is_here = 0;
        for (int64_t i = 0; i < count; i++) is_here |= logits[first + i] == maximum;
        if (!is_here) continue;
        while (logits[first] != maximum) first++;
        return (struct candidate){maximum, first};
    }
    return (struct candidate){maximum, 0};
}

/* The token whose noise a column has: it may be numbered otherwise than the column. */
INLINE int64_t token_at(const int64_t *token_ids, int64_t column) { return token_ids ? token_ids[column] : column; }

/* Bounds of scores with their noise, minus infinity for what is not kept; returns whether one reaches the best. */
INLINE int bound_scores(const float *scores, int64_t count, float lowest, uint64_t key, const int64_t *token_ids,
                        int64_t first, float best, float *bounds) {
    int in_reach = 0;
    for (int64_t i = 0; i < count; i++) {
        float bound = scores[i] + gumbel_bound(token_bits(key, token_at(token_ids, first + i)));
        bounds[i] = scores[i] >= lowest ? bound : -INFINITY;
        in_reach |= bounds[i] >= best;
    }
    return in_reach;
}

INLINE int any_at_least(const float *scores, int64_t count, float lowest) {
    int any = 0;
    for (int64_t i = 0; i < count; i++) any |= scores[i] >= lowest;
    return any;
}

/* argmax of score + noise over what is kept, the lowest column among equals; top is the column with the best score. */
INLINE int64_t draw(const struct row *row, int64_t top, uint64_t key, const int64_t *token_ids, struct limit limit) {
    struct candidate best = {gumbel(token_bits(key, token_at(token_ids, top))), top};
    float scores[BLOCK], bounds[BLOCK];
    for (int64_t first = 0; first < row->size; first += BLOCK) {
        int64_t count = smaller(BLOCK, row->size - first);
        row_scores(row, first, count, scores);
        if (!any_at_least(scores, count, limit.lowest)) continue;
        if (!bound_scores(scores, count, limit.lowest, key, token_ids, first, best.score, bounds)) continue;
        for (int64_t i = 0; i < count; i++) {
            if (!(bounds[i] >= best.score)) continue;
            if (scores[i] == limit.lowest && first + i > limit.last_token) continue;
            float score = scores[i] + gumbel(token_bits(key, token_at(token_ids, first + i)));
            if (score > best.score || (score == best.score && first + i < best.token))
                best = (struct candidate){score, first + i};
        }
    }
    return best.token;
}

/* out[rows]: the best token of each row of logits [rows, size], rows stride apart. */
void argmax_rows(const float *logits, int64_t stride, int64_t *out, int64_t rows, int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows * size >= MANY_TOKENS)
    for (int64_t row = 0; row < rows; row++) out[row] = best_logit(logits + row * stride, size).token;
}

/* The rows to draw from, and how. */
struct draws {
    const int64_t *rows;
    const float *temperature;
    const int64_t *seed, *choice, *position;
    const int64_t *top_k;       /* the size of the vocabulary: all; or none: nothing is cut off, in this and the next */
    const double *top_p;        /* 1: all */
    const float *lowest_score;  /* minus infinity: all */
};

static int64_t sample_row(const float *logits, int64_t size, const struct draws *draws, int64_t n, uint64_t *keys) {
    struct candidate top = best_logit(logits, size);
    if (isinf(top.score)) return top.token; /* everything is forbidden, or something has no rival */
    struct row row = {logits, size, top.score, draws->temperature[n]};
    struct limit limit = {-INFINITY, size};
    if (draws->top_k && (draws->top_k[n] < size || draws->top_p[n] < 1.0))
        limit = truncate(&row, draws->top_k[n], draws->top_p[n], keys);
    if (draws->lowest_score && draws->lowest_score[n] > limit.lowest)
        limit = (struct limit){draws->lowest_score[n], size};
    uint64_t key = row_key(draws->seed[n], draws->choice[n], draws->position[n]);
    return draw(&row, top.token, key, NULL, limit);
}

/* out[n]: a draw from row draws->rows[n] of logits [num_rows, size]; keys [num_draws, size]: room to work in. Returns
 * 0, or -1 without having drawn anything if a row is none of logits.
 */
int sample_rows(const float *logits, int64_t stride, int64_t num_rows, int64_t size, const struct draws *draws,
                uint64_t *keys, int64_t *out, int64_t num_draws, int num_threads) {
    for (int64_t n = 0; n < num_draws; n++)
        if (draws->rows[n] < 0 || draws->rows[n] >= num_rows) return -1;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && num_draws * size >= MANY_TOKENS)
    for (int64_t n = 0; n < num_draws; n++)
        out[n] = sample_row(logits + draws->rows[n] * stride, size, draws, n, keys + n * size);
    return 0;
}

static int64_t guess_row(const float *logits, int64_t size, const int64_t *token_ids, float temperature, uint64_t key) {
    struct candidate top = best_logit(logits, size);
    if (temperature == 0.0f || isinf(top.score)) return top.token;
    struct row row = {logits, size, top.score, temperature};
    struct limit all = {-INFINITY, size};
    return token_ids ? draw(&row, top.token, key, token_ids, all) : draw(&row, top.token, key, NULL, all);
}

/* out[row]: what a target with the same logits would choose, which is the best token at temperature 0; token_ids
 * [size]: the target's for each column, or none: the same.
 */
void guess_rows(const float *logits, int64_t stride, const int64_t *token_ids, const float *temperature,
                const int64_t *seed, const int64_t *choice, const int64_t *position, int64_t *out, int64_t rows,
                int64_t size, int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && rows * size >= MANY_TOKENS)
    for (int64_t row = 0; row < rows; row++) {
        uint64_t key = row_key(seed[row], choice[row], position[row]);
        out[row] = token_at(token_ids, guess_row(logits + row * stride, size, token_ids, temperature[row], key));
    }
}
