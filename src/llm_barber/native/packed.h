/* What the C files share: packed weights, products, bit masks, expanding values, threads. */
#ifndef LLM_BARBER_PACKED_H
#define LLM_BARBER_PACKED_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define INLINE __attribute__((always_inline)) static inline
#define AVX2 __attribute__((target("avx2,fma,popcnt")))
#define AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx512vnni,popcnt,fma"
#define TARGET512 __attribute__((target(AVX512)))
#define TARGET_BF16 __attribute__((target(AVX512 ",avx512bf16")))
#define BLOCK_ROWS 16 /* rows of a block; `BLOCK_ROWS` of `weight.py` */
#define STREAMS 3     /* most rows that are multiplied at once; they are far apart, since a core gets more from memory by
                       * several streams of reads than by one */

/* Functions of the OpenMP library that PyTorch has loaded: work runs on PyTorch's threads. Additional threads would wait
 * for these, which keep a core busy for a while after each operation. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*thread_number)(void);                                     /* omp_get_thread_num */
    int (*thread_count)(void);                                      /* omp_get_num_threads */
} openmp_t;

/* A packed weight W, (rows, columns); `_Weight` of `weight.py`. Columns and `group` are multiples of 8; for VNNI and AMX,
 * `group` is a multiple of 64. */
typedef struct {
    const void *values;     /* int8 if there are scales; otherwise of the type that `bfloat16` says */
    const uint8_t *bits;
    const uint16_t *scales; /* bfloat16, (rows, groups); or NULL */
    const void *bias;       /* bfloat16 or float32, as `bfloat16` says; or NULL */
    const int64_t *row_ends, *value_ends; /* part k: rows row_ends[k] to row_ends[k + 1]; values before row_ends[k] */
    const int64_t *block_starts;          /* number of values before each block of BLOCK_ROWS rows */
    const openmp_t *openmp;               /* or NULL: the caller's thread computes all parts */
    size_t rows, columns, kept, group, groups;
    int parts, bfloat16; /* bfloat16: inputs, outputs and bias are bfloat16; else float32 */
    int level;           /* 0: AVX2; 1: AVX-512 with VBMI2 and VNNI; 2: and BF16; 3: and AMX */
} packed_t;

/* A product of a few rows of inputs, `tokens`. */
typedef struct {
    const packed_t *weight;
    const void *inputs;        /* of AVX2 float32; of VNNI bytes, (tokens, stride) */
    const float *input_scales; /* of VNNI: (tokens, groups) */
    void *outputs;
    size_t stride; /* columns, rounded up to whole steps of VNNI */
    int tokens;
} product_t;

/* Computes `count` rows of W for each of `streams` streams. Stream r begins with row `rows[r]` and value `nexts[r]`, which
 * move on. */
typedef void (*rows_t)(const product_t *product, int streams, size_t *rows, size_t *nexts, size_t count);

/* Calls `function` with `task` and the number of each part, on as many threads as there are parts. In a forked process,
 * which has none of the threads, the caller's thread computes all parts. */
void packed_run_parts(const openmp_t *openmp, int parts, void (*function)(const void *task, int part), const void *task);

/* Computes the rows of a part: most of them in `streams` shares side by side, and those that are left over one by one. */
void packed_go_along_rows(const product_t *product, int part, int streams, rows_t rows);

void packed_multiply_bfloat16(const product_t *product, int part); /* avx512.c */
void packed_multiply_int8(const product_t *product, int part);     /* vnni.c */
void packed_round_inputs(const packed_t *weight, const void *inputs, size_t tokens, size_t stride, uint8_t *rounded,
                         float *scales);                           /* vnni.c */
/* Writes a row of W, whose values begin with `next`, and returns the number of the value behind it (unpack.c). */
size_t packed_unpack_row(const packed_t *weight, size_t row, size_t next, void *into);
int packed_amx_start(void);                                        /* amx.c */

/* The first of `count` rows, or of whatever parts share evenly, that belongs to a part; `part` = `parts`: the end. */
static inline size_t packed_first_of_part(size_t count, int part, int parts) {
    return count * (size_t)part / (size_t)parts;
}

enum { INT8 = 1, BFLOAT16 = 2, FLOAT32 = 4 }; /* kinds of values, by their bytes */

/* By a byte of the mask, the index of each of eight weights' values among the next values; -1 in `kept32` for those that have
 * one (packed.c). */
extern uint8_t packed_places8[256][8], packed_places16[256][16];
extern int32_t packed_places32[256][8], packed_kept32[256][8];

/* The next eight weights as float32, from value number `next` of `kept` on. */
AVX2 INLINE __m256 packed_next_eight(const void *values, size_t next, size_t kept, uint8_t byte, const int kind) {
    const void *eight = (const uint8_t *)values + next * (size_t)kind;
    uint32_t few[8] = {0};
    if (next + 8 > kept) {
        if (next < kept) memcpy(few, eight, (kept - next) * (size_t)kind);
        eight = few;
    }
    if (kind == INT8) {
        const __m128i places = _mm_loadl_epi64((const __m128i *)packed_places8[byte]);
        const __m128i bytes = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)eight), places);
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    if (kind == BFLOAT16) {
        const __m128i places = _mm_loadu_si128((const __m128i *)packed_places16[byte]);
        const __m128i halves = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)eight), places);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    const __m256i places = _mm256_loadu_si256((const __m256i *)packed_places32[byte]);
    const __m256i numbers = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)eight), places);
    return _mm256_castsi256_ps(_mm256_and_si256(numbers, _mm256_loadu_si256((const __m256i *)packed_kept32[byte])));
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
    const uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
    return number != number ? 0x7fc0 : rounded;                                    /* NaN stays NaN */
}

/* Writes the output of a row of W: the sum and the bias, rounded once. */
INLINE void write_output(const product_t *p, size_t token, size_t row, float sum) {
    const packed_t *w = p->weight;
    const size_t at = token * w->rows + row;
    if (w->bfloat16) {
        if (w->bias) sum += from_bfloat16(((const uint16_t *)w->bias)[row]);
        ((uint16_t *)p->outputs)[at] = to_bfloat16(sum);
    } else {
        ((float *)p->outputs)[at] = w->bias ? sum + ((const float *)w->bias)[row] : sum;
    }
}

/* Asks for what lies 2 KiB behind the next values, and half a KiB behind the next bits. A processor foresees reads in steps
 * of equal length, but each step reads as many values as its mask has set bits: without this a core waits for memory half
 * of the time. It may lie beyond the arrays: asking does not read, and does not fail. */
INLINE void prefetch(const void *values, const void *bits) {
    __builtin_prefetch((const void *)((uintptr_t)values + 2048));
    __builtin_prefetch((const void *)((uintptr_t)bits + 512));
}

/* The next 64 bits of the mask; bits beyond the `left` weights are 0. `left` is a multiple of 8. */
INLINE uint64_t mask_of(const uint8_t *bits, size_t left) {
    uint64_t mask = 0;
    if (left >= 64) memcpy(&mask, bits, 8);
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
 * into VPEXPANDW, whose memory form is microcoded on some processors. */
TARGET512 INLINE __m512i expand16(uint32_t mask, __m512i values) {
    __asm__("" : "+v"(values));
    return _mm512_mask_expand_epi16(cleared(), mask, values);
}

TARGET512 INLINE __m512i next_values16(const uint16_t *values, size_t left) {
    if (left >= 32) return _mm512_loadu_si512(values);
    return _mm512_maskz_loadu_epi16(((uint32_t)1 << left) - 1, values);
}

/* The next 64 values of int8, moved to the positions of the mask's set bits. */
TARGET512 INLINE __m512i expand8(uint64_t mask, const int8_t *values, size_t left) {
    __m512i next = left >= 64 ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi8(((uint64_t)1 << left) - 1, values);
    __asm__("" : "+v"(next));
    return _mm512_mask_expand_epi8(cleared(), mask, next);
}
#endif
#endif
