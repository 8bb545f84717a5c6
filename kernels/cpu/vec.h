// Vectors of kLanes floats or 32-bit words for one instruction set, and the few operations on them that noise needs.
//
// Written with the vector extensions of GCC and Clang, so the same text serves every instruction set; intrinsics stand only where
// the compiler does not find the right instruction. Everything is in an anonymous namespace and inlined: a function with a shared
// name would be merged by the linker across units, and could bring AVX-512 code into the baseline unit.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include "add_noise.h"
#if defined(__AVX512F__)
#include "tables.h"
#endif

#define RSE_INLINE inline __attribute__((always_inline))

namespace rse {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));      // kLanes floats
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));    // kLanes signed words
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));   // kLanes words
typedef uint64_t vq __attribute__((vector_size(4 * kLanes)));   // kLanes / 2 double words
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));   // kLanes half words, as stored
typedef uint8_t vb __attribute__((vector_size(kLanes)));        // kLanes bytes, as stored

RSE_INLINE vf splat(float a) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(a);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(a);
#else
    return vf{a, a, a, a};
#endif
}

// a where the sign bit of `sign` is set, b elsewhere.
RSE_INLINE vf select(vi sign, vf a, vf b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (vf)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)sign);
#else
    const vi mask = sign >> 31;
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
#endif
}

// a * b + c, in one rounding where the unit has it. Spelled out, with contraction by the compiler off, because every path through
// a unit must round alike: bits may not depend on the memory layout.
RSE_INLINE vf madd(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// max(a, 0) that keeps NaN.
RSE_INLINE vf relu(vf a) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps(_mm512_setzero_ps(), (__m512)a);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps(_mm256_setzero_ps(), (__m256)a);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps(_mm_setzero_ps(), (__m128)a);
#else
    return (vf)((vi)a & ~(a < 0.0f));
#endif
}

// max(a, b), NaN where one of them is NaN. The instruction gives its second operand then, so one of the two orders finds it.
RSE_INLINE vf largest(vf a, vf b) {
#if defined(__AVX512F__)
    const __m512i ab = (__m512i)_mm512_max_ps((__m512)a, (__m512)b), ba = (__m512i)_mm512_max_ps((__m512)b, (__m512)a);
    return (vf)_mm512_or_si512(ab, ba);
#elif defined(__AVX2__)
    return (vf)_mm256_or_ps(_mm256_max_ps((__m256)a, (__m256)b), _mm256_max_ps((__m256)b, (__m256)a));
#elif defined(__SSE2__)
    return (vf)_mm_or_ps(_mm_max_ps((__m128)a, (__m128)b), _mm_max_ps((__m128)b, (__m128)a));
#else
    const vi other = (b > a) | (b != b);
    return (vf)(((vi)b & other) | ((vi)a & ~other));
#endif
}

// ---------------------------------------------------------------------------------------------------------------- integers
// Low words of the double words of `a` times m: the exact 64-bit product; the high words of `a` may hold anything.
RSE_INLINE vq mul_wide(vq a, uint32_t m) {
#if defined(__AVX512F__)
    return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
    return (a & 0xffffffffu) * m;
#endif
}

// Low words of `even` and `odd`, alternating.
RSE_INLINE vu interleave_low(vq even, vq odd) {
#if defined(__AVX512F__)
    return (vu)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
    return (vu)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
    return (vu)((even & 0xffffffffu) | (odd << 32));
#endif
}

// ------------------------------------------------------------------------------------------------------------ Box-Muller
// Every normal is within 1e-6 of float64, the largest ones (6.77, where a float's last bit is 4.8e-7) included. So each of ln, sqrt
// and the final product may round a large value once, and everything else is added up while it is small.
#if defined(__AVX512F__)
constexpr float kUnit = 2.0f;
#else
constexpr float kUnit = 1.0f;
#endif

// The words' uniforms u = fl(fl(w) 2^-32 + 2^-33) in (0, 1], times kUnit: a power of two is exact, and `radius` has its wishes.
RSE_INLINE vf uniform(vu words) {
#if defined(__AVX512F__)
    const __m512 scale = _mm512_set1_ps(0x1p-32f * kUnit), half = _mm512_set1_ps(0x1p-33f * kUnit);
    return (vf)_mm512_fmadd_ps(_mm512_cvtepu32_ps((__m512i)words), scale, half);
#else
    // fl of an unsigned word: both halves convert exactly, so their sum is rounded once.
    const vf high = __builtin_convertvector((vi)(words >> 16), vf), low = __builtin_convertvector((vi)(words & 0xffffu), vf);
    return madd(madd(high, splat(0x1p16f), low), splat(0x1p-32f), splat(0x1p-33f));
#endif
}

// The words' angles fl(int32(w)) = 2^31 v. The factor 2^-31 is exact, so it can wait for an FMA.
RSE_INLINE vf angle(vu words) { return __builtin_convertvector((vi)words, vf); }

// sqrt(-2 ln u), given kUnit * u. u = 1 gives exactly 0.
RSE_INLINE vf radius(vf u);
// r cos(pi v) and r sin(pi v), given a = 2^31 v.
RSE_INLINE void polar(vf r, vf a, vf& x, vf& y);

#if defined(__AVX512F__)
// 32-entry tables held in two registers each, looked up by one permute: shorter polynomials than any full-range fit.

// u = 2^e m, m in [1/2, 1); ln m by the first five bits j of m: m = c (1 + t) with c inside interval j. c is the interval's middle,
// but exactly 1/2 for j = 0 and exactly 1 for j = 31, so that u = 1 gives 0 and ln u keeps its relative precision as u tends to 1.
RSE_INLINE vf radius(vf u) {
    const __m512i j = _mm512_srli_epi32((__m512i)u, 18);  // a permute reads the low five bits only
    const __m512 m = _mm512_getmant_ps((__m512)u, _MM_MANT_NORM_p5_1, _MM_MANT_SIGN_zero);
    const __m512 e = _mm512_getexp_ps((__m512)u);  // of 2u: with m below 1, the exponent of u is one less than e
    const __m512 scale = _mm512_permutex2var_ps(_mm512_load_ps(kLogScale), j, _mm512_load_ps(kLogScale + 16));
    const __m512 log = _mm512_permutex2var_ps(_mm512_load_ps(kLogValue), j, _mm512_load_ps(kLogValue + 16));
    const __m512 t = _mm512_fmadd_ps(m, scale, _mm512_set1_ps(2.0f));  // -2 (m / c - 1)
    // -2 ln(m / c) = t + t^2 (a + b t), |t| <= 1/16
    const __m512 q = _mm512_fmadd_ps(t, _mm512_set1_ps(kLogB), _mm512_set1_ps(kLogA));
    const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(t, t), q, _mm512_add_ps(log, t));
    const __m512 l = _mm512_fmadd_ps(e, _mm512_set1_ps(kMinusTwoLn2), small);
    return (vf)_mm512_sqrt_ps(_mm512_max_ps(l, _mm512_setzero_ps()));
}

RSE_INLINE void polar(vf r, vf a, vf& x, vf& y) {
    // v = k / 16 + d, |d| <= 1/32: adding 1.5 * 2^23 / 16 rounds to a multiple of 1/16 and leaves k in the low bits.
    const __m512 w = (__m512)a, scale = _mm512_set1_ps(0x1p-31f), shift = _mm512_set1_ps(0x1.8p19f);
    const __m512 k = _mm512_fmadd_ps(w, scale, shift);
    const __m512 d = _mm512_fmsub_ps(w, scale, _mm512_sub_ps(k, shift));
    const __m512i j = _mm512_castps_si512(k);
    const __m512 ck = _mm512_permutex2var_ps(_mm512_load_ps(kCos), j, _mm512_load_ps(kCos + 16));
    const __m512 sk = _mm512_permutex2var_ps(_mm512_load_ps(kSin), j, _mm512_load_ps(kSin + 16));
    const __m512 d2 = _mm512_mul_ps(d, d);
    const __m512 sd = _mm512_mul_ps(d, _mm512_fmadd_ps(d2, _mm512_set1_ps(kSin3), _mm512_set1_ps(kSin1)));   // sin(pi d)
    const __m512 cd = _mm512_mul_ps(d2, _mm512_fmadd_ps(d2, _mm512_set1_ps(kCos4), _mm512_set1_ps(kCos2)));  // cos(pi d) - 1
    const __m512 dx = _mm512_fnmadd_ps(sk, sd, _mm512_mul_ps(ck, cd)), dy = _mm512_fmadd_ps(ck, sd, _mm512_mul_ps(sk, cd));
    x = (vf)_mm512_fmadd_ps((__m512)r, ck, _mm512_mul_ps((__m512)r, dx));
    y = (vf)_mm512_fmadd_ps((__m512)r, sk, _mm512_mul_ps((__m512)r, dy));
}

#else
RSE_INLINE vf sqrt(vf a) {
#if defined(__AVX2__)
    return (vf)_mm256_sqrt_ps((__m256)a);
#elif defined(__SSE2__)
    return (vf)_mm_sqrt_ps((__m128)a);
#else
    for (int i = 0; i < kLanes; ++i) a[i] = __builtin_sqrtf(a[i]);
    return a;
#endif
}

RSE_INLINE vf radius(vf u) {
    // u = 2^e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); ln(1 + f) = f - f^2 / 2 + f^3 P(f), all times -2, which is exact
    const vi bits = (vi)u, e = (bits - 0x3f3504f3) >> 23;
    const vf f = (vf)(bits - (e << 23)) - 1.0f;
    vf p = madd(f, splat(-2 * 0.08748658f), splat(-2 * -0.1435411f));
    p = madd(p, f, splat(-2 * 0.1493525f));
    p = madd(p, f, splat(-2 * -0.16565976f));
    p = madd(p, f, splat(-2 * 0.19959858f));
    p = madd(p, f, splat(-2 * -0.25001729f));
    p = madd(p, f, splat(-2 * 0.33334004f));
    p = madd(p, f, splat(-2 * -0.5f));
    p = madd(p, f, splat(-2 * 1.0f));
    // ln 2 in two parts: n times the first is exact.
    const vf n = __builtin_convertvector(e, vf), small = madd(p, f, n * splat(-2 * -2.12194440e-4f));
    return sqrt(madd(n, splat(-2 * 0.693359375f), small));
}

RSE_INLINE void polar(vf r, vf a, vf& x, vf& y) {
    // v = q / 2 + d, |d| <= 1/4: adding 1.5 * 2^23 / 2 rounds to a multiple of 1/2 and leaves q in the low bits.
    const vf shift = splat(0x1.8p22f), scale = splat(0x1p-31f), k = madd(a, scale, shift), d = madd(a, scale, shift - k), d2 = d * d;
    const vf cubic = madd(madd(d2, splat(-0.59173816f), splat(2.5500762f)), d2, splat(-5.1677184f));
    const vf sd = madd(d, splat(3.1415927f), d * d2 * cubic);
    const vf p = madd(madd(madd(d2, splat(0.23142954f), splat(-1.3350585f)), d2, splat(4.0587079f)), d2, splat(-4.9348022f));
    const vf cd = madd(p, d2, splat(1.0f));
    // Odd quarters exchange the two; sin is negative in quarters 2 and 3, cos in 1 and 2. The signs go to r.
    const vi q = (vi)k, odd = q << 31, signed_r = (vi)r ^ (q << 30 & INT32_MIN);
    x = (vf)(signed_r ^ odd) * select(odd, sd, cd);
    y = (vf)signed_r * select(odd, cd, sd);
}
#endif

// ------------------------------------------------------------------------------------------------------------- shuffles
// Four words of kLanes quads to element order. Input lane 4 L + j must hold quad j * kLanes / 4 + L (`flat_quad`): the 4x4
// transposes then stay within 128-bit lanes and the four outputs are consecutive.
RSE_INLINE int flat_quad(int lane) { return lane % 4 * (kLanes / 4) + lane / 4; }

RSE_INLINE void transpose(vf z[4]) {
#if defined(__AVX512F__)
    const __m512 a = _mm512_unpacklo_ps((__m512)z[0], (__m512)z[1]), b = _mm512_unpackhi_ps((__m512)z[0], (__m512)z[1]);
    const __m512 c = _mm512_unpacklo_ps((__m512)z[2], (__m512)z[3]), d = _mm512_unpackhi_ps((__m512)z[2], (__m512)z[3]);
    z[0] = (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)c), z[1] = (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)c);
    z[2] = (vf)_mm512_unpacklo_pd((__m512d)b, (__m512d)d), z[3] = (vf)_mm512_unpackhi_pd((__m512d)b, (__m512d)d);
#elif defined(__AVX2__)
    const __m256 a = _mm256_unpacklo_ps((__m256)z[0], (__m256)z[1]), b = _mm256_unpackhi_ps((__m256)z[0], (__m256)z[1]);
    const __m256 c = _mm256_unpacklo_ps((__m256)z[2], (__m256)z[3]), d = _mm256_unpackhi_ps((__m256)z[2], (__m256)z[3]);
    z[0] = (vf)_mm256_unpacklo_pd((__m256d)a, (__m256d)c), z[1] = (vf)_mm256_unpackhi_pd((__m256d)a, (__m256d)c);
    z[2] = (vf)_mm256_unpacklo_pd((__m256d)b, (__m256d)d), z[3] = (vf)_mm256_unpackhi_pd((__m256d)b, (__m256d)d);
#else
    const vf a = z[0], b = z[1], c = z[2], d = z[3];
    for (int i = 0; i < 4; ++i) z[i] = vf{a[i], b[i], c[i], d[i]};
#endif
}

// ----------------------------------------------------------------------------------------------------------- load, store
template <Dtype> struct Element { using type = uint16_t; };
template <> struct Element<Dtype::f32> { using type = float; };
template <> struct Element<Dtype::u8> { using type = uint8_t; };
template <> struct Element<Dtype::s32> { using type = int32_t; };

template <typename T> RSE_INLINE T read(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

RSE_INLINE vu widen(const void* p) {
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32(read<__m256i>(p));
#elif defined(__AVX2__)
    return (vu)_mm256_cvtepu16_epi32(read<__m128i>(p));
#else
    return __builtin_convertvector(read<vh>(p), vu);
#endif
}

RSE_INLINE vi widen_bytes(const void* p) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32(read<__m128i>(p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(read<int64_t>(p)));
#else
    return __builtin_convertvector(read<vb>(p), vi);
#endif
}

template <Dtype D> RSE_INLINE vf load(const typename Element<D>::type* p) {
    if constexpr (D == Dtype::f32) {
        return read<vf>(p);
    } else if constexpr (D == Dtype::s32) {
        return __builtin_convertvector(read<vi>(p), vf);
    } else if constexpr (D == Dtype::u8) {
        return __builtin_convertvector(widen_bytes(p), vf);
    } else if constexpr (D == Dtype::bf16) {
        return (vf)(widen(p) << 16);
    } else {
#if defined(__AVX512F__)
        return (vf)_mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__AVX2__)
        return (vf)_mm256_cvtph_ps(read<__m128i>(p));
#else
        const vu h = widen(p), magnitude = (h & 0x7fffu) << 13;
        const vf scaled = (vf)magnitude * 0x1p112f;  // exact, subnormals included
        const vu special = (vu)(magnitude >= 0x0f800000u) & 0x7f800000u;
        return (vf)((vu)scaled | special | (h & 0x8000u) << 16);
#endif
    }
}

// The bits of y rounded to bfloat16, in 32: to nearest even, subnormals kept, NaN all ones.
RSE_INLINE vu bf16_bits(vf y) {
    const vu bits = (vu)y;
    return ((bits + 0x7fffu + (bits >> 16 & 1u)) | (vu)(y != y)) >> 16;
}

RSE_INLINE vh to_bf16_exact(vf y) { return __builtin_convertvector(bf16_bits(y), vh); }

// The hardware's conversion flushes subnormals to zero.
RSE_INLINE vh to_bf16(vf y) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)y);
#else
    return to_bf16_exact(y);
#endif
}

template <Dtype D> RSE_INLINE void store(typename Element<D>::type* p, vf y) {
    if constexpr (D == Dtype::f32) {
        std::memcpy(p, &y, sizeof y);
    } else if constexpr (D == Dtype::bf16) {
        const vh h = to_bf16(y);
        std::memcpy(p, &h, sizeof h);
    } else {
#if defined(__AVX512F__)
        const __m256i h = _mm512_cvtps_ph((__m512)y, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
        const __m128i h = _mm256_cvtps_ph((__m256)y, _MM_FROUND_TO_NEAREST_INT);
#else
        const vu bits = (vu)y, a = bits & 0x7fffffffu;
        const vu small = (vu)((vf)a + 0.5f) - 0x3f000000u;               // the addition rounds to the subnormal grid
        const vu normal = (a - 0x38000000u + 0xfffu + (a >> 13 & 1u)) >> 13;
        const vu is_small = (vu)(a < 0x38800000u), is_large = (vu)(a >= 0x477ff000u), is_nan = (vu)(a > 0x7f800000u);
        vu r = (small & is_small) | (normal & ~is_small);
        r = (r & ~is_large) | (0x7c00u & is_large) | (is_nan & (0x200u | (a >> 13 & 0x3ffu)));
        const vh h = __builtin_convertvector(r | (bits >> 16 & 0x8000u), vh);
#endif
        std::memcpy(p, &h, sizeof h);
    }
}

// `store` with subnormals kept in every unit.
template <Dtype D> RSE_INLINE void store_exact(typename Element<D>::type* p, vf y) {
    if constexpr (D == Dtype::bf16) {
        const vh h = to_bf16_exact(y);
        std::memcpy(p, &h, sizeof h);
    } else {
        store<D>(p, y);
    }
}

// Two vectors that follow each other in memory: the widest conversion of the unit.
template <Dtype D> RSE_INLINE void store_pair(typename Element<D>::type* p, vf first, vf second) {
#if defined(__AVX512BF16__)
    if constexpr (D == Dtype::bf16) {
        const __m512bh h = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
        std::memcpy(p, &h, sizeof h);
        return;
    }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (D == Dtype::bf16) {
        const __m256i lanes = _mm256_packus_epi32((__m256i)bf16_bits(first), (__m256i)bf16_bits(second));  // within 128 bits
        const __m256i h = _mm256_permute4x64_epi64(lanes, 0xD8);
        std::memcpy(p, &h, sizeof h);
        return;
    }
#endif
    store<D>(p, first);
    store<D>(p + kLanes, second);
}

// How results go to memory: a float type, or bytes with a zero point.
template <Dtype D> struct Sink {
    using T = typename Element<D>::type;
    RSE_INLINE explicit Sink(int32_t) {}
    RSE_INLINE void one(T* p, vf y) const { store<D>(p, y); }
    RSE_INLINE void four(T* p, const vf y[4]) const {  // four vectors that follow each other
        store_pair<D>(p, y[0], y[1]);
        store_pair<D>(p + 2 * kLanes, y[2], y[3]);
    }
};

// saturate(zero_point + rint(y)), rint to nearest even; NaN gives 0.
template <> struct Sink<Dtype::u8> {
    vi zero_point;
    vf most;  // what gives 255

    RSE_INLINE explicit Sink(int32_t zero) : zero_point(vi{} + zero), most(splat(float(255 - zero))) {}

    // Saturated above only. What is too low to be converted, and NaN, converts to -2^31.
    RSE_INLINE vi round(vf y) const {
#if defined(__AVX512F__)
        return (vi)_mm512_cvtps_epi32(_mm512_min_ps((__m512)most, (__m512)y)) + zero_point;
#elif defined(__AVX2__)
        return (vi)_mm256_cvtps_epi32(_mm256_min_ps((__m256)most, (__m256)y)) + zero_point;
#elif defined(__SSE2__)
        return (vi)_mm_cvtps_epi32(_mm_min_ps((__m128)most, (__m128)y)) + zero_point;
#else
        vi r;
        for (int i = 0; i < kLanes; ++i) r[i] = y[i] >= most[i] ? int32_t(most[i]) : y[i] > -512 ? int32_t(__builtin_rintf(y[i])) : -512;
        return r + zero_point;
#endif
    }

    RSE_INLINE void one(uint8_t* p, vf y) const {
        const vi r = round(y);
        const vb bytes = __builtin_convertvector(r & ~(r < 0), vb);
        std::memcpy(p, &bytes, sizeof bytes);
    }

    RSE_INLINE void four(uint8_t* p, const vf y[4]) const {
        // Both packings saturate, and work within 128-bit lanes: word k of lane L is then word L of vector k.
#if defined(__AVX512F__)
        const __m512i ab = _mm512_packs_epi32((__m512i)round(y[0]), (__m512i)round(y[1]));
        const __m512i cd = _mm512_packs_epi32((__m512i)round(y[2]), (__m512i)round(y[3]));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
        std::memcpy(p, &bytes, sizeof bytes);
#elif defined(__AVX2__)
        const __m256i ab = _mm256_packs_epi32((__m256i)round(y[0]), (__m256i)round(y[1]));
        const __m256i cd = _mm256_packs_epi32((__m256i)round(y[2]), (__m256i)round(y[3]));
        const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        std::memcpy(p, &bytes, sizeof bytes);
#elif defined(__SSE2__)
        const __m128i ab = _mm_packs_epi32((__m128i)round(y[0]), (__m128i)round(y[1]));
        const __m128i cd = _mm_packs_epi32((__m128i)round(y[2]), (__m128i)round(y[3]));
        const __m128i bytes = _mm_packus_epi16(ab, cd);
        std::memcpy(p, &bytes, sizeof bytes);
#else
        for (int j = 0; j < 4; ++j) one(p + j * kLanes, y[j]);
#endif
    }
};

}  // namespace
}  // namespace rse
