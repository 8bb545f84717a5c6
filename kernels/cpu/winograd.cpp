// One unit of Winograd's 3x3 convolution with noise in its input: compiled once per instruction set, with RSE_UNIT naming the unit.
//
// A thread walks its tiles in blocks. A block's tiles are transformed out of a strip of noisy lines, multiplied by the weights of kColumns
// outputs at a time, and transformed back. All stays in the second-level cache but the weights of wide layers. No thread waits for another.
#include "tiles.h"

namespace rse {
namespace {

template <Dtype D> using T = typename Element<D>::type;

// --------------------------------------------------------------------------------------------------------------- products
template <typename P> using E = typename P::Element;

// out[kTiles][kColumns] of 2 * kLanes columns: channel after channel, each with one rounding, so that no sum depends on how tiles are
// grouped.
template <typename P, int kTiles>
__attribute__((noinline)) void multiply(const E<P>* a, int64_t stride, const E<P>* u, int64_t steps, float* out) {
    const E<P>* const header = u;
    typename P::Sum sum[kTiles][2];
#pragma GCC unroll 14
    for (int i = 0; i < kTiles; ++i) sum[i][0] = P::begin(header, 0), sum[i][1] = P::begin(header, kLanes);
    u += P::kHeader * P::kPair * kColumns;
    for (int64_t k = 0; k < steps; ++k, a += P::kPair, u += P::kPair * kColumns) {
#pragma GCC unroll 14
        for (int i = 0; i < kTiles; ++i) {
            sum[i][0] = P::multiply(a + i * stride, u, sum[i][0]);
            sum[i][1] = P::multiply(a + i * stride, u + P::kPair * kLanes, sum[i][1]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < kTiles; ++i)
        put(out + i * kColumns, P::end(header, 0, sum[i][0])), put(out + i * kColumns + kLanes, P::end(header, kLanes, sum[i][1]));
}

template <typename P, int kTiles = kMost>
RSE_INLINE void multiply_some(int64_t tiles, const E<P>* a, int64_t stride, const E<P>* u, int64_t steps, float* out) {
    if (tiles == kTiles) return multiply<P, kTiles>(a, stride, u, steps, out);
    if constexpr (kTiles > 1) multiply_some<P, kTiles - 1>(tiles, a, stride, u, steps, out);
}

// ----------------------------------------------------------------------------------------------------------------- output
// kColumns outputs from `first` on of the tile whose upper left output is (top, left).
template <Dtype D, int kForm>
RSE_INLINE void transform_output(const Convolution& c, const Places& at, const float* product, int64_t first, int64_t base, int64_t top,
                                 int64_t left) {
    constexpr int kSide = kForm + 2;
    const int64_t height = c.height + 2 * c.padding - 2, width = c.width + 2 * c.padding - 2;
    for (int64_t k = 0; k < kColumns && first + k < c.outputs; k += kLanes) {
        vf part[kForm][kSide];
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
            vf m[kSide], y[kForm];
#pragma GCC unroll 6
            for (int i = 0; i < kSide; ++i) m[i] = read<vf>(product + (i * kSide + j) * at.product + k);
            Transform<kForm>::output(m, y);
#pragma GCC unroll 4
            for (int i = 0; i < kForm; ++i) part[i][j] = y[i];
        }
        const int64_t present = min(kLanes, c.outputs - first - k);
        const vf bias = read<vf>(c.bias + first + k);
        for (int64_t i = 0; i < min(kForm, height - top); ++i) {
            vf y[kForm];
            Transform<kForm>::output(part[i], y);
            for (int64_t j = 0; j < min(kForm, width - left); ++j) {
                const int64_t place = (base + (top + i) * width + left + j) * c.outputs + first + k;
                T<D>* const to = static_cast<T<D>*>(c.y) + place;
                const T<D>* const residual = c.residual ? static_cast<const T<D>*>(c.residual) + place : nullptr;
                vf v = y[j] + bias;
                T<D> part_of[kLanes] = {};
                if (residual) {
                    if (present < kLanes) std::memcpy(part_of, residual, present * sizeof(T<D>));
                    v += load<D>(present < kLanes ? part_of : residual);
                }
                if (c.relu) v = relu(v);
                if (present == kLanes) {
                    store<D>(to, v);
                } else {
                    store<D>(part_of, v);
                    std::memcpy(to, part_of, present * sizeof(T<D>));
                }
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------------ calls
template <Dtype D, int kForm, typename P> void convolve(const Convolution& c, float* work, int64_t begin, int64_t end) {
    constexpr int kSide = kForm + 2;
    using Element = typename P::Element;
    const Task& t = c.source;
    const Places at = places(c);
    const int64_t across = tiles_across(c), down = tiles_down(c), steps = ceil_div(t.channels, P::kPair), rows = P::kHeader + steps;
    const int64_t area = (c.height + 2 * c.padding - 2) * (c.width + 2 * c.padding - 2);
    Strip<kForm> strip(c, at, work, begin);
    const float* lines[kSide];
    const int64_t start = begin * across, tiles = (end - begin) * across, blocks = ceil_div(tiles, c.block);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t next = start + tiles * block / blocks, n = start + tiles * (block + 1) / blocks - next;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t number = (next + i) / across, column = (next + i) % across;
            if (column == 0) strip.move(number);
            strip.lines(number, column, lines);
            transform_input<kForm, P>(c, at, lines, work + at.input, i);
        }
        const int64_t panels = ceil_div(n, kMost);
        for (int64_t first = 0; first < c.outputs; first += kColumns) {
            const Element* u = static_cast<const Element*>(c.weight) + first * kSide * kSide * rows * P::kPair;
            for (int p = 0; p < kSide * kSide; ++p, u += rows * P::kPair * kColumns) {
                const Element* a = reinterpret_cast<const Element*>(work + at.input) + p * at.transformed;
                float* const out = work + at.output + p * at.product;
                for (int64_t i = 0; i < panels; ++i) {
                    const int64_t from = n * i / panels, count = n * (i + 1) / panels - from;
                    for (int h = 0; h < kColumns; h += 2 * kLanes)
                        multiply_some<P>(count, a + from * at.tile, at.tile, u + h * P::kPair, steps, out + from * kColumns + h);
                }
            }
            for (int64_t i = 0; i < n; ++i) {
                const int64_t number = (next + i) / across, column = (next + i) % across;
                const int64_t base = Strip<kForm>::row(t, number / down) * area;
                transform_output<D, kForm>(c, at, work + at.output + i * kColumns, first, base, number % down * kForm, column * kForm);
            }
        }
    }
}

template <Dtype D> void convolve_dtype(const Convolution& c, float* work, int64_t begin, int64_t end) {
#if defined(__AVX512VNNI__)
    if (c.products == Dtype::u8)
        return c.form == 4 ? convolve<D, 4, Bytes>(c, work, begin, end) : convolve<D, 2, Bytes>(c, work, begin, end);
#endif
#if defined(__AVX512BF16__)
    if (c.products == Dtype::bf16)
        return c.form == 4 ? convolve<D, 4, Bfloats>(c, work, begin, end) : convolve<D, 2, Bfloats>(c, work, begin, end);
#endif
    c.form == 4 ? convolve<D, 4, Floats>(c, work, begin, end) : convolve<D, 2, Floats>(c, work, begin, end);
}

}  // namespace

void RSE_CONCAT(winograd_, RSE_UNIT)(const Convolution& c, float* work, int64_t begin, int64_t end) {
    if (c.source.dtype == Dtype::f32) return convolve_dtype<Dtype::f32>(c, work, begin, end);
    convolve_dtype<Dtype::bf16>(c, work, begin, end);
}

}  // namespace rse
