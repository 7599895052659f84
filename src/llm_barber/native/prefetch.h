/* Asking for packed weights before they are needed. A processor foresees reads in steps of equal length, but each step
 * reads as many values as its mask has set bits: without this a core waits for memory half of the time. */
#ifndef LLM_BARBER_PREFETCH_H
#define LLM_BARBER_PREFETCH_H
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define INLINE __attribute__((always_inline)) static inline

/* Asks for what lies 2 KiB behind the next values, and half a KiB behind the next bits. It may lie beyond the arrays: asking
 * does not read, and does not fail. */
INLINE void prefetch(const void *values, const void *bits) {
    __builtin_prefetch((const void *)((uintptr_t)values + 2048));
    __builtin_prefetch((const void *)((uintptr_t)bits + 512));
}
#endif
#endif
