// 3 x 3 convolutions with stride 1 on the CPU by Winograd's minimal filtering F(2 x 2, 3 x 3).
//
//     Y = A^T [ (G g G^T) * (B^T d B) ] A       for each patch d of 4 x 4 inputs and its block Y of 2 x 2 outputs,
//
// where * multiplies element by element and sums over the input channels: 16 products for a block instead of 36. The
// entries of A and B are 0, 1 and -1, those of G also 1/2. Lavin and Gray, Fast Algorithms for Convolutional Neural
// Networks, 2016.
//
// Maps are channels-last, so all transforms process whole vectors of channels. A group of blocks goes through the three
// steps (transform, 16 matrix products, transform back) while it is in the cache.

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
#endif

namespace {

#if defined(__AVX512F__)
constexpr int lanes = 16, rows = 14, most_rows = 56;  // 28 sums, a row of weights in two, one input: all 32 registers
#elif defined(__AVX2__)
constexpr int lanes = 8, rows = 6, most_rows = 54;
#else
constexpr int lanes = 4, rows = 6, most_rows = 54;
#endif
constexpr int columns = 2 * lanes;  // of a panel of weights
constexpr int gap = 16;  // floats between matrices; without it all would map to the same cache lines

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef float Unaligned __attribute__((vector_size(4 * lanes), aligned(4)));

inline Vec load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vec value) { *reinterpret_cast<Unaligned*>(to) = value; }

int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Map {
    int64_t images, height, width, channels;
    int64_t image, row, pixel;  // strides; channels are adjacent

    int64_t at(int64_t n, int64_t y, int64_t x) const { return n * image + y * row + x * pixel; }
};

// sums[r][k] = sum over c of inputs[r][c] weights[c][k], for a panel of weights.
inline void product(const float* inputs, const float* weights, float* sums, int64_t channels, int64_t filters) {
    Vec acc[rows][2] = {};
    for (int64_t c = 0; c < channels; c++) {
        const Vec first = load(weights + c * columns), second = load(weights + c * columns + lanes);
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) {
            const float input = inputs[r * channels + c];
            acc[r][0] += first * input;
            acc[r][1] += second * input;
        }
    }
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        store(sums + r * filters, acc[r][0]);
        store(sums + r * filters + lanes, acc[r][1]);
    }
}

// Pointers to the 16 pixels of the patch that begins at a row and a column; pixels of the padding point to zeros.
inline void find_patch(const float* x, const Map& in, int64_t n, int64_t row, int64_t column, const float* zeros,
                       const float* patch[16]) {
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 4; j++) {
            const int64_t r = row + i, c = column + j;
            const bool inside = r >= 0 && r < in.height && c >= 0 && c < in.width;
            patch[4 * i + j] = inside ? x + in.at(n, r, c) : zeros;
        }
}

// B^T d B for all channels of a patch; `step` floats from one matrix to the next.
void transform(const float* const patch[16], int64_t channels, float* to, int64_t step) {
    for (int64_t c = 0; c < channels; c += lanes) {
        Vec t[4][4];
        for (int j = 0; j < 4; j++) {
            const Vec d0 = load(patch[j] + c), d1 = load(patch[4 + j] + c);
            const Vec d2 = load(patch[8 + j] + c), d3 = load(patch[12 + j] + c);
            t[0][j] = d0 - d2, t[1][j] = d1 + d2, t[2][j] = d2 - d1, t[3][j] = d1 - d3;
        }
        for (int i = 0; i < 4; i++) {
            float* out = to + 4 * i * step + c;
            store(out, t[i][0] - t[i][2]);
            store(out + step, t[i][1] + t[i][2]);
            store(out + 2 * step, t[i][2] - t[i][1]);
            store(out + 3 * step, t[i][1] - t[i][3]);
        }
    }
}

struct Output {
    float* y;
    const float* bias;
    const float* residual;
    Map map, residual_map;
    bool relu;
};

// A^T m A + bias + residual, and the activation, for the block at (top, left); `spoilt` becomes NaN if y is not finite.
void transform_back(const float* from, int64_t step, const Output& out, int64_t n, int64_t top, int64_t left, Vec& spoilt) {
    const int64_t height = std::min<int64_t>(2, out.map.height - top), width = std::min<int64_t>(2, out.map.width - left);
    for (int64_t k = 0; k < out.map.channels; k += lanes) {
        Vec s[2][4];
        for (int j = 0; j < 4; j++) {
            const Vec m0 = load(from + j * step + k), m1 = load(from + (4 + j) * step + k);
            const Vec m2 = load(from + (8 + j) * step + k), m3 = load(from + (12 + j) * step + k);
            s[0][j] = m0 + m1 + m2, s[1][j] = m1 - m2 - m3;
        }
        const Vec bias = out.bias ? load(out.bias + k) : Vec{};
        for (int i = 0; i < height; i++) {
            const Vec y[2] = {s[i][0] + s[i][1] + s[i][2] + bias, s[i][1] - s[i][2] - s[i][3] + bias};
            for (int j = 0; j < width; j++) {
                Vec value = y[j];
                if (out.residual) value += load(out.residual + out.residual_map.at(n, top + i, left + j) + k);
                spoilt += value * 0.0f;
                if (out.relu) value = value > 0.0f ? value : Vec{};
                store(out.y + out.map.at(n, top + i, left + j) + k, value);
            }
        }
    }
}

}  // namespace

extern "C" {

int64_t winograd_packed_floats(int64_t channels, int64_t filters) { return 16 * channels * whole(filters, columns); }

// Blocks that are computed together, given the number of threads.
static int64_t group_of(int64_t blocks, int threads) {
    return std::clamp<int64_t>(whole((blocks + threads - 1) / threads, rows), rows, most_rows);
}

int64_t winograd_scratch_floats(int64_t channels, int64_t filters) {
    return 16 * (most_rows * (channels + whole(filters, columns)) + 2 * gap);  // of a thread
}

// G g G^T of all filters, in panels: [16][filters / columns][channels][columns]. Strides in floats, also negative.
void winograd_pack(const float* weight, int64_t filters, int64_t channels, int64_t by_filter, int64_t by_channel,
                   int64_t by_row, int64_t by_column, float* packed, int threads) {
    const int64_t padded = whole(filters, columns);
#pragma omp parallel for num_threads(threads)
    for (int64_t panel = 0; panel < padded / columns; panel++)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t k = 0; k < columns; k++) {
                float* to = packed + (panel * channels + c) * columns + k;
                const int64_t filter = panel * columns + k;
                double t[4][3] = {};
                if (filter < filters) {
                    const float* g = weight + filter * by_filter + c * by_channel;
                    for (int b = 0; b < 3; b++) {
                        const double g0 = g[b * by_column], g1 = g[by_row + b * by_column], g2 = g[2 * by_row + b * by_column];
                        t[0][b] = g0, t[1][b] = (g0 + g1 + g2) / 2, t[2][b] = (g0 - g1 + g2) / 2, t[3][b] = g2;
                    }
                }
                for (int i = 0; i < 4; i++) {
                    float* row = to + 4 * i * channels * padded;
                    row[0] = t[i][0];
                    row[channels * padded] = (t[i][0] + t[i][1] + t[i][2]) / 2;
                    row[2 * channels * padded] = (t[i][0] - t[i][1] + t[i][2]) / 2;
                    row[3 * channels * padded] = t[i][2];
                }
            }
}

// y = act(conv(x, w) + bias + residual); x begins at row `top` and column `left` of its zero padding. Channels and
// filters must be multiples of 16; `zeros` has one zero per channel. Returns false if a y before the activation is not
// finite: an infinity or NaN spoils all outputs of its block, also those that do not read it.
bool winograd_conv3x3(const float* x, Map in, int64_t top, int64_t left, const float* packed, const float* bias,
                      const float* residual, Map residual_map, int relu, float* y, Map map, const float* zeros,
                      float* scratch, int threads) {
    const int64_t channels = in.channels, filters = whole(map.channels, columns);
    const int64_t down = (map.height + 1) / 2, across = (map.width + 1) / 2, blocks = map.images * down * across;
    const int64_t group = group_of(blocks, threads), step_in = group * channels + gap, step_out = group * filters + gap;
    const Output out{y, bias, residual, map, residual_map, relu != 0};
    bool finite = true;
#pragma omp parallel num_threads(threads) reduction(&& : finite)
    {
        Vec spoilt = {};
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < blocks; first += group) {
#ifdef _OPENMP
            float* own = scratch + omp_get_thread_num() * winograd_scratch_floats(channels, map.channels);
#else
            float* own = scratch;
#endif
            float *inputs = own, *sums = own + 16 * step_in;
            const int64_t count = std::min(group, blocks - first);
            for (int64_t q = 0; q < count; q++) {
                const int64_t n = (first + q) / (down * across), block = (first + q) % (down * across);
                const int64_t row = block / across * 2 - top, column = block % across * 2 - left;
                const float* patch[16];
                find_patch(x, in, n, row, column, zeros, patch);
                transform(patch, channels, inputs + q * channels, step_in);
            }
            for (int m = 0; m < 16; m++)
                for (int64_t k = 0; k < filters; k += columns)
                    for (int64_t q = 0; q < count; q += rows)
                        product(inputs + m * step_in + q * channels, packed + (m * filters + k) * channels,
                                sums + m * step_out + q * filters + k, channels, filters);
            for (int64_t q = 0; q < count; q++) {
                const int64_t n = (first + q) / (down * across), block = (first + q) % (down * across);
                transform_back(sums + q * filters, step_out, out, n, block / across * 2, block % across * 2, spoilt);
            }
        }
        for (int lane = 0; lane < lanes; lane++) finite = finite && spoilt[lane] == 0.0f;
    }
    return finite;
}
}
