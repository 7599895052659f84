/* Dense products with the instructions of the packed ones, and a plain read of memory: what packed products are measured
 * against. `payoff_native.py` builds this file into a temporary folder, and checks sizes.
 *
 * A row of W has 4 accumulators for each row of inputs (2 with 4 rows of inputs, 1 with 16), so that an addition does
 * not wait for the one before it. Weights are prefetched `AHEAD` bytes before they are used.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AHEAD 4096
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))
#define INLINE __attribute__((always_inline)) static inline

enum { READ, BFLOAT16, FLOAT32 };

/* `columns`: a multiple of 128 (bfloat16) or 64 (float32). `outputs`: float32, (tokens, rows); of READ a number for each
 * row, which keeps the compiler from leaving the loads out. READ reads rows of `columns` bfloat16 numbers. */
typedef struct {
    const void *weights, *inputs;
    float *outputs;
    size_t rows, columns;
    int tokens, kind;
} dense_t;

/* Functions of the OpenMP library that PyTorch has loaded, as in `avx512.c`. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*thread_number)(void);
    int (*thread_count)(void);
} openmp_t;

int dense_supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512bf16");
}

TARGET INLINE void ahead(const void *weights) { _mm_prefetch((const char *)weights + AHEAD, _MM_HINT_T0); }

TARGET static void read_rows(const dense_t *p, size_t first, size_t last) {
    for (size_t row = first; row < last; row++) {
        const char *weights = (const char *)p->weights + row * p->columns * 2;
        __m512i total[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (size_t c = 0; c < p->columns * 2; c += 256)
_Pragma("GCC unroll 4")
            for (int s = 0; s < 4; s++) {
                ahead(weights + c + 64 * s);
                total[s] = _mm512_xor_si512(total[s], _mm512_loadu_si512(weights + c + 64 * s));
            }
        total[0] = _mm512_xor_si512(_mm512_xor_si512(total[0], total[1]), _mm512_xor_si512(total[2], total[3]));
        p->outputs[row] = (float)_mm512_reduce_add_epi32(total[0]);
    }
}

TARGET INLINE void rows_bfloat16(const dense_t *p, size_t first, size_t last, const int tokens, const int sums) {
    const size_t columns = p->columns;
    const uint16_t *inputs = p->inputs;
    for (size_t row = first; row < last; row++) {
        const uint16_t *weights = (const uint16_t *)p->weights + row * columns;
        __m512 total[16][4];
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++)
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) total[t][s] = _mm512_setzero_ps();
        for (size_t c = 0; c < columns; c += (size_t)(32 * sums))
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) {
                ahead(weights + c + 32 * s);
                __m512bh part = (__m512bh)_mm512_loadu_si512(weights + c + 32 * s);
_Pragma("GCC unroll 16")
                for (int t = 0; t < tokens; t++)
                    total[t][s] = _mm512_dpbf16_ps(
                        total[t][s], part, (__m512bh)_mm512_loadu_si512(inputs + (size_t)t * columns + c + 32 * s));
            }
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++) {
_Pragma("GCC unroll 4")
            for (int s = 1; s < sums; s++) total[t][0] = _mm512_add_ps(total[t][0], total[t][s]);
            p->outputs[(size_t)t * p->rows + row] = _mm512_reduce_add_ps(total[t][0]);
        }
    }
}

TARGET INLINE void rows_float32(const dense_t *p, size_t first, size_t last, const int tokens, const int sums) {
    const size_t columns = p->columns;
    const float *inputs = p->inputs;
    for (size_t row = first; row < last; row++) {
        const float *weights = (const float *)p->weights + row * columns;
        __m512 total[16][4];
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++)
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) total[t][s] = _mm512_setzero_ps();
        for (size_t c = 0; c < columns; c += (size_t)(16 * sums))
_Pragma("GCC unroll 4")
            for (int s = 0; s < sums; s++) {
                ahead(weights + c + 16 * s);
                __m512 part = _mm512_loadu_ps(weights + c + 16 * s);
_Pragma("GCC unroll 16")
                for (int t = 0; t < tokens; t++)
                    total[t][s] =
                        _mm512_fmadd_ps(part, _mm512_loadu_ps(inputs + (size_t)t * columns + c + 16 * s), total[t][s]);
            }
_Pragma("GCC unroll 16")
        for (int t = 0; t < tokens; t++) {
_Pragma("GCC unroll 4")
            for (int s = 1; s < sums; s++) total[t][0] = _mm512_add_ps(total[t][0], total[t][s]);
            p->outputs[(size_t)t * p->rows + row] = _mm512_reduce_add_ps(total[t][0]);
        }
    }
}

/* Each with a constant number of input rows, for which the compiler unrolls the loops. */
#define CASES(function)                                                                                               \
    switch (p->tokens) {                                                                                              \
        case 1: function(p, first, last, 1, 4); break;                                                                \
        case 4: function(p, first, last, 4, 2); break;                                                                \
        case 16: function(p, first, last, 16, 1); break;                                                              \
    }

TARGET static void products_bfloat16(const dense_t *p, size_t first, size_t last) { CASES(rows_bfloat16) }
TARGET static void products_float32(const dense_t *p, size_t first, size_t last) { CASES(rows_float32) }

static void some_rows(const dense_t *p, size_t part, size_t parts) {
    size_t first = p->rows * part / parts, last = p->rows * (part + 1) / parts;
    if (p->kind == READ) read_rows(p, first, last);
    else if (p->kind == BFLOAT16) products_bfloat16(p, first, last);
    else products_float32(p, first, last);
}

typedef struct {
    const dense_t *product;
    const openmp_t *openmp;
    int parts;
} task_t;

static void run_thread(void *pointer) {
    const task_t *task = pointer;
    for (int part = task->openmp->thread_number(); part < task->parts; part += task->openmp->thread_count())
        some_rows(task->product, (size_t)part, (size_t)task->parts);
}

/* Computes a product, or reads, with `threads` threads; the caller's alone if `openmp` is NULL. */
void dense_run(const dense_t *product, int threads, const openmp_t *openmp) {
    task_t task = {product, openmp, threads};
    if (threads > 1 && openmp) openmp->parallel(run_thread, &task, (unsigned)threads, 0);
    else some_rows(product, 0, 1);
}
