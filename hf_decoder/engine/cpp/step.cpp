// The decoding step of a few rows on a CPU in C++, and their prompt: what the compiler is given.
//
// A step reads each weight once and has little else to do, so it is one parallel region: threads share the outputs of
// every product, norm the token each for itself, and meet five times a layer. A prompt is a step of several tokens a row,
// whose norms are shared too and whose products are made in tiles. Weights are read in their own type and all else is
// fp32; keys and values are rounded to the type of the cache, logits to that of the weights.
//
// Shapes: B rows, S new tokens of each, L = B S lines, D hidden_size, H query heads, G key/value heads, E head_dim, R its
// rotated part, F intermediate_size, V vocab_size, K cached and new tokens; M outputs and N inputs of a product.

#include "int4.h"
#include "quantized.h"

// What Python writes, eight bytes a field.

struct Norm {
    const void *weight;
    double epsilon;
};

struct Product {
    const void *weight;  // (M, N), int8 where there are scales
    const void *scales;  // (M,), in fp32 if they are wide; of int4.h where there is a group
    const void *bias;    // (M,)
    int64_t wide, outputs, inputs;
    int64_t kind;  // of packed weights, as GGUF numbers it; 0 of others
    int64_t group, block;  // of int4.h; 0 of others
};

struct Layer {
    Norm input_norm, query_norm, key_norm, mlp_norm;  // those of heads may be without weight: none
    Product query, key, value, output, gate, up, down;
    int64_t rotates, window;  // the tokens that a query sees, its own among them; 0: all
};

struct Step {
    const Layer *layers;
    const void *embedding;  // (V, D)
    int64_t kind;           // of a packed one
    Norm norm;
    Product head;
    const float *frequencies;  // (R / 2,)
    double rotary_scale, score_scale, cap;  // a cap of 0: none
    int64_t rows, depth, size, heads, groups, width, rotated, inner;  // B, layers, D, H, G, E, R, F

    int64_t all_heads() const { return (heads + 2 * groups) * width; }
};

struct Buffers {  // of one layer of a cache
    int64_t keys, values;  // addresses, of (B, G, length, E) each; where token 0 would be, if a window has left it behind
    int64_t filled;        // address of an int64
    int64_t length;
};

struct State {  // of one row
    int64_t past, position, first, text;  // cached tokens; of the next one; the first seen; an address
};

template <class T> static void normed(const Norm &norm, const float *x, int64_t size, float *y) {
    const T *weight = (const T *)norm.weight;
    const float scale = 1.0f / std::sqrt(dot(x, x, size) / size + (float)norm.epsilon);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < size; i++) y[i] = x[i] * scale * number(weight[i]);
}

// Lines (L, N) in fp32 and, for packed weights, as they multiply them.
struct Inputs {
    const float *x;
    void *rounded;
};

// The outputs `from` to `to` of lines, each handed to `take` with its line.
template <class T, class F>
static void multiply(const Product &of, Inputs x, int64_t lines, int64_t from, int64_t to, F take) {
    const auto give = [&, bias = (const T *)of.bias](int64_t line, int64_t output, float y) {
        take(line, output, bias ? y + number(bias[output]) : y);
    };
    const auto by = [&](const auto *weight, auto scale) {
        products<T>(weight, x.x, of.inputs, lines, from, to,
                 [&](int64_t line, int64_t output, float y) { give(line, output, y * scale(output)); });
    };
    if (of.group) {
        const Int4<T> weights{(const uint8_t *)of.weight, (const T *)of.scales, of.group, of.outputs, of.inputs};
        return int4_products(weights, of.block, x.x, lines, from, to, give);
    }
#ifdef PACKED_WEIGHTS
    if (of.kind) {
        const Lines rounded(x.rounded, of.inputs, lines);
        return packed_products(of.kind, (const uint8_t *)of.weight, rounded, lines, from, to, give);
    }
#endif
    if (!of.scales)
        by((const T *)of.weight, [](int64_t) { return 1.0f; });
    else if (of.wide)
        by((const int8_t *)of.weight, [&](int64_t output) { return ((const float *)of.scales)[output]; });
    else
        by((const int8_t *)of.weight, [&](int64_t output) { return number(((const T *)of.scales)[output]); });
}

struct Team {
    int64_t thread, threads, grain;

    // where a thread's share of some outputs starts, at a multiple of `grain`; the next one's start is its end
    int64_t start(int64_t count, int64_t of) const {
        return of == threads ? count : count * of / threads / grain * grain;
    }
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
        return ((row * step.groups + group) * buffers.length + token) * step.width;
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
        const int64_t line = row * tokens + token, last = past + token;
        const int64_t in_window = layer.window ? last - layer.window + 1 : 0;
        const int64_t first = std::min(std::max(states[row].first, in_window), last);
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
    Integers none = {}, places = {}, at;  // of each lane's first top
    for (int lane = 0; lane < LANES; lane++) at[lane] = lane;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES, at += LANES) {
        const Floats x = load(logits + i);
        places = x > tops ? at : places;
        tops = x > tops ? x : tops;
        none |= x != x;
    }
    float top = -INFINITY;
    int64_t place = 0;
    bool any = false;
    for (int lane = 0; lane < LANES; lane++) {
        if (tops[lane] > top || (tops[lane] == top && places[lane] < place)) place = places[lane];
        top = std::max(top, tops[lane]);
        any |= none[lane] != 0;
    }
    for (; i < count; i++) {
        const float x = number(logits[i]);
        if (x > top) top = x, place = i;
        any |= std::isnan(x);
    }
    for (i = 0; any && i < count; i++)
        if (std::isnan(number(logits[i]))) return i;
    return place;
}

// Room for that many lines as packed weights multiply them, in a vector that keeps it.
static uint8_t *room_for_rounded(std::vector<uint8_t> &room, const Step &step, int64_t lines) {
#ifdef PACKED_WEIGHTS
    room.resize(Lines::bytes(lines, std::max({step.size, step.inner, step.heads * step.width})));
#endif
    return room.data();
}

#ifdef PACKED_WEIGHTS
// How many numbers of a line those products read that have packed weights; 0 if none has.
static int64_t packed_inputs(std::initializer_list<const Product *> readers) {
    for (const Product *reader : readers)
        if (reader->kind) return reader->inputs;
    return 0;
}
#endif

// Lines as these products read them: of a few, each thread rounds all, which is sooner done than waited for.
static Inputs inputs_of(const Step &step, const float *x, int64_t lines, std::initializer_list<const Product *> readers,
                        uint8_t *shared_room, const Team &team) {
    Inputs inputs{x, nullptr};
#ifdef PACKED_WEIGHTS
    const int64_t size = packed_inputs(readers);
    if (!size) return inputs;
    static thread_local std::vector<uint8_t> own_room;
    const bool alone = lines == step.rows;
    inputs.rounded = alone ? room_for_rounded(own_room, step, lines) : shared_room;
    const Lines rounded(inputs.rounded, size, lines);
    for (int64_t line = alone ? 0 : team.thread; line < lines; line += alone ? 1 : team.threads)
        rounded.round(line, x + line * size);
    if (!alone) {
#pragma omp barrier
    }
#endif
    return inputs;
}

// Angles and embeddings of all lines, of which a thread makes its part.
template <class T>
static void begin_lines(const Step &step, const Shared &shared, const State *states, const int64_t *ids, int64_t lines,
                        int64_t tokens, const Team &team) {
    const int64_t size = step.size;
    const int64_t half = step.rotated / 2;
    for (int64_t line = 0; line < lines; line++) {
        float *turn = shared.angles + line * step.rotated;
        const float position = std::max<int64_t>(0, states[line / tokens].position + line % tokens);
        for (int64_t i = half * team.thread / team.threads; i < half * (team.thread + 1) / team.threads; i++) {
            const float angle = position * step.frequencies[i];
            turn[i] = std::cos(angle) * (float)step.rotary_scale;
            turn[i + half] = std::sin(angle) * (float)step.rotary_scale;
        }
#ifdef PACKED_WEIGHTS
        if (step.kind) {
            float *hidden = shared.hidden + line * size;
            if (line % team.threads == team.thread)
                unpack_row(step.kind, (const uint8_t *)step.embedding, size, ids[line], hidden);
            continue;
        }
#endif
        for (int64_t i = team.from(size); i < team.to(size); i++)
            shared.hidden[line * size + i] = number(((const T *)step.embedding)[ids[line] * size + i]);
    }
}

// Logits (B, V) of the last of the tokens that `ids` (B, S) holds; keys and values of all join the cache. The
// likeliest next ones, if they are to be chosen, join their texts and come next.
template <class T>
static void run(const Step &step, const Buffers *buffers, State *states, int64_t *ids, T *logits, float *room,
                int64_t threads, int64_t tokens, bool chooses) {
    const int64_t rows = step.rows, lines = rows * tokens, size = step.size, inner = step.inner;
    const int64_t vocab_size = step.head.outputs, all_heads = step.all_heads();
    const Shared shared(step, lines, room);
    const int64_t grain = std::max<int64_t>(16, step.layers->gate.block);
    static thread_local std::vector<uint8_t> rounded_room;
    uint8_t *const rounded_lines = room_for_rounded(rounded_room, step, lines);
#pragma omp parallel num_threads(threads)
    {
        const Team team{omp_get_thread_num(), omp_get_num_threads(), grain};
        static thread_local std::vector<float> own;
        own.resize(rows * size);
        begin_lines<T>(step, shared, states, ids, lines, tokens, team);
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
        const auto inputs_for = [&](const float *x, int64_t lines, std::initializer_list<const Product *> readers) {
            return inputs_of(step, x, lines, readers, rounded_lines, team);
        };
        const auto add = [&](int64_t line, int64_t output, float y) { shared.hidden[line * size + output] += y; };
        for (int64_t index = 0; index < step.depth; index++) {
            const Layer &layer = step.layers[index];
#pragma omp barrier
            norm_lines(layer.input_norm);
            int64_t before = 0;
            const Inputs normed_inputs = inputs_for(x, lines, {&layer.query, &layer.key, &layer.value});
            for (const Product *part : {&layer.query, &layer.key, &layer.value}) {
                const int64_t from = std::clamp(team.from(all_heads) - before, (int64_t)0, part->outputs);
                const int64_t to = std::clamp(team.to(all_heads) - before, (int64_t)0, part->outputs);
                float *heads = shared.heads + before;
                multiply<T>(*part, normed_inputs, lines, from, to,
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
            const Inputs attended_inputs = inputs_for(shared.attended, lines, {&layer.output});
            multiply<T>(layer.output, attended_inputs, lines, team.from(size), team.to(size), add);
#pragma omp barrier
            norm_lines(layer.mlp_norm);
            const int64_t from = team.from(inner), to = team.to(inner);
            const Inputs mlp_inputs = inputs_for(x, lines, {&layer.gate, &layer.up});
            multiply<T>(layer.gate, mlp_inputs, lines, from, to,
                        [&](int64_t line, int64_t output, float y) { shared.gate[line * inner + output] = y; });
            multiply<T>(layer.up, mlp_inputs, lines, from, to,
                        [&](int64_t line, int64_t output, float y) { shared.up[line * inner + output] = y; });
            for (int64_t line = 0; line < lines; line++)
                gate_and_up(shared.gate + line * inner, shared.up + line * inner, from, to);
#pragma omp barrier
            const Inputs gated_inputs = inputs_for(shared.gate, lines, {&layer.down});
            multiply<T>(layer.down, gated_inputs, lines, team.from(size), team.to(size), add);
        }
#pragma omp barrier
        for (int64_t row = 0; row < rows; row++)
            normed<T>(step.norm, shared.hidden + ((row + 1) * tokens - 1) * size, size, own.data() + row * size);
        const float cap = (float)step.cap;
        const Inputs last_inputs = inputs_for(own.data(), rows, {&step.head});
        multiply<T>(step.head, last_inputs, rows, team.from(vocab_size), team.to(vocab_size),
                    [&](int64_t row, int64_t output, float y) {
                        put(logits + row * vocab_size + output, cap ? cap * std::tanh(y / cap) : y);
                    });
#pragma omp barrier
        for (int64_t row = team.thread; chooses && row < rows; row += team.threads)
            ids[row] = likeliest(logits + row * vocab_size, vocab_size);
    }
    for (int64_t row = 0; row < rows; row++) {
        State &state = states[row];
        state.past += tokens;
        state.position += tokens;
        if (chooses) ((int64_t *)state.text)[state.past] = ids[row];
    }
    for (int64_t index = 0; index < step.depth; index++) *(int64_t *)buffers[index].filled = states->past;
}

extern "C" void kernel(const int64_t *step, const int64_t *buffers, int64_t *states, int64_t *ids, void *logits,
                       float *room, int64_t is_half, int64_t threads, int64_t tokens, int64_t chooses) {
    const auto take = [&](auto *of_type) {
        run(*(const Step *)step, (const Buffers *)buffers, (State *)states, ids, of_type, room, threads, tokens,
            chooses);
    };
    if (is_half)
        take((bfloat16 *)logits);
    else
        take((float *)logits);
}
