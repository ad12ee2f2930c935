// A product alone, by which the ways to read weights are compared on a machine.

#include "vectors.h"

// y (M,) of weights (M, N) and x (N,).
extern "C" void probe(const bfloat16 *weight, const float *x, float *y, int64_t outputs, int64_t inputs,
                      int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        products_of_line(weight, x, inputs, outputs * thread / count, outputs * (thread + 1) / count,
                         [=](int64_t, int64_t output, float sum) { y[output] = sum; });
    }
}
