/* Products with packed weights whose values are int8, by AVX-512 with VBMI2 and VNNI; and unpacking them, with BF16 if the
 * processor has it.
 *
 * A step takes the next 64 columns of a row: it loads 64 values, the most that may be kept, moves them to the positions of
 * the mask's set bits (VPEXPANDB), multiplies them by 64 inputs (VPDPBUSD), and advances by as many values as bits are
 * set. The instruction multiplies unsigned by signed bytes, so that inputs are stored with 128 added; 128 times the sum of
 * the weights is subtracted. Sums are exact integers within a group of columns. At its end they are converted to float32,
 * multiplied by the scale of the weights times that of the inputs, and added in float32.
 *
 * `rounded.py` checks sizes before it calls. No function reads or writes beyond the given sizes.
 */
#include "rounded.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TARGET_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,popcnt,fma")))
#define TARGET_VNNI_BF16 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,avx512bf16,popcnt,fma")))
#define STEP ROUNDED_STEP
#define OFFSET 128 /* added to inputs */
#define SCALES 16  /* groups whose scales are multiplied at once */

/* 1: this processor has the instructions. */
int packed_has_vnni(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("popcnt");
}

typedef struct {
    const rounded_t *weight;
    const uint8_t *inputs;     /* (tokens, stride), with `OFFSET` added */
    const float *input_scales; /* (tokens, groups) */
    void *outputs;
    size_t stride; /* columns, rounded up to whole steps */
    int tokens;
} rounded_product_t;

TARGET_VNNI INLINE __m512 load_inputs(const void *inputs, size_t at, __mmask16 inside, int bfloat16) {
    if (!bfloat16) return _mm512_maskz_loadu_ps(inside, (const float *)inputs + at);
    __m256i half = _mm256_maskz_loadu_epi16(inside, (const uint16_t *)inputs + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

INLINE __mmask16 inside16(size_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* Rounds inputs, (tokens, columns), to integers from -127 to 127, to nearest, ties to even, by the largest |input| of each
 * group of columns over 127; `OFFSET` is added. The scale of a group with a NaN or an infinity is NaN. */
TARGET_VNNI static void round_inputs(const rounded_t *w, const void *inputs, size_t tokens, size_t stride, uint8_t *rounded,
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
TARGET_VNNI INLINE void add_products(const rounded_product_t *p, stream_t *at, size_t start, size_t end,
                                     const int streams, const int tokens, const int whole) {
    const rounded_t *w = p->weight;
    for (size_t c = start; c < end; c += STEP) {
        __m512i weights[STREAMS];
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
            stream_t *s = &at[r];
            const uint64_t mask = mask_of64(s->bits + c / 8, whole ? STEP : w->columns - c);
            prefetch(w->values + s->next, s->bits + c / 8);
            weights[r] = expand8(mask, w->values + s->next, whole ? STEP : left_of(w->kept, s->next));
            s->next += (size_t)_mm_popcnt_u64(mask);
            s->offsets = _mm512_dpbusd_epi32(s->offsets, _mm512_set1_epi8((char)OFFSET), weights[r]);
        }
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++) {
            const __m512i part = _mm512_loadu_si512(p->inputs + (size_t)t * p->stride + c);
_Pragma("GCC unroll 4")
            for (int r = 0; r < streams; r++) at[r].sums[t] = _mm512_dpbusd_epi32(at[r].sums[t], part, weights[r]);
        }
    }
}

/* Writes scale of the weights × scale of the inputs for groups `g` to `g + SCALES` of a row, for each token. */
TARGET_VNNI INLINE void multiply_scales(const rounded_product_t *p, size_t row, size_t g, float (*scales)[SCALES],
                                        const int tokens) {
    const rounded_t *w = p->weight;
    const __mmask16 inside = inside16(w->groups - g);
    const __m512 of_weights = load_inputs(w->scales, row * w->groups + g, inside, 1);
_Pragma("GCC unroll 8")
    for (int t = 0; t < tokens; t++)
        _mm512_store_ps(scales[t], _mm512_mul_ps(of_weights, _mm512_maskz_loadu_ps(
                                                                 inside, p->input_scales + (size_t)t * w->groups + g)));
}

/* Computes the outputs of `count` rows of each stream. Stream r begins with row `rows[r]` and value `nexts[r]`, which move
 * on. */
TARGET_VNNI INLINE void rows_rounded(const rounded_product_t *p, size_t *rows, size_t *nexts, size_t count,
                                     const int streams, const int tokens) {
    const rounded_t *w = p->weight;
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
                write_output(w, p->outputs, (size_t)t, rows[r], _mm512_reduce_add_ps(at[r].total[t]));
            rows[r]++;
            nexts[r] = at[r].next;
        }
    }
}

/* Computes the outputs of a part's rows: of its shares side by side, and of the rows that are left over one by one. */
TARGET_VNNI INLINE void part_rounded(const rounded_product_t *p, int part, const int streams, const int tokens) {
    const rounded_t *w = p->weight;
    size_t row = (size_t)w->row_ends[part], next = (size_t)w->value_ends[part], rows[STREAMS], nexts[STREAMS];
    const size_t last = (size_t)w->row_ends[part + 1];
    const size_t share = streams > 1 ? divide_rows(w->block_starts, row, last, streams, rows, nexts) : 0;
    if (share) {
        rows_rounded(p, &row, &next, rows[0] - row, 1, tokens);
        rows_rounded(p, rows, nexts, share, streams, tokens);
        row = rows[streams - 1], next = nexts[streams - 1];
    }
    rows_rounded(p, &row, &next, last - row, 1, tokens);
}

/* The more tokens, the fewer rows have sums that fit the registers. */
TARGET_VNNI static void multiply_part(const void *task, int part) {
    const rounded_product_t *p = task;
#define CASE(tokens, streams) case tokens: part_rounded(p, part, streams, tokens); break;
    switch (p->tokens) {
        CASE(1, 3) CASE(2, 3) CASE(3, 2) CASE(4, 2) CASE(5, 1) CASE(6, 1) CASE(7, 1) CASE(8, 1)
    }
}

/* Computes the product of `tokens` rows of inputs, 1 to 8.
 * `rounded`, (tokens, `stride`) bytes, and `scales`, (tokens, groups), are memory for the rounded inputs. */
void packed_multiply_rounded(const rounded_t *weight, const void *inputs, void *outputs, int tokens, size_t stride,
                             uint8_t *rounded, float *scales) {
    const rounded_product_t product = {weight, rounded, scales, outputs, stride, tokens};
    round_inputs(weight, inputs, (size_t)tokens, stride, rounded, scales);
    packed_run_parts(weight->openmp, weight->parts, multiply_part, &product);
}

/* Writes 16 weights, value times scale rounded once, within the finite numbers, without -0.0. */
TARGET_VNNI INLINE void restore16(__m128i values, __m512 scale, __mmask16 inside, void *into, size_t at, int bfloat16) {
    const __m512 largest = _mm512_castsi512_ps(_mm512_set1_epi32(bfloat16 ? 0x7f7f0000 : 0x7f7fffff));
    __m512 weights = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(values)), scale);
    weights = _mm512_max_ps(_mm512_min_ps(weights, largest), _mm512_sub_ps(_mm512_setzero_ps(), largest));
    weights = _mm512_add_ps(weights, _mm512_setzero_ps());
    if (!bfloat16) {
        _mm512_mask_storeu_ps((float *)into + at, inside, weights);
        return;
    }
    __m512i bits = _mm512_castps_si512(weights);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    _mm256_mask_storeu_epi16((uint16_t *)into + at, inside, _mm512_cvtepi32_epi16(bits));
}

/* The values of the next 64 weights of a row, in their places; `next` moves on to those after them. */
TARGET_VNNI INLINE __m512i restored_values(const rounded_t *w, size_t row, size_t column, size_t *next) {
    const uint8_t *bits = w->bits + (row * w->columns + column) / 8;
    const uint64_t mask = mask_of64(bits, w->columns - column);
    prefetch(w->values + *next, bits);
    const __m512i values = expand8(mask, w->values + *next, left_of(w->kept, *next));
    *next += (size_t)_mm_popcnt_u64(mask);
    return values;
}

/* Writes the next 64 weights, or the `left` of a row. */
TARGET_VNNI INLINE void restore_step(__m512i values, uint16_t scale, size_t left, void *into, size_t at, int bfloat16) {
    const __m128i quarters[4] = {_mm512_castsi512_si128(values), _mm512_extracti32x4_epi32(values, 1),
                                 _mm512_extracti32x4_epi32(values, 2), _mm512_extracti32x4_epi32(values, 3)};
    for (size_t q = 0; q < 4 && 16 * q < left; q++)
        restore16(quarters[q], _mm512_set1_ps(from_bfloat16(scale)), inside16(left - 16 * q), into, at + 16 * q, bfloat16);
}

/* Scales whose products with integers up to 127 are normal numbers of bfloat16: they need no care for zeros and limits. */
INLINE int is_plain_scale(uint16_t scale) { return scale >= 0x1000 && scale < 0x7000; }

/* Writes 64 weights in bfloat16, value times a plain scale, rounded once. */
TARGET_VNNI_BF16 INLINE void restore64(__m512i values, __m512 scale, uint16_t *into) {
    for (int half = 0; half < 2; half++) {
        const __m256i each = half ? _mm512_extracti64x4_epi64(values, 1) : _mm512_castsi512_si256(values);
        const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(each));
        const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(each, 1));
        const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_mul_ps(_mm512_cvtepi32_ps(high), scale),
                                                     _mm512_mul_ps(_mm512_cvtepi32_ps(low), scale));
        _mm512_storeu_si512(into + 32 * half, (__m512i)rounded);
    }
}

/* `restore_part` for bfloat16 weights, by AVX-512 BF16: the same bits. */
TARGET_VNNI_BF16 static void restore_part_bf16(const void *task, int part) {
    const restore_t *t = task;
    const rounded_t *w = t->weight;
    const size_t begin = t->first * BLOCK_ROWS, first = start_of_part(t, part), last = start_of_part(t, part + 1);
    size_t next = (size_t)w->block_starts[first / BLOCK_ROWS];
    for (size_t row = first; row < last; row++)
        for (size_t c = 0; c < w->columns; c += STEP) {
            const size_t left = w->columns - c, to = (row - begin) * w->columns + c;
            const __m512i values = restored_values(w, row, c, &next);
            const uint16_t bits = w->scales[row * w->groups + c / w->group];
            if (left >= STEP && is_plain_scale(bits))
                restore64(values, _mm512_set1_ps(from_bfloat16(bits)), (uint16_t *)t->into + to);
            else
                restore_step(values, bits, left, t->into, to, 1);
        }
}

TARGET_VNNI static void restore_part(const void *task, int part) {
    const restore_t *t = task;
    const rounded_t *w = t->weight;
    const size_t begin = t->first * BLOCK_ROWS, first = start_of_part(t, part), last = start_of_part(t, part + 1);
    size_t next = (size_t)w->block_starts[first / BLOCK_ROWS];
    for (size_t row = first; row < last; row++)
        for (size_t c = 0; c < w->columns; c += STEP) {
            const size_t left = w->columns - c, to = (row - begin) * w->columns + c;
            const __m512i values = restored_values(w, row, c, &next);
            restore_step(values, w->scales[row * w->groups + c / w->group], left, t->into, to, w->bfloat16);
        }
}

/* Writes the rows of the blocks `first` to `last` in bfloat16 or float32, as the weight says. */
void packed_restore_rows(const rounded_t *weight, size_t first, size_t last, void *into) {
    const restore_t task = {weight, first, last, into};
    const int by_bf16 = weight->bfloat16 && weight->has_bf16;
    packed_run_parts(weight->openmp, weight->parts, by_bf16 ? restore_part_bf16 : restore_part, &task);
}
#else
int packed_has_vnni(void) { return 0; }
#endif
