// The limit "Philox without Box-Muller": the kernel's own vector code makes the words of `rows` x `quads` quads and drops them.
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define RSE_UNIT bench
namespace {  // so that nothing of the kernel is compiled but what is used here
#include "add_noise.cpp"
}

extern "C" __attribute__((visibility("default"))) uint32_t philox_words(int64_t rows, int64_t quads, int32_t threads) {
    using namespace rse;
    uint32_t sink = 0;  // what keeps the compiler from leaving the work out
#pragma omp parallel for num_threads(threads) reduction(^ : sink)
    for (int64_t r = 0; r < rows; ++r) {
        Task t{};
        t.images = rows;
        const Row row = make_row(t, r);
        Quads q(0, 1, [](int lane) { return lane; });
        vu sum{};
        for (int64_t i = 0; i < quads; i += kLanes, q.advance(kLanes)) {
            vu w[4];
            words(row, q, w);
            sum ^= w[0] ^ w[1] ^ w[2] ^ w[3];
        }
        for (int i = 0; i < kLanes; ++i) sink ^= sum[i];
    }
    return sink;
}
