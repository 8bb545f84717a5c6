// The library's C interface: chooses the unit for this processor and shares the work between threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "winograd.h"

#define RSE_EXPORT extern "C" __attribute__((visibility("default")))

namespace rse {

#define RSE_DECLARE(unit)                                                                                \
    void add_noise_##unit(const Task&, int64_t, int64_t);                                                \
    void sample_##unit(const Sample&);                                                                   \
    void winograd_##unit(const Convolution&, float*, int64_t, int64_t);                                  \
    void filters_##unit(const Filters&, int64_t, int64_t);                                               \
    void gradient_transform_##unit(const WeightGradient&, float*, int64_t, int64_t, int64_t);            \
    void gradient_multiply_##unit(const WeightGradient&, int64_t, bool, int64_t, int64_t);               \
    void gradient_finish_##unit(const WeightGradient&, int64_t, int64_t);
RSE_DECLARE(baseline)
RSE_DECLARE(avx2)
RSE_DECLARE(avx512)
RSE_DECLARE(avx512bf16)

namespace {

struct Entry {
    const char* name;
    Unit unit;
    Sampler sampler;
    Convolver convolver;
    FilterTransform filters;
    WeightGradientSteps gradient;
    bool runs;
};
#define RSE_ENTRY(unit, runs)                                                       \
    Entry{#unit, add_noise_##unit, sample_##unit, winograd_##unit, filters_##unit,  \
          {gradient_transform_##unit, gradient_multiply_##unit, gradient_finish_##unit}, runs}

// The units of this library, best first.
const std::vector<Entry>& entries() {
    static const std::vector<Entry> all = [] {
        std::vector<Entry> list;
#if defined(RSE_HAVE_AVX512) || defined(RSE_HAVE_AVX2)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        (void)avx512;
#endif
#ifdef RSE_HAVE_AVX512BF16
        const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
        list.push_back(RSE_ENTRY(avx512bf16, avx512bf16));
#endif
#ifdef RSE_HAVE_AVX512
        list.push_back(RSE_ENTRY(avx512, avx512));
#endif
#ifdef RSE_HAVE_AVX2
        list.push_back(RSE_ENTRY(avx2, avx2));
#endif
        list.push_back(RSE_ENTRY(baseline, true));
        return list;
    }();
    return all;
}

const Entry* active = nullptr;

const Entry* find(const char* name) {
    for (const Entry& e : entries())
        if (e.runs && (!name || !std::strcmp(e.name, name))) return &e;
    return nullptr;
}

const Entry& current() {
    if (!active) active = find(nullptr);
    return *active;
}

// Per-channel values in units of `step`, as Task wants them: padded to whole quads, then repeated.
std::vector<float> periodic(const float* values, int64_t n, int64_t channels, float missing, double step) {
    const int64_t period = 4 * ceil_div(channels, 4);
    std::vector<float> out(period + kPeriod);
    for (int64_t i = 0; i < period + kPeriod; ++i) {
        const int64_t c = i % period;
        out[i] = float((!values ? missing : n == 1 ? values[0] : c < channels ? values[c] : 0.0f) / step);
    }
    return out;
}

// A task with its x and the address of its noise; seed is null where there is none.
Task task_of(const void* x, int32_t dtype, int64_t rows, int64_t images, int64_t draws, int64_t channels, const int64_t* seed,
             uint32_t stream, uint32_t image_offset, uint32_t draw_offset, const int64_t* sample_ids) {
    Task t{};
    t.x = x, t.dtype = Dtype(dtype), t.rows = rows, t.images = images, t.draws = draws, t.channels = channels;
    if (seed) t.key0 = uint32_t(uint64_t(*seed)), t.key1 = uint32_t(uint64_t(*seed) >> 32);
    t.stream = stream, t.image_offset = image_offset, t.draw_offset = draw_offset, t.sample_ids = sample_ids;
    return t;
}

// Calls part(begin, end) on up to `threads` threads that share [0, count); each gets `grain` or more.
template <typename Part> void share(int64_t count, int64_t grain, int64_t threads, Part part) {
#ifdef _OPENMP
    const int64_t workers = min(threads, ceil_div(count, grain));
    if (workers > 1) {
#pragma omp parallel num_threads(int(workers))
        {
            const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
            part(count * i / n, count * (i + 1) / n);
        }
        return;
    }
#endif
    (void)grain, (void)threads;
    part(0, count);
}

// Memory that a thread keeps from call to call: fresh pages cost more than what is computed in them.
class Workspace {
  public:
    ~Workspace() { std::free(memory_); }
    // At least `count` floats at the beginning of a cache line, or null.
    float* floats(int64_t count) {
        if (count > count_) {
            std::free(memory_);
            count_ = 0, memory_ = std::malloc((count + 16) * sizeof(float));
            if (!memory_) return nullptr;
            count_ = count;
        }
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) & ~uintptr_t(63));
    }

  private:
    void* memory_ = nullptr;
    int64_t count_ = 0;
};
thread_local Workspace workspace;

constexpr int64_t kFilterGrain = 64;  // blocks of kColumns filters worth waking a thread for: 10 to 20 microseconds
constexpr int64_t kGradientFloats = 1 << 21;  // transforms that are held for the gradient of a weight: they are to stay in the last cache

}  // namespace
}  // namespace rse

RSE_EXPORT int rse_abi_version(void) { return 8; }

RSE_EXPORT const char* rse_units(void) {
    static const std::string names = [] {
        std::string s;
        for (const rse::Entry& e : rse::entries())
            if (e.runs) s += (s.empty() ? "" : ",") + std::string(e.name);
        return s;
    }();
    return names.c_str();
}

RSE_EXPORT const char* rse_active_unit(void) { return rse::current().name; }

RSE_EXPORT int rse_select_unit(const char* name) {
    const rse::Entry* e = rse::find(name);
    if (!e) return -1;
    rse::active = e;
    return 0;
}

// y [draws * images, C, S] = act(x * scale + shift) + sigma * eps, x [rows, C, S] with rows = images or draws * images, both dense in
// `layout` (0: [C, S] per row, 1: [S, C]). With x_width, x is [rows, C, height, x_width] of x_spatial positions, and the largest of each
// 2x2 window takes the place of act(...); else x_width is 0 and x_spatial is `spatial`. Dtypes: 0 float32, 1 bfloat16, 2 float16,
// 3 uint8, 4 int32. sigma has 1 or C values; scale and shift have C values or are null. y_dtype is dtype (a float), step 1 and
// zero_point 0; or y_dtype is 3 for any dtype, and y = saturate(zero_point + rint(value / step)), step > 0, zero_point in [0, 255].
// clean is null or, where y_dtype is dtype, takes y without the noise, `rows` rows. Returns 0, 1 when out of memory, 2 for dtypes
// that do not go together, or 3 where sigma, scale or shift is more than 2^124 steps, which floats have no room for.
RSE_EXPORT int rse_add_noise(const void* x, void* y, void* clean, int32_t dtype, int32_t y_dtype, double step, int32_t zero_point,
                             int32_t layout, int64_t rows, int64_t images, int64_t draws, int64_t channels, int64_t spatial,
                             int64_t x_spatial, int64_t x_width, const int64_t* seed, uint32_t stream, uint32_t image_offset, uint32_t draw_offset,
                             const int64_t* sample_ids, const float* sigma, int64_t sigma_count, const float* scale, const float* shift,
                             int32_t relu, int32_t threads) {
    using namespace rse;
    const bool bytes = y_dtype == int32_t(Dtype::u8);
    if (bytes ? dtype < 0 || dtype > 4 || clean || zero_point < 0 || zero_point > 255 : dtype != y_dtype || dtype < 0 || dtype > 2) return 2;
    try {
        const std::vector<float> s = periodic(sigma, sigma_count, channels, 0.0f, step), a = periodic(scale, channels, channels, 1.0f, step),
                                 b = periodic(shift, channels, channels, 0.0f, step);
        const auto fits = [](const std::vector<float>& v) { return std::all_of(v.begin(), v.end(), [](float f) { return !(std::fabs(f) > 0x1p124f); }); };
        if (bytes && !(fits(s) && fits(a) && fits(b))) return 3;
        Task t = task_of(x, dtype, rows, images, draws, channels, seed, stream, image_offset, draw_offset, sample_ids);
        t.y = y, t.clean = clean, t.y_dtype = Dtype(y_dtype), t.zero_point = zero_point;
        t.layout = spatial == 1 ? Layout::flat : Layout(layout), t.x_layout = x_spatial == 1 ? Layout::flat : Layout(layout);
        t.spatial = spatial, t.x_spatial = x_spatial, t.x_width = x_width;
        t.sigma = s.data(), t.scale = a.data(), t.shift = b.data();
        t.sigma_varies = sigma_count != 1, t.affine = scale || shift || bytes, t.relu = relu != 0;
        t.rises = x_width && std::all_of(a.begin(), a.end(), [](float v) { return v >= 0; });

        Unit unit = current().unit;
#ifdef RSE_HAVE_AVX512BF16
        // The hardware's bfloat16 conversion flushes subnormals, which only a channel with next to no noise can produce: |eps| is
        // 0 or more than 2^-42, so what sigma * eps leaves of an input is 0 or at least 2^-88 sigma.
        if (unit == add_noise_avx512bf16 && !bytes)
            for (int64_t c = 0; c < sigma_count; ++c)
                if (sigma[c] < 0x1p-38f) unit = add_noise_avx512;
#endif
        const int64_t tiles = images * draws * tiles_per_row(t);
        constexpr int64_t kGrain = 8;  // tiles worth waking a thread for: about 5 microseconds, or 20 of long planes
        share(tiles, kGrain, threads, [&](int64_t begin, int64_t end) { unit(t, begin, end); });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// y [draws * images, outputs, h + 2 padding - 2, w + 2 padding - 2] = act(conv3x3(z) + bias + residual), where z [draws * images, channels,
// h, w] is what rse_add_noise makes of x [rows, channels, height, width], unrounded, and (h, w) is (height, width), with `pool` its half;
// all channels last. sigma null: no noise, and the seed is not read. weight and units: see Convolution, in `products` (0 float32,
// 1 bfloat16, 3 int8; the others do not read `units`). `block`: tiles at a time, 0 for as many as are best. y, residual and clean have x's
// dtype (0 float32, 1 bfloat16). Returns 0, 1 when out of memory, or 2 for what the active unit does not compute.
RSE_EXPORT int rse_winograd(const void* x, void* y, void* clean, int32_t dtype, int64_t rows, int64_t images, int64_t draws,
                            const int64_t* seed, uint32_t stream, uint32_t image_offset, uint32_t draw_offset,
                            const int64_t* sample_ids, int64_t channels, int64_t height, int64_t width, int32_t pool, const float* sigma,
                            int64_t sigma_count, const float* scale, const float* shift, int32_t relu_in, const void* weight,
                            int32_t products, const float* units, int64_t form, int64_t outputs, int64_t padding,
                            const float* bias, const void* residual, int32_t relu, int64_t block, int32_t threads) {
    using namespace rse;
    const bool hardware = !std::strcmp(current().name, "avx512bf16");
    if (dtype < 0 || dtype > 1 || (products == 3 ? !hardware : products < 0 || products > int32_t(hardware)) || (form != 2 && form != 4)) return 2;
    try {
        const std::vector<float> s = periodic(sigma, sigma_count, channels, 0.0f, 1), a = periodic(scale, channels, channels, 1.0f, 1),
                                 b = periodic(shift, channels, channels, 0.0f, 1);
        std::vector<float> d(round_up(outputs, kColumns));
        if (bias) std::copy(bias, bias + outputs, d.begin());
        Convolution c{};
        Task& t = c.source;
        t = task_of(x, dtype, rows, images, draws, channels, sigma ? seed : nullptr, stream, image_offset, draw_offset, sample_ids);
        t.clean = clean, t.layout = t.x_layout = Layout::flat, t.x_spatial = height * width, t.x_width = pool ? width : 0;
        t.sigma = sigma ? s.data() : nullptr, t.scale = a.data(), t.shift = b.data();
        t.sigma_varies = sigma_count != 1, t.affine = scale || shift, t.relu = relu_in != 0;
        t.rises = pool && std::all_of(a.begin(), a.end(), [](float v) { return v >= 0; });
        c.height = pool ? height / 2 : height, c.width = pool ? width / 2 : width;
        t.spatial = c.height * c.width;
        c.padding = padding, c.outputs = outputs, c.form = form;
        c.weight = weight, c.products = Dtype(products), c.units = units, c.bias = d.data(), c.residual = residual, c.relu = relu != 0, c.y = y;
        const int64_t lines = images * draws * tiles_down(c), work = tiles_across(c) * (form + 2) * (form + 2) * channels * outputs;
        c.block = min(block ? block : kBlock, lines * tiles_across(c));
        constexpr int64_t kGrain = 1 << 19;  // multiplications worth waking a thread for: 5 to 20 microseconds
        std::atomic<bool> failed{false};
        share(lines, ceil_div(kGrain, work), threads, [&](int64_t begin, int64_t end) {
            float* const memory = workspace.floats(places(c).total);
            if (memory) current().convolver(c, memory, begin, end);
            else failed = true;
        });
        return failed ? 1 : 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// The weight that rse_winograd reads in float32, of `taps` with strides in floats, those of outputs, inputs, rows and columns; negative
// ones turn the taps round.
RSE_EXPORT void rse_winograd_filters(float* taps, int64_t output, int64_t input, int64_t row, int64_t column, int64_t outputs,
                                     int64_t inputs, int64_t form, float* transformed, int32_t threads) {
    using namespace rse;
    const Filters f{{taps, output, input, row, column}, outputs, inputs, form, transformed};
    share(ceil_div(outputs, kColumns) * inputs, kFilterGrain, threads, [&](int64_t begin, int64_t end) { current().filters(f, begin, end); });
}

// taps, with strides as above: the gradient of the weight of conv3x3(x + sigma * eps), g [draws * images, outputs, height + 2 padding - 2,
// width + 2 padding - 2] being that of its result. Float32, x and g channels last; the other arguments are those of rse_winograd. The
// result does not depend on `threads`; on `block` by rounding. Returns 0, or 1 when out of memory.
RSE_EXPORT int rse_winograd_weight_grad(const float* x, const float* g, float* taps, int64_t output, int64_t input, int64_t row, int64_t column,
                                        int64_t rows, int64_t images, int64_t draws, const int64_t* seed, uint32_t stream,
                                        uint32_t image_offset, uint32_t draw_offset, const int64_t* sample_ids, int64_t channels,
                                        int64_t height, int64_t width, const float* sigma, int64_t sigma_count, int64_t form,
                                        int64_t outputs, int64_t padding, int64_t block, int32_t threads) {
    using namespace rse;
    try {
        const std::vector<float> s = periodic(sigma, sigma_count, channels, 0.0f, 1), none(4 * ceil_div(channels, 4) + kPeriod);
        WeightGradient w{};
        Convolution& c = w.of;
        Task& t = c.source;
        t = task_of(x, int32_t(Dtype::f32), rows, images, draws, channels, seed, stream, image_offset, draw_offset, sample_ids);
        t.layout = t.x_layout = Layout::flat, t.x_spatial = t.spatial = height * width;
        t.sigma = s.data(), t.scale = t.shift = none.data(), t.sigma_varies = sigma_count != 1;
        c.height = height, c.width = width, c.padding = padding, c.outputs = outputs, c.form = form, c.products = Dtype::f32;
        const int64_t across = tiles_across(c), lines = images * draws * tiles_down(c), positions = (form + 2) * (form + 2);
        // Blocks of whole lines of tiles, as many whatever threads there are: sums are added up block by block.
        const int64_t tiles = block ? block : std::clamp<int64_t>(kGradientFloats / (positions * (channels + outputs)), 64, 1024);
        const int64_t step = min(lines, ceil_div(tiles, across)), panels = ceil_div(outputs, kColumns);
        c.block = step * across;
        const int64_t read = positions * places(c).transformed, sums = panels * positions * channels * kColumns;
        const std::unique_ptr<float[]> memory(new (std::nothrow) float[read + positions * gradient_transformed(c) + sums]);
        if (!memory) return 1;
        w.g = g, w.inputs = memory.get(), w.outputs = w.inputs + read;
        w.filters = {{taps, output, input, row, column}, outputs, channels, form, w.outputs + positions * gradient_transformed(c)};
        std::atomic<bool> failed{false};
        for (int64_t first = 0; first < lines; first += step) {
            const int64_t count = min(step, lines - first);
            share(count, 1, threads, [&](int64_t begin, int64_t end) {
                float* const work = workspace.floats(places(c).input);
                if (work) current().gradient.transform(w, work, first, first + begin, first + end);
                else failed = true;
            });
            if (failed) return 1;
            share(positions * panels, 1, threads, [&](int64_t begin, int64_t end) { current().gradient.multiply(w, count * across, first == 0, begin, end); });
        }
        share(panels * channels, kFilterGrain, threads, [&](int64_t begin, int64_t end) { current().gradient.finish(w, begin, end); });
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// For tests: Philox words, uniforms and normals of `count` quads (a multiple of 16) from `quad` on, by the active unit's own vector
// code, each as planes [4][count]. With `given` (same shape) these words are taken in place of Philox's.
RSE_EXPORT void rse_sample(const int64_t* seed, uint32_t stream, uint32_t image, uint32_t draw, int64_t quad, int64_t count,
                           const uint32_t* given, uint32_t* words, float* uniforms, float* normals) {
    using namespace rse;
    Task t{};
    t.images = 1, t.key0 = uint32_t(uint64_t(*seed)), t.key1 = uint32_t(uint64_t(*seed) >> 32);
    t.stream = stream, t.image_offset = image, t.draw_offset = draw;
    current().sampler({t, quad, count, given, words, uniforms, normals});
}
