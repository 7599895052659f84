/* The score of the `count`-th lowest member of each group, without sorting. `borders.py` describes the arguments.
 *
 * A sorted sample of a group brackets the border: one pass counts the members below the bracket, and copies those within.
 * These are counted in 256 bins of equal width of their bits, then those of the border's bin, until few are left. Where the
 * bracket misses the border, all members are counted so. No order of members takes more than four such passes.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "packed.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARE 16      /* floats that may be written behind the members of `scratch`; `SPARE` of `borders.py` */
#define FEW 32        /* members that are sorted */
#define LONG 4096     /* members of a group that are worth a large sample */
#define SMALL 64      /* members of a sample */
#define LARGE 256
#define DEVIATIONS 3. /* of the border's place in the sample, to each side of which the bracket reaches */

/* `_Borders` of `borders.py`. */
typedef struct {
    const float *scores; /* (groups, members), no NaN */
    const int64_t *counts;
    float *border, *scratch; /* (groups,), (parts, members + SPARE) */
    uint8_t *surplus;        /* (groups,): 1 if another member has the border's score, beyond `count` */
    const openmp_t *openmp;
    size_t groups, members;
    int parts, level; /* level: 0: plain C; 1: AVX-512 */
} borders_t;

/* The `rank`-th lowest, from 1; `more`: another member has its score, beyond `rank`. */
typedef struct {
    float score;
    uint8_t more;
} selected_t;

/* Shell's sort, upwards. */
static void sort(float *scores, size_t count) {
    static const size_t gaps[] = {57, 23, 10, 4, 1};
    for (int g = 0; g < 5; g++)
        for (size_t i = gaps[g]; i < count; i++) {
            const float score = scores[i];
            size_t place = i;
            for (; place >= gaps[g] && scores[place - gaps[g]] > score; place -= gaps[g])
                scores[place] = scores[place - gaps[g]];
            scores[place] = score;
        }
}

/* Bits in the order of scores; those of -0 are those of +0. */
static uint32_t ordered_bits(float score) {
    uint32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof bits);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

/* Selects among `count` members whose bits are from `low` to `high`, in bins of equal width; changes their order. */
static selected_t select_by_bins(float *scores, size_t count, size_t rank, uint32_t low, uint32_t high) {
    while (count > FEW && low < high) {
        const int width = 32 - __builtin_clz(high - low), shift = width > 8 ? width - 8 : 0;
        size_t sizes[256] = {0}, kept = 0;
        uint32_t bin = 0;
        for (size_t i = 0; i < count; i++) sizes[(ordered_bits(scores[i]) - low) >> shift]++;
        for (; rank > sizes[bin]; bin++) rank -= sizes[bin];
        for (size_t i = 0; i < count; i++) {
            const float score = scores[i];
            scores[kept] = score;
            kept += (ordered_bits(score) - low) >> shift == bin;
        }
        count = kept, low += bin << shift, high = low + (uint32_t)((1u << shift) - 1);
    }
    if (count > FEW) return (selected_t){scores[0], count > rank}; /* all are equal */
    sort(scores, count);
    return (selected_t){scores[rank - 1], rank < count && scores[rank] == scores[rank - 1]};
}

/* Copies the members from `low` to `high`, and counts them and those `below`. */
static size_t copy_within(const float *scores, size_t members, float low, float high, float *copies, size_t *below) {
    size_t within = 0;
    for (size_t i = 0; i < members; i++) {
        const float score = scores[i];
        *below += score < low;
        copies[within] = score;
        within += (score >= low) & (score <= high);
    }
    return within;
}

TARGET512 static size_t copy_within_512(const float *scores, size_t members, float low, float high, float *copies,
                                        size_t *below) {
    const __m512 least = _mm512_set1_ps(low), most = _mm512_set1_ps(high);
    size_t within = 0, i = 0;
    for (; i + 16 <= members; i += 16) {
        const __m512 some = _mm512_loadu_ps(scores + i);
        const __mmask16 lower = _mm512_cmp_ps_mask(some, least, _CMP_LT_OQ);
        const __mmask16 inside = _mm512_cmp_ps_mask(some, most, _CMP_LE_OQ) & (__mmask16)~lower;
        *below += (size_t)_mm_popcnt_u32(lower);
        /* The register form: the form that writes to memory is microcoded on some processors. */
        _mm512_storeu_ps(copies + within, _mm512_maskz_compress_ps(inside, some));
        within += (size_t)_mm_popcnt_u32(inside);
    }
    return within + copy_within(scores + i, members - i, low, high, copies + within, below);
}

/* Selects the `count`-th lowest of a group, `count` from 1 to `members`. */
static selected_t select_of_group(const float *scores, size_t members, size_t count, float *scratch, int level) {
    float sample[LARGE], low = -INFINITY, high = INFINITY;
    const size_t size = members < LONG ? SMALL : LARGE;
    if (members > 2 * size) {
        for (size_t i = 0; i < size; i++) sample[i] = scores[i * (members / size)];
        sort(sample, size);
        const double share = (double)count / (double)members;
        const double reach = DEVIATIONS * sqrt((double)size * share * (1 - share)) + 1;
        const double first = (double)size * share - reach, last = (double)size * share + reach;
        if (first >= 0) low = sample[(size_t)first];
        if (last < (double)size) high = sample[(size_t)last];
    }
    size_t below = 0;
    const size_t within = (level ? copy_within_512 : copy_within)(scores, members, low, high, scratch, &below);
    if (below < count && count <= below + within)
        return select_by_bins(scratch, within, count - below, ordered_bits(low), ordered_bits(high));
    memcpy(scratch, scores, members * sizeof(float));
    return select_by_bins(scratch, members, count, ordered_bits(-INFINITY), ordered_bits(INFINITY));
}

static void find_part(const void *task, int part) {
    const borders_t *all = task;
    const size_t first = packed_first_of_part(all->groups, part, all->parts);
    const size_t last = packed_first_of_part(all->groups, part + 1, all->parts);
    float *scratch = all->scratch + (all->members + SPARE) * (size_t)part;
    for (size_t group = first; group < last; group++) {
        const float *scores = all->scores + group * all->members;
        selected_t selected = {-INFINITY, 0};
        if (all->counts[group]) {
            selected = select_of_group(scores, all->members, (size_t)all->counts[group], scratch, all->level);
        } else {
            for (size_t i = 0; i < all->members; i++) selected.more |= scores[i] == -INFINITY;
        }
        all->border[group] = selected.score;
        all->surplus[group] = selected.more;
    }
}

void packed_find_borders(const borders_t *all) { packed_run_parts(all->openmp, all->parts, find_part, all); }
#endif
