// y = act(conv3x3(maxpool?(act(x * scale + shift)) + sigma * eps) + bias + residual) by Winograd's minimal filtering, channels last: what
// dispatch.cpp and the units share.
#pragma once
#include "add_noise.h"

namespace rse {

// Stride 1, dilation 1, groups 1. Rows are those of `source`, whose y, y_dtype and zero_point are not read; y has x's dtype.
struct Convolution {
    Task source;     // x, channels last, and the noise at each position; sigma is null where there is none
    int64_t height, width, padding, outputs;  // of the convolution's input: behind the pool. Padding gets no noise
    int64_t form;    // 4 for F(4x4, 3x3), 2 for F(2x2, 3x3)
    const void* weight;  // [outputs / kColumns, form + 2, form + 2, channels, kColumns], the last block filled up with zeros; in bfloat16
    Dtype products;      // channels go in pairs: [..., channels / 2, kColumns, 2]; in bytes in fours, behind two rows of headers, see Bytes
    // Of bytes: pairs (a, b) of the form + 2 squared positions, then a factor f of each channel, filled up to whole vectors of kWidest. A
    // transformed value t is the byte of rint(t * f * a + b).
    const float* units;
    const float* bias;   // filled up to whole blocks of kColumns
    const void* residual;  // null, or as y
    bool relu;
    void* y;
    int64_t block;  // tiles whose transforms are held at a time
};

constexpr int64_t kColumns = 32;  // output channels that are computed at a time, in every unit
constexpr int64_t kWidest = 16;   // lanes of the widest vector

static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline int64_t tiles_down(const Convolution& c) { return ceil_div(c.height + 2 * c.padding - 2, c.form); }
static inline int64_t tiles_across(const Convolution& c) { return ceil_div(c.width + 2 * c.padding - 2, c.form); }

// Tiles whose transforms are held at a time: with fewer, the weights of wide layers are read too often; with more, narrow layers leave the
// second-level cache. Between 28 and 84 the time of no layer of VGG16 differs by more than 5 %.
constexpr int64_t kBlock = 40;

// Where a thread's arrays lie in its workspace, in floats. Distances between rows that are walked together are odd numbers of cache
// lines: powers of two would all fall into a few sets of the first-level cache.
struct Places {
    int64_t strip_row, tile, transformed, product;  // distances
    int64_t strip, line, input, output, total;      // beginnings
};
static inline Places places(const Convolution& c) {
    const int64_t side = c.form + 2, channels = 4 * groups(c.source), width = tiles_across(c) * c.form + 2;
    Places p;
    p.strip_row = round_up(width * channels, kWidest) + kWidest;
    p.tile = round_up(channels, 2 * kWidest) + kWidest;  // of transformed channels
    p.transformed = round_up(c.block * p.tile, 2 * kWidest) + kWidest;
    p.product = c.block * kColumns + kWidest;
    p.strip = 0;
    p.line = p.strip + side * p.strip_row;
    p.input = round_up(p.line + line_work(c.source, c.width), kWidest);
    p.output = p.input + side * side * p.transformed;
    p.total = p.output + side * side * p.product;
    return p;
}

// Where the taps of a weight lie: strides in floats, negative where taps are turned round.
struct Taps {
    float* first;  // of the first output and input
    int64_t output, input, row, column;
};

// A weight to be transformed into what rse_winograd reads in float32.
struct Filters {
    Taps taps;
    int64_t outputs, inputs, form;
    float* transformed;  // as Convolution::weight
};

// Computes inputs [begin, end) of all blocks of kColumns outputs: number `block * inputs + input`.
using FilterTransform = void (*)(const Filters&, int64_t begin, int64_t end);

// The gradient of a convolution's weight. It is made block by block of `of.block` tiles: both sides are transformed, then multiplied tile by
// tile, and the products added up; at the end the sums are transformed back. Of the convolution, what stands behind its products is not
// read.
struct WeightGradient {
    Convolution of;
    const float* g;     // the output's, channels last
    float *inputs, *outputs;  // transforms of a block: [positions][tiles][channels], distances are those of Places and gradient_tile
    Filters filters;    // sums in `transformed`, the gradient in `taps`
};
static inline int64_t gradient_tile(const Convolution& c) { return round_up(c.outputs, kColumns) + kWidest; }
static inline int64_t gradient_transformed(const Convolution& c) { return c.block * gradient_tile(c) + kWidest; }

// Its three steps, each on a share of the work: transforms lines [begin, end) of tiles of the block that begins with line `first`;
// multiplies numbers [begin, end) of `position * blocks of kColumns + block`; transforms back numbers [begin, end) of Filters.
struct WeightGradientSteps {
    void (*transform)(const WeightGradient&, float* workspace, int64_t first, int64_t begin, int64_t end);
    void (*multiply)(const WeightGradient&, int64_t tiles, bool first, int64_t begin, int64_t end);
    void (*finish)(const WeightGradient&, int64_t begin, int64_t end);
};

// Computes lines of tiles [begin, end) of images * draws * tiles_down(c), image by image, each with all its draws.
using Convolver = void (*)(const Convolution&, float* workspace, int64_t begin, int64_t end);

}  // namespace rse
