// Packs operands for the tensor cores: images channels-last, filters by output channel, channels padded with zeros.
//
// The structs PackedImage and PackedFilter are generated from structs.py. Macros, from packing.py: ELEMENT (of two
// bytes), STRIDE_H, STRIDE_W, CUT_W (less than STRIDE_W), THREADS, FILTER_TILE (rows and columns of a tile of W), and
// for images IN_REGISTERS (else through shared memory), PIXELS (packed pixels of a tile) and ROWS (its pairs (channel,
// phase_h)).
//
// With a stride, the output image is packed by stride_h x stride_w phases: pixel (q, phase) stands for output pixel
// stride q + phase - pad. Phases are next to each other, like channels: packed channel (channel, phase_h, phase_w).

using Index = long long;

// The image row of a row of packed channels, (channel, phase_h); null outside the image.
__device__ __forceinline__ const ELEMENT *image_row(const ELEMENT *image, const PackedImage &p, int packed_row, int row)
{
    const int channel = row / STRIDE_H, h = packed_row * STRIDE_H + row % STRIDE_H - p.cut_h;
    const bool inside = channel < p.channels && h >= 0 && h < p.image_h;
    return inside ? image + ((Index)channel * p.image_h + h) * p.image_w : nullptr;
}

#if IN_REGISTERS

constexpr int RUN = PIXELS * STRIDE_W;  // pixels of an image row in a thread's packed pixels

static_assert(ROWS * STRIDE_W == 8 && RUN % 8 == 0, "a thread's channels are one vector, its pixels are whole ones");

// Loads pixels [first, first + RUN) of a row, zeros outside. The row's aligned vectors begin CUT_W pixels further on.
__device__ __forceinline__ void load_run(ELEMENT (&run)[RUN], const ELEMENT *row, int first, int width, bool vectors)
{
    if (!row) {
#pragma unroll
        for (int i = 0; i < RUN; ++i) run[i] = ELEMENT{};
    } else if (vectors) {
#pragma unroll
        for (int at = CUT_W > 0 ? CUT_W - 8 : 0; at < RUN; at += 8) {
            Vector<ELEMENT, 8> elements = {};
            if (first + at >= 0 && first + at < width) elements = *(const Vector<ELEMENT, 8> *)(row + first + at);
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (at + i >= 0 && at + i < RUN) run[at + i] = elements.values[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < RUN; ++i) run[i] = first + i >= 0 && first + i < width ? row[first + i] : ELEMENT{};
    }
}

// Packs image, of shape (n, groups channels, h, w), to packed, of shape (n, packed_h, packed_w, groups,
// packed_channels).
//
// A thread packs 8 packed channels of PIXELS packed pixels of a row. `lanes` neighbouring threads pack the next
// channels. Blocks: (runs of packed pixels of all rows of all planes (n, groups), parts of the packed channels).
extern "C" __global__ void __launch_bounds__(THREADS)
pack_image(const ELEMENT *image, ELEMENT *packed, PackedImage p, int lanes)
{
    const int runs = (p.packed_w + PIXELS - 1) / PIXELS, lane = threadIdx.x % lanes;
    const Index at = (Index)blockIdx.x * (THREADS / lanes) + threadIdx.x / lanes, plane = at / runs / p.packed_h;
    const int packed_w = at % runs * PIXELS, packed_row = at / runs % p.packed_h;
    const int channel = (blockIdx.y * lanes + lane) * 8;
    if (plane >= (Index)p.samples * p.groups || channel >= p.packed_channels) return;
    const ELEMENT *source = image + plane * p.channels * p.image_h * p.image_w;
    const bool vectors = p.image_w % 8 == 0 && is_aligned(image);

    ELEMENT run[ROWS][RUN];
#pragma unroll
    for (int row = 0; row < ROWS; ++row)
        load_run(run[row], image_row(source, p, packed_row, channel / STRIDE_W + row), packed_w * STRIDE_W - CUT_W,
                 p.image_w, vectors);
    const Index pixel = (plane / p.groups * p.packed_h + packed_row) * p.packed_w + packed_w;
    ELEMENT *target = packed + (pixel * p.groups + plane % p.groups) * p.packed_channels + channel;
#pragma unroll
    for (int i = 0; i < PIXELS; ++i) {
        if (packed_w + i >= p.packed_w) break;
        Vector<ELEMENT, 8> elements;
#pragma unroll
        for (int c = 0; c < 8; ++c) elements.values[c] = run[c / STRIDE_W][i * STRIDE_W + c % STRIDE_W];
        *(Vector<ELEMENT, 8> *)(target + (Index)i * p.groups * p.packed_channels) = elements;
    }
}

#else

constexpr int CHANNELS = ROWS * STRIDE_W, PITCH = CHANNELS + 2;  // an odd number of banks, mostly

static_assert(CHANNELS % 8 == 0, "a tile's channels are whole vectors");

// Loads a tile: packed pixels [first_w, first_w + PIXELS) of one packed row, packed channels from the given row on.
//
// Vectors are aligned with the image. With a cut, the first and the last vector reach beyond the tile's ends.
template <int width>
__device__ void load_tile(ELEMENT (*tile)[PITCH], const ELEMENT *image, const PackedImage &p, int packed_row,
                          int first_w, int first_row)
{
    constexpr int vectors = PIXELS * STRIDE_W / width + (width > 1);
    const int first = first_w * STRIDE_W, left = (first - CUT_W + 8 * width) / width * width - 8 * width;
    for (int i = threadIdx.x; i < ROWS * vectors; i += THREADS) {
        const int row = i / vectors, w = left + i % vectors * width, pixel = w + CUT_W - first;
        if (pixel >= PIXELS * STRIDE_W) continue;
        const ELEMENT *source = image_row(image, p, packed_row, first_row + row);
        Vector<ELEMENT, width> elements = {};
        if (source && w >= 0 && w < p.image_w) elements = *(const Vector<ELEMENT, width> *)(source + w);
#pragma unroll
        for (int j = 0; j < width; ++j) {
            const unsigned at = pixel + j;
            if (at < PIXELS * STRIDE_W) tile[at / STRIDE_W][row * STRIDE_W + at % STRIDE_W] = elements.values[j];
        }
    }
}

// The same for other strides, through shared memory. Here `lanes` is not used.
//
// Blocks: (pixel tiles of all rows of all planes (n, groups), parts of the packed channels).
extern "C" __global__ void __launch_bounds__(THREADS)
pack_image(const ELEMENT *image, ELEMENT *packed, PackedImage p, int lanes)
{
    __shared__ __align__(16) ELEMENT tile[PIXELS][PITCH];
    const int pixel_tiles = (p.packed_w + PIXELS - 1) / PIXELS;
    const int first_w = blockIdx.x % pixel_tiles * PIXELS, packed_row = blockIdx.x / pixel_tiles % p.packed_h;
    const Index plane = blockIdx.x / pixel_tiles / p.packed_h;
    const int first_row = blockIdx.y * ROWS, first_channel = first_row * STRIDE_W;
    const ELEMENT *source = image + plane * p.channels * p.image_h * p.image_w;
    if (p.image_w % 8 == 0 && is_aligned(image))
        load_tile<8>(tile, source, p, packed_row, first_w, first_row);
    else
        load_tile<1>(tile, source, p, packed_row, first_w, first_row);
    __syncthreads();
    const Index first_pixel = (plane / p.groups * p.packed_h + packed_row) * p.packed_w + first_w;
    ELEMENT *target = packed + (first_pixel * p.groups + plane % p.groups) * p.packed_channels + first_channel;
    for (int i = threadIdx.x; i < PIXELS * CHANNELS / 8; i += THREADS) {
        const int pixel = i / (CHANNELS / 8), channel = i % (CHANNELS / 8) * 8;
        if (first_w + pixel >= p.packed_w || first_channel + channel >= p.packed_channels) continue;
        Vector<unsigned, 4> words;
#pragma unroll
        for (int j = 0; j < 4; ++j) words.values[j] = *(const unsigned *)&tile[pixel][channel + 2 * j];
        *(Vector<unsigned, 4> *)(target + (Index)pixel * p.groups * p.packed_channels + channel) = words;
    }
}
#endif

// The tap of the convolution, and the phase, that tap (kh, kw) of the filter becomes.
struct TapPlace {
    int tap, phase;

    __device__ TapPlace(const PackedFilter &p, int tap_of_filter)
    {
        const int kh = tap_of_filter / p.kernel_w, kw = tap_of_filter % p.kernel_w;
        tap = kh / STRIDE_H * p.taps_w + kw / STRIDE_W;
        phase = kh % STRIDE_H * STRIDE_W + kw % STRIDE_W;
    }
};

// Packs W, of shape (groups inputs, outputs, kernel taps), for y: (groups, (outputs, phases), taps, packed_channels).
//
// Elements without a tap of W must be zeros already. Blocks: (tiles of W's rows, tiles of inputs, groups).
extern "C" __global__ void __launch_bounds__(THREADS) pack_filter_by_output(const ELEMENT *W, ELEMENT *packed,
                                                                            PackedFilter p)
{
    __shared__ ELEMENT tile[FILTER_TILE][FILTER_TILE + 1];
    const int taps = p.kernel_h * p.kernel_w, phases = STRIDE_H * STRIDE_W;
    const Index columns = (Index)p.outputs * taps, first_column = (Index)blockIdx.x * FILTER_TILE;
    const int first_input = blockIdx.y * FILTER_TILE, x = threadIdx.x % FILTER_TILE;
    for (int i = threadIdx.x / FILTER_TILE; i < FILTER_TILE && first_input + i < p.inputs; i += THREADS / FILTER_TILE)
        if (first_column + x < columns)
            tile[i][x] = W[((Index)blockIdx.z * p.inputs + first_input + i) * columns + first_column + x];
    __syncthreads();
    for (int i = threadIdx.x / FILTER_TILE; i < FILTER_TILE && first_column + i < columns; i += THREADS / FILTER_TILE) {
        const int output = (first_column + i) / taps;
        const TapPlace place(p, (first_column + i) % taps);
        const Index row = ((Index)blockIdx.z * p.outputs + output) * phases + place.phase;
        if (first_input + x < p.inputs)
            packed[(row * p.taps_h * p.taps_w + place.tap) * p.packed_channels + first_input + x] = tile[x][i];
    }
}

// Packs W for gx: (groups inputs, taps, packed_channels of (outputs, phases)). Elements without a tap must be zeros.
extern "C" __global__ void __launch_bounds__(THREADS) pack_filter_by_input(const ELEMENT *W, ELEMENT *packed,
                                                                           PackedFilter p)
{
    const int taps = p.kernel_h * p.kernel_w, phases = STRIDE_H * STRIDE_W;
    const Index columns = (Index)p.outputs * taps, at = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (at >= columns * p.groups * p.inputs) return;
    const Index input = at / columns, column = at % columns;
    const int output = column / taps;
    const TapPlace place(p, column % taps);
    packed[(input * p.taps_h * p.taps_w + place.tap) * p.packed_channels + output * phases + place.phase] = W[at];
}

// Sets gW to the totals of sums of shape (parts, groups, inputs, taps, packed_channels of (outputs, phases)).
extern "C" __global__ void __launch_bounds__(THREADS) unpack_filter(const float *sums, ELEMENT *gW, PackedFilter p,
                                                                    int parts)
{
    const int taps = p.kernel_h * p.kernel_w, phases = STRIDE_H * STRIDE_W;
    const Index columns = (Index)p.outputs * taps, at = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (at >= columns * p.groups * p.inputs) return;
    const Index input = at / columns, column = at % columns;
    const TapPlace place(p, column % taps);
    const Index row = (Index)p.taps_h * p.taps_w * p.packed_channels, part = row * p.groups * p.inputs;
    const float *source = sums + input * row + (Index)place.tap * p.packed_channels + column / taps * phases + place.phase;
    float sum = 0;
#pragma unroll 8
    for (int i = 0; i < parts; ++i) sum += source[i * part];
    narrow(gW[at], sum);
}
