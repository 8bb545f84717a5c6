// One unit of y = maxpool?(act(x * scale + shift)) + sigma * eps, in floats or rounded to bytes: compiled once per instruction set, with RSE_UNIT naming the unit.
#include <type_traits>

#include "vec.h"

#define RSE_CONCAT_(a, b) a##b
#define RSE_CONCAT(a, b) RSE_CONCAT_(a, b)

namespace rse {
namespace {

constexpr uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;  // Philox4x32 multipliers
constexpr uint32_t kW0 = 0x9E3779B9u, kW1 = 0xBB67AE85u;  // increments of the key

// ------------------------------------------------------------------------------------------------------------------ Philox
// Philox4x32-10 for one row. Only the first counter word (quad) differs within a row, so half of the first two rounds is the same
// for all its quads and is done here once.
// Kept as double words, so that each is one broadcast from memory, on a load port and not on the shuffle port.
struct Row {
    uint64_t k0[10], k1[10];
    uint64_t r1_c2, r2_c0, r2_c2, r2_p0;
};

RSE_INLINE Row make_row(const Task& t, int64_t row) {
    Row r;
    uint32_t k0 = t.key0, k1 = t.key1;
    for (int n = 0; n < 10; ++n, k0 += kW0, k1 += kW1) r.k0[n] = k0, r.k1[n] = k1;
    const int64_t i = row % t.images;
    const uint32_t image = t.sample_ids ? uint32_t(t.sample_ids[2 * i]) : t.image_offset + uint32_t(i);
    const uint32_t draw = (t.sample_ids ? uint32_t(t.sample_ids[2 * i + 1]) : t.draw_offset) + uint32_t(row / t.images);
    const uint64_t p1 = uint64_t(kM1) * draw;
    const uint64_t p0 = uint64_t(kM0) * uint32_t(p1 >> 32 ^ image ^ r.k0[0]);
    r.r1_c2 = t.stream ^ r.k1[0];
    r.r2_c0 = uint32_t(p1) ^ r.k0[1];
    r.r2_c2 = p0 >> 32 ^ r.k1[1];
    r.r2_p0 = uint32_t(p0);
    return r;
}

// The counter words live in the low halves of double words; what stands in the high halves never reaches a low half.
struct State {
    vq c0, c1, c2, c3;
};

// The words for the quads whose products M0 * quad are given.
RSE_INLINE State philox(const Row& r, vq product) {
    State s;
    s.c2 = product >> 32 ^ r.r1_c2, s.c3 = product;                                     // round 1
    const vq p1 = mul_wide(s.c2, kM1);                                                            // round 2
    s.c0 = p1 >> 32 ^ r.r2_c0, s.c1 = p1, s.c2 = s.c3 ^ r.r2_c2, s.c3 = vq{} + r.r2_p0;
#pragma GCC unroll 8
    for (int i = 2; i < 10; ++i) {
        const vq a = mul_wide(s.c0, kM0), b = mul_wide(s.c2, kM1);
        s.c0 = b >> 32 ^ s.c1 ^ r.k0[i], s.c1 = b;
        s.c2 = a >> 32 ^ s.c3 ^ r.k1[i], s.c3 = a;
    }
    return s;
}

// kLanes quads at a time, as running products M0 * quad (exact in 64 bits: both factors are 32-bit words).
struct Quads {
    vq even{}, odd{};
    // Lane i starts at quad first + step * order(i).
    template <typename Order> RSE_INLINE Quads(uint64_t first, uint64_t step, Order order) {
        for (int i = 0; i < kLanes / 2; ++i) {
            even[i] = kM0 * (first + step * order(2 * i));
            odd[i] = kM0 * (first + step * order(2 * i + 1));
        }
    }
    RSE_INLINE void advance(uint64_t quads) { even += kM0 * quads, odd += kM0 * quads; }
};

// The four words of each quad: w[j] holds word j of kLanes quads.
RSE_INLINE void words(const Row& row, const Quads& q, vu w[4]) {
    const State a = philox(row, q.even), b = philox(row, q.odd);
    w[0] = interleave_low(a.c0, b.c0), w[1] = interleave_low(a.c1, b.c1);
    w[2] = interleave_low(a.c2, b.c2), w[3] = interleave_low(a.c3, b.c3);
}

// The normals of the words, times gain: z[j] holds lane j of kLanes quads.
RSE_INLINE void box_muller(const vu w[4], vf gain, vf z[4]) {
#pragma GCC unroll 2
    for (int j = 0; j < 4; j += 2) polar(radius(uniform(w[j])) * gain, angle(w[j + 1]), z[j], z[j + 1]);
}

// The normals z of the words w, then in w the words of the next block, `stride` quads on: two long chains of instructions, neither of
// which waits for the other.
template <bool kMore> RSE_INLINE void step(const Row& row, Quads& quads, uint64_t stride, vf gain, vu w[4], vf z[4]) {
    vu next[4];
    if constexpr (kMore) quads.advance(stride), words(row, quads, next);
    box_muller(w, gain, z);
    if constexpr (kMore) std::memcpy(w, next, sizeof next);
}

// ------------------------------------------------------------------------------------------------------------------ layouts
template <Dtype D> using T = typename Element<D>::type;
template <Dtype D, Dtype Y> constexpr bool kHasClean = Y != Dtype::u8 && (D == Dtype::f32 || D == Dtype::bf16 || D == Dtype::f16);

// act(a * scale + shift). The same operations in the same order in every walk.
template <bool kAffine, bool kRelu> RSE_INLINE vf activate(vf a, vf scale, vf shift) {
    if constexpr (kAffine) a = madd(a, scale, shift);
    if constexpr (kRelu) a = relu(a);
    return a;
}

// One sigma for all channels is folded into the radius, and the per-channel factor is then 1. Not where a radius, below 8, times sigma
// would overflow although the normal times sigma does not.
template <bool kAffine> RSE_INLINE bool folds(const Task& t) { return !kAffine && !t.sigma_varies && t.sigma[0] <= 0x1p124f; }

// What is where in one row: x, y, and the clean output or null.
template <Dtype D, Dtype Y> struct Planes {
    const T<D>* x;
    T<Y>* y;
    T<D>* clean;
    RSE_INLINE Planes operator+(int64_t n) const { return {x + n, y + n, clean ? clean + n : nullptr}; }
};

// Elements in the order of their quads, as [S, C] lies in memory when C is a multiple of 4.
template <Dtype D, Dtype Y, bool kFold, bool kAffine, bool kRelu>
void flat(const Task& t, Planes<D, Y> p, const Row& row, int64_t quad, int64_t count) {
    constexpr int kBlock = 4 * kLanes;
    const int64_t channels = 4 * groups(t);
    const vf one = splat(1.0f), gain = kFold ? splat(t.sigma[0]) : one;
    const Sink<Y> sink(t.zero_point);
    Quads quads(quad, 1, flat_quad);
    int64_t channel = 4 * quad % channels;
    vu w[4];
    words(row, quads, w);
    const auto block = [&](Planes<D, Y> at, auto last) __attribute__((always_inline)) {  // a call would keep what it captures in memory
        vf z[4];
        step<!last>(row, quads, kLanes, gain, w, z);
        transpose(z);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int64_t c = channel + j * kLanes;
            const vf sigma = kFold ? one : read<vf>(t.sigma + c);
            const vf scale = kAffine ? read<vf>(t.scale + c) : one, shift = kAffine ? read<vf>(t.shift + c) : one;
            const vf a = activate<kAffine, kRelu>(load<D>(at.x + j * kLanes), scale, shift);
            if constexpr (kHasClean<D, Y>)
                if (at.clean) store_exact<D>(at.clean + j * kLanes, a);
            z[j] = madd(z[j], sigma, a);
        }
        sink.four(at.y, z);
    };
    int64_t n = 4 * count;
    for (; n > kBlock; n -= kBlock, p = p + kBlock) {
        block(p, std::false_type{});
        channel += kBlock;
        if (channel >= channels) channel %= channels;
    }
    T<D> in[kBlock] = {}, clean[kBlock];
    T<Y> out[kBlock];
    std::memcpy(in, p.x, n * sizeof(T<D>));
    block({in, out, p.clean ? clean : nullptr}, std::true_type{});
    std::memcpy(p.y, out, n * sizeof(T<Y>));
    if (p.clean) std::memcpy(p.clean, clean, n * sizeof(T<D>));
}

// [C, S] in memory: vectors run along S, the four words of a quad go to four planes.
template <Dtype D, Dtype Y, bool kAffine, bool kRelu>
void planar(const Task& t, Planes<D, Y> p, const Row& row, int64_t group, int64_t first, int64_t count) {
    const int64_t stride = groups(t), planes = min(4, t.channels - 4 * group);
    const bool fold = folds<kAffine>(t);
    const vf one = splat(1.0f), gain = fold ? splat(t.sigma[0]) : one;
    const Sink<Y> sink(t.zero_point);
    Quads quads(first * stride + group, stride, [](int lane) { return lane; });
    vu w[4];
    words(row, quads, w);
    T<D> in[kLanes] = {}, clean[kLanes];
    T<Y> out[kLanes];
    const auto block = [&](int64_t s, int64_t n, auto last) __attribute__((always_inline)) {
        vf z[4];
        step<!last>(row, quads, kLanes * stride, gain, w, z);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int64_t c = 4 * group + j;
            const Planes<D, Y> at = p + (c * t.spatial + s);
            const int64_t present = j < planes ? n : 0;
            const bool whole = present == kLanes;
            if (!whole) std::memcpy(in, at.x, present * sizeof(T<D>));
            const Planes<D, Y> via = whole ? at : Planes<D, Y>{in, out, at.clean ? clean : nullptr};
            const vf sigma = fold ? one : splat(t.sigma[c]);
            const vf scale = kAffine ? splat(t.scale[c]) : one, shift = kAffine ? splat(t.shift[c]) : one;
            const vf a = activate<kAffine, kRelu>(load<D>(via.x), scale, shift);
            if constexpr (kHasClean<D, Y>)
                if (via.clean) store_exact<D>(via.clean, a);
            sink.one(via.y, madd(z[j], sigma, a));
            if (whole) continue;
            std::memcpy(at.y, out, present * sizeof(T<Y>));
            if (at.clean) std::memcpy(at.clean, clean, present * sizeof(T<D>));
        }
    };
    int64_t s = first;
    const int64_t end = first + count;
    for (; s + kLanes < end; s += kLanes) block(s, kLanes, std::false_type{});
    block(s, end - s, std::true_type{});
}

// Calls visit(i, at) for each element of `count` quads from `quad` on: its place in quad order, and in a sample that is flat or planar.
template <typename Visit> RSE_INLINE void each(const Task& t, int64_t quad, int64_t count, Visit visit) {
    const bool is_flat = t.layout == Layout::flat;
    const int64_t per_position = groups(t), stride_s = is_flat ? t.channels : 1, stride_c = is_flat ? 1 : t.spatial;
    int64_t s = quad / per_position, group = quad % per_position;
    for (int64_t q = 0; q < count; ++q) {
        const int64_t lanes = min(4, t.channels - 4 * group), at = s * stride_s + 4 * group * stride_c;
        for (int64_t j = 0; j < lanes; ++j) visit(4 * q + j, at + j * stride_c);
        if (++group == per_position) group = 0, ++s;
    }
}

// Anything else: gathered into quad order, then as `flat`. Lanes beyond the last channel are computed and dropped.
template <Dtype D, Dtype Y, bool kFold, bool kAffine, bool kRelu>
void scattered(const Task& t, Planes<D, Y> p, const Row& row, int64_t quad, int64_t count) {
    T<D> in[4 * kTile] = {}, clean[4 * kTile];
    T<Y> out[4 * kTile];
    each(t, quad, count, [&](int64_t i, int64_t at) { in[i] = p.x[at]; });
    flat<D, Y, kFold, kAffine, kRelu>(t, {in, out, p.clean ? clean : nullptr}, row, quad, count);
    each(t, quad, count, [&](int64_t i, int64_t at) { p.y[at] = out[i]; });
    if (p.clean) each(t, quad, count, [&](int64_t i, int64_t at) { p.clean[at] = clean[i]; });
}

// The largest of four vectors, element by element, as floats.
template <Dtype D> RSE_INLINE vf largest_of(const T<D>* a, const T<D>* b, const T<D>* c, const T<D>* d) {
    if constexpr (D == Dtype::u8) {
        const vb p = read<vb>(a), q = read<vb>(b), r = read<vb>(c), s = read<vb>(d);
        const vb pq = p > q ? p : q, rs = r > s ? r : s, most = pq > rs ? pq : rs;
        uint8_t bytes[kLanes];
        std::memcpy(bytes, &most, sizeof most);
        return load<D>(bytes);
    } else {
        return largest(largest(load<D>(a), load<D>(b)), largest(load<D>(c), load<D>(d)));
    }
}

// The largest of each 2x2 window of act(x * scale + shift), `count` quads from `quad` on in quad order; up to kLanes floats beyond them
// are written, too. Not rounded: that is done once, with the noise.
template <Dtype D, bool kAffine, bool kRelu> void pool(const Task& t, const T<D>* x, int64_t quad, int64_t count, float* out) {
    const bool is_flat = t.x_layout == Layout::flat, ordered = !kAffine || t.rises;
    const int64_t stride_s = is_flat ? t.channels : 1, stride_c = is_flat ? 1 : t.x_spatial, line = t.x_width * stride_s;
    const int64_t width = t.x_width / 2;
    T<D> in[4][kLanes] = {};
    int64_t column = quad / groups(t) % width, c = 4 * (quad % groups(t));
    const T<D>* window = x + quad / groups(t) / width * 2 * line + column * 2 * stride_s;
    for (int64_t end = 4 * count, i = 0; i < end;) {
        const int64_t n = min(t.channels - c, end - i);  // the channels of one position
        const auto vector = [&](int64_t j, const T<D>* p, const T<D>* q, const T<D>* r, const T<D>* s) __attribute__((always_inline)) {
            const vf one = splat(1.0f), scale = kAffine ? read<vf>(t.scale + c + j) : one, shift = kAffine ? read<vf>(t.shift + c + j) : one;
            const auto value = [&](vf a) __attribute__((always_inline)) { return activate<kAffine, kRelu>(a, scale, shift); };
            const auto at = [&](const T<D>* a) __attribute__((always_inline)) { return value(load<D>(a)); };
            const vf most = ordered ? value(largest_of<D>(p, q, r, s)) : largest(largest(at(p), at(q)), largest(at(r), at(s)));
            std::memcpy(out + i + j, &most, sizeof most);
        };
        const T<D>* at = window + c * stride_c;
        int64_t j = 0;
        for (; is_flat && j + kLanes <= n; j += kLanes, at += kLanes) vector(j, at, at + stride_s, at + line, at + line + stride_s);
        for (; j < n; j += kLanes, at += kLanes * stride_c) {
            for (int k = 0; k < 4; ++k)
                for (int64_t l = 0; l < min(kLanes, n - j); ++l) in[k][l] = at[k / 2 * line + k % 2 * stride_s + l * stride_c];
            vector(j, in[0], in[1], in[2], in[3]);
        }
        i += 4 * ceil_div(n, 4), c = 0;
        window += 2 * stride_s;
        if (++column == width) column = 0, window += 2 * (line - width * stride_s);
    }
}

// A tile of a pooled activation.
template <Dtype D, Dtype Y, bool kFold, bool kAffine, bool kRelu>
void pooled(const Task& t, Planes<D, Y> p, const Row& row, int64_t quad, int64_t count) {
    constexpr bool kClean = kHasClean<D, Y>;
    const bool is_flat = walk(t) == Walk::flat;
    float value[4 * kTile + kLanes];
    T<D> clean[kClean ? 4 * kTile : 1];
    T<Y> out[4 * kTile];
    pool<D, kAffine, kRelu>(t, p.x, quad, count, value);
    flat<Dtype::f32, Y, kFold, false, false>(t, {value, is_flat ? p.y + 4 * quad : out, nullptr}, row, quad, count);
    if (!is_flat) each(t, quad, count, [&](int64_t i, int64_t at) { p.y[at] = out[i]; });
    if constexpr (kClean) {
        if (!p.clean) return;
        for (int64_t i = 0; i < 4 * count; i += kLanes) store_exact<D>(clean + i, read<vf>(value + i));
        if (is_flat) std::memcpy(p.clean + 4 * quad, clean, 4 * count * sizeof(T<D>));
        else each(t, quad, count, [&](int64_t i, int64_t at) { p.clean[at] = clean[i]; });
    }
}

// -------------------------------------------------------------------------------------------------------------------- tiles
// `count` quads from `quad` on, by the walk that is not planar.
template <Dtype D, Dtype Y, bool kFold, bool kAffine, bool kRelu>
void run_tile(const Task& t, Planes<D, Y> p, const Row& row, int64_t quad, int64_t count) {
    if (t.x_width)
        pooled<D, Y, kFold, kAffine, kRelu>(t, p, row, quad, count);
    else if (walk(t) == Walk::scattered)
        scattered<D, Y, kFold, kAffine, kRelu>(t, p, row, quad, count);
    else
        flat<D, Y, kFold, kAffine, kRelu>(t, p + 4 * quad, row, quad, count);
}

template <Dtype D, Dtype Y, bool kAffine, bool kRelu> void run(const Task& t, int64_t begin, int64_t end) {
    const int64_t elements = t.channels * t.spatial, x_elements = t.channels * t.x_spatial, quads = groups(t) * t.spatial;
    const int64_t tiles = tiles_per_row(t), tiles_per_group = ceil_div(t.spatial, kRun);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t r = tile / tiles, part = tile % tiles, source = t.rows == t.images ? r % t.images : r;
        const bool first_draw = r == source;  // of a lazily packed row: the others would write the same clean values again
        const Planes<D, Y> p = {
            static_cast<const T<D>*>(t.x) + source * x_elements, static_cast<T<Y>*>(t.y) + r * elements,
            t.clean && first_draw ? static_cast<T<D>*>(t.clean) + r * elements : nullptr,
        };
        const Row row = make_row(t, r);
        if (walk(t) == Walk::planar) {
            const int64_t first = part % tiles_per_group * kRun;
            planar<D, Y, kAffine, kRelu>(t, p, row, part / tiles_per_group, first, min(kRun, t.spatial - first));
            continue;
        }
        const int64_t quad = part * kTile, count = min(kTile, quads - quad);
        if constexpr (!kAffine)
            if (folds<kAffine>(t)) {
                run_tile<D, Y, true, kAffine, kRelu>(t, p, row, quad, count);
                continue;
            }
        run_tile<D, Y, false, kAffine, kRelu>(t, p, row, quad, count);
    }
}

template <Dtype D> void run_floats(const Task& t, int64_t begin, int64_t end) {
    if (t.affine)
        t.relu ? run<D, D, true, true>(t, begin, end) : run<D, D, true, false>(t, begin, end);
    else
        t.relu ? run<D, D, false, true>(t, begin, end) : run<D, D, false, false>(t, begin, end);
}

template <Dtype D> void run_bytes(const Task& t, int64_t begin, int64_t end) {
    t.relu ? run<D, Dtype::u8, true, true>(t, begin, end) : run<D, Dtype::u8, true, false>(t, begin, end);
}

// ------------------------------------------------------------------------------------------------------------------- lines
// act(x * scale + shift) of `count` quads from `x` on, in quad order.
template <Dtype D, bool kAffine, bool kRelu> void activate_flat(const Task& t, const T<D>* x, T<D>* clean, float* y, int64_t count) {
    const int64_t channels = 4 * groups(t), end = 4 * count, whole = end / kLanes * kLanes;
    int64_t channel = 0;
    const auto vector = [&](const T<D>* from, T<D>* rounded, float* to) __attribute__((always_inline)) {
        const vf one = splat(1.0f);
        const vf scale = kAffine ? read<vf>(t.scale + channel) : one, shift = kAffine ? read<vf>(t.shift + channel) : one;
        const vf a = activate<kAffine, kRelu>(load<D>(from), scale, shift);
        store<Dtype::f32>(to, a);
        if (rounded) store_exact<D>(rounded, a);
    };
    for (int64_t i = 0; i < whole; i += kLanes) {
        vector(x + i, clean ? clean + i : nullptr, y + i);
        channel += kLanes;
        if (channel >= channels) channel %= channels;
    }
    T<D> in[kLanes] = {}, rounded[kLanes];
    float out[kLanes];
    std::memcpy(in, x + whole, (end - whole) * sizeof(T<D>));
    vector(in, rounded, out);
    std::memcpy(y + whole, out, (end - whole) * sizeof(float));
    if (clean) std::memcpy(clean + whole, rounded, (end - whole) * sizeof(T<D>));
}

template <Dtype D, bool kAffine, bool kRelu>
void line(const Task& t, int64_t r, int64_t first, int64_t count, bool clean, float* y, float* work) {
    const int64_t channels = t.channels, padded = 4 * groups(t), quads = groups(t) * count, quad = groups(t) * first, part = 4 * quads + 16;
    const int64_t source = t.rows == t.images ? r % t.images : r;
    const auto spread = [&](const T<D>* from, int64_t step_from, T<D>* to, int64_t step_to) {
        for (int64_t s = 0; s < count; ++s) std::memcpy(to + s * step_to, from + s * step_from, channels * sizeof(T<D>));
    };
    T<D>*const in = reinterpret_cast<T<D>*>(work), *const buffer = reinterpret_cast<T<D>*>(work + part);
    const T<D>* x = static_cast<const T<D>*>(t.x) + source * t.x_spatial * channels;
    T<D>* const kept = t.clean && clean && r == source ? static_cast<T<D>*>(t.clean) + (source * t.spatial + first) * channels : nullptr;
    T<D>* const rounded = kept && channels != padded ? buffer : kept;
    const auto noise = [&](auto type, const auto* from, auto* to_clean, auto affine, auto relu) {
        constexpr Dtype kFrom = decltype(type)::value;
        if (!t.sigma) return activate_flat<kFrom, affine, relu>(t, from, to_clean, y, quads);
        const Row row = make_row(t, r);
        if constexpr (!affine)
            if (folds<affine>(t)) return flat<kFrom, Dtype::f32, true, affine, relu>(t, {from, y, to_clean}, row, quad, quads);
        flat<kFrom, Dtype::f32, false, affine, relu>(t, {from, y, to_clean}, row, quad, quads);
    };
    if (t.x_width) {
        float* const value = work + 2 * part;
        pool<D, kAffine, kRelu>(t, x, quad, quads, value);
        if (rounded) {
            for (int64_t i = 0; i < 4 * quads; i += kLanes) store_exact<D>(buffer + i, read<vf>(value + i));
            if (rounded != buffer) std::memcpy(rounded, buffer, 4 * quads * sizeof(T<D>));
        }
        noise(std::integral_constant<Dtype, Dtype::f32>{}, value, static_cast<float*>(nullptr), std::false_type{}, std::false_type{});
    } else {
        x += first * channels;
        if (channels != padded) {
            std::memset(in, 0, 4 * quads * sizeof(T<D>));
            spread(x, channels, in, padded), x = in;
        }
        noise(std::integral_constant<Dtype, D>{}, x, rounded, std::bool_constant<kAffine>{}, std::bool_constant<kRelu>{});
    }
    if (rounded != kept) spread(buffer, padded, kept, channels);
}

template <Dtype D> void line_of_floats(const Task& t, int64_t r, int64_t first, int64_t count, bool clean, float* y, float* work) {
    if (t.affine)
        t.relu ? line<D, true, true>(t, r, first, count, clean, y, work) : line<D, true, false>(t, r, first, count, clean, y, work);
    else
        t.relu ? line<D, false, true>(t, r, first, count, clean, y, work) : line<D, false, false>(t, r, first, count, clean, y, work);
}

template <typename V> RSE_INLINE void put(void* p, V v) { std::memcpy(p, &v, sizeof v); }

}  // namespace

void RSE_CONCAT(sample_, RSE_UNIT)(const Sample& s) {
    const Row row = make_row(s.task, 0);
    Quads quads(s.quad, 1, [](int lane) { return lane; });
    for (int64_t i = 0; i < s.count; i += kLanes, quads.advance(kLanes)) {
        vu w[4];
        vf z[4];
        words(row, quads, w);
        for (int j = 0; s.given && j < 4; ++j) w[j] = read<vu>(s.given + j * s.count + i);
        box_muller(w, splat(1.0f), z);
        for (int j = 0; j < 4; ++j) {
            const int64_t at = j * s.count + i;
            put(s.words + at, w[j]), put(s.normals + at, z[j]);
            put(s.uniforms + at, j % 2 ? angle(w[j]) * 0x1p-31f : uniform(w[j]) * (1 / kUnit));
        }
    }
}

void RSE_CONCAT(add_line_, RSE_UNIT)(const Task& t, int64_t r, int64_t first, int64_t count, bool clean, float* y, float* work) {
    if (t.dtype == Dtype::f32) return line_of_floats<Dtype::f32>(t, r, first, count, clean, y, work);
    line_of_floats<Dtype::bf16>(t, r, first, count, clean, y, work);
}

void RSE_CONCAT(add_noise_, RSE_UNIT)(const Task& t, int64_t begin, int64_t end) {
    if (t.y_dtype == Dtype::u8) {
        switch (t.dtype) {
            case Dtype::f32: return run_bytes<Dtype::f32>(t, begin, end);
            case Dtype::bf16: return run_bytes<Dtype::bf16>(t, begin, end);
            case Dtype::f16: return run_bytes<Dtype::f16>(t, begin, end);
            case Dtype::u8: return run_bytes<Dtype::u8>(t, begin, end);
            case Dtype::s32: return run_bytes<Dtype::s32>(t, begin, end);
        }
    }
    switch (t.dtype) {
        case Dtype::f32: return run_floats<Dtype::f32>(t, begin, end);
        case Dtype::bf16: return run_floats<Dtype::bf16>(t, begin, end);
        default: return run_floats<Dtype::f16>(t, begin, end);
    }
}

}  // namespace rse
