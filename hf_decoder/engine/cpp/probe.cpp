// A product alone, by which the ways to read weights are compared on a machine.

#include "vectors.h"

// y (L, M) of weights (M, N) and x (L, N).
extern "C" void probe(const bfloat16 *weight, const float *x, float *y, int64_t lines, int64_t outputs, int64_t inputs,
                      int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        products<bfloat16>(weight, x, inputs, lines, outputs * thread / count, outputs * (thread + 1) / count,
                 [=](int64_t line, int64_t output, float sum) { y[line * outputs + output] = sum; });
    }
}
