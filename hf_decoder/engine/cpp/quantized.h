// Products of weights that stay in the blocks of a GGUF file with lines that are rounded to eight bits.
//
// Weights lie in tiles of eight rows: of each block the rows' scales side by side, then four columns of every row, the
// next four, and so on. So eight outputs are the lanes of a vector, a sum needs no adding across lanes, and one stream
// reads all of a thread's weights. A tile has the bytes of its rows' blocks in another order.
//
// A line is rounded in blocks of 32 numbers, each to a scale times an integer of -127 to 127, whatever format the
// weights have. A product sums integers within such a block, exactly, and adds up the blocks in fp32.
//
// Shapes: L lines, N inputs.
#pragma once

#include <cfloat>

#include "vectors.h"

#ifdef __AVX2__
#define PACKED_WEIGHTS

#define TILE 8  // rows of weights
#define PART 32  // columns that share the scale of a line
#define TILE_LINES 4
#define LINE_BYTES (1 << 17)  // of lines that stay in a core's cache while the weights pass by
#ifndef TILE_AHEAD
#define TILE_AHEAD 2048
#endif

// sums of four products each of unsigned and signed bytes, added to integers: of CPUs that have it, in one instruction
#ifndef FOUR_PRODUCTS
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define FOUR_PRODUCTS _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define FOUR_PRODUCTS _mm256_dpbusd_avx_epi32
#endif
#endif

struct Facts {  // of 32 numbers of a line: the scale of their codes, and it times the sum of all, and of either half
    float scale, sum, halves[2];
};

struct Lines {
    Facts *facts;   // (L, N / 32)
    int8_t *codes;  // (L, N)
    int64_t inputs;

    static int64_t bytes(int64_t lines, int64_t inputs) { return lines * inputs / PART * (PART + sizeof(Facts)); }
    Lines(void *room, int64_t inputs, int64_t lines)
        : facts((Facts *)room), codes((int8_t *)(facts + lines * inputs / PART)), inputs(inputs) {}

    // A line of numbers takes its place. What is no number, or infinite, makes the whole block none.
    void round(int64_t line, const float *x) const {
        for (int64_t block = 0; block < inputs / PART; block++, x += PART) {
            const int64_t at = line * (inputs / PART) + block;
            __m256 numbers[4], most = _mm256_setzero_ps(), nothing = _mm256_setzero_ps();
            for (int i = 0; i < 4; i++) {
                numbers[i] = _mm256_loadu_ps(x + 8 * i);
                most = _mm256_max_ps(most, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), numbers[i]));
                nothing = _mm256_add_ps(nothing, _mm256_mul_ps(numbers[i], _mm256_setzero_ps()));
            }
            const __m256 both = _mm256_max_ps(most, _mm256_permute2f128_ps(most, most, 1));
            const __m128 four = _mm256_castps256_ps128(_mm256_max_ps(both, _mm256_permute_ps(both, 0x4e)));
            const float top = std::max(four[0], four[1]);
            const float none = nothing[0] + nothing[1] + nothing[2] + nothing[3] + nothing[4] + nothing[5] +
                               nothing[6] + nothing[7];
            const float inverse = top > 127 * FLT_MIN ? 127 / top : 0;
            const float scale = (inverse ? top / 127 : 0) + none;
            __m256i wide[4];
            for (int i = 0; i < 4; i++)
                wide[i] = _mm256_cvtps_epi32(_mm256_mul_ps(numbers[i], _mm256_set1_ps(inverse)));
            const __m256i pairs[2] = {_mm256_packs_epi32(wide[0], wide[1]), _mm256_packs_epi32(wide[2], wide[3])};
            const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing keeps to halves of a vector
            const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(pairs[0], pairs[1]), order);
            _mm256_storeu_si256((__m256i *)(codes + at * PART), bytes);
            for (int half = 0; half < 2; half++) {
                const __m256i all = _mm256_add_epi32(wide[2 * half], wide[2 * half + 1]);
                const __m128i parts = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
                const __m128i two = _mm_add_epi32(parts, _mm_shuffle_epi32(parts, 0x4e));
                const int32_t sum = _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
                facts[at].halves[half] = scale * sum;
            }
            facts[at].scale = scale;
            facts[at].sum = facts[at].halves[0] + facts[at].halves[1];
        }
    }
};

static inline __m256i bytes_at(const uint8_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline __m256i low(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
static inline __m256i high(__m256i x) { return low(_mm256_srli_epi16(x, 4)); }
static inline __m256i bits(__m256i x, int left, int mask) {  // moved to the left, or, below 0, to the right
    const __m256i moved = left < 0 ? _mm256_srli_epi16(x, -left) : _mm256_slli_epi16(x, left);
    return _mm256_and_si256(moved, _mm256_set1_epi8(mask));
}
static inline __m256 halves(const uint8_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

// A format says of one block of a tile: the `codes` of four columns of a part, as unsigned bytes, of which ZERO stands
// for 0; the `scale` that they are multiplied by, one for all or one for either half of a part; and what is subtracted
// then, if it HAS_FLOOR. Of ADDED products of two codes each the sum fits in 16 bits.

struct Q8_0 {
    static constexpr int64_t COLUMNS = 32, BYTES = TILE * 34;
    static constexpr int ADDED = 0, HALVES = 1;  // signed bytes
    static constexpr bool HAS_FLOOR = false;
#ifdef FOUR_PRODUCTS
    static constexpr int ZERO_BITS = 7;
    __m256i codes(int, int four) const { return _mm256_xor_si256(raw(four), _mm256_set1_epi8(-128)); }
#else
    static constexpr int ZERO_BITS = 0;
    __m256i codes(int, int four) const { return raw(four); }
#endif
    const uint8_t *block;
    Q8_0(const uint8_t *block) : block(block) {}
    __m256i raw(int four) const { return bytes_at(block + 16 + 32 * four); }
    __m256 scale(int, int) const { return halves(block); }
    __m256 floor(int) const { return __m256{}; }
};

struct Q4_0 {
    static constexpr int64_t COLUMNS = 32, BYTES = TILE * 18;
    static constexpr int ADDED = 8, HALVES = 1, ZERO_BITS = 3;
    static constexpr bool HAS_FLOOR = false;
    const uint8_t *block;
    Q4_0(const uint8_t *block) : block(block) {}
    __m256i codes(int, int four) const {
        const __m256i pair = bytes_at(block + 16 + 32 * (four % 4));
        return four < 4 ? low(pair) : high(pair);
    }
    __m256 scale(int, int) const { return halves(block); }
    __m256 floor(int) const { return __m256{}; }
};

// Eight parts, whose scales and floors are six bits of 96, times one of the block's two.
struct Q4_K {
    static constexpr int64_t COLUMNS = 256, BYTES = TILE * 144;
    static constexpr int ADDED = 8, HALVES = 1, ZERO_BITS = 0;
    static constexpr bool HAS_FLOOR = true;
    const uint8_t *block;
    uint8_t scales[8 * TILE], floors[8 * TILE];
    Q4_K(const uint8_t *block) : block(block) {
        const __m256i a = bytes_at(block + 32), b = bytes_at(block + 64), c = bytes_at(block + 96);
        _mm256_storeu_si256((__m256i *)scales, bits(a, 0, 63));
        _mm256_storeu_si256((__m256i *)floors, bits(b, 0, 63));
        _mm256_storeu_si256((__m256i *)(scales + 4 * TILE), _mm256_or_si256(low(c), bits(a, -2, 48)));
        _mm256_storeu_si256((__m256i *)(floors + 4 * TILE), _mm256_or_si256(high(c), bits(b, -2, 48)));
    }
    static __m256 wide(const uint8_t *from) {
        return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
    }
    static __m256i nibbles(const uint8_t *from, int part, int four) {
        const __m256i pair = bytes_at(from + 32 * (part / 2 * 8 + four));
        return part % 2 ? high(pair) : low(pair);
    }
    __m256i codes(int part, int four) const { return nibbles(block + 128, part, four); }
    __m256 scale(int part, int) const { return halves(block) * wide(scales + TILE * part); }
    __m256 floor(int part) const { return halves(block + 16) * wide(floors + TILE * part); }
};

struct Q5_K : Q4_K {
    static constexpr int64_t BYTES = TILE * 176;
    static constexpr int ADDED = 4;
    using Q4_K::Q4_K;
    __m256i codes(int part, int four) const {
        const __m256i top = bits(bytes_at(block + 128 + 32 * four), 4 - part, 16);
        return _mm256_or_si256(nibbles(block + 384, part, four), top);
    }
};

struct Q6_K {
    static constexpr int64_t COLUMNS = 256, BYTES = TILE * 210;
    static constexpr int ADDED = 2, HALVES = 2, ZERO_BITS = 5;
    static constexpr bool HAS_FLOOR = false;
    const uint8_t *block;
    Q6_K(const uint8_t *block) : block(block) {}
    __m256i codes(int part, int four) const {
        const int of = part / 4, quarter = part % 4;
        const __m256i pair = bytes_at(block + 32 * (16 * of + 8 * (quarter % 2) + four));
        const __m256i top = bits(bytes_at(block + 1024 + 32 * (8 * of + four)), 4 - 2 * quarter, 48);
        return _mm256_or_si256(quarter < 2 ? low(pair) : high(pair), top);
    }
    __m256 scale(int part, int half) const {
        const __m128i eight = _mm_loadl_epi64((const __m128i *)(block + 1536 + TILE * (2 * part + half)));
        return halves(block + 1664) * _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    }
    __m256 floor(int) const { return __m256{}; }
};

// Keeps a sum where it is made: a compiler that puts off adding spills the products of all lines.
static inline void keep(__m256i &sum) { asm("" : "+x"(sum)); }

// dots (LINES,) += the products of one part, or half of it, of a block with as many lines.
template <class F, int LINES>
static inline void add_products(const F &block, int part, int half, const int8_t *const *x, __m256i *dots) {
    constexpr int FOURS = PART / 4 / F::HALVES;
    const __m256i ones = _mm256_set1_epi16(1);
    const auto numbers = [&](int line, int four) {
        int32_t four_codes;
        std::memcpy(&four_codes, x[line] + 4 * four, 4);
        return _mm256_set1_epi32(four_codes);
    };
    (void)ones;
#ifdef FOUR_PRODUCTS
#pragma GCC unroll 8
    for (int four = half * FOURS; four < (half + 1) * FOURS; four++) {
        const __m256i codes = block.codes(part, four);
#pragma GCC unroll 8
        for (int line = 0; line < LINES; line++) {
            dots[line] = FOUR_PRODUCTS(dots[line], codes, numbers(line, four));
            keep(dots[line]);
        }
    }
#else
    if constexpr (F::ADDED == 0) {
#pragma GCC unroll 8
        for (int four = half * FOURS; four < (half + 1) * FOURS; four++) {
            const __m256i codes = block.codes(part, four), sizes = _mm256_abs_epi8(codes);
#pragma GCC unroll 8
            for (int line = 0; line < LINES; line++) {
                const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(numbers(line, four), codes));
                dots[line] = _mm256_add_epi32(dots[line], _mm256_madd_epi16(pairs, ones));
                keep(dots[line]);
            }
        }
        return;
    }
    constexpr int ADDED = F::ADDED ? std::min(F::ADDED, FOURS) : FOURS;
#pragma GCC unroll 8
    for (int first = half * FOURS; first < (half + 1) * FOURS; first += ADDED) {
        __m256i pairs[LINES];
#pragma GCC unroll 8
        for (int four = first; four < first + ADDED; four++) {
            const __m256i codes = block.codes(part, four);
#pragma GCC unroll 8
            for (int line = 0; line < LINES; line++) {
                const __m256i products = _mm256_maddubs_epi16(codes, numbers(line, four));
                pairs[line] = four == first ? products : _mm256_add_epi16(pairs[line], products);
                keep(pairs[line]);
            }
        }
#pragma GCC unroll 8
        for (int line = 0; line < LINES; line++)
            dots[line] = _mm256_add_epi32(dots[line], _mm256_madd_epi16(pairs[line], ones));
    }
#endif
}

// y (LINES, TILE): the products of a tile with lines from that one on.
template <class F, int LINES>
static __attribute__((noinline)) void tile_products(const uint8_t *tile, const Lines &x, int64_t line, float *y) {
    constexpr int PARTS = F::COLUMNS / PART;
    const int64_t parts = x.inputs / PART;
    const int8_t *codes[LINES];
    const Facts *facts[LINES];
    __m256 totals[LINES] = {};
    for (int of = 0; of < LINES; of++) {
        codes[of] = x.codes + (line + of) * x.inputs;
        facts[of] = x.facts + (line + of) * parts;
    }
    for (int64_t at = 0; at < parts; at += PARTS, tile += F::BYTES) {
#if PREFETCH_LOCALITY >= 0
        if (LINES == 1)
            for (int64_t i = 0; i < F::BYTES; i += 64)
                __builtin_prefetch(tile + TILE_AHEAD + i, 0, PREFETCH_LOCALITY);
#endif
        const F block(tile);
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; part++) {
#pragma GCC unroll 2
            for (int half = 0; half < F::HALVES; half++) {
                __m256i dots[LINES] = {};
                add_products<F, LINES>(block, part, half, codes, dots);
                const __m256 scale = block.scale(part, half), zero = scale * (float)(1 << F::ZERO_BITS);
#pragma GCC unroll 8
                for (int of = 0; of < LINES; of++) {
                    totals[of] += _mm256_cvtepi32_ps(dots[of]) * (scale * facts[of]->scale);
                    if (F::ZERO_BITS) totals[of] -= zero * (F::HALVES == 2 ? facts[of]->halves[half] : facts[of]->sum);
                }
            }
            const __m256 floor = block.floor(part);
#pragma GCC unroll 8
            for (int of = 0; of < LINES; of++) {
                if (F::HAS_FLOOR) totals[of] -= floor * facts[of]->sum;
                codes[of] += PART;
                facts[of]++;
            }
        }
    }
    for (int of = 0; of < LINES; of++) _mm256_storeu_ps(y + TILE * of, totals[of]);
}

// The same of `lines` lines, LINES at most.
template <class F, int LINES>
static void tile_products_of(int64_t lines, const uint8_t *tile, const Lines &x, int64_t line, float *y) {
    if constexpr (LINES > 1)
        if (lines < LINES) return tile_products_of<F, LINES - 1>(lines, tile, x, line, y);
    tile_products<F, LINES>(tile, x, line, y);
}

// The outputs `from` to `to` of so many lines, each handed to `take` with its line.
template <class F, class Take>
static void products_by(const uint8_t *weight, const Lines &x, int64_t lines, int64_t from, int64_t to, Take take) {
    const int64_t bytes = x.inputs / F::COLUMNS * F::BYTES;
    const int64_t block = std::max<int64_t>(1, LINE_BYTES / x.inputs / TILE_LINES) * TILE_LINES;
    float y[TILE_LINES * TILE];
    for (int64_t start = 0; start < lines; start += block)
        for (int64_t tile = from / TILE * TILE; tile < to; tile += TILE)
            for (int64_t line = start; line < std::min(start + block, lines); line += TILE_LINES) {
                const int64_t count = std::min<int64_t>(TILE_LINES, std::min(start + block, lines) - line);
                tile_products_of<F, TILE_LINES>(count, weight + tile / TILE * bytes, x, line, y);
                for (int64_t of = 0; of < count; of++)
                    for (int64_t i = std::max(from - tile, (int64_t)0); i < std::min<int64_t>(TILE, to - tile); i++)
                        take(line + of, tile + i, y[of * TILE + i]);
            }
}

// One row of the weights, as numbers.
template <class F> static void unpack_row_of(const uint8_t *weight, int64_t inputs, int64_t row, float *y) {
    const uint8_t *block = weight + row / TILE * (inputs / F::COLUMNS * F::BYTES);
    for (int64_t i = 0; i < inputs; block += F::BYTES) {
        const F of(block);
        for (int part = 0; part < F::COLUMNS / PART; part++)
            for (int four = 0; four < PART / 4; four++, i += 4) {
                float scale[TILE], floor[TILE];
                uint8_t codes[4 * TILE];
                _mm256_storeu_ps(scale, of.scale(part, four * F::HALVES * 4 / PART));
                _mm256_storeu_ps(floor, of.floor(part));
                _mm256_storeu_si256((__m256i *)codes, of.codes(part, four));
                for (int column = 0; column < 4; column++) {
                    const uint8_t code = codes[row % TILE * 4 + column];
                    const int zero = F::ZERO_BITS ? 1 << F::ZERO_BITS : 0;
                    const int whole = F::ADDED || F::ZERO_BITS ? code - zero : (int8_t)code;
                    y[i + column] = scale[row % TILE] * whole - floor[row % TILE];
                }
            }
    }
}

// Calls what is given with a pointer that has the type of the format of that number, as GGUF numbers them.
template <class Call> static void by_format(int64_t kind, Call call) {
    switch (kind) {
        case 2: return call((const Q4_0 *)nullptr);
        case 8: return call((const Q8_0 *)nullptr);
        case 12: return call((const Q4_K *)nullptr);
        case 13: return call((const Q5_K *)nullptr);
        case 14: return call((const Q6_K *)nullptr);
    }
}

// What is above, of weights of that format.
template <class Take>
static void packed_products(int64_t kind, const uint8_t *weight, const Lines &x, int64_t lines, int64_t from,
                            int64_t to, Take take) {
    by_format(kind, [&](auto *format) {
        products_by<std::remove_const_t<std::remove_pointer_t<decltype(format)>>>(weight, x, lines, from, to, take);
    });
}

static inline void unpack_row(int64_t kind, const uint8_t *weight, int64_t inputs, int64_t row, float *y) {
    by_format(kind, [&](auto *format) {
        unpack_row_of<std::remove_const_t<std::remove_pointer_t<decltype(format)>>>(weight, inputs, row, y);
    });
}

#endif
