"""The decoding step of a few rows on a CPU in C++: what the compiler is given.

A step reads each weight once and has little else to do, so it is one parallel region: threads share the outputs of
every product, norm the token each for itself, and meet five times a layer. Weights are read in their own type and all
else is fp32; keys and values are rounded to the type of the cache, logits to that of the weights.

Shapes: B rows, D hidden_size, H query heads, G key/value heads, E head_dim, R its rotated part, F intermediate_size, V
vocab_size, K cached tokens and the new one; M outputs and N inputs of a product.
"""

SOURCE = r"""
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

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

// Of narrow weights what lies two kilobytes ahead is asked for; wide ones arrive as fast without.
template <class W> static inline void ask_ahead(const W *from, int64_t i) {
    if (sizeof(W) < 4 && i * sizeof(W) % 64 == 0) __builtin_prefetch((const char *)from + 2048);
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

template <class W>
static inline void dots(const W *row, const float *x, int64_t count, int64_t stride, int64_t rows, float *y) {
    int64_t of = 0;
    for (; of + 8 <= rows; of += 8) dots<8>(row, x + of * stride, count, stride, y + of);
    for (; of + 4 <= rows; of += 4) dots<4>(row, x + of * stride, count, stride, y + of);
    for (; of + 2 <= rows; of += 2) dots<2>(row, x + of * stride, count, stride, y + of);
    if (of < rows) y[of] = dot(row, x + of * stride, count);
}

// What Python writes, eight bytes a field.

struct Norm {
    const void *weight;
    double epsilon;
};

struct Product {
    const void *weight;  // (M, N), int8 where there are scales
    const void *scales;  // (M,), in fp32 if they are wide
    const void *bias;    // (M,)
    int64_t wide, outputs, inputs;
};

struct Layer {
    Norm input_norm, query_norm, key_norm, mlp_norm;  // those of heads may be without weight: none
    Product query, key, value, output, gate, up, down;
    int64_t rotates;
};

struct Step {
    const Layer *layers;
    const void *embedding;  // (V, D)
    Norm norm;
    Product head;
    const float *frequencies;  // (R / 2,)
    double rotary_scale, score_scale, cap;  // a cap of 0: none
    int64_t rows, depth, size, heads, groups, width, rotated, inner;  // B, layers, D, H, G, E, R, F
};

struct Buffers {  // of one layer of a static cache
    int64_t keys, values;  // addresses, of (B, G, length, E) each
    int64_t filled;        // address of an int64
    int64_t unused;
};

struct State {  // of one row
    int64_t past, position, first, length, text;  // cached tokens; of the new one; the first seen; room; an address
};

template <class T> static void normed(const Norm &norm, const float *x, int64_t size, float *y) {
    const T *weight = (const T *)norm.weight;
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / size + (float)norm.epsilon);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * number(weight[i]);
}

// The outputs `from` to `to` of x (B, N), each handed to `take` with its row.
template <class T, class F>
static void multiply(const Product &of, const float *x, int64_t rows, int64_t from, int64_t to, F take) {
    const T *bias = (const T *)of.bias;
    float y[MAX_ROWS];
    for (int64_t output = from; output < to; output++) {
        float scale = 1;
        if (of.scales) {
            scale = of.wide ? ((const float *)of.scales)[output] : number(((const T *)of.scales)[output]);
            dots((const int8_t *)of.weight + output * of.inputs, x, of.inputs, of.inputs, rows, y);
        } else {
            dots((const T *)of.weight + output * of.inputs, x, of.inputs, of.inputs, rows, y);
        }
        for (int64_t row = 0; row < rows; row++)
            take(row, output, y[row] * scale + (bias ? number(bias[output]) : 0.0f));
    }
}

struct Team {
    int64_t thread, threads;

    // where a thread's share of some outputs starts; the next one's start is its end
    int64_t start(int64_t count, int64_t of) const { return of == threads ? count : count * of / threads / 16 * 16; }
    int64_t from(int64_t count) const { return start(count, thread); }
    int64_t to(int64_t count) const { return start(count, thread + 1); }
};

// What threads share, (B, D), (B, (H + 2 G) E), (B, H E) and twice (B, F) in fp32.
struct Shared {
    float *hidden, *heads, *attended, *gate, *up;

    Shared(const Step &step, float *room) {
        hidden = room;
        heads = hidden + step.rows * step.size;
        attended = heads + step.rows * (step.heads + 2 * step.groups) * step.width;
        gate = attended + step.rows * step.heads * step.width;
        up = gate + step.rows * step.inner;
    }
};

// A query or key as attention sees it: normed, then turned by the angles of its position.
template <class T>
static void prepare(const Step &step, const Layer &layer, const Norm &norm, const float *angles, float *x, float *y) {
    if (norm.weight)
        normed<T>(norm, x, step.width, y);
    else
        std::copy(x, x + step.width, y);
    const int64_t half = step.rotated / 2;
    for (int64_t i = 0; layer.rotates && i < half; i++) {
        const float a = y[i], b = y[i + half], cos = angles[i], sin = angles[i + half];
        y[i] = a * cos - b * sin;
        y[i + half] = b * cos + a * sin;
    }
}

// One query head over the keys from `first` to `past`, the last of which is not yet in the cache.
template <class T>
static void attend(const float *query, const T *keys, const T *values, const float *key, const float *value,
                   int64_t first, int64_t past, int64_t width, float *scores, float *y) {
    const int64_t count = past - first + 1;
    for (int64_t k = 0; k < count - 1; k++) scores[k] = dot(keys + (first + k) * width, query, width);
    scores[count - 1] = dot(key, query, width);
    const float highest = *std::max_element(scores, scores + count);
    float total = 0;
    int64_t k = 0;
    for (Floats sums = {}; k + LANES <= count; k += LANES) {
        const Floats weights = exponential(load(scores + k) - highest);
        store(scores + k, weights);
        sums += weights;
        if (k + 2 * LANES > count) total = sum(sums);
    }
    for (; k < count; k++) total += scores[k] = exponential(scores[k] - highest);
    const float scale = 1 / total;
    int64_t e = 0;
    for (; e + 4 * LANES <= width; e += 4 * LANES) {
        Floats sums[4];
        for (int part = 0; part < 4; part++) sums[part] = scores[count - 1] * load(value + e + part * LANES);
        for (k = 0; k < count - 1; k++) {
            const T *row = values + (first + k) * width + e;
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) sums[part] += scores[k] * load(row + part * LANES);
        }
        for (int part = 0; part < 4; part++) store(y + e + part * LANES, sums[part] * scale);
    }
    for (; e < width; e++) {
        float all = scores[count - 1] * value[e];
        for (k = 0; k < count - 1; k++) all += scores[k] * number(values[(first + k) * width + e]);
        y[e] = all * scale;
    }
}

template <class T>
static void attend_heads(const Step &step, const Layer &layer, const Buffers &buffers, const State *states,
                         const float *angles, const Shared &shared, const Team &team) {
    static thread_local std::vector<float> room;
    const int64_t width = step.width, heads = step.heads, groups = step.groups, per_group = heads / groups;
    const int64_t past = states->past, all = step.rows * heads;
    room.resize(3 * width + past + 1);
    float *query = room.data(), *key = query + width, *value = key + width, *scores = value + width;
    int64_t group = -1;  // of all rows' groups
    for (int64_t head = all * team.thread / team.threads; head < all * (team.thread + 1) / team.threads; head++) {
        const int64_t row = head / heads, head_of_row = head % heads;
        const float *turn = angles + row * step.rotated;
        float *of_row = shared.heads + row * (heads + 2 * groups) * width;
        T *keys = (T *)buffers.keys + head / per_group * states->length * width;
        T *values = (T *)buffers.values + head / per_group * states->length * width;
        if (head / per_group != group) {  // every thread makes its own key; that of the group's first head stores it
            group = head / per_group;
            prepare<T>(step, layer, layer.key_norm, turn, of_row + (heads + group % groups) * width, key);
            const float *new_value = of_row + (heads + groups + group % groups) * width;
            for (int64_t e = 0; e < width; e++) {
                T rounded[2];
                put(rounded, key[e]);
                put(rounded + 1, new_value[e]);
                key[e] = number(rounded[0]);
                value[e] = number(rounded[1]);
                if (head % per_group == 0) {
                    keys[past * width + e] = rounded[0];
                    values[past * width + e] = rounded[1];
                }
            }
        }
        prepare<T>(step, layer, layer.query_norm, turn, of_row + head_of_row * width, query);
        for (int64_t e = 0; e < width; e++) query[e] *= (float)step.score_scale;
        float *y = shared.attended + head * width;
        attend(query, keys, values, key, value, states[row].first, past, width, scores, y);
    }
}

static void gate_and_up(float *gate, const float *up, int64_t from, int64_t to) {
    int64_t i = from;
    for (; i + LANES <= to; i += LANES) {
        const Floats x = load(gate + i);
        store(gate + i, x / (exponential(-x) + 1.0f) * load(up + i));
    }
    for (; i < to; i++) gate[i] = gate[i] / (exponential(-gate[i]) + 1.0f) * up[i];
}

// The first of the highest numbers, or of those that are none, as argmax has it.
template <class T> static int64_t likeliest(const T *logits, int64_t count) {
    Floats tops = Floats{} - INFINITY;
    Integers none = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Floats x = load(logits + i);
        tops = x > tops ? x : tops;
        none |= x != x;
    }
    float top = -INFINITY;
    bool any = false;
    for (; i < count; i++) {
        top = std::max(top, number(logits[i]));
        any |= std::isnan(number(logits[i]));
    }
    for (int lane = 0; lane < LANES; lane++) {
        top = std::max(top, tops[lane]);
        any |= none[lane] != 0;
    }
    for (i = 0; i < count; i++)
        if (any ? std::isnan(number(logits[i])) : number(logits[i]) == top) return i;
    return 0;
}

// Logits (B, V) of the tokens that `ids` holds; their keys and values join the cache. The likeliest next ones, if they
// are to be chosen, join their texts and come next.
template <class T>
static void run(const Step &step, const Buffers *buffers, State *states, int64_t *ids, T *logits, float *room,
                int64_t threads, bool chooses) {
    const Shared shared(step, room);
    const int64_t rows = step.rows, size = step.size, inner = step.inner, vocab_size = step.head.outputs;
    const int64_t all_heads = (step.heads + 2 * step.groups) * step.width;
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        static thread_local std::vector<float> own;
        own.resize(rows * (size + step.rotated));
        float *x = own.data(), *angles = x + rows * size;
        const int64_t half = step.rotated / 2;
        for (int64_t row = 0; row < rows; row++) {
            float *turn = angles + row * step.rotated;
            for (int64_t i = 0; i < half; i++) {
                const float angle = (float)states[row].position * step.frequencies[i];
                turn[i] = std::cos(angle) * (float)step.rotary_scale;
                turn[i + half] = std::sin(angle) * (float)step.rotary_scale;
            }
            for (int64_t i = team.from(size); i < team.to(size); i++)
                shared.hidden[row * size + i] = number(((const T *)step.embedding)[ids[row] * size + i]);
        }
        const auto norm_rows = [&](const Norm &norm) {
            for (int64_t row = 0; row < rows; row++) normed<T>(norm, shared.hidden + row * size, size, x + row * size);
        };
        const auto add = [&](int64_t row, int64_t output, float y) { shared.hidden[row * size + output] += y; };
        for (int64_t index = 0; index < step.depth; index++) {
            const Layer &layer = step.layers[index];
#pragma omp barrier
            norm_rows(layer.input_norm);
            int64_t before = 0;
            for (const Product *part : {&layer.query, &layer.key, &layer.value}) {
                const int64_t from = std::clamp(team.from(all_heads) - before, (int64_t)0, part->outputs);
                const int64_t to = std::clamp(team.to(all_heads) - before, (int64_t)0, part->outputs);
                float *heads = shared.heads + before;
                multiply<T>(*part, x, rows, from, to,
                            [=](int64_t row, int64_t output, float y) { heads[row * all_heads + output] = y; });
                before += part->outputs;
            }
#pragma omp barrier
            attend_heads<T>(step, layer, buffers[index], states, angles, shared, team);
#pragma omp barrier
            multiply<T>(layer.output, shared.attended, rows, team.from(size), team.to(size), add);
#pragma omp barrier
            norm_rows(layer.mlp_norm);
            const int64_t from = team.from(inner), to = team.to(inner);
            multiply<T>(layer.gate, x, rows, from, to,
                        [&](int64_t row, int64_t output, float y) { shared.gate[row * inner + output] = y; });
            multiply<T>(layer.up, x, rows, from, to,
                        [&](int64_t row, int64_t output, float y) { shared.up[row * inner + output] = y; });
            for (int64_t row = 0; row < rows; row++)
                gate_and_up(shared.gate + row * inner, shared.up + row * inner, from, to);
#pragma omp barrier
            multiply<T>(layer.down, shared.gate, rows, team.from(size), team.to(size), add);
        }
#pragma omp barrier
        norm_rows(step.norm);
        const float cap = (float)step.cap;
        multiply<T>(step.head, x, rows, team.from(vocab_size), team.to(vocab_size),
                    [&](int64_t row, int64_t output, float y) {
                        put(logits + row * vocab_size + output, cap ? cap * std::tanh(y / cap) : y);
                    });
    }
    for (int64_t row = 0; row < rows; row++) {
        State &state = states[row];
        state.past++;
        state.position++;
        if (chooses) ids[row] = ((int64_t *)state.text)[state.past] = likeliest(logits + row * vocab_size, vocab_size);
    }
    for (int64_t index = 0; index < step.depth; index++) *(int64_t *)buffers[index].filled = states->past;
}

extern "C" void kernel(const int64_t *step, const int64_t *buffers, int64_t *states, int64_t *ids, void *logits,
                       float *room, int64_t is_half, int64_t threads, int64_t chooses) {
    const auto take = [&](auto *of_type) {
        run(*(const Step *)step, (const Buffers *)buffers, (State *)states, ids, of_type, room, threads, chooses);
    };
    Py_BEGIN_ALLOW_THREADS
    if (is_half)
        take((bfloat16 *)logits);
    else
        take((float *)logits);
    Py_END_ALLOW_THREADS
}
"""

ARGUMENTS = (*["const int64_t*"] * 2, *["int64_t*"] * 2, "void*", "float*", *["int64_t"] * 3)

__all__ = ["ARGUMENTS", "SOURCE"]
