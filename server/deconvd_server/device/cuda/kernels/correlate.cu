// gW as a correlation of packed x and gy on the tensor cores: a matrix product whose depth is the number of pixels.
//
// The product has a row for each input channel and a column for each (tap, packed channel of gy). Both are packed by
// packing.cu. The depth is cut into parts, each summed by its own blocks, and unpack_filter adds them up in order.
//
// The struct Correlation is generated from structs.py. Macros, from tensor_cores.py: ELEMENT (f16 or bf16),
// ROWS (64 or 128) and COLUMNS (16, 32, 64 or 128) of a block's tile, DEPTH and STAGE_BYTES of a stage, STAGES,
// THREADS, BLOCKS_PER_PROCESSOR.

constexpr int A_CHUNKS = ROWS / 8, B_CHUNKS = COLUMNS / 8;
constexpr int ROW_WARPS = ROWS == 128 ? (COLUMNS == 128 ? 2 : COLUMNS == 16 ? 8 : 4) : ROWS / 16;
constexpr int COLUMN_WARPS_WANTED = 8 / ROW_WARPS;
constexpr int COLUMN_WARPS = COLUMNS / 16 < COLUMN_WARPS_WANTED ? COLUMNS / 16 : COLUMN_WARPS_WANTED;
constexpr int DEPTH_WARPS = 8 / ROW_WARPS / COLUMN_WARPS;  // warps that share a part of the tile take turns in depth
constexpr int WARP_ROWS = ROWS / ROW_WARPS, WARP_COLUMNS = COLUMNS / COLUMN_WARPS;
constexpr int A_BYTES = ROWS * DEPTH * 2;

static_assert(DEPTH_WARPS == 1 || DEPTH_WARPS == 2, "a stage has two steps");
static_assert(ROW_WARPS * COLUMN_WARPS * DEPTH_WARPS * 32 == THREADS, "the warps cover the tile");
static_assert(STAGE_BYTES == A_BYTES + COLUMNS * DEPTH * 2, "a stage holds a tile of both operands");

using Index = long long;

// The pixel of x whose chunk a thread loads, stage after stage.
struct PixelCounter {
    Index pixel;
    int sample, h, w;

    __device__ PixelCounter(const Correlation &c, Index first)
    {
        const int image = c.image_h * c.image_w;
        pixel = first;
        sample = first / image;
        h = first % image / c.image_w;
        w = first % image % c.image_w;
    }
    __device__ void advance(const Correlation &c, int pixels)
    {
        pixel += pixels;
        w += pixels;
        while (w >= c.image_w) {
            w -= c.image_w;
            if (++h == c.image_h) {
                h = 0;
                ++sample;
            }
        }
    }
};

constexpr int X_PASSES = (DEPTH * A_CHUNKS + THREADS - 1) / THREADS;

// Loads chunks of x: a row of the tile for each pixel.
__device__ __forceinline__ void load_x(unsigned stage, const ELEMENT *x, Index first, int first_row,
                                       const Correlation &c)
{
    const Index pixels = (Index)c.samples * c.image_h * c.image_w;
#pragma unroll
    for (int i = 0; i < X_PASSES; ++i) {
        const int at = threadIdx.x + i * THREADS, depth = at / A_CHUNKS, chunk = at % A_CHUNKS;
        if (depth >= DEPTH) break;
        const bool valid = first + depth < pixels && first_row + chunk * 8 < c.rows;
        const Index offset = (first + depth) * c.groups * c.rows + first_row + chunk * 8;
        copy_chunk(stage + chunk_place<A_CHUNKS>(depth, chunk) * 16, x + (valid ? offset : 0), valid);
    }
}

// The chunk of packed gy that a thread loads for each pixel. All its chunks are in one column of the tile.
struct GyColumn {
    int shift_h, shift_w, channel;
    bool valid;

    __device__ GyColumn(const Correlation &c, int first_column)
    {
        const int column = first_column + threadIdx.x % B_CHUNKS * 8, tap = column / c.channels;
        valid = tap < c.taps_h * c.taps_w;
        shift_h = tap / c.taps_w * c.step_h + c.offset_h;
        shift_w = tap % c.taps_w * c.step_w + c.offset_w;
        channel = column % c.channels;
    }
};

constexpr int B_DEPTH_PER_PASS = THREADS / B_CHUNKS < DEPTH ? THREADS / B_CHUNKS : DEPTH;

__device__ __forceinline__ void load_gy(unsigned stage, const ELEMENT *gy, PixelCounter at, const GyColumn &column,
                                        const Correlation &c)
{
    const int chunk = threadIdx.x % B_CHUNKS;
#pragma unroll
    for (int i = 0; i < DEPTH / B_DEPTH_PER_PASS; ++i) {
        const int depth = threadIdx.x / B_CHUNKS + i * B_DEPTH_PER_PASS;
        if (depth >= DEPTH) break;
        const int h = at.h + column.shift_h, w = at.w + column.shift_w;
        const bool valid = column.valid && at.sample < c.samples && h >= 0 && h < c.gy_h && w >= 0 && w < c.gy_w;
        const Index pixel = ((Index)at.sample * c.gy_h + h) * c.gy_w + w;
        copy_chunk(stage + A_BYTES + chunk_place<B_CHUNKS>(depth, chunk) * 16,
                   gy + (valid ? pixel * c.groups * c.channels + column.channel : 0), valid);
        if (i + 1 < DEPTH / B_DEPTH_PER_PASS) at.advance(c, B_DEPTH_PER_PASS);
    }
}

using Sums = float[WARP_ROWS / 16][WARP_COLUMNS / 8][4];

__device__ __forceinline__ void multiply_stage(Sums &sums, unsigned stage)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp % ROW_WARPS * WARP_ROWS, first_column = warp / ROW_WARPS % COLUMN_WARPS * WARP_COLUMNS;
    const int first_step = warp / ROW_WARPS / COLUMN_WARPS;
#pragma unroll
    for (int step = 0; step < DEPTH / 16 / DEPTH_WARPS; ++step) {
        const int depth = (first_step + step) * 16 + lane % 8;
        unsigned a[WARP_ROWS / 16][4], b[WARP_COLUMNS / 16][4];
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i) {
            const int chunk = (first_row + i * 16) / 8 + lane / 8 % 2;
            load_transposed(a[i], stage + chunk_place<A_CHUNKS>(depth + lane / 16 * 8, chunk) * 16);
        }
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 16; ++j) {
            const int chunk = (first_column + j * 16) / 8 + lane / 16;
            load_transposed(b[j], stage + A_BYTES + chunk_place<B_CHUNKS>(depth + lane / 8 % 2 * 8, chunk) * 16);
        }
#pragma unroll
        for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
            for (int j = 0; j < WARP_COLUMNS / 8; ++j)
                multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], ELEMENT{});
    }
}

// Adds the sums of the warps that take the second half of each stage to those of the warps that take the first.
__device__ __forceinline__ void add_depth_warps(Sums &sums, float *shared)
{
    if (DEPTH_WARPS == 1) return;
    constexpr int count = sizeof(Sums) / sizeof(float);
    const int thread = threadIdx.x % (THREADS / 2);
    __syncthreads();
    if (threadIdx.x >= THREADS / 2)
        for (int i = 0; i < count; ++i) shared[i * (THREADS / 2) + thread] = (&sums[0][0][0])[i];
    __syncthreads();
    if (threadIdx.x < THREADS / 2)
        for (int i = 0; i < count; ++i) (&sums[0][0][0])[i] += shared[i * (THREADS / 2) + thread];
}

// Writes the sums of one part: a matrix of inputs x columns.
__device__ void write_sums(float *part, const Sums &sums, const Correlation &c, int block_row, int block_column)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = c.taps_h * c.taps_w * c.channels;
    if (warp / ROW_WARPS / COLUMN_WARPS > 0) return;
    const int first_row = block_row + warp % ROW_WARPS * WARP_ROWS;
    const int first_column = block_column + warp / ROW_WARPS * WARP_COLUMNS;
#pragma unroll
    for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_COLUMNS / 8; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + i * 16 + lane / 4 + half * 8, column = first_column + j * 8 + lane % 4 * 2;
                if (row < c.inputs && column < columns)
                    *(Vector<float, 2> *)(part + (Index)row * columns + column) = {sums[i][j][half * 2],
                                                                                   sums[i][j][half * 2 + 1]};
            }
}

// x: (n, image_h, image_w, groups, rows); gy: (n, gy_h, gy_w, groups, channels); sums: (parts, groups, inputs,
// columns).
//
// Blocks: (tiles of columns, tiles of rows and groups, parts).
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_PROCESSOR)
correlate(const ELEMENT *x, const ELEMENT *gy, float *sums_of_parts, Correlation c)
{
    extern __shared__ __align__(128) unsigned char shared[];
    const unsigned stages = shared_address(shared);
    const int group = blockIdx.y % c.groups, first_row = blockIdx.y / c.groups * ROWS;
    const int first_column = blockIdx.x * COLUMNS;
    const Index first = (Index)blockIdx.z * c.steps * DEPTH;
    const ELEMENT *group_x = x + (Index)group * c.rows, *group_gy = gy + (Index)group * c.channels;
    const GyColumn column(c, first_column);
    PixelCounter at(c, first + threadIdx.x / B_CHUNKS);
    Index x_pixel = first;
    Sums sums = {};

    const auto load_stage = [&](int number) {
        if (number < c.steps) {
            const unsigned stage = stages + number % STAGES * STAGE_BYTES;
            load_x(stage, group_x, x_pixel, first_row, c);
            load_gy(stage, group_gy, at, column, c);
            at.advance(c, DEPTH);
            x_pixel += DEPTH;
        }
        commit_copies();
    };
    for (int number = 0; number < STAGES - 1; ++number) load_stage(number);
    for (int step = 0; step < c.steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        load_stage(step + STAGES - 1);
        multiply_stage(sums, stages + step % STAGES * STAGE_BYTES);
    }
    wait_for_copies<0>();
    add_depth_warps(sums, (float *)shared);
    const Index columns = (Index)c.taps_h * c.taps_w * c.channels;
    write_sums(sums_of_parts + ((Index)blockIdx.z * c.groups + group) * c.inputs * columns, sums, c, first_row,
               first_column);
}
