"""What makes the C++ compile for vectors other than this CPU's own."""

import torch

# one lane after the other, the instructions that this CPU may lack
LANE_BY_LANE = r"""
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#define __AVX512F__ 1
#undef __AVX512BF16__
typedef int32_t Lanes __attribute__((vector_size(64)));
typedef float FloatLanes __attribute__((vector_size(64)));
template <class Number, class From> static inline __m512i widened(From from) {
    Number numbers[16];
    static_assert(sizeof numbers == sizeof from);
    std::memcpy(numbers, &from, sizeof numbers);
    Lanes lanes;
    for (int lane = 0; lane < 16; lane++) lanes[lane] = numbers[lane];
    return (__m512i)lanes;
}
static inline float added_up(__m512 x) {
    float all = 0;
    for (int lane = 0; lane < 16; lane++) all += ((FloatLanes)x)[lane];
    return all;
}
#define _mm512_cvtepu16_epi32 widened<uint16_t>
#define _mm512_cvtepi8_epi32 widened<int8_t>
#define _mm512_cvtepu8_epi32 widened<uint8_t>
#define _mm512_slli_epi32(x, bits) ((__m512i)((Lanes)(x) << (bits)))
#define _mm512_cvtepi32_ps(x) ((__m512)__builtin_convertvector((Lanes)(x), FloatLanes))
#define _mm512_reduce_add_ps added_up
#define _mm512_min_ps(a, b) ((__m512)((FloatLanes)(a) < (FloatLanes)(b) ? (FloatLanes)(a) : (FloatLanes)(b)))
#define _mm512_max_ps(a, b) ((__m512)((FloatLanes)(a) > (FloatLanes)(b) ? (FloatLanes)(a) : (FloatLanes)(b)))
"""
PAIR_BY_PAIR = r"""
#define __AVX512BF16__ 1
typedef uint16_t Halves __attribute__((vector_size(64)));
typedef uint16_t SixteenHalves __attribute__((vector_size(32)));
static inline Halves halves(const void *from) {
    Halves x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
static inline float wide(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static inline FloatLanes by_pairs(FloatLanes sums, Halves a, Halves b) {
    for (int i = 0; i < 32; i++) sums[i / 2] += wide(a[i]) * wide(b[i]);
    return sums;
}
static inline SixteenHalves rounded_lanes(FloatLanes x) {
    SixteenHalves y;
    for (int lane = 0; lane < 16; lane++) {
        uint32_t bits;
        std::memcpy(&bits, (const float *)&x + lane, 4);
        y[lane] = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    }
    return y;
}
#define _mm512_loadu_si512 halves
#define _mm512_dpbf16_ps(sums, a, b) ((__m512)by_pairs((FloatLanes)(sums), (Halves)(a), (Halves)(b)))
#define _mm512_cvtneps_pbh(x) rounded_lanes((FloatLanes)(x))
"""
CAPABILITY = torch.backends.cpu.get_cpu_capability()
# vectors other than this CPU's own
WIDTHS = {
    "of any CPU": "#undef __AVX512F__\n#undef __AVX2__\n",
    "AVX-512": LANE_BY_LANE,
    "AVX-512 with bf16": LANE_BY_LANE + PAIR_BY_PAIR,
    **({"AVX2": "#undef __AVX512F__\n"} if CAPABILITY == "AVX512" else {}),
}
