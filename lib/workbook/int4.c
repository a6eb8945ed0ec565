/* INT4 weight-only matrix products for a CPU, after MARLIN (Frantar et al., arXiv 2408.11743).
 *
 *     y[r][n] = sum over groups g of scale[g][n] * sum over k in g of (q[k][n] - 8) * x[r][k]
 *
 * The paper's rule: each weight is read once, de-quantised once, and used for all rows of the batch while it is near.
 *
 * Format. A panel is 32 columns. A 32-bit word holds eight consecutive inputs of one column, in MARLIN's order: nibble
 * p is input {0,2,4,6,1,3,5,7}[p]. Words lie as [panel][input / 8][32], fp16 scales as [panel][group][32], so that a
 * thread reads its weights from front to back.
 * 2:4 sparse format: of four consecutive inputs the two kept ones, in natural order, with two 2-bit positions:
 * [panel][input / 32][3][32], two words of eight nibbles and one of sixteen positions.
 *
 * One source, several machines: vectors of 16, 8 or 4 floats in the compiler's own notation, by the flags that it gets;
 * with AVX512-BF16 pairs of bf16, with AMX tiles of them. float32 activations; the bf16 paths round them to bf16. With
 * AVX2 a single row is rounded to whole multiples of 2^-14 of the power of two above its chunk's largest activation, so
 * that bytes can be multiplied: at one row the float path is slower than memory.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define PANEL 32
#define INLINE static inline __attribute__((always_inline))
#define OUTLINE __attribute__((noinline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))

#if defined(__AVX512F__)
#define LANES 16
#define FUSED 3 /* up to so many rows, weights go from registers into products, never through a tile */
#define ROWS 12 /* rows of a register block: 12 x 2 accumulators of 32 registers */
#elif defined(__AVX2__)
#define LANES 8
#define FUSED 3
#define ROWS 6 /* 6 x 2 accumulators of 16 registers */
#define BYTES 1 /* a single row is multiplied in bytes */
#else
#define LANES 4
#define FUSED 1
#define ROWS 6
#endif
#define VECTORS (PANEL / LANES)

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef uint32_t vword __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));
typedef uint16_t vhalf __attribute__((vector_size(2 * LANES)));

INLINE vfloat load(const float *p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vfloat v) { memcpy(p, &v, sizeof v); }
INLINE vword load_words(const uint32_t *p) { vword v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_words(uint32_t *p, vword v) { memcpy(p, &v, sizeof v); }
INLINE vfloat to_float(vword v) { return __builtin_convertvector((vint)v, vfloat); }

/* fp16 -> fp32 of positive numbers: move the exponent field, then correct its bias */
INLINE vfloat load_scales(const uint16_t *p) {
    vhalf h;
    memcpy(&h, p, sizeof h);
    return (vfloat)(__builtin_convertvector(h, vword) << 13) * 0x1p112f;
}

/* Ask for what comes a few hundred instructions later: the processor's own prefetching stops at every page. */
#define AHEAD 2048
INLINE void prefetch(const uint32_t *words, int bytes) {
#pragma GCC unroll 8
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)words + AHEAD + i, 0, 0);
}

/* A nibble is not shifted down to become a number: masked where it stands, it is q times a power of two, which x has
 * been divided by. That is one AND and one conversion for 8 or 16 weights. */
#define NIBBLE(word, b) to_float((word) & (15u << 8 * (b)))
static const int EVEN[4] = {0, 4, 1, 5}, ODD[4] = {2, 6, 3, 7}; /* input of nibble 2b and of nibble 2b + 1 */
static const int BYTE[8] = {0, 2, 0, 2, 1, 3, 1, 3};            /* b of each of the eight inputs */

typedef struct {
    const uint32_t *words;  /* of this panel */
    const uint16_t *scales; /* of this panel */
    const float *x;         /* (chunks, m, chunk), divided by the nibbles' powers of two */
    const float *offset;    /* (chunks, m): -8 times the sum of the chunk's x, the zero point of the whole chunk */
    const uint16_t *pairs;  /* (chunks, padded, chunk) in bf16, for the bf16 paths; padded: m rounded up to 16 */
    const int32_t *fixed;   /* (chunks, m, 2 + chunk / 2) for the byte path: see split */
    int m, padded, group, chunk, chunks;
} problem;

/* -- dense, float ------------------------------------------------------------------------------------------------- */

INLINE void fused(const problem *p, int row, int rows, int from, int to, float *y) {
    const int words = p->chunk / 8;
    const uint32_t *w = p->words + (size_t)from * words * PANEL;
    for (int c = from; c < to; c++) {
        vfloat sum[FUSED][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] = (vfloat){0} + p->offset[(size_t)c * p->m + row + r];
        for (int j = 0; j < words; j++, w += PANEL) {
            const float *x = p->x + ((size_t)c * p->m + row) * p->chunk + j * 8;
            vword low[VECTORS], high[VECTORS];
            prefetch(w, 4 * PANEL);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) low[v] = load_words(w + v * LANES), high[v] = low[v] >> 4;
#pragma GCC unroll 8
            for (int b = 0; b < 4; b++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; v++) {
                    vfloat even = NIBBLE(low[v], b), odd = NIBBLE(high[v], b);
#pragma GCC unroll 8
                    for (int r = 0; r < rows; r++) {
                        sum[r][v] += even * x[r * p->chunk + EVEN[b]];
                        sum[r][v] += odd * x[r * p->chunk + ODD[b]];
                    }
                }
        }
        const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
        for (int v = 0; v < VECTORS; v++) {
            vfloat scale = load_scales(s + v * LANES);
            for (int r = 0; r < rows; r++) {
                float *out = y + (row + r) * PANEL + v * LANES;
                store(out, load(out) + scale * sum[r][v]);
            }
        }
    }
}

#ifdef BYTES
/* Activations of one chunk as whole numbers 256 upper + lower, |.| <= 2^14: first their unit (a float) and -8 times
 * their sum, then for each eight inputs four words of bytes: upper and lower of those in the low nibbles of a weight's
 * bytes, upper and lower of those in the high nibbles. */
static void split(const float *x, int chunk, int32_t *to) {
    static const int INPUTS[2][4] = {{0, 4, 1, 5}, {2, 6, 3, 7}};
    int32_t most = 14 << 23, sum = 0; /* sizes order like their bits; below 2^-112 everything is zero */
    for (int i = 0; i < chunk; i++) {
        int32_t size;
        memcpy(&size, x + i, 4);
        size &= 0x7fffffff;
        most = most > size ? most : size;
    }
    const int32_t exponent = most >> 23, powers[2] = {(exponent - 13) << 23, (267 - exponent) << 23};
    float unit, inverse;
    memcpy(&unit, powers, 4), memcpy(&inverse, powers + 1, 4);
    int8_t *bytes = (int8_t *)(to + 2);
    for (int j = 0; j < chunk; j += 8, bytes += 16)
        for (int odd = 0; odd < 2; odd++)
            for (int i = 0; i < 4; i++) {
                const float shifted = x[j + INPUTS[odd][i]] * inverse + 0x1.8p23f; /* the last bit is the unit now */
                int32_t whole;
                memcpy(&whole, &shifted, 4);
                whole -= 0x4b400000;
                const int32_t upper = (whole + 128) >> 8;
                bytes[8 * odd + i] = (int8_t)upper;
                bytes[8 * odd + 4 + i] = (int8_t)(whole - 256 * upper);
                sum += whole;
            }
    memcpy(to, &unit, 4);
    to[1] = -8 * sum;
}

/* One row: 32 products of a nibble and a byte an instruction. Four words of weights give eight sums of two products,
 * at most 8 x 2 x 15 x 128 in size, which 16 bits hold. */
static OUTLINE void single(const problem *p, int row, int from, int to, float *y) {
    const int words = p->chunk / 8;
    const uint32_t *w = p->words + (size_t)from * words * PANEL;
    const __m256i nibble = _mm256_set1_epi8(15), once = _mm256_set1_epi16(1), often = _mm256_set1_epi16(256);
    for (int c = from; c < to; c++) {
        const int32_t *x = p->fixed + ((size_t)c * p->m + row) * (2 + p->chunk / 2);
        float unit;
        memcpy(&unit, x, 4);
        __m256i sum[VECTORS];
        for (int v = 0; v < VECTORS; v++) sum[v] = _mm256_set1_epi32(x[1]);
        x += 2;
        for (int j = 0; j < words; j += 4) {
            __m256i upper[VECTORS], lower[VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) upper[v] = lower[v] = _mm256_setzero_si256();
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++, w += PANEL, x += 4) {
                const __m256i a = _mm256_set1_epi32(x[0]), b = _mm256_set1_epi32(x[1]);
                const __m256i c = _mm256_set1_epi32(x[2]), d = _mm256_set1_epi32(x[3]);
                prefetch(w, 4 * PANEL);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) {
                    const __m256i word = _mm256_loadu_si256((const __m256i *)(w + v * LANES));
                    const __m256i even = _mm256_and_si256(word, nibble);
                    const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
                    upper[v] = _mm256_add_epi16(upper[v], _mm256_maddubs_epi16(even, a));
                    lower[v] = _mm256_add_epi16(lower[v], _mm256_maddubs_epi16(even, b));
                    upper[v] = _mm256_add_epi16(upper[v], _mm256_maddubs_epi16(odd, c));
                    lower[v] = _mm256_add_epi16(lower[v], _mm256_maddubs_epi16(odd, d));
                }
            }
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(upper[v], often));
                sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(lower[v], once));
            }
        }
        const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
        for (int v = 0; v < VECTORS; v++) {
            float *out = y + row * PANEL + v * LANES;
            store(out, load(out) + load_scales(s + v * LANES) * (unit * to_float((vword)sum[v])));
        }
    }
}
#endif

/* chunk x 32 weights into the first-level cache, once for all rows */
INLINE void dequantise(const problem *p, int c, float *tile) {
    const uint32_t *w = p->words + (size_t)c * p->chunk / 8 * PANEL;
    for (int j = 0; j < p->chunk / 8; j++, w += PANEL, tile += 8 * PANEL) {
        prefetch(w, 4 * PANEL);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            vword low = load_words(w + v * LANES), high = low >> 4;
#pragma GCC unroll 8
            for (int b = 0; b < 4; b++) {
                store(tile + EVEN[b] * PANEL + v * LANES, NIBBLE(low, b));
                store(tile + ODD[b] * PANEL + v * LANES, NIBBLE(high, b));
            }
        }
    }
}

INLINE void block(const problem *p, int row, int rows, int c, const float *tile, float *y) {
    const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
    for (int half = 0; half < VECTORS; half += 2) {
        vfloat sum[ROWS][2];
        const float *x = p->x + ((size_t)c * p->m + row) * p->chunk, *t = tile + half * LANES;
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
            sum[r][0] = sum[r][1] = (vfloat){0} + p->offset[(size_t)c * p->m + row + r];
        for (int i = 0; i < p->chunk; i++, t += PANEL) {
            vfloat a = load(t), b = load(t + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                sum[r][0] += a * x[r * p->chunk + i];
                sum[r][1] += b * x[r * p->chunk + i];
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                float *out = y + (row + r) * PANEL + (half + v) * LANES;
                store(out, load(out) + load_scales(s + (half + v) * LANES) * sum[r][v]);
            }
    }
}

/* -- 2:4 sparse, float -------------------------------------------------------------------------------------------- */

/* four consecutive activations, and of them the one that each column kept */
#if LANES == 16
INLINE vfloat quad(const float *x) { return (vfloat)_mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
INLINE vfloat pick(vfloat x, vword which) { return (vfloat)_mm512_permutevar_ps((__m512)x, (__m512i)which); }
#elif LANES == 8
INLINE vfloat quad(const float *x) { return (vfloat)_mm256_broadcast_ps((const __m128 *)x); }
INLINE vfloat pick(vfloat x, vword which) { return (vfloat)_mm256_permutevar_ps((__m256)x, (__m256i)which); }
#else
INLINE vfloat quad(const float *x) { return load(x); }
INLINE vfloat pick(vfloat x, vword which) {
    return (vfloat){x[which[0] & 3], x[which[1] & 3], x[which[2] & 3], x[which[3] & 3]};
}
#endif
#define SIGNED(word, b) (NIBBLE(word, b) - (float)(8u << 8 * (b)))

/* y += scale * sum of kept weights times picked activations; rows <= PICKED */
INLINE void sparse_block(const problem *p, int row, int rows, int c, const float *tile, const uint32_t *which, float *y) {
    const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
    for (int half = 0; half < VECTORS; half += 2) {
        vfloat sum[ROWS][2];
        const float *x = p->x + ((size_t)c * p->m + row) * p->chunk;
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (vfloat){0};
        for (int i = 0; i < p->chunk / 2; i++) {
            const float *t = tile + i * PANEL + half * LANES;
            const uint32_t *w = which + i * PANEL + half * LANES;
            vfloat a = load(t), b = load(t + LANES);
            vword at = load_words(w), bt = load_words(w + LANES);
#pragma GCC unroll 16
            for (int r = 0; r < rows; r++) {
                vfloat four = quad(x + r * p->chunk + i / 2 * 4);
                sum[r][0] += a * pick(four, at);
                sum[r][1] += b * pick(four, bt);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                float *out = y + (row + r) * PANEL + (half + v) * LANES;
                store(out, load(out) + load_scales(s + (half + v) * LANES) * sum[r][v]);
            }
    }
}

INLINE void sparse_dequantise(const problem *p, int c, float *tile, uint32_t *which) {
    const uint32_t *w = p->words + (size_t)c * p->chunk / 32 * 3 * PANEL;
    for (int j = 0; j < p->chunk / 32; j++, w += 3 * PANEL, tile += 16 * PANEL, which += 16 * PANEL) {
        prefetch(w, 12 * PANEL);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) {
            vword position = load_words(w + 2 * PANEL + v * LANES);
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                vword low = load_words(w + half * PANEL + v * LANES), high = low >> 4;
#pragma GCC unroll 8
                for (int b = 0; b < 4; b++) {
                    int i = (8 * half + 2 * b) * PANEL + v * LANES;
                    store(tile + i, SIGNED(low, b));
                    store(tile + i + PANEL, SIGNED(high, b));
                    store_words(which + i, position >> (16 * half + 4 * b));
                    store_words(which + i + PANEL, position >> (16 * half + 4 * b + 2));
                }
            }
        }
    }
}

INLINE void sparse_fused(const problem *p, int row, int rows, int from, int to, float *y) {
    const int steps = p->chunk / 32;
    const uint32_t *w = p->words + (size_t)from * steps * 3 * PANEL;
    for (int c = from; c < to; c++) {
        vfloat sum[FUSED][VECTORS];
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < VECTORS; v++) sum[r][v] = (vfloat){0};
        for (int j = 0; j < steps; j++, w += 3 * PANEL) {
            const float *x = p->x + ((size_t)c * p->m + row) * p->chunk + j * 32;
            prefetch(w, 12 * PANEL);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; v++) {
                vword position = load_words(w + 2 * PANEL + v * LANES);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    vword low = load_words(w + half * PANEL + v * LANES), high = low >> 4;
#pragma GCC unroll 8
                    for (int b = 0; b < 4; b++) {
                        vfloat even = SIGNED(low, b), odd = SIGNED(high, b);
                        vword at = position >> (16 * half + 4 * b), next = position >> (16 * half + 4 * b + 2);
#pragma GCC unroll 8
                        for (int r = 0; r < rows; r++) {
                            vfloat four = quad(x + r * p->chunk + 16 * half + 4 * b);
                            sum[r][v] += even * pick(four, at);
                            sum[r][v] += odd * pick(four, next);
                        }
                    }
                }
            }
        }
        const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
        for (int v = 0; v < VECTORS; v++) {
            vfloat scale = load_scales(s + v * LANES);
            for (int r = 0; r < rows; r++) {
                float *out = y + (row + r) * PANEL + v * LANES;
                store(out, load(out) + scale * sum[r][v]);
            }
        }
    }
}

/* -- dense, bf16 -------------------------------------------------------------------------------------------------- */

#ifdef __AVX512BF16__
/* bf16 of q - 8, twice, so that the fifth index bit (the next nibble's lowest) does not matter */
static const uint16_t TABLE[32] __attribute__((aligned(64))) = {
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,
};

/* inputs 2b and 2b + 1 of 16 columns: MARLIN's order puts both four bits above the previous pair */
INLINE __m512i bf16_pair(__m512i table, __m512i word, int b) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi32(word, 4 * b), table);
}

INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

INLINE __m512i broadcast_pair(const uint16_t *x) { int32_t pair; memcpy(&pair, x, 4); return _mm512_set1_epi32(pair); }

INLINE void bf16_fused(const problem *p, int row, int rows, int from, int to, float *y) {
    const int words = p->chunk / 8;
    const uint32_t *w = p->words + (size_t)from * words * PANEL;
    const __m512i table = _mm512_load_si512(TABLE);
    for (int c = from; c < to; c++) {
        __m512 sum[FUSED][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int j = 0; j < words; j++, w += PANEL) {
            const uint16_t *x = p->pairs + ((size_t)c * p->padded + row) * p->chunk + j * 8;
            __m512i left = _mm512_loadu_si512(w), right = _mm512_loadu_si512(w + 16);
            prefetch(w, 4 * PANEL);
#pragma GCC unroll 8
            for (int b = 0; b < 4; b++)
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) {
                    __m512i pair = broadcast_pair(x + r * p->chunk + 2 * b);
                    sum[r][0] = dot(sum[r][0], bf16_pair(table, left, b), pair);
                    sum[r][1] = dot(sum[r][1], bf16_pair(table, right, b), pair);
                }
        }
        const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
        for (int r = 0; r < rows; r++)
            for (int v = 0; v < 2; v++) {
                float *out = y + (row + r) * PANEL + v * 16;
                store(out, load(out) + load_scales(s + v * 16) * (vfloat)sum[r][v]);
            }
    }
}

INLINE void bf16_dequantise(const problem *p, int c, uint32_t *tile) {
    const uint32_t *w = p->words + (size_t)c * p->chunk / 8 * PANEL;
    const __m512i table = _mm512_load_si512(TABLE);
    for (int j = 0; j < p->chunk / 8; j++, w += PANEL) {
        prefetch(w, 4 * PANEL);
        for (int v = 0; v < 2; v++) {
            __m512i word = _mm512_loadu_si512(w + v * 16);
#pragma GCC unroll 8
            for (int b = 0; b < 4; b++) _mm512_store_si512(tile + (4 * j + b) * PANEL + v * 16, bf16_pair(table, word, b));
        }
    }
}

#ifdef __AMX_BF16__
static int amx_permitted(void) { /* the kernel keeps a process's tile registers only if it is asked to */
    static int known = -1;
    if (known < 0) known = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return known;
}

static void amx_configure(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles
        __attribute__((aligned(64))) = {.palette = 1};
    for (int t = 0; t < 5; t++) tiles.bytes[t] = 64, tiles.rows[t] = 16;
    _tile_loadconfig(&tiles);
}

INLINE void amx_block(const problem *p, int row, int rows, int c, const uint32_t *tile, float *y) {
    float product[2][16][16] __attribute__((aligned(64)));
    const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
    _tile_zero(0);
    _tile_zero(1);
    for (int i = 0; i < p->chunk; i += 32) { /* 32 inputs: 16 pairs of 32 columns */
        _tile_loadd(2, p->pairs + ((size_t)c * p->padded + row) * p->chunk + i, 2 * (size_t)p->chunk);
        _tile_loadd(3, tile + i / 2 * PANEL, 4 * PANEL);
        _tile_loadd(4, tile + i / 2 * PANEL + 16, 4 * PANEL);
        _tile_dpbf16ps(0, 2, 3);
        _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, product[0], 64);
    _tile_stored(1, product[1], 64);
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < 2; v++) {
            float *out = y + (row + r) * PANEL + v * 16;
            store(out, load(out) + load_scales(s + v * 16) * load(product[v][r]));
        }
}
#else
INLINE void bf16_block(const problem *p, int row, int rows, int c, const uint32_t *tile, float *y) {
    __m512 sum[ROWS][2];
    const uint16_t *x = p->pairs + ((size_t)c * p->padded + row) * p->chunk;
    const uint16_t *s = p->scales + (size_t)(c * p->chunk / p->group) * PANEL;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (int i = 0; i < p->chunk; i += 2, tile += PANEL) {
        __m512i a = _mm512_load_si512(tile), b = _mm512_load_si512(tile + 16);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            __m512i pair = broadcast_pair(x + r * p->chunk + i);
            sum[r][0] = dot(sum[r][0], a, pair);
            sum[r][1] = dot(sum[r][1], b, pair);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            float *out = y + (row + r) * PANEL + v * 16;
            store(out, load(out) + load_scales(s + v * 16) * (vfloat)sum[r][v]);
        }
}
#endif
#endif

/* -- one stripe, and the whole product ----------------------------------------------------------------------------- */

/* One function for each number of rows, so that the compiler knows it: loops over rows unroll, sums stay in registers. */
typedef struct { float weights[128 * PANEL]; uint32_t positions[64 * PANEL]; } workspace;
typedef void rows_function(const problem *, int row, int from, int to, float *y);
typedef void block_function(const problem *, int row, int c, const workspace *, float *y);

#if defined(__AMX_BF16__)
#define DENSE_ROWS 16
#else
#define DENSE_ROWS ROWS
#endif
#if defined(__AVX512BF16__)
#define DENSE_FUSED bf16_fused
#define DENSE_BLOCK bf16_block
#else
#define DENSE_FUSED fused
#define DENSE_BLOCK block
#endif
#define PICKED (ROWS * 2 / 3) /* in the sparse block the positions take registers too */

#define DEFINE_FUSED(n)                                                                                                \
    static OUTLINE void fused_##n(const problem *p, int row, int from, int to, float *y) {                             \
        DENSE_FUSED(p, row, n, from, to, y);                                                                           \
    }                                                                                                                  \
    static OUTLINE void sparse_fused_##n(const problem *p, int row, int from, int to, float *y) {                      \
        sparse_fused(p, row, n, from, to, y);                                                                          \
    }
#define DEFINE_BLOCK(n)                                                                                                \
    static OUTLINE void block_##n(const problem *p, int row, int c, const workspace *w, float *y) {                    \
        DENSE_BLOCK(p, row, n, c, (const void *)w->weights, y);                                                        \
    }
#define DEFINE_SPARSE_BLOCK(n)                                                                                         \
    static OUTLINE void sparse_block_##n(const problem *p, int row, int c, const workspace *w, float *y) {             \
        sparse_block(p, row, n, c, w->weights, w->positions, y);                                                       \
    }
#define FOUR(DEFINE, a, b, c, d) DEFINE(a) DEFINE(b) DEFINE(c) DEFINE(d)

DEFINE_FUSED(1)
#if FUSED > 1
DEFINE_FUSED(2)
#endif
#if FUSED > 2
DEFINE_FUSED(3)
static rows_function *const FUSED_ROWS[2][3] = {{fused_1, fused_2, fused_3}, {sparse_fused_1, sparse_fused_2, sparse_fused_3}};
#elif FUSED > 1
static rows_function *const FUSED_ROWS[2][2] = {{fused_1, fused_2}, {sparse_fused_1, sparse_fused_2}};
#else
static rows_function *const FUSED_ROWS[2][1] = {{fused_1}, {sparse_fused_1}};
#endif
FOUR(DEFINE_SPARSE_BLOCK, 1, 2, 3, 4)
#if ROWS == 12
FOUR(DEFINE_SPARSE_BLOCK, 5, 6, 7, 8)
static block_function *const SPARSE_BLOCKS[] = {sparse_block_1, sparse_block_2, sparse_block_3, sparse_block_4,
                                                sparse_block_5, sparse_block_6, sparse_block_7, sparse_block_8};
#else
static block_function *const SPARSE_BLOCKS[] = {sparse_block_1, sparse_block_2, sparse_block_3, sparse_block_4};
#endif
#ifndef __AMX_BF16__
FOUR(DEFINE_BLOCK, 1, 2, 3, 4)
DEFINE_BLOCK(5)
DEFINE_BLOCK(6)
#if ROWS == 12
FOUR(DEFINE_BLOCK, 7, 8, 9, 10)
DEFINE_BLOCK(11)
DEFINE_BLOCK(12)
static block_function *const BLOCKS[] = {block_1, block_2, block_3, block_4, block_5, block_6,
                                         block_7, block_8, block_9, block_10, block_11, block_12};
#else
static block_function *const BLOCKS[] = {block_1, block_2, block_3, block_4, block_5, block_6};
#endif
#endif

/* chunks from..to of one panel for all rows: y (m, 32) += */
static void stripe(const problem *p, int from, int to, int sparse, int reuse, float *y, workspace *space) {
    if (p->m <= FUSED || !reuse) {
        const int step = reuse ? p->m : 1; /* without reuse every row de-quantises the weights for itself */
#ifdef BYTES
        if (p->fixed) {
            for (int row = 0; row < p->m; row++) single(p, row, from, to, y);
            return;
        }
#endif
        for (int row = 0; row < p->m; row += step) FUSED_ROWS[sparse][step - 1](p, row, from, to, y);
        return;
    }
    const int most = sparse ? PICKED : DENSE_ROWS, blocks = (p->m + most - 1) / most;
    for (int c = from; c < to; c++) {
        if (sparse) sparse_dequantise(p, c, space->weights, space->positions);
#ifdef __AVX512BF16__
        else bf16_dequantise(p, c, (void *)space->weights);
#else
        else dequantise(p, c, space->weights);
#endif
        for (int i = 0; i < blocks; i++) { /* blocks of nearly equal size */
            const int row = p->m * i / blocks, rows = p->m * (i + 1) / blocks - row;
            if (sparse) SPARSE_BLOCKS[rows - 1](p, row, c, space, y);
#ifdef __AMX_BF16__
            else amx_block(p, row, rows, c, (const void *)space->weights, y);
#else
            else BLOCKS[rows - 1](p, row, c, space, y);
#endif
        }
    }
}

static uint16_t to_bf16(float value) { /* round half to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* one row of activations in the form that the kernels want: by chunk, so that the rows of a block lie together */
static void prepare(const problem *p, const float *x, int row, int sparse, float *scaled, float *offset, uint16_t *pairs,
                    int32_t *fixed) {
    static const float part[4] = {1.0f, 0x1p-8f, 0x1p-16f, 0x1p-24f};
    (void)fixed; /* most builds have no byte path */
    for (int c = 0; c < p->chunks; c++, x += p->chunk) {
#ifdef BYTES
        if (fixed) {
            split(x, p->chunk, fixed + ((size_t)c * p->m + row) * (2 + p->chunk / 2));
            continue;
        }
#endif
        float sum = 0, *to = scaled + ((size_t)c * p->m + row) * p->chunk;
        for (int i = 0; i < p->chunk; i++) sum += x[i];
        for (int i = 0; i < p->chunk; i++) to[i] = x[i] * part[sparse ? i / 4 % 4 : BYTE[i % 8]];
        offset[(size_t)c * p->m + row] = -8 * sum;
        for (int i = 0; i < p->chunk && pairs; i++) pairs[((size_t)c * p->padded + row) * p->chunk + i] = to_bf16(x[i]);
    }
}

/* 1 if this process may use what this build needs */
int int4_ready(void) {
#ifdef __AMX_BF16__
    return amx_permitted();
#else
    return 1;
#endif
}

/* y (m, n) = x (m, k) times the packed weights (k, n); n a multiple of 32, k of group, group of 32.
 * Work is (panel, chunk) in one row, cut into equal stripes, one a thread, that may start and end within a panel: the
 * paper's striped partition. A panel's first part is written to y, and the others are added when all threads are done.
 * Returns 0, or 1 when there is no memory. */
int int4_matmul(const float *x, const uint32_t *words, const uint16_t *scales, float *y, int m, int n, int k, int group,
                int sparse, int reuse, int threads) {
    const int chunk = group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32, chunks = k / chunk, padded = (m + 15) / 16 * 16;
    const size_t part = (size_t)m * PANEL, words_in_panel = (size_t)k / 32 * (sparse ? 3 : 4) * PANEL;
    const int64_t units = (int64_t)(n / PANEL) * chunks;
    float *scaled = malloc(sizeof(float) * ((size_t)m * k + (size_t)m * chunks));
    float *sums = malloc(sizeof(float) * 2 * threads * part); /* of each thread: its panel, and its leading fragment */
    workspace *spaces = aligned_alloc(64, sizeof(workspace) * threads);
    uint16_t *pairs = NULL;
    int32_t *fixed = NULL;
#ifdef BYTES
    if (!sparse && (m == 1 || !reuse)) fixed = malloc(sizeof(int32_t) * m * chunks * (2 + chunk / 2));
    const int failed = !sparse && (m == 1 || !reuse) && !fixed;
#elif defined(__AVX512BF16__)
    if (!sparse) pairs = aligned_alloc(64, (sizeof(uint16_t) * padded * k + 63) / 64 * 64);
    const int failed = !sparse && !pairs;
#else
    const int failed = 0;
#endif
    if (failed || !scaled || !sums || !spaces) {
        free(scaled), free(sums), free(spaces), free(pairs), free(fixed);
        return 1;
    }
    float *offset = scaled + (size_t)m * k;
    if (pairs && padded > m) memset(pairs, 0, sizeof(uint16_t) * padded * k);
    problem whole = {.x = scaled, .offset = offset, .pairs = pairs, .fixed = fixed, .m = m, .padded = padded, .group = group,
                     .chunk = chunk, .chunks = chunks};
    int team = 1;
    /* few rows are prepared sooner than a second thread wakes up */
#pragma omp parallel for num_threads(threads) if ((size_t)m * k > 65536)
    for (int row = 0; row < m; row++) prepare(&whole, x + (size_t)row * k, row, sparse, scaled, offset, pairs, fixed);
#pragma omp parallel num_threads(threads)
    {
        int self = 0, members = 1;
#ifdef _OPENMP
        self = omp_get_thread_num(), members = omp_get_num_threads();
        if (self == 0) team = members;
#endif
#ifdef __AMX_BF16__
        if (!sparse && m > FUSED) amx_configure();
#endif
        const int64_t first = units * self / members, last = units * (self + 1) / members;
        problem mine = whole;
        for (int64_t u = first; u < last;) {
            const int panel = (int)(u / chunks), from = (int)(u % chunks);
            const int to = (int)MIN((int64_t)chunks, from + last - u);
            float *sum = sums + (2 * self + (from > 0)) * part;
            memset(sum, 0, sizeof(float) * part);
            mine.words = words + panel * words_in_panel;
            mine.scales = scales + (size_t)panel * (k / group) * PANEL;
            stripe(&mine, from, to, sparse, reuse, sum, spaces + self);
            for (int row = 0; row < m && from == 0; row++)
                memcpy(y + (size_t)row * n + panel * PANEL, sum + row * PANEL, sizeof(float) * PANEL);
            u += to - from;
        }
#ifdef __AMX_BF16__
        if (!sparse && m > FUSED) _tile_release();
#endif
    }
    for (int t = 1; t < team; t++) { /* leading fragments: at most one a thread */
        const int64_t begin = units * t / team, end = units * (t + 1) / team;
        if (begin % chunks == 0 || begin == end) continue;
        const int panel = (int)(begin / chunks);
        for (int row = 0; row < m; row++)
            for (int i = 0; i < PANEL; i++)
                y[(size_t)row * n + panel * PANEL + i] += sums[(2 * t + 1) * part + row * PANEL + i];
    }
    free(scaled), free(sums), free(spaces), free(pairs), free(fixed);
    return 0;
}

/* The sum of `count` floats (a multiple of 256 times threads), read once: a stream that only reads. */
double int4_read(const float *data, int64_t count, int threads) {
    double total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t block = 0; block < count / 256; block++) {
        vfloat sum[4] = {{0}, {0}, {0}, {0}};
        for (int i = 0; i < 256; i += 4 * LANES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[j] += load(data + block * 256 + i + j * LANES);
        vfloat all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        for (int i = 0; i < LANES; i++) total += all[i];
    }
    return total;
}
