// The tiles of Winograd's algorithm, for the units of its convolution and of its weights: their transforms, and the strip of noisy lines
// that they are cut from.
#pragma once
#include "winograd.h"

#include "vec.h"

#define RSE_CONCAT_(a, b) a##b
#define RSE_CONCAT(a, b) RSE_CONCAT_(a, b)

namespace rse {

void RSE_CONCAT(add_line_, RSE_UNIT)(const Task&, int64_t, int64_t, int64_t, bool, float*, float*);

namespace {

template <typename V> RSE_INLINE void put(void* p, V v) { std::memcpy(p, &v, sizeof v); }

// ------------------------------------------------------------------------------------------------------------- transforms
// B^T d, G g and A^T m of one line of a tile, and the transposes of the last two. The points of F(4x4) are 0, +-5/8, +-3/2 and infinity:
// every coefficient of A and B is exact in float32, and the error is half that of the usual 0, +-1, +-2 at the same cost.
template <int kForm> struct Transform;

template <> struct Transform<4> {
    static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
    static constexpr float na = 1 / (2 * a2 * (a2 - b2)), nb = 1 / (2 * b2 * (b2 - a2));  // Lagrange's denominators

    static RSE_INLINE void input(const vf d[6], vf t[6]) {
        const vf even_a = madd(d[2], splat(-b2), d[4]), odd_a = madd(d[1], splat(-b2), d[3]);
        const vf even_b = madd(d[2], splat(-a2), d[4]), odd_b = madd(d[1], splat(-a2), d[3]);
        t[0] = madd(d[0], splat(a2 * b2), madd(d[2], splat(-(a2 + b2)), d[4]));
        t[1] = madd(odd_a, splat(a), even_a), t[2] = madd(odd_a, splat(-a), even_a);
        t[3] = madd(odd_b, splat(b), even_b), t[4] = madd(odd_b, splat(-b), even_b);
        t[5] = madd(d[1], splat(a2 * b2), madd(d[3], splat(-(a2 + b2)), d[5]));
    }
    // The denominators are in it, so that the others are exact.
    static RSE_INLINE void filter(const vf g[3], vf u[6]) {
        const vf even_a = madd(g[2], splat(a2 * na), g[0] * na), even_b = madd(g[2], splat(b2 * nb), g[0] * nb);
        u[0] = g[0] * (1 / (a2 * b2));
        u[1] = madd(g[1], splat(a * na), even_a), u[2] = madd(g[1], splat(-a * na), even_a);
        u[3] = madd(g[1], splat(b * nb), even_b), u[4] = madd(g[1], splat(-b * nb), even_b);
        u[5] = g[2];
    }
    static RSE_INLINE void filter_transposed(const vf u[6], vf g[3]) {
        const vf even_a = (u[1] + u[2]) * na, even_b = (u[3] + u[4]) * nb;
        g[0] = madd(u[0], splat(1 / (a2 * b2)), even_a + even_b);
        g[1] = madd(u[1] - u[2], splat(a * na), (u[3] - u[4]) * (b * nb));
        g[2] = madd(even_a, splat(a2), madd(even_b, splat(b2), u[5]));
    }
    static RSE_INLINE void output(const vf m[6], vf y[4]) {
        const vf even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
        y[0] = m[0] + even_a + even_b;
        y[1] = madd(odd_a, splat(a), odd_b * b);
        y[2] = madd(even_a, splat(a2), even_b * b2);
        y[3] = madd(odd_a, splat(a2 * a), madd(odd_b, splat(b2 * b), m[5]));
    }
    static RSE_INLINE void output_transposed(const vf y[4], vf m[6]) {
        const vf even_a = madd(y[2], splat(a2), y[0]), odd_a = madd(y[3], splat(a2 * a), y[1] * a);
        const vf even_b = madd(y[2], splat(b2), y[0]), odd_b = madd(y[3], splat(b2 * b), y[1] * b);
        m[0] = y[0], m[1] = even_a + odd_a, m[2] = even_a - odd_a, m[3] = even_b + odd_b, m[4] = even_b - odd_b, m[5] = y[3];
    }
};

template <> struct Transform<2> {  // points 0, +-1 and infinity
    static RSE_INLINE void input(const vf d[4], vf t[4]) { t[0] = d[2] - d[0], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[3] - d[1]; }
    static RSE_INLINE void filter(const vf g[3], vf u[4]) {
        const vf even = (g[0] + g[2]) * 0.5f;
        u[0] = -g[0], u[1] = madd(g[1], splat(0.5f), even), u[2] = madd(g[1], splat(-0.5f), even), u[3] = g[2];
    }
    static RSE_INLINE void filter_transposed(const vf u[4], vf g[3]) {
        const vf even = (u[1] + u[2]) * 0.5f;
        g[0] = even - u[0], g[1] = (u[1] - u[2]) * 0.5f, g[2] = even + u[3];
    }
    static RSE_INLINE void output(const vf m[4], vf y[2]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] + m[3]; }
    static RSE_INLINE void output_transposed(const vf y[2], vf m[4]) { m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = y[1]; }
};

#if defined(__AVX512F__)
constexpr int kMost = 14;  // rows whose products with two vectors are held in registers
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

// ------------------------------------------------------------------------------------------------------------------ input
// Tile `n` of a block, into `input`: [positions][tiles][channels] of the distances in `at`.
template <int kForm, typename P>
RSE_INLINE void transform_input(const Convolution& c, const Places& at, const float* const lines[], float* input, int64_t n) {
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
        auto* to = reinterpret_cast<typename P::Element*>(input) + n * at.tile + k;
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

// As many noisy lines as a tile is high. It moves down the image, so that noise is made once though tiles overlap.
template <int kForm> class Strip {
  public:
    static constexpr int kSide = kForm + 2;

    // begin: the line of tiles that comes first.
    Strip(const Convolution& c, const Places& at, float* work, int64_t begin)
        : c_(c), at_(at), strip_(work + at.strip), line_(work + at.line), begin_(begin) {
        std::memset(strip_, 0, kSide * at.strip_row * sizeof(float));
    }

    // An image is read for all its draws while it is near.
    static int64_t row(const Task& t, int64_t image) { return image % t.draws * t.images + image / t.draws; }

    // To line `number` of tiles: the last two lines of the tiles above are there already, unless it is the first.
    void move(int64_t number) {
        const int64_t down = tiles_down(c_), ty = number % down, channels = 4 * groups(c_.source);
        for (int64_t i = number == begin_ || ty == 0 ? 0 : 2; i < kSide; ++i) {
            const int64_t padded = ty * kForm + i, y = padded - c_.padding;
            float* const to = strip_ + padded % kSide * at_.strip_row;
            if (y < 0 || y >= c_.height) {
                std::memset(to, 0, at_.strip_row * sizeof(float));
            } else {
                const bool clean = i >= 2 || ty == 0;  // of the two that overlap, they belong to the tiles above
                RSE_CONCAT(add_line_, RSE_UNIT)(c_.source, row(c_.source, number / down), y * c_.width, c_.width, clean,
                                                to + c_.padding * channels, line_);
            }
        }
    }

    // The lines of the tile in `column`.
    void lines(int64_t number, int64_t column, const float* lines[kSide]) const {
        const int64_t top = number % tiles_down(c_) * kForm, left = column * kForm * 4 * groups(c_.source);
        for (int j = 0; j < kSide; ++j) lines[j] = strip_ + (top + j) % kSide * at_.strip_row + left;
    }

  private:
    const Convolution& c_;
    const Places& at_;
    float *const strip_, *const line_;
    const int64_t begin_;
};

}  // namespace
}  // namespace rse
