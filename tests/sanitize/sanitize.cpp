// sanitize SEED CASES: calls of the library's C interface with random arguments, on every unit that this processor runs. For a library that is
// built with sanitizers; each array lies against a page that may not be touched, before or behind it, or on the heap with nothing to spare.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <vector>

extern "C" {
const char* rse_units(void);
int rse_select_unit(const char*);
int rse_add_noise(const void* x, void* y, void* clean, int32_t dtype, int32_t y_dtype, double step, int32_t zero_point, int32_t layout, int64_t rows,
                  int64_t images, int64_t draws, int64_t channels, int64_t spatial, int64_t x_spatial, int64_t x_width, const int64_t* seed,
                  uint32_t stream, uint32_t image_offset, uint32_t draw_offset, const int64_t* sample_ids, const float* sigma,
                  int64_t sigma_count, const float* scale, const float* shift, int32_t relu, int32_t threads);
int rse_winograd(const void* x, void* y, void* clean, int32_t dtype, int64_t rows, int64_t images, int64_t draws, const int64_t* seed,
                 uint32_t stream, uint32_t image_offset, uint32_t draw_offset, const int64_t* sample_ids, int64_t channels, int64_t height,
                 int64_t width, int32_t pool, const float* sigma, int64_t sigma_count, const float* scale, const float* shift, int32_t relu_in,
                 const void* weight, int32_t products, const float* units, int64_t form, int64_t outputs, int64_t padding,
                 const float* bias, const void* residual, int32_t relu, int64_t block, int32_t threads);
void rse_winograd_filters(float* taps, int64_t output, int64_t input, int64_t row, int64_t column, int64_t outputs, int64_t inputs, int64_t form,
                          float* transformed, int32_t threads);
int rse_winograd_weight_grad(const float* x, const float* g, float* taps, int64_t output, int64_t input, int64_t row, int64_t column, int64_t rows,
                             int64_t images, int64_t draws, const int64_t* seed, uint32_t stream, uint32_t image_offset, uint32_t draw_offset,
                             const int64_t* sample_ids, int64_t channels, int64_t height, int64_t width, const float* sigma,
                             int64_t sigma_count, int64_t form, int64_t outputs, int64_t padding, int64_t block, int32_t threads);
void rse_sample(const int64_t* seed, uint32_t stream, uint32_t image, uint32_t draw, int64_t quad, int64_t count, const uint32_t* given,
                uint32_t* words, float* uniforms, float* normals);
}

static std::mt19937_64 rng;
static int64_t pick(int64_t from, int64_t to) { return from + int64_t(rng() % uint64_t(to - from + 1)); }
static bool often(int n) { return rng() % n != 0; }
static float value() { return float(pick(-2000, 2000)) / 500; }

// `bytes` bytes that end at a forbidden page, begin behind one, or lie on the heap.
class Array {
  public:
    explicit Array(int64_t bytes) : bytes_(bytes) {
        if (kind_ == 2) {
            data_ = static_cast<char*>(std::malloc(bytes));
            return;
        }
        const int64_t page = sysconf(_SC_PAGESIZE), inner = (bytes + page - 1) / page * page;
        length_ = inner + 2 * page;
        base_ = static_cast<char*>(mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (base_ == MAP_FAILED || (inner && mprotect(base_ + page, inner, PROT_READ | PROT_WRITE))) std::perror("mmap"), std::exit(3);
        data_ = kind_ ? base_ + page : base_ + page + inner - bytes;
    }
    Array(const Array&) = delete;
    ~Array() {
        if (kind_ == 2) std::free(data_);
        else munmap(base_, length_);
    }
    template <typename T> T* as() const { return reinterpret_cast<T*>(data_); }
    void fill(int byte) { std::memset(data_, byte, bytes_); }
    std::string content() const { return {data_, size_t(bytes_)}; }
    int64_t bytes() const { return bytes_; }

  private:
    int64_t bytes_, length_ = 0;
    int64_t kind_ = pick(0, 2);
    char *base_ = nullptr, *data_ = nullptr;
};

static void fill_floats(const Array& a, bool positive = false) {
    for (int64_t i = 0; i < a.bytes() / 4; ++i) a.as<float>()[i] = positive ? std::fabs(value()) : value();
}

// Numbers of dtype: any bit pattern of a float in some calls, infinities, NaN and subnormals among them.
static void fill_values(const Array& a, int dtype) {
    const bool any = !often(4);
    if (dtype == 0 && !any) return fill_floats(a);
    for (int64_t i = 0; i < a.bytes() / 2 && (dtype == 1 || dtype == 2); ++i)
        a.as<uint16_t>()[i] = uint16_t(any ? rng() : (dtype == 1 ? 0x3f80 : 0x3c00) + (rng() & 0x807f));
    for (int64_t i = 0; i < a.bytes() && (dtype == 0 || dtype > 2); ++i) a.as<uint8_t>()[i] = uint8_t(rng());
}

static int64_t size_of(int dtype) { return dtype == 0 || dtype == 4 ? 4 : dtype == 3 ? 1 : 2; }

static std::string say;  // the arguments of the call under way
template <typename... Args> static void describe(const char* what, Args... args) {
    std::ostringstream out;
    out << what;
    ((out << ' ' << args), ...);
    say = out.str();
}
static void check(bool right, const char* problem) {
    if (right) return;
    std::fprintf(stderr, "sanitize: %s in %s\n", problem, say.c_str());
    std::exit(1);
}

struct Where {
    Array seed{8}, ids;
    bool has_ids = !often(3);
    uint32_t stream = uint32_t(rng()), image = uint32_t(rng()), draw = uint32_t(rng());
    explicit Where(int64_t images) : ids(16 * images) {
        *seed.as<int64_t>() = int64_t(rng());
        for (int64_t i = 0; i < 2 * images; ++i) ids.as<int64_t>()[i] = pick(0, 0xFFFFFFFF);
    }
    const int64_t* sample_ids() const { return has_ids ? ids.as<int64_t>() : nullptr; }
};

static void add_noise() {
    const int dtype = int(pick(0, 4));
    const bool bytes = dtype > 2 || !often(4), pool = !often(4);
    const int64_t images = pick(1, 3), draws = pick(1, 3), rows = often(2) ? images : images * draws;
    const int64_t channels = often(3) ? pick(1, 9) : pick(1, 70);
    const int64_t height = pick(2, 9), width = pick(2, 20);
    const int64_t x_spatial = pool ? height * width : often(4) ? pick(1, 70) : pick(1, 2100), spatial = pool ? height / 2 * (width / 2) : x_spatial;
    const int64_t elements = channels * spatial, size = size_of(dtype), y_size = bytes ? 1 : size;
    Array x(rows * channels * x_spatial * size), y(images * draws * elements * y_size), clean(rows * elements * size);
    const bool has_clean = !bytes && !often(3), has_scale = !often(2), has_shift = !often(2), varies = !often(2);
    Array sigma(4 * (varies ? channels : 1)), scale(4 * channels), shift(4 * channels);
    fill_values(x, dtype), fill_floats(sigma, true), fill_floats(scale), fill_floats(shift);
    const Where at(images);
    const int layout = int(pick(0, 1)), relu = int(pick(0, 1)), threads = int(pick(1, 3)), zero = bytes ? int(pick(0, 255)) : 0;
    const double step = bytes ? 0.01 * double(pick(1, 99)) : 1;
    describe("add_noise", dtype, bytes, layout, rows, images, draws, channels, spatial, x_spatial, pool ? width : 0, varies, has_scale, has_shift,
             relu, threads, has_clean, at.has_ids);
    const auto call = [&](void* to) {
        return rse_add_noise(x.as<void>(), to, has_clean ? clean.as<void>() : nullptr, dtype, bytes ? 3 : dtype, step, zero, layout, rows, images,
                             draws, channels, spatial, x_spatial, pool ? width : 0, at.seed.as<int64_t>(), at.stream, at.image, at.draw,
                             at.sample_ids(), sigma.as<float>(), varies ? channels : 1, has_scale ? scale.as<float>() : nullptr,
                             has_shift ? shift.as<float>() : nullptr, relu, threads);
    };
    const std::string before = x.content();
    std::string results[2];
    for (int i = 0; i < 2; ++i) {
        y.fill(i ? 0x5A : 0xA5), clean.fill(i ? 0x5A : 0xA5);
        check(call(y.as<void>()) == 0, "a refusal");
        results[i] = y.content() + (has_clean ? clean.content() : "");
    }
    check(results[0] == results[1], "an element that was not written");
    check(x.content() == before, "a changed input");
    if (bytes || pool || rows != images * draws) return;
    check(call(x.as<void>()) == 0, "a refusal in place");  // what add_noise_ does
    check(x.content() == results[0].substr(0, x.bytes()), "another result in place");
}

static void winograd(bool narrow_products) {
    const int narrow[] = {0, 1, 3}, dtype = int(pick(0, 1)), products = narrow_products ? narrow[pick(0, 2)] : 0;
    const bool pool = !often(4), noisy = often(5);
    const int64_t form = often(2) ? 4 : 2, padding = pick(0, 2), images = pick(1, 2), draws = noisy ? pick(1, 3) : 1;
    const int64_t rows = often(2) ? images : images * draws, channels = often(2) ? pick(1, 12) : pick(1, 40), outputs = pick(1, 70);
    const int64_t least = padding == 0 ? 3 : 1, h = pick(least, 13), w = pick(least, 13);
    const int64_t height = pool ? 2 * h + pick(0, 1) : h, width = pool ? 2 * w + pick(0, 1) : w, size = size_of(dtype);
    const int64_t out = (h + 2 * padding - 2) * (w + 2 * padding - 2);
    if (h + 2 * padding < 3 || w + 2 * padding < 3) return;
    Array x(rows * channels * height * width * size), y(images * draws * outputs * out * size), clean(rows * channels * h * w * size);
    Array residual(y.bytes());
    const int64_t blocks = (outputs + 31) / 32, side = form + 2;
    const int64_t column = products == 3 ? 4 * (2 + (channels + 3) / 4) : products ? (channels + 1) / 2 * 2 * 2 : channels * 4;  // bytes
    Array weight(blocks * side * side * 32 * column), bias(4 * outputs), units(4 * (2 * side * side + (channels + 15) / 16 * 16));
    const bool has_clean = !often(3), has_residual = !often(3), has_bias = often(3), has_scale = !often(2), has_shift = !often(2), varies = !often(2);
    Array sigma(4 * (varies ? channels : 1)), scale(4 * channels), shift(4 * channels);
    fill_values(x, dtype), fill_values(residual, dtype), fill_values(weight, products);
    fill_floats(sigma, true), fill_floats(scale), fill_floats(shift), fill_floats(bias), fill_floats(units);
    const Where at(images);
    const int relu_in = int(pick(0, 1)), relu = int(pick(0, 1)), threads = int(pick(1, 3));
    const int64_t block = often(2) ? 0 : pick(1, 50);
    describe("winograd", dtype, products, form, padding, rows, images, draws, channels, outputs, height, width, pool, noisy, varies, has_scale, has_shift,
             has_clean, has_residual, relu_in, relu, block, threads, at.has_ids);
    const std::string before = x.content();
    std::string results[2];
    for (int i = 0; i < 2; ++i) {
        y.fill(i ? 0x5A : 0xA5), clean.fill(i ? 0x5A : 0xA5);
        const int status = rse_winograd(
            x.as<void>(), y.as<void>(), has_clean ? clean.as<void>() : nullptr, dtype, rows, images, draws, noisy ? at.seed.as<int64_t>() : nullptr,
            at.stream, at.image, at.draw, noisy ? at.sample_ids() : nullptr, channels, height, width, pool, noisy ? sigma.as<float>() : nullptr,
            noisy ? (varies ? channels : 1) : 0, has_scale ? scale.as<float>() : nullptr, has_shift ? shift.as<float>() : nullptr, relu_in,
            weight.as<void>(), products, products == 3 ? units.as<float>() : nullptr, form, outputs, padding, has_bias ? bias.as<float>() : nullptr, has_residual ? residual.as<void>() : nullptr,
            relu, block, threads);
        check(status == 0, "a refusal");
        results[i] = y.content() + (has_clean ? clean.content() : "");
    }
    check(results[0] == results[1], "an element that was not written");
    check(x.content() == before, "a changed input");
}

// A weight [outputs, inputs, 3, 3] in one of its memory layouts, perhaps turned round.
struct Weight {
    int64_t outputs, inputs, strides[4], first = 0;
    Weight(int64_t outputs_, int64_t inputs_, bool turned) : outputs(outputs_), inputs(inputs_) {
        const bool last = !often(2), swapped = !often(3);
        const int64_t tap = last ? swapped ? outputs : inputs : 1, pixels = last ? 1 : 9, sides[] = {swapped ? inputs : outputs, swapped ? outputs : inputs};
        const int64_t outer = 9 * sides[1], inner = pixels;
        strides[0] = swapped ? inner : outer, strides[1] = swapped ? outer : inner, strides[2] = 3 * tap, strides[3] = tap;
        if (turned) first = 2 * (strides[2] + strides[3]), strides[2] = -strides[2], strides[3] = -strides[3];
    }
    int64_t bytes() const { return 4 * 9 * outputs * inputs; }
};

static void winograd_filters() {
    const int64_t form = often(2) ? 4 : 2, positions = (form + 2) * (form + 2);
    const Weight w(pick(1, 100), pick(1, 70), !often(2));
    Array taps(w.bytes()), transformed(4 * ((w.outputs + 31) / 32 * 32) * positions * w.inputs);
    fill_values(taps, 0);
    const int threads = int(pick(1, 3));
    describe("winograd_filters", form, w.outputs, w.inputs, w.strides[0], w.strides[1], w.strides[2], w.strides[3], threads);
    const std::string before = taps.content();
    std::string results[2];
    for (int i = 0; i < 2; ++i) {
        transformed.fill(i ? 0x5A : 0xA5);
        rse_winograd_filters(taps.as<float>() + w.first, w.strides[0], w.strides[1], w.strides[2], w.strides[3], w.outputs, w.inputs, form,
                             transformed.as<float>(), threads);
        results[i] = transformed.content();
    }
    check(results[0] == results[1], "an element that was not written");
    check(taps.content() == before, "a changed input");
}

static void winograd_weight_grad() {
    const int64_t form = often(2) ? 4 : 2, padding = pick(0, 2), images = pick(1, 3), draws = pick(1, 3), rows = often(2) ? images : images * draws;
    const int64_t least = padding == 0 ? 3 : 1, height = pick(least, 13), width = pick(least, 13);
    const int64_t channels = often(2) ? pick(1, 12) : pick(1, 70), outputs = pick(1, 70);
    const int64_t out = (height + 2 * padding - 2) * (width + 2 * padding - 2);
    const Weight w(outputs, channels, false);
    const bool varies = !often(2);
    Array x(4 * rows * channels * height * width), g(4 * images * draws * outputs * out), taps(w.bytes()), sigma(4 * (varies ? channels : 1));
    fill_values(x, 0), fill_values(g, 0), fill_floats(sigma, true);
    const Where at(images);
    const int64_t block = often(2) ? 0 : pick(1, 50);
    describe("winograd_weight_grad", form, padding, rows, images, draws, channels, outputs, height, width, varies, w.strides[0], w.strides[1], block,
             at.has_ids);
    const std::string before = x.content() + g.content();
    std::string results[2];
    for (int i = 0; i < 2; ++i) {  // whatever threads there are
        taps.fill(i ? 0x5A : 0xA5);
        const int status = rse_winograd_weight_grad(
            x.as<float>(), g.as<float>(), taps.as<float>(), w.strides[0], w.strides[1], w.strides[2], w.strides[3], rows, images, draws,
            at.seed.as<int64_t>(), at.stream, at.image, at.draw, at.sample_ids(), channels, height, width, sigma.as<float>(),
            varies ? channels : 1, form, outputs, padding, block, int(pick(1, 3)));
        check(status == 0, "a refusal");
        results[i] = taps.content();
    }
    check(results[0] == results[1], "an element that was not written, or depends on the threads");
    check(x.content() + g.content() == before, "a changed input");
}

static void sample() {
    const int64_t count = 16 * pick(1, 5);
    const Where at(1);
    Array given(16 * count), words(16 * count), uniforms(16 * count), normals(16 * count);
    fill_values(given, 3);
    describe("sample", count);
    rse_sample(at.seed.as<int64_t>(), at.stream, at.image, at.draw, pick(0, 0xFFFFFFFF), count, often(2) ? given.as<uint32_t>() : nullptr,
               words.as<uint32_t>(), uniforms.as<float>(), normals.as<float>());
    for (int64_t i = 0; i < 4 * count; ++i) check(std::fabs(normals.as<float>()[i]) < 6.78f, "a normal that is none");
}

int main(int argc, char** argv) {
    if (argc != 3) return std::fprintf(stderr, "usage: sanitize SEED CASES\n"), 2;
    const int64_t cases = std::atoll(argv[2]);
    std::stringstream units(rse_units());
    for (std::string unit; std::getline(units, unit, ',');) {
        rng.seed(std::strtoull(argv[1], nullptr, 10));
        check(rse_select_unit(unit.c_str()) == 0, "a unit that is not there");
        for (int64_t i = 0; i < cases; ++i) {
            const int64_t kind = pick(0, 12);
            if (kind < 6) add_noise();
            else if (kind < 9) winograd(unit == "avx512bf16");
            else if (kind < 11) winograd_weight_grad();
            else if (kind < 12) winograd_filters();
            else sample();
        }
        std::printf("unit %s: %lld calls, nothing found\n", unit.c_str(), static_cast<long long>(cases));
        std::fflush(stdout);
    }
    return 0;
}
