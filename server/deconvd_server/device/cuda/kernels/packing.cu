// Packs operands for the tensor cores: images channels-last, filters by output channel, channels padded with zeros.
//
// With a stride, the output image is packed by stride_h x stride_w phases: pixel (q, phase) stands for output pixel
// stride q + phase - pad. Phases lie beside each other like channels: packed channel (channel, phase_h, phase_w).

constexpr int THREADS = 256;

using Index = long long;

struct PackedImage {
    int samples, groups, channels;  // channels of a group
    int image_h, image_w, stride_h, stride_w, cut_h, cut_w;  // image pixel = packed pixel * stride + phase - cut
    int packed_h, packed_w, packed_channels;  // packed channels of a group: a multiple of 8
    int rows;  // (channel, phase_h) pairs that a block takes at once: rows * stride_w is a multiple of 8, at most 64
};

constexpr int PIXELS = 32, MAX_CHANNELS = 64, PITCH = MAX_CHANNELS + 2;  // an odd number of banks

// Loads a tile: packed pixels [first_w, first_w + PIXELS) of one packed row, packed channels from the given row on.
__device__ void load_tile(ELEMENT (*tile)[PITCH], const ELEMENT *image, const PackedImage &p, int packed_row,
                          int first_w, int first_row)
{
    const int width = PIXELS * p.stride_w, left = first_w * p.stride_w - p.cut_w;
    for (int i = threadIdx.x; i < p.rows * width; i += THREADS) {
        const int row = i / width, pixel = i % width;
        const int channel = (first_row + row) / p.stride_h, phase_h = (first_row + row) % p.stride_h;
        const int h = packed_row * p.stride_h + phase_h - p.cut_h, w = left + pixel;
        const bool inside = channel < p.channels && h >= 0 && h < p.image_h && w >= 0 && w < p.image_w;
        tile[pixel / p.stride_w][row * p.stride_w + pixel % p.stride_w] =
            inside ? image[((Index)channel * p.image_h + h) * p.image_w + w] : ELEMENT{};
    }
}

// packed, of shape (n, packed_h, packed_w, groups, packed_channels), from image, of shape (n, groups channels, h, w).
//
// Blocks: (pixel tiles and packed rows, parts of the packed channels, samples and groups).
extern "C" __global__ void __launch_bounds__(THREADS) pack_image(const ELEMENT *image, ELEMENT *packed, PackedImage p)
{
    __shared__ __align__(16) ELEMENT tile[PIXELS][PITCH];
    const int pixel_tiles = (p.packed_w + PIXELS - 1) / PIXELS;
    const int first_w = blockIdx.x % pixel_tiles * PIXELS, packed_row = blockIdx.x / pixel_tiles;
    const int first_row = blockIdx.y * p.rows, first_channel = first_row * p.stride_w;
    const int channels = min(p.rows * p.stride_w, p.packed_channels - first_channel);
    for (Index plane = blockIdx.z; plane < (Index)p.samples * p.groups; plane += gridDim.z) {
        load_tile(tile, image + plane * p.channels * p.image_h * p.image_w, p, packed_row, first_w, first_row);
        __syncthreads();
        const Index sample = plane / p.groups, group = plane % p.groups;
        for (int i = threadIdx.x; i < PIXELS * channels / 8; i += THREADS) {
            const int pixel = i / (channels / 8), channel = i % (channels / 8) * 8;
            if (first_w + pixel >= p.packed_w) break;
            Vector<ELEMENT, 8> elements;
#pragma unroll
            for (int j = 0; j < 8; ++j) elements.values[j] = tile[pixel][channel + j];
            const Index at = (sample * p.packed_h + packed_row) * p.packed_w + first_w + pixel;
            *(Vector<ELEMENT, 8> *)(packed + (at * p.groups + group) * p.packed_channels + first_channel + channel) =
                elements;
        }
        __syncthreads();
    }
}

struct PackedFilter {
    int groups, inputs, outputs;  // channels of a group
    int kernel_h, kernel_w, stride_h, stride_w;
    int taps_h, taps_w;  // of the convolution: kernel / stride, rounded up
    int packed_channels;  // inputs, or outputs and phases, padded to a multiple of 8
};

// Where tap (kh, kw) goes: its convolution tap, and its phase.
struct TapPlace {
    int tap, phase;

    __device__ TapPlace(const PackedFilter &p, int tap_of_filter)
    {
        const int kh = tap_of_filter / p.kernel_w, kw = tap_of_filter % p.kernel_w;
        tap = kh / p.stride_h * p.taps_w + kw / p.stride_w;
        phase = kh % p.stride_h * p.stride_w + kw % p.stride_w;
    }
};

// For y: (groups, (outputs, phases), taps, packed_channels) from W, of shape (groups inputs, outputs, kernel taps).
//
// What no tap belongs to must hold zeros already. Blocks: (tiles of W's rows, tiles of inputs, groups).
extern "C" __global__ void __launch_bounds__(THREADS) pack_filter_by_output(const ELEMENT *W, ELEMENT *packed,
                                                                            PackedFilter p)
{
    __shared__ ELEMENT tile[32][33];
    const int taps = p.kernel_h * p.kernel_w, phases = p.stride_h * p.stride_w;
    const Index columns = (Index)p.outputs * taps, first_column = (Index)blockIdx.x * 32;
    const int first_input = blockIdx.y * 32, x = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < 32 && first_input + i < p.inputs; i += THREADS / 32)
        if (first_column + x < columns)
            tile[i][x] = W[((Index)blockIdx.z * p.inputs + first_input + i) * columns + first_column + x];
    __syncthreads();
    for (int i = threadIdx.x / 32; i < 32 && first_column + i < columns; i += THREADS / 32) {
        const int output = (first_column + i) / taps;
        const TapPlace place(p, (first_column + i) % taps);
        const Index row = ((Index)blockIdx.z * p.outputs + output) * phases + place.phase;
        if (first_input + x < p.inputs)
            packed[(row * p.taps_h * p.taps_w + place.tap) * p.packed_channels + first_input + x] = tile[x][i];
    }
}

// For gx: (groups inputs, taps, packed_channels of (outputs, phases)) from W. What no tap belongs to must be zeros.
extern "C" __global__ void __launch_bounds__(THREADS) pack_filter_by_input(const ELEMENT *W, ELEMENT *packed,
                                                                           PackedFilter p)
{
    const int taps = p.kernel_h * p.kernel_w, phases = p.stride_h * p.stride_w;
    const Index columns = (Index)p.outputs * taps, at = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (at >= columns * p.groups * p.inputs) return;
    const Index input = at / columns, column = at % columns;
    const int output = column / taps;
    const TapPlace place(p, column % taps);
    packed[(input * p.taps_h * p.taps_w + place.tap) * p.packed_channels + output * phases + place.phase] = W[at];
}

// gW from the sums of each part, of shape (parts, groups, inputs, taps, packed_channels of (outputs, phases)).
extern "C" __global__ void __launch_bounds__(THREADS) unpack_filter(const float *sums, ELEMENT *gW, PackedFilter p,
                                                                    int parts)
{
    const int taps = p.kernel_h * p.kernel_w, phases = p.stride_h * p.stride_w;
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
