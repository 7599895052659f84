/* Products of a few rows of inputs with packed bfloat16 values, by AVX-512 with VBMI2 and BF16.
 *
 * A step takes the next 32 weights of a row. It loads 32 values, the most that may be kept, moves them to the positions of
 * the mask's set bits (VPEXPANDW), multiplies them by 32 inputs (VDPBF16PS), and advances by as many values as bits are set.
 * Loads near the end of the values are masked, and `kept` bounds them, whatever the bit mask holds.
 *
 * Rounding: VDPBF16PS sums pairs of exact products in float32, and flushes numbers below 2⁻¹²⁶ to zero. Outputs are rounded
 * once, after the bias.
 */
#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define PASS_TOKENS 8 /* most input rows that are multiplied at once: their sums stay in registers */

/* Computes `tokens` outputs, from token `from` on, of the row of W at which each stream is; `nexts[r]` moves on to the row
 * behind it. Inputs are read once for all streams. Each output has `sums` accumulators, so that an addition does not wait
 * for the one before it. An output has the same bits whatever `streams` is. `plain`: each stream has as many values left as
 * there are columns, so that no load of whole steps is masked. */
TARGET_BF16 INLINE void multiply_row(const product_t *p, const size_t *rows, size_t *nexts, size_t from, const int streams,
                                     const int tokens, const int sums, const int plain) {
    const size_t columns = p->weight->columns, kept = p->weight->kept, step = (size_t)(32 * sums);
    const uint16_t *values = p->weight->values, *inputs = (const uint16_t *)p->inputs + from * columns;
    const uint8_t *bits[STREAMS];
    size_t next[STREAMS], c = 0;
    __m512 total[STREAMS][PASS_TOKENS][2];
_Pragma("GCC unroll 4")
    for (int r = 0; r < streams; r++) {
        bits[r] = p->weight->bits + rows[r] * columns / 8;
        next[r] = nexts[r];
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++) total[r][t][0] = total[r][t][1] = _mm512_setzero_ps();
    }
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
            const uint32_t mask = (uint32_t)mask_of(bits[r] + c / 8, left);
            const __m512i weights = expand16(mask, next_values16(values + next[r], left_of(kept, next[r])));
            next[r] += (size_t)_mm_popcnt_u32(mask);
_Pragma("GCC unroll 8")
            for (int t = 0; t < tokens; t++)
                total[r][t][0] =
                    _mm512_dpbf16_ps(total[r][t][0], (__m512bh)weights,
                                     (__m512bh)_mm512_maskz_loadu_epi16(inside, inputs + (size_t)t * columns + c));
        }
    }
_Pragma("GCC unroll 4")
    for (int r = 0; r < streams; r++) {
        nexts[r] = next[r];
_Pragma("GCC unroll 8")
        for (int t = 0; t < tokens; t++)
            write_output(p, from + (size_t)t, rows[r], _mm512_reduce_add_ps(_mm512_add_ps(total[r][t][0], total[r][t][1])));
    }
}

typedef void (*pass_t)(const product_t *p, size_t *rows, size_t *nexts, size_t count, size_t from);

TARGET_BF16 INLINE void pass(const product_t *p, size_t *rows, size_t *nexts, size_t count, size_t from, const int streams,
                             const int tokens) {
    const int sums = tokens > 2 ? 1 : 2;
    for (size_t done = 0; done < count; done++) {
        int plain = 1;
        for (int r = 0; r < streams; r++) plain &= left_of(p->weight->kept, nexts[r]) >= p->weight->columns;
        if (plain) multiply_row(p, rows, nexts, from, streams, tokens, sums, 1);
        else multiply_row(p, rows, nexts, from, streams, tokens, sums, 0);
        for (int r = 0; r < streams; r++) rows[r]++;
    }
}

#define PASS(tokens)                                                                                                  \
    TARGET_BF16 static void one_##tokens(const product_t *p, size_t *rows, size_t *nexts, size_t count, size_t from) { \
        pass(p, rows, nexts, count, from, 1, tokens);                                                                 \
    }                                                                                                                 \
    TARGET_BF16 static void more_##tokens(const product_t *p, size_t *rows, size_t *nexts, size_t count, size_t from) { \
        pass(p, rows, nexts, count, from, STREAMS, tokens);                                                           \
    }
PASS(1) PASS(2) PASS(3) PASS(4) PASS(5) PASS(6) PASS(7) PASS(8)

/* By several streams or not, and by the number of tokens. */
static const pass_t passes[2][PASS_TOKENS] = {
    {one_1, one_2, one_3, one_4, one_5, one_6, one_7, one_8},
    {more_1, more_2, more_3, more_4, more_5, more_6, more_7, more_8},
};

/* Where the tokens need two passes, each row has both before the next row is read: the second finds it in the cache. */
static void multiply_rows(const product_t *p, int streams, size_t *rows, size_t *nexts, size_t count) {
    const pass_t *of_streams = passes[streams > 1], last_pass = of_streams[(p->tokens - 1) % PASS_TOKENS];
    if (p->tokens <= PASS_TOKENS) {
        last_pass(p, rows, nexts, count, 0);
        return;
    }
    for (size_t done = 0; done < count; done++) {
        size_t same_rows[STREAMS], same_nexts[STREAMS];
        memcpy(same_rows, rows, (size_t)streams * sizeof(size_t));
        memcpy(same_nexts, nexts, (size_t)streams * sizeof(size_t));
        of_streams[PASS_TOKENS - 1](p, same_rows, same_nexts, 1, 0);
        last_pass(p, rows, nexts, 1, PASS_TOKENS);
    }
}

void packed_multiply_bfloat16(const product_t *product, int part) {
    packed_go_along_rows(product, part, STREAMS, multiply_rows);
}
#endif
