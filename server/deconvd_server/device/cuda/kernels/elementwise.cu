// Kernels that read and write each element once: the bias, and casts between element types.
//
// Macros, from elementwise.py: ELEMENT, SOURCE (the type that is cast from), THREADS.

using Index = long long;

// Adds b[c] to every element of channel c of y, of shape (n, channels, pixels).
//
// A vector may reach beyond the end of a channel, so each of its elements finds its own channel.
template <int width>
__device__ void add_bias_by(ELEMENT *y, const ELEMENT *b, Index first, Index count, unsigned channels, Index pixels)
{
    using Elements = Vector<ELEMENT, width>;
    const Index start = first + ((Index)blockIdx.x * THREADS + threadIdx.x) * width;
    for (Index i = start; i + width <= count; i += (Index)gridDim.x * THREADS * width) {
        Elements elements = *(Elements *)(y + i);
        Index row = count < (1ll << 32) && pixels < (1ll << 32) ? (unsigned)i / (unsigned)pixels : i / pixels;
        Index pixel = i - row * pixels;
        unsigned channel = row % channels;
#pragma unroll
        for (int j = 0; j < width; ++j) {
            elements.values[j] = narrowed<ELEMENT>(widen(elements.values[j]) + widen(b[channel]));
            if (++pixel == pixels) {
                pixel = 0;
                if (++channel == channels) channel = 0;
            }
        }
        *(Elements *)(y + i) = elements;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
add_bias(ELEMENT *y, const ELEMENT *b, Index count, unsigned channels, Index pixels)
{
    constexpr int width = 16 / sizeof(ELEMENT);
    Index vectors_end = 0;
    if (is_aligned(y)) {
        add_bias_by<width>(y, b, 0, count, channels, pixels);
        vectors_end = count / width * width;
    }
    add_bias_by<1>(y, b, vectors_end, count, channels, pixels);
}

template <int width> __device__ void cast_by(const SOURCE *source, ELEMENT *target, Index first, Index count)
{
    using Sources = Vector<SOURCE, width>;
    using Targets = Vector<ELEMENT, width>;
    const Index start = first + ((Index)blockIdx.x * THREADS + threadIdx.x) * width;
    for (Index i = start; i + width <= count; i += (Index)gridDim.x * THREADS * width) {
        Sources from = *(const Sources *)(source + i);
        Targets to;
#pragma unroll
        for (int j = 0; j < width; ++j) narrow(to.values[j], widen(from.values[j]));
        *(Targets *)(target + i) = to;
    }
}

// Sets target to source, rounded to nearest even.
extern "C" __global__ void __launch_bounds__(THREADS) cast(const SOURCE *source, ELEMENT *target, Index count)
{
    constexpr int width = 16 / (sizeof(SOURCE) > sizeof(ELEMENT) ? sizeof(SOURCE) : sizeof(ELEMENT));
    Index vectors_end = 0;
    if (is_aligned(source) && is_aligned(target)) {
        cast_by<width>(source, target, 0, count);
        vectors_end = count / width * width;
    }
    cast_by<1>(source, target, vectors_end, count);
}
