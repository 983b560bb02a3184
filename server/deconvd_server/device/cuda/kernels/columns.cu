// Columns: for each output channel and tap of the filter, one value for each input pixel (im2col and col2im).
//
// The pixels of all samples are counted in one row, in the order n, h, w. A matrix (rows, pixels) of a range of them is
// called packed.
//
// The structs KernelGeometry and Columns are generated from structs.py. Macros, from fallback.py: ELEMENT, THREADS.

using Index = long long;

// Sets packed, of shape (channels, pixels), to the pixels [first, first + pixels) of images (n, channels,
// image_pixels).
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

// Sets columns, of shape (c_O h_K w_K, pixels), to the gy of the output pixel that each tap links to each input pixel,
// and to 0 outside the image.
extern "C" __global__ void __launch_bounds__(THREADS)
gather_columns(const ELEMENT *gy, ELEMENT *columns, KernelGeometry g, Index first, Index pixels)
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

// Returns the sum of the columns of an output pixel, by ascending tap.
//
// `columns` are those of one channel and sample, `step` elements from one tap's to the next. With a larger tap it is an
// earlier pixel that reaches the output, so all pixels before the image come last.
template <typename Integer>
__device__ __forceinline__ Sum sum_of_taps(const Sum *columns, const KernelGeometry &g, const Columns &c,
                                           FirstTap<Integer> h, const FirstTap<Integer> &first_w, Index step, Sum total)
{
    for (; h.tap < g.h.kernel && h.pixel >= 0; h.tap += g.h.tap_step, h.pixel -= g.h.image_step) {
        if (h.pixel >= g.h.image) continue;
        FirstTap<Integer> w = first_w;
        for (; w.tap < g.w.kernel && w.pixel >= 0; w.tap += g.w.tap_step, w.pixel -= g.w.image_step) {
            const Integer pixel = h.pixel * g.w.image + w.pixel - c.first_pixel;
            if (w.pixel < g.w.image && pixel >= 0 && pixel < c.pixels)
                total += columns[((Index)h.tap * g.w.kernel + w.tap) * step + pixel];
        }
    }
    return total;
}

// Sets some channels of some samples of y to the sums of their columns, each in the order of its taps.
//
// columns has the shape (groups, channels, h_K w_K, samples pixels). If it has only some of the pixels, totals keeps
// the sums from chunk to chunk, in the shape (samples, groups channels, h_O w_O). Threads are ordered by phase, then by
// pixel: those of a warp take output pixels that are a stride apart, whose columns are next to each other.
template <typename Integer>
__device__ void sum_columns_by(const Sum *columns, Sum *totals, ELEMENT *y, const KernelGeometry &g, const Columns &c)
{
    const Index output_pixels = (Index)g.h.output * g.w.output;
    const Index taps = (Index)g.h.kernel * g.w.kernel, tap_step = (Index)c.samples * c.pixels;
    const unsigned channels = g.groups * c.channels, group_outputs = g.output_channels / g.groups;
    const Integer steps = (g.w.output + g.w.stride - 1) / g.w.stride;  // pixels of one phase in a row
    const Integer at = (Integer)blockIdx.x * THREADS + threadIdx.x;
    const Integer h = at / (steps * g.w.stride), phase = at % (steps * g.w.stride) / steps;
    const Integer w = at % steps * g.w.stride + phase;
    if (h >= g.h.output || w >= g.w.output) return;
    const FirstTap<Integer> first_h(g.h, h), first_w(g.w, w);
    for (unsigned row = blockIdx.y; row < (unsigned)c.samples * channels; row += gridDim.y) {
        const unsigned sample = row / channels, channel = row % channels;
        const unsigned group = channel / (unsigned)c.channels;
        const Index y_channel = (Index)group * group_outputs + c.first_channel + (channel - group * c.channels);
        const Sum *first = columns + channel * taps * tap_step + (Index)sample * c.pixels;
        const Index pixel = (Index)h * g.w.output + w, total = row * output_pixels + pixel;
        const Sum sum =
            sum_of_taps(first, g, c, first_h, first_w, tap_step, c.begins ? Sum(0) : totals[total]);
        const Index plane = (Index)(c.first_sample + sample) * g.output_channels + y_channel;
        if (c.ends)
            narrow(y[plane * output_pixels + pixel], sum);
        else
            totals[total] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_columns(const Sum *columns, Sum *totals, ELEMENT *y, KernelGeometry g, Columns c)
{
    sum_columns_by<int>(columns, totals, y, g, c);
}

// The same for images and filters whose coordinates need more than 32 bits.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_wide_columns(const Sum *columns, Sum *totals, ELEMENT *y, KernelGeometry g, Columns c)
{
    sum_columns_by<Index>(columns, totals, y, g, c);
}

// Sets results to the sums of `parts` arrays of `count` elements, in order.
extern "C" __global__ void __launch_bounds__(THREADS)
add_parts(const Sum *arrays, ELEMENT *results, Index count, int parts)
{
    const Index at = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (at >= count) return;
    Sum sum = 0;
#pragma unroll 8
    for (int part = 0; part < parts; ++part) sum += arrays[part * count + at];
    narrow(results[at], sum);
}
