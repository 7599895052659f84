/* Values that tuning changes, and gradients by the changes, in one pass over memory each. `changes.py` describes the
 * arguments. A value is W + r c D: D r is rounded to float32, and its product with c and the sum are rounded once, as
 * PyTorch's `addcmul` does on the same processors.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define AVX2 __attribute__((target("avx2,fma")))

/* `_Changes` of `changes.py`. A matrix has (rows, columns); `narrow` ones have bfloat16 instead of float32. */
typedef struct {
    const void *values;
    const float *changes, *row_steps, *column_steps;
    const uint8_t *keep; /* values that are kept, or that may change */
    void *results;
    float *gradient;
    const openmp_t *openmp;
    size_t rows, columns;
    int parts, narrow_values, narrow_results;
} changes_t;

AVX2 INLINE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

AVX2 INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Rounds to bfloat16, to even where two are as near. */
AVX2 INLINE uint16_t narrowed(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7FC0 : rounded);
}

AVX2 INLINE float changed(const void *values, int narrow, size_t i, float change, float row_step, float column_step) {
    const float value = narrow ? from_bits((uint32_t)((const uint16_t *)values)[i] << 16) : ((const float *)values)[i];
    return __builtin_fmaf(change * row_step, column_step, value);
}

/* The first row of a part. */
#define FIRST(all, part) packed_first_of_part((all)->rows, part, (all)->parts)

AVX2 INLINE void write_values(const changes_t *all, int part, int narrow_values, int narrow_results) {
    const size_t columns = all->columns;
    for (size_t row = FIRST(all, part); row < FIRST(all, part + 1); row++) {
        const float *changes = all->changes + row * columns, step = all->row_steps[row];
        const uint8_t *keep = all->keep + row * columns;
        uint16_t *narrow = (uint16_t *)all->results + row * columns;
        float *wide = (float *)all->results + row * columns;
        const char *values = (const char *)all->values + row * columns * (narrow_values ? 2 : 4);
        for (size_t i = 0; i < columns; i++) {
            const float value = changed(values, narrow_values, i, changes[i], step, all->column_steps[i]);
            if (narrow_results)
                narrow[i] = (uint16_t)(narrowed(value) * keep[i]);
            else
                wide[i] = from_bits(bits_of(value) * keep[i]);
        }
    }
}

AVX2 static void write_part(const void *task, int part) {
    const changes_t *all = task;
    if (all->narrow_values && all->narrow_results)
        write_values(all, part, 1, 1);
    else if (all->narrow_values)
        write_values(all, part, 1, 0);
    else if (all->narrow_results)
        write_values(all, part, 0, 1);
    else
        write_values(all, part, 0, 0);
}

/* Multiplies the gradient by the sizes of steps, and by 0 where a value may not change. */
AVX2 static void write_gradient(const void *task, int part) {
    const changes_t *all = task;
    const size_t columns = all->columns;
    for (size_t row = FIRST(all, part); row < FIRST(all, part + 1); row++) {
        const float *gradient = all->gradient + row * columns, step = all->row_steps[row];
        const uint8_t *keep = all->keep + row * columns;
        float *results = (float *)all->results + row * columns;
        for (size_t i = 0; i < columns; i++)
            results[i] = gradient[i] * step * all->column_steps[i] * (float)keep[i];
    }
}

AVX2 INLINE void multiply_values(const changes_t *all, int part, int narrow_values) {
    const size_t columns = all->columns;
    for (size_t row = FIRST(all, part); row < FIRST(all, part + 1); row++) {
        const float *changes = all->changes + row * columns, step = all->row_steps[row];
        const char *values = (const char *)all->values + row * columns * (narrow_values ? 2 : 4);
        float *gradient = all->gradient + row * columns;
        for (size_t i = 0; i < columns; i++)
            gradient[i] *= changed(values, narrow_values, i, changes[i], step, all->column_steps[i]);
    }
}

AVX2 static void multiply_part(const void *task, int part) {
    const changes_t *all = task;
    if (all->narrow_values)
        multiply_values(all, part, 1);
    else
        multiply_values(all, part, 0);
}

void packed_changed_values(const changes_t *all) { packed_run_parts(all->openmp, all->parts, write_part, all); }
void packed_change_gradient(const changes_t *all) { packed_run_parts(all->openmp, all->parts, write_gradient, all); }
void packed_multiply_changed(const changes_t *all) { packed_run_parts(all->openmp, all->parts, multiply_part, all); }
#endif
