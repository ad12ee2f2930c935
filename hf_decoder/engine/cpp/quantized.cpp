// Products and rows of packed weights, as Python calls them.

#include "quantized.h"

#ifndef PACKED_WEIGHTS
#error "packed weights are multiplied by CPUs with AVX2 or later"
#endif

// y (L, M) = x (L, N) times weights (M, N) of that format.
extern "C" void multiply(int64_t kind, const uint8_t *weight, const float *x, float *y, int64_t lines, int64_t inputs,
                         int64_t outputs, int64_t threads) {
    static thread_local std::vector<uint8_t> room;
    room.resize(Lines::bytes(lines, inputs));
    const Lines rounded(room.data(), inputs, lines);
    const int64_t tiles = (outputs + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        for (int64_t line = lines * thread / count; line < lines * (thread + 1) / count; line++)
            rounded.round(line, x + line * inputs);
#pragma omp barrier
        const int64_t from = tiles * thread / count * TILE;
        const int64_t to = std::min(tiles * (thread + 1) / count * TILE, outputs);
        packed_products(kind, weight, rounded, lines, from, to,
                        [&](int64_t line, int64_t output, float sum) { y[line * outputs + output] = sum; });
    }
}

// y (count, N): those rows of the weights.
extern "C" void unpack(int64_t kind, const uint8_t *weight, const int64_t *rows, float *y, int64_t count,
                       int64_t inputs, int64_t threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < count; i++) unpack_row(kind, weight, inputs, rows[i], y + i * inputs);
}
