/* Products with packed weights: `outputs = inputs · Wᵀ + bias`, in which W is read as it is packed: bit mask and kept
 * values. Plain C with AVX-512, called through ctypes. `unrounded.py` checks sizes before it calls. If this file was not
 * built, or the processor lacks the instructions, `packed.c` (AVX2) or unpacking takes its place. No function reads or
 * writes beyond the given sizes.
 *
 * Rounding: sums are float32. With AVX512-BF16, bfloat16 weights and inputs are multiplied by VDPBF16PS, which sums
 * pairs of exact products and flushes numbers below 2⁻¹²⁶ to zero. Without it, they are widened to float32 and
 * multiplied with FMA. Outputs are rounded once, after the bias.
 */
#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <unistd.h>

/* Instructions of this processor: 0: no AVX-512 with VBMI2; 1: AVX-512 with VBMI2; 2: AVX512-BF16 as well; 3: AMX as
 * well. */
int packed_instructions(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512vbmi2") || !__builtin_cpu_supports("popcnt"))
        return 0;
    if (!__builtin_cpu_supports("avx512bf16")) return 1;
    return packed_amx_start() ? 3 : 2;
}

/* A product; `inputs` is float32 at level 1, and otherwise has the values' type. */
typedef struct {
    const packed_t *weight;
    const void *inputs;
    void *outputs;
    int tokens;
} product_t;

TARGET512 INLINE void write_output(const product_t *p, size_t token, size_t row, float sum) {
    const packed_t *w = p->weight;
    size_t at = token * w->rows + row;
    if (!w->bfloat16) {
        ((float *)p->outputs)[at] = w->bias ? sum + ((const float *)w->bias)[row] : sum;
        return;
    }
    uint32_t bits;
    if (w->bias) {
        float bias;
        bits = (uint32_t)((const uint16_t *)w->bias)[row] << 16;
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
    const size_t columns = p->weight->columns, kept = p->weight->kept;
    const uint16_t *values = p->weight->values, *inputs = p->inputs;
    for (size_t row = first; row < last; row++) {
        const uint8_t *bits = p->weight->bits + row * columns / 8;
        __m512 total[16][4];
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++)
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) total[t][s] = _mm512_setzero_ps();
        size_t c = 0;
        const size_t step = (size_t)(32 * sums);
        for (; c + step <= columns && next + step <= kept; c += step, bits += step / 8)
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) {
                uint32_t mask;
                memcpy(&mask, bits + 4 * s, 4);
                prefetch(values + next, bits);
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
            __m512i weights = expand16(mask, next_values16(values + next, left_of(kept, next)));
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
    const size_t columns = p->weight->columns, kept = p->weight->kept;
    const void *values = p->weight->values;
    const float *inputs = p->inputs;
    for (size_t row = first; row < last; row++) {
        const uint8_t *bits = p->weight->bits + row * columns / 8;
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
                prefetch((const uint16_t *)values + next, bits);
                __m512i all = expand16(
                    mask, next_values16((const uint16_t *)values + next, left_of(kept, next)));
                next += (size_t)_mm_popcnt_u32(mask);
                weights[0] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(all)), 16));
                weights[1] =
                    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(all, 1)), 16));
            } else {
                for (int half = 0; half < 2; half++) {
                    __mmask16 part = (__mmask16)(mask >> (16 * half));
                    prefetch((const float *)values + next, bits);
                    weights[half] = expand32(
                        part, next_values32((const float *)values + next, left_of(kept, next)));
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

static void multiply_part(const void *task, int part) {
    const product_t *p = task;
    const packed_t *w = p->weight;
    const size_t first = (size_t)w->row_ends[part], last = (size_t)w->row_ends[part + 1];
    const size_t next = (size_t)w->value_ends[part];
    if (!w->bfloat16) some_rows_float32(p, first, last, next);
    else if (w->level > 1) some_rows_bfloat16(p, first, last, next);
    else some_rows_widened(p, first, last, next);
}

/* Computes the product of `tokens` rows of inputs, 1 to 16. */
void packed_multiply(const packed_t *weight, const void *inputs, void *outputs, int tokens) {
    const product_t product = {weight, inputs, outputs, tokens};
    packed_run_parts(weight->openmp, weight->parts, multiply_part, &product);
}

typedef struct {
    const openmp_t *openmp;
    int parts;
    void (*function)(const void *, int);
    const void *task;
} parts_t;

static void run_thread(void *all) {
    const parts_t *p = all;
    for (int part = p->openmp->thread_number(); part < p->parts; part += p->openmp->thread_count())
        p->function(p->task, part);
}

/* The process that loaded this library. A forked one has none of its threads. */
static pid_t loaded_by;
__attribute__((constructor)) static void note_process(void) { loaded_by = getpid(); }

void packed_run_parts(const openmp_t *openmp, int parts, void (*function)(const void *, int), const void *task) {
    if (parts > 1 && openmp && loaded_by == getpid()) {
        parts_t all = {openmp, parts, function, task};
        openmp->parallel(run_thread, &all, (unsigned)parts, 0);
        return;
    }
    for (int part = 0; part < parts; part++) function(task, part);
}
#else
int packed_instructions(void) { return 0; }
#endif
