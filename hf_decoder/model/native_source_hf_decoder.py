"""The decoding step of a few rows on a CPU in C++, and their prompt: what the compiler is given.

A step reads each weight once and has little else to do, so it is one parallel region: threads share the outputs of
every product, norm the token each for itself, and meet five times a layer. A prompt is a step of several tokens a row,
whose norms are shared too and whose products are made in tiles. Weights are read in their own type and all else is
fp32; keys and values are rounded to the type of the cache, logits to that of the weights.

Shapes: B rows, S new tokens of each, L = B S lines, D hidden_size, H query heads, G key/value heads, E head_dim, R its
rotated part, F intermediate_size, V vocab_size, K cached and new tokens; M outputs and N inputs of a product.
"""

SOURCE = r"""
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

#define MAX_ROWS 8
#define CACHED_BYTES (1 << 18)  // of the lines, and half as many of the weights

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

    int64_t all_heads() const { return (heads + 2 * groups) * width; }
};

struct Buffers {  // of one layer of a static cache
    int64_t keys, values;  // addresses, of (B, G, length, E) each
    int64_t filled;        // address of an int64
    int64_t unused;
};

struct State {  // of one row
    int64_t past, position, first, length, text;  // cached tokens; of the next one; the first seen; room; an address
};

template <class T> static void normed(const Norm &norm, const float *x, int64_t size, float *y) {
    const T *weight = (const T *)norm.weight;
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / size + (float)norm.epsilon);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * number(weight[i]);
}

// The outputs `from` to `to` of x (L, N), each handed to `take` with its line.
template <class T, class F>
static void multiply(const Product &of, const float *x, int64_t lines, int64_t from, int64_t to, F take) {
    const auto by = [&](const auto *weight, auto scale) {
        const T *bias = (const T *)of.bias;
        const auto give = [&](int64_t line, int64_t output, float y) {
            take(line, output, y * scale(output) + (bias ? number(bias[output]) : 0.0f));
        };
        if (lines > MAX_ROWS) {
            tiles(weight, x, of.inputs, lines, from, to, give);
            return;
        }
        float y[MAX_ROWS];
        for (int64_t output = from; output < to; output++) {
            dots(weight + output * of.inputs, x, of.inputs, of.inputs, lines, y);
            for (int64_t line = 0; line < lines; line++) give(line, output, y[line]);
        }
    };
    if (!of.scales)
        by((const T *)of.weight, [](int64_t) { return 1.0f; });
    else if (of.wide)
        by((const int8_t *)of.weight, [&](int64_t output) { return ((const float *)of.scales)[output]; });
    else
        by((const int8_t *)of.weight, [&](int64_t output) { return number(((const T *)of.scales)[output]); });
}

struct Team {
    int64_t thread, threads;

    // where a thread's share of some outputs starts; the next one's start is its end
    int64_t start(int64_t count, int64_t of) const { return of == threads ? count : count * of / threads / 16 * 16; }
    int64_t from(int64_t count) const { return start(count, thread); }
    int64_t to(int64_t count) const { return start(count, thread + 1); }
};

// What threads share, in fp32: (L, R), (L, D), (L, (H + 2 G) E), (L, H E), twice (L, F) and, of a prompt, (L, D).
struct Shared {
    float *angles, *hidden, *heads, *attended, *gate, *up, *normed;

    Shared(const Step &step, int64_t lines, float *room) {
        angles = room;
        hidden = angles + lines * step.rotated;
        heads = hidden + lines * step.size;
        attended = heads + lines * step.all_heads();
        gate = attended + lines * step.heads * step.width;
        up = gate + lines * step.inner;
        normed = up + lines * step.inner;
    }
};

// A query or key as attention sees it: normed, then turned by the angles of its position.
template <class T>
static void prepare(const Step &step, const Layer &layer, const Norm &norm, const float *angles, const float *x,
                    float *y) {
    if (norm.weight)
        normed<T>(norm, x, step.width, y);
    else if (x != y)
        std::copy(x, x + step.width, y);
    const int64_t half = step.rotated / 2;
    for (int64_t i = 0; layer.rotates && i < half; i++) {
        const float a = y[i], b = y[i + half], cos = angles[i], sin = angles[i + half];
        y[i] = a * cos - b * sin;
        y[i + half] = b * cos + a * sin;
    }
}

// What each layer's attention is about.
template <class T> struct Attention {
    const Step &step;
    const Layer &layer;
    const Buffers &buffers;
    const State *states;
    const Shared &shared;
    const int64_t tokens;

    void prepare_query(int64_t line, int64_t head) const {
        float *x = shared.heads + line * step.all_heads() + head * step.width;
        prepare<T>(step, layer, layer.query_norm, shared.angles + line * step.rotated, x, x);
        for (int64_t e = 0; e < step.width; e++) x[e] *= (float)step.score_scale;
    }

    // where a group's keys or values lie, from that token on
    int64_t place(int64_t row, int64_t group, int64_t token) const {
        return ((row * step.groups + group) * states[row].length + token) * step.width;
    }

    // A group's key and value join the cache; of a single token several threads may store them, each the same.
    void keep(int64_t line, int64_t group) const {
        static thread_local std::vector<float> key;
        key.resize(step.width);
        const float *x = shared.heads + line * step.all_heads() + (step.heads + group) * step.width;
        prepare<T>(step, layer, layer.key_norm, shared.angles + line * step.rotated, x, key.data());
        const int64_t to = place(line / tokens, group, states->past + line % tokens);
        for (int64_t e = 0; e < step.width; e++) {
            put((T *)buffers.keys + to + e, key[e]);
            put((T *)buffers.values + to + e, x[step.groups * step.width + e]);
        }
    }

    void prepare_heads(const Team &team) const {
        const int64_t all = step.heads + step.groups, count = step.rows * tokens * all;
        for (int64_t index = count * team.thread / team.threads; index < count * (team.thread + 1) / team.threads;
             index++) {
            const int64_t line = index / all, head = index % all;
            if (head < step.heads)
                prepare_query(line, head);
            else
                keep(line, head - step.heads);
        }
    }

    // Of a prompt `prepare_heads` has prepared the heads before; of a single token each thread prepares its own.
    void attend_heads(const Team &team) const;
};

// One query head over `count` keys.
template <class T>
static void attend(const float *query, const T *keys, const T *values, int64_t count, int64_t width, float *scores,
                   float *y) {
    for (int64_t k = 0; k < count; k++) scores[k] = dot(keys + k * width, query, width);
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
        Floats sums[4] = {};
        for (k = 0; k < count; k++) {
            const T *row = values + k * width + e;
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) sums[part] += scores[k] * load(row + part * LANES);
        }
        for (int part = 0; part < 4; part++) store(y + e + part * LANES, sums[part] * scale);
    }
    for (; e < width; e++) {
        float all = 0;
        for (k = 0; k < count; k++) all += scores[k] * number(values[k * width + e]);
        y[e] = all * scale;
    }
}

template <class T> void Attention<T>::attend_heads(const Team &team) const {
    static thread_local std::vector<float> scores;
    const int64_t heads = step.heads, past = states->past, count = step.rows * heads * tokens;
    scores.resize(past + tokens);
    int64_t kept = -1;
    // all tokens of a head, then the next one: a thread's share is of as many early tokens as late ones
    for (int64_t index = count * team.thread / team.threads; index < count * (team.thread + 1) / team.threads;
         index++) {
        const int64_t token = index % tokens, head = index / tokens % heads, row = index / tokens / heads;
        const int64_t line = row * tokens + token, last = past + token, first = std::min(states[row].first, last);
        const int64_t group = head / (heads / step.groups);
        if (tokens == 1) {
            if (row * step.groups + group != kept) keep(line, group);
            kept = row * step.groups + group;
            prepare_query(line, head);
        }
        const int64_t from = place(row, group, first);
        attend(shared.heads + line * step.all_heads() + head * step.width, (const T *)buffers.keys + from,
               (const T *)buffers.values + from, last - first + 1, step.width, scores.data(),
               shared.attended + (line * heads + head) * step.width);
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

// Logits (B, V) of the last of the tokens that `ids` (B, S) holds; keys and values of all join the cache. The
// likeliest next ones, if they are to be chosen, join their texts and come next.
template <class T>
static void run(const Step &step, const Buffers *buffers, State *states, int64_t *ids, T *logits, float *room,
                int64_t threads, int64_t tokens, bool chooses) {
    const int64_t rows = step.rows, lines = rows * tokens, size = step.size, inner = step.inner;
    const int64_t vocab_size = step.head.outputs, all_heads = step.all_heads();
    const Shared shared(step, lines, room);
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads()};
        static thread_local std::vector<float> own;
        own.resize(rows * size);
        const int64_t half = step.rotated / 2;
        for (int64_t line = 0; line < lines; line++) {
            float *turn = shared.angles + line * step.rotated;
            const float position = std::max<int64_t>(0, states[line / tokens].position + line % tokens);
            for (int64_t i = half * team.thread / team.threads; i < half * (team.thread + 1) / team.threads; i++) {
                const float angle = position * step.frequencies[i];
                turn[i] = std::cos(angle) * (float)step.rotary_scale;
                turn[i + half] = std::sin(angle) * (float)step.rotary_scale;
            }
            for (int64_t i = team.from(size); i < team.to(size); i++)
                shared.hidden[line * size + i] = number(((const T *)step.embedding)[ids[line] * size + i]);
        }
        const float *x = tokens == 1 ? own.data() : shared.normed;
        const auto norm_lines = [&](const Norm &norm) {
            if (tokens == 1) {  // sooner done than waited for
                for (int64_t row = 0; row < rows; row++)
                    normed<T>(norm, shared.hidden + row * size, size, own.data() + row * size);
                return;
            }
            for (int64_t line = team.thread; line < lines; line += team.threads)
                normed<T>(norm, shared.hidden + line * size, size, shared.normed + line * size);
#pragma omp barrier
        };
        const auto add = [&](int64_t line, int64_t output, float y) { shared.hidden[line * size + output] += y; };
        for (int64_t index = 0; index < step.depth; index++) {
            const Layer &layer = step.layers[index];
#pragma omp barrier
            norm_lines(layer.input_norm);
            int64_t before = 0;
            for (const Product *part : {&layer.query, &layer.key, &layer.value}) {
                const int64_t from = std::clamp(team.from(all_heads) - before, (int64_t)0, part->outputs);
                const int64_t to = std::clamp(team.to(all_heads) - before, (int64_t)0, part->outputs);
                float *heads = shared.heads + before;
                multiply<T>(*part, x, lines, from, to,
                            [=](int64_t line, int64_t output, float y) { heads[line * all_heads + output] = y; });
                before += part->outputs;
            }
#pragma omp barrier
            const Attention<T> attention{step, layer, buffers[index], states, shared, tokens};
            if (tokens > 1) {
                attention.prepare_heads(team);
#pragma omp barrier
            }
            attention.attend_heads(team);
#pragma omp barrier
            multiply<T>(layer.output, shared.attended, lines, team.from(size), team.to(size), add);
#pragma omp barrier
            norm_lines(layer.mlp_norm);
            const int64_t from = team.from(inner), to = team.to(inner);
            multiply<T>(layer.gate, x, lines, from, to,
                        [&](int64_t line, int64_t output, float y) { shared.gate[line * inner + output] = y; });
            multiply<T>(layer.up, x, lines, from, to,
                        [&](int64_t line, int64_t output, float y) { shared.up[line * inner + output] = y; });
            for (int64_t line = 0; line < lines; line++)
                gate_and_up(shared.gate + line * inner, shared.up + line * inner, from, to);
#pragma omp barrier
            multiply<T>(layer.down, shared.gate, lines, team.from(size), team.to(size), add);
        }
#pragma omp barrier
        for (int64_t row = 0; row < rows; row++)
            normed<T>(step.norm, shared.hidden + ((row + 1) * tokens - 1) * size, size, own.data() + row * size);
        const float cap = (float)step.cap;
        multiply<T>(step.head, own.data(), rows, team.from(vocab_size), team.to(vocab_size),
                    [&](int64_t row, int64_t output, float y) {
                        put(logits + row * vocab_size + output, cap ? cap * std::tanh(y / cap) : y);
                    });
    }
    for (int64_t row = 0; row < rows; row++) {
        State &state = states[row];
        state.past += tokens;
        state.position += tokens;
        if (chooses) ids[row] = ((int64_t *)state.text)[state.past] = likeliest(logits + row * vocab_size, vocab_size);
    }
    for (int64_t index = 0; index < step.depth; index++) *(int64_t *)buffers[index].filled = states->past;
}

extern "C" void kernel(const int64_t *step, const int64_t *buffers, int64_t *states, int64_t *ids, void *logits,
                       float *room, int64_t is_half, int64_t threads, int64_t tokens, int64_t chooses) {
    const auto take = [&](auto *of_type) {
        run(*(const Step *)step, (const Buffers *)buffers, (State *)states, ids, of_type, room, threads, tokens,
            chooses);
    };
    Py_BEGIN_ALLOW_THREADS
    if (is_half)
        take((bfloat16 *)logits);
    else
        take((float *)logits);
    Py_END_ALLOW_THREADS
}
"""

ARGUMENTS = (*["const int64_t*"] * 2, *["int64_t*"] * 2, "void*", "float*", *["int64_t"] * 4)

__all__ = ["ARGUMENTS", "SOURCE"]
