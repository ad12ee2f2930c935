// What the decoding step is built on: vectors as wide as the CPU's, and sums of products of them.
//
// Weights W are float, bfloat16 or int8_t, all else is float.
#pragma once

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

#ifndef CACHED_BYTES
#define CACHED_BYTES (1 << 18)  // of the lines, and half as many of the weights
#endif
#define TILE_ROWS 8

// How weights are read, which each machine does best in another way. For one line: whether those ahead are asked for,
// to be kept in no cache (0) or in caches (1 to 3), or not at all (-1), and in how many streams. For several lines:
// how far ahead, if at all.
#ifndef PREFETCH_LOCALITY
#define PREFETCH_LOCALITY -1
#endif
#ifndef STREAMS
#define STREAMS 1
#endif
#ifndef LINES_AHEAD_BYTES
#define LINES_AHEAD_BYTES 0
#endif

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#ifndef AHEAD_BYTES
#define AHEAD_BYTES (LANES == 16 ? 512 : 1280)
#endif
#if defined(__AVX512F__) && defined(__AVX512BF16__)
#define MULTIPLIES_BF16
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

static inline void store(bfloat16 *to, Floats x) {  // as `put` rounds
#ifdef MULTIPLIES_BF16
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
    Words bits = (Words)x;
    bits = ((x != x) ? Words{} + 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(__AVX2__) && LANES == 8
    const __m256i pairs = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    const Halves y = (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
#else
    const Halves y = __builtin_convertvector(bits, Halves);
#endif
    std::memcpy(to, &y, sizeof y);
#endif
}

static inline float sum(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#endif
    float parts[LANES];
    std::memcpy(parts, &x, sizeof x);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) parts[lane] += parts[lane + width];
    return parts[0];
}

// e to the x, to a few units of the last place (Cephes' polynomial); what would be 0 is the smallest normal number.
static inline Floats exponential(Floats x) {
    const Floats lowest = Floats{} - 87.0f, highest = Floats{} + 88.0f, round = Floats{} + 12582912.0f;
#if defined(__AVX512F__)  // in two instructions, which GCC does not find
    x = (Floats)_mm512_min_ps((__m512)highest, _mm512_max_ps((__m512)lowest, (__m512)x));
#elif defined(__AVX2__)
    x = (Floats)_mm256_min_ps((__m256)highest, _mm256_max_ps((__m256)lowest, (__m256)x));
#else
    x = x < lowest ? lowest : x;
    x = x > highest ? highest : x;
#endif
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

// What lies ahead of weights that so many lines read is asked for, once for 64 bytes of a row. Where vectors are of 256
// bits, wide weights arrive as fast without.
template <int LINES, class W> static inline void ask_ahead(const W *row, int64_t i) {
    constexpr int locality = LINES == 1 ? PREFETCH_LOCALITY : LINES_AHEAD_BYTES ? 3 : -1;
    if constexpr (locality >= 0 && (LANES == 16 || sizeof(W) < 4))
        if (i * sizeof(W) % 64 == 0)
            __builtin_prefetch((const char *)(row + i) + (LINES == 1 ? AHEAD_BYTES : LINES_AHEAD_BYTES), 0,
                               locality < 0 ? 0 : locality);
}

// The sum of row[i] * x[i]. Eight sums side by side, since one would wait for itself.
template <class W> static inline float dot(const W *row, const float *x, int64_t count) {
    Floats sums[8] = {};
    int64_t i = 0;
    for (; i + 8 * LANES <= count; i += 8 * LANES) {
#pragma GCC unroll 8
        for (int part = 0; part < 8; part++) {
            const W *from = row + i + part * LANES;
            ask_ahead<1>(row + i, part * LANES);
            sums[part] += load(from) * load(x + i + part * LANES);
        }
    }
    for (; i + LANES <= count; i += LANES) sums[0] += load(row + i) * load(x + i);
    Floats all = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    float total = sum(all);
    for (; i < count; i++) total += number(row[i]) * x[i];
    return total;
}

// What a tile multiplies at once: lines in fp32 by any weights, or, in pairs, lines in bf16 by weights in bf16 or int8.
template <class X> constexpr int64_t STEP = LANES;
template <class W> static inline Floats factors(const W *from, const float *) { return load(from); }
static inline void add(Floats &sums, Floats weights, Floats numbers) { sums += weights * numbers; }
#ifdef MULTIPLIES_BF16
template <> constexpr int64_t STEP<bfloat16> = 2 * LANES;
static inline __m512bh factors(const bfloat16 *from, const bfloat16 *) { return (__m512bh)_mm512_loadu_si512(from); }
static inline __m512bh factors(const int8_t *from, const bfloat16 *) {  // exactly: eight bits of bf16 are a number's
    return _mm512_cvtne2ps_pbh((__m512)load(from + LANES), (__m512)load(from));
}
static inline void add(Floats &sums, __m512bh weights, __m512bh numbers) {
    sums = (Floats)_mm512_dpbf16_ps((__m512)sums, weights, numbers);
}

// In this thread's own room, until the next call.
static const bfloat16 *rounded(const float *x, int64_t count) {
    static thread_local std::vector<bfloat16> y;
    y.resize(count);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        _mm256_storeu_si256((__m256i *)&y[i], (__m256i)_mm512_cvtneps_pbh((__m512)load(x + i)));
    for (; i < count; i++) put(&y[i], x[i]);
    return y.data();
}
#endif

// y (OUTPUTS, TILE_ROWS): the sums of row[i] * x[i] of so many rows of weights, `stride` apart, and ROWS lines of
// `count` numbers. What is loaded of either serves all of the other.
template <int OUTPUTS, int ROWS, class W, class X>
static __attribute__((noinline)) void tile(const W *row, int64_t stride, const X *x, int64_t count, float *y) {
    Floats sums[OUTPUTS][ROWS] = {};
    int64_t i = 0;
    for (; i + STEP<X> <= count; i += STEP<X>) {
        decltype(factors(row, x)) weights[OUTPUTS];
#pragma GCC unroll 8
        for (int output = 0; output < OUTPUTS; output++) {
            ask_ahead<ROWS>(row + output * stride, i);
            weights[output] = factors(row + output * stride + i, x);
        }
#pragma GCC unroll 8
        for (int of = 0; of < ROWS; of++) {
            const auto numbers = factors(x + of * count + i, x);
#pragma GCC unroll 8
            for (int output = 0; output < OUTPUTS; output++) add(sums[output][of], weights[output], numbers);
        }
    }
#pragma GCC unroll 8
    for (int output = 0; output < OUTPUTS; output++)
#pragma GCC unroll 8
        for (int of = 0; of < ROWS; of++) y[output * TILE_ROWS + of] = sum(sums[output][of]);
    for (; i < count; i++)
        for (int output = 0; output < OUTPUTS; output++)
            for (int of = 0; of < ROWS; of++)
                y[output * TILE_ROWS + of] += number(row[output * stride + i]) * number(x[of * count + i]);
}

// The same of `rows` lines, ROWS at most.
template <int OUTPUTS, int ROWS, class W, class X>
static void tile_of(int64_t rows, const W *row, int64_t stride, const X *x, int64_t count, float *y) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return tile_of<OUTPUTS, ROWS - 1>(rows, row, stride, x, count, y);
    tile<OUTPUTS, ROWS>(row, stride, x, count, y);
}

// The outputs `from` to `to` of lines x (L, N), each handed to `take` with its line. The weights come from the memory
// in so many streams side by side, each in its own order, in which the hardware reads ahead of it.
template <int OUTPUTS, int ROWS, class W, class X, class F>
static void streams(const W *weight, const X *x, int64_t inputs, int64_t lines, int64_t from, int64_t to, F take) {
    const int64_t part = (to - from) / OUTPUTS;
    float y[OUTPUTS * TILE_ROWS];
    const auto sums_of = [&](auto sums, int64_t count, int64_t output, int64_t apart) {
        for (int64_t line = 0; line < lines; line += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, lines - line);
            sums(rows, weight + output * inputs, apart * inputs, x + line * inputs, inputs, y);
            for (int64_t i = 0; i < count; i++)
                for (int64_t of = 0; of < rows; of++) take(line + of, output + i * apart, y[i * TILE_ROWS + of]);
        }
    };
    for (int64_t output = from; output < from + part; output++)
        sums_of(tile_of<OUTPUTS, ROWS, W, X>, OUTPUTS, output, part);
    for (int64_t output = from + OUTPUTS * part; output < to; output++)
        sums_of(tile_of<1, ROWS, W, X>, 1, output, 1);
}

// The same in blocks of weights and of lines that stay in a core's caches together, for many lines in few registers.
template <int OUTPUTS, int ROWS, class W, class X, class F>
static void tiles(const W *weight, const X *x, int64_t inputs, int64_t lines, int64_t from, int64_t to, F take) {
    const int64_t block_outputs = std::max<int64_t>(1, CACHED_BYTES / 2 / sizeof(W) / inputs / OUTPUTS) * OUTPUTS;
    const int64_t block_lines = std::max<int64_t>(1, CACHED_BYTES / sizeof(X) / inputs / ROWS) * ROWS;
    float y[OUTPUTS * TILE_ROWS];
    for (int64_t first = from; first < to; first += block_outputs)
        for (int64_t start = 0; start < lines; start += block_lines) {
            const int64_t last = std::min(first + block_outputs, to), stop = std::min(start + block_lines, lines);
            for (int64_t output = first, outputs; output < last; output += outputs) {
                outputs = output + OUTPUTS <= last ? OUTPUTS : 1;
                const auto sums = outputs > 1 ? tile_of<OUTPUTS, ROWS, W, X> : tile_of<1, ROWS, W, X>;
                for (int64_t line = start; line < stop; line += ROWS) {
                    const int64_t rows = std::min<int64_t>(ROWS, stop - line);
                    sums(rows, weight + output * inputs, inputs, x + line * inputs, inputs, y);
                    for (int64_t i = 0; i < outputs; i++)
                        for (int64_t of = 0; of < rows; of++) take(line + of, output + i, y[i * TILE_ROWS + of]);
                }
            }
        }
}

// The same of any number of lines but one, by sums that fit in the registers.
template <class W, class X, class F>
static void products_of(const W *weight, const X *x, int64_t inputs, int64_t lines, int64_t from, int64_t to, F take) {
#ifdef __AVX512F__
    if (lines <= 4)
        streams<4, 4>(weight, x, inputs, lines, from, to, take);
    else
        streams<3, TILE_ROWS>(weight, x, inputs, lines, from, to, take);
#else
    if (lines <= TILE_ROWS)
        streams<1, TILE_ROWS>(weight, x, inputs, lines, from, to, take);
    else
        tiles<3, 4>(weight, x, inputs, lines, from, to, take);
#endif
}

// The same of one line.
template <class W, class F>
static void products_of_line(const W *weight, const float *x, int64_t inputs, int64_t from, int64_t to, F take) {
    if constexpr (STREAMS > 1)
        streams<STREAMS, 1>(weight, x, inputs, 1, from, to, take);
    else
        for (int64_t output = from; output < to; output++) take(0, output, dot(weight + output * inputs, x, inputs));
}

// The same of any weights and lines, which a model of type T rounds to it between its modules.
template <class T, class W, class F>
static void products(const W *weight, const float *x, int64_t inputs, int64_t lines, int64_t from, int64_t to,
                     F take) {
    if (lines == 1) return products_of_line(weight, x, inputs, from, to, take);
#ifdef MULTIPLIES_BF16
    if constexpr (std::is_same<T, bfloat16>::value && !std::is_same<W, float>::value)
        products_of(weight, rounded(x, lines * inputs), inputs, lines, from, to, take);
    else
#endif
        products_of(weight, x, inputs, lines, from, to, take);
}
