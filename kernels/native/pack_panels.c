/* Weights into the panels of panels.h. A row of weights is a row of words, whatever a word holds. */
#include "panels.h"
#include "transpose.h"

/* Columns first to first + LANES of a panel, words first_word to first_word + LANES. Features beyond the last are zero.
 */
INLINE void pack_square(const uint32_t *weight, int64_t row_words, int64_t rows, int64_t words, uint32_t *packed) {
    vector square[LANES];
    for (int row = 0; row < LANES; row++)
        square[row] = row < rows ? load_some(weight + row * row_words, words, FLOAT32) : broadcast(0.0f);
    transpose_square(square);
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++)
        if (row < words) store_vector((float *)(packed + row * COLUMNS), square[row], FLOAT32);
}

/* packed [panels][words][COLUMNS] from weight [out_features][words]; words is a multiple of 4. */
void pack_panels(const uint32_t *weight, int64_t out_features, int64_t words, int64_t panels, uint32_t *packed,
                 int num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1 && panels > 1)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t word = 0; word < words; word += LANES)
            for (int64_t column = 0; column < COLUMNS; column += LANES) {
                int64_t feature = panel * COLUMNS + column;
                pack_square(weight + feature * words + word, words, out_features - feature,
                            smaller(LANES, words - word), packed + (panel * words + word) * COLUMNS + column);
            }
}
