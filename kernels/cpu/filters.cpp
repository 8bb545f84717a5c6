// One unit of what a training step does with the weights of Winograd's 3x3 convolution: transforms them, and makes their gradient. Compiled
// once per instruction set, with RSE_UNIT naming the unit.
#include "tiles.h"

namespace rse {
namespace {

template <int kForm> void transform_filters(const Filters& f, int64_t begin, int64_t end) {
    constexpr int kSide = kForm + 2;
    for (int64_t number = begin; number < end; ++number) {
        const int64_t input = number % f.inputs, first = number / f.inputs * kColumns, present = min(kColumns, f.outputs - first);
        const float* const from = f.taps.first + first * f.taps.output + input * f.taps.input;
        float taps[9][kColumns] = {};
        for (int64_t k = 0; k < present; ++k)
            for (int p = 0; p < 9; ++p) taps[p][k] = from[k * f.taps.output + p / 3 * f.taps.row + p % 3 * f.taps.column];
        float* const to = f.transformed + (first * kSide * kSide * f.inputs + input * kColumns);
        for (int64_t k = 0; k < kColumns; k += kLanes) {
            vf part[kSide][3];
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
                vf g[3], u[kSide];
#pragma GCC unroll 3
                for (int i = 0; i < 3; ++i) g[i] = read<vf>(taps[3 * i + j] + k);
                Transform<kForm>::filter(g, u);
#pragma GCC unroll 6
                for (int i = 0; i < kSide; ++i) part[i][j] = u[i];
            }
#pragma GCC unroll 6
            for (int i = 0; i < kSide; ++i) {
                vf u[kSide];
                Transform<kForm>::filter(part[i], u);
#pragma GCC unroll 6
                for (int j = 0; j < kSide; ++j) put(to + (i * kSide + j) * f.inputs * kColumns + k, u[j]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- gradient
// Tile `n` of a block of the output's gradient, whose upper left value is (top, left); what is outside is 0.
template <int kForm>
RSE_INLINE void transform_gradient(const WeightGradient& w, int64_t base, int64_t top, int64_t left, int64_t n) {
    constexpr int kSide = kForm + 2;
    const Convolution& c = w.of;
    const int64_t height = c.height + 2 * c.padding - 2, width = c.width + 2 * c.padding - 2;
    for (int64_t k = 0; k < round_up(c.outputs, kColumns); k += kLanes) {
        const int64_t present = min(kLanes, c.outputs - k);
        vf part[kForm][kSide];
#pragma GCC unroll 4
        for (int i = 0; i < kForm; ++i) {
            vf y[kForm] = {};
            for (int64_t j = 0; j < min(kForm, width - left) && top + i < height && present > 0; ++j) {
                const float* const from = w.g + (base + (top + i) * width + left + j) * c.outputs + k;
                if (present == kLanes) y[j] = read<vf>(from);
                else std::memcpy(&y[j], from, present * sizeof(float));
            }
            Transform<kForm>::output_transposed(y, part[i]);
        }
        float* to = w.outputs + n * gradient_tile(c) + k;
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
            vf y[kForm], m[kSide];
#pragma GCC unroll 4
            for (int i = 0; i < kForm; ++i) y[i] = part[i][j];
            Transform<kForm>::output_transposed(y, m);
#pragma GCC unroll 6
            for (int i = 0; i < kSide; ++i) put(to + (i * kSide + j) * gradient_transformed(c), m[i]);
        }
    }
}

template <int kForm> void transform_block(const WeightGradient& w, float* work, int64_t first, int64_t begin, int64_t end) {
    const Convolution& c = w.of;
    const Places at = places(c);
    const int64_t across = tiles_across(c), down = tiles_down(c), area = (c.height + 2 * c.padding - 2) * (c.width + 2 * c.padding - 2);
    Strip<kForm> strip(c, at, work, begin);
    const float* lines[kForm + 2];
    for (int64_t number = begin; number < end; ++number) {
        strip.move(number);
        const int64_t base = Strip<kForm>::row(c.source, number / down) * area;
        for (int64_t column = 0; column < across; ++column) {
            const int64_t n = (number - first) * across + column;
            strip.lines(number, column, lines);
            transform_input<kForm, Floats>(c, at, lines, w.inputs, n);
            transform_gradient<kForm>(w, base, number % down * kForm, column * kForm, n);
        }
    }
}

// sums[kInputs][2 * kLanes of kColumns] of kInputs channels of the input: tile after tile. A block is summed on its own, then added: one long
// sum would round each tile to the precision of all.
template <int kInputs>
__attribute__((noinline)) void add_products(const float* a, int64_t a_tile, const float* b, int64_t b_tile, int64_t tiles, bool first, float* sums) {
    vf sum[kInputs][2] = {};
    for (int64_t n = 0; n < tiles; ++n, a += a_tile, b += b_tile) {
        const vf low = read<vf>(b), high = read<vf>(b + kLanes);
#pragma GCC unroll 14
        for (int i = 0; i < kInputs; ++i) sum[i][0] = madd(splat(a[i]), low, sum[i][0]), sum[i][1] = madd(splat(a[i]), high, sum[i][1]);
    }
    if (!first) {
#pragma GCC unroll 14
        for (int i = 0; i < kInputs; ++i) sum[i][0] += read<vf>(sums + i * kColumns), sum[i][1] += read<vf>(sums + i * kColumns + kLanes);
    }
#pragma GCC unroll 14
    for (int i = 0; i < kInputs; ++i) put(sums + i * kColumns, sum[i][0]), put(sums + i * kColumns + kLanes, sum[i][1]);
}

template <int kInputs = kMost>
RSE_INLINE void add_some(int64_t inputs, const float* a, int64_t a_tile, const float* b, int64_t b_tile, int64_t tiles, bool first, float* sums) {
    if (inputs == kInputs) return add_products<kInputs>(a, a_tile, b, b_tile, tiles, first, sums);
    if constexpr (kInputs > 1) add_some<kInputs - 1>(inputs, a, a_tile, b, b_tile, tiles, first, sums);
}

void multiply_block(const WeightGradient& w, int64_t tiles, bool first, int64_t begin, int64_t end) {
    const Convolution& c = w.of;
    const Places at = places(c);
    const int64_t blocks = ceil_div(c.outputs, kColumns), inputs = c.source.channels, panels = ceil_div(inputs, kMost), positions = (c.form + 2) * (c.form + 2);
    for (int64_t number = begin; number < end; ++number) {
        const int64_t p = number / blocks, block = number % blocks;
        float* const sums = w.filters.transformed + (block * positions + p) * inputs * kColumns;
        for (int64_t i = 0; i < panels; ++i) {
            const int64_t from = inputs * i / panels, count = inputs * (i + 1) / panels - from;
            for (int h = 0; h < kColumns; h += 2 * kLanes)
                add_some(count, w.inputs + p * at.transformed + from, at.tile, w.outputs + p * gradient_transformed(c) + block * kColumns + h,
                         gradient_tile(c), tiles, first, sums + from * kColumns + h);
        }
    }
}

template <int kForm> void transform_back(const Filters& f, int64_t begin, int64_t end) {
    constexpr int kSide = kForm + 2;
    for (int64_t number = begin; number < end; ++number) {
        const int64_t input = number % f.inputs, first = number / f.inputs * kColumns, present = min(kColumns, f.outputs - first);
        const float* const from = f.transformed + (first * kSide * kSide * f.inputs + input * kColumns);
        float taps[9][kColumns];
        for (int64_t k = 0; k < kColumns; k += kLanes) {
            vf part[3][kSide];
#pragma GCC unroll 6
            for (int j = 0; j < kSide; ++j) {
                vf u[kSide], g[3];
#pragma GCC unroll 6
                for (int i = 0; i < kSide; ++i) u[i] = read<vf>(from + (i * kSide + j) * f.inputs * kColumns + k);
                Transform<kForm>::filter_transposed(u, g);
#pragma GCC unroll 3
                for (int i = 0; i < 3; ++i) part[i][j] = g[i];
            }
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) {
                vf g[3];
                Transform<kForm>::filter_transposed(part[i], g);
#pragma GCC unroll 3
                for (int j = 0; j < 3; ++j) put(taps[3 * i + j] + k, g[j]);
            }
        }
        float* const to = f.taps.first + first * f.taps.output + input * f.taps.input;
        for (int64_t k = 0; k < present; ++k)
            for (int p = 0; p < 9; ++p) to[k * f.taps.output + p / 3 * f.taps.row + p % 3 * f.taps.column] = taps[p][k];
    }
}

}  // namespace

void RSE_CONCAT(filters_, RSE_UNIT)(const Filters& f, int64_t begin, int64_t end) {
    f.form == 4 ? transform_filters<4>(f, begin, end) : transform_filters<2>(f, begin, end);
}

void RSE_CONCAT(gradient_transform_, RSE_UNIT)(const WeightGradient& w, float* work, int64_t first, int64_t begin, int64_t end) {
    w.of.form == 4 ? transform_block<4>(w, work, first, begin, end) : transform_block<2>(w, work, first, begin, end);
}

void RSE_CONCAT(gradient_multiply_, RSE_UNIT)(const WeightGradient& w, int64_t tiles, bool first, int64_t begin, int64_t end) {
    multiply_block(w, tiles, first, begin, end);
}

void RSE_CONCAT(gradient_finish_, RSE_UNIT)(const WeightGradient& w, int64_t begin, int64_t end) {
    w.of.form == 4 ? transform_back<4>(w.filters, begin, end) : transform_back<2>(w.filters, begin, end);
}

}  // namespace rse
