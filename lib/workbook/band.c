/* Banded attention for a CPU, fused: a query looks at the keys near it and no others are touched, in float32.
 *
 *     out_i = sum_j softmax_j(scale q_i k_j) v_j,   lse_i = log sum_j exp(scale q_i k_j) = log(2) largest_i + log(total_i)
 *
 * Tokens are `frames` runs of `places` each. The query at place p looks at the places p - half ... p + half of every
 * frame, cut at the ends. One frame is a plain band.
 *
 * A block of LANES queries works on the few keys that any of them sees. Its scores stand as [key][query], so that the
 * maximum, the exponential and the sum need no shuffle; a vector of keys outside the band exists at the rims alone.
 * Scores carry log2(e) in their scale, so that the exponential is a power of two.
 * One source for vectors of 16, 8 or 4 floats, by the compiler's flags.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 8 /* queries of a register block of the second product: 8 x 2 accumulators of 32 registers */
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 4 /* 4 x 2 accumulators of 16 registers */
#else
#define LANES 4
#define ROWS 4
#endif
#define OUTSIDE -1e30f /* the score of a key that a query does not see */
#define KEYS 8 /* keys of a register block of the first product */
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));

INLINE vfloat load(const float *p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vfloat v) { memcpy(p, &v, sizeof v); }
INLINE vfloat choose(vint yes, vfloat a, vfloat b) { return (vfloat)(((vint)a & yes) | ((vint)b & ~yes)); }
INLINE vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* queries[column][row] = factor * q[row][column] of LANES rows, LANES columns at a time; rows are `step` floats apart */
INLINE void transpose(const float *q, int64_t step, float factor, int width, float *queries) {
#if defined(__AVX512F__)
    for (int c = 0; c < width; c += 16) {
        __m512 r[16], t[16]; /* pairs of rows are interleaved by ones, twos, fours and eights */
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_ps(q + i * step + c) * factor;
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
            for (int j = 0; j < 2; j++) {
                __m512d one = (__m512d)t[i + j], two = (__m512d)t[i + j + 2];
                r[i + 2 * j] = (__m512)_mm512_unpacklo_pd(one, two);
                r[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(one, two);
            }
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < 16; j += 8) {
                t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
                t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
            }
        for (int i = 0; i < 8; i++) {
            _mm512_storeu_ps(queries + (c + i) * 16, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
            _mm512_storeu_ps(queries + (c + i + 8) * 16, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
        }
    }
#else
    for (int c = 0; c < width; c++)
        for (int i = 0; i < LANES; i++) queries[c * LANES + i] = factor * q[i * step + c];
#endif
}

/* 2^x for x <= 0, relative error 2e-7; below -126 it is 2^-126, which no sum of ones or more can see */
INLINE vfloat power_of_two(vfloat x) {
    const vfloat zero = {0}, magic = zero + 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole */
    x = larger(x, zero - 126.0f);
    vfloat whole = x + magic;
    vint exponent = (vint)whole << 23;
    vfloat f = x - (whole - magic);
    vfloat y = f * 1.3264727e-3f + 9.6715127e-3f; /* minimax on [-1/2, 1/2] */
    y = y * f + 5.5507337e-2f;
    y = y * f + 2.4022242e-1f;
    y = y * f + 6.9314698e-1f;
    y = y * f + 1.0f;
    return (vfloat)((vint)y + exponent);
}

typedef struct {
    const float *q, *k, *v; /* of one head; rows are `step` floats apart */
    float *out, *largest, *total;
    int64_t q_step, k_step, v_step, out_step;
    int width, frames, places, half;
    float scale;
} Head;

/* what a key that lies `apart` places after the block's first query leaves of the scores */
INLINE vfloat seen(vfloat score, int apart, int half) {
    vint lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const vint to = apart - lane;
    return choose((to <= half) & (to >= -half), score, (vfloat){0} + OUTSIDE);
}

/* scores[key][query] of `count` keys, the first of them `apart` places after the block's first query. Returns the largest
 * score of each query, or `largest` */
INLINE vfloat first_product(const Head *h, const float *queries, const float *k, int apart, int count, float *scores,
                            vfloat largest) {
    int j = 0;
    for (; j + KEYS <= count; j += KEYS) {
        vfloat sum[KEYS];
        memset(sum, 0, sizeof sum);
        for (int c = 0; c < h->width; c++) {
            vfloat q = load(queries + c * LANES);
            for (int i = 0; i < KEYS; i++) sum[i] += q * k[(j + i) * h->k_step + c];
        }
        if (apart + j < LANES - 1 - h->half || apart + j + KEYS - 1 > h->half) /* some query does not see them all */
            for (int i = 0; i < KEYS; i++) sum[i] = seen(sum[i], apart + j + i, h->half);
        for (int i = 0; i < KEYS; i++) {
            largest = larger(sum[i], largest);
            store(scores + (j + i) * LANES, sum[i]);
        }
    }
    for (; j < count; j++) {
        vfloat sum = {0};
        for (int c = 0; c < h->width; c++) sum += load(queries + c * LANES) * k[j * h->k_step + c];
        sum = seen(sum, apart + j, h->half);
        largest = larger(sum, largest);
        store(scores + j * LANES, sum);
    }
    return largest;
}

/* out += weights[key][query] v[key] for ROWS queries from `row` on */
INLINE void second_product(const Head *h, const float *weights, int64_t first, int count, int row, vfloat (*sum)[2],
                           int column) {
    for (int j = 0; j < count; j++) {
        const float *v = h->v + (first + j) * h->v_step + column, *w = weights + j * LANES + row;
        vfloat one = load(v), two = load(v + LANES);
        for (int i = 0; i < ROWS; i++) {
            sum[i][0] += one * w[i];
            sum[i][1] += two * w[i];
        }
    }
}

/* one block of queries: `count` <= LANES places of a frame, from place `start` on */
static void attend(const Head *h, int frame, int start, int count, float *scores, float *queries) {
    const int low = MAX(0, start - h->half), high = MIN(h->places, start + count + h->half), keys = high - low;
    const int64_t row = (int64_t)frame * h->places + start;
    const float *q = h->q + row * h->q_step;
    if (count == LANES)
        transpose(q, h->q_step, h->scale, h->width, queries);
    else
        for (int c = 0; c < h->width; c++)
            for (int i = 0; i < LANES; i++) queries[c * LANES + i] = i < count ? h->scale * q[i * h->q_step + c] : 0.0f;

    vfloat largest = (vfloat){0} + OUTSIDE, total = {0};
    for (int f = 0; f < h->frames; f++)
        largest = first_product(h, queries, h->k + ((int64_t)f * h->places + low) * h->k_step, low - start, keys,
                                scores + (int64_t)f * keys * LANES, largest);
    const int64_t all = (int64_t)keys * h->frames;
    for (int64_t j = 0; j < all; j++) {
        vfloat s = load(scores + j * LANES), e = power_of_two(s - largest);
        e = (vfloat)((vint)e & (s > OUTSIDE)); /* exactly nothing for what is outside */
        store(scores + j * LANES, e);
        total += e;
    }
    for (int i = 0; i < count; i++) h->largest[row + i] = largest[i], h->total[row + i] = total[i];
    total = 1.0f / total;
    for (int i = 0; i < count; i += ROWS) {
        int from = MAX(0, start + i - h->half), to = MIN(high, start + i + ROWS + h->half);
        for (int column = 0; column < h->width; column += 2 * LANES) {
            vfloat sum[ROWS][2];
            memset(sum, 0, sizeof sum);
            for (int f = 0; f < h->frames; f++)
                second_product(h, scores + ((int64_t)f * keys + from - low) * LANES, (int64_t)f * h->places + from,
                               to - from, i, sum, column);
            for (int r = 0; r < MIN(ROWS, count - i); r++) {
                float *out = h->out + (row + i + r) * h->out_step + column;
                store(out, sum[r][0] * total[i + r]);
                store(out + LANES, sum[r][1] * total[i + r]);
            }
        }
    }
}

/* strides: of q, k, v and out, each batch, head, token, in floats. largest (in powers of two), total:
 * [batch][head][token]. Returns 0, or 1 without memory */
int band_attention(const float *q, const float *k, const float *v, float *out, float *largest, float *total,
                   const int64_t *strides, int batch, int heads, int frames, int places, int width, int half,
                   float scale, int threads) {
    const int blocks = (places + LANES - 1) / LANES;
    const int64_t tasks = (int64_t)batch * heads * frames * blocks;
    const size_t room = (size_t)frames * MIN(places, 2 * (int64_t)half + LANES) * LANES + (size_t)width * LANES;
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *scores = aligned_alloc(64, (room * sizeof(float) + 63) / 64 * 64);
        if (!scores) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            int block = task % blocks, frame = task / blocks % frames;
            int64_t head = task / blocks / frames, b = head / heads, n = head % heads;
            const int64_t *s = strides;
            Head h = {q + b * s[0] + n * s[1], k + b * s[3] + n * s[4],       v + b * s[6] + n * s[7],
                      out + b * s[9] + n * s[10], largest + head * frames * places, total + head * frames * places,
                      s[2], s[5], s[8], s[11], width, frames, places, half, scale * 1.44269504f /* log2(e) */};
            if (scores)
                attend(&h, frame, block * LANES, MIN(LANES, places - block * LANES), scores,
                       scores + room - (size_t)width * LANES);
        }
        free(scores);
    }
    return failed;
}
