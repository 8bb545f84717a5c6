// y = maxpool?(act(x * scale + shift)) + sigma * eps on the CPU, in floats or requantised to bytes: what dispatch.cpp and the units (one per
// instruction set) share.
#pragma once
#include <cstdint>

namespace rse {

enum class Dtype : int32_t { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, s32 = 4 };
enum class Layout : int32_t { planar = 0, flat = 1 };  // a sample is [C, S] or [S, C] in memory

// One call. Rows of y are r = d * images + i; x has `rows` rows, either `images` (each read `draws` times) or images * draws.
// y has x's dtype, or is u8: then scale, shift and sigma are given in steps of y, and y = saturate(zero_point + rint(value)).
struct Task {
    const void* x;
    void *y, *clean;  // clean: null, or y without the noise in x's dtype (a float), one row for each row of x
    Dtype dtype, y_dtype;
    int32_t zero_point;
    Layout layout, x_layout;  // they differ for a y of one position, which is always flat
    int64_t rows, images, draws, channels, spatial;
    int64_t x_spatial, x_width;  // x_width: 0, or the width of x where the largest of each 2x2 window goes on
    uint32_t key0, key1, stream, image_offset, draw_offset;
    const int64_t* sample_ids;  // (image, first draw) of each image, or null: (image_offset + i, draw_offset)
    // One value per channel, channels padded to whole quads, then repeated for kPeriod more entries: a vector load never wraps.
    const float *sigma, *scale, *shift;
    bool sigma_varies, affine, relu;
    bool rises;  // where x is pooled: no scale is negative, so act(x * scale + shift) keeps the order of x
};

constexpr int64_t kPeriod = 64;  // elements of the widest block: 16 quads
constexpr int64_t kTile = 256;   // quads in a tile, the unit of work that threads share
constexpr int64_t kRun = 1024;   // the same where four planes are walked side by side: the longer, the better memory serves them

// Processes tiles [begin, end) of the task's images * draws * tiles_per_row(task).
using Unit = void (*)(const Task&, int64_t begin, int64_t end);

// `count` positions from `first` on of packed row r of a flat task, as floats that are not rounded, in quad order; with `clean` also those
// of the task's clean output, where they belong to this row. Without sigma there is no noise. work: line_work(task, count) floats.
using Liner = void (*)(const Task&, int64_t r, int64_t first, int64_t count, bool clean, float* line, float* work);

// What stands between a counter and its normals, for tests: `count` quads (a multiple of 16) from `quad` on, in planes [4][count].
struct Sample {
    Task task;              // key, stream, image_offset and draw_offset are read, and images = 1
    int64_t quad, count;
    const uint32_t* given;  // these words instead of Philox's, or null
    uint32_t* words;
    float *uniforms, *normals;  // planes u, v, u, v; and the four normals
};
using Sampler = void (*)(const Sample&);

// How a row is walked: as it lies in memory, plane by plane, or through a small buffer where neither fits.
enum class Walk { flat, planar, scattered };

// Functions here are static: one copy per unit, compiled with the unit's own flags.
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t groups(const Task& t) { return ceil_div(t.channels, 4); }

static inline Walk walk(const Task& t) {
    if (t.layout == Layout::flat) return t.channels % 4 == 0 ? Walk::flat : Walk::scattered;
    return t.spatial >= 16 && !t.x_width ? Walk::planar : Walk::scattered;
}

static inline int64_t line_work(const Task& t, int64_t count) { return 3 * (4 * groups(t) * count + 16); }

static inline int64_t tiles_per_row(const Task& t) {
    return walk(t) == Walk::planar ? groups(t) * ceil_div(t.spatial, kRun) : ceil_div(groups(t) * t.spatial, kTile);
}

}  // namespace rse
