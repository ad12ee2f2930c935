"""What the decoding step in C++ is built on: vectors as wide as the CPU's, and sums of products of them.

Weights W are float, bfloat16 or int8_t, all else is float.
"""

VECTORS = r"""
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define CACHED_BYTES (1 << 18)  // of the lines, and half as many of the weights
#define AHEAD_BYTES 1280
#define MAX_ROWS 8

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

struct bfloat16 {
    uint16_t bits;
};

static inline float number(float x) { return x; }
static inline float number(int8_t x) { return x; }
static inline float number(bfloat16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

static inline void put(float *place, float x) { *place = x; }
static inline void put(bfloat16 *place, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    place->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

static inline Floats load(const float *from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
static inline void store(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }
#ifdef __AVX512F__
static inline Floats load(const bfloat16 *from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
}
static inline Floats load(const int8_t *from) {
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}
#elif defined(__AVX2__)
static inline Floats load(const bfloat16 *from) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
}
static inline Floats load(const int8_t *from) {
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}
#else
static inline Floats load(const bfloat16 *from) {
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return (Floats)(__builtin_convertvector(x, Integers) << 16);
}
static inline Floats load(const int8_t *from) {
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    Bytes x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, Integers), Floats);
}
#endif

static inline float sum(Floats x) {
    float parts[LANES];
    std::memcpy(parts, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) parts[lane] += parts[lane + width];
    return parts[0];
}

// e to the x, to a few units of the last place (Cephes' polynomial); what would be 0 is the smallest normal number.
static inline Floats exponential(Floats x) {
    const Floats lowest = Floats{} - 87.0f, highest = Floats{} + 88.0f, round = Floats{} + 12582912.0f;
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
    const Floats power = (x * 1.44269504f + round) - round;
    const Floats r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
    Floats y = Floats{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
    return y * (Floats)exponent;
}

static inline float exponential(float x) { return exponential(Floats{} + x)[0]; }

// Of narrow weights what lies ahead is asked for, to be read once: no cache need keep it. Wide ones arrive as fast
// without.
template <class W> static inline void ask_ahead(const W *from, int64_t i) {
    if (sizeof(W) < 4 && i * sizeof(W) % 64 == 0) __builtin_prefetch((const char *)from + AHEAD_BYTES, 0, 0);
}

// The sum of row[i] * x[i]. Eight sums side by side, since one would wait for itself.
template <class W> static inline float dot(const W *row, const float *x, int64_t count) {
    Floats sums[8] = {};
    int64_t i = 0;
    for (; i + 8 * LANES <= count; i += 8 * LANES) {
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {
            const W *from = row + i + part * LANES;
            ask_ahead(from, part * LANES);
            sums[part] += load(from) * load(x + i + part * LANES);
        }
    }
    for (; i + LANES <= count; i += LANES) sums[0] += load(row + i) * load(x + i);
    Floats all = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    float total = sum(all);
    for (; i < count; i++) total += number(row[i]) * x[i];
    return total;
}

// The same of several rows of x, which share what is loaded of the weights.
template <int ROWS, class W>
static inline void dots(const W *row, const float *x, int64_t count, int64_t stride, float *y) {
    Floats sums[ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        ask_ahead(row + i, i);
        const Floats weights = load(row + i);
#pragma GCC unroll 8
        for (int of = 0; of < ROWS; of++) sums[of] += weights * load(x + of * stride + i);
    }
    for (int of = 0; of < ROWS; of++) {
        y[of] = sum(sums[of]);
        for (int64_t rest = i; rest < count; rest++) y[of] += number(row[rest]) * x[of * stride + rest];
    }
}

// Of up to MAX_ROWS rows.
template <class W>
static inline void dots(const W *row, const float *x, int64_t count, int64_t stride, int64_t rows, float *y) {
    switch (rows) {
    case 1: y[0] = dot(row, x, count); return;
    case 2: return dots<2>(row, x, count, stride, y);
    case 3: return dots<3>(row, x, count, stride, y);
    case 4: return dots<4>(row, x, count, stride, y);
    case 5: return dots<5>(row, x, count, stride, y);
    case 6: return dots<6>(row, x, count, stride, y);
    case 7: return dots<7>(row, x, count, stride, y);
    case 8: return dots<8>(row, x, count, stride, y);
    }
}

// The same of several rows of weights too: what is loaded of either serves all of the other.
template <int OUTPUTS, int ROWS, class W>
static inline void tile(const W *row, const float *x, int64_t count, float (&y)[OUTPUTS][ROWS]) {
    Floats sums[OUTPUTS][ROWS] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Floats weights[OUTPUTS];
#pragma GCC unroll 8
        for (int output = 0; output < OUTPUTS; output++) weights[output] = load(row + output * count + i);
#pragma GCC unroll 8
        for (int of = 0; of < ROWS; of++) {
            const Floats numbers = load(x + of * count + i);
#pragma GCC unroll 8
            for (int output = 0; output < OUTPUTS; output++) sums[output][of] += weights[output] * numbers;
        }
    }
    for (int output = 0; output < OUTPUTS; output++)
        for (int of = 0; of < ROWS; of++) {
            y[output][of] = sum(sums[output][of]);
            for (int64_t rest = i; rest < count; rest++)
                y[output][of] += number(row[output * count + rest]) * x[of * count + rest];
        }
}

// The outputs `from` to `to` of many lines, in blocks of weights and of lines that stay in a core's caches together.
template <class W, class F>
static void tiles(const W *weight, const float *x, int64_t inputs, int64_t lines, int64_t from, int64_t to, F take) {
    const int64_t block_outputs = std::max<int64_t>(1, CACHED_BYTES / 2 / sizeof(W) / inputs / 3) * 3;
    const int64_t block_lines = std::max<int64_t>(1, CACHED_BYTES / sizeof(float) / inputs / 4) * 4;
    for (int64_t first = from; first < to; first += block_outputs)
        for (int64_t start = 0; start < lines; start += block_lines) {
            const int64_t last = std::min(first + block_outputs, to), stop = std::min(start + block_lines, lines);
            const auto at = [&](auto outputs, auto rows, int64_t output, int64_t line) {
                float y[decltype(outputs)::value][decltype(rows)::value];
                tile(weight + output * inputs, x + line * inputs, inputs, y);
                for (int i = 0; i < decltype(outputs)::value; i++)
                    for (int of = 0; of < decltype(rows)::value; of++) take(line + of, output + i, y[i][of]);
            };
            const std::integral_constant<int, 1> one{};
            const std::integral_constant<int, 3> three{};
            const std::integral_constant<int, 4> four{};
            for (int64_t output = first; output < last;) {
                const bool whole = output + 3 <= last;
                for (int64_t line = start; line < stop;) {
                    const bool four_lines = line + 4 <= stop;
                    if (whole && four_lines)
                        at(three, four, output, line);
                    else if (whole)
                        at(three, one, output, line);
                    else if (four_lines)
                        at(one, four, output, line);
                    else
                        at(one, one, output, line);
                    line += four_lines ? 4 : 1;
                }
                output += whole ? 3 : 1;
            }
        }
}
"""

__all__ = ["VECTORS"]
