/* Unpacking with AVX-512, as `packed_put16` and `packed_put32` of `packed.c` do it with AVX2; both on several threads. */
#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
/* Writes `count` weights, a multiple of 8, from `kept` values, as `packed_put16` and `packed_put32` do. */
TARGET512 void packed_put16_512(const uint16_t *values, size_t kept, const uint8_t *bits, size_t count, uint16_t *weights) {
    size_t next = 0, i = 0;
    for (; i + 32 <= count && next + 32 <= kept; i += 32) {
        uint32_t mask;
        memcpy(&mask, bits + i / 8, 4);
        prefetch(values + next, bits + i / 8);
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
    size_t next = 0, i = 0;
    for (; i + 16 <= count && next + 16 <= kept; i += 16) {
        uint16_t mask;
        memcpy(&mask, bits + i / 8, 2);
        prefetch(values + next, bits + i / 8);
        _mm512_storeu_ps((float *)weights + i, expand32(mask, _mm512_loadu_ps((const float *)values + next)));
        next += (size_t)_mm_popcnt_u32(mask);
    }
    for (; i < count; i += 16) {
        __mmask16 inside = count - i >= 16 ? 0xffff : 0xff;
        __mmask16 mask = (__mmask16)(bits[i / 8] | (inside == 0xffff ? bits[i / 8 + 1] << 8 : 0));
        __m512 sixteen = expand32(mask, next_values32((const float *)values + next, left_of(kept, next)));
        _mm512_mask_storeu_ps((float *)weights + i, inside, sixteen);
        next += (size_t)_mm_popcnt_u32(mask);
    }
}

typedef struct {
    const packed_t *weight;
    size_t first, last; /* blocks */
    uint8_t *into;
} unpack_t;

static void unpack_part(const void *task, int part) {
    const unpack_t *t = task;
    const packed_t *w = t->weight;
    const size_t blocks = t->last - t->first, size = w->bfloat16 ? 2 : 4;
    const size_t first = t->first + packed_first_of_part(blocks, part, w->parts);
    const size_t last = t->first + packed_first_of_part(blocks, part + 1, w->parts);
    if (first == last) return;
    const size_t row = first * BLOCK_ROWS, end = last * BLOCK_ROWS < w->rows ? last * BLOCK_ROWS : w->rows;
    const size_t next = (size_t)w->block_starts[first], count = (end - row) * w->columns;
    const size_t kept = (size_t)w->block_starts[last] - next;
    const uint8_t *bits = w->bits + row * w->columns / 8, *values = (const uint8_t *)w->values + next * size;
    uint8_t *into = t->into + (first - t->first) * BLOCK_ROWS * w->columns * size;
    if (w->bfloat16)
        (w->level ? packed_put16_512 : packed_put16)((const uint16_t *)values, kept, bits, count, (uint16_t *)into);
    else
        (w->level ? packed_put32_512 : packed_put32)((const uint32_t *)values, kept, bits, count, (uint32_t *)into);
}

/* Writes the rows of the blocks `first` to `last` to `into`. */
void packed_unpack(const packed_t *weight, size_t first, size_t last, void *into) {
    const unpack_t task = {weight, first, last, into};
    packed_run_parts(weight->openmp, weight->parts, unpack_part, &task);
}
#endif
