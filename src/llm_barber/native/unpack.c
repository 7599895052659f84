/* Unpacking weights: values at the set bits of a mask, and zeros elsewhere. Sizes are checked by `__init__.py` and
 * `weight.py`. Whatever the mask holds, no function reads or writes beyond the given sizes.
 */
#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define STEP 64 /* int8 values that are restored at a time */

/* Writes `count` weights, a multiple of 8, from the value `next` of `kept` on, as bfloat16 or float32. Returns the number of
 * the value behind them. int8 values are multiplied by `scale` and rounded once, within the finite numbers, without -0.0;
 * other values keep their bits. */
AVX2 INLINE size_t put(const void *values, size_t next, size_t kept, const uint8_t *bits, size_t count, float scale,
                       void *into, const int kind, const int bfloat16) {
    const __m256 largest = _mm256_castsi256_ps(_mm256_set1_epi32(bfloat16 ? 0x7f7f0000 : 0x7f7fffff));
    for (size_t i = 0; i < count; i += 8) {
        const uint8_t byte = bits[i / 8];
        __m256 eight = packed_next_eight(values, next, kept, byte, kind);
        next += (size_t)__builtin_popcount(byte);
        if (kind == INT8) {
            eight = _mm256_min_ps(_mm256_mul_ps(eight, _mm256_set1_ps(scale)), largest);
            eight = _mm256_max_ps(eight, _mm256_sub_ps(_mm256_setzero_ps(), largest));
            eight = _mm256_add_ps(eight, _mm256_setzero_ps());
        }
        if (!bfloat16) {
            _mm256_storeu_ps((float *)into + i, eight);
            continue;
        }
        __m256i numbers = _mm256_castps_si256(eight);
        if (kind == INT8) { /* to nearest, ties to even */
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(numbers, 16), _mm256_set1_epi32(1));
            numbers = _mm256_add_epi32(_mm256_add_epi32(numbers, _mm256_set1_epi32(0x7fff)), odd);
        }
        numbers = _mm256_srli_epi32(numbers, 16);
        const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
        _mm_storeu_si128((__m128i *)((uint16_t *)into + i), halves);
    }
    return next;
}

/* The same for bfloat16, by AVX-512. */
TARGET512 static size_t put_512(const uint16_t *values, size_t next, size_t kept, const uint8_t *bits, size_t count,
                                uint16_t *weights) {
    size_t i = 0;
    for (; i + 32 <= count && next + 32 <= kept; i += 32) {
        uint32_t mask;
        memcpy(&mask, bits + i / 8, 4);
        prefetch(values + next, bits + i / 8);
        _mm512_storeu_si512(weights + i, expand16(mask, _mm512_loadu_si512(values + next)));
        next += (size_t)_mm_popcnt_u32(mask);
    }
    return put(values, next, kept, bits + i / 8, count - i, 1, weights + i, BFLOAT16, 1);
}

AVX2 static size_t put_floats(const void *values, size_t next, size_t kept, const uint8_t *bits, size_t count, void *weights,
                              int bfloat16, int level) {
    if (!bfloat16) return put(values, next, kept, bits, count, 1, weights, FLOAT32, 0);
    if (level) return put_512(values, next, kept, bits, count, weights);
    return put(values, next, kept, bits, count, 1, weights, BFLOAT16, 1);
}

/* Writes `count` weights, a multiple of 8, of `size` bytes, 2 or 4, from `kept` values. */
void packed_put(const void *values, size_t kept, const uint8_t *bits, size_t count, void *weights, int size, int level) {
    put_floats(values, 0, kept, bits, count, weights, size == 2, level);
}

/* Restores a row whose values are int8, from value `next` on; returns the number of the value behind it. */
AVX2 static size_t restore_row(const packed_t *w, size_t row, size_t next, void *into) {
    for (size_t c = 0, g = 0; c < w->columns; c += w->group, g++) {
        const size_t count = c + w->group < w->columns ? w->group : w->columns - c;
        const uint8_t *bits = w->bits + (row * w->columns + c) / 8;
        const float scale = from_bfloat16(w->scales[row * w->groups + g]);
        if (w->bfloat16) next = put(w->values, next, w->kept, bits, count, scale, (uint16_t *)into + c, INT8, 1);
        else next = put(w->values, next, w->kept, bits, count, scale, (float *)into + c, INT8, 0);
    }
    return next;
}

/* The same in bfloat16, by the processor's rounding where products with the scale are normal numbers of bfloat16, which need
 * no care for zeros and limits. */
TARGET_BF16 static size_t restore_row_bf16(const packed_t *w, size_t row, size_t next, uint16_t *into) {
    for (size_t c = 0; c < w->columns; c += STEP) {
        const size_t left = w->columns - c;
        const uint8_t *bits = w->bits + (row * w->columns + c) / 8;
        const int8_t *values = (const int8_t *)w->values + next;
        const uint16_t scale_bits = w->scales[row * w->groups + c / w->group];
        if (left < STEP || scale_bits < 0x1000 || scale_bits >= 0x7000) {
            const float scale = from_bfloat16(scale_bits);
            next = put(w->values, next, w->kept, bits, left < STEP ? left : STEP, scale, into + c, INT8, 1);
            continue;
        }
        const uint64_t mask = mask_of(bits, STEP);
        const __m512 scale = _mm512_set1_ps(from_bfloat16(scale_bits));
        prefetch(values, bits);
        const __m512i weights = expand8(mask, values, left_of(w->kept, next));
        next += (size_t)_mm_popcnt_u64(mask);
        for (int half = 0; half < 2; half++) {
            const __m256i each = half ? _mm512_extracti64x4_epi64(weights, 1) : _mm512_castsi512_si256(weights);
            const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(each)));
            const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(each, 1)));
            const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, scale), _mm512_mul_ps(low, scale));
            _mm512_storeu_si512(into + c + 32 * half, (__m512i)rounded);
        }
    }
    return next;
}

size_t packed_unpack_row(const packed_t *w, size_t row, size_t next, void *into) {
    if (w->scales) return w->bfloat16 && w->level > 1 ? restore_row_bf16(w, row, next, into) : restore_row(w, row, next, into);
    return put_floats(w->values, next, w->kept, w->bits + row * w->columns / 8, w->columns, into, w->bfloat16, w->level);
}

/* Rows of the blocks `first` to `last`, which the parts of the weight share. */
typedef struct {
    const packed_t *weight;
    size_t first, last;
    uint8_t *into;
} unpack_t;

static void unpack_part(const void *task, int part) {
    const unpack_t *t = task;
    const packed_t *w = t->weight;
    const size_t first = t->first + packed_first_of_part(t->last - t->first, part, w->parts);
    const size_t last = t->first + packed_first_of_part(t->last - t->first, part + 1, w->parts);
    const size_t end = last * BLOCK_ROWS < w->rows ? last * BLOCK_ROWS : w->rows, bytes = w->columns * (w->bfloat16 ? 2 : 4);
    size_t row = first * BLOCK_ROWS, next = (size_t)w->block_starts[first];
    uint8_t *into = t->into + (first - t->first) * BLOCK_ROWS * bytes;
    for (; row < end; row++, into += bytes) next = packed_unpack_row(w, row, next, into);
}

/* Writes the rows of the blocks `first` to `last` to `into`. */
void packed_unpack(const packed_t *weight, size_t first, size_t last, void *into) {
    const unpack_t task = {weight, first, last, into};
    packed_run_parts(weight->openmp, weight->parts, unpack_part, &task);
}
#endif
