// What stands between the matrix products of a training step on a CPU: each tensor is read and written once.
//
// Numbers are float or bfloat16 in memory, and float in between. Rows are shared among the threads.
// Shapes: N rows, D hidden_size, F intermediate_size, V vocab_size; B batch, S tokens, H heads, E head_dim, R its
// rotated part.

#include "vectors.h"

// Calls `function` with a number of each of the types that are stored.
template <class F> static void with_types(F function) { function(); }
template <class F, class... Rest> static void with_types(F function, bool is_half, Rest... rest) {
    const auto with = [&](auto first) {
        with_types([&](auto... others) { function(first, others...); }, rest...);
    };
    if (is_half)
        with(bfloat16{});
    else
        with(0.0f);
}

// The vector at `from`, filled up with zeros where fewer numbers are left.
template <class T> static inline Floats load(const T *from, int64_t left) {
    if (left >= LANES) return load(from);
    Floats x{};
    for (int64_t i = 0; i < left; i++) x[i] = number(from[i]);
    return x;
}

template <class T> static inline void store(T *to, Floats x, int64_t left) {
    if (left >= LANES) return store(to, x);
    for (int64_t i = 0; i < left; i++) put(to + i, x[i]);
}

template <class T> static inline Floats rounded_to(Floats x) {
    T places[LANES];
    store(places, x);
    return load(places);
}
template <> inline Floats rounded_to<float>(Floats x) { return x; }

// Where this thread's share of so many rows, or vectors, starts and ends.
struct Share {
    int64_t from, to;
    explicit Share(int64_t count) {
        const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        from = count * thread / threads;
        to = count * (thread + 1) / threads;
    }
};

// output (N, D) = weight (D,) * x (N, D) / its root mean square, whose inverse is kept as scales (N,).
extern "C" void rms_norm(const void *x_, const void *weight_, void *output_, float *scales, int64_t rows,
                         int64_t width, double epsilon, bool x_half, bool weight_half, bool output_half,
                         int64_t threads) {
    const auto norm = [&](auto x_number, auto weight_number, auto output_number) {
        typedef decltype(x_number) T;
        const auto *weight = (const decltype(weight_number) *)weight_;
#pragma omp parallel num_threads(threads)
        for (Share share(rows); share.from < share.to; share.from++) {
            const T *x = (const T *)x_ + share.from * width;
            auto *output = (decltype(output_number) *)output_ + share.from * width;
            Floats squares[2] = {};
            int64_t i = 0;
            for (; i + 2 * LANES <= width; i += 2 * LANES)
                for (int part = 0; part < 2; part++) {
                    const Floats numbers = load(x + i + part * LANES);
                    squares[part] += numbers * numbers;
                }
            for (; i < width; i += LANES) {
                const Floats numbers = load(x + i, width - i);
                squares[0] += numbers * numbers;
            }
            const float scale = 1.0f / std::sqrt(sum(squares[0] + squares[1]) / width + (float)epsilon);
            scales[share.from] = scale;
            for (i = 0; i < width; i += LANES) {
                const Floats normed = rounded_to<T>(load(x + i, width - i) * scale);
                store(output + i, load(weight + i, width - i) * normed, width - i);
            }
        }
    };
    with_types(norm, x_half, weight_half, output_half);
}

// The gradients of x, and of the weight from the rows of each thread (threads, D), from those of all readers.
extern "C" void rms_norm_gradients(const void *const *grads, int64_t readers, const void *x_, const void *weight_,
                                   const float *scales, void *grad_x_, float *grad_weights, int64_t rows,
                                   int64_t width, bool x_half, bool weight_half, bool grad_half, int64_t threads) {
    const auto gradients = [&](auto x_number, auto weight_number, auto grad_number) {
        typedef decltype(x_number) T;
        const auto *weight = (const decltype(weight_number) *)weight_;
#pragma omp parallel num_threads(threads)
        for (Share share(rows); share.from < share.to; share.from++) {
            float *grad_weight = grad_weights + omp_get_thread_num() * width;
            const int64_t start = share.from * width;
            const T *x = (const T *)x_ + start;
            const float scale = scales[share.from];
            const auto gradient = [&](int64_t i) {
                Floats total{};
                for (int64_t of = 0; of < readers; of++)
                    total += load((const decltype(grad_number) *)grads[of] + start + i, width - i);
                return total;
            };
            Floats sums{};
            for (int64_t i = 0; i < width; i += LANES) {
                const Floats along = gradient(i) * load(x + i, width - i) * scale;
                store(grad_weight + i, load(grad_weight + i, width - i) + along, width - i);
                sums += along * load(weight + i, width - i);
            }
            if (!grad_x_) continue;
            const float along = sum(sums) / width * scale;  // scaling a row does not change its norm
            T *grad_x = (T *)grad_x_ + start;
            for (int64_t i = 0; i < width; i += LANES) {
                const Floats grad = gradient(i) * load(weight + i, width - i);
                store(grad_x + i, (grad - load(x + i, width - i) * along) * scale, width - i);
            }
        }
    };
    with_types(gradients, x_half, weight_half, grad_half);
}

struct Rotation {
    int64_t batch, heads, length, width, rotated;
    int64_t batch_stride, head_stride, token_stride, angle_stride;  // angle_stride: from row to row, or 0
    int64_t backwards, threads;
};

// Rotates x (B, H, S, E) of these strides by the angles (B or 1, S, R), or rotates it back, to output (B, S, H, E).
extern "C" void rotate(const Rotation *of, const void *x_, const void *cos_, const void *sin_, void *output_,
                       bool x_half, bool angles_half, bool output_half) {
    const auto rotate = [&](auto x_number, auto angle_number, auto output_number) {
        typedef decltype(angle_number) A;
        const int64_t half = of->rotated / 2;
#pragma omp parallel num_threads(of->threads)
        for (Share share(of->batch * of->length); share.from < share.to; share.from++) {
            const int64_t row = share.from / of->length, token = share.from % of->length;
            const int64_t angle = row * of->angle_stride + token * of->rotated;
            const int64_t start = row * of->batch_stride + token * of->token_stride;
            const A *cos = (const A *)cos_ + angle, *sin = (const A *)sin_ + angle;
            for (int64_t head = 0; head < of->heads; head++) {
                const auto *x = (const decltype(x_number) *)x_ + start + head * of->head_stride;
                auto *output = (decltype(output_number) *)output_ + (share.from * of->heads + head) * of->width;
                for (int64_t i = 0; i < half; i += LANES) {
                    const int64_t left = half - i;
                    const Floats a = load(x + i, left), b = load(x + half + i, left);
                    Floats to_a = -load(sin + i, left), to_b = load(sin + half + i, left);
                    if (of->backwards) std::swap(to_a, to_b);
                    store(output + i, a * load(cos + i, left) + b * to_a, left);
                    store(output + half + i, b * load(cos + half + i, left) + a * to_b, left);
                }
                for (int64_t i = of->rotated; i < of->width; i += LANES)
                    store(output + i, load(x + i, of->width - i), of->width - i);
            }
        }
    };
    with_types(rotate, x_half, angles_half, output_half);
}

// silu(gate) * up to `output`; where there is a gradient of that, the gradients of gate and up.
extern "C" void gate(const void *gate_, const void *up_, const void *grad_, void *output_, void *output_up_,
                     int64_t count, bool is_half, int64_t threads) {
    const auto gated = [&](auto one) {
        typedef decltype(one) T;
        const T *gate = (const T *)gate_, *up = (const T *)up_, *grad = (const T *)grad_;
        T *output = (T *)output_, *output_up = (T *)output_up_;
#pragma omp parallel num_threads(threads)
        for (Share share((count + LANES - 1) / LANES); share.from < share.to; share.from++) {
            const int64_t i = share.from * LANES, left = count - i;
            const Floats x = load(gate + i, left), y = load(up + i, left);
            Floats sigmoid = 1.0f / (1.0f + exponential(-x));
            sigmoid = x < -88.0f ? Floats{} : sigmoid;  // where the exponential has its largest value
            if (!grad) {
                store(output + i, x * sigmoid * y, left);
                continue;
            }
            const Floats g = load(grad + i, left);
            if (output) store(output + i, g * y * sigmoid * (1.0f + x * (1.0f - sigmoid)), left);
            if (output_up) store(output_up + i, g * x * sigmoid, left);
        }
    };
    with_types(gated, is_half);
}

// The loss of each row of logits (N, V), which become their gradient if it is needed.
extern "C" void cross_entropy(void *all_logits, const int64_t *targets, float *losses, int64_t rows, int64_t entries,
                              int64_t ignored, double z_loss, bool needs_gradient, bool is_half, int64_t threads) {
    const auto losses_of = [&](auto one) {
        typedef decltype(one) T;
#pragma omp parallel num_threads(threads)
        {
            std::vector<float> room(std::is_same<T, float>::value || !needs_gradient ? 0 : entries);
            for (Share share(rows); share.from < share.to; share.from++) {
                T *logits = (T *)all_logits + share.from * entries;
                const int64_t target = targets[share.from];
                if (target == ignored) {
                    losses[share.from] = 0.0f;
                    if (needs_gradient) std::fill(logits, logits + entries, T{});
                    continue;
                }
                float *powers = std::is_same<T, float>::value ? (float *)logits : room.data();
                const float score = number(logits[target]);
                Floats most = Floats{} + score, sums{};
                int64_t i = 0;
                for (; i + LANES <= entries; i += LANES) {
                    const Floats x = load(logits + i);
                    most = x > most ? x : most;
                }
                float largest = score, total = 0.0f;
                for (int lane = 0; lane < LANES; lane++) largest = std::max(largest, most[lane]);
                for (; i < entries; i++) largest = std::max(largest, number(logits[i]));
                for (i = 0; i + LANES <= entries; i += LANES) {
                    const Floats power = exponential(load(logits + i) - largest);
                    sums += power;
                    if (needs_gradient) store(powers + i, power);
                }
                for (; i < entries; i++) {
                    const float power = exponential(number(logits[i]) - largest);
                    total += power;
                    if (needs_gradient) powers[i] = power;
                }
                total += sum(sums);
                const float log_total = std::log(total), log_partition = largest + log_total;
                losses[share.from] = largest - score + log_total + (float)z_loss * log_partition * log_partition;
                if (!needs_gradient) continue;
                const float scale = (1.0f + 2.0f * (float)z_loss * log_partition) / total;
                const float of_target = powers[target] * scale - 1.0f;
                for (i = 0; i < entries; i += LANES)
                    store(logits + i, load(powers + i, entries - i) * scale, entries - i);
                put(logits + target, of_target);
            }
        }
    };
    with_types(losses_of, is_half);
}
