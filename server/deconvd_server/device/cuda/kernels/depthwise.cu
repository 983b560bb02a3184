// y, gx and gW of depthwise problems (one input channel a group) with small square filters and stride 1 or 2.
//
// A thread takes neighbouring pixels of one row. It loads, in vectors, the windows of the other image that their taps
// reach, and keeps them in registers. That needs all distances to be known at compile time.
//
// The struct KernelGeometry is generated from structs.py. Macros, from depthwise.py: ELEMENT, THREADS, WIDTH
// (output pixels of a vector), KERNEL (taps on each axis), STRIDE (1 or 2), PAD (less than KERNEL). Dilation is 1.

constexpr int UNIT = WIDTH / STRIDE;  // input pixels that belong to a vector
constexpr int TAPS = (KERNEL + STRIDE - 1) / STRIDE;

static_assert(WIDTH * sizeof(ELEMENT) == 16, "a vector is what one instruction moves");
static_assert(WIDTH % STRIDE == 0, "a vector holds whole steps of the stride");
static_assert(KERNEL * KERNEL <= THREADS, "each tap of the filter has a thread that loads it");

using Index = long long;
using Sum = Compute<ELEMENT>::type;

__device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Pixels [first + LOW, first + HIGH) of a row, zeros outside the image. `first` is a multiple of CHUNK.
template <int CHUNK, int LOW, int HIGH> struct Window {
    static constexpr int BEGIN = floor_div(LOW, CHUNK) * CHUNK;
    static constexpr int END = -floor_div(-HIGH, CHUNK) * CHUNK;
    Sum values[END - BEGIN];

    __device__ __forceinline__ void load(const ELEMENT *row, int first, int width, bool aligned)
    {
#pragma unroll
        for (int chunk = BEGIN; chunk < END; chunk += CHUNK) {
            const int at = first + chunk;
            if (aligned && at >= 0 && at + CHUNK <= width) {
                const auto elements = *(const Vector<ELEMENT, CHUNK> *)(row + at);
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) values[chunk - BEGIN + i] = widen(elements.values[i]);
            } else {
#pragma unroll
                for (int i = 0; i < CHUNK; ++i)
                    values[chunk - BEGIN + i] = at + i >= 0 && at + i < width ? widen(row[at + i]) : Sum(0);
            }
        }
    }
    // Value of pixel first + offset.
    __device__ __forceinline__ Sum operator[](int offset) const { return values[offset - BEGIN]; }
};

// Loads the filter of one output channel.
__device__ __forceinline__ void load_filter(Sum (*filter)[KERNEL], const ELEMENT *W)
{
    if (threadIdx.x < KERNEL * KERNEL) filter[threadIdx.x / KERNEL][threadIdx.x % KERNEL] = widen(W[threadIdx.x]);
    __syncthreads();
}

__device__ __forceinline__ bool rows_are_aligned(const ELEMENT *image, int width, int chunk)
{
    return (size_t)image % (chunk * sizeof(ELEMENT)) == 0 && width % chunk == 0;
}

template <int count>
__device__ __forceinline__ void store(ELEMENT *row, int first, int width, const Sum (&sums)[count], bool aligned)
{
    if (aligned && first + count <= width) {
        Vector<ELEMENT, count> elements;
#pragma unroll
        for (int i = 0; i < count; ++i) narrow(elements.values[i], sums[i]);
        *(Vector<ELEMENT, count> *)(row + first) = elements;
    } else {
#pragma unroll
        for (int i = 0; i < count; ++i)
            if (first + i < width) narrow(row[first + i], sums[i]);
    }
}

// Blocks: (parts of the image, planes (n, c_O)).
extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_y(const ELEMENT *x, const ELEMENT *W, ELEMENT *y, KernelGeometry g)
{
    __shared__ Sum filter[KERNEL][KERNEL];
    const int outputs = g.output_channels / g.groups, vectors = (g.w.output + WIDTH - 1) / WIDTH;
    const Index plane = blockIdx.y;
    const int channel = plane % g.output_channels;
    load_filter(filter, W + (Index)channel * KERNEL * KERNEL);
    const ELEMENT *image = x + (plane / g.output_channels * g.groups + channel / outputs) * g.h.image * g.w.image;
    ELEMENT *target = y + plane * g.h.output * g.w.output;
    const bool load_aligned = rows_are_aligned(x, g.w.image, UNIT), store_aligned = rows_are_aligned(y, g.w.output, WIDTH);

    for (int i = blockIdx.x * THREADS + threadIdx.x; i < g.h.output * vectors; i += gridDim.x * THREADS) {
        const int h = i / vectors, vector = i % vectors;
        const int image_h = (h + PAD) / STRIDE, phase = (h + PAD) % STRIDE;
        Sum sums[WIDTH] = {};
#pragma unroll
        for (int t = 0; t < TAPS; ++t) {
            const int row = image_h - t, kh = phase + STRIDE * t;
            if (row < 0 || row >= g.h.image || kh >= KERNEL) continue;
            Window<UNIT, PAD / STRIDE - TAPS + 1, (WIDTH - 1 + PAD) / STRIDE + 1> window;
            window.load(image + (Index)row * g.w.image, vector * UNIT, g.w.image, load_aligned);
#pragma unroll
            for (int kw = 0; kw < KERNEL; ++kw) {
                const Sum tap = filter[kh][kw];
#pragma unroll
                for (int v = 0; v < WIDTH; ++v)
                    if ((v + PAD + STRIDE * KERNEL - kw) % STRIDE == 0)
                        sums[v] += tap * window[floor_div(v + PAD - kw, STRIDE)];
            }
        }
        store(target + (Index)h * g.w.output, vector * WIDTH, g.w.output, sums, store_aligned);
    }
}

// The window of gy that the taps of UNIT neighbouring pixels of x reach.
using GyWindow = Window<WIDTH, -PAD, (UNIT - 1) * STRIDE + KERNEL - PAD>;

// Blocks: (parts of the image, planes (n, c_I)).
extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_gx(const ELEMENT *gy, const ELEMENT *W, ELEMENT *gx, KernelGeometry g)
{
    __shared__ Sum filter[KERNEL][KERNEL];
    const int outputs = g.output_channels / g.groups, vectors = (g.w.image + UNIT - 1) / UNIT;
    const Index plane = blockIdx.y;
    const int channel = plane % g.groups;
    ELEMENT *target = gx + plane * g.h.image * g.w.image;
    const bool load_aligned = rows_are_aligned(gy, g.w.output, WIDTH), store_aligned = rows_are_aligned(gx, g.w.image, UNIT);
    const int count = g.h.image * vectors, step = gridDim.x * THREADS;

    // All threads of a block take the same number of turns, since they load filters together.
    for (int first = blockIdx.x * THREADS; first < count; first += step) {
        const int i = min(first + (int)threadIdx.x, count - 1), h = i / vectors, vector = i % vectors;
        Sum sums[UNIT] = {};
        for (int output = 0; output < outputs; ++output) {
            if (outputs > 1 || first == blockIdx.x * THREADS) {
                __syncthreads();
                load_filter(filter, W + ((Index)channel * outputs + output) * KERNEL * KERNEL);
            }
            const ELEMENT *source = gy + (plane * outputs + output) * g.h.output * g.w.output;
#pragma unroll
            for (int kh = 0; kh < KERNEL; ++kh) {
                const int row = h * STRIDE + kh - PAD;
                if (row < 0 || row >= g.h.output) continue;
                GyWindow window;
                window.load(source + (Index)row * g.w.output, vector * WIDTH, g.w.output, load_aligned);
#pragma unroll
                for (int kw = 0; kw < KERNEL; ++kw)
#pragma unroll
                    for (int u = 0; u < UNIT; ++u) sums[u] += filter[kh][kw] * window[u * STRIDE + kw - PAD];
            }
        }
        if (first + threadIdx.x < count)
            store(target + (Index)h * g.w.image, vector * UNIT, g.w.image, sums, store_aligned);
    }
}

// Sets sums, of shape (c_O, parts, taps). Each part sums over some samples. Blocks: (parts, c_O).
extern "C" __global__ void __launch_bounds__(THREADS)
depthwise_gW(const ELEMENT *x, const ELEMENT *gy, Sum *sums_of_parts, KernelGeometry g)
{
    const int outputs = g.output_channels / g.groups, vectors = (g.w.image + UNIT - 1) / UNIT;
    const int channel = blockIdx.y, per_sample = g.h.image * vectors;
    const bool x_aligned = rows_are_aligned(x, g.w.image, UNIT), gy_aligned = rows_are_aligned(gy, g.w.output, WIDTH);
    Sum sums[KERNEL][KERNEL] = {};
    for (Index i = (Index)blockIdx.x * THREADS + threadIdx.x; i < (Index)g.samples * per_sample;
         i += (Index)gridDim.x * THREADS) {
        const Index sample = i / per_sample;
        const int h = i % per_sample / vectors, vector = i % per_sample % vectors;
        const ELEMENT *image = x + (sample * g.groups + channel / outputs) * g.h.image * g.w.image;
        const ELEMENT *source = gy + (sample * g.output_channels + channel) * g.h.output * g.w.output;
        Window<UNIT, 0, UNIT> pixels;
        pixels.load(image + (Index)h * g.w.image, vector * UNIT, g.w.image, x_aligned);
#pragma unroll
        for (int kh = 0; kh < KERNEL; ++kh) {
            const int row = h * STRIDE + kh - PAD;
            if (row < 0 || row >= g.h.output) continue;
            GyWindow window;
            window.load(source + (Index)row * g.w.output, vector * WIDTH, g.w.output, gy_aligned);
#pragma unroll
            for (int kw = 0; kw < KERNEL; ++kw)
#pragma unroll
                for (int u = 0; u < UNIT; ++u) sums[kh][kw] += pixels[u] * window[u * STRIDE + kw - PAD];
        }
    }
    __shared__ Sum sums_of_warps[THREADS / 32][KERNEL * KERNEL];
#pragma unroll
    for (int tap = 0; tap < KERNEL * KERNEL; ++tap) {
        Sum sum = sums[tap / KERNEL][tap % KERNEL];
        for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
        if (threadIdx.x % 32 == 0) sums_of_warps[threadIdx.x / 32][tap] = sum;
    }
    __syncthreads();
    if (threadIdx.x < KERNEL * KERNEL) {
        Sum sum = 0;
        for (int warp = 0; warp < THREADS / 32; ++warp) sum += sums_of_warps[warp][threadIdx.x];
        sums_of_parts[((Index)channel * gridDim.x + blockIdx.x) * KERNEL * KERNEL + threadIdx.x] = sum;
    }
}

// Sets gW to the totals of its parts' sums.
extern "C" __global__ void __launch_bounds__(THREADS) depthwise_add_parts(const Sum *sums_of_parts, ELEMENT *gW,
                                                                          int channels, int parts)
{
    const int at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= channels * KERNEL * KERNEL) return;
    const Sum *source = sums_of_parts + (Index)(at / (KERNEL * KERNEL)) * parts * KERNEL * KERNEL + at % (KERNEL * KERNEL);
    Sum sum = 0;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) sum += source[part * KERNEL * KERNEL];
    narrow(gW[at], sum);
}
