/* Bit masks and the values they keep, products by AVX2, and what runs on PyTorch's threads. Plain C, called through ctypes:
 * `__init__.py` and `weight.py` describe the arguments of each function and check sizes before they call. If this file was
 * not built, NumPy computes the same. Whatever a mask holds, no function reads or writes beyond the given sizes.
 */
#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <unistd.h>
#define VERSION 1     /* `VERSION` of `__init__.py`: of the functions and their arguments */
#define PREFETCHED 32 /* columns from one prefetch to the next: their values are at most two lines of the cache */

uint8_t packed_places8[256][8], packed_places16[256][16];
int32_t packed_places32[256][8], packed_kept32[256][8];

/* Returns the version of the functions; 0 if this processor lacks AVX2, FMA or POPCNT. Called once, before all else. */
int packed_start(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("popcnt")) return 0;
    memset(packed_places8, 0x80, sizeof packed_places8); /* at 0x80 the shuffle writes a zero */
    memset(packed_places16, 0x80, sizeof packed_places16);
    for (int byte = 0; byte < 256; byte++)
        for (int i = 0, next = 0; i < 8; i++) {
            if (!(byte >> i & 1)) continue;
            packed_kept32[byte][i] = -1;
            packed_places16[byte][2 * i] = (uint8_t)(2 * next);
            packed_places16[byte][2 * i + 1] = (uint8_t)(2 * next + 1);
            packed_places8[byte][i] = (uint8_t)next;
            packed_places32[byte][i] = next++;
        }
    return VERSION;
}

/* Instructions of this processor: the `level` of a weight. */
int packed_instructions(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vbmi2") ||
        !__builtin_cpu_supports("avx512vnni"))
        return 0;
    if (!__builtin_cpu_supports("avx512bf16")) return 1;
    return packed_amx_start() ? 3 : 2;
}

INLINE void find(const uint8_t *weights, size_t count, uint8_t *bits, const int size) {
    for (size_t i = 0; i < count; i += 8) {
        int byte = 0;
        for (int j = 0; j < 8; j++) {
            uint32_t weight = 0;
            memcpy(&weight, weights + (i + (size_t)j) * (size_t)size, (size_t)size);
            byte |= (weight != 0) << j;
        }
        bits[i / 8] = (uint8_t)byte;
    }
}

INLINE void take(const uint8_t *weights, const uint8_t *bits, size_t count, uint8_t *values, size_t kept, const int size) {
    size_t next = 0;
    for (size_t i = 0; i < count; i += 8) {
        const int has_room = next + 8 <= kept; /* a weight without a bit may be written, too: the next one overwrites it */
_Pragma("GCC unroll 8")
        for (int j = 0; j < 8; j++) {
            const int bit = bits[i / 8] >> j & 1;
            if (!has_room && (!bit || next == kept)) continue;
            memcpy(values + next * (size_t)size, weights + (i + (size_t)j) * (size_t)size, (size_t)size);
            next += (size_t)bit;
        }
    }
}

/* Writes the bit mask of `count` weights of `size` bytes, 2 or 4; `count` is a multiple of 8. A bit is set where a weight is
 * not zero. */
AVX2 void packed_find(const void *weights, size_t count, uint8_t *bits, int size) {
    if (size == 2) find(weights, count, bits, 2);
    else find(weights, count, bits, 4);
}

/* Writes the `kept` weights whose bit is set, of `count` weights. */
AVX2 void packed_take(const void *weights, const uint8_t *bits, size_t count, void *values, size_t kept, int size) {
    if (size == 2) take(weights, bits, count, values, kept, 2);
    else take(weights, bits, count, values, kept, 4);
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

/* Adds the products of the next eight weights to a sum of each token. */
AVX2 INLINE void add_eight(const packed_t *w, size_t *next, size_t kept, const uint8_t *bits, const float *inputs,
                           __m256 *sums, const int kind, const int tokens) {
    const __m256 eight = packed_next_eight(w->values, *next, kept, *bits, kind);
    *next += (size_t)__builtin_popcount(*bits);
    for (int t = 0; t < tokens; t++)
        sums[t] = _mm256_fmadd_ps(eight, _mm256_loadu_ps(inputs + (size_t)t * w->columns), sums[t]);
}

/* Computes the outputs of a part's rows. Each output has two sums, since additions to a single sum wait for each other; int8
 * values have them for each group of columns. */
AVX2 INLINE void rows_avx2(const product_t *p, int part, const int kind, const int tokens) {
    const packed_t *w = p->weight;
    const size_t last = (size_t)w->row_ends[part + 1], kept = (size_t)w->value_ends[part + 1];
    const size_t group = kind == INT8 ? w->group : w->columns;
    const float *inputs = p->inputs;
    size_t next = (size_t)w->value_ends[part], row = (size_t)w->row_ends[part];
    const uint8_t *bits = w->bits + row * w->columns / 8;
    for (; row < last; row++) {
        __m256 total[4];
        for (int t = 0; t < tokens; t++) total[t] = _mm256_setzero_ps();
        for (size_t start = 0; start < w->columns; start += group) {
            const size_t end = start + group < w->columns ? start + group : w->columns;
            __m256 sums[2][4];
            for (int t = 0; t < tokens; t++) sums[0][t] = sums[1][t] = _mm256_setzero_ps();
            for (size_t c = start; c < end; c += 16) {
                if ((c - start) % PREFETCHED == 0) prefetch((const uint8_t *)w->values + next * (size_t)kind, bits);
                add_eight(w, &next, kept, bits++, inputs + c, sums[0], kind, tokens);
                if (c + 8 < end) add_eight(w, &next, kept, bits++, inputs + c + 8, sums[1], kind, tokens);
            }
            const __m256 scale = _mm256_set1_ps(kind == INT8 ? from_bfloat16(w->scales[row * w->groups + start / group]) : 1);
            for (int t = 0; t < tokens; t++)
                total[t] = _mm256_fmadd_ps(_mm256_add_ps(sums[0][t], sums[1][t]), scale, total[t]);
        }
        for (int t = 0; t < tokens; t++) {
            float p8[8], sum = 0;
            _mm256_storeu_ps(p8, total[t]);
            for (int i = 0; i < 8; i++) sum += p8[i];
            if (kind == INT8) sum = ((p8[0] + p8[4]) + (p8[2] + p8[6])) + ((p8[1] + p8[5]) + (p8[3] + p8[7]));
            write_output(p, (size_t)t, row, sum);
        }
    }
}

AVX2 static void multiply_avx2(const product_t *p, int part) {
#define CASE(tokens)                                                                                                  \
    case tokens:                                                                                                      \
        if (p->weight->scales) rows_avx2(p, part, INT8, tokens);                                                      \
        else if (p->weight->bfloat16) rows_avx2(p, part, BFLOAT16, tokens);                                           \
        else rows_avx2(p, part, FLOAT32, tokens);                                                                     \
        break;
    switch (p->tokens) { CASE(1) CASE(2) CASE(3) CASE(4) }
}

void packed_go_along_rows(const product_t *product, int part, int streams, rows_t function) {
    const packed_t *w = product->weight;
    size_t row = (size_t)w->row_ends[part], next = (size_t)w->value_ends[part], rows[STREAMS], nexts[STREAMS];
    const size_t last = (size_t)w->row_ends[part + 1], block = (row + BLOCK_ROWS - 1) / BLOCK_ROWS, end = last / BLOCK_ROWS;
    const size_t share = end > block ? (end - block) / (size_t)streams : 0; /* blocks of each stream */
    if (share && streams > 1) {
        for (size_t r = 0; r < (size_t)streams; r++) {
            rows[r] = (block + r * share) * BLOCK_ROWS;
            nexts[r] = (size_t)w->block_starts[block + r * share];
        }
        function(product, 1, &row, &next, rows[0] - row);
        function(product, streams, rows, nexts, share * BLOCK_ROWS);
        row = rows[streams - 1], next = nexts[streams - 1];
    }
    function(product, 1, &row, &next, last - row);
}

static void multiply_part(const void *task, int part) {
    const product_t *p = task;
    if (p->weight->scales && p->weight->level) packed_multiply_int8(p, part);
    else if (!p->weight->scales && p->weight->bfloat16 && p->weight->level > 1) packed_multiply_bfloat16(p, part);
    else multiply_avx2(p, part);
}

/* Computes the product of a few rows of inputs: 1 to 4 by AVX2, to 8 by VNNI, to 16 in bfloat16 by AVX-512. `scratch`, for
 * VNNI: (tokens, columns rounded up to 64) bytes and (tokens, groups) float32. */
void packed_multiply(const packed_t *weight, const void *inputs, void *outputs, int tokens, uint8_t *scratch) {
    const size_t stride = (weight->columns + 63) / 64 * 64;
    float *scales = (float *)(scratch + (size_t)tokens * stride);
    const int by_vnni = weight->scales && weight->level;
    if (by_vnni) packed_round_inputs(weight, inputs, (size_t)tokens, stride, scratch, scales);
    const product_t product = {weight, by_vnni ? scratch : inputs, scales, outputs, stride, tokens};
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
int packed_start(void) { return 0; }
#endif
