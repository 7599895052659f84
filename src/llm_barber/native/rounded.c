/* Products with packed weights whose values are int8, by AVX2; and unpacking them. `vnni.c` has them for AVX-512.
 *
 * A step takes the next 8 columns of a row: it loads 8 values, the most that may be kept, moves them to the positions of
 * the mask's set bits (PSHUFB, by a row of a table), converts them to float32, multiplies them by 8 inputs, and advances by
 * as many values as bits are set. Inputs are float32 and not rounded. The sum of a group of columns is multiplied by the
 * group's scale.
 *
 * `rounded.py` checks sizes before it calls. No function reads or writes beyond the given sizes, whatever the mask holds.
 */
#include "rounded.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX2 __attribute__((target("avx2,fma,popcnt")))
#define PREFETCHED 64 /* columns from one prefetch to the next: their values are at most a line of the cache */

static uint8_t places_of[256][8]; /* by a byte of the mask: the index of each weight's value among the next values */

__attribute__((constructor)) static void fill_table(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0, next = 0; i < 8; i++) places_of[byte][i] = byte >> i & 1 ? (uint8_t)next++ : 0x80; /* 0x80: zero */
}

/* The next 8 weights as float32, without their scale. */
AVX2 INLINE __m256 next_eight(const rounded_t *w, size_t next, uint8_t byte) {
    const int8_t *values = w->values + next;
    const size_t left = left_of(w->kept, next);
    int8_t few[8] = {0};
    if (left < 8) {
        if (left) memcpy(few, values, left);
        values = few;
    }
    const __m128i places = _mm_loadl_epi64((const __m128i *)places_of[byte]);
    const __m128i eight = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)values), places);
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}

AVX2 INLINE float sum_of(__m256 parts) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

typedef struct {
    const rounded_t *weight;
    const float *inputs; /* (tokens, columns) */
    void *outputs;
    int tokens;
} product_t;

/* Computes the outputs of rows `first` to `last` of W, whose values begin at number `next`. Each token has two sums in a
 * group, since additions to a single sum wait for each other. */
AVX2 INLINE void rows_float32(const product_t *p, size_t first, size_t last, size_t next, const int tokens) {
    const rounded_t *w = p->weight;
    const uint8_t *bits = w->bits + first * w->columns / 8;
    for (size_t row = first; row < last; row++) {
        __m256 total[4];
        for (int t = 0; t < tokens; t++) total[t] = _mm256_setzero_ps();
        for (size_t g = 0; g < w->groups; g++) {
            const size_t start = g * w->group, end = start + w->group < w->columns ? start + w->group : w->columns;
            __m256 sums[2][4];
            for (int t = 0; t < tokens; t++) sums[0][t] = sums[1][t] = _mm256_setzero_ps();
            for (size_t c = start; c < end; c += 16) {
                if ((c - start) % PREFETCHED == 0) prefetch(w->values + next, bits);
                uint8_t byte = *bits++;
                __m256 eight = next_eight(w, next, byte);
                next += (size_t)__builtin_popcount(byte);
                for (int t = 0; t < tokens; t++)
                    sums[0][t] = _mm256_fmadd_ps(eight, _mm256_loadu_ps(p->inputs + (size_t)t * w->columns + c), sums[0][t]);
                if (c + 8 == end) break;
                byte = *bits++;
                eight = next_eight(w, next, byte);
                next += (size_t)__builtin_popcount(byte);
                for (int t = 0; t < tokens; t++)
                    sums[1][t] =
                        _mm256_fmadd_ps(eight, _mm256_loadu_ps(p->inputs + (size_t)t * w->columns + c + 8), sums[1][t]);
            }
            const __m256 scale = _mm256_set1_ps(from_bfloat16(w->scales[row * w->groups + g]));
            for (int t = 0; t < tokens; t++)
                total[t] = _mm256_fmadd_ps(_mm256_add_ps(sums[0][t], sums[1][t]), scale, total[t]);
        }
        for (int t = 0; t < tokens; t++) write_output(w, p->outputs, (size_t)t, row, sum_of(total[t]));
    }
}

AVX2 static void multiply_part(const void *task, int part) {
    const product_t *p = task;
    const size_t first = (size_t)p->weight->row_ends[part], last = (size_t)p->weight->row_ends[part + 1];
    const size_t next = (size_t)p->weight->value_ends[part];
#define CASE(tokens) case tokens: rows_float32(p, first, last, next, tokens); break;
    switch (p->tokens) { CASE(1) CASE(2) CASE(3) CASE(4) }
}

/* Computes the product of `tokens` rows of inputs, 1 to 4. */
void packed_multiply_rounded_avx2(const rounded_t *weight, const float *inputs, void *outputs, int tokens) {
    const product_t product = {weight, inputs, outputs, tokens};
    packed_run_parts(weight->openmp, weight->parts, multiply_part, &product);
}

/* Writes 8 weights, rounded once, within the finite numbers, without -0.0. */
AVX2 INLINE void restore_eight(__m256 weights, void *into, size_t at, int bfloat16) {
    const __m256 largest = _mm256_castsi256_ps(_mm256_set1_epi32(bfloat16 ? 0x7f7f0000 : 0x7f7fffff));
    weights = _mm256_max_ps(_mm256_min_ps(weights, largest), _mm256_sub_ps(_mm256_setzero_ps(), largest));
    weights = _mm256_add_ps(weights, _mm256_setzero_ps());
    if (!bfloat16) {
        _mm256_storeu_ps((float *)into + at, weights);
        return;
    }
    __m256i bits = _mm256_castps_si256(weights);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m128i eight = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128((__m128i *)((uint16_t *)into + at), eight);
}

AVX2 static void restore_part(const void *task, int part) {
    const restore_t *t = task;
    const rounded_t *w = t->weight;
    const size_t begin = t->first * BLOCK_ROWS, first = start_of_part(t, part), last = start_of_part(t, part + 1);
    size_t next = (size_t)w->block_starts[first / BLOCK_ROWS];
    for (size_t row = first; row < last; row++)
        for (size_t g = 0, c = 0; g < w->groups; g++) {
            const __m256 scale = _mm256_set1_ps(from_bfloat16(w->scales[row * w->groups + g]));
            for (const size_t end = c + w->group < w->columns ? c + w->group : w->columns; c < end; c += 8) {
                const size_t at = row * w->columns + c;
                const uint8_t byte = w->bits[at / 8];
                const __m256 weights = _mm256_mul_ps(next_eight(w, next, byte), scale);
                restore_eight(weights, t->into, at - begin * w->columns, w->bfloat16);
                next += (size_t)__builtin_popcount(byte);
            }
        }
}

/* Writes the rows of the blocks `first` to `last` in bfloat16 or float32, as the weight says. */
void packed_restore_rows_avx2(const rounded_t *weight, size_t first, size_t last, void *into) {
    const restore_t task = {weight, first, last, into};
    packed_run_parts(weight->openmp, weight->parts, restore_part, &task);
}
#endif
