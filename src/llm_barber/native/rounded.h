/* What the files with int8 values share: packed weights with rounded values, and outputs in bfloat16 or float32. */
#ifndef LLM_BARBER_ROUNDED_H
#define LLM_BARBER_ROUNDED_H
#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
/* A packed weight W, (rows, columns), with rounded values; `_Weight` of `rounded.py`. Columns and `group` are multiples of
 * 8; for VNNI and AMX, `group` is a multiple of 64. */
typedef struct {
    const int8_t *values;
    const uint8_t *bits;
    const uint16_t *scales; /* bfloat16, (rows, groups) */
    const void *bias;       /* bfloat16 or float32, as `bfloat16` says; or NULL */
    const int64_t *row_ends, *value_ends; /* part k: rows row_ends[k] to row_ends[k + 1]; values before row_ends[k] */
    const int64_t *block_starts;          /* number of values before each block of BLOCK_ROWS rows */
    const openmp_t *openmp;               /* or NULL: the caller's thread computes all parts */
    size_t rows, columns, kept, group, groups;
    int parts, bfloat16;  /* bfloat16: inputs, outputs and bias are bfloat16; else float32 */
    int has_bf16;         /* AVX-512 BF16 may be used */
} rounded_t;

/* Unpacking the rows of the blocks `first` to `last`, on as many threads as the weight has parts. */
typedef struct {
    const rounded_t *weight;
    size_t first, last;
    void *into;
} restore_t;

/* Row at which a part of the rows to unpack begins, and the part before ends: parts have whole blocks. */
INLINE size_t start_of_part(const restore_t *t, int part) {
    const size_t blocks = t->last - t->first;
    const size_t row = (t->first + blocks * (size_t)part / (size_t)t->weight->parts) * BLOCK_ROWS;
    return row < t->weight->rows ? row : t->weight->rows;
}

#define ROUNDED_STEP 64 /* columns that AVX-512 takes at a time */

/* The next 64 bits of the mask; bits beyond the `left` weights are 0. `left` is a multiple of 8. */
INLINE uint64_t mask_of64(const uint8_t *bits, size_t left) {
    uint64_t mask = 0;
    if (left >= ROUNDED_STEP) memcpy(&mask, bits, 8);
    else memcpy(&mask, bits, left / 8);
    return mask;
}

/* The next 64 values, moved to the positions of the mask's set bits. */
TARGET512 INLINE __m512i expand8(uint64_t mask, const int8_t *values, size_t left) {
    __m512i next = left >= ROUNDED_STEP ? _mm512_loadu_si512(values)
                                        : _mm512_maskz_loadu_epi8(((uint64_t)1 << left) - 1, values);
    __asm__("" : "+v"(next));
    return _mm512_mask_expand_epi8(cleared(), mask, next);
}

/* Writes the output of a row of W: the sum and the bias, rounded once. */
INLINE void write_output(const rounded_t *w, void *outputs, size_t token, size_t row, float sum) {
    const size_t at = token * w->rows + row;
    if (w->bfloat16) {
        if (w->bias) sum += from_bfloat16(((const uint16_t *)w->bias)[row]);
        ((uint16_t *)outputs)[at] = to_bfloat16(sum);
    } else {
        ((float *)outputs)[at] = w->bias ? sum + ((const float *)w->bias)[row] : sum;
    }
}
#endif
#endif
