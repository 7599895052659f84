/* What the files with AVX-512 share: packed weights, bit masks, expanding values, threads.
 *
 * A step takes the next 32 (float32: 16) weights of a row. It loads 32 (16) values, the most that may be kept, moves them
 * to the positions of the mask's set bits (VPEXPAND), and advances by as many values as bits are set. VPEXPAND is used in
 * its register form, since its memory form is microcoded on some processors. Loads near the end of the values are masked,
 * and `kept` bounds them, whatever the bit mask holds.
 */
#ifndef LLM_BARBER_AVX512_H
#define LLM_BARBER_AVX512_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "prefetch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define TARGET512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,fma")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt,fma")))
#define BLOCK_ROWS 16 /* rows of a block; `BLOCK_ROWS` of `rows.py` */

/* Functions of the OpenMP library that PyTorch has loaded: work runs on PyTorch's threads. Additional threads would wait
 * for these, which keep a core busy for a while after each operation. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*thread_number)(void);                                     /* omp_get_thread_num */
    int (*thread_count)(void);                                      /* omp_get_num_threads */
} openmp_t;

/* A packed weight W, (rows, columns); `_Weight` of `unrounded.py`. Columns are a multiple of 8. */
typedef struct {
    const void *values;
    const uint8_t *bits;
    const void *bias; /* has the values' type; or NULL */
    const int64_t *row_ends, *value_ends; /* part k: rows row_ends[k] to row_ends[k + 1]; values before row_ends[k] */
    const int64_t *block_starts;          /* number of values before each block of BLOCK_ROWS rows */
    const openmp_t *openmp;               /* or NULL: the caller's thread computes all parts */
    size_t rows, columns, kept;
    int parts, bfloat16, level; /* level: 0: AVX2; 1: values are float32 or widened to it; 2 or 3: multiplied as bfloat16 */
} packed_t;

/* threads.c: calls `function` with `task` and the number of each part, on as many threads as there are parts. In a forked
 * process, which has none of the threads, the caller's thread computes all parts. */
void packed_run_parts(const openmp_t *openmp, int parts, void (*function)(const void *task, int part), const void *task);

/* The first of `count` rows, or of whatever parts share evenly, that belongs to a part; `part` = `parts`: the end. */
static inline size_t packed_first_of_part(size_t count, int part, int parts) {
    return count * (size_t)part / (size_t)parts;
}

int packed_amx_start(void); /* amx.c */

/* Write `count` weights, a multiple of 8, from `kept` values (packed.c). */
void packed_put16(const uint16_t *values, size_t kept, const uint8_t *bits, size_t count, uint16_t *weights);
void packed_put32(const uint32_t *values, size_t kept, const uint8_t *bits, size_t count, uint32_t *weights);

/* First block of a part of `parts`: parts have whole blocks, and about as many values each. */
static inline size_t packed_first_block(const packed_t *weight, int part, int parts) {
    const size_t blocks = (weight->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t share = (int64_t)weight->kept * part / parts;
    size_t first = 0, last = blocks;
    if (part == 0 || part == parts) return part ? blocks : 0;
    while (first < last) {
        const size_t middle = (first + last) / 2;
        if (weight->block_starts[middle] < share) first = middle + 1;
        else last = middle;
    }
    return first;
}

#define STREAMS 3 /* most rows that are multiplied at once; they are far apart, since a core gets more from memory by several
                   * streams of reads than by one */

/* Divides rows `first` to `last` into as many shares as there are streams. Share r begins with row `rows[r]`, the first of a
 * block, and with value `nexts[r]`. Rows before the first share and behind the last one are left over. Returns the number of
 * rows of a share; 0 if there are too few, and then `rows` and `nexts` mean nothing. */
INLINE size_t divide_rows(const int64_t *block_starts, size_t first, size_t last, int streams, size_t *rows, size_t *nexts) {
    const size_t block = (first + BLOCK_ROWS - 1) / BLOCK_ROWS, end = last / BLOCK_ROWS;
    const size_t share = end > block ? (end - block) / (size_t)streams : 0;
    for (size_t r = 0; r < (size_t)streams; r++) {
        rows[r] = (block + r * share) * BLOCK_ROWS;
        nexts[r] = (size_t)block_starts[block + r * share];
    }
    return share * BLOCK_ROWS;
}

INLINE float from_bfloat16(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

INLINE uint16_t to_bfloat16(float number) {
    uint32_t bits;
    memcpy(&bits, &number, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;           /* NaN stays NaN */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
}

/* The next 32 bits of the mask; bits beyond the `left` weights are 0. `left` is a multiple of 8. */
INLINE uint32_t mask_of(const uint8_t *bits, size_t left) {
    uint32_t mask = 0;
    if (left >= 32) memcpy(&mask, bits, 4);
    else memcpy(&mask, bits, left / 8);
    return mask;
}

/* Number of values left; 0 if the mask has more set bits than there are values. */
INLINE size_t left_of(size_t kept, size_t next) { return next < kept ? kept - next : 0; }

/* Zeros for VPEXPAND to write to. On Zen 4 it waits for the former value of its target, even where it sets the rest to
 * zero, so that each step would wait for the one before it. It does not wait where the target was just cleared, or copied
 * from a register that was. */
TARGET512 INLINE __m512i cleared(void) {
    __m512i zeros;
    __asm__("vpxor %x0, %x0, %x0" : "=x"(zeros));
    return zeros;
}

/* Moves values to the positions of the mask's set bits. The assembly statement keeps the compiler from folding the load
 * into VPEXPANDW. */
TARGET512 INLINE __m512i expand16(uint32_t mask, __m512i values) {
    __asm__("" : "+v"(values));
    return _mm512_mask_expand_epi16(cleared(), mask, values);
}

TARGET512 INLINE __m512 expand32(__mmask16 mask, __m512 values) {
    __asm__("" : "+v"(values));
    return _mm512_mask_expand_ps(_mm512_castsi512_ps(cleared()), mask, values);
}

TARGET512 INLINE __m512i next_values16(const uint16_t *values, size_t left) {
    if (left >= 32) return _mm512_loadu_si512(values);
    return _mm512_maskz_loadu_epi16(((uint32_t)1 << left) - 1, values);
}

TARGET512 INLINE __m512 next_values32(const float *values, size_t left) {
    if (left >= 16) return _mm512_loadu_ps(values);
    return _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), values);
}
#endif
#endif
