/* Products of packed weights with any number of input rows in bfloat16, by AMX: `outputs = inputs · Wᵀ + bias`. Values
 * are bfloat16, or int8 with scales.
 *
 * 32 rows of W are unpacked into memory that stays in the core's cache, and multiplied there with all input rows, so that
 * the unpacked weight never goes to memory. A tile of W has 16 rows and 32 columns, as they are; a tile of the inputs has
 * 16 input rows and 32 columns, with pairs of columns side by side (`arrange`), as TDPBF16PS takes it.
 *
 * Rounding: sums are float32, in the order of the columns; outputs are rounded once, after the bias. Numbers below 2⁻¹²⁶
 * are flushed to zero.
 */
#include "packed.h"

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TARGET_AMX __attribute__((target(AVX512 ",avx512bf16,amx-tile,amx-bf16")))
#define STEP 32        /* columns of a tile */
#define TILE_BYTES 1024
#define PAIR_ROWS 32   /* rows of W that are unpacked together: two tiles */

/* Asks the system for the tiles, and returns 1 if this processor has AMX for bfloat16 and the process may use it. */
int packed_amx_start(void) {
    unsigned a, b, c, d;
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & bf16) || !(d & tile)) return 0;
    const long request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

typedef struct {
    const packed_t *weight;
    const uint16_t *inputs;
    uint16_t *outputs;
    size_t tokens, steps, tiles; /* columns and tokens in whole tiles */
    int parts;
    uint8_t *arranged, *unpacked;
} amx_t;

/* Bytes of an unpacked row. There is a step more than the row has, so that rows lie in different sets of the cache. */
static size_t row_bytes(size_t steps) { return (steps + 1) * 64; }

/* Bytes of the memory that `packed_amx_multiply` works in. */
size_t packed_amx_scratch(size_t columns, size_t tokens, int parts) {
    const size_t steps = (columns + STEP - 1) / STEP, tiles = (tokens + 15) / 16;
    return tiles * steps * TILE_BYTES + (size_t)parts * PAIR_ROWS * row_bytes(steps);
}

/* Transposes 16 × 16 numbers of 32 bits. */
TARGET_AMX INLINE void transpose(__m512i *r) {
    __m512i s[16];
    for (int i = 0; i < 16; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { /* r[i + j]: rows i to i + 3 of columns j, 4 + j, 8 + j and 12 + j */
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        s[j] = _mm512_shuffle_i32x4(low, high, 0x88);
        s[8 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
        low = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), high = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        s[4 + j] = _mm512_shuffle_i32x4(low, high, 0x88);
        s[12 + j] = _mm512_shuffle_i32x4(low, high, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = s[i];
}

/* Writes a part of the tiles of inputs; tokens and columns that do not exist are zero. */
TARGET_AMX static void arrange(const void *task, int part) {
    const amx_t *p = task;
    const size_t columns = p->weight->columns, all = p->tiles * p->steps;
    const size_t last = packed_first_of_part(all, part + 1, p->parts);
    for (size_t k = packed_first_of_part(all, part, p->parts); k < last; k++) {
        const size_t token = k / p->steps * 16, column = k % p->steps * STEP, left = columns - column;
        const __mmask32 inside = left >= STEP ? 0xffffffffu : ((uint32_t)1 << left) - 1;
        __m512i rows[16];
        for (size_t t = 0; t < 16; t++)
            rows[t] = _mm512_maskz_loadu_epi16(token + t < p->tokens ? inside : 0, p->inputs + (token + t) * columns + column);
        transpose(rows);
        for (int i = 0; i < 16; i++) _mm512_store_si512(p->arranged + k * TILE_BYTES + 64 * i, rows[i]);
    }
}

/* Writes 16 rows of outputs of 16 tokens, rounded: sums[row][token]. Rows and tokens that do not exist are left out. */
TARGET_AMX static void write_tile(const amx_t *p, const float *sums, size_t row, size_t token) {
    const packed_t *w = p->weight;
    const size_t rows = w->rows - row < 16 ? w->rows - row : 16;
    const size_t tokens = p->tokens - token < 16 ? p->tokens - token : 16;
    const __mmask16 inside = (__mmask16)((1u << rows) - 1);
    float bias[16] = {0};
    for (size_t r = 0; w->bias && r < rows; r++) {
        const uint32_t wide = (uint32_t)((const uint16_t *)w->bias)[row + r] << 16;
        memcpy(bias + r, &wide, 4);
    }
    __m512i pairs[8], s[8];
    for (int i = 0; i < 8; i++) { /* two rows side by side */
        const __m512 low = _mm512_add_ps(_mm512_load_ps(sums + 32 * i), _mm512_set1_ps(bias[2 * i]));
        const __m512 high = _mm512_add_ps(_mm512_load_ps(sums + 32 * i + 16), _mm512_set1_ps(bias[2 * i + 1]));
        pairs[i] = _mm512_or_si512(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low)),
                                   _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high)), 16));
    }
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm512_unpacklo_epi32(pairs[i], pairs[i + 1]);
        s[i + 1] = _mm512_unpackhi_epi32(pairs[i], pairs[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) { /* pairs[i + j]: eight rows of tokens j, 4 + j, 8 + j and 12 + j */
        pairs[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]);
        pairs[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        pairs[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]);
        pairs[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
    const __m512i first_two = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), last_two = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (size_t j = 0; j < 4; j++) {
        const __m512i early = _mm512_permutex2var_epi64(pairs[j], first_two, pairs[4 + j]);
        const __m512i late = _mm512_permutex2var_epi64(pairs[j], last_two, pairs[4 + j]);
        const __m256i outputs[4] = {_mm512_castsi512_si256(early), _mm512_extracti64x4_epi64(early, 1),
                                    _mm512_castsi512_si256(late), _mm512_extracti64x4_epi64(late, 1)};
        for (size_t lane = 0; lane < 4; lane++)
            if (4 * lane + j < tokens)
                _mm256_mask_storeu_epi16(p->outputs + (token + 4 * lane + j) * w->rows + row, inside, outputs[lane]);
    }
}

TARGET_AMX static void multiply_part(const void *task, int part) {
    const amx_t *p = task;
    const packed_t *w = p->weight;
    const size_t stride = row_bytes(p->steps), half = 16 * stride;
    const size_t blocks_of_all = (w->rows + BLOCK_ROWS - 1) / BLOCK_ROWS, row_end = p->steps * STEP - w->columns;
    const size_t last = packed_first_of_part(blocks_of_all, part + 1, p->parts);
    uint8_t *unpacked = p->unpacked + (size_t)part * PAIR_ROWS * stride;
    float sums[4][256] __attribute__((aligned(64)));
    struct {
        uint8_t palette, start, zero[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } configuration __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) configuration.bytes[tile] = 64, configuration.rows[tile] = 16;
    _tile_loadconfig(&configuration);
    for (size_t block = packed_first_of_part(blocks_of_all, part, p->parts); block < last; block += 2) {
        const size_t row = block * BLOCK_ROWS, blocks = last - block < 2 ? 1 : 2;
        const size_t end = row + blocks * BLOCK_ROWS < w->rows ? row + blocks * BLOCK_ROWS : w->rows;
        size_t next = (size_t)w->block_starts[block];
        for (size_t r = row; r < end; r++) {
            uint16_t *into = (uint16_t *)(unpacked + (r - row) * stride);
            next = packed_unpack_row(w, r, next, into);
            memset(into + w->columns, 0, row_end * 2); /* of the last tile */
        }
        for (size_t tile = 0; tile < p->tiles; tile += 2) {
            const int pair = tile + 1 < p->tiles;
            const uint8_t *a = unpacked, *b = p->arranged + tile * p->steps * TILE_BYTES;
            const uint8_t *b2 = pair ? b + p->steps * TILE_BYTES : b;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (size_t step = 0; step < p->steps; step++, a += 64, b += TILE_BYTES, b2 += TILE_BYTES) {
                _tile_loadd(4, a, stride);
                _tile_loadd(6, b, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, a + half, stride);
                _tile_dpbf16ps(1, 5, 6);
                if (pair) {
                    _tile_loadd(7, b2, 64);
                    _tile_dpbf16ps(2, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, sums[0], 64);
            _tile_stored(1, sums[1], 64);
            _tile_stored(2, sums[2], 64);
            _tile_stored(3, sums[3], 64);
            for (int i = 0; i < (pair ? 4 : 2); i++)
                if (row + 16 * (size_t)(i % 2) < end)
                    write_tile(p, sums[i], row + 16 * (size_t)(i % 2), (tile + (size_t)i / 2) * 16);
        }
    }
    _tile_release();
}

/* Computes the product of `tokens` rows of inputs in `parts` parts; inputs are not rounded. `scratch` has
 * `packed_amx_scratch` bytes, and is aligned to 64 bytes. */
void packed_amx_multiply(const packed_t *weight, const uint16_t *inputs, uint16_t *outputs, size_t tokens, int parts,
                         uint8_t *scratch) {
    const size_t steps = (weight->columns + STEP - 1) / STEP, tiles = (tokens + 15) / 16;
    const amx_t task = {weight, inputs, outputs, tokens, steps, tiles, parts, scratch, scratch + tiles * steps * TILE_BYTES};
    packed_run_parts(weight->openmp, parts, arrange, &task);
    packed_run_parts(weight->openmp, parts, multiply_part, &task);
}
#else
int packed_amx_start(void) { return 0; }
#endif
