// Columns: for each output channel and tap of the filter, one value for each input pixel (im2col and col2im).
//
// Pixels of all samples are counted in one row, n h w; matrices over a range of them are "packed": (rows, pixels).

constexpr int THREADS = 256;

using Index = long long;

// Sets packed, of shape (channels, pixels), to the pixels [first, first + pixels) of images (n, channels, image_pixels).
extern "C" __global__ void __launch_bounds__(THREADS)
pack(const ELEMENT *images, ELEMENT *packed, int channels, Index image_pixels, Index first, Index pixels)
{
    const Index pixel = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= pixels) return;
    const Index sample = (first + pixel) / image_pixels, offset = (first + pixel) % image_pixels;
    for (int channel = blockIdx.y; channel < channels; channel += gridDim.y)
        packed[channel * pixels + pixel] = images[(sample * channels + channel) * image_pixels + offset];
}

// The inverse of pack.
extern "C" __global__ void __launch_bounds__(THREADS)
unpack(const ELEMENT *packed, ELEMENT *images, int channels, Index image_pixels, Index first, Index pixels)
{
    const Index pixel = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= pixels) return;
    const Index sample = (first + pixel) / image_pixels, offset = (first + pixel) % image_pixels;
    for (int channel = blockIdx.y; channel < channels; channel += gridDim.y)
        images[(sample * channels + channel) * image_pixels + offset] = packed[channel * pixels + pixel];
}

// Sets columns, of shape (c_O h_K w_K, pixels), to what gy holds where each tap takes each input pixel; 0 outside.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_columns(const ELEMENT *gy, ELEMENT *columns, Geometry g, Index first, Index pixels)
{
    const Index pixel = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (pixel >= pixels) return;
    const Index image_pixels = (Index)g.h.image * g.w.image, taps = (Index)g.h.kernel * g.w.kernel;
    const Index sample = (first + pixel) / image_pixels, offset = (first + pixel) % image_pixels;
    const Index top = offset / g.w.image * g.h.stride - g.h.pad, left = offset % g.w.image * g.w.stride - g.w.pad;
    for (int channel = blockIdx.y; channel < g.output_channels; channel += gridDim.y) {
        const ELEMENT *plane = gy + (sample * g.output_channels + channel) * g.h.output * g.w.output;
        ELEMENT *column = columns + channel * taps * pixels + pixel;
        for (int kh = 0; kh < g.h.kernel; ++kh) {
            const Index h = top + (Index)kh * g.h.dilate;
            const bool inside = h >= 0 && h < g.h.output;
            for (int kw = 0; kw < g.w.kernel; ++kw, column += pixels) {
                const Index w = left + (Index)kw * g.w.dilate;
                *column = inside && w >= 0 && w < g.w.output ? plane[h * g.w.output + w] : ELEMENT{};
            }
        }
    }
}

using Sum = Compute<ELEMENT>::type;

struct Columns {
    int first_sample, samples;
    int first_channel, channels;  // of each group
};

// Where the columns of one channel and sample lie, and what its filter and images look like.
struct Plane {
    const Sum *columns;
    Index pixels;  // from one tap's column to the next

    // The sum of what the taps bring to output pixel (h, w), by ascending tap; from the given first taps on.
    template <typename Integer>
    __device__ __forceinline__ Sum sum(const Geometry &g, int h, int w, int first_kh, int first_kw) const
    {
        Sum total = 0;
        const Integer reach_h = (Integer)h + g.h.pad, reach_w = (Integer)w + g.w.pad;
        for (int kh = first_kh; kh < g.h.kernel; kh += g.h.tap_step) {
            const Integer rest_h = reach_h - (Integer)kh * g.h.dilate;
            if (rest_h < 0) break;
            const Integer image_h = rest_h / g.h.stride;
            if (image_h >= g.h.image) continue;
            for (int kw = first_kw; kw < g.w.kernel; kw += g.w.tap_step) {
                const Integer rest_w = reach_w - (Integer)kw * g.w.dilate;
                if (rest_w < 0) break;
                const Integer image_w = rest_w / g.w.stride;
                if (image_w < g.w.image)
                    total += columns[((Index)kh * g.w.kernel + kw) * pixels + image_h * g.w.image + image_w];
            }
        }
        return total;
    }
};

// Sets some channels of some samples of y to the sums of their columns, each in the order of its taps.
//
// columns has the shape (groups, channels, h_K w_K, samples h_I w_I). Threads are ordered by phase, then pixel: those
// of a warp take output pixels a stride apart, whose columns lie beside each other.
template <typename Integer> __device__ void sum_columns_by(const Sum *columns, ELEMENT *y, const Geometry &g, Columns c)
{
    const Index output_pixels = (Index)g.h.output * g.w.output, image_pixels = (Index)g.h.image * g.w.image;
    const Index taps = (Index)g.h.kernel * g.w.kernel, rows = (Index)c.samples * g.groups * c.channels;
    const Integer steps = (g.w.output + g.w.stride - 1) / g.w.stride;  // pixels of one phase in a row
    const Integer at = (Integer)blockIdx.x * THREADS + threadIdx.x;
    const Integer h = at / (steps * g.w.stride), phase = at % (steps * g.w.stride) / steps;
    const Integer w = at % steps * g.w.stride + phase;
    if (h >= g.h.output || w >= g.w.output) return;
    const int first_kh = first_tap(g.h, h), first_kw = first_tap(g.w, w), group_outputs = g.output_channels / g.groups;
    for (Index row = blockIdx.y; row < rows; row += gridDim.y) {
        const int channel = row % ((Index)g.groups * c.channels), sample = row / ((Index)g.groups * c.channels);
        const Index y_channel = (Index)(channel / c.channels) * group_outputs + c.first_channel + channel % c.channels;
        const Index pixels = c.samples * image_pixels;
        const Plane plane = {columns + channel * taps * pixels + sample * image_pixels, pixels};
        const Sum sum = plane.sum<Integer>(g, h, w, first_kh, first_kw);
        narrow(y[((c.first_sample + sample) * (Index)g.output_channels + y_channel) * output_pixels + (Index)h * g.w.output + w], sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_columns(const Sum *columns, ELEMENT *y, Geometry g, Columns c)
{
    sum_columns_by<int>(columns, y, g, c);
}

// For images and filters whose coordinates pass 32 bits.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_wide_columns(const Sum *columns, ELEMENT *y, Geometry g, Columns c)
{
    sum_columns_by<Index>(columns, y, g, c);
}
