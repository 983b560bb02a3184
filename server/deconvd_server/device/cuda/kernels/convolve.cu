// y or gx as a convolution of stride 1 on the tensor cores: an implicit matrix product of packed operands.
//
// The source is packed channels-last (packing.cu). Every tap of the convolution shifts it by whole pixels. The product
// has a row for each pixel of its domain, and a column for each channel of the result. For y it has one for each
// channel and each of the stride_h x stride_w output pixels of a domain pixel; write_tile sorts these into the output
// image.
//
// A block's threads fill one stage of shared memory while they multiply another:
//
//     copies      0 1 2 | 3   | 4   | 5   ...
//     products          | 0   | 1   | 2   ...      with STAGES = 4; | waits for the oldest copy
//
// If there are few pixels and the product is deep, its depth is cut into parts, which add_parts adds up in order.
//
// The struct Convolution is generated from structs.py. Macros, from tensor_cores.py: ELEMENT (f16 or bf16),
// ROWS and COLUMNS (16, 32, 64 or 128) of a block's tile, DEPTH and STAGE_BYTES of a stage, STAGES, THREADS,
// BLOCKS_PER_PROCESSOR, STRIDE_H and STRIDE_W (1 for gx).

constexpr int DEPTH_CHUNKS = DEPTH / 8;
constexpr int WARP_ROWS = COLUMNS == 128 ? 64 : COLUMNS == 16 ? 16 : 32;
constexpr int WARP_COLUMNS = COLUMNS == 128 ? 64 : COLUMNS == 64 ? 32 : 16;
constexpr int ROW_WARPS = ROWS / WARP_ROWS;
constexpr int A_BYTES = ROWS * DEPTH * 2;
constexpr int ROWS_PER_PASS = THREADS / DEPTH_CHUNKS;
constexpr int A_PASSES = ROWS / ROWS_PER_PASS, B_PASSES = (COLUMNS + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
constexpr int PITCH = ROWS + 8;  // elements from one column of the result's tile to the next

static_assert(ROW_WARPS * (COLUMNS / WARP_COLUMNS) * 32 == THREADS, "the warps cover the tile");
static_assert(STAGE_BYTES == A_BYTES + COLUMNS * DEPTH * 2, "a stage holds a tile of both operands");
static_assert(COLUMNS * PITCH * 2 <= STAGES * STAGE_BYTES, "the result's tile fits where the stages were");

using Index = long long;

// The source pixels of a thread's rows, for a tap at offset 0.
struct SourceRows {
    const ELEMENT *samples[A_PASSES];
    int h[A_PASSES], w[A_PASSES];

    __device__ SourceRows(const ELEMENT *source, const Convolution &c, Index first_row)
    {
        const Index domain = (Index)c.domain_h * c.domain_w;
        for (int i = 0; i < A_PASSES; ++i) {
            const Index row = first_row + threadIdx.x / DEPTH_CHUNKS + i * ROWS_PER_PASS;
            const Index sample = row / domain;
            const int pixel = row % domain;
            h[i] = sample < c.samples ? pixel / c.domain_w + c.offset_h : -(1 << 30);
            w[i] = pixel % c.domain_w + c.offset_w;
            samples[i] = source + (sample < c.samples ? sample : 0) * c.source_h * c.source_w * c.groups * c.channels;
        }
    }
};

// Counts through the depth of the product, by taps and channels, for the thread's column of chunks of the tiles.
struct DepthCounter {
    int depth, tap_h, tap_w, channel;

    __device__ DepthCounter(const Convolution &c, int first)
    {
        depth = first + threadIdx.x % DEPTH_CHUNKS * 8;
        tap_h = depth / c.channels / c.taps_w;
        tap_w = depth / c.channels % c.taps_w;
        channel = depth % c.channels;
    }
    __device__ void advance(const Convolution &c)
    {
        depth += DEPTH;
        channel += DEPTH;
        wrap(c);
    }
    __device__ void wrap(const Convolution &c)
    {
        while (channel >= c.channels) {
            channel -= c.channels;
            if (++tap_w == c.taps_w) {
                tap_w = 0;
                ++tap_h;
            }
        }
    }
};

__device__ __forceinline__ void load_stage(unsigned stage, const SourceRows &rows, const DepthCounter &at,
                                           int end, const ELEMENT *filter, int total_depth, int filter_rows,
                                           const Convolution &c)
{
    const int chunk = threadIdx.x % DEPTH_CHUNKS, first = threadIdx.x / DEPTH_CHUNKS;
    const bool in_depth = at.depth < end;
    const int shift_h = at.tap_h * c.step_h, shift_w = at.tap_w * c.step_w, pitch = c.groups * c.channels;
#pragma unroll
    for (int i = 0; i < A_PASSES; ++i) {
        const int h = rows.h[i] + shift_h, w = rows.w[i] + shift_w;
        const bool valid = in_depth && h >= 0 && h < c.source_h && w >= 0 && w < c.source_w;
        const Index offset = (Index)(h * c.source_w + w) * pitch + at.channel;
        copy_chunk(stage + chunk_place<DEPTH_CHUNKS>(first + i * ROWS_PER_PASS, chunk) * 16,
                   rows.samples[i] + (valid ? offset : 0), valid);
    }
#pragma unroll
    for (int i = 0; i < B_PASSES; ++i) {
        const int row = first + i * ROWS_PER_PASS;
        if (row >= COLUMNS) break;
        const bool valid = in_depth && row < filter_rows;
        copy_chunk(stage + A_BYTES + chunk_place<DEPTH_CHUNKS>(row, chunk) * 16,
                   filter + (valid ? (Index)row * total_depth + at.depth : 0), valid);
    }
    commit_copies();
}

using Sums = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];

__device__ __forceinline__ void multiply_stage(Sums &sums, unsigned stage)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp % ROW_WARPS * WARP_ROWS, first_column = warp / ROW_WARPS * WARP_COLUMNS;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; ++step) {
        unsigned a[WARP_ROWS / 16][4], b[WARP_COLUMNS / 16][4];
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i) {
            const int row = first_row + i * 16 + lane % 16;
            load_matrices(a[i], stage + chunk_place<DEPTH_CHUNKS>(row, step * 2 + lane / 16) * 16);
        }
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 16; ++j) {
            const int row = first_column + j * 16 + lane % 8 + lane / 16 * 8;
            load_matrices(b[j], stage + A_BYTES + chunk_place<DEPTH_CHUNKS>(row, step * 2 + lane / 8 % 2) * 16);
        }
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
            for (int j = 0; j < WARP_COLUMNS / 8; ++j)
                multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], ELEMENT{});
    }
}

// Writes the sums, rounded, to a tile in shared memory. A column of the product is a row of the tile.
__device__ __forceinline__ void store_tile(ELEMENT *tile, const Sums &sums)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp % ROW_WARPS * WARP_ROWS, first_column = warp / ROW_WARPS * WARP_COLUMNS;
#pragma unroll
    for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 8; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int row = first_row + i * 16 + lane / 4 + k / 2 * 8;
                const int column = first_column + j * 8 + lane % 4 * 2 + k % 2;
                narrow(tile[column * PITCH + row], sums[i][j][k]);
            }
}

// Writes the tile if the domain is the output image itself: runs of pixels of one channel.
template <int width>
__device__ void write_runs(ELEMENT *output, const ELEMENT *tile, const Convolution &c, Index first_row,
                           int first_column)
{
    constexpr int runs = ROWS / width;
    const int pixels = c.output_h * c.output_w, run = threadIdx.x % runs * width;
    const Index row = first_row + run;
    const Index sample = row / pixels;
    if (sample >= c.samples) return;
    const Index first_channel = (sample * c.groups + blockIdx.z) * c.columns + first_column;
    ELEMENT *target = output + first_channel * pixels + row % pixels;
    for (int column = threadIdx.x / runs; column < COLUMNS && first_column + column < c.columns;
         column += THREADS / runs)
        *(Vector<ELEMENT, width> *)(target + (Index)column * pixels) =
            *(const Vector<ELEMENT, width> *)(tile + column * PITCH + run);
}

// A pixel of the domain, of all samples.
struct OutputPixel {
    Index sample;
    int h, w;

    __device__ OutputPixel(const Convolution &c, Index row)
    {
        const Index domain = (Index)c.domain_h * c.domain_w;
        sample = row / domain;
        h = row % domain / c.domain_w;
        w = row % domain % c.domain_w;
    }
    __device__ void advance(const Convolution &c, int pixels)
    {
        w += pixels;
        while (w >= c.domain_w) {
            w -= c.domain_w;
            if (++h == c.domain_h) {
                h = 0;
                ++sample;
            }
        }
    }
};

// Writes the tile for a stride of 2 without a cut: four domain pixels make an aligned vector of output pixels.
__device__ void write_vectors(ELEMENT *output, const ELEMENT *tile, const Convolution &c, Index first_row,
                              int first_column)
{
    const int row = threadIdx.x % (ROWS / 4) * 4;
    const OutputPixel pixel(c, first_row + row);
    if (pixel.sample >= c.samples) return;
    const int group_channels = c.columns / STRIDE_H / STRIDE_W;
    ELEMENT *sample = output + (pixel.sample * c.groups + blockIdx.z) * group_channels * c.output_h * c.output_w;
    for (int column = threadIdx.x / (ROWS / 4) * 2; column < COLUMNS; column += THREADS / (ROWS / 4) * 2) {
        const unsigned at = first_column + column, rest = at / STRIDE_W;
        if (at >= c.columns) return;
        const int h = pixel.h * STRIDE_H - c.cut_h + rest % STRIDE_H, w = pixel.w * STRIDE_W;
        if (h < 0 || h >= c.output_h || w >= c.output_w) continue;
        const auto first = *(const Vector<ELEMENT, 4> *)(tile + column * PITCH + row);
        const auto second = *(const Vector<ELEMENT, 4> *)(tile + (column + 1) * PITCH + row);
        Vector<ELEMENT, 8> both;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            both.values[2 * j] = first.values[j];
            both.values[2 * j + 1] = second.values[j];
        }
        *(Vector<ELEMENT, 8> *)(sample + ((Index)(rest / STRIDE_H) * c.output_h + h) * c.output_w + w) = both;
    }
}

// The output pixels that a thread of write_pairs writes of each channel: a pair at once, one pixel, or two one by one.
//
// With an odd cut, an aligned pair is the second phase of a domain pixel and the first phase of the next one.
struct PairPlan {
    bool pair, first, second;
    int low, high;  // offsets of the pair's elements in the tile, from the first phase's element
    int left;  // position of the first phase in the output row
    int offset;  // offset of the pair from there

    __device__ PairPlan(const Convolution &c, const OutputPixel &pixel, int row, bool words)
    {
        const bool shifted = c.cut_w % 2;
        left = pixel.w * 2 - c.cut_w;
        low = shifted ? PITCH : 0;
        high = shifted ? 1 : PITCH;
        offset = shifted;
        const bool has_neighbour = !shifted || (row + 1 < ROWS && pixel.w + 1 < c.domain_w);
        const bool has_previous = shifted && row > 0 && pixel.w > 0;  // the pair before has this pixel's first phase
        pair = words && has_neighbour && left + offset >= 0 && left + offset + 1 < c.output_w;
        first = left >= 0 && left < c.output_w && !(shifted ? words && has_previous : pair);
        second = left + 1 < c.output_w && !pair;
    }
};

// Writes the tile for a stride of 2 along w, with neighbouring threads at neighbouring domain pixels.
__device__ void write_pairs(ELEMENT *output, const ELEMENT *tile, const Convolution &c, Index first_row,
                            int first_column)
{
    constexpr int columns = STRIDE_H * 2, step = THREADS / ROWS;  // columns of a channel, channels from turn to turn
    const int row = threadIdx.x % ROWS, group_channels = c.columns / columns;
    const OutputPixel pixel(c, first_row + row);
    if (pixel.sample >= c.samples) return;
    const PairPlan plan(c, pixel, row, c.output_w % 2 == 0 && (size_t)output % 4 == 0);
    const int first_channel = first_column / columns, end = min(COLUMNS / columns, group_channels - first_channel);
    const Index plane = (pixel.sample * c.groups + blockIdx.z) * group_channels + first_channel;
    const int image = c.output_h * c.output_w;
#pragma unroll
    for (int phase = 0; phase < STRIDE_H; ++phase) {
        const int h = pixel.h * STRIDE_H + phase - c.cut_h;
        if (h < 0 || h >= c.output_h) continue;
        ELEMENT *target = output + plane * image + h * c.output_w + plan.left;
#pragma unroll 4
        for (int channel = threadIdx.x / ROWS; channel < end; channel += step) {
            const ELEMENT *values = tile + (channel * columns + phase * 2) * PITCH + row;
            ELEMENT *pixels = target + (Index)channel * image;
            if (plan.pair) *(Vector<ELEMENT, 2> *)(pixels + plan.offset) = {values[plan.low], values[plan.high]};
            if (plan.first) pixels[0] = values[0];
            if (plan.second) pixels[1] = values[PITCH];
        }
    }
}

// Writes the tile for any stride, with neighbouring threads at neighbouring domain pixels.
__device__ void write_phases(ELEMENT *output, const ELEMENT *tile, const Convolution &c, Index first_row,
                             int first_column)
{
    const int row = threadIdx.x % ROWS;
    const OutputPixel pixel(c, first_row + row);
    if (pixel.sample >= c.samples) return;
    const int group_channels = c.columns / STRIDE_H / STRIDE_W;
    const Index first_plane = (pixel.sample * c.groups + blockIdx.z) * group_channels;
    for (int column = threadIdx.x / ROWS; column < COLUMNS; column += THREADS / ROWS) {
        const unsigned at = first_column + column, phase_w = at % STRIDE_W, rest = at / STRIDE_W;
        if (at >= c.columns) return;
        const int h = pixel.h * STRIDE_H + rest % STRIDE_H - c.cut_h, w = pixel.w * STRIDE_W + phase_w - c.cut_w;
        if (h >= 0 && h < c.output_h && w >= 0 && w < c.output_w)
            output[((first_plane + rest / STRIDE_H) * c.output_h + h) * c.output_w + w] = tile[column * PITCH + row];
    }
}

// Writes the tile for strides that are multiples of 8: a thread writes vectors of phases of one pixel.
//
// Four neighbouring threads write the phases of one pixel, so that they fill a cache line.
__device__ void write_many_phases(ELEMENT *output, const ELEMENT *tile, const Convolution &c, Index first_row,
                                  int first_column)
{
    constexpr int lanes = COLUMNS >= 32 ? 4 : 2, step = THREADS / lanes;
    const int group_channels = c.columns / STRIDE_H / STRIDE_W;
    const bool aligned = c.cut_w % 8 == 0 && c.output_w % 8 == 0 && is_aligned(output);
    for (int first = threadIdx.x % lanes * 8; first < COLUMNS; first += lanes * 8) {
        const int at = first_column + first;
        if (at >= c.columns) return;
        const int phase_w = at % STRIDE_W, phase_h = at / STRIDE_W % STRIDE_H, channel = at / STRIDE_W / STRIDE_H;
        OutputPixel pixel(c, first_row + threadIdx.x / lanes);
        for (int row = threadIdx.x / lanes; row < ROWS && pixel.sample < c.samples; row += step, pixel.advance(c, step)) {
            const int h = pixel.h * STRIDE_H + phase_h - c.cut_h, w = pixel.w * STRIDE_W + phase_w - c.cut_w;
            if (h < 0 || h >= c.output_h) continue;
            const Index plane = (pixel.sample * c.groups + blockIdx.z) * group_channels + channel;
            ELEMENT *target = output + (plane * c.output_h + h) * c.output_w + w;
            Vector<ELEMENT, 8> values;
#pragma unroll
            for (int i = 0; i < 8; ++i) values.values[i] = tile[(first + i) * PITCH + row];
            if (aligned) {
                if (w >= 0 && w < c.output_w) *(Vector<ELEMENT, 8> *)target = values;
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    if (w + i >= 0 && w + i < c.output_w) target[i] = values.values[i];
            }
        }
    }
}

__device__ void write_tile(ELEMENT *output, const ELEMENT *tile, const Convolution &c, Index first_row,
                           int first_column)
{
    const bool aligned = is_aligned(output);
    if (STRIDE_H * STRIDE_W == 1 && c.output_h * c.output_w % 8 == 0 && aligned)
        write_runs<8>(output, tile, c, first_row, first_column);
    else if (STRIDE_H * STRIDE_W == 1)
        write_runs<1>(output, tile, c, first_row, first_column);
    else if (STRIDE_W == 2 && c.cut_w == 0 && c.domain_w % 4 == 0 && c.output_w % 8 == 0 && aligned)
        write_vectors(output, tile, c, first_row, first_column);
    else if (STRIDE_W == 2 && 16 % (STRIDE_H * 2) == 0)
        write_pairs(output, tile, c, first_row, first_column);
    else if (STRIDE_W % 8 == 0)
        write_many_phases(output, tile, c, first_row, first_column);
    else
        write_phases(output, tile, c, first_row, first_column);
}

// Sums a part of the depth of one tile: `steps` stages, from depth `first`.
__device__ __forceinline__ void multiply(Sums &sums, unsigned stages, const ELEMENT *source, const ELEMENT *filter,
                                         const Convolution &c, Index first_row, int first_column, int first, int steps)
{
    const int total_depth = c.taps_h * c.taps_w * c.channels, filter_rows = c.columns - first_column;
    const SourceRows rows(source, c, first_row);
    DepthCounter at(c, first);
    const int end = min(total_depth, first + steps * DEPTH);
    const auto load = [&](int number) {
        load_stage(stages + number % STAGES * STAGE_BYTES, rows, at, end, filter, total_depth, filter_rows, c);
        at.advance(c);
    };
    for (int number = 0; number < STAGES - 1; ++number) load(number);
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();  // this stage is there; the others may still be on their way
        __syncthreads();  // for all threads; and all have multiplied the stage that is overwritten next
        load(step + STAGES - 1);
        multiply_stage(sums, stages + step % STAGES * STAGE_BYTES);
    }
    wait_for_copies<0>();
    __syncthreads();  // the result's tile takes the place of the stages
}

// source: (n, source_h, source_w, groups, channels); filter: (groups, columns, taps_h taps_w channels).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
convolve(const ELEMENT *source, const ELEMENT *filter, ELEMENT *output, Convolution c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const Index first_row = (Index)blockIdx.x * ROWS;
    const int first_column = blockIdx.y * COLUMNS, depth = c.taps_h * c.taps_w * c.channels;
    Sums sums = {};
    multiply(sums, shared_address(shared), source + blockIdx.z * c.channels,
             filter + ((Index)blockIdx.z * c.columns + first_column) * depth, c, first_row, first_column, 0,
             (depth + DEPTH - 1) / DEPTH);
    ELEMENT *tile = (ELEMENT *)shared;
    store_tile(tile, sums);
    __syncthreads();
    write_tile(output, tile, c, first_row, first_column);
}

#if STRIDE_H * STRIDE_W == 1
// Sets sums_of_parts, of shape (groups, parts, columns, pixels of the domain), for add_parts. Blocks along z: (groups,
// parts).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
convolve_parts(const ELEMENT *source, const ELEMENT *filter, float *sums_of_parts, Convolution c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const Index first_row = (Index)blockIdx.x * ROWS, pixels = (Index)c.samples * c.domain_h * c.domain_w;
    const int first_column = blockIdx.y * COLUMNS, depth = c.taps_h * c.taps_w * c.channels;
    const int group = blockIdx.z / c.parts, part = blockIdx.z % c.parts;
    const int stages = (depth + DEPTH - 1) / DEPTH, steps = (stages + c.parts - 1) / c.parts;
    Sums sums = {};
    multiply(sums, shared_address(shared), source + group * c.channels,
             filter + ((Index)group * c.columns + first_column) * depth, c, first_row, first_column,
             part * steps * DEPTH, steps);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const Index row = first_row + warp % ROW_WARPS * WARP_ROWS + lane / 4;
    const int column = first_column + warp / ROW_WARPS * WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 8; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Index at_row = row + i * 16 + k / 2 * 8, at_column = column + j * 8 + k % 2;
                if (at_row < pixels && at_column < c.columns)
                    sums_of_parts[((Index)blockIdx.z * c.columns + at_column) * pixels + at_row] = sums[i][j][k];
            }
}

// Adds up the sums of convolve_parts, for results without a stride. Blocks: (pixels, columns, groups).
extern "C" __global__ void __launch_bounds__(THREADS)
add_parts(const float *sums_of_parts, ELEMENT *output, Convolution c)
{
    const int image = c.output_h * c.output_w;
    const Index pixels = (Index)c.samples * image, pixel = (Index)blockIdx.x * THREADS + threadIdx.x;
    const int column = blockIdx.y;
    if (pixel >= pixels) return;
    const float *source = sums_of_parts + ((Index)blockIdx.z * c.parts * c.columns + column) * pixels + pixel;
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < c.parts; ++part) sum += source[part * c.columns * pixels];
    const Index channel = (Index)(pixel / image * c.groups + blockIdx.z) * c.columns + column;
    narrow(output[channel * image + pixel % image], sum);
}
#endif
