// words LIBRARY UNIT ORDER START: writes the library's 32-bit Philox words to standard output, in one of the orders in which networks take
// them, until nobody reads any more. START (a number) begins elsewhere: runs with different STARTs share no words.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

using Select = int (*)(const char*);
using Sampler = void (*)(const int64_t*, uint32_t, uint32_t, uint32_t, int64_t, int64_t, const uint32_t*, uint32_t*, float*, float*);

struct Address {
    uint64_t seed;
    uint32_t stream, image, draw;
};

struct Source {
    Sampler sampler;
    std::vector<uint32_t> planes;
    std::vector<float> floats;

    // The words of `count` quads (a multiple of 16) from `quad` on, as a layer takes them: the four of a quad side by side.
    void take(const Address& at, int64_t quad, int64_t count, uint32_t* out) {
        planes.resize(4 * count), floats.resize(8 * count);
        const int64_t seed = int64_t(at.seed);
        sampler(&seed, at.stream, at.image, at.draw, quad, count, nullptr, planes.data(), floats.data(), floats.data() + 4 * count);
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = planes[j * count + i];
    }
};

static uint32_t reversed(uint32_t w) {
    w = (w & 0x55555555u) << 1 | (w >> 1 & 0x55555555u);
    w = (w & 0x33333333u) << 2 | (w >> 2 & 0x33333333u);
    w = (w & 0x0F0F0F0Fu) << 4 | (w >> 4 & 0x0F0F0F0Fu);
    return __builtin_bswap32(w);
}

int main(int argc, char** argv) {
    if (argc != 5) return std::fprintf(stderr, "usage: words LIBRARY UNIT ORDER START\n"), 2;
    void* const library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "words: %s\n", dlerror()), 2;
    if (reinterpret_cast<Select>(dlsym(library, "rse_select_unit"))(argv[2])) return std::fprintf(stderr, "words: no unit %s\n", argv[2]), 2;
    Source source{reinterpret_cast<Sampler>(dlsym(library, "rse_sample")), {}, {}};
    std::string order = argv[3];
    const bool reverse = order.size() > 9 && order.substr(order.size() - 9) == "-reversed";
    if (reverse) order.resize(order.size() - 9);
    const uint64_t start = std::strtoull(argv[4], nullptr, 10);

    constexpr int64_t kQuads = 16, kAlong = 4096;  // interleaved: the next of 4096 addresses at every quad, 16 quads of each
    Address at{start << 40, 0, 0, 0};
    if (order == "high-seeds") at.seed = start << 24;
    std::vector<uint32_t> out(4 * kQuads * kAlong), one(4 * kQuads);
    const auto interleave = [&](auto next) {
        for (int64_t i = 0; i < kAlong; ++i, next()) {
            source.take(at, 0, kQuads, one.data());
            for (int64_t q = 0; q < kQuads; ++q) std::memcpy(&out[4 * (q * kAlong + i)], &one[4 * q], 16);
        }
    };
    for (int64_t quad = 0;;) {
        size_t count = out.size();
        if (order == "positions" || order == "first-words") {
            source.take(at, quad, kQuads * kAlong, out.data());
            if ((quad += kQuads * kAlong) == int64_t(1) << 32) quad = 0, ++at.image;
            if (order == "first-words") {
                count /= 4;
                for (size_t i = 0; i < count; ++i) out[i] = out[4 * i];
            }
        } else if (order == "images") {
            interleave([&] { ++at.image; });
        } else if (order == "draws") {
            interleave([&] { ++at.draw; });
        } else if (order == "streams") {
            interleave([&] { ++at.stream; });
        } else if (order == "seeds") {
            interleave([&] { ++at.seed; });
        } else if (order == "high-seeds") {
            interleave([&] { at.seed += uint64_t(1) << 32; });
        } else if (order == "network") {
            // Batches of 5 images and 3 draws through four layers, row d * 5 + i after the other.
            constexpr int64_t kLayers[] = {64, 256, 256, 16};
            count = 0;
            for (uint32_t layer = 0; layer < 4; ++layer)
                for (uint32_t row = 0; row < 15; ++row, count += 4 * kLayers[layer])
                    source.take({at.seed, layer, at.image + row % 5, row / 5}, 0, kLayers[layer], &out[count]);
            at.image += 5;
        } else {
            return std::fprintf(stderr, "words: no order %s\n", order.c_str()), 2;
        }
        if (reverse)
            for (size_t i = 0; i < count; ++i) out[i] = reversed(out[i]);
        if (std::fwrite(out.data(), 4, count, stdout) != count) return 0;
    }
}
