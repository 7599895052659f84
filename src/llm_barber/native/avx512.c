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
#define PASS_TOKENS 8 /* most input rows that are multiplied at once: their sums stay in registers */

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

/* Writes an output: the sum and the bias, rounded once. */
TARGET512 INLINE void write_output(const product_t *p, size_t token, size_t row, float sum) {
    const packed_t *w = p->weight;
    const size_t at = token * w->rows + row;
    if (w->bfloat16) {
        if (w->bias) sum += from_bfloat16(((const uint16_t *)w->bias)[row]);
        ((uint16_t *)p->outputs)[at] = to_bfloat16(sum);
    } else {
        ((float *)p->outputs)[at] = w->bias ? sum + ((const float *)w->bias)[row] : sum;
    }
}

typedef __m512 sums_t[PASS_TOKENS][2]; /* of a row of W: up to two accumulators for each output */

/* Finds the bits and the number of the first value of each stream's row, and clears its sums. */
TARGET512 INLINE void begin_rows(const product_t *p, const size_t *rows, const size_t *nexts, const uint8_t **bits,
                                 size_t *next, sums_t *total, const int streams, const int tokens) {
_Pragma("GCC unroll 4")
    for (int r = 0; r < streams; r++) {
        bits[r] = p->weight->bits + rows[r] * p->weight->columns / 8;
        next[r] = nexts[r];
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++) total[r][t][0] = total[r][t][1] = _mm512_setzero_ps();
    }
}

/* Writes the outputs of each stream's row, from token `from` on, and the number of the value behind it. */
TARGET512 INLINE void end_rows(const product_t *p, const size_t *rows, size_t *nexts, size_t from, const size_t *next,
                               sums_t *total, const int streams, const int tokens) {
_Pragma("GCC unroll 4")
    for (int r = 0; r < streams; r++) {
        nexts[r] = next[r];
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++)
            write_output(p, from + (size_t)t, rows[r],
                         _mm512_reduce_add_ps(_mm512_add_ps(total[r][t][0], total[r][t][1])));
    }
}

/* Computes `tokens` outputs, from token `from` on, of the row of W at which each of `streams` streams is. `nexts[r]` is the
 * number of the first value of row `rows[r]`, and afterwards of the row behind it. Inputs are read once for all streams.
 * Each output has `sums` accumulators, so that an addition does not wait for the one before it. An output has the same bits
 * whatever `streams` is. The caller of several streams has checked that each has as many values left as there are columns:
 * no load is masked then. */
TARGET_BF16 INLINE void rows_bfloat16(const product_t *p, const size_t *rows, size_t *nexts, size_t from, const int streams,
                                      const int tokens, const int sums) {
    const int plain = streams > 1;
    const size_t columns = p->weight->columns, kept = p->weight->kept, step = (size_t)(32 * sums);
    const uint16_t *values = p->weight->values, *inputs = (const uint16_t *)p->inputs + from * columns;
    const uint8_t *bits[STREAMS];
    size_t next[STREAMS], c = 0;
    sums_t total[STREAMS];
    begin_rows(p, rows, nexts, bits, next, total, streams, tokens);
    for (; c + step <= columns; c += step)
_Pragma("GCC unroll 2")
        for (int s = 0; s < sums; s++) {
            __m512i weights[STREAMS];
_Pragma("GCC unroll 4")
            for (int r = 0; r < streams; r++) {
                uint32_t mask;
                memcpy(&mask, bits[r] + c / 8 + 4 * s, 4);
                prefetch(values + next[r], bits[r] + c / 8);
                weights[r] = expand16(mask, next_values16(values + next[r], plain ? 32 : left_of(kept, next[r])));
                next[r] += (size_t)_mm_popcnt_u32(mask);
            }
_Pragma("GCC unroll 8")
            for (int t = 0; t < tokens; t++) {
                const __m512i part = _mm512_loadu_si512(inputs + (size_t)t * columns + c + 32 * s);
_Pragma("GCC unroll 4")
                for (int r = 0; r < streams; r++)
                    total[r][t][s] = _mm512_dpbf16_ps(total[r][t][s], (__m512bh)weights[r], (__m512bh)part);
            }
        }
    for (; c < columns; c += 32) {
        const size_t left = columns - c;
        const __mmask32 inside = left >= 32 ? 0xffffffffu : ((uint32_t)1 << left) - 1;
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
            const uint32_t mask = mask_of(bits[r] + c / 8, left);
            const __m512i weights = expand16(mask, next_values16(values + next[r], left_of(kept, next[r])));
            next[r] += (size_t)_mm_popcnt_u32(mask);
_Pragma("GCC unroll 8")
            for (int t = 0; t < tokens; t++)
                total[r][t][0] =
                    _mm512_dpbf16_ps(total[r][t][0], (__m512bh)weights,
                                     (__m512bh)_mm512_maskz_loadu_epi16(inside, inputs + (size_t)t * columns + c));
        }
    }
    end_rows(p, rows, nexts, from, next, total, streams, tokens);
}

/* Computes the same with float32 inputs. bfloat16 values are widened; the two halves of 32 weights follow each other. */
TARGET512 INLINE void rows_float32(const product_t *p, const size_t *rows, size_t *nexts, size_t from, const int streams,
                                   const int tokens, const int sums, const int bfloat16) {
    const int plain = streams > 1;
    const size_t columns = p->weight->columns, kept = p->weight->kept;
    const void *values = p->weight->values;
    const float *inputs = (const float *)p->inputs + from * columns;
    const uint8_t *bits[STREAMS];
    size_t next[STREAMS];
    sums_t total[STREAMS];
    begin_rows(p, rows, nexts, bits, next, total, streams, tokens);
    for (size_t c = 0; c < columns; c += 32) {
        const size_t left = columns - c;
        const __mmask16 inside[2] = {left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1),
                                     left >= 32 ? 0xffff : left <= 16 ? 0 : (__mmask16)((1u << (left - 16)) - 1)};
        __m512 weights[STREAMS][2];
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
            const uint32_t mask = mask_of(bits[r] + c / 8, left);
            if (bfloat16) {
                prefetch((const uint16_t *)values + next[r], bits[r] + c / 8);
                const __m512i all =
                    expand16(mask, next_values16((const uint16_t *)values + next[r],
                                                 plain && left >= 32 ? 32 : left_of(kept, next[r])));
                next[r] += (size_t)_mm_popcnt_u32(mask);
                weights[r][0] =
                    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(all)), 16));
                weights[r][1] =
                    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(all, 1)), 16));
            } else {
_Pragma("GCC unroll 2")
                for (int half = 0; half < 2; half++) {
                    const __mmask16 part = (__mmask16)(mask >> (16 * half));
                    prefetch((const float *)values + next[r], bits[r] + c / 8);
                    weights[r][half] =
                        expand32(part, next_values32((const float *)values + next[r],
                                                     plain && left >= 32 ? 16 : left_of(kept, next[r])));
                    next[r] += (size_t)_mm_popcnt_u32(part);
                }
            }
        }
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++)
_Pragma("GCC unroll 2")
            for (int half = 0; half < 2; half++) {
                const __m512 part = _mm512_maskz_loadu_ps(inside[half], inputs + (size_t)t * columns + c + 16 * half);
_Pragma("GCC unroll 4")
                for (int r = 0; r < streams; r++) {
                    __m512 *sum = &total[r][t][sums > 1 ? half : 0];
                    *sum = _mm512_fmadd_ps(weights[r][half], part, *sum);
                }
            }
    }
    end_rows(p, rows, nexts, from, next, total, streams, tokens);
}

/* Computes outputs of up to `count` rows of each stream, and moves `rows` and `nexts` on. Several streams stop where one has
 * fewer values left than there are columns. Returns the number of rows that each stream has moved on. */
typedef size_t (*pass_t)(const product_t *p, size_t *rows, size_t *nexts, size_t count, size_t from);
typedef struct {
    pass_t one, several;
} passes_t;

/* For each dtype and number of input rows, `one_…` for one stream and `several_…` for `STREAMS`. */
#define PASS(name, target, rows_at_once, streams, ...)                                                                \
    target static size_t name(const product_t *p, size_t *rows, size_t *nexts, size_t count, size_t from) {           \
        const size_t columns = p->weight->columns, kept = p->weight->kept;                                            \
        for (size_t done = 0; done < count; done++) {                                                                 \
            for (int r = 0; r < streams; r++)                                                                         \
                if (streams > 1 && left_of(kept, nexts[r]) < columns) return done;                                    \
            rows_at_once(p, rows, nexts, from, streams, __VA_ARGS__);                                                 \
            for (int r = 0; r < streams; r++) rows[r]++;                                                              \
        }                                                                                                             \
        return count;                                                                                                 \
    }
#define PASSES(tokens, sums)                                                                                          \
    PASS(one_bfloat16_##tokens, TARGET_BF16, rows_bfloat16, 1, tokens, sums)                                          \
    PASS(several_bfloat16_##tokens, TARGET_BF16, rows_bfloat16, STREAMS, tokens, sums)                                \
    PASS(one_widened_##tokens, TARGET512, rows_float32, 1, tokens, sums, 1)                                           \
    PASS(several_widened_##tokens, TARGET512, rows_float32, STREAMS, tokens, sums, 1)                                 \
    PASS(one_float32_##tokens, TARGET512, rows_float32, 1, tokens, sums, 0)                                           \
    PASS(several_float32_##tokens, TARGET512, rows_float32, STREAMS, tokens, sums, 0)
PASSES(1, 2) PASSES(2, 2) PASSES(3, 1) PASSES(4, 1) PASSES(5, 1) PASSES(6, 1) PASSES(7, 1) PASSES(8, 1)

#define TABLE(kind)                                                                                                   \
    static const passes_t kind##_passes[PASS_TOKENS] = {                                                              \
        {one_##kind##_1, several_##kind##_1}, {one_##kind##_2, several_##kind##_2},                                   \
        {one_##kind##_3, several_##kind##_3}, {one_##kind##_4, several_##kind##_4},                                   \
        {one_##kind##_5, several_##kind##_5}, {one_##kind##_6, several_##kind##_6},                                   \
        {one_##kind##_7, several_##kind##_7}, {one_##kind##_8, several_##kind##_8},                                   \
    };
TABLE(bfloat16) TABLE(widened) TABLE(float32)

/* Computes all outputs of up to `count` rows of each stream, of which there are 1 or `STREAMS`; returns as `pass_t` does.
 * Where the tokens need two passes, each row has both before the next row is read: the second finds it in the cache. */
static size_t multiply_rows(const product_t *p, const passes_t *passes, int streams, size_t *rows, size_t *nexts,
                            size_t count) {
    const passes_t *full = &passes[PASS_TOKENS - 1], *last = &passes[(p->tokens - 1) % PASS_TOKENS];
    const pass_t first_pass = streams > 1 ? full->several : full->one, last_pass = streams > 1 ? last->several : last->one;
    if (p->tokens <= PASS_TOKENS) return last_pass(p, rows, nexts, count, 0);
    for (size_t done = 0; done < count; done++) {
        size_t same_rows[STREAMS], same_nexts[STREAMS];
        memcpy(same_rows, rows, (size_t)streams * sizeof(size_t));
        memcpy(same_nexts, nexts, (size_t)streams * sizeof(size_t));
        if (!first_pass(p, same_rows, same_nexts, 1, 0)) return done;
        last_pass(p, rows, nexts, 1, PASS_TOKENS);
    }
    return count;
}

/* Computes the outputs of a part's rows: of its shares side by side, and of the rows that are left over one by one. */
static void multiply_part(const void *task, int part) {
    const product_t *p = task;
    const packed_t *w = p->weight;
    const passes_t *passes = !w->bfloat16 ? float32_passes : w->level > 1 ? bfloat16_passes : widened_passes;
    size_t row = (size_t)w->row_ends[part], next = (size_t)w->value_ends[part], rows[STREAMS], nexts[STREAMS];
    const size_t last = (size_t)w->row_ends[part + 1];
    const size_t share = divide_rows(w->block_starts, row, last, STREAMS, rows, nexts);
    if (share) {
        multiply_rows(p, passes, 1, &row, &next, rows[0] - row);
        const size_t done = multiply_rows(p, passes, STREAMS, rows, nexts, share);
        for (int r = 0; r < STREAMS; r++) multiply_rows(p, passes, 1, &rows[r], &nexts[r], share - done);
        row = rows[STREAMS - 1], next = nexts[STREAMS - 1];
    }
    multiply_rows(p, passes, 1, &row, &next, last - row);
}

/* Computes the product of `tokens` rows of inputs, 1 to 16. */
void packed_multiply(const packed_t *weight, const void *inputs, void *outputs, int tokens) {
    const product_t product = {weight, inputs, outputs, tokens};
    packed_run_parts(weight->openmp, weight->parts, multiply_part, &product);
}
#else
int packed_instructions(void) { return 0; }
#endif
