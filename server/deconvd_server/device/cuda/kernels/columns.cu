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

// Returns the sum of what the taps bring to output pixel (h, w); column_rows are one channel's taps.
__device__ Compute<ELEMENT>::type sum_of_taps(const Compute<ELEMENT>::type *column_rows, const Geometry &g, int h,
                                              int w, Index pixels)
{
    Compute<ELEMENT>::type sum = 0;
    const int first_kw = first_tap(g.w, w);
    for (int kh = first_tap(g.h, h); kh < g.h.kernel; kh += g.h.tap_step) {
        const Index image_h = ((Index)h + g.h.pad - (Index)kh * g.h.dilate) / g.h.stride;
        if ((Index)h + g.h.pad < (Index)kh * g.h.dilate) break;
        if (image_h >= g.h.image) continue;
        for (int kw = first_kw; kw < g.w.kernel; kw += g.w.tap_step) {
            const Index image_w = ((Index)w + g.w.pad - (Index)kw * g.w.dilate) / g.w.stride;
            if ((Index)w + g.w.pad < (Index)kw * g.w.dilate) break;
            if (image_w >= g.w.image) continue;
            sum += column_rows[((Index)kh * g.w.kernel + kw) * pixels + image_h * g.w.image + image_w];
        }
    }
    return sum;
}

// Sets some channels of some samples of y to the sums of their columns, each in the order of its taps.
//
// columns has the shape (groups, channels, h_K w_K, samples h_I w_I), for the channels [first_channel,
// first_channel + channels) of each group and the samples [first_sample, first_sample + samples).
extern "C" __global__ void __launch_bounds__(THREADS)
sum_columns(const Compute<ELEMENT>::type *columns, ELEMENT *y, Geometry g, int first_sample, int samples,
            int first_channel, int channels)
{
    const Index output_pixels = (Index)g.h.output * g.w.output, image_pixels = (Index)g.h.image * g.w.image;
    const Index taps = (Index)g.h.kernel * g.w.kernel, pixels = samples * image_pixels;
    const int group_channels = g.output_channels / g.groups;
    const Index rows = (Index)samples * g.groups * channels;
    const Index offset = (Index)blockIdx.x * THREADS + threadIdx.x;
    if (offset >= output_pixels) return;
    const int h = offset / g.w.output, w = offset % g.w.output;
    for (Index row = blockIdx.y; row < rows; row += gridDim.y) {
        const Index channel = row % ((Index)g.groups * channels);
        const int sample = row / ((Index)g.groups * channels);
        const Index y_channel = channel / channels * group_channels + first_channel + channel % channels;
        const auto sum = sum_of_taps(columns + channel * taps * pixels + sample * image_pixels, g, h, w, pixels);
        narrow(y[((Index)(first_sample + sample) * g.output_channels + y_channel) * output_pixels + offset], sum);
    }
}
