// One unit of y = maxpool?(act(x * scale + shift)) + sigma * eps, in floats or rounded to bytes: compiled once per instruction set, with RSE_UNIT naming the unit.
#include "noise.h"

#define RSE_CONCAT_(a, b) a##b
#define RSE_CONCAT(a, b) RSE_CONCAT_(a, b)

namespace rse {
namespace {

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
