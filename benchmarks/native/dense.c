/* Dense products with the instructions of the packed ones, and a plain read of memory: what packed products are measured
 * against. `payoff_native.py` builds this file into a temporary folder, and checks sizes.
 *
 * As the packed products, they go along three rows of W at once, which are far apart (one with 16 rows of inputs). There
 * are so many accumulators that an addition does not wait for the one before it. Weights are prefetched `AHEAD` bytes before
 * they are used.
 */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define AHEAD 4096
#ifndef STREAMS
#define STREAMS 3
#endif
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

/* Functions of the OpenMP library that PyTorch has loaded, as in `avx512.h`. */
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

/* Each function takes the rows `first` + r · `apart` for r below `streams`, and `count` rows from each of these on. */
TARGET INLINE void read_rows(const dense_t *p, size_t first, size_t apart, size_t count, const int streams) {
    for (size_t row = first; row < first + count; row++) {
        const char *weights = (const char *)p->weights + row * p->columns * 2;
        __m512i total[STREAMS][4];
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++)
_Pragma("GCC unroll 4")
            for (int s = 0; s < 4; s++) total[r][s] = _mm512_setzero_si512();
        for (size_t c = 0; c < p->columns * 2; c += 256)
_Pragma("GCC unroll 4")
            for (int s = 0; s < 4; s++)
_Pragma("GCC unroll 4")
                for (int r = 0; r < streams; r++) {
                    const char *next = weights + (size_t)r * apart * p->columns * 2 + c + 64 * s;
                    ahead(next);
                    total[r][s] = _mm512_xor_si512(total[r][s], _mm512_loadu_si512(next));
                }
_Pragma("GCC unroll 4")
        for (int r = 0; r < streams; r++) {
            const __m512i all = _mm512_xor_si512(_mm512_xor_si512(total[r][0], total[r][1]),
                                                 _mm512_xor_si512(total[r][2], total[r][3]));
            p->outputs[row + (size_t)r * apart] = (float)_mm512_reduce_add_epi32(all);
        }
    }
}

/* Defines the product for a dtype: `width` numbers in a register, and the multiplication of two registers. */
#define ROWS(name, type, width, load, multiply)                                                                       \
    TARGET INLINE void name(const dense_t *p, size_t first, size_t apart, size_t count, const int streams,            \
                            const int tokens, const int sums) {                                                       \
        const size_t columns = p->columns;                                                                            \
        const type *inputs = p->inputs;                                                                               \
        for (size_t row = first; row < first + count; row++) {                                                        \
            const type *weights = (const type *)p->weights + row * columns;                                           \
            __m512 total[STREAMS][16][4];                                                                             \
            UNROLL for (int r = 0; r < streams; r++)                                                                  \
                UNROLL for (int t = 0; t < tokens; t++)                                                               \
                    UNROLL for (int s = 0; s < sums; s++) total[r][t][s] = _mm512_setzero_ps();                       \
            for (size_t c = 0; c < columns; c += (size_t)(width * sums))                                              \
                UNROLL for (int s = 0; s < sums; s++) {                                                               \
                    UNROLL for (int r = 0; r < streams; r++) {                                                        \
                        const type *next = weights + (size_t)r * apart * columns + c + width * s;                     \
                        ahead(next);                                                                                  \
                        UNROLL for (int t = 0; t < tokens; t++)                                                       \
                            total[r][t][s] = multiply(total[r][t][s], load(next),                                     \
                                                      load(inputs + (size_t)t * columns + c + width * s));            \
                    }                                                                                                 \
                }                                                                                                     \
            UNROLL for (int r = 0; r < streams; r++)                                                                  \
                UNROLL for (int t = 0; t < tokens; t++) {                                                             \
                    UNROLL for (int s = 1; s < sums; s++)                                                             \
                        total[r][t][0] = _mm512_add_ps(total[r][t][0], total[r][t][s]);                               \
                    p->outputs[(size_t)t * p->rows + row + (size_t)r * apart] = _mm512_reduce_add_ps(total[r][t][0]); \
                }                                                                                                     \
        }                                                                                                             \
    }
#define UNROLL _Pragma("GCC unroll 16")
#define LOAD16(from) ((__m512bh)_mm512_loadu_si512(from))
#define MULTIPLY32(sum, a, b) _mm512_fmadd_ps(a, b, sum)
ROWS(rows_bfloat16, uint16_t, 32, LOAD16, _mm512_dpbf16_ps)
ROWS(rows_float32, float, 16, _mm512_loadu_ps, MULTIPLY32)

/* Each with a constant number of input rows, for which the compiler unrolls the loops. The sums of 16 input rows fill the
 * registers with one row of W. */
#define CASE(function, tokens, streams, sums)                                                                         \
    case tokens: {                                                                                                    \
        const size_t share = (last - first) / streams;                                                                \
        function(p, first, share, share, streams, tokens, sums);                                                      \
        function(p, first + streams * share, 0, last - first - streams * share, 1, tokens, sums);                     \
        break;                                                                                                        \
    }
#define CASES(function)                                                                                               \
    switch (p->tokens) { CASE(function, 1, STREAMS, 2) CASE(function, 4, STREAMS, 1) CASE(function, 16, 1, 1) }

TARGET static void products_bfloat16(const dense_t *p, size_t first, size_t last) { CASES(rows_bfloat16) }
TARGET static void products_float32(const dense_t *p, size_t first, size_t last) { CASES(rows_float32) }

TARGET static void read_part(const dense_t *p, size_t first, size_t last) {
    const size_t share = (last - first) / STREAMS;
    read_rows(p, first, share, share, STREAMS);
    read_rows(p, first + STREAMS * share, 0, last - first - STREAMS * share, 1);
}

static void some_rows(const dense_t *p, size_t part, size_t parts) {
    size_t first = p->rows * part / parts, last = p->rows * (part + 1) / parts;
    if (p->kind == READ) read_part(p, first, last);
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
