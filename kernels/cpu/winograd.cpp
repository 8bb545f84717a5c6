// One unit of Winograd's 3x3 convolution with noise in its input: compiled once per instruction set, with RSE_UNIT naming the unit.
//
// A thread walks its tiles in blocks. A strip of noisy lines, as high as a tile, moves down the image, so noise is made once though tiles
// overlap; the block's tiles are transformed out of it, multiplied by the weights of kColumns outputs at a time, and transformed back. All
// stays in the second-level cache but the weights of wide layers. No thread waits for another.
#include "winograd.h"

#include "vec.h"

#define RSE_CONCAT_(a, b) a##b
#define RSE_CONCAT(a, b) RSE_CONCAT_(a, b)

namespace rse {

void RSE_CONCAT(add_line_, RSE_UNIT)(const Task&, int64_t, int64_t, int64_t, bool, float*, float*);

namespace {

template <Dtype D> using T = typename Element<D>::type;

template <typename V> RSE_INLINE void put(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// ------------------------------------------------------------------------------------------------------------- transforms
// B^T d and A^T m of one line of a tile. The points of F(4x4) are 0, +-5/8, +-3/2 and infinity: every coefficient is exact in float32, and
// the error is half that of the usual 0, +-1, +-2 at the same cost.
template <int kForm> struct Transform;

template <> struct Transform<4> {
    static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;

    static RSE_INLINE void input(const vf d[6], vf t[6]) {
        const vf even_a = madd(d[2], splat(-b2), d[4]), odd_a = madd(d[1], splat(-b2), d[3]);
        const vf even_b = madd(d[2], splat(-a2), d[4]), odd_b = madd(d[1], splat(-a2), d[3]);
        t[0] = madd(d[0], splat(a2 * b2), madd(d[2], splat(-(a2 + b2)), d[4]));
        t[1] = madd(odd_a, splat(a), even_a), t[2] = madd(odd_a, splat(-a), even_a);
        t[3] = madd(odd_b, splat(b), even_b), t[4] = madd(odd_b, splat(-b), even_b);
        t[5] = madd(d[1], splat(a2 * b2), madd(d[3], splat(-(a2 + b2)), d[5]));
    }
    static RSE_INLINE void output(const vf m[6], vf y[4]) {
        const vf even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
        y[0] = m[0] + even_a + even_b;
        y[1] = madd(odd_a, splat(a), odd_b * b);
        y[2] = madd(even_a, splat(a2), even_b * b2);
        y[3] = madd(odd_a, splat(a2 * a), madd(odd_b, splat(b2 * b), m[5]));
    }
};

template <> struct Transform<2> {  // points 0, +-1 and infinity
    static RSE_INLINE void input(const vf d[4], vf t[4]) { t[0] = d[2] - d[0], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[3] - d[1]; }
    static RSE_INLINE void output(const vf m[4], vf y[2]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] + m[3]; }
};

// --------------------------------------------------------------------------------------------------------------- products
#if defined(__AVX512F__)
constexpr int kMost = 14;  // tiles whose products with two vectors of outputs are held in registers
#elif defined(__AVX2__)
constexpr int kMost = 6;
#else
constexpr int kMost = 4;
#endif

// What is multiplied: a float, or two bfloat16 or four bytes of neighbouring channels. The rows of a position's weights begin behind
// kHeader others, which are a sum's beginning and what turns it into a float.
struct Floats {
    using Element = float;
    using Sum = vf;
    static constexpr int kPair = 1, kHeader = 0;
    static RSE_INLINE void store_channels(float* p, vf v, vf, const float*) { put(p, v); }
    static RSE_INLINE vf begin(const float*, int) { return vf{}; }
    static RSE_INLINE vf end(const float*, int, vf sum) { return sum; }
    static RSE_INLINE vf multiply(const float* a, const float* u, vf sum) { return madd(splat(*a), read<vf>(u), sum); }
};
#if defined(__AVX512BF16__)
struct Bfloats {
    using Element = uint16_t;
    using Sum = vf;
    static constexpr int kPair = 2, kHeader = 0;
    static RSE_INLINE void store_channels(uint16_t* p, vf v, vf, const float*) { put(p, to_bf16(v)); }
    static RSE_INLINE vf begin(const uint16_t*, int) { return vf{}; }
    static RSE_INLINE vf end(const uint16_t*, int, vf sum) { return sum; }
    static RSE_INLINE vf multiply(const uint16_t* a, const uint16_t* u, vf sum) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(read<int32_t>(a)), read<__m512bh>(u));
    }
};
#endif
#if defined(__AVX512VNNI__)
// Unsigned bytes times signed ones: a sum begins at what the bytes' zero point makes of its column of weights.
struct Bytes {
    using Element = uint8_t;
    using Sum = vi;
    static constexpr int kPair = 4, kHeader = 2;
    static RSE_INLINE void store_channels(uint8_t* p, vf v, vf factor, const float* unit) {
        const __m512 scaled = _mm512_fmadd_ps((__m512)(v * factor), _mm512_set1_ps(unit[0]), _mm512_set1_ps(unit[1]));
        put(p, _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_max_ps(scaled, _mm512_setzero_ps()))));
    }
    static RSE_INLINE vi begin(const uint8_t* header, int column) { return read<vi>(header + 4 * column); }
    static RSE_INLINE vi multiply(const uint8_t* a, const uint8_t* u, vi sum) {
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(read<int32_t>(a)), read<__m512i>(u));
    }
    static RSE_INLINE vf end(const uint8_t* header, int column, vi sum) {
        return __builtin_convertvector(sum, vf) * read<vf>(header + 4 * (kColumns + column));
    }
};
#endif

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

// ------------------------------------------------------------------------------------------------------------------ tiles
template <int kForm, typename P>
RSE_INLINE void transform_input(const Convolution& c, const Places& at, const float* const lines[], float* work, int64_t n) {
    constexpr int kSide = kForm + 2;
    const int64_t channels = 4 * groups(c.source);
    for (int64_t k = 0; k < channels; k += kLanes) {
        vf part[kSide][kSide];
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
            vf d[kSide], t[kSide];
#pragma GCC unroll 6
            for (int i = 0; i < kSide; ++i) d[i] = read<vf>(lines[i] + j * channels + k);
            Transform<kForm>::input(d, t);
#pragma GCC unroll 6
            for (int i = 0; i < kSide; ++i) part[i][j] = t[i];
        }
        auto* to = reinterpret_cast<typename P::Element*>(work + at.input) + n * at.tile + k;
        const vf factor = P::kHeader ? read<vf>(c.units + 2 * kSide * kSide + k) : vf{};
#pragma GCC unroll 6
        for (int i = 0; i < kSide; ++i) {
            vf t[kSide];
            Transform<kForm>::input(part[i], t);
#pragma GCC unroll 6
            for (int j = 0; j < kSide; ++j, to += at.transformed) P::store_channels(to, t[j], factor, P::kHeader ? c.units + 2 * (i * kSide + j) : nullptr);
        }
    }
}

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
    const int64_t across = tiles_across(c), down = tiles_down(c), channels = 4 * groups(t), steps = ceil_div(t.channels, P::kPair), rows = P::kHeader + steps;
    const int64_t area = (c.height + 2 * c.padding - 2) * (c.width + 2 * c.padding - 2);
    // An image is read for all its draws while it is near.
    const auto row_of = [&](int64_t image) { return image % t.draws * t.images + image / t.draws; };
    float* const strip = work + at.strip;
    std::memset(strip, 0, kSide * at.strip_row * sizeof(float));
    const float* lines[kSide];
    // Moves the strip to line `number` of tiles: the last two lines of the tiles above are there already, unless this is where the thread
    // begins.
    const auto move = [&](int64_t number) {
        const int64_t ty = number % down, row = row_of(number / down);
        for (int64_t i = number == begin || ty == 0 ? 0 : 2; i < kSide; ++i) {
            const int64_t padded = ty * kForm + i, y = padded - c.padding;
            float* const to = strip + padded % kSide * at.strip_row;
            if (y < 0 || y >= c.height) {
                std::memset(to, 0, at.strip_row * sizeof(float));
            } else {
                const bool clean = i >= 2 || ty == 0;  // of the two that overlap, they belong to the tiles above
                RSE_CONCAT(add_line_, RSE_UNIT)(t, row, y * c.width, c.width, clean, to + c.padding * channels, work + at.line);
            }
        }
    };
    const int64_t start = begin * across, tiles = (end - begin) * across, blocks = ceil_div(tiles, c.block);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t next = start + tiles * block / blocks, n = start + tiles * (block + 1) / blocks - next;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t number = (next + i) / across, column = (next + i) % across;
            if (column == 0) move(number);
            for (int j = 0; j < kSide; ++j)
                lines[j] = strip + (number % down * kForm + j) % kSide * at.strip_row + column * kForm * channels;
            transform_input<kForm, P>(c, at, lines, work, i);
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
                const int64_t base = row_of(number / down) * area;
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
