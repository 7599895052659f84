/* Bit masks and the values they keep, eight weights at a time, with AVX2. Plain C, called through ctypes. `__init__.py`,
 * and `unrounded.py` for products, describe the arguments of each function and check sizes before they call. If this file
 * was not built, NumPy computes the same.
 *
 * Eight weights are one byte of the bit mask. The byte selects a row of a table: for expanding, the index of each
 * weight's value among the next values; for compressing, the indices of the kept weights, in order. Values are read and
 * written eight at a time only while at least eight are left, and then singly. Whatever the mask holds, no function
 * reads or writes beyond the given sizes.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,fma,popcnt")))
#define PREFETCHED 32 /* columns from one prefetch to the next: their values are at most two lines of the cache */

static uint8_t compress16[256][16], spread16[256][16];
static int32_t compress32[256][8], spread32[256][8], kept32[256][8];

/* Fills the tables and returns 1; returns 0 if this processor lacks AVX2, FMA or POPCNT. Called once, before
 * all else. */
int packed_start(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("popcnt")) return 0;
    for (int byte = 0; byte < 256; byte++) {
        int next = 0;
        memset(compress16[byte], 0x80, 16);
        memset(spread16[byte], 0x80, 16); /* at 0x80 the shuffle writes a zero */
        for (int i = 0; i < 8; i++) {
            kept32[byte][i] = byte >> i & 1 ? -1 : 0;
            if (!(byte >> i & 1)) continue;
            for (int half = 0; half < 2; half++) {
                compress16[byte][2 * next + half] = (uint8_t)(2 * i + half);
                spread16[byte][2 * i + half] = (uint8_t)(2 * next + half);
            }
            compress32[byte][next] = i;
            spread32[byte][i] = next++;
        }
    }
    return 1;
}

#define TABLE16(table, byte) _mm_loadu_si128((const __m128i *)table[byte])
#define TABLE32(table, byte) _mm256_loadu_si256((const __m256i *)table[byte])

/* Writes the bit mask of `count` weights, a multiple of 8: set where a weight is not zero. */
AVX2 void packed_find16(const uint16_t *weights, size_t count, uint8_t *bits) {
    const __m128i zero = _mm_setzero_si128();
    for (size_t i = 0; i < count; i += 8) {
        __m128i is_zero = _mm_cmpeq_epi16(_mm_loadu_si128((const __m128i *)(weights + i)), zero);
        bits[i / 8] = (uint8_t)~_mm_movemask_epi8(_mm_packs_epi16(is_zero, is_zero));
    }
}

AVX2 void packed_find32(const uint32_t *weights, size_t count, uint8_t *bits) {
    const __m256i zero = _mm256_setzero_si256();
    for (size_t i = 0; i < count; i += 8) {
        __m256i is_zero = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)(weights + i)), zero);
        bits[i / 8] = (uint8_t)~_mm256_movemask_ps(_mm256_castsi256_ps(is_zero));
    }
}

/* Writes the `kept` weights whose bit is set, of `count` weights, a multiple of 8. */
AVX2 void packed_take16(const uint16_t *weights, const uint8_t *bits, size_t count, uint16_t *values, size_t kept) {
    size_t next = 0;
    for (size_t i = 0; i < count; i += 8) {
        uint8_t byte = bits[i / 8];
        if (next + 8 <= kept) {
            __m128i eight = _mm_loadu_si128((const __m128i *)(weights + i));
            _mm_storeu_si128((__m128i *)(values + next), _mm_shuffle_epi8(eight, TABLE16(compress16, byte)));
            next += (size_t)__builtin_popcount(byte);
        } else {
            for (int j = 0; j < 8; j++)
                if (byte >> j & 1 && next < kept) values[next++] = weights[i + j];
        }
    }
}

AVX2 void packed_take32(const uint32_t *weights, const uint8_t *bits, size_t count, uint32_t *values, size_t kept) {
    size_t next = 0;
    for (size_t i = 0; i < count; i += 8) {
        uint8_t byte = bits[i / 8];
        if (next + 8 <= kept) {
            __m256i eight = _mm256_loadu_si256((const __m256i *)(weights + i));
            eight = _mm256_permutevar8x32_epi32(eight, TABLE32(compress32, byte));
            _mm256_storeu_si256((__m256i *)(values + next), eight);
            next += (size_t)__builtin_popcount(byte);
        } else {
            for (int j = 0; j < 8; j++)
                if (byte >> j & 1 && next < kept) values[next++] = weights[i + j];
        }
    }
}

/* Expands the next eight weights from the `left` remaining values. */
AVX2 static inline __m128i expand_eight16(const uint16_t *values, ptrdiff_t left, uint8_t byte) {
    uint16_t few[8] = {0};
    if (left < 8) {
        if (left > 0) memcpy(few, values, (size_t)left * sizeof *few);
        values = few;
    }
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)values), TABLE16(spread16, byte));
}

AVX2 static inline __m256i expand_eight32(const uint32_t *values, ptrdiff_t left, uint8_t byte) {
    uint32_t few[8] = {0};
    if (left < 8) {
        if (left > 0) memcpy(few, values, (size_t)left * sizeof *few);
        values = few;
    }
    __m256i eight = _mm256_loadu_si256((const __m256i *)values);
    return _mm256_and_si256(_mm256_permutevar8x32_epi32(eight, TABLE32(spread32, byte)), TABLE32(kept32, byte));
}

/* Undoes `packed_take`: writes `count` weights, a multiple of 8, from `kept` values, and zeros elsewhere. */
AVX2 void packed_put16(const uint16_t *values, size_t kept, const uint8_t *bits, size_t count, uint16_t *weights) {
    size_t next = 0;
    for (size_t i = 0; i < count; i += 8) {
        uint8_t byte = bits[i / 8];
        _mm_storeu_si128((__m128i *)(weights + i), expand_eight16(values + next, (ptrdiff_t)(kept - next), byte));
        next += (size_t)__builtin_popcount(byte);
    }
}

AVX2 void packed_put32(const uint32_t *values, size_t kept, const uint8_t *bits, size_t count, uint32_t *weights) {
    size_t next = 0;
    for (size_t i = 0; i < count; i += 8) {
        uint8_t byte = bits[i / 8];
        _mm256_storeu_si256((__m256i *)(weights + i), expand_eight32(values + next, (ptrdiff_t)(kept - next), byte));
        next += (size_t)__builtin_popcount(byte);
    }
}

INLINE void join(const uint8_t *mask, const uint8_t *table, size_t groups, uint8_t *places, const int together,
                 const int bits, const int width) {
    for (size_t g = 0; g < groups; g++, mask += together, places += width) {
        uint64_t number = 0;
        for (int k = 0; k < together; k++) number |= (uint64_t)table[mask[k]] << (bits * k);
        memcpy(places, &number, (size_t)width);
    }
}

INLINE void split(const uint8_t *places, const uint8_t *table, size_t groups, uint8_t *mask, const int together,
                  const int bits, const int width) {
    for (size_t g = 0; g < groups; g++, mask += together, places += width) {
        uint64_t number = 0;
        memcpy(&number, places, (size_t)width);
        for (int k = 0; k < together; k++) mask[k] = table[number >> (bits * k) & ((1u << bits) - 1)];
    }
}

/* Writes the codes of the mask's bytes, from the table. 2:4 (`width` 3): four codes of 6 bits in 3 bytes. 4:8 (`width`
 * 7): eight codes of 7 bits in 7 bytes. */
void packed_join(const uint8_t *mask, const uint8_t *table, size_t groups, uint8_t *places, int width) {
    if (width == 3) join(mask, table, groups, places, 4, 6, 3);
    else join(mask, table, groups, places, 8, 7, 7);
}

/* Undoes `packed_join`, with the reverse table. */
void packed_split(const uint8_t *places, const uint8_t *table, size_t groups, uint8_t *mask, int width) {
    if (width == 3) split(places, table, groups, mask, 4, 6, 3);
    else split(places, table, groups, mask, 8, 7, 7);
}

AVX2 static inline __m256 eight_floats(const void *values, size_t next, size_t kept, uint8_t byte, int bfloat16) {
    if (!bfloat16) return _mm256_castsi256_ps(expand_eight32((const uint32_t *)values + next, (ptrdiff_t)(kept - next), byte));
    __m128i eight = expand_eight16((const uint16_t *)values + next, (ptrdiff_t)(kept - next), byte);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}

/* Computes outputs[t · stride + r] = Σ_c W[r, c] · inputs[t · columns + c] for `rows` rows of W, whose values begin at
 * `values`; `columns` is a multiple of 8. Each t has two sums, since additions to a single sum wait for each other. */
AVX2 INLINE void product(
    const void *values, size_t kept, const uint8_t *bits, size_t rows, size_t columns, const float *inputs,
    float *outputs, size_t stride, int bfloat16, const int tokens) {
    size_t next = 0;
    for (size_t r = 0; r < rows; r++) {
        __m256 sums[2][4];
        for (int t = 0; t < tokens; t++) sums[0][t] = sums[1][t] = _mm256_setzero_ps();
        for (size_t c = 0; c < columns; c += 16) {
            if (c % PREFETCHED == 0) prefetch((const uint8_t *)values + next * (bfloat16 ? 2 : 4), bits);
            uint8_t byte = *bits++;
            __m256 eight = eight_floats(values, next, kept, byte, bfloat16);
            next += (size_t)__builtin_popcount(byte);
            for (int t = 0; t < tokens; t++)
                sums[0][t] = _mm256_fmadd_ps(eight, _mm256_loadu_ps(inputs + (size_t)t * columns + c), sums[0][t]);
            if (c + 8 == columns) break;
            byte = *bits++;
            eight = eight_floats(values, next, kept, byte, bfloat16);
            next += (size_t)__builtin_popcount(byte);
            for (int t = 0; t < tokens; t++)
                sums[1][t] = _mm256_fmadd_ps(eight, _mm256_loadu_ps(inputs + (size_t)t * columns + c + 8), sums[1][t]);
        }
        for (int t = 0; t < tokens; t++) {
            float parts[8], sum = 0;
            _mm256_storeu_ps(parts, _mm256_add_ps(sums[0][t], sums[1][t]));
            for (int i = 0; i < 8; i++) sum += parts[i];
            outputs[(size_t)t * stride + r] = sum;
        }
    }
}

typedef struct {
    const packed_t *weight;
    const float *inputs;
    float *outputs;
    int tokens;
} product_t;

AVX2 static void product_part(const void *task, int part) {
    const product_t *p = task;
    const packed_t *w = p->weight;
    const size_t row = (size_t)w->row_ends[part], rows = (size_t)w->row_ends[part + 1] - row, columns = w->columns;
    const size_t next = (size_t)w->value_ends[part], kept = (size_t)w->value_ends[part + 1] - next;
    const void *values = (const uint8_t *)w->values + next * (w->bfloat16 ? 2 : 4);
    const uint8_t *bits = w->bits + row * columns / 8;
#define CASE(number)                                                                                          \
    case number:                                                                                              \
        if (w->bfloat16) product(values, kept, bits, rows, columns, p->inputs, p->outputs + row, w->rows, 1, number); \
        else product(values, kept, bits, rows, columns, p->inputs, p->outputs + row, w->rows, 0, number);     \
        break;
    switch (p->tokens) { CASE(1) CASE(2) CASE(3) CASE(4) }
}

/* Computes outputs = inputs · Wᵀ, without the bias, for 1 to 4 tokens: inputs and outputs are float32. */
void packed_multiply_avx2(const packed_t *weight, const float *inputs, float *outputs, int tokens) {
    const product_t task = {weight, inputs, outputs, tokens};
    packed_run_parts(weight->openmp, weight->parts, product_part, &task);
}

#else
int packed_start(void) { return 0; }
#endif
