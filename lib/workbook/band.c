/* Banded attention for a CPU, fused: a query looks at the keys near it and no others are touched, in float32.
 *
 *     out_i = sum_j softmax_j(scale q_i k_j) v_j,   lse_i = log sum_j exp(scale q_i k_j)
 *
 * Tokens are `frames` runs of `places` each. The query at place p looks at the places p - half ... p + half of every
 * frame, cut at the ends. One frame is a plain band.
 *
 * A block of LANES queries works on the few keys that any of them sees. Its scores stand as [key][query], so that the
 * maximum, the exponential and the sum need no shuffle; a vector of keys outside the band exists at the rims alone.
 * One source for vectors of 16, 8 or 4 floats, by the compiler's flags.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
#define KEYS 8 /* keys of a register block of the first product */
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));

INLINE vfloat load(const float *p) { vfloat v; memcpy(&v, p, sizeof v); return v; }
INLINE void store(float *p, vfloat v) { memcpy(p, &v, sizeof v); }
INLINE vfloat choose(vint yes, vfloat a, vfloat b) { return (vfloat)(((vint)a & yes) | ((vint)b & ~yes)); }

/* exp(x) for x <= 0, relative error 2e-7; below -87 it is exp(-87), which no sum of ones or more can see */
INLINE vfloat exponential(vfloat x) {
    const vfloat low = x * 0.0f - 87.0f, magic = x * 0.0f + 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole */
    x = choose(x > low, x, low);
    vfloat whole = x * 1.44269504f + magic;
    vint power = (vint)whole << 23;
    whole -= magic;
    vfloat f = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* log 2 in two parts */
    vfloat y = f * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * f + 8.3334519073e-3f;
    y = y * f + 4.1665795894e-2f;
    y = y * f + 1.6666665459e-1f;
    y = y * f + 5.0000001201e-1f;
    y = y * f * f + f + 1.0f;
    return (vfloat)((vint)y + power);
}

typedef struct {
    const float *q, *k, *v; /* of one head; rows are `step` floats apart */
    float *out, *lse;
    int64_t q_step, k_step, v_step, out_step;
    int width, frames, places, half;
    float scale;
} Head;

/* scores[key][query] of `count` keys from row `first` on */
INLINE void first_product(const Head *h, const float *queries, int64_t first, int count, float *scores) {
    for (int j = 0; j < count; j += KEYS) {
        int n = MIN(KEYS, count - j);
        const float *k = h->k + (first + j) * h->k_step;
        if (n == KEYS) {
            vfloat sum[KEYS];
            memset(sum, 0, sizeof sum);
            for (int c = 0; c < h->width; c++) {
                vfloat q = load(queries + c * LANES);
                for (int i = 0; i < KEYS; i++) sum[i] += q * k[i * h->k_step + c];
            }
            for (int i = 0; i < KEYS; i++) store(scores + (j + i) * LANES, sum[i]);
        } else {
            for (int i = 0; i < n; i++) {
                vfloat even = {0}, odd = {0};
                for (int c = 0; c < h->width; c += 2) {
                    even += load(queries + c * LANES) * k[i * h->k_step + c];
                    odd += load(queries + (c + 1) * LANES) * k[i * h->k_step + c + 1];
                }
                store(scores + (j + i) * LANES, even + odd);
            }
        }
    }
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
    vint lane;
    for (int i = 0; i < LANES; i++) lane[i] = start + i;
    for (int c = 0; c < h->width; c++)
        for (int i = 0; i < LANES; i++)
            queries[c * LANES + i] = i < count ? h->scale * h->q[(row + i) * h->q_step + c] : 0.0f;

    vfloat largest, total = {0};
    for (int i = 0; i < LANES; i++) largest[i] = -1e30f;
    for (int f = 0; f < h->frames; f++) {
        float *part = scores + (int64_t)f * keys * LANES;
        first_product(h, queries, (int64_t)f * h->places + low, keys, part);
        for (int j = 0; j < keys; j++) {
            vfloat s = load(part + j * LANES);
            if (low + j < start + LANES - 1 - h->half || low + j > start + h->half) { /* some query does not see it */
                vint apart = lane - (low + j), near = (apart <= h->half) & (apart >= -h->half);
                s = choose(near, s, s * 0.0f - 2e30f);
                store(part + j * LANES, s);
            }
            largest = choose(s > largest, s, largest);
        }
    }
    for (int64_t j = 0; j < (int64_t)keys * h->frames; j++) {
        vfloat s = load(scores + j * LANES), e = exponential(s - largest);
        e = choose(s > -1e30f, e, s * 0.0f); /* exactly nothing for what is outside */
        store(scores + j * LANES, e);
        total += e;
    }
    for (int i = 0; i < count; i++) h->lse[row + i] = largest[i] + __builtin_logf(total[i]);
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
                store(out, sum[r][0] / total[i + r]);
                store(out + LANES, sum[r][1] / total[i + r]);
            }
        }
    }
}

/* strides: of q, k, v and out, each batch, head, token, in floats. lse: [batch][head][token]. 0, or 1 without memory */
int band_attention(const float *q, const float *k, const float *v, float *out, float *lse, const int64_t *strides,
                   int batch, int heads, int frames, int places, int width, int half, float scale, int threads) {
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
                      out + b * s[9] + n * s[10], lse + head * frames * places, s[2], s[5], s[8], s[11],
                      width, frames, places, half, scale};
            if (scores)
                attend(&h, frame, block * LANES, MIN(LANES, places - block * LANES), scores,
                       scores + room - (size_t)width * LANES);
        }
        free(scores);
    }
    return failed;
}
