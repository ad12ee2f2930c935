// Products of weights that torchao has rounded to four bits, in the order in which torch packs them for a CPU.
//
// Blocks of 32 or 64 outputs follow each other. In a block one column follows another, one byte for two outputs: the
// low four bits of byte j are the code of output j, the high ones that of output j + BLOCK / 2. The weight of a code is
// (code - 8) * scale + zero, with one scale and one zero for an output's group of columns. A product sums codes times
// inputs within a group, and adds up the groups. All is exact but for fp32's rounding: inputs keep their precision.
//
// Shapes: L lines, M outputs, N inputs.
#pragma once

#include "vectors.h"

template <class T> struct Int4 {
    const uint8_t *codes;  // (M / BLOCK, N, BLOCK / 2)
    const T *scales;       // (N / group, M, 2): scale and zero
    int64_t group, outputs, inputs;
};

static inline Integers wide_bytes(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Integers)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif defined(__AVX2__)
    return (Integers)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    Bytes x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Integers);
#endif
}

// Scales and zeros of LANES outputs, which lie in turn.
static inline void scales_at(const bfloat16 *from, Floats &scale, Floats &zero) {
    Integers pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    scale = (Floats)(pairs << 16);
    zero = (Floats)(pairs & (int32_t)0xffff0000);
}
static inline void scales_at(const float *from, Floats &scale, Floats &zero) {
#if defined(__AVX2__) && LANES == 8  // in five instructions, which GCC does not find
    const __m256 a = _mm256_loadu_ps(from), b = _mm256_loadu_ps(from + LANES);
    scale = (Floats)_mm256_permute4x64_pd((__m256d)_mm256_shuffle_ps(a, b, 0x88), 0xd8);
    zero = (Floats)_mm256_permute4x64_pd((__m256d)_mm256_shuffle_ps(a, b, 0xdd), 0xd8);
#else
    typedef uint64_t Pairs __attribute__((vector_size(8 * LANES)));
    typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
    Pairs pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    scale = (Floats)__builtin_convertvector(pairs, Words);
    zero = (Floats)__builtin_convertvector(pairs >> 32, Words);
#endif
}

// y (LINES, BLOCK): the products of the block that begins with that output and lines x, whose sums of groups are
// (L, N / group).
template <int BLOCK, int LINES, class T>
static __attribute__((noinline)) void int4_block(const Int4<T> &weights, int64_t output, const float *x,
                                                 const float *sums_of_x, float *y) {
    constexpr int PARTS = BLOCK / LANES;
    const int64_t inputs = weights.inputs, groups = inputs / weights.group;
    const uint8_t *codes = weights.codes + output * inputs / 2;
    const T *scales = weights.scales + 2 * output;
    Floats totals[LINES][PARTS] = {};
    for (int64_t group = 0; group < groups; group++, scales += 2 * weights.outputs) {
        Floats sums[LINES][PARTS] = {};
        for (int64_t i = group * weights.group; i < (group + 1) * weights.group; i++, codes += BLOCK / 2) {
            if (LINES == 1 && i % (128 / BLOCK) == 0) ask_ahead<1>(codes, 0);
            Floats columns[PARTS];
#pragma GCC unroll 4
            for (int part = 0; part < PARTS / 2; part++) {
                const Integers pair = wide_bytes(codes + part * LANES);
                columns[part] = __builtin_convertvector(pair & 15, Floats);
                columns[part + PARTS / 2] = __builtin_convertvector(pair >> 4, Floats);
            }
#pragma GCC unroll 4
            for (int line = 0; line < LINES; line++)
#pragma GCC unroll 8
                for (int part = 0; part < PARTS; part++) sums[line][part] += columns[part] * x[line * inputs + i];
        }
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; part++) {
            Floats scale, zero;
            // groups lie too far apart for the hardware to read ahead
            if (LINES == 1) __builtin_prefetch(scales + 2 * (4 * weights.outputs + part * LANES));
            scales_at(scales + 2 * part * LANES, scale, zero);
            zero -= 8 * scale;  // by which every code is too high
            for (int line = 0; line < LINES; line++)
                totals[line][part] += sums[line][part] * scale + zero * sums_of_x[line * groups + group];
        }
    }
    for (int line = 0; line < LINES; line++)
        for (int part = 0; part < PARTS; part++) store(y + line * BLOCK + part * LANES, totals[line][part]);
}

template <int BLOCK, class T, class F>
static void int4_blocks(const Int4<T> &weights, const float *x, const float *sums_of_x, int64_t lines, int64_t from,
                        int64_t to, F take) {
    constexpr int LINES = std::max(1, LANES * LANES / BLOCK);  // whose sums fit in the registers
    const int64_t groups = weights.inputs / weights.group;
    float y[LINES * BLOCK];
    for (int64_t block = from / BLOCK * BLOCK; block < to; block += BLOCK)
        for (int64_t line = 0, count; line < lines; line += count) {
            count = line + LINES <= lines ? LINES : 1;
            const auto block_of = count > 1 ? int4_block<BLOCK, LINES, T> : int4_block<BLOCK, 1, T>;
            block_of(weights, block, x + line * weights.inputs, sums_of_x + line * groups, y);
            for (int64_t of = 0; of < count; of++)
                for (int64_t output = std::max(from, block); output < std::min(to, block + BLOCK); output++)
                    take(line + of, output, y[of * BLOCK + output - block]);
        }
}

// The sums of groups of x (L, N), in this thread's own room, until the next call.
static const float *sums_of_groups(const float *x, int64_t count, int64_t group) {
    static thread_local std::vector<float> sums;
    sums.resize(count);
    for (int64_t i = 0; i < count; i++, x += group) {
        Floats all = {};
        int64_t at = 0;
        for (; at + LANES <= group; at += LANES) all += load(x + at);
        sums[i] = sum(all);
        for (; at < group; at++) sums[i] += x[at];
    }
    return sums.data();
}

// The outputs `from` to `to` of lines x (L, N), each handed to `take` with its line.
template <class T, class F>
static void int4_products(const Int4<T> &weights, int64_t block, const float *x, int64_t lines, int64_t from,
                          int64_t to, F take) {
    if (from >= to) return;
    const float *sums = sums_of_groups(x, lines * weights.inputs / weights.group, weights.group);
    if (block == 32)
        int4_blocks<32>(weights, x, sums, lines, from, to, take);
    else
        int4_blocks<64>(weights, x, sums, lines, from, to, take);
}
