/* Products of a few rows of inputs with packed int8 values, by AVX-512 with VBMI2 and VNNI.
 *
 * A step takes the next 64 columns of a row: it loads 64 values, the most that may be kept, moves them to the positions of
 * the mask's set bits (VPEXPANDB), multiplies them by 64 inputs (VPDPBUSD), and advances by as many values as bits are
 * set. The instruction multiplies unsigned by signed bytes, so that inputs are stored with 128 added; 128 times the sum of
 * the weights is subtracted. Sums are exact integers within a group of columns. At its end they are converted to float32,
 * multiplied by the scale of the weights times that of the inputs, and added in float32.
 *
 * `weight.py` checks sizes before it calls. No function reads or writes beyond the given sizes.
 */
#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define STEP 64    /* columns that are taken at a time */
#define OFFSET 128 /* added to inputs */
#define SCALES 16  /* groups whose scales are multiplied at once */

TARGET512 INLINE __m512 load_inputs(const void *inputs, size_t at, __mmask16 inside, int bfloat16) {
    if (!bfloat16) return _mm512_maskz_loadu_ps(inside, (const float *)inputs + at);
    __m256i half = _mm256_maskz_loadu_epi16(inside, (const uint16_t *)inputs + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __mmask16 inside16(size_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* Rounds inputs, (tokens, columns), to integers from -127 to 127, to nearest, ties to even, by the largest |input| of each
 * group of columns over 127; `OFFSET` is added. The scale of a group with a NaN or an infinity is NaN. */
TARGET512 void packed_round_inputs(const packed_t *w, const void *inputs, size_t tokens, size_t stride, uint8_t *rounded,
                                   float *scales) {
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    for (size_t t = 0; t < tokens; t++)
        for (size_t g = 0; g < w->groups; g++) {
            const size_t first = g * w->group, end = first + w->group < w->columns ? first + w->group : w->columns;
            const size_t at = t * w->columns;
            __m512 largest = _mm512_setzero_ps();
            __mmask16 bad = 0;
            for (size_t c = first; c < end; c += 16) {
                __m512 part = load_inputs(inputs, at + c, inside16(end - c), w->bfloat16);
                bad |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(_mm512_castps_si512(part), exponent), exponent);
                largest = _mm512_max_ps(largest, _mm512_abs_ps(part));
            }
            const float most = _mm512_reduce_max_ps(largest);
            const float scale = bad ? __builtin_nanf("") : most / 127;
            /* Inputs too small for a scale of their own are 0. */
            const __m512 factor = _mm512_set1_ps(bad || scale < 1e-37f ? 0 : 127 / most);
            scales[t * w->groups + g] = bad ? scale : scale < 1e-37f ? 0 : scale;
            for (size_t c = first; c < end; c += 16) {
                __m512 part = load_inputs(inputs, at + c, inside16(end - c), w->bfloat16);
                if (bad) part = _mm512_setzero_ps();
                __m512i whole = _mm512_cvt_roundps_epi32(_mm512_mul_ps(part, factor),
                                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
                whole = _mm512_add_epi32(whole, _mm512_set1_epi32(OFFSET));
                _mm_mask_storeu_epi8(rounded + t * stride + c, inside16(end - c), _mm512_cvtepi32_epi8(whole));
            }
        }
}

/* The row at which one of several streams is. */
typedef struct {
    size_t next;         /* number of its next value */
    const uint8_t *bits; /* of the row */
    __m512i sums[8], offsets; /* of a group: products of each token, and weights times 128 */
    __m512 total[8];
} stream_t;

/* Multiplies columns `start` to `end` of the streams' rows by the inputs of each token. `whole`: every step has 64 columns
 * and 64 values, so that no load is masked. */
TARGET512 INLINE void add_products(const product_t *p, stream_t *at, size_t start, size_t end,
                                     const int streams, const int tokens, const int whole) {
    const packed_t *w = p->weight;
    const int8_t *values = w->values;
    const uint8_t *inputs = p->inputs;
    for (size_t c = start; c < end; c += STEP) {
        __m512i weights[STREAMS];
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
            stream_t *s = &at[r];
            const uint64_t mask = mask_of(s->bits + c / 8, whole ? STEP : w->columns - c);
            prefetch(values + s->next, s->bits + c / 8);
            weights[r] = expand8(mask, values + s->next, whole ? STEP : left_of(w->kept, s->next));
            s->next += (size_t)_mm_popcnt_u64(mask);
            s->offsets = _mm512_dpbusd_epi32(s->offsets, _mm512_set1_epi8((char)OFFSET), weights[r]);
        }
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++) {
            const __m512i part = _mm512_loadu_si512(inputs + (size_t)t * p->stride + c);
_Pragma("GCC unroll 4")
            for (int r = 0; r < streams; r++) at[r].sums[t] = _mm512_dpbusd_epi32(at[r].sums[t], part, weights[r]);
        }
    }
}

/* Writes scale of the weights × scale of the inputs for groups `g` to `g + SCALES` of a row, for each token. */
TARGET512 INLINE void multiply_scales(const product_t *p, size_t row, size_t g, float (*scales)[SCALES],
                                        const int tokens) {
    const packed_t *w = p->weight;
    const __mmask16 inside = inside16(w->groups - g);
    const __m512 of_weights = load_inputs(w->scales, row * w->groups + g, inside, 1);
_Pragma("GCC unroll 8")
    for (int t = 0; t < tokens; t++)
        _mm512_store_ps(scales[t], _mm512_mul_ps(of_weights, _mm512_maskz_loadu_ps(
                                                                 inside, p->input_scales + (size_t)t * w->groups + g)));
}

/* Computes the outputs of `count` rows of each stream. Stream r begins with row `rows[r]` and value `nexts[r]`, which move
 * on. */
TARGET512 INLINE void rows_rounded(const product_t *p, size_t *rows, size_t *nexts, size_t count,
                                     const int streams, const int tokens) {
    const packed_t *w = p->weight;
    float scales[STREAMS][8][SCALES] __attribute__((aligned(64)));
    for (size_t done = 0; done < count; done++) {
        stream_t at[STREAMS];
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
            at[r].next = nexts[r];
            at[r].bits = w->bits + rows[r] * w->columns / 8;
_Pragma("GCC unroll 8")
            for (int t = 0; t < tokens; t++) at[r].total[t] = _mm512_setzero_ps();
        }
        for (size_t g = 0; g < w->groups; g++) {
            const size_t start = g * w->group, end = start + w->group < w->columns ? start + w->group : w->columns;
            int whole = (end - start) % STEP == 0;
_Pragma("GCC unroll 4")
            for (int r = 0; r < streams; r++) {
                if (g % SCALES == 0) multiply_scales(p, rows[r], g, scales[r], tokens);
                whole &= left_of(w->kept, at[r].next) >= end - start;
                at[r].offsets = _mm512_setzero_si512();
_Pragma("GCC unroll 8")
                for (int t = 0; t < tokens; t++) at[r].sums[t] = _mm512_setzero_si512();
            }
            if (whole) add_products(p, at, start, end, streams, tokens, 1);
            else add_products(p, at, start, end, streams, tokens, 0);
_Pragma("GCC unroll 4")
            for (int r = 0; r < streams; r++)
_Pragma("GCC unroll 8")
                for (int t = 0; t < tokens; t++)
                    at[r].total[t] = _mm512_fmadd_ps(
                        _mm512_cvtepi32_ps(_mm512_sub_epi32(at[r].sums[t], at[r].offsets)),
                        _mm512_set1_ps(scales[r][t][g % SCALES]), at[r].total[t]);
        }
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
_Pragma("GCC unroll 8")
            for (int t = 0; t < tokens; t++)
                write_output(p, (size_t)t, rows[r], _mm512_reduce_add_ps(at[r].total[t]));
            rows[r]++;
            nexts[r] = at[r].next;
        }
    }
}

/* The more tokens, the fewer rows have sums that fit the registers. */
TARGET512 static void multiply_rows(const product_t *p, int streams, size_t *rows, size_t *nexts, size_t count) {
#define CASE(tokens, several)                                                                                         \
    case tokens:                                                                                                      \
        if (streams > 1) rows_rounded(p, rows, nexts, count, several, tokens);                                        \
        else rows_rounded(p, rows, nexts, count, 1, tokens);                                                          \
        break;
    switch (p->tokens) {
        CASE(1, 3) CASE(2, 3) CASE(3, 2) CASE(4, 2) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
    }
}

void packed_multiply_int8(const product_t *product, int part) {
    packed_go_along_rows(product, part, product->tokens < 3 ? 3 : product->tokens < 5 ? 2 : 1, multiply_rows);
}
#endif
