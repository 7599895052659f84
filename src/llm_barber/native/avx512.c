/* Products with packed weights: `outputs = inputs · Wᵀ + bias`, in which W is read as it is packed: bit mask and kept
 * values. Plain C with AVX-512, called through ctypes. `avx512.py` and `__init__.py` check sizes before they call. If this
 * file was not built, or the processor lacks the instructions, `packed.c` (AVX2) or unpacking takes its place.
 *
 * Each step takes the next 32 (float32: 16) weights of a row. It loads 32 (16) values, the most that may be kept, moves
 * them to the positions of the mask's set bits (VPEXPAND), multiplies, and advances by as many values as bits are set.
 * VPEXPAND is used in its register form, since its memory form is microcoded on some processors. No function reads or
 * writes beyond the given sizes: loads near the end of the values are masked.
 *
 * Rounding: sums are float32. With AVX512-BF16, bfloat16 weights and inputs are multiplied by VDPBF16PS, which sums
 * pairs of exact products and flushes numbers below 2⁻¹²⁶ to zero. Without it, they are widened to float32 and
 * multiplied with FMA. Outputs are rounded once, after the bias.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#include <unistd.h>

/* Instructions of this processor: 0: no AVX-512 with VBMI2; 1: AVX-512 with VBMI2; 2: AVX512-BF16 as well. */
int packed_product_level(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("popcnt"))
        return 0;
    return __builtin_cpu_supports("avx512bf16") ? 2 : 1;
}

#define TARGET512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,fma")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt,fma")))
#define INLINE __attribute__((always_inline)) static inline

/* Arguments of a product, as `multiply` of `avx512.py` describes them. `level`: 1: inputs are float32, and values are
 * float32 or widened to it; 2: values and inputs are bfloat16. */
typedef struct {
    const void *values;
    const uint8_t *bits;
    const void *inputs;
    const void *bias; /* has the outputs' type; or NULL */
    void *outputs;
    size_t rows, columns, kept;
    int tokens, values_bfloat16, outputs_bfloat16, level;
} product_t;

/* The next 32 bits of the mask; bits beyond the `left` weights are 0. `left` is a multiple of 8. */
INLINE uint32_t mask_of(const uint8_t *bits, size_t left) {
    uint32_t mask = 0;
    if (left >= 32) memcpy(&mask, bits, 4);
    else memcpy(&mask, bits, left / 8);
    return mask;
}

/* Number of values left; 0 if the mask has more set bits than there are values. */
INLINE size_t left_of(size_t kept, size_t next) { return next < kept ? kept - next : 0; }

/* Moves values to the positions of the mask's set bits. The assembly statement keeps the compiler from folding the load
 * into VPEXPANDW. */
TARGET512 INLINE __m512i expand16(uint32_t mask, __m512i values) {
    __asm__("" : "+v"(values));
    return _mm512_maskz_expand_epi16(mask, values);
}

TARGET512 INLINE __m512 expand32(__mmask16 mask, __m512 values) {
    __asm__("" : "+v"(values));
    return _mm512_maskz_expand_ps(mask, values);
}

TARGET512 INLINE __m512i next_values16(const uint16_t *values, size_t left) {
    if (left >= 32) return _mm512_loadu_si512(values);
    return _mm512_maskz_loadu_epi16(((uint32_t)1 << left) - 1, values);
}

TARGET512 INLINE __m512 next_values32(const float *values, size_t left) {
    if (left >= 16) return _mm512_loadu_ps(values);
    return _mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), values);
}

TARGET512 INLINE void write_output(const product_t *p, size_t token, size_t row, float sum) {
    size_t at = token * p->rows + row;
    if (!p->outputs_bfloat16) {
        ((float *)p->outputs)[at] = p->bias ? sum + ((const float *)p->bias)[row] : sum;
        return;
    }
    uint32_t bits;
    if (p->bias) {
        float bias;
        bits = (uint32_t)((const uint16_t *)p->bias)[row] << 16;
        memcpy(&bias, &bits, 4);
        sum += bias;
    }
    memcpy(&bits, &sum, 4);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16); /* to nearest, ties to even */
    if ((bits & 0x7fffffff) > 0x7f800000) rounded = 0x7fc0;                  /* NaN stays NaN */
    ((uint16_t *)p->outputs)[at] = rounded;
}

/* Computes the outputs of rows `first` to `last` of W, whose values begin at number `next`. Each token has `sums`
 * accumulators, so that an addition does not wait for the one before it. */
TARGET_BF16 INLINE void rows_bfloat16(const product_t *p, size_t first, size_t last, size_t next, const int tokens,
                                      const int sums) {
    const size_t columns = p->columns;
    const uint16_t *values = p->values, *inputs = p->inputs;
    for (size_t row = first; row < last; row++) {
        const uint8_t *bits = p->bits + row * columns / 8;
        __m512 total[16][4];
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++)
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) total[t][s] = _mm512_setzero_ps();
        size_t c = 0;
        const size_t step = (size_t)(32 * sums);
        for (; c + step <= columns && next + step <= p->kept; c += step, bits += step / 8)
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) {
                uint32_t mask;
                memcpy(&mask, bits + 4 * s, 4);
                __m512i weights = expand16(mask, _mm512_loadu_si512(values + next));
                next += (size_t)_mm_popcnt_u32(mask);
_Pragma("GCC unroll 16")
                for (int t = 0; t < tokens; t++)
                    total[t][s] = _mm512_dpbf16_ps(total[t][s], (__m512bh)weights,
                                                   (__m512bh)_mm512_loadu_si512(inputs + (size_t)t * columns + c + 32 * s));
            }
        for (; c < columns; c += 32, bits += 4) {
            uint32_t mask = mask_of(bits, columns - c);
            __mmask32 inside = columns - c >= 32 ? 0xffffffffu : ((uint32_t)1 << (columns - c)) - 1;
            __m512i weights = expand16(mask, next_values16(values + next, left_of(p->kept, next)));
            next += (size_t)_mm_popcnt_u32(mask);
_Pragma("GCC unroll 16")
            for (int t = 0; t < tokens; t++)
                total[t][0] = _mm512_dpbf16_ps(
                    total[t][0], (__m512bh)weights,
                    (__m512bh)_mm512_maskz_loadu_epi16(inside, inputs + (size_t)t * columns + c));
        }
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++) {
_Pragma("GCC unroll 4")
            for (int s = 1; s < sums; s++) total[t][0] = _mm512_add_ps(total[t][0], total[t][s]);
            write_output(p, (size_t)t, row, _mm512_reduce_add_ps(total[t][0]));
        }
    }
}

/* Computes the same with float32 inputs. bfloat16 values are widened; the two halves of 32 weights follow each other. */
TARGET512 INLINE void rows_float32(const product_t *p, size_t first, size_t last, size_t next, const int tokens,
                                   const int bfloat16) {
    const size_t columns = p->columns;
    const float *inputs = p->inputs;
    for (size_t row = first; row < last; row++) {
        const uint8_t *bits = p->bits + row * columns / 8;
        __m512 total[16][2];
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm512_setzero_ps();
        for (size_t c = 0; c < columns; c += 32, bits += 4) {
            uint32_t mask = mask_of(bits, columns - c);
            const size_t left = columns - c;
            __mmask16 inside[2] = {left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1),
                                   left >= 32 ? 0xffff : left <= 16 ? 0 : (__mmask16)((1u << (left - 16)) - 1)};
            __m512 weights[2];
            if (bfloat16) {
                __m512i all = expand16(
                    mask, next_values16((const uint16_t *)p->values + next, left_of(p->kept, next)));
                next += (size_t)_mm_popcnt_u32(mask);
                weights[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(all)), 16));
                weights[1] =
                    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(all, 1)), 16));
            } else {
                for (int half = 0; half < 2; half++) {
                    __mmask16 part = (__mmask16)(mask >> (16 * half));
                    weights[half] = expand32(
                        part, next_values32((const float *)p->values + next, left_of(p->kept, next)));
                    next += (size_t)_mm_popcnt_u32(part);
                }
            }
_Pragma("GCC unroll 16")
            for (int t = 0; t < tokens; t++)
                for (int half = 0; half < 2; half++)
                    total[t][half] = _mm512_fmadd_ps(
                        weights[half], _mm512_maskz_loadu_ps(inside[half], inputs + (size_t)t * columns + c + 16 * half),
                        total[t][half]);
        }
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++)
            write_output(p, (size_t)t, row, _mm512_reduce_add_ps(_mm512_add_ps(total[t][0], total[t][1])));
    }
}

/* Calls `function` with a constant number of input rows. Its last argument is `few` for 1 and 2 rows, `some` for 3 to 8,
 * and `many` for 9 to 16. */
#define CASES(function, few, some, many)                                                                              \
    switch (p->tokens) {                                                                                              \
        CASE(function, 1, few) CASE(function, 2, few) CASE(function, 3, some) CASE(function, 4, some)                 \
        CASE(function, 5, some) CASE(function, 6, some) CASE(function, 7, some) CASE(function, 8, some)               \
        CASE(function, 9, many) CASE(function, 10, many) CASE(function, 11, many) CASE(function, 12, many)            \
        CASE(function, 13, many) CASE(function, 14, many) CASE(function, 15, many) CASE(function, 16, many)           \
    }
#define CASE(function, number, last_argument)                                                                         \
    case number: function(p, first, last, next, number, last_argument); break;

TARGET_BF16 static void some_rows_bfloat16(const product_t *p, size_t first, size_t last, size_t next) {
    CASES(rows_bfloat16, 4, 2, 1)
}

TARGET512 static void some_rows_widened(const product_t *p, size_t first, size_t last, size_t next) {
    CASES(rows_float32, 1, 1, 1)
}

TARGET512 static void some_rows_float32(const product_t *p, size_t first, size_t last, size_t next) {
    CASES(rows_float32, 0, 0, 0)
}

static void some_rows(const product_t *p, size_t first, size_t last, size_t next) {
    if (!p->values_bfloat16) some_rows_float32(p, first, last, next);
    else if (p->level == 2) some_rows_bfloat16(p, first, last, next);
    else some_rows_widened(p, first, last, next);
}

/* Functions of the OpenMP library that PyTorch has loaded: products run on PyTorch's threads. Additional threads would
 * wait for these, which keep a core busy for a while after each operation. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*thread_number)(void);                                     /* omp_get_thread_num */
    int (*thread_count)(void);                                      /* omp_get_num_threads */
} openmp_t;

typedef struct {
    const product_t *product;
    const openmp_t *openmp;
    const int64_t *row_ends, *value_ends;
    int parts;
} task_t;

static void run_parts(const task_t *task, int first, int step) {
    for (int part = first; part < task->parts; part += step)
        some_rows(task->product, (size_t)task->row_ends[part], (size_t)task->row_ends[part + 1],
                  (size_t)task->value_ends[part]);
}

static void run_thread(void *task) {
    const openmp_t *openmp = ((const task_t *)task)->openmp;
    run_parts(task, openmp->thread_number(), openmp->thread_count());
}

/* Computes a product in `parts` parts: part k has rows `row_ends[k]` to `row_ends[k + 1]`, whose values begin at number
 * `value_ends[k]`. The caller's thread computes all parts if `openmp` is NULL, and in a forked process, which has none
 * of the threads. */
void packed_multiply(const product_t *product, int parts, const int64_t *row_ends, const int64_t *value_ends,
                     const openmp_t *openmp) {
    static pid_t with_threads;
    const task_t task = {product, openmp, row_ends, value_ends, parts};
    if (parts > 1 && openmp && !with_threads) with_threads = getpid();
    if (parts > 1 && openmp && with_threads == getpid()) openmp->parallel(run_thread, (void *)&task, (unsigned)parts, 0);
    else run_parts(&task, 0, 1);
}

/* Writes `count` weights, a multiple of 8, from `kept` values, as `packed_put16` and `packed_put32` do. */
TARGET512 void packed_put16_512(const uint16_t *values, size_t kept, const uint8_t *bits, size_t count, uint16_t *weights) {
    size_t next = 0, i = 0;
    for (; i + 32 <= count && next + 32 <= kept; i += 32) {
        uint32_t mask;
        memcpy(&mask, bits + i / 8, 4);
        _mm512_storeu_si512(weights + i, expand16(mask, _mm512_loadu_si512(values + next)));
        next += (size_t)_mm_popcnt_u32(mask);
    }
    for (; i < count; i += 32) {
        uint32_t mask = mask_of(bits + i / 8, count - i);
        __mmask32 inside = count - i >= 32 ? 0xffffffffu : ((uint32_t)1 << (count - i)) - 1;
        _mm512_mask_storeu_epi16(weights + i, inside,
                                 expand16(mask, next_values16(values + next, left_of(kept, next))));
        next += (size_t)_mm_popcnt_u32(mask);
    }
}

TARGET512 void packed_put32_512(const uint32_t *values, size_t kept, const uint8_t *bits, size_t count, uint32_t *weights) {
    size_t next = 0;
    for (size_t i = 0; i < count; i += 16) {
        __mmask16 inside = count - i >= 16 ? 0xffff : 0xff;
        __mmask16 mask = (__mmask16)(bits[i / 8] | (inside == 0xffff ? bits[i / 8 + 1] << 8 : 0));
        __m512 sixteen = expand32(mask, next_values32((const float *)values + next, left_of(kept, next)));
        _mm512_mask_storeu_ps(weights + i, inside, sixteen);
        next += (size_t)_mm_popcnt_u32(mask);
    }
}
#else
int packed_product_level(void) { return 0; }
#endif
